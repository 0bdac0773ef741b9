"""Files whose names say nothing or lie: read as documents by their content, or refused with what they are."""

import bz2
import gzip
import io
import json
import lzma
import tarfile
import zipfile

import pytest
import zstandard

from longreach.data import unpack
from longreach.data.content import BadText, kind_of
from longreach.data.corpora import open_corpus

DOCUMENTS = ['first, the\n"one" in two lines', "second 日本", "third"]
LINES = "".join(json.dumps({"text": text, "url": "x"}) + "\n" for text in DOCUMENTS).encode()
TABLE = 'id,text\n1,"first, the\n""one"" in two lines"\n2,second 日本\n3,third\n'.encode()
TABS = b"id\ttext\n1\tfirst\n2\tsecond\n"
PACKED = {
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "zstd": lambda data: zstandard.ZstdCompressor().compress(data),
}


def texts(path, **options):
    return ["".join(document.pieces) for document in open_corpus(str(path), **options)]


def archive(kind):
    data = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(data, "w") as packed:
            packed.writestr("a.txt", "text")
    else:
        with tarfile.open(fileobj=data, mode="w") as packed:
            entry = tarfile.TarInfo("a.txt")
            entry.size = 4
            packed.addfile(entry, io.BytesIO(b"text"))
    return data.getvalue()


@pytest.mark.parametrize("name", ["a", "a.txt", "a.json", "a.json.gz", "a.ndjson", "a.csv", "a.jsonl", "a.zst"])
@pytest.mark.parametrize("content", [LINES, b"\xef\xbb\xbf" + LINES, b"\n\n" + LINES])
def test_json_lines_under_any_name(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert texts(tmp_path / name) == DOCUMENTS


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("name", ["c4-train.json.gz", "a", "a.jsonl", "a.csv"])
def test_compressed_under_any_name(tmp_path, packed, name):
    (tmp_path / name).write_bytes(PACKED[packed](LINES))
    assert texts(tmp_path / name) == DOCUMENTS


@pytest.mark.parametrize("name", ["a.txt.gz", "a.xz", "a.zst", "a.bz2", "a.md"])
def test_text_under_any_name(tmp_path, name):
    (tmp_path / name).write_bytes(b"plain text")
    assert texts(tmp_path / name) == ["plain text"]


@pytest.mark.parametrize("name", ["a.csv", "a.txt", "a", "a.tsv"])
def test_tables_under_any_name(tmp_path, name):
    (tmp_path / name).write_bytes(TABLE)
    assert texts(tmp_path / name) == DOCUMENTS
    assert texts(tmp_path / name, text_field="id") == ["1", "2", "3"]
    (tmp_path / name).write_bytes(TABS)
    assert texts(tmp_path / name) == ["first", "second"]
    with pytest.raises(ValueError, match="no text_field='body'; its columns are 'id', 'text'"):
        texts(tmp_path / name, text_field="body")


REFUSED = {
    "a zip archive": archive("zip"),
    "a tar archive": archive("tar"),
    "a parquet file": b"PAR1\x15\x04" + bytes(20),
    "an Arrow file": b"ARROW1\0\0" + bytes(20),
    "an Arrow stream": b"\xff\xff\xff\xff" + bytes(20),
    "a PDF": b"%PDF-1.7\n%\xe2\xe3",
    "an SQLite database": b"SQLite format 3\0" + bytes(20),
    "HTML or XML": b"\n<!DOCTYPE html><html><body>text</body></html>",
    "is HTML or XML": b'<?xml version="1.0"?><page>text</page>',
    "JSON but not": json.dumps([{"text": "one"}]).encode(),
    "is JSON but not": json.dumps({"text": "one"}, indent=1).encode(),
    "JSON but": b"[1.5, 2, 3]",
    "UTF-16": "text".encode("utf-16"),
    "UTF-32": "text".encode("utf-32"),
    "binary: byte 0x00": b"some text" * 2000 + b"\0",
}


@pytest.mark.parametrize("told", REFUSED)
@pytest.mark.parametrize("name", ["a.txt", "a", "a.jsonl.gz"])
def test_what_is_no_text_is_refused_by_what_it_is(tmp_path, told, name):
    path = tmp_path / name
    for content in (REFUSED[told], gzip.compress(REFUSED[told])):
        path.write_bytes(content)
        as_lines = ".jsonl" in name and ("JSON" in told or "binary" in told)  # refused at its first line
        with pytest.raises(ValueError, match="every line must be one JSON object" if as_lines else told) as raised:
            texts(path)
        assert str(path) in str(raised.value)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize(
    ("name", "content"),
    [("a.txt", b"a" * 2**20), ("a.txt", b"the cat\n" * 2**18), ("a.jsonl", b'{"text": "a"}\n' * 2**17)],
)
def test_what_unpacks_without_an_end_in_sight(tmp_path, monkeypatch, packed, name, content):
    monkeypatch.setattr(unpack, "LEAST_BOUND", 2**12)
    monkeypatch.setattr(unpack, "LARGEST_RATIO", 100)
    (tmp_path / name).write_bytes(PACKED[packed](content))
    with pytest.raises(BadText, match=rf"{name}' unpacks to over 100 times its size: that is no text"):
        texts(tmp_path / name)
    (tmp_path / "b").write_text("good")
    assert texts(tmp_path, skip_bad=True)[-1] == "good"


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.jsonl.gz"])
def test_a_line_without_an_end(tmp_path, monkeypatch, name):
    monkeypatch.setattr(unpack, "LONGEST_LINE", 2**19)
    content = b'{"text": "' if "json" in name else b"id,text\n"
    content += b"a" * 2**20
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    with pytest.raises(BadText, match=rf"{name} has a line of over 0 MiB"):
        texts(tmp_path / name)


@pytest.mark.parametrize(
    "line", [b"2,b\n", b'b\n","\n', 'ä\n","\n'.encode()], ids=["one cell", "cells", "cells of two bytes a letter"]
)
def test_a_row_without_an_end(tmp_path, monkeypatch, line):
    """Quotes that nothing closes, or that go from line to line, would take the rest of a file into memory."""
    monkeypatch.setattr(unpack, "LONGEST_LINE", 2**12)
    good = b'"0","%s"\n' % (b"a\n" * 500)  # many rows, none of which is too long
    (tmp_path / "a.csv").write_bytes(b"id,text\n" + good * 20 + b'1,"a\n' + line * 2**12)
    with pytest.raises(BadText, match=r"a\.csv:10022 begins a row of over 0 MiB; mend or drop it$"):
        texts(tmp_path / "a.csv")
    read = 0

    def reading(path, decoded=unpack.decoded):
        nonlocal read
        for block in decoded(path):
            for start in range(0, len(block), 100):
                read += 100
                yield block[start : start + 100]

    monkeypatch.setattr(unpack, "decoded", reading)
    assert texts(tmp_path, skip_bad=True) == ["a\n" * 500] * 20
    assert 20 * len(good) < read < 20 * len(good) + 2**12 + 1000


@pytest.mark.parametrize("packed", PACKED)
def test_what_is_packed_twice(tmp_path, packed):
    (tmp_path / "a").write_bytes(gzip.compress(PACKED[packed](b"plain text")))
    with pytest.raises(BadText, match=f"is packed by {packed} within what it is packed by: unpack it once"):
        texts(tmp_path / "a")


@pytest.mark.parametrize(
    "text",
    [
        "Hello, world\nand so on\n",
        "[1] A reference, and more.\n[2] Another.\n",
        "{curly} prose is prose\n",
        "import os, sys\nimport re, csv\n\nx = 1\n",
        "Dear all,\nwe meet, as ever, at noon.\nYours,\n",
        "Dear John, hello\nI am well, thanks\nSee you, bye\n",
        "Hello, world\nGood night, moon\nand, so on\nto, the end\n",
        "one, two, three\nfour, five, six\nseven, eight, nine\n",
        "<unk> is a token of WikiText\n = Title = \n",
        "a\tb\n",
        "",
    ],
)
def test_prose_and_source_are_text(text):
    assert kind_of(text.encode(), "a.txt", "text") == "text"


@pytest.mark.parametrize(
    "text",
    [
        "id,body\n1,hello there\n2,more\n",
        "id, body\n1, hello\n2, there\n",
        'a,b\n"x, y",z\n"u",v\n',
        "a\tb\nc\td\ne\tf\n",
        "text, url\none, x\n",
    ],
)
def test_a_table_is_one_with_blanks_after_its_commas_too(text):
    assert kind_of(text.encode(), "a.txt", "text") == "table"


@pytest.mark.parametrize("source", ["hf:", "hf::", "hf: ", "hf:name:", "hf::config", "hf:a:b:c"])
def test_names_of_data_sets(source):
    with pytest.raises(ValueError, match="names no data set: give hf:NAME"):
        open_corpus(source)


@pytest.mark.parametrize(
    ("source", "told"), [("", "empty"), (" ", "empty"), ("/dev/null", "neither a file"), ("nowhere", "does not exist")]
)
def test_what_is_no_source(source, told):
    with pytest.raises(ValueError, match=told):
        open_corpus(source)


def test_a_file_that_breaks_off_while_it_is_read_is_named(tmp_path):
    (tmp_path / "a.txt").symlink_to("/proc/self/mem")  # whose first byte no process has
    with pytest.raises(OSError, match="error") as failed:
        texts(tmp_path / "a.txt")
    assert failed.value.filename == str(tmp_path / "a.txt")
