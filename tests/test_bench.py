"""`bench` measures lengths: random weights need neither records nor a gated tokenizer."""
import itertools
import json
import shutil
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from conftest import cli
from dolly_lora import bench
from dolly_lora.config import PRESETS, ConfigError, DollyError, resolve, sample_path
from dolly_lora.data import build_prompt, clean, encode_all, load_dolly, split
from dolly_lora.files import read_json
from dolly_lora.models import add_lora, tiny_model

RANDOM = replace(PRESETS["llama2"], base="random-7b", revision="")
PLACES = ["huggingface_hub.hf_hub_download", "huggingface_hub.snapshot_download",
          "transformers.AutoTokenizer.from_pretrained", "datasets.load_dataset"]
# LLaMA-2's vocabulary on a model that a CPU can train
SMALL = dict(vocab_size=32_000, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
             num_attention_heads=2, num_key_value_heads=2)


@pytest.fixture()
def no_hub(monkeypatch):
    """Nothing is to be had anywhere."""
    def asked(*args, **kwargs):
        raise AssertionError(f"asked for {args[:1]}")
    for place in PLACES:
        monkeypatch.setattr(place, asked)
    for name in "load_dolly", "load_tokenizer":
        monkeypatch.setattr(bench, name, asked)


@pytest.fixture()
def small_shape(monkeypatch):
    """The small model in the place of the 7B."""
    def load_base(recipe):  # a config of its own, which a method may change
        return LlamaForCausalLM(LlamaConfig(**SMALL)).eval()
    monkeypatch.setattr(bench, "load_base", load_base)


def test_random_weights_are_measured_on_dollys_lengths(no_hub):
    known = read_json(sample_path("bench_lengths.json"))
    data = bench.bench_examples(RANDOM, 70)
    assert len(data) == 70 * 16          # gone through again from the start
    assert len(known["examples"]) == 1024
    for example, (prompt, response) in zip(data, itertools.cycle(known["examples"])):
        ids, labels = example["input_ids"], example["labels"]
        assert labels[:prompt] == [-100] * prompt and labels[prompt:] == ids[prompt:]
        assert response > 0 and len(ids) == min(prompt + response, 1024)
        assert 0 <= min(ids) and max(ids) < 32_000
    prompts = bench.bench_prompts(RANDOM, None, 128)
    assert [len(ids) for ids in prompts] == known["prompts"][:128]


def test_a_shorter_recipe_leaves_out_what_it_would_learn_nothing_from(no_hub):
    short = replace(RANDOM, max_length=256)
    data = bench.bench_examples(short, 64)
    assert len(data) == 1024 and max(len(ids) for ids in data["input_ids"]) == 256
    assert all(any(label != -100 for label in labels) for labels in data["labels"])
    assert max(len(ids) for ids in bench.bench_prompts(short, None, 128)) <= 256


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_measured_on_lengths_with_random_weights(no_hub, preset):
    """As the command line makes the recipe: `bench PRESET --base random-7b`."""
    recipe, _ = resolve(preset, "", "", "base=random-7b")
    assert len(bench.bench_examples(recipe, 2)) == 2 * recipe.batch_size
    assert len(bench.bench_prompts(recipe, None, 8)) == 8
    assert bench.bench_tokenizer(recipe).pad_token_id is not None


def test_the_whole_measurement_asks_nobody_for_anything(no_hub, small_shape):
    recipe, _ = resolve("demo", "", "", "base=random-7b batch_size=4 max_length=128")
    rows = bench.bench(recipe, peers=["stock", "padding-free"], steps=1)
    assert [row["name"] for row in rows] == ["stock", "padding-free", "speed"]
    assert all(row["s_per_step"] > 0 for row in rows)
    assert len({row["tokens_per_step"] for row in rows}) == 1
    with pytest.raises(ConfigError, match="did you mean transformers"):
        bench.bench_generate(recipe, ["transformer"])
    rows = bench.bench_generate(recipe, ["transformers"], prompts=4, new_tokens=2)
    assert [row["name"] for row in rows] == ["transformers", "dolly_lora"]
    assert rows[0]["prompts"] == 4


def test_fp8_is_a_method_and_that_of_its_recipes(monkeypatch):
    """The others are exact whatever the recipe says."""
    monkeypatch.setattr("dolly_lora.engine.step.multiplies_fp8", lambda device: True)
    exact, in_fp8 = PRESETS["tiny"], replace(PRESETS["tiny"], precision="fp8")
    methods = [bench.own_method(exact), bench.own_method(in_fp8), "speed", "weights kept"]
    assert methods[:2] == ["auto", "fp8"]
    for recipe in (exact, in_fp8):
        plans = [bench.bench_engine(method, add_lora(tiny_model(), recipe), recipe).plan
                 for method in methods]
        assert [plan.fp8 for plan in plans] == [False, True, False, False]
    monkeypatch.undo()
    with pytest.raises(DollyError, match="needs a Hopper card"):
        bench.bench_engine("fp8", add_lora(tiny_model().cpu(), exact), exact)


def test_a_dataset_that_was_named_is_read_and_tokenised(monkeypatch):
    """Then the tokenizer is wanted, also by random weights."""
    asked = []

    def load_tokenizer(recipe):
        asked.append(recipe.base)
        return bench.tiny_tokenizer()

    monkeypatch.setattr(bench, "load_tokenizer", load_tokenizer)
    data = bench.bench_examples(replace(RANDOM, dataset="sample", batch_size=4), 2)
    assert asked == ["random-7b"] and len(data) == 8
    assert max(max(ids) for ids in data["input_ids"]) < 512


def test_the_embedded_lengths_are_dollys(shared, tmp_path):
    """How they were made: LLaMA-2's tokenizer over the training split, in the order of a bench."""
    from transformers import AutoTokenizer
    shutil.copy(shared / "llama2-tokenizer.model", tmp_path / "tokenizer.model")
    LlamaConfig(max_position_embeddings=4096).save_pretrained(tmp_path)
    tokenizer, recipe = AutoTokenizer.from_pretrained(tmp_path), PRESETS["llama2"]
    known = read_json(sample_path("bench_lengths.json"))
    records = clean(load_dolly(str(shared / "databricks-dolly-15k.jsonl.xz")))[0]
    rows = split(records, recipe)["train"]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(recipe.seed)).tolist()
    encoded = encode_all([rows[i] for i in order[:1100]], tokenizer, recipe.max_length)
    encoded = [e["labels"] for e in encoded if any(label != -100 for label in e["labels"][1:])]
    learnt = [sum(label != -100 for label in labels) for labels in encoded]
    pairs = [[len(labels) - n, n] for labels, n in zip(encoded, learnt)]
    assert known["examples"] == pairs[:1024]
    texts = [build_prompt(row["instruction"], row["context"]) for row in rows[:512]]
    lengths = [len(ids) for ids in tokenizer(texts).input_ids]
    assert known["prompts"] == [n for n in lengths if n <= recipe.max_length][:256]


@pytest.mark.parametrize("method", ["stock", "padding-free", "speed"])
def test_every_method_takes_one_card_where_two_are_visible(tmp_path, monkeypatch, method):
    """Two cards in one process are DataParallel, which can no NF4 and no engine of ours."""
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 2))
    recipe = replace(PRESETS["tiny"], batch_size=4)
    data = bench.bench_examples(recipe, 1)
    args = bench.bench_trainer(method, recipe, str(tmp_path), data).args
    assert args.n_gpu == 1 and args.train_batch_size * args.gradient_accumulation_steps == 4


def test_json_lines_and_one_form_of_the_command():
    done = cli("bench", "tiny", "--json", "--peer", "padding-free")
    assert done.returncode == 0, done.stderr[-2000:]
    names = [json.loads(line)["name"] for line in done.stdout.splitlines()]
    assert names == ["padding-free", "speed"]
    from dolly_lora.cli import main
    for call in ["bench", "--preset", "tiny"], ["bench", "tiny", "demo"]:
        with pytest.raises(SystemExit) as e:
            main(call)
        assert e.value.code == 2


CALLS = ["--base random-7b", "demo --base random-7b", "--base random-7b --generate --json", "tyni"]


@pytest.mark.parametrize("call", CALLS)
def test_what_cannot_be_measured_here_is_one_line(capsys, monkeypatch, call):
    from dolly_lora.cli import main
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", *call.split()]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("dolly-lora: ") and err.count("\n") == 1 and out == "", err


def test_the_arithmetic_of_a_step_by_hand():
    """A tiny Llama, multiplied out; its keys are half as wide as its queries."""
    config = LlamaConfig(vocab_size=100, hidden_size=8, intermediate_size=16, num_hidden_layers=3,
                         num_attention_heads=4, num_key_value_heads=2)
    shapes = [(8, 8), (8, 4), (8, 4), (8, 8), (8, 16), (8, 16), (16, 8)]
    token = 3 * sum(4 * i * o + 6 * 2 * (i + o) for i, o in shapes)
    expected = token * 12 + 7 * 3 * 8 * (5**2 + 7**2) + 4 * 100 * 8 * 6
    assert bench.step_flops(config, 2, [5, 7], 6) == expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="wants no card, or several")
def test_several_processes_are_measured_beside_one():
    """On the same records; the arithmetic is shared, and so is its floor."""
    recipe = replace(PRESETS["tiny"], gpus=2, batch_size=4)
    alone, shared = bench.bench(recipe, steps=2)
    assert (alone["gpus"], shared["gpus"]) == (1, 2)
    for same in "name", "base", "batch_size", "tokens_per_step", "model", "device":
        assert alone[same] == shared[same]
    assert shared["floor_s"] == pytest.approx(alone["floor_s"] / 2)
    assert shared["s_per_step"] > 0 and shared["tok_per_s"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="wants no card, or several")
def test_answers_of_two_processes_are_as_long_and_as_many():
    alone, shared = bench.bench_generate(replace(PRESETS["tiny"], gpus=2), (), 5, 3)
    assert (alone["gpus"], shared["gpus"]) == (1, 2)
    for row in alone, shared:
        assert row["prompts"] == 5 and row["tok_per_s"] * row["seconds"] == pytest.approx(15)
