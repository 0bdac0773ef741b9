"""What was measured, in memory and as `results.json`."""

from longreach.results.document import Results
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
    "OffsetRecord",
    "Provenance",
    "Record",
    "Results",
    "RetrievalRecord",
    "Skipped",
    "SummaryRecord",
    "TrainingRecord",
]
