"""Chat templates and masks, with the expected text and ids written out."""

from sftlib.chat import CHATML, LLAMA3, encode, end_of_turn_id, render

import pytest

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
    assert learned == f"The capital of Kenya is Nairobi.{end}Lima.{end}"
    assert tokenizer.decode(ids) == render(MESSAGES, template)


def test_a_short_conversation_id_by_id(tokenizer):
    pieces = "<|im_start|>,user,\n,An,d, of, P,eru,?,<|im_end|>,\n,"
    pieces += "<|im_start|>,assistant,\n,L,im,a,.,<|im_end|>,\n"
    assert encode(MESSAGES[3:], tokenizer) == {
        "input_ids": [2, 2939, 206, 2141, 75, 267, 364, 2675, 38, 3, 206]
        + [2, 2977, 206, 51, 576, 72, 21, 3, 206],
        "assistant_masks": [0] * 14 + [1, 1, 1, 1, 1] + [0],
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


def test_max_length_keeps_the_first_tokens(tokenizer):
    whole = encode(MESSAGES, tokenizer)
    cut = encode(MESSAGES, tokenizer, max_length=7)
    assert cut["input_ids"] == whole["input_ids"][:7]
    assert len(cut["assistant_masks"]) == 7


def test_a_template_without_marks_is_refused(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match="marks the assistant's tokens"):
        encode(MESSAGES, tokenizer)


def test_the_end_of_turn_follows_the_template(tokenizer):
    assert tokenizer.decode([end_of_turn_id(tokenizer)]) == "<|im_end|>"
    tokenizer.chat_template = LLAMA3
    assert tokenizer.decode([end_of_turn_id(tokenizer)]) == "<|eot_id|>"
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    assert end_of_turn_id(tokenizer) == tokenizer.eos_token_id
