"""Chat templates and masks, with the expected text and ids written out."""

import random
import re
import warnings
from pathlib import Path

from sftlib.chat import (
    CHATML,
    IGNORED,
    LLAMA3,
    encode,
    encode_batch,
    end_of_turn_id,
    marks_the_assistant,
    random_conversation,
    render,
    training_template,
    trl_templates,
)
from sftlib.data import validate

import pytest
import trl
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is the capital of Kenya?"},
    {"role": "assistant", "content": "The capital of Kenya is Nairobi."},
    {"role": "user", "content": "And of Peru?"},
    {"role": "assistant", "content": "Lima."},
]


def test_chatml_is_rendered_to_the_letter():
    assert render(MESSAGES[1:3]) == (
        "<|im_start|>user\nWhat is the capital of Kenya?<|im_end|>\n"
        "<|im_start|>assistant\nThe capital of Kenya is Nairobi.<|im_end|>\n"
    )


def test_the_generation_prompt_opens_the_assistants_turn():
    assert render(MESSAGES[1:2], add_generation_prompt=True) == (
        "<|im_start|>user\nWhat is the capital of Kenya?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_llama3_is_rendered_to_the_letter():
    assert render(MESSAGES[1:3], LLAMA3) == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n"
        "What is the capital of Kenya?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
        "The capital of Kenya is Nairobi.<|eot_id|>"
    )


@pytest.mark.parametrize(("template", "end"), [(CHATML, "<|im_end|>"), (LLAMA3, "<|eot_id|>")])
def test_exactly_the_assistants_text_and_its_end_are_learned(tokenizer, template, end):
    tokenizer.chat_template = template
    encoded = encode(MESSAGES, tokenizer)
    ids, mask = encoded["input_ids"], encoded["assistant_masks"]
    assert len(ids) == len(mask)
    learned = tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m])
    labels = [i if m else IGNORED for i, m in zip(ids, mask, strict=True)]
    assert encoded["labels"] == labels
    assert learned == f"The capital of Kenya is Nairobi.{end}Lima.{end}"
    assert tokenizer.decode(ids) == render(MESSAGES, template)


def test_a_short_conversation_id_by_id(tokenizer):
    pieces = "<|im_start|>,user,\n,An,d, of, ,P,er,u,?,<|im_end|>,\n,"
    pieces += "<|im_start|>,assistant,\n,L,im,a,.,<|im_end|>,\n"
    assert encode(MESSAGES[3:], tokenizer) == {
        "input_ids": [2, 965, 212, 598, 81, 1908, 234, 61, 284, 98, 44, 3, 212]
        + [2, 967, 212, 57, 457, 78, 27, 3, 212],
        "assistant_masks": [0] * 16 + [1, 1, 1, 1, 1] + [0],
        "labels": [-100] * 16 + [57, 457, 78, 27, 3] + [-100],
    }
    decoded = [tokenizer.decode([i]) for i in encode(MESSAGES[3:], tokenizer)["input_ids"]]
    assert decoded == pieces.split(",")


def test_control_tokens_are_single_ids(tokenizer):
    for token in ("<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>", "<|pad|>"):
        assert len(tokenizer.encode(token, add_special_tokens=False)) == 1
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_any_text_survives_encoding_and_decoding(tokenizer):
    for text in ("Bogotá, Łódź, 東京 🙂", "  two  spaces\n\ttab", "12345 +254", ""):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_max_length_keeps_the_first_tokens_and_warns_of_what_is_lost(tokenizer):
    whole = encode(MESSAGES, tokenizer)
    lost = "1 of 1 conversations .* max_length=32 tokens .* cut: 14 of 19 tokens to learn are lost"
    with pytest.warns(UserWarning, match=lost):
        cut = encode(MESSAGES, tokenizer, max_length=32)
    assert cut == {column: row[:32] for column, row in whole.items()}
    short = MESSAGES[3:]
    with pytest.warns(UserWarning, match="1 of 2 conversations .* cut: 14 of 24 tokens"):
        both = encode_batch([short, MESSAGES], tokenizer, max_length=32)
    assert both == {column: [row, cut[column]] for column, row in encode(short, tokenizer).items()}


def test_what_fits_is_kept_without_a_warning(tokenizer):
    whole = encode(MESSAGES, tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert encode(MESSAGES, tokenizer, max_length=len(whole["input_ids"])) == whole


@pytest.mark.parametrize("max_length", [16, 1, 0, -1])
def test_a_max_length_that_leaves_nothing_to_learn_is_refused(tokenizer, max_length):
    message = f"the first max_length={max_length} tokens, found none: there are 22, .*Raise max_le"
    with pytest.raises(ValueError, match=message):
        encode(MESSAGES[3:], tokenizer, max_length=max_length)
    with pytest.raises(ValueError, match="^Conversation 2 of 2: Expected something to learn"):
        encode_batch([MESSAGES[3:], MESSAGES[1:]], tokenizer, max_length=17)


def test_a_prompt_is_never_cut(tokenizer):
    prompt = MESSAGES[3:4]
    whole = encode(prompt, tokenizer, add_generation_prompt=True)
    assert encode(prompt, tokenizer, max_length=3, add_generation_prompt=True) == whole
    assert tokenizer.decode(whole["input_ids"]) == render(prompt, add_generation_prompt=True)
    assert whole["assistant_masks"] == [0] * len(whole["input_ids"])
    assert whole["labels"] == [-100] * len(whole["input_ids"])


def test_the_end_of_turn_follows_the_template(tokenizer):
    assert tokenizer.decode([end_of_turn_id(tokenizer)]) == "<|im_end|>"
    tokenizer.chat_template = LLAMA3
    assert tokenizer.decode([end_of_turn_id(tokenizer)]) == "<|eot_id|>"
    marked = CHATML.replace(
        "'<|im_end|>' }}{% endgeneration %}", "'' }}{% endgeneration %}<|im_end|>"
    )
    for without_end in (marked, "{{ messages[0]['content'] }}", None):
        tokenizer.chat_template = without_end
        assert end_of_turn_id(tokenizer) == tokenizer.eos_token_id


@pytest.mark.parametrize(
    "options",
    [
        {"padding": "max_length", "max_length": 64},
        {"truncation": True, "max_length": 3},
        {"split_special_tokens": True},
    ],
)
def test_what_an_earlier_call_asked_of_the_tokenizer_changes_nothing(tokenizer, options):
    expected = encode_batch([MESSAGES, MESSAGES[3:]], tokenizer)
    tokenizer(["What is", "the capital of Kenya?"], **options)
    assert encode_batch([MESSAGES, MESSAGES[3:]], tokenizer) == expected


def test_a_character_of_several_tokens_is_learned_to_its_end(tokenizer):
    """Also where the mark of the template ends behind it, not behind a token."""
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] + '\n' }}"
        "{% generation %}{{ m['content'] }}{% endgeneration %}!<|im_end|>{% endfor %}"
    )
    encoded = encode([MESSAGES[3], {"role": "assistant", "content": "🙂<|im_end|>🙂"}], tokenizer)
    learned = [i for i in encoded["labels"] if i != IGNORED]
    assert tokenizer.decode(learned) == "And of Peru?🙂<|im_end|>🙂"


@pytest.mark.parametrize("answer", [" Lima", "\nLima ", "Lima <|im_end|> Lima\n", "\n<|im_end|> "])
def test_characters_that_the_tokenizer_drops_are_no_obstacle(answer):
    """A tokenizer of words has no token for white space."""
    words = ["<unk>", "user", "assistant", "Peru", "Lima"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.chat_template = CHATML
    encoded = encode([{**MESSAGES[1], "content": "Peru"}, {**A, "content": answer}], tokenizer)
    assert encoded["input_ids"][:6] == [5, 1, 3, 6, 5, 2]
    assert encoded["assistant_masks"] == [0] * 6 + [1] * (len(encoded["input_ids"]) - 6)
    assert encoded["input_ids"][6:].count(4) == answer.count("Lima")
    assert encoded["input_ids"].count(6) == 2 and encoded["input_ids"][-1] == 6


# --- Bad conversations ---------------------------------------------------------------------------

S, U, A = MESSAGES[:3]


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ("Q", "Expected a list of messages, found 'Q': pass"),
        (U, "Expected a list of messages, found an object with the keys 'role', 'content': pass"),
        (None, "Expected a list of messages, found a value of type NoneType: pass"),
        ([], "Expected a list of messages, found a value of type list: pass"),
        ([U, "A"], "Message 2 of 2: expected the keys role and content, found 'A': name them so"),
        ([U, None], "Message 2 of 2: .* role and content, found a value of type NoneType: name"),
        ([U, {"from": "gpt", "value": "A"}], "Message 2 .* with the keys 'from', 'value': name"),
        ([{"content": "Q"}, A], "Message 1 of 2: .* with the keys 'content': name them so"),
        ([U, {"role": "assistant"}], "Message 2 of 2: .* with the keys 'role': name them so"),
        ([U, {}], "Message 2 of 2: .* found an object with no keys: name them so"),
        ([U, {**A, "role": "bot"}], "Message 2 of 2: .* or tool, found 'bot': rename it"),
        ([U, {**A, "role": "user\n"}], r"Message 2 of 2: .* found 'user\\n': rename it"),
        ([U, {**A, "role": ["user"]}], "Message 2 of 2: .* found a value of type list: rename it"),
        ([U, {**A, "content": ["A"]}], "Message 2 of 2: .* found a value of type list: join its"),
        ([U, {**A, "content": None}], "Message 2 of 2: .* found a value of type NoneType: join"),
        ([{**U, "content": 3}, A], "Message 1 of 2: .* found a value of type int: join its parts"),
        ([U, {**A, "content": ""}], "Message 2 of 2: .* text as content, found '': write it"),
        ([U, {**A, "content": " \n\u00a0"}], r"Message 2 of 2: .* found ' \\n\\xa0': write it"),
        ([U, {**A, "content": "a\ud83d"}], r"Message 2 of 2: .* character \('\\ud83d'\): type it"),
        ([A, U, A], "Message 1 comes from the assistant: begin with the user"),
        ([S, A], "Message 2 comes from the assistant: begin with the user"),
        ([U, U, A], "Messages 1 and 2 come from the user: let roles alternate"),
        ([U, A, A], "Messages 2 and 3 come from the assistant: let roles alternate"),
        ([U, A, S, U, A], "Message 3 comes from the system: only the first message may"),
        ([S], "Expected an answer from the assistant to learn from, found none: add it, or pass"),
        ([S, U], "Expected an answer .* found none: add it, or pass add_generation_prompt=True"),
    ],
)  # fmt: skip
def test_a_bad_conversation_is_refused_with_the_message_and_what_to_do(tokenizer, messages, said):
    with pytest.raises(ValueError, match="^" + said) as single:
        encode(messages, tokenizer)
    with pytest.raises(ValueError) as batch:
        encode_batch([MESSAGES, messages, MESSAGES], tokenizer)
    assert str(batch.value) == f"Conversation 2 of 3: {single.value}"


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([S, U, A], "Expected the user's message at the end of a prompt, found one from the assis"),
        ([S], "Expected the user's message at the end .* from the system: leave out what comes"),
        ([U, U], "Messages 1 and 2 come from the user: let roles alternate"),
        ([A, U], "Message 1 comes from the assistant: begin with the user"),
        ([], "Expected a list of messages, found a value of type list: pass"),
        ([{**U, "content": "\t"}], r"Message 1 of 1: expected text as content, found '\\t': write"),
    ],
)
def test_a_bad_prompt_is_refused_with_the_message_and_what_to_do(tokenizer, messages, said):
    with pytest.raises(ValueError, match="^" + said):
        encode(messages, tokenizer, add_generation_prompt=True)
    with pytest.raises(ValueError, match="^Conversation 1 of 2: " + said):
        encode_batch([messages, [U]], tokenizer, add_generation_prompt=True)


def test_what_follows_the_last_answer_is_no_fault(tokenizer):
    """A question without an answer is context that is not learned."""
    longer, shorter = encode([U, A, U], tokenizer), encode([U, A], tokenizer)
    length = len(shorter["input_ids"])
    assert longer["input_ids"][:length] == shorter["input_ids"]
    assert longer["assistant_masks"][:length] == shorter["assistant_masks"]
    assert not any(longer["assistant_masks"][length:])


# --- TRL's templates -----------------------------------------------------------------------------

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
PIECES = "What is_ the capital_ of Peru?_Lima._user_assistant_42_+254_<_|_<|_|>_<b>".split("_")
PIECES += "\n·\n\n·\r\n·  ·\t· ·\u200b·🙂·👩‍👩‍👧·東京·Łódź·e\u0301".split("·")
PIECES += ["**bold**", "# Title\n", "- item\n", "```py\nx = 1\n```", "x" * 400]


def trl_template(name: str) -> str:
    return (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


def some_text(rng: random.Random) -> str:
    text = ""
    while not text.strip():
        text = "".join(rng.choices(PIECES, k=rng.choice((1, 2, 3, 5, 8))))
    return text


@pytest.fixture(scope="module")
def conversations() -> list[list[dict[str, str]]]:
    """150, with or without a system message, of one to four rounds."""
    rng = random.Random(0)
    roles = [
        ["system"] * rng.randint(0, 1) + ["user", "assistant"] * rng.randint(1, 4)
        for _ in range(150)
    ]
    return [[{"role": role, "content": some_text(rng)} for role in names] for names in roles]


def with_line_breaks(ids: list[int], mask: list[int], before: bool, after: bool) -> list[int]:
    """The mask, with the line breaks next to an answer learned, too."""
    start, end, assistant, line_break = 2, 3, 967, 212
    more = list(mask)
    for at in range(2, len(ids)):
        if ids[at] == line_break and (
            (before and ids[at - 2 : at] == [start, assistant])
            or (after and ids[at - 1] == end and mask[at - 1])
        ):
            assert not mask[at], "ours does not learn it"
            more[at] = 1
    return more


@pytest.mark.parametrize(
    ("name", "ours", "learns"),  # with ChatML, TRL learns line breaks before and after an answer
    [
        ("qwen3_instruct_2507_training", CHATML, (False, True)),
        ("qwen3_vl_training", CHATML, (False, True)),
        ("qwen2_5_training", CHATML, (True, True)),
        ("qwen2_5_vl_training", CHATML, (False, True)),
        ("lfm2_training", CHATML, (False, True)),
        ("lfm2_v2_training", CHATML, (False, True)),
        ("lfm2_2_5", CHATML, (False, True)),
        ("lfm2_2_5_v2", CHATML, (False, True)),
        ("lfm2_2_5_vl", CHATML, (False, True)),
        ("llama3_training", LLAMA3, (False, False)),
        ("llama3", LLAMA3, None),  # does not mark the assistant
    ],
)
def test_text_ids_and_mask_are_those_of_trls_templates(
    tokenizer, conversations, name, ours, learns
):
    tokenizer.bos_token = "<|begin_of_text|>"
    tokenizer.chat_template = ours
    if name.startswith("qwen2_5"):  # it adds a system message where there is none
        conversations = [c for c in conversations if c[0]["role"] == "system"]
        assert len(conversations) > 60
    given = encode_batch(conversations, tokenizer)
    template = trl_template(name)
    theirs = tokenizer.apply_chat_template(
        conversations,
        chat_template=template,
        return_dict=True,
        return_assistant_tokens_mask=learns is not None,
    )
    texts = tokenizer.apply_chat_template(conversations, chat_template=template, tokenize=False)
    skip = 1 if name.startswith("lfm2") else 0  # a token at the beginning that ChatML has not
    for i, messages in enumerate(conversations):
        assert render(messages, ours) == texts[i].removeprefix("<|begin_of_text|>" * skip), i
        ids, mask = given["input_ids"][i], given["assistant_masks"][i]
        assert ids == theirs["input_ids"][i][skip:], texts[i]
        if learns is not None:
            expected = with_line_breaks(ids, mask, *learns)
            assert theirs["assistant_masks"][i][skip:] == expected, texts[i]


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("qwen3_instruct_2507", CHATML),
        ("qwen3", CHATML),
        ("qwen2_5", CHATML),
        ("lfm2", CHATML),
        ("llama3", LLAMA3),
        ("llama3_training", LLAMA3),
    ],
)
def test_text_and_ids_of_a_prompt_are_those_of_trls_templates(tokenizer, conversations, name, ours):
    tokenizer.bos_token = "<|begin_of_text|>"
    tokenizer.chat_template = ours
    if name == "qwen2_5":  # it adds a system message where there is none
        conversations = [c for c in conversations if c[0]["role"] == "system"]
    prompts = [messages[:-1] for messages in conversations]
    given = encode_batch(prompts, tokenizer, add_generation_prompt=True)
    asked = {"chat_template": trl_template(name), "add_generation_prompt": True}
    theirs = tokenizer.apply_chat_template(prompts, **asked, return_dict=True)["input_ids"]
    texts = tokenizer.apply_chat_template(prompts, **asked, tokenize=False)
    skip = 1 if name == "lfm2" else 0  # a token at the beginning that ChatML has not
    for i, messages in enumerate(prompts):
        text = texts[i].removeprefix("<|begin_of_text|>" * skip)
        assert render(messages, ours, add_generation_prompt=True) == text, i
        assert given["input_ids"][i] == theirs[i][skip:], text


@pytest.mark.parametrize("ours", [CHATML, LLAMA3])
def test_a_batch_is_encoded_as_its_conversations_one_by_one(tokenizer, conversations, ours):
    tokenizer.chat_template = ours
    batch = encode_batch(conversations[:200], tokenizer)
    for i, messages in enumerate(conversations[:200]):
        assert encode(messages, tokenizer) == {column: rows[i] for column, rows in batch.items()}
    assert encode_batch([], tokenizer) == {"input_ids": [], "assistant_masks": [], "labels": []}


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("gemma_training", "<end_of_turn>"),
        ("gemma", "<end_of_turn>"),  # without marks, as below
        ("gemma4", "<turn|>"),
        ("cohere_training", "<|END_OF_TURN_TOKEN|>"),
        ("deepseekv3_training", "<｜end▁of▁sentence｜>"),
        ("glm4moe_training", "<|user|>"),
        ("glm4moe", None),  # the answer is the end; what stands before it counts no more
        ("gptoss_training", "<|return|>"),
        ("muse_glimmer_training", "<|eot|>"),
        ("smolvlm_training", "<end_of_utterance>"),
        ("llava_next", None),  # takes no text
        ("llama3_1", "<|eot_id|>"),
        ("qwen3_training", "<|im_end|>"),
    ],
)
def test_the_end_of_turn_is_the_last_control_token_that_a_template_of_trl_learns(
    tokenizer, name, end
):
    template = trl_template(name)
    controls = sorted({*re.findall(r"<[/|｜]?[\w▁]+[|｜]?>", template)})
    tokenizer.add_special_tokens({"additional_special_tokens": controls})
    tokenizer.chat_template = template
    assert tokenizer.decode([end_of_turn_id(tokenizer)]) == (end or tokenizer.eos_token)
    tokenizer.chat_template = CHATML  # what was found is not kept
    assert tokenizer.decode([end_of_turn_id(tokenizer)]) == "<|im_end|>"


# --- Templates without marks ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen3_instruct_2507", "qwen3_vl", "qwen2_5_vl", "lfm2"])
def test_a_template_that_trl_knows_is_learned_with_trls_marks(tokenizer, name):
    tokenizer.bos_token = "<|begin_of_text|>"
    tokenizer.chat_template = trl_template(name)
    assert training_template(tokenizer) == trl_template(f"{name}_training")
    encoded = encode(MESSAGES, tokenizer)
    theirs = tokenizer.apply_chat_template(
        MESSAGES,
        chat_template=trl_template(f"{name}_training"),
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    columns = ("input_ids", "assistant_masks")
    assert [encoded[column] for column in columns] == [theirs[column] for column in columns]
    learned = [i for i in encoded["labels"] if i != IGNORED]
    assert tokenizer.decode(learned) == (
        "The capital of Kenya is Nairobi.<|im_end|>\nLima.<|im_end|>\n"
    )
    assert tokenizer.chat_template == trl_template(name), "the tokenizer itself stays as it was"


def test_a_template_with_marks_is_taken_as_it_is(tokenizer):
    for marks in ("{% generation %}", "{%- generation -%}", "{%generation%}"):
        tokenizer.chat_template = CHATML.replace("{% generation %}", marks)
        assert training_template(tokenizer) == tokenizer.chat_template


@pytest.mark.parametrize("template", [None, "", "{{ messages[0]['content'] + '<|im_end|>' }}"])
def test_a_template_that_neither_marks_nor_is_known_is_refused(tokenizer, template):
    tokenizer.chat_template = template
    said = r"Expected .* marks the assistant's tokens with {% generation %}, found .*CHATML "
    with pytest.raises(ValueError, match=re.compile(said)):
        encode(MESSAGES, tokenizer)


@pytest.mark.parametrize("name", ["qwen3_instruct_2507", None])
def test_a_prompt_needs_no_marks(tokenizer, name):
    """What the model was made for is asked with its own template, not with one for training."""
    unknown = "{% for m in messages %}<|im_start|>{{ m['role'] }}: {{ m['content'] }}{% endfor %}"
    tokenizer.chat_template = trl_template(name) if name else unknown
    theirs = tokenizer.apply_chat_template(
        MESSAGES[:2], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    found = encode(MESSAGES[:2], tokenizer, add_generation_prompt=True)
    assert found == {
        "input_ids": theirs,
        "assistant_masks": [0] * len(theirs),
        "labels": [IGNORED] * len(theirs),
    }


def test_of_several_templates_the_default_one_is_taken(tokenizer):
    expected = encode(MESSAGES, tokenizer)
    tokenizer.chat_template = {"default": CHATML, "tool_use": LLAMA3}
    assert encode(MESSAGES, tokenizer) == expected
    prompt = encode(MESSAGES[:2], tokenizer, add_generation_prompt=True)["input_ids"]
    assert tokenizer.decode(prompt) == render(MESSAGES[:2], add_generation_prompt=True)
    assert tokenizer.decode([end_of_turn_id(tokenizer)]) == "<|im_end|>"


# --- Tools, thoughts, and turns that are not learned ---------------------------------------------

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "A city."}},
            "required": ["city"],
        },
    },
}


def call(name: str = "weather", **arguments) -> dict:
    function = {"name": name, "arguments": arguments}
    return {"id": "call00001", "type": "function", "function": function}


def result(content: str) -> dict:
    return {"role": "tool", "name": "weather", "tool_call_id": "call00001", "content": content}


ASK = {"role": "assistant", "content": "", "tool_calls": [call(city="Lima", days=2)]}
WITH_TOOLS = [
    *({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Rain in Lima?"}),
    *(ASK, result('{"rain": false}'), {"role": "assistant", "content": "No."}),
    *({"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes."}),
]
THOUGHTS = {2: "I look it up.", 4: "It is dry.", 6: "I am."}
THINKING = [
    message | ({"reasoning_content": THOUGHTS[n]} if n in THOUGHTS else {})
    for n, message in enumerate(WITH_TOOLS)
]
# Hermes 2 Pro's format: ChatML with JSON in <tool_call>, in a template for tools alone.
HERMES = (
    "<|im_start|>system\n<tools>{% for tool in tools %}{{ tool.function | tojson }}{% endfor %}"
    "</tools><|im_end|>\n{% for message in messages %}<|im_start|>{{ message.role + '\n' }}"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}"
    "{% for call in message.tool_calls %}<tool_call>\n{{ call.function | tojson }}\n</tool_call>"
    "{% endfor %}<|im_end|>{% endgeneration %}{{ '\n' }}"
    "{% elif message.role == 'tool' %}<tool_response>\n{{ message.content }}\n</tool_response>"
    "<|im_end|>\n{% else %}{{ message.content }}<|im_end|>\n{% endif %}{% endfor %}"
)


def with_tokens_of(tokenizer, template: str):
    """The tokenizer with a template, and with all control tokens that the template writes."""
    controls = sorted({*re.findall(r"<[/|｜]?[\w▁]+[|｜]?>", template)})
    tokenizer.add_special_tokens({"additional_special_tokens": controls})
    tokenizer.bos_token = "<|begin_of_text|>"
    tokenizer.chat_template = template
    return tokenizer


def learned_text(tokenizer, messages, tools=None, **options) -> str:
    labels = encode(messages, tokenizer, tools, **options)["labels"]
    return tokenizer.decode([label for label in labels if label != IGNORED])


MARKED = ["qwen3_training", "qwen3_8_training", "qwen3_5_think_training", "glm4moe_training"]
MARKED += ["gptoss_training", "nemotron_3_nano_training", "lfm2_2_5", "muse_glimmer_training"]
NO_THOUGHTS = ["qwen2_5_training", "qwen3_instruct_2507_training", "qwen3_vl_training"]
NO_THOUGHTS += ["lfm2_v2_training"]


@pytest.mark.parametrize("name", MARKED + NO_THOUGHTS)
@pytest.mark.filterwarnings("ignore:.*thoughts")
def test_tools_and_thoughts_give_the_text_ids_and_mask_of_the_template(tokenizer, name):
    tokenizer = with_tokens_of(tokenizer, trl_template(name))
    messages = WITH_TOOLS if name in NO_THOUGHTS else THINKING
    for some, tools in ((messages, [TOOL]), (messages[:5], [TOOL, TOOL]), (messages[:3], None)):
        how = {"tools": tools, "return_dict": True}
        theirs = tokenizer.apply_chat_template(some, return_assistant_tokens_mask=True, **how)
        ours = encode(some, tokenizer, tools)
        assert ours["input_ids"] == theirs["input_ids"]
        assert ours["assistant_masks"] == theirs["assistant_masks"]
        text = tokenizer.apply_chat_template(some, tools=tools, tokenize=False)
        assert tokenizer.decode(ours["input_ids"]) == text
    asked = {"tools": [TOOL], "add_generation_prompt": True}
    theirs = tokenizer.apply_chat_template(messages[:4], return_dict=True, **asked)
    assert encode(messages[:4], tokenizer, **asked)["input_ids"] == theirs["input_ids"]


@pytest.mark.parametrize("name", MARKED + NO_THOUGHTS)
@pytest.mark.filterwarnings("ignore:.*thoughts")
def test_calls_and_thoughts_are_learned_and_results_are_not(tokenizer, name):
    tokenizer = with_tokens_of(tokenizer, trl_template(name))
    messages = WITH_TOOLS if name in NO_THOUGHTS else THINKING
    learned = learned_text(tokenizer, messages, [TOOL])
    assert all(word in learned for word in ("weather", "Lima", "No.", "Yes."))
    assert not any(word in learned for word in ('"rain"', "Rain", "Sure", "brief", "A city"))
    text = tokenizer.decode(encode(messages, tokenizer, [TOOL])["input_ids"])
    for thought in THOUGHTS.values() if messages is THINKING else ():
        assert (thought in learned) == (thought in text), "what is shown is learned"
    assert messages is WITH_TOOLS or THOUGHTS[6] in learned


def test_what_is_learned_of_qwen3_to_the_letter(tokenizer):
    tokenizer = with_tokens_of(tokenizer, trl_template("qwen3"))  # TRL's marks
    tool_call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Lima", "days": 2}}\n'
    assert learned_text(tokenizer, THINKING, [TOOL]) == (
        f"<think>\nI look it up.\n</think>\n\n{tool_call}</tool_call><|im_end|>\n"
        "<think>\nIt is dry.\n</think>\n\nNo.<|im_end|>\n"
        "<think>\nI am.\n</think>\n\nYes.<|im_end|>\n"
    )


@pytest.mark.parametrize("name", ["llama3_1", "llama3_2", "gemma4_v2"])
def test_a_template_without_marks_is_learned_from_each_prompt_to_the_end_of_the_turn(
    tokenizer, name
):
    tokenizer = with_tokens_of(tokenizer, trl_template(name))
    end = tokenizer.decode([end_of_turn_id(tokenizer)])
    for messages, tools in ((WITH_TOOLS, [TOOL]), (MESSAGES, None)):
        ours = encode(messages, tokenizer, tools)
        whole = tokenizer.apply_chat_template(messages, tools=tools, return_dict=True)
        assert ours["input_ids"] == whole["input_ids"]
        learned = learned_text(tokenizer, messages, tools)
        assert not any(word in learned for word in ("rain", "Sure", "brief", "A city", "<|start_"))
        if name != "gemma4_v2":
            assert learned.count(end) == sum(m["role"] == "assistant" for m in messages)
    learned = learned_text(tokenizer, WITH_TOOLS, [TOOL])
    if name.startswith("llama"):
        arguments = '{"city": "Lima", "days": 2}'
        asked = f'{{"name": "weather", "parameters": {arguments}}}<|eot_id|>'
        assert learned == f"{asked}No.<|eot_id|>Yes.<|eot_id|>"
    assert learned_text(tokenizer, WITH_TOOLS, [TOOL], learn="last").startswith("Yes.")


def test_a_turn_that_depends_on_what_follows_cannot_be_told_without_marks(tokenizer):
    last = CHATML.replace("{% generation %}", "{% if loop.last %}!{% endif %}")
    tokenizer.chat_template = last.replace("{% endgeneration %}", "")
    assert learned_text(tokenizer, MESSAGES[:3]) == "!The capital of Kenya is Nairobi.<|im_end|>\n"
    with pytest.raises(ValueError, match="message 3 does not follow the prompt for it"):
        encode(MESSAGES, tokenizer)


def test_of_several_templates_the_one_for_tools_is_taken_with_tools(tokenizer):
    """As in `apply_chat_template`; Hermes' and Command R's tokenizers have one."""
    tokenizer = with_tokens_of(tokenizer, HERMES)
    tokenizer.chat_template = {"default": CHATML, "tool_use": HERMES}
    how = {"tools": [TOOL], "return_dict": True, "return_assistant_tokens_mask": True}
    theirs = tokenizer.apply_chat_template(WITH_TOOLS, **how)
    ours = encode_batch([WITH_TOOLS, MESSAGES], tokenizer, [[TOOL], []])
    assert ours["input_ids"][0] == theirs["input_ids"]
    assert ours["assistant_masks"][0] == theirs["assistant_masks"]
    assert tokenizer.decode(ours["input_ids"][1]) == render(MESSAGES)
    assert learned_text(tokenizer, WITH_TOOLS, [TOOL]) == (
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Lima", "days": 2}}\n</tool_call>'
        "<|im_end|>No.<|im_end|>Yes.<|im_end|>"
    )


def test_arguments_are_given_as_json_to_a_template_that_joins_them_to_a_text(tokenizer):
    """DeepSeek V3's own template; TRL's version for training takes both."""
    tokenizer = with_tokens_of(tokenizer, trl_template("deepseekv3"))
    found = encode(WITH_TOOLS[:4], tokenizer, add_generation_prompt=True)["input_ids"]
    assert '{"city": "Lima", "days": 2}' in tokenizer.decode(found)
    assert '{"city": "Lima", "days": 2}' in learned_text(tokenizer, WITH_TOOLS)


# --- Templates that leave something out

KNOWS_NO_TOOLS = "Expected a chat template that knows tools, found one that leaves out the "


@pytest.mark.parametrize("template", [CHATML, LLAMA3, trl_template("phi3_training")])
def test_a_template_without_tools_is_refused_and_says_so(tokenizer, template):
    tokenizer = with_tokens_of(tokenizer, template)
    for messages, tools, lost in (
        (MESSAGES, [TOOL], "tools: use"),
        (WITH_TOOLS, [TOOL], "calls of message 3: use"),
        (WITH_TOOLS[:3], None, "calls of message 3: use"),
    ):
        with pytest.raises(ValueError, match="^" + KNOWS_NO_TOOLS + "(tools|" + lost + ")"):
            encode(messages, tokenizer, tools)
        with pytest.raises(ValueError, match="^Conversation 2 of 2: " + KNOWS_NO_TOOLS):
            encode_batch([MESSAGES, messages], tokenizer, [None, tools])
        with pytest.raises(ValueError, match="^" + KNOWS_NO_TOOLS):
            render(messages, template, tools=tools)
    for tools in (None, [], ()):
        assert encode(MESSAGES, tokenizer, tools) == encode(MESSAGES, tokenizer)


@pytest.mark.parametrize("name", ["smolvlm_training", "idefics3_training"])
def test_a_template_that_knows_only_parts_leaves_texts_out_and_is_refused(tokenizer, name):
    tokenizer = with_tokens_of(tokenizer, trl_template(name))
    with pytest.raises(ValueError, match="shows the text of message 1, found one that leaves"):
        encode(MESSAGES, tokenizer)


def test_a_template_without_system_messages_is_refused_where_there_is_one(tokenizer):
    tokenizer.chat_template = CHATML.replace(
        "{% for message in messages %}",
        "{% for message in messages if message['role'] != 'system' %}",
    )
    assert learned_text(tokenizer, MESSAGES[1:3]) == "The capital of Kenya is Nairobi.<|im_end|>"
    with pytest.raises(ValueError, match="shows the text of message 1, found one that leaves"):
        encode(MESSAGES[:3], tokenizer)


@pytest.mark.parametrize("name", ["qwen3_training", "deepseekv3_training", "glm4moe_training"])
def test_no_template_parts_an_answer_that_speaks_of_thoughts(tokenizer, name):
    tokenizer.chat_template = trl_template(name)  # `<think>` is ordinary text for this tokenizer
    tokenizer.bos_token = "<|begin_of_text|>"
    for text in ("It ends with </think>, always.", "<think>So</think> begins it."):
        messages = [MESSAGES[1], {"role": "assistant", "content": text}]
        assert text in learned_text(tokenizer, messages)
        assert text in learned_text(tokenizer, [*messages, *MESSAGES[3:]])


def test_render_shows_tools_and_thoughts():
    template = trl_template("qwen3")
    text = render(THINKING, template, tools=[TOOL])
    assert all(word in text for word in ("The weather of a city.", "I am.", '"Lima"', "rain"))
    with pytest.raises(ValueError, match="shows the thoughts of message 3"):
        render(THINKING[:3], trl_template("qwen2_5"))


def test_text_beside_a_call_is_not_dropped(tokenizer):
    """Llama 3.1's template shows the call alone, and refuses a second one."""
    tokenizer = with_tokens_of(tokenizer, trl_template("llama3_1"))
    messages = [*WITH_TOOLS[:2], ASK | {"content": "Let me see."}, *WITH_TOOLS[3:]]
    with pytest.raises(ValueError, match="that shows the text of message 3, found one that leaves"):
        encode(messages, tokenizer, [TOOL])
    messages[2] = ASK | {"tool_calls": [call(), call()]}
    with pytest.raises(ValueError, match="only supports single tool-calls at once.*: change the"):
        encode(messages, tokenizer, [TOOL])


@pytest.mark.parametrize("template", [CHATML, LLAMA3, trl_template("qwen2_5_training")])
def test_a_template_without_thoughts_is_refused(tokenizer, template):
    tokenizer = with_tokens_of(tokenizer, template)
    for number in (2, 4):
        messages = [dict(message) for message in MESSAGES]
        messages[number]["reasoning_content"] = "I know it."
        said = f"that shows the thoughts of message {number + 1}, found one that leaves out"
        with pytest.raises(ValueError, match=said):
            encode(messages, tokenizer)


def test_thoughts_of_earlier_turns_that_the_template_drops_are_not_learned(tokenizer):
    """A warning counts them; what is learned is what is shown, and no mask shifts."""
    latest = CHATML.replace(
        "{% generation %}{{",
        "{% generation %}{% if loop.last and message.reasoning_content %}<think>"
        "{{ message.reasoning_content }}</think>{% endif %}{{",
    )
    tokenizer = with_tokens_of(tokenizer, latest)
    messages = [dict(message) for message in MESSAGES]
    messages[2]["reasoning_content"] = messages[4]["reasoning_content"] = "I know it."
    with pytest.warns(UserWarning, match="In 1 of 2 conversations .* leaves out thoughts"):
        encoded = encode_batch([messages, MESSAGES], tokenizer)
    learned = [i for i in encoded["labels"][0] if i != IGNORED]
    assert tokenizer.decode(learned) == (
        "The capital of Kenya is Nairobi.<|im_end|><think>I know it.</think>Lima.<|im_end|>"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encode(messages[:3], tokenizer)  # it is the latest turn
        encode(messages[:4], tokenizer, add_generation_prompt=True)  # nothing is learned


def test_a_template_that_marks_nothing_of_an_answer_is_refused(tokenizer):
    tokenizer.chat_template = CHATML + "{% generation %}{% endgeneration %}"
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}",
        "{{ message['content'] + '<|im_end|>' }}",
    )
    with pytest.raises(ValueError, match="Expected something to learn, found none: the chat templ"):
        encode(MESSAGES, tokenizer)


# --- Turns that are not learned


def weighted(messages, *weights) -> list[dict]:
    """The messages, with a weight for each of the assistant's that is not None."""
    left = iter(weights)
    given = [next(left) if m["role"] == "assistant" else None for m in messages]
    return [
        m if weight is None else m | {"weight": weight}
        for m, weight in zip(messages, given, strict=True)
    ]


@pytest.mark.parametrize("template", [CHATML, LLAMA3, trl_template("qwen3_training")])
def test_turns_of_weight_0_are_read_and_not_learned(tokenizer, template):
    tokenizer = with_tokens_of(tokenizer, template)
    whole = encode(MESSAGES, tokenizer)
    assert encode(weighted(MESSAGES, 1, None), tokenizer) == whole
    first, last = (learned_text(tokenizer, weighted(MESSAGES, *w)) for w in ((1, 0), (0, 1)))
    assert first + last == learned_text(tokenizer, MESSAGES)
    assert "Nairobi" in first and "Lima" in last and "Nairobi" not in last
    assert encode(weighted(MESSAGES, 0, 1), tokenizer)["input_ids"] == whole["input_ids"]
    assert encode(MESSAGES, tokenizer, learn="last") == encode(
        weighted(MESSAGES, 0, None), tokenizer
    )
    assert learned_text(tokenizer, weighted(MESSAGES, 1, 0), learn="last") == first


@pytest.mark.parametrize("name", MARKED + NO_THOUGHTS)
@pytest.mark.filterwarnings("ignore:.*thoughts")
def test_each_turn_can_be_left_out_whatever_pieces_the_template_marks(tokenizer, name):
    tokenizer = with_tokens_of(tokenizer, trl_template(name))
    messages = WITH_TOOLS if name in NO_THOUGHTS else THINKING
    words = ("weather", "No.", "Yes.")
    alone = []
    for turn in range(3):
        some = weighted(messages, *(int(n == turn) for n in range(3)))
        alone.append(learned_text(tokenizer, some, [TOOL]))
        assert [word in alone[-1] for word in words] == [n == turn for n in range(3)]
    assert "".join(alone) == learned_text(tokenizer, messages, [TOOL])
    assert learned_text(tokenizer, messages, [TOOL], learn="last") == alone[2]


def test_turns_in_one_marked_piece_cannot_be_parted(tokenizer):
    tokenizer.chat_template = (
        "{% generation %}{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
        "{% endgeneration %}"
    )
    assert len(learned_text(tokenizer, MESSAGES)) > 90
    with pytest.raises(ValueError, match=r"one piece for messages \[3, 5\], of which some"):
        encode(weighted(MESSAGES, 0, 1), tokenizer)


def test_which_turns_are_learned_has_two_names(tokenizer):
    with pytest.raises(ValueError, match=r"Expected learn to be one of \('all', 'last'\), found 0"):
        encode(MESSAGES, tokenizer, learn=0)
    with pytest.raises(ValueError, match="Expected tools for each of 2 conversations, found 1"):
        encode_batch([MESSAGES, MESSAGES], tokenizer, [None])


def test_keys_without_a_value_change_nothing(tokenizer):
    """Arrow gives all messages of a column the same keys."""
    keys = ("tool_calls", "reasoning_content", "name", "tool_call_id", "weight", "audio")
    filled = [dict.fromkeys(keys) | message for message in MESSAGES]
    for template in (CHATML, trl_template("qwen3_training"), trl_template("llama3_1")):
        tokenizer = with_tokens_of(tokenizer, template)
        assert encode(filled, tokenizer) == encode(MESSAGES, tokenizer)
    filled = [{"role": "", "content": ""} | dict.fromkeys(keys) | message for message in WITH_TOOLS]
    assert encode(filled, tokenizer, [TOOL]) == encode(WITH_TOOLS, tokenizer, [TOOL])


# --- TRL's templates --------------------------------------------------------------------------


def test_trl_brings_templates_and_versions_of_them_for_training():
    library = trl_templates()
    assert {"qwen3", "qwen3_training", "llama3"} <= set(library) and len(library) > 20
    assert marks_the_assistant(library["qwen3_training"])
    assert not marks_the_assistant(library["qwen3"])
    asked = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    assert "answer" in render(asked, library["qwen3"])


def test_random_conversations_are_sound_and_of_several_lengths():
    rng = random.Random(0)
    made = [random_conversation(rng) for _ in range(100)]
    assert not any(validate(messages) for messages in made)
    assert {len(messages) for messages in made} == set(range(2, 10))
