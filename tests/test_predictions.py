"""Predictions: asked for in a form, kept at once, judged by the outcome, and counted."""

import html
import json
from pathlib import Path

from sftlib import lesson
from sftlib.checks import progress
from sftlib.lesson import predictions
from sftlib.lesson.form import VIEW
from sftlib.lesson.questions import Number, Options, Question, plain

import ipywidgets
import numpy as np
import pytest
import torch
from IPython.core.displaypub import DisplayPublisher
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from ipywidgets.widgets.widget import _instances

ASK = ("ask", "What will the model say?", "the right answer", "a wrong answer", "no answer at all")
SCORE = ("score", "Which share will be right?")
PERCENT = {"number": "%", "low": 0, "high": 100}
KEPT = predictions.KEPT  # before a test replaces it


class Page(DisplayPublisher):
    """What a front end would show: the bundles by their id, and which came last."""

    def __init__(self):
        super().__init__()
        self.bundles: dict[str, dict] = {}
        self.last = ""

    def publish(self, data, metadata=None, *, transient=None, update=False, **rest):
        name = (transient or {}).get("display_id", f"output {len(self.bundles)}")
        assert not update or name in self.bundles
        self.bundles[name], self.last = data, name

    @property
    def bundle(self) -> dict:
        return self.bundles[self.last]

    @property
    def form(self) -> ipywidgets.VBox:
        return _instances[self.bundle[VIEW]["model_id"]]

    @property
    def note(self) -> str:
        return self.form.children[-1].value

    def buttons(self) -> list[ipywidgets.Button]:
        return [one for one in self.form.children if isinstance(one, ipywidgets.Button)]

    def click(self, number: int) -> None:
        self.buttons()[number - 1].click()

    def type(self, text: str) -> None:
        (field,) = [one for one in self.form.children if isinstance(one, ipywidgets.Text)]
        field.value = text


@pytest.fixture(autouse=True)
def kept(tmp_path, monkeypatch) -> Path:
    """The file of predictions, in a folder that is not there yet; a lesson has begun."""
    monkeypatch.setattr(predictions, "KEPT", tmp_path / "work" / "predictions.jsonl")
    monkeypatch.setattr(predictions, "_unwritten", {})
    predictions.start("01_what_is_sft")
    yield predictions.KEPT
    predictions.start("")


@pytest.fixture
def page(somebody_comes):
    """Call it: a notebook, and somebody who looks at it."""
    shell = InteractiveShell.instance()
    shell.kernel = object()
    shell.display_pub = Page()

    def come() -> Page:
        somebody_comes()
        return shell.display_pub

    yield come
    InteractiveShell.clear_instance()


def rows(kept: Path) -> list[tuple]:
    return [tuple(json.loads(line).values()) for line in kept.read_text().splitlines()]


def said(capsys, *args, **options) -> str:
    capsys.readouterr()
    lesson.outcome(*args, **options)
    return capsys.readouterr().out


# --- Options -------------------------------------------------------------------------------------


def test_a_choice_is_kept_at_once_and_said_with_the_outcome(page, kept, capsys):
    page = page()
    lesson.predict(*ASK)
    assert not kept.exists()
    page.click(2)
    assert rows(kept) == [("01_what_is_sft", "ask", "a wrong answer", None)]
    line = 'Wrong: you predicted "a wrong answer", but it was "no answer at all".\n'
    assert said(capsys, "ask", 3) == line
    assert rows(kept) == [("01_what_is_sft", "ask", "a wrong answer", False)]


def test_a_right_choice_is_called_right(page, kept, capsys):
    page = page()
    lesson.predict(*ASK)
    page.click(3)
    line = 'Right: you predicted "no answer at all", and it was "no answer at all".\n'
    assert said(capsys, "ask", np.int64(3)) == line
    assert rows(kept)[0][-1] is True


def test_a_second_choice_before_the_outcome_replaces_the_first(page, kept, capsys):
    page = page()
    lesson.predict(*ASK)
    page.click(1)
    page.click(3)
    assert rows(kept) == [("01_what_is_sft", "ask", "no answer at all", None)]
    assert [button.description[0] for button in page.buttons()] == ["1", "2", "✓"]
    assert "You may change it until the outcome is shown" in page.note


def test_after_the_outcome_the_first_choice_counts_and_the_form_is_gone(page, kept, capsys):
    page = page()
    lesson.predict(*ASK)
    page.click(1)
    stale = page.buttons()
    lesson.outcome("ask", 3)
    assert VIEW not in page.bundle and len(page.bundles) == 1
    assert "The outcome was shown: this counts." in page.bundle["text/plain"]
    stale[2].click()  # in a front end that did not follow
    assert rows(kept) == [("01_what_is_sft", "ask", "the right answer", False)]
    assert stale[0].description == "✓ 1. the right answer" and stale[2].description[0] == "3"
    assert all(button.disabled for button in stale)
    assert 'Wrong: you predicted "the right answer"' in said(capsys, "ask", 3)


def test_after_the_outcome_it_is_too_late_until_the_lesson_begins_again(page, kept, capsys):
    page = page()
    lesson.predict(*ASK)
    button = page.buttons()[2]
    assert said(capsys, "ask", 3) == "It was: no answer at all.\n"
    assert "run the set-up cell again" in page.bundle["text/plain"]
    button.click()
    assert not kept.exists() and said(capsys, "ask", 3) == "It was: no answer at all.\n"
    lesson.predict(*ASK)
    assert VIEW not in page.bundle
    predictions.start("01_what_is_sft")
    lesson.predict(*ASK)
    page.click(3)
    assert said(capsys, "ask", 3).startswith("Right: ")


@pytest.mark.parametrize("shown", [False, True])
def test_after_a_restart_the_earlier_choice_is_shown(shown, page, kept):
    page = page()
    lesson.predict(*ASK)
    page.click(2)
    if shown:
        lesson.outcome("ask", 3)
    predictions.start("01_what_is_sft")
    lesson.predict(*ASK)
    assert len(rows(kept)) == 1
    if shown:
        assert VIEW not in page.bundle and 'You predicted "a wrong' in page.bundle["text/plain"]
    else:
        assert page.buttons()[1].description == "✓ 2. a wrong answer"
        assert "You predict &quot;a wrong answer&quot;" in page.note


def test_a_choice_that_the_lesson_no_longer_offers_is_none(page, kept, capsys):
    page = page()
    lesson.predict(*ASK)
    page.click(2)
    lesson.outcome("ask", 2)
    predictions.start("01_what_is_sft")
    lesson.predict(*ASK[:2], "this", "that")
    assert not any("✓" in button.description for button in page.buttons())
    page.click(1)
    assert rows(kept) == [("01_what_is_sft", "ask", "this", None)]


def test_lessons_may_use_the_same_id(page, kept):
    page = page()
    for name, number in (("01_what_is_sft", 1), ("02_sft_data", 2)):
        predictions.start(name)
        lesson.predict(*ASK)
        assert not any("✓" in button.description for button in page.buttons())
        page.click(number)
    assert [row[:3] for row in rows(kept)] == [
        ("01_what_is_sft", "ask", "the right answer"),
        ("02_sft_data", "ask", "a wrong answer"),
    ]


# --- Numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "value", "line"),
    [
        (
            "90",
            97.3,
            "Right: you predicted 90 %, and it was 97.3 % (within 10 percentage points).\n",
        ),
        (
            "6.1 %",
            16.1,
            "Right: you predicted 6.1 %, and it was 16.1 % (within 10 percentage points).\n",
        ),
        (
            " 80% ",
            97.3,
            "Wrong: you predicted 80 %, but it was 97.3 % (more than 10 percentage points off).\n",
        ),
        (
            "0",
            np.float32(0),
            "Right: you predicted 0 %, and it was 0 % (within 10 percentage points).\n",
        ),
    ],
)
def test_a_number_is_judged_by_its_tolerance(typed, value, line, page, capsys):
    page = page()
    lesson.predict(*SCORE, **PERCENT)
    page.type(typed)
    assert said(capsys, "score", value, tolerance=10) == line


@pytest.mark.parametrize("typed", ["", "abc", "nan", "inf", "-1", "100.1", "97,3", "5 GB", "1 2"])
def test_what_is_no_number_in_the_range_is_said_and_not_kept(typed, page, kept, capsys):
    page = page()
    lesson.predict(*SCORE, **PERCENT)
    page.type("50")
    page.type(typed)
    assert "Expected a number from 0 to 100 %, found" in page.note
    assert "Write decimals with a point" in page.note
    assert 'role="alert"' in page.note
    assert rows(kept)[0][2] == 50
    assert said(capsys, "score", 50, tolerance=0).startswith(
        "Right: you predicted 50 %, and it was 50 %"
    )


def test_a_number_may_have_another_unit_or_none_and_open_bounds(page, kept, capsys):
    page = page()
    lesson.predict("steps", "After how many steps?", number="steps", low=1)
    page.type("1200 steps")
    assert said(capsys, "steps", 1000, tolerance=200) == (
        "Right: you predicted 1,200 steps, and it was 1,000 steps (within 200 steps).\n"
    )
    lesson.predict("ratio", "Which ratio?", number="")
    page.type("inf")
    assert "Expected a number, found 'inf'" in html.unescape(page.note)
    page.type("-0.5")
    assert said(capsys, "ratio", torch.tensor(0.25), tolerance=0.5) == (
        "Wrong: you predicted -0.5, but it was 0.25 (more than 0.5 off).\n"
    )


@pytest.mark.parametrize(
    ("typed", "kept_as"),
    [
        ("1,000 GB", 1000),
        ("12,345,678.5", 12_345_678.5),
        ("1200", 1200),
        ("1,00", None),
        ("1000,000", None),
        ("2,5", None),
        (",100", None),
    ],
)
def test_a_number_is_read_as_the_question_writes_it(typed, kept_as, page, kept):
    page = page()
    lesson.predict("size", "How large?", number="GB", low=1)
    page.type(typed)
    assert [row[2] for row in rows(kept)] == [kept_as] if kept_as else not kept.exists()


def test_the_field_names_the_unit_as_it_is(page):
    page = page()
    lesson.predict("size", "How large?", number="GB", low=0, high=100)
    assert page.form.children[1].description == "A number from 0 to 100 GB:"


def test_an_earlier_number_stands_in_the_field(page):
    page = page()
    lesson.predict(*SCORE, **PERCENT)
    page.type("72.5")
    predictions.start("01_what_is_sft")
    lesson.predict(*SCORE, **PERCENT)
    field = page.form.children[1]
    assert field.value == "72.5" and not field.continuous_update  # kept when Enter is pressed


@pytest.mark.parametrize(
    ("number", "text"),
    [(97.3, "97.3"), (1200, "1,200"), (3311360.4, "3,311,360"), (0.00021, "0.00021"), (-2.0, "-2")],
)
def test_numbers_are_written_as_people_write_them(number, text):
    assert plain(number) == text


@pytest.mark.parametrize(
    ("bounds", "text"),
    [
        (Number("%", 0, 100), "a number from 0 to 100 %"),
        (Number("s", low=0), "a number in s, at least 0"),
        (Number(high=8), "a number, at most 8"),
        (Number("steps"), "a number in steps"),
        (Number(), "a number"),
    ],
)
def test_the_range_is_said(bounds, text):
    assert str(bounds) == text


# --- Where nobody is asked -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["CI", "PYTEST_CURRENT_TEST", "SFT_NO_BARS"])
def test_what_is_stored_or_compared_does_not_depend_on_a_choice(
    name, page, kept, monkeypatch, capsys
):
    page = page()
    lesson.predict(*ASK)
    page.click(1)
    lesson.outcome("ask", 1)
    lesson.predict(*SCORE, **PERCENT)
    page.type("3")
    assert predictions.tally() == {1: (1, 1)}
    before = kept.read_bytes()
    monkeypatch.setenv(name, "1")
    lesson.predict(*ASK)
    listed = "What will the model say?\n1. the right answer\n2. a wrong answer\n3. no answer at all"
    assert page.bundle == {
        "text/plain": listed,
        "text/markdown": "**What will the model say?**\n\n" + listed.partition("\n")[2],
    }
    assert said(capsys, "ask", 3) == "It was: no answer at all.\n"
    assert said(capsys, "score", 97.3, tolerance=10) == "It was: 97.3 %.\n"
    assert kept.read_bytes() == before
    assert predictions.tally() == {}


def test_without_a_notebook_a_list_is_printed(somebody_comes, capsys):
    somebody_comes()
    lesson.predict(*SCORE, **PERCENT)
    printed = "Which share will be right?\n(Predict a number from 0 to 100 %.)\n"
    assert capsys.readouterr().out == printed
    assert said(capsys, "score", 97.34, tolerance=1) == "It was: 97.34 %.\n"


def test_an_outcome_that_nobody_sees_ends_nothing(page, kept):
    page = page()
    lesson.predict(*ASK)
    with capture_output():  # so `begin` runs the cells that another one needs
        lesson.predict(*ASK)
        lesson.outcome("ask", 3)
    page.click(2)
    assert rows(kept) == [("01_what_is_sft", "ask", "a wrong answer", None)]


def test_without_ipywidgets_a_list_is_shown(page, monkeypatch):
    page = page()
    monkeypatch.setitem(__import__("sys").modules, "ipywidgets", None)
    lesson.predict(*ASK)
    assert set(page.bundle) == {"text/plain", "text/markdown"}


def test_a_form_comes_with_a_list_for_front_ends_without_widgets(page):
    page = page()
    lesson.predict(*ASK)
    assert page.bundle["text/plain"].endswith("3. no answer at all")
    assert page.bundle["text/markdown"].startswith("**What will the model say?**")


def test_after_a_restart_the_outcome_can_be_run_alone(page, kept, tmp_path, monkeypatch, capsys):
    page = page()
    shell = InteractiveShell.instance()
    cells = {
        "setup": "from sftlib import lesson\nlesson.begin('00_short')",
        "ask": f"lesson.predict{ASK}",
        "told": "lesson.outcome('ask', 3)",
    }
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    notebook = {"cells": [{"cell_type": "code", "id": c, "source": [t]} for c, t in cells.items()]}
    Path("00_short.ipynb").write_text(json.dumps(notebook))
    for cell_id in ("setup", "ask"):
        shell.run_cell(cells[cell_id], cell_id=cell_id)
    page.click(3)
    shell.run_cell(cells["setup"], cell_id="setup")
    capsys.readouterr()
    shell.run_cell(cells["told"], cell_id="told")
    printed = capsys.readouterr().out
    assert printed.startswith("First running ask …")
    assert printed.endswith(
        'Right: you predicted "no answer at all", and it was "no answer at all".\n'
    )


# --- The file ------------------------------------------------------------------------------------


def test_it_is_kept_beside_the_lessons_in_the_folder_that_git_ignores():
    assert Path(__file__).parents[1] / "work" / "predictions.jsonl" == KEPT


@pytest.mark.parametrize(
    "line",
    [
        '{"lesson": "01_what_is_sft", "id": "as',
        "[]",
        "[" * 100_000,
        "3",
        '{"lesson": "01_what_is_sft", "id": "ask"}',
        '{"lesson": 1, "id": 2, "predicted": "x", "right": null}',
        '{"lesson": ["a"], "id": ["b"], "predicted": "x", "right": null}',
        '{"lesson": "01_what_is_sft", "id": "ask", "predicted": "a wrong answer", "right": 7}',
        '{"lesson": "01_what_is_sft", "id": "ask", "predicted": NaN, "right": null}',
        '{"lesson": "01_what_is_sft", "id": "ask", "predicted": "\\ud800", "right": null}',
        "\udcff",
    ],
)
def test_a_damaged_line_costs_no_other(line, page, kept):
    page = page()
    lesson.predict(*SCORE, **PERCENT)
    page.type("40")
    with kept.open("a", errors="surrogateescape") as file:
        file.write(line + "\n")
    lesson.predict(*ASK)
    assert not any("✓" in button.description for button in page.buttons())
    page.click(2)
    assert [row[1:3] for row in rows(kept)] == [("score", 40), ("ask", "a wrong answer")]


def test_a_choice_that_cannot_be_written_is_no_error_and_counts(page, kept, capsys):
    page = page()
    kept.parent.write_text("a file where the folder should be")
    lesson.predict(*ASK)
    page.click(2)
    assert "Your prediction could not be saved in predictions.jsonl. It is kept only" in page.note
    assert said(capsys, "ask", 2).startswith("Right: ")
    kept.parent.unlink()
    lesson.predict(*SCORE, **PERCENT)
    page.type("40")
    assert [row[1:] for row in rows(kept)] == [("ask", "a wrong answer", True), ("score", 40, None)]


def test_what_is_written_replaces_what_could_not_be(page, kept, capsys):
    page = page()
    kept.parent.write_text("a file where the folder should be")
    lesson.predict(*ASK)
    page.click(2)
    kept.parent.unlink()
    page.click(3)
    assert "could not be saved" not in page.note
    assert said(capsys, "ask", 3).startswith('Right: you predicted "no answer at all"')


def test_beginning_a_lesson_deletes_nothing(page, kept, tmp_path, monkeypatch):
    page = page()
    lesson.predict(*ASK)
    page.click(2)
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    lesson.begin("01_what_is_sft")
    assert kept.exists() and (tmp_path / "work" / "01_what_is_sft").is_dir()
    lesson.predict(*ASK)
    assert page.buttons()[1].description.startswith("✓")
    lesson.begin("01_what_is_sft")
    lesson.predict(*ASK[:4])  # edited
    assert page.buttons()[1].description.startswith("✓")


# --- Mistakes of a lesson's author ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "options", "expected"),
    [
        (("a", "Which?", "one"), {}, "at least two options, found 1"),
        (("a", "Which?"), {}, "at least two options, found 0"),
        (("a", "Which?", "x", "x "), {}, "options that differ.*Change or remove one"),
        (("a", "Which?", "x", " "), {}, "options that differ"),
        (("", "Which?", "x", "y"), {}, "an id and a question.*Give both"),
        (("a", " ", "x", "y"), {}, "an id and a question"),
        (("a", "Which?", "x", "y"), {"number": "%"}, "options or a number, found both.*Remove"),
        (("a", "Which?", "x", "y"), {"low": 0}, "options or a number, found both"),
        (("a", "Which?"), {"low": 0, "high": 1}, "a unit beside low and high.*Add it"),
        (("a", "Which?"), {"number": "%", "low": 1, "high": 1}, "low < high.*Correct one"),
        (("a", "Which?"), {"number": "%", "low": float("nan")}, "low < high"),
    ],
)
def test_a_question_that_cannot_be_asked_is_refused(arguments, options, expected):
    with pytest.raises(ValueError, match=expected):
        lesson.predict(*arguments, **options)


def test_an_id_names_one_question(capsys):
    lesson.predict(*ASK)
    lesson.predict(*ASK)
    with pytest.raises(ValueError, match="one question with the id 'ask'.*What will the model say"):
        lesson.predict(*ASK[:4])
    predictions.start("01_what_is_sft")  # as it says
    lesson.predict(*ASK[:4])


def test_no_lesson_is_said():
    predictions.start("")
    with pytest.raises(ValueError, match="Run the set-up cell"):
        lesson.predict(*ASK)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "expected"),
    [
        (("say", 1), {}, ValueError, r"\(ask, score\), found 'say'.*lesson.predict\('say'"),
        (("ask", 0), {}, ValueError, "1 to 3, found 0. The first option has the number 1"),
        (("ask", 4), {}, ValueError, "1 to 3, found 4"),
        (("ask", True), {}, TypeError, "1 to 3, found True. Give its place"),
        (("ask", "a wrong answer"), {}, TypeError, "number of an option"),
        (("ask", 2.0), {}, TypeError, "number of an option"),
        (("ask", 2), {"tolerance": 1}, ValueError, "no tolerance with options"),
        (("score", 2), {}, ValueError, "Expected a tolerance.*found None. Give `tolerance`"),
        (("score", 2), {"tolerance": -1}, ValueError, "Expected a tolerance"),
        (("score", 2), {"tolerance": float("nan")}, ValueError, "Expected a tolerance"),
        (("score", "2"), {"tolerance": 1}, TypeError, "a number that came out, found '2'. Give a"),
        (("score", None), {"tolerance": 1}, TypeError, "a number that came out, found None"),
        (("score", True), {"tolerance": 1}, TypeError, "a number that came out, found True"),
        (
            ("score", float("nan")),
            {"tolerance": 1},
            ValueError,
            "a finite number.*Look for its cause",
        ),
    ],
)
def test_an_outcome_that_cannot_be_is_refused(arguments, options, error, expected, capsys):
    lesson.predict(*ASK)
    lesson.predict(*SCORE, **PERCENT)
    with pytest.raises(error, match=expected):
        lesson.outcome(*arguments, **options)


# --- The form ------------------------------------------------------------------------------------


def test_buttons_say_to_screen_readers_what_they_are_for(page):
    page = page()
    lesson.predict(*ASK)
    assert [one.tooltip for one in page.buttons()] == ["Predict: What will the model say?"] * 3
    page.click(2)
    assert page.buttons()[1].tooltip == "Predicted: What will the model say?"
    assert 'role="status"' in page.note


def test_text_of_a_lesson_is_shown_as_it_is(page):
    page = page()
    lesson.predict("marks", "Is `a*b` *one*\n<s>?", "`<|im_end|>` & more", "$5 or _x_")
    assert "<b>Is <code>a*b</code> *one* &lt;s&gt;?</b>" in page.form.children[0].value
    assert page.buttons()[0].description == "1. <|im_end|> & more"
    assert page.bundle["text/markdown"] == (
        "**Is `a*b` \\*one\\* \\<s\\>?**\n\n1. `<|im_end|>` & more\n2. \\$5 or \\_x\\_"
    )


def test_questions_are_the_same_if_all_of_them_is():
    one = Question("01", "a", "Which?", Options(("x", "y")))
    assert one == Question("01", "a", "Which?", Options(("x", "y")))
    assert one != Question("01", "a", "Which?", Options(("y", "x")))


# --- What is counted -----------------------------------------------------------------------------


def test_progress_counts_the_right_ones_by_lesson(page, kept):
    page = page()
    assert "predictions" not in progress().columns
    for name, number in (("01_what_is_sft", 3), ("02_sft_data", 1)):
        predictions.start(name)
        lesson.predict(*ASK)
        page.click(3)
        assert name[:2] == "02" or "predictions" not in progress().columns  # not yet judged
        lesson.outcome("ask", number)
    lesson.predict(*SCORE, **PERCENT)
    page.type("50")
    lesson.outcome("score", 52, tolerance=5)
    shown = progress()["predictions"]
    assert shown["lesson 1"] == "1 of 1 right" and shown["lesson 2"] == "1 of 2 right"
    assert shown["lesson 3"] == ""
