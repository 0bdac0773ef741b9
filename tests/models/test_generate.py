import math

import pytest
import torch
from continuations import generate
from variants import ARCHITECTURES, DYNAMIC, METHODS

from longreach.models.generate import stream

PROMPTS = [[7], [3, 1, 4, 1, 5, 9, 2, 6, 5], [8, 8, 8, 8]]


@torch.no_grad()
def greedy(model, prompt, count, length):
    """Continue by the full forward pass, one token at a time."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens]), length=length)[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("method", [*METHODS, *DYNAMIC])
def test_greedy_is_the_argmax_of_the_full_forward_for_every_prompt_of_a_batch(build, method):
    model = build(method)
    longest = max(map(len, PROMPTS)) + 12
    expected = [greedy(model, prompt, 12, longest) for prompt in PROMPTS]
    assert len({tuple(one) for one in expected}) == 3
    assert generate(model, PROMPTS, max_new_tokens=12) == expected


@pytest.mark.parametrize("method", DYNAMIC)
def test_dynamic_methods_are_told_one_length_for_the_whole_call(build, monkeypatch, method):
    model, told = build(method), []
    original = model.hidden

    def recording(tokens, **rest):
        told.append(rest["cache"].final_length)
        return original(tokens, **rest)

    monkeypatch.setattr(model, "hidden", recording)
    generate(model, PROMPTS, max_new_tokens=5)
    assert told == [9 + 5] * 5  # the longest prompt, and what is added


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture(build, architecture):
    model = build(**ARCHITECTURES[architecture])
    assert generate(model, PROMPTS[1:2], max_new_tokens=9) == [greedy(model, PROMPTS[1], 9, 18)]


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_is_its_prompts_alone(build, method):
    model = build(method)
    alone = [generate(model, [prompt], max_new_tokens=10)[0] for prompt in PROMPTS]
    assert generate(model, PROMPTS, max_new_tokens=10) == alone


def test_goes_past_the_training_length_without_a_cap(build):
    assert len(generate(build("alibi", num_layers=1), [[1]], max_new_tokens=200)[0]) == 200


@pytest.fixture
def distribution(build):
    """A model, a prompt, and the probabilities of its next token by the full forward pass."""
    model, prompt = build(vocab_size=12), [3, 1, 4]
    with torch.no_grad():
        logits = model(torch.tensor([prompt]))[0, -1]
    return model, prompt, logits


def drawn(model, prompt, count=4000, **options):
    """How often each of 12 tokens was drawn next."""
    steps = generate(model, [prompt] * count, max_new_tokens=1, **options)
    return torch.bincount(torch.tensor(steps).flatten(), minlength=12).double()


def assert_drawn_from(counts, probabilities):
    """Counts are those of a multinomial, each within five standard deviations, and zero exactly where it is zero."""
    total = counts.sum()
    deviation = (total * probabilities * (1 - probabilities)).sqrt()
    assert ((counts - total * probabilities).abs() <= 5 * deviation + 1e-9).all(), (counts, total * probabilities)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_temperature(distribution, temperature):
    model, prompt, logits = distribution
    assert_drawn_from(drawn(model, prompt, temperature=temperature), (logits / temperature).softmax(-1))


@pytest.mark.parametrize("top_k", [1, 3, 12, 99])
def test_top_k(distribution, top_k):
    model, prompt, logits = distribution
    kept = logits >= logits.sort(descending=True).values[min(top_k, 12) - 1]
    assert kept.sum() == min(top_k, 12)
    expected = (logits / 4).masked_fill(~kept, -math.inf).softmax(-1)
    assert_drawn_from(drawn(model, prompt, temperature=4.0, top_k=top_k), expected)


@pytest.mark.parametrize("top_p", [1e-6, 0.4, 0.9, 1.0])
def test_top_p(distribution, top_p):
    model, prompt, logits = distribution
    probabilities = (logits / 4).softmax(-1)
    kept, held = [], 0.0
    for token in probabilities.argsort(descending=True).tolist():
        if held < top_p:
            kept.append(token)
        held += float(probabilities[token])
    expected = torch.zeros(12, dtype=torch.float64)
    expected[kept] = probabilities[kept] / probabilities[kept].sum()
    assert_drawn_from(drawn(model, prompt, temperature=4.0, top_p=top_p), expected)


def test_top_p_is_of_what_top_k_left(distribution):
    model, prompt, logits = distribution
    best = (logits / 4).softmax(-1).sort(descending=True)
    within = best.values[:3] / best.values[:3].sum()
    top_p = float(within[0] + within[1] / 2)  # ends within the second of the three
    assert best.values[0] + best.values[1] < top_p  # so that of all tokens a third would be needed
    expected = torch.zeros(12, dtype=torch.float64)
    expected[best.indices[:2]] = within[:2] / within[:2].sum()
    assert_drawn_from(drawn(model, prompt, temperature=4.0, top_k=3, top_p=top_p), expected)


def test_vanishing_temperature_is_greedy(distribution):
    model, prompt, _ = distribution
    expected = generate(model, [prompt], max_new_tokens=5)
    assert generate(model, [prompt], max_new_tokens=5, temperature=1e-38) == expected


def test_the_seed_decides(build):
    model = build()

    def draw(seed):
        return generate(model, PROMPTS, max_new_tokens=20, temperature=1.0, seed=seed)

    before = torch.get_rng_state()
    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert torch.equal(torch.get_rng_state(), before)  # the global generator is left alone


def test_each_row_draws_as_it_would_alone_with_the_next_seed(build):
    model = build()
    together = generate(model, PROMPTS, max_new_tokens=10, temperature=1.0, seed=7)
    alone = [generate(model, [p], max_new_tokens=10, temperature=1.0, seed=7 + i)[0] for i, p in enumerate(PROMPTS)]
    assert together == alone


def test_ends_each_prompt_at_eos_and_does_not_give_it_out(build):
    model = build()
    plain = generate(model, PROMPTS, max_new_tokens=15)
    eos = plain[1][4]
    ended = [one[: one.index(eos)] if eos in one else one for one in plain]
    assert len(ended[1]) <= 4
    assert generate(model, PROMPTS, max_new_tokens=15, eos_id=eos) == ended
    steps = list(stream(model, PROMPTS, max_new_tokens=15, eos_id=eos))
    assert len(steps) == max(map(len, ended))
    for prompt, one in enumerate(ended):
        assert [step[prompt] for step in steps] == one + [None] * (len(steps) - len(one))


def test_streaming_is_lazy_and_ends_on_eos(build, monkeypatch):
    model, forwards = build(), []
    original = model.hidden

    def recording(tokens, **rest):
        forwards.append(tokens.shape)
        return original(tokens, **rest)

    monkeypatch.setattr(model, "hidden", recording)
    plain = generate(model, [[3, 1, 4]], max_new_tokens=8)[0]
    forwards.clear()
    steps = stream(model, [[3, 1, 4]], max_new_tokens=8, eos_id=plain[2])
    assert forwards == []
    assert next(steps) == [plain[0]]
    assert forwards == [(1, 3)]  # the prompt at once
    assert not torch.is_inference_mode_enabled()  # between tokens the caller's own mode holds
    rest = list(steps)
    stop = plain.index(plain[2])
    assert rest == [[token] for token in plain[1:stop]]
    assert forwards == [(1, 3)] + [(1, 1)] * stop  # no work past the end


def test_nothing_when_all_end_at_once(build):
    model = build()
    first = generate(model, [[7]], max_new_tokens=1)[0][0]
    assert list(stream(model, [[7], [7]], max_new_tokens=9, eos_id=first)) == []
    assert generate(model, [[7], [7]], max_new_tokens=9, eos_id=first) == [[], []]


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "prompts of lengths"),
        ([[1], []], {}, r"prompts of lengths \[1, 0\]"),
        ([[1, 50]], {}, "token id 50: the model's vocabulary has 50"),
        ([[-1]], {}, "token id -1"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0"),
        ([[1]], {"temperature": -0.5}, r"temperature=-0\.5"),
        ([[1]], {"temperature": math.inf}, "temperature=inf"),
        ([[1]], {"temperature": math.nan}, "temperature=nan"),
        ([[1]], {"top_k": 0}, "top_k=0"),
        ([[1]], {"top_p": 0.0}, r"top_p=0\.0"),
        ([[1]], {"top_p": 1.01}, r"top_p=1\.01"),
        ([[1]], {"top_p": math.nan}, "top_p=nan"),
    ],
)
def test_wrong_arguments_are_named(build, prompts, options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        stream(build(), prompts, **{"max_new_tokens": 3, **options})  # at the call, not at the first token


def test_past_a_learned_table(build):
    model = build("learned:table_length=12")
    assert len(generate(model, [[1, 2]], max_new_tokens=11)[0]) == 11
    message = r"^max_new_tokens=30 after the prompt needs 31 positions: .*holds 12; ask for fewer tokens$"
    with pytest.raises(ValueError, match=message):
        generate(model, [[1, 2]], max_new_tokens=30)
