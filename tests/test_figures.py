"""Text from elsewhere is shown as it is, in tables and in figures."""
import html
from xml.etree import ElementTree

import pytest

from dolly_lora.figures import escape_text, figure_text, save_fig, text_table

HOSTILE = ["<img src=x onerror=alert(1)>", "a | b\nc", "<eos>", "&lt;",
           "*x* _y_ `z` [q](javascript:alert(1)) $x$ ~~s~~ \\"]


@pytest.mark.parametrize("text", HOSTILE)
def test_escaped_text_says_what_it_said(text):
    assert html.unescape(escape_text(text)).replace("<br>", "\n") == text


@pytest.mark.parametrize("text", HOSTILE)
def test_foreign_text_is_shown_as_it_is_in_markdown(text):
    from markdown_it import MarkdownIt
    markdown = MarkdownIt("commonmark", {"html": True}).enable("table")
    shown = markdown.render(f"|a|\n|-|\n|{escape_text(text)}|\n")
    inside = shown.split("<td>")[1].split("</td>")[0]
    assert html.unescape(inside.replace("<br>", "\n")) == text
    assert "<img" not in inside and "<em>" not in inside


@pytest.mark.parametrize("text", HOSTILE)
def test_foreign_text_is_shown_as_it_is_in_a_table(text):
    table = text_table([{text: text}])._repr_html_()
    assert escape_text(text) in table
    assert "<img" not in table and "<eos>" not in table


def test_a_name_with_dollars_is_no_formula(tmp_path):
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots()
    ax.set_title(figure_text("$\\frac$ & <b> \x01"))
    save_fig(fig, tmp_path, "odd", "a title that is no formula")
    names = {p.name for p in (tmp_path / "figures").iterdir()}
    assert names == {"odd.png", "odd.svg", "odd.txt"}
    ElementTree.parse(tmp_path / "figures/odd.svg")
