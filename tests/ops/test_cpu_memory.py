"""The memory of tiles is kept from one call to the next."""

import resource
import subprocess
import sys

import pytest

CALLS = """
import platform, resource, torch
from longreach.ops.alibi import alibi_slopes
from longreach.ops.attention import attention

torch.set_num_threads(2)
q = torch.randn(1, 8, 1024, 64)
def pages(calls):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(calls):
        attention(q, q, q, slopes=alibi_slopes(8), impl="cpu")
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
pages(3)
print(platform.libc_ver()[0], pages(10) / 10)
"""


def test_a_call_takes_no_new_pages_for_its_tiles():
    """Whose weights are up to 2 MiB each, 512 pages of most processors; it took 900 to 1,000 pages before."""
    done = subprocess.run([sys.executable, "-c", CALLS], capture_output=True, text=True, check=True)
    library, pages = done.stdout.split()
    if library != "glibc":
        pytest.skip(f"how memory is kept is a matter of glibc, here it is {library}")
    assert float(pages) * resource.getpagesize() < 2**20
