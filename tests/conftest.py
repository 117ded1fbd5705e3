"""Shared by the tests: where the real data lie, and a run folder that several tests read."""
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from filelock import FileLock

os.environ["HF_HUB_OFFLINE"] = "1"  # else a library tries for half a minute to reach the hub

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("DOLLY_LORA_SHARED", ROOT.parent / "shared")) / "data"


def cli(*args, cwd=ROOT, env=None, **kwargs):
    """`dolly-lora ARGS` as a process of its own, as a user calls it.

    `env` is added to the environment; `kwargs` go to `subprocess.run`.
    """
    clean = {k: v for k, v in os.environ.items() if k != "IN_TEST"}
    code = "import sys; from dolly_lora.cli import main; sys.exit(main())"
    return subprocess.run([sys.executable, "-c", code, *map(str, args)], cwd=cwd,
                          env=clean | (env or {}), capture_output=True, text=True, **kwargs)


@pytest.fixture(scope="session")
def shared():
    if not SHARED.exists():
        pytest.skip(f"real data not found at {SHARED}: set DOLLY_LORA_SHARED")
    return SHARED


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory, worker_id):
    """The whole course under papermill with the tiny preset: (run folder, finished process).

    Made once; each of several pytest workers gets a copy.
    """
    base = tmp_path_factory.getbasetemp()
    made = (base if worker_id == "master" else base.parent) / "tiny_run"
    with FileLock(f"{made}.lock"):
        if not made.exists():
            done = cli("run", "tiny", "--run-dir", made)
            said = dict(args=[], returncode=done.returncode, stdout=done.stdout,
                        stderr=done.stderr)
            Path(f"{made}.json").write_text(json.dumps(said))
    copy = tmp_path_factory.mktemp("tiny") / "run"
    shutil.copytree(made, copy)
    return copy, subprocess.CompletedProcess(**json.loads(Path(f"{made}.json").read_text()))


@pytest.fixture()
def call(capsys):
    """`dolly-lora ARGS` inside this process: returncode, stdout and stderr."""
    from dolly_lora.cli import main

    def call(*args):
        capsys.readouterr()
        with warnings.catch_warnings():
            try:
                code = main([str(arg) for arg in args])
            except SystemExit as e:
                code = e.code
        return subprocess.CompletedProcess(args, code or 0, *capsys.readouterr())

    return call


@pytest.fixture(scope="session")
def judge_env(shared, tmp_path_factory):
    """The environment of a process that finds the published judges' prompts without a network."""
    from dolly_lora.mtbench import PINNED
    place = tmp_path_factory.mktemp("prompts")
    package = place / "site/alpaca_eval"
    config = package / "evaluators_configs/alpaca_eval_clf_gpt4_turbo"
    prompt = config / "alpaca_eval_clf.txt"
    prompt.parent.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    shutil.copy(shared / "eval/alpaca_eval/alpaca_eval_clf.txt", prompt)
    url, sha = PINNED["prompts"]
    cached = place / "cache/dolly_lora" / f"{sha[:16]}-{url.rsplit('/', 1)[1]}"
    cached.parent.mkdir(parents=True)
    shutil.copy(shared / "eval/mt_bench/judge_prompts.jsonl", cached)
    return dict(PYTHONPATH=str(place / "site"), XDG_CACHE_HOME=str(place / "cache"))
