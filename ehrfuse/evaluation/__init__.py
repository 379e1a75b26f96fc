"""Honest evaluation of any scikit-learn estimator on data with missing modalities."""

from ehrfuse.evaluation._tables import Comparison
from ehrfuse.evaluation.attention import AttentionChangeDisplay
from ehrfuse.evaluation.audit import LeakageReport, audit_leakage
from ehrfuse.evaluation.comparison import compare
from ehrfuse.evaluation.conformal import ConformalByPattern
from ehrfuse.evaluation.contribution import modality_contribution
from ehrfuse.evaluation.curves import DecisionCurveDisplay, PatternCalibrationDisplay
from ehrfuse.evaluation.decisions import (
    calibration_table,
    decision_curve,
    expected_calibration_error,
    net_benefit,
)
from ehrfuse.evaluation.displays import MissingPatternDisplay
from ehrfuse.evaluation.explanations import explain_in_words, sensitivity, silhouette_report
from ehrfuse.evaluation.folds import out_of_fold
from ehrfuse.evaluation.metrics import METRICS, bootstrap_scores, paired_difference
from ehrfuse.evaluation.missingness import outcome_by_pattern, presence_informativeness
from ehrfuse.evaluation.scorers import contribution_scorer, masked_scorer, worst_group_scorer
from ehrfuse.evaluation.slices import score_by_pattern, score_by_subgroup
from ehrfuse.evaluation.sources import map_columns
from ehrfuse.evaluation.texts import text_scores
from ehrfuse.evaluation.timelines import EmbeddingDisplay, TimelineDisplay
from ehrfuse.evaluation.training import (
    ComparisonDisplay,
    ContributionDisplay,
    KnowledgeEvidenceDisplay,
    TrainingHistoryDisplay,
)

__all__ = [
    "METRICS",
    "AttentionChangeDisplay",
    "Comparison",
    "ComparisonDisplay",
    "ConformalByPattern",
    "ContributionDisplay",
    "DecisionCurveDisplay",
    "EmbeddingDisplay",
    "KnowledgeEvidenceDisplay",
    "LeakageReport",
    "MissingPatternDisplay",
    "PatternCalibrationDisplay",
    "TimelineDisplay",
    "TrainingHistoryDisplay",
    "audit_leakage",
    "bootstrap_scores",
    "calibration_table",
    "compare",
    "contribution_scorer",
    "decision_curve",
    "expected_calibration_error",
    "explain_in_words",
    "map_columns",
    "masked_scorer",
    "modality_contribution",
    "net_benefit",
    "out_of_fold",
    "outcome_by_pattern",
    "paired_difference",
    "presence_informativeness",
    "score_by_pattern",
    "score_by_subgroup",
    "sensitivity",
    "silhouette_report",
    "text_scores",
    "worst_group_scorer",
]
