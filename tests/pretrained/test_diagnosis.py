"""Each thing that stock code is known to do wrong is found by running it, and named."""

import pytest
import torch
import transformers
from family_models import FAMILIES, HEADS, bloom, falcon, mpt, tokens

import longreach
from longreach.pretrained.diagnosis import _kl, diagnose, stock_bytes


def state_of(model):
    return {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}


def the_run(model, length, **options):
    (run,) = diagnose(model, tokens(1, length)[0], [length], **options).runs
    return run


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_code_is_right_at_the_length_that_it_is_made_for(family):
    found = diagnose(FAMILIES[family](), tokens(1, 32)[0], [2, 32])
    assert [(run.length, run.outcome, run.mistake) for run in found.runs] == [(2, "right", ""), (32, "right", "")]
    assert all(run.kl < 1e-9 and run.difference < 1e-4 and run.exact_kl is None for run in found.runs)
    assert found.causal
    assert found.form.deviation < 1e-4
    assert (found.form.family, found.dtype) == (family, "float32")
    assert found.attention == ("sdpa" if family == "falcon" else "eager")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_diagnosis_leaves_the_model_as_it_was(model, dtype):
    model.to(dtype)
    before, logits = state_of(model), model(tokens(1, 20)).logits
    diagnose(model, tokens(1, 40)[0], [20, 40])
    assert [(name, at) for name, (at, _) in state_of(model).items()] == [(name, at) for name, (at, _) in before.items()]
    assert all(torch.equal(value, before[name][1]) for name, (_, value) in state_of(model).items())
    assert torch.equal(model(tokens(1, 20)).logits, logits)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_mpt_is_seen_to_crash_past_its_configured_length():
    found = diagnose(mpt(max_seq_len=32), tokens(1, 48)[0], [32, 48])
    assert [run.outcome for run in found.runs] == ["right", "crashes"]
    assert found.runs[1].mistake.startswith("past its configured length of 32: RuntimeError: The size of tensor")
    assert found.runs[1].kl is None
    assert found.heads  # the exact form runs all the same


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_falcon_eager_is_seen_to_add_its_bias_twice(dtype):
    found = diagnose(falcon(implementation="eager").to(dtype), tokens(1, 32)[0], [32])
    assert found.runs[0].mistake == "the bias is added twice"
    assert found.form.deviation > 0.1
    found = diagnose(falcon().to(dtype), tokens(1, 32)[0], [32])
    assert found.runs[0].outcome == "right"
    assert found.form.deviation < 1e-4


@pytest.mark.parametrize(("family", "crashes"), [("bloom", False), ("mpt", False), ("falcon", True)])
def test_falcon_is_seen_to_crash_with_a_static_cache(family, crashes):
    found = diagnose(FAMILIES[family](), tokens(1, 16)[0], [16])
    assert bool(found.static_cache) == crashes
    assert found.static_cache is not None


@pytest.mark.parametrize(
    ("build", "dtype", "outcome"),
    [
        (bloom, torch.float32, "right"),
        (bloom, torch.bfloat16, "wrong"),
        (falcon, torch.float32, "wrong"),  # whose bias is in bfloat16 whatever the dtype
        (falcon, torch.bfloat16, "wrong"),
        (lambda: mpt(max_seq_len=600), torch.bfloat16, "right"),
    ],
)
def test_a_bias_that_collapses_in_bfloat16_is_named(build, dtype, outcome):
    run = the_run(build().to(dtype), 600)
    assert run.outcome == outcome
    # The steepest slope is 1/2: bfloat16 has 8 bits, so that biases near 300 are multiples of 2, each of 4 keys.
    told = "the bias collapses: the last 64 keys of the steepest head have 17 different biases"
    assert run.mistake == (told if outcome == "wrong" else "")
    if dtype == torch.bfloat16:
        assert run.exact_kl < 1e-3
        assert (run.kl > 10 * run.exact_kl) == (outcome == "wrong")


def test_both_mistakes_of_falcon_eager_are_named_together():
    run = the_run(falcon(implementation="eager"), 600)
    assert run.mistake.startswith("the bias is added twice, and the bias collapses")


def test_bloom_under_an_attention_of_ones_own_is_seen_to_look_ahead():
    transformers.AttentionInterface.register("longreach_diagnosis", lambda *args, **kwargs: None)
    model = bloom()
    model.config._attn_implementation = "longreach_diagnosis"
    found = diagnose(model, tokens(1, 24)[0], [24])
    assert not found.causal
    assert found.runs[0].mistake == "not causal: tokens see those after them"


def test_mpt_is_seen_to_ignore_its_alibi_bias_max():
    found = diagnose(mpt(attn_config={"alibi_bias_max": 16}), tokens(1, 32)[0], [32])
    assert found.runs[0].mistake == "alibi_bias_max is ignored"
    assert found.form.rule == "the paper's rule with alibi_bias_max=16"


@pytest.mark.parametrize(
    ("factor", "mistake"),
    [(0, "the bias is missing"), (-1, "the bias has the wrong sign"), (-3, "of a kind that is not known")],
)
def test_a_mistake_of_another_version_is_named_where_it_can_be(factor, mistake, scale_bloom_bias):
    scale_bloom_bias(factor)
    assert the_run(bloom(), 64).mistake == mistake


def test_slopes_by_another_rule_are_named(scale_bloom_bias):
    """The kit's mistakes are the doctor's too."""
    closed = torch.exp2(-8 * torch.arange(1, HEADS + 1) / HEADS)
    scale_bloom_bias(closed / longreach.alibi_slopes(HEADS))
    run = the_run(bloom(), 64)
    assert run.mistake == "closed-form slopes 2^(-8 h / H), where the paper's code interleaves"


def test_logits_that_are_not_finite_are_wrong(scale_bloom_bias):
    scale_bloom_bias(float("nan"))
    run = the_run(bloom(), 16)
    assert (run.outcome, run.mistake, run.kl) == ("wrong", "logits are not finite", float("inf"))


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_code_is_seen_to_ignore_an_alibi_scaling(family):
    model = FAMILIES[family](alibi_scaling={"type": "linear", "factor": 2.5})
    found = diagnose(model, tokens(1, 32)[0], [32])
    assert [(run.outcome, run.mistake) for run in found.runs] == [("wrong", "alibi_scaling is ignored")]
    assert found.form.deviation > 0.01
    assert found.form.rule.endswith("to be scaled as alibi_scaling says: {'type': 'linear', 'factor': 2.5}")


def test_an_alibi_scaling_that_changes_little_is_seen_to_be_ignored():
    model = bloom(alibi_scaling={"type": "linear", "factor": 1.0001})
    run = the_run(model, 32)
    assert run.kl < 1e-6
    assert (run.outcome, run.mistake) == ("wrong", "alibi_scaling is ignored")


def test_an_alibi_scaling_by_length_is_ignored_past_its_length_alone():
    model = bloom(alibi_scaling={"type": "linear", "train_seq_len": 16})
    runs = diagnose(model, tokens(1, 48)[0], [16, 48]).runs
    assert [(run.outcome, run.mistake) for run in runs] == [("right", ""), ("wrong", "alibi_scaling is ignored")]
    model = falcon(implementation="eager", alibi_scaling={"type": "linear", "factor": 2.5})
    assert the_run(model, 32).mistake == "alibi_scaling is ignored, and the bias is added twice"


def test_equal_logits_have_no_divergence_below_zero():
    logits = torch.randn(300, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert all(_kl(row[None], (row + 1.0)[None]) >= 0.0 for row in logits)


def test_what_would_take_too_much_memory_is_not_run():
    assert stock_bytes(32, 8192) == 24 * 2**30
    needed = stock_bytes(6, 64)
    assert the_run(bloom(), 64, max_bytes=needed).outcome == "right"
    run = the_run(bloom(), 64, max_bytes=needed - 1)
    assert run.outcome == "not run"
    assert run.mistake == "would take about 288.0 KiB for scores, more than the 288.0 KiB allowed"  # 3 * 4 * 6 * 64^2
    assert run.kl is None


@pytest.mark.parametrize(("build", "rounded"), [(bloom, False), (falcon, True), (mpt, False)])
def test_the_rule_of_the_slopes_is_told(build, rounded):
    options = {"heads": 12} if build is falcon else {}
    form = diagnose(build(**options), tokens(1, 16)[0], [16]).form
    assert form.rule.startswith("the paper's rule")
    assert ("rounded to bfloat16" in form.rule) == rounded
    assert form.slopes == tuple(longreach.alibi_slopes(len(form.slopes)).tolist())
    assert ("(q.k + bias)" in form.score) == rounded  # Falcon alone
    assert form.bias.startswith("slope * ")
    assert form.bias.endswith(", in bfloat16") == rounded


def test_beyond_its_reach_a_head_holds_less_than_the_tolerance():
    """By BLOOM's own attention weights."""
    length = 300
    model, ids = bloom(), tokens(1, length)
    found = diagnose(model, ids[0], [length])
    weights = model(ids, output_attentions=True).attentions  # one (1, H, T, T) for each layer
    distance = torch.arange(length)[:, None] - torch.arange(length)
    assert found.reach_length == length
    assert len(found.heads) == weights[0].shape[1]
    for number, head in enumerate(found.heads):
        assert len(head.tokens) == len(weights)
        for layer, tokens_seen in zip(weights, head.tokens, strict=True):
            beyond = layer[0, number].double().masked_fill(distance < tokens_seen, 0.0)
            assert beyond.sum(dim=-1).max() <= found.tolerance
    steepest, shallowest = (pick(found.heads, key=lambda head: head.slope) for pick in (max, min))
    assert max(steepest.tokens) < length
    assert max(steepest.kept) < 0.6
    assert set(shallowest.tokens) == {length}
    assert set(shallowest.kept) == {1.0}


def test_a_small_tolerance_and_a_half_type_go_together():
    assert diagnose(bloom(), tokens(1, 8)[0], [8]).tolerance == 2.0**-24
    assert diagnose(bloom().bfloat16(), tokens(1, 8)[0], [8]).tolerance == 2.0**-14


@pytest.mark.parametrize(
    ("lengths", "told"),
    [
        ([1], "lengths has 1: give at least 2 and at most the 16 tokens there are"),
        ([8, 17], "lengths has 17: give at least 2 and at most the 16 tokens there are"),
        ([], "lengths is empty: give at least one, in tokens"),
    ],
)
def test_lengths_that_cannot_be_are_refused(lengths, told):
    with pytest.raises(ValueError, match=f"^{told}$"):
        diagnose(bloom(), tokens(1, 16)[0], lengths)


def test_models_without_stock_alibi_are_refused():
    ids = tokens(1, 8)[0]
    llama = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(ValueError, match="llama"):
        diagnose(transformers.LlamaForCausalLM(llama), ids, [8])
    with pytest.raises(ValueError, match="alibi=False"):
        diagnose(falcon(alibi=False), ids, [8])
    with pytest.raises(ValueError, match=r"is extended: longreach\.restore\(model\) first"):
        diagnose(longreach.extend(bloom(), scaling="none"), ids, [8])


def test_a_converted_model_has_no_stock_code_to_diagnose():
    from longreach.pretrained.convert import convert

    gpt2 = transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=16)
    model = convert(transformers.GPT2LMHeadModel(gpt2))
    longreach.restore(model)
    with pytest.raises(ValueError, match="gpt2 was converted"):
        diagnose(model, tokens(1, 8)[0], [8])
