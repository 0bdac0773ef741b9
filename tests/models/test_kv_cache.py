import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longreach.models.kv_cache import KVCache


@given(st.lists(st.integers(0, 9), max_size=12))
def test_returns_all_that_was_appended(chunks):
    cache = KVCache()
    keys = torch.randn(2, 3, sum(chunks), 4)
    values = torch.randn(2, 3, sum(chunks), 4)
    start = 0
    for chunk in chunks:
        stop = start + chunk
        for layer, shift in enumerate((0.0, 100.0)):
            got = cache.append(layer, keys[:, :, start:stop] + shift, values[:, :, start:stop] - shift)
            assert torch.equal(got[0], keys[:, :, :stop] + shift)
            assert torch.equal(got[1], values[:, :, :stop] - shift)
        start = stop
        assert cache.length == stop
    assert cache.length == sum(chunks)


def test_starts_empty():
    assert KVCache().length == 0


def test_growth_is_amortised_and_returns_views():
    cache = KVCache()
    steps, moves, last = 3000, 0, None
    for step in range(steps):
        token = torch.full((1, 1, 1, 2), float(step))
        keys, values = cache.append(0, token, -token)
        moves += keys.data_ptr() != last
        last = keys.data_ptr()
        assert values.shape == (1, 1, step + 1, 2)
    assert moves <= steps.bit_length() + 1  # doubling: a buffer for each power of two
    assert torch.equal(keys[0, 0, :, 0], torch.arange(steps, dtype=torch.float32))
    assert keys.untyped_storage().nbytes() <= 2 * keys.numel() * 4  # at most half of it is spare


def test_earlier_views_keep_what_they_showed():
    cache = KVCache()
    first, _ = cache.append(0, torch.ones(1, 1, 2, 1), torch.ones(1, 1, 2, 1))
    for _ in range(5):
        cache.append(0, torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1))
    assert torch.equal(first, torch.ones(1, 1, 2, 1))


def test_what_was_appended_is_copied():
    cache = KVCache()
    keys = torch.ones(1, 1, 2, 1)
    got, _ = cache.append(0, keys, keys)
    keys.zero_()
    assert torch.equal(got, torch.ones(1, 1, 2, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_keeps_the_dtype(dtype):
    keys, values = KVCache().append(0, torch.ones(1, 1, 2, 1, dtype=dtype), torch.ones(1, 1, 2, 1, dtype=dtype))
    assert keys.dtype == values.dtype == dtype


@pytest.mark.parametrize("chunks", [[1] * 70, [64, 64], [63, 1, 1, 64, 200], [130]])
def test_key_norms_bound_every_key_of_their_block(chunks):
    cache = KVCache()
    keys = torch.randn(2, 3, sum(chunks), 8)
    start = 0
    for chunk in chunks:
        new = keys[:, :, start : start + chunk]
        cache.append(0, new, new)
        start += chunk
        norms = cache.key_norms(0)
        blocks = torch.nn.functional.pad(keys[:, :, :start].norm(dim=-1), (0, -start % 64)).unflatten(-1, (-1, 64))
        torch.testing.assert_close(norms, blocks.amax(dim=-1))


@given(st.lists(st.integers(0, 9), max_size=20), st.integers(1, 12))
def test_a_bounded_cache_returns_what_the_first_new_token_sees_and_the_new_ones(chunks, max_context):
    cache = KVCache(max_context=max_context)
    keys = torch.randn(2, 3, sum(chunks), 4)
    start = 0
    for chunk in chunks:
        stop = start + chunk
        held = cache.held
        assert held == min(start, max_context - 1)
        for layer, shift in enumerate((0.0, 100.0)):
            new = keys[:, :, start:stop] + shift
            got = cache.append(layer, new, -new)
            assert torch.equal(got[0], keys[:, :, start - held : stop] + shift)
            assert torch.equal(got[1], -got[0])
        start = stop
        assert cache.length == stop
        assert cache.key_norms(0) is None


def test_a_bounded_cache_stays_small_and_moves_seldom():
    cache = KVCache(max_context=32)
    moves, last = 0, None
    for step in range(3000):
        keys, _ = cache.append(0, torch.full((1, 1, 1, 2), float(step)), torch.zeros(1, 1, 1, 2))
        moves += keys.untyped_storage().data_ptr() != last
        last = keys.untyped_storage().data_ptr()
        assert keys.untyped_storage().nbytes() <= 2 * 32 * 2 * 4
    assert keys[0, 0, :, 0].tolist() == list(range(2968, 3000))
    assert moves <= 3000 / 31 + 8


@pytest.mark.parametrize("name", ["length", "max_context"])
@pytest.mark.parametrize("value", [0, -1, 2.5, "8", True, 10**30])
def test_a_cache_for_nothing_is_refused(name, value):
    with pytest.raises(ValueError, match=rf"^{name}={value!r}: give a positive integer, or None$"):
        KVCache(**{name: value})
