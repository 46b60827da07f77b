"""What `--plan` says of the optimizer and of hours, beside what test_llama3.py asks of it."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

from sftlib.data import read_facts, write_jsonl
from sftlib.finetune import speed
from sftlib.finetune.arguments import check, parse
from sftlib.finetune.plan import duration
from sftlib.models import load
from sftlib.scale.memory import optimizer_bytes

import pytest
import torch

import class_5_llama3 as script
from tests.random_model import random_model

ROOT = Path(__file__).parents[1]
ROWS = [{"messages": row["messages"]} for row in read_facts("sft")[:32]]
EIGHT = 2 * (1 + 4 / 256)  # bytes per parameter: two states of 8 bits, a scale for 256 of them


@pytest.fixture
def plan(tmp_path, capsys):
    """What `--plan` says of the tiny base, and the GiB after a name in it."""
    write_jsonl(tmp_path / "data.jsonl", ROWS)

    def said(*more):
        words = ["--plan", "--data", tmp_path / "data.jsonl", "--output_dir", tmp_path / "run"]
        assert script.main([str(word) for word in (*words, *more)]) == 0
        return capsys.readouterr().out

    return said


def gib(said, name):
    return float(re.search(rf"([\d.]+) GiB  {name}", said)[1])


# --- The optimizer -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "each"),
    [
        ("adamw_torch", 8),
        ("adamw_torch_fused", 8),
        ("adamw_8bit", EIGHT),
        ("adamw_bnb_8bit", EIGHT),
        ("paged_adamw_8bit", EIGHT),
        ("paged_adamw_32bit", 8),
        ("lion_8bit", EIGHT / 2),
        ("lion_32bit", 4),
        ("ademamix_8bit", EIGHT * 3 / 2),
        ("rmsprop_bnb_8bit", EIGHT / 2),
        ("sgd", 0),
        ("adagrad", 4),
    ],
)
def test_an_optimizers_bytes_follow_its_name(name, each):
    assert optimizer_bytes(name, [1_000_000], []) == pytest.approx(1_000_000 * each, rel=1e-3)
    assert (
        optimizer_bytes(name, [100] * 9, [])
        == 900 * ({8: 8, EIGHT: 8, 4: 4, EIGHT / 2: 4, EIGHT * 3 / 2: 12, 0: 0}[each])
    )  # bitsandbytes leaves small tensors in 32 bits
    assert optimizer_bytes(name, [], [10_000]) >= optimizer_bytes(name, [10_000], [])
    assert optimizer_bytes("lomo", [1], []) is None


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit", "lion_8bit", "adamw_torch"])
def test_the_bytes_are_those_that_the_real_optimizer_keeps(name, tokenizer, tmp_path):
    """With the settings of Transformers, which leaves embeddings in 32 bits."""
    from transformers import Trainer, TrainingArguments

    model = random_model(tokenizer, tied=True)
    args = TrainingArguments(str(tmp_path), optim=name, use_cpu=True, report_to="none")
    optimizer = Trainer(model, args).create_optimizer()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    kept = [
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for key, value in state.items()
        if torch.is_tensor(value) and value.numel() > 1 and "qmap" not in key
    ]
    table = model.get_input_embeddings().weight
    sizes = [p.numel() for p in model.parameters() if p is not table]
    assert sum(kept) == pytest.approx(optimizer_bytes(name, sizes, [table.numel()]), rel=0.01)


def test_the_plan_follows_the_optimizer(plan):
    model, _ = load()
    count, table = model.num_parameters(), model.get_input_embeddings().weight.numel()
    usual = gib(plan("--method", "full"), "optimizer")
    assert usual == pytest.approx(8 * count / 2**30, abs=0.01)
    said = plan("--method", "full", "--optim", "adamw_8bit")
    expected = (8 * table + EIGHT * (count - table)) / 2**30
    assert gib(said, "optimizer") == pytest.approx(expected, abs=0.01) and "paged" not in said
    full = ("--method", "full", "--plan_gib", "24")
    said = plan(*full, "--optim", "paged_adamw_8bit")
    paged = "optimizer, paged: moved to main memory if the GPU is full"
    assert gib(said, paged) == pytest.approx(expected, abs=0.01)
    both = gib(plan(*full, "--optim", "adamw_8bit"), "in all")
    assert gib(said, "in all") == pytest.approx(both - expected, abs=0.011)
    assert "paged" not in plan("--method", "full", "--optim", "paged_adamw_8bit")  # on a CPU
    said = plan("--method", "full", "--optim", "lomo")
    assert gib(said, r"optimizer \(counted as AdamW\)") == usual


def test_zero_divides_the_states_and_a_second_optimizer_is_refused(plan):
    offload = ("--deepspeed", "deepspeed_configs/zero2_offload.json", "--method", "full")
    assert "GiB  optimizer, offloaded" in plan(*offload)
    with pytest.raises(ValueError, match="one optimizer, found two: --optim adamw_8bit, and one"):
        plan(*offload, "--optim", "adamw_8bit")
    zero = ("--method", "full", "--plan_gpus", "2", "--deepspeed")
    for stage in (2, 3):
        config = f"deepspeed_configs/zero{stage}.json"
        usual, small = plan(*zero, config), plan(*zero, config, "--optim", "adamw_8bit")
        count = int(re.search(r"parameters +([\d,]+)", usual)[1].replace(",", ""))
        less = gib(usual, "optimizer") - gib(small, "optimizer")  # the float32 copy stays
        assert less == pytest.approx((8 - EIGHT) * count / 2 / 2**30, abs=0.011)


@pytest.mark.parametrize("more", [(), ("--plan_gib", "24")])
def test_copies_are_counted_where_autocast_makes_them(more, plan):
    assert ("copies in bfloat16" in plan(*more)) == bool(more)
    assert "copies" not in plan("--method", "qlora", *more)  # TRL casts the adapter


# --- Hours ---------------------------------------------------------------------------------------


def tokens(said):
    return int(re.search(r"([\d,]+) tokens in", said)[1].replace(",", ""))


def test_hours_follow_from_a_given_speed(plan):
    said = plan("--tokens_per_second", "10", "--num_train_epochs", "3")
    assert f"time            {duration(tokens(said) / 10 / 3600)} of training" in said
    assert "at 10 tokens per second (--tokens_per_second)" in said
    half = plan("--tokens_per_second", "10", "--max_steps", "1")
    assert duration(tokens(half) / 36000) in half and tokens(half) < tokens(said)
    said = plan()
    assert "time            unknown: give --tokens_per_second" in said
    assert "or --output_dir of a short run (--max_steps 20)" in said
    assert len(re.search("(?m)^time .*", said)[0]) <= 100


@pytest.mark.parametrize(
    ("hours", "said"),
    [(30, "30 hours"), (1.26, "1.3 hours"), (0.5, "30 minutes"), (0.01, "0.6 minutes")],
)
def test_a_duration_is_in_hours_or_in_minutes(hours, said):
    assert duration(hours) == said


@pytest.mark.parametrize("value", ["-1", "nan", "inf"])
def test_a_speed_is_a_positive_number(value):
    with pytest.raises(
        ValueError, match="(at least 0|a finite number) for --tokens_per_second, found"
    ):
        check(*parse(["--tokens_per_second", value]))


def test_the_speed_is_that_of_the_steps_without_the_first_and_without_evaluations(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    measured = speed.Speed(parse([])[0])

    def step(seconds, tokens, logs=True):
        measured.on_step_begin(None, None, None)
        now[0] += seconds
        measured.on_step_end(None, None, None)
        if logs:
            measured.on_log(None, None, None, logs={"loss": 1.0, "num_tokens": float(tokens)})
        measured.on_log(None, None, None, logs={"eval_loss": 1.0, "eval_num_tokens": 5.0})
        now[0] += 1000  # an evaluation, a checkpoint

    assert measured.tokens_per_second is None
    step(60, 500)
    assert measured.tokens_per_second is None
    step(2, 1500, logs=False)
    step(3, 2500)
    assert measured.tokens_per_second == 400


@pytest.mark.integration
def test_a_run_measures_its_speed_for_the_next_plan(plan, tmp_path, capsys):
    run = ["--data", tmp_path / "data.jsonl", "--output_dir", tmp_path / "run", "--no_merge"]
    run += ["--max_steps", 4, "--ask", 0, "--per_device_train_batch_size", 4]
    assert script.main([str(word) for word in run]) == 0
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "run/speed.json").read_text())
    rate = found["tokens_per_second"]
    assert 100 < rate < 100_000 and f" s, {rate:,} tokens per second" in said
    said = plan("--num_train_epochs", 9)
    assert f"at {rate:,} tokens per second (measured in {tmp_path}/run, on cpu)" in said
    assert duration(tokens(said) / rate / 3600) in said
    for other in (["--method", "full"], ["--plan_gpus", 2], ["--plan_gib", 24]):
        assert "time            unknown" in plan(*other)
    assert "at 7 tokens per second (--tok" in plan("--tokens_per_second", "7")
    (tmp_path / "run/speed.json").write_text("{")
    assert "time            unknown" in plan()


# --- Advice --------------------------------------------------------------------------------------


CHANGES = [
    *("--method lora", "--method qlora", "--activation_checkpointing true", "--optim adamw_8bit"),
    "--per_device_train_batch_size 1 --gradient_accumulation_steps 16",
]


@pytest.mark.parametrize("method", ["full", "lora"])
def test_each_advice_takes_the_memory_that_it_says(method, plan):
    usual = ("--method", method, "--plan_gib", "0.01")
    said = plan(*usual)
    advised = dict(re.findall(r"([\d.]+) GiB  with (--.*)", said))
    advised = {words: float(size) for size, words in advised.items()}
    assert len(advised) >= 2 and set(advised) <= set(CHANGES)
    sizes = list(advised.values())
    assert sizes == sorted(sizes) and sizes[0] < gib(said, "in all")
    for words, size in advised.items():
        assert gib(plan(*usual, *words.split()), "in all") == pytest.approx(size, abs=0.011)


def test_a_change_that_saves_nothing_is_no_advice(plan):
    words = ("--method", "lora", "--plan_gib", "0.001", "--per_device_train_batch_size", "1")
    usual = plan(*words)
    assert "activations" in usual and "with --activation_checkpointing true" in usual
    said = plan(*words, "--per_device_eval_batch_size", "512")
    assert "evaluation (512 × " in said  # it takes more than training, with all that is kept
    assert "It would take" in said and "activation_checkpointing" not in said
