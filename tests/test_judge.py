"""A judge behind an endpoint that misbehaves; what is paid for once is not paid for twice."""
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from conftest import ROOT
from dolly_lora import cli
from dolly_lora.alpaca import compare, score
from dolly_lora.judge import EndpointJudge, JudgeError, Question, Scripted, ask
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
    from dolly_lora.judge import Reply
    said = iter([Reply(error="HTTP 503"), Reply("A"), Reply("never")])
    one = [Question((("user", "?"),))]
    assert [ask(Scripted(lambda q: next(said)), one, tmp_path / "r.jsonl")[0].text for _ in range(3)] == ["", "A", "A"]


def test_judge_command(server, tiny_run, tmp_path, capsys, monkeypatch):
    run = shutil.copytree(tiny_run[0], tmp_path / "run")
    assert cli.main(["judge", "--run-dir", str(run), "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("local tiny: 0 calls")   # all of it was asked in the run
    monkeypatch.setattr("dolly_lora.alpaca.judge_prompt", lambda: TEMPLATE); monkeypatch.setattr("dolly_lora.mtbench.load_prompts", lambda: PROMPTS)
    assert cli.main(["judge", "--run-dir", str(run), "--judge", "stub", "--dry-run"]) == 0
    assert "no price known" in capsys.readouterr().out and not server.n
    assert cli.main(["judge", "--run-dir", str(run), "--judge", "stub"]) == 0
    judged = json.loads((run / "metrics.json").read_text())["judgments"]
    assert judged["judge"] == "stub" and not judged["official"] and judged["alpaca"]["tuned against base"]["win_rate"] == pytest.approx(50)
    assert len((run / "judgments/mt_bench/model_judgment/stub_single.jsonl").read_text().splitlines()) == 32
