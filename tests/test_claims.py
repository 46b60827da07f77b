"""Claims print one line, fail where the course would be wrong, and leave a row in the ledger."""

import json
from pathlib import Path

from sftlib import lesson, models
from sftlib.lesson import claims
from sftlib.lesson.claims import ClaimFails, claim, line, read_ledger

import numpy as np
import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell

TEXT = "LoRA reaches full's held-out score"
BOTH = "99.7% against 99.0%"


@pytest.fixture
def begun(tmp_path, monkeypatch) -> Path:
    """The ledger of a lesson that has begun with the shipped base."""
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    monkeypatch.setattr(claims, "_record", claims._record)
    monkeypatch.setattr(models, "loaded", [])
    lesson.begin("01_sums")
    return tmp_path / "work" / "claims.jsonl"


def with_model(name: str) -> None:
    models.loaded.append(name)
    lesson.begin("01_sums")


def rows(ledger: Path) -> list[dict]:
    return [json.loads(line) for line in ledger.read_text().splitlines()]


# --- What is printed -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "printed"),
    [
        ({}, f"✓ {TEXT}: {BOTH}\n"),
        ({"seeds": 3}, f"✓ {TEXT}: {BOTH} (3 seeds)\n"),
        ({"kind": "control"}, f"✓ {TEXT}: {BOTH} (with control)\n"),
        ({"kind": "control", "seeds": 3}, f"✓ {TEXT}: {BOTH} (3 seeds, with control)\n"),
        ({"kind": "stored"}, f"✓ {TEXT}: {BOTH} (stored run)\n"),
        ({"kind": "arithmetic", "bound": "equal"}, f"✓ {TEXT}: {BOTH}\n"),
        ({"kind": "source"}, f"✓ {TEXT}: {BOTH} (from a source)\n"),
    ],
)
def test_a_claim_that_holds_is_one_line_with_its_evidence(begun, capsys, options, printed):
    assert claim(TEXT, True, BOTH, **options) is None
    assert capsys.readouterr().out == printed
    assert line(rows(begun)[-1]) + "\n" == printed


def test_nothing_measured_and_several_lines_are_one_line(begun, capsys):
    claim("A claim\n   in two lines", True)
    claim("A table", True, "a  1\nb  2")
    assert capsys.readouterr().out == "✓ A claim in two lines\n✓ A table: a 1 b 2\n"


def test_with_the_shipped_base_a_claim_that_fails_raises_and_says_what_was_measured(begun, capsys):
    with pytest.raises(ClaimFails, match=f"hold: {TEXT}. Found: {BOTH}. Did you change") as raised:
        claim(TEXT, False, BOTH)
    assert isinstance(raised.value, AssertionError)
    assert capsys.readouterr().out == "" and rows(begun)[-1]["holds"] is False
    with pytest.raises(ClaimFails, match=f"does not hold: {TEXT}. Did you change a setting"):
        claim(TEXT, False)


def test_another_model_may_differ_and_the_lesson_goes_on(begun, capsys):
    with_model("smollm2-135m")
    claim(TEXT, False, BOTH, seeds=3)
    claim(TEXT, True, BOTH)
    assert capsys.readouterr().out == (
        f"✗ not so with this model: {TEXT}: {BOTH} (3 seeds)\n✓ {TEXT}: {BOTH}\n"
    )
    assert [(row["holds"], row["model"]) for row in rows(begun)] == [
        (False, "smollm2-135m"),
        (True, "smollm2-135m"),
    ]


# --- Which model is the shipped base -------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny-base", models.TINY_BASE, "shipped"])
def test_the_shipped_base_is_known_by_its_name_and_by_its_folder(begun, name):
    Path("shipped").symlink_to(models.TINY_BASE)
    with_model(str(name))
    with pytest.raises(ClaimFails):
        claim(TEXT, False)
    assert rows(begun)[-1]["model"] == "tiny-base"


def test_the_dial_counts_where_nothing_was_loaded(begun, monkeypatch, capsys):
    monkeypatch.setenv("SFT_MODEL", "somebody/else")
    lesson.begin("01_sums")
    claim(TEXT, False)
    assert "not so with this model" in capsys.readouterr().out


def test_the_model_that_the_set_up_cell_names_counts_more_than_the_dial(begun, monkeypatch):
    monkeypatch.setenv("SFT_MODEL", "somebody/else")
    with_model("tiny-base")
    with pytest.raises(ClaimFails):
        claim(TEXT, False)


def test_models_that_the_lesson_makes_or_compares_do_not_make_its_claims_lenient(begun):
    models.loaded.append("smollm2-135m")  # compared, in a later cell
    with pytest.raises(ClaimFails):
        claim(TEXT, False)
    models.loaded[:] = ["tiny-base", "../work/01_sums/merged"]  # made by an earlier run
    lesson.begin("01_sums")
    with pytest.raises(ClaimFails):
        claim(TEXT, False)


def test_load_says_what_it_has_read(monkeypatch):
    monkeypatch.setattr(models, "loaded", [])
    models.load()
    with pytest.raises(OSError):
        models.load("no/such/folder/at/all")
    assert models.loaded == ["tiny-base"]


def test_without_a_lesson_a_claim_is_checked_and_not_kept(begun, monkeypatch, capsys):
    monkeypatch.setattr(claims, "_record", claims.Record())
    claim(TEXT, True)
    with pytest.raises(ClaimFails):
        claim(TEXT, False)
    models.loaded.append("smollm2-135m")
    claim(TEXT, False)
    assert not begun.exists() and capsys.readouterr().out.count("\n") == 2


# --- What is no claim ----------------------------------------------------------------------------


@pytest.mark.parametrize("holds", [True, np.bool_(True), torch.tensor(True), np.array(1) > 0])
def test_a_truth_value_of_any_library_will_do(begun, holds):
    claim(TEXT, holds)
    assert rows(begun)[-1]["holds"] is True


def test_a_false_value_of_a_library_is_false(begun):
    for holds in (np.bool_(False), torch.tensor(False)):
        with pytest.raises(ClaimFails):
            claim(TEXT, holds)


@pytest.mark.parametrize("model", ["tiny-base", "smollm2-135m"])
@pytest.mark.parametrize(
    "holds",
    [None, float("nan"), 1, "yes", [True], np.array([True]), torch.tensor([True]), np.float64(1)]
    + [torch.tensor(1), (lambda: None)],
)
def test_what_is_not_one_truth_value_is_an_error(begun, holds, model):
    with_model(model)
    with pytest.raises(TypeError, match="Expected True or False, found"):
        claim(TEXT, holds)
    assert not begun.exists()


@pytest.mark.parametrize(
    ("text", "options", "said"),
    [
        ("", {}, "found an empty text"),
        ("  \n", {}, "found an empty text"),
        (TEXT, {"seeds": 0}, "seeds from 1, found 0"),
        (TEXT, {"seeds": -3}, "seeds from 1, found -3"),
        (TEXT, {"seeds": True}, "seeds from 1, found True"),
        (TEXT, {"seeds": 2.0}, "seeds from 1, found 2.0"),
        (TEXT, {"kind": "proof"}, "kinds arithmetic, one run, seeds.*found 'proof'"),
        (TEXT, {"kind": "seeds"}, "fits seeds=1, found 'seeds'"),
        (TEXT, {"kind": "one run", "seeds": 3}, "fits seeds=3, found 'one run'"),
    ],
)
def test_what_a_claim_cannot_be_is_said(begun, text, options, said):
    with pytest.raises(ValueError, match=said):
        claim(text, True, **options)
    assert not begun.exists()


# --- Conditions that are computed only when they are asked for -----------------------------------


def test_a_function_is_called_for_the_condition_and_for_the_measured_value(begun, capsys):
    found = {"a": 3}
    claim(TEXT, lambda: found["a"] == 3, lambda: found["a"])
    assert capsys.readouterr().out == f"✓ {TEXT}: 3\n"


@pytest.mark.parametrize("holds, measured", [(lambda: {}["a"], ""), (True, lambda: {}["a"])])
def test_an_error_in_it_is_raised_with_the_shipped_base_and_said_with_another(
    begun, capsys, holds, measured
):
    with pytest.raises(KeyError):
        claim(TEXT, holds, measured)
    with_model("smollm2-135m")
    claim(TEXT, holds, measured)
    assert capsys.readouterr().out == f"✗ not so with this model: {TEXT}: KeyError: 'a'\n"
    assert [row["holds"] for row in rows(begun)] == [False, False]


# --- The ledger ----------------------------------------------------------------------------------


def test_a_row_says_what_was_claimed_measured_and_where(begun):
    claim(TEXT, True, BOTH, bound="at most five points", seeds=3)
    (row,) = rows(begun)
    assert row["lesson"] == "01_sums" and row["id"] == "1" and row["text"] == TEXT
    assert (row["kind"], row["bound"], row["measured"]) == ("seeds", "at most five points", BOTH)
    assert (row["seeds"], row["holds"], row["model"]) == (3, True, "tiny-base")
    assert f"torch {torch.__version__}" in row["machine"] and len(row["date"]) == 10
    assert set(row["versions"]) == {
        *("torch", "transformers", "trl", "peft", "datasets", "deepspeed")
    }


def test_of_each_lesson_the_last_run_with_the_model_counts(begun):
    claim("old", True)
    lesson.begin("02_more")
    claim("of another lesson", True)
    lesson.begin("01_sums")
    assert [row["text"] for row in read_ledger(begun)] == ["old", "of another lesson"]
    claim("new", True)
    claim("newer", True)
    with_model("smollm2-135m")
    claim("of another model", True)
    assert [row["text"] for row in read_ledger(begun)] == ["of another lesson", "new", "newer"]
    assert [row["text"] for row in read_ledger(begun, "smollm2-135m")] == ["of another model"]


def test_no_file_is_no_claims(begun):
    assert read_ledger(begun) == []


@pytest.mark.parametrize(
    "line",
    [
        '{"lesson": "01_su',
        '{"lesson": "01_sums", "text": "\udcc3',  # ends within a character
        "[1]\n\n7",
        "[" * 100_000,
        '{"lesson": ["01_sums"], "run": "1", "id": "1", "model": "%s"}',
        '{"lesson": "of others", "run": "1", "id": "1/a", "model": "%s"}\n' * 2,
    ],
)
def test_a_damaged_line_costs_no_other(line, begun):
    claim("one", True)
    with begun.open("a", errors="surrogateescape") as file:
        file.write(line.replace("%s", models.DEFAULT) + "\n")
    claim("two", True)
    found = [row["text"] for row in read_ledger(begun) if row["lesson"] == "01_sums"]
    assert found == ["one", "two"]


@pytest.mark.parametrize("rest", ["", ', "id": 1', ', "id": null'])
def test_a_damaged_line_begins_no_run(rest, begun):
    claim("one", True)
    with begun.open("a") as file:
        file.write(f'{{"lesson": "01_sums", "run": "1", "model": "{models.DEFAULT}"{rest}}}\n')
    assert [row["text"] for row in read_ledger(begun)] == ["one"]


def test_a_line_ends_only_where_the_file_says_so(begun):
    claim(TEXT, True, bound="at most\u2028or\x85so")
    assert [row["bound"] for row in read_ledger(begun)] == ["at most\u2028or\x85so"]


def test_of_a_cell_that_ran_again_a_damaged_claim_leaves_the_old_one(begun):
    claims.enter("cell")
    for text in ("one", "two", "three"):
        claim(text, True)
    claims.enter("cell")
    claim("new one", True)
    claim("new two", True)
    lines = begun.read_text().splitlines(keepends=True)
    begun.write_text("".join([*lines[:3], lines[3][:20] + "\n", lines[4]]))
    assert [row["text"] for row in read_ledger(begun)] == ["one", "new two"]


def test_claims_of_a_cell_are_counted_past_nine(begun):
    claims.enter("cell")
    for number in range(1, 12):
        claim(f"claim {number}", True)
    assert [row["text"] for row in read_ledger(begun)] == [f"claim {n}" for n in range(1, 12)]


def test_a_ledger_that_cannot_be_written_is_no_error(begun, capsys):
    begun.mkdir()
    claim(TEXT, True)
    assert capsys.readouterr().out == f"✓ {TEXT}\n"


def test_another_file_can_be_named(begun, tmp_path, monkeypatch):
    monkeypatch.setenv("SFT_LEDGER", str(tmp_path / "new" / "other.jsonl"))
    lesson.begin("01_sums")
    claim(TEXT, True)
    assert not begun.exists() and len(rows(tmp_path / "new" / "other.jsonl")) == 1


CELLS = {
    "setup": "from sftlib import lesson\nlesson.begin('01_sums')",
    "train": "losses = [3, 1]",
    "claims": "smaller = losses[1] < losses[0]\nlesson.claim('a', smaller)\nlesson.claim('b', 1>0)",
    "after": "lesson.claim('c', smaller)",
}


@pytest.fixture
def shell(begun):
    """A kernel's shell in which the notebook of the cells above has begun."""
    cells = [{"cell_type": "code", "id": name, "source": text} for name, text in CELLS.items()]
    Path("01_sums.ipynb").write_text(json.dumps({"cells": cells}))
    shell = InteractiveShell.instance()
    assert shell.run_cell(CELLS["setup"], cell_id="setup").success
    yield shell
    InteractiveShell.clear_instance()


def test_a_claim_is_known_by_its_cell_also_where_no_id_is_sent(shell, begun):
    shell.run_cell(CELLS["train"])
    shell.run_cell(CELLS["claims"])  # nbval sends no id
    shell.run_cell("lesson.claim('mine', True)", cell_id="own")
    found = [(row["id"], row["text"]) for row in read_ledger(begun)]
    assert found == [("claims", "a"), ("claims/2", "b"), ("own", "mine")]


def test_a_cell_that_runs_again_replaces_its_claims(shell, begun):
    for text in (CELLS["claims"], CELLS["claims"].replace("'b'", "'edited'")):
        shell.run_cell(text, cell_id="claims")
    found = [(row["id"], row["text"]) for row in read_ledger(begun)]
    assert found == [("claims", "a"), ("claims/2", "edited")]
    shell.run_cell("lesson.claim('alone', True)", cell_id="claims")
    assert [row["text"] for row in read_ledger(begun)] == ["alone"]


def test_claims_of_cells_that_run_first_keep_their_own_cell(shell, begun, capsys):
    shell.run_cell(CELLS["after"], cell_id="after")
    assert "First running train, claims" in capsys.readouterr().out
    found = [(row["id"], row["text"]) for row in read_ledger(begun)]
    assert found == [("claims", "a"), ("claims/2", "b"), ("after", "c")]
