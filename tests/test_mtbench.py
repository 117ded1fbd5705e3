"""MT-Bench: real judgments give the published numbers, real prompts come out word for word, and FastChat's own tools read our files."""
import json
import lzma
import math
import os
import subprocess
import venv

import pytest

import dolly_lora.mtbench as mtbench
from dolly_lora.config import DollyError
from dolly_lora.generate import Answer
from dolly_lora.judge import Reply, Scripted
from dolly_lora.mtbench import answer_mtbench, average_interval, grade, grade_pairs, load_prompts, load_questions, load_references, rating, score, win_rates, winner

MATH = ("math", "reasoning", "coding")


def official(answer):
    judge = Scripted(answer)
    object.__setattr__(judge, "official", True)
    return judge


def answer_row(question_id, model, *turns):
    return dict(question_id=question_id, answer_id=f"{model}{question_id}", model_id=model, choices=[dict(index=0, turns=list(turns))], tstamp=0.0)


def judgment(question_id, turn, value, model="m", judge=("j", "single-v1")):
    return dict(question_id=question_id, model=model, judge=list(judge), user_prompt="", judgment="", score=value, turn=turn, tstamp=0.0)


def rows(path): return [json.loads(line) for line in (lzma.open if path.suffix == ".xz" else open)(path, "rt", encoding="utf-8")]


def dump(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return path


@pytest.fixture
def bench(shared): return shared / "eval/mt_bench"


@pytest.fixture
def pinned(bench, monkeypatch):
    """`fetch` gives the local copy of a pinned file, if its checksum is the one that is asked for."""
    import hashlib
    local = {hashlib.sha256(p.read_bytes()).hexdigest(): p for p in bench.rglob("*.jsonl")}
    def fetch(url, sha256):
        assert local[sha256].name == url.rsplit("/", 1)[1] and url.startswith("https://github.com/")
        return local[sha256]
    monkeypatch.setattr(mtbench, "fetch", fetch)
    return bench


# The score

@pytest.mark.parametrize("as_path", [True, False])
def test_golden_numbers(shared, bench, as_path):
    golden, path = json.loads((shared / "eval/expected.json").read_text())["mt_bench"], bench / "model_judgment/gpt-4_single.jsonl.xz"
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
    flat = lambda s: {**s, **s["category"], "category": 0}
    whole, reverse = score(real)[model], score(real[::-1])[model]
    assert flat(reverse) == pytest.approx(flat(whole), abs=1e-9)
    twice = score([{**real[0], "score": 1}] + real)[model]           # an earlier judgment of the same answer
    assert twice == {**whole, "n_duplicates": 1}
    assert average_interval([{**real[0], "score": 1}] + real) == average_interval(real)


def test_invalid_is_excluded_and_counted():
    s = score([judgment(81, 1, 8), judgment(81, 2, -1), judgment(82, 1, 4), judgment(82, 2, 6), judgment(83, 1, None), judgment(83, 2, math.nan)])["m"]
    assert s == dict(turn1=6.0, turn2=6.0, average=6.0, category=dict(writing=6.0), n_rows=6, n_invalid=3, n_duplicates=0)
    assert score([judgment(81, 1, -1)])["m"]["average"] is None and average_interval([judgment(81, 1, -1)]) == {}


def test_average_is_over_rows_not_over_turns():
    assert score([judgment(81, 1, 10), judgment(82, 1, 10), judgment(83, 1, 10), judgment(81, 2, 2)])["m"]["average"] == 8


def test_a_duplicate_has_the_same_judge_and_the_last_counts():
    s = score([judgment(81, 1, 2), judgment(81, 1, 9), judgment(81, 1, 5, model="other")])
    assert (s["m"]["average"], s["m"]["n_rows"], s["m"]["n_duplicates"], s["other"]["n_duplicates"]) == (9, 1, 1, 0)
    assert score([judgment(81, 1, 2), judgment(81, 1, 8, judge=("k", "single-v1"))])["m"] | {"category": 0} == dict(turn1=5, turn2=None, average=5, category=0, n_rows=2, n_invalid=0, n_duplicates=0)


def test_category_from_the_number_or_from_the_questions(bench):
    questions = load_questions("sample")
    sample = [judgment(q["question_id"], 1, n + 1) for n, q in enumerate(questions)]
    assert score(sample, questions)["m"]["category"] == {q["category"]: n + 1 for n, q in enumerate(questions)}
    with pytest.raises(DollyError, match="question 9001 is not one of"):
        score(sample)
    assert all(mtbench._CATEGORY[q["question_id"]] == q["category"] for q in load_questions(str(bench / "question.jsonl")))


def test_a_row_that_is_no_judgment_is_named(tmp_path):
    path = dump(tmp_path / "j.jsonl", [judgment(81, 1, 5), {"question_id": 82}])
    with pytest.raises(DollyError, match="j.jsonl line 2: expected a judgment with"):
        score(path)
    with pytest.raises(DollyError, match="no file at"):
        score(tmp_path / "none.jsonl")


# Questions, references and prompts

def test_pinned_files_are_the_local_ones(pinned):
    assert [q["question_id"] for q in load_questions("official")] == list(range(81, 161))
    assert len(load_references("official")) == 30 and set(mtbench.OWN_PROMPTS) == {f"dolly-{n}" for n in load_prompts("official")}


def test_corrected_references_answer_the_official_wording(pinned):
    official, corrected = load_references("official"), load_references("corrected")
    wanted = [q["question_id"] for q in load_questions("official") if q["category"] in MATH]
    assert sorted(official) == wanted and [i for i in wanted if i not in corrected] == [123]
    own = {q["question_id"]: q.get("reference") for q in rows(pinned / "question.jsonl")}
    assert all(corrected[i] == own[i] for i in (101, 107, 113, 130))     # the four that the corrected file words differently
    raw = load_references(str(pinned / "mt_bench_inf.jsonl"))            # by path: as they stand, for its own questions
    assert [i for i in raw if raw[i] != corrected[i]] == [101, 113] and raw.keys() == corrected.keys()


@pytest.mark.parametrize("text, line", [('{"question_id": 1, "category": "math", "turns": ["a"]}', 1), ("\n[]", 2), ("\n[1]", 2), ("{", 1), ("[" * 100_000, 1), ('{"question_id": ' + "9" * 5000 + "}", 1),
                                        ('{"question_id": 1, "category": "math", "turns": "ab"}', 1), ('{"question_id": 1, "category": "math", "turns": ["half \\ud83d", "b"]}', 1)])
def test_bad_question_line(tmp_path, text, line):
    (tmp_path / "q.jsonl").write_text(text)
    with pytest.raises(DollyError, match=f"q.jsonl line {line}: expected an object with question_id"):
        load_questions(str(tmp_path / "q.jsonl"))


def test_a_line_separator_inside_a_text_splits_no_line(tmp_path):
    dump(tmp_path / "q.jsonl", [dict(question_id=1, category="writing", turns=["one\u2028line", "two"])])
    assert load_questions(str(tmp_path / "q.jsonl"))[0]["turns"][0] == "one\u2028line"


def test_gpt_references_are_read_as_fastchat_writes_them(tmp_path):
    dump(tmp_path / "gpt.jsonl", [dict(question_id=101, choices=[dict(index=0, turns=["one", "two"])])])
    assert load_references(str(tmp_path / "gpt.jsonl")) == {101: ["one", "two"]}


def test_a_truncated_archive_or_a_folder_is_named(tmp_path):
    (tmp_path / "q.jsonl.xz").write_bytes(lzma.compress(b'{"question_id": 1}' * 1000)[:60])
    for source in tmp_path / "q.jsonl.xz", tmp_path:
        with pytest.raises(DollyError, match="cannot be read"): load_questions(str(source))


# Figures

def test_figures_of_models_without_a_rating_and_with_names_that_are_formulas():
    import matplotlib.pyplot as plt
    none = dict(turn1=None, turn2=None, average=None, category=dict(writing=None, math=None))
    some = dict(turn1=5.0, turn2=None, average=5.0, category=dict(writing=5.0, math=None))
    for scores in {"m": none}, {"m": dict(none, category={})}, {"m": none, r"$\frac{$": some}, {"$a$": some}:
        for plot in mtbench.plot_radar, mtbench.plot_turns:
            fig = plot(scores, "a $\\judge{$")
            fig.canvas.draw()
            assert "judged by a " in fig.axes[0].get_title(); plt.close(fig)


# Answers

def test_temperatures_and_the_second_prompt():
    calls, questions = [], load_questions("sample")
    def generate(prompts, temperatures):
        calls.append((prompts, dict(zip([q["category"] for q in questions], temperatures))))
        return [Answer(f"turn {len(calls)} of {i}", 3, i != 0) for i in range(len(prompts))]
    result = answer_mtbench(generate, questions, "me", "</s>")
    expected = dict(writing=0.7, roleplay=0.7, stem=0.1, humanities=0.1, reasoning=0.0, math=0.0, coding=0.0, extraction=0.0)
    assert len(calls) == 2 and all(t == expected for _, t in calls)
    for i, (q, before, after) in enumerate(zip(questions, calls[0][0], calls[1][0])):
        assert f"turn 1 of {i}</s>" in after and q["turns"][0] in after and q["turns"][1] in after and after.startswith(before) and q["turns"][1] not in before
    assert result["rows"][2]["choices"] == [dict(index=0, turns=["turn 1 of 2", "turn 2 of 2"])] and result["finished"] == pytest.approx(87.5)
    assert set(result["rows"][0]) == {"question_id", "answer_id", "model_id", "choices", "tstamp"}


# Judging

def test_official_prompts_are_those_of_the_real_run(pinned, tmp_path):
    """The 160 prompts that GPT-4 was really sent for llama2_chat_7b, character by character."""
    sent = []
    judge = official(lambda question: sent.append(question) or Reply("Fine. Rating: [[7]]"))
    judgments = grade(judge, load_questions("official"), rows(pinned / "model_answer/llama2_chat_7b.jsonl.xz"), tmp_path / "r.jsonl", load_references("official"), load_prompts("official"))
    real = {(r["question_id"], r["turn"]): (r["judge"][1], r["user_prompt"]) for r in rows(pinned / "model_judgment/gpt-4_single.jsonl.xz") if r["model"] == "llama2_chat_7b"}
    assert {(r["question_id"], r["turn"]): (r["judge"][1], r["user_prompt"]) for r in judgments} == real and len(real) == 160
    assert all(q.max_tokens == 2048 and not q.choices and [role for role, _ in q.messages] == ["system", "user"] for q in sent)
    assert list(judgments[0]) == list(rows(pinned / "model_judgment/gpt-4_single.jsonl.xz")[0]) and score(judgments)[judgments[0]["model"]]["average"] == 7


def test_defaults_are_corrected_references_and_official_prompts(pinned, tmp_path):
    lines, questions = [], [q for q in load_questions("official") if q["question_id"] in (104, 108, 123)]
    answers = [answer_row(q["question_id"], "m", "first", "second") for q in questions]
    judgments = grade(official(lambda q: Reply("[[5]]")), questions, answers, tmp_path / "r.jsonl", log=lines.append)
    assert [r["judge"][1] for r in judgments] == ["single-math-v1", "single-math-v1-multi-turn", "single-math-v1", "single-v1-multi-turn", "single-v1", "single-v1-multi-turn"]
    assert load_references("corrected")[104][0] in judgments[0]["user_prompt"] and any("3 of 6" in line for line in lines)


def test_replies_that_hold_no_rating_are_invalid_and_counted(tmp_path):
    replies = iter([Reply("no"), Reply("[[85]]"), Reply(error="429"), Reply(""), Reply("[[x]]"), Reply("Rating: [[9]]")])
    questions, lines = load_questions("sample")[:3], []
    answers = [answer_row(q["question_id"], "m", "a", "b") for q in questions]
    prompts = {n.removeprefix("dolly-"): p for n, p in mtbench.OWN_PROMPTS.items()}
    judgments = grade(official(lambda q: next(replies)), questions, answers, tmp_path / "r.jsonl", load_references("sample"), prompts, log=lines.append)
    s = score(judgments, questions)["m"]
    assert [r["score"] for r in judgments] == [-1, -1, -1, -1, -1, 9] and (s["n_invalid"], s["average"]) == (5, 9)
    assert judgments[2]["judgment"] == "$ERROR$ 429" and any("5 of 6 replies are invalid, 2 of them errors" in line for line in lines)  # the empty one, too


@pytest.mark.parametrize("reply, value", [
    (Reply("so [3] or rather [[8]]"), 8), (Reply("[[7.5]]"), 7.5), (Reply("[6]"), 6), (Reply("[[10]]"), 10), (Reply("[[0]]"), -1), (Reply("[[11]]"), -1), (Reply("8/10"), -1),
    (Reply(logprobs={"1": math.log(0.1), "10": math.log(0.3)}), 7.75), (Reply(logprobs={"5": -2000.0}), 5), (Reply(logprobs={"5": -math.inf}), -1), (Reply(logprobs={"yes": -0.1}), -1), (Reply(), -1), (Reply("[[8]]", error="cut off"), -1)])
def test_rating(reply, value):
    assert rating(reply) == pytest.approx(value)


@pytest.mark.parametrize("reply, value", [(Reply("[[A]] or [[B]]"), "A"), (Reply("[[C]]"), "tie"), (Reply("A"), "error"), (Reply(logprobs={"A": -1.0, "B": -1.0}), "tie"), (Reply(logprobs={"C": -0.1, "B": -3.0}), "tie"), (Reply(logprobs={}), "error"), (Reply("[[A]]", error="x"), "error")])
def test_winner(reply, value):
    assert winner(reply) == value


def two_models(questions): return [answer_row(q["question_id"], m, f"{m} one", f"{m} two") for m in ("one", "two") for q in questions]


def test_disagreement_is_a_tie_and_an_error_counts_nowhere(tmp_path):
    questions = load_questions("sample")
    pairs = grade_pairs(Scripted(lambda q: Reply(logprobs={"A": -0.1, "B": -2.0})), questions, two_models(questions), tmp_path / "r.jsonl", load_references("sample"))
    assert len(pairs) == 16 and all((r["g1_winner"], r["g2_winner"]) == ("model_1", "model_2") for r in pairs)
    assert win_rates(pairs)["one"] == dict(win=0, loss=0, tie=16, win_rate=0.5, n_rows=16, n_invalid=0, n_inconsistent=16)
    pairs[0]["g1_winner"] = "error"; pairs[1].update(g1_winner="model_2", g2_winner="model_2"); pairs[2].update(g1_winner="tie", g2_winner="tie")
    rates = win_rates(pairs)
    assert rates["two"] == dict(win=1, loss=0, tie=14, win_rate=8 / 15, n_rows=16, n_invalid=1, n_inconsistent=13) and rates["one"]["win_rate"] == 7 / 15
    assert "Answer 1 by A:\none one" in pairs[0]["g1_user_prompt"] and "Answer 1 by A:\ntwo one" in pairs[0]["g2_user_prompt"]


def test_a_missing_answer_is_named(tmp_path):
    questions = load_questions("sample")
    with pytest.raises(DollyError, match="two has no answer of two turns to question 9008"):
        grade(Scripted(None), questions, two_models(questions)[:-1], tmp_path / "r.jsonl", {})


# FastChat itself

READ = """
import sys, types
for name in ("openai", "anthropic", "fastchat.model", "fastchat.model.model_adapter"): sys.modules[name] = types.ModuleType(name)   # needed to call judges only
adapter = sys.modules["fastchat.model.model_adapter"]
adapter.get_conversation_template = adapter.ANTHROPIC_MODEL_LIST = adapter.OPENAI_MODEL_LIST = None
from fastchat.llm_judge import common
questions, answers = common.load_questions(sys.argv[1], None, None), common.load_model_answers(sys.argv[2])
common.check_data(questions, answers, {}, list(answers), {})
single, pair = common.load_single_model_judgments(sys.argv[3]), common.load_pairwise_model_judgments(sys.argv[4])
print(len(questions), {m: len(a) for m, a in answers.items()}, sum(map(len, single.values())), sum(map(len, pair.values())))
"""


def test_fastchat_reads_our_files_and_prints_the_same_numbers(tmp_path):
    """FastChat 0.2.36 from PyPI, in a virtual environment of its own (16 s, most of it pip)."""
    python, environment = tmp_path / "venv/bin/python", {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    def run(*args): return subprocess.run([python, *map(str, args)], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout
    venv.create(tmp_path / "venv", with_pip=True)
    try: run("-m", "pip", "install", "-q", "--no-deps", "fschat==0.2.36"); run("-m", "pip", "install", "-q", "pandas")
    except subprocess.CalledProcessError as e: pytest.skip(f"cannot install FastChat: {e.stderr.strip().splitlines()[-1]}")

    questions, references, models, answers = load_questions("sample"), load_references("sample"), ("model-a", "model-b"), []
    for m in models:
        made = answer_mtbench(lambda prompts, temperatures: [Answer(f"{m} {len(p)}\u2028é", 2, True) for p in prompts], questions, m, "</s>")["rows"]
        dump(tmp_path / f"answers/{m}.jsonl", made); answers += made
    def noisy(question):
        text, n = question.messages[-1][1], len(question.messages[-1][1])
        if n % 7 == 0: return Reply("none")
        if question.lead.startswith("Better"): return Reply(logprobs={"A" if n % 3 == 0 or text.index("model-a") < text.index("model-b") else "B": -0.1})
        return Reply(logprobs={c: -float(n * (i + 3) % 11) for i, c in enumerate(question.choices)})
    judgments, pairs = (f(Scripted(noisy), questions, answers, tmp_path / "replies.jsonl", references) for f in (grade, grade_pairs))
    single, pair, asked = dump(tmp_path / "single.jsonl", judgments), dump(tmp_path / "pair.jsonl", pairs), dump(tmp_path / "question.jsonl", questions)

    (tmp_path / "read.py").write_text(READ)
    assert run("read.py", asked, tmp_path / "answers", single, pair).strip() == "8 {'model-a': 8, 'model-b': 8} 32 16"
    def last_number(table, model): return float(next(line for line in table.splitlines() if line.startswith(model)).split()[-1])
    printed, scores = run("-m", "fastchat.llm_judge.show_result", "--input-file", single), score(judgments, questions)
    for heading, key in ("First turn", "turn1"), ("Second turn", "turn2"), ("Average", "average"):
        for m in models: assert last_number(printed.split(f"{heading} ##########")[1].split("####")[0], m) == pytest.approx(scores[m][key], abs=1e-5)
    printed, rates = run("-m", "fastchat.llm_judge.show_result", "--input-file", pair, "--mode", "pairwise-all"), win_rates(pairs)
    for m in models: assert last_number(printed, m) == pytest.approx(rates[m]["win_rate"], abs=1e-5)
    assert any(s["n_invalid"] for s in scores.values()) and any(r["n_invalid"] for r in rates.values()) and rates["model-a"]["win_rate"] != 0.5
