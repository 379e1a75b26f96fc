"""Tiny models with random weights, written to a folder in the layout of a downloaded model."""

import json
import string
from pathlib import Path

import torch

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
_TEXT = "the no pain chest fever patient with of and was cough normal left right heart"
WORDS = _TEXT.split()
_PROMPT = "yes risk note knowledge answer question is there a : . , ? 0 1 2 3 4 5 6 7 8 9"
CAUSAL_WORDS = [*WORDS, *_PROMPT.split()]


def _vocabulary() -> list[str]:
    letters = string.ascii_lowercase + string.digits
    return [*SPECIAL, *letters, *string.punctuation, *(f"##{c}" for c in letters), *WORDS]


def _save(model, folder: Path, safe: bool = True) -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    if safe:
        model.save_pretrained(folder)
        return
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


def _save_tokenizer(folder: Path, max_length: int) -> None:
    """WordPiece over letters and a few words, as BERT has it."""
    from transformers import BertTokenizerFast

    vocabulary = {word: i for i, word in enumerate(_vocabulary())}
    BertTokenizerFast(vocab=vocabulary, model_max_length=max_length).save_pretrained(folder)


def write_bert(folder, *, seed=0, hidden=16, positions=64, dropout=0.1, safe=True) -> str:
    """A BERT text encoder of two layers with its tokenizer."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=len(_vocabulary()), hidden_size=hidden, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=2 * hidden, max_position_embeddings=positions,
        hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, initializer_range=0.3,
    )  # fmt: skip
    return _write(BertModel, config, folder, seed, positions, safe)


def write_longformer(folder, *, seed=0, hidden=16, positions=128) -> str:
    """A Longformer with a window of 16 tokens."""
    from transformers import LongformerConfig, LongformerModel

    config = LongformerConfig(
        vocab_size=len(_vocabulary()), hidden_size=hidden, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=2 * hidden, attention_window=[16, 16],
        max_position_embeddings=positions + 2, pad_token_id=0, type_vocab_size=1,
    )  # fmt: skip
    return _write(LongformerModel, config, folder, seed, positions, True)


def write_modernbert(folder, *, seed=0, hidden=16, positions=128) -> str:
    """A ModernBERT: rotary positions, alternating attention."""
    from transformers import ModernBertConfig, ModernBertModel

    config = ModernBertConfig(
        vocab_size=len(_vocabulary()), hidden_size=hidden, num_hidden_layers=3,
        num_attention_heads=2, intermediate_size=2 * hidden, max_position_embeddings=positions,
        local_attention=8, pad_token_id=0, bos_token_id=2, eos_token_id=3, cls_token_id=2,
        sep_token_id=3,
    )  # fmt: skip
    return _write(ModernBertModel, config, folder, seed, positions, True)


def write_llama(folder, *, seed=0, hidden=16, positions=256) -> str:
    """A Llama causal language model of two layers with a tokenizer of words."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    words = {word: i for i, word in enumerate(["<s>", "</s>", "<unk>", *CAUSAL_WORDS])}
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=hidden, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, intermediate_size=2 * hidden, max_position_embeddings=positions,
        bos_token_id=0, eos_token_id=1, initializer_range=0.2,
    )  # fmt: skip
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(seed)
        _save(LlamaForCausalLM(config), folder)
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        model_max_length=positions,
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)


def _write(kind, config, folder, seed, positions, safe) -> str:
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(seed)
        _save(kind(config), folder, safe)
    _save_tokenizer(folder, positions)
    return str(folder)


def write_vit(folder, *, seed=0, hidden=16, pooler=True) -> str:
    """A vision transformer for images of 32 x 32 with its image processor."""
    from transformers import ViTConfig, ViTModel

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = ViTConfig(
        hidden_size=hidden, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=2 * hidden, image_size=32, patch_size=8, initializer_range=0.3,
    )  # fmt: skip
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(seed)
        _save(ViTModel(config, add_pooling_layer=pooler), folder)
    processor = {
        "image_processor_type": "ViTImageProcessor", "do_normalize": True, "do_rescale": True,
        "do_resize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2,
        "rescale_factor": 1 / 255, "size": {"height": 32, "width": 32},
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return str(folder)
