"""`make site`: built, then read in a browser that reaches no network."""
import functools
import html.parser
import http.server
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import threading

import pytest

from conftest import ROOT

BADGE = "https://colab.research.google.com/assets/colab-badge.svg"   # the one outside request
BROWSERS = os.environ.get("CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome"
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
NEEDS = "zensical", "latex2mathml", "mdit_py_plugins"
PAGES = sorted(p.stem for p in (ROOT / "nbs").glob("*.ipynb"))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder that `make site` writes."""
    if missing := [name for name in NEEDS if importlib.util.find_spec(name) is None]:
        pytest.skip(f"left out: the site; {', '.join(missing)} not installed: "
                    "make .venv/.site (Python 3.11 or newer)")
    folder = tmp_path_factory.mktemp("site") / "_docs"
    subprocess.run([sys.executable, ROOT / "tools" / "site.py", folder], check=True, cwd=ROOT)
    return folder


@pytest.fixture(scope="module")
def address(site):
    """Where the site is served on this machine."""
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture
def page(address):
    """A page of a browser for which there is nothing but the site; what it asked for in vain."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("left out: the site in a browser; no chromium here: apt-get install chromium, "
                    "or set CHROMIUM to the path of a Chrome")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport=dict(width=1280, height=900))
        page.set_default_timeout(20_000)
        page.refused = []

        def only_the_site(route):
            url = route.request.url
            if url.startswith(address):
                return route.continue_()
            page.refused.append(url)
            return route.abort()

        page.route("**/*", only_the_site)
        yield page
        browser.close()


class Links(html.parser.HTMLParser):
    """Targets inside the site, of a page's links, pictures, scripts and styles."""

    def __init__(self, text):
        super().__init__()
        self.targets = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name in ("src", "href") and not re.match(r"[a-z]+:|#|//", value):
                self.targets.append(value.partition("#")[0].partition("?")[0])


def test_every_notebook_and_module_has_a_page(site):
    from dolly_lora import data
    for name in PAGES:
        assert (site / f"{name}.html").exists()
    text = (site / "api" / "data.html").read_text()
    for name in data.__all__:
        assert f'id="{name.lower()}"' in text
    assert "earlier (instruction, response) pairs" in text      # a docment


def test_links_lead_to_pages(site):
    missing = [f"{path.name}: {target}" for path in site.rglob("*.html")
               if path.name != "404.html" for target in Links(path.read_text()).targets
               if target and not (path.parent / target).exists()]
    assert missing == []


def test_reads_without_a_network(page, address):
    for name in "index", "02_train", "02b_kernels", "api/engine.step":
        page.goto(f"{address}/{name}.html")
        assert page.locator("h1").count() == 1
    assert set(page.refused) <= {BADGE}


def test_formulas_tables_and_answers_are_drawn(page, address):
    page.goto(f"{address}/02b_kernels.html")
    assert page.locator("math").count() > 5
    page.goto(f"{address}/index.html")
    reads = page.get_by_role("row").filter(has_text="training_history.json")
    assert reads.filter(has=page.get_by_role("link", name="03_eval")).count() == 1
    page.goto(f"{address}/01_data.html")
    answer = page.locator("details", has=page.get_by_text("Hint and answer")).first
    assert answer.locator("p").first.is_hidden()
    answer.locator("summary").click()
    assert answer.locator("p").first.is_visible()
    page.goto(f"{address}/api/config.html")
    assert page.locator("h2#resolve").count() == 1
    assert page.get_by_role("cell", name="overrides", exact=True).count() > 0


def test_search_finds_the_reference(page, address):
    page.goto(f"{address}/index.html")
    page.get_by_role("button", name="Search").click()
    page.get_by_role("combobox", name="Search").fill("last_checkpoint")
    found = page.get_by_role("option").first
    found.wait_for()
    found.click()
    page.wait_for_url("**/api/trainer.html*")
    assert page.locator("h2#last_checkpoint").count() == 1
    assert set(page.refused) <= {BADGE}
