"""What holds for the committed notebooks, the exported library and the README made from them."""
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT

NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
STAGE_NAMES = "01_data", "02_train", "03_eval", "04_chat", "05_report"
STAGES = [p for p in NOTEBOOKS if re.match(r"0[1-5]_", p.name)]


def cells(path, kind="code"):
    return [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == kind]


def source(cell): return "".join(cell["source"])


@pytest.mark.parametrize("path", STAGES, ids=lambda p: p.stem)
def test_one_parameters_cell_that_papermill_can_read(path):
    from papermill import inspect_notebook
    tagged = [c for c in cells(path) if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1
    lines = source(tagged[0]).splitlines()
    assert len(lines) <= 8 and len(inspect_notebook(str(path))) == len(lines)      # a line papermill cannot read is silently no parameter
    assert all(v["help"] for v in inspect_notebook(str(path)).values())


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_clean_and_small(path):
    text = path.read_text()
    metadata = json.loads(text)["metadata"]
    assert "widgets" not in metadata and {"name", "language"} <= set(metadata["kernelspec"])
    assert not re.search(r"hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9]{20,}", text)
    outputs = [o for c in cells(path) for o in c["outputs"]]
    shown = json.dumps(outputs)
    assert str(ROOT) not in shown and "it/s]" not in shown and "widget-view" not in shown and not any(o["output_type"] == "error" for o in outputs)
    assert len(text) < 600_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_nothing_scrolls_sideways_and_figures_can_be_read_out(path):
    assert [line for c in cells(path) for line in source(c).split("\n") if len(line) > 120] == []
    for output in (o for c in cells(path) for o in c["outputs"] if "image/png" in o.get("data", {})):
        assert len(output["metadata"]["image/png"]["alt"]) > 20


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p.stem not in ("index", "cli")], ids=lambda p: p.stem)
def test_carries_the_outputs_of_a_demo_run(path):
    shows = [c for c in cells(path) if re.search(r"\bprint\(|save_fig\(|pd\.DataFrame\(", source(c)) and not source(c).startswith("#|")]
    assert shows and sum(bool(c["outputs"]) for c in shows) >= 0.8 * len(shows)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_every_public_definition_is_used_in_a_later_cell(path):
    code = [source(c) for c in cells(path)]
    for i, here in enumerate(code):
        if re.match(r"#\|\s*exports?\b", here):
            for name in re.findall(r"^(?:def|class) ([A-Za-z]\w*)", here, re.M):
                assert any(re.search(rf"\b{name}\b", later) for later in code[i + 1:]), f"{name} is never shown"


def test_sync_leaves_no_difference(tmp_path):
    """nbdev_clean, nbdev_export and the README from index.ipynb, in a copy, change nothing."""
    names = ["nbs", "dolly_lora", "settings.ini", "setup.py", "README.md"]
    for name in names:
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / name, **({"ignore": shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")} if (ROOT / name).is_dir() else {}))
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    tool = Path(sys.executable).parent
    for command in ([tool / "nbdev_clean"], [tool / "nbdev_export"], [tool / "jupyter", "nbconvert", "--log-level=ERROR", "--to", "markdown", "nbs/index.ipynb", "--output-dir", ".", "--output", "README"]):
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    for file in (f for name in names for f in ([ROOT / name] if (ROOT / name).is_file() else (ROOT / name).rglob("*"))):
        if file.is_file() and "__pycache__" not in file.parts and ".ipynb_checkpoints" not in file.parts:
            assert (tmp_path / file.relative_to(ROOT)).read_bytes() == file.read_bytes(), file.relative_to(ROOT)


def test_library_does_not_import_nbdev_or_widgets_at_import():
    code = "import sys, dolly_lora.config, dolly_lora.data, dolly_lora.generate, dolly_lora.chat, dolly_lora.report, dolly_lora.cli; print([m for m in ('nbdev', 'ipywidgets', 'trl', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip() == "[]"
    assert not any("nbdev" in line for f in (ROOT / "dolly_lora").glob("*.py") if f.name != "_modidx.py" for line in f.read_text().splitlines() if "import" in line)


def test_committed_report_is_of_a_gpu_run_on_the_whole_of_dolly():
    if not (ROOT / "report/results.json").exists():
        pytest.skip("no report is committed yet")
    from dolly_lora.verdicts import judge_slug
    results, page = json.loads((ROOT / "report/results.json").read_text()), (ROOT / "report/report.html").read_text()
    assert results["environment"]["gpu"] and results["data"]["cleaning"]["read"] == 15011 and results["recipe"]["epochs"] == 3 and results["recipe"]["batch_size"] == 16
    assert not re.search(r'(?:src|href)="(?!data:|#)', page) and "not LLaMA-2-7B" in page
    for judged in results["evaluation"]["judgments"].values():
        assert judged["alpaca"]["tuned against base"]["n_total"] == 805 and {m["n_rows"] for m in judged["mt_bench"].values()} == {160}
        assert all(judged["official"].values()) or "not leaderboard numbers" in page
    assert set(results["stages"]) == set(STAGE_NAMES) and all(s["finished"] and s["parts"] == 1 for name, s in results["stages"].items() if name != "05_report")      # one undisturbed run
    slugs = [judge_slug(name) for name in results["evaluation"]["judgments"]]
    assert {p.stem for p in (ROOT / "report/figures").glob("*.svg")} == {"categories", "token_lengths", "padding", "training_curves", "ablation_random_7b", "ablation_smollm2", "test_loss", "answer_lengths"} | {f"{figure}_{slug}" for slug in slugs for figure in ("win_rates", "mtbench_radar", "mtbench_turns")}
