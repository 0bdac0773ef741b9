"""Fill the tables and figures of README.md and of docs/ from what was measured.

make demo && python docs/refresh.py runs/demo
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

from longreach.report.grid import to_markdown
from longreach.report.subjects.decomposition import decomposition
from longreach.report.subjects.perplexity import main_grid
from longreach.results import Results

ROOT = Path(__file__).parents[1]

CPU, GPU = "cpu-2core-amx", "h200"
"""The machines that pages are about: names of files under benchmarks/results."""

OTHER_CPUS = ("cpu-2core-avx512", "cpu-2core-avx2", "cpu-2core-epyc")
"""Those that attention was measured on besides."""

TRAINING = (CPU, "cpu-2core-epyc")
"""Those that training was measured on."""


def fill(page: Path, mark: str, content: str) -> None:
    """Replace what stands between `<!-- mark -->` and `<!-- end of mark -->`."""
    text = page.read_text(encoding="utf-8")
    pattern = rf"(<!-- {mark} -->\n).*(<!-- end of {mark} -->)"
    filled, count = re.subn(pattern, lambda found: f"{found[1]}{content}\n{found[2]}", text, flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"{page}: give it one <!-- {mark} --> and its end, there are {count}")
    page.write_text(filled, encoding="utf-8")


def context_parallel(path: Path) -> str:
    """What context parallelism sends and takes, as a table and a sentence."""
    results = json.loads(path.read_text(encoding="utf-8"))
    timed = {entry["length"]: entry["ratio"] for entry in results["time"]}
    lines = [
        "| tokens | MiB sent | of an all-gather or a ring | MiB sent back | both, of an all-gather and a "
        "reduce-scatter | of a ring | time, of its attention |",
        "|---|---|---|---|---|---|---|",
    ]
    for entry in results["bytes"]:
        ratio = timed.get(entry["length"])
        cells = (
            f"{entry['length']:,}",
            f"{entry['bytes'] / 2**20:.1f}",
            f"{entry['share']:.2%}",
            f"{entry['backward_bytes'] / 2**20:.1f}",
            f"{entry['share_with_backward']:.2%}",
            f"{entry['share_of_ring_with_backward']:.2%}",
            "" if ratio is None else f"{ratio:.2f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "How much the busiest of the four has to do in attention, and the largest piece to hold:",
        "",
        "| slopes | tokens | pieces | work, of the mean | tokens, of the mean |",
        "|---|---|---|---|---|",
    ]
    for entry in results["balance"]:
        for cut in entry["cuts"]:
            slopes = {"plain": "none", "paper": "the paper's"}[cut["slopes"]]
            largest = max(cut["lengths"]) * len(cut["lengths"]) / entry["length"]
            lines.append(f"| {slopes} | {entry['length']:,} | {cut['cut']} | {cut['imbalance']:.2f} | {largest:.2f} |")
    (window,) = results["window"]
    lines += [
        "",
        f"A window of {window['length']:,} tokens, scored by four processes as `evaluate` does, has the nll that one "
        f"finds, to {window['relative_difference']:.0e}; each holds at most {window['share']:.3f} of the activations "
        f"that one does at a time, and the busiest has {window['imbalance']:.2f} times the mean of all work.",
    ]
    return "\n".join(lines)


def printed(script: str, *arguments: str) -> str:
    """What a script of benchmarks/ prints: tables of committed runs."""
    command = [sys.executable, ROOT / "benchmarks" / f"{script}.py", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def main(demo: str) -> None:
    results = Results.read(Path(demo) / "results.json")
    (train_length,) = results.train_lengths()
    fill(ROOT / "README.md", "demo table", to_markdown(main_grid(results, train_length)).strip())
    split = decomposition(results, train_length)
    assert split is not None, "a comparison without positions cannot fill the README"
    fill(ROOT / "README.md", "demo decomposition", f"> {split.sentence} {split.details}")
    shutil.copy(Path(demo) / "figures" / "perplexity.svg", ROOT / "docs" / "demo.svg")
    notebook = [sys.executable, ROOT / "docs" / "notebook.py"]
    subprocess.run(notebook, check=True, cwd=Path(demo).resolve().parents[1])  # it reads runs/demo
    of_attention = ROOT / "docs" / "attention.md"
    for machine in (CPU, GPU):
        fill(of_attention, f"benchmark table of {machine}", printed("plot", machine))
    fill(of_attention, "benchmark table of all CPUs", printed("plot", CPU, "--beside", *OTHER_CPUS))
    parallel = ROOT / "docs" / "parallel.md"
    measured = context_parallel(ROOT / "benchmarks" / "results" / f"context-parallel-{CPU}.json")
    fill(parallel, "bytes of context parallelism", measured)
    for machine in TRAINING:
        fill(parallel, f"training table of {machine}", printed("training", "table", "--machine", machine))
    fill(ROOT / "docs" / "extension.md", "speed of extended models", printed("extend", "--machine", CPU, "--table"))
    fill(ROOT / "docs" / "encoders.md", "speed of encoders", printed("encoders", "table", "--machine", CPU))


if __name__ == "__main__":
    main(*sys.argv[1:])
