"""X as an estimator wants it: the frame, the columns of its modalities, in the user's words."""

import inspect

import pandas as pd
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import nn

from ehrfuse._patterns import kind_names, modality_columns
from ehrfuse.modalities import Modality, Tabular


class Frames:
    """The part of `TorchEstimator` that checks X and finds the modalities of a fit."""

    modalities: "dict | None"
    groups: "str | None"
    _accepts: tuple[type, ...]
    _fit_only: tuple[type, ...]

    def _frame(self, X, y="no_validation", *, reset):
        """X as a frame of this estimator's columns, checked as scikit-learn does."""
        if isinstance(X, pd.DataFrame):
            _refuse_bad_frame(X)
            if self.modalities is not None:
                X = self._own_columns(X, reset)
            elif not reset and self.groups is not None and self.groups not in X.columns:
                names = [c for c in self.feature_names_in_ if c in X.columns or c == self.groups]
                X = X.reindex(columns=names)  # the patient is not needed at predict
            # Object cells must survive, so names are checked and cells are not.
            validate_data(self, X, y, reset=reset, skip_check_array=True)
            return X
        if self.modalities is not None:
            raise ValueError(
                f"X is {type(X).__name__}; with declared modalities it must be a pandas DataFrame "
                "that holds their columns."
            )
        if y is None:  # raises the usual message where y is required
            validate_data(self, X, y, reset=reset, skip_check_array=True)
        X = validate_data(self, X, reset=reset, ensure_all_finite="allow-nan")
        names = [f"x{j}" for j in range(X.shape[1])]
        if not reset:  # an array after a frame: by position, as scikit-learn takes it
            names = list(getattr(self, "feature_names_in_", names))
        return pd.DataFrame(X, columns=names)

    def _own_columns(self, X, reset):
        """Cut X to the columns of the declared modalities, plus the groups column in fit."""
        if reset:
            kept = [m for m in self._named().values() if isinstance(m, Modality)]
            own = [c for m in kept for c in modality_columns(m, X)]
            own += [] if self.groups is None else [self.groups]
            known = own and set(own) <= set(X.columns)  # else the modality itself will complain
            self.fit_only_columns_ = self._fit_only_columns(X) if known else []
            return X[list(dict.fromkeys(own))] if known else X
        check_is_fitted(self)
        own = list(self.feature_names_in_)
        lost = [c for c in own if c not in X.columns]
        needed = [c for c in lost if c not in self.fit_only_columns_]
        if needed:
            raise ValueError(
                f"X lacks columns that fit has read: {needed}; add them, with nulls where nothing "
                "is known."
            )
        return X.reindex(columns=own) if lost else X[own]

    def _fit_only_columns(self, X):
        """Columns that predict does without, filled with nulls where they lack.

        The patient, and what no modality reads that this estimator needs at predict.
        """
        needed, others = set(), [] if self.groups is None else [self.groups]
        for modality in self._named().values():
            if isinstance(modality, Modality):
                skip = not isinstance(modality, self._accepts) or isinstance(
                    modality, self._fit_only
                )
                columns = modality_columns(modality, X)
                others += columns if skip else []
                needed |= set() if skip else set(columns)
        return [c for c in dict.fromkeys(others) if c not in needed]

    def _declared(self, X):
        """The modalities of this fit, by name; says what is wrong in the user's words."""
        if self.groups is not None and self.groups not in X.columns:
            raise ValueError(f"groups={self.groups!r} is no column of X; it must name one.")
        if self.groups is not None and X[self.groups].isna().any():
            raise ValueError(
                f"Column {self.groups!r} (groups) has {int(X[self.groups].isna().sum())} nulls; "
                "every row needs its patient, or rows of one patient could be split."
            )
        self.ignored_modalities_ = []
        if self.modalities is None:
            return {"table": Tabular(self._undeclared_columns(X))}
        if not isinstance(self.modalities, dict):
            raise ValueError(
                f"modalities is {type(self.modalities).__name__}; it must be a dict such as "
                "{'vitals': Tabular(['age'])}, or None."
            )
        declared = {n: m for n, m in self.modalities.items() if not dropped(m)}
        self._check_names(declared)
        self.ignored_modalities_ = [
            n for n, m in declared.items() if not isinstance(m, self._accepts)
        ]
        kept = {n: m for n, m in declared.items() if n not in self.ignored_modalities_}
        if not kept:
            got = {n: type(m).__name__ for n, m in declared.items()}
            raise ValueError(
                f"{type(self).__name__} reads {kind_names(self._accepts)}; the modalities are "
                f"{got or 'all dropped'}. "
                "Keep or declare at least one that it can read."
            )
        for name, modality in kept.items():
            if self.groups is not None and self.groups in modality_columns(modality, X):
                raise ValueError(
                    f"Column {self.groups!r} names the patient (groups) and cannot be a feature of "
                    f"modality {name!r}; take it out of its columns."
                )
        return kept

    def _check_names(self, declared):
        taken = {*inspect.signature(type(self).__init__).parameters, *dir(nn.ModuleDict)}
        for name, modality in declared.items():
            if (
                not isinstance(name, str)
                or not name.isidentifier()
                or "__" in name
                or name in taken
            ):
                raise ValueError(
                    f"{name!r} cannot name a modality: a name is an identifier without '__' that "
                    "is no parameter of the estimator; choose another word."
                )
            if not isinstance(modality, Modality):
                raise ValueError(
                    f"Modality {name!r} is {modality!r}; it must be an object such as "
                    f"Tabular([...]) or Text('...'), or 'drop'."
                )

    def _undeclared_columns(self, X):
        columns = [c for c in X.columns if c != self.groups]
        for c in columns:
            kind = X[c].dtype
            if not (pd.api.types.is_numeric_dtype(kind) or isinstance(kind, pd.CategoricalDtype)):
                raise ValueError(
                    f"Column {c!r} has dtype {kind}; declare what it is, "
                    f"e.g. modalities={{{str(c)!r}: Text({str(c)!r})}}."
                )
        return columns


def dropped(modality):
    return isinstance(modality, str) and modality == "drop"


def _refuse_bad_frame(X):
    twice = list(X.columns[X.columns.duplicated()])
    if twice:
        raise ValueError(f"X has columns of the same name: {twice[:5]}; every name must be unique.")
    odd = [c for c in X.columns if not isinstance(c, str)]
    if odd and len(odd) < X.shape[1]:
        raise ValueError(
            f"Column names of X must be strings, got {odd[0]!r}; X.columns = X.columns.astype(str) "
            "makes them so."
        )
    if not len(X):
        raise ValueError(
            f"Found array with 0 sample(s) (shape={X.shape}) while a minimum of 1 is required: "
            "X has no row."
        )
