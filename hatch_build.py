"""Compile the C of longreach where there is a compiler for it; without one everything works, slower on some CPUs.

Hatchling runs this when the package is installed or a wheel is made. `python hatch_build.py` does so in place.
"""

import os
import platform
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # run by itself, without what builds packages
    BuildHookInterface = object  # type: ignore[assignment,misc]

SOURCE = Path(__file__).parent / "src/longreach/ops/cpu/tiles.c"
FLAGS = ("-std=gnu11", "-O3", "-ffp-contract=fast", "-fPIC", "-shared", "-Wall", "-Wextra")
VECTORS = {
    "avx2": ("-mavx2", "-mfma"),
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"),
}
"""What PyTorch calls the processor's vectors, in small letters -> flags of GCC and Clang."""


def compile_tiles() -> list[Path]:
    """Compile the source for each width of vectors; none where that is not possible, which is said."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return []
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
    made = []
    for vectors, flags in VECTORS.items():
        library = SOURCE.with_name(f"tiles-{vectors}.so")
        unfinished = library.with_suffix(f".{os.getpid()}")
        command = [compiler[0], *FLAGS, *flags, str(SOURCE), "-o", str(unfinished), "-lm"]
        try:
            subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
        except (OSError, subprocess.CalledProcessError) as error:
            unfinished.unlink(missing_ok=True)
            library.unlink(missing_ok=True)  # of another source
            print(f"longreach: {SOURCE.name} is not compiled ({error}): PyTorch's products do it", file=sys.stderr)
            continue
        unfinished.replace(library)  # never half of it, nor another one under who has it open
        made.append(library)
    return made


class CustomBuildHook(BuildHookInterface):
    """What hatchling calls."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add what is compiled to the package, which then is of this platform."""
        made = compile_tiles()
        if made and self.target_name == "wheel":
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
            build_data["artifacts"] += [str(path.relative_to(self.root)) for path in made]


if __name__ == "__main__":
    print(*compile_tiles(), sep="\n")
