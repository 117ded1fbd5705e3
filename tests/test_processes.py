"""Several processes train as one does: the same steps, validations and adapter."""
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from conftest import ROOT
from dolly_lora.config import PRESETS
from dolly_lora.engine.packing import share_out
from dolly_lora.train import train
from toys import curve, quiet

# one epoch of 194 examples: twelve steps of sixteen and one of two, too few for three processes;
# the validation split is no multiple of anything
RECIPE = replace(PRESETS["tiny"], max_steps=0, epochs=1.0, eval_steps=5, logging_steps=1)
JOB = """
import sys
from test_processes import RECIPE
from dolly_lora.train import train
train(RECIPE, sys.argv[1], log=lambda line: None)
"""


def train_with(processes, folder):
    """Train on so many CPU processes: what they said on stderr."""
    (folder.parent / "job.py").write_text(JOB)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               f"--nproc_per_node={processes}", str(folder.parent / "job.py"), str(folder)]
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
                        "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def read(folder):
    return json.loads((folder / "training_history.json").read_text())


def adapter(folder):
    return load_file(folder / "adapter/adapter_model.safetensors")


def assert_same(folder, other):
    """The same curve, validations and adapter, but for the order of float32 sums."""
    assert curve(read(folder)) == pytest.approx(curve(read(other)), abs=1e-5)
    ours, theirs = adapter(folder), adapter(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one") / "run"
    train(RECIPE, folder, log=quiet)
    assert read(folder)["summary"]["steps"] == 13
    return folder


@pytest.fixture(scope="module")
def by_two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two") / "run"
    train_with(2, folder)
    return folder


def test_two_processes_train_as_one(alone, by_two):
    assert_same(by_two, alone)


def test_three_processes_train_as_one(alone, tmp_path):
    train_with(3, tmp_path / "run")
    assert_same(tmp_path / "run", alone)


def test_a_run_of_two_goes_on_with_one(alone, by_two, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(by_two, folder, ignore=shutil.ignore_patterns("adapter", "checkpoint-13"))
    (folder / "training_history.json").unlink()
    train(RECIPE, folder, log=quiet)
    assert read(folder)["summary"]["resumed_from"] == 10
    assert_same(folder, alone)


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
@pytest.mark.parametrize("lengths", [[5], [300, 40, 500, 90], [7] * 16, [2000, *range(1, 16)]])
def test_a_step_is_shared_out_whole_and_evenly(lengths, processes):
    batches = share_out(lengths, 600, processes)
    assert len(batches) % processes == 0
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    loads = [sum(lengths[i] for i in batch) for batch in batches]
    assert max(loads) - min(loads) <= max(lengths)
