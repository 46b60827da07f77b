"""Flags that decide what is trained and where: the answers, the control tokens, the device."""

import re

from sftlib.data import read_facts, write_jsonl
from sftlib.finetune.adapter import lora_config
from sftlib.finetune.arguments import FinetuneArguments, check, parse
from sftlib.finetune.checkpoints import RUN_FILE, RunFolder, run_identity
from sftlib.finetune.data import Data
from sftlib.finetune.device import Device, choose, device_here, weights_dtype
from sftlib.models import load

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import class_5_llama3 as script
from tests.random_model import random_model

TALK = [
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Three?"},
    {"role": "assistant", "content": "No."},
]


@pytest.fixture
def base(tokenizer, tmp_path):
    """A random model of two layers in a folder, beside 24 conversations."""
    random_model(tokenizer, width=64).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    rows = [{"messages": row["messages"]} for row in read_facts("sft")[:23]]
    write_jsonl(tmp_path / "data.jsonl", [{"messages": TALK}, *rows])
    return tmp_path / "base"


def words(base, *more, out="run"):
    """A run of two steps in the folder `out` beside the base."""
    text = f"--model {base} --data {base.parent}/data.jsonl --output_dir {base.parent}/{out} "
    text += "--max_steps 2 --ask 1 --answer_tokens 2 --per_device_train_batch_size 4 "
    return [*f"{text} --save_steps 1 --eval_steps 1 --held_out 0.2".split(), *map(str, more)]


# --- Which answers -------------------------------------------------------------------------------


def learned(args, training):
    """What the trainer learns of a conversation with two answers, as text."""
    rows = [{"messages": TALK}]
    trainer, *_ = script.make_trainer(args, training, Data(rows, rows, []))
    (labels,) = trainer.train_dataset["labels"]
    return trainer.processing_class.decode([token for token in labels if token >= 0])


def test_all_answers_are_learned_or_the_last_alone(base, capsys):
    assert learned(*parse(words(base))) == "Yes.<|eot_id|>No.<|eot_id|>"
    assert learned(*parse(words(base, "--learn", "last"))) == "No.<|eot_id|>"
    for more, count in (("all", 2), ("last", 1)):
        assert script.main(words(base, "--show", 1, "--learn", more)) == 0
        shown = capsys.readouterr().out.split("« »")[1]
        assert len(re.findall("«", shown)) == count


@pytest.mark.parametrize("more", [[], ["--no_train_control_tokens"]])
@pytest.mark.integration
def test_the_card_says_which_answers_and_whether_control_tokens_are_learned(base, more, capsys):
    assert script.main(words(base, "--learn", "last", *more)) == 0
    said, run = capsys.readouterr().out, base.parent / "run"
    card = (run / "adapter/README.md").read_text()
    assert "loss on the tokens of each conversation's last answer" in card
    rows = [
        name for name in load_file(run / "adapter/adapter_model.safetensors") if "token" in name
    ]
    if more:
        assert not rows and "control tokens not trained" in card
        assert "The embeddings of control tokens are not trained" in said
    else:
        assert rows and "control tokens trained" in card
        assert "The embeddings of 4 control tokens are trained, too" in said


def test_the_last_answer_alone_needs_a_loss_on_answers(base):
    with pytest.raises(ValueError, match="Expected --assistant_only_loss true for --learn last"):
        script.main(words(base, "--learn", "last", "--assistant_only_loss", "false"))
    assert not (base.parent / "run").exists()


# --- Control tokens ------------------------------------------------------------------------------


def test_the_rows_of_the_control_tokens_are_a_choice(tiny):
    assert lora_config(parse([])[0], *tiny).trainable_token_indices
    args, _ = parse(["--no_train_control_tokens"])
    assert lora_config(args, *tiny).trainable_token_indices is None
    with pytest.raises(
        ValueError, match="Expected --method lora or qlora for --no_train_control_tokens"
    ):
        check(*parse(["--no_train_control_tokens", "--method", "full"]))


# --- The device ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("there", "found"),
    [
        ({}, ("cpu", False)),
        ({"bf16": True}, ("cpu", False)),
        ({"cuda": True, "bf16": True}, ("cuda", True)),
        ({"cuda": True}, ("cuda", False)),
        ({"mps": True, "bf16": True}, ("mps", True)),
        ({"mps": True}, ("mps", False)),
        ({"mps": True, "bf16": True, "use_cpu": True}, ("cpu", False)),
        ({"cuda": True, "bf16": True, "use_cpu": True}, ("cpu", False)),
        ({"mps": True, "bf16": True, "ranks": True}, ("cpu", False)),
        ({"cuda": True, "bf16": True, "ranks": True}, ("cuda", True)),
    ],
)
def test_the_device_is_a_gpu_where_there_is_one(there, found):
    device = choose(**{"cuda": False, "mps": False, "bf16": False} | there)
    assert (device.name, device.bf16) == found


def test_the_settings_and_the_plan_follow_the_device(monkeypatch, capsys):
    def asked(*given):
        training = parse(list(given))[1]
        return training.use_cpu, training.bf16

    assert asked() == asked("--use_cpu", "true") == (True, False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda *_: True)
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    assert asked() == (False, True) and asked("--bf16", "false") == (False, False)
    assert asked("--use_cpu") == asked("--use-cpu=true") == (True, False)
    assert asked("--use_cpu", "false") == (False, True)
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 3 * 2**30)
    script.main(["--plan"])
    said = capsys.readouterr().out
    assert "of 3.00 GiB" in said and "on 1 GPU (ZeRO stage 0, computed in bfloat16)" in said
    script.main(["--plan", "--use_cpu"])
    said = capsys.readouterr().out
    assert "of 3.00 GiB" not in said and "on 1 process (ZeRO stage 0, computed in float32)" in said
    monkeypatch.setenv("WORLD_SIZE", "2")  # gloo has no collectives of an Apple GPU
    assert device_here().name == "cpu"
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda *_: False)
    assert device_here().name == "mps" and not device_here().bf16


@pytest.mark.parametrize(
    ("device", "bf16", "method", "deepspeed", "dtype"),
    [
        ("cpu", False, "lora", False, "float32"),
        ("cpu", True, "lora", False, "float32"),
        ("cpu", False, "qlora", False, "float32"),
        ("cuda", True, "lora", False, "bfloat16"),
        ("cuda", True, "full", True, "bfloat16"),
        ("cuda", True, "full", False, "float32"),
        ("cuda", False, "lora", False, "bfloat16"),
        ("mps", True, "lora", False, "bfloat16"),
        ("mps", False, "lora", False, "float32"),
        ("mps", True, "full", False, "float32"),
    ],
)
def test_the_weights_are_in_the_dtype_that_device_and_method_need(
    device, bf16, method, deepspeed, dtype
):
    found = weights_dtype(Device(device, bf16), method, deepspeed)
    assert found == getattr(torch, dtype)


def test_the_model_goes_where_the_trainer_is(base, monkeypatch):
    moved = []
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, place: moved.append(place))
    for place in ("mps", "cuda", "cpu", None):
        load(base, device=place)
    assert moved == ["mps", "cuda"]


@pytest.mark.integration
def test_four_bits_train_on_a_cpu_with_a_warning(base, capsys):
    assert script.main(words(base, "--method", "qlora", "--learning_rate", "0.01")) == 0
    said, run = capsys.readouterr().out, base.parent / "run"
    assert "WARNING: 4 bits are slow on a CPU" in said and "--method lora" in said
    losses = [float(loss) for loss in re.findall(r"held-out loss ([\d.]+)", said)]
    assert losses[-1] < losses[0]
    assert PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run / "adapter")
    assert (run / "merged/model.safetensors").exists()


# --- The run that a folder belongs to ------------------------------------------------------------


@pytest.mark.parametrize("more", ["--learn last", "--no_train_control_tokens"])
def test_a_run_goes_on_only_with_the_same_choice(more, tmp_path):
    mine, other = (run_identity(*parse(asked), []) for asked in ([], more.split()))
    assert mine != other
    folder = RunFolder(tmp_path, mine)
    folder.begin([])
    assert folder.last_checkpoint() is None
    with pytest.raises(ValueError, match="Give another --output_dir"):
        RunFolder(tmp_path, other).last_checkpoint()
    (tmp_path / RUN_FILE).write_text('{"model": null}')  # of a version without these choices
    assert folder.last_checkpoint() is None
    with pytest.raises(ValueError, match="Give another --output_dir"):
        RunFolder(tmp_path, other).last_checkpoint()


def test_help_shows_the_choices_as_they_are_typed(capsys):
    with pytest.raises(SystemExit):
        script.main(["--help"])
    page = capsys.readouterr().out
    assert "--learn (all, last) [all]" in page and "--no_train_control_tokens\n" in page
    assert FinetuneArguments().train_control_tokens
