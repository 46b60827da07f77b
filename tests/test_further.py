"""Training goes on with an adapter that was saved: by this script, or by PEFT alone."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from sftlib.chat import CHATML, LLAMA3, encode
from sftlib.data import read_facts, write_jsonl
from sftlib.finetune.adapter import take_settings, with_adapter
from sftlib.finetune.arguments import check, parse
from sftlib.finetune.checkpoints import RunFolder, run_identity
from sftlib.models import load

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import class_5_llama3 as script
from tests import llama3_like
from tests.random_model import random_model

ROWS = [{"messages": row["messages"]} for row in read_facts("sft")[:32]]
ROOT = Path(__file__).parents[1]
TORCHRUN = (Path(sys.executable).parent / "torchrun", "--standalone", "--nproc-per-node", "1")


@pytest.fixture
def base(tokenizer, tmp_path):
    """A random model of two layers in a folder, beside 32 conversations."""
    random_model(tokenizer, width=64).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    write_jsonl(tmp_path / "data.jsonl", ROWS)
    return tmp_path / "base"


@pytest.fixture
def adapter(base):
    """An adapter as PEFT alone saves it, without a tokenizer: r = 4 on two kinds of layers."""
    model = AutoModelForCausalLM.from_pretrained(base)
    settings = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "down_proj"]}
    adapted = get_peft_model(model, LoraConfig(**settings, task_type="CAUSAL_LM"))
    torch.manual_seed(1)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(base.parent / "peft")
    return base.parent / "peft"


def words(*more, out, folder):
    text = f"--data {folder}/data.jsonl --output_dir {folder}/{out} --max_steps 2 --ask 1 "
    text += "--answer_tokens 2 --per_device_train_batch_size 4 --save_steps 1 --eval_steps 1 "
    return [*f"{text} --held_out 0.2 --learning_rate 0.01".split(), *map(str, more)]


def losses(folder):
    """Held-out losses by step, as the card has them."""
    rows = re.findall(r"^\| (\d+) \| ([\d.]+) \|", (folder / "README.md").read_text(), re.M)
    return {int(step): float(loss) for step, loss in rows}


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


# --- Without training ----------------------------------------------------------------------------


def test_an_adapter_brings_its_base_rank_scale_and_layers(base, adapter):
    for given in (["--model", adapter], ["--adapter", adapter], ["--adapter", f"{adapter}/"]):
        args, _ = parse(list(map(str, given)))
        assert args.model == str(base) and Path(args.adapter) == adapter
        assert (args.lora_r, args.lora_alpha, args.targets) == (4, 12, ["down_proj", "q_proj"])
        assert not args.train_control_tokens and not args.use_dora
    shutil.move(base, base.parent / "moved")
    args, _ = parse(["--adapter", str(adapter), "--model", str(base.parent / "moved")])
    assert args.model == str(base.parent / "moved") and args.lora_r == 4
    adapted, lora = with_adapter(args, *load(args.model))
    assert lora is None and sum(p.requires_grad for p in adapted.parameters()) == 8
    assert adapted.peft_config["default"].base_model_name_or_path == args.model
    args, _ = parse(["--model", str(base.parent / "moved")])
    assert not args.adapter and args.lora_r == 16


def test_the_variable_for_the_model_may_name_an_adapter_too(base, adapter, monkeypatch):
    monkeypatch.setenv("SFT_MODEL", str(adapter))
    args, _ = parse([])
    assert (args.model, args.adapter) == (str(base), str(adapter))
    monkeypatch.setenv("SFT_MODEL", "tiny-base")
    assert parse(["--adapter", str(adapter)])[0].model == str(base)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("--lora_r 16", r"has lora_r 4, found lora_r 16\. Leave out --lora_r"),
        (
            "--lora_r=8 --lora-alpha 16",
            "lora_r 4, lora_alpha 12, found lora_r 8, lora_alpha 16. Leave",
        ),
        (
            "--target_modules all-linear",
            "has target_modules down_proj,q_proj, found target_modules all",
        ),
        ("--use_dora", "has use_dora False, found use_dora True. Leave out --use_dora"),
        ("--train_control_tokens", "has train_control_tokens False, found .* True"),
        ("--method full", "whole model for --method full, found an adapter in .* Merge it first"),
        ("--template llama3 --plan", ""),
    ],
)
def test_other_settings_than_the_adapters_are_refused(more, said, adapter):
    asked = words("--model", adapter, *more.split(), out="run", folder=adapter.parent)
    if said:
        with pytest.raises(ValueError, match=said):
            script.main(asked)
    else:  # PEFT saves no template: any will do
        assert script.main(asked) == 0
    assert not (adapter.parent / "run").exists()


def test_the_adapters_own_settings_may_be_said_again(adapter, tmp_path):
    again = "--lora_r 4 --lora_alpha 12 --no_train_control_tokens --target_modules"
    for layers in ("q_proj, down_proj", r".*\.(q|down)_proj"):
        args, _ = parse(["--adapter", str(adapter), *again.split(), layers])
        assert args.targets == ["down_proj", "q_proj"]
    with pytest.raises(ValueError, match="target_modules that name linear layers"):
        parse(["--adapter", str(adapter), "--target_modules", "nothing"])
    (tmp_path / "my.yaml").write_text(f"adapter: {adapter}\nlora_r: 8\n")
    with pytest.raises(ValueError, match="has lora_r 4, found lora_r 8"):
        parse(["--config", str(tmp_path / "my.yaml")])


def change(adapter, **changes):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | changes))


def test_what_is_no_adapter_to_go_on_with_is_refused_in_words(base, adapter, tmp_path):
    def refused(error, match, *given):
        with pytest.raises(error, match=match):
            script.main(words(*(given or ("--adapter", adapter)), out="run", folder=tmp_path))
        assert not (tmp_path / "run").exists()

    refused(FileNotFoundError, "found none at .* hf download", "--adapter", tmp_path / "nowhere")
    refused(FileNotFoundError, "Expected an adapter in .*base, found chat", "--adapter", base)
    refused(ValueError, "a base model for --model beside", "--model", adapter, "--adapter", adapter)
    given = ("--adapter", adapter, "--output_dir", tmp_path / "up")
    shutil.copytree(adapter, tmp_path / "up/adapter")
    refused(ValueError, "another --output_dir", *given[:1], tmp_path / "up/adapter", *given[2:])
    refused(ValueError, "another --output_dir", "--model", tmp_path / "up/adapter", *given[2:])
    change(adapter, peft_type="IA3")
    refused(ValueError, "Expected a LoRA adapter in .*peft, found IA3")
    change(adapter, peft_type="LORA", base_model_name_or_path=None)
    refused(ValueError, "found none. Give --base BASE to merge it, or --model BASE --adapter")
    change(adapter, base_model_name_or_path=str(tmp_path / "moved"))
    refused(
        FileNotFoundError, "at .*moved, as the adapter says, found nothing there. .* --model BASE"
    )
    change(adapter, base_model_name_or_path="no/where")
    refused(OSError, r"Cannot load the model 'no/where'.* This is the base of the adapter .*peft")
    change(adapter, base_model_name_or_path=str(base))
    data = (adapter / "adapter_model.safetensors").read_bytes()
    (adapter / "adapter_model.safetensors").write_bytes(data[: len(data) // 2])
    refused(ValueError, "damaged or cut off")
    (adapter / "adapter_model.safetensors").unlink()
    refused(FileNotFoundError, "adapter_model.safetensors is missing")


def test_an_adapter_of_another_base_is_refused(adapter, tmp_path):
    with pytest.raises(ValueError, match="is for another base model: expected a layer"):
        script.main(words("--model", "tiny-base", "--adapter", adapter, out="a", folder=tmp_path))
    assert not (tmp_path / "a").exists()


def test_the_run_is_known_by_the_adapters_weights_and_not_by_its_place(adapter, tmp_path):
    def identity(*given):
        return run_identity(*parse(list(map(str, given))), ROWS)

    mine, other = identity("--adapter", adapter), identity("--model", tmp_path / "base")
    assert mine["adapter"] and not other["adapter"]
    shutil.copytree(adapter, tmp_path / "copy")
    assert identity("--model", tmp_path / "copy") == mine
    folder = RunFolder(tmp_path / "run", mine)
    folder.begin([])
    tensors = (tmp_path / "copy/adapter_model.safetensors").read_bytes()
    (tmp_path / "copy/adapter_model.safetensors").write_bytes(tensors[:-4] + b"abcd")
    for changed in (identity("--adapter", tmp_path / "copy"), other):
        with pytest.raises(ValueError, match="Give another --output_dir"):
            RunFolder(tmp_path / "run", changed).last_checkpoint()


def test_a_plan_counts_what_the_adapter_has(adapter, capsys):
    assert script.main(words("--adapter", adapter, "--plan", out="run", folder=adapter.parent)) == 0
    count = sum(tensor.numel() for tensor in weights(adapter).values())
    assert f", and {count:,} of the adapter, which are trained" in capsys.readouterr().out


# --- Training ------------------------------------------------------------------------------------


@pytest.mark.integration
@pytest.mark.parametrize("template", ["auto", "chatml"])
@pytest.mark.parametrize("spare", [80, 0])
def test_training_goes_on_from_the_very_weights(template, spare, tmp_path, capsys):
    """A model built as Llama 3 is; ChatML brings tokens that it lacks, and rows where none are."""
    tokens = llama3_like.tokenizer()
    random_model(tokens, tied=spare > 0, rows=len(tokens) + spare).save_pretrained(
        tmp_path / "base"
    )
    tokens.save_pretrained(tmp_path / "base")
    write_jsonl(tmp_path / "data.jsonl", ROWS)
    first = ("--model", tmp_path / "base", "--template", template)
    assert script.main(words(*first, out="one", folder=tmp_path)) == 0
    one, two = tmp_path / "one", tmp_path / "two"
    capsys.readouterr()
    further = words("--model", one / "adapter", out="two", folder=tmp_path)
    assert script.main(["--show", "1", *further]) == 0
    shown = {"auto": "llama3", "chatml": "chatml"}[template]
    assert f"Chat template: {shown}." in capsys.readouterr().out and not two.exists()
    assert script.main(further) == 0
    said = capsys.readouterr().out
    assert f"The adapter {one}/adapter is trained further." in said
    assert f"Chat template: {shown} (as the adapter was trained)" in said
    assert re.search("embeddings of [2-4] control tokens are trained", said)
    card = (two / "merged/README.md").read_text()
    assert "continued from the adapter `one/adapter`" in card and str(tmp_path) not in card
    assert losses(two / "merged")[0] == losses(one / "merged")[2]  # where the first run ended
    assert losses(two / "merged")[2] < losses(one / "merged")[2]
    assert weights(one / "adapter").keys() == weights(two / "adapter").keys()
    config = json.loads((two / "adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    merged, tokenizer = load(two / "merged")
    assert tokenizer.chat_template == (CHATML if template == "chatml" else LLAMA3)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    if template == "chatml" and not spare:
        plain.resize_token_embeddings(len(tokenizer))
    tuned = PeftModel.from_pretrained(plain, two / "adapter")
    ids = torch.tensor([encode(ROWS[0]["messages"], tokenizer)["input_ids"]])
    torch.testing.assert_close(tuned(ids).logits, merged(ids).logits, atol=1e-3, rtol=1e-3)
    if template == "chatml":
        other = words("--model", one / "adapter", "--template", out="three", folder=tmp_path)
        with pytest.raises(ValueError, match="which the adapter .* was trained, found --template"):
            script.main([*other, "llama3"])
        assert script.main([*other, "chatml", "--plan"]) == 0  # said again
        assert not (tmp_path / "three").exists()
    again = words("--model", one / "adapter", "--target_modules", out="three", folder=tmp_path)
    assert script.main([*again, "all-linear", "--plan"]) == 0  # the same layers in other words


@pytest.mark.integration
def test_an_interrupted_run_from_an_adapter_goes_on(base, adapter, tmp_path, capsys):
    asked = words("--adapter", adapter, "--no_merge", "--max_steps", 4, out="a", folder=tmp_path)
    asked += ["--save_total_limit", "9"]
    assert script.main(asked) == 0
    capsys.readouterr()
    again = [word if word != str(tmp_path / "a") else str(tmp_path / "b") for word in asked]
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for gone in ("adapter", "checkpoint-3", "checkpoint-4"):
        shutil.rmtree(tmp_path / "b" / gone)
    shutil.move(base, tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match="--model BASE --adapter"):
        script.main(again)
    shutil.move(tmp_path / "moved", base)
    assert script.main(again) == 0
    assert f"Going on from {tmp_path}/b/checkpoint-2" in capsys.readouterr().out
    whole, parts = weights(tmp_path / "a/adapter"), weights(tmp_path / "b/adapter")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    start = weights(adapter)
    assert whole.keys() == start.keys() and not any(torch.equal(whole[n], start[n]) for n in whole)


@pytest.mark.integration
def test_a_base_in_four_bits_takes_an_adapter_further(base, adapter, tmp_path, capsys):
    asked = words("--adapter", adapter, "--method", "qlora", out="q", folder=tmp_path)
    assert script.main(asked) == 0
    assert losses(tmp_path / "q/merged")[2] < losses(tmp_path / "q/merged")[0]
    assert PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), tmp_path / "q/adapter"
    )


@pytest.mark.integration
@pytest.mark.parametrize("stage", [pytest.param(2, marks=pytest.mark.nightly), 3])
def test_zero_takes_an_adapter_further(stage, adapter, tmp_path):
    config = ROOT / f"deepspeed_configs/zero{stage}.json"
    asked = words("--adapter", adapter, "--deepspeed", config, out="z", folder=tmp_path)
    command = [*map(str, TORCHRUN), "class_5_llama3.py", *asked]
    run = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert losses(tmp_path / "z/merged")[2] < losses(tmp_path / "z/merged")[0]


def test_rows_of_control_tokens_are_not_divided(adapter):
    change(adapter, trainable_token_indices={"embed_tokens": [1, 2]})
    zero3 = ["--adapter", str(adapter), "--deepspeed", "deepspeed_configs/zero3.json"]
    with pytest.raises(ValueError, match="Expected ZeRO stage 1 or 2 for the adapter"):
        check(*parse(zero3))
    assert take_settings(*parse([]), ()) is None
