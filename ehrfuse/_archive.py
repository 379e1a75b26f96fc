"""The two files of a saved model, in one zip or one folder: written whole, read with suspicion.

`manifest.json` says what there is, `tensors.safetensors` (in a folder `model.safetensors`) holds
the arrays. Every size is known before anything is read, nothing is unpacked to disk, and nothing is
code.
"""

import hashlib
import json
import os
import secrets
import stat
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

FORMAT = 1
MANIFEST = "manifest.json"
ZIPPED, UNZIPPED, CARD = "tensors.safetensors", "model.safetensors", "README.md"
MAX_MANIFEST = 2**28  # bytes; arrays and long lists of words are in the tensors
FIXED_TIME = (1980, 1, 1, 0, 0, 0)  # the same model gives the same bytes on every day


class LoadError(ValueError):
    """What `ehrfuse.load` raises for a file that is damaged, foreign or not to be trusted."""


# ---------------------------------------------------------------- writing

# Of files that save does not write; a folder so called would be taken for one. "v1.2" is a folder.
OF_FILES = {".bin", ".ckpt", ".gz", ".h5", ".joblib", ".json", ".npz", ".onnx", ".pickle", ".pkl",
            ".pt", ".pth", ".safetensors", ".skops", ".tar", ".tgz"}  # fmt: skip


def check_name(path: Any) -> None:
    """Raise unless `path` is one, and names a zip or what may be a folder."""
    if not isinstance(path, str | os.PathLike):
        raise ValueError(f"path is {path!r}; give the name of a folder, or one ending in '.zip'.")
    ending = Path(path).suffix
    if ending.lower() in OF_FILES and not Path(path).is_dir():
        raise ValueError(
            f"{str(path)!r} ends in {ending!r}, and save writes a file ending in '.zip' or a "
            "folder; choose one of these names."
        )


def write(path: Path, manifest: dict[str, Any], tensors: dict[str, np.ndarray], card: str) -> None:
    """Write a zip where the name ends in .zip, else a folder; whole or not at all."""
    # Sorted: safetensors keeps the order in which it is given tensors of one kind.
    blob = safetensors.numpy.save({name: tensors[name] for name in sorted(tensors)})
    manifest = {"format": FORMAT, "tensors_sha256": _digest(blob)} | manifest
    manifest |= {"sha256": _digest_of(manifest)}
    text = json.dumps(manifest, indent=1, allow_nan=False).encode()
    if len(text) > MAX_MANIFEST:
        raise ValueError(
            f"The manifest would have {len(text)} bytes, more than load reads ({MAX_MANIFEST}); "
            "give long lists of numbers or words as arrays."
        )
    if path.suffix.lower() == ".zip":
        _write_zip(path, {MANIFEST: text, ZIPPED: blob})
    else:
        _write_folder(path, {UNZIPPED: blob, MANIFEST: text}, card)


def pack(files: dict[str, bytes], target: Any) -> None:
    """Write an uncompressed zip that depends on nothing but its content."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for name, content in files.items():
            info = zipfile.ZipInfo(name, FIXED_TIME)
            info.create_system, info.external_attr = 3, 0o600 << 16
            archive.writestr(info, content)


def _write_zip(path: Path, files: dict[str, bytes]) -> None:
    if path.is_dir():
        raise ValueError(f"{str(path)!r} is a folder; name a file, or a folder without '.zip'.")
    with _beside(path) as part:
        with part.open("wb") as file:
            pack(files, file)
            _to_disk(file)
        part.replace(path)


def _write_folder(path: Path, files: dict[str, bytes], card: str) -> None:
    """All parts are on disk before the first takes its name; what else is there stays."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"{str(path)!r} is a file; name a folder, or a file ending in '.zip'.")
    there = {p.name for p in path.iterdir()} if path.is_dir() else set()
    bare = {".git", ".gitattributes", CARD}  # as a new repository of the hub has them
    if there - bare and not _is_ours(path / MANIFEST):
        raise ValueError(
            f"Folder {str(path)!r} holds other things and no saved model; name a new folder, "
            "or a file ending in '.zip'."
        )
    path.mkdir(parents=True, exist_ok=True)
    if not (path / CARD).exists():  # somebody may have written more on it
        files = {**files, CARD: card.encode()}
    parts: dict[str, Path] = {}
    try:
        for name, content in files.items():
            parts[name] = _new_file(path / name)
            with parts[name].open("wb") as file:
                file.write(content)
                _to_disk(file)
        for name, part in parts.items():
            part.replace(path / name)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)


def _is_ours(manifest: Path) -> bool:
    """Whether a manifest was written here; others are not to be written over."""
    try:
        found = json.loads(manifest.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and {"format", "tensors_sha256", "sha256"} <= set(found)


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    part = _new_file(path)
    try:
        yield part
    finally:
        part.unlink(missing_ok=True)


def _new_file(path: Path) -> Path:
    """An empty file beside `path`, of a name that nobody else has."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {str(path.parent)!r}; make it first.")
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    part.open("xb").close()
    return part


def _to_disk(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _digest_of(manifest: dict[str, Any]) -> str:
    """Of the manifest without its own digest, however it is laid out."""
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    return _digest(json.dumps(body, separators=(",", ":")).encode())


# ---------------------------------------------------------------- reading


def read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Manifest and arrays of a zip or a folder; `LoadError` for anything that is not as written."""
    try:
        text, blob = _read_folder(path) if path.is_dir() else _read_zip(path)
        manifest = _parse(text)
        if _digest(blob) != manifest.get("tensors_sha256"):
            raise LoadError("its arrays are not those that were saved with it (sha256)")
        return manifest, _arrays(blob)
    except FileNotFoundError:
        raise
    except (LoadError, OSError, zipfile.BadZipFile) as error:
        raise LoadError(
            f"{str(path)!r} cannot be loaded: {error}. It is damaged or was not written by "
            "ehrfuse.save; get it again from where it came."
        ) from error


def _read_zip(path: Path) -> tuple[bytes, bytes]:
    if not path.exists():
        raise FileNotFoundError(f"There is no file or folder {str(path)!r}.")
    if not stat.S_ISREG(path.stat().st_mode):
        raise LoadError("it is no regular file")
    size = path.stat().st_size
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            raise LoadError("it is no zip archive")
        files = unpack(file, size)
    if set(files) != {MANIFEST, ZIPPED}:
        raise LoadError(f"it must hold {MANIFEST} and {ZIPPED}, and holds {sorted(files)[:4]}")
    return files[MANIFEST], files[ZIPPED]


def unpack(file: Any, size: int) -> dict[str, bytes]:
    """The members of an uncompressed zip of `size` bytes; never more bytes than it has."""
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            if len({m.filename for m in members}) < len(members):
                raise LoadError("it names a file twice")
            if sum(m.file_size for m in members) > size:
                raise LoadError("its files claim to be larger than it is")
            for member in members:
                stored = member.compress_type == zipfile.ZIP_STORED
                if not stored or member.file_size != member.compress_size or member.flag_bits & 1:
                    raise LoadError("it holds compressed or encrypted files, which save never does")
            return {member.filename: archive.read(member) for member in members}
    except LoadError:
        raise
    except Exception as error:  # zipfile raises errors of many kinds for damaged headers
        raise LoadError(f"the archive is broken ({type(error).__name__})") from error


def _read_folder(path: Path) -> tuple[bytes, bytes]:
    manifest, tensors = _inside(path, MANIFEST), _inside(path, UNZIPPED)
    if manifest.stat().st_size > MAX_MANIFEST:
        raise LoadError(f"{MANIFEST} has more than {MAX_MANIFEST} bytes")
    return manifest.read_bytes(), tensors.read_bytes()


def _inside(folder: Path, name: str) -> Path:
    """A regular file of the folder; a link may lead only there, or into the cache of the hub."""
    found = (folder / name).resolve()
    home = folder.resolve()
    in_cache = home.parent.name == "snapshots" and found.parent == home.parents[1] / "blobs"
    if found.parent != home and not in_cache:
        raise LoadError(f"{name} is a link that leads out of the folder")
    if not found.exists():
        raise LoadError(f"the folder has no {name}")
    if not stat.S_ISREG(found.stat().st_mode):
        raise LoadError(f"{name} is no regular file")
    return found


def _parse(text: bytes) -> dict[str, Any]:
    """The manifest, of a format that this version reads and undamaged."""
    manifest = parse_json(text, MANIFEST)
    number = manifest.get("format") if isinstance(manifest, dict) else None
    if type(number) is not int:
        raise LoadError(f"{MANIFEST} states no format")
    if number > FORMAT:
        raise LoadError(
            f"it has format {number} of a newer ehrfuse, and this one reads up to {FORMAT} "
            "(pip install --upgrade ehrfuse)"
        )
    if manifest.get("sha256") != _digest_of(manifest):
        raise LoadError(f"{MANIFEST} was changed after it was saved (sha256)")
    return manifest


def parse_json(text: bytes, name: str) -> Any:
    """Strict JSON: no NaN, no name twice, no bottomless nesting."""

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a name twice")
        return found

    try:
        if len(text) > MAX_MANIFEST:
            raise ValueError("too long")
        return json.loads(text, parse_constant=refuse, object_pairs_hook=distinct)
    except (ValueError, RecursionError) as error:
        raise LoadError(f"{name} is no JSON that save writes") from error


def _arrays(blob: bytes) -> dict[str, np.ndarray]:
    try:
        return safetensors.numpy.load(blob)
    except Exception as error:  # its own error, and KeyError for kinds that numpy lacks
        raise LoadError(f"its arrays cannot be read ({type(error).__name__})") from error
