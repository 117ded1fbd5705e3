"""A run's folder: one writer, one recipe, one base model."""
import json
import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from conftest import ROOT
from dolly_lora import runs
from dolly_lora.config import PRESETS, ConfigError, DollyError
from dolly_lora.files import read_json
from dolly_lora.models import tiny_model, tiny_tokenizer
from dolly_lora.runs import hold_run, load_run, start_run
from dolly_lora.train import train

TINY = PRESETS["tiny"]

HOLD = """
import os, sys
from dolly_lora.runs import hold_run
with hold_run(sys.argv[1]):
    print("mine", os.getpid(), flush=True)
    sys.stdin.read(1)
"""


def start_holder(folder, **env):
    """A process that holds a run until it gets a character."""
    clean = {k: v for k, v in os.environ.items() if k != "DOLLY_LORA_HOLDS"}
    return subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], cwd=ROOT, env=clean | env,
                            text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


def holder(folder, **env):
    """The same, when it has the run; and what it said."""
    process = start_holder(folder, **env)
    return process, process.stdout.readline().split()[0]


# ---- one writer


def test_a_second_process_is_refused_with_the_first_ones_name(tmp_path):
    first, said = holder(tmp_path)
    assert said == "mine"
    who = rf"is in use by process {first.pid} on \S+ since .*: wait for it"
    with pytest.raises(ConfigError, match=who) as error:
        with hold_run(tmp_path):
            pass
    assert "\n" not in str(error.value)
    first.communicate("x")


def test_a_killed_process_holds_nothing(tmp_path):
    first, _ = holder(tmp_path)
    first.kill()
    first.communicate()
    with hold_run(tmp_path), hold_run(tmp_path):   # nested
        pass
    assert "DOLLY_LORA_HOLDS" not in os.environ


def test_a_kernel_that_we_start_works_for_us(tmp_path):
    with hold_run(tmp_path):
        child, said = holder(tmp_path, DOLLY_LORA_HOLDS=str(tmp_path.resolve()))
        assert said == "mine"
        child.communicate("x")
        assert child.returncode == 0


def test_a_worker_waits_for_the_former_one_as_long_as_it_lives(tmp_path):
    """The message names the former worker, not the process that both work for."""
    env = dict(DOLLY_LORA_HOLDS=str(tmp_path.resolve()))
    with hold_run(tmp_path):
        former, _ = holder(tmp_path, **env)
        new = start_holder(tmp_path, **env)
        waiting = new.stderr.readline()
        assert f"waiting for process {former.pid} on" in waiting
        assert str(os.getpid()) not in waiting
        former.kill()
        former.communicate()
        assert new.stdout.readline().startswith("mine")
        new.communicate("x")
        assert new.returncode == 0


def test_a_process_that_a_worker_starts_does_not_wait_for_it(tmp_path):
    code = HOLD.replace("sys.stdin.read(1)", "import subprocess\n    if len(sys.argv) == 2: "
                        "sys.exit(subprocess.call([sys.executable, *sys.orig_argv[1:], 'child']))")
    with hold_run(tmp_path):
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, timeout=60,
                              capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("mine") == 2 and not done.stderr


def test_a_run_inside_a_run_leaves_the_outer_one_held(tmp_path):
    """02_train trains the other seeds in folders below the run's own."""
    outer, inner = tmp_path, tmp_path / "seeds/43"
    with hold_run(outer):
        with hold_run(inner):
            for folder in outer, inner:
                child, said = holder(folder, DOLLY_LORA_HOLDS=os.environ["DOLLY_LORA_HOLDS"])
                child.communicate("x")
                assert said == "mine"
        assert os.environ["DOLLY_LORA_HOLDS"] == str(outer.resolve())
    assert "DOLLY_LORA_HOLDS" not in os.environ


@pytest.mark.parametrize("broken", ["write_json", "sweep_parts"])
def test_a_lock_that_cannot_be_announced_is_released(tmp_path, monkeypatch, broken):
    """A full disk, between taking the lock and writing down whose it is."""
    def full(*args):
        raise DollyError("cannot write: make room")
    monkeypatch.setattr(runs, broken, full)
    with pytest.raises(DollyError, match="make room"):
        with hold_run(tmp_path):
            pass
    assert "DOLLY_LORA_HOLDS" not in os.environ
    monkeypatch.undo()
    other, said = holder(tmp_path)   # another process gets it now
    assert said == "mine"
    other.communicate("x")
    with hold_run(tmp_path):         # and so do we
        pass


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written to .*: give another run_dir"):
        with hold_run(tmp_path / "file/run"):
            pass


def test_what_a_killed_process_left_half_written_is_swept_away(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    figures = tmp_path / "figures"
    figures.mkdir()
    half = figures / f"curve.{dead.pid}.part.png"
    living = figures / f"curve.{os.getpid()}.part.png"
    foreign = figures / "curve.part.png"
    for path in half, living, foreign:
        path.write_bytes(b"half")
    with hold_run(tmp_path):
        pass
    assert not half.exists() and living.exists() and foreign.exists()


# ---- one recipe


@pytest.mark.parametrize("text, why", [
    ("", "cannot be read"),
    ("{", "cannot be read"),
    ("[" * 100_000, "cannot be read"),
    ("[]", "is not a run's recipe"),
    ('{"recipe": []}', "is not a run's recipe"),
    ('{"recipe": {"title": "soup"}}', "is not a run's recipe"),
    ('{"recipe": {"base": "tiny", "lora_r": 8}}', "another version")])
def test_recipes_of_others_are_refused_in_a_line(tmp_path, text, why):
    (tmp_path / "recipe.json").write_text(text)
    with pytest.raises(DollyError, match=why) as error:
        start_run(TINY, tmp_path)
    assert "\n" not in str(error.value)
    assert (tmp_path / "recipe.json").read_text() == text


def test_a_value_of_the_wrong_type_is_refused_where_it_is_read(tmp_path):
    start_run(TINY, tmp_path)
    run = read_json(tmp_path / "recipe.json")
    run["recipe"]["lora_r"] = "many"
    (tmp_path / "recipe.json").write_text(json.dumps(run))
    with pytest.raises(ConfigError, match="lora_r is 'many', expected int"):
        load_run(tmp_path)


def test_only_the_holder_writes_the_recipe(tmp_path):
    other, _ = holder(tmp_path)
    with pytest.raises(ConfigError, match="is in use by process"):
        start_run(TINY, tmp_path)
    assert not (tmp_path / "recipe.json").exists()
    other.communicate("x")
    start_run(TINY, tmp_path)
    other, _ = holder(tmp_path)
    start_run(TINY, tmp_path)         # nothing to write
    with pytest.raises(ConfigError, match="is in use by process"):
        start_run(replace(TINY, max_new_tokens=4), tmp_path)
    assert load_run(tmp_path) == TINY
    other.communicate("x")
    start_run(replace(TINY, max_new_tokens=4), tmp_path)
    assert load_run(tmp_path).max_new_tokens == 4


def save_base(folder, seed):
    tiny_model(seed).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def test_a_run_is_refused_when_the_weights_of_its_base_were_replaced(tmp_path):
    recipe = replace(TINY, base=str(tmp_path / "base"), max_steps=1)
    save_base(tmp_path / "base", seed=0)
    history = train(recipe, tmp_path / "run", log=lambda line: None)
    assert train(recipe, tmp_path / "run") == history         # unchanged: the finished run
    time.sleep(0.01)
    save_base(tmp_path / "base", seed=1)
    with pytest.raises(ConfigError, match="has other weights than .*: choose another run_dir"):
        train(recipe, tmp_path / "run")
    save_base(tmp_path / "base", seed=0)
    assert train(recipe, tmp_path / "run") == history


def test_an_older_run_and_an_absent_base_are_not_refused(tmp_path):
    recipe = replace(TINY, base=str(tmp_path / "base"))
    save_base(tmp_path / "base", seed=0)
    start_run(recipe, tmp_path / "run")
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    start_run(recipe, tmp_path / "run")
    (tmp_path / "elsewhere").rename(tmp_path / "base")
    run = read_json(tmp_path / "run/recipe.json")
    del run["weights"]                # as before weights were recorded
    (tmp_path / "run/recipe.json").write_text(json.dumps(run))
    start_run(recipe, tmp_path / "run")


# ---- a known origin


def test_the_commit_is_the_projects_own(tmp_path, monkeypatch):
    """Beside an installed wheel, the folder one stands in may be another project's repository."""
    author = "-c user.name=a -c user.email=a@b"
    subprocess.run(f"git init -q && git {author} commit -q --allow-empty -m x", shell=True,
                   cwd=tmp_path, check=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DOLLY_LORA_COMMIT", raising=False)
    assert runs.environment()["commit"] is None
