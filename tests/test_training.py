"""What `tune` really trains on, and that it turns the base model into one that answers."""

import json
import warnings

from sftlib.chat import encode, training_template
from sftlib.data import read_facts
from sftlib.evaluate import report
from sftlib.finetune.card import print_samples
from sftlib.finetune.data import Data
from sftlib.finetune.plan import make_plan
from sftlib.models import load
from sftlib.training import config, defaults, encode_dataset, prepare, tune

import pytest
import torch
from datasets import Dataset, Features, Json, Value
from trl import SFTConfig, SFTTrainer
from trl.chat_template_utils import qwen3_chat_template

import class_5_llama3 as script
from tests.random_model import random_model

ROWS = read_facts("sft")[:480]
COLUMNS = ("input_ids", "labels", "attention_mask")


def dataset(rows):
    return Dataset.from_list([{"messages": row["messages"]} for row in rows])


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture(scope="module")
def tuned():
    model, tokenizer = load()
    return tune(model, tokenizer, dataset(ROWS), per_device_train_batch_size=16), tokenizer


def test_defaults_are_trls_own_type_and_each_can_be_overridden():
    assert isinstance(config(), SFTConfig)
    assert config().assistant_only_loss and not config().gradient_checkpointing
    assert (config().per_device_train_batch_size, config().num_train_epochs) == (32, 1)
    assert config(learning_rate=1.0, packing=True).learning_rate == 1.0
    with pytest.raises(TypeError, match="no_such_argument"):
        config(no_such_argument=1)


@pytest.mark.parametrize("computes", [True, False])
def test_bfloat16_is_used_where_the_gpu_computes_in_it_and_does_not_emulate_it(
    monkeypatch, computes
):
    def supported(including_emulation=True):
        return including_emulation or computes

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert defaults()["bf16"] is computes


def test_the_trainer_learns_exactly_the_assistants_tokens(tokenizer):
    """The batch that the model gets holds our ids, and labels that spell the answer and its end."""
    model = random_model(tokenizer)
    trainer = tune(model, tokenizer, dataset(ROWS[:4]), max_steps=1, per_device_train_batch_size=4)
    seen = []
    trainer.compute_loss = lambda model, inputs, **_: (
        seen.append(inputs) or torch.zeros((), requires_grad=True)
    )
    trainer.train()
    by_hand = {
        tuple(encode(row["messages"], tokenizer)["input_ids"]): row["messages"][-1]["content"]
        for row in ROWS[:4]
    }
    fed = {}
    for ids, labels, keep in zip(
        seen[0]["input_ids"], seen[0]["labels"], seen[0]["attention_mask"], strict=True
    ):
        assert labels[keep == 0].eq(-100).all(), "padding must not be learned"
        learned = labels[labels != -100]
        assert ids[labels != -100].equal(learned), "a label is the id at its own position"
        fed[tuple(ids[keep == 1].tolist())] = tokenizer.decode(learned)
    assert fed == {ids: answer + "<|im_end|>" for ids, answer in by_hand.items()}


@pytest.mark.integration
def test_what_is_learned_is_what_trl_would_learn(tokenizer):
    """For text without control tokens `tune` prepares a dataset as TRL does."""
    model = random_model(tokenizer)
    harmless = dataset(ROWS[:12]).add_column("kept", list(range(12)))
    trl = SFTTrainer(
        model=model, args=config(), train_dataset=harmless, processing_class=tokenizer
    ).train_dataset
    ours = tune(model, tokenizer, harmless, max_steps=1).train_dataset
    assert len(ours) == len(trl) == 12
    for column in ("input_ids", "labels", "kept"):
        assert list(ours[column]) == list(trl[column])
    whole = {"max_steps": 1, "assistant_only_loss": False}
    everything = tune(model, tokenizer, harmless, **whole).train_dataset
    assert list(everything["labels"]) == list(everything["input_ids"]) == list(trl["input_ids"])


@pytest.mark.parametrize("assistant_only_loss", [True, False])
def test_labels_are_trls_whatever_is_to_be_learned(tokenizer, assistant_only_loss):
    model = random_model(tokenizer)
    harmless, args = dataset(ROWS[:8]), config(assistant_only_loss=assistant_only_loss)
    theirs = SFTTrainer(
        model=model, args=args, train_dataset=harmless, processing_class=tokenizer
    ).train_dataset
    ours = encode_dataset(harmless, tokenizer, args)
    assert len(ours) == len(theirs) == 8
    for column in ("input_ids", "labels"):
        assert list(ours[column]) == list(theirs[column])
    assert (-100 in ours["labels"][0]) == assistant_only_loss


def test_a_dataset_of_plain_text_goes_to_trl_as_it_is(tokenizer):
    """Text that holds a control token, too: it is not a conversation that we render."""
    model = random_model(tokenizer)
    plain = Dataset.from_list([{"text": "Lima.<|im_end|>"}, {"text": "What is"}])
    args = config(assistant_only_loss=False)
    assert encode_dataset(plain, tokenizer, args) is plain
    ready = dataset(ROWS[:1]).add_column("input_ids", [[51, 576]])
    assert encode_dataset(ready, tokenizer, args) is ready
    trainer = tune(model, tokenizer, plain, max_steps=1, assistant_only_loss=False)
    expected = [tokenizer(row["text"] + tokenizer.eos_token)["input_ids"] for row in plain]
    assert list(trainer.train_dataset["input_ids"]) == expected
    assert list(trainer.train_dataset["labels"]) == expected


@pytest.mark.integration
def test_rows_are_trained_on_as_a_dataset_of_them_is(tokenizer):
    """Their own columns are ignored, also where one mixes types, which Arrow would refuse."""
    rows = [row | {"value": i if i % 2 else str(i)} for i, row in enumerate(ROWS[:4])]
    args = config(max_steps=1)
    expected = encode_dataset(dataset(ROWS[:4]), tokenizer, args)
    for given in (rows, tuple(rows)):
        found = encode_dataset(given, tokenizer, args)
        assert found.column_names == ["messages", "input_ids", "labels"]
        assert found.to_list() == expected.to_list()
    steps = {"max_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    plain = [{"messages": row["messages"]} for row in rows]
    logs = [
        tune(
            random_model(tokenizer), tokenizer, train, eval_dataset=held_out, **steps
        ).state.log_history
        for train, held_out in (
            (rows[:3], rows[3:]),
            (plain[:3], plain[3:]),
            (dataset(rows[:3]), dataset(rows[3:])),
        )
    ]
    losses = [[line.get("loss", line.get("eval_loss")) for line in log] for log in logs]
    assert losses[0] == losses[1] == losses[2] and None not in losses[0][:2]


def test_rows_that_say_themselves_what_is_learned_need_no_setting():
    model, tokenizer = load()
    rows = [
        {"input_ids": [2, 51, 576, 3], "labels": [-100, -100, 576, 3]},
        {"input_ids": [2, 51, 3], "labels": [-100, 51, -100]},
    ]
    trainer = prepare(model, tokenizer, rows, max_steps=1)
    assert trainer.train_dataset.to_list() == rows
    with pytest.raises(ValueError, match="assistant_only_loss"):  # what TRL says if it is asked to
        prepare(model, tokenizer, rows, assistant_only_loss=True)


def test_columns_that_trl_reads_are_kept_beside_messages():
    tokenizer = load()[1]
    rows = [{"messages": ROWS[0]["messages"], "chat_template_kwargs": {"a": 1}, "value": "Lima"}]
    assert encode_dataset(rows, tokenizer, config()).column_names == [
        "messages",
        "chat_template_kwargs",
    ]
    rows = [{"messages": ROWS[0]["messages"], "labels": "places", "value": "Lima"}]
    found = encode_dataset(rows, tokenizer, config())[0]
    assert found["labels"] == encode(ROWS[0]["messages"], tokenizer)["labels"]


# --- Tools, thoughts, turns that are not learned


def schema(name: str, **properties: str) -> dict:
    types = {key: {"type": kind} for key, kind in properties.items()}
    parameters = {"type": "object", "properties": types}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def calling(name: str, result: str, answer: str, **arguments) -> list[dict]:
    function = {"name": name, "arguments": arguments}
    return [
        {"role": "user", "content": f"Use {name}."},
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "I need it.",
            "tool_calls": [{"type": "function", "function": function}],
        },
        {"role": "tool", "content": result},
        {"role": "assistant", "content": answer},
    ]


TOOL_ROWS = [
    {"messages": calling("add", "3", "It is 3.", a=1, b=2), "tools": [schema("add", a="integer")]},
    {
        "messages": calling("find", "", "Nothing.", where=None, words=["x", {"y": 1.5}]),
        "tools": [schema("find", words="array"), schema("stop")],
    },
    {"messages": [*ROWS[0]["messages"][:1], {**ROWS[0]["messages"][1], "weight": 1}]},
]
TOOL_ROWS.append({"messages": [*TOOL_ROWS[0]["messages"]], "tools": TOOL_ROWS[0]["tools"]})
TOOL_ROWS[3]["messages"][1] = TOOL_ROWS[0]["messages"][1] | {"weight": 0}


@pytest.fixture
def qwen3(tokenizer):
    """The tokenizer with Qwen3's template and its tokens for calls and thoughts."""
    tags = ["tool_call", "think", "tool_response"]
    tokenizer.add_tokens([f"<{slash}{tag}>" for tag in tags for slash in ("", "/")])
    tokenizer.chat_template = qwen3_chat_template
    return tokenizer


def batch_of(trainer) -> dict[str, torch.Tensor]:
    return next(iter(trainer.get_train_dataloader()))


def test_the_batch_of_rows_with_tools_has_exactly_the_learned_tokens(qwen3):
    trainer = prepare(random_model(qwen3), qwen3, TOOL_ROWS, max_steps=1)
    batch = batch_of(trainer)
    fed = []
    for ids, labels, keep in zip(*(batch[c] for c in COLUMNS), strict=True):
        assert ids[labels != -100].equal(labels[labels != -100])
        fed.append((qwen3.decode(ids[keep == 1]), qwen3.decode(labels[labels != -100])))
    added = (
        '<think>\nI need it.\n</think>\n\n<tool_call>\n{"name": "add", "arguments": {"a": 1, '
        '"b": 2}}\n</tool_call><|im_end|>\n'
    )
    found = (
        '<think>\nI need it.\n</think>\n\n<tool_call>\n{"name": "find", "arguments": {"where": '
        'null, "words": ["x", {"y": 1.5}]}}\n</tool_call><|im_end|>\n'
    )
    no_thought, end = "<think>\n\n</think>\n\n", "<|im_end|>\n"
    fact = ROWS[0]["messages"][1]["content"]
    assert {learned for _, learned in fed} == {
        f"{added}{no_thought}It is 3.{end}",
        f"{found}{no_thought}Nothing.{end}",
        f"{no_thought}{fact}{end}",
        f"{no_thought}It is 3.{end}",
    }
    texts = {
        qwen3.apply_chat_template(
            row["messages"],
            tools=row.get("tools"),
            tokenize=False,
            chat_template=training_template(qwen3),
        )
        for row in TOOL_ROWS
    }
    assert {text for text, _ in fed} == texts
    trainer.train()


def test_the_last_answer_alone_can_be_learned(qwen3):
    trainer = prepare(
        random_model(qwen3), qwen3, TOOL_ROWS[:2], eval_dataset=TOOL_ROWS[:2], learn="last"
    )
    for data in (trainer.train_dataset, trainer.eval_dataset):
        learned = [[i for i in row if i != -100] for row in data["labels"]]
        assert [qwen3.decode(ids) for ids in learned] == [
            f"<think>\n\n</think>\n\n{text}<|im_end|>\n" for text in ("It is 3.", "Nothing.")
        ]


@pytest.mark.parametrize("as_json", [True, False])
def test_a_dataset_of_rows_with_tools_is_encoded_as_the_rows_are(qwen3, as_json):
    """Tools may be JSON there; messages, too, in a column of the type Json."""
    expected = encode_dataset(TOOL_ROWS, qwen3, config())
    tools = [row.get("tools") for row in TOOL_ROWS]
    columns = {
        "messages": [row["messages"] for row in TOOL_ROWS],
        "tools": [json.dumps(own) if own else "" for own in tools] if as_json else tools,
    }
    types = {"messages": Json(), "tools": Value("string") if as_json else Json()}
    found = encode_dataset(Dataset.from_dict(columns, features=Features(types)), qwen3, config())
    assert found["input_ids"] == expected["input_ids"] and found["labels"] == expected["labels"]


def test_a_dataset_in_which_arrow_has_changed_the_calls_is_refused(qwen3):
    mixed = Dataset.from_list([TOOL_ROWS[0], {"messages": calling("see", "1", "One.", c="x")}])
    assert mixed[0]["messages"][1]["tool_calls"][0]["function"]["arguments"]["c"] is None
    with pytest.raises(ValueError, match="Expected messages as they were written, found None in "):
        encode_dataset(mixed, qwen3, config())
    schemas = [{"messages": ROWS[0]["messages"], "tools": row["tools"]} for row in TOOL_ROWS[:2]]
    with pytest.raises(
        ValueError, match="Expected tools as they were written, .* list of rows, or"
    ):
        encode_dataset(Dataset.from_list(schemas), qwen3, config())
    alike = Dataset.from_list([TOOL_ROWS[0], TOOL_ROWS[3]])  # with the same keys nothing is filled
    assert encode_dataset(alike, qwen3, config())["labels"] == [
        encode(row["messages"], qwen3, row["tools"])["labels"] for row in alike
    ]


@pytest.mark.parametrize(("rows", "learn"), [(TOOL_ROWS[3:], "all"), (TOOL_ROWS[:1], "last")])
def test_a_loss_on_all_tokens_leaves_no_turn_out(qwen3, rows, learn):
    everything = config(assistant_only_loss=False)
    with pytest.raises(ValueError, match="assistant_only_loss=True .* found False: the loss would"):
        encode_dataset(rows, qwen3, everything, learn)
    whole = encode_dataset(TOOL_ROWS[:1], qwen3, everything)
    assert whole["labels"] == whole["input_ids"]


def test_rows_with_tools_need_a_template_that_knows_them():
    model, tokenizer = load()
    with pytest.raises(
        ValueError, match="Conversation 1 of 4: .* knows tools, found one that leave"
    ):
        prepare(model, tokenizer, TOOL_ROWS)
    rows = [{"messages": ROWS[0]["messages"], "tools": "[broken"}]
    with pytest.raises(ValueError, match=r"Expected tools as a list or as JSON, found '\[broken'"):
        prepare(model, tokenizer, rows)


@pytest.mark.integration
def test_the_script_trains_on_rows_with_tools_and_asks_them(qwen3, tmp_path, capsys):
    """With the model's own template; a held-out question may end with a tool's result."""
    folder = tmp_path / "base"
    random_model(qwen3).save_pretrained(folder)
    qwen3.save_pretrained(folder)
    words = f"--model {folder} --template own --method full --output_dir {tmp_path / 'run'}"
    words += " --max_steps 1 --answer_tokens 4"
    args, training = script.parse(words.split())
    data = Data(TOOL_ROWS, TOOL_ROWS[:2], [])
    trainer, asked, _ = script.make_trainer(args, training, data)
    by_hand = encode(TOOL_ROWS[0]["messages"], qwen3, TOOL_ROWS[0]["tools"])["labels"]
    assert trainer.train_dataset["labels"][0] == by_hand
    trainer.train()
    assert [len(given) for given in asked.by_step.values()] == [2, 2]
    print_samples(asked.rows, asked.by_step[1])
    assert "Use add.\n" in capsys.readouterr().out
    assert make_plan(args, training, TOOL_ROWS).work.longest == max(
        len(encode(row["messages"], qwen3, row.get("tools"))["input_ids"]) for row in TOOL_ROWS
    )


WRONG_DATA = [
    ("data.jsonl", TypeError, "list of rows .* or as a datasets.Dataset, found a str"),
    ({"train": ROWS[:2]}, TypeError, "found a dict"),
    ((row for row in ROWS[:2]), TypeError, "found a generator"),
    (None, TypeError, "found a NoneType"),
    ([ROWS[0]["messages"]], TypeError, "found a list with a list in it"),
    ([ROWS[0], None], TypeError, "found a list with a NoneType in it"),
    (ROWS[0]["messages"], TypeError, r"found one conversation; write \[{'messages'"),
    ([], ValueError, "at least one row"),
    ([ROWS[0], {"text": "Lima"}, ROWS[1], {}], ValueError, "found 2 of 4 .* is row 2"),
]


@pytest.mark.parametrize(("data", "kind", "said"), WRONG_DATA)
def test_data_of_a_wrong_kind_are_refused(data, kind, said):
    model, tokenizer = load()
    with pytest.raises(kind, match=said):
        prepare(model, tokenizer, data)
    with pytest.raises(kind, match=said):
        encode_dataset(data, tokenizer, config())
    if data is not None:
        with pytest.raises(kind, match=said):
            prepare(model, tokenizer, ROWS[:2], eval_dataset=data)


def test_what_max_length_cuts_or_leaves_out_is_counted(tokenizer):
    model = random_model(tokenizer)
    short = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "Lima."}]
    cut = [short[0], {"role": "assistant", "content": "Lima. " * 20}]
    gone = [{"role": "user", "content": "Peru? " * 20}, short[1]]
    rows = [{"messages": messages} for messages in (short, cut, gone, short)]
    said = "2 of 4 conversations .* max_length=32 tokens: .* 1 of them, .* are left out. Raise max"
    with pytest.warns(UserWarning, match=said):
        trainer = tune(model, tokenizer, rows, max_steps=1, max_length=32)
    kept = [encode(messages, tokenizer)["input_ids"] for messages in (short, cut, short)]
    assert [len(ids) > 32 for ids in kept] == [False, True, False]
    assert list(trainer.train_dataset["input_ids"]) == [ids[:32] for ids in kept]


@pytest.mark.parametrize("max_length", [96, None])
def test_there_is_no_warning_when_nothing_is_cut(tokenizer, max_length):
    model = random_model(tokenizer)
    longest = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "Lima. " * 17}]
    assert len(encode(longest, tokenizer)["input_ids"]) == 96
    rows = [{"messages": longest}] * 2
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*max_length")
        trainer = tune(model, tokenizer, rows, max_steps=1, max_length=max_length)
    assert [len(ids) for ids in trainer.train_dataset["input_ids"]] == [96, 96]


def test_the_loss_is_that_of_the_next_token():
    """The first loss that is logged equals cross-entropy with the labels one step ahead."""
    model, tokenizer = load()
    encoded = encode(ROWS[0]["messages"], tokenizer)
    ids, mask = (torch.tensor([encoded[k]]) for k in ("input_ids", "assistant_masks"))
    with torch.no_grad():
        logits = model(input_ids=ids.to(model.device)).logits.float().cpu()
    picked = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    expected = -picked[mask[:, 1:] == 1].mean().item()
    trainer = tune(model, tokenizer, dataset(ROWS[:1]), max_steps=1)
    assert losses(trainer)[0] == pytest.approx(
        expected, rel=2e-2 if model.device.type != "cpu" else 1e-3
    )


@pytest.mark.integration
def test_the_same_seed_gives_the_same_losses_and_another_seed_others():
    runs = []
    for seed in (0, 0, 1):
        model, tokenizer = load()
        runs.append(losses(tune(model, tokenizer, dataset(ROWS), max_steps=3, seed=seed)))
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.integration
def test_sft_turns_the_base_into_a_model_that_answers_and_stops(tuned):
    trainer, tokenizer = tuned
    table = report(
        trainer.model, tokenizer, {name: read_facts(name) for name in ("dev", "unknown")}
    )
    assert table.exact_match["dev"] >= 0.9
    assert table.stops.min() >= 0.98
    assert table.exact_match["unknown"] <= 0.02


@pytest.mark.integration
def test_nothing_is_written_unless_asked_for(tuned, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, tokenizer = load()
    trainer = tune(model, tokenizer, dataset(ROWS[:16]), max_steps=1)
    assert isinstance(trainer, SFTTrainer)
    assert not list(tmp_path.iterdir())
    tune(
        model,
        tokenizer,
        dataset(ROWS[:16]),
        max_steps=1,
        save_strategy="steps",
        save_steps=1,
        output_dir=str(tmp_path / "kept"),
    )
    assert list((tmp_path / "kept").glob("checkpoint-1/*.safetensors"))
