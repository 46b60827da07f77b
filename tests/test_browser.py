"""The lessons in JupyterLab, in a real browser: run from top to bottom, drawn, without an error.

`make test` runs the beginning of one so, `make test-all` and `make browser` all of them, whole;
screenshots lie in `build/`.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import nbformat
import pytest

from tools import browser, copies, lab, notebooks

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "build" / "screenshots"
LESSONS = [path.stem for path in notebooks.find() if path.parent.name == "notebooks"]
# What no training is needed for: coloured tokens and tables. It has no figure: one is added.
BEGINNING = ("03_chatml", "bugs-text")
FIGURE = """viz.curves({"made up": ([1, 2], [3.0, 2.5])}, "A figure", "A line that falls.")"""
HEIGHT = 2400  # pixels: few screenfuls to a lesson
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
)

MARKED = "text-decoration:underline"  # how `viz` marks a token that is learned
SCROLL = """top => {
  const all = [...document.querySelectorAll('.jp-WindowedPanel-outer')];
  const outer = all.find(one => one.scrollHeight > one.clientHeight) || all[0];
  outer.scrollTop = top;
  return outer.scrollHeight - outer.clientHeight / 2;
}"""
SEEN = (ROOT / "tests" / "seen.js").read_text(encoding="utf-8")

pytestmark = pytest.mark.skipif(bool(browser.missing()), reason=browser.missing() or "-")


@dataclass(frozen=True)
class Lab:
    """A JupyterLab that runs on a copy of the lessons."""

    url: str
    token: str
    root: Path

    def api(self, path: str) -> list | dict:
        return json.loads(self._send("GET", f"api/{path}"))

    def theme(self, name: str) -> None:
        """From the next page on."""
        plugin = "@jupyterlab/apputils-extension:themes"
        self._send("PUT", f"lab/api/settings/{plugin}", {"raw": json.dumps({"theme": name})})

    def _send(self, method: str, path: str, body: dict | None = None) -> bytes:
        request = urllib.request.Request(
            f"{self.url}/{path}",
            method=method,
            data=json.dumps(body).encode() if body else None,
            headers={"Authorization": f"token {self.token}"},
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.read()


@pytest.fixture(scope="module")
def jupyterlab(tmp_path_factory) -> Iterator[Lab]:
    """As `make lab` starts it, on a copy: what is run here is not stored in the repository."""
    root = copies.course(tmp_path_factory.mktemp("course"), "notebooks")
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        port = trial.getsockname()[1]
    command = lab.command(port, os.geteuid() == 0, display=False)
    command = [part.replace(f"root_dir={ROOT}", f"root_dir={root}") for part in command]
    settings = os.environ | lab.settings() | {"SFT_NO_BARS": "1", "SFT_TEACHER": "recording"}
    settings |= {f"JUPYTERLAB_{it}_DIR": str(root / it) for it in ("SETTINGS", "WORKSPACES")}
    settings.pop("PYTEST_CURRENT_TEST", None)
    log = root / "log.txt"
    with log.open("w") as out:
        server = subprocess.Popen(
            command, cwd=root, env=settings, stdout=out, stderr=out, start_new_session=True
        )
    try:
        yield Lab(f"http://127.0.0.1:{port}", _token(log, server), root)
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


def _token(log: Path, server: subprocess.Popen) -> str:
    for _ in range(240):
        if found := re.search(r"\?token=(\w+)", log.read_text()):
            return found[1]
        assert server.poll() is None, log.read_text()[-2000:]
        time.sleep(0.25)
    raise AssertionError(f"JupyterLab did not start: {log.read_text()[-2000:]}")


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        started = play.chromium.launch(executable_path=browser.chromium(), args=FLAGS)
        yield started
        started.close()


def open_page(chromium, jupyterlab: Lab, path: str, width: int = 1440):
    page = chromium.new_page(viewport={"width": width, "height": HEIGHT})
    # without the tabs that an earlier page left
    page.goto(f"{jupyterlab.url}/lab/tree/{path}?reset&token={jupyterlab.token}")
    return page


def wait_for(what: str, condition, seconds: float = 60):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"after {seconds:.0f} s: not yet {what}"
        time.sleep(0.25)
    return found


def kernel_is_idle(jupyterlab: Lab, name: str) -> bool:
    return any(
        one["path"].endswith(f"{name}.ipynb")
        and one["kernel"]["execution_state"] == "idle"
        and one["kernel"]["connections"]
        for one in jupyterlab.api("sessions")
    )


def run_all(page, jupyterlab: Lab, name: str, seconds: float) -> list[dict]:
    """Run every cell of the open lesson, save, and return the cells as they were saved."""
    wait_for("a kernel", lambda: kernel_is_idle(jupyterlab, name))
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    path = f"contents/notebooks/{name}.ipynb?content=1"
    count = sum(cell["cell_type"] == "code" for cell in jupyterlab.api(path)["content"]["cells"])

    def finished():
        page.keyboard.press("Control+s")
        page.wait_for_timeout(1000)
        cells = [c for c in jupyterlab.api(path)["content"]["cells"] if c["cell_type"] == "code"]
        done = [cell["execution_count"] for cell in cells] == list(range(1, count + 1))
        return done and kernel_is_idle(jupyterlab, name) and _nothing_waits(page)

    wait_for(f"the end of lesson {name}", finished, seconds)
    page.keyboard.press("Control+s")
    page.wait_for_timeout(1500)
    return [c for c in jupyterlab.api(path)["content"]["cells"] if c["cell_type"] == "code"]


def _nothing_waits(page) -> bool:
    """Whether no cell in the page is marked as running or queued."""
    return page.get_by_text("[*]:", exact=True).count() == 0


def outputs(cells: list[dict], kind: str) -> list:
    return [out for cell in cells for out in cell["outputs"] if kind in out.get("data", {})]


@pytest.mark.integration
def test_the_beginning_of_a_lesson_runs_and_is_drawn(chromium, jupyterlab: Lab):
    name, end = BEGINNING
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", 4)
    del notebook.cells[[cell.id for cell in notebook.cells].index(end) :]
    notebook.cells.append(nbformat.v4.new_code_cell(FIGURE, id="figure"))
    nbformat.write(notebook, jupyterlab.root / "notebooks" / "short.ipynb")
    stored = [cell for cell in notebook.cells if cell.cell_type == "code"]
    stored[-1]["outputs"] = [{"data": {"image/png": ""}}]
    figures, tokens = run_and_look(chromium, jupyterlab, "short", stored)
    assert figures == 1 and tokens > 0


@pytest.mark.nightly
@pytest.mark.parametrize("name", LESSONS)
def test_a_lesson_runs_from_top_to_bottom(name: str, chromium, jupyterlab: Lab):
    stored = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text())["cells"]
    stored = [cell for cell in stored if cell["cell_type"] == "code"]
    seen = run_and_look(chromium, jupyterlab, name, stored)
    jupyterlab.theme("JupyterLab Dark")
    try:
        page = open_page(chromium, jupyterlab, f"notebooks/{name}.ipynb", width=800)
        assert look_through(page, f"{name}-dark") == seen
        assert page.evaluate("document.body.dataset.jpThemeLight") == "false"
        page.close()
    finally:
        jupyterlab.theme("JupyterLab Light")


def run_and_look(chromium, jupyterlab: Lab, name: str, stored: list[dict]) -> tuple[int, int]:
    """Run a notebook; it has as many figures, tables and coloured tokens as are stored of it.

    Returns:
        How many figures there were, and how many marked tokens.
    """
    page = open_page(chromium, jupyterlab, f"notebooks/{name}.ipynb")
    cells = run_all(page, jupyterlab, name, seconds=1200)
    wrong = [
        (cell["id"], out["ename"], out["evalue"][:300])
        for cell in cells
        for out in cell["outputs"]
        if out["output_type"] == "error"
        and "raises-exception" not in cell["metadata"].get("tags", [])
    ]
    assert not wrong
    for kind in ("image/png", "text/html"):  # figures, and tables or coloured tokens
        assert len(outputs(cells, kind)) == len(outputs(stored, kind)), kind
    figures, tokens = look_through(page, name)
    page.close()
    assert figures == len(outputs(stored, "image/png"))
    coloured = [
        one for one in outputs(stored, "text/html") if MARKED in "".join(one["data"]["text/html"])
    ]
    assert (tokens > 0) == bool(coloured)
    return figures, tokens


def look_through(page, name: str) -> tuple[int, int]:
    """Scroll from the top to the end, with a screenshot of each screenful.

    Figures are drawn, nothing is cut off at the side, and coloured text can be read.

    Returns:
        How many figures there were, and how many marked tokens.
    """
    folder = PICTURES / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    page.wait_for_selector(".jp-Notebook .jp-MarkdownCell", timeout=60_000)
    page.wait_for_timeout(2000)
    if page.locator(".jp-SideBar .lm-mod-current[data-id='filebrowser']").count():
        page.keyboard.press("Control+b")  # in a narrow window the list of files is in the way
    figures, tokens, top, end = set(), set(), 0, 1
    while top < end:
        end = page.evaluate(SCROLL, top)
        page.wait_for_timeout(500)
        page.screenshot(path=folder / f"{top:06}.png")
        seen = page.evaluate(SEEN)
        assert not seen["wrong"], f"{name}, {top} pixels down: {seen['wrong'][:5]}"
        figures |= set(seen["figures"])
        tokens |= set(seen["tokens"])
        top += HEIGHT - 200
    return len(figures), len(tokens)


# --- Predictions ---------------------------------------------------------------------------------

SET_UP = """import os
from pathlib import Path

from sftlib import lesson
from sftlib.lesson import predictions

for name in ("CI", "SFT_NO_BARS", "PYTEST_CURRENT_TEST"):  # somebody looks
    os.environ.pop(name, None)
predictions.KEPT = Path("../work/predictions.jsonl")
lesson.begin("NAME")"""
QUESTIONS = {
    "setup": SET_UP,
    "ask": 'lesson.predict("ask", "What will it say?", "the answer", "`42`", "no answer at all")',
    "share": 'lesson.predict("share", "How often is it right?", number="%", low=0, high=100)',
    "told": 'lesson.outcome("ask", 3)\nlesson.outcome("share", 97.3, tolerance=10)',
}
FOCUSED = "it => it == document.activeElement"
RINGED = """it => {
  const style = getComputedStyle(it);
  return style.outlineStyle == 'solid' && parseFloat(style.outlineWidth) >= 2;
}"""  # the focus can be seen


@pytest.fixture
def asking(chromium, jupyterlab: Lab, request):
    """A page with two questions, whose set-up cell was run. It fetches nothing from elsewhere."""
    name = request.node.name
    cells = [
        nbformat.v4.new_code_cell(text.replace("NAME", name), id=cell_id)
        for cell_id, text in QUESTIONS.items()
    ]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
    nbformat.write(notebook, jupyterlab.root / "notebooks" / f"{name}.ipynb")
    kept = jupyterlab.root / "work" / "predictions.jsonl"
    kept.unlink(missing_ok=True)
    page = open_page(chromium, jupyterlab, f"notebooks/{name}.ipynb")
    fetched: list[str] = []
    page.on("request", lambda one: fetched.append(one.url))
    wait_for("a kernel", lambda: kernel_is_idle(jupyterlab, name))
    page.locator(".jp-CodeCell .jp-InputPrompt").first.click()
    page.keyboard.press("Shift+Enter")
    yield page
    page.close()
    there = ("data:", "blob:", jupyterlab.url)
    assert not [url for url in fetched if not url.startswith(there)]


def kept_by(jupyterlab: Lab) -> dict[str, tuple]:
    """What is kept of each prediction: the answer, and whether it was right."""
    path = jupyterlab.root / "work" / "predictions.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {row["id"]: (row["predicted"], row["right"]) for row in rows}


def saved(page, jupyterlab: Lab, name: str) -> dict:
    page.keyboard.press("Control+s")
    page.wait_for_timeout(1500)
    return jupyterlab.api(f"contents/notebooks/{name}.ipynb?content=1")["content"]


def look_at_form(page, name: str) -> None:
    """Nothing in it is cut off, and its text can be read."""
    page.wait_for_timeout(1000)
    PICTURES.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=PICTURES / f"{name}.png")
    assert page.evaluate(SEEN)["wrong"] == []


def tab_to(page, target, key: str = "Tab") -> None:
    """Press the key until `target` has the focus; the cell's toolbar may lie between."""
    for _ in range(8):
        page.keyboard.press(key)
        if target.evaluate(FOCUSED):
            return
    raise AssertionError(f"{target} cannot be reached by {key}")


@pytest.mark.integration
def test_a_prediction_is_made_by_mouse(asking, jupyterlab: Lab, request):
    page = asking
    page.keyboard.press("Shift+Enter")
    page.get_by_role("button", name="1. the answer").click()
    wait_for("the choice", lambda: kept_by(jupyterlab) == {"ask": ("the answer", None)})
    page.get_by_role("button", name="2. 42").click()
    wait_for("another choice", lambda: kept_by(jupyterlab) == {"ask": ("`42`", None)})
    chosen = page.get_by_role("button", name="✓ 2. 42")
    said = "Predicted: What will it say?"
    wait_for("the mark", lambda: chosen.get_attribute("title") == said)
    look_at_form(page, "prediction")
    saved(page, jupyterlab, request.node.name)
    jupyterlab.theme("JupyterLab Dark")
    try:
        page.reload()  # the kernel stays, and so does the form
        chosen.wait_for(timeout=60_000)
        look_at_form(page, "prediction-dark")
    finally:
        jupyterlab.theme("JupyterLab Light")
    page.locator(".jp-CodeCell .jp-InputPrompt").nth(2).click()
    page.keyboard.press("Shift+Enter")
    field = page.get_by_role("textbox", name="A number from 0 to 100 %:")
    field.fill("eighty")
    page.locator(".jp-CodeCell .jp-InputPrompt").nth(3).click()
    alert = page.get_by_role("alert").filter(has_text="found 'eighty'")
    alert.wait_for(timeout=60_000)
    field.fill("80 %")
    page.locator(".jp-CodeCell .jp-InputPrompt").nth(3).click()
    wait_for("the number", lambda: kept_by(jupyterlab).get("share") == (80, None))
    page.keyboard.press("Shift+Enter")
    page.get_by_text("Wrong: you predicted 80 %, but it was 97.3 %").wait_for(timeout=60_000)
    page.get_by_text('Wrong: you predicted "`42`", but it was "no answer at all".').wait_for()
    assert kept_by(jupyterlab) == {"ask": ("`42`", False), "share": (80, False)}
    assert chosen.is_disabled()  # loaded again, the page does not replace it
    assert "widgets" not in saved(page, jupyterlab, request.node.name)["metadata"]


@pytest.mark.integration
def test_a_prediction_is_made_by_keyboard(asking, jupyterlab: Lab, request):
    page = asking
    page.keyboard.press("Control+Enter")  # the cell stays selected
    first = page.get_by_role("button", name="1. the answer")
    first.wait_for(timeout=60_000)
    tab_to(page, first)
    assert first.evaluate(RINGED)
    page.keyboard.press("Enter")
    wait_for("the choice", lambda: kept_by(jupyterlab) == {"ask": ("the answer", None)})
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    wait_for("another choice", lambda: kept_by(jupyterlab) == {"ask": ("no answer at all", None)})
    third = page.get_by_role("button", name="✓ 3. no answer at all")
    assert third.evaluate(FOCUSED) and third.evaluate(RINGED)
    page.keyboard.press("ArrowDown")  # JupyterLab's: to the next cell
    page.keyboard.press("Control+Enter")
    field = page.get_by_role("textbox", name="A number from 0 to 100 %:")
    field.wait_for(timeout=60_000)
    tab_to(page, field)
    assert field.evaluate(RINGED)
    page.keyboard.type("90")
    page.keyboard.press("Enter")
    wait_for("the number", lambda: kept_by(jupyterlab).get("share") == (90, None))
    tab_to(page, page.locator(".jp-Cell.jp-mod-active"), "Shift+Tab")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Shift+Enter")
    page.get_by_text("Right: you predicted 90 %, and it was 97.3 %").wait_for(timeout=60_000)
    assert kept_by(jupyterlab) == {"ask": ("no answer at all", True), "share": (90, True)}
    assert page.locator(".sft-prediction").count() == 0
    stored = saved(page, jupyterlab, request.node.name)
    assert "widget" not in json.dumps(stored) and "this counts" in json.dumps(stored)


@pytest.mark.integration
def test_a_claim_is_one_line_and_its_code_is_folded(chromium, jupyterlab: Lab):
    printed = nbformat.v4.new_output("stream", name="stdout", text="✓ Half of it is so: 50%\n")
    claim = nbformat.v4.new_code_cell("lesson.claim('Half of it is so', share == 0.5)")
    claim.outputs = [printed]
    seen = nbformat.v4.new_code_cell("share = 1 / 2")
    notebook = nbformat.v4.new_notebook(cells=[seen, claim])
    assert notebooks.fold(notebook) == [claim.id]
    nbformat.write(notebook, jupyterlab.root / "notebooks" / "folded.ipynb")
    page = open_page(chromium, jupyterlab, "notebooks/folded.ipynb")
    page.get_by_text("✓ Half of it is so: 50%").wait_for(timeout=60_000)
    code = page.locator(".jp-CodeCell .jp-InputArea-editor:visible")
    assert "share = 1 / 2" in code.all_inner_texts()[0] and code.count() == 1
    page.close()


@pytest.mark.integration
def test_the_server_asks_for_its_token(jupyterlab: Lab):
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(f"{jupyterlab.url}/api/contents", timeout=10)


@pytest.mark.nightly
def test_pages_beside_the_lessons_open_as_pages_not_as_source(chromium, jupyterlab: Lab):
    page = open_page(chromium, jupyterlab, "notebooks/01_what_is_sft.ipynb")
    page.get_by_role("link", name="this index").click()
    viewer = page.locator(".jp-MarkdownViewer h1")
    viewer.wait_for(timeout=60_000)
    assert viewer.inner_text().startswith("When something goes wrong")
    page.close()
    page = open_page(chromium, jupyterlab, "notebooks/glossary.md")
    page.locator(".jp-MarkdownViewer h3").first.wait_for(timeout=60_000)
    PICTURES.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=PICTURES / "glossary.png")
    page.close()
