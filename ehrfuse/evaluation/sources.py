"""Another hospital's table under the columns that a model was fitted on."""

import pandas as pd


def map_columns(X, columns, *, scale=None, values=None):
    """Bring a table of another source to shared columns, for external validation.

    Parameters
    ----------
    X : DataFrame of shape (n_samples, n_columns)
        The other source.
    columns : dict of str to str or None
        The model's column to the source's; None is a column that the source does not have, which
        becomes null, as for a patient in whom it was not measured.
    scale : dict of str to float, optional
        The model's column to the factor from the source's unit to the model's.
    values : dict of str to dict, optional
        The model's column to the source's spellings and what the model calls them; others stay,
        and a model takes those that it has not seen as unknown.

    Returns
    -------
    X : DataFrame of shape (n_samples, len(columns))
        The model's columns alone, in the order of `columns`, with the index of `X`.

    Raises
    ------
    ValueError
        If a column named is not there.

    Examples
    --------
    >>> import pandas as pd
    >>> from ehrfuse.evaluation import map_columns
    >>> there = pd.DataFrame({"creat_umol": [88.4], "gender": ["F"]})
    >>> map_columns(
    ...     there,
    ...     {"creatinine": "creat_umol", "sex": "gender", "lactate": None},
    ...     scale={"creatinine": 1 / 88.4},
    ...     values={"sex": {"F": "female", "M": "male"}},
    ... )
       creatinine     sex lactate
    0         1.0  female    None
    """
    scale, values = scale or {}, values or {}
    lost = [theirs for theirs in columns.values() if theirs is not None and theirs not in X]
    if lost:
        raise ValueError(
            f"X lacks the columns {lost}; name what it has, or None for what it does not record."
        )
    odd = [name for name in (*scale, *values) if columns.get(name) is None]
    if odd:
        raise ValueError(f"scale or values names {odd}, which `columns` maps to nothing.")
    mapped = {}
    for ours, theirs in columns.items():
        if theirs is None:
            mapped[ours] = pd.Series([None] * len(X), index=X.index, dtype=object)
            continue
        column = X[theirs]
        if ours in values:
            spelling = values[ours]
            column = column.astype(object).map(
                lambda v, s=spelling: s.get(v, v), na_action="ignore"
            )
        mapped[ours] = column * scale[ours] if ours in scale else column
    return pd.DataFrame(mapped, index=X.index)
