"""EleutherAI's lm-evaluation-harness with trained runs among its models: `python -m longreach.verbs.harness`.

All of the harness's command line works, and beside its models there is `longreach`:

    python -m longreach.verbs.harness --model longreach --tasks wikitext \\
        --model_args run=runs/demo/alibi-seed0,max_length=1024
"""

from pathlib import Path

from longreach.measure.lm_eval import register
from longreach.measure.subject import Subject
from longreach.verbs.train import open_run


def open_subject(run: str, device: str | None = None) -> Subject:
    """The run in a folder, as `--model_args run=FOLDER,device=cpu` names it."""
    return open_run(Path(run), device)


def main() -> None:
    """Run the harness's own command line."""
    from lm_eval.__main__ import cli_evaluate

    register(open_subject)
    cli_evaluate()


if __name__ == "__main__":
    main()
