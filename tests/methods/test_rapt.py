"""What is true of RAPT only: its three tasks, what is handed over, no leak, generated patients."""

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.frozen import FrozenEstimator

from ehrfuse import Events, RAPTClassifier, RAPTPretrainer, RAPTRegressor, Tabular, VisitGAN, Visits
from ehrfuse.datasets import make_ehr, make_prenatal
from ehrfuse.nn.timeline import Timeline, fill
from ehrfuse.nn.visit_tasks import Similarity, contrast, hide_visits, statistics, swap_visits

FAST = {"d_model": 8, "n_members": 2, "max_epochs": 2, "random_state": 0}
PRETRAIN = {"d_model": 8, "n_members": 2, "max_epochs": 2}


@pytest.fixture(scope="module")
def cohort():
    return make_ehr(n_samples=96, modalities=["course", "history"], random_state=0, as_bunch=True)


@pytest.fixture(scope="module")
def women():
    return make_prenatal(96, random_state=0, as_bunch=True)


def some_line(n=6, v=5, f=3):
    torch.manual_seed(0)
    length = torch.tensor([5, 4, 1, 0, 3, 2])[:n]
    mask = torch.arange(v) < length[:, None]
    time = torch.where(mask, torch.rand(n, v).cumsum(1) * 10, 0.0)
    observed = (torch.rand(n, v, f) < 0.7) & mask[..., None]
    value = torch.where(observed, torch.randn(n, v, f), 0.0)
    words = torch.where(mask[..., None], torch.randint(0, 2, (n, v, 2)).float(), 0.0)
    return Timeline(time, mask, value, observed, words)


# ---------------------------------------------------------------- similarity


def test_contrast_identities():
    gap = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0], [9.0, 9.0]])  # distances 5, 1, 2
    yes = torch.tensor([True, False, False, False])
    no = torch.tensor([False, True, False, False])
    assert contrast(gap, yes, ~yes & no, 3.0, True).item() == pytest.approx((25 + 4) / 2)
    far = torch.tensor([True, False, False, False])
    assert contrast(gap, no, far, 3.0, True).item() == pytest.approx((1 + 0) / 2)
    assert contrast(gap, no, far, 3.0, False).item() == pytest.approx((1 + 4) / 2)  # no hinge
    nothing = torch.zeros(4).bool()
    same = torch.zeros(4, 2, requires_grad=True)
    loss = contrast(same, nothing, nothing, 3.0, True)
    assert loss.item() == 0
    contrast(same, ~nothing, nothing, 3.0, True).backward()
    assert same.grad.isfinite().all()  # the root at zero


def test_statistics_by_hand():
    line = some_line()
    table = statistics(line)
    assert table.shape == (6, 7 * 3 + 2)
    row, number = 0, 1
    seen = line.observed[row, :, number]
    x, t = line.value[row, seen, number].numpy(), line.time[row, seen].numpy()
    assert len(x) > 2
    expected = [
        x[-1],
        x.mean(),
        x.min(),
        x.max(),
        x.std(ddof=1),
        np.polyfit(t, x, 1)[0],
        np.log1p(len(x)),
    ]
    np.testing.assert_allclose(table[row, number : 7 * 3 : 3].numpy(), expected, rtol=1e-4)
    assert table[3, :18].isnan().all()  # no visit at all
    assert (table[3, 18:] == 0).all()


def test_thresholds_are_the_percentiles_of_training_pairs():
    torch.manual_seed(0)
    table = torch.randn(400, 6)
    table[:, 5] = 2.0  # a constant says nothing
    part = Similarity(6, 3.0, True, 0.15)
    part.learn(table, seed=0)
    z = part.standardised(table)
    assert (z[:, 5] == 0).all()
    distance = torch.pdist(z)
    inside = [
        (distance < part.thresholds[0]).float().mean(),
        (distance > part.thresholds[1]).float().mean(),
    ]
    np.testing.assert_allclose(inside, 0.15, atol=0.02)


def test_similarity_pulls_alike_and_pushes_apart():
    line = some_line()._replace(mask=torch.ones(6, 5).bool())
    part = Similarity(7 * 3 + 2, 3.0, True, 0.15)
    z = torch.randn(6, 4)
    part.thresholds.copy_(torch.tensor([0.0, 1e9]))
    assert part(z, line).item() == 0  # every pair lies between
    part.thresholds.copy_(torch.tensor([1e9, 2e9]))
    assert part(z * 0, line).item() < part(z, line).item()
    assert part(z[:1], line._replace(**{k: t[:1] for k, t in line._asdict().items()})).item() == 0


# ---------------------------------------------------------------- masked visits


def test_masked_visits_are_nowhere_in_the_input():
    """Neither at their place nor carried forward: change them and the input stays."""
    line = some_line()
    torch.manual_seed(3)
    shown, hidden = hide_visits(line, 0.5)
    assert hidden.any()
    assert not (hidden & ~line.mask).any()
    changed = torch.where(hidden[..., None], line.value + 9.0, line.value)
    seen = torch.where(hidden[..., None], ~line.observed, line.observed)
    torch.manual_seed(3)
    other, again = hide_visits(line._replace(value=changed, observed=seen), 0.5)
    assert torch.equal(hidden, again)
    for part, same in zip([*shown, *fill(shown)], [*other, *fill(other)], strict=True):
        torch.testing.assert_close(part, same)
    torch.testing.assert_close(shown.time, line.time)  # when they were is told


def test_about_a_share_is_masked():
    line = some_line()._replace(mask=torch.ones(6, 5).bool())
    torch.manual_seed(0)
    shares = [hide_visits(line, 0.3)[1].float().mean() for _ in range(300)]
    assert abs(np.mean(shares) - 0.3) < 0.02


# ---------------------------------------------------------------- reasonability


def marked_line(n=8, v=6):
    """Every visit carries the number of its row and its place."""
    torch.manual_seed(0)
    length = torch.randint(1, v + 1, (n,))
    mask = torch.arange(v) < length[:, None]
    place = torch.stack([torch.arange(n)[:, None].expand(n, v), torch.arange(v).expand(n, v)], -1)
    value = torch.where(mask[..., None], place.float(), -1.0)
    return Timeline(
        mask.float().cumsum(1), mask, value, mask[..., None].expand(n, v, 2).clone(), value
    )


def test_donors_are_real_visits_of_other_patients():
    line = marked_line()
    patient = torch.tensor([0, 0, 1, 1, 2, 3, 3, 4])
    met, shares = set(), []
    for seed in range(200):
        torch.manual_seed(seed)
        changed, swapped = swap_visits(line, patient)
        moved = (changed.value != line.value).any(-1)
        assert not (moved & ~line.mask).any()  # padding is left alone
        assert not moved[~swapped].any()
        for row, visit in moved.nonzero().tolist():
            donor, place = changed.value[row, visit].long().tolist()
            assert patient[donor] != patient[row]
            assert line.mask[donor, place]
            met.add((row, donor, place))
        n, length = moved[swapped].sum(1), line.mask[swapped].sum(1)
        assert (n >= (length + 1) // 2).all()
        shares.append(swapped.float().mean())
        torch.testing.assert_close(changed.time, line.time)
        torch.testing.assert_close(changed.words, changed.value)  # the whole visit moves
    assert abs(np.mean(shares) - 0.5) < 0.06
    real = int(line.mask.sum())
    others = [real - int(line.mask[patient == p].sum()) for p in patient]
    assert len(met) > 0.95 * sum(others)  # every donor is met


def test_one_patient_alone_has_no_donor():
    line = marked_line()
    changed, swapped = swap_visits(line, torch.zeros(8, dtype=torch.long))
    assert not swapped.any()
    torch.testing.assert_close(changed.value, line.value)


def test_rows_without_visits_take_no_part():
    line = some_line()
    for seed in range(20):
        torch.manual_seed(seed)
        assert not swap_visits(line, torch.arange(6))[1][3]


# ---------------------------------------------------------------- estimators


def test_each_task_can_be_left_out(women):
    weights = ["similarity_weight", "masked_weight", "reasonability_weight"]
    for name in weights:
        encoder = RAPTPretrainer(women.modalities, **PRETRAIN, random_state=0, **{name: 0.0})
        history = encoder.fit(women.X).history_
        assert f"train_{name.removesuffix('_weight')}" not in history[0]
        assert len([key for key in history[0] if key != "epoch"]) == 3
    with pytest.raises(ValueError, match="nothing to learn"):
        RAPTPretrainer(women.modalities, **dict.fromkeys(weights, 0.0)).fit(women.X)


def test_pretraining_learns(women):
    encoder = RAPTPretrainer(
        women.modalities, d_model=16, n_members=2, max_epochs=30, batch_size=16, random_state=0,
        weight_decay=0.0,
    ).fit(women.X)  # fmt: skip
    history = pd.DataFrame(encoder.history_)
    assert history["train_masked"].tail(5).mean() < 0.8 * history["train_masked"].iloc[0]
    low, high = encoder.similarity_thresholds_
    assert 0 < low < high < np.inf


def test_encoders_and_trunk_are_handed_over(women):
    encoder = RAPTPretrainer(**PRETRAIN)
    clf = RAPTClassifier(women.modalities, pretrained=encoder, freeze=("trunk",), **FAST)
    clf.fit(women.X, women.y)
    assert clf.transferred_ == ["encoders.static", "encoders.visits", "trunk"]
    for name, tensor in clf.pretrained_.module_.trunk.state_dict().items():
        assert torch.equal(clf.module_.trunk.state_dict()[name], tensor)  # frozen as it came
    other = clone(clf).set_params(static="drop", freeze=())
    assert other.fit(women.X, women.y).transferred_ == ["encoders.visits", "trunk"]
    narrow = clone(clf).set_params(n_heads=2, freeze=())
    assert "trunk" not in narrow.fit(women.X, women.y).transferred_


def test_a_frozen_pretrainer_of_more_patients(women):
    more = make_prenatal(150, random_state=1)[0]
    fitted = RAPTPretrainer(women.modalities, **PRETRAIN, random_state=0).fit(more)
    clf = RAPTClassifier(women.modalities, pretrained=FrozenEstimator(fitted), **FAST)
    clf.fit(women.X, women.y)
    assert clf.pretrained_.estimator is fitted
    assert clf.modalities_["visits"] is fitted.modalities_["visits"]  # its scales too


def test_stages(women):
    clf = RAPTClassifier(women.modalities, pretrained=RAPTPretrainer(**PRETRAIN), **FAST)
    stages = clf.fit(women.X, women.y).stages(women.X)
    assert list(stages) == ["random", "pretrained", "fine-tuned"]
    assert all(part.shape == (96, 8) for part in stages.values())
    np.testing.assert_array_equal(stages["fine-tuned"], clf.represent(women.X))
    assert not np.allclose(stages["random"], stages["pretrained"])
    assert list(clone(clf).set_params(pretrained=None).fit(women.X, women.y).stages(women.X)) == [
        "random",
        "fine-tuned",
    ]


def held_out_changed(X, test):
    """The test rows with other visits and other cells."""
    changed = X.copy()
    donors = np.roll(test, 1)
    for column in ("visits", "bmi", "age"):
        cells = changed[column].to_numpy(dtype=object, copy=True)
        cells[test] = cells[donors]
        changed[column] = pd.Series(cells, index=X.index).astype(X[column].dtype)
    return changed


def test_what_is_held_out_teaches_nothing(women):
    """Scales, thresholds, donors and pretraining come from the training rows alone."""
    X = women.X.assign(bmi=women.X["bmi"].astype(float))
    train, test = np.arange(72), np.arange(72, 96)
    clf = RAPTClassifier(women.modalities, pretrained=RAPTPretrainer(**PRETRAIN), **FAST)
    one = clone(clf).fit(X.iloc[train], women.y.iloc[train])
    two = clone(clf).fit(held_out_changed(X, test).iloc[train], women.y.iloc[train])
    np.testing.assert_array_equal(one.predict_proba(X), two.predict_proba(X))
    assert one.pretrained_.similarity_thresholds_ == two.pretrained_.similarity_thresholds_


def test_validation_rows_teach_nothing(women):
    """Rows set aside to choose the epoch move neither scales nor thresholds."""
    clf = RAPTPretrainer(women.modalities, **PRETRAIN, random_state=0, validation_fraction=0.25)
    one = clone(clf).fit(women.X)
    kept = one._set_aside(
        women.X, None, np.ones(96), int(np.random.RandomState(0).randint(2**31 - 1))
    )
    aside = kept[1]
    X = women.X.copy()
    X.loc[aside, "age"] = 20.0
    two = clone(clf).fit(X)
    assert one.similarity_thresholds_ == two.similarity_thresholds_
    np.testing.assert_array_equal(
        one.modalities_["static"].scale_.center, two.modalities_["static"].scale_.center
    )


def test_labels_do_not_reach_pretraining(women):
    clf = RAPTClassifier(women.modalities, pretrained=RAPTPretrainer(**PRETRAIN), **FAST)
    one = clone(clf).fit(women.X, women.y).pretrained_.transform(women.X)
    two = clone(clf).fit(women.X, 1 - women.y).pretrained_.transform(women.X)
    np.testing.assert_array_equal(one, two)


def test_events_and_visits_are_one_timeline(cohort):
    clf = RAPTClassifier(cohort.modalities, bin=6.0, max_visits=5, **FAST)
    clf.fit(cohort.X, cohort.y)
    course, history = clf.modalities_["course"], clf.modalities_["history"]
    assert (course.bin, course.max_visits) == (6.0, 5)
    assert isinstance(history, Visits)
    tracks = clf.module_.tracks
    assert [track.unit for track in tracks] == ["h", "h"]
    assert tracks[1].clock == pytest.approx(24 * history.time_scale_)  # days, in hours
    frame = clf.explain(cohort.X.head(6))
    assert (frame.groupby("row")["weight"].sum() <= 1 + 1e-9).all()
    times = frame[frame["row"] == 0]["time"].to_numpy()
    assert (np.diff(times) > 0).all()
    assert (times <= 0).all()


def test_shift_of_all_times(women):
    """Under "gap" nothing changes; under "position" it does."""
    for attention, moves in (("gap", False), ("position", True)):
        modalities = {"visits": women.modalities["visits"]}
        clf = RAPTClassifier(modalities, attention=attention, **FAST).fit(women.X, women.y)
        shifted = women.X.assign(visits=[
            None if v is None else [record | {"time": record["time"] - 4.0} for record in v]
            for v in women.X["visits"]
        ])  # fmt: skip
        same = np.allclose(clf.represent(shifted), clf.represent(women.X), atol=1e-4)
        assert same != moves


def test_order_of_records_does_not_matter(women):
    clf = RAPTClassifier(women.modalities, **FAST).fit(women.X, women.y)
    turned = women.X.assign(visits=[v[::-1] for v in women.X["visits"]])
    np.testing.assert_allclose(clf.predict_proba(turned), clf.predict_proba(women.X), atol=1e-9)


def test_the_paper_sizes_and_forms(women):
    for options in (
        {"head_width": 8, "n_heads": 3, "shared_token": True},
        {"attention": "release"},
        {"attention": "plain", "n_layers": 2},
    ):
        encoder = RAPTPretrainer(**PRETRAIN, **options)
        clf = RAPTClassifier(women.modalities, pretrained=encoder, **FAST, **options)
        assert "trunk" in clf.fit(women.X, women.y).transferred_


def test_summary_is_of_the_head_alone(cohort):
    """Pretraining never reads a summary, which would tell what is masked."""
    clf = RAPTClassifier(cohort.modalities, pretrained=RAPTPretrainer(**PRETRAIN), **FAST)
    clf.fit(cohort.X, cohort.y)
    assert list(clf.module_.heads["summary"]) == ["course"]
    assert not any("summary" in name for name in clf.pretrained_.module_.state_dict())
    bare = clone(clf).set_params(summary=False).fit(cohort.X, cohort.y)
    assert not len(bare.module_.heads["summary"])


def test_outcome_of_the_last_visit():
    women = make_prenatal(96, task="outcome", random_state=0, as_bunch=True)
    reg = RAPTRegressor(
        women.modalities, d_model=16, n_members=2, max_epochs=40, batch_size=16, random_state=0,
        weight_decay=0.0,
    )  # fmt: skip
    train, test = slice(0, 72), slice(72, None)
    reg.fit(women.X[train], women.y[train])
    found = reg.predict(women.X[test])
    assert found.shape == (len(women.X[test]), 4)
    error = ((found - women.y[test]) ** 2).mean() / women.y[test].var(ddof=0)
    assert error["weight"] < 0.6


def test_generated_patients(women):
    gan = VisitGAN("visits", max_epochs=2, width=8)
    encoder = RAPTPretrainer(
        women.modalities, **PRETRAIN, random_state=0, augment=gan, n_generated=40
    )
    encoder.fit(women.X)
    assert not hasattr(gan, "weights_")  # the caller's is left alone
    assert len(encoder.augment_.sample(3)) == 3
    plain = RAPTPretrainer(women.modalities, **PRETRAIN, random_state=0).fit(women.X)
    assert not np.allclose(plain.transform(women.X), encoder.transform(women.X))
    np.testing.assert_array_equal(  # scales are those of real patients
        plain.modalities_["visits"].scale_.center, encoder.modalities_["visits"].scale_.center
    )
    with pytest.raises(ValueError, match="no method sample"):
        RAPTPretrainer(women.modalities, augment=3).fit(women.X)


def test_any_object_with_sample_serves(women):
    class Twice:
        def sample(self, n):
            return women.X.drop(columns="subject_id").iloc[np.arange(n) % len(women.X)]

    encoder = RAPTPretrainer(women.modalities, **PRETRAIN, groups="subject_id", augment=Twice())
    encoder.fit(women.X)
    assert np.isfinite(encoder.transform(women.X)).all()


def test_gan_resembles_its_rows():
    X, _ = make_prenatal(300, random_state=0)
    gan = VisitGAN("visits", max_epochs=15, random_state=0).fit(X)
    made = gan.sample(200)
    pd.testing.assert_frame_equal(made, gan.sample(200))
    real, fake = (pd.DataFrame(part["visits"].explode().dropna().tolist()) for part in (X, made))
    assert set(fake) == set(real)
    assert fake["time"].between(-10, 30).mean() > 0.9
    for name in ("weight", "girth", "sbp"):
        assert abs(fake[name].mean() - real[name].mean()) < 1.5 * real[name].std()
    assert abs(fake["sbp"].notna().mean() - real["sbp"].notna().mean()) < 0.3
    lengths = [part["visits"].list.len().mean() for part in (X[X["visits"].list.len() > 0], made)]
    assert abs(lengths[0] - lengths[1]) < 0.7


def test_only_kinds_with_numbers_are_read():
    X, y = make_ehr(n_samples=48, random_state=0)
    with pytest.raises(ValueError, match="RAPTClassifier reads"):
        RAPTClassifier({"note": __import__("ehrfuse").Text("note")}).fit(X, y)
    clf = RAPTClassifier({"table": Tabular(["age", "heart_rate"])}, **FAST).fit(X, y)
    with pytest.raises(ValueError, match="No modality has visits"):
        clf.explain(X)
    with pytest.raises(ValueError, match="bin=-1"):
        RAPTClassifier({"course": Events("events")}, bin=-1).fit(X, y)
