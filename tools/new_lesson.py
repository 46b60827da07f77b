"""Begin a lesson from the template: `make new-lesson NAME=10_topic TITLE="A title"`.

It writes the lesson, its solutions, the checks of its exercises and answers that try these checks,
from `tools/template/`, and makes the checks known to `sftlib.checks`. Nothing that exists is
changed otherwise.
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TEMPLATE = Path(__file__).resolve().parent / "template"


def new_lesson(name: str, title: str, root: Path = ROOT) -> list[Path]:
    """The files of a new lesson.

    Args:
        name: two digits and the topic, a noun of the field: `10_quantisation`.
        title: what stands after `# Lesson 10:`.

    Raises:
        ValueError: the name has another form, the number is taken, or there is no title.
    """
    if not (form := re.fullmatch(r"(\d\d)_([a-z][a-z0-9_]*)", name)):
        raise ValueError(
            f"Expected NAME as two digits, _ and a topic in small letters, found {name!r}. "
            'Try: make new-lesson NAME=10_quantisation TITLE="Quantisation, measured"'
        )
    if not title.strip():
        raise ValueError('Expected a TITLE, found none. Add: TITLE="Quantisation, measured"')
    number, topic = form[1], form[2]
    taken = sorted((root / "notebooks").glob(f"{number}_*.ipynb"))
    module = root / "sftlib" / "checks" / f"{topic}.py"
    if taken or module.exists():
        raise ValueError(
            f"Expected a new number and topic, found {[*taken, module][0].name} there."
        )
    targets = {
        "lesson.ipynb": root / "notebooks" / f"{name}.ipynb",
        "solutions.ipynb": root / "notebooks" / "solutions" / f"{name}.ipynb",
        "checks.py": module,
        "attacks.py": root / "tests" / "attacks" / f"lesson_{int(number)}.py",
    }
    words = {"NUMBER": str(int(number)), "TITLE": title.strip(), "STEM": name, "TOPIC": topic}
    for source, target in targets.items():
        text = (TEMPLATE / source).read_text(encoding="utf-8")
        for word, meaning in words.items():
            if source.endswith(".ipynb"):
                meaning = json.dumps(meaning, ensure_ascii=False)[1:-1]
            text = re.sub(rf"(?<![A-Z]){word}(?![A-Z])", meaning.replace("\\", r"\\"), text)
        target.write_text(text, encoding="utf-8")
    known = root / "sftlib" / "checks" / "__init__.py"
    known.write_text(with_check(known.read_text(encoding="utf-8"), topic), encoding="utf-8")
    return [*targets.values(), known]


def with_check(text: str, topic: str) -> str:
    """The text of `sftlib/checks/__init__.py` with the check of a new topic, in its order."""
    imports, rest = text.split("\n\n__all__ = [\n", 1)
    names, after = rest.split("\n]", 1)
    listed = sorted([*names.split("\n"), f'    "check_{topic}",'])
    line = f"from sftlib.checks.{topic} import check_{topic}"
    head, first, others = imports.partition("from sftlib.checks.")
    blocks = re.split(r"\n(?=from )", first + others)
    blocks = sorted([*blocks, line], key=lambda block: block.split(" import ")[0])
    return head + "\n".join(blocks) + "\n\n__all__ = [\n" + "\n".join(listed) + "\n]" + after


def main(name: str = "", title: str = "") -> int:
    try:
        written = new_lesson(name, title)
    except ValueError as problem:
        print(problem, file=sys.stderr)
        return 1
    print("Written:", *(f"  {path.relative_to(ROOT)}" for path in written), sep="\n")
    print(f"Next: write it in `make lab`, then `make run NB={name[:2]}`; see CONTRIBUTING.md.")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
