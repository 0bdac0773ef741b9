"""Attention on the CPU with its heads shared out among threads."""

import threading
import time

import pytest
import torch
from adversarial import CASES, Case, random_grads, run
from flat import cpu_attention, reference_attention

import longreach.ops.cpu.products as products
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
    """The number of jobs that were shared out."""
    counts = []

    def share_out(jobs):
        counts.append(len(jobs))
        workers.share_out(jobs)

    monkeypatch.setattr(products, "SHARED_PAIRS", 1)
    monkeypatch.setattr(products, "share_out", share_out)
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


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("products_are_faster", [True, False])
def test_heads_are_shared_out_where_no_gradient_is_wanted(mode, dtype, products_are_faster, shared, monkeypatch):
    """By products and by the kernel; what is made in inference mode no thread may write to that is not in it."""
    monkeypatch.setattr(products, "_products_are_faster", lambda q, k: products_are_faster)
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
def test_workers_leave_the_caller_its_threads():
    together, found = threading.Barrier(2), []

    def job():
        together.wait(timeout=60)  # so that each worker takes one
        found.append((threading.get_ident(), torch.get_num_threads(), torch.is_grad_enabled()))

    workers.share_out([job, job])
    idents, threads, gradients = zip(*found, strict=True)
    assert threading.get_ident() not in idents
    assert len(set(idents)) == 2
    assert threads == (1, 1)
    assert not any(gradients)
    assert torch.get_num_threads() == 2
    later = []
    fresh = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    fresh.start()
    fresh.join()
    assert later == [2]


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
        workers.share_out([fails, takes_longer])
    assert done  # nobody works on after the call


def test_one_thread_works_alone():
    found = []
    workers.share_out([lambda: found.append(threading.get_ident())] * 2)
    assert found == [threading.get_ident()] * 2
