"""Which modalities a row has: the one definition that fusion, rectifier and evaluation share."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd


def modality_columns(modality: Any, X: pd.DataFrame) -> list[str]:
    """Columns of X that a modality reads: from its `columns`, or a name or list of names."""
    columns = getattr(modality, "columns", modality)
    columns = columns(X) if callable(columns) else columns
    return [columns] if isinstance(columns, str) else list(columns)


def kind_names(kinds: tuple[type, ...]) -> str:
    """Kinds of modalities in words; of the class that all of them share, any."""
    names = [kind.__name__ for kind in kinds]
    return "any kind of modality" if names == ["Modality"] else " or ".join(names)


def presence(X: pd.DataFrame, modalities: Mapping) -> pd.DataFrame:
    """One boolean column per modality: True where any cell of its columns is not null.

    Parameters
    ----------
    X : DataFrame of shape (n_samples, n_columns)
    modalities : mapping of str to Modality, str or list of str
        ``"drop"`` entries are left out.

    Returns
    -------
    present : DataFrame of bool, shape (n_samples, n_modalities), indexed as X
    """
    present = {}
    for name, modality in modalities.items():
        if isinstance(modality, str) and modality == "drop":
            continue
        columns = modality_columns(modality, X)
        lost = [column for column in columns if column not in X.columns]
        if lost:
            raise ValueError(
                f"Modality {name!r} needs columns {lost}, which X does not have; "
                "add them (nulls are allowed) or leave the modality out."
            )
        present[name] = X[columns].notna().any(axis=1).to_numpy()
    return pd.DataFrame(present, index=X.index, dtype=bool)


def pattern_labels(present: pd.DataFrame) -> np.ndarray:
    """Readable pattern of every row, e.g. ``"labs+note"``; ``"(none)"`` where all are absent."""
    flags = present.to_numpy(dtype=bool)
    kinds, which = np.unique(flags, axis=0, return_inverse=True)
    names = np.asarray(present.columns, dtype=object)
    labels = np.array(["+".join(names[kind]) or "(none)" for kind in kinds], dtype=object)
    return labels[np.ravel(which)] if len(labels) else np.empty(0, dtype=object)
