"""Several processes train as one does: the same steps, validations and adapter."""
import json
import shutil
from dataclasses import replace
from unittest.mock import patch

import psutil
import pytest
import torch
from safetensors.torch import load_file

from dolly_lora.config import PRESETS, ConfigError, DollyError
from dolly_lora.engine.packing import share_out
from dolly_lora.processes import count_processes
from dolly_lora.train import train
from toys import curve, quiet

# one epoch of 146 examples: nine steps of sixteen and one of two, too few for three processes;
# the validation split is no multiple of anything
RECIPE = replace(PRESETS["tiny"], max_steps=0, epochs=1.0, eval_steps=4, logging_steps=1)
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
            [p for p in workers() if "accelerate" not in " ".join(p.cmdline())][1].kill()

    said = r"was killed \(signal 9\); see .*workers.log; run the same"
    with pytest.raises(DollyError, match=said) as e:
        train(replace(RECIPE, gpus=2), folder, log=kill_one)
    assert "\n" not in str(e.value) and workers() == []
    lines = []
    train(replace(RECIPE, gpus=2), folder, log=lines.append)
    assert lines[2] == "resuming from checkpoint-4"
    assert len([line for line in lines if line.startswith("step    10/10  loss")]) == 1
    return folder


def test_two_processes_train_as_one(alone, by_two):
    assert_same(by_two, alone)


def test_three_processes_train_as_one(alone, tmp_path):
    train(replace(RECIPE, gpus=3), tmp_path / "run", log=quiet)
    assert_same(tmp_path / "run", alone)


def test_an_interrupted_run_leaves_no_process(tmp_path):
    def interrupt(line):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(replace(RECIPE, gpus=2), tmp_path / "run", log=interrupt)
    assert workers() == []


def test_what_is_wrong_in_a_process_is_its_own_line(tmp_path):
    recipe = replace(RECIPE, gpus=2, max_length=8)  # no prompt is that short
    with pytest.raises(DollyError, match="no train example has room for a response") as e:
        train(recipe, tmp_path / "run", log=quiet)
    assert "\n" not in str(e.value)


def test_more_cards_than_there_are_is_one_line():
    with patch("torch.cuda.device_count", return_value=2):
        with pytest.raises(ConfigError, match="gpus=4 and 2 can be seen: choose at most 2"):
            count_processes(replace(RECIPE, gpus=4))
        assert count_processes(RECIPE) == 1 and count_processes(replace(RECIPE, gpus=0)) == 2


def test_a_run_of_two_goes_on_with_one(alone, by_two, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(by_two, folder, ignore=shutil.ignore_patterns("adapter", "checkpoint-10"))
    (folder / "training_history.json").unlink()
    train(RECIPE, folder, log=quiet)
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
