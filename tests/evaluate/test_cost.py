import time
from pathlib import Path

import numpy as np
import pytest
import torch

from longreach.evaluate.cost import Cost

CPU = torch.device("cpu")


def test_seconds():
    with Cost(CPU) as cost:
        time.sleep(0.05)
    assert 0.05 <= cost.seconds < 5


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resident memory can be measured on Linux only")
def test_peak_is_of_this_block_and_not_of_earlier_work():
    with Cost(CPU) as large:
        np.ones(2**28, dtype=np.uint8).sum()  # 256 MiB
    with Cost(CPU) as small:
        np.ones(2**20, dtype=np.uint8).sum()
    assert large.peak_memory is not None
    assert small.peak_memory is not None
    assert large.peak_memory - small.peak_memory > 2**27


def test_error_inside_is_not_swallowed():
    with pytest.raises(KeyError), Cost(CPU):
        raise KeyError
