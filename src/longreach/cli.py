"""The command line: one thin function for each verb."""

import argparse
import contextlib
import io
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin

import torch
import tyro
from rich.console import Console

from longreach.data.prepare import prepare
from longreach.data.tokenizer import StreamingDecoder
from longreach.measure.plan import EvaluateConfig
from longreach.models.generate import stream
from longreach.pretrained.export import export_mpt
from longreach.reading import read_file
from longreach.report.grid import to_markdown
from longreach.report.page import print_tables, write_report
from longreach.report.subjects.perplexity import in_one_line, main_grid
from longreach.results import Model, Results
from longreach.terminal import TerminalProgress
from longreach.train.config import PRESETS, RunConfig, check_folder
from longreach.train.loop import read_training_record
from longreach.verbs.compare import CompareConfig, compare
from longreach.verbs.doctor import DoctorConfig, examine, print_checkup
from longreach.verbs.evaluate import EvaluationConfig, evaluate_models
from longreach.verbs.start import check_start, starting_config
from longreach.verbs.train import open_run, train_run

Arguments = TypeVar("Arguments")
Config = TypeVar("Config", EvaluationConfig, DoctorConfig)
# Short names of options that are typed often.
_FULL_NAMES = {"--task": "--tasks", "--lengths": "--valid-lengths", "--from": "--start-from", "--scaling": "--scalings"}
# Options of nested configurations stand beside the others: --steps, not --config.train.steps.
_FLAT = tyro.conf.OmitArgPrefixes


class _Word(str):
    """Text that stands as a word of its own, for a shell may expand it: several are parted by spaces, not commas."""


@dataclass(frozen=True)
class CompareArguments:
    """Train position methods on short sequences, test each far past that length, and report.

    With no data given, learns from the source code of Python's own standard library. Run again, it goes on where it
    stopped and skips what is finished. --task and --lengths are short for --tasks and --valid-lengths.
    """

    output: Path
    """Folder for results.json, report.html, figures and the trained models."""
    config: Annotated[CompareConfig, _FLAT]
    preset: str = "demo"
    """Starting values: demo, wikitext103-247m or cc100-1.3b. Other options change them."""
    config_file: Path | None = None
    """Starting values from a config.toml instead, as every run saves one."""


@dataclass(frozen=True)
class TrainArguments:
    """Train one model with one position method, from new weights or from those of another (--from).

    Run again, it goes on from its last checkpoint. --from is short for --start-from.
    """

    output: Path
    """Folder for the model, its tokenizer and metrics.jsonl."""
    config: Annotated[RunConfig, _FLAT]
    preset: str = "demo"
    """Starting values: demo, wikitext103-247m or cc100-1.3b. Other options change them."""
    config_file: Path | None = None
    """Starting values from a config.toml instead, as every run saves one."""


@dataclass(frozen=True)
class EvaluateArguments(EvaluationConfig):
    """Measure models at many lengths: perplexity, use of context, retrieval, summaries; print the tables.

    Run again with the same output, it goes on where it stopped. --task, --lengths and --scaling are short for --tasks,
    --valid-lengths and --scalings.
    """

    models: tyro.conf.Positional[tuple[_Word, ...]]
    evaluate: Annotated[EvaluateConfig, _FLAT] = EvaluateConfig()
    output: Path | None = None
    """Folder to write results.json, figures and report.html to."""


@dataclass(frozen=True)
class ExtendArguments(EvaluateArguments):
    """Measure pretrained ALiBi models past their training length, with and without interpolated slopes, and report.

    Run again with the same output, it goes on where it stopped. --task, --lengths and --scaling are short for --tasks,
    --valid-lengths and --scalings.
    """

    scalings: tuple[str, ...] = ("none", "linear", "ntk")
    """How the slopes are scaled past L, one after another: none (as the model's configuration says), linear, ntk or
    linear-fixed=FACTOR, and +logn after any of them; stock is the model's own code."""


@dataclass(frozen=True)
class DoctorArguments(DoctorConfig):
    """Examine a pretrained ALiBi model: what its stock code does wrong, how far its heads see, which scaling to use.

    With no text given it runs on random tokens, which show mistakes but cannot tell scalings apart. --lengths is short
    for --valid-lengths.
    """

    model: tyro.conf.Positional[_Word]


@dataclass(frozen=True)
class GenerateArguments:
    """Continue a text with a trained run, token by token, past the training length if asked to."""

    run: tyro.conf.Positional[Path]
    """Folder of a trained run."""
    prompt: str | None = None
    """Text to continue, or - for standard input; by default the start of a document."""
    max_new_tokens: int = 256
    """How many tokens to add at most."""
    temperature: float = 0.8
    """0 takes the likeliest token; otherwise logits are divided by it and a token is drawn."""
    top_k: int | None = None
    """Draw only among the k likeliest tokens."""
    top_p: float | None = None
    """Draw only among the likeliest tokens that together hold probability p."""
    seed: int = 0
    """Seed of the draws."""
    device: str | None = None
    """Where to run; by default where the run was trained."""


@dataclass(frozen=True)
class ExportArguments:
    """Write a trained ALiBi run as an MPT model, which stock transformers loads."""

    run: tyro.conf.Positional[Path]
    """Folder of a trained run."""
    output: Path
    """Folder to write to; new or empty."""
    to: Literal["mpt"] = "mpt"
    """The architecture: MPT is the published one that holds ALiBi without loss."""
    max_length: int | None = None
    """The longest input in tokens that the exported model is to take; 16 times the training length by default."""
    results: Path | None = None
    """A results.json whose perplexities of this run go into the model card; by default that of the comparison that
    the run belongs to."""


@dataclass(frozen=True)
class ReportArguments:
    """Rebuild report.html and the figures of a folder from its results.json."""

    folder: tyro.conf.Positional[Path]
    """Folder that holds results.json."""


def compare_command(arguments: CompareArguments) -> None:
    """`longreach compare`."""
    with TerminalProgress() as progress:

        def show(results: Results, model: Model) -> None:
            if line := in_one_line(results, model):
                progress.say(line)

        results = compare(arguments.config, arguments.output, progress, show)
    console = Console()
    print_tables(results, console)
    console.print(f"Report: {arguments.output / 'report.html'}", markup=False, highlight=False, soft_wrap=True)


def train_command(arguments: TrainArguments) -> None:
    """`longreach train`."""
    config = arguments.config
    check_folder(arguments.output, config)
    check_start(config)
    with TerminalProgress() as progress:
        record = train_run(config, arguments.output, prepare(config.data, config.train.seed, progress), progress)
    print(
        f"{record.method}: {record.steps} steps, {record.tokens:,} tokens, {record.tokens_per_second:,.0f} tokens/s, "
        f"loss {record.final_loss:.3f} nats per token; model in {arguments.output}"
    )


def evaluate_command(arguments: EvaluateArguments) -> None:
    """`longreach evaluate` and `longreach extend`."""
    config = _part(arguments, EvaluationConfig)
    so_far: list[Results] = []
    try:
        with TerminalProgress() as progress:
            evaluate_models(config, arguments.output, progress, so_far.append)
    finally:  # an error at a later model leaves what was measured before it
        if so_far:
            print_tables(so_far[-1], Console())
    if arguments.output is not None:
        print(f"Report: {arguments.output / 'report.html'}")


def doctor_command(arguments: DoctorArguments) -> None:
    """`longreach doctor`."""
    with TerminalProgress() as progress:
        checkup = examine(_part(arguments, DoctorConfig), progress)
    print_checkup(checkup, Console())


def _part(arguments: Any, kind: type[Config]) -> Config:
    """The configuration whose fields are among a verb's arguments."""
    return kind(**{field.name: getattr(arguments, field.name) for field in fields(kind)})


def generate_command(arguments: GenerateArguments) -> None:
    """`longreach generate`."""
    run = open_run(arguments.run, arguments.device)
    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    ids = run.tokenizer.encode(prompt) if prompt else [run.tokenizer.eos_id]
    steps = stream(
        run.model,
        [ids],
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        eos_id=run.tokenizer.eos_id,
        seed=arguments.seed,
    )
    decoder = StreamingDecoder(run.tokenizer)
    print(prompt or "", end="", flush=True)
    for (token,) in steps:
        if token is not None:
            print(decoder.push(token), end="", flush=True)
    print(decoder.finish())


def export_command(arguments: ExportArguments) -> None:
    """`longreach export`."""
    run = open_run(arguments.run, "cpu")
    train_length = run.model.config.train_length
    results = _of_comparison(arguments.run) if arguments.results is None else Results.read(arguments.results)
    export_mpt(
        run.model,
        arguments.output,
        max_length=16 * train_length if arguments.max_length is None else arguments.max_length,
        tokenizer=arguments.run,
        card_table=None if results is None else _card_table(results, run.config.identity),
    )
    print(f"Model: {arguments.output}")


def _of_comparison(run: Path) -> Results | None:
    """The results of the comparison that trained a run; None where it was trained alone, whatever lies beside it."""
    path = run.resolve().parent / "results.json"
    if not path.exists():
        return None
    results = Results.read(path)
    return results if read_training_record(run / "training.json") in results.training else None


def _card_table(results: Results, model: Model) -> str | None:
    """The perplexities of one model as Markdown; None where there are none."""
    own = Results(
        provenance=results.provenance,
        training=tuple(entry for entry in results.training if entry.model == model),
        records=tuple(entry for entry in results.records if entry.model == model),
    )
    return to_markdown(main_grid(own, model.train_length)) if own.records else None


def report_command(arguments: ReportArguments) -> None:
    """`longreach report`."""
    results = Results.read(arguments.folder / "results.json")
    print(f"Report: {write_report(results, arguments.folder)}")


VERBS: dict[str, tuple[type[Any], Callable[[Any], None]]] = {
    "compare": (CompareArguments, compare_command),
    "train": (TrainArguments, train_command),
    "evaluate": (EvaluateArguments, evaluate_command),
    "extend": (ExtendArguments, evaluate_command),
    "doctor": (DoctorArguments, doctor_command),
    "generate": (GenerateArguments, generate_command),
    "export": (ExportArguments, export_command),
    "report": (ReportArguments, report_command),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run `longreach VERB ...`. Exits with 2 and one line on standard error for what the user can mend."""
    words = [_with_full_name(word) for word in (sys.argv[1:] if argv is None else argv)]
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        sys.exit(0 if words else 2)
    if words[0] == "--version":
        from longreach import __version__

        print(f"longreach {__version__}")
        return
    verb = words.pop(0)
    if verb not in VERBS:
        _fail("longreach", f"unknown verb {verb!r}: give one of {', '.join(VERBS)}")
    program = f"longreach {verb}"
    torch.set_flush_denormal(True)  # the exponentials of distant keys are denormal, and slow, on the CPU
    kind, command = VERBS[verb]
    arguments: Any = None
    try:
        arguments = _parse(kind, words, program)
        command(arguments)
    except (ValueError, OSError, FloatingPointError, ModuleNotFoundError) as error:
        _fail(program, str(error))
    except KeyboardInterrupt:
        lost = isinstance(arguments, EvaluateArguments) and arguments.output is None
        mend = "give --output to be able to go on" if lost else "run the same command again to go on"
        print(f"{program}: interrupted; {mend}", file=sys.stderr)
        sys.exit(130)


def _with_full_name(word: str) -> str:
    """An option's word, as in --task or --task=lines, under the name that its field has."""
    option, equals, value = word.partition("=")
    return _FULL_NAMES.get(option, option) + equals + value


def _overview() -> str:
    lines = [
        "usage: longreach VERB [options]",
        "",
        "Train short, reach long: language models past their training length.",
        "",
    ]
    lines += [f"  {verb:<10}{(kind.__doc__ or '').splitlines()[0]}" for verb, (kind, _) in VERBS.items()]
    return "\n".join([*lines, "", "longreach VERB --help shows a verb's options; longreach --version the version."])


def _parse(kind: type[Arguments], words: list[str], program: str) -> Arguments:
    """Read a verb's arguments; a mistake ends the program with one line."""
    default = _starting_values(kind, words)
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), _wide_errors(words):
            return tyro.cli(kind, prog=program, args=words, default=default, registry=_readers())
    except SystemExit as end:
        if end.code == 0:  # --help
            raise
        _fail(program, _first_section(errors.getvalue()))


@contextlib.contextmanager
def _wide_errors(words: list[str]) -> Iterator[None]:
    """Keep tyro from breaking errors, which become one line, at the width of the terminal; help keeps its width."""
    before = os.environ.get("COLUMNS")
    if not {"-h", "--help"} & set(words):
        os.environ["COLUMNS"] = "100000"
    try:
        yield
    finally:
        os.environ.pop("COLUMNS", None)
        if before is not None:
            os.environ["COLUMNS"] = before


def _starting_values(kind: type[Arguments], words: list[str]) -> Any:
    """What a verb's options default to: those of its preset, its configuration file or the model it starts from."""
    if kind not in (CompareArguments, TrainArguments):
        return None
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--config-file", type=Path)
    parser.add_argument("--start-from")
    try:
        known, _ = parser.parse_known_args(words)
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from error
    if known.preset not in PRESETS:
        raise ValueError(f"preset={known.preset!r}: give one of {', '.join(PRESETS)}")
    config_class = CompareConfig if kind is CompareArguments else RunConfig
    if kind is TrainArguments and known.start_from not in (None, "none"):
        if known.config_file is not None or known.preset != "demo":
            raise ValueError(
                f"--from {known.start_from} gives the starting values: leave --preset and --config-file out"
            )
        config: Any = starting_config(known.start_from)
    elif known.config_file is not None:
        config = read_file(config_class, known.config_file)
    else:
        config = replace(config_class(), **PRESETS[known.preset])
    return kind(output=tyro.MISSING, config=config, preset=known.preset, config_file=known.config_file)  # type: ignore[call-arg]


_KINDS: dict[Any, tuple[str, str]] = {
    int: ("INT", "an integer"),
    float: ("FLOAT", "a number"),
    str: ("TEXT", "text"),
    Path: ("PATH", "a path"),
    _Word: ("MODEL", "a name"),
}
"""Type -> how help names it, and how errors do."""


def _readers() -> tyro.constructors.ConstructorRegistry:
    """How words become values: X, X or none for `X | None`, and lists in one word, as in 128,256, for tuples."""
    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def read_kind(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[Any] | None:
        parts = get_args(info.type)
        is_list = get_origin(info.type) is tuple and parts[1:] == (Ellipsis,)
        is_optional = get_origin(info.type) in (Union, UnionType) and type(None) in parts
        kind = parts[0] if is_list or is_optional else info.type
        if kind not in _KINDS or (is_list and kind is _Word):
            return None
        metavar, description = _KINDS[kind]

        def read_one(word: str) -> Any:
            try:
                return kind(word)
            except ValueError:
                raise ValueError(f"{word!r} is not {description}") from None

        def read(words: list[str]) -> Any:
            if words[0] == "none" and (is_optional or (is_list and kind is int)):  # among names, none is a method
                return None if is_optional else ()
            if is_list:
                return tuple(read_one(word.strip()) for word in words[0].split(","))
            return read_one(words[0])

        def show(value: Any) -> list[str]:
            if is_list:
                return [",".join(map(str, value)) or "none"]
            return ["none" if value is None else str(value)]

        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar=f"{metavar},{metavar},..." if is_list else metavar,
            instance_from_str=read,
            is_instance=lambda value: True,  # values come from this module or a checked configuration
            str_from_instance=show,
        )

    return registry


def _first_section(box: str) -> str:
    """What a tyro error box says before its first rule, as one line; without UTF-8 a rule also parts off the title."""
    text: list[str] = []
    plain = re.sub(r"\x1b\[[0-9;]*m", "", box)  # on a terminal every word has a style of its own
    for line in plain.splitlines()[1:]:
        content = line.strip("│╭╰╮╯ ")
        if content.strip("─-"):
            text.append(content)
        elif text:
            break
    # Which section of the configuration a refused value stands in is of no interest on the command line.
    return re.sub(r"^Error parsing ((\w+Arguments|config|evaluate)[.\w]*: )?", "", " ".join(text))


def _fail(program: str, message: str) -> NoReturn:
    """End the program with status 2 and one line."""
    print(f"{program}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
