"""Execute the notebooks again, and keep what is stored of them small and clean.

`run 01` executes and stores (without a number: all); `clean` removes metadata that changes from
run to run, and folds cells that hold claims; `verify` fails where `clean` would change something.
"""

import argparse
import ast
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from sftlib.data.files import replace_text

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
EXTRA_KEYS = ["metadata.language_info.version", "cell.metadata.execution"]
NBSTRIPOUT = [
    *(sys.executable, "-m", "nbstripout", "--keep-output", "--keep-count", "--keep-id"),
    *("--extra-keys", " ".join(EXTRA_KEYS)),
]
# What a file `.env` does not change: it sets nothing that is set, if only to nothing. The recorded
# teacher, the shipped model, and ranks that run wherever they can.
SETTINGS = {"SFT_TEACHER": "recording", "SFT_MODEL": "", "SFT_DEEPSPEED": ""}
NBCONVERT = [
    *(sys.executable, "-m", "jupyter", "nbconvert", "--to=notebook", "--execute"),
    "--log-level=WARN",
    "--ExecutePreprocessor.kernel_name=python3",
    "--ExecutePreprocessor.timeout=7200",  # a recording trains for long in one cell
    "--ExecutePreprocessor.record_timing=False",
    # what is printed word by word is stored as one text
    "--NotebookExporter.preprocessors=nbconvert.preprocessors.CoalesceStreamsPreprocessor",
]


def find(number: str = "", folder: Path = FOLDER) -> list[Path]:
    """Every notebook, or those whose name begins with `number`; never a checkpoint."""
    return sorted(
        path
        for path in folder.rglob("*.ipynb")
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.name.startswith(number.zfill(2) if number.isdecimal() else number)
    )


def sections(path: Path) -> dict[str, list[dict]]:
    """A notebook's cells by the `## ` heading that they stand under; the title's heading is empty.

    A cell with several headings counts to its last.
    """
    found: dict[str, list[dict]] = {"": []}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "markdown":
            text = "".join(cell["source"])
            found |= {heading: [] for heading in re.findall(r"^## (.+)$", text, re.MULTILINE)}
        found[next(reversed(found))].append(cell)
    return found


def calls_claim(node: ast.AST) -> bool:
    """Whether a piece of code is the call `lesson.claim(…)`."""
    return isinstance(node, ast.Call) and ast.unparse(node.func) == "lesson.claim"


def holds_claims_alone(source: str) -> bool:
    """Whether a cell makes claims, and does nothing else but compute what they need.

    It may give names to values and functions that it uses itself, and repeat or choose claims by
    `for` and `if`. It prints nothing and changes nothing.
    """
    try:
        tree = ast.parse(source)
    except SyntaxError:  # IPython's own syntax does more
        return False
    named = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    used = {node.id for node in named if isinstance(node.ctx, ast.Load)}
    made = {node.id for node in named if isinstance(node.ctx, ast.Store)}
    made |= {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    idle = {name for name in made - used if not name.startswith("_")}
    claims = any(map(calls_claim, ast.walk(tree)))
    return claims and not idle and all(map(_claims_or_computes, tree.body))


def _claims_or_computes(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.For | ast.If):
        return all(map(_claims_or_computes, statement.body + statement.orelse))
    if isinstance(statement, ast.Assign | ast.AnnAssign | ast.AugAssign):
        stored = [node for node in ast.walk(statement) if isinstance(node, ast.expr)]
        stored = [node for node in stored if isinstance(getattr(node, "ctx", None), ast.Store)]
        return not any(isinstance(node, ast.Attribute | ast.Subscript) for node in stored)
    is_call = isinstance(statement, ast.Expr) and calls_claim(statement.value)
    return is_call or isinstance(statement, ast.FunctionDef)


def fold(notebook: dict) -> list[str]:
    """Tag the cells that hold claims alone and fold their source away; the ids of those changed.

    JupyterLab then shows only the line that a claim prints.
    """
    changed = []
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code" or not holds_claims_alone("".join(cell["source"])):
            continue
        metadata = cell["metadata"]
        before = json.dumps(metadata)
        tags = metadata.setdefault("tags", [])
        tags += [] if "claim" in tags else ["claim"]
        metadata.setdefault("jupyter", {})["source_hidden"] = True
        changed += [cell["id"]] if json.dumps(metadata) != before else []
    return changed


def fold_claims(path: Path, verify: bool = False) -> bool:
    """`fold` for a file; whether there was something to fold, which `verify` only says."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    cells = fold(notebook)
    if cells and verify:
        print(f"{path.name}: claims are not folded in {', '.join(cells)}", file=sys.stderr)
    elif cells:  # as nbformat writes it
        text = json.dumps(notebook, ensure_ascii=False, indent=1, sort_keys=True)
        replace_text(path, text + "\n")
    return bool(cells)


def clean(paths: list[Path], verify: bool = False) -> int:
    """Remove metadata that changes from run to run, fold claims; 1 where `verify` finds some."""
    if not paths:  # nbstripout would wait for a notebook on standard input
        return 0
    unfolded = [path for path in paths if fold_claims(path, verify)]
    code = subprocess.run([*NBSTRIPOUT, *(["--verify"] if verify else []), *paths]).returncode
    return code or int(verify and bool(unfolded))


def run(path: Path) -> bool:
    """Execute one notebook, store the result and its claims; if a cell fails, nothing is stored."""
    draft = path.with_name(f".running-{path.name}")
    started = time.monotonic()
    print(f"{path.relative_to(FOLDER)}: running", flush=True)
    store = [f"--output-dir={path.parent}", f"--output={draft.name}", str(path)]
    with tempfile.TemporaryDirectory() as folder:
        ledger = Path(folder, "claims.jsonl")
        # What is stored is the same on every machine: no progress bars, and no setting of a `.env`.
        quiet = {**SETTINGS, **os.environ, "SFT_NO_BARS": "1", "SFT_LEDGER": str(ledger)}
        try:
            if subprocess.run([*NBCONVERT, *store], env=quiet).returncode or clean([draft]):
                print(f"{path.name}: failed; the stored notebook is as it was", file=sys.stderr)
                return False
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)
        try:
            keep_claims(path, ledger)
        except ValueError as problem:
            print(f"{path.name} is stored, its claims are not. {problem}", file=sys.stderr)
            return False
    print(f"{path.relative_to(FOLDER)}: stored, {time.monotonic() - started:.0f} s", flush=True)
    return True


def keep_claims(path: Path, ledger: Path) -> None:
    """Put the claims of a run into the ledgers: that of this machine, and that of the course."""
    from sftlib.lesson.claims import LEDGER, read_ledger

    from tools import claims

    if ledger.exists():
        work = FOLDER.parent / "work"
        work.mkdir(exist_ok=True)
        with (work / LEDGER).open("a", encoding="utf-8") as file:
            file.write(ledger.read_text(encoding="utf-8"))
    if path.parent == FOLDER:  # solutions have no claims of their own
        claims.update(path, read_ledger(ledger))


def main(*words: str) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.notebooks", description=__doc__)
    parser.add_argument("task", choices=("run", "clean", "verify"))
    parser.add_argument("number", nargs="?", default="", help="a lesson's number; all without it")
    asked = parser.parse_args(words)
    task, number = asked.task, asked.number
    paths = find(number)
    if task == "clean":
        return clean(paths)
    if task == "verify":
        if clean(paths, verify=True):
            sys.exit(
                "Some notebooks hold metadata that does not belong there, or claims that are "
                "not folded. Run: make format"
            )
        return 0
    if number and not paths:
        sys.exit(f"No notebook begins with {number!r}. There are: {[p.stem for p in find()]}")
    return int(not all([run(path) for path in paths]))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
