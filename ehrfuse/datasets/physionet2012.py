"""PhysioNet/CinC Challenge 2012: 48 hours of intensive care, and who left the hospital alive.

A bundled sample of 2,000 stays for everybody, and the whole sets a, b and c from a folder or from
the official page. The panels below are what one order brings: a clinician draws a gas, sends a
metabolic panel, puts in an arterial line, or does not.
"""

import hashlib
import io
import os
import re
import tarfile
import zipfile
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv
from sklearn.utils import Bunch

from ehrfuse._runtime import check_option, import_optional
from ehrfuse.datasets._engine import events_series, read_parquet

# One entry is one decision at the bedside. The metabolic panel and the blood count follow the
# usual laboratory panels (basic metabolic panel with magnesium; haematocrit, white cells and
# platelets of the complete blood count), the liver panel the hepatic function panel, which
# includes albumin. Lactate is asked for by itself when shock is suspected. Cuff pressures belong
# to the bedside chart, invasive ones need a line.
PANELS = {
    "vitals": ("HR", "RespRate", "Temp", "NISysABP", "NIDiasABP", "NIMAP", "GCS"),
    "urine": ("Urine",),
    "arterial_line": ("SysABP", "DiasABP", "MAP"),
    "ventilation": ("MechVent", "FiO2"),
    "blood_gas": ("pH", "PaCO2", "PaO2", "SaO2"),
    "lactate": ("Lactate",),
    "metabolic": ("Na", "K", "HCO3", "BUN", "Creatinine", "Glucose", "Mg"),
    "blood_count": ("HCT", "WBC", "Platelets"),
    "liver": ("ALT", "AST", "ALP", "Bilirubin", "Albumin"),
    "cardiac": ("TroponinI", "TroponinT"),
    "lipids": ("Cholesterol",),
}
STATIC = ("age", "gender", "height", "icu_type", "weight", "weight_change")
HORIZON = 48.0  # hours from admission to the prediction

_VARIABLES = ["Age", "Gender", "Height", "ICUType", "Weight"]
_VARIABLES += [variable for panel in PANELS.values() for variable in panel]
_GENDERS = ("female", "male")  # coded 0, 1
_ICU_TYPES = ("coronary", "cardiac surgery", "medical", "surgical")  # coded 1 to 4
_REFERENCE = ("SAPS-I", "SOFA", "Length_of_stay", "Survival")
_LABEL = "In-hospital_death"

_PAGE = "https://physionet.org/content/challenge-2012/1.0.0/"
_FILES_URL = "https://physionet.org/files/challenge-2012/1.0.0/"
_SHA256 = {
    "set-a.tar.gz": "8cb250f179cd0952b4b9ebcf8954b63d70383131670fac1cfee13deaa13ca920",
    "set-b.tar.gz": "b1637a2a423a8e76f8f087896cfc5fdf28f88519e1f4e874fbda69b2a64dac30",
    "set-c.tar.gz": "a4a56b95bcee4d50a3874fe298bf2998f2ed0dd98a676579573dc10419329ee1",
    "Outcomes-a.txt": "2613ea60ccda29f87571a7d6b09ad130858a8ccd66325bd073365925026883c2",
    "Outcomes-b.txt": "1305f29734da374a809483229a99f33a9230aa8d4fa74b1a2d6ad788136423d5",
    "Outcomes-c.txt": "0b32dcb7753c0f18f2f5fde498a28618b8879c5e527ce0dae8ad120dd7e205c9",
}

_DESCRIPTION = f"""PhysioNet/Computing in Cardiology Challenge 2012, version 1.0.0 ({_PAGE}).
Open Data Commons Attribution License v1.0. Please cite Silva I, Moody G, Scott DJ, Celi LA,
Mark RG, Comput Cardiol 2012;39:245-248, and Goldberger AL et al., Circulation 2000;101:e215-e220.

One row per intensive-care stay (one stay per patient), seen 48 hours after admission. Label:
death in hospital. Events are timed in hours before the prediction, from -48 to 0. A panel is null
when nothing of it was measured. Negative values and weights of zero stand for "not available" and
are left out; all other values are as charted, implausible ones included.
"""


def load_physionet2012(return_X_y=False):
    """Load 2,000 intensive-care stays with vital and laboratory panels of the first 48 hours.

    The sample is part of the package: nothing is downloaded. It holds half of set A of the
    PhysioNet/CinC Challenge 2012, chosen by a hash of the record number.

    Parameters
    ----------
    return_X_y : bool, default=False
        Return ``(X, y)`` instead of a Bunch.

    Returns
    -------
    data : :class:`~sklearn.utils.Bunch`
        With the attributes

        X : DataFrame of shape (2000, 17)
            Indexed by ``RecordID``. Static columns: ``age`` (years, 90 stands for 90 and above),
            ``gender``, ``height`` (cm), ``icu_type``, ``weight`` (kg, the first known one) and
            ``weight_change`` (kg, last minus first; null unless weighed again). Then one Arrow
            events column per panel, times in hours relative to the prediction at 48 hours
            (-48 to 0), null where nothing of the panel was measured.
        y : Series of int, shape (2000,)
            1 if the patient died in hospital.
        groups : int array of shape (2000,)
            ``RecordID``; every stay is another patient.
        modalities : dict of str to Modality
            One entry for the static columns and one per panel, ready for any estimator.
        reference : DataFrame of shape (2000, 4)
            SAPS-I, SOFA, length of stay (days) and survival (days). Scores and outcomes to compare
            with, never inputs.
        description : str
            Source, licence and contents.

    (X, y) : tuple
        If `return_X_y` is True.

    See Also
    --------
    fetch_physionet2012 : The whole sets.

    Notes
    -----
    No variable stands in two modalities. Body weight is charted again and again, but as a repeated
    entry more often than as a measurement; what the later entries add, the gain or loss of fluid,
    is ``weight_change``. ``MechVent`` is charted only when true. Blood pressures come as
    non-invasive (``vitals``) and invasive (``arterial_line``) variables, which differ.

    The data are under the Open Data Commons Attribution License v1.0; see ``NOTICE.txt`` beside
    the files.

    References
    ----------
    .. [1] Silva I, Moody G, Scott DJ, Celi LA, Mark RG. Predicting in-hospital mortality of ICU
       patients: The PhysioNet/Computing in Cardiology Challenge 2012. Comput Cardiol
       2012;39:245-248.
    .. [2] Goldberger AL et al. PhysioBank, PhysioToolkit, and PhysioNet. Circulation
       2000;101(23):e215-e220.

    Examples
    --------
    >>> from ehrfuse.datasets import load_physionet2012
    >>> data = load_physionet2012()
    >>> data.X.shape, int(data.y.sum())
    ((2000, 17), 283)
    >>> float(data.X["lactate"].isna().mean())  # not measured
    0.459
    """
    folder = files("ehrfuse.datasets") / "data"
    with (
        as_file(folder / "physionet2012_sample.parquet") as measured,
        as_file(folder / "physionet2012_outcomes.txt") as outcomes,
    ):
        return _bunch(_read_long(measured), _read_outcomes(outcomes), return_X_y)


def fetch_physionet2012(data_home=None, subset="a", return_X_y=False):
    """Load a whole set of the PhysioNet/CinC Challenge 2012: 4,000 stays from disk or the web.

    Parameters
    ----------
    data_home : str or Path, default=None
        Folder to look in, itself and its subfolder ``physionet-2012``; downloads go into that
        subfolder. By default the environment variable ``EHRFUSE_DATA``, else ``~/ehrfuse_data``.
    subset : {"a", "b", "c"}, default="a"
        Which set. The challenge trained on set a and tested on b and c.
    return_X_y : bool, default=False
        Return ``(X, y)`` instead of a Bunch.

    Returns
    -------
    data : :class:`~sklearn.utils.Bunch`
        As `load_physionet2012` gives it, with all 4,000 stays of the set.
    (X, y) : tuple
        If `return_X_y` is True.

    Raises
    ------
    ImportError
        If a file must be downloaded and pooch (extra ``fetch``) is not installed.
    OSError
        If a file must be downloaded and the official page cannot be reached.
    ValueError
        If a file is not what it should be: wrong checksum, or a layout that is not known.

    See Also
    --------
    load_physionet2012 : The bundled sample, and the contents described.

    Notes
    -----
    These are read, the first that exists: ``set-a.parquet`` (long table with ``RecordID``,
    ``minutes``, ``variable``, ``value``), a folder ``set-a`` of the official text files,
    ``set-a.tar.gz`` or ``set-a.zip``; beside it ``Outcomes-a.txt``. What is absent is downloaded
    from the official page and checked against its SHA-256. Some records have no time series; they
    stay, with null panels.

    Examples
    --------
    >>> from ehrfuse.datasets import fetch_physionet2012
    >>> data = fetch_physionet2012("my/data", subset="b")  # doctest: +SKIP
    """
    check_option(subset, "subset", ("a", "b", "c"))
    home = Path(data_home or os.environ.get("EHRFUSE_DATA") or Path.home() / "ehrfuse_data")
    names = [f"set-{subset}.parquet", f"set-{subset}", f"set-{subset}.tar.gz", f"set-{subset}.zip"]
    measured = _find(home, names) or _download(home, f"set-{subset}.tar.gz")
    outcomes = f"Outcomes-{subset}.txt"
    outcomes = _find(home, [outcomes]) or _download(home, outcomes)
    return _bunch(_read_long(measured), _read_outcomes(outcomes), return_X_y)


def _find(home, names):
    folders = (home, home / "physionet-2012")
    paths = (folder / name for name in names for folder in folders)
    return next((path for path in paths if path.exists()), None)


def _download(home, name):
    """Fetch one official file; a file with a wrong checksum is not kept."""
    pooch = import_optional("pooch", "fetch")
    folder = home / "physionet-2012"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return Path(
            pooch.retrieve(_FILES_URL + name, f"sha256:{_SHA256[name]}", fname=name, path=folder)
        )
    except ValueError as error:
        raise ValueError(
            f"The downloaded {name} does not have the expected SHA-256 and was thrown away; "
            f"try again, or put the file from {_PAGE} into {str(folder)!r}."
        ) from error
    except OSError as error:
        raise OSError(
            f"{name} is not in {str(home)!r} and could not be downloaded "
            f"({type(error).__name__}); put the file from {_PAGE} into {str(folder)!r}."
        ) from error


def _read_long(path):
    """Long table of RecordID, minutes, variable, value from any of the layouts."""
    if path.suffix == ".parquet":
        long = read_parquet(path)
        lost = {"RecordID", "minutes", "variable", "value"} - set(long.columns)
        if lost:
            raise ValueError(
                f"{str(path)!r} has no columns {sorted(lost)}; a long table needs RecordID, "
                "minutes, variable and value."
            )
        return long
    texts = {int(Path(name).stem): text for name, text in _texts(path)}
    if not texts:
        raise ValueError(
            f"{str(path)!r} holds no record files such as 132539.txt; give it the files of {_PAGE}."
        )
    return _parse(texts, path)


def _texts(path):
    """Names and contents of the record files, whatever they are packed in."""
    record = re.compile(r"(.*/)?\d+\.txt")
    try:
        if path.is_dir():
            found = ((file.name, file.read_bytes) for file in path.rglob("*.txt"))
            yield from ((name, read()) for name, read in found if record.fullmatch(name))
        elif path.suffix == ".zip":
            with zipfile.ZipFile(path) as packed:
                names = filter(record.fullmatch, packed.namelist())
                yield from ((name, packed.read(name)) for name in names)
        else:
            with tarfile.open(path) as packed:
                members = (m for m in packed if m.isfile() and record.fullmatch(m.name))
                yield from ((m.name, packed.extractfile(m).read()) for m in members)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise ValueError(
            f"{str(path)!r} cannot be unpacked ({error}); delete it and fetch it again."
        ) from error


def _parse(texts, path):
    """Parse all record files at once: one call for a set instead of 4,000."""
    header = b"Time,Parameter,Value\n"
    bodies = []
    for record in sorted(texts):
        text = texts[record].replace(b"\r\n", b"\n").removeprefix(b"\xef\xbb\xbf")
        if not text.startswith(header):
            raise ValueError(
                f"Record {record} in {str(path)!r} does not start with "
                f"{header.decode().strip()!r}; give it the files of {_PAGE}."
            )
        bodies.append(text[len(header) :].rstrip(b"\n") + b"\n")
    kinds = {"time": pa.string(), "variable": pa.string(), "value": pa.float64()}
    try:
        table = pa.csv.read_csv(
            io.BytesIO(b"".join(bodies)),
            pa.csv.ReadOptions(column_names=list(kinds), block_size=1 << 26),
            pa.csv.ParseOptions(ignore_empty_lines=False),
            pa.csv.ConvertOptions(column_types=kinds),
        )
    except pa.ArrowInvalid as error:
        raise ValueError(f"A record in {str(path)!r} cannot be read ({error}).") from error
    lines = [body.count(b"\n") for body in bodies]
    times = table["time"].to_pandas().str.split(":", n=1, expand=True).astype(int)
    long = pd.DataFrame(
        {
            "RecordID": np.repeat(sorted(texts), lines),
            "minutes": (60 * times[0] + times[1]).to_numpy(),
            "variable": table["variable"].to_pandas(),
            "value": table["value"].to_pandas(),
        }
    )
    return long[long["variable"] != "RecordID"]


def _read_outcomes(path):
    outcomes = pd.read_csv(path)
    lost = {"RecordID", _LABEL, *_REFERENCE} - set(outcomes.columns)
    if lost:
        raise ValueError(
            f"{str(path)!r} has no columns {sorted(lost)}; give it the file of {_PAGE}."
        )
    return outcomes.set_index("RecordID").sort_index()


def _bunch(long, outcomes, return_X_y):
    """Everything that a caller gets, from the long table; rows follow the outcomes."""
    kept = _known(long, outcomes.index)
    X = pd.concat([_static(kept, outcomes.index), _panels(kept, outcomes.index)], axis=1)
    y = outcomes[_LABEL].astype("int64").rename("in_hospital_death")
    if return_X_y:
        return X, y
    return Bunch(
        X=X,
        y=y,
        groups=X.index.to_numpy(),
        modalities=_modalities(),
        reference=outcomes[list(_REFERENCE)].astype("float64").where(lambda x: x >= 0),
        description=_DESCRIPTION,
    )


def _known(long, index):
    """Usable observations: row number, minutes, variable as its place in _VARIABLES, and value.

    They are sorted by row, minute and variable, whatever the order of the source; repeated entries
    of one minute keep their order.
    """
    named = pd.Categorical(long["variable"])
    place = np.append(pd.Index(_VARIABLES).get_indexer(named.categories), -1)[named.codes]
    kept = pd.DataFrame(
        {
            "row": index.get_indexer(long["RecordID"]),
            "minutes": long["minutes"].to_numpy().astype(np.int64),
            "variable": place,
            "value": long["value"].to_numpy(),
        }
    )
    usable = (kept["row"] >= 0) & (place >= 0) & (kept["value"] >= 0)  # -1 is "not available"
    usable &= (place != _VARIABLES.index("Weight")) | (kept["value"] > 0)
    kept = kept[usable]
    return kept.iloc[np.lexsort((kept["variable"], kept["minutes"], kept["row"]))]


def _static(kept, index):
    """Descriptors of admission, and how the weight went on."""

    def grouped(variable):
        chosen = kept[kept["variable"] == _VARIABLES.index(variable)]
        return chosen.groupby("row")["value"]

    weight = grouped("Weight")
    change = (weight.last() - weight.first())[weight.size() > 1]
    gender = grouped("Gender").first().map(dict(enumerate(_GENDERS)))
    icu_type = grouped("ICUType").first().map(dict(enumerate(_ICU_TYPES, start=1)))
    static = {
        "age": grouped("Age").first(),
        "gender": gender.astype(pd.CategoricalDtype(list(_GENDERS))),
        "height": grouped("Height").first(),
        "icu_type": icu_type.astype(pd.CategoricalDtype(list(_ICU_TYPES))),
        "weight": weight.first(),
        "weight_change": change,
    }
    return pd.DataFrame(static, index=range(len(index))).set_index(index)


def _panels(kept, index):
    columns = {}
    for name, variables in PANELS.items():
        number = kept["variable"] - _VARIABLES.index(variables[0])
        part = kept[number.between(0, len(variables) - 1)]
        columns[name] = events_series(
            part["row"],
            part["minutes"] / 60 - HORIZON,
            pd.Categorical.from_codes(number[part.index], categories=list(variables)),
            part["value"],
            len(index),
            index=index,
        )
    return pd.DataFrame(columns, index=index)


def _modalities():
    from ehrfuse.modalities import Events, Tabular

    panels = {name: Events(name, time_unit="h") for name in PANELS}
    return {"static": Tabular(list(STATIC)), **panels}


def _sample_records(records, n_records=2000):
    """Record numbers of the bundled sample: the first of set A in the order of a hash."""

    def digest(record):
        return hashlib.blake2b(str(int(record)).encode()).hexdigest()

    return sorted(sorted(records, key=digest)[:n_records])
