"""Several processes answer, read and judge what one would, and what one has finished is kept."""
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import papermill
import psutil
import pytest
import torch

from conftest import ROOT
from dolly_lora.cards import Cards, card_file, deal, gather_rows
from dolly_lora.config import PRESETS, DollyError
from dolly_lora.evaluate import contender_losses
from dolly_lora.files import JsonlCache, read_jsonl
from dolly_lora.generate import make_answerer
from dolly_lora.judge import Question, ask, make_judge
from dolly_lora.models import load_tokenizer, load_tuned
from toys import quiet

# several processes on the CPU; on cards they are measured by `dolly-lora bench --gpus`
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="wants no card, or several")

RECIPE = PRESETS["tiny"]
PROMPTS = [f"Count to {n}, slowly." for n in range(12)]
TEMPERATURES = [0.0, 1.0] * 6
PAIRS = [Question((("user", f"Which is even, A: {n} or B: {n + 1}?"),), ("A", "B"))
         for n in range(9)]


@pytest.fixture(scope="module")
def loaded(tiny_run):
    run = tiny_run[0]
    return load_tuned(RECIPE, run), load_tokenizer(RECIPE)


@pytest.fixture()
def run(tiny_run, tmp_path):
    """A folder with an adapter, and nothing answered."""
    shutil.copytree(tiny_run[0] / "adapter", tmp_path / "run/adapter")
    return tmp_path / "run"


@pytest.fixture()
def three(run):
    cards = Cards(replace(RECIPE, gpus=3), run)
    yield cards
    cards.end()


def test_three_cards_say_what_one_says(tiny_run, loaded, run, three):
    alone = run.parent / "alone"
    records = [record for _, record in read_jsonl(tiny_run[0] / "data/test.jsonl")]
    shutil.copytree(run / "adapter", alone / "adapter")
    answer, same = [make_answerer(*loaded, RECIPE, folder, quiet, cards)
                    for folder, cards in ((run, three), (alone, None))]
    both = dict(base=PROMPTS, tuned=PROMPTS)
    assert answer(both, TEMPERATURES) == same(both, TEMPERATURES)
    for name in "base", "tuned":
        losses = contender_losses(*loaded, records, RECIPE, name, three)
        np.testing.assert_allclose(losses, contender_losses(*loaded, records, RECIPE, name),
                                   rtol=1e-5)
    judge, other = make_judge(RECIPE, *loaded, three), make_judge(RECIPE, *loaded)
    replies = ask(judge, PAIRS, run / "replies.jsonl")
    for a, b in zip(replies, ask(other, PAIRS, alone / "replies.jsonl")):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
    # fewer than there are cards
    two = contender_losses(*loaded, records[:2], RECIPE, "tuned", three)
    np.testing.assert_allclose(two, contender_losses(*loaded, records[:2], RECIPE, "tuned"),
                               rtol=1e-5)
    # all of it lies where one process would have put it
    for name, rows in ("answers/answers", 24), ("replies", 9):
        assert len(JsonlCache(run / f"{name}.jsonl").rows) == rows
    assert not [*run.rglob("*.card*")]


def test_what_a_killed_helper_had_finished_is_not_asked_again(loaded, run):
    recipe = replace(RECIPE, gpus=2, generation_batch_size=1, benchmark_tokens=64)
    cards, path = Cards(recipe, run), run / "answers/answers.jsonl"
    theirs = card_file(path, 1)

    def kill():
        while not theirs.exists() or theirs.read_bytes().count(b"\n") < 3: time.sleep(0.01)
        cards.workers[0].kill()

    threading.Thread(target=kill, daemon=True).start()
    answer = make_answerer(*loaded, recipe, run, quiet, cards)
    prompts = [f"Count to {n}, slowly." for n in range(40)]
    said = "another card ended; see .*workers.log; run the same"
    with pytest.raises(DollyError, match=said) as e:
        answer(dict(tuned=prompts))
    assert "\n" not in str(e.value) and not cards.workers
    finished = JsonlCache(path).rows | JsonlCache(theirs).rows
    assert 20 < len(finished) < 40  # this process's half, and some of the other's

    answers = answer(dict(tuned=prompts))["tuned"]  # starts another helper
    assert len(answers) == 40 and not theirs.exists()
    lines = path.read_text().splitlines()
    keys = [json.loads(line)["key"] for line in lines]
    assert len(keys) == len(set(keys)) == 40
    assert all(JsonlCache(path).rows[key] == row for key, row in finished.items())
    assert set(keys[:len(finished)]) == set(finished)  # nothing was written a second time
    cards.end()


def test_what_is_wrong_in_a_helper_is_its_own_line(run):
    shutil.rmtree(run / "adapter")
    two = Cards(replace(RECIPE, gpus=2), run)
    with pytest.raises(DollyError, match="no adapter_model.safetensors"):
        two.map(lambda part: part, "dolly_lora.generate:answer_share",
                [("tuned", prompt, 0.0) for prompt in PROMPTS], [1] * 12, 8,
                run / "answers/answers.jsonl")
    assert not two.workers


SCRIPT = """
import sys
from dataclasses import replace
from dolly_lora.cards import Cards
from dolly_lora.config import PRESETS
if __name__ == "__main__":
    cards = Cards(replace(PRESETS["tiny"], gpus=2), sys.argv[1])
    cards.start()
    print(cards.workers[0].pid, flush=True)
    input()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_helpers_end_with_their_notebook(run):
    (run / "script.py").write_text(SCRIPT)
    process = subprocess.Popen([sys.executable, run / "script.py", run], cwd=ROOT,
                               env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    helper = psutil.Process(int(process.stdout.readline()))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    helper.wait(timeout=30)  # it may still be importing


def test_an_evaluation_by_two_is_the_evaluation_by_one(tiny_run, tmp_path):
    before, folder = tiny_run[0], tmp_path / "run"
    shutil.copytree(before, folder, ignore=shutil.ignore_patterns(
        "answers", "judgments", "metrics.json", "notebooks", "report"))
    papermill.execute_notebook(
        ROOT / "nbs/03_eval.ipynb", tmp_path / "03.ipynb", cwd=ROOT / "nbs", progress_bar=False,
        parameters=dict(preset="tiny", run_dir=str(folder), overrides="gpus=2"))
    ours, theirs = [JsonlCache(f / "answers/answers.jsonl").rows for f in (folder, before)]
    assert ours == theirs
    ours, theirs = [json.loads((f / "metrics.json").read_text()) for f in (folder, before)]
    for name in "base", "tuned":
        assert ours["test"][name] == pytest.approx(theirs["test"][name])
    assert ours["alpaca_eval"] == theirs["alpaca_eval"] and ours["mt_bench"] == theirs["mt_bench"]
    one, two = [next(iter(m["judgments"].values()))["alpaca"] for m in (ours, theirs)]
    for pair in one:
        assert one[pair]["win_rate"] == pytest.approx(two[pair]["win_rate"], abs=1e-3)


@pytest.mark.parametrize("hands", [1, 2, 3, 5])
@pytest.mark.parametrize("n", [0, 1, 4, 17])
def test_dealing_is_whole_and_even(n, hands):
    sizes = [(7 * i) % 13 for i in range(n)]
    dealt = deal(sizes, hands)
    assert len(dealt) == hands and sorted(i for hand in dealt for i in hand) == list(range(n))
    counts = [len(hand) for hand in dealt]
    assert max(counts) - min(counts) <= 1
    loads = [sum(sizes[i] for i in hand) for hand in dealt]
    assert max(loads) - min(loads) <= max(sizes, default=0)


def test_a_row_that_was_made_again_replaces_one_that_could_not_be_used(tmp_path):
    path = tmp_path / "base.jsonl"
    JsonlCache(path).add("key", dict(error="HTTP 503"))
    JsonlCache(card_file(path, 1)).add("key", dict(text="One."))
    assert gather_rows(path)["key"] == JsonlCache(path)["key"] == dict(text="One.")


def test_rows_are_gathered_once(tmp_path):
    path = tmp_path / "base.jsonl"
    for card in 2, 1:
        cache = JsonlCache(card_file(path, card))
        cache.add("same", dict(text="One.")), cache.add(f"own {card}", dict(text="Two."))
    JsonlCache(path).add("first", dict(text="Zero."))
    assert list(gather_rows(path).rows) == ["first", "same", "own 1", "own 2"]
    assert list(JsonlCache(path).rows) == ["first", "same", "own 1", "own 2"]
    assert [p.name for p in tmp_path.iterdir()] == ["base.jsonl"]
