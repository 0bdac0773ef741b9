import signal
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import store_of

from longreach.data import corpora, encoding
from longreach.data.corpora import Corpus, Document, open_corpus, scan
from longreach.data.tokens import TokenStream, split_documents, tokenize


def naive_tokens(texts, tokenizer) -> list[int]:
    return [token for text in texts for token in [*tokenizer.encode(text), tokenizer.eos_id]]


def test_store_holds_each_document_and_its_eos(tokenizer, corpus_of, tmp_path):
    texts = ["best of times", "", "🙂 naïve\r\n", "x"]
    corpus = corpus_of(*texts)
    store = tokenize(corpus, scan(corpus), tokenizer, tmp_path)
    assert store.tokens.dtype == np.uint16
    assert store.offsets.dtype == np.int64
    for index, text in enumerate(["best of times", "🙂 naïve\r\n", "x"]):
        assert store.document(index).tolist() == [*tokenizer.encode(text), tokenizer.eos_id]
    assert len(store.offsets) == 4
    assert not store.tokens.flags.writeable


def test_long_documents_and_many_batches_give_the_tokens_of_the_whole(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "BATCH_CHARS", 2000)
    texts = ["don't stop  \n at 12 words " * 400, "short", "日本 " * 900, "a"]
    pieces = [list(corpora.cut_pieces([text], 100)) for text in texts]
    corpus = Corpus("test", lambda: (Document("", iter(part)) for part in pieces))
    store = tokenize(corpus, scan(corpus), tokenizer, tmp_path)
    assert store.tokens.tolist() == naive_tokens(texts, tokenizer)
    assert np.diff(store.offsets).tolist() == [len(tokenizer.encode(text)) + 1 for text in texts]


def test_large_vocabularies_take_four_bytes(tokenizer, corpus_of, tmp_path, monkeypatch):
    corpus = corpus_of("some text")
    for vocab_size, dtype in ((65536, np.uint16), (65537, np.uint32)):
        monkeypatch.setattr(tokenizer, "vocab_size", vocab_size)
        store = tokenize(corpus, scan(corpus), tokenizer, tmp_path / str(vocab_size))
        assert store.tokens.dtype == dtype
        assert store.tokens.tolist() == naive_tokens(["some text"], tokenizer)


def test_the_cache_is_used_and_keyed_by_content_and_tokenizer(tokenizer, corpus_of, tmp_path, monkeypatch):
    found = scan(corpus_of("a", "b"))
    tokenize(corpus_of("a", "b"), found, tokenizer, tmp_path)
    broken = Corpus("never read", lambda: pytest.fail("the cache should have been used"))
    assert len(tokenize(broken, found, tokenizer, tmp_path).offsets) == 3
    tokenize(corpus_of("a", "c"), scan(corpus_of("a", "c")), tokenizer, tmp_path)
    monkeypatch.setattr(tokenizer, "fingerprint", "another tokenizer's fingerprint")
    tokenize(corpus_of("a", "b"), found, tokenizer, tmp_path)
    assert len(list(tmp_path.glob("tokens-*"))) == 3


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("tokens.bin", lambda content: content[:-2]),
        ("tokens.bin", lambda content: content + b"xx"),
        ("tokens.bin", lambda content: b""),
        ("tokens.bin", lambda content: content[:-1]),
        ("offsets.npy", lambda content: content[:-3]),
        ("offsets.npy", lambda content: b""),
        ("offsets.npy", lambda content: b"no array"),
        ("meta.json", lambda content: content.replace(b'"version": 1', b'"version": 99')),
        ("meta.json", lambda content: content[:-1]),
        ("meta.json", lambda content: b"\xff"),
        ("meta.json", lambda content: b"[]"),
        ("meta.json", None),
        ("tokens.bin", None),
    ],
)
def test_a_damaged_entry_is_rebuilt(tokenizer, corpus_of, tmp_path, name, damage):
    corpus = corpus_of("one text", "another")
    expected = tokenize(corpus, scan(corpus), tokenizer, tmp_path).tokens.tolist()
    (path,) = tmp_path.glob(f"tokens-*/{name}")
    content = path.read_bytes()
    path.unlink()
    if damage is not None:
        path.write_bytes(damage(content))
    assert tokenize(corpus, scan(corpus), tokenizer, tmp_path).tokens.tolist() == expected
    assert path.read_bytes() == content


def test_text_that_changes_meanwhile_is_refused_and_not_cached(tokenizer, corpus_of, tmp_path):
    with pytest.raises(ValueError, match="changed while it was read"):
        tokenize(corpus_of("new text"), scan(corpus_of("old text")), tokenizer, tmp_path)
    assert not list(tmp_path.glob("*tokens-*"))


# A process that tokenizes the file argv[1] into the cache argv[2], the first bytes of it once argv[3] exists.
BUILDER = """
import sys, time
from pathlib import Path
from longreach.data.corpora import open_corpus, scan
from longreach.data.tokenizer import load_tokenizer
from longreach.data.tokens import tokenize

source, cache, signal = sys.argv[1:]
corpus = open_corpus(source)

def wait(bytes_read):
    print("building", flush=True)
    while not Path(signal).exists():
        time.sleep(0.01)

store = tokenize(corpus, scan(corpus), load_tokenizer(Path(source).parent), Path(cache), wait)
print(int(store.tokens.astype("int64").sum()), len(store.tokens), flush=True)
"""


@pytest.fixture
def start_builder(tokenizer, tmp_path):
    (tmp_path / "text.txt").write_text("some words to tokenize " * 20_000)
    tokenizer.save(tmp_path / "tokenizer.json")
    command = [sys.executable, "-c", BUILDER, tmp_path / "text.txt", tmp_path / "cache", tmp_path / "go"]
    started = []

    def start() -> subprocess.Popen:
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        assert started[-1].stdout.readline() == "building\n"
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def test_two_processes_build_the_same_store_at_once(start_builder, tmp_path, tokenizer):
    builders = [start_builder(), start_builder()]  # both are in the midst of it now
    (tmp_path / "go").touch()
    outputs = [builder.communicate()[0].splitlines()[-1] for builder in builders]
    expected = naive_tokens([(tmp_path / "text.txt").read_text()], tokenizer)
    assert outputs == [f"{sum(expected)} {len(expected)}"] * 2
    assert [builder.returncode for builder in builders] == [0, 0]
    assert len(list((tmp_path / "cache").glob("tokens-*"))) == 1
    assert not list((tmp_path / "cache").glob(".tokens-*"))


def test_a_killed_builder_does_no_harm(start_builder, tmp_path, tokenizer):
    builder = start_builder()
    builder.send_signal(signal.SIGKILL)
    builder.wait()
    assert not list((tmp_path / "cache").glob("tokens-*"))
    assert len(list((tmp_path / "cache").glob(".tokens-*"))) == 1
    corpus = open_corpus(str(tmp_path / "text.txt"))
    store = tokenize(corpus, scan(corpus), tokenizer, tmp_path / "cache")
    assert store.tokens.tolist() == naive_tokens([(tmp_path / "text.txt").read_text()], tokenizer)


def test_tokenizing_takes_bounded_memory(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    script = """
import resource, sys
from pathlib import Path
from longreach.data.corpora import open_corpus, scan
from longreach.data.tokenizer import load_tokenizer
from longreach.data.tokens import tokenize

corpus = open_corpus(sys.argv[1])
tokenize(corpus, scan(corpus), load_tokenizer(Path(sys.argv[1]).parent), Path(sys.argv[2]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""
    peaks = []
    for megabytes in (3, 9):
        (tmp_path / "text.txt").write_text("some words to tokenize: line after line\n" * (megabytes * 25_000))
        command = [sys.executable, "-c", script, tmp_path / "text.txt", tmp_path / str(megabytes)]
        peaks.append(int(subprocess.run(command, capture_output=True, check=True).stdout))
    # The 6 MB more have 2 million tokens: as Python lists 70 MB, as encodings several times that.
    assert peaks[1] - peaks[0] < 60, f"MB at 3 and 9 MB of text: {peaks}"


DOCUMENTS = st.lists(st.lists(st.integers(0, 65535), min_size=1, max_size=9), min_size=1, max_size=8)


@settings(deadline=None)
@given(documents=DOCUMENTS, data=st.data())
def test_stream_reads_what_the_concatenation_holds(documents, data):
    ids = data.draw(st.lists(st.integers(0, len(documents) - 1), min_size=1, max_size=10))
    expected = [token for index in ids for token in documents[index]]
    stream = TokenStream(store_of(*documents), ids)
    assert len(stream) == len(expected)
    start = data.draw(st.integers(0, len(expected)))
    stop = data.draw(st.integers(start, len(expected)))
    part = stream.read(start, stop)
    assert part.dtype == np.int64
    assert part.tolist() == expected[start:stop]


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (0, 6), (3, 2), (6, 6)])
def test_stream_refuses_what_lies_outside(start, stop):
    with pytest.raises(ValueError, match=rf"start={start}, stop={stop}: outside of a stream of 5 tokens"):
        TokenStream(store_of([1, 2], [3, 4, 5]), [0, 1]).read(start, stop)


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(1, 10**6), min_size=2, max_size=60),
    fraction=st.floats(0.001, 0.999),
    seed=st.integers(0, 2**32),
)
def test_split_keeps_documents_whole_and_both_sides_filled(sizes, fraction, seed):
    sizes = np.array(sizes)
    train, valid = split_documents(sizes, fraction, seed)
    assert sorted([*train, *valid]) == list(range(len(sizes)))
    assert len(train) > 0
    assert len(valid) > 0
    again = split_documents(sizes, fraction, seed)
    assert [part.tolist() for part in again] == [train.tolist(), valid.tolist()]
    share = fraction * sizes.sum()
    if sizes.min() <= share:
        assert sizes[valid].max() <= share
        assert sizes[valid].sum() < 2 * share
    else:
        assert valid.tolist() == [sizes.argmin()]


def test_split_reaches_its_share_and_depends_on_the_seed():
    sizes = np.random.default_rng(0).integers(1000, 30_000, size=600)
    splits = [split_documents(sizes, 0.05, seed) for seed in (0, 1)]
    for train, valid in splits:
        assert 0.05 <= sizes[valid].sum() / sizes.sum() < 0.06
        assert train.tolist() != sorted(train)
    assert set(splits[0][1]) != set(splits[1][1])


def test_one_huge_document_never_goes_to_validation():
    for seed in range(20):
        train, valid = split_documents(np.array([10**9, 5, 7]), 0.05, seed)
        assert 0 in train
        assert len(valid) == 1 + (len(train) == 1)


def test_one_document_cannot_be_split():
    with pytest.raises(ValueError, match=r"1 document cannot be split .*; give more documents, or .*\(--valid-data\)"):
        split_documents(np.array([100]), 0.05, 0)
