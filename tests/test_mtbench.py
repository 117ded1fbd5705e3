"""MT-Bench: published numbers from real judgments, real prompts word for word, FastChat's tools."""
import hashlib
import json
import lzma
import math
import os
import subprocess
import venv

import pytest

import dolly_lora.mtbench as mtbench
from dolly_lora.config import DollyError
from dolly_lora.data import build_conversation
from dolly_lora.generate import Answer
from dolly_lora.judge import Reply, Scripted
from dolly_lora.mtbench import (
    answer_mtbench, average_interval, grade, grade_pairs, load_prompts, load_questions,
    load_references, prompt_name, rating, score, why_unofficial, win_rates, winner)

MATH = ("math", "reasoning", "coding")
OWN = {name.removeprefix("dolly-"): p for name, p in mtbench.OWN_PROMPTS.items()}


def official(answer):
    judge = Scripted(answer)
    judge.official = True
    return judge


def quiet(line): pass


def answer_row(question_id, model, *turns):
    return dict(question_id=question_id, answer_id=f"{model}{question_id}", model_id=model,
                choices=[dict(index=0, turns=list(turns))], tstamp=0.0)


def two_models(questions):
    return [answer_row(q["question_id"], m, f"{m} one", f"{m} two")
            for m in ("one", "two") for q in questions]


def judgment(question_id, turn, value, model="m", judge=("j", "single-v1")):
    return dict(question_id=question_id, model=model, judge=list(judge), user_prompt="",
                judgment="", score=value, turn=turn, tstamp=0.0)


def rows(path):
    with (lzma.open if path.suffix == ".xz" else open)(path, "rt", encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def dump(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(r, ensure_ascii=False) + "\n" for r in rows]
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.fixture
def bench(shared): return shared / "eval/mt_bench"


@pytest.fixture
def pinned(bench, monkeypatch):
    """`fetch` gives the local copy of a pinned file, if it has the checksum that is asked for."""
    local = {hashlib.sha256(p.read_bytes()).hexdigest(): p for p in bench.rglob("*.jsonl")}
    def fetch(url, sha256):
        assert local[sha256].name == url.rsplit("/", 1)[1] and url.startswith("https://github.com/")
        return local[sha256]
    monkeypatch.setattr(mtbench, "fetch", fetch)
    return bench


# The score

@pytest.mark.parametrize("as_path", [True, False])
def test_golden_numbers(shared, bench, as_path):
    golden = json.loads((shared / "eval/expected.json").read_text())["mt_bench"]
    path = bench / "model_judgment/gpt-4_single.jsonl.xz"
    scores = score(path if as_path else rows(path))
    assert scores.keys() == golden.keys()
    for model, expected in golden.items():
        assert scores[model].pop("n_duplicates") == 0
        category = expected.pop("category")
        assert scores[model].pop("category") == pytest.approx(category, abs=1e-6)
        assert scores[model] == pytest.approx(expected, abs=1e-6)
    low, high = average_interval(path)["llama2_chat_7b"]
    assert low < 6.190625 < high and 0.3 < high - low < 2


def test_order_and_duplicates_do_not_move_the_golden_numbers(bench):
    real = rows(bench / "model_judgment/gpt-4_single.jsonl.xz")
    model = real[0]["model"]
    def flat(s): return {**s, **s["category"], "category": 0}
    whole, reverse = score(real)[model], score(real[::-1])[model]
    assert flat(reverse) == pytest.approx(flat(whole), abs=1e-9)
    earlier = [{**real[0], "score": 1}] + real  # a judgment of the same answer before
    assert score(earlier)[model] == {**whole, "n_duplicates": 1}
    assert average_interval(earlier) == average_interval(real)


def test_invalid_is_excluded_and_counted():
    s = score([judgment(81, 1, 8), judgment(81, 2, -1), judgment(82, 1, 4), judgment(82, 2, 6),
               judgment(83, 1, None), judgment(83, 2, math.nan)])["m"]
    assert s == dict(turn1=6.0, turn2=6.0, average=6.0, category=dict(writing=6.0), n_rows=6,
                     n_invalid=3, n_duplicates=0)
    assert score([judgment(81, 1, -1)])["m"]["average"] is None
    assert average_interval([judgment(81, 1, -1)]) == {}


def test_average_is_over_rows_not_over_turns():
    unequal = [judgment(81, 1, 10), judgment(82, 1, 10), judgment(83, 1, 10), judgment(81, 2, 2)]
    assert score(unequal)["m"]["average"] == 8


def test_a_duplicate_has_the_same_judge_and_the_last_counts():
    s = score([judgment(81, 1, 2), judgment(81, 1, 9), judgment(81, 1, 5, model="other")])
    assert (s["m"]["average"], s["m"]["n_rows"], s["m"]["n_duplicates"]) == (9, 1, 1)
    assert s["other"]["n_duplicates"] == 0
    s = score([judgment(81, 1, 2), judgment(81, 1, 8, judge=("k", "single-v1"))])
    assert s["m"] | {"category": 0} == dict(turn1=5, turn2=None, average=5, category=0, n_rows=2,
                                            n_invalid=0, n_duplicates=0)


def test_category_from_the_number_or_from_the_questions(bench):
    questions = load_questions("sample")
    sample = [judgment(q["question_id"], 1, n + 1) for n, q in enumerate(questions)]
    expected = {q["category"]: n + 1 for n, q in enumerate(questions)}
    assert score(sample, questions)["m"]["category"] == expected
    with pytest.raises(DollyError, match="question 9001 is not one of"): score(sample)
    for q in load_questions(str(bench / "question.jsonl")):
        assert mtbench.CATEGORY_OF[q["question_id"]] == q["category"]


def test_a_row_that_is_no_judgment_is_named(tmp_path):
    for wrong in ({"question_id": 82}, judgment([82], 1, 5), judgment(82, 1, 5, model={}), [], 7,
                  judgment(82, 1, 5) | dict(judge=None), judgment(82, 1, 5) | dict(judge=[["j"]])):
        path = dump(tmp_path / "j.jsonl", [judgment(81, 1, 5), wrong])
        for given, name in (path, "j.jsonl"), ([judgment(81, 1, 5), wrong], "judgments"):
            with pytest.raises(DollyError, match=f"{name} line 2: expected a judgment with"):
                score(given)
    with pytest.raises(DollyError, match="no file at"): score(tmp_path / "none.jsonl")


# What may be called MT-Bench

@pytest.fixture
def published(pinned):
    """What makes MT-Bench as published: judgments, questions, prompts, references."""
    questions = load_questions("official")
    judgments = [judgment(q["question_id"], t, 5, model=m,
                          judge=("gpt-4", prompt_name("single", q["category"] in MATH, t)))
                 for m in "ab" for q in questions for t in (1, 2)]
    return judgments, questions, load_prompts("official"), load_references("official")


def test_mt_bench_as_published_is_official(published, bench):
    judgments, questions, prompts, references = published
    assert why_unofficial(*published) == "" == why_unofficial(judgments[::-1], questions, prompts)
    earlier = [dict(judgments[0], score=-1), *judgments]  # judged again since
    assert why_unofficial(earlier, questions, prompts, references) == ""
    real = rows(bench / "model_judgment/gpt-4_single.jsonl.xz")
    mine = [r for r in real if r["model"] == "llama2_chat_7b"]
    assert why_unofficial(mine, questions, prompts, references) == ""


def test_verdicts_are_counted_and_not_questions(published):
    """Issue 10: 158 of 160 scores of -1 were called official."""
    judgments, questions, prompts, references = published
    for bad in -1, None, math.nan:
        invalid = [dict(r, score=bad) if r["model"] == "b" and n % 160 > 1 else r
                   for n, r in enumerate(judgments)]
        why = why_unofficial(invalid, questions, prompts, references)
        assert why == "158 of 160 verdicts are invalid"
    missing = why_unofficial(judgments[1:], questions, prompts, references)
    assert missing == "79 of 80 questions"


def test_corrected_references_are_not_the_published_ones(published, pinned):
    """Issue 10: a path to question.jsonl gave the judge other references, and was official."""
    judgments, questions, prompts, references = published
    inside = load_references(str(pinned / "question.jsonl"))
    forged = {**references, 101: ["one", "two"]}
    fewer = {i: r for i, r in references.items() if i != 130}
    for other in load_references("corrected"), inside, forged, fewer, {}:
        why = why_unofficial(judgments, questions, prompts, other)
        assert why == "the references are not the published ones, which GPT-4 wrote"


def test_the_prompts_that_were_really_used_have_to_be_the_published_ones(published):
    judgments, questions, prompts, references = published
    general = [dict(r, judge=["gpt-4", r["judge"][1].replace("math-", "")])
               if r["question_id"] == 123 else r for r in judgments]
    why = why_unofficial(general, questions, prompts, references)
    assert why == "question 123 was judged with the prompt single-v1"
    extra = why_unofficial([*judgments, judgment(9001, 1, 5, "a", ("gpt-4", "single-v1"))],
                           questions, prompts, references)
    assert extra == "question 9001 is not one of the published 80"


def test_the_questions_are_known_by_their_contents(pinned, tmp_path):
    questions = load_questions("official")
    by_path = load_questions(str(pinned / "question.jsonl"))
    assert mtbench.are_published(questions) and mtbench.are_published(by_path[::-1])
    assert not mtbench.are_published(questions[1:])
    assert not mtbench.are_published([dict(questions[0], turns=["What?", "Why?"]), *questions[1:]])
    assert not mtbench.are_published(load_questions("sample"))


# Questions, references and prompts

def test_pinned_files_are_the_local_ones(pinned):
    assert [q["question_id"] for q in load_questions("official")] == list(range(81, 161))
    assert len(load_references("official")) == 30
    assert set(mtbench.OWN_PROMPTS) == {f"dolly-{n}" for n in load_prompts("official")}


def test_corrected_references_answer_the_official_wording(pinned):
    official, corrected = load_references("official"), load_references("corrected")
    wanted = [q["question_id"] for q in load_questions("official") if q["category"] in MATH]
    assert sorted(official) == wanted and [i for i in wanted if i not in corrected] == [123]
    own = {q["question_id"]: q.get("reference") for q in rows(pinned / "question.jsonl")}
    # the four that the corrected file words differently
    assert all(corrected[i] == own[i] for i in (101, 107, 113, 130))
    # by path: as they stand, for its own questions
    raw = load_references(str(pinned / "mt_bench_inf.jsonl"))
    assert [i for i in raw if raw[i] != corrected[i]] == [101, 113]
    assert raw.keys() == corrected.keys()


def question(**change):
    return json.dumps(dict(question_id=1, category="math", turns=["a", "b"]) | change)


@pytest.mark.parametrize("text, line", [
    (question(turns=["a"]), 1), ("\n[]", 2), ("\n[1]", 2), (question(turns="ab"), 1),
    (question(turns=["half \ud83d", "b"]), 1), (question(category=["x"]), 1),
    (question(category="\ud800"), 1), (question(category=None), 1), (question(category=" "), 1),
    (question() + "\n" + question(question_id=[1]), 2), (question(question_id="81"), 1),
    (question(question_id=None), 1), (question(question_id=True), 1),
    (question(question_id=1.5), 1)])
def test_bad_question_line(tmp_path, text, line):
    (tmp_path / "q.jsonl").write_text(text)
    why = f"q.jsonl line {line}: expected an object with question_id"
    with pytest.raises(DollyError, match=why):
        load_questions(str(tmp_path / "q.jsonl"))


@pytest.mark.parametrize("text", ["{", "[" * 100_000, '{"question_id": ' + "9" * 5000 + "}"],
                         ids=["cut off", "deep", "a long number"])
def test_a_question_line_that_is_no_json(tmp_path, text):
    (tmp_path / "q.jsonl").write_text(text)
    why = "q.jsonl line 1: (not JSON|JSON that cannot be read)"
    with pytest.raises(DollyError, match=why) as e:
        load_questions(str(tmp_path / "q.jsonl"))
    assert "\n" not in str(e.value)


def test_a_reference_of_no_number_is_named(tmp_path):
    dump(tmp_path / "r.jsonl", [dict(question_id=[101], reference=["one", "two"])])
    with pytest.raises(DollyError, match="r.jsonl line 1: expected an object with question_id"):
        load_references(str(tmp_path / "r.jsonl"))


def test_a_line_separator_inside_a_text_splits_no_line(tmp_path):
    path = dump(tmp_path / "q.jsonl",
                [dict(question_id=1, category="writing", turns=["one\u2028line", "two"])])
    assert load_questions(str(path))[0]["turns"][0] == "one\u2028line"


def test_gpt_references_are_read_as_fastchat_writes_them(tmp_path):
    path = dump(tmp_path / "gpt.jsonl",
                [dict(question_id=101, choices=[dict(index=0, turns=["one", "two"])])])
    assert load_references(str(path)) == {101: ["one", "two"]}


def test_a_truncated_archive_or_a_folder_is_named(tmp_path):
    (tmp_path / "q.jsonl.xz").write_bytes(lzma.compress(b'{"question_id": 1}' * 1000)[:60])
    for source in tmp_path / "q.jsonl.xz", tmp_path:
        with pytest.raises(DollyError, match="cannot be read"): load_questions(str(source))


# Figures

def test_figures_of_models_without_a_rating_and_with_names_that_are_formulas():
    import matplotlib.pyplot as plt
    none = dict(turn1=None, turn2=None, average=None, category=dict(writing=None, math=None))
    some = dict(turn1=5.0, turn2=None, average=5.0, category=dict(writing=5.0, math=None))
    for scores in ({"m": none}, {"m": dict(none, category={})},
                   {"m": none, r"$\frac{$": some}, {"$a$": some}):
        for plot in mtbench.plot_radar, mtbench.plot_turns:
            fig = plot(scores, "a $\\judge{$")
            fig.canvas.draw()
            assert "judged by a " in fig.axes[0].get_title()
            plt.close(fig)


# Answers

def build(instruction, turns): return build_conversation(turns, instruction, "</s>")


def test_temperatures_and_the_second_prompt():
    calls, questions = [], load_questions("sample")
    def answer(prompts, temperatures):
        calls.append((prompts["me"], dict(zip([q["category"] for q in questions], temperatures))))
        return {name: [Answer(f"turn {len(calls)} of {i}", 3, i != 0) for i in range(len(own))]
                for name, own in prompts.items()}
    result = answer_mtbench(answer, questions, dict(me=build, you=build), "p")["me"]
    expected = dict(writing=0.7, roleplay=0.7, stem=0.1, humanities=0.1, reasoning=0.0, math=0.0,
                    coding=0.0, extraction=0.0)
    assert len(calls) == 2 and all(t == expected for _, t in calls)
    for i, (q, before, after) in enumerate(zip(questions, calls[0][0], calls[1][0])):
        one, two = q["turns"]
        assert f"turn 1 of {i}</s>" in after and one in after and two in after
        assert after.startswith(before) and two not in before
    row = result["rows"][2]
    assert row["choices"] == [dict(index=0, turns=["turn 1 of 2", "turn 2 of 2"])]
    assert set(row) == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
    assert result["finished"] == pytest.approx(87.5)


# Judging

def test_official_prompts_are_those_of_the_real_run(pinned, tmp_path):
    """The 160 prompts that GPT-4 was really sent for llama2_chat_7b, character by character."""
    sent = []
    judge = official(lambda question: sent.append(question) or Reply("Fine. Rating: [[7]]"))
    answers = rows(pinned / "model_answer/llama2_chat_7b.jsonl.xz")
    judgments = grade(judge, load_questions("official"), answers, tmp_path / "r.jsonl",
                      load_references("official"), load_prompts("official"))
    real_rows = rows(pinned / "model_judgment/gpt-4_single.jsonl.xz")
    def asked(judgments):
        return {(r["question_id"], r["turn"]): (r["judge"][1], r["user_prompt"]) for r in judgments}
    real = asked(r for r in real_rows if r["model"] == "llama2_chat_7b")
    assert asked(judgments) == real and len(real) == 160
    assert all(q.max_tokens == 2048 and not q.choices for q in sent)
    assert all([role for role, _ in q.messages] == ["system", "user"] for q in sent)
    assert list(judgments[0]) == list(real_rows[0])
    assert score(judgments)[judgments[0]["model"]]["average"] == 7


def test_defaults_are_corrected_references_and_official_prompts(pinned, tmp_path):
    lines = []
    questions = [q for q in load_questions("official") if q["question_id"] in (104, 108, 123)]
    answers = [answer_row(q["question_id"], "m", "first", "second") for q in questions]
    judge = official(lambda q: Reply("[[5]]"))
    judgments = grade(judge, questions, answers, tmp_path / "r.jsonl", log=lines.append)
    assert [r["judge"][1] for r in judgments] == [
        "single-math-v1", "single-math-v1-multi-turn", "single-math-v1", "single-v1-multi-turn",
        "single-v1", "single-v1-multi-turn"]
    assert load_references("corrected")[104][0] in judgments[0]["user_prompt"]
    assert any("3 of 6" in line for line in lines)


def test_replies_that_hold_no_rating_are_invalid_and_counted(tmp_path):
    replies = iter([Reply("no"), Reply("[[85]]"), Reply(error="429"), Reply(""), Reply("[[x]]"),
                    Reply("Rating: [[9]]")])
    questions, lines = load_questions("sample")[:3], []
    answers = [answer_row(q["question_id"], "m", "a", "b") for q in questions]
    judgments = grade(official(lambda q: next(replies)), questions, answers, tmp_path / "r.jsonl",
                      load_references("sample"), OWN, log=lines.append)
    s = score(judgments, questions)["m"]
    assert [r["score"] for r in judgments] == [-1, -1, -1, -1, -1, 9]
    assert (s["n_invalid"], s["average"]) == (5, 9)
    assert judgments[2]["judgment"] == "$ERROR$ 429"
    # the empty one, too
    assert any("5 of 6 replies are invalid, 2 of them errors" in line for line in lines)


@pytest.mark.parametrize("reply, value", [
    (Reply("so [3] or rather [[8]]"), 8), (Reply("[[7.5]]"), 7.5), (Reply("[6]"), 6),
    (Reply("[[10]]"), 10), (Reply("[[0]]"), -1), (Reply("[[11]]"), -1), (Reply("8/10"), -1),
    (Reply(logprobs={"1": math.log(0.1), "10": math.log(0.3)}), 7.75),
    (Reply(logprobs={"5": -2000.0}), 5), (Reply(logprobs={"5": -math.inf}), -1),
    (Reply(logprobs={"yes": -0.1}), -1), (Reply(), -1), (Reply("[[8]]", error="cut off"), -1)])
def test_rating(reply, value):
    assert rating(reply) == pytest.approx(value)


@pytest.mark.parametrize("reply, value", [
    (Reply("[[A]] or [[B]]"), "A"), (Reply("[[C]]"), "tie"), (Reply("A"), "error"),
    (Reply(logprobs={"A": -1.0, "B": -1.0}), "tie"),
    (Reply(logprobs={"C": -0.1, "B": -3.0}), "tie"), (Reply(logprobs={}), "error"),
    (Reply("[[A]]", error="x"), "error")])
def test_winner(reply, value):
    assert winner(reply) == value


def test_disagreement_is_a_tie_and_an_error_counts_nowhere(tmp_path):
    questions = load_questions("sample")
    prefers_a = Scripted(lambda q: Reply(logprobs={"A": -0.1, "B": -2.0}))
    pairs = grade_pairs(prefers_a, questions, two_models(questions), tmp_path / "r.jsonl",
                        load_references("sample"))
    assert len(pairs) == 16
    assert {(r["g1_winner"], r["g2_winner"]) for r in pairs} == {("model_1", "model_2")}
    assert win_rates(pairs)["one"] == dict(win=0, loss=0, tie=16, win_rate=0.5, n_rows=16,
                                           n_invalid=0, n_inconsistent=16)
    pairs[0]["g1_winner"] = "error"
    pairs[1].update(g1_winner="model_2", g2_winner="model_2")
    pairs[2].update(g1_winner="tie", g2_winner="tie")
    rates = win_rates(pairs)
    assert rates["two"] == dict(win=1, loss=0, tie=14, win_rate=8 / 15, n_rows=16, n_invalid=1,
                                n_inconsistent=13)
    assert rates["one"]["win_rate"] == 7 / 15
    assert "Answer 1 by A:\none one" in pairs[0]["g1_user_prompt"]
    assert "Answer 1 by A:\ntwo one" in pairs[0]["g2_user_prompt"]


def test_a_missing_answer_is_named(tmp_path):
    questions = load_questions("sample")
    with pytest.raises(DollyError, match="two has no answer of two turns to question 9008"):
        grade(Scripted(None), questions, two_models(questions)[:-1], tmp_path / "r.jsonl", {})


# FastChat itself

READ = """
import sys, types
# these are needed to call judges only
for name in ("openai", "anthropic", "fastchat.model", "fastchat.model.model_adapter"):
    sys.modules[name] = types.ModuleType(name)
adapter = sys.modules["fastchat.model.model_adapter"]
adapter.get_conversation_template = None
adapter.ANTHROPIC_MODEL_LIST = adapter.OPENAI_MODEL_LIST = None
from fastchat.llm_judge import common
questions = common.load_questions(sys.argv[1], None, None)
answers = common.load_model_answers(sys.argv[2])
common.check_data(questions, answers, {}, list(answers), {})
single = common.load_single_model_judgments(sys.argv[3])
pair = common.load_pairwise_model_judgments(sys.argv[4])
print(len(questions), {m: len(a) for m, a in answers.items()},
      sum(map(len, single.values())), sum(map(len, pair.values())))
"""


def test_fastchat_reads_our_files_and_prints_the_same_numbers(tmp_path):
    """FastChat 0.2.36 from PyPI, in a virtual environment of its own (16 s, most of it pip)."""
    python = tmp_path / "venv/bin/python"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    def run(*args):
        return subprocess.run([python, *map(str, args)], cwd=tmp_path, env=environment,
                              capture_output=True, text=True, check=True).stdout
    venv.create(tmp_path / "venv", with_pip=True)
    try:
        run("-m", "pip", "install", "-q", "--no-deps", "fschat==0.2.36")
        run("-m", "pip", "install", "-q", "pandas")
    except subprocess.CalledProcessError as e:
        pytest.skip(f"cannot install FastChat: {e.stderr.strip().splitlines()[-1]}")

    questions, references = load_questions("sample"), load_references("sample")
    models, answers = ("model-a", "model-b"), []
    for m in models:
        def answer(prompts, temperatures):
            return {name: [Answer(f"model-{name} {len(p)}\u2028é", 2, True) for p in own]
                    for name, own in prompts.items()}
        made = answer_mtbench(answer, questions, {m[-1]: build}, "model")[m[-1]]["rows"]
        dump(tmp_path / f"answers/{m}.jsonl", made)
        answers += made
    def noisy(question):
        text = question.messages[-1][1]
        n = len(text)
        if n % 7 == 0: return Reply("none")
        if question.lead.startswith("Better"):
            a_wins = n % 3 == 0 or text.index("model-a") < text.index("model-b")
            return Reply(logprobs={"A" if a_wins else "B": -0.1})
        return Reply(logprobs={c: -float(n * (i + 3) % 11) for i, c in enumerate(question.choices)})
    path = tmp_path / "replies.jsonl"
    judgments = grade(Scripted(noisy), questions, answers, path, references)
    pairs = grade_pairs(Scripted(noisy), questions, answers, path, references)
    asked = dump(tmp_path / "question.jsonl", questions)
    single, pair = dump(tmp_path / "single.jsonl", judgments), dump(tmp_path / "pair.jsonl", pairs)

    (tmp_path / "read.py").write_text(READ)
    read = run("read.py", asked, tmp_path / "answers", single, pair).strip()
    assert read == "8 {'model-a': 8, 'model-b': 8} 32 16"
    def last_number(table, model):
        line = next(line for line in table.splitlines() if line.startswith(model))
        return float(line.split()[-1])
    show = "-m", "fastchat.llm_judge.show_result", "--input-file"
    printed, scores = run(*show, single), score(judgments, questions)
    for heading, key in ("First turn", "turn1"), ("Second turn", "turn2"), ("Average", "average"):
        table = printed.split(f"{heading} ##########")[1].split("####")[0]
        for m in models: assert last_number(table, m) == pytest.approx(scores[m][key], abs=1e-5)
    printed, rates = run(*show, pair, "--mode", "pairwise-all"), win_rates(pairs)
    for m in models: assert last_number(printed, m) == pytest.approx(rates[m]["win_rate"], abs=1e-5)
    assert any(s["n_invalid"] for s in scores.values())
    assert any(r["n_invalid"] for r in rates.values()) and rates["model-a"]["win_rate"] != 0.5
