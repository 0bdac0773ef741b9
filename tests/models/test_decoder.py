import itertools
import math
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from variants import ARCHITECTURES, DYNAMIC, METHODS, STRETCHED

from longreach.models.config import ModelConfig
from longreach.models.decoder import Decoder
from longreach.models.kv_cache import KVCache
from longreach.ops.alibi import alibi_slopes

TOLERANCE = 1e-12
"""Of float64 logits up to 10 behind some 10 products, each a sum of at most 64 terms: 10 * 10 * 64 * 2^-53 = 7e-13."""

LENGTH = 21

PARTS = (
    "attention_norm",
    "attention.qkv",
    "attention.out",
    "feed_forward_norm",
    "feed_forward.up",
    "feed_forward.down",
)
"""Of a block: those that have weights."""


def in_chunks(model, tokens, chunks, **arguments):
    """Logits of tokens fed chunk by chunk through a cache."""
    cache = KVCache()
    outs = [model(part, cache=cache, **arguments) for part in tokens.split(chunks, dim=1)]
    assert cache.length == tokens.shape[1]
    return torch.cat(outs, dim=1)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("method", [*METHODS, *DYNAMIC])
@torch.no_grad()
def test_cached_decoding_equals_the_full_forward(build, tokens_of, method, architecture):
    model = build(method, **ARCHITECTURES[architecture])
    tokens = tokens_of(2, LENGTH)
    told = {"length": 30} if model.positions.depends_on_length else {}
    full = model(tokens, **told)
    for chunks in ([1] * LENGTH, [LENGTH], [8, 1, 1, 7, 4], [1, 20], [3, 3, 3, 3, 9]):
        torch.testing.assert_close(in_chunks(model, tokens, chunks, **told), full, rtol=0, atol=TOLERANCE)


@settings(max_examples=25, deadline=None)
@given(borders=st.sets(st.integers(1, LENGTH - 1)), method=st.sampled_from(METHODS + DYNAMIC), seed=st.integers(0, 99))
@torch.no_grad()
def test_any_chunks_give_the_full_forward(build, tokens_of, borders, method, seed):
    model, tokens = build(method, num_kv_heads=2), tokens_of(1, LENGTH, seed=seed)
    told = {"length": LENGTH} if model.positions.depends_on_length else {}
    edges = [0, *sorted(borders), LENGTH]
    chunks = [stop - start for start, stop in itertools.pairwise(edges)]
    torch.testing.assert_close(in_chunks(model, tokens, chunks, **told), model(tokens), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("max_context", [1, 5, LENGTH])
@pytest.mark.parametrize("method", [*METHODS, *DYNAMIC])
@torch.no_grad()
def test_a_bounded_cache_shows_each_token_its_last_ones(build, tokens_of, method, max_context):
    # With one layer, keys and values are made from single tokens: a recomputed window sees what the cache shows.
    model, tokens = build(method, num_layers=1), tokens_of(1, LENGTH)
    for chunks in ([1] * LENGTH, [LENGTH], [8, 1, 1, 7, 4]):
        cache = model.new_cache(LENGTH, max_context)
        streamed = torch.cat([model(part, cache=cache) for part in tokens.split(chunks, dim=1)], dim=1)
        for token in range(LENGTH):
            window = slice(max(0, token + 1 - max_context), token + 1)
            told = {"positions": torch.arange(LENGTH)[None, window], "length": min(max_context, LENGTH)}
            alone = model(tokens[:, window], **told)[0, -1]
            torch.testing.assert_close(streamed[0, token], alone, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_chunks_through_a_bounded_cache_change_nothing(build, tokens_of, method):
    model, tokens = build(method), tokens_of(2, LENGTH)
    whole = model(tokens, cache=model.new_cache(LENGTH, 6))
    for chunks in ([1] * LENGTH, [3, 3, 3, 3, 9], [20, 1]):
        cache = model.new_cache(LENGTH, 6)
        streamed = torch.cat([model(part, cache=cache) for part in tokens.split(chunks, dim=1)], dim=1)
        torch.testing.assert_close(streamed, whole, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_rows_may_stand_at_positions_of_their_own(build, tokens_of, method):
    model, tokens = build(method), tokens_of(2, LENGTH)
    positions = torch.arange(LENGTH) + torch.tensor([[0], [3]])
    together = model(tokens, positions=positions)
    alone = torch.cat([model(tokens[row, None], positions=positions[row, None]) for row in range(2)])
    torch.testing.assert_close(together, alone, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("method", [*METHODS, *DYNAMIC])
@torch.no_grad()
def test_is_causal_and_uses_the_past(build, tokens_of, method):
    model, tokens = build(method), tokens_of(1, LENGTH)
    changed = tokens.clone()
    changed[0, 10] = (tokens[0, 10] + 1) % 50
    difference = (model(changed) - model(tokens)).abs().amax(dim=-1)[0]
    assert difference[:10].max() < TOLERANCE
    assert (difference[10:] > 1e-6).all()


@pytest.mark.parametrize("method", [method for method in (*METHODS, *DYNAMIC) if method != "none"])
@torch.no_grad()
def test_order_of_the_past_matters(build, tokens_of, method):
    model, tokens = build(method, num_layers=1), tokens_of(1, LENGTH)
    swapped = tokens[:, [*range(LENGTH - 3), LENGTH - 2, LENGTH - 3, LENGTH - 1]]
    assert (model(swapped) - model(tokens))[0, -1].abs().max() > 1e-9


@torch.no_grad()
def test_one_layer_without_positions_sees_a_bag_of_tokens(build, tokens_of):
    model, tokens = build("none", num_layers=1), tokens_of(1, LENGTH)
    shuffled = torch.cat((tokens[:, :-1].flip(1), tokens[:, -1:]), dim=1)
    torch.testing.assert_close(model(shuffled)[:, -1], model(tokens)[:, -1], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("method", ["alibi", "rotary", "t5", "none"])
@torch.no_grad()
def test_relative_methods_do_not_mind_where_a_sequence_starts(build, tokens_of, method):
    model, tokens = build(method), tokens_of(1, LENGTH)
    shifted = model(tokens, positions=torch.arange(100, 100 + LENGTH)[None])
    # Rotary's angles are float32: up to 121, of unit-sized scores, through two layers.
    tolerance = 1e-3 if method == "rotary" else 0.0
    torch.testing.assert_close(shifted, model(tokens), rtol=0, atol=tolerance)


def attend(q, k, v, bias):
    """Causal attention written out, (T, H, D) each."""
    scores = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(q.shape[-1]) + bias
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return torch.einsum("hij,jhd->ihd", scores.masked_fill(hidden, -math.inf).softmax(-1), v).flatten(1)


@torch.no_grad()
def test_the_plain_form_is_mpts(build, tokens_of):
    """The conditions under which MPT holds the weights, as the forward pass that it makes of them."""
    model, tokens = build("alibi"), tokens_of(1, LENGTH)
    weights = model.state_dict()
    assert not [name for name in weights if "bias" in name]
    assert set(weights) == {
        "vocabulary.embedding.weight",
        "norm.weight",
        *(f"blocks.{layer}.{part}.weight" for layer in range(2) for part in PARTS),
    }
    assert weights["blocks.0.feed_forward.up.weight"].shape == (4 * 32, 32)
    distance = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    bias = -alibi_slopes(4).double()[:, None, None] * distance

    def norm(x, name):
        return F.layer_norm(x, (32,), weights[f"{name}.weight"], None, 1e-5)

    x = weights["vocabulary.embedding.weight"][tokens[0]]
    for layer in range(2):
        prefix = f"blocks.{layer}"
        qkv = norm(x, f"{prefix}.attention_norm") @ weights[f"{prefix}.attention.qkv.weight"].T
        q, k, v = (part.view(LENGTH, 4, 8) for part in qkv.chunk(3, dim=-1))
        x = x + attend(q, k, v, bias) @ weights[f"{prefix}.attention.out.weight"].T
        up = norm(x, f"{prefix}.feed_forward_norm") @ weights[f"{prefix}.feed_forward.up.weight"].T
        gelu = up * (1 + torch.erf(up / math.sqrt(2))) / 2
        x = x + gelu @ weights[f"{prefix}.feed_forward.down.weight"].T
    expected = norm(x, "norm") @ weights["vocabulary.embedding.weight"].T
    torch.testing.assert_close(model(tokens)[0], expected, rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_the_other_form_is_rmsnorm_swiglu_rotary_and_grouped(build, tokens_of):
    model, tokens = build("rotary", bias=True, **ARCHITECTURES["llama"]), tokens_of(1, LENGTH)
    weights = model.state_dict()
    angle = torch.arange(LENGTH)[:, None, None] * 10000.0 ** (-torch.arange(4) / 4)  # [T, 1, D / 2]

    def norm(x, name):
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weights[f"{name}.weight"]

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def rotated(x):
        return torch.cat((x[..., :4] * angle.cos() - x[..., 4:] * angle.sin(),
                          x[..., 4:] * angle.cos() + x[..., :4] * angle.sin()), dim=-1)  # fmt: skip

    x = weights["vocabulary.embedding.weight"][tokens[0]]
    for layer in range(2):
        prefix = f"blocks.{layer}"
        q, k, v = linear(norm(x, f"{prefix}.attention_norm"), f"{prefix}.attention.qkv").split((32, 16, 16), dim=-1)
        q, k, v = q.view(LENGTH, 4, 8), *(part.view(LENGTH, 2, 8)[:, [0, 0, 1, 1]] for part in (k, v))
        x = x + linear(attend(rotated(q), rotated(k), v, 0.0), f"{prefix}.attention.out")
        gate, up = linear(norm(x, f"{prefix}.feed_forward_norm"), f"{prefix}.feed_forward.up").chunk(2, dim=-1)
        x = x + linear(gate / (1 + torch.exp(-gate)) * up, f"{prefix}.feed_forward.down")
    expected = norm(x, "norm") @ weights["vocabulary.output.weight"].T
    # The rotation is float32; its angles, up to 20, are the same numbers here but for the power's last places.
    torch.testing.assert_close(model(tokens)[0], expected, rtol=0, atol=1e-3)


def test_bias_free_means_none_at_all_and_biases_are_everywhere(build):
    assert not [name for name, _ in build("alibi").named_parameters() if name.endswith("bias")]
    names = {name for name, _ in build("alibi", bias=True).named_parameters()}
    linear = [name for name in names if name.endswith("weight") and "vocabulary" not in name]
    assert all(name.removesuffix("weight") + "bias" in names for name in linear)


def test_one_seed_gives_all_methods_the_same_shared_weights():
    states = []
    for method in (*METHODS, *DYNAMIC):
        torch.manual_seed(11)
        config = ModelConfig(num_layers=2, num_heads=4, d_model=32, vocab_size=50, train_length=8, method=method)
        states.append(Decoder(config).state_dict())
    shared = {name for name in states[0] if not name.startswith("positions.")}
    assert len(shared) == 14
    for state in states:
        assert {name for name in state if not name.startswith("positions.")} == shared
        assert all(torch.equal(state[name], states[0][name]) for name in shared)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("method", METHODS)
def test_loss_is_the_mean_nll_and_its_gradient_reaches_every_weight(build, tokens_of, method, architecture):
    model = build(method, torch.float32, **ARCHITECTURES[architecture])
    tokens = tokens_of(8, 9)
    loss = model.loss(tokens[:, :-1], tokens[:, 1:])
    logits = model(tokens[:, :-1]).double()
    expected = -logits.log_softmax(-1).gather(-1, tokens[:, 1:, None]).mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_loss_takes_positions(build, tokens_of):
    model, tokens = build("sinusoidal"), tokens_of(2, 9)
    positions = torch.arange(8) + torch.tensor([[0], [30]])
    logits = model(tokens[:, :-1], positions=positions)
    expected = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    loss = model.loss(tokens[:, :-1], tokens[:, 1:], positions)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    assert loss != model.loss(tokens[:, :-1], tokens[:, 1:])


@pytest.mark.parametrize("chunk_size", [1, 4, 20, 21, 1000])
@pytest.mark.parametrize("method", ["rotary", "alibi:scaling=linear"])
@torch.no_grad()
def test_chunks_of_logits_are_the_forward(build, tokens_of, method, chunk_size):
    model, tokens = build(method), tokens_of(2, LENGTH)
    chunks = list(model.logits(tokens, chunk_size))
    assert [chunk.shape[1] for chunk in chunks[:-1]] == [chunk_size] * (math.ceil(LENGTH / chunk_size) - 1)
    torch.testing.assert_close(torch.cat(chunks, dim=1), model(tokens), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("last", [1, 5, LENGTH])
@torch.no_grad()
def test_the_last_logits_alone(build, tokens_of, last):
    model, tokens = build("alibi"), tokens_of(2, LENGTH)
    made = torch.cat(list(model.logits(tokens, 3, last=last)), dim=1)
    torch.testing.assert_close(made, model(tokens)[:, -last:], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("config", [None, {}, "demo", 3, ModelConfig])
def test_a_decoder_of_no_configuration(config):
    with pytest.raises(ValueError, match=r"^config=.*: give a longreach\.models\.config\.ModelConfig$"):
        Decoder(config)


@pytest.mark.parametrize("token", [-1, 50, 2**40])
def test_tokens_that_the_vocabulary_has_not(build, token):
    with pytest.raises(ValueError, match=r"^tokens has ids that Embedding\(50, .*\) has not: give those"):
        build()(torch.tensor([[1, token]]))


@pytest.mark.parametrize(
    "tokens", [None, [[1]], torch.ones(1, 3), torch.tensor([1]), torch.ones(1, 1, 1).long(), torch.tensor([[True]])]
)
def test_tokens_that_are_no_ids(build, tokens):
    with pytest.raises(ValueError, match=r"^tokens of .*: give (a tensor|\(B, T\) int64)$"):
        build()(tokens)


@pytest.mark.parametrize("length", ["8", 2.5, True, 0, -1])
def test_a_length_that_is_none(build, tokens_of, length):
    with pytest.raises(ValueError, match=r"^length=.*: give an integer of at least 1$"):
        build()(tokens_of(1, 4), length=length)


def test_chunks_of_nothing(build, tokens_of):
    with pytest.raises(ValueError, match=r"^chunk_size=0: give an integer of at least 1$"):
        next(build().logits(tokens_of(1, 4), chunk_size=0))


@torch.no_grad()
def test_past_its_table_a_learned_method_says_so(build, tokens_of):
    model = build("learned:table_length=12")
    assert model(tokens_of(1, 12)).shape == (1, 12, 50)
    message = r"^13 tokens: position method 'learned:table_length=12' holds 12 positions; give fewer tokens"
    with pytest.raises(ValueError, match=message):
        model(tokens_of(1, 13))
    cache = KVCache()
    model(tokens_of(1, 12), cache=cache)
    with pytest.raises(ValueError, match=message):
        model(tokens_of(1, 1), cache=cache)
    with pytest.raises(ValueError, match=message):
        model(tokens_of(1, 2), positions=torch.tensor([[3, 12]]))
    assert model(tokens_of(1, 2), positions=torch.tensor([[3, 11]])).shape == (1, 2, 50)


@pytest.mark.parametrize("method", DYNAMIC)
def test_a_cache_needs_the_length_that_a_dynamic_method_depends_on(build, tokens_of, method):
    with pytest.raises(
        ValueError, match=rf"^position method '{re.escape(method)}' depends on the length .*: make the cache by KVCache"
    ):
        build(method)(tokens_of(1, 4), cache=KVCache())


@torch.no_grad()
def test_length_below_what_is_there(build, tokens_of):
    model, cache = build("alibi:scaling=linear"), KVCache()
    model(tokens_of(1, 4), cache=cache, length=6)
    with pytest.raises(ValueError, match=r"^length=6 is below the 7 tokens of cache and input: give at least that$"):
        model(tokens_of(1, 3), cache=cache, length=6)


@pytest.mark.parametrize("method", STRETCHED)
@torch.no_grad()
def test_dynamic_methods_change_with_length_only_past_training(build, tokens_of, method):
    model, tokens = build(method), tokens_of(1, 6)
    here = model(tokens)
    assert torch.equal(model(tokens, length=8), here)
    assert (model(tokens, length=9) - here).abs().max() > 1e-6


@pytest.mark.parametrize("name", ["embedding_dropout", "attention_dropout", "activation_dropout", "residual_dropout"])
@torch.no_grad()
def test_each_dropout_acts_in_training_alone(build, tokens_of, name):
    model, tokens = build(**{name: 0.4}), tokens_of(1, LENGTH)
    plain = build()(tokens)
    assert torch.equal(model(tokens), plain)
    model.train()
    torch.manual_seed(0)
    assert (model(tokens) - plain).abs().max() > 1e-3


def test_compiles_into_one_graph(build, tokens_of):
    model, tokens = build("alibi", torch.float32, num_layers=1), tokens_of(2, 9)
    compiled = torch.compile(model.loss, fullgraph=True, backend="aot_eager")
    ours, expected = compiled(tokens[:, :-1], tokens[:, 1:]), model.loss(tokens[:, :-1], tokens[:, 1:])
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=0)


def test_bfloat16_autocast_stays_near(build, tokens_of):
    model, tokens = build("alibi", torch.float32), tokens_of(2, LENGTH)
    expected = model.loss(tokens[:, :-1], tokens[:, 1:])
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(tokens[:, :-1], tokens[:, 1:])
    assert loss.dtype == torch.float32
    # Each of some 10 products rounds by 2^-8; the loss is a mean of many.
    torch.testing.assert_close(loss, expected, rtol=10 * 2**-8, atol=0)


def test_names_the_attention_that_runs(build):
    assert build("alibi").attention_impl(64) == "sdpa"
    assert build("alibi").attention_impl(1024) == "cpu"
    assert build("rotary").attention_impl(1024) == "sdpa"
    assert build("t5").attention_impl(1024) == "sdpa"


def test_long_sequences_and_caches_take_the_fast_path_to_the_same_numbers(build, tokens_of, choose_from):
    model, tokens = build("alibi"), tokens_of(2, 600)
    expected = model(tokens)
    choose_from(1)
    cache = KVCache()
    parts = [model(part, cache=cache) for part in tokens.split([1, 99, 470, 1, 1, 28], dim=1)]
    # What reach drops in float64 is at most 2^-53 of each row's mass, so only rounding is left.
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "method", ["t5:num_buckets=6:max_distance=12", "kerple", "kerple:kernel=power", "fire:width=8:threshold=90"]
)
def test_learned_biases_have_their_gradients_where_attention_goes_tile_by_tile(build, tokens_of, monkeypatch, method):
    model, tokens = build(method), tokens_of(2, LENGTH)

    def gradients():
        model.zero_grad()
        model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
        return [parameter.grad.clone() for parameter in model.positions.parameters()]

    whole = gradients()
    monkeypatch.setattr("longreach.ops.sdpa.MASK_LIMIT", 64)
    for tiled, expected in zip(gradients(), whole, strict=True):
        assert (expected != 0).any()
        torch.testing.assert_close(tiled, expected, rtol=1e-9, atol=1e-12)
