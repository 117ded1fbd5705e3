"""AlpacaEval 2 on the real data: published numbers, the official tool, and what must not matter."""
import hashlib
import json
import lzma
import os
import random
import subprocess
import sys
import sysconfig
import venv

import numpy as np
import pandas as pd
import pytest

from dolly_lora import alpaca
from dolly_lora.config import DollyError
from dolly_lora.data import DataError
from dolly_lora.files import write_json
from dolly_lora.judge import Reply, Scripted

try:
    from hypothesis import given, settings, strategies as st
except ImportError: st = None

MODELS = ("alpaca-7b", "vicuna-7b-v1.5")
COUNTS = ("n_wins", "n_wins_base", "n_draws", "n_total", "avg_length")
LC = ("length_controlled_winrate", "lc_standard_error")
KEYS = {"win_rate", "standard_error", *COUNTS, "discrete_win_rate", *LC}


def quiet(line): pass


@pytest.fixture(scope="module")
def data(shared): return shared / "eval" / "alpaca_eval"


@pytest.fixture(scope="module")
def expected(shared):
    return json.loads((shared / "eval" / "expected.json").read_text())["alpaca_eval"]


@pytest.fixture(scope="module")
def both(data):
    return dict(difficulty=data / "instruction_difficulty.csv", gamed=data / "df_gamed.csv.xz")


@pytest.fixture(scope="module")
def annotations(data):
    with lzma.open(data / "alpaca-7b/annotations.json.xz", "rt") as f: rows = json.load(f)
    return [{k: v for k, v in r.items() if k != "raw_completion"} for r in rows]


# The published numbers

@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("model", MODELS)
def test_published_numbers(data, expected, both, model):
    published, path = expected[model]["published"], data / model / "annotations.json.xz"
    result = alpaca.score(path, **both, positional=True)
    assert result.keys() == KEYS and all(result[k] == published[k] for k in COUNTS)
    for k in "win_rate", "standard_error", "discrete_win_rate":
        assert result[k] == pytest.approx(published[k], abs=1e-6)
    assert result[LC[0]] == pytest.approx(published[LC[0]], abs=0.12)
    official = expected[model]["recomputed_alpaca_eval_0.6.6_with_reconstructed_df_gamed"]
    for k in LC: assert result[k] == pytest.approx(official[k], abs=1e-4)
    # whole and in order: aligning by text changes nothing
    assert alpaca.score(path, **both) == pytest.approx(result, abs=1e-9)


def test_rows_in_any_order_and_in_any_form(annotations, both):
    there = alpaca.score(annotations, **both)
    mixed = random.Random(0).sample(annotations, len(annotations))
    assert alpaca.score(mixed, **both) == there
    assert alpaca.bootstrap(mixed) == alpaca.bootstrap(annotations)
    frames = dict(difficulty=pd.read_csv(both["difficulty"], index_col=0),
                  gamed=pd.read_csv(both["gamed"]))
    assert alpaca.score(pd.DataFrame(mixed), **frames) == there
    values = frames["difficulty"].instruction_difficulty
    by_text = {r["instruction"]: d for r, d in zip(annotations, values)}
    assert alpaca.score(mixed, difficulty=by_text, gamed=frames["gamed"]) == there
    # what the official tool makes of a shuffled file
    moved = alpaca.score(mixed, **both, positional=True)
    assert abs(moved[LC[0]] - there[LC[0]]) > 2
    assert moved["win_rate"] == pytest.approx(there["win_rate"])


def test_rows_without_a_preference_drop_out(annotations, both):
    odd = [None, float("nan"), 0, 1.5]
    holes = [dict(r, preference=odd[i % 4] if i < 40 else r["preference"])
             for i, r in enumerate(annotations)]
    result = alpaca.score(holes, **both)
    assert result["n_total"] == 785
    assert result["n_draws"] == 20 + sum(r["preference"] == 1.5 for r in annotations[40:])
    whole = [r for r in holes if r["preference"] == r["preference"] is not None]
    kept = alpaca.score(whole, **both)
    assert kept["win_rate"] == result["win_rate"]
    assert abs(kept[LC[0]] - result[LC[0]]) < 0.2
    with pytest.raises(DataError, match="none of 805"):
        alpaca.score([dict(r, preference=None) for r in annotations])


# Where a length-controlled rate is refused

def test_refused_with_a_reason(annotations, both):
    def each(**change): return [dict(r, **change) for r in annotations]
    def refused(rows, why, **how):
        result = alpaca.score(rows, **both | how)
        assert result.keys() == KEYS | {"lc_refused"} and why in result["lc_refused"], result
        assert result[LC[0]] is None and result[LC[1]] is None and result["win_rate"] is not None
    refused(each(preference=1.5), "tie")
    refused(each(output_1="ab", output_2="a"), "same number")
    refused(each(generator_1="base"), "reference is base")
    refused(annotations, "df_gamed", gamed=None)
    refused(annotations, "instruction_difficulty", difficulty=None)
    unknown = annotations[1:] + [dict(annotations[0], instruction="What is new?")]
    refused(unknown, "1 of 805 instructions have no difficulty")
    refused(annotations + annotations[:2], "2 instructions stand twice")
    refused(annotations + annotations[:2], "2 of 807", positional=True)
    refused(annotations[5:6], "same number")
    itself = alpaca.score(each(generator_2=alpaca.REFERENCE, preference=1.5), **both)
    assert itself[LC[0]] == itself["win_rate"] == 50 and itself[LC[1]] == 0
    part = alpaca.score(annotations[::8], **both)  # a subset keeps its own difficulties
    assert part["n_total"] == 101 and 1 < part[LC[0]] < 15


def test_another_judge_is_refused_and_the_published_one_is_not(annotations, both):
    there = alpaca.score(annotations, **both)
    assert {r["annotator"] for r in annotations} == {"weighted_alpaca_eval_gpt4_turbo"}
    assert there[LC[0]] is not None
    plain = [{k: v for k, v in r.items() if k != "annotator"} for r in annotations]
    for rows in plain, [dict(r, annotator="gpt-4-1106-preview") for r in annotations]:
        assert alpaca.score(rows, **both) == there
    for rows in ([dict(r, annotator="qwen-7b") for r in annotations],
                 [dict(annotations[0], annotator="local tiny"), *annotations[1:]],
                 [dict(annotations[0], annotator=["a", "list"]), *annotations[1:]]):
        result = alpaca.score(rows, **both)
        assert result[LC[0]] is None and result["win_rate"] == there["win_rate"]
        assert "the judge is" in result["lc_refused"]
        assert "gpt-4-1106-preview" in result["lc_refused"]


# A judge whose habits we know

def made_up():
    "Verdicts on the same model, brief and wordy, by a judge that likes length; and the truth."
    rng = np.random.default_rng(0)
    d = rng.normal(size=805)
    z = np.concatenate([rng.normal(1, 0.5, 805), rng.normal(-1, 0.5, 805)])
    gamed = pd.DataFrame(dict(std_delta_len=z, instruction_difficulty=np.tile(d, 2),
                              preference=alpaca.sigmoid(-1.5 * np.tanh(z) - 0.8 * np.tile(d, 2))))
    names = [f"Made-up instruction {i}" for i in range(805)]
    def verdicts(times):
        lengths = rng.integers(500, 2500, 805), rng.integers(200, 800, 805) * times
        delta = lengths[0] - lengths[1]
        odds = -1.5 * np.tanh(delta / delta.std()) - 0.8 * d - 0.5
        won = rng.random(805) < alpaca.sigmoid(odds)
        return [dict(instruction=n, output_1="x" * a, output_2="y" * b, preference=1.0 + w,
                     generator_1=alpaca.REFERENCE, generator_2="made-up")
                for n, a, b, w in zip(names, *lengths, won)]
    files = dict(difficulty=dict(zip(names, d)), gamed=gamed)
    return verdicts(1), verdicts(3), files, 100 * alpaca.sigmoid(-0.5 - 0.8 * d).mean()


def test_length_control_finds_the_truth_in_any_order():
    brief, wordy, files, truth = made_up()
    scores = [alpaca.score(rows, **files) for rows in (brief, wordy)]
    assert scores[1]["win_rate"] - scores[0]["win_rate"] > 15
    assert all(abs(s[LC[0]] - truth) < 5 for s in scores)
    assert alpaca.score(random.Random(0).sample(wordy, 805), **files) == scores[1]
    assert alpaca.bootstrap(wordy[::-1]) == alpaca.bootstrap(wordy)
    itself = [dict(r, generator_2=alpaca.REFERENCE, preference=1.5) for r in wordy]
    assert alpaca.score(itself)[LC[0]] == 50
    longer, shorter = (alpaca.length_effect(wordy)[k]["win_rate"] for k in ("longer", "shorter"))
    assert longer > shorter + 20


def test_a_made_up_table_is_refused_where_it_means_nothing():
    brief, wordy, files, _ = made_up()
    unknown = dict(brief[0], instruction="Never heard of")
    for rows, why in (([dict(r, preference=1.5) for r in wordy], "every verdict is a tie"),
                      ([dict(r, output_1="x", output_2="y") for r in wordy], "the same number"),
                      ([dict(r, annotator="qwen-7b") for r in wordy], "the judge is qwen-7b"),
                      ([*wordy, unknown], "1 of 806 instructions have no difficulty"),
                      ([*wordy, wordy[0]], "1 instructions stand twice")):
        assert why in alpaca.score(rows, **files)["lc_refused"]


# The two tables

def given_by_the_hub(monkeypatch, tmp_path, table, gamed=alpaca.GAMED_SHA256):
    path = str(tmp_path / "d.csv")
    table.to_csv(path, index=False)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repo, name, repo_type: path)
    monkeypatch.setattr(alpaca, "file_sha256", lambda path: gamed)
    return alpaca.length_control_files() == (path, path)


def test_the_published_difficulties_are_taken(data, tmp_path, monkeypatch):
    values = pd.read_csv(data / "instruction_difficulty.csv")
    assert given_by_the_hub(monkeypatch, tmp_path, values)
    assert given_by_the_hub(monkeypatch, tmp_path, values.sample(frac=1, random_state=0))
    for seed in range(20):  # as far off as the recovery may be
        error = np.random.default_rng(seed).uniform(-5e-8, 5e-8, 805)
        near = values.assign(instruction_difficulty=values.instruction_difficulty + error)
        assert given_by_the_hub(monkeypatch, tmp_path, near)


def test_difficulties_that_are_not_the_published_ones_are_rejected(data, tmp_path, monkeypatch):
    """Issue 10: the check compared eight sums, which a file up to 11.6 off can have."""
    values = pd.read_csv(data / "instruction_difficulty.csv")
    numbers = values.instruction_difficulty.to_numpy()
    waves = np.cos(np.outer(np.arange(1, 9), np.arange(805)))  # the eight sums' weights
    change = np.random.default_rng(0).normal(size=805)
    change -= waves.T @ np.linalg.solve(waves @ waves.T, waves @ change)
    assert np.abs(waves @ change).max() < 1e-9 and np.abs(change).max() > 1
    def with_numbers(numbers): return values.assign(instruction_difficulty=numbers)
    off = np.zeros(805)
    off[700] = 1
    wrong = dict(fewer=values[1:], scaled=values * 1.001, hidden=with_numbers(numbers + change),
                 swapped=with_numbers(numbers[[1, 0, *range(2, 805)]]),
                 one_off=with_numbers(numbers + 0.01 * off),
                 barely_off=with_numbers(numbers + 1e-4 * off), nan=with_numbers(np.nan),
                 infinite=with_numbers(np.where(off, np.inf, numbers)), text=with_numbers("x"),
                 no_index=values.drop(columns="index"), zero=values.assign(index=0))
    for name, table in wrong.items():
        with pytest.raises(DataError) as e: given_by_the_hub(monkeypatch, tmp_path, table)
        assert "\n" not in str(e.value), name


def test_the_gamed_rows_are_known_by_their_whole_checksum(data, tmp_path, monkeypatch):
    values = pd.read_csv(data / "instruction_difficulty.csv")
    for digits in "deadbeef", "97aeec3f":  # the first eight used to be enough
        with pytest.raises(DataError, match="df_gamed.csv .* is not the file"):
            given_by_the_hub(monkeypatch, tmp_path, values, gamed=digits + "0" * 56)


# Malformed files

ODD = ("1.5x", [1], None, 10**400, {}, float("inf"))
NO_NUMBERS = [dict(instruction="a", output_1="b", output_2="c", generator_1="d", generator_2="e",
                   preference=p) for p in ODD]


@pytest.mark.parametrize("rows, why", [
    ([], "without `instruction`"), ([dict(instruction="a")], "without `output_1`"),
    ("nowhere.json", "cannot read nowhere.json"), ([1, 2], "without `instruction`"),
    ([dict(instruction="a"), 5], "without `instruction`"), (NO_NUMBERS, "none of 6")])
def test_bad_annotations_give_one_line(rows, why):
    with pytest.raises(DataError, match=why) as e: alpaca.score(rows)
    assert "\n" not in str(e.value)


def test_two_models_at_once_are_not_mixed(annotations):
    with pytest.raises(DataError, match="2 names under generator_2"):
        alpaca.score([dict(annotations[0], generator_2="x"), annotations[1]])
    with pytest.raises(DataError, match="have to be texts"):
        alpaca.score([dict(annotations[0], output_2=None)])


def test_a_bootstrap_without_a_valid_row_is_none(annotations):
    none = [dict(r, preference=None) for r in annotations[:5]]
    assert alpaca.bootstrap(none) == dict(win_rate=None, low=None, high=None)
    assert {v["pairs"] for v in alpaca.length_effect(none).values()} == {0}


@pytest.mark.parametrize("text, why", [
    ("{", "not JSON"), ("{}", "list of objects"), ("[]", "list of objects"), ("[7]", "entry 1"),
    ('[{"instruction": 3}]', "entry 1: no text under `instruction`"),
    ("[" * 100_000, "JSON that cannot be read"),
    ("[" + "9" * 5000 + "]", "JSON that cannot be read"),
    ('[{"instruction": "half \\ud83d"}]', "entry 1: no text under `instruction`"),
    ('[{"instruction": "a", "dataset": "\\ud800"}]', "entry 1: no text under `dataset`"),
    ('[{"instruction": "a"}, {"instruction": "a", "dataset": [1]}]', "entry 2: no text")],
    ids=range(10))
def test_a_bad_instructions_file_gives_one_line(tmp_path, text, why):
    (tmp_path / "i.json").write_text(text)
    with pytest.raises(DataError, match=why) as e: alpaca.load_instructions(tmp_path / "i.json")
    assert "\n" not in str(e.value)


def test_what_is_loaded_can_be_written(tmp_path):
    (tmp_path / "i.json").write_text('[{"instruction": "a"}, {"instruction": "b", "dataset": "c"}]')
    rows = alpaca.load_instructions(tmp_path / "i.json")
    assert [r["dataset"] for r in rows] == ["unknown", "c"]
    write_json(tmp_path / "o.json", rows)


def test_a_torn_archive_gives_one_line(tmp_path):
    (tmp_path / "b.json.xz").write_bytes(lzma.compress(b"[]" * 1000)[:40])
    (tmp_path / "a.json.xz").write_bytes(b"no xz")
    for name in "a", "b":
        with pytest.raises(DataError, match="ending"):
            alpaca.load_instructions(tmp_path / f"{name}.json.xz")


@pytest.mark.skipif(st is None, reason="hypothesis is not installed")
def test_any_file_is_read_or_refused_in_one_line(tmp_path):
    names = ["instruction", "output_1", "output_2", "generator_1", "generator_2", "preference",
             "annotator"]
    scalars = (st.none() | st.booleans() | st.integers() | st.floats()
               | st.text(st.characters(exclude_categories=[])))
    value = st.recursive(scalars, lambda v: st.lists(v, max_size=3)
                         | st.dictionaries(st.sampled_from(names), v, max_size=7), max_leaves=20)
    texts = dict.fromkeys(names[:3], st.text())
    row = st.fixed_dictionaries(texts | dict(generator_1=st.just("a"), generator_2=st.just("b"),
                                             preference=value))
    raw, written = tmp_path / "raw.json", tmp_path / "rows.json"
    @settings(max_examples=200, deadline=None)
    @given(st.binary(), value | st.lists(row, min_size=1, max_size=4))
    def is_read(data, rows):
        raw.write_bytes(data)
        written.write_text(json.dumps(rows))
        for read, what in ((alpaca.load_instructions, raw), (alpaca.load_instructions, written),
                           (alpaca.score, written), (alpaca.score, rows)):
            try: read(what)
            except DollyError as e: assert "\n" not in str(e)
    is_read()


# Instructions, prompt and replies

def test_official_order_and_files(data, tmp_path, monkeypatch):
    rows = alpaca.load_instructions(data / "instructions.json.xz")
    positions = [alpaca.official_position(r["instruction"]) for r in rows]
    assert positions == list(range(805)) and rows[0].keys() == {"dataset", "instruction"}
    reference = data / "gpt4_1106_preview/model_outputs.json.xz"
    plain = tmp_path / "model_outputs.json"
    plain.write_bytes(lzma.decompress(reference.read_bytes()))
    def fetch(url, sha256):
        assert hashlib.sha256(plain.read_bytes()).hexdigest() == sha256
        assert url.endswith("gpt4_1106_preview/model_outputs.json")
        return plain
    monkeypatch.setattr(alpaca, "fetch", fetch)
    assert alpaca.load_reference() == alpaca.load_reference(reference)
    assert alpaca.load_instructions("official") == rows


def official_judge(answer, name="gpt-4-1106-preview"):
    judge = Scripted(answer)
    judge.name, judge.official = name, True
    return judge


def test_official_prompt_and_replies(data, tmp_path):
    template = alpaca.judge_prompt(data / "alpaca_eval_clf.txt")
    assert [role for role, _ in template] == ["system", "user"]
    assert template[1][1].endswith("## Best Model Identifier")
    asked = []
    def answer(q):
        asked.append(q)
        ours_first = "A{output_2}" in q.messages[1][1].split('"M"')[0]
        return Reply(logprobs={"m": -0.7}) if ours_first else Reply(text="M")
    one = [dict(instruction="{output_1}?", output="A{output_2}", generator="a")]
    two = [dict(instruction="{output_1}?", output="B", generator="b")]
    judge = official_judge(answer)
    result, = alpaca.compare(judge, one, two, tmp_path / "j.jsonl", template, log=quiet)
    assert result["orders"] == [0.0, 0.0] and result["preference"] == 1
    assert result["annotator"] == "gpt-4-1106-preview"
    text = (data / "alpaca_eval_clf.txt").read_text()
    for field, filled in (("output_2", "B"), ("output_1", "A{output_2}"),
                          ("instruction", "{output_1}?")):
        text = text.replace("{%s}" % field, filled)
    assert asked[0].choices == ("m", "M") and asked[0].max_tokens == 1 and not asked[0].lead
    user = text.split("<|im_start|>user\n")[1].split("<|im_end|>")[0].strip()
    assert asked[0].messages[1][1] == user


def test_a_prompt_that_cannot_be_had(tmp_path, monkeypatch):
    (tmp_path / "x.txt").write_text("no prompt")
    with pytest.raises(DataError, match="not a judge prompt"):
        alpaca.judge_prompt(tmp_path / "x.txt")
    with pytest.raises(DataError, match="no file at"): alpaca.judge_prompt(tmp_path / "y.txt")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DollyError, match="pip install --no-deps alpaca_eval"): alpaca.judge_prompt()


@pytest.mark.parametrize("logprobs, p", [
    ({"A": float("nan"), "B": -0.1}, 1.0), ({"A": float("-inf"), "B": -0.1}, 1.0),
    ({"A": float("inf"), "B": float("nan")}, None), ({"A": -3000.0, "B": 0.0}, 1.0)])
def test_odds_that_are_no_numbers_decide_nothing(logprobs, p):
    assert alpaca.second_is_better(Reply(logprobs=logprobs), ("A", "B")) == p


# What may be called AlpacaEval 2

def test_verdicts_are_counted_and_not_instructions(annotations, data):
    """Issue 10: 805 rows of which 802 have no preference were called official."""
    prompt, why = alpaca.judge_prompt(data / "alpaca_eval_clf.txt"), alpaca.why_unofficial
    rows = [dict(r, annotator="gpt-4-1106-preview") for r in annotations]
    assert why({"a": rows}, prompt) == ""
    ours = [dict(r, generator_1="base", output_1="mine") for r in rows]
    for none in None, float("nan"), "1.5x", 7:
        few = [dict(r, preference=none) if i > 2 else r for i, r in enumerate(rows)]
        assert why({"a": few}, prompt) == "802 of 805 verdicts are invalid"
        few_of_ours = [dict(r, preference=none) if i else r for i, r in enumerate(ours)]
        assert why({"a": rows, "b": few_of_ours}, prompt) == "804 of 805 verdicts are invalid"


# Both orders

def random_judge(question):
    """Some judgment of what is shown, places included; a fifth of the replies is no judgment."""
    rng = np.random.default_rng(list(str(question.messages).encode()))
    if rng.random() < 0.2: return rng.choice([Reply(text="Neither"), Reply(error="HTTP 500")])
    return Reply(logprobs={c: float(-rng.exponential(3)) for c in question.choices})


@pytest.fixture
def two_models():
    asked = alpaca.load_instructions("sample")
    return [[dict(r, output=f"{name} {i}", generator=name) for i, r in enumerate(asked)]
            for name in "ab"]


def test_swapped_answers_give_the_opposite_preference(two_models, tmp_path):
    (a, b), judge, path = two_models, Scripted(random_judge), tmp_path / "j.jsonl"
    there = alpaca.compare(judge, a, b, path, log=quiet)
    back = alpaca.compare(judge, b, a, path, log=quiet)
    assert 0 < alpaca.consistency(there)["invalid"] < 16
    assert alpaca.consistency(there)["contradicted"] > 0
    for x, y in zip(there, back):
        assert (x["preference"] is None) == (y["preference"] is None)
        if x["preference"] is not None:
            assert x["preference"] - 1 == pytest.approx(2 - y["preference"], abs=1e-12)


def test_a_model_against_itself_and_a_judge_of_places_give_50(two_models, tmp_path):
    a, b = two_models
    itself = alpaca.compare(Scripted(random_judge), a, a, tmp_path / "j.jsonl", log=quiet)
    assert {r["preference"] for r in itself} <= {1.5, None}
    assert alpaca.score(itself)["win_rate"] == alpaca.score(itself)[LC[0]] == 50
    always_a = Scripted(lambda q: Reply(logprobs={"A": -0.3, "B": -2.1}))
    first = alpaca.compare(always_a, a, b, tmp_path / "k.jsonl", log=quiet)
    assert alpaca.score(first)["win_rate"] == 50 and alpaca.score(first)["n_draws"] == 16
    assert alpaca.consistency(first)["contradicted"] == 100


def test_a_missing_answer_is_named(two_models, tmp_path):
    a, b = two_models
    with pytest.raises(DollyError, match="no answer to 1 of 16"):
        alpaca.compare(Scripted(random_judge), a[1:], b, tmp_path / "l.jsonl")


# The official tool itself

PINS = ["setuptools<81", "pandas<3", "scikit-learn==1.7.2", "patsy<2", "fire<1",
        "python-dotenv<2", "openai<3", "tiktoken<1"]  # what it needs beside the library's own
TOOL = """
import json, logging, sys, warnings
warnings.filterwarnings("ignore")
import alpaca_eval
from alpaca_eval import metrics
folder, difficulty, gamed = sys.argv[1:]
def download(filename, **kwargs): return gamed if "gamed" in filename else difficulty
metrics.glm_winrate.hf_hub_download = download
board, rows = alpaca_eval.evaluate(
    folder + "/model_outputs.json", folder + "/reference.json", output_path=None,
    caching_path=folder + "/annotations.json", precomputed_leaderboard=None,
    is_return_instead_of_print=True, metric_kwargs=dict(save_weights_dir=None))
out = [board.iloc[0].to_dict()]
for name in "holes", "shuffled", "part":
    with open(f"{folder}/{name}.json") as f: rows = json.load(f)
    out.append(metrics.get_length_controlled_winrate(rows, save_weights_dir=None))
print(json.dumps([{k: float(v) for k, v in r.items() if k != "mode"} for r in out]))
"""


@pytest.fixture(scope="session")
def official_python(request):
    """Python with the official tool, in pytest's cache, on top of what is installed here."""
    folder = request.config.cache.mkdir("alpaca_eval_0.6.6")
    python = folder / "bin" / "python"
    if (folder / "ready").exists(): return python
    venv.create(folder, clear=True)
    here = [p for p in sys.path if p.rstrip("/").endswith(("site-packages", "dist-packages"))]
    places = {"base": str(folder), "platbase": str(folder)}
    target = type(folder)(sysconfig.get_path("purelib", "venv", places))
    (target / "below.pth").write_text("\n".join(here))
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    for wanted in PINS, ["--no-deps", "alpaca_eval==0.6.6"]:
        done = subprocess.run([*pip, *wanted], env=env, capture_output=True, text=True)
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1]
            pytest.skip(f"the official tool cannot be installed: {last}")
    (folder / "ready").touch()
    return python


def likes_length(question):
    "A judge of our own, deterministic, with a taste for length."
    m, M = question.messages[1][1].split('"output": ')[1:]
    x = (len(m) - len(M)) / 500 + np.random.default_rng(len(m)).normal()
    return Reply(logprobs={"m": -float(np.logaddexp(0, -x)), "M": -float(np.logaddexp(0, x))})


def test_official_tool_takes_our_files_and_agrees(data, both, annotations, official_python,
                                                  tmp_path):
    reference = alpaca.load_reference(data / "gpt4_1106_preview/model_outputs.json.xz")
    outputs = alpaca.load_reference(data / "llama-2-7b-chat-hf/model_outputs.json.xz")
    judge = official_judge(likes_length, "weighted_alpaca_eval_gpt4_turbo")
    template = alpaca.judge_prompt(data / "alpaca_eval_clf.txt")
    ours = alpaca.compare(judge, reference, outputs, tmp_path / "r.jsonl", template, log=quiet)
    holes = [dict(r, preference=None if i % 9 == 0 else r["preference"])
             for i, r in enumerate(ours)]
    sets = dict(annotations=ours, holes=holes, shuffled=random.Random(0).sample(annotations, 805),
                part=annotations[3:500:2])
    for name, rows in dict(reference=reference, model_outputs=outputs, **sets).items():
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    gamed = tmp_path / "df_gamed.csv"
    gamed.write_bytes(lzma.decompress(both["gamed"].read_bytes()))
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([official_python, "-c", TOOL, tmp_path, both["difficulty"], gamed],
                          env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for (name, rows), theirs in zip(sets.items(), json.loads(done.stdout.splitlines()[-1])):
        mine = alpaca.score(rows, **both, positional=True)
        theirs = {"avg_length": mine["avg_length"]} | theirs
        assert mine == pytest.approx(theirs, abs=1e-4), name
