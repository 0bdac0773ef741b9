import dataclasses
import importlib
import math
import sys
from types import SimpleNamespace

import lm_eval
import numpy as np
import pytest
import torch
from harness_task import write_task
from lm_eval.api.registry import model_registry
from lm_eval.tasks import TaskManager
from tiny_subjects import LENGTH, decoder_subject, tokenizer, transformers_subject

from longreach.measure.generation import stream_tokens
from longreach.measure.lm_eval import HarnessModel, register
from longreach.measure.score import score

TEXTS = [
    "the sum of 1 and 2 is 3, the sum of 3 and 4 is 7, and so it goes on and on.",
    "another text",
    "the sum of 5 and 9 is 14, or else there is no sum of anything at all; who knows that.",
]


def requests(*arguments):
    return [SimpleNamespace(args=argument) for argument in arguments]


def with_eos(text):
    return np.array([tokenizer().eos_id, *tokenizer().encode(text)])


def nll(subject, tokens, valid_length):
    """In nonoverlapping windows."""
    return score(
        subject.model,
        tokens,
        valid_length=valid_length,
        stride=valid_length,
        vocab_size=subject.vocab_size,
        device=subject.device,
        tokens_per_batch=valid_length,
    ).nll


def expected_rolling(subject, text, length):
    """In our terms: nonoverlapping windows over eos and the text, the last one moved back until it is full."""
    tokens = with_eos(text)
    targets = len(tokens) - 1
    rest = targets % length if targets > length else 0
    total = nll(subject, tokens[: len(tokens) - rest], length).sum()
    if rest:
        total += nll(subject, tokens[-length - 1 :], length)[-rest:].sum()
    return -total


def whole_number_of_windows(text, length):
    tokens = tokenizer().encode(text)
    return tokenizer().decode(tokens[: len(tokens) // length * length])


@pytest.mark.parametrize("method", ["alibi", "rotary", "sinusoidal"])
@pytest.mark.parametrize("length", [4, 8, LENGTH])
def test_rolling_equals_our_nonoverlapping_figure(method, length):
    subject = decoder_subject(method)
    text = whole_number_of_windows(TEXTS[0], length)
    tokens = with_eos(text)
    assert (len(tokens) - 1) % length == 0
    assert len(tokens) > 2 * length
    (rolling,) = HarnessModel(subject, max_length=length).loglikelihood_rolling(requests((text,)), disable_tqdm=True)
    assert rolling == pytest.approx(-nll(subject, tokens, length).sum(), rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_rolling_moves_the_last_window_back(batch_size):
    subject = decoder_subject()
    model = HarnessModel(subject, max_length=7, batch_size=batch_size)
    rolling = model.loglikelihood_rolling(requests(*((text,) for text in TEXTS)), disable_tqdm=True)
    expected = [expected_rolling(subject, text, 7) for text in TEXTS]
    assert rolling == pytest.approx(expected, rel=1e-6)
    plain = -nll(subject, with_eos(TEXTS[0]), 7).sum()
    assert (len(with_eos(TEXTS[0])) - 1) % 7 != 0
    assert rolling[0] != pytest.approx(plain, rel=1e-3)


@pytest.mark.parametrize("length", [11, LENGTH])
def test_figures_are_those_of_the_harness_own_model(length, tmp_path):
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedTokenizerFast

    subject = transformers_subject("gpt2")
    subject.tokenizer.save(tmp_path / "tokenizer.json")
    theirs = HFLM(
        pretrained=subject.model.model,
        tokenizer=PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), eos_token="<|endoftext|>"),
        max_length=length,
        batch_size=2,
        device="cpu",
    )
    ours = HarnessModel(subject, max_length=length, batch_size=2)
    rolling = requests(*((text,) for text in TEXTS))
    assert ours.loglikelihood_rolling(rolling, disable_tqdm=True) == pytest.approx(
        theirs.loglikelihood_rolling(rolling, disable_tqdm=True), rel=1e-5
    )
    pairs = requests(("the sum of 1 and", " 2"), ("the sum of 1 and 2 is", " 3, I guess"), ("", "the sum"), ("a ", "b"))
    for own, other in zip(
        ours.loglikelihood(pairs, disable_tqdm=True), theirs.loglikelihood(pairs, disable_tqdm=True), strict=True
    ):
        assert own[0] == pytest.approx(other[0], rel=1e-5)
        assert own[1] == other[1]
    wanted = requests(("the sum of 1 and 2 is 3", {"until": ["\n\n"], "max_gen_toks": 3, "do_sample": False}))
    assert ours.generate_until(wanted, disable_tqdm=True) == theirs.generate_until(wanted, disable_tqdm=True)


def greedy_text(subject, context, num_tokens):
    endless = dataclasses.replace(subject, tokenizer=SimpleNamespace(eos_id=-1))
    tokens = list(stream_tokens(endless, tokenizer().encode(context), num_tokens))
    return tokens, tokenizer().decode(tokens)


def test_a_continuation_costs_what_the_model_says_and_greedy_ones_are_known():
    subject = decoder_subject()
    context = tokenizer().encode("the sum of 1 and 2 is")
    likely = list(stream_tokens(subject, context, 3))
    assert len(likely) == 3
    for continuation in (likely, [*likely[:2], (likely[2] + 1) % subject.vocab_size], likely[:1]):
        with torch.inference_mode():
            logits = subject.model(torch.tensor([context + continuation])).log_softmax(dim=-1)[0]
        expected = sum(logits[len(context) + i - 1, token].item() for i, token in enumerate(continuation))
        model = HarnessModel(subject, max_length=100)
        ((nats, greedy),) = model._loglikelihood_tokens([(None, context, continuation)], disable_tqdm=True)
        assert nats == pytest.approx(expected, rel=1e-5)
        assert greedy == (continuation in (likely, likely[:1]))


def test_an_empty_continuation_is_certain_whatever_it_is_scored_with():
    pairs = [(None, [5, 6], []), (None, [5, 6], [7]), (None, [8, 9, 10], [])]
    alone = HarnessModel(decoder_subject())._loglikelihood_tokens(pairs[1:2], disable_tqdm=True)
    together = HarnessModel(decoder_subject(), batch_size=3)._loglikelihood_tokens(pairs, disable_tqdm=True)
    assert together == [(0.0, True), *alone, (0.0, True)]
    assert alone[0][0] < 0


def test_results_come_in_the_order_of_the_requests_whatever_the_batches():
    subject = decoder_subject()
    pairs = [([5, 6, 7][: 1 + n % 3], [8 + n, 9][: 1 + n % 2]) for n in range(12)]
    single = [HarnessModel(subject)._loglikelihood_tokens([(None, *pair)], disable_tqdm=True)[0] for pair in pairs]
    batched = HarnessModel(subject, batch_size=4)._loglikelihood_tokens(
        [(None, *pair) for pair in pairs], disable_tqdm=True
    )
    assert [nats for nats, _ in batched] == pytest.approx([nats for nats, _ in single], rel=1e-5)


def test_long_contexts_lose_their_beginning():
    subject = decoder_subject()
    model = HarnessModel(subject, max_length=6)
    short = model._loglikelihood_tokens([(None, [5, 6, 7, 8], [9, 10, 11])], disable_tqdm=True)
    assert model._loglikelihood_tokens([(None, [1, 2, 3, 4, 5, 6, 7, 8], [9, 10, 11])], disable_tqdm=True) == short
    with pytest.raises(ValueError, match="a continuation of 7 tokens with max_length=6: give a greater max_length"):
        model._loglikelihood_tokens([(None, [1], [2] * 7)], disable_tqdm=True)


def test_text_is_generated_up_to_its_stop_string():
    subject = decoder_subject()
    context = "the sum of 1 and 2 is 3, the sum of"
    tokens, text = greedy_text(subject, context, 12)
    stop = tokenizer().decode(tokens[4:6])
    assert stop.isascii()
    model = HarnessModel(subject, max_length=100)

    def generated(**options):
        (result,) = model.generate_until(requests((context, {"max_gen_toks": 12, **options})), disable_tqdm=True)
        return result

    assert generated(until=[]) == text
    assert generated(until=[stop]) == text[: text.index(stop)]
    assert generated(until=stop) == text[: text.index(stop)]
    assert generated(until=[text[-3:], stop, ""]) == text[: text.index(stop)]


def test_generation_leaves_room_in_max_length():
    subject = decoder_subject()
    context = TEXTS[0]
    kept = tokenizer().encode(context)[-20:]
    model = HarnessModel(subject, max_length=25, max_gen_toks=5)
    (text,) = model.generate_until(requests((context, {"until": ["\n\n"]})), disable_tqdm=True)
    assert text == tokenizer().decode(list(stream_tokens(subject, kept, 5)))
    with pytest.raises(ValueError, match="max_gen_toks=25 with max_length=25: give a greater max_length"):
        model.generate_until(requests((context, {"max_gen_toks": 25})), disable_tqdm=True)
    with pytest.raises(ValueError, match="max_gen_toks=0: give at least 1"):
        model.generate_until(requests((context, {"max_gen_toks": 0})), disable_tqdm=True)
    with pytest.raises(ValueError, match="do_sample=True: longreach decodes greedily"):
        model.generate_until(requests((context, {"do_sample": True, "temperature": 1.0})), disable_tqdm=True)


def test_the_training_length_is_the_default_and_bad_values_are_refused():
    assert HarnessModel(decoder_subject()).max_length == LENGTH
    with pytest.raises(ValueError, match="max_length=0: give a positive integer"):
        HarnessModel(decoder_subject(), max_length=0)
    with pytest.raises(ValueError, match="batch_size='auto': give a positive integer"):
        HarnessModel(decoder_subject(), batch_size="auto")
    with pytest.raises(ValueError, match=f"max_length={LENGTH + 1}: learned takes at most {LENGTH} tokens"):
        HarnessModel(decoder_subject("learned"), max_length=LENGTH + 1)


@pytest.fixture
def task(tmp_path):
    """A task manager that knows the task `tiny`: perplexity of TEXTS."""
    write_task(tmp_path, TEXTS)
    return TaskManager(include_path=str(tmp_path), include_defaults=False)


@pytest.fixture
def registry():
    """Forgets the name again."""
    yield model_registry
    model_registry._objs.pop("longreach")


def test_the_harness_runs_its_tasks_on_a_registered_model(task, registry):
    subject = decoder_subject()
    opened = []

    def open_subject(run, device=None):
        opened.append((run, device))
        return subject

    register(open_subject)
    results = lm_eval.simple_evaluate(
        model="longreach",
        model_args="run=runs/demo/alibi,max_length=7",
        tasks=["tiny"],
        batch_size="4",
        device="cpu",
        task_manager=task,
        bootstrap_iters=0,
    )
    assert opened == [("runs/demo/alibi", "cpu")]
    nats = sum(expected_rolling(subject, text, 7) for text in TEXTS)
    num_bytes = sum(len(text.encode()) for text in TEXTS)
    assert results["results"]["tiny"]["byte_perplexity,none"] == pytest.approx(math.exp(-nats / num_bytes), rel=1e-6)
    with pytest.raises(ValueError, match="batch_size='auto': give a positive integer"):
        registry.get("longreach").create_from_arg_string("run=x", {"batch_size": "auto"})


def test_without_the_harness_the_extra_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "longreach.measure.lm_eval")
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"needs lm-evaluation-harness: pip install 'longreach\[eval\]'$"):
        importlib.import_module("longreach.measure.lm_eval")
