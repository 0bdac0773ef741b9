"""What enters a collective lies where queries lie, as NCCL needs it, and the host waits for no more than it must."""

import traceback

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from longreach.parallel import agreement, attention, context_parallel_attention

FAR, NEAR = [[0, 0], [0, 2], [0, 3]], [[0, 0], [8, 8], [8, 8]]
"""First keys of two heads that three ranks of 8, 0 and 8 tokens need: some of other ranks, or none."""


@pytest.fixture
def devices(monkeypatch):
    """Rank 0 of three on a device without values, alone in its group, where what the host reads is made up."""
    seen = {"collective": [], "read": [], "first_keys": FAR}

    def tolist(tensor):
        reader = traceback.extract_stack()[-2].name
        seen["read"].append(reader)
        return {"_compared": [[8, 0, 7], [0, 0, 7], [8, 0, 7]], "first_keys": seen["first_keys"]}.get(reader, [0.0])

    def truth(tensor):
        seen["read"].append(traceback.extract_stack()[-2].name)
        return False

    def gather(found, mine, group):
        seen["collective"].extend([mine, *found])

    def batch(operations):
        seen["collective"].extend(operation.tensor for operation in operations)
        return []

    dist.init_process_group("meta:fake", store=FakeStore(), rank=0, world_size=3)
    monkeypatch.setattr(agreement, "meet", lambda group: None)
    monkeypatch.setattr(attention, "attention", lambda q, k, v, **options: (q * (k.sum() + v.sum()), q.sum(dim=-1)))
    monkeypatch.setattr(torch.Tensor, "tolist", tolist)
    monkeypatch.setattr(torch.Tensor, "__bool__", truth)
    monkeypatch.setattr(dist, "all_gather", gather)
    monkeypatch.setattr(dist, "batch_isend_irecv", batch)
    yield seen
    dist.destroy_process_group()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("first_keys", [FAR, NEAR])
def test_no_tensor_of_the_cpu_enters_a_collective(devices, causal, first_keys):
    devices["first_keys"] = first_keys
    q, k, v = (
        torch.empty(1, heads, 8, 4, device="meta", dtype=torch.bfloat16, requires_grad=True) for heads in (4, 2, 2)
    )
    padding = torch.zeros(1, 8, dtype=torch.bool, device="meta")
    slopes = torch.ones(4, device="meta")
    for _ in range(2):
        devices["read"].clear()
        out, lse = context_parallel_attention(
            q, k, v, slopes=slopes, causal=causal, key_padding_mask=padding, return_lse=True
        )
        (out.sum() + lse.sum()).backward()
    assert {x.device.type for x in devices["collective"]} == {"meta"}
    assert all(x.is_contiguous() and x.numel() for x in devices["collective"])
    sent = {torch.int64, torch.float32, torch.bool, torch.bfloat16} - (
        {torch.bfloat16} if first_keys is NEAR else set()
    )
    assert {x.dtype for x in devices["collective"]} == sent
    # Of a call that is like the last one, the host reads what the slopes are, whether all say the same, and the keys.
    assert devices["read"] == ["_word", "_told", *(["first_keys"] if causal else ["first_keys", "first_keys"])]
