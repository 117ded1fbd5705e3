"""Whatever is given as data: read right, or refused in one line that names the place."""
import json
import lzma
from dataclasses import replace
from unittest.mock import patch

import pandas as pd
import pytest

from dolly_lora import data
from dolly_lora.config import PRESETS, sample_path
from dolly_lora.data import DOLLY, DataError, load_dolly, prepare_data, strip_citations
from dolly_lora.files import file_sha256, read_json

GOOD = dict(instruction="Say hi", context="", response="hi", category="open_qa")
LINE = json.dumps(GOOD)


# ---- formats


def test_every_format_is_read(tmp_path):
    (tmp_path / "a.jsonl").write_text("\ufeff" + LINE + "\n\n" + LINE, encoding="utf-8")
    (tmp_path / "a.json").write_text("\ufeff" + json.dumps([GOOD]), encoding="utf-8")
    pd.DataFrame([GOOD]).to_parquet(tmp_path / "a.parquet")
    with lzma.open(tmp_path / "a.jsonl.xz", "wt") as f:
        f.write(LINE)
    assert len(load_dolly(tmp_path / "a.jsonl")) == 2
    for path in tmp_path.iterdir():
        assert load_dolly(path)[0] == GOOD


def with_half(field):
    """A line whose field holds half of a character."""
    return json.dumps(GOOD | {field: "a\ud800b"})


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
    "number.jsonl": (json.dumps(GOOD | {"response": 5}).encode(),
                     "line 1: field 'response' must be text, found int"),
    "null.json": (json.dumps([GOOD | {"context": None}]).encode(),
                  "record 1: field 'context' must be text"),
    "list.jsonl": (b'["Say hi"]', "line 1: expected an object"),
    "odd_name.jsonl": (b'{"\\ud800\\n": 1}', "line 1: no shape that we know (has: \\ud800\\n)"),
    **{f"lone_{field}.jsonl": ((LINE + "\n" + with_half(field)).encode(),
                               f"line 2: field '{field}' has half of a surrogate pair")
       for field in GOOD},
    "lone.json": (f"[{with_half('response')}]".encode(),
                  "record 1: field 'response' has half of a surrogate pair"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_data_is_one_line_that_names_the_place(tmp_path, name):
    content, says = MALFORMED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        load_dolly(tmp_path / name)
    message = str(error.value)
    assert name in message and says in message
    assert "\n" not in message and len(message) < 400
    message.encode("utf-8")  # it can be printed


@pytest.mark.parametrize("kind", ["bytes", "number", "null", "text"])
def test_parquet_of_other_types_is_one_line(tmp_path, kind):
    import pyarrow as pa
    import pyarrow.parquet as pq
    offsets, not_utf8 = pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")
    column = {"bytes": lambda: pa.array([b"hi"]), "number": lambda: pa.array([1.5]),
              "null": lambda: pa.array([None]),
              "text": lambda: pa.StringArray.from_buffers(1, offsets, not_utf8)}[kind]()
    good = {field: pa.array([text]) for field, text in GOOD.items()}
    pq.write_table(pa.table(good | {"response": column}), tmp_path / f"{kind}.parquet")
    with pytest.raises(DataError, match=f"{kind}.parquet"):
        load_dolly(tmp_path / f"{kind}.parquet")


def test_a_torn_parquet_file_is_one_line(tmp_path):
    pd.DataFrame([GOOD]).to_parquet(tmp_path / "cut.parquet")
    whole = (tmp_path / "cut.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[:60] + whole[90:])
    with pytest.raises(DataError, match="cut.parquet"):
        load_dolly(tmp_path / "cut.parquet")


# ---- shapes


def message(role, content):
    return dict(role=role, content=content)


TALK = [message("system", "Be brief."), message("user", "Name a prime."), message("assistant", "7"),
        message("user", "Another?"), message("assistant", "11")]
AS_RECORD = dict(instruction="Another?", context="", response="11", category="none",
                 system="Be brief.", history=[["Name a prime.", "7"]])
ONCE = dict(instruction="Say hi", context="", response="hi", category="none")

SHAPES = {  # name -> row, the record it is
    "alpaca": (dict(instruction="Say hi", input="", output="hi", text="the whole prompt"), ONCE),
    "alpaca, input": (dict(instruction="Say hi", input="to Ann", output="hi"),
                      ONCE | dict(context="to Ann")),
    "alpaca, no input": (dict(instruction="Say hi", output="hi"), ONCE),
    "alpaca, history": (dict(instruction="Another?", input=None, output="11", system="Be brief.",
                             history=[["Name a prime.", "7"]]), AS_RECORD),
    "prompt": (dict(prompt="Say hi", completion="hi"), ONCE),
    "prompt of messages": (dict(prompt=TALK[:4], completion=TALK[4:]), AS_RECORD),
    "messages": (dict(messages=TALK, prompt="Name a prime."), AS_RECORD),
    "messages, category": (dict(messages=TALK[1:3], category="primes"),
                           dict(instruction="Name a prime.", context="", response="7",
                                category="primes")),
    "messages, system column": (dict(messages=TALK[1:], system="Be brief."), AS_RECORD),
    "sharegpt": (dict(conversations=[{"from": {"user": "human", "assistant": "gpt"}.get(
        m["role"], m["role"]), "value": m["content"]} for m in TALK]), AS_RECORD),
    "an empty column": (dict(messages=None, instruction="Say hi", output="hi"), ONCE),
    "our own files": (AS_RECORD, AS_RECORD),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("suffix", ["jsonl", "json", "jsonl.xz", "parquet"])
def test_every_shape_is_read_from_every_format(tmp_path, name, suffix):
    row, record = SHAPES[name]
    path = tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        pd.DataFrame([row]).to_parquet(path)
    elif suffix == "jsonl.xz":
        path.write_bytes(lzma.compress(json.dumps(row).encode()))
    else:
        path.write_text(json.dumps([row] if suffix == "json" else row))
    assert data.read_records(path) == [record]
    loaded = load_dolly(path)
    assert loaded.column_names == list(record if "history" in record else GOOD)
    assert loaded[0] == record


def test_a_hub_data_set_may_have_any_shape():
    with patch("datasets.load_dataset", return_value=[dict(messages=TALK)]):
        assert load_dolly("some/data")[0] == AS_RECORD


def test_each_line_of_a_file_has_its_own_shape(tmp_path):
    rows = [GOOD, dict(prompt="Say hi", completion="hi"), dict(messages=TALK)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    loaded = load_dolly(tmp_path / "a.jsonl")
    assert loaded["category"] == ["open_qa", "none", "none"]
    assert loaded["history"] == [[], [], [["Name a prime.", "7"]]]
    assert loaded["system"] == ["", "", "Be brief."]


def messages(*said):
    return dict(messages=[message(*m) for m in said])


ASKED = ("user", "Name a prime.")
SAID = ("assistant", "7")
REFUSED = {  # name -> row, what the error says
    "no shape": (dict(question="Why?", answer="So."),
                 "no shape that we know (has: question, answer)"),
    "a preference": (dict(prompt="Why?", chosen="a", rejected="b"), "no shape that we know"),
    "two shapes": (GOOD | dict(output="hello"),
                   "unclear, its columns are those of Dolly and of Alpaca"),
    "three": (GOOD | dict(messages=TALK, output="hello"), "Dolly and of Alpaca and of messages"),
    "no response": (dict(instruction="a", context="", category="b"), "field 'response' is missing"),
    "no context": (dict(instruction="a", response="b"), "field 'context' is missing"),
    "no category": (dict(instruction="a", context="", response="b"), "field 'category' is missing"),
    "number": (dict(instruction="a", output=5), "field 'output' must be text, found int"),
    "input": (dict(instruction="a", input=5, output="b"), "field 'input' must be text, found int"),
    "empty question": (dict(instruction=" ", output="b"), "field 'instruction' is empty"),
    "empty prompt": (dict(prompt=" ", completion="b"), "field 'prompt' is empty"),
    "half a list": (dict(prompt=TALK[:1], completion="b"),
                    "field 'prompt' must be text, found list"),
    "system": (dict(messages=TALK[1:], system=3), "field 'system' must be text, found int"),
    "history": (GOOD | dict(history=["a", "b"]),
                "field 'history' must be a list of [question, answer]"),
    "history of numbers": (GOOD | dict(history=[["a", 1]]), "field 'history' must be text"),
    "empty history": (GOOD | dict(history=[["a", " "]]), "empty question or answer"),
    "text for a list": (dict(messages="hi"), "expected a list of messages, found str"),
    "no messages": (dict(messages=[]), "the last message must be the assistant's"),
    "system alone": (messages(("system", "a")), "the last message must be the assistant's"),
    "not an object": (dict(messages=["hi"]), "message 1 must be an object with role and content"),
    "no answer": (messages(ASKED, SAID, ASKED), "the last message must be the assistant's"),
    "answer first": (messages(SAID, ASKED), "message 1 has role assistant, expected user"),
    "two questions": (messages(ASKED, ASKED, SAID), "message 2 has role user, expected assistant"),
    "late system": (messages(ASKED, SAID, ("system", "a")),
                    "message 3 has role system, expected user"),
    "two systems": (messages(("system", "a"), ("system", "b"), ASKED, SAID),
                    "message 2 has role system, expected user"),
    "tool": (messages(ASKED, ("tool", "{}"), SAID), "message 2 has role 'tool': only texts"),
    "tool call": (dict(messages=[message(*ASKED), message(*SAID) | dict(tool_calls=[1])]),
                  "message 2 calls a tool: only texts"),
    "no role": (dict(messages=[dict(content="hi")]), "message 1 has role None"),
    "odd role": (messages(("a\ud800\n", "hi")), "message 1 has role 'a\\ud800\\n'"),
    "parts": (messages(ASKED, ("assistant", [dict(type="text", text="7")])),
              "message 2 must be text, found list"),
    "nothing said": (messages(ASKED, ("assistant", None)),
                     "message 2 must be text, found NoneType"),
    "empty question in a talk": (messages(("user", " "), SAID), "message 1 (user) is empty"),
    "empty answer in a talk": (messages(ASKED, ("assistant", ""), ASKED, SAID),
                               "message 2 (assistant) is empty"),
    "half a character": (messages(ASKED, ("assistant", "a\ud800")),
                         "message 2 has half of a surrogate pair at character 2"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_record_is_one_line_that_names_the_place(tmp_path, name):
    row, says = REFUSED[name]
    (tmp_path / "mine.jsonl").write_text(LINE + "\n" + json.dumps(row))
    with pytest.raises(DataError) as error:
        load_dolly(tmp_path / "mine.jsonl")
    found = str(error.value)
    assert found.startswith("mine.jsonl line 2: ") and says in found
    assert "\n" not in found and len(found) < 400
    found.encode("utf-8")


# ---- sources


@pytest.mark.parametrize("source", [
    "nowhere.jsonl", "a" * 5000, "zero\0byte", ".", "", "/", "~", "nobody"])
def test_a_source_that_is_none_is_one_line(source):
    with pytest.raises(DataError, match="no data at"):
        load_dolly(source)


def test_a_hub_data_set_that_cannot_be_had():
    with patch("huggingface_hub.hf_hub_download", side_effect=OSError("offline")):
        with pytest.raises(DataError, match="cannot get databricks/.* or dataset=sample"):
            load_dolly(DOLLY["id"])


def test_another_file_than_the_pinned_one_is_refused(tmp_path):
    (tmp_path / "other.jsonl").write_text(LINE)
    fetched = dict(return_value=tmp_path / "other.jsonl")
    with patch("huggingface_hub.hf_hub_download", **fetched) as download:
        with pytest.raises(DataError, match="has SHA-256"):
            load_dolly(DOLLY["id"])
    assert download.call_args.kwargs["revision"] == DOLLY["revision"]
    assert len(DOLLY["revision"]) == 40


def test_another_hub_data_set_is_checked_row_by_row():
    with patch("datasets.load_dataset", return_value=[GOOD, GOOD | {"context": None}]):
        with pytest.raises(DataError, match="some/data row 2: field 'context' must be text"):
            load_dolly("some/data")


def test_citation_marks():
    marked = "A.[3][a] B[nb 2], C[when?] D.[better source needed]"
    assert strip_citations(marked) == ("A. B, C D.", 5)


@pytest.mark.parametrize("text", [
    'He said [1] and "[He] left" in [...]', "x = [1, 2]; x[1] = 3", "the array [1]"])
def test_other_brackets_stay(text):
    assert strip_citations(text) == (text, 0)


# ---- is it still the same?


@pytest.fixture
def mine(tmp_path):
    """A recipe on a file of its own, a run folder, and the file."""
    file = tmp_path / "mine.jsonl"
    file.write_bytes(sample_path("dolly_sample.jsonl").read_bytes())
    return replace(PRESETS["tiny"], dataset=str(file)), tmp_path / "run", file


def test_a_changed_source_is_refused(mine):
    recipe, run, file = mine
    splits = prepare_data(recipe, run)
    before = file.read_bytes()
    assert read_json(run / "data/statistics.json")["source_sha256"] == file_sha256(file)
    file.write_bytes(before + LINE.encode())
    with pytest.raises(DataError, match="has changed since .*: choose another run_dir") as error:
        prepare_data(recipe, run)
    assert "\n" not in str(error.value)
    file.write_bytes(before)
    assert prepare_data(recipe, run) == splits


def test_an_absent_source_is_not_missed(mine):
    recipe, run, file = mine
    splits = prepare_data(recipe, run)
    file.unlink()
    assert prepare_data(recipe, run) == splits


def test_the_sample_and_the_pinned_dolly_have_a_fingerprint_too(tmp_path):
    def recorded(dataset):
        folder = tmp_path / dataset.replace("/", "_")
        with patch.object(data, "load_dolly", return_value=load_dolly("sample")):
            prepare_data(replace(PRESETS["tiny"], dataset=dataset), folder)
        return read_json(folder / "data/statistics.json")["source_sha256"]
    assert recorded("sample") == file_sha256(sample_path("dolly_sample.jsonl"))
    assert recorded(DOLLY["id"]) == DOLLY["sha256"]
    assert recorded("some/other") is None


@pytest.mark.parametrize("name", ["train", "val", "test"])
def test_a_torn_or_missing_split_file_is_noticed(tmp_path, name):
    prepare_data(PRESETS["tiny"], tmp_path)
    path = tmp_path / f"data/{name}.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[:-1]), encoding="utf-8")  # whole lines, only fewer
    with pytest.raises(DataError, match=f"{name}.jsonl is missing, cut short or edited"):
        prepare_data(PRESETS["tiny"], tmp_path)
    path.unlink()
    with pytest.raises(DataError, match=f"{name}.jsonl is missing"):
        prepare_data(PRESETS["tiny"], tmp_path)
