"""A run that was killed ends with the history and adapter of one left alone."""
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file

from conftest import ROOT
from dolly_lora.config import DollyError
from dolly_lora.engine.step import FusedLlama
from dolly_lora.runs import hold_run
from dolly_lora.train import train
from dolly_lora.trainer import last_checkpoint
from training import RECIPE, TRAIN, Stop, adapters, quiet, same, stop_at, train_rising


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, train(RECIPE, folder, log=quiet)


@pytest.fixture(scope="module")
def rising(tmp_path_factory):
    """A run whose best checkpoint is not its last."""
    folder = tmp_path_factory.mktemp("rising")
    history = train_rising(RECIPE, folder, log=quiet)
    assert history["summary"]["best_step"] == 4
    return folder, history


def test_killed_and_started_again(whole, tmp_path):
    process = subprocess.Popen([sys.executable, "-c", TRAIN, str(tmp_path)], cwd=ROOT,
                               stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step     6/"):        # two steps past the checkpoint at 4
            os.kill(process.pid, signal.SIGKILL)
            break
    process.wait()
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "adapter").exists()
    assert last_checkpoint(tmp_path).name == "checkpoint-4"
    history = train(RECIPE, tmp_path, log=quiet)
    assert history["summary"]["resumed_from"] == 4 and same(history, whole[1])
    clock = [row["train_s"] for row in history["log"]]      # it goes on, and does not start again
    assert clock == sorted(clock) and clock[0] > 0
    assert history["summary"]["train_seconds"] >= clock[-1]
    a, b = (load_file(f / "adapter/adapter_model.safetensors") for f in (tmp_path, whole[0]))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_finished_run_only_reads(whole):
    folder, history = whole
    assert train(RECIPE, folder) == json.loads(json.dumps(history))
    assert len(list((folder / "checkpoints").iterdir())) <= 2
    assert not (folder / "adapter.part").exists()
    assert not list((folder / "adapter").glob("*.bin"))


def test_resumed_with_validations_between_the_log_lines(tmp_path):
    recipe = replace(RECIPE, logging_steps=3, eval_steps=4)
    undisturbed = train(recipe, tmp_path / "whole", log=quiet)
    assert [row["step"] for row in undisturbed["log"]] == [3, 4, 6, 8, 9, 12]
    with pytest.raises(Stop):
        train(recipe, tmp_path / "killed", log=stop_at(6))
    history = train(recipe, tmp_path / "killed", log=quiet)
    assert history["summary"]["resumed_from"] == 4 and same(history, undisturbed)
    assert adapters(tmp_path / "killed") == adapters(tmp_path / "whole")


@pytest.mark.parametrize("lost", ["adapter", "adapter/README.md", "training_history.json"])
def test_a_run_that_died_before_its_card_trains_no_further_step(rising, tmp_path, lost):
    finished, history = rising
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    if (folder / lost).is_dir():
        shutil.rmtree(folder / lost)
    else:
        (folder / lost).unlink()
    with patch.object(FusedLlama, "step", side_effect=AssertionError("a step too many")):
        again = train(RECIPE, folder, log=quiet)
    timed = {"peak_memory_gib", "resumed_from", "train_seconds", "seconds_per_step",
             "real_tokens_per_second"}
    assert same(again, history) and adapters(folder) == adapters(finished)
    assert {k: v for k, v in again["summary"].items() if k not in timed} == {
        k: v for k, v in history["summary"].items() if k not in timed}
    seconds = history["summary"]["train_seconds"]
    assert again["summary"]["train_seconds"] == pytest.approx(seconds, abs=0.01)


DIE = TRAIN.replace("recipe =", """
import os
import dolly_lora.trainer as trainer
trainer.write_text = lambda *args: os._exit(9)
recipe =""", 1)


def test_killed_while_the_adapter_is_written(whole, tmp_path):
    assert DIE != TRAIN
    assert subprocess.run([sys.executable, "-c", DIE, str(tmp_path)], cwd=ROOT).returncode == 9
    assert not (tmp_path / "adapter").exists()
    assert (tmp_path / "adapter.part/adapter_model.safetensors").exists()
    assert same(train(RECIPE, tmp_path, log=quiet), whole[1])
    assert adapters(tmp_path) == adapters(whole[0]) and not (tmp_path / "adapter.part").exists()


def test_a_second_process_does_not_train_in_the_same_folder(tmp_path):
    with hold_run(tmp_path):
        env = {k: v for k, v in os.environ.items() if k != "DOLLY_LORA_HOLDS"}
        done = subprocess.run([sys.executable, "-c", TRAIN, str(tmp_path)], cwd=ROOT, env=env,
                              capture_output=True, text=True)
    assert done.returncode and f"is in use by process {os.getpid()} on " in done.stderr
    assert not (tmp_path / "checkpoints").exists()


NO_HISTORY = ["[]", "{}", "null", '{"summary": {}, "log": [], "validation": []}']


@pytest.mark.parametrize("text", NO_HISTORY)
def test_json_that_is_no_history_is_one_line_with_a_remedy_that_works(whole, tmp_path, text):
    folder = tmp_path / "run"
    shutil.copytree(whole[0], folder)
    path = folder / "training_history.json"
    path.write_text(text)
    with pytest.raises(DollyError, match="is not a training history: delete it") as told:
        train(RECIPE, folder, log=quiet)
    assert "\n" not in str(told.value)
    path.unlink()
    assert same(train(RECIPE, folder, log=quiet), whole[1])


@pytest.mark.parametrize("part, field", [("summary", "best_step"), ("log", "loss"),
                                         ("validation", "eval_loss")])
def test_a_history_with_a_text_for_a_number(whole, tmp_path, part, field):
    history = json.loads(json.dumps(whole[1]))
    row = history[part] if part == "summary" else history[part][-1]
    row[field] = "2.5"
    folder = tmp_path / "run"
    shutil.copytree(whole[0], folder, ignore=shutil.ignore_patterns("checkpoints"))
    (folder / "training_history.json").write_text(json.dumps(history))
    with pytest.raises(DollyError, match="is not a training history"):
        train(RECIPE, folder, log=quiet)
