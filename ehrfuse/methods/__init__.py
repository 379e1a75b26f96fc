"""Methods: one paper, one file. Adding one is a file and two lines here."""

from ehrfuse.methods import clip_ehr, fusion, mmnar, tabnet
from ehrfuse.methods.clip_ehr import *
from ehrfuse.methods.fusion import *
from ehrfuse.methods.mmnar import *
from ehrfuse.methods.tabnet import *

__all__ = [*clip_ehr.__all__, *fusion.__all__, *mmnar.__all__, *tabnet.__all__]
