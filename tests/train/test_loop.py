import dataclasses
import json

import numpy as np
import pytest
import torch

from longreach.data.batches import Batches, BatchSource
from longreach.data.sequences import PackedDocuments, Sequences
from longreach.data.tokens import TokenStore, TokenStream
from longreach.models.config import ModelConfig
from longreach.models.decoder import Decoder
from longreach.models.files import load_model
from longreach.train import loop
from longreach.train.config import TrainConfig
from longreach.train.loop import decoder_trainee, resolve_device, train

RANDOMIZED = "rotary-randomized:range=1024"
"""With so many positions to draw from that no two draws are alike."""

MODEL = ModelConfig(vocab_size=32, train_length=8, longest_length=64, num_layers=2, num_heads=2, d_model=16)
CONFIG = TrainConfig(
    train_length=8, steps=12, batch_size=4, warmup_steps=2, checkpoint_every=5, device="cpu", learning_rate=1e-2
)


OF_THE_MACHINE = {"seconds", "tokens_per_second", "flops_per_second", "memory"}
"""What a step has that is no function of the run."""


class CountingBatches(BatchSource):
    """Sequences that count up from a start drawn from the step: a pure function of it, as `Batches` is."""

    def rows(self, step, rows):
        starts = np.random.default_rng(step).integers(0, 32, (CONFIG.batch_size, 1))[rows]
        return Sequences.of_blocks((starts + np.arange(CONFIG.train_length + 1)) % 32)


class Interrupted(Exception):
    pass


def interrupting(stop_after):
    def on_step(step):
        if step.step == stop_after:
            raise Interrupted

    return on_step


def run(folder, model=MODEL, config=CONFIG, stop_after=None):
    return train(builder(model), config, CountingBatches(), folder, interrupting(stop_after))


def builder(model):
    return lambda device: decoder_trainee(Decoder(model).to(device))


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def packed_batches(batch_size=4):
    """Documents of 1 to 11 tokens and eos, 0, for sequences of 8."""
    documents = [[*range(1, 1 + n % 11), 0] for n in range(1, 60)]
    store = TokenStore(np.concatenate(documents), np.cumsum([0, *map(len, documents)]))
    return Batches(PackedDocuments(TokenStream(store, range(len(documents))), 8, 0), batch_size, seed=0)


PACKED = dataclasses.replace(CONFIG, packing="documents")


def timeless(record):
    return dataclasses.replace(record, seconds=1.0, peak_memory=None)


def test_files_and_record(tmp_path):
    record = run(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "model.safetensors",
        "training.json",
    }
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert [line["tokens"] for line in lines] == [step * 32 for step in range(1, 13)]
    assert (record.method, record.train_length, record.steps, record.tokens) == ("alibi", 8, 12, 384)
    assert record.parameters == sum(p.numel() for p in Decoder(MODEL).parameters())
    assert record.final_loss == pytest.approx(sum(line["loss"] for line in lines) / 12)
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_first_loss_and_gradient_are_those_of_the_model(tmp_path):
    run(tmp_path)
    torch.manual_seed(CONFIG.seed)
    model = Decoder(MODEL)
    tokens, targets, _ = CountingBatches().rows(0, range(CONFIG.batch_size))
    loss = model.loss(torch.from_numpy(tokens), torch.from_numpy(targets))
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    first = metrics(tmp_path)[0]
    assert first["loss"] == loss.item()
    assert first["gradient_norm"] == pytest.approx(norm.item(), rel=1e-6)


@pytest.mark.parametrize("stop_after", [1, 5, 7, 11, 12])
@pytest.mark.parametrize(
    "model",
    [
        MODEL,
        dataclasses.replace(MODEL, method="sinusoidal-shifted"),
        dataclasses.replace(MODEL, method=RANDOMIZED),
        dataclasses.replace(MODEL, residual_dropout=0.3, attention_dropout=0.2),
    ],
    ids=["alibi", "sinusoidal-shifted", "rotary-randomized", "dropout"],
)
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, model, stop_after):
    whole = run(tmp_path / "whole", model)
    with pytest.raises(Interrupted):
        run(tmp_path / "parts", model, stop_after=stop_after)
    resumed = run(tmp_path / "parts", model)
    assert timeless(resumed) == timeless(whole)
    parts, expected = (
        [{name: value for name, value in line.items() if name not in OF_THE_MACHINE} for line in metrics(tmp_path / of)]
        for of in ("parts", "whole")
    )
    assert parts == expected
    weights = load_model(tmp_path / "parts").state_dict()
    for name, tensor in load_model(tmp_path / "whole").state_dict().items():
        assert torch.equal(weights[name], tensor), name


def test_a_torn_last_line_of_metrics_is_dropped(tmp_path):
    with pytest.raises(Interrupted):
        run(tmp_path, stop_after=7)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "lo')
    run(tmp_path)
    assert [line["step"] for line in metrics(tmp_path)] == list(range(1, 13))


def test_a_finished_run_is_not_run_again(tmp_path):
    first = run(tmp_path)
    before = (tmp_path / "model.safetensors").stat().st_mtime_ns
    assert run(tmp_path) == first
    assert (tmp_path / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize("method", ["alibi", "sinusoidal-shifted", RANDOMIZED])
def test_accumulation_changes_nothing_but_rounding(tmp_path, method):
    model = dataclasses.replace(MODEL, method=method)
    whole = run(tmp_path / "whole", model)
    parts = run(tmp_path / "parts", model, dataclasses.replace(CONFIG, accumulation=4))
    assert parts.final_loss == pytest.approx(whole.final_loss, rel=1e-4)
    assert metrics(tmp_path / "parts")[0]["loss"] == pytest.approx(metrics(tmp_path / "whole")[0]["loss"], rel=1e-6)


@pytest.mark.parametrize("method", ["alibi", "t5", "sinusoidal-shifted"])
def test_packed_documents_are_trained_on_as_if_they_stood_alone(tmp_path, method):
    record = train(builder(dataclasses.replace(MODEL, method=method)), PACKED, packed_batches(), tmp_path)
    torch.manual_seed(CONFIG.seed)
    model = decoder_trainee(Decoder(dataclasses.replace(MODEL, method=method))).model
    rows = packed_batches().rows(0, range(4))
    offsets = torch.randint(65, (4, 1)) if method == "sinusoidal-shifted" else torch.zeros(4, 1, dtype=torch.int64)
    losses, counts = [], []
    for row, places in enumerate(rows.places):
        for part in np.split(np.arange(8), np.flatnonzero(places == 0)[1:]):
            tokens, targets = (torch.from_numpy(x[row, part])[None] for x in (rows.tokens, rows.targets))
            if (targets >= 0).all():
                losses.append(model.loss(tokens, targets, offsets[row] + torch.arange(len(part))[None]).item())
                counts.append(len(part))
    lines = metrics(tmp_path)
    assert lines[0]["loss"] == pytest.approx(np.average(losses, weights=counts), rel=1e-6)
    batches = [packed_batches().rows(step, range(4)).targets for step in range(12)]
    assert lines[0]["tokens"] == sum(counts) == (batches[0] >= 0).sum()
    assert lines[-1]["tokens"] == record.tokens == sum((targets >= 0).sum() for targets in batches)
    assert record.cut_documents == sum(n % 11 + 1 > 8 for n in range(1, 60))


@pytest.mark.parametrize("method", ["alibi", RANDOMIZED])
def test_packed_documents_in_parts_and_resumed_are_those_of_one_start(tmp_path, method):
    build = builder(dataclasses.replace(MODEL, method=method))
    whole = train(build, PACKED, packed_batches(), tmp_path / "whole")
    config = dataclasses.replace(PACKED, accumulation=2)
    parts = train(build, config, packed_batches(), tmp_path / "parts")
    assert parts.final_loss == pytest.approx(whole.final_loss, rel=1e-4)
    for name, expected in {"loss": 1e-6, "gradient_norm": 1e-5}.items():
        one, other = (metrics(tmp_path / folder)[0][name] for folder in ("parts", "whole"))
        assert one == pytest.approx(other, rel=expected)
    with pytest.raises(Interrupted):
        train(build, PACKED, packed_batches(), tmp_path / "again", interrupting(7))
    assert timeless(train(build, PACKED, packed_batches(), tmp_path / "again")) == timeless(whole)


@pytest.mark.parametrize("method", ["alibi", "fire", "sinusoidal-shifted"])
def test_a_curriculum_cuts_the_sequences_of_the_same_batches(tmp_path, method):
    model = dataclasses.replace(MODEL, method=method)
    config = dataclasses.replace(CONFIG, curriculum=("2:50%", "4:25%", "8:25%"))
    record = train(builder(model), config, CountingBatches(), tmp_path / "run")
    assert record.tokens == 12 * 4 * 8
    assert (record.model.train_length, record.steps) == (8, 12)
    torch.manual_seed(CONFIG.seed)
    first = decoder_trainee(Decoder(model)).model
    tokens, targets, _ = (x if x is None else torch.from_numpy(x) for x in CountingBatches().rows(0, range(4)))
    starts = torch.randint(65, (4, 1)) if method == "sinusoidal-shifted" else torch.zeros(4, 1, dtype=torch.int64)
    losses = [
        first.loss(tokens[:, at : at + 2], targets[:, at : at + 2], starts + torch.arange(2)).item()
        for at in range(0, 8, 2)
    ]
    assert metrics(tmp_path / "run")[0]["loss"] == pytest.approx(sum(losses) / 4, rel=1e-6)
    with pytest.raises(Interrupted):
        train(builder(model), config, CountingBatches(), tmp_path / "parts", interrupting(8))
    assert timeless(train(builder(model), config, CountingBatches(), tmp_path / "parts")) == timeless(record)


def test_a_curriculum_cuts_packed_documents_too(tmp_path):
    lengths = []

    def build(device):
        trainee = builder(MODEL)(device)

        def loss(tokens, targets, positions, borders):
            lengths.append((int(borders.diff().max()), int(positions.max()) + 1))
            return trainee.loss(tokens, targets, positions, borders)

        return dataclasses.replace(trainee, loss=loss)

    config = dataclasses.replace(PACKED, curriculum=("4:50%", "8:50%"))
    record = train(build, config, packed_batches(), tmp_path / "run")
    assert lengths == [(4, 4)] * 6 + [(8, 8)] * 6
    assert record.tokens == train(builder(MODEL), PACKED, packed_batches(), tmp_path / "whole").tokens


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own look at it
def test_compiled_training_is_the_same_training(tmp_path, monkeypatch):
    # The eager backend traces the model without needing a C++ compiler.
    compile_with = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: compile_with(f, backend="eager"))
    compiled = run(tmp_path / "compiled", config=dataclasses.replace(CONFIG, compile=True))
    assert timeless(compiled) == timeless(run(tmp_path / "plain"))


@pytest.mark.parametrize("changes", [{"recompute": True}, {"async_checkpoint": True}, {"keep_checkpoints": 3}], ids=str)
def test_what_saves_memory_or_time_changes_no_step(tmp_path, changes):
    model = dataclasses.replace(MODEL, residual_dropout=0.3, method=RANDOMIZED)
    whole = run(tmp_path / "whole", model)
    config = dataclasses.replace(CONFIG, **changes)
    with pytest.raises(Interrupted):
        run(tmp_path / "run", model, config, stop_after=11)
    assert timeless(run(tmp_path / "run", model, config)) == timeless(whole)
    assert not list((tmp_path / "run").glob("checkpoint*"))


def test_recomputed_blocks_run_twice(tmp_path, monkeypatch):
    calls = []
    forward = loop.Decoder.__init__.__globals__["Block"].forward
    monkeypatch.setattr("longreach.models.decoder.Block.forward", lambda *a: calls.append(1) or forward(*a))
    for recompute, times in ((False, 1), (True, 2)):
        calls.clear()
        run(tmp_path / str(recompute), config=dataclasses.replace(CONFIG, recompute=recompute))
        assert len(calls) == times * MODEL.num_layers * CONFIG.steps


def test_validation_is_measured_between_steps_and_changes_none(tmp_path):
    model = dataclasses.replace(MODEL, residual_dropout=0.3)
    config = dataclasses.replace(CONFIG, validate_every=4)
    valid = [np.arange(36).reshape(4, 9) % 32] * 2
    record = train(builder(model), config, CountingBatches(), tmp_path / "run", valid_batches=valid)
    assert timeless(record) == timeless(run(tmp_path / "whole", model))
    measured = {line["step"]: line["valid_loss"] for line in metrics(tmp_path / "run") if "valid_loss" in line}
    assert list(measured) == [4, 8, 12]
    tokens = torch.from_numpy(valid[0])
    last = load_model(tmp_path / "run").loss(tokens[:, :-1], tokens[:, 1:])
    assert measured[12] == pytest.approx(last.item(), rel=1e-6)


def test_shifted_training_draws_positions_up_to_the_longest_length(tmp_path, monkeypatch):
    seen = []
    embed = loop.Decoder.loss

    def loss(self, tokens, targets, positions=None):
        seen.append(positions)
        return embed(self, tokens, targets, positions)

    monkeypatch.setattr(loop.Decoder, "loss", loss)
    run(tmp_path, dataclasses.replace(MODEL, method="sinusoidal-shifted"))
    starts = torch.cat([positions[:, 0] for positions in seen])
    assert all(torch.equal(p - p[:, :1], torch.arange(8).expand(4, -1)) for p in seen)
    assert starts.min() >= 0
    assert 32 < starts.max() <= 64
    assert len(starts.unique()) > 20


@pytest.mark.parametrize("packing", ["blocks", "documents"])
def test_randomized_training_draws_positions_once_for_all_of_a_batch(tmp_path, packing):
    """As in the paper (Ruoss et al., 2023, Section 3): from 0 to N - 1, N = 1024, without order, sorted."""
    seen = []

    def build(device):
        trainee = builder(dataclasses.replace(MODEL, method=RANDOMIZED))(device)

        def loss(tokens, targets, positions, *borders):
            seen.append(positions)
            return trainee.loss(tokens, targets, positions, *borders)

        return dataclasses.replace(trainee, loss=loss)

    batches = CountingBatches() if packing == "blocks" else packed_batches()
    train(build, dataclasses.replace(CONFIG, packing=packing, accumulation=2), batches, tmp_path)
    draws = [torch.cat((one, other)).unique() for one, other in zip(seen[::2], seen[1::2], strict=True)]
    assert len(draws) == CONFIG.steps
    assert all(len(draw) == 8 for draw in draws)
    assert len(torch.stack(draws).unique(dim=0)) == CONFIG.steps
    assert max(map(int, map(torch.max, draws))) > 512
    if packing == "blocks":
        assert all(torch.equal(positions, positions[:1].sort().values.expand(2, -1)) for positions in seen)


@pytest.mark.parametrize("changes", [{"learning_rate": 1e300}, {"learning_rate": 1e39}, {"weight_decay": 1e300}])
@pytest.mark.parametrize("keeps", [{}, {"final_learning_rate": 1.0}, {"checkpoint_every": 1, "steps": 2}])
def test_weights_that_a_step_made_infinite_are_not_kept(tmp_path, changes, keeps):
    config = dataclasses.replace(CONFIG, **({"steps": 1, "warmup_steps": 0} | keeps | changes))
    with pytest.raises(FloatingPointError, match=r"^step 1: the weights are no longer finite; .*; try a learning_rate"):
        train(builder(MODEL), config, CountingBatches(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_divergence_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    config = dataclasses.replace(CONFIG, checkpoint_every=1)

    def poison(step):
        if step.step == 3:
            for module in loop_run[0].trainee.model.modules():
                if isinstance(module, torch.nn.Linear):
                    module.weight.data.fill_(float("nan"))

    loop_run = []
    init = loop._Run.__init__

    def remember(self, *arguments):
        init(self, *arguments)
        loop_run.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop._Run, "__init__", remember)
        config = dataclasses.replace(config, checkpoint_every=2)
        with pytest.raises(FloatingPointError, match=r"^step 4: loss=nan, .*; try a learning_rate below 0\.01$"):
            train(builder(MODEL), config, CountingBatches(), tmp_path, poison)
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3]
    resumed = train(builder(MODEL), config, CountingBatches(), tmp_path)
    assert np.isfinite(resumed.final_loss)


def test_a_damaged_checkpoint_is_named(tmp_path):
    with pytest.raises(Interrupted):
        run(tmp_path, stop_after=7)
    (tmp_path / "checkpoint-5" / "0.safetensors").write_bytes(b"torn")
    with pytest.raises(
        ValueError, match=r"checkpoint-5 is damaged \(.*\); delete it to train this run from the start$"
    ):
        run(tmp_path)


def test_a_damaged_training_record_is_named(tmp_path):
    run(tmp_path)
    (tmp_path / "training.json").write_text('{"method": 3')
    with pytest.raises(ValueError, match=r"training\.json is damaged .*: delete its folder"):
        run(tmp_path)


def test_damaged_metrics_are_named(tmp_path):
    with pytest.raises(Interrupted):
        run(tmp_path, stop_after=6)
    lines = (tmp_path / "metrics.jsonl").read_text().replace('"loss": ', '"loss": "low", "lost": ', 1)
    (tmp_path / "metrics.jsonl").write_text(lines)
    with pytest.raises(ValueError, match=r"metrics\.jsonl is damaged \(line 1: unknown key 'lost'"):
        run(tmp_path)


def test_bf16_keeps_weights_in_fp32(tmp_path):
    run(tmp_path, config=dataclasses.replace(CONFIG, precision="bf16"))
    assert all(p.dtype == torch.float32 for p in load_model(tmp_path).parameters())
    bf16 = [line["loss"] for line in metrics(tmp_path)]
    run(tmp_path / "fp32", config=dataclasses.replace(CONFIG, precision="fp32"))
    fp32 = [line["loss"] for line in metrics(tmp_path / "fp32")]
    assert bf16 != fp32
    assert bf16 == pytest.approx(fp32, rel=0.05)


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "cpuu"])
def test_a_device_that_is_not_there_is_named(device):
    with pytest.raises(ValueError, match=rf"^device='{device}' is not to be had here \(.*\); give cpu$"):
        resolve_device(device)


@pytest.mark.parametrize(
    ("precision", "major", "expected"), [("auto", 7, False), ("auto", 8, True), ("auto", 9, True), ("bf16", 7, True)]
)
def test_bf16_is_not_chosen_for_gpus_that_emulate_it(monkeypatch, precision, major, expected):
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: major >= 8 or including_emulation
    )
    config = dataclasses.replace(CONFIG, precision=precision)
    assert loop.runs_in_bf16(config, torch.device("cuda")) == expected
