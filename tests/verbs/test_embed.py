import gzip
import json
import re
from pathlib import Path

import numpy as np
import pytest
from published import Published, write

import longreach
from longreach.cli import main
from longreach.data.corpora import PIECE_CHARS
from longreach.verbs import embed as verb

TEXTS = ["the cat runs.", "", "and another word, again: 1 2 3", "dog " * 50, "is"]


@pytest.fixture
def model(tmp_path):
    return write(Published("jina", layers=1), tmp_path / "model", pooling=("mean", True))


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "texts.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps({"body": text}) + "\n" for text in TEXTS).encode()))
    return str(path)


@pytest.fixture
def command(model, data, tmp_path):
    return ["embed", model, "--data", data, "--text-field", "body", "--output", str(tmp_path / "vectors.npy")]


def test_every_document_has_a_row_in_order(command, model, tmp_path, capsys):
    main(command)
    assert "5 vectors of 48 numbers in" in capsys.readouterr().out
    vectors = np.load(tmp_path / "vectors.npy")
    np.testing.assert_allclose(vectors, longreach.load_encoder(model).encode(TEXTS), rtol=1e-5, atol=1e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "texts.jsonl.gz", "vectors.npy"]


def test_it_goes_on_where_it_was_killed(command, tmp_path, monkeypatch):
    main(command)
    right = np.load(tmp_path / "vectors.npy")
    (tmp_path / "vectors.npy").unlink()
    monkeypatch.setattr(verb, "CHUNK", 2)
    finish, chunks, model_encode = verb._finish, [], longreach.load_encoder(command[1]).__class__.encode

    def encode(model, texts, **options):
        if len(chunks) == 2:
            raise KeyboardInterrupt
        chunks.append(texts)
        return model_encode(model, texts, **options)

    monkeypatch.setattr("longreach.encoders.model.EncoderModel.encode", encode)
    with pytest.raises(SystemExit):
        main(command)
    part = tmp_path / "vectors.npy.part"
    with open(part / verb.VECTORS, "ab") as file:
        file.write(b"half a vector")
    chunks.pop()
    monkeypatch.setattr(verb, "_finish", lambda *_: (_ for _ in ()).throw(OSError("no room")))
    with pytest.raises(SystemExit):
        main(command)
    assert not (tmp_path / "vectors.npy").exists()
    monkeypatch.setattr(verb, "_finish", finish)
    main(command)
    np.testing.assert_allclose(np.load(tmp_path / "vectors.npy"), right, rtol=1e-5, atol=1e-6)
    assert [len(chunk) for chunk in chunks] == [2, 1]  # one of the first start, the last of the second
    assert not part.exists()


BLANKS = " \n\t" * 100_000
"""More than is read of a document at first."""


def test_blanks_hide_no_text(model, tmp_path):
    (tmp_path / "blank.txt").write_text(BLANKS + TEXTS[0])
    words = ["--data", str(tmp_path / "blank.txt"), "--max-length", "8", "--output", str(tmp_path / "vectors.npy")]
    main(["embed", model, *words])
    expected = longreach.load_encoder(model).encode(TEXTS[:1], max_length=8)
    np.testing.assert_allclose(np.load(tmp_path / "vectors.npy"), expected, rtol=1e-5, atol=1e-6)


def test_a_word_is_not_cut_where_pieces_of_the_text_end(model, tmp_path):
    (tmp_path / "word.txt").write_text("cat " + "\x7f" * (PIECE_CHARS - 3) + "runs dog")  # which make no tokens
    words = ["--data", str(tmp_path / "word.txt"), "--max-length", "4", "--output", str(tmp_path / "vectors.npy")]
    main(["embed", model, *words])
    expected = longreach.load_encoder(model).encode(["cat runs"])
    np.testing.assert_allclose(np.load(tmp_path / "vectors.npy"), expected, rtol=1e-5, atol=1e-6)


def test_what_goes_on_without_text_is_refused(model, tmp_path, monkeypatch, capsys):
    (tmp_path / "blank.txt").write_text(BLANKS * 8)
    monkeypatch.setattr(verb, "MOST_BYTES", 1 << 20)
    with pytest.raises(SystemExit):
        main(["embed", model, "--data", str(tmp_path / "blank.txt"), "--output", str(tmp_path / "vectors.npy")])
    assert re.search(r"blank\.txt has under \d+ tokens in \d MiB: cut or drop it$", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--max-length", "0"], "--max-length=0: give a positive integer"),
        (["--max-length", "1"], "--max-length=1: its tokenizer adds 2"),
        (["--dtype", "float3"], "dtype='float3'"),
        (["--output", "vectors.txt"], "give a name that ends in .npy"),
        (["--data", "nowhere"], "'nowhere' does not exist"),
        (["--data", ""], "--data: it is empty"),
        (["--output", ""], "--output='': give a path"),
        (["--scaling", "yarn"], '--scaling="yarn" scales the frequencies'),
        (["--scaling", "wide"], "--scaling='wide': give one of"),
        (["--train-length", "512"], "--train-length=512: no slopes are scaled by length here"),
        (["--train-length", "512", "--scaling", "linear-fixed=2"], "--train-length=512: no slopes are scaled by"),
        (["--tokenizer", "."], "--tokenizer=.: model '.' has no tokenizer.json"),
        (["--text-field", "text"], "has no --text-field='text'"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(options, said, command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*command, *options])
    assert ended.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert said in error


def test_what_is_there_is_not_overwritten(command, tmp_path, capsys):
    (tmp_path / "vectors.npy").write_text("mine")
    with pytest.raises(SystemExit):
        main(command)
    assert "it is there already, give another name" in capsys.readouterr().err
    assert (tmp_path / "vectors.npy").read_text() == "mine"


@pytest.mark.parametrize("what", ["text", "pooling"])
def test_what_another_was_begun_with_is_not_gone_on_with(what, command, model, data, monkeypatch, capsys):
    monkeypatch.setattr(verb, "_finish", lambda *_: (_ for _ in ()).throw(OSError("no room")))
    with pytest.raises(SystemExit):
        main(command)
    if what == "text":
        Path(data).write_bytes(gzip.compress(b'{"body": "another"}\n'))
    else:
        Path(model, "1_Pooling/config.json").write_text('{"pooling_mode": "cls"}')
    with pytest.raises(SystemExit):
        main(command)
    assert f"it was begun with another {what}" in capsys.readouterr().err


def test_bad_lines_are_left_out_where_that_is_wanted(command, data, tmp_path, capsys):
    lines = gzip.decompress(Path(data).read_bytes())
    Path(data).write_bytes(gzip.compress(b"{\n" + lines + b'{"body": 3}\n'))
    with pytest.raises(SystemExit):
        main(command)
    assert "--data: " in (line := capsys.readouterr().err.splitlines()[-1])
    assert "(--skip-bad)" in line
    main([*command, "--skip-bad"])
    said = capsys.readouterr()
    assert "5 vectors of 48 numbers in" in said.out
    assert f"left out 2 bad files or lines: {data}:1, {data}:7" in said.err
    assert len(np.load(tmp_path / "vectors.npy")) == 5


def test_no_document_at_all_is_refused(command, data, capsys):
    Path(data).write_bytes(gzip.compress(b""))
    with pytest.raises(SystemExit):
        main(command)
    assert "holds no document" in capsys.readouterr().err
