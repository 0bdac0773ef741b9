"""Attention on the CPU with its heads shared out among threads."""

import threading

import pytest
import torch
from adversarial import CASES, random_grads, run
from flat import cpu_attention, reference_attention

import longreach.ops.cpu.products as products
from longreach.ops.cpu.workers import share_out
from longreach.ops.lse_bound import FEW_QUERIES

SHARED = [name for name, case in CASES.items() if case.queries >= FEW_QUERIES and case.batch * case.kv_heads > 1]


@pytest.fixture
def two_threads(monkeypatch):
    monkeypatch.setattr(products, "PART_PAIRS", {True: 1, False: 1})
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("name", SHARED)
def test_shared_out_heads_equal_the_definition(name):
    """In float64, where nothing but rounding may differ; and two runs agree to the last bit."""
    tensors, options = CASES[name].inputs(torch.float64)
    grads = random_grads(tensors)
    assert len(products._parts(*tensors[:2], (torch.ones(tensors[0].shape[1]),) * 2, learns=True)) > 1
    expected, *actual = (run(f, tensors, options, grads) for f in (reference_attention, cpu_attention, cpu_attention))
    first, second = ((*found[:2], *found[2]) for found in actual)
    for x, y, again in zip((*expected[:2], *expected[2]), first, second, strict=True):
        torch.testing.assert_close(y, x, rtol=1e-9, atol=1e-9)
        assert torch.equal(y, again)


@pytest.mark.usefixtures("two_threads")
def test_workers_leave_the_caller_its_threads():
    together = threading.Barrier(2)

    def job():
        together.wait(timeout=60)  # so that each worker takes one
        return threading.get_ident(), torch.get_num_threads(), torch.is_grad_enabled()

    idents, threads, gradients = zip(*share_out([job, job]), strict=True)
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


def test_one_thread_works_alone():
    assert share_out([threading.get_ident, threading.get_ident]) == [threading.get_ident()] * 2
