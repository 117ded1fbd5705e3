"""A judge behind an endpoint that misbehaves; what is paid for once is not paid for twice."""
import base64
import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from unittest.mock import patch

import httpx
import pytest
import torch

from conftest import ROOT
from dolly_lora import cli
from dolly_lora.alpaca import compare, score, second_is_better
from dolly_lora.config import PRESETS, DollyError
from dolly_lora.judge import (
    EndpointJudge, JudgeError, LocalJudge, Question, Reply, Scripted, ask, check_hub_weights,
    check_judge, choice_logprobs, fetch, judge_origin, make_judge)
from dolly_lora.models import load_base, load_tokenizer, tiny_model
from dolly_lora.mtbench import OWN_PROMPTS, grade, load_questions, rating, winner
from dolly_lora.mtbench import score as rate

try:
    from hypothesis import given, settings, strategies as st
except ImportError: st = None

# stand-ins under the official names
PROMPTS = {name.removeprefix("dolly-"): p for name, p in OWN_PROMPTS.items()}
TEMPLATE = (("user", "{instruction}\n\nm: {output_1}\n\nM: {output_2}"),)
TINY = PRESETS["tiny"]


def respond(handler, status, data):
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data)


def start(handler):
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    server.n, server.bad, server.answered, server.lock = 0, 0, [], threading.Lock()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def address(server): return f"http://127.0.0.1:{server.server_port}/v1"


class Stub(BaseHTTPRequestHandler):
    "Answers by what is asked; every fifth request goes wrong in one of four ways."
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        asked = body["messages"][-1]["content"]
        with self.server.lock:
            self.server.n += 1
            n = self.server.n
        if n % 5 == 0: return self.go_wrong(n // 5 % 4)
        if "refuse me" in asked: return respond(self, 400, b"too long")
        text = "Rating: [[7]]" if body["max_tokens"] > 1 else "M"
        if "garbled" in asked: text = "I would rather not say."
        choice = dict(message=dict(content=text))
        if body.get("logprobs") and "garbled" not in asked:
            odds = dict(M=-0.1, m=-2.3, x=-9.0)
            top = [dict(token=token, logprob=value) for token, value in odds.items()]
            choice["logprobs"] = dict(content=[dict(top_logprobs=top)])
        with self.server.lock: self.server.answered.append(asked)
        respond(self, 200, json.dumps(dict(choices=[choice])).encode())

    def go_wrong(self, how):
        if how == 0:
            time.sleep(1.5)
            return self.close_connection
        self.server.bad += 1
        garbage = b"<html>\xff garbage"
        respond(self, {1: 503, 2: 429, 3: 200}[how], garbage if how == 3 else b"busy")

    def log_message(self, *args): pass


class Says(BaseHTTPRequestHandler):
    "One fixed reply: status and body, in which KEY is what came in the header."
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.n += 1
        status, text = self.server.says
        respond(self, status, text.replace("KEY", self.headers.get("Authorization", "")).encode())

    def log_message(self, *args): pass


@pytest.fixture
def server(monkeypatch):
    server = start(Stub)
    monkeypatch.setenv("OPENAI_BASE_URL", address(server))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    yield server
    server.shutdown()


@pytest.fixture
def says(monkeypatch):
    server = start(Says)
    monkeypatch.setenv("OPENAI_BASE_URL", address(server))
    monkeypatch.setenv("OPENAI_API_KEY", "some-key-of-mine")
    yield server
    server.shutdown()


def judge(): return EndpointJudge("stub", workers=4, timeout=0.7, wait=0.01)


def quiet(line): pass


def free(text): return Question((("user", text),))


A_OR_B = Question((("user", "?"),), ("A", "B"))
SAYS_A = json.dumps(dict(choices=[dict(message=dict(content="A"))]))
SAYS_KEY = json.dumps(dict(choices=[dict(message=dict(content="A KEY"))]))
SAYS_NOTHING = json.dumps(dict(choices=[dict(message=dict(content=""))]))


def outputs(who, n=24):
    special = {3: " garbled", 5: " refuse me"}
    return [dict(dataset="test", instruction=f"Do task {i}{special.get(i, '')}.",
                 output=f"{who} did {i}", generator=who) for i in range(n)]


def answer_rows(questions, model, one, two):
    return [dict(question_id=q["question_id"], model_id=model,
                 choices=[dict(index=0, turns=[one(i), two(i)])]) for i, q in enumerate(questions)]


# Asked once, kept, and asked again only after an error

def test_the_run_ends_right_and_a_restart_asks_nothing(server, tmp_path):
    questions = load_questions("sample")
    answers = []
    for m in "ab":
        garbled = lambda i: " garbled" if i == 2 and m == "b" else ""
        answers += answer_rows(questions, m, lambda i: f"{m} one{garbled(i)}", lambda i: f"{m} two")
    replies = tmp_path / "replies.jsonl"
    def run():
        lines = []
        annotations = compare(judge(), outputs("one"), outputs("two"), replies, TEMPLATE,
                              lines.append)
        judgments = grade(judge(), questions, answers, replies, {}, PROMPTS, lines.append)
        return annotations, judgments, lines
    annotations, judgments, lines = run()
    assert server.bad > 3, "the stub should have misbehaved"
    result = score(annotations)
    assert result["n_total"] == 22 and "2 of 24 pairs" in " ".join(lines)
    assert result["win_rate"] == pytest.approx(50)  # always the second place: 50 after swapping
    scores = rate(judgments, questions)
    assert scores["a"] == dict(scores["a"], average=7, n_invalid=0, n_rows=16)
    assert scores["b"] == dict(scores["b"], average=7, n_invalid=2, n_rows=16)
    once = list(server.answered)
    assert len(set(once)) == len(once) == 2 * 23 + 32
    again = run()
    assert server.answered == once, "a question was paid for twice"
    assert again[:2] == (annotations, judgments)


JOB = """
import sys
sys.path.insert(0, "tests")
from test_judge import judge, outputs, TEMPLATE
from dolly_lora.alpaca import compare
compare(judge(), outputs("one", 60), outputs("two", 60), sys.argv[1], TEMPLATE)
"""


def test_killed_in_the_middle_loses_at_most_what_was_under_way(server, tmp_path):
    path = tmp_path / "replies.jsonl"
    p = subprocess.Popen([sys.executable, "-c", JOB, str(path)], cwd=ROOT,
                         env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL)
    end = time.time() + 60
    while time.time() < end and (not path.exists() or path.read_bytes().count(b"\n") < 30):
        time.sleep(0.002)
    p.send_signal(signal.SIGKILL)
    p.wait()
    kept = path.read_bytes().count(b"\n")
    assert 30 <= kept < 118, "it should have been killed in the middle"
    compare(judge(), outputs("one", 60), outputs("two", 60), path, TEMPLATE, quiet)
    # four workers, and a reply on its way to the file
    assert len(server.answered) - len(set(server.answered)) <= 4 + 1
    keys = {json.loads(line)["key"] for line in path.read_text().splitlines()}
    assert len(keys) == path.read_bytes().count(b"\n") == 118


def test_an_error_is_asked_again_and_an_answer_is_not(tmp_path):
    said = iter([Reply(error="HTTP 503"), Reply("A"), Reply("never")])
    texts = [ask(Scripted(lambda q: next(said)), [free("?")], tmp_path / "r.jsonl")[0].text
             for _ in range(3)]
    assert texts == ["", "A", "A"]


def test_the_same_name_at_another_address_is_asked_itself(server, tmp_path, monkeypatch):
    questions = [Question((("user", f"free {i}"),), max_tokens=9) for i in range(4)]
    other, path = start(Stub), tmp_path / "r.jsonl"
    with_login = address(other).replace("127", "user:pw-of-mine@127") + "/"
    for _ in 1, 2:
        for url in address(server), with_login:
            monkeypatch.setenv("OPENAI_BASE_URL", url)
            ask(judge(), questions, path)
        assert len(server.answered) == len(other.answered) == 4
    monkeypatch.setenv("OPENAI_BASE_URL", address(other))  # the login is not a part of it
    assert ask(judge(), questions, path)[0].text == "Rating: [[7]]" and len(other.answered) == 4
    other.shutdown()


def test_an_empty_reply_is_an_error_and_asked_again(tmp_path):
    said, path = iter([Reply(""), Reply("  \n"), Reply("", {}), Reply("A")]), tmp_path / "r.jsonl"
    replies = [ask(Scripted(lambda q: next(said)), [A_OR_B], path)[0] for _ in range(5)]
    assert [r.error for r in replies] == ["an empty reply"] * 3 + [""] * 2
    assert len(path.read_bytes().splitlines()) == 1


@pytest.mark.parametrize("old", [
    dict(text="", logprobs=None), dict(text=3), dict(text="A", logprobs={"A": "x"}),
    dict(text="A", logprobs=[1]), {}])
def test_a_row_of_an_older_cache_or_another_program_is_asked_again(tmp_path, old):
    path = tmp_path / "r.jsonl"
    ask(Scripted(lambda q: Reply("A")), [A_OR_B], path)
    row = json.loads(path.read_text())
    for name in "text", "logprobs": del row[name]
    path.write_text(json.dumps(row | old) + "\n")
    assert ask(Scripted(lambda q: Reply("B")), [A_OR_B], path)[0].text == "B"


def test_a_full_disk_while_a_download_is_kept(tmp_path, monkeypatch):
    url = "https://example.org/q.jsonl"
    page = httpx.Response(200, content=b"text", request=httpx.Request("GET", url))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(httpx, "get", lambda url, **how: page)
    with patch("os.replace", side_effect=OSError(28, "No space left on device")):
        with pytest.raises(DollyError, match="No space left on device"):
            fetch(url, hashlib.sha256(b"text").hexdigest())
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


# What a server can do

def test_nothing_that_answers_ends_in_one_line(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    gone = EndpointJudge("stub", tries=2, wait=0.001)
    with pytest.raises(JudgeError, match="does not answer.*run again"):
        list(gone([free(str(i)) for i in range(40)]))
    monkeypatch.setenv("OPENAI_BASE_URL", "https://api.openai.com/v1")
    with pytest.raises(JudgeError, match="OPENAI_API_KEY is not set"): EndpointJudge("gpt-4")


def test_a_refused_key_ends_in_one_line(says):
    says.says = 401, "bad key"
    with pytest.raises(JudgeError, match="401 for model stub"):
        list(EndpointJudge("stub")([free("hi")]))


def test_an_endpoint_s_empty_reply_is_asked_once_more_and_not_for_ever(says, tmp_path):
    says.says = 200, SAYS_NOTHING
    questions = [free(str(i)) for i in range(20)]
    replies = ask(EndpointJudge("stub", wait=0.001), questions, tmp_path / "r.jsonl")
    assert {r.error for r in replies} == {"an empty reply"} and says.n == 40
    assert not (tmp_path / "r.jsonl").exists()


def with_top(top):
    content = f'"content": [{{"top_logprobs": {top}}}]'
    return f'{{"choices": [{{"message": {{"content": "A"}}, "logprobs": {{{content}}}}}]}}'


@pytest.mark.parametrize("text", [
    '{"choices": []}', '{"choices": [{"message": {"content": {}}}]}', "[" * 100_000,
    with_top('[{"token": "A", "logprob": %s}]' % ("9" * 400)), with_top("[7]")],
    ids=["no choice", "no text", "deep", "beyond a float", "no object"])
def test_a_malformed_reply_is_an_error_of_its_own(says, text, tmp_path):
    says.says = 200, text
    reply, = ask(EndpointJudge("stub", tries=2, wait=0.001), [A_OR_B], tmp_path / "r.jsonl")
    assert reply.error and says.n == 2


def test_half_a_character_in_a_reply_is_kept(says, tmp_path):
    half = "half \\ud83d and \\u2028 [[7]]"
    says.says = 200, '{"choices": [{"message": {"content": "%s"}}]}' % half
    for _ in 1, 2: reply, = ask(EndpointJudge("stub"), [free("?")], tmp_path / "r.jsonl")
    assert reply.text == "half \ud83d and \u2028 [[7]]" and says.n == 1


def bodies():
    "What a server could send: noise, any JSON, and nearly right replies."
    names = "choices", "message", "content", "logprobs", "top_logprobs", "token", "logprob"
    scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
    keys = st.sampled_from(names) | st.text()
    value = st.recursive(scalars, lambda v: st.lists(v, max_size=3)
                         | st.dictionaries(keys, v, max_size=4), max_leaves=12)
    def nearly(message, **more):
        return json.dumps(dict(choices=[dict(message=dict(content=message), **more)])).encode()
    odd_odds = value.map(lambda v: nearly("A", logprobs=dict(content=[dict(top_logprobs=v)])))
    any_json = value.map(lambda v: json.dumps(v).encode())
    return st.binary() | any_json | odd_odds | st.text().map(nearly)


@pytest.mark.skipif(st is None, reason="hypothesis is not installed")
def test_any_reply_of_a_server_is_a_reply_or_an_error_and_any_reply_is_a_verdict_or_none():
    status = st.sampled_from([200, 400, 401, 404, 429, 500])
    tokens = st.sampled_from(["A", "B", "1", "7", "10", "x"])
    odds = st.dictionaries(tokens, st.floats(), max_size=4) | st.none()
    texts = st.text() | st.from_regex(r"\[\[\d+\.?\d*\]\]")
    @settings(max_examples=300, deadline=None)
    @given(status, bodies(), odds, texts)
    def is_read(status, data, logprobs, text):
        stub = EndpointJudge.__new__(EndpointJudge)
        stub.name, stub.url, stub.served = "stub", "http://host/v1", False
        answer = httpx.MockTransport(lambda request: httpx.Response(status, content=data))
        stub.client = httpx.Client(transport=answer)
        reply, _ = stub.post(A_OR_B)
        assert bool(reply.error) != bool(reply.text.strip() or reply.logprobs)
        for reply in reply, Reply(text, logprobs):
            p, value = second_is_better(reply, ("A", "B")), rating(reply)
            assert p is None or 0 <= p <= 1
            assert value == -1 or 1 <= value <= 10 + 1e-9
            assert winner(reply) in ("A", "B", "tie", "error")
    is_read()


# Secrets

KEY, PASSWORD = "sk-planted-0123456789abcdef", "pass-word-of-mine-77"
BASIC = base64.b64encode(f"me:{PASSWORD}".encode()).decode()
FAULTS = ["401", "500", "200 garbage", "refused", "cut off", "nothing there", "no address",
          "illegal key", "inner space", "not ascii"]
KEYS = {"illegal key": KEY + "\x01\r", "inner space": f"{KEY} {KEY}", "not ascii": KEY + "é"}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_key_and_password_are_nowhere(says, tmp_path, monkeypatch, capfd, caplog, fault):
    """Echoed in every way a server can; every file and line that came out is searched."""
    caplog.set_level("DEBUG")
    monkeypatch.setenv("OPENAI_API_KEY", KEYS.get(fault, KEY + "\r\n "))
    host = "127.0.0.1:9" if fault == "nothing there" else f"127.0.0.1:{says.server_port}"
    status = {"401": 401, "500": 500, "refused": 400, "cut off": 401}.get(fault, 200)
    padding = "y" * (105 if fault == "cut off" else 1)  # "cut off": where a long message is
    questions, seen = load_questions("sample"), ""
    answers = answer_rows(questions, "m", lambda i: "a", lambda i: "b")
    def grade_all():
        stub = EndpointJudge("stub", tries=2, wait=0.001)
        print(*grade(stub, questions, answers, tmp_path / "replies.jsonl", {}, PROMPTS))
    for url, secrets in ((f"http://{host}/v1", KEY),
                         (f"http://me:{PASSWORD}@{host}/v1", f"{KEY} {PASSWORD} {BASIC}")):
        says.says = status, padding + f" {secrets} KEY" * 3
        monkeypatch.setenv("OPENAI_BASE_URL", f"{url}?key={KEY}" if fault == "no address" else url)
        for act in (lambda: check("stub")), grade_all:
            try: act()
            except DollyError as e:
                print(e)
                seen += repr(e) + "".join(e._render_traceback_())
                assert "\n" not in str(e)
    out = capfd.readouterr()
    files = "".join(p.read_text() for p in tmp_path.rglob("*") if p.is_file())
    seen += out.out + out.err + caplog.text + files
    assert len(seen) > 100
    assert not [s for s in (KEY, KEY[:12], PASSWORD, BASIC) if s in seen], seen


def test_a_key_with_a_newline_works_and_one_that_cannot_be_sent_is_refused(says, monkeypatch):
    says.says = 200, SAYS_KEY
    for key in "plain-key", "plain-key\r\n", " plain-key\t\n":
        monkeypatch.setenv("OPENAI_API_KEY", key)
        assert dict(EndpointJudge("stub")([free("?")]))[0].text == "A Bearer plain-key"
    for key in "plain key", "plain\nkey", "plain\x7fkey", "pläin":
        monkeypatch.setenv("OPENAI_API_KEY", key)
        with pytest.raises(JudgeError, match="copy it again") as e: EndpointJudge("stub")
        assert "plain" not in str(e.value) and "\n" not in str(e.value)


def test_a_login_in_the_address_is_sent_and_not_shown(says, monkeypatch):
    says.says = 200, SAYS_KEY
    monkeypatch.delenv("OPENAI_API_KEY")
    monkeypatch.setenv("OPENAI_BASE_URL", address(says).replace("127", "me:p%40ss@127") + "/")
    stub = EndpointJudge("stub")
    assert stub.origin == dict(endpoint=stub.url) == dict(endpoint=address(says))
    sent = base64.b64encode(b"me:p@ss").decode()
    assert dict(stub([free("?")]))[0].text == f"A Basic {sent}"


@pytest.mark.parametrize("url", [
    "localhost:8000", "ftp://host/v1", "http://", "http://host:port/v1", "http://[::1/v1",
    "https://host/v1?key=secret", "just words", "http://ho st/v1", "http://host/v 1",
    "https://host/v1#x"])
def test_an_address_that_is_none_gives_one_line(url, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    monkeypatch.setenv("OPENAI_API_KEY", "some-key")
    with pytest.raises(JudgeError, match="^OPENAI_BASE_URL is not the address") as e:
        EndpointJudge("stub")
    assert "secret" not in str(e.value) and "\n" not in str(e.value)


# Before the work begins

def check(name): return check_judge(replace(TINY, judge=name))


def refused(name, why):
    with pytest.raises(DollyError, match=why) as e: check(name)
    assert "\n" not in str(e.value)


def test_a_refused_key_or_a_silent_endpoint_is_found_before_the_work(says, monkeypatch):
    says.says = 200, SAYS_A
    check("stub")
    assert says.n == 1
    for told, why in (((401, "no"), "says 401 for model stub"), ((404, "what?"), "says 404"),
                      ((400, "no logprobs here"), "no logprobs here"),
                      ((200, "<html>"), "gives no verdict"),
                      ((200, SAYS_NOTHING), "an empty reply")):
        says.says = told
        refused("stub", why)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    refused("stub", "gives no verdict with model stub .ConnectError")


@pytest.fixture
def local(tmp_path):
    folder = tmp_path / "judge"
    load_base(TINY).cpu().save_pretrained(folder)
    load_tokenizer(TINY).save_pretrained(folder)
    return folder


def test_a_local_folder_that_is_not_whole_is_found_before_the_work(local):
    weights, index = local / "model.safetensors", local / "model.safetensors.index.json"
    check(f"local:{local}")
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-9])
    refused(f"local:{local}", "cannot judge")
    weights.unlink()
    refused(f"local:{local}", "no .safetensors file")
    index.write_text('{"weight_map": {"x": "model-1.safetensors"}}')
    refused(f"local:{local}", "cannot judge")
    index.unlink()
    weights.write_bytes(whole)
    for path in local.glob("tokenizer*"): path.unlink()
    refused(f"local:{local}", "no tokenizer")
    (local / "config.json").unlink()
    refused(f"local:{local}", "no config.json")
    shutil.rmtree(local)
    refused(f"local:{local}", "no base model at")


def test_a_local_tokenizer_that_cannot_be_used_is_found_before_the_work(local):
    """Issue 10: it was only looked whether there is a file of that name."""
    whole = (local / "tokenizer.json").read_bytes()
    (local / "tokenizer.json").write_bytes(whole[:len(whole) // 2])
    refused(f"local:{local}", "the tokenizer of .* cannot be read")
    (local / "tokenizer.json").write_bytes(whole)
    settings = json.loads((local / "tokenizer_config.json").read_text())
    settings.pop("eos_token")
    (local / "tokenizer_config.json").write_text(json.dumps(settings))
    (local / "special_tokens_map.json").unlink(missing_ok=True)
    refused(f"local:{local}", "its tokenizer has no end token")


@pytest.mark.parametrize("config", [
    '{"model_type": "no-such-model"}', '{"model_type": "vit"}', "[1]", '{"model_type": '])
def test_a_config_of_no_causal_language_model_is_found_before_the_work(local, config):
    (local / "config.json").write_text(config)
    refused(f"local:{local}", "the config of .* cannot be read")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU for random-7b")
def test_a_judge_that_wants_a_gpu_is_found_before_the_work():
    refused("local:random-7b", "random-qwen3-8b want a GPU")


HUB = """
import sys
from dataclasses import replace
from dolly_lora.config import PRESETS, DollyError
from dolly_lora.judge import check_judge
for name in sys.argv[1:]:
    try: check_judge(replace(PRESETS["tiny"], judge=f"local:{name}"))
    except DollyError as e: print(f"{name}: {e}")
    else: print(f"{name}: good")
"""


def test_a_hub_model_downloaded_in_part_is_found_before_the_work(local, tmp_path):
    """Without a network, what was downloaded before decides; config.json alone is not enough."""
    for name in "whole", "config", "torn":
        folder = tmp_path / "hub" / f"models--owner--{name}"
        snapshot = folder / "snapshots" / ("a" * 40)
        shutil.copytree(local, snapshot)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("a" * 40)
        if name == "config": (snapshot / "model.safetensors").unlink()
        if name == "torn": os.truncate(snapshot / "model.safetensors", 1000)
    env = os.environ | dict(HF_HUB_CACHE=str(tmp_path / "hub"), HF_HUB_OFFLINE="1",
                            PYTHONPATH=str(ROOT))
    names = "owner/whole", "owner/config", "owner/torn", "owner/never"
    done = subprocess.run([sys.executable, "-c", HUB, *names], cwd=ROOT, env=env,
                          capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == 4, done.stderr[-2000:]
    assert lines[0] == "owner/whole: good"
    assert lines[1].startswith("owner/config: owner/config cannot judge (it has no .safetensors")
    assert lines[2].startswith("owner/torn: owner/torn cannot judge (")
    assert "cannot reach the hub for owner/never" in lines[3]


def test_a_hub_model_of_pickles_is_found_before_the_work():
    from huggingface_hub.errors import NotASafetensorsRepoError
    pickles = NotASafetensorsRepoError("'owner/name' is not a safetensors repo.\nMore on this")
    with patch("huggingface_hub.get_safetensors_metadata", side_effect=pickles):
        with pytest.raises(JudgeError, match="owner/name cannot judge") as e:
            check_hub_weights(replace(TINY, base="owner/name"))
    assert "\n" not in str(e.value)


# A judge of our own

def test_a_local_judge_is_known_by_its_contents(local, tmp_path):
    recipe, path = replace(TINY, judge=f"local:{local}"), tmp_path / "r.jsonl"
    before = make_judge(recipe)
    first, = ask(before, [A_OR_B], path)
    assert before.origin == judge_origin(recipe) and len(before.origin["weights"]) == 64
    tiny_model(seed=1).save_pretrained(local)  # another model under the same name
    again = make_judge(recipe)
    second, = ask(again, [A_OR_B], path)
    assert again.name == before.name and again.origin != before.origin
    assert second.logprobs != first.logprobs
    assert make_judge(TINY).origin == dict(weights="tiny")


def test_local_judge_s_odds_are_the_model_s_own():
    model, tokenizer = load_base(TINY), load_tokenizer(TINY)
    ratings = tuple(map(str, range(1, 11)))
    rate_it = Question((("user", "Rate this answer."),), ratings, "Rating: [[")
    which = Question((("user", "Which is better, A: hello, or B: good day?"),), ("A", "B"))
    together = LocalJudge(model, tokenizer, "tiny")
    both = [r.logprobs for _, r in sorted(dict(together([rate_it, which])).items())]
    single = LocalJudge(model, tokenizer, "tiny", tokens=1)  # a forward pass for each context
    for q, odds in zip((rate_it, which), both):
        assert dict(single([q]))[0].logprobs == pytest.approx(odds, abs=1e-4)
    ids = torch.tensor([together.prompt_ids(which)], device=model.device)
    with torch.inference_mode(): plain = model(ids).logits[0, -1].log_softmax(-1)
    (a,), _ = together.choice_ids(which)
    assert both[1]["A"] == pytest.approx(float(plain[a]), abs=1e-4)
    too_long = Question((("user", "word " * 3000),), ("A", "B"))
    assert "reads" in dict(together([too_long]))[0].error


def test_a_choice_that_goes_on_to_a_longer_one_gets_only_the_rest():
    after = {(): torch.tensor([-9.0, -0.5]), (1,): torch.tensor([0.25, 0.75]).log()}
    two = choice_logprobs((), ("1", "10"), [(1,), (1, 0)], after)
    assert torch.tensor(list(two.values())).exp().sum() == pytest.approx(math.exp(-0.5), abs=1e-6)


# The command

def test_judge_command(server, tiny_run, tmp_path, capsys, monkeypatch):
    run = shutil.copytree(tiny_run[0], tmp_path / "run")
    here = ["judge", "--run-dir", str(run)]
    assert cli.main([*here, "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("local tiny: 0 calls")  # all was asked in the run
    monkeypatch.setattr("dolly_lora.alpaca.judge_prompt", lambda: TEMPLATE)
    monkeypatch.setattr("dolly_lora.mtbench.load_prompts", lambda: PROMPTS)
    assert cli.main([*here, "--judge", "stub", "--dry-run"]) == 0
    assert "no price known" in capsys.readouterr().out and not server.n
    assert cli.main([*here, "--judge", "stub"]) == 0
    judgments = json.loads((run / "metrics.json").read_text())["judgments"]
    assert set(judgments) == {"local tiny", "stub"}
    assert judgments["stub"]["official"] == dict(alpaca=False, mt_bench=False)
    rates = judgments["stub"]["alpaca"]["tuned against base"]
    assert rates["win_rate"] == pytest.approx(50)
    graded = run / "judgments/mt_bench/model_judgment/stub_single.jsonl"
    assert len(graded.read_text().splitlines()) == 32
