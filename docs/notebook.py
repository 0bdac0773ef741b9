"""Run the notebook docs/context.py and write what it says and draws as docs/context.md.

make demo && python docs/notebook.py

The notebook is plain Python in cells: what follows `# %% [markdown]` is text, what follows `# %%` is run.
"""

import contextlib
import io
import re
from pathlib import Path

import matplotlib
from matplotlib import pyplot

NOTEBOOK = Path(__file__).with_name("context.py")


def execute(notebook: Path, page: Path) -> None:
    """Write the page: its text, its code, and after each cell of code what that printed and drew."""
    matplotlib.use("agg")
    matplotlib.rcParams.update({"svg.hashsalt": "longreach"})
    written = [f"<!-- Written by docs/notebook.py from {notebook.name}: change that, not this. -->"]
    names: dict[str, object] = {"__name__": "__main__"}
    drawn = 0
    for kind, source in cells(notebook.read_text(encoding="utf-8")):
        if kind == "markdown":
            written.append(re.sub(r"^# ?", "", source, flags=re.MULTILINE))
            continue
        written.append(f"```python\n{source}\n```")
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(source, str(notebook), "exec"), names)
        if printed.getvalue():
            written.append(f"```text\n{printed.getvalue().rstrip()}\n```")
        for number in pyplot.get_fignums():
            drawn += 1
            figure = page.with_name(f"{page.stem}-{drawn}.svg")
            pyplot.figure(number).savefig(figure, metadata={"Date": None})
            written.append(f"![What this draws]({figure.name})")
        pyplot.close("all")
    page.write_text("\n\n".join(written) + "\n", encoding="utf-8")


def cells(text: str) -> list[tuple[str, str]]:
    """The notebook's cells, each as "markdown" or "code" and its lines."""
    parts = re.split(r"^# %%(.*)\n", text, flags=re.MULTILINE)[1:]
    return [
        ("markdown" if "[markdown]" in head else "code", body.strip("\n"))
        for head, body in zip(parts[::2], parts[1::2], strict=True)
    ]


if __name__ == "__main__":
    execute(NOTEBOOK, NOTEBOOK.with_suffix(".md"))
