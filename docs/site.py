"""Build the documentation site of mkdocs.yml, strictly: a link that leads nowhere or a docstring not found ends it.

python docs/site.py FOLDER

FOLDER gets `pages`, a copy of what is shown, laid out as in the repository so that links hold in both, and `site`, to
be opened at index.html or served by anything.
"""

import logging
import re
import shutil
import sys
from pathlib import Path

from mkdocs.commands.build import build as mkdocs_build
from mkdocs.config import load_config

ROOT = Path(__file__).parents[1]
SHOWN = ("README.md", "CONTRIBUTING.md", "LOG.md", "LICENSE", "docs")
FETCHED = re.compile(r"<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=\"?(?:https?:)?//[^>]*>")


def build(folder: Path) -> Path:
    """Build the site, and refuse one of which a browser would fetch anything from elsewhere."""
    pages, site = folder / "pages", folder / "site"
    shutil.rmtree(pages, ignore_errors=True)
    pages.mkdir(parents=True)
    for name in SHOWN:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, pages / name)
    for linked in ("results*.json", "weights.py"):  # docs/claims.md leads there
        for original in ROOT.glob(f"experiments/*/{linked}"):
            copied = pages / original.relative_to(ROOT)
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(original, copied)
    config = load_config(str(ROOT / "mkdocs.yml"), docs_dir=str(pages), site_dir=str(site), strict=True)
    config.plugins.on_startup(command="build", dirty=False)
    mkdocs_build(config)
    for page in site.rglob("*.html"):
        if fetched := FETCHED.search(page.read_text(encoding="utf-8")):
            raise SystemExit(f"{page} fetches from elsewhere: {fetched[0]}")
    return site


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    print(build(Path(sys.argv[1])) / "index.html")
