"""Put the outputs of a demo run into the committed notebooks: small, clean, without progress bars, widget state or paths.

The stages' outputs come from RUN_DIR/notebooks; the other notebooks are executed here. usage: refresh_outputs.py RUN_DIR
"""
import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent


def clean(output):
    """One output as it may be committed, or None."""
    if output.output_type == "stream":
        output.text = output.text.replace(f"{ROOT}/", "")
        return output if output.name == "stdout" else None
    data = output.get("data", {})
    if "application/vnd.jupyter.widget-view+json" in data:
        return None
    for kind in ("text/html", "text/plain"):
        if kind in data:
            text = data[kind].replace(f"{ROOT}/", "")
            data[kind] = re.sub(r"\bT_[0-9a-f]{5}", "T", re.sub(r" at 0x[0-9a-f]+", "", text))
    if "text/html" in data and "image/png" not in data:
        data["text/plain"] = "(a table or a styled text)"
    output.metadata = {kind: dict(alt=m["alt"]) for kind, m in output.metadata.items() if isinstance(m, dict) and "alt" in m}   # of figures
    return output


def join(outputs):
    """Neighbouring pieces of printed text as one."""
    joined = []
    for output in outputs:
        if joined and output.output_type == joined[-1].output_type == "stream":
            joined[-1].text += output.text
        else:
            joined.append(output)
    return joined


def refresh(target, executed):
    """Copy the outputs of `executed` into the notebook at `target`, cell by cell."""
    notebook, done = nbformat.read(target, 4), {c.source: c for c in executed.cells if c.cell_type == "code"}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = join(o for o in map(clean, done[cell.source].outputs if cell.source in done else []) if o)
    nbformat.write(notebook, target)


run_dir = Path(sys.argv[1])
for path in sorted((ROOT / "nbs").glob("*.ipynb")):
    done = run_dir / "notebooks" / path.name
    notebook = nbformat.read(done if done.exists() else path, 4)
    if not done.exists():
        NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}, extra_arguments=["--log-level=40"]).execute()
    refresh(path, notebook)
    print(path.name)
