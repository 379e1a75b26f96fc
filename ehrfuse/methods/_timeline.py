"""What the sequence methods share: events become visits, visits of all modalities one timeline.

Axes: b - batch, e - ensemble members, v - visits, f - numbers, d - d_model, s - side vectors.
"""

import copy
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from sklearn.utils.validation import check_is_fitted
from torch import nn

from ehrfuse.modalities import Events, Labs, Tabular, Visits
from ehrfuse.modalities._base import check_count
from ehrfuse.modalities._visits import check_width
from ehrfuse.modalities.sequences import EventVisits
from ehrfuse.nn.core import Core
from ehrfuse.nn.fusion import blank, masked_mean
from ehrfuse.nn.timeline import Stream, Timeline, VisitInput, features, fill, merge

HOURS = {"min": 1 / 60, "h": 1.0, "d": 24.0, "w": 168.0}
READS = (Tabular, Labs, Events, Visits)
BIN, MAX_VISITS = 1.0, 64


class Track(NamedTuple):
    """Where the visits of one modality come from and how they are named."""

    name: str
    clock: float  # units of the timeline per unit of the block's time
    numbers: list[str]
    codes: list[str]
    unit: str
    now: float


def as_visits(modality, width, max_visits):
    """A declared `Events` as visits; anything else as it is."""
    if not isinstance(modality, Events):
        return modality
    params = {"bin": BIN, "max_visits": MAX_VISITS} | modality.get_params()
    params |= {} if width is None else {"bin": width}
    params |= {} if max_visits is None else {"max_visits": max_visits}
    return EventVisits(**params)


def tracks(modalities):
    """Tracks of all modalities that have visits; the first sets the unit of time."""
    found = []
    for name, m in modalities.items():
        if isinstance(m, Events | Visits):
            hours = HOURS[m.time_unit] * (m.time_scale_ if isinstance(m, Visits) else 1.0)
            first = HOURS[found[0].unit] if found else HOURS[m.time_unit]
            numbers = m.codes_ if isinstance(m, Events) else m.numeric_fields_
            codes = [] if isinstance(m, Events) else m.codes_
            unit = found[0].unit if found else m.time_unit
            found.append(Track(name, hours / first, list(numbers), list(codes), unit, m.now))
    return found


class TimelineMixin:
    """Estimators over timelines: `bin`, `max_visits`, and events as visits."""

    _accepts = READS

    def _check_params(self):
        super()._check_params()
        if self.bin is not None:
            check_width(self.bin)
        if self.max_visits is not None:
            check_count(self.max_visits, "max_visits")

    def _declared(self, X):
        declared = super()._declared(X)
        return {n: as_visits(m, self.bin, self.max_visits) for n, m in declared.items()}

    def _views(self, X, method, n_rows=64):
        """Row numbers and what a method of the core gives for them, some rows at a time."""
        check_is_fitted(self)
        data = self._data(self._frame(X, reset=False))
        core = copy.deepcopy(self.module_).cpu().double().eval()
        for rows in np.array_split(np.arange(len(data)), -(-len(data) // n_rows)):
            batch = data.batch(rows).to(torch.device("cpu"), torch.float64)
            with torch.no_grad():
                yield rows, getattr(core, method)(batch)

    def _attention_frame(self, X):
        now = self.module_.tracks[0].now
        frames = [
            visit_frame(rows, line, weight[..., None], [("", "(visit)")], now)
            for rows, (line, weight) in self._views(X, "attention")
        ]
        return pd.concat(frames, ignore_index=True)


def visit_frame(rows, line, parts, names, now):
    """Long frame of parts (b, v, n): a line per row, real visit and (modality, feature) of names.

    Features that say nothing in a visit (weight exactly 0) are left out, whole visits are not.
    """
    whole = torch.tensor([feature == "(visit)" for _, feature in names])
    kept = line.mask[..., None] & ((parts != 0) | whole)
    row, visit, feature = (index.numpy() for index in kept.nonzero().unbind(1))
    modality, label = (np.array([n[i] for n in names], dtype=object)[feature] for i in (0, 1))
    return pd.DataFrame(
        {
            "row": rows[row],
            "visit": visit,
            "time": line.time.numpy()[row, visit] + now,
            "modality": modality,
            "feature": label,
            "weight": parts[kept].numpy(),
        }
    )


class TimelineCore(Core):
    """A core whose encoders are visit inputs for modalities with visits, else table encoders.

    `merge` makes one timeline of a batch, `embed` the vectors of its visits, `side` the vectors of
    what has no time.
    """

    def __init__(self, modalities, d_model, n_members, trunk, heads):
        self.n_side = sum(not isinstance(m, Events | Visits) for m in modalities.values())
        super().__init__(_encoders(modalities, d_model, n_members), trunk, heads, n_members)
        self.tracks = tracks(modalities)
        self.d_model = d_model
        timed = {track.name for track in self.tracks}
        self.static = [name for name in modalities if name not in timed]

    @property
    def widths(self):
        """Numbers of every track."""
        return [len(track.numbers) for track in self.tracks]

    def timeline(self, batch):
        """All visits of a batch; without any modality of visits, a timeline of none."""
        if not self.tracks:
            return self._no_visits(batch)
        streams = [self._stream(batch.inputs[track.name], track) for track in self.tracks]
        return merge(streams, [len(track.codes) for track in self.tracks])

    def _stream(self, x, track):
        codes = (x["code"], x["code_visit"], x["code_mask"]) if "code" in x else None
        return Stream(-x["time"] * track.clock, x["time_mask"], x["numbers"], codes)

    def _no_visits(self, batch):
        like = next(iter(self.parameters()))
        empty = like.new_zeros(len(next(iter(batch.present.values()))), 1)
        none = empty[..., None][..., :0]
        return Timeline(empty, empty.bool(), none, none.bool(), none)

    def embed(self, line, filled=None):
        """Vectors of the visits: (b, v, d)."""
        x = features(line, fill(line) if filled is None else filled)
        words = line.words.split([len(track.codes) for track in self.tracks], -1)
        vectors = line.time.new_zeros(*line.time.shape, self.d_model)
        parts = x.split(self.widths, -1) if self.tracks else ()
        for track, part, said in zip(self.tracks, parts, words, strict=True):
            vectors = vectors + self.encoders[track.name](part.flatten(2), said)
        return vectors

    def side(self, batch):
        """Vectors of modalities without time (b * e, s, d) and which are there (b * e, s)."""
        vectors, here = [], []
        for name in self.static:
            vector, keep = self.one_vector(self.encoders[name], batch, name)
            vectors.append(vector)
            here.append(keep)
        if not vectors:
            like = next(iter(self.parameters()))
            rows = len(next(iter(batch.present.values()))) * self.n_members
            return like.new_zeros(rows, 0, self.d_model), like.new_zeros(rows, 0).bool()
        return torch.stack(vectors, 1), torch.stack(here, 1)

    def one_vector(self, encoder, batch, name, key=None):
        """One modality's vector (b * e, d) and presence; what stands under a null cell is blank."""
        keep = batch.present[name]
        inputs = batch.inputs[name] if key is None else {"values": batch.inputs[name][key]}
        x, mask = encoder({k: blank(t, keep) for k, t in inputs.items()})
        if key is None and name in self.spread:
            x, mask = self.spread[name](x), mask.repeat_interleave(self.n_members, 0)
        keep = keep.repeat_interleave(self.n_members, 0)
        return masked_mean(blank(x, keep), blank(mask, keep)), keep


def _encoders(modalities, d_model, n_members):
    encoders = {}
    for name, m in modalities.items():
        if isinstance(m, Events):
            encoders[name] = VisitInput(len(m.codes_), 0, d_model)
        elif isinstance(m, Visits):
            encoders[name] = VisitInput(len(m.numeric_fields_), len(m.codes_), d_model)
        else:
            encoders[name] = m.make_encoder(d_model, n_members)
            continue
        encoders[name].n_members = n_members  # shared by all, so that none is spread over members
    return encoders


class View(nn.Module):
    """A core whose forward is one of its other methods, for the one inference pass."""

    def __init__(self, core, method):
        super().__init__()
        self.core, self.method = core, method

    def forward(self, batch):
        """What the method gives for a batch."""
        return getattr(self.core, self.method)(batch)
