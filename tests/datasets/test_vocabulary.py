"""The vocabulary: no item means two things, ranges and units make sense."""

import gzip

import pandas as pd
import pytest

from ehrfuse.datasets import analyte_table
from ehrfuse.datasets.vocabulary import ANALYTES, NAMES, PANELS, conversions, items_of


@pytest.mark.parametrize("kind", ["mimic", "charted", "eicu", "short"])
def test_an_item_means_one_thing(kind):
    items = items_of(kind)
    assert items["item"].is_unique
    assert set(items["code"]) <= set(range(len(NAMES)))


def test_names_panels_and_ranges():
    assert len(set(NAMES)) == len(NAMES)
    assert sorted(name for panel in PANELS.values() for name in panel) == sorted(NAMES)
    # Codes of a panel stand together: the loaders cut them out by their offset.
    places = [NAMES.index(name) for panel in PANELS.values() for name in panel]
    assert places == sorted(places)
    assert all(a.low < a.high for a in ANALYTES)
    assert analyte_table().loc["potassium", "unit"] == "mmol/L"


@pytest.mark.parametrize(
    ("name", "unit", "value", "expected"),
    [
        ("creatinine", "umol/l", 88.42, 1.0),
        ("glucose", "mmol/l", 5.55, 100.0),
        ("ionized_calcium", "mg/dl", 4.81, 1.2),
        ("calcium", "mmol/l", 2.5, 10.0),
        ("bilirubin", "umol/l", 17.1, 1.0),
        ("urea_nitrogen", "mmol/l", 7.14, 20.0),
        ("magnesium", "mmol/l", 0.82, 2.0),
        ("phosphate", "mmol/l", 1.13, 3.5),
        ("lactate", "mg/dl", 18.0, 2.0),
        ("hemoglobin", "g/l", 120.0, 12.0),
        ("pco2", "kpa", 5.33, 40.0),
        ("crp", "mg/dl", 2.0, 20.0),
    ],
)
def test_units(name, unit, value, expected):
    """Round figures of a conversion table."""
    table = conversions().set_index(["code", "unit"])["unit_factor"]
    assert value * table[NAMES.index(name), unit] == pytest.approx(expected, rel=0.01)


def test_items_are_those_of_the_dictionaries(shared_data):
    """Labels of MIMIC's own dictionaries for the items of the vocabulary."""
    path = shared_data / "mimic-iv-demo-2.2" / "hosp" / "d_labitems.csv.gz"
    labs = pd.read_csv(path).set_index("itemid")
    told = {
        "sodium": "Sodium", "creatinine": "Creatinine", "lactate": "Lactate", "ph": "pH",
        "urea_nitrogen": "Urea Nitrogen", "inr": "INR", "white_cells": "White Blood|WBC",
        "platelets": "Platelet", "bilirubin": "Bilirubin, Total", "crp": "C-Reactive|CRP",
        "troponin_t": "Troponin T", "hematocrit": "Hematocrit", "glucose": "Glucose",
    }  # fmt: skip
    for analyte in ANALYTES:
        known = [item for item in analyte.mimic if item in labs.index]
        assert labs.loc[known, "fluid"].eq("Blood").all(), analyte.name
        if analyte.name in told:
            assert known, analyte.name
            assert labs.loc[known, "label"].str.contains(told[analyte.name]).all(), analyte.name
    with gzip.open(shared_data / "mimic-iv-demo-2.2" / "icu" / "d_items.csv.gz", "rt") as file:
        charted = pd.read_csv(file).set_index("itemid")
    told = {"heart_rate": "Heart Rate", "temperature": "Temperature", "height": "Height",
            "weight": "Weight", "fio2": "Inspired", "gcs_eye": "Eye"}  # fmt: skip
    for analyte in ANALYTES:
        if analyte.name in told:
            items = [*analyte.charted, *analyte.fahrenheit]
            known = [item for item in items if item in charted.index]
            assert charted.loc[known, "label"].str.contains(told[analyte.name]).all(), analyte.name
