"""The command line: parses, and has one thin function for each verb.

A verb's own modules are loaded when it runs, so that what needs no model answers at once.
"""

import contextlib
import io
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NoReturn

from longreach.process import set_up
from longreach.stopping import STATUS, Terminated, terminable

Parse = Callable[..., list[Any]]
"""`longreach.options.CommandLine.parse`: takes dataclasses, returns them filled."""

LONGEST_LINE = 2000
"""Characters of an error, which repeats what it refuses."""

LONGEST_PROMPT = 2**28
"""Characters of a prompt on standard input, which may have no end."""

Idle = Callable[[Any], Mapping[str, str]]
"""A configuration -> the fields that nothing heeds beside its others, and why."""


@dataclass(frozen=True)
class Start:
    """Where the values of options come from that are not given."""

    preset: str = "demo"
    """Starting values: demo, wikitext103-247m or cc100-1.3b. Other options change them."""
    config_file: Path | None = None
    """Starting values from a config.toml instead, as every run saves one."""


@dataclass(frozen=True)
class CompareOutput:
    """Where a comparison goes."""

    output: Path
    """Folder for results.json, report.html, figures and the trained models."""


@dataclass(frozen=True)
class TrainOutput:
    """Where a run goes."""

    output: Path
    """Folder for the model, its tokenizer and metrics.jsonl."""
    dry_run: bool = False
    """Only say what it will take, memory, time and epochs, after three steps of which nothing is kept."""


@dataclass(frozen=True)
class EvaluateOutput:
    """Where an evaluation goes."""

    output: Path | None = None
    """Folder to write results.json, figures and report.html to."""


@dataclass(frozen=True)
class Together:
    """How the processes that torchrun starts work together."""

    rank_timeout: float = 300.0
    """Seconds without a sign of life of a process of torchrun after which all end."""

    def __post_init__(self) -> None:
        if not 5 <= self.rank_timeout <= 1e6:
            raise ValueError(f"rank_timeout={self.rank_timeout:g}: give 5 to 1000000 seconds")


def _alone_too(idle: Idle) -> Idle:
    """What nothing heeds, and what nothing heeds in a process that works alone."""
    if is_launched():
        return idle
    alone = dict.fromkeys((field.name for field in fields(Together)), "no torchrun has started this process")
    return lambda config: {**idle(config), **alone}


@dataclass(frozen=True)
class EmbedOutput:
    """Where vectors go."""

    output: Path
    """File for the vectors, .npy: float32, one row a document. Beside it, .npy.part holds what is finished."""


def compare(parse: Parse) -> None:
    """`longreach compare`."""
    from longreach.report.page import print_tables
    from longreach.report.subjects.perplexity import in_one_line
    from longreach.results import Model, Results
    from longreach.terminal import Screen, TerminalProgress
    from longreach.train.parallel import joined
    from longreach.verbs.compare import CompareConfig, compare

    start = partial(_starting_values, CompareConfig)
    idle = _alone_too(CompareConfig.idle)
    to, together, _, config = parse(CompareOutput, Together, Start, CompareConfig, start=start, idle=idle)
    with joined("longreach compare", together.rank_timeout) as ranks, TerminalProgress(ranks.is_first) as progress:

        def show(results: Results, model: Model) -> None:
            if line := in_one_line(results, model):
                progress.say(line)

        results = compare(config, to.output, progress, show, ranks)
    if not ranks.is_first:
        return
    with contextlib.suppress(BrokenPipeError):  # whose status is no other for it
        print_tables(results, Screen())
        print(f"Report: {to.output / 'report.html'}")
    if failures := results.failures():
        named = "; ".join(f"{model}: {reason}" for model, reason in failures.items())
        _fail("longreach compare", f"{len(failures)} of {len(config.runs())} models failed: {named}", status=1)


def train(parse: Parse) -> None:
    """`longreach train`."""
    from longreach.pretrained.load import load_configuration
    from longreach.results.exchanged import in_words
    from longreach.terminal import TerminalProgress
    from longreach.train.config import RunConfig
    from longreach.train.parallel import joined
    from longreach.verbs.dry_run import dry_run
    from longreach.verbs.start import idle
    from longreach.verbs.train import train_run

    load = cache(load_configuration)  # for the starting values, and once more for what is trained
    start = partial(_starting_values, RunConfig, load=load)
    to, together, _, config = parse(TrainOutput, Together, Start, RunConfig, start=start, idle=_alone_too(idle))
    with joined("longreach train", together.rank_timeout) as ranks, TerminalProgress(ranks.is_first) as progress:
        if to.dry_run:
            forecast = dry_run(config, progress, ranks, load)
        else:
            record = train_run(config, to.output, progress, ranks=ranks, load=load)
    if to.dry_run:
        if ranks.is_first:
            print(*forecast.lines(), sep="\n")
        if not forecast.fits:
            mend = "give --recompute, a larger --accumulation, or --parallel fsdp and more processes"
            _fail("longreach train", f"it will not fit: {mend}", status=1)
    elif ranks.is_first:
        print(
            f"{record.method}: {record.steps} steps, {record.tokens:,} tokens, {record.tokens_per_second:,.0f} "
            f"tokens/s, loss {record.final_loss:.3f} nats per token; model in {to.output}"
        )
        if record.exchanged is not None:
            print(f"In the last step {in_words([record.exchanged])}")


def evaluate(parse: Parse) -> None:
    """`longreach evaluate`."""
    from longreach.verbs.evaluate import EvaluationConfig

    _measure("longreach evaluate", parse, EvaluationConfig)


def extend(parse: Parse) -> None:
    """`longreach extend`."""
    from longreach.verbs.extend import ExtendConfig

    _measure("longreach extend", parse, ExtendConfig)


def _measure(program: str, parse: Parse, kind: type[Any]) -> None:
    from longreach.report.page import print_tables
    from longreach.results import Results
    from longreach.results.exchanged import in_words
    from longreach.terminal import Screen, TerminalProgress
    from longreach.train.parallel import joined
    from longreach.verbs.evaluate import evaluate_models

    to, together, config = parse(EvaluateOutput, Together, kind, positional="models", idle=_alone_too(kind.idle))
    so_far: list[Results] = []
    try:
        with joined(program, together.rank_timeout) as ranks, TerminalProgress(ranks.is_first) as progress:
            evaluate_models(config, to.output, progress, so_far.append, ranks)
    finally:  # an error at a later model leaves what was measured before it
        if so_far and speaks():
            with contextlib.suppress(BrokenPipeError):  # which would take its place
                print_tables(so_far[-1], Screen())
    exchanged = [one.exchanged for one in so_far[-1].records if one.exchanged is not None] if so_far else []
    if exchanged and speaks():
        print(f"For all windows {in_words(exchanged)}")
    if to.output is not None and speaks():
        print(f"Report: {to.output / 'report.html'}")


def doctor(parse: Parse) -> None:
    """`longreach doctor`."""
    from longreach.terminal import Screen, TerminalProgress
    from longreach.verbs import doctor, doctor_encoder
    from longreach.verbs.open import is_encoder

    (config,) = parse(doctor.DoctorConfig, positional="model", idle=doctor.DoctorConfig.idle)
    kind: Any = doctor_encoder if is_encoder(config.model) else doctor
    with TerminalProgress() as progress:
        checkup = kind.examine(config, progress)
    kind.print_checkup(checkup, Screen())


def embed(parse: Parse) -> None:
    """`longreach embed`."""
    from longreach.terminal import TerminalProgress
    from longreach.verbs.embed import EmbedConfig, embed

    to, config = parse(EmbedOutput, EmbedConfig, positional="model", idle=EmbedConfig.idle)
    with TerminalProgress() as progress:
        count, width = embed(config, to.output, progress)
    print(f"{count:,} vectors of {width:,} numbers in {to.output}")


def generate(parse: Parse) -> None:
    """`longreach generate`."""
    from longreach.verbs.generate import GenerateConfig, generate

    (config,) = parse(GenerateConfig, positional="model", idle=GenerateConfig.idle)
    for piece in generate(replace(config, prompt=_read_prompt()) if config.prompt == "-" else config):
        print(piece, end="", flush=True)
    print()


def _read_prompt() -> str:
    """The prompt that stands on standard input."""
    if sys.stdin is None:
        raise ValueError("prompt=-: standard input is closed: give text")
    try:
        text = sys.stdin.read(LONGEST_PROMPT + 1)
        if len(text) > LONGEST_PROMPT:
            raise ValueError(f"prompt=-: standard input has over {LONGEST_PROMPT} characters: give fewer")
        text.encode()  # some systems read what is none as half a surrogate pair
        return text
    except UnicodeError as error:
        raise ValueError(f"--prompt=-: standard input is not UTF-8 ({error}): convert it") from error


def export(parse: Parse) -> None:
    """`longreach export`."""
    from longreach.verbs.export import ExportConfig, export

    (config,) = parse(ExportConfig, positional="run")
    export(config)
    print(f"Model: {config.output}")


def report(parse: Parse) -> None:
    """`longreach report`."""
    from longreach.terminal import TerminalProgress
    from longreach.verbs.report import ReportConfig, report

    (config,) = parse(ReportConfig, positional="folders")
    with TerminalProgress() as progress:
        page = report(config, progress)
    print(f"Report: {page}")


VERBS: dict[str, tuple[Callable[[Parse], None], str, str]] = {
    "compare": (
        compare,
        "Train position methods on short sequences, test each far past that length, and report.",
        "With no data given, learns from the source code of Python's own standard library. Run again, it goes on where "
        "it stopped and skips what is finished.",
    ),
    "train": (
        train,
        "Train one model with one position method, from new weights or from those of another (--from).",
        "Run again, it goes on from its last checkpoint.",
    ),
    "evaluate": (
        evaluate,
        "Measure models at many lengths: perplexity, use of context, retrieval, summaries; print the tables.",
        "Run again with the same output, it goes on where it stopped.",
    ),
    "extend": (
        extend,
        "Measure pretrained models past their training length, with and without interpolated positions, and report.",
        "Run again with the same output, it goes on where it stopped.",
    ),
    "doctor": (
        doctor,
        "Examine a pretrained ALiBi model: what its stock code does wrong, how far its heads see, which scaling to "
        "use.",
        "With no text given it runs on random tokens, which show mistakes but cannot tell scalings apart.",
    ),
    "embed": (
        embed,
        "Write the vectors of all documents of a text by an ALiBi encoder: JinaBERT v2, MosaicBERT, DNABERT-2.",
        "Run again, it goes on where it stopped.",
    ),
    "generate": (
        generate,
        "Continue a text with a run or a Hugging Face model, token by token, past the training length if asked to.",
        "",
    ),
    "export": (export, "Write a trained ALiBi run as an MPT model, which stock transformers loads.", ""),
    "report": (
        report,
        "Rebuild report.html and the figures of a folder from its results.json, or show several folders on one page.",
        "",
    ),
}
"""Name of a verb -> its function, what it does, and what is good to know of it."""


def is_launched() -> bool:
    """Whether torchrun, or a scheduler in its stead, started this process."""
    return "WORLD_SIZE" in os.environ


def speaks() -> bool:
    """Whether this process prints: of those that torchrun starts, rank 0, and one whose rank cannot be."""
    rank, size = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    return not (rank.isdecimal() and size.isdecimal() and 0 < int(rank) < int(size))


def main(argv: Sequence[str] | None = None) -> None:
    """Run `longreach VERB ...`. Exits with 2 and one line on standard error for what the user can mend."""
    words = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what its encoding has not is written as it can be
            stream.reconfigure(errors="replace" if stream is sys.stdout else "backslashreplace")
    try:
        with contextlib.suppress(BrokenPipeError):  # who reads, as `head` does, has had enough
            _run(words)
    except OSError as error:  # of what a verb does not print
        _fail("longreach", _reason(error))
    finally:
        _flush()


def _flush() -> None:
    """Write what is left of the output, where there is one: at its end Python would tell nobody what fails."""
    for stream in (sys.stderr, sys.stdout):
        try:
            if stream is not None:
                stream.flush()
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # else Python would try once more
            if stream is sys.stdout and not isinstance(error, BrokenPipeError):
                _fail("longreach", _reason(error))


def _reason(error: OSError) -> str:
    """What an operation of the system failed at, in one line."""
    if error.filename:
        return f"{error.filename}: {error.strerror}; mend that"
    if error.errno and error.strerror == os.strerror(error.errno):  # of a file that is open, the output mostly
        return f"what is written to has failed ({error.strerror}); mend that"
    return error.strerror or str(error)


def _run(words: list[str]) -> None:
    verb = words[0] if words else None
    if verb in (None, "-h", "--help"):
        print(_overview())
        sys.exit(0 if verb else 2)
    if verb == "--version":
        from longreach import __version__

        print(f"longreach {__version__}")
        return
    if verb not in VERBS:
        _fail("longreach", f"unknown verb {verb!r}: give one of {', '.join(VERBS)}")
    from longreach.options import CommandLine

    program = f"longreach {verb}"
    command, does, note = VERBS[verb]
    line = CommandLine(program, f"{does} {note}", words[1:])
    try:
        with terminable():
            _run_verb(command, line.parse)
    except BrokenPipeError:
        raise
    except OSError as error:
        _fail(program, line.spelled(_reason(error)))
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        is_extra = package in ("transformers", "datasets")
        _fail(program, f"{package} is not installed: pip install 'longreach[hf]'" if is_extra else str(error))
    except (ValueError, FloatingPointError) as error:
        _fail(program, line.spelled(str(error)))
    except (MemoryError, RuntimeError) as error:
        from longreach.cost import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        _fail(program, "out of memory: give a smaller model, shorter lengths or smaller batches")
    except (KeyboardInterrupt, Terminated) as stop:
        what, status = ("interrupted", 130) if isinstance(stop, KeyboardInterrupt) else ("terminated", STATUS)
        _fail(program, what + _how_to_go_on(verb, words), status)


def _how_to_go_on(verb: str, words: list[str]) -> str:
    """What to do after a verb was interrupted, where there is anything."""
    if verb in ("compare", "train", "embed"):
        return "; run the same command again to go on"
    if verb not in ("evaluate", "extend"):
        return ""
    kept = any(word.startswith("--output") for word in words)
    return f"; {'run the same command again' if kept else 'give --output to be able'} to go on"


def _run_verb(command: Callable[[Parse], None], parse: Parse) -> None:
    set_up()
    command(parse)


def _overview() -> str:
    lines = [
        "usage: longreach VERB [options]",
        "",
        "Train short, reach long: language models past their training length.",
        "",
    ]
    lines += [f"  {verb:<10}{does}" for verb, (_, does, _) in VERBS.items()]
    return "\n".join([*lines, "", "longreach VERB --help shows a verb's options; longreach --version the version."])


def _starting_values(kind: type[Any], given: Mapping[str, Any], load: Callable[[str], Any] | None = None) -> Any:
    """What options default to: the values of the preset, of the configuration file or of the model to start from.

    load gives the configuration of a Hugging Face model, of kinds that may start from one.
    """
    from longreach.reading import read_file
    from longreach.train.config import PRESETS
    from longreach.verbs.start import starting_config

    preset = given.get("preset", "demo")
    file, source = (None if given.get(name) == "none" else given.get(name) for name in ("config_file", "start_from"))
    if preset not in PRESETS:
        raise ValueError(f"preset={preset!r}: give one of {', '.join(PRESETS)}")
    if source is not None and load is not None:
        if file is not None or preset != "demo":
            raise ValueError(f"start_from={source} gives the starting values: leave --preset and --config-file out")
        return starting_config(source, load)
    if file is not None:
        if "preset" in given:
            raise ValueError(f"preset={preset}: config_file={file} gives the starting values, leave one of them out")
        if Path(file).is_dir():  # "" is the folder that one stands in
            raise ValueError(f"config_file={file!r} is a folder: give a config.toml, as every run saves one")
        try:
            return read_file(kind, Path(file))
        except OSError as error:
            raise ValueError(f"config_file={file!r}: {error}") from error
    return replace(kind(), **PRESETS[preset])


def _fail(program: str, message: str, status: int = 2) -> NoReturn:
    """End the program with one line, of which no refused value takes more than a screen."""
    from longreach.terminal import printable

    line = printable(" ".join(message.split()))
    if len(line) > LONGEST_LINE:
        line = f"{line[: LONGEST_LINE // 2]} ... {line[-LONGEST_LINE // 2 :]}"
    if speaks():
        with contextlib.suppress(OSError):  # of who does not read it
            print(f"{program}: {line}", file=sys.stderr)
    sys.exit(status)
