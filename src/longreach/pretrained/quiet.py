"""Transformers without its bars, its warnings and its reports: what there is to say, longreach says in one line."""

from collections.abc import Iterator
from contextlib import contextmanager

from longreach.foreign import in_silence


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers and what it calls off standard error while it loads, saves or tries out a model."""
    from transformers.utils import logging

    had_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with in_silence("transformers", "huggingface_hub", "torch"):
            yield
    finally:
        if had_bars:
            logging.enable_progress_bar()
