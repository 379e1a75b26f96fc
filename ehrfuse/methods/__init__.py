"""Methods: one paper, one file. Adding one is a file and two lines here."""

from ehrfuse.methods import fusion, mmnar, tabnet
from ehrfuse.methods.fusion import *
from ehrfuse.methods.mmnar import *
from ehrfuse.methods.tabnet import *

__all__ = [*fusion.__all__, *mmnar.__all__, *tabnet.__all__]
