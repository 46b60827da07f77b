"""The rules that every notebook obeys.

A rule takes a notebook and its path, and returns a sentence for each problem: where it is, and what
to do. tests/test_notebooks.py applies those in `RULES` to every notebook, and breaks each of them
once; tests/test_claim_rules.py does the same with those in `CLAIM_RULES`.
"""

import ast
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from urllib.parse import unquote, urlsplit

from sftlib.lesson.cells import names

import nbformat
from nbformat import NotebookNode
from nbstripout import strip_output

from tools.notebooks import EXTRA_KEYS, calls_claim, holds_claims_alone

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
    """At least one cell checks what the text says."""
    checked = r"\bassert\b|\blesson\.claim\(|\bcheck_\w+\(|\bchecks\.\w+\("
    if any(re.search(checked, cell.source) for _, cell in code_cells(nb)):
        return []
    return ["no cell checks anything. Add a cell with lesson.claim after each result"]


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


# A comparison with something else that was run: "more than LoRA", and not "more than half".
FIXED = r"(?:about |nearly |an? |one|two|three|four|five|ten|half|hal\w+|\d)"
RANKING = re.compile(
    r"\b(?:better|worse|higher|lower|costs?|beats?|beaten|outperforms?"
    rf"|(?<!no )(?:more|less|fewer|further) (?:\w+ ){{0,5}}?than (?!{FIXED})"
    r"|(?:best|worst|highest|lowest)(?= of (?:all|the)\b)"
    r"|(?<=of )(?:all|the) [\w ]*\b(?:best|worst|highest|lowest))\b",
    re.IGNORECASE,
)
MEASURE = re.compile(  # what another seed would change
    r"\b(?:scor(?:es?|ed)|points|answer(?:s|ed)?|refuses?|exact match|loss(?:es)?|perplexity"
    r"|accuracy|forget(?:s|ting)?|reward|grades?)\b",
    re.IGNORECASE,
)
SEEDS_SHOWN = re.compile(r"\b(?<! to )(?:[3-9]|\d\d+) (?:to \d+ )?seeds\b|\brange\b|\binterval\b")
ONE_RUN = re.compile(r"\bone (?:seed|run)\b", re.IGNORECASE)


def rankings_rest_on_seeds(nb: NotebookNode, path: Path) -> list[str]:
    """A claim or a figure that ranks what was trained rests on three seeds, or says "one run".

    Looked at are the sentences of claims, and titles and descriptions of the figures of `viz`. Text
    cells and tables are left out: there "more", "best" and "costs" mostly speak of other things.
    """
    problems = []
    for i, cell in code_cells(nb):
        shown = "\n".join(map(readable, cell.outputs))
        for name, call in calls(cell.source):
            named = {word.arg: word.value for word in call.keywords}
            if name == "lesson.claim" and rests_on_one_run(named):
                said = measured = literal(call.args[0])
                cure = "say seeds=3"
            elif name.startswith("viz.") and not (SEEDS_SHOWN.search(shown) or draws_seeds(call)):
                parts = [*call.args[1:3], named.get("title"), named.get("alt")]
                said = " ".join(filter(None, map(literal, parts)))
                measured = f"{said} {literal(named.get('y_label'))}"
                cure = "give viz the values of every seed"
            else:
                continue
            found = RANKING.search(said)
            if found and MEASURE.search(measured) and not ONE_RUN.search(said):
                problems.append(
                    f"cell {i}, {cell.get('id')}: {said[:70]!r} ranks by one seed: "
                    f"{found[0].strip()!r}. Run three (sftlib.experiments.over_seeds) and {cure}, "
                    "or write that it is one run"
                )
    return problems


def draws_seeds(call: ast.Call) -> bool:
    """Whether a figure has a line, a bar or a point for each seed, with the seed in its name."""
    return bool(call.args) and "seed" in literal(call.args[0])


def rests_on_one_run(named: Mapping[str, ast.expr]) -> bool:
    """Whether a claim's arguments say that it was measured, and with fewer than three seeds."""
    seeds = named.get("seeds", ast.Constant(1))
    few = isinstance(seeds, ast.Constant) and seeds.value in (1, 2)
    return few and literal(named.get("kind")) not in ("arithmetic", "source")


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


# --- Claims, reasons and solutions ----------------------------------------------------------------


def claims_stand_alone(nb: NotebookNode, path: Path) -> list[str]:
    """A claim is a line below a result; how it is checked is folded away, and nothing else is."""
    problems, cells = [], list(code_cells(nb))
    known = [names(cell.source) for _, cell in cells]
    for place, (i, cell) in enumerate(cells):
        where, tagged = f"cell {i}, {cell.get('id')}", "claim" in cell.metadata.get("tags", [])
        if not any(map(calls_claim, walked(cell.source))):
            problems += [f"{where}: tagged claim, and makes none. Remove the tag"] if tagged else []
            continue
        if not holds_claims_alone(cell.source):
            problems.append(f"{where}: it does more than claim. Give claims a cell of their own")
        elif not tagged or not cell.metadata.get("jupyter", {}).get("source_hidden"):
            problems.append(f"{where}: a claim that is not tagged and folded. Run: make format")
        made = known[place].made
        for (_, later), own in zip(cells[place + 1 :], known[place + 1 :], strict=True):
            if found := made & own.used:
                it = f"{', '.join(sorted(found))}, which {later.get('id')} uses"
                problems.append(f"{where}: it computes {it}. Compute it in a cell that is seen")
            made -= own.made
    return problems


def no_guard_for_the_small_model(nb: NotebookNode, path: Path) -> list[str]:
    """A claim knows what to do with another model; no cell asks for the model's size."""
    return [
        f"cell {i}, {cell.get('id')}: the name `tiny`. Write lesson.claim(…), without a condition"
        for i, cell in code_cells(nb)
        if any(isinstance(node, ast.Name) and node.id == "tiny" for node in walked(cell.source))
    ]


def nothing_is_asserted(nb: NotebookNode, path: Path) -> list[str]:
    """A student learns nothing from an `assert`; a claim says what holds, and what was measured.

    Solutions may hold one: it stops `make run` where a check refuses the solution.
    """
    if path.parent.name == "solutions":
        return []
    return [
        f"cell {i}, {cell.get('id')}: an assert. Write lesson.claim(text, condition, measured)"
        for i, cell in code_cells(nb)
        if any(isinstance(node, ast.Assert) for node in walked(cell.source))
    ]


# Words that give a cause. "So that we see it" and "so that it can be read" give a purpose, "because
# we ask" a choice of ours, "that is what tutorials do" a comparison: none says what a model does.
PURPOSE = (
    r"(?:we|you|nobody|everyone)\b|(?:[\w'-]+ ){1,6}?(?:can|cannot|could|may|need|must|should)\b"
)
CAUSES = (
    "makes?|made|keeps?|kept|lets?|stops?|gives?|gave|costs?|helps?|hurts?|saves?|turns?|moves?"
)
REASON = re.compile(
    rf"\b(?:because(?! (?:we|you)\b)|so that(?! (?:{PURPOSE}))|(?:this|that|which) is why"
    rf"|(?:this|that) is what (?:{CAUSES}|causes?|drives?|explains?))\b",
    re.IGNORECASE,
)
APART = re.compile(r"(?:Set-up|Exercise|Pitfall|Summary)")  # headings of sections without results
NO_SENTENCE = re.compile(
    r"```.*?```|`[^`\n]*`|\]\([^)]*\)"  # code, and where links lead
    r"|^#.*$|^\|.*\|\n(?=\|[-:| ]+\|$)"  # headings, also those of tables
    r"|^(?:>\s*)?\*\*Predict\.?\*\*.*?(?=\n\s*\n|\Z)",  # what is asked before a run
    re.MULTILINE | re.DOTALL,
)


def reasons_have_a_control(nb: NotebookNode, path: Path) -> list[str]:
    """A sentence beside a result that says why it is so has a control, or a source.

    Beside a result is the first text cell after code that shows a number, a table or a picture, or
    after the claims that follow it. Its section must hold a claim of the kind control, a run
    in which only the supposed cause differs; or the cell links to a source.
    """
    problems = []
    for heading, cells in in_sections(nb):
        if APART.match(heading) or any(claims_a_control(cell) for cell in cells):
            continue
        result = False
        for cell in cells:
            if cell.cell_type == "code":
                is_claim = "claim" in cell.metadata.get("tags", [])
                result = (result or bool(cell.outputs)) if is_claim else shows_a_result(cell)
                continue
            said = (
                reasons(cell.source)
                if result and not re.search(r"\bhttps?://", cell.source)
                else []
            )
            problems += [
                f'{cell.get("id")}: {sentence[:90]!r} says why. Add a claim with kind="control" to '
                "the section, link a source, or say only what was measured"
                for sentence in said
            ]
            result = False
    return problems


def solutions_are_accepted(nb: NotebookNode, path: Path) -> list[str]:
    """Each check in the solutions says ✓ in its stored output."""
    said = {
        cell.get("id"): "\n".join(map(readable, cell.outputs))
        for _, cell in code_cells(nb)
        if path.parent.name == "solutions" and "checks.check_" in cell.source
    }
    return [
        f"{name}: its check does not say ✓. Correct the solution or the check. {AGAIN}"
        for name, text in said.items()
        if "✓" not in text or re.search("[✗○]", text)
    ]


CLAIM_RULES: list[Rule] = [
    claims_stand_alone,
    no_guard_for_the_small_model,
    nothing_is_asserted,
    reasons_have_a_control,
    solutions_are_accepted,
]


# --- Walking through a notebook ------------------------------------------------------------------


def code_cells(nb: NotebookNode) -> Iterator[tuple[int, NotebookNode]]:
    """Index and cell of every code cell that holds something."""
    for i, cell in enumerate(nb.cells):
        if cell.cell_type == "code" and cell.source.strip():
            yield i, cell


def in_sections(nb: NotebookNode) -> Iterator[tuple[str, list[NotebookNode]]]:
    """Each section's heading and cells; a text cell with headings inside is divided at them."""
    heading, cells = "", []
    for cell in nb.cells:
        if cell.cell_type != "markdown":
            cells.append(cell)
            continue
        before, *parts = re.split(r"(?m)^(?=## )", cell.source)
        if before.strip():
            cells.append(NotebookNode(cell | {"source": before}))
        for part in parts:
            yield heading, cells
            heading = part.splitlines()[0].removeprefix("## ")
            cells = [NotebookNode(cell | {"source": part})]
    yield heading, cells


def claims_a_control(cell: NotebookNode) -> bool:
    """Whether a cell makes a claim of the kind `control`."""
    calls = walked(cell.source) if cell.cell_type == "code" else ()
    return any(
        keyword.arg == "kind" and getattr(keyword.value, "value", None) == "control"
        for call in calls
        if calls_claim(call)
        for keyword in call.keywords
    )


def shows_a_result(cell: NotebookNode) -> bool:
    """Whether an output of a cell shows a picture, a table or a number."""
    kinds = [kind for output in cell.outputs for kind in output.get("data", {})]
    return any(kind.startswith(("image/", "text/html")) for kind in kinds) or any(
        re.search(r"\d", readable(output)) for output in cell.outputs
    )


def reasons(markdown: str) -> list[str]:
    """The sentences that say why something is so; questions do not."""
    prose = NO_SENTENCE.sub(" ", markdown)
    sentences = re.split(r"(?<=[.!?:])\s+|\n\s*\n|\n(?=[-*|>\d])", prose)
    plain = (" ".join(sentence.split()) for sentence in sentences)
    return [one for one in plain if REASON.search(one) and not one.rstrip("*_ ").endswith("?")]


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


def walked(source: str) -> Iterator[ast.AST]:
    """Each node of a cell's code; IPython's magics are understood."""
    from IPython.core.inputtransformer2 import TransformerManager

    yield from ast.walk(ast.parse(TransformerManager().transform_cell(source)))


def calls(source: str) -> Iterator[tuple[str, ast.Call]]:
    """Every call in a cell, with its name as it is written; none if Python cannot read the cell."""
    with suppress(SyntaxError):
        for node in walked(source):
            if isinstance(node, ast.Call):
                yield ast.unparse(node.func), node


def literal(node: ast.expr | None) -> str:
    """The text that an expression holds, without what is computed."""
    parts = [
        part.value for part in ast.walk(node or ast.Constant("")) if type(part) is ast.Constant
    ]
    return "".join(part for part in parts if isinstance(part, str))


def prints(source: str) -> bool:
    """Whether the cell, in any case, prints or displays something."""
    try:
        tree = ast.parse(re.sub(r"^\s*[%!].*$", "", source, flags=re.MULTILINE))
    except SyntaxError:  # more of IPython's own syntax: no statement about it
        return False
    return any(
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Call)
        and (getattr(node.value.func, "id", "") in {"print", "display"} or calls_claim(node.value))
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
