import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from tiny_subjects import LENGTH, decoder_subject, transformers_subject

from longreach.measure.generation import sampler, stream_tokens
from longreach.measure.subject import Unsupported

PROMPT = [5, 270, 31, 8, 8, 119, 40]


def ending_at(subject, eos_id):
    return dataclasses.replace(subject, tokenizer=SimpleNamespace(eos_id=eos_id))


@torch.no_grad()
@pytest.mark.parametrize("method", ["alibi", "alibi:scaling=linear", "rotary", "t5", "sinusoidal"])
def test_greedy_is_the_argmax_of_the_full_forward(method):
    subject = ending_at(decoder_subject(method), -1)
    ids = list(PROMPT)
    for _ in range(20):
        ids.append(int(subject.model(torch.tensor([ids]), length=len(PROMPT) + 20)[0, -1].argmax()))
    expected = ids[len(PROMPT) :]
    assert len(set(expected)) > 3  # the likeliest token depends on those before
    assert list(stream_tokens(subject, PROMPT, 20)) == expected


@pytest.mark.parametrize("family", ["gpt2", "llama", "bloom"])
def test_equals_the_generation_of_transformers(family):
    subject = ending_at(transformers_subject(family), -1)
    inputs = torch.tensor([PROMPT])
    new = LENGTH - len(PROMPT)
    whole = subject.model.model.generate(
        inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=new, do_sample=False, eos_token_id=None
    )
    expected = whole[0, len(PROMPT) :].tolist()
    assert len(set(expected)) > 2
    assert list(stream_tokens(subject, PROMPT, new)) == expected


def test_eos_ends_the_text_and_is_not_part_of_it():
    subject = decoder_subject()
    endless = list(stream_tokens(ending_at(subject, -1), PROMPT, 20))
    eos_id = endless[7]
    ended = list(stream_tokens(ending_at(subject, eos_id), PROMPT, 20))
    assert ended == endless[: endless.index(eos_id)]


def test_each_token_is_read_once_and_only_one_logit_vector_is_made_for_it():
    subject = ending_at(decoder_subject(), -1)
    read = []

    def logits(tokens, chunk_size, **options):
        read.append((tokens[0].tolist(), options["last"]))
        return subject.model.logits(tokens, chunk_size, **options)

    model = SimpleNamespace(logits=logits, new_cache=subject.model.new_cache)
    new = list(stream_tokens(dataclasses.replace(subject, model=model), PROMPT, 5))
    assert read == [(PROMPT, 1), *(([token], 1) for token in new[:-1])]


def test_tokens_can_be_had_as_they_come():
    subject = ending_at(decoder_subject(), -1)
    stream = stream_tokens(subject, PROMPT, 1000)
    assert [next(stream) for _ in range(4)] == list(stream_tokens(subject, PROMPT, 4))
    assert not torch.is_inference_mode_enabled()  # between tokens the caller's own mode holds


@pytest.mark.parametrize(
    ("prompt", "max_new_tokens", "message"),
    [
        ([], 1, "prompt is empty"),
        ([3] * 10, LENGTH - 8, f"max_new_tokens=8 after a prompt of 10 tokens needs {LENGTH + 1} positions"),
    ],
)
def test_bad_input_is_refused_before_the_first_token(prompt, max_new_tokens, message):
    subject = dataclasses.replace(decoder_subject("learned"), max_length=LENGTH)
    with pytest.raises(ValueError, match=message):
        stream_tokens(subject, prompt, max_new_tokens)


def test_a_table_of_positions_can_be_used_to_its_end():
    subject = ending_at(decoder_subject("learned"), -1)
    assert subject.max_length == LENGTH
    assert len(list(stream_tokens(subject, PROMPT, LENGTH - len(PROMPT) + 1))) == LENGTH - len(PROMPT) + 1


# Drawn tokens

LOGITS = torch.randn(12, generator=torch.Generator().manual_seed(2)) * 2


def assert_drawn_from(probabilities, **options):
    """Counts are those of a multinomial, each within five standard deviations, and zero exactly where it is zero."""
    choose = sampler(torch.device("cpu"), **{"temperature": 4.0, "top_k": None, "top_p": None, "seed": 0, **options})
    total = 4000
    counts = torch.bincount(choose(LOGITS.expand(total, -1)), minlength=12).double()
    deviation = (total * probabilities * (1 - probabilities)).sqrt()
    assert ((counts - total * probabilities).abs() <= 5 * deviation + 1e-9).all(), (counts, total * probabilities)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_temperature(temperature):
    assert_drawn_from((LOGITS / temperature).softmax(-1), temperature=temperature)


@pytest.mark.parametrize("top_k", [1, 3, 12, 99])
def test_top_k(top_k):
    kept = LOGITS.sort(descending=True).values[min(top_k, 12) - 1] <= LOGITS
    assert kept.sum() == min(top_k, 12)
    assert_drawn_from((LOGITS / 4).masked_fill(~kept, -math.inf).softmax(-1), top_k=top_k)


@pytest.mark.parametrize("top_p", [1e-6, 0.4, 0.9, 1.0])
def test_top_p(top_p):
    probabilities = (LOGITS / 4).softmax(-1)
    kept, held = [], 0.0
    for token in probabilities.argsort(descending=True).tolist():
        if held < top_p:
            kept.append(token)
        held += float(probabilities[token])
    expected = torch.zeros(12, dtype=torch.float64)
    expected[kept] = (probabilities[kept] / probabilities[kept].sum()).double()
    assert_drawn_from(expected, top_p=top_p)


def test_top_p_takes_no_token_once_the_likelier_hold_as_much():
    choose = sampler(torch.device("cpu"), temperature=1.0, top_k=None, top_p=0.5, seed=0)
    assert len(set(choose(torch.zeros(100, 2)).tolist())) == 1  # half each, exactly


def test_top_p_is_of_what_top_k_left():
    best = (LOGITS / 4).softmax(-1).sort(descending=True)
    within = best.values[:3] / best.values[:3].sum()
    top_p = float(within[0] + within[1] / 2)  # ends within the second of the three
    assert best.values[0] + best.values[1] < top_p  # so that of all tokens a third would be needed
    expected = torch.zeros(12, dtype=torch.float64)
    expected[best.indices[:2]] = (within[:2] / within[:2].sum()).double()
    assert_drawn_from(expected, top_k=3, top_p=top_p)


def test_the_seed_decides():
    subject = ending_at(decoder_subject(), -1)

    def draw(seed, temperature=1.0):
        choose = sampler(subject.device, temperature=temperature, top_k=None, top_p=None, seed=seed)
        return list(stream_tokens(subject, PROMPT, 20, choose))

    before = torch.get_rng_state()
    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert torch.equal(torch.get_rng_state(), before)  # the global generator is left alone
    assert draw(1, temperature=1e-38) == draw(2, temperature=0.0) == list(stream_tokens(subject, PROMPT, 20))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_refused(value):
    subject = decoder_subject()
    logits = torch.zeros(1, 1, subject.vocab_size)
    logits[..., 3] = value
    model = SimpleNamespace(logits=lambda *arguments, **options: iter([logits]), new_cache=lambda length: None)
    with pytest.raises(Unsupported, match="nan or infinite: load it in float32"):
        list(stream_tokens(dataclasses.replace(subject, model=model), PROMPT, 5))
