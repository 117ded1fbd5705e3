"""`bench` measures lengths: random weights need neither records nor a gated tokenizer, and one card is enough."""
import itertools
import json
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from conftest import cli
from dolly_lora import bench
from dolly_lora.config import PRESETS, sample_path
from dolly_lora.files import read_json
from dolly_lora.data import build_prompt, clean, encode_all, load_dolly, split

RANDOM = replace(PRESETS["llama2"], base="random-7b", revision="")


@pytest.fixture()
def no_hub(monkeypatch):
    """Nothing is to be had anywhere."""
    def asked(*args, **kwargs): raise AssertionError(f"asked for {args[:1]}")
    for place in "huggingface_hub.hf_hub_download", "huggingface_hub.snapshot_download", "transformers.AutoTokenizer.from_pretrained", "datasets.load_dataset":
        monkeypatch.setattr(place, asked)
    for name in "load_dolly", "load_tokenizer":
        monkeypatch.setattr(bench, name, asked)


@pytest.fixture()
def small_shape(monkeypatch):
    """LLaMA-2's vocabulary on a model that a CPU can train, in the place of the 7B."""
    small = dict(vocab_size=32_000, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
    monkeypatch.setattr(bench, "load_base", lambda recipe: LlamaForCausalLM(LlamaConfig(**small)).eval())


def test_random_weights_are_measured_on_dollys_lengths(no_hub):
    known = read_json(sample_path("bench_lengths.json"))
    data = bench._bench_data(RANDOM, 70)
    assert len(data) == 70 * 16 and len(known["examples"]) == 1024          # gone through again from the start
    for example, (prompt, response) in zip(data, itertools.cycle(known["examples"])):
        ids, labels = example["input_ids"], example["labels"]
        assert labels[:prompt] == [-100] * prompt and labels[prompt:] == ids[prompt:] and response > 0
        assert len(ids) == min(prompt + response, 1024) and 0 <= min(ids) and max(ids) < 32_000
    assert [len(p) for p in bench._bench_prompts(RANDOM, None, 128)] == known["prompts"][:128]


def test_a_shorter_recipe_leaves_out_what_it_would_learn_nothing_from(no_hub):
    short = replace(RANDOM, max_length=256)
    data = bench._bench_data(short, 64)
    assert len(data) == 1024 and max(map(len, data["input_ids"])) == 256
    assert all(any(l != -100 for l in labels) for labels in data["labels"])
    assert max(len(p) for p in bench._bench_prompts(short, None, 128)) <= 256


def test_the_whole_measurement_asks_nobody_for_anything(no_hub, small_shape):
    rows = bench.bench(replace(RANDOM, batch_size=4, max_length=128), peers=["stock", "padding-free"], steps=1)
    assert [r["name"] for r in rows] == ["stock", "padding-free", "speed"] and all(r["s_per_step"] > 0 for r in rows)
    assert len({r["tokens_per_step"] for r in rows}) == 1
    rows = bench.bench_generate(replace(RANDOM, max_length=128), prompts=4, new_tokens=2)
    assert [r["name"] for r in rows] == ["transformers", "dolly_lora"] and rows[0]["prompts"] == 4


def test_a_dataset_that_was_named_is_read_and_tokenised(monkeypatch):
    """Then the tokenizer is wanted, also by random weights."""
    asked = []
    monkeypatch.setattr(bench, "load_tokenizer", lambda recipe: asked.append(recipe.base) or bench.tiny_tokenizer())
    data = bench._bench_data(replace(RANDOM, dataset="sample", batch_size=4), 2)
    assert asked == ["random-7b"] and len(data) == 8 and max(max(ids) for ids in data["input_ids"]) < 512


def test_the_embedded_lengths_are_dollys(shared, tmp_path):
    """How they were made: LLaMA-2's tokenizer over the training split, in the order of a bench."""
    import shutil
    from transformers import AutoTokenizer
    shutil.copy(shared / "llama2-tokenizer.model", tmp_path / "tokenizer.model")
    LlamaConfig(max_position_embeddings=4096).save_pretrained(tmp_path)
    tokenizer, recipe, known = AutoTokenizer.from_pretrained(tmp_path), PRESETS["llama2"], read_json(sample_path("bench_lengths.json"))
    rows = split(clean(load_dolly(str(shared / "databricks-dolly-15k.jsonl.xz")))[0], recipe)["train"]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(recipe.seed)).tolist()
    encoded = [e for e in encode_all([rows[i] for i in order[:1100]], tokenizer, recipe.max_length) if any(l != -100 for l in e["labels"][1:])]
    learnt = [sum(l != -100 for l in e["labels"]) for e in encoded]
    assert known["examples"] == [[len(e["labels"]) - n, n] for e, n in zip(encoded, learnt)][:1024]
    prompts = tokenizer([build_prompt(r["instruction"], r["context"]) for r in rows[:512]]).input_ids
    assert known["prompts"] == [len(ids) for ids in prompts if len(ids) <= recipe.max_length][:256]


@pytest.mark.parametrize("way", ["stock", "padding-free", "speed"])
def test_every_way_takes_one_card_where_two_are_visible(tmp_path, monkeypatch, way):
    """Two cards in one process are DataParallel, which can no NF4 and no engine of ours."""
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 2))
    recipe = replace(PRESETS["tiny"], batch_size=4)
    trainer = bench._trainer(way, recipe, str(tmp_path), bench._bench_data(recipe, 1))
    assert trainer.args.n_gpu == 1 and trainer.args.train_batch_size * trainer.args.gradient_accumulation_steps == 4


def test_json_lines_and_one_form_of_the_command():
    done = cli("bench", "tiny", "--json", "--peer", "padding-free")
    assert done.returncode == 0, done.stderr[-2000:]
    assert [json.loads(line)["name"] for line in done.stdout.splitlines()] == ["padding-free", "speed"]
    from dolly_lora.cli import main
    for call in ["bench", "--preset", "tiny"], ["bench", "tiny", "demo"]:
        with pytest.raises(SystemExit) as e:
            main(call)
        assert e.value.code == 2


def test_random_7b_without_a_gpu_is_one_line(capsys, monkeypatch):
    from dolly_lora.cli import main
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for call in ["bench", "--base", "random-7b"], ["bench", "--base", "random-7b", "--generate", "--json"], ["bench", "tyni"]:
        assert main(call) == 2
        out, err = capsys.readouterr()
        assert err.startswith("dolly-lora: ") and err.count("\n") == 1 and out == "", err
