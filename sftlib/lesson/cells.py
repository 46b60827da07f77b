"""A lesson's work folder, and what must run first after a restart.

After a restart of the kernel, run the set-up cell and then any other cell. Before a cell runs,
`begin` runs the earlier cells that it needs, and prints their ids. It finds them by the variables
in the code. For each variable that a cell uses, it needs the last earlier cell that makes the
variable, and the cells that changed it since. The same holds for files that a cell reads.
"""

from __future__ import annotations

import ast
import copy
import json
import re
import shutil
import symtable
import time
from dataclasses import dataclass
from pathlib import Path

from sftlib.lesson import claims, predictions

# Methods that change the object they are called on, in these lessons. All others only read it.
CHANGING = set(
    "add add_callback append clear extend insert load_adapter load_state_dict pop remove "
    "set_adapter setdefault sort step train update".split()
)


@dataclass(frozen=True)
class Names:
    """The global names of a piece of code. A file counts as a name, written `/` and its name.

    So does a question that a student predicts the answer to, written `?` and its id.
    """

    used: frozenset[str]  # before the code itself makes them
    made: frozenset[str]
    changed: frozenset[str]


def names(source: str) -> Names:
    """Which names, files and predictions a cell uses and makes, and which names it changes.

    IPython's magics are understood. A cell that is not Python has no names.
    """
    from IPython.core.inputtransformer2 import TransformerManager

    try:
        statements = ast.parse(TransformerManager().transform_cell(source)).body
    except SyntaxError:
        statements = []
    used, made, changed = set(), set(), set()
    for statement in statements:
        symbols_used, symbols_made = _symbols(statement)
        files_read, files_written = _files(statement)
        used |= (symbols_used | files_read | _calls("outcome", statement)) - made
        made |= symbols_made | files_written | _calls("predict", statement)
        changed |= _changed(statement)
    return Names(frozenset(used), frozenset(made), frozenset(changed))


def _symbols(statement: ast.stmt) -> tuple[set[str], set[str]]:
    """Global names that a statement uses, also inside its functions, and those that it makes."""
    source = ast.unparse(_Generators().visit(copy.deepcopy(statement)))
    table = symtable.symtable(source, "cell", "exec")
    made = {s.get_name() for s in table.get_symbols() if s.is_assigned() or s.is_imported()}
    used = {s.get_name() for s in table.get_symbols() if s.is_referenced()}
    if isinstance(statement, ast.For | ast.With | ast.If | ast.Try | ast.While):
        used -= made  # a loop's own variable
    if isinstance(statement, ast.AugAssign):
        used |= made
    scopes = list(table.get_children())
    while scopes:
        scope = scopes.pop()
        scopes += scope.get_children()
        used |= {s.get_name() for s in scope.get_symbols() if s.is_global()} - made
    return used, made


class _Generators(ast.NodeTransformer):
    """Turns comprehensions into generators: since Python 3.12 only these have their own scope."""

    def visit_ListComp(self, node: ast.ListComp | ast.SetComp) -> ast.GeneratorExp:
        self.generic_visit(node)
        return ast.GeneratorExp(node.elt, node.generators)

    visit_SetComp = visit_ListComp

    def visit_DictComp(self, node: ast.DictComp) -> ast.GeneratorExp:
        self.generic_visit(node)
        return ast.GeneratorExp(ast.Tuple([node.key, node.value], ast.Load()), node.generators)


def _files(statement: ast.stmt) -> tuple[set[str], set[str]]:
    """Files that a statement may read, and those that it writes.

    A call whose name holds `save` or `write` writes the files in its arguments. An IPython command
    (`!ls {work}`) also reads the names in braces.
    """
    read, written = set(), set()
    for node in ast.walk(statement):
        read |= _file(node)
        if not isinstance(node, ast.Call):
            continue
        called = getattr(node.func, "attr", getattr(node.func, "id", ""))
        if called == "run_cell_magic" and _text(node.args[0]) == "writefile":
            script = _text(node.args[2])
            read = {f"/{name}.py" for name in re.findall(r"^from (\w+) ", script, re.MULTILINE)}
            read |= {name for name in names(script).used if name.startswith("/")}
            return read, _file(node.args[1])
        if called in ("run_line_magic", "system"):
            read |= set(re.findall(r"\{(\w+)\}", _text(node.args[-1])))
        if "save" in called or "write" in called:
            written |= {name for part in ast.walk(node) for name in _file(part)}
    return read - written, written


def _calls(function: str, statement: ast.stmt) -> set[str]:
    """The ids in calls such as `lesson.predict("id", …)`, each written `?id`."""
    calls = [node for node in ast.walk(statement) if isinstance(node, ast.Call) and node.args]
    named = [call for call in calls if getattr(call.func, "attr", "") == function]
    return {"?" + _text(call.args[0]) for call in named if _text(call.args[0])}


def _file(node: ast.AST) -> set[str]:
    """The file or folder that a piece of code names, as a set of one; else an empty set.

    It is a text that looks like a path (`"a/b"`, `"b.pt"`), or one that is joined to a folder
    (`work / "b"`).
    """
    joined = isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div)
    text = _text(node.right if joined else node)
    text = "/" + text if joined and text else text
    is_path = re.fullmatch(r"[\w./-]*(/[\w-]+|[\w-]\.[a-z]\w{0,10})", text)
    return {"/" + text.rsplit("/", 1)[-1]} if is_path else set()


def _text(node: ast.AST) -> str:
    """The value of a piece of code that is a text; else an empty text."""
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def _changed(statement: ast.stmt) -> set[str]:
    """Names whose object a statement changes: `a.b = …`, `a[b] = …`, `a.append(…)`."""
    found = set()
    for node in ast.walk(statement):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            changes, target = node.func.attr in CHANGING, node.func.value
        elif isinstance(node, ast.Attribute | ast.Subscript):
            changes, target = isinstance(node.ctx, ast.Store | ast.Del), node.value
        else:
            continue
        while isinstance(target, ast.Attribute | ast.Subscript):  # `a` of `a.b[0].c`
            target = target.value
        if changes and isinstance(target, ast.Name):
            found.add(target.id)
    return found


class Cells:
    """A notebook's code cells, and which of them each one needs."""

    def __init__(self, cells: list[dict]):
        code = [cell for cell in cells if cell["cell_type"] == "code"]
        self.sources = ["".join(cell["source"]) for cell in code]
        self.ids = [cell.get("id", str(index)) for index, cell in enumerate(code)]
        self.names = [names(source) for source in self.sources]

    def find(self, cell_id: str | None, source: str) -> int | None:
        """The number of a cell, found by its id, which JupyterLab sends, or else by its text."""
        if cell_id in self.ids:
            return self.ids.index(cell_id)
        return self.sources.index(source) if source in self.sources else None

    def needed(self, index: int, source: str, ran: set[int]) -> list[int]:
        """Earlier cells that must run first, in the notebook's order.

        Args:
            source: the cell's current text, which a student may have changed.
            ran: the cells that were run.
        """
        found: set[int] = set()
        to_do = [index]
        while to_do:
            cell = to_do.pop()
            for name in (names(source) if cell == index else self.names[cell]).used:
                makers = [j for j in range(cell) if name in self.names[j].made]
                since = range(makers[-1], cell) if makers else ()
                new = {j for j in since if j == makers[-1] or name in self.names[j].changed}
                new -= found | ran
                found |= new
                to_do += new
        return sorted(found)


def begin(name: str) -> Path:
    """Empty the lesson's work folder. From then on, run the cells that a cell needs before it.

    Each call starts with an empty folder and an empty record of the cells that were run. So a cell
    that reads a file first runs the cell that writes it. After a restart a later cell lacks
    nothing, and nothing is left of an older run. Put files that you want to keep into another
    folder. The record of the lesson's claims begins anew, too.

    Args:
        name: the notebook's name without its ending. The notebook is read from the working
            directory. If it is not there, or this is not a notebook, no cells are run first.

    Returns:
        `../work/<name>`, seen from the notebook: a folder with nothing in it.

    Raises:
        ValueError: the name is not plain, so that another folder might be emptied.
    """
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError(
            f"Expected the name of a notebook such as '01_topic', found {name!r}. Give its file "
            "name without a folder and without .ipynb."
        )
    work = Path("../work", name)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    claims.start(name, work)
    predictions.start(name)
    _run_first_what_is_needed(name)
    return work


def _run_first_what_is_needed(name: str) -> None:
    """See `begin`."""
    from IPython import get_ipython

    shell, path = get_ipython(), Path(f"{name}.ipynb")
    if shell is None or not path.exists():
        return
    cells = Cells(json.loads(path.read_text(encoding="utf-8"))["cells"])
    # Remove what an earlier run of the set-up cell has registered.
    for event in ("pre_run_cell", "post_run_cell"):
        for function in list(shell.events.callbacks[event]):
            if getattr(function, "__module__", "") == __name__:
                shell.events.unregister(event, function)
    ran: set[int] = set()

    def before(info) -> None:
        cell_id = getattr(info, "cell_id", None)
        index = cells.find(cell_id, info.raw_cell)
        if index is not None and (missing := cells.needed(index, info.raw_cell, ran)):
            _run(shell, [(cells.ids[i], cells.sources[i]) for i in missing])
        # last, since the cells that were run first have claims of their own
        claims.enter(cells.ids[index] if index is not None else cell_id or "")

    def after(result) -> None:  # also called for cells that `before` runs, and for the set-up cell
        index = cells.find(getattr(result.info, "cell_id", None), result.info.raw_cell)
        if index is not None and result.success:  # a cell that failed is still needed
            ran.add(index)

    shell.events.register("pre_run_cell", before)
    shell.events.register("post_run_cell", after)


def _run(shell, missing: list[tuple[str, str]]) -> None:
    """Run cells of the lesson without showing what they print; stop if one fails."""
    from IPython.utils.capture import capture_output

    print(f"First running {', '.join(cell_id for cell_id, _ in missing)} …", end="", flush=True)
    began = time.monotonic()
    for cell_id, source in missing:
        with capture_output():
            result = shell.run_cell(source, store_history=False, cell_id=cell_id)
        if not result.success:
            print(f" {cell_id} failed. Run it alone to see why.")
            return
    print(f" {time.monotonic() - began:.1f} s")
