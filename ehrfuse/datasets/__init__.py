"""Cohorts from MIMIC-IV, MIMIC-III, eICU and MEDS; open data with holes; a simulator; Parquet."""

from ehrfuse.datasets._convert import to_parquet
from ehrfuse.datasets._engine import read_parquet, write_parquet
from ehrfuse.datasets._fetch import fetch_eicu_demo, fetch_mimic3_demo, fetch_mimic4_demo
from ehrfuse.datasets.eicu import load_eicu
from ehrfuse.datasets.meds import load_meds
from ehrfuse.datasets.mimic3 import load_mimic3
from ehrfuse.datasets.mimic4 import load_mimic4
from ehrfuse.datasets.physionet2012 import fetch_physionet2012, load_physionet2012
from ehrfuse.datasets.prenatal import make_prenatal
from ehrfuse.datasets.synthetic import make_ehr
from ehrfuse.datasets.tasks import (
    Task,
    critical_outcome,
    icu_admission_90d,
    in_hospital_mortality,
    later_icu_stay,
    length_of_stay,
    mortality_post_discharge,
    phenotyping,
    readmission_30d,
)
from ehrfuse.datasets.vocabulary import analyte_table

__all__ = [
    "Task",
    "analyte_table",
    "critical_outcome",
    "fetch_eicu_demo",
    "fetch_mimic3_demo",
    "fetch_mimic4_demo",
    "fetch_physionet2012",
    "icu_admission_90d",
    "in_hospital_mortality",
    "later_icu_stay",
    "length_of_stay",
    "load_eicu",
    "load_meds",
    "load_mimic3",
    "load_mimic4",
    "load_physionet2012",
    "make_ehr",
    "make_prenatal",
    "mortality_post_discharge",
    "phenotyping",
    "read_parquet",
    "readmission_30d",
    "to_parquet",
    "write_parquet",
]
