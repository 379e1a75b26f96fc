"""Raw tables to Parquet, once: streamed, resumable, and never half-written."""

import os
import uuid
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from ehrfuse.datasets._tables import find_tables, header_of

BLOCK = 16 * 2**20
ROWS = 250_000  # of a row group
_STAMP = b"ehrfuse_source"
_TIMES = {
    "dob", "dod", "dod_hosp", "dod_ssn", "admittime", "dischtime", "deathtime", "intime",
    "outtime", "charttime", "storetime", "chartdate", "starttime", "stoptime", "startdate",
    "enddate", "edregtime", "edouttime", "ordertime", "transfertime",
}  # fmt: skip
_NUMBERS = {"valuenum", "labresult"}
_COUNTS = {
    "subject_id", "hadm_id", "stay_id", "icustay_id", "itemid", "labevent_id", "row_id",
    "specimen_id", "seq_num", "icd_version", "patientunitstayid", "patienthealthsystemstayid",
}  # fmt: skip


def to_parquet(root, out, progress=True):
    """Convert the tables of a release to Parquet, which every loader then reads much faster.

    Parameters
    ----------
    root : str or Path
        Folder with ``.csv`` or ``.csv.gz`` tables, at any depth up to three.
    out : str or Path
        Folder for the Parquet files, with the same subfolders; made if absent. Nothing is ever
        written beside the source.
    progress : bool, default=True
        Show a bar over the bytes read.

    Returns
    -------
    files : list of Path
        The Parquet files of all tables, in the order of their names.

    Raises
    ------
    FileNotFoundError
        If the folder is not there or holds no table.
    ValueError
        If a table is cut short or a cell is not of its column's type.
    OSError
        If the disk is full or not writable.

    Notes
    -----
    A table is written under another name and renamed when it is complete: a full disk or a kill
    leaves no half file, a second process does no harm, and a second call converts only what is
    absent or whose source has changed. Memory stays at some blocks of one table.

    Keys, times and measured values get their types; all other columns stay text.

    Examples
    --------
    >>> from ehrfuse.datasets import load_mimic4, to_parquet
    >>> files = to_parquet("mimic-iv/2.2", "mimic-iv-parquet")  # doctest: +SKIP
    >>> data = load_mimic4("mimic-iv-parquet")  # doctest: +SKIP
    """
    root, out = Path(root), Path(out)
    tables = find_tables(root)
    sources = {
        name: path for name, path in sorted(tables.items()) if path.suffix.lower() != ".parquet"
    }
    if not sources:
        raise FileNotFoundError(
            f"There is no .csv or .csv.gz table below {str(root)!r}; check the path."
        )
    targets = {name: _target(path, root, out) for name, path in sources.items()}
    total = sum(path.stat().st_size for path in sources.values())
    with tqdm(total=total, unit="B", unit_scale=True, disable=not progress, leave=False) as bar:
        for name, path in sources.items():
            bar.set_description(name)
            if _is_done(path, targets[name]):
                bar.update(path.stat().st_size)
            else:
                _convert(path, targets[name], bar)
    return list(targets.values())


def _target(path, root, out):
    name = path.name.lower().removesuffix(".gz").removesuffix(".csv") + ".parquet"
    return out / path.relative_to(root).parent / name


def _stamp(path):
    """Size and date of a source: another one is converted again."""
    status = path.stat()
    return f"{status.st_size} {status.st_mtime_ns}".encode()


def _is_done(path, target):
    try:
        return (pq.read_schema(target).metadata or {}).get(_STAMP) == _stamp(path)
    except (OSError, pa.ArrowException):
        return False


def _kind(name):
    name = name.lower()
    if name in _TIMES:
        return pa.timestamp("us")
    if name in _NUMBERS:
        return pa.float64()
    return pa.int64() if name in _COUNTS or name.endswith("offset") else pa.string()


def _convert(path, target, bar):
    """Stream one table into one file, under another name until it is complete."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    begun, stamp = bar.n, _stamp(path)
    try:
        with path.open("rb") as raw:
            reader = _open(raw, path)
            schema = reader.schema.with_metadata({_STAMP: stamp})
            with pq.ParquetWriter(part, schema, compression="zstd") as writer:
                for batch in reader:
                    writer.write_batch(batch.cast(schema), row_group_size=ROWS)
                    bar.update(begun + raw.tell() - bar.n)
        os.replace(part, target)
    except pa.ArrowInvalid as error:
        what = str(error).partition(": invalid value")[0]  # not what stands in the cell
        raise ValueError(
            f"{str(path)!r} cannot be converted ({what.splitlines()[0][:200]}); nothing was "
            "written. Fetch the table again."
        ) from None
    except OSError as error:
        raise _told(error, path, target) from error
    finally:
        part.unlink(missing_ok=True)
    bar.update(begun + path.stat().st_size - bar.n)


def _open(raw, path):
    """A streaming reader with lower-case names and fixed types."""
    names = header_of(path)
    if len(set(names)) < len(names):
        raise ValueError(f"{str(path)!r} has a column twice; its header is {', '.join(names)}.")
    stream = pa.CompressedInputStream(raw, "gzip") if path.suffix.lower() == ".gz" else raw
    return pacsv.open_csv(
        stream,
        pacsv.ReadOptions(column_names=names, skip_rows=1, block_size=BLOCK, use_threads=True),
        pacsv.ParseOptions(newlines_in_values=True),
        pacsv.ConvertOptions(
            column_types={name: _kind(name) for name in names},
            null_values=[""],
            strings_can_be_null=True,
        ),
    )


def _told(error, path, target):
    """The same kind of error in words that help."""
    if "ompressed stream" in str(error) or "zlib" in str(error):
        return ValueError(
            f"{str(path)!r} is cut short or damaged; nothing was written. Fetch it again."
        )
    return OSError(
        error.errno,
        f"{str(target)!r} could not be written ({error.strerror or error}); nothing is left of it. "
        "Make room and call again: finished tables are kept.",
    )
