"""One of two processes that train stock and extended models together: `ddp_ranks.py RANK STORE OUTPUT`.

It is a process of its own, for a fork of one that has computed gradients waits for threads that it does not have.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from family_models import FAMILIES
from test_training_equality import STEPS, losses, padded, plain_and_extended
from torch.nn.parallel import DistributedDataParallel

SIZE = 2


def mean_losses(model, rank):
    """Of each step, over both processes, each of which sees one row of the batch."""
    rows = ({key: value[rank : rank + 1] for key, value in padded(step).items()} for step in range(STEPS))
    found = torch.tensor(losses(DistributedDataParallel(model), rows), dtype=torch.float64)
    dist.all_reduce(found)
    return (found / SIZE).tolist()


def main(rank, store, output):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=SIZE)
    found = {family: [mean_losses(model, rank) for model in plain_and_extended(family)] for family in FAMILIES}
    if rank == 0:
        Path(output).write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
