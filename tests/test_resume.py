"""A run that is killed after a checkpoint ends with the history of one left alone; damaged checkpoints are passed over; memory runs out."""
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
from dolly_lora.config import PRESETS, DollyError
from dolly_lora.step import FusedLlama
from dolly_lora.train import last_checkpoint, train

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


def test_damaged_checkpoint_is_passed_over(whole, tmp_path):
    for damage in ("adapter_model.safetensors", "optimizer.pt", "trainer_state.json", "rng_state.pth"):
        folder = tmp_path / damage
        shutil.copytree(whole[0] / "checkpoints", folder / "checkpoints")
        newest = last_checkpoint(folder)
        data = (newest / damage).read_bytes()
        (newest / damage).write_bytes(data[:len(data) // 2])
        assert last_checkpoint(folder) not in (None, newest), damage


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
    from dolly_lora.models import load_tuned, tiny_model
    x = torch.arange(3, 40)[None]
    plain = PeftModel.from_pretrained(tiny_model(), whole[0] / "adapter").eval()
    torch.testing.assert_close(plain(x).logits, load_tuned(RECIPE, whole[0])(x).logits, rtol=1e-5, atol=1e-6)
    with plain.disable_adapter():
        assert torch.equal(plain(x).logits, tiny_model().eval()(x).logits)
