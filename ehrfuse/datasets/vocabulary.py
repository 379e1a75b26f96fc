"""One analyte vocabulary across sources: panels, units, plausible ranges and item numbers.

A clinician orders panels, so a panel is one modality; an analyte is a code of its panel's events.
Names and units are the same whatever the source, so that a model fitted on one source predicts on
another.

Ranges are the outlier limits of MIMIC-Extract [1]_ (its table for MIMIC-IV), outside of which that
pipeline too treats a value as missing. An analyte that it does not list must not be negative, and a
percentage must not exceed 100. Left out is its limit of 150 s for the partial thromboplastin time,
where some analysers stop. Height and weight have limits of our own.

Item numbers of MIMIC stand in its dictionaries ``d_labitems`` and ``d_items``; those of urine are
the ones of the MIMIC code repository [2]_. eICU names stand in its table ``lab``; short names are
those of ricu [3]_, in which hourly tables of other databases come.

References
----------
.. [1] Wang S et al. MIMIC-Extract: A data extraction, preprocessing, and representation pipeline
   for MIMIC-III. ACM CHIL 2020.
.. [2] Johnson AEW et al. The MIMIC Code Repository. JAMIA 2018;25:32-39.
.. [3] Bennett N et al. ricu: R's interface to intensive care data. GigaScience 2023;12.
"""

from dataclasses import dataclass, field

import pandas as pd

ANY = float("inf")


@dataclass(frozen=True)
class Analyte:
    """One thing that is measured.

    Parameters
    ----------
    name : str
        The code in events, and with ``lab_`` before it the column of its latest value.
    panel : str
        What is ordered or charted together.
    unit : str
        Unit of all values that leave a loader.
    short : str
        Name in ricu's hourly tables; empty if it has none.
    low, high : float
        Plausible values, both included; others become null.
    units : dict of str to float
        Other units (lower case) and the factor that turns them into `unit`.
    mimic : tuple of int
        Laboratory items of MIMIC-III and MIMIC-IV.
    charted : tuple of int
        Charted or output items of MIMIC-III (CareVue, MetaVision) and MIMIC-IV.
    fahrenheit : tuple of int
        Charted items in degrees Fahrenheit.
    factors : dict of int to float
        Charted items in another unit, and their factor.
    eicu : tuple of str
        Names in eICU's ``lab`` table (lower case), or columns of its vital signs.
    fraction : bool
        Whether values up to 1 are fractions of a percentage.
    """

    name: str
    panel: str
    unit: str
    short: str = ""
    low: float = 0.0
    high: float = ANY
    units: dict = field(default_factory=dict)
    mimic: tuple = ()
    charted: tuple = ()
    fahrenheit: tuple = ()
    factors: dict = field(default_factory=dict)
    eicu: tuple = ()
    fraction: bool = False


_MG = {"mg/l": 0.1, "g/l": 100.0}
_PER_UL = {"#/ul": 0.001, "/ul": 0.001, "cells/ul": 0.001, "10^9/l": 1.0}

VITALS = (
    Analyte("heart_rate", "vitals", "/min", "hr", 0, 390, charted=(220045, 211),
            eicu=("heartrate",)),
    Analyte("respiratory_rate", "vitals", "/min", "resp", 0, 330, charted=(220210, 618, 615),
            eicu=("respiration",)),
    Analyte("spo2", "vitals", "%", "o2sat", 0, 100, charted=(220277, 646), eicu=("sao2",)),
    Analyte("temperature", "vitals", "C", "temp", 14.2, 47, charted=(223762, 676),
            fahrenheit=(223761, 678), eicu=("temperature",)),
    Analyte("systolic_bp", "vitals", "mmHg", "sbp", 0, 375,
            charted=(220179, 220050, 225309, 51, 455),
            eicu=("systemicsystolic", "noninvasivesystolic")),
    Analyte("diastolic_bp", "vitals", "mmHg", "dbp", 0, 375,
            charted=(220180, 220051, 225310, 8368, 8441),
            eicu=("systemicdiastolic", "noninvasivediastolic")),
    Analyte("mean_bp", "vitals", "mmHg", "map", 0, 375,
            charted=(220181, 220052, 225312, 52, 456),
            eicu=("systemicmean", "noninvasivemean")),
    Analyte("gcs_eye", "neuro", "points", "", 1, 4, charted=(220739, 184)),
    Analyte("gcs_verbal", "neuro", "points", "", 1, 5, charted=(223900, 723)),
    Analyte("gcs_motor", "neuro", "points", "", 1, 6, charted=(223901, 454)),
    Analyte("urine", "urine", "mL", "urine", 0, 2445,
            charted=(226559, 226560, 226561, 226584, 226563, 226564, 226565, 226567, 226557,
                     226558, 40055, 43175, 40069, 40094, 40715, 40473, 40085, 40057, 40056, 40405,
                     40428, 40086, 40096, 40651)),
    Analyte("fio2", "oxygen", "%", "fio2", 20, 100, charted=(223835, 190, 3420),
            mimic=(50816,), eicu=("fio2",), fraction=True),
    # Inches and pounds that were written into the wrong field lie outside of these.
    Analyte("height", "body", "cm", "", 100, 250, charted=(226730, 226707, 920),
            factors={226707: 2.54, 920: 2.54}),
    Analyte("weight", "body", "kg", "", 20, 400, charted=(226512, 224639, 226531, 762, 763),
            factors={226531: 0.45359237}),
)  # fmt: skip

LABS = (
    Analyte("ph", "blood_gas", "", "ph", 6.3, 10, mimic=(50820,), eicu=("ph",)),
    Analyte("pco2", "blood_gas", "mmHg", "pco2", 0, 220, {"kpa": 7.50062}, (50818,),
            eicu=("paco2",)),
    Analyte("po2", "blood_gas", "mmHg", "po2", 0, 770, {"kpa": 7.50062}, (50821,),
            eicu=("pao2",)),
    Analyte("base_excess", "blood_gas", "mEq/L", "be", -ANY, ANY, mimic=(50802,),
            eicu=("base excess",)),
    Analyte("ionized_calcium", "blood_gas", "mmol/L", "cai", 0, ANY, {"mg/dl": 0.2495},
            (50808,), eicu=("ionized calcium",)),
    Analyte("methemoglobin", "blood_gas", "%", "methb", 0, 100, mimic=(50814,),
            eicu=("methemoglobin",)),
    Analyte("lactate", "lactate", "mmol/L", "lact", 0, 33, {"mg/dl": 0.1110}, (50813, 52442),
            eicu=("lactate",)),
    Analyte("sodium", "chemistry", "mmol/L", "na", 0, 250, mimic=(50983, 50824),
            eicu=("sodium",)),
    Analyte("potassium", "chemistry", "mmol/L", "k", 0, 15, mimic=(50971, 50822),
            eicu=("potassium",)),
    Analyte("chloride", "chemistry", "mmol/L", "cl", 0, 200, mimic=(50902, 50806),
            eicu=("chloride",)),
    Analyte("bicarbonate", "chemistry", "mmol/L", "bicar", 0, 66, mimic=(50882, 50803),
            eicu=("bicarbonate", "hco3")),
    Analyte("anion_gap", "chemistry", "mmol/L", "", 0, 55, mimic=(50868,), eicu=("anion gap",)),
    Analyte("urea_nitrogen", "chemistry", "mg/dL", "bun", 0, 275, {"mmol/l": 2.801}, (51006,),
            eicu=("bun",)),
    Analyte("creatinine", "chemistry", "mg/dL", "crea", 0, 66,
            {"umol/l": 0.01131, "mmol/l": 11.31}, (50912,), eicu=("creatinine",)),
    Analyte("glucose", "chemistry", "mg/dL", "glu", 0, 2200, {"mmol/l": 18.016},
            (50931, 50809), eicu=("glucose", "bedside glucose")),
    Analyte("calcium", "chemistry", "mg/dL", "ca", 0, ANY, {"mmol/l": 4.008}, (50893,),
            eicu=("calcium",)),
    Analyte("magnesium", "chemistry", "mg/dL", "mg", 0, 22,
            {"mmol/l": 2.431, "meq/l": 1.2155}, (50960,), eicu=("magnesium",)),
    Analyte("phosphate", "chemistry", "mg/dL", "phos", 0, 22, {"mmol/l": 3.097}, (50970,),
            eicu=("phosphate",)),
    Analyte("hemoglobin", "blood_count", "g/dL", "hgb", 0, 30,
            {"g/l": 0.1, "mmol/l": 1.6114}, (51222, 50811), eicu=("hgb",)),
    Analyte("hematocrit", "blood_count", "%", "", 0, 100, {"l/l": 100.0}, (51221, 50810),
            eicu=("hct",), fraction=True),
    Analyte("white_cells", "blood_count", "K/uL", "wbc", 0, 1100, _PER_UL, (51301, 51300),
            eicu=("wbc x 1000",)),
    Analyte("platelets", "blood_count", "K/uL", "plt", 0, 2200, _PER_UL, (51265,),
            eicu=("platelets x 1000",)),
    Analyte("mch", "blood_count", "pg", "mch", mimic=(51248,), eicu=("mch",)),
    Analyte("mchc", "blood_count", "g/dL", "mchc", mimic=(51249,), eicu=("mchc",)),
    Analyte("mcv", "blood_count", "fL", "mcv", mimic=(51250,), eicu=("mcv",)),
    Analyte("rdw", "blood_count", "%", "", 0, 100, mimic=(51277,), eicu=("rdw",)),
    Analyte("lymphocytes", "inflammation", "%", "lymph", 0, 100, mimic=(51244, 51245),
            eicu=("-lymphs",)),
    Analyte("neutrophils", "inflammation", "%", "neut", 0, 100, mimic=(51256,),
            eicu=("-polys",)),
    Analyte("bands", "inflammation", "%", "bnd", 0, 100, mimic=(51144,), eicu=("-bands",)),
    Analyte("crp", "inflammation", "mg/L", "crp", 0, ANY, {"mg/dl": 10.0}, (50889, 51652),
            eicu=("crp",)),
    Analyte("albumin", "liver", "g/dL", "alb", 0, 60, {"g/l": 0.1}, (50862,),
            eicu=("albumin",)),
    Analyte("alkaline_phosphatase", "liver", "U/L", "alp", 0, 4000, mimic=(50863,),
            eicu=("alkaline phos.",)),
    Analyte("alt", "liver", "U/L", "alt", 0, 11000, mimic=(50861,), eicu=("alt (sgpt)",)),
    Analyte("ast", "liver", "U/L", "ast", 0, 22000, mimic=(50878,), eicu=("ast (sgot)",)),
    Analyte("bilirubin", "liver", "mg/dL", "bili", 0, 66, {"umol/l": 0.05847}, (50885,),
            eicu=("total bilirubin",)),
    Analyte("bilirubin_direct", "liver", "mg/dL", "bili_dir", 0, 66, {"umol/l": 0.05847},
            (50883,), eicu=("direct bilirubin",)),
    Analyte("ldh", "liver", "U/L", "", 0, 35000, mimic=(50954,), eicu=("ldh",)),
    Analyte("inr", "coagulation", "", "inr_pt", mimic=(51237,), eicu=("pt - inr",)),
    Analyte("ptt", "coagulation", "s", "ptt", mimic=(51275,), eicu=("ptt",)),
    Analyte("fibrinogen", "coagulation", "mg/dL", "fgn", 0, ANY, _MG, (51214,),
            eicu=("fibrinogen",)),
    Analyte("ck", "cardiac", "U/L", "ck", mimic=(50910,), eicu=("cpk",)),
    Analyte("ck_mb", "cardiac", "ng/mL", "ckmb", mimic=(50911,), eicu=("cpk-mb",)),
    Analyte("troponin_t", "cardiac", "ng/mL", "tnt", 0, 24, {"ng/l": 0.001, "pg/ml": 0.001},
            (51003,), eicu=("troponin - t",)),
)  # fmt: skip

ANALYTES = VITALS + LABS
NAMES = [analyte.name for analyte in ANALYTES]
LAB_NAMES = [analyte.name for analyte in LABS]
PANELS = {
    panel: [analyte.name for analyte in ANALYTES if analyte.panel == panel]
    for panel in dict.fromkeys(analyte.panel for analyte in ANALYTES)
}


def analyte_table():
    """Give the vocabulary as a table, to read or to print.

    Returns
    -------
    table : DataFrame of shape (n_analytes, n_columns)
        Indexed by name: panel, unit, plausible range, other units, and the items of every source.

    Examples
    --------
    >>> from ehrfuse.datasets import analyte_table
    >>> analyte_table().loc["creatinine", ["panel", "unit", "mimic"]].tolist()
    ['chemistry', 'mg/dL', (50912,)]
    """
    rows = [vars(analyte) for analyte in ANALYTES]
    return pd.DataFrame(rows).set_index("name")


def items_of(kind):
    """Items of a source as a table that the engine joins.

    Parameters
    ----------
    kind : {"mimic", "charted", "eicu", "short"}

    Returns
    -------
    items : DataFrame
        ``item``, ``code`` (its place in `NAMES`), ``factor`` and ``shift`` into the unit.
    """
    rows = []
    for code, a in enumerate(ANALYTES):
        if kind == "charted":
            rows += [(item, code, a.factors.get(item, 1.0), 0.0) for item in a.charted]
            rows += [(item, code, 5 / 9, -160 / 9) for item in a.fahrenheit]
        else:
            found = getattr(a, kind)
            found = (found,) if isinstance(found, str) else found
            rows += [(item, code, 1.0, 0.0) for item in found if item]
    return pd.DataFrame(rows, columns=["item", "code", "factor", "shift"])


def limits():
    """Plausible range of every analyte, and whether values up to 1 are fractions."""
    rows = [
        (code, max(a.low, -1e30), min(a.high, 1e30), a.fraction) for code, a in enumerate(ANALYTES)
    ]
    return pd.DataFrame(rows, columns=["code", "low", "high", "fraction"])


def conversions():
    """Other units and their factors: ``code``, ``unit``, ``unit_factor``."""
    rows = [(code, u, f) for code, a in enumerate(ANALYTES) for u, f in a.units.items()]
    return pd.DataFrame(rows, columns=["code", "unit", "unit_factor"])
