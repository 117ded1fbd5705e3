"""The package: what `import dolly_lora` offers, and what `pip install` gives.

The sdist builds the wheel, and the wheel alone runs the course, in any folder.
"""
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest

from conftest import ROOT

CALL = "import sys; from dolly_lora.cli import main; sys.exit(main())"
NAMES = ["Chat", "ChatUI", "PRESETS", "Recipe", "build_prompt", "generate", "load_base",
         "load_dolly", "load_tokenizer", "load_tuned", "open_chat", "train", "write_report"]


# ---- names


def python(code):
    """What a fresh process prints."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_importing_the_package_loads_nothing():
    modules = python("import sys, dolly_lora; print(*sys.modules)")
    assert not {"torch", "transformers", "numpy"} & set(modules)
    assert not [name for name in modules if name.startswith("dolly_lora.")]


def test_every_offered_name_can_be_had():
    code = f"import dolly_lora; print(*[type(getattr(dolly_lora, n)).__name__ for n in {NAMES}])"
    kinds = dict(zip(NAMES, python(code)))
    assert kinds.pop("PRESETS") == "dict"
    assert {kinds.pop(n) for n in ("Chat", "ChatUI", "Recipe")} == {"type"}
    assert set(kinds.values()) == {"function"}


def test_the_names_are_listed():
    import dolly_lora
    assert set(NAMES) <= set(dir(dolly_lora)) and "__version__" in dir(dolly_lora)


def test_an_unknown_name_is_an_attribute_error():
    import dolly_lora
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        dolly_lora.trian
    with pytest.raises(ImportError):
        from dolly_lora import trian   # noqa: F401


ORDERS = {"alone": "", "module first": "import dolly_lora.train, dolly_lora.generate",
          "from module first": "from dolly_lora.train import train\n"
                               "from dolly_lora.generate import generate"}
LOOK = """
import os, torch, transformers, peft, trl  # once, for all the processes below

def look():
    import importlib, dolly_lora
    from dolly_lora import generate, train
    for function in train, generate:
        module = importlib.import_module(function.__module__)
        name = function.__name__
        print(name, type(function).__name__, type(module).__name__,
              getattr(module, name) is function, getattr(dolly_lora, name) is function, flush=True)

for first in {orders}:
    if not os.fork():
        exec(first)
        look()
        os._exit(0)
    os.wait()
"""


def test_a_function_wins_over_the_module_of_its_name():
    right = ["function", "module", "True", "True"]
    said = python(LOOK.format(orders=list(ORDERS.values())))
    assert said == ["train", *right, "generate", *right] * len(ORDERS)


def test_other_modules_are_attributes_as_ever():
    code = "import dolly_lora.config; print(dolly_lora.config.__name__)"
    assert python(code) == ["dolly_lora.config"]
    assert python("from dolly_lora import files; print(files.__name__)") == ["dolly_lora.files"]


def test_type_checkers_see_the_same_names():
    text = (ROOT / "dolly_lora/__init__.py").read_text()
    block = text.split("if TYPE_CHECKING:")[1].split("\n\n")[0]
    assert sorted(re.findall(r"(\w+) as \1\b", block)) == sorted(NAMES)
    assert len(re.findall(r"\w+ as \w+", block)) == len(NAMES)


def test_export_leaves_the_package_file_alone(tmp_path):
    for name in "nbs", "dolly_lora", "settings.ini":
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    export = os.path.join(os.path.dirname(sys.executable), "nbdev_export")
    subprocess.run([export], cwd=tmp_path, check=True, capture_output=True)
    here, there = ROOT / "dolly_lora/__init__.py", tmp_path / "dolly_lora/__init__.py"
    assert here.read_bytes() == there.read_bytes()


# ---- what pip installs


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(sdist, wheel made from it)"""
    folder = tmp_path_factory.mktemp("built")
    skip = shutil.ignore_patterns(".git", ".venv", ".gpu", "runs", "build", "dist", "*.egg-info",
                                  "__pycache__", ".ipynb_checkpoints", ".pytest_cache")
    shutil.copytree(ROOT, folder / "source", ignore=skip)
    subprocess.run([sys.executable, "setup.py", "-q", "sdist", "-d", str(folder)],
                   cwd=folder / "source", check=True, capture_output=True)
    (sdist,) = folder.glob("*.tar.gz")
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation",
                    "--no-index", "-w", str(folder / "wheel"), str(sdist)],
                   check=True, capture_output=True)
    (wheel,) = (folder / "wheel").glob("*.whl")
    return sdist, wheel


def test_sdist_holds_what_the_build_reads(built):
    names = {n.partition("/")[2] for n in tarfile.open(built[0]).getnames()}
    assert {"settings.ini", "setup.py", "README.md", "LICENSE", "nbs/01_data.ipynb",
            "dolly_lora/sample/dolly_sample.jsonl"} <= names


def test_wheel_runs_in_a_folder_of_somebody_else(built, tmp_path):
    """With another project's settings.ini above it, and without this checkout on the path."""
    site, work = tmp_path / "site", tmp_path / "other" / "work"
    work.mkdir(parents=True)
    (tmp_path / "other" / "settings.ini").write_text("[DEFAULT]\nlib_name = other\n")
    zipfile.ZipFile(built[1]).extractall(site)
    env = {k: v for k, v in os.environ.items() if k not in ("IN_TEST", "DOLLY_LORA_HOLDS")}
    env["PYTHONPATH"] = str(site)

    def run(*command):
        return subprocess.run([sys.executable, "-c", *command], cwd=work, env=env,
                              capture_output=True, text=True)
    where = run("import dolly_lora; print(dolly_lora.__file__)")
    assert where.stdout.startswith(str(site)), where
    done = run(CALL, "run", "tiny")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert (work / "runs/tiny/report/report.html").is_file()
    assert json.loads((work / "runs/tiny/recipe.json").read_text())["commit"] is None
