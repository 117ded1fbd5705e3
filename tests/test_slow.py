"""Stages on a cold and busy machine: first tokens come up to 3 s late, others when they like."""
import shutil

import nbformat
import papermill
import pytest

from conftest import ROOT

LATE = """
import random, time
from dolly_lora.engine.decoder import Decoder
from transformers import TextStreamer

dice, put = random.Random(7), TextStreamer.put
prefill, step = Decoder.prefill, Decoder.step

def late_put(streamer, value):
    streamer.puts = getattr(streamer, "puts", 0) + 1      # the prompt is put first, then each token
    time.sleep(dice.uniform(0, 3) if streamer.puts == 2 else dice.choice([0, 0, 0.05]))
    return put(streamer, value)

def late_prefill(*args, **kwargs):
    time.sleep(dice.uniform(0, 3))
    return prefill(*args, **kwargs)

def late_step(decoder):
    time.sleep(dice.choice([0, 0, 0.05]))
    return step(decoder)

TextStreamer.put = late_put
Decoder.prefill, Decoder.step = late_prefill, late_step
"""


@pytest.mark.parametrize("stage, again", [
    ("03_eval", ("answers", "judgments", "metrics.json")), ("04_chat", ())])
def test_a_stage_ends_however_late_the_tokens_come(tiny_run, tmp_path, monkeypatch, stage, again):
    monkeypatch.delenv("IN_TEST", raising=False)
    folder = tmp_path / "run"
    shutil.copytree(tiny_run[0], folder, ignore=shutil.ignore_patterns(*again))
    notebook = nbformat.read(ROOT / "nbs" / f"{stage}.ipynb", 4)
    tags = [c.metadata.get("tags", []) for c in notebook.cells]
    place = next(i for i, t in enumerate(tags) if "parameters" in t)
    notebook.cells.insert(place, nbformat.v4.new_code_cell(LATE))
    nbformat.write(notebook, tmp_path / "late.ipynb")
    parameters = dict(preset="tiny", run_dir=str(folder))
    papermill.execute_notebook(
        str(tmp_path / "late.ipynb"), str(tmp_path / "done.ipynb"), parameters, progress_bar=False,
        cwd=str(ROOT), kernel_name="python3", extra_arguments=["--log-level=40"])
    if again:
        late, before = (f / "metrics.json" for f in (folder, tiny_run[0]))
        assert late.read_text() == before.read_text()
