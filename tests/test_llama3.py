"""The script for practitioners: each of its ways on the tiny base; what it says to bad input."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from sftlib.chat import LLAMA3
from sftlib.data import read_facts, read_jsonl, write_jsonl
from sftlib.evaluate import answers
from sftlib.models import TINY_BASE, load

import pytest
from transformers import AutoTokenizer, LlamaConfig

import class_5_llama3 as script

ROOT = Path(__file__).parents[1]
SHORT = ("--ask", "8", "--per_device_train_batch_size", "8", "--num_train_epochs", "1")


@pytest.fixture
def facts(tmp_path):
    path = tmp_path / "facts.jsonl"
    write_jsonl(path, [{"messages": row["messages"]} for row in read_facts("sft")[:96]])
    return path


def command(*arguments, launcher=()):
    settings = os.environ | {"CI": "1", "OMP_NUM_THREADS": "1" if launcher else "2"}
    return subprocess.Popen(
        [*(launcher or [sys.executable]), "class_5_llama3.py", *map(str, arguments)],
        cwd=ROOT,
        env=settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(*arguments, launcher=(), code=0):
    process = command(*arguments, launcher=launcher)
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


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ["3,311,360, of which 227,328 are trained", "87 of 16 conversations", "It fits"]),
        (("--method", "full"), ["of which 3,311,360 are trained"]),
        (("--plan_gib", "0.01"), ["It does not fit"]),
        (("--num_train_epochs", "2", "--plan_gpus", "4"), ["44 of 64 conversations"]),
    ],
)
def test_a_plan_says_what_a_training_would_need(arguments, words, capsys):
    assert script.main(["--plan", *arguments]) == 0
    said = capsys.readouterr().out
    assert all(word in said for word in words), said


def test_the_plan_of_llama_3_8b_is_that_of_the_paper(tmp_path, capsys):
    """8,030,261,248 parameters; 16 bytes each, over eight GPUs, are 14.96 GiB."""
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
    zero3 = ("--deepspeed", "deepspeed_configs/zero3_bf16.json", "--method", "full")
    script.main(
        ["--plan", "--model", str(tmp_path), "--plan_gpus", "8", "--plan_gib", "80", *zero3]
    )
    said = capsys.readouterr().out
    assert "8,030,261,248, of which 8,030,261,248 are trained" in said
    sizes = [float(line.split()[0]) for line in said.splitlines() if "GiB  " in line][:3]
    assert sum(sizes) == pytest.approx(16 * 8_030_261_248 / 8 / 2**30, abs=0.02)


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
        script.conversations("nowhere.jsonl")
    with pytest.raises(OSError, match="found neither for 'no/where'.*set HF_TOKEN"):
        script.conversations("no/where")


def test_parquet_is_read_and_its_broken_rows_are_numbered(tmp_path):
    from datasets import Dataset

    rows = [{"instruction": "Say a.", "output": "a"}, {"instruction": "Say b.", "output": ""}]
    Dataset.from_list(rows).to_parquet(tmp_path / "data.parquet")
    found = script.conversations(str(tmp_path / "data.parquet"))
    assert found.rows[0]["messages"][1]["content"] == "a"
    assert [reject["line"] for reject in found.rejects] == [2]


def test_held_out_conversations_share_no_question_with_the_others(facts):
    args = script.Llama3Arguments(data=str(facts), held_out="0.2")
    rows, held_out, _ = script.sets(args)
    asked = [{row["messages"][0]["content"] for row in part} for part in (rows, held_out)]
    assert not asked[0] & asked[1] and len(rows) + len(held_out) == 96
    assert 10 < len(held_out) < 30


@pytest.mark.parametrize(
    ("method", "parameters", "rate"),
    [("full", 3e6, 5e-4), ("lora", 1e8, 1e-3), ("full", 8e9, 2e-5)],
)
def test_the_learning_rate_follows_from_method_and_size(method, parameters, rate):
    args, training = script.parse(["--method", method])
    assert training.learning_rate is None and not training.activation_checkpointing
    assert script.learning_rate(args, parameters) == pytest.approx(rate)
    assert script.parse(["--learning_rate", "0.1"])[1].learning_rate == 0.1


def test_four_bits_need_a_gpu(facts, tmp_path):
    with pytest.raises(ValueError, match="Expected a GPU for --method qlora"):
        script.main(["--method", "qlora", "--data", str(facts), "--output_dir", str(tmp_path)])


def test_a_template_needs_its_tokens(tokenizer):
    script.set_template(tokenizer, "auto")
    assert tokenizer.chat_template == LLAMA3
    script.set_template(tokenizer, "chatml")
    assert "im_start" in tokenizer.chat_template

    class Other:
        def get_vocab(self):
            return {"a": 0}

    with pytest.raises(ValueError, match=r"Expected a tokenizer with <\|eot_id\|>"):
        script.set_template(Other(), "llama3")


def test_a_folder_of_another_run_is_refused_and_half_a_checkpoint_is_passed_over(tmp_path):
    mine = {"model": "tiny-base", "data": "abc"}
    assert script.last_checkpoint(str(tmp_path), mine) is None
    (tmp_path / script.RUN).write_text(json.dumps(mine))
    state = "trainer_state.json"
    for step, files in ((5, ("m.safetensors", state)), (8, (state,)), (10, ("m.safetensors",))):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        for file in files:
            (folder / file).write_text("{}")
    assert script.last_checkpoint(str(tmp_path), mine).endswith("checkpoint-5")
    with pytest.raises(ValueError, match="found one with data 'abc'; now data 'xyz'"):
        script.last_checkpoint(str(tmp_path), mine | {"data": "xyz"})


# --- Training ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_alone_it_trains_the_tiny_base_and_shows_before_and_after(tmp_path):
    said = run("--output_dir", tmp_path, "--learning_rate", "5e-3")
    lines = [line for line in said.splitlines() if line.startswith("step")]
    assert "exact answers 0%" in lines[0] and len(lines) == 5
    assert int(lines[-1].split("exact answers ")[1].split("%")[0]) >= 90
    model, tokenizer = load(tmp_path / "merged")
    assert tokenizer.chat_template == LLAMA3  # as it was trained
    assert "step    87: held-out loss 0.0" in said and "ended by itself 100%" in lines[-1]
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|eot_id|>")
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
        and "1,377 conversations of `sft.jsonl`" in card
    )
    assert str(tmp_path) not in card and str(ROOT) not in card


@pytest.mark.slow
def test_an_interrupted_training_saves_and_goes_on(facts, tmp_path):
    arguments = ("--data", facts, "--output_dir", tmp_path / "run", "--num_train_epochs", "40")
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
    refused = run(*arguments, *SHORT[:4], "--method", "full", code=1)
    assert "found one with method 'lora'" in refused and "Traceback" not in refused
    said = run(*arguments, *SHORT[:4])
    assert f"Going on from {tmp_path / 'run'}/checkpoint-{step}" in said
    assert (tmp_path / "run/merged/model.safetensors").exists()


@pytest.mark.slow
def test_a_file_of_settings_counts_less_than_the_command_line(facts, tmp_path):
    settings = {"data": str(facts), "method": "full", "max_steps": 2, "template": "chatml"}
    settings["learning_rate"] = 0.003
    file = tmp_path / "settings.yaml"
    file.write_text("".join(f"{name}: {value}\n" for name, value in settings.items()))
    write_jsonl(tmp_path / "bad.jsonl", [*read_jsonl(facts), {"question": "?"}])
    more = ("--data", tmp_path / "bad.jsonl", "--output_dir", tmp_path / "run", "--patience", "1")
    said = run("--config", file, *more, *SHORT[:2])
    assert "1 cannot be used" in said
    assert read_jsonl(tmp_path / "run/rejects.jsonl")[0]["line"] == 97
    assert "learning rate 0.003" in (tmp_path / "run/model/README.md").read_text()
    model, tokenizer = load(tmp_path / "run/model")
    assert "im_start" in tokenizer.chat_template
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in model.generation_config.eos_token_id


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "method"), [(2, "full"), (3, "lora"), (3, "full")])
def test_two_ranks_train_with_zero(stage, method, facts, tmp_path):
    torchrun = (shutil.which("torchrun", path=str(Path(sys.executable).parent)),)
    launcher = (*torchrun, "--standalone", "--nproc-per-node", "2")
    said = run(
        *("--data", facts, "--output_dir", tmp_path, "--method", method, *SHORT),
        *("--deepspeed", f"deepspeed_configs/zero{stage}.json"),
        launcher=launcher,
    )
    lines = [line for line in said.splitlines() if line.startswith("step")]
    losses = [float(line.split("loss ")[1].split(",")[0]) for line in lines]
    assert len(losses) >= 4 and losses[-1] < losses[0] - 0.5
    model, tokenizer = load(tmp_path / ("model" if method == "full" else "merged"))
    assert tokenizer.chat_template == LLAMA3
    assert model.num_parameters() == 3_311_360
