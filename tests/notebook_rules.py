"""The rules that every notebook obeys.

A rule takes a notebook and its path, and returns a sentence for each problem: where it is, and what
to do. `RULES` lists them all; tests/test_notebooks.py applies them, and breaks each of them once.
"""

import ast
import re
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
from nbformat import NotebookNode
from nbstripout import strip_output

from tools.notebooks import EXTRA_KEYS

Rule = Callable[[NotebookNode, Path], list[str]]
AGAIN = "Run: make run"


# --- What was executed ---------------------------------------------------------------------------


def counts_run_from_one(nb: NotebookNode, path: Path) -> list[str]:
    """Stored outputs come from one run, top to bottom, of every cell."""
    return [
        f"cell {i}: execution count {cell.execution_count}, expected {expected}. {AGAIN}"
        for expected, (i, cell) in enumerate(code_cells(nb), 1)
        if cell.execution_count != expected
    ]


def printing_cells_have_output(nb: NotebookNode, path: Path) -> list[str]:
    """nbval compares nothing where nothing is stored."""
    problems = [
        f"cell {i}: it prints, and has no stored output. {AGAIN}"
        for i, cell in code_cells(nb)
        if prints(cell.source) and not cell.outputs
    ]
    if not any(cell.outputs for _, cell in code_cells(nb)):
        problems.append(f"no cell has a stored output. {AGAIN}")
    return problems


def errors_are_announced(nb: NotebookNode, path: Path) -> list[str]:
    """An error is shown only where the lesson means to show one."""
    return [
        f"cell {i}: a stored {output.ename}. Correct the cell, or tag it raises-exception"
        for i, cell, output in outputs(nb)
        if output.output_type == "error" and "raises-exception" not in cell.metadata.get("tags", [])
    ]


def nothing_on_stderr(nb: NotebookNode, path: Path) -> list[str]:
    """Warnings distract, and differ from machine to machine."""
    return [
        f"cell {i}: output on stderr, {output.text[:60]!r}. Remove its cause"
        for i, _, output in outputs(nb)
        if output.output_type == "stream" and output.name == "stderr"
    ]


def no_widget_is_stored(nb: NotebookNode, path: Path) -> list[str]:
    """Without its kernel a widget shows nothing, and GitHub, slides and HTML show text."""
    return [
        f"cell {i}: a stored widget. {AGAIN}"
        for i, _, output in outputs(nb)
        if any("jupyter.widget" in kind for kind in output.get("data", {}))
    ]


def claims_are_checked(nb: NotebookNode, path: Path) -> list[str]:
    """At least one cell asserts what the text says."""
    if any(
        re.search(r"\bassert\b|\bcheck_\w+\(|\bchecks\.\w+\(", c.source) for _, c in code_cells(nb)
    ):
        return []
    return ["no cell asserts anything. Assert each claim in the cell after it"]


# --- What must not stand in it -------------------------------------------------------------------

PATHS = re.compile(
    r"(?<![\w/.])/(?:home|root|work|Users|tmp)(?![\w.-])"
    r"|\b[A-Za-z]:\\{1,2}(?:Users|Windows|Program|Documents|Temp)|\bC:\\(?![nrt\"'])"
)
SECRETS = re.compile(
    r"\bsk-[A-Za-z0-9_-]{16,}|\bhf_[A-Za-z0-9]{20,}|\bgh[pousr]_[A-Za-z0-9]{20,}"
    r"|\bgithub_pat_\w{20,}|\bAKIA[0-9A-Z]{16}\b"
)
# A revision or a checksum is public; it says what it is.
HEX = re.compile(
    r"((?:revision|commit|sha)\S{0,8} ?\S{0,2})?\b(?=[0-9]*[a-f])[0-9a-f]{32,}\b", re.I
)
INSTALLS = re.compile(
    r"\b(?:pip3?|conda|mamba|uv)\s+(?:\w+\s+)?install\b|\bnotebook_login\(|\blogin\(\s*token|"
    r"^\s*[!%].*\blogin\b",
    re.MULTILINE,
)


NUMBER = re.compile(r"(?<![\w.,⁻-])(\d[\d,]*(?:\.\d+)?)(?!\w|\.\d)")
COUNTED = re.compile(  # names of things, not measurements
    r"(sections?|lessons?|tables?|exercises?|Llama|GPT-|ZeRO-|stages?|TRL|version) ?[\d., and]+",
    re.IGNORECASE,
)
NOT_PROSE = re.compile(r"\]\([^)]*\)|`[^`]*`|\$[^$]*\$|&#\d+;")


def numbers_in_prose_are_printed(nb: NotebookNode, path: Path) -> list[str]:
    """A figure in the text stands in a cell's code or output, or its line names a source.

    Looked at are numbers above ten and those with decimals; one that a cell shows in full may be
    rounded, or in other units. The title, exercises and pitfalls are left out.
    """
    if path.parent.name == "solutions":  # they repeat what an exercise says
        return []
    shown = {
        float(number.replace(",", "")) * unit
        for _, cell in code_cells(nb)
        for part in (cell.source, *map(readable, cell.outputs))
        for number in re.findall(r"\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?", re.sub(r"<[^>]+>", " ", part))
        for unit in (1, 100, 0.01, 1e3, 1e6, 1e9, 1e-3, 1e-6, 1e-9)
    }
    problems = []
    for i, cell in enumerate(nb.cells):
        name = cell.get("id", "")
        if cell.cell_type == "code" or i == 0 or name.startswith(("ex", "pitfalls")):
            continue
        for line in cell.source.splitlines():
            if "http" in line or line.startswith("#"):
                continue
            for number in NUMBER.findall(COUNTED.sub("", NOT_PROSE.sub("", line))):
                value, digits = float(number.replace(",", "")), len(number.partition(".")[2])
                if value <= 10 and not digits or 1990 < value < 2030:  # a few; a year
                    continue
                near = (
                    round(one, digits) == value or abs(one - value) < value / 200 for one in shown
                )
                if not any(near):
                    problems.append(f"cell {i}, {name}: {number}. Print it, or name its source")
    return problems


def no_absolute_path(nb: NotebookNode, path: Path) -> list[str]:
    """A path of the author's machine exists on no other."""
    return [
        f"cell {i}: the absolute path {found[0]!r} in its {where}. Use a relative one"
        for i, where, text in texts(nb)
        if (found := PATHS.search(text))
    ]


def no_secret(nb: NotebookNode, path: Path) -> list[str]:
    """What was published once is not secret any more."""
    return [
        f"cell {i}: something like a key in its {where}, {found[0][:6]}... Remove it and revoke it"
        for i, where, text in texts(nb)
        for found in [*SECRETS.finditer(text), *(m for m in HEX.finditer(text) if not m[1])]
    ]


def no_install_no_login(nb: NotebookNode, path: Path) -> list[str]:
    """The environment is made by `make`, and lessons need no account."""
    return [
        f"cell {i}: {found[0].strip()!r}. Pin it in requirements.txt, or leave it out"
        for i, cell in code_cells(nb)
        if (found := INSTALLS.search(cell.source))
    ]


# --- The file ------------------------------------------------------------------------------------


def valid(nb: NotebookNode, path: Path) -> list[str]:
    """Every Jupyter front end can read it."""
    try:
        nbformat.validate(deepcopy(nb))
    except nbformat.ValidationError as problem:
        return [f"not a valid notebook: {str(problem).splitlines()[0]}. Save it in JupyterLab"]
    return []


def cells_have_ids(nb: NotebookNode, path: Path) -> list[str]:
    """Without ids each save changes the whole file."""
    ids = [cell.get("id") for cell in nb.cells]
    return [
        f"cell {i}: {'no id' if not name else f'the id {name!r} twice'}. Save it in JupyterLab"
        for i, name in enumerate(ids)
        if not name or ids.count(name) > 1
    ]


def kernel_is_python3(nb: NotebookNode, path: Path) -> list[str]:
    """Other kernels exist on the author's machine only."""
    name = nb.metadata.get("kernelspec", {}).get("name")
    return [] if name == "python3" else [f"kernel {name!r}, expected 'python3'. Change it"]


def metadata_is_clean(nb: NotebookNode, path: Path) -> list[str]:
    """No widget state, no versions, no times: they outweigh the lesson and change with each run."""
    clean = strip_output(
        deepcopy(nb), keep_output=True, keep_count=True, keep_id=True, extra_keys=CLEANED
    )
    places = [
        f"cell {i}" for i, (a, b) in enumerate(zip(nb.cells, clean.cells, strict=True)) if a != b
    ]
    places += ["the notebook"] if nb.metadata != clean.metadata else []
    return [f"{place}: metadata that changes from run to run. Run: make format" for place in places]


# What the command nbstripout removes by default, and what tools/notebooks.py adds.
CLEANED = [
    *("metadata.signature", "metadata.widgets", "cell.metadata.collapsed"),
    *("cell.metadata.ExecuteTime", "cell.metadata.execution", "cell.metadata.heading_collapsed"),
    *("cell.metadata.hidden", "cell.metadata.scrolled", *EXTRA_KEYS),
]


# --- What readers need ---------------------------------------------------------------------------


def images_are_described(nb: NotebookNode, path: Path) -> list[str]:
    """Who cannot see a picture, or does not know what to look for, is told."""
    problems = [
        f"cell {i}: a picture without words. Print a sentence, or let a text cell follow"
        for i, cell in enumerate(nb.cells)
        if any(
            kind.startswith("image/")
            for out in cell.get("outputs", [])
            for kind in out.get("data", {})
        )
        and not described(nb, i)
    ]
    problems += [
        f"cell {i}: an <img> or ![]() without alternative text in its {where}. Say what it shows"
        for i, where, text in texts(nb)
        if re.search(r"!\[\s*\]\(|<img(?![^>]*\balt=[\"'][^\"']{3})[^>]*>", text)
    ]
    return problems


def links_lead_somewhere(nb: NotebookNode, path: Path) -> list[str]:
    """Relative links, images and anchors exist; addresses are well-formed. No network is used."""
    return [
        f"cell {i}: the link {link!r} leads nowhere: {why}. Correct it"
        for i, cell in enumerate(nb.cells)
        if cell.cell_type == "markdown"
        for link in links(cell.source)
        if (why := broken(link, nb, path))
    ]


def opens_with_title_and_promise(nb: NotebookNode, path: Path) -> list[str]:
    """The README's table of lessons is made from the first cell."""
    first = nb.cells[0].source if nb.cells else ""
    if path.parent.name == "solutions" or re.match(r"# Lesson \d+: .+(?s:.*)^> .+", first, re.M):
        return []
    return [
        "cell 0: begin with a line '# Lesson N: Title', then a line '> promise in one sentence'"
    ]


def lesson_and_solutions_are_twins(nb: NotebookNode, path: Path) -> list[str]:
    """Every lesson has its solutions, and no solutions are left behind."""
    lesson = path.parent.name != "solutions"
    twin = path.parent / "solutions" / path.name if lesson else path.parent.parent / path.name
    return [] if twin.exists() else [f"{twin.name} is missing in {twin.parent.name}/. Add it"]


def lesson_begins_itself(nb: NotebookNode, path: Path) -> list[str]:
    """After a restart and the set-up cell, any cell can be run: the set-up cell sees to it."""
    wanted = f'work = lesson.begin("{path.stem}")'
    if path.parent.name == "solutions":
        return []
    found = [cell.source for cell in nb.cells if cell.get("id") == "setup"]
    if found and found[0].rstrip().endswith(wanted):
        return []
    return [f"expected a cell with the id 'setup' that ends with {wanted}. Add it"]


def lesson_ends_with_its_versions(nb: NotebookNode, path: Path) -> list[str]:
    """Who reports a result, or a problem, can say what it ran with."""
    last = [cell for _, cell in code_cells(nb)][-1:]
    if path.parent.name == "solutions" or (last and "lesson.environment()" in last[0].source):
        return []
    return ["the last cell does not print lesson.environment(). Add the cell `environment`"]


def predictions_have_outcomes(nb: NotebookNode, path: Path) -> list[str]:
    """Who predicts is told what came out, after the cell in which they chose."""
    asked: dict[str, int] = {}
    told: dict[str, int] = {}
    problems = []
    for i, cell in code_cells(nb):
        for name in called_with(cell.source, "predict"):
            if name in asked:
                problems.append(f"cell {i}: the prediction {name!r} again. Give it another id")
            asked.setdefault(name, i)
        told |= {name: i for name in called_with(cell.source, "outcome")}
    for name in asked | told:
        if name not in asked:
            problems.append(f"cell {told[name]}: no prediction {name!r}. Correct the id")
        elif told.get(name, -1) <= asked[name]:
            problems.append(
                f"cell {asked[name]}: the prediction {name!r} without a later outcome. Add "
                f"lesson.outcome({name!r}, …) to the cell that shows it"
            )
    return problems


EXERCISE = re.compile(
    r"^### Exercise (\d+): .+\n+\*Difficulty [★☆]{3} · importance [★☆]{3} · \d+ minutes\*$", re.M
)


def exercises_say_what_they_take(nb: NotebookNode, path: Path) -> list[str]:
    """Numbered from one; each with difficulty, importance and minutes in the same form."""
    if path.parent.name == "solutions":
        return []
    text = "\n\n".join(cell.source for cell in nb.cells if cell.cell_type == "markdown")
    headings = re.findall(r"^### Exercise.*$", text, re.MULTILINE)
    numbers = [int(found[1]) for found in EXERCISE.finditer(text)]
    if numbers == list(range(1, len(headings) + 1)):
        return []
    return [
        f"exercises {headings}: expected each as '### Exercise N: …', an empty line, and "
        "'*Difficulty ★★☆ · importance ★★★ · 6 minutes*'. Write them so"
    ]


RULES: list[Rule] = [
    counts_run_from_one,
    printing_cells_have_output,
    errors_are_announced,
    nothing_on_stderr,
    no_widget_is_stored,
    claims_are_checked,
    numbers_in_prose_are_printed,
    no_absolute_path,
    no_secret,
    no_install_no_login,
    valid,
    cells_have_ids,
    kernel_is_python3,
    metadata_is_clean,
    images_are_described,
    links_lead_somewhere,
    opens_with_title_and_promise,
    lesson_and_solutions_are_twins,
    lesson_begins_itself,
    lesson_ends_with_its_versions,
    predictions_have_outcomes,
    exercises_say_what_they_take,
]


# --- Walking through a notebook ------------------------------------------------------------------


def code_cells(nb: NotebookNode) -> Iterator[tuple[int, NotebookNode]]:
    """Index and cell of every code cell that holds something."""
    for i, cell in enumerate(nb.cells):
        if cell.cell_type == "code" and cell.source.strip():
            yield i, cell


def outputs(nb: NotebookNode) -> Iterator[tuple[int, NotebookNode, NotebookNode]]:
    """Index, cell and output of every stored output."""
    for i, cell in code_cells(nb):
        for output in cell.outputs:
            yield i, cell, output


def texts(nb: NotebookNode) -> Iterator[tuple[int, str, str]]:
    """Everything readable: cell index, "source" or "output", and the text. Not the pixels."""
    for i, cell in enumerate(nb.cells):
        yield i, "source", cell.source
    for i, _, output in outputs(nb):
        yield i, "output", readable(output)


def readable(output: NotebookNode) -> str:
    """The text of an output, also out of HTML; pictures inside HTML are left out."""
    if output.output_type == "stream":
        return output.text
    if output.output_type == "error":
        return "\n".join([output.evalue, *output.traceback])
    data = [str(v) for kind, v in output.data.items() if not kind.startswith("image/")]
    return re.sub(r"data:image/[^\"')\s]+", "", "\n".join(data))


def prints(source: str) -> bool:
    """Whether the cell, in any case, prints or displays something."""
    try:
        tree = ast.parse(re.sub(r"^\s*[%!].*$", "", source, flags=re.MULTILINE))
    except SyntaxError:  # more of IPython's own syntax: no statement about it
        return False
    return any(
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Call)
        and getattr(node.value.func, "id", "") in {"print", "display"}
        for node in tree.body
    )


def called_with(source: str, function: str) -> list[str]:
    """The texts that come first in calls of `lesson.<function>`, in their order."""
    try:
        tree = ast.parse(re.sub(r"^\s*[%!].*$", "", source, flags=re.MULTILINE))
    except SyntaxError:  # more of IPython's own syntax: no statement about it
        return []
    return [
        node.args[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) == f"lesson.{function}"
        and node.args
        and isinstance(node.args[0], ast.Constant)
    ]


def described(nb: NotebookNode, i: int) -> bool:
    """Whether words say what a picture shows: 40 characters beside it, or a text cell after it."""
    if i + 1 < len(nb.cells) and nb.cells[i + 1].cell_type == "markdown":
        return True
    words = " ".join(readable(output) for output in nb.cells[i].outputs)
    return len(re.sub(r"<[^>]*>|<?Figure size .*", "", words).strip()) >= 40


def links(markdown: str) -> list[str]:
    """The targets of all links and images outside of code."""
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", markdown, flags=re.DOTALL)
    inline = re.findall(r"\]\(\s*<?([^)\s>]*)>?(?:\s+[\"'][^)]*)?\)", prose)
    return inline + re.findall(r"(?:href|src)=[\"']([^\"']*)[\"']", prose)


def broken(link: str, nb: NotebookNode, path: Path) -> str:
    """Why a link leads nowhere; empty where it does not."""
    parts = urlsplit(link)
    if parts.scheme in {"http", "https"}:
        host = parts.hostname or ""
        return "" if re.fullmatch(r"([\w-]+\.)+[a-z]{2,}", host) else "it has no proper host"
    if parts.scheme in {"mailto", "data"}:
        return ""
    if parts.scheme or link.startswith("/"):
        return "neither a web address nor a relative path"
    target = path.parent / unquote(parts.path) if parts.path else path
    if parts.path and not target.exists():
        return "there is no such file"
    known = anchors(nb if target == path else target)
    return "" if not parts.fragment or unquote(parts.fragment) in known else "no such heading"


def anchors(target: NotebookNode | Path) -> set[str]:
    """The anchors of a notebook's or a Markdown file's headings, for JupyterLab and for GitHub."""
    if isinstance(target, Path):
        if target.suffix not in {".ipynb", ".md"}:
            return set()
        text = target.read_text(encoding="utf-8")
        target = nbformat.reads(text, 4) if target.suffix == ".ipynb" else text
    cells = (
        [target]
        if isinstance(target, str)
        else [cell.source for cell in target.cells if cell.cell_type == "markdown"]
    )
    heads = re.findall(r"^#{1,6} +(.+?) *#*$", "\n".join(cells), re.MULTILINE)
    names = set(re.findall(r"\b(?:id|name)=[\"']([^\"']+)", "\n".join(cells)))
    for head in (re.sub(r"[*`]", "", head) for head in heads):
        names |= {head.replace(" ", "-"), re.sub(r"[^\w -]", "", head).lower().replace(" ", "-")}
    return names
