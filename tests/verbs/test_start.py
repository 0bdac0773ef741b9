import dataclasses
import json
from itertools import accumulate, pairwise

import numpy as np
import pytest
import tomli_w
import torch
import torch.nn.functional as F
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from longreach.cli import main
from longreach.data.batches import Batches
from longreach.data.prepare import DataConfig, prepare
from longreach.data.sequences import IGNORED, Blocks
from longreach.data.tokenizer import load_tokenizer
from longreach.measure.plan import EvaluateConfig
from longreach.measure.subject import Unsupported
from longreach.models.config import Architecture
from longreach.models.files import load_model
from longreach.positions.scaling import Scaling
from longreach.pretrained.attend import extension_of
from longreach.pretrained.convert import convert
from longreach.pretrained.extend import extend
from longreach.pretrained.load import adapt, load_pretrained
from longreach.pretrained.save import save_pretrained
from longreach.reading import plain_values, read_file
from longreach.train.config import RunConfig, TrainConfig
from longreach.verbs.evaluate import EvaluationConfig, evaluate_models
from longreach.verbs.open import load_subject
from longreach.verbs.start import build_trainee, check_start, next_token_loss, starting_config
from longreach.verbs.train import open_run, train_run

CPU = torch.device("cpu")
LENGTH = 16
TRAIN = TrainConfig(train_length=LENGTH, steps=3, batch_size=4, warmup_steps=1, checkpoint_every=2, device="cpu")
SHAPE = Architecture(num_layers=1, num_heads=2, d_model=16)


class Interrupted(Exception):
    pass


def silent(stage, done, total, note=""):
    pass


@pytest.fixture(scope="module")
def data(corpus, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return DataConfig(data=str(corpus), vocab_size=300, valid_fraction=0.2, cache=str(cache))


def run(config, folder, stop_after=None):
    def progress(stage, done, total, note=""):
        if stage.startswith("training") and done == stop_after:
            raise Interrupted

    return train_run(config, folder, progress)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """method -> the folder of a finished run, made when first asked for."""
    parent = tmp_path_factory.mktemp("runs")

    def of(method):
        folder = parent / method.replace(":", "_")
        train = dataclasses.replace(TRAIN, seed=5)
        run(RunConfig(method=method, data=data, model=SHAPE, train=train), folder)
        return str(folder)

    return of


def pretrained_models(vocab_size):
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": vocab_size, **special}
    gpt2 = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": LENGTH, "vocab_size": vocab_size, **special}
    return {
        "gpt2": lambda: transformers.GPT2Config(**gpt2, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0),
        "gpt2-dropout": lambda: transformers.GPT2Config(**gpt2),
        "llama": lambda: transformers.LlamaConfig(intermediate_size=32, max_position_embeddings=LENGTH, **size),
        "bloom": lambda: transformers.BloomConfig(**size),
        "mpt": lambda: transformers.MptConfig(
            d_model=16, n_layers=1, n_heads=2, max_seq_len=LENGTH, vocab_size=vocab_size, **special
        ),
        "falcon": lambda: transformers.FalconConfig(alibi=True, max_position_embeddings=LENGTH, **size),
        "opt": lambda: transformers.OPTConfig(ffn_dim=32, word_embed_proj_dim=16, **size),
    }


@pytest.fixture(scope="module")
def pretrained(data, tmp_path_factory):
    """family -> a folder with a model of transformers and a tokenizer, in bfloat16."""
    parent = tmp_path_factory.mktemp("models")
    tokenizer = prepare(data, 0).tokenizer

    def of(family):
        if not (parent / family).exists():
            config = pretrained_models(tokenizer.vocab_size)[family]()
            model = transformers.AutoModelForCausalLM.from_config(config)
            generator = torch.Generator().manual_seed(0)
            for parameter in model.parameters():
                if parameter.dim() > 1:  # so loud that attention has preferences
                    torch.nn.init.normal_(parameter, std=0.4, generator=generator)
            model.to(torch.bfloat16).save_pretrained(parent / family)
            tokenizer.save(parent / family / "tokenizer.json")
        return str(parent / family)

    return of


def fine_tuning(source, data, **changes):
    """A short run from a source on the test's text."""
    start = starting_config(source)
    train = dataclasses.replace(TRAIN, learning_rate=1e-2, seed=start.train.seed)
    own = dataclasses.replace(data, tokenizer=start.data.tokenizer)
    return dataclasses.replace(start, **{"data": own, "train": train, **changes})


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


# Runs of our own


def test_a_run_starts_where_the_other_ended(trained, data, tmp_path):
    config = starting_config(trained("alibi"))
    config = dataclasses.replace(config, train=dataclasses.replace(TRAIN, seed=5, warmup_steps=0, learning_rate=1e-9))
    run(config, tmp_path / "run")
    before, after = (load_model(folder).state_dict() for folder in (trained("alibi"), tmp_path / "run"))
    assert all(torch.allclose(before[name], after[name], atol=1e-7) for name in before)


def test_the_starting_values_are_the_run_s(trained, data):
    config = starting_config(trained("rotary:base=500"))
    assert (config.method, config.model) == ("rotary:base=500", SHAPE)
    tokenizer = f"{config.start_from}/tokenizer.json"
    assert config.data == dataclasses.replace(data, tokenizer=tokenizer, split_seed=5)  # held out whatever the seed
    assert config.train == TrainConfig(train_length=LENGTH, seed=5, learning_rate=1e-3)  # not that of new weights


def test_what_a_run_held_out_stays_held_out_under_another_seed(trained, tmp_path):
    start = starting_config(trained("alibi"))
    assert run(dataclasses.replace(start, train=dataclasses.replace(TRAIN, seed=6)), tmp_path / "run").seed == 6
    before, after = (starting_config(folder).data for folder in (trained("alibi"), str(tmp_path / "run")))
    assert before.split_seed == after.split_seed == 5
    elsewhere = dataclasses.replace(start, train=TRAIN, data=dataclasses.replace(start.data, split_seed=6))
    with pytest.raises(ValueError, match=r"^split_seed=6: start_from=.* was trained on the same text with 5 and saw"):
        run(elsewhere, tmp_path / "elsewhere")
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize(
    ("before", "after", "length"),
    [
        ("alibi", "alibi:scaling=linear-fixed=4", 4 * LENGTH),
        ("rotary", "alibi", LENGTH),
        ("sinusoidal", "none", 2 * LENGTH),
        ("t5", "t5", 2 * LENGTH),
        ("alibi:learned=true", "alibi:learned=true:scaling=linear-fixed=2", 2 * LENGTH),
    ],
)
def test_methods_that_fit_go_on_at_any_length(trained, data, before, after, length, tmp_path):
    train = dataclasses.replace(TRAIN, train_length=length, batch_size=2, seed=5)
    config = dataclasses.replace(starting_config(trained(before)), method=after, train=train)
    check_start(config)
    record = run(config, tmp_path)
    assert (record.method, record.train_length) == (after, length)
    assert open_run(tmp_path).model.config.method == after


@pytest.mark.parametrize(
    ("before", "after", "length", "message"),
    [
        (
            "learned",
            "learned",
            2 * LENGTH,
            r"at train_length=32: .* positions trained as 'learned' at 16, which fit no",
        ),
        ("learned", "alibi", LENGTH, r"^method='alibi' at .* has positions trained as 'learned' at 16"),
        ("t5", "alibi", LENGTH, r"^method='alibi' at .* positions trained as 't5'"),
        ("t5", "t5:num_buckets=16", LENGTH, r"^method='t5:num_buckets=16' at .* positions trained as 't5'"),
        (
            "alibi",
            "t5",
            LENGTH,
            r"^method='t5' has positions that are trained, start_from=.* with method 'alibi' has none",
        ),
        ("alibi", "alibi:learned=true", LENGTH, r"^method='alibi:learned=true' has positions that are trained"),
    ],
)
def test_positions_that_were_trained_fit_no_other(trained, before, after, length, message):
    train = dataclasses.replace(TRAIN, train_length=length)
    config = dataclasses.replace(starting_config(trained(before)), method=after, train=train)
    with pytest.raises(ValueError, match=message):
        check_start(config)


@pytest.mark.parametrize(("field", "value"), [("num_layers", 2), ("d_model", 32), ("bias", True), ("norm", "rmsnorm")])
def test_another_shape_is_refused_by_the_name_of_the_field(trained, field, value, tmp_path, data):
    config = starting_config(trained("alibi"))
    config = dataclasses.replace(config, model=dataclasses.replace(SHAPE, **{field: value}))
    with pytest.raises(ValueError, match=rf"^{field}={value}: start_from=.* has .*; leave it out"):
        run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_dropout_may_be_another(trained):
    config = starting_config(trained("alibi"))
    check_start(dataclasses.replace(config, model=dataclasses.replace(SHAPE, residual_dropout=0.2)))


@pytest.mark.parametrize("given", [True, False])
def test_another_tokenizer_is_refused(trained, data, given, tmp_path):
    config = starting_config(trained("alibi"))
    prepare(dataclasses.replace(data, vocab_size=280), 0).tokenizer.save(tmp_path / "tokenizer.json")
    other = str(tmp_path / "tokenizer.json") if given else None
    with pytest.raises(ValueError, match=r"^tokenizer=.*: start_from=.* has another; give '.*tokenizer\.json'"):
        check_start(dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=other)))


def test_the_same_tokenizer_elsewhere_is_the_same(trained, tmp_path):
    config = starting_config(trained("alibi"))
    load_tokenizer(config.data.tokenizer).save(tmp_path / "tokenizer.json")
    check_start(
        dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=str(tmp_path / "tokenizer.json")))
    )


def test_a_folder_without_a_finished_run_is_refused(trained, data, tmp_path):
    config = fine_tuning(trained("alibi"), data)
    with pytest.raises(Interrupted):
        run(config, tmp_path / "unfinished", stop_after=2)
    (tmp_path / "empty").mkdir()
    for name in ("unfinished", "empty"):
        with pytest.raises(ValueError, match=rf"^start_from='.*{name}' holds no finished run: give the folder of one"):
            starting_config(str(tmp_path / name))


def test_weights_that_are_not_those_of_the_run_are_refused(trained, data, tmp_path):
    config = fine_tuning(trained("alibi"), data)
    run(config, tmp_path / "run")
    damaged = tmp_path / "run" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-10])
    config = fine_tuning(str(tmp_path / "run"), data)
    with pytest.raises(ValueError, match=r"run/model.safetensors: damaged or not a longreach model"):
        run(config, tmp_path / "next")


# Models of transformers


@pytest.mark.parametrize("family", ["gpt2", "llama", "bloom", "mpt", "falcon"])
def test_a_pretrained_model_is_trained_with_alibi(pretrained, data, family, tmp_path):
    config = fine_tuning(pretrained(family), data)
    record = run(config, tmp_path / "run")
    files = {path.name for path in (tmp_path / "run").iterdir()}
    assert files >= {"config.json", "model.safetensors", "tokenizer.json", "config.toml", "metrics.jsonl"}
    assert files >= {"training.json", "tokenizer_config.json"}
    assert not any("checkpoint" in name for name in files)
    model = load_pretrained(tmp_path / "run")
    assert model.dtype == torch.float32
    assert extension_of(model).scaling == Scaling("none")
    stock = transformers.AutoModelForCausalLM.from_pretrained(pretrained(family))
    assert record.parameters == sum(p.numel() for p in stock.parameters())
    assert (record.method, record.steps, record.tokens) == ("alibi", 3, 3 * 4 * LENGTH)
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]


def loss_of(model, batch):
    with torch.no_grad():
        logits = model(batch[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).item()


@pytest.mark.parametrize("family", ["gpt2", "bloom"])
def test_the_first_loss_is_that_of_the_model_with_scaled_slopes(pretrained, data, family, tmp_path):
    config = fine_tuning(pretrained(family), data, method="alibi:scaling=linear-fixed=4")
    run(config, tmp_path / "run")
    model = transformers.AutoModelForCausalLM.from_pretrained(pretrained(family), dtype=torch.float32)
    (convert if family == "gpt2" else extend)(model, scaling="linear-fixed=4")
    prepared = prepare(config.data, config.train.seed)
    tokens, targets, _ = Batches(Blocks(prepared.train, LENGTH), 4, config.train.seed).rows(0, range(4))
    batch = torch.from_numpy(np.concatenate([tokens, targets[:, -1:]], axis=1))
    expected = loss_of(model, batch)
    assert losses(tmp_path / "run")[0] == pytest.approx(expected, rel=1e-5)
    assert loss_of(extend(model, scaling="none"), batch) != pytest.approx(expected, rel=1e-4)
    assert extension_of(load_pretrained(tmp_path / "run")).scaling == Scaling("linear-fixed", factor=4.0)


@pytest.mark.parametrize("stop_after", [1, 2, 3])
@pytest.mark.parametrize("family", ["gpt2-dropout", "bloom"])
def test_interrupted_and_resumed_equals_uninterrupted(pretrained, data, family, stop_after, tmp_path):
    config = fine_tuning(pretrained(family), data)
    run(config, tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(config, tmp_path / "parts", stop_after=stop_after)
    run(config, tmp_path / "parts")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    whole, parts = (load_pretrained(tmp_path / name).state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(parts[name], whole[name]) for name in whole)


@pytest.mark.parametrize("family", ["gpt2-dropout", "bloom"])
def test_samples_and_trackers_change_no_step(pretrained, data, family, tmp_path, events):
    config = fine_tuning(pretrained(family), data)
    train = dataclasses.replace(config.train, sample_every=1, track=("tensorboard",))
    run(config, tmp_path / "plain")
    run(dataclasses.replace(config, train=train), tmp_path / "tracked")
    assert losses(tmp_path / "tracked") == losses(tmp_path / "plain")
    scalars, texts = events(tmp_path / "tracked")
    assert list(scalars["training/loss"].values()) == pytest.approx(losses(tmp_path / "plain"))
    assert texts["training/sample"].keys() == {1, 2, 3}


@pytest.mark.parametrize("family", ["gpt2", "llama", "bloom"])
def test_flops_are_those_that_are_computed(pretrained, data, family):
    config = fine_tuning(pretrained(family), data)
    trainee = build_trainee(config, load_tokenizer(pretrained(family)), CPU, check_start(config))
    tokens = torch.randint(300, (3, LENGTH))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # products that are counted
        trainee.loss(tokens, tokens, tokens).backward()
    angles = LENGTH * trainee.model.config.head_dim if family == "llama" else 0  # a product in older transformers
    assert counter.get_total_flops() - trainee.flops(LENGTH) * tokens.numel() in (0, angles)


def test_fine_tuning_goes_on_from_what_was_fine_tuned(pretrained, data, tmp_path):
    method = "alibi:scaling=linear-fixed=2"
    run(fine_tuning(pretrained("gpt2"), data, method=method), tmp_path / "first")
    again = starting_config(str(tmp_path / "first"))
    assert (again.method, again.train.train_length) == (method, LENGTH)
    tokenizer = str(tmp_path / "first" / "tokenizer.json")
    assert again.data == dataclasses.replace(data, tokenizer=tokenizer, split_seed=0)
    run(dataclasses.replace(again, train=TRAIN), tmp_path / "second")
    assert extension_of(load_pretrained(tmp_path / "second")).scaling == Scaling("linear-fixed", factor=2.0)


def test_a_command_loads_a_configuration_once(pretrained, data, tmp_path, monkeypatch, capsys):
    loaded, load = [], transformers.AutoConfig.from_pretrained

    def counted(*args, **options):
        loaded.append(args)
        return load(*args, **options)

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", counted)
    source = pretrained("mpt")
    words = f"--from {source} --data {data.data} --cache {data.cache} --valid-fraction {data.valid_fraction}"
    options = f"--output {tmp_path / 'new'} --steps 1 --warmup-steps 0 --batch-size 1 --train-length 8 --device cpu"
    main(["train", *words.split(), *options.split()])
    assert len(loaded) == 1


def test_the_starting_values_are_the_model_s(pretrained, tmp_path):
    config = starting_config(pretrained("mpt"))
    assert config == RunConfig(
        start_from=pretrained("mpt"),
        data=DataConfig(tokenizer=pretrained("mpt")),
        train=TrainConfig(train_length=LENGTH, learning_rate=1e-4),  # not that of new weights
    )
    assert starting_config(pretrained("bloom")).train.train_length == TrainConfig().train_length  # it tells none
    scaled = extend(transformers.AutoModelForCausalLM.from_pretrained(pretrained("mpt")), scaling="linear-fixed=4")
    save_pretrained(scaled, tmp_path)
    assert starting_config(str(tmp_path)).method == "alibi:scaling=linear-fixed=4"


def test_the_configuration_survives_its_file(pretrained, tmp_path):
    config = starting_config(pretrained("gpt2"))
    (tmp_path / "config.toml").write_text(tomli_w.dumps(plain_values(config)))
    assert read_file(RunConfig, tmp_path / "config.toml") == config


@pytest.mark.parametrize(
    "method", ["rotary", "none", "alibi:scaling=linear", "alibi:learned=true", "alibi:slopes=equal"]
)
def test_other_methods_are_refused(pretrained, method):
    config = dataclasses.replace(starting_config(pretrained("gpt2")), method=method)
    with pytest.raises(ValueError, match=rf"^method='{method}': a Hugging Face model is given alibi or alibi:"):
        check_start(config)


def test_a_shape_for_a_pretrained_model_is_refused(pretrained):
    config = dataclasses.replace(starting_config(pretrained("gpt2")), model=Architecture(num_layers=6))
    with pytest.raises(ValueError, match=r"^num_layers=6: start_from=.* has a shape of its own; leave it out"):
        check_start(config)


def test_models_without_a_way_to_alibi_are_refused(pretrained):
    told = "bloom, mpt, falcon, gpt2, llama, mistral, qwen2"  # none whose code comes with its files
    with pytest.raises(ValueError, match=rf"^start_from=.*opt' is a opt: longreach can train one of {told}$"):
        starting_config(pretrained("opt"))
    with pytest.raises(ValueError, match=r"^start_from='nowhere/at-all': model 'nowhere/at-all' is no folder here"):
        starting_config("nowhere/at-all")


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (transformers.MptConfig(attn_config={"alibi": False}), r"attn_config\.alibi=False"),
        (transformers.MptConfig(attn_config={"qk_ln": True}), r"attn_config\.qk_ln=True"),
        (transformers.FalconConfig(alibi=False), r"alibi=False"),
        (transformers.GPT2Config(add_cross_attention=True), r"add_cross_attention=True"),
        (transformers.MistralConfig(sliding_window=64), r"sliding_window=64"),
    ],
)
def test_models_without_a_way_to_alibi_are_refused_by_their_configuration(config, told, pretrained, data, tmp_path):
    config.save_pretrained(tmp_path / "model")  # there are no weights, and no tokenizer
    start = RunConfig(start_from=str(tmp_path / "model"), data=data)
    with pytest.raises(ValueError, match=rf"^start_from=.* cannot be trained with ALiBi: {told}"):
        check_start(start)
    with pytest.raises(ValueError, match="cannot be trained with ALiBi"):
        run(start, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("family", ["bloom", "mpt"])
def test_the_length_of_fine_tuning_is_that_of_the_model_from_then_on(pretrained, data, family, tmp_path):
    config = fine_tuning(pretrained(family), data)
    longer = dataclasses.replace(config.train, train_length=2 * LENGTH, batch_size=2)
    run(dataclasses.replace(config, train=longer), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["train_length"] == 2 * LENGTH
    model = load_pretrained(tmp_path / "run")
    assert extension_of(extend(model, scaling="linear")).scaling == Scaling("linear", train_length=2 * LENGTH)
    assert load_subject(str(tmp_path / "run"), device=CPU).train_length == 2 * LENGTH
    (tmp_path / "run" / "config.toml").unlink()
    assert starting_config(str(tmp_path / "run")).train.train_length == 2 * LENGTH


def test_the_loss_and_its_gradient_are_those_of_transformers(pretrained):
    model = transformers.AutoModelForCausalLM.from_pretrained(pretrained("llama"), dtype=torch.float32)
    tokens = torch.randint(0, 250, (3, LENGTH), generator=torch.Generator().manual_seed(1))
    expected = model(tokens, labels=tokens).loss
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    loss = next_token_loss(model)(tokens[:, :-1], tokens[:, 1:], torch.arange(LENGTH - 1).expand(3, -1))
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("family", ["gpt2", "llama", "bloom", "mpt", "falcon"])
def test_packed_documents_have_the_loss_and_gradients_that_each_has_alone(pretrained, data, family, monkeypatch):
    monkeypatch.setattr("longreach.verbs.start.AT_ONCE", 10)
    config = fine_tuning(pretrained(family), data)
    tokenizer = load_tokenizer(config.data.tokenizer)
    trainee = build_trainee(config, tokenizer, CPU, check_start(config))
    lengths = (7, 20, 1, 4)
    tokens, targets = torch.randint(0, 250, (2, 1, sum(lengths)), generator=torch.Generator().manual_seed(1))
    targets[:, 25:30] = IGNORED
    places = torch.cat([torch.arange(n) for n in lengths])[None]
    alone = [
        trainee.loss(*(x[:, start:end] for x in (tokens, targets, places))) * (targets[:, start:end] != IGNORED).sum()
        for start, end in pairwise([0, *accumulate(lengths)])
        if (targets[:, start:end] != IGNORED).any()
    ]
    expected = sum(alone) / (targets != IGNORED).sum()
    loss = trainee.loss(tokens, targets, places, torch.tensor([0, *accumulate(lengths)]))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    weights = list(trainee.model.parameters())
    for one, other in zip(*(torch.autograd.grad(x, weights) for x in (loss, expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_pretrained_model_is_trained_on_packed_documents(pretrained, data, tmp_path):
    config = fine_tuning(pretrained("bloom"), data)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, packing="documents"))
    record = run(config, tmp_path / "run")
    assert record.cut_documents > 0
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]


def test_float32_logits_are_not_kept_for_the_gradient(pretrained):
    model = transformers.AutoModelForCausalLM.from_pretrained(pretrained("llama"))  # bfloat16
    tokens = torch.randint(0, 250, (3, LENGTH), generator=torch.Generator().manual_seed(1))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        next_token_loss(model)(tokens, tokens, tokens)
    vocab_size = model.config.vocab_size
    assert kept
    assert not [tensor for tensor in kept if tensor.dtype == torch.float32 and tensor.shape[-1] == vocab_size]


# Evaluation


def perplexities(folder, corpus, **options):
    evaluate = EvaluateConfig(valid_lengths=(LENGTH, 4 * LENGTH), valid_tokens=256, strides=(4,), tasks=("perplexity",))
    config = EvaluationConfig(models=(str(folder),), evaluate=evaluate, device="cpu", **options)
    return evaluate_models(config, None, silent)


@pytest.mark.parametrize("family", ["gpt2", "mpt"])
def test_a_fine_tuned_model_is_measured_as_it_was_trained(pretrained, data, corpus, family, tmp_path):
    run(fine_tuning(pretrained(family), data, method="alibi:scaling=linear-fixed=2"), tmp_path / "run")
    results = perplexities(tmp_path / "run", corpus)
    record = next(r for r in results.records if r.valid_length == 4 * LENGTH and r.stride == 4 * LENGTH)
    assert (record.train_length, record.attention) == (LENGTH, "longreach")
    assert not results.skipped
    model = load_pretrained(tmp_path / "run")
    prepared = prepare(dataclasses.replace(data, tokenizer=str(tmp_path / "run")), 0)
    text = torch.from_numpy(prepared.valid.read(0, 257))
    windows = text[:-1].view(-1, 4 * LENGTH)
    with torch.no_grad():
        logits = model(windows, use_cache=False).logits
    expected = F.cross_entropy(logits.flatten(0, 1), text[1:], reduction="sum").item()
    assert record.nll == pytest.approx(expected, rel=1e-4)


def test_a_stock_model_is_measured_as_transformers_has_it(pretrained, corpus):
    results = perplexities(pretrained("mpt"), corpus, data=str(corpus))
    assert {record.attention for record in results.records} == {"transformers eager"}
    assert {record.valid_length for record in results.records} == {LENGTH}


@pytest.fixture
def scaled_by_length(pretrained, tmp_path):
    """A folder with a BLOOM whose slopes fall with the length of the input."""
    model = transformers.AutoModelForCausalLM.from_pretrained(pretrained("bloom"), dtype=torch.float32)
    save_pretrained(extend(model, scaling="linear", train_length=LENGTH), tmp_path)
    load_tokenizer(pretrained("bloom")).save(tmp_path / "tokenizer.json")
    return tmp_path


def test_a_stream_through_a_cache_has_the_slopes_of_its_whole_length(scaled_by_length):
    model = load_subject(str(scaled_by_length), device=CPU, train_length=LENGTH, adapt=adapt).model
    tokens = torch.randint(0, 250, (1, 4 * LENGTH), generator=torch.Generator().manual_seed(1))
    cache = model.new_cache(4 * LENGTH)
    with torch.no_grad():
        parts = [part for piece in tokens.split([20, 1, 43], dim=1) for part in model.logits(piece, 8, cache=cache)]
        whole = torch.cat(list(model.logits(tokens, 100)), dim=1)
        first = torch.cat(list(model.logits(tokens[:, :20], 100)), dim=1)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(first, whole[:, :20], atol=1e-2)  # 20 tokens alone have slopes of their own


def test_retrieval_from_a_model_scaled_by_length(scaled_by_length):
    evaluate = EvaluateConfig(tasks=("retrieval",), valid_lengths=(8 * LENGTH,), cases_per_depth=1, num_depths=1)
    config = EvaluationConfig(models=(str(scaled_by_length),), evaluate=evaluate, device="cpu", train_length=LENGTH)
    assert len(evaluate_models(config, None, silent).retrieval) == 1


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_converted_model_has_no_limit_and_no_use_for_positions(pretrained, family, tmp_path):
    save_pretrained(convert(transformers.AutoModelForCausalLM.from_pretrained(pretrained(family))), tmp_path)
    load_tokenizer(pretrained(family)).save(tmp_path / "tokenizer.json")
    subject = load_subject(str(tmp_path), device=CPU, adapt=adapt)
    assert subject.max_length is None
    tokens = torch.randint(0, 250, (1, 4 * LENGTH))
    assert torch.cat(list(subject.model.logits(tokens, 100)), dim=1).shape[1] == 4 * LENGTH
    with pytest.raises(Unsupported, match="takes no positions: measure it without offsets"):
        list(subject.model.logits(tokens, 100, positions=torch.arange(4 * LENGTH)[None]))


def test_a_fine_tuned_model_is_no_run_of_our_own(pretrained, data, tmp_path):
    run(fine_tuning(pretrained("gpt2"), data), tmp_path / "run")
    with pytest.raises(ValueError, match=r"run holds a Hugging Face model: longreach evaluate measures it"):
        open_run(tmp_path / "run")
