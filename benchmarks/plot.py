"""Draw docs/attention.svg and print the tables of docs/attention.md from a file that benchmarks/attention.py wrote.

python benchmarks/plot.py cpu-2core
"""

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from longreach.report.figures import to_svg

HERE = Path(__file__).parent
CEILING = "causal SDPA, no bias"
COLOURS = {
    "longreach": "#0072b2",
    "SDPA, extra head dims": "#d55e00",
    "SDPA, dense mask": "#cc79a7",
    "FlexAttention": "#009e73",
    CEILING: "#888888",
}
PANELS = (("forward", "float32"), ("forward", "bfloat16"), ("training", "float32"))


def curves(records: list[dict[str, Any]], mode: str, dtype: str) -> dict[str, dict[int, float]]:
    """Median seconds by contender and length, at scores of standard deviation 1."""
    found: dict[str, dict[int, float]] = {}
    for record in records:
        workload = record["workload"]
        if (workload["mode"], workload["dtype"], workload["std"]) == (mode, dtype, 1.0):
            for figure in record["figures"]:
                found.setdefault(figure["contender"], {})[workload["length"]] = figure["seconds"]
    return found


def draw(records: list[dict[str, Any]]) -> Figure:
    """Time against length, one panel for each mode and dtype."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    panels = figure.subplots(1, len(PANELS), sharey=True)
    for axes, (mode, dtype) in zip(panels, PANELS, strict=True):
        found = curves(records, mode, dtype)
        for name, points in found.items():
            style = "--" if name == CEILING else "-"
            axes.plot(list(points), list(points.values()), style, marker="o", ms=4, color=COLOURS[name], label=name)
        axes.set(xscale="log", yscale="log", xlabel="length (tokens)")
        axes.set_title(f"{'forward + backward' if mode == 'training' else mode}, {dtype}", fontsize=10)
        lengths = sorted({length for points in found.values() for length in points})
        axes.set_xticks(lengths, [f"{length // 1024}k" for length in lengths])
        axes.set_yticks([0.01, 0.1, 1, 10], ["10 ms", "100 ms", "1 s", "10 s"])
        axes.minorticks_off()
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("time (median)")
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=9, frameon=False
    )
    return figure


def tables(records: list[dict[str, Any]]) -> str:
    """How many times faster than the fastest peer, and than dense attention without any bias, as Markdown."""
    lines = ["| | length | std | longreach | fastest peer | times faster | times faster than no bias | extra memory |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for record in records:
        workload, figures = record["workload"], {figure["contender"]: figure for figure in record["figures"]}
        ours = figures.pop("longreach")
        ceiling = figures.pop(CEILING, None)
        peer = min(figures.values(), key=lambda figure: figure["seconds"], default=None)
        row = [
            f"{'forward + backward' if workload['mode'] == 'training' else workload['mode']}, {workload['dtype']}",
            f"{workload['length']:,}",
            f"{workload['std']:g}",
            f"{ours['seconds'] * 1e3:,.1f} ms",
            "-" if peer is None else f"{peer['contender']}, {peer['seconds'] * 1e3:,.1f} ms",
            "-" if peer is None else f"{peer['seconds'] / ours['seconds']:.2f}",
            "-" if ceiling is None else f"{ceiling['seconds'] / ours['seconds']:.2f}",
            f"{ours['extra_bytes'] / 2**20:.0f} MiB",
        ]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("machine", help="name of a file under benchmarks/results")
    records = json.loads((HERE / "results" / f"{parser.parse_args().machine}.json").read_text())["records"]
    (HERE.parent / "docs" / "attention.svg").write_bytes(to_svg(draw(records)))
    print(tables(records))


if __name__ == "__main__":
    main()
