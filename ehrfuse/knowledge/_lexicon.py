"""Words that decide whether a mention is the patient's own finding, and common abbreviations.

The triggers follow NegEx (Chapman et al., J Biomed Inform 2001;34:301-310) and ConText (Harkema et
al., J Biomed Inform 2009;42:839-851).
"""

# A finding after one of these, in the same clause, is denied.
BEFORE = (
    "no", "not", "denies", "denied", "denying", "deny", "without", "w/o", "negative for",
    "neg for", "absence of", "absent", "free of", "no evidence of", "no sign of", "no signs of",
    "no history of", "no hx of", "no complaints of", "never had", "never", "none of", "nor",
    "ruled out", "rules out", "rule out for", "does not have", "did not have", "no new",
    "failed to reveal", "fails to reveal", "unremarkable for", "cannot see", "no longer has",
    "resolved", "declined", "no acute", "neither",
)  # fmt: skip
# A finding before one of these, in the same clause, is denied.
AFTER = (
    "is ruled out", "was ruled out", "were ruled out", "has been ruled out", "are ruled out",
    "been ruled out", "ruled out", "unlikely", "is unlikely", "was negative", "is negative",
    "were negative", "not seen", "not present", "is absent", "was absent", "not detected",
    "was denied", "not identified", "not demonstrated",
)  # fmt: skip
# Look like denials and are none.
NEITHER = (
    "no increase", "no change", "no interval change", "no significant change", "not only",
    "gram negative", "not certain if", "not certain whether", "not necessarily", "no suspicious",
    "without difficulty", "no significant interval change", "not drain", "not cause",
    "not extend", "without any further", "without further", "not rule out", "cannot be ruled out",
    "not ruled out", "not been ruled out", "no known", "not able to rule out", "not exclude",
    "cannot exclude", "no longer denies",
)  # fmt: skip
# A denial does not reach past these.
UNTIL = (
    "but", "however", "nevertheless", "yet", "though", "although", "still", "aside from", "except",
    "apart from", "secondary to", "because of", "due to", "cause of", "causes of", "as a cause of",
    "reason for", "which", "who", "presented with", "presents with", "admitted with",
    "admitted for", "other than", "positive for", "now with", "found to have", "treated with",
    "treated for", "history of", "hx of", "started on", "complains of", "reports", "has", "had",
)  # fmt: skip
# A finding in the same sentence belongs to a relative.
RELATIVES = (
    "mother", "father", "brother", "sister", "brothers", "sisters", "grandmother", "grandfather",
    "aunt", "uncle", "cousin", "sibling", "siblings", "parents", "maternal", "paternal", "mom",
    "dad", "son", "daughter", "family member", "relatives", "family history of", "fh of",
)  # fmt: skip
# A finding up to the next heading or blank line belongs to a relative.
FAMILY = ("family history", "family hx", "fhx", "family medical history")

# What short forms stand for; a form counts only where what it stands for is a name of a node.
ABBREVIATIONS = {
    "MI": ("myocardial infarction",), "AMI": ("acute myocardial infarction",),
    "NSTEMI": ("myocardial infarction",), "STEMI": ("myocardial infarction",),
    "CHF": ("congestive heart failure", "heart failure"), "HF": ("heart failure",
    "congestive heart failure"), "CAD": ("coronary artery disease", "coronary arteriosclerosis"),
    "AF": ("atrial fibrillation",), "AFIB": ("atrial fibrillation",), "HTN": ("hypertension",),
    "DM": ("diabetes mellitus",), "DM2": ("type 2 diabetes mellitus",),
    "T2DM": ("type 2 diabetes mellitus",), "DM1": ("type 1 diabetes mellitus",),
    "T1DM": ("type 1 diabetes mellitus",), "COPD": ("chronic obstructive pulmonary disease",),
    "ARDS": ("acute respiratory distress syndrome", "adult respiratory distress syndrome"),
    "PNA": ("pneumonia",), "PE": ("pulmonary embolism",), "DVT": ("deep vein thrombosis",
    "venous thrombosis"), "AKI": ("acute kidney injury", "acute kidney failure",
    "acute renal failure"), "ARF": ("acute kidney failure", "acute renal failure"),
    "CKD": ("chronic kidney disease", "chronic kidney failure", "chronic renal failure"),
    "ESRD": ("end stage renal disease", "chronic kidney failure"), "UTI": (
    "urinary tract infection",), "CVA": ("stroke", "cerebrovascular accident",
    "cerebrovascular disease"), "TIA": ("transient ischemic attack", "transient cerebral ischemia"),
    "ICH": ("intracerebral hemorrhage", "intracranial hemorrhage"), "SAH": (
    "subarachnoid hemorrhage",), "SDH": ("subdural hematoma",), "GIB": (
    "gastrointestinal hemorrhage",), "GERD": ("gastroesophageal reflux disease",), "BPH": (
    "benign prostatic hyperplasia", "prostatic hypertrophy"), "RA": ("rheumatoid arthritis",),
    "SLE": ("systemic lupus erythematosus",), "MS": ("multiple sclerosis",), "PD": (
    "parkinson's disease",), "OSA": ("obstructive sleep apnea", "sleep apnea"), "PVD": (
    "peripheral vascular disease",), "AAA": ("abdominal aortic aneurysm",), "HIV": (
    "human immunodeficiency virus infectious disease",), "TB": ("tuberculosis",), "HCV": (
    "hepatitis c",), "HBV": ("hepatitis b",), "DKA": ("diabetic ketoacidosis",), "DIC": (
    "disseminated intravascular coagulation",), "IBD": ("inflammatory bowel disease",), "UC": (
    "ulcerative colitis",), "NHL": ("non-hodgkin lymphoma",), "AML": ("acute myeloid leukemia",),
    "CLL": ("chronic lymphocytic leukemia",), "HLD": ("hyperlipidemia",), "OA": ("osteoarthritis",),
    "SOB": ("shortness of breath", "dyspnea"), "CP": ("chest pain",), "ETOH": ("alcohol abuse",
    "alcohol dependence"),
}  # fmt: skip

# Names of nodes that say nothing about a patient.
EMPTY_NAMES = frozenset((
    "disease", "disorder", "syndrome", "condition", "patient", "symptom", "sign", "finding", "body",
    "blood", "tissue", "cell", "cells", "organ", "skin", "other", "unknown", "drug", "left",
    "right", "male", "female", "day", "time", "person", "people", "normal", "acute", "chronic",
))  # fmt: skip
