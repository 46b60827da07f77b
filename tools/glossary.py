"""Name in each lesson's summary the words that the glossary has from it; `make format` does it.

`notebooks/glossary.md` has a heading `### word` for each, and its text links to the lesson that
explains it first.
"""

import re
from pathlib import Path

import nbformat

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
LINE = re.compile(r"^\*\*Words\*\*.*\n\n", re.MULTILINE)


def terms(glossary: str) -> dict[str, list[str]]:
    """The words of each lesson, by the lesson's file name; those of no lesson under ''."""
    found: dict[str, list[str]] = {}
    for entry in re.split(r"^### ", glossary, flags=re.MULTILINE)[1:]:
        word, text = entry.split("\n", 1)
        lessons = re.findall(r"\]\((\d\d_\w+\.ipynb)\)", re.split(r"^## ", text, flags=re.M)[0])
        found.setdefault(lessons[0] if lessons else "", []).append(word.strip())
    return found


def line(words: list[str]) -> str:
    """The words as links into the glossary; as in JupyterLab, a heading's anchor is its text."""
    links = (f"[{word}](glossary.md#{word.replace(' ', '-')})" for word in words)
    return f"**Words** explained here: {', '.join(links)}.\n\n"


def updated(summary: str, words: list[str]) -> str:
    """The text of a summary cell with its line of words, before the line **Next:**."""
    rest = LINE.sub("", summary)
    if not words or "**Next:**" not in rest:
        return rest
    before, after = rest.split("**Next:**", 1)
    return f"{before}{line(words)}**Next:**{after}"


def main() -> None:
    found = terms((FOLDER / "glossary.md").read_text(encoding="utf-8"))
    for path in sorted(FOLDER.glob("[0-9][0-9]_*.ipynb")):
        nb = nbformat.read(path, nbformat.NO_CONVERT)
        for cell in nb.cells:
            if cell.get("id") == "summary":
                new = updated(cell.source, found.get(path.name, []))
                if new != cell.source:
                    cell.source = new
                    nbformat.write(nb, path)


if __name__ == "__main__":
    main()
