"""A full disk is one line, told early where possible, and the last good files stay whole."""
import errno
import os
from types import SimpleNamespace
from unittest.mock import patch

import pytest
from safetensors import SafetensorError

from dolly_lora.config import DollyError
from dolly_lora.train import train
from dolly_lora.trainer import DollyTrainer
from training import RECIPE, adapters, quiet, same

TORCH = "[enforce fail at inline_container.cc:664] . "
RUST = "No space left on device (os error 28)"
FULL = [OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError(TORCH + "unexpected pos 704 vs 598"),
        RuntimeError(TORCH + "PytorchStreamWriter failed writing file data/1: file write failed"),
        Exception(RUST),     # the tokenizer's
        SafetensorError("Error while serializing: I/O error: " + RUST)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, train(RECIPE, folder, log=quiet)


@pytest.mark.parametrize("error", FULL, ids=str)
@pytest.mark.parametrize("at", ["checkpoint-8", "adapter.part"])
def test_a_full_disk_is_one_line_and_the_last_good_files_are_whole(whole, tmp_path, error, at):
    real = DollyTrainer._save

    def save(self, output_dir=None, **kwargs):
        real(self, output_dir, **kwargs)
        if output_dir.endswith(at):
            weights = f"{output_dir}/adapter_model.safetensors"
            os.truncate(weights, os.path.getsize(weights) // 2)
            raise error

    full = pytest.raises(DollyError, match="the disk is full: .*; make room")
    with patch.object(DollyTrainer, "_save", save), full as told:
        train(RECIPE, tmp_path, log=quiet)
    assert "\n" not in str(told.value)
    assert not (tmp_path / "adapter").exists() and not (tmp_path / "adapter.part").exists()
    history = train(RECIPE, tmp_path, log=quiet)
    assert history["summary"]["resumed_from"] == (4 if at == "checkpoint-8" else 12)
    assert same(history, whole[1]) and adapters(tmp_path) == adapters(whole[0])


def test_another_error_is_not_called_a_full_disk(tmp_path):
    with patch.object(DollyTrainer, "_save", side_effect=RuntimeError("something else")):
        with pytest.raises(RuntimeError, match="something else"):
            train(RECIPE, tmp_path, log=quiet)


def test_too_little_room_is_told_before_the_first_step(tmp_path):
    with patch("shutil.disk_usage", return_value=SimpleNamespace(free=2**20)):
        with pytest.raises(DollyError, match="only 1 MiB free .* make room"):
            train(RECIPE, tmp_path, log=quiet)
