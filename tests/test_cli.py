import ctypes
import io
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace

import pytest
import torch
import transformers
from published import Published, write

from longreach import cli
from longreach.cli import VERBS, main
from longreach.data.tokenizer import load_tokenizer
from longreach.models.files import load_model
from longreach.results import Results
from longreach.verbs import harness

SMALL = "--num-layers 1 --num-heads 2 --d-model 16 --vocab-size 300 --train-length 16 --batch-size 4 --warmup-steps 2"

pytestmark = pytest.mark.usefixtures("unrendered")


@pytest.fixture(scope="module")
def small(corpus, tmp_path_factory):
    """Arguments that make any verb that trains quick."""
    cache = tmp_path_factory.mktemp("cache")
    return [*SMALL.split(), "--data", str(corpus), "--valid-fraction", "0.2", "--cache", str(cache), "--steps", "4"]


@pytest.fixture(scope="module")
def trained(small, tmp_path_factory):
    """The folder of a run that `longreach train` made."""
    folder = tmp_path_factory.mktemp("runs") / "alibi"
    main(["train", "--output", str(folder), *small])
    return folder


def refused(capsys, *words):
    """The one line with which a command refuses its arguments."""
    with pytest.raises(SystemExit) as end:
        main(list(words))
    captured = capsys.readouterr()
    assert end.value.code == 2
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("longreach")
    return lines[0]


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_each_verb(capsys, verb):
    with pytest.raises(SystemExit) as end:
        main([verb, "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: longreach {verb}")
    assert VERBS[verb][1] in " ".join(text.split())
    assert max(map(len, text.splitlines())) < 100


def test_help_needs_no_docstrings_of_python(capsys):
    with pytest.raises(SystemExit):
        main(["report", "--help"])  # which loads no torch, whose modules Python would compile anew
    optimized = {**os.environ, "PYTHONOPTIMIZE": "2", "COLUMNS": str(shutil.get_terminal_size().columns)}
    command = [sys.executable, "-m", "longreach", "report", "--help"]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=optimized)
    assert run.stdout == capsys.readouterr().out


@pytest.mark.parametrize("words", [["--help"], ["report", "--help"]])
def test_a_reader_that_has_had_enough_is_no_error(words):
    read_end, write_end = os.pipe()
    os.close(read_end)
    run = subprocess.run([sys.executable, "-m", "longreach", *words], stdout=write_end, stderr=subprocess.PIPE)
    os.close(write_end)
    assert (run.returncode, run.stderr) == (0, b"")


@pytest.fixture
def leave(monkeypatch):
    """A function that takes the reader from a standard stream."""

    left = []

    def leave(name):
        read_end, write_end = os.pipe()
        os.close(read_end)
        left.append(os.fdopen(write_end, "w"))
        monkeypatch.setattr(sys, name, left[-1])

    yield leave
    for stream in left:
        stream.close()


def test_tables_that_nobody_reads_are_no_error(trained, leave):
    leave("stdout")
    main(["evaluate", str(trained), "--lengths", "16", "--valid-tokens", "32"])


def test_work_goes_on_where_nobody_reads_of_its_progress(small, tmp_path, leave):
    leave("stderr")
    main(["train", "--output", str(tmp_path / "run"), *small])
    assert (tmp_path / "run" / "training.json").exists()
    leave("stderr")
    with pytest.raises(SystemExit) as end:
        main(["evaluate", "nowhere", "--lengths", "0"])
    assert end.value.code == 2


@pytest.mark.parametrize("words", [["--version"], ["--help"], ["train", "--help"], []])
def test_output_that_cannot_be_written(capsys, monkeypatch, words):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(SystemExit) as end:
            main(words)
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("what is written to has failed (No space left on device); mend that")


def test_streams_that_are_closed(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    assert "--prompt=-: standard input is closed" in refused(capsys, "generate", "nowhere", "--prompt", "-")
    monkeypatch.setattr(sys, "stdout", None)
    main(["--version"])


def test_a_prompt_without_an_end(capsys, monkeypatch):
    monkeypatch.setattr(cli, "LONGEST_PROMPT", 1000)
    with open("/dev/zero") as endless:
        monkeypatch.setattr(sys, "stdin", endless)
        line = refused(capsys, "generate", "nowhere", "--prompt", "-")
    assert "--prompt=-: standard input has over 1000 characters" in line


@pytest.mark.parametrize(("rank", "said"), [("0", 1), ("1", 0), ("5", 1), ("x", 1)])
def test_a_rank_that_cannot_be_says_so_itself(capsys, monkeypatch, rank, said):
    for name, value in {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        main(["train", "--output", "x"])
    assert len(capsys.readouterr().err.splitlines()) == said


def test_overview(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert all(verb in text for verb in VERBS)


def test_no_verb_is_an_error(capsys):
    with pytest.raises(SystemExit) as end:
        main([])
    assert end.value.code == 2


ENTRANCES = {"cli": lambda: main(["report", "nowhere"]), "verbs.harness": harness.main}


@pytest.mark.parametrize("module", ENTRANCES)
def test_each_entrance_sets_up_its_process(monkeypatch, module):
    """Threads by a variable that PyTorch's OpenMP reads as it is loaded: nothing may load it before that is set."""
    code = f"import sys, longreach.{module}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    monkeypatch.setattr("longreach.measure.lm_eval.register", lambda open_subject: None)  # which is possible once
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", sys.exit)
    for before, after in ((None, "1000"), ("7", "7")):
        torch.set_flush_denormal(False)
        monkeypatch.setenv("GOMP_SPINCOUNT", str(before))  # so that it is as it was afterwards
        if before is None:
            monkeypatch.delenv("GOMP_SPINCOUNT")
        with pytest.raises(SystemExit):
            ENTRANCES[module]()
        assert os.environ["GOMP_SPINCOUNT"] == after
        assert torch.full((16,), 1e-40).mul(0.5).eq(0).all()
        assert warnings.formatwarning(UserWarning("two\n lines"), UserWarning, "x.py", 1) == "UserWarning: two lines\n"


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="of GNU's allocator alone")
def test_memory_that_is_freed_is_kept_for_the_next_operation():
    """40 MiB filled ten times: their pages are made anew each time where they are given back.

    What is aligned takes new memory up to ten times before what was freed is enough for it.
    """
    code = """if True:
        import resource, sys
        from longreach import process
        if sys.argv[1] == "set up":
            process.set_up()
        import torch
        def faults():
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for times in (40, 10):
            before = faults()
            for _ in range(times):
                torch.ones(40 << 20, dtype=torch.uint8)
        print(faults() - before)
    """
    kept, given_back = (
        int(subprocess.run([sys.executable, "-c", code, word], capture_output=True, check=True).stdout)
        for word in ("set up", "as it is")
    )
    assert kept < 1000
    assert given_back > 10 * (40 << 20) // resource.getpagesize() // 2


def test_version_is_the_package_s(capsys):
    import longreach

    main(["--version"])
    assert capsys.readouterr().out == f"longreach {longreach.__version__}\n"


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["comparr"], ["'comparr'", "compare, train"]),
        (["compare"], ["--output is missing"]),
        (["compare", "x"], ["'x' stands alone"]),
        (["compare", "--output", "x", "--steps=9999999999999999999"], ["--steps", "64 bits"]),
        (["compare", "--output", "x", "--learning-rate", "inf"], ["--learning-rate=inf", "finite"]),
        (["compare", "--output", "x", "--bias", "true"], ["'true' stands alone"]),
        (["compare", "--output", "x", "--betas", "0.9"], ["--betas=[0.9]", "more items"]),
        (["compare", "--output", "x", "--methods", "rotary:base=inf"], ["rotary:base=inf", "finite"]),
        (["compare", "--output", "\udcff"], ["--output", "UTF-8"]),
        (["compare", "--output"], ["--output"]),
        (["compare", "--output", "x", "--stepz", "3"], ["--stepz"]),
        (["compare", "--output", "x", "--steps", "ten"], ["--steps", "'ten'", "integer"]),
        (["compare", "--output", "x", "--steps", "3.5"], ["--steps", "'3.5'", "integer"]),
        (["compare", "--output", "x", "--steps", "0"], ["--steps=0", "positive"]),
        (["compare", "--output", "x", "--learning-rate", "fast"], ["--learning-rate", "'fast'", "number"]),
        (["compare", "--output", "x", "--valid-lengths", "128,-1"], ["--valid-lengths=128,-1", "positive"]),
        (["compare", "--output", "x", "--valid-lengths", "128,1e3"], ["--valid-lengths", "'1e3'", "integer"]),
        (["compare", "--output", "x", "--train-length", "-5"], ["--train-length=-5", "positive"]),
        (["compare", "--output", "x", "--num-heads", "7"], ["--num-heads=7", "--d-model=64"]),
        (["compare", "--output", "x", "--methods", "alibi,rope"], ["--methods='rope'", "rotary"]),
        (["compare", "--output", "x", "--methods", "rotary:bass=3"], ["--methods='rotary:bass=3'", "'bass=3'", "base"]),
        (["compare", "--output", "x", "--preset", "huge"], ["'huge'", "demo, wikitext103-247m"]),
        (["compare", "--output", "x", "--norm", "batchnorm"], ["batchnorm", "--norm", "rmsnorm"]),
        (["compare", "--output", "x", "--device", "tpu"], ["--device='tpu'", "give cpu"]),
        (["compare", "--output", "x", "--data", "nowhere/at/all.txt"], ["--data: ", "nowhere/at/all.txt"]),
        (["compare", "--output", "x", "--config-file", "nowhere.toml"], ["nowhere.toml"]),
        (["train", "--output", "x", "--method", "rope"], ["--method='rope'", "rotary"]),
        (["train", "--output", "x", "--from", "nowhere"], ["--from='nowhere': model 'nowhere'", "no folder here"]),
        (["train", "--output", "x", "--from"], ["--start-from"]),
        (["train", "--output", "x", "--from", "."], ["--from='.'", "holds no finished run", "compare does"]),
        (["train", "--output", "x", "--from", "run", "--preset", "cc100-1.3b"], ["--from=run", "leave --preset"]),
        (["train", "--output", "x", "--from", "run", "--config-file", "a.toml"], ["--from=run", "--config-file out"]),
        (["compare", "--output", "x", "--from", "run"], ["unknown option --from"]),
        (["evaluate"], ["MODELS is missing"]),
        (["evaluate", "nowhere", "--dtype"], ["--dtype: expected one argument"]),
        (["export", "nowhere", "--output", "x", "--to", "onnx"], ["--to='onnx'", "'mpt'"]),
        (["export", "nowhere"], ["--output is missing"]),
        (["train", "--output", "x", "--config-file="], ["--config-file='' is a folder", "give a config.toml"]),
        (["generate", "nowhere", "--top-k", "few"], ["--top-k='few'", "integer"]),
        (["report"], ["FOLDERS is missing"]),
        (["evaluate", "nowhere"], ["nowhere", "no folder here"]),
        (["evaluate", "nowhere", "nowhere"], ["MODELS=nowhere,nowhere", "give each once"]),
        (["evaluate", "nowhere", "--task", "speed"], ["--task='speed'", "perplexity, positions"]),
        (
            ["train", "--output", "x", "--config-file", "nowhere.toml"],
            ["--config-file='nowhere.toml': nowhere.toml: no"],
        ),
        (["compare", "--output", "x", "--seeds", ",".join(map(str, range(400)))], ["--methods: with", "1,200 models"]),
        (["train", "--output", ""], ["--output='': give a path"]),
        (["train", "--output", "x", "--cache", ""], ["--cache='': give a path, or . for this folder"]),
        (["train", "--output", "x", "--tokenizer="], ["--tokenizer='': give a path"]),
        (["train", "--output", "x", "--from", ""], ["--from='': give a path"]),
        (["evaluate", ""], ["MODELS='': give a path"]),
        (["extend", "m", ""], ["MODELS='': give a path"]),
        (["generate", ""], ["MODEL='': give a path"]),
        (["doctor", ""], ["MODEL='': give a path"]),
        (["train", "--output", "a\0b"], ["--output='a\\x00b': give a path"]),
        (["report", "a", "b\0"], ["FOLDERS='b\\x00': give a path"]),
        ([""], ["unknown verb ''"]),
        (
            ["compare", "--output", "x", "--methods", "alibi,alibi:scaling=none"],
            ["--methods=alibi,alibi:scaling=none: g"],
        ),
        (
            ["compare", "--output", "x", "--methods", "rotary,rotary:base=1e4"],
            ["--methods=rotary,rotary:base=1e4: give"],
        ),
        (
            ["compare", "--output", "x", "--methods", "alibi:scaling=ntk-fixed=4,alibi:scaling=ntk-fixed=4.0"],
            ["give each once"],
        ),
        (["extend", "m", "--scaling", "linear-fixed=4,linear-fixed=4.0"], ["--scaling=linear-fixed=4,linear-fixed=4."]),
        (["extend", "m", "--scaling", "stock,stock"], ["--scaling=stock,stock: give each once"]),
        (["evaluate", "m", "./m"], ["MODELS=m,./m: give each once"]),
        (["train", "--output", "x", "--steps", "1_0"], ["--steps='1_0': give an integer"]),
        (["train", "--output", "x", "--learning-rate", "1_0.5"], ["--learning-rate='1_0.5': give a number"]),
        (["train", "--output", "x", "--data", "~nobody-here/x"], ["--data: '~nobody-here/x' does not exist"]),
        (["train", "--output", "x", "--tokenizer", "~nobody-here/x"], ["--tokenizer='~nobody-here/x'"]),
        (["train", "--output", "x", "--cache", "/dev/null"], ["--cache='/dev/null' cannot be written"]),
        (["evaluate", "nowhere", "--train-length", "0"], ["longreach evaluate: --train-length=0"]),
        (["doctor", "nowhere", "--lengths", "1"], ["longreach doctor: --lengths has 1"]),
        (["evaluate", "nowhere", "--lengths", "0"], ["longreach evaluate: --lengths=0"]),
        (["evaluate", "nowhere", "--lengths", "8", "--strides", "9"], ["longreach evaluate: --strides=9 is over"]),
        (["generate", "nowhere"], ["nowhere"]),
        (["report", "nowhere"], ["nowhere"]),
        (["train", "--output", "x", "--steps", "10"], ["--warmup-steps=40 (the default): give", "at most --steps=10"]),
        (
            ["compare", "--output", "x", "--warmup-steps", "1000"],
            ["--warmup-steps=1000: ", "--steps=600 (the default)"],
        ),
        (
            ["train", "--output", "x", "--batch-size", "3", "--preset", "cc100-1.3b"],
            ["--accumulation=32 (the default) does not divide --batch-size=3: change one"],
        ),
        (
            ["train", "--output", "x", "--longest-length", "64"],
            ["--longest-length=64 is below --train-length=128 (the default)"],
        ),
        (["train", "--output", "x", "--learning-rate", "-1e-3"], ["--learning-rate=-0.001: give a positive number"]),
        (["train", "--output", "x", "--betas", "1,2"], ["--betas=1.0,2.0: give two numbers of at least 0 and below 1"]),
        (["train", "--output", "x", "--compile=yes"], ["--compile/--no-compile: it takes no value, leave out 'yes'"]),
        (["evaluate", "nowhere", "--dtype", "fp16"], ["--dtype='fp16': give one of auto"]),
        (["extend", "nowhere", "--dtype", "int8"], ["--dtype='int8': give one of auto"]),
        (["doctor", "nowhere", "--dtype", "x"], ["--dtype='x': give one of auto"]),
        (["generate", "nowhere", "--dtype", "auto "], ["--dtype='auto ': give one of auto"]),
        (["embed", "m", "--data", "x", "--output", "x.npy", "--dtype", "half"], ["--dtype='half': give one of auto"]),
        (["evaluate", "/no/model/here"], ["model '/no/model/here' is no folder here, nor a name on the"]),
        (["doctor", "./nowhere"], ["model './nowhere' is no folder here", "give one of them"]),
        (["embed", "my model", "--data", "x", "--output", "x.npy"], ["model 'my model' is no folder here", "give one"]),
        (["export", "nowhere", "--output", "x"], ["nowhere is not there: give the folder of a trained run"]),
        (
            ["train", "--output", "/dev/null/x"],
            ["--output=/dev/null/x: it cannot be written (Not a directory), give a"],
        ),
        (
            ["compare", "--output", "/dev/null/x"],
            ["--output=/dev/null/x: it cannot be written (Not a directory), give a"],
        ),
    ],
)
def test_mistakes_get_one_line_and_leave_nothing(capsys, tmp_path, monkeypatch, words, parts):
    monkeypatch.chdir(tmp_path)
    line = refused(capsys, *words)
    assert all(part in line for part in parts), line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words",
    [
        ["evaluate", "@"],
        ["extend", "@"],
        ["doctor", "@"],
        ["generate", "@"],
        ["embed", "@", "--data", "@", "--output", "x.npy"],
        ["train", "--output", "x", "--from", "@"],
        ["export", "@", "--output", "x"],
    ],
    ids=lambda words: words[0],
)
def test_a_file_in_place_of_a_model(capsys, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    path = str(tmp_path / "config.json")
    line = refused(capsys, *[word.replace("@", path) for word in words])
    assert re.search(rf"{path}'? is a file: give (its|the) folder", line), line
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(("option", "task"), [("--cases", "kv"), ("--meetings", "qmsum")])
def test_a_file_of_material_is_named_with_its_option(capsys, trained, tmp_path, option, task):
    (tmp_path / "text.txt").write_text("")
    words = ["evaluate", str(trained), "--task", task, option, str(tmp_path / "text.txt")]
    assert f"{option}: '{tmp_path / 'text.txt'}' holds text, not JSON lines" in refused(capsys, *words)


@pytest.mark.parametrize("verb", ["evaluate", "extend", "generate"])
def test_an_encoder_is_no_decoder(capsys, tmp_path, verb):
    model = write(Published("jina", layers=1), tmp_path / "jina")
    line = refused(capsys, verb, model)
    assert line == f"longreach {verb}: model {model!r} is an encoder: longreach embed is for it; give a decoder"


HEEDED_BY_NOTHING = [
    ("compare", "--output x --text-field body", "--text-field=body: it is for text that is given"),
    ("compare", "--output x --skip-bad", "--skip-bad: it is for text that is given"),
    ("compare", "--output x --tokenizer t.json --vocab-size 300", "--vocab-size=300: it is for a tokenizer that is"),
    ("compare", "--output x --valid-data v.txt --valid-fraction 0.1", "--valid-fraction=0.1: nothing is held out"),
    ("compare", "--output x --shapes 2x64,2x128 --num-layers 2", "--num-layers=2: --shapes=2x64,2x128 has it"),
    ("compare", "--output x --seeds 1,2 --split-seed 0 --seed 3", "--seed=3: --seeds=1,2 and --split-seed=0 are given"),
    ("compare", "--output x --task positions --strides 4", "--strides=4: it is for perplexity, and --task=positions"),
    ("compare", "--output x --cases-per-depth 4", "--cases-per-depth=4: it is for lines or topics or kv"),
    ("compare", "--output x --preset demo --config-file x.toml", "--preset=demo: --config-file=x.toml gives the"),
    ("train", "--output x --text-field body", "--text-field=body: it is for text that is given"),
    ("train", "--output x --tokenizer t.json --vocab-size 1024", "--vocab-size=1024: it is for a tokenizer that is"),
    ("evaluate", "m --task passkey --valid-tokens 16384", "--valid-tokens=16384: it is for perplexity or positions"),
    ("evaluate", "m --task passkey --tokens-per-batch 64", "--tokens-per-batch=64: it is for perplexity or positions"),
    ("evaluate", "m --task passkey --data t.txt", "--data=t.txt: --task=passkey score no text"),
    ("evaluate", "m --task kv --word-level", "--word-level: it is for perplexity, and --task=kv"),
    ("evaluate", "m --task kv --protocols cached", "--protocols=cached: it is for perplexity"),
    ("evaluate", "m --task perplexity --capped-stride 4", "--capped-stride=4: it is for positions or probes"),
    ("evaluate", "m --offsets 0,5", "--offsets=0,5: it is for probes, and --tasks=perplexity,positions"),
    ("evaluate", "m --task probes --lengths 16", "--lengths=16: it is for perplexity or positions or"),
    ("evaluate", "m --num-depths 5", "--num-depths=5: it is for lines or topics or"),
    ("evaluate", "m --task topics --num-depths 5", "--num-depths=5: topics asks for the first topic alone"),
    ("evaluate", "m --task kv --cases c.jsonl --cases-seed 0", "--cases-seed=0: no case is made where --cases=c.jsonl"),
    ("extend", "m --summary-tokens 256", "--summary-tokens=256: it is for qmsum, and --tasks="),
    ("compare", "--output x --shuffle-buffer 5", "--shuffle-buffer=5: it is for a stream"),
    ("train", "--output x --data t --shuffle-buffer 10000", "--shuffle-buffer=10000: it is for a stream"),
    (
        "train",
        "--output x --data hf:d --streaming --valid-fraction 0.1",
        "--valid-fraction=0.1: nothing is held out of",
    ),
    ("train", "--output x --data hf:d --streaming --split-seed 1", "--split-seed=1: nothing is held out of a stream"),
    (
        "train",
        "--output x --longest-length 4096",
        "--longest-length=4096: --method=alibi (the default) is the same for any length",
    ),
    ("train", "--output x --method learned --longest-length 256", "--longest-length=256: --method=learned is the same"),
    ("train", "--output x --rank-timeout 60", "--rank-timeout=60: no torchrun has started this process"),
    ("compare", "--output x --rank-timeout 300", "--rank-timeout=300: no torchrun has started this process"),
    ("evaluate", "m --rank-timeout 60", "--rank-timeout=60: no torchrun has started this process"),
    ("extend", "m --rank-timeout 60", "--rank-timeout=60: no torchrun has started this process"),
    ("generate", "m --temperature 0 --top-k 5", "--top-k=5: --temperature=0 draws nothing"),
    ("generate", "m --temperature 0 --top-p 0.9", "--top-p=0.9: --temperature=0 draws nothing"),
    ("generate", "m --temperature 0.0 --seed 1", "--seed=1: --temperature=0 draws nothing"),
    ("extend", "m --data t --text-field text --task kv", "--data=t: --task=kv score no text"),
]


@pytest.mark.parametrize(("verb", "words", "line"), HEEDED_BY_NOTHING)
def test_what_nothing_heeds_is_refused_where_it_is_typed(capsys, verb, words, line):
    assert line in refused(capsys, verb, *words.split())


@pytest.mark.parametrize(
    "words",
    [
        ["train", "--output", "x", "--data"],
        ["compare", "--output", "x", "--valid-data", "plain", "--data"],
        ["evaluate", "m", "--data"],
        ["extend", "m", "--data"],
        ["doctor", "m", "--text"],
        ["embed", "m", "--output", "x.npy", "--data"],
    ],
)
def test_plain_text_has_no_fields(capsys, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "a.txt").write_text("plain text\n")
    line = refused(capsys, *words, "plain", "--text-field", "body")
    assert line.endswith(
        "--text-field=body: it is for JSON lines and tables, and all of this is plain text; leave it out"
    )
    (tmp_path / "plain" / "b.txt").write_text('{"body": "text"}\n')
    assert "all of this is plain" not in refused(capsys, *words, "plain", "--text-field", "body", "--device", "meta")


@pytest.mark.parametrize(
    ("verb", "words", "line"),
    [
        ("evaluate", ["m", "--lengths", ",".join(map(str, range(1, 200)))], "these are 199, give at most 100"),
        ("evaluate", ["m", "--strides", ",".join(map(str, range(1, 200)))], "these are 199, give at most 100"),
        ("evaluate", ["m", "--task", "probes", "--offsets", ",".join(map(str, range(200)))], "these are 200, give"),
        (
            "evaluate",
            ["m", "--task", "kv", "--cases-per-depth", "100000"],
            "500000 cases for each length, give at most",
        ),
        ("evaluate", ["m", "--scalings", ",".join(f"ntk-fixed={n}" for n in range(2, 1100))], "they are 1,098, give"),
        ("evaluate", [f"m{n}" for n in range(1001)], "they are 1,001, give at most 1,000"),
        ("extend", [f"m{n}" for n in range(400)], "they are 1,200, give at most 1,000"),
        ("doctor", ["m", "--lengths", ",".join(map(str, range(2, 200)))], "--lengths has 198 lengths: give at most"),
        ("compare", ["--output", "x", "--seeds", ",".join(map(str, range(1001)))], "3,003 models, give at most 1,000"),
        ("compare", ["--output", "x", "--shapes", ",".join(f"{n}x8" for n in range(1, 500))], "models, give at most"),
        ("compare", ["--output", "x", "--train-lengths", ",".join(map(str, range(1, 500)))], "models, give at most"),
        ("report", ["--output", "x", *(f"f{n}" for n in range(1001))], "these are 1,001, give at most 1,000"),
        ("train", ["--output", "x", "--method", "rotary-randomized:range=1000000000"], "give at most 16777216"),
        ("train", ["--output", "x", "--method", "m" * 10_000], "give one of alibi"),
    ],
)
def test_lists_without_an_end_are_refused_in_a_line_with_one(capsys, verb, words, line):
    said = refused(capsys, verb, *words)
    assert line in said
    assert len(said) < 2100


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_for_a_number_names_itself(capsys, verb):
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    options = re.findall(r"^  .*?(--[a-z-]+) (?:INT|NUMBER)", capsys.readouterr().out, re.MULTILINE)
    needed = {
        "compare": "--output y",
        "train": "--output y",
        "embed": "x --output y --data z",
        "export": "x --output y",
    }
    for option in options:
        assert f": {option}='three': give " in refused(capsys, verb, *needed.get(verb, "x").split(), option, "three")
    assert options or verb == "report"


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("on_terminal", [False, True])
def test_mistakes_read_the_same_wherever_they_are_printed(capsys, monkeypatch, encoding, on_terminal):
    screen = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr(screen, "isatty", lambda: on_terminal)
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "40")
    mend = "--strides=9 is over every window: give at most the longest of --lengths=8"
    assert refused(capsys, "evaluate", "nowhere", "--lengths", "8", "--strides", "9") == f"longreach evaluate: {mend}"
    assert refused(capsys, "evaluate", "nowhere", "--lenths", "8") == (
        "longreach evaluate: unknown option --lenths: did you mean --lengths?"
    )


def test_long_names_stay_whole_in_errors(capsys, tmp_path):
    name = str(tmp_path / ("long-name-" * 20))
    assert name in refused(capsys, "compare", "--output", "x", "--data", name)


@pytest.mark.parametrize(("content", "part"), [(b"", "text"), (b"\xff\xfe\x00bad\x80", "UTF-8")])
def test_bad_text_is_refused(capsys, tmp_path, content, part):
    (tmp_path / "text.txt").write_bytes(content)
    output = tmp_path / "out"
    line = refused(capsys, "compare", "--output", str(output), "--data", str(tmp_path / "text.txt"))
    assert part in line
    assert not output.exists()


def test_names_of_files_are_no_commands_to_the_terminal(capsys, small, tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "\x1b]0;title\x07.jsonl").write_text('{"text": "' + "some words, " * 200 + '"}\n' + "bad\n")
    output = tmp_path / "out"
    words = ["train", "--output", str(output), *small, "--data", str(folder)]
    line = refused(capsys, *words)
    assert rf"{folder}/\x1b]0;title\x07.jsonl:2 is not JSON" in line
    (folder / "two\nlines.jsonl").write_text('{"text": "' + "more words, " * 200 + '"}\n' + "bad\n")
    main([*words, "--skip-bad"])
    said = capsys.readouterr().err
    assert rf"2 bad files or lines: {folder}/\x1b]0;title\x07.jsonl:2, {folder}/two\nlines.jsonl:2" in said
    assert not {"\x1b", "\x07"} & set(said)


def test_a_text_too_short_to_be_split_is_refused(capsys, tmp_path):
    (tmp_path / "text.txt").write_text("x")
    with pytest.raises(SystemExit, match="2"):
        main(["compare", "--output", str(tmp_path / "out"), "--data", str(tmp_path / "text.txt")])
    assert "--valid-data" in capsys.readouterr().err.splitlines()[-1]  # after how far reading came
    assert not (tmp_path / "out").exists()


def test_train_says_what_it_made(capsys, small, tmp_path):
    main(["train", "--output", str(tmp_path / "run"), "--method", "rotary", *small])
    assert capsys.readouterr().out.startswith("rotary: 4 steps, 256 tokens, ")
    assert load_model(tmp_path / "run").config.method == "rotary"


def test_train_refuses_the_folder_of_another_run(capsys, small, trained):
    line = refused(capsys, "train", "--output", str(trained), *small, "--seed", "9")
    assert "it was begun with --seed=0; give a new folder" in line


def test_a_configuration_file_gives_the_same_run(small, trained, tmp_path):
    main(["train", "--output", str(tmp_path / "again"), "--config-file", str(trained / "config.toml")])
    first, second = load_model(trained).state_dict(), load_model(tmp_path / "again").state_dict()
    assert all((first[name] == second[name]).all() for name in first)
    assert (tmp_path / "again" / "config.toml").read_text() == (trained / "config.toml").read_text()


def test_options_change_a_configuration_file(trained, tmp_path):
    words = ["--config-file", str(trained / "config.toml"), "--method", "none", "--steps", "2"]
    main(["train", "--output", str(tmp_path / "other"), *words])
    assert json.loads((tmp_path / "other" / "training.json").read_text())["steps"] == 2


def test_train_goes_on_from_a_run_at_a_longer_length(capsys, trained, tmp_path):
    words = [
        "--train-length",
        "32",
        "--method",
        "alibi:scaling=linear-fixed=2",
        "--steps",
        "2",
        "--warmup-steps",
        "0",
    ]
    main(["train", "--from", str(trained), "--output", str(tmp_path / "longer"), *words])
    said = capsys.readouterr().out
    assert said.startswith("alibi:scaling=linear-fixed=2: 2 steps, 512 tokens, ")
    before, after = load_model(trained), load_model(tmp_path / "longer")
    assert after.config == replace(before.config, method="alibi:scaling=linear-fixed=2", train_length=32)
    first, second = before.state_dict(), after.state_dict()
    assert all((first[name] - second[name]).abs().max() < 0.01 for name in first)  # two steps of learning rate 2e-3
    main(["train", "--from", str(trained), "--output", str(tmp_path / "longer"), *words])  # finished: nothing is done
    assert capsys.readouterr().out == said
    main(["generate", str(tmp_path / "longer"), "--prompt", "document", "--max-new-tokens", "3"])


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--method", "t5"], ["--method='t5'", "positions that are trained"]),
        (["--num-layers", "2"], ["--num-layers=2", "has 1", "leave it out"]),
        (["--tokenizer", "none"], ["--tokenizer=none", "has another", "tokenizer.json"]),
        (["--method", "rope"], ["'rope'", "rotary"]),
    ],
)
def test_train_from_a_run_refuses_what_does_not_fit_it(capsys, trained, tmp_path, words, parts):
    line = refused(capsys, "train", "--from", str(trained), "--output", str(tmp_path / "out"), *words)
    assert all(part in line for part in parts), line
    assert not (tmp_path / "out").exists()


def test_train_from_a_comparison_says_where_its_runs_are(capsys, small, tmp_path):
    main(["compare", "--output", str(tmp_path / "runs"), *small, "--methods", "none", "--valid-lengths", "16"])
    capsys.readouterr()
    line = refused(capsys, "train", "--from", str(tmp_path / "runs"), "--output", str(tmp_path / "out"))
    assert "runs' holds no finished run: give the folder of one, as train writes it and compare does" in line


def test_train_from_a_pretrained_model_and_evaluate_it(capsys, trained, small, tmp_path):
    tokenizer = load_tokenizer(trained / "tokenizer.json")
    special = {"bos_token_id": None, "eos_token_id": tokenizer.eos_id}
    size = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16, "vocab_size": tokenizer.vocab_size}
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**size, **special)).save_pretrained(tmp_path / "gpt2")
    tokenizer.save(tmp_path / "gpt2" / "tokenizer.json")
    data = small[small.index("--data") :]
    words = ["train", "--from", str(tmp_path / "gpt2"), "--output", str(tmp_path / "run"), "--warmup-steps", "1", *data]
    capsys.readouterr()
    assert "--method='rotary'" in refused(capsys, *words, "--method", "rotary")
    main(words)
    assert capsys.readouterr().out.startswith("alibi: 4 steps, 512 tokens, ")
    main(["evaluate", str(tmp_path / "run"), "--lengths", "16,64", "--output", str(tmp_path / "evaluation")])
    records = Results.read(tmp_path / "evaluation" / "results.json").records
    assert [(r.train_length, r.valid_length) for r in records] == [(16, 16), (16, 64)]
    capsys.readouterr()
    main(["generate", str(tmp_path / "run"), "--prompt", "document", "--max-new-tokens", "20"])
    assert capsys.readouterr().out.startswith("document")


def test_compare_prints_rows_then_the_table_and_report_rebuilds_it(capsys, small, tmp_path):
    output = tmp_path / "out"
    main(["compare", "--output", str(output), *small, "--methods", "alibi,none", "--valid-lengths", "16,32"])
    table, progress = capsys.readouterr()
    stages = [line.partition(":")[0] for line in progress.splitlines()]
    first = stages.index("alibi trained at 16, seed 0")  # its row stands before the next method begins
    assert first < stages.index("training none") < stages.index("none trained at 16, seed 0")
    perplexity = Results.read(output / "results.json").records[0].perplexity
    assert f"perplexity {perplexity:.2f} at 16" in progress.splitlines()[first]
    assert "alibi" in table
    assert "none" in table
    assert str(output / "report.html") in table
    page = (output / "report.html").read_text()
    (output / "report.html").unlink()
    main(["report", str(output)])
    assert (output / "report.html").read_text() == page


def test_none_is_a_method_and_the_way_to_unset_an_option(small, tmp_path):
    words = [*small, "--methods", "none", "--valid-lengths", "none", "--d-ff", "none", "--valid-tokens", "300"]
    main(["compare", "--output", str(tmp_path / "out"), *words])
    results = Results.read(tmp_path / "out" / "results.json")
    assert results.methods() == ("none",)
    assert results.valid_lengths(16) == (16, 32, 64, 128, 256)


def test_evaluate_gives_the_numbers_of_compare(capsys, small, tmp_path):
    output = tmp_path / "out"
    main(["compare", "--output", str(output), *small, "--methods", "alibi,none", "--valid-lengths", "16,32"])
    words = [str(output / "alibi"), str(output / "none"), "--valid-lengths", "16,32"]
    main(["evaluate", *words, "--output", str(tmp_path / "evaluation")])
    compared, evaluated = (Results.read(path / "results.json").records for path in (output, tmp_path / "evaluation"))
    assert [(r.cell, r.nll, r.bytes) for r in evaluated] == [(r.cell, r.nll, r.bytes) for r in compared]
    assert (tmp_path / "evaluation" / "report.html").exists()


@pytest.mark.parametrize(
    ("verb", "words", "mend"),
    [
        ("evaluate", [], "give --output to be able to go on"),
        ("evaluate", ["--output", "x"], "run the same command again"),
        ("embed", ["--data", "x", "--output", "x.npy"], "run the same command again"),
    ],
)
def test_an_interrupt_says_how_to_go_on(capsys, monkeypatch, verb, words, mend):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("longreach.verbs.evaluate.evaluate_models", interrupted)
    monkeypatch.setattr("longreach.verbs.embed.embed", interrupted)
    with pytest.raises(SystemExit) as end:
        main([verb, "some-model", *words])
    assert end.value.code == 130
    assert f"longreach {verb}: interrupted; {mend}" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["evaluate", "generate"])
def test_the_folder_of_a_comparison_is_no_run(capsys, small, tmp_path, verb):
    main(["compare", "--output", str(tmp_path / "out"), *small, "--methods", "none,alibi", "--valid-lengths", "16"])
    capsys.readouterr()
    line = refused(capsys, verb, str(tmp_path / "out"))
    assert line.endswith("out holds a comparison: give the folder of one of its runs (alibi, none)")


@pytest.mark.parametrize("verb", ["evaluate", "generate"])
def test_a_folder_without_a_model_is_no_run(capsys, tmp_path, verb):
    assert refused(capsys, verb, str(tmp_path)).endswith(
        f"{tmp_path} holds no model: give the folder of a trained run, with its config.toml, or of a Hugging Face "
        "model, with its config.json"
    )


@pytest.mark.parametrize("data", ["", "nowhere.txt", "\udcff"])
def test_the_text_of_an_evaluation_is_named_as_it_is_given(capsys, trained, data):
    assert refused(capsys, "evaluate", str(trained), "--lengths", "16", "--data", data).startswith(
        "longreach evaluate: --data"
    )


def test_evaluate_refuses_another_training_length_for_a_run(capsys, trained):
    line = refused(capsys, "evaluate", str(trained), "--train-length", "7")
    assert line == f"longreach evaluate: --train-length=7: {trained} was trained by longreach at 16; leave it out"


def test_evaluate_prints_what_was_measured_before_a_model_failed(capsys, trained, tmp_path, leave):
    broken = shutil.copytree(trained, tmp_path / "broken")
    for name, is_its in (("config.toml", " = "), ("config.json", ": "), ("training.json", ": ")):
        text = (broken / name).read_text()
        (broken / name).write_text(text.replace(f'{is_its}"alibi"', f'{is_its}"none"'))
    (broken / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(SystemExit) as end:
        main(["evaluate", str(trained), str(broken), "--lengths", "16"])
    captured = capsys.readouterr()
    assert end.value.code == 2
    assert "alibi" in captured.out
    assert captured.err.splitlines()[-1].startswith(
        f"longreach evaluate: {broken}/model.safetensors: damaged or not a longreach model"
    )
    leave("stdout")
    with pytest.raises(SystemExit) as end:
        main(["evaluate", str(trained), str(broken), "--lengths", "16"])
    assert end.value.code == 2


def test_evaluate_on_other_text(capsys, trained, tmp_path):
    text = "one two three four five six seven. " * 40
    (tmp_path / "other.txt").write_text(text)
    main(
        [
            "evaluate",
            str(trained),
            "--data",
            str(tmp_path / "other.txt"),
            "--valid-lengths",
            "16",
            "--output",
            str(tmp_path / "e"),
        ]
    )
    record = Results.read(tmp_path / "e" / "results.json").records[0]
    # All the text but its first token is scored, and the end of the document, which has no bytes.
    assert len(text) - 10 < record.bytes < len(text)


def test_export_says_where_the_model_is_and_keeps_one_that_is_there(capsys, trained, tmp_path):
    words = ["export", str(trained), "--output", str(tmp_path / "mpt")]
    main(words)
    assert capsys.readouterr().out == f"Model: {tmp_path / 'mpt'}\n"
    assert refused(capsys, *words).startswith(f"longreach export: --output='{tmp_path / 'mpt'}' exists: give a new one")


def test_generate_prints_the_prompt_and_what_the_run_adds(capsys, trained):
    main(["generate", str(trained), "--prompt", "document 3", "--max-new-tokens", "60", "--seed", "1"])
    text = capsys.readouterr().out
    assert text.startswith("document 3")
    assert len(text) > len("document 3\n")
    assert text.endswith("\n")


def test_generate_reads_standard_input(capsys, trained, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("the sum of"))
    main(["generate", str(trained), "--prompt", "-", "--max-new-tokens", "3", "--temperature", "0"])
    assert capsys.readouterr().out.startswith("the sum of")


def test_a_damaged_model_is_refused(capsys, small, tmp_path):
    main(["train", "--output", str(tmp_path / "run"), *small])
    capsys.readouterr()
    weights = tmp_path / "run" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "damaged" in refused(capsys, "generate", str(tmp_path / "run"), "--prompt", "a")


def test_divergence_ends_with_one_line(capsys, small, tmp_path):
    with pytest.raises(SystemExit) as end:
        main(["train", "--output", str(tmp_path / "run"), *small, "--learning-rate", "1e30"])
    assert end.value.code == 2
    *stages, line = capsys.readouterr().err.splitlines()
    assert stages == [stage for stage in stages if stage.startswith(("reading", "tokenizing", "training the tok"))]
    assert line.startswith("longreach train: step 2: loss=nan")
    assert "learning_rate" in line


def test_a_comparison_of_which_models_failed_ends_with_status_1_and_names_them(capsys, small, tmp_path):
    words = ["compare", "--output", str(tmp_path / "out"), *small, "--methods", "alibi,none", "--seeds", "3,4"]
    with pytest.raises(SystemExit) as end:
        main([*words, "--valid-lengths", "16", "--learning-rate", "1e30"])
    assert end.value.code == 1
    captured = capsys.readouterr()
    line = captured.err.splitlines()[-1]
    assert line.startswith("longreach compare: 4 of 4 models failed: alibi trained at 16, seed 3: step 2: loss=nan")
    assert "; none trained at 16, seed 4: step 2" in line
    assert "report.html" in captured.out
    assert (tmp_path / "out" / "report.html").exists()


def test_the_installed_command_runs():
    result = subprocess.run(
        [sys.executable, "-m", "longreach", "--version"], capture_output=True, text=True, check=True
    )
    assert result.stdout.startswith("longreach ")


@pytest.mark.parametrize(
    "words",
    [
        ("generate", "nowhere"),
        ("embed", "nowhere", "--data=README.md", "--output=vectors.npy"),
        ("doctor", "nowhere"),
        ("evaluate", "nowhere", "--output=tested"),
        ("train", "--from=nowhere", "--output=trained"),
    ],
    ids=lambda words: words[0],
)
def test_a_model_that_needs_an_extra_names_it(capsys, monkeypatch, tmp_path, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert refused(capsys, *words).endswith("pip install 'longreach[hf]'")


@pytest.mark.parametrize(("package", "mend"), [("transformers", "pip install 'longreach[hf]'"), ("other", "No other")])
def test_a_package_that_is_missing_further_in_is_named(capsys, monkeypatch, package, mend):
    def fail(*_):
        raise ModuleNotFoundError(f"No {package}", name=package)

    monkeypatch.setattr(cli, "_run_verb", fail)
    assert refused(capsys, "doctor", "nowhere").endswith(mend)
