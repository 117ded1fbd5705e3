"""`train_seeds` trains again with other seeds on the same split, and nothing twice."""
import shutil
import subprocess
import sys
from dataclasses import replace
from unittest.mock import patch

import pytest

from conftest import ROOT
from dolly_lora import seeds
from dolly_lora.config import PRESETS, DollyError
from dolly_lora.engine.step import FusedLlama
from dolly_lora.models import load_tuned
from dolly_lora.runs import load_run
from dolly_lora.seeds import train_seeds
from dolly_lora.train import train
from training import adapters, quiet, same

RECIPE = replace(PRESETS["tiny"], max_steps=6, eval_steps=2, seeds=2)
SEED = RECIPE.seed + 1

# ends without a word when the second training validates at its step 4
DIE = """
import os, sys
from dataclasses import replace
from dolly_lora.config import PRESETS
from dolly_lora.seeds import train_seeds
recipe = replace(PRESETS['tiny'], max_steps=6, eval_steps=2, seeds=2)
def log(line):
    if "step     4/" in line: os._exit(9)
train_seeds(recipe, sys.argv[1], log)
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run with two seeds: (its folder, the main history, the others, their log)."""
    folder, lines = tmp_path_factory.mktemp("seeds"), []
    history = train(RECIPE, folder, log=quiet)
    before = adapters(folder)
    others = train_seeds(RECIPE, folder, log=lines.append)
    assert adapters(folder) == before
    return folder, history, others, lines


@pytest.fixture()
def main_alone(trained, tmp_path):
    """The same main run, before the other seeds."""
    shutil.copytree(trained[0], tmp_path / "run", ignore=shutil.ignore_patterns("seeds"))
    return tmp_path / "run"


def files(folder):
    return {p.name: p.read_bytes() for p in (folder / "data").iterdir()}


def test_another_adapter_on_the_same_split(trained):
    folder, history, others, lines = trained
    seed_dir = folder / "seeds" / str(SEED)
    assert list(others) == [SEED] and not same(others[SEED], history)
    assert adapters(seed_dir) != adapters(folder)
    assert files(seed_dir) == files(folder) and len(files(folder)) >= 4
    assert lines[-1].startswith(f"seed {SEED}: validation loss ")
    assert not any("loss" in line and "validation" not in line for line in lines)


def test_it_leaves_a_small_run_folder(trained):
    seed_dir = trained[0] / "seeds" / str(SEED)
    assert not (seed_dir / "checkpoints").exists()
    recipe = load_run(seed_dir)
    assert recipe == replace(RECIPE, seed=SEED, seeds=1)
    load_tuned(recipe, seed_dir)


def test_nothing_is_trained_twice(trained):
    folder, _, others, _ = trained
    (folder / "seeds" / str(SEED) / "checkpoints").mkdir()  # it died before it tidied up
    with patch.object(FusedLlama, "step", side_effect=AssertionError("a step too many")):
        again = train_seeds(RECIPE, folder, log=quiet)
    assert same(again[SEED], others[SEED])
    assert not (folder / "seeds" / str(SEED) / "checkpoints").exists()


def test_a_killed_one_goes_on(trained, main_alone):
    done = subprocess.run([sys.executable, "-c", DIE, str(main_alone)], cwd=ROOT)
    seed_dir = main_alone / "seeds" / str(SEED)
    assert done.returncode == 9 and (seed_dir / "checkpoints/checkpoint-2").exists()
    again = train_seeds(RECIPE, main_alone, log=quiet)[SEED]
    assert again["summary"]["resumed_from"] == 2 and same(again, trained[2][SEED])
    assert adapters(seed_dir) == adapters(trained[0] / "seeds" / str(SEED))


def test_killed_while_the_split_was_copied(trained, main_alone):
    """The statistics come last: without them nobody would split anew with the other seed."""
    seed_dir = main_alone / "seeds" / str(SEED)
    real = seeds.publish

    def publish(path):
        if path.name == "val.jsonl":
            raise KeyboardInterrupt
        return real(path)

    with patch.object(seeds, "publish", publish), pytest.raises(KeyboardInterrupt):
        train_seeds(RECIPE, main_alone, log=quiet)
    assert not (seed_dir / "data/statistics.json").exists()
    assert same(train_seeds(RECIPE, main_alone, log=quiet)[SEED], trained[2][SEED])
    assert files(seed_dir) == files(main_alone)


def test_one_seed_is_nothing_to_do(trained, main_alone):
    assert train_seeds(replace(RECIPE, seeds=1), main_alone, log=quiet) == {}
    assert not (main_alone / "seeds").exists()


def test_a_changed_split_is_noticed(main_alone):
    train_seeds(RECIPE, main_alone, log=quiet)
    path = main_alone / "seeds" / str(SEED) / "data/train.jsonl"
    path.write_text(path.read_text() + "\n")
    shutil.rmtree(main_alone / "seeds" / str(SEED) / "adapter")
    with pytest.raises(DollyError, match="missing, cut short or edited"):
        train_seeds(RECIPE, main_alone, log=quiet)
