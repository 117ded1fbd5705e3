"""Damaged and foreign checkpoints are passed over; nothing is taken from another place."""
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from dolly_lora.train import train
from dolly_lora.trainer import checkpoint_damage, last_checkpoint
from test_models import plant
from training import RECIPE, Stop, adapters, quiet, same, stop_at, train_rising


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, train(RECIPE, folder, log=quiet)


@pytest.fixture()
def copied(whole, tmp_path):
    """The checkpoints of a finished run, in a folder that a test may damage."""
    shutil.copytree(whole[0] / "checkpoints", tmp_path / "checkpoints")
    return tmp_path


@pytest.fixture(scope="module")
def rising(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rising")
    history = train_rising(RECIPE, folder, log=quiet)
    assert history["summary"]["best_step"] == 4
    return folder, history


DAMAGE = {"adapter_model.safetensors": "half", "optimizer.pt": "half", "scheduler.pt": "empty",
          "trainer_state.json": "half", "rng_state.pth": "gone"}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over(copied, name):
    newest, lines = last_checkpoint(copied), []
    data = (newest / name).read_bytes()
    (newest / name).write_bytes(b"" if DAMAGE[name] == "empty" else data[:len(data) // 2])
    if DAMAGE[name] == "gone":
        (newest / name).unlink()
    assert last_checkpoint(copied, lines.append) not in (None, newest)
    why = "is missing" if DAMAGE[name] == "gone" else "cannot be read"
    expected = f"warning: {newest.name} is passed over: {name} {why}"
    assert len(lines) == 1 and lines[0].startswith(expected)


def test_one_flipped_bit_in_a_checkpoint_is_noticed(copied):
    newest = last_checkpoint(copied)
    data = bytearray((newest / "optimizer.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (newest / "optimizer.pt").write_bytes(data)
    assert last_checkpoint(copied) not in (None, newest)


def test_a_damaged_checkpoint_costs_only_its_steps(whole, tmp_path):
    """Training goes on from the one before, says so, and ends as if nothing had been."""
    with pytest.raises(Stop):
        train(RECIPE, tmp_path, log=stop_at(10))
    (tmp_path / "checkpoints/checkpoint-8/optimizer.pt").write_bytes(b"PK")
    (tmp_path / "checkpoints/checkpoint-99x").mkdir()
    lines = []
    history = train(RECIPE, tmp_path, log=lines.append)
    assert history["summary"]["resumed_from"] == 4 and same(history, whole[1])
    assert adapters(tmp_path) == adapters(whole[0])
    assert [line for line in lines if "passed over" in line] == [
        "warning: checkpoint-8 is passed over: optimizer.pt cannot be read (BadZipFile)"]


def test_no_whole_checkpoint_starts_anew(whole, tmp_path):
    with pytest.raises(Stop):
        train(RECIPE, tmp_path, log=stop_at(6))
    shutil.rmtree(tmp_path / "checkpoints/checkpoint-4")
    (tmp_path / "checkpoints/checkpoint-4").mkdir()
    history = train(RECIPE, tmp_path, log=quiet)
    assert history["summary"]["resumed_from"] is None and same(history, whole[1])


def test_the_best_checkpoint_is_lost(tmp_path):
    with pytest.raises(Stop):
        train_rising(RECIPE, tmp_path, log=stop_at(10))
    shutil.rmtree(tmp_path / "checkpoints/checkpoint-4")
    lines = []
    again = train_rising(RECIPE, tmp_path, log=lines.append)
    assert ("warning: checkpoint-4, the best so far, is missing or damaged: "
            "the best is now that of step 8") in lines
    losses = {row["step"]: row["eval_loss"] for row in again["validation"] if row["step"] > 4}
    assert again["summary"]["best_validation_loss"] == min(losses.values())
    best = tmp_path / f"checkpoints/checkpoint-{min(losses, key=losses.get)}"
    saved = load_file(best / "adapter_model.safetensors")
    kept = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert all(torch.equal(saved[k], kept[k]) for k in saved)


@pytest.mark.parametrize("until", [10, None], ids=["resumed", "only its adapter is missing"])
def test_a_moved_run_folder_takes_nothing_from_its_old_place(rising, tmp_path, until):
    finished, history = rising
    old, new = tmp_path / "old", tmp_path / "new"
    if until:
        with pytest.raises(Stop):
            train_rising(RECIPE, old, log=stop_at(until))
    else:
        train_rising(RECIPE, old, log=quiet)
    shutil.copytree(old, new, ignore=shutil.ignore_patterns("adapter"))
    decoy = old / "checkpoints/checkpoint-4/adapter_model.safetensors"
    save_file({k: torch.zeros_like(v) for k, v in load_file(decoy).items()}, decoy.with_name("new"))
    os.replace(decoy.with_name("new"), decoy)
    state = new / f"checkpoints/checkpoint-{8 if until else 12}/trainer_state.json"
    assert str(old) in state.read_text()
    assert same(train_rising(RECIPE, new, log=quiet), history)
    assert adapters(new) == adapters(finished)


PICKLES = ["optimizer.pt", "scheduler.pt", "rng_state.pth", "pytorch_model.bin",
           "adapter_model.bin", "optimizer.bin", "other/adapter_model.bin"]
WEIGHTS = ["model.safetensors", "other/adapter_model.safetensors",
           "additional_chat_templates/adapter_model.safetensors", "notes.safetensors"]
OTHERS = ["model.safetensors.index.json", "pytorch_model_fsdp_0/.metadata", "extra.pt"]


@pytest.mark.parametrize("name", PICKLES + WEIGHTS + OTHERS)
def test_what_is_foreign_in_a_checkpoint_is_not_run_and_not_loaded(whole, tmp_path, name):
    with pytest.raises(Stop):
        train(RECIPE, tmp_path / "run", log=stop_at(10))
    checkpoint = tmp_path / "run/checkpoints/checkpoint-8"
    path = checkpoint / name
    path.parent.mkdir(exist_ok=True)
    if name in PICKLES:
        plant(path, tmp_path / "ran")
    elif name in WEIGHTS:  # the Trainer would take them for the adapter, or for the base
        own = load_file(checkpoint / "adapter_model.safetensors")
        save_file({k: torch.zeros_like(v) for k, v in own.items()}, path)
    else:
        path.write_text("{}")
    lines = []
    history = train(RECIPE, tmp_path / "run", log=lines.append)
    assert not (tmp_path / "ran").exists()
    assert history["summary"]["resumed_from"] == 4 and same(history, whole[1])
    assert adapters(tmp_path / "run") == adapters(whole[0])
    told = [line for line in lines if "passed over" in line]
    assert len(told) == 1 and name.partition("/")[0] in told[0]


def test_the_pickle_that_the_trainer_leaves_is_not_read(whole, tmp_path):
    with pytest.raises(Stop):
        train(RECIPE, tmp_path / "run", log=stop_at(10))
    plant(tmp_path / "run/checkpoints/checkpoint-8/training_args.bin", tmp_path / "ran")
    history = train(RECIPE, tmp_path / "run", log=quiet)
    assert not (tmp_path / "ran").exists()
    assert history["summary"]["resumed_from"] == 8 and same(history, whole[1])


def test_a_checkpoint_of_several_processes_is_whole(copied):
    newest = last_checkpoint(copied)
    shutil.copy(newest / "rng_state.pth", newest / "rng_state_1.pth")
    (newest / "rng_state.pth").rename(newest / "rng_state_0.pth")
    assert last_checkpoint(copied) == newest


def test_what_any_tokenizer_leaves_is_welcome(copied):
    newest = last_checkpoint(copied)
    for name in ("tokenizer.model", "merges.txt", "vocab.json", "chat_template.jinja"):
        (newest / name).write_text("")
    (newest / "additional_chat_templates").mkdir()
    (newest / "additional_chat_templates/tool_use.jinja").write_text("")
    assert checkpoint_damage(newest) is None
