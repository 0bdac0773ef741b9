import dataclasses
from types import SimpleNamespace

import pytest
import torch
from continuations import generate
from tiny_subjects import LENGTH, decoder_subject, transformers_subject

from longreach.measure.generation import generate_greedily, stream_tokens

PROMPT = [5, 270, 31, 8, 8, 119, 40]


def ending_at(subject, eos_id):
    return dataclasses.replace(subject, tokenizer=SimpleNamespace(eos_id=eos_id))


@pytest.mark.parametrize("method", ["alibi", "alibi:scaling=linear", "rotary", "t5", "sinusoidal"])
def test_equals_the_generation_of_our_own_decoder(method):
    subject = ending_at(decoder_subject(method), -1)
    (expected,) = generate(subject.model, [PROMPT], max_new_tokens=20)
    assert len(set(expected)) > 3  # the likeliest token depends on those before
    assert generate_greedily(subject, PROMPT, 20) == expected


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
    assert generate_greedily(subject, PROMPT, new) == expected


def test_eos_ends_the_text_and_is_not_part_of_it():
    subject = decoder_subject()
    endless = generate_greedily(ending_at(subject, -1), PROMPT, 20)
    eos_id = endless[7]
    ended = generate_greedily(ending_at(subject, eos_id), PROMPT, 20)
    assert ended == endless[: endless.index(eos_id)]


def test_each_token_is_read_once_and_only_one_logit_vector_is_made_for_it():
    subject = ending_at(decoder_subject(), -1)
    read = []

    def logits(tokens, chunk_size, **options):
        read.append((tokens[0].tolist(), options["last"]))
        return subject.model.logits(tokens, chunk_size, **options)

    model = SimpleNamespace(logits=logits, new_cache=subject.model.new_cache)
    new = generate_greedily(dataclasses.replace(subject, model=model), PROMPT, 5)
    assert read == [(PROMPT, 1), *(([token], 1) for token in new[:-1])]


def test_tokens_can_be_had_as_they_come():
    subject = ending_at(decoder_subject(), -1)
    stream = stream_tokens(subject, PROMPT, 1000)
    assert [next(stream) for _ in range(4)] == generate_greedily(subject, PROMPT, 4)


@pytest.mark.parametrize(
    ("prompt", "max_new_tokens", "message"),
    [
        ([], 1, "prompt is empty"),
        ([3, 9999], 1, r"token ids 3 to 9999 with vocab_size=\d+: the tokenizer is not the model's"),
        ([-1], 1, "token ids -1 to -1"),
        ([3], 0, "max_new_tokens=0: give at least 1"),
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
    assert len(generate_greedily(subject, PROMPT, LENGTH - len(PROMPT) + 1)) == LENGTH - len(PROMPT) + 1
