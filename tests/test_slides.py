"""Slides of the lessons: whole, and open without a network. `make slides` installs their parts."""

import json
import re
from pathlib import Path

import pytest

from tools import browser, slides

ROOT = Path(__file__).parents[1]
LESSONS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))

pytestmark = pytest.mark.skipif(
    not slides.PARTS.exists(), reason="reveal.js is not installed (make slides installs it)"
)


def notebook(*cells: dict) -> dict:
    title = {"cell_type": "markdown", "id": "title", "source": ["# Lesson 1: A & B\n"]}
    return {"cells": [title, *cells]}


def code(source: str, *outputs: dict, tags: tuple[str, ...] = ()) -> dict:
    cell = {"cell_type": "code", "id": "x", "source": [source], "outputs": list(outputs)}
    return cell | {"metadata": {"tags": list(tags)}}


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> dict[str, str]:
    """The text of all slides, by lesson."""
    folder = tmp_path_factory.mktemp("slides")
    target, slides.TARGET = slides.TARGET, folder
    root, slides.ROOT = slides.ROOT, folder
    (folder / "notebooks").symlink_to(ROOT / "notebooks")
    (folder / "instructor").symlink_to(ROOT / "instructor")
    try:
        assert slides.main() == 0
    finally:
        slides.TARGET, slides.ROOT = target, root
    return {path.stem: path.read_text(encoding="utf-8") for path in folder.glob("*.html")}


def test_every_lesson_has_slides(written):
    assert sorted(written) == [path.stem for path in LESSONS]


def test_nothing_is_fetched(written):
    fetched = re.compile(
        r"<(?:script|img|link|iframe)\b[^>]*\b(?:src|href)=\"(?!data:)|@import|url\((?!data:|#)"
    )
    for stem, text in written.items():
        assert not [
            m[0] for m in fetched.finditer(re.sub(r"<script>.*?</script>", "", text, flags=re.S))
        ], stem


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda path: path.stem)
def test_every_cell_has_its_slide(lesson, written):
    cells = json.loads(lesson.read_text(encoding="utf-8"))["cells"]
    texts = ["".join(c["source"]).strip() for c in cells if c["cell_type"] == "markdown"]
    more = sum(text.count("\n## ") for text in texts)
    inner = len(re.findall(r"<section>(?!<section>)", written[lesson.stem]))
    assert inner == len(cells) + more


def test_formulas_charts_links_and_code_are_translated():
    text = slides.prose(
        "A $x^2$, `$5`, [here](a.md), [web](https://a.org).\n\n$$y$$\n\n"
        '```mermaid\nflowchart LR\n    A["one"] -->|"by"| B["two<br/>lines"] --> C\n```'
    )
    assert text.count("<math") == 2 and "<code>$5</code>" in text
    assert "a.md" not in text and 'href="https://a.org"' in text
    assert "<b>one</b> <span>by →</span> <b>two<br/>lines</b> <span> →</span> <b>C</b>" in text


def test_an_output_waits_for_the_next_key():
    printed = {"output_type": "stream", "name": "stdout", "text": ["<2>\n"]}
    ((first, second),) = slides.slides(notebook(code("print('<2>')", printed))["cells"], {})
    assert "Lesson 1" in first and "fragment" not in first
    assert '<div class="output fragment"><pre>&lt;2&gt;' in second


def test_of_a_claim_the_line_is_shown_and_not_its_code():
    printed = {"output_type": "stream", "name": "stdout", "text": ["✓ 2 is 1 + 1\n"]}
    cell = code("lesson.claim('2 is 1 + 1', 1 + 1 == 2)", printed, tags=("claim",))
    ((_, shown),) = slides.slides(notebook(cell)["cells"], {})
    assert shown == '<section><div class="output"><pre>✓ 2 is 1 + 1\n</pre></div></section>'


def test_a_picture_keeps_its_description():
    data = {"image/png": ["iVBORw0KGgo=\n"], "text/plain": ['A curve that "falls"']}
    shown = slides.shown({"output_type": "display_data", "data": data})
    assert (
        shown
        == '<img src="data:image/png;base64,iVBORw0KGgo=" alt="A curve that &quot;falls&quot;">'
    )


def test_the_speaker_sees_what_the_page_says():
    page = "| section | minutes | do |\n|---|---|---|\n| 1. Ask | 9 | Vote first. |\n\n"
    page += (
        "| asked | w | t | s |\n|---|---|---|---|\n| Why? (`x`) | Because. | `y` | It is so. |\n"
    )
    section = {"cell_type": "markdown", "id": "ask-text", "source": ["## 1. Ask\n"]}
    made = slides.slides(notebook(section, code("1"))["cells"], slides.notes_of(page))
    assert "9 minutes. Vote first." in made[1][0]
    assert "Usual wrong answer: Because. Truth:" in made[1][1]


@pytest.mark.integration
@pytest.mark.skipif(bool(browser.missing()), reason=browser.missing() or "-")
def test_slides_open_in_a_browser_without_a_network(written, tmp_path):
    from playwright.sync_api import sync_playwright

    path = tmp_path / "slides.html"
    path.write_text(written["04_lora_vs_full"], encoding="utf-8")
    with sync_playwright() as play:
        started = play.chromium.launch(executable_path=browser.chromium(), args=["--no-sandbox"])
        page = started.new_context(offline=True).new_page()
        wrong = []
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(path.as_uri())
        page.wait_for_function("window.Reveal && Reveal.isReady()")
        assert page.evaluate("Reveal.getTotalSlides()") > 80 and not wrong
        drawn = "[...document.images].every(image => image.complete && image.naturalWidth > 0)"
        assert page.evaluate(f"document.images.length > 3 && {drawn}")
        started.close()
