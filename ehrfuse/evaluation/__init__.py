"""Honest evaluation of any scikit-learn estimator on data with missing modalities."""

from ehrfuse.evaluation.attention import AttentionChangeDisplay
from ehrfuse.evaluation.displays import MissingPatternDisplay
from ehrfuse.evaluation.explanations import explain_in_words, sensitivity, silhouette_report
from ehrfuse.evaluation.folds import out_of_fold
from ehrfuse.evaluation.metrics import (
    METRICS,
    bootstrap_scores,
    masked_scorer,
    paired_difference,
    score_by_pattern,
)
from ehrfuse.evaluation.missingness import outcome_by_pattern, presence_informativeness
from ehrfuse.evaluation.sources import map_columns
from ehrfuse.evaluation.timelines import EmbeddingDisplay, TimelineDisplay

__all__ = [
    "METRICS",
    "AttentionChangeDisplay",
    "EmbeddingDisplay",
    "MissingPatternDisplay",
    "TimelineDisplay",
    "bootstrap_scores",
    "explain_in_words",
    "map_columns",
    "masked_scorer",
    "out_of_fold",
    "outcome_by_pattern",
    "paired_difference",
    "presence_informativeness",
    "score_by_pattern",
    "sensitivity",
    "silhouette_report",
]
