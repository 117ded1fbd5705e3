"""The merged model: read by transformers alone, proved, refused when it is another one."""
import json
import shutil
import subprocess
import sys
from unittest.mock import patch

import pytest
import torch

from dolly_lora import export
from dolly_lora.config import PRESETS, DollyError
from dolly_lora.conversation import fit_prompt
from dolly_lora.data import with_template
from dolly_lora.models import load_tokenizer, load_tuned

TINY = PRESETS["tiny"]
ALONE = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
words = AutoTokenizer.from_pretrained(folder)
chat = words.apply_chat_template([dict(role="user", content="Name a prime.")], return_dict=True,
                                 add_generation_prompt=True, return_tensors="pt")
with torch.inference_mode(): logits = model(**chat).logits[0, -1]
assert "peft" not in sys.modules and "dolly_lora" not in sys.modules
print(json.dumps(dict(logits=logits.tolist(), dtype=str(model.dtype),
                      ids=chat["input_ids"].tolist(), eos=model.generation_config.eos_token_id)))
"""


@pytest.fixture()
def run(tiny_run, tmp_path):
    return shutil.copytree(tiny_run[0], tmp_path / "run")


def quiet(line): pass


def test_the_command_writes_a_model_that_transformers_alone_reads(run, call):
    done = call("export", "--run-dir", run)
    folder = run / "export/merged"
    assert done.returncode == 0 and done.stdout.splitlines()[-1].endswith("merged"), done.stderr
    said = json.loads((folder / "certificate.json").read_text())
    losses = said["loss"]
    assert said["kl"]["mean"] < 1e-4 and abs(losses["export"] - losses["training_model"]) < 1e-3
    assert said["tokens"] > 1000 and said["merged_onto"] == "the published weights"
    alone = subprocess.run([sys.executable, "-c", ALONE, folder], capture_output=True, text=True,
                           cwd=run)
    found = json.loads(alone.stdout)
    model, tokenizer = load_tuned(TINY, run), load_tokenizer(TINY)
    prompt = fit_prompt(tokenizer, [], "Name a prime.", 999)[0]
    ids = tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
    assert found["ids"] == ids.tolist() and found["dtype"] == "torch.bfloat16"
    assert found["eos"] == tokenizer.eos_token_id
    with torch.inference_mode(): ours = model(ids).logits[0, -1].float().cpu()
    torch.testing.assert_close(torch.tensor(found["logits"]), ours, rtol=0.02, atol=0.02)
    assert not [*(run / "export").glob("*.part")]


@pytest.mark.parametrize("system", ["", "Be brief. ", " \n"])
@pytest.mark.parametrize("adds_start", [False, True])
def test_the_chat_template_is_the_prompt_of_the_chat(system, adds_start):
    tokenizer = load_tokenizer(TINY)
    if adds_start:
        from tokenizers.processors import TemplateProcessing
        tokenizer.bos_token = tokenizer.eos_token
        tokenizer._tokenizer.post_processor = TemplateProcessing(
            single="</s> $A", special_tokens=[("</s>", tokenizer.eos_token_id)])
    turns = [("Name a prime.", "Seven."), (" Two\nlines ", "é {{ m }} \n")]
    messages = [dict(role="system", content=system)]
    for question, answer in turns:
        messages += [dict(role="user", content=question), dict(role="assistant", content=answer)]
    messages.append(dict(role="user", content="{% if %} Why?"))
    ids = with_template(tokenizer).apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    prompt, _ = fit_prompt(tokenizer, turns, "{% if %} Why?", 9999, system)
    assert ids == tokenizer(prompt).input_ids


def test_another_model_is_refused_and_nothing_is_kept_of_it(run):
    export.export_merged(TINY, run, log=quiet)
    before = (run / "export/merged/certificate.json").read_text()
    real = export.merged_weights

    def wrong(model):
        for name, weight in real(model):
            yield name, -weight if name == "lm_head.weight" else weight

    with patch.object(export, "merged_weights", wrong):
        with pytest.raises(DollyError, match="is another model: KL .*nothing was kept") as error:
            export.export_merged(TINY, run, log=quiet)
    assert "\n" not in str(error.value)
    assert [p.name for p in (run / "export").iterdir()] == ["merged"]
    assert (run / "export/merged/certificate.json").read_text() == before


def test_a_folder_of_somebody_else_is_left_alone(run, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    with pytest.raises(DollyError, match="give another folder"):
        export.export_merged(TINY, run, tmp_path / "mine", log=quiet)
    assert (tmp_path / "mine/thesis.txt").exists()


def test_what_would_go_to_the_hub_is_shown_and_nothing_is_sent(run, call, monkeypatch):
    import huggingface_hub

    def sends(*args, **kwargs):
        raise AssertionError("sent")

    for name in "create_repo", "upload_folder":
        monkeypatch.setattr(huggingface_hub.HfApi, name, sends)
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecretsecret")
    done = call("export", "--run-dir", run, "--to", "hub", "--repo", "me/mine", "--dry-run")
    assert done.returncode == 0, done.stderr
    for name in "model.safetensors", "certificate.json", "chat_template.jinja", "README.md":
        assert name in done.stdout
    assert done.stdout.splitlines()[-1] == "https://huggingface.co/me/mine (nothing was sent)"
    # made once: another try finds it there
    before = (run / "export/merged/model.safetensors").stat().st_mtime_ns
    call("export", "--run-dir", run, "--to", "hub", "--repo", "me/mine", "--dry-run")
    assert (run / "export/merged/model.safetensors").stat().st_mtime_ns == before
    for path in (run / "export").rglob("*"):
        assert path.is_dir() or b"secretsecret" not in path.read_bytes()


def test_the_hub_gets_a_private_model_or_says_why_not(run, monkeypatch):
    import httpx
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError
    folder, calls = export.export_merged(TINY, run, log=quiet), []
    for name in "create_repo", "upload_folder":
        monkeypatch.setattr(huggingface_hub.HfApi, name,
                            lambda self, *a, **k: calls.append((a, k)))
    assert export.push_to_hub(folder, "me/mine", log=quiet) == "https://huggingface.co/me/mine"
    (repo, made), (_, sent) = calls
    assert repo == ("me/mine",) and made["private"] and sent["folder_path"] == folder

    def refuses(self, *args, **kwargs):
        raise HfHubHTTPError("no", response=httpx.Response(
            401, request=httpx.Request("POST", "https://huggingface.co")))

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuses)
    with pytest.raises(DollyError, match="did not take me/mine .*set HF_TOKEN"):
        export.push_to_hub(folder, "me/mine", log=quiet)
    with pytest.raises(DollyError, match="give USER/NAME"):
        export.push_to_hub(folder, "mine", log=quiet)
