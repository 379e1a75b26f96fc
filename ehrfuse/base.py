"""The three faces of an estimator with a torch core: classifier, regressor, encoder.

A method subclasses one of them and supplies its parameters and `_make_core(modalities, target)`;
nothing else is required.
"""

import numpy as np
import pandas as pd
from sklearn.base import (
    ClassifierMixin,
    ClassNamePrefixFeaturesOutMixin,
    RegressorMixin,
    TransformerMixin,
)
from sklearn.utils.validation import check_is_fitted

from ehrfuse._estimator import TorchEstimator
from ehrfuse._progress import with_progress
from ehrfuse._runtime import resolve_device
from ehrfuse._targets import ValueTarget, by_name, classification_target
from ehrfuse._train import evaluate

__all__ = ["TorchClassifier", "TorchEncoder", "TorchEstimator", "TorchRegressor"]


class ScoresByName:
    """Outcomes of a frame are matched by name in `score`, as in `fit`."""

    def score(self, X, y, sample_weight=None):
        """Accuracy of a classifier, coefficient of determination of a regressor.

        Parameters
        ----------
        X : DataFrame of shape (n_samples, n_columns), or array if `modalities` is None
        y : as in `fit`
            Outcomes of a frame are matched by name.
        sample_weight : array of shape (n_samples,), optional

        Returns
        -------
        score : float
            Of several tasks the share of rows in which all are right; where labels are unknown
            take `ehrfuse.evaluation.masked_scorer`.
        """
        check_is_fitted(self)
        if np.asarray(pd.isna(y)).any():
            raise ValueError(
                "Input y contains NaN: score needs every label; leave those rows out, or score "
                "a classifier's tasks by ehrfuse.evaluation.masked_scorer."
            )
        names = self.target_.task_names
        if names is not None and hasattr(y, "columns"):  # nullable dtypes would become objects
            y = by_name(y, names).to_numpy("float64")
        return super().score(X, y, sample_weight)


class TorchClassifier(ScoresByName, ClassifierMixin, TorchEstimator):
    """Face of a classifier: one outcome of two or more classes, or several yes-or-no outcomes."""

    @with_progress
    def fit(self, X, y, sample_weight=None, *, X_val=None, y_val=None):
        """Fit to training rows.

        Parameters
        ----------
        X : DataFrame of shape (n_samples, n_columns), or array if `modalities` is None
            A missing modality is a null cell.
        y : array of shape (n_samples,), or array or DataFrame of shape (n_samples, n_tasks)
            Labels of any type; or 0, 1 and NaN (unknown) for several tasks.
        sample_weight : array of shape (n_samples,), optional
        X_val, y_val : as X and y, optional
            Validation rows of one's own instead of `validation_fraction`.

        Returns
        -------
        self : estimator
        """
        vars(self).pop("target_names_", None)
        self._fit(X, y, sample_weight, X_val, y_val)
        self.classes_ = self.target_.classes
        if self.target_.task_names is not None:
            self.target_names_ = self.target_.task_names
        return self

    def _make_target(self, y):
        return classification_target(y, getattr(self, "class_weight", None))

    def predict_proba(self, X):
        """Probability of every class, or of a positive in every task.

        Parameters
        ----------
        X : DataFrame of shape (n_samples, n_columns), or array if `modalities` is None

        Returns
        -------
        proba : array of shape (n_samples, n_classes) or (n_samples, n_tasks)
        """
        check_is_fitted(self)
        return self.target_.probabilities(self._predict(X))

    def predict(self, X):
        """Most probable class; with several tasks, 1 where the probability is above one half.

        Parameters
        ----------
        X : DataFrame of shape (n_samples, n_columns), or array if `modalities` is None

        Returns
        -------
        y : array of shape (n_samples,) or (n_samples, n_tasks)
        """
        check_is_fitted(self)
        return self.target_.decide(self.predict_proba(X))

    def __sklearn_tags__(self):
        """Tags: several yes-or-no outcomes are welcome."""
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        return tags


class TorchRegressor(ScoresByName, RegressorMixin, TorchEstimator):
    """Face of a regressor: one or several real numbers."""

    @with_progress
    def fit(self, X, y, sample_weight=None, *, X_val=None, y_val=None):
        """Fit to training rows.

        Parameters
        ----------
        X : DataFrame of shape (n_samples, n_columns), or array if `modalities` is None
            A missing modality is a null cell.
        y : array of shape (n_samples,) or (n_samples, n_outputs)
        sample_weight : array of shape (n_samples,), optional
        X_val, y_val : as X and y, optional
            Validation rows of one's own instead of `validation_fraction`.

        Returns
        -------
        self : estimator
        """
        return self._fit(X, y, sample_weight, X_val, y_val)

    def _make_target(self, y):
        return ValueTarget(y)

    def predict(self, X):
        """Expected value.

        Parameters
        ----------
        X : DataFrame of shape (n_samples, n_columns), or array if `modalities` is None

        Returns
        -------
        y : array of shape (n_samples,) or (n_samples, n_outputs)
        """
        check_is_fitted(self)
        return self.target_.values(self._predict(X))


class TorchEncoder(ClassNamePrefixFeaturesOutMixin, TransformerMixin, TorchEstimator):
    """Face of a pretrainer: learns without labels, gives an embedding."""

    @with_progress
    def fit(self, X, y=None, *, X_val=None):
        """Fit to training rows; no label is read.

        Parameters
        ----------
        X : DataFrame of shape (n_samples, n_columns), or array if `modalities` is None
        y : ignored
        X_val : as X, optional
            Validation rows of one's own instead of `validation_fraction`.

        Returns
        -------
        self : estimator
        """
        return self._fit(X, X_val=X_val)

    def transform(self, X):
        """Embed rows.

        Parameters
        ----------
        X : DataFrame of shape (n_samples, n_columns), or array if `modalities` is None

        Returns
        -------
        embedding : array of shape (n_samples, n_features_out)
        """
        return self._predict(X)

    def score(self, X, y=None):
        """Negative pretraining loss under a fixed seed, for unsupervised grid search.

        Parameters
        ----------
        X : DataFrame of shape (n_samples, n_columns), or array if `modalities` is None
        y : ignored

        Returns
        -------
        score : float
        """
        check_is_fitted(self)
        X = self._frame(X, reset=False)
        device = resolve_device(self.device)
        data = self._data(X, weight=np.ones(len(X), "float32"))
        size = self._batch_size(len(data))
        return -evaluate(self.module_.to(device), data, size, 0, device)["val_loss"]

    @property
    def _n_features_out(self):
        return self.module_.n_outputs

    def __sklearn_tags__(self):
        """Tags: the embedding is float whatever came in."""
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = []
        return tags
