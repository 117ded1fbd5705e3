"""Shared by the tests: where the real data lie, and a run folder that several tests read."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("DOLLY_LORA_SHARED", ROOT.parent / "shared")) / "data"


def cli(*args, cwd=ROOT, **kwargs):
    """`dolly-lora ARGS` as a process of its own, as a user calls it."""
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}
    return subprocess.run([sys.executable, "-c", "import sys; from dolly_lora.cli import main; sys.exit(main())", *map(str, args)], cwd=cwd, env=env, capture_output=True, text=True, **kwargs)


@pytest.fixture(scope="session")
def shared():
    if not SHARED.exists():
        pytest.skip(f"real data not found at {SHARED}: set DOLLY_LORA_SHARED")
    return SHARED


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """The whole course under papermill with the tiny preset: (run folder, finished process)."""
    folder = tmp_path_factory.mktemp("tiny")
    return folder, cli("run", "tiny", "--run-dir", folder)
