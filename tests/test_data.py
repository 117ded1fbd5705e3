"""01_data on the embedded sample and on the whole of Dolly."""
import collections
import json

from conftest import ROOT
from dolly_lora.config import Recipe
from dolly_lora.data import build_prompt, clean, encode, load_dolly, normalise, split
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
