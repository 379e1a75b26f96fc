"""Methods: one paper, one file. Adding one is a file and two lines here."""

from ehrfuse.methods import fusion, knowledge_risk, mmnar, rapt, sequence, visit_gan
from ehrfuse.methods.fusion import *
from ehrfuse.methods.knowledge_risk import *
from ehrfuse.methods.mmnar import *
from ehrfuse.methods.rapt import *
from ehrfuse.methods.sequence import *
from ehrfuse.methods.visit_gan import *

__all__ = [
    *fusion.__all__,
    *knowledge_risk.__all__,
    *mmnar.__all__,
    *rapt.__all__,
    *sequence.__all__,
    *visit_gan.__all__,
]
