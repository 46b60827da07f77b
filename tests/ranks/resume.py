"""Train from each folder's checkpoint, else from the start: `resume.py STEPS KILL FOLDER...`.

A folder's name begins with its stage; with `universal` in it, it holds a universal checkpoint. From
the start a checkpoint is saved after four steps, and after KILL steps (0: never) rank 1 is killed.
"""

import gc
import json
import os
import signal
import sys
import time
from pathlib import Path

from common import rank, start, train

steps, kill = int(sys.argv[1]), int(sys.argv[2])
for folder in map(Path, sys.argv[3:]):
    settings = {"checkpoint": {"load_universal": True}} if "universal" in folder.name else {}
    engine = start(int(folder.name[0]), settings=settings)
    resumed = folder.exists()
    try:
        first = engine.load_checkpoint(folder)[1]["step"] if resumed else 0
        for step, loss in enumerate(train(engine, range(first, steps)), first):
            if rank == 0:
                print(json.dumps({"case": folder.name, "step": step, "loss": loss}))
            if step + 1 == 4 and not resumed:
                engine.save_checkpoint(folder, client_state={"step": 4})
            if step + 1 == kill and rank == 1:
                time.sleep(1)  # rank 0 has the loss, too
                os.kill(os.getpid(), signal.SIGKILL)
    except Exception as error:
        if kill:
            raise
        print(json.dumps({"case": folder.name, "error": f"{type(error).__name__}: {error}"}))
    engine.destroy()
    del engine
    gc.collect()
