import gzip
import json
from dataclasses import replace

import datasets
import numpy as np
import pytest

from longreach.data import prepare as prepare_module
from longreach.data.corpora import PIECE_CHARS, Corpus, Document
from longreach.data.prepare import EXCERPT_BYTES_PER_TOKEN, DataConfig, prepare, prepare_validation
from longreach.data.stream import TextStream
from longreach.data.tokenizer import Tokenizer, train_tokenizer
from longreach.data.tokens import TokenStream


@pytest.fixture
def source(tmp_path):
    """A folder of 40 documents, each about a word of its own."""
    folder = tmp_path / "source"
    folder.mkdir()
    for index in range(40):
        (folder / f"{index:02}.txt").write_text(f"{word(index)} and more of {word(index)}\n" * 5)
    return folder


def word(index: int) -> str:
    return "".join(chr(ord("a") + int(digit)) for digit in f"{index * 7919 + 10**6}")


def config_of(source, tmp_path, **options) -> DataConfig:
    return DataConfig(**{"data": str(source), "cache": str(tmp_path / "cache"), "vocab_size": 300} | options)


def everything(stream: TokenStream) -> list[int]:
    return stream.read(0, len(stream)).tolist()


def documents(stream: TokenStream, tokenizer) -> list[str]:
    ids = np.array(everything(stream))
    ends = np.flatnonzero(ids == tokenizer.eos_id)
    assert ends[-1] == len(ids) - 1
    return [tokenizer.decode(part) for part in np.split(ids, ends[:-1] + 1)]


def test_every_document_is_either_for_training_or_for_validation(source, tmp_path):
    data = prepare(config_of(source, tmp_path, valid_fraction=0.2), seed=3)
    train, valid = documents(data.train, data.tokenizer), documents(data.valid, data.tokenizer)
    assert sorted(train + valid) == sorted(path.read_text() for path in source.iterdir())
    assert len(valid) == 8
    assert train != sorted(train)
    assert data.corpus_name == str(source)


def test_preparing_again_gives_the_same_from_the_cache(source, tmp_path, monkeypatch):
    first = prepare(config_of(source, tmp_path), seed=0)
    fresh = prepare(config_of(source, tmp_path, cache=str(tmp_path / "other")), seed=0)
    monkeypatch.setattr(prepare_module, "train_tokenizer", lambda *_: pytest.fail("the cache has it"))
    stages = []
    again = prepare(config_of(source, tmp_path), seed=0, progress=lambda stage, done, total: stages.append(stage))
    assert set(stages) == {"reading"}
    for other in (fresh, again):
        assert everything(other.train) == everything(first.train)
        assert everything(other.valid) == everything(first.valid)
        assert other.tokenizer.fingerprint == first.tokenizer.fingerprint
        assert other.corpus_hash == first.corpus_hash


def test_seeds_split_differently_and_share_the_corpus_hash(source, tmp_path):
    one, two = (prepare(config_of(source, tmp_path), seed) for seed in (0, 1))
    assert one.corpus_hash == two.corpus_hash
    assert documents(one.valid, one.tokenizer) != documents(two.valid, two.tokenizer)


@pytest.fixture
def learned_from(monkeypatch) -> list[str]:
    """The texts that tokenizers are trained on from now on."""
    texts: list[str] = []
    train = prepare_module.train_tokenizer

    def train_and_note(pieces, vocab_size):
        texts.extend(pieces)
        return train(texts, vocab_size)

    monkeypatch.setattr(prepare_module, "train_tokenizer", train_and_note)
    return texts


def test_the_tokenizer_learns_from_training_documents_alone(source, tmp_path, learned_from):
    data = prepare(config_of(source, tmp_path), seed=0)
    assert sorted(learned_from) == sorted(documents(data.train, data.tokenizer))
    assert not set(learned_from) & set(documents(data.valid, data.tokenizer))


def test_the_tokenizer_learns_from_a_bounded_share_spread_over_the_text(source, tmp_path, monkeypatch, learned_from):
    texts = [path.read_text() for path in sorted(source.iterdir())]
    budget = sum(map(len, texts)) // 4
    monkeypatch.setattr(prepare_module, "TOKENIZER_TRAINING_BYTES", budget)
    prepare(config_of(source, tmp_path), seed=0)
    assert abs(sum(map(len, learned_from)) - budget) <= max(map(len, texts))
    numbers = [texts.index(text) for text in learned_from]
    assert min(numbers) < 8
    assert max(numbers) > 31


def test_a_given_tokenizer_is_used(source, tmp_path):
    first = prepare(config_of(source, tmp_path), seed=0)
    first.tokenizer.save(tmp_path / "tokenizer.json")
    given = prepare(config_of(source, tmp_path, tokenizer=str(tmp_path / "tokenizer.json")), seed=5)
    assert given.tokenizer.fingerprint == first.tokenizer.fingerprint


def test_the_split_has_the_seed_of_training_unless_it_has_its_own(source, tmp_path):
    def held_out(seed, **options):
        data = prepare(config_of(source, tmp_path, **options), seed=seed)
        return data.split_seed, documents(data.valid, data.tokenizer), data.valid_hash, data.tokenizer.fingerprint

    assert held_out(3) == held_out(7, split_seed=3)
    assert held_out(3)[1] != held_out(7)[1]
    assert held_out(3)[2] != held_out(7)[2]
    assert held_out(3)[0] == 3
    with pytest.raises(ValueError, match=r"^split_seed=-1: give at least 0"):
        config_of(source, tmp_path, split_seed=-1)


def test_validation_text_of_its_own_is_the_same_for_every_seed(source, tmp_path):
    (tmp_path / "valid.txt").write_text("some text of its own")
    options = {"valid_data": str(tmp_path / "valid.txt")}
    first, second = (prepare(config_of(source, tmp_path, **options), seed=seed) for seed in (0, 1))
    assert first.valid_hash == second.valid_hash
    (tmp_path / "valid.txt").write_text("some other text")
    assert prepare(config_of(source, tmp_path, **options), seed=0).valid_hash != first.valid_hash


@pytest.mark.parametrize(
    ("text", "fraction"),
    [
        ("one text of some words " * 9, 0.05),
        ("one text of some words " * 9, 0.9),
        ("many pieces of one long text " * 10_000, 0.25),
        ("no spaces: " + "文" * 500, 0.1),
        ("ab", 0.05),
    ],
)
def test_the_tail_of_one_document_validates_whatever_the_seed(tmp_path, text, fraction):
    (tmp_path / "book.txt").write_text(text)
    config = config_of(tmp_path / "book.txt", tmp_path, valid_fraction=fraction)
    told = []
    first, second = (prepare(config, seed, lambda stage, *_: told.append(stage)) for seed in (0, 1))
    (head,), (tail,) = (documents(stream, first.tokenizer) for stream in (first.train, first.valid))
    assert head + tail == text
    assert abs(len(tail) - fraction * len(text)) <= 101
    assert tail[0].isspace() or " " not in text[len(head) - 100 : len(head)]
    share = f"its last {100 * fraction:g}% for validation"
    assert f"splitting one document, {share}" in told
    assert first.corpus_name == f"{tmp_path / 'book.txt'} (one document, {share})"
    assert (first.split_off, first.split_seed) == (True, None)
    assert (first.valid_hash, first.corpus_hash) == (second.valid_hash, second.corpus_hash)
    for cache in ("cache", "empty"):
        elsewhere = config_of(tmp_path / "book.txt", tmp_path, valid_fraction=fraction, cache=str(tmp_path / cache))
        alone = prepare_validation(elsewhere, first.tokenizer, 5, len(first.valid))
        assert everything(alone.valid) == everything(first.valid)
        assert (alone.corpus_name, alone.digests, alone.valid_hash) == (
            first.corpus_name,
            first.digests,
            first.valid_hash,
        )


def test_given_validation_text_is_kept_apart_and_in_order(source, tmp_path):
    texts = ["z last", "a first", "m middle"]
    (tmp_path / "valid.jsonl").write_text("\n".join(json.dumps({"body": text}) for text in texts))
    (tmp_path / "train.jsonl").write_text(json.dumps({"body": "a single document will do"}))
    options = {"valid_data": str(tmp_path / "valid.jsonl"), "text_field": "body"}
    data = prepare(config_of(tmp_path / "train.jsonl", tmp_path, **options), seed=0)
    assert documents(data.valid, data.tokenizer) == texts
    assert documents(data.train, data.tokenizer) == ["a single document will do"]
    (tmp_path / "valid.jsonl").write_text(json.dumps({"body": "other"}))
    other = prepare(config_of(tmp_path / "train.jsonl", tmp_path, **options), seed=0)
    assert other.corpus_hash != data.corpus_hash


def test_a_validation_split_that_comes_with_the_data_is_used_unless_another_is_given(tmp_path, monkeypatch):
    def corpus(name: str, *texts: str, validation: Corpus | None = None) -> Corpus:
        return Corpus(name, lambda: (Document(text, iter([text])) for text in texts), validation)

    sources = {"hf:set": corpus("hf:set", "one", validation=corpus("split", "two")), "mine": corpus("mine", "three")}
    monkeypatch.setattr(prepare_module, "open_corpus", lambda source, **_: sources[source])
    for valid_data, expected in ((None, ["two"]), ("mine", ["three"]), ("hf:set", ["two"])):
        data = prepare(config_of("hf:set", tmp_path, valid_data=valid_data), seed=0)
        assert documents(data.train, data.tokenizer) == ["one"]
        assert documents(data.valid, data.tokenizer) == expected
    config = DataConfig(data="mine", valid_data="hf:set")  # as evaluate --data has it
    alone = prepare_validation(config, data.tokenizer, 0, 100)
    assert documents(alone.valid, data.tokenizer) == ["two"]


@pytest.fixture
def tokenized(monkeypatch) -> list[str]:
    """The texts that are tokenized from now on, unless a test clears them."""
    texts: list[str] = []
    encode = Tokenizer.encode_batch

    def encode_and_note(tokenizer, pieces):
        texts.extend(pieces)
        return encode(tokenizer, pieces)

    monkeypatch.setattr(Tokenizer, "encode_batch", encode_and_note)
    return texts


def test_validation_alone_is_what_training_held_out_and_no_other_document_is_tokenized(source, tmp_path, tokenized):
    config = config_of(source, tmp_path, valid_fraction=0.2)
    whole = prepare(config, seed=3)
    assert len(tokenized) == 40
    for cache, num_documents in (("cache", 0), ("empty", 8)):
        tokenized.clear()
        elsewhere = config_of(source, tmp_path, valid_fraction=0.2, cache=str(tmp_path / cache))
        alone = prepare_validation(elsewhere, whole.tokenizer, 3, len(whole.valid))
        assert len(tokenized) == num_documents
        assert everything(alone.valid) == everything(whole.valid)
        assert (alone.corpus_name, alone.corpus_hash) == (whole.corpus_name, whole.corpus_hash)
    assert not (tmp_path / "empty").exists()
    tokenized.clear()
    wanted = len(documents(whole.valid, whole.tokenizer)[0]) // 16 + 1  # at least a token of the second document
    first = prepare_validation(elsewhere, whole.tokenizer, 3, wanted)
    assert len(tokenized) == 2
    assert everything(first.valid) == everything(whole.valid)[: len(first.valid)]


def counted(corpus: Corpus, read: list[str]) -> Corpus:
    """A corpus that notes the names of the documents that are read from it."""

    def documents_read():
        for document in corpus.read():
            read.append(document.name)
            yield document

    return Corpus(corpus.name, documents_read)


def test_of_validation_text_of_its_own_only_the_beginning_is_read_and_no_training_text(
    source, tmp_path, monkeypatch, tokenized
):
    config = config_of("/nowhere", tmp_path, valid_data=str(source))
    whole = prepare(config_of(source, tmp_path, valid_data=str(source)), seed=0)
    tokenized.clear()
    read: list[str] = []
    open_corpus = prepare_module.open_corpus
    monkeypatch.setattr(prepare_module, "open_corpus", lambda *a, **options: counted(open_corpus(*a, **options), read))
    data = prepare_validation(config, whole.tokenizer, 0, 30)
    assert everything(data.valid)[:31] == everything(whole.valid)[:31]
    assert tokenized == [path.read_text() for path in sorted(source.iterdir())][: len(tokenized)]
    assert 1 < len(tokenized) < 8
    assert [read.count(name) for name in dict.fromkeys(read)] == [2] * len(tokenized)  # a digest first, then tokens
    (source / "39.txt").write_text("What is not scored may change.")
    assert prepare_validation(config, whole.tokenizer, 0, 30).corpus_hash == data.corpus_hash
    (source / "00.txt").write_text("What is scored may not.")
    assert prepare_validation(config, whole.tokenizer, 0, 30).corpus_hash != data.corpus_hash


@pytest.mark.parametrize("split", [True, False])
def test_more_is_read_where_tokens_are_long(tmp_path, split):
    word = "abcdefghijklmnopqrstuvwxyz" * 2
    tokenizer = train_tokenizer([f" {word}"] * 9, 400)
    (tmp_path / "text.jsonl").write_text("\n".join([json.dumps({"text": f" {word}" * 20})] * 30))
    text = str(tmp_path / "text.jsonl")
    config = config_of(text, tmp_path, valid_fraction=0.5, valid_data=None if split else text)
    tokens = everything(prepare_validation(config, tokenizer, 0, 200).valid)
    assert len(tokens) > 200
    assert tokens[:21] == [*tokenizer.encode(f" {word}" * 20), tokenizer.eos_id]
    whole = prepare_validation(config, tokenizer, 0, 10**6).valid
    assert len(whole) == 21 * (15 if split else 30)


def test_the_end_of_what_was_cut_off_is_no_end_of_a_document(tmp_path):
    class Tokens:
        """As many of a piece as are wanted, but for one: the eos behind it would be the last of them."""

        vocab_size, eos_id, fingerprint = 300, 0, ""

        def encode_batch(self, texts):
            return [[1] * (wanted * len(text) // PIECE_CHARS - 1) for text in texts]

    wanted = PIECE_CHARS // EXCERPT_BYTES_PER_TOKEN
    (tmp_path / "text.txt").write_text("x" * 3 * PIECE_CHARS)
    data = prepare_validation(DataConfig(valid_data=str(tmp_path / "text.txt")), Tokens(), 0, wanted)
    assert len(data.valid) > wanted
    assert set(data.valid.read(0, wanted).tolist()) == {1}


def test_progress_tells_each_stage_up_to_all_bytes(source, tmp_path):
    told = {}
    prepare(
        config_of(source, tmp_path), seed=0, progress=lambda stage, done, total: told.update({stage: (done, total)})
    )
    total = sum(path.stat().st_size for path in source.iterdir())
    assert told == {"reading": (total, None), "training the tokenizer": (total, total), "tokenizing": (total, total)}


def test_a_damaged_trained_tokenizer_is_trained_again(source, tmp_path):
    first = prepare(config_of(source, tmp_path), seed=0)
    (path,) = (tmp_path / "cache").glob("tokenizer-*/tokenizer.json")
    path.write_text(path.read_text()[:-100])
    assert prepare(config_of(source, tmp_path), seed=0).tokenizer.fingerprint == first.tokenizer.fingerprint


def test_cache_folder_follows_the_xdg_rules(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert str(DataConfig().cache_folder()) == "/home/someone/.cache/longreach"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert str(DataConfig().cache_folder()) == "/home/someone/.cache/longreach"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert DataConfig().cache_folder() == tmp_path / "longreach"
    assert str(DataConfig(cache="~/mine").cache_folder()) == "/home/someone/mine"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 256}, "vocab_size=256; give a whole number of at least 257"),
        ({"vocab_size": True}, "vocab_size=True; give"),
        ({"valid_fraction": 0.0}, r"valid_fraction=0\.0; give a number above 0 and below 1"),
        ({"valid_fraction": 1}, "valid_fraction=1; give"),
        ({"valid_fraction": float("nan")}, "valid_fraction=nan; give"),
        ({"streaming": True, "data": "text.txt"}, "streaming=True is for Hugging Face data sets; give data=hf:NAME"),
        ({"streaming": True, "data": "hf:a", "skip_bad": True}, "skip_bad=True: of a stream it is not known before"),
        ({"shuffle_buffer": 0}, "shuffle_buffer=0: give a positive integer"),
    ],
)
def test_contradictory_configurations_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**options)


def test_bad_sources_are_named_by_argument_before_anything_is_read(source, tmp_path):
    def read_nothing(stage, done, total):
        pytest.fail("the name should have been refused first")

    with pytest.raises(ValueError, match=r"^data: '/nowhere' does not exist; give"):
        prepare(config_of("/nowhere", tmp_path), 0, read_nothing)
    with pytest.raises(ValueError, match=r"^valid_data: '/nowhere' does not exist; give"):
        prepare(config_of(source, tmp_path, valid_data="/nowhere"), 0, read_nothing)
    with pytest.raises(ValueError, match=r"^tokenizer='/nowhere': no such file"):
        prepare(config_of(source, tmp_path, tokenizer="/nowhere"), 0, read_nothing)


def test_bad_text_is_named_by_argument_and_leaves_no_cache(source, tmp_path):
    (source / "20.txt").write_bytes(b"\xe9")
    with pytest.raises(ValueError, match=r"^data: '.*/20\.txt' is not UTF-8: byte 0xe9 at offset 0; convert"):
        prepare(config_of(source, tmp_path), 0)
    (source / "20.txt").write_text("x")
    with pytest.raises(ValueError, match=r"^data: 1 document cannot be split"):
        prepare(config_of(source / "20.txt", tmp_path), 0)
    assert not (tmp_path / "cache").exists()


BAD_FILES = {
    "latin.txt": b"caf\xe9",
    "late.txt": b"text " * 60_000 + b"\xff",
    "cut.txt.gz": gzip.compress(b"text of some length")[:-9],
    "wide.txt": "wide".encode("utf-16"),
    "paper.pdf": b"%PDF-1.7",
}
BAD_LINES = (b"{", b"[1]", b'{"other": 1}', b'{"text": 3}', b'{"text": "\xe9"}', b'{"text": "\\ud800"}')


@pytest.mark.parametrize("as_lines", [False, True])
def test_what_is_bad_among_many_is_refused_or_left_out_counted_and_named(source, tmp_path, as_lines):
    texts = sorted(path.read_text() for path in source.iterdir())
    if as_lines:
        path = tmp_path / "lines.jsonl"
        good = [json.dumps({"text": text}).encode() for text in texts]
        path.write_bytes(b"\n".join([good[0], *BAD_LINES, *good[1:]]))
        bad = [f"{path}:{number}" for number in range(2, 2 + len(BAD_LINES))]
    else:
        path = source
        for name, content in BAD_FILES.items():
            (source / name).write_bytes(content)
        bad = [str(source / name) for name in sorted(BAD_FILES)]
    config = config_of(path, tmp_path)
    with pytest.raises(ValueError, match=r"^data: '?.*, or leave out all that is bad \(--skip-bad\)$"):
        prepare(config, 0)
    config = replace(config, skip_bad=True)
    told = []
    data = prepare(config, 0, lambda stage, *_: told.append(stage))
    assert sorted(documents(data.train, data.tokenizer) + documents(data.valid, data.tokenizer)) == texts
    left_out = f"{len(bad)} bad files or lines: {', '.join(bad[:3])}, ..."
    assert told.count(f"left out {left_out}") == 1
    assert data.corpus_name == f"{path}, without {left_out}"
    alone = prepare_validation(config, data.tokenizer, 0, len(data.valid))
    assert (alone.corpus_name, alone.valid_hash) == (data.corpus_name, data.valid_hash)
    given = replace(config, valid_data=str(path))
    assert prepare(given, 0).corpus_name.endswith(f"; validation without {left_out}")
    assert prepare_validation(given, data.tokenizer, 0, 10**6).corpus_name == data.corpus_name


def test_a_text_that_is_all_bad_is_refused_all_the_same(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    config = config_of(tmp_path / "latin.txt", tmp_path, skip_bad=True)
    with pytest.raises(ValueError, match=r"holds no text without 1 bad file or line: .*latin\.txt; name a source"):
        prepare(config, 0)


@pytest.fixture
def stream(monkeypatch):
    """A stream of 30 documents, with or without a validation split."""

    def make(validation=None):
        rows = datasets.Dataset.from_list([{"text": f"{word(index)} and more"} for index in range(30)])
        text = TextStream("hf:set", "its files", rows.to_iterable_dataset, "text", 10, validation)
        monkeypatch.setattr(prepare_module, "open_stream", lambda *_: text)
        return text

    return make


def test_of_a_stream_the_beginning_makes_the_tokenizer_and_the_validation_text_alone_is_tokenized(
    stream, tmp_path, monkeypatch, learned_from, tokenized
):
    valid = Corpus("hf:set (validation)", lambda: iter([Document("0", iter(["what is held out"]))]))
    text = stream(valid)
    monkeypatch.setattr(prepare_module, "TOKENIZER_TRAINING_BYTES", 80)
    config = config_of("hf:set", tmp_path, streaming=True)
    data = prepare(config, seed=0)
    assert learned_from == [f"{word(index)} and more" for index in range(5)]
    assert tokenized == ["what is held out"]
    assert data.train is text
    assert documents(data.valid, data.tokenizer) == ["what is held out"]
    assert (data.corpus_name, data.split_off, data.split_seed) == ("hf:set (streamed)", False, None)
    learned_from.clear()
    monkeypatch.setattr(prepare_module, "TOKENIZER_TRAINING_BYTES", 10**6)
    prepare(config, seed=0)
    assert learned_from == [f"{word(index)} and more" for index in range(30)]  # once
    monkeypatch.setattr(prepare_module, "TOKENIZER_TRAINING_BYTES", 80)
    learned_from.clear()
    again = prepare(config, seed=1)
    assert learned_from == []
    assert (again.digests, again.valid_hash) == (data.digests, data.valid_hash)
    monkeypatch.setattr(prepare_module, "open_stream", lambda *_: replace(text, fingerprint="others"))
    assert prepare(config, seed=0).corpus_hash != data.corpus_hash
    alone = prepare_validation(config, data.tokenizer, 0, 3)
    assert everything(alone.valid) == everything(data.valid)


def test_a_stream_without_validation_text_says_what_to_give(stream, tmp_path):
    stream()
    with pytest.raises(ValueError, match=r"^data='hf:set' has no split 'validation', .* streamed; give valid_data$"):
        prepare(config_of("hf:set", tmp_path, streaming=True), seed=0)
