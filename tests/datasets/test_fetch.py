"""The fetchers, on a page of our own: checksums, resuming, and no network."""

import hashlib

import pytest

from ehrfuse.datasets import _fetch, fetch_eicu_demo, fetch_mimic3_demo, fetch_mimic4_demo

pooch = pytest.importorskip("pooch")


@pytest.fixture
def page(tmp_path, monkeypatch):
    """A copy of the official layout on disk."""
    release = tmp_path / "files" / "mimic-iv-demo" / "2.2"
    (release / "hosp").mkdir(parents=True)
    (release / "hosp" / "patients.csv.gz").write_bytes(b"patients")
    (release / "hosp" / "labevents.csv.gz").write_bytes(b"labs")
    (release / "LICENSE.txt").write_text("licence")
    names = ["hosp/patients.csv.gz", "hosp/labevents.csv.gz", "LICENSE.txt"]
    sums = [f"{hashlib.sha256((release / n).read_bytes()).hexdigest()} {n}" for n in names]
    (release / "SHA256SUMS.txt").write_text("\n".join(sums) + "\n")
    asked = []

    def retrieve(url, known_hash, fname, path):
        source = tmp_path / "files" / url.removeprefix(_fetch._FILES)
        asked.append(url)
        (path / fname).write_bytes(source.read_bytes())
        found = hashlib.sha256((path / fname).read_bytes()).hexdigest()
        if known_hash and known_hash != f"sha256:{found}":
            (path / fname).unlink()
            raise ValueError("hash of downloaded file does not match")
        return str(path / fname)

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    return release, asked


def test_download(page, tmp_path):
    _, asked = page
    folder = fetch_mimic4_demo(tmp_path / "home")
    assert (folder / "hosp" / "labevents.csv.gz").read_bytes() == b"labs"
    assert asked[-1].endswith("patients.csv.gz")  # what marks a complete folder comes last
    assert fetch_mimic4_demo(tmp_path / "home") == folder
    assert len(asked) == 4


def test_a_wrong_checksum(page, tmp_path):
    release, _ = page
    (release / "hosp" / "labevents.csv.gz").write_bytes(b"other")
    with pytest.raises(ValueError, match=r"labevents.csv.gz does not have the checksum"):
        fetch_mimic4_demo(tmp_path / "home")


def test_no_network(tmp_path, monkeypatch):
    def retrieve(*args, **options):
        raise ConnectionError("no route")

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    for fetch, name in ((fetch_mimic4_demo, "mimic-iv-demo"), (fetch_mimic3_demo, "mimiciii-demo"),
                        (fetch_eicu_demo, "eicu-crd-demo")):  # fmt: skip
        with pytest.raises(OSError, match=f"could not be downloaded.*{name}"):
            fetch(tmp_path)


def test_a_folder_that_is_there_is_taken(shared_data):
    assert fetch_mimic4_demo(shared_data).name == "mimic-iv-demo-2.2"
    assert fetch_mimic3_demo(shared_data).name == "mimic-iii-demo-1.4"
    assert fetch_eicu_demo(shared_data).name == "eicu-crd-demo-2.0.1"
