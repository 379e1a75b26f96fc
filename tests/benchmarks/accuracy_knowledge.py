"""What retrieved knowledge adds: real stays, codes of a claims-like record, and a planted fact.

Run ``python tests/benchmarks/accuracy_knowledge.py --help`` for the options; README.md says what
every section shows.
"""

# First of all: it sets the number of threads.
# ruff: isort: off
from _common import (
    Cohort, PerTask, Store, Take, finish, one_split, parse, parser, positive, row, two_folders,
)  # fmt: skip
import _eicu
# ruff: isort: on

import numpy as np
import pandas as pd
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.utils import Bunch

from ehrfuse import (
    ClinicalScoreClassifier,
    EventSummary,
    KnowledgeAugmentedRiskModel,
    KnowledgeGraph,
    KnowledgeRetriever,
    Tabular,
    Text,
)
from ehrfuse.methods.clinical_scores import charlson_points

SECTIONS = ("planted", "eicu", "mimic")
MODEL = "KnowledgeAugmentedRiskModel"
CONTROLS = ("random knowledge", "shuffled links", "without knowledge")
SENSITIVITY = ("sensitivity", 0.8)  # what the threshold is set for, on training rows


def main():
    """Run the sections asked for and print one table."""
    options = parser(__doc__.splitlines()[0], SECTIONS)
    options.add_argument("--text-model", help="eicu: a Hugging Face text encoder for stage 1, too")
    args = parse(options)
    run = {"planted": planted, "eicu": eicu, "mimic": mimic}
    finish(args, [r for section in args.only for r in run[section](args)])


def shared_graph(data):
    """The triples and names of the knowledge folder; None where it is not there."""
    folder = data / "knowledge"
    if not (folder / "triples.parquet").exists():
        return None
    graph = KnowledgeGraph.from_triples(
        folder / "triples.parquet", head_name="head_name", tail_name="tail_name"
    )
    return graph.with_nodes(folder / "disease_ontology_terms.csv.gz", id="doid")


def corpus_graph(data, graph):
    """What stands together in sentences of the folder's abstracts and answers."""
    folder, parts = data / "knowledge" / "corpus", []
    for name, text, id, date in (
        ("pubmedqa_labeled.jsonl.gz", ["question", "contexts", "long_answer"], "pmid", "year"),
        ("medical_abstracts.csv.gz", "medical_abstract", None, None),
        ("medquad.parquet", "answer", None, None),
    ):
        if not (folder / name).exists():
            continue
        table = _read(folder / name)
        table = table.assign(row=[f"{name.split('.')[0]}:{i}" for i in range(len(table))])
        parts.append(KnowledgeGraph.from_corpus(
            table, graph, text=text, id=id or "row", date=date, source=name.split(".")[0]
        ))  # fmt: skip
    return KnowledgeGraph.merge(graph, *parts) if parts else graph


def _read(path):
    if path.suffix == ".parquet":
        return pd.read_parquet(path)
    return pd.read_json(path, lines=True) if "jsonl" in path.name else pd.read_csv(path)


# ---------------------------------------------------------------- thresholds on held-out rows


class Decided(Store):
    """A store of predictions whose second half of columns are decisions; it keeps them apart."""

    def __init__(self, folder):
        super().__init__(folder)
        self.decisions = {}

    def get(self, name, stamp, compute):
        """Probabilities from the file or computed; decisions are remembered by name."""
        both, seconds = super().get(name, ("with decisions", stamp), compute)
        half = both.shape[1] // 2
        self.decisions[name] = both[:, half:]
        return both[:, :half], seconds


class DecidedCohort(Cohort):
    """A cohort that scores the decisions at each model's own threshold as well."""

    def _fit_predict(self, model, train, test):
        model.fit(self.X.iloc[train], self.y.iloc[train])
        p = positive(model.predict_proba(self.X.iloc[test]), len(self.names))
        decided = np.full_like(p, np.nan)
        if isinstance(model, KnowledgeAugmentedRiskModel):
            decided = np.asarray(model.predict(self.X.iloc[test]), dtype=float).reshape(p.shape)
        return np.hstack([p, decided])

    def sensitivity_rows(self):
        """Sensitivity, specificity and precision at thresholds found on training rows."""
        rows = []
        for name in self.proba:
            found = [self._rates(name, seed, fold, test) for seed in self.seeds
                     for fold, (_, test) in enumerate(self.splits(seed))]  # fmt: skip
            if any(f is None for f in found):
                continue
            for task, label in enumerate(self.names):
                for j, metric in enumerate(("sensitivity", "specificity", "precision")):
                    values = np.array([f[task][j] for f in found])
                    rows.append(
                        row(
                            self.dataset,
                            label,
                            name,
                            metric,
                            np.nanmean(values),
                            np.nanstd(values),
                            len(self.scored),
                            seeds=self.seeds,
                        )
                    )
        return rows  # fmt: skip

    def _rates(self, name, seed, fold, test):
        key = f"{self.dataset}/{name}/seed{seed}-fold{fold}"
        decided = self.store.decisions.get(key)
        if decided is None or np.isnan(decided).all():
            return None
        labels = self._labels().reshape(len(self.X), -1)[test]
        found = []
        for y, d in zip(labels.T, decided.T, strict=True):
            y, d = y[~np.isnan(y)], d[~np.isnan(y)]
            with np.errstate(invalid="ignore", divide="ignore"):
                found.append((d[y == 1].mean(), 1 - d[y == 0].mean(), y[d == 1].mean()))
        return found


def cohort_of(args, name, task, X, y, splits, groups):
    """A cohort whose finished folds are kept."""
    store = Decided(args.results / "accuracy_knowledge")
    return DecidedCohort(name, task, X, y, groups, splits, store)


# ---------------------------------------------------------------- a planted fact


def planted(args):
    """Risk depends on whether the graph joins two findings of the note; alone, none tells."""
    graph = shared_graph(args.data)
    if graph is None:
        return []
    sizes = (600, 1000) if args.quick else (1500, 3000)
    kinds, rows = {"note": Text("note"), "table": Tabular(["age"])}, []
    for seed in args.seeds:
        X, y = planted_cohort(graph, sum(sizes), seed)
        cohort = cohort_of(args, f"planted/{seed}", "joined in the graph", X, y,
                           one_split(*sizes), None)  # fmt: skip
        for name, knowledge in variants(graph).items():
            cohort.run(name, lambda s, k=knowledge: two_stages(kinds, k, s, stage2="lr"), [seed])
        pairs = [(f"{MODEL}(with knowledge)", f"{MODEL}({c})") for c in CONTROLS]
        rows += cohort.score_rows() + cohort.pair_rows(pairs)
    return rows


def planted_cohort(graph, n, seed, risk=(0.15, 0.6)):
    """Notes of two diseases, half of them known to occur together; the others in other company."""
    rng = np.random.default_rng(seed)
    facts = graph.facts
    facts = facts[graph.relations[facts["relation"]] == "cooccurs_with"]
    names = graph.node_names
    linked = {frozenset(pair) for pair in zip(facts["head"], facts["tail"], strict=True)}
    pick = facts.iloc[rng.integers(len(facts), size=n)]
    head, tail = pick["head"].to_numpy(), pick["tail"].to_numpy().copy()
    apart = np.flatnonzero(rng.random(n) < 0.5)
    tail[apart] = tail[rng.permutation(apart)]
    joined = np.array([frozenset(pair) in linked for pair in zip(head, tail, strict=True)])
    says = np.array(["Known {}. Now seen for {}.", "{}; past history of {}.", "Has {} and {}."])
    says = says[rng.integers(len(says), size=n)]
    notes = [s.format(names[a], names[b]) for s, a, b in zip(says, head, tail, strict=True)]
    y = pd.Series((rng.random(n) < np.where(joined, risk[1], risk[0])).astype(int))
    return pd.DataFrame({"note": notes, "age": rng.normal(65, 10, n)}), y  # no two rows alike


def variants(graph, **options):
    """Knowledge and its controls by name."""
    return {
        f"{MODEL}(with knowledge)": KnowledgeRetriever(graph, **options),
        f"{MODEL}(random knowledge)": KnowledgeRetriever(graph, control="random", **options),
        f"{MODEL}(shuffled links)": KnowledgeRetriever(graph, control="shuffled", **options),
        f"{MODEL}(without knowledge)": None,
    }


def two_stages(modalities, knowledge, seed, **options):
    """The model with a threshold for a sensitivity of 0.8 on held-out training rows."""
    return KnowledgeAugmentedRiskModel(
        modalities, knowledge=knowledge, threshold=SENSITIVITY, random_state=seed, **options
    )


# ---------------------------------------------------------------- eICU demo


def eicu(args):
    """Death in hospital and a later unit stay from the first 24 hours, patients on one side."""
    graph, folder = shared_graph(args.data), _eicu.find(args.data)
    if graph is None or folder is None:
        return []
    graph = corpus_graph(args.data, graph)
    here = _eicu.load(folder)
    if args.test_data is None:
        keep = slice(None, None, 3) if args.quick else slice(None)
        X, y, groups = here.X.iloc[keep], here.y.iloc[keep], here.groups[keep]
        folds = 2 if args.quick else 5

        def splits(seed):
            return list(GroupKFold(folds, shuffle=True, random_state=seed).split(X, y, groups))

        name = "eicu-crd-demo" + (", every 3rd stay, 2 folds" if args.quick else "")
    else:
        there = _eicu.find(args.test_data)
        if there is None:
            return []
        there = _eicu.load(there)
        X, y, splits = two_folders(here, there)
        groups, name = np.concatenate([here.groups, there.groups]), "eicu-crd-demo to test"
    cohort = cohort_of(args, name, "two tasks", X, y, splits, groups)
    return _eicu_models(args, cohort, here.modalities, graph)


def _eicu_models(args, cohort, modalities, graph):
    structured = {**modalities, "note": "drop"}
    text, patients = {"note": modalities["note"]}, {"groups": "uniquepid"}
    columns = [c for m in list(modalities.values())[:-1] for c in np.atleast_1d(m.columns)]
    trees, words = "HistGradientBoosting(structured)", "TF-IDF + logistic regression"
    late = "late fusion of trees and TF-IDF"
    rivals = {trees: lambda seed: PerTask(make_pipeline(Take(columns), _trees(seed))),
              words: lambda seed: PerTask(_words())}  # fmt: skip
    ours = {
        f"{MODEL}(structured only)": (structured, None, {}),
        f"{MODEL}(text only)": (text, None, {"stage2": "lr"}),
        f"{MODEL}(text and knowledge)": (text, KnowledgeRetriever(graph), {"stage2": "lr"}),
    }
    ours |= {name: (modalities, k, {}) for name, k in variants(graph).items()}
    if args.text_model:
        options = {"stage1": "hf-encoder", "model": args.text_model}
        for name, k in (("encoder", None), ("encoder, with knowledge", KnowledgeRetriever(graph))):
            ours[f"{MODEL}({name})"] = (modalities, k, options)
    if args.quick:
        ours.pop(f"{MODEL}(text and knowledge)")
    for name, make in rivals.items():
        cohort.run(name, make, args.seeds)
    for name, (kinds, knowledge, options) in ours.items():
        cohort.run(name, lambda seed, a=kinds, b=knowledge, c=options: two_stages(
            a, b, seed, **patients, **c), args.seeds)  # fmt: skip
    cohort.average(late, trees, words)
    full = f"{MODEL}(with knowledge)"
    pairs = [(full, f"{MODEL}({c})") for c in (*CONTROLS, "structured only", "text only")]
    pairs += [(f"{MODEL}(without knowledge)", f"{MODEL}(structured only)"), (full, late),
              (f"{MODEL}(without knowledge)", late)]  # fmt: skip
    pairs += [(f"{MODEL}(text and knowledge)", f"{MODEL}(text only)")]
    return cohort.score_rows() + cohort.sensitivity_rows() + cohort.pair_rows(pairs)


def _trees(seed):
    return make_pipeline(
        EventSummary(),
        HistGradientBoostingClassifier(
            learning_rate=0.03, max_iter=300, max_leaf_nodes=15, min_samples_leaf=30,
            l2_regularization=1.0, max_features=0.3, random_state=seed,
        ),
    )  # fmt: skip


def _words():
    return make_pipeline(
        Take("note"),
        TfidfVectorizer(min_df=3, ngram_range=(1, 2), sublinear_tf=True),
        LogisticRegression(C=3.0, max_iter=2000),
    )


# ---------------------------------------------------------------- MIMIC-IV demo


MIMIC = "mimic-iv-demo-2.2"
SCORES = ["length_of_stay", "acute", "charlson", "emergency_visits", "hemoglobin", "oncology",
          "sodium", "procedure", "admissions"]  # fmt: skip


def mimic(args):
    """Another admission within 30 days, from codes, at discharge; 100 patients, no claim."""
    graph = shared_graph(args.data)
    if graph is None or not (args.data / MIMIC / "hosp").is_dir():
        return []
    here = mimic_cohort(args.data / MIMIC)
    if args.test_data is None:
        X, y, groups, name = here.X, here.y, here.groups, MIMIC

        def splits(seed):
            return list(GroupKFold(5, shuffle=True, random_state=seed).split(X, y, groups))
    else:
        if not (args.test_data / MIMIC / "hosp").is_dir():
            return []
        there = mimic_cohort(args.test_data / MIMIC)
        X, y, splits = two_folders(here, there)
        groups, name = np.concatenate([here.groups, there.groups]), f"{MIMIC} to test"
    cohort = cohort_of(args, name, "readmission in 30 days", X, y, splits, groups)
    gem = args.data / "knowledge" / "codes" / "gem_icd9cm_to_icd10cm.csv.gz"
    table = {"table": Tabular(["age", *SCORES])}
    for score in ("lace", "hospital"):
        cohort.run(f"ClinicalScoreClassifier({score})",
                   lambda seed, s=score: ClinicalScoreClassifier(s), args.seeds)  # fmt: skip
    found = variants(graph, text=None, codes={"codes": None}, equivalence=gem)
    for model, knowledge in found.items():
        cohort.run(model, lambda seed, k=knowledge: two_stages(
            table, k, seed, groups="subject_id", stage2="lr"), args.seeds)  # fmt: skip
    pairs = [(f"{MODEL}(with knowledge)", f"{MODEL}({c})") for c in CONTROLS]
    return cohort.score_rows() + cohort.sensitivity_rows() + cohort.pair_rows(pairs)


def mimic_cohort(folder):
    """Admissions that ended alive, as they were at discharge; a null label where none can be known.

    Codes of an admission are known at its discharge. Readmission is any later admission within 30
    days; the demo does not say which were planned, and death after discharge is not a label here.
    """
    read = {
        name: pd.read_csv(folder / "hosp" / f"{name}.csv.gz", low_memory=False)
        for name in (
            "admissions",
            "patients",
            "diagnoses_icd",
            "procedures_icd",
            "labevents",
            "services",
        )
    }
    stays = read["admissions"].sort_values(["subject_id", "admittime"]).reset_index(drop=True)
    for column in ("admittime", "dischtime"):
        stays[column] = pd.to_datetime(stays[column])
    following = stays.groupby("subject_id")["admittime"].shift(-1)
    gap = (following - stays["dischtime"]).dt.total_seconds() / 86400
    stays["readmitted"] = (gap <= 30).astype(float)
    stays = stays.join(_history(stays))
    codes = read["diagnoses_icd"]
    words = "ICD" + codes["icd_version"].astype(str) + "CM:" + codes["icd_code"].str.strip()
    codes = words.groupby(codes["hadm_id"]).agg(list)
    alive = stays[stays["hospital_expire_flag"] == 0].reset_index(drop=True)
    X = pd.DataFrame({
        "subject_id": alive["subject_id"],
        "age": alive["subject_id"].map(read["patients"].set_index("subject_id")["anchor_age"]),
        "length_of_stay": (alive["dischtime"] - alive["admittime"]).dt.total_seconds() / 86400,
        "acute": (~alive["admission_type"].str.contains("ELECTIVE|SURGICAL SAME DAY")).astype(int),
        "emergency_visits": alive["emergency_visits"], "admissions": alive["admissions"],
        "hemoglobin": _last_lab(read["labevents"], alive, 51222),
        "sodium": _last_lab(read["labevents"], alive, 50983),
        "oncology": _in(alive, read["services"].query("curr_service == 'OMED'")),
        "procedure": _in(alive, read["procedures_icd"]),
        "codes": alive["hadm_id"].map(codes),
    })  # fmt: skip
    X["charlson"] = [_charlson(cell) for cell in X["codes"]]
    return Bunch(X=X, y=alive["readmitted"].rename("readmission in 30 days"),
                 groups=X["subject_id"].to_numpy())  # fmt: skip


def _history(stays):
    """Emergency visits of the six months, and admissions of the year, before every admission."""
    found = []
    for _, own in stays.groupby("subject_id", sort=False):
        start, emergency = own["admittime"].to_numpy(), own["edregtime"].notna().to_numpy()
        before = (start[:, None] - start[None, :]) / np.timedelta64(1, "D")
        visits = ((before > 0) & (before <= 183) & emergency[None, :]).sum(1)
        earlier = ((before > 0) & (before <= 365)).sum(1)
        found.append(pd.DataFrame(
            {"emergency_visits": visits, "admissions": earlier}, index=own.index
        ))  # fmt: skip
    return pd.concat(found)


def _last_lab(labs, stays, item):
    rows = labs[(labs["itemid"] == item) & labs["valuenum"].notna()].copy()
    # What was not stored by discharge was not known then.
    rows["known"] = pd.to_datetime(rows["storetime"].fillna(rows["charttime"]))
    rows = rows.merge(stays[["hadm_id", "dischtime"]], on="hadm_id")
    rows = rows[rows["known"] <= rows["dischtime"]].sort_values("known", kind="stable")
    return stays["hadm_id"].map(rows.groupby("hadm_id")["valuenum"].last())


def _in(stays, table):
    return stays["hadm_id"].isin(table["hadm_id"]).astype(int)


def _charlson(codes):
    codes = codes if isinstance(codes, list) else []
    nine = [c.partition(":")[2] for c in codes if c.startswith("ICD9CM")]
    return charlson_points(nine, [c.partition(":")[2] for c in codes if c.startswith("ICD10CM")])


if __name__ == "__main__":
    main()
