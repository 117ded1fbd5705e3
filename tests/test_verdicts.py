"""Verdicts: what is official, several judges, judges that say nothing, what one costs."""
import json
import lzma
import re
import subprocess
import sys
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest

from conftest import ROOT
from dolly_lora import alpaca, mtbench, verdicts
from dolly_lora.config import PRESETS, DollyError
from dolly_lora.files import file_sha256, read_json, write_json, write_jsonl
from dolly_lora.generate import make_answerer
from dolly_lora.judge import Question, Reply, Scripted
from dolly_lora.mtbench import OWN_PROMPTS, load_questions
from dolly_lora.results import (
    CONTENDERS, Consistency, Examination, Metrics, read_metrics, TestResult as Result, to_json)

TINY = PRESETS["tiny"]
RECORDS = [dict(instruction=f"Name thing {i}", context="", response=f"Thing {i}.",
                category="open_qa") for i in range(5)]
# stand-ins under the official names
PROMPTS = {name.removeprefix("dolly-"): p for name, p in OWN_PROMPTS.items()}
TEMPLATE = (("user", "{instruction}\n\nm: {output_1}\n\nM: {output_2}"),)
REFERENCE = "gpt4_1106_preview/model_outputs.json.xz"


def choosing(question: Question):
    "Likes what is shown second; rates everything 7."
    if len(question.choices) == 2:
        return Reply(logprobs={question.choices[0]: -2.0, question.choices[1]: -0.2})
    return Reply(logprobs={"7": -0.1}) if question.choices else Reply("Rating: [[7]]")


def garbage(question): return Reply("Hmm, $x$ <b>hard</b> to say.")


def a_judge(answer=choosing, name="scripted", official=False, **origin):
    who = Scripted(answer, official)
    who.name, who.origin = name, origin
    return who


def answers_in(run, alpaca_rows=None, questions=None, text="did it", names=("base", "tuned")):
    """A run folder with the contenders' answers, as 03_eval leaves them."""
    asked = alpaca_rows or alpaca.load_instructions("sample")
    questions = questions or load_questions("sample")
    for name in names:
        write_json(run / "answers/alpaca_eval" / name / "model_outputs.json",
                   [dict(r, output=f"{name} {text} {i}", generator=f"tiny-{name}")
                    for i, r in enumerate(asked)])
        write_jsonl(run / f"answers/mt_bench/model_answer/tiny-{name}.jsonl",
                    [dict(question_id=q["question_id"], model_id=f"tiny-{name}",
                          choices=[dict(index=0, turns=[f"{name} {text}", "and more"])])
                     for q in questions])
    return run


def judged_by(who, run, recipe=TINY):
    found = verdicts.judge_answers(who, recipe, run, RECORDS, lambda line: None)
    verdicts.keep_verdicts(run, who.name, found)
    return verdicts.summarise_verdicts(who, found, load_questions(recipe.mtbench))


def examination(low, pairs=50, invalid=0):
    return Examination(60.0, low, 70.0, Consistency(pairs, invalid, 0.0, 50.0))


@pytest.fixture
def official_files(shared, monkeypatch):
    """The official prompts and references, from the local copies."""
    bench, benchmark = shared / "eval/mt_bench", shared / "eval/alpaca_eval"
    by_sha = {file_sha256(path): path for path in bench.rglob("*.jsonl")}
    prompt = alpaca.judge_prompt(benchmark / "alpaca_eval_clf.txt")
    files = benchmark / "instruction_difficulty.csv", benchmark / "df_gamed.csv.xz"
    monkeypatch.setattr(mtbench, "fetch", lambda url, sha256: by_sha[sha256])
    monkeypatch.setattr(alpaca, "judge_prompt", lambda: prompt)
    monkeypatch.setattr(verdicts, "length_control_files", lambda: files)
    return shared / "eval"


@pytest.fixture
def no_key(monkeypatch):
    for name in "OPENAI_API_KEY", "OPENAI_BASE_URL":
        monkeypatch.delenv(name, raising=False)


# What may be called official

def test_only_what_was_published_is_official(official_files, tmp_path):
    source = official_files / "alpaca_eval" / REFERENCE
    recipe = replace(TINY, alpaca=str(source), mtbench="official")
    run = answers_in(tmp_path, alpaca.load_instructions(source), load_questions("official"))

    official = judged_by(a_judge(name="gpt-4-1106-preview", official=True), run, recipe)
    assert official.official == dict(alpaca=True, mt_bench=False)
    why = "the judge is gpt-4-1106-preview, published numbers are gpt-4's"
    assert official.unofficial == dict(mt_bench=why)
    pair = official.alpaca["tuned against gpt4_1106_preview"]
    assert pair.n_total == 805 and "every verdict is a tie" in pair.lc_refused

    fours = judged_by(a_judge(name="gpt-4", official=True), run, replace(recipe, judge="gpt-4"))
    assert fours.official == dict(alpaca=False, mt_bench=True)
    assert "published numbers are gpt-4-1106-preview's" in fours.unofficial["alpaca"]

    other = judged_by(a_judge(name="qwen-7b", official=True), run, recipe)
    assert other.official == dict(alpaca=False, mt_bench=False)
    assert other.unofficial["alpaca"].startswith("the judge is qwen-7b")
    assert "the judge is qwen-7b" in other.alpaca["tuned against gpt4_1106_preview"].lc_refused


def test_every_clause_that_makes_alpaca_unofficial(official_files):
    path = official_files / "alpaca_eval" / "alpaca-7b/annotations.json.xz"
    with lzma.open(path, "rt") as f:
        rows = [dict(r, annotator="gpt-4-1106-preview") for r in json.load(f)]
    prompt, why = alpaca.judge_prompt(), alpaca.why_unofficial
    ours = [dict(r, generator_1="base", output_1="mine") for r in rows]
    assert why({"a": rows}, prompt) == ""
    assert why({"a": rows[::-1], "tuned against base": ours}, prompt) == ""
    assert why({"a": rows[:3]}, prompt) == "3 of 805 instructions"
    assert why({"a": rows, "b": ours[:3]}, prompt) == "3 of 805 instructions"
    assert why({"a": rows}, TEMPLATE) == "the judge's prompt is not the published one"
    assert "compared with gpt4_1106_preview" in why({"a": ours}, prompt)
    forged = [dict(rows[0], output_1="forged"), *rows[1:]]
    assert "the reference's answers are not" in why({"a": forged}, prompt)
    assert why({"a": rows + rows[:1]}, prompt) == "more than the 805 instructions"
    another = [dict(rows[0], annotator="qwen-7b"), *rows[1:]]
    assert why({"a": another}, prompt).startswith("the judge is qwen-7b")


def test_every_clause_that_makes_mt_bench_unofficial(official_files):
    questions, prompts = load_questions("official"), mtbench.load_prompts()
    def prompt_name(q, turn):
        kind = "single-math-v1" if q["category"] in mtbench.NEED_REFERENCE else "single-v1"
        return kind + "-multi-turn" * (turn == 2)
    rows = [dict(question_id=q["question_id"], model=m, judge=["gpt-4", prompt_name(q, t)], score=5,
                 turn=t) for m in "ab" for q in questions for t in (1, 2)]
    why = mtbench.why_unofficial
    assert why(rows, questions, prompts) == ""
    assert why(rows[:-1], questions, prompts) == "79 of 80 questions"
    reworded = [dict(questions[0], turns=["What?", "Why?"]), *questions[1:]]
    assert why(rows, reworded, prompts) == "the questions are not the published ones"
    assert why(rows, questions, PROMPTS) == "the judge's prompts are not the published ones"
    sample = load_questions("sample")
    short = [dict(rows[0], question_id=q["question_id"]) for q in sample]
    assert why(short, sample, prompts) == "0 of 80 questions"


@pytest.mark.parametrize("name", ["gpt-4-1106-preview", "gpt-4", "stub"])
def test_the_course_s_own_questions_are_never_official(official_files, tmp_path, name):
    """Three instructions and the course's own eight questions were once shown as official."""
    judgment = judged_by(a_judge(name=name, official=True), answers_in(tmp_path / name))
    assert judgment.official == dict(alpaca=False, mt_bench=False)
    assert set(judgment.unofficial) == {"alpaca", "mt_bench"}
    verdicts.save_judge_figures(judgment, tmp_path)
    for kind in "win_rates", "mtbench_radar", "mtbench_turns":
        assert (tmp_path / f"figures/{kind}_{name}.svg").exists()
        text = (tmp_path / f"figures/{kind}_{name}.txt").read_text()
        assert f"{name}: not leaderboard numbers" in text


def test_the_published_judge_sees_the_published_references(official_files):
    references = verdicts.mtbench_references
    published, corrected = (mtbench.load_references(name) for name in ("official", "corrected"))
    assert references(replace(TINY, mtbench="official", judge="gpt-4")) == published != corrected
    assert references(replace(TINY, mtbench="official", judge="other")) == corrected


def test_questions_given_by_path_bring_the_same_references(official_files, tmp_path):
    """With the path of question.jsonl, gpt-4 was shown the file's own references, wrong ones."""
    original = official_files / "mt_bench/question.jsonl"
    copy = tmp_path / "renamed.jsonl"
    copy.write_bytes(b"\n".join(original.read_bytes().split(b"\n")[::-1]))  # in another order, too
    published = mtbench.load_references("official")
    for path in original, copy:
        recipe = replace(TINY, mtbench=str(path), judge="gpt-4")
        assert verdicts.mtbench_references(recipe) == published != mtbench.load_references(path)
    run = answers_in(tmp_path / "run", questions=load_questions(copy))
    recipe = replace(TINY, mtbench=str(copy), judge="gpt-4")
    assert judged_by(a_judge(name="gpt-4", official=True), run, recipe).official["mt_bench"]


def test_other_references_than_the_published_are_not_official(official_files, tmp_path):
    run = answers_in(tmp_path, questions=load_questions("official"))
    recipe = replace(TINY, mtbench="official", judge="other")  # so the corrected ones are shown
    judgment = judged_by(a_judge(name="gpt-4", official=True), run, recipe)
    assert "references" in judgment.unofficial["mt_bench"]


# Contenders

def test_each_contender_is_compared_and_rated(official_files, tmp_path):
    source = official_files / "alpaca_eval" / REFERENCE
    rows = alpaca.load_reference(source)[:3]
    write_json(tmp_path / "reference.json", rows)
    recipe = replace(TINY, alpaca=str(tmp_path / "reference.json"))
    run = answers_in(tmp_path / "run", alpaca.load_instructions(recipe.alpaca), names=CONTENDERS)
    judgment = judged_by(a_judge(), run, recipe)
    assert list(judgment.alpaca) == [
        "tuned against base", "tuned against chat_template", "base against gpt4_1106_preview",
        "chat_template against gpt4_1106_preview", "tuned against gpt4_1106_preview"]
    assert set(judgment.mt_bench) == {"tiny-base", "tiny-chat_template", "tiny-tuned"}
    kept = run / "judgments/alpaca_eval/scripted/tuned_against_chat_template.json"
    assert len(read_json(kept)) == 3


@pytest.mark.parametrize("name", CONTENDERS)
@pytest.mark.parametrize("bench", ["alpaca_eval", "mt_bench"])
def test_the_fingerprint_of_answers_covers_every_contender(tmp_path, name, bench):
    run = answers_in(tmp_path, names=CONTENDERS)
    before = verdicts.answers_sha256(run)
    path, = (p for p in (run / "answers" / bench).rglob("*.json*") if name in str(p))
    path.write_text(path.read_text().replace("did it", "did not"))
    assert verdicts.answers_sha256(run) != before


def test_without_a_chat_template_the_fingerprint_is_as_before(tmp_path):
    assert verdicts.answers_sha256(answers_in(tmp_path)).startswith("d2cd44d55edb")


def test_a_damaged_file_of_answers_is_named(tmp_path):
    run = answers_in(tmp_path)
    (run / "answers/mt_bench/model_answer/tiny-base.jsonl").write_text('{"question_id": 1')
    with pytest.raises(DollyError, match="tiny-base.jsonl is damaged: delete it and run 03_eval"):
        judged_by(a_judge(), run)


# Several judges

def test_judges_stand_side_by_side_and_a_later_run_keeps_them(tmp_path):
    run, names = answers_in(tmp_path), ["local tiny", "local-tiny", "local/tiny"]
    for name in names: verdicts.keep_judgment(run, judged_by(a_judge(name=name), run))
    judgments = read_metrics(run).judgments
    assert list(judgments) == names and [j.judge for j in judgments.values()] == names
    assert len(list((run / "judgments/mt_bench/model_judgment").iterdir())) == 3
    assert len(list((run / "judgments/alpaca_eval").iterdir())) == 3
    answers_in(run, text="did something else")                   # the model was trained again
    verdicts.keep_judgment(run, judged_by(a_judge(name="new"), run))
    assert list(read_metrics(run).judgments) == ["new"]


def test_judges_of_one_name_and_different_origin_are_both_kept(tmp_path):
    """The second one overwrote the first one's numbers and files."""
    run = answers_in(tmp_path)
    origins = dict(endpoint="http://a/v1"), dict(endpoint="http://b/v1"), dict(weights="c")
    for origin, answer in zip(origins, (choosing, garbage, choosing)):
        judgment = judged_by(a_judge(answer, "qwen-7b", **origin), run)
        verdicts.save_judge_figures(judgment, run)               # as 03_eval does, before keeping
        verdicts.keep_judgment(run, judgment)
        verdicts.save_judge_figures(judgment, run)               # as the report does, after it
    judgments = read_metrics(run).judgments
    keys = list(judgments)
    assert keys[0] == "qwen-7b" and len(keys) == 3
    assert all(re.fullmatch(r"qwen-7b \([0-9a-f]{8}\)", key) for key in keys[1:])
    assert [j.origin for j in judgments.values()] == list(origins)
    assert [j.check.win_rate for j in judgments.values()] == [50, None, 50]
    slugs = {verdicts.judge_slug(key) for key in keys}
    assert {p.name for p in (run / "judgments/alpaca_eval").iterdir()} == slugs
    figures = {p.stem.removeprefix("win_rates_") for p in run.glob("figures/win_rates_*.svg")}
    assert figures == slugs


def test_a_judge_that_judges_again_replaces_its_own_numbers(tmp_path):
    run = answers_in(tmp_path)
    for answer in choosing, garbage:
        for origin in "a", "b":
            judge = a_judge(answer, "local tiny", weights=origin)
            (run / "judgments/replies.jsonl").unlink(missing_ok=True)
            verdicts.keep_judgment(run, judged_by(judge, run))
    judgments = read_metrics(run).judgments
    assert [j.origin["weights"] for j in judgments.values()] == ["a", "b"]
    assert [j.check.win_rate for j in judgments.values()] == [None, None]


def test_old_metrics_and_other_keys_survive_a_judgment(tmp_path):
    run, result = answers_in(tmp_path), Result(2.0, 7.4, 10, 1, 50.0, 20.0, 3.0, 4.0)
    older = dict(judge="local tiny", official=True, alpaca={})
    write_json(run / "metrics.json", dict(test=dict(base=to_json(result)), judgments=older))
    verdicts.keep_judgment(run, judged_by(a_judge(), run))
    metrics = read_metrics(run)
    assert metrics.test == dict(base=result) and list(metrics.judgments) == ["scripted"]
    verdicts.keep_metrics(run, Metrics(test=dict(tuned=result)))
    metrics = read_metrics(run)
    assert metrics.test == dict(tuned=result) and list(metrics.judgments) == ["scripted"]


def test_slugs_are_safe_and_never_the_same():
    names = ["gpt-4", "GPT-4", "local tiny", "local-tiny", "local/tiny", "local  tiny", "../../etc",
             "..", "", "né", "né", "a" * 300, "a" * 301, "$x$ <b>", "con/aux", "-a", "a"]
    slugs = [verdicts.judge_slug(n) for n in names]
    assert len(set(slugs)) == len(set(names))
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9.-]{0,80}", s) and ".." not in s for s in slugs)
    assert slugs[0] == "gpt-4"
    assert verdicts.judge_slug(slugs[2]) != slugs[2]  # a name that looks like another's slug


def test_no_pair_s_name_leaves_the_folder(tmp_path):
    pairs = {"base against ../../../evil": []}
    found = verdicts.Verdicts("../../judge", {}, "", pairs, [], [], None)
    verdicts.keep_verdicts(tmp_path / "run", "../../judge", found)
    assert {p.relative_to(tmp_path).parts[0] for p in tmp_path.rglob("*.json*")} == {"run"}
    assert not list(tmp_path.glob("*.json*"))


HOLD = """
import sys
from dolly_lora.runs import hold_run
with hold_run(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_another_process_s_run_folder_is_not_written_to(tmp_path):
    run = answers_in(tmp_path)
    p = subprocess.Popen([sys.executable, "-c", HOLD, str(run)], cwd=ROOT, stdin=subprocess.PIPE,
                         stdout=subprocess.PIPE, text=True)
    try:
        assert p.stdout.readline() == "held\n"
        answer = make_answerer(None, None, TINY, run)
        for write in (lambda: verdicts.judge_answers(a_judge(), TINY, run, RECORDS),
                      lambda: verdicts.keep_verdicts(run, "j", None),
                      lambda: verdicts.keep_judgment(run, None),
                      lambda: verdicts.keep_metrics(run, Metrics()),
                      lambda: answer(dict(base=["x"]))):
            with pytest.raises(DollyError, match=f"in use by process {p.pid} on"): write()
    finally: p.communicate("")


# A judge that says nothing

@pytest.mark.parametrize("name, answer", [
    ("garbage", garbage), ("silent", lambda q: Reply()),
    ("down", lambda q: Reply(error="HTTP 503"))])
def test_a_judge_without_a_valid_reply_leaves_dashes_not_errors(tmp_path, name, answer):
    run = answers_in(tmp_path)
    judgment = judged_by(a_judge(answer, name), run)
    pair, model = judgment.alpaca["tuned against base"], judgment.mt_bench["tiny-base"]
    rates = (pair.win_rate, pair.low, pair.high, pair.standard_error,
             pair.length_controlled_winrate)
    assert rates == (None,) * 5
    assert pair.n_total == 0 and pair.lc_refused == "no verdict is valid"
    assert pair.consistency.invalid == 16
    assert (model.average, model.interval, model.n_invalid) == (None, None, 16)
    assert judgment.check.low is None and not verdicts.passed(judgment.check)
    verdicts.keep_judgment(run, judgment)
    verdicts.save_judge_figures(judgment, run)
    assert "– (– to –)" in (run / f"figures/win_rates_{name}.txt").read_text()
    assert "– and –" in (run / f"figures/mtbench_turns_{name}.txt").read_text()
    assert read_metrics(run).judgments[name] == judgment


def test_one_model_without_a_valid_rating_among_others(tmp_path):
    def tongue_tied(q): return garbage(q) if "tuned did" in q.messages[-1][1] else choosing(q)
    run = answers_in(tmp_path)
    judgment = judged_by(a_judge(tongue_tied), run)
    assert judgment.mt_bench["tiny-base"].average == 7
    assert judgment.mt_bench["tiny-tuned"].average is None
    verdicts.save_judge_figures(judgment, run)


def test_passed_is_surely_able_to_read():
    assert verdicts.passed(examination(80.0)) and not verdicts.passed(examination(79.9))
    assert not verdicts.passed(examination(None, pairs=0, invalid=50))
    assert verdicts.format_number(None) == "–" and verdicts.format_number(1.25, 2) == "1.25"


def test_an_examination_is_told_as_a_mean_and_as_a_count():
    """A judge that says 0.51 each time is right each time, and its mean stays near 50."""
    rows = [dict(orders=orders) for orders in ([0.51, 0.51], [0.9, 0.5], [0.9, 0.1], [None, 1.0])]
    assert verdicts.right_in_both_orders(rows) == 1
    hesitant = examination(49.0, pairs=3, invalid=1)
    assert verdicts.describe_examination(hesitant, rows) == (
        "gives the right answer a mean probability of 60 % (95 % interval 49 to 70; 50 is "
        "guessing); prefers the right one in both orders in 1 of 3 pairs; 1 without a "
        "valid reply: failed")
    assert "both orders" not in verdicts.describe_examination(examination(81.0))
    assert verdicts.describe_examination(examination(81.0)).endswith(": passed")


def test_an_examination_of_invalid_replies_is_not_passed(tmp_path):
    """One valid verdict of fifty, a right one, was enough."""
    assert not verdicts.passed(examination(99.0, pairs=1, invalid=49))
    assert not verdicts.passed(examination(99.0, pairs=25, invalid=25))
    assert verdicts.passed(examination(99.0, pairs=26, invalid=24))

    def knows_one(q):
        shown = q.messages[-1][1]
        if len(q.choices) != 2 or "Name thing 0" not in shown: return garbage(q)
        right_last = shown.rindex("Thing 0.") > shown.rindex("Thing 1.")
        return Reply(logprobs=dict(zip(q.choices, (-9.0, 0.0) if right_last else (0.0, -9.0))))
    check = judged_by(a_judge(knows_one), answers_in(tmp_path)).check
    assert check.low > 99 and (check.consistency.pairs, check.consistency.invalid) == (1, 4)
    assert not verdicts.passed(check)


# Before the work begins, and before money is spent

@pytest.mark.parametrize("change, why", [
    (dict(judge="local:nowhere/at/all"), "no base model at"),
    (dict(alpaca="nowhere.json"), "cannot read nowhere.json"),
    (dict(mtbench="nowhere.jsonl"), "no file at"),
    (dict(judge="gpt-4"), "OPENAI_API_KEY is not set")])
def test_the_check_before_the_work_names_what_is_missing(change, why, no_key):
    verdicts.check_evaluation(TINY)
    with pytest.raises(DollyError, match=why) as e:
        verdicts.check_evaluation(replace(TINY, **change))
    assert "\n" not in str(e.value)


def test_missing_official_prompts_are_found_before_the_work(monkeypatch):
    monkeypatch.setattr(verdicts, "check_judge", lambda recipe: None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DollyError, match="no official judge prompt here"):
        verdicts.check_evaluation(replace(TINY, judge="stub"))


def test_an_estimate_needs_no_package_no_network_and_no_key(
        official_files, tmp_path, monkeypatch, no_key):
    source = official_files / "alpaca_eval" / REFERENCE
    run = answers_in(tmp_path, alpaca.load_instructions(source), load_questions("official"))
    recipe = replace(TINY, alpaca="official", mtbench="official", judge="gpt-4-1106-preview")
    reference = alpaca.load_reference(source)
    with patch.object(alpaca, "load_reference", lambda source: reference):
        exact = verdicts.estimate_cost(recipe, run, RECORDS)

    def offline(*args): raise DollyError("offline")
    monkeypatch.setattr(alpaca, "judge_prompt", offline)
    monkeypatch.setattr(alpaca, "fetch", offline)
    monkeypatch.setattr(mtbench, "fetch", offline)
    about = verdicts.estimate_cost(recipe, run, RECORDS)
    assert exact["exact"] and not about["exact"]
    assert exact["judge"] == about["judge"] == "gpt-4-1106-preview"
    assert exact["calls"] == about["calls"] == 2 * (3 * 805 + 5) + 2 * 160
    assert about["tokens"] == pytest.approx(exact["tokens"], rel=0.02)
    assert about["usd"] == pytest.approx(exact["usd"], rel=0.02)
    assert not (run / "judgments").exists()


def test_known_lengths_are_those_of_the_official_files(official_files):
    def mean_length(texts): return round(np.mean([len(t) for t in texts]))
    assert mtbench.PROMPT_CHARACTERS == {
        n: len(p["system_prompt"]) + len(p["prompt_template"])
        for n, p in mtbench.load_prompts().items()}
    assert alpaca.PROMPT_CHARACTERS == sum(len(text) for _, text in alpaca.judge_prompt())
    questions, references = load_questions("official"), mtbench.load_references("official")
    assert mtbench.QUESTION_CHARACTERS == mean_length([t for q in questions for t in q["turns"]])
    answers = [t for turns in references.values() for t in turns]
    assert mtbench.REFERENCE_CHARACTERS == mean_length(answers)
    reference = alpaca.load_reference(official_files / "alpaca_eval" / REFERENCE)
    assert alpaca.REFERENCE_CHARACTERS == mean_length([r["output"] for r in reference])


def test_an_estimate_for_a_local_judge_counts_what_is_left(tmp_path):
    run = answers_in(tmp_path)
    first = verdicts.estimate_cost(TINY, run, RECORDS)
    assert first["usd"] == 0 and first["exact"] and first["calls"] > 60
    judged_by(a_judge(name="local tiny", weights="tiny"), run)
    assert verdicts.estimate_cost(TINY, run, RECORDS)["calls"] == 0
