"""Encoders with a task: masked language model, classifier of texts or of pairs (rerankers)."""

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import MaskedLMOutput, SequenceClassifierOutput
from transformers.utils import can_return_tuple

from longreach.encoders.config import EncoderConfig
from longreach.encoders.layouts.blocks import layer_norm
from longreach.encoders.model import EncoderModel, Pooler, PublishedConfig, PublishedModel
from longreach.ops.linear import linear


class Transform(nn.Module):
    """LayerNorm(gelu(dense))."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.LayerNorm = layer_norm(config)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to (..., C)."""
        out: Tensor = self.LayerNorm(F.gelu(self.dense(x)))
        return out


class TiedDecoder(nn.Module):
    """Logits by the word embeddings, which the encoder holds, and a bias of its own."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, x: Tensor, words: Tensor) -> Tensor:
        """(..., C) and word embeddings (V, C) to (..., V)."""
        return linear(x, words, self.bias)

    def resize(self, count: int) -> None:
        """For `count` words, the new ones with a bias of 0."""
        if count != len(self.bias):
            bias = F.pad(self.bias.detach(), (0, count - len(self.bias)))
            self.bias = nn.Parameter(bias, requires_grad=self.bias.requires_grad)


class Predictions(nn.Module):
    """The head of a masked language model."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.transform = Transform(config)
        self.decoder = TiedDecoder(config)


class EncoderForMaskedLM(PublishedModel):
    """The encoder with the head that predicts masked tokens, as it was pretrained.

    The loss leaves labels of -100 out, as everywhere in transformers; Mosaic's own code leaves label 0 out instead.
    """

    def __init__(self, config: PublishedConfig) -> None:
        super().__init__(config)
        self.bert = EncoderModel(config)
        self.cls = nn.ModuleDict({"predictions": Predictions(self.sizes)})
        self.post_init()

    def fit(self, tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
        """A file's tensors by its own names: the bias is Jina's or Mosaic's, the matrix that of the word embeddings.

        Raises:
            ValueError: the matrix is another.
        """
        head = {key: x for key, x in tensors.items() if key.startswith("cls.predictions.")}
        bias, matrix = head.pop("cls.predictions.bias", None), head.pop("cls.predictions.decoder.weight", None)
        if bias is not None:
            head["cls.predictions.decoder.bias"] = bias
        if matrix is not None and not torch.equal(matrix, tensors["embeddings.word_embeddings.weight"]):
            raise ValueError(f"model {name!r}: cls.predictions.decoder.weight is not the word embeddings: tie them")
        return {**_below_bert(self.bert, tensors, name), **head}

    def resize_token_embeddings(self, *args: Any, **options: Any) -> nn.Embedding:
        """Change the number of words as transformers does, with the bias of the head: new words begin with 0 there."""
        words = super().resize_token_embeddings(*args, **options)
        head: Any = self.cls["predictions"]
        head.decoder.resize(len(words.weight))
        return words

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> Any:
        """Logits (B, T, V), and with `labels` (B, T), -100 where nothing is to be predicted, the mean loss in nats.

        Other arguments as of `EncoderModel.forward`.
        """
        inputs = (input_ids, attention_mask, token_type_ids, inputs_embeds)
        encoded = self.bert(*inputs, output_attentions, output_hidden_states, return_dict=True)
        head: Any = self.cls["predictions"]
        logits = head.decoder(head.transform(encoded.last_hidden_state), self.bert.embeddings.word_embeddings.weight)
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return MaskedLMOutput(loss=loss, logits=logits, hidden_states=encoded.hidden_states)


class EncoderForSequenceClassification(PublishedModel):
    """The encoder with a classifier on its pooler: rerankers have one label, and score a pair of texts by its logit."""

    def __init__(self, config: PublishedConfig) -> None:
        super().__init__(config)
        self.bert = EncoderModel(config)
        dropout = self.sizes.classifier_dropout
        self.dropout = nn.Dropout(self.sizes.hidden_dropout_prob if dropout is None else dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels or 1)
        self.post_init()

    def fit(self, tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
        """A file's tensors by its own names. The number of labels is that of its weights.

        A file of an encoder alone has no classifier at all: a new one begins, to be trained, which a warning says.
        """
        head = {key: x for key, x in tensors.items() if key.startswith("classifier.")}
        if "classifier.weight" in head:
            self.config.num_labels = labels = len(head["classifier.weight"])
            self.classifier = nn.Linear(self.config.hidden_size, labels, device="meta")
        own = _below_bert(self.bert, tensors, name)
        had_one = any(kind.endswith("ForSequenceClassification") for kind in self.sizes.architectures)
        if not head and not had_one:
            words = tensors["embeddings.word_embeddings.weight"]
            new = {"classifier": self.classifier}
            if self.bert.pooler is None:
                self.bert.pooler = Pooler(self.sizes).to("meta")
                new["bert.pooler.dense"] = self.bert.pooler.dense
            warnings.warn(f"model {name!r} has no classifier: {' and '.join(new)} are new, train them", stacklevel=2)
            for key, linear in new.items():
                weight = torch.empty(linear.weight.shape, dtype=words.dtype)
                head[f"{key}.weight"] = weight.normal_(std=self.config.initializer_range)
                head[f"{key}.bias"] = torch.zeros(linear.bias.shape, dtype=words.dtype)
        return {**own, **head}

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> Any:
        """Logits (B, labels), and a loss with `labels`: of squares for one label, of classes (B,) or bits otherwise.

        Other arguments as of `EncoderModel.forward`.
        """
        inputs = (input_ids, attention_mask, token_type_ids, inputs_embeds)
        encoded = self.bert(*inputs, output_attentions, output_hidden_states, return_dict=True)
        logits = self.classifier(self.dropout(encoded.pooler_output))
        loss = None if labels is None else _loss(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=encoded.hidden_states)


def _below_bert(bert: EncoderModel, tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {f"bert.{key}": x for key, x in bert.fit(tensors, name).items()}


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    if logits.shape[1] == 1:
        return F.mse_loss(logits[:, 0], labels.to(logits.dtype).flatten())
    if labels.is_floating_point():
        return F.binary_cross_entropy_with_logits(logits, labels)
    return F.cross_entropy(logits, labels.flatten())
