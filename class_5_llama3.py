"""Finetune Llama 3, or another model of its kind, to follow instructions.

Examples:

    python class_5_llama3.py
        The shipped tiny base, on a CPU, in less than a minute: a complete run to look at.

    python class_5_llama3.py --plan --model meta-llama/Meta-Llama-3-8B --method lora
        What that would need: parameters, bytes, steps, operations. Nothing is loaded.

    python class_5_llama3.py --model meta-llama/Meta-Llama-3-8B --method lora --data my.jsonl
        Your own conversations, on one GPU.

    torchrun --nproc-per-node 8 class_5_llama3.py --model meta-llama/Meta-Llama-3-8B \\
        --method full --deepspeed deepspeed_configs/zero3_bf16.json --data my.jsonl
        All parameters, divided over eight GPUs. `deepspeed` and `accelerate launch` do as well.

    python class_5_llama3.py --config my.yaml
        The same arguments from a file; what stands on the command line counts more.

The same command again goes on where it was interrupted.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
import time
from dataclasses import dataclass, field, fields, replace
from itertools import islice
from pathlib import Path

from sftlib import progress_bars
from sftlib.chat import CHATML, LLAMA3, end_of_turn_id
from sftlib.data import FACTS, split, write_jsonl
from sftlib.data.files import replace_folder
from sftlib.data.read import Converted, convert, convert_records
from sftlib.models import chosen, hub_answers

INDENTED = {"initial_indent": " " * 6, "subsequent_indent": " " * 6}
LONGEST = 4096  # tokens of a conversation, where nothing else is said
COMMON = (  # of TRL's arguments, those that --help shows
    *("output_dir", "learning_rate", "num_train_epochs", "per_device_train_batch_size"),
    *("gradient_accumulation_steps", "max_length", "packing", "deepspeed", "report_to"),
)


def option(default, text: str, **more):
    return field(default=default, metadata={"help": text, **more})


@dataclass
class Llama3Arguments:
    """What is finetuned, how, on what."""

    model: str | None = option(
        None, "A name on the Hub, a local folder, tiny-base or smollm2-135m; else SFT_MODEL."
    )
    method: str = option(
        "lora",
        "full: all parameters. lora: adapters. qlora: adapters on a base in 4 bits.",
        choices=["full", "lora", "qlora"],
    )
    data: str = option(
        os.path.relpath(FACTS / "sft.jsonl"),
        "Conversations: .jsonl, .json (also .gz) or .parquet, or a dataset on the Hub; with "
        "messages, prompt and completion, chosen and rejected, or as Alpaca, Dolly, ShareGPT or "
        "OASST.",
    )
    held_out: str = option(
        "",
        "Conversations to evaluate on: such a file or dataset, or the share of the data that is "
        "kept back.",
    )
    data_config: str = option("", "Of a dataset on the Hub: its configuration, if it has several.")
    data_split: str = option("train", "Of a dataset on the Hub: the split to train on.")
    held_out_split: str = option("train", "The same of a dataset given with --held_out.")
    template: str = option(
        "auto",
        "auto: Llama 3's, if the tokenizer has its tokens; else the model's own; ChatML, if it has "
        "none, or ChatML that does not mark the answers. own: the model's, to the letter. chatml: "
        "with new tokens, if it lacks them.",
        choices=["auto", "llama3", "chatml", "own"],
    )
    lora_r: int = option(16, "Rank of the adapters.")
    lora_alpha: int = option(32, "Their scale: alpha / r.")
    attn_implementation: str = option(
        "sdpa",
        "How attention is computed: sdpa is PyTorch's own, flash_attention_2 a package for GPUs.",
        choices=["sdpa", "flash_attention_2", "eager"],
    )
    ask: int = option(32, "How many held-out questions are answered at each evaluation.")
    answer_tokens: int = option(64, "How long an answer may become.")
    patience: int = option(0, "Stop after so many evaluations without a lower loss; 0: never.")
    merge: bool = option(True, "Save also the model with the adapter merged into it.")
    plan: bool = option(False, "Say what it would need, and stop.")
    plan_gpus: int = option(1, "For --plan: how many GPUs.")
    plan_gib: float = option(0.0, "For --plan: memory of each, in GiB; 0: of this machine.")


# --- Arguments -----------------------------------------------------------------------------------


def parse(argv: list[str] | None = None):
    """The script's own arguments, and TRL's `SFTConfig` with defaults that suit them."""
    from sftlib.scale.rank_process import without_builds
    from sftlib.training import defaults

    import torch
    from trl import SFTConfig, TrlParser

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed guesses, and warns
        without_builds()

    argv = sys.argv[1:] if argv is None else argv
    usage = "python class_5_llama3.py [ARGUMENTS]; --help shows them"
    kinds = [Llama3Arguments, SFTConfig]
    parser = TrlParser(kinds, usage=usage, add_help=False, allow_abbrev=False)
    ours = {
        "output_dir": "work/llama3",
        "learning_rate": None,  # by method and size, see `learning_rate`
        "per_device_train_batch_size": 16,
        "max_length": None,  # the model's context, at most LONGEST
        "activation_checkpointing": None,  # or its older name, gradient_checkpointing, is not heard
        "gradient_checkpointing": None,
        "eval_strategy": "steps",
        "eval_steps": 0.25,
        "save_strategy": "steps",
        "save_steps": 0.25,
        "save_total_limit": 2,
        "load_best_model_at_end": True,
        "eval_on_start": True,
        "ddp_find_unused_parameters": False,
    }
    parser.set_defaults_with_config(**(defaults() | ours))
    if {"-h", "--help"} & set(argv):
        print(_help(parser))
        raise SystemExit
    if "--help_all" in argv:
        parser.print_help()
        raise SystemExit
    return parser.parse_args_and_config(argv)


def _help(parser) -> str:
    import textwrap

    own = {one.name: one.default for one in fields(Llama3Arguments)}
    actions = {action.dest: action for action in reversed(parser._actions)}
    actions["max_length"].help = f"Longer ones are cut; the model's context, at most {LONGEST:,}."
    actions["learning_rate"].help = "By method and size of the model, see lesson 4."
    lines = [__doc__.rstrip(), "", "Arguments:", ""]
    for name in (*own, *COMMON):
        action = actions[name]
        choices = f" ({', '.join(action.choices)})" if action.choices else ""
        text = " ".join((action.help or "").split()).replace("%%", "%")
        if name not in own:  # TRL's are long
            text = text.split(". ")[0].rstrip(".") + "."
        default = own.get(name, action.default)
        if default is True:  # what can be typed is its opposite
            name, text = f"no_{name}", f"Do not: {text[0].lower()}{text[1:]}"
        default = f"{default:g}" if isinstance(default, float) else default
        shown = "" if default in (None, "") or isinstance(default, bool) else f" [{default}]"
        lines += [f"  --{name}{choices}{shown}", *textwrap.wrap(text, 90, **INDENTED)]
    lines += ["", "And every other argument of TRL's SFTConfig: --help_all lists them."]
    return "\n".join(lines)


def check(args: Llama3Arguments, training) -> None:
    """Raise where arguments contradict each other, before anything is loaded."""
    for one in fields(args):  # a file of settings is read without this check
        choices = one.metadata.get("choices")
        if choices and getattr(args, one.name) not in choices:
            found = getattr(args, one.name)
            raise ValueError(
                f"Expected one of {', '.join(choices)} for {one.name}, found {found!r}."
            )
    usual = {one.name: one.default for one in fields(Llama3Arguments)}
    set_there = [name for name in ("lora_r", "lora_alpha") if getattr(args, name) != usual[name]]
    if args.method == "full" and (set_there or not args.merge):
        flag = f"--{set_there[0]}" if set_there else "--no_merge"
        raise ValueError(f"Expected {flag} with --method lora or qlora, found it with full.")
    if args.method == "qlora" and stage(training) == 3:
        raise ValueError(
            "Expected ZeRO-1 or 2 for --method qlora, found stage 3: it would divide weights of 4 "
            "bits that are packed. They fit on each GPU: --deepspeed deepspeed_configs/zero2.json."
        )
    instead = {
        "chat_template_path": "--template",
        "resume_from_checkpoint": "the same --output_dir, whose last checkpoint goes on by itself",
    }
    for name, other in instead.items():
        if getattr(training, name):
            raise ValueError(f"Expected {other}, found --{name}, which this script does not use.")
    if args.patience and training.eval_strategy == "no":
        raise ValueError("Expected evaluations for --patience, found --eval_strategy no.")
    for name in ("lora_r", "answer_tokens", "plan_gpus"):
        if getattr(args, name) < 1:
            raise ValueError(f"Expected at least 1 for --{name}, found {getattr(args, name)}.")
    for name in ("ask", "patience", "plan_gib"):
        if getattr(args, name) < 0:
            raise ValueError(f"Expected no less than 0 for --{name}, found {getattr(args, name)}.")


def stage(training) -> int:
    """DeepSpeed's ZeRO stage; 0 without it."""
    return _zero(training).get("stage", 0)


def _zero(training) -> dict:
    """The part `zero_optimization` of DeepSpeed's configuration; empty without one."""
    if not training.deepspeed:
        return {}
    return json.loads(Path(training.deepspeed).read_text()).get("zero_optimization", {})


def rows_a_step(training, ranks: int) -> int:
    return training.per_device_train_batch_size * training.gradient_accumulation_steps * ranks


# --- Data ----------------------------------------------------------------------------------------


def conversations(source: str, config: str = "", split: str = "train") -> Converted:
    """The conversations of a file or of a dataset on the Hub, and what could not be used."""
    if Path(source).is_file():
        return convert(source)
    if Path(source).suffix in (".jsonl", ".json", ".parquet", ".gz"):
        raise FileNotFoundError(f"Expected a file of conversations, found none at {source}.")
    import datasets
    from datasets import load_dataset
    from huggingface_hub import constants

    if not hub_answers():  # then its cache alone, at once
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        return convert_records(load_dataset(source, config or None, split=split))
    except ValueError as error:  # it is there
        raise ValueError(
            f"Expected a configuration and a split that {source!r} has, found {config!r} and "
            f"{split!r}: {' '.join(str(error).split())[:300]} Give --data_config, --data_split or "
            "--held_out_split."
        ) from error
    except Exception as error:
        raise OSError(
            f"Expected a file, or a dataset on the Hub, found neither for {source!r} "
            f"({type(error).__name__}: {str(error).splitlines()[0][:200]}). Check the spelling; "
            "offline, give a file; for a gated dataset set HF_TOKEN."
        ) from error


def sets(args: Llama3Arguments) -> tuple[list[dict], list[dict], list[dict]]:
    """Conversations to train on, those held out, and the rejects."""
    found = _some(args.data, args.data_config, args.data_split)
    by_default = args.data == Llama3Arguments.data and not args.held_out
    held_out = str(FACTS / "heldout.jsonl") if by_default else args.held_out or "0.1"
    try:
        share = float(held_out)
    except ValueError:
        held = _some(held_out, args.data_config, args.held_out_split)
        return found.rows, held.rows, found.rejects + held.rejects
    if not 0 < share < 1:
        raise ValueError(
            f"Expected a file or a share between 0 and 1 for --held_out, found {share}."
        )
    if len(found.rows) < 2:
        raise ValueError(
            f"Expected at least two conversations in {args.data}, found one: none could be held "
            "out. Give --held_out a file."
        )
    one_question = len({first_question(row) for row in found.rows}) == 1
    kept, held = split(found.rows, str if one_question else first_question, share)
    return kept, held, found.rejects


def first_question(row: dict) -> str:
    """What the user says first; a system message may stand before it in all conversations."""
    return next(m["content"] for m in row["messages"] if m["role"] == "user")


def _some(source: str, config: str, split: str) -> Converted:
    """The conversations of a source that has any; rejects say of which source they are."""
    found = conversations(source, config, split)
    found = replace(found, rejects=[{"source": source} | one for one in found.rejects])
    if not found.rows:
        why = [f"line {one['line']}: {one['reason']}" for one in found.rejects[:1]]
        raise ValueError(
            f"Expected conversations in {source}, found none that can be used. "
            + (f"The first of {len(found.rejects)}: {why[0]}" if why else "It is empty.")
        )
    return found


# --- Model ---------------------------------------------------------------------------------------


def load_model(args: Llama3Arguments, training):
    """The model, its weights as the method needs them, and its tokenizer with the template."""
    from sftlib.models import load

    import torch

    if args.method == "qlora" and not torch.cuda.is_available():
        raise ValueError(
            "Expected a GPU for --method qlora, found none: on a CPU four bits save memory, and "
            "cost much time. Use --method lora."
        )
    options = {"attn_implementation": args.attn_implementation}
    if args.method == "qlora":
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    # All parameters in bfloat16 would lose small updates; DeepSpeed keeps its own float32 copy.
    whole = args.method == "full" and not training.deepspeed
    model, tokenizer = load(args.model, dtype=torch.float32 if whole else None, **options)
    set_template(model, tokenizer, args)
    model.generation_config.eos_token_id = ends(model, tokenizer)
    return model, tokenizer


def ends(model, tokenizer) -> list[int]:
    """Where generation stops: at the end of a text, at that of a turn, and where it did before."""
    before = model.generation_config.eos_token_id
    before = before if isinstance(before, list) else [before]
    found = dict.fromkeys([tokenizer.eos_token_id, end_of_turn_id(tokenizer), *before])
    return [token for token in found if token is not None]


def set_template(model, tokenizer, args: Llama3Arguments) -> None:
    from sftlib.chat import training_template
    from sftlib.models import own_template, prepare_for_chat

    choice, known = args.template, tokenizer.get_vocab()
    if choice == "own":
        tokenizer.chat_template = own_template(args.model)
        training_template(tokenizer)  # raises where it does not say what the assistant's tokens are
    needs = {"llama3": "<|eot_id|>", "chatml": "<|im_end|>"}
    if choice == "auto" and "<|eot_id|>" in known:
        choice = "llama3"
    if choice in needs:
        if choice == "llama3" and needs[choice] not in known:
            raise ValueError(
                f"Expected a tokenizer with {needs[choice]} for --template {choice}, found none. "
                "Use --template auto."
            )
        tokenizer.chat_template = {"llama3": LLAMA3, "chatml": CHATML}[choice]
        prepare_for_chat(model, tokenizer)  # adds ChatML's tokens where they are missing


def adapter(args: Llama3Arguments, model, tokenizer):
    """LoRA on all linear layers, and on the control tokens, which a base model has never read.

    Not on these under ZeRO-3: PEFT 0.21 copies their rows from a weight that is not whole there.
    """
    from sftlib.adapters import control_token_rows

    from peft import LoraConfig
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    if args.method == "full":
        return None
    rows = None if is_deepspeed_zero3_enabled() else control_token_rows(model, tokenizer)
    return LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        target_modules="all-linear",
        trainable_token_indices=rows,
        task_type="CAUSAL_LM",
    )


def longest_allowed(model, training) -> int:
    """Tokens of a conversation; raise where the model was never trained on so many."""
    context = model.config.max_position_embeddings
    if (training.max_length or 0) > context:
        raise ValueError(
            f"Expected --max_length of at most {context}, the context of the model, found "
            f"{training.max_length}: further away it has never read a token."
        )
    return training.max_length or min(context, LONGEST)


def learning_rate(args: Llama3Arguments, parameters: int) -> float:
    """A usual one: smaller for larger models, ten times larger for adapters (lesson 4)."""
    full = 5e-4 if parameters < 10e6 else 1e-4 if parameters < 1e9 else 2e-5
    return full if args.method == "full" else 10 * full


# --- Plan ----------------------------------------------------------------------------------------


def plan(args: Llama3Arguments, training, rows: list[dict]) -> str:
    """What the training would need, from shapes alone."""
    from sftlib.chat import encode_batch
    from sftlib.models import describe
    from sftlib.scale.memory import activation_bytes, lora_parameters, nf4_bytes, zero_bytes

    import torch
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()  # or stage 3 would divide the model that has no weights
    model, tokenizer = describe(args.model)
    set_template(model, tokenizer, args)
    total = model.num_parameters()
    trained = total
    if args.method != "full":
        trained = lora_parameters(model, args.lora_r, "all-linear")
    frozen = 0 if args.method == "full" else total
    half = training.bf16 or args.plan_gib > 0  # of another machine: with GPUs that have bfloat16
    dtype = "bfloat16" if half else "float32"
    # What is trained lies in float32, unless DeepSpeed keeps a copy in it, or TRL casts
    own = dtype if training.deepspeed or args.method == "qlora" else "float32"
    states = zero_bytes(trained, args.plan_gpus, stage(training), own)
    base = zero_bytes(0, args.plan_gpus, stage(training), dtype, frozen).weights
    weights = states.weights + (nf4_bytes(model) if args.method == "qlora" else base)
    copies = 2 * trained if own != dtype else 0  # autocast's, kept from forward to backward
    lengths = [
        len(ids) for ids in encode_batch([r["messages"] for r in rows], tokenizer)["input_ids"]
    ]
    limit = longest_allowed(model, training)
    longest = limit if training.packing else min(max(lengths), limit)
    activations = activation_bytes(
        model.config,
        training.per_device_train_batch_size,
        longest,
        dtype,
        0 if args.method == "full" else args.lora_r,
        training.activation_checkpointing,
    )
    a_step = rows_a_step(training, args.plan_gpus)
    count, kind = len(rows), "conversations"
    if training.packing:
        count, kind = -(-sum(min(n, limit) for n in lengths) // limit), "packed rows"
    steps = round(-(-count // a_step) * training.num_train_epochs)
    steps = training.max_steps if training.max_steps > 0 else steps
    tokens = round(sum(lengths) * training.num_train_epochs)
    have = args.plan_gib * 2**30 or _memory()
    gib = {
        "weights": weights,
        "gradients": states.gradients,
        "optimizer": states.optimizer,
        **({f"copies in {dtype} to compute with": copies} if copies else {}),
        f"activations ({training.per_device_train_batch_size} × {longest} tokens)": activations,
    }
    moved = {"offload_optimizer": "optimizer", "offload_param": "weights"}
    elsewhere = {moved[key]: gib.pop(moved[key]) for key in moved if key in _zero(training)}
    need = sum(gib.values())
    one, more = ("GPU", "GPUs") if torch.cuda.is_available() or half else ("process", "processes")
    where = f"on each of {args.plan_gpus} {more}" if args.plan_gpus > 1 else f"on 1 {one}"
    epochs = f"{training.num_train_epochs:g} epoch{'s' * (training.num_train_epochs != 1)}"
    lines = [
        f"parameters      {total:,}, of which {trained:,} are trained"
        + (" (adapters, on top)" if frozen else ""),
        f"conversations   {len(rows):,}, {tokens:,} tokens in {epochs}",
        f"steps           {steps:,} of {a_step} {kind}",
        f"operations      {6 * total * tokens:.2e} (6 · parameters · tokens, an upper bound)",
        f"{where} (ZeRO stage {stage(training)}, computed in {dtype}):",
    ]
    lines += [f"    {size / 2**30:8.2f} GiB  {name}" for name, size in gib.items()]
    lines += [f"    {x / 2**30:8.2f} GiB  {name}, offloaded" for name, x in elsewhere.items()]
    lines.append(f"    {need / 2**30:8.2f} GiB  in all, of {have / 2**30:.1f} GiB")
    fits = need < 0.9 * have
    lines.append(
        "It fits."
        if fits
        else "It does not fit: --method lora or qlora, a smaller batch, "
        "--activation_checkpointing, or a higher ZeRO stage on more GPUs."
    )
    return "\n".join(lines)


def _memory() -> int:
    """Bytes of this machine's GPU, or of its main memory."""
    import psutil
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    return psutil.virtual_memory().total


# --- Training ------------------------------------------------------------------------------------


def asking(trainer, rows: list[dict], answer_tokens: int):
    """At each evaluation the model answers held-out questions: the loss alone can deceive.

    On all ranks, which under ZeRO-3 each hold a part of the weights; as many at once as are trained
    on, so that the memory for that is enough.
    """
    from sftlib.evaluate import answers, exact_match, stops

    from transformers import TrainerCallback

    class Asking(TrainerCallback):
        def __init__(self):
            self.rows = rows
            self.given = {}  # the answers after each step that was evaluated

        def on_evaluate(self, args, state, control, model=None, metrics=None, **_):
            if not rows:
                return
            questions = [row["messages"][:-1] for row in rows]
            batch = args.per_device_train_batch_size
            given = answers(model, trainer.processing_class, questions, answer_tokens, batch)
            self.given[state.global_step] = given
            scores = {"eval_exact_match": exact_match(given, rows), "eval_stops": stops(given)}
            metrics.update(scores)
            state.log_history[-1].update(scores)  # the evaluation's own line
            trainer.callback_handler.on_log(args, state, control, scores)  # and for trackers
            if state.is_world_process_zero:
                loss = metrics["eval_loss"]
                print(
                    f"step {state.global_step:>5}: held-out loss {loss:.3f}, "
                    f"exact answers {scores['eval_exact_match']:.0%}, "
                    f"ended by itself {scores['eval_stops']:.0%}",
                    flush=True,
                )

    return Asking()


def lines():
    """Twenty lines of the loss, where no bar moves."""
    from transformers import TrainerCallback

    class Lines(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **_):
            due = state.global_step % max(1, state.max_steps // 20) == 0
            if due and state.is_world_process_zero and "loss" in (logs or {}):
                print(f"step {state.global_step:>5}: loss {float(logs['loss']):.3f}", flush=True)

    return Lines()


def interruptible():
    """Ctrl-C, or a scheduler's SIGTERM: save at the end of the step, and stop."""
    import torch
    from torch import distributed
    from transformers import TrainerCallback

    class Interruptible(TrainerCallback):
        received = 0  # the signal's number, on the rank that got it; on all after that step

        def on_train_begin(self, args, state, control, **_):
            self.before = {s: signal.signal(s, self.note) for s in (signal.SIGINT, signal.SIGTERM)}

        def note(self, number, frame):
            if self.received:  # the second time at once
                raise KeyboardInterrupt
            self.received = number

        def on_step_end(self, args, state, control, **_):
            if distributed.is_available() and distributed.is_initialized():
                # a signal reaches the ranks in different steps, and to save takes all of them
                latest = torch.tensor(self.received, device=args.device)
                distributed.all_reduce(latest, distributed.ReduceOp.MAX)
                self.received = int(latest)
            if self.received:
                control.should_save = control.should_training_stop = True

        def on_train_end(self, args, state, control, **_):
            for number, handler in self.before.items():
                signal.signal(number, handler)

    return Interruptible()


RUN = "run.json"
SEEN_WITHIN = 90  # seconds after which a network's disk shows a new file on all nodes


def last_checkpoint(folder: str, identity: dict) -> str | None:
    """The last whole checkpoint of this very run; raise where the folder holds another's."""
    path = Path(folder, RUN)
    if path.exists():
        before = json.loads(path.read_text())
        differ = [name for name in identity if before.get(name) != identity[name]]
        if differ:
            was = ", ".join(f"{name} {before.get(name)!r}" for name in differ)
            now = ", ".join(f"{name} {identity[name]!r}" for name in differ)
            raise ValueError(
                f"Expected {folder} to be empty or of this run, found one with {was}; now {now}. "
                "Give another --output_dir, or remove that folder."
            )
    elif any(Path(folder).glob("checkpoint-*")):
        raise ValueError(
            f"Expected {folder} to be empty or of this script, found checkpoints without a {RUN}: "
            "nothing says of which model. Give another --output_dir."
        )
    found = sorted(Path(folder).glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    whole = [one for one in found if _whole(one)]
    return str(whole[-1]) if whole else None


def _whole(checkpoint: Path) -> bool:
    """Whether everything was written: Transformers writes the state last."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False
    return any(checkpoint.glob("*.safetensors")) or any(checkpoint.glob("global_step*"))


def identity(args: Llama3Arguments, training, rows: list[dict]) -> dict:
    """What a checkpoint must agree with: what decides what is learned, as it was asked for."""
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    adapters = args.method != "full"
    return {
        "model": args.model,
        "method": args.method,
        "lora_r": args.lora_r if adapters else 0,
        "lora_alpha": args.lora_alpha if adapters else 0,
        "template": args.template,
        "data": digest[:16],
        "rows_a_step": rows_a_step(training, training.world_size),  # also on more or fewer GPUs
        "lr_scheduler_type": str(training.lr_scheduler_type.value),
        **{name: getattr(training, name) for name in SETTINGS},
    }


SETTINGS = (  # of TRL's; the rest may change between two calls
    *("learning_rate", "num_train_epochs", "max_steps", "warmup_steps", "max_length", "packing"),
    "seed",
)


# --- Saving --------------------------------------------------------------------------------------


def _saved(args: Llama3Arguments) -> list[str]:
    """The folders that the script makes; the last one is that of what can be asked."""
    if args.method == "full":
        return ["model"]
    return ["adapter", "merged"] if args.merge else ["adapter"]


def save(trainer, args: Llama3Arguments, folder: Path) -> Path:
    """The adapter or the model, and the merged model; the folder of what can be asked."""
    from sftlib.models import load

    from peft import PeftModel
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    first = trainer.is_world_process_zero()
    name = _saved(args)[0]
    trainer.save_model(str(folder / f"{name}.part"))  # on all ranks: each may hold a part
    if first:
        replace_folder(folder / f"{name}.part", folder / name)
    if _saved(args)[-1] == name:
        return folder / name
    unset_hf_deepspeed_config()  # or stage 3 would wait for the other ranks to load, too
    if first:  # from the base as it was, not as it was quantised; the GPU has no room for both
        print(f"The adapter is in {folder / name}; --no_merge would leave out the merged model.")
        base, tokenizer = load(args.model, device="cpu")
        set_template(base, tokenizer, args)
        merged = PeftModel.from_pretrained(base, str(folder / "adapter")).merge_and_unload()
        merged.generation_config.eos_token_id = ends(base, tokenizer)
        merged.save_pretrained(folder / "merged.part")
        tokenizer.save_pretrained(folder / "merged.part")
        replace_folder(folder / "merged.part", folder / "merged")
    return folder / "merged"


def kept_step(trainer) -> int:
    """After which step the weights were as they are saved: the one with the lowest loss."""
    best = trainer.state.best_global_step if trainer.args.load_best_model_at_end else None
    return best or trainer.state.global_step


def card(args: Llama3Arguments, training, trainer, rows: list[dict], held_out: list[dict]) -> str:
    """A model card: data, settings, scores, versions."""
    from importlib.metadata import version

    log = trainer.state.log_history
    scores = [line for line in log if "eval_loss" in line]
    learned = "the assistant's" if training.assistant_only_loss else "all"

    def share(line: dict, name: str) -> str:
        return f"{line[name]:.1%}" if name in line else "–"

    base = args.model
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        f"base_model: {base}" if not Path(base).is_absolute() else f"base_model: {Path(base).name}",
        "tags: [sft, trl]",
        "---",
        "",
        f"# {Path(base).name}, finetuned to follow instructions",
        "",
        f"**Data**: {len(rows):,} conversations of `{Path(args.data).name}`; {len(held_out):,} "
        "held out. Their licence, and that of the base model, apply to this model.",
        "",
        f"**Settings**: {args.method}"
        + (f", r = {args.lora_r}, α = {args.lora_alpha}" if args.method != "full" else "")
        + f"; learning rate {training.learning_rate:g}, {training.lr_scheduler_type.value}; "
        f"{trainer.state.global_step} steps, of which the weights after step {kept_step(trainer)} "
        f"are kept; seed {training.seed}; loss on {learned} tokens.",
        "",
        "| step | held-out loss | exact answers | ended by itself |",
        "|--:|--:|--:|--:|",
        *(
            f"| {one['step']} | {one['eval_loss']:.3f} | {share(one, 'eval_exact_match')} "
            f"| {share(one, 'eval_stops')} |"
            for one in scores
        ),
        "",
        "**Versions**: "
        + ", ".join(f"{n} {version(n)}" for n in ("torch", "transformers", "trl", "peft"))
        + ".",
        "",
    ]
    return "\n".join(lines)


def raise_if_full(folder: Path, run: dict, error: Exception) -> None:
    """What each library says of a full disk is another error; say what is there, and what to do.

    What was half written goes, or there would be no room to go on.
    """
    free = shutil.disk_usage(folder).free
    if free > 64 * 2**20 and "No space left" not in str(error):
        return
    for part in (*folder.glob("*.part"), *folder.glob("checkpoint-*")):
        if part.suffix == ".part" or not _whole(part):
            shutil.rmtree(part, ignore_errors=True)
    good = last_checkpoint(str(folder), run)
    raise OSError(
        f"The disk of {folder} is full: {free / 2**20:.0f} MiB were free. "
        + (f"{good} is whole; " if good else "No checkpoint was written yet; ")
        + "make room, or give --save_total_limit 1, and the same command "
        + ("goes on from there." if good else "begins again.")
        + f" ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    ) from error


# --- All of it -----------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    args, training = parse(argv)
    check(args, training)
    args.model = chosen(args.model)  # and what .env says, a token for the Hub for instance
    rows, held_out, rejects = sets(args)
    if args.plan:
        print(plan(args, training, rows))
        return 0
    first = training.process_index == 0
    folder = Path(training.output_dir)
    run = identity(args, training, rows)
    done = folder / _saved(args)[-1]
    if (done / "README.md").exists():  # written last
        last_checkpoint(training.output_dir, run)  # raises where it is another run's
        if first:
            print(f"{done} is finished, and stays. Another --output_dir trains anew.")
        return 0
    checkpoint = last_checkpoint(training.output_dir, run)
    if first:
        print(f"{len(rows):,} conversations to train on, {len(held_out):,} held out")
    trainer, asked, stopped = make_trainer(args, training, rows, held_out)
    if first:  # not before: what is refused leaves no trace
        folder.mkdir(parents=True, exist_ok=True)
        write_jsonl(folder / RUN, [run])
        if rejects:
            write_jsonl(folder / "rejects.jsonl", rejects)
            print(f"{len(rejects)} cannot be used: {folder / 'rejects.jsonl'} says why")
        if checkpoint:
            print(f"Going on from {checkpoint}")
        if args.method == "lora" and stage(training) == 3:
            print(
                "ZeRO-3 does not train the rows of the control tokens beside an adapter: a base "
                "model may not learn to end its turn. With zero2.json it does."
            )
    _one_disk(trainer, folder)
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
        saved = None if stopped.received else save(trainer, args, folder)
    except Exception as error:
        raise_if_full(folder, run, error)
        raise
    if saved is None:
        if first:
            at = trainer.state.global_step
            print(f"Stopped and saved at step {at}. The same command again goes on from there.")
        end(trainer)
        return 130
    if first:
        (saved / "README.md").write_text(card(args, training, trainer, rows, held_out))
        kept, last = kept_step(trainer), trainer.state.global_step
        samples(asked.rows, asked.given.get(kept, []))
        if kept < last:
            print(f"Kept: the weights after step {kept}, where the held-out loss was lowest.")
        took = next((line for line in trainer.state.log_history if "train_runtime" in line), {})
        print(f"{last} steps in {took.get('train_runtime', 0):.1f} s")
        whole = saved.name != "adapter"
        print(f"Saved in {saved}." + f" Talk to it: python -m sftlib.deploy.talk {saved}" * whole)
    end(trainer)
    return 0


def _one_disk(trainer, folder: Path) -> None:
    """Raise, on all ranks, where one does not see what the first one has written."""
    import torch

    trainer.accelerator.wait_for_everyone()
    deadline = time.monotonic() + SEEN_WITHIN
    while not (folder / RUN).exists() and time.monotonic() < deadline:
        time.sleep(0.5)
    seen = torch.tensor(float((folder / RUN).exists()), device=trainer.accelerator.device)
    if trainer.accelerator.reduce(seen, "mean") < 1:
        raise OSError(
            f"Expected {folder} on a disk that all nodes share, found that not every node sees "
            "what the first one wrote there: give such an --output_dir."
        )


def end(trainer) -> None:
    """All ranks together: where one leaves earlier, a launcher may stop one that still writes."""
    trainer.accelerator.wait_for_everyone()
    # Gloo's threads let go of the last tensors, for which they need the interpreter: one that still
    # waits as Python ends aborts the process (https://github.com/pytorch/pytorch/pull/179291).
    time.sleep(0.2)
    trainer.accelerator.end_training()


def make_trainer(args, training, rows: list[dict], held_out: list[dict]):
    from sftlib.training import prepare

    from datasets import Dataset
    from transformers import EarlyStoppingCallback, set_seed

    set_seed(training.seed)
    model, tokenizer = load_model(args, training)
    if training.learning_rate is None:
        training.learning_rate = learning_rate(args, _size(model))
    training.max_length = longest_allowed(model, training)
    trainer = prepare(
        model,
        tokenizer,
        Dataset.from_list([{"messages": row["messages"]} for row in rows]),
        adapter(args, model, tokenizer),
        Dataset.from_list([{"messages": row["messages"]} for row in held_out]),
        training,
    )
    for name, left in (("--data", trainer.train_dataset), ("--held_out", trainer.eval_dataset)):
        if not len(left):
            raise ValueError(
                f"Expected conversations for {name} in which something is learned within "
                f"{training.max_length} tokens, found none: raise --max_length."
            )
    asked = asking(trainer, _short(held_out, tokenizer, args, training), args.answer_tokens)
    stopped = interruptible()
    for callback in (asked, stopped, *([] if progress_bars() else [lines()])):
        trainer.add_callback(callback)
    if args.patience:
        trainer.add_callback(EarlyStoppingCallback(args.patience))
    return trainer, asked, stopped


def _short(rows: list[dict], tokenizer, args: Llama3Arguments, training) -> list[dict]:
    """The first rows whose question leaves room for an answer: what is longer is not trained on."""
    from sftlib.chat import encode

    def fits(row: dict) -> bool:
        ids = encode(row["messages"][:-1], tokenizer, add_generation_prompt=True)["input_ids"]
        return len(ids) + args.answer_tokens <= training.max_length

    return list(islice(filter(fits, rows), args.ask))


def _size(model) -> int:
    """Number of parameters, also of those that ZeRO-3 has divided, or that are packed in 4 bits."""
    divided = [p.ds_numel for p in model.parameters() if hasattr(p, "ds_numel")]
    return sum(divided) if divided else model.num_parameters()


def samples(rows: list[dict], given: list, count: int = 3) -> None:
    for row, answer in list(zip(rows, given, strict=False))[:count]:
        text = answer.text.replace("\n", "\n    ")
        print(f"\n{row['messages'][-2]['content']}\n    {text}", end="")
        print("" if answer.stopped else " … (does not end)")
    print()


if __name__ == "__main__":
    if not progress_bars() or not sys.stdout.isatty():  # a log is no place for bars
        os.environ |= {"TQDM_DISABLE": "1", "SFT_NO_BARS": "1"}
    try:
        code = main()
    except (ValueError, OSError) as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error
    raise SystemExit(code)
