"""Fill the tables and figures of README.md, docs/attention.md and docs/context.md from what was measured.

make demo && python benchmarks/attention.py --machine cpu-2core && python docs/refresh.py runs/demo cpu-2core h200
"""

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


def fill(page: Path, mark: str, content: str) -> None:
    """Replace what stands between `<!-- mark -->` and `<!-- end of mark -->`."""
    text = page.read_text(encoding="utf-8")
    pattern = rf"(<!-- {mark} -->\n).*(<!-- end of {mark} -->)"
    filled, count = re.subn(pattern, lambda found: f"{found[1]}{content}\n{found[2]}", text, flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"{page}: give it one <!-- {mark} --> and its end, there are {count}")
    page.write_text(filled, encoding="utf-8")


def main(demo: str, *machines: str) -> None:
    results = Results.read(Path(demo) / "results.json")
    (train_length,) = results.train_lengths()
    fill(ROOT / "README.md", "demo table", to_markdown(main_grid(results, train_length)).strip())
    split = decomposition(results, train_length)
    assert split is not None, "a comparison without positions cannot fill the README"
    fill(ROOT / "README.md", "demo decomposition", f"> {split.sentence} {split.details}")
    shutil.copy(Path(demo) / "figures" / "perplexity.svg", ROOT / "docs" / "demo.svg")
    notebook = [sys.executable, ROOT / "docs" / "notebook.py"]
    subprocess.run(notebook, check=True, cwd=Path(demo).resolve().parents[1])  # it reads runs/demo
    for machine in machines:
        plot = [sys.executable, ROOT / "benchmarks" / "plot.py", machine]
        table = subprocess.run(plot, check=True, capture_output=True, text=True).stdout.strip()
        fill(ROOT / "docs" / "attention.md", f"benchmark table of {machine}", table)


if __name__ == "__main__":
    main(*sys.argv[1:])
