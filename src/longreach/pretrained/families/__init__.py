"""The families of pretrained models, one file each: how their code is made exact. Here it is told which one a model is.

Each file finds a model's parts and slopes, and holds the methods that take the place of its own.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from torch import nn

from longreach.ops.arguments import validate_kind
from longreach.pretrained.families.baichuan import baichuan_layout, is_baichuan_base
from longreach.pretrained.families.bloom import bloom_layout
from longreach.pretrained.families.falcon import check_falcon, falcon_layout
from longreach.pretrained.families.gpt2 import check_gpt2, gpt2_layout
from longreach.pretrained.families.jais import check_jais, is_jais_base, jais_layout
from longreach.pretrained.families.llama import check_llama, llama_layout
from longreach.pretrained.families.mpt import check_mpt, mpt_layout
from longreach.pretrained.layout import Layout


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


def _stock(name: str) -> Callable[[nn.Module], bool]:
    """Tells the base model where it is a class of transformers, by its name."""

    def is_base(module: nn.Module) -> bool:
        import transformers

        return isinstance(module, getattr(transformers, name))

    return is_base


FAMILIES = {
    "bloom": Family("own", _stock("BloomModel"), bloom_layout),
    "mpt": Family("own", _stock("MptModel"), mpt_layout, check_mpt),
    "falcon": Family("own", _stock("FalconModel"), falcon_layout, check_falcon),
    "btlm": Family("remote", is_jais_base, jais_layout, check_jais),
    "jais": Family("remote", is_jais_base, jais_layout, check_jais),
    "baichuan": Family("remote", is_baichuan_base, baichuan_layout),
    "gpt2": Family("convertible", _stock("GPT2Model"), gpt2_layout, check_gpt2),
    "llama": Family("convertible", _stock("LlamaModel"), llama_layout, check_llama),
    "mistral": Family("convertible", _stock("MistralModel"), llama_layout, check_llama),
    "qwen2": Family("convertible", _stock("Qwen2Model"), llama_layout, check_llama),
}
"""By the model_type of a configuration."""

CONVERTIBLE = tuple(name for name, family in FAMILIES.items() if family.kind == "convertible")
"""What `longreach.convert` takes; `extend` knows them once they are converted."""

OLDEST_TRANSFORMERS = (5, 4)
"""The first version of transformers that extended models are tested with."""


def find_layout(model: nn.Module) -> Layout:
    """Find a pretrained model's family, its parts, slopes and training length, without touching it.

    Raises:
        ValueError: it is of no known family, has no ALiBi, or holds more than one base model; or transformers is older
            than OLDEST_TRANSFORMERS.
    """
    validate_kind("model", model, nn.Module, "a loaded model of transformers")
    _require_transformers()
    kinds = {getattr(getattr(module, "config", None), "model_type", None) for module in model.modules()}
    known = sorted(kind for kind in kinds if kind in FAMILIES)
    if len(known) != 1:
        found = ", ".join(sorted(str(kind) for kind in kinds - {None})) or "none"
        with_alibi = ", ".join(name for name in FAMILIES if name not in CONVERTIBLE)
        raise ValueError(
            f"model_type {found}: longreach can extend one of {with_alibi}; and after longreach.convert and "
            f"fine-tuning one of {', '.join(CONVERTIBLE)}"
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
