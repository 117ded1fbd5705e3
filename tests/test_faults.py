"""A run that is killed, interrupted, short of disk or met by a second one.

Nothing is lost, nothing is made twice, and one line says what to do.
"""

import contextlib
import http.server
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from conftest import ROOT

CALL = "import sys; from dolly_lora.cli import main; sys.exit(main())"


def start(*args, **env):
    """`dolly-lora ARGS` in a session of its own."""
    clean = {k: v for k, v in os.environ.items() if k not in ("IN_TEST", "DOLLY_LORA_HOLDS")}
    return subprocess.Popen(
        [sys.executable, "-u", "-c", CALL, *map(str, args)],
        cwd=ROOT,
        env=clean | env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # a job in the background inherits that it is ignored


def lines(path):
    return path.read_text().count("\n") if path.exists() else 0


def when(process, condition):
    """Wait until `condition` holds for the printed lines; False if the process ends before."""
    said = []

    def read():
        with contextlib.suppress(ValueError):  # closed by `kill`
            said.extend(iter(process.stdout.readline, ""))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    while process.poll() is None:
        if condition(said):
            return True
        time.sleep(0.002)
    reader.join()
    return False


def kill(process, kernel):
    """SIGKILL, to the command alone or to its kernel, too."""
    family = [process] + (psutil.Process(process.pid).children(recursive=True) if kernel else [])
    for member in family:
        member.send_signal(signal.SIGKILL)
    process.communicate()


def end_files(folder):
    """What a run leaves behind, without times and places."""

    def rows(path):
        return sorted(path.read_text().split("\n"))

    history = json.loads((folder / "training_history.json").read_text())
    curves = [
        {k: v for k, v in row.items() if k != "train_s"}
        for part in ("log", "validation")
        for row in history[part]
    ]
    results = json.loads((folder / "report/results.json").read_text())
    return dict(
        data={p.name: p.read_text() for p in (folder / "data").iterdir()},
        adapter=(folder / "adapter/adapter_model.safetensors").read_bytes(),
        curves=curves,
        answers={
            str(p.relative_to(folder)): rows(p)
            for p in sorted((folder / "answers").rglob("*.json*"))
        },
        judgments={
            str(p.relative_to(folder)): rows(p)
            for p in sorted((folder / "judgments").rglob("*.json*"))
        },
        metrics=json.loads((folder / "metrics.json").read_text()),
        report={k: results[k] for k in ("data", "tokens", "evaluation", "before_after")},
    )


def same_end(folder, whole):
    ours, theirs = end_files(folder), end_files(whole)
    for name in theirs:
        assert ours[name] == theirs[name], name
    assert not [p for p in folder.rglob("*.part*")]
    for name in "answers/answers.jsonl", "judgments/replies.jsonl":
        keys = [json.loads(line)["key"] for line in (folder / name).read_text().splitlines()]
        assert len(keys) == len(set(keys)), name  # nothing was made twice


def start_stage(stage, folder):
    """One stage under papermill, as the README says, in a session of its own."""
    clean = {k: v for k, v in os.environ.items() if k not in ("IN_TEST", "DOLLY_LORA_HOLDS")}
    return subprocess.Popen(
        [sys.executable, "-m", "papermill", f"nbs/{stage}.ipynb", folder / f"{stage}.ipynb",
         "-p", "preset", "tiny", "-p", "run_dir", folder, "--no-progress-bar"],
        cwd=ROOT, env=clean, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True)


def test_killed_in_every_stage(tiny_run, tmp_path):
    """SIGKILL in the middle of each stage's longest work, then the same command.

    It goes to the command alone, which orphans its kernel, or to both. The last two stages are
    killed by themselves.
    """
    folder = tmp_path / "run"
    middle = {
        "01 writes": lambda said: (folder / "data/train.jsonl").exists(),
        "02 steps": lambda said: any("step     4/6" in line for line in said),
        "03 answers": lambda said: lines(folder / "answers/answers.jsonl") > 4,
    }
    for name, condition in middle.items():
        process = start("run", "tiny", "--run-dir", folder)
        assert when(process, condition), (name, process.stderr.read())
        kill(process, kernel=name.startswith("02"))
    parts = json.loads((folder / "stages.json").read_text())
    assert (
        parts["02_train"]["parts"] == 2
        and parts["02_train"]["finished"]
        and parts["03_eval"]["parts"] == 1
    )
    for stage, made in ("04_chat", "chats"), ("05_report", "report"):
        process = start_stage(stage, folder)
        assert when(process, lambda said: (folder / made).exists()), process.stderr.read()
        kill(process, kernel=True)
    process = start("run", "tiny", "--run-dir", folder)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert json.loads((folder / "stages.json").read_text())["03_eval"]["parts"] == 2
    assert (
        json.loads((folder / "training_history.json").read_text())["summary"]["resumed_from"] == 3
    )
    same_end(folder, tiny_run[0])


def test_ctrl_c_is_one_line_and_130(tmp_path):
    process = start("run", "tiny", "--run-dir", tmp_path / "run")
    assert when(process, lambda said: any("step     2/6" in line for line in said))
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, err = process.communicate(timeout=60)
    assert (
        process.returncode == 130
        and err.strip() == "dolly-lora: interrupted; run the same command to resume"
    )


def test_a_second_process_on_a_run_is_told_whom_it_met(tmp_path):
    folder = tmp_path / "run"
    first = start("run", "tiny", "--run-dir", folder)
    assert when(first, lambda said: any("== 01_data" in line for line in said))
    second = start("run", "tiny", "--run-dir", folder)
    out, err = second.communicate()
    kill(first, kernel=True)
    assert (
        second.returncode == 2
        and f"is in use by process {first.pid} on " in err
        and err.count("\n") == 1
        and "==" not in out
    )


@pytest.fixture()
def small_disk(tmp_path):
    """A disk of 300 MB of our own."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300m", "tmpfs", str(place)], capture_output=True
    ).returncode:
        pytest.skip("a small disk cannot be mounted here: it wants root on Linux")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill(disk):
    with open(disk / "ballast", "wb", buffering=0) as f:
        try:
            while True:
                f.write(b"\0" * 2**14)
        except OSError:
            pass


def test_full_disk_at_a_checkpoint(small_disk, tmp_path):
    from dataclasses import replace
    from dolly_lora.config import PRESETS, DollyError
    from dolly_lora.trainer import last_checkpoint
    from dolly_lora.train import train

    recipe = replace(PRESETS["tiny"], max_steps=9, eval_steps=3)

    def log(line):
        if line.startswith("step     5/9"):
            fill(small_disk)

    with pytest.raises(
        DollyError, match="disk is full: what .* had before is whole; make room"
    ) as e:
        train(recipe, small_disk / "run", log=log)
    assert (
        "\n" not in str(e.value)
        and last_checkpoint(small_disk / "run").name == "checkpoint-3"
        and not (small_disk / "run/adapter").exists()
    )
    (small_disk / "ballast").unlink()
    again, whole = train(recipe, small_disk / "run", log=lambda line: None), train(
        recipe, tmp_path / "whole", log=lambda line: None
    )
    assert again["summary"]["resumed_from"] == 3 and [
        r["eval_loss"] for r in again["validation"]
    ] == [r["eval_loss"] for r in whole["validation"]]


def test_full_disk_at_an_answer_and_a_figure(small_disk):
    import matplotlib.pyplot as plt
    from dolly_lora.config import DollyError
    from dolly_lora.figures import save_fig
    from dolly_lora.files import write_json
    from dolly_lora.files import JsonlCache

    rows = JsonlCache(small_disk / "answers.jsonl")
    for n in range(10):
        rows.add(f"key {n}", dict(text="x" * 500))
    figure = lambda: save_fig(plt.figure(), small_disk, "curve", "nothing")
    figure()
    write_json(small_disk / "metrics.json", dict(loss=1))
    before = {p.name: p.read_bytes() for p in small_disk.rglob("*") if p.is_file()}
    fill(small_disk)
    for write in (
        lambda: rows.add("key 10", dict(text="x" * 50_000)),
        figure,
        lambda: write_json(small_disk / "metrics.json", dict(loss=[0.5] * 50_000)),
    ):
        with pytest.raises(
            DollyError, match="cannot write .*No space left on device.*make room"
        ) as e:
            write()
        assert "\n" not in str(e.value)
    (small_disk / "ballast").unlink()
    assert {p.name: p.read_bytes() for p in small_disk.rglob("*") if p.is_file()} == before
    rows.add("key 10", dict(text="x"))
    assert len(JsonlCache(small_disk / "answers.jsonl").rows) == 11


class Echo(http.server.BaseHTTPRequestHandler):
    """Answers the first questions, and then throws the key back."""

    asked = 0

    def do_POST(self):
        Echo.asked += 1
        self.rfile.read(int(self.headers["Content-Length"]))
        top = dict(token="m", logprob=-0.1)
        good = dict(
            choices=[
                dict(
                    message=dict(content="[[5]]"),
                    logprobs=dict(
                        content=[dict(top_logprobs=[dict(token="A", logprob=-0.1), top])]
                    ),
                )
            ]
        )
        body = json.dumps(
            good if Echo.asked < 20 else dict(error=f"bad key {self.headers['Authorization']}")
        ).encode()
        self.send_response(200 if Echo.asked < 20 else 401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


def test_a_planted_secret_is_nowhere_in_a_failing_run(judge_env, tiny_run, tmp_path):
    """A key with a line's end on it and a password in the address; the judge fails in the middle.

    They are looked for in every file and every line of the run.
    """
    folder = tmp_path / "run"
    shutil.copytree(tiny_run[0], folder)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    process = start(
        "run",
        "tiny",
        "--run-dir",
        folder,
        "--set",
        "judge=gpt-x",
        **judge_env,
        OPENAI_API_KEY="sk-planted-secret-0123\r\n",
        HF_TOKEN="hf_planted-token-0123",
        OPENAI_BASE_URL=f"http://me:planted-password@127.0.0.1:{server.server_port}/v1",
    )
    out, err = process.communicate()
    server.shutdown()
    server.server_close()
    assert (
        process.returncode == 1 and "03_eval failed" in err and "401" in err and Echo.asked > 20
    ), (out[-1000:] + err[-2000:])
    told = [(str(p), p.read_bytes()) for p in folder.rglob("*") if p.is_file()] + [
        ("stdout", out.encode()),
        ("stderr", err.encode()),
    ]
    assert [
        name for name, text in told if re.search(b"planted-(secret|password|token)", text)
    ] == []
