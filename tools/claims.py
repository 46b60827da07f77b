"""The ledger of claims: `data/claims.json`, and the page `notebooks/claims.md`; `make claims`.

Without an argument it collects what the last run of each lesson claimed, from `work/claims.jsonl`.
`--run` runs all lessons first, without storing their outputs. What is written agrees with the
outputs that are stored in the notebooks, or nothing is written. `page` writes only the page again,
from the ledger that is there (`make format`).
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Collection
from pathlib import Path

from sftlib.data.files import replace_text
from sftlib.lesson.claims import line, read_ledger

from tools.notebooks import NBCONVERT, SETTINGS
from tools.readme_table import opening

ROOT = Path(__file__).resolve().parent.parent
Row = dict
HEAD = """# What the lessons claim, and what was measured

Each row is a claim of a lesson, checked whenever the lesson runs. It was measured with the tiny
base model that ships with the course. The bound is the condition that is checked: "nearly all" and
"few" mean what it says. [data/claims.json](../data/claims.json) also holds the machine and the
versions. `make claims` writes this page.

| kind | what it rests on |
|---|---|
| arithmetic | definitions: a count, an identity |
| one run | one training or one measurement |
| seeds | several runs, each with another seed |
| control | a second run, in which only the supposed cause differs |
| stored | a run that was measured earlier and is stored in the course |
| source | a published figure, compared with ours |
"""


def lessons(root: Path) -> list[Path]:
    return sorted((root / "notebooks").glob("[0-9][0-9]_*.ipynb"))


def stored(root: Path) -> list[Row]:
    """The ledger as it is in the course; empty if there is none yet."""
    path = root / "data" / "claims.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def shown(notebook: Path) -> dict[str, list[str]]:
    """The lines that claims print in the stored outputs of a notebook, by the id of their cell.

    A cell with claims and without stored lines has an empty list.
    """
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return {
        cell["id"]: [
            text
            for output in cell["outputs"]
            for text in "".join(output.get("text", [])).splitlines()
            if text.startswith("✓ ")
        ]
        for cell in cells
        if "claim" in cell["metadata"].get("tags", [])
    }


def problems(notebook: Path, rows: list[Row]) -> list[str]:
    """Why the claims of a run are not what a lesson's stored outputs show; empty if they are."""
    name, again = notebook.stem, f"Run: make run NB={notebook.stem[:2]}"
    wanted = shown(notebook)
    if not rows:
        why = "its run left no row" if wanted else "no cell makes a claim"
        return [f"{name}: {why}. {again if wanted else 'Add lesson.claim(…)'}"]
    found: dict[str, list[str]] = {cell: [] for cell in wanted}
    for row in rows:
        found.setdefault(_cell(row), []).append(line(row))
    twice = [text for text, n in Counter(row["text"] for row in rows).items() if n > 1]
    said = [f"{name}: claimed twice: {text}. Say how the two differ" for text in twice]
    failed = [row for row in rows if not row["holds"]]
    said += [f"{name}, {row['id']} fails: {row['text']}: {row['measured']}" for row in failed]
    for cell, lines in found.items():
        if lines != wanted.get(cell) and all(text.startswith("✓ ") for text in lines):
            said.append(
                f"{name}, {cell}: the run printed {lines or 'no claim'}, the notebook shows "
                f"{wanted.get(cell) or 'none'}. {again}"
            )
    return said


def merged(before: list[Row], rows: list[Row], notebook: Path) -> list[Row]:
    """The ledger with the rows of one lesson replaced, in the order of lessons and cells.

    A row of which only the date would change stays as it was.
    """
    old = {(row["lesson"], row["text"]): row for row in before}
    cells = list(shown(notebook))
    new = []
    for row in sorted(rows, key=lambda row: (cells.index(_cell(row)), _number(row))):
        row = {name: value for name, value in row.items() if name != "run"}
        known = old.get((row["lesson"], row["text"]), {})
        new.append(known if known | {"date": ""} == row | {"date": ""} else row)
    others = [row for row in before if row["lesson"] != notebook.stem]
    return sorted(others + new, key=lambda row: row["lesson"])


def _cell(row: Row) -> str:
    return row["id"].split("/")[0]


def _number(row: Row) -> int:
    """The place of a claim in its cell, from 1."""
    return int(row["id"].partition("/")[2] or 1)


def difference(before: list[Row], rows: list[Row], ran: Collection[str] = ()) -> list[str]:
    """How the claims of other runs differ from the ledger: for each lesson a line, then details.

    Args:
        before: the ledger.
        rows: the claims of the other runs.
        ran: lessons that ran, and perhaps reached no claim. Those without claims are left out.
    """
    said, known_lessons = [], {row["lesson"] for row in before}
    for name in sorted({row["lesson"] for row in rows} | (known_lessons & set(ran))):
        found = {row["text"]: row for row in rows if row["lesson"] == name}
        known = {row["text"]: row for row in before if row["lesson"] == name}
        details = [
            f"  ✗ {row['text']}: {row['measured'] or 'not so'}{_was(known.get(text), row)}"
            for text, row in found.items()
            if not row["holds"]
        ]
        details += [
            f"  ~ {text}: {row['measured']}{_was(known[text], row)}"
            for text, row in found.items()
            if row["holds"] and text in known and known[text]["measured"] != row["measured"]
        ]
        details += [f"  ? not reached: {text}" for text in known if text not in found]
        details += [f"  + not in the ledger: {text}" for text in found if text not in known]
        hold = sum(row["holds"] for row in found.values())
        said += [f"{name}: {hold} of {len(found)} claims hold", *details]
    return said or ["No lesson made a claim."]


def _was(known: Row | None, row: Row) -> str:
    changed = known and known["measured"] != row["measured"]
    return f" (in the ledger: {known['measured'] or 'nothing measured'})" if changed else ""


# --- Files ---------------------------------------------------------------------------------------


def page(rows: list[Row], root: Path) -> str:
    """The page: for each lesson a table of its claims."""
    parts = [HEAD]
    for notebook in lessons(root):
        own = [row for row in rows if row["lesson"] == notebook.stem]
        if not own:
            continue
        number, title, _ = opening(notebook)
        table = ["| claim | measured | bound | kind | seeds |", "|---|---|---|---|--:|"]
        for row in own:
            names = ("text", "measured", "bound", "kind", "seeds")
            cells = [str(row[name]) for name in names]
            table.append(f"| {' | '.join(map(_plain, cells))} |")
        parts.append("\n".join([f"## Lesson {number}: [{title}]({notebook.name})\n", *table, ""]))
    return "\n".join(parts)


def _plain(text: str) -> str:
    """A text as a cell of a Markdown table, in which `<|im_end|>` stays what it is."""
    parts = re.split(r"(`[^`]*`)", text)
    parts[::2] = [re.sub(r"[*_<$]", r"\\\g<0>", part) for part in parts[::2]]
    return "".join(parts).replace("|", "\\|")


def write(rows: list[Row], root: Path) -> None:
    """The ledger, a line for each row, and the page."""
    text = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    for path, new in (
        (root / "data" / "claims.json", f"[\n{text}\n]\n" if rows else "[]\n"),
        (root / "notebooks" / "claims.md", page(rows, root)),
    ):
        replace_text(path, new)


def update(notebook: Path, rows: list[Row]) -> None:
    """Put a lesson's claims into the ledger; `make run` does it when it has stored the outputs.

    Without rows nothing happens where the notebook has claims: another model has run.

    Raises:
        ValueError: the rows are not what the notebook shows.
    """
    if not rows and shown(notebook):
        return
    if rows and (wrong := problems(notebook, rows)):
        raise ValueError("\n".join(wrong))
    root = notebook.resolve().parents[1]
    before = stored(root)
    if (after := merged(before, rows, notebook)) != before:
        write(after, root)


def run_all(ledger: Path, root: Path) -> None:
    """Run each lesson to its end, whatever fails in it, and store nothing but its claims."""
    quiet = {**os.environ, **SETTINGS, "SFT_NO_BARS": "1", "SFT_LEDGER": str(ledger)}
    with tempfile.TemporaryDirectory() as folder:
        for notebook in lessons(root):
            print(f"{notebook.stem}: running", flush=True)
            command = [*NBCONVERT, "--allow-errors", f"--output-dir={folder}", str(notebook)]
            subprocess.run(command, env=quiet, check=True)


def main(*options: str) -> int:
    if options == ("page",):
        write(stored(ROOT), ROOT)
        return 0
    ledger = ROOT / "work" / "claims.jsonl"
    with tempfile.TemporaryDirectory() as folder:
        if "--run" in options:
            ledger = Path(folder, "claims.jsonl")
            run_all(ledger, ROOT)
        rows = read_ledger(ledger)
    before = stored(ROOT)
    print(*difference(before, rows), sep="\n")
    after, wrong = before, []
    for notebook in lessons(ROOT):
        own = [row for row in rows if row["lesson"] == notebook.stem]
        if found := problems(notebook, own):
            wrong += found
        else:
            after = merged(after, own, notebook)
    if wrong:
        print("Nothing is written:", *wrong, sep="\n", file=sys.stderr)
        return 1
    write(after, ROOT)
    print(f"{len(after)} claims of {len(lessons(ROOT))} lessons are in data/claims.json")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
