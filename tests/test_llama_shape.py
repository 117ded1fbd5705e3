"""The `llama2` preset's model code on LLaMA-2's real shape with random weights (a GPU), or on a small one (a CPU).

On a GPU: python -m pytest -s tests/test_llama_shape.py prints the measured table.
"""
import json
import lzma
import shutil
import time
from dataclasses import replace

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from dolly_lora.config import PRESETS
from dolly_lora.data import build_prompt
from dolly_lora.generate import generate
from dolly_lora.models import device, load_base, load_tokenizer, load_tuned, lora_parameter_count
from dolly_lora.train import train

CUDA = torch.cuda.is_available()
SMALL = {} if CUDA else dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)


def test_llama2_loads_in_4bit_trains_saves_reloads_generates(shared, tmp_path):
    base, clock, table = tmp_path / "base", time.time(), {}
    def lap(what):
        nonlocal clock
        table[what], clock = f"{time.time() - clock:.1f} s", time.time()
    with torch.device(device()): torch.set_default_dtype(torch.bfloat16 if CUDA else torch.float32); model = LlamaForCausalLM(LlamaConfig(**SMALL)); torch.set_default_dtype(torch.float32)
    model.save_pretrained(base); del model; torch.cuda.empty_cache() if CUDA else None
    shutil.copy(shared / "llama2-tokenizer.model", base / "tokenizer.model")
    (base / "tokenizer_config.json").write_text(json.dumps(dict(tokenizer_class="LlamaTokenizer", bos_token="<s>", eos_token="</s>", unk_token="<unk>", add_bos_token=True, legacy=False)))
    AutoTokenizer.from_pretrained(base).save_pretrained(base)      # from SentencePiece to tokenizer.json, once
    lap("make and save random weights")
    with lzma.open(shared / "databricks-dolly-15k.jsonl.xz", "rt") as f: (tmp_path / "part.jsonl").write_text("".join(next(f) for _ in range(480)))
    recipe = replace(PRESETS["llama2"], base=str(base), revision="", dataset=str(tmp_path / "part.jsonl"), max_steps=20, eval_steps=10, logging_steps=5, max_new_tokens=32, **({} if CUDA else dict(max_length=128)))

    tokenizer = load_tokenizer(recipe)
    assert tokenizer.eos_token == "</s>" and tokenizer.pad_token == "<unk>" and tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    model = load_base(recipe)
    four_bit = sum(type(m).__name__ == "Linear4bit" for m in model.modules())
    assert four_bit == (32 * 7 if CUDA else 0)
    table["weights in memory"] = f"{model.get_memory_footprint() / 2**30:.2f} GiB"
    lap("load in 4-bit"); parameters = lora_parameter_count(model.config, 16); del model

    history = train(recipe, tmp_path / "run")
    lap("20 steps with 3 validations")
    s = history["summary"]
    assert s["steps"] == 20 and s["trainable_parameters"] == parameters == (39_976_960 if CUDA else parameters)
    assert s["best_validation_loss"] < s["first_validation_loss"]
    x = tokenizer(build_prompt("Name a prime."), return_tensors="pt").input_ids.to(device())
    tuned = load_tuned(recipe, tmp_path / "run")
    with torch.inference_mode():
        logits = tuned(x).logits.float()
        with tuned.disable_adapter(): base_logits = tuned(x).logits.float()
    assert (logits - base_logits).abs().max() > 1e-3
    del tuned
    with torch.inference_mode(): assert torch.equal(load_tuned(recipe, tmp_path / "run")(x).logits.float(), logits)   # the saved adapter is the trained one
    lap("reload twice, compare logits")
    answers = generate(load_tuned(recipe, tmp_path / "run"), tokenizer, [build_prompt(q) for q in ("Name a prime.", "Say hi")], max_new_tokens=32)
    assert all(0 < a.n_tokens <= 32 for a in answers)
    lap("reload, generate 2 × 32 tokens")
    print("\n" + json.dumps(dict(device=torch.cuda.get_device_name() if CUDA else "CPU", **table, **{k: s[k] for k in ("seconds_per_step", "real_tokens_per_second", "peak_memory_gib", "first_validation_loss", "best_validation_loss", "trainable_parameters")}), indent=1))
