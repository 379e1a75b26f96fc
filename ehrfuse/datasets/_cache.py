"""Finished inputs on disk, found again by what they were made from; texts are never among them."""

import hashlib
import inspect
import json
import os
import pickle
import uuid
from pathlib import Path

from ehrfuse.datasets import vocabulary
from ehrfuse.datasets._engine import read_parquet, write_parquet

WHOLE = 64 * 2**20  # bytes up to which a file's whole content is read for its digest
BLOCK = 2**20


class Kept:
    """The inputs of one build, in one file of a folder.

    The name is a digest of the raw files, the rows and their prediction times, the vocabulary and
    the code. Files are written under another name first: two processes, or a killed one, leave
    nothing half-written.

    Parameters
    ----------
    folder : path or None
    source : Source
    rows : Rows
    hidden : set of str
    """

    def __init__(self, folder, source, rows, hidden):
        self.path = None
        if folder is None:
            return
        if any(isinstance(p, str) for p in source.tables.files.values()):
            raise ValueError(
                "cache= keeps what was made from files; with a warehouse connection leave it out, "
                "or convert the tables with to_parquet first."
            )
        digest = hashlib.blake2b(digest_size=20)
        for name, path in sorted(source.tables.files.items()):
            for one in path if isinstance(path, list) else [path]:
                digest.update(f"{name} {fingerprint(one)}".encode())
        digest.update(pickle.dumps(rows.frame.to_dict("list"), protocol=5))
        digest.update(repr((rows.unit, rows.landmark.tolist(), sorted(hidden))).encode())
        digest.update(repr(vocabulary.ANALYTES).encode())
        digest.update(repr(source.options()).encode())
        for kind in type(source).__mro__[:-1]:
            digest.update(inspect.getsource(inspect.getmodule(kind)).encode())
        self.path = Path(folder) / f"{type(source).__name__.lower()}-{digest.hexdigest()}.parquet"

    def load(self):
        """Frame and modalities, or (None, {}) if they are not there."""
        if self.path is None or not self.path.exists():
            return None, {}
        specs = json.loads(self.path.with_suffix(".json").read_text(encoding="utf-8"))
        return read_parquet(self.path), specs

    def save(self, X, modalities):
        """Keep a frame; the description is there before the frame is."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_name(f".{self.path.stem}.{uuid.uuid4().hex}.tmp")
        try:
            part.write_text(json.dumps(modalities), encoding="utf-8")
            os.replace(part, self.path.with_suffix(".json"))
        finally:
            part.unlink(missing_ok=True)
        write_parquet(X, self.path)


def fingerprint(path):
    """Digest of a file: of its content, or of size, date and sampled blocks if it is large."""
    size = path.stat().st_size
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    with path.open("rb") as file:
        if size <= WHOLE:
            digest.update(file.read())
        else:
            digest.update(str(path.stat().st_mtime_ns).encode())
            for part in range(16):
                file.seek((size - BLOCK) * part // 15)
                digest.update(file.read(BLOCK))
    return digest.hexdigest()
