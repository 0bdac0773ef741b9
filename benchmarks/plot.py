"""Draw a figure and print the tables of docs/attention.md from a file that benchmarks/attention.py wrote.

    python benchmarks/plot.py cpu-2core-amx
    python benchmarks/plot.py h200 --output h200.svg
    python benchmarks/plot.py cpu-2core-amx --beside cpu-2core-avx512 cpu-2core-avx2 cpu-2core-epyc

Decoding is in the table alone: it is measured at few lengths.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import runs
from matplotlib.figure import Figure
from peers import CEILING, DENSE, FLEX, FLEX_FLASH, HALF, OURS, PRUNED, is_dense_peer

from longreach.report.drawing import to_svg

HERE = Path(__file__).parent
DOCUMENTED = "cpu-2core-amx"
"""The machine that docs/attention.md shows, as docs/attention.svg."""

COLOURS = {
    OURS: "#0072b2",
    "SDPA, extra head dims": "#d55e00",
    "SDPA, dense mask": "#cc79a7",
    FLEX: "#009e73",
    FLEX_FLASH: "#e69f00",
    PRUNED: "#56b4e9",
    DENSE: "#d55e00",
    CEILING: "#888888",
}
MODES = {"forward": "forward", "training": "forward + backward", "decode": "decode"}

Record = dict[str, Any]
Panel = tuple[str, str, int, int]
"""Mode, dtype, heads and head_dim."""


def panel(record: Record) -> Panel:
    workload = record["workload"]
    return workload["mode"], workload["dtype"], workload["heads"], workload["head_dim"]


def drawn(records: list[Record]) -> dict[Panel, list[Record]]:
    """What each panel shows: full sequences, at scores of standard deviation 1, where nothing else runs."""
    found: dict[Panel, list[Record]] = {}
    for record in records:
        workload = record["workload"]
        if workload["mode"] != "decode" and workload["std"] == 1.0 and not workload.get("busy"):
            found.setdefault(panel(record), []).append(record)
    return found


def curves(records: list[Record]) -> dict[str, dict[int, float]]:
    """Median seconds by contender and length."""
    found: dict[str, dict[int, float]] = {}
    for record in records:
        for figure in record["figures"]:
            if figure["contender"] == HALF:
                continue  # a point of its own curve already
            found.setdefault(figure["contender"], {})[record["workload"]["length"]] = figure["seconds"]
    return found


def shapes_differ(records: list[Record]) -> bool:
    return len({panel(record)[2:] for record in records}) > 1


def draw(records: list[Record]) -> Figure:
    """Time against length, one panel for each mode, dtype, number of heads and head_dim."""
    groups = drawn(records)
    if not groups:
        raise SystemExit("records hold no full sequences with std=1: give the file of a run with such workloads")
    figure = Figure(figsize=(11 * len(groups) / 3, 4.2), layout="constrained")
    panels = figure.subplots(1, len(groups), sharey=True, squeeze=False)[0]
    legend: dict[str, Any] = {}
    for axes, ((mode, dtype, heads, head_dim), group) in zip(panels, groups.items(), strict=True):
        found = curves(group)
        for name, points in found.items():
            style = "--" if name == CEILING else "-"
            axes.plot(list(points), list(points.values()), style, marker="o", ms=4, color=COLOURS[name], label=name)
        axes.set(xscale="log", yscale="log", xlabel="length (tokens)")
        shape = f", H {heads} D {head_dim}" if shapes_differ(records) else ""
        axes.set_title(f"{MODES[mode]}, {dtype}{shape}", fontsize=10)
        lengths = sorted({length for points in found.values() for length in points})
        axes.set_xticks(lengths, [f"{length // 1024}k" if length >= 1024 else str(length) for length in lengths])
        axes.set_yticks(*time_ticks(groups))
        axes.minorticks_off()
        axes.grid(alpha=0.25)
        handles, labels = axes.get_legend_handles_labels()
        legend |= {label: handle for label, handle in zip(labels, handles, strict=True) if label not in legend}
    panels[0].set_ylabel("time (median)")
    figure.legend(list(legend.values()), list(legend), loc="outside lower center", ncols=5, fontsize=9, frameon=False)
    return figure


def time_ticks(groups: dict[Panel, list[Record]]) -> tuple[list[float], list[str]]:
    """Powers of ten within what is drawn, or around it where there is none; and their names."""
    seconds = [time for group in groups.values() for points in curves(group).values() for time in points.values()]
    low, high = math.log10(min(seconds)), math.log10(max(seconds))
    powers = range(math.ceil(low), math.floor(high) + 1) or range(math.floor(low), math.ceil(high) + 1)
    units = ((1, "s"), (1e-3, "ms"), (1e-6, "µs"))
    names = []
    for power in powers:
        size, unit = next((unit for unit in units if 10.0**power >= 0.999 * unit[0]), units[-1])
        names.append(f"{10.0**power / size:.3g} {unit}")
    return [10.0**power for power in powers], names


def tables(records: list[Record]) -> str:
    """How many times faster than the fastest dense peer, and than dense attention without any bias, as Markdown.

    Heads and head_dim are named where they differ. Where the Forgetting Transformer's kernel, which skips keys too, was
    measured, it has a column of its own. How time grows where there are no peers, and who failed, is told below.
    """
    with_shapes = shapes_differ(records)
    contenders = {figure["contender"] for record in records for figure in record["figures"]}
    pruned = PRUNED in contenders
    head = ["", *(["H", "D"] if with_shapes else []), "length", "std", "longreach"]
    head += ["fastest dense peer" if pruned else "fastest peer", "times faster", "times faster than no bias"]
    head += [f"times faster than {PRUNED}"] if pruned else []
    head.append("extra memory")
    lines = [f"| {' | '.join(head)} |".replace("|  |", "| |"), "|---" * len(head) + "|"]
    for record in records:
        workload, figures = record["workload"], {figure["contender"]: figure for figure in record["figures"]}
        ours = figures[OURS]["seconds"]
        peers = [figure for name, figure in figures.items() if is_dense_peer(name)]
        peer = min(peers, key=lambda figure: figure["seconds"], default=None)
        row = [named(workload)]
        row += [str(workload["heads"]), str(workload["head_dim"])] if with_shapes else []
        row += [f"{workload['length']:,}", f"{workload['std']:g}", milliseconds(ours)]
        row.append("-" if peer is None else f"{peer['contender']}, {milliseconds(peer['seconds'])}")
        for figure in (peer, figures.get(CEILING), *([figures.get(PRUNED)] if pruned else [])):
            row.append("-" if figure is None else f"{figure['seconds'] / ours:.2f}")
        row.append(f"{figures[OURS]['extra_bytes'] / 2**20:.0f} MiB")
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines + growth(records) + failures(records))


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.{1 if seconds >= 1e-2 else 2 if seconds >= 1e-3 else 3}f} ms"


def side_by_side(runs: dict[str, list[Record]]) -> str:
    """What several machines measured: our time, and how many times faster that is than the fastest dense peer."""
    lines = [f"| | length | std | {' | '.join(runs)} |", "|---" * (3 + len(runs)) + "|"]
    found: dict[str, dict[str, Record]] = {}  # workload, as JSON -> machine -> record
    for machine, records in runs.items():
        for record in records:
            found.setdefault(json.dumps(record["workload"]), {})[machine] = record
    rows = [(json.loads(workload), of_machines) for workload, of_machines in found.items()]
    for workload, of_machines in sorted(rows, key=lambda row: row[0]["length"]):
        cells = [beside_peers(of_machines[machine]) if machine in of_machines else "-" for machine in runs]
        lines.append(f"| {named(workload)} | {workload['length']:,} | {workload['std']:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def beside_peers(record: Record) -> str:
    """A cell of that table."""
    ours = next(figure["seconds"] for figure in record["figures"] if figure["contender"] == OURS)
    peers = [figure["seconds"] for figure in record["figures"] if is_dense_peer(figure["contender"])]
    return milliseconds(ours) + (f", {min(peers) / ours:.2f}" if peers else "")


def named(workload: Record) -> str:
    what = f"{MODES[workload['mode']]}, {workload['dtype']}"
    return what + (", beside one busy process" if workload.get("busy") else "")


def growth(records: list[Record]) -> list[str]:
    """How many times as long twice the length takes, where both were measured in turn."""
    found: dict[int, list[str]] = {}
    for record in records:
        workload, seconds = record["workload"], {x["contender"]: x["seconds"] for x in record["figures"]}
        if HALF in seconds:
            what = f"{MODES[workload['mode']]}, {workload['dtype']}, {seconds[OURS] / seconds[HALF]:.2f}"
            found.setdefault(workload["length"], []).append(what)
    return [
        f"\nTimes as long as at half the length, measured in turn, at {length:,}: {'; '.join(whats)}."
        for length, whats in found.items()
    ]


def failures(records: list[Record]) -> list[str]:
    """Who failed, at what, and why: a line for each contender and reason."""
    found: dict[tuple[str, str], list[str]] = {}
    for record in records:
        workload = record["workload"]
        shape = f" H {workload['heads']} D {workload['head_dim']}" if shapes_differ(records) else ""
        what = f"{MODES[workload['mode']]}, {workload['dtype']}{shape} at {workload['length']:,}"
        for name, reason in record.get("failed", {}).items():
            found.setdefault((name, reason), []).append(f"{what}, std {workload['std']:g}")
    return [f"\n{name} failed ({reason}): {'; '.join(whats)}." for (name, reason), whats in found.items()]


def read(machine: str) -> list[Record]:
    records: list[Record] = runs.read(HERE / "results" / f"{machine}.json")["records"]
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("machine", help="name of a file under benchmarks/results")
    parser.add_argument(
        "--output", type=Path, help="the drawing; docs/attention-NAME.svg, or docs/attention.svg for cpu-2core-amx"
    )
    parser.add_argument(
        "--beside", nargs="+", help="other files: print a table of what they measured, and draw nothing"
    )
    arguments = parser.parse_args()
    records = read(arguments.machine)
    if arguments.beside:
        print(side_by_side({name: read(name) for name in (arguments.machine, *arguments.beside)}))
        return
    name = "attention.svg" if arguments.machine == DOCUMENTED else f"attention-{arguments.machine}.svg"
    (arguments.output or HERE.parent / "docs" / name).write_bytes(to_svg(draw(records)))
    print(tables(records))


if __name__ == "__main__":
    main()
