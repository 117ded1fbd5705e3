"""A judge behind an endpoint that misbehaves; what is paid for once is not paid for twice."""
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

import pytest
import torch

from conftest import ROOT
from dolly_lora import cli, judge as judge_module
from dolly_lora.alpaca import compare, score
from dolly_lora.config import PRESETS, DollyError
from dolly_lora.judge import EndpointJudge, JudgeError, LocalJudge, Question, Reply, Scripted, ask, check_judge, judge_origin, make_judge
from dolly_lora.models import load_base, load_tokenizer, tiny_model

try:
    from hypothesis import given, settings, strategies as st
except ImportError: st = None
from dolly_lora.mtbench import OWN_PROMPTS, grade, load_questions
from dolly_lora.mtbench import score as rate

PROMPTS = {name.removeprefix("dolly-"): p for name, p in OWN_PROMPTS.items()}  # stand-ins under the official names
TEMPLATE = (("user", "{instruction}\n\nm: {output_1}\n\nM: {output_2}"),)


class Stub(BaseHTTPRequestHandler):
    "Answers by what is asked; every fifth request goes wrong in one of four ways."
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        asked = body["messages"][-1]["content"]
        with self.server.lock: self.server.n += 1; n = self.server.n
        if n % 5 == 0:
            bad = n // 5 % 4
            if bad == 0: time.sleep(1.5); return self.close_connection
            self.server.bad += 1
            return self.say({1: 503, 2: 429, 3: 200}[bad], b"<html>\xff garbage" if bad == 3 else b"busy")
        if "refuse me" in asked: return self.say(400, b"too long")
        text = "I would rather not say." if "garbled" in asked else ("Rating: [[7]]" if body["max_tokens"] > 1 else "M")
        choice = dict(message=dict(content=text))
        if body.get("logprobs") and "garbled" not in asked: choice["logprobs"] = dict(content=[dict(top_logprobs=[dict(token="M", logprob=-0.1), dict(token="m", logprob=-2.3), dict(token="x", logprob=-9.0)])])
        with self.server.lock: self.server.answered.append(asked)
        self.say(200, json.dumps(dict(choices=[choice])).encode())

    def say(self, status, data):
        self.send_response(status); self.send_header("Content-Length", str(len(data))); self.end_headers(); self.wfile.write(data)

    def log_message(self, *args): pass


@pytest.fixture
def server(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Stub); server.daemon_threads = True
    server.n, server.bad, server.answered, server.lock = 0, 0, [], threading.Lock()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.server_port}/v1"); monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    yield server
    server.shutdown()


def judge(): return EndpointJudge("stub", workers=4, timeout=0.7, wait=0.01)


def outputs(who, n=24): return [dict(dataset="test", instruction=f"Do task {i}{' garbled' if i == 3 else ''}{' refuse me' if i == 5 else ''}.", output=f"{who} did {i}", generator=who) for i in range(n)]


def test_the_run_ends_right_and_a_restart_asks_nothing(server, tmp_path):
    questions = load_questions("sample")
    answers = [dict(question_id=q["question_id"], model_id=m, choices=[dict(index=0, turns=[f"{m} one{' garbled' if i == 2 and m == 'b' else ''}", f"{m} two"])]) for m in "ab" for i, q in enumerate(questions)]
    def run():
        lines = []
        annotations = compare(judge(), outputs("one"), outputs("two"), tmp_path / "replies.jsonl", TEMPLATE, lines.append)
        return annotations, grade(judge(), questions, answers, tmp_path / "replies.jsonl", {}, PROMPTS, lines.append), lines
    annotations, judgments, lines = run()
    assert server.bad > 3, "the stub should have misbehaved"
    result = score(annotations)
    assert result["n_total"] == 22 and result["win_rate"] == pytest.approx(50) and "2 of 24 pairs" in " ".join(lines)  # always the second place: 50 after swapping
    scores = rate(judgments, questions)
    assert scores["a"] == dict(scores["a"], average=7, n_invalid=0, n_rows=16) and scores["b"] == dict(scores["b"], average=7, n_invalid=2, n_rows=16)
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
    p = subprocess.Popen([sys.executable, "-c", JOB, str(path)], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL)
    end = time.time() + 60
    while time.time() < end and (not path.exists() or path.read_bytes().count(b"\n") < 30): time.sleep(0.002)
    p.send_signal(signal.SIGKILL); p.wait()
    kept = path.read_bytes().count(b"\n")
    assert 30 <= kept < 118, "it should have been killed in the middle"
    compare(judge(), outputs("one", 60), outputs("two", 60), path, TEMPLATE, lambda line: None)
    assert len(server.answered) - len(set(server.answered)) <= 4 + 1  # four workers, and a reply on its way to the file
    assert len({json.loads(line)["key"] for line in path.read_text().splitlines()}) == path.read_bytes().count(b"\n") == 118


def test_nothing_that_answers_and_a_refused_key_end_in_one_line(server, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    with pytest.raises(JudgeError, match="does not answer.*run again"): list(EndpointJudge("stub", tries=2, wait=0.001)([Question((("user", str(i)),)) for i in range(40)]))
    monkeypatch.setenv("OPENAI_BASE_URL", "https://api.openai.com/v1")
    with pytest.raises(JudgeError, match="OPENAI_API_KEY is not set"): EndpointJudge("gpt-4")
    class No(Stub):
        def do_POST(self): self.say(401, b"bad key")
    no = ThreadingHTTPServer(("127.0.0.1", 0), No); threading.Thread(target=no.serve_forever, daemon=True).start()
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{no.server_port}/v1")
    with pytest.raises(JudgeError, match="401 for model stub"): list(EndpointJudge("stub")([Question((("user", "hi"),))]))
    no.shutdown()


def test_an_error_is_asked_again_and_an_answer_is_not(tmp_path):
    said = iter([Reply(error="HTTP 503"), Reply("A"), Reply("never")])
    one = [Question((("user", "?"),))]
    assert [ask(Scripted(lambda q: next(said)), one, tmp_path / "r.jsonl")[0].text for _ in range(3)] == ["", "A", "A"]


# What a reply depends on, and what is no reply

def test_the_same_name_at_another_address_is_asked_itself(server, tmp_path, monkeypatch):
    questions = [Question((("user", f"free {i}"),), max_tokens=9) for i in range(4)]
    other = ThreadingHTTPServer(("127.0.0.1", 0), Stub); other.daemon_threads = True
    other.n, other.bad, other.answered, other.lock = 0, 0, [], threading.Lock()
    threading.Thread(target=other.serve_forever, daemon=True).start()
    for n in 1, 2:
        monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.server_port}/v1")
        ask(judge(), questions, tmp_path / "r.jsonl")
        monkeypatch.setenv("OPENAI_BASE_URL", f"http://user:pw-of-mine@127.0.0.1:{other.server_port}/v1/")
        ask(judge(), questions, tmp_path / "r.jsonl")
        assert len(server.answered) == len(other.answered) == 4
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{other.server_port}/v1")
    assert ask(judge(), questions, tmp_path / "r.jsonl")[0].text == "Rating: [[7]]" and len(other.answered) == 4  # the login is not a part of it
    other.shutdown()


def test_an_empty_reply_is_an_error_and_asked_again(tmp_path):
    said, one = iter([Reply(""), Reply("  \n"), Reply("", {}), Reply("A")]), [Question((("user", "?"),), ("A", "B"))]
    replies = [ask(Scripted(lambda q: next(said)), one, tmp_path / "r.jsonl")[0] for _ in range(5)]
    assert [r.error for r in replies] == ["an empty reply"] * 3 + [""] * 2 and len((tmp_path / "r.jsonl").read_bytes().splitlines()) == 1
    row = json.loads((tmp_path / "r.jsonl").read_text())
    for old in dict(text="", logprobs=None), dict(text=3), dict(text="A", logprobs={"A": "x"}), dict(text="A", logprobs=[1]), {}:   # rows of an older cache, or of another program
        (tmp_path / "r.jsonl").write_text(json.dumps({k: v for k, v in row.items() if k not in ("text", "logprobs")} | old) + "\n")
        assert ask(Scripted(lambda q: Reply("B")), one, tmp_path / "r.jsonl")[0].text == "B", old


class Says(BaseHTTPRequestHandler):
    "One fixed reply: status and body, in which KEY is what came in the header."
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.n += 1
        status, text = self.server.says
        data = text.replace("KEY", self.headers.get("Authorization", "")).encode()
        self.send_response(status); self.send_header("Content-Length", str(len(data))); self.end_headers(); self.wfile.write(data)

    def log_message(self, *args): pass


@pytest.fixture
def says(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Says); server.n = 0
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.server_port}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", "some-key-of-mine")
    yield server
    server.shutdown()


def test_an_endpoint_s_empty_reply_is_asked_once_more_and_not_for_ever(says, tmp_path):
    says.says = 200, json.dumps(dict(choices=[dict(message=dict(content=""))]))
    replies = ask(EndpointJudge("stub", wait=0.001), [Question((("user", str(i)),)) for i in range(20)], tmp_path / "r.jsonl")
    assert {r.error for r in replies} == {"an empty reply"} and says.n == 40 and not (tmp_path / "r.jsonl").exists()


@pytest.mark.parametrize("text", ['{"choices": []}', '{"choices": [{"message": {"content": {}}}]}', "[" * 100_000, '{"choices": [{"message": {"content": "A"}, "logprobs": {"content": [{"top_logprobs": [{"token": "A", "logprob": %s}]}]}}]}' % ("9" * 400),
                                  '{"choices": [{"message": {"content": "A"}, "logprobs": {"content": [{"top_logprobs": [7]}]}}]}'])
def test_a_malformed_reply_is_an_error_of_its_own(says, text, tmp_path):
    says.says = 200, text
    reply, = ask(EndpointJudge("stub", tries=2, wait=0.001), [Question((("user", "?"),), ("A", "B"))], tmp_path / "r.jsonl")
    assert reply.error and says.n == 2


def test_half_a_character_in_a_reply_is_kept(says, tmp_path):
    says.says = 200, '{"choices": [{"message": {"content": "half \\ud83d and \\u2028 [[7]]"}}]}'
    for _ in 1, 2: reply, = ask(EndpointJudge("stub"), [Question((("user", "?"),))], tmp_path / "r.jsonl")
    assert reply.text == "half \ud83d and \u2028 [[7]]" and says.n == 1


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda v: st.lists(v, max_size=3) | st.dictionaries(st.sampled_from(["choices", "message", "content", "logprobs", "top_logprobs", "token", "logprob"]) | st.text(), v, max_size=4), max_leaves=12) if st else None


@pytest.mark.skipif(st is None, reason="hypothesis is not installed")
def test_any_reply_of_a_server_is_a_reply_or_an_error_and_any_reply_is_a_verdict_or_none():
    import httpx
    from dolly_lora.alpaca import second_is_better
    from dolly_lora.mtbench import rating, winner
    choice, pair = Question((("user", "?"),), tuple(map(str, range(1, 11)))), Question((("user", "?"),), ("A", "B"))
    @settings(max_examples=300, deadline=None)
    @given(st.sampled_from([200, 400, 401, 404, 429, 500]), st.binary() | JSON.map(lambda v: json.dumps(v).encode()) | JSON.map(lambda v: json.dumps(dict(choices=[dict(message=dict(content="A"), logprobs=dict(content=[dict(top_logprobs=v)]))])).encode())
           | st.text().map(lambda v: json.dumps(dict(choices=[dict(message=dict(content=v))])).encode()), st.dictionaries(st.sampled_from(["A", "B", "1", "7", "10", "x"]), st.floats(), max_size=4) | st.none(), st.text() | st.from_regex(r"\[\[\d+\.?\d*\]\]"))
    def is_read(status, data, logprobs, text):
        stub = judge_module.EndpointJudge.__new__(judge_module.EndpointJudge)
        stub.name, stub.url, stub.served = "stub", "http://host/v1", False
        stub.client = httpx.Client(transport=httpx.MockTransport(lambda request: httpx.Response(status, content=data)))
        reply, _ = judge_module._post(stub, pair)
        assert bool(reply.error) != bool(reply.text.strip() or reply.logprobs)
        for reply in reply, Reply(text, logprobs):
            p, value = second_is_better(reply, ("A", "B")), rating(reply)
            assert (p is None or 0 <= p <= 1) and (value == -1 or 1 <= value <= 10 + 1e-9) and winner(reply) in ("A", "B", "tie", "error")
    is_read()


# Secrets

KEY, PASSWORD = "sk-planted-0123456789abcdef", "pass-word-of-mine-77"


@pytest.mark.parametrize("fault", ["401", "500", "200 garbage", "refused", "cut off", "nothing there", "no address", "illegal key", "inner space", "not ascii"])
def test_a_planted_key_and_password_are_nowhere(says, tmp_path, monkeypatch, capfd, caplog, fault):
    """The secrets echoed in every way a server can; then every file and every line that came out is searched."""
    import base64
    basic, host = base64.b64encode(f"me:{PASSWORD}".encode()).decode(), "127.0.0.1:9" if fault == "nothing there" else f"127.0.0.1:{says.server_port}"
    caplog.set_level("DEBUG")
    monkeypatch.setenv("OPENAI_API_KEY", {"illegal key": KEY + "\x01\r", "inner space": f"{KEY} {KEY}", "not ascii": KEY + "é"}.get(fault, KEY + "\r\n "))
    questions, seen = load_questions("sample"), ""
    answers = [dict(question_id=q["question_id"], model_id="m", choices=[dict(index=0, turns=["a", "b"])]) for q in questions]
    for url, secrets in (f"http://{host}/v1", KEY), (f"http://me:{PASSWORD}@{host}/v1", f"{KEY} {PASSWORD} {basic}"):
        status = {"401": 401, "500": 500, "refused": 400, "cut off": 401}.get(fault, 200)
        says.says = status, "y" * (105 if fault == "cut off" else 1) + f" {secrets} KEY" * 3     # "cut off": where a long message is
        monkeypatch.setenv("OPENAI_BASE_URL", f"{url}?key={KEY}" if fault == "no address" else url)
        for act in (lambda: check("stub"), lambda: list(map(print, grade(EndpointJudge("stub", tries=2, wait=0.001), questions, answers, tmp_path / "replies.jsonl", {}, PROMPTS)))):
            try: act()
            except DollyError as e:
                print(e); seen += repr(e) + "".join(e._render_traceback_())
                assert "\n" not in str(e)
    out = capfd.readouterr()
    seen += out.out + out.err + caplog.text + "".join(p.read_text() for p in tmp_path.rglob("*") if p.is_file())
    assert len(seen) > 100 and not [s for s in (KEY, KEY[:12], PASSWORD, basic) if s in seen], seen


def test_a_key_with_a_newline_works_and_one_that_cannot_be_sent_is_refused(says, monkeypatch):
    says.says = 200, json.dumps(dict(choices=[dict(message=dict(content="A KEY"))]))
    for key in "plain-key", "plain-key\r\n", " plain-key\t\n":
        monkeypatch.setenv("OPENAI_API_KEY", key)
        assert dict(EndpointJudge("stub")([Question((("user", "?"),))]))[0].text == "A Bearer plain-key"
    for key in "plain key", "plain\nkey", "plain\x7fkey", "pläin":
        monkeypatch.setenv("OPENAI_API_KEY", key)
        with pytest.raises(JudgeError, match="copy it again") as e: EndpointJudge("stub")
        assert "plain" not in str(e.value) and "\n" not in str(e.value)


def test_a_login_in_the_address_is_sent_and_not_shown(says, monkeypatch):
    import base64
    says.says = 200, json.dumps(dict(choices=[dict(message=dict(content="A KEY"))]))
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://me:p%40ss@127.0.0.1:{says.server_port}/v1/"); monkeypatch.delenv("OPENAI_API_KEY")
    stub = EndpointJudge("stub")
    assert stub.origin == dict(endpoint=stub.url) == dict(endpoint=f"http://127.0.0.1:{says.server_port}/v1")
    assert dict(stub([Question((("user", "?"),))]))[0].text == "A Basic " + base64.b64encode(b"me:p@ss").decode()


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host/v1", "http://", "http://host:port/v1", "http://[::1/v1", "https://host/v1?key=secret", "just words", "http://ho st/v1", "http://host/v 1", "https://host/v1#x"])
def test_an_address_that_is_none_gives_one_line(url, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", url); monkeypatch.setenv("OPENAI_API_KEY", "some-key")
    with pytest.raises(JudgeError, match="^OPENAI_BASE_URL is not the address") as e: EndpointJudge("stub")
    assert "secret" not in str(e.value) and "\n" not in str(e.value)


# Before the work begins

def check(name): return check_judge(replace(PRESETS["tiny"], judge=name))


def test_a_refused_key_or_a_silent_endpoint_is_found_before_the_work(says, monkeypatch):
    says.says = 200, json.dumps(dict(choices=[dict(message=dict(content="A"))]))
    check("stub")
    assert says.n == 1
    for told, why in ((401, "no"), "says 401 for model stub"), ((404, "what?"), "says 404"), ((400, "no logprobs here"), "no logprobs here"), ((200, "<html>"), "gives no verdict"), ((200, '{"choices": [{"message": {"content": ""}}]}'), "an empty reply"):
        says.says = told
        with pytest.raises(JudgeError, match=why) as e: check("stub")
        assert "\n" not in str(e.value)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    with pytest.raises(JudgeError, match="gives no verdict with model stub .ConnectError"): check("stub")


@pytest.fixture
def local(tmp_path):
    load_base(PRESETS["tiny"]).cpu().save_pretrained(tmp_path / "judge"); load_tokenizer(PRESETS["tiny"]).save_pretrained(tmp_path / "judge")
    return tmp_path / "judge"


def test_a_local_folder_that_is_not_whole_is_found_before_the_work(local):
    check(f"local:{local}")
    weights = (local / "model.safetensors").read_bytes()
    for spoil, why in ((lambda: (local / "model.safetensors").write_bytes(weights[:-9]), "cannot judge"), (lambda: (local / "model.safetensors").unlink(), "no .safetensors file"),
                       (lambda: (local / "model.safetensors.index.json").write_text('{"weight_map": {"x": "model-1.safetensors"}}'), "cannot judge"),
                       (lambda: [(local / "model.safetensors.index.json").unlink(), (local / "model.safetensors").write_bytes(weights), *(p.unlink() for p in local.glob("tokenizer*"))], "no tokenizer"),
                       (lambda: (local / "config.json").unlink(), "no config.json"), (lambda: shutil.rmtree(local), "no base model at")):
        spoil()
        with pytest.raises(DollyError, match=why) as e: check(f"local:{local}")
        assert "\n" not in str(e.value)


def test_a_local_judge_is_known_by_its_contents(local, tmp_path):
    recipe, one = replace(PRESETS["tiny"], judge=f"local:{local}"), [Question((("user", "Which?"),), ("A", "B"))]
    before = make_judge(recipe)
    first, = ask(before, one, tmp_path / "r.jsonl")
    assert before.origin == judge_origin(recipe) and len(before.origin["weights"]) == 64
    tiny_model(seed=1).save_pretrained(local)                                # another model under the same name
    again = make_judge(recipe)
    second, = ask(again, one, tmp_path / "r.jsonl")
    assert again.name == before.name and again.origin != before.origin and second.logprobs != first.logprobs
    assert make_judge(PRESETS["tiny"]).origin == dict(weights="tiny")


def test_local_judge_s_odds_are_the_model_s_own():
    model, tokenizer = load_base(PRESETS["tiny"]), load_tokenizer(PRESETS["tiny"])
    rate_it = Question((("user", "Rate this answer."),), tuple(map(str, range(1, 11))), "Rating: [[")
    which = Question((("user", "Which is the better greeting, A: hello, or B: good day?"),), ("A", "B"))
    both = [r.logprobs for _, r in sorted(dict(LocalJudge(model, tokenizer, "tiny")([rate_it, which])).items())]
    alone = [dict(LocalJudge(model, tokenizer, "tiny", tokens=1)([q]))[0].logprobs for q in (rate_it, which)]   # a forward pass each
    for x, y in zip(alone, both): assert x == pytest.approx(y, abs=1e-4)
    ids = judge_module._prompt_ids(tokenizer, which)
    with torch.inference_mode(): free = model(torch.tensor([ids], device=model.device)).logits[0, -1].log_softmax(-1)
    assert both[1]["A"] == pytest.approx(float(free[judge_module._choice_ids(tokenizer, which)[0][0]]), abs=1e-4)
    assert "reads" in dict(LocalJudge(model, tokenizer, "tiny")([Question((("user", "word " * 3000),), ("A", "B"))]))[0].error
    two = judge_module._choice_logprobs((), ("1", "10"), [(1,), (1, 0)], {(): torch.tensor([-9.0, -0.5]), (1,): torch.tensor([0.25, 0.75]).log()})
    assert torch.tensor(list(two.values())).exp().sum() == pytest.approx(math.exp(-0.5), abs=1e-6)


def test_a_full_disk_while_a_download_is_kept(tmp_path, monkeypatch):
    import hashlib
    from dolly_lora.judge import fetch
    import httpx
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(httpx, "get", lambda url, **how: httpx.Response(200, content=b"text", request=httpx.Request("GET", url)))
    with patch("os.replace", side_effect=OSError(28, "No space left on device")):
        with pytest.raises(DollyError, match="No space left on device"): fetch("https://example.org/q.jsonl", hashlib.sha256(b"text").hexdigest())
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_judge_command(server, tiny_run, tmp_path, capsys, monkeypatch):
    run = shutil.copytree(tiny_run[0], tmp_path / "run")
    assert cli.main(["judge", "--run-dir", str(run), "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("local tiny: 0 calls")   # all of it was asked in the run
    monkeypatch.setattr("dolly_lora.alpaca.judge_prompt", lambda: TEMPLATE); monkeypatch.setattr("dolly_lora.mtbench.load_prompts", lambda: PROMPTS)
    assert cli.main(["judge", "--run-dir", str(run), "--judge", "stub", "--dry-run"]) == 0
    assert "no price known" in capsys.readouterr().out and not server.n
    assert cli.main(["judge", "--run-dir", str(run), "--judge", "stub"]) == 0
    judgments = json.loads((run / "metrics.json").read_text())["judgments"]
    judged = judgments["stub"]
    assert set(judgments) == {"local tiny", "stub"} and judged["official"] == dict(alpaca=False, mt_bench=False) and judged["alpaca"]["tuned against base"]["win_rate"] == pytest.approx(50)
    assert len((run / "judgments/mt_bench/model_judgment/stub_single.jsonl").read_text().splitlines()) == 32
