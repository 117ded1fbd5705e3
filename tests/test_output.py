"""The standard output is full, closed, or another program's; the standard input is not UTF-8."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT

CALL = "import sys; from dolly_lora.cli import main; sys.exit(main())"


def start(*args, stdout, stdin=None, **more):
    clean = {k: v for k, v in os.environ.items() if k not in ("IN_TEST", "DOLLY_LORA_HOLDS")}
    return subprocess.run(
        [sys.executable, "-c", CALL, *map(str, args)],
        cwd=ROOT,
        env=clean | more,
        stdin=stdin,
        stdout=stdout,
        stderr=subprocess.PIPE,
    )


@pytest.fixture()
def batch(tmp_path):
    (tmp_path / "q.txt").write_text("Say hi\n")
    return ["chat", "--base", "tiny", "--batch", tmp_path / "q.txt"]


@pytest.fixture(params=["batch", "bench", "doctor"])
def command(request, batch):
    return dict(batch=batch, bench=["bench", "tiny", "--json"], doctor=["doctor"])[request.param]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_full_disk_behind_the_output_is_one_line(command):
    with open("/dev/full", "wb") as full:
        done = start(*command, stdout=full)
    told = [line for line in done.stderr.decode().splitlines() if "answers," not in line]
    assert done.returncode == 1 and told == [
        "dolly-lora: cannot write to the standard output (No space left on device)"
    ]


def test_a_reader_who_has_left_is_no_error(command):
    reader, writer = os.pipe()
    os.close(reader)
    done = start(*command, stdout=writer)
    os.close(writer)
    told = [line for line in done.stderr.decode().splitlines() if "answers," not in line]
    assert done.returncode == 1 and told == []


def test_the_output_gets_its_place_back_whatever_happens(tmp_path):
    code = """
import os, sys
from dolly_lora.cli import lines_alone
os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
place = os.stat(1).st_rdev
try:
    with lines_alone(True) as out: print("a line", file=out)
except OSError as e:
    print(type(e).__name__, os.stat(1).st_rdev == place, file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == "OSError True\n" and done.returncode == 0


@pytest.mark.parametrize("locale", [dict(PYTHONIOENCODING="utf-8:strict"), dict(LC_ALL="C")])
def test_a_line_that_is_no_utf_8_is_asked_for_again(tmp_path, locale):
    (tmp_path / "typed").write_bytes(b"caf\xe9\n/what\n/quit\n")
    with open(tmp_path / "typed", "rb") as typed:
        done = start("chat", "--base", "tiny", stdin=typed, stdout=subprocess.PIPE, **locale)
    said = done.stdout.decode()
    assert done.returncode == 0 and done.stderr == b""
    assert said.count("that line is not UTF-8") == 1
    assert (
        "/quit leaves\n" in said.split("that line is not UTF-8")[1]
    )  # the line after it was read


def test_a_batch_to_a_pipe_is_whole(batch):
    done = start(*batch, stdout=subprocess.PIPE)
    assert done.returncode == 0 and json.loads(done.stdout)["instruction"] == "Say hi"
