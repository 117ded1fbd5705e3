"""What `pip install` gives: the sdist builds the wheel, and the wheel alone runs the course, in any folder."""
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest

from conftest import ROOT

CALL = "import sys; from dolly_lora.cli import main; sys.exit(main())"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(sdist, wheel made from it)"""
    folder = tmp_path_factory.mktemp("built")
    skip = shutil.ignore_patterns(".git", ".venv", ".gpu", "runs", "build", "dist", "*.egg-info", "__pycache__", ".ipynb_checkpoints", ".pytest_cache")
    shutil.copytree(ROOT, folder / "source", ignore=skip)
    subprocess.run([sys.executable, "setup.py", "-q", "sdist", "-d", str(folder)], cwd=folder / "source", check=True, capture_output=True)
    (sdist,) = folder.glob("*.tar.gz")
    wheel = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder / "wheel"), str(sdist)]
    subprocess.run(wheel, check=True, capture_output=True)
    (wheel,) = (folder / "wheel").glob("*.whl")
    return sdist, wheel


def test_sdist_holds_what_the_build_reads(built):
    names = {n.partition("/")[2] for n in tarfile.open(built[0]).getnames()}
    assert {"settings.ini", "setup.py", "README.md", "LICENSE", "nbs/01_data.ipynb", "dolly_lora/sample/dolly_sample.jsonl"} <= names


def test_wheel_runs_in_a_folder_of_somebody_else(built, tmp_path):
    """With another project's settings.ini above it, and without this checkout on the path."""
    site, work = tmp_path / "site", tmp_path / "other" / "work"
    work.mkdir(parents=True)
    (tmp_path / "other" / "settings.ini").write_text("[DEFAULT]\nlib_name = other\n")
    zipfile.ZipFile(built[1]).extractall(site)
    env = {k: v for k, v in os.environ.items() if k not in ("IN_TEST", "DOLLY_LORA_HOLDS")} | {"PYTHONPATH": str(site)}
    where = subprocess.run([sys.executable, "-c", "import dolly_lora; print(dolly_lora.__file__)"], cwd=work, env=env, capture_output=True, text=True)
    assert where.stdout.startswith(str(site)), where
    done = subprocess.run([sys.executable, "-c", CALL, "run", "tiny"], cwd=work, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert (work / "runs/tiny/report/report.html").is_file()
    assert json.loads((work / "runs/tiny/recipe.json").read_text())["commit"] is None
