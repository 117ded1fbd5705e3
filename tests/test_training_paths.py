"""Whole trainings: every path learns the same, and on a card it is exact when resumed."""
import shutil
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

from dolly_lora.config import PRESETS
from dolly_lora.engine.memory import MemoryPlan
from dolly_lora.engine.packing import pack
from dolly_lora.engine.step import FusedLlama
from dolly_lora.models import load_base
from dolly_lora.train import train
from dolly_lora.trainer import last_checkpoint
from toys import TINY, curve, needs_gpu, quiet, save_small_llama, some

WEIGHTS = "adapter/adapter_model.safetensors"


def test_training_takes_the_plain_path_for_what_is_no_llama_and_learns_the_same(tmp_path):
    fast = train(TINY, tmp_path / "fast", log=quiet)
    with patch("dolly_lora.engine.step.is_fusable", return_value=False):
        plain = train(TINY, tmp_path / "plain", log=quiet)
    assert fast["summary"]["engine"] == "FusedLlama"
    assert plain["summary"]["engine"] == "PackedModel"
    assert curve(fast) == pytest.approx(curve(plain), abs=2e-5)


def test_frugal_learns_the_same(tmp_path):
    speed, frugal = (train(replace(PRESETS["tiny"], memory=m), tmp_path / m, log=quiet)
                     for m in ("speed", "frugal"))
    assert "again" in frugal["summary"]["memory"] and "again" not in speed["summary"]["memory"]
    assert curve(speed) == curve(frugal)    # dropout included


def test_a_cpu_takes_the_exact_optimizer(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    runs = [train(replace(TINY, optimizer=o, max_steps=2, eval_steps=2), tmp_path / o, log=quiet)
            for o in ("paged_adamw_8bit", "adamw_torch_fused")]
    assert [r["summary"]["optimizer"] for r in runs] == ["adamw_torch"] * 2
    assert curve(runs[0]) == curve(runs[1])


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return save_small_llama(tmp_path_factory.mktemp("small") / "base")


@needs_gpu
@pytest.mark.parametrize("memory", ["speed", "frugal"])
def test_gpu_resumed_run_is_exact_and_graphs_are_used(small, tmp_path, memory):
    recipe = replace(small, memory=memory)
    whole = train(recipe, tmp_path / "whole", log=quiet)
    assert whole["summary"]["graphs"] > 0
    folder = tmp_path / "resumed"
    shutil.copytree(tmp_path / "whole", folder)
    (folder / "training_history.json").unlink()
    shutil.rmtree(folder / "adapter")
    shutil.rmtree(folder / "checkpoints" / "checkpoint-12")
    resumed = train(recipe, folder, log=quiet)
    assert resumed["summary"]["resumed_from"] in (4, 8) and curve(resumed) == curve(whole)
    assert (folder / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()


def interrupted(line):
    if line.startswith("step     6/"):
        raise KeyboardInterrupt


@needs_gpu
@pytest.mark.parametrize("optimizer", ["adamw_torch_fused", "paged_adamw_8bit"])
def test_gpu_paged_adamw_8bit_learns_as_the_exact_one_and_resumes(small, tmp_path, optimizer):
    """The assignment's optimizer, one setting away: on the flat parameter, in replayed steps,
    from a checkpoint.

    Its two moments are rounded to 8 bits in blocks of 256, so an update is a few per cent off,
    without a direction. These 12 steps change the loss by 5 %; on an H200 the two curves were
    within 0.005 % of it. The tolerance is 0.1 %.
    """
    eight_bit = "8bit" in optimizer
    recipe = replace(small, memory="speed", optimizer=optimizer)
    whole = train(recipe, tmp_path / "whole", log=quiet)
    s = whole["summary"]
    assert s["optimizer"] == optimizer and s["engine"] == "FusedLlama" and s["graphs"] > 0
    assert s["best_validation_loss"] < s["first_validation_loss"]

    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "killed", log=interrupted)
    saved = tmp_path / "killed/checkpoints/checkpoint-4/optimizer.pt"
    state = torch.load(saved, weights_only=True)["state"]
    moments = state[0].get("__bnb_optimizer_quant_state__", state[0])
    tensors = [v for v in moments.values() if isinstance(v, torch.Tensor)]
    assert len(state) == 1
    assert sum(v.dtype == torch.uint8 for v in tensors) == (2 if eight_bit else 0)
    resumed = train(recipe, tmp_path / "killed", log=quiet)
    assert resumed["summary"]["resumed_from"] == 4 and curve(resumed) == curve(whole)
    killed = (tmp_path / "killed" / WEIGHTS).read_bytes()
    assert killed == (tmp_path / "whole" / WEIGHTS).read_bytes()
    if eight_bit:
        exact_recipe = replace(recipe, optimizer="adamw_torch_fused")
        exact = train(exact_recipe, tmp_path / "exact", log=quiet)
        assert curve(whole) != curve(exact)
        assert curve(whole) == pytest.approx(curve(exact), rel=0.001)


@needs_gpu
def test_gpu_adapter_is_a_plain_peft_adapter(small, tmp_path):
    from peft import PeftModel
    train(small, tmp_path, log=quiet)
    batch = pack(some(4))
    model = PeftModel.from_pretrained(load_base(small), tmp_path / "adapter", is_trainable=True)
    for p in model.parameters():
        p.data = p.data.float() if p.requires_grad else p.data
    fast = FusedLlama(model, MemoryPlan(True, False, 8192)).logits(batch).float()
    alone = PeftModel.from_pretrained(load_base(small), tmp_path / "adapter").eval()
    ids = [torch.tensor([e["input_ids"]], device="cuda") for e in some(4)]
    with torch.inference_mode():
        plain = torch.cat([alone(input_ids=i).logits[0] for i in ids]).float()
    assert (fast - plain).norm() / plain.norm() < 0.01
    assert last_checkpoint(tmp_path)
