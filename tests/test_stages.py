"""The stages of `dolly-lora run`: no stopwatch, a chat that may fail, a clock that is true."""

import json

import papermill
import pytest

from dolly_lora import cli
from dolly_lora.config import DollyError
from dolly_lora.files import write_json


@pytest.fixture()
def stages(monkeypatch, tmp_path):
    """A run whose stages do what is put into `acts`; returns its folder, `acts` and `clock`."""
    folder, acts = tmp_path / "run", {}

    def execute(notebooks, stage, target, parameters, ahead):
        return acts.get(stage, lambda: 0)() or 0

    monkeypatch.setattr(cli, "execute", execute)
    monkeypatch.delenv("IN_TEST", raising=False)

    def clock():
        return json.loads((folder / "stages.json").read_text())

    return folder, acts, clock


def fail():
    return 1


def crash():
    raise RuntimeError("the window does not open")


# No stopwatch


def test_neither_a_slow_kernel_nor_a_slow_output_ends_a_stage(monkeypatch, tmp_path):
    given = {}
    monkeypatch.setattr(papermill, "execute_notebook", lambda *args, **more: given.update(more))
    assert cli.execute(cli.notebooks(), "01_data", tmp_path / "nbs/01_data.ipynb", {}) == 0
    assert given["start_timeout"] >= 3600 and given["iopub_timeout"] >= 3600


def test_papermill_hands_our_patience_to_the_client(monkeypatch, tmp_path):
    from papermill.clientwrap import PapermillNotebookClient

    seen = {}

    def execute(client, **more):
        seen.update(start=client.startup_timeout, output=client.iopub_timeout)
        return client.nb

    monkeypatch.setattr(PapermillNotebookClient, "execute", execute)
    assert cli.execute(cli.notebooks(), "01_data", tmp_path / "nbs/01_data.ipynb", {}) == 0
    assert seen == dict(start=cli.PATIENCE, output=cli.PATIENCE)


@pytest.mark.parametrize("error", [RuntimeError("Kernel died"), RuntimeError("no reply in 60 s")])
def test_a_kernel_that_does_not_start_is_a_failed_stage(monkeypatch, tmp_path, capsys, error):
    def execute_notebook(*args, **more):
        raise error

    monkeypatch.setattr(papermill, "execute_notebook", execute_notebook)
    assert cli.execute(cli.notebooks(), "01_data", tmp_path / "nbs/01_data.ipynb", {}) == 1
    assert f"01_data failed in the kernel:\nRuntimeError: {error}" in capsys.readouterr().err


# A chat that may fail


@pytest.mark.parametrize("act", [fail, crash], ids=["fails", "raises"])
def test_a_chat_costs_no_report(stages, capsys, act):
    folder, acts, clock = stages
    written = []
    acts |= {"04_chat": act, "05_report": lambda: written.append("report")}
    assert cli.main(["run", "tiny", "--run-dir", str(folder)]) == 1
    err = capsys.readouterr().err
    assert written and "the report was written without it" in err and "Traceback" not in err
    assert not clock()["04_chat"]["finished"] and clock()["05_report"]["finished"]
    if act is crash:
        assert "04_chat failed in the command:\nRuntimeError: the window does not open" in err


def test_another_stage_that_raises_ends_the_run(stages, capsys):
    folder, acts, clock = stages

    def full():
        raise DollyError("no room")

    acts["03_eval"] = full
    assert cli.main(["run", "tiny", "--run-dir", str(folder)]) == 2
    assert "dolly-lora: no room" in capsys.readouterr().err
    assert not clock()["03_eval"]["finished"] and "04_chat" not in clock()


# The clock


def test_a_finished_stage_that_has_nothing_to_do_is_not_timed_again(stages):
    folder, _, clock = stages
    assert cli.run("tiny", str(folder)) == 0
    first = clock()
    assert set(first) == set(cli.STAGES)
    assert all(stage["finished"] and stage["parts"] == 1 for stage in first.values())
    assert cli.run("tiny", str(folder)) == 0 and clock() == first


def test_a_finished_stage_that_does_new_work_gets_another_part(stages):
    folder, acts, clock = stages
    assert cli.run("tiny", str(folder)) == 0
    first = clock()
    acts["03_eval"] = lambda: write_json(folder / "answers/answers.jsonl", "one more answer")
    assert cli.run("tiny", str(folder)) == 0
    now = clock()
    assert now["03_eval"]["parts"] == 2 and now["03_eval"]["finished"]
    assert now["03_eval"]["seconds"] > first["03_eval"]["seconds"]
    assert {k: v for k, v in now.items() if k != "03_eval"} == {
        k: v for k, v in first.items() if k != "03_eval"
    }


@pytest.mark.parametrize("act", [fail, crash], ids=["fails", "raises"])
def test_a_finished_stage_that_now_fails_has_not_finished(stages, act):
    folder, acts, clock = stages
    assert cli.run("tiny", str(folder)) == 0 and clock()["04_chat"]["finished"]
    acts["04_chat"] = act
    assert cli.run("tiny", str(folder)) == 1
    assert not clock()["04_chat"]["finished"] and clock()["04_chat"]["parts"] == 2
    del acts["04_chat"]
    assert cli.run("tiny", str(folder)) == 0
    assert clock()["04_chat"]["finished"] and clock()["04_chat"]["parts"] == 3


def test_an_interrupted_rerun_does_not_undo_what_had_finished(stages):
    folder, acts, clock = stages
    assert cli.run("tiny", str(folder)) == 0
    first = clock()

    def interrupt():
        raise KeyboardInterrupt

    acts["02_train"] = interrupt
    assert cli.main(["run", "tiny", "--run-dir", str(folder)]) == 130
    assert clock() == first


def test_times_of_an_older_version_are_taken(stages):
    folder, _, clock = stages
    assert cli.run("tiny", str(folder)) == 0
    (folder / "stages.json").write_text('{"01_data": 3.5}')
    assert cli.run("tiny", str(folder)) == 0 and clock()["01_data"]["finished"]


# JSON of another kind

FOREIGN = "[]", "{}", "7", "null"
NAMES = "training_history.json", "data/statistics.json", "data/tokens.json", "stages.json"


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """A tiny run that was prepared and has a history; nothing in it was trained."""
    from test_report import make_run

    return make_run(tmp_path_factory.mktemp("small"))


@pytest.mark.parametrize("text", FOREIGN)
@pytest.mark.parametrize("name", NAMES)
def test_a_report_says_in_a_line_which_file_is_none(small_run, tmp_path, capsys, name, text):
    import shutil

    folder = tmp_path / "run"
    shutil.copytree(small_run, folder)
    (folder / name).write_text(text)
    status = cli.main(["report", "--run-dir", str(folder)])
    err = capsys.readouterr().err
    if (name, text) == ("stages.json", "{}"):  # no stage has been timed
        assert status == 0
        return
    assert status == 2 and err.count("\n") == 1, err
    assert name.split("/")[-1] in err and "is not what a run writes there" in err


@pytest.mark.parametrize("text", FOREIGN)
def test_a_judge_says_in_a_line_which_file_is_none(small_run, tmp_path, capsys, text):
    import shutil

    folder = tmp_path / "run"
    shutil.copytree(small_run, folder)
    (folder / "data/statistics.json").write_text(text)
    assert cli.main(["judge", "--run-dir", str(folder)]) == 2
    err = capsys.readouterr().err
    assert "statistics.json is not what a run writes there" in err and err.count("\n") == 1


@pytest.mark.parametrize("text", ["[]", "7", "null"])
def test_a_run_says_in_a_line_that_its_times_are_none(stages, capsys, text):
    folder, _, _ = stages
    folder.mkdir()
    (folder / "stages.json").write_text(text)
    assert cli.main(["run", "tiny", "--run-dir", str(folder)]) == 2
    err = capsys.readouterr().err
    assert "stages.json is not what a run writes there" in err and err.count("\n") == 1


def test_the_disk_is_looked_at_before_a_judge_is_asked(small_run, capsys, monkeypatch):
    from dolly_lora import data, runs

    monkeypatch.setattr(data, "prepare_data", lambda recipe, folder: dict(test=[]))
    monkeypatch.setattr(
        runs.shutil, "disk_usage", lambda path: type("Usage", (), dict(free=2**20))
    )
    assert cli.main(["judge", "--run-dir", str(small_run)]) == 2
    err = capsys.readouterr().err
    assert "0.0 GiB are free for" in err and err.count("\n") == 1
