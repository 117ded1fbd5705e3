"""Every architecture of the fast way trains and answers as transformers and PEFT do; any other
goes the plain way, and the log says so.

The weights are random, those of norms and biases too: a forgotten one is seen.
"""
import copy
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from transformers import (
    AutoModelForCausalLM, Gemma2Config, GraniteConfig, LlamaConfig, MistralConfig, Qwen2Config)

from dolly_lora.config import PRESETS
from dolly_lora.data import build_prompt
from dolly_lora.engine.blocks import is_covered, is_decodable, is_fusable
from dolly_lora.engine.kernels import Dropout
from dolly_lora.engine.memory import MemoryPlan
from dolly_lora.engine.packing import PackedModel, pack
from dolly_lora.engine.step import FusedLlama, make_engine
from dolly_lora.generate import generate
from dolly_lora.models import load_tokenizer
from toys import SHAPE, TINY, adapted, gradients, plain_engine, some

# 64 features and four heads: heads of 32 are wider than 64 / 4. With these numbers some wavelengths
# of the rotation stay as they are under Llama 3's scaling, some are stretched, some lie between.
GROUPED = SHAPE | dict(num_hidden_layers=3, num_key_value_heads=2)
ROPE = dict(rope_theta=10_000.0, factor=8.0, original_max_position_embeddings=64)
LLAMA3 = ROPE | dict(rope_type="llama3", low_freq_factor=1.0, high_freq_factor=4.0)
TOKENIZER = load_tokenizer(PRESETS["tiny"])
PROMPTS = [build_prompt(f"Count to {n}." + " Slowly." * n) for n in range(8)]
SHAPES = {
    "llama": LlamaConfig(**GROUPED),
    "llama, one key head, tied": LlamaConfig(**GROUPED | dict(
        num_key_value_heads=1, tie_word_embeddings=True)),
    "llama, no groups, wide heads": LlamaConfig(**GROUPED | dict(
        num_key_value_heads=4, head_dim=32)),
    "llama 3's rope": LlamaConfig(**GROUPED, rope_parameters=LLAMA3),
    "linear rope": LlamaConfig(**GROUPED, rope_parameters=ROPE | dict(rope_type="linear")),
    "yarn": LlamaConfig(**GROUPED, rope_parameters=ROPE | dict(rope_type="yarn")),
    "mistral": MistralConfig(**GROUPED, head_dim=32, sliding_window=None),
    "mistral within its window": MistralConfig(**GROUPED, sliding_window=256),
    "qwen2": Qwen2Config(**GROUPED),
    "qwen2, tied, its rope stretched": Qwen2Config(
        **GROUPED, tie_word_embeddings=True, rope_parameters=ROPE | dict(rope_type="yarn")),
    "biases everywhere": LlamaConfig(**GROUPED, attention_bias=True, mlp_bias=True),
}


def made(config):
    """A model of random weights, which no norm or bias leaves as they begin."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, mean=float("norm" in name), std=0.3 if p.ndim == 1 else 0.2)
    return model


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
@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_is_that_of_peft(shape, rank, dropout, recompute):
    recipe = replace(TINY, lora_r=rank, lora_dropout=dropout)
    models = [adapted(made(SHAPES[shape]), recipe) for _ in range(2)]
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
@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_answers_are_those_of_transformers(shape, with_adapters):
    model = made(SHAPES[shape])
    if with_adapters:
        model = adapted(model)
    assert is_decodable(model, 256)
    ours = generate(model, TOKENIZER, PROMPTS, 24, batch_size=3)
    with patch("dolly_lora.generate.is_decodable", return_value=False):
        assert ours == generate(model, TOKENIZER, PROMPTS, 24)
    assert len({a.text for a in ours}) > 3


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
    model = adapted(made(PLAIN_WAY[what]))
    assert not (is_covered(model, 256) or is_fusable(model, 256) or is_decodable(model, 256))
    engine = make_engine(model, TINY)
    assert isinstance(engine, PackedModel)
    assert engine.loss(pack(some(3)), 10.0, gradient=True) > 0
