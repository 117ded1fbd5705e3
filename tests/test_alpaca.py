"""AlpacaEval 2 on the real data: published numbers, the official tool beside ours, and what must not matter."""
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
from dolly_lora.judge import Reply, Scripted

try:
    from hypothesis import given, settings, strategies as st
except ImportError: st = None

MODELS = ("alpaca-7b", "vicuna-7b-v1.5")
COUNTS = ("n_wins", "n_wins_base", "n_draws", "n_total", "avg_length")
KEYS = {"win_rate", "standard_error", *COUNTS, "discrete_win_rate", "length_controlled_winrate", "lc_standard_error"}


@pytest.fixture(scope="module")
def data(shared): return shared / "eval" / "alpaca_eval"


@pytest.fixture(scope="module")
def expected(shared): return json.loads((shared / "eval" / "expected.json").read_text())["alpaca_eval"]


@pytest.fixture(scope="module")
def both(data): return dict(difficulty=data / "instruction_difficulty.csv", gamed=data / "df_gamed.csv.xz")


@pytest.fixture(scope="module")
def annotations(data):
    with lzma.open(data / "alpaca-7b/annotations.json.xz", "rt") as f: rows = json.load(f)
    return [{k: v for k, v in r.items() if k != "raw_completion"} for r in rows]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("model", MODELS)
def test_published_numbers(data, expected, both, model):
    published, path = expected[model]["published"], data / model / "annotations.json.xz"
    result = alpaca.score(path, **both, positional=True)
    assert result.keys() == KEYS and all(result[k] == published[k] for k in COUNTS)
    for k in ("win_rate", "standard_error", "discrete_win_rate"): assert result[k] == pytest.approx(published[k], abs=1e-6)
    assert result["length_controlled_winrate"] == pytest.approx(published["length_controlled_winrate"], abs=0.12)
    official = expected[model]["recomputed_alpaca_eval_0.6.6_with_reconstructed_df_gamed"]
    for k in ("length_controlled_winrate", "lc_standard_error"): assert result[k] == pytest.approx(official[k], abs=1e-4)
    assert alpaca.score(path, **both) == pytest.approx(result, abs=1e-9)      # whole and in order: aligning by text changes nothing


def test_rows_in_any_order_and_in_any_form(annotations, both, data):
    there = alpaca.score(annotations, **both)
    mixed = random.Random(0).sample(annotations, len(annotations))
    assert alpaca.score(mixed, **both) == there and alpaca.bootstrap(mixed) == alpaca.bootstrap(annotations)
    frames = dict(difficulty=pd.read_csv(both["difficulty"], index_col=0), gamed=pd.read_csv(both["gamed"]))
    assert alpaca.score(pd.DataFrame(mixed), **frames) == there
    by_text = {r["instruction"]: d for r, d in zip(annotations, frames["difficulty"].instruction_difficulty)}
    assert alpaca.score(mixed, difficulty=by_text, gamed=frames["gamed"]) == there
    moved = alpaca.score(mixed, **both, positional=True)                      # what the official tool makes of a shuffled file
    assert abs(moved["length_controlled_winrate"] - there["length_controlled_winrate"]) > 2 and moved["win_rate"] == pytest.approx(there["win_rate"])


def test_rows_without_a_preference_drop_out(annotations, both):
    holes = [dict(r, preference=[None, float("nan"), 0, 1.5][i % 4] if i < 40 else r["preference"]) for i, r in enumerate(annotations)]
    result = alpaca.score(holes, **both)
    assert result["n_total"] == 785 and result["n_draws"] == 20 + sum(r["preference"] == 1.5 for r in annotations[40:])
    kept = alpaca.score([r for r in holes if r["preference"] == r["preference"] is not None], **both)
    assert kept["win_rate"] == result["win_rate"] and abs(kept["length_controlled_winrate"] - result["length_controlled_winrate"]) < 0.2
    with pytest.raises(DataError, match="none of 805"): alpaca.score([dict(r, preference=None) for r in annotations])


def test_refused_with_a_reason(annotations, both):
    def refused(rows, **kw): return alpaca.score(rows, **both | kw)
    each = lambda **change: [dict(r, **change) for r in annotations]
    for rows, kw, why in ((each(preference=1.5), {}, "tie"), (each(output_1="ab", output_2="a"), {}, "same number"), (each(generator_1="base"), {}, "reference is base"),
                          (annotations, dict(gamed=None), "df_gamed"), (annotations, dict(difficulty=None), "instruction_difficulty"),
                          (annotations[1:] + [dict(annotations[0], instruction="What is new?")], {}, "1 of 805 instructions have no difficulty"),
                          (annotations + annotations[:2], {}, "2 instructions stand twice"), (annotations[5:6], {}, "same number"),
                          (annotations + annotations[:2], dict(positional=True), "2 of 807")):
        result = refused(rows, **kw)
        assert result.keys() == KEYS | {"lc_refused"} and why in result["lc_refused"], result
        assert result["length_controlled_winrate"] is None and result["lc_standard_error"] is None and result["win_rate"] is not None
    itself = refused(each(generator_2=alpaca.REFERENCE, preference=1.5))
    assert itself["length_controlled_winrate"] == itself["win_rate"] == 50 and itself["lc_standard_error"] == 0
    part = refused(annotations[::8])                                           # a subset keeps its own difficulties
    assert part["n_total"] == 101 and 1 < part["length_controlled_winrate"] < 15


@pytest.mark.parametrize("rows, why", [([], "without `instruction`"), ([dict(instruction="a")], "without `output_1`"), ("nowhere.json", "cannot read nowhere.json"), ([1, 2], "without `instruction`"), ([dict(instruction="a"), 5], "without `instruction`"),
                                       ([dict(instruction="a", output_1="b", output_2="c", generator_1="d", generator_2="e", preference=p) for p in ("1.5x", [1], None, 10**400, {}, float("inf"))], "none of 6")])
def test_bad_annotations_give_one_line(rows, why):
    with pytest.raises(DataError, match=why) as e: alpaca.score(rows)
    assert "\n" not in str(e.value)


def test_length_control_with_another_judge_is_refused_and_the_published_one_s_is_not(annotations, both):
    there = alpaca.score(annotations, **both)
    assert {r["annotator"] for r in annotations} == {"weighted_alpaca_eval_gpt4_turbo"} and there["length_controlled_winrate"] is not None
    plain = [{k: v for k, v in r.items() if k != "annotator"} for r in annotations]
    for rows in plain, [dict(r, annotator="gpt-4-1106-preview") for r in annotations]: assert alpaca.score(rows, **both) == there
    for rows in [dict(r, annotator="qwen-7b") for r in annotations], [dict(annotations[0], annotator="local tiny"), *annotations[1:]]:
        result = alpaca.score(rows, **both)
        assert result["length_controlled_winrate"] is None and "the judge is" in result["lc_refused"] and "gpt-4-1106-preview" in result["lc_refused"] and result["win_rate"] == there["win_rate"]


def test_difficulties_that_are_not_the_published_ones_are_rejected(data, tmp_path, monkeypatch):
    values = pd.read_csv(data / "instruction_difficulty.csv")
    def given(table, gamed="97aeec3f"):
        table.to_csv(tmp_path / "d.csv", index=False)
        monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repo, name, repo_type: str(tmp_path / "d.csv"))
        monkeypatch.setattr(alpaca, "file_sha256", lambda path: gamed + "0" * 56)
        return alpaca.length_control_files()
    assert given(values) == (str(tmp_path / "d.csv"),) * 2 and given(values.sample(frac=1, random_state=0))
    near = values.assign(instruction_difficulty=values.instruction_difficulty + np.random.default_rng(0).uniform(-5e-8, 5e-8, 805))
    assert given(near)
    swapped = values.assign(instruction_difficulty=values.instruction_difficulty.to_numpy()[[1, 0, *range(2, 805)]])
    one_off = values.assign(instruction_difficulty=values.instruction_difficulty + 0.01 * (values["index"] == 700))
    for wrong in values[1:], values * 1.001, swapped, one_off, values.assign(instruction_difficulty=np.nan), values.assign(instruction_difficulty="x"), values.drop(columns="index"), values.assign(index=0):
        with pytest.raises(DataError) as e: given(wrong)
        assert "\n" not in str(e.value)
    with pytest.raises(DataError, match="df_gamed.csv .* is not the file"): given(values, "deadbeef")


def test_a_bootstrap_without_a_valid_row_is_none(annotations):
    none = [dict(r, preference=None) for r in annotations[:5]]
    assert alpaca.bootstrap(none) == dict(win_rate=None, low=None, high=None) and {v["pairs"] for v in alpaca.length_effect(none).values()} == {0}


@pytest.mark.skipif(st is None, reason="hypothesis is not installed")
def test_any_file_is_read_or_refused_in_one_line(tmp_path):
    value = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=[])), lambda v: st.lists(v, max_size=3) | st.dictionaries(st.sampled_from(["instruction", "output_1", "output_2", "generator_1", "generator_2", "preference", "annotator"]), v, max_size=7), max_leaves=20)
    whole = st.lists(st.fixed_dictionaries(dict.fromkeys(("instruction", "output_1", "output_2"), st.text()) | dict(generator_1=st.just("a"), generator_2=st.just("b"), preference=value)), min_size=1, max_size=4)
    @settings(max_examples=200, deadline=None)
    @given(st.binary(), value | whole)
    def is_read(data, rows):
        (tmp_path / "raw.json").write_bytes(data); (tmp_path / "rows.json").write_text(json.dumps(rows))
        for read in (lambda: alpaca.load_instructions(tmp_path / "raw.json"), lambda: alpaca.load_instructions(tmp_path / "rows.json"), lambda: alpaca.score(tmp_path / "rows.json"), lambda: alpaca.score(rows)):
            try: read()
            except DollyError as e: assert "\n" not in str(e)
    is_read()


def test_two_models_at_once_are_not_mixed(annotations):
    with pytest.raises(DataError, match="2 names under generator_2"): alpaca.score([dict(annotations[0], generator_2="x"), annotations[1]])
    with pytest.raises(DataError, match="have to be texts"): alpaca.score([dict(annotations[0], output_2=None)])


def test_official_order_and_files(data, tmp_path):
    rows = alpaca.load_instructions(data / "instructions.json.xz")
    assert [alpaca.official_position(r["instruction"]) for r in rows] == list(range(805)) and rows[0].keys() == {"dataset", "instruction"}
    reference = data / "gpt4_1106_preview/model_outputs.json.xz"
    plain = tmp_path / "model_outputs.json"
    plain.write_bytes(lzma.decompress(reference.read_bytes()))
    def fetch(url, sha256):
        import hashlib
        assert hashlib.sha256(plain.read_bytes()).hexdigest() == sha256 and url.endswith("gpt4_1106_preview/model_outputs.json")
        return plain
    with pytest.MonkeyPatch.context() as m:
        m.setattr(alpaca, "fetch", fetch)
        assert alpaca.load_reference() == alpaca.load_reference(reference) and alpaca.load_instructions("official") == rows
    for text, why in (("{", "not JSON"), ("{}", "list of objects"), ('[{"instruction": 3}]', "entry 1: no text under `instruction`")):
        plain.write_text(text)
        with pytest.raises(DataError, match=why): alpaca.load_instructions(plain)
    for text, why in ("[" * 100_000, "not JSON that can be read"), ("[" + "9" * 5000 + "]", "not JSON that can be read"), ('[{"instruction": "half \\ud83d"}]', "entry 1: no text under `instruction`"):
        plain.write_text(text)
        with pytest.raises(DataError, match=why): alpaca.load_instructions(plain)
    (tmp_path / "b.json.xz").write_bytes(lzma.compress(b"[]" * 1000)[:40])
    with pytest.raises(DataError, match="ending"): alpaca.load_instructions(tmp_path / "b.json.xz")
    (tmp_path / "a.json.xz").write_bytes(b"no xz")
    with pytest.raises(DataError, match="ending"): alpaca.load_instructions(tmp_path / "a.json.xz")


def official_judge(answer, name="gpt-4-1106-preview"):
    judge = Scripted(answer)
    judge.name, judge.official = name, True
    return judge


def test_official_prompt_and_replies(data, tmp_path):
    template = alpaca.judge_prompt(data / "alpaca_eval_clf.txt")
    assert [role for role, _ in template] == ["system", "user"] and template[1][1].endswith("## Best Model Identifier")
    asked = []
    def answer(q):
        asked.append(q)
        return Reply(logprobs={"m": -0.7}) if "A{output_2}" in q.messages[1][1].split('"M"')[0] else Reply(text="M")
    rows = [[dict(instruction="{output_1}?", output=t, generator=g)] for g, t in (("a", "A{output_2}"), ("b", "B"))]
    result, = alpaca.compare(official_judge(answer), *rows, tmp_path / "j.jsonl", template, log=lambda line: None)
    assert result["orders"] == [0.0, 0.0] and result["preference"] == 1 and result["annotator"] == "gpt-4-1106-preview"
    text = (data / "alpaca_eval_clf.txt").read_text().replace("{output_2}", "B").replace("{output_1}", "A{output_2}").replace("{instruction}", "{output_1}?")
    assert asked[0].choices == ("m", "M") and asked[0].max_tokens == 1 and not asked[0].lead
    assert asked[0].messages[1][1] == text.split("<|im_start|>user\n")[1].split("<|im_end|>")[0].strip()
    (tmp_path / "x.txt").write_text("no prompt")
    with pytest.raises(DataError, match="not a judge prompt"): alpaca.judge_prompt(tmp_path / "x.txt")
    with pytest.raises(DataError, match="no file at"): alpaca.judge_prompt(tmp_path / "y.txt")


@pytest.mark.parametrize("logprobs, p", [({"A": float("nan"), "B": -0.1}, 1.0), ({"A": float("-inf"), "B": -0.1}, 1.0), ({"A": float("inf"), "B": float("nan")}, None), ({"A": -3000.0, "B": 0.0}, 1.0)])
def test_odds_that_are_no_numbers_decide_nothing(logprobs, p):
    assert alpaca.second_is_better(Reply(logprobs=logprobs), ("A", "B")) == p


def random_judge(question):
    """Some judgment of what is shown, places included; a fifth of the replies is no judgment."""
    rng = np.random.default_rng(list(str(question.messages).encode()))
    if rng.random() < 0.2: return rng.choice([Reply(text="Neither"), Reply(error="HTTP 500")])
    return Reply(logprobs={c: float(-rng.exponential(3)) for c in question.choices})


def test_invariants_of_both_orders(tmp_path):
    asked = alpaca.load_instructions("sample")
    a, b = ([dict(r, output=f"{name} {i}", generator=name) for i, r in enumerate(asked)] for name in "ab")
    there, back = (alpaca.compare(Scripted(random_judge), *pair, tmp_path / "j.jsonl", log=lambda line: None) for pair in ((a, b), (b, a)))
    assert 0 < alpaca.consistency(there)["invalid"] < 16 and alpaca.consistency(there)["contradicted"] > 0
    for x, y in zip(there, back):
        assert (x["preference"] is None) == (y["preference"] is None)
        if x["preference"] is not None: assert x["preference"] - 1 == pytest.approx(2 - y["preference"], abs=1e-12)
    itself = alpaca.compare(Scripted(random_judge), a, a, tmp_path / "j.jsonl", log=lambda line: None)
    assert {r["preference"] for r in itself} <= {1.5, None} and alpaca.score(itself)["win_rate"] == alpaca.score(itself)["length_controlled_winrate"] == 50
    first = alpaca.compare(Scripted(lambda q: Reply(logprobs={"A": -0.3, "B": -2.1})), a, b, tmp_path / "k.jsonl", log=lambda line: None)
    assert alpaca.score(first)["win_rate"] == 50 and alpaca.score(first)["n_draws"] == 16 and alpaca.consistency(first)["contradicted"] == 100
    with pytest.raises(DollyError, match="no answer to 1 of 16"): alpaca.compare(Scripted(random_judge), a[1:], b, tmp_path / "l.jsonl")


PINS = ["setuptools<81", "pandas<3", "scikit-learn==1.7.2", "patsy<2", "fire<1", "python-dotenv<2", "openai<3", "tiktoken<1"]   # what it needs beside the library's own
TOOL = """
import json, logging, sys, warnings
warnings.filterwarnings("ignore")
import alpaca_eval
from alpaca_eval import metrics
folder, difficulty, gamed = sys.argv[1:]
metrics.glm_winrate.hf_hub_download = lambda filename, **kwargs: gamed if "gamed" in filename else difficulty
board, rows = alpaca_eval.evaluate(folder + "/model_outputs.json", folder + "/reference.json", caching_path=folder + "/annotations.json", output_path=None,
                                   precomputed_leaderboard=None, is_return_instead_of_print=True, metric_kwargs=dict(save_weights_dir=None))
out = [board.iloc[0].to_dict()]
for name in "holes", "shuffled", "part":
    with open(f"{folder}/{name}.json") as f: out.append(metrics.get_length_controlled_winrate(json.load(f), save_weights_dir=None))
print(json.dumps([{k: float(v) for k, v in r.items() if k != "mode"} for r in out]))
"""


@pytest.fixture(scope="session")
def official_python(request):
    """Python with the official tool as it still runs: a virtual environment kept in pytest's cache, on top of what is installed here."""
    folder = request.config.cache.mkdir("alpaca_eval_0.6.6")
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        venv.create(folder, clear=True)
        here = [p for p in sys.path if p.rstrip("/").endswith(("site-packages", "dist-packages"))]
        target = sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)})
        (type(folder)(target) / "below.pth").write_text("\n".join(here))
        env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        for wanted in PINS, ["--no-deps", "alpaca_eval==0.6.6"]:
            done = subprocess.run([python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *wanted], env=env, capture_output=True, text=True)
            if done.returncode: pytest.skip(f"the official tool cannot be installed: {done.stderr.strip().splitlines()[-1]}")
        (folder / "ready").touch()
    return python


def test_official_tool_takes_our_files_and_agrees(data, both, annotations, official_python, tmp_path):
    def wordy(q):                                                             # a judge of our own, deterministic, with a taste for length
        m, M = q.messages[1][1].split('"output": ')[1:]
        x = (len(m) - len(M)) / 500 + np.random.default_rng(len(m)).normal()
        return Reply(logprobs={"m": -float(np.logaddexp(0, -x)), "M": -float(np.logaddexp(0, x))})
    reference, outputs = alpaca.load_reference(data / "gpt4_1106_preview/model_outputs.json.xz"), alpaca.load_reference(data / "llama-2-7b-chat-hf/model_outputs.json.xz")
    judge, template = official_judge(wordy, "weighted_alpaca_eval_gpt4_turbo"), alpaca.judge_prompt(data / "alpaca_eval_clf.txt")
    ours = alpaca.compare(judge, reference, outputs, tmp_path / "replies.jsonl", template, log=lambda line: None)
    holes = [dict(r, preference=None if i % 9 == 0 else r["preference"]) for i, r in enumerate(ours)]
    sets = dict(annotations=ours, holes=holes, shuffled=random.Random(0).sample(annotations, 805), part=annotations[3:500:2])
    for name, rows in dict(reference=reference, model_outputs=outputs, **sets).items(): (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    (tmp_path / "df_gamed.csv").write_bytes(lzma.decompress(both["gamed"].read_bytes()))
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([official_python, "-c", TOOL, tmp_path, both["difficulty"], tmp_path / "df_gamed.csv"], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for (name, rows), theirs in zip(sets.items(), json.loads(done.stdout.splitlines()[-1])):
        mine = alpaca.score(rows, **both, positional=True)
        assert mine == pytest.approx({"avg_length": mine["avg_length"]} | theirs, abs=1e-4), name
