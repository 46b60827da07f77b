"""Write the README's tables, and the instructors' list and table; `make format` does it.

A lesson's first cell begins with `# Lesson 1: Title` and has a line `> promise`. Times come from
`data/benchmarks.json`, `{"machine": "...", "seconds": {"01_what_is_sft": 61.2}, "lessons": …}`,
where it exists; `make bench ARGS="seconds --store"` measures them. The table of the GPU comes from
`data/runs/gpu.json`, which `make gpu` writes.
"""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- lessons:begin -->", "<!-- lessons:end -->"
PAGES_BEGIN, PAGES_END = "<!-- pages:begin -->", "<!-- pages:end -->"
GPU_BEGIN, GPU_END = "<!-- gpu:begin -->", "<!-- gpu:end -->"
TITLE = re.compile(r"^# Lesson (\d+): (.+)$", re.MULTILINE)
PROMISE = re.compile(r"^> (.+)$", re.MULTILINE)


def first_cell(notebook: Path) -> str:
    return "".join(json.loads(notebook.read_text(encoding="utf-8"))["cells"][0]["source"])


def opening(notebook: Path) -> tuple[str, str, str]:
    """Number, title and promise of a lesson."""
    first = first_cell(notebook)
    title, promise = TITLE.search(first), PROMISE.search(first)
    if not title or not promise:
        raise ValueError(
            f"{notebook.name}: the first cell must hold a line '# Lesson N: Title' and a line "
            f"'> promise'; found {first[:80]!r}"
        )
    return title[1], title[2].strip(), promise[1].strip()


READING = re.compile(
    r"(?P<some>half an hour|three quarters of an hour|an hour|\d+ minutes) of reading"
    r"|[Rr]eading[\w ]* (?P<take>\d+ minutes)"
)
HOURS = {"half an hour": "30", "three quarters of an hour": "45", "an hour": "60"}


def reading(notebook: Path) -> str:
    """The minutes of reading that a lesson's first cell names; empty if it names none."""
    found = READING.search(first_cell(notebook))
    said = (found["some"] or found["take"]) if found else ""
    return HOURS.get(said, said.removesuffix(" minutes"))


def in_class(notebook: Path) -> str:
    """The minutes that the instructor's page plans; empty if there is no such page."""
    page = notebook.parent.parent / "instructor" / f"{notebook.stem}.md"
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    found = re.search(r"\*\*In all: (\d+) minutes\*\*", text)
    return found[1] if found else ""


def table(root: Path = ROOT) -> str:
    """The block between the two marks, marks included."""
    lessons = sorted((root / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    if not lessons:
        return f"{BEGIN}\nNo lesson is finished yet.\n{END}"
    stored = root / "data/benchmarks.json"
    measured = json.loads(stored.read_text()) if stored.exists() else {"seconds": {}}
    rows = [
        "| | Lesson | What you will have done | Computing | Reading | In class |",
        "|--:|---|---|--:|--:|--:|",
    ]
    for path in lessons:
        number, title, promise = opening(path)
        seconds = measured["seconds"].get(path.stem)
        minutes = f"{seconds / 60:.1f}" if seconds else "not measured"
        link = path.relative_to(root).as_posix()
        cells = (number, f"[{title}]({link})", promise.replace("|", "\\|"), minutes)
        cells += (reading(path), in_class(path))
        rows.append(f"| {' | '.join(cells)} |")
    if measured["seconds"]:
        whole = sum(measured["seconds"].values()) / 60
        rows += [
            "",
            "The last columns are minutes. *Computing*: every cell, run from top to bottom on "
            f"{measured['machine']}; {whole:.0f} in all. *Reading*: for somebody who works alone, "
            "without the exercises. *In class*: as the instructor's page plans it.",
        ]
    return "\n".join([BEGIN, *rows, END])


def pages(root: Path = ROOT) -> str:
    """The instructors' pages, one for each lesson, marks included."""
    lessons = sorted((root / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    titles = [(path, *opening(path)) for path in lessons]
    rows = [f"{number}. [{title}]({path.stem}.md)" for path, number, title, _ in titles]
    return "\n".join([PAGES_BEGIN, *rows, PAGES_END])


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


def gpu(root: Path = ROOT) -> str:
    """What `make gpu` found on a GPU, or that it has not been run on one; marks included."""
    stored = root / "data/runs/gpu.json"
    if not stored.exists():
        words = "It has not been run on a GPU yet: `make gpu` does that, and fills in a table here."
        return f"{GPU_BEGIN}\n{words}\n{GPU_END}"
    found = json.loads(stored.read_text(encoding="utf-8"))
    parts, versions = found["parts"], found["versions"].items()
    rows = [
        "| method | peak memory, GiB: `--plan`, script, `trl sft` | tokens/s: script, `trl sft` "
        "| GPU busy: script, `trl sft` |",
        "|---|--:|--:|--:|",
    ]
    for name in ("lora", "qlora", "full"):
        part = parts[name]
        runs = [part.get(way, {}) for way in ("ours", "trl")]
        memory = [part.get("planned_gib"), *(run.get("peak_gib") for run in runs)]
        speed = [run.get("tokens_per_second") for run in runs]
        busy = [run.get("utilisation") for run in runs]
        cells = (_cell(memory, ".1f"), _cell(speed, ",.0f"), _cell(busy, ".0f", " %"))
        rows.append(f"| {name} | {' | '.join(cells)} |")
    rows.append("")
    for name, part in parts.items():
        if "said" in part:
            said = part["said"].replace("|", "\\|").replace("<", "&lt;")
            rows.append(f"- {name}: {part['status']}; {said}")
    rows += [
        "",
        f"{found['machine']}, {found['gpu_gib']} GiB, {found['date']}, "
        f"{', '.join(map(' '.join, versions))}. A model of the shape of Llama 3.2 1B with random "
        f"weights; {found['steps']}. Memory is what PyTorch had allocated at most. `make gpu` "
        "measures it.",
    ]
    return "\n".join([GPU_BEGIN, *rows, GPU_END])


def _cell(figures: list[float | None], form: str, unit: str = "") -> str:
    return ", ".join("–" if figure is None else f"{figure:{form}}{unit}" for figure in figures)


def updated(page: str, block: str) -> str:
    """A page with the block between its two marks, the block's first and last line, made anew."""
    begin, *_, end = block.splitlines()
    if begin not in page or end not in page:
        raise ValueError(f"The page must hold the marks {begin} and {end}; found not both")
    before, rest = page.split(begin, 1)
    return before + block + rest.split(end, 1)[1]


def main() -> None:
    readme, instructors = ROOT / "README.md", ROOT / "instructor/README.md"
    blocks = (readme, table()), (readme, gpu()), (instructors, pages()), (instructors, sections())
    for path, block in blocks:
        path.write_text(updated(path.read_text(encoding="utf-8"), block), encoding="utf-8")


if __name__ == "__main__":
    main()
