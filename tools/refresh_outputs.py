"""Put the outputs of a demo run into the committed notebooks, and its numbers into the report.

The outputs are small and clean: no progress bars, widget state or paths. Those of the stages
come from RUN_DIR/notebooks; the other notebooks are executed here. report/demo.json gets the
numbers that README and chapters show: recipe, machine, seconds, training, test.

usage: refresh_outputs.py RUN_DIR
"""
import json
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
            text = re.sub(r" at 0x[0-9a-f]+", "", text)
            data[kind] = re.sub(r"\bT_[0-9a-f]{5}", "T", text)
    if "text/html" in data and "image/png" not in data:
        data["text/plain"] = "(a table or a styled text)"
    output.metadata = {kind: dict(alt=about["alt"])   # of figures
                       for kind, about in output.metadata.items()
                       if isinstance(about, dict) and "alt" in about}
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
    notebook = nbformat.read(target, 4)
    done = {cell.source: cell.outputs for cell in executed.cells if cell.cell_type == "code"}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cleaned = map(clean, done.get(cell.source, []))
            cell.outputs = join(output for output in cleaned if output)
    nbformat.write(notebook, target)


def execute(path):
    """A notebook that is no stage, executed where it lies."""
    notebook = nbformat.read(path, 4)
    client = NotebookClient(notebook, kernel_name="python3",
                            resources={"metadata": {"path": str(path.parent)}},
                            extra_arguments=["--log-level=40"])
    client.execute()
    return notebook


def demo_numbers(run_dir):
    """What report/demo.json keeps of a finished demo run."""
    results = json.loads((run_dir / "report" / "results.json").read_text(encoding="utf-8"))
    evaluation = results["evaluation"]
    return dict(
        recipe=results["recipe"],
        environment=results["environment"],
        stages=json.loads((run_dir / "stages.json").read_text(encoding="utf-8")),
        training=dict(summary=results["training"]["summary"],
                      validation=results["training"]["validation"]),
        evaluation=dict(test=evaluation["test"], difference=evaluation["difference"]))


def main(run_dir):
    for path in sorted((ROOT / "nbs").glob("*.ipynb")):
        stage = run_dir / "notebooks" / path.name
        executed = nbformat.read(stage, 4) if stage.exists() else execute(path)
        refresh(path, executed)
        print(path.name)
    numbers = json.dumps(demo_numbers(run_dir), indent=1, ensure_ascii=False)
    (ROOT / "report" / "demo.json").write_text(numbers + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
