"""The conversation under bad luck: threads, failures, Stop at any moment, prompts too long."""
import json
import threading
import time

import pytest

from dolly_lora.config import DollyError, PRESETS
from dolly_lora.conversation import (
    Chat, DecoderWriter, fit_prompt, make_writer, PlainWriter, stream_answers, Turn)
from dolly_lora.data import build_prompt
from dolly_lora.engine.decoder import choose, uniform_draws
from dolly_lora.models import add_lora, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture()
def model():
    """The random Llama with an adapter that changes what it says."""
    import torch
    tuned = add_lora(tiny_model(), PRESETS["tiny"]).eval()
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        for name, p in tuned.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.3)
    return tuned


def plain_ids(model, tokenizer, question, n=12):
    """What `model` says by transformers alone."""
    inputs = tokenizer(build_prompt(question), return_tensors="pt")
    out = model.generate(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask,
                         max_new_tokens=n, do_sample=False,
                         eos_token_id=tokenizer.eos_token_id,
                         pad_token_id=tokenizer.pad_token_id)
    return out[0, inputs.input_ids.shape[1]:].tolist()


def slowed(model, seconds=0.05, fail_at=None):
    """Make each token take a while; `fail_at` raises at that one. Returns what undoes it."""
    count = [0]
    def hook(*_):
        count[0] += 1
        time.sleep(seconds)
        if count[0] == fail_at:
            raise RuntimeError("kernel lost <b>here</b>")
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inner.model.rotary_emb.register_forward_pre_hook(hook)  # once a pass, in either writer


def chat(model, tokenizer, **kwargs):
    return Chat(model, tokenizer, **dict(max_new_tokens=12) | kwargs)


def questions(talk):
    return [turn.question for turn in talk.history]


def until(condition, seconds=5):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def refused(f, *args):
    """The one line with which `f` refuses."""
    with pytest.raises(DollyError) as e:
        list(f(*args) or [])
    assert "\n" not in str(e.value)
    return str(e.value)


# Who answers

def test_base_of_a_comparison_is_the_model_without_any_adapter(model, tokenizer):
    base = plain_ids(tiny_model(), tokenizer, "Name a prime.")
    tuned = plain_ids(model, tokenizer, "Name a prime.")
    talk = chat(model, tokenizer)
    who = [name for name, _ in talk.compare("Name a prime.")]
    assert set(who[2:5]) == set(who[-3:]) == {"base", "tuned"}        # both grow at once
    assert talk.last.beside.ids == base
    assert talk.last.ids == tuned != base
    assert len(talk.history) == 1 and talk.last.which == "tuned"


def test_the_adapter_is_on_after_a_comparison(model, tokenizer):
    tuned = plain_ids(model, tokenizer, "Name a prime.")
    list(chat(model, tokenizer).compare("Name a prime."))
    assert model.get_model_status().enabled is True
    assert plain_ids(model, tokenizer, "Name a prime.") == tuned


def test_both_of_a_comparison_get_the_same_history_and_seed(model, tokenizer):
    talk = chat(model, tokenizer, temperature=0.9, seed=7)
    talk.ask("Hello")
    list(talk.compare("And?"))
    alone = chat(model, tokenizer, temperature=0.9, seed=7)
    alone.ask("Hello")
    alone.which = "base"
    alone.ask("And?")
    assert talk.last.beside.ids == alone.last.ids
    assert talk.last.beside.settings == talk.last.settings == alone.last.settings


def test_plain_base_model_without_adapter(tokenizer):
    talk = chat(tiny_model(), tokenizer)
    assert talk.which == "base"
    talk.ask("Name a prime.")
    assert talk.last.ids == plain_ids(tiny_model(), tokenizer, "Name a prime.")
    assert "no adapter" in refused(talk.compare, "Hi")
    assert len(talk.history) == 1


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_an_answer_is_that_of_generate_whatever_way_it_comes(model, tokenizer, temperature):
    from dolly_lora.generate import generate
    prompt = build_prompt("Name a colour.")
    settings = dict(seed=42, temperature=temperature, top_p=1.0, max_new_tokens=12, system="")
    (expected,) = generate(model, tokenizer, [prompt], 12, temperature=temperature)
    turn = Turn("Name a colour.", "tuned", settings)
    *_, last = stream_answers(model, tokenizer, 400, prompt, [turn], threading.Event())
    assert last == ("tuned", expected.text) and turn.answer == expected.text
    assert len(turn.ids) == expected.n_tokens


@pytest.mark.parametrize("temperature, top_p", [(0.0, 1.0), (0.9, 1.0), (0.9, 0.6)])
def test_both_writers_write_the_same(model, tokenizer, temperature, top_p):
    ids = tokenizer(build_prompt("Name a prime.")).input_ids
    draws = uniform_draws("a prompt", 3, 24)
    answers = []
    for writer in PlainWriter(model, tokenizer), DecoderWriter(model, tokenizer, 300):
        writer.begin(["base", "tuned"], ids, draws, temperature, top_p)
        while writer.at_work:
            writer.step()
        answers.append(writer.ids)
    assert answers[0] == answers[1]
    assert answers[0]["base"] != answers[0]["tuned"]


def test_top_p_is_that_of_transformers(tokenizer):
    import torch
    from transformers import TopPLogitsWarper
    logits = torch.randn(50, 300, generator=torch.Generator().manual_seed(0)) * 3
    u, one = torch.linspace(0, 1, 50), torch.ones(50)
    for top_p in 0.1, 0.5, 0.95:
        kept = TopPLogitsWarper(top_p)(None, logits.clone())
        assert torch.equal(choose(logits, one, u, one * top_p), choose(kept, one, u))


# What is read

def test_only_what_is_new_is_read(model, tokenizer):
    talk = chat(model, tokenizer)
    writer = make_writer(model, tokenizer, talk.max_tokens)
    def tokens(text):
        return len(tokenizer(text).input_ids)
    talk.ask("Name a prime, and say why it is one, in a few words at least.")
    first = writer.read
    assert first == tokens(build_prompt(talk.last.question))
    talk.ask("Why?")
    pair = [(talk.history[0].question, talk.history[0].answer)]
    assert writer.read <= tokens(fit_prompt(tokenizer, pair, "Why?", 10_000)[0]) - first
    answer = talk.last.ids
    talk.undo()
    talk.ask("Why?")                                        # all but its last token is there
    assert writer.read <= 2 and talk.last.ids == answer
    talk.which = "base"
    talk.ask("And?")                                        # the base has read nothing yet
    assert writer.read > first


def test_reading_on_gives_what_reading_all_gives(model, tokenizer):
    talk, fresh = chat(model, tokenizer), chat(model, tokenizer)
    for text in "One", "Two", "Three":
        talk.ask(text)
    fresh.history = talk.history[:2]
    del vars(model)["_writer"]
    fresh.ask("Three")
    assert fresh.last.ids == talk.last.ids


def test_an_answer_ends_where_the_next_instruction_begins(model, tokenizer, monkeypatch):
    script = iter(tokenizer("Blue.\n\n### Instruction:\nName a prime.").input_ids)
    def next_token(logits, *_):
        return logits.new_full(logits.shape[:1], next(script)).long()
    monkeypatch.setattr("dolly_lora.engine.decoder.choose", next_token)
    talk = chat(model, tokenizer, max_new_tokens=200)
    assert talk.ask("Name a colour.") == "Blue."
    assert talk.last.asked_itself and not talk.last.stopped
    assert "went on to ask itself" in talk.last.note
    assert next(script, None) is not None                   # no token more than it takes to see it


def test_a_model_that_was_trained_on_speaks_with_its_new_adapters(model, tokenizer):
    import torch
    talk = chat(model, tokenizer)
    talk.ask("Name a prime.")
    before = talk.last.ids
    adapters = [p for name, p in model.named_parameters() if "lora_B" in name]
    for p in adapters:
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    torch.optim.SGD(adapters, lr=0.5).step()
    talk.clear()
    talk.ask("Name a prime.")
    assert talk.last.ids == plain_ids(model, tokenizer, "Name a prime.") != before


def test_a_model_that_no_decoder_knows_is_answered_for_by_transformers(model, tokenizer):
    model.config.model_type = "other"
    talk = chat(model, tokenizer)
    talk.ask("Name a prime.")
    assert isinstance(vars(model)["_writer"], PlainWriter)
    model.config.model_type = "llama"
    assert talk.last.ids == plain_ids(model, tokenizer, "Name a prime.")


# Threads

def test_twenty_rapid_turns_from_threads_never_mix(model, tokenizer):
    expected = dict(base=plain_ids(tiny_model(), tokenizer, "Name a prime."),
                    tuned=plain_ids(model, tokenizer, "Name a prime."))
    talks = [chat(model, tokenizer) for _ in range(20)]
    for i, talk in enumerate(talks):
        talk.which = "base" if i % 2 else "tuned"
    threads = [threading.Thread(target=talk.ask, args=("Name a prime.",)) for talk in talks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [talk.last.ids for talk in talks] == [expected[talk.which] for talk in talks]
    assert model.get_model_status().enabled is True


def test_one_chat_writes_one_answer_at_a_time(model, tokenizer):
    talk = chat(model, tokenizer)
    first = talk.stream("One")
    next(first)
    for f in (lambda: talk.stream("Two"), talk.undo, talk.clear):
        assert "stop it first" in refused(f)
    list(first)
    assert questions(talk) == ["One"]


def test_of_two_answers_that_were_prepared_one_is_read(model, tokenizer):
    talk = chat(model, tokenizer)
    first, second = talk.stream("First"), talk.stream("Second")
    next(first)
    assert "stop it first" in refused(lambda: second)
    list(first)
    assert questions(talk) == ["First"]
    assert talk.ask("Third") is not None


# Failures

@pytest.mark.parametrize("which", ["base", "tuned", "both"])
def test_failure_in_the_middle_is_raised_at_once_and_the_next_turn_works(model, tokenizer, which):
    expected = plain_ids(model, tokenizer, "Name a prime.")
    talk = chat(model, tokenizer)
    talk.ask("First")
    talk.which = which
    hook = slowed(model, 0, fail_at=5)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="kernel lost"):
        list(talk.stream("Second"))
    assert time.monotonic() - start < 5
    hook.remove()
    assert questions(talk) == ["First"] and talk.turn is None
    assert model.get_model_status().enabled is True
    talk.clear()
    talk.which = "tuned"
    talk.ask("Name a prime.")
    assert talk.last.ids == expected


def test_a_failed_regeneration_keeps_the_turn_it_would_have_replaced(model, tokenizer):
    talk = chat(model, tokenizer)
    answer = talk.ask("First")
    hook = slowed(model, 0, fail_at=5)
    with pytest.raises(RuntimeError, match="kernel lost"):
        list(talk.regenerate())
    hook.remove()
    assert questions(talk) == ["First"] and talk.last.answer == answer


# Stop

def test_stop_keeps_what_is_there(model, tokenizer):
    hook = slowed(model)
    talk = chat(model, tokenizer, max_new_tokens=400)
    pieces = talk.stream("Tell me a story")
    until(lambda: next(pieces))
    start = time.monotonic()
    talk.stop()
    list(pieces)
    assert time.monotonic() - start < 1
    assert talk.last.stopped and "stopped" in talk.last.note
    assert talk.last.answer and 0 < len(talk.last.ids) < 400
    hook.remove()
    kept = talk.last.answer
    talk.max_new_tokens = 12
    talk.ask("And then?")
    assert not talk.last.stopped and talk.history[0].answer == kept


def test_stop_while_a_long_prompt_is_read_or_another_speaks(model, tokenizer):
    hook = slowed(model, 3)
    talk, other = chat(model, tokenizer), chat(model, tokenizer)
    for one in talk, other:                                 # `other` waits for the lock
        pieces = one.stream("Hi")
        next(pieces)
        threading.Timer(0.2, one.stop).start()
        start = time.monotonic()
        list(pieces)
        assert time.monotonic() - start < 1
        assert one.last.stopped and one.last.answer == ""
    hook.remove()
    talk.ask("Name a prime.")                               # what never began is not sent
    assert talk.last.ids == plain_ids(model, tokenizer, "Name a prime.")


def test_a_reader_that_leaves_stops_the_answer(model, tokenizer):
    hook = slowed(model)
    talk = chat(model, tokenizer, max_new_tokens=400)
    for answer in talk.stream("Tell me a story"):
        if answer:
            break
    until(lambda: talk.history)
    assert talk.last.stopped and talk.last.answer
    hook.remove()
    talk.clear()
    assert talk.ask("Hi") is not None


# Turns

def test_regenerate_counts_the_seed_on(model, tokenizer):
    talk = chat(model, tokenizer, temperature=1.0)
    talk.ask("One")
    second = talk.ask("Two")
    list(talk.regenerate())
    assert talk.last.settings["seed"] == 43
    assert talk.last.answer != second and len(talk.history) == 2
    list(talk.regenerate())
    assert talk.last.settings["seed"] == 44


def test_regenerate_at_temperature_0_gives_the_same_answer(model, tokenizer):
    talk = chat(model, tokenizer)
    talk.ask("One")
    greedy = talk.last.ids
    list(talk.regenerate())
    assert talk.last.ids == greedy


def test_edit_undo_clear(model, tokenizer):
    talk = chat(model, tokenizer, temperature=1.0)
    first, second = talk.ask("One"), talk.ask("Two")
    list(talk.edit_last("Three"))
    assert questions(talk) == ["One", "Three"] and talk.last.settings["seed"] == 42
    assert talk.undo() == "Three" and talk.last.answer == first
    assert talk.ask("Two") == second                        # the same seed, history and question
    talk.clear()
    assert talk.history == []
    for f in (talk.regenerate, talk.undo, lambda: talk.save("x.md")):
        assert "nothing has been said" in refused(f)


def test_sampling_heeds_temperature_top_p_and_seed(model, tokenizer):
    import torch
    def ids(**settings):
        talk = chat(model, tokenizer, **settings)
        talk.ask("Name a prime.")
        return talk.last.ids
    state = torch.get_rng_state()
    assert ids(temperature=1.0, top_p=1e-6) == ids()
    assert ids(temperature=1.0) != ids()
    assert ids(temperature=1.0, seed=1) == ids(temperature=1.0, seed=1)
    assert ids(temperature=1.0, seed=1) != ids(temperature=1.0, seed=2)
    assert torch.equal(state, torch.get_rng_state())        # nobody else's dice are thrown


# What is sent

def test_truncation_drops_the_oldest_pairs_and_keeps_the_system_prompt(tokenizer):
    history = [(f"question {i}", f"answer {i}") for i in range(6)]
    whole, cut = fit_prompt(tokenizer, history, "last", 10_000, "Be brief.")
    assert cut == 0 and whole.count("Be brief.") == 1
    assert whole.index("Be brief.") < whole.index("question 0")
    tokens = len(tokenizer(whole).input_ids)
    prompt, cut = fit_prompt(tokenizer, history, "last", tokens - 1, "Be brief.")
    assert cut == 1 and len(tokenizer(prompt).input_ids) < tokens
    assert "question 0" not in prompt and "answer 5" in prompt
    assert prompt.index("Be brief.") < prompt.index("question 1")


def test_what_is_left_out_is_told_and_stays_in_the_history(model, tokenizer):
    talk = chat(model, tokenizer, system="Be brief.", max_tokens=112)
    for i in range(4):
        talk.ask(f"number {i}")
    assert talk.last.cut > 0 and f"{talk.last.cut} earlier turn" in talk.last.note
    assert len(talk.history) == 4
    assert "with the system prompt" in refused(talk.stream, "word " * 100)
    assert len(talk.history) == 4


# What is kept

@pytest.fixture()
def said(model, tokenizer):
    """A conversation of an answer and a comparison."""
    about = dict(model="tiny", adapter="runs/tiny/adapter")
    talk = chat(model, tokenizer, system="Be brief.", temperature=0.5, top_p=0.9, about=about)
    talk.ask("Hé?")
    list(talk.compare("And?"))
    return talk


def test_saved_json_lines_say_how_they_were_made(said, tmp_path):
    text = said.save(tmp_path / "new/a.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    assert [row["question"] for row in rows] == ["Hé?", "And?"]
    assert rows[0]["base_answer"] is None
    assert rows[1]["base_answer"] == said.last.beside.answer
    assert rows[1]["answer"] == said.last.answer
    made = dict(model="tiny", adapter="runs/tiny/adapter", seed=42, temperature=0.5, top_p=0.9,
                max_new_tokens=12, system="Be brief.")
    for row in rows:
        assert row | made == row and row["tokens"]


def test_saved_markdown_says_how_it_was_made(said, tmp_path):
    text = said.save(tmp_path / "a.md").read_text(encoding="utf-8")
    for part in ("- model: tiny", "- adapter: runs/tiny/adapter", "seed 42", "temperature 0.5",
                 "top_p 0.9", "max_new_tokens 12", "system Be brief.", "## Base", "## Tuned",
                 "Hé?"):
        assert part in text


def test_what_cannot_be_saved_is_told(said, tmp_path):
    assert ".jsonl or .md" in refused(lambda: said.save(tmp_path / "a.txt"))
    (tmp_path / "file").write_text("")
    assert "cannot write" in refused(lambda: said.save(tmp_path / "file/a.md"))
