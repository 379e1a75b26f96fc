"""Coded events cut into visits: one record per bin of time in which anything happened."""

import numpy as np

EDGE = 1e-5  # of a bin: times such as 20 minutes are not exact in float32


def check_width(width):
    """Raise unless a bin has a positive finite width."""
    number = isinstance(width, int | float | np.number) and not isinstance(width, bool)
    if not number or not 0 < width < np.inf:
        raise ValueError(f"bin={width!r} must be a positive number of time units.")


def bin_events(records, code, values, n_codes, width, now, limit):
    """Mean value of every code in every bin, for bins in which anything happened.

    Bins are counted backwards from `now`: the first holds times in (now - width, now].

    Parameters
    ----------
    records : Records
    code : int array of shape (n_events,)
        Below 0: left out.
    values : float array of shape (n_events,)
        NaN: the code happened and left no number.
    n_codes : int
    width, now : float
    limit : int
        The latest bins of a row that are kept.

    Returns
    -------
    age : float32 array of shape (n_visits,)
        How long before `now` a bin ends; latest visit last.
    numbers : float32 array of shape (n_visits, n_codes)
        NaN where no number was measured.
    offsets : int array of shape (n_rows + 1,)
    """
    n_rows = len(records.offsets) - 1
    known = np.flatnonzero(code >= 0)
    row, code, values = records.row[known], code[known], values[known]
    age = np.maximum(0, now - records.time[known].astype("float64"))
    place = np.floor(age / width + EDGE).astype("int64")
    last = int(place.max(initial=0))
    key, visit = np.unique(row * (last + 1) + last - place, return_inverse=True)
    owner, place = key // (last + 1), last - key % (last + 1)
    count = np.bincount(owner, minlength=n_rows)
    kept = np.minimum(count, limit)
    rank = np.arange(len(key)) - np.repeat(np.cumsum(count) - count, count)
    shown = rank >= np.repeat(count - kept, count)
    new = np.where(shown, np.cumsum(shown) - 1, -1)
    numbers = np.full((int(kept.sum()), n_codes), np.nan, "float32")
    _fill_means(numbers, new[visit], code, values)
    offsets = np.concatenate([[0], np.cumsum(kept)]).astype("int64")
    return (place[shown] * width).astype("float32"), numbers, offsets


def _fill_means(numbers, visit, code, values):
    """Write the mean of every (visit, code) into the table."""
    valued = np.flatnonzero((visit >= 0) & ~np.isnan(values))
    if not len(valued):
        return
    cell = visit[valued] * numbers.shape[1] + code[valued]
    order = np.argsort(cell, kind="stable")
    starts = np.flatnonzero(np.diff(cell[order], prepend=-1))
    total = np.add.reduceat(values[valued][order].astype("float64"), starts)
    size = np.diff(np.append(starts, len(order)))
    numbers.reshape(-1)[cell[order][starts]] = total / size


def mean_of(numbers):
    """Mean of every column over its known cells, zero where there is none."""
    known = ~np.isnan(numbers)
    total = np.where(known, numbers, 0).clip(-3, 3).sum(0)
    return (total / known.sum(0).clip(1)).astype("float32")
