"""Modalities: one kind of data, one file."""

from ehrfuse.modalities._base import Modality
from ehrfuse.modalities._summary import EventSummary
from ehrfuse.modalities.labs import Labs
from ehrfuse.modalities.sequences import Events, Visits
from ehrfuse.modalities.tabular import Tabular

__all__ = ["EventSummary", "Events", "Labs", "Modality", "Tabular", "Visits"]
