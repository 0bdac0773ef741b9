"""What was measured, in memory and as `results.json`."""

from longreach.results.document import Results, read_training, write_training
from longreach.results.exchanged import Exchanged
from longreach.results.merge import merge
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
from longreach.results.seeds import OverSeeds, loss_difference, over_seeds
from longreach.results.start import Start

__all__ = [
    "PROTOCOLS",
    "Cell",
    "ContextRecord",
    "DecompositionRecord",
    "Entry",
    "Exchanged",
    "Model",
    "OffsetRecord",
    "OverSeeds",
    "Provenance",
    "Record",
    "Results",
    "RetrievalRecord",
    "Scored",
    "Skipped",
    "Start",
    "SummaryRecord",
    "TrainingRecord",
    "loss_difference",
    "merge",
    "over_seeds",
    "read_training",
    "write_training",
]
