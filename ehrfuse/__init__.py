"""scikit-learn estimators for multimodal electronic health records.

X is a pandas DataFrame with one row per prediction; a missing modality is a null cell.
"""

from importlib.metadata import version as _version

from ehrfuse._saving import LoadError, load, save
from ehrfuse.knowledge import KnowledgeGraph
from ehrfuse.methods import *
from ehrfuse.methods import __all__ as _methods
from ehrfuse.modalities import *
from ehrfuse.modalities import __all__ as _modalities
from ehrfuse.rectifier import Rectifier

__version__ = _version("ehrfuse")
__all__ = sorted(
    [*_methods, *_modalities, "KnowledgeGraph", "LoadError", "Rectifier", "load", "save"]
)
