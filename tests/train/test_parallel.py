import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch
from ranks import free_port, launch, run
from safetensors.torch import load_file

from longreach.cli import main
from longreach.data.stream import READER
from longreach.models.files import load_model
from longreach.results import Results, read_training
from longreach.train.checkpoint import checkpoints, last_step
from longreach.train.parallel import Ranks, read_launch

SMALL = (
    "--vocab-size 280 --num-layers 2 --num-heads 2 --d-model 32 --train-length 32 --batch-size 8 "
    "--warmup-steps 10 --device cpu --checkpoint-every 10"
)
TESTED = "--valid-lengths 32,64 --valid-tokens 512 --task perplexity,positions"

pytestmark = pytest.mark.usefixtures("unrendered")


@pytest.fixture(scope="module")
def small(corpus, tmp_path_factory):
    """Arguments that make training quick, over what a test says."""
    words = [*SMALL.split(), "--cache", str(tmp_path_factory.mktemp("cache"))]
    return [*words, "--data", str(corpus), "--valid-fraction", "0.2"]


@pytest.fixture(scope="module")
def alone(small, tmp_path_factory):
    """A run of one process over 50 steps."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    main(["train", "--output", str(folder), *small, "--steps", "50"])
    return folder


def metrics(folder):
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def losses(folder):
    return [line["loss"] for line in metrics(folder)]


# The loss does not depend on how it is computed


@pytest.mark.parametrize(
    "words",
    ["--parallel auto", "--parallel ddp --accumulation 2", "--parallel fsdp --accumulation 2"],
)
def test_the_loss_curve_is_that_of_one_process(small, alone, tmp_path, words):
    run(["train", "--output", str(tmp_path / "run"), *small, "--steps", "50", *words.split()], tmp_path / "logs")
    assert losses(tmp_path / "run") == pytest.approx(losses(alone), rel=1e-5)
    norms, expected = ([line["gradient_norm"] for line in metrics(folder)] for folder in (tmp_path / "run", alone))
    assert norms == pytest.approx(expected, rel=1e-5)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == sorted(path.name for path in alone.iterdir())
    one, other = (load_model(folder).state_dict() for folder in (tmp_path / "run", alone))
    # Adam divides by the root of a mean of squares: where a gradient is all but 0, its rounding takes whole steps.
    assert all((one[name] - other[name]).abs().max() < 1e-3 for name in other)


PACKED = "--packing documents --train-length 700 --steps 4 --warmup-steps 2 --lengths 350:50%,700:50%"


@pytest.fixture(scope="module")
def packed_alone(small, tmp_path_factory):
    """A run of one process on packed documents."""
    folder = tmp_path_factory.mktemp("packed") / "run"
    main(["train", "--output", str(folder), *small, *PACKED.split()])
    return folder


@pytest.mark.parametrize("parallel", ["--parallel ddp", "--parallel fsdp", "--context-parallel 2"])
def test_packed_documents_and_a_curriculum_are_shared(small, packed_alone, tmp_path, parallel):
    words = [*small, *PACKED.split(), *parallel.split(), "--accumulation", "2"]
    run(["train", "--output", str(tmp_path / "run"), *words], tmp_path / "logs")
    assert "packed 9 documents into " in (tmp_path / "logs" / "err0").read_text()
    for name in ("loss", "gradient_norm", "tokens"):
        one, other = ([line[name] for line in metrics(folder)] for folder in (tmp_path / "run", packed_alone))
        assert one == pytest.approx(other, rel=1e-5)


def test_a_stream_goes_on_in_its_midst_however_many_processes_there_are(small, corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    folder = tmp_path / "set"
    folder.mkdir()
    texts = [path.read_text() for path in sorted(corpus.iterdir())]
    for name, part in {"train-0": texts[:5], "train-1": texts[5:9], "validation": texts[9:]}.items():
        rows = (json.dumps({"text": text}) for text in part)
        (folder / f"{name}.jsonl").write_text("".join(f"{row}\n" for row in rows))
    words = [*small[: small.index("--data")], "--data", f"hf:{folder}", "--streaming", "--shuffle-buffer", "2"]
    words += ["--steps", "40"]
    main(["train", "--output", str(tmp_path / "alone"), *words])
    assert not [thread for thread in threading.enumerate() if thread.name == READER]
    words = ["train", "--output", str(tmp_path / "run"), *words]
    interrupted = launch(words, tmp_path / "logs")
    until(lambda: len(metrics(tmp_path / "run")) > 12, interrupted)
    for rank in interrupted:
        rank.kill(signal.SIGKILL)
        rank.wait()
    assert last_step(tmp_path / "run") >= 10
    main(words)
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)
    os.utime(folder / "train-0.jsonl", (1, 1))
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert "was begun with another text; give a new folder" in capsys.readouterr().err


# Randomized positions are drawn from more than there are tokens, without which all draws were alike.
@pytest.mark.parametrize("method", ["sinusoidal-shifted", "rotary-randomized:range=1024"])
def test_positions_are_drawn_alike(small, tmp_path, method):
    words = [*small, "--method", method, "--steps", "3", "--warmup-steps", "1", "--learning-rate", "0.02"]
    main(["train", "--output", str(tmp_path / "alone"), *words])
    run(["train", "--output", str(tmp_path / "run"), *words, "--accumulation", "2"], tmp_path / "logs")
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)


def test_validation_is_shared_recomputed_blocks_are_sharded_and_one_rank_tracks(small, tmp_path, events):
    words = [*small, "--steps", "10", "--validate-every", "5", "--batch-size", "4", "--sample-every", "5"]
    words += ["--track", "tensorboard"]
    main(["train", "--output", str(tmp_path / "alone"), *words])
    run(["train", "--output", str(tmp_path / "run"), *words, "--parallel", "fsdp", "--recompute"], tmp_path / "logs")
    one, other = (
        {line["step"]: line["valid_loss"] for line in metrics(tmp_path / name) if "valid_loss" in line}
        for name in ("run", "alone")
    )
    assert one == pytest.approx(other, rel=1e-5)
    assert list(one) == [5, 10]
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)
    assert len(list((tmp_path / "run").glob("events.*"))) == 1
    scalars, texts = events(tmp_path / "run")
    assert scalars["training/loss"] == {line["step"]: pytest.approx(line["loss"]) for line in metrics(tmp_path / "run")}
    assert texts["training/sample"] == events(tmp_path / "alone")[1]["training/sample"]


def test_dropout_draws_otherwise_on_each_rank_and_as_before_when_resumed():
    draws = []
    for rank, seed in ((0, 5), (1, 5), (1, 5), (2, 5), (1, 6)):
        torch.manual_seed(1)
        Ranks(rank, 3).draw_otherwise(0, seed)
        draws.append(torch.rand(()).item())
    torch.manual_seed(1)
    assert draws[0] == torch.rand(()).item()
    assert draws[1] == draws[2]
    assert len(set(draws)) == 4


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ("", "--parallel ddp"),
        ("--parallel ddp --checkpoint-every 1 --async-checkpoint", "--parallel fsdp"),
        ("--parallel fsdp --checkpoint-every 1 --validate-every 1", ""),
    ],
)
def test_a_run_goes_on_however_many_processes_there_are(small, alone, tmp_path, first, then):
    words = ["train", "--output", str(tmp_path / "run"), *small, "--steps", "50"]
    size = 2 if first else 1
    interrupted = launch([*words, *first.split()], tmp_path / "logs", size=size)
    until(lambda: len(metrics(tmp_path / "run")) > 12, interrupted)
    for rank in interrupted:
        rank.kill(signal.SIGKILL)
        rank.wait()
    last = checkpoints(tmp_path / "run")[0]
    assert last_step(tmp_path / "run") >= 10
    written = {name: load_file(last / f"{name}.safetensors") for name in range(size)}
    assert len(list(last.iterdir())) == size + 1
    if "ddp" in first:  # each tensor is written by one
        assert not written[0].keys() & written[1].keys()
        assert all(any(name.startswith("model.") for name in part) for part in written.values())
    if "fsdp" in first:
        numbers = [sum(x.numel() for name, x in part.items() if x.dim()) for part in written.values()]
        assert max(numbers) < 0.6 * sum(numbers)
    run([*words, *then.split()], tmp_path / "logs", size=2 if then else 1)
    assert losses(tmp_path / "run") == pytest.approx(losses(alone), rel=1e-5)
    assert not list((tmp_path / "run").glob(".*.tmp"))


def test_a_damaged_shard_is_named_and_the_checkpoint_before_it_gone_on_from(small, alone, tmp_path):
    words = ["train", "--output", str(tmp_path / "run"), *small, "--steps", "50", "--keep-checkpoints", "2"]
    words += ["--parallel", "fsdp"]
    interrupted = launch(words, tmp_path / "logs")
    until(lambda: len(metrics(tmp_path / "run")) > 22, interrupted)
    for rank in interrupted:
        rank.kill(signal.SIGKILL)
        rank.wait()
    last, before = checkpoints(tmp_path / "run")
    shard = bytearray((last / "1.safetensors").read_bytes())
    shard[-1] ^= 1
    (last / "1.safetensors").write_bytes(shard)
    said = run(words, tmp_path / "logs", status=2)
    assert re.search(
        rf"{last} is damaged \(.* in 1\.safetensors: its digest is another\); delete it to go on from {before.name}$",
        said[0].splitlines()[-1],
    )
    assert said[1] == ""
    shutil.rmtree(last)
    run(words, tmp_path / "logs")
    assert losses(tmp_path / "run") == pytest.approx(losses(alone), rel=1e-5)


def until(condition, ranks, seconds=300.0):
    """Wait for something that processes do."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, [rank.errors.read_text() for rank in ranks]
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("method", "size", "words"),
    [
        ("alibi", 4, "--parallel fsdp --accumulation 2 --recompute"),
        ("sinusoidal-shifted", 2, "--validate-every 3 --sample-every 6"),
    ],
)
def test_processes_share_sequences_as_one_has_them(small, tmp_path, method, size, words):
    words = [*small, "--method", method, "--steps", "6", "--warmup-steps", "1", *words.split()]
    alone = ["none" if word == "fsdp" else word for word in words]
    main(["train", "--output", str(tmp_path / "alone"), *alone])
    run(["train", "--output", str(tmp_path / "run"), *words, "--context-parallel", "2"], tmp_path / "logs", size)
    for name in ("loss", "gradient_norm", "tokens", "valid_loss"):
        one, other = ([line.get(name, 0) for line in metrics(tmp_path / folder)] for folder in ("run", "alone"))
        assert one == pytest.approx(other, rel=1e-5), name
    assert metrics(tmp_path / "run")[-1].get("sample") == metrics(tmp_path / "alone")[-1].get("sample")
    check_exchanged(tmp_path / "run", tmp_path / "logs", words)


def check_exchanged(folder, logs, words):
    """What processes sent each other is told of each step, and of the last one by layer and head."""
    exchanged, steps = read_training(folder / "training.json").exchanged, metrics(folder)
    # Of each of 8 sequences of 32 tokens the first of two pieces is needed by the other process, where a head has no
    # slope to its end; 2 layers, 2 heads of 16, a key and its value in float32. Recomputed, it is sent twice. Gradients
    # come back once; in a ring of two they go to the other and home, and keys and values to the other.
    times = 2 if "--recompute" in words else 1
    whole = 8 * 32 * 2 * 2 * 2 * 16 * 4
    assert exchanged.all_gather == (times + 1) * whole
    assert exchanged.ring == (times + 3) * whole
    assert len(exchanged.forward) == len(exchanged.backward) == 2
    assert all(len(heads) == 2 for heads in (*exchanged.forward, *exchanged.backward))
    assert exchanged.forward == tuple(tuple(times * back for back in heads) for heads in exchanged.backward)
    assert 0 < exchanged.total - exchanged.bound <= exchanged.all_gather
    for name, value in (("exchanged", exchanged.total), ("all_gather", exchanged.all_gather), ("ring", exchanged.ring)):
        assert steps[-1][name] == value
    said = (logs / "out0").read_text().splitlines()[1]
    assert said.startswith("In the last step processes sent each other 0.")
    assert (logs / "out1").read_text() == ""


def test_a_dry_run_by_two_counts_a_part_of_the_weights_in_each(small, tmp_path):
    words = ["train", "--output", str(tmp_path / "run"), *small, "--dry-run", "--parallel", "fsdp"]
    run(words, tmp_path / "logs")
    assert (tmp_path / "logs" / "out0").read_text().splitlines()[0].endswith(" parameters, 2 processes")
    assert (tmp_path / "logs" / "out1").read_text() == ""
    assert not (tmp_path / "run").exists()


# What ends


@pytest.fixture
def training(small, tmp_path):
    """A training by two processes that goes on and on, and is 20 steps old."""
    ranks = launch(["train", "--output", str(tmp_path / "run"), *small, "--steps", "1000000"], tmp_path / "logs")
    until(lambda: len(metrics(tmp_path / "run")) > 20, ranks)
    yield ranks
    for rank in ranks:
        if rank.status is None:
            rank.kill(signal.SIGKILL)
            rank.wait()


def last_line(rank):
    return rank.errors.read_text().splitlines()[-1]


def done(folder):
    return len(metrics(folder))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_any_rank_keeps_the_last_step(training, small, tmp_path, number):
    training[1].kill(number)
    status, word = {signal.SIGTERM: (75, "terminated"), signal.SIGINT: (130, "interrupted")}[number]
    assert [rank.wait() for rank in training] == [status, status]
    assert last_line(training[0]) == f"longreach train: {word}; run the same command again to go on"
    assert training[1].errors.read_text() == ""
    steps = done(tmp_path / "run")
    ranks = launch(["train", "--output", str(tmp_path / "run"), *small, "--steps", "1000000"], tmp_path / "logs")
    until(lambda: done(tmp_path / "run") > steps, ranks)
    for rank in ranks:
        rank.kill(number)
    assert [rank.wait() for rank in ranks] == [status, status]
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(1, done(tmp_path / "run") + 1))


@pytest.mark.parametrize("lost", [0, 1])
def test_a_killed_rank_ends_the_others(training, lost):
    training[lost].kill(signal.SIGKILL)
    assert training[1 - lost].wait() == 2
    if lost == 1:
        told = f"rank 1 (process {training[1].pid} on {socket.gethostname()}) ended without a word"
        assert (
            last_line(training[0])
            == f"longreach train: {told}: run the same command again to go on from the last checkpoint"
        )


@pytest.mark.parametrize("lost", [0, 1])
def test_a_hung_rank_is_named_within_the_timeout(training, lost):
    training[lost].kill(signal.SIGSTOP)
    assert training[1 - lost].wait() == 1
    told = f"rank {lost} (process {training[lost].pid} on {socket.gethostname()}) gave no sign of life for 5 s"
    assert (
        last_line(training[1 - lost])
        == f"longreach train: {told}: run the same command again to go on from the last checkpoint"
    )


def test_a_full_disk_is_said_by_rank_0_and_the_last_checkpoint_is_kept(small, alone, tmp_path):
    words = ["train", "--output", str(tmp_path / "run"), *small, "--steps", "50"]
    first = launch([*words, "--keep-checkpoints", "2"], tmp_path / "logs")
    until(lambda: done(tmp_path / "run") > 12, first)
    for rank in first:
        rank.kill(signal.SIGTERM)
        rank.wait()
    said = run([*words, "--async-checkpoint"], tmp_path / "logs", status=2, largest_file=100_000)
    message = r"while writing .*/run/checkpoint-20: the checkpoint before it is kept; mend that and run"
    assert re.search(message, said[0].splitlines()[-1])
    assert "longreach train" not in said[1]  # torch itself may warn there that rank 0 is gone
    # There is room for the model, and none for its checkpoints.
    said = run([*words, "--on-full-disk", "continue"], tmp_path / "logs", largest_file=200_000)
    told = r"while writing .*/run/checkpoint-[2-4]0: the checkpoint before it is kept; training goes on\n"
    assert len(re.findall(told, said[0])) >= 2
    assert losses(tmp_path / "run") == pytest.approx(losses(alone), rel=1e-5)
    assert not list((tmp_path / "run").glob("checkpoint*"))


def test_one_process_keeps_its_last_step_too(small, tmp_path):
    words = ["train", "--output", str(tmp_path / "run"), *small, "--steps", "1000000", "--checkpoint-every", "1000000"]
    for number, status in ((signal.SIGTERM, 75), (signal.SIGINT, 130)):
        (rank,) = launch(words, tmp_path / "logs", size=1)
        before = done(tmp_path / "run")
        until(lambda before=before: done(tmp_path / "run") > before + 5, [rank])
        rank.kill(number)
        assert rank.wait() == status
        assert before < done(tmp_path / "run")
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(1, done(tmp_path / "run") + 1))


# What is refused: one line, by rank 0


@pytest.mark.parametrize(
    ("words", "environment", "part"),
    [
        (
            ["--batch-size", "7"],
            {},
            "--batch-size=7 cannot be shared by 2 processes x --accumulation=1 (the default): give a multiple",
        ),
        (
            ["--accumulation", "8"],
            {},
            "--batch-size=8 cannot be shared by 2 processes x --accumulation=8: give a multiple",
        ),
        (["--parallel", "none"], {}, "parallel=none and 2 processes: give ddp or fsdp"),
        (["--parallel", "pipeline"], {}, "--parallel='pipeline'"),
        (
            ["--context-parallel", "3"],
            {},
            "--context-parallel=3 and 2 processes: give a divisor, or start more by torchrun",
        ),
        (["--context-parallel", "2", "--batch-size", "3", "--accumulation", "2"], {}, "accumulation=2 does not divide"),
        (["--rank-timeout", "1"], {}, "--rank-timeout=1: give 5 to"),
        (["--stepz", "3"], {}, "unknown option --stepz"),
        (["--data", "nowhere"], {}, "nowhere"),
        (["--device", "cuda:77"], {}, "device='cuda:77' is not to be had here"),
        ([], {"MASTER_PORT": "x"}, "MASTER_PORT='x' in the environment beside RANK"),
    ],
)
def test_mistakes_get_one_line_of_rank_0_and_leave_nothing(small, tmp_path, words, environment, part):
    output = tmp_path / "run"
    said = run(["train", "--output", str(output), *small, *words], tmp_path / "logs", status=2, **environment)
    assert said[1] == ""
    (line,) = (line for line in said[0].splitlines() if not line.startswith("reading"))
    assert line.startswith("longreach train: ")
    assert part in line
    assert not output.exists()


@pytest.mark.parametrize(
    ("method", "part"),
    [
        ("t5", "--method=t5 gives a dense bias, of which no rank has all; choose a position method without one"),
        ("rotary-randomized", "--method=rotary-randomized draws positions in training; leave one"),
    ],
)
def test_methods_that_ranks_cannot_share_are_refused(small, tmp_path, method, part):
    words = ["train", "--output", str(tmp_path / "run"), *small, "--method", method, "--context-parallel", "2"]
    said = run(words, tmp_path / "logs", status=2)
    assert said[0].splitlines()[-1].startswith(f"longreach train: --context-parallel=2: {part}")
    assert said[1] == ""


def test_a_port_that_is_taken_is_named(small, tmp_path):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        first, second = launch(["train", "--output", str(tmp_path / "x"), *small], tmp_path / "logs", MASTER_PORT=port)
        assert first.wait() == 2
        second.kill(signal.SIGKILL)  # it waits at the port for whoever has it
        second.wait()
    assert last_line(first).startswith("longreach train: MASTER_ADDR=127.0.0.1, MASTER_PORT=")
    assert "(the port is taken): give another port" in last_line(first)


def test_several_processes_are_for_torchrun(small, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["train", "--output", str(tmp_path / "run"), *small, "--parallel", "fsdp"])
    assert "parallel=fsdp and one process: start it by torchrun" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "1"}, "WORLD_SIZE='' in the environment"),
        ({"WORLD_SIZE": "2"}, "RANK='' in the environment"),
        (
            {"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_PORT": "1"},
            "RANK=2 in the environment is not below",
        ),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_PORT": "1"},
            "MASTER_ADDR is missing in the environment",
        ),
    ],
)
def test_an_environment_that_contradicts_itself_is_refused(environment, message):
    with pytest.raises(ValueError, match=message):
        read_launch(environment)


def test_no_environment_is_one_process():
    assert read_launch({}) is None


# Evaluation


def test_a_comparison_by_two_is_that_of_one(small, tmp_path):
    words = [*small, *TESTED.split(), "--steps", "5", "--warmup-steps", "2", "--methods", "alibi,none"]
    main(["compare", "--output", str(tmp_path / "one"), *words])
    run(["compare", "--output", str(tmp_path / "two"), *words], tmp_path / "logs")
    one, two = (Results.read(tmp_path / name / "results.json") for name in ("one", "two"))
    assert one.cells() == two.cells()
    assert {entry.key for entry in one.entries()} == {entry.key for entry in two.entries()}
    expected = {entry.key: entry.nll for entry in one.records}
    assert {entry.key: entry.nll for entry in two.records} == pytest.approx(expected, rel=1e-5)
    assert (tmp_path / "two" / "report.html").exists()
    # What fails on rank 0, which alone holds the folder, fails for all, and all go on with the other models.
    (tmp_path / "two" / "alibi" / "folder.toml").write_text("torn")
    run(["compare", "--output", str(tmp_path / "two"), *words], tmp_path / "logs")


def test_an_evaluation_by_two_is_that_of_one(alone, tmp_path):
    words = ["evaluate", str(alone), *TESTED.split(), "--strides", "16,32"]
    main([*words, "--output", str(tmp_path / "one")])
    run([*words, "--output", str(tmp_path / "two")], tmp_path / "logs")
    one, two = (Results.read(tmp_path / name / "results.json") for name in ("one", "two"))
    assert sorted(entry.key for entry in one.records) == sorted(entry.key for entry in two.records)
    for kind in ("records", "contexts"):
        expected = {entry.key: entry.nll for entry in getattr(one, kind)}
        assert {entry.key: entry.nll for entry in getattr(two, kind)} == pytest.approx(expected, rel=1e-9)


def test_an_evaluation_whose_windows_three_share_is_that_of_one(alone, tmp_path):
    # The last window has one token, for which three processes are too many, and others have more than are scored.
    tested = "--valid-lengths 32,64 --valid-tokens 129 --task perplexity,positions --strides 8 --scalings linear"
    words = ["evaluate", str(alone), *tested.split()]
    main([*words, "--output", str(tmp_path / "one")])
    run([*words, "--output", str(tmp_path / "three"), "--context-parallel", "3"], tmp_path / "logs", size=3)
    one, three = (Results.read(tmp_path / name / "results.json") for name in ("one", "three"))
    assert {entry.key for entry in one.records} == {entry.key for entry in three.records}
    for kind in ("records", "contexts"):
        expected = {entry.key: entry.nll for entry in getattr(one, kind)}
        assert {entry.key: entry.nll for entry in getattr(three, kind)} == pytest.approx(expected, rel=1e-6)
    assert all(entry.exchanged is None for entry in one.records)
    for record in three.records:
        assert len(record.exchanged.forward) == 2
        assert record.exchanged.backward == ((0, 0), (0, 0))
        assert 0 < sum(map(sum, record.exchanged.forward)) <= record.exchanged.all_gather == record.exchanged.ring
    assert "For all windows processes sent each other " in (tmp_path / "logs" / "out0").read_text()


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--context-parallel", "3"], "--context-parallel=3 and 2 processes: start 3 by torchrun --nproc-per-node 3"),
        (["--context-parallel", "0"], "--context-parallel=0: give a positive integer"),
        (["--context-parallel", "2", "--task", "probes"], "with --task=probes: it is for perplexity and positions"),
        (["--context-parallel", "2", "--protocols", "cached"], "with --protocols=cached: it is for nonoverlapping"),
    ],
)
def test_windows_that_cannot_be_shared_are_refused(alone, tmp_path, words, part):
    said = run(["evaluate", str(alone), *TESTED.split(), *words], tmp_path / "logs", status=2)
    assert part in said[0].splitlines()[-1]
    assert said[1] == ""


def test_an_error_of_one_rank_is_said_by_rank_0(alone, corpus, tmp_path):
    run_folder = tmp_path / "run"
    shutil.copytree(alone, run_folder)
    (run_folder / "model.safetensors").write_bytes(b"torn")
    said = run(["evaluate", str(run_folder), *TESTED.split()], tmp_path / "logs", status=2)
    assert said[0].splitlines()[-1].startswith(f"longreach evaluate: {run_folder}/model.safetensors: damaged")
    assert said[1] == ""


# torchrun itself


def test_torchrun_trains_on_two_machines(small, alone, tmp_path):
    output = tmp_path / "run"
    words = ["train", "--output", str(output), *small, "--steps", "50"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    command += ["--rdzv-backend", "c10d", "--rdzv-id", "longreach", "--rdzv-endpoint", f"localhost:{free_port()}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    machines = [
        subprocess.Popen(
            [*command, "-m", "longreach", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for _ in range(2)
    ]
    said = [machine.communicate(timeout=300) for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], said
    lines = "".join(out for out, _ in said).splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("alibi: 50 steps, 12,800 tokens, ")
    assert losses(output) == pytest.approx(losses(alone), rel=1e-5)
