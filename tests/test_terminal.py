"""`dolly-lora chat` as a person uses it: on a pseudo-terminal, with Ctrl-C, with files."""
import fcntl
import json
import os
import pty
import re
import select
import subprocess
import sys
import termios
import time

import pytest

from conftest import ROOT, cli

SLOW = """
import sys, time, dolly_lora.models as m
load = m.load_base
def slow(recipe):
    model = load(recipe)
    model.register_forward_pre_hook(lambda *_: time.sleep(0.05))
    return model
m.load_base = slow
from dolly_lora.cli import main
sys.exit(main())
"""


class Terminal:
    """`dolly-lora chat`, with tokens that take a while, on a pseudo-terminal."""
    def __init__(self, *args):
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", SLOW, "chat", *map(str, args)], stdin=slave, stdout=slave,
            stderr=slave, cwd=ROOT, start_new_session=True, env=os.environ | dict(TERM="dumb"),
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))
        os.close(slave)
        self.unread = ""

    def say(self, text):
        os.write(self.master, text.encode())

    def wait_for(self, pattern, seconds=60):
        """Read until `pattern` has come, and forget what stands before it."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.unread, re.S)):
            assert time.monotonic() < end, (pattern, self.unread[-2000:])
            if select.select([self.master], [], [], 0.2)[0]:
                try:
                    self.unread += os.read(self.master, 65536).decode("utf-8", "replace")
                except OSError:
                    time.sleep(0.1)
        self.unread = self.unread[found.end():]

    def press_ctrl_c(self, pattern):
        """Ctrl-C, again if it fell between answer and prompt; the seconds until it was heard."""
        for _ in range(4):
            start = time.monotonic()
            self.say("\x03")
            try:
                self.wait_for(pattern, 8)
                return time.monotonic() - start
            except AssertionError as e:
                unheard = e
        raise unheard

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.master)


@pytest.fixture()
def terminal():
    """A conversation with the random model, at its first prompt."""
    terminal = Terminal("--base", "tiny")
    terminal.wait_for(r"/quit leaves.*?> ")
    yield terminal
    terminal.close()


def test_ctrl_c_stops_the_answer_and_not_the_program(terminal, tmp_path):
    terminal.say("Tell me a story\n")
    terminal.wait_for(r"story\r?\n.*?\S{3}")
    heard = terminal.press_ctrl_c(r"\(base: \d+ tokens, [\d.]+ tok/s; stopped\)")
    assert heard < 5
    terminal.wait_for("> ")
    terminal.say(f"/save {tmp_path}/talk.jsonl\n")
    terminal.wait_for("saved")
    assert json.loads((tmp_path / "talk.jsonl").read_text())["stopped"] is True
    terminal.wait_for("> ")
    terminal.say("/regen\n")
    terminal.wait_for(r"/regen\r?\n.*?\S{3}")
    terminal.press_ctrl_c("stopped")


def test_commands_that_cannot_be_obeyed_are_told(terminal):
    terminal.say("/tuned\n")
    terminal.wait_for("no adapter")
    terminal.wait_for("> ")
    terminal.say("/nonsense\n")
    terminal.wait_for("/regen answers")


def test_ctrl_c_twice_at_the_prompt_leaves(terminal):
    terminal.press_ctrl_c("once more")
    assert terminal.process.poll() is None
    for left in 3, 2, 1, 0:
        terminal.say("\x03")
        try:
            assert terminal.process.wait(8) == 0
            break
        except subprocess.TimeoutExpired:
            assert left


def test_commands(tiny_run, tmp_path):
    lines = ["Name a prime.", "/base", "Name a prime.", "/regen", "/tuned",
             f"/save {tmp_path}/talk.md", f"/save {tmp_path}/talk.doc", "/clear",
             f"/save {tmp_path}/x.md", "/help", "/quit"]
    done = cli("chat", "--run-dir", tiny_run[0], input="".join(line + "\n" for line in lines))
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert re.findall(r"\((tuned|base): .*tok/s", done.stdout) == ["tuned", "base", "base"]
    for told in ".jsonl or .md", "nothing has been said", "/regen answers":
        assert told in done.stdout
    assert f"- adapter: {tiny_run[0]}/adapter" in (tmp_path / "talk.md").read_text()


# Files of prompts

INTERRUPTED = """
import os
from dolly_lora.files import JsonlCache
add = JsonlCache.add
def once(self, key, row):
    add(self, key, row)
    if len(self.rows) == 3:
        open(self.path, "a").write('{"key": "to')  # half a line
        os._exit(9)
JsonlCache.add = once
from dolly_lora.cli import main
main()
"""


def test_batch_goes_on_after_an_interruption(tiny_run, tmp_path):
    prompts = [dict(instruction=f"Name the number {i}.", context="One, two." if i % 2 else "")
               for i in range(6)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    answers = tmp_path / "a.jsonl"
    call = ("chat", "--run-dir", tiny_run[0], "--batch", tmp_path / "q.jsonl", "--out", answers)
    assert cli(*call).returncode == 0 and not (tmp_path / "a.jsonl.rows").exists()
    whole = answers.read_bytes()
    rows = [json.loads(line) for line in whole.splitlines()]
    assert [row["instruction"] for row in rows] == [p["instruction"] for p in prompts]
    keys = {"instruction", "context", "output", "finished", "asked_itself"}
    assert all(set(row) == keys for row in rows)

    answers.unlink()
    killed = subprocess.run([sys.executable, "-c", INTERRUPTED, *map(str, call)], cwd=ROOT,
                            capture_output=True)
    assert killed.returncode == 9
    assert (tmp_path / "a.jsonl.rows").exists() and not answers.exists()
    done = cli(*call)
    assert done.returncode == 0 and "6 of 6 answers" in done.stderr
    assert answers.read_bytes() == whole


def test_mistakes_are_one_line(tiny_run, tmp_path, call):
    (tmp_path / "bad.jsonl").write_text('{"instruction": 3}\n')
    for options in (("--batch", tmp_path / "bad.jsonl"), ("--batch", tmp_path),
                    ("--batch", tmp_path / "no.txt"), ("--out", tmp_path / "a.jsonl")):
        done = call("chat", "--run-dir", tiny_run[0], *options)
        assert done.returncode == 2, (options, done.stderr)
        assert done.stderr.startswith("dolly-lora: ") and done.stderr.count("\n") == 1
