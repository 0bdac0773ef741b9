import pytest
import torch
from family_models import HEADS, bloom, mpt, oracle, paper_slopes, tokens
from transformers import GenerationConfig

import longreach
from longreach.pretrained.caches import SinkCache
from longreach.pretrained.streaming import streaming_attention

pytestmark = pytest.mark.usefixtures("without_gradients")

CLOSE = {"rtol": 0, "atol": 2e-5}


def distances(length, sinks, window):
    """What each token sees, and from how far, by playing the cache token by token."""
    out = torch.full((length, length), float("inf"))
    cached = []
    for token in range(length):
        cached.append(token)
        for place, key in enumerate(cached):
            out[token, key] = len(cached) - 1 - place
        if len(cached) == sinks + window:
            del cached[sinks]
    return out


@pytest.mark.parametrize(("sinks", "window"), [(4, 12), (0, 8), (3, 1), (1, 30)])
def test_generation_equals_the_oracle_of_a_cache_played_token_by_token(model, sinks, window):
    longreach.extend(model, scaling="none", train_length=32, sinks=sinks, window=window)
    ids = tokens(2, 45)
    out = model.generate(ids, max_new_tokens=10, do_sample=False, return_dict_in_generate=True, output_logits=True)
    expected = oracle(model, out.sequences[0], paper_slopes(HEADS), distance=distances(55, sinks, window))[44:-1]
    torch.testing.assert_close(torch.stack(out.logits, dim=1)[0].double(), expected, **CLOSE)


@pytest.mark.parametrize("chunks", [[40], [1] * 40, [5, 20, 1, 14]])
def test_chunks_of_any_size_see_the_same(model, chunks):
    longreach.extend(model, scaling="none", train_length=32)
    ids, cache = tokens(1, 40), SinkCache(3, 9)
    logits = [model(piece, past_key_values=cache, use_cache=True).logits for piece in ids.split(chunks, 1)]
    expected = oracle(model, ids[0], paper_slopes(HEADS), distance=distances(40, 3, 9))
    torch.testing.assert_close(torch.cat(logits, dim=1)[0].double(), expected, **CLOSE)
    assert cache.get_seq_length() == 40
    assert cache.layers[0].keys.shape[2] == 3 + 9 - 1


def test_the_length_of_a_scaling_is_what_the_cache_can_hold():
    model, ids = bloom(), tokens(1, 60)
    longreach.extend(model, scaling="linear", train_length=8, sinks=4, window=12)
    out = model.generate(ids, max_new_tokens=5, return_dict_in_generate=True, output_logits=True)
    slopes = [slope * 8 / 16 for slope in paper_slopes(HEADS)]
    expected = oracle(model, out.sequences[0], slopes, distance=distances(65, 4, 12))[59:-1]
    torch.testing.assert_close(torch.stack(out.logits, dim=1)[0].double(), expected, **CLOSE)


def test_sinks_are_kept_where_the_configuration_uses_no_cache():
    model, ids = mpt(), tokens(1, 30)
    model.config.use_cache = model.generation_config.use_cache = False
    longreach.extend(model, scaling="none", sinks=2, window=6)
    out = model.generate(ids, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_logits=True)
    expected = oracle(model, out.sequences[0], paper_slopes(HEADS), distance=distances(36, 2, 6))[29:-1]
    torch.testing.assert_close(torch.stack(out.logits, dim=1)[0].double(), expected, **CLOSE)
    with pytest.raises(ValueError, match="use_cache=False with sinks"):
        model.generate(ids, max_new_tokens=6, use_cache=False)


def test_beams_and_their_sinks(model):
    """A cache that never fills is a cache like any other."""
    ids = tokens(2, 20)
    longreach.extend(model, scaling="none", train_length=32)
    expected = model.generate(ids, max_new_tokens=10, num_beams=3, do_sample=False)
    longreach.extend(model, scaling="none", train_length=32, sinks=2, window=40)
    assert torch.equal(model.generate(ids, max_new_tokens=10, num_beams=3, do_sample=False), expected)


def test_padding_cannot_become_a_sink(model):
    longreach.extend(model, scaling="none", train_length=32, sinks=2, window=8)
    with pytest.raises(ValueError, match="padding, which would become sinks"):
        model.generate(tokens(2, 20), attention_mask=torch.tensor([[0] * 3 + [1] * 17, [1] * 20]), max_new_tokens=2)


def test_streaming_attention_of_grouped_queries_against_a_dense_one():
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 30, 8, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, 2, 2, 33, 8, generator=generator, dtype=torch.float64)
    slopes = longreach.alibi_slopes(4)
    out = streaming_attention(q, k, v, slopes, 3, 7, scale=0.5, tolerance=0.0, impl="auto")
    bias = -slopes[:, None, None].double() * distances(33, 3, 7)[3:].nan_to_num(posinf=float("inf"))
    scores = 0.5 * q @ k.repeat_interleave(2, 1).mT + bias
    torch.testing.assert_close(out, scores.softmax(-1) @ v.repeat_interleave(2, 1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"generation_config": GenerationConfig(max_new_tokens=2)}])
def test_another_cache_beside_sinks_is_refused(options):
    model = longreach.extend(bloom(), scaling="none", sinks=2, window=4)
    with pytest.raises(ValueError, match=r"^cache_implementation='static' with sinks: leave one of the two out$"):
        model.generate(tokens(1, 10), cache_implementation="static", **options)
    model.generation_config.cache_implementation = "static"
    with pytest.raises(ValueError, match=r"^cache_implementation='static' with sinks"):
        model.generate(tokens(1, 10), **options)


def test_what_such_a_cache_cannot_do():
    model, cache = bloom(), SinkCache(2, 4)
    longreach.extend(model, scaling="none", train_length=32)
    model(tokens(1, 10), past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match="cannot give tokens back"):
        cache.crop(-2)
    cache.reset()
    assert cache.get_seq_length() == 0
