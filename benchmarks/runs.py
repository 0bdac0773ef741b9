"""The files under results/: what each was measured on, never two machines in one."""

import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch

from longreach.files import write_atomically

RESULTS = Path(__file__).parent / "results"

HOLDS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
"""Environment variables that hold PyTorch, oneDNN and MKL to less than the processor has."""


def held_to() -> dict[str, str]:
    """Those of HOLDS that are set."""
    return {name: os.environ[name] for name in HOLDS if name in os.environ}


def machine(name: str, device: str, **versions: str) -> dict[str, Any]:
    """Where and with what figures come about; `versions` are those of peers."""
    return {
        "name": name,
        "processor": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "held_to": held_to(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        **versions,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def read(path: Path) -> dict[str, Any]:
    """What a file says, of whatever machine."""
    if not path.exists():
        raise SystemExit(f"{path} is not there: --machine is the name of a run that was made")
    document: dict[str, Any] = json.loads(path.read_text())
    return document


def continued(path: Path, here: dict[str, Any]) -> dict[str, Any]:
    """What a file says, if it is of this machine and these versions, of whatever day; nothing where there is none."""
    if not path.exists():
        return {}
    known = read(path)
    for key, value in here.items():
        if key != "date" and (was := known["machine"].get(key)) != value:
            raise SystemExit(f"{path} has {key} {was!r}, here it is {value!r}: give another --machine")
    return known


def write(path: Path, document: dict[str, Any]) -> None:
    """Write a file anew, whole or not at all."""
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, (json.dumps(document, indent=1) + "\n").encode())
