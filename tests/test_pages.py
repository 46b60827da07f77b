"""The pages beside the lessons: glossary, index of pitfalls, and a page for instructors each."""

import json
import re
from pathlib import Path

import nbformat
import pytest

from tests.notebook_rules import broken, links
from tools import glossary, notebooks, slides

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "notebooks"
LESSONS = sorted(FOLDER.glob("[0-9][0-9]_*.ipynb"))
PAGES = [
    FOLDER / "glossary.md",
    FOLDER / "pitfalls.md",
    FOLDER / "claims.md",
    *sorted((ROOT / "instructor").glob("*.md")),
]
GLOSSARY = (FOLDER / "glossary.md").read_text(encoding="utf-8")


def cells(lesson: Path) -> list[dict]:
    return json.loads(lesson.read_text(encoding="utf-8"))["cells"]


def text(cell: dict) -> str:
    return "".join(cell["source"])


def sections(lesson: Path) -> list[str]:
    """The headings `## …` of a lesson, in their order."""
    return list(notebooks.sections(lesson))[1:]


@pytest.mark.integration
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_a_page_lead_somewhere(page: Path):
    source = page.read_text(encoding="utf-8")
    found = {link: broken(link, nbformat.v4.new_notebook(), page) for link in links(source)}
    assert found and not {link: why for link, why in found.items() if why}


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.stem)
def test_the_slides_can_draw_each_flow_chart(lesson: Path):
    markdown = "\n".join(text(cell) for cell in cells(lesson) if cell["cell_type"] == "markdown")
    for chart in re.findall(r"```mermaid\n(.*?)```", markdown, re.DOTALL):
        assert slides.flow(chart).count("<b>") >= 2


# --- Glossary and pitfalls -----------------------------------------------------------------------


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.stem)
def test_a_lesson_names_its_words(lesson: Path):
    summary = next(text(cell) for cell in cells(lesson) if cell["id"] == "summary")
    words = glossary.terms(GLOSSARY)[lesson.name]
    assert glossary.updated(summary, words) == summary, "Run: make format"
    assert f"**Words** explained here: [{words[0]}]" in summary


def test_words_are_in_alphabetical_order_each_once():
    words = re.findall(r"^### (.+)$", GLOSSARY, re.MULTILINE)
    assert len(words) > 80 and words == sorted(set(words), key=str.lower)


def test_a_word_belongs_to_the_lesson_that_its_text_links_first():
    found = glossary.terms(
        "# G\n\n### a\n\nIt [is](01_x.ipynb), [too](02_y.ipynb).\n\n### b c\n\nNo.\n"
    )
    assert found == {"01_x.ipynb": ["a"], "": ["b c"]}


def test_the_line_of_words_is_replaced_not_doubled():
    once = glossary.updated("## Summary\n\n- x\n\n**Next:** y", ["a b"])
    assert once.count("[a b](glossary.md#a-b)") == 1 and once.endswith("**Next:** y")
    assert glossary.updated(once, ["c"]).count("**Words**") == 1


def test_pitfalls_name_sections_that_there_are():
    source = (FOLDER / "pitfalls.md").read_text(encoding="utf-8")
    wrong = []
    for label, target in re.findall(r"\[(lesson \d[^\]]*)\]\((\w+\.ipynb)\)", source):
        numbers = {
            int(n) for n in re.findall(r"(?:sections?|and|,) (\d+)", label.split(",", 1)[-1])
        }
        there = {
            int(n) for n in re.findall(r"^(\d+)\. ", "\n".join(sections(FOLDER / target)), re.M)
        }
        assert target.startswith(f"{int(label.split()[1].strip(',')):02}")
        wrong += [label] if numbers - there else []
    assert source.count("](0") > 60 and not wrong


# --- Instructors ---------------------------------------------------------------------------------


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.stem)
def test_an_instructors_page_plans_every_section(lesson: Path):
    page = (ROOT / "instructor" / f"{lesson.stem}.md").read_text(encoding="utf-8")
    plan = page[page.index("## Plan") : page.index("## What students predict wrongly")]
    rows = re.findall(r"^\| (.+?) \| (\d+) \|", plan, re.MULTILINE)
    assert [name for name, _ in rows] == sections(lesson)
    total = sum(int(minutes) for _, minutes in rows)
    assert f"**In all: {total} minutes**" in plan
    wanted = ("Questions to ask", "Reset points", "When a cell fails in class")
    assert all(f"\n## {part}\n" in page for part in wanted)


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.stem)
def test_an_instructors_page_names_cells_that_there_are(lesson: Path):
    page = (ROOT / "instructor" / f"{lesson.stem}.md").read_text(encoding="utf-8")
    table = page[page.index("## What students predict wrongly") : page.index("## Questions to ask")]
    named = set(re.findall(r"\(`([a-z][\w-]*)`\)", table))
    assert named and named <= {cell["id"] for cell in cells(lesson)}


# --- Times ---------------------------------------------------------------------------------------

MEASURED = json.loads((ROOT / "data" / "benchmarks.json").read_text(encoding="utf-8"))["lessons"]
SAID = {  # seconds from, to
    "less than a minute": (0, 60),
    "about a minute": (30, 75),
    "a good minute": (50, 90),
    "a minute and a half": (60, 120),
    "about two minutes": (75, 150),
}


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.stem)
def test_a_lesson_takes_the_time_that_it_says(lesson: Path):
    title = text(cells(lesson)[0])
    said = re.search(r"\*\*Takes\*\* (.+?) of computing on two CPU cores", title)[1]
    least, most = SAID[said]
    assert least <= sum(MEASURED[lesson.stem]["sections"].values()) <= most


def test_all_lessons_together_take_at_most_fifteen_minutes():
    assert set(MEASURED) == {lesson.stem for lesson in LESSONS}
    assert sum(sum(one["sections"].values()) for one in MEASURED.values()) <= 15 * 60


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.stem)
def test_a_cell_that_takes_long_shows_how_far_it_is(lesson: Path):
    sources = {cell["id"]: text(cell) for cell in cells(lesson)}
    # Those of sftlib show one.
    shows = ("progress_bar(", "ppo.train(", "tune(", "prepare(", "launch(")
    for name in MEASURED[lesson.stem]["long"]:
        assert any(call in sources[name] for call in shows), name
