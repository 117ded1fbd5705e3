"""What a training run computes, says and leaves."""
import ast
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

from conftest import ROOT
from dolly_lora.config import DollyError
from dolly_lora.engine.step import FusedLlama
from dolly_lora.hardware import peak_memory
from dolly_lora.train import train
from dolly_lora.trainer import model_card, training_arguments
from training import RECIPE, quiet


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, train(RECIPE, folder, log=quiet)


def test_the_best_checkpoint_is_the_one_that_is_kept(whole):
    summary = whole[1]["summary"]
    losses = {row["step"]: row["eval_loss"] for row in whole[1]["validation"] if row["step"]}
    assert summary["best_validation_loss"] == losses[summary["best_step"]] == min(losses.values())
    assert max(losses) == summary["steps"] == 12


def test_the_summary_names_the_optimizer_that_ran(whole):
    on_gpu = torch.cuda.is_available()
    assert whole[1]["summary"]["optimizer"] == ("adamw_torch_fused" if on_gpu else "adamw_torch")


def test_validation_loss_is_weighted_by_tokens(whole):
    from dolly_lora.data import prepare_data
    from dolly_lora.evaluate import mean_loss, token_losses
    from dolly_lora.models import load_tokenizer, load_tuned
    model, tokenizer = load_tuned(RECIPE, whole[0]), load_tokenizer(RECIPE)
    records = prepare_data(RECIPE, whole[0])["val"]
    loss = mean_loss(token_losses(model, tokenizer, records, RECIPE))["loss"]
    assert loss == pytest.approx(whole[1]["summary"]["best_validation_loss"], abs=2e-5)


def test_adapter_loads_with_plain_peft(whole):
    from peft import PeftModel
    from dolly_lora.models import device, load_tuned, tiny_model
    x = torch.arange(3, 40, device=device())[None]
    plain = PeftModel.from_pretrained(tiny_model().to(device()), whole[0] / "adapter").eval()
    ours = load_tuned(RECIPE, whole[0])
    torch.testing.assert_close(plain(x).logits, ours(x).logits, rtol=1e-5, atol=1e-6)
    with plain.disable_adapter():
        assert torch.equal(plain(x).logits, tiny_model().to(device()).eval()(x).logits)


def test_out_of_memory_shortens_the_rows(tmp_path):
    real, lines = FusedLlama.step, []

    def step(self, row, *args):
        if len(row.input_ids) > 600:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, row, *args)

    with patch.object(FusedLlama, "step", step):
        history = train(replace(RECIPE, max_steps=2), tmp_path, log=lines.append)
    assert history["summary"]["token_budget"] == 512 and history["summary"]["steps"] == 2
    again = "out of memory: again from the last checkpoint, "
    assert [line for line in lines if "out of memory" in line] == [
        again + "activations are computed again; still 16 examples a step",
        again + "rows are cut to 1/2; still 16 examples a step"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="wants the formulas and a CPU's plan")
def test_a_training_in_fp8_keeps_its_weights_when_memory_runs_out(tmp_path):
    real, lines = FusedLlama.step, []

    def step(self, row, *args):
        if len(row.input_ids) > 600:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, row, *args)

    with patch.object(FusedLlama, "step", step), \
         patch("dolly_lora.engine.step.multiplies_fp8", return_value=True):
        history = train(replace(RECIPE, precision="fp8", max_steps=2), tmp_path, log=lines.append)
    summary = history["summary"]
    assert summary["memory"].startswith("speed: activations are kept, weights in FP8")
    assert summary["token_budget"] == 512 and summary["steps"] == 2
    assert [line for line in lines if "out of memory" in line] == [
        "out of memory: again from the last checkpoint, rows are cut to 1/2; "
        "still 16 examples a step"]


def test_out_of_memory_for_good_is_one_line(tmp_path):
    with patch.object(FusedLlama, "step", side_effect=torch.OutOfMemoryError):
        with pytest.raises(DollyError, match="out of GPU memory with rows of one example"):
            train(replace(RECIPE, max_steps=2), tmp_path, log=quiet)


def test_one_card_is_used_where_two_are_visible(tmp_path):
    """Also by what `bench` makes of the arguments; two cards would be DataParallel."""
    args = training_arguments(RECIPE, tmp_path, resuming=False)
    of_bench = replace(args, eval_strategy="no", save_strategy="no", load_best_model_at_end=False)
    for a in args, of_bench:
        a._n_gpu = 2                          # as the library counts them
        assert a.n_gpu == 1 and a.train_batch_size == RECIPE.batch_size


def test_the_card_holds_whatever_the_data_are_called(whole):
    import yaml
    odd = 'a: "b"\n---\n# <img src=x onerror=alert(1)> [x](javascript:y) $z$'
    card = model_card(replace(RECIPE, base=odd, dataset=odd), whole[1])
    front, body = card.removeprefix("---\n").split("\n---\n", 1)
    assert yaml.safe_load(front) == dict(base_model=odd, library_name="peft")
    assert "<img" not in body and "](javascript" not in body
    assert "\n---" not in body and body.count("\n# ") == 1


def test_peak_memory_in_bytes_on_every_system(monkeypatch):
    usage = SimpleNamespace(ru_maxrss=3 * 2**20)
    resource = SimpleNamespace(getrusage=lambda who: usage, RUSAGE_SELF=0)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "resource", resource)
    for platform, unit in ("linux", 1024), ("darwin", 1):
        monkeypatch.setattr(sys, "platform", platform)
        assert peak_memory() == usage.ru_maxrss * unit
    monkeypatch.setitem(sys.modules, "resource", None)     # as on Windows: it cannot be imported
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=12345))
    monkeypatch.setattr("psutil.Process", lambda: process)
    assert peak_memory() == 12345


def test_no_module_of_ours_imports_resource_when_it_is_loaded():
    for file in (ROOT / "dolly_lora").rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        imports = [node for node in tree.body if isinstance(node, ast.Import)]
        assert "resource" not in [name.name for node in imports for name in node.names], file.name


def test_tensorboard_gets_the_losses_of_the_history(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    history = train(replace(RECIPE, report_to="tensorboard"), tmp_path, log=quiet)
    written = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for rows, tag, name in ((history["log"], "train/loss", "loss"),
                            (history["validation"], "eval/loss", "eval_loss")):
        found = {event.step: event.value for event in written.Scalars(tag)}
        assert found == pytest.approx({row["step"]: row[name] for row in rows}, abs=1e-5)


TRACKED = """
import sys
from dataclasses import replace
from pathlib import Path
from dolly_lora.config import PRESETS
from dolly_lora.train import train
recipe = replace(PRESETS["tiny"], report_to="trackio", max_steps=3)
history = train(recipe, Path(sys.argv[1]), log=lambda line: None)
import json, os, sqlite3
with sqlite3.connect(Path(os.environ["TRACKIO_DIR"]) / "dolly_lora.db") as kept:
    rows = [json.loads(m) for m, in kept.execute(
        "select metrics from metrics where run_name = ? order by step", [Path(sys.argv[1]).name])]
print([round(row["train/loss"], 4) for row in rows if "train/loss" in row])
print([round(row["loss"], 4) for row in history["log"]])
"""


def test_trackio_keeps_the_losses_on_this_machine(tmp_path):
    env = os.environ | dict(TRACKIO_DIR=str(tmp_path / "trackio"))
    done = subprocess.run([sys.executable, "-c", TRACKED, tmp_path / "run"], env=env,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    tracked, ours = done.stdout.splitlines()[-2:]
    assert tracked == ours and len(ast.literal_eval(ours)) == 3


def test_a_tracker_that_is_not_installed_is_missed_before_anything_starts(tmp_path, call):
    with patch("importlib.util.find_spec", lambda name: None):
        done = call("run", "tiny", "--run-dir", tmp_path / "run", "--set", "report_to=wandb")
    assert done.returncode == 2
    assert "report_to=wandb is not installed: pip install wandb" in done.stderr
    assert not (tmp_path / "run").exists()
