"""Extended models under training, PEFT, accelerate, torch.compile and low precision."""

import copy

import pytest
import torch
from family_models import FAMILIES, HEADS, bloom, oracle, paper_slopes, tokens
from transformers import DynamicCache

import longreach
from longreach.pretrained.attend import extension_of, fixed_length

CLOSE = {"rtol": 0, "atol": 2e-5}


def gradients(model, ids, **options):
    model.zero_grad()
    model(ids, labels=ids, use_cache=False, **options).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_gradients_equal_those_of_stock(model):
    ids = tokens(2, 30)
    stock = gradients(model, ids)
    longreach.extend(model, scaling="none", train_length=32)
    for name, gradient in gradients(model, ids).items():
        torch.testing.assert_close(gradient, stock[name], rtol=1e-4, atol=1e-5)


def test_gradients_under_a_fixed_factor_equal_finite_differences():
    model, ids = bloom().double(), tokens(1, 40)
    longreach.extend(model, scaling="linear-fixed=3")
    weight = model.transformer.h[0].self_attention.query_key_value.weight
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    model(ids).logits.square().mean().backward()
    slope = (weight.grad * direction).sum()
    losses = []
    with torch.no_grad():
        for step in (1e-5, -2e-5):
            weight.add_(direction, alpha=step)
            losses.append(model(ids).logits.square().mean())
    torch.testing.assert_close((losses[0] - losses[1]) / 2e-5, slope, rtol=1e-4, atol=1e-6)


def test_a_copy_is_extended_by_itself(model):
    longreach.extend(model, scaling="linear", train_length=16)
    ids = tokens(1, 40)
    expected = model(ids).logits
    copied = copy.deepcopy(model)
    assert torch.equal(copied(ids).logits, expected)
    longreach.extend(copied, scaling="none")
    assert extension_of(copied) is not extension_of(model)
    assert torch.equal(model(ids).logits, expected)
    assert not torch.allclose(copied(ids).logits, expected, atol=1e-3)


def test_attention_dropout_is_on_in_training_alone():
    model, ids = bloom(attention_dropout=0.5), tokens(1, 30)
    longreach.extend(model, scaling="none", train_length=32)
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)


@torch.no_grad()
def test_bfloat16_stays_close_to_float32(model):
    """The stock bias alone would move logits by more."""
    model.bfloat16()
    ids = tokens(1, 400)
    longreach.extend(model, scaling="none", train_length=32)
    logits = model(ids).logits
    assert logits.dtype == torch.bfloat16
    error = (logits[0].double() - oracle(model, ids[0], paper_slopes(HEADS))).abs()
    assert error.mean() < 0.1
    sequences = model.generate(ids[:, :40], max_new_tokens=5)
    assert sequences.shape == (1, 45)


def test_inference_mode_leaves_nothing_that_training_cannot_use(model):
    """The slopes for one length are kept; the CPU implementation, which runs from 256 tokens on, saves them."""
    longreach.extend(model, scaling="linear", train_length=16)
    ids = tokens(1, 300)
    with torch.inference_mode():
        model(ids)
    assert all(gradient.isfinite().all() for gradient in gradients(model, ids).values())


@pytest.mark.filterwarnings("ignore:.*will be removed in v6:FutureWarning")
def test_models_wrapped_by_peft(model):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    ids = tokens(1, 40)
    with torch.no_grad():
        expected = oracle(model, ids[0], [slope * 16 / 40 for slope in paper_slopes(HEADS)])
    target = {"bloom": "query_key_value", "mpt": "Wqkv", "falcon": "query_key_value"}[model.config.model_type]
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=[target], task_type="CAUSAL_LM"))
    wrapped.eval()
    longreach.extend(wrapped, scaling="linear", train_length=16)
    with torch.no_grad():
        torch.testing.assert_close(wrapped(ids).logits[0].double(), expected, **CLOSE)  # a fresh adapter adds nothing
        packing = torch.cat([torch.arange(25), torch.arange(15)])[None]
        packed = wrapped(ids, position_ids=packing).logits[:, 25:]
        torch.testing.assert_close(packed, wrapped(ids[:, 25:]).logits, **CLOSE)
        sequences = wrapped.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
        again = wrapped.generate(input_ids=ids, max_new_tokens=8, do_sample=False, use_cache=False)
        assert torch.equal(sequences, again)
    wrapped(ids, labels=ids).loss.backward()
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in wrapped.parameters())
    longreach.restore(wrapped)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*will be removed in v6:FutureWarning", "ignore:Position ids are not supported")
@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PromptEncoderConfig"])
def test_prompts_of_peft_before_padding_are_as_on_stock(model, kind):
    """Virtual tokens come before the padding of each row, which then stands between tokens."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    ids, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[0, :5] = 0
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=4, num_attention_heads=HEADS)
    wrapped = peft.get_peft_model(model, config).eval()
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": mask}
    seen = torch.cat((torch.ones(2, 4), mask), dim=1).bool()
    expected = wrapped(ids, attention_mask=mask).logits[seen], wrapped.generate(input_ids=ids, **options)
    longreach.extend(wrapped, scaling="none")
    torch.testing.assert_close(wrapped(ids, attention_mask=mask).logits[seen], expected[0], **CLOSE)
    assert torch.equal(wrapped.generate(input_ids=ids, **options), expected[1])


@torch.no_grad()
@pytest.mark.parametrize("order", ["hooks first", "hooks last", "hooks come off between"])
def test_models_dispatched_by_accelerate(model, order):
    hooks = pytest.importorskip("accelerate.hooks", reason="accelerate is not installed")
    ids = tokens(1, 40)
    with_hooks = [module for module in model.modules() if module is not model]

    def dispatch():
        for module in with_hooks:
            hooks.add_hook_to_module(module, hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True))

    stock = model(ids[:, :32]).logits
    if order != "hooks last":
        dispatch()
    longreach.extend(model, scaling="linear", train_length=16)
    if order == "hooks last":
        dispatch()
    if order == "hooks come off between":
        hooks.remove_hook_from_module(model, recurse=True)
    expected = oracle(model, ids[0], [slope * 16 / 40 for slope in paper_slopes(HEADS)])
    torch.testing.assert_close(model(ids).logits[0].double(), expected, **CLOSE)
    assert model.generate(ids, max_new_tokens=3).shape == (1, 43)
    longreach.restore(model)
    assert torch.equal(model(ids[:, :32]).logits, stock)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_models(family):
    model = FAMILIES[family]()
    longreach.extend(model, scaling="linear", train_length=16)
    ids, mask = tokens(2, 30), torch.ones(2, 30, dtype=torch.long)
    mask[0, :5] = 0
    expected = model(ids, attention_mask=mask).logits
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(ids, attention_mask=mask).logits, expected, **CLOSE)
    torch.compiler.reset()


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning")
def test_cached_decoding_of_a_compiled_model():
    model, cache, ids = bloom(), DynamicCache(), tokens(1, 22)
    longreach.extend(model, scaling="linear", train_length=16, length=22)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    pieces = [compiled(piece, past_key_values=cache, use_cache=True).logits for piece in ids.split([21, 1], 1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(ids).logits, **CLOSE)
    torch.compiler.reset()


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning")
def test_a_compiled_model_follows_the_stated_length():
    model, ids = bloom(), tokens(1, 30)
    longreach.extend(model, scaling="linear", train_length=16)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    for length in (None, 60, 90, 60, None):
        with fixed_length(model, length or 30):
            torch.testing.assert_close(compiled(ids, use_cache=False).logits, model(ids).logits, **CLOSE)
        expected = oracle(model, ids[0], [slope * 16 / 30 for slope in paper_slopes(HEADS)])
        torch.testing.assert_close(compiled(ids, use_cache=False).logits[0].double(), expected, **CLOSE)
    torch.compiler.reset()
