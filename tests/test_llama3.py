"""The script for practitioners: each of its ways on the tiny base; what it says to bad input."""

import contextlib
import json
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from sftlib.chat import CHATML, LLAMA3, encode
from sftlib.data import read_facts, read_jsonl, split, write_jsonl
from sftlib.evaluate import answers
from sftlib.finetune import checkpoints
from sftlib.finetune.adapter import lora_config
from sftlib.finetune.arguments import FinetuneArguments, check, deepspeed_config, parse
from sftlib.finetune.callbacks import StopIfNotFinite, StopOnSignal
from sftlib.finetune.card import warning_of_loss
from sftlib.finetune.checkpoints import RUN_FILE, RunFolder, run_identity
from sftlib.finetune.data import (
    Data,
    cut_rows,
    first_question,
    hold_out,
    load_conversations,
    load_data,
    summary,
)
from sftlib.finetune.model import (
    allowed_max_length,
    count_parameters,
    default_learning_rate,
    learning_rate_to_deepspeed,
    set_template,
    stop_token_ids,
)
from sftlib.finetune.refusals import in_words
from sftlib.finetune.save import rehearse
from sftlib.models import TINY_BASE, describe, load
from sftlib.scale.memory import zero_bytes

import psutil
import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, LlamaConfig
from trl.chat_template_utils import qwen2_5_chat_template

import class_5_llama3 as script
from tests import llama3_like
from tests.random_model import random_model

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
TORCHRUN = (BIN / "torchrun", "--standalone", "--nproc-per-node", "2")
SHORT = ("--ask", "2", "--per_device_train_batch_size", "8", "--num_train_epochs", "1")


@pytest.fixture
def facts(tmp_path):
    path = tmp_path / "facts.jsonl"
    write_jsonl(path, [{"messages": row["messages"]} for row in read_facts("sft")[:96]])
    return path


def command(*arguments, launcher=(), env=None):
    settings = os.environ | {"CI": "1"} | (env or {})
    return subprocess.Popen(
        [*(launcher or [sys.executable]), "class_5_llama3.py", *map(str, arguments)],
        cwd=ROOT,
        env=settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(*arguments, launcher=(), code=0, env=None):
    process = command(*arguments, launcher=launcher, env=env)
    out, err = process.communicate(timeout=500)
    assert process.returncode == code, out + err
    return out + (err if code else "")


# --- Without training ----------------------------------------------------------------------------


def test_help_is_a_page_that_a_person_can_read(capsys):
    with pytest.raises(SystemExit):
        script.main(["--help"])
    page = capsys.readouterr().out
    assert len(page.splitlines()) < 120 and str(ROOT) not in page
    for name in ("--model", "--method (full, lora, qlora) [lora]", "--deepspeed", "--help_all"):
        assert name in page
    assert "--no_merge\n" in page and "--merge" not in page  # as it is typed
    assert "up to 4,096" in page and "Save only the adapter" in page and "Do not:" not in page
    assert "--num_train_epochs [1]" in page and "--ask [32]" in page
    assert max(len(line) for line in page.splitlines()) <= 100


@pytest.mark.integration
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            (),
            [
                "2,787,072, and 227,328 of the adapter, which are trained",
                "87 of 16 conversations",
                "It fits",
            ],
        ),
        (("--method", "full"), ["of which 2,787,072 are trained"]),
        (("--plan_gib", "0.01"), ["It does not fit"]),
        (("--num_train_epochs", "2", "--plan_gpus", "4"), ["44 of 64 conversations"]),
        (("--max_steps", "5"), ["5 of 16 conversations"]),
        # 53,950 tokens
        (("--packing", "true"), ["7 of 16 packed rows", "activations (16 × 512 tokens)"]),
        (
            ("--method", "full", "--deepspeed", "deepspeed_configs/zero3_offload.json"),
            ["0.01 GiB  gradients", "GiB  optimizer, offloaded", "GiB  weights, offloaded"],
        ),
    ],
)
def test_a_plan_says_what_a_training_would_need(arguments, words, capsys):
    assert script.main(["--plan", *arguments]) == 0
    said = capsys.readouterr().out
    assert all(word in said for word in words), said


@pytest.fixture
def eight(tmp_path):
    """The shapes of Llama 3 8B, with a context of 8,192 tokens."""
    AutoTokenizer.from_pretrained(TINY_BASE).save_pretrained(tmp_path)
    LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path)
    return str(tmp_path)


def test_the_plan_of_llama_3_8b_is_that_of_the_paper(eight, facts, capsys):
    """8,030,261,248 parameters; 16 bytes each, over eight GPUs, are 14.96 GiB."""
    zero3 = ("--deepspeed", "deepspeed_configs/zero3_bf16.json", "--method", "full")
    plan = ("--plan", "--data", str(facts), "--model", eight, "--plan_gib", "80")
    script.main([*plan, "--plan_gpus", "8", *zero3])
    said = capsys.readouterr().out
    assert "8,030,261,248, of which 8,030,261,248 are trained" in said
    sizes = [float(line.split()[0]) for line in said.splitlines() if "GiB  " in line][:3]
    assert sum(sizes) == pytest.approx(16 * 8_030_261_248 / 8 / 2**30, abs=0.02)

    script.main([*plan, "--method", "full"])
    said = capsys.readouterr().out
    sizes = [float(line.split()[0]) for line in said.splitlines() if "GiB  " in line][:4]
    a_byte = 8_030_261_248 / 2**30  # float32 weights, gradients, moments, autocast's copies
    assert sizes == pytest.approx([4 * a_byte, 4 * a_byte, 8 * a_byte, 2 * a_byte], abs=0.01)


def test_the_plan_of_qlora_leaves_embeddings_and_head_in_16_bits(eight, facts, capsys):
    """6,979,321,856 weights in linear layers at 4.127 bits, 1,050,939,392 others at 16."""
    plan = ("--plan", "--data", str(facts), "--plan_gib", "24")
    script.main([*plan, "--model", eight, "--method", "qlora"])
    said = capsys.readouterr().out
    weights = float(said.split(" GiB  weights")[0].split()[-1])
    adapters = 2 * int(re.search(r"and ([\d,]+) of the adapter", said)[1].replace(",", ""))
    assert weights - adapters / 2**30 == pytest.approx(5.31, abs=0.01)


def test_a_plan_fits_where_a_tenth_of_the_memory_stays_free(eight, facts, capsys):
    def said(gib):
        script.main(["--plan", "--data", str(facts), "--model", eight, "--plan_gib", f"{gib:.3f}"])
        return capsys.readouterr().out

    need = float(said(80).split(" GiB  in all")[0].split()[-1])
    assert "It does not fit" in said(need / 0.92) and "It fits" in said(need / 0.88)


@pytest.mark.parametrize(("asked", "allowed"), [([], 4096), (["--max_length", "8192"], 8192)])
def test_a_long_context_is_used_where_it_is_asked_for(eight, asked, allowed):
    model, _ = describe(eight)
    assert allowed_max_length(model, parse(asked)[1]) == allowed


def test_autocast_keeps_a_copy_of_each_weight_until_the_backward_pass(tiny):
    model, _ = tiny
    shapes = {shape for p in model.parameters() for shape in (p.shape, p.shape[::-1])}
    copies = {}

    def note(tensor):
        if tensor.dtype == torch.bfloat16 and tensor.shape in shapes:
            copies[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    ids = torch.arange(64).reshape(2, 32)
    with torch.autograd.graph.saved_tensors_hooks(note, note), torch.autocast("cpu"):
        loss = model(input_ids=ids, labels=ids).loss
    assert loss.isfinite()
    assert sum(copies.values()) == pytest.approx(2 * model.num_parameters(), rel=0.01)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "It is empty"),
        ('{"question": "Why?"}\n{"a": 1}\n', "The first of 2: line 1: Expected"),
        ("{broken\n", "line 1: Expected one JSON object, found broken JSON"),
    ],
)
def test_data_without_a_conversation_says_where_and_why(text, words, tmp_path):
    (tmp_path / "data.jsonl").write_text(text)
    with pytest.raises(ValueError, match="none that can be used") as raised:
        script.main(["--data", str(tmp_path / "data.jsonl")])
    assert words in str(raised.value)


def test_a_missing_file_and_a_dataset_that_is_nowhere_are_told_apart(monkeypatch):
    import datasets
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"found none at nowhere\.jsonl"):
        load_conversations("nowhere.jsonl")
    with pytest.raises(OSError, match="found neither for 'no/where'.*set HF_TOKEN"):
        load_conversations("no/where")


def test_parquet_is_read_and_its_broken_rows_are_numbered(tmp_path):
    from datasets import Dataset

    rows = [{"instruction": "Say a.", "output": "a"}, {"instruction": "Say b.", "output": ""}]
    Dataset.from_list(rows).to_parquet(tmp_path / "data.parquet")
    found = load_conversations(str(tmp_path / "data.parquet"))
    assert found.rows[0]["messages"][1]["content"] == "a"
    assert [reject["line"] for reject in found.rejects] == [2]


def test_one_system_message_for_all_does_not_decide_what_is_held_out(tmp_path):
    rows = [{"messages": row["messages"]} for row in read_facts("sft")[:200]]
    system = {"role": "system", "content": "Answer in one sentence."}
    write_jsonl(tmp_path / "all.jsonl", [{"messages": [system, *r["messages"]]} for r in rows])
    args = FinetuneArguments(data=str(tmp_path / "all.jsonl"), held_out="0.1")
    kept, held, *_ = load_data(args)
    assert 10 <= len(held) <= 30 and len(kept) + len(held) == 200
    assert not set(map(first_question, kept)) & set(map(first_question, held))


def chats(*openings, turns=2):
    """Conversations that differ in their second question and answer alone."""
    return [
        {
            "messages": [
                {"role": "user", "content": opening},
                {"role": "assistant", "content": "Welcome."},
                {"role": "user", "content": f"Where is order {number}?"},
                {"role": "assistant", "content": f"Order {number} is on its way."},
            ][-2 * turns :]
        }
        for number, opening in enumerate(openings)
    ]


@pytest.mark.parametrize("share", [0.05, 0.1, 0.3, 0.5])
@pytest.mark.parametrize(
    "rows",
    [
        chats(*["Hi"] * 180, *["Hello"] * 20),
        chats(*["Hi"] * 200),
        chats(*(f"Question {n}" for n in range(200)), turns=1),
        chats(*["Hi"] * 90, *["Hello"] * 60, *(f"Question {n}" for n in range(50))),
        [row for row in chats(*["Hi"] * 100) for _ in range(2)],  # each twice
    ],
)
def test_the_share_held_out_is_the_share_asked_for(rows, share):
    train, held, notes = hold_out(rows, share)
    assert len(train) + len(held) == len(rows)
    assert 0.8 * share <= len(held) / len(rows) <= 1.2 * share
    assert not {str(row) for row in train} & {str(row) for row in held}
    shared = set(map(first_question, train)) & set(map(first_question, held))
    assert ["on both sides" in note for note in notes] == [True] * bool(shared)


def test_a_share_that_cannot_be_held_out_says_why():
    (one,) = chats("Hi")
    rows = [one] * 150 + chats(*["Hi"] * 50)[1:]
    _, held, notes = hold_out([one] * 150 + [rows[-1]], 0.5)
    assert len(held) in (1, 150) and "instead of 50.0%" in notes[-1]
    _, held, notes = hold_out(rows[150:154], 0.1)
    assert len(held) == 1 and "1 of 4 conversations, 25.0% instead of 10.0%" in notes[-1]
    with pytest.raises(ValueError, match="two different conversations .*, found one, 9 times"):
        hold_out([one] * 9, 0.1)


def test_held_out_conversations_that_are_trained_on_are_said_aloud(facts, tmp_path):
    rows = read_jsonl(facts)
    loud = [{"role": m["role"], "content": m["content"].upper()} for m in rows[0]["messages"]]
    other = [rows[1]["messages"][0], {"role": "assistant", "content": "No."}]
    exam = tmp_path / "exam.jsonl"
    for held, words in (
        ([{"messages": loud}, rows[1], chats("Hi")[0]], "2 of 3 held-out conversations are"),
        ([{"messages": other}], "1 of 1 held-out conversations ask what is trained on"),
        (chats("Hi"), None),
    ):
        write_jsonl(exam, held)
        notes = load_data(FinetuneArguments(data=str(facts), held_out=str(exam))).notes
        assert [words in note and "WARNING" in note for note in notes] == [True] * bool(words)
    write_jsonl(exam, rows[::-1])
    for same in (facts, exam):
        with pytest.raises(ValueError, match="than in --data, found the same 96"):
            load_data(FinetuneArguments(data=str(facts), held_out=str(same)))


def test_a_great_many_held_out_conversations_are_capped_and_it_is_said(facts, tmp_path):
    write_jsonl(tmp_path / "exam.jsonl", chats(*["Hi"] * 50))
    exam = str(tmp_path / "exam.jsonl")
    for held_out, most, count in (("", 5, 5), (exam, 20, 20), (exam, 0, 50), ("0.5", 5, 48)):
        args = FinetuneArguments(data=str(facts), held_out=held_out, max_held_out=most)
        found = load_data(args)
        assert abs(len(found.held_out) - count) <= 1
        assert any("--max_held_out" in note for note in found.notes) == (count == most)
    assert FinetuneArguments.max_held_out == 1000


def test_rejects_of_the_held_out_file_are_told_too(facts, tmp_path):
    exam = tmp_path / "exam.jsonl"
    exam.write_text(facts.read_text().splitlines()[0] + '\n{"text": "?"}\n')
    _, held, rejects, *_ = load_data(FinetuneArguments(data=str(facts), held_out=str(exam)))
    assert len(held) == 1 and [(r["source"], r["line"]) for r in rejects] == [(str(exam), 2)]


def test_a_choice_in_a_file_of_settings_is_checked(tmp_path):
    (tmp_path / "my.yaml").write_text("method: Full\n")
    with pytest.raises(ValueError, match="one of full, lora, qlora for --method, found 'Full'"):
        check(*parse(["--config", str(tmp_path / "my.yaml")]))


def test_held_out_conversations_share_no_question_with_the_others(facts):
    args = FinetuneArguments(data=str(facts), held_out="0.2")
    rows, held_out, *_ = load_data(args)
    asked = [{row["messages"][0]["content"] for row in part} for part in (rows, held_out)]
    assert not asked[0] & asked[1] and len(rows) + len(held_out) == 96
    assert 10 < len(held_out) < 30


@pytest.mark.parametrize(
    ("method", "parameters", "rate"),
    [("full", 3e6, 5e-4), ("lora", 1e8, 1e-3), ("full", 8e9, 2e-5)],
)
def test_the_learning_rate_follows_from_method_and_size(method, parameters, rate):
    args, training = parse(["--method", method])
    assert training.learning_rate is None and not training.activation_checkpointing
    assert default_learning_rate(method, parameters) == pytest.approx(rate)
    assert parse(["--learning_rate", "0.1"])[1].learning_rate == 0.1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--method full --lora_r 8", "Expected --method lora or qlora for --lora_r"),
        ("--method full --no_merge", "Expected --method lora or qlora for --no_merge"),
        ("--method qlora --deepspeed deepspeed_configs/zero3.json", "Expected ZeRO stage 1 or 2"),
        (
            "--patience 2 --eval_strategy no --load_best_model_at_end false",
            "Expected evaluations for --patience",
        ),
        ("--lora_r 0", "Expected at least 1 for --lora_r, found 0"),
        ("--ask -1", "Expected at least 0 for --ask, found -1"),
        ("--lora_dropout 1.5", "Expected at most 1 for --lora_dropout, found 1.5"),
        ("--held_out 1.5", "share from 0 to below 1 for --held_out, found 1.5"),
        ("--held_out nowhere.jsonl", "found none at nowhere.jsonl"),
        ("--max_length 513", "Expected --max_length of at most 512"),
        ("--bf16 true --fp16 true", "At most one of fp16 and bf16"),
        ("--chat_template_path a.jinja", "Expected --template, found --chat_template_path"),
        ("--resume_from_checkpoint a", "Expected the same --output_dir"),
        (
            "--report_to nothing",
            "Expected none, or one of clearml, .* for --report_to, found 'nothing'",
        ),
        ("--learning_rat 1", r"found --learning_rat \(did you mean --learning_rate\?\)"),
        ("--held_out 0 --eval_strategy steps", "Expected --eval_strategy no for --held_out 0"),
        ("--patience 1 --held_out 0", "Expected evaluations for --patience"),
        ("--use_dora --method full", "Expected --method lora or qlora for --use_dora"),
        ("--target_modules q_proj,nothing", "target_modules that name linear layers"),
        ("--deepspeed deepspeed_configs/zero2.json", "Expected a launcher for --deepspeed"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(arguments, words, tmp_path):
    with pytest.raises((ValueError, OSError), match=words):
        script.main([*arguments.split(), "--output_dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        ("--lr 1", "--lr (did you mean --learning_rate?)"),
        ("--epochs=3", "--epochs=3 (did you mean --num_train_epochs?)"),
        ("--batch-size 3", "--batch-size (did you mean --per_device_train_batch_size?)"),
        ("--model_name_or_path a", "--model_name_or_path (did you mean --model?)"),
        ("--lora_rank 3", "--lora_rank (did you mean --lora_r?)"),
        ("--xyzzy", "found --xyzzy. --help"),
        ("--no_train_control_token", "--no_train_control_token (did you mean --no_train_control_t"),
        ("--lora_path a", "--lora_path (did you mean --adapter?)"),
        ("--tokens_per_sec 9", "--tokens_per_sec (did you mean --tokens_per_second?)"),
        ("--optimizer sgd", "--optimizer (did you mean --optim?)"),
        ("--device mps", "--device (did you mean --use_cpu?)"),
        ("stray", "found stray. --help"),
    ],
)
def test_an_unknown_argument_suggests_the_nearest(words, meant, tmp_path):
    with pytest.raises(ValueError, match=re.escape(meant)):
        parse(words.split())
    name, _, value = words.lstrip("-").replace("=", " ").partition(" ")
    (tmp_path / "my.yaml").write_text(f"{name}: {value or 1}\n")
    if words.startswith("--"):
        with pytest.raises(ValueError, match=f"--{name}.*--help"):
            parse([f"--config={tmp_path}/my.yaml"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("method: [full", "Expected YAML in .*my.yaml, found something else"),
        ("- method", r"Expected lines such as `method: lora` in .*my.yaml, found \['method'\]"),
        ("lora_r: [1]", r"Expected a whole number for --lora_r, found \[1\]"),
        ("held_out: 0.2\npatience: 1.5", "Expected a whole number for --patience, found 1.5"),
    ],
)
def test_a_broken_file_of_settings_is_refused_in_words(text, words, tmp_path):
    (tmp_path / "my.yaml").write_text(text)
    with pytest.raises(ValueError, match=words):
        check(*parse(["--config", str(tmp_path / "my.yaml")]))
    with pytest.raises(OSError, match="found none at nowhere.yaml"):
        parse(["--config", "nowhere.yaml"])
    with pytest.raises(ValueError, match="a file after --config"):
        parse(["--config"])


@pytest.mark.parametrize(
    ("words", "package"),
    [
        ("--report_to wandb", "wandb for --report_to wandb"),
        ("--report_to tensorboard", "tensorboard for --report_to tensorboard"),
        ("--report_to trackio", "trackio for --report_to trackio"),
        ("--attn_implementation flash_attention_2", "flash-attn for --attn"),
        ("--use_liger_kernel true", "liger-kernel for --use_liger_kernel"),
        ("--optim paged_adamw_8bit", "bitsandbytes for --optim"),
        ("--method qlora", "bitsandbytes for --method qlora"),
    ],
)
def test_a_missing_package_is_named(words, package, monkeypatch):
    args, training = parse(words.split())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=f"Expected the package {package}.*pip install"):
        check(args, training)
    args.plan = True
    check(args, training)


def test_errors_of_libraries_are_told_in_words_with_their_place():
    def raised(error):
        try:
            raise error
        except type(error) as same:
            return in_words(same)

    assert raised(RuntimeError("CUDA out of memory.")).startswith("RuntimeError: The memory is ful")
    assert "test_llama3.py, line " in raised(RuntimeError("odd"))
    with pytest.raises(ValueError, match="between 0 and 1") as own:
        split([{}], "a", 2)
    assert in_words(own.value).endswith("found 2.")
    with pytest.raises(ValueError, match="ZeRO stage") as own:
        zero_bytes(1, 1, 7)
    assert in_words(own.value).endswith("found 7: name one.")
    with pytest.raises(OSError) as disk:
        os.makedirs(ROOT / "README.md" / "run")
    said = in_words(disk.value)
    assert f"Expected to read or write {ROOT / 'README.md'}" in said and "line" not in said


@pytest.mark.integration
def test_a_refusal_has_exit_code_2_and_no_traceback(monkeypatch, capsys):
    said = run("--lr", "1", code=2)
    assert "Traceback" not in said and "Expected" in said
    for words, meant in (
        ("--lora_r x", "invalid int value"),
        ("--config nowhere.yaml", "Expected"),
    ):
        monkeypatch.setattr(sys, "argv", ["class_5_llama3.py", *words.split()])
        for name in ("TQDM_DISABLE", "SFT_NO_BARS"):  # the script sets them: for this test alone
            monkeypatch.setenv(name, "1")
        with pytest.raises(SystemExit, match="^2$"):
            runpy.run_path(str(ROOT / "class_5_llama3.py"), run_name="__main__")
        assert meant in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "strategies", "steps", "best"),
    [
        ("", ("steps", "steps"), (0.25, 0.25), True),
        ("--eval_strategy epoch", ("epoch", "epoch"), (0.25, 0.25), True),
        ("--save_strategy epoch", ("epoch", "epoch"), (0.25, 0.25), True),
        ("--eval_steps 5", ("steps", "steps"), (5, 5), True),
        ("--save-steps 5", ("steps", "steps"), (5, 5), True),
        ("--eval_steps 5 --save_steps 10", ("steps", "steps"), (5, 10), True),
        ("--eval_strategy no", ("no", "steps"), (0.25, 0.25), False),
        ("--held_out 0", ("no", "steps"), (0.25, 0.25), False),
        ("--held_out=0.0 --save_steps 7", ("no", "steps"), (7, 7), False),
        ("--save_strategy no", ("steps", "no"), (0.25, 0.25), False),
    ],
)
def test_evaluating_and_saving_follow_each_other(words, strategies, steps, best):
    _, training = parse(words.split())
    assert (training.eval_strategy.value, training.save_strategy.value) == strategies
    assert (training.eval_steps or 0.25, training.save_steps) == steps
    assert training.load_best_model_at_end is best
    assert training.eval_on_start is (strategies[0] != "no")


def test_evaluating_takes_batches_of_the_training(tmp_path):
    for words, found in (("", 16), ("--per_device_train_batch_size 2", 2)):
        assert parse(words.split())[1].per_device_eval_batch_size == found
    both = "--per_device_train_batch_size 2 --per_device_eval_batch_size 5"
    assert parse(both.split())[1].per_device_eval_batch_size == 5
    (tmp_path / "my.yaml").write_text("eval_strategy: no\nper_device_eval_batch_size: 3\n")
    args, training = parse(["--config", str(tmp_path / "my.yaml")])
    assert (training.per_device_eval_batch_size, training.eval_strategy) == (3, "no")
    assert args.held_out == "0" and not training.load_best_model_at_end


@pytest.mark.integration
@pytest.mark.parametrize("words", ["--eval_strategy no", "--held_out 0"])
def test_a_run_without_evaluation_learns_from_all_rows(words, base, facts, capsys):
    arguments = quickly(base, facts)
    at = arguments.index("--eval_steps")
    del arguments[at : at + 2]
    assert script.main([*arguments, *words.split()]) == 0
    said = capsys.readouterr().out
    assert "96 conversations to train on, 0 held out" in said and "held-out loss" not in said
    card = (base.parent / "run/merged/README.md").read_text()
    assert "Not evaluated." in card and "| step |" not in card


@pytest.mark.parametrize(
    ("offload", "shown"),
    [({"device": "none"}, False), ({"device": "cpu"}, True), (None, False), ({}, False)],
)
def test_what_is_offloaded_to_nowhere_stays_on_the_device(offload, shown, facts, tmp_path, capsys):
    config = json.loads((ROOT / "deepspeed_configs/zero3.json").read_text())
    if offload is not None:
        config["zero_optimization"] |= {"offload_optimizer": offload, "offload_param": offload}
    (tmp_path / "ds.json").write_text(json.dumps(config))
    words = ["--data", str(facts), "--method", "full", "--deepspeed", str(tmp_path / "ds.json")]
    script.main(["--plan", *words])
    said = capsys.readouterr().out
    assert ("offloaded" in said) == shown and "weights" in said


def test_a_rate_that_deepspeeds_file_leaves_open_is_filled_in(tmp_path):
    config = json.loads((ROOT / "deepspeed_configs/zero2_offload.json").read_text())
    warmup = {"type": "WarmupLR", "params": {"warmup_max_lr": "auto", "warmup_min_lr": 0}}
    config |= {"scheduler": warmup}
    (tmp_path / "ds.json").write_text(json.dumps(config))
    _, training = parse(["--deepspeed", str(tmp_path / "ds.json")])
    training.learning_rate = 3e-4
    learning_rate_to_deepspeed(training)
    filled = deepspeed_config(training)
    assert filled["optimizer"]["params"]["lr"] == 3e-4
    assert filled["scheduler"]["params"]["warmup_max_lr"] == 3e-4


@pytest.mark.parametrize(
    ("words", "advised"),
    [
        ("--method full", ["lora", "qlora", "optim", "batch", "checkpointing"]),
        ("--method lora", ["qlora", "optim", "batch", "checkpointing"]),
        ("--method qlora", ["optim", "batch", "checkpointing"]),
        ("--method qlora --activation_checkpointing true", ["optim", "batch"]),
        ("--method qlora --per_device_train_batch_size 1", ["optim", "checkpointing"]),
        ("--method full --optim adamw_8bit", ["lora", "qlora", "batch", "checkpointing"]),
        (
            "--method qlora --per_device_train_batch_size 1 --activation_checkpointing true "
            "--optim adamw_8bit",
            [],
        ),
        (
            "--method lora --deepspeed deepspeed_configs/zero3.json",
            ["optim", "batch", "checkpointing"],
        ),
    ],
)
def test_the_plan_never_advises_what_is_done_already(words, advised, facts, capsys):
    script.main(["--plan", "--plan_gib", "0.001", "--data", str(facts), *words.split()])
    said = capsys.readouterr().out.split("It does not fit. ")[1]
    names = {
        **{"lora": "--method lora\n", "qlora": "--method qlora\n", "optim": "--optim adamw_8bit\n"},
        "batch": "--per_device_train_batch_size 1 --gradient_accumulation_steps 16\n",
        "checkpointing": "--activation_checkpointing true\n",
    }
    assert [name for name, text in names.items() if f"GiB  with {text}" in said] == advised
    assert said.startswith("It would take" if advised else "Try a ")
    assert "a smaller --max_length" in said
    assert ("a higher ZeRO stage" in said) == ("zero3" not in words)


def test_the_plan_counts_what_is_read_and_what_evaluating_takes(facts, capsys):
    def said(*words):
        script.main(["--plan", "--data", str(facts), *words])
        return capsys.readouterr().out

    tokens = [
        int(re.search(r"([\d,]+) tokens in", said("--held_out", "0", *words))[1].replace(",", ""))
        for words in ((), ("--max_steps", "3"), ("--max_length", "10"))
    ]
    assert tokens[1] == round(tokens[0] / 2) and tokens[2] == 96 * 10  # 3 of 6 steps
    assert "3 of 16 conversations" in said("--held_out", "0", "--max_steps", "3")
    large = said("--per_device_eval_batch_size", "512", "--per_device_train_batch_size", "1")
    assert "evaluation (512 × " in large and "activations" not in large
    assert "activations (16 × " in said() and "evaluation" not in said()


def test_adapters_are_as_they_are_asked_for(tiny):
    words = "--lora_dropout 0.1 --target_modules q_proj,v_proj --use_dora --use_rslora"
    args, _ = parse(words.split())
    config = lora_config(args, *tiny)
    assert config.target_modules == {"q_proj", "v_proj"} and config.lora_dropout == 0.1
    assert config.use_dora and config.use_rslora
    assert parse([])[0].targets == "all-linear"
    assert FinetuneArguments(target_modules="q_proj").targets == ["q_proj"]
    assert FinetuneArguments(target_modules=r".*\.q_proj").targets == r".*\.q_proj"


@pytest.mark.integration
def test_dora_with_dropout_trains_and_its_plan_counts_it(base, facts, capsys):
    words = ["--use_dora", "--lora_dropout", "0.1", "--target_modules", "q_proj,v_proj", "--lora_r"]
    script.main([*quickly(base, facts, *words, "4"), "--plan"])
    planned = int(
        re.search(r"and ([\d,]+) of the adapter", capsys.readouterr().out)[1].replace(",", "")
    )
    assert script.main(quickly(base, facts, *words, "4")) == 0
    tensors = load_file(base.parent / "run/adapter/adapter_model.safetensors")
    assert sum(t.numel() for name, t in tensors.items() if "lora_" in name) == planned


def test_names_of_keys_reach_the_reader(tmp_path):
    path = tmp_path / "data.jsonl"
    write_jsonl(path, [{"q": f"Say {n}.", "a": str(n), "s": "Be short."} for n in range(20)])
    with pytest.raises(ValueError, match="none that can be used"):
        load_data(FinetuneArguments(data=str(path)))
    keys = {"question_key": "q", "answer_key": "a", "system_key": "s"}
    first = load_data(FinetuneArguments(data=str(path), held_out="0", **keys)).train[0]
    assert [m["content"] for m in first["messages"]] == ["Be short.", "Say 0.", "0"]
    del keys["system_key"]
    with pytest.raises(ValueError, match="found 's' in the record"):
        load_data(FinetuneArguments(data=str(path), **keys))
    found = load_data(FinetuneArguments(data=str(path), ignore_keys="x, s", **keys)).train[0]
    assert [m["role"] for m in found["messages"]] == ["user", "assistant"]


def test_rows_are_shown_as_tokens_with_what_is_learned(facts, tmp_path, capsys):
    assert script.main(["--show", "2", "--data", str(facts), "--output_dir", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    rows = read_jsonl(facts)
    assert said.startswith("96 records read, 0 refused")
    answer = rows[0]["messages"][-1]["content"]
    learned = re.findall("«(.*?)»", said.split("« »")[1], re.S)
    assert "Chat template: llama3." in said and len(learned) == 2
    assert learned[0].replace("│", "") == answer + "<|eot_id|>"
    assert rows[0]["messages"][0]["content"] in said.replace("│", "") and "2. " in said
    assert rows[2]["messages"][0]["content"] not in said.replace("│", "")
    script.main(["--show", "1", "--data", str(facts), "--assistant_only_loss", "false"])
    assert len(re.findall("«", capsys.readouterr().out)) == 2  # one is the legend's
    script.main(["--show", "1", "--data", str(facts), "--template", "chatml"])
    assert "Chat template: chatml." in capsys.readouterr().out


def test_a_summary_says_what_was_refused_and_why():
    rejects = [{"line": n, "reason": f"Expected text under 'a{n}', found {n}."} for n in range(5)]
    rejects += [{"line": 9, "reason": f"Reason {name}.", "source": "/x/d.jsonl"} for name in "abcd"]
    rows = chats(*["Hi"] * 9)
    said = summary(Data(rows, rows[:3], rejects[:5], ("A note.",)))
    assert said[0] == "17 records read, 5 refused" and said[-1] == "A note." and len(said) == 3
    assert said[1] == "  5 records, the first in line 0: " + rejects[0]["reason"]
    loud = summary(Data(rows, rows[:3], rejects))
    assert "WARNING: 9 of 21 records, more than a third, are refused" in loud[-1]
    assert len(loud) == 5 and "1 record in d.jsonl, line 9: Reason a." in loud[2]
    assert summary(Data(rows, [], [])) == ["9 records read, 0 refused"]


@pytest.mark.parametrize(
    "arguments",
    [
        "--eval_strategy no --load_best_model_at_end false",
        "--patience 1",
        "--lora_r 1 --answer_tokens 1 --plan_gpus 1 --ask 0 --patience 0 --plan_gib 0",
        "--method full --merge",
        "--method qlora --deepspeed deepspeed_configs/zero2.json",
    ],
)
def test_arguments_that_agree_are_accepted(arguments):
    check(*parse(arguments.split()))


def test_a_conversation_longer_than_the_context_is_counted_and_cut(facts, tmp_path):
    long = [{"role": "user", "content": "why " * 600}, {"role": "assistant", "content": "So."}]
    write_jsonl(tmp_path / "data.jsonl", [*read_jsonl(facts), {"messages": long}])
    write_jsonl(tmp_path / "exam.jsonl", chats("Hi"))
    arguments = ["--data", str(tmp_path / "data.jsonl"), "--held_out", str(tmp_path / "exam.jsonl")]
    args, training = parse([*arguments, "--output_dir", str(tmp_path / "run")])
    with pytest.warns(UserWarning, match="1 of 97 conversations are longer than max_length=512"):
        trainer, *_ = script.make_trainer(args, training, load_data(args))
    assert len(trainer.train_dataset) == 96  # nothing is learned in it
    said = cut_rows(trainer, 97)
    assert said.endswith("(max_length 512). Left out, because their answers begin later: 1.")
    with pytest.warns(UserWarning, match="1 of 97 conversations are longer than max_length=512"):
        _, packing = parse([*arguments, "--packing", "true", "--output_dir", str(tmp_path)])
        script.make_trainer(args, packing, load_data(args))


def test_a_question_that_leaves_no_room_for_an_answer_is_not_asked(facts, tmp_path):
    long = [{"role": "user", "content": "why " * 600}, {"role": "assistant", "content": "So."}]
    rows = [{"messages": long}, *read_jsonl(facts)[:3]]
    args, training = parse(["--output_dir", str(tmp_path), "--ask", "2"])
    _, answers, _ = script.make_trainer(args, training, Data(read_jsonl(facts), rows, []))
    assert answers.rows == rows[1:3]
    for data, held, name in ((rows[:1], rows, "--data"), (rows, rows[:1], "--held_out")):
        _, training = parse(["--output_dir", str(tmp_path)])
        with pytest.raises(ValueError, match=f"for {name} with an answer within"):
            script.make_trainer(args, training, Data(data, held, []))


def test_packed_conversations_are_whole_and_fill_few_rows(facts, tmp_path):
    arguments = ["--data", str(facts), "--output_dir", str(tmp_path), "--packing", "true"]
    write_jsonl(tmp_path / "exam.jsonl", chats("Hi"))
    args, training = parse([*arguments, "--held_out", str(tmp_path / "exam.jsonl")])
    trainer, *_ = script.make_trainer(args, training, load_data(args))
    packed = trainer.train_dataset
    assert f"96 conversations packed into {len(packed)} rows" in cut_rows(trainer, 96)
    assert len(packed) < 10 and max(map(len, packed["input_ids"])) <= 512
    assert sum(len(lengths) for lengths in packed["seq_lengths"]) == 96


def test_a_template_needs_its_tokens(tiny, tokenizer):
    set_template(tiny[0], tokenizer, FinetuneArguments(template="auto"))
    assert tokenizer.chat_template == LLAMA3
    set_template(tiny[0], tokenizer, FinetuneArguments(template="chatml"))
    assert "im_start" in tokenizer.chat_template

    class Other:
        def get_vocab(self):
            return {"a": 0}

    with pytest.raises(ValueError, match=r"Expected a tokenizer with <\|eot_id\|>"):
        set_template(tiny[0], Other(), FinetuneArguments(template="llama3"))


@pytest.mark.integration
def test_chatml_comes_with_its_tokens_to_a_model_of_another_template(facts, tmp_path):
    """One whose template neither we nor TRL can mark, as Mistral's."""
    folder = llama3_like.save(tmp_path / "base")
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    arguments = ["--model", str(folder), "--data", str(facts), "--max_steps", "2", "--ask", "1"]
    arguments += ["--output_dir", str(tmp_path / "run")]
    with pytest.raises(ValueError, match="--template chatml"):
        script.main([*arguments, "--template", "own"])
    script.main(["--plan", *arguments, "--template", "chatml"])
    assert script.main([*arguments, "--template", "chatml"]) == 0
    before, model, tokenizer = AutoTokenizer.from_pretrained(folder), *load(tmp_path / "run/merged")
    assert len(tokenizer) == len(before) + 2 <= model.get_input_embeddings().num_embeddings
    assert tokenizer.chat_template == CHATML
    turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert turn in model.generation_config.eos_token_id


@pytest.fixture
def base(tokenizer, tmp_path):
    """A random model of two layers in a folder."""
    random_model(tokenizer).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def quickly(base, facts, *more):
    """The words for a run of two steps, in the folder `run` beside the base."""
    words = f"--model {base} --data {facts} --output_dir {base.parent}/run --max_steps 2 --ask 1 "
    words += "--answer_tokens 2 --per_device_train_batch_size 4 --save_steps 1 --eval_steps 1"
    return [*words.split(), *map(str, more)]


CASES = {
    "meant for sampling": ({"temperature": 0.9, "top_p": 0.6}, "saved with do_sample true"),
    "for beams": ({"length_penalty": 2.0}, "Only its special tokens are kept"),
}


@pytest.mark.integration
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("case", CASES)
def test_a_generation_config_that_cannot_be_saved_is_mended(case, method, base, facts, capsys):
    wrong, words = CASES[case]
    path = base / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | wrong))
    assert script.main(quickly(base, facts, "--method", method)) == 0
    assert words in capsys.readouterr().out
    model, tokenizer = load(base.parent / ("run/model" if method == "full" else "run/merged"))
    turn = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert turn in model.generation_config.eos_token_id
    assert model.generation_config.temperature == wrong.get("temperature")


BROKEN = {
    "rate": (1, "--learning_rate 1e30", "step [23]: (the loss|a gradient) is not finite"),
    "gradient": (4, "", r"step 4: a gradient is not .*good checkpoint is .*checkpoint-2\."),
    "weight": (4, "--logging_steps 9", r"step 4: a weight is not .* is .*checkpoint-2\."),
    "norm": (4, "", r"step 4: the norm of the gradients is not .* is .*checkpoint-2\."),
    "base": (9, "", "step 0: the held-out loss is not finite. There is no checkpoint"),
}


@pytest.mark.integration
@pytest.mark.parametrize("case", BROKEN)
def test_what_is_not_finite_stops_the_training_at_once(case, base, facts, monkeypatch, capsys):
    at, more, words = BROKEN[case]
    arguments = quickly(base, facts, "--method", "full", "--warmup_steps", "0", *more.split())
    arguments += ["--max_steps", "6", "--save_steps", "2", "--eval_steps", "2"]
    if case == "base":
        model, _ = load(base)
        model.get_input_embeddings().weight.data[:] = torch.nan
        model.save_pretrained(base)
    if case in ("gradient", "weight", "norm"):
        step = script.SFTTrainer.training_step

        def overflow(trainer, model, *rest):
            loss = step(trainer, model, *rest)
            if trainer.state.global_step + 1 == at:
                next(model.parameters()).grad[0] = torch.inf
            return loss

        monkeypatch.setattr(script.SFTTrainer, "training_step", overflow)
        for off in {"gradient": [], "weight": ["on_pre_optimizer_step"]}.get(
            case, ["on_pre_optimizer_step", "on_step_end"]
        ):
            monkeypatch.setattr(StopIfNotFinite, off, lambda *_, **__: None)
    with pytest.raises(FloatingPointError, match=words) as raised:
        script.main(arguments)
    assert "--learning_rate (now " in str(raised.value) and "--output_dir" in str(raised.value)
    assert "Saved in" not in capsys.readouterr().out
    assert not list(base.parent.glob("run/model*"))
    for weights in base.parent.glob("run/checkpoint-*/*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(weights).values())


@pytest.mark.integration
def test_a_run_that_ends_worse_than_it_began_says_so(base, facts, capsys):
    """It learns one answer by heart, and is asked for others."""
    one = [m | {"content": "no " * 20} for m in read_jsonl(facts)[0]["messages"]]
    write_jsonl(base.parent / "one.jsonl", [{"messages": one}])
    arguments = quickly(base, base.parent / "one.jsonl", "--held_out", facts, "--learning_rate")
    arguments += ["0.2", "--method", "full", "--load_best_model_at_end", "false"]
    assert script.main([*arguments, "--max_steps", "6"]) == 0
    said = capsys.readouterr().out
    assert "worse than before the training: the held-out loss rose from" in said
    assert "Talk to it" not in said
    card = (base.parent / "run/model/README.md").read_text()
    assert "**WARNING: the model is worse than before the training" in card and "| 0 |" in card


@pytest.mark.parametrize(
    ("losses", "kept", "words"),
    [
        ({0: 2.0, 4: 1.0, 8: 1.5}, 4, ""),
        (
            {0: 2.0, 4: 1.0, 8: 2.5},
            4,
            "rose from 2.000 to 2.500. The saved weights are from step 4, with 1.000",
        ),
        ({0: 2.0, 4: 2.1, 8: 2.5}, 4, "rose from 2.000 to 2.100"),
        ({4: 2.0, 8: 2.5}, 4, ""),
        ({}, None, ""),
    ],
)
def test_held_out_losses_before_and_after_are_compared(losses, kept, words):
    log = [{"step": step, "eval_loss": loss} for step, loss in losses.items()]
    state = SimpleNamespace(log_history=log, best_global_step=kept, global_step=8)
    args = SimpleNamespace(load_best_model_at_end=True)
    said = warning_of_loss(SimpleNamespace(state=state, args=args))
    assert words in said and bool(words) == bool(said)


def test_what_cannot_be_saved_is_found_before_the_training(tiny):
    model, tokenizer = tiny

    class Broken:
        def save_pretrained(self, folder):
            raise TypeError("Object of type dtype is not JSON serializable")

    parts = {"config": model.config, "generation_config": model.generation_config}
    rehearse(SimpleNamespace(model=SimpleNamespace(**parts), processing_class=tokenizer))
    for name in parts:
        broken = SimpleNamespace(**parts | {name: Broken()})
        with pytest.raises(ValueError, match=r"Broken that can be saved .*not JSON serializable"):
            rehearse(SimpleNamespace(model=broken, processing_class=tokenizer))
    with pytest.raises(ValueError, match="Broken that can be saved"):
        rehearse(SimpleNamespace(model=SimpleNamespace(**parts), processing_class=Broken()))


def test_an_output_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="Expected an --output_dir that can be written"):
        RunFolder(tmp_path / "file", {}).begin([])
    with pytest.raises(OSError, match="Expected an --output_dir that can be written"):
        RunFolder(tmp_path / "file/run", {}).begin([])


@pytest.mark.parametrize("more", [(), ("--plan",)])
def test_an_adapter_is_refused_for_full_finetuning_at_once(more, facts, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    words = ["--model", str(tmp_path / "adapter"), "--data", str(facts), *more]
    with pytest.raises(ValueError, match="Expected the peft_type, such as LORA"):
        script.main([*words, "--output_dir", str(tmp_path / "run")])
    words += ["--method", "full"]
    words += ["--output_dir", str(tmp_path / "run")]
    with pytest.raises(
        ValueError, match="whole model for --method full, found an adapter .*Merge it"
    ):
        script.main(words)
    (tmp_path / "merged").mkdir()
    with pytest.raises(ValueError, match=r"Give --model .*merged, the merged model"):
        script.main(words)


@pytest.mark.integration
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("spare", [80, 1, 0])
def test_added_tokens_take_spare_rows_and_an_adapter_fits_its_base(
    spare, tied, facts, tmp_path, capsys
):
    """Vocabularies are padded, for speed: rows that no token has are not cut off."""
    words = llama3_like.tokenizer()
    words.chat_template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    model = random_model(words, tied=tied, rows=len(words) + spare)
    model.save_pretrained(tmp_path / "base")
    words.save_pretrained(tmp_path / "base")
    arguments = quickly(tmp_path / "base", facts, "--template", "chatml", "--learning_rate", "0.01")
    assert script.main(arguments) == 0
    grows = spare < 2
    assert ("AutoPeftModelForCausalLM" in capsys.readouterr().out) == grows
    merged, tokenizer = load(tmp_path / "run/merged")
    rows = max(len(words) + spare, len(tokenizer))
    assert merged.get_input_embeddings().num_embeddings == merged.config.vocab_size == rows
    if grows:
        tuned = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run/adapter")
    else:
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        tuned = PeftModel.from_pretrained(plain, tmp_path / "run/adapter")
    ids = encode(read_jsonl(facts)[0]["messages"], tokenizer)["input_ids"]
    assert max(ids) >= len(words)
    ids = torch.tensor([ids])
    torch.testing.assert_close(tuned(ids).logits, merged(ids).logits, atol=1e-3, rtol=1e-3)


def test_a_model_still_stops_where_it_did(tokenizer):
    model, _ = load()
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, 7]
    assert stop_token_ids(model, tokenizer)[-1] == 7


def test_the_models_own_template_is_kept_to_the_letter_or_refused(tmp_path, tiny):
    model, tokenizer = load()
    model.save_pretrained(tmp_path)
    args = FinetuneArguments(model=str(tmp_path), template="own")
    unmarked = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    )
    for template, words in ((qwen2_5_chat_template, ""), (unmarked, "marks the assistant's")):
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path)
        _, loaded = load(tmp_path)
        assert loaded.chat_template == CHATML
        with pytest.raises(ValueError, match=words) if words else contextlib.nullcontext():
            set_template(model, loaded, args)
        assert loaded.chat_template == template
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="Expected a model with one chat template"):
        set_template(model, loaded, args)


def test_packed_weights_are_counted_as_what_they_stand_for(tiny):
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    packed, _ = load(quantization_config=four_bits)
    assert sum(p.numel() for p in packed.parameters()) < 0.7 * tiny[0].num_parameters()
    assert count_parameters(packed) == count_parameters(tiny[0]) == tiny[0].num_parameters()


def test_checkpointing_is_heard_under_both_its_names():
    for words, found in (
        ([], False),
        (["--gradient_checkpointing", "true"], True),
        (["--activation_checkpointing"], True),
    ):
        assert parse(words)[1].activation_checkpointing is found


def test_splits_and_configurations_of_a_dataset_have_names(facts, tmp_path, monkeypatch):
    monkeypatch.setattr("sftlib.finetune.data.hub_answers", lambda: False)
    rows = read_jsonl(facts)
    (tmp_path / "set").mkdir()
    write_jsonl(tmp_path / "set/train_sft.jsonl", rows[:60])
    write_jsonl(tmp_path / "set/test_sft.jsonl", rows[60:])
    (tmp_path / "set/README.md").write_text(
        "---\nconfigs:\n- config_name: all\n  data_files:\n"
        "  - {split: train_sft, path: train_sft.jsonl}\n"
        "  - {split: test_sft, path: test_sft.jsonl}\n---\n"
    )
    folder = str(tmp_path / "set")
    names = {"data_config": "all", "data_split": "train_sft", "held_out_split": "test_sft"}
    args = FinetuneArguments(data=folder, held_out=folder, **names)
    kept, held, rejects, *_ = load_data(args)
    assert (kept, held, rejects) == (rows[:60], rows[60:], [])
    with pytest.raises(ValueError, match="'train': .*train_sft.* Give --data_config, --data_split"):
        load_data(FinetuneArguments(data=folder))


def test_conversations_that_all_begin_alike_are_split_too(tmp_path):
    texts = [{"role": "assistant", "content": f"Text {n}."} for n in range(20)]
    question = {"role": "user", "content": "Summarise it."}
    write_jsonl(tmp_path / "data.jsonl", [{"messages": [question, text]} for text in texts])
    kept, held, *_ = load_data(FinetuneArguments(data=str(tmp_path / "data.jsonl")))
    assert (len(kept), len(held)) == (18, 2)
    write_jsonl(tmp_path / "data.jsonl", [{"messages": [question, texts[0]]}])
    with pytest.raises(ValueError, match="at least two different .* Give --held_out a file"):
        load_data(FinetuneArguments(data=str(tmp_path / "data.jsonl")))


def test_a_disk_that_not_all_nodes_see_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "SHARED_DISK_SECONDS", 0)
    folder = RunFolder(tmp_path, {})
    seen_by_half = {"wait_for_everyone": lambda: None, "reduce": lambda seen, how: seen / 2}
    for parts in ({**seen_by_half, "reduce": lambda seen, how: seen}, seen_by_half):
        with pytest.raises(OSError, match="on a disk that all nodes share"):
            folder.require_shared_disk(SimpleNamespace(device="cpu", **parts))
        (tmp_path / RUN_FILE).write_text("{}")


@pytest.mark.integration
def test_the_card_says_which_weights_are_kept_and_what_was_learned(facts, tmp_path):
    """At this rate the loss rises again."""
    arguments = ["--data", str(facts), "--output_dir", str(tmp_path), "--method", "full"]
    arguments += ["--max_steps", "6", "--ask", "0", "--assistant_only_loss", "false"]
    arguments += ["--learning_rate", "0.05", "--eval_steps", "1", "--save_steps", "1"]
    assert script.main(arguments) == 0
    card = (tmp_path / "model/README.md").read_text()
    rows = [line.split(" | ") for line in card.splitlines() if re.match(r"\| \d", line)]
    best = min((row for row in rows if row[0] != "| 0"), key=lambda row: float(row[1]))[0]
    assert f"6 steps, of which the weights after step {best[2:]} are saved" in card
    assert "loss on all tokens" in card and rows[0][2:] == ["–", "– |"]
    # TRL's card would name no base.
    assert not (tmp_path / "README.md").exists()


def test_a_model_can_stay_on_the_cpu_beside_a_full_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    moved = []
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, place: moved.append(place))
    load(dtype=torch.float32, device="cpu")
    assert moved == []
    load(dtype=torch.float32)
    assert moved == ["cuda"]


def test_a_folder_of_another_run_is_refused_and_half_a_checkpoint_is_passed_over(tmp_path):
    mine = {"model": "tiny-base", "data": "abc"}
    assert RunFolder(tmp_path, mine).last_checkpoint() is None
    (tmp_path / "other/checkpoint-3").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"checkpoints without a run\.json"):
        RunFolder(tmp_path / "other", mine).last_checkpoint()
    (tmp_path / RUN_FILE).write_text(json.dumps(mine))
    whole = ("m.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
    parts = {5: whole, 8: whole[:1] + whole[-1:], 10: whole[:-1], "best": whole}
    for step, files in parts.items():
        write_checkpoint(tmp_path / f"checkpoint-{step}", files)
    folder = RunFolder(tmp_path, mine)
    assert str(folder.last_checkpoint()).endswith("checkpoint-5")
    first, second = folder.passed_over()
    assert first.endswith(
        "checkpoint-8 cannot be resumed: it lacks rng_state.pth, scheduler.pt, optimizer.*."
    )
    assert second.endswith("checkpoint-10 cannot be resumed: it lacks trainer_state.json.")
    (tmp_path / "checkpoint-10/trainer_state.json").write_text('{"half": ')
    assert folder.passed_over()[-1] == second
    with pytest.raises(
        ValueError, match="with data of checksum 'abc'; this run has data of .* 'xyz'"
    ):
        RunFolder(tmp_path, mine | {"data": "xyz"}).last_checkpoint()


def write_checkpoint(folder, files):
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("{}")


@pytest.mark.parametrize("lost", range(7))
def test_a_checkpoint_of_ranks_needs_what_each_of_them_saved(lost, tmp_path):
    whole = ["global_step4/mp_rank_00_model_states.pt", "latest", "scheduler.pt"]
    whole += [f"global_step4/zero_pp_rank_{n}_mp_rank_00_optim_states.pt" for n in (0, 1)]
    whole += ["rng_state_0.pth", "rng_state_1.pth", "trainer_state.json"]
    two = RunFolder(tmp_path, {"zero_stage": 2, "ranks": 2})
    write_checkpoint(tmp_path / "checkpoint-4", whole)
    assert two.lacking(tmp_path / "checkpoint-4") == []
    for plain in ({"ranks": 1}, {"ranks": 2}):
        assert "optimizer.*" in RunFolder(tmp_path, plain).lacking(tmp_path / "checkpoint-4")
    (tmp_path / "checkpoint-4" / whole[lost]).unlink()
    assert len(two.lacking(tmp_path / "checkpoint-4")) == 1


def test_a_run_is_known_by_what_decides_what_is_learned(facts):
    rows = read_jsonl(facts)

    def identity(*arguments, rows=rows, held_out=()):
        return run_identity(*parse(["--model", "tiny-base", *arguments]), rows, held_out)

    mine = identity()
    assert mine == identity("--save_steps", "5", "--no_merge", "--ask", "3", "--logging_steps", "9")
    assert mine == identity("--report_to", "tensorboard", "--activation_checkpointing", "true")
    assert mine == identity(
        "--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "2"
    )
    assert mine == json.loads(json.dumps(mine)) and "hub_token" not in mine
    others = [identity(rows=rows[1:]), identity(rows=rows[::-1]), identity(held_out=rows[:1])]
    for name, value in {
        **{"model": "other", "method": "full", "lora_r": "8", "lora_alpha": "8"},
        **{"template": "own", "learning_rate": "1e-3", "num_train_epochs": "2", "max_steps": "9"},
        **{"max_length": "64", "packing": "true", "seed": "1", "warmup_steps": "3"},
        **{"per_device_train_batch_size": "8", "lr_scheduler_type": "linear"},
        **{"assistant_only_loss": "false", "weight_decay": "0.1", "max_grad_norm": "0.5"},
        **{"neftune_noise_alpha": "5", "optim": "sgd", "adam_beta2": "0.95", "loss_type": "dft"},
        **{"label_smoothing_factor": "0.1", "data_seed": "3", "truncation_mode": "keep_end"},
        **{"train_sampling_strategy": "random", "deepspeed": "deepspeed_configs/zero2.json"},
    }.items():
        others.append(identity(f"--{name}", value))
    assert all(other != mine for other in others)
    assert identity("--deepspeed", "deepspeed_configs/zero1.json") != others[-1]


def test_a_second_interrupt_stops_at_once():
    stopped = StopOnSignal()
    stopped.handle(signal.SIGINT, None)
    with pytest.raises(KeyboardInterrupt):
        stopped.handle(signal.SIGINT, None)


@pytest.mark.integration
@pytest.mark.parametrize(
    "words",
    [
        "--model meta-llama/Meta-Llama-3-8B",
        pytest.param("--data no/where", marks=pytest.mark.nightly),
    ],
)
def test_what_is_gated_asks_for_a_token_and_a_given_one_is_never_shown(words, httpserver, tmp_path):
    """A server that answers as the Hub does where a licence was not accepted."""
    gated = {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to it is restricted."}
    httpserver.expect_request(re.compile("/.*")).respond_with_data("no", 403, gated)
    settings = {"HF_ENDPOINT": httpserver.url_for("").rstrip("/"), "HF_HOME": str(tmp_path)}
    token = "hf_" + "secret" * 5
    said = run(*words.split(), code=2, env=settings | {"HF_TOKEN": token})
    assert "for gated models such as Llama 3 set HF_TOKEN" in said or "--data" in words
    assert "set HF_TOKEN" in said and "Traceback" not in said and token not in said
    asked = [request for request, _ in httpserver.log]
    assert any(request.headers.get("Authorization") == f"Bearer {token}" for request in asked)


# --- Training ------------------------------------------------------------------------------------


@pytest.mark.integration
def test_alone_it_trains_the_tiny_base_and_shows_before_and_after(tmp_path, capsys):
    assert script.main(["--output_dir", str(tmp_path), "--learning_rate", "5e-3"]) == 0
    said = capsys.readouterr().out
    lines = [line for line in said.splitlines() if "held-out loss" in line]
    assert "exact answers 0%" in lines[0] and len(lines) == 5
    assert int(lines[-1].split("exact answers ")[1].split("%")[0]) >= 90
    model, tokenizer = load(tmp_path / "merged")
    assert tokenizer.chat_template == LLAMA3  # as it was trained
    assert "step    87: held-out loss 0.0" in said and "ended by itself 100%" in lines[-1]
    turn = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id, turn]
    asked = read_facts("heldout")[:32]
    given = answers(model, tokenizer, [row["messages"][:-1] for row in asked])
    right = sum(
        a.text == row["messages"][1]["content"] for a, row in zip(given, asked, strict=True)
    )
    assert right >= 29
    card = (tmp_path / "merged" / "README.md").read_text()
    assert (
        "learning rate 0.005, cosine" in card
        and "base_model: tiny-base" in card
        and "1,392 conversations of `sft.jsonl`" in card
    )
    assert str(tmp_path) not in card and str(ROOT) not in card


@pytest.mark.integration
def test_an_interrupted_training_saves_and_goes_on(facts, tmp_path, capsys):
    arguments = ("--data", facts, "--output_dir", tmp_path / "run", "--num_train_epochs", "12")
    process = command(*arguments, *SHORT[:4])
    deadline = time.monotonic() + 200
    while not list(tmp_path.glob("run/checkpoint-*")) and time.monotonic() < deadline:
        if process.poll() is not None:
            break
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 130, out + err
    assert "Stopped and saved at step" in out
    step = int(out.split("Stopped and saved at step ")[1].split(".")[0])
    assert (tmp_path / f"run/checkpoint-{step}/trainer_state.json").exists()
    with pytest.raises(ValueError, match="found one with method 'lora'"):
        script.main([str(word) for word in (*arguments, *SHORT[:4], "--method", "full")])
    assert script.main([str(word) for word in (*arguments, *SHORT[:4])]) == 0
    said = capsys.readouterr().out
    assert f"Going on from {tmp_path / 'run'}/checkpoint-{step}" in said
    assert (tmp_path / "run/merged/model.safetensors").exists()


@pytest.mark.integration
def test_a_file_of_settings_counts_less_than_the_command_line(facts, tmp_path, capsys):
    settings = {"data": str(facts), "method": "full", "max_steps": 2, "template": "chatml"}
    settings |= {"learning_rate": 0.003, "report_to": "tensorboard"}
    file = tmp_path / "settings.yaml"
    file.write_text("".join(f"{name}: {value}\n" for name, value in settings.items()))
    write_jsonl(tmp_path / "bad.jsonl", [*read_jsonl(facts), {"question": "?"}])
    more = ("--data", tmp_path / "bad.jsonl", "--output_dir", tmp_path / "run", "--patience", "1")
    assert script.main([str(word) for word in ("--config", file, *more, *SHORT[:2])]) == 0
    assert "refused records, with reasons, are in" in capsys.readouterr().out
    (events,) = (tmp_path / "run").rglob("events.out.tfevents*")  # TensorBoard's
    assert b"eval/exact_match" in events.read_bytes()
    assert read_jsonl(tmp_path / "run/rejects.jsonl")[0]["line"] == 97
    assert "learning rate 0.003" in (tmp_path / "run/model/README.md").read_text()
    model, tokenizer = load(tmp_path / "run/model")
    assert "im_start" in tokenizer.chat_template
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in model.generation_config.eos_token_id
    before = (tmp_path / "run/model/model.safetensors").read_bytes()
    assert script.main([str(word) for word in ("--config", file, *more, *SHORT[:2])]) == 0
    assert "is finished already" in capsys.readouterr().out
    assert (tmp_path / "run/model/model.safetensors").read_bytes() == before
    with pytest.raises(ValueError, match="found one with learning_rate 0.003"):
        script.main([str(word) for word in ("--config", file, *more, "--learning_rate", "1e-3")])


@pytest.mark.nightly
def test_two_ranks_divide_an_adapter_and_its_base_with_zero3(facts, tmp_path):
    """All parameters with ZeRO-2 and ZeRO-3: other launchers, SLURM, the help's `torchrun`."""
    said = run(
        *("--data", facts, "--output_dir", tmp_path, *SHORT, "--max_steps", "6"),
        *("--deepspeed", "deepspeed_configs/zero3.json"),
        launcher=TORCHRUN,
    )
    assert_it_learned(said)
    assert "not trained beside an adapter under ZeRO stage 3" in said
    model, tokenizer = load(tmp_path / "merged")
    assert tokenizer.chat_template == LLAMA3
    assert model.num_parameters() == 2_787_072


def assert_it_learned(said: str) -> None:
    lines = [line for line in said.splitlines() if "held-out loss" in line]
    losses = [float(line.split("loss ")[1].split(",")[0]) for line in lines]
    assert len(losses) >= 4 and losses[-1] < losses[0] - 0.5, said


@pytest.mark.nightly
@pytest.mark.parametrize("launcher", ["accelerate", "deepspeed"])
def test_other_launchers_start_it_too(launcher, facts, free_port, tmp_path):
    config = "deepspeed_configs/zero2.json"
    start = {
        "accelerate": ("launch", "--use_deepspeed", "--deepspeed_config_file", config)
        + ("--num_processes", "2", "--num_machines", "1")
        + ("--mixed_precision", "no", "--dynamo_backend", "no"),
        "deepspeed": ("--num_gpus", "2", "--master_port", str(free_port)),
    }
    said = run(
        *("--data", facts, "--output_dir", tmp_path, "--method", "full", "--max_steps", "4"),
        *("--deepspeed", config, *SHORT[:4]),
        launcher=(BIN / launcher, *start[launcher]),
        env={"DS_ACCELERATOR": "cpu"},
    )
    assert f"Saved in {tmp_path / 'model'}" in said
    assert_it_learned(said)
    state = json.loads((tmp_path / "checkpoint-4/trainer_state.json").read_text())
    assert state["max_steps"] == 4 and state["epoch"] > 0.6  # 64 of 96: two ranks, eight each


@pytest.mark.nightly
def test_slurms_tasks_become_ranks_and_an_interrupted_job_asks_for_another_turn(
    facts, free_port, tmp_path
):
    """The shipped job file, with SLURM's `srun` and `scontrol` played by two short scripts."""
    played = {
        "srun": 'shift; for t in 0 1; do SLURM_PROCID=$t SLURM_LOCALID=$t "$@" & done\n'
        "code=0; for t in 0 1; do wait -n || code=$?; done; exit $code",
        "scontrol": f'echo "$@" >> {tmp_path}/asked; echo 127.0.0.1',
        "python": f'exec {sys.executable} "$@"',
    }
    for name, text in played.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    job = (ROOT / "deepspeed_configs" / "llama3.slurm").read_text()
    job = job.replace('export PATH="$PWD/.venv/bin:$PATH"', f'export PATH="{tmp_path}:$PATH"')
    (tmp_path / "job").write_text(job)
    settings = {"SLURM_JOB_NODELIST": "here", "SLURM_JOB_ID": str(free_port - 20_000)}
    settings |= {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_CPUS_PER_TASK": "1"}
    settings |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CI": "1"}
    arguments = ["--data", facts, "--output_dir", tmp_path / "run", "--method", "full", *SHORT]
    arguments += ["--deepspeed", "deepspeed_configs/zero2.json", "--max_steps", "40"]
    arguments += ["--save_steps", "5", "--eval_steps", "5"]

    def start():
        return subprocess.Popen(
            ["bash", tmp_path / "job", *map(str, arguments)],
            cwd=ROOT,
            env=os.environ | settings,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    process = start()
    wait_until(lambda: list(tmp_path.glob("run/checkpoint-*/trainer_state.json")), process)
    ranks = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if "class_5_llama3.py" in child.cmdline() and "bash" not in child.cmdline()[0]
    ]
    assert sorted(rank.environ()["RANK"] for rank in ranks) == ["0", "1"]
    assert {rank.environ()["WORLD_SIZE"] for rank in ranks} == {"2"}
    assert {rank.environ()["SRUN_CPUS_PER_TASK"] for rank in ranks} == {"1"}
    ranks[0].terminate()  # one alone is told; both must save, and stop
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 130 and "Stopped and saved at step" in said, said
    assert f"requeue {settings['SLURM_JOB_ID']}" in (tmp_path / "asked").read_text()
    process = start()
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and "Going on from" in said and "Saved in" in said, said


def wait_until(there, process, seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not there() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)


@pytest.mark.nightly
def test_a_full_disk_keeps_the_last_good_checkpoint(facts, tmp_path):
    """On a disk that holds one checkpoint, and not two."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=60m", "none", disk], check=False)
    if mounted.returncode:
        pytest.skip("no right to mount a small disk")
    arguments = ("--data", facts, "--output_dir", disk / "run", "--method", "full", *SHORT)
    arguments += ("--max_steps", "8", "--save_steps", "4", "--eval_steps", "4")
    try:
        said = run(*arguments, code=2)
        assert f"The disk of {disk / 'run'} is full" in said and "Traceback" not in said
        assert f"{disk / 'run/checkpoint-4'} is whole" in said
        assert [path.name for path in disk.glob("run/checkpoint-*")] == ["checkpoint-4"]
        subprocess.run(["mount", "-o", "remount,size=300m", disk], check=True)
        said = run(*arguments)
        assert "Going on from" in said and (disk / "run/model/model.safetensors").exists()
    finally:
        subprocess.run(["umount", disk], check=True)


def examples() -> list[list[str]]:
    """The commands of `--help`, word by word; the first has a test of its own."""
    lines = script.__doc__.replace("\\\n", " ").splitlines()
    commands = [line for line in lines if re.match(" {4}[a-z]", line)]
    return [shlex.split(line) for line in commands[1:]]


def marked(commands: list[list[str]]) -> list:
    """Lesson 9 starts two ranks at each commit: what needs a launcher runs nightly here."""
    nightly = pytest.mark.nightly
    return [
        pytest.param(words, marks=nightly if words[0] == "torchrun" else ()) for words in commands
    ]


@pytest.mark.integration
@pytest.mark.parametrize("words", marked(examples()), ids=" ".join)
def test_each_example_of_the_help_runs(words, facts, tmp_path, capsys):
    """As it stands, but for the model (one built as Llama 3 is), the files and the ranks.

    What needs no launcher runs in this process, which has the libraries.
    """
    settings = tmp_path / "my.yaml"
    settings.write_text(f"data: {facts}\nmethod: full\n")
    here = {
        "torchrun": " ".join(map(str, TORCHRUN[:2])),
        "8": "2",
        "meta-llama/Meta-Llama-3-8B": str(llama3_like.save(tmp_path / "llama3")),
        "deepspeed_configs/zero3_bf16.json": "deepspeed_configs/zero3.json",  # no GPU
        "my.jsonl": str(facts),
        "my.yaml": str(settings),
    }
    words = shlex.split(" ".join(here.get(word, word) for word in words))
    at = words.index("class_5_llama3.py")
    more = () if "--plan" in words else ("--max_steps", "4", "--ask", "4")
    arguments = [*words[at + 1 :], *more, "--output_dir", str(tmp_path / "run")]
    if words[:at] == ["python"]:
        assert script.main(arguments) == 0
        said = capsys.readouterr().out
    else:
        said = run(*arguments, launcher=words[:at])
        assert_it_learned(said)
    if "--plan" in words:
        assert "It fits." in said and not (tmp_path / "run").exists()
        return
    saved = Path(said.split("Saved in ")[1].split(".")[0])
    model, tokenizer = load(saved)
    assert tokenizer.chat_template == LLAMA3
    turn = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id, turn]
    if here["meta-llama/Meta-Llama-3-8B"] in words:
        assert model.config.num_key_value_heads == 2 and model.config.tie_word_embeddings
        assert model.config.rope_parameters["factor"] == 32
