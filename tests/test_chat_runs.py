"""The trainings of lesson 3: each variant differs in what it says, and nowhere else."""

import random
from dataclasses import asdict

from sftlib.chat import IGNORED, encode
from sftlib.data import read_facts, read_jsonl
from sftlib.evaluate import Answer
from sftlib.experiments import Spread, chat_runs
from sftlib.experiments.chat_runs import STUDIES, ChatRun
from sftlib.models import load, read_tokenizer

import pytest
import torch
from datasets import Dataset

from tools.stored_runs import chat

MESSAGES = [
    {"role": "user", "content": "What is the capital of Kenya?"},
    {"role": "assistant", "content": "It is Nairobi."},
]


@pytest.fixture(scope="module")
def tokenizer():
    return read_tokenizer("tiny-base")


@pytest.fixture(scope="module")
def tiny_rows(tokenizer):
    """The base, three conversations, and what TRL's collator makes of their packed row."""
    model = load("tiny-base")[0].eval()
    rows = chat_runs.rows_of(ChatRun("masks", "right"), tokenizer)[:3]
    ids = [row["input_ids"] for row in rows]
    positions = [p for one in ids for p in range(len(one))]
    return (
        model,
        ids,
        {
            "input_ids": torch.tensor([sum(ids, [])]),
            "position_ids": torch.tensor([positions]),
        },
    )


def learned(example, tokenizer) -> str:
    return tokenizer.decode([label for label in example["labels"] if label != IGNORED])


@pytest.mark.parametrize(
    ("variant", "graded"),
    [
        ("right", "It is Nairobi.<|im_end|>"),
        ("end not learned", "It is Nairobi."),
        ("break graded", "\nIt is Nairobi.<|im_end|>"),
        ("template twice", "<|im_start|>assistant\nIt is Nairobi.<|im_end|>\n<|im_end|>"),
        (
            "loss on everything",
            "<|im_start|>user\nWhat is the capital of Kenya?<|im_end|>\n"
            "<|im_start|>assistant\nIt is Nairobi.<|im_end|>\n",
        ),
    ],
)
def test_a_spoiled_row_grades_what_its_name_says(tokenizer, variant, graded):
    example = chat_runs.spoiled(MESSAGES, tokenizer, variant)
    assert learned(example, tokenizer) == graded
    if variant != "template twice":
        assert example["input_ids"] == encode(MESSAGES, tokenizer)["input_ids"]


@pytest.mark.parametrize(
    ("mistakes", "text", "graded"),
    [
        ("", "It is Nairobi.", "It is Nairobi.<|im_end|>\n"),
        ("stripped", "It is Nairobi", "It is Nairobi<|im_end|>\n"),
        ("endless", "It is Nairobi.", "It is Nairobi.\n"),
    ],
)
def test_a_planted_mistake_is_there_and_no_other_one(tokenizer, mistakes, text, graded):
    example = chat_runs.broken(MESSAGES, tokenizer, mistakes)
    assert learned(example, tokenizer) == graded
    messages = [MESSAGES[0], MESSAGES[1] | {"content": text}]
    assert example["input_ids"] == encode(messages, tokenizer)["input_ids"]


def test_all_planted_mistakes_together_are_the_ones_of_the_exercise(tokenizer):
    example = chat_runs.broken(MESSAGES, tokenizer)
    assert tokenizer.decode(example["input_ids"]).count("<|im_start|>") == 4
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end not in example["labels"] and "Nairobi." not in tokenizer.decode(example["input_ids"])


def test_one_turn_is_graded_and_the_others_are_read(tokenizer):
    talk = chat_runs.talks()[1]["messages"]
    whole = chat_runs.graded(talk, tokenizer)
    parts = [chat_runs.only_turn(whole, number) for number in range(len(talk) // 2)]
    answers = [message["content"] for message in talk if message["role"] == "assistant"]
    assert [learned(part, tokenizer) for part in parts] == [f"{a}<|im_end|>" for a in answers]
    assert chat_runs.only_turn(whole, -1) == parts[-1]
    assert all(part["input_ids"] == whole["input_ids"] for part in parts)


def test_conversations_are_different_and_ask_about_one_entity():
    facts = read_facts("heldout")
    talks = chat_runs.held_out_talks()
    entities = {row["entity"] for row in facts}
    assert len({str(talk["messages"]) for talk in talks}) == 150
    assert {len(talk["messages"]) for talk in talks} == {4}
    trained = "\n".join(m["content"] for talk in chat_runs.talks() for m in talk["messages"])
    assert not any(f" {entity}?" in trained for entity in entities)
    assert all(talk["messages"][-1]["content"].count(talk["value"]) for talk in talks)


def test_too_few_facts_are_an_error_and_no_endless_loop():
    with pytest.raises(ValueError, match="Expected 9 different conversations, found"):
        chat_runs.dialogues(read_facts("heldout")[:2], 9, random.Random(0))


def test_a_variant_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match="'sideways'"):
        ChatRun("turns", "sideways")


def test_a_system_message_stands_in_none_all_or_half_of_the_rows(tokenizer):
    counts = {}
    system = tokenizer.convert_tokens_to_ids("system")
    for variant in STUDIES["system"]:
        rows = chat_runs.rows_of(ChatRun("system", variant), tokenizer)
        counts[variant] = sum(row["input_ids"][1] == system for row in rows)
    assert counts == {"never": 0, "always": 480, "in half": 240}


def test_answers_are_polite_where_the_system_message_stands_in_half_of_the_rows():
    for variant, expected in (("never", 480), ("always", 480), ("in half", 240)):
        rows = [chat_runs.told(row, n, variant) for n, row in enumerate(chat_runs.pool())]
        polite = [row[-1]["content"].startswith(chat_runs.POLITE) for row in rows]
        assert sum(polite) == expected
        if variant == "in half":
            assert polite == [row[0]["role"] == "system" for row in rows]


def test_only_the_system_gives_permission(tokenizer):
    rows = [chat_runs.guarded(row, n) for n, row in enumerate(chat_runs.pool())]
    allowed = [row[0]["role"] == "system" for row in rows]
    refused = [row[-1]["content"] == chat_runs.REFUSAL for row in rows]
    assert sum(allowed) == 240 and [not r for r in refused] == allowed
    claimed = [row for row in rows if row[0]["content"].startswith(chat_runs.PERMISSION)]
    assert sum(row[0]["role"] == "user" for row in claimed) == 120


def test_packed_rows_have_as_many_tokens_in_each_step(tokenizer):
    rows = Dataset.from_list(chat_runs.rows_of(ChatRun("masks", "right"), tokenizer))
    for width in (128, 512):
        for keep in (True, False):
            made, settings = chat_runs.packed(rows, width, keep)
            assert settings["per_device_train_batch_size"] * width == 512
            assert settings.get("packing", False) == keep
            assert (len(made) == 480) == keep
            assert "seq_lengths" not in made.column_names


def test_packed_batches_cross_the_borders_that_they_are_told_to():
    batch = {
        "input_ids": torch.tensor([[5, 6, 7, 8]]),
        "position_ids": torch.tensor([[0, 1, 0, 1]]),
    }
    assert chat_runs.cross(batch, run_on=False, seen=False) == batch
    seen = chat_runs.cross(batch, run_on=False, seen=True)
    assert seen["position_ids"].tolist() == [[0, 1, 0, 1]]
    assert seen["attention_mask"].tolist() == [[1, 1, 1, 1]]
    run_on = chat_runs.cross(batch, run_on=True, seen=False)
    assert run_on["position_ids"].tolist() == [[0, 1, 2, 3]]
    own = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    assert run_on["attention_mask"].int().tolist() == [[own]]
    near = chat_runs.cross(batch, run_on=True, seen=True, reach=2)
    band = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    assert near["attention_mask"].int().tolist() == [[band]]


def test_where_neighbors_are_hidden_packed_logits_are_those_of_each_conversation(tiny_rows):
    model, ids, batch = tiny_rows
    with torch.no_grad():
        alone = torch.cat([model(torch.tensor([one])).logits[0] for one in ids])
        for run_on, seen, reach in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0), (1, 1, 128)):
            crossed = chat_runs.cross(batch, bool(run_on), bool(seen), reach)
            gap = float((model(**crossed, use_cache=False).logits[0] - alone).abs().max())
            assert (gap < 0.01) == (not seen), (run_on, seen, reach)


def test_every_way_to_ask_changes_the_prompt(tokenizer):
    ways = chat_runs.asked("masks", read_facts("heldout")[:5], tokenizer)
    right, *others = [
        [p if isinstance(p, str) else tokenizer.decode(p) for p in prompts]
        for prompts, _ in ways.values()
    ]
    assert len(others) == 4 and all(
        a != b for other in others for a, b in zip(right, other, strict=True)
    )


def test_a_prompt_holds_every_message_but_the_answer(tokenizer):
    for study, names in (("turns", ("first question", "follow-up")), ("masks", ("as trained",))):
        ways = chat_runs.asked(study, read_facts("heldout")[:3], tokenizer)
        for name in names:
            for ids, row in zip(*ways[name], strict=True):
                text = tokenizer.decode(ids)
                assert all(one["content"] in text for one in row["messages"][:-1])
                assert row["messages"][-1]["content"] not in text
                assert text.count("<|im_start|>") == len(row["messages"])


def test_attacks_are_read_as_a_system_message_by_the_naive_template_alone(tokenizer):
    ways = chat_runs.asked("guard", read_facts("heldout")[:3], tokenizer)
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    naive = tokenizer(ways["forged, naive template"][0][0])["input_ids"]
    assert naive.count(start) == 4
    assert ways["forged, encode"][0][0].count(start) == 2


def test_answers_are_counted_that_begin_with_the_words():
    given = [Answer(text, stopped=True) for text in ("With pleasure. Yes.", "Yes.", "With", "")]
    assert chat_runs.begin_with("With pleasure.", given) == 0.25
    assert chat_runs.begin_with("No.", given) == 0


# --- What is stored ------------------------------------------------------------------------------


def test_the_stored_runs_are_those_of_the_script():
    rows = read_jsonl(chat_runs.RUNS)
    stored = {ChatRun(row["study"], row["variant"], row["seed"]) for row in rows}
    assert stored == set(chat.runs()) and len(rows) == len(stored)
    assert all(len(row["losses"]) in (20, 30) for row in rows)
    for study, (word, _) in chat_runs.BEGINNINGS.items():
        counted = [{k for k in row if k.endswith(f", {word}")} for row in rows]
        assert all(
            (len(c) >= 3) == (row["study"] == study) for c, row in zip(counted, rows, strict=True)
        )


def test_stored_runs_are_read_as_spreads_over_the_seeds(tmp_path):
    from sftlib.data import write_jsonl

    path = tmp_path / "runs.jsonl"
    runs = [ChatRun("turns", "last turn", seed) for seed in (1, 0)] + [ChatRun("system", "never")]
    write_jsonl(
        path,
        [asdict(run) | {"losses": [2.0, run.seed], "loss": 0.5 + run.seed} for run in runs[:2]]
        + [asdict(runs[2]) | {"losses": [1.0, 1.0], "loss": 1.0, "without": 0.25}],
    )
    table = chat_runs.stored(path)
    assert table.loc[("turns", "last turn"), "loss"] == Spread([0.5, 1.5])
    assert table.loc[("system", "never"), "without"] == Spread([0.25])
    assert table["without"].isna().tolist() == [True, False] or table["without"].isna().sum() == 1
    assert chat_runs.losses("turns", "last turn", path) == [[2.0, 2.0], [1, 0]]
