"""Lesson 2 against a server: the key that it sends shows nowhere, and no cell depends on it."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

from sftlib.data import read_jsonl
from sftlib.data.hygiene import decontaminate, deduplicate
from sftlib.data.validation import validate
from sftlib.teacher.recording import RECORDING

import nbformat
import pytest
from werkzeug import Request, Response

from tools.notebooks import NBCONVERT
from tools.stored_runs.recording import without_trainings

ROOT = Path(__file__).parents[1]
KEY = "sk-planted-0123456789abcdefghij"


def test_the_mixture_is_clean_and_its_sources_named():
    from sftlib.data import MIXTURE, read_facts

    rows = read_jsonl(MIXTURE)
    sources = Counter(row["source"] for row in rows)
    forms = {"new wordings", "brief", "follow-up"}
    assert set(sources) == {"facts", "by hand", "LLM", "open datasets", *forms}
    assert sources["by hand"] == 5  # none repeats another row, none gives a test question away
    assert len(rows) > 700 and not any(validate(row["messages"]) for row in rows)
    assert deduplicate(rows)[1] == []
    for name in ("dev", "heldout", "heldout_wordings", "unknown", "never_asked"):
        assert decontaminate(rows, read_facts(name))[1] == [], name


def test_hidden_files_among_the_samples_are_not_converted(tmp_path):
    (tmp_path / ".ipynb_checkpoints").mkdir()
    for name in ("alpaca.json", "dolly.jsonl", ".DS_Store", "._alpaca.json"):
        (tmp_path / name).touch()
    cells = nbformat.read(ROOT / "notebooks" / "02_sft_data.ipynb", 4).cells
    (source,) = (cell.source for cell in cells if cell.id == "convert")
    names = {"folder": tmp_path}
    exec(source.splitlines()[0], names)
    assert [path.name for path in names["files"]] == ["alpaca.json", "dolly.jsonl"]


@pytest.mark.integration
def test_the_key_shows_nowhere_in_what_the_lesson_writes(httpserver, tmp_path):
    """The lesson asks a real server on 127.0.0.1, which answers what was recorded."""
    answers = {
        json.dumps(row["request"], sort_keys=True): row["response"] for row in read_jsonl(RECORDING)
    }
    asked = []

    def answer(request: Request) -> Response:
        asked.append(request.headers["Authorization"])
        found = answers[json.dumps(request.get_json(), sort_keys=True)]
        return Response(json.dumps(found), content_type="application/json")

    httpserver.expect_request("/v1/chat/completions").respond_with_handler(answer)
    for folder in ("data", "notebooks", "sftlib"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    lesson = tmp_path / "lesson" / "02_sft_data.ipynb"
    lesson.parent.mkdir()
    nbformat.write(without_trainings(), lesson)
    settings = {
        "SFT_TEACHER": "server",
        "OPENAI_BASE_URL": httpserver.url_for("/v1"),
        "OPENAI_MODEL": "smollm2-135m-instruct",
        "OPENAI_API_KEY": KEY,
        "OPENAI_LOG": "debug",  # even with the client's own logging on
    }
    done = subprocess.run(
        [sys.executable, *NBCONVERT[1:], f"--output-dir={tmp_path}/out", str(lesson)],
        env=os.environ | settings,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(asked) >= len(answers) and set(asked) == {f"Bearer {KEY}"}
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    notebook = nbformat.read(tmp_path / "out" / "02_sft_data.ipynb", 4)
    assert any(cell.get("outputs") for cell in notebook.cells)
    assert {"02_sft_data.ipynb", "mixture.jsonl", "with the fact 0.raw.jsonl"} <= {
        path.name for path in written
    }
    for path in written:
        assert KEY.encode() not in path.read_bytes(), path
    assert KEY not in done.stdout + done.stderr
