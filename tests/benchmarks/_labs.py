"""Tables of lab values for the imputation benchmark, holes to put into them, and the rivals.

Plain pandas, for the benchmarks only. A panel is what one order measures, as far as the data tell.
"""

from pathlib import Path

import _eicu
import numpy as np
import pandas as pd
from sklearn.base import BaseEstimator
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.experimental import enable_iterative_imputer  # noqa: F401
from sklearn.impute import IterativeImputer, KNNImputer, SimpleImputer
from sklearn.utils import Bunch

from ehrfuse.datasets._engine import events_series
from ehrfuse.datasets.physionet2012 import PANELS

CONSTANT = ("MechVent",)  # charted only when true
SUPPORT2 = {
    "vitals": ("meanbp", "hrt", "resp", "temp"),
    "blood_gas": ("pafi", "ph"),
    "liver": ("alb", "bili"),
    "chemistry": ("crea", "sod", "bun", "glucose"),
    "urine": ("urine",),
    "blood_count": ("wblc",),
    "disability": ("adlp", "adls"),
    "admission": ("age", "edu", "num.co", "scoma"),
}
MIN_KNOWN = 20  # values of a column, or it is left out
ORDER = 5  # labs of an hour from which on it counts as one with a draw


def physionet2012(folder, sets="abc"):
    """Last value of every variable in the first 48 hours, one row a stay of the first set found."""
    long = _long(folder, sets)
    if long is None:
        return None
    table = long.groupby(["RecordID", "variable"])["value"].last().unstack()
    return _bunch(table, PANELS)


def physionet2012_events(folder, n_rows=None, sets="abc"):
    """All values of the first 48 hours as one stream, hours before the end."""
    long = _long(folder, sets)
    if long is None:
        return None
    stays = np.sort(long["RecordID"].unique())
    # Every k-th stay, so that a part is spread over all of them.
    stays = stays[:: max(1, len(stays) // n_rows)][:n_rows] if n_rows else stays
    long = long[long["RecordID"].isin(stays)]
    kinds = sorted({v for panel in PANELS.values() for v in panel} - set(CONSTANT))
    return Bunch(long=long, stays=stays, variables=kinds, panels=PANELS)


def stream(long, stays, variables, value):
    """Events column of the stays: one cell a stay."""
    cells = events_series(
        np.searchsorted(stays, long["RecordID"]), long["minutes"] / 60 - 48.0,
        pd.Categorical(long["variable"], categories=variables), value, len(stays),
    )  # fmt: skip
    return pd.DataFrame({"course": cells})


def _long(folder, sets):
    places = (Path(folder) / "physionet-2012", Path(folder))
    files = [p / f"set-{one}.parquet" for one in sets for p in places]
    found = [path for path in files if path.exists()]
    if not found:
        return None
    long = pd.read_parquet(found[0])
    kept = {v for panel in PANELS.values() for v in panel} - set(CONSTANT)
    long = long[long["variable"].isin(kept) & (long["value"] >= 0)]
    return long.sort_values(["RecordID", "minutes"], kind="stable").reset_index(drop=True)


def eicu(folder, sets=None):
    """Hours of the eICU demo with at least five labs, one row an hour; stays are the groups."""
    place = _eicu.find(folder)
    if place is None:
        return None
    hours = pd.read_parquet(place / "derived" / "hourly_labs_vitals.parquet")
    labs = [v for name, p in _eicu.PANELS.items() if name not in ("vitals", "urine") for v in p]
    hours = hours[hours[labs].notna().sum(axis=1) >= ORDER]
    return _bunch(hours, _eicu.PANELS, hours["patientunitstayid"].to_numpy())


def support2(folder, sets=None):
    """Day-3 physiology and admission facts of SUPPORT2, one row a patient."""
    places = (Path(folder) / "support2", Path(folder))
    found = [p / "support2.csv.gz" for p in places if (p / "support2.csv.gz").exists()]
    return _bunch(pd.read_csv(found[0]), SUPPORT2) if found else None


def _bunch(table, panels, groups=None):
    panels = {
        name: [v for v in p if v in table and v not in CONSTANT] for name, p in panels.items()
    }
    panels = {name: p for name, p in panels.items() if p}
    X = table[[v for p in panels.values() for v in p]].astype("float64")
    groups = np.arange(len(X)) if groups is None else groups
    return Bunch(X=X.reset_index(drop=True), panels=panels, groups=groups)


# ---------------------------------------------------------------- holes


def hide_cells(X, panels, rng):
    """A fifth of the observed cells, at random."""
    return X.notna().to_numpy() & (rng.random(X.shape) < 0.2)


def hide_panels(X, panels, rng):
    """Three in ten panels of every row, whole, as if they had not been ordered."""
    hidden = np.zeros(X.shape, bool)
    for names in panels.values():
        places = [X.columns.get_loc(v) for v in names]
        hidden[:, places] = (rng.random(len(X)) < 0.3)[:, None]
    return hidden & X.notna().to_numpy()


def errors(truth, guess, hidden, scale):
    """Root mean square and mean absolute error in sd of the training rows, mean over columns."""
    found = []
    for j in range(truth.shape[1]):
        rows = hidden[:, j]
        if rows.sum() >= MIN_KNOWN:
            e = (guess[rows, j] - truth[rows, j]) / scale[j]
            found.append((np.sqrt((e**2).mean()), np.abs(e).mean()))
    return np.mean(found, axis=0)


# ---------------------------------------------------------------- rivals


class TreesByColumn(BaseEstimator):
    """One HistGradientBoostingRegressor a column, from all other columns, holes as they are.

    Parameters
    ----------
    random_state : int
    """

    def __init__(self, random_state):
        self.random_state = random_state

    def fit(self, X):
        """Fit every column to its known cells."""
        self.models_ = {}
        for column in X:
            known = X[column].notna()
            others = X.loc[known].drop(columns=column)
            others = others.loc[:, others.nunique() > 1]
            model = HistGradientBoostingRegressor(random_state=self.random_state)
            self.models_[column] = model.fit(others, X.loc[known, column]), list(others)
        return self

    def transform(self, X):
        """Fill the holes."""
        filled = X.copy()
        for column, (model, others) in self.models_.items():
            hole = X[column].isna()
            if hole.any():
                filled.loc[hole, column] = model.predict(X.loc[hole, others])
        return filled


def rivals(seed):
    """Name to unfitted imputer."""
    return {
        "mean": SimpleImputer(),
        "IterativeImputer": IterativeImputer(random_state=seed),
        "KNNImputer": KNNImputer(),
        "HistGradientBoosting per column": TreesByColumn(seed),
    }
