"""Write the README's table of lessons, and the instructors' of sections; `make format` does it.

A lesson's first cell begins with `# Lesson 1: Title` and has a line `> promise`. Times come from
`data/benchmarks.json`, `{"machine": "...", "seconds": {"01_what_is_sft": 61.2}, "lessons": …}`,
where it exists; `make bench ARGS="seconds --store"` measures them.
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
    rows = [
        "| | Lesson | What you will have done | Minutes | Slowest cell |",
        "|--:|---|---|--:|--:|",
    ]
    for path in lessons:
        number, title, promise = opening(path)
        seconds = measured["seconds"].get(path.stem)
        minutes = f"{seconds / 60:.1f}" if seconds else "not measured"
        slowest = measured.get("lessons", {}).get(path.stem, {}).get("slowest", {}).get("seconds")
        slowest = f"{slowest:.0f} s" if slowest else ""
        link = path.relative_to(root).as_posix()
        cells = (number, f"[{title}]({link})", promise.replace("|", "\\|"), minutes, slowest)
        rows.append(f"| {' | '.join(cells)} |")
    if measured["seconds"]:
        whole = sum(measured["seconds"].values()) / 60
        rows += [
            "",
            f"Minutes: every cell, run from top to bottom on {measured['machine']}; "
            f"{whole:.0f} in all.",
        ]
    return "\n".join([BEGIN, *rows, END])


def sections(root: Path = ROOT) -> str:
    """The seconds of each section of each lesson, marks included."""
    stored = root / "data/benchmarks.json"
    measured = json.loads(stored.read_text()) if stored.exists() else {}
    rows = ["| lesson | section | seconds |", "|--:|---|--:|"]
    for stem, found in sorted(measured.get("lessons", {}).items()):
        rows += [
            f"| {int(stem[:2])} | {name} | {seconds:.0f} |"
            for name, seconds in found["sections"].items()
        ]
    where = f"On {measured.get('machine', 'no machine yet')}, from top to bottom."
    return "\n".join([BEGIN, *rows, "", where, END])


def updated(page: str, block: str) -> str:
    """A page with the block between its two marks made anew."""
    if BEGIN not in page or END not in page:
        raise ValueError(f"The page must hold the marks {BEGIN} and {END}; found not both")
    before, rest = page.split(BEGIN, 1)
    return before + block + rest.split(END, 1)[1]


def main() -> None:
    for path, block in ((ROOT / "README.md", table()), (ROOT / "instructor/README.md", sections())):
        path.write_text(updated(path.read_text(encoding="utf-8"), block), encoding="utf-8")


if __name__ == "__main__":
    main()
