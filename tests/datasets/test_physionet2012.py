"""Real intensive-care stays: what the loader gives agrees with the raw table, by hand."""

import http.server
import io
import os
import tarfile
import threading
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.compute as pc
import pytest

import ehrfuse.datasets.physionet2012 as source
from ehrfuse.datasets import fetch_physionet2012, load_physionet2012

FOLDER = Path(source.__file__).parent / "data"
STATIC_VARIABLES = ["Age", "Gender", "Height", "ICUType", "Weight"]
SERIES = """
ALP ALT AST Albumin BUN Bilirubin Cholesterol Creatinine DiasABP FiO2 GCS Glucose HCO3 HCT HR K
Lactate MAP MechVent Mg NIDiasABP NIMAP NISysABP Na PaCO2 PaO2 Platelets RespRate SaO2 SysABP Temp
TroponinI TroponinT Urine WBC pH
"""


@pytest.fixture(scope="module")
def sample():
    return load_physionet2012()


@pytest.fixture(scope="module")
def whole(shared_data):
    return fetch_physionet2012(shared_data)


@pytest.fixture(scope="module")
def raw(shared_data):
    return pd.read_parquet(shared_data / "physionet-2012" / "set-a.parquet")


@pytest.fixture(scope="module")
def events(whole):
    return {name: long_form(whole.X[name]) for name in source.PANELS}


def arrow(column):
    return column.array.__arrow_array__().combine_chunks()


def long_form(column):
    """The events of a column as a plain table: position of the row, time, code, value."""
    cells = arrow(column)
    lengths = pc.fill_null(pc.list_value_length(cells), 0).to_numpy()
    flat = cells.flatten()
    return pd.DataFrame(
        {
            "row": np.repeat(np.arange(len(column)), lengths),
            "time": flat.field("time").to_numpy(),
            "code": flat.field("code").to_pandas(),
            "value": flat.field("value").to_numpy(zero_copy_only=False),
        }
    )


def same(a, b):
    assert a.columns.equals(b.columns)
    assert a.index.equals(b.index)
    for column in a:
        if column in source.PANELS:
            assert arrow(a[column]).equals(arrow(b[column])), column
        else:
            pd.testing.assert_series_equal(a[column], b[column])


# ---------------------------------------------------------------- the bundled sample


def test_the_sample_is_what_the_documentation_says(sample):
    assert sample.X.shape == (2000, 17)
    assert sample.X.index.name == "RecordID"
    assert sample.X.index.is_unique
    assert sample.X.columns.tolist() == [*source.STATIC, *source.PANELS]
    assert sample.y.index.equals(sample.X.index)
    assert sample.y.dtype.kind == "i"
    assert sample.y.sum() == 283
    assert np.array_equal(sample.groups, sample.X.index)
    assert sample.reference.columns.tolist() == ["SAPS-I", "SOFA", "Length_of_stay", "Survival"]
    assert not set(sample.reference.columns) & set(sample.X.columns)
    assert (sample.reference.min() >= 0).all()
    X, y = load_physionet2012(return_X_y=True)
    same(X, sample.X)
    pd.testing.assert_series_equal(y, sample.y)


def test_the_sample_is_small_and_carries_its_notice():
    size = sum(path.stat().st_size for path in FOLDER.iterdir())
    assert size <= 2.5e6
    notice = (FOLDER / "NOTICE.txt").read_text()
    for part in ("Attribution License", "challenge-2012/1.0.0", "Silva I", "Goldberger AL"):
        assert part in notice


def test_the_sample_is_bit_equal_to_its_rows_of_the_whole_set(sample, whole):
    same(sample.X, whole.X.loc[sample.X.index])
    pd.testing.assert_series_equal(sample.y, whole.y.loc[sample.y.index])
    pd.testing.assert_frame_equal(sample.reference, whole.reference.loc[sample.y.index])


def test_the_sample_was_chosen_by_a_hash(sample, whole):
    assert source._sample_records(whole.X.index) == sample.X.index.tolist()
    assert source._sample_records(whole.X.index[::-1]) == sample.X.index.tolist()


# ---------------------------------------------------------------- the contract


def test_no_variable_stands_in_two_modalities_and_none_is_lost():
    taken = [variable for panel in source.PANELS.values() for variable in panel]
    assert sorted(taken) == sorted(SERIES.split())  # the descriptors and weight are static
    assert len(taken) + len(STATIC_VARIABLES) == 41


def test_codes_of_a_column_are_those_of_its_panel(events):
    for name, variables in source.PANELS.items():
        assert set(events[name]["code"].unique()) == set(variables)


def test_default_modalities_fit_the_frame(sample):
    assert list(sample.modalities) == ["static", *source.PANELS]
    columns = []
    for modality in sample.modalities.values():
        own = modality.columns
        columns += [own] if isinstance(own, str) else list(own)
    assert columns == sample.X.columns.tolist()
    assert {m.time_unit for n, m in sample.modalities.items() if n != "static"} == {"h"}


def test_times_lie_in_the_48_hours_before_the_prediction_and_ascend(events):
    for stream in events.values():
        assert stream["time"].between(-48, 0).all()
        step = stream["time"].diff()[stream["row"].diff() == 0]
        assert (step >= 0).all()


def test_a_panel_is_null_when_nothing_of_it_was_measured_and_never_empty(whole):
    for name in source.PANELS:
        lengths = pc.list_value_length(arrow(whole.X[name])).to_pandas()
        assert lengths.dropna().min() >= 1
        assert lengths.isna().to_numpy().tolist() == whole.X[name].isna().tolist()


def test_stays_without_series_stay_with_null_panels(whole):
    rows = whole.X.loc[[140501, 140936, 141264]]
    assert rows[list(source.PANELS)].isna().all(axis=None)
    assert rows[["age", "icu_type"]].notna().all(axis=None)


# ---------------------------------------------------------------- facts about set A


def test_counts_agree_with_the_description_of_the_set(whole, raw, events):
    assert whole.X.shape == (4000, 17)
    assert whole.y.sum() == 554
    assert whole.y.mean() == pytest.approx(0.1385)
    assert whole.reference.isna().sum().tolist() == [190, 144, 60, 2526]
    assert whole.X["gender"].value_counts().to_dict() == {"male": 2246, "female": 1751}
    assert whole.X["icu_type"].value_counts().to_dict() == (
        raw[raw["variable"] == "ICUType"]["value"]
        .map({1: "coronary", 2: "cardiac surgery", 3: "medical", 4: "surgical"})
        .value_counts()
        .to_dict()
    )
    assert whole.X["height"].isna().sum() == 1894
    # 1,753,980 values: less four descriptors a stay, all weights, and 24 negative temperatures
    n_events = sum(map(len, events.values()))
    assert n_events == 1_753_980 - 4 * 4000 - 129_165 - 24
    assert n_events == ((raw["value"] >= 0) & ~raw["variable"].isin(STATIC_VARIABLES)).sum()


def test_values_of_random_records_agree_with_the_raw_table(whole, raw):
    rng = np.random.default_rng(0)
    for record in rng.choice(whole.X.index, 60, replace=False):
        stay = raw[raw["RecordID"] == record]
        for name, variables in source.PANELS.items():
            kept = stay[stay["variable"].isin(variables) & (stay["value"] >= 0)]
            cell = whole.X.at[record, name]
            if kept.empty:
                assert cell is pd.NA
                continue
            got = sorted((e["time"], e["code"], e["value"]) for e in cell)
            expected = sorted(
                (float(np.float32(m / 60 - 48)), v, float(np.float32(x)))
                for m, v, x in zip(kept["minutes"], kept["variable"], kept["value"], strict=True)
            )
            assert got == expected


def test_descriptors_of_random_records_agree_with_the_raw_table(whole, raw):
    rng = np.random.default_rng(1)
    for record in rng.choice(whole.X.index, 200, replace=False):
        stay = raw[raw["RecordID"] == record]
        row = whole.X.loc[record]

        def known(name, stay=stay):
            values = stay[(stay["variable"] == name) & (stay["value"] >= 0)]["value"].tolist()
            return [v for v in values if v > 0] if name == "Weight" else values

        assert [row["age"]] == known("Age")
        height, weights = known("Height"), known("Weight")
        assert [row["height"]] == height if height else np.isnan(row["height"])
        assert row["weight"] == weights[0] if weights else np.isnan(row["weight"])
        if len(weights) > 1:
            assert row["weight_change"] == weights[-1] - weights[0]
        else:
            assert np.isnan(row["weight_change"])
        assert [row["gender"]] == [("female", "male")[int(v)] for v in known("Gender")]


def test_repeated_entries_of_one_minute_keep_their_order(whole, raw):
    urine = raw[(raw["variable"] == "Urine") & (raw["value"] >= 0)]
    twice = urine[urine.duplicated(["RecordID", "minutes"], keep=False)]
    assert len(twice) > 1000
    for record in twice["RecordID"].unique()[:30]:
        got = [event["value"] for event in whole.X.at[record, "urine"]]
        assert got == urine[urine["RecordID"] == record]["value"].astype("float32").tolist()


def test_the_same_codes_in_the_same_dictionary_everywhere(sample, whole):
    for name, variables in source.PANELS.items():
        for X in (sample.X, whole.X):
            assert arrow(X[name]).flatten().field("code").dictionary.to_pylist() == list(variables)


# ---------------------------------------------------------------- official files, made up here

RECORDS = {
    132539: "00:00,RecordID,132539\n00:00,Age,54\n00:00,Gender,0\n00:00,Height,-1\n"
    "00:00,ICUType,4\n00:00,Weight,-1\n00:07,HR,73\n00:07,NIMAP,92.33\n47:37,HR,86\n48:00,Urine,0\n10:05,Weight,0\n",
    132540: "00:00,RecordID,132540\n00:00,Age,76\n00:00,Gender,1\n00:00,Height,175.3\n"
    "00:00,ICUType,2\n00:00,Weight,76\n01:11,Temp,-17.8\n02:30,pH,7.45\n02:30,PaO2,445\n"
    "03:10,,-1\n19:11,Weight,80.6\n20:11,Weight,81.6\n",
    142673: "00:00,RecordID,142673\n00:00,Age,78\n00:00,Gender,-1\n00:00,Height,157.5\n"
    "00:00,ICUType,3\n00:00,Weight,70.5\n",
}
OUTCOMES = (
    "RecordID,SAPS-I,SOFA,Length_of_stay,Survival,In-hospital_death\n"
    "132539,6,1,5,-1,0\n132540,-1,8,8,-1,1\n142673,12,-1,9,91,0\n"
)


def members(newline="\n"):
    texts = {f"set-b/{n}.txt": "Time,Parameter,Value\n" + text for n, text in RECORDS.items()}
    return {name: text.replace("\n", newline).encode() for name, text in texts.items()}


def make_folder(home, newline="\n"):
    for name, text in members(newline).items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_bytes(text)
    (home / "set-b" / "index.html").write_text("not a record")


def make_tar(home):
    with tarfile.open(home / "set-b.tar.gz", "w:gz") as packed:
        for name, text in members().items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(text)
            packed.addfile(member, io.BytesIO(text))


def make_zip(home):
    with zipfile.ZipFile(home / "set-b.zip", "w") as packed:
        for name, text in members().items():
            packed.writestr(name, text)


def make_long(home):
    parts = [line.split(",") for text in RECORDS.values() for line in text.splitlines()]
    record, rows = None, []
    for time, variable, value in parts:
        if variable == "RecordID":
            record = int(value)
            continue
        hours, minutes = map(int, time.split(":"))
        rows.append((record, 60 * hours + minutes, variable, float(value)))
    long = pd.DataFrame(rows, columns=["RecordID", "minutes", "variable", "value"])
    long.astype({"variable": "category"}).to_parquet(home / "set-b.parquet")


@pytest.mark.parametrize("make", [make_folder, make_tar, make_zip, make_long])
@pytest.mark.parametrize("deep", [False, True])
def test_every_layout_reads_the_same(make, deep, tmp_path):
    home = tmp_path / "physionet-2012" if deep else tmp_path
    home.mkdir(exist_ok=True)
    make(home)
    (home / "Outcomes-b.txt").write_text(OUTCOMES)
    data = fetch_physionet2012(tmp_path, "b")
    X = data.X
    assert X.index.tolist() == [132539, 132540, 142673]
    assert data.y.tolist() == [0, 1, 0]
    assert X["gender"].astype(object).where(X["gender"].notna(), None).tolist() == [
        "female",
        "male",
        None,
    ]
    assert X["icu_type"].tolist() == ["surgical", "cardiac surgery", "medical"]
    np.testing.assert_array_equal(X["height"], [np.nan, 175.3, 157.5])
    np.testing.assert_array_equal(X["weight"], [np.nan, 76, 70.5])
    np.testing.assert_array_equal(X["weight_change"], [np.nan, 81.6 - 76, np.nan])
    assert [event["code"] for event in X["vitals"].iloc[0]] == ["HR", "NIMAP", "HR"]
    assert X["vitals"].iloc[0][-1]["time"] == pytest.approx(47 + 37 / 60 - 48, abs=1e-6)
    assert X["urine"].iloc[0] == [{"time": 0.0, "code": "Urine", "value": 0.0}]
    assert [event["code"] for event in X["blood_gas"].iloc[1]] == ["pH", "PaO2"]
    assert X["vitals"].isna().tolist() == [False, True, True]  # -17.8 stands for nothing
    assert X.iloc[2][list(source.PANELS)].isna().all()
    np.testing.assert_array_equal(data.reference["SAPS-I"], [6, np.nan, 12])


def test_windows_line_ends(tmp_path):
    make_folder(tmp_path / "crlf", "\r\n")
    make_folder(tmp_path / "lf")
    for kind in ("crlf", "lf"):
        (tmp_path / kind / "Outcomes-b.txt").write_text(OUTCOMES)
    crlf, lf = (fetch_physionet2012(tmp_path / kind, "b").X for kind in ("crlf", "lf"))
    same(crlf, lf)


def test_the_real_set_reads_the_same_from_official_text(whole, raw, tmp_path):
    folder = tmp_path / "set-a"
    folder.mkdir()
    records = whole.X.index[:300]
    for record, stay in raw[raw["RecordID"].isin(records)].groupby("RecordID"):
        hours, minutes = stay["minutes"] // 60, stay["minutes"] % 60
        lines = [
            f"{h:02d}:{m:02d},{variable},{value!r}"
            for h, m, variable, value in zip(
                hours, minutes, stay["variable"], stay["value"], strict=True
            )
        ]
        head = ["Time,Parameter,Value", f"00:00,RecordID,{record}"]
        (folder / f"{record}.txt").write_text("\n".join(head + lines) + "\n")
    reference = whole.reference.loc[records].fillna(-1).astype(int).assign(y=whole.y)
    text = reference.rename(columns={"y": "In-hospital_death"}).to_csv()
    (tmp_path / "Outcomes-a.txt").write_text(text)
    same(fetch_physionet2012(tmp_path).X, whole.X.loc[records])


def test_environment_variable_names_the_folder(tmp_path, monkeypatch):
    make_folder(tmp_path)
    (tmp_path / "Outcomes-b.txt").write_text(OUTCOMES)
    monkeypatch.setenv("EHRFUSE_DATA", str(tmp_path))
    X, y = fetch_physionet2012(subset="b", return_X_y=True)
    assert len(X) == len(y) == 3


# ---------------------------------------------------------------- bad input


def test_unknown_subset():
    with pytest.raises(ValueError, match="subset='d' is not known; choose one of 'a', 'b', 'c'"):
        fetch_physionet2012(subset="d")


def test_broken_files(tmp_path):
    (tmp_path / "Outcomes-b.txt").write_text("RecordID,death\n1,0\n")
    (tmp_path / "set-b").mkdir()
    with pytest.raises(ValueError, match="holds no record files"):
        fetch_physionet2012(tmp_path, "b")
    (tmp_path / "set-b" / "1.txt").write_text("Zeit,Parameter,Wert\n")
    with pytest.raises(ValueError, match=r"Record 1 in .* does not start with"):
        fetch_physionet2012(tmp_path, "b")
    (tmp_path / "set-b" / "1.txt").write_text("Time,Parameter,Value\n00:00,HR,fast\n")
    with pytest.raises(ValueError, match="cannot be read"):
        fetch_physionet2012(tmp_path, "b")
    (tmp_path / "set-b" / "1.txt").write_text("Time,Parameter,Value\n00:00,HR,80\n")
    with pytest.raises(ValueError, match=r"has no columns .*In-hospital_death"):
        fetch_physionet2012(tmp_path, "b")
    (tmp_path / "set-c.tar.gz").write_bytes(b"broken")
    (tmp_path / "Outcomes-c.txt").write_text(OUTCOMES)
    with pytest.raises(ValueError, match="cannot be unpacked"):
        fetch_physionet2012(tmp_path, "c")
    pd.DataFrame({"RecordID": [1]}).to_parquet(tmp_path / "set-a.parquet")
    (tmp_path / "Outcomes-a.txt").write_text(OUTCOMES)
    with pytest.raises(ValueError, match=r"has no columns .*'minutes', 'value', 'variable'"):
        fetch_physionet2012(tmp_path)


# ---------------------------------------------------------------- download, from this machine


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def page(tmp_path, monkeypatch):
    """A stand-in for the official page on the loopback interface."""
    pooch = pytest.importorskip("pooch")
    folder = tmp_path / "page"
    folder.mkdir()
    make_tar(folder)
    (folder / "Outcomes-b.txt").write_text(OUTCOMES)

    class Handler(Quiet):
        def __init__(self, *args):
            super().__init__(*args, directory=str(folder))

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(source, "_FILES_URL", f"http://127.0.0.1:{server.server_port}/")
    hashes = {name: pooch.file_hash(folder / name) for name in os.listdir(folder)}
    monkeypatch.setattr(source, "_SHA256", hashes)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield folder
    server.shutdown()
    thread.join()
    server.server_close()


def test_absent_files_are_downloaded_once(page, tmp_path, monkeypatch):
    home = tmp_path / "home"
    first = fetch_physionet2012(home, "b")
    assert sorted(os.listdir(home / "physionet-2012")) == ["Outcomes-b.txt", "set-b.tar.gz"]
    monkeypatch.setattr(source, "_FILES_URL", "http://127.0.0.1:9/")  # nobody listens there
    same(fetch_physionet2012(home, "b").X, first.X)


def test_a_wrong_checksum_is_refused_and_nothing_is_kept(page, tmp_path, monkeypatch):
    monkeypatch.setitem(source._SHA256, "set-b.tar.gz", "0" * 64)
    with pytest.raises(ValueError, match=r"set-b\.tar\.gz does not have the expected SHA-256"):
        fetch_physionet2012(tmp_path / "home", "b")
    assert os.listdir(tmp_path / "home" / "physionet-2012") == []


def test_no_network_gives_one_sentence(page, tmp_path, monkeypatch):
    monkeypatch.setattr(source, "_FILES_URL", "http://127.0.0.1:9/")
    with pytest.raises(OSError, match=r"could not be downloaded \(.*\); put the file from https"):
        fetch_physionet2012(tmp_path / "home", "b")


def test_an_absent_page_gives_one_sentence(page, tmp_path):
    (page / "Outcomes-b.txt").unlink()
    with pytest.raises(OSError, match=r"Outcomes-b\.txt is not in .* could not be downloaded"):
        fetch_physionet2012(tmp_path / "home", "b")


def test_without_pooch_the_pip_line_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pooch", None)
    with pytest.raises(ImportError, match=r"pip install 'ehrfuse\[fetch\]'"):
        fetch_physionet2012(tmp_path, "b")


def test_published_checksums(shared_data):
    import hashlib

    text = (shared_data / "physionet-2012" / "Outcomes-a.txt").read_bytes()
    assert hashlib.sha256(text).hexdigest() == source._SHA256["Outcomes-a.txt"]
    assert len(set(source._SHA256.values())) == 6


def test_the_global_generator_is_untouched():
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    load_physionet2012()
    assert np.array_equal(np.random.get_state()[1], before)  # noqa: NPY002
