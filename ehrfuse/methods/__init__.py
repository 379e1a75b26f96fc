"""Methods: one paper, one file. Adding one is a file and two lines here."""

from ehrfuse.methods import fusion, masked_labs, mmnar
from ehrfuse.methods.fusion import *
from ehrfuse.methods.masked_labs import *
from ehrfuse.methods.mmnar import *

__all__ = [*fusion.__all__, *masked_labs.__all__, *mmnar.__all__]
