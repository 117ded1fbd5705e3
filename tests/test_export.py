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
from dolly_lora.data import encode_all, with_template
from dolly_lora.models import load_base, load_tokenizer, load_tuned

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
    assert {p.name for p in (run / "export").iterdir()} <= {"merged", "gguf-q8_0"}
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
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecretsecret")
    from huggingface_hub.errors import HfHubHTTPError
    folder, calls = export.export_merged(TINY, run, log=quiet), []
    for name in "create_repo", "upload_folder":
        monkeypatch.setattr(huggingface_hub.HfApi, name,
                            lambda self, *a, **k: calls.append((a, k)))
    assert export.push_to_hub(folder, "me/mine", log=quiet) == "https://huggingface.co/me/mine"
    (repo, made), (_, sent) = calls
    assert repo == ("me/mine",) and made["private"] and sent["folder_path"] == folder
    (folder / "thesis.txt").write_text("years of work")
    assert "model.safetensors" in sent["allow_patterns"]
    assert sorted(sent["allow_patterns"]) == sorted(
        p.name for p in folder.iterdir() if p.name != "thesis.txt")

    def refuses(self, *args, **kwargs):
        raise HfHubHTTPError("no", response=httpx.Response(
            401, request=httpx.Request("POST", "https://huggingface.co")))

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuses)
    with pytest.raises(DollyError, match="did not take me/mine .*set HF_TOKEN"):
        export.push_to_hub(folder, "me/mine", log=quiet)
    def unreachable(self, *args, **kwargs):
        raise httpx.ConnectError("no route")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", unreachable)
    with pytest.raises(DollyError, match="did not take me/mine .*look at the network"):
        export.push_to_hub(folder, "me/mine", log=quiet)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    for repo, why in ("mine", "give USER/NAME"), ("me/mine", "no token for the hub"):
        with pytest.raises(DollyError, match=why):
            export.check_hub(repo)


class Same:
    """A program that predicts what our model predicts, unless it is told otherwise."""
    name = "same"

    def __init__(self, tokenizer, change=lambda p: p):
        self.tokenizer, self.change = with_template(tokenizer), change
        self.end_token = tokenizer.eos_token

    def token_ids(self, messages):
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True,
                                                  return_dict=True)["input_ids"]

    def log_probs(self, input_ids, wanted, ours):
        return self.change(ours)

    def answer(self, messages, max_new_tokens):
        return ""


@pytest.fixture(scope="module")
def tuned(tiny_run):
    return load_tuned(TINY, tiny_run[0]), load_tokenizer(TINY)


def certify(tuned, program, rows=None, **more):
    rows = rows if rows is not None else [
        dict(instruction=f"Name {n}.", context="", response=f"It is {n}.") for n in range(9)]
    return export.certify(*tuned, program, rows, TINY, 60, log=quiet, **more)


def test_a_certificate_says_how_near_a_program_is(tuned):
    made = certify(tuned, Same(tuned[1]))
    assert made["kl"] == dict(mean=0, p99=0) and made["greedy"]["prompts"] == 9
    assert made["loss"]["export"] == made["loss"]["training_model"]
    assert 60 <= made["tokens"] < 100 and made["training_changed_kl"] > 0


@pytest.mark.parametrize("change", [
    lambda p: p * float("nan"), lambda p: p.flip(-1), lambda p: (3 * p).log_softmax(-1)])
def test_what_is_no_number_or_too_far_is_refused(tuned, change):
    with pytest.raises(DollyError, match="is another model: KL .*nothing was kept"):
        certify(tuned, Same(tuned[1], change), most=1e-9)


def test_a_file_of_few_bits_may_lose_half_of_what_training_changed(tuned):
    model, tokenizer = tuned
    with model.disable_adapter():
        base = {}
        for row in certify_rows(tokenizer):
            logits = model(input_ids=torch.tensor([row], device=model.device)).logits[0]
            base[tuple(row)] = logits.float().log_softmax(-1)
    program = Same(tokenizer)
    program.log_probs = lambda ids, wanted, ours: base[tuple(ids)][wanted]
    with pytest.raises(DollyError, match="is another model"):
        certify(tuned, program, most=None)
    assert certify(tuned, Same(tokenizer), most=None)["most"] > 0


def certify_rows(tokenizer):
    rows = [dict(instruction=f"Name {n}.", context="", response=f"It is {n}.") for n in range(9)]
    return [e["input_ids"] for e in encode_all(rows, tokenizer, TINY.max_length)]


def test_another_end_or_prompt_is_refused(tuned):
    program = Same(tuned[1])
    program.end_token = "<s>"
    with pytest.raises(DollyError, match="ends answers at '<s>', the model at '</s>'"):
        certify(tuned, program)
    program = Same(tuned[1])
    program.tokenizer.chat_template = "{{ messages[0].content }}"
    with pytest.raises(DollyError, match="makes other tokens of the prompt 'Name 0.'"):
        certify(tuned, program)


def test_nothing_to_compare_with_is_said(tuned):
    for rows in [], [dict(instruction="Name 1. " * 200, context="", response="It is 1.")]:
        with pytest.raises(DollyError, match="no held-out response fits into max_length"):
            certify(tuned, Same(tuned[1]), rows)


def test_weights_that_fill_several_files_are_read_back(tmp_path):
    model = load_base(TINY)
    weights = dict(model.named_parameters())
    export.write_shards(((n, p.detach()) for n, p in weights.items()), tmp_path, most=60_000)
    model.config.save_pretrained(tmp_path)
    assert len([*tmp_path.glob("model-*-of-*.safetensors")]) > 2
    again = type(model).from_pretrained(tmp_path, dtype=torch.float32)
    for name, p in again.named_parameters():
        assert torch.equal(p, weights[name].cpu()), name


def test_files_of_others_stay_and_an_empty_folder_is_taken(run, tmp_path):
    (tmp_path / "mine").mkdir()
    folder = export.export_merged(TINY, run, tmp_path / "mine", log=quiet)
    assert export.is_export_of(folder, TINY, run)
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(DollyError, match="holds files that are no export of ours"):
        export.export_merged(TINY, run, folder, log=quiet)
    (folder / "thesis.txt").unlink()
    (folder / "model.safetensors").write_bytes(b"another")
    assert not export.is_export_of(folder, TINY, run)
    export.export_merged(TINY, run, folder, log=quiet)
    assert export.is_export_of(folder, TINY, run)


def test_a_full_disk_keeps_what_was_there(run, monkeypatch):
    folder = export.export_merged(TINY, run, log=quiet)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "save_file", full)
    with pytest.raises(DollyError, match="the disk is full: nothing was kept"):
        export.export_merged(TINY, run, log=quiet)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in folder.parent.glob("merged*")] == ["merged"]


@pytest.mark.parametrize("args", [["--to", "merged", "--dry-run"], ["--repo", "me/mine"],
                                  ["--to", "hub", "--repo", "mine", "--dry-run"]])
def test_options_that_do_not_go_together_are_refused_before_anything_is_made(run, call, args):
    done = call("export", "--run-dir", run, *args)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert not (run / "export/merged").exists()


def test_what_a_killed_export_left_is_removed_and_nothing_else(run):
    part = run / "export/merged.999999999.part"
    for left in part, run / "export/merged.old.part":
        left.mkdir(parents=True)
    export.export_merged(TINY, run, log=quiet)
    assert not part.exists() and (run / "export/merged.old.part").exists()


def test_a_certificate_without_digests_is_of_no_export_that_could_be_sent(run):
    folder = export.export_merged(TINY, run, log=quiet)
    said = json.loads((folder / "certificate.json").read_text())
    assert export.is_export_of(folder, TINY, run) and said.pop("files")
    (folder / "certificate.json").write_text(json.dumps(said))
    assert not export.is_export_of(folder, TINY, run)
