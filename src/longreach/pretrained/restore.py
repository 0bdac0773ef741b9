"""Modules made instances of other classes, and back: what `extend` does to a model and `restore` undoes."""

import types
from functools import lru_cache
from typing import Any

from torch import nn

from longreach.pretrained.attend import ATTRIBUTE, extension_of

STOCK_CLASS = "_longreach_stock_class"
"""Name under which a swapped class holds the one whose place it takes."""


def give_methods(module: nn.Module, methods: type) -> None:
    """Let a module run the methods of a class of ours before those of its own class, until `restore`."""
    stock: Any = type(module)
    _swap(module, _swapped_class(methods, stock))


def restore(model: nn.Module) -> nn.Module:
    """Undo `extend` in place, so that the model computes bit for bit what it did before.

    Args:
        model: a model that `extend` was given, or a part of it that holds what was extended.

    Returns:
        The model itself.

    Raises:
        ValueError: the model is not extended, or something made its modules instances of other classes since.
    """
    extension = extension_of(model)
    for module in extension.modules:
        if hasattr(type(module), STOCK_CLASS) and STOCK_CLASS not in vars(type(module)):
            raise ValueError(f"{type(module).__name__} was given another class since extend: undo that first")
    for handle in extension.handles:
        handle.remove()
    for module in extension.modules:
        del vars(module)[ATTRIBUTE]
        _swap(module, getattr(type(module), STOCK_CLASS, type(module)))
    return model


@lru_cache(maxsize=256)
def _swapped_class(methods: type, stock: Any) -> type:
    """The stock class with our methods before its own, under its own name: names of classes are saved with a model."""
    names = {"__module__": stock.__module__, "__qualname__": stock.__qualname__, "__doc__": stock.__doc__}
    return type(stock.__name__, (methods, stock), {**names, STOCK_CLASS: stock, "__reduce_ex__": _reduce})


def _reduce(module: nn.Module, protocol: Any) -> tuple[Any, ...]:
    """What pickle and copy keep of a swapped module: by the name of its class they would find the stock class."""
    made: Any = super(type(module), module).__reduce_ex__(protocol)  # (function, arguments, state, ...)
    return _new_module, type(module).__bases__, *made[2:]


def _new_module(methods: type, stock: Any) -> Any:
    """A swapped module that has nothing yet."""
    return object.__new__(_swapped_class(methods, stock))


def _swap(module: nn.Module, to: Any) -> None:
    """Make a module an instance of another class, also where accelerate keeps its forward bound to the present one."""
    module.__class__ = to
    for name in ("forward", "_old_forward"):
        bound = vars(module).get(name)
        if isinstance(bound, types.MethodType) and bound.__self__ is module:
            vars(module)[name] = types.MethodType(to.forward, module)
