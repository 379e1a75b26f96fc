"""Data with holes: real ICU stays, a simulator with a known truth, and Parquet helpers."""

from ehrfuse.datasets._engine import read_parquet, write_parquet
from ehrfuse.datasets.physionet2012 import fetch_physionet2012, load_physionet2012
from ehrfuse.datasets.prenatal import make_prenatal
from ehrfuse.datasets.synthetic import make_ehr

__all__ = [
    "fetch_physionet2012",
    "load_physionet2012",
    "make_ehr",
    "make_prenatal",
    "read_parquet",
    "write_parquet",
]
