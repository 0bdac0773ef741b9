"""A rule of vmap for operators of torch.library that take values apart, as one call for each of the mapped slices."""

from typing import Any

import torch


def by_slices(operator: Any) -> None:
    """Let an operator whose outputs are all tensors be mapped over any of its tensors."""

    def mapped(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        calls = [
            operator(*(x if axis is None else x.select(axis, n) for x, axis in zip(arguments, in_dims, strict=True)))
            for n in range(info.batch_size)
        ]
        stacked = tuple(torch.stack(outputs) for outputs in zip(*calls, strict=True))
        return stacked, (0,) * len(stacked)

    operator.register_vmap(mapped)
