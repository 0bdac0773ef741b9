import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from family_models import FAMILIES, tokens
from transformers import DynamicCache, GenerationConfig

import longreach
from longreach.ops.reach import KEY_BLOCK
from longreach.pretrained.caches import growing_cache
from longreach.pretrained.room import LEAST_ROOM


@pytest.fixture(params=FAMILIES)
def model(request):
    return longreach.extend(FAMILIES[request.param](), scaling="none")


@torch.no_grad()
def test_it_holds_what_a_dynamic_cache_holds(model):
    ids = tokens(2, 40)
    stock, growing = DynamicCache(), growing_cache()
    for piece in ids.split([7, 1, 1, 20, 11], dim=1):
        expected = model(piece, past_key_values=stock, use_cache=True).logits
        assert torch.equal(model(piece, past_key_values=growing, use_cache=True).logits, expected)
    for one, other in zip(stock.layers, growing.layers, strict=True):
        assert torch.equal(one.keys, other.keys)
        assert torch.equal(one.values, other.values)
    assert growing.get_seq_length() == 40


@torch.no_grad()
def test_tokens_are_copied_a_bounded_number_of_times(model):
    growing, places = growing_cache(), set()
    for token in tokens(1, 3 * LEAST_ROOM).split(1, dim=1):
        model(token, past_key_values=growing, use_cache=True)
        places.add(growing.layers[0].keys.data_ptr())
    assert len(places) <= 4


def saved(cache):
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def filled(model, ids):
    """The cache that generate returns after 20 tokens."""
    options = {"max_new_tokens": 21 - ids.shape[1], "return_dict_in_generate": True, "do_sample": False}
    return model.generate(ids, use_cache=True, **options).past_key_values


@torch.no_grad()
def test_what_it_handed_out_is_never_written_to_again(model):
    """Nor does what is done to that reach what it holds."""
    ids = tokens(2, 30)
    cache = filled(model, ids[:, :12])
    held = [(layer.keys[:, :, 15:], layer.values) for layer in cache.layers]
    before = copy.deepcopy(held)
    for change in (lambda: None, lambda: cache.crop(-6)):
        change()
        model(ids[:, 20:24], past_key_values=cache, use_cache=True)
        for pair, pair_before in zip(held, before, strict=True):
            assert all(torch.equal(*both) for both in zip(pair, pair_before, strict=True))
    here = copy.deepcopy(cache)
    for pair in held:
        pair[0].zero_(), pair[1].zero_()
    expected = model(ids[:, 24:], past_key_values=here).logits
    assert torch.equal(model(ids[:, 24:], past_key_values=cache).logits, expected)


@torch.no_grad()
def test_nothing_is_copied_while_nobody_holds_what_it_handed_out(model):
    """Also not after a crop, as in each round of assisted decoding."""
    ids = tokens(2, 30)
    cache = filled(model, ids[:, :12])
    place = cache.layers[0].keys.data_ptr()
    for _ in range(3):
        cache.crop(-5)
        model(ids[:, :3], past_key_values=cache, use_cache=True)
        assert cache.layers[0].keys.data_ptr() == place
    held = cache.layers[0].keys
    for token in ids[:, :2].split(1, dim=1):
        model(token, past_key_values=cache, use_cache=True)
    assert cache.layers[0].keys.data_ptr() != place
    assert held.data_ptr() == place


@torch.no_grad()
@pytest.mark.parametrize("copied", [copy.deepcopy, saved, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_copy_goes_on_by_itself(model, copied):
    ids = tokens(2, 30)
    cache = filled(model, ids[:, :12])
    other = copied(cache)
    assert other.layers[0].keys.untyped_storage().nbytes() == cache.layers[0].keys.nbytes  # without the room beside it
    expected = model(ids[:, 20:], past_key_values=copied(cache)).logits
    model(ids[:, :5], past_key_values=cache, use_cache=True)
    assert torch.equal(model(ids[:, 20:], past_key_values=other).logits, expected)


def test_it_leaves_inference_mode(model):
    """Its tensors serve generate under no_grad, and training with what is cached."""
    ids = tokens(2, 24)
    with torch.inference_mode():
        cache = filled(model, ids[:, :12])
    expected = model.generate(ids, max_new_tokens=3, do_sample=False, use_cache=False)
    again = model.generate(ids, past_key_values=copy.deepcopy(cache), max_new_tokens=3, do_sample=False)
    assert torch.equal(again[:, :12], expected[:, :12])
    stock = DynamicCache([(layer.keys, layer.values) for layer in cache.layers])
    gradients = []
    for each in (cache, stock):
        model.zero_grad()
        model(ids[:, 20:], past_key_values=each, use_cache=True).logits.square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert one is other is None or torch.equal(one, other)


def test_gradients_need_earlier_keys(model):
    """Those of queries alone, as LoRA has them in the first layer, need keys that have no gradient."""
    model.requires_grad_(False)
    attention = next(
        module for module in model.modules() if hasattr(module, "_longreach") and hasattr(module, "layer_idx")
    )
    fused = attention.Wqkv if hasattr(attention, "Wqkv") else attention.query_key_value
    shift = torch.zeros(48, requires_grad=True)
    width = attention.head_dim

    def shifted(module, args, out):
        rows = (
            torch.arange(out.shape[-1]) // width % 3 == 0
            if fused is not getattr(attention, "Wqkv", None)
            else (torch.arange(out.shape[-1]) < 48)
        )
        return out + torch.zeros_like(out).masked_scatter(rows, shift.expand(*out.shape[:-1], -1))

    fused.register_forward_hook(shifted)
    gradients = []
    for cache in (DynamicCache(), growing_cache()):
        pieces = [model(piece, past_key_values=cache, use_cache=True).logits for piece in tokens(1, 12).split(4, dim=1)]
        gradients += torch.autograd.grad(torch.cat(pieces, dim=1).square().mean(), shift)
    assert torch.equal(*gradients)


@torch.no_grad()
def test_what_does_not_fit_is_refused_as_by_the_stock_cache(model):
    ids = tokens(2, 12)
    for cache in (DynamicCache(), growing_cache()):
        model(ids, past_key_values=cache, use_cache=True)
        with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
            model(ids[:1], past_key_values=cache, use_cache=True)


@torch.no_grad()
def test_norms_are_of_what_someone_wrote_into_the_keys(model):
    growing = growing_cache()
    model(tokens(2, 70), past_key_values=growing, use_cache=True)
    layer = growing.layers[0]
    before = layer.key_norms().clone()
    layer.keys.mul_(2.0)
    torch.testing.assert_close(layer.key_norms(), 2.0 * before)


@torch.no_grad()
def test_cropped_reordered_and_repeated_it_goes_on_rightly(model):
    ids = tokens(2, 30)
    stock, growing = DynamicCache(), growing_cache()
    for cache in (stock, growing):
        model(ids[:, :20], past_key_values=cache, use_cache=True)
        cache.crop(-5)
        model(ids[:, 20:22], past_key_values=cache, use_cache=True)
        cache.reorder_cache(torch.tensor([1, 0]))
        model(ids[:, 22:24], past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(2)
    expected, got = (
        model(ids[:, 24:].repeat(2, 1), past_key_values=cache, use_cache=True).logits for cache in (stock, growing)
    )
    assert torch.equal(got, expected)


@torch.no_grad()
def test_it_knows_the_norms_of_the_keys_that_it_holds(model):
    ids = tokens(2, 150)
    growing = growing_cache()

    def check():
        for layer in growing.layers:
            norms = F.pad(layer.keys.norm(dim=-1), (0, -layer.keys.shape[2] % KEY_BLOCK))
            expected = norms.unflatten(-1, (-1, KEY_BLOCK)).amax(dim=-1)
            torch.testing.assert_close(layer.key_norms(), expected)

    for piece in ids[:, :132].split([65, 1, 66], dim=1):
        model(piece, past_key_values=growing, use_cache=True)
        check()
    growing.crop(-10)
    check()
    for change in (lambda: growing.crop(-60), lambda: growing.reorder_cache(torch.tensor([1, 0]))):
        change()
        model(ids[:, :78], past_key_values=growing, use_cache=True)  # more than was cropped, other keys in each block
        check()


@torch.no_grad()
def test_decoding_through_its_norms_gives_the_same(model, monkeypatch, choose_from):
    ids = tokens(2, 140)
    expected = model(ids).logits[:, 100:]
    asked = []

    def uses_key_norms(impl, q, k):
        asked.append((impl, q.shape[2], k.shape[2]))
        return True

    monkeypatch.setattr("longreach.pretrained.attend.uses_key_norms", uses_key_norms)
    choose_from(1)
    growing = growing_cache()
    model(ids[:, :100], past_key_values=growing, use_cache=True)
    steps = [model(token, past_key_values=growing, use_cache=True).logits for token in ids[:, 100:].split(1, dim=1)]
    torch.testing.assert_close(torch.cat(steps, dim=1), expected, rtol=1e-4, atol=1e-5)
    assert ("auto", 1, 140) in asked


def test_gradients_flow_through_it(model):
    model.train()
    growing = growing_cache()
    for piece in tokens(1, 12).split(4, dim=1):
        logits = model(piece, past_key_values=growing, use_cache=True).logits
    logits.sum().backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())


def test_generate_uses_it_unless_a_cache_is_named(model):
    ids = tokens(1, 6)
    more = {"max_new_tokens": 8, "return_dict_in_generate": True, "do_sample": False, "use_cache": True}
    greedy = model.generate(ids, **more)
    own = GenerationConfig(max_new_tokens=8, return_dict_in_generate=True, do_sample=False)  # says nothing of a cache
    for result in (greedy, model.generate(ids, own)):
        assert type(result.past_key_values.layers[0]).__name__ == "GrowingLayer"
    for other in ({"past_key_values": DynamicCache()}, {"cache_implementation": "static"}, {"use_cache": False}):
        result = model.generate(ids, **{**more, **other})
        assert torch.equal(result.sequences, greedy.sequences)
        layers = result.past_key_values.layers if result.past_key_values is not None else []
        assert not any(type(layer).__name__ == "GrowingLayer" for layer in layers)
    beams = model.generate(ids, num_beams=3, **more).sequences
    assert torch.equal(beams, model.generate(ids, num_beams=3, past_key_values=DynamicCache(), **more).sequences)
