"""What a lesson's notebook does about itself: its work folder, a restart, its versions.

After a restart of the kernel the set-up cell is run, and then any cell: what it needs of earlier
ones is run first, and named. Which they are follows from the names in the code: a cell needs the
last earlier cell that makes a name it uses, and those that change it since. The same holds of the
files that a cell writes.
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
from importlib.metadata import version
from pathlib import Path

PACKAGES = (
    *("torch", "transformers", "trl", "peft", "datasets", "deepspeed", "accelerate"),
    *("openai", "jupyterlab"),
)
# What changes the object that it is called on, in these lessons; anything else only reads.
CHANGING = set(
    "add add_callback append clear extend insert load_adapter load_state_dict pop remove "
    "set_adapter setdefault sort step train update".split()
)


@dataclass(frozen=True)
class Names:
    """The global names of a piece of code, and its files, a file as `/` and its name."""

    used: frozenset[str]  # before the code itself makes them
    made: frozenset[str]
    changed: frozenset[str]


def names(source: str) -> Names:
    """Which names and files a cell uses and makes, and which names it changes; magics are read."""
    from IPython.core.inputtransformer2 import TransformerManager

    try:
        statements = ast.parse(TransformerManager().transform_cell(source)).body
    except SyntaxError:
        statements = []
    used, made, changed = set(), set(), set()
    for statement in statements:
        here, there = _symbols(statement)
        read, written = _files(statement)
        used |= (here | read) - made
        made |= there | written
        changed |= _changed(statement)
    return Names(frozenset(used), frozenset(made), frozenset(changed))


def _symbols(statement: ast.stmt) -> tuple[set[str], set[str]]:
    """Global names that a statement uses, and those that it makes."""
    source = ast.unparse(_Generators().visit(copy.deepcopy(statement)))
    table = symtable.symtable(source, "cell", "exec")
    made = {s.get_name() for s in table.get_symbols() if s.is_assigned() or s.is_imported()}
    used = {s.get_name() for s in table.get_symbols() if s.is_referenced()}
    if isinstance(statement, ast.For | ast.With | ast.If | ast.Try | ast.While):
        used -= made  # a loop's own variable
    if isinstance(statement, ast.AugAssign):
        used |= made
    inner = list(table.get_children())
    while inner:
        table = inner.pop()
        inner += table.get_children()
        used |= {s.get_name() for s in table.get_symbols() if s.is_global()} - made
    return used, made


class _Generators(ast.NodeTransformer):
    """Comprehensions as generators: from Python 3.12 on, the others have no scope of their own."""

    def visit_ListComp(self, node: ast.ListComp | ast.SetComp) -> ast.GeneratorExp:
        self.generic_visit(node)
        return ast.GeneratorExp(node.elt, node.generators)

    visit_SetComp = visit_ListComp

    def visit_DictComp(self, node: ast.DictComp) -> ast.GeneratorExp:
        self.generic_visit(node)
        return ast.GeneratorExp(ast.Tuple([node.key, node.value], ast.Load()), node.generators)


def _files(statement: ast.stmt) -> tuple[set[str], set[str]]:
    """Files that a statement may read, and those that it writes: in a call named save or write.

    In an IPython command (`!ls {work}`), names in braces are read, too.
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


def _file(node: ast.AST) -> set[str]:
    """The file or folder that a piece of code names: nothing, or one.

    It is a text that looks like a path (`"a/b"`, `"b.pt"`), or one that is joined to a folder
    (`work / "b"`).
    """
    joined = isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div)
    text = _text(node.right if joined else node)
    text = "/" + text if joined and text else text
    is_path = re.fullmatch(r"[\w./-]*(/[\w-]+|[\w-]\.[a-z]\w{0,10})", text)
    return {"/" + text.rsplit("/", 1)[-1]} if is_path else set()


def _text(node: ast.AST) -> str:
    """The text that a piece of code is; empty where it is none."""
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def _changed(statement: ast.stmt) -> set[str]:
    """Names whose object a statement changes: `a.b = …`, `a[b] = …`, `a.append(…)`."""
    found = set()
    for node in ast.walk(statement):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            changes, root = node.func.attr in CHANGING, node.func.value
        elif isinstance(node, ast.Attribute | ast.Subscript):
            changes, root = isinstance(node.ctx, ast.Store | ast.Del), node.value
        else:
            continue
        while isinstance(root, ast.Attribute | ast.Subscript):
            root = root.value
        if changes and isinstance(root, ast.Name):
            found.add(root.id)
    return found


class Cells:
    """A notebook's code cells, and which of them each one needs."""

    def __init__(self, cells: list[dict]):
        code = [cell for cell in cells if cell["cell_type"] == "code"]
        self.sources = ["".join(cell["source"]) for cell in code]
        self.ids = [cell.get("id", str(index)) for index, cell in enumerate(code)]
        self.names = [names(source) for source in self.sources]

    def find(self, cell_id: str | None, source: str) -> int | None:
        """Which cell this is: by its id, which JupyterLab sends, or else by its text."""
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
        open_ones = [index]
        while open_ones:
            one = open_ones.pop()
            for name in (names(source) if one == index else self.names[one]).used:
                makers = [j for j in range(one) if name in self.names[j].made]
                since = range(makers[-1], one) if makers else ()
                new = {j for j in since if j == makers[-1] or name in self.names[j].changed}
                new -= found | ran
                found |= new
                open_ones += new
        return sorted(found)


def begin(name: str) -> Path:
    """Empty the lesson's work folder, and see to it that each cell finds what it needs.

    From the set-up cell on, what a cell needs of earlier cells is run first, if it was not. The
    record of what was run starts anew with each call of `begin`, so the folder can be emptied at
    the same time: a cell that reads a file first runs the cell that wrote it. Nothing that a later
    cell needs is missing after a restart, and nothing is left of an older run. Files that you want
    to keep belong into another folder.

    Args:
        name: of the notebook, without its ending; it is looked for in the working directory. Where
            it is not there, or this is not a notebook, no cell is run first.

    Returns:
        `../work/<name>`, seen from the notebook: a folder with nothing in it.

    Raises:
        ValueError: the name is no plain name, so that another folder would be emptied.
    """
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError(f"Expected the name of a notebook such as '01_topic', found {name!r}.")
    work = Path("../work", name)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    _run_first_what_is_needed(name)
    return work


def _run_first_what_is_needed(name: str) -> None:
    """See `begin`."""
    from IPython import get_ipython

    shell, path = get_ipython(), Path(f"{name}.ipynb")
    if shell is None or not path.exists():
        return
    cells = Cells(json.loads(path.read_text(encoding="utf-8"))["cells"])
    for event in ("pre_run_cell", "post_run_cell"):  # of an earlier run of the set-up cell
        for function in list(shell.events.callbacks[event]):
            if getattr(function, "__module__", "") == __name__:
                shell.events.unregister(event, function)
    ran: set[int] = set()

    def before(info) -> None:
        index = cells.find(getattr(info, "cell_id", None), info.raw_cell)
        if index is None:
            return
        if missing := cells.needed(index, info.raw_cell, ran):
            _run(shell, [(cells.ids[one], cells.sources[one]) for one in missing])

    def after(result) -> None:  # of needed cells, too, and of the set-up cell that registers this
        index = cells.find(getattr(result.info, "cell_id", None), result.info.raw_cell)
        if index is not None and result.success:  # else it is needed still
            ran.add(index)

    shell.events.register("pre_run_cell", before)
    shell.events.register("post_run_cell", after)


def _run(shell, missing: list[tuple[str, str]]) -> None:
    """Run cells of the lesson without showing what they print; stop where one fails."""
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


def environment() -> str:
    """The versions that this notebook ran with; print it where results are reported."""
    import platform

    found = [f"Python {platform.python_version()}", *(f"{one} {version(one)}" for one in PACKAGES)]
    return ", ".join(found)
