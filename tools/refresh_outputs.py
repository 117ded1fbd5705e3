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
    output.metadata = {}
    return output


def refresh(target, executed):
    """Copy the outputs of `executed` into the notebook at `target`, cell by cell."""
    notebook, by_id = nbformat.read(target, 4), {c.id: c for c in executed.cells}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [o for o in map(clean, by_id[cell.id].outputs) if o]
    nbformat.write(notebook, target)


run_dir = Path(sys.argv[1])
for path in sorted((ROOT / "nbs").glob("*.ipynb")):
    done = run_dir / "notebooks" / path.name
    notebook = nbformat.read(done if done.exists() else path, 4)
    if not done.exists():
        NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}, extra_arguments=["--log-level=40"]).execute()
    refresh(path, notebook)
    print(path.name)
