import pytest
import torch
import torch.nn.functional as F
from family_models import FAMILIES, tokens
from transformers import DynamicCache

import longreach
from longreach.ops.reach import KEY_BLOCK
from longreach.pretrained.caches import LEAST_ROOM, growing_cache


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
        model(ids[:, 132:140], past_key_values=growing, use_cache=True)
        check()


@torch.no_grad()
def test_decoding_through_its_norms_gives_the_same(model, monkeypatch):
    ids = tokens(2, 140)
    expected = model(ids).logits[:, 100:]
    asked = []

    def uses_key_norms(impl, q, key_length):
        asked.append((impl, q.shape[2], key_length))
        return True

    monkeypatch.setattr("longreach.pretrained.attend.uses_key_norms", uses_key_norms)
    monkeypatch.setattr("longreach.ops.attention.CPU_DECODE_CROSSOVER", 1)
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
    assert type(greedy.past_key_values.layers[0]).__name__ == "GrowingLayer"
    for other in ({"past_key_values": DynamicCache()}, {"cache_implementation": "static"}, {"use_cache": False}):
        result = model.generate(ids, **{**more, **other})
        assert torch.equal(result.sequences, greedy.sequences)
        layers = result.past_key_values.layers if result.past_key_values is not None else []
        assert not any(type(layer).__name__ == "GrowingLayer" for layer in layers)
    beams = model.generate(ids, num_beams=3, **more).sequences
    assert torch.equal(beams, model.generate(ids, num_beams=3, past_key_values=DynamicCache(), **more).sequences)
