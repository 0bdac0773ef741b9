"""What processes that share each sequence have sent to each other."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Exchanged:
    """Bytes that all processes together sent, so that each has the keys and values that its queries need."""

    forward: tuple[tuple[int, ...], ...]
    """Keys and values, by layer and key head."""
    backward: tuple[tuple[int, ...], ...]
    """Their gradients on the way back, by layer and key head: zeros where none were asked for."""
    bound: int
    """The numbers that say which keys are needed."""
    all_gather: int
    """What an all-gather of keys and values sends, and a reduce-scatter of their gradients."""
    ring: int
    """What a ring sends, which for gradients sends keys and values around once more, and the gradients with them."""

    def __post_init__(self) -> None:
        for name, value in (
            ("forward", min((each for heads in self.forward for each in heads), default=0)),
            ("backward", min((each for heads in self.backward for each in heads), default=0)),
            ("bound", self.bound),
            ("all_gather", self.all_gather),
            ("ring", self.ring),
        ):
            if value < 0:
                raise ValueError(f"{name} must not be negative, got {value}: correct the value or run again")

    @property
    def total(self) -> int:
        """All bytes that were sent."""
        return sum(map(sum, (*self.forward, *self.backward))) + self.bound


def in_words(everything: Sequence[Exchanged]) -> str:
    """What all of it comes to, the rest of a sentence."""
    total, all_gather, ring = (
        sum(getattr(one, name) for one in everything) for name in ("total", "all_gather", "ring")
    )
    back = sum(map(sum, (heads for one in everything for heads in one.backward)))
    gradients = f" and {back / 2**20:,.2f} MiB of their gradients" if back else ""
    shares = ""
    if all_gather:
        collectives = "an all-gather and a reduce-scatter send" if back else "an all-gather sends"
        shares = f", {total / all_gather:.2%} of what {collectives} and {total / ring:.2%} of what a ring sends"
    return f"processes sent each other {(total - back) / 2**20:,.2f} MiB of keys and values{gradients}{shares}"
