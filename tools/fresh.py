"""Copies of the lessons without outputs, in `work/`: nothing is given away. `make fresh` does it.

`work/` lies beside `notebooks/`, and so `../data` and `../work` mean the same in a copy as in the
lesson. What a lesson links to in its own folder, other lessons apart, is linked to from there.

A copy that somebody has changed or run is kept. Each copy carries a digest of its cells: if that
fits, it is as it was written, and a new edition of the lesson may replace it.
"""

import hashlib
import json
import re
import sys
from pathlib import Path

from sftlib.data.files import replace_text

ROOT = Path(__file__).resolve().parent.parent
DIGEST = "sft_fresh"  # in the notebook's metadata
# A link to something in the notebook's own folder: no address, no anchor, no other folder above
LINK = re.compile(r'(\]\(|\b(?:src|href)=")(?!\.\./|#|/|[a-z]+:)([^)"\s]+)')


def turned(text: str, lessons: set[str]) -> str:
    """Markdown whose links, those to lessons apart, lead from `work/` into `notebooks/`."""

    def turn(link: re.Match) -> str:
        is_lesson = link[2].partition("#")[0] in lessons
        return link[0] if is_lesson else f"{link[1]}../notebooks/{link[2]}"

    return LINK.sub(turn, text)


def without_outputs(notebook: dict, lessons: set[str]) -> dict:
    """A lesson as a copy in `work/` holds it."""
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell |= {"outputs": [], "execution_count": None}
        else:
            cell["source"] = turned("".join(cell["source"]), lessons).splitlines(keepends=True)
    notebook["metadata"][DIGEST] = digest(notebook["cells"])
    return notebook


def digest(cells: list[dict]) -> str:
    """SHA-256 of what the cells say and gave; their metadata changes with each look at them."""
    kept = [
        ["".join(cell["source"]), cell.get("outputs"), cell.get("execution_count")]
        for cell in cells
    ]
    return hashlib.sha256(json.dumps(kept).encode()).hexdigest()


def is_ours(path: Path) -> bool:
    """Whether a file is a copy as it was written."""
    try:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        return notebook["metadata"][DIGEST] == digest(notebook["cells"])
    except (ValueError, LookupError, TypeError):
        return False


def main(root: Path = ROOT) -> int:
    lessons = {path.name: path for path in sorted((root / "notebooks").glob("[0-9]*.ipynb"))}
    (root / "work").mkdir(exist_ok=True)
    kept = []
    for name, path in lessons.items():
        notebook = json.loads(path.read_text(encoding="utf-8"))
        text = json.dumps(without_outputs(notebook, set(lessons)), ensure_ascii=False, indent=1)
        copy = root / "work" / name
        if copy.exists() and not is_ours(copy):
            kept.append(name)
        elif not copy.exists() or copy.read_text(encoding="utf-8") != text + "\n":
            replace_text(copy, text + "\n")
    print(f"work/: {len(lessons) - len(kept)} lessons without outputs. Open them there.")
    if kept:
        print(f"You have changed or run these, and they are kept as they are: {', '.join(kept)}.")
        print("For a new copy, rename or delete yours, and run make fresh again.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
