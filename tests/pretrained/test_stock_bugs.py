"""What transformers' own code does wrong, next to the same done right: a change there shows here first."""

import pytest
import torch
import transformers
from family_models import FAMILIES, HEADS, bloom, falcon, mpt, oracle, paper_slopes, tokens

import longreach

pytestmark = pytest.mark.usefixtures("without_gradients")

FIXED = f"transformers {transformers.__version__} does this right: tell docs and keep ours"


def crashes(function):
    try:
        function()
    except (RuntimeError, ValueError, IndexError, TypeError, AttributeError):
        return True
    return False


def difference(ours, expected):
    return (ours.double() - expected).abs().max().item()


def test_mpt_crashes_past_its_configured_length():
    model, ids = mpt(max_seq_len=32), tokens(1, 64)
    assert crashes(lambda: model(ids)), FIXED
    longreach.extend(model, scaling="none")
    assert difference(model(ids).logits[0], oracle(model, ids[0], paper_slopes(HEADS))) < 2e-5


def test_mpt_crashes_when_generation_passes_its_configured_length():
    model, ids = mpt(max_seq_len=32), tokens(1, 30)
    assert crashes(lambda: model.generate(ids, max_new_tokens=8, do_sample=False)), FIXED
    longreach.extend(model, scaling="none")
    assert model.generate(ids, max_new_tokens=8, do_sample=False).shape == (1, 38)


def test_mpt_ignores_its_alibi_bias_max():
    model, ids = mpt(attn_config={"alibi_bias_max": 16}), tokens(1, 32)
    expected = oracle(model, ids[0], [slope**2 for slope in paper_slopes(HEADS)])
    assert difference(model(ids).logits[0], expected) > 0.01, FIXED
    longreach.extend(model, scaling="none")
    assert difference(model(ids).logits[0], expected) < 2e-5


def test_falcon_eager_adds_its_bias_twice():
    model, ids = falcon(heads=4, implementation="eager"), tokens(1, 32)
    slopes = paper_slopes(4)
    expected = oracle(model, ids[0], slopes)
    stock = model(ids).logits[0]
    assert difference(stock, expected) > 0.1, FIXED
    assert difference(stock, oracle(model, ids[0], [2 * slope for slope in slopes])) < 2e-5, FIXED
    longreach.extend(model, scaling="none")
    assert difference(model(ids).logits[0], expected) < 2e-5


def test_falcon_adds_its_bias_twice_where_attention_weights_are_wanted():
    model, ids = falcon(heads=4, implementation="eager"), tokens(1, 32)
    expected = oracle(model, ids[0], paper_slopes(4))
    assert difference(model(ids, output_attentions=True).logits[0], expected) > 0.1, FIXED
    longreach.extend(model, scaling="none")
    assert difference(model(ids, output_attentions=True).logits[0], expected) < 2e-5


def test_falcon_rounds_its_slopes_and_positions_to_bfloat16():
    model, ids = falcon(), tokens(1, 600)
    expected = oracle(model, ids[0], paper_slopes(HEADS))
    assert difference(model(ids).logits[0], expected) > 0.01, FIXED
    longreach.extend(model, scaling="none")
    assert difference(model(ids).logits[0], expected) < 2e-5


def test_falcon_crashes_with_a_static_cache():
    model, ids = falcon(), tokens(1, 12)
    options = {"max_new_tokens": 6, "do_sample": False}
    assert crashes(lambda: falcon().generate(ids, cache_implementation="static", **options)), FIXED
    longreach.extend(model, scaling="none")
    static = model.generate(ids, cache_implementation="static", **options)
    assert torch.equal(static, model.generate(ids, **options))


@pytest.mark.parametrize("family", ["bloom", "falcon"])
def test_a_bias_in_bfloat16_makes_distant_neighbours_one(family):
    """At 8192 keys the last 64 of the steepest head have two different biases among them."""
    module = getattr(transformers.models, family)
    module = getattr(module, f"modeling_{family}")
    mask = torch.ones(1, 8192, dtype=torch.long)
    bias = module.build_alibi_tensor(mask, 8, torch.bfloat16)[0, 0, -64:]
    assert bias.unique().numel() < 8, FIXED
    exact = longreach.alibi_bias(longreach.alibi_slopes(8), 1, 8192)[0, 0, -64:]
    assert exact.unique().numel() == 64


def test_bloom_loses_its_causal_mask_under_an_attention_of_ones_own():
    """Registering an attention by name, as transformers invites to, leaves BLOOM without any mask."""
    ids = tokens(1, 20)
    changed = ids.clone()
    changed[0, -1] = (ids[0, -1] + 1) % 50
    transformers.AttentionInterface.register("longreach_test", lambda *args, **kwargs: None)
    model = bloom()
    model.config._attn_implementation = "longreach_test"
    moved = (model(ids).logits - model(changed).logits)[0, :-1].abs().max()
    assert moved > 0.1, FIXED
    longreach.extend(model, scaling="none", train_length=32)
    assert torch.equal(model(ids).logits[0, :-1], model(changed).logits[0, :-1])


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_expands_a_mask_of_length_squared(family, monkeypatch):
    """Ours asks for none: the mask functions of transformers are never called."""
    from transformers import masking_utils

    calls = []
    for name in ("eager", "sdpa"):
        stock = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS[name]

        def spied(*args, stock=stock, **kwargs):
            calls.append(stock(*args, **kwargs))
            return calls[-1]

        monkeypatch.setitem(masking_utils.AttentionMaskInterface._global_mapping, name, spied)
    model = FAMILIES[family]()
    model(tokens(1, 32))
    assert calls[0].shape[2:] == (32, 32), FIXED
    calls.clear()
    longreach.extend(model, scaling="none", train_length=32)
    model(tokens(2, 32), attention_mask=torch.ones(2, 32, dtype=torch.long))
    model.generate(tokens(1, 10), max_new_tokens=3, cache_implementation="static")
    assert calls == []


def test_bloom_and_mpt_ignore_position_ids_of_packed_documents():
    for family in ("bloom", "mpt"):
        model, ids = FAMILIES[family](), tokens(1, 20)
        packing = torch.cat([torch.arange(12), torch.arange(8)])[None]
        assert torch.equal(model(ids, position_ids=packing).logits, model(ids).logits), FIXED
        alone = model(ids[:, 12:]).logits
        longreach.extend(model, scaling="none", train_length=32)
        torch.testing.assert_close(model(ids, position_ids=packing).logits[:, 12:], alone, rtol=0, atol=2e-5)
