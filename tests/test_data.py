"""01_data on the embedded sample and on the whole of Dolly: cleaning, splits, prompts, labels."""
import collections
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from conftest import ROOT
from dolly_lora.config import PRESETS, Recipe
from dolly_lora.data import build_prompt, clean, encode, encode_split, load_dolly, normalise
from dolly_lora.data import prepare_data, split
from dolly_lora.models import tiny_tokenizer
from dolly_lora.runs import hold_run

CATEGORIES = {"open_qa", "closed_qa", "general_qa", "classification", "brainstorming",
              "information_extraction", "summarization", "creative_writing"}


@pytest.fixture(scope="module")
def dolly(shared):
    """The whole of Dolly."""
    return load_dolly(shared / "databricks-dolly-15k.jsonl.xz")


# ---- the sample


def test_the_sample_has_something_of_everything():
    kept, counts = clean(load_dolly("sample"))
    assert counts["kept"] >= 200 and {r["category"] for r in kept} == CATEGORIES
    assert 0.25 < sum(bool(r["context"]) for r in kept) / len(kept) < 0.4
    assert counts["exact_duplicates"] == counts["normalised_duplicates"] == 1
    assert counts["empty_responses"] == 1 and counts["citation_marks"] > 20
    contexts = [r["context"] for r in kept]
    assert any("items[0]" in c for c in contexts) and not any("[1]" in c for c in contexts)


def test_the_samples_answers_are_as_varied_as_dollys():
    words = sorted(len(r["response"].split()) for r in clean(load_dolly("sample"))[0])
    assert words[len(words) // 20] <= 6 and words[len(words) // 2] < 60 and words[-5] > 200


def test_no_text_of_dolly_in_the_repository(dolly):
    """The sample, the report and the notebooks hold none of Dolly's instructions of any length."""
    alpaca = json.loads((ROOT / "dolly_lora/sample/alpaca_sample.json").read_text())
    ours = [r["instruction"] for r in [*load_dolly("sample"), *alpaca]]
    results = ROOT / "report/results.json"
    if results.exists():
        ours += [r["instruction"] for r in json.loads(results.read_text())["before_after"]]
    theirs = {normalise(r["instruction"]) for r in dolly}
    assert not [i for i in ours if normalise(i) in theirs and len(i.split()) > 4]


# ---- cleaning


def test_cleaning_does_not_depend_on_the_order_and_adds_up():
    records = load_dolly("sample")
    kept, counts = clean(records)
    assert clean(records.shuffle(seed=1)) == (kept, counts)
    lost = ("empty_responses", "exact_duplicates", "normalised_duplicates")
    assert counts["read"] == counts["kept"] + sum(counts[k] for k in lost)


def test_the_whole_of_dolly_is_cleaned(dolly):
    assert len(dolly) == 15011
    assert dolly.column_names == ["instruction", "context", "response", "category"]
    kept, counts = clean(dolly)
    assert counts["exact_duplicates"] == 15 and counts["empty_responses"] == 0
    assert counts["kept"] == len(kept)


# ---- splits


def passages(rows):
    return {normalise(r["context"] or r["instruction"]) for r in rows}


def test_no_passage_of_the_sample_is_on_two_sides():
    kept, _ = clean(load_dolly("sample"))
    splits = split(kept, PRESETS["tiny"])
    assert split(kept[::-1], PRESETS["tiny"]) == splits
    sides = [passages(rows) for rows in splits.values()]
    assert sum(map(len, sides)) == len(set().union(*sides))


def test_the_splits_of_dolly_are_stable_disjoint_and_stratified(dolly):
    kept, _ = clean(dolly)
    splits = split(kept, Recipe())
    assert split(clean(dolly.shuffle(seed=3))[0], Recipe()) == splits
    sides = [passages(rows) for rows in splits.values()]
    assert sum(map(len, sides)) == len(set().union(*sides))
    categories = collections.Counter(r["category"] for r in kept)
    for name, fraction in (("train", 0.8), ("val", 0.1), ("test", 0.1)):
        assert abs(len(splits[name]) - fraction * len(kept)) < 10
        here = collections.Counter(r["category"] for r in splits[name])
        for category, n in categories.items():
            assert abs(here[category] / n - fraction) < 0.005
    assert split(kept, Recipe(seed=7))["test"] != splits["test"]


# ---- tokens and labels


def test_every_record_of_dolly_has_a_clean_prefix_and_ends_in_eos(dolly):
    tokenizer = tiny_tokenizer()
    for row in clean(dolly)[0][::50]:
        example = encode(row, tokenizer, 10**9)
        ids, labels = example["input_ids"], example["labels"]
        n = len(tokenizer(build_prompt(row["instruction"], row["context"])).input_ids)
        assert labels[:n] == [-100] * n and labels[n:] == ids[n:]
        assert labels[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids[n:-1]) == row["response"]


def test_a_prompt_that_fills_the_limit_is_dropped():
    long = dict(instruction="a " * 500, context="", response="b", category="x")
    example = encode(long, tiny_tokenizer(), 32)
    assert example["labels"] == [-100] * 32 and example["cut"] > 0
    rows, counts = encode_split([long], tiny_tokenizer(), replace(PRESETS["tiny"], max_length=32))
    assert counts["dropped"] == 1 and len(rows) == 0


def test_a_tokenizer_that_joins_prompt_and_response_still_masks_the_prompt():
    from tokenizers import AddedToken
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("<x>", lstrip=True)])   # takes the prompt's last newline
    row = dict(instruction="Say it", context="", response="<x> once")
    prompt = tokenizer(build_prompt("Say it")).input_ids
    joined = tokenizer(build_prompt("Say it") + row["response"]).input_ids
    assert joined[:len(prompt)] != prompt
    example = encode(row, tokenizer, 64)
    assert example["input_ids"][:len(prompt)] == prompt
    assert example["labels"][:len(prompt)] == [-100] * len(prompt)
    assert tokenizer.decode(example["labels"][len(prompt):-1]) == "<x> once"


# ---- files


def test_killed_while_the_splits_are_written(tmp_path):
    """The statistics come last, so a kill before them repeats the writing."""
    code = ("import os, sys\n"
            "from dolly_lora import data\n"
            "from dolly_lora.config import PRESETS\n"
            "data.write_json = lambda *a: os._exit(9)\n"
            "data.prepare_data(PRESETS['tiny'], sys.argv[1])")
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "killed")], cwd=ROOT)
    assert killed.returncode == 9
    torn = tmp_path / "killed/data/test.jsonl"
    torn.write_bytes(torn.read_bytes()[:100])
    again = prepare_data(PRESETS["tiny"], tmp_path / "killed")
    assert again == prepare_data(PRESETS["tiny"], tmp_path / "whole")


def test_two_processes_do_not_write_the_same_splits(tmp_path):
    code = ("import sys\n"
            "from dolly_lora.config import PRESETS\n"
            "from dolly_lora.data import prepare_data\n"
            "prepare_data(PRESETS['tiny'], sys.argv[1])")
    env = {k: v for k, v in os.environ.items() if k != "DOLLY_LORA_HOLDS"}
    with hold_run(tmp_path):
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, env=env,
                              capture_output=True, text=True)
    assert done.returncode and "is in use by process" in done.stderr
    assert not (tmp_path / "data").exists()


# ---- the notebook


def run_01(tmp_path, **parameters):
    """01_data under papermill; the executed notebook as text."""
    import papermill
    papermill.execute_notebook(
        ROOT / "nbs/01_data.ipynb", tmp_path / "01.ipynb", progress_bar=False,
        parameters=dict(preset="tiny", run_dir=str(tmp_path / "run")) | parameters)
    return (tmp_path / "01.ipynb").read_text()


def test_the_notebook_runs_on_data_without_any_context(tmp_path):
    rows = [dict(instruction=f"Name the number {n}.", context="", response=str(n),
                 category="open_qa") for n in range(20)]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run_01(tmp_path, dataset=str(tmp_path / "mine.jsonl"))
    assert (tmp_path / "run/data/tokens.json").exists()


def test_the_notebook_refuses_an_unfit_base_before_it_reads_any_data(tmp_path):
    """Room to train, but not to answer: heard in the first chapter, not in the third."""
    with pytest.raises(Exception, match="lower max_length or max_new_tokens"):
        run_01(tmp_path, overrides="max_new_tokens=2000")
    assert not (tmp_path / "run").exists()
