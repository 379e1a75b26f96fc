"""Methods: one paper, one file. Adding one is a file and two lines here."""

from ehrfuse.methods import fusion, lab_text, masked_labs, medfuse, mmnar
from ehrfuse.methods.fusion import *
from ehrfuse.methods.lab_text import *
from ehrfuse.methods.masked_labs import *
from ehrfuse.methods.medfuse import *
from ehrfuse.methods.mmnar import *

__all__ = [
    *fusion.__all__,
    *lab_text.__all__,
    *masked_labs.__all__,
    *medfuse.__all__,
    *mmnar.__all__,
]
