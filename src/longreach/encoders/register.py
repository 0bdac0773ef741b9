"""Published ALiBi encoders for the Auto classes of transformers, and all that is built on them, until it is undone."""

from typing import Any

from longreach.encoders.config import is_alibi_encoder
from longreach.encoders.heads import EncoderForMaskedLM, EncoderForSequenceClassification
from longreach.encoders.model import EncoderModel, PublishedConfig

_stock: list[Any] = []
"""AutoConfig.from_pretrained as transformers has it, while it is not in its place."""


def register_encoders() -> None:
    """Have transformers load published ALiBi encoders as ours, in the whole process, until `unregister_encoders`.

    `AutoModel`, `AutoModelForMaskedLM`, `AutoModelForSequenceClassification`, and so `SentenceTransformer` and
    `CrossEncoder`, load JinaBERT v2, MosaicBERT and DNABERT-2 without the code that came with them, also where
    trust_remote_code=True. All other models, ordinary BERT among them, are loaded as before. Called again, it changes
    nothing.

    What it does: `AutoConfig.from_pretrained` first looks whether a configuration says ALiBi.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification

    if _stock:
        return
    for auto, kind in (
        (AutoModel, EncoderModel),
        (AutoModelForMaskedLM, EncoderForMaskedLM),
        (AutoModelForSequenceClassification, EncoderForSequenceClassification),
    ):
        auto.register(PublishedConfig, kind, exist_ok=True)  # of a class that is ours: no other model comes to it
    _stock.append(AutoConfig.__dict__["from_pretrained"])
    AutoConfig.from_pretrained = classmethod(_from_pretrained)  # type: ignore[assignment, method-assign]


def unregister_encoders() -> None:
    """Undo `register_encoders`: transformers loads every model as it did before. Models that are loaded stay ours."""
    from transformers import AutoConfig

    if _stock:
        AutoConfig.from_pretrained = _stock.pop()  # type: ignore[method-assign]


def _from_pretrained(auto: type[Any], name: Any, **options: Any) -> Any:
    """The configuration of an ALiBi encoder as ours; any other as the stock method has it."""
    from transformers import PretrainedConfig

    asked = {key: value for key, value in options.items() if key not in ("trust_remote_code", "code_revision")}
    try:
        values, _ = PretrainedConfig.get_config_dict(name, **asked)
    except (OSError, ValueError):  # which the stock method raises again, in its own words
        values = {}
    if is_alibi_encoder(values):
        return PublishedConfig.from_pretrained(name, **asked)
    return _stock[0].__get__(None, auto)(name, **options)
