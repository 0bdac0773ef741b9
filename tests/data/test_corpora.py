import bz2
import gzip
import itertools
import json
import lzma
import os
import subprocess
import sys
import textwrap
import tracemalloc
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from longreach.data import corpora, unpack
from longreach.data.corpora import PIECE_CHARS, Corpus, Document, cut_pieces, open_corpus, reread, scan

COMPRESSORS = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
    ".zst": lambda data: zstandard.ZstdCompressor().compress(data),
}

# What a tokenizer's pre-tokenizer can stumble over: runs of white space, contractions, digits, marks.
WHITE_SPACE = ("\n", "\n\n", " ", "  ", "\t", "\r\n", "\u00a0", "\u2028", "\x1c")
WORDS = ("a", "word", "don't", "'s", "12", "1234", "²", "é", "e\u0301", "日本", "क्षि")
SIGNS = (".", "...", ")\n", "_", "/", "。", "🙂", "\u200b", "\x00")
TEXTS = st.lists(st.one_of(st.sampled_from(WHITE_SPACE + WORDS + SIGNS), st.text(max_size=3)), max_size=40).map("".join)

# The pre-tokenizers of GPT-2 (built in), and of Llama 3 and GPT-4o as their published tokenizer.json files have them.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS = {
    "gpt2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "llama3": pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
    "gpt4o": pre_tokenizers.Split(Regex(GPT4O), "isolated"),
}


def texts_of(corpus: Corpus) -> list[str]:
    return ["".join(document.pieces) for document in corpus]


def is_exact_cut(left: str, right: str) -> bool:
    return left[-1].isalnum() and right[0].isspace()


@settings(max_examples=150, deadline=None)
@given(text=TEXTS, limit=st.integers(1, 12))
def test_pieces_are_cut_at_exact_places_where_there_are_any(text, limit):
    pieces = list(cut_pieces([text], limit))
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= limit for piece in pieces)
    for left, right in itertools.pairwise(pieces):
        if not is_exact_cut(left, right):
            assert len(left) == limit
            assert not any(is_exact_cut(left[:end], left[end:]) for end in range(1, limit))


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
def test_a_text_cut_at_exact_places_tokenizes_as_the_whole(name, text):
    ends = [end for end in range(1, len(text)) if is_exact_cut(text[:end], text[end:])]
    parts = [text[start:end] for start, end in itertools.pairwise([0, *ends, len(text)])]

    def tokens_of(part: str) -> list[str]:
        return [token for token, _ in PRE_TOKENIZERS[name].pre_tokenize_str(part)]

    assert [token for part in parts for token in tokens_of(part)] == tokens_of(text)


@settings(deadline=None)
@given(text=TEXTS, limit=st.integers(1, 12), block=st.integers(1, 5))
def test_pieces_do_not_depend_on_the_blocks_the_text_arrives_in(text, limit, block):
    blocks = [text[start : start + block] for start in range(0, len(text), block)]
    assert list(cut_pieces(blocks, limit)) == list(cut_pieces([text], limit))


def test_text_without_any_place_to_cut_keeps_every_character():
    assert list(cut_pieces(["." * 25], limit=10)) == ["." * 10, "." * 10, "." * 5]


@pytest.mark.parametrize("compression", COMPRESSORS)
def test_text_file_keeps_its_bytes_and_loses_its_byte_order_mark(tmp_path, compression):
    text = "first\r\nsecond\r third \x01\x0b 日本 🙂\n" * 9000  # longer than a block and than a piece
    path = tmp_path / f"a.txt{compression}"
    path.write_bytes(COMPRESSORS[compression](b"\xef\xbb\xbf" + text.encode()))
    (document,) = open_corpus(str(path))
    pieces = list(document.pieces)
    assert document.name == str(path)
    assert "".join(pieces) == text
    assert len(pieces) > 1
    assert max(map(len, pieces)) <= PIECE_CHARS


@pytest.mark.parametrize("compression", COMPRESSORS)
def test_json_lines_are_documents(tmp_path, compression):
    texts = ["one", "two\nlines", "", "ünï\u2028🙂", "long " * 30_000]
    lines = "\n".join(json.dumps({"id": 1, "body": text}) for text in texts) + "\n\n"
    path = tmp_path / f"a.jsonl{compression}"
    path.write_bytes(COMPRESSORS[compression](lines.encode()))
    corpus = open_corpus(str(path), text_field="body")
    assert texts_of(corpus) == [text for text in texts if text]
    assert [document.name for document in corpus][:2] == [f"{path}:1", f"{path}:2"]
    assert all(len(piece) <= PIECE_CHARS for document in corpus for piece in document.pieces)


def test_concatenated_frames_and_members_are_read_to_the_end(tmp_path):
    for suffix in (".gz", ".xz", ".zst"):
        path = tmp_path / f"a.txt{suffix}"
        path.write_bytes(COMPRESSORS[suffix](b"one ") + COMPRESSORS[suffix](b"two"))
        assert texts_of(open_corpus(str(path))) == ["one two"]


def test_a_big_file_is_never_whole_in_memory(tmp_path):
    path = tmp_path / "big.txt.gz"
    path.write_bytes(gzip.compress(b"some words of text\n" * 1_000_000, compresslevel=1, mtime=0))  # 19 MB
    tracemalloc.start()
    found = scan(open_corpus(str(path)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.sizes.tolist() == [19_000_000]
    assert peak < 4e6


def test_a_folder_that_cannot_be_read_is_not_passed_over(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.txt").write_text("text")
    scandir = os.scandir

    def refused(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(PermissionError, match="closed"):
        open_corpus(str(tmp_path))


def test_folder_is_searched_for_text(tmp_path):
    for name, content in {
        "b.txt": b"b",
        "a/z.md": b"z",
        "a/deep/er/c.py": b"c",
        "d.jsonl": b'{"text": "d1"}\n{"text": "d2"}',
        "empty.txt": b"",
        "image.png": b"\x89PNG\r\n\x00\x00",
        "archive.gz": gzip.compress(b"\x00\x01", mtime=0),
        ".hidden": b"h",
        ".git/config": b"g",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "broken-link").symlink_to(tmp_path / "nowhere")
    assert texts_of(open_corpus(str(tmp_path))) == ["c", "z", "b", "d1", "d2"]


def test_glob_takes_what_it_matches_in_order(tmp_path):
    for name in ("b.txt", "a.txt", "sub/deep/c.txt", "d.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert texts_of(open_corpus(f"{tmp_path}/*.txt")) == ["a.txt", "b.txt"]
    assert texts_of(open_corpus(f"{tmp_path}/**/*.txt")) == ["a.txt", "b.txt", "sub/deep/c.txt"]
    (tmp_path / "[x].txt").write_text("a name, not a pattern")
    assert texts_of(open_corpus(f"{tmp_path}/[x].txt")) == ["a name, not a pattern"]


def test_standard_library_is_source_without_tests():
    corpus = open_corpus(None)
    names = [Path(document.name) for document in corpus]
    assert names == sorted(names)
    assert {"ast.py", "typing.py", "argparse.py"} <= {path.name for path in names}
    assert not any({"test", "tests", "site-packages", "idlelib", "__pycache__"} & set(path.parts) for path in names)
    assert sum(scan(corpus).sizes) > 5e6


def test_standard_library_leaves_out_only_what_is_no_utf8(tmp_path, monkeypatch):
    (tmp_path / "good.py").write_text("good")
    (tmp_path / "latin.py").write_bytes(b"# \xe9")
    monkeypatch.setattr(corpora.sysconfig, "get_path", lambda name: str(tmp_path))
    assert texts_of(open_corpus(None)) == ["good"]


def test_scan_depends_on_texts_and_borders_but_not_on_names_or_pieces(corpus_of):
    base = scan(corpus_of("ab", "c"))
    assert base.sizes.tolist() == [2, 1]
    assert scan(corpus_of("a", "bc")).fingerprint != base.fingerprint
    assert scan(corpus_of("abc")).fingerprint != base.fingerprint
    assert scan(corpus_of("c", "ab")).fingerprint != base.fingerprint
    pieces = {"x": ["a", "b"], "y": ["c"]}
    other = Corpus("other", lambda: (Document(name, iter(parts)) for name, parts in pieces.items()))
    assert scan(other).fingerprint == base.fingerprint
    assert scan(corpus_of("ab", "", "c")).fingerprint == base.fingerprint
    assert scan(corpus_of("é🙂")).sizes.tolist() == [6]


def test_reread_tells_a_text_that_changed_and_counts_what_the_reader_left(corpus_of):
    before = scan(corpus_of("one", "two"))
    assert [document.name for document in reread(corpus_of("one", "two"), before)] == ["0", "1"]
    for changed in (corpus_of("one", "2"), corpus_of("one"), corpus_of("one", "two", "three")):
        with pytest.raises(ValueError, match="'test' changed while it was read; run again"):
            list(reread(changed, before))


def write_and_open(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    texts_of(open_corpus(str(path)))


BIG = b"a" * (unpack.BLOCK_BYTES - 2)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"ab\xff", r"a\.txt' is not UTF-8: byte 0xff at offset 2; convert it"),
        ("bom.txt", b"\xef\xbb\xbfab\xff", r"byte 0xff at offset 5; convert"),
        ("utf16.txt", "text".encode("utf-16"), r"not UTF-8; convert"),
        # The character begins in one block of the file and turns out wrong in the next.
        ("border.txt", BIG + "é".encode() + b"\xe6\x97" + b"x", rf"byte 0xe6 at offset {len(BIG) + 2}; convert"),
        ("cut.txt", BIG + b"b\xe6\x97", rf"byte 0xe6 at offset {len(BIG) + 1}; convert"),
        ("empty.txt", b"", r"empty\.txt' holds no text; name a source"),
        ("empty.jsonl", b"\n \n", r"empty\.jsonl' holds no text"),
        ("a.jsonl", b'{"text": "fine"}\n{"text": ', r"a\.jsonl:2 is not JSON \(.*\); every line"),
        ("bytes.jsonl", b'{"text": "\xff"}', r"bytes\.jsonl:1 is not JSON"),
        ("deep.jsonl", b"[" * 200_000, r"deep\.jsonl:1 is not JSON"),
        ("list.jsonl", b"[1]", r"list\.jsonl:1 holds list; every line must be one JSON object"),
        (
            "twice.jsonl",
            b'{"text": "a", "text": "b"}',
            r"twice\.jsonl:1 is not JSON \(the key 'text' comes twice in one",
        ),
        ("inner.jsonl", b'{"text": "a", "by": {"x": 1, "x": 2}}', r"inner\.jsonl:1 is not JSON \(the key 'x' comes tw"),
        ("field.jsonl", b'{"body": "x"}', r"field\.jsonl:1 has no text_field='text'; its fields are 'body': name one"),
        ("null.jsonl", b'{"text": null}', r"null\.jsonl:1, field 'text' holds NoneType, not text"),
        (
            "half.jsonl",
            b'{"text": "ab\\ud83d"}',
            r"half\.jsonl:1, field 'text' holds half a surrogate pair at character 2",
        ),
        (
            "a.txt.gz",
            gzip.compress(b"text" * 99, mtime=0)[:-9],
            r"a\.txt\.gz' is no whole gzip file \(.*\); make or fetch it again",
        ),
        ("a.txt.xz", lzma.compress(b"text" * 99)[:-9], r"a\.txt\.xz' is no whole xz file"),
        ("a.txt.zst", COMPRESSORS[".zst"](b"text" * 99)[:-3], r"a\.txt\.zst' is no whole zstd file"),
    ],
)
def test_bad_files_are_named_with_a_mend(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message) as error:
        write_and_open(tmp_path / name, content)
    assert "\n" not in str(error.value)


def test_sources_that_are_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"/nowhere' does not exist; give a file, a folder, a glob or hf:NAME"):
        open_corpus(f"{tmp_path}/nowhere")
    with pytest.raises(ValueError, match="is empty: give a file"):
        open_corpus("")
    with pytest.raises(ValueError, match=r"\*\.txt' matches no file"):
        open_corpus(f"{tmp_path}/*.txt")
    (tmp_path / "only.bin").write_bytes(b"\x00")
    with pytest.raises(ValueError, match="is a folder without any text file"):
        open_corpus(str(tmp_path))


def test_hugging_face_without_datasets_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"'hf:name' needs .*: pip install 'longreach\[hf\]'"):
        open_corpus("hf:name")


def test_hugging_face_data_sets(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"body": "one"}\n{"body": ""}\n{"body": "two"}\n')
    (folder / "validation.jsonl").write_text('{"body": "three"}\n')
    (tmp_path / "no-train").mkdir()
    (tmp_path / "no-train" / "test.jsonl").write_text('{"body": "x"}\n')
    # In a process of its own, whose environment keeps it off the network and the user's cache.
    script = f"""
        import os
        from itertools import islice
        from longreach.data.corpora import open_corpus
        from longreach.data.stream import open_stream

        def texts(corpus):
            return ["".join(document.pieces) for document in corpus]

        def message(source, **options):
            try:
                texts(open_corpus(source, **options))
            except ValueError as error:
                return str(error)

        corpus = open_corpus("hf:{folder}", text_field="body")
        assert texts(corpus) == texts(corpus) == ["one", "two"], texts(corpus)
        assert texts(corpus.validation) == ["three"]
        stream = open_stream("hf:{folder}", "body", 10)
        assert [text for text, _ in islice(stream.texts(), 5)] == ["one", "two", "one", "two", "one"]
        assert texts(stream.validation) == ["three"]
        assert open_stream("hf:{folder}", "body", 10).fingerprint == stream.fingerprint
        assert open_stream("hf:{folder}", "text", 10).fingerprint != stream.fingerprint
        os.utime("{folder}/train.jsonl", (1, 1))
        assert open_stream("hf:{folder}", "body", 10).fingerprint != stream.fingerprint
        assert "row 0 has no text_field='text'; its columns are 'body'" in message("hf:{folder}")
        assert "has no split 'train', only test; name" in message("hf:{tmp_path}/no-train")
        for missing in ("hf:{folder}:no-such-config", "hf:no/such-data-set"):
            assert "cannot be loaded (" in message(missing), missing
            assert "\\n" not in message(missing)
        for name in ("a.parquet", "a.csv", "a.json", "a.jsonl"):
            os.makedirs(f"{tmp_path}/{{name}}")
            with open(f"{tmp_path}/{{name}}/{{name}}", "wb") as junk:
                junk.write(b"[" * 5000)
            assert "cannot be loaded (" in message(f"hf:{tmp_path}/{{name}}"), name
    """
    environment = {"HOME": str(tmp_path), "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PATH": ""}
    environment["PYTHONPATH"] = os.environ.get("PYTHONPATH", "")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
