"""Embedding: a cell is a vector. Image: a cell is a path or an array of pixels."""

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from ehrfuse import _hub
from ehrfuse._data import Block
from ehrfuse._runtime import import_optional
from ehrfuse.modalities._base import Modality, check_count, describe
from ehrfuse.modalities._numbers import vector_scale
from ehrfuse.nn.encoders import ImageEncoder, VectorEncoder

__all__ = ["Embedding", "Image"]


class Embedding(Modality):
    """Precomputed vectors, all of one length.

    Parameters
    ----------
    columns : str
        One column. A cell is a 1-D array or a list of numbers, or null where there is none; Arrow
        ``list<float>`` and ``fixed_size_list<float>`` columns are read fastest.
    dropout : float, default=0.1
        On the vector.

    Attributes
    ----------
    size_ : int
        Length of the vectors; 0 if no training row had one.

    Examples
    --------
    >>> import numpy as np
    >>> import pandas as pd
    >>> from ehrfuse.modalities import Embedding
    >>> X = pd.DataFrame({"ecg": [np.array([0.5, 1.0]), None, np.array([0.0, -2.0])]})
    >>> block = Embedding("ecg").fit(X).transform(X)
    >>> block.arrays["values"].shape
    (3, 2)
    """

    _one_column = True

    def __init__(self, columns, *, dropout=0.1):
        super().__init__(columns)
        self.dropout = dropout

    def _learn(self, cells):
        column = self._only(cells)
        known = np.flatnonzero(column.notna().to_numpy(dtype=bool))
        self.size_ = 0
        if len(known):
            first = self._vector(column.iloc[known[0]], known[0], None)
            self.size_ = len(first)
        values = self._values(cells, column.notna().to_numpy(dtype=bool))
        self.scale_ = vector_scale(values if len(known) == len(values) else values[known])

    def _read(self, cells, present):
        return Block(present, {"values": self._values(cells, present)})

    def _values(self, cells, present):
        values = np.zeros((len(cells), max(1, self.size_)), "float32")
        rows = np.flatnonzero(present)
        if len(rows):
            column = self._only(cells)
            if not _read_arrow(column, values, present):
                self._read_cells(column, values, rows)
            bad = np.flatnonzero(~np.isfinite(values).all(1))  # absent rows are zero
            if len(bad):
                self._complain(
                    bad[0], "NaN or infinity (in float32)", "finite numbers",
                    "A vector that is not known is a null cell.",
                )  # fmt: skip
        return values

    def _read_cells(self, column, values, rows):
        cells = column.to_numpy(dtype=object)
        with np.errstate(over="ignore"):  # infinity is found and named by the caller
            for row in rows:
                values[row] = self._vector(cells[row], row, self.size_)

    def _vector(self, cell, row, size):
        """One cell as a 1-D array of numbers."""
        if isinstance(cell, np.ndarray) and cell.ndim == 1 and cell.dtype.kind in "fiu":
            vector = cell
        else:
            try:
                vector = np.asarray(cell)
                if vector.dtype == object and vector.ndim == 1:
                    vector = np.array([np.nan if x is None else x for x in cell], dtype="float64")
            except (TypeError, ValueError):
                vector = np.empty(0, object)
        if vector.ndim == 1 and len(vector) and vector.dtype.kind in "fiub":
            if size is None or len(vector) == size:
                return vector
            self._complain(
                row, f"one of length {len(vector)}", f"vectors of length {size}, as in fit",
                "All vectors of a column need one length; a vector that is not known is null.",
            )  # fmt: skip
        self._complain(
            row, describe(cell), "1-D vectors of numbers",
            "A vector that is not known is a null cell.",
        )  # fmt: skip

    def make_encoder(self, d_model, n_members=1):
        return VectorEncoder(*self.scale_, d_model, self.dropout)


def _read_arrow(column, values, present):
    """Copy an Arrow list column into `values`; False if its vectors are not all of that length."""
    if not isinstance(column.dtype, pd.ArrowDtype):
        return False
    chunked = pa.array(column)
    chunks = chunked.chunks if isinstance(chunked, pa.ChunkedArray) else [chunked]
    start = 0
    for chunk in chunks:
        kind = chunk.type
        is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
        if not (is_list or pa.types.is_fixed_size_list(kind)) or not _is_number(kind.value_type):
            return False
        length = pc.list_value_length(chunk).to_numpy(zero_copy_only=False)
        if (length[chunk.is_valid().to_numpy(zero_copy_only=False)] != values.shape[1]).any():
            return False
        flat = pc.cast(chunk.flatten(), pa.float32(), safe=False).to_numpy(zero_copy_only=False)
        rows = slice(start, start + len(chunk))
        values[rows][present[rows]] = flat.reshape(-1, values.shape[1])
        start += len(chunk)
    return True


def _is_number(kind):
    return pa.types.is_floating(kind) or pa.types.is_integer(kind)


class Image(Modality):
    """Pictures: a file or an array of pixels a row, null where there is none.

    By default every picture is decoded once, turned grey and resized, and a small network is
    trained in `fit`. With `model` a frozen Hugging Face vision model reads it.

    Parameters
    ----------
    columns : str
        One column. A cell is a path (PNG, JPEG, TIFF and what else Pillow reads) or an array of
        shape (height, width) or (height, width, 1, 3 or 4). Arrays hold uint8, floats from 0 to 1,
        or wider integers, which are stretched from their own minimum to maximum, as 16-bit files
        are.
    size : int, default=64
        Pictures become `size` x `size` pixels; proportions are not kept. `model` None only.
    root : path or None, default=None
        Folder that relative paths start from.
    model : str or None, default=None
        A vision model of the Hugging Face hub by name, or a local folder with its files.
    revision : str or None, default=None
        Branch, tag or commit of a hub model. The commit found in `fit` is used ever after.
    cache : path or None, default=None
        Where the vectors of `model` are kept: an sqlite file, which several processes may share, or
        None for the memory of this process.
    dropout : float, default=0.1
        On the features of the picture.

    Attributes
    ----------
    fingerprint_ : str
        Identifies the weights of `model`.
    size_ : int
        Width of the vectors of `model`.

    Examples
    --------
    >>> import numpy as np
    >>> import pandas as pd
    >>> from ehrfuse.modalities import Image
    >>> X = pd.DataFrame({"film": [np.zeros((32, 32), "uint8"), None]})
    >>> block = Image("film", size=32).fit(X).transform(X)
    >>> block.arrays["pixels"].shape
    (2, 32, 32)
    """

    _one_column = True

    def __init__(
        self,
        columns,
        *,
        size=64,
        root=None,
        model=None,
        revision=None,
        cache=None,
        dropout=0.1,
    ):
        super().__init__(columns)
        self.size = size
        self.root = root
        self.model = model
        self.revision = revision
        self.cache = cache
        self.dropout = dropout

    def _check_params(self):
        check_count(self.size, "size", 8)

    def _learn(self, cells):
        if self.model is not None:
            info = _hub.inspect_model(self.model, self.revision)
            self.fingerprint_, self.commit_ = info.fingerprint, info.revision
            self.size_ = _hub.image_size(info)
            column = self._only(cells)
            known = np.flatnonzero(column.notna().to_numpy(dtype=bool))
            self.scale_ = vector_scale(self._vectors(column.to_numpy(dtype=object), known)[known])

    def _read(self, cells, present):
        column = self._only(cells).to_numpy(dtype=object)
        rows = np.flatnonzero(present)
        if self.model is not None:
            return Block(present, {"values": self._vectors(column, rows)})
        pixels = np.zeros((len(column), self.size, self.size), "uint8")
        for row in rows:
            pixels[row] = _resize(_grey(self._pixels(column[row], row, "L")), self.size)
        return Block(present, {"pixels": pixels})

    def _vectors(self, column, rows):
        vectors = np.zeros((len(column), self.size_), "float32")
        if not len(rows):
            return vectors
        info = _hub.reopen(self.model, self.commit_ or self.revision, self.fingerprint_)
        for some in np.split(rows, range(DECODED_AT_ONCE, len(rows), DECODED_AT_ONCE)):
            images = [_colour(self._pixels(column[row], row, "RGB")) for row in some]
            vectors[some] = _hub.encode_images(images, info, cache=self.cache)
        return vectors

    def _pixels(self, cell, row, mode):
        """One cell as uint8 (height, width) or (height, width, channels)."""
        if isinstance(cell, str | os.PathLike):
            path = Path(self.root or "") / cell
            try:
                return _decode(path, mode, self.size if self.model is None else None)
            except ImportError:
                raise
            except Exception as error:  # damaged files raise errors of many kinds
                raise ValueError(
                    f"Column {self.columns_[0]!r} needs pictures; row {row} names {str(path)!r}, "
                    f"which cannot be read ({type(error).__name__}). Repair the path (see root=) "
                    "or the file, or make the cell null."
                ) from error
        array = np.asarray(cell) if hasattr(cell, "__array_interface__") else None
        known = array is not None and array.dtype.kind in "biuf" and array.size
        if not known or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))):
            self._complain(
                row, describe(cell), "a path or an array of pixels (height, width[, channels])",
                "Convert the cell, or make it null.",
            )  # fmt: skip
        if array.dtype.kind == "f" and not (array.min() >= 0 and array.max() <= 1):
            self._complain(
                row, "pixels outside 0 to 1, or NaN", "uint8 pixels or floats from 0 to 1",
                "Divide by the largest possible value, or convert to uint8.",
            )  # fmt: skip
        return _eight_bits(array)

    def make_encoder(self, d_model, n_members=1):
        if self.model is not None:
            return VectorEncoder(*self.scale_, d_model, self.dropout)
        return ImageEncoder(d_model, dropout=self.dropout)


DECODED_AT_ONCE = 64  # full-size pictures in memory at a time


def _decode(path, mode, size):
    """Pixels of a file, grey ("L") or in colour ("RGB"); `size` lets a JPEG skip detail."""
    pillow = import_optional("PIL.Image", "image")
    with pillow.open(path) as picture:
        if size is not None:
            picture.draft(mode, (size, size))
        if picture.mode.startswith(("I", "F")):
            return _eight_bits(_stretch(np.asarray(picture)))
        return np.asarray(picture.convert(mode))


def _eight_bits(array):
    if array.dtype == np.uint8:
        return array
    if array.dtype.kind == "b":
        return array.astype("uint8") * 255
    if array.dtype.kind in "iu":
        array = _stretch(array)
    return np.rint(array * 255.0).astype("uint8")


def _stretch(array):
    """From minimum to maximum as 0 to 1: 12 bits in a 16-bit file would look black otherwise."""
    low, high = float(array.min()), float(array.max())
    return (array.astype("float64") - low) / ((high - low) or 1.0)


def _grey(pixels):
    if pixels.ndim == 2:
        return pixels
    if pixels.shape[2] == 1:
        return pixels[..., 0]
    return np.rint(pixels[..., :3] @ np.array([0.299, 0.587, 0.114])).astype("uint8")


def _colour(pixels):
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels[..., :3]
    return np.broadcast_to(pixels, (*pixels.shape[:2], 3))


def _resize(grey, size):
    if grey.shape == (size, size):
        return grey
    pillow = import_optional("PIL.Image", "image")
    picture = pillow.fromarray(np.ascontiguousarray(grey))
    return np.asarray(picture.resize((size, size), pillow.Resampling.BILINEAR))
