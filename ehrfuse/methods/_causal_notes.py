"""Notes read by a causal language model with low-rank adapters: a risk from two label tokens.

The prompt ends where the model would write its answer. The loss is on the completion alone: the
label's token and, where a teacher wrote one, the rationale after it. The risk is read from the
label tokens' logits at the answer, so nothing that is written later can change it.

Axes: b - batch, t - tokens of the prompt (padded on the left), r - tokens of the rationale,
v - words.
"""

import torch
from torch import nn
from torch.nn import functional as F

from ehrfuse import _hub, _hub_causal
from ehrfuse._runtime import check_option
from ehrfuse.base import TorchClassifier
from ehrfuse.modalities._prompt import Prompt
from ehrfuse.nn.core import Core


class CausalReader(nn.Module):
    """The language model: tokens and their mask to logits at the last places.

    Shape: ids (b, t), mask (b, t) -> (b, n_last, v).
    """

    def __init__(self, model, n_outputs):
        super().__init__()
        self.model, self.n_outputs = model, n_outputs

    def forward(self, ids, mask, n_last):
        return self.model(
            input_ids=ids, attention_mask=mask.long(), logits_to_keep=n_last, use_cache=False
        ).logits


class CausalCore(Core):
    """Loss on the completion; the risk from the label tokens' logits at the answer.

    State holds what is trained alone: adapters, or the whole model where there are none.
    """

    supervised = ()  # labels are known of every row

    def __init__(self, reader, target, label_ids, pad, rationale_weight, adapters):
        super().__init__({"prompt": reader})
        self.target, self.pad, self.adapters = target, pad, adapters
        self.rationale_weight = rationale_weight
        self.register_buffer("label_ids", torch.tensor(label_ids), persistent=False)

    def forward(self, batch):
        """Logits (b, 1) of two classes, (b, k) of more."""
        ids, mask = self._left(batch)
        logits = self.encoders["prompt"](ids, mask, 1)[:, -1][:, self.label_ids]
        return logits[:, 1:] - logits[:, :1] if logits.shape[1] == 2 else logits

    def losses(self, batch):
        """The label's token, and the teacher's rationale after it."""
        ids, mask = self._left(batch)
        label = batch.y[:, 0].long()
        said, said_mask = self._rationale(batch)
        answer = self.label_ids[label][:, None]
        ids = torch.cat([ids, answer, said], 1)
        mask = torch.cat([mask, torch.ones_like(answer, dtype=torch.bool), said_mask], 1)
        n_last = said.shape[1] + 2  # before the label, before every word, and after the last
        logits = self.encoders["prompt"](ids, mask, n_last)
        weight = batch.weight
        classes = torch.from_numpy(self.target.class_weight).to(weight)
        weight = weight * classes[label]
        each = F.cross_entropy(logits[:, 0], answer[:, 0], reduction="none")
        terms = {"label": (each * weight).sum() / weight.sum().clamp(min=1e-12)}
        if said.shape[1]:
            each = F.cross_entropy(logits[:, 1:-1].transpose(1, 2), said, reduction="none")
            keep = said_mask * batch.weight[:, None]
            mean = (each * keep).sum() / keep.sum().clamp(min=1e-12)
            terms["rationale"] = self.rationale_weight * mean
        return terms

    def _left(self, batch):
        """Prompts moved to the right end, so that all answers stand in one place."""
        ids, mask = batch.inputs["prompt"]["ids"], batch.inputs["prompt"]["ids_mask"]
        order = mask.long().argsort(dim=1, stable=True)  # padding first, words in their order
        ids = torch.where(mask, ids, torch.full_like(ids, self.pad))
        return ids.gather(1, order), mask.gather(1, order)

    def _rationale(self, batch):
        inputs = batch.inputs["prompt"]
        if "rationale" not in inputs or not inputs["rationale_mask"].any():
            ids = inputs["ids"][:, :0]
            return ids, ids.bool()
        return inputs["rationale"], inputs["rationale_mask"]

    def lr_scale_at(self, progress):
        return min(1.0, (progress + 1e-3) / 0.1) * (1 - 0.9 * progress)

    def state_dict(self, *args, **kwargs):
        state = super().state_dict(*args, **kwargs)
        return {k: v for k, v in state.items() if "lora_" in k} if self.adapters else state

    def load_state_dict(self, state_dict, strict=True, assign=False):
        result = super().load_state_dict(state_dict, strict=False, assign=assign)
        lost = [name for name in result.missing_keys if "lora_" in name or not self.adapters]
        if strict and (lost or result.unexpected_keys):
            raise RuntimeError(f"The stored weights do not fit this model: {lost[:3]} are missing.")
        return result


class CausalNoteClassifier(TorchClassifier):
    """Classifier of notes by a causal language model with LoRA.

    Parameters
    ----------
    model : str
        A causal language model: a folder, or a name of the Hugging Face hub. Its files stay where
        they are; the fitted classifier holds the adapters alone and finds the model again by its
        content.
    notes : tuple of str, default=("note",)
        Columns of notes.
    knowledge : str or None, default=None
        Column of retrieved knowledge, shown before the note.
    teacher : str or None, default=None
        Column of rationales that the model learns to write after its answer. Read in `fit` alone:
        what stands there at predict is never looked at, so it may have been written with the label
        in view.
    question : str, default="Is this patient at high risk?"
    labels : tuple of str, default=("no", "yes")
        Answers, one word per class in the order of ``classes_``.
    max_length : int, default=1024
        Tokens of a prompt.
    max_rationale : int, default=64
        Tokens of a rationale, learned or written.
    rationale_weight : float, default=0.5
        Weight of the rationale's loss beside that of the label.
    lora_rank : int, default=16
        Rank of the adapters; 0 trains the whole model.
    lora_alpha : float, default=16.0
    lora_dropout : float, default=0.0
    lora_targets : str or tuple of str, default="all-linear"
        Modules that get adapters.
    class_weight : dict, "balanced" or None, default=None
    max_epochs : int, default=3
    batch_size : int or "auto", default=8
    lr : float, default=2e-4
    weight_decay : float, default=0.01
    patience, validation_fraction, groups, checkpoint, amp, random_state, device, verbose : optional
        See `ehrfuse.base.TorchEstimator`.
    """

    pretrained, freeze, memory = None, (), None
    _nested = False

    def __init__(
        self,
        model,
        *,
        notes=("note",),
        knowledge=None,
        teacher=None,
        question="Is this patient at high risk?",
        labels=("no", "yes"),
        max_length=1024,
        max_rationale=64,
        rationale_weight=0.5,
        lora_rank=16,
        lora_alpha=16.0,
        lora_dropout=0.0,
        lora_targets="all-linear",
        class_weight=None,
        max_epochs=3,
        batch_size=8,
        lr=2e-4,
        weight_decay=0.01,
        patience=None,
        validation_fraction=None,
        groups=None,
        checkpoint=None,
        amp=False,
        random_state=None,
        device=None,
        verbose=None,
    ):
        self.model = model
        self.notes = notes
        self.knowledge = knowledge
        self.teacher = teacher
        self.question = question
        self.labels = labels
        self.max_length = max_length
        self.max_rationale = max_rationale
        self.rationale_weight = rationale_weight
        self.lora_rank = lora_rank
        self.lora_alpha = lora_alpha
        self.lora_dropout = lora_dropout
        self.lora_targets = lora_targets
        self.class_weight = class_weight
        self.max_epochs = max_epochs
        self.batch_size = batch_size
        self.lr = lr
        self.weight_decay = weight_decay
        self.patience = patience
        self.validation_fraction = validation_fraction
        self.groups = groups
        self.checkpoint = checkpoint
        self.amp = amp
        self.random_state = random_state
        self.device = device
        self.verbose = verbose

    @property
    def modalities(self):
        """The one modality: the prompt."""
        columns = [self.notes] if isinstance(self.notes, str) else list(self.notes)
        return {
            "prompt": Prompt(
                columns, self.knowledge, self.teacher, self.model, self.question, self.max_length,
                self.max_rationale, tuple(self.labels),
            )
        }  # fmt: skip

    def _own_columns(self, X, reset):
        prompt = self.modalities["prompt"]
        more = [c for c in (self.knowledge, self.teacher) if c is not None]
        if not reset and self.teacher is not None:
            X = X.assign(**{self.teacher: None})  # whatever is there, it is not looked at
        own = [*prompt.columns, *more, *([] if self.groups is None else [self.groups])]
        lost = [c for c in own if c not in X.columns and (reset or c != self.groups)]
        if lost:
            raise ValueError(f"X lacks the columns {lost}; add them, with nulls where unknown.")
        return X.reindex(columns=own)

    def _check_params(self):
        super()._check_params()
        if len(self.labels) < 2:
            raise ValueError(f"labels={self.labels!r} must be one word per class, 2 or more.")
        if self.lora_rank < 0:
            raise ValueError(f"lora_rank={self.lora_rank} must be 0 (no adapters) or more.")
        check_option(isinstance(self.model, str), "model is a name or folder", [True])

    def _make_target(self, y):
        target = super()._make_target(y)
        if target.task_names is not None or len(target.classes) != len(self.labels):
            raise ValueError(
                f"labels={self.labels!r} are {len(self.labels)} answers; y must be 1-D with as "
                "many classes."
            )
        return target

    def _make_core(self, modalities, target):
        prompt = modalities["prompt"]
        info = prompt._info()
        model = _hub_causal.copy_causal(info)
        if self.lora_rank:
            _hub.add_lora(
                model, self.lora_rank, self.lora_alpha, self.lora_dropout, self.lora_targets
            )
        pad = _hub.open_tokenizer(info, prompt.length_)[1].pad
        reader = CausalReader(model, _hub.text_size(info))
        return CausalCore(
            reader, target, prompt.label_ids_, pad, self.rationale_weight, bool(self.lora_rank)
        )

    def write_rationales(self, X):
        """What the model writes after the answer that it thinks most likely.

        Parameters
        ----------
        X : DataFrame

        Returns
        -------
        rationales : list of str
        """
        guess = self.predict_proba(X).argmax(1)
        prompt = self.modalities_["prompt"]
        ids, offsets = prompt.transform(self._frame(X, reset=False)).ragged["ids"]
        rows = [
            [*ids[a:b], prompt.label_ids_[g]]
            for a, b, g in zip(offsets[:-1], offsets[1:], guess, strict=True)
        ]
        core = self.module_.eval()
        model = core.encoders["prompt"].model
        return _hub_causal.continue_ids(
            model, rows, prompt._tokenizer(), core.pad, self.max_rationale
        )
