"""Write the README's lesson table from the notebooks; `make format` does it.

A lesson's first cell begins with `# Lesson 1: Title` and has a line `> promise`. Minutes come from
`data/benchmarks.json`, `{"machine": "...", "seconds": {"01_what_is_sft": 61.2}}`, where it exists.
"""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- lessons:begin -->", "<!-- lessons:end -->"
TITLE = re.compile(r"^# Lesson (\d+): (.+)$", re.MULTILINE)
PROMISE = re.compile(r"^> (.+)$", re.MULTILINE)


def opening(notebook: Path) -> tuple[str, str, str]:
    """Number, title and promise of a lesson."""
    first = "".join(json.loads(notebook.read_text(encoding="utf-8"))["cells"][0]["source"])
    title, promise = TITLE.search(first), PROMISE.search(first)
    if not title or not promise:
        raise ValueError(
            f"{notebook.name}: the first cell must hold a line '# Lesson N: Title' and a line "
            f"'> promise'; found {first[:80]!r}"
        )
    return title[1], title[2].strip(), promise[1].strip()


def table(root: Path = ROOT) -> str:
    """The block between the two marks, marks included."""
    lessons = sorted((root / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    if not lessons:
        return f"{BEGIN}\nNo lesson is finished yet.\n{END}"
    stored = root / "data/benchmarks.json"
    measured = json.loads(stored.read_text()) if stored.exists() else {"seconds": {}}
    rows = ["| | Lesson | What you will have done | Minutes |", "|--:|---|---|--:|"]
    for path in lessons:
        number, title, promise = opening(path)
        seconds = measured["seconds"].get(path.stem)
        minutes = f"{seconds / 60:.1f}" if seconds else "not measured"
        link = path.relative_to(root).as_posix()
        cells = (number, f"[{title}]({link})", promise.replace("|", "\\|"), minutes)
        rows.append(f"| {' | '.join(cells)} |")
    if measured["seconds"]:
        rows += ["", f"Minutes: every cell, run from top to bottom on {measured['machine']}."]
    return "\n".join([BEGIN, *rows, END])


def updated(readme: str, root: Path = ROOT) -> str:
    """The README with its lesson table made anew."""
    if BEGIN not in readme or END not in readme:
        raise ValueError(f"README.md must hold the marks {BEGIN} and {END}; found not both")
    before, rest = readme.split(BEGIN, 1)
    return before + table(root) + rest.split(END, 1)[1]


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(updated(path.read_text(encoding="utf-8")), encoding="utf-8")
