"""EleutherAI's lm-evaluation-harness with trained runs among its models: `python -m longreach.verbs.harness`.

All of the harness's command line works, and beside its models there is `longreach`:

    python -m longreach.verbs.harness --model longreach --tasks wikitext \\
        --model_args run=runs/demo/alibi-seed0,max_length=1024
"""

from pathlib import Path
from typing import TYPE_CHECKING

from longreach.process import set_up

if TYPE_CHECKING:
    from longreach.measure.subject import Subject


def open_subject(run: str, device: str | None = None) -> "Subject":
    """The run in a folder, as `--model_args run=FOLDER,device=cpu` names it."""
    from longreach.verbs.train import open_run

    return open_run(Path(run), device)


def main() -> None:
    """Run the harness's own command line."""
    set_up()  # before what follows loads PyTorch
    from longreach.measure.lm_eval import register

    register(open_subject)
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
