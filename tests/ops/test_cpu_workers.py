"""Attention on the CPU with its heads shared out among threads."""

import os
import threading
import time

import pytest
import torch
from adversarial import CASES, Case, random_grads, run
from flat import cpu_attention, reference_attention

import longreach.ops.cpu.native as native
import longreach.ops.cpu.passes as passes
import longreach.ops.cpu.workers as workers
from longreach.ops.lse_bound import FEW_QUERIES

SHARED = [name for name, case in CASES.items() if case.queries >= FEW_QUERIES and case.batch * case.kv_heads > 1]


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def shared(monkeypatch, two_threads):
    """The number of jobs that were shared out, or of key heads where these are native code's."""
    counts, compute = [], native._Blocks._compute

    def share_out(jobs, make, count):
        counts.append(count)
        workers.share_out(jobs, make, count)

    def shared_natively(self, function, heads, blocks, ends, threads):
        if threads > 1:
            counts.append(self.q.shape[0] * self.k.shape[1])
        return compute(self, function, heads, blocks, ends, threads)

    monkeypatch.setattr(native._Blocks, "_compute", shared_natively)
    monkeypatch.setattr(passes, "SHARED_PAIRS", 1)
    monkeypatch.setattr(passes, "SHARED_GRADIENT_PAIRS", 1)
    monkeypatch.setattr(passes, "SHARED_NATIVE_PAIRS", 1)
    monkeypatch.setattr(passes, "share_out", share_out)
    return counts


@pytest.mark.parametrize("name", SHARED)
def test_shared_out_heads_equal_the_definition(name, shared):
    """In float64, where nothing but rounding may differ; and two runs agree to the last bit."""
    tensors, options = CASES[name].inputs(torch.float64)
    grads = random_grads(tensors)
    expected, *actual = (run(f, tensors, options, grads) for f in (reference_attention, cpu_attention, cpu_attention))
    assert len(shared) == 4  # two times a forward and a backward pass
    assert min(shared) > 1
    first, second = ((*found[:2], *found[2]) for found in actual)
    for x, y, again in zip((*expected[:2], *expected[2]), first, second, strict=True):
        torch.testing.assert_close(y, x, rtol=1e-9, atol=1e-9)
        assert torch.equal(y, again)


@pytest.mark.parametrize("name", ["gaussian", "grouped heads", "bidirectional", "documents", "longer than the reach"])
def test_shared_out_gradients_of_the_kernel_equal_the_definition(name, shared, monkeypatch):
    monkeypatch.setattr(passes, "DIFFERENTIATED", {torch.float64})
    threads, add = set(), passes.KernelGradients.add

    def watched(self, tile):
        threads.add(threading.get_ident())
        add(self, tile)

    monkeypatch.setattr(passes.KernelGradients, "add", watched)
    tensors, options = CASES[name].inputs(torch.float64)
    gradient = random_grads(tensors)[0]

    def gradients(function):
        leaves = [x.detach().requires_grad_() for x in tensors]
        return torch.autograd.grad(function(*leaves, **options)[0], leaves, gradient)

    expected, first, second = map(gradients, (reference_attention, cpu_attention, cpu_attention))
    assert len(shared) == 4
    assert threads
    for x, y, again in zip(expected, first, second, strict=True):
        torch.testing.assert_close(y, x, rtol=1e-9, atol=1e-9)
        assert torch.equal(y, again)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SHARED)
def test_shared_out_native_code_is_what_one_thread_makes_of_it(name, dtype, shared, monkeypatch):
    """To the last bit, and so do two runs agree."""
    monkeypatch.setattr(passes, "NATIVE_IS_FASTER", True)
    tensors, options = CASES[name].inputs(dtype)
    grads = random_grads(tensors)
    first, second = (run(cpu_attention, tensors, options, grads) for _ in range(2))
    assert len(shared) == 4
    torch.set_num_threads(1)
    alone = run(cpu_attention, tensors, options, grads)
    assert len(shared) == 4
    for x, y, z in zip(*((*found[:2], *found[2]) for found in (first, second, alone)), strict=True):
        assert torch.equal(x, y)
        assert torch.equal(x, z)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("means", passes.Means)
def test_heads_are_shared_out_where_no_gradient_is_wanted(mode, dtype, means, shared, monkeypatch):
    """What is made in inference mode no thread may write to that is not in it."""
    monkeypatch.setattr(passes, "_products_are_faster", lambda q, k: means == passes.Means.PRODUCTS)
    monkeypatch.setattr(passes, "NATIVE_IS_FASTER", means == passes.Means.NATIVE)
    monkeypatch.setattr(passes, "DIFFERENTIATED", set())
    case = Case(batch=2, heads=4, kv_heads=2, queries=300, keys=300)
    golden, _ = reference_attention(*case.inputs(torch.float64)[0], **case.inputs(torch.float64)[1])
    tensors, options = case.inputs(dtype)
    with mode():
        out, _ = cpu_attention(*tensors, **options)
        plain, _ = reference_attention(*tensors, **options)
    assert shared == [4]
    allowed = 2 * (plain.double() - golden).abs().max() + torch.finfo(dtype).eps * golden.abs().max()
    assert (out.double() - golden).abs().max() <= allowed


@pytest.mark.usefixtures("two_threads")
def test_the_threads_are_the_caller_and_one_of_openmp_s_and_each_computes_alone():
    together, found = threading.Barrier(2), []

    def job():
        together.wait(timeout=60)  # so that each thread takes one
        found.append((threading.get_ident(), torch.is_grad_enabled(), torch.is_inference_mode_enabled()))

    torch.rand(1 << 20).exp_()  # starts all of OpenMP's
    before = len(os.listdir("/proc/self/task"))
    for mode in (torch.enable_grad, torch.inference_mode):
        with mode():
            workers.share_out([job, job], list, 2)
        idents, gradients, inference = zip(*found, strict=True)
        assert len(set(idents)) == 2
        assert threading.get_ident() in idents
        assert not any(gradients)
        assert set(inference) == {mode is torch.inference_mode}
        found.clear()
    assert len(os.listdir("/proc/self/task")) == before
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_an_error_of_a_job_comes_out():
    both, done = threading.Barrier(2), []

    def fails():
        both.wait(timeout=60)
        raise ZeroDivisionError

    def takes_longer():
        both.wait(timeout=60)
        time.sleep(0.05)
        done.append(True)

    with pytest.raises(ZeroDivisionError):
        workers.share_out([fails, takes_longer], list, 2)
    assert done  # nobody works on after the call


@pytest.mark.usefixtures("two_threads")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("before", [True, False])
def test_ctrl_c_comes_out_before_and_within_a_job(before, monkeypatch):
    """Before them nobody but ctypes sees what a thread raises."""
    main, both = threading.get_ident(), threading.Barrier(2)

    def interrupt():
        if threading.get_ident() == main:
            raise KeyboardInterrupt

    def job():
        if not before:
            both.wait(timeout=60)  # so that the main thread takes one
            interrupt()

    if before:
        made = workers._Work
        monkeypatch.setattr(workers, "_Work", lambda work: made(lambda data: interrupt() or work(data)))
    with pytest.raises(KeyboardInterrupt):
        workers.share_out([job, job], list, 2)


@pytest.mark.usefixtures("two_threads")
def test_others_begin_with_what_is_at_hand_while_one_makes_more():
    begun, done = threading.Event(), []

    def make():
        assert begun.wait(timeout=60)  # no job would begin if all waited for these
        return [lambda: done.append("made")] * 2

    def job():
        begun.set()
        done.append("at hand")

    workers.share_out([job, job], make, 4)
    assert sorted(done) == ["at hand", "at hand", "made", "made"]


@pytest.mark.usefixtures("two_threads")
def test_what_fails_as_jobs_are_made_comes_out():
    done = []
    with pytest.raises(ZeroDivisionError):
        workers.share_out([lambda: done.append(True)], lambda: [1 // 0], 2)
    assert done  # the thread that makes none does not keep others from theirs


@pytest.mark.parametrize("alone", [0, 2**20])
@pytest.mark.parametrize("heads", [slice(0, 0), slice(0, 4), slice(2, 4), slice(4, 8), slice(0, 8)])
def test_heads_that_are_bounded_and_others_equal_the_definition(heads, alone, shared, monkeypatch):
    monkeypatch.setattr(passes, "heads_worth_bounding", lambda *_: heads)
    monkeypatch.setattr(passes, "FOUND_ALONE", alone)
    tensors, options = Case(batch=2, heads=8, kv_heads=4, queries=300, keys=400).inputs(torch.float64)
    expected, actual = (f(*tensors, **options) for f in (reference_attention, cpu_attention))
    assert shared == [8]
    for x, y in zip(expected, actual, strict=True):
        torch.testing.assert_close(y, x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("threads", "jobs", "shares"), [(1, 8, False), (2, 1, False), (2, 2, True), (8, 4, True), (9, 4, False)]
)
def test_heads_are_shared_out_where_they_keep_threads_at_work(threads, jobs, shares, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert workers.can_share_out(jobs) == shares
    monkeypatch.setattr(workers, "_region", lambda: None)
    assert not workers.can_share_out(jobs)


@pytest.mark.usefixtures("two_threads")
def test_short_documents_are_not_shared_out_however_many(monkeypatch):
    counts = []
    monkeypatch.setattr(passes, "NATIVE_IS_FASTER", False)
    monkeypatch.setattr(passes, "share_out", lambda jobs, make, count: counts.append(count))
    q = torch.zeros(1, 2, 2048, 16)
    for borders in ([0, 2048], [0, 1024, 2048], [0, 1000, 2000, 2048]):
        cpu_attention(q, q, q, cu_seqlens=torch.tensor(borders, dtype=torch.int32))
    assert counts == [2, 2]
