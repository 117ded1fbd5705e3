"""Whatever comes in: read right, or refused in one line. Nothing else leaves a reader.

Each property is tried on sixty inputs. For a fuzz on more than 100,000 malformed ones:

    DOLLY_LORA_EXAMPLES=20000 pytest tests/test_properties.py

That many examples a property; the last line says how many inputs were refused.
"""
import collections
import json
import lzma
import os
from html.parser import HTMLParser

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dolly_lora.alpaca import load_instructions, load_reference
from dolly_lora.cli import read_prompts
from dolly_lora.config import PRESETS, ConfigError, DollyError, parse_overrides, resolve
from dolly_lora.figures import escape_text
from dolly_lora.runs import load_run
from dolly_lora.data import FIELDS, build_prompt, clean, encode, load_dolly, split
from dolly_lora.files import JsonlCache
from dolly_lora.judge import Reply
from dolly_lora.models import tiny_tokenizer
from dolly_lora.mtbench import load_questions, load_references, rating, winner
from dolly_lora.window import safe_html

EXAMPLES = int(os.environ.get("DOLLY_LORA_EXAMPLES", 60))   # of each property
many = settings(max_examples=EXAMPLES, deadline=None, derandomize=EXAMPLES < 1000, database=None,
                suppress_health_check=list(HealthCheck))
REFUSED = collections.Counter()   # reader -> inputs that it refused


@pytest.fixture(scope="module", autouse=True)
def say_how_many_were_refused(request):
    yield
    terminal = request.config.pluginmanager.get_plugin("terminalreporter")
    if terminal and EXAMPLES >= 1000:
        counts = ", ".join(f"{name} {n:,}" for name, n in REFUSED.items())
        terminal.write_line(f"\n{REFUSED.total():,} malformed inputs were refused: {counts}")


WORDS = ["### Response:\n", "### Instruction:\n", "### Context:\n", "</s>", "<s>", "\u2028", "\x0c",
         "\ud83d", "\0", "\ufeff", "<img src=x onerror=alert(1)>", "<script>", "[12]", "&amp;",
         "[x](javascript:alert(1))", "$\\frac$", "|", "=", "'", '"', "NaN", "1e999", "\\ud800"]
pieces = st.sampled_from(WORDS) | st.text(max_size=20)
texts = st.lists(pieces, max_size=5).map("".join)
whole = texts.map(lambda t: t.encode("utf-8", "ignore").decode())  # no half characters
values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | texts,
                      lambda v: st.lists(v, max_size=3) | st.dictionaries(texts, v, max_size=3),
                      max_leaves=6)
filled = whole.filter(str.strip)
records = st.fixed_dictionaries(dict(instruction=filled, context=whole, response=whole,
                                     category=filled))
inserted = st.sampled_from([b"", b"{", b"]", b'"', b"\n", b"\xff", b"\0"]) | st.binary(max_size=4)


@st.composite
def torn(draw, rows, as_list=False):
    """A file of JSON lines (or one list) in which something went wrong: bytes cut or put in."""
    def encoded(value):
        text = json.dumps(value, ensure_ascii=draw(st.booleans()))
        return text.encode("utf-8", "surrogatepass")
    values = draw(rows)
    data = encoded(values) if as_list else b"".join(encoded(row) + b"\n" for row in values)
    for _ in range(draw(st.integers(0, 3))):
        start, end = sorted(draw(st.tuples(*[st.integers(0, len(data))] * 2)))
        new = data[start:end] * 2 if draw(st.booleans()) else draw(inserted)
        data = data[:start] + new + data[min(end, start + draw(st.integers(0, 9))):]
    return data


def read_or_refused(name, read):
    """What `read` gives, or None when it refuses with one line."""
    try:
        return read()
    except DollyError as e:
        assert str(e) and "\n" not in str(e)
        REFUSED[name] += 1


def rows_like(*fields):
    """Rows that have some of the fields, with values of any type."""
    row = st.fixed_dictionaries({}, optional=dict.fromkeys(fields, values | whole))
    return st.lists(row | values, max_size=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("properties")


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


# ---- data


@many
@given(data=torn(rows_like(*FIELDS) | st.lists(records, max_size=4)),
       suffix=st.sampled_from([".jsonl", ".jsonl.xz", ".json", ".parquet"]),
       compress=st.booleans())
def test_loader(data, suffix, compress, folder):
    path = folder / f"data{suffix}"
    path.write_bytes(lzma.compress(data, preset=0) if suffix.endswith("xz") and compress else data)
    loaded = read_or_refused("data", lambda: load_dolly(str(path)))
    for row in loaded or ():
        assert set(row) == set(FIELDS) and all(isinstance(t, str) for t in row.values())
        assert row["instruction"].strip() and row["category"].strip()
        json.dumps(row, ensure_ascii=False).encode()  # whole characters


def key(row):
    return tuple(row[f] for f in FIELDS)


@many
@given(rows=st.lists(records, max_size=12))
def test_cleaning_and_splits(rows):
    kept, count = clean(rows)
    dropped = count["empty_responses"] + count["exact_duplicates"] + count["normalised_duplicates"]
    assert count["read"] == len(rows) == len(kept) + dropped
    assert clean(rows[::-1])[0] == kept
    parts = split(kept, PRESETS["tiny"])
    assert sorted(map(key, sum(parts.values(), []))) == sorted(map(key, kept))
    passages = [{r["context"] for r in part if r["context"]} for part in parts.values()]
    assert sum(map(len, passages)) == len(set().union(*passages))


@many
@given(row=records)
def test_template(row):
    prompt = build_prompt(row["instruction"], row["context"])
    head, tail = f"### Instruction:\n{row['instruction']}\n\n", "### Response:\n"
    assert prompt.startswith(head) and prompt.endswith(tail)
    middle = prompt[len(head):-len(tail)]
    assert middle == (f"### Context:\n{row['context']}\n\n" if row["context"] else "")


@many
@given(row=records, max_length=st.integers(1, 120), train_on=st.sampled_from(["response", "all"]))
def test_labels(row, max_length, train_on, tokenizer):
    prompt = tokenizer(build_prompt(row["instruction"], row["context"])).input_ids
    made = encode(row, tokenizer, max_length, train_on)
    full = encode(row, tokenizer, 10**9, train_on)
    ids, labels = full["input_ids"], full["labels"]
    masked = len(prompt) if train_on == "response" else 0
    assert ids[:len(prompt)] == prompt and ids[-1] == labels[-1] == tokenizer.eos_token_id
    assert labels == [-100] * masked + ids[masked:]
    assert made["input_ids"] == ids[:max_length] and made["labels"] == labels[:max_length]
    assert made["cut"] == max(0, len(ids) - max_length)


# ---- the recipe


settable = st.sampled_from(["seed", "seeds", "base", "epochs", "load_in_4bit", "optimizer"])
pairs = st.lists(st.tuples(settable, texts), max_size=3)


@many
@given(text=texts | pairs.map(lambda pairs: " ".join(f"{k}={v}" for k, v in pairs)))
def test_overrides(text):
    changes = read_or_refused("overrides", lambda: parse_overrides(text))
    if changes is None:
        return
    default = PRESETS["tiny"]
    assert all(type(value) is type(getattr(default, name)) for name, value in changes.items())
    read_or_refused("recipe", lambda: resolve("tiny", "", "", text))


recipe_like = st.fixed_dictionaries({}, optional=dict(
    preset=values, seed=values, base=whole, epochs=values, max_length=st.integers()))


@many
@given(data=torn(st.lists(values | recipe_like | recipe_like.map(lambda r: dict(recipe=r)),
                          min_size=1, max_size=1)))
def test_recipe_of_a_run(data, folder):
    (folder / "recipe.json").write_bytes(data)
    read_or_refused("recipe.json", lambda: load_run(folder))


# ---- text on its way out


class Tags(HTMLParser):
    """The tags of a page, and the names of their attributes."""
    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes = set(), set()
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}


ALLOWED = {"p", "br", "em", "strong", "s", "code", "pre", "blockquote", "hr", "ul", "ol", "li",
           "table", "thead", "tbody", "tr", "th", "td", *(f"h{n}" for n in range(1, 7))}


@many
@given(text=texts)
def test_text_on_its_way_out(text):
    shown = Tags(escape_text(text))
    assert shown.tags <= {"br"} and not shown.attributes
    page = Tags(safe_html(text))
    assert page.tags <= ALLOWED and page.attributes <= {"class", "start", "style"}


# ---- answers and judges


verdicts = texts | st.from_regex(r"\[{0,2}(\d{1,400}|\d+\.\d*|A|B|C)\]{0,2}")
log_probabilities = st.dictionaries(st.sampled_from(["A", "B", "C", "1", "10", "x"]), st.floats(),
                                    max_size=4)


@many
@given(text=verdicts, logprobs=st.none() | log_probabilities)
def test_verdicts(text, logprobs):
    reply = Reply(text, logprobs)
    assert rating(reply) == -1 or 1 <= rating(reply) <= 10 + 1e-9
    assert winner(reply) in ("A", "B", "tie", "error")


whole_rows = st.lists(st.fixed_dictionaries(dict(key=whole, text=whole)), max_size=4)


@many
@given(data=torn(rows_like("key", "text") | whole_rows), new=whole)
def test_cache_of_answers(data, new, folder):
    path = folder / "rows.jsonl"
    path.write_bytes(data)
    cache = read_or_refused("answers", lambda: JsonlCache(path))
    if cache is None:
        assert path.read_bytes() == data  # what could not be read is not lost
        return
    before = dict(cache.rows)
    cache.add("a new one", dict(text=new))
    after = JsonlCache(path).rows
    assert after == before | {"a new one": dict(text=new)} or before != before  # nan is no number


asked_like = rows_like("question_id", "category", "turns", "reference", "choices", "instruction",
                       "context")


@many
@given(data=torn(asked_like), suffix=st.sampled_from([".jsonl", ".txt"]))
def test_questions_and_prompts(data, suffix, folder):
    path = folder / f"asked{suffix}"
    path.write_bytes(data)
    for read in load_questions, load_references, read_prompts:
        for value in read_or_refused(read.__name__, lambda: list(read(str(path)))) or ():
            json.dumps(value)


alpaca_fields = ("instruction", "output", "generator", "dataset")
whole_entry = st.fixed_dictionaries(dict(instruction=whole, output=whole, generator=whole))


@many
@given(data=torn(rows_like(*alpaca_fields) | st.lists(whole_entry, max_size=4), as_list=True),
       suffix=st.sampled_from([".json", ".json.xz"]), compress=st.booleans())
def test_files_of_alpacaeval(data, suffix, compress, folder):
    path = folder / f"alpaca{suffix}"
    path.write_bytes(lzma.compress(data, preset=0) if suffix.endswith("xz") and compress else data)
    for read in load_instructions, load_reference:
        for row in read_or_refused(read.__name__, lambda: read(str(path))) or ():
            json.dumps(row, ensure_ascii=False).encode()
