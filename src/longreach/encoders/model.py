"""The encoder: embeddings, layers of one layout, and the pooler where its files have one."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import BertConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import can_return_tuple

from longreach.encoders.config import EncoderConfig, read_config
from longreach.encoders.encode import Progress, encode
from longreach.encoders.layouts import LAYERS, layout_said
from longreach.encoders.layouts.blocks import layer_norm
from longreach.encoders.loading import HEADS, build
from longreach.encoders.packing import Arrangement, Dense, Heads, Packed
from longreach.encoders.source import Source
from longreach.encoders.texts import Texts, copy_text_files
from longreach.foreign import refusing
from longreach.models.files import drop_stale_weights
from longreach.models.vocabulary import looked_up
from longreach.ops.arguments import shown, validate_path, validate_types

HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
"""Options of `from_pretrained` that say how the hub is asked."""

NOT_NEEDED = (
    "trust_remote_code",
    "_from_auto",
    "attn_implementation",
    "low_cpu_mem_usage",
    "use_safetensors",
    "weights_only",
)
"""Options that callers pass, and that nothing depends on here: no code is run that came with a model, and of its files
tensors alone are read, safetensors first."""


class PublishedConfig(BertConfig):
    """A published configuration as it is, but for what only the code understands that came with it."""

    def __init__(self, **values: Any) -> None:
        for name in ("auto_map", "attn_implementation"):
            values.pop(name, None)
        super().__init__(**values)

    @classmethod
    def of(cls, source: Source, **changes: Any) -> Self:
        """The configuration of some files, but for some values; ValueError as `read_config`."""
        values = source.configuration() | changes
        read_config(values, source.name)  # whose errors are ours, and come before those of the stock class
        with refusing(f"model {source.name!r}: config.json is none that transformers can read", "mend it"):
            return cls(**values)


class Embeddings(nn.Module):
    """LayerNorm(word + token type): there are no positions."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = layer_norm(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, words: Tensor, types: Tensor | None) -> Tensor:
        """Words (..., C), and types (...), 0 everywhere when None, to (..., C)."""
        table = self.token_type_embeddings
        of_type = table.weight[0] if types is None else looked_up("token_type_ids", table, types)
        out: Tensor = self.dropout(self.LayerNorm(words + of_type))
        return out


class Layers(nn.Module):
    """The layers, under the published name."""

    def __init__(self, config: EncoderConfig, layout: str) -> None:
        super().__init__()
        self.layer = nn.ModuleList(LAYERS[layout](config) for _ in range(config.num_hidden_layers))


class Pooler(nn.Module):
    """tanh(dense) of the first token."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, first: Tensor) -> Tensor:
        """(B, C) to (B, C)."""
        return torch.tanh(self.dense(first))


def _load_adapter(model: PreTrainedModel, name: str, options: Mapping[str, Any]) -> None:
    """Give a model an adapter of PEFT: a folder, or a name on the hub with options of how it is asked.

    transformers' own `load_adapter` leaves it random in old versions, where an encoder has no conversion of weights.
    """
    from peft import PeftConfig, load_peft_weights, set_peft_model_state_dict

    with refusing(f"adapter {name!r} cannot be put on {model.name_or_path!r}", "give one that was made for it"):
        config = PeftConfig.from_pretrained(name, **options)
        config.inference_mode = True
        model.add_adapter(config)
        weights = load_peft_weights(name, device="cpu", **options)
        weights = {key.removeprefix("base_model.model."): weight for key, weight in weights.items()}
        found: Any = set_peft_model_state_dict(model, weights)
        if wrong := [*found.unexpected_keys, *(key for key in found.missing_keys if ".default" in key)]:
            raise ValueError(f"its weights are not those that its adapter_config.json asks for ({wrong[0]})")


class PublishedModel(PreTrainedModel):
    """What the encoder and its heads share: how they come from files and go to them."""

    config_class = PublishedConfig
    base_model_prefix = "bert"
    supports_gradient_checkpointing = True
    _no_split_modules = [layer.__name__ for layer in LAYERS.values()]  # noqa: RUF012  # transformers' own form

    source: Source | None = None
    """The files that it came from."""
    tokenizer_source: Source | None = None
    """The files that its tokenizer comes from, where they are others."""
    texts: Texts | None = None
    """What they say of texts, once it was wanted."""

    def __init__(self, config: PublishedConfig) -> None:
        super().__init__(config)
        self.sizes = read_config(config.to_dict(), config.name_or_path or type(self).__name__)

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], *_: Any, config: Any = None, **options: Any) -> Self:  # type: ignore[override]
        """Load a published model: what transformers' Auto classes call once `longreach.register_encoders` was.

        Args:
            name: a folder or a name on the hub.
            config: its configuration; that of the files when None.
            options: dtype, how the hub is asked and which adapter of PEFT is put on it, as of transformers' own
                `from_pretrained`.

        Raises:
            ValueError: as `longreach.load_encoder`, or an option is not known.
        """
        asked = {option: options.pop(option) for option in HUB_OPTIONS if options.get(option) is not None}
        dtype = options.pop("dtype", None) or options.pop("torch_dtype", None)
        of_adapter = {**(options.pop("adapter_kwargs", None) or {})}
        adapter = of_adapter.pop("_adapter_model_path", None)
        unknown = [option for option, value in options.items() if option not in NOT_NEEDED and value is not None]
        if unknown:
            mend = "leave it out, and move the model by .to(device)" if unknown[0] == "device_map" else "leave it out"
            value = shown(options[unknown[0]])
            raise ValueError(f"{unknown[0]}={value}: encoders of longreach have no such option; {mend}")
        source = Source(str(name), asked)
        if config is None:
            config = PublishedConfig.of(source)
        config.name_or_path = source.name  # which adapters that are saved name
        dtype = config.dtype if dtype in (None, "auto") else dtype
        dtype = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
        model = build(cls, source, config, dtype)
        encoder: Any = model.base_model
        encoder.source = source
        if adapter is not None:
            _load_adapter(model, str(adapter), of_adapter)
        return model.eval()

    def save_pretrained(self, save_directory: str | os.PathLike[str], **options: Any) -> None:  # type: ignore[override]
        """Write weights and configuration in the published layout, and the tokenizer and pooling that the model has.

        What another model left there does not stay beside them; a tokenizer that was changed is to be saved afterwards.

        Args:
            save_directory: the folder.
            options: those of transformers' own `save_pretrained`, such as max_shard_size.
        """
        validate_path("save_directory", save_directory)
        super().save_pretrained(save_directory, **options)
        drop_stale_weights(Path(save_directory))
        encoder: Any = self.base_model
        if encoder.source is not None:
            copy_text_files(Path(save_directory), encoder.source, encoder.tokenizer_source or encoder.source)


class EncoderModel(PublishedModel):
    """The encoder alone. Its `forward` is that of BERT in transformers; padding comes out 0 in all layouts.

    A row of outputs is that of its text alone, whatever it is batched with. Attention weights are never made, so that
    there are none to be had. Memory grows with the number of tokens that are no padding.
    """

    def __init__(self, config: PublishedConfig) -> None:
        super().__init__(config)
        self.embeddings = Embeddings(self.sizes)
        self.encoder = Layers(self.sizes, layout_said(config.to_dict()))
        self.pooler: Pooler | None = Pooler(self.sizes)
        self.post_init()

    def fit(self, tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
        """Those of a file's tensors that are its own, heads left aside; without a pooler where the file has none."""
        own = {key: x for key, x in tensors.items() if not key.startswith(HEADS)}
        if not any(key.startswith("pooler.") for key in own):
            self.pooler = None
        return own

    def get_input_embeddings(self) -> nn.Module:
        """The word embeddings."""
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Put other word embeddings in their place."""
        self.embeddings.word_embeddings = value  # type: ignore[assignment]

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> Any:
        """Encode texts.

        Args:
            input_ids: (B, T) int64.
            attention_mask: (B, T), 0 where a token is padding, which stands at the ends; none when None.
            token_type_ids: (B, T) int64; 0 when None.
            inputs_embeds: (B, T, C), word embeddings in place of ids.
            output_attentions: not to be had; it is here for those who pass on that they do not want any.
            output_hidden_states: whether to return the output of each layer, and what went into the first; as the
                configuration says when None.

        Returns:
            `last_hidden_state` (B, T, C), 0 at padding, `pooler_output` (B, C), of the first token of each text
            wherever its padding is, of zeros for a text without tokens, None without a pooler, and `hidden_states`; a
            tuple where `return_dict=False` is passed too, or the configuration says so.

        Raises:
            ValueError: attention weights are asked for; neither ids nor embeddings, or both; one has another shape or
                kind, ids are none of the vocabulary (found on the CPU alone); the mask has another shape or padding
                between tokens.
        """
        if output_attentions:
            raise ValueError(f"output_attentions={output_attentions}: attention weights are never made; leave it out")
        given = input_ids if inputs_embeds is None else inputs_embeds
        if given is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError("give one of input_ids and inputs_embeds")
        for name, axes, x in (
            ("input_ids", 2, input_ids),
            ("inputs_embeds", 3, inputs_embeds),
            ("token_type_ids", 2, token_type_ids),
        ):
            if x is None:
                continue
            validate_types(**{name: x})
            if x.dim() != axes or x.is_floating_point() != (axes == 3) or x.shape[:2] != given.shape[:2]:
                kind = "(B, T) int64, the same B and T for all" if axes == 2 else "(B, T, C) floating point"
                raise ValueError(f"{name} of shape {tuple(x.shape)} and {x.dtype}: give {kind}")
        if inputs_embeds is not None and inputs_embeds.shape[2] != self.sizes.hidden_size:
            raise ValueError(f"inputs_embeds of width {inputs_embeds.shape[2]}: give C = {self.sizes.hidden_size}")
        if attention_mask is not None:
            validate_types(attention_mask=attention_mask)
        arrangement: Arrangement
        if torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export():
            arrangement = Dense(attention_mask)
        else:
            arrangement = Packed.of(attention_mask, (given.shape[0], given.shape[1]))
        words = arrangement.gather(given)
        if inputs_embeds is None:
            words = looked_up("input_ids", self.embeddings.word_embeddings, words)
        types = None if token_type_ids is None else arrangement.gather(token_type_ids)
        keep = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        states = self._layers(words, types, arrangement, keep=bool(keep))
        hidden = [arrangement.scatter(state) for state in states]
        pooled = None if self.pooler is None else self.pooler(arrangement.first(states[-1]))
        return BaseModelOutputWithPooling(
            last_hidden_state=hidden[-1],
            pooler_output=pooled,
            hidden_states=tuple(hidden) if keep else None,
        )

    def encode_packed(self, ids: Tensor, arrangement: Packed) -> Tensor:
        """Ids (N,) of texts one after another to the last hidden states (N, C)."""
        return self._layers(self.embeddings.word_embeddings(ids), None, arrangement, keep=False)[-1]

    def _layers(self, words: Tensor, types: Tensor | None, arrangement: Arrangement, *, keep: bool) -> list[Tensor]:
        """The last hidden state, or with `keep` all of them, of word embeddings (..., C)."""
        heads = Heads(
            self.sizes.num_attention_heads,
            self.sizes.scaling,
            self.sizes.attention_probs_dropout_prob if self.training else 0.0,
        )

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return arrangement.attend(q, k, v, heads)

        states = [self.embeddings(words, types)]
        for layer in self.encoder.layer:
            state = layer(states[-1], attend)
            states = [*states, state] if keep else [state]
        return states

    def encode(
        self,
        texts: Sequence[str],
        *,
        max_length: int | None = None,
        batch_size: int = 32,
        normalize: bool | None = None,
        progress: bool | Progress = False,
    ) -> Tensor:
        """Vectors of texts, pooled and normalised as the files say.

        Texts are taken by length, and a batch holds no padding, so that a vector is that of its text alone. Memory is
        bounded by the longest text, whatever the batch: a batch is cut where it would hold too many tokens.

        Args:
            texts: any number of them; an empty one has a vector too.
            max_length: tokens, special ones included, after which a text is cut off; what the files say when None.
            batch_size: the most texts at a time.
            normalize: whether vectors get length 1; as the files say when None.
            progress: whether to show a bar on standard error; or what is told how many texts of how many are done.

        Returns:
            (N, C) float32 on the CPU, in the order of the texts.

        Raises:
            ValueError: texts are no list of text, a number is below 1, there is no tokenizer, or the files ask for a
                pooling that is not known.
        """
        return encode(self, texts, max_length=max_length, batch_size=batch_size, normalize=normalize, progress=progress)
