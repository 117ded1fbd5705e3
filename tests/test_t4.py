"""The way of a free T4 (no bf16), on a machine without one: a card of compute capability 7.5 is pretended where choices are made, fp16 is real."""
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from dolly_lora import models
from dolly_lora.engine import kernels, packing
from dolly_lora.conversation import Chat
from dolly_lora.config import PRESETS
from dolly_lora.data import build_prompt
from dolly_lora.generate import generate
from dolly_lora.models import add_lora, compute_dtype, load_tokenizer, load_tuned, quantization_config, tiny_model
from dolly_lora.engine.memory import plan_memory
from dolly_lora.train import train

T4, TINY = PRESETS["llama2-t4"], PRESETS["tiny"]


@pytest.fixture
def half(monkeypatch):
    """fp16 is what the machine computes in, and what its models are loaded in."""
    monkeypatch.setattr("dolly_lora.models.tiny_model", lambda: tiny_model().to(models.compute_dtype()))
    for module in "models", "train": monkeypatch.setattr(f"dolly_lora.{module}.compute_dtype", lambda: torch.float16)


def test_what_a_t4_chooses():
    with patch("torch.cuda.is_available", return_value=True), patch("torch.cuda.get_device_capability", return_value=(7, 5)):
        assert compute_dtype() == torch.float16 and quantization_config().bnb_4bit_compute_dtype == torch.float16
        assert not packing.has_varlen("cuda", torch.float16) and kernels.operations(torch.device("cuda")) is kernels.PLAIN
    with torch.device("meta"): llama = add_lora(LlamaForCausalLM(LlamaConfig()).half(), T4)
    plan = plan_memory(llama, T4, free=5 * 2**30)   # 15 GiB, 4 of them weights, half of the rest for the formulas
    assert plan.recompute and not plan.keep_weights and plan.token_budget == 2048
    assert T4.max_length == 512 and T4.batch_size == PRESETS["llama2"].batch_size == 16


def test_a_whole_run_in_fp16(half, tmp_path):
    """Training with a scaled loss and float32 adapters, the saved adapter, answers and the chat: near float32, nothing overflows."""
    recipe = replace(TINY, memory="frugal", lora_dropout=0.0)
    run = train(recipe, tmp_path / "half", log=lambda line: None)
    with patch("dolly_lora.models.compute_dtype", return_value=torch.float32), patch("dolly_lora.trainer.compute_dtype", return_value=torch.float32):
        full = train(recipe, tmp_path / "full", log=lambda line: None)
    assert [v["eval_loss"] for v in run["validation"]] == pytest.approx([v["eval_loss"] for v in full["validation"]], abs=5e-3)
    assert run["validation"][-1]["eval_loss"] < run["validation"][0]["eval_loss"]
    adapter = load_file(tmp_path / "half" / "adapter" / "adapter_model.safetensors")
    assert {t.dtype for t in adapter.values()} == {torch.float32} and all(t.isfinite().all() for t in adapter.values())

    model, tokenizer = load_tuned(recipe, tmp_path / "half"), load_tokenizer(recipe)
    assert model.dtype == torch.float16
    prompts = [build_prompt(q) for q in ("Name a colour.", "Count to ten.", "Why is the sky blue? " * 8)]
    ours = generate(model, tokenizer, prompts, 16, batch_size=2, temperature=[0.0, 0.8, 0.0])
    with patch("dolly_lora.generate.is_llama", return_value=False):
        theirs = generate(model, tokenizer, prompts, 16, batch_size=2, temperature=[0.0, 0.8, 0.0])
    assert all(a.n_tokens for a in ours) and ours[0].text[:8] == theirs[0].text[:8]   # half precision: a tie may fall otherwise later
    chat = Chat(model, tokenizer, max_new_tokens=8)
    for _ in chat.compare("Name a colour."): pass
    assert chat.last.ids and chat.last.beside.ids
