"""One entry of each kind, with figures that agree, and functions that make more of them."""

from dataclasses import replace

from longreach.results import (
    ContextRecord,
    DecompositionRecord,
    Model,
    OffsetRecord,
    Provenance,
    Record,
    Results,
    RetrievalRecord,
    Skipped,
    Start,
    SummaryRecord,
    TrainingRecord,
)

START = Start(
    time="2026-02-03T04:05:06+00:00",
    longreach="0.1.0",
    torch="2.13.0",
    python="3.12.3",
    platform="Linux",
    device="cpu",
    num_threads=2,
    git_commit=None,
    host="here",
    pid=7,
    options={"cache": "tokens"},
)

PROVENANCE = Provenance(
    starts=(START,),
    split_seed=0,
    corpus="stdlib",
    corpus_hash="c0",
    tokenizer_hash="70",
    vocab_size=4096,
    sources={"runs/alibi": "ab12"},
    config={"valid_lengths": (128, 256), "data": None, "lr": 1e-3},
)


ALIBI = Model("alibi", 128, seed=0)


def record(method="alibi", valid_length=128, *, train_length=128, seed=0, **changes):
    fields = {
        "model": Model(method, train_length, seed),
        "valid_length": valid_length,
        "stride": valid_length,
        "protocol": "nonoverlapping",
        "nll": 431.75,
        "tokens": 100,
        "bytes": 400,
        "words": None,
        "mean_context": 63.5,
        "seconds": 0.01,
        "peak_memory": None,
        "attention": "sdpa",
    }
    return Record(**(fields | changes))


def skipped(method="learned", valid_length=256, *, train_length=128, seed=0):
    return Skipped(
        task="perplexity",
        model=Model(method, train_length, seed),
        valid_length=valid_length,
        stride=valid_length,
        protocol="nonoverlapping",
        reason="its table ends at 128",
    )


TRAINING = TrainingRecord(
    model=ALIBI,
    steps=10,
    tokens=1280,
    parameters=1000,
    final_loss=4.5,
    seconds=1.4,
    peak_memory=2**20,
    attention="sdpa",
)
CONTEXT = ContextRecord(
    model=ALIBI,
    valid_length=256,
    first_context=65,
    last_context=128,
    tokens=100,
    nll=425.0,
    low=4.0,
    high=4.5,
    resampled="35 documents",
)
DECOMPOSITION = DecompositionRecord(
    model=ALIBI,
    valid_length=256,
    stride=16,
    capped_context=120.5,
    tokens=100,
    base_nll=430.0,
    capped_nll=427.0,
    long_nll=425.0,
    relief_low=0.02,
    relief_high=0.04,
    beyond_low=0.01,
    beyond_high=0.03,
    resampled="35 documents",
)
OFFSET = OffsetRecord(model=ALIBI, valid_length=128, offset=64, tokens=100, nll=431.0)
RETRIEVAL = RetrievalRecord(
    task="lines",
    model=ALIBI,
    valid_length=512,
    depth=0.25,
    cases=10,
    correct=7,
    mean_tokens=500.5,
    seconds=1.5,
)
SUMMARY = SummaryRecord(
    model=ALIBI,
    valid_length=1024,
    cases=35,
    truncated=12,
    rouge1=0.166,
    rouge1_low=0.15,
    rouge1_high=0.18,
    rouge2=0.04,
    rouge2_low=None,
    rouge2_high=None,
    rougeL=0.1,
    rougeL_low=0.09,
    rougeL_high=0.11,
    seconds=90.0,
)
ENTRIES = (record(), CONTEXT, DECOMPOSITION, OFFSET, RETRIEVAL, SUMMARY, skipped())
RESULTS = Results(provenance=PROVENANCE).add(TRAINING, *ENTRIES)


def at_seed(entry, seed):
    """The same, of a model of another seed."""
    return replace(entry, model=replace(entry.model, seed=seed))
