"""The table of `compare` is what scikit-learn counts, patients stay whole, failures have a name."""

import html.parser
import re

import numpy as np
import pandas as pd
import pytest
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.dummy import DummyClassifier
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss, roc_auc_score
from sklearn.model_selection import (
    GroupKFold,
    KFold,
    ShuffleSplit,
    StratifiedKFold,
    cross_val_predict,
    cross_val_score,
)
from sklearn.pipeline import make_pipeline
from sklearn.svm import LinearSVC

from ehrfuse import FusionClassifier
from ehrfuse.datasets import make_ehr
from ehrfuse.evaluation import (
    audit_leakage,
    bootstrap_scores,
    compare,
    decision_curve,
    out_of_fold,
    paired_difference,
)

FEW = {"n_resamples": 50}


def case(n=150, seed=0):
    rng = np.random.default_rng(seed)
    X = pd.DataFrame(rng.normal(size=(n, 3)), columns=list("abc"))
    X["who"] = rng.integers(0, n // 3, n)
    y = (X["a"] + rng.normal(size=n) > 0).astype(int).to_numpy()
    return X, y


class Spy(ClassifierMixin, BaseEstimator):
    """Notes what it was given; `shared` survives clones."""

    def __init__(self, shared=None, groups=None, random_state=None):
        self.shared = shared
        self.groups = groups
        self.random_state = random_state

    def __sklearn_clone__(self):
        return Spy(self.shared, self.groups, self.random_state)

    def fit(self, X, y):
        self.classes_ = np.unique(y)
        self.rows_ = X
        return self

    def predict_proba(self, X):
        self.shared.append((self.rows_, X, self.random_state))
        return np.full((len(X), 2), 0.5)


def test_scores_are_those_of_sklearn():
    X, y = case()
    X = X[["a", "b"]]
    models = {"flat": DummyClassifier(), "logistic": LogisticRegression()}
    folds = StratifiedKFold(4, shuffle=True, random_state=3)
    found = compare(models, X, y, cv=4, seeds=3, metrics=["auroc", "brier"], **FEW)
    for name, model in models.items():
        for metric, scoring, sign in [("auroc", "roc_auc", 1), ("brier", "neg_brier_score", -1)]:
            scores = sign * cross_val_score(model, X, y, cv=folds, scoring=scoring)
            row = found.table.loc[name, metric]
            assert row["mean"] == pytest.approx(scores.mean())
            assert row["sd"] == pytest.approx(scores.std(ddof=1))
            assert row["folds"] == 4
        p = cross_val_predict(model, X, y, cv=folds, method="predict_proba")[:, 1]
        np.testing.assert_allclose(found.predictions[name], p)
        assert found.table.loc[(name, "auroc"), "estimate"] == pytest.approx(roc_auc_score(y, p))
        assert found.table.loc[(name, "brier"), "estimate"] == pytest.approx(brier_score_loss(y, p))
    assert found.predictions.index.equals(X.index)
    assert len(found.fold_scores) == 8
    assert (found.fold_scores["seconds"] > 0).all()


def test_intervals_and_differences_are_those_of_the_functions():
    X, y = case()
    models = {"one": LogisticRegression(), "two": RandomForestClassifier(8)}
    found = compare(models, X[["a", "b", "c"]], y, groups=X["who"], cv=3, **FEW)
    p, groups = found.predictions, X["who"]
    own = {"groups": groups, "random_state": 0} | FEW
    for name in models:
        expected = bootstrap_scores(y, p[name], **own)
        np.testing.assert_allclose(
            found.table.loc[name][["estimate", "lo", "hi", "n"]], expected, rtol=1e-12
        )
    for metric in ("auroc", "brier"):
        pair = paired_difference(y, p["two"], p["one"], metric=metric, **own)
        np.testing.assert_allclose(found.differences.loc["two", metric], pair, rtol=1e-12)
    assert found.reference == "one"
    other = compare(models, X[["a", "b", "c"]], y, groups=X["who"], cv=3, reference="two", **FEW)
    np.testing.assert_allclose(
        other.differences.loc[("one", "auroc"), "difference"],
        -found.differences.loc[("two", "auroc"), "difference"],
    )


def test_patients_stay_whole_and_their_column_is_no_feature():
    X, y = case()
    seen, own = [], []
    models = {"blind": Spy(seen), "knows": Spy(own, groups="who")}
    compare(models, X, y, groups="who", cv=3, metrics="brier", **FEW)
    assert len(seen) == len(own) == 3
    for (train, test, _), (train_own, test_own, _) in zip(seen, own, strict=True):
        assert list(train) == list(test) == ["a", "b", "c"]
        assert not set(train_own["who"]) & set(test_own["who"])
        assert set(X.loc[train.index, "who"]).isdisjoint(X.loc[test.index, "who"])


def test_a_splitter_that_divides_patients_is_refused():
    X, y = case()
    with pytest.raises(ValueError, match=r"KFold.* puts \d+ patients into the training and the"):
        compare({"flat": DummyClassifier()}, X, y, groups="who", cv=KFold(3))
    found = compare({"flat": DummyClassifier()}, X, y, groups="who", cv=GroupKFold(3), **FEW)
    assert found.predictions.notna().all(axis=None)


def test_labels_of_the_held_out_rows_change_nothing():
    X, y = case()
    folds = KFold(3)
    models = {"logistic": LogisticRegression(), "forest": RandomForestClassifier(5)}
    before = compare(models, X, y, cv=folds, **FEW).predictions
    for train, test in folds.split(X):
        changed = y.copy()
        changed[test] = 1 - y[test]
        after = compare(models, X, changed, cv=folds, **FEW).predictions
        pd.testing.assert_frame_equal(after.iloc[test], before.iloc[test])
        assert not np.allclose(after.iloc[train], before.iloc[train])


def test_seeds_move_folds_and_models():
    X, y = case()
    seen = []
    found = compare({"spy": Spy(seen)}, X, y, cv=2, seeds=(4, 5), metrics="brier", **FEW)
    assert [state for _, _, state in seen] == [4, 4, 5, 5]
    assert not seen[0][1].index.equals(seen[2][1].index)
    assert found.table.loc[("spy", "brier"), "folds"] == 4
    seen.clear()
    compare({"spy": Spy(seen, random_state=7)}, X, y, cv=2, seeds=None, metrics="brier", **FEW)
    assert [state for _, _, state in seen] == [7, 7]
    nested = {"nested": make_pipeline(Spy(seen, random_state=7))}
    seen.clear()
    compare(nested, X, y, cv=2, seeds=1, metrics="brier", **FEW)
    assert [state for _, _, state in seen] == [1, 1]


def test_predictions_are_averaged_over_seeds():
    X, y = case(90)
    model = {"forest": RandomForestClassifier(5)}
    parts = [compare(model, X, y, cv=3, seeds=s, **FEW).predictions for s in (0, 1)]
    both = compare(model, X, y, cv=3, seeds=(0, 1), **FEW)
    np.testing.assert_allclose(both.predictions, (parts[0] + parts[1]) / 2)
    again = compare(model, X, y, cv=3, seeds=(0, 1), **FEW)
    pd.testing.assert_frame_equal(both.table, again.table)


def test_processes_change_nothing():
    X, y = case(90)
    models = {"forest": RandomForestClassifier(5), "logistic": LogisticRegression()}
    one, two = (compare(models, X, y, cv=2, n_jobs=n, **FEW) for n in (None, 2))
    pd.testing.assert_frame_equal(one.table, two.table)
    pd.testing.assert_frame_equal(one.predictions, two.predictions)


def test_unknown_labels_are_predicted_and_not_trained_on():
    X, y = case()
    holes = np.where(np.arange(150) % 5 == 0, np.nan, y)
    seen = []
    models = {"logistic": LogisticRegression(), "spy": Spy(seen)}
    found = compare(models, X[["a", "b"]], holes, cv=3, metrics="auroc", **FEW)
    assert found.predictions.notna().all(axis=None)
    assert (found.table["n"] == 120).all()
    assert all(np.isfinite(holes[train.index]).all() for train, _, _ in seen)


def test_rows_never_held_out_are_not_scored():
    X, y = case()
    found = compare(
        {"logistic": LogisticRegression()}, X, y,
        cv=ShuffleSplit(2, test_size=0.2, random_state=0), metrics="auroc", **FEW,
    )  # fmt: skip
    tested = found.predictions["logistic"].notna()
    assert found.table["n"].iloc[0] == tested.sum() < 60


def test_strings_as_classes_and_arrays():
    X, y = case()
    words = np.where(y == 1, "sick", "fine")
    one = compare({"m": LogisticRegression()}, X.to_numpy(), words, cv=3, **FEW)
    two = compare({"m": LogisticRegression()}, X.to_numpy(), words == "sick", cv=3, **FEW)
    pd.testing.assert_frame_equal(one.table, two.table)


def test_several_tasks_with_a_mean():
    data = make_ehr(n_samples=90, n_tasks=2, label_missing=0.2, modalities=["vitals", "labs"],
                    random_state=0, as_bunch=True)  # fmt: skip
    models = {
        name: FusionClassifier(
            data.modalities, fusion=name, max_epochs=1, n_members=2, groups="subject_id"
        )
        for name in ("mean", "concat")
    }
    found = compare(models, data.X, data.y, groups="subject_id", cv=2, metrics="auroc", **FEW)
    tasks = list(data.y.columns)
    assert found.table.loc["mean"].index.get_level_values("task").unique().tolist() == [
        *tasks, "(mean)"
    ]  # fmt: skip
    table = found.table.xs("auroc", level="metric")
    for column in ("estimate", "mean"):
        means = table[column].drop("(mean)", level="task").groupby("model").mean()
        assert table.loc[("concat", "(mean)"), column] == pytest.approx(means["concat"])
    assert found.predictions.columns.names == ["model", "task"]
    text = found.to_markdown()
    assert text.splitlines()[0].startswith("| | task | AUROC, mean ± SD over 2 folds |")
    assert "| concat | (mean) |" in text


# ---------------------------------------------------------------- failures


class Fails(LogisticRegression):
    def fit(self, X, y):
        if 0 not in X.index:
            raise ValueError("the third row is odd.")
        return super().fit(X, y)


def test_a_failing_model_is_named_with_its_fold():
    X, y = case()
    models = {"fine": LogisticRegression(), "bad one": Fails()}
    sentence = "Model 'bad one' failed in fold 1 of 3, seed 0: ValueError: the third row is odd."
    with pytest.raises(RuntimeError, match=re.escape(sentence)) as caught:
        compare(models, X, y, cv=KFold(3), **FEW)
    assert isinstance(caught.value.__cause__, ValueError)
    with pytest.raises(RuntimeError, match=re.escape(sentence)):
        compare(models, X, y, cv=KFold(3), n_jobs=2, **FEW)
    with pytest.warns(UserWarning, match=re.escape(sentence) + " The comparison goes on"):
        found = compare(models, X, y, cv=KFold(3), reference="bad one", on_error="warn", **FEW)
    assert list(found.predictions) == ["fine"]
    assert found.failures == {"bad one": sentence}
    assert found.reference == "fine"
    assert len(found.differences) == 0
    assert "failed in fold 1" in found._repr_html_()
    with (
        pytest.warns(UserWarning, match="bad one"),
        pytest.raises(RuntimeError, match=r"No model could be fitted\. Model 'bad one'"),
    ):
        compare({"bad one": Fails()}, X, y, cv=KFold(3), on_error="warn", **FEW)


@pytest.mark.parametrize(
    ("models", "options", "message"),
    [
        ([LogisticRegression()], {}, "models is list; pass a dict"),
        ({}, {}, "models is empty"),
        ({"svc": LinearSVC()}, {}, r"Model 'svc' \(LinearSVC\) has no predict_proba"),
        ({"m": DummyClassifier()}, {"reference": "n"}, "reference='n' is no model"),
        ({"m": DummyClassifier()}, {"metrics": "f1"}, "metric='f1' is not known"),
        ({"m": DummyClassifier()}, {"seeds": ()}, "must be one or several whole numbers"),
        ({"m": DummyClassifier()}, {"on_error": "skip"}, "on_error='skip' is not known"),
        ({"m": DummyClassifier()}, {"groups": "nobody"}, "names no column"),
    ],
)
def test_refusals(models, options, message):
    X, y = case()
    with pytest.raises(ValueError, match=message):
        compare(models, X, y, **options)


# ---------------------------------------------------------------- how it is shown


@pytest.fixture(scope="module")
def shown():
    X, y = case()
    models = {"a_1 & b": LogisticRegression(), "50 %": DummyClassifier(), "x|y": DummyClassifier()}
    return compare(models, X, y, cv=3, metrics=["auroc", "net_benefit@0.2"], **FEW)


def test_markdown(shown):
    scores, differences = shown.to_markdown(digits=2).split("\n\n")
    lines = scores.splitlines()
    assert "AUROC, mean ± SD over 3 folds | AUROC pooled (95 % interval)" in lines[0]
    assert "net benefit at 0.2 pooled" in lines[0]
    assert all(line.replace("\\|", "").count("|") == 6 for line in lines)
    row = shown.table.loc["a_1 & b", "auroc"]
    assert f"| {row['mean']:.2f} ± {row['sd']:.2f} |" in lines[2]
    assert f"| {row['estimate']:.2f} ({row['lo']:.2f} to {row['hi']:.2f}) |" in lines[2]
    assert "AUROC minus a_1 & b (95 % interval)" in differences
    assert re.search(r"\| 50 % \| -0\.\d\d \(-0\.\d\d to -0\.\d\d\)", differences)
    assert shown.to_markdown(differences=False) == shown.to_markdown().split("\n\n")[0]


def test_latex(shown):
    scores, differences = shown.to_latex().split("\n\n")
    lines = scores.splitlines()
    assert lines[0] == r"\begin{tabular}{lrrrr}"
    assert lines[-1] == r"\end{tabular}"
    assert [line for line in lines if line.endswith("rule")] == [
        r"\toprule", r"\midrule", r"\bottomrule"
    ]  # fmt: skip
    assert all(re.sub(r"\\&", "", line).count("&") == 4 for line in lines if line.endswith(r"\\"))
    assert r"a\_1 \& b" in scores
    assert r"50 \%" in scores
    assert r"$\pm$" in scores
    assert "±" not in scores + differences
    assert re.search(r"\$-0\.\d+\$ \(\$-0\.\d+\$ to \$-0\.\d+\$\)", differences)


def test_html(shown):
    class Count(html.parser.HTMLParser):
        tags = ()

        def handle_starttag(self, tag, attrs):
            self.tags = (*self.tags, tag)

    reader = Count()
    reader.feed(shown._repr_html_())
    assert reader.tags.count("table") == 2
    assert reader.tags.count("tr") == 4 + 3
    assert repr(shown) == "<Comparison of 3 models: a_1 & b (reference), 50 %, x|y>"


def test_progress_bar_is_there_when_asked_for(capsys):
    X, y = case()
    compare({"m": DummyClassifier()}, X, y, cv=3, verbose=1, **FEW)
    assert "0/3" in capsys.readouterr().err
    compare({"m": DummyClassifier()}, X, y, cv=3, verbose=0, **FEW)
    compare({"m": DummyClassifier()}, X, y, cv=3, **FEW)  # not a terminal
    assert capsys.readouterr() == ("", "")


def test_folds_as_pairs_of_rows_and_a_fold_of_one_class():
    X, y = case()
    folds = list(KFold(3).split(X))
    as_pairs = compare({"lr": LogisticRegression()}, X, y, cv=folds, **FEW).predictions
    as_splitter = compare({"lr": LogisticRegression()}, X, y, cv=KFold(3), **FEW).predictions
    pd.testing.assert_frame_equal(as_pairs, as_splitter)
    words = np.array(["alive"] * 50 + ["dead"] * 50)
    cv = [(np.arange(50), np.arange(50, 100)), (np.arange(50, 100), np.arange(50))]
    prior = DummyClassifier(strategy="prior")
    found = compare({"d": prior}, X[:100], words, cv=cv, metrics=["brier"], **FEW).predictions["d"]
    assert found.iloc[[0, 99]].tolist() == [1.0, 0.0]  # each half has seen the other class only


@pytest.mark.parametrize("kind", ["name", "series", "renamed", "array", "list"])
def test_a_column_that_tells_the_groups_is_no_feature(kind):
    X, y = case()
    groups = {"name": "who", "series": X["who"].map(lambda who: who + 1000),
              "renamed": X["who"].rename("other"), "array": X["who"].to_numpy(),
              "list": X["who"].tolist()}[kind]  # fmt: skip
    seen, own = [], []
    compare({"blind": Spy(seen), "knows": Spy(own, groups="who")}, X, y, groups=groups, cv=3,
            metrics="brier", **FEW)  # fmt: skip
    assert {tuple(part) for train, test, _ in seen for part in (train, test)} == {("a", "b", "c")}
    assert {tuple(train) for train, *_ in own} == {("a", "b", "c", "who")}


BAD_GROUPS = {
    "frame": (lambda n: pd.DataFrame({"who": range(n)}), "groups has 2 dimensions .DataFrame"),
    "column": (lambda n: np.arange(n)[:, None], "groups has 2 dimensions .ndarray"),
    "number": (lambda n: 3, "groups has 0 dimensions .int"),
    "ragged": (lambda n: [[1], [1, 2]] * (n // 2), "groups has 2 dimensions .list"),
    "short": (lambda n: np.arange(n - 1), "groups has 119 rows, but 120 are needed"),
    "null": (lambda n: pd.Series(range(n)).where(lambda v: v > 3), "groups is null in 4 rows"),
}


@pytest.mark.parametrize("kind", BAD_GROUPS)
def test_groups_that_are_no_patient_of_every_row(kind):
    make, words = BAD_GROUPS[kind]
    y, groups = np.tile([0, 1], 60), make(120)
    X, p = pd.DataFrame({"a": np.arange(120.0)}), np.full(120, 0.5)
    for ask in (
        lambda: compare({"flat": DummyClassifier()}, X, y, groups=groups, cv=3, **FEW),
        lambda: out_of_fold(DummyClassifier(), X, y, groups=groups, cv=3),
        lambda: bootstrap_scores(y, p, groups=groups, n_resamples=5),
        lambda: paired_difference(y, p, p, groups=groups, n_resamples=5),
        lambda: decision_curve(y, p, groups=groups, n_resamples=5),
        lambda: audit_leakage(None, X, y, groups=groups, checks="group_overlap"),
    ):
        with pytest.raises(ValueError, match=words):
            ask()
