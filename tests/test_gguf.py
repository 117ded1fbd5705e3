"""A run as GGUF: llama.cpp loads it, reads prompts as we do, predicts and answers the same."""
import contextlib
import json
import shutil
from dataclasses import replace
from unittest.mock import patch

import httpx
import numpy as np
import pytest
import torch
from gguf import GGUFReader
from toys import adapted
from transformers import (
    AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralConfig,
    MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM)

from dolly_lora import gguf_files
from dolly_lora.cli import main
from dolly_lora.config import PRESETS, DollyError
from dolly_lora.data import build_prompt, load_dolly, with_template

from dolly_lora.generate import generate
from dolly_lora.gguf_files import export_gguf, export_gguf_adapter, split_rule, write_gguf
from dolly_lora.llamacpp import GGUFChat, LlamaCpp
from dolly_lora.models import load_base, load_tokenizer, load_tuned, tiny_tokenizer

TINY = PRESETS["tiny"]
SHAPE = dict(vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512)
LLAMA3 = dict(rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0,
              high_freq_factor=4.0, original_max_position_embeddings=64)
BASES = {
    "llama": lambda **s: LlamaForCausalLM(LlamaConfig(**s)),
    "tied": lambda **s: LlamaForCausalLM(LlamaConfig(**s, tie_word_embeddings=True)),
    "llama3": lambda **s: LlamaForCausalLM(LlamaConfig(**s, rope_parameters=LLAMA3)),
    "mistral": lambda **s: MistralForCausalLM(MistralConfig(**s, sliding_window=None)),
    "qwen2": lambda **s: Qwen2ForCausalLM(Qwen2Config(**s)),
    "qwen3": lambda **s: Qwen3ForCausalLM(Qwen3Config(**s, head_dim=32)),
}


QUESTIONS = ["Name a prime.", "  Two\n\nlines \t of 1234567 things", "naïve Ω 漢字 🙂 don't",
             "def f(x):\n    return x  # 3.14", "[INST] <|im_end|> </", "a"]


def quiet(line): pass


def random_base(name, **other):
    """A small base whose biases and norms are no zeros and ones."""
    torch.manual_seed(0)
    model = BASES[name](**SHAPE | other).eval()
    for p in model.parameters():
        if p.dim() == 1:
            p.data += 0.1 * torch.randn_like(p)
        else:
            p.data.normal_(0, 0.1)
    return model


@pytest.mark.parametrize("name", BASES)
def test_llamacpp_predicts_what_the_model_predicts(name, tmp_path):
    model, tokenizer = adapted(random_base(name)).eval(), with_template(tiny_tokenizer())
    write_gguf(model, tokenizer, tmp_path / "m.gguf", "f16", name)
    ids = [5 + i * 37 % 500 for i in range(100)]
    with torch.inference_mode():
        ours = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    with LlamaCpp(tmp_path / "m.gguf", capacity=256) as program:
        places = range(0, 100, 9)
        theirs = program.log_probs(ids, places, ours[places])
    assert ours.std() > 0.3  # the model has opinions
    torch.testing.assert_close(theirs, ours[places], rtol=0, atol=0.02)


@pytest.fixture(scope="module")
def llama2_tokenizer(shared, tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama2")
    shutil.copy(shared / "llama2-tokenizer.model", folder / "tokenizer.model")
    (folder / "tokenizer_config.json").write_text(json.dumps(dict(
        tokenizer_class="LlamaTokenizer", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        add_bos_token=True, add_eos_token=False)))
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    LlamaForCausalLM(LlamaConfig(**SHAPE | dict(vocab_size=32000))).save_pretrained(folder)
    return replace(TINY, base=str(folder))


@pytest.mark.parametrize("which", ["tiny", "smollm2", "llama2"])
def test_llamacpp_reads_prompts_as_our_tokenizer_does(which, tmp_path, request):
    recipe = replace(TINY, base=which)
    if which == "llama2":
        recipe = request.getfixturevalue("llama2_tokenizer")
    model, tokenizer = load_base(recipe), load_tokenizer(recipe)
    write_gguf(model, with_template(tokenizer), tmp_path / "m.gguf", "q8_0", which)
    with LlamaCpp(tmp_path / "m.gguf", capacity=256) as program:
        for question in QUESTIONS:
            messages = [dict(role="user", content=question)]
            assert program.token_ids(messages) == tokenizer(build_prompt(question)).input_ids


def test_a_run_goes_to_llamacpp_and_answers_there(tiny_run, tmp_path, call):
    run = shutil.copytree(tiny_run[0], tmp_path / "run")
    done = call("export", "--run-dir", run, "--to", "gguf", "--outtype", "f16")
    assert done.returncode == 0, done.stderr
    folder = run / "export/gguf-f16"
    file, said = folder / "run-f16.gguf", json.loads((folder / "certificate.json").read_text())
    assert done.stdout.splitlines()[-1].endswith("run-f16.gguf")
    assert said["loaded_by"].startswith("llama.cpp") and said["tokens"] >= 500
    assert 0 <= said["kl"]["mean"] < 1e-3 and said["kl"]["p99"] < 1e-2
    assert abs(said["loss"]["export"] - said["loss"]["training_model"]) < 1e-3
    assert f"FROM ./{file.name}\n" in (folder / "Modelfile").read_text()
    assert file.name in (folder / "README.md").read_text()
    # the OpenAI route, over HTTP, as any client would use it
    model, tokenizer = load_tuned(TINY, run).float(), load_tokenizer(TINY)
    ours, = generate(model, tokenizer, [build_prompt("Name a prime.")], max_new_tokens=8)
    asked = dict(messages=[dict(role="user", content="Name a prime.")], max_tokens=8,
                 temperature=0)
    with LlamaCpp(file, capacity=256) as program:
        said = httpx.post(f"{program.web.base_url}/v1/chat/completions", json=asked).json()
    assert said["choices"][0]["message"]["content"].strip() == ours.text
    with contextlib.closing(GGUFReader(file).data._mmap):
        assert GGUFReader(file).fields["tokenizer.ggml.eos_token_id"].contents() == 2


def test_smollm2_answers_the_same_in_llamacpp(tmp_path):
    recipe = replace(TINY, base="smollm2")
    model, tokenizer = load_base(recipe).float(), load_tokenizer(recipe)
    model = adapted(model, recipe).eval()
    write_gguf(model, with_template(tokenizer), tmp_path / "m.gguf", "f16", "smollm2")
    questions = ["Name a prime number.", "What do bees make?", "Why is the sky blue?",
                 "How many legs has a spider?"]
    ours = generate(model, tokenizer, [build_prompt(q) for q in questions], max_new_tokens=16)
    with LlamaCpp(tmp_path / "m.gguf", capacity=256) as program:
        theirs = [program.answer([dict(role="user", content=q)], 16) for q in questions]
    assert len({a.text for a in ours}) > 2
    same = sum(answer.text == text for answer, text in zip(ours, theirs))
    assert same >= 3, (theirs, ours)  # two tokens can be equally likely


def test_the_adapter_alone_on_its_base(tiny_run, tmp_path):
    run = shutil.copytree(tiny_run[0], tmp_path / "run")
    file = export_gguf_adapter(TINY, run, log=quiet)
    said = json.loads((file.parent / "certificate.json").read_text())
    assert said["kl"]["mean"] < 1e-3 and said["greedy"]["prompts"] > 5
    assert sorted(p.name for p in file.parent.iterdir()) == [
        "Modelfile", "README.md", "certificate.json", "chat_template.jinja", "run-adapter.gguf"]
    assert f"ADAPTER ./{file.name}" in (file.parent / "Modelfile").read_text()


def test_rotary_pairs_of_another_order_are_found_out(tiny_run, tmp_path, monkeypatch):
    run = shutil.copytree(tiny_run[0], tmp_path / "run")
    # random weights say nothing about positions: these do
    base = random_base("llama", intermediate_size=128, max_position_embeddings=2048)
    base.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    recipe = replace(TINY, base=str(tmp_path / "base"))
    export_gguf(recipe, run, "f16", log=quiet)
    before = (run / "export/gguf-f16/certificate.json").read_text()
    monkeypatch.setattr(gguf_files, "for_llamacpp", lambda name, weight, config: weight)
    with pytest.raises(DollyError, match="is another model: KL .*nothing was kept") as error:
        export_gguf(recipe, run, "f16", log=quiet)
    assert "\n" not in str(error.value)
    assert {p.name for p in (run / "export").iterdir()} <= {"gguf-f16", "gguf-q8_0"}
    assert (run / "export/gguf-f16/certificate.json").read_text() == before


def test_a_prompt_read_otherwise_is_found_out(tiny_run, tmp_path, monkeypatch):
    run = shutil.copytree(tiny_run[0], tmp_path / "run")
    real = gguf_files.with_template

    def wrong(tokenizer, template):
        out = real(tokenizer, template)
        out.chat_template = out.chat_template.replace("Response", "Answer")
        return out

    monkeypatch.setattr(gguf_files, "with_template", wrong)
    with pytest.raises(DollyError, match="makes other tokens of the prompt .*nothing was kept"):
        export_gguf(TINY, run, log=quiet)


SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+"
         r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")  # as Qwen2 and Llama 3 publish it


@pytest.mark.parametrize("digits, name", [("", "qwen2"), ("{1,3}", "llama-bpe")])
def test_the_word_rules_of_qwen_and_llama3_are_llamacpps(digits, name, tmp_path):
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    texts = [row["response"] for row in load_dolly("sample")] + ["1234 12 99 don't WE'LL \n\n x"]
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT % digits), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    inner.decoder = decoders.ByteLevel()
    inner.train_from_iterator(texts * 3, trainers.BpeTrainer(
        vocab_size=2000, special_tokens=["<end>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>",
                                        pad_token="<pad>")
    assert split_rule(json.loads(inner.to_str())) == name
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE | dict(vocab_size=2048)))
    write_gguf(model, with_template(tokenizer), tmp_path / "m.gguf", "f16", name)
    with LlamaCpp(tmp_path / "m.gguf", capacity=256) as program:
        for question in [*QUESTIONS, "WE'LL pay 1234567 or 12 of 99\r\n\n\t  now"]:
            messages = [dict(role="user", content=question)]
            assert program.token_ids(messages) == tokenizer(build_prompt(question)).input_ids


def test_what_has_no_gguf_here_is_refused_in_a_line(tmp_path):
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=512))
    with pytest.raises(DollyError, match="a gpt2 is not known here: convert the merged model"):
        gguf_files.open_gguf(tmp_path / "m.gguf", model.config)
    level = dict(type="ByteLevel")
    for steps in ([dict(type="Split", pattern=dict(Regex=r"\p{L}+|\p{N}| ?")), level],
                  [dict(type="Split", pattern=dict(String=" ")),
                   dict(type="Digits", individual_digits=True), level]):
        with pytest.raises(DollyError, match="convert_hf_to_gguf"):
            split_rule(dict(pre_tokenizer=dict(type="Sequence", pretokenizers=steps)))
    model = LlamaForCausalLM(LlamaConfig(**SHAPE | dict(vocab_size=256)))
    with pytest.raises(DollyError, match="the tokenizer has 512 tokens, the model 256"):
        write_gguf(model, with_template(tiny_tokenizer()), tmp_path / "m.gguf", "f16", "small")
    yarn = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=64)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, rope_parameters=yarn))
    with pytest.raises(DollyError, match="rope scales the attention"):
        gguf_files.rope_factors(model)


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    write_gguf(load_base(TINY), with_template(load_tokenizer(TINY)), path, "f16", "tiny")
    return path


def test_a_conversation_in_the_terminal(tiny_gguf, monkeypatch, capsys, tmp_path):
    lines = iter(["Name a prime.", "/tuned", "/regen", f"/save {tmp_path}/talk.jsonl", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert main(["chat", "--gguf", str(tiny_gguf)]) == 0
    out = capsys.readouterr().out
    assert "in llama.cpp (xllamacpp" in out and out.count("(model: ") == 2
    assert "only the model can answer" in out
    row, = map(json.loads, (tmp_path / "talk.jsonl").read_text().splitlines())
    assert row["question"] == "Name a prime." and row["model"] == str(tiny_gguf)


def test_the_conversation_sends_its_history_and_leaves_out_what_does_not_fit(tiny_gguf):
    with LlamaCpp(tiny_gguf, capacity=256) as program:
        talk = GGUFChat(program, max_new_tokens=8, system="Be brief.")
        talk.ask("Name a prime.")
        prompt, cut = talk._prompt([("Name a prime.", "Seven.")], "Another?")
        assert cut == 0 and prompt == ("### Instruction:\nBe brief.\n\nName a prime.\n\n"
                                       "### Response:\nSeven.</s>\n\n"
                                       "### Instruction:\nAnother?\n\n### Response:\n")
        _, cut = talk._prompt([("Name 9 " * 90, "b"), ("c", "d")], "Another?")
        assert cut == 1
        with pytest.raises(DollyError, match="has .* tokens, 248 fit: shorten it"):
            talk.ask("Name 9 " * 90)
        assert len(talk.history) == 1 and 1 <= len(talk.last.ids) <= 8


def test_stop_ends_an_answer_and_keeps_it(tiny_gguf):
    with LlamaCpp(tiny_gguf, capacity=512) as program:
        talk = GGUFChat(program, max_new_tokens=400)
        for n, _ in enumerate(talk.stream("Tell me a story.")):
            if n == 5:
                talk.stop()
        assert talk.last.stopped and 0 < len(talk.last.ids) < 400
        assert "stopped" in talk.last.note


def test_a_file_that_is_no_gguf_is_refused_in_a_line(tmp_path, call):
    done = call("chat", "--gguf", tmp_path / "none.gguf")
    assert done.returncode == 2 and "no file at" in done.stderr
    (tmp_path / "bad.gguf").write_bytes(b"PK\x03\x04 something else")
    done = call("chat", "--gguf", tmp_path / "bad.gguf")
    assert done.returncode == 2 and "is no GGUF file: make one with" in done.stderr
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    done = call("chat", "--gguf", tmp_path / "cut.gguf")
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "llama.cpp cannot load" in done.stderr


def test_a_model_that_takes_less_than_asked_for_has_less_room(tmp_path):
    model = LlamaForCausalLM(LlamaConfig(**SHAPE | dict(max_position_embeddings=256)))
    write_gguf(model, with_template(tiny_tokenizer()), tmp_path / "m.gguf", "f16", "short")
    with LlamaCpp(tmp_path / "m.gguf") as program:
        assert program.capacity == 256
        talk = GGUFChat(program, max_new_tokens=8)
        _, cut = talk._prompt([("Name 9 " * 90, "b")], "Another?")
        assert cut == 1 and talk.ask("Name a prime.") is not None


@pytest.mark.parametrize("args", [["--batch", "p.txt"], ["--base", "tiny"], ["--no-lora"]])
def test_what_gguf_does_not_go_with_is_refused(tiny_gguf, call, args):
    done = call("chat", "--gguf", tiny_gguf, *args)
    assert done.returncode == 2 and "--gguf is for a conversation" in done.stderr


def test_line_breaks_of_other_kinds_arrive_in_an_answer(tiny_gguf, monkeypatch):
    sent = b'data: {"content":"a\xe2\x80\xa8b","tokens":[1],"stop":false}\n\n'
    end = b'data: {"content":"","tokens":[],"stop":true}\n\n'
    with LlamaCpp(tiny_gguf, capacity=64) as program:
        reply = httpx.Response(200, content=iter([sent[:20], sent[20:], end]))
        monkeypatch.setattr(program.web, "stream", lambda *a, **k: contextlib.nullcontext(reply))
        assert [piece["content"] for piece in program.stream("x")] == ["a\u2028b", ""]


def test_llamacpp_that_is_not_installed_is_missed_first(tiny_run, tmp_path, call):
    run = shutil.copytree(tiny_run[0], tmp_path / "run")
    shutil.rmtree(run / "export", ignore_errors=True)
    with patch("importlib.util.find_spec", lambda name: None):
        for way in "gguf", "gguf-adapter":
            done = call("export", "--run-dir", run, "--to", way)
            assert done.returncode == 2 and "pip install xllamacpp" in done.stderr
    assert not (run / "export").exists()


def test_probabilities_of_all_tokens_sum_to_one(tiny_gguf):
    with LlamaCpp(tiny_gguf, capacity=64) as program:
        top = program.likeliest([5, 6, 7], 512)
        some = program.likeliest([5, 6, 7], 20)
    assert len(top) == 512 and np.isclose(sum(np.exp(list(top.values()))), 1, atol=1e-3)
    assert list(some) == list(top)[:20]


def test_a_proxy_of_the_environment_does_not_stand_between(tiny_gguf, monkeypatch):
    for name in "http_proxy", "HTTP_PROXY", "ALL_PROXY":
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # where nobody answers
    with LlamaCpp(tiny_gguf, capacity=64) as program:
        assert program.token_ids([dict(role="user", content="Hi")])
