"""Extend a loaded model in place, and restore it."""

import inspect
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple

from torch import nn

from longreach.ops.attention import IMPLEMENTATIONS
from longreach.pretrained.caches import growing_cache, sink_cache
from longreach.pretrained.families.baichuan import baichuan_layout, is_baichuan_base
from longreach.pretrained.families.bloom import bloom_layout, is_bloom_base
from longreach.pretrained.families.falcon import check_falcon, falcon_layout, is_falcon_base
from longreach.pretrained.families.gpt2 import check_gpt2, gpt2_layout, is_gpt2_base
from longreach.pretrained.families.jais import check_jais, is_jais_base, jais_layout
from longreach.pretrained.families.llama import check_llama, is_llama_base, llama_layout
from longreach.pretrained.families.mpt import check_mpt, is_mpt_base, mpt_layout
from longreach.pretrained.interpolation import Scaling
from longreach.pretrained.lengths import require_tokens
from longreach.pretrained.masks import hand_documents
from longreach.pretrained.state import ATTRIBUTE, Extension, Layout


class Family(NamedTuple):
    """What is known of the models of one model_type."""

    kind: Literal["own", "remote", "convertible"]
    """Whether transformers has their code, or it comes with their files, or they have ALiBi only once converted."""
    is_base: Callable[[nn.Module], bool]
    """Tells the base model."""
    layout: Callable[[nn.Module], Layout]
    """Finds its parts."""
    check: Callable[[Any], None] = lambda config: None
    """Raises ValueError where the configuration is of a model that cannot have ALiBi."""


FAMILIES = {
    "bloom": Family("own", is_bloom_base, bloom_layout),
    "mpt": Family("own", is_mpt_base, mpt_layout, check_mpt),
    "falcon": Family("own", is_falcon_base, falcon_layout, check_falcon),
    "btlm": Family("remote", is_jais_base, jais_layout, check_jais),
    "jais": Family("remote", is_jais_base, jais_layout, check_jais),
    "baichuan": Family("remote", is_baichuan_base, baichuan_layout),
    "gpt2": Family("convertible", is_gpt2_base, gpt2_layout, check_gpt2),
    "llama": Family("convertible", is_llama_base, llama_layout, check_llama),
    "mistral": Family("convertible", is_llama_base, llama_layout, check_llama),
    "qwen2": Family("convertible", is_llama_base, llama_layout, check_llama),
}
"""By the model_type of a configuration."""

CONVERTIBLE = tuple(name for name, family in FAMILIES.items() if family.kind == "convertible")
"""What `longreach.convert` takes; `extend` knows them once they are converted."""

OLDEST_TRANSFORMERS = (5, 4)
"""The first version of transformers that extended models are tested with."""

STOCK_CLASS = "_longreach_stock_class"
"""Name under which a swapped class holds the one whose place it takes."""


def extend(
    model: nn.Module,
    *,
    scaling: str | Scaling | None = None,
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
    number of tokens, less a row's padding. `generate` has one constant L', prompt and max_new_tokens together, likewise
    less a row's padding, for which cached decoding equals the full forward pass. Any other forward pass that continues
    a cache needs a stated L', by length or `fixed_length`, and raises without one. What is stated is the L' of every
    row, however much of it is padding.

    Args:
        model: BLOOM, MPT, Falcon with alibi, BTLM, JAIS or Baichuan-13B, as loaded by transformers; with any head,
            and also wrapped by PEFT or dispatched by accelerate.
        scaling: "none", "linear" (arXiv 2310.13017), "linear-fixed", "ntk", or a `Scaling`, which has its own
            train_length and factor; see `longreach.pretrained.interpolation`. When None, the `alibi_scaling` of the
            model's configuration, which any other takes the place of, and "none" where there is none.
        train_length: L, in tokens; what the model's configuration says when None.
        length: L' of every forward pass, in tokens, of which none may be longer where the scaling or logn heed L'.
        factor: L'/L of "linear-fixed", above 1.
        bias: "exact", or "faithful" to the stock code's rounding of the bias (BLOOM, MPT, Falcon), which makes a
            dense bias. Falcon's is that of attn_implementation="sdpa": its eager code adds the bias twice. BLOOM's
            keeps the stock GELU too, whose eight operations are otherwise one.
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
    extension = Extension(
        layout=layout,
        scaling=_chosen_scaling(layout, scaling, train_length, factor),
        logn=logn,
        bias=bias,
        per_step=per_step,
        length=length,
        sinks=sinks,
        window=window,
        tolerance=tolerance,
        impl=impl,
    )
    _check(extension)
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
    names = list(inspect.signature(type(layout.base).forward).parameters)[1:]  # without self; slow to find at each step
    hooks: list[tuple[nn.Module, Any]] = [(layout.base, partial(_prepare, layout.prepare, names))]
    hooks += [(module, hand_documents) for module in _around(model, layout.base)]
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
    """State the one L' of all forward passes of this thread within, for a decoding loop of one's own.

    A cache must be filled and used under one L'; `generate` takes this L' too, in place of its own.

    Args:
        model: an extended model.
        length: L' in tokens, of every row, however much of it is padding; no input, its cache and padding counted, may
            be longer.

    Raises:
        ValueError: the model is not extended, or length is not a positive integer.
    """
    require_tokens("length", length, 1)
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
        with_alibi = ", ".join(name for name in FAMILIES if name not in CONVERTIBLE)
        raise ValueError(
            f"model_type {told}: longreach can extend one of {with_alibi}; and after longreach.convert and fine-tuning "
            f"one of {', '.join(CONVERTIBLE)}"
        )
    family = FAMILIES[known[0]]
    bases: list[Any] = [module for module in model.modules() if family.is_base(module)]
    if len(bases) != 1:
        raise ValueError(
            f"{type(model).__name__} holds {len(bases)} base models of family {known[0]} as longreach knows it: "
            "give one, loaded with transformers' own code where there is any"
        )
    family.check(bases[0].config)
    return family.layout(bases[0])


def _require_transformers() -> None:
    import transformers

    if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < OLDEST_TRANSFORMERS:
        oldest = ".".join(str(part) for part in OLDEST_TRANSFORMERS)
        raise ValueError(f"transformers {transformers.__version__}: its masks differ, extend needs {oldest} or later")


def _chosen_scaling(
    layout: Layout, scaling: str | Scaling | None, train_length: int | None, factor: float | None
) -> Scaling:
    """The scaling that arguments of `extend` name; what they leave out is as the configuration says."""
    if isinstance(scaling, Scaling):
        if train_length is not None or factor is not None:
            raise ValueError(f"train_length or factor beside {scaling}: it has its own, give only one of them")
        return scaling
    if scaling is None:
        told = layout.scaling
        scaling, factor = told.name, told.factor if factor is None else factor
        train_length = told.train_length if train_length is None else train_length
    return Scaling(scaling, layout.train_length if train_length is None else train_length, factor)


def _check(extension: Extension) -> None:
    """Check the arguments of `extend` against each other and the model."""
    layout, scaling, impl = extension.layout, extension.scaling, extension.impl
    length, sinks, window, tolerance = extension.length, extension.sinks, extension.window, extension.tolerance
    if extension.logn and scaling.train_length is None:
        raise ValueError("train_length=None with logn=True: give the length trained on, in tokens")
    for name, value, least in (("length", length, 1), ("sinks", sinks, 0), ("window", window, 1)):
        if value is not None:
            require_tokens(name, value, least)
    if extension.per_step and (length is not None or not extension.depends_on_length):
        told = f"length={length}" if length is not None else f'scaling="{scaling.name}", which has no L\''
        raise ValueError(f"per_step=True with {told}: per_step takes L' from each step, give one of the two")
    if extension.bias not in ("exact", "faithful"):
        raise ValueError(f'bias={extension.bias!r}: give "exact" or "faithful"')
    if extension.bias == "faithful" and layout.faithful is None:
        raise ValueError(f'bias="faithful": how {layout.family} rounds is not known, use bias="exact"')
    if extension.bias == "faithful" and (impl not in ("auto", "sdpa", "reference") or sinks is not None):
        told = "sinks" if sinks is not None else f'impl="{impl}"'
        raise ValueError(f'bias="faithful" with {told}, which takes no dense bias: use bias="exact"')
    if (sinks is None) != (window is None):
        raise ValueError(f"sinks={sinks} and window={window}: give both, or neither")
    if sinks is not None and layout.keeps_tuples:
        raise ValueError(f"sinks={sinks}: {layout.family} caches in tuples, from which nothing drops: leave sinks out")
    if tolerance is not None and not 0.0 <= tolerance < 1.0:
        raise ValueError(f"tolerance={tolerance!r}: give at least 0 and below 1, or None for the default of the dtype")
    if impl not in ("auto", *IMPLEMENTATIONS):
        raise ValueError(f"impl={impl!r}: give one of {', '.join(('auto', *IMPLEMENTATIONS))}")


class Generates:
    """Methods of what an extended model generates with."""

    def generate(self, inputs: Any = None, generation_config: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As transformers' own, with one constant L' for the whole call, and the cache of sinks where wanted."""
        extension: Extension = getattr(self, ATTRIBUTE)
        if kwargs.get("past_key_values") is None:
            config: Any = generation_config or self.generation_config  # type: ignore[attr-defined]
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
        with extension.during():
            return super().generate(inputs, generation_config, *args, **kwargs)  # type: ignore[misc]

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


def _prepare(
    prepare: Callable[[Any, dict[str, Any]], dict[str, Any]],
    names: list[str],
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[()], dict[str, Any]]:
    """Forward pre-hook of a base model that gives its family's `prepare` all arguments by name."""
    return (), prepare(module, {**dict(zip(names, args, strict=False)), **kwargs})


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
