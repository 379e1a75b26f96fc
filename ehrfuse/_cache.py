"""Vectors by content: what is encoded once is kept, in memory or in one sqlite file."""

import hashlib
import multiprocessing
import os
import sqlite3
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np


class RowCache:
    """Vectors by content: only hashes and vectors are kept, never what was encoded.

    Vectors can be inverted and the hash of a short text guessed: protect the file like the notes.

    Parameters
    ----------
    path : path or None
        An sqlite file, which several processes may use at once. None: the memory of this process,
        at most `MEMORY` bytes, the longest unused given up first.
    """

    MEMORY = 2**30
    GROUP = 256  # items computed between two writes: what a killed process may lose
    WAIT = 60.0  # seconds to wait for another process that writes

    _rows: ClassVar[OrderedDict[bytes, np.ndarray]] = OrderedDict()
    _lock: ClassVar[Any] = threading.Lock()
    _bytes: ClassVar[int] = 0

    def __init__(self, path: "str | os.PathLike[str] | None" = None) -> None:
        self.path = None if path is None else Path(path).expanduser()

    def map(
        self,
        tag: str,
        items: Sequence[bytes],
        compute: Callable[[list[int]], list[np.ndarray]],
    ) -> list[np.ndarray]:
        """One float32 array (rows, size) per item; equal items are computed once, known ones never.

        Parameters
        ----------
        tag : str
            Everything beside the item that the result depends on.
        items : sequence of bytes
        compute : callable
            Gets places in `items` and returns their arrays.
        """
        prefix = hashlib.blake2b(tag.encode(), digest_size=16).digest()
        keys = [hashlib.blake2b(item, key=prefix, digest_size=16).digest() for item in items]
        first: dict[bytes, int] = {}
        for i, key in enumerate(keys):
            first.setdefault(key, i)
        found = self._get(list(first))
        # Items alike in length go together: a batch pads less.
        missing = sorted((i for key, i in first.items() if key not in found),
                         key=lambda i: len(items[i]))  # fmt: skip
        with _bar(len(missing)) as bar:
            for start in range(0, len(missing), self.GROUP):
                some = missing[start : start + self.GROUP]
                new = dict(zip([keys[i] for i in some], compute(some), strict=True))
                self._put(new)
                found |= new
                bar.update(len(some))
        return [found[key] for key in keys]

    @classmethod
    def forget(cls) -> None:
        """Empty the memory of this process."""
        with cls._lock:
            cls._rows.clear()
            cls._bytes = 0

    def _get(self, keys: list[bytes]) -> dict[bytes, np.ndarray]:
        if self.path is not None:
            return self._get_stored(keys)
        with self._lock:
            for key in keys:
                if key in self._rows:
                    self._rows.move_to_end(key)
            return {key: self._rows[key] for key in keys if key in self._rows}

    def _put(self, new: dict[bytes, np.ndarray]) -> None:
        if self.path is not None:
            self._put_stored(new)
            return
        cls = type(self)
        with self._lock:
            for key, rows in new.items():
                cls._bytes += rows.nbytes - getattr(self._rows.get(key), "nbytes", 0)
                self._rows[key] = rows.copy()  # a view would keep its whole batch alive
            while cls._bytes > self.MEMORY and self._rows:
                cls._bytes -= self._rows.popitem(last=False)[1].nbytes

    def _get_stored(self, keys: list[bytes]) -> dict[bytes, np.ndarray]:
        found = {}
        with self._open() as connection:
            for start in range(0, len(keys), 500):
                some = keys[start : start + 500]
                marks = ",".join("?" * len(some))
                query = f"SELECT key, n, data FROM rows WHERE key IN ({marks})"
                for key, n, data in connection.execute(query, some):
                    found[key] = np.frombuffer(data, "<f4").reshape(n, -1)
        return found

    def _put_stored(self, new: dict[bytes, np.ndarray]) -> None:
        rows = [(k, len(v), np.ascontiguousarray(v, "<f4").tobytes()) for k, v in new.items()]
        with self._open() as connection, connection:
            connection.executemany("INSERT OR IGNORE INTO rows VALUES (?, ?, ?)", rows)

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """Connect for one step: nothing is carried over a fork or into a pickle."""
        connection = None
        try:
            connection = self._connect()
            yield connection
        except (sqlite3.Error, ValueError) as error:
            raise ValueError(
                f"The cache file {str(self.path)!r} cannot be used ({error}); delete it if it is "
                "damaged (its vectors are computed anew), or give a file in a folder that exists "
                "and may be written to."
            ) from error
        finally:
            if connection is not None:
                connection.close()

    def _connect(self) -> sqlite3.Connection:
        assert self.path is not None
        connection = sqlite3.connect(self.path, timeout=self.WAIT)
        deadline = time.monotonic() + self.WAIT
        while True:
            try:
                # sqlite does not wait by itself while another process switches a new file to WAL.
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("PRAGMA synchronous = NORMAL")
                connection.execute(
                    "CREATE TABLE IF NOT EXISTS rows (key BLOB PRIMARY KEY, n INTEGER, data BLOB)"
                )
                return connection
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > deadline:
                    connection.close()
                    raise
                time.sleep(0.05)


def _bar(total: int) -> Any:
    """Show a bar at a terminal, on work of some seconds, in the main process only."""
    from tqdm.auto import tqdm

    quiet = True if multiprocessing.parent_process() is not None else None
    return tqdm(total=total, desc="encoding", delay=5, leave=False, disable=quiet)
