"""Answers: the same as transformers', once each, whatever dies in between. Some on a GPU."""
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from conftest import ROOT
from dolly_lora.config import PRESETS, DollyError, sample_path
from dolly_lora.data import build_prompt
from dolly_lora.files import JsonlCache, read_jsonl
from dolly_lora.engine.decoder import attend_cached, uniform_draws
from dolly_lora.generate import generate
from dolly_lora.hardware import is_ampere
from dolly_lora.models import (
    add_lora, load_base, load_tokenizer, tiny_model, weights_fingerprint)

try:
    from hypothesis import given, settings, strategies as st
except ImportError: st = None

needs_gpu = pytest.mark.skipif(not is_ampere(), reason="no GPU of compute capability 8.0")
PROMPTS = [build_prompt(r["instruction"])
           for r in json.loads(sample_path("alpaca_sample.json").read_text())]
PROMPTS += [build_prompt(f"Count to {n}.") for n in range(24)]
TOKENIZER = load_tokenizer(PRESETS["tiny"])


def both(model, **how):
    ours = generate(model, TOKENIZER, PROMPTS, 24, **how)
    with patch("dolly_lora.generate.is_decodable", return_value=False):
        return ours, generate(model, TOKENIZER, PROMPTS, 24, **how)


@pytest.mark.parametrize("slots", [1, 7, 64])
def test_greedy_answers_are_those_of_transformers(slots):
    model = tiny_model().eval()
    torch.manual_seed(0)
    for p in model.parameters():
        if p.ndim == 2: torch.nn.init.normal_(p, std=0.2)  # so that answers differ, and some end
    ours, theirs = both(model, batch_size=slots)
    assert ours == theirs and len({a.text for a in ours}) > 10
    assert {a.finished for a in ours} == {True, False}


def test_mixed_temperatures_and_adapters_too():
    model = add_lora(tiny_model(), PRESETS["tiny"])
    for n, p in model.named_parameters():
        if "lora_B" in n: torch.nn.init.normal_(p, std=0.3)
    ours, theirs = both(model, temperature=[(0.0, 0.7, 1.0)[i % 3] for i in range(len(PROMPTS))])
    assert ours == theirs
    with model.disable_adapter():
        without, theirs = both(model)
    assert without == theirs != ours


KERNEL = """
import torch
from dolly_lora.engine.decoder import _attend_cached_triton, attend_cached
for slots, heads, key_heads, size, capacity in (
        (3, 6, 2, 16, 100), (3, 4, 4, 64, 100), (3, 9, 3, 64, 300), (70, 4, 4, 32, 200)):
    new = torch.randn(slots, heads + 2 * key_heads, size).split([heads, key_heads, key_heads], 1)
    cache = torch.randn(2, slots, key_heads, capacity, size)
    lengths, active = torch.randint(0, capacity, (slots,)), torch.rand(slots) < 0.8
    lengths[:2], active[:3] = torch.tensor([0, capacity - 1]), torch.tensor([True, True, False])
    ours, theirs = cache.clone(), cache.clone()
    out = _attend_cached_triton(*new, ours, lengths, active, capacity)
    right = attend_cached(*new, theirs, lengths, active, capacity)
    assert torch.equal(ours, theirs)
    torch.testing.assert_close(out[active], right[active], rtol=1e-4, atol=1e-5)
    print("equal")
"""


def test_the_kernel_equals_its_formula_in_the_interpreter():
    pytest.importorskip("triton")
    env = os.environ | dict(TRITON_INTERPRET="1", PYTHONPATH=str(ROOT), CUDA_VISIBLE_DEVICES="")
    done = subprocess.run([sys.executable, "-c", KERNEL], env=env, cwd=ROOT, capture_output=True,
                          text=True, timeout=120)
    assert done.stdout.split() == ["equal"] * 4, done.stderr[-2000:]


JOB = """
import sys, time
from unittest.mock import patch
from pathlib import Path
sys.path.insert(0, "tests")
from test_generate import PROMPTS, TOKENIZER
from dolly_lora.files import JsonlCache
from dolly_lora.generate import generate
from dolly_lora.models import tiny_model
slow, add = float(sys.argv[2]), JsonlCache.add
def waiting(self, key, row):
    add(self, key, row)
    time.sleep(slow)
with patch.object(JsonlCache, "add", waiting):
    answers = generate(tiny_model().eval(), TOKENIZER, PROMPTS, 24, 4,
                       [0.0, 0.8] * (len(PROMPTS) // 2), rows=JsonlCache(sys.argv[1]),
                       provenance=dict(model="tiny"))
print(len(answers))
"""


def job(path, slow=0.0):
    return subprocess.Popen([sys.executable, "-c", JOB, str(path), str(slow)], cwd=ROOT,
                            env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL)


def lines_of(path): return path.read_bytes().count(b"\n") if path.exists() else 0


def test_killed_and_started_again_gives_the_same_file_and_asks_nothing_twice(tmp_path):
    assert job(tmp_path / "whole.jsonl").wait() == 0
    path = tmp_path / "killed.jsonl"
    for n in 5, 12, 20:
        p, end = job(path, 0.1), time.time() + 120
        while time.time() < end and lines_of(path) < n: time.sleep(0.02)
        p.send_signal(signal.SIGKILL)
        p.wait()
        with open(path, "a") as f: f.write('{"key": "torn')  # worse than what we can time
    assert job(path).wait() == 0
    whole, killed = ([row for _, row in read_jsonl(p)] for p in (tmp_path / "whole.jsonl", path))
    assert len({r["key"] for r in killed}) == len(killed) == len(PROMPTS)
    assert sorted(map(str, whole)) == sorted(map(str, killed))


def test_what_an_answer_depends_on_is_in_its_key(tmp_path):
    model, rows = tiny_model().eval(), lambda: JsonlCache(tmp_path / "a.jsonl")
    def ask(**how):
        usual = dict(max_new_tokens=4, rows=rows(), provenance=dict(model="a"))
        generate(model, TOKENIZER, PROMPTS[:2], **usual | how)
    ask()
    for how, more in (
            (dict(), 0), (dict(seed=7), 0), (dict(batch_size=1), 0), (dict(max_new_tokens=5), 2),
            (dict(temperature=1.0), 2), (dict(temperature=1.0, seed=7), 2),
            (dict(provenance=dict(model="b")), 2)):
        before = len(rows().rows)
        ask(**how)
        assert len(rows().rows) - before == more, how


# The file of answers

def test_a_second_writer_is_noticed_and_loses_nothing(tmp_path):
    """Issue 10: two processes on one file, and 101 of 102 rows were gone."""
    path = tmp_path / "a.jsonl"
    JsonlCache(path).add("first", dict(n=0))
    with open(path, "a") as f: f.write('{"key": "torn')
    one, other = JsonlCache(path), JsonlCache(path)
    for n in range(100): one.add(f"one {n}", dict(n=n))
    with pytest.raises(DollyError, match="a.jsonl was changed by another process") as e:
        other.add("other", dict(n=1))
    assert "\n" not in str(e.value) and len(JsonlCache(path).rows) == 101
    again = JsonlCache(path); again.add("other", dict(n=1))
    with pytest.raises(DollyError, match="changed by another"): one.add("late", {})
    assert len(JsonlCache(path).rows) == 102
    path.write_text("")                                                     # or somebody emptied it
    with pytest.raises(DollyError, match="changed by another"): again.add("more", {})


FULL = """
import resource, signal, sys
from dolly_lora.config import DollyError
from dolly_lora.files import JsonlCache
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
rows, n = JsonlCache(sys.argv[1]), 0
try:
    for n in range(100): rows.add(f"key {n}", dict(text="x" * 900))
except DollyError as e: print(n, e)
try: rows.add("small", {}); print("small fits")
except DollyError as e: print(e)
"""


def test_a_row_that_does_not_fit_on_the_disk_is_taken_back(tmp_path):
    """A limit on the file's size stands in for a full disk: the write is cut within a row."""
    path, env = tmp_path / "a.jsonl", os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", FULL, path], cwd=ROOT, env=env,
                          capture_output=True, text=True)
    first, second, *_ = done.stdout.split("\n")
    n, message = first.split(" ", 1)
    assert message.startswith("cannot write") and "make room" in message, done.stderr
    assert second == "small fits"
    assert list(JsonlCache(path).rows) == [f"key {i}" for i in range(int(n))] + ["small"]
    assert path.read_bytes().endswith(b"\n")


if st:
    TEXTS = st.text(st.characters(exclude_categories=[]))      # lone surrogates among them
    NAMES = TEXTS.filter(lambda k: k != "key")
    ROWS = st.dictionaries(TEXTS, st.dictionaries(NAMES, TEXTS, max_size=3), max_size=4)
    TORN = st.binary(max_size=20).filter(lambda b: b"\n" not in b)
    LINES = st.sampled_from([b'{"key": "a"}', b'{"key": []}', b"[]", b"1", b"null", b"{", b"\xff",
                             b'{"a": 1}', b"[" * 5000, b"9" * 5000])


@pytest.mark.skipif(st is None, reason="hypothesis is not installed")
def test_any_text_comes_back_from_the_file():
    @settings(max_examples=200, deadline=None)
    @given(ROWS, TORN)
    def comes_back(rows, torn):
        with tempfile.TemporaryDirectory() as d:
            path = Path(d) / "a.jsonl"
            for k, v in rows.items(): JsonlCache(path).add(k, v)
            with open(path, "ab") as f: f.write(torn)
            assert JsonlCache(path).rows == rows
            JsonlCache(path).add("last", dict(text="\u2028 \x0c \ud83d"))
            assert JsonlCache(path).rows == rows | dict(last=dict(text="\u2028 \x0c \ud83d"))
    comes_back()


@pytest.mark.skipif(st is None, reason="hypothesis is not installed")
def test_any_bytes_are_rows_or_one_line_that_names_the_file():
    @settings(max_examples=300, deadline=None)
    @given(st.one_of(st.binary(), st.lists(LINES).map(b"\n".join)))
    def is_read(data):
        with tempfile.TemporaryDirectory() as d:
            (Path(d) / "a.jsonl").write_bytes(data)
            try: JsonlCache(Path(d) / "a.jsonl")
            except DollyError as e: assert "a.jsonl line" in str(e) and "\n" not in str(e)
    is_read()


def test_a_row_without_an_answer_is_asked_again(tmp_path):
    model, rows = tiny_model().eval(), lambda: JsonlCache(tmp_path / "a.jsonl")
    def ask(): return generate(model, TOKENIZER, PROMPTS[:1], 4, rows=rows())
    answer, key = ask(), list(rows().rows)[0]
    for bad in (dict(), dict(text=None, n_tokens=1, finished=True), dict(text="a"), dict(other=1),
                dict(text="a", n_tokens="b", finished=True)):
        (tmp_path / "a.jsonl").unlink()
        rows().add(key, bad)
        assert ask() == answer


def test_a_folder_s_fingerprint_is_its_contents(tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    recipe, found = replace(PRESETS["tiny"], base=str(folder)), set()
    for name, data in (("model.safetensors", b"one"), ("model.safetensors", b"two"),
                       ("config.json", b"{}"), ("tokenizer.json", b"{}"),
                       ("tokenizer.model", b"x")):
        (folder / name).write_bytes(data)
        found.add(weights_fingerprint(recipe))
    (folder / "README.md").write_text("no part of it")
    assert len(found) == 5 and weights_fingerprint(recipe) in found
    for preset in "tiny", "smollm2": assert weights_fingerprint(PRESETS[preset]) == preset
    assert weights_fingerprint(PRESETS["llama2"]) == PRESETS["llama2"].revision


@needs_gpu
@pytest.mark.parametrize("slots", [1, 70])  # the cache in pieces, and whole
def test_gpu_cached_attention_kernel_equals_the_formula(slots):
    from dolly_lora.engine.decoder import _attend_cached_triton
    def draw(*shape, dtype): return torch.randn(*shape, device="cuda", dtype=dtype)
    for heads, key_heads, size in (32, 32, 128), (9, 3, 64), (4, 2, 16):
        for dtype in torch.float32, torch.bfloat16:
            new = draw(slots, heads + 2 * key_heads, size, dtype=dtype)
            new = new.split([heads, key_heads, key_heads], 1)
            cache = draw(2, slots, key_heads, 300, size, dtype=dtype)
            lengths = torch.randint(200, 300, (slots,), device="cuda")
            active = torch.ones(slots, device="cuda", dtype=torch.bool)
            exact = cache.float()
            ours = _attend_cached_triton(*new, cache, lengths, active, 300)
            right = attend_cached(*(t.float() for t in new), exact, lengths, active, 300)
            near = 1e-5 if dtype == torch.float32 else 2e-2
            torch.testing.assert_close(ours, right.to(dtype), atol=near, rtol=0)
            assert torch.equal(cache.float(), exact)  # it has the new keys and values


@needs_gpu
def test_gpu_a_chat_in_float32_is_that_of_transformers():
    from dolly_lora.conversation import DecoderWriter, PlainWriter
    from dolly_lora.models import add_lora
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    model = add_lora(tiny_model().cuda(), PRESETS["tiny"]).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name: p.normal_(std=0.3)
    first = TOKENIZER(PROMPTS[0]).input_ids
    answers = []
    for writer in PlainWriter(model, TOKENIZER), DecoderWriter(model, TOKENIZER, 400):
        writer.begin(["base", "tuned"], first, uniform_draws("a", 1, 24), 0.7, 0.9)
        while writer.at_work: writer.step()
        answers.append(writer.ids)
        writer.begin(["tuned"], first + [7, 8, 9], uniform_draws("b", 1, 24), 0.0, 1.0)  # reads on
        while writer.at_work: writer.step()
        answers.append(writer.ids)
    torch.set_float32_matmul_precision(before)
    assert answers[:2] == answers[2:] and answers[0]["base"] != answers[0]["tuned"]


@needs_gpu
def test_gpu_recorded_decoder_equals_transformers_in_float32():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    model = tiny_model().cuda().eval()
    assert model.dtype == torch.float32
    temperatures = [(0.0, 0.7)[i % 2] for i in range(len(PROMPTS))]
    ours, theirs = both(model, batch_size=16, temperature=temperatures)
    torch.set_float32_matmul_precision(before)
    assert ours == theirs


@needs_gpu
def test_gpu_an_answer_in_bf16_does_not_depend_on_its_company():
    recipe = replace(PRESETS["smollm2"], load_in_4bit=True)
    model, tokenizer = load_base(recipe), load_tokenizer(recipe)
    temperatures = [(0.0, 0.7)[i % 2] for i in range(len(PROMPTS))]
    whole = generate(model, tokenizer, PROMPTS, 96, 32, temperatures)
    class Half(dict):  # as if every second answer were there from a run before
        def add(self, key, row): self[key] = row
    rows = Half()
    generate(model, tokenizer, PROMPTS, 96, 32, temperatures, rows=rows)
    for key in list(rows)[::2]: del rows[key]
    assert generate(model, tokenizer, PROMPTS, 96, 32, temperatures, rows=rows) == whole
    assert len({a.text for a in whole}) > 30


class Full(JsonlCache):
    def add(self, key, row):
        raise DollyError("the disk is full")


@pytest.mark.parametrize("fast", [True, False])
def test_one_prompt_for_both_voices_gets_two_answers(fast, tmp_path):
    """And an interruption leaves the adapters on."""
    model, prompts = add_lora(tiny_model(), PRESETS["tiny"]), ["Name a prime."] * 2
    for name, p in model.named_parameters():
        if "lora_B" in name: torch.nn.init.normal_(p, std=0.3)
    with patch("dolly_lora.generate.is_decodable", return_value=fast):
        tuned, base = generate(model, TOKENIZER, prompts, 8, adapted=[True, False])
        assert tuned == generate(model, TOKENIZER, prompts[:1], 8)[0] != base
        with pytest.raises(DollyError, match="full") as error:
            generate(model, TOKENIZER, prompts, 8, adapted=[False, True],
                     rows=Full(tmp_path / "rows.jsonl"))
        layers = [m for m in model.modules() if hasattr(m, "lora_A")]
        assert error.tb and not any(layer.disable_adapters for layer in layers)
