"""Every architecture of the fast way trains and answers as transformers and PEFT do; any other
goes the plain way, and the log says so.

The weights are random, those of norms and biases too: a forgotten one is seen.
"""
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from transformers import Gemma2Config, GraniteConfig, LlamaConfig, MistralConfig

from dolly_lora.config import PRESETS
from dolly_lora.data import build_prompt
from dolly_lora.engine.blocks import is_covered, is_decodable, is_fusable
from dolly_lora.engine.kernels import Dropout
from dolly_lora.engine.memory import MemoryPlan, plan_memory
from dolly_lora.engine.packing import PackedModel, pack
from dolly_lora.engine.step import FusedLlama, make_engine
from dolly_lora.generate import generate
from dolly_lora.models import load_tokenizer
from toys import (
    COVERED, GROUPED, ROPE, TINY, adapted, gradients, plain_engine, random_model, some)

TOKENIZER = load_tokenizer(PRESETS["tiny"])
PROMPTS = [build_prompt(f"Count to {n}." + " Slowly." * n) for n in range(8)]


def drop_alike(model, seed, batch):
    """Let PEFT's layers drop what the engine drops in a step of this seed."""
    class Alike(torch.nn.Module):
        def __init__(self, number, p):
            super().__init__()
            self.p, self.drop = p, Dropout(torch.tensor(seed), number, 1, p, batch)

        def forward(self, x):
            return self.drop(x[0], 0)[None]

    layers = [m for m in model.modules() if hasattr(m, "lora_A")]
    for number, layer in enumerate(layers):
        layer.lora_dropout["default"] = Alike(number, layer.lora_dropout["default"].p)


def assert_same_gradients(model, ours, theirs):
    """Each adapter's gradient by itself, beside its own size."""
    names, sizes = zip(*[(n, p.numel()) for n, p in model.named_parameters() if p.requires_grad])
    assert len(names) == 2 * 7 * model.config.num_hidden_layers
    for name, a, b in zip(names, ours.split(sizes), theirs.split(sizes)):
        assert b.norm() > 1e-4, name
        assert (a - b).norm() < 1e-4 * b.norm(), name


@pytest.mark.parametrize("rank, dropout, recompute", [
    (4, 0.0, False), (20, 0.0, True), (16, 0.3, False), (4, 0.3, True)])
@pytest.mark.parametrize("shape", COVERED)
def test_a_step_is_that_of_peft(shape, rank, dropout, recompute):
    recipe = replace(TINY, lora_r=rank, lora_dropout=dropout)
    models = [adapted(random_model(COVERED[shape]), recipe) for _ in range(2)]
    fast = FusedLlama(models[0], MemoryPlan(True, recompute, 1024, longest=256))
    plain = plain_engine(models[1])
    batch, seed = pack(some()), 3 if dropout else None
    torch.testing.assert_close(fast.logits(batch), plain.logits(batch), rtol=1e-4, atol=1e-4)
    if dropout:
        drop_alike(models[1], seed, batch)
    losses = [engine.loss(batch, 10, seed, gradient=True) for engine in (fast, plain)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    assert_same_gradients(models[1], gradients(fast, models[0]), gradients(plain, models[1]))


@pytest.mark.parametrize("with_adapters", [True, False])
@pytest.mark.parametrize("shape", COVERED)
def test_greedy_answers_are_those_of_transformers(shape, with_adapters):
    model = random_model(COVERED[shape])
    if with_adapters:
        model = adapted(model)
    assert is_decodable(model, 256)
    ours = generate(model, TOKENIZER, PROMPTS, 24, batch_size=3)
    with patch("dolly_lora.generate.is_decodable", return_value=False):
        assert ours == generate(model, TOKENIZER, PROMPTS, 24)
    assert len({a.text for a in ours}) > 3


def test_what_a_norm_of_the_heads_keeps_is_planned_for():
    """Llama's block and Qwen3's of the same shape: what the norm read is kept besides."""
    budgets = []
    for shape in LlamaConfig(**GROUPED, head_dim=32), COVERED["qwen3"]:
        model = adapted(random_model(shape))
        plan = plan_memory(model, replace(TINY, max_length=64), free=2**30 + 2**27)
        budgets.append(plan.token_budget)
    llama, logits = 4 * 64 + 2 * 128 + 2 * 64 + 3 * 96, 2 * 512
    bytes_of_a_token = [4 * (3 * saved + logits) for saved in (llama, llama + 128 + 64)]
    expected = bytes_of_a_token[1] / bytes_of_a_token[0]
    assert budgets[0] / budgets[1] == pytest.approx(expected, rel=1e-3)


# ---- what goes the plain way


PLAIN_WAY = {
    "a window shorter than the text": MistralConfig(**GROUPED, sliding_window=255),
    "norms of another kind": Gemma2Config(**GROUPED, head_dim=16, attn_logit_softcapping=None),
    "factors on everything": GraniteConfig(**GROUPED),
    "angles that depend on the length": LlamaConfig(
        **GROUPED, rope_parameters=ROPE | dict(rope_type="dynamic")),
}


@pytest.mark.parametrize("what", PLAIN_WAY)
def test_anything_else_goes_the_plain_way(what):
    model = adapted(random_model(PLAIN_WAY[what]))
    assert not (is_covered(model, 256) or is_fusable(model, 256) or is_decodable(model, 256))
    engine = make_engine(model, TINY)
    assert isinstance(engine, PackedModel)
    assert engine.loss(pack(some(3)), 10.0, gradient=True) > 0
