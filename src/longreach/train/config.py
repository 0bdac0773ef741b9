"""What a training run is made of, and its file."""

import math
import re
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate, pairwise
from typing import Any, Literal

from longreach.data.mix import parse_mix
from longreach.data.prepare import DataConfig
from longreach.models.config import ARCHITECTURES, Architecture, ModelConfig
from longreach.reading import refuse_below, refuse_repeats
from longreach.results import Model


@cache
def parse_curriculum(stages: tuple[str, ...]) -> tuple[tuple[int, float], ...]:
    """The length in tokens and the percentage of the steps of each LENGTH:SHARE%; ValueError for what is none."""
    given = f"curriculum={','.join(stages)}"
    parsed = []
    for stage in stages:
        match = re.fullmatch(r"([1-9][0-9]*):([0-9]+(?:\.[0-9]+)?)%", stage, re.ASCII)
        if match is None or not 0 < float(match[2]) <= 100:
            raise ValueError(f"{given}: give LENGTH:SHARE% for each, as in 512:90%,2048:10%")
        parsed.append((int(match[1]), float(match[2])))
    if parsed and not math.isclose(sum(share for _, share in parsed), 100):
        raise ValueError(f"{given}: its shares are {sum(share for _, share in parsed):g}% in all; give 100%")
    return tuple(parsed)


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained. What `may_differ` from one start of a run to the next changes no result."""

    train_length: int = 128
    """L, the length in tokens of the training sequences."""
    curriculum: tuple[str, ...] = ()
    """Lengths that one run goes through, each for its share of the steps, as in 512:90%,2048:10%. The longest is L,
    whose sequences are cut into shorter ones, so that a batch keeps its tokens."""
    packing: Literal["blocks", "documents"] = "blocks"
    """What they are: blocks of L tokens of the text, whatever documents these are of, or whole documents, packed, none
    of which sees another; one that is longer than L is cut into pieces."""
    steps: int = 600
    """Number of optimizer steps."""
    batch_size: int = 8
    """Sequences per optimizer step, over all processes."""
    accumulation: int = 1
    """Into how many parts a batch, or a process's share of it, is split, one after the other, to save memory."""
    learning_rate: float = 4e-3
    """Peak learning rate of AdamW, reached after the warm-up."""
    warmup_steps: int = 40
    """Steps over which the learning rate rises linearly from 0."""
    final_learning_rate: float = 0.1
    """Where the cosine ends, as a fraction of the peak."""
    weight_decay: float = 0.1
    """Weight decay of matrices; embeddings, biases and norms have none."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of AdamW's two averages."""
    gradient_clip: float = 1.0
    """Largest norm of the gradient."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16 runs under autocast, weights staying in fp32; auto is bf16 on CUDA devices that have it, else fp32."""
    compile: bool = field(default=False, metadata={"may_differ": True})
    """Whether to run each block of the model through torch.compile."""
    recompute: bool = field(default=False, metadata={"may_differ": True})
    """Whether to compute each block again for its gradient rather than to keep what it computed, to save memory."""
    checkpoint_every: int = field(default=50, metadata={"may_differ": True})
    """Steps between checkpoints."""
    keep_checkpoints: int = field(default=1, metadata={"may_differ": True})
    """How many of the last checkpoints are kept."""
    async_checkpoint: bool = field(default=False, metadata={"may_differ": True})
    """Whether to write checkpoints while training goes on, from a copy in memory."""
    validate_every: int | None = field(default=None, metadata={"may_differ": True})
    """Steps between measurements of the loss on the validation text, for metrics.jsonl; never when not given."""
    sample_every: int | None = field(default=None, metadata={"may_differ": True})
    """Steps between short texts that the model writes, for metrics.jsonl; never when not given."""
    on_full_disk: Literal["stop", "continue"] = field(default="stop", metadata={"may_differ": True})
    """What to do where there is no room for a checkpoint: the one before is kept."""
    track: tuple[Literal["tensorboard", "trackio", "wandb"], ...] = field(default=(), metadata={"may_differ": True})
    """Where what metrics.jsonl has of each step is shown too, with the configuration."""
    peak_flops: float | None = field(default=None, metadata={"may_differ": True})
    """FLOP/s that a device can reach, of which model FLOP utilisation is a fraction; when not given, in bf16 by the
    data sheets of some NVIDIA GPUs, else unknown. A token counts 6 x weights + 12 x layers x width x train_length."""
    device: str = field(default="auto", metadata={"may_differ": True})
    """Where to run: cpu, cuda, cuda:1, ...; auto is cuda where there is one."""
    parallel: Literal["auto", "none", "ddp", "fsdp"] = field(default="auto", metadata={"may_differ": True})
    """How the processes of torchrun share the work: under ddp each has all weights, under fsdp a part of each. auto is
    ddp where torchrun started several."""
    context_parallel: int = field(default=1, metadata={"may_differ": True})
    """How many processes share each sequence, a piece of it each; the others have other sequences."""
    seed: int = 0
    """Seed of the weights, the order of batches, what is mixed in and dropout; of the split of the text too, where
    split_seed is not given."""
    mix: tuple[str, ...] = ()
    """Synthetic sequences among those of the text, as NAME=SHARE of all: retrieval=0.2."""

    def __post_init__(self) -> None:
        refuse_below(self, 1, "train_length", "steps", "batch_size", "accumulation", "context_parallel")
        refuse_below(self, 1, "checkpoint_every", "keep_checkpoints", "validate_every", "sample_every")
        refuse_below(self, 0, "seed", "weight_decay")
        refuse_repeats(self, "track")
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"accumulation={self.accumulation} does not divide batch_size={self.batch_size}: change one"
            )
        for name in ("learning_rate", "gradient_clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: give a positive number")
        if self.peak_flops is not None and not 1 <= self.peak_flops <= 1e30:
            raise ValueError(f"peak_flops={self.peak_flops}: give a number from 1 to 1e30")
        if not 0 <= self.warmup_steps <= self.steps:
            raise ValueError(f"warmup_steps={self.warmup_steps}: give at least 0 and at most steps={self.steps}")
        if not 0 <= self.final_learning_rate <= 1:
            raise ValueError(f"final_learning_rate={self.final_learning_rate}: give a fraction of the peak, 0 to 1")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={','.join(map(str, self.betas))}: give two numbers of at least 0 and below 1")
        parse_mix(self.mix)
        self._check_curriculum()
        shortest = min((length for length, _ in parse_curriculum(self.curriculum)), default=self.train_length)
        if self.context_parallel > shortest:
            raise ValueError(
                f"context_parallel={self.context_parallel} with sequences of {shortest} tokens: give at most so many"
            )

    def length_at(self, step: int) -> int:
        """The length in tokens of the sequences of step 0, 1, ...: L without a curriculum."""
        for (length, _), end in zip(parse_curriculum(self.curriculum), self._ends(), strict=True):
            if step < end:
                return length
        return self.train_length

    def _ends(self) -> list[int]:
        """How many steps are done at the end of each stage of the curriculum."""
        shares = accumulate(share for _, share in parse_curriculum(self.curriculum))
        return [round(share / 100 * self.steps) for share in shares]

    def _check_curriculum(self) -> None:
        stages = parse_curriculum(self.curriculum)
        if not stages:
            return
        given = f"curriculum={','.join(self.curriculum)}"
        longest = max(length for length, _ in stages)
        if longest != self.train_length:
            raise ValueError(f"{given}: its longest is {longest} and train_length={self.train_length}: give the same")
        for length, _ in stages:
            if self.train_length % length:
                raise ValueError(f"{given}: {length} does not divide {longest}, the longest: change one of them")
        for (length, share), (start, end) in zip(stages, pairwise([0, *self._ends()]), strict=True):
            if start == end:
                raise ValueError(
                    f"{given}: {length}:{share:g}% has none of steps={self.steps}, by whole steps: give it more"
                )
        if self.mix:
            raise ValueError(f"{given} would cut what is mixed in (mix={','.join(self.mix)}): leave one of them out")

    @property
    def packed_length(self) -> int | None:
        """Tokens of packed documents that one process computes at a time; None where documents are not packed."""
        return self.batch_size // self.accumulation * self.train_length if self.packing == "documents" else None


@dataclass(frozen=True)
class RunConfig:
    """One training run: a method, the data, the model and the training."""

    start_from: str | None = None
    """Weights to start from (--from): the folder of a finished run, or a Hugging Face model as a folder or a name on
    the hub, which is given ALiBi. Its data, tokenizer, shape, method and train_length are then the defaults. The shape
    of a Hugging Face model is its own, that of this configuration is not used. New weights when None."""
    method: str = "alibi"
    """The position method, with options as in rotary:base=500000."""
    longest_length: int | None = None
    """The longest length in tokens that the model is meant for; L when None."""
    data: DataConfig = DataConfig()
    """The text."""
    model: Architecture = ARCHITECTURES["demo"]
    """The shape."""
    train: TrainConfig = TrainConfig()
    """The training."""

    def __post_init__(self) -> None:
        # Refuse what does not fit together before any data is read. A given tokenizer's size is not known yet.
        self.model_config(self.data.vocab_size if self.data.tokenizer is None else 1)

    @property
    def identity(self) -> Model:
        """Which model it trains, in results."""
        return Model(self.method, self.train.train_length, self.train.seed)

    def model_config(self, vocab_size: int) -> ModelConfig:
        """The model that is trained, given its tokenizer's V."""
        return ModelConfig(
            **vars(self.model),
            vocab_size=vocab_size,
            method=self.method,
            train_length=self.train.train_length,
            longest_length=self.longest_length,
        )


PRESETS: dict[str, dict[str, Any]] = {
    "demo": {},
    # The ALiBi paper's WikiText-103 model and batch, for its length L = 512; it was trained with Nesterov momentum.
    "wikitext103-247m": {
        "model": ARCHITECTURES["wikitext103-247m"],
        "data": DataConfig(vocab_size=44288),
        "train": TrainConfig(
            train_length=512, steps=286000, batch_size=18, learning_rate=3e-4, warmup_steps=16000, gradient_clip=0.1
        ),
    },
    # The ALiBi paper's largest model: 50k updates.
    "cc100-1.3b": {
        "model": ARCHITECTURES["cc100-1.3b"],
        "data": DataConfig(vocab_size=50257),
        "train": TrainConfig(
            train_length=512, steps=50000, batch_size=512, accumulation=32, learning_rate=2e-4, warmup_steps=2000
        ),
    },
}
"""Named starting values of a run: whole sections that replace the defaults."""
