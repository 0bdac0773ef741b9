"""What a run reads of its text: batches to train on, and some to validate on."""

from collections.abc import Sequence

import numpy as np

from longreach.data.batches import Batches, BatchSource
from longreach.data.mix import MixedBatches
from longreach.data.prepare import PreparedData
from longreach.data.sequences import Blocks, PackedDocuments
from longreach.data.stream import StreamBatches, TextStream
from longreach.train.config import TrainConfig
from longreach.train.parallel import Ranks

VALIDATION_TOKENS = 1 << 17
"""How much of the validation text `validate_every` measures the loss on, about."""


def training_batches(config: TrainConfig, prepared: PreparedData, ranks: Ranks) -> BatchSource:
    """What a run is trained on.

    Raises:
        ValueError: the text is too short for one sequence, or sequences for what is mixed in.
    """
    text, tokenizer, length = prepared.train, prepared.tokenizer, config.train_length
    batches: BatchSource
    if isinstance(text, TextStream):
        batches = StreamBatches(text, tokenizer, length, config.batch_size, config.seed, config.packing, ranks)
    elif config.packing == "documents":
        batches = Batches(PackedDocuments(text, length, tokenizer.eos_id), config.batch_size, config.seed)
    else:
        batches = Batches(Blocks(text, length), config.batch_size, config.seed)
    return MixedBatches(batches, length, config.mix, tokenizer, config.seed) if config.mix else batches


def validation_batches(config: TrainConfig, prepared: PreparedData, ranks: Ranks) -> Sequence[np.ndarray]:
    """This rank's part of the validation text, up to `VALIDATION_TOKENS` of it, in as many batches on each rank.

    Raises:
        ValueError: it is too short for one batch.
    """
    length, size = config.train_length, config.batch_size
    count = min((len(prepared.valid) - 1) // (length * size), max(1, VALIDATION_TOKENS // (length * size)))
    if not count:
        raise ValueError(
            f"validate_every={config.validate_every}: the validation text of {len(prepared.valid)} tokens is less than "
            f"a batch of {size} x {length}; give more text, a larger --valid-fraction, or leave it out"
        )
    rows = ranks.rows(size, config.context_parallel)
    starts = [(batch * size + row) * length for batch in range(count) for row in rows]
    sequences = np.stack([prepared.valid.read(start, start + length + 1) for start in starts])
    return np.split(sequences, count)
