"""A file is whole or absent, whatever happens while it is written."""
import pytest

from dolly_lora.config import DollyError
from dolly_lora.files import JsonlCache, publish, read_json, write_json, write_jsonl, write_text

HALF = "half a character: \ud83d"


def test_what_cannot_be_written_leaves_the_old_file(tmp_path):
    write_text(tmp_path / "a.json", "old")
    with pytest.raises(DollyError, match="cannot write .*a.json .*No space left.*make room"):
        with publish(tmp_path / "a.json") as part:
            part.write_text("ne")
            raise OSError(28, "No space left on device")
    assert (tmp_path / "a.json").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_half_a_character_survives_json(tmp_path):
    write_json(tmp_path / "a.json", {HALF: [HALF]})
    assert read_json(tmp_path / "a.json") == {HALF: [HALF]}
    write_jsonl(tmp_path / "a.jsonl", [dict(text=HALF)])
    assert r"\ud83d" in (tmp_path / "a.jsonl").read_text()


def test_half_a_character_in_a_text_file_is_one_line(tmp_path):
    write_text(tmp_path / "a.md", "old")
    with pytest.raises(DollyError, match=r"a.md: character 19 .* \(\\ud83d\)") as error:
        write_text(tmp_path / "a.md", HALF)
    str(error.value).encode()   # it can be printed
    assert (tmp_path / "a.md").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.md"]


def test_a_row_that_does_not_fit_is_taken_back(tmp_path, monkeypatch):
    cache = JsonlCache(tmp_path / "a.jsonl")
    cache.add("first", dict(n=1))

    class FullDisk:
        def __init__(self, file): self.file = file
        def __enter__(self): return self
        def __exit__(self, *args): self.file.close()
        def tell(self): return self.file.tell()
        def truncate(self, size): return self.file.truncate(size)
        def write(self, data):
            self.file.write(data[:5])
            raise OSError(28, "No space left on device")

    from dolly_lora import files
    monkeypatch.setattr(files, "open", lambda *a, **k: FullDisk(open(*a, **k)), raising=False)
    with pytest.raises(DollyError, match="No space left.*the rows before it are kept"):
        cache.add("second", dict(n=2))
    monkeypatch.undo()
    cache.add("third", dict(n=3))
    assert list(JsonlCache(cache.path).rows) == ["first", "third"]
