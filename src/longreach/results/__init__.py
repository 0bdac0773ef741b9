"""What was measured, in memory and as `results.json`."""

from longreach.results.document import Results, read_training, write_training
from longreach.results.model import Model
from longreach.results.records import (
    PROTOCOLS,
    Cell,
    ContextRecord,
    DecompositionRecord,
    Entry,
    OffsetRecord,
    Provenance,
    Record,
    RetrievalRecord,
    Scored,
    Skipped,
    SummaryRecord,
    TrainingRecord,
)

__all__ = [
    "PROTOCOLS",
    "Cell",
    "ContextRecord",
    "DecompositionRecord",
    "Entry",
    "Model",
    "OffsetRecord",
    "Provenance",
    "Record",
    "Results",
    "RetrievalRecord",
    "Scored",
    "Skipped",
    "SummaryRecord",
    "TrainingRecord",
    "read_training",
    "write_training",
]
