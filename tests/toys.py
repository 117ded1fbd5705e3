"""Small models and examples that the engine's tests share."""
import copy
import json
import random
from dataclasses import replace

import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig, Qwen2Config, Qwen3Config)

from dolly_lora.config import PRESETS
from dolly_lora.engine.blocks import FlatParameters
from dolly_lora.engine.memory import MemoryPlan
from dolly_lora.engine.packing import PackedModel
from dolly_lora.engine.step import FusedLlama
from dolly_lora.hardware import is_ampere
from dolly_lora.models import add_lora, tiny_tokenizer

TINY = replace(PRESETS["tiny"], lora_dropout=0.0)
# one epoch of 146 examples: nine steps of sixteen and one of two, too few for three processes;
# the validation split is no multiple of anything
EPOCH = replace(PRESETS["tiny"], max_steps=0, epochs=1.0, eval_steps=4, logging_steps=1)
SHAPE = dict(vocab_size=512, hidden_size=64, intermediate_size=96, num_attention_heads=4)
# 64 features and four heads: heads of 32 are wider than 64 / 4. With these numbers some wavelengths
# of the rotation stay as they are under Llama 3's scaling, some are stretched, some lie between.
GROUPED = SHAPE | dict(num_hidden_layers=3, num_key_value_heads=2)
ROPE = dict(rope_theta=10_000.0, factor=8.0)
LLAMA3 = ROPE | dict(rope_type="llama3", low_freq_factor=1.0, high_freq_factor=4.0,
                     original_max_position_embeddings=64)
YARN = ROPE | dict(rope_type="yarn", original_max_position_embeddings=64)
COVERED = {  # what the fast way computes
    "llama": LlamaConfig(**GROUPED),
    "llama, one key head, tied": LlamaConfig(**GROUPED | dict(
        num_key_value_heads=1, tie_word_embeddings=True)),
    "llama, no groups, wide heads": LlamaConfig(**GROUPED | dict(
        num_key_value_heads=4, head_dim=32)),
    "llama 3's rope": LlamaConfig(**GROUPED, rope_parameters=LLAMA3),
    "linear rope": LlamaConfig(**GROUPED, rope_parameters=ROPE | dict(rope_type="linear")),
    "yarn": LlamaConfig(**GROUPED, rope_parameters=YARN, max_position_embeddings=512),
    "mistral": MistralConfig(**GROUPED, head_dim=32, sliding_window=None),
    "mistral within its window": MistralConfig(**GROUPED, sliding_window=256),
    "qwen2": Qwen2Config(**GROUPED),
    "qwen2, tied, its rope stretched": Qwen2Config(
        **GROUPED, tie_word_embeddings=True, rope_parameters=YARN, max_position_embeddings=512),
    "qwen3": Qwen3Config(**GROUPED, head_dim=32),
    "qwen3, tied, every bias it can have": Qwen3Config(
        **GROUPED, head_dim=24, tie_word_embeddings=True, attention_bias=True),
    "biases everywhere": LlamaConfig(**GROUPED, attention_bias=True, mlp_bias=True),
}
needs_gpu = pytest.mark.skipif(not is_ampere(), reason="no GPU of compute capability 8.0")


def some(n=6, longest=150, seed=0):
    """Examples of random tokens and lengths; a third of each is not learnt."""
    random.seed(seed)
    lengths = [random.randrange(2, longest) for _ in range(n)]
    ids = [[random.randrange(3, 500) for _ in range(m)] for m in lengths]
    return [dict(input_ids=i, labels=[-100] * (len(i) // 3) + i[len(i) // 3:]) for i in ids]


def random_model(config):
    """A model of random weights, which no norm or bias leaves as they begin."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, mean=float("norm" in name), std=0.3 if p.ndim == 1 else 0.2)
    return model


def adapted(model, recipe=TINY):
    """With float32 adapters that are not zero."""
    model = add_lora(model, recipe)
    torch.manual_seed(1)
    for n, p in model.named_parameters():
        if p.requires_grad:
            p.data = p.data.float()
            if "lora_B" in n:
                torch.nn.init.normal_(p, std=0.02)
    return model


def plain_engine(model):
    """The engine that leaves the gradients to transformers and PEFT."""
    plan = MemoryPlan(keep_weights=False, recompute=False, token_budget=1024)
    flat = FlatParameters(p for p in model.parameters() if p.requires_grad)
    return PackedModel(model, flat, plan)


def gradients(engine, model):
    """All adapters' gradients in one vector, in the order of the model's parameters."""
    if isinstance(engine, FusedLlama):
        found = dict(zip(map(id, engine.flat.params), engine.flat.grads))
    else:
        found = {id(p): p.grad for p in model.parameters()}
    return torch.cat([found[id(p)].flatten() for p in model.parameters() if p.requires_grad])


def save_small_llama(folder):
    """A small Llama with random weights in a folder, so that it is loaded in NF4 on a GPU."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=512, hidden_size=256, intermediate_size=512,
                         num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
                         bos_token_id=1, eos_token_id=2, pad_token_id=0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return replace(PRESETS["tiny"], base=str(folder), load_in_4bit=True, max_steps=12, eval_steps=4)


def curve(history):
    """Every training and validation loss of a run."""
    validation = [r["eval_loss"] for r in history["validation"]]
    return [r["loss"] for r in history["log"]] + validation


def quiet(line):
    """A log that nobody reads."""


def read(folder):
    """The history of a run."""
    return json.loads((folder / "training_history.json").read_text())


def adapter(folder):
    """The tensors of a run's adapter."""
    return load_file(folder / "adapter/adapter_model.safetensors")


def assert_same(folder, other):
    """The same curve, validations and adapter, but for the order of float32 sums."""
    assert curve(read(folder)) == pytest.approx(curve(read(other)), abs=1e-5)
    ours, theirs = adapter(folder), adapter(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-5, rtol=0)


def living(processes):
    """Those that still run; one that nobody has asked for its status is dead, too."""
    def lives(process):
        try:
            return process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False
    return [process for process in processes if lives(process)]
