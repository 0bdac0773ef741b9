"""Modules made instances of other classes, and back: what `extend` does to a model and `restore` undoes."""

import functools
import inspect
import types
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from torch import nn

from longreach.pretrained.attend import ATTRIBUTE, extension_of

STOCK_CLASS = "_longreach_stock_class"
"""Name under which a swapped class holds the one whose place it takes."""


def give_methods(module: nn.Module, *methods: type) -> None:
    """Let a module run the methods of classes of ours, first to last, before those of its own, until `restore`."""
    stock: Any = type(module)
    new = tuple(
        kind for kind in methods if not issubclass(stock, kind)
    )  # a user's subclass of a swapped class has them
    if new:
        _swap(module, _swapped_class(new, stock))


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
    for module, stock in extension.modules.items():
        if vars(type(module)).get(STOCK_CLASS, type(module)) is not stock:
            raise ValueError(f"{type(module).__name__} was given another class since extend: undo that first")
    for handle in extension.handles:
        handle.remove()
    for module, stock in extension.modules.items():
        del vars(module)[ATTRIBUTE]
        _swap(module, stock)
    return model


@lru_cache(maxsize=256)
def _swapped_class(methods: tuple[Any, ...], stock: Any) -> type:
    """The stock class with our methods before its own, under its own name: names of classes are saved with a model.

    Whoever calls it, as in `type(model)(config)`, gets an instance of the stock class. One of a subclass of it has our
    methods, which do as the stock class does until it is extended.
    """

    @functools.wraps(stock.__init__)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        if type(self) is swapped:
            self.__class__ = stock
            stock.__init__(self, *args, **kwargs)
        else:
            super(methods[-1], self).__init__(*args, **kwargs)

    names = {"__module__": stock.__module__, "__qualname__": stock.__qualname__, "__doc__": stock.__doc__}
    found = dict(pair for kind in reversed(methods) for pair in inspect.getmembers(kind, inspect.isfunction))
    ours = {name: _where_extended(methods[-1], method) for name, method in found.items()}
    more = {STOCK_CLASS: stock, "__init__": init, "__reduce_ex__": _reduce}
    swapped = type(stock.__name__, (*methods, stock), {**names, **ours, **more})
    return swapped


def _where_extended(last: Any, method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of ours for what is extended, and for what is not that of the class after the last of ours."""

    @functools.wraps(method)
    def chosen(self: Any, *args: Any, **kwargs: Any) -> Any:
        if ATTRIBUTE in self.__dict__:
            return method(self, *args, **kwargs)
        return getattr(super(last, self), method.__name__)(*args, **kwargs)

    return chosen


def _reduce(module: nn.Module, protocol: Any) -> tuple[Any, ...]:
    """What pickle and copy keep of a swapped module: by the name of its class they would find the stock class."""
    kind: Any = type(module)
    made: Any = object.__reduce_ex__(module, protocol)  # (function, arguments, state, ...)
    return (_new_module, (kind.__bases__,), *made[2:]) if STOCK_CLASS in vars(kind) else made


def _new_module(bases: tuple[Any, ...]) -> Any:
    """A swapped module that has nothing yet."""
    return object.__new__(_swapped_class(bases[:-1], bases[-1]))


def _swap(module: nn.Module, to: Any) -> None:
    """Make a module an instance of another class, also where accelerate keeps its forward bound to the present one."""
    module.__class__ = to
    for name in ("forward", "_old_forward"):
        bound = vars(module).get(name)
        if isinstance(bound, types.MethodType) and bound.__self__ is module:
            vars(module)[name] = types.MethodType(to.forward, module)
