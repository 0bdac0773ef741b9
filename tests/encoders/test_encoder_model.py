"""Every layout against its equations in float64 (published.py), and each quirk alone."""

from dataclasses import replace

import pytest
import torch
from published import Published, expected, write

import longreach
from longreach.encoders.layouts.blocks import Linear
from longreach.encoders.model import EncoderModel, PublishedConfig
from longreach.encoders.packing import Dense, Packed

KINDS = {
    "jina": Published("jina"),
    "reglu": Published("jina", feed_forward="reglu", prefix="bert."),
    "jina-code": Published("jina-code"),
    "original": Published("original"),
    "mosaic": Published("mosaic", prefix="bert.", head="lm"),
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request, tmp_path_factory):
    """A published encoder, its weights, and what is loaded of its folder in float64."""
    published = KINDS[request.param]
    folder = write(published, tmp_path_factory.mktemp("encoder"))
    return published, published.weights(), longreach.load_encoder(folder, dtype=torch.float64)


def draw(*shape):
    return torch.randint(5, 28, shape, generator=torch.Generator().manual_seed(sum(shape)))


def assert_close(actual, right):
    """1e-6 relative: slopes in float32 move a score of the furthest key that matters by 100 * 2^-24 and less."""
    assert (actual - right).abs().max() <= 1e-6 * right.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 40, 300, 1500])
def test_it_computes_its_equations(kind, length):
    published, weights, model = kind
    ids = draw(length)
    assert_close(model(ids[None]).last_hidden_state[0], expected(published, weights, ids))


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_is_that_of_its_text_alone_and_padding_is_0(kind, side):
    published, weights, model = kind
    ids, mask = draw(4, 40), torch.ones(4, 40, dtype=torch.int64)
    for row, length in enumerate((40, 25, 1, 0)):
        mask[row, length:] = 0
    if side == "left":
        mask = mask.flip(1)
    output = model(ids, mask)
    for row, seen in enumerate(mask.bool()):
        hidden = output.last_hidden_state[row]
        assert not hidden[~seen].any()
        if seen.any():
            assert_close(hidden[seen], expected(published, weights, ids[row, seen]))
    first = torch.zeros(4, 48, dtype=torch.float64)  # that of no tokens stays 0
    for row, seen in enumerate(mask.bool()):
        if seen.any():
            first[row] = output.last_hidden_state[row, seen][0]
    weight, bias = (weights[f"{published.prefix}pooler.dense.{part}"].double() for part in ("weight", "bias"))
    torch.testing.assert_close(output.pooler_output, (first @ weight.T + bias).tanh())
    assert model(ids[:, :0]).pooler_output.shape == (4, 48)


@torch.no_grad()
def test_token_types_embeddings_and_states(kind):
    published, weights, model = kind
    ids, types = draw(1, 30), torch.arange(30)[None] % 2
    right = expected(published, weights, ids[0], types[0])
    output = model(ids, token_type_ids=types, output_hidden_states=True)
    assert_close(output.last_hidden_state[0], right)
    assert len(output.hidden_states) == 1 + published.layers
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)
    words = model.get_input_embeddings()(ids)
    assert_close(model(inputs_embeds=words, token_type_ids=types, return_dict=False)[0][0], right)


@torch.no_grad()
def test_gradients_are_those_of_the_equations(kind):
    published, weights, model = kind
    ids, names = draw(20), list(weights)
    with torch.enable_grad():
        leaves = {name: x.double().requires_grad_() for name, x in weights.items()}
        expected(published, leaves, ids).square().sum().backward()
        model.zero_grad()
        model(ids[None]).last_hidden_state.square().sum().backward()
    for name in names:
        at = name.removeprefix(published.prefix)
        if at.startswith("encoder"):
            torch.testing.assert_close(model.get_parameter(at).grad, leaves[name].grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("layout", "mistake"),
    [
        ("jina-code", "the residual once"),
        ("jina-code", "q and k normed by head"),
        ("jina-code", "the other half is the gate"),
        ("jina", "the other half is the gate"),
        ("mosaic", "the other half is the gate"),
    ],
)
def test_quirks_are_told_apart(layout, mistake):
    """What a plausible reading of the files would compute is far away, so that the equality above says something."""
    published, ids = KINDS[layout], draw(30)
    weights = published.weights()
    right, wrong = (expected(published, weights, ids, mistake=what) for what in ("", mistake))
    assert (right - wrong).abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("scaling", ["linear", "ntk", "linear-fixed=4"])
def test_each_text_is_scaled_by_its_own_length(scaling, tmp_path):
    folder = write(KINDS["jina"], tmp_path)
    model = longreach.load_encoder(folder, scaling=scaling, train_length=20, dtype=torch.float64)
    plain = longreach.load_encoder(folder, dtype=torch.float64)
    ids, mask = draw(2, 60), torch.ones(2, 60)
    mask[1, 15:] = 0
    rows = model(ids, mask).last_hidden_state
    torch.testing.assert_close(rows[:1], model(ids[:1]).last_hidden_state)
    torch.testing.assert_close(rows[1:, :15], model(ids[1:, :15]).last_hidden_state)
    assert (rows[:1] - plain(ids[:1]).last_hidden_state).abs().max() > 1e-3
    assert torch.equal(rows[1], plain(ids, mask).last_hidden_state[1]) == (scaling != "linear-fixed=4")


def test_scaling_from_a_longer_length_changes_the_slopes_as_interpolation_says(tmp_path, monkeypatch):
    seen = []
    model = longreach.load_encoder(write(KINDS["jina"], tmp_path), scaling="linear", train_length=20)
    monkeypatch.setattr(
        "longreach.encoders.packing.attention", lambda q, k, v, **options: (seen.append(options["slopes"]), v)[1]
    )
    with torch.no_grad():
        model(draw(1, 80))
    torch.testing.assert_close(seen[0], longreach.alibi_slopes(12) / 4)


@torch.no_grad()
def test_16k_tokens_run_without_a_table(tmp_path):
    published = replace(KINDS["jina"], heads=2, width=16, layers=1, inner=16)
    model = longreach.load_encoder(write(published, tmp_path), scaling="ntk", train_length=8192)
    ids = draw(16_384)
    hidden = model(ids[None]).last_hidden_state[0]
    assert hidden.isfinite().all()
    assert sum(x.numel() for x in model.buffers()) == 0


@torch.no_grad()
def test_half_types_are_near(kind):
    model, ids = kind[2], draw(1, 50)
    half = longreach.load_encoder(model.base_model.source.name, dtype=torch.bfloat16)
    difference = (half(ids).last_hidden_state.double() - model(ids).last_hidden_state).abs().max()
    assert difference < 0.3  # outputs of up to 4, through some ten roundings of 2^-8 each
    assert half.dtype == torch.bfloat16


def test_packing():
    mask = torch.tensor([[0, 1, 1], [1, 1, 0], [0, 0, 0], [1, 1, 1]])
    packed = Packed.of(mask, (4, 3))
    assert packed.lengths == (2, 2, 0, 3)
    x = torch.arange(24.0).view(4, 3, 2)
    rows = packed.gather(x)
    assert rows.shape == (7, 2)
    assert torch.equal(packed.scatter(rows), x * mask[..., None])
    first = torch.stack([x[0, 1], x[1, 0], torch.zeros(2), x[3, 0]])
    assert torch.equal(packed.first(rows), first)
    assert torch.equal(Dense(mask).first(x), first)
    assert torch.equal(Dense(None).first(x), x[:, 0])
    with pytest.raises(ValueError, match="row 1: pad at the ends"):
        Packed.of(torch.tensor([[1, 1, 1], [1, 0, 1]]), (2, 3))
    with pytest.raises(ValueError, match=r"shape \(2, 4\): give that of the ids, \(2, 3\)"):
        Packed.of(torch.ones(2, 4), (2, 3))


@torch.no_grad()
@pytest.mark.parametrize("scaling", ["none", "linear"])
def test_texts_elsewhere_are_packed_with_borders(scaling, tmp_path, monkeypatch):
    """As on GPUs, where neighbours of the same slopes share a call: what is beyond L = 6 has slopes of its own."""
    model = longreach.load_encoder(write(KINDS["jina"], tmp_path), scaling=scaling, train_length=6, dtype=torch.float64)
    packed, ids = Packed((3, 5, 0, 2, 9, 9, 7)), draw(35)
    right, calls = model.encode_packed(ids, packed), Packed._calls
    elsewhere = list(calls(packed, torch.device("cuda"), model.sizes.scaling))
    assert elsewhere == ([[3, 5, 0, 2, 9, 9, 7]] if scaling == "none" else [[3, 5, 0, 2], [9, 9], [7]])
    monkeypatch.setattr(Packed, "_calls", lambda *_: iter(elsewhere))
    torch.testing.assert_close(model.encode_packed(ids, packed), right, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "give one of input_ids and inputs_embeds"),
        ({"input_ids": draw(1, 3), "inputs_embeds": torch.zeros(1, 3, 48)}, "give one of input_ids and inputs_embeds"),
        ({"input_ids": torch.ones(1, 3)}, r"input_ids of shape \(1, 3\) and torch.float32: give \(B, T\) int64"),
        ({"input_ids": torch.ones(3, dtype=torch.int64)}, r"input_ids of shape \(3,\)"),
        ({"inputs_embeds": torch.zeros(3, 48)}, r"inputs_embeds of shape \(3, 48\)"),
        ({"input_ids": draw(1, 3), "token_type_ids": draw(1, 1)}, r"token_type_ids of shape \(1, 1\)"),
        ({"input_ids": draw(1, 3), "token_type_ids": torch.zeros(1, 3)}, r"token_type_ids of .*float32: give \(B, T\)"),
        (
            {"input_ids": draw(1, 3) + 10**6},
            r"^input_ids has ids that Embedding\(.*\) has not: give",
        ),
        (
            {"input_ids": draw(1, 3) - 10**6},
            r"^input_ids has ids that Embedding\(.*\) has not: give",
        ),
        (
            {"input_ids": draw(1, 3), "token_type_ids": draw(1, 3) + 9},
            r"^token_type_ids has ids that Embedding\(2, 48\)",
        ),
        ({"input_ids": [[1, 2, 3]]}, "^input_ids of list: give a tensor"),
        ({"input_ids": draw(1, 3), "attention_mask": [[1, 1, 1]]}, "^attention_mask of list: give a tensor"),
        ({"input_ids": draw(1, 3), "token_type_ids": "x"}, "^token_type_ids of str: give a tensor"),
        ({"inputs_embeds": torch.zeros(1, 3, 47)}, "^inputs_embeds of width 47: give C = 48"),
        ({"inputs_embeds": torch.ones(1, 3, 48).long()}, r"inputs_embeds .* torch.int64: give \(B, T, C\) floating"),
    ],
)
def test_one_kind_of_input(kind, given, said):
    with pytest.raises(ValueError, match=said):
        kind[2](**given)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # the name in every version of today
def test_gradient_checkpointing_computes_layers_once_more_to_the_same_gradients(tmp_path):
    model = longreach.load_encoder(write(replace(KINDS["jina"], extra={"hidden_dropout_prob": 0.0}), tmp_path)).train()
    ids, runs, gradients = draw(2, 20), [], []
    model.encoder.layer[0].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    for _ in range(2):
        model.zero_grad()
        model(ids).last_hidden_state.square().sum().backward()
        gradients.append([x.grad.clone() for x in model.encoder.parameters()])
        model.gradient_checkpointing_enable()
    assert len(runs) == 1 + 2
    for before, after in zip(*gradients, strict=True):
        torch.testing.assert_close(after, before)


def test_dropout_is_for_training_alone(tmp_path):
    extra = {"attention_probs_dropout_prob": 0.5}
    model = longreach.load_encoder(write(replace(KINDS["original"], extra=extra), tmp_path))
    ids = draw(1, 20)
    assert torch.equal(model(ids)[0], model(ids)[0])
    model.train()
    assert not torch.equal(model(ids)[0], model(ids)[0])


def test_a_new_model_begins_with_random_weights():
    config = PublishedConfig(**KINDS["jina"].config())
    model = EncoderModel(config)
    assert model(draw(1, 5)).last_hidden_state.isfinite().all()
    assert not hasattr(config, "auto_map")


@pytest.mark.parametrize("rows", [(1,), (7,), (2, 33), (0,)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers_for_inference(rows, bias):
    """oneDNN's sums of 48 products err no more than any others of float32 may."""
    linear = Linear(48, 64, bias=bias)
    x = torch.randn(*rows, 48)
    with torch.no_grad():
        out, right = linear(x), linear.double()(x.double())
    linear.float()
    assert out.shape == (*rows, 64)
    torch.testing.assert_close(out.double(), right, rtol=0, atol=48 * 2.0**-24 * 4)
    linear(x.requires_grad_()).sum().backward()
    assert x.grad.shape == x.shape
