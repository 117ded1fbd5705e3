"""README.md from nbs/index.ipynb: the same words, with links that start at the root."""
import json
import posixpath
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def from_root(target):
    """A link that starts in nbs/ as one that starts at the root."""
    if re.match(r"[a-z]+:|#", target):
        return target
    return posixpath.normpath(posixpath.join("nbs", target))


def readme(notebook):
    """The Markdown cells of a notebook as one text."""
    cells = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "markdown"]
    text = "\n\n".join(cells) + "\n"
    text = re.sub(r"\]\(([^)\s]+)\)", lambda m: f"]({from_root(m[1])})", text)
    return re.sub(r'(src|href)="([^"]+)"', lambda m: f'{m[1]}="{from_root(m[2])}"', text)


if __name__ == "__main__":
    index = json.loads((ROOT / "nbs" / "index.ipynb").read_text(encoding="utf-8"))
    (ROOT / "README.md").write_text(readme(index), encoding="utf-8")
