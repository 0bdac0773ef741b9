"""From a data source to what training and evaluation read: a tokenizer and two streams of tokens."""

import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import tokenizers

from longreach.data.cache import cached
from longreach.data.content import BadText
from longreach.data.corpora import (
    Corpus,
    Document,
    Scan,
    beginning,
    cut_text,
    first_pieces,
    idle_field,
    in_two,
    open_corpus,
    reread,
    scan,
)
from longreach.data.encoding import Encoder
from longreach.data.stream import TextStream, open_stream
from longreach.data.tokenizer import MIN_VOCAB_SIZE, Tokenizer, load_tokenizer, train_tokenizer
from longreach.data.tokens import TokenStream, find_tokens, split_documents, tokenize, tokenize_in_memory
from longreach.files import digest_of, expanded
from longreach.reading import refuse_below, refuse_empty

Progress = Callable[[str, int, int | None], None]
"""Called with a stage in words, the bytes of text done, and the bytes in all or None if unknown."""

# A vocabulary learns nothing more from more text, while the memory of training it keeps growing.
TOKENIZER_TRAINING_BYTES = 128 << 20

# How much text is read for each token that is wanted of it, several times what a token of any language holds.
EXCERPT_BYTES_PER_TOKEN = 16


@dataclass(frozen=True)
class DataConfig:
    """Which text to learn from and how to make tokens of it."""

    data: str | None = None
    """Training text: a file, folder or glob of text, JSON lines, or comma- or tab-separated tables, also packed
    by gzip, bzip2, xz or zstd, or hf:NAME[:CONFIG]; by default the source code of Python's standard library."""
    valid_data: str | None = None
    """Validation text, given as `data` is; of hf:NAME its split validation, where it has one. By default the validation
    split that comes with `data`, else some of its documents."""
    text_field: str = "text"
    """Field of a JSON line, or column of a table or a Hugging Face data set, that holds the text."""
    streaming: bool = False
    """Read and tokenize the training text, hf:NAME, while training goes on, and keep nothing of it; validation text is
    that which comes with it, or `valid_data`."""
    shuffle_buffer: int = 10_000
    """Documents of a stream, one after the other, that are shuffled among each other."""
    skip_bad: bool = False
    """Leave out files and lines that are no text, instead of refusing them; they are counted."""
    tokenizer: str | None = None
    """A tokenizer.json, a folder with one, or a name on the Hugging Face hub; by default a byte-level BPE is
    trained on the training text."""
    vocab_size: int = 1024
    """Tokens of the BPE that is trained where no tokenizer is given."""
    valid_fraction: float = 0.05
    """Share of the text, in whole documents, that is kept for validation where none is given; of a text that is one
    document its tail."""
    split_seed: int | None = None
    """Seed of the choice of those documents and of the order of the others. When not given it is the seed of training,
    so that one seed decides on all of a run; runs of several seeds share one split, that of the seed of training."""
    cache: str | None = field(default=None, metadata={"may_differ": True})
    """Folder for tokens and trained tokenizers; by default longreach in the user's cache folder."""

    def __post_init__(self) -> None:
        if self.vocab_size < MIN_VOCAB_SIZE:
            raise ValueError(f"vocab_size={self.vocab_size!r}; give a whole number of at least {MIN_VOCAB_SIZE}")
        if not 0 < self.valid_fraction < 1:
            raise ValueError(f"valid_fraction={self.valid_fraction!r}; give a number above 0 and below 1")
        refuse_empty(self, "tokenizer", "cache")
        refuse_below(self, 0, "split_seed")
        refuse_below(self, 1, "shuffle_buffer")
        if self.streaming and not (self.data or "").startswith("hf:"):
            raise ValueError("streaming=True is for Hugging Face data sets; give data=hf:NAME or leave it out")
        if self.streaming and self.skip_bad:
            raise ValueError("skip_bad=True: of a stream it is not known before training what is bad; leave it out")

    def idle(self) -> dict[str, str]:
        """Name of a field that nothing heeds beside the others -> why."""
        fields: dict[str, str] = {}
        if self.data is None and self.valid_data is None:
            fields |= dict.fromkeys(("text_field", "skip_bad"), "it is for text that is given, by data or valid_data")
        else:
            fields |= idle_field(self.text_field, self.data, self.valid_data)
        if self.tokenizer is not None:
            fields["vocab_size"] = f"it is for a tokenizer that is trained, and tokenizer={self.tokenizer} is given"
        if self.valid_data is not None:
            fields["valid_fraction"] = f"nothing is held out where valid_data={self.valid_data} is given"
        if self.streaming:
            fields |= dict.fromkeys(("valid_fraction", "split_seed"), "nothing is held out of a stream")
        else:
            fields["shuffle_buffer"] = "it is for a stream, and no streaming is asked for"
        return fields

    def seed_of_split(self, training_seed: int) -> int:
        """The seed of the split for a training of this seed."""
        return training_seed if self.split_seed is None else self.split_seed

    def cache_folder(self) -> Path:
        """The folder `cache`, or the one that the XDG base directory rules give."""
        if self.cache is not None:
            return expanded(self.cache)
        return expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "longreach"


@dataclass(frozen=True)
class ValidationData:
    """What evaluation needs to know of the text."""

    tokenizer: Tokenizer
    valid: TokenStream
    """The validation documents: shuffled where they were split off, else in the order of their source."""
    corpus_name: str
    corpus_hash: str
    """SHA-256 (hex) over the text that decides on these tokens."""
    split_off: bool
    """Whether the validation documents were split off from the others, or are a text of their own."""
    split_seed: int | None
    """What chose the validation documents among the others; None where no seed did."""
    valid_hash: str
    """Equal where two read the same validation documents in the same order, whatever their tokenizers."""

    @property
    def digests(self) -> dict[str, str]:
        """What was read, as `longreach.folder.begin` takes it."""
        return {"text": self.corpus_hash, "tokenizer": self.tokenizer.fingerprint}


@dataclass(frozen=True)
class PreparedData(ValidationData):
    """What training needs to know of the text, too; the hash is over all documents, those for validation included."""

    train: TokenStream | TextStream
    """The training documents in an order shuffled by the seed, or where they come from while training goes on."""


def prepare(config: DataConfig, seed: int, progress: Progress = lambda stage, done, total: None) -> PreparedData:
    """Read, split and tokenize the text of `config`, or find the result in the cache.

    The text is read once to fingerprint it, and again for each thing that the cache does not hold.

    Args:
        config: the sources.
        seed: of the training: that of the split too, where `config` gives none.
        progress: told of each stage as it goes on.

    Raises:
        ValueError: the text cannot be found, read or split, or the tokenizer cannot be had.
        OSError: the cache cannot be written.
    """
    if config.streaming:
        return _prepare_stream(config, progress)
    cache = config.cache_folder()
    split_seed = config.seed_of_split(seed)
    # All that can be wrong with a name comes out before any text is read, which may take minutes.
    tokenizer = None if config.tokenizer is None else load_tokenizer(config.tokenizer)
    corpus = _open("data", config.data, config)
    valid_corpus = corpus.validation if config.valid_data is None else _open_valid(config)

    chosen_by = None
    if valid_corpus is None:
        split = _split(corpus, config, split_seed, progress)
        text = valid_text = split.text
        train_ids, valid_ids, chosen_by = split.train_ids, split.valid_ids, split.seed
        corpus_hash = text.scan.fingerprint
    else:
        text = _scan("data", corpus, progress)
        valid_text = _scan("valid_data", valid_corpus, progress)
        train_ids = np.random.default_rng([split_seed, 0]).permutation(len(text.scan.sizes))
        valid_ids = np.arange(len(valid_text.scan.sizes))
        corpus_hash = digest_of(text.scan.fingerprint, valid_text.scan.fingerprint)

    if tokenizer is None:
        tokenizer = _trained_tokenizer(text, train_ids, config.vocab_size, cache, progress)
    train, valid = (
        TokenStream(tokenize(part.corpus, part.scan, tokenizer, cache, part.progress("tokenizing", progress)), ids)
        for part, ids in ((text, train_ids), (valid_text, valid_ids))
    )
    skipped = None if valid_text is text else valid_text.corpus.skipped
    return PreparedData(
        tokenizer,
        valid,
        text.corpus.name + (f"; validation without {skipped}" if skipped and skipped.count else ""),
        corpus_hash,
        split_off=valid_corpus is None,
        split_seed=chosen_by,
        valid_hash=digest_of(valid_text.scan.fingerprint, valid_ids.tobytes().hex()),
        train=train,
    )


def prepare_validation(
    config: DataConfig,
    tokenizer: Tokenizer,
    seed: int,
    num_tokens: int,
    progress: Progress = lambda stage, done, total: None,
) -> ValidationData:
    """The first tokens of the validation text that `prepare` gives, without a look at what does not decide on them.

    Of a validation text of its own only the beginning is read, and no training text. Where the validation documents are
    split off, all text is read once, for the sizes of its documents decide on the split, and once more for those that
    are wanted if the cache has not their tokens. Nothing is written.

    Args:
        config: the sources; its tokenizer is not looked at.
        tokenizer: the tokenizer.
        seed: of the training: that of the split too, where `config` gives none.
        num_tokens: how many tokens are wanted at least, if there are so many.
        progress: told of each stage as it goes on.

    Raises:
        ValueError: the text cannot be found, read or split.
    """
    valid_corpus = None if config.valid_data is None else _open_valid(config)
    if valid_corpus is None and config.streaming:
        valid_corpus = _validation_of(_open_stream(config), config)  # none of it can be split off
    if valid_corpus is None:
        corpus = _open("data", config.data, config)
        if corpus.validation is None:
            return _split_off(corpus, config, tokenizer, seed, num_tokens, progress)
        valid_corpus = corpus.validation

    def within(num_bytes: int) -> tuple[ValidationData, bool]:
        text = _scan("valid_data", beginning(valid_corpus, num_bytes), progress)
        valid = _tokens_of(reread(text.corpus, text.scan, text.progress("tokenizing", progress)), tokenizer)
        fingerprint = text.scan.fingerprint
        data = ValidationData(tokenizer, valid, text.corpus.name, fingerprint, False, None, fingerprint)
        return data, bool(text.scan.sizes.sum() < num_bytes)

    return _enough(num_tokens, within)


def _split_off(
    corpus: Corpus, config: DataConfig, tokenizer: Tokenizer, seed: int, num_tokens: int, progress: Progress
) -> ValidationData:
    split = _split(corpus, config, config.seed_of_split(seed), progress)
    text, ids = split.text, split.valid_ids
    valid_hash = digest_of(text.scan.fingerprint, ids.tobytes().hex())

    def data_of(valid: TokenStream) -> ValidationData:
        return ValidationData(tokenizer, valid, text.corpus.name, text.scan.fingerprint, True, split.seed, valid_hash)

    def within(num_bytes: int) -> tuple[ValidationData, bool]:
        valid = _tokens_of(_excerpt(text, ids, num_bytes, progress), tokenizer)
        return data_of(valid), bool(text.scan.sizes[ids].sum() <= num_bytes)

    store = find_tokens(text.scan, tokenizer, config.cache_folder())
    return _enough(num_tokens, within) if store is None else data_of(TokenStream(store, ids))


def _enough(num_tokens: int, within: Callable[[int], tuple[ValidationData, bool]]) -> ValidationData:
    """What `within` makes of as many bytes of text as hold that many tokens; it says, too, whether that is all text."""
    num_bytes = num_tokens * EXCERPT_BYTES_PER_TOKEN
    data, is_all = within(num_bytes)
    valid_hash = data.valid_hash  # of as much text for every tokenizer
    while len(data.valid) <= num_tokens and not is_all:  # a cut text ends in an eos that is not its own
        num_bytes *= 2
        data, is_all = within(num_bytes)
    return replace(data, valid_hash=valid_hash)


def _excerpt(text: "_Text", ids: np.ndarray, num_bytes: int, progress: Progress) -> list[Document]:
    """The first of the documents `ids`, in that order, up to about `num_bytes` of text."""
    ends = np.cumsum(text.scan.sizes[ids])
    places = {int(document): place for place, document in enumerate(ids[: np.searchsorted(ends, num_bytes) + 1])}
    kept: dict[int, Document] = {}
    for number, document in enumerate(reread(text.corpus, text.scan, text.progress("tokenizing", progress))):
        if number in places:
            pieces = first_pieces(document.pieces, num_bytes)
            kept[places[number]] = Document(document.name, iter(pieces))
    return [kept[place] for place in range(len(places))]


def _tokens_of(documents: Iterable[Document], tokenizer: Tokenizer) -> TokenStream:
    with closing(Encoder(tokenizer)) as encoder:
        store = tokenize_in_memory(documents, encoder)
    return TokenStream(store, np.arange(len(store.offsets) - 1))


@dataclass(frozen=True)
class _Text:
    """A corpus and what is known of it from reading it once."""

    corpus: Corpus
    scan: Scan

    def progress(self, stage: str, progress: Progress) -> Callable[[int], None]:
        total = int(self.scan.sizes.sum())
        return lambda done: progress(stage, done, total)


@dataclass(frozen=True)
class _Split:
    """A text of which some is held out."""

    text: _Text
    train_ids: np.ndarray
    valid_ids: np.ndarray
    seed: int | None
    """What chose them; None where it is the tail of one document, whatever the seed."""


def _split(corpus: Corpus, config: DataConfig, seed: int, progress: Progress) -> _Split:
    """Read a text and hold out some of its documents, or the tail of its only one."""
    text = _scan("data", corpus, progress)
    if len(text.scan.sizes) == 1:
        share = f"its last {100 * config.valid_fraction:g}% for validation"
        head_bytes = int((1 - config.valid_fraction) * float(text.scan.sizes[0]))
        halves = in_two(corpus, head_bytes, f"{corpus.name} (one document, {share})")
        text = _scan("data", halves, lambda _, done, total: progress(f"splitting one document, {share}", done, total))
        if len(text.scan.sizes) == 2:
            return _Split(text, np.array([0]), np.array([1]), None)
    with naming("data"):
        return _Split(text, *split_documents(text.scan.sizes, config.valid_fraction, seed), seed)


def _open(argument: str, source: str | None, config: DataConfig) -> Corpus:
    with naming(argument):
        return open_corpus(source, text_field=config.text_field, skip_bad=config.skip_bad)


def _open_valid(config: DataConfig) -> Corpus:
    """The validation text that is given; of a data set with a split for that, not what it has to train on."""
    corpus = _open("valid_data", config.valid_data, config)
    return corpus if corpus.validation is None else corpus.validation


def _open_stream(config: DataConfig) -> TextStream:
    with naming("data"):
        return open_stream(str(config.data), config.text_field, config.shuffle_buffer)


def _validation_of(text: TextStream, config: DataConfig) -> Corpus:
    """The validation text of a stream, of which no documents can be split off before all are known."""
    if config.valid_data is not None:
        return _open_valid(config)
    if text.validation is None:
        raise ValueError(f"data={config.data!r} has no split 'validation', and it is streamed; give valid_data")
    return text.validation


def _prepare_stream(config: DataConfig, progress: Progress) -> PreparedData:
    """As `prepare`, of a text that is read while training goes on: only its validation text is read here."""
    cache = config.cache_folder()
    tokenizer = None if config.tokenizer is None else load_tokenizer(config.tokenizer)
    text = _open_stream(config)
    valid_text = _scan("valid_data", _validation_of(text, config), progress)
    if tokenizer is None:
        tokenizer = _tokenizer_of_stream(text, config.vocab_size, cache, progress)
    tokenizing = valid_text.progress("tokenizing", progress)
    store = tokenize(valid_text.corpus, valid_text.scan, tokenizer, cache, tokenizing)
    valid_ids = np.arange(len(valid_text.scan.sizes))
    return PreparedData(
        tokenizer,
        TokenStream(store, valid_ids),
        f"{text.source} (streamed)",
        digest_of(text.fingerprint, valid_text.scan.fingerprint),
        split_off=False,
        split_seed=None,
        valid_hash=digest_of(valid_text.scan.fingerprint, valid_ids.tobytes().hex()),
        train=text,
    )


def _scan(argument: str, corpus: Corpus, progress: Progress) -> _Text:
    with naming(argument):
        found = scan(corpus, lambda done: progress("reading", done, None))
    if corpus.skipped is None or not corpus.skipped.count:
        return _Text(corpus, found)
    progress(f"left out {corpus.skipped}", 1, 1)
    return _Text(replace(corpus, name=f"{corpus.name}, without {corpus.skipped}"), found)


@contextmanager
def naming(argument: str) -> Iterator[None]:
    """Say which argument a source that cannot be read was given for."""
    try:
        yield
    except BadText as error:
        raise ValueError(f"{argument}: {error}, or leave out all that is bad (--skip-bad)") from error
    except ValueError as error:
        raise ValueError(f"{argument}: {error}") from error
    except OSError as error:
        raise ValueError(f"{argument}: {error.filename} cannot be read ({error.strerror}); mend that") from error


def _trained_tokenizer(
    text: _Text, train_ids: np.ndarray, vocab_size: int, cache: Path, progress: Progress
) -> Tokenizer:
    """The tokenizer trained on these documents of `text`, from the cache where it is there."""
    in_training = np.zeros(len(text.scan.sizes), dtype=bool)
    in_training[train_ids] = True
    share = min(1.0, TOKENIZER_TRAINING_BYTES / text.scan.sizes[in_training].sum())

    def training_pieces() -> Iterator[str]:
        seen = used = 0
        documents = reread(text.corpus, text.scan, text.progress("training the tokenizer", progress))
        # Endless, so that `reread` itself comes to tell if there are more documents than there were.
        membership = itertools.chain(in_training, itertools.repeat(False))
        for document, is_training in zip(documents, membership, strict=False):
            if is_training:
                for piece in document.pieces:
                    if used <= share * seen:  # spread evenly over the text
                        used += len(piece)
                        yield piece
                    seen += len(piece)

    decisive = (text.scan.fingerprint, in_training.tobytes().hex(), str(vocab_size), str(share))
    return _cached_tokenizer(training_pieces(), vocab_size, cache, decisive)


def _tokenizer_of_stream(text: TextStream, vocab_size: int, cache: Path, progress: Progress) -> Tokenizer:
    """The tokenizer trained on the beginning of a stream, from the cache where it is there."""

    def beginning_of() -> Iterator[str]:
        used = 0
        for row, behind in text.texts():
            if used >= TOKENIZER_TRAINING_BYTES or behind.epoch > 0:
                return
            for piece in cut_text(row):
                used += len(piece.encode())
                progress("training the tokenizer", used, TOKENIZER_TRAINING_BYTES)
                yield piece

    decisive = (text.fingerprint, str(vocab_size), str(TOKENIZER_TRAINING_BYTES))
    with naming("data"):
        return _cached_tokenizer(beginning_of(), vocab_size, cache, decisive)


def _cached_tokenizer(pieces: Iterator[str], vocab_size: int, cache: Path, decisive: tuple[str, ...]) -> Tokenizer:
    """The tokenizer trained on these pieces of text, which are read where the cache has none of what decides on it."""

    def load(folder: Path) -> Tokenizer | None:
        try:
            return load_tokenizer(folder / "tokenizer.json")
        except (ValueError, OSError):
            return None

    def build(folder: Path) -> None:
        train_tokenizer(pieces, vocab_size).save(folder / "tokenizer.json")

    key = digest_of(*decisive, tokenizers.__version__)
    return cached(cache / f"tokenizer-{key[:16]}", load, build)
