"""Bedside scores as baselines: LACE, HOSPITAL, and scores that a record holds already.

Points are computed as published; a logistic regression turns them into a probability, so that a
score stands in a table beside any classifier.
"""

import numpy as np
import pandas as pd
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.linear_model import LogisticRegression
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted

from ehrfuse._runtime import check_option

__all__ = ["ClinicalScoreClassifier"]

# Columns of every score, under their own names unless `columns` says otherwise.
NEEDS = {
    "lace": ("length_of_stay", "acute", "charlson", "emergency_visits"),
    "hospital": ("hemoglobin", "oncology", "sodium", "procedure", "acute", "admissions",
                 "length_of_stay"),
    "column": ("score",),
}  # fmt: skip

# Comorbidities with the weights of LACE (van Walraven 2010, after Schneeweiss) and the beginnings
# of their ICD-9-CM and ICD-10 codes (Quan et al., Med Care 2005;43:1130-1139).
CHARLSON = {
    "infarction": (1, "410 412", "I21 I22 I252"),
    "vascular": (1, "0930 4373 440 441 4431 4432 4438 4439 4471 5571 5579 V434",
                 "I70 I71 I731 I738 I739 I771 I790 I792 K551 K558 K559 Z958 Z959"),
    "cerebrovascular": (1, "36234 430 431 432 433 434 435 436 437 438",
                        "G45 G46 H340 I60 I61 I62 I63 I64 I65 I66 I67 I68 I69"),
    "diabetes": (1, "2500 2501 2502 2503 2508 2509",
                 "E100 E101 E106 E108 E109 E110 E111 E116 E118 E119 E130 E131 E136 E138 E139"),
    "heart failure": (2, "39891 40201 40211 40291 40401 40403 40411 40413 40491 40493 4254 4255 "
                      "4257 4258 4259 428",
                      "I099 I110 I130 I132 I255 I420 I425 I426 I427 I428 I429 I43 I50 P290"),
    "diabetes with damage": (2, "2504 2505 2506 2507",
                             "E102 E103 E104 E105 E107 E112 E113 E114 E115 E117 E132 E133 E134 "
                             "E135 E137"),
    "pulmonary": (2, "4168 4169 490 491 492 493 494 495 496 500 501 502 503 504 505 5064 5081 5088",
                  "I278 I279 J40 J41 J42 J43 J44 J45 J46 J47 J60 J61 J62 J63 J64 J65 J66 J67 J684 "
                  "J701 J703"),
    "mild liver": (2, "07022 07023 07032 07033 07044 07054 0706 0709 570 571 5733 5734 5738 5739 "
                   "V427",
                   "B18 K700 K701 K702 K703 K709 K713 K714 K715 K717 K73 K74 K760 K762 K763 K764 "
                   "K768 K769 Z944"),
    "cancer": (2, "14 15 16 170 171 172 174 175 176 179 18 190 191 192 193 194 195 200 201 202 203 "
               "204 205 206 207 208 2386",
               "C0 C1 C20 C21 C22 C23 C24 C25 C26 C30 C31 C32 C33 C34 C37 C38 C39 C40 C41 C43 C45 "
               "C46 C47 C48 C49 C50 C51 C52 C53 C54 C55 C56 C57 C58 C6 C70 C71 C72 C73 C74 C75 C76 "
               "C81 C82 C83 C84 C85 C88 C90 C91 C92 C93 C94 C95 C96 C97"),
    "dementia": (3, "290 2941 3312", "F00 F01 F02 F03 F051 G30 G311"),
    "connective tissue": (3, "4465 7100 7101 7102 7103 7104 7140 7141 7142 7148 725",
                          "M05 M06 M315 M32 M33 M34 M351 M353 M360"),
    "aids": (4, "042 043 044", "B20 B21 B22 B24"),
    "severe liver or renal": (4, "4560 4561 4562 5722 5723 5724 5728 40301 40311 40391 40402 40403 "
                              "40412 40413 40492 40493 582 5830 5831 5832 5834 5836 5837 585 586 "
                              "5880 V420 V451 V56",
                              "I850 I859 I864 I982 K704 K711 K721 K729 K765 K766 K767 I120 I131 "
                              "N032 N033 N034 N035 N036 N037 N052 N053 N054 N055 N056 N057 N18 N19 "
                              "N250 Z490 Z491 Z492 Z940 Z992"),
    "metastasis": (6, "196 197 198 199", "C77 C78 C79 C80"),
}  # fmt: skip


def charlson_points(codes_9=(), codes_10=()):
    """Comorbidity points of LACE from the ICD codes of one patient, with or without points.

    Parameters
    ----------
    codes_9, codes_10 : sequence of str, default=()
        ICD-9-CM and ICD-10 codes known at the prediction.

    Returns
    -------
    points : int
    """
    nine = tuple(str(code).replace(".", "").upper() for code in codes_9)
    ten = tuple(str(code).replace(".", "").upper() for code in codes_10)
    total = 0
    for weight, begin_9, begin_10 in CHARLSON.values():
        begins = tuple(begin_9.split()), tuple(begin_10.split())
        has = any(c.startswith(begins[0]) for c in nine) or any(
            c.startswith(begins[1]) for c in ten
        )
        total += weight * has
    return total


class ClinicalScoreClassifier(ClassifierMixin, BaseEstimator):
    """A bedside score as a classifier.

    Parameters
    ----------
    score : {"lace", "hospital", "column"}, default="lace"
        "lace" and "hospital" predict readmission in 30 days. "column" passes a score through that
        the record holds, such as SAPS-I or SOFA.
    columns : dict of str to str, default=None
        Column of X for every part that has another name there, for "column" at least ``"score"``.

    Attributes
    ----------
    classes_ : array of shape (2,)

    Notes
    -----
    *LACE* [1]_ (0 to 19): ``length_of_stay`` in days (below 1: 0, 1: 1, 2: 2, 3: 3, 4 to 6: 4, 7 to
    13: 5, 14 and more: 7); ``acute`` admission: 3; ``charlson``, comorbidity points (0 to 3 as they
    are, 4 and more: 5; `charlson_points` computes them from ICD codes with the weights of LACE);
    ``emergency_visits`` in the six months before: one each, at most 4.

    *HOSPITAL* [2]_ (0 to 13): ``hemoglobin`` at discharge below 12 g/dL: 1; discharge from
    ``oncology``: 2; ``sodium`` at discharge below 135 mmol/L: 1; any ``procedure``: 1; ``acute``
    (non-elective) admission: 1; ``admissions`` in the year before (0: 0, 1 to 5: 2, more: 5);
    ``length_of_stay`` of 5 days and more: 2. Later versions count 0 to 1 admissions as 0.

    *SAPS-I* [3]_ and *SOFA* [4]_ are taken as they stand in a column.

    A part that is not recorded gives no point, as at the bedside; a score that is missing as a
    whole predicts the rate of the training rows.

    References
    ----------
    .. [1] van Walraven et al. (2010). Derivation and validation of an index to predict early death
       or unplanned readmission after discharge from hospital to the community. CMAJ 182:551-557.
    .. [2] Donze et al. (2013). Potentially avoidable 30-day hospital readmissions in medical
       patients. JAMA Intern Med 173:632-638.
    .. [3] Le Gall et al. (1984). A simplified acute physiology score for ICU patients. Crit Care
       Med 12:975-977.
    .. [4] Vincent et al. (1996). The SOFA score to describe organ dysfunction/failure. Intensive
       Care Med 22:707-710.

    Examples
    --------
    >>> import pandas as pd
    >>> from ehrfuse import ClinicalScoreClassifier
    >>> X = pd.DataFrame({
    ...     "length_of_stay": [0.5, 5, 20, 3], "acute": [0, 1, 1, 0], "charlson": [0, 2, 9, 1],
    ...     "emergency_visits": [0, 1, 6, 0],
    ... })
    >>> clf = ClinicalScoreClassifier("lace")
    >>> clf.points(X).tolist()
    [0.0, 10.0, 19.0, 4.0]
    >>> clf.fit(X, [0, 0, 1, 0]).predict_proba(X).shape
    (4, 2)
    """

    def __init__(self, score="lace", columns=None):
        self.score = score
        self.columns = columns

    def points(self, X):
        """Points of every row; nothing is fitted.

        Parameters
        ----------
        X : DataFrame of shape (n_samples, n_columns)

        Returns
        -------
        points : Series of float
        """
        check_option(self.score, "score", tuple(NEEDS))
        names = {part: (self.columns or {}).get(part, part) for part in NEEDS[self.score]}
        lost = [name for name in names.values() if name not in X.columns]
        if lost:
            raise ValueError(
                f"Score {self.score!r} needs the columns {lost}; say in columns= what they are "
                "called here."
            )
        parts = {
            part: X[name].to_numpy(dtype="float64", na_value=np.nan) for part, name in names.items()
        }
        total = {"lace": _lace, "hospital": _hospital, "column": lambda p: p["score"]}
        return pd.Series(total[self.score](parts), index=X.index, name=self.score)

    def fit(self, X, y):
        """Learn what a point is worth.

        Parameters
        ----------
        X : DataFrame of shape (n_samples, n_columns)
        y : array of shape (n_samples,)
            Two classes.

        Returns
        -------
        self : ClinicalScoreClassifier
        """
        y = np.asarray(y)
        check_classification_targets(y)
        self.classes_ = np.unique(y)
        if len(self.classes_) != 2:
            raise ValueError(f"y holds {len(self.classes_)} classes; a bedside score needs two.")
        points = self.points(X).to_numpy()
        known = ~np.isnan(points)
        hit = y == self.classes_[1]
        self.rate_ = float(hit.mean())
        self.model_ = None
        if len(np.unique(hit[known])) == 2:
            self.model_ = LogisticRegression(C=1e3).fit(points[known, None], hit[known])
        self.feature_names_in_ = np.asarray(X.columns, dtype=object)
        self.n_features_in_ = X.shape[1]
        return self

    def predict_proba(self, X):
        """Probability of both classes.

        Parameters
        ----------
        X : DataFrame of shape (n_samples, n_columns)

        Returns
        -------
        proba : array of shape (n_samples, 2)
        """
        check_is_fitted(self)
        points = self.points(X).to_numpy()
        p = np.full(len(points), self.rate_)
        known = ~np.isnan(points)
        if self.model_ is not None and known.any():
            p[known] = self.model_.predict_proba(points[known, None])[:, 1]
        return np.column_stack([1 - p, p])

    def predict(self, X):
        """Most probable class.

        Parameters
        ----------
        X : DataFrame of shape (n_samples, n_columns)

        Returns
        -------
        y : array of shape (n_samples,)
        """
        return self.classes_[self.predict_proba(X).argmax(axis=1)]

    def __sklearn_tags__(self):
        """Tags: frames with named columns, two classes."""
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        tags.input_tags.allow_nan = True
        tags.no_validation = True
        return tags


def _lace(p):
    days = p["length_of_stay"]
    stay = np.select(
        [days < 1, days < 2, days < 3, days < 4, days < 7, days < 14, days >= 14],
        [0, 1, 2, 3, 4, 5, 7], 0,
    )  # fmt: skip
    charlson = np.where(p["charlson"] >= 4, 5, np.nan_to_num(p["charlson"]))
    visits = np.minimum(np.nan_to_num(p["emergency_visits"]), 4)
    return stay + 3.0 * (p["acute"] > 0) + charlson + visits


def _hospital(p):
    admissions = np.select([p["admissions"] > 5, p["admissions"] >= 1], [5, 2], 0)
    return (
        1.0 * (p["hemoglobin"] < 12) + 2 * (p["oncology"] > 0) + (p["sodium"] < 135)
        + (p["procedure"] > 0) + (p["acute"] > 0) + admissions + 2 * (p["length_of_stay"] >= 5)
    )  # fmt: skip
