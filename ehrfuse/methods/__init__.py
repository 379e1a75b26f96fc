"""Methods: one paper, one file. Adding one is a file and two lines here."""

from ehrfuse.methods import (
    clinical_scores,
    clip_ehr,
    fusion,
    knowledge_risk,
    lab_text,
    masked_labs,
    medfuse,
    mmnar,
    note_generator,
    rapt,
    sequence,
    tabnet,
    visit_gan,
)
from ehrfuse.methods.clinical_scores import *
from ehrfuse.methods.clip_ehr import *
from ehrfuse.methods.fusion import *
from ehrfuse.methods.knowledge_risk import *
from ehrfuse.methods.lab_text import *
from ehrfuse.methods.masked_labs import *
from ehrfuse.methods.medfuse import *
from ehrfuse.methods.mmnar import *
from ehrfuse.methods.note_generator import *
from ehrfuse.methods.rapt import *
from ehrfuse.methods.sequence import *
from ehrfuse.methods.tabnet import *
from ehrfuse.methods.visit_gan import *

__all__ = [
    *clinical_scores.__all__,
    *clip_ehr.__all__,
    *fusion.__all__,
    *knowledge_risk.__all__,
    *lab_text.__all__,
    *masked_labs.__all__,
    *medfuse.__all__,
    *mmnar.__all__,
    *note_generator.__all__,
    *rapt.__all__,
    *sequence.__all__,
    *tabnet.__all__,
    *visit_gan.__all__,
]
