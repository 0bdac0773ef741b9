import os
import re
import signal
from dataclasses import dataclass, field
from itertools import accumulate, cycle, pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from adversarial import CASES, assert_within_the_rule, magnitudes, probabilities, random_grads, run
from hypothesis import given, settings
from hypothesis import strategies as st
from together import Company, fork, statuses, together

from longreach.ops.alibi import alibi_slopes
from longreach.ops.attention import attention
from longreach.ops.reference import reference_attention
from longreach.ops.visibility import Visibility
from longreach.parallel import Traffic, context_parallel_attention, count_traffic
from longreach.parallel import attention as parallel_attention
from longreach.parallel.line import Line
from longreach.parallel.needed import Common, Looking, first_keys, opening

EXACT = 2.0**-40
"""Of float64: 13 bits of roundings of 2^-53, in sums of a thousand products."""


@pytest.fixture(scope="module", autouse=True)
def _loaded():
    """What attention loads when it is first called and differentiated is there for all processes that are forked."""
    x = torch.randn(1, 1, 600, 8, requires_grad=True)
    attention(x, x, x, slopes=torch.ones(1), impl="cpu").sum().backward()


@dataclass(frozen=True, eq=False)
class Split:
    """A sequence, how it is cut, and options of attention over the whole of it."""

    lengths: tuple[int, ...]
    heads: int = 4
    kv_heads: int = 4
    batch: int = 1
    head_dim: int = 16
    slopes: Any = None
    """None for the paper's."""
    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    def inputs(self, dtype=torch.float64):
        """q, k, v and a gradient of the output, of the whole sequence, and the slopes."""
        generator = torch.Generator().manual_seed(self.seed)
        heads = (self.heads, self.kv_heads, self.kv_heads, self.heads)
        tensors = [
            torch.randn(self.batch, h, sum(self.lengths), self.head_dim, generator=generator, dtype=torch.float64)
            for h in heads
        ]
        slopes = alibi_slopes(self.heads).double() if self.slopes is None else self.slopes
        return [x.to(dtype) for x in tensors], slopes

    def pieces(self):
        return [slice(*ends) for ends in pairwise(accumulate(self.lengths, initial=0))]


def _leaves(slopes):
    pair = slopes if isinstance(slopes, tuple) else (slopes,)
    leaves = tuple(x.clone().requires_grad_() for x in pair)
    return leaves, leaves if isinstance(slopes, tuple) else leaves[0]


def by_one(split, tensors, slopes):
    """Output, LSE and all gradients by the definition."""
    *qkv, grad = tensors
    qkv = [x.clone().requires_grad_() for x in qkv]
    leaves, given = _leaves(slopes)
    length = sum(split.lengths)
    masks = {name: value for name, value in split.options.items() if name not in ("scale", "tolerance", "impl")}
    visibility = Visibility(length, length, **masks)
    out, lse = reference_attention(*qkv, visibility, slopes=given, scale=split.options.get("scale"))
    finite = lse.masked_fill(lse.isneginf(), 0.0)
    loss = (out * grad).sum() + finite.sum()
    gradients = torch.autograd.grad(loss, [*qkv, *leaves], allow_unused=True, materialize_grads=True)
    return out.detach(), lse.detach(), gradients


def by_many(split, tensors, slopes, rank, group):
    """The same of this rank's piece; the gradients of the slopes of all."""
    piece = split.pieces()[rank]
    *qkv, grad = (x[:, :, piece].contiguous() for x in tensors)
    qkv = [x.requires_grad_() for x in qkv]
    leaves, given = _leaves(slopes)
    options = dict(split.options)
    if options.get("key_padding_mask") is not None:
        options["key_padding_mask"] = options["key_padding_mask"][:, piece]
    out, lse = context_parallel_attention(*qkv, group=group, slopes=given, return_lse=True, **options)
    finite = lse.masked_fill(lse.isneginf(), 0.0)
    loss = (out * grad).sum() + finite.sum()
    gradients = list(torch.autograd.grad(loss, [*qkv, *leaves], allow_unused=True, materialize_grads=True))
    for gradient in gradients[3:]:
        dist.all_reduce(gradient, group=group)
    return out.detach(), lse.detach(), gradients


def check(rank, split):
    """Output, LSE and gradients in float64, by as many of the processes as there are pieces, are those of one."""
    if rank >= len(split.lengths):
        return
    tensors, slopes = split.inputs()
    expected_out, expected_lse, expected = by_one(split, tensors, slopes)
    out, lse, gradients = by_many(split, tensors, slopes, rank, GROUPS[len(split.lengths)])
    piece = split.pieces()[rank]

    def close(actual, wanted, what):
        scale = max(1.0, wanted.abs().nan_to_num(0, 0, 0).max().item()) if wanted.numel() else 1.0
        torch.testing.assert_close(actual, wanted, rtol=0, atol=EXACT * scale, msg=lambda m: f"{split}: {what}: {m}")

    close(out, expected_out[:, :, piece], "out")
    close(lse, expected_lse[:, :, piece], "lse")
    for what, actual, wanted in zip(("dq", "dk", "dv", "dslopes", "dright"), gradients, expected, strict=False):
        close(actual, wanted[:, :, piece] if what in ("dq", "dk", "dv") else wanted, what)


@st.composite
def splits(draw):
    """Sequences of some hundred tokens at most, cut anywhere, with any options."""
    length = draw(st.integers(1, 250))
    places = st.integers(0, length)
    borders = [0, *sorted(draw(st.lists(places, min_size=1, max_size=3))), length]
    heads, kv_heads = draw(st.sampled_from([(4, 4), (4, 2), (2, 1)]))
    batch, seed = draw(st.integers(1, 2)), draw(st.integers(0, 2**32))
    options = {"causal": draw(st.booleans()), "window_size": draw(st.none() | st.sampled_from([1, 2, 40]))}
    if draw(st.booleans()):
        options["cu_seqlens"] = torch.tensor(sorted({0, length, *draw(st.lists(places, max_size=9))}))
    generator = torch.Generator().manual_seed(seed)
    if draw(st.booleans()):
        share = draw(st.sampled_from([0.1, 0.9]))
        options["key_padding_mask"] = torch.rand(batch, length, generator=generator) < share
    steepness, shape = draw(st.sampled_from([0.0, 0.5, 3.0])), draw(st.sampled_from([(heads,), (batch, heads)]))
    left, right = (steepness * torch.rand(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    slopes = (left, right) if draw(st.booleans()) else left
    lengths = tuple(past - first for first, past in pairwise(borders))
    return Split(lengths, heads, kv_heads, batch, slopes=slopes, options=options, seed=seed)


@dataclass(frozen=True)
class Hard:
    """A hard case for whoever leaves out keys, and what its definition makes of it, exactly and in its dtype."""

    tensors: Any
    options: Any
    grads: Any
    golden: Any
    plain: Any
    terms: Any


def hard(name, dtype):
    tensors, options = CASES[name].inputs(dtype)
    grads = random_grads(tensors)[0], torch.zeros(tensors[0].shape[:3])

    def reference(q, k, v, slopes, **masks):
        return reference_attention(q, k, v, Visibility(q.shape[2], k.shape[2], **masks), slopes=slopes)

    golden, plain = (outputs(reference, x, options, grads) for x in ([x.double() for x in tensors], tensors))
    return Hard(tensors, options, grads, golden, plain, magnitudes(tensors, options, grads))


def outputs(function, tensors, options, grads):
    out, _, gradients = run(function, tensors, options, grads)
    return [out, *gradients]


def check_rule(rank, name, dtype, size=4):
    """The rule for implementations, in a hard case."""
    case = hard(name, dtype)
    length = case.tensors[0].shape[2]
    cuts = [0, *(length * number // size + number for number in range(1, size)), length]
    piece = slice(*cuts[rank : rank + 2])

    def attend(q, k, v, **options):
        if "key_padding_mask" in options:
            options["key_padding_mask"] = options["key_padding_mask"][:, piece]
        return context_parallel_attention(*(x[:, :, piece] for x in (q, k, v)), return_lse=True, **options)

    actual = outputs(attend, case.tensors, case.options, [x[:, :, piece] for x in case.grads])
    for gradient in actual[4:]:
        dist.all_reduce(gradient)
    golden, plain, terms = ([*(x[:, :, piece] for x in y[:4]), *y[4:]] for y in (case.golden, case.plain, case.terms))
    actual[1:4] = [x[:, :, piece] for x in actual[1:4]]
    assert_within_the_rule(golden, plain, actual, terms)


HARD = [name for name, case in CASES.items() if 1 < case.queries == case.keys <= 300]


GROUPS = {}
"""Number of processes -> the group of the first so many of four, in each of them."""


def meet(rank):
    GROUPS.update({size: dist.new_group(range(size)) for size in (2, 3)} | {4: None})


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """Four processes."""
    company = Company(tmp_path_factory.mktemp("four"), 4)
    company(meet)
    yield company
    company.part()


@settings(max_examples=60)
@given(split=splits())
def test_results_are_those_of_one_process(four, split):
    four(check, split)


@pytest.mark.parametrize(
    ("name", "dtype"), list(zip(HARD, cycle((torch.float32, torch.bfloat16, torch.float16)), strict=False))
)
def test_hard_cases_keep_the_rule(four, name, dtype):
    four(check_rule, name, dtype)


def test_before_the_first_key_lies_at_most_the_tolerance(tmp_path):
    """Of what stays with other ranks the mass is measured, and steep heads leave most of it there."""

    def work(rank):
        for name in ("gaussian", "one huge early key", "common mean", "grouped heads", "longer than the reach"):
            tensors, options = CASES[name].inputs(torch.float32)
            weights = probabilities(*tensors[:2], **options)
            length = tensors[0].shape[2]
            line = Line(None, (length // 2, length // 4, length - length // 2 - length // 4), rank)
            piece = slice(line.start, line.stop)
            q, k = (x[:, :, piece] for x in tensors[:2])
            common = Common.of(line.gather(opening(q, k, None, 0.25)), q, k)
            for tolerance in (0.0, 2.0**-24, 1e-2):
                looking = Looking(line, piece.stop - piece.start, 0, True, None, None)
                firsts = first_keys(q, k, options["slopes"], looking, common, scale=0.25, tolerance=tolerance)
                group = q.shape[1] // k.shape[1]
                for head, first in enumerate(firsts[rank]):
                    heads = slice(head * group, (head + 1) * group)
                    mass = weights[:, heads, piece, :first].sum(dim=-1)
                    assert mass.max().item() <= (tolerance or 2.0**-150), (name, tolerance, head)
                    if name == "longer than the reach" and head == 0:
                        # Of slope 0.5: (log 2^24 + what scores make up for) / 0.5 keys at most, in blocks of 64.
                        assert line.start - first <= (128 if tolerance else 320)

    together(work, tmp_path, 3)


def test_traffic_is_counted_and_two_runs_agree_to_the_last_bit(tmp_path):
    split = Split((350, 250, 400), 4, 2, slopes=torch.tensor([1.0, 0.5, 0.05, 0.0]))

    def work(rank):
        tensors, slopes = split.inputs(torch.float32)
        with count_traffic() as calls:
            runs = [by_many(split, tensors, slopes, rank, None) for _ in range(2)]
        for one, other in zip(*((out, lse, *gradients) for out, lse, gradients in runs), strict=True):
            assert torch.equal(one, other)
        each = 2 * 16 * 4  # bytes of a key with its value
        there, back, *again = calls
        assert again == [there, back]
        assert there.backward == back.forward == (0, 0)
        # Of three ranks, a piece goes to two others, and around a ring once more and then home.
        of_piece = 2 * split.lengths[rank] * each
        assert (there.all_gather, there.ring) == (2 * of_piece, 2 * of_piece)
        assert (back.all_gather, back.ring) == (2 * of_piece, 5 * of_piece)
        # The second group has a head without slope, whose keys travel to all that come after, and back as gradients.
        later = 2 - rank
        assert there.forward[1] == later * split.lengths[rank] * each
        assert back.backward[1] == sum(split.lengths[:rank]) * each
        # What the first needs is within 100 keys of a border: log(2^25) / 0.5 and what scores can make up for.
        assert there.forward[0] <= 192 * each
        assert (back.backward[0] > 0) == (rank > 0)
        assert 0 < there.bound < 10_000
        assert back.bound == 0
        sent = torch.tensor([there.forward, back.backward])
        dist.all_reduce(sent)
        assert sent[0].tolist() == sent[1].tolist()
        assert there + back == Traffic(there.forward, back.backward, there.bound, 4 * of_piece, 7 * of_piece)

    together(work, tmp_path, 3)


def test_what_a_backward_pass_sends_is_counted_where_its_forward_pass_was(tmp_path):
    def work(rank):
        mine: list[Traffic] = []
        q = torch.randn(1, 2, 8, 4, requires_grad=True)
        with count_traffic() as around:
            with count_traffic(mine):
                out = context_parallel_attention(q, q, q)
            with torch.no_grad():
                context_parallel_attention(q, q, q)
        out.sum().backward()
        assert [any(call.backward) for call in around] == [False, False, rank == 1]
        assert mine == [around[0], around[2]]

    together(work, tmp_path, 2)


FINE = {"q": (1, 2, 8, 4), "k": (1, 2, 8, 4), "slopes": (0.5, 0.25), "cu_seqlens": (0, 24), "dtype": torch.float32}

MISTAKES = {
    "slopes": (
        {"slopes": (0.5, 0.125)},
        "slopes=[0.5, 0.125] on rank 1 of the group and [0.5, 0.25] on rank 0: give one",
    ),
    "causal": ({"causal": False}, "causal=False on rank 1 of the group and True on rank 0: give one"),
    "heads": (
        {"q": (1, 4, 8, 4)},
        "slopes of shape (2,): give (H,) or (B, H), here (4,) or (1, 4) (rank 1 of the group)",
    ),
    "key heads": ({"k": (1, 1, 8, 4)}, "Hkv=1 on rank 1 of the group and 2 on rank 0: give one"),
    "head_dim": ({"q": (1, 2, 8, 8), "k": (1, 2, 8, 8)}, "D=8 on rank 1 of the group and 4 on rank 0: give one"),
    "batch": ({"q": (2, 2, 8, 4), "k": (2, 2, 8, 4)}, "B=2 on rank 1 of the group and 1 on rank 0: give one"),
    "dtype": (
        {"dtype": torch.float64},
        "dtype=torch.float64 on rank 1 of the group and torch.float32 on rank 0: give one",
    ),
    "device": (
        {"device": "meta"},
        "q is on meta, from where no backend of the group sends (cpu:gloo,cuda:gloo): move q, k and v, or give a group "
        "with one that does, such as cuda:nccl (rank 1 of the group)",
    ),
    "device of one": (
        {"k_device": "meta"},
        "k is torch.float32 on meta, q is torch.float32 on cpu: give them alike (rank 1",
    ),
    "tokens": ({"k": (1, 2, 9, 4)}, "q has 8 tokens, k has 9: a piece has as many of both (rank 1 of the group)"),
    "no tensor": ({"q": None}, "q of NoneType: give a tensor (rank 1 of the group)"),
    "length": ({"cu_seqlens": (0, 25)}, "cu_seqlens=[0, 25] on rank 1 of the group and [0, 24] on rank 0: give one"),
    "borders": (
        {"cu_seqlens": (0.0, 24.0)},
        "cu_seqlens of shape (2,) and torch.float32: give (N + 1,) int32 or int64 (rank 1 of the group)",
    ),
    "mask": ({"padding": (1, 8)}, "key_padding_mask=given on rank 1 of the group and None on rank 0: give one"),
    "scale": ({"scale": 0.25}, "scale=0.25 on rank 1 of the group and None on rank 0: give one"),
    "tolerance": ({"tolerance": 0.0}, "tolerance=0.0 on rank 1 of the group and None on rank 0: give one"),
    "gradient": ({"learns": True}, "requires_grad=True on rank 1 of the group and False on rank 0: give one"),
    "window": ({"window_size": 0}, "window_size=0: give an integer of at least 1, or None for no window (rank 1"),
}


def call(q, k, slopes, cu_seqlens, dtype, device="cpu", k_device=None, learns=False, padding=None, **options):
    """Attention of tensors of zeros."""
    leaves = [
        None if shape is None else torch.zeros(shape, dtype=dtype, device=where, requires_grad=learns)
        for shape, where in ((q, device), (k, k_device or device), (k, k_device or device))
    ]
    mask = None if padding is None else torch.zeros(padding, dtype=torch.bool)
    slopes, borders = torch.tensor(slopes, device=device), torch.tensor(cu_seqlens, device=device)
    return context_parallel_attention(*leaves, slopes=slopes, cu_seqlens=borders, key_padding_mask=mask, **options)


def test_a_mistake_of_one_rank_is_one_error_on_all(tmp_path):
    def work(rank):
        for name, (mistake, message) in [*MISTAKES.items(), (None, (None, None)), *MISTAKES.items()]:
            if name is None:  # from here on there is something that the ranks have agreed on before
                assert call(**FINE).shape == (1, 2, 8, 4)
                continue
            with pytest.raises(ValueError, match=f"^{re.escape(message)}") as found:
                call(**FINE | mistake if rank == 1 else FINE)
            assert "\n" not in str(found.value), name
        with pytest.raises(ValueError, match=r"^cu_seqlens ends with 23: give \[0, ..., T\], here T=24$"):
            call(**FINE | {"cu_seqlens": (0, 23)})
        others = dist.new_group([0, 1])
        if rank == 2:
            with pytest.raises(ValueError, match=r"^group of other ranks than this, 2: give one that it is in$"):
                call(**FINE, group=others)
        assert call(**FINE).shape == (1, 2, 8, 4)  # and they go on together
        if rank == 1:
            parallel_attention.opening = full
        with pytest.raises(ValueError, match=r"^MemoryError\('full'\) \(rank 1 of the group\)$"):
            call(**FINE)

    def full(*arguments):
        raise MemoryError("full")

    together(work, tmp_path, 3)


@pytest.mark.parametrize(
    ("chosen", "first"),
    [(("all", "two", "all"), r"\[0, 1, 2\]"), (("same", "two"), r"\[0, 1\]")],
)
def test_groups_that_differ_are_one_error_on_all(tmp_path, chosen, first):
    def work(rank):
        groups = {"all": None, "two": dist.new_group([0, 1]), "same": dist.new_group([0, 1])}
        message = rf"^group of the ranks \[0, 1\] on rank 1 and of {first} on rank 0: give one$"
        with pytest.raises(ValueError, match=message):
            call(**FINE, group=groups[chosen[rank]])

    together(work, tmp_path, len(chosen))


def test_what_was_agreed_on_before_takes_no_exchange_of_its_own(tmp_path):
    def work(rank):
        gathers = []
        all_gather = dist.all_gather

        def counted(found, mine, group):
            gathers.append(mine.numel())
            all_gather(found, mine, group=group)

        dist.all_gather = counted
        longer = {"q": (1, 2, 9, 4), "k": (1, 2, 9, 4), "cu_seqlens": (0, 25)}
        for options, number in (
            (FINE, 4),  # three numbers, and three messages of what the bound needs
            (FINE, 3),
            (FINE | {"cu_seqlens": (0, 12, 24)}, 5),  # news to all, which were told in the place of the first of three
            (FINE | {"cu_seqlens": (0, 12, 24)}, 3),
            (FINE | longer | ({} if rank == 1 else {"q": FINE["q"], "k": FINE["k"]}), 5),
            (FINE, 5),
        ):
            assert call(**options).shape == options["q"]
            assert len(gathers) == number, options
            gathers.clear()

    together(work, tmp_path, 3)


def test_without_a_process_group_it_is_told():
    with pytest.raises(ValueError, match=r"^there is no process group: start it by torchrun"):
        call(**FINE)


@pytest.mark.parametrize("what", ["exchange keys and values", "exchange gradients of keys and values"])
def test_a_rank_that_dies_in_mid_exchange_ends_the_others(tmp_path, what):
    def work(rank):
        swap = Line.swap

        def dying(self, outgoing, incoming, of):
            if rank == 1 and what == f"exchange {of}":
                os._exit(7)
            swap(self, outgoing, incoming, of)

        Line.swap = dying
        by_many(Split((9, 9, 9)), *Split((9, 9, 9)).inputs(), rank, None)

    assert statuses(fork(work, tmp_path, 3)) == [1, 7, 1]
    for rank in (0, 2):
        last = (tmp_path / f"error{rank}").read_text().splitlines()[-1]
        assert last.startswith(f"RuntimeError: context parallelism could not {what}: another rank ended, or is later")


def test_a_rank_that_does_not_come_ends_the_others_in_time(tmp_path, monkeypatch):
    monkeypatch.setattr("longreach.parallel.meeting.LOOK", 0.1)

    def work(rank):
        if rank == 1:
            signal.pause()
        call(**FINE | {"cu_seqlens": (0, 16)})

    processes = fork(work, tmp_path, 2, timeout=1.0)
    assert os.waitstatus_to_exitcode(os.waitpid(processes[0], 0)[1]) == 1
    os.kill(processes[1], signal.SIGKILL)
    os.waitpid(processes[1], 0)
    last = (tmp_path / "error0").read_text().splitlines()[-1]
    assert last.startswith(
        "RuntimeError: context parallelism could not agree on what is computed: another rank ended, or"
    )


def test_a_rank_that_calls_twice_ends_all_in_time(tmp_path):
    def work(rank):
        for _ in range(2 if rank == 1 else 1):
            out = call(**FINE | {"learns": True})
        out.sum().backward()

    assert statuses(fork(work, tmp_path, 3, timeout=1.0)) == [1, 1, 1]
    for rank, what in enumerate(["exchange gradients of keys and values", "gather what the bound needs"]):
        last = (tmp_path / f"error{rank}").read_text().splitlines()[-1]
        assert last.startswith(f"RuntimeError: context parallelism could not {what}: another rank ended, or is later")
