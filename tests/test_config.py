"""The recipe and its presets, the project's folder, and messages that keep secrets."""
import base64
import subprocess
import sys
from dataclasses import replace

import pytest

from conftest import ROOT
from dolly_lora.config import PRESETS, ConfigError, DollyError, login_forms
from dolly_lora.config import parse_overrides, project_root, redact, resolve


def test_a_quote_that_is_not_closed_is_one_line():
    with pytest.raises(ConfigError, match="a quote is opened and not closed"):
        parse_overrides("base='x")


def test_a_file_is_no_run_folder(tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(ConfigError, match="is a file: give a folder"):
        resolve("tiny", str(tmp_path / "run"))
    assert (tmp_path / "run").read_text() == "mine"


WRONG = {
    "train_on=prompt": "choose response or all",
    "memory=small": "choose auto, speed or frugal",
    "precision=fp16": "choose auto or fp8",
    "precision=fp8 memory=frugal": "choose one of them",
    "optimizer=adafactor": "must be element-wise",
    "lora_r=0": "lora_r=0: must be above 0",
    "learning_rate=nan": "learning_rate=nan: must be above 0",
    "epochs=inf": "epochs=inf: must be above 0",
    "max_steps=-1": "max_steps=-1: must not be negative",
    "lora_dropout=1": "lora_dropout=1.0: must be at least 0 and below 1",
    "val_fraction=0.6 test_fraction=0.4": "their sum below 1",
    "val_fraction=nan": "both above 0",
}


@pytest.mark.parametrize("overrides", WRONG)
def test_a_value_that_makes_no_sense_is_refused_with_its_field(overrides):
    with pytest.raises(ConfigError, match=WRONG[overrides]) as error:
        resolve("tiny", overrides=overrides)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("changes", [
    dict(seed=-1), dict(seed=2**32), dict(seed=2**32 - 1, seeds=2), dict(seeds=2**32 + 1)])
def test_every_seed_of_a_recipe_is_one_that_numpy_takes(changes):
    with pytest.raises(ConfigError, match="seed=.*must be from 0 to"):
        replace(PRESETS["tiny"], **changes)


def test_the_last_possible_seed_is_allowed():
    assert replace(PRESETS["tiny"], seed=2**32 - 3, seeds=3).seeds == 3


def test_a_foreign_settings_ini_is_not_the_project(tmp_path, monkeypatch):
    (tmp_path / "settings.ini").write_text("[DEFAULT]\nlib_name = other\n")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    assert project_root() == tmp_path / "work"
    monkeypatch.chdir(ROOT / "nbs")
    assert project_root() == ROOT


@pytest.fixture
def secrets(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-planted-secret\r\n")
    monkeypatch.setenv("OPENAI_BASE_URL", "https://me:pass%40word-long@judge.example/v1")
    monkeypatch.setenv("HF_TOKEN", "short")   # too short for a key: it may stand in any text


@pytest.mark.parametrize("text", [
    "Illegal header value b'Bearer sk-planted-secret\\r'",
    "https://me:pass%40word-long@judge.example/v1",
    "pass@word-long"])
def test_secrets_leave_no_message(secrets, text):
    shown = redact(text)
    assert "planted" not in shown and "word" not in shown and "***" in shown
    assert str(DollyError(text)) == shown


def test_a_login_is_redacted_as_a_header_sends_it(secrets):
    header = base64.b64encode(b"me:pass@word-long").decode()
    assert redact(f"Authorization: Basic {header}") == "Authorization: Basic ***"


def test_a_short_password_of_an_address_is_redacted(monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "https://me:pass@judge.example/v1")
    assert redact("401 for me with pass at judge.example") == "401 for me with *** at judge.example"


def test_common_words_stay(secrets):
    assert redact("a short word") == "a short word"


@pytest.mark.parametrize("address", ["", "local", "https://judge.example/v1?to=a@b", "http://["])
def test_an_address_without_a_login_hides_nothing(address):
    assert login_forms(address) == set()


def test_a_token_before_the_host_is_a_login():
    assert "sk-token" in login_forms("https://sk-token@judge.example")
    assert base64.b64encode(b"sk-token:").decode() in login_forms("https://sk-token@judge.example")


def test_nobody_is_told_who_trains():
    """Nor by a kernel that imports transformers before anything of ours."""
    child = "from huggingface_hub import constants; print(constants.HF_HUB_DISABLE_TELEMETRY)"
    code = f"""
import os, subprocess, sys
os.environ.pop("HF_HUB_DISABLE_TELEMETRY", None)
import dolly_lora.cli
subprocess.run([sys.executable, "-c", {child!r}], check=True)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "True", done.stderr
