"""Make `data/teacher/recording.jsonl` and `data/mixture.jsonl` again, by running lesson 2 live.

`make recording` calls it, and takes about five minutes. Then run the lesson again with the new
recording: `make run NB=02`.
"""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from tools.notebooks import NBCONVERT

ROOT = Path(__file__).parents[2]
LESSON = ROOT / "notebooks" / "02_sft_data.ipynb"


def main() -> None:
    """Execute the lesson against the local teacher, and keep what went over the wire."""
    with tempfile.TemporaryDirectory() as folder:
        recording = Path(folder) / "recording.jsonl"
        live = {"SFT_TEACHER": "local", "SFT_RECORD": str(recording), "SFT_NO_BARS": "1"}
        command = [*NBCONVERT, f"--output-dir={folder}", str(LESSON)]
        subprocess.run(command, check=True, env=os.environ | live)
        shutil.copy(recording, ROOT / "data" / "teacher" / "recording.jsonl")
    shutil.copy(ROOT / "work" / "02_sft_data" / "mixture.jsonl", ROOT / "data" / "mixture.jsonl")


if __name__ == "__main__":
    main()
