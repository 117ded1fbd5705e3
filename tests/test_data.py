"""01_data on the embedded sample and on the whole of Dolly."""
import collections
import json
import lzma
import os
import subprocess
import sys
from dataclasses import replace
from unittest.mock import patch

import pandas as pd
import pytest

from conftest import ROOT
from dolly_lora import data
from dolly_lora.config import PRESETS, Recipe, sample_path
from dolly_lora.files import file_sha256, read_json
from dolly_lora.runs import hold_run
from dolly_lora.data import DataError, build_prompt, clean, encode, encode_split, load_dolly, normalise, prepare_data, split, strip_citations
from dolly_lora.models import tiny_tokenizer

CATEGORIES = {"open_qa", "closed_qa", "general_qa", "classification", "brainstorming", "information_extraction", "summarization", "creative_writing"}


def test_sample():
    records = load_dolly("sample")
    kept, counts = clean(records)
    assert counts["kept"] >= 200 and {r["category"] for r in kept} == CATEGORIES and 0.25 < sum(bool(r["context"]) for r in kept) / len(kept) < 0.4
    assert counts["exact_duplicates"] == counts["normalised_duplicates"] == counts["empty_responses"] == 1 and counts["citation_marks"] > 20
    assert any("items[0]" in r["context"] for r in kept) and not any("[1]" in r["context"] for r in kept)
    words = sorted(len(r["response"].split()) for r in kept)
    assert words[len(words) // 20] <= 6 and words[len(words) // 2] < 60 and words[-5] > 200          # as varied as Dolly's


def test_whole_of_dolly(shared):
    records = load_dolly(shared / "databricks-dolly-15k.jsonl.xz")
    assert len(records) == 15011 and records.column_names == ["instruction", "context", "response", "category"]
    kept, counts = clean(records)
    assert counts["exact_duplicates"] == 15 and counts["empty_responses"] == 0 and counts["kept"] == len(kept)
    splits = split(kept, Recipe())
    assert split(clean(records.shuffle(seed=3))[0], Recipe()) == splits
    prompts = [{normalise(r["context"] or r["instruction"]) for r in rows} for rows in splits.values()]   # no passage on two sides
    assert not prompts[0] & prompts[1] and not prompts[0] & prompts[2] and not prompts[1] & prompts[2]
    for name, fraction in (("train", 0.8), ("val", 0.1), ("test", 0.1)):
        assert abs(len(splits[name]) - fraction * len(kept)) < 10
        for category, n in collections.Counter(r["category"] for r in kept).items():
            assert abs(sum(r["category"] == category for r in splits[name]) / n - fraction) < 0.005
    again = split(kept, Recipe(seed=7))
    assert again["test"] != splits["test"]


def test_every_record_of_dolly_has_a_clean_prefix_and_ends_in_eos(shared):
    tokenizer = tiny_tokenizer()
    for row in clean(load_dolly(shared / "databricks-dolly-15k.jsonl.xz"))[0][::50]:
        e = encode(row, tokenizer, 10**9)
        n = len(tokenizer(build_prompt(row["instruction"], row["context"])).input_ids)
        assert e["labels"][:n] == [-100] * n and e["labels"][n:] == e["input_ids"][n:] and e["labels"][-1] == tokenizer.eos_token_id
        assert tokenizer.decode(e["input_ids"][n:-1]) == row["response"]


def test_no_text_of_dolly_in_the_repository(shared):
    """The embedded sample, the report and the notebooks hold none of Dolly's instructions of any length."""
    dolly = {normalise(r["instruction"]) for r in load_dolly(shared / "databricks-dolly-15k.jsonl.xz")}
    ours = [r["instruction"] for r in load_dolly("sample")] + [r["instruction"] for r in json.loads((ROOT / "dolly_lora/sample/alpaca_sample.json").read_text())]
    results = ROOT / "report/results.json"
    if results.exists(): ours += [r["instruction"] for r in json.loads(results.read_text())["before_after"]]
    assert not [i for i in ours if normalise(i) in dolly and len(i.split()) > 4]


GOOD = dict(instruction="Say hi", context="", response="hi", category="open_qa")
LINE = json.dumps(GOOD)


def test_every_format_is_read(tmp_path):
    (tmp_path / "a.jsonl").write_text("\ufeff" + LINE + "\n\n" + LINE, encoding="utf-8")
    (tmp_path / "a.json").write_text("\ufeff" + json.dumps([GOOD]), encoding="utf-8")
    pd.DataFrame([GOOD]).to_parquet(tmp_path / "a.parquet")
    with lzma.open(tmp_path / "a.jsonl.xz", "wt") as f: f.write(LINE)
    assert len(load_dolly(tmp_path / "a.jsonl")) == 2
    assert all(load_dolly(f)[0] == GOOD for f in tmp_path.iterdir())


def lone(field): return json.dumps(GOOD | {field: "a\ud800b"})


MALFORMED = {  # file name -> its bytes, what the error says
    "cut.jsonl.xz": (lzma.compress(LINE.encode())[:40], "damaged"),
    "latin.jsonl": (LINE.encode() + b'\n{"instruction": "\xe9"}', "line 2: not UTF-8"),
    "latin.json": (b'[{"instruction": "\xe9"}]', "not UTF-8"),
    "utf16.jsonl": (LINE.encode("utf-16"), "line 1: not UTF-8"),
    "empty.jsonl": (b"", "no records"),
    "text.txt": (b"x", "cannot read .txt"),
    "text.parquet": (b"x", "not a parquet"),
    "object.json": (b"{}", "expected a list"),
    "cut.json": (b'[\n{"instruction"', "line 2: not JSON"),
    "deep.jsonl": (b"[" * 200_000, "line 1: JSON that cannot be read"),
    "deep.json": (b"[" * 200_000, "JSON that cannot be read"),
    "digits.jsonl": (b"9" * 5000, "line 1: JSON that cannot be read"),
    "zero.jsonl": (LINE.encode() + b"\n\0", "line 2: not JSON"),
    "number.jsonl": (json.dumps(GOOD | {"response": 5}).encode(), "line 1: field 'response' must be text, found int"),
    "null.json": (json.dumps([GOOD | {"context": None}]).encode(), "record 1: field 'context' must be text"),
    "list.jsonl": (b'["Say hi"]', "line 1: expected an object"),
    "odd_name.jsonl": (b'{"\\ud800\\n": 1}', "line 1: field 'instruction' is missing"),
    **{f"lone_{f}.jsonl": ((LINE + "\n" + lone(f)).encode(), f"line 2: field '{f}' has half of a surrogate pair")
       for f in GOOD},
    "lone.json": (f"[{lone('response')}]".encode(), "record 1: field 'response' has half of a surrogate pair"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_data_is_one_line_that_names_the_place(tmp_path, name):
    content, says = MALFORMED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error: load_dolly(tmp_path / name)
    message = str(error.value)
    assert name in message and says in message and "\n" not in message and len(message) < 400
    message.encode("utf-8")  # it can be printed


def test_parquet_of_other_types_is_one_line(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq
    bad_text = pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff"))
    columns = {"bytes": pa.array([b"hi"]), "number": pa.array([1.5]), "null": pa.array([None]), "text": bad_text}
    for name, column in columns.items():
        table = pa.table({f: pa.array([v]) for f, v in GOOD.items()} | {"response": column})
        pq.write_table(table, tmp_path / f"{name}.parquet")
        with pytest.raises(DataError, match=f"{name}.parquet"): load_dolly(tmp_path / f"{name}.parquet")
    whole = (tmp_path / "null.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[:60] + whole[90:])
    with pytest.raises(DataError, match="cut.parquet"): load_dolly(tmp_path / "cut.parquet")


@pytest.mark.parametrize("source", ["nowhere.jsonl", "a" * 5000, "zero\0byte", ".", "", "/", "~", "nobody"])
def test_a_source_that_is_none_is_one_line(source):
    with pytest.raises(DataError, match="no data at"): load_dolly(source)


def test_a_hub_data_set_that_cannot_be_had_and_a_changed_download(tmp_path):
    with patch("huggingface_hub.hf_hub_download", side_effect=OSError("offline")):
        with pytest.raises(DataError, match="cannot get databricks/.* or dataset=sample"): load_dolly(data.DOLLY["id"])
    (tmp_path / "other.jsonl").write_text(LINE)
    with patch("huggingface_hub.hf_hub_download", return_value=tmp_path / "other.jsonl") as download:
        with pytest.raises(DataError, match="has SHA-256"): load_dolly(data.DOLLY["id"])
    assert download.call_args.kwargs["revision"] == data.DOLLY["revision"] and len(data.DOLLY["revision"]) == 40


def test_citation_marks():
    assert strip_citations("A.[3][a] B[nb 2], C[when?] D.[better source needed]") == ("A. B, C D.", 5)
    for text in ('He said [1] and "[He] left" in [...]', "x = [1, 2]; x[1] = 3", "the array [1]"):
        assert strip_citations(text) == (text, 0)


def test_cleaning_does_not_depend_on_the_order_and_adds_up():
    records = load_dolly("sample")
    kept, counts = clean(records)
    assert clean(records.shuffle(seed=1)) == (kept, counts)
    lost = ("empty_responses", "exact_duplicates", "normalised_duplicates")
    assert counts["read"] == counts["kept"] + sum(counts[k] for k in lost)


def test_a_prompt_that_fills_the_limit_is_dropped():
    long = dict(instruction="a " * 500, context="", response="b", category="x")
    example = encode(long, tiny_tokenizer(), 32)
    assert example["labels"] == [-100] * 32 and example["cut"] > 0
    rows, counts = encode_split([long], tiny_tokenizer(), replace(PRESETS["tiny"], max_length=32))
    assert counts["dropped"] == 1 and len(rows) == 0


def test_a_tokenizer_that_joins_prompt_and_response_still_masks_the_prompt():
    from tokenizers import AddedToken
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("<x>", lstrip=True)])    # takes the prompt's last newline with it
    row = dict(instruction="Say it", context="", response="<x> once")
    prompt = tokenizer(build_prompt("Say it")).input_ids
    assert tokenizer(build_prompt("Say it") + row["response"]).input_ids[:len(prompt)] != prompt
    example = encode(row, tokenizer, 64)
    assert example["input_ids"][:len(prompt)] == prompt and example["labels"][:len(prompt)] == [-100] * len(prompt)
    assert tokenizer.decode(example["labels"][len(prompt):-1]) == "<x> once"


@pytest.fixture
def mine(tmp_path):
    """A recipe on a file of its own, and a run folder."""
    file = tmp_path / "mine.jsonl"
    file.write_text(sample_path("dolly_sample.jsonl").read_text(encoding="utf-8"), encoding="utf-8")
    return replace(PRESETS["tiny"], dataset=str(file)), tmp_path / "run", file


def test_a_changed_source_is_refused_and_an_absent_one_is_not_missed(mine):
    recipe, run, file = mine
    splits = prepare_data(recipe, run)
    assert read_json(run / "data/statistics.json")["source_sha256"] == file_sha256(file)
    before = file.read_bytes()
    file.write_bytes(before + LINE.encode())
    with pytest.raises(DataError, match="has changed since .*: choose another run_dir, or delete") as error:
        prepare_data(recipe, run)
    assert "\n" not in str(error.value)
    file.unlink()
    assert prepare_data(recipe, run) == splits
    file.write_bytes(before)
    assert prepare_data(recipe, run) == splits


def test_the_sample_and_the_pinned_dolly_have_a_fingerprint_too(tmp_path):
    prepare_data(PRESETS["tiny"], tmp_path)
    sha = read_json(tmp_path / "data/statistics.json")["source_sha256"]
    assert sha == file_sha256(sample_path("dolly_sample.jsonl"))
    with patch.object(data, "load_dolly", return_value=load_dolly("sample")):
        prepare_data(replace(PRESETS["tiny"], dataset=data.DOLLY["id"]), tmp_path / "dolly")
        prepare_data(replace(PRESETS["tiny"], dataset="some/other"), tmp_path / "other")
    assert read_json(tmp_path / "dolly/data/statistics.json")["source_sha256"] == data.DOLLY["sha256"]
    assert read_json(tmp_path / "other/data/statistics.json")["source_sha256"] is None


@pytest.mark.parametrize("name", ["train", "val", "test"])
def test_a_torn_or_missing_split_file_is_noticed(tmp_path, name):
    prepare_data(PRESETS["tiny"], tmp_path)
    path = tmp_path / f"data/{name}.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[:-1]), encoding="utf-8")  # whole lines, only fewer
    with pytest.raises(DataError, match=f"{name}.jsonl is missing, cut short or edited"):
        prepare_data(PRESETS["tiny"], tmp_path)
    path.unlink()
    with pytest.raises(DataError, match=f"{name}.jsonl is missing"): prepare_data(PRESETS["tiny"], tmp_path)


def test_killed_while_the_splits_are_written(tmp_path):
    """The statistics come last, so a kill before them repeats the writing."""
    code = ("import os, sys; from dolly_lora import data; from dolly_lora.config import PRESETS\n"
            "data.write_json = lambda *a: os._exit(9)\n"
            "data.prepare_data(PRESETS['tiny'], sys.argv[1])")
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "killed")], cwd=ROOT).returncode == 9
    torn = tmp_path / "killed/data/test.jsonl"
    torn.write_bytes(torn.read_bytes()[:100])
    assert prepare_data(PRESETS["tiny"], tmp_path / "killed") == prepare_data(PRESETS["tiny"], tmp_path / "whole")


def test_two_processes_do_not_write_the_same_splits(tmp_path):
    code = ("import sys; from dolly_lora.data import prepare_data; from dolly_lora.config import PRESETS\n"
            "prepare_data(PRESETS['tiny'], sys.argv[1])")
    with hold_run(tmp_path):
        env = {k: v for k, v in os.environ.items() if k != "DOLLY_LORA_HOLDS"}
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode and "is in use by process" in done.stderr and not (tmp_path / "data").exists()
