"""The recipe's folder: whose it is, who writes to it, and what never leaves it."""
import html
import json
import os
import subprocess
import sys
from xml.etree import ElementTree

import pytest

from conftest import ROOT
from dolly_lora import config, runs
from dolly_lora.config import PRESETS, ConfigError, DollyError, parse_overrides, project_root, redact, resolve
from dolly_lora.figures import escape_text, figure_text, save_fig, text_table
from dolly_lora.runs import hold_run, load_run, start_run
from dolly_lora.files import publish, read_json, write_text

TINY = PRESETS["tiny"]


def test_a_quote_that_is_not_closed_is_one_line():
    with pytest.raises(ConfigError, match="a quote is opened and not closed"):
        parse_overrides("base='x")


def test_a_file_is_no_run_folder(tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(ConfigError, match="is a file: give a folder"):
        resolve("tiny", str(tmp_path / "run"))
    assert (tmp_path / "run").read_text() == "mine"


@pytest.mark.parametrize("text, why", [
    ("", "cannot be read"), ("{", "cannot be read"), ("[]", "is not a run's recipe"), ('{"recipe": []}', "is not a run's recipe"),
    ('{"recipe": {"title": "soup"}}', "is not a run's recipe"), ('{"recipe": {"base": "tiny", "lora_r": 8}}', "another version"), ("[" * 100_000, "cannot be read")])
def test_recipes_of_others_are_refused_in_a_line(tmp_path, text, why):
    (tmp_path / "recipe.json").write_text(text)
    with pytest.raises(DollyError, match=why) as e:
        start_run(TINY, tmp_path)
    assert "\n" not in str(e.value) and (tmp_path / "recipe.json").read_text() == text


def test_a_recipe_with_a_value_of_the_wrong_kind_is_refused_where_it_is_read(tmp_path):
    start_run(TINY, tmp_path)
    run = read_json(tmp_path / "recipe.json")
    run["recipe"]["lora_r"] = "many"
    (tmp_path / "recipe.json").write_text(json.dumps(run))
    with pytest.raises(ConfigError, match="lora_r is 'many', expected int"):
        load_run(tmp_path)


def test_a_foreign_settings_ini_is_not_the_project(tmp_path, monkeypatch):
    (tmp_path / "settings.ini").write_text("[DEFAULT]\nlib_name = other\n")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    assert project_root() == tmp_path / "work"
    monkeypatch.chdir(ROOT / "nbs")
    assert project_root() == ROOT


def test_the_commit_is_the_projects_own(tmp_path, monkeypatch):
    """Beside an installed wheel, the folder one stands in may be the repository of something else."""
    subprocess.run("git init -q && git -c user.name=a -c user.email=a@b commit -q --allow-empty -m x", shell=True, cwd=tmp_path, check=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DOLLY_LORA_COMMIT", raising=False)
    assert runs.environment()["commit"] is None


HOLD = """
import os, sys, time
from dolly_lora.runs import hold_run
with hold_run(sys.argv[1]):
    print("mine", flush=True)
    sys.stdin.read(1)
"""


def holder(folder, **env):
    clean = {k: v for k, v in os.environ.items() if k != "DOLLY_LORA_HOLDS"}
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], cwd=ROOT, env=clean | env, text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return process, process.stdout.readline().strip()


def test_one_process_writes_to_a_run_and_a_dead_one_holds_nothing(tmp_path):
    first, said = holder(tmp_path)
    assert said == "mine"
    with pytest.raises(ConfigError, match=rf"is in use by process {first.pid} on \S+ since .*: wait for it") as e:
        with hold_run(tmp_path): pass
    assert "\n" not in str(e.value)
    first.kill()                                     # SIGKILL: it cannot clean up
    first.communicate()
    with hold_run(tmp_path), hold_run(tmp_path):     # nested, and the lock that was left behind is stale
        child, said = holder(tmp_path, DOLLY_LORA_HOLDS=str(tmp_path.resolve()))
        assert said == "mine"                        # a kernel that we start works for us
        child.communicate("x")
        assert child.returncode == 0
    assert "DOLLY_LORA_HOLDS" not in os.environ


def test_secrets_leave_no_message(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-planted-secret\r\n")
    monkeypatch.setenv("OPENAI_BASE_URL", "https://me:pass%40word-long@judge.example/v1")
    monkeypatch.setenv("HF_TOKEN", "short")          # too short to be one: it may stand in any text
    for text in "Illegal header value b'Bearer sk-planted-secret\\r'", "https://me:pass%40word-long@judge.example/v1", "pass@word-long":
        assert "planted" not in redact(text) and "word" not in redact(text) and "***" in redact(text)
        assert str(DollyError(text)) == redact(text)
    assert redact("a short word") == "a short word"


@pytest.mark.parametrize("text", ["<img src=x onerror=alert(1)>", "a | b\nc", "*x* _y_ `z` [q](javascript:alert(1)) $x$ ~~s~~ \\", "<eos>", "&lt;"])
def test_foreign_text_is_shown_as_it_is(text):
    from markdown_it import MarkdownIt
    escaped = escape_text(text)
    assert html.unescape(escaped).replace("<br>", "\n") == text
    shown = MarkdownIt("commonmark", {"html": True}).enable("table").render(f"|a|\n|-|\n|{escaped}|\n")
    inside = shown.split("<td>")[1].split("</td>")[0]
    assert html.unescape(inside.replace("<br>", "\n")) == text and "<img" not in inside and "<em>" not in inside
    table = text_table([{text: text}])._repr_html_()
    assert escaped in table and "<img" not in table and "<eos>" not in table


def test_a_name_with_dollars_is_no_formula(tmp_path):
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots()
    ax.set_title(figure_text("$\\frac$ & <b> \x01"))
    save_fig(fig, tmp_path, "odd", "a title that is no formula")
    assert {p.name for p in (tmp_path / "figures").iterdir()} == {"odd.png", "odd.svg", "odd.txt"}
    ElementTree.parse(tmp_path / "figures/odd.svg")


def test_what_cannot_be_written_leaves_the_old_file(tmp_path):
    write_text(tmp_path / "a.json", "old")
    with pytest.raises(DollyError, match="cannot write .*a.json .*No space left on device.*make room"):
        with publish(tmp_path / "a.json") as part:
            part.write_text("ne")
            raise OSError(28, "No space left on device")
    assert (tmp_path / "a.json").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_what_a_killed_process_left_half_written_is_swept_away(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    half, living, foreign = (tmp_path / f"figures/{name}" for name in (f"curve.{dead.pid}.part.png", f"curve.{os.getpid()}.part.png", "curve.part.png"))
    half.parent.mkdir()
    for path in half, living, foreign: path.write_bytes(b"half")
    with hold_run(tmp_path): pass
    assert not half.exists() and living.exists() and foreign.exists()
