"""Retrofitting: take the positions out of a pretrained model, put ALiBi in, and fine-tune what is left."""

from typing import Any

from torch import nn

from longreach.ops.arguments import validate_kind
from longreach.pretrained.attend import ATTRIBUTE
from longreach.pretrained.extend import extend
from longreach.pretrained.families import CONVERTIBLE
from longreach.pretrained.layout import MARK
from longreach.pretrained.restore import restore


def convert(model: nn.Module, **options: Any) -> nn.Module:
    """Take the learned or rotary positions of a pretrained model out and put ALiBi in, in place. `unconvert` undoes it.

    Its attention becomes softmax(scale q.k - m (i - j)) v with the slopes m of `alibi_slopes`, through
    `longreach.attention`, in prefill, in cached decoding and under left padding, at any length.

    **The model must be fine-tuned afterwards.** Its weights read positions that are gone, so that right after the
    conversion it is a far worse language model than before. It takes training on text like that of its pretraining to
    bring the loss back, some of which may stay lost. Where there is a choice, train with ALiBi from the start.

    Parameters keep their names and values, so that optimizers, PEFT and state dicts notice nothing. GPT-2's learned
    positions `wpe` stay there unused, with gradients of 0. The configuration is marked with `longreach_positions`,
    which `save_pretrained` writes along. Loaded again, a converted model is a stock one, whose outputs are wrong, until
    `convert` or `extend` has been called on it.

    Args:
        model: GPT-2, Llama, Mistral or Qwen2 as loaded by transformers, with any head, and also wrapped by PEFT.
        options: those of `longreach.extend`, which a converted model may also be given to later. Give train_length, the
            length fine-tuned at, with a scaling that needs it.

    Returns:
        The model itself.

    Raises:
        ValueError: another model, cross-attention, sliding windows, or a wrong option; the model is then
            untouched.
    """
    configs = _configs(model)
    if not configs:
        raise ValueError(f"{type(model).__name__} is none of {', '.join(CONVERTIBLE)}: longreach can convert those")
    unmarked = [config for config in configs if not hasattr(config, MARK)]
    for config in unmarked:
        setattr(config, MARK, "alibi")
    try:
        return extend(model, **options)
    except BaseException:
        _unmark(unmarked)
        raise


def unconvert(model: nn.Module) -> nn.Module:
    """Undo `convert` in place: with the same weights, the model computes bit for bit what it did before.

    Args:
        model: a model that `convert` was given, or a part of it that holds what was converted.

    Returns:
        The model itself.

    Raises:
        ValueError: the model is not converted, or something made its modules instances of other classes since.
    """
    marked = [config for config in _configs(model) if hasattr(config, MARK)]
    if not marked:
        raise ValueError(f"{type(model).__name__} is not converted: there is nothing to undo")
    if any(ATTRIBUTE in module.__dict__ for module in model.modules()):
        restore(model)
    _unmark(marked)
    return model


def _configs(model: nn.Module) -> list[Any]:
    """The configurations in a model that belong to families which can be converted."""
    validate_kind("model", model, nn.Module, "a loaded model of transformers")
    configs = {id(config): config for config in (getattr(module, "config", None) for module in model.modules())}
    return [config for config in configs.values() if getattr(config, "model_type", None) in CONVERTIBLE]


def _unmark(configs: list[Any]) -> None:
    for config in configs:
        delattr(config, MARK)
