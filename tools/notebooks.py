"""Execute the notebooks again, and keep what is stored of them small and clean.

`run 01` executes and stores (without a number: all); `clean` removes metadata that changes from
run to run; `verify` fails where `clean` would change something.
"""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

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


def clean(paths: list[Path], verify: bool = False) -> int:
    """Remove metadata that changes from run to run; 1 where `verify` finds some."""
    if not paths:  # nbstripout would wait for a notebook on standard input
        return 0
    return subprocess.run([*NBSTRIPOUT, *(["--verify"] if verify else []), *paths]).returncode


def run(path: Path) -> bool:
    """Execute one notebook and store the result; when a cell fails, the file stays as it was."""
    draft = path.with_name(f".running-{path.name}")
    started = time.monotonic()
    print(f"{path.relative_to(FOLDER)}: running", flush=True)
    store = [f"--output-dir={path.parent}", f"--output={draft.name}", str(path)]
    # What is stored is the same on every machine: no progress bars, and no setting of a `.env`.
    quiet = {**SETTINGS, **os.environ, "SFT_NO_BARS": "1"}
    try:
        if subprocess.run([*NBCONVERT, *store], env=quiet).returncode or clean([draft]):
            print(f"{path.name}: failed; the stored notebook is as it was", file=sys.stderr)
            return False
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    print(f"{path.relative_to(FOLDER)}: stored, {time.monotonic() - started:.0f} s", flush=True)
    return True


def main(task: str, number: str = "") -> int:
    paths = find(number)
    if task == "clean":
        return clean(paths)
    if task == "verify":
        if clean(paths, verify=True):
            sys.exit("Some notebooks hold metadata that does not belong there. Run: make format")
        return 0
    if number and not paths:
        sys.exit(f"No notebook begins with {number!r}. There are: {[p.stem for p in find()]}")
    return int(not all([run(path) for path in paths]))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
