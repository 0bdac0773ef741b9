"""What processes that share each sequence have sent to each other."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Exchanged:
    """Bytes that all processes together sent, so that each has the keys and values that its queries need."""

    sent: tuple[tuple[int, ...], ...]
    """Keys and values, by layer and key head. A backward pass sends back as many bytes of gradients as its forward pass
    sent, which are not counted."""
    bound: int
    """The numbers that say which keys are needed."""
    all_gather: int
    """Keys and values that an all-gather has all processes send, and a ring too."""

    def __post_init__(self) -> None:
        for name, value in (
            ("sent", min((each for heads in self.sent for each in heads), default=0)),
            ("bound", self.bound),
            ("all_gather", self.all_gather),
        ):
            if value < 0:
                raise ValueError(f"{name} must not be negative, got {value}: correct the value or run again")

    @property
    def total(self) -> int:
        """All bytes that were sent."""
        return sum(map(sum, self.sent)) + self.bound


def in_words(everything: Sequence[Exchanged]) -> str:
    """What all of it comes to, the rest of a sentence."""
    total, all_gather = sum(one.total for one in everything), sum(one.all_gather for one in everything)
    share = f", {total / all_gather:.2%} of what an all-gather or a ring sends" if all_gather else ""
    return f"processes sent each other {total / 2**20:,.2f} MiB of keys and values{share}"
