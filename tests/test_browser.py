"""The chat, the five numbered notebooks and the report in a real browser, driven as a person drives it: Debian's chromium under Playwright."""
import http.server
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest

from conftest import ROOT, cli

try: from playwright import sync_api
except ImportError: sync_api = None
CHROMIUM = next((p for p in map(shutil.which, (os.environ.get("CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")) if p), None)
LEFT_OUT = "left out: what needs a browser (the chat, the notebooks in JupyterLab, hostile texts in notebooks and report)"

FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync".split()
SERVER = ["--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1", "--ServerApp.port_retries=0", "--IdentityProvider.token=T", "--LabApp.news_url=None",
          "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate", "--LabApp.expose_app_in_browser=True"]

HOSTILE = ["""<img src=x onerror="window.owned=1">""", "</div></div><script>window.owned=1</script>", "the price is $x$ or $$y^2$$", "[a](javascript:window.owned=1)"]

CHAT = r'''
import time
from transformers import LlamaForCausalLM
from dolly_lora.conversation import Chat
from dolly_lora.window import ChatUI
from dolly_lora.config import PRESETS
from dolly_lora.models import add_lora, tiny_model, tiny_tokenizer

tokenizer = tiny_tokenizer()

class Scripted(LlamaForCausalLM):
    "Says what it is told to, token by token, and takes its time."
    def forward(self, input_ids=None, **kwargs):
        out = super().forward(input_ids=input_ids, **kwargs)
        if input_ids.shape[1] > 1:  # a prompt: a new answer begins
            question = tokenizer.decode(input_ids[0]).rsplit("### Instruction:\n", 1)[1].rsplit("\n\n### Response:", 1)[0]
            who = "base" if self.model.layers[0].self_attn.q_proj.disable_adapters else "tuned"
            text = " ".join(map(str, range(1, 100))) if question == "count" else f"{who} heard: {question}"
            self.script, self.fails = iter(tokenizer(text).input_ids), question == "fail"
        else: time.sleep(0.02)
        token = next(self.script, None)
        if self.fails and token is None: raise RuntimeError("the <b>kernel</b> was lost")
        out.logits[:] = -100.0
        out.logits[..., tokenizer.eos_token_id if token is None else token] = 100.0
        return out

small = tiny_model()
small.__class__ = Scripted
model = add_lora(small, PRESETS["tiny"]).eval()
'''
WINDOW = "chat = Chat(model, tokenizer, max_new_tokens=250)\nui = ChatUI(chat)\nui"


def notebook(*sources):
    return dict(nbformat=4, nbformat_minor=5, metadata=dict(kernelspec=dict(name="python3", language="python", display_name="Python 3")),
                cells=[dict(cell_type="code", id=f"c{i}", metadata={}, execution_count=None, outputs=[], source=s.strip()) for i, s in enumerate(sources)])


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    """A browser of its own, without the machine's settings."""
    if sync_api is None: pytest.skip(f"{LEFT_OUT}; playwright is not installed: pip install playwright")
    if not CHROMIUM: pytest.skip(f"{LEFT_OUT}; no chromium here: apt-get install chromium, or set CHROMIUM to the path of a Chrome")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch_persistent_context(str(tmp_path_factory.mktemp("chromium")), executable_path=CHROMIUM, headless=True, args=FLAGS, viewport=dict(width=1280, height=1000))
        browser.set_default_timeout(30_000)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def lab(chromium, tmp_path_factory):
    """A JupyterLab over a temporary folder: (folder, `open_` that shows a notebook and, unless told otherwise, runs all its cells)."""
    folder, home = tmp_path_factory.mktemp("notebooks"), tmp_path_factory.mktemp("jupyter")
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"} | {"PYTHONPATH": str(ROOT), "IPYTHONDIR": str(home / "ipython")}
    env |= {f"{name}_DIR": str(home / name) for name in ("JUPYTER_CONFIG", "JUPYTER_DATA", "JUPYTER_RUNTIME", "JUPYTERLAB_SETTINGS", "JUPYTERLAB_WORKSPACES")}
    for name, values in {"notebook-extension/tracker": dict(windowingMode="none"), "apputils-extension/notification": dict(fetchNews="false")}.items():
        path = home / "JUPYTERLAB_SETTINGS" / "@jupyterlab" / f"{name}.jupyterlab-settings"   # all cells are in the page, seen or not, and no question covers them
        path.parent.mkdir(parents=True); path.write_text(json.dumps(values))
    with open(home / "log", "w") as log:
        server = subprocess.Popen([sys.executable, "-m", "jupyterlab", *SERVER, f"--ServerApp.port={port}"], cwd=folder, env=env, stdout=log, stderr=subprocess.STDOUT)
    try:
        url, deadline = f"http://127.0.0.1:{port}", time.time() + 60
        while True:
            try: urllib.request.urlopen(f"{url}/api?token=T", timeout=5); break
            except OSError: assert time.time() < deadline and server.poll() is None, (home / "log").read_text()[-3000:]; time.sleep(0.2)
        yield folder, lambda name, run=True: (run_all if run else show)(chromium.new_page(), f"{url}/lab/tree/{name}?token=T&reset")
    finally:
        server.terminate()
        try: server.wait(20)
        except subprocess.TimeoutExpired: server.kill()


def show(page, url):
    """Open a notebook with the outputs it has."""
    page.goto(url)
    page.wait_for_function("window.jupyterapp?.shell?.currentWidget?.context", timeout=60_000)
    page.evaluate("async () => { const w = jupyterapp.shell.currentWidget; await w.context.ready; await w.revealed }")
    return page


def run_all(page, url, seconds=240):
    """Open a notebook, Run → Run All Cells, wait until the kernel has done them."""
    show(page, url)
    page.evaluate("async () => { const w = jupyterapp.shell.currentWidget; await w.context.ready; await w.sessionContext.ready; await w.sessionContext.session.kernel.info }")
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    page.wait_for_function("""() => {
        const w = jupyterapp.shell.currentWidget, code = w.content.widgets.filter(c => c.model.type === 'code').map(c => c.model);
        const failed = code.some(m => m.sharedModel.outputs.some(o => o.output_type === 'error'));
        return w.sessionContext.session.kernel.status === 'idle' && (failed || code.every(m => m.executionCount)) }""", timeout=seconds * 1000, polling=200)
    return page


def close(page):
    page.evaluate("() => jupyterapp.shell.currentWidget.sessionContext.shutdown()")
    page.close()


# The chat

@pytest.fixture(scope="module")
def window(lab):
    folder, open_ = lab
    (folder / "chat.ipynb").write_text(json.dumps(notebook(CHAT, WINDOW)))
    page = open_("chat.ipynb")
    assert page.locator(".jp-OutputArea [data-mime-type='application/vnd.jupyter.stderr']").count() == 0
    page.locator(".dl-chat").wait_for()
    yield page
    close(page)


@pytest.fixture
def chat(window):
    """The window with an empty conversation."""
    if window.locator(".dl-stop").is_enabled(): window.locator(".dl-stop").click()
    idle(window)
    window.locator(".dl-clear").click()
    window.wait_for_function("!document.querySelector('.dl-page .dl-user')")
    return window


def idle(page, seconds=30): page.wait_for_function("!document.querySelector('.dl-send').disabled && document.querySelector('.dl-stop').disabled", timeout=seconds * 1000)
def busy(page): page.wait_for_function("document.querySelector('.dl-send').disabled && !document.querySelector('.dl-stop').disabled", timeout=10_000)
def answer(page): # the lowest one on the page
    return page.evaluate("""() => [...document.querySelectorAll('.dl-page .dl-answer')].sort((a, b) => a.getBoundingClientRect().bottom - b.getBoundingClientRect().bottom).pop()?.innerText.trim() ?? ''""")


def ask(page, text, wait=True):
    """Type, press Enter; `wait` for the whole answer."""
    page.evaluate("""() => { const send = document.querySelector('.dl-send'); window.asked = false;
        new MutationObserver(() => { if (send.disabled) window.asked = true }).observe(send, {attributes: true}) }""")   # an answer may begin and end between two looks
    page.fill(".dl-message input", text)
    page.press(".dl-message input", "Enter")
    page.wait_for_function("window.asked")
    if wait: idle(page)


def test_enter_sends_and_the_answer_is_whole(chat):
    ask(chat, "Good morning")
    assert "tuned heard: Good morning" in answer(chat) and chat.locator(".dl-page .dl-user").inner_text().endswith("Good morning")
    assert "tok/s" in chat.locator(".dl-status").inner_text()


def test_text_grows_and_stop_keeps_what_is_there(chat):
    ask(chat, "count", wait=False)
    busy(chat)
    parts, deadline = [""], time.time() + 20
    while len(parts) < 6 and time.time() < deadline:        # five states of one answer, each the beginning of the next
        now = answer(chat)
        if re.search(r"\d", now) and now != parts[-1]: parts.append(now)
    assert len(parts) == 6 and all(b.startswith(a) for a, b in zip(parts, parts[1:])), parts
    start = time.time()
    chat.locator(".dl-stop").click()
    idle(chat)
    assert time.time() - start < 1
    kept = answer(chat)
    assert "1 2 3" in kept and " 99" not in kept and kept.startswith(parts[-1])
    time.sleep(0.5)
    assert answer(chat) == kept                             # nothing comes after
    ask(chat, "And now?")
    assert "tuned heard: And now?" in answer(chat) and chat.locator(".dl-page .dl-answer").count() == 2


def test_a_failing_answer_is_shown_and_the_next_turn_works(chat):
    start = time.time()
    ask(chat, "fail")
    assert time.time() - start < 5
    assert "the <b>kernel</b> was lost" in chat.locator(".dl-error").inner_text()
    ask(chat, "Still there?")
    assert "tuned heard: Still there?" in answer(chat)
    assert not chat.locator(".dl-error").is_visible() or "lost" not in chat.locator(".dl-error").inner_text()


def test_compare_shows_both_and_the_adapter_is_on_afterwards(chat):
    chat.locator(".dl-compare input").click()
    ask(chat, "Who?")
    base, tuned = chat.locator(".dl-page .dl-base"), chat.locator(".dl-page .dl-tuned")
    assert "base heard: Who?" in base.inner_text() and "tuned heard: Who?" in tuned.inner_text()
    a, b = base.bounding_box(), tuned.bounding_box()
    assert abs(a["y"] - b["y"]) < 5 and (a["x"] + a["width"] <= b["x"] + 1 or b["x"] + b["width"] <= a["x"] + 1)   # side by side
    if folder := os.environ.get("DOLLY_LORA_SCREENSHOTS"): chat.locator(".dl-chat").screenshot(path=Path(folder) / "compare.png")
    chat.locator(".dl-compare input").click()
    ask(chat, "And now?")
    assert "tuned heard: And now?" in answer(chat)


def test_turns_stand_in_their_order_and_the_end_stays_in_view(chat):
    for text in "First", "count", "count", "Last": ask(chat, text)
    assert chat.locator(".dl-page .dl-user").all_inner_texts() == ["First", "count", "count", "Last"]   # as they are read out, too
    assert chat.evaluate("(e => e.scrollHeight > e.clientHeight + 20)(document.querySelector('.dl-page'))")
    page, last = chat.locator(".dl-page").bounding_box(), chat.locator(".dl-page .dl-answer").last.bounding_box()
    assert page["y"] < last["y"] and last["y"] + last["height"] <= page["y"] + page["height"]
    if folder := os.environ.get("DOLLY_LORA_SCREENSHOTS"): chat.locator(".dl-chat").screenshot(path=Path(folder) / "chat.png")


@pytest.mark.parametrize("text", HOSTILE)
def test_everything_is_shown_as_it_was_written(chat, text):
    ask(chat, text)
    assert text in chat.locator(".dl-page .dl-user").inner_text()
    assert f"tuned heard: {text}" in answer(chat)
    time.sleep(0.3)                                         # an image needs a moment to fail, MathJax to typeset
    assert chat.evaluate("window.owned") is None
    assert chat.locator(".dl-page").locator("img, script, mjx-container, .MathJax, a[href^='javascript']").count() == 0
    assert chat.locator(".dl-page .dl-answer").count() == 1


# The notebooks

@pytest.fixture(scope="module")
def course(lab):
    """The numbered notebooks with the preset `tiny` and no outputs, in the folder that JupyterLab shows."""
    for path in sorted((ROOT / "nbs").glob("0[1-5]_*.ipynb")):
        nb = json.loads(path.read_text())
        for cell in nb["cells"]:
            if cell["cell_type"] == "code": cell |= dict(outputs=[], execution_count=None)
            if "parameters" in cell["metadata"].get("tags", []): cell["source"] = "".join(cell["source"]).replace('preset: str = "demo"', 'preset: str = "tiny"')
        assert 'preset: str = \\"tiny\\"' in json.dumps(nb)
        (lab[0] / path.name).write_text(json.dumps(nb))
    return lab[1]


FIGURES = {"01_data": 2, "02_train": 2, "03_eval": 5, "04_chat": 0, "05_report": 0}   # at least


@pytest.mark.parametrize("name", FIGURES)
def test_run_all(course, name):
    """Each notebook runs on what the one before left."""
    page = course(f"{name}.ipynb")
    if name == "04_chat": page.locator(".dl-chat").first.wait_for()
    if folder := os.environ.get("DOLLY_LORA_SCREENSHOTS"): screenshot(page, Path(folder) / f"{name}.png")
    errors = page.evaluate("""() => jupyterapp.shell.currentWidget.content.widgets.filter(c => c.model.type === 'code')
        .flatMap(c => c.model.sharedModel.outputs).filter(o => o.output_type === 'error').map(o => `${o.ename}: ${o.evalue}`)""")
    assert errors == []
    assert page.locator(".jp-OutputArea-output img").count() >= FIGURES[name]
    wide = page.evaluate("""() => [...document.querySelectorAll('.jp-OutputArea-output, .jp-OutputArea-output .widget-box')].filter(e => e.scrollWidth > e.clientWidth + 1)
        .map(e => `${e.scrollWidth} > ${e.clientWidth}: ${e.innerText.slice(0, 80)}`)""")
    assert wide == []
    close(page)


def screenshot(page, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    height = page.evaluate("() => [...document.querySelectorAll('.jp-Notebook .jp-Cell')].reduce((n, e) => n + e.offsetHeight, 0)")
    page.set_viewport_size(dict(width=1280, height=min(16_000, height + 300)))   # chromium paints no more than 16384 pixels
    page.evaluate("() => document.querySelectorAll('.jp-Notebook, .jp-WindowedPanel-outer').forEach(e => e.scrollTop = 0)")
    time.sleep(1)
    page.screenshot(path=path)
    page.set_viewport_size(dict(width=1280, height=1000))


# Hostile texts

@pytest.fixture(scope="module")
def hostile_run(chromium, tmp_path_factory):
    """A run in which records, categories, answers, base model and judge are named by somebody who means harm: (its folder, the process)."""
    from tokenizers import Regex, decoders
    from dolly_lora.models import tiny_model, tiny_tokenizer
    folder = tmp_path_factory.mktemp("hostile")
    base, tokenizer = folder / HOSTILE[0], tiny_tokenizer()
    tokenizer.backend_tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace(Regex(r"[\s\S]+"), " ".join(HOSTILE))])   # whatever the model says
    tiny_model().save_pretrained(base)
    tokenizer.save_pretrained(base)
    rows = [dict(instruction=f"<eos> {text} {i}", context=text if i % 2 else "", response=f"{text} {i}", category=text) for text in HOSTILE for i in range(12)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "run", cli("run", "tiny", "--run-dir", folder / "run", "--dataset", folder / "data.jsonl", "--set", f"base={base}", f"judge=local:{base}")


def harmless(page):
    """Nothing of a text has become part of the page."""
    assert page.evaluate("window.owned") is None
    assert page.evaluate("""() => [...document.querySelectorAll("img[src='x'], [onerror], a[href^='javascript']")].map(e => e.outerHTML)""") == []
    assert page.evaluate("""() => [...document.querySelectorAll('script')].filter(e => e.textContent.trim() === 'window.owned=1').length""") == 0


def test_a_hostile_run_ends(hostile_run):
    run, done = hostile_run
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.mark.parametrize("name", [*FIGURES, "report"])
def test_hostile_texts_are_shown_and_do_nothing(chromium, hostile_run, name, tmp_path):
    """Executed notebooks as nbconvert writes them, which trusts every output, and the report."""
    from nbconvert import HTMLExporter
    path = hostile_run[0] / "report/report.html"
    if name != "report":
        path = tmp_path / f"{name}.html"
        path.write_text(HTMLExporter().from_filename(str(hostile_run[0] / f"notebooks/{name}.ipynb"))[0])
    page = chromium.new_page()
    page.route(re.compile("^https?:"), lambda route: route.abort())          # the page's own scripts (MathJax) lie elsewhere
    dialogs = []
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    page.goto(path.as_uri(), wait_until="load")
    page.wait_for_timeout(300)
    harmless(page)
    shown = page.locator("body").inner_text()
    assert dialogs == [] and [text for text in HOSTILE if text not in shown] == []
    if name == "03_eval": assert "<eos>" in shown                            # in a test record
    page.close()


class HostileJudge(http.server.BaseHTTPRequestHandler):
    """Says the hostile texts, and a rating and a verdict with them."""
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        body = json.dumps(dict(choices=[dict(message=dict(content=" ".join(HOSTILE) + " [[5]] [[A]]"))])).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args): pass


def test_a_hostile_judge_does_nothing(chromium, hostile_run, judge_env, tmp_path):
    """A judge behind an endpoint, with a hostile name and hostile replies, about the hostile run's answers."""
    from nbconvert import HTMLExporter
    folder, server = tmp_path / "run", http.server.ThreadingHTTPServer(("127.0.0.1", 0), HostileJudge)
    shutil.copytree(hostile_run[0], folder)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    recipe = json.loads((folder / "recipe.json").read_text())["recipe"]
    done = cli("run", "tiny", "--run-dir", folder, "--dataset", recipe["dataset"], "--set", f"base={recipe['base']}", f"judge={HOSTILE[1]}",
               env=judge_env | dict(OPENAI_API_KEY="none", OPENAI_BASE_URL=f"http://127.0.0.1:{server.server_port}/v1"))
    server.shutdown()
    server.server_close()
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert HOSTILE[2] in (folder / "judgments/replies.jsonl").read_text()
    page = chromium.new_page()
    page.route(re.compile("^https?:"), lambda route: route.abort())
    for name in "03_eval", "05_report", "report":
        path = folder / "report/report.html"
        if name != "report":
            path = tmp_path / f"{name}.html"
            path.write_text(HTMLExporter().from_filename(str(folder / f"notebooks/{name}.ipynb"))[0])
        page.goto(path.as_uri(), wait_until="load")
        page.wait_for_timeout(300)
        harmless(page)
        if name != "05_report": assert HOSTILE[1] in page.locator("body").inner_text()
    page.close()


@pytest.mark.parametrize("name", ["01_data", "02_train", "03_eval", "05_report"])
def test_hostile_texts_in_jupyterlab(lab, hostile_run, name):
    """The same notebooks where MathJax typesets what looks like a formula."""
    folder, open_ = lab
    shutil.copy(hostile_run[0] / f"notebooks/{name}.ipynb", folder / f"hostile_{name}.ipynb")
    page = open_(f"hostile_{name}.ipynb", run=False)
    page.locator(".jp-OutputArea-output").first.wait_for()
    page.wait_for_timeout(1500)                                              # to typeset
    harmless(page)
    assert page.locator(".jp-OutputArea-output mjx-container, .jp-OutputArea-output .MathJax").all_inner_texts() == []
    close(page)


def test_left_out_tests_say_what_and_why_and_how_to_have_them(tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "CHROMIUM"} | {"PATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", __file__, "-k", "hostile"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and LEFT_OUT in done.stdout and "apt-get install chromium" in done.stdout and "CHROMIUM" in done.stdout, done.stdout
