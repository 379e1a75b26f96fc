"""The only door to `transformers`: models by name or folder, and vectors with a row cache.

Hub names and local folders are loaded alike: never remote code, safetensors where there are any,
one copy of a model per process. What is encoded once is kept by content, so that the folds of a
cross-validation pay for every note once.
"""

import copy
import hashlib
import json
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from joblib import Parallel, delayed, effective_n_jobs
from torch import Tensor, nn

from ehrfuse._cache import RowCache
from ehrfuse._runtime import import_optional, resolve_device, seeded

TOKENS_PER_BATCH = 8192
IMAGES_PER_BATCH = 32

encoded: Counter[str] = Counter()  # "texts" and "images" that went through a model in this process


# ---------------------------------------------------------------- models


@dataclass(frozen=True)
class ModelInfo:
    """What identifies a model.

    Attributes
    ----------
    name : str
        Hub name or folder.
    revision : str or None
        The commit that a hub name stood for; None for a folder.
    fingerprint : str
        Changes when the commit, or any file of the folder, changes.
    config : str
        The configuration as JSON, enough to build the network without any file.
    """

    name: str
    revision: str | None
    fingerprint: str
    config: str


def inspect_model(name: str, revision: str | None = None) -> ModelInfo:
    """Read a model's configuration and find out which weights its name stands for."""
    from transformers import AutoConfig

    folder = Path(name).expanduser()
    is_folder = folder.is_dir()
    if not is_folder and (folder.is_absolute() or name.startswith((".", "~")) or folder.exists()):
        raise ValueError(
            f"model={name!r} is no folder on this machine; give a folder that holds config.json, "
            "the weights and the tokenizer, or the name of a model on the Hugging Face hub."
        )
    with _loading(name, "configuration (config.json)"):
        config = AutoConfig.from_pretrained(
            str(folder) if is_folder else name, revision=revision or "main", trust_remote_code=False
        )
    commit = None if is_folder else getattr(config, "_commit_hash", None) or revision
    fingerprint = _folder_hash(folder) if is_folder else f"{name}@{commit}"
    place = str(folder) if is_folder else name
    return ModelInfo(place, commit, fingerprint, config.to_json_string(use_diff=False))


def reopen(name: str, revision: str | None, fingerprint: str) -> ModelInfo:
    """Find the model of fit again; raise if its name now stands for another."""
    info = inspect_model(name, revision)
    if info.fingerprint != fingerprint:
        raise ValueError(
            f"Model {name!r} holds other files than in fit, so its vectors mean something else; "
            "put the old files back, or fit again."
        )
    return info


def text_size(info: ModelInfo) -> int:
    """Width of a text model's hidden states."""
    return int(_config(info.config).get_text_config().hidden_size)


def copy_model(info: ModelInfo) -> nn.Module:
    """Copy a pretrained text model, on the CPU and trainable."""
    model = copy.deepcopy(_model(info, "cpu"))
    return model.requires_grad_(True)


def build_model(config: str) -> nn.Module:
    """Build the network of a configuration, with random weights and without any file."""
    from transformers import AutoModel

    with seeded(0, torch.device("cpu")), _quiet():
        return _text_part(AutoModel.from_config(_config(config), dtype=torch.float32))


def add_lora(
    model: nn.Module,
    rank: int,
    alpha: float | None = None,
    dropout: float = 0.0,
    targets: str | Sequence[str] = "all-linear",
) -> nn.Module:
    """Put low-rank adapters into layers of a model, in place, and fix all its other weights.

    Parameters
    ----------
    model : Module
        A transformers model.
    rank : int
    alpha : float or None
        The adapters are scaled by alpha / rank; None is twice the rank.
    dropout : float
        On what the adapters read.
    targets : str or sequence of str
        Names of layers, or "all-linear".

    Returns
    -------
    model : Module
        The same one. An adapter starts at zero, so its outputs are what they were.

    References
    ----------
    Hu et al.: LoRA: low-rank adaptation of large language models. arXiv:2106.09685.
    """
    peft = import_optional("peft", "lora")
    config = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank if alpha is None else alpha, lora_dropout=dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
    )  # fmt: skip
    model.requires_grad_(False)
    with _quiet(), warnings.catch_warnings():
        # peft asks transformers by a name that is on its way out.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", module="trans")
        warnings.filterwarnings("ignore", category=FutureWarning, module="peft")
        peft.inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name and "pooler" not in name)
    return model


def forget_layers(model: Any) -> None:
    """Compute the layers again in the backward pass instead of keeping what they gave."""
    # transformers 5 renames the method on the way.
    new = hasattr(model, "activation_checkpointing_enable")
    name = "activation_checkpointing_enable" if new else "gradient_checkpointing_enable"
    getattr(model, name)({"use_reentrant": False})


def _config(config: str) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(**json.loads(config))


@lru_cache(maxsize=4)
def _model(info: ModelInfo, device: str) -> nn.Module:
    """Load a model once per process; `info` is part of the key, so new weights load anew."""
    from transformers import AutoModel

    options = {
        "revision": info.revision or "main", "trust_remote_code": False, "weights_only": True,
        "dtype": torch.float32, "output_loading_info": True, "use_safetensors": True,
    }  # fmt: skip
    with _loading(info.name, "model"), seeded(0, torch.device("cpu")):
        try:
            model, report = AutoModel.from_pretrained(info.name, **options)
        except OSError:  # no safetensors there: .bin, which is opened as weights only
            model, report = AutoModel.from_pretrained(
                info.name, **options | {"use_safetensors": False}
            )
    # The pooler is the one part that checkpoints leave out; it is read only where it came along.
    missing = sorted(key for key in report["missing_keys"] if "pooler" not in key)
    if missing or report["mismatched_keys"]:
        raise ValueError(
            f"The weights of model {info.name!r} do not fit its config.json: "
            f"{len(missing)} tensors are missing (such as {missing[:2]}) and "
            f"{len(report['mismatched_keys'])} differ in shape; get the folder anew."
        )
    model = _text_part(model)
    model.pooler_is_trained = not report["missing_keys"]  # type: ignore[assignment]
    return model.eval().to(device)


def _text_part(model: Any) -> Any:
    return model.get_encoder() if model.config.is_encoder_decoder else model


@contextmanager
def _loading(name: str, part: str) -> Iterator[None]:
    """Turn whatever goes wrong in there into one sentence."""
    try:
        with _quiet():
            yield
    except Exception as error:  # files that are broken raise errors of many kinds
        cause = (str(error).strip() or type(error).__name__).splitlines()[0][:300].rstrip(".")
        raise ValueError(
            f"The {part} of model {name!r} could not be loaded ({cause}); offline, give a local "
            "folder that holds config.json, the weights and the tokenizer or image processor."
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """No bars, no load reports, and no request to the hub to convert somebody's weights."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    before = os.environ.get("DISABLE_SAFETENSORS_CONVERSION")
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
        if before is None:
            del os.environ["DISABLE_SAFETENSORS_CONVERSION"]
        else:
            os.environ["DISABLE_SAFETENSORS_CONVERSION"] = before


MODEL_FILES = {".json", ".txt", ".model", ".safetensors", ".bin"}


def _folder_hash(folder: Path) -> str:
    found = hashlib.blake2b(digest_size=16)
    for path in sorted(folder.iterdir()):
        if path.suffix in MODEL_FILES and path.is_file():
            stat = path.stat()
            found.update(path.name.encode() + _file_hash(path, stat.st_size, stat.st_mtime_ns))
    return found.hexdigest()


@lru_cache(maxsize=256)
def _file_hash(path: Path, size: int, changed: int) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").digest()


# ---------------------------------------------------------------- text


@dataclass(frozen=True)
class Frame:
    """What a tokenizer puts around every chunk, and what it pads with."""

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    pad: int


def open_tokenizer(info: ModelInfo, chunk_length: int) -> tuple[Any, Frame]:
    """Open the tokenizer of a model and find its frame; raise if chunks do not fit the model."""
    tokenizer, frame = _tokenizer(info)
    positions = getattr(_config(info.config), "max_position_embeddings", None)
    limits = [tokenizer.model_max_length, positions]
    limit = min((n for n in limits if n and n < 1e9), default=None)
    if limit is not None and chunk_length > limit:
        raise ValueError(
            f"chunk_length={chunk_length} is more than model {info.name!r} can read at once; "
            f"choose at most {limit}."
        )
    least = len(frame.prefix) + len(frame.suffix) + 1
    if chunk_length < least:
        raise ValueError(
            f"chunk_length={chunk_length} leaves no room for words beside the special tokens of "
            f"model {info.name!r}; choose at least {least}."
        )
    return tokenizer, frame


def longest_chunk(info: ModelInfo, wanted: int) -> int:
    """`wanted` tokens, or as many as the model can read at once."""
    positions = getattr(_config(info.config), "max_position_embeddings", None)
    limits = [_tokenizer(info)[0].model_max_length, positions, wanted]
    return int(min(n for n in limits if n and n < 1e9))


@lru_cache(maxsize=8)
def _tokenizer(info: ModelInfo) -> tuple[Any, Frame]:
    from transformers import AutoTokenizer

    with _loading(info.name, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(
            info.name, revision=info.revision or "main", trust_remote_code=False
        )
        # Without its files a tokenizer may still open, knowing no word at all.
        if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
            raise ValueError("its vocabulary is not there")
        return tokenizer, _frame_of(tokenizer)


def _frame_of(tokenizer: Any) -> Frame:
    """Found by looking, which holds for every tokenizer: what stands around a word."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    start = next(i for i in range(len(full)) if full[i : i + len(bare)] == bare)
    pads = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    pad = next(number for number in pads if number is not None)
    return Frame(tuple(full[:start]), tuple(full[start + len(bare) :]), pad)


def tokenizer_json(tokenizer: Any, name: str) -> str:
    """Put all of a tokenizer into one string."""
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"The tokenizer of model {name!r} is written in Python and cannot be stored in a "
            "fitted model; leave trainable=False, or choose a model with a tokenizer.json."
        )
    return tokenizer.backend_tokenizer.to_str()


@lru_cache(maxsize=8)
def restore_tokenizer(stored: str) -> Any:
    """Bring back the tokenizer that `tokenizer_json` stored."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(stored))


def cut_texts(
    texts: Sequence[str], tokenizer: Any, frame: Frame, max_length: int, chunk_length: int
) -> list[list[list[int]]]:
    """Token numbers of every chunk of every text.

    The first `max_length` tokens of a text are cut into pieces that, with the special tokens around
    each, have at most `chunk_length` tokens. An empty text has one chunk without words.
    """
    if not texts:
        return []
    ids = tokenizer(
        list(texts), add_special_tokens=False, return_attention_mask=False,
        return_token_type_ids=False, verbose=False,
    )["input_ids"]  # fmt: skip
    room = chunk_length - len(frame.prefix) - len(frame.suffix)
    return [
        [
            [*frame.prefix, *words[start : start + room], *frame.suffix] or [frame.pad]
            for start in range(0, max(1, min(len(words), max_length)), room)
        ]
        for words in ([*row[:max_length]] for row in ids)
    ]


def encode_texts(
    texts: Sequence[str],
    info: ModelInfo,
    *,
    max_length: int = 1024,
    chunk_length: int = 256,
    pooling: str = "mean",
    device: "str | torch.device | None" = None,
    cache: "str | os.PathLike[str] | None" = None,
    n_jobs: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of the chunks of every text, from a frozen model.

    Parameters
    ----------
    texts : sequence of str
    info : ModelInfo
    max_length : int
        Tokens read of a text.
    chunk_length : int
        Tokens of a chunk, special tokens included.
    pooling : {"mean", "cls", "last"}
        Mean over the tokens of a chunk, its first token, or its last.
    device : str, device or None
        None is the best available.
    cache : path or None
        An sqlite file; None keeps vectors in memory while the process lives.
    n_jobs : int or None
        Workers of joblib that encode at once; they send vectors, and this process keeps them.

    Returns
    -------
    vectors : float32 array (n_chunks, size)
    offsets : int64 array (len(texts) + 1,)
        Text i owns ``vectors[offsets[i]:offsets[i + 1]]``.
    """
    open_tokenizer(info, chunk_length)  # says what is wrong, even where all is known
    how = info, max_length, chunk_length, pooling, str(resolve_device(device))
    workers = effective_n_jobs(n_jobs)

    def compute(some: list[int]) -> list[np.ndarray]:
        encoded["texts"] += len(some)
        if workers == 1:
            return _encode_notes([texts[i] for i in some], *how)
        turns = [some[start::workers] for start in range(min(workers, len(some)))]
        tasks = (delayed(_encode_notes)([texts[i] for i in turn], *how) for turn in turns)
        found = dict(zip(chain(*turns), chain(*Parallel(n_jobs)(tasks)), strict=True))
        return [found[i] for i in some]

    tag = json.dumps(["text", info.fingerprint, max_length, chunk_length, pooling])
    items = [text.encode("utf-8", "surrogatepass") for text in texts]
    parts = RowCache(cache).map(tag, items, compute)
    offsets = np.cumsum([0, *map(len, parts)], dtype="int64")
    return np.concatenate(parts or [np.zeros((0, text_size(info)), "float32")]), offsets


def _encode_notes(
    texts: list[str], info: ModelInfo, max_length: int, chunk_length: int, pooling: str, device: str
) -> list[np.ndarray]:
    """Vectors of the chunks, text by text."""
    tokenizer, frame = open_tokenizer(info, chunk_length)
    notes = cut_texts(texts, tokenizer, frame, max_length, chunk_length)
    chunks = [chunk for note in notes for chunk in note]
    vectors = _encode_chunks(chunks, info, frame.pad, pooling, device)
    return np.split(vectors, np.cumsum([len(note) for note in notes])[:-1])


@torch.inference_mode()
def _encode_chunks(
    chunks: list[list[int]], info: ModelInfo, pad: int, pooling: str, device: str
) -> np.ndarray:
    """Batches of chunks alike in length, each of at most `TOKENS_PER_BATCH` padded tokens."""
    model = _model(info, device)
    order = np.argsort([len(chunk) for chunk in chunks], kind="stable")[::-1]
    vectors = np.empty((len(chunks), text_size(info)), "float32")
    start = 0
    while start < len(order):
        longest = len(chunks[order[start]])
        rows = order[start : start + max(1, TOKENS_PER_BATCH // longest)]
        start += len(rows)
        ids = np.full((len(rows), longest), pad, "int64")
        mask = np.arange(longest) < np.array([[len(chunks[i])] for i in rows])
        ids[mask] = np.concatenate([chunks[i] for i in rows])
        keep = torch.from_numpy(mask).to(device)
        with _quiet():
            found = model(input_ids=torch.from_numpy(ids).to(device), attention_mask=keep.long())
        hidden = found.last_hidden_state
        vectors[rows] = _pool(hidden, keep, pooling).cpu().numpy()
    return vectors


def _pool(hidden: Tensor, mask: Tensor, pooling: str) -> Tensor:
    if pooling == "cls":
        return hidden[:, 0]
    if pooling == "last":  # the last real token: behind it a short chunk is padded
        return hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(1) - 1]
    return torch.where(mask[..., None], hidden, 0.0).sum(1) / mask.sum(1, keepdim=True)


# ---------------------------------------------------------------- images


@lru_cache(maxsize=8)
def _image_processor(info: ModelInfo) -> Any:
    from transformers import AutoImageProcessor

    with _loading(info.name, "image processor (preprocessor_config.json)"):
        return AutoImageProcessor.from_pretrained(
            info.name, revision=info.revision or "main", trust_remote_code=False, backend="pil"
        )


def image_size(info: ModelInfo, device: "str | torch.device | None" = None) -> int:
    """Width of an image model's vectors, found by encoding a blank image."""
    blank = np.zeros((32, 32, 3), "uint8")
    return _encode_images([blank], info, str(resolve_device(device))).shape[1]


def encode_images(
    images: Sequence[np.ndarray],
    info: ModelInfo,
    *,
    device: "str | torch.device | None" = None,
    cache: "str | os.PathLike[str] | None" = None,
) -> np.ndarray:
    """One vector per image from a frozen vision model.

    The vector is the model's own pooled output where its weights came with the checkpoint, else the
    mean of the last hidden states.

    Parameters
    ----------
    images : sequence of uint8 arrays (height, width, 3)
    info : ModelInfo
    device : str, device or None
        None is the best available.
    cache : path or None
        As in `encode_texts`; the key is the content of the pixels.

    Returns
    -------
    vectors : float32 array (len(images), size)
    """
    place = str(resolve_device(device))

    def compute(some: list[int]) -> list[np.ndarray]:
        encoded["images"] += len(some)
        parts = [
            _encode_images([images[i] for i in some[start : start + IMAGES_PER_BATCH]], info, place)
            for start in range(0, len(some), IMAGES_PER_BATCH)
        ]
        return list(np.concatenate(parts)[:, None])

    items = [repr(image.shape).encode() + np.ascontiguousarray(image).tobytes() for image in images]
    parts = RowCache(cache).map(json.dumps(["image", info.fingerprint]), items, compute)
    return np.concatenate(parts)


@torch.inference_mode()
def _encode_images(images: list[np.ndarray], info: ModelInfo, device: str) -> np.ndarray:
    model = _model(info, device)
    if getattr(model.config, "num_channels", 3) == 1:
        images = [image[..., :1] for image in images]
    pixels = _image_processor(info)(
        images=images, return_tensors="pt", input_data_format="channels_last"
    )["pixel_values"]
    # Two-sided models (CLIP, SigLIP) hold the vision side as a part.
    found = getattr(model, "vision_model", model)(pixel_values=pixels.to(device))
    pooled = getattr(found, "pooler_output", None)
    if pooled is None or not model.pooler_is_trained:
        pooled = found.last_hidden_state
        pooled = pooled.mean(1) if pooled.dim() == 3 else pooled
    if pooled.dim() == 4:  # convolutional: (b, channels, h, w)
        pooled = pooled.mean((2, 3))
    return pooled.float().cpu().numpy()
