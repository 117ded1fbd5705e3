"""Whatever comes in: read right, or refused in one line. Nothing else leaves a reader.

A hundred thousand inputs (ten properties): DOLLY_LORA_EXAMPLES=10000 pytest tests/test_properties.py
"""
import json
import lzma
import os
from html.parser import HTMLParser

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dolly_lora.window import safe_html
from dolly_lora.cli import read_prompts
from dolly_lora.config import PRESETS, ConfigError, DollyError, parse_overrides, resolve
from dolly_lora.figures import escape_text
from dolly_lora.runs import load_run
from dolly_lora.data import FIELDS, build_prompt, clean, encode, load_dolly, split
from dolly_lora.files import JsonlCache
from dolly_lora.judge import Reply
from dolly_lora.models import tiny_tokenizer
from dolly_lora.mtbench import load_questions, load_references, rating, winner

EXAMPLES = int(os.environ.get("DOLLY_LORA_EXAMPLES", 60))
many = settings(max_examples=EXAMPLES, deadline=None, derandomize=EXAMPLES < 1000, database=None,
                suppress_health_check=list(HealthCheck))

WORDS = ["### Response:\n", "### Instruction:\n", "### Context:\n", "</s>", "<s>", "\u2028", "\x0c",
         "\ud83d", "\0", "\ufeff", "<img src=x onerror=alert(1)>", "<script>", "[12]", "&amp;",
         "[x](javascript:alert(1))", "$\\frac$", "|", "=", "'", '"', "NaN", "1e999", "\\ud800"]
pieces = st.sampled_from(WORDS) | st.text(max_size=20)
texts = st.lists(pieces, max_size=5).map("".join)
whole = texts.map(lambda t: t.encode("utf-8", "ignore").decode())  # no half characters
values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | texts,
                      lambda v: st.lists(v, max_size=3) | st.dictionaries(texts, v, max_size=3),
                      max_leaves=6)
records = st.fixed_dictionaries(dict(instruction=whole.filter(str.strip), context=whole, response=whole,
                                     category=whole.filter(str.strip)))


@st.composite
def torn(draw, lines):
    """A file of JSON lines in which something went wrong: bytes cut, changed, doubled or put in."""
    data = b"".join(json.dumps(row, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass") + b"\n"
                    for row in draw(lines))
    for _ in range(draw(st.integers(0, 3))):
        a, b = sorted(draw(st.tuples(*[st.integers(0, len(data))] * 2)))
        new = draw(st.sampled_from([b"", b"{", b"]", b'"', b"\n", b"\xff", b"\0", data[a:b] * 2]) | st.binary(max_size=4))
        data = data[:a] + new + data[min(b, a + draw(st.integers(0, 9))):]
    return data


def read_or_refused(read):
    """What `read` gives, or None when it refuses with one line."""
    try:
        return read()
    except DollyError as e:
        assert str(e) and "\n" not in str(e)


def rows_like(*fields):
    return st.lists(st.fixed_dictionaries({}, optional=dict.fromkeys(fields, values | whole)) | values, max_size=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("properties")


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@many
@given(data=torn(rows_like(*FIELDS) | st.lists(records, max_size=4)),
       suffix=st.sampled_from([".jsonl", ".jsonl.xz", ".json", ".parquet"]), compress=st.booleans())
def test_loader(data, suffix, compress, folder):
    path = folder / f"data{suffix}"
    path.write_bytes(lzma.compress(data, preset=0) if suffix.endswith("xz") and compress else data)
    loaded = read_or_refused(lambda: load_dolly(str(path)))
    for row in loaded or ():
        assert set(row) == set(FIELDS) and all(isinstance(t, str) for t in row.values())
        assert row["instruction"].strip() and row["category"].strip()
        json.dumps(row, ensure_ascii=False).encode()  # whole characters


@many
@given(rows=st.lists(records, max_size=12))
def test_cleaning_and_splits(rows):
    kept, count = clean(rows)
    dropped = count["empty_responses"] + count["exact_duplicates"] + count["normalised_duplicates"]
    assert count["read"] == len(rows) == len(kept) + dropped
    assert clean(rows[::-1])[0] == kept
    parts = split(kept, PRESETS["tiny"])
    key = lambda r: tuple(r[f] for f in FIELDS)
    assert sorted(map(key, sum(parts.values(), []))) == sorted(map(key, kept))
    passages = [{r["context"] for r in part if r["context"]} for part in parts.values()]
    assert sum(map(len, passages)) == len(set().union(*passages))


@many
@given(row=records)
def test_template(row):
    prompt = build_prompt(row["instruction"], row["context"])
    assert prompt.startswith(f"### Instruction:\n{row['instruction']}\n\n")
    assert prompt.endswith("### Response:\n")
    middle = prompt[len(f"### Instruction:\n{row['instruction']}\n\n"):-len("### Response:\n")]
    assert middle == (f"### Context:\n{row['context']}\n\n" if row["context"] else "")


@many
@given(row=records, max_length=st.integers(1, 120), train_on=st.sampled_from(["response", "all"]))
def test_labels(row, max_length, train_on, tokenizer):
    prompt = tokenizer(build_prompt(row["instruction"], row["context"])).input_ids
    made = encode(row, tokenizer, max_length, train_on)
    full = encode(row, tokenizer, 10**9, train_on)
    ids, labels = full["input_ids"], full["labels"]
    learnt = len(prompt) if train_on == "response" else 0
    assert ids[:len(prompt)] == prompt and ids[-1] == labels[-1] == tokenizer.eos_token_id
    assert labels == [-100] * learnt + ids[learnt:]
    assert made == dict(input_ids=ids[:max_length], labels=labels[:max_length], cut=max(0, len(ids) - max_length))


@many
@given(text=texts | st.lists(st.tuples(st.sampled_from(["seed", "base", "epochs", "load_in_4bit", "optimizer"]), texts),
                             max_size=3).map(lambda pairs: " ".join(f"{k}={v}" for k, v in pairs)))
def test_overrides(text):
    changes = read_or_refused(lambda: parse_overrides(text))
    if changes is None: return
    default = PRESETS["tiny"]
    assert all(type(value) is type(getattr(default, name)) for name, value in changes.items())
    read_or_refused(lambda: resolve("tiny", "", "", text))


@many
@given(data=torn(st.lists(values | st.fixed_dictionaries({}, optional=dict(
    preset=values, seed=values, base=whole, epochs=values, max_length=st.integers())), min_size=1, max_size=1)))
def test_recipe_of_a_run(data, folder):
    (folder / "recipe.json").write_bytes(data)
    try: load_run(folder)
    except ConfigError as e: assert "\n" not in str(e)
    except DollyError as e: assert "recipe.json" in str(e) and "\n" not in str(e)


class Tags(HTMLParser):
    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes = set(), set()
        self.feed(page); self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag); self.attributes |= {name for name, _ in attrs}


@many
@given(text=texts)
def test_text_on_its_way_out(text):
    shown = Tags(escape_text(text))
    assert shown.tags <= {"br"} and not shown.attributes
    allowed = {"p", "br", "em", "strong", "s", "code", "pre", "blockquote", "hr", "ul", "ol", "li", "table",
               "thead", "tbody", "tr", "th", "td", *(f"h{n}" for n in range(1, 7))}
    page = Tags(safe_html(text))
    assert page.tags <= allowed and page.attributes <= {"class", "start", "style"}


@many
@given(text=texts | st.from_regex(r"\[{0,2}(\d{1,400}|\d+\.\d*|A|B|C)\]{0,2}"),
       logprobs=st.none() | st.dictionaries(st.sampled_from(["A", "B", "C", "1", "10", "x"]), st.floats(), max_size=4))
def test_verdicts(text, logprobs):
    reply = Reply(text, logprobs)
    assert rating(reply) == -1 or 1 <= rating(reply) <= 10 + 1e-9
    assert winner(reply) in ("A", "B", "tie", "error")


@many
@given(data=torn(rows_like("key", "text") | st.lists(st.fixed_dictionaries(dict(key=whole, text=whole)), max_size=4)),
       new=whole)
def test_rows(data, new, folder):
    path = folder / "rows.jsonl"
    path.write_bytes(data)
    rows = read_or_refused(lambda: JsonlCache(path))
    if rows is None:
        assert path.read_bytes() == data  # what could not be read is not lost
        return
    before = dict(rows.rows)
    rows.add("a new one", dict(text=new))
    assert JsonlCache(path).rows == before | {"a new one": dict(text=new)} or before != before  # nan is no number


@many
@given(data=torn(rows_like("question_id", "category", "turns", "reference", "choices", "instruction", "context")),
       suffix=st.sampled_from([".jsonl", ".txt"]))
def test_questions_and_prompts(data, suffix, folder):
    path = folder / f"asked{suffix}"
    path.write_bytes(data)
    for read in load_questions, load_references, read_prompts:
        for value in read_or_refused(lambda: list(read(str(path)))) or (): json.dumps(value)
