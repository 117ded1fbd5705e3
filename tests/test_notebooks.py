"""What holds for the committed notebooks, the exported library and the README made from them."""
import ast
import html
import json
import posixpath
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT

NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
STAGE_NAMES = "01_data", "02_train", "03_eval", "04_chat", "05_report"
CHAPTERS = [p for p in NOTEBOOKS if p.stem in STAGE_NAMES]
TEXTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
MODULES = sorted(p for p in (ROOT / "dolly_lora").rglob("*.py") if p.name != "_modidx.py")

# What a chapter must not hold: it would prove instead of show, or hang on something outside it.
FORBIDDEN = {
    "an assertion": r"\bassert\b",
    "a cell that JupyterLab would show all the same": r"#\|\s*hide",
    "a stopwatch": r"\btimeout\b",
    "a port or a server": r"\bsocket\b|HTTPServer|http\.server|localhost|127\.0\.0\.1",
}


def name_of(path): return path.name


def cells(path, kind="code"):
    return [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == kind]


def source(cell): return "".join(cell["source"])


def prose(path):
    """The Markdown of a notebook or of a file, without its code."""
    text = path.read_text()
    if path.suffix == ".ipynb":
        text = "\n\n".join(source(cell) for cell in cells(path, "markdown"))
    text = re.sub(r"(?ms)^ *```.*?^ *```", "", text)
    return re.sub(r"`[^`\n]+`", "`code`", text)


def links(path):
    """Targets of the links and pictures that stay inside the project, without their anchors."""
    text = prose(path)
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    targets += re.findall(r'(?:src|href)="([^"]+)"', text)
    return [t.partition("#")[0] for t in targets if not re.match(r"[a-z]+:|#", t)]


@pytest.fixture(scope="module")
def report():
    """results.json and the page of the committed run."""
    if not (ROOT / "report/results.json").exists():
        pytest.skip("no report is committed yet")
    results = json.loads((ROOT / "report/results.json").read_text())
    return results, (ROOT / "report/report.html").read_text()


# --- a notebook's form ---

@pytest.mark.parametrize("path", CHAPTERS, ids=name_of)
def test_one_parameters_cell_that_papermill_can_read(path):
    from papermill import inspect_notebook
    tagged = [c for c in cells(path) if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1
    lines = source(tagged[0]).splitlines()
    assert len(lines) <= 8
    understood = inspect_notebook(str(path))
    assert len(understood) == len(lines)      # a line papermill cannot read is no parameter
    assert all(value["help"] for value in understood.values())


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_clean_and_small(path):
    text = path.read_text()
    metadata = json.loads(text)["metadata"]
    assert "widgets" not in metadata
    assert {"name", "language"} <= set(metadata["kernelspec"])
    assert not re.search(r"hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9]{20,}", text)
    assert len(text) < 600_000
    outputs = [output for cell in cells(path) for output in cell["outputs"]]
    assert all(output["output_type"] != "error" for output in outputs)
    shown = json.dumps(outputs)
    for unwanted in str(ROOT), "it/s]", "widget-view":
        assert unwanted not in shown


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_nothing_scrolls_sideways(path):
    lines = [line for cell in cells(path) for line in source(cell).split("\n")]
    assert [line for line in lines if len(line) > 100] == []


def test_no_test_scrolls_sideways():
    for path in (ROOT / "tests").glob("*.py"):
        lines = path.read_text().splitlines()
        assert [line for line in lines if len(line) > 100] == [], path.name


@pytest.mark.parametrize("path", CHAPTERS, ids=name_of)
def test_a_chapter_computes_and_shows(path):
    code = "\n".join(source(cell) for cell in cells(path))
    found = {what: re.findall(rf".*(?:{words}).*", code) for what, words in FORBIDDEN.items()}
    assert {what: lines for what, lines in found.items() if lines} == {}


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p.stem not in ("index", "cli")],
                         ids=name_of)
def test_carries_the_outputs_of_a_demo_run(path):
    shows = [cell for cell in cells(path)
             if re.search(r"\bprint\(|save_fig\(|pd\.DataFrame\(", source(cell))
             and not source(cell).startswith("#|")]
    assert shows
    assert sum(bool(cell["outputs"]) for cell in shows) >= 0.8 * len(shows)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_every_public_definition_is_used_in_a_later_cell(path):
    code = [source(cell) for cell in cells(path)]
    for i, here in enumerate(code):
        if re.match(r"#\|\s*exports?\b", here):
            for name in re.findall(r"^(?:def|class) ([A-Za-z]\w*)", here, re.M):
                later = code[i + 1:]
                assert any(re.search(rf"\b{name}\b", cell) for cell in later), name


# --- what one reads, and where one goes next ---

@pytest.mark.parametrize("path", NOTEBOOKS + TEXTS, ids=name_of)
def test_links_lead_to_files_that_exist(path):
    missing = [target for target in links(path) if not (path.parent / target).exists()]
    assert missing == []


def test_the_table_of_faults_names_tests_that_exist():
    named = set(re.findall(r"`(test_\w+\.py)`", (ROOT / "CONTRIBUTING.md").read_text()))
    assert len(named) > 10
    assert {name for name in named if not (ROOT / "tests" / name).exists()} == set()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_a_notebook_is_linked_by_a_relative_path(path):
    """An address on GitHub leaves JupyterLab; only the badges, which open Colab, need one."""
    assert not re.search(r"\]\(https://github\.com/[^)]*\.(ipynb|md|html)\)", prose(path))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_ends_with_a_link_onward(path):
    last = [source(cell) for cell in cells(path, "markdown")][-1]
    assert re.search(r"(?m)^(Next|Back to the start): .*\]\([\w.]+\.ipynb\)", last)


def exercises(path):
    """A notebook's exercises: the numbers of the questions, and the folded texts."""
    text = prose(path).partition("## Exercises")[2]
    folded = re.findall(r"(?s)<details>(.*?)</details>", text)
    asked = re.sub(r"(?s)<details>.*?</details>", "", text)
    return re.findall(r"(?m)^(\d+)\. ", asked), folded


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_every_exercise_has_an_answer(path):
    """One folded text for each, or one with as many numbered answers."""
    asked, folded = exercises(path)
    if len(folded) == 1 != len(asked):
        assert re.findall(r"(?m)^(\d+)\. ", folded[0]) == asked
    else:
        assert len(folded) == len(asked)
    assert bool(asked) == ("## Exercises" in prose(path))


def test_the_rubric_counts_the_exercises_and_adds_up():
    row = r"(?m)^\| (\d\d_\w+) \| (\d+) \| (\d+) × (\d+) \| (.*) \|$"
    rows = re.findall(row, prose(ROOT / "nbs/index.ipynb"))
    assert [name for name, *_ in rows] == list(STAGE_NAMES)
    assert sum(int(points) for _, points, *_ in rows) == 100
    for name, points, count, each, rest in rows:
        assert int(count) == len(exercises(ROOT / f"nbs/{name}.ipynb")[0])
        others = re.findall(r"(?<![\w=])(\d+)(?=:| for)", rest)
        assert int(points) == int(count) * int(each) + sum(map(int, others))


@pytest.mark.parametrize("path", NOTEBOOKS + TEXTS, ids=name_of)
def test_pictures_can_be_read_out(path):
    text = prose(path)
    alternatives = re.findall(r"!\[([^\]]*)\]", text)
    alternatives += [(re.findall(r'alt="([^"]*)"', picture) or [""])[0]
                     for picture in re.findall(r"<img [^>]*>", text)]
    assert all(len(alt) > 12 for alt in alternatives)
    if path.suffix == ".ipynb":
        for output in (output for cell in cells(path) for output in cell["outputs"]):
            if "image/png" in output.get("data", {}):
                assert len(output["metadata"]["image/png"]["alt"]) > 20


def test_index_leads_to_every_notebook():
    index = ROOT / "nbs" / "index.ipynb"
    assert {p.name for p in NOTEBOOKS} - set(links(index)) == {"index.ipynb"}


# --- what is made from the notebooks ---

def copy_of(name, target):
    if (ROOT / name).is_dir():
        ignore = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
        shutil.copytree(ROOT / name, target / name, ignore=ignore)
    else:
        shutil.copy(ROOT / name, target / name)


def files_of(name):
    """The files under a name that git would keep."""
    path = ROOT / name
    for file in [path] if path.is_file() else path.rglob("*"):
        if file.is_file() and not {"__pycache__", ".ipynb_checkpoints"} & set(file.parts):
            yield file.relative_to(ROOT)


def test_sync_leaves_no_difference(tmp_path):
    """The commands of `make sync`, in a copy, change nothing."""
    names = "nbs", "dolly_lora", "report", "tools", "settings.ini", "setup.py", "README.md"
    for name in names:
        copy_of(name, tmp_path)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    tool = Path(sys.executable).parent
    for command in ([sys.executable, "tools/measured.py"], [tool / "nbdev_clean"],
                    [tool / "nbdev_export"], [sys.executable, "tools/readme.py"]):
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    for name in names:
        for file in files_of(name):
            assert (tmp_path / file).read_bytes() == (ROOT / file).read_bytes(), file


def test_readme_has_the_links_of_the_index():
    """They differ by the folder they start from, and by nothing else."""
    index = [posixpath.normpath(posixpath.join("nbs", t))
             for t in links(ROOT / "nbs" / "index.ipynb")]
    assert index == links(ROOT / "README.md")


@pytest.fixture
def tools(monkeypatch):
    """The scripts in tools/ can be imported."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))


def test_costs_are_those_of_the_committed_runs(tools, report, tmp_path):
    """Of the demo too, once report/demo.json is there; what nobody measured is said."""
    import measured
    import refresh_outputs
    results, _ = report
    readme = (ROOT / "README.md").read_text()
    assert measured.costs() in readme
    assert f"| one {results['environment']['gpu']['name']} |" in measured.costs()
    assert "| Colab's free T4 | `llama2-t4` | not measured |" in readme
    (tmp_path / "report").mkdir()
    (tmp_path / "report/results.json").write_text(json.dumps(results))
    (tmp_path / "stages.json").write_text(json.dumps(dict(results["stages"])))
    demo = json.loads(json.dumps(refresh_outputs.demo_numbers(tmp_path)))
    demo["environment"] |= dict(gpu=None, cpu_cores=2)
    demo["recipe"]["preset"] = "demo"
    machine, what, *_, memory = measured.run_row(demo)
    assert machine == "2 CPU cores, no GPU"
    assert what.startswith("`demo`, all five notebooks")
    assert memory == "none"


# --- the library ---

def test_library_does_not_import_nbdev_or_widgets_at_import():
    modules = "config", "data", "generate", "chat", "report", "cli"
    code = ("import sys, " + ", ".join(f"dolly_lora.{name}" for name in modules) + "; "
            "slow = 'nbdev', 'ipywidgets', 'trl', 'matplotlib'; "
            "print([name for name in slow if name in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_module_imports_nbdev(path):
    assert not re.search(r"(?m)^\s*(import|from) nbdev", path.read_text())


def imported(tree):
    """(the module's or the name's own name, its name here) of what comes from dolly_lora."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            if node.level or (node.module or "").partition(".")[0] == "dolly_lora":
                yield from ((a.name, a.asname or a.name) for a in node.names)
        if isinstance(node, ast.Import):
            yield from ((a.name, a.asname) for a in node.names
                        if a.name.startswith("dolly_lora") and a.asname)


def is_private(name): return name.startswith("_") and not name.startswith("__")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_module_takes_nothing_private_of_another(path):
    tree = ast.parse(path.read_text())
    pairs = list(imported(tree))
    assert [name for name, _ in pairs if is_private(name)] == []
    here = {name for _, name in pairs}
    taken = [f"{node.value.id}.{node.attr}" for node in ast.walk(tree)
             if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
             and node.value.id in here and is_private(node.attr)]
    assert taken == []


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_packages_are_written_by_hand(path):
    made = "AUTOGENERATED" in path.read_text()
    assert made == (path.name != "__init__.py")


# --- the committed report ---

def test_committed_report_is_of_a_gpu_run_on_the_whole_of_dolly(report):
    results, page = report
    assert results["environment"]["gpu"]
    assert results["data"]["cleaning"]["read"] == 15011
    assert results["recipe"]["epochs"] == 3
    assert results["recipe"]["batch_size"] == 16
    assert not re.search(r'(?:src|href)="(?!data:|#)', page)
    assert "not LLaMA-2-7B" in page


def test_committed_report_is_of_one_undisturbed_run_of_clean_code(report):
    results, _ = report
    assert set(results["stages"]) == set(STAGE_NAMES)
    for name, stage in results["stages"].items():
        if name != "05_report":               # it writes the file while it runs
            assert stage["finished"] and stage["parts"] == 1


def test_committed_report_names_a_clean_commit(report):
    results, _ = report
    assert re.fullmatch(r"[0-9a-f]{40}", results["environment"]["commit"])


def test_committed_report_has_all_trainings_of_its_recipe(report):
    results, _ = report
    trainings = results["recipe"].get("seeds", 1)
    if trainings > 1:
        assert len(results["evaluation"]["seeds"]["runs"]) == trainings


def test_committed_report_judged_all_questions_of_the_benchmarks(report):
    results, page = report
    for judged in results["evaluation"]["judgments"].values():
        against_base = [pair for name, pair in judged["alpaca"].items() if "base" in name]
        assert {pair["n_total"] for pair in against_base} == {805}
        assert {rating["n_rows"] for rating in judged["mt_bench"].values()} == {160}
        assert all(judged["official"].values()) or "not leaderboard numbers" in page


def test_committed_figures_are_those_of_the_page(report):
    """No figure of another run lies beside them; each has all its files."""
    from dolly_lora.verdicts import judge_slug
    results, page = report
    figures = {p.stem for p in (ROOT / "report/figures").iterdir()}
    texts = set()
    for name in figures:
        for kind in "svg", "png", "txt":
            assert (ROOT / f"report/figures/{name}.{kind}").exists()
        texts.add((ROOT / f"report/figures/{name}.txt").read_text().strip())
    drawn = {html.unescape(alt) for alt in re.findall(r'<img alt="([^"]*)"', page)}
    assert texts == drawn
    judged = {f"win_rates_{judge_slug(name)}" for name in results["evaluation"]["judgments"]}
    assert {"training_curves", "ablation_random_7b"} | judged <= figures
