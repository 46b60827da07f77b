"""Three steps with ZeRO-3, whoever started the ranks; rank 0 prints the losses."""

import json
import time

from common import rank, start, train, world
from torch import distributed

losses = list(train(start(3), range(3)))
if rank == 0:
    print(json.dumps({"losses": losses, "world": world}), flush=True)
distributed.barrier()
time.sleep(0.2)  # else a thread of gloo that still holds the barrier's tensor may abort the rank
distributed.destroy_process_group()  # else gloo's threads may abort a rank that ends after another
