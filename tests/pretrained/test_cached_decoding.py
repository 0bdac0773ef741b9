"""Decoding with a cache equals the full forward pass under one L', and says so where it cannot."""

import copy
import threading
from itertools import pairwise

import pytest
import torch
from family_models import HEADS, VOCABULARY, bloom, mpt, oracle, paper_slopes, tokens
from transformers import DynamicCache, GenerationConfig, StaticCache, StoppingCriteria

import longreach
from longreach.positions.scaling import Scaling
from longreach.pretrained.attend import extension_of, fixed_length

pytestmark = pytest.mark.usefixtures("without_gradients")

CLOSE = {"rtol": 0, "atol": 2e-5}
SCALINGS = {
    "none": {"scaling": "none"},
    "linear": {"scaling": "linear"},
    "linear-fixed": {"scaling": "linear-fixed=2"},
    "ntk": {"scaling": "ntk"},
    "logn": {"scaling": "none+logn"},
    "linear with logn": {"scaling": "linear+logn"},
}


def generated(model, ids, new_tokens, **options):
    """Tokens and logits (B, new, V) of greedy generation."""
    out = model.generate(
        ids,
        **{"max_new_tokens": new_tokens, "do_sample": False, "return_dict_in_generate": True, "output_logits": True},
        **options,
    )
    return out.sequences, torch.stack(out.logits, dim=1)


@pytest.mark.parametrize("cache", [None, "static", "dynamic"])
@pytest.mark.parametrize("name", SCALINGS)
def test_equals_the_full_forward_pass_of_its_length(model, name, cache):
    arguments = SCALINGS[name]
    longreach.extend(model, **arguments, train_length=None if name == "linear-fixed" else 16)
    ids, mask = tokens(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[0, :6] = 0
    sequences, logits = generated(model, ids, 15, attention_mask=mask, cache_implementation=cache)
    mask = torch.cat((mask, torch.ones(2, 15, dtype=torch.long)), dim=1)
    full = model(sequences, attention_mask=mask).logits[:, 19:-1]
    torch.testing.assert_close(logits, full, **CLOSE)


def test_equals_the_oracle(model):
    longreach.extend(model, scaling="linear", train_length=16)
    sequences, logits = generated(model, tokens(1, 20), 12)
    slopes = Scaling("linear", 16)(torch.tensor(paper_slopes(HEADS)), 32)
    expected = oracle(model, sequences[0], slopes)[19:-1]
    torch.testing.assert_close(logits[0].double(), expected, **CLOSE)


def test_a_decoding_bias_serves_until_it_is_too_short_or_of_other_slopes_or_dtype(model):
    extension = extension_of(longreach.extend(model, scaling="linear", train_length=16))
    wanted = [(16, 5, torch.float32), (16, 4, torch.float32), (16, 400, torch.float32), (16, 5, torch.float64)]
    wanted += [(32, 5, torch.float64), (16, 5, torch.float32)]
    made = []
    for length, key_length, dtype in wanted:
        slopes = extension.slopes(length, torch.device("cpu"))
        bias = extension.decoding_bias(slopes, key_length, dtype)
        expected = -slopes.to(dtype)[:, None, None] * torch.arange(key_length - 1, -1, -1, dtype=dtype)
        torch.testing.assert_close(bias, expected, rtol=0, atol=0)
        made.append(extension.known_biases[slopes.device][1].data_ptr())
    assert [before == after for before, after in pairwise(made)] == [True, *[False] * 4]


def test_with_and_without_a_cache_generate_the_same(model):
    longreach.extend(model, scaling="ntk", train_length=16)
    ids = tokens(2, 20)
    for options in ({}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}, {"prefill_chunk_size": 7}):
        plain = {key: value for key, value in options.items() if key != "prefill_chunk_size"}
        cached = model.generate(ids, max_new_tokens=12, do_sample=False, **options)
        assert torch.equal(cached, model.generate(ids, max_new_tokens=12, do_sample=False, use_cache=False, **plain))


def test_generation_from_input_embeddings_has_the_same_length():
    model, ids = bloom(), tokens(1, 20)
    longreach.extend(model, scaling="linear", train_length=8)
    _, expected = generated(model, ids, 10)
    for limit in ({"max_new_tokens": 10}, {"max_length": 30}):
        out = model.generate(
            inputs_embeds=model.get_input_embeddings()(ids),
            **limit,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        torch.testing.assert_close(torch.stack(out.logits, dim=1), expected, **CLOSE)


@pytest.mark.parametrize("stated", [False, True])
def test_a_padded_row_decodes_as_it_does_alone(model, stated):
    """By itself a row's L' is its own 25 tokens and the new ones; a stated one is that of every row."""
    longreach.extend(model, scaling="linear", train_length=16, length=80 if stated else None)
    ids, mask = tokens(2, 40), torch.ones(2, 40, dtype=torch.long)
    mask[0, :15] = 0
    sequences, logits = generated(model, ids, 12, attention_mask=mask)
    for row, padding, length in ((0, 15, 80 if stated else 37), (1, 0, 80 if stated else 52)):
        alone, expected = generated(model, ids[row : row + 1, padding:], 12)
        assert torch.equal(sequences[row, padding:], alone[0])
        torch.testing.assert_close(logits[row], expected[0], **CLOSE)
        slopes = Scaling("linear", 16)(torch.tensor(paper_slopes(HEADS)), length)
        expected = oracle(model, alone[0], slopes)[39 - padding : -1]
        torch.testing.assert_close(logits[row].double(), expected, **CLOSE)


@pytest.mark.parametrize("stated", [False, True])
@pytest.mark.parametrize("name", SCALINGS)
def test_prompt_lookup_decodes_what_greedy_decoding_does(model, name, stated):
    """Its candidates go past the end, up to which L' counts."""
    train_length = None if name == "linear-fixed" else 16
    longreach.extend(model, **SCALINGS[name], train_length=train_length, length=57 if stated else None)
    ids = tokens(1, 10, seed=3).repeat(1, 4)  # so that there is much to look up
    # Old versions of transformers look for an end in what was looked up: for one that never comes. They also return
    # what goes past the length that was asked for.
    options = {"max_new_tokens": 17, "do_sample": False, "use_cache": True, "eos_token_id": VOCABULARY}
    expected = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=5, **options)[:, :57], expected)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("stated", [None, 90])
@pytest.mark.parametrize("scaling", ["linear", "ntk", "linear+logn"])
def test_an_extended_assistant_has_the_length_of_the_call_that_it_drafts_for(model, scaling, stated, padded):
    ids, mask = tokens(1, 24), torch.ones(1, 24, dtype=torch.long)
    mask[:, : 5 if padded else 0] = 0
    options = {"attention_mask": mask, "max_new_tokens": 30, "do_sample": False, "use_cache": True}
    options["pad_token_id"] = VOCABULARY  # which no text holds
    draft = copy.deepcopy(model)
    longreach.extend(model, scaling=scaling, train_length=16, length=stated)
    longreach.extend(draft, scaling=scaling, train_length=16)
    expected = model.generate(ids, **options)
    under = set()
    for each in (model, draft):
        extension_of(each).observer = lambda q, k, slopes, scale: under.add((slopes.min().item(), scale))
    assert torch.equal(model.generate(ids, assistant_model=draft, **options), expected)
    assert len(under) == 1
    assert extension_of(model).calls == extension_of(draft).calls == {}


def test_an_extended_assistant_drafts_for_a_stock_model(model):
    ids, options = tokens(1, 8), {"max_new_tokens": 20, "do_sample": False, "pad_token_id": VOCABULARY}
    options["use_cache"] = True
    draft = longreach.extend(copy.deepcopy(model), scaling="linear", train_length=6)
    expected = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, assistant_model=draft, **options), expected)


def test_an_assistant_where_the_text_holds_the_pad_token(model):
    assistant, ids = copy.deepcopy(model), tokens(1, 16)
    ids[0, 5] = ids[0, 9:11] = 0
    options = {"max_new_tokens": 10, "do_sample": False, "use_cache": True, "eos_token_id": VOCABULARY}
    expected = model.generate(ids, **options)
    longreach.extend(model, scaling="none")
    assert torch.equal(model.generate(ids, **options), expected)
    assert torch.equal(model.generate(ids, assistant_model=assistant, **options), expected)


def test_a_configuration_by_its_place_and_by_its_name_are_one(model):
    longreach.extend(model, scaling="linear", train_length=16)
    ids = tokens(1, 20)
    lengths = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    for cached in (False, True):
        config = GenerationConfig(max_new_tokens=4, use_cache=cached, do_sample=False, pad_token_id=0)
        expected = model.generate(ids, generation_config=config)
        by_name = lengths.copy()
        lengths.clear()
        assert torch.equal(model.generate(ids, config), expected)
        assert lengths == by_name == ([20, 1, 1, 1] if cached else [20, 21, 22, 23])
        lengths.clear()
    static = GenerationConfig(max_new_tokens=4, cache_implementation="static", use_cache=True, do_sample=False)
    cache = model.generate(ids, static, return_dict_in_generate=True, pad_token_id=0).past_key_values
    assert isinstance(cache, StaticCache)


def test_calls_in_two_threads_have_each_its_own_length(model):
    """The second call begins and ends while the first is under way."""
    longreach.extend(model, scaling="linear", train_length=16)
    ids = tokens(1, 20)
    expected = {count: generated(model, ids, count) for count in (30, 10)}
    found = {}

    class Meanwhile(StoppingCriteria):
        def __call__(self, input_ids, scores, **options):
            if input_ids.shape[1] == 25:
                thread = threading.Thread(target=decode, args=(10,))
                thread.start()
                thread.join(60)
            return torch.zeros(len(input_ids), dtype=torch.bool)

    def decode(count, **options):
        with torch.no_grad():
            found[count] = generated(model, ids, count, **options)

    decode(30, stopping_criteria=[Meanwhile()])
    for count in (30, 10):
        assert torch.equal(found[count][0], expected[count][0])
        assert torch.equal(found[count][1], expected[count][1])
    assert extension_of(model).calls == {}


@pytest.mark.parametrize("static", [False, True])
def test_a_loop_of_ones_own_under_a_stated_length(model, static):
    longreach.extend(model, scaling="linear", train_length=16)
    ids = tokens(1, 40)
    cache = StaticCache(config=model.config, max_cache_len=64) if static else DynamicCache()
    with fixed_length(model, 40):
        pieces = [
            model(piece, past_key_values=cache, use_cache=True).logits for piece in ids.split([17, 20, 1, 1, 1], 1)
        ]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(ids).logits, **CLOSE)


def test_a_cached_pass_without_a_stated_length_is_refused(model):
    ids = tokens(1, 12)
    for arguments in ({"scaling": "linear"}, {"scaling": "ntk"}, {"scaling": "none+logn"}):
        longreach.extend(model, **arguments, train_length=8)
        cache = model(ids, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="length L' of a cached forward pass is not stated"):
            model(ids[:, :1], past_key_values=cache)
    for arguments in ({"scaling": "none"}, {"scaling": "linear-fixed=2"}):
        longreach.extend(model, **arguments)
        cache = model(ids[:, :7], use_cache=True).past_key_values
        rest = model(ids[:, 7:], past_key_values=cache).logits
        torch.testing.assert_close(rest, model(ids).logits[:, 7:], **CLOSE)


def test_a_cache_of_another_length_is_refused():
    model, ids = bloom(), tokens(1, 12)
    longreach.extend(model, scaling="linear", train_length=8)
    cache = model(ids, use_cache=True).past_key_values  # for L' = 12
    with (
        fixed_length(model, 20),
        pytest.raises(ValueError, match=r"computed for L'=12, this call has L'=20"),
    ):
        model(ids[:, :1], past_key_values=cache)


def test_a_cache_of_another_rule_for_padded_rows_is_refused(model):
    """A stated length is that of every row, generate's is less a row's padding: without padding they are one."""
    longreach.extend(model, scaling="linear", train_length=8)
    ids, mask, step = tokens(2, 20), torch.ones(2, 26, dtype=torch.long), tokens(2, 1)
    mask[0, :6] = 0
    options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}

    def filled():
        with fixed_length(model, 26):
            return model(ids[:, :19], attention_mask=mask[:, :19], use_cache=True).past_key_values

    with pytest.raises(ValueError, match=r"computed for L'=26, this call has L'=26 less a row's padding: give extend"):
        model.generate(ids, attention_mask=mask[:, :20], past_key_values=filled(), **options)
    with fixed_length(model, 26):
        model.generate(ids, attention_mask=mask[:, :20], past_key_values=filled(), **options)
    cache = model.generate(ids, attention_mask=mask[:, :20], **options).past_key_values  # of 25
    with (
        fixed_length(model, 26),
        pytest.raises(ValueError, match=r"computed for L'=26 less a row's padding, this call has L'=26: give extend"),
    ):
        model(step, attention_mask=mask, past_key_values=cache)
    mask[:] = 1
    model.generate(ids, past_key_values=filled(), **options)
    longreach.extend(model, scaling="linear", train_length=32)  # below which all lengths are one
    mask[0, :6] = 0
    model.generate(ids, attention_mask=mask[:, :20], past_key_values=filled(), **options)


@pytest.mark.parametrize("scaling", ["linear", "ntk", "none+logn"])
def test_a_cache_of_unknown_origin_is_taken_at_a_stated_length(model, scaling):
    """As one is that was built from keys and values: a trained prefix, or a snapshot."""
    longreach.extend(model, scaling=scaling, train_length=8)
    ids = tokens(2, 20)
    with fixed_length(model, 20):
        expected = model(ids).logits[:, 12:]
        filled = model(ids[:, :12], use_cache=True).past_key_values
        given = [DynamicCache([(layer.keys, layer.values) for layer in filled.layers]) for _ in range(4)]
        torch.testing.assert_close(model(ids[:, 12:], past_key_values=given[0]).logits, expected, **CLOSE)
    with pytest.raises(ValueError, match="length L' of a cached forward pass is not stated"):
        model(ids[:, 12:], past_key_values=given[1])
    with pytest.raises(ValueError, match=r"computed for L'=unknown, this call has L'=21"):
        model.generate(ids, past_key_values=given[2], max_new_tokens=1)
    longreach.extend(model, scaling=scaling, train_length=8, length=20)
    torch.testing.assert_close(model(ids[:, 12:], past_key_values=given[3]).logits, expected, **CLOSE)


def test_a_conversation_shares_a_cache_under_a_length_for_all_of_it():
    model = bloom()
    longreach.extend(model, scaling="linear", train_length=16, length=64)
    cache, ids = DynamicCache(), tokens(1, 20)
    first = model.generate(ids, past_key_values=cache, max_new_tokens=5, do_sample=False)
    turn = torch.cat((first, tokens(1, 10, seed=1)), dim=1)
    with_cache, logits = generated(model, turn, 5, past_key_values=cache)
    torch.testing.assert_close(logits, model(with_cache).logits[:, 34:-1], **CLOSE)
    longreach.extend(model, scaling="linear", train_length=16)
    cache = DynamicCache()
    model.generate(ids, past_key_values=cache, max_new_tokens=5, do_sample=False)
    with pytest.raises(ValueError, match=r"computed for L'=25, this call has L'=40"):
        model.generate(turn, past_key_values=cache, max_new_tokens=5)


def test_within_the_training_length_all_lengths_are_one():
    model = bloom()
    longreach.extend(model, scaling="linear", train_length=64)
    cache, ids = DynamicCache(), tokens(1, 20)
    first = model.generate(ids, past_key_values=cache, max_new_tokens=5, do_sample=False)
    again = copy.deepcopy(cache)
    assert model.generate(first, past_key_values=again, max_new_tokens=9, do_sample=False).shape == (1, 34)


def test_a_length_below_the_input_is_refused(model):
    longreach.extend(model, scaling="linear", train_length=8, length=20)
    with pytest.raises(ValueError, match="length=20 is below the 21 tokens of this input"):
        model(tokens(1, 21))
    with pytest.raises(ValueError, match="length=20 is below the 25 tokens that generate may reach"):
        model.generate(tokens(1, 15), max_new_tokens=10)
    assert model.generate(tokens(1, 15), max_new_tokens=5).shape == (1, 20)
    with pytest.raises(ValueError, match="length=0"), fixed_length(model, 0):
        pass


def test_the_length_of_a_call_ends_with_it():
    model, ids = mpt(), tokens(1, 40)
    longreach.extend(model, scaling="linear", train_length=16)
    before = model(ids).logits
    model.generate(ids, max_new_tokens=20)
    with fixed_length(model, 99), pytest.raises(ValueError, match="below the 100"):
        model(tokens(1, 100))
    assert torch.equal(model(ids).logits, before)


def test_per_step_takes_the_length_of_each_step(model):
    """The paper's dynamic form: the last step's own query sees all keys under the slopes of the present length."""
    longreach.extend(model, scaling="linear", train_length=16, per_step=True)
    ids = tokens(1, 48)
    cache, steps = DynamicCache(), []
    for piece in ids.split([20] + [1] * 28, 1):
        steps.append(model(piece, past_key_values=cache, use_cache=True).logits)
    full = model(ids).logits
    torch.testing.assert_close(steps[0][:, -1], model(ids[:, :20]).logits[:, -1], **CLOSE)
    drift = (steps[-1][:, -1] - full[:, -1]).abs().max().item()
    assert drift > 0.01  # earlier keys and values of the second layer belong to earlier slopes
    one_layer = _first_layer_only(model)
    longreach.extend(one_layer, scaling="linear", train_length=16, per_step=True)
    cache = DynamicCache()
    for piece in ids.split([20] + [1] * 28, 1):
        last = one_layer(piece, past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(last, one_layer(ids).logits[:, -1:], **CLOSE)


def _first_layer_only(model):
    longreach.restore(model)
    model = copy.deepcopy(model)
    base = model.transformer
    blocks = "blocks" if hasattr(base, "blocks") else "h"
    setattr(base, blocks, getattr(base, blocks)[:1])
    return model


def test_continuous_batching_is_refused_by_name(model):
    longreach.extend(model, scaling="none")
    with pytest.raises(ValueError, match=r"^continuous batching knows no ALiBi: use generate"):
        model.generate_batch([[1, 2, 3]], GenerationConfig(max_new_tokens=2))
