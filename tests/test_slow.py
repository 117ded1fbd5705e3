"""Stages on a machine that is cold and busy: the first token of an answer comes up to three seconds late, later ones when they like."""
import shutil

import nbformat
import papermill
import pytest

from conftest import ROOT

LATE = """
import random, time
import dolly_lora.engine.decoder
from transformers import TextStreamer

dice, put, fill, step = random.Random(7), TextStreamer.put, dolly_lora.engine.decoder.fill, dolly_lora.engine.decoder.step

def late_put(streamer, value):
    streamer.puts = getattr(streamer, "puts", 0) + 1      # the prompt is put first, then each token
    time.sleep(dice.uniform(0, 3) if streamer.puts == 2 else dice.choice([0, 0, 0.05]))
    return put(streamer, value)

def late_fill(*args):
    time.sleep(dice.uniform(0, 3))
    return fill(*args)

def late_step(decoder):
    time.sleep(dice.choice([0, 0, 0.05]))
    return step(decoder)

TextStreamer.put, dolly_lora.engine.decoder.fill, dolly_lora.engine.decoder.step = late_put, late_fill, late_step
"""


@pytest.mark.parametrize("stage, again", [("03_eval", ("answers", "judgments", "metrics.json")), ("04_chat", ())])
def test_a_stage_ends_however_late_the_tokens_come(tiny_run, tmp_path, monkeypatch, stage, again):
    monkeypatch.delenv("IN_TEST", raising=False)
    folder = tmp_path / "run"
    shutil.copytree(tiny_run[0], folder, ignore=shutil.ignore_patterns(*again))
    notebook = nbformat.read(ROOT / "nbs" / f"{stage}.ipynb", 4)
    place = next(i for i, c in enumerate(notebook.cells) if "parameters" in c.metadata.get("tags", []))
    notebook.cells.insert(place, nbformat.v4.new_code_cell(LATE))
    nbformat.write(notebook, tmp_path / "late.ipynb")
    papermill.execute_notebook(str(tmp_path / "late.ipynb"), str(tmp_path / "done.ipynb"), dict(preset="tiny", run_dir=str(folder)),
                               progress_bar=False, cwd=str(ROOT), kernel_name="python3", extra_arguments=["--log-level=40"])
    if again:
        assert (folder / "metrics.json").read_text() == (tiny_run[0] / "metrics.json").read_text()   # late, and the same
