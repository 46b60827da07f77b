"""SFT with TRL's own trainer and the course's defaults: quiet, deterministic, fast on a CPU.

`config` returns TRL's `SFTConfig`, `prepare` returns TRL's `SFTTrainer`, and `tune` returns that
trainer after training. What differs from plain TRL:

- `defaults` lists the settings that differ from TRL's. Each can be overridden by its own name. With
  adapters, the learning rate is ten times higher.
- A `LoraConfig` that does not fit the model is refused (`sftlib.adapters.check_lora`).
- `sftlib.chat.encode_batch` encodes the conversations, not TRL (see `encode_dataset`).
- A bar of one line shows the progress. TRL would print a line per step (`PrinterCallback`).
- Five patches, with their reasons in `sftlib.patches`: `score_learned_positions_alone` and
  `score_in_one_piece` change TRL for the rest of the process. `show_the_head` may give the model's
  output head an attribute `bias`. `keep_four_bits_differentiable` keeps weights in 4 bits in a form
  that can be trained. `without_dataset_bars` hides the bars of Datasets while the
  trainer is made.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, cast

from sftlib import patches, progress_bar, progress_bars
from sftlib.adapters import check_lora
from sftlib.chat import IGNORED, encode_batch
from sftlib.data.stored import AT_ONCE, StoredRows, shows_bars
from sftlib.data.tables import Batches, key_of, table
from sftlib.data.validation import says_nothing

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
    from trl import SFTConfig, SFTTrainer

FULL_LEARNING_RATE = 5e-4
LORA_LEARNING_RATE = 5e-3  # about ten times that of full finetuning
# If a dataset has one of these columns beside `messages`, TRL encodes the rows itself.
TRL_ENCODES = {"input_ids", "chat_template_kwargs"}
KEPT_AS_JSON = {"messages", "tools"}  # columns whose objects have different keys
SMALL = 10_000  # fewer rows are encoded in moments: a bar would be noise

Rows = Sequence[Mapping[str, Any]]
"""Rows of training data, each with `messages` and perhaps `tools`; other columns are ignored."""


def config(**overrides: Any) -> SFTConfig:
    """TRL's `SFTConfig` with the course's defaults.

    `defaults` lists them. The main ones: the loss is on the assistant's tokens only; there is no
    activation checkpointing (it saves memory that a small model does not need, and takes time);
    rows of similar length share a batch (less padding); each step is logged; no files are written,
    and no tracker is called.

    Args:
        overrides: any argument of `trl.SFTConfig`, by its name.
    """
    from trl import SFTConfig

    return SFTConfig(**(defaults() | overrides))


def defaults() -> dict[str, Any]:
    """The arguments of `trl.SFTConfig` that `config` sets on this machine."""
    import torch

    gpu = torch.cuda.is_available()
    return {
        "output_dir": tempfile.gettempdir() + "/sftlib",
        "use_cpu": not gpu,
        "bf16": gpu and torch.cuda.is_bf16_supported(including_emulation=False),
        "assistant_only_loss": True,
        "per_device_train_batch_size": 32,
        "learning_rate": FULL_LEARNING_RATE,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,  # a fraction of all steps
        "num_train_epochs": 1,
        "max_length": 512,
        "train_sampling_strategy": "group_by_length",
        "activation_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,  # `tune` shows a bar of its own, one line
        "seed": 0,
    }


def tune(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Rows | Dataset,
    peft_config: PeftConfig | None = None,
    eval_dataset: Rows | Dataset | None = None,
    **overrides: Any,
) -> SFTTrainer:
    """Finetune `model` on `dataset`; returns TRL's `SFTTrainer`, as `prepare` makes it."""
    trainer = prepare(model, tokenizer, dataset, peft_config, eval_dataset, **overrides)
    trainer.train()
    return trainer


def prepare(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Rows | Dataset,
    peft_config: PeftConfig | None = None,
    eval_dataset: Rows | Dataset | None = None,
    args: SFTConfig | None = None,
    learn: str = "all",
    **overrides: Any,
) -> SFTTrainer:
    """TRL's `SFTTrainer` for `model` and `dataset`, ready for its `train()`.

    `sftlib.chat.encode` encodes the conversations, so that no text in them becomes a control token.
    The top of this module lists what else differs from plain TRL. As in TRL, a conversation longer
    than `max_length` is cut, and it is left out if nothing in the rest is learned. A warning counts
    both.

    Args:
        model: changed in place. With `peft_config`, `trainer.model` is the wrapped model.
        tokenizer: its chat template must mark what the assistant writes (see
            `sftlib.chat.encode`), and show the tools, calls and thoughts of the rows.
        dataset: a list of rows, `sftlib.data.stored.StoredRows` (then the tokens are kept on disk,
            too) or a `datasets.Dataset`, with `messages`, and perhaps `tools` (see
            `sftlib.chat.encode`). Columns such as `relation` or `value` are ignored. Other dataset
            types of TRL go to TRL unchanged. If there are `input_ids` and `labels`, the labels
            decide what is learned.
        eval_dataset: of the same kind, for `eval_strategy="steps"` or `"epoch"`.
        peft_config: for instance a `peft.LoraConfig`. Without it all parameters are trained.
        args: all of TRL's settings; then `overrides` are not used [`config(**overrides)`].
        learn: "all" answers of a conversation, or only the "last"; see `sftlib.chat.encode`.
        overrides: arguments of `trl.SFTConfig`, see `config`.

    Raises:
        TypeError: the data are neither a list of rows nor a `datasets.Dataset`.
        ValueError: a list is empty, or some of its rows have no `messages`; a conversation cannot
            be encoded (see `sftlib.chat.encode`); a turn must not be learned, but the loss is on
            all tokens; a `LoraConfig` does not fit the model (see `sftlib.adapters.check_lora`).
    """
    from peft import LoraConfig
    from transformers import PrinterCallback
    from trl import SFTTrainer

    patches.score_learned_positions_alone()
    patches.score_in_one_piece()
    patches.keep_four_bits_differentiable(model)
    dataset = dataset if isinstance(dataset, StoredRows) else _as_dataset(dataset)
    if isinstance(peft_config, LoraConfig):
        check_lora(model, peft_config)
    args = args or _settings(dataset, peft_config, overrides)
    small = len(dataset) < SMALL
    with patches.without_dataset_bars() if small else nullcontext():
        dataset = encode_dataset(dataset, tokenizer, args, learn)
        if eval_dataset is not None:
            eval_dataset = encode_dataset(eval_dataset, tokenizer, args, learn)
        trainer = SFTTrainer(
            model=model,
            args=args,
            train_dataset=dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            peft_config=peft_config,
        )
    # transformers annotates any module, or None
    patches.show_the_head(cast("PreTrainedModel", trainer.model))
    trainer.remove_callback(PrinterCallback)
    if progress_bars():
        trainer.add_callback(_one_line_bar())
    return trainer


def _settings(
    dataset: StoredRows | Dataset, peft_config: PeftConfig | None, overrides: Mapping[str, Any]
) -> SFTConfig:
    """`config`, with the defaults that depend on the data and on the method."""
    found: dict[str, Any] = {}
    if peft_config is not None:
        found["learning_rate"] = LORA_LEARNING_RATE
    if {"input_ids", "labels"} <= {*getattr(dataset, "column_names", ())}:
        found["assistant_only_loss"] = False  # otherwise TRL asks for `messages`
    return config(**(found | dict(overrides)))


def encode_dataset(
    dataset: Rows | Dataset,
    tokenizer: PreTrainedTokenizerBase,
    args: SFTConfig,
    learn: str = "all",
) -> Dataset:
    """The dataset with columns `input_ids` and `labels`, as TRL would make them.

    Args:
        dataset: as for `prepare`.
        learn: as for `prepare`.
    """
    if isinstance(dataset, StoredRows):
        return _warned(_encode_once(dataset, tokenizer, args, learn), args)
    dataset = _as_dataset(dataset)
    columns = set(dataset.column_names)
    if "messages" not in columns or columns & TRL_ENCODES:
        return dataset

    def encode(rows: dict) -> dict:
        _refuse_filled(rows, dataset.features)
        tools = [_parsed(own) for own in rows["tools"]] if "tools" in columns else None
        return _ids_and_labels(rows["messages"], tools, tokenizer, args, learn)

    return _warned(dataset.map(encode, batched=True), args)


def _ids_and_labels(
    conversations: Sequence[Any],
    tools: Sequence[Any] | None,
    tokenizer: PreTrainedTokenizerBase,
    args: SFTConfig,
    learn: str,
) -> dict[str, list[list[int]]]:
    found = encode_batch(conversations, tokenizer, tools, learn=learn)
    if not args.assistant_only_loss:
        _refuse_unlearned(conversations, learn)
    learned = "labels" if args.assistant_only_loss else "input_ids"
    return {"input_ids": found["input_ids"], "labels": found[learned]}


def _warned(encoded: Dataset, args: SFTConfig) -> Dataset:
    """The same dataset, after a warning of what `max_length` cuts."""
    cuts = not args.packing or args.packing_strategy == "bfd"  # other strategies split rows
    if args.max_length is not None and cuts:
        _warn_of_cuts(encoded["labels"], args.max_length, args.truncation_mode == "keep_start")
    return encoded


def _encode_once(
    rows: StoredRows, tokenizer: PreTrainedTokenizerBase, args: SFTConfig, learn: str
) -> Dataset:
    """`encode_dataset` for rows on disk, whose tokens stay there, too: made once for all ranks."""
    import pyarrow
    from datasets import Dataset

    ids = pyarrow.list_(pyarrow.int32())

    def make(notes: dict[str, Any]) -> Batches:
        notes["warnings"] = []
        hidden = len(rows) < SMALL or not shows_bars()
        with progress_bar(total=len(rows), unit="row", desc="Tokens", disable=hidden) as bar:
            for start in range(0, len(rows), AT_ONCE):
                part = rows[start : start + AT_ONCE]
                tools = [row.get("tools") for row in part]
                with warnings.catch_warnings(record=True) as said:
                    warnings.simplefilter("always")
                    columns = _ids_and_labels(
                        [row["messages"] for row in part], tools, tokenizer, args, learn
                    )
                notes["warnings"] += [str(one.message) for one in said]
                arrays = {n: pyarrow.array(column, ids) for n, column in columns.items()}
                # Without one, TRL takes assistant_only_loss for a mistake.
                messages = pyarrow.array([[{"role": "assistant", "content": ""}]] * len(part))
                yield pyarrow.record_batch(arrays | {"messages": messages})
                bar.update(len(part))

    found = table(_key(rows, tokenizer, args, learn), make)
    for text in dict.fromkeys(found.notes["warnings"]):
        warnings.warn(text, stacklevel=5)
    if found.unsaved and not rows.unsaved and args.process_index == 0:
        warnings.warn(found.unsaved, stacklevel=5)
    return Dataset.from_file(str(found.path)) if found.path else Dataset(found.data)


def _key(rows: StoredRows, tokenizer: PreTrainedTokenizerBase, args: SFTConfig, learn: str) -> str:
    """A hash of all that decides what the tokens of these rows are."""
    names = ("transformers", "tokenizers", "trl", "jinja2")
    return key_of(
        rows.version(),
        tokenizer.backend_tokenizer.to_str(),
        tokenizer.chat_template,
        tokenizer.special_tokens_map,
        [args.assistant_only_loss, learn, *map(version, names)],
        code=("data", "chat", ""),
    )


def _parsed(tools: Any) -> Any:
    """Tools as a list. Some datasets keep them as JSON, because Arrow wants one type per column."""
    if not isinstance(tools, str) or not tools.strip():
        return tools or None
    try:
        return json.loads(tools)
    except ValueError as error:
        raise ValueError(
            f"Expected tools as a list or as JSON, found {tools[:80]!r} ({error}): mend the JSON."
        ) from error


def _refuse_unlearned(conversations: Sequence[Any], learn: str) -> None:
    """Raise if a turn must not be learned: the loss would be on all tokens."""
    if learn != "all" or any(m.get("weight") == 0 for messages in conversations for m in messages):
        raise ValueError(
            "Expected assistant_only_loss=True (turns have weight 0, or only the last answer is "
            "learned), found False: the loss would be on all tokens. Set it to True, or learn all "
            "turns."
        )


def _as_dataset(data: Rows | Dataset) -> Dataset:
    """Rows as a `Dataset` with the columns that a trainer reads; a `Dataset` stays as it is."""
    from datasets import Dataset

    if isinstance(data, Dataset):
        return data
    if wrong := _not_rows(data):
        raise TypeError(
            "Expected training data as a list of rows (dicts with `messages`) or as a "
            f"datasets.Dataset, found {wrong}."
        )
    if not data:
        raise ValueError("Expected at least one row of training data, found an empty list.")
    lacking = [number for number, row in enumerate(data, 1) if "messages" not in row]
    if len(lacking) == len(data):
        return Dataset.from_list([dict(row) for row in data])
    if lacking:
        raise ValueError(
            f"Expected `messages` in each row, found {len(lacking)} of {len(data)} rows without; "
            f"the first is row {lacking[0]}. Add `messages`, or remove these rows."
        )
    # Arrow wants one type per column. A column that no trainer reads may mix types (a text in one
    # row, a number in the next), so leave it out.
    kept = {"messages", "labels", "tools"} | TRL_ENCODES
    rows = [{name: row[name] for name in row if name in kept} for row in data]
    if all(says_nothing(row.get("tools")) for row in rows):
        for row in rows:
            row.pop("tools", None)
    return _typed(rows)


def _typed(rows: list[dict]) -> Dataset:
    """A `Dataset` that gives the rows back as they were.

    In a column of one type, Arrow gives each object the keys of all others, with None as the value.
    The model would learn each call with the arguments of all other calls. So columns of such
    objects are kept as JSON.
    """
    from datasets import Dataset, Features, Json

    lists = [row["messages"] for row in rows if isinstance(row["messages"], list | tuple)]
    keys = {key for messages in lists for m in messages if isinstance(m, Mapping) for key in m}
    if keys <= {"role", "content"} and not any("tools" in row for row in rows):
        return Dataset.from_list(rows)
    names = dict.fromkeys(name for row in rows for name in row)  # each once, in order
    columns = {name: [row.get(name) for row in rows] for name in names}
    others = {name: column for name, column in columns.items() if name not in KEPT_AS_JSON}
    known = Dataset.from_dict(others).features
    types = {name: Json() if name in KEPT_AS_JSON else known[name] for name in names}
    return Dataset.from_dict(columns, features=Features(types))


def _refuse_filled(rows: dict, types: Mapping[str, Any]) -> None:
    """Raise if Arrow may have given calls or tools the keys of others (see `_typed`)."""
    calls = [
        call
        for messages in rows["messages"]
        for m in messages
        for call in (m.get("tool_calls") or () if isinstance(m, Mapping) else ())
    ]
    arguments = [_inner(call, "function", "arguments") for call in calls]
    schemas = [tool for own in rows.get("tools", ()) if isinstance(own, list) for tool in own]
    for name, parts in (("messages", arguments), ("tools", schemas)):
        if "Json(" not in repr(types.get(name)) and any(map(_holds_none, parts)):
            raise ValueError(
                f"Expected {name} as they were written, found None in the objects of a call or a "
                "tool: Arrow gives all objects of a column the same keys. Pass a list of rows, or "
                "a Dataset in which the column has the type datasets.Json()."
            )


def _inner(value: Any, *keys: str) -> Any:
    """`value[key1][key2]…`; None if a key is missing."""
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _holds_none(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(item is None or _holds_none(item) for item in value.values())
    return isinstance(value, list) and any(map(_holds_none, value))


def _not_rows(data: Any) -> str:
    """What the data are instead of a list of rows; empty if they are one."""
    if not isinstance(data, list | tuple):
        return f"a {type(data).__name__}"
    if others := [type(row).__name__ for row in data if not isinstance(row, Mapping)]:
        return f"a list with a {others[0]} in it"
    if data and data[0].keys() == {"role", "content"}:
        return "one conversation; write [{'messages': conversation}]"
    return ""


def _warn_of_cuts(labels: Sequence[list[int]], max_length: int, keep_start: bool) -> None:
    longer = [row for row in labels if len(row) > max_length]
    part = slice(max_length) if keep_start else slice(-max_length, None)
    emptied = sum(all(label == IGNORED for label in row[part]) for row in longer)
    if longer:
        warnings.warn(
            f"{len(longer)} of {len(labels)} conversations are longer than max_length={max_length} "
            f"tokens: the {'end' if keep_start else 'start'} is cut off, and {emptied} of them, in "
            "which then nothing is learned, are left out. Raise max_length where the memory allows "
            "it.",
            stacklevel=5,
        )


def _one_line_bar() -> TrainerCallback:
    """A bar with the latest loss, instead of a table with one row per step."""
    from transformers import TrainerCallback

    class Bar(TrainerCallback):
        def on_train_begin(self, args, state, control, **_: Any) -> None:
            if state.is_world_process_zero:
                self.bar = progress_bar(total=state.max_steps, unit="step")

        def on_log(self, args, state, control, logs: Any = None, **_: Any) -> None:
            if state.is_world_process_zero and "loss" in (logs or {}):
                self.bar.set_postfix(loss=f"{float(logs['loss']):.3f}", refresh=False)
                self.bar.update(state.global_step - self.bar.n)

        def on_train_end(self, args, state, control, **_: Any) -> None:
            if state.is_world_process_zero:
                self.bar.close()

    return Bar()
