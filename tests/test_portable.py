"""What a saved model tells other programs: its chat template, BOS, stop tokens, a Modelfile."""

import json
import re
from pathlib import Path

from sftlib.chat import CHATML, LLAMA3, encode, end_of_turn_id
from sftlib.chat.templates import render_marked
from sftlib.deploy import portable
from sftlib.deploy.portable import make_portable, modelfile, published_template
from sftlib.models import TINY_BASE, read_tokenizer

import pytest
import trl
from hypothesis import given
from hypothesis import strategies as st
from rapidfuzz.distance import Levenshtein

from tests import llama3_like

OLLAMA = json.loads((Path(__file__).parent / "data/ollama_templates.json").read_text())
ZEPHYR = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"


def nearest(template: str) -> tuple[int, str]:
    """As Ollama's `Named` finds it."""
    return min((Levenshtein.distance(template, k["template"]), k["name"]) for k in OLLAMA["known"])


@pytest.fixture(scope="module")
def like():
    """A tokenizer that begins every text with <|begin_of_text|>, as Llama 3's does."""
    return llama3_like.tokenizer()


@pytest.fixture
def folder(tmp_path, like):
    """Its folder, after `template` was set."""

    def save(template, tokenizer=like):
        before, tokenizer.chat_template = tokenizer.chat_template, template
        if "im_end" in template and "<|im_end|>" not in tokenizer.get_vocab():
            tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        tokenizer.save_pretrained(tmp_path)
        tokenizer.chat_template = before
        return tmp_path

    return save


# --- The template --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "name", "before"), [(CHATML, "chatml", 144), (LLAMA3, "llama3-instruct", 172)]
)
def test_ollama_knows_the_template_that_is_saved(ours, name, before, folder):
    assert nearest(ours) == (before, name) and before >= OLLAMA["below"]
    for tokenizer in (None, read_tokenizer(TINY_BASE)):
        path = folder(ours, *[tokenizer] * bool(tokenizer))
        make_portable(path)
        distance, known = nearest((path / "chat_template.jinja").read_text())
        # A tokenizer that has no BOS needs its name in the template.
        assert (distance, known) == (15 * (ours == LLAMA3 and tokenizer is not None), name)
        assert distance < OLLAMA["below"]


CONTENT = st.text(max_size=40) | st.sampled_from(["", " \n", "\n a \n", "{{ x }}", "<|im_end|>"])


@given(st.lists(CONTENT, min_size=1, max_size=5), st.none() | CONTENT)
def test_the_published_template_writes_what_ours_does(contents, system):
    roles = ("user", "assistant") * 3
    messages = [
        {"role": role, "content": text} for role, text in zip(roles, contents, strict=False)
    ]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    for bos in ("<|begin_of_text|>", None, "<s>"):
        for ours in (CHATML, LLAMA3):
            tokenizer = type("T", (), {"chat_template": ours, "bos_token": bos})()
            theirs, special = published_template(tokenizer), {"bos_token": bos or ""}
            for prompt in (False, True):
                texts = [
                    render_marked(messages, one, prompt, **special)[0] for one in (ours, theirs)
                ]
                assert texts[0] == texts[1] and "generation %}" not in theirs


def test_a_template_of_another_kind_is_saved_to_the_letter(folder):
    path = folder(ZEPHYR)
    make_portable(path)
    assert (path / "chat_template.jinja").read_text() == ZEPHYR


def test_a_linked_file_is_replaced_and_its_target_stays(folder, tmp_path_factory):
    path, other = folder(CHATML), tmp_path_factory.mktemp("copy")
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    for file in path.iterdir():
        (other / file.name).symlink_to(file)
    make_portable(other)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    assert (other / "chat_template.jinja").read_text() == portable.CHATML_PUBLISHED
    make_portable(other / "nothing")  # a folder without a tokenizer


# --- BOS -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "adds"), [(CHATML, False), (LLAMA3, True), (ZEPHYR, False), (None, True)]
)
def test_bos_begins_a_prompt_only_where_the_template_writes_it(template, adds, folder):
    path = folder(template or llama3_like.TEMPLATE.read_text())
    make_portable(path)
    settings = json.loads((path / "tokenizer_config.json").read_text())
    assert settings["add_bos_token"] is adds and settings["add_eos_token"] is False
    messages = [{"role": "user", "content": "Hello"}]
    tokenizer = read_tokenizer(path)
    ids = encode(messages, tokenizer, add_generation_prompt=True)["input_ids"]
    assert (ids[0] == tokenizer.bos_token_id) is adds


# --- The Modelfile -------------------------------------------------------------------------------


def go(template: str, messages: list[dict]) -> str:
    """What Go's text/template makes of a template with one `range .Messages`."""
    template = re.sub(r"\s*\{\{- ", "{{ ", template)
    before, body, after = re.split(r"\{\{ range .Messages \}\}|\{\{ end \}\}", template)
    turns = [
        body.replace("{{ .Role }}", m["role"]).replace("{{ .Content }}", m["content"])
        for m in messages
    ]
    return before + "".join(turns) + after


MESSAGES = [
    {"role": role, "content": f"{role}, {n}"}
    for n, role in enumerate(["system", "user", "assistant", "user"])
]


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize(("ours", "name"), [(CHATML, "chatml"), (LLAMA3, "llama3-instruct")])
@pytest.mark.parametrize("adds_bos", [True, False])
def test_the_modelfile_prompts_as_the_template_does(ours, name, adds_bos, published, folder):
    path = folder(ours, *([] if adds_bos else [read_tokenizer(TINY_BASE)]))
    if published:
        make_portable(path)
    text = modelfile(path, "m.gguf")
    assert text.startswith("FROM ./m.gguf\n")
    (template,) = re.findall(r'(?s)^TEMPLATE """(.*?)"""$', text, flags=re.M)
    assert template.removeprefix("<|begin_of_text|>") == OLLAMA["go"][name]
    for messages in (MESSAGES, MESSAGES[1:2], MESSAGES[1:]):
        expected, _ = render_marked(messages, ours, True)
        if adds_bos:  # then Ollama's tokenizer writes it
            expected = expected.removeprefix("<|begin_of_text|>")
        assert go(template, messages) == expected


def test_the_modelfile_names_each_stop_token_once(folder):
    path = folder(LLAMA3)
    tokenizer = read_tokenizer(path)
    turn, other = end_of_turn_id(tokenizer), tokenizer.convert_tokens_to_ids("<|eom_id|>")
    stops = lambda: re.findall(r'PARAMETER stop "(.*)"', modelfile(path, "m.gguf"))  # noqa: E731
    assert stops() == ["<|end_of_text|>", "<|eot_id|>"]
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [turn, other]}))
    assert stops() == ["<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"]


def test_the_modelfile_says_so_where_ollama_must_know_the_template(folder):
    gemma = Path(trl.__file__).parent / "chat_templates" / "gemma.jinja"  # no system message
    for template in (ZEPHYR, gemma.read_text()):
        text = modelfile(folder(template), "m.gguf")
        assert "# No TEMPLATE" in text and '"""' not in text and "PARAMETER stop" in text
