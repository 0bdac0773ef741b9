"""Pretrained models past their training length, with and without interpolated positions: `extend`."""

from dataclasses import dataclass

from longreach.verbs.evaluate import EvaluationConfig


@dataclass(frozen=True)
class ExtendConfig(EvaluationConfig):
    """An evaluation of each model under several scalings of its positions, one after another."""

    scalings: tuple[str, ...] = ("none", "linear", "ntk")
    """How slopes, or rotary positions, are scaled past L, one after another: none (as the model's configuration says),
    linear, ntk, linear-fixed=FACTOR or ntk-fixed=FACTOR, of rotary positions yarn and yarn-fixed=FACTOR too, and +logn
    after any of them; stock is the model's own code."""
