"""
Audit a model for leaks
=======================

Three leaks are planted in a simulated cohort: a column that is filled after the outcome, patients
on both sides of the folds, and a scaler that learns from the rows it predicts. The audit names all
three; without them it is silent.
"""

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import KFold

from ehrfuse.evaluation import audit_leakage

rng = np.random.default_rng(0)
patient = np.repeat(np.arange(150), 3)
frailty = rng.normal(size=150)[patient]
age = 65 + 8 * frailty + rng.normal(0, 4, 450)
lactate = 2 + 0.5 * frailty + rng.normal(0, 0.6, 450)
died = (rng.random(450) < 1 / (1 + np.exp(1 - 1.2 * frailty))).astype(int)
X = pd.DataFrame({"age": age, "lactate": lactate})

# %%
# An honest model of honest columns, split by patient.
model = LogisticRegression(max_iter=500)
clean = audit_leakage(model, X, died, groups=patient)
print(clean)
clean.raise_if_leaky()


# %%
# Now with a cost that was billed after the stay, a splitter that does not know patients, and a
# model that scales every batch by itself.
class BatchScaled(LogisticRegression):
    """Scales whatever it is given by the mean of just these rows."""

    def fit(self, X, y):
        """Fit on scaled rows."""
        return super().fit(np.asarray(X) - np.mean(X, axis=0).to_numpy(), y)

    def predict_proba(self, X):
        """Predict rows scaled among themselves."""
        return super().predict_proba(np.asarray(X) - np.mean(X, axis=0).to_numpy())


leaky = X.assign(cost=10 + 5 * died + rng.normal(0, 0.8, 450))
splitter = KFold(5, shuffle=True, random_state=0)
report = audit_leakage(BatchScaled(max_iter=500), leaky, died, groups=patient, cv=splitter)
print(report)

# %%
# The evidence of one finding, and the whole report as a page.
print(report["single_columns"].evidence)
page = report.to_html()
print(f"{len(page):,} characters of HTML; report.to_html('audit.html') writes them")
