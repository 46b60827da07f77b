"""Claims have cells of their own, folded away, and a sentence that says why has a control.

These rules apply to every notebook. Each rule is broken here once, and lets pass what it should.
"""

from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from tests import notebook_rules as rules
from tools import notebooks

FOLDER = notebooks.FOLDER
NOTEBOOKS = notebooks.find()
RULES = rules.CLAIM_RULES
CLAIM = 'lesson.claim("Most answers are right", share > 0.5, f"{share:.0%}")'
CLAIMS = f"share = right / asked\n{CLAIM}"
FOLDED = {"tags": ["claim"], "jupyter": {"source_hidden": True}}


@pytest.mark.integration
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.parent.name + "/" + path.name)
def test_notebook_obeys(path: Path, rule: rules.Rule):
    nb = nbformat.reads(path.read_text(encoding="utf-8"), nbformat.NO_CONVERT)
    assert not rule(nb, path), "\n".join(rule(nb, path))


def printed(text: str) -> list[NotebookNode]:
    return [new_output("stream", name="stdout", text=text)]


def lesson(**changes: str) -> NotebookNode:
    """A short lesson with a result, a claim, an explanation and an exercise; some cells changed."""
    return new_notebook(
        cells=[
            new_markdown_cell("# Lesson 1: Ask\n> You ask.", id="title"),
            new_code_cell('work = lesson.begin("01_ask")', id="setup"),
            new_markdown_cell("## 1. Ask\n\nWe ask ten questions.", id="text"),
            new_code_cell(
                changes.get("ask", "right, asked = ask(model)\nright"),
                id="ask",
                outputs=printed("9\n"),
            ),
            new_code_cell(
                changes.get("claims", CLAIMS),
                id="claims",
                outputs=printed("✓ Most answers are right: 90%\n"),
                metadata=FOLDED,
            ),
            new_markdown_cell(changes.get("explain", "Most answers are right."), id="explain"),
            new_markdown_cell("## Exercises\n\nAsk again, because we ask you.", id="exercises"),
            new_code_cell(
                changes.get("exercise", "answer = ...\nright"),
                id="exercise",
                outputs=printed("9\n"),
            ),
            new_markdown_cell("It answers because it was trained.", id="exercise-explain"),
            new_code_cell(changes.get("last", "print(lesson.environment())"), id="environment"),
        ]
    )


def with_metadata(metadata: dict) -> NotebookNode:
    nb = lesson()
    nb.cells[4].metadata = NotebookNode(metadata)
    return nb


ALONE = (rules.claims_stand_alone, "does more than claim")
BROKEN = [
    (*ALONE, lesson(ask=f"right, asked = ask(model)\nprint(right)\n{CLAIM}")),
    (*ALONE, lesson(claims=f"print(right)\n{CLAIMS}")),
    (*ALONE, lesson(claims=f"{CLAIMS}\nshare")),
    (*ALONE, lesson(claims=f"tune(model)\n{CLAIMS}")),
    (*ALONE, lesson(claims=f"model.config = right\n{CLAIMS}")),
    (*ALONE, lesson(claims=f"results['a'] = right\n{CLAIMS}")),
    (*ALONE, lesson(claims=f"idle = 1\n{CLAIMS}")),
    (*ALONE, lesson(claims=f"if right:\n    print(right)\n{CLAIMS}")),
    (*ALONE, lesson(claims=f"import math\n{CLAIMS}")),
    (*ALONE, lesson(claims=f"%time right\n{CLAIMS}")),
    (*ALONE, lesson(claims=f"def check():\n    {CLAIM}\n\n\ncheck()")),
    (rules.claims_stand_alone, "Run: make format", with_metadata({"tags": ["claim"]})),
    (rules.claims_stand_alone, "Run: make format", with_metadata(FOLDED | {"tags": ["x"]})),
    (rules.claims_stand_alone, "makes none", lesson(claims="share = right / asked")),
    (rules.claims_stand_alone, "right, which claims uses", lesson(ask=f"right = 9\n{CLAIMS}")),
    (rules.claims_stand_alone, "share, which exercise uses", lesson(exercise="print(share)")),
    (rules.no_guard_for_the_small_model, "`tiny`", lesson(ask="if tiny:\n    right = 9")),
    (rules.no_guard_for_the_small_model, "`tiny`", lesson(ask="tiny = size < 10")),
    (rules.nothing_is_asserted, "an assert", lesson(ask="assert right > 5")),
    (rules.nothing_is_asserted, "an assert", lesson(ask="if right:\n    assert asked")),
]
ALLOWED = [
    (rules.claims_stand_alone, lesson(claims=f"{CLAIM}\n{CLAIM}")),
    (rules.claims_stand_alone, lesson(claims=f"for share in shares:\n    {CLAIM}")),
    (rules.claims_stand_alone, lesson(claims=f"if recorded:\n    {CLAIM}\nelse:\n    {CLAIM}")),
    (
        rules.claims_stand_alone,
        lesson(claims=f"def half(n):\n    return n\n\n\nx = half(1)\n{CLAIM[:-1]}, bound=x)"),
    ),
    (rules.claims_stand_alone, lesson(claims=f"share, _ = parts\n{CLAIM}")),
    (rules.claims_stand_alone, lesson(exercise="share = 1", last="print(share)")),
    (rules.no_guard_for_the_small_model, lesson(ask="model.tiny('tiny')  # if tiny")),
    (rules.nothing_is_asserted, lesson(ask="print('assert right')  # assert right")),
]


WHY = [
    "It answers, because it was trained.",
    "Because of the many rows, it answers.",
    "It was trained longer, so that it answers most questions.",
    "It was trained. This is why it answers.",
    "It was trained, which is why it answers.\n\n**Predict.** And then?",
    "- Most are right.\n- That is what makes it useful.",
    "| rows | right |\n|---|---|\n| ten | nine, because they are easy |",
    "More rows, better answers: because it sees more.\n\n## 2. The next section\n\nWe ask on.",
]
NO_REASON = [
    "We sort the rows, so that we see the longest.",
    "The rows are sorted, so that the longest can be seen.",
    "All rows are new, so that nobody should know them.",
    "The answers are sorted because we read them from the top.",
    "Does it answer because it was trained?",
    "**Predict.** It was trained. What changes, and because of what? It answers because it must.",
    "That is what the tutorials do. The code `so that` and\n```\nbecause\n```\n",
    "| case | take | because |\n|---|---|---|\n| few rows | LoRA | it is small |",
    "Most are right.\n\n## 2. Because of rows\n\nIt answers because it was trained.",
    "It answers, because it was trained ([Doe 2024](https://example.org/a)).",
]
BROKEN += [(rules.reasons_have_a_control, "says why", lesson(explain=text)) for text in WHY]
ALLOWED += [(rules.reasons_have_a_control, lesson(explain=text)) for text in NO_REASON]


@pytest.mark.parametrize(
    "output, accepted", [("✓ Yes.", 1), ("✗ No.", 0), ("○ Later.", 0), ("", 0)]
)
def test_solutions_are_accepted_by_their_checks(output, accepted):
    nb = lesson(exercise="answer = 9\nchecks.check_asked(answer)")
    nb.cells[7].outputs = printed(output)
    problems = rules.solutions_are_accepted(nb, FOLDER / "solutions" / "01_ask.ipynb")
    assert len(problems) == 1 - accepted
    assert rules.solutions_are_accepted(nb, FOLDER / "01_ask.ipynb") == []


def test_solutions_may_assert_that_their_check_accepts_them():
    nb = lesson(exercise="verdict = checks.check_asked(9)\nassert verdict\nverdict")
    assert rules.nothing_is_asserted(nb, FOLDER / "solutions" / "01_ask.ipynb") == []
    assert len(rules.nothing_is_asserted(nb, FOLDER / "01_ask.ipynb")) == 1


def test_a_reason_needs_a_control_in_its_own_section():
    controlled = f'{CLAIM[:-1]}, kind="control")'
    seeds = f"{CLAIM[:-1]}, seeds=3)"
    for claims, problems in ((controlled, 0), (seeds, 1)):
        found = rules.reasons_have_a_control(lesson(claims=claims, explain=WHY[0]), FOLDER)
        assert len(found) == problems
    elsewhere = lesson(explain=WHY[0], last=controlled)
    assert len(rules.reasons_have_a_control(elsewhere, FOLDER)) == 1


@pytest.mark.parametrize(
    "output",
    [
        new_output("display_data", data={"image/png": "iVBORw0KGgo="}),
        new_output("execute_result", data={"text/html": "<table></table>", "text/plain": "x"}),
        new_output("execute_result", data={"text/plain": "0.9"}),
    ],
)
def test_pictures_tables_and_numbers_are_results(output):
    nb = lesson(explain=WHY[0])
    nb.cells[3].outputs = [output]
    assert len(rules.reasons_have_a_control(nb, FOLDER)) == 1


def test_a_claim_is_a_result_too():
    nb = lesson(explain=WHY[0])
    nb.cells[3].outputs = []
    assert len(rules.reasons_have_a_control(nb, FOLDER)) == 1


@pytest.mark.parametrize("outputs", [[], printed("The capital of Kenya is Nairobi.\n")])
def test_where_nothing_is_measured_no_control_is_asked_for(outputs):
    nb = lesson(explain=WHY[0])
    nb.cells[3].outputs = outputs
    del nb.cells[4]
    assert rules.reasons_have_a_control(nb, FOLDER) == []


def test_only_the_first_text_after_a_result_explains_it():
    nb = lesson(explain="Most answers are right.")
    nb.cells.insert(6, new_markdown_cell("Now longer, because rows are cheap.", id="next"))
    assert rules.reasons_have_a_control(nb, FOLDER) == []


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_good_notebook_passes(rule):
    assert rule(lesson(), FOLDER / "01_ask.ipynb") == []


@pytest.mark.parametrize("rule, said, nb", BROKEN)
def test_a_broken_notebook_is_noticed(rule, said, nb):
    problems = rule(nb, FOLDER / "01_ask.ipynb")
    assert any(said in problem for problem in problems), problems


@pytest.mark.parametrize("rule, nb", ALLOWED)
def test_a_rule_does_not_cry_wolf(rule, nb):
    assert rule(nb, FOLDER / "01_ask.ipynb") == []


def test_every_rule_was_broken_once():
    assert {rule for rule, *_ in BROKEN} | {rules.solutions_are_accepted} == set(RULES)


# --- What `make format` does ---------------------------------------------------------------------


def test_cells_that_hold_claims_alone_are_tagged_and_folded_and_no_others():
    nb = lesson(exercise=f"print(1)\n{CLAIM}")
    nb.cells[4].metadata = NotebookNode({"tags": ["nbval-ignore-output"]})
    assert notebooks.fold(nb) == ["claims"]
    assert nb.cells[4].metadata == FOLDED | {"tags": ["nbval-ignore-output", "claim"]}
    assert [cell.id for cell in nb.cells if cell.metadata] == ["claims"]
    assert notebooks.fold(nb) == []


@pytest.mark.integration
def test_format_folds_what_lint_complains_about_and_nothing_takes_it_away(tmp_path, capsys):
    path = tmp_path / "01_ask.ipynb"
    nbformat.write(with_metadata({}), path)
    assert notebooks.clean([path], verify=True) == 1
    assert "01_ask.ipynb: claims are not folded in claims" in capsys.readouterr().err
    assert notebooks.clean([path]) == 0 == notebooks.clean([path], verify=True)
    assert nbformat.read(path, 4).cells[4].metadata == FOLDED
    assert path.read_text() == nbformat.writes(nbformat.read(path, 4)) + "\n"
    assert rules.metadata_is_clean(nbformat.read(path, 4), path) == []
