"""Extend a loaded model in place, and restore it."""

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from torch import nn

from longreach.ops.attention import IMPLEMENTATIONS

from .baichuan import baichuan_layout, is_baichuan_base
from .bloom import bloom_layout, is_bloom_base
from .cache import growing_cache, sink_cache
from .falcon import falcon_layout, is_falcon_base
from .gpt2 import gpt2_layout, is_gpt2_base
from .interpolation import Scaling
from .jais import is_jais_base, jais_layout
from .llama import is_llama_base, llama_layout
from .mask import hand_documents
from .mpt import is_mpt_base, mpt_layout
from .state import ATTRIBUTE, Extension, Layout

FAMILIES: dict[str, tuple[Callable[[nn.Module], bool], Callable[[nn.Module], Layout]]] = {
    "bloom": (is_bloom_base, bloom_layout),
    "mpt": (is_mpt_base, mpt_layout),
    "falcon": (is_falcon_base, falcon_layout),
    "btlm": (is_jais_base, jais_layout),
    "jais": (is_jais_base, jais_layout),
    "baichuan": (is_baichuan_base, baichuan_layout),
    # Once they are converted:
    "gpt2": (is_gpt2_base, gpt2_layout),
    "llama": (is_llama_base, llama_layout),
    "mistral": (is_llama_base, llama_layout),
    "qwen2": (is_llama_base, llama_layout),
}
"""The model_type of a configuration -> what tells the base model, and what finds its parts."""

OLDEST_TRANSFORMERS = (5, 4)
"""The first version of transformers that extended models are tested with."""

STOCK_CLASS = "_longreach_stock_class"
"""Name under which a swapped class holds the one whose place it takes."""


def extend(
    model: nn.Module,
    *,
    scaling: str | Scaling = "linear",
    train_length: int | None = None,
    length: int | None = None,
    factor: float | None = None,
    bias: str = "exact",
    per_step: bool = False,
    logn: bool = False,
    sinks: int | None = None,
    window: int | None = None,
    tolerance: float | None = None,
    impl: str = "auto",
) -> nn.Module:
    """Make a pretrained ALiBi model exact, fast and longer, in place. `restore` undoes it.

    The attention modules run `longreach.attention`, with slopes in float32 and relative distances, without a mask of
    T x T and without a limit on length. Parameters and the state dict stay as they are. A model that is extended
    already is extended anew. Any error leaves the model untouched.

    L' is the length that a scaling, and logn, compare with train_length. A forward pass without a cache has its own
    number of tokens, less a row's padding. `generate` has one constant L', prompt and max_new_tokens together, for
    which cached decoding equals the full forward pass. Any other forward pass that continues a cache needs a stated
    L', by length or `fixed_length`, and raises without one.

    Args:
        model: BLOOM, MPT, Falcon with alibi, BTLM, JAIS or Baichuan-13B, as loaded by transformers; with any head,
            and also wrapped by PEFT or dispatched by accelerate.
        scaling: "none", "linear" (arXiv 2310.13017), "linear-fixed", "ntk", or a `Scaling`, which has its own
            train_length and factor; see `longreach.extension.interpolation`.
        train_length: L, in tokens; what the model's configuration says when None.
        length: L' of every forward pass, in tokens, of which none may be longer.
        factor: L'/L of "linear-fixed", above 1.
        bias: "exact", or "faithful" to the stock code's rounding of the bias (BLOOM, MPT, Falcon), which makes a
            dense bias. Falcon's is that of attn_implementation="sdpa": its eager code adds the bias twice.
        per_step: take L' from the keys so far at each step of cached decoding, as the paper has it. Earlier keys and
            values then belong to earlier slopes, so that decoding differs from the full forward pass.
        logn: multiply the logits q . k with log L' / log L when L' > L; the bias is left to the scaling.
        sinks: with window, generate with a cache of the first `sinks` tokens and the last `window` alone
            (StreamingLLM), distances counted inside the cache.
        window: how many of the last tokens each token sees, itself included.
        tolerance: as in `longreach.attention`.
        impl: likewise.

    Returns:
        The model itself.

    Raises:
        ValueError: the model is of no known family or has no ALiBi, train_length is missing, or an argument is wrong
            or contradicts another.
    """
    layout = find_layout(model)
    extension = _resolved(
        layout, scaling, train_length, length, factor, bias, per_step, logn, sinks, window, tolerance, impl
    )
    if ATTRIBUTE in vars(layout.base):
        restore(layout.base)
    swaps = list(layout.swaps)
    swaps += [(module, Generates) for module in model.modules() if _generates(module)]
    for module, methods in swaps:
        stock: Any = type(module)
        _swap(module, _swapped_class(methods, stock))
    extension.modules = list(dict.fromkeys([layout.base, *(module for module, _ in swaps)]))
    for module in extension.modules:
        vars(module)[ATTRIBUTE] = extension
    hooks = [(layout.base, layout.prepare), *((module, hand_documents) for module in _around(model, layout.base))]
    extension.handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in hooks]
    return model


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


@contextmanager
def fixed_length(model: nn.Module, length: int) -> Iterator[None]:
    """State the one L' of all forward passes within, for a decoding loop of one's own.

    A cache must be filled and used under one L'; `generate` takes this L' too, in place of its own.

    Args:
        model: an extended model.
        length: L' in tokens, padding included; no input, its cache counted, may be longer.

    Raises:
        ValueError: the model is not extended, or length is not a positive integer.
    """
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise ValueError(f"length={length!r}: give a positive integer, in tokens")
    with extension_of(model).during(length):
        yield


def extension_of(model: nn.Module) -> Extension:
    """How a model is extended.

    Raises:
        ValueError: it is not.
    """
    for module in model.modules():
        if ATTRIBUTE in vars(module):
            extension: Extension = vars(module)[ATTRIBUTE]
            return extension
    raise ValueError(f"{type(model).__name__} is not extended: call longreach.extend(model) first")


def find_layout(model: nn.Module) -> Layout:
    """Find a pretrained model's family, its parts, slopes and training length, without touching it.

    Args:
        model: as `extend` takes it.

    Raises:
        ValueError: it is of no known family, has no ALiBi, or holds more than one base model; or transformers is older
            than OLDEST_TRANSFORMERS.
    """
    _require_transformers()
    kinds = {getattr(getattr(module, "config", None), "model_type", None) for module in model.modules()}
    known = sorted(kind for kind in kinds if kind in FAMILIES)
    if len(known) != 1:
        told = ", ".join(sorted(str(kind) for kind in kinds - {None})) or "none"
        raise ValueError(f"model_type {told}: longreach can extend one of {', '.join(FAMILIES)}")
    is_base, layout = FAMILIES[known[0]]
    bases = [module for module in model.modules() if is_base(module)]
    if len(bases) != 1:
        raise ValueError(
            f"{type(model).__name__} holds {len(bases)} base models of family {known[0]} as longreach knows it: "
            "give one, loaded with transformers' own code where there is any"
        )
    return layout(bases[0])


def _require_transformers() -> None:
    import transformers

    if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < OLDEST_TRANSFORMERS:
        oldest = ".".join(str(part) for part in OLDEST_TRANSFORMERS)
        raise ValueError(f"transformers {transformers.__version__}: its masks differ, extend needs {oldest} or later")


def _resolved(
    layout: Layout,
    scaling: str | Scaling,
    train_length: int | None,
    length: int | None,
    factor: float | None,
    bias: str,
    per_step: bool,
    logn: bool,
    sinks: int | None,
    window: int | None,
    tolerance: float | None,
    impl: str,
) -> Extension:
    """The arguments of `extend`, checked against each other and the model."""
    if isinstance(scaling, Scaling):
        if train_length is not None or factor is not None:
            raise ValueError(f"train_length or factor beside {scaling}: it has its own, give only one of them")
    else:
        scaling = Scaling(scaling, train_length if train_length is not None else layout.train_length, factor)
    if logn and scaling.train_length is None:
        raise ValueError("train_length=None with logn=True: give the length trained on, in tokens")
    if length is not None and (isinstance(length, bool) or not isinstance(length, int) or length < 1):
        raise ValueError(f"length={length!r}: give a positive integer, in tokens, or None")
    if per_step and (length is not None or not (scaling.depends_on_length or logn)):
        told = f"length={length}" if length is not None else f'scaling="{scaling.name}", which has no L\''
        raise ValueError(f"per_step=True with {told}: per_step takes L' from each step, give one of the two")
    if bias not in ("exact", "faithful"):
        raise ValueError(f'bias={bias!r}: give "exact" or "faithful"')
    if bias == "faithful" and layout.faithful is None:
        raise ValueError(f'bias="faithful": how {layout.family} rounds is not known, use bias="exact"')
    if bias == "faithful" and (impl not in ("auto", "sdpa", "reference") or sinks is not None):
        told = "sinks" if sinks is not None else f'impl="{impl}"'
        raise ValueError(f'bias="faithful" with {told}, which takes no dense bias: use bias="exact"')
    if (sinks is None) != (window is None):
        raise ValueError(f"sinks={sinks} and window={window}: give both, or neither")
    if sinks is not None and layout.keeps_tuples:
        raise ValueError(f"sinks={sinks}: {layout.family} caches in tuples, from which nothing drops: leave sinks out")
    for name, value, least in (("sinks", sinks, 0), ("window", window, 1)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise ValueError(f"{name}={value!r}: give an integer of at least {least}")
    if tolerance is not None and not 0.0 <= tolerance < 1.0:
        raise ValueError(f"tolerance={tolerance!r}: give at least 0 and below 1, or None for the default of the dtype")
    if impl not in ("auto", *IMPLEMENTATIONS):
        raise ValueError(f"impl={impl!r}: give one of {', '.join(('auto', *IMPLEMENTATIONS))}")
    return Extension(layout, scaling, logn, bias, per_step, length, sinks, window, tolerance, impl)


class Generates:
    """Methods of what an extended model generates with."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers' own, with one constant L' for the whole call, and the cache of sinks where wanted."""
        extension: Extension = getattr(self, ATTRIBUTE)
        if kwargs.get("past_key_values") is None:
            config: Any = kwargs.get("generation_config") or self.generation_config  # type: ignore[attr-defined]
            if extension.sinks is not None and extension.window is not None:
                if kwargs.get("use_cache") is False:
                    raise ValueError("use_cache=False with sinks, which are kept in a cache: extend without sinks")
                kwargs["past_key_values"] = sink_cache(extension.sinks, extension.window)
                kwargs["use_cache"] = True  # MPT's configurations say False
            elif (
                kwargs.get("use_cache", config.use_cache)
                and not _names_a_cache(config, kwargs)
                and not extension.layout.keeps_tuples
            ):
                kwargs["past_key_values"] = growing_cache()
        with extension.during(extension.stated):
            return super().generate(*args, **kwargs)  # type: ignore[misc]

    def _supports_default_dynamic_cache(self) -> bool:
        """Whether transformers is to begin with an empty Cache; where not, remote code begins with its own tuples."""
        extension: Extension = getattr(self, ATTRIBUTE)
        return not extension.layout.keeps_tuples and super()._supports_default_dynamic_cache()  # type: ignore[misc]

    def _prepare_generated_length(self, *args: Any, **kwargs: Any) -> Any:
        """Where transformers has made out how long its output may become."""
        config = super()._prepare_generated_length(*args, **kwargs)  # type: ignore[misc]
        length = config.max_length
        prompt = kwargs["inputs_tensor"].shape[1]
        if kwargs["model_input_name"] == "inputs_embeds" and kwargs["input_ids_length"] != prompt:
            length += prompt  # max_length counts none of these
        extension: Extension = getattr(self, ATTRIBUTE)
        if extension.sinks is not None and extension.window is not None:
            length = min(length, extension.sinks + extension.window)
        if not extension.per_step:
            extension.state(length)
        return config

    def create_masks_for_generate(self, *, attention_mask: Any, **kwargs: Any) -> Any:
        """The mask as it is, where transformers would make one of four axes for a static cache."""
        return attention_mask


def _names_a_cache(config: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a call to `generate` asks for a kind of cache by name."""
    return (kwargs.get("cache_implementation") or config.cache_implementation) is not None


def _generates(module: nn.Module) -> bool:
    from transformers import GenerationMixin

    return isinstance(module, GenerationMixin)


def _around(model: nn.Module, base: nn.Module) -> list[nn.Module]:
    """All modules of the model that contain the base model."""
    return [module for module in model.modules() if module is not base and any(m is base for m in module.modules())]


@lru_cache(maxsize=256)
def _swapped_class(methods: type, stock: Any) -> type:
    """The stock class with our methods before its own, under its own name: names of classes are saved with a model."""
    names = {"__module__": stock.__module__, "__qualname__": stock.__qualname__, "__doc__": stock.__doc__}
    return type(stock.__name__, (methods, stock), {**names, STOCK_CLASS: stock})


def _swap(module: nn.Module, to: Any) -> None:
    """Make a module an instance of another class, also where accelerate keeps its forward bound to the present one."""
    module.__class__ = to
    for name in ("forward", "_old_forward"):
        bound = vars(module).get(name)
        if isinstance(bound, types.MethodType) and bound.__self__ is module:
            vars(module)[name] = types.MethodType(to.forward, module)
