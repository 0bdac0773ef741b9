"""The command line: one thin function for each verb."""

import argparse
import contextlib
import io
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, NoReturn, TypeVar, Union, get_args, get_origin

import torch
import tyro
from rich.console import Console

from longreach.compare import CompareConfig, compare
from longreach.data.prepare import DataConfig, prepare
from longreach.data.tokenizer import StreamingDecoder
from longreach.evaluate.sweep import EvaluateConfig
from longreach.models.generate import stream
from longreach.report.page import write_report
from longreach.report.tables import print_tables
from longreach.results import Results
from longreach.runs import evaluate_run, open_run, provenance, train_run, validation_tokens
from longreach.terminal import TerminalProgress
from longreach.train.config import PRESETS, RunConfig, check_folder, load_config

Arguments = TypeVar("Arguments")
# Options of nested configurations stand beside the others: --steps, not --config.train.steps.
_FLAT = tyro.conf.OmitArgPrefixes


@dataclass(frozen=True)
class CompareArguments:
    """Train position methods on short sequences, test each far past that length, and report.

    With no data given, learns from the source code of Python's own standard library. Run again, it goes on where it
    stopped and skips what is finished.
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
    """Train one model with one position method. Run again, it goes on from its last checkpoint."""

    output: Path
    """Folder for the model, its tokenizer and metrics.jsonl."""
    config: Annotated[RunConfig, _FLAT]
    preset: str = "demo"
    """Starting values: demo, wikitext103-247m or cc100-1.3b. Other options change them."""
    config_file: Path | None = None
    """Starting values from a config.toml instead, as every run saves one."""


@dataclass(frozen=True)
class EvaluateArguments:
    """Test trained runs at many lengths, in nonoverlapping windows over the same tokens, and print the table."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of trained runs, as `train` writes them and `compare` does for each method."""
    evaluate: Annotated[EvaluateConfig, _FLAT] = EvaluateConfig()
    data: str | None = None
    """Text to test on: file, folder, glob or hf:NAME[:CONFIG]; by default the validation text of each run."""
    output: Path | None = None
    """Folder to write results.json, figures and report.html to."""
    device: str | None = None
    """Where to run; by default where the run was trained."""


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
class ReportArguments:
    """Rebuild report.html and the figures of a folder from its results.json."""

    folder: tyro.conf.Positional[Path]
    """Folder that holds results.json."""


def compare_command(arguments: CompareArguments) -> None:
    """`longreach compare`."""
    with TerminalProgress() as progress:
        results = compare(arguments.config, arguments.output, progress)
    console = Console()
    print_tables(results, console)
    console.print(f"Report: {arguments.output / 'report.html'}", markup=False, highlight=False, soft_wrap=True)


def train_command(arguments: TrainArguments) -> None:
    """`longreach train`."""
    config = arguments.config
    check_folder(arguments.output, config)
    with TerminalProgress() as progress:
        record = train_run(config, arguments.output, prepare(config.data, config.train.seed, progress), progress)
    print(
        f"{record.method}: {record.steps} steps, {record.tokens:,} tokens, {record.tokens_per_second:,.0f} tokens/s, "
        f"loss {record.final_loss:.3f} nats per token; model in {arguments.output}"
    )


def evaluate_command(arguments: EvaluateArguments) -> None:
    """`longreach evaluate`."""
    if not arguments.runs:
        raise ValueError("RUNS is empty: give the folder of at least one trained run")
    results: Results | None = None
    with TerminalProgress() as progress:
        for folder in arguments.runs:
            run = open_run(folder, arguments.device)
            seed, config = run.config.train.seed, arguments.evaluate.resolved(run.config.train.train_length)
            prepared = prepare(_data_for_evaluation(run.config.data, folder, arguments.data), seed, progress)
            tokens = validation_tokens(prepared, config)
            if results is None:
                results = Results(provenance=provenance(run.config, prepared, str(run.device), seed))
            for valid_length in config.valid_lengths:
                results = results.add(evaluate_run(run, tokens, valid_length, config, progress))
    assert results is not None  # there is at least one run
    print_tables(results, Console())
    if arguments.output is not None:
        arguments.output.mkdir(parents=True, exist_ok=True)
        results.write(arguments.output / "results.json")
        print(f"Report: {write_report(results, arguments.output)}")


def _data_for_evaluation(data: DataConfig, folder: Path, source: str | None) -> DataConfig:
    """The run's own validation text, or all of another source, in the tokens of the run's tokenizer."""
    data = replace(data, tokenizer=str(folder / "tokenizer.json"))
    return data if source is None else replace(data, data=source, valid_data=source, streaming=False)


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


def report_command(arguments: ReportArguments) -> None:
    """`longreach report`."""
    results = Results.read(arguments.folder / "results.json")
    print(f"Report: {write_report(results, arguments.folder)}")


VERBS: dict[str, tuple[type[Any], Callable[[Any], None]]] = {
    "compare": (CompareArguments, compare_command),
    "train": (TrainArguments, train_command),
    "evaluate": (EvaluateArguments, evaluate_command),
    "generate": (GenerateArguments, generate_command),
    "report": (ReportArguments, report_command),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run `longreach VERB ...`. Exits with 2 and one line on standard error for what the user can mend."""
    words = list(sys.argv[1:] if argv is None else argv)
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
    try:
        command(_parse(kind, words, program))
    except (ValueError, OSError, FloatingPointError, ModuleNotFoundError) as error:
        _fail(program, str(error))
    except KeyboardInterrupt:
        print(f"{program}: interrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(130)


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
    """What a verb's options default to: those of its preset or its configuration file, where it has them."""
    if kind not in (CompareArguments, TrainArguments):
        return None
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--config-file", type=Path)
    try:
        known, _ = parser.parse_known_args(words)
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from error
    if known.preset not in PRESETS:
        raise ValueError(f"preset={known.preset!r}: give one of {', '.join(PRESETS)}")
    config_class = CompareConfig if kind is CompareArguments else RunConfig
    if known.config_file is not None:
        config: Any = load_config(config_class, known.config_file)
    else:
        config = replace(config_class(), **PRESETS[known.preset])
    return kind(output=tyro.MISSING, config=config, preset=known.preset, config_file=known.config_file)  # type: ignore[call-arg]


_KINDS: dict[Any, tuple[str, str]] = {
    int: ("INT", "an integer"),
    float: ("FLOAT", "a number"),
    str: ("TEXT", "text"),
    Path: ("PATH", "a path"),
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
        if kind not in _KINDS or (is_list and kind is Path):
            return None  # paths come as words of their own, since a shell expands them so
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
    """What a tyro error box says before its first rule, as one line."""
    text = []
    for line in box.splitlines()[1:]:
        content = line.strip("│╭╰╮╯ ")
        if content.startswith("──"):
            break
        text.append(content)
    # Which section of the configuration a refused value stands in is of no interest on the command line.
    return re.sub(r"^Error parsing (config[.\w]*: )?", "", " ".join(text))


def _fail(program: str, message: str) -> NoReturn:
    """End the program with status 2 and one line."""
    print(f"{program}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
