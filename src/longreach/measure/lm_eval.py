"""A model under test as a model of lm-evaluation-harness (the extra `eval`), so that its tasks run on it.

    from lm_eval import simple_evaluate
    simple_evaluate(HarnessModel(subject, max_length=1024), tasks=["lambada_openai"])

The harness finds a model by name only if it was registered in the same process. After `register`, its own command
line knows `--model longreach`:

    register(open_subject)
    lm_eval.__main__.cli_evaluate()

What `loglikelihood_rolling` of a text gives, in our terms: its tokens with eos before them, in nonoverlapping windows
of valid_length = max_length, of which the last is moved back until it is full. So it equals `score` with
stride = valid_length whenever max_length divides the number of tokens; otherwise the tokens of the last window see more
context here than there.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from longreach.measure.generation import stream_tokens
from longreach.measure.score import LOGITS_PER_CHUNK
from longreach.measure.subject import Subject

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import model_registry
    from lm_eval.config import evaluate_config
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise ImportError("the harness adapter needs lm-evaluation-harness: pip install 'longreach[eval]'") from error
from tqdm import tqdm

Request = tuple[tuple[str, str] | None, list[int], list[int]]
"""The texts that a request came from, None for windows of a longer text; tokens of the context, and of what is
scored after it."""


class HarnessModel(TemplateLM):
    """A subject behind the harness's interface.

    Sequences of the same length are batched, others never: without padding, no result depends on its batch.

    Args:
        subject: the model with its tokenizer.
        max_length: the most tokens that it is given at once; longer contexts lose their beginning. The training
            length when None.
        batch_size: how many sequences go through the model at a time.
        max_gen_toks: how many tokens to generate where a task does not say.

    Raises:
        ValueError: a value out of range.
    """

    def __init__(
        self, subject: Subject, *, max_length: int | None = None, batch_size: int = 1, max_gen_toks: int = 256
    ) -> None:
        super().__init__()
        self.subject = subject
        self.max_length = subject.train_length if max_length is None else max_length
        self.batch_size = batch_size
        self.max_gen_toks = max_gen_toks
        self._device = subject.device
        for name in ("max_length", "batch_size", "max_gen_toks"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}: give a positive integer")
        if subject.max_length is not None and self.max_length > subject.max_length:
            raise ValueError(f"max_length={self.max_length}: {subject.name} takes at most {subject.max_length} tokens")

    @property
    def eot_token_id(self) -> int:
        """The token that ends a document; it stands before texts that have no context."""
        return self.subject.tokenizer.eos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Tokens of a text. Special tokens are never added, whatever the harness asks for."""
        return self.subject.tokenizer.encode(string)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood in nats of each text, all of its tokens scored once; see the top of this file."""
        windows: list[Request] = []
        texts = []  # which text each window is of
        for index, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(tokens, self.eot_token_id, self.max_length, context_len=1):
                windows.append((None, *make_disjoint_window(window)))
                texts.append(index)
        results = [0.0] * len(requests)
        for index, (nats, _) in zip(texts, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            results[index] += nats
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, result)
        return results

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations, each up to and without the first of its stop strings, or eos.

        Raises:
            ValueError: a task that asks for sampling, or for as many tokens as max_length holds or more.
        """
        texts = []
        for request in tqdm(requests, disable=disable_tqdm, desc="Generating"):
            context, options = request.args
            text = self._continuation(context, normalize_gen_kwargs(options, self.max_gen_toks))
            self.cache_hook.add_partial("generate_until", request.args, text)
            texts.append(text)
        return texts

    def _continuation(self, context: str, options: dict[str, Any]) -> str:
        if options["do_sample"]:
            raise ValueError("do_sample=True: longreach decodes greedily; run the task with do_sample=False")
        if options["max_gen_toks"] < 1:
            raise ValueError(f"max_gen_toks={options['max_gen_toks']}: give at least 1")
        room = self.max_length - options["max_gen_toks"]
        if room < 1:
            raise ValueError(
                f"max_gen_toks={options['max_gen_toks']} with max_length={self.max_length}: give a greater max_length"
            )
        prompt = self.tok_encode(context)[-room:] or [self.prefix_token_id]
        stops = [stop for stop in options["until"] if stop]
        text, tokens = "", []
        for token in stream_tokens(self.subject, prompt, options["max_gen_toks"]):
            tokens.append(token)
            text = self.subject.tokenizer.decode(tokens)
            if any(stop in text for stop in stops):
                break
        return text[: min((found for stop in stops if (found := text.find(stop)) >= 0), default=len(text))]

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Log-likelihood in nats of each continuation after its context, and whether greedy decoding would give it."""
        results: dict[int, tuple[float, bool]] = {}
        for index, (_, _, continuation) in enumerate(requests):
            if not continuation:  # a certainty, and what anything would write
                results[index] = (0.0, True)
            if len(continuation) > self.max_length:
                raise ValueError(
                    f"a continuation of {len(continuation)} tokens with max_length={self.max_length}: "
                    "give a greater max_length"
                )

        def length(index: int) -> int:
            return min(len(requests[index][1]) + len(requests[index][2]) - 1, self.max_length)

        progress = tqdm(total=len(requests) - len(results), disable=disable_tqdm, desc="Scoring")
        left = (index for index in range(len(requests)) if index not in results)
        longest_first = sorted(left, key=length, reverse=True)
        for _, alike in itertools.groupby(longest_first, key=length):
            while batch := list(itertools.islice(alike, self.batch_size)):
                scored = self._score([requests[index][1:] for index in batch])
                for index, result in zip(batch, scored, strict=True):
                    results[index] = result
                    if (texts := requests[index][0]) is not None:
                        self.cache_hook.add_partial("loglikelihood", texts, result)
                progress.update(len(batch))
        progress.close()
        return [results[index] for index in range(len(requests))]

    @torch.inference_mode()
    def _score(self, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """`_loglikelihood_tokens` of pairs of context and continuation that are equally long together."""
        subject = self.subject
        tokens = torch.tensor([(context + continuation)[-self.max_length - 1 :] for context, continuation in pairs])
        inputs, targets = tokens[:, :-1].to(subject.device), tokens[:, 1:].to(subject.device)  # [B, T]
        last = max(len(continuation) for _, continuation in pairs)
        chunk_size = max(1, LOGITS_PER_CHUNK // (len(pairs) * subject.vocab_size))
        nats, greedy = [], []
        start = targets.shape[1] - last
        for logits in subject.model.logits(inputs, chunk_size, last=last):
            chunk = targets[:, start : start + logits.shape[1]]
            nats.append(_log_probabilities(logits, chunk))
            greedy.append(logits.argmax(dim=-1) == chunk)
            start += logits.shape[1]
        all_nats, all_greedy = torch.cat(nats, dim=1), torch.cat(greedy, dim=1)  # [B, last]
        return [
            (all_nats[row, -len(continuation) :].sum().item(), bool(all_greedy[row, -len(continuation) :].all()))
            for row, (_, continuation) in enumerate(pairs)
        ]


def register(open_subject: Callable[..., Subject]) -> None:
    """Make the name `longreach` known to the harness in this process.

    Args:
        open_subject: makes the subject from what stands in `--model_args` beside the options of `HarnessModel`, and
            from the harness's `device`, each as a keyword argument: with `open_subject(run, device=None)`, the user
            writes `--model_args run=runs/demo/alibi-seed0,max_length=1024`.

    Raises:
        ValueError: the name is taken, by an earlier call with another function or by another package.
    """

    class RegisteredModel(HarnessModel):
        def __init__(
            self,
            *,
            max_length: int | None = None,
            batch_size: int | str = 1,
            max_gen_toks: int = 256,
            **arguments: Any,
        ) -> None:
            if isinstance(batch_size, str):  # from the harness's command line
                if not batch_size.isdigit():
                    raise ValueError(f"batch_size={batch_size!r}: give a positive integer")
                batch_size = int(batch_size)
            try:
                opened = signature(open_subject).bind(**arguments)
            except TypeError as error:
                known = ", ".join(signature(open_subject).parameters)
                raise ValueError(f"model_args: {error}; beside options of the harness it has {known}") from error
            super().__init__(
                open_subject(*opened.args, **opened.kwargs),
                max_length=max_length,
                batch_size=batch_size,
                max_gen_toks=max_gen_toks,
            )

    model_registry.register("longreach", target=RegisteredModel)


def leave_device_to_models() -> None:
    """Where no `--device` is typed, let the harness's command line give models none: it gives cuda:0 by itself, which
    not every machine has, and which is not where each run is to go.
    """

    @dataclass
    class Config(evaluate_config.EvaluatorConfig):
        device: str | None = None

    evaluate_config.EvaluatorConfig = Config


def _log_probabilities(logits: Tensor, targets: Tensor) -> Tensor:
    """Of targets (B, T) under logits (B, T, V), (B, T) float64."""
    return -torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none").double()
