"""A run that is killed after a checkpoint ends with the history of one left alone; damaged checkpoints are passed over; memory runs out."""
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from conftest import ROOT
from dolly_lora import trainer as trainer_module
from dolly_lora.config import PRESETS, DollyError
from dolly_lora.runs import hold_run
from dolly_lora.engine.step import FusedLlama
from dolly_lora.trainer import DollyTrainer, last_checkpoint, model_card, training_arguments
from dolly_lora.train import train
from test_models import plant

RECIPE = replace(PRESETS["tiny"], max_steps=12, eval_steps=4)
TRAIN = "import sys; from dataclasses import replace; from dolly_lora.config import PRESETS; from dolly_lora.train import train; train(replace(PRESETS['tiny'], max_steps=12, eval_steps=4), sys.argv[1], log=lambda l: print(l, flush=True))"


def curve(history):
    rows = [(r["step"], r["loss"], r["learning_rate"]) for r in history["log"]], [(r["step"], r["eval_loss"]) for r in history["validation"]]
    return [r[0] for r in rows[0]], [r[0] for r in rows[1]], torch.tensor([x for part in rows for r in part for x in r[1:]])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, train(RECIPE, folder, log=lambda line: None)


def same(a, b):
    a, b = curve(a), curve(b)
    return a[:2] == b[:2] and torch.equal(a[2], b[2])


def test_killed_and_started_again(whole, tmp_path):
    process = subprocess.Popen([sys.executable, "-c", TRAIN, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step     6/"):        # two steps past the checkpoint at 4
            os.kill(process.pid, signal.SIGKILL)
            break
    process.wait()
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "adapter").exists() and last_checkpoint(tmp_path).name == "checkpoint-4"
    history = train(RECIPE, tmp_path, log=lambda line: None)
    assert history["summary"]["resumed_from"] == 4 and same(history, whole[1])
    clock = [r["train_s"] for r in history["log"]]
    assert clock == sorted(clock) and clock[0] > 0 and history["summary"]["train_seconds"] >= clock[-1]      # it goes on, and does not start again
    a, b = (load_file(f / "adapter/adapter_model.safetensors") for f in (tmp_path, whole[0]))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def adapters(folder): return (folder / "adapter/adapter_model.safetensors").read_bytes()


class Stop(Exception): pass


def stop_at(step):
    """A log that ends training when this step is logged: what a killed process leaves, without a process."""
    def log(line):
        if line.startswith(f"step {step:>5}/") and "validation" not in line: raise Stop
    return log


def train_rising(*args, **kwargs):
    """Train with a validation loss that grows by one a step, so that the best checkpoint is not the last."""
    real = DollyTrainer.evaluation_loop

    def rising(self, *args, **kwargs):
        out = real(self, *args, **kwargs)
        out.metrics["eval_loss"] += self.state.global_step
        return out
    with patch.object(DollyTrainer, "evaluation_loop", rising): return train(*args, **kwargs)


@pytest.fixture(scope="module")
def rising(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rising")
    history = train_rising(RECIPE, folder, log=lambda line: None)
    assert history["summary"]["best_step"] == 4
    return folder, history


def test_a_finished_run(whole):
    folder, history = whole
    s, losses = history["summary"], {r["step"]: r["eval_loss"] for r in history["validation"] if r["step"]}
    assert s["best_validation_loss"] == losses[s["best_step"]] == min(losses.values()) and max(losses) == s["steps"] == 12
    assert train(RECIPE, folder) == json.loads(json.dumps(history))      # complete: returns at once
    assert len(list((folder / "checkpoints").iterdir())) <= 2 and not (folder / "adapter.part").exists()
    assert s["optimizer"] == ("adamw_torch_fused" if torch.cuda.is_available() else "adamw_torch")    # what ran
    assert not list((folder / "adapter").glob("*.bin"))


def test_resumed_with_validations_between_the_log_lines(tmp_path):
    recipe = replace(RECIPE, logging_steps=3, eval_steps=4)
    undisturbed = train(recipe, tmp_path / "whole", log=lambda line: None)
    assert [r["step"] for r in undisturbed["log"]] == [3, 4, 6, 8, 9, 12]
    with pytest.raises(Stop): train(recipe, tmp_path / "killed", log=stop_at(6))
    history = train(recipe, tmp_path / "killed", log=lambda line: None)
    assert history["summary"]["resumed_from"] == 4 and same(history, undisturbed)
    assert adapters(tmp_path / "killed") == adapters(tmp_path / "whole")


@pytest.mark.parametrize("lost", ["adapter", "adapter/README.md", "training_history.json"])
def test_a_run_that_died_before_its_card_trains_no_further_step(rising, tmp_path, lost):
    finished, history = rising
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    shutil.rmtree(folder / lost) if (folder / lost).is_dir() else (folder / lost).unlink()
    with patch.object(FusedLlama, "step", side_effect=AssertionError("a step too many")):
        again = train(RECIPE, folder, log=lambda line: None)
    timed = {"peak_memory_gib", "resumed_from", "train_seconds", "seconds_per_step", "real_tokens_per_second"}
    assert same(again, history) and adapters(folder) == adapters(finished)
    assert {k: v for k, v in again["summary"].items() if k not in timed} == {
        k: v for k, v in history["summary"].items() if k not in timed}
    assert again["summary"]["train_seconds"] == pytest.approx(history["summary"]["train_seconds"], abs=0.01)


DIE = TRAIN.replace("import train; train(", "import train; import os; import dolly_lora.trainer as t; "
                    "t.write_text = lambda *a: os._exit(9); train(")


def test_killed_while_the_adapter_is_written(whole, tmp_path):
    assert DIE != TRAIN and subprocess.run([sys.executable, "-c", DIE, str(tmp_path)], cwd=ROOT).returncode == 9
    assert not (tmp_path / "adapter").exists() and (tmp_path / "adapter.part/adapter_model.safetensors").exists()
    assert same(train(RECIPE, tmp_path, log=lambda line: None), whole[1])
    assert adapters(tmp_path) == adapters(whole[0]) and not (tmp_path / "adapter.part").exists()


DAMAGE = {"adapter_model.safetensors": "half", "optimizer.pt": "half", "scheduler.pt": "empty", "trainer_state.json": "half",
          "rng_state.pth": "gone"}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_checkpoint_is_passed_over(whole, tmp_path, name):
    shutil.copytree(whole[0] / "checkpoints", tmp_path / "checkpoints")
    newest, lines = last_checkpoint(tmp_path), []
    data = (newest / name).read_bytes()
    (newest / name).write_bytes(b"" if DAMAGE[name] == "empty" else data[:len(data) // 2])
    if DAMAGE[name] == "gone": (newest / name).unlink()
    assert last_checkpoint(tmp_path, lines.append) not in (None, newest)
    why = "is missing" if DAMAGE[name] == "gone" else "cannot be read"
    assert len(lines) == 1 and lines[0].startswith(f"warning: {newest.name} is passed over: {name} {why}")


def test_one_flipped_bit_in_a_checkpoint_is_noticed(whole, tmp_path):
    shutil.copytree(whole[0] / "checkpoints", tmp_path / "checkpoints")
    newest = last_checkpoint(tmp_path)
    data = bytearray((newest / "optimizer.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (newest / "optimizer.pt").write_bytes(data)
    assert last_checkpoint(tmp_path) not in (None, newest)


def test_a_damaged_checkpoint_costs_only_its_steps(whole, tmp_path):
    """All but the newest are whole: training goes on from the one before, says so, and ends as if nothing had been."""
    with pytest.raises(Stop): train(RECIPE, tmp_path, log=stop_at(10))
    (tmp_path / "checkpoints/checkpoint-8/optimizer.pt").write_bytes(b"PK")
    (tmp_path / "checkpoints/checkpoint-99x").mkdir()
    lines = []
    history = train(RECIPE, tmp_path, log=lines.append)
    assert history["summary"]["resumed_from"] == 4 and same(history, whole[1]) and adapters(tmp_path) == adapters(whole[0])
    assert [l for l in lines if "passed over" in l] == [
        "warning: checkpoint-8 is passed over: optimizer.pt cannot be read (BadZipFile)"]


def test_no_whole_checkpoint_starts_anew(whole, tmp_path):
    with pytest.raises(Stop): train(RECIPE, tmp_path, log=stop_at(6))
    shutil.rmtree(tmp_path / "checkpoints/checkpoint-4")
    (tmp_path / "checkpoints/checkpoint-4").mkdir()
    history = train(RECIPE, tmp_path, log=lambda line: None)
    assert history["summary"]["resumed_from"] is None and same(history, whole[1])


def test_the_best_checkpoint_is_lost(tmp_path):
    with pytest.raises(Stop): train_rising(RECIPE, tmp_path, log=stop_at(10))
    shutil.rmtree(tmp_path / "checkpoints/checkpoint-4")
    lines = []
    again = train_rising(RECIPE, tmp_path, log=lines.append)
    assert "warning: checkpoint-4, the best so far, is missing or damaged: the best is now that of step 8" in lines
    losses = {r["step"]: r["eval_loss"] for r in again["validation"] if r["step"] > 4}
    assert again["summary"]["best_validation_loss"] == min(losses.values())        # of the weights that are there
    best = tmp_path / f"checkpoints/checkpoint-{min(losses, key=losses.get)}/adapter_model.safetensors"
    saved, kept = load_file(best), load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert all(torch.equal(saved[k], kept[k]) for k in saved)


@pytest.mark.parametrize("until", [10, None], ids=["resumed", "only its adapter is missing"])
def test_a_moved_run_folder_takes_nothing_from_its_old_place(rising, tmp_path, until):
    finished, history = rising
    old, new = tmp_path / "old", tmp_path / "new"
    if until:
        with pytest.raises(Stop): train_rising(RECIPE, old, log=stop_at(until))
    else: train_rising(RECIPE, old, log=lambda line: None)
    shutil.copytree(old, new, ignore=shutil.ignore_patterns("adapter"))
    decoy = old / "checkpoints/checkpoint-4/adapter_model.safetensors"
    save_file({k: torch.zeros_like(v) for k, v in load_file(decoy).items()}, decoy.with_name("new"))
    os.replace(decoy.with_name("new"), decoy)
    assert str(old) in (new / f"checkpoints/checkpoint-{8 if until else 12}/trainer_state.json").read_text()
    assert same(train_rising(RECIPE, new, log=lambda line: None), history) and adapters(new) == adapters(finished)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "pytorch_model.bin", "adapter_model.bin", "optimizer.bin"])
def test_a_pickle_in_a_checkpoint_is_not_run(whole, tmp_path, name):
    with pytest.raises(Stop): train(RECIPE, tmp_path / "run", log=stop_at(10))
    plant(tmp_path / "run/checkpoints/checkpoint-8" / name, tmp_path / "ran")
    lines = []
    history = train(RECIPE, tmp_path / "run", log=lines.append)
    assert not (tmp_path / "ran").exists() and history["summary"]["resumed_from"] == 4 and same(history, whole[1])
    assert [name in l for l in lines if "passed over" in l] == [True]


def test_the_pickle_that_the_trainer_leaves_is_not_read(whole, tmp_path):
    with pytest.raises(Stop): train(RECIPE, tmp_path / "run", log=stop_at(10))
    plant(tmp_path / "run/checkpoints/checkpoint-8/training_args.bin", tmp_path / "ran")
    history = train(RECIPE, tmp_path / "run", log=lambda line: None)
    assert not (tmp_path / "ran").exists() and history["summary"]["resumed_from"] == 8 and same(history, whole[1])


def test_a_checkpoint_of_several_processes_is_whole(whole, tmp_path):
    shutil.copytree(whole[0] / "checkpoints", tmp_path / "checkpoints")
    newest = last_checkpoint(tmp_path)
    shutil.copy(newest / "rng_state.pth", newest / "rng_state_1.pth")
    (newest / "rng_state.pth").rename(newest / "rng_state_0.pth")
    assert last_checkpoint(tmp_path) == newest


FULL = [OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 704 vs 598"),
        RuntimeError("[enforce fail at inline_container.cc:858] . PytorchStreamWriter failed writing file data/1: file write failed"),
        Exception("No space left on device (os error 28)"),     # the tokenizer's
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")]


@pytest.mark.parametrize("error", FULL, ids=str)
@pytest.mark.parametrize("at", ["checkpoint-8", "adapter.part"])
def test_a_full_disk_is_one_line_and_the_last_good_files_are_whole(whole, tmp_path, error, at):
    real, lines = DollyTrainer._save, []

    def save(self, output_dir=None, **kwargs):
        real(self, output_dir, **kwargs)
        if not output_dir.endswith(at): return
        weights = f"{output_dir}/adapter_model.safetensors"
        os.truncate(weights, os.path.getsize(weights) // 2)
        raise error
    with patch.object(DollyTrainer, "_save", save), pytest.raises(DollyError, match="the disk is full: .*; make room") as told:
        train(RECIPE, tmp_path, log=lines.append)
    assert "\n" not in str(told.value) and not (tmp_path / "adapter").exists() and not (tmp_path / "adapter.part").exists()
    history = train(RECIPE, tmp_path, log=lines.append)
    assert history["summary"]["resumed_from"] == (4 if at == "checkpoint-8" else 12)
    assert same(history, whole[1]) and adapters(tmp_path) == adapters(whole[0])


def test_another_error_is_not_called_a_full_disk(tmp_path):
    with patch.object(DollyTrainer, "_save", side_effect=RuntimeError("something else")), pytest.raises(RuntimeError, match="something else"):
        train(RECIPE, tmp_path, log=lambda line: None)


def test_too_little_room_is_told_before_the_first_step(tmp_path):
    little = SimpleNamespace(free=2**20)
    with patch("shutil.disk_usage", return_value=little), pytest.raises(DollyError, match="only 1 MiB free .* make room"):
        train(RECIPE, tmp_path, log=lambda line: None)


def test_a_second_process_does_not_train_in_the_same_folder(tmp_path):
    with hold_run(tmp_path):
        env = {k: v for k, v in os.environ.items() if k != "DOLLY_LORA_HOLDS"}
        done = subprocess.run([sys.executable, "-c", TRAIN, str(tmp_path)], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode and f"is in use by process {os.getpid()} on " in done.stderr and not (tmp_path / "checkpoints").exists()


def test_peak_memory_in_bytes_on_every_system(monkeypatch):
    usage = SimpleNamespace(ru_maxrss=3 * 2**20)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "resource", SimpleNamespace(getrusage=lambda who: usage, RUSAGE_SELF=0))
    for platform, unit in ("linux", 1024), ("darwin", 1):
        monkeypatch.setattr(sys, "platform", platform)
        assert trainer_module._peak_memory() == usage.ru_maxrss * unit
    monkeypatch.setitem(sys.modules, "resource", None)     # as on Windows: it cannot be imported
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=12345))
    monkeypatch.setattr("psutil.Process", lambda: process)
    assert trainer_module._peak_memory() == 12345


def test_no_module_of_ours_imports_resource_when_it_is_loaded():
    import ast
    for file in (ROOT / "dolly_lora").glob("*.py"):
        top = [n for n in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(n, ast.Import)]
        assert "resource" not in [a.name for n in top for a in n.names], file.name


def test_one_card_is_used_where_two_are_visible(tmp_path):
    """Also by what `bench` makes of the arguments; two cards would wrap the model into DataParallel."""
    args = training_arguments(RECIPE, tmp_path, resuming=False)
    for a in args, replace(args, eval_strategy="no", save_strategy="no", load_best_model_at_end=False):
        a._n_gpu = 2                          # as the library counts them
        assert a.n_gpu == 1 and a.train_batch_size == RECIPE.batch_size


def test_the_card_holds_whatever_the_data_are_called(whole):
    import yaml
    odd = 'a: "b"\n---\n# <img src=x onerror=alert(1)> [x](javascript:y) $z$'
    card = model_card(replace(RECIPE, base=odd, dataset=odd), whole[1])
    front, body = card.removeprefix("---\n").split("\n---\n", 1)
    assert yaml.safe_load(front) == dict(base_model=odd, library_name="peft")
    assert "<img" not in body and "](javascript" not in body and "\n---" not in body and body.count("\n# ") == 1


def test_out_of_memory_shortens_the_rows(whole, tmp_path):
    real, lines = FusedLlama.step, []

    def step(self, row, *args):
        if len(row.input_ids) > 600: raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, row, *args)
    with patch.object(FusedLlama, "step", step):
        history = train(replace(RECIPE, max_steps=2), tmp_path, log=lines.append)
    assert history["summary"]["token_budget"] == 512 and history["summary"]["steps"] == 2
    assert [l for l in lines if "out of memory" in l] == ["out of memory: again from the last checkpoint, activations are computed again; still 16 examples a step", "out of memory: again from the last checkpoint, rows are cut to 1/2; still 16 examples a step"]
    with patch.object(FusedLlama, "step", side_effect=torch.OutOfMemoryError), pytest.raises(DollyError, match="out of GPU memory with rows of one example"):
        train(replace(RECIPE, max_steps=2), tmp_path / "never", log=lines.append)


def test_validation_loss_is_weighted_by_tokens(whole):
    from dolly_lora.data import prepare_data
    from dolly_lora.evaluate import mean_loss, token_losses
    from dolly_lora.models import load_tokenizer, load_tuned
    model, tokenizer = load_tuned(RECIPE, whole[0]), load_tokenizer(RECIPE)
    loss = mean_loss(token_losses(model, tokenizer, prepare_data(RECIPE, whole[0])["val"], RECIPE))["loss"]
    assert loss == pytest.approx(whole[1]["summary"]["best_validation_loss"], abs=2e-5)


def test_adapter_loads_with_plain_peft(whole):
    from peft import PeftModel
    from dolly_lora.models import device, load_tuned, tiny_model
    x = torch.arange(3, 40, device=device())[None]
    plain = PeftModel.from_pretrained(tiny_model().to(device()), whole[0] / "adapter").eval()
    torch.testing.assert_close(plain(x).logits, load_tuned(RECIPE, whole[0])(x).logits, rtol=1e-5, atol=1e-6)
    with plain.disable_adapter():
        assert torch.equal(plain(x).logits, tiny_model().to(device()).eval()(x).logits)
