"""Extend a loaded model in place."""

import inspect
from collections import ChainMap
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import nn

from longreach.ops.arguments import validate_choice, validate_flags, validate_kind, validated_tolerance
from longreach.ops.attention import IMPLEMENTATIONS
from longreach.positions.scaling import Scaling, parse_scaling, require_tokens
from longreach.pretrained.attend import ATTRIBUTE, Computed, Extension, Stated, find_extension
from longreach.pretrained.families import find_layout
from longreach.pretrained.layout import Layout
from longreach.pretrained.masks import hand_documents
from longreach.pretrained.recomputed import RemembersLength
from longreach.pretrained.restore import give_methods, restore


def extend(
    model: nn.Module,
    *,
    scaling: str | Scaling | None = None,
    train_length: int | None = None,
    length: int | None = None,
    per_step: bool = False,
    sinks: int | None = None,
    window: int | None = None,
    tolerance: float | None = None,
    impl: str = "auto",
) -> nn.Module:
    """Make a pretrained ALiBi model exact, fast and longer, in place. `restore` undoes it.

    The attention modules run `longreach.attention`, with slopes in float32 and relative distances, without a mask of
    T x T and without a limit on length. Parameters and the state dict stay as they are. A model that is extended
    already is extended anew. Any error leaves the model untouched.

    L' is the length that a scaling compares with train_length. A forward pass without a cache has its own
    number of tokens, less a row's padding. `generate` has one constant L', prompt and max_new_tokens together, likewise
    less a row's padding, for which cached decoding equals the full forward pass. Any other forward pass that continues
    a cache needs a stated L', by length or `fixed_length`, and raises without one. What is stated is the L' of every
    row, however much of it is padding.

    Args:
        model: BLOOM, MPT, Falcon with alibi, BTLM, JAIS or Baichuan-13B, as loaded by transformers; with any head,
            and also wrapped by PEFT or dispatched by accelerate.
        scaling: "none", "linear" (arXiv 2310.13017), "linear-fixed=4", "ntk", "ntk-fixed=4", "+logn" after any of
            them, or a `Scaling`, which has its own train_length; see `longreach.positions.scaling`. When None, the
            `alibi_scaling` of the model's configuration, which any other takes the place of, and "none" where there is
            none.
        train_length: L, in tokens; what the model's configuration says when None.
        length: L' of every forward pass, in tokens, of which none may be longer where the scaling heeds L'.
        per_step: take L' from the keys so far at each step of cached decoding, as the paper has it. Earlier keys and
            values then belong to earlier slopes, so that decoding differs from the full forward pass.
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
        scaling=_chosen_scaling(layout, scaling, train_length),
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
    from transformers import GenerationMixin

    swaps = list(layout.swaps)
    swaps += [(module, Generates) for module in model.modules() if isinstance(module, GenerationMixin)]
    if extension.scaling.depends_on_length:
        lists = (part for part in layout.base.children() if isinstance(part, nn.ModuleList))
        swaps += [(block, RemembersLength) for blocks in lists for block in blocks]
    given: dict[nn.Module, tuple[type, ...]] = {layout.base: ()}
    for module, methods in swaps:
        given[module] = (methods, *given.get(module, ()))
    extension.modules = {module: type(module) for module in given}
    for module, classes in given.items():
        give_methods(module, *classes)
    for module in extension.modules:
        vars(module)[ATTRIBUTE] = extension
    names = list(inspect.signature(type(layout.base).forward).parameters)[1:]  # without self; slow to find at each step
    hooks: list[tuple[nn.Module, Any]] = [(layout.base, partial(_prepare, layout.prepare, names))]
    hooks += [(module, hand_documents) for module in _around(model, layout.base)]
    extension.handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in hooks]
    return model


def _chosen_scaling(layout: Layout, scaling: str | Scaling | None, train_length: int | None) -> Scaling:
    """The scaling that arguments of `extend` name; what they leave out is as the configuration says."""
    if isinstance(scaling, Scaling):
        if train_length is not None:
            raise ValueError(f"train_length={train_length} beside {scaling!r}: it has its own, give only one")
        return scaling
    if scaling is not None:
        validate_kind("scaling", scaling, str, 'a name such as "linear", a longreach.Scaling or None')
        return parse_scaling(scaling, layout.train_length if train_length is None else train_length)
    declared = layout.scaling
    known = declared.train_length or layout.train_length
    return replace(declared, train_length=known if train_length is None else train_length)


def _check(extension: Extension) -> None:
    """Check the arguments of `extend` against each other and the model."""
    layout, impl, tolerance = extension.layout, extension.impl, extension.tolerance
    extension.scaling.require_slopes()
    length, sinks, window = extension.length, extension.sinks, extension.window
    for name, value, least in (("length", length, 1), ("sinks", sinks, 0), ("window", window, 1)):
        if value is not None:
            require_tokens(name, value, least)
    validate_flags(per_step=extension.per_step)
    if extension.per_step and (length is not None or not extension.scaling.depends_on_length):
        asked = f"length={length}" if length is not None else f'scaling="{extension.scaling}", which has no L\''
        raise ValueError(f"per_step=True with {asked}: per_step takes L' from each step, give one of the two")
    if (sinks is None) != (window is None):
        raise ValueError(f"sinks={sinks} and window={window}: give both, or neither")
    if sinks is not None and layout.keeps_tuples:
        raise ValueError(f"sinks={sinks}: {layout.family} caches in tuples, from which nothing drops: leave sinks out")
    validated_tolerance(tolerance)
    validate_choice("impl", impl, ("auto", *IMPLEMENTATIONS))


class Generates:
    """Methods of what an extended model generates with."""

    def generate(self, inputs: Any = None, generation_config: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As transformers' own, with one constant L' for the whole call, and the cache of sinks where wanted."""
        from longreach.pretrained.caches import SinkCache, growing_cache

        extension: Extension = getattr(self, ATTRIBUTE)
        config: Any = generation_config or self.generation_config  # type: ignore[attr-defined]
        stated, cache = extension.stated, kwargs.get("past_key_values")
        if cache is None:
            settings = (kwargs, vars(config), vars(self.generation_config))  # type: ignore[attr-defined]
            asked = ChainMap(*({name: x for name, x in given.items() if x is not None} for given in settings))
            implementation = asked.get("cache_implementation")
            if extension.sinks is not None and extension.window is not None:
                if kwargs.get("use_cache") is False:
                    raise ValueError("use_cache=False with sinks, which are kept in a cache: extend without sinks")
                if implementation is not None:
                    raise ValueError(f"cache_implementation={implementation!r} with sinks: leave one of the two out")
                kwargs["past_key_values"] = SinkCache(extension.sinks, extension.window)
                kwargs["use_cache"] = True  # MPT's configurations say False
            elif asked.get("use_cache", True) and implementation is None and not extension.layout.keeps_tuples:
                kwargs["past_key_values"] = growing_cache()
        elif stated is None and _drafts(config) and hasattr(cache, ATTRIBUTE):
            known: Computed = getattr(cache, ATTRIBUTE)  # a stock model asks for the next candidates
            stated = Stated(known.length, from_input=known.by_row is not False)
        draft = find_extension(kwargs.get("assistant_model"))
        with extension.during(stated), nullcontext() if draft is None else draft.during(draft.stated):
            return super().generate(inputs, generation_config, *args, **kwargs)  # type: ignore[misc]

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: it packs requests, whose keys lie anywhere in a cache, by masks that are no more causal."""
        raise ValueError("continuous batching knows no ALiBi: use generate, which takes prompts of several lengths")

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers' own; another extended model that is asked for candidates has the L' of this call."""
        draft = find_extension(kwargs.get("assistant_model"))
        if draft is not None:
            draft.follow(getattr(self, ATTRIBUTE))
        return super()._get_candidate_generator(*args, **kwargs)  # type: ignore[misc]

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
            extension.state(length, draft=_drafts(config))
        return config

    def create_masks_for_generate(self, *, attention_mask: Any, past_key_values: Any, **kwargs: Any) -> Any:
        """The mask of two axes, where transformers would make one of four for a static cache.

        It covers the cache's whole buffer, so that steps of a compiled model are alike; what is not yet written is no
        padding, of which a row's L' is less, but hidden by the order of tokens.
        """
        if attention_mask is None or attention_mask.dim() != 2:
            return attention_mask
        return F.pad(attention_mask, (0, past_key_values.layers[0].max_cache_len - attention_mask.shape[1]), value=1)


def _prepare(
    prepare: Callable[[Any, dict[str, Any]], dict[str, Any]],
    names: list[str],
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[()], dict[str, Any]]:
    """Forward pre-hook of a base model that gives its family's `prepare` all arguments by name."""
    return (), prepare(module, {**dict(zip(names, args, strict=False)), **kwargs})


def _drafts(config: Any) -> bool:
    """Whether a call to `generate` is for candidates, with its configuration."""
    return bool(getattr(config, "is_assistant", False))


def _around(model: nn.Module, base: nn.Module) -> list[nn.Module]:
    """All modules of the model that contain the base model."""
    return [module for module in model.modules() if module is not base and any(m is base for m in module.modules())]
