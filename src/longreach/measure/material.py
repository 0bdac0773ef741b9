"""What the tasks of a configuration are measured on, and the files that it names for them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from longreach.files import digest, open_file
from longreach.measure.plan import RETRIEVAL_TASKS, EvaluateConfig
from longreach.measure.retrieval import Case, read_cases
from longreach.measure.summaries import MeetingCase, read_meetings
from longreach.measure.text_tasks import Text


@dataclass(frozen=True)
class Material:
    """What the tasks of a configuration are measured on."""

    text: Text | None = None
    """For perplexity, positions and probes."""
    cases: Sequence[Case] | None = None
    """For a retrieval task; None to generate them."""
    meetings: Sequence[MeetingCase] = ()
    """For qmsum."""

    @property
    def num_targets(self) -> int:
        """How many tokens of text are scored."""
        return 0 if self.text is None else self.text.num_targets


def read_material(config: EvaluateConfig, text: Text | None) -> Material:
    """The text, and what the files of a configuration hold.

    Raises:
        ValueError: a file cannot be read, or lacks a field; the line is named.
        FileNotFoundError: there is no such file.
    """
    cases = None
    if config.cases is not None:
        (task,) = (task for task in config.tasks if task in RETRIEVAL_TASKS)
        cases = read_cases(task, _existing("cases", config.cases))
    meetings = () if config.meetings is None else read_meetings(_existing("meetings", config.meetings))
    return Material(text, cases, meetings)


def _existing(argument: str, path: str) -> Path:
    try:
        open_file(Path(path)).close()
    except FileNotFoundError:
        raise FileNotFoundError(f"{argument}={path}: no such file; give a .jsonl file of {argument}") from None
    except OSError as error:
        raise ValueError(f"{argument}: {error}") from error
    return Path(path)


def material_sources(config: EvaluateConfig) -> dict[str, str]:
    """The files of a configuration and their digests, as `Provenance.sources` has them."""
    named = {"cases": config.cases, "meetings": config.meetings}
    return {f"{name} {path}": digest(Path(path)) for name, path in named.items() if path is not None}
