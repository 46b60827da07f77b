"""A copy of the course for what writes where it runs: the repository stays as it is."""

import shutil
from pathlib import Path

ROOT = Path(__file__).parents[1]
LEFT_OUT = {".git", "work", "build"}


def course(folder: Path, *own: str) -> Path:
    """`folder`, with copies of what is named, links to the rest, and an empty `work/`."""
    for entry in ROOT.iterdir():
        if entry.name in own and entry.is_file():
            shutil.copy(entry, folder)
        elif entry.name in own:
            ignored = shutil.ignore_patterns("__pycache__", ".*")
            shutil.copytree(entry, folder / entry.name, ignore=ignored)
        elif entry.name not in LEFT_OUT:
            (folder / entry.name).symlink_to(entry)
    (folder / "work").mkdir()
    return folder
