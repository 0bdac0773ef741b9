"""Texts in, vectors out."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longreach.encoders.packing import Packed
from longreach.encoders.texts import Texts, read_texts
from longreach.ops.arguments import shown, validate_integer

TOKENS_PER_BATCH = 2**14
"""The most tokens of a batch of several texts: what the MLP makes of so many takes some hundred MiB in a base model."""

CHARS_PER_TOKEN = 16
"""How much of a text is read at first for each token that is wanted: the library takes 400 bytes for every token."""

SPARE_TOKENS = 256
"""How many tokens must follow those that are wanted where a text is read in part, for a cut changes tokens before it.

WordPiece takes a word of over 100 characters for one unknown token, so that 100 tokens of a word are none in the end;
an added token that is cut makes up to one token a byte. BPE and Unigram choose anew ten tokens before a cut at the
most, as was measured on words, on random DNA and on repeats."""

Progress = Callable[[int, int], None]
"""Told how many texts of how many are done."""


def encode(
    model: Any,
    texts: Sequence[str],
    *,
    max_length: int | None,
    batch_size: int,
    normalize: bool | None,
    progress: bool | Progress,
) -> Tensor:
    """What `EncoderModel.encode` documents."""
    _require_texts(texts)
    mend = "an integer of at least 1 and below 2**63"
    batch_size = validate_integer("batch_size", batch_size, 1, mend)
    if max_length is not None:
        max_length = validate_integer("max_length", max_length, 1, mend)
    if not isinstance(normalize, bool | None):
        raise ValueError(f"normalize={shown(normalize)}: give True or False, or None for what the files say")
    if not callable(progress) and not isinstance(progress, bool):
        raise ValueError(f"progress={shown(progress)}: give True or False, or a function of two numbers of texts")
    reader = texts_of(model)
    length = max_length or reader.max_length or model.sizes.longest
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]), reverse=True)
    vectors = torch.zeros(len(texts), model.config.hidden_size)
    with _evaluating(model), _told(progress) as tell, torch.inference_mode():
        for first in range(0, len(order), batch_size):
            chosen = order[first : first + batch_size]
            ids = tokenize(model, [texts[i] for i in chosen], length=length)
            for part in _batches([len(row) for row in ids]):
                packed = Packed(tuple(len(ids[row]) for row in part))
                flat = torch.tensor([token for row in part for token in ids[row]], dtype=torch.int64)
                hidden = model.encode_packed(flat.to(model.device), packed)
                pooled = _pool(hidden, packed.lengths, reader.pooling)
                if reader.normalize if normalize is None else normalize:
                    pooled = F.normalize(pooled, dim=-1)
                vectors[[chosen[row] for row in part]] = finite = pooled.cpu()
                if not finite.isfinite().all():
                    raise ValueError(
                        f"its vectors in {model.dtype} are not all finite: mend its weights, or give another dtype"
                    )
            tell(first + len(chosen), len(texts))
    return vectors


def texts_of(model: Any) -> Texts:
    """What the files of a model say of texts, read when first wanted; ValueError where it came from none."""
    if model.texts is None:
        if model.source is None:
            raise ValueError("this encoder was made without files, and has no tokenizer: load it by load_encoder")
        model.texts = read_texts(model.source, model.tokenizer_source)
    texts: Texts = model.texts
    return texts


def _require_texts(texts: object) -> None:
    if isinstance(texts, str) or not isinstance(texts, Sequence):
        raise ValueError(f"texts of {type(texts).__name__}: give a list of texts")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"texts[{index}] is {type(text).__name__}: give text")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"texts[{index}] holds half a surrogate pair at character {error.start}: mend or drop it"
            ) from error


def tokenize(model: Any, texts: Sequence[str], *, length: int | None, special: bool = True) -> list[list[int]]:
    """Ids of texts by the tokenizer of a model, each cut off at a length.

    Raises:
        ValueError: there is no tokenizer, it fails or is another model's, or the length has no room for what it adds.
    """
    backend = texts_of(model).tokenizer
    added = backend.library.num_special_tokens_to_add(False) if special else 0
    if length is not None and length < added:
        raise ValueError(f"max_length={length}: its tokenizer adds {added} tokens to each text; give at least as many")
    with backend.at_work("encode the text") as tokenizer:
        tokenizer.no_truncation()
        if length is None:
            encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        else:
            enough = length + SPARE_TOKENS
            encodings = _read(tokenizer, texts, enough, CHARS_PER_TOKEN * enough)
            tokenizer.enable_truncation(length)
        ids = [tokenizer.post_process(encoding, add_special_tokens=special).ids for encoding in encodings]
    largest, vocab_size = max(map(max, filter(None, ids)), default=0), len(model.get_input_embeddings().weight)
    if largest >= vocab_size:
        raise ValueError(f"its tokenizer makes the token {largest} of vocab_size={vocab_size}: give its own tokenizer")
    return ids


def _read(tokenizer: Any, texts: Sequence[str], enough: int, chars: int) -> list[Any]:
    """Encodings of as much of each text as makes `enough` tokens, from `chars` of its characters if they do."""
    encodings = tokenizer.encode_batch_fast([text[:chars] for text in texts], add_special_tokens=False)
    for row, text in enumerate(texts):
        if len(text) > chars and len(encodings[row]) < enough:
            (encodings[row],) = _read(tokenizer, [text], enough, 2 * chars)
    return list(encodings)


def _batches(lengths: list[int]) -> Iterator[list[int]]:
    """Numbers of texts, shortest first, as many to a batch as hold TOKENS_PER_BATCH."""
    batch: list[int] = []
    tokens = 0
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and tokens + lengths[row] > TOKENS_PER_BATCH:
            yield batch
            batch, tokens = [], 0
        batch.append(row)
        tokens += lengths[row]
    yield batch


def _pool(hidden: Tensor, lengths: tuple[int, ...], pooling: str) -> Tensor:
    """Hidden states (N, C) of texts to vectors (B, C) float32; 0 for a text without tokens."""
    vectors = hidden.new_zeros(len(lengths), hidden.shape[1], dtype=torch.float32)
    for row, states in enumerate(hidden.split(lengths)):
        if len(states):
            wide = states.float()
            vectors[row] = wide.mean(dim=0) if pooling == "mean" else wide[0] if pooling == "cls" else wide.amax(dim=0)
    return vectors


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """A model without dropout for a while."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def _told(progress: bool | Progress) -> Iterator[Progress]:
    """What is to be told of progress: a bar on standard error, nobody, or who is given."""
    if not isinstance(progress, bool):
        yield progress
    elif not progress:
        yield lambda done, total: None
    else:
        from rich.console import Console
        from rich.progress import Progress as Bars

        with Bars(console=Console(stderr=True)) as bars:
            task = bars.add_task("encoding")
            yield lambda done, total: bars.update(task, completed=done, total=total)
