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
    "odd_name.jsonl": (b'{"\\ud800\\n": 1}', "line 1: field 'instruction' is missing"),
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
