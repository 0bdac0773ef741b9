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

FOLDER = Path(__file__).parent / "src/longreach/ops/cpu"
FLAGS = ("-std=gnu11", "-O3", "-ffp-contract=fast", "-fPIC", "-shared", "-Wall", "-Wextra")
AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512")
LIBRARIES = {
    "tiles-avx2": (("tiles.c", "decode.c", "near.c"), ("-mavx2", "-mfma", "-mf16c")),
    "tiles-avx512": (("tiles.c", "decode.c", "near.c"), AVX512),
    "units-amx": (("units.c",), (*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16")),
}
"""Name, which says what the processor must have -> sources, and flags of GCC and Clang."""


def compile_tiles() -> list[Path]:
    """Compile each library; none where that is not possible, which is said."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return []
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
    made = []
    for name, (sources, flags) in LIBRARIES.items():
        library = FOLDER / f"{name}.so"
        unfinished = library.with_suffix(f".{os.getpid()}")
        command = [compiler[0], *FLAGS, *flags, *(str(FOLDER / x) for x in sources), "-o", str(unfinished), "-lm"]
        try:
            subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
        except (OSError, subprocess.CalledProcessError) as error:
            unfinished.unlink(missing_ok=True)
            library.unlink(missing_ok=True)  # of another source
            print(f"longreach: {name} is not compiled ({error}): PyTorch computes instead", file=sys.stderr)
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
