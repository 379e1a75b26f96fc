"""Medical knowledge beside the record: a graph of facts, linking to it, retrieval from it."""

from ehrfuse.knowledge.graph import KnowledgeGraph
from ehrfuse.knowledge.linking import CodeLinker, Mention, NoteLinker
from ehrfuse.knowledge.retrieval import Retrieved, Retriever

__all__ = ["CodeLinker", "KnowledgeGraph", "Mention", "NoteLinker", "Retrieved", "Retriever"]
