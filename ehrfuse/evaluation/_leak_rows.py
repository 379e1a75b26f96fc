"""Checks of the leak audit on rows: patients and copies across folds, dates, prepared columns."""

import zlib

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from ehrfuse._runtime import import_optional
from ehrfuse.evaluation._audit_case import Finding
from ehrfuse.evaluation._audit_columns import flat_records, read_column

MAX_COPIES = 20_000  # rows in which copies are looked for
TEXT_ALIKE = 0.5  # Jaccard similarity of three-word sequences
ROW_ALIKE = 0.65  # Jaccard similarity of cells when four of five agree
CELLS_ALIKE = 0.8
MIN_WORDS = 10  # shorter notes repeat by themselves
_BANDS = {TEXT_ALIKE: (32, 4), ROW_ALIKE: (20, 6)}  # of MinHash: nearly all pairs as alike as that
_TELLING = 1.0  # nats that an agreement in a column says at least, to look for copies by it
_MEMBERS = 50  # copies of one row that are looked at
_EXACT = 1e-6  # relative precision at which a column counts as standardised


# ---------------------------------------------------------------- patients


def group_overlap(case):
    """Rows or patients on both sides of a fold; without groups, signs that patients repeat."""
    rows = []
    for number, (train, test) in enumerate(case.folds):
        both = np.intersect1d(case.codes[train], case.codes[test])
        touched = int(np.isin(case.codes[test], both).sum())
        same = len(np.intersect1d(train, test))
        rows.append({"fold": number, "patients on both sides": len(both) if case.grouped else 0,
                     "test rows of these": touched if case.grouped else same,
                     "rows on both sides": same})  # fmt: skip
    table = pd.DataFrame(rows)
    if table["rows on both sides"].any():
        text = f"{table['rows on both sides'].sum()} row(s) stand on both sides of a fold."
        return Finding("group_overlap", "leak", text, table, "Use a splitter that parts the rows.")
    if table["patients on both sides"].any():
        share = table["test rows of these"].sum() / max(sum(len(t) for _, t in case.folds), 1)
        text = f"{share:.0%} of the test rows belong to patients who are in training too."
        fix = "Split by patient, for example with StratifiedGroupKFold and groups."
        return Finding("group_overlap", "leak", text, table, fix)
    if case.grouped:
        text = f"No patient stands on both sides of any of the {len(case.folds)} folds."
        return Finding("group_overlap", "pass", text, table)
    likely = [name for name in case.features if _is_identifier(case, name)]
    if likely:
        shown = ", ".join(repr(str(name)) for name in likely)
        text = f"Rows of equal {shown} are alike as rows of one patient are, and no groups came."
        evidence = pd.DataFrame(
            [{"column": str(name), "values": case.frame[name].nunique(), "rows": len(case)}
             for name in likely]
        )  # fmt: skip
        fix = f"Pass groups={str(likely[0])!r} here, and split by it."
        return Finding("group_overlap", "warn", text, evidence, fix)
    text = "No groups came, and no column could be told to be a patient's number that repeats."
    return Finding("group_overlap", "pass", text, table)


def _is_identifier(case, name):
    """Whether rows of one value agree in columns that this value does not order."""
    cells = case.frame[name]
    values = _plain_codes(cells)
    if values is None:
        return False
    n, levels = len(values), len(np.unique(values[values >= 0]))
    if levels < max(20, n / 20) or n - levels < max(20, n / 50):
        return False
    order = np.argsort(values, kind="stable")
    order = order[values[order] >= 0]
    same = np.flatnonzero(np.diff(values[order]) == 0)
    if len(same) < 20:
        return False
    agreeing = 0
    shuffled = case.rng(5).permutation(order)
    for other in case.features:
        partner = None if other == name else _plain_codes(case.frame[other])
        if partner is None or len(np.unique(partner)) < 2:
            continue
        along = partner[order]
        by_chance = (partner[shuffled][1:] == partner[shuffled][:-1]).mean()
        if by_chance > 0.9 or (along[same] == along[same + 1]).mean() < 0.98:
            continue
        steps = np.flatnonzero(np.diff(values[order]))
        changes = (along[steps] != along[steps + 1]).mean()
        agreeing += bool(changes > 0.6 * (1 - by_chance))  # else it is a step function of the value
    return agreeing >= 2


def _plain_codes(cells):
    """Integers or strings as codes in their order, -1 where missing; None for other columns."""
    if pd.api.types.is_float_dtype(cells.dtype):
        known = cells.dropna()
        if len(known) == 0 or not (known % 1 == 0).all():
            return None
    elif not (
        pd.api.types.is_integer_dtype(cells.dtype) or pd.api.types.is_bool_dtype(cells.dtype)
    ):
        sample = cells.dropna().head(100)
        if isinstance(cells.dtype, pd.ArrowDtype) or not all(isinstance(v, str) for v in sample):
            return None
        if len(sample) and sample.str.len().mean() > 40:
            return None
    try:
        return pd.factorize(cells, sort=True)[0]
    except TypeError:
        return None


# ---------------------------------------------------------------- copies


def duplicates(case):
    """Rows and notes that stand on both sides of a fold, word for word or nearly so."""
    rows = np.arange(len(case))
    if len(rows) > MAX_COPIES:
        rows = np.sort(case.rng(3).choice(rows, MAX_COPIES, replace=False))
    frame = case.frame.iloc[rows]
    evidence, worst = [], "pass"
    for name in case.features:
        sets = _shingles(frame[name])
        if sets is not None:
            evidence.append(_across(case, rows, _alike(sets, TEXT_ALIKE), f"text of {name}"))
    cells = _cells(case, frame)
    if cells is not None:
        evidence.append(_across(case, rows, _alike_rows(*cells), "rows"))
    if not evidence:
        text = "X has no notes, and too few columns to tell a copy from a coincidence."
        return Finding("duplicates", "skipped", text)
    table = pd.DataFrame(evidence)
    for row in evidence:
        many = row["test rows"] >= max(5, 0.01 * row["of"])
        # Notes of one template are alike without being copies; rows are not.
        verdict = "leak" if row["labels agree"] else "warn" if row["what"] == "rows" else "pass"
        verdict = verdict if many else "pass"
        worst = max(worst, verdict, key=("pass", "warn", "leak").index)
    most = table.sort_values("test rows").iloc[-1]
    text = f"{most['test rows']} of {most['of']} test rows have a near copy in training"
    text += f" ({most['what']})."
    if worst == "pass":
        return Finding("duplicates", "pass", text, table)
    if worst == "warn":
        text = text[:-1] + "; their outcomes agree no more than chance."
    fix = "Drop copies, or give copies one group; oversample and augment inside the training folds."
    return Finding("duplicates", worst, text, table, fix)


def _hash(text):
    return zlib.crc32(text.encode("utf-8", "surrogatepass"))


def _shingles(cells):
    """Sets of hashed three-word sequences per row, empty for short notes; None if no text."""
    column = read_column(cells)
    if column.kind != "text":
        return None
    sets = []
    for words in column.data:
        runs = zip(words, words[1:], words[2:], strict=False)
        sets.append(frozenset(_hash(" ".join(r)) for r in runs) if len(words) >= MIN_WORDS else ())
    return sets


def _alike(sets, threshold):
    """Neighbours by row: rows whose sets are equal or nearly so."""
    members = {}
    for row, found in enumerate(sets):
        if len(found):
            members.setdefault(found, []).append(row)
    kinds = list(members)
    pairs = [(a, b) for a, b in _candidates(kinds, threshold)
             if len(kinds[a] & kinds[b]) >= threshold * len(kinds[a] | kinds[b])]  # fmt: skip
    near = {}
    for a, b in pairs:
        near.setdefault(a, []).append(b)
        near.setdefault(b, []).append(a)
    neighbours = {}
    for kind, found in enumerate(kinds):
        rows = members[found]
        others = [r for k in near.get(kind, ()) for r in members[kinds[k]][:_MEMBERS]]
        if len(rows) > 1 or others:
            for row in rows:
                neighbours[row] = [r for r in rows[:_MEMBERS] if r != row] + others[:_MEMBERS]
    return neighbours


def _candidates(kinds, threshold):
    """Pairs of sets that MinHash takes for alike."""
    datasketch = import_optional("datasketch", "audit")
    bands = _BANDS[threshold]
    n_perm = int(np.prod(bands))
    hashes = datasketch.MinHash.bulk(kinds, num_perm=n_perm, seed=1, hashfunc=int)
    index = datasketch.MinHashLSH(num_perm=n_perm, params=bands)
    for place, found in enumerate(hashes):
        for other in index.query(found):
            yield other, place
        index.insert(place, found)


def _across(case, rows, neighbours, what):
    """How many test rows have a neighbour in training, and whether their outcomes agree."""
    inside = np.zeros((len(case.folds), len(case)), dtype=bool)
    for number, (train, _) in enumerate(case.folds):
        inside[number, train] = True
    values, copies, n_test, hit = case.targets[0].values, [], 0, []
    tested = np.isin(np.arange(len(case)), rows)
    for number, (_, test) in enumerate(case.folds):
        n_test += int(tested[test].sum())
        for row in np.searchsorted(rows, test[tested[test]]):
            others = [rows[o] for o in neighbours.get(row, ()) if inside[number, rows[o]]]
            if others:
                hit.append(rows[row])
                copies.append(
                    np.nanmean(values[others]) if not np.isnan(values[others]).all() else np.nan
                )
    agree, p = _outcomes_agree(values, values[hit], np.array(copies))
    return {"what": what, "test rows": len(hit), "of": n_test,
            "correlation of outcomes": p, "labels agree": agree}  # fmt: skip


def _outcomes_agree(values, own, copies):
    """Whether rows and their copies have the outcome in common beyond chance."""
    known = ~np.isnan(own) & ~np.isnan(copies)
    own, copies = own[known], copies[known]
    if len(own) < 5:
        return False, np.nan
    if own.std() > 0 and copies.std() > 0:
        p = np.corrcoef(own, copies)[0, 1]
        return bool(p * np.sqrt(len(own) - 1) > 3), p
    # All of one class, as after oversampling; the common class comes by itself.
    share = np.nanmean(values == own[0])
    return bool(share <= 0.8 and own.std() == 0 and share ** len(own) < 1e-6), np.nan


def _cells(case, frame):
    """Codes of cells fine and coarse, and what an agreement in each column says (in nats)."""
    fine, coarse, taken = [], [], []
    for name in case.features:
        cells = frame[name]
        column = read_column(cells)
        if column.kind == "number":
            values = column.data
            ranks = rankdata(np.nan_to_num(values, nan=-np.inf), method="average")
            if ranks.std() == 0:
                continue
            if any(abs(np.corrcoef(ranks, other)[0, 1]) > 0.95 for other in taken):
                continue  # the same fact in another unit says nothing more
            taken.append(ranks)
            codes = pd.factorize(np.where(np.isfinite(values), values, np.nan))[0]
            bins = codes
            if codes.max() > 64:
                bins = np.where(codes < 0, -1, np.floor(64 * (ranks - 1) / len(ranks)).astype(int))
        elif column.kind == "category":
            codes = bins = np.where(column.present, column.data, -1)
        elif column.kind == "other":
            continue
        elif column.kind == "records":
            codes = bins = _codes_of_records(column)
        else:
            text = [str(c) if p else None for c, p in zip(cells, column.present, strict=True)]
            codes = bins = pd.factorize(np.array(text, dtype=object))[0]
        fine.append(codes)
        coarse.append(bins)
    if len(fine) < 3:
        return None
    return np.column_stack(fine), np.column_stack(coarse)


def _codes_of_records(column):
    """Codes of cells by what their records hold, -1 where there are none."""
    fields = column.data.drop(columns="row")
    for name, cells in fields.items():
        if cells.dtype == object:  # lists of codes
            fields[name] = cells.astype(str)
    marks = pd.util.hash_pandas_object(fields, index=False).to_numpy()
    sums = np.zeros(len(column.present), dtype=np.uint64)
    np.add.at(sums, column.data["row"].to_numpy(), marks)
    filled = np.bincount(column.data["row"], minlength=len(sums)) > 0
    return np.where(filled, pd.factorize(sums)[0], -1)


def _says(codes):
    """Minus the log of the chance that two rows agree in a column."""
    counts = np.unique(codes, return_counts=True)[1]
    return -np.log(((counts / len(codes)) ** 2).sum())


def _alike_rows(fine, coarse):
    """Neighbours by row: most cells agree, and so many that it cannot be by accident."""
    fine_says = np.array([_says(column) for column in fine.T])
    coarse_says = np.array([_says(column) for column in coarse.T])
    telling = coarse_says >= _TELLING  # many flags in common say less than they seem to
    fine, coarse = fine[:, telling], coarse[:, telling]
    fine_says, coarse_says = fine_says[telling], coarse_says[telling]
    n, n_columns = fine.shape
    enough = 2 * np.log(n) + np.log(1000)
    if fine_says.sum() < enough:
        return {}
    keys = coarse + 1 + np.arange(n_columns) * (int(coarse.max()) + 2)
    sets = [frozenset(k[c >= 0].tolist()) for k, c in zip(keys, coarse, strict=True)]
    neighbours = {}
    for row, others in _alike(sets, ROW_ALIKE).items():
        same = (coarse[others] == coarse[row]) & (coarse[row] >= 0)
        exact = (fine[others] == fine[row]) & (fine[row] >= 0)
        told = np.where(exact, fine_says, np.where(same, coarse_says, 0)).sum(axis=1)
        filled = ((coarse[others] >= 0) | (coarse[row] >= 0)).sum(axis=1)
        good = (told >= enough) & (same.sum(axis=1) >= CELLS_ALIKE * filled)
        if good.any():
            neighbours[row] = list(np.array(others)[good])
    return neighbours


# ---------------------------------------------------------------- time


def time_order(case):
    """Records and dates after the prediction; training rows later than a test row of a patient."""
    rows, looked = [], False
    for name in case.features:
        cells = case.frame[name]
        if pd.api.types.is_datetime64_any_dtype(cells.dtype) and case.time is not None:
            looked = True
            late = _later(cells, case.time)
            if late.any():
                rows.append({"where": str(name), "what": "dates after the row's time",
                             "rows": int(late.sum()), "records": int(late.sum())})  # fmt: skip
            continue
        flat = _dated_records(cells)
        if flat is None:
            continue
        looked = True
        rows += _late_records(case, name, flat)
    if case.time is not None:
        looked = True
        rows += _later_rows(case)
    if not looked:
        text = "X has no dated records, and no time came."
        return Finding("time_order", "skipped", text)
    if not rows:
        return Finding("time_order", "pass", "Nothing is dated after its prediction.")
    table = pd.DataFrame(rows).sort_values("rows", ascending=False, ignore_index=True)
    first = table.iloc[0]
    text = f"{first['rows']} row(s): {first['what']} ({first['where']})."
    fix = (
        "Cut every record at the prediction time, and split so that no patient's later row trains."
    )
    return Finding("time_order", "leak", text, table, fix)


def _later(cells, time):
    """Where a date lies after the time of its row; only of dates and dates."""
    if not pd.api.types.is_datetime64_any_dtype(time.dtype):
        return np.zeros(len(cells), dtype=bool)
    return (cells.reset_index(drop=True) > time).to_numpy()


def _dated_records(cells):
    if cells.dtype != object and not isinstance(cells.dtype, pd.ArrowDtype):
        return None
    flat = flat_records(cells)
    return flat if flat is not None and "time" in flat else None


def _late_records(case, name, flat):
    """Lines of evidence on records of one column that lie after the prediction."""
    when = flat["time"]
    if pd.api.types.is_datetime64_any_dtype(when.dtype):
        if case.time is None:
            return []
        late = _later(when, case.time.iloc[flat["row"]].reset_index(drop=True))
    else:
        late = pd.to_numeric(when, errors="coerce").to_numpy(dtype=float) > 1e-9
    if not late.any():
        return []
    found = flat[late]
    line = {"where": str(name), "what": "records after the prediction",
            "rows": found["row"].nunique(), "records": len(found), "most often": ""}  # fmt: skip
    if "code" in found:
        patients = found.assign(patient=case.codes[found["row"]]).groupby("code", observed=True)
        counts = patients["patient"].nunique()
        common = counts[counts >= 5].sort_values(ascending=False).index[:5]
        line["most often"] = ", ".join(map(str, common))
    return [line]


def _later_rows(case):
    """Folds in which a patient's later row trains a model that predicts an earlier one."""
    rows = []
    time = case.time
    if not case.grouped or time.isna().all():
        return rows
    for number, (train, test) in enumerate(case.folds):
        latest = time.iloc[train].groupby(case.codes[train]).max()
        late = pd.Series(case.codes[test]).map(latest).reset_index(drop=True)
        late = (late > time.iloc[test].reset_index(drop=True)).to_numpy()
        if late.any():
            what = "test rows with a later row of the patient in training"
            line = {"where": f"fold {number}", "what": what, "rows": int(late.sum()), "records": 0}
            rows.append(line)
    return rows


# ---------------------------------------------------------------- prepared columns


def preparation(case):
    """Columns that were scaled, filled or encoded with the help of all rows, held-out ones too."""
    rows = []
    for name in case.features:
        cells = case.frame[name]
        if not pd.api.types.is_numeric_dtype(cells.dtype):
            continue
        values = cells.to_numpy(dtype=float, na_value=np.nan)
        known = np.isfinite(values)
        if known.sum() < 20 or len(np.unique(values[known])) < 5:
            continue
        encoded = any(_is_target_mean(values, t.values) for t in case.targets)
        what = "means of the outcome by level" if encoded else _prepared(values[known])
        if what:
            rows.append({"column": str(name), "what": what, "encoded": encoded})
    table = pd.DataFrame(rows)
    if not rows:
        text = "No column bears the marks of scaling, filling or encoding over all rows."
        return Finding("preparation", "pass", text)
    shown = ", ".join(repr(name) for name in table["column"][:5])
    encoded = table[table["encoded"]]
    table = table.drop(columns="encoded")
    if len(encoded):
        shown = ", ".join(repr(name) for name in encoded["column"][:5])
        text = f"{shown} hold(s) means of the outcome over all rows, held-out ones too."
        return Finding("preparation", "leak", text, table, "Use TargetEncoder inside the pipeline.")
    # One column with mean 0 and deviation 1 to six digits is no accident either.
    text = (
        f"{len(table)} column(s) were prepared on exactly these rows, held-out ones too: {shown}."
    )
    fix = "Put scalers and imputers into the pipeline, so that they learn from training rows only."
    return Finding("preparation", "warn", text, table, fix)


def _prepared(values):
    """Words on the mark that scaling or filling over these very rows leaves, or nothing."""
    mean, spread = values.mean(), values.std()
    if spread > 0 and abs(mean) < _EXACT * spread:
        for deviation in (spread, values.std(ddof=1)):
            if abs(deviation - 1) < _EXACT:
                return "mean 0 and standard deviation 1"
    if spread == 0:
        return ""
    levels, counts = np.unique(values, return_counts=True)
    top = counts.argmax()
    rest = np.delete(levels, top), np.delete(counts, top)
    if counts[top] >= max(5, 0.02 * len(values)) and counts[top] > 3 * rest[1].max():
        filled = np.average(rest[0], weights=rest[1])
        plain = abs(levels[top] * 100 - round(levels[top] * 100)) < 1e-6  # 7.4 may be the mean
        if not plain and abs(filled - levels[top]) < _EXACT * rest[0].std():
            return "missing cells filled with the mean"
    return ""


def _is_target_mean(values, target):
    """Whether levels of a column are (smoothed) means of the outcome over exactly their rows."""
    known = np.isfinite(values) & ~np.isnan(target)
    levels, codes, counts = np.unique(values[known], return_inverse=True, return_counts=True)
    if len(levels) < 5 or len(levels) > len(codes) / 2 or target[known].std() == 0:
        return False
    means = np.bincount(codes, weights=target[known]) / counts
    if means.std() == 0 or np.ptp(levels) == 0:
        return False
    # Smoothing by m rows of mean p: count * (level - mean) = m * (p - level), a straight line.
    # Levels that two categories share lie off it, so most levels must lie on it, not all.
    pulled = counts * (levels - means)
    design = np.column_stack([np.ones(len(levels)), levels])
    scale = (counts * np.abs(means - np.average(means, weights=counts))).max()
    weights = np.ones(len(levels))
    for _ in range(30):  # least absolute differences by reweighting
        root = np.sqrt(weights)
        line, *_ = np.linalg.lstsq(design * root[:, None], pulled * root, rcond=None)
        left = np.abs(pulled - design @ line)
        weights = 1 / np.maximum(left, 1e-9 * scale)
    on_it = left < 1e-5 * scale
    return bool(on_it.sum() >= max(5, 0.7 * len(levels)))
