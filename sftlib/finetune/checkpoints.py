"""The folder of a run: which run it belongs to, where to resume, what a full disk left there."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sftlib.data import write_jsonl
from sftlib.finetune.arguments import FinetuneArguments, rows_per_step, schedule

if TYPE_CHECKING:
    from accelerate import Accelerator
    from trl import SFTConfig

RUN_FILE = "run.json"
SHARED_DISK_SECONDS = 90  # after which a network disk shows a new file on all nodes
NEARLY_FULL = 64 * 2**20  # bytes
IDENTITY_SETTINGS = (  # of TRL's settings, those that decide what is learned; others may change
    "learning_rate",
    "num_train_epochs",
    "max_steps",
    "warmup_steps",
    "max_length",
    "packing",
    "seed",
)


def run_identity(args: FinetuneArguments, training: SFTConfig, rows: list[dict]) -> dict[str, Any]:
    """What a checkpoint must agree with: everything that decides what is learned."""
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    return {
        "model": args.model,
        "method": args.method,
        "lora_r": args.lora_r if args.trains_adapters else 0,
        "lora_alpha": args.lora_alpha if args.trains_adapters else 0,
        "template": args.template,
        "data": digest[:16],
        # The product, so that a run can go on with more or fewer GPUs.
        "rows_per_step": rows_per_step(training, training.world_size),
        "lr_scheduler_type": schedule(training),
        **{name: getattr(training, name) for name in IDENTITY_SETTINGS},
    }


class RunFolder:
    """The output folder of one run, in which checkpoints of another run are never used."""

    def __init__(self, path: str | Path, identity: dict[str, Any]) -> None:
        self.path, self.identity = Path(path), identity

    def begin(self, rejects: list[dict]) -> None:
        """Write which run the folder belongs to, and the records that could not be used."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_jsonl(self.path / RUN_FILE, [self.identity])
        if rejects:
            write_jsonl(self.path / "rejects.jsonl", rejects)

    def last_checkpoint(self) -> str | None:
        """The last whole checkpoint of this run; None where there is none.

        Raises:
            ValueError: the folder holds another run, or checkpoints that nothing describes.
        """
        self._check_owner()
        found = sorted(self._checkpoints(), key=lambda path: int(path.name.split("-")[1]))
        whole = [checkpoint for checkpoint in found if is_whole(checkpoint)]
        return str(whole[-1]) if whole else None

    def _checkpoints(self) -> list[Path]:
        return list(self.path.glob("checkpoint-*"))

    def _check_owner(self) -> None:
        if not (self.path / RUN_FILE).exists():
            if self._checkpoints():
                raise ValueError(
                    f"Expected {self.path} to be empty or of this script, found checkpoints "
                    f"without a {RUN_FILE}: nothing says of which model. Give another --output_dir."
                )
            return
        before = json.loads((self.path / RUN_FILE).read_text())
        differ = [name for name in self.identity if before.get(name) != self.identity[name]]
        if differ:
            was = ", ".join(f"{name} {before.get(name)!r}" for name in differ)
            now = ", ".join(f"{name} {self.identity[name]!r}" for name in differ)
            raise ValueError(
                f"Expected {self.path} to be empty or of this run, found one with {was}; now "
                f"{now}. Give another --output_dir, or remove that folder."
            )

    def finished(self, saved: str) -> bool:
        """Whether the folder `saved` is there with its card, which is written last.

        Raises:
            ValueError: the folder belongs to another run.
        """
        if not (self.path / saved / "README.md").exists():
            return False
        self._check_owner()
        return True

    def require_shared_disk(self, accelerator: Accelerator) -> None:
        """Raise, on all ranks, where one rank does not see what the first one wrote."""
        import torch

        accelerator.wait_for_everyone()
        deadline = time.monotonic() + SHARED_DISK_SECONDS
        while not (self.path / RUN_FILE).exists() and time.monotonic() < deadline:
            time.sleep(0.5)
        seen = torch.tensor(float((self.path / RUN_FILE).exists()), device=accelerator.device)
        if accelerator.reduce(seen, "mean") < 1:
            raise OSError(
                f"Expected {self.path} on a disk that all nodes share, found that not every node "
                "sees what the first one wrote there: give such an --output_dir."
            )

    def raise_if_full(self, error: Exception) -> None:
        """Raise an error in words where `error` came of a full disk.

        Each library reports a full disk in another way. Half-written files are removed, because
        otherwise there would be no room to go on.
        """
        # A library may hide the system's message, so little free space is a sign, too. A failed
        # write may have freed its space, so the message alone is one as well.
        free = shutil.disk_usage(self.path).free
        if free > NEARLY_FULL and "No space left" not in str(error):
            return
        for part in (*self.path.glob("*.part"), *self._checkpoints()):
            if part.suffix == ".part" or not is_whole(part):
                shutil.rmtree(part, ignore_errors=True)
        good = self.last_checkpoint()
        raise OSError(
            f"The disk of {self.path} is full: {free / 2**20:.0f} MiB were free. "
            + (f"{good} is whole; " if good else "No checkpoint was written yet; ")
            + "make room, or give --save_total_limit 1, and the same command "
            + ("goes on from there." if good else "begins again.")
            + f" ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        ) from error


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end: Transformers writes the state last."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False
    # Transformers writes *.safetensors, DeepSpeed a folder of shards.
    return any(checkpoint.glob("*.safetensors")) or any(checkpoint.glob("global_step*"))
