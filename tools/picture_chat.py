"""The picture of the chat window in the README: base and tuned side by side, from a real browser.

usage: picture_chat.py RUN_DIR [QUESTION ...]; needs chromium and writes nbs/images/chat.png
"""
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from test_browser import ask, notebook, start_chromium, start_lab, wait_until_idle

QUESTIONS = ["Why is the sky blue?"]
WINDOW = """
from pathlib import Path
from dolly_lora.chat import open_chat
from dolly_lora.window import ChatUI
ui = ChatUI(open_chat(Path({run_dir!r})))
ui.settings.compare.value = True
ui
"""


def main(run_dir, questions):
    with tempfile.TemporaryDirectory() as place:
        profile, folder, home = [Path(place) / n for n in ("profile", "notebooks", "jupyter")]
        folder.mkdir()
        home.mkdir()
        cell = WINDOW.format(run_dir=str(run_dir.resolve()))
        (folder / "window.ipynb").write_text(json.dumps(notebook(cell)))
        with start_chromium(profile) as chromium, start_lab(chromium, folder, home) as open_:
            page = open_("window.ipynb")
            page.locator(".dl-chat").wait_for()
            for question in questions:
                ask(page, question, wait=False)
                wait_until_idle(page, seconds=300)
            (ROOT / "nbs/images").mkdir(exist_ok=True)
            page.locator(".dl-chat").screenshot(path=ROOT / "nbs/images/chat.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or QUESTIONS)
