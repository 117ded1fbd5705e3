"""The site: every notebook and the API's reference as pages one can search, without Jupyter.

The generator (zensical) reads Markdown. The notebooks become Markdown here: their headings
stay headings, which makes the tables of contents; their other cells and outputs become HTML.

usage: site.py [FOLDER] (default: _docs)
"""
import ast
import base64
import html
import importlib.util
import json
import posixpath
import re
import shutil
import subprocess
import sys
from pathlib import Path

import latex2mathml.converter
from markdown_it import MarkdownIt
from mdit_py_plugins.dollarmath import dollarmath_plugin
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.util import ClassNotFound

from reference import ROOT, modules, reference

PAGES = ROOT / "_proc" / "site"          # what the generator reads
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
GROUPS = {                               # of the navigation: title and the notebooks' names
    "Chapters": r"0[1-5]_",
    "The ground": r"00|01.",
    "Training, and the engine": r"02.",
    "Answers and judges": r"03.",
    "Chat": r"04.",
    "Report and command line": r"05.|cli",
}


def math(source, options):
    """A formula as MathML, which browsers draw without a script."""
    display = "block" if options["display_mode"] else "inline"
    return latex2mathml.converter.convert(source, display=display)


def code(source, language="python"):
    """Coloured code."""
    try:
        lexer = get_lexer_by_name(language)
    except ClassNotFound:
        lexer = get_lexer_by_name("text")
    return highlight(source, lexer, HtmlFormatter(cssclass="highlight", wrapcode=True))


def mostly_imports(source):
    """Is there little in a cell but imports?"""
    try:
        statements = ast.parse(source).body
    except SyntaxError:          # a cell with IPython's % or !
        return False
    imports = [s for s in statements if isinstance(s, (ast.Import, ast.ImportFrom))]
    return len(imports) > 0.8 * len(statements)


def flow(diagram):
    """A mermaid flowchart as a table: what each notebook in it reads, and what it writes.

    Mermaid itself is a script that a page would fetch from elsewhere.
    """
    labels = {}
    edges = []
    node = r"(\w+)(?:\[\(?\"?(.+?)\"?\)?\])?"
    for start, start_label, end, end_label in re.findall(rf"{node} --> {node}", diagram):
        labels |= {name: label for name, label in ((start, start_label), (end, end_label))
                   if label}
        edges.append((start, end))
    rows = ["<tr><th>reads</th><th>notebook</th><th>writes</th></tr>"]
    for name, label in labels.items():
        if (ROOT / "nbs" / f"{label}.ipynb").exists():
            read = "<br>".join(labels[start] for start, end in edges if end == name)
            written = "<br>".join(labels[end] for start, end in edges if start == name)
            link = f'<a href="{label}.html">{label}</a>'
            rows.append(f"<tr><td>{read}</td><td>{link}</td><td>{written}</td></tr>")
    return f"<table>{''.join(rows)}</table>"


def fence(renderer, tokens, position, options, environment):
    """A code block of a Markdown cell."""
    token = tokens[position]
    language = token.info.strip() or "text"
    return flow(token.content) if language == "mermaid" else code(token.content, language)


class Page:
    """Cells of a notebook, or a Markdown file, on their way to a page of the site."""

    def __init__(self, folder, name):
        self.folder = folder   # where relative links of the source start: `nbs`, or nothing
        self.name = name
        self.lines = []
        self.markdown = MarkdownIt("commonmark").enable("table")
        self.markdown.add_render_rule("fence", fence)
        self.markdown.use(dollarmath_plugin, renderer=math, allow_space=False,
                          double_inline=True)

    def link(self, target):
        """A link of the source as a link of the site; files it names come along."""
        path, hash_sign, anchor = target.partition("#")
        if not path or re.match(r"[a-z]+:", path):
            return target
        path = posixpath.normpath(posixpath.join(self.folder, path))
        source = ROOT / path
        if not source.exists():
            print(f"{self.name}: no such file: {target}", file=sys.stderr)
            return target
        if source.suffix == ".ipynb":
            return f"{source.stem}.html{hash_sign}{anchor}"
        if source.suffix == ".md":
            return f"{source.stem.lower()}.html{hash_sign}{anchor}"
        if source.is_dir():
            return f"https://github.com/dolly-lora/dolly_lora/tree/main/{path}"
        copy = PAGES / "docs" / path
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, copy)
        return path + hash_sign + anchor

    def relink(self, tokens):
        for token in tokens:
            for name in "href", "src":
                if token.attrGet(name):
                    token.attrSet(name, self.link(token.attrGet(name)))
            if token.type in ("html_block", "html_inline"):
                token.content = re.sub(r'(src|href)="([^"]+)"', self.relink_html, token.content)
            self.relink(token.children or [])

    def relink_html(self, match):
        return f'{match[1]}="{self.link(match[2])}"'

    def add_markdown(self, source):
        """Headings as they are, the rest as HTML."""
        environment = {}
        tokens = self.markdown.parse(source, environment)
        self.relink(tokens)
        rest = []
        position = 0
        while position < len(tokens):
            token = tokens[position]
            if token.type == "heading_open" and token.level == 0:
                self.add_html(rest, environment)
                rest = []
                self.lines += [f"{token.markup} {tokens[position + 1].content}", ""]
                position += 3
            else:
                rest.append(token)
                position += 1
        self.add_html(rest, environment)

    def add_html(self, tokens, environment):
        if tokens:
            body = self.markdown.renderer.render(tokens, self.markdown.options, environment)
            self.lines += [f"<div>{body}</div>", ""]

    def add_code(self, cell, number):
        """A code cell and its outputs. What only the export needs is left out."""
        source = "".join(cell["source"])
        if re.match(r"#\| *(default_exp|eval: false)", source):
            return
        source = re.sub(r"(?m)^#\|.*\n?", "", source).strip()
        outputs = [self.output(output, f"{self.name}-{number}-{i}")
                   for i, output in enumerate(cell["outputs"])]
        shown = "".join(f'<div class="output">{output}</div>' for output in outputs if output)
        if not source:
            return
        coloured = code(source)
        if mostly_imports(source):
            coloured = f"<details><summary>imports</summary>{coloured}</details>"
        self.lines += [f'<div class="cell">{coloured}{shown}</div>', ""]

    def output(self, output, name):
        """An output as HTML."""
        if output["output_type"] == "stream":
            return f"<pre>{html.escape(''.join(output['text']), quote=False)}</pre>"
        data = output.get("data", {})
        if "image/png" in data:
            picture = PAGES / "docs" / "outputs" / f"{name}.png"
            picture.parent.mkdir(parents=True, exist_ok=True)
            picture.write_bytes(base64.b64decode("".join(data["image/png"])))
            alt = output.get("metadata", {}).get("image/png", {}).get("alt", "")
            return f'<img src="outputs/{picture.name}" alt="{html.escape(alt)}">'
        if "text/html" in data:
            return "".join(data["text/html"])
        return f"<pre>{html.escape(''.join(data.get('text/plain', '')), quote=False)}</pre>"

    def write(self):
        (PAGES / "docs" / f"{self.name}.md").write_text("\n".join(self.lines))


def title_of(path):
    """The first heading of a notebook."""
    first = "".join(json.loads(path.read_text())["cells"][0]["source"])
    return first.splitlines()[0].lstrip("# ")


def write_notebook(path):
    page = Page("nbs", path.stem)
    for number, cell in enumerate(json.loads(path.read_text())["cells"]):
        if cell["cell_type"] == "markdown":
            page.add_markdown("".join(cell["source"]))
        elif cell["cell_type"] == "code":
            page.add_code(cell, number)
    page.write()


def write_reference():
    """The reference's pages; its part of the navigation."""
    folder = PAGES / "docs" / "api"
    folder.mkdir()
    entries = []
    for module, notebook in modules():
        short = module.removeprefix("dolly_lora.")
        (folder / f"{short}.md").write_text(reference(module, notebook))
        entries.append({short: f"api/{short}.md"})
    return entries


def navigation(api):
    """The notebooks in the groups of their numbers, each in the first group that takes it."""
    groups = {title: [] for title in GROUPS}
    for path in NOTEBOOKS:
        group = next((t for t, names in GROUPS.items() if re.match(names, path.stem)), None)
        if group:
            groups[group].append({title_of(path): f"{path.stem}.md"})
    return [{"Home": "index.md"}, *({title: pages} for title, pages in groups.items()),
            {"API reference": api},
            {"The project": [{"Contributing": "contributing.md"},
                             {"Changelog": "changelog.md"}]}]


def configuration(nav):
    """What the generator wants to know. Nothing here asks a server for anything."""
    features = ["navigation.sections", "navigation.top", "navigation.footer", "toc.follow",
                "search.highlight", "content.code.copy"]
    return dict(
        site_name="dolly_lora", site_dir="site", docs_dir="docs",
        use_directory_urls=False, nav=nav, extra_css=["site.css"],
        theme=dict(name="material", font=False, features=features),
        markdown_extensions=[{"toc": {"permalink": True}}])


def build(folder):
    if importlib.util.find_spec("zensical") is None:
        sys.exit("zensical is not installed: make .venv/.site, with Python 3.11 or newer")
    shutil.rmtree(PAGES, ignore_errors=True)
    (PAGES / "docs").mkdir(parents=True)
    shutil.copy(Path(__file__).with_name("site.css"), PAGES / "docs" / "site.css")
    for path in NOTEBOOKS:
        write_notebook(path)
    for name in "CONTRIBUTING", "CHANGELOG":
        page = Page("", name.lower())
        page.add_markdown((ROOT / f"{name}.md").read_text())
        page.write()
    settings = PAGES / "mkdocs.yml"       # JSON is YAML
    settings.write_text(json.dumps(configuration(navigation(write_reference())), indent=1))
    generator = [sys.executable, "-m", "zensical", "build", "--clean", "-f", str(settings)]
    subprocess.run(generator, check=True, cwd=PAGES)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.move(PAGES / "site", folder)


if __name__ == "__main__":
    build(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "_docs").resolve())
