import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from longreach import cost as costs
from longreach.cost import Cost

CPU = torch.device("cpu")
resident = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="resident memory can be measured on Linux only"
)

EQUAL_WORKS = """
import sys
import torch
from longreach.cost import Cost

def work(mebibytes):
    # Many small blocks, each half as large as glibc would map and unmap on its own, and then one that keeps all
    # below it from going back by itself.
    with Cost(torch.device("cpu")) as cost:
        blocks = [torch.ones(2**14) for _ in range(16 * mebibytes)]
        kept = torch.ones(1)
    del blocks
    return cost.peak_memory, kept

pinned = []
for mebibytes in map(int, sys.argv[1:]):
    peak, kept = work(mebibytes)
    pinned.append(kept)
    print(peak)
"""


def peaks(*mebibytes):
    """Peak memory of works of these sizes, one after another in a process of their own."""
    command = [sys.executable, "-c", EQUAL_WORKS, *map(str, mebibytes)]
    return list(map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()))


def test_seconds(monkeypatch):
    monkeypatch.setattr("longreach.cost.time.perf_counter", iter([7.0, 9.5]).__next__)
    with Cost(CPU) as cost:
        pass
    assert cost.seconds == 2.5


@resident
def test_peak_is_of_this_block_and_not_of_earlier_work():
    with Cost(CPU) as large:
        np.ones(2**28, dtype=np.uint8).sum()  # 256 MiB
    with Cost(CPU) as small:
        np.ones(2**20, dtype=np.uint8).sum()
    assert large.peak_memory is not None
    assert small.peak_memory is not None
    assert large.peak_memory - small.peak_memory > 2**27


@resident
def test_the_order_of_works_makes_no_difference():
    first, fat, later, last = peaks(64, 512, 64, 64)
    assert fat - first > 2**28
    # Pages of code that the first work loads, and those that its last block keeps: well below these 3%.
    assert later == pytest.approx(first, rel=0.03)
    assert last == pytest.approx(later, rel=0.03)


def test_a_peak_that_cannot_be_reset_is_not_given(monkeypatch, tmp_path):
    for impossible in (tmp_path / "none" / "clear_refs", tmp_path):
        monkeypatch.setattr(costs, "_CLEAR", impossible)
        with Cost(CPU) as cost:
            pass
        assert cost.peak_memory is None


def test_error_inside_is_not_swallowed():
    with pytest.raises(KeyError), Cost(CPU):
        raise KeyError
