"""benchmarks/: a peer that fails, runs that go on, what pages show of them, and drawings of the records of a GPU."""

import functools
import importlib
import json
import statistics
import sys
from pathlib import Path

import pytest
import torch

from longreach.ops.attention import choose_impl
from longreach.ops.crossovers import CROSSOVERS
from longreach.ops.triton.operators import MEASURED_CAPABILITIES

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def scripts():
    """Scripts as modules, their folder no longer on the path: it has names of installed packages."""
    names = ("peers", "attention", "plot", "runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        modules = [importlib.import_module(name) for name in names]
    yield modules
    for name in names:
        del sys.modules[name]


@pytest.fixture
def run(scripts, monkeypatch, tmp_path):
    """Runs makers on one or more workloads, and reads what was written."""
    peers, attention, _, _ = scripts
    monkeypatch.setattr(attention, "check_gradients", lambda *arguments: None)  # has a test of its own
    path = tmp_path / "machine.json"

    def run(makers, *work):
        work = list(work) or [peers.Workload("forward", "float32", 48, heads=2, head_dim=16)]
        try:
            attention.run({"records": []}, path, work, "cpu", 2, lambda workload: makers)
        finally:
            written = json.loads(path.read_text())["records"] if path.exists() else []
        return written

    run.path = path
    return run


def wrong(workload, tensors):
    return lambda q, k, v: v + 1


def raising(workload, tensors):
    raise torch.OutOfMemoryError("no room\n  for masks")


def test_a_peer_that_fails_is_recorded_and_the_others_are_timed(scripts, run, capsys):
    peers = scripts[0]
    calls = []

    def fails_later(workload, tensors):
        def attend(q, k, v):
            calls.append(None)
            if len(calls) > 2:  # after its check and the measuring of its memory
                raise RuntimeError("launch failed")
            return peers.causal_sdpa(workload, tensors)(q, k, v)

        return attend

    makers = peers.contenders("cuda")
    del makers[peers.FLEX]  # compiles for seconds
    makers |= {"wrong": wrong, "raising": raising, peers.CEILING: fails_later, "unfit": lambda *arguments: None}
    (record,) = run(makers)
    timed = [figure["contender"] for figure in record["figures"]]
    assert timed == [peers.OURS, "SDPA, dense mask", "SDPA, extra head dims"]
    assert all(len(figure["rounds"]) == 25 for figure in record["figures"])  # of which 2 were asked for
    failed = record["failed"]
    assert failed.pop("wrong").endswith("it computes something else")
    assert failed.pop("raising") == "OutOfMemoryError: no room for masks"
    assert failed.pop(peers.CEILING) == "RuntimeError: launch failed"
    assert set(failed) <= {peers.FLEX_FLASH, peers.PRUNED}  # where they are not installed
    printed = capsys.readouterr().out
    assert "failed   raising: OutOfMemoryError: no room for masks\n" in printed
    assert printed.count("the fastest dense peer") == 1


def test_longreach_that_fails_ends_the_run_and_keeps_what_was_measured(scripts, run):
    peers = scripts[0]
    short, long = (peers.Workload("forward", "float32", length, heads=2, head_dim=16) for length in (32, 48))

    def fails_at(failure, workload, tensors):
        return failure(workload, tensors) if workload == long else peers.ours(workload, tensors)

    for failure, error in ((wrong, SystemExit), (raising, torch.OutOfMemoryError)):
        with pytest.raises(error):
            run({peers.OURS: functools.partial(fails_at, failure)}, short, long)
        assert [record["workload"]["length"] for record in json.loads(run.path.read_text())["records"]] == [32]


def test_a_run_that_was_stopped_resumes(scripts, run, capsys):
    peers, attention, _, runs = scripts
    work = [peers.Workload("forward", "float32", length, heads=2, head_dim=16) for length in (32, 48)]
    first = run({peers.OURS: peers.ours}, work[0])
    head = runs.machine("here", "cpu")
    run.path.write_text(json.dumps({"machine": head | {"date": "2026-01-01"}, "records": first}))
    known = runs.continued(run.path, head)["records"]
    capsys.readouterr()
    attention.run({"records": known}, run.path, work, "cpu", 2, lambda workload: {peers.OURS: peers.ours})
    assert "T=32 " not in capsys.readouterr().out
    records = json.loads(run.path.read_text())["records"]
    assert [record["workload"]["length"] for record in records] == [32, 48]
    assert records[0] == first[0]
    run.path.write_text(json.dumps({"machine": head | {"torch": "2.0"}, "records": first}))
    with pytest.raises(SystemExit, match=r"machine\.json has torch '2\.0', here it is '2\..*: give another --machine"):
        runs.continued(run.path, head)
    assert runs.continued(run.path.with_name("another.json"), head) == {}
    with pytest.raises(SystemExit, match=r"another\.json is not there: --machine is the name of a run"):
        runs.read(run.path.with_name("another.json"))


def test_gradients_are_checked_where_blocks_are_skipped(scripts, monkeypatch):
    attention = scripts[1]
    monkeypatch.setattr(attention, "GRADIENT_LENGTH", 2048)
    attention.check_gradients.cache_clear()
    attention.check_gradients("float32", attention.NOTHING_SKIPPED, 16, "cpu")
    exact = attention.attention
    monkeypatch.setattr(attention, "attention", lambda *args, **options: 1.001 * exact(*args, **options))
    with pytest.raises(SystemExit, match="gradient of q is off"):
        attention.check_gradients("float32", 1.0, 16, "cpu")
    monkeypatch.setattr(attention, "GRADIENT_LENGTH", 64)
    with pytest.raises(SystemExit, match="too many to check the gradients of skipping"):
        attention.check_gradients("float32", 4.0, 16, "cpu")
    attention.check_gradients.cache_clear()


def test_what_runs_on_a_gpu_and_where_impl_changes_over(scripts, monkeypatch):
    peers, attention, _, _ = scripts
    work = attention.workloads("cuda", attention.LENGTHS["cuda"])
    assert len(work) == len(set(work))
    assert {w.length for w in work if w.mode != "decode"} == {2048, 8192, 32768}
    assert {w.length for w in work if w.mode == "decode"} == {65536}
    assert {w.std for w in work if (w.mode, w.length, w.heads) == ("forward", 8192, 16)} == {1.0, 2.0, 4.0, 256.0}
    assert peers.PRUNED in peers.contenders("cuda")
    assert not peers.is_dense_peer(peers.PRUNED)
    cpu = attention.workloads("cpu", attention.LENGTHS["cpu"])
    assert {w.mode for w in cpu if w.length == 4096} == {"decode"}
    assert {w.mode for w in attention.workloads("cpu", [4096])} == {"forward", "training", "decode"}
    assert len(cpu) == len(set(cpu))
    assert {(w.mode, w.length) for w in cpu if w.busy} == {
        (mode, length) for mode in ("forward", "training") for length in (1024, 2048, 8192)
    }
    worst = {(w.mode, w.dtype) for w in cpu if w.std == attention.NOTHING_SKIPPED}
    assert worst == {("forward", "float32"), ("forward", "bfloat16"), ("training", "float32")}
    half = [w for w in cpu if (w.mode, w.dtype) == ("training", "bfloat16")]
    assert [w.length for w in half] == [1024, 2048, 8192]
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert attention.workloads("cpu", attention.LENGTHS["cpu"]) == [w for w in cpu if w not in half]
    assert peers.NO_NORMS in attention.chosen(peers.Workload("decode", "float32", 64), "cpu", set(), True)
    assert peers.NO_NORMS not in attention.chosen(peers.Workload("forward", "float32", 64), "cpu", set(), True)


def test_a_process_is_busy_while_others_are_timed(scripts, run, monkeypatch):
    peers, attention, plot, _ = scripts
    started = []

    class Process:
        def __init__(self, command):
            started.append(self)
            self.ended = []

        def kill(self):
            self.ended.append("kill")

        def wait(self):
            self.ended.append("wait")

    monkeypatch.setattr(attention.subprocess, "Popen", Process)
    shape = {"heads": 2, "head_dim": 16}
    work = [peers.Workload("forward", "float32", 48, busy=busy, **shape) for busy in (False, True)]
    _, record = run({peers.OURS: peers.ours}, *work)
    assert [process.ended for process in started] == [["kill", "wait"]]
    assert "| forward, float32, beside one busy process | 48 |" in plot.tables([record])
    assert not plot.drawn([record])


def test_growth_is_measured_in_turn_where_dense_attention_takes_minutes(scripts, run):
    peers, attention, plot, _ = scripts
    long = peers.Workload("training", "float32", 2 * attention.DENSE_LIMIT)
    makers = attention.chosen(long, "cpu", set(), False)
    assert set(makers) == {peers.OURS, peers.HALF}
    assert peers.HALF not in attention.chosen(long, "cuda", set(), False)
    assert attention.rounds_of(long, "cpu", 5) == 10
    short = peers.Workload("training", "float32", 1024)
    assert [attention.rounds_of(short, device, 5) for device in ("cpu", "cuda")] == [25, 5]
    assert not peers.is_dense_peer(peers.HALF)
    lengths = []

    def noting(workload, tensors):
        lengths.append((workload.length, *(x.shape[2] for x in tensors)))
        return peers.ours(workload, tensors)

    (record,) = run(dict.fromkeys(makers, noting), peers.Workload("training", "float32", 64, heads=2, head_dim=16))
    assert lengths == [(64, 64, 64, 64), (32, 32, 32, 32)]
    whole, half = record["figures"]
    assert half["contender"] == peers.HALF
    assert len(half["rounds"]) == len(whole["rounds"]) == 25
    whole["seconds"], half["seconds"] = 3.0, 2.0
    told = "Times as long as at half the length, measured in turn, at 64: forward + backward, float32, 1.50."
    assert plot.tables([record]).endswith(f"\n\n{told}")
    assert list(plot.curves([record])) == [peers.OURS]


@pytest.mark.parametrize(("processor", "measured"), CROSSOVERS.items(), ids=CROSSOVERS)
def test_auto_changes_over_where_the_committed_run_says(scripts, processor, measured):
    """From the first length on at which, as at all longer ones, ours is faster than "sdpa" by a tenth.

    That is the geometric mean of shapes. Where few queries decode it is from the first size of the cache on, and of
    those that are as large from the first number of keys on; and whether it is so without their norms, too.
    """
    peers = scripts[0]
    decodes = CROSSOVERS[measured.decodes_as or processor]
    records = [
        record
        for decoding, run in ((False, measured.run), (True, decodes.run))
        for record in json.loads((BENCHMARKS / "results" / run).read_text())["records"]
        if (record["workload"]["mode"] == "decode") == decoding
    ]
    gains, unaided = {}, []
    for record in records:
        workload = peers.Workload(**record["workload"])
        seconds = {figure["contender"]: figure["seconds"] for figure in record["figures"]}
        found = gains.setdefault((workload.mode, getattr(torch, workload.dtype)), [])
        found.append((workload, seconds[peers.DENSE] / seconds[peers.OURS]))
        if peers.NO_NORMS in seconds:
            unaided.append((workload, seconds[peers.DENSE] / seconds[peers.NO_NORMS]))
    assert {mode for mode, _ in gains} == {"forward", "training", "decode"}

    def first(found, size):
        """The least size from which on ours is faster, twice the largest where it never was."""
        of_size = {}
        for workload, gain in found:
            of_size.setdefault(size(workload), []).append(gain)
        slower = max((n for n, some in of_size.items() if statistics.geometric_mean(some) < 1.1), default=0)
        return min((n for n in of_size if n > slower), default=2 * max(of_size))

    def cached(workload):
        return workload.batch * workload.heads * workload.head_dim * workload.length

    def length(workload):
        return workload.length

    are_unaided = []
    for (mode, dtype), found in gains.items():
        least_cached = first(found, cached) if mode == "decode" else 0
        least = first([(workload, gain) for workload, gain in found if cached(workload) >= least_cached], length)
        for workload, _ in found:
            options = {"dtype": dtype, "learns": mode == "training", "has_key_norms": True, "processor": processor}
            options["cache_width"] = cached(workload) // workload.length
            queries = 1 if mode == "decode" else workload.length
            chosen = choose_impl("any", queries, workload.length, reaching=True, **options).impl
            expected = workload.length >= least and cached(workload) >= least_cached
            assert chosen == (measured.impl if expected else "sdpa"), workload
        if mode == "decode":
            size = min(dtype.itemsize, 4)
            assert (measured.cached[size], measured.decoding[size]) == (least_cached, least)
            of_dtype = [
                (w, gain) for w, gain in unaided if getattr(torch, w.dtype) == dtype and cached(w) >= least_cached
            ]
            are_unaided.append(first(of_dtype, length) <= least)
    assert measured.unaided == all(are_unaided)


def test_the_page_tells_where_auto_changes_over():
    page = (BENCHMARKS.parent / "docs" / "attention.md").read_text(encoding="utf-8")
    for processor, measured in CROSSOVERS.items():
        columns = [
            f"{tokens[4]:,}" if tokens[2] == tokens[4] else f"{tokens[4]:,}, half types {tokens[2]:,}"
            for tokens in (measured.forward, measured.training, measured.decoding, measured.cached)
        ]
        runs = dict.fromkeys((measured.run, CROSSOVERS[measured.decodes_as or processor].run))
        assert f"| {processor} | {' | '.join(columns)} | {', '.join(f'`{run}`' for run in runs)} |" in page


def test_runs_are_of_the_processors_that_they_stand_for():
    """Each by a file that says what the machine was, or was held to."""
    machines = {
        path.name: json.loads(path.read_text())["machine"] for path in (BENCHMARKS / "results").glob("*-crossover.json")
    }
    assert set(machines) == {measured.run for measured in CROSSOVERS.values()}
    holds = {"AMX": [], "AVX-512": ["AVX512_CORE_BF16", "AVX512_E3"], "AVX2": ["avx2", "AVX2", "AVX2"]}
    for name, measured in CROSSOVERS.items():
        kind, machine = name.partition(",")[0], machines[measured.run]
        if kind == "Hopper":
            continue
        is_amd = name.startswith("AVX-512, oneDNN")
        assert machine["processor"].startswith("AMD" if is_amd else "Intel")
        assert machine["instructions"] == ("AVX2" if kind == "AVX2" else "AVX512")
        assert list(machine["held_to"].values()) == ([] if is_amd else holds[kind])
    capabilities = {"NVIDIA H200": (9, 0), "NVIDIA H100 80GB HBM3": (9, 0)}
    assert {capabilities[machines[CROSSOVERS["Hopper"].run]["processor"]]} == set(MEASURED_CAPABILITIES)


def gpu_records(scripts):
    """Every workload of a GPU, the contenders' times told apart by shape, and one failure."""
    peers, attention, _, _ = scripts
    records = []
    for workload in attention.workloads("cuda", attention.LENGTHS["cuda"]):
        scale = 1e-9 * workload.length * workload.heads * (2 if workload.mode == "training" else 1)
        factors = {peers.OURS: 1, "SDPA, extra head dims": 8, peers.FLEX: 4, peers.CEILING: 3, peers.PRUNED: 2}
        figures = [
            {"contender": name, "seconds": factor * scale, "extra_bytes": 2**20} for name, factor in factors.items()
        ]
        failed = {} if workload.mode == "forward" else {peers.FLEX_FLASH: "NotImplementedError: backward"}
        records.append({"workload": vars(workload), "figures": figures, "failed": failed})
    return records


def test_the_figure_of_a_gpu_has_a_panel_for_each_shape(scripts):
    plot = scripts[2]
    figure = plot.draw(gpu_records(scripts))
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == [
        "forward, bfloat16, H 16 D 64",
        "forward + backward, bfloat16, H 16 D 64",
        "forward, bfloat16, H 32 D 128",
        "forward + backward, bfloat16, H 32 D 128",
    ]
    for axes, scale in zip(figure.axes, (16, 32, 32, 64), strict=True):
        ours = next(line for line in axes.lines if line.get_label() == "longreach")
        assert list(ours.get_xdata()) == [2048, 8192, 32768]
        assert list(ours.get_ydata()) == pytest.approx([1e-9 * length * scale for length in (2048, 8192, 32768)])
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["100 µs", "1 ms", "10 ms"]
    assert set(plot.COLOURS) >= set(scripts[0].contenders("cuda"))


def test_the_table_of_a_gpu_names_shapes_and_keeps_pruned_and_dense_apart(scripts):
    table, *failures = scripts[2].tables(gpu_records(scripts)).split("\n\n")
    head, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    row = dict(zip(head, rows[0], strict=True))
    assert (row["H"], row["D"], row["length"], row["longreach"]) == ("16", "64", "2,048", "0.033 ms")
    assert (row["fastest dense peer"], row["times faster"]) == ("FlexAttention, 0.131 ms", "4.00")
    assert row["times faster than no bias"] == "3.00"
    assert row["times faster than Forgetting Transformer, pruned"] == "2.00"
    (failure,) = failures
    assert failure.startswith("FlexAttention, FLASH failed (NotImplementedError: backward): ")
    assert failure.count("forward + backward") == 6
    assert failure.count("decode") == 2


def test_what_only_some_machines_measured_is_a_row_of_all(scripts):
    short, long = gpu_records(scripts)[0], gpu_records(scripts)[-1]
    table = scripts[2].side_by_side({"one": [long], "other": [short, long]})
    _, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    assert [row[1] for row in rows] == [f"{x['workload']['length']:,}" for x in (short, long)]
    assert rows[0][3] == "-"
    assert rows[0][4] == "0.033 ms, 4.00"
    assert rows[1][3] == rows[1][4] != "-"


def test_the_page_shows_the_committed_figures_in_the_same_form(scripts):
    records = json.loads((BENCHMARKS / "results" / "cpu-2core-amx.json").read_text())["records"]
    head = "| | length | std | longreach | fastest peer | times faster | times faster than no bias | extra memory |"
    assert scripts[2].tables(records).splitlines()[0] == head
    page = (BENCHMARKS.parent / "docs" / "attention.md").read_text(encoding="utf-8")
    assert scripts[2].tables(records) in page
    names = ("cpu-2core-amx", "cpu-2core-avx512", "cpu-2core-avx2", "cpu-2core-epyc")
    runs = {name: scripts[2].read(name) for name in names}
    assert scripts[2].side_by_side(runs) in page


def test_the_drawing_is_named_after_the_machine(scripts, monkeypatch, tmp_path, capsys):
    plot = scripts[2]
    (tmp_path / "docs").mkdir()
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    monkeypatch.setattr(plot, "HERE", tmp_path / "benchmarks")
    written = json.dumps({"records": gpu_records(scripts)})
    for machine, options, drawing in (
        ("h200", [], "docs/attention-h200.svg"),
        ("cpu-2core-amx", [], "docs/attention.svg"),
        ("h200", ["--output", str(tmp_path / "other.svg")], "other.svg"),
    ):
        (tmp_path / "benchmarks" / "results" / f"{machine}.json").write_text(written)
        monkeypatch.setattr(sys, "argv", ["plot.py", machine, *options])
        plot.main()
        assert (tmp_path / drawing).read_bytes().startswith(b"<?xml")
    assert "| H | D |" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "docs").iterdir()} == {"attention-h200.svg", "attention.svg"}


@torch.no_grad()
def test_encoders_are_timed_after_their_outputs_agree(scripts, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    encoders = importlib.import_module("encoders")
    monkeypatch.setattr(encoders, "TABLE", 64)  # of Jina's code, 3 GiB as it is
    found = encoders.measure("512", ["ours", "padded"], None, rounds=1, small=True)
    assert found["seconds"].keys() == {"ours", "padded"}
    assert found["max_difference"] < encoders.ALLOWED
    monkeypatch.setattr(encoders.Padded, "attend", lambda self, q, k, v, heads: v)
    with pytest.raises(SystemExit, match="512: outputs of padded differ by"):
        encoders.measure("512", ["ours", "padded"], None, rounds=1, small=True)
    del sys.modules["encoders"]


@pytest.fixture
def training(scripts, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield importlib.import_module("training")
    del sys.modules["training"]


@pytest.mark.filterwarnings("ignore")  # of Trainer's own
def test_training_loops_are_timed_after_they_train_alike(training, monkeypatch, tmp_path):
    found = {part: training.measure(part, quick=True) for part in ("speed", "input", "checkpoints")}
    speeds = found["speed"][0]["tokens_per_second"]
    assert list(speeds) == list(training.CONTENDERS)
    assert all(speed > 0 for speed in speeds.values())
    assert [row.split("|")[1].strip() for row in training.table(found).splitlines()[2:]] == [
        *["tokens/s at 16 x 4"] * 2,
        *["tokens/s at 32 x 2"] * 2,
        "tokens/s of input alone",
        "an asynchronous checkpoint of 0 MiB",
    ]

    monkeypatch.setattr(training.NanoBlock, "forward", lambda block, x, mask: x)
    with pytest.raises(SystemExit, match="at 16: loop like nanoGPT's trains otherwise"):
        training.measure_speed(training.QUICK, 16, 1, 1, tmp_path)


def test_the_page_shows_the_training_figures_that_are_committed(training):
    results = json.loads((BENCHMARKS / "results" / "training-cpu-2core-epyc.json").read_text())
    assert training.table(results) in (BENCHMARKS.parent / "docs" / "parallel.md").read_text(encoding="utf-8")
