"""The course from one command: files left behind, resuming, failing, chatting."""

import json
import re
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

from conftest import ROOT, cli

from dolly_lora.cli import StageClock


def test_run_leaves_the_contract(tiny_run):
    folder, done = tiny_run
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for name in (
        "recipe.json",
        "data/train.jsonl",
        "data/val.jsonl",
        "data/test.jsonl",
        "data/statistics.json",
        "adapter/adapter_model.safetensors",
        "adapter/README.md",
        "training_history.json",
        "figures/training_curves.png",
        "figures/training_curves.svg",
        "answers/alpaca_eval/base/model_outputs.json",
        "answers/mt_bench/model_answer/tiny-tuned.jsonl",
        "metrics.json",
        "report/report.html",
        "report/results.json",
        "report/figures/training_curves.svg",
        *(
            f"notebooks/{s}.ipynb"
            for s in ("01_data", "02_train", "03_eval", "04_chat", "05_report")
        ),
    ):
        assert (folder / name).is_file(), name
    assert "step     6/6" in done.stdout and "it/s" not in done.stdout


def test_report_is_self_contained_and_agrees_with_results(tiny_run):
    page = (tiny_run[0] / "report/report.html").read_text()
    results = json.loads((tiny_run[0] / "report/results.json").read_text())
    assert (
        not re.search(r'(?:src|href)="(?!data:|#)', page)
        and "<script" not in page
        and page.count("<img alt=") == 9
    )
    assert (
        f"{results['evaluation']['test']['tuned']['loss']:.3f}" in page
        and f"{results['training']['summary']['best_validation_loss']:.4f}" in page
    )
    assert str(tiny_run[0]) not in page and str(ROOT) not in page


def test_official_formats(tiny_run):
    outputs = json.loads(
        (tiny_run[0] / "answers/alpaca_eval/tuned/model_outputs.json").read_text()
    )
    assert all(set(o) == {"dataset", "instruction", "output", "generator"} for o in outputs)
    rows = [
        json.loads(line)
        for line in (tiny_run[0] / "answers/mt_bench/model_answer/tiny-tuned.jsonl")
        .read_text()
        .splitlines()
    ]
    assert all(
        set(r) == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
        and len(r["choices"][0]["turns"]) == 2
        for r in rows
    )
    assert len({r["answer_id"] for r in rows}) == len(rows) == 8


def test_same_recipe_same_history(tiny_run, tmp_path):
    from dolly_lora.config import PRESETS
    from dolly_lora.train import train

    curve = lambda h: [(r["step"], r["loss"]) for r in h["log"]] + [
        (r["step"], r["eval_loss"]) for r in h["validation"]
    ]
    assert curve(train(PRESETS["tiny"], tmp_path, log=lambda line: None)) == curve(
        json.loads((tiny_run[0] / "training_history.json").read_text())
    )


def test_mistakes_are_one_line_and_exit_2(tmp_path, tiny_run, call):
    calls = [
        ("run", "smolm2"),
        ("run", "tiny", "--set", "epoch=1"),
        ("run", "tiny", "--set", "epochs=many"),
        ("run", "tiny", "--set", "memory=fast"),
        ("run", "tiny", "--dataset", "no/such.jsonl"),
        ("run", "tiny", "--set", "alpaca=nowhere.json"),
        ("run", "tiny", "--set", "base=./nowhere"),
        ("run", "tiny", "--set", "optimizer=adamw"),
        ("run", "tiny", "--dataset", tmp_path / "broken.jsonl"),
        ("run", "tiny", "--run-dir", tiny_run[0], "--set", "seed=7"),
        ("chat", "--run-dir", tmp_path),
        ("report", "--run-dir", tmp_path),
    ]
    (tmp_path / "broken.jsonl").write_text("{")
    for command in calls:
        done = call(*command)
        assert (
            done.returncode == 2
            and done.stderr.startswith("dolly-lora: ")
            and done.stderr.count("\n") == 1
            and "==" not in done.stdout
        ), (command, done.stdout, done.stderr)
    assert call("walk").returncode == 2


def test_failing_cell_names_cell_error_and_notebook(tiny_run, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(
        tiny_run[0], folder, ignore=shutil.ignore_patterns("metrics.json", "answers", "notebooks")
    )
    (folder / "data/test.jsonl").write_text('{"instruction": "cut')
    done = cli("run", "tiny", "--run-dir", folder)
    assert done.returncode == 1
    assert (
        "01_data failed in cell" in done.stderr
        and re.search(r"test\.jsonl", done.stderr)
        and "notebooks/01_data.ipynb" in done.stderr
        and "Traceback" not in done.stderr
    )
    assert (folder / "notebooks/01_data.ipynb").exists() and not (
        folder / "metrics.json"
    ).exists()


def test_chat_batch(tiny_run, tmp_path, call):
    (tmp_path / "q.txt").write_text("Name a prime.\nSay <b>hi</b>\n")
    answers = {}
    for flags in ((), ("--no-lora",), ("--base", "tiny")):
        done = call("chat", "--run-dir", tiny_run[0], "--batch", tmp_path / "q.txt", *flags)
        rows = [json.loads(line) for line in done.stdout.splitlines()]
        assert done.returncode == 0 and [r["instruction"] for r in rows] == [
            "Name a prime.",
            "Say <b>hi</b>",
        ], done.stderr
        answers[flags] = [r["output"][:8] for r in rows]
    assert answers[("--no-lora",)] == answers[("--base", "tiny")] != answers[()]


def test_chat_in_the_terminal(tiny_run):
    done = cli("chat", "--run-dir", tiny_run[0], input="Name a prime.\n/clear\n/quit\n")
    assert done.returncode == 0 and "/quit leaves" in done.stdout
    assert done.stdout.split("> ", 1)[1].split("\n")[0].strip()  # something was answered


def test_doctor():
    done = cli("doctor")
    assert (
        done.returncode == 0
        and "this machine can run tiny" in done.stdout
        and "torch" in done.stdout
    )


def test_doctor_counts_the_cards(monkeypatch):
    from dolly_lora import cli as commands

    card = SimpleNamespace(name="a card", total_memory=80 * 2**30, major=9)
    answers = dict(is_available=True, get_device_properties=card)
    for count, said in (1, "a card, 80 GiB, bf16"), (2, "2 × a card, 80 GiB, bf16"):
        for name, value in (answers | dict(device_count=count)).items():
            monkeypatch.setattr(f"torch.cuda.{name}", lambda *args, value=value: value)
        assert {what: remark for what, _, remark in commands.doctor()}["GPU"] == said


def test_a_chat_that_fails_costs_no_report(tiny_run, tmp_path, monkeypatch, capsys):
    from dolly_lora import cli as commands

    folder = tmp_path / "run"
    shutil.copytree(tiny_run[0], folder)
    shutil.rmtree(folder / "report")
    (folder / "stages.json").unlink()
    execute = commands.execute

    def failing(notebooks, stage, target, parameters, ahead):
        if stage == "04_chat":
            return commands.tell_failure(stage, "cell 19", "1 / 0", "Empty: ", target)
        return execute(notebooks, stage, target, parameters, ahead) if stage == "05_report" else 0

    monkeypatch.setattr(commands, "execute", failing)
    monkeypatch.delenv("IN_TEST", raising=False)
    assert commands.run("tiny", str(folder)) == 1
    assert (
        "04_chat failed, see above: the report was written without it" in capsys.readouterr().err
    )
    stages = json.loads((folder / "stages.json").read_text())
    assert (
        (folder / "report/report.html").is_file()
        and not stages["04_chat"]["finished"]
        and stages["05_report"]["finished"]
    )


def test_a_stage_s_time_is_that_of_all_its_parts(tmp_path):
    part = """
import sys, time
from dolly_lora.cli import StageClock
with StageClock(sys.argv[1], "02_train"):
    print("on", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", part, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    process.stdout.readline()
    while not (tmp_path / "stages.json").exists():
        time.sleep(0.05)
    process.kill()  # nothing of ours runs after this
    process.communicate()
    before = json.loads((tmp_path / "stages.json").read_text())["02_train"]
    with StageClock(tmp_path, "02_train") as clock:
        pass
    clock.end(failed=False)
    after = json.loads((tmp_path / "stages.json").read_text())["02_train"]
    assert (
        before["seconds"] > 0
        and after["seconds"] >= before["seconds"]
        and after["parts"] == 2
        and after["finished"]
        and not before["finished"]
    )


def test_a_judge_that_cannot_be_had_is_told_before_a_kernel_starts(
    tiny_run, tmp_path, monkeypatch, call
):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    for judge, why in (
        ("gpt-4-1106-preview", "OPENAI_API_KEY is not set"),
        ("local:./nowhere", "no base model at './nowhere'"),
    ):
        for command in (
            ("run", "tiny", "--run-dir", tmp_path / "run", "--set", f"judge={judge}"),
            ("judge", "--run-dir", tiny_run[0], "--judge", judge),
        ):
            done = call(*command)
            assert (
                done.returncode == 2
                and why in done.stderr
                and done.stderr.count("\n") == 1
                and "==" not in done.stdout
            ), (command, done.stderr)
    done = call(
        "judge", "--run-dir", tiny_run[0], "--judge", "gpt-4-1106-preview", "--dry-run"
    )  # lengths are enough
    assert done.returncode == 0 and re.search(
        r"gpt-4-1106-preview: \d+ calls, about [\d,]+ tokens to read, about US\$ \d", done.stdout
    ), done.stderr


def test_a_second_judge_stands_beside_the_first_and_a_later_run_keeps_it(
    tiny_run, tmp_path, call
):
    """And the later run repeats nothing: what was trained, answered and judged is as it was."""
    from dolly_lora.models import tiny_model, tiny_tokenizer
    from dolly_lora.verdicts import judge_slug

    folder, other = tmp_path / "run", tmp_path / "other"
    shutil.copytree(tiny_run[0], folder)
    tiny_model(seed=1).save_pretrained(other)
    tiny_tokenizer().save_pretrained(other)
    judge = f"local:{other}"
    done = call("judge", "--run-dir", folder, "--judge", judge)
    assert done.returncode == 0, done.stderr
    kept = [
        "training_history.json",
        "answers/test/tuned.json",
        "answers/mt_bench/model_answer/tiny-tuned.jsonl",
        f"judgments/mt_bench/model_judgment/{judge_slug('local tiny')}_single.jsonl",
    ]
    before = {name: (folder / name).read_bytes() for name in kept}
    for do, *command in (call, "report"), (cli, "run", "tiny"):
        done = do(*command, "--run-dir", folder)
        assert done.returncode == 0, done.stderr
        metrics = json.loads((folder / "metrics.json").read_text())
        assert set(metrics["judgments"]) == {"local tiny", f"local {other}"}
        page = (folder / "report/report.html").read_text()
        assert page.count("<img alt=") == 12  # nine, and three of the second judge
    assert "step " not in done.stdout and "answers," not in done.stdout
    assert before == {name: (folder / name).read_bytes() for name in kept}
    metrics["judgments"].pop(f"local {other}")
    assert metrics == json.loads((tiny_run[0] / "metrics.json").read_text())


def test_folders_and_files_that_are_no_runs_are_one_line(tmp_path, call):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/recipe.json").write_text("")
    for command in ("run", "tiny"), ("chat",), ("judge",), ("report",):
        for place in "file", "empty":
            done = call(*command, "--run-dir", tmp_path / place)
            assert (
                done.returncode == 2
                and done.stderr.startswith("dolly-lora: ")
                and done.stderr.count("\n") == 1
            ), (command, place, done.stderr)


def test_a_batch_is_split_at_line_feeds_alone_and_says_nothing_else(tiny_run, tmp_path, call):
    odd = "Say\u2028hi\x0cthere\x85now"
    (tmp_path / "q.txt").write_text(odd + "\nName a prime.\n")
    (tmp_path / "q.jsonl").write_text(
        json.dumps(dict(instruction=odd), ensure_ascii=False) + "\n"
    )
    for name, n in (("q.txt", 2), ("q.jsonl", 1)):
        done = cli("chat", "--run-dir", tiny_run[0], "--batch", tmp_path / name)
        rows = [json.loads(line) for line in done.stdout.split("\n") if line]
        assert len(rows) == n and rows[0]["instruction"] == odd, done.stderr
        assert all(
            "answers," in line for line in done.stderr.splitlines()
        )  # our progress, no library's warning
    (tmp_path / "half.jsonl").write_text('{"instruction": "hi"}\n{"instruction": "\\ud800"}\n')
    done = call("chat", "--run-dir", tiny_run[0], "--batch", tmp_path / "half.jsonl")
    assert (
        done.returncode == 2
        and "half.jsonl line 2" in done.stderr
        and done.stderr.count("\n") == 1
    )
