"""Methods: one paper, one file. Adding one is a file and two lines here."""

from ehrfuse.methods import clinical_scores, fusion, knowledge_risk, mmnar
from ehrfuse.methods.clinical_scores import *
from ehrfuse.methods.fusion import *
from ehrfuse.methods.knowledge_risk import *
from ehrfuse.methods.mmnar import *

__all__ = [*clinical_scores.__all__, *fusion.__all__, *knowledge_risk.__all__, *mmnar.__all__]
