"""Check the script on a GPU, in at most eight minutes and without a network: `make gpu`.

A model of the shape of Llama 3.2 1B with random weights is trained through `class_5_llama3.py`:

1. LoRA, QLoRA and full finetuning: peak memory (and what `--plan` says), tokens per second,
   utilisation of the GPU. Each beside TRL's `trl sft` on the same model, data and settings.
2. A run is killed, and the same command resumes it.
3. A batch that cannot fit: the exit code and the words.
4. The merged model is loaded again, and held against the base with its adapter.

The figures go to `data/runs/gpu.json`; `make format` writes the README's table from it. A part that
fails or that takes too long is recorded with its last lines, and the others go on.

    make gpu ARGS=--rehearse    # the same on a CPU, with a tiny model; stores nothing
"""

import argparse
import importlib.util
import json
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
STORED = ROOT / "data" / "runs" / "gpu.json"
MINUTES = 8
LLAMA_1B: dict[str, Any] = {  # meta-llama/Llama-3.2-1B/config.json
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131_072,
    "tie_word_embeddings": True,
}
TINY: dict[str, Any] = LLAMA_1B | {
    **{"vocab_size": 4352, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
}
STEPS, WARM_UP, SAVE_STEPS = (
    20,
    3,
    5,
)  # steps of a training, untimed ones, those between checkpoints
ROWS = 512  # of the data; all of them in one batch fit on no GPU: they would need 1.4 TiB
PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes")
NATS = 0.02  # two losses that should be the same differ by less
LORA = "--use_peft --lora_r 16 --lora_alpha 32 --lora_dropout 0 --lora_target_modules all-linear "
TRL = {  # what makes `trl sft` do what the script's method does
    "lora": LORA,
    "qlora": LORA + "--load_in_4bit --use_bnb_nested_quant",
    "full": "",
}
ONCE = f"--eval_on_start false --eval_steps {STEPS} --load_best_model_at_end false "  # at the end


# --- In child processes --------------------------------------------------------------------------


def build(folder: str) -> None:
    """Write a model with random weights, its tokenizer, and conversations to train on."""
    from sftlib.data import read_facts, write_jsonl
    from sftlib.models import describe

    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    gpu, path = torch.cuda.is_available(), Path(folder)
    tokenizer = describe("tiny-base")[1]
    config = LlamaConfig(
        **(LLAMA_1B if gpu else TINY),
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    with torch.device("cuda" if gpu else "cpu"):
        dtype = torch.bfloat16 if gpu else torch.float32
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(path / "model")
    tokenizer.save_pretrained(path / "model")
    # Conversations of 200 to 1,000 tokens: questions with their answers, one after the other.
    (path / "data").mkdir()
    draw, facts = random.Random(0), [row["messages"] for row in read_facts("sft")]
    parts = [draw.sample(facts, draw.randint(6, 26)) for _ in range(ROWS)]
    rows = [{"messages": sum(part, [])} for part in parts]
    write_jsonl(path / "data" / "train.jsonl", rows)
    held_out = [{"messages": row["messages"]} for row in read_facts("heldout")[:16]]
    write_jsonl(path / "held_out.jsonl", held_out)


def watched(figures: str, *command: str) -> None:
    """Run a training script as it is, and write to the file `figures` what the training costs."""

    from transformers import trainer

    sys.argv = list(command)
    trainer.DEFAULT_CALLBACKS.append(watch(Path(figures)))
    runpy.run_path(command[0], run_name="__main__")


def watch(figures: Path) -> Any:
    """A callback that measures a training, for Transformers, which only a child imports."""
    import torch
    from transformers import TrainerCallback

    gpu = torch.cuda.is_available()

    class Watch(TrainerCallback):
        def on_train_begin(self, args, state, control, **_: Any) -> None:
            self.first, self.found = state.global_step + WARM_UP, {}
            if gpu:
                torch.cuda.reset_peak_memory_stats()

        def on_step_begin(self, args, state, control, **_: Any) -> None:
            if not gpu and args.per_device_train_batch_size == ROWS:
                raise torch.OutOfMemoryError("CUDA out of memory. (Only rehearsed.)")

        def on_step_end(self, args, state, control, **_: Any) -> None:
            if state.global_step not in (self.first, state.max_steps):
                return
            if gpu:
                torch.cuda.synchronize()
            if state.global_step == self.first:
                self.begin, self.sampler = time.perf_counter(), utilisation()
                return
            self.seconds = time.perf_counter() - self.begin
            if self.sampler:
                self.sampler.terminate()
                self.found["utilisation"] = mean_percent(self.sampler.communicate()[0])
            if gpu:
                self.found["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)

        def on_train_end(self, args, state, control, **_: Any) -> None:
            logs = {line["step"]: line for line in state.log_history if "loss" in line}
            first, last = (logs[step]["num_tokens"] for step in (self.first, state.global_step))
            self.found["tokens_per_second"] = round((last - first) / self.seconds)
            self.found["losses"] = {step: line["loss"] for step, line in logs.items()}
            figures.write_text(json.dumps(self.found))

    return Watch()


def utilisation() -> subprocess.Popen[str] | None:
    """Begin to ask five times a second how busy the GPU is; None where there is no nvidia-smi."""
    device = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    query = ["--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "--loop-ms=200"]
    with suppress(OSError):
        command = ["nvidia-smi", f"--id={device}", *query]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    return None


def mean_percent(said: str) -> int | None:
    """The mean of what nvidia-smi said; None where it said no number, as of a part of a GPU."""
    percent = [int(line) for line in said.split() if line.isdigit()]
    return round(sum(percent) / len(percent)) if percent else None


def compare(model: str, run: str) -> None:
    """Print the loss of the base, of the base with its adapter, and of the merged model."""
    from sftlib.chat import encode
    from sftlib.data import read_jsonl
    from sftlib.models import load

    import torch
    from peft import PeftModel

    rows = read_jsonl(Path(model).parent / "data" / "train.jsonl")[:8]
    base, tokenizer = load(model)
    encoded = [encode(row["messages"], tokenizer) for row in rows]
    device, names = base.device, ("input_ids", "labels")
    batches = [{n: torch.tensor([row[n]], device=device) for n in names} for row in encoded]

    def loss(net: Any) -> float:
        with torch.no_grad():
            return sum(float(net.eval()(**batch).loss) for batch in batches) / len(batches)

    found = {"base": loss(base)}
    found["adapter"] = loss(PeftModel.from_pretrained(base, f"{run}/adapter"))
    found["merged"] = loss(load(f"{run}/merged")[0])
    print(json.dumps(found))


# --- The check -----------------------------------------------------------------------------------


class Skipped(Exception):
    """A part that this machine cannot do; the message says why."""


class Check:
    """The parts of the check, each within its time; what they find is in `found`, by their names.

    Args:
        work: a folder for models and logs.
        gpu: False rehearses on a CPU.
        batch: conversations of a step.
    """

    def __init__(self, work: Path, gpu: bool, batch: int) -> None:
        self.work, self.gpu, self.batch = work, gpu, batch
        self.found: dict[str, dict[str, Any]] = {}
        self.slow = 1 if gpu else 5  # a CPU may be busy
        self.end = self.deadline = time.monotonic() + MINUTES * 60 * self.slow

    def run(self) -> None:
        self.part("model", 60, self.model)
        for method in TRL:
            self.part(method, 120, partial(self.method, method))
        self.part("resume", 90, self.resume)
        self.part("out of memory", 60, self.out_of_memory)
        self.part("merge", 60, self.merge)

    def part(self, name: str, limit: int, do: Callable[[dict], None]) -> None:
        """Keep what a part found, or the last lines of its failure."""
        began = time.monotonic()
        self.deadline = min(began + limit * self.slow, self.end)
        found: dict[str, Any] = {"status": "passed"}
        self.found[name] = found
        try:
            do(found)
        except Skipped as reason:
            found |= {"status": "skipped", "said": str(reason)}
        except Exception as error:  # whatever it is, the other parts go on
            lines = self.without_places(str(error)).splitlines() or [type(error).__name__]
            found |= {"status": "failed", "said": lines[-1][:300], "last_lines": lines[-15:]}
        found["seconds"] = round(time.monotonic() - began, 1)
        print(f"{name}: {found}", flush=True)

    def without_places(self, text: str) -> str:
        """A text without where on this machine the course, its packages and the work lie."""
        places = {self.work: "work", ROOT: ".", Path(sys.prefix): ".venv", Path.home(): "~"}
        for place in sorted(places, key=lambda place: len(place.parts), reverse=True):
            if place.name:  # a user of a container may live at /
                text = text.replace(str(place), places[place])
        return text.strip()

    # --- Child processes

    @contextmanager
    def started(self, *words: Any) -> Generator[tuple[subprocess.Popen, Path]]:
        """A child of Python and the file of what it says; at the end nothing of it is left."""
        log = self.work / "log"
        command = [sys.executable, *map(str, words)]
        with log.open("w") as out:
            child = subprocess.Popen(
                command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )
        try:
            yield child, log
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()

    def python(self, *words: Any, fails: bool = False) -> tuple[str, int]:
        """What a child says, and its exit code; an error where it does not end as expected."""
        with self.started(*words) as (child, log):
            try:
                code = child.wait(max(1, self.deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise TimeoutError(f"{log.read_text()}\nIt took longer than it may") from None
        said = log.read_text()
        if bool(code) != fails:
            raise RuntimeError(f"Exit code {code}:\n{said}")
        return said, code

    def child(self, function: str, *words: Any, fails: bool = False) -> tuple[str, int]:
        """Call a function of this file in a child."""
        call = f"import sys; from tools import gpu; gpu.{function}(*sys.argv[1:])"
        return self.python("-c", call, *words, fails=fails)

    def watched(self, *words: Any) -> tuple[dict, str]:
        """What a training costs, and what it said."""
        figures = self.work / "figures.json"
        figures.unlink(missing_ok=True)
        said, _ = self.child("watched", figures, *words)
        return json.loads(figures.read_text()), said

    # --- Commands

    def both(self, method: str) -> str:
        """The settings of the script and of `trl sft` alike."""
        return (
            f"--max_steps {STEPS} --per_device_train_batch_size {self.batch} --max_length 1024 "
            f"--learning_rate {1e-4 if method == 'full' else 1e-3} --warmup_steps 0.05 "
            "--lr_scheduler_type cosine --train_sampling_strategy group_by_length --seed 0 "
            "--report_to none --logging_steps 1 "
        )

    def ours(self, method: str, folder: str, more: str = "") -> list[str]:
        """The script's command; it evaluates and saves four times, unless `more` says otherwise."""
        words = f"class_5_llama3.py --method {method} --template own --ask 2 --answer_tokens 8 "
        paths = {"model": "model", "data": "data/train.jsonl", "held_out": "held_out.jsonl"}
        return [*f"{words} {self.both(method)} {more}".split(), *self.paths(paths, folder)]

    def trl(self, method: str) -> list[str]:
        """The script that `trl sft` starts, with the same settings."""
        spec = importlib.util.find_spec("trl")
        assert spec and spec.origin
        script = Path(spec.origin).parent / "scripts" / "sft.py"
        words = f"{self.both(method)} {TRL[method]} --save_strategy no --disable_tqdm true "
        words += "--assistant_only_loss true --gradient_checkpointing false "
        words += "--bf16 true " if self.gpu else "--bf16 false --use_cpu true "
        words += "--dtype bfloat16" if self.gpu and method != "full" else "--dtype float32"
        paths = {"model_name_or_path": "model", "dataset_name": "data"}
        return [str(script), *words.split(), *self.paths(paths, "trl")]

    def paths(self, inside: dict[str, str], folder: str) -> list[str]:
        """Arguments that are paths: they may hold blanks."""
        named = (inside | {"output_dir": folder}).items()
        return [word for name, path in named for word in (f"--{name}", str(self.work / path))]

    # --- Parts

    def model(self, found: dict) -> None:
        self.child("build", self.work)

    def method(self, method: str, found: dict) -> None:
        """Train by the script, then by TRL."""
        plan, _ = self.python(*self.ours(method, method, "--plan"))
        found["planned_gib"] = planned_gib(plan)
        if "It does not fit" in plan:
            raise Skipped("--plan says that it does not fit")
        found["ours"], _ = self.watched(*self.ours(method, method, f"{ONCE} --save_strategy no"))
        found["trl"], _ = self.watched(*self.trl(method))
        for folder in {"trl", method} - {"lora"}:  # gigabytes; other parts need that of lora
            shutil.rmtree(self.work / folder)
        first = [found[way]["losses"]["1"] for way in ("ours", "trl")]
        if abs(first[0] - first[1]) > NATS:
            raise RuntimeError(f"Expected the same loss in the first step, found {first}")

    def resume(self, found: dict) -> None:
        """Kill a run after its first checkpoint; resumed, it has the losses of the undisturbed."""
        from sftlib.finetune.checkpoints import RunFolder

        undisturbed = self.lora()["losses"]
        words = self.ours("lora", "resumed", f"{ONCE} --save_steps {SAVE_STEPS}")
        with self.started(*words) as (child, log):
            lacking = RunFolder(self.work / "resumed", {}).lacking
            while all(map(lacking, self.work.glob("resumed/checkpoint-*"))):
                if child.poll() is not None or time.monotonic() > self.deadline:
                    raise RuntimeError(f"{log.read_text()}\nIt wrote no checkpoint in time")
                time.sleep(0.02)
        resumed, said = self.watched(*words)
        step = re.search(r"Going on from .*checkpoint-(\d+)", said)
        if not step:
            raise RuntimeError(f"{said}\nThe killed run began again")
        apart = max(abs(resumed["losses"][n] - undisturbed[n]) for n in undisturbed)
        if apart > NATS:
            raise RuntimeError(f"Expected the losses of the undisturbed run, found {apart} apart")
        found["said"] = f"killed, it went on from step {step[1]}; losses differ by {apart:.4f}"

    def lora(self) -> dict:
        """What the script's run in part lora gave; other parts need it."""
        if "ours" not in self.found["lora"]:
            raise Skipped("needs the run of part lora")
        return self.found["lora"]["ours"]

    def out_of_memory(self, found: dict) -> None:
        """A batch of all rows: the script must end with an error that names what is short."""
        more = f"{ONCE} --save_strategy no --per_device_train_batch_size {ROWS}"
        words = self.ours("lora", "too_large", more)
        said, code = self.child("watched", self.work / "figures.json", *words, fails=True)
        last = said.strip().splitlines()[-1]
        if "memory" not in last.lower():
            raise RuntimeError(f"{said}\nThe last line says nothing of memory")
        if "Traceback" in said:
            raise RuntimeError(f"{said}\nExpected a refusal in words, found a traceback")
        found["said"] = f"exit code {code}, “{self.without_places(last)[:300]}”"

    def merge(self, found: dict) -> None:
        """The merged model of part lora is in safetensors, and has learned what the adapter has."""
        self.lora()
        merged = self.work / "lora" / "merged"
        if not list(merged.glob("*.safetensors")) or list(merged.glob("*.bin")):
            raise RuntimeError(f"Expected safetensors alone in {merged.name}, found others or none")
        said, _ = self.child("compare", self.work / "model", self.work / "lora")
        loss = json.loads(said.splitlines()[-1])
        if abs(loss["merged"] - loss["adapter"]) > NATS or loss["base"] - loss["merged"] < 0.1:
            raise RuntimeError(f"Expected the loss of the adapter, below that of the base: {loss}")
        found["said"] = "loss: " + ", ".join(f"{name} {x:.3f}" for name, x in loss.items())


def planned_gib(plan: str) -> float:
    """The sum that `--plan` prints."""
    found = re.search(r"([\d.]+) GiB  in all", plan)
    if not found:
        raise ValueError(f"{plan}\nExpected a line with `GiB  in all` in the plan, found none")
    return float(found[1])


def main(argv: list[str] | None = None) -> int:
    """Check, and store the figures; 1 where a part failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, with a tiny model")
    rehearse = parser.parse_args(argv).rehearse
    # One GPU, also where there are several, and the same one for torch and for nvidia-smi.
    os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    os.environ["CUDA_VISIBLE_DEVICES"] = "" if rehearse else visible
    os.environ |= {"HF_HUB_OFFLINE": "1", "CI": "1", "TQDM_DISABLE": "1"}

    from sftlib.experiments.sweep import machine
    from sftlib.finetune.device import device_here, memory_of

    import torch

    from tools.stored_runs.real import write_json

    if not rehearse and not torch.cuda.is_available():
        raise SystemExit("Expected an NVIDIA GPU, found none: make gpu ARGS=--rehearse needs none.")
    batch = 8 if not rehearse and memory_of(device_here()) > 60 * 2**30 else 2
    folder = None if rehearse else ROOT / "work"  # /tmp may be too small for ten gigabytes
    if folder:
        folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gpu-", dir=folder) as work:
        check = Check(Path(work), not rehearse, batch)
        check.run()
    figures = {
        "machine": machine(),
        "gpu_gib": round(memory_of(device_here()) / 2**30, 1),
        "date": date.today().isoformat(),
        "versions": {name: version(name) for name in PACKAGES},
        "steps": f"{STEPS} steps of {batch} conversations of 200 to 1,000 tokens",
        "parts": check.found,
    }
    stored = Path(tempfile.mkdtemp(prefix="rehearsal-")) / "gpu.json" if rehearse else STORED
    write_json(stored, figures)
    print(f"Stored in {stored}." + " Now `make format` for the README." * (not rehearse))
    return int(any(part["status"] == "failed" for part in check.found.values()))


if __name__ == "__main__":
    raise SystemExit(main())
