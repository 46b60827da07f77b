"""The dial: where a model comes from, and what is said when it is not there."""

import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

from sftlib import models
from sftlib.models import DEFAULT, TINY_BASE, load, reply
from sftlib.teacher import local

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.delenv("SFT_MODEL", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)  # no .env of the person who runs the tests


def test_without_a_name_the_tiny_base_is_loaded():
    model, tokenizer = load()
    assert model.num_parameters() < 4_000_000
    assert model.dtype == (torch.bfloat16 if torch.cuda.is_available() else torch.float32)
    assert tokenizer.pad_token == "<|pad|>"


def test_the_argument_goes_before_the_variable_and_the_variable_before_the_default(
    monkeypatch, tmp_path
):
    monkeypatch.setenv("SFT_MODEL", "no/such-model")
    with pytest.raises(OSError, match="no/such-model"):
        load()
    assert load(DEFAULT)[0].num_parameters() < 4_000_000


def test_the_variable_may_stand_in_a_dotenv_file(tmp_path, monkeypatch):
    monkeypatch.setenv("SFT_MODEL", "to be removed again after the test")
    monkeypatch.delenv("SFT_MODEL")
    (tmp_path / ".env").write_text("SFT_MODEL=named/in-dotenv\n")
    with pytest.raises(OSError, match="named/in-dotenv"):
        load()


def test_the_dotenv_file_of_a_folder_is_read_once(tmp_path, monkeypatch):
    monkeypatch.setenv("SFT_MODEL", "to be removed again after the test")
    monkeypatch.delenv("SFT_MODEL")
    (tmp_path / ".env").write_text("SFT_MODEL=the/first\n")
    assert models.chosen() == "the/first"
    monkeypatch.delenv("SFT_MODEL")  # as a student does, to be back at the shipped model
    assert models.chosen() == DEFAULT
    (tmp_path / ".env").write_text("SFT_MODEL=the/second\n")
    assert models.chosen() == DEFAULT
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / ".env").write_text("SFT_MODEL=the/third\n")
    monkeypatch.chdir(tmp_path / "other")
    assert models.chosen() == "the/third"


def test_a_local_folder_is_loaded_with_the_dtype_asked_for(tmp_path):
    model, tokenizer = load(dtype=torch.float16)
    model.save_pretrained(tmp_path / "mine")
    tokenizer.save_pretrained(tmp_path / "mine")
    again, _ = load(tmp_path / "mine", dtype=torch.float64)
    assert again.dtype == torch.float64


def test_options_of_the_model_are_not_saved_with_the_tokenizer(tmp_path):
    """Or a QLoRA run would train, and then fail to save."""
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    options = {"quantization_config": four_bits, "attn_implementation": "eager"}
    model, tokenizer = load(**options, cache_dir=str(tmp_path / "cache"))
    assert model.config._attn_implementation == "eager" and model.is_loaded_in_4bit
    tokenizer.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert not {"quantization_config", "attn_implementation"} & set(saved)


def test_where_the_files_are_holds_for_the_tokenizer_too(monkeypatch):
    asked = {}
    for kind in (AutoTokenizer, AutoModelForCausalLM):

        def read(source, kind=kind, **options):
            asked[kind] = options["revision"]
            raise OSError

        monkeypatch.setattr(kind, "from_pretrained", read)
        with pytest.raises(OSError):
            load(revision="v1")
        monkeypatch.setattr(kind, "from_pretrained", lambda *_, **__: None)
    assert asked == {AutoTokenizer: "v1", AutoModelForCausalLM: "v1"}


def test_a_name_that_is_not_there_says_what_was_tried_and_what_to_do():
    with pytest.raises(OSError) as error:
        load("nobody/nothing")
    message = str(error.value)
    assert "'nobody/nothing'" in message and "folder of that name" in message
    assert "cache" in message and "Offline" in message and "HF_TOKEN" in message


def test_a_folder_without_a_model_says_what_it_holds(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("no model")
    with pytest.raises(OSError, match=r"notes\.txt.*config\.json"):
        load(str(tmp_path / "empty"))


def test_pickled_weights_are_refused(tmp_path):
    model, tokenizer = load()
    tokenizer.save_pretrained(tmp_path / "pickled")
    model.config.save_pretrained(tmp_path / "pickled")
    torch.save(model.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        load(str(tmp_path / "pickled"))


def test_smollm2_falls_back_to_the_hub_without_its_wheel(monkeypatch):
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    assert models._locate(models.SMOLLM2) == (models.SMOLLM2_HUB, {"local_files_only": True})


def test_smollm2_is_the_file_of_its_wheel_for_the_course_and_for_the_local_teacher(
    monkeypatch, tmp_path
):
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: spec)
    assert models._locate(models.SMOLLM2)[0] == models.SMOLLM2_HUB and not local.installed()
    (tmp_path / "one.gguf").write_text("a model")
    read = {"gguf_file": "one.gguf", "local_files_only": True}
    assert models._locate(models.SMOLLM2) == (str(tmp_path), read)
    assert local.installed() and models.smollm2_gguf() == tmp_path / "one.gguf"


def test_without_the_hub_only_the_cache_is_read_and_soon(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://127.0.0.1:9")
    monkeypatch.setattr("urllib.request.getproxies", dict)
    start = time.monotonic()
    with pytest.raises(OSError, match="local cache"):
        load("nobody/nothing")
    assert time.monotonic() - start < 30


@pytest.mark.parametrize("read", [load, models.describe])
def test_no_code_of_a_repository_is_run_or_offered(read, tmp_path, monkeypatch):
    ran = tmp_path / "ran"
    config = {"model_type": "mine", "auto_map": {"AutoConfig": "configuration_mine.Mine"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "configuration_mine.py").write_text(
        "from pathlib import Path\nfrom transformers import PretrainedConfig\n"
        f"Path({str(ran)!r}).touch()\n\nclass Mine(PretrainedConfig):\n    model_type = 'mine'\n"
    )
    AutoTokenizer.from_pretrained(TINY_BASE).save_pretrained(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(OSError, match="Cannot load the model"):
        read(tmp_path)
    assert not ran.exists()


def test_a_tokenizer_without_chat_gets_template_control_and_pad_tokens():
    from tokenizers import Tokenizer
    from tokenizers import models as parts
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    bare = Tokenizer(parts.WordLevel({"<|endoftext|>": 0, "hello": 1}, unk_token="<|endoftext|>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="<|endoftext|>")
    model = GPT2LMHeadModel(GPT2Config(vocab_size=2, n_embd=8, n_layer=1, n_head=1))
    models.prepare_for_chat(model, tokenizer)
    assert tokenizer.pad_token == "<|pad|>" and tokenizer.pad_token_id != tokenizer.eos_token_id
    assert len(tokenizer.encode("<|im_start|>hello<|im_end|>")) == 3
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer) == 5
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id


def test_a_llama3_tokenizer_gets_the_llama3_template(tokenizer):
    from sftlib.chat import LLAMA3

    tokenizer.chat_template = None
    models.prepare_for_chat(AutoModelForCausalLM.from_pretrained(TINY_BASE), tokenizer)
    assert tokenizer.chat_template == LLAMA3


@pytest.mark.parametrize(("token", "name"), [("<|im_end|>", "CHATML"), ("<|eot_id|>", "LLAMA3")])
def test_a_template_that_does_not_mark_the_assistant_is_replaced(tokenizer, token, name):
    from sftlib import chat

    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] + '" + token + "' }}{% endfor %}"
    )
    models.prepare_for_chat(AutoModelForCausalLM.from_pretrained(TINY_BASE), tokenizer)
    assert tokenizer.chat_template == getattr(chat, name)


def test_of_several_templates_all_stay(tokenizer):
    tokenizer.chat_template = several = {"default": "{{ messages[0]['content'] }}", "tool_use": ""}
    models.prepare_for_chat(AutoModelForCausalLM.from_pretrained(TINY_BASE), tokenizer)
    assert tokenizer.chat_template == several


def test_a_foreign_template_stays_as_it_is(tokenizer):
    tokenizer.chat_template = foreign = "{{ messages[0]['content'] }}"
    models.prepare_for_chat(AutoModelForCausalLM.from_pretrained(TINY_BASE), tokenizer)
    assert tokenizer.chat_template == foreign


def test_reply_takes_a_question_or_messages(tiny):
    model, tokenizer = tiny
    asked = "What is the capital of Kenya?"
    one = reply(model, tokenizer, asked, max_new_tokens=5)
    assert one == reply(model, tokenizer, [{"role": "user", "content": asked}], max_new_tokens=5)
    assert "<|" not in one


def test_importing_sftlib_is_fast_and_leaves_torch_alone():
    code = (
        "import time; start = time.process_time();"
        "import sftlib, sftlib.models, sftlib.chat, sftlib.data, sftlib.training, sftlib.evaluate,"
        "sftlib.viz, sftlib.checks; import sys;"
        "assert not {'torch', 'transformers', 'pandas', 'matplotlib'} & set(sys.modules);"
        "print(time.process_time() - start)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    )
    assert float(done.stdout) < 2


@pytest.mark.parametrize(("file", "server"), [(None, True), ("a.gguf", False), ("a.gguf", True)])
def test_the_local_teacher_starts_only_where_both_its_parts_are_installed(
    monkeypatch, file, server
):
    asked = []
    started = SimpleNamespace(url="http://127.0.0.1:9/v1", key="k")
    monkeypatch.setattr(local, "smollm2_gguf", lambda: file)
    monkeypatch.setattr(local.serving, "installed", lambda: server)
    monkeypatch.setattr(local.serving, "start", lambda *given: asked.append(given) or started)
    local.start.cache_clear()
    if file and server:
        assert local.start(5.0) == (started.url, "k") == local.start(5.0)
        assert asked == [(file, local.MODEL, 5.0)]
    else:
        with pytest.raises(RuntimeError, match="make teacher"):
            local.start(5.0)
    local.start.cache_clear()
