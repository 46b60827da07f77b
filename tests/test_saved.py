"""What is saved after finetuning: dtype, merged model, card; which template, and why."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

from sftlib import models
from sftlib.chat import CHATML, LLAMA3, encode
from sftlib.data import read_facts, write_jsonl
from sftlib.deploy import export, merge, serving
from sftlib.deploy.portable import LLAMA3_PUBLISHED, published_template
from sftlib.evaluate import answers
from sftlib.finetune.arguments import FinetuneArguments, parse
from sftlib.finetune.card import as_merged, model_card
from sftlib.finetune.data import Data, load_data
from sftlib.finetune.model import check_thoughts, load_model, set_template, template_choice
from sftlib.finetune.save import narrow
from sftlib.models import TINY_BASE, load, read_tokenizer, stored_dtype

import pytest
import torch
import trl
from safetensors.torch import load_file

import class_5_llama3 as script
from tests import llama3_like
from tests.random_model import random_model

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
ASKED = [row["messages"][:-1] for row in read_facts("heldout")[:4]]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def base(tmp_path, tokenizer):
    """A small model, stored in `dtype`."""

    def save(dtype=torch.float32, name="base"):
        random_model(tokenizer).to(dtype).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


def dtypes(folder: Path) -> set:
    files = list(folder.glob("*.safetensors"))
    return {tensor.dtype for file in files for tensor in load_file(file).values()}


# --- The dtype -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_stored_dtype_is_that_of_the_weights(dtype, base):
    folder = base(dtype)
    assert stored_dtype(folder) == dtype
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    assert stored_dtype(folder) == dtype  # whatever the config says
    (folder / "model.safetensors").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    assert stored_dtype(folder) == dtype
    with pytest.raises(OSError, match="Cannot load the model"):
        stored_dtype(folder.parent / "nowhere")


def test_weights_in_float32_are_stored_in_16_bits_whatever_their_files(base):
    folder = base()
    wanted = {name: t.bfloat16() for name, t in load_file(folder / "model.safetensors").items()}
    model, _ = load(folder)
    model.save_pretrained(folder, max_shard_size="100KB")
    (folder / "model.safetensors").unlink()
    assert len(list(folder.glob("*.safetensors"))) > 1
    narrow(folder, torch.float32)
    assert dtypes(folder) == {torch.float32}
    narrow(folder, torch.bfloat16)
    assert dtypes(folder) == {torch.bfloat16} and stored_dtype(folder) == torch.bfloat16
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    found = load(folder, dtype=torch.bfloat16)[0].state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in wanted.items())
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in wanted.values())
    narrow(folder, torch.float16)  # nothing is widened, or rounded twice
    assert dtypes(folder) == {torch.bfloat16}


def test_16_bits_compute_as_float32_does(base):
    folder = base(torch.bfloat16)
    exact, _ = load(folder, dtype=torch.float32)
    stored, tokenizer = load(folder, dtype=torch.bfloat16)
    export.compute_in_float32(stored)
    ids = torch.tensor([encode(ASKED[0], tokenizer, add_generation_prompt=True)["input_ids"]])
    with torch.no_grad():
        expected, found = exact(ids).logits, stored(ids).logits
    assert found.dtype == torch.float32 and torch.equal(found, expected)
    assert {weight.dtype for weight in stored.parameters()} == {torch.bfloat16}
    assert answers(stored, tokenizer, ASKED, 8) == answers(exact, tokenizer, ASKED, 8)


# --- The comparison ------------------------------------------------------------------------------


def test_one_model_at_a_time_in_its_stored_dtype(base, monkeypatch):
    folder, alive, asked = base(torch.bfloat16), [], []

    def start(*_, **__):

        asked.append([reference() is None for reference in alive])
        raise RuntimeError("the server would start now")

    def loaded(name, dtype=None, **options):
        import weakref

        model, tokenizer = load(name, dtype=dtype, **options)
        alive.append(weakref.ref(model))
        assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
        return model, tokenizer

    monkeypatch.setattr(models, "load", loaded)
    monkeypatch.setattr(serving, "start", start)
    with pytest.raises(RuntimeError, match="would start now"):
        export.parity(folder, "m.gguf", ASKED, max_new_tokens=2)
    assert asked == [[True]]


@pytest.mark.parametrize(
    ("prompts", "same", "dtype", "words"),
    [
        (16, 16, "f32", ""),
        (15, 16, "f32", "Expected the same prompts .* found 15 of 16.* --template chatml"),
        (0, 16, "q8_0", "Expected the same prompts"),
        (16, 15, "f32", "Expected the same answers .* found 15 of 16. The end of the turn"),
        (16, 8, "q8_0", ""),
        (16, 7, "bf16", "found 7 of 16. If --dtype f32 .* bf16 rounds too much"),
    ],
)
def test_the_command_fails_where_the_models_differ(
    prompts, same, dtype, words, tmp_path, monkeypatch, capsys
):
    (tmp_path / "m.gguf").write_text("a model")
    monkeypatch.setattr(export, "to_gguf", lambda *_: tmp_path / "m.gguf")
    monkeypatch.setattr(export, "parity", lambda *_: export.Parity(16, prompts, same))
    monkeypatch.setattr(serving, "installed", lambda: True)
    monkeypatch.setattr(sys, "argv", ["export", str(TINY_BASE), "--dtype", dtype])
    if words:
        with pytest.raises(SystemExit) as ended:
            export.main()
        assert re.search(words, str(ended.value.code))
    else:
        export.main()
    assert f"same tokens: {prompts} of 16" in capsys.readouterr().out
    assert (tmp_path / "Modelfile").read_text().startswith("FROM ./m.gguf\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Modelfile", "m.gguf"]


def test_a_modelfile_of_another_export_stays(tmp_path):
    for _ in range(2):
        first = export.write_modelfile(TINY_BASE, tmp_path / "a.gguf")
        assert first == tmp_path / "Modelfile" and "FROM ./a.gguf" in first.read_text()
        second = export.write_modelfile(TINY_BASE, tmp_path / "b.gguf")
        assert second == tmp_path / "b.gguf.Modelfile" and "FROM ./b.gguf" in second.read_text()
    assert len(list(tmp_path.iterdir())) == 2


def test_without_a_server_the_command_says_that_nothing_was_compared(tmp_path, monkeypatch, capsys):
    (tmp_path / "m.gguf").write_text("a model")
    monkeypatch.setattr(export, "to_gguf", lambda *_: tmp_path / "m.gguf")
    monkeypatch.setattr(serving, "installed", lambda: False)
    monkeypatch.setattr(sys, "argv", ["export", str(TINY_BASE)])
    export.main()
    assert "Not compared" in capsys.readouterr().out


# --- Merging -------------------------------------------------------------------------------------


@pytest.fixture
def adapter(tmp_path, tokenizer):
    """An adapter that changes what its base answers, and its tokenizer with two new tokens."""
    from peft import LoraConfig, get_peft_model

    def save(base_folder, template=CHATML):
        model, words = load(base_folder, dtype=torch.float32)
        words.chat_template = template
        peft = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
        torch.manual_seed(1)
        for name, weight in peft.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.5)
        peft.save_pretrained(tmp_path / "adapter")
        words.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter"

    return save


def command(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["merge", *map(str, words)])
    merge.main()


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_adapter_is_merged_in_the_dtype_of_its_base(dtype, base, adapter, tmp_path, monkeypatch):
    from sftlib.adapters import load_adapter

    folder = adapter(base(dtype), LLAMA3)
    command(monkeypatch, folder, tmp_path / "a/new/merged")  # no folder of these is there
    assert dtypes(tmp_path / "a/new/merged") == {dtype}
    merged, tokenizer = load(tmp_path / "a/new/merged")
    assert tokenizer.chat_template == LLAMA3
    assert (tmp_path / "a/new/merged/chat_template.jinja").read_text() == published_template(
        read_tokenizer(folder)
    )
    apart = load_adapter(load(tmp_path / "base")[0], folder)
    ids = torch.tensor([encode(ASKED[0], tokenizer, add_generation_prompt=True)["input_ids"]])
    with torch.no_grad():
        error = (merged(ids).logits - apart(ids).logits).abs().max()
    assert error < (1e-4 if dtype == torch.float32 else 0.2)
    end = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert end in merged.generation_config.eos_token_id


def test_a_merge_finds_a_base_that_has_moved(base, adapter, tmp_path, monkeypatch):
    folder = adapter(base())
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(OSError, match=r"(?s)Cannot load the model.*base"):
        command(monkeypatch, folder, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    command(monkeypatch, folder, tmp_path / "merged", "--base", tmp_path / "elsewhere")
    assert (tmp_path / "merged/model.safetensors").exists()


def test_a_merge_into_a_folder_that_is_there_is_refused(base, adapter, tmp_path, monkeypatch):
    folder = adapter(base())
    with pytest.raises(FileExistsError, match="Expected a new folder"):
        command(monkeypatch, folder, tmp_path)
    with pytest.raises(FileNotFoundError, match="Expected an adapter"):
        command(monkeypatch, tmp_path / "base", tmp_path / "merged")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": None})
    )
    with pytest.raises(ValueError, match="Give --base"):
        command(monkeypatch, folder, tmp_path / "merged")


def test_tokens_that_were_added_come_with_the_merged_model(base, adapter, tmp_path, monkeypatch):
    folder = adapter(base())
    words = read_tokenizer(folder)
    words.add_special_tokens({"extra_special_tokens": ["<|new|>"]})
    words.save_pretrained(folder)
    command(monkeypatch, folder, tmp_path / "merged")
    model, tokenizer = load(tmp_path / "merged")
    assert model.get_input_embeddings().num_embeddings == len(tokenizer) == len(words)


# --- The template --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def like(tmp_path_factory):
    return llama3_like.save(tmp_path_factory.mktemp("like"))


def test_the_template_is_named_with_its_reason(like, base, tmp_path):
    def choice(folder, template, own=None):
        if own:
            (folder / "chat_template.jinja").write_text(own)
        args = FinetuneArguments(model=str(folder), template=template)
        model, tokenizer = load(folder)
        set_template(model, tokenizer, args)
        return template_choice(tokenizer, args)

    own, other = LLAMA3_PUBLISHED, (TEMPLATES / "llama3_1.jinja").read_text()
    r1 = (TEMPLATES / "deepseek_r1_distill.jinja").read_text()
    said = choice(like, "auto", own)
    assert said.startswith("llama3 (auto: the tokenizer has <|eot_id|>). It writes the same as")
    for replaced in (other, r1):
        said = choice(like, "auto", replaced)
        assert said.startswith("llama3 (auto: ") and "replaces the model's own, which" in said
    said = choice(like, "llama3", r1)
    assert said.startswith("llama3 (as --template says). It replaces")
    assert choice(like, "own", own) == "own (as --template says)."
    said = choice(like, "chatml", own)
    assert said.startswith("chatml (as --template says). It replaces the model's own")


def test_the_log_names_the_template(like, capsys):
    args, training = parse(["--model", str(like), "--template", "chatml"])
    (like / "chat_template.jinja").write_text(LLAMA3_PUBLISHED)
    load_model(args, training)
    assert "Chat template: chatml (as --template says)." in capsys.readouterr().out


THOUGHTS = "<think>\nhm\n</think>\n\nFour."


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize(
    ("name", "answer", "words"),
    [
        ("qwen3", THOUGHTS, "found both"),
        ("qwen3_5_think", THOUGHTS, "found both"),
        ("glm4moe", THOUGHTS, "found both"),
        ("nemotron_3_nano", THOUGHTS, "found both"),
        ("qwen3_8", THOUGHTS, "found both"),
        ("qwen3", "Four.", ""),
        ("qwen3_5_think", "Four.", ""),
        ("deepseek_r1_distill", "Four.", r"ends in '.*<think>\\n'"),
        ("deepseekv3", "Four.", r"ends in '.*<think>\\n'"),
        ("nemotron_3_nano", "Four.", r"ends in '.*<think>\\n'"),
        ("deepseek_r1_distill", THOUGHTS, r"ends in '.*<think>\\n'"),
    ],
)
def test_a_template_that_thinks_itself_must_go_with_the_answers(
    name, answer, words, special, tokenizer
):
    """An answer that spells `<think>` is text, and the template adds its own.

    Thoughts go to `reasoning_content`, where reading puts them.
    """
    tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text()
    if special:
        tokenizer.add_tokens(["<think>", "</think>"])
    rows = [{"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant"}]}]
    rows[0]["messages"][1]["content"] = answer
    if words:
        with pytest.raises(ValueError, match=f"(?s){words}.*--template chatml"):
            check_thoughts(tokenizer, rows)
    else:
        check_thoughts(tokenizer, rows)
    tokenizer.chat_template = CHATML
    check_thoughts(tokenizer, rows)


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("name", ["qwen3", "qwen3_5_think", "glm4moe", "nemotron_3_nano"])
def test_thoughts_of_their_own_key_go_where_the_template_thinks(name, special, tokenizer):
    tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text()
    if special:
        tokenizer.add_tokens(["<think>", "</think>"])
    answer = {"role": "assistant", "content": "Four.", "reasoning_content": "hm"}
    check_thoughts(tokenizer, [{"messages": [{"role": "user", "content": "2 + 2?"}, answer]}])


def test_one_row_with_thoughts_among_many_is_found(tokenizer):
    tokenizer.chat_template = (TEMPLATES / "qwen3.jinja").read_text()
    tokenizer.add_tokens(["<think>", "</think>"])
    turn = {"role": "user", "content": "2 + 2?"}
    rows = [{"messages": [turn, {"role": "assistant", "content": "4"}]}] * 500
    check_thoughts(tokenizer, rows)
    rows.append({"messages": [turn, {"role": "assistant", "content": THOUGHTS}]})
    with pytest.raises(ValueError, match="found both"):
        check_thoughts(tokenizer, rows)


def test_thoughts_that_the_script_reads_are_written_once(tmp_path, tokenizer):
    """Reading takes them out of the text, so that the template of a reasoning model writes them."""
    asked = {"role": "user", "content": "2 + 2?"}
    rows = [{"messages": [asked, {"role": "assistant", "content": THOUGHTS}]}] * 2
    write_jsonl(tmp_path / "data.jsonl", rows)
    data = load_data(FinetuneArguments(data=str(tmp_path / "data.jsonl"), held_out="0"))
    tokenizer.chat_template = (TEMPLATES / "qwen3.jinja").read_text()
    tokenizer.add_tokens(["<think>", "</think>"])
    check_thoughts(tokenizer, data.train)
    text = tokenizer.decode(encode(data.train[0]["messages"], tokenizer)["input_ids"])
    assert text.count("<think>") == 1 == text.count("</think>")


# --- The card ------------------------------------------------------------------------------------


@pytest.fixture
def card(tokenizer):
    def write(*words, data=None, folder=None, template=CHATML, adapter=""):
        args, training = parse(list(map(str, words)))
        args.adapter = adapter
        args.model = args.model or "tiny-base"
        training.learning_rate = 1e-3
        tokenizer.chat_template = template
        state = SimpleNamespace(log_history=[], best_global_step=None, global_step=3)
        trainer = SimpleNamespace(args=training, state=state, processing_class=tokenizer)
        rows = data or Data([{}] * 30, [{}] * 4, [])
        return model_card(args, training, trainer, rows, folder)

    return write


def test_the_card_names_data_and_where_the_held_out_ones_are_from(card, tmp_path):
    assert "30 conversations of `sft.jsonl`; 4 held out, the course's own file." in card()
    (tmp_path / "mine.jsonl").write_text("")
    said = card("--data", tmp_path / "mine.jsonl", data=Data([{}], [{}], [{}] * 3))
    assert "1 conversations of `mine.jsonl`; 1 held out, of the same data." in said
    assert "3 records were refused." in said and str(tmp_path) not in said
    said = card("--data", "org/set", "--data_config", "en", "--held_out", tmp_path / "mine.jsonl")
    assert "`org/set`, `en`, `train`; 4 held out, of `mine.jsonl`." in said
    assert str(tmp_path) not in said


def test_the_card_names_the_template_and_its_reason(card):
    said = card("--template", "chatml")
    assert "**Chat template**: chatml (as --template says)." in said
    assert "**Chat template**: llama3 (auto: the tokenizer" in card(template=LLAMA3)


def test_the_card_names_the_adapter_that_training_went_on_from_and_not_where_it_lies(card):
    assert "continued from" not in card()
    for folder in ("/home/me/runs/one/adapter", "one/adapter"):
        assert "continued from the adapter `one/adapter`" in card(adapter=folder)


def test_the_card_says_whether_the_merged_model_exists(card):
    assert "a whole model, all parameters trained" in card("--method", "full")
    whole, part, alone = card(), card(folder="adapter"), card("--no_merge")
    assert "the adapter is merged into the base" in whole
    assert "The merged model is in the folder `merged`" in part
    assert "It is not merged; `sftlib.deploy.merge`" in alone
    libraries = [re.findall("library_name: (.*)", text)[0] for text in (whole, part, alone)]
    assert libraries == ["transformers", "peft", "peft"]
    assert as_merged(part) == as_merged(alone) == whole


# --- A run ---------------------------------------------------------------------------------------


@pytest.fixture
def facts(tmp_path):
    path = tmp_path / "facts.jsonl"
    write_jsonl(path, [{"messages": row["messages"]} for row in read_facts("sft")[:96]])
    return path


@pytest.mark.integration
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--method", "full"], {"model"}),
        ([], {"adapter", "merged"}),
        (["--no_merge"], {"adapter"}),
    ],
)
def test_a_run_leaves_what_its_cards_say(words, expected, facts, tmp_path, monkeypatch):
    assert stored_dtype("tiny-base") == torch.bfloat16
    out = tmp_path / "run"
    arguments = ["--data", facts, "--max_steps", "2", "--ask", "1", "--output_dir", out, *words]
    assert script.main([str(word) for word in arguments]) == 0
    folders = {path.parent.name for path in out.glob("*/chat_template.jinja")}
    folders = {name for name in folders if "checkpoint" not in name}
    assert folders == expected
    for folder in folders:
        text = (out / folder / "README.md").read_text()
        assert ("folder `merged`" in text) == (folder == "adapter" and not words)
        assert ("not merged" in text) == (words == ["--no_merge"])
        assert str(tmp_path) not in text and str(TINY_BASE) not in text
        template = (out / folder / "chat_template.jinja").read_text()
        assert template == LLAMA3_PUBLISHED.replace("bos_token", "'<|begin_of_text|>'")
        if folder != "adapter":
            assert dtypes(out / folder) == {torch.bfloat16}
    if words == ["--no_merge"]:
        command(monkeypatch, out / "adapter", tmp_path / "later")
        assert dtypes(tmp_path / "later") == {torch.bfloat16}
        assert "merged into the base" in (tmp_path / "later/README.md").read_text()
        assert load(tmp_path / "later")[1].chat_template == LLAMA3
