"""EleutherAI's lm-evaluation-harness with trained runs among its models: `python -m longreach.verbs.harness`.

All of the harness's command line works, and beside its models there is `longreach`:

    python -m longreach.verbs.harness --model longreach --tasks wikitext \\
        --model_args run=runs/demo/alibi-seed0,max_length=1024
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from longreach.process import set_up

if TYPE_CHECKING:
    from longreach.measure.subject import Subject


def open_subject(run: str, device: str | None = None) -> "Subject":
    """The run in a folder, as `--model_args run=FOLDER` names it, on its own device where none is given."""
    from longreach.verbs.train import open_run

    return open_run(Path(run), device)


def main() -> None:
    """Run the harness's own command line. Exits with 2 and one line on standard error for what the user can mend."""
    set_up()  # before what follows loads PyTorch
    try:
        from longreach.measure.lm_eval import leave_device_to_models, register

        register(open_subject)
        leave_device_to_models()
        from lm_eval.__main__ import cli_evaluate

        cli_evaluate()
    except (ImportError, OSError, ValueError) as error:
        print("longreach.verbs.harness:", *str(error).split(), file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
