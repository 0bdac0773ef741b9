"""Write docs/claims.md and its figures from the committed results of all experiments: python -m experiments.page."""

from collections.abc import Iterable
from importlib import import_module
from pathlib import Path

from experiments.claim import Claim
from longreach.report.drawing import to_svg
from longreach.report.grid import format_range, to_markdown
from longreach.results import Provenance, Results, merge

ROOT = Path(__file__).parents[1]
EXPERIMENTS = (
    *("train_short_test_long", "headline", "length_grid", "early_token_curse", "cached_window"),
    *("sizes", "interpolation", "slopes", "slopes_of_12_heads", "descendants", "retrofit"),
)
"""Their folders, in the order of the page."""


def claim_of(name: str) -> Claim:
    """The claim that an experiment judges."""
    claim: Claim = import_module(f"experiments.{name}.claim").CLAIM
    return claim


def section(name: str, results: Results) -> str:
    """What the page says of one experiment."""
    claim = claim_of(name)
    judgement = claim.judge(results)
    parts = [
        f"## {claim.title}",
        f"**The claim.** {claim.statement}",
        f"**{judgement.verdict}.** {' '.join(judgement.findings)}",
        f"*When it holds.* {claim.rule}",
        *([f"![{claim.caption}](claims/{name}.svg)\n\n{claim.caption}"] if claim.figure else []),
        *(f"{table.title}. {table.note}\n\n{to_markdown(table).strip()}" for table in judgement.tables),
        *([f"*Setting.* {'; '.join(unusual)}."] if (unusual := setting(results)) else []),
        f"*Caveats.* {claim.caveats}",
        f"*Run again.* `{_command(name)}`; {', '.join(_link(path) for path in files(name))}, "
        f"{_conditions(results.provenance)}.",
    ]
    return "\n\n".join(parts)


def setting(results: Results) -> list[str]:
    """Shapes, steps and scored tokens of an experiment, but for those that the head of the page tells of all."""
    found = []
    config = results.provenance.config
    if model := config.get("model"):  # of a comparison
        for shape in config["shapes"] or [f"{model['num_layers']}x{model['d_model']}"]:
            layers, width = shape.split("x")
            made = f"{layers} layer{'s' * (layers != '1')} of width {width} with {model['num_heads']} heads"
            sizes = [one.parameters for one in results.training if one.model.shape in (None, shape)]
            found.append((made, f" ({format_range(sizes, _millions)} parameters)"))
    found += [(f"{one.steps:,} steps of {one.tokens // one.steps:,} tokens", "") for one in results.training]
    found += [(f"{one.tokens:,} tokens are scored", "") for one in results.records]
    head = " ".join(_head().split())
    return [text + remark for text, remark in dict.fromkeys(found) if text not in head]


def _millions(parameters: float) -> str:
    return f"{parameters / 1e6:.2g}M"


def _head() -> str:
    return (ROOT / "experiments" / "head.md").read_text(encoding="utf-8").strip()


def _command(name: str) -> str:
    return f'make experiments/{name} DATA="books/*.txt" VALID="held-out/*.txt"'


def files(name: str) -> list[Path]:
    """Its committed results: one file, or one for each of its tests."""
    return sorted((ROOT / "experiments" / name).glob("results*.json"))


def read(paths: Iterable[Path]) -> Results:
    """What several files of results hold together."""
    return merge({str(path): Results.read(path) for path in paths})


def _link(path: Path) -> str:
    return f"[{path.name}](../{path.relative_to(ROOT).as_posix()})"


def _conditions(provenance: Provenance) -> str:
    start = provenance.starts[0]
    commit = f", commit {start.git_commit[:10]}" if start.git_commit else ""
    return f"begun {start.time[:10]} with longreach {start.longreach}{commit}, torch {start.torch}, on {start.device}"


def page(found: dict[str, Results]) -> str:
    """The whole page, of the experiments that there are results of."""
    rows = [f"| [{title}](#{_anchor(title)}) | {word} |" for title, word in _verdicts(found)]
    table = ["\n".join(("| claim | here |", "|---|---|", *rows))] if rows else []
    sections = [section(name, results) for name, results in found.items()]
    if waiting := [name for name in EXPERIMENTS if name not in found]:
        lines = (f"- {claim_of(name).title}: `{_command(name)}`" for name in waiting)
        sections.append("\n".join(("## Not run yet", "", *lines)))
    return "\n\n".join((_head(), *table, *sections)) + "\n"


def _verdicts(found: dict[str, Results]) -> list[tuple[str, str]]:
    claims = {name: claim_of(name) for name in found}
    return [(claim.title, claim.judge(found[name]).verdict) for name, claim in claims.items()]


def _anchor(title: str) -> str:
    kept = "".join(character for character in title.lower() if character.isalnum() or character in " -_")
    return "-".join(kept.split())


def main() -> None:
    """Write the page and the figures."""
    found = {name: read(paths) for name in EXPERIMENTS if (paths := files(name))}
    (ROOT / "docs" / "claims.md").write_text(page(found), encoding="utf-8")
    figures = ROOT / "docs" / "claims"
    figures.mkdir(exist_ok=True)
    for name, results in found.items():
        if draw := claim_of(name).figure:
            (figures / f"{name}.svg").write_bytes(to_svg(draw(results)))


if __name__ == "__main__":
    main()
