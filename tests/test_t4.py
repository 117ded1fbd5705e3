"""The way of a free T4 (no bf16), on a machine without one: a card of compute capability 7.5 is
pretended where choices are made, fp16 is real."""
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from dolly_lora import models
from dolly_lora.config import PRESETS
from dolly_lora.conversation import Chat
from dolly_lora.data import build_prompt
from dolly_lora.engine import kernels, packing
from dolly_lora.engine.memory import plan_memory
from dolly_lora.generate import generate
from dolly_lora.models import (
    add_lora, compute_dtype, load_tokenizer, load_tuned, quantization_config, tiny_model)
from dolly_lora.train import train

T4, TINY = PRESETS["llama2-t4"], PRESETS["tiny"]
FRUGAL = replace(TINY, memory="frugal", lora_dropout=0.0)


def quiet(line):
    """A log that nobody reads."""


@pytest.fixture
def half(monkeypatch):
    """fp16 is what the machine computes in, and what its models are loaded in."""
    tiny_in_half = lambda: tiny_model().to(models.compute_dtype())
    monkeypatch.setattr("dolly_lora.models.tiny_model", tiny_in_half)
    for module in "models", "trainer":
        monkeypatch.setattr(f"dolly_lora.{module}.compute_dtype", lambda: torch.float16)


def test_what_a_t4_chooses():
    with patch("torch.cuda.is_available", return_value=True), \
         patch("torch.cuda.get_device_capability", return_value=(7, 5)):
        assert compute_dtype() == torch.float16
        assert quantization_config().bnb_4bit_compute_dtype == torch.float16
        assert not packing.has_varlen("cuda", torch.float16)
        assert kernels.operations(torch.device("cuda")) is kernels.PLAIN


def test_what_a_t4_plans():
    with torch.device("meta"):
        llama = add_lora(LlamaForCausalLM(LlamaConfig()).half(), T4)
    # 15 GiB, 4 of them weights, half of the rest for the formulas
    plan = plan_memory(llama, T4, free=5 * 2**30)
    assert plan.recompute and not plan.keep_weights and plan.token_budget == 2048
    assert T4.max_length == 512 and T4.batch_size == PRESETS["llama2"].batch_size == 16


def losses(run):
    return [v["eval_loss"] for v in run["validation"]]


@pytest.fixture
def trained_in_half(half, tmp_path):
    """A run in fp16, and its folder."""
    return train(FRUGAL, tmp_path / "half", log=quiet), tmp_path / "half"


def test_training_in_fp16_is_near_float32_and_nothing_overflows(trained_in_half, tmp_path):
    """With a scaled loss and float32 adapters."""
    run, folder = trained_in_half
    with patch("dolly_lora.models.compute_dtype", return_value=torch.float32), \
         patch("dolly_lora.trainer.compute_dtype", return_value=torch.float32):
        full = train(FRUGAL, tmp_path / "full", log=quiet)
    assert losses(run) == pytest.approx(losses(full), abs=5e-3)
    assert losses(run)[-1] < losses(run)[0]
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert {t.dtype for t in adapter.values()} == {torch.float32}
    assert all(t.isfinite().all() for t in adapter.values())


def test_answers_and_chat_in_fp16(trained_in_half):
    model, tokenizer = load_tuned(FRUGAL, trained_in_half[1]), load_tokenizer(FRUGAL)
    assert model.dtype == torch.float16
    questions = "Name a colour.", "Count to ten.", "Why is the sky blue? " * 8
    prompts = [build_prompt(q) for q in questions]
    how = dict(max_new_tokens=16, batch_size=2, temperature=[0.0, 0.8, 0.0])
    ours = generate(model, tokenizer, prompts, **how)
    with patch("dolly_lora.generate.is_decodable", return_value=False):
        theirs = generate(model, tokenizer, prompts, **how)
    assert all(a.n_tokens for a in ours)
    # half precision: a tie may fall otherwise later
    assert ours[0].text[:8] == theirs[0].text[:8]
    chat = Chat(model, tokenizer, max_new_tokens=8)
    for _ in chat.compare("Name a colour."):
        pass
    assert chat.last.ids and chat.last.beside.ids
