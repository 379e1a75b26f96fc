"""Modalities: one kind of data, one file."""

from ehrfuse.modalities._base import Modality
from ehrfuse.modalities._convert import EventsToVisits, VisitsToEvents
from ehrfuse.modalities._summary import EventSummary
from ehrfuse.modalities.labs import Labs
from ehrfuse.modalities.sequences import Events, Visits
from ehrfuse.modalities.tabular import TabNetTabular, Tabular
from ehrfuse.modalities.text import Text
from ehrfuse.modalities.vectors import Embedding, Image

__all__ = [
    "Embedding",
    "EventSummary",
    "Events",
    "EventsToVisits",
    "Image",
    "Labs",
    "Modality",
    "TabNetTabular",
    "Tabular",
    "Text",
    "Visits",
    "VisitsToEvents",
]
