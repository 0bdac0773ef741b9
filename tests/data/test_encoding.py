import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from longreach.data import encoding
from longreach.data.corpora import Document
from longreach.data.encoding import Encoder
from longreach.data.tokens import tokenize_in_memory

TEXTS = ["don't stop  \n at 12 words ", "short", "日本 ", "a", "🙂 naïve <|endoftext|>"] * 8


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    """Each text is a batch of its own, and processes are worth their start at once."""
    monkeypatch.setattr(encoding, "BATCH_CHARS", encoding.PIECE_OVERHEAD_CHARS + 10)
    monkeypatch.setattr(encoding, "FEW", 0)


def documents(texts=TEXTS):
    return (Document("", iter([text[:1], text[1:]] if len(text) > 1 else [text])) for text in texts)


class ProcessIds:
    """A tokenizer whose one token of every text is the number of the process that encodes it."""

    eos_id, vocab_size = 0, 1 << 32

    def encode_batch(self, texts):
        return [[os.getpid()] for _ in texts]


class Failing(ProcessIds):
    """A tokenizer that fails at one text."""

    def encode_batch(self, texts):
        if "!" in texts:
            raise ValueError("the tokenizer cannot encode the text (of its own); give another tokenizer.json")
        return super().encode_batch(texts)


class Dying(ProcessIds):
    """A tokenizer at which a process ends, as the system ends one where memory is short."""

    def encode_batch(self, texts):
        os.kill(os.getpid(), signal.SIGKILL)


def by(count, tokenizer, texts=TEXTS):
    """The tokens of all texts and their offsets, made by so many processes; by none where it is 0."""
    with closing(Encoder(tokenizer)) as encoder:
        encoder._count = count
        if count == 0:
            encoder._encoded_here = -10_000
        store = tokenize_in_memory(documents(texts), encoder)
    return store.tokens.tolist(), store.offsets.tolist(), store.tokens.dtype


@pytest.mark.parametrize("count", [1, 3])
def test_processes_make_the_tokens_that_are_made_here(tokenizer, count):
    expected = by(0, tokenizer)
    assert by(count, tokenizer) == expected
    assert by(count, tokenizer, TEXTS[:2]) == by(0, tokenizer, TEXTS[:2])  # fewer batches than processes
    assert tokenizer.decode(expected[0]) == "".join(TEXTS)


def test_all_processes_share_the_work_and_serve_one_text_after_another():
    with closing(Encoder(ProcessIds())) as encoder:
        encoder._count = 3
        first, second = (tokenize_in_memory(documents(), encoder).tokens for _ in range(2))
        assert len(set(first) - {0}) == 3
        assert set(first) == set(second)
        assert os.getpid() not in first
    for process in set(map(int, first)) - {0}:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


def test_only_what_is_worth_their_start_is_given_to_processes(monkeypatch):
    monkeypatch.setattr(encoding, "FEW", 4)
    with closing(Encoder(ProcessIds())) as encoder:
        made_by = [set(tokenize_in_memory(documents("ab"), encoder).tokens) - {0} for _ in range(3)]
    assert made_by[:2] == [{os.getpid()}] * 2  # two batches each
    assert os.getpid() not in made_by[2]


def test_cores_are_shared_with_the_other_processes_of_the_machine(monkeypatch):
    monkeypatch.setattr(encoding, "_cores", lambda: 16)
    assert [Encoder(ProcessIds(), others)._count for others in (1, 4, 32)] == [16, 4, 1]
    monkeypatch.setattr(encoding, "_cores", lambda: 400)
    assert Encoder(ProcessIds())._count == encoding.MOST_PROCESSES


def test_what_fails_in_a_process_is_said_here_and_the_encoder_serves_on():
    with closing(Encoder(Failing())) as encoder:
        encoder._count = 2
        with pytest.raises(ValueError, match=r"^the tokenizer cannot encode the text"):
            tokenize_in_memory(documents(["good", "!", "good", "good"]), encoder)
        assert len(tokenize_in_memory(documents(["good"] * 5), encoder).offsets) == 6


def test_a_process_that_is_gone_is_said():
    with pytest.raises(ValueError, match=r"^a process that makes tokens ended with status -9, .*; run the same comm"):
        by(2, Dying())


def test_a_text_that_breaks_off_leaves_nothing_of_it_for_the_next():
    def broken():
        yield from documents(["a"] * 5)
        raise ValueError("no more")

    with closing(Encoder(ProcessIds())) as encoder:
        encoder._count = 2
        with pytest.raises(ValueError, match="no more"):
            tokenize_in_memory(broken(), encoder)
        assert np.diff(tokenize_in_memory(documents(["ab"] * 3), encoder).offsets).tolist() == [3, 3, 3]


def test_processes_end_with_the_one_that_is_killed_and_ctrl_c_is_not_for_them(tmp_path):
    program = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_encoding import ProcessIds, documents, encoding
from longreach.data.encoding import Encoder
encoding.BATCH_CHARS, encoding.FEW = 300, 0
if __name__ == "__main__":
    encoder = Encoder(ProcessIds())
    encoder._count = 2
    print(*{{int(token) for part in encoder.encode(documents()) for token in part.tokens}} - {{0}}, flush=True)
    time.sleep(600)
"""
    (tmp_path / "program.py").write_text(program)
    with subprocess.Popen(
        [sys.executable, tmp_path / "program.py"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        made_by = [int(word) for word in process.stdout.readline().split()]
        assert len(made_by) == 2
        for number in made_by:
            os.kill(number, signal.SIGINT)
            os.kill(number, 0)
        process.kill()
        assert process.stderr.read() == ""
    for number in made_by:
        while _runs(number):  # ends, or the test's time does
            time.sleep(0.01)


def _runs(process: int) -> bool:
    """Whether a process works still, and is not only waited for."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
