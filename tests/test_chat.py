"""The chat under bad luck: threads, failures, hostile text, Stop at any moment; the window and the terminal without a browser."""
import json
import os
import pty
import re
import subprocess
import sys
import threading
import time

import pytest

from conftest import ROOT, cli


@pytest.fixture(scope="module")
def tokenizer():
    from dolly_lora.models import tiny_tokenizer
    return tiny_tokenizer()


@pytest.fixture()
def model():
    """The random Llama with an adapter that changes what it says."""
    import torch
    from dolly_lora.config import PRESETS
    from dolly_lora.models import add_lora, tiny_model
    tuned = add_lora(tiny_model(), PRESETS["tiny"]).eval()
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        for name, p in tuned.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.3)
    return tuned


def plain_ids(model, tokenizer, question, n):
    """What `model` says by transformers alone."""
    from dolly_lora.data import build_prompt
    x = tokenizer(build_prompt(question), return_tensors="pt")
    out = model.generate(input_ids=x.input_ids, attention_mask=x.attention_mask, max_new_tokens=n, do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return out[0, x.input_ids.shape[1]:].tolist()


def slowed(model, seconds=0.05, fail_at=None):
    """Make each token take a while; `fail_at` raises at that one. Returns what undoes it."""
    count = [0]
    def hook(*_):
        count[0] += 1
        time.sleep(seconds)
        if count[0] == fail_at:
            raise RuntimeError("kernel lost <b>here</b>")
    return model.register_forward_pre_hook(hook) if not hasattr(model, "get_base_model") else model.get_base_model().register_forward_pre_hook(hook)


def chat(model, tokenizer, **kwargs):
    from dolly_lora.conversation import Chat
    return Chat(model, tokenizer, **dict(max_new_tokens=12) | kwargs)


def until(condition, seconds=5):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def refused(f, *args):
    from dolly_lora.config import DollyError
    with pytest.raises(DollyError) as e:
        list(f(*args) or [])
    assert "\n" not in str(e.value)
    return str(e.value)


def test_base_of_a_comparison_is_the_model_without_any_adapter(model, tokenizer):
    from dolly_lora.models import tiny_model
    base, tuned = plain_ids(tiny_model(), tokenizer, "Name a prime.", 12), plain_ids(model, tokenizer, "Name a prime.", 12)
    talk = chat(model, tokenizer)
    seen = list(talk.compare("Name a prime."))
    assert [w for i, (w, _) in enumerate(seen) if i == 0 or seen[i - 1][0] != w] == ["base", "tuned"]
    assert talk.last.beside.ids == base and talk.last.ids == tuned != base and len(talk.history) == 1 and talk.last.which == "tuned"
    assert model.get_model_status().enabled is True and plain_ids(model, tokenizer, "Name a prime.", 12) == tuned


def test_an_answer_is_that_of_generate_whatever_way_it_comes(model, tokenizer):
    from dolly_lora.data import build_prompt
    from dolly_lora.generate import generate
    settings = dict(seed=42, temperature=0.0, top_p=1.0, max_new_tokens=12, system="")
    (expected,) = generate(model, tokenizer, [build_prompt("Name a colour.")], 12)
    from dolly_lora.conversation import Turn, stream_answer
    turn = Turn("Name a colour.", "tuned", settings)
    *_, last = stream_answer(model, tokenizer, build_prompt(turn.question), turn, threading.Event())
    assert turn.answer == last == expected.text and len(turn.ids) == expected.n_tokens


def test_both_of_a_comparison_get_the_same_history_and_seed(model, tokenizer):
    talk = chat(model, tokenizer, temperature=0.9, seed=7)
    talk.ask("Hello")
    list(talk.compare("And?"))
    alone = chat(model, tokenizer, temperature=0.9, seed=7)
    alone.ask("Hello"), setattr(alone, "which", "base")
    alone.ask("And?")
    assert talk.last.beside.ids == alone.last.ids and talk.last.beside.settings == talk.last.settings == alone.last.settings


def test_twenty_rapid_turns_from_threads_never_mix(model, tokenizer):
    from dolly_lora.models import tiny_model
    expected = dict(base=plain_ids(tiny_model(), tokenizer, "Name a prime.", 12), tuned=plain_ids(model, tokenizer, "Name a prime.", 12))
    talks = [chat(model, tokenizer) for _ in range(20)]
    for i, talk in enumerate(talks):
        talk.which = "base" if i % 2 else "tuned"
    threads = [threading.Thread(target=talk.ask, args=("Name a prime.",)) for talk in talks]
    for t in threads: t.start()
    for t in threads: t.join(60)
    assert [talk.last.ids for talk in talks] == [expected[talk.which] for talk in talks]
    assert model.get_model_status().enabled is True


def test_one_chat_writes_one_answer_at_a_time(model, tokenizer):
    talk = chat(model, tokenizer)
    first = talk.stream("One")
    next(first)
    for f in (lambda: talk.stream("Two"), talk.undo, talk.clear):
        assert "stop it first" in refused(f)
    list(first)
    assert [t.question for t in talk.history] == ["One"]
    a, b = talk.stream("Two"), talk.stream("Three")
    next(a)
    assert "stop it first" in refused(lambda: b)
    list(a)
    assert [t.question for t in talk.history] == ["One", "Two"]


def test_plain_base_model_without_adapter(tokenizer):
    from dolly_lora.models import tiny_model
    talk = chat(tiny_model(), tokenizer)
    assert talk.which == "base" and talk.ask("Name a prime.") is not None and talk.last.ids == plain_ids(tiny_model(), tokenizer, "Name a prime.", 12)
    assert "no adapter" in refused(talk.compare, "Hi") and len(talk.history) == 1


@pytest.mark.parametrize("which", ["base", "tuned", "both"])
def test_failure_in_the_middle_is_raised_at_once_and_the_next_turn_works(model, tokenizer, which):
    talk = chat(model, tokenizer)
    talk.ask("First")
    expected, talk.which = plain_ids(model, tokenizer, "Name a prime.", 12), which
    hook, start = slowed(model, 0, fail_at=5), time.monotonic()
    with pytest.raises(RuntimeError, match="kernel lost"):
        list(talk.stream("Second"))
    assert time.monotonic() - start < 5
    with pytest.raises(RuntimeError, match="kernel lost"):      # a failed regeneration keeps the turn that it would have replaced
        hook.remove(); hook = slowed(model, 0, fail_at=5)
        list(talk.regenerate())
    hook.remove()
    assert [t.question for t in talk.history] == ["First"] and talk.turn is None and model.get_model_status().enabled is True
    talk.clear(); talk.which = "tuned"; talk.ask("Name a prime.")
    assert talk.last.ids == expected


def test_stop_keeps_what_is_there(model, tokenizer):
    hook, talk = slowed(model), chat(model, tokenizer, max_new_tokens=400)
    pieces = talk.stream("Tell me a story")
    until(lambda: next(pieces))
    start = time.monotonic(); talk.stop(); list(pieces)
    assert time.monotonic() - start < 1
    assert talk.last.stopped and talk.last.answer and 0 < len(talk.last.ids) < 400 and "stopped" in talk.last.note
    hook.remove()
    kept = talk.last.answer
    talk.max_new_tokens = 12; talk.ask("And then?")
    assert not talk.last.stopped and talk.history[0].answer == kept


def test_stop_while_a_long_prompt_is_read_or_another_speaks(model, tokenizer):
    hook, talk, other = slowed(model, 3), chat(model, tokenizer), chat(model, tokenizer)
    for one in talk, other:                                     # `other` waits for the lock
        pieces = one.stream("Hi"); next(pieces)
        threading.Timer(0.2, one.stop).start()
        start = time.monotonic(); list(pieces)
        assert time.monotonic() - start < 1 and one.last.stopped and one.last.answer == ""
    hook.remove()
    assert talk.ask("Name a prime.") and talk.last.ids == plain_ids(model, tokenizer, "Name a prime.", 12)      # an answer that never began is not sent


def test_a_reader_that_leaves_stops_the_answer(model, tokenizer):
    hook, talk = slowed(model), chat(model, tokenizer, max_new_tokens=400)
    for answer in talk.stream("Tell me a story"):
        if answer:
            break
    until(lambda: talk.history)
    assert talk.last.stopped and talk.last.answer
    hook.remove()
    talk.clear(); assert talk.ask("Hi") is not None


def test_regenerate_edit_undo_clear(model, tokenizer):
    talk = chat(model, tokenizer, temperature=1.0)
    first, second = talk.ask("One"), talk.ask("Two")
    list(talk.regenerate())
    assert talk.last.settings["seed"] == 43 and talk.last.answer != second and len(talk.history) == 2
    list(talk.regenerate())
    assert talk.last.settings["seed"] == 44
    list(talk.edit_last("Three"))
    assert [t.question for t in talk.history] == ["One", "Three"] and talk.last.settings["seed"] == 42
    assert talk.undo() == "Three" and talk.last.answer == first
    assert talk.ask("Two") == second                            # the same seed, history and question
    talk.temperature = 0; talk.ask("Four"); greedy = talk.last.ids
    list(talk.regenerate()); assert talk.last.ids == greedy
    talk.clear(); assert talk.history == []
    for f in (talk.regenerate, talk.undo, lambda: talk.save("x.md")):
        assert "nothing has been said" in refused(f)


def test_sampling_heeds_temperature_top_p_and_seed(model, tokenizer):
    import torch
    ids = lambda **k: (lambda c: (c.ask("Name a prime."), c.last.ids)[1])(chat(model, tokenizer, **k))
    state = torch.get_rng_state()
    assert ids(temperature=1.0, top_p=1e-6) == ids() != ids(temperature=1.0)
    assert ids(temperature=1.0, seed=1) == ids(temperature=1.0, seed=1) != ids(temperature=1.0, seed=2)
    assert torch.equal(state, torch.get_rng_state())


def test_truncation_drops_the_oldest_pairs_and_keeps_the_system_prompt(tokenizer, model):
    from dolly_lora.conversation import fit_prompt
    history = [(f"question {i}", f"answer {i}") for i in range(6)]
    full, cut = fit_prompt(tokenizer, history, "last", 10_000, "Be brief.")
    assert cut == 0 and full.count("Be brief.") == 1 and full.index("Be brief.") < full.index("question 0")
    n = len(tokenizer(full).input_ids)
    prompt, cut = fit_prompt(tokenizer, history, "last", n - 1, "Be brief.")
    assert cut == 1 and len(tokenizer(prompt).input_ids) < n and "question 0" not in prompt and prompt.index("Be brief.") < prompt.index("question 1") and "answer 5" in prompt
    talk = chat(model, tokenizer, system="Be brief.", max_tokens=112)
    for i in range(4): talk.ask(f"number {i}")
    assert talk.last.cut > 0 and f"{talk.last.cut} earlier turn" in talk.last.note and len(talk.history) == 4
    assert "with the system prompt" in refused(talk.stream, "word " * 100) and len(talk.history) == 4


HOSTILE = ["<img src=x onerror=alert(1)>", "</div></div><script>alert(1)</script>", "[x](javascript:alert(1))", "<javascript:alert(1)>", "![x](http://tracker/a.png)", "[a]: javascript:alert(1)\n\n[a]",
           "```<img src=x onerror=alert(1)>\n</pre><script>x</script>\n```", "`</code><b onclick=x>`", "| a |\n|---|\n| <svg onload=x> |", "&lt;img src=x onerror=alert(1)&gt;", "$x$ \\(y\\)", "# </h1><style>*{display:none}</style>", "> " * 500 + "x"]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_stays_text(text):
    from html.parser import HTMLParser
    from dolly_lora.conversation import Turn
    from dolly_lora.window import render
    tags, shown, depth = [], [], [0]
    class Reader(HTMLParser):
        def handle_starttag(self, tag, attrs): tags.append((tag, dict(attrs))); depth[0] += tag not in ("br", "hr")
        def handle_endtag(self, tag): depth[0] -= 1; assert depth[0] >= 0
        def handle_data(self, data): shown.append(data)
    page = render([Turn(text, "tuned", {}, answer=text, beside=Turn(text, "base", {}, answer=text))])
    reader = Reader(); reader.feed(page); reader.close()
    assert depth[0] == 0 and {t for t, _ in tags} <= {"div", "p", "pre", "code", "table", "thead", "tbody", "tr", "th", "td", "h1", "blockquote", "br"}
    assert {a for _, attrs in tags for a in attrs} <= {"class"} and text in "".join(shown)      # the question as it was typed
    if text.startswith("$"): assert page.count("$x$") == 3


def test_save_says_how_it_was_made(model, tokenizer, tmp_path):
    talk = chat(model, tokenizer, system="Be brief.", temperature=0.5, top_p=0.9, about=dict(model="tiny", adapter="runs/tiny/adapter"))
    talk.ask("Hé?"); list(talk.compare("And?"))
    rows = [json.loads(line) for line in talk.save(tmp_path / "new/a.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [r["question"] for r in rows] == ["Hé?", "And?"] and rows[1]["base_answer"] == talk.last.beside.answer and rows[1]["answer"] == talk.last.answer
    assert all(r["model"] == "tiny" and r["adapter"] == "runs/tiny/adapter" and r["seed"] == 42 and r["temperature"] == 0.5 and r["top_p"] == 0.9 and r["max_new_tokens"] == 12 and r["system"] == "Be brief." and r["tokens"] for r in rows)
    text = talk.save(tmp_path / "a.md").read_text(encoding="utf-8")
    assert all(s in text for s in ("- model: tiny", "- adapter: runs/tiny/adapter", "seed 42", "temperature 0.5", "top_p 0.9", "max_new_tokens 12", "system Be brief.", "## Base", "## Tuned", "Hé?"))
    assert ".jsonl or .md" in refused(lambda: talk.save(tmp_path / "a.txt"))
    (tmp_path / "file").write_text(""); assert "cannot write" in refused(lambda: talk.save(tmp_path / "file/a.md"))


@pytest.fixture()
def ui(model, tokenizer, tmp_path):
    from dolly_lora.window import ChatUI
    return ChatUI(chat(model, tokenizer), folder=tmp_path)


def click(ui, button):
    button.click(); ui.worker.join(30)
    assert not ui.worker.is_alive()


def test_window_classes_labels_and_buttons(ui):
    from ipywidgets import Button, Checkbox
    def all_of(w): return [w, *(x for c in getattr(w, "children", ()) for x in all_of(c))]
    widgets = all_of(ui.box); classes = [c for w in widgets for c in w._dom_classes]
    for name in "chat page message send stop regen undo edit clear compare status error system temperature top-p length export".split():
        assert classes.count(f"dl-{name}") == 1, name
    assert classes.count("dl-example") == 3
    assert all(w.description for w in widgets if isinstance(w, (Button, Checkbox)) or hasattr(w, "placeholder") and "HTML" not in type(w).__name__ or "Bounded" in type(w).__name__)
    assert ui.stop.disabled and not ui.send.disabled and ui.regen.disabled and ui.undo.disabled


def test_window_talks(ui, tmp_path):
    hook = slowed(ui.chat.model, 0.03)
    ui.message.value = "  <b>Hi</b> "; ui.send.click()
    assert not ui.stop.disabled and ui.send.disabled and ui.clear.disabled and ui.message.value == ""
    until(lambda: "dl-user" in ui.live.value)
    ui.worker.join(30); hook.remove()
    assert ui.stop.disabled and not ui.send.disabled and "tok/s" in ui.status.value and "&lt;b&gt;Hi" in ui.live.value
    ui.temperature.value, ui.top_p.value, ui.length.value, ui.system.value, ui.which.value = 0.7, 0.9, 5, "Be brief.", "base"
    click(ui, ui.examples[1])
    assert ui.chat.last.settings == dict(seed=42, temperature=0.7, top_p=0.9, max_new_tokens=5, system="Be brief.") and ui.chat.last.which == "base" and ui.chat.last.question == ui.examples[1].description
    click(ui, ui.regen); assert ui.chat.last.settings["seed"] == 43 and len(ui.chat.history) == 2
    ui.edit.click(); assert ui.message.value == ui.examples[1].description
    ui.message.value = "Edited"; ui.compare.value = True; click(ui, ui.send)
    assert [t.question for t in ui.chat.history] == ["<b>Hi</b>", "Edited"] and ui.live.value.index("dl-base") < ui.live.value.index("dl-tuned") and "base:" in ui.status.value and "tuned:" in ui.status.value
    ui.export.click(); assert sorted(p.suffix for p in tmp_path.iterdir()) == [".jsonl", ".md"] and "saved" in ui.status.value
    ui.undo.click(); assert len(ui.chat.history) == 1 and ui.message.value == "Edited"
    ui.clear.click(); assert ui.live.value == ui.past.value == "" and ui.regen.disabled
    ui.regen.click(); assert "nothing has been said" in ui.error.value and not ui.busy.locked()


def test_enter_sends_what_the_browser_sends_a_moment_later(ui):
    ui.message._handle_string_msg(None, {"event": "submit"}, []) if hasattr(ui.message, "_handle_string_msg") else ui.message._submission_callbacks(ui.message)
    ui.message.value = "late"
    until(lambda: ui.chat.history and not ui.busy.locked())
    assert ui.chat.last.question == "late" and ui.message.value == ""


def test_window_shows_errors_and_goes_on(ui):
    hook = slowed(ui.chat.model, 0, fail_at=4)
    ui.message.value = "Hi"; click(ui, ui.send); hook.remove()
    assert "kernel lost &lt;b&gt;" in ui.error.value and ui.message.value == "Hi" and ui.live.value == "" and not ui.send.disabled and ui.stop.disabled
    click(ui, ui.send); assert ui.error.value == "" and len(ui.chat.history) == 1
    ui.message.value = "word " * 2000; ui.send.click()
    assert "shorten it" in ui.error.value and ui.message.value and not ui.send.disabled and len(ui.chat.history) == 1


def test_rapid_clicks_start_one_answer(ui):
    hook = slowed(ui.chat.model, 0.02)
    for i in range(20):
        ui.message.value, ui.which.value = f"click {i}", "base" if i % 2 else "tuned"
        ui.send.click(); ui.examples[0].click(); ui.regen.click()
    ui.worker.join(30); hook.remove()
    assert len(ui.chat.history) == 1 and ui.chat.last.question == "click 0" and ui.chat.last.which == "tuned"
    assert ui.chat.last.ids == plain_ids(ui.chat.model, ui.chat.tokenizer, "click 0", 12)


def test_window_stop_and_few_updates(ui):
    hook = slowed(ui.chat.model, 0.005)
    sent = []
    ui.live.observe(lambda change: sent.append(time.monotonic()), "value")
    ui.length.value = 1000; ui.message.value = "Tell me"; ui.send.click()
    time.sleep(1.5); start = time.monotonic(); ui.stop.click(); ui.worker.join(5)
    assert time.monotonic() - start < 1 and ui.chat.last.stopped and "stopped here" in ui.live.value and "stopped" in ui.status.value
    assert 5 < len(sent) <= 15 * (sent[-1] - sent[0]) + 3
    hook.remove()


def test_window_on_a_base_model(tokenizer):
    from dolly_lora.window import ChatUI
    from dolly_lora.models import tiny_model
    ui = ChatUI(chat(tiny_model(), tokenizer))
    assert ui.compare.disabled and ui.which.disabled and ui.which.value == "base"
    click(ui, ui.examples[0]); assert len(ui.chat.history) == 1 and not ui.error.value


# the terminal

SLOW = """
import sys, time, dolly_lora.models as m
load = m.load_base
def slow(recipe):
    model = load(recipe); model.register_forward_pre_hook(lambda *_: time.sleep(0.05)); return model
m.load_base = slow
from dolly_lora.cli import main
sys.exit(main())
"""


@pytest.fixture()
def terminal():
    """`dolly-lora chat` on a pseudo-terminal: (process, say, wait_for)."""
    started = []
    def start(*args):
        master, slave = pty.openpty()
        process = subprocess.Popen([sys.executable, "-c", SLOW, "chat", *map(str, args)], stdin=slave, stdout=slave, stderr=slave, cwd=ROOT, start_new_session=True, env=os.environ | dict(TERM="dumb"), preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0))
        os.close(slave); started.append((process, master)); seen = [""]
        def wait_for(pattern, seconds=60):
            end = time.monotonic() + seconds
            while not (found := re.search(pattern, seen[0], re.S)):
                assert time.monotonic() < end, (pattern, seen[0][-2000:])
                import select
                if select.select([master], [], [], 0.2)[0]:
                    try: seen[0] += os.read(master, 65536).decode("utf-8", "replace")
                    except OSError: time.sleep(0.1)
            seen[0] = seen[0][found.end():]
            return found
        return process, lambda text: os.write(master, text.encode()), wait_for
    yield start
    for process, master in started:
        process.kill(); process.wait(); os.close(master)


def press_ctrl_c(say, wait_for, pattern):
    "Ctrl-C, once more if it fell between the answer and the prompt; the seconds until it was heard."
    for _ in range(4):
        start = time.monotonic(); say("\x03")
        try: wait_for(pattern, 8); return time.monotonic() - start
        except AssertionError as e: last = e
    raise last


def test_terminal_ctrl_c_stops_the_answer_and_not_the_program(terminal, tmp_path):
    process, say, wait_for = terminal("--base", "tiny")
    wait_for(r"/quit leaves.*?> ")
    say("Tell me a story\n"); wait_for(r"story\r?\n.*?\S{3}")
    assert press_ctrl_c(say, wait_for, r"\(base: \d+ tokens, [\d.]+ tok/s; stopped\)") < 5
    wait_for("> "); say(f"/save {tmp_path}/talk.jsonl\n"); wait_for("saved"); wait_for("> ")
    assert json.loads((tmp_path / "talk.jsonl").read_text())["stopped"] is True
    say("/tuned\n"); wait_for("no adapter"); wait_for("> ")
    say("/nonsense\n"); wait_for("/regen answers"); wait_for("> ")
    say("/regen\n"); wait_for(r"/regen\r?\n.*?\S{3}"); press_ctrl_c(say, wait_for, "stopped"); wait_for("> ")
    press_ctrl_c(say, wait_for, "once more"); assert process.poll() is None
    for left in 3, 2, 1, 0:
        say("\x03")
        try: assert process.wait(8) == 0; break
        except subprocess.TimeoutExpired: assert left


def test_terminal_commands(tiny_run, tmp_path):
    done = cli("chat", "--run-dir", tiny_run[0], input=f"Name a prime.\n/base\nName a prime.\n/regen\n/tuned\n/save {tmp_path}/talk.md\n/save {tmp_path}/talk.doc\n/clear\n/save {tmp_path}/x.md\n/help\n/quit\n")
    assert done.returncode == 0 and done.stdout.count("tok/s") == 3 and "Traceback" not in done.stderr, done.stderr
    assert re.findall(r"\((tuned|base): ", done.stdout) == ["tuned", "base", "base"] and ".jsonl or .md" in done.stdout and "nothing has been said" in done.stdout and "/regen answers" in done.stdout
    assert f"- adapter: {tiny_run[0]}/adapter" in (tmp_path / "talk.md").read_text()


def test_batch_goes_on_after_an_interruption(tiny_run, tmp_path):
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(dict(instruction=f"Name the number {i}.", context="One, two." if i % 2 else "")) + "\n" for i in range(6)))
    call = ("chat", "--run-dir", tiny_run[0], "--batch", tmp_path / "q.jsonl", "--out", tmp_path / "a.jsonl")
    assert cli(*call).returncode == 0 and not (tmp_path / "a.jsonl.rows").exists()
    whole = (tmp_path / "a.jsonl").read_bytes(); rows = [json.loads(line) for line in whole.splitlines()]
    assert [r["instruction"] for r in rows] == [f"Name the number {i}." for i in range(6)] and all(set(r) == {"instruction", "context", "output", "finished"} for r in rows)
    (tmp_path / "a.jsonl").unlink()
    interrupted = ("import os, sys, dolly_lora.generate as g\nadd = g.JsonlCache.add\n"
                   "def once(self, key, row):\n    add(self, key, row)\n    if len(self.rows) == 3: open(self.path, 'a').write('{\"key\": \"to'); os._exit(9)\n"
                   "g.JsonlCache.add = once\nfrom dolly_lora.cli import main\nmain()")
    assert subprocess.run([sys.executable, "-c", interrupted, *map(str, call)], cwd=ROOT, capture_output=True).returncode == 9
    assert (tmp_path / "a.jsonl.rows").exists() and not (tmp_path / "a.jsonl").exists()
    done = cli(*call)
    assert done.returncode == 0 and "6 of 6 answers" in done.stderr and (tmp_path / "a.jsonl").read_bytes() == whole


def test_batch_and_chat_mistakes_are_one_line(tiny_run, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"instruction": 3}\n')
    for call in (("--batch", tmp_path / "bad.jsonl"), ("--batch", tmp_path), ("--batch", tmp_path / "no.txt"), ("--out", tmp_path / "a.jsonl")):
        done = cli("chat", "--run-dir", tiny_run[0], *call)
        assert done.returncode == 2 and done.stderr.startswith("dolly-lora: ") and done.stderr.count("\n") == 1, (call, done.stderr)
