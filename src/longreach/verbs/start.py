"""Training that starts from a model that is there: a run of our own, or a pretrained one of Hugging Face."""

import os
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from longreach.data.prepare import DataConfig, PreparedData
from longreach.data.sequences import IGNORED
from longreach.data.tokenizer import Tokenizer, load_tokenizer
from longreach.files import digest
from longreach.folder import begun_with
from longreach.foreign import refusing
from longreach.measure.generation import sampler, stream_tokens
from longreach.measure.subject import LanguageModel, Subject
from longreach.measure.transformers import HuggingFaceModel
from longreach.models.config import Architecture
from longreach.models.decoder import Decoder
from longreach.models.files import load_model
from longreach.ops.attention import choose_impl
from longreach.ops.crossovers import processor_of
from longreach.positions import build_method, parse_method
from longreach.positions.scaling import Scaling, parse_scaling
from longreach.pretrained.attend import fixed_length
from longreach.pretrained.convert import convert
from longreach.pretrained.extend import extend
from longreach.pretrained.families import CONVERTIBLE, FAMILIES
from longreach.pretrained.lengths import SCALING, TRAIN_LENGTH, declared_length, read_alibi_scaling
from longreach.pretrained.load import holds_pretrained, load_causal_model, load_configuration
from longreach.pretrained.quiet import quiet_transformers
from longreach.pretrained.save import save_pretrained
from longreach.reading import read_file
from longreach.results import Model
from longreach.train.config import RunConfig, TrainConfig
from longreach.train.flops import count_matrices, training_flops
from longreach.train.loop import Trainee, decoder_trainee
from longreach.verbs.open import names_pretrained, tokenizer_of

Load = Callable[[str], Any]
"""Name of a Hugging Face model -> its configuration, or its tokenizer."""

RATE_OF_RUNS = 1e-3
"""Peak learning rate for weights of a run of our own, unless another is given: new weights take a larger one."""

RATE_OF_PRETRAINED = 1e-4
"""That for a Hugging Face model, which is larger."""

AT_ONCE = 1024
"""Tokens of packed documents whose logits in float32 are there at a time."""

SAMPLE_TOKENS, SAMPLE_TEMPERATURE = 100, 0.8
"""Of the texts that `sample_every` asks for: their longest length, and what logits are divided by."""


def idle(config: RunConfig) -> dict[str, str]:
    """Name of a field of a run that nothing heeds beside the others -> why."""
    idle = config.data.idle()
    if config.start_from is not None and names_pretrained(config.start_from):
        shape = [field.name for field in fields(Architecture)]
        reason = f"start_from={config.start_from} has a shape of its own"
        return idle | dict.fromkeys([*shape, "longest_length"], reason)
    size = config.model_config(1).size
    with torch.device("meta"):  # without memory for their tables
        shorter, longer = (
            build_method(config.method, replace(size, longest_length=size.train_length + more)) for more in (0, 1)
        )
    if (shorter.max_length, shorter.max_training_offset) == (longer.max_length, longer.max_training_offset):
        idle["longest_length"] = f"method={config.method} is the same for any length"
    return idle


def starting_config(source: str, load: Load = load_configuration) -> RunConfig:
    """The run that starts from a model and changes nothing: its data, tokenizer, shape, method and training length.

    What a finished run held out of its text is held out again, whatever the seed. The seed is the finished run's too,
    the learning rate is one for weights that are trained already, and what else concerns training has the defaults. A
    Hugging Face model says nothing of its data, which is then the default text.

    Args:
        source: the folder of a finished run, or a Hugging Face model as a folder or a name on the hub.
        load: as `load_configuration`, for who needs what that reads once more.

    Raises:
        ValueError: there is no such model, it cannot have ALiBi, or the folder holds no finished run.
    """
    return _start(source, load)[0]


def _start(source: str, load: Load) -> tuple[RunConfig, Any]:
    """As `starting_config`, and the configuration of a Hugging Face model, None of a run."""
    if not source:
        raise ValueError("start_from='': give a path, or . for this folder")
    folder = Path(source)
    if (folder / "config.toml").exists() and (folder / "training.json").exists():
        before = read_file(RunConfig, folder / "config.toml")
        continued = replace(
            before,
            start_from=source,
            longest_length=None,  # that of a comparison may be below the length that is wanted now
            data=replace(
                before.data,
                tokenizer=str(folder / "tokenizer.json"),
                split_seed=before.data.seed_of_split(before.train.seed),
            ),
            train=TrainConfig(
                train_length=before.train.train_length, seed=before.train.seed, learning_rate=RATE_OF_RUNS
            ),
        )
        return continued, _of_source(source, load) if holds_pretrained(folder) else None
    if folder.is_dir() and ((folder / "config.toml").exists() or not holds_pretrained(folder)):
        raise ValueError(
            f"start_from={source!r} holds no finished run: give the folder of one, as train writes it and compare "
            "does for each method, or a Hugging Face model"
        )
    pretrained = _of_source(source, load)
    trainable = {name: family for name, family in FAMILIES.items() if family.kind != "remote"}
    if pretrained.model_type not in trainable:
        raise ValueError(
            f"start_from={source!r} is a {pretrained.model_type}: longreach can train one of {', '.join(trainable)}"
        )
    try:
        trainable[pretrained.model_type].check(pretrained)
    except ValueError as error:
        raise ValueError(f"start_from={source!r} cannot be trained with ALiBi: {error}") from error
    length = declared_length(pretrained.get_text_config()) or TrainConfig().train_length
    config = RunConfig(
        start_from=source,
        method=_method_of(pretrained),
        data=DataConfig(tokenizer=source),
        train=TrainConfig(train_length=length, learning_rate=RATE_OF_PRETRAINED),
    )
    return config, pretrained


def _of_source(source: str, load: Load) -> Any:
    """What is loaded of the Hugging Face model that is started from."""
    try:
        return load(source)
    except (ValueError, OSError) as error:
        raise ValueError(f"start_from={source!r}: {error}") from error


def check_start(config: RunConfig, load: Load = load_configuration) -> Any:
    """Check that the model a run starts from is there and fits it, before any text is read or weights are loaded.

    load is as for `starting_config`.

    Returns:
        Its configuration, where it is one of Hugging Face.

    Raises:
        ValueError: there is no such model, or its shape, tokenizer or method is another.
    """
    if config.start_from is None:
        return None
    start, pretrained = _start(config.start_from, load)
    for field in fields(Architecture):
        there, asked = getattr(start.model, field.name), getattr(config.model, field.name)
        if asked != there and (pretrained or not field.name.endswith("_dropout")):
            shape = "a shape of its own" if pretrained else there
            raise ValueError(f"{field.name}={asked}: start_from={config.start_from!r} has {shape}; leave it out")
    if pretrained:
        _check_pretrained_method(config.method)
        if config.data.tokenizer == config.start_from:
            _of_source(config.start_from, tokenizer_of)
    else:
        _check_positions(config, start)
    if config.data.tokenizer != start.data.tokenizer and (
        config.data.tokenizer is None or _fingerprint(config) != _fingerprint(start)
    ):
        raise ValueError(
            f"tokenizer={config.data.tokenizer!r}: start_from={config.start_from!r} has another; "
            f"give {start.data.tokenizer!r}"
        )
    return pretrained


def check_held_out(config: RunConfig, prepared: PreparedData) -> None:
    """Check that no document that a run starts from was trained on is among those that are held out now.

    Args:
        config: of the run.
        prepared: its text.

    Raises:
        ValueError: the text that the other run was trained on has changed since, or is split in another way.
    """
    if config.start_from is None or not prepared.split_off or not (Path(config.start_from) / "config.toml").exists():
        return
    before = read_file(RunConfig, Path(config.start_from) / "config.toml")
    same_text = begun_with(Path(config.start_from))["text"] == prepared.corpus_hash
    mend = "or text of its own for validation (--valid-data)"
    if not same_text and _same_source(config.data.data, before.data.data):
        source = f"data={config.data.data!r}" if config.data.data else "the default text, of this Python's own library,"
        raise ValueError(
            f"{source} has changed since start_from={config.start_from!r} was trained on it, which may have seen what "
            f"is held out now: give it as it was, {mend}"
        )
    if same_text:
        for name, asked, then in (
            ("split_seed", *(run.data.seed_of_split(run.train.seed) for run in (config, before))),
            ("valid_fraction", config.data.valid_fraction, before.data.valid_fraction),
        ):
            if asked != then and (name != "split_seed" or prepared.split_seed is not None):
                raise ValueError(
                    f"{name}={asked}: start_from={config.start_from!r} was trained on the same text with {then} and "
                    f"saw some of what is held out now: give {then}, {mend}"
                )


def digest_of_weights(source: str, pretrained: Any) -> dict[str, str]:
    """What a model is made from, as `longreach.folder.begin` takes it: a folder's digest, a commit of the hub.

    pretrained is the configuration of one of Hugging Face, None of a run.
    """
    name = f"weights of {source}"
    if Path(source).is_dir():
        return {name: digest(Path(source))}
    return {name: pretrained._commit_hash} if pretrained._commit_hash else {}


def build_trainee(config: RunConfig, tokenizer: Tokenizer, device: torch.device, pretrained: Any = None) -> Trainee:
    """What a run trains: new weights, or those of the model that it starts from, which `check_start` found to fit.

    pretrained is what that returned.

    Raises:
        ValueError: the weights are not of the form that the run needs, or their files are damaged.
    """
    if pretrained is not None:
        return _pretrained_trainee(config, tokenizer, device, pretrained)
    model = Decoder(config.model_config(tokenizer.vocab_size))
    if config.start_from is not None:
        try:
            model.load_state_dict(load_model(config.start_from).state_dict())
        except RuntimeError as error:
            first_line = str(error).splitlines()[-1].strip()
            raise ValueError(f"start_from={config.start_from!r} has weights of another form ({first_line})") from error
    trainee = decoder_trainee(model.to(device), config.train.packed_length)
    return replace(trainee, sample=partial(_sample, model, tokenizer, config.train, device))


def _pretrained_trainee(config: RunConfig, tokenizer: Tokenizer, device: torch.device, pretrained: Any) -> Trainee:
    """A model of transformers with ALiBi, in float32 whatever its files are in."""
    assert config.start_from is not None
    model = load_causal_model(config.start_from, pretrained, dtype="float32")
    if tokenizer.text_vocab_size > model.config.get_text_config().vocab_size:
        raise ValueError(f"start_from={config.start_from!r} has fewer tokens than its tokenizer: give the model's own")
    scaling = parse_scaling(parse_method(config.method)[1].scaling)
    (convert if model.config.model_type in CONVERTIBLE else extend)(model, scaling=scaling)
    model.to(device)
    with (
        quiet_transformers(),
        refusing(f"start_from={config.start_from!r} is loaded and does not run", "mend its configuration"),
    ):
        HuggingFaceModel(model, heeds_positions=False)  # tries it out
    model.train()
    length = config.train.train_length
    at_once = config.train.packed_length or length
    text = model.config.get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    setattr(model.config, TRAIN_LENGTH, length)  # saved with it, for the longest input may be another
    return Trainee(
        method=config.method,
        model=model,
        loss=next_token_loss(model),
        attention=choose_impl(
            device.type,
            at_once,
            at_once,
            dtype=model.dtype,
            reaching=True,
            dense=_attention_dropout(model.config) > 0,
            learns=True,
            processor=processor_of(device, model.dtype, head_dim),
        ).impl,
        save=lambda folder, weights: save_pretrained(model, folder, state_dict=weights),
        flops=partial(training_flops, _multiplied(model), text.num_hidden_layers, text.num_attention_heads * head_dim),
        sample=lambda: _sample(
            HuggingFaceModel(model, state_length=partial(fixed_length, model)), tokenizer, config.train, device
        ),
        blocks=tuple(next(module for module in model.modules() if isinstance(module, nn.ModuleList))),
    )


def _multiplied(model: Any) -> int:
    """Weights of the matrices of a model of transformers that each token is multiplied by."""
    head = model.get_output_embeddings()
    output = None if head is None else head.weight
    embeddings = (module.weight for module in model.modules() if isinstance(module, nn.Embedding))
    return count_matrices(model, {weight for weight in embeddings if weight is not output})


def _sample(model: LanguageModel, tokenizer: Tokenizer, config: TrainConfig, device: torch.device) -> str:
    """A document that a model begins, drawn alike each time."""
    subject = Subject(
        identity=Model("the model that is trained", config.train_length, config.seed),
        model=model,
        tokenizer=tokenizer,
        vocab_size=tokenizer.vocab_size,
        device=device,
        max_length=None,
        attention=lambda query_length, key_length, windowed: "",
    )
    choose = sampler(device, temperature=SAMPLE_TEMPERATURE, top_k=None, top_p=None, seed=config.seed)
    length = max(1, min(SAMPLE_TOKENS, config.train_length - 1))
    return tokenizer.decode(list(stream_tokens(subject, [tokenizer.eos_id], length, choose)))


def next_token_loss(model: Any) -> Callable[..., Tensor]:
    """The loss of an extended model of transformers as `Trainee` has it; positions are left to the model.

    The float32 logits of one sequence, or of `AT_ONCE` tokens of packed documents, at a time are made from the model's
    own, and made again for the gradient.
    """

    def loss(tokens: Tensor, targets: Tensor, positions: Tensor, borders: Tensor | None = None) -> Tensor:
        documents = {} if borders is None else {"cu_seq_lens_q": borders}
        logits = model(input_ids=tokens, use_cache=False, **documents).logits  # [B, T, V]
        rows: Any = zip(logits.unbind(), targets.unbind(), strict=True)
        if borders is not None:  # all documents are one row
            rows = zip(logits[0].split(AT_ONCE), targets[0].split(AT_ONCE), strict=True)
        reduction = "mean" if borders is None else "sum"
        losses = torch.stack(
            [checkpoint(_nll, *row, reduction, use_reentrant=False, preserve_rng_state=False) for row in rows]
        )
        return losses.mean() if borders is None else losses.sum() / (targets != IGNORED).sum()

    return loss


def _nll(logits: Tensor, targets: Tensor, reduction: str) -> Tensor:
    return F.cross_entropy(logits.float(), targets, reduction=reduction)


def _same_source(one: str | None, other: str | None) -> bool:
    return one == other or (None not in (one, other) and os.path.abspath(str(one)) == os.path.abspath(str(other)))


def _method_of(pretrained: Any) -> str:
    """ALiBi with the scaling that a configuration says, but for one by length, which training does not need."""
    scaling = read_alibi_scaling(getattr(pretrained, SCALING, None))
    return "alibi" if scaling.factor is None else f"alibi:scaling={scaling}"


def _fingerprint(config: RunConfig) -> str:
    return load_tokenizer(str(config.data.tokenizer)).fingerprint


def _check_pretrained_method(method: str) -> None:
    name, options = parse_method(method)
    plain = name == "alibi" and not options.learned and options.are_the_papers
    if not plain or not _is_fixed(parse_scaling(options.scaling, 2)):
        raise ValueError(
            f"method={method!r}: a Hugging Face model is given alibi or alibi:scaling=linear-fixed=F; give one of these"
        )


def _is_fixed(scaling: Scaling) -> bool:
    """Whether the slopes are the same at any length, and config.json can say so."""
    return scaling.name in ("none", "linear-fixed") and not scaling.logn


def _check_positions(config: RunConfig, start: RunConfig) -> None:
    """Check that the trained weights of a position method, where it has any, are those that a run starts from."""
    trained, asked = _position_weights(start), _position_weights(config)
    if trained == asked:
        return
    length = start.train.train_length
    if trained:
        raise ValueError(
            f"method={config.method!r} at train_length={config.train.train_length}: start_from={config.start_from!r} "
            f"has positions trained as {start.method!r} at {length}, which fit no other method or table; give the same"
        )
    raise ValueError(
        f"method={config.method!r} has positions that are trained, start_from={config.start_from!r} with method "
        f"{start.method!r} has none of them; give a method without any, such as alibi"
    )


def _position_weights(config: RunConfig) -> dict[str, torch.Size]:
    """Name -> shape of what a run's position method trains."""
    size = config.model_config(vocab_size=1).size  # no method looks at the vocabulary
    with torch.device("meta"):
        return {name: weight.shape for name, weight in build_method(config.method, size).state_dict().items()}


def _attention_dropout(config: Any) -> float:
    """Dropout of the attention weights, under the names of the families."""
    places = (
        (config, "attn_pdrop"),
        (config, "attention_dropout"),
        (getattr(config, "attn_config", None), "attn_pdrop"),
    )
    return max(getattr(place, name, None) or 0.0 for place, name in places)
