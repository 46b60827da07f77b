"""Damage `sftlib` and the script in small ways, one at a time; count what the tests notice.

`make mutation` does it (three quarters of an hour on one core). A damage is one change of one
expression: a limit, a sign, an operator, a constant, a key, a check that is dropped. They are drawn
by a fixed seed from all that are possible, as many from a small file as from a large one. Each runs
in a copy of the repository, in a process forked from one that has imported the large libraries
already: the unit tests that name the damaged module, and if none of them fails, the integration
tests. First all those tests run once without a damage: one that fails then would notice everything.

Each result is kept in `work/mutation.jsonl` at once: an interrupted run goes on where it was. To
begin anew, delete that file.

`HARMLESS` names damages that change nothing that can be seen, with the reason.
"""

import argparse
import ast
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import sftlib  # noqa: F401  (before the libraries below: it quiets them)
from sftlib.data.files import read_valid_rows

import datasets  # noqa: F401
import peft  # noqa: F401
import pytest
import transformers  # noqa: F401
import trl  # noqa: F401

from tools import copies

ROOT = Path(__file__).parents[1]
STORED = ROOT / "data" / "runs" / "mutation.json"
KEPT = ROOT / "work" / "mutation.jsonl"  # results of a run that has not ended
SCRIPT = "class_5_llama3.py"
COPIED = ("sftlib", SCRIPT, "tests", "tools", "notebooks")  # `tools` finds the notebooks beside it
COLUMNS = {"file": str, "kind": str, "before": str, "after": str, "noticed": bool, "by": str}
LEFT_OUT = {"__main__.py", "__init__.py"}
# What pytest's `-m` takes, and the seconds after which a test hangs (which is noticed).
TIERS = {"not integration and not nightly": 400, "integration and not nightly": 1600}

OPERATORS = {
    **{ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "+"), ast.Div: ("/", "*")},
    **{ast.FloorDiv: ("//", "*"), ast.Pow: ("**", "*")},
    **{ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">")},
    **{ast.Eq: ("==", "!="), ast.NotEq: ("!=", "==")},
    **{ast.In: ("in", "not in"), ast.NotIn: ("not in", "in")},
    **{ast.Is: ("is", "is not"), ast.IsNot: ("is not", "is")},
    **{ast.And: ("and", "or"), ast.Or: ("or", "and")},
}
# (file, what the damaged line then holds): why it does no harm
HARMLESS = {
    ("sftlib/checks/chatml.py", "enumerate(zip(rows, TO_MASK, strict=False))"): (
        "a check before it has counted the rows"
    ),
    ("sftlib/checks/verdict.py", "@dataclass(frozen=False)"): "nothing writes to a verdict",
    ("sftlib/checks/held_out.py", "skip_special_tokens=False"): "words are compared, not marks",
    ("sftlib/checks/sft_data.py", "0.5 * 401"): "a cost within one per cent is right",
    ("sftlib/chat/control_tokens.py", "@dataclass(frozen=False)"): "nothing writes to it",
    ("sftlib/deploy/serving.py", "@dataclass(frozen=False)"): "nothing writes to it",
    ("sftlib/viz.py", "3.8 * columns"): "a wider picture",
    ("sftlib/lesson/cells.py", 'rsplit("/", 2)[-1]'): "the last part is the same",
    ("sftlib/teacher/recording.py", "ensure_ascii=True"): "other letters, read back as the same",
    ("sftlib/checks/lora_vs_full.py", "dev <= means.dev.max() - 1e-9"): (
        "only a difference of exactly 1e-9 is judged otherwise"
    ),
    (
        "sftlib/data/splits.py",
        "in zip(rows, values, strict=False)",
    ): "a value is made for each row above",
    ("sftlib/data/stored.py", "size = 1"): "a batch ends a byte earlier",
    ("sftlib/experiments/new_facts.py", "@dataclass(frozen=False)"): "nothing writes to a run",
    ("sftlib/data/formats.py", "zip(parts[::2], parts[1::2], strict=False)"): (
        "a split by a pattern with one group gives names and texts in turn"
    ),
    ("sftlib/checks/llama3.py", "(8e9, 24e6, 1978.0"): "an answer is tried on another GPU's speed",
    (
        "sftlib/scale/rank_process.py",
        "time.sleep(1.0)",
    ): "a rank ends half a second later than its launcher",
    ("sftlib/scale/rank_process.py", "os._exit(2)"): "who would read the code has ended",
    ("sftlib/teacher/journal.py", "text[:501]"): "a reject keeps a character more of a text",
    ("sftlib/teacher/pairs.py", "strict=True, frozen=False"): "nothing writes to a pair",
    ("sftlib/teacher/pairs.py", "before[1:] in _BEFORE_COMMAND"): (
        "two characters stand before each escape, at least a bracket and a quotation mark"
    ),
    (
        "sftlib/deploy/serving.py",
        "timeout: float = 240.0",
    ): "it waits longer for a server that hangs",
    ("sftlib/teacher/local.py", "timeout: float = 240.0"): "as in sftlib/deploy/serving.py",
    ("sftlib/deploy/talk.py", "max_new_tokens: int = 257"): "an answer may be a token longer",
    ("sftlib/deploy/serving.py", "params.n_parallel = 3"): "one more request at a time",
    ("sftlib/viz.py", "2.2 * len(table)"): "a wider picture",
    ("sftlib/viz.py", "1.9 + rows + 0.6"): "a lower picture",
    ("sftlib/data/validation.py", "max(1, (len(roles) - first) * 2)"): (
        "a shortcut is never taken, and the long way finds the same"
    ),
    ("sftlib/data/validation.py", "(len(roles) + first) // 2"): (
        "a shortcut is taken less often, and the long way finds the same"
    ),
    ("sftlib/finetune/callbacks.py", 'metrics.get("eval_loss", 1.0)'): "any finite number will do",
    ("sftlib/checks/functions.py", "LONG_TEXT = 81"): "a text of one more character is shown whole",
    ("sftlib/checks/launched.py", "started >= PATIENCE"): "it waits for one moment longer",
    ("sftlib/experiments/loss_curve.py", 'settings["use_cpu"] = False'): (
        "without a GPU it is the same, and tests must not need one"
    ),
    ("sftlib/finetune/device.py", "is_macos_or_newer(14, 1)"): "only a Mac could tell",
}


@dataclass(frozen=True)
class Damage:
    """One change: `old` at `start` of a file's text becomes `new`."""

    file: str
    kind: str
    start: int
    old: str
    new: str

    def apply(self, text: str) -> str:
        assert text[self.start :].startswith(self.old)
        return text[: self.start] + self.new + text[self.start + len(self.old) :]

    def lines(self, text: str) -> tuple[str, str]:
        """The line, before and after."""
        first = text.rfind("\n", 0, self.start) + 1
        last = text.find("\n", self.start + len(self.old))
        before = text[first:last]
        after = before[: self.start - first] + self.new + text[self.start + len(self.old) : last]
        return " ".join(before.split()), " ".join(after.split())


def damages(file: Path, root: Path) -> Iterator[Damage]:
    """Everything that can be damaged in a file."""
    text = file.read_text(encoding="utf-8")
    name = file.relative_to(root).as_posix()
    starts = [0]
    for line in text.split("\n"):
        starts.append(starts[-1] + len(line) + 1)

    def at(line: int, column: int) -> int:
        row = text[starts[line - 1] : starts[line]]
        return starts[line - 1] + len(row.encode()[:column].decode())

    def begin(node) -> int:
        return at(node.lineno, node.col_offset)

    def end(node) -> int:
        return at(node.end_lineno, node.end_col_offset)

    def between(left, right, operator, kind) -> Iterator[Damage]:
        old, new = OPERATORS[type(operator)]
        gap = text[end(left) : begin(right)]
        if found := re.search(rf"(?<!\w){re.escape(old)}(?!\w)", gap):
            yield Damage(name, kind, end(left) + found.start(), old, new)

    tree = ast.parse(text)
    inside = {
        id(part)
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr)
        for part in ast.walk(node)
    }  # positions in f-strings are exact only from 3.12 on
    keys = {id(node.slice) for node in ast.walk(tree) if isinstance(node, ast.Subscript)}
    keys |= {id(key) for node in ast.walk(tree) if isinstance(node, ast.Dict) for key in node.keys}
    for node in ast.walk(tree):
        if id(node) in inside:
            continue
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            yield from between(node.left, node.right, node.op, "operator")
        elif isinstance(node, ast.Compare):
            for left, operator, right in zip(
                [node.left, *node.comparators], node.ops, node.comparators, strict=False
            ):
                yield from between(left, right, operator, "comparison")
        elif isinstance(node, ast.BoolOp):
            yield from between(node.values[0], node.values[1], node.op, "and, or")
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            yield Damage(name, "not", begin(node), "not ", "")
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            yield Damage(name, "sign", begin(node), "-", "")
        elif isinstance(node, ast.Raise) and node.exc is not None:
            yield Damage(name, "check dropped", begin(node), text[begin(node) : end(node)], "pass")
        elif isinstance(node, ast.Constant):
            old = text[begin(node) : end(node)]
            if isinstance(node.value, bool):
                yield Damage(name, "constant", begin(node), old, str(not node.value))
            elif isinstance(node.value, int):
                yield Damage(name, "off by one", begin(node), old, str(node.value + 1))
            elif isinstance(node.value, float):
                yield Damage(name, "constant", begin(node), old, repr(2 * node.value or 1.0))
            elif isinstance(node.value, str) and id(node) in keys:
                yield Damage(name, "key", begin(node), old, repr(node.value + "x"))


def draw(root: Path, count: int, seed: int) -> list[Damage]:
    """`count` damages: files in turn, and in a file the kinds in turn."""
    rng = random.Random(seed)
    by_file = []
    for file in [*sorted((root / "sftlib").rglob("*.py")), root / SCRIPT]:
        if file.name in LEFT_OUT:
            continue
        by_kind = defaultdict(list)
        for damage in damages(file, root):
            by_kind[damage.kind].append(damage)
        for found in by_kind.values():
            rng.shuffle(found)
        kinds = list(by_kind.values())
        rng.shuffle(kinds)
        turns = max(map(len, kinds), default=0)
        by_file.append([kind[i] for i in range(turns) for kind in kinds if i < len(kind)])
    rng.shuffle(by_file)
    turns = max(map(len, by_file))
    return [file[i] for i in range(turns) for file in by_file if i < len(file)][:count]


def tests_of(file: str) -> list[str]:
    """The test files that name a module or import from its package, the one of its own name first.

    And those named after its package, or after a module of the course that imports it.
    """
    module = Path(file).with_suffix("").as_posix().replace("/", ".")
    parent, _, stem = module.rpartition(".")
    of_parent = r"[^\n]*" if parent != "sftlib" else rf"[^\n]*\b{stem}\b"
    named = re.compile(rf"\b{re.escape(module)}\b|from {re.escape(parent)} import {of_parent}")
    gathered = {f"test_{name}" for name in (stem, parent.rpartition(".")[2])} | {
        f"test_{path.stem}"
        for path in (ROOT / "sftlib").glob("*.py")
        if f"from {module} import" in path.read_text(encoding="utf-8")
    }
    found = [
        path.relative_to(ROOT).as_posix()
        for path in sorted((ROOT / "tests").glob("test_*.py"))
        if named.search(path.read_text(encoding="utf-8")) or path.stem in gathered
    ]
    assert found, f"Expected a test file that names {module}, found none."
    return sorted(found, key=lambda path: not f"test_{stem}".endswith(path[len("tests/test") : -3]))


def noticed(damage: Damage, copy: Path) -> str:
    """Which test fails in the damaged copy; empty where none does."""
    target = copy / damage.file
    original = target.read_text(encoding="utf-8")
    target.write_text(damage.apply(original), encoding="utf-8")
    try:
        files = tests_of(damage.file)
        return next(filter(None, (failure(copy, files, tier) for tier in TIERS)), "")
    finally:
        target.write_text(original, encoding="utf-8")


def failure(copy: Path, files: list[str], tier: str, patience: float = 1.0) -> str:
    """The first test of a tier, in these files, that fails in a copy; empty where none does."""
    log = copy / "log.txt"
    child = os.fork()
    if child == 0:
        _run_tests(copy, files, tier, log)
    began = time.monotonic()
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() - began > patience * TIERS[tier]:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "a test hangs"
        time.sleep(0.1)
    code = os.waitstatus_to_exitcode(status)
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", log.read_text(errors="replace"), re.M)
    if code in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        return ""
    return failed[0] if failed else f"exit {code}"


def _run_tests(copy: Path, files: list[str], tier: str, log: Path) -> None:
    """In the forked process: tests of a tier, with the copy's modules. Does not return."""
    os.setsid()
    with log.open("w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    os.chdir(copy)
    for name in [n for n in sys.modules if n.split(".")[0] in ("sftlib", "tests", "tools")]:
        del sys.modules[name]
    sys.path[:] = [str(copy), *(p for p in sys.path if Path(p or ".").resolve() != ROOT)]
    os._exit(int(pytest.main([*files, "-m", tier, "-x", "-q", "-p", "no:cacheprovider"])))


def judge(damage: Damage, copy: Path, before: str, after: str) -> dict:
    """What became of a damage, printed as one line; `before` and `after` are its line of code."""
    began = time.monotonic()
    why = "".join(
        reason
        for (file, text), reason in HARMLESS.items()
        if file == damage.file and text in after and text not in before
    )
    # What is known to do no harm would run all tests to their end, the longest of all damages.
    by = "" if why else noticed(damage, copy)
    sign = "✓" if by else "harmless" if why else "MISSED"
    print(
        f"{sign} {damage.file}: {before!r} → {after!r} ({damage.kind}; {by or why}; "
        f"{time.monotonic() - began:.0f} s)",
        flush=True,
    )
    values = (damage.file, damage.kind, before, after, bool(by), by or why)
    return dict(zip(COLUMNS, values, strict=True))


def keep(row: dict) -> dict:
    """Append a result to those of this run, and give it back."""
    KEPT.parent.mkdir(exist_ok=True)
    with KEPT.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(row) + "\n")
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="files whose name contains this")
    parser.add_argument("--store", action="store_true", help=f"keep the result in {STORED.name}")
    parser.add_argument("--passed", action="store_true", help="the tests have just passed: begin")
    parser.add_argument("--again", action="store_true", help="run what the stored result missed")
    args = parser.parse_args()
    stored = json.loads(STORED.read_text(encoding="utf-8"))["damages"] if args.again else []
    found = [row for row in stored if row["noticed"]] + [*read_valid_rows(KEPT, **COLUMNS)]
    known = {(row["file"], row["before"], row["after"]): row for row in found}
    sys.dont_write_bytecode = True
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        copy = copies.course(Path(folder), *COPIED)
        drawn = [d for d in draw(copy, args.count, args.seed) if args.only in d.file]
        files = sorted({file for damage in drawn for file in tests_of(damage.file)})
        tried = () if args.passed else TIERS
        failed = next(filter(None, (failure(copy, files, tier, 5) for tier in tried)), "")
        if failed:
            print(f"Expected tests that pass while nothing is damaged, found {failed}. Repair it.")
            return 1
        for damage in drawn:
            before, after = damage.lines((copy / damage.file).read_text(encoding="utf-8"))
            row = known.get((damage.file, before, after))
            rows.append(row or keep(judge(damage, copy, before, after)))
    counts = Counter((row["noticed"], bool(row["by"])) for row in rows)
    caught = sum(count for (noticed_, _), count in counts.items() if noticed_)
    print(
        f"{caught} of {len(rows)} noticed ({caught / max(len(rows), 1):.0%}), "
        f"{counts[False, True]} harmless, {counts[False, False]} missed"
    )
    if args.store:
        STORED.write_text(
            json.dumps({"seed": args.seed, "damages": rows}, indent=1, ensure_ascii=False) + "\n"
        )
    KEPT.unlink(missing_ok=True)
    return int(caught < 0.9 * len(rows))


if __name__ == "__main__":
    sys.exit(main())
