"""Evaluation: what may be called official, several judges side by side, judges that say nothing, texts that are markup, and 03_eval's own cells."""
import ast
import json
import lzma
import math
import re
import shutil
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
import torch

from conftest import ROOT
from dolly_lora import alpaca, evaluate, judge, mtbench, verdicts
from dolly_lora.config import PRESETS, DollyError
from dolly_lora.runs import hold_run, start_run
from dolly_lora.files import read_json, write_json, write_text
from dolly_lora.files import json_line
from dolly_lora.judge import Question, Reply, Scripted
from dolly_lora.mtbench import OWN_PROMPTS, load_questions

TINY = PRESETS["tiny"]
RECORDS = [dict(instruction=f"Name thing {i}", context="", response=f"Thing {i}.", category="open_qa") for i in range(5)]
PROMPTS = {name.removeprefix("dolly-"): p for name, p in OWN_PROMPTS.items()}  # stand-ins under the official names
TEMPLATE = (("user", "{instruction}\n\nm: {output_1}\n\nM: {output_2}"),)


def choosing(question):
    "Likes what is shown second; rates everything 7."
    if question.choices and len(question.choices) == 2: return Reply(logprobs={question.choices[0]: -2.0, question.choices[1]: -0.2})
    return Reply(logprobs={"7": -0.1}) if question.choices else Reply("Rating: [[7]]")


def garbage(question): return Reply("Hmm, $x$ <b>hard</b> to say.")


def a_judge(answer=choosing, name="scripted", official=False, **origin):
    who = Scripted(answer, official)
    who.name, who.origin = name, origin
    return who


def answers_in(run, alpaca_rows=None, questions=None, text="did it"):
    """A run folder with answers of both models, as 03_eval leaves them."""
    asked, questions = alpaca_rows or alpaca.load_instructions("sample"), questions or load_questions("sample")
    for name in "base", "tuned":
        write_json(run / "answers/alpaca_eval" / name / "model_outputs.json", [dict(r, output=f"{name} {text} {i}", generator=f"tiny-{name}") for i, r in enumerate(asked)])
        write_text(run / f"answers/mt_bench/model_answer/tiny-{name}.jsonl", "".join(json_line(dict(question_id=q["question_id"], model_id=f"tiny-{name}", choices=[dict(index=0, turns=[f"{name} {text}", "and more"])])) for q in questions))
    return run


def judged_by(who, run, recipe=TINY):
    found = verdicts.judge_answers(who, recipe, run, RECORDS, lambda line: None)
    verdicts.keep_verdicts(run, who.name, found)
    return verdicts.summarise_verdicts(who, found, load_questions(recipe.mtbench))


@pytest.fixture
def official_files(shared, monkeypatch):
    """The official prompts and references, from the local copies."""
    bench, by_sha = shared / "eval/mt_bench", {}
    for path in bench.rglob("*.jsonl"): by_sha[evaluate.file_sha256(path)] = path
    prompt = alpaca.judge_prompt(shared / "eval/alpaca_eval/alpaca_eval_clf.txt")
    monkeypatch.setattr(mtbench, "fetch", lambda url, sha256: by_sha[sha256])
    monkeypatch.setattr(alpaca, "judge_prompt", lambda: prompt)
    monkeypatch.setattr(evaluate, "length_control_files", lambda: (shared / "eval/alpaca_eval/instruction_difficulty.csv", shared / "eval/alpaca_eval/df_gamed.csv.xz"))
    return shared / "eval"


# What may be called official

def test_published_judge_sets_and_prompts_are_official_and_nothing_else_is(official_files, tmp_path):
    folder = official_files / "alpaca_eval"
    recipe = replace(TINY, alpaca=str(folder / "gpt4_1106_preview/model_outputs.json.xz"), mtbench="official")
    run = answers_in(tmp_path, alpaca.load_instructions(recipe.alpaca), load_questions("official"))
    official = judged_by(a_judge(name="gpt-4-1106-preview", official=True), run, recipe)
    assert official["official"] == dict(alpaca=True, mt_bench=False) and official["unofficial"] == dict(mt_bench="the judge is gpt-4-1106-preview, published numbers are gpt-4's")
    rates = official["alpaca"]
    assert rates["tuned against gpt4_1106_preview"]["n_total"] == 805 and "every verdict is a tie" in rates["tuned against gpt4_1106_preview"]["lc_refused"]
    fours = judged_by(a_judge(name="gpt-4", official=True), run, replace(recipe, judge="gpt-4"))
    assert fours["official"] == dict(alpaca=False, mt_bench=True) and "published numbers are gpt-4-1106-preview's" in fours["unofficial"]["alpaca"]
    other = judged_by(a_judge(name="qwen-7b", official=True), run, recipe)
    assert other["official"] == dict(alpaca=False, mt_bench=False) and other["unofficial"]["alpaca"].startswith("the judge is qwen-7b")
    assert "the judge is qwen-7b" in other["alpaca"]["tuned against gpt4_1106_preview"]["lc_refused"]


def test_every_clause_that_makes_alpaca_unofficial(official_files):
    folder = official_files / "alpaca_eval"
    with lzma.open(folder / "alpaca-7b/annotations.json.xz", "rt") as f: rows = [dict(r, annotator="gpt-4-1106-preview") for r in json.load(f)]
    prompt, why = alpaca.judge_prompt(), alpaca.why_unofficial
    ours = [dict(r, generator_1="base", output_1="mine") for r in rows]
    assert why({"a": rows}, prompt) == "" == why({"a": rows[::-1], "tuned against base": ours}, prompt)
    assert why({"a": rows[:3]}, prompt) == "3 of 805 instructions" == why({"a": rows, "b": ours[:3]}, prompt)
    assert why({"a": rows}, TEMPLATE) == "the judge's prompt is not the published one"
    assert "compared with gpt4_1106_preview" in why({"a": ours}, prompt)
    assert "the reference's answers are not" in why({"a": [dict(rows[0], output_1="forged"), *rows[1:]]}, prompt)
    assert why({"a": rows + rows[:1]}, prompt) == "more than the 805 instructions"
    assert why({"a": [dict(rows[0], annotator="qwen-7b"), *rows[1:]]}, prompt).startswith("the judge is qwen-7b")


def test_every_clause_that_makes_mt_bench_unofficial(official_files):
    questions, prompts = load_questions("official"), mtbench.load_prompts()
    name = lambda q, t: mtbench.prompt_name("single", q["category"] in mtbench.NEED_REFERENCE, t)
    rows = [dict(question_id=q["question_id"], model=m, judge=["gpt-4", name(q, t)], score=5, turn=t) for m in "ab" for q in questions for t in (1, 2)]
    why = mtbench.why_unofficial
    assert why(rows, questions, prompts) == ""
    assert why(rows[:-1], questions, prompts) == "79 of 80 questions"
    assert why(rows, [dict(questions[0], turns=["What?", "Why?"]), *questions[1:]], prompts) == "the questions are not the published ones"
    assert why(rows, questions, PROMPTS) == "the judge's prompts are not the published ones"
    sample = load_questions("sample")
    assert why([dict(rows[0], question_id=q["question_id"]) for q in sample], sample, prompts) == "0 of 80 questions"


def test_the_course_s_own_questions_are_not_official_for_any_endpoint(official_files, tmp_path):
    """Issue 10: three instructions and the course's own eight questions were shown as official."""
    for name in "gpt-4-1106-preview", "gpt-4", "stub":
        judged = judged_by(a_judge(name=name, official=True), answers_in(tmp_path / name))
        assert judged["official"] == dict(alpaca=False, mt_bench=False) and set(judged["unofficial"]) == {"alpaca", "mt_bench"}
        verdicts.save_judge_figures(judged, tmp_path)
        for kind in "win_rates", "mtbench_radar", "mtbench_turns":
            for text in (tmp_path / f"figures/{kind}_{name}.txt").read_text(), (tmp_path / f"figures/{kind}_{name}.svg").read_text():
                assert f"{name}: not leaderboard numbers" in text or kind.endswith("svg") or "<use" in text


def test_the_published_judge_sees_the_published_references(official_files):
    assert verdicts._references(replace(TINY, mtbench="official", judge="gpt-4")) == mtbench.load_references("official")
    assert verdicts._references(replace(TINY, mtbench="official", judge="other")) == mtbench.load_references("corrected")


# Several judges

def test_judges_stand_side_by_side_and_a_later_run_keeps_them(tmp_path):
    run = answers_in(tmp_path)
    for name in "local tiny", "local-tiny", "local/tiny": verdicts.keep_judgment(run, judged_by(a_judge(name=name), run))
    judgments = read_json(run / "metrics.json")["judgments"]
    assert list(judgments) == ["local tiny", "local-tiny", "local/tiny"] and all(j["judge"] == name for name, j in judgments.items())
    assert len(list((run / "judgments/mt_bench/model_judgment").iterdir())) == len(list((run / "judgments/alpaca_eval").iterdir())) == 3
    verdicts.keep_judgment(run, judged_by(a_judge(garbage, name="local tiny", weights="b"), run))
    judgments = read_json(run / "metrics.json")["judgments"]
    assert len(judgments) == 3 and judgments["local tiny"]["check"]["win_rate"] is None and judgments["local-tiny"]["check"]["win_rate"] == 50
    answers_in(run, text="did something else")                               # the model was trained again
    verdicts.keep_judgment(run, judged_by(a_judge(name="new"), run))
    assert list(read_json(run / "metrics.json")["judgments"]) == ["new"]


def test_old_metrics_and_other_keys_survive_a_judgment(tmp_path):
    run = answers_in(tmp_path)
    write_json(run / "metrics.json", dict(test=dict(base=1), judgments=dict(judge="local tiny", official=True, alpaca={})))
    verdicts.keep_judgment(run, judged_by(a_judge(), run))
    assert read_json(run / "metrics.json")["test"] == dict(base=1) and list(read_json(run / "metrics.json")["judgments"]) == ["scripted"]


def test_slugs_are_safe_and_never_the_same():
    names = ["gpt-4", "GPT-4", "local tiny", "local-tiny", "local/tiny", "local  tiny", "../../etc", "..", "", "né", "né", "a" * 300, "a" * 301, "$x$ <b>", "con/aux", "-a", "a"]
    slugs = [verdicts.judge_slug(n) for n in names]
    assert len(set(slugs)) == len(set(names)) and all(re.fullmatch(r"[a-z0-9][a-z0-9.-]{0,80}", s) and ".." not in s for s in slugs)
    assert slugs[0] == "gpt-4" and verdicts.judge_slug(slugs[2]) != slugs[2]  # a name that looks like another's slug


def test_no_pair_s_name_leaves_the_folder(tmp_path):
    verdicts.keep_verdicts(tmp_path / "run", "../../judge", dict(annotations={"base against ../../../evil": []}, judgments=[]))
    assert {p.relative_to(tmp_path).parts[0] for p in tmp_path.rglob("*.json*")} == {"run"} and not list(tmp_path.glob("*.json*"))


def test_another_process_s_run_folder_is_not_written_to(tmp_path):
    run, code = answers_in(tmp_path), "import sys; from dolly_lora.config import hold_run\nwith hold_run(sys.argv[1]): print('held', flush=True); sys.stdin.read()"
    import subprocess, sys
    p = subprocess.Popen([sys.executable, "-c", code, str(run)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert p.stdout.readline() == "held\n"
        answer = evaluate.make_answerer(None, None, TINY, run, "base")
        for write in (lambda: verdicts.judge_answers(a_judge(), TINY, run, RECORDS), lambda: verdicts.keep_verdicts(run, "j", {}), lambda: verdicts.keep_judgment(run, {}), lambda: answer(["x"])):
            with pytest.raises(DollyError, match=f"in use by process {p.pid} on"): write()
    finally: p.communicate("")


# A judge that says nothing

def test_a_judge_without_a_valid_reply_leaves_dashes_not_errors(tmp_path):
    run = answers_in(tmp_path)
    for name, answer in ("garbage", garbage), ("silent", lambda q: Reply()), ("down", lambda q: Reply(error="HTTP 503")):
        judged = judged_by(a_judge(answer, name), run)
        pair, model = judged["alpaca"]["tuned against base"], judged["mt_bench"]["tiny-base"]
        assert [pair[k] for k in ("win_rate", "low", "high", "standard_error", "length_controlled_winrate")] == [None] * 5 and pair["n_total"] == 0 and pair["lc_refused"] == "no verdict is valid"
        assert pair["consistency"]["invalid"] == 16 and model["average"] is None and model["interval"] is None and model["n_invalid"] == 16
        assert judged["check"]["low"] is None and not verdicts.passed(judged["check"])
        verdicts.keep_judgment(run, judged); verdicts.save_judge_figures(judged, run)
        assert "– (– to –)" in (run / f"figures/win_rates_{name}.txt").read_text() and "– and –" in (run / f"figures/mtbench_turns_{name}.txt").read_text()
    assert json.loads((run / "metrics.json").read_text())["judgments"]["garbage"]


def test_one_model_without_a_valid_rating_among_others(tmp_path):
    run = answers_in(tmp_path)
    judged = judged_by(a_judge(lambda q: garbage(q) if "tuned did" in q.messages[-1][1] else choosing(q)), run)
    assert judged["mt_bench"]["tiny-base"]["average"] == 7 and judged["mt_bench"]["tiny-tuned"]["average"] is None
    verdicts.save_judge_figures(judged, run)


def test_passed_is_surely_above_a_coin():
    assert verdicts.passed(dict(low=50.1)) and not verdicts.passed(dict(low=50.0)) and not verdicts.passed(dict(low=None))
    assert verdicts.format_number(None) == "–" and verdicts.format_number(1.25, 2) == "1.25"


# Before the work begins, and before money is spent

@pytest.mark.parametrize("change, why", [
    (dict(judge="local:nowhere/at/all"), "no base model at"), (dict(alpaca="nowhere.json"), "cannot read nowhere.json"), (dict(mtbench="nowhere.jsonl"), "no file at"),
    (dict(judge="gpt-4"), "OPENAI_API_KEY is not set")])
def test_the_check_before_the_work_names_what_is_missing(change, why, monkeypatch):
    for name in "OPENAI_API_KEY", "OPENAI_BASE_URL": monkeypatch.delenv(name, raising=False)
    verdicts.check_evaluation(TINY)
    with pytest.raises(DollyError, match=why) as e: verdicts.check_evaluation(replace(TINY, **change))
    assert "\n" not in str(e.value)


def test_missing_official_prompts_are_found_before_the_work(monkeypatch):
    monkeypatch.setattr(evaluate, "check_judge", lambda recipe: None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DollyError, match="no official judge prompt here"): verdicts.check_evaluation(replace(TINY, judge="stub"))


def test_an_estimate_needs_no_package_no_network_and_no_key(official_files, tmp_path, monkeypatch):
    for name in "OPENAI_API_KEY", "OPENAI_BASE_URL": monkeypatch.delenv(name, raising=False)
    run = answers_in(tmp_path, alpaca.load_instructions(official_files / "alpaca_eval/gpt4_1106_preview/model_outputs.json.xz"), load_questions("official"))
    recipe = replace(TINY, alpaca="official", mtbench="official", judge="gpt-4-1106-preview")
    reference = alpaca.load_reference(official_files / "alpaca_eval/gpt4_1106_preview/model_outputs.json.xz")
    with patch.object(alpaca, "load_reference", lambda source: reference): exact = verdicts.estimate_cost(recipe, run, RECORDS)
    def offline(*args): raise DollyError("offline")
    for module, name in (alpaca, "judge_prompt"), (alpaca, "fetch"), (mtbench, "fetch"): monkeypatch.setattr(module, name, offline)
    about = verdicts.estimate_cost(recipe, run, RECORDS)
    assert exact["exact"] and not about["exact"] and exact["judge"] == about["judge"] == "gpt-4-1106-preview"
    assert exact["calls"] == about["calls"] == 2 * (3 * 805 + 5) + 2 * 160 and abs(about["tokens"] / exact["tokens"] - 1) < 0.02 and about["usd"] == pytest.approx(exact["usd"], rel=0.02)
    assert not (run / "judgments").exists()


def test_known_lengths_are_those_of_the_official_files(official_files):
    prompts = mtbench.load_prompts()
    assert mtbench.PROMPT_CHARACTERS == {n: len(p["system_prompt"]) + len(p["prompt_template"]) for n, p in prompts.items()}
    assert alpaca.PROMPT_CHARACTERS == sum(len(text) for _, text in alpaca.judge_prompt())
    turns = [t for q in load_questions("official") for t in q["turns"]]
    assert mtbench.QUESTION_CHARACTERS == round(np.mean([len(t) for t in turns]))
    assert mtbench.REFERENCE_CHARACTERS == round(np.mean([len(t) for r in mtbench.load_references("official").values() for t in r]))
    reference = alpaca.load_reference(official_files / "alpaca_eval/gpt4_1106_preview/model_outputs.json.xz")
    assert alpaca.REFERENCE_CHARACTERS == round(np.mean([len(r["output"]) for r in reference]))


def test_an_estimate_for_a_local_judge_counts_what_is_left(tmp_path):
    run = answers_in(tmp_path)
    first = verdicts.estimate_cost(TINY, run, RECORDS)
    assert first["usd"] == 0 and first["exact"] and first["calls"] > 60
    judged_by(a_judge(name="local tiny", weights="tiny"), run)
    assert verdicts.estimate_cost(TINY, run, RECORDS)["calls"] == 0


# The measures

def test_loss_of_a_record_does_not_depend_on_its_batch():
    from dolly_lora.models import load_base, load_tokenizer
    model, tokenizer, rows = load_base(TINY), load_tokenizer(TINY), [dict(r, response=r["response"] * (i + 1)) for i, r in enumerate(RECORDS)]
    one = np.concatenate([evaluate.token_losses(model, tokenizer, [r], TINY) for r in rows])
    near = dict(rtol=0.02, atol=0.5) if torch.cuda.is_available() else dict(rtol=1e-4)
    np.testing.assert_allclose(one, evaluate.token_losses(model, tokenizer, rows, TINY), **near)
    assert evaluate.loss_difference(one, one) == dict(difference=0, low=0, high=0)


def test_rouge_and_overlap():
    assert evaluate.rouge_l(["the cat sat on the mat"], ["the cat lay on the mat"]) == pytest.approx(500 / 6, abs=1e-3) and evaluate.rouge_l(["a b"], ["c d"]) == 0
    assert evaluate.overlap([RECORDS[0]["instruction"].upper(), "never asked"], RECORDS) == 1


def test_answers_of_a_local_folder_depend_on_its_contents(tmp_path):
    base, run = tmp_path / "base", tmp_path / "run"
    base.mkdir(); (base / "config.json").write_text("{}"); (base / "model.safetensors").write_bytes(b"one")
    recipe = replace(TINY, base=str(base))
    before = evaluate.provenance(recipe, run, "base")
    (base / "notes.md").write_text("not a part of the model")
    assert evaluate.provenance(recipe, run, "base") == before
    (base / "model.safetensors").write_bytes(b"two")
    assert evaluate.provenance(recipe, run, "base") != before


# 03_eval's own cells

def run_cells(name, **parameters):
    """Run a stage's code cells in this process, each shown as a notebook shows it; what was shown, as HTML or text."""
    space, shown = {"__name__": "__main__"}, []
    for cell in json.loads((ROOT / f"nbs/{name}.ipynb").read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code" or source.startswith("#| eval: false"): continue
        if "parameters" in cell["metadata"].get("tags", []): space |= parameters; continue
        tree = ast.parse(source)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, f"{name} {cell['id']}", "exec"), space)
        if last:
            value = eval(compile(ast.Expression(last.value), f"{name} {cell['id']}", "eval"), space)
            shown.append(value._repr_html_() if hasattr(value, "_repr_html_") else repr(value))
    return shown


def parameters(run, **more): return dict(preset="tiny", run_dir=str(run), dataset="", overrides="") | more


def test_03_eval_ends_with_a_judge_whose_replies_are_all_invalid(tmp_path):
    with patch("dolly_lora.judge.make_judge", lambda *args: a_judge(garbage, "local tiny")): run_cells("03_eval", **parameters(tmp_path))
    metrics = read_json(tmp_path / "metrics.json")
    assert metrics["judgments"]["local tiny"]["alpaca"]["tuned against base"]["win_rate"] is None and metrics["test"]["tuned"]["loss"] > 0
    verdicts.keep_judgment(tmp_path, judged_by(a_judge(name="another"), tmp_path))
    run_cells("03_eval", **parameters(tmp_path))                             # again, with its own judge, from the cache
    judgments = read_json(tmp_path / "metrics.json")["judgments"]
    assert set(judgments) == {"another", "local tiny"} and judgments["local tiny"]["check"]["win_rate"] is not None
    assert len(list((tmp_path / "figures").glob("win_rates_*.svg"))) == 1    # 05 draws the others'


HOSTILE = "<img src=x onerror=alert(1)> <eos> $\\frac{$ | `a` **b** \u2028 </td>"


def test_texts_that_are_markup_stay_texts_in_03_eval(tmp_path):
    records = [dict(instruction=f"{HOSTILE} {i}", context="", response=f"{HOSTILE} reply {i}", category=["open_qa", "<b>$cat$"][i % 2]) for i in range(40)]
    (tmp_path / "hostile.jsonl").write_text("".join(map(json_line, records)))
    write_json(tmp_path / "alpaca.json", [dict(dataset="x", instruction=f"{HOSTILE} {i}", output=HOSTILE, generator="<i>$ref_erence$ ../x") for i in range(3)])
    more = dict(dataset=str(tmp_path / "hostile.jsonl"), overrides=f"alpaca={tmp_path / 'alpaca.json'} judge=local")
    from dolly_lora.config import resolve
    from dolly_lora.train import train
    recipe, run = resolve(**parameters(tmp_path / "run", **more))
    start_run(recipe, run); train(recipe, run)
    shown = "".join(run_cells("03_eval", **parameters(run, **more)))
    assert "onerror" in shown and "<img" not in shown and "<eos>" not in shown and "<i>$ref" not in shown and "<b>$cat" not in shown
    assert {p.relative_to(tmp_path).parts[0] for p in tmp_path.rglob("*.json*")} == {"run", "hostile.jsonl", "alpaca.json"}
    from xml.etree import ElementTree
    for svg in (run / "figures").glob("*.svg"): ElementTree.parse(svg)


def test_no_cell_of_03_eval_proves_or_hides():
    cells = [("".join(c["source"])) for c in json.loads((ROOT / "nbs/03_eval.ipynb").read_text())["cells"] if c["cell_type"] == "code"]
    assert not [c for c in cells if "#| hide" in c or re.search(r"^\s*assert ", c, re.M)]
    assert not [c for c in cells if re.search(r"\bserver|socket|timeout=|time\.sleep", c)]
