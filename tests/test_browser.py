"""The chat, the five numbered notebooks and the report in a real browser, driven as a person
drives it: Debian's chromium under Playwright."""
import contextlib
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

try:
    from playwright import sync_api
except ImportError:
    sync_api = None
NAMES = (os.environ.get("CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome",
         "google-chrome-stable")
CHROMIUM = next((path for path in map(shutil.which, NAMES) if path), None)
LEFT_OUT = ("left out: what needs a browser (the chat, the notebooks in JupyterLab, "
            "hostile texts in notebooks and report)")

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync"]
SERVER = ["--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1",
          "--ServerApp.port_retries=0", "--IdentityProvider.token=T", "--LabApp.news_url=None",
          "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
          "--LabApp.expose_app_in_browser=True"]
# all cells are in the page, seen or not, and no question covers them
SETTINGS = {"notebook-extension/tracker": dict(windowingMode="none"),
            "apputils-extension/notification": dict(fetchNews="false")}

HOSTILE = ["""<img src=x onerror="window.owned=1">""",
           "</div></div><script>window.owned=1</script>",
           "the price is $x$ or $$y^2$$",
           "[a](javascript:window.owned=1)"]

SCREENSHOTS = os.environ.get("DOLLY_LORA_SCREENSHOTS")  # a folder: pictures of what was tested


def notebook(*sources):
    kernel = dict(name="python3", language="python", display_name="Python 3")
    cells = [dict(cell_type="code", id=f"c{i}", metadata={}, execution_count=None, outputs=[],
                  source=source.strip()) for i, source in enumerate(sources)]
    return dict(nbformat=4, nbformat_minor=5, metadata=dict(kernelspec=kernel), cells=cells)


@contextlib.contextmanager
def start_chromium(folder):
    """A browser of its own, without the machine's settings."""
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch_persistent_context(
            str(folder), executable_path=CHROMIUM, headless=True, args=FLAGS,
            viewport=dict(width=1280, height=1000))
        browser.set_default_timeout(30_000)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    if sync_api is None:
        pytest.skip(f"{LEFT_OUT}; playwright is not installed: pip install playwright")
    if not CHROMIUM:
        pytest.skip(f"{LEFT_OUT}; no chromium here: apt-get install chromium, "
                    f"or set CHROMIUM to the path of a Chrome")
    with start_chromium(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@contextlib.contextmanager
def start_lab(chromium, folder, home):
    """A JupyterLab over `folder`, with its settings in `home`: a function that shows a notebook
    in a page and, unless told otherwise, runs all its cells."""
    port = free_port()
    with open(home / "log", "w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *SERVER, f"--ServerApp.port={port}"], cwd=folder,
            env=lab_environment(home), stdout=log, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"

    def open_(name, run=True):
        page = chromium.new_page()
        page_url = f"{url}/lab/tree/{name}?token=T&reset"
        return run_all(page, page_url) if run else show(page, page_url)

    try:
        wait_for_server(server, f"{url}/api?token=T", home / "log")
        yield open_
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()


@pytest.fixture(scope="module")
def lab(chromium, tmp_path_factory):
    """(The folder that JupyterLab shows, `open_` of `start_lab`.)"""
    folder, home = tmp_path_factory.mktemp("notebooks"), tmp_path_factory.mktemp("jupyter")
    with start_lab(chromium, folder, home) as open_:
        yield folder, open_


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def lab_environment(home):
    """Settings, kernels and IPython of this test alone, in the folder `home`."""
    folders = "CONFIG", "DATA", "RUNTIME"
    env = {name: value for name, value in os.environ.items() if name != "IN_TEST"}
    env |= {"PYTHONPATH": str(ROOT), "IPYTHONDIR": str(home / "ipython")}
    env |= {f"JUPYTER_{name}_DIR": str(home / name) for name in folders}
    env |= {f"JUPYTERLAB_{name}_DIR": str(home / name) for name in ("SETTINGS", "WORKSPACES")}
    for name, values in SETTINGS.items():
        path = home / "SETTINGS" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(values))
    return env


def wait_for_server(server, url, log, seconds=60):
    deadline = time.time() + seconds
    while True:
        try:
            return urllib.request.urlopen(url, timeout=5)
        except OSError:
            assert time.time() < deadline and server.poll() is None, log.read_text()[-3000:]
            time.sleep(0.2)


def show(page, url):
    """Open a notebook with the outputs it has."""
    page.goto(url)
    page.wait_for_function("window.jupyterapp?.shell?.currentWidget?.context", timeout=60_000)
    page.evaluate("""async () => {
        const widget = jupyterapp.shell.currentWidget;
        await widget.context.ready;
        await widget.revealed }""")
    return page


def run_all(page, url, seconds=240):
    """Open a notebook, Run → Run All Cells, wait until the kernel has done them."""
    show(page, url)
    page.evaluate("""async () => {
        const widget = jupyterapp.shell.currentWidget;
        await widget.context.ready;
        await widget.sessionContext.ready;
        await widget.sessionContext.session.kernel.info }""")
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    page.wait_for_function("""() => {
        const widget = jupyterapp.shell.currentWidget;
        const cells = widget.content.widgets.map(c => c.model).filter(m => m.type === 'code');
        const outputs = cells.flatMap(m => m.sharedModel.outputs);
        const failed = outputs.some(o => o.output_type === 'error');
        return widget.sessionContext.session.kernel.status === 'idle'
            && (failed || cells.every(m => m.executionCount)) }""",
        timeout=seconds * 1000, polling=200)
    return page


def close(page):
    page.evaluate("() => jupyterapp.shell.currentWidget.sessionContext.shutdown()")
    page.close()


def take_picture(place, name):
    """Of a page or a part of it, if pictures are wanted."""
    if SCREENSHOTS:
        place.screenshot(path=Path(SCREENSHOTS) / f"{name}.png")


# The chat

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
        off = self.model.layers[0].self_attn.q_proj.disable_adapters
        if input_ids.shape[1] > 1:  # a prompt: a new answer begins
            self.begin(off, tokenizer.decode(input_ids[0]))
        else:
            time.sleep(0.02)
        token = next(self.scripts[off], None)
        if self.fails and token is None:
            raise RuntimeError("the <b>kernel</b> was lost")
        out.logits[:] = -100.0
        out.logits[..., tokenizer.eos_token_id if token is None else token] = 100.0
        return out

    def begin(self, off, prompt):
        question = prompt.rsplit("### Instruction:\n", 1)[1].rsplit("\n\n### Response:", 1)[0]
        text = f"{'base' if off else 'tuned'} heard: {question}"
        if question == "count":
            text = " ".join(map(str, range(1, 100)))
        self.scripts[off] = iter(tokenizer(text).input_ids)
        self.fails = question == "fail"

small = tiny_model()
small.__class__ = Scripted
small.scripts = {}
small.config.model_type = "scripted"  # transformers answers for it
model = add_lora(small, PRESETS["tiny"]).eval()
'''
WINDOW = """
chat = Chat(model, tokenizer, max_new_tokens=250)
ui = ChatUI(chat)
ui
"""


@pytest.fixture(scope="module")
def window(lab):
    folder, open_ = lab
    (folder / "chat.ipynb").write_text(json.dumps(notebook(CHAT, WINDOW)))
    page = open_("chat.ipynb")
    warnings = "[data-mime-type='application/vnd.jupyter.stderr']"
    assert page.locator(f".jp-OutputArea {warnings}").count() == 0
    page.locator(".dl-chat").wait_for()
    yield page
    close(page)


@pytest.fixture
def chat(window):
    """The window with an empty conversation."""
    if window.locator(".dl-stop").is_enabled():
        window.locator(".dl-stop").click()
    wait_until_idle(window)
    window.locator(".dl-clear").click()
    window.wait_for_function("!document.querySelector('.dl-page .dl-user')")
    return window


def wait_until_idle(page, seconds=30):
    page.wait_for_function("""!document.querySelector('.dl-send').disabled
        && document.querySelector('.dl-stop').disabled""", timeout=seconds * 1000)


def wait_until_busy(page):
    page.wait_for_function("""document.querySelector('.dl-send').disabled
        && !document.querySelector('.dl-stop').disabled""", timeout=10_000)


def answer(page):
    """The lowest one on the page."""
    return page.evaluate("""() => {
        const bottom = e => e.getBoundingClientRect().bottom;
        const answers = [...document.querySelectorAll('.dl-page .dl-answer')];
        return answers.sort((a, b) => bottom(a) - bottom(b)).pop()?.innerText.trim() ?? '' }""")


def ask(page, text, wait=True):
    """Type, press Enter; `wait` for the whole answer."""
    page.evaluate("""() => {  // an answer may begin and end between two looks
        const send = document.querySelector('.dl-send');
        window.asked = false;
        const look = () => { if (send.disabled) window.asked = true };
        new MutationObserver(look).observe(send, {attributes: true}) }""")
    page.fill(".dl-message input", text)
    page.press(".dl-message input", "Enter")
    page.wait_for_function("window.asked")
    if wait:
        wait_until_idle(page)


def test_enter_sends_and_the_answer_is_whole(chat):
    ask(chat, "Good morning")
    assert "tuned heard: Good morning" in answer(chat)
    assert chat.locator(".dl-page .dl-user").inner_text().endswith("Good morning")
    assert "tok/s" in chat.locator(".dl-status").inner_text()


def growing(page, states, seconds=20):
    """So many states of an answer that is being written."""
    seen, deadline = [""], time.time() + seconds
    while len(seen) <= states and time.time() < deadline:
        now = answer(page)
        if re.search(r"\d", now) and now != seen[-1]:
            seen.append(now)
    return seen[1:]


def test_text_grows_and_stop_keeps_what_is_there(chat):
    ask(chat, "count", wait=False)
    wait_until_busy(chat)
    states = growing(chat, 5)
    assert len(states) == 5
    for before, after in zip(states, states[1:]):
        assert after.startswith(before)
    start = time.time()
    chat.locator(".dl-stop").click()
    wait_until_idle(chat)
    assert time.time() - start < 1
    kept = answer(chat)
    assert "1 2 3" in kept and " 99" not in kept and kept.startswith(states[-1])
    time.sleep(0.5)
    assert answer(chat) == kept                             # nothing comes after
    ask(chat, "And now?")
    assert "tuned heard: And now?" in answer(chat)
    assert chat.locator(".dl-page .dl-answer").count() == 2


def test_a_failing_answer_is_shown_and_the_next_turn_works(chat):
    start = time.time()
    ask(chat, "fail")
    assert time.time() - start < 5
    error = chat.locator(".dl-error")
    assert "the <b>kernel</b> was lost" in error.inner_text()
    ask(chat, "Still there?")
    assert "tuned heard: Still there?" in answer(chat)
    assert not error.is_visible() or "lost" not in error.inner_text()


def test_compare_shows_both_and_the_adapter_is_on_afterwards(chat):
    chat.locator(".dl-compare input").click()
    ask(chat, "Who?")
    base, tuned = chat.locator(".dl-page .dl-base"), chat.locator(".dl-page .dl-tuned")
    assert "base heard: Who?" in base.inner_text()
    assert "tuned heard: Who?" in tuned.inner_text()
    left, right = base.bounding_box(), tuned.bounding_box()
    assert abs(left["y"] - right["y"]) < 5
    assert left["x"] + left["width"] <= right["x"] + 1      # side by side
    take_picture(chat.locator(".dl-chat"), "compare")
    chat.locator(".dl-compare input").click()
    ask(chat, "And now?")
    assert "tuned heard: And now?" in answer(chat)


def test_turns_stand_in_their_order_and_the_end_stays_in_view(chat):
    asked = ["First", "count", "count", "Last"]
    for text in asked:
        ask(chat, text)
    assert chat.locator(".dl-page .dl-user").all_inner_texts() == asked     # as they are read out
    assert chat.evaluate("""() => {
        const page = document.querySelector('.dl-page');
        return page.scrollHeight > page.clientHeight + 20 }""")
    page = chat.locator(".dl-page").bounding_box()
    last = chat.locator(".dl-page .dl-answer").last.bounding_box()
    assert page["y"] < last["y"]
    assert last["y"] + last["height"] <= page["y"] + page["height"]
    take_picture(chat.locator(".dl-chat"), "chat")


@pytest.mark.parametrize("text", HOSTILE)
def test_everything_is_shown_as_it_was_written(chat, text):
    ask(chat, text)
    assert text in chat.locator(".dl-page .dl-user").inner_text()
    assert f"tuned heard: {text}" in answer(chat)
    time.sleep(0.3)                 # an image needs a moment to fail, MathJax to typeset
    assert chat.evaluate("window.owned") is None
    active = "img, script, mjx-container, .MathJax, a[href^='javascript']"
    assert chat.locator(".dl-page").locator(active).count() == 0
    assert chat.locator(".dl-page .dl-answer").count() == 1


# The notebooks

@pytest.fixture(scope="module")
def course(lab):
    """The numbered notebooks with the preset `tiny` and no outputs, in JupyterLab's folder."""
    folder, open_ = lab
    for path in sorted((ROOT / "nbs").glob("0[1-5]_*.ipynb")):
        nb = json.loads(path.read_text())
        for cell in nb["cells"]:
            if cell["cell_type"] == "code":
                cell |= dict(outputs=[], execution_count=None)
            if "parameters" in cell["metadata"].get("tags", []):
                source = "".join(cell["source"])
                assert 'preset: str = "demo"' in source
                cell["source"] = source.replace('preset: str = "demo"', 'preset: str = "tiny"')
        (folder / path.name).write_text(json.dumps(nb))
    if (ROOT / "nbs/images").exists():
        shutil.copytree(ROOT / "nbs/images", folder / "images")
    return open_


FIGURES = {"01_data": 2, "02_train": 2, "03_eval": 5, "04_chat": 0, "05_report": 0}   # at least


@pytest.mark.parametrize("name", FIGURES)
def test_run_all(course, name):
    """Each notebook runs on what the one before left."""
    page = course(f"{name}.ipynb")
    if name == "04_chat":
        page.locator(".dl-chat").first.wait_for()
    if SCREENSHOTS:
        picture_of_all(page, Path(SCREENSHOTS) / f"{name}.png")
    assert page.evaluate("""() => {
        const cells = jupyterapp.shell.currentWidget.content.widgets.map(c => c.model);
        return cells.filter(m => m.type === 'code').flatMap(m => m.sharedModel.outputs)
            .filter(o => o.output_type === 'error').map(o => `${o.ename}: ${o.evalue}`) }""") == []
    assert page.locator(".jp-OutputArea-output img").count() >= FIGURES[name]
    too_wide = page.evaluate("""() => {
        const output = '.jp-OutputArea-output';
        return [...document.querySelectorAll(`${output}, ${output} .widget-box`)]
            .filter(e => e.scrollWidth > e.clientWidth + 1)
            .map(e => `${e.scrollWidth} > ${e.clientWidth}: ${e.innerText.slice(0, 80)}`) }""")
    assert too_wide == []
    close(page)


def picture_of_all(page, path):
    """A whole notebook in one picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    height = page.evaluate("""() => [...document.querySelectorAll('.jp-Notebook .jp-Cell')]
        .reduce((sum, e) => sum + e.offsetHeight, 0)""")
    tallest = 16_000                                        # chromium paints up to 16384 pixels
    page.set_viewport_size(dict(width=1280, height=min(tallest, height + 300)))
    page.evaluate("""() => document.querySelectorAll('.jp-Notebook, .jp-WindowedPanel-outer')
        .forEach(e => e.scrollTop = 0)""")
    time.sleep(1)
    page.screenshot(path=path)
    page.set_viewport_size(dict(width=1280, height=1000))


# Hostile texts

class HostileJudge(http.server.BaseHTTPRequestHandler):
    """Says the hostile texts, and a rating and a verdict with them."""
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        message = dict(content=" ".join(HOSTILE) + " [[5]] [[A]]")
        body = json.dumps(dict(choices=[dict(message=message)])).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def hostile_judge():
    """A judge behind an endpoint: its address."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), HostileJudge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def hostile_run(chromium, hostile_judge, judge_env, tmp_path_factory):
    """A run in which records, categories, answers, base model, judge and its replies are by
    somebody who means harm: (its folder, the process)."""
    from tokenizers import Regex, decoders
    from dolly_lora.models import tiny_model, tiny_tokenizer
    folder = tmp_path_factory.mktemp("hostile")
    base, tokenizer = folder / HOSTILE[0], tiny_tokenizer()
    whatever_it_says = decoders.Replace(Regex(r"[\s\S]+"), " ".join(HOSTILE))
    tokenizer.backend_tokenizer.decoder = decoders.Sequence(
        [decoders.ByteLevel(), whatever_it_says])
    tiny_model().save_pretrained(base)
    tokenizer.save_pretrained(base)
    rows = [dict(instruction=f"<eos> {text} {i}", context=text if i % 2 else "",
                 response=f"{text} {i}", category=text)
            for text in HOSTILE for i in range(12)]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = folder / "run"
    return run, cli("run", "tiny", "--run-dir", run, "--dataset", data,
                    "--set", f"base={base}", f"judge={HOSTILE[1]}",
                    env=judge_env | dict(OPENAI_API_KEY="none", OPENAI_BASE_URL=hostile_judge))


def offline_page(chromium):
    """A page whose own scripts (MathJax), which lie elsewhere, are not fetched."""
    page = chromium.new_page()
    page.route(re.compile("^https?:"), lambda route: route.abort())
    return page


def page_of(run, name, folder):
    """A stage's notebook as nbconvert writes it, which trusts every output, or the report."""
    from nbconvert import HTMLExporter
    if name == "report":
        return run / "report/report.html"
    path = folder / f"{name}.html"
    path.write_text(HTMLExporter().from_filename(str(run / f"notebooks/{name}.ipynb"))[0])
    return path


def harmless(page):
    """Nothing of a text has become part of the page."""
    assert page.evaluate("window.owned") is None
    assert page.evaluate("""() => {
        const active = "img[src='x'], [onerror], a[href^='javascript']";
        return [...document.querySelectorAll(active)].map(e => e.outerHTML) }""") == []
    assert page.evaluate("""() => [...document.querySelectorAll('script')]
        .filter(e => e.textContent.trim() === 'window.owned=1').length""") == 0


def test_a_hostile_run_ends(hostile_run):
    run, done = hostile_run
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert HOSTILE[2] in (run / "judgments/replies.jsonl").read_text()


@pytest.mark.parametrize("name", [*FIGURES, "report"])
def test_hostile_texts_are_shown_and_do_nothing(chromium, hostile_run, name, tmp_path):
    page, dialogs = offline_page(chromium), []
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    page.goto(page_of(hostile_run[0], name, tmp_path).as_uri(), wait_until="load")
    page.wait_for_timeout(300)
    harmless(page)
    shown = page.locator("body").inner_text()
    named = HOSTILE[:1] if name == "05_report" else HOSTILE  # 05 names the base and no other
    assert dialogs == [] and [text for text in named if text not in shown] == []
    if name == "03_eval":
        assert "<eos>" in shown                             # in a test record
    page.close()


@pytest.mark.parametrize("name", ["01_data", "02_train", "03_eval", "05_report"])
def test_hostile_texts_in_jupyterlab(lab, hostile_run, name):
    """The same notebooks where MathJax typesets what looks like a formula."""
    folder, open_ = lab
    shutil.copy(hostile_run[0] / f"notebooks/{name}.ipynb", folder / f"hostile_{name}.ipynb")
    page = open_(f"hostile_{name}.ipynb", run=False)
    page.locator(".jp-OutputArea-output").first.wait_for()
    page.wait_for_timeout(1500)                             # to typeset
    harmless(page)
    formulas = page.locator(".jp-OutputArea-output :is(mjx-container, .MathJax)")
    assert formulas.all_inner_texts() == []
    close(page)


def test_left_out_tests_say_what_and_why_and_how_to_have_them(tmp_path):
    env = {name: value for name, value in os.environ.items() if name != "CHROMIUM"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", __file__,
         "-k", "hostile"], cwd=ROOT, env=env | {"PATH": str(tmp_path)}, capture_output=True,
        text=True)
    assert done.returncode == 0, done.stdout
    for told in LEFT_OUT, "apt-get install chromium", "CHROMIUM":
        assert told in done.stdout
