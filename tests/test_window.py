"""The chat window without a browser: its buttons, its errors, and hostile text that stays text."""
import time
from html.parser import HTMLParser

import pytest

from dolly_lora.conversation import Turn
from dolly_lora.models import tiny_model
from dolly_lora.window import ChatUI, STYLE, render
from test_chat import chat, model, plain_ids, slowed, tokenizer, until

__all__ = ["model", "tokenizer"]  # fixtures

HOSTILE = ["<img src=x onerror=alert(1)>",
           "</div></div><script>alert(1)</script>",
           "[x](javascript:alert(1))",
           "<javascript:alert(1)>",
           "![x](http://tracker/a.png)",
           "[a]: javascript:alert(1)\n\n[a]",
           "```<img src=x onerror=alert(1)>\n</pre><script>x</script>\n```",
           "`</code><b onclick=x>`",
           "| a |\n|---|\n| <svg onload=x> |",
           "&lt;img src=x onerror=alert(1)&gt;",
           "$x$ \\(y\\)",
           "# </h1><style>*{display:none}</style>",
           "> " * 500 + "x"]
HARMLESS = {"div", "p", "pre", "code", "table", "thead", "tbody", "tr", "th", "td", "h1",
            "blockquote", "br"}


class Page(HTMLParser):
    """What a browser would make of a page: tags, attributes, text, and whether all is closed."""
    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text, self.depth = set(), set(), "", 0
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.depth += tag not in ("br", "hr")

    def handle_endtag(self, tag):
        self.depth -= 1
        assert self.depth >= 0

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_stays_text(text):
    base = Turn(text, "base", {}, answer=text)
    page = Page(render([Turn(text, "tuned", {}, answer=text, beside=base)]))
    assert page.depth == 0
    assert page.tags <= HARMLESS and page.attributes <= {"class"}
    assert text in page.text                                # the question as it was typed


def test_a_formula_stays_as_it_is():
    base = Turn("$x$", "base", {}, answer="$x$")
    assert render([Turn("$x$", "tuned", {}, answer="$x$", beside=base)]).count("$x$") == 3


@pytest.fixture()
def ui(model, tokenizer, tmp_path):
    return ChatUI(chat(model, tokenizer), folder=tmp_path)


def click(ui, button):
    button.click()
    ui.worker.join(30)
    assert not ui.worker.is_alive()


def ask(ui, text):
    ui.message.value = text
    click(ui, ui.send)


def every_widget(widget):
    yield widget
    for child in getattr(widget, "children", ()):
        yield from every_widget(child)


# How it is made

def test_each_part_has_a_class_of_its_own(ui):
    classes = [name for widget in every_widget(ui.box) for name in widget._dom_classes]
    for name in ("chat page message send stop regen undo edit clear which compare status error "
                 "system temperature top-p seed length export").split():
        assert classes.count(f"dl-{name}") == 1, name
    assert classes.count("dl-example") == 3


def test_each_field_and_button_has_a_name_to_read_out(ui):
    from ipywidgets import HTML, Box
    fields = [w for w in every_widget(ui.box) if not isinstance(w, (HTML, Box))]
    assert len(fields) == 18 and all(w.description for w in fields)


def test_at_first_there_is_nothing_to_stop_or_repeat(ui):
    assert ui.stop.disabled and not ui.send.disabled
    assert ui.regen.disabled and ui.undo.disabled


def test_the_style_sheet_travels_with_the_package():
    assert STYLE.startswith("<style>") and STYLE.endswith("</style>")
    assert ".dl-page" in STYLE and STYLE.count("{") == STYLE.count("}")


def test_a_base_model_cannot_be_compared(tokenizer):
    ui = ChatUI(chat(tiny_model(), tokenizer))
    assert ui.settings.compare.disabled and ui.settings.which.disabled
    assert ui.settings.which.value == "base"
    click(ui, ui.examples[0])
    assert len(ui.chat.history) == 1 and not ui.error.value


# What the buttons do

def test_while_an_answer_is_written_only_stop_can_be_pressed(ui):
    hook = slowed(ui.chat.model, 0.03)
    ui.message.value = "  <b>Hi</b> "
    ui.send.click()
    assert not ui.stop.disabled and ui.send.disabled and ui.clear.disabled
    assert ui.message.value == ""
    until(lambda: "dl-user" in ui.transcript.live.value)
    ui.worker.join(30)
    hook.remove()
    assert ui.stop.disabled and not ui.send.disabled
    assert "tok/s" in ui.status.value and "&lt;b&gt;Hi" in ui.transcript.live.value


def test_an_example_is_asked_with_what_the_fields_say(ui):
    fields = ui.settings
    fields.temperature.value, fields.top_p.value, fields.length.value = 0.7, 0.9, 5
    fields.system.value, fields.which.value = "Be brief.", "base"
    click(ui, ui.examples[1])
    assert ui.chat.last.settings == dict(seed=42, temperature=0.7, top_p=0.9, max_new_tokens=5,
                                         system="Be brief.")
    assert ui.chat.last.which == "base"
    assert ui.chat.last.question == ui.examples[1].description


def test_regenerate_and_edit_replace_the_last_turn(ui):
    ask(ui, "First")
    ask(ui, "Second")
    click(ui, ui.regen)
    assert ui.chat.last.settings["seed"] == 43 and len(ui.chat.history) == 2
    ui.edit.click()
    assert ui.message.value == "Second"
    ask(ui, "Edited")
    assert [turn.question for turn in ui.chat.history] == ["First", "Edited"]


def test_a_comparison_shows_both_side_by_side(ui):
    ui.settings.compare.value = True
    ask(ui, "Who?")
    page = ui.transcript.live.value
    assert page.index("dl-base") < page.index("dl-tuned")
    assert "base:" in ui.status.value and "tuned:" in ui.status.value


def test_save_undo_and_clear(ui, tmp_path):
    ask(ui, "First")
    ask(ui, "Second")
    ui.export.click()
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".jsonl", ".md"]
    assert "saved" in ui.status.value
    ui.undo.click()
    assert len(ui.chat.history) == 1 and ui.message.value == "Second"
    ui.clear.click()
    assert ui.transcript.live.value == ui.transcript.past.value == "" and ui.regen.disabled


def test_enter_sends_what_the_browser_sends_a_moment_later(ui):
    ui.message._submission_callbacks(ui.message)            # the key, then the text
    ui.message.value = "late"
    until(lambda: ui.chat.history and not ui.busy.locked())
    assert ui.chat.last.question == "late" and ui.message.value == ""


# Bad luck

def test_a_failing_answer_is_shown_and_the_next_one_works(ui):
    hook = slowed(ui.chat.model, 0, fail_at=4)
    ask(ui, "Hi")
    hook.remove()
    assert "kernel lost &lt;b&gt;" in ui.error.value
    assert ui.message.value == "Hi" and ui.transcript.live.value == ""
    assert not ui.send.disabled and ui.stop.disabled
    click(ui, ui.send)
    assert ui.error.value == "" and len(ui.chat.history) == 1


def test_a_mistake_is_shown_and_the_message_kept(ui):
    ui.message.value = "word " * 2000
    ui.send.click()
    assert "shorten it" in ui.error.value
    assert ui.message.value and not ui.send.disabled and ui.chat.history == []
    ui.regen.click()
    assert "nothing has been said" in ui.error.value and not ui.busy.locked()


def test_rapid_clicks_start_one_answer(ui):
    hook = slowed(ui.chat.model, 0.02)
    for i in range(20):
        ui.message.value = f"click {i}"
        ui.settings.which.value = "base" if i % 2 else "tuned"
        ui.send.click()
        ui.examples[0].click()
        ui.regen.click()
    ui.worker.join(30)
    hook.remove()
    assert len(ui.chat.history) == 1
    assert ui.chat.last.question == "click 0" and ui.chat.last.which == "tuned"
    assert ui.chat.last.ids == plain_ids(ui.chat.model, ui.chat.tokenizer, "click 0")


def test_stop_and_no_more_than_fifteen_updates_a_second(ui):
    hook = slowed(ui.chat.model, 0.005)
    sent = []
    ui.transcript.live.observe(lambda change: sent.append(time.monotonic()), "value")
    ui.settings.length.value = 1000
    ui.message.value = "Tell me"
    ui.send.click()
    time.sleep(1.5)
    start = time.monotonic()
    ui.stop.click()
    ui.worker.join(5)
    assert time.monotonic() - start < 1
    assert ui.chat.last.stopped and "stopped here" in ui.transcript.live.value
    assert "stopped" in ui.status.value
    assert 5 < len(sent) <= 15 * (sent[-1] - sent[0]) + 3
    hook.remove()
