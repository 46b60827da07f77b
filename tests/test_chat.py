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
    render,
    training_template,
)

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
    pieces = "<|im_start|>,user,\n,An,d, of, P,eru,?,<|im_end|>,\n,"
    pieces += "<|im_start|>,assistant,\n,L,im,a,.,<|im_end|>,\n"
    assert encode(MESSAGES[3:], tokenizer) == {
        "input_ids": [2, 2939, 206, 2141, 75, 267, 364, 2675, 38, 3, 206]
        + [2, 2977, 206, 51, 576, 72, 21, 3, 206],
        "assistant_masks": [0] * 14 + [1, 1, 1, 1, 1] + [0],
        "labels": [-100] * 14 + [51, 576, 72, 21, 3] + [-100],
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
    lost = "1 of 1 conversations .* max_length=32 tokens .* cut: 6 of 13 tokens to learn are lost"
    with pytest.warns(UserWarning, match=lost):
        cut = encode(MESSAGES, tokenizer, max_length=32)
    assert cut == {column: row[:32] for column, row in whole.items()}
    short = MESSAGES[3:]
    with pytest.warns(UserWarning, match="1 of 2 conversations .* cut: 6 of 18 tokens"):
        both = encode_batch([short, MESSAGES], tokenizer, max_length=32)
    assert both == {column: [row, cut[column]] for column, row in encode(short, tokenizer).items()}


def test_what_fits_is_kept_without_a_warning(tokenizer):
    whole = encode(MESSAGES, tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert encode(MESSAGES, tokenizer, max_length=len(whole["input_ids"])) == whole


@pytest.mark.parametrize("max_length", [14, 1, 0, -1])
def test_a_max_length_that_leaves_nothing_to_learn_is_refused(tokenizer, max_length):
    message = f"the first max_length={max_length} tokens, found none: there are 20, .*Raise max_le"
    with pytest.raises(ValueError, match=message):
        encode(MESSAGES[3:], tokenizer, max_length=max_length)
    with pytest.raises(ValueError, match="^Conversation 2 of 2: Expected something to learn"):
        encode_batch([MESSAGES[3:], MESSAGES[1:]], tokenizer, max_length=15)


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
    start, end, assistant, line_break = 2, 3, 2977, 206
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
