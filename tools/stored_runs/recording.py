"""Make `data/teacher/recording.jsonl` and `data/mixture.jsonl` again, by running lesson 2 live.

`make recording` calls it, and takes about ten minutes. The cells that only train are left out. If a
cell fails, what was recorded so far is in `work/recording.jsonl`.

Afterwards train the stored runs again, because their sets hold what the teacher wrote, and run the
lesson with the new recording: `make sweeps`, `make run NB=02`.
"""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import nbformat

from tools.notebooks import NBCONVERT

ROOT = Path(__file__).parents[2]
LESSON = ROOT / "notebooks" / "02_sft_data.ipynb"
TRAINS = (("proof-text", "set-text"), ("mix-text", "scale"))  # from a cell up to another one


def without_trainings(path: Path = LESSON) -> nbformat.NotebookNode:
    """The lesson without the cells that compare training sets."""
    notebook = nbformat.read(path, nbformat.NO_CONVERT)
    for first, after in TRAINS:
        names = [cell.id for cell in notebook.cells]
        del notebook.cells[names.index(first) : names.index(after)]
    return notebook


def main() -> None:
    """Execute the lesson against the local teacher, and keep what went over the wire."""
    draft = LESSON.with_name(f".recording-{LESSON.name}")  # beside the lesson: paths are relative
    recording = ROOT / "work" / "recording.jsonl"
    recording.parent.mkdir(exist_ok=True)
    recording.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        live = {"SFT_TEACHER": "local", "SFT_RECORD": str(recording), "SFT_NO_BARS": "1"}
        command = [*NBCONVERT, f"--output-dir={folder}", str(draft)]
        try:
            nbformat.write(without_trainings(), draft)
            subprocess.run(command, check=True, env=os.environ | live)
        finally:
            draft.unlink(missing_ok=True)
    shutil.copy(recording, ROOT / "data" / "teacher" / "recording.jsonl")
    shutil.copy(ROOT / "work" / "02_sft_data" / "mixture.jsonl", ROOT / "data" / "mixture.jsonl")


if __name__ == "__main__":
    main()
