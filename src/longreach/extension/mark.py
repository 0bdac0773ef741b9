"""What the configuration of a converted model says, and a saved one's config.json with it."""

from typing import Any

MARK = "longreach_positions"
"""Name of the field that says which positions a model's weights are for; models that were never converted lack it."""


def require_mark(config: Any, positions: str) -> None:
    """Check that a model was converted to ALiBi.

    Args:
        config: its configuration.
        positions: what its architecture has instead, in words.

    Raises:
        ValueError: it was not.
    """
    if getattr(config, MARK, None) != "alibi":
        raise ValueError(
            f'this {config.model_type} has {positions} and no ALiBi: longreach.convert(model, "alibi") puts it in, '
            "and fine-tuning must follow"
        )
