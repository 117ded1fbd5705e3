"""Conversations under the course's template and under the base's own: what is learnt, what is read.

The chat templates here are small ones of our own, in the forms that published models use.
"""
import importlib
import json
import random
import re
import shutil
from dataclasses import replace
from unittest.mock import patch

import papermill
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from conftest import ROOT, cli
from dolly_lora import evaluate
from dolly_lora.chat import open_chat
from dolly_lora.cli import answer_batch, preflight
from dolly_lora.config import DollyError, PRESETS
from dolly_lora.conversation import Chat, NEXT_TURN, fit_prompt
from dolly_lora.data import (
    build_conversation, build_prompt, clean, encode, encode_all, encode_split, load_dolly,
    prepare_data, prompt_builder, prompt_of, split, with_template)
from dolly_lora.files import read_json
from dolly_lora.generate import encode_in_template, make_answerer
from dolly_lora.models import (
    ModelError, add_lora, check_base, load_base, load_tokenizer, load_tuned, tiny_model,
    tiny_tokenizer, turn_end)
from dolly_lora.train import train
from dolly_lora.verdicts import check_pairs
from test_models import need_smollm2

TINY = PRESETS["tiny"]

CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
LLAMA3 = ("{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>"
          "\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}"
          "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}")
# a start token before every turn, spaces around an answer, the system text inside a question
LLAMA2 = ("{% set said = namespace(wish='') %}{% for m in messages %}{% if m.role == 'system' %}"
          "{% set said.wish = '<<SYS>>\n' + m.content + '\n<</SYS>>\n\n' %}"
          "{% elif m.role == 'user' %}{{ bos_token }}[INST] {{ said.wish + m.content }} [/INST]"
          "{% set said.wish = '' %}{% else %} {{ m.content }} {{ eos_token }}{% endif %}"
          "{% endfor %}")
# one start token, and no place for a system message
MISTRAL = ("{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}"
           "{{ raise_exception('roles must alternate') }}{% elif m.role == 'user' %}"
           "[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}"
           "{% endfor %}")
FORMS = {  # name -> template, end of an answer, special tokens, does the tokenizer add the start?
    "chatml": (CHATML, "<|im_end|>", ["<|im_start|>", "<|im_end|>"], False),
    "llama3": (LLAMA3, "<|eot_id|>", ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
               True),
    "llama2": (LLAMA2, "</s>", [], True),
    "mistral": (MISTRAL, "</s>", ["[INST]", "[/INST]"], True),
}

TALK = dict(instruction="Another?", context="Between 10 and 20.", response="11 is next.",
            category="none", system="Be brief.",
            history=[["Name a prime.", "7"], ["Is it odd?", "Yes, it is."]])
PLAIN = dict(instruction="Say hi.", context="", response="Hi there", category="none")


def tokenizer_of(form):
    """The tiny tokenizer with a chat template of this form, as a base would bring it."""
    template, _, special, adds_start = FORMS[form]
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(special, special_tokens=True)
    tokenizer.chat_template = template
    if adds_start:
        start = [(tokenizer.bos_token, tokenizer.bos_token_id)]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{tokenizer.bos_token} $A", special_tokens=start)
    return tokenizer


def base_in(folder, form):
    """A folder with a random model and such a tokenizer; a recipe with it and template=chat."""
    tokenizer, model = tokenizer_of(form), tiny_model()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return replace(TINY, base=str(folder), template="chat")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """(template, tokenizer) by name: four forms, SmolLM2's own, and the course's."""
    found = {"course": ("course", load_tokenizer(TINY))}
    for form in FORMS:
        recipe = base_in(tmp_path_factory.mktemp(form), form)
        found[form] = "chat", load_tokenizer(recipe)
    return found


WAYS = ["course", *FORMS, "smollm2"]


@pytest.fixture(params=WAYS)
def way(request, tokenizers):
    """(template, tokenizer), each in turn."""
    if request.param == "smollm2":
        need_smollm2()
        return "chat", load_tokenizer(replace(PRESETS["demo"], template="chat"))
    return tokenizers[request.param]


def learnt_runs(example):
    """Where what is learnt begins and ends: [(start, end), ...]."""
    labels, runs = example["labels"], []
    for i, label in enumerate(labels):
        if label == -100:
            continue
        if not i or labels[i - 1] == -100:
            runs.append([i, i])
        runs[-1][1] = i + 1
    return runs


# ---- the masks


@pytest.mark.parametrize("row", [PLAIN, TALK, {k: v for k, v in TALK.items() if k != "system"}],
                         ids=["one turn", "system and three turns", "three turns"])
def test_every_answer_and_its_end_token_are_learnt_and_nothing_else(way, row):
    template, tokenizer = way
    example = encode(row, tokenizer, 10**9, template=template)
    ids, labels = example["input_ids"], example["labels"]
    answers = [said for _, said in row.get("history", [])] + [row["response"]]
    runs = learnt_runs(example)
    assert len(runs) == len(answers)
    for (start, end), answer in zip(runs, answers):
        assert labels[start:end] == ids[start:end]
        assert ids[end - 1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids[start:end - 1]).strip() == answer
    assert labels[-1] == tokenizer.eos_token_id and example["cut"] == 0
    everything = encode(row, tokenizer, 10**9, "all", template)
    assert everything["labels"] == everything["input_ids"] == ids


@pytest.mark.parametrize("row", [PLAIN, TALK], ids=["one turn", "three turns"])
def test_what_generation_sends_at_each_turn_is_how_the_training_text_begins(way, row):
    template, tokenizer = way
    build = prompt_builder(template, tokenizer)
    example = encode(row, tokenizer, 10**9, template=template)
    pairs = [*row.get("history", []), [row["instruction"], row["response"]]]
    for n, (start, _) in enumerate(learnt_runs(example)):
        last = n == len(pairs) - 1
        prompt = build(pairs[n][0], row["context"] if last else "", pairs[:n],
                       row.get("system", ""))
        assert tokenizer(prompt).input_ids == example["input_ids"][:start]
    assert prompt == prompt_of(row, build)


def test_the_training_text_is_what_the_template_writes(tokenizers):
    """Rendered at once by transformers, the whole conversation has the same tokens."""
    asked = "Another?\n\nBetween 10 and 20."
    messages = [dict(role="system", content="Be brief.")]
    for question, said in [*TALK["history"], [asked, TALK["response"]]]:
        messages += [dict(role="user", content=question), dict(role="assistant", content=said)]
    for form in "chatml", "llama3", "llama2":
        _, tokenizer = tokenizers[form]
        theirs = tokenizer.apply_chat_template(messages, return_dict=False)
        ours = encode(TALK, tokenizer, 10**9, template="chat")["input_ids"]
        assert theirs[:len(ours)] == ours                 # ChatML writes a line feed at the end
        assert tokenizer.decode(theirs[len(ours):]).strip() == ""


def test_a_long_conversation_is_cut_in_the_middle_and_not_taught_to_end_there(way):
    template, tokenizer = way
    whole = encode(TALK, tokenizer, 10**9, template=template)
    (_, first_end), (second, second_end), _ = learnt_runs(whole)
    for limit in first_end, second, second_end - 1:
        example = encode(TALK, tokenizer, limit, template=template)
        assert example["input_ids"] == whole["input_ids"][:limit]
        assert example["labels"] == whole["labels"][:limit]
        assert example["cut"] == len(whole["input_ids"]) - limit
    assert example["labels"].count(tokenizer.eos_token_id) == 1  # of the first answer


def test_the_courses_examples_are_what_they_were():
    """Dolly's records, one by one: the prompt masked, the response and the end token learnt."""
    tokenizer = load_tokenizer(TINY)
    rows = clean(load_dolly("sample"))[0]
    for row, example in zip(rows, encode_all(rows, tokenizer, 128)):
        prompt = build_prompt(row["instruction"], row["context"])
        start = len(tokenizer(prompt).input_ids)
        ids = tokenizer(prompt + row["response"]).input_ids + [tokenizer.eos_token_id]
        labels = [-100] * start + ids[start:]
        assert example == dict(input_ids=ids[:128], labels=labels[:128], cut=max(0, len(ids) - 128))


def test_a_tokenizer_that_joins_prompt_and_answer_masks_every_prompt():
    from tokenizers import AddedToken
    tokenizer = load_tokenizer(TINY)
    tokenizer.add_tokens([AddedToken("<x>", lstrip=True)])   # takes the prompt's last newline
    row = TALK | dict(history=[["Say it.", "<x> once"]], response="<x> twice")
    joined = tokenizer(build_prompt("Say it.") + "<x> once").input_ids
    assert tokenizer("\n<x>").input_ids == tokenizer("<x>").input_ids and joined
    example = encode(row, tokenizer, 10**9)
    runs = learnt_runs(example)
    said = [tokenizer.decode(example["input_ids"][a:b - 1]) for a, b in runs]
    assert said == ["<x> once", "<x> twice"]
    read = tokenizer.decode(example["input_ids"][runs[0][1]:runs[1][0]])
    assert read == "\n\n" + build_prompt("Another?", TALK["context"])


@pytest.mark.parametrize("change", [
    "{{ m.content | upper }}",                                     # another answer
    "{{ m.content if loop.last else 'left out' }}",                # earlier answers left out
    "Here: {{ m.content }}",                                       # words that no model wrote
])
def test_a_template_that_writes_answers_anew_is_one_line(change):
    tokenizer = tokenizer_of("chatml")
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = CHATML.replace(
        "{{ m.content }}",
        "{% if m.role == 'assistant' %}" + change + "{% else %}{{ m.content }}{% endif %}")
    with pytest.raises(DollyError, match="set template=course") as e:
        encode(TALK, tokenizer, 64, template="chat")
    assert "\n" not in str(e.value)


def test_a_template_that_shortens_what_was_thought_is_one_line():
    """The probe passes, the conversation does not."""
    tokenizer = tokenizer_of("chatml")
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = CHATML.replace("{{ m.content }}", "{{ m.content.split('=>')[-1] }}")
    assert encode(PLAIN, tokenizer, 64, template="chat")["labels"]
    thought = TALK | dict(history=[["Add 2 and 2.", "two and two => 4"]])
    with pytest.raises(DollyError, match="writes earlier answers anew.*template=course"):
        encode(thought, tokenizer, 64, template="chat")


# ---- the end of an answer


@pytest.mark.parametrize("form", FORMS)
def test_the_end_of_an_answer_is_the_templates(form, tmp_path):
    _, end, special, _ = FORMS[form]
    recipe = base_in(tmp_path, form)
    tokenizer = load_tokenizer(recipe)
    assert turn_end(tokenizer) == tokenizer.eos_token == end
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    assert load_tokenizer(replace(recipe, template="course")).eos_token == "</s>"
    check_base(recipe)


def test_smollm2_ends_as_its_template_does():
    need_smollm2()
    course, own = (load_tokenizer(replace(PRESETS["demo"], template=t)) for t in ("course", "chat"))
    assert course.eos_token == own.eos_token == turn_end(own) == "<|im_end|>"


@pytest.mark.parametrize("template", [
    None, "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
    "{{ raise_exception('no') }}", "{% for m in %}"])
def test_a_base_without_a_chat_template_that_ends_is_refused_before_anything_starts(
        template, tmp_path):
    recipe = base_in(tmp_path / "base", "llama2")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    tokenizer.chat_template = template
    (tmp_path / "base/chat_template.jinja").unlink()
    tokenizer.save_pretrained(tmp_path / "base")
    for refuses in (lambda: check_base(recipe), lambda: preflight(recipe, tmp_path / "run"),
                    lambda: train(recipe, tmp_path / "run")):
        with pytest.raises(ModelError, match="set template=course") as e:
            refuses()
        assert "\n" not in str(e.value)
    assert not (tmp_path / "run/data").exists()
    check_base(replace(recipe, template="course"))


def test_a_run_on_a_base_without_a_chat_template_is_one_line(tmp_path, call):
    done = call("run", "tiny", "--run-dir", tmp_path / "run", "--set", "template=chat")
    assert done.returncode == 2 and "tiny has no chat template" in done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / "run").exists()


# ---- the system message, the start token


def test_a_system_text_stands_where_the_template_has_a_place_for_it(tokenizers):
    turns = [("Name a prime.", "7")]
    def written(form):
        template, tokenizer = tokenizers[form]
        return prompt_builder(template, tokenizer)("Another?", turns=turns, system="Be brief.")
    assert written("course") == build_conversation(
        [("Be brief.\n\nName a prime.", "7")], "Another?", "</s>")
    assert written("chatml").startswith("<|im_start|>system\nBe brief.<|im_end|>\n")
    assert written("llama2").startswith("[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nName a prime.")
    assert written("mistral").startswith("[INST] Be brief.\n\nName a prime. [/INST]")
    assert written("mistral").count("Be brief.") == 1


def test_a_template_that_leaves_the_system_text_out_gets_it_in_the_question():
    tokenizer = tokenizer_of("chatml")
    tokenizer.chat_template = CHATML.replace(
        "messages %}", "messages if m.role != 'system' %}", 1)
    prompt = prompt_builder("chat", tokenizer)("Why?", system="Be brief.")
    assert prompt == "<|im_start|>user\nBe brief.\n\nWhy?<|im_end|>\n<|im_start|>assistant\n"


def test_every_text_has_the_start_token_once_where_the_tokenizer_adds_it(tokenizers):
    for form, starts in dict(course=0, chatml=0, llama3=1, mistral=1, llama2=3).items():
        template, tokenizer = tokenizers[form]
        ids = encode(TALK, tokenizer, 10**9, template=template)["input_ids"]
        assert ids.count(tokenizer.bos_token_id) == starts, form
        assert (ids[0] == tokenizer.bos_token_id) == (starts > 0)


def test_a_template_with_the_date_in_it_is_taken(tokenizers):
    tokenizer = tokenizer_of("llama3")
    tokenizer.eos_token = "<|eot_id|>"
    tokenizer.chat_template = LLAMA3.replace(
        "{{ bos_token }}", "{{ bos_token }}{{ strftime_now('%d %b %Y') }}\n")
    example = encode(TALK, tokenizer, 10**9, template="chat")
    assert len(learnt_runs(example)) == 3
    assert re.search(r"\d\d \w+ \d{4}\n", tokenizer.decode(example["input_ids"]))


# ---- cleaning and splitting conversations


def records(*rows):
    """Rows as `load_dolly` gives them."""
    return [row | dict(system=row.get("system", ""), history=row.get("history", []))
            for row in rows]


def test_conversations_are_stripped_and_what_is_empty_falls_away():
    row = TALK | dict(response=" 11 ", system=" Be brief.\n", history=[[" Name a prime.", "7 "]],
                      context="From Bern.[12] ")
    kept, counts = clean(records(row, PLAIN, PLAIN | dict(response=" ", instruction="Hm")))
    assert kept == [TALK | dict(response="11", history=[["Name a prime.", "7"]],
                                context="From Bern."), PLAIN]
    assert counts["empty_responses"] == 1 and counts["citation_marks"] == 1


def test_conversations_that_end_alike_are_no_duplicates():
    other_start = TALK | dict(history=[["Name an even number.", "2"]])
    other_wish = TALK | dict(system="Be long.")
    shouted = TALK | dict(system="BE  brief.")
    kept, counts = clean(records(TALK, TALK, other_start, other_wish, shouted))
    assert len(kept) == 3
    assert counts["exact_duplicates"] == counts["normalised_duplicates"] == 1


def test_conversations_with_the_same_beginning_go_to_one_side():
    rows = []
    for n in range(40):
        start = dict(instruction=f"Count to {n}.", context="", response=str(n), category="none")
        longer = TALK | dict(context="", history=[[f"Count to {n}.", str(n)]])
        rows += [start, longer, longer | dict(system="Be long.")]
    kept, _ = clean(records(*rows))
    assert len(kept) == 120
    parts = split(kept, TINY)
    random.Random(1).shuffle(kept)
    assert split(kept, TINY) == parts
    def first(row):
        return row["history"][0][0] if "history" in row else row["instruction"]
    sides = [{first(row) for row in rows} for rows in parts.values()]
    assert sum(map(len, sides)) == len(set().union(*sides)) == 40
    assert [len(parts[name]) for name in ("train", "val", "test")] == [96, 12, 12]


# ---- a run


@pytest.fixture(scope="module")
def talks(tmp_path_factory):
    """A file of conversations: a system message, one to three turns."""
    lines = []
    for n in range(40):
        messages = [dict(role="system", content="Answer with a number.")]
        for k in range(1 + n % 3):
            messages.append(dict(role="user", content=f"Add {k} and {n}."))
            messages.append(dict(role="assistant", content=str(k + n)))
        lines.append(json.dumps(dict(messages=messages)))
    path = tmp_path_factory.mktemp("data") / "talks.jsonl"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def chat_run(tmp_path_factory, talks):
    """A run with template=chat on these: (recipe, folder)."""
    recipe = base_in(tmp_path_factory.mktemp("base"), "chatml")
    recipe = replace(recipe, dataset=str(talks), max_steps=3, eval_steps=3)
    run = tmp_path_factory.mktemp("run") / "run"
    train(recipe, run)
    return recipe, run


def test_what_is_written_of_conversations_is_read_back(chat_run):
    recipe, run = chat_run
    splits = prepare_data(recipe, run)
    kept, _ = clean(load_dolly(recipe.dataset))
    assert splits == split(kept, recipe)
    rows = [row for part in splits.values() for row in part]
    assert len(rows) == 40 and {row["system"] for row in rows} == {"Answer with a number."}
    assert {len(row.get("history", [])) for row in rows} == {0, 1, 2}
    assert read_json(run / "data/statistics.json")["categories"]["train"] == {"none": 32}


def test_training_learns_every_turn_in_the_bases_template(chat_run):
    recipe, run = chat_run
    tokenizer, rows = load_tokenizer(recipe), prepare_data(recipe, run)["train"]
    examples, counts = encode_split(rows, tokenizer, recipe)
    ends = sum(ids.count(tokenizer.eos_token_id) for ids in examples["labels"])
    turns = sum(1 + len(row.get("history", [])) for row in rows)
    assert ends == turns and counts["dropped"] == 0
    summary = read_json(run / "training_history.json")["summary"]
    val = prepare_data(recipe, run)["val"]
    assert summary["real_tokens"] == round(counts["tokens"] * summary["epochs"])
    losses = evaluate.token_losses(load_base(recipe), tokenizer, val, recipe)
    first = evaluate.mean_loss(losses)["loss"]
    assert summary["first_validation_loss"] == pytest.approx(first, rel=1e-3)
    card = (run / "adapter/README.md").read_text()
    assert "own chat template" in card and "### Instruction" not in card
    assert AutoTokenizer.from_pretrained(run / "adapter").eos_token == "<|im_end|>"


def test_evaluation_asks_with_the_history_in_the_bases_template(chat_run):
    recipe, run = chat_run
    model, tokenizer = load_tuned(recipe, run), load_tokenizer(recipe)
    rows, asked = prepare_data(recipe, run)["test"], []
    build = {name: prompt_builder(recipe.template, tokenizer) for name in ("base", "tuned")}
    answer = make_answerer(model, tokenizer, recipe, run)
    def listening(prompts, *rest):
        asked.extend(prompts["tuned"])
        return answer(prompts, *rest)
    fit = evaluate.drop_long_prompts(rows, tokenizer, recipe)
    made = evaluate.answer_test(listening, fit, recipe, build)["tuned"]
    assert fit == rows and [m["reference"] for m in made] == [r["response"] for r in rows]
    for row, said, prompt in zip(rows, made, asked):
        assert said.get("history") == row.get("history") and said["system"] == row["system"]
        assert prompt.startswith("<|im_start|>system\nAnswer with a number.<|im_end|>\n")
        assert prompt.count("<|im_end|>") == 2 + 2 * len(row.get("history", []))
        assert "### Instruction" not in prompt
    losses = evaluate.contender_losses(model, tokenizer, rows, recipe, "tuned")
    examples = encode_all(rows, tokenizer, recipe.max_length, template="chat")
    learnt = [sum(label != -100 for label in e["labels"]) for e in examples]
    assert losses[:, 1].tolist() == learnt
    course = evaluate.token_losses(model, tokenizer, rows, replace(recipe, template="course"))
    assert losses[:, 0].sum() != pytest.approx(course[:, 0].sum())


def test_a_prompt_that_is_too_long_with_its_history_is_not_asked(chat_run):
    recipe, _ = chat_run
    tokenizer = load_tokenizer(recipe)
    long = TALK | dict(history=[["Name a prime.", "7"], ["Why? " * 200, "So."]])
    assert evaluate.drop_long_prompts([long, TALK], tokenizer, recipe) == [TALK]
    tokens = len(tokenizer(prompt_of(TALK, prompt_builder("chat", tokenizer))).input_ids)
    room = replace(recipe, max_length=tokens + 1)           # for one token of the answer
    assert evaluate.drop_long_prompts([TALK], tokenizer, room) == [TALK]
    with pytest.raises(DollyError, match="set a larger max_length"):
        evaluate.drop_long_prompts([TALK], tokenizer, replace(recipe, max_length=tokens))


def test_a_chat_speaks_the_runs_template(chat_run):
    recipe, run = chat_run
    talk = open_chat(run, system="Answer with a number.", max_new_tokens=4)
    assert talk.template == "chat"
    for question in "Add 1 and 2.", "And 3?":
        before = [(turn.question, turn.answer) for turn in talk.history if turn.answer]
        talk.ask(question)
        prompt, cut = fit_prompt(talk.tokenizer, before, question, 1000, talk.system, "chat")
        assert prompt.startswith("<|im_start|>system\nAnswer with a number.<|im_end|>\n")
        assert cut == 0
        inputs = talk.tokenizer(prompt, return_tensors="pt").to(talk.model.device)
        out = talk.model.generate(**inputs, max_new_tokens=4, do_sample=False,
                                  eos_token_id=talk.tokenizer.eos_token_id,
                                  pad_token_id=talk.tokenizer.pad_token_id)
        assert talk.last.ids == out[0, inputs.input_ids.shape[1]:].tolist()


@pytest.mark.parametrize("template, ends", [("course", True), ("chat", False)])
def test_only_the_courses_mark_ends_an_answer(template, ends):
    """An answer about this course may well say `### Instruction:`."""
    tokenizer, model = load_tokenizer(TINY), tiny_model()
    tokenizer.chat_template = CHATML
    ids = tokenizer(f"Two. {NEXT_TURN} and more").input_ids
    said = iter([*ids, tokenizer.eos_token_id])
    def choose(*_):
        return torch.tensor([next(said)])
    with patch("dolly_lora.conversation.has_room", return_value=False), \
            patch("dolly_lora.conversation.choose", choose):
        talk = Chat(model, tokenizer, 40, template=template)
        answer = talk.ask("What comes before a question?")
    assert talk.last.asked_itself is ends
    assert answer == ("Two." if ends else f"Two. {NEXT_TURN} and more")


def test_a_batch_is_asked_in_the_runs_template(chat_run, tmp_path, monkeypatch, capsys):
    recipe, run = chat_run
    seen = []
    module = importlib.import_module("dolly_lora.generate")
    def generate(model, tokenizer, prompts, *rest, **more):
        seen.extend(prompts)
        return [module.Answer(f"Two. {NEXT_TURN}", 3, True)]
    monkeypatch.setattr(module, "generate", generate)
    prompts = [dict(instruction="Add 1 and 1.", context="Both are one.")]
    answer_batch(None, load_tokenizer(recipe), recipe, run, prompts, None, lora=True)
    assert seen == ["<|im_start|>user\nAdd 1 and 1.\n\nBoth are one.<|im_end|>\n"
                    "<|im_start|>assistant\n"]
    row = json.loads(capsys.readouterr().out)
    assert row["output"] == f"Two. {NEXT_TURN}" and row["finished"] and not row["asked_itself"]


@pytest.mark.parametrize("form", FORMS)
def test_the_third_contender_is_measured_over_the_same_tokens_of_every_turn(tokenizers, form):
    _, tokenizer = tokenizers[form]
    rows = [TALK, PLAIN, TALK | dict(response="word " * 100)]
    def learnt(example):
        return [label for label in example["labels"] if label != -100]
    for limit in 60, 90, 120, 10**9:
        owns = encode_in_template(rows, tokenizer, limit)
        for course, own in zip(encode_all(rows, tokenizer, limit), owns):
            assert learnt(own) == learnt(course) and len(own["labels"]) == len(own["input_ids"])
    for row, own in zip(rows, owns):     # but for spaces around answers it is the template's text
        ids = encode(row, tokenizer, 10**9, template="chat")["input_ids"]
        texts = [re.sub(r"\s+", "", tokenizer.decode(i)) for i in (own["input_ids"], ids)]
        assert texts[0] == texts[1]


def test_the_third_contender_of_a_base_with_another_end_token_is_measured_too(tmp_path):
    recipe = replace(base_in(tmp_path, "chatml"), template="course")
    tokenizer = load_tokenizer(recipe)
    own, = encode_in_template([TALK], tokenizer, 10**9)
    assert tokenizer.decode([i for i in own["labels"] if i != -100]) == \
        "7</s>Yes, it is.</s>11 is next.</s>"
    text = tokenizer.decode(own["input_ids"])
    assert "assistant\n7</s><|im_end|>\n<|im_start|>user\nIs it odd?" in text


def test_a_judges_examination_shows_what_was_said_before():
    _, right = check_pairs([TALK, PLAIN])
    assert right[0]["instruction"].startswith("Name a prime.\n\n7\n\nIs it odd?")
    assert right[1]["instruction"] == "Say hi."


# ---- the stages


def test_alpacas_file_goes_through_the_data_stage(tmp_path):
    rows = [dict(instruction=f"Name the number {n}.", input="" if n % 2 else "in words",
                 output=f"Number {n}") for n in range(30)]
    (tmp_path / "my_alpaca.json").write_text(json.dumps(rows))
    papermill.execute_notebook(
        ROOT / "nbs/01_data.ipynb", tmp_path / "01.ipynb", progress_bar=False,
        parameters=dict(preset="tiny", run_dir=str(tmp_path / "run"),
                        dataset=str(tmp_path / "my_alpaca.json")))
    splits = prepare_data(replace(TINY, dataset=str(tmp_path / "my_alpaca.json")), tmp_path / "run")
    found = sorted((r for part in splits.values() for r in part), key=lambda r: r["instruction"])
    assert len(found) == 30 and found[0] == dict(
        instruction="Name the number 0.", context="in words", response="Number 0", category="none")


def test_the_course_runs_on_conversations_in_the_bases_template(tmp_path, talks):
    """All five stages, as a user calls them."""
    base_in(tmp_path / "base", "chatml")
    done = cli("run", "tiny", "--run-dir", tmp_path / "run", "--dataset", talks, "--set",
               f"base={tmp_path / 'base'}", "template=chat", "judge=local")
    assert done.returncode == 0, done.stderr[-2000:]
    metrics = read_json(tmp_path / "run/metrics.json")
    assert set(metrics["test"]) == {"base", "tuned"}
    report = (tmp_path / "run/report/report.html").read_text()
    assert "no part of the gain is the learning of a template" in " ".join(report.split())
    assert "has no chat template of its own" not in " ".join(report.split())


def test_a_chat_run_is_exported_in_its_template(chat_run, tmp_path):
    from dolly_lora.export import export_merged
    from dolly_lora.gguf_files import export_gguf
    recipe, run = chat_run
    run = shutil.copytree(run, tmp_path / "run")
    folder = export_merged(recipe, run, log=lambda line: None)
    file = export_gguf(recipe, run, "f16", log=lambda line: None)
    for said in read_json(folder / "certificate.json"), read_json(file.parent / "certificate.json"):
        assert said["greedy"]["prompts"] == len(prepare_data(recipe, run)["test"])
        assert said["kl"]["mean"] < 1e-3
    theirs = AutoTokenizer.from_pretrained(folder)
    assert theirs.eos_token == "<|im_end|>" and theirs.chat_template == CHATML
    assert "TEMPLATE" not in (file.parent / "Modelfile").read_text()
    assert read_json(folder / "generation_config.json")["eos_token_id"] == theirs.eos_token_id


@pytest.mark.parametrize("form", FORMS)
def test_transformers_and_llamacpp_make_the_same_prompt_of_messages(form, tmp_path):
    from dolly_lora.export import Transformers, check_prompts, write_merged
    from dolly_lora.gguf_files import write_gguf
    from dolly_lora.llamacpp import LlamaCpp
    recipe = base_in(tmp_path / "base", form)
    model, tokenizer = add_lora(load_base(recipe), recipe), load_tokenizer(recipe)
    own = with_template(tokenizer, "chat")
    rows = [TALK, TALK | dict(history=[]), dict(instruction="Hi", context="", response="Yes.")]
    write_merged(model, own, tmp_path / "merged")
    check_prompts(tokenizer, Transformers(tmp_path / "merged", model.device), rows, recipe)
    write_gguf(model, own, tmp_path / "m.gguf", "f16", form)
    with LlamaCpp(tmp_path / "m.gguf", capacity=512) as program:
        check_prompts(tokenizer, program, rows, recipe)
        wrong = [TALK | dict(system="Be long.")]
        build = prompt_builder("chat", tokenizer)
        assert build("Hi", system="Be long.") != build("Hi", system="Be brief.")
        with patch("dolly_lora.export._messages", lambda row: [dict(role="user", content="Hi")]):
            with pytest.raises(DollyError, match="makes other tokens of the prompt"):
                check_prompts(tokenizer, program, wrong, recipe)
