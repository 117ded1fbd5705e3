"""The `llama2` preset's model code on LLaMA-2's real shape with random weights (a GPU), or on a
small one (a CPU).

On a GPU: python -m pytest -s tests/test_llama_shape.py prints the measured table.
"""
import json
import lzma
import shutil
import time
from dataclasses import replace

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from dolly_lora.config import PRESETS
from dolly_lora.data import build_prompt
from dolly_lora.generate import generate
from dolly_lora.hardware import device, device_name
from dolly_lora.models import load_base, load_tokenizer, load_tuned, lora_parameter_count
from dolly_lora.train import train

CUDA = torch.cuda.is_available()
SMALL = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
SHAPE = dict(max_position_embeddings=4096) | ({} if CUDA else SMALL)
SHORT = {} if CUDA else dict(max_length=128)
SHOWN = ("seconds_per_step", "real_tokens_per_second", "peak_memory_gib", "first_validation_loss",
         "best_validation_loss", "trainable_parameters")
TOKENIZER = dict(tokenizer_class="LlamaTokenizer", bos_token="<s>", eos_token="</s>",
                 unk_token="<unk>", add_bos_token=True, legacy=False)


class Laps:
    """Seconds between one call and the next, under a name."""

    def __init__(self):
        self.table, self.since = {}, time.time()

    def __call__(self, what):
        now = time.time()
        self.table[what], self.since = f"{now - self.since:.1f} s", now


def save_base(folder, shared):
    """Random weights in LLaMA-2's shape, with LLaMA-2's tokenizer."""
    torch.set_default_dtype(torch.bfloat16 if CUDA else torch.float32)
    try:
        with torch.device(device()):
            model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    finally:
        torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    del model
    torch.cuda.empty_cache()
    shutil.copy(shared / "llama2-tokenizer.model", folder / "tokenizer.model")
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER))
    # from SentencePiece to tokenizer.json, once
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)


def make_recipe(base, dataset):
    return replace(PRESETS["llama2"], base=str(base), revision="", dataset=str(dataset),
                   max_steps=20, eval_steps=10, logging_steps=5, max_new_tokens=32, **SHORT)


@pytest.fixture
def recipe(shared, tmp_path):
    with lzma.open(shared / "databricks-dolly-15k.jsonl.xz", "rt") as f:
        (tmp_path / "part.jsonl").write_text("".join(next(f) for _ in range(480)))
    return make_recipe(tmp_path / "base", tmp_path / "part.jsonl")


def test_llama2_loads_in_4bit_trains_saves_reloads_generates(shared, recipe, tmp_path):
    lap, run_dir = Laps(), tmp_path / "run"
    save_base(tmp_path / "base", shared)
    lap("make and save random weights")

    tokenizer = load_tokenizer(recipe)
    assert tokenizer.eos_token == "</s>" and tokenizer.pad_token == "<unk>"
    assert tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    model = load_base(recipe)
    four_bit = sum(type(m).__name__ == "Linear4bit" for m in model.modules())
    assert four_bit == (32 * 7 if CUDA else 0)
    lap.table["weights in memory"] = f"{model.get_memory_footprint() / 2**30:.2f} GiB"
    lap("load in 4-bit")
    parameters = lora_parameter_count(model.config, 16)
    del model

    summary = train(recipe, run_dir)["summary"]
    lap("20 steps with 3 validations")
    assert summary["steps"] == 20 and summary["trainable_parameters"] == parameters
    if CUDA:
        assert parameters == 39_976_960
    assert summary["best_validation_loss"] < summary["first_validation_loss"]

    x = tokenizer(build_prompt("Name a prime."), return_tensors="pt").input_ids.to(device())
    tuned = load_tuned(recipe, run_dir)
    with torch.inference_mode():
        logits = tuned(x).logits.float()
        with tuned.disable_adapter():
            base_logits = tuned(x).logits.float()
    assert (logits - base_logits).abs().max() > 1e-3
    del tuned
    with torch.inference_mode():    # the saved adapter is the trained one
        assert torch.equal(load_tuned(recipe, run_dir)(x).logits.float(), logits)
    lap("reload twice, compare logits")
    prompts = [build_prompt(q) for q in ("Name a prime.", "Say hi")]
    answers = generate(load_tuned(recipe, run_dir), tokenizer, prompts, max_new_tokens=32)
    assert all(0 < a.n_tokens <= 32 for a in answers)
    lap("reload, generate 2 × 32 tokens")
    measured = {k: summary[k] for k in SHOWN}
    print("\n" + json.dumps(dict(device=device_name(), **lap.table, **measured), indent=1))
