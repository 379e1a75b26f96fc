"""The open demos from their official pages, each file checked against the release's own list."""

import os
from pathlib import Path

from ehrfuse._runtime import import_optional

_FILES = "https://physionet.org/files/"
_SUMS = "SHA256SUMS.txt"
_SUFFIXES = (".csv", ".csv.gz", ".txt", ".md")


def fetch_mimic4_demo(data_home=None):
    """Download the open MIMIC-IV demo 2.2: 100 patients, without notes (ODbL 1.0).

    Parameters
    ----------
    data_home : str or Path, default=None
        Folder to look in and to download to, in a subfolder ``mimic-iv-demo-2.2``. By default the
        environment variable ``EHRFUSE_DATA``, else ``~/ehrfuse_data``.

    Returns
    -------
    folder : Path
        For `load_mimic4`.

    Raises
    ------
    ImportError
        If something must be downloaded and pooch (extra ``fetch``) is not installed.
    OSError
        If the official page cannot be reached.
    ValueError
        If a file does not have the checksum of the release's list.

    Notes
    -----
    Official page: https://physionet.org/content/mimic-iv-demo/2.2/. A folder that already holds the
    table of patients is taken as it is.

    Examples
    --------
    >>> from ehrfuse.datasets import fetch_mimic4_demo, load_mimic4
    >>> data = load_mimic4(fetch_mimic4_demo())  # doctest: +SKIP
    """
    return _fetch(data_home, "mimic-iv-demo-2.2", "mimic-iv-demo/2.2/", "hosp/patients")


def fetch_mimic3_demo(data_home=None):
    """Download the open MIMIC-III demo 1.4: 100 patients, without notes (ODbL 1.0).

    Parameters
    ----------
    data_home : str or Path, default=None
        Folder to look in and to download to, in a subfolder ``mimic-iii-demo-1.4``. By default the
        environment variable ``EHRFUSE_DATA``, else ``~/ehrfuse_data``.

    Returns
    -------
    folder : Path
        For `load_mimic3`.

    Raises
    ------
    ImportError
        If something must be downloaded and pooch (extra ``fetch``) is not installed.
    OSError
        If the official page cannot be reached.
    ValueError
        If a file does not have the checksum of the release's list.

    Notes
    -----
    Official page: https://physionet.org/content/mimiciii-demo/1.4/. A folder that already holds the
    table of patients is taken as it is.

    Examples
    --------
    >>> from ehrfuse.datasets import fetch_mimic3_demo, load_mimic3
    >>> data = load_mimic3(fetch_mimic3_demo())  # doctest: +SKIP
    """
    return _fetch(data_home, "mimic-iii-demo-1.4", "mimiciii-demo/1.4/", "PATIENTS")


def fetch_eicu_demo(data_home=None):
    """Download the open eICU demo 2.0.1: 2,520 unit stays of 186 hospitals (ODbL 1.0).

    Parameters
    ----------
    data_home : str or Path, default=None
        Folder to look in and to download to, in a subfolder ``eicu-crd-demo-2.0.1``. By default the
        environment variable ``EHRFUSE_DATA``, else ``~/ehrfuse_data``.

    Returns
    -------
    folder : Path
        For `load_eicu`.

    Raises
    ------
    ImportError
        If something must be downloaded and pooch (extra ``fetch``) is not installed.
    OSError
        If the official page cannot be reached.
    ValueError
        If a file does not have the checksum of the release's list.

    Notes
    -----
    Official page: https://physionet.org/content/eicu-crd-demo/2.0.1/. A folder that already holds
    the table of patients is taken as it is.

    Examples
    --------
    >>> from ehrfuse.datasets import fetch_eicu_demo, load_eicu
    >>> data = load_eicu(fetch_eicu_demo())  # doctest: +SKIP
    """
    return _fetch(data_home, "eicu-crd-demo-2.0.1", "eicu-crd-demo/2.0.1/", "patient")


def _fetch(data_home, name, page, patients):
    home = Path(data_home or os.environ.get("EHRFUSE_DATA") or Path.home() / "ehrfuse_data")
    folder = home / name
    if any((folder / f"{patients}{suffix}").exists() for suffix in (".csv", ".csv.gz", ".parquet")):
        return folder
    pooch = import_optional("pooch", "fetch")
    sums = _download(pooch, page, folder, _SUMS, None)
    lines = sums.read_text(encoding="utf-8").split("\n")
    wanted = [line.split(maxsplit=1) for line in lines if line.strip()]
    wanted = [(digest, file.strip().lstrip("*")) for digest, file in wanted]
    wanted = [(digest, file) for digest, file in wanted if file.lower().endswith(_SUFFIXES)]
    # The table that marks a complete folder comes last.
    wanted.sort(key=lambda pair: pair[1].startswith(patients))
    for digest, file in wanted:
        _download(pooch, page, folder, file, f"sha256:{digest}")
    return folder


def _download(pooch, page, folder, file, digest):
    """One file of a release; one with a wrong checksum is not kept."""
    place = folder / file
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        found = pooch.retrieve(_FILES + page + file, digest, fname=place.name, path=place.parent)
        return Path(found)
    except ValueError as error:
        raise ValueError(
            f"The downloaded {file} does not have the checksum of the release's {_SUMS} and was "
            f"thrown away; try again, or put the release into {str(folder)!r}."
        ) from error
    except OSError as error:
        raise OSError(
            f"{file} is not in {str(folder)!r} and could not be downloaded "
            f"({type(error).__name__}); put the release of https://physionet.org/content/{page} "
            "into that folder."
        ) from error
