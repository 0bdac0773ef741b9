"""How published encoders lay their weights out: one file each, its layer a module with the published names."""

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from longreach.encoders.config import LAYOUT
from longreach.encoders.layouts.jina import JinaLayer
from longreach.encoders.layouts.jina_code import JinaCodeLayer
from longreach.encoders.layouts.mosaic import MosaicLayer
from longreach.encoders.layouts.original import OriginalLayer

LAYERS: dict[str, type[nn.Module]] = {
    "jina": JinaLayer,
    "jina-code": JinaCodeLayer,
    "original": OriginalLayer,
    "mosaic": MosaicLayer,
}
"""Name of a layout -> its layer."""

SIGNS = {
    "jina-code": "mlp.up_gated_layer.weight",
    "mosaic": "attention.self.Wqkv.weight",
    "original": "intermediate.dense.weight",
    "jina": "mlp.gated_layers.weight",
}
"""Name of a layout -> a weight of its layers that tells it from those below it."""


def layout_of(values: Mapping[str, Any], keys: Collection[str], name: str) -> str:
    """The layout of an encoder by the names of its weights, without prefix; its configuration must not say another."""
    found = next((layout for layout, sign in SIGNS.items() if f"encoder.layer.0.{sign}" in keys), None)
    if found is None or f"encoder.layer.0.attention.self.{'Wqkv' if found == 'mosaic' else 'query'}.weight" not in keys:
        raise ValueError(
            f"model {name!r} has weights of no known layout: encoder.layer.0 has none of {', '.join(SIGNS.values())} "
            "beside its attention; give JinaBERT v2, MosaicBERT, DNABERT-2 or one trained from them"
        )
    said = layout_said(values)
    if found != said and (said, found) != ("jina", "jina-code"):
        raise ValueError(
            f"model {name!r}: config.json says layout {said}, its weights are laid out as {found}: mend it"
        )
    return found


def layout_said(values: Mapping[str, Any]) -> str:
    """The layout that a configuration says: ours outright; others leave jina-code, which says jina, to the weights."""
    if LAYOUT in values:
        return str(values[LAYOUT])
    if values.get("position_embedding_type") != "alibi":
        return "mosaic"
    return "original" if values.get("feed_forward_type") == "original" else "jina"
