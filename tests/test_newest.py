"""What `make newest` installs, what it says has changed, and how it names the cell that breaks."""

import subprocess
import sys

import nbformat
import pytest

from tools import newest

PINNED = {"torch": "2.13.0", "pytest-httpserver": "1.2.0", "trl": "1.16.0"}


def test_pins_are_read_and_a_package_may_stay_at_its_own():
    assert newest.pins("# a comment==1\ntorch==2.13.0\ntrl==1.16.0  # why\n") == {
        "torch": "2.13.0",
        "trl": "1.16.0",
    }
    assert newest.wanted(PINNED, ["torch"]) == ["torch==2.13.0", "pytest-httpserver", "trl"]


def test_a_name_that_is_no_requirement_is_refused_before_anything_is_installed(capsys):
    assert newest.main("torhc") == 2
    assert "found torhc" in capsys.readouterr().err


def test_only_what_differs_from_its_pin_is_named():
    frozen = "pytest_httpserver==1.2.0\ntorch==2.13.0+cpu\nTRL==1.17.0\nunpinned==3\n"
    assert newest.changes(PINNED, frozen) == ["trl 1.16.0 → 1.17.0"]
    assert newest.changes({"trl": "1.16.0"}, "") == ["trl 1.16.0 → not installed"]


@pytest.mark.integration
@pytest.mark.parametrize(
    ("cells", "found"),
    [
        (["1 + 1"], ""),
        (["x = 1", "from sys import no_such_name"], "Cell 1: ImportError: cannot import name"),
        (["import warnings\nraise UserWarning('gone')"], "Cell 0: UserWarning: gone"),
    ],
)
def test_the_first_cell_that_breaks_is_named_with_its_error(tmp_path, cells, found):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    nbformat.write(notebook, tmp_path / "one.ipynb")
    command = [*newest.command(sys.executable), "--rootdir", str(tmp_path), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert bool(done.returncode) == bool(found), done.stdout
    said = newest.first_failure(done.stdout)
    assert said.startswith(found) and bool(said) == bool(found)
