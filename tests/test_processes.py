"""Several processes train as one does: the same steps, validations and adapter."""
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import psutil
import pytest
import torch

from dolly_lora.config import ConfigError, DollyError
from dolly_lora.engine.packing import share_out
from dolly_lora.processes import count_processes
from dolly_lora.train import train
from toys import EPOCH, assert_same, living, quiet, read

# several processes on the CPU; on cards they are measured by `dolly-lora bench --gpus`
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="wants no card, or several")

# a notebook that trains for long and says nothing more after its first step: FOLDER
NOTEBOOK = """
import sys
from dataclasses import replace
from dolly_lora.train import train
from toys import EPOCH
recipe = replace(EPOCH, gpus=2, epochs=1000.0, eval_steps=10**6, logging_steps=10**6)
train(recipe, sys.argv[1], log=lambda line: print(line, flush=True))
"""


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one") / "run"
    train(EPOCH, folder, log=quiet)
    assert read(folder)["summary"]["steps"] == 10
    return folder


def workers():
    """The processes that this one has started, and those that they have."""
    return [p for p in psutil.Process().children(recursive=True)
            if "dolly_lora.processes" in " ".join(p.cmdline())]


@pytest.fixture(scope="module")
def by_two(tmp_path_factory):
    """A run of two processes, one of which was killed on the way: its folder."""
    folder = tmp_path_factory.mktemp("two") / "run"

    def kill_one(line):
        if line.startswith("step     6/"):
            [p for p in workers() if "torch.distributed.run" not in " ".join(p.cmdline())][1].kill()

    said = r"was killed \(signal 9\); see .*workers.log; run the same"
    with pytest.raises(DollyError, match=said) as e:
        train(replace(EPOCH, gpus=2), folder, log=kill_one)
    assert "\n" not in str(e.value) and workers() == []
    lines = []
    train(replace(EPOCH, gpus=2), folder, log=lines.append)
    assert lines[2] == "resuming from checkpoint-4"
    assert len([line for line in lines if line.startswith("step    10/10  loss")]) == 1
    return folder


def test_two_processes_train_as_one(alone, by_two):
    assert_same(by_two, alone)


def test_three_processes_train_as_one(alone, tmp_path):
    train(replace(EPOCH, gpus=3), tmp_path / "run", log=quiet)
    assert_same(tmp_path / "run", alone)


def test_an_interrupted_run_leaves_no_process(tmp_path):
    def interrupt(line):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(replace(EPOCH, gpus=2), tmp_path / "run", log=interrupt)
    assert workers() == []


def test_no_process_outlives_its_notebook(tmp_path):
    notebook = subprocess.Popen([sys.executable, "-c", NOTEBOOK, tmp_path / "run"],
                                cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True)
    try:
        assert any(line.startswith("step     0/") for line in notebook.stdout)
        family = psutil.Process(notebook.pid).children(recursive=True)
        assert len(family) == 3  # the launcher and two workers
    finally:
        notebook.kill()
        notebook.communicate()
    try:
        psutil.wait_procs(living(family), timeout=10)
        assert living(family) == []
    finally:
        for process in living(family):
            process.kill()


def test_what_is_wrong_in_a_process_is_its_own_line(tmp_path):
    recipe = replace(EPOCH, gpus=2, max_length=8)  # no prompt is that short
    with pytest.raises(DollyError, match="no train example has room for a response") as e:
        train(recipe, tmp_path / "run", log=quiet)
    assert "\n" not in str(e.value)


def test_more_cards_than_there_are_is_one_line():
    with patch("torch.cuda.device_count", return_value=2):
        with pytest.raises(ConfigError, match="gpus=4 and 2 can be seen: choose at most 2"):
            count_processes(replace(EPOCH, gpus=4))
        assert count_processes(EPOCH) == 2 and count_processes(replace(EPOCH, gpus=1)) == 1


def test_a_run_of_two_goes_on_with_one(alone, by_two, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(by_two, folder, ignore=shutil.ignore_patterns("adapter", "checkpoint-10"))
    (folder / "training_history.json").unlink()
    train(EPOCH, folder, log=quiet)
    assert read(folder)["summary"]["resumed_from"] == 8
    assert_same(folder, alone)


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
@pytest.mark.parametrize("lengths", [[5], [300, 40, 500, 90], [7] * 16, [2000, *range(1, 16)]])
def test_a_step_is_shared_out_whole_and_evenly(lengths, processes):
    batches = share_out(lengths, 600, processes)
    assert len(batches) % processes == 0
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    loads = [sum(lengths[i] for i in batch) for batch in batches]
    assert max(loads) - min(loads) <= max(lengths)
