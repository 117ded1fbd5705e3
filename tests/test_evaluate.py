"""Evaluation: the measures, the three contenders, several trainings, and 03_eval's own cells."""
import ast
import json
import math
import re
import shutil
from dataclasses import replace
from unittest.mock import patch
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing

from conftest import ROOT
from dolly_lora import evaluate, models, verdicts
from dolly_lora.config import PRESETS, DollyError, resolve
from dolly_lora.data import build_conversation, build_prompt, encode_all, prompt_builder
from dolly_lora.files import json_line, read_json, read_jsonl, write_json
from dolly_lora.generate import contender_template, encode_in_template, provenance
from dolly_lora.judge import Reply
from dolly_lora.models import load_base, load_tokenizer
from dolly_lora.results import LossDifference, read_metrics
from dolly_lora.runs import start_run
from dolly_lora.seeds import measure_seeds
from dolly_lora.train import train
from test_verdicts import a_judge, garbage, judged_by

TINY = PRESETS["tiny"]
RECORDS = [dict(instruction=f"Name thing {i}", context="", response=f"Thing {i}.",
                category="open_qa") for i in range(5)]
TEMPLATE = ("{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}"
            "{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}")


def template_tokenizer(adds_start=False):
    """The tiny tokenizer with a chat template; it may put a start token before every text."""
    tokenizer = load_tokenizer(TINY)
    tokenizer.chat_template = TEMPLATE
    if adds_start:
        start = [(tokenizer.bos_token, tokenizer.bos_token_id)]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{tokenizer.bos_token} $A", special_tokens=start)
    return tokenizer


# The measures

def test_loss_of_a_record_does_not_depend_on_its_batch():
    model, tokenizer = load_base(TINY), load_tokenizer(TINY)
    rows = [dict(r, response=r["response"] * (i + 1)) for i, r in enumerate(RECORDS)]
    one = np.concatenate([evaluate.token_losses(model, tokenizer, [r], TINY) for r in rows])
    near = dict(rtol=0.02, atol=0.5) if torch.cuda.is_available() else dict(rtol=1e-4)
    together = evaluate.token_losses(model, tokenizer, rows, TINY)
    np.testing.assert_allclose(one, together, **near)
    assert evaluate.loss_difference(one, one) == LossDifference(0.0, 0.0, 0.0)


def test_rouge_and_overlap():
    near = evaluate.rouge_l(["the cat sat on the mat"], ["the cat lay on the mat"])
    assert near == pytest.approx(500 / 6, abs=1e-3) and evaluate.rouge_l(["a b"], ["c d"]) == 0
    asked = [RECORDS[0]["instruction"].upper(), "never asked"]
    assert evaluate.overlap(asked, RECORDS) == 1


def test_prompts_that_are_all_too_long_are_one_line_not_nan():
    """A test split without a single prompt that fits ended in NaN."""
    model, tokenizer = load_base(TINY), load_tokenizer(TINY)
    long = [dict(r, instruction="word " * 400) for r in RECORDS]
    losses = evaluate.token_losses(model, tokenizer, long, TINY)
    for work in (lambda: evaluate.drop_long_prompts(long, tokenizer, TINY),
                 lambda: evaluate.mean_loss(losses)):
        with pytest.raises(DollyError, match="set a larger max_length") as e: work()
        assert "\n" not in str(e.value)
    one = evaluate.token_losses(model, tokenizer, RECORDS[:1], TINY)
    found = evaluate.loss_difference(*[np.concatenate([losses, one])] * 2)  # some draws are empty
    assert not math.isnan(found.low) and not math.isnan(found.high)


def test_answers_of_a_local_folder_depend_on_its_contents(tmp_path):
    base, run = tmp_path / "base", tmp_path / "run"
    base.mkdir()
    (base / "config.json").write_text("{}")
    (base / "model.safetensors").write_bytes(b"one")
    recipe = replace(TINY, base=str(base))
    before = provenance(recipe, run, "base")
    (base / "notes.md").write_text("not a part of the model")
    assert provenance(recipe, run, "base") == before
    (base / "model.safetensors").write_bytes(b"two")
    assert provenance(recipe, run, "base") != before


# The base model in its own chat template

def test_prompts_of_the_contenders():
    tokenizer = template_tokenizer()
    assert contender_template("chat_template", TINY) == "chat"
    assert contender_template("tuned", TINY) == contender_template("base", TINY) == "course"
    assert contender_template("tuned", replace(TINY, template="chat")) == "chat"
    course = prompt_builder("course", tokenizer)
    assert course("Why?", "Because.") == build_prompt("Why?", "Because.")
    turns = [("Name one.", "Two.")]
    assert course("Why?", turns=turns) == build_conversation(turns, "Why?", tokenizer.eos_token)
    own = prompt_builder("chat", tokenizer)
    assert own("Why?", "Because.") == "<s>[user] Why?\n\nBecause.</s>[assistant] "
    both = "<s>[user] Name one.</s>[assistant] Two.</s>[user] Why?</s>[assistant] "
    assert own("Why?", turns=turns) == both


@pytest.mark.parametrize("adds_start", [False, True])
def test_the_start_token_stands_once_before_a_chat(adds_start):
    tokenizer = template_tokenizer(adds_start)
    text = prompt_builder("chat", tokenizer)("Why?")
    ids = tokenizer(text).input_ids
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id


def test_the_loss_in_the_own_template_is_over_the_same_tokens():
    tokenizer = template_tokenizer()
    rows = RECORDS + [dict(RECORDS[0], response="word " * 400),       # is cut
                      dict(RECORDS[0], instruction="word " * 400)]    # leaves no room
    labels = [[[i for i in e["labels"] if i != -100] for e in encode(rows, tokenizer, 256)]
              for encode in (encode_all, encode_in_template)]
    assert labels[0] == labels[1] and labels[0][0][-1] == tokenizer.eos_token_id
    for row, e in zip(rows, encode_in_template(rows, tokenizer, 256)):
        build = prompt_builder("chat", tokenizer)
        prompt = tokenizer(build(row["instruction"])).input_ids
        assert e["input_ids"][:len(prompt)] == prompt and len(e["labels"]) == len(e["input_ids"])
    counts = [evaluate.token_losses(load_base(TINY), tokenizer, rows, TINY, encode=encode)[:, 1]
              for encode in (encode_all, encode_in_template)]
    assert counts[0].tolist() == counts[1].tolist()


# 03_eval's own cells

def run_cells(name, **parameters):
    """Run a stage's code cells in this process; what each shows in a notebook, as HTML or text."""
    space, shown = {"__name__": "__main__"}, []
    for cell in json.loads((ROOT / f"nbs/{name}.ipynb").read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code" or source.startswith("#| eval: false"): continue
        if "parameters" in cell["metadata"].get("tags", []):
            space |= parameters
            continue
        tree = ast.parse(source)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, f"{name} {cell['id']}", "exec"), space)
        if last:
            value = eval(compile(ast.Expression(last.value), f"{name} {cell['id']}", "eval"), space)
            shown.append(value._repr_html_() if hasattr(value, "_repr_html_") else repr(value))
    return shown


def parameters(run, **more):
    return dict(preset="tiny", run_dir=str(run), dataset="", overrides="") | more


def test_03_eval_ends_with_a_judge_whose_replies_are_all_invalid(tmp_path):
    silent = a_judge(garbage, "local tiny", weights="tiny")
    with patch("dolly_lora.judge.make_judge", lambda *args: silent):
        shown = run_cells("03_eval", **parameters(tmp_path))
    assert sum("judged by local tiny" in table for table in shown) == 2  # win rates, ratings
    metrics = read_metrics(tmp_path)
    assert metrics.judgments["local tiny"].alpaca["tuned against base"].win_rate is None
    assert metrics.test["tuned"].loss > 0 and set(metrics.test) == {"base", "tuned"}
    assert metrics.seeds is None and metrics.alpaca_eval.chat_template is None
    verdicts.keep_judgment(tmp_path, judged_by(a_judge(name="another"), tmp_path))
    (tmp_path / "judgments" / "replies.jsonl").unlink()
    run_cells("03_eval", **parameters(tmp_path))            # again, with its own judge
    judgments = read_metrics(tmp_path).judgments
    assert set(judgments) == {"another", "local tiny"}
    assert judgments["local tiny"].check.win_rate is not None
    assert len(list((tmp_path / "figures").glob("win_rates_*.svg"))) == 1  # 05 draws the others'


@pytest.fixture(scope="module")
def three_contenders(tmp_path_factory):
    """03_eval on a run of two trainings whose base model has a chat template: (folder, shown)."""
    run = tmp_path_factory.mktemp("contenders")
    recipe, _ = resolve(**parameters(run, overrides="seeds=3"))
    start_run(recipe, run)
    train(recipe, run)
    other = run / "seeds" / "43"                             # as train_seeds leaves it
    shutil.copytree(run / "data", other / "data")
    start_run(replace(recipe, seed=43, seeds=1), other)
    train(replace(recipe, seed=43, seeds=1), other)
    with patch.object(models, "load_tokenizer", lambda recipe: template_tokenizer()):
        return run, run_cells("03_eval", **parameters(run, overrides="seeds=3"))


def test_the_third_contender_is_measured_like_the_others(three_contenders):
    run, shown = three_contenders
    metrics, names = read_metrics(run), ["base", "chat_template", "tuned"]
    assert list(metrics.test) == names
    assert len({r.tokens for r in metrics.test.values()}) == 1
    assert metrics.test["chat_template"].loss not in (metrics.test["base"].loss, None)
    assert all(c.chat_template > 0 for c in metrics.by_category.values())
    assert metrics.alpaca_eval.chat_template and metrics.mt_bench.chat_template
    assert sum("base model in its own chat template" in table for table in shown) >= 4
    judgment, = metrics.judgments.values()
    assert list(judgment.alpaca) == ["tuned against base", "tuned against chat_template"]
    assert set(judgment.mt_bench) == {f"tiny-{n}" for n in names}
    answers = run / "answers"
    assert (answers / "mt_bench/model_answer/tiny-chat_template.jsonl").exists()
    assert len(read_json(answers / "alpaca_eval/chat_template/model_outputs.json")) == 16
    keys = [row["key"] for _, row in read_jsonl(answers / "answers.jsonl")]
    assert len(keys) == len(set(keys)) == 3 * (4 + 16 + 2 * 8)  # no contender has another's


def test_base_and_tuned_are_what_they_are_without_a_third_contender(three_contenders, tmp_path):
    """Losses and answers depend on nothing that the third contender brings."""
    run, alone = three_contenders[0], tmp_path
    start_run(resolve(**parameters(alone, overrides="seeds=3"))[0], alone)
    for name in "data", "adapter", "training_history.json":
        copy = shutil.copytree if (run / name).is_dir() else shutil.copy
        copy(run / name, alone / name)
    with patch("dolly_lora.train.train", lambda *args: None):
        run_cells("03_eval", **parameters(alone, overrides="seeds=3"))
    ours, theirs = read_metrics(alone), read_metrics(run)
    for name in "base", "tuned":
        assert ours.test[name] == theirs.test[name]
        for file in f"test/{name}.json", f"alpaca_eval/{name}/model_outputs.json":
            assert read_json(alone / "answers" / file) == read_json(run / "answers" / file)
    assert ours.difference == theirs.difference


def test_the_trainings_with_other_seeds_are_measured(three_contenders):
    run, _ = three_contenders
    seeds = read_metrics(run).seeds
    assert [r.seed for r in seeds.runs] == [42, 43]          # 44 was not trained, and is left out
    assert seeds.runs[0].test_loss == read_metrics(run).test["tuned"].loss
    history = read_json(run / "seeds/43/training_history.json")["summary"]
    assert seeds.runs[1].validation_loss == history["best_validation_loss"]
    assert seeds.runs[1].test_loss != seeds.runs[0].test_loss
    assert seeds.test_loss.low < seeds.test_loss.mean < seeds.test_loss.high


def test_a_training_history_of_something_else_ends_in_one_line(tmp_path):
    write_json(tmp_path / "training_history.json", dict(something="else"))
    recipe = resolve(**parameters(tmp_path, overrides="seeds=3"))[0]
    with pytest.raises(DollyError, match="is not a training history: delete it") as e:
        measure_seeds(recipe, tmp_path, 1.0, None, [])
    assert "\n" not in str(e.value)


def test_a_judge_without_a_key_ends_03_eval_before_anything_is_made(tmp_path, monkeypatch):
    for name in "OPENAI_API_KEY", "OPENAI_BASE_URL": monkeypatch.delenv(name, raising=False)
    with pytest.raises(DollyError, match="OPENAI_API_KEY is not set") as e:
        run_cells("03_eval", **parameters(tmp_path, overrides="judge=gpt-4o"))
    assert "\n" not in str(e.value)
    assert not any((tmp_path / name).exists() for name in ("data", "adapter", "answers"))


HOSTILE = "<img src=x onerror=alert(1)> <eos> $\\frac{$ | `a` **b** \u2028 </td>"


def test_texts_that_are_markup_stay_texts_in_03_eval(tmp_path):
    records = [dict(instruction=f"{HOSTILE} {i}", context="", response=f"{HOSTILE} reply {i}",
                    category=["open_qa", "<b>$cat$"][i % 2]) for i in range(40)]
    data = tmp_path / "hostile.jsonl"
    data.write_text("".join(map(json_line, records)))
    write_json(tmp_path / "alpaca.json", [
        dict(dataset="x", instruction=f"{HOSTILE} {i}", output=HOSTILE,
             generator="<i>$ref_erence$ ../x") for i in range(3)])
    more = dict(dataset=str(data), overrides=f"alpaca={tmp_path / 'alpaca.json'} judge=local")
    recipe, run = resolve(**parameters(tmp_path / "run", **more))
    start_run(recipe, run)
    train(recipe, run)
    named = a_judge(lambda q: Reply(logprobs={q.choices[0]: -0.1}), "<b>judge $x$ of $y$")
    with patch("dolly_lora.judge.make_judge", lambda *args: named):
        shown = "".join(run_cells("03_eval", **parameters(run, **more)))
    assert "onerror" in shown and "ref&#95;erence" in shown and "judge &#36;x" in shown
    for raw in "<img", "<eos>", "<i>", "<b>", "$ref", "$cat", "$x$":  # a formula, for MathJax
        assert raw not in shown, raw
    written = {p.relative_to(tmp_path).parts[0] for p in tmp_path.rglob("*.json*")}
    assert written == {"run", "hostile.jsonl", "alpaca.json"}
    for svg in (run / "figures").glob("*.svg"): ElementTree.parse(svg)


def test_no_cell_of_03_eval_proves_or_hides():
    notebook = json.loads((ROOT / "nbs/03_eval.ipynb").read_text())
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code": continue
        assert "#| hide" not in source and not re.search(r"^\s*assert ", source, re.M)
        assert not re.search(r"\bserver|socket|timeout=|time\.sleep", source)
