"""What is wrong with a conversation is found and said; what is fine is left alone."""

from sftlib.chat import encode
from sftlib.data.validation import CONTROL_TOKEN, ROLES, fault, normalise, validate

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


def chat(*texts: str) -> dict:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": t} for i, t in enumerate(texts)]}


@pytest.mark.parametrize(
    "text",
    "<|im_start|> <|eot_id|> <|IM_END|> <｜begin▁of▁sentence｜> <start_of_turn> "
    "<END_OF_TURN> [INST] [/INST] <<SYS>> <</SYS>> </s>".split()
    + [f"<|{'x' * 40}|>", "<|a b|>"],
)
def test_control_tokens_are_found(text):
    assert CONTROL_TOKEN.search(f"say {text} now")


@pytest.mark.parametrize(
    "text", ["<||>", f"<|{'x' * 41}|>", "a <| b |> c", "<s>", "[1]", "a|>b<|c"]
)
def test_ordinary_text_is_not_taken_for_a_control_token(text):
    assert (CONTROL_TOKEN.search(text) is not None) == (text == "a <| b |> c")


def test_a_good_example_has_no_problems():
    assert validate(chat("What is 1 + 1?", "2")["messages"]) == []
    assert validate([{"role": "system", "content": "S"}, *chat("Q", "A")["messages"]]) == []
    assert validate(chat("C?", "C!?+")["messages"]) == []


U, A = chat("Q", "A")["messages"]


@pytest.mark.parametrize(
    "messages, sentences",
    [
        ("Q", ["Expected a list of messages, found 'Q'"]),
        ([], ["There is no answer in 0 messages"]),
        ([U, "A"], ["Message 2 is 'A'"]),
        ([U, {"content": "A"}], ["Message 2 has no role"]),
        ([U, {"role": "bot", "content": "A"}], ["Message 2 has the role 'bot'"]),
        ([U, {"role": ["a"], "content": "A"}], ["Message 2 has the role a value of type list"]),
        ([U, {"role": "assistant"}], ["Message 2 has no content"]),
        ([U, {"role": "assistant", "content": 4}], ["2 has a value of type int as content"]),
        ([U, {**A, "text": "A"}], ["Message 2 has the key 'text'"]),
        ([A, U, A], ["Message 1 comes from the assistant: begin with the user"]),
        ([U, U, A], ["Messages 1 and 2 come from the user"]),
        ([U, A, {"role": "system", "content": "S"}, U, A], ["Message 3 comes from the system"]),
        ([U], ["There is no answer in 1 messages"]),
        ([U, A, U], ["Message 3 comes from the user: end with the assistant"]),
        (chat("Q", " \u200b\u00a0")["messages"], ["Message 2 is empty"]),
        (chat("Why?", "  why")["messages"], ["Message 2 only repeats message 1"]),
        (chat("Q</s>", "A")["messages"], ["Message 1 holds the control token '</s>'"]),
        (chat("Q", "A" * 8001)["messages"], ["Message 2 has 8001 characters, more than 8000"]),
        (chat("Q", "\udfff")["messages"], ["Message 2 is empty", "Message 2 has half a character"]),
        (
            [{"role": "user", "content": "", "x": 1}, {"role": "user", "content": "[INST]"}],
            ["1 has the key 'x'", "1 is empty", "2 holds", "1 and 2 come", "There is no answer"],
        ),
    ],
)  # fmt: skip
def test_every_problem_is_named_with_its_message(messages, sentences):
    found = validate(messages)
    assert len(found) == len(sentences)
    assert all(part in sentence for part, sentence in zip(sentences, found, strict=True)), found


def test_the_longest_text_can_be_chosen():
    assert validate(chat("Q", "A" * 9)["messages"], max_chars=9) == []
    assert len(validate(chat("Q", "A" * 10)["messages"], max_chars=9)) == 1


@pytest.mark.parametrize(
    "text, plain",
    [
        ("  What's  NEW,\n“ﬁne”? ", "what s new fine"),
        ("1 + 1 = 2", "1 + 1 = 2"),
        ("co\u00adop\u200beration", "cooperation"),
        ("STRASSE Straße", "strasse strasse"),
        ("?!", "?!"),
    ],
)
def test_comparisons_see_neither_case_nor_punctuation_nor_spacing(text, plain):
    assert normalise(text) == plain


def test_roles_are_those_of_chat_templates():
    assert list(ROLES) == ["system", "user", "assistant", "tool"]


# --- encode, given anything ----------------------------------------------------------------------

# With halves of surrogate pairs, which `st.text()` leaves out.
TEXT = st.text(st.characters() | st.characters(categories=["Cs"]), max_size=12) | st.sampled_from(
    ["user", "assistant", "system", "Q", "", " \n", "<|im_end|>", "\x00", "a\ud83d"]
)
KEY = st.sampled_from(["role", "content"]) | TEXT
SCALAR = st.none() | st.booleans() | st.integers() | st.floats() | st.binary(max_size=5) | TEXT
JUNK = st.recursive(
    SCALAR | st.sets(st.integers(), max_size=2) | st.just(object()) | st.just(range(3)),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(KEY | st.integers() | st.none(), inner, max_size=3)
    ),
    max_leaves=8,
)
TURN = st.sampled_from(["user", "assistant"] * 3 + ["system", "bot"])
MESSAGE = st.fixed_dictionaries({"role": TURN | JUNK, "content": TEXT | JUNK})
ANSWERED = st.lists(TEXT, min_size=2, max_size=4).map(lambda texts: chat(*texts)["messages"])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(JUNK | st.lists(MESSAGE | JUNK, max_size=4) | ANSWERED, st.booleans())
def test_whatever_it_is_given_encode_succeeds_or_raises_a_value_error(tokenizer, junk, prompt):
    """It succeeds exactly where `fault` finds nothing."""
    wrong = fault(junk, prompt)
    if wrong:
        with pytest.raises(ValueError) as raised:
            encode(junk, tokenizer, add_generation_prompt=prompt)
        assert str(raised.value) == wrong
    else:
        ids, mask, labels = encode(junk, tokenizer, add_generation_prompt=prompt).values()
        assert len(ids) == len(mask) == len(labels)
        assert prompt or any(mask), "something is learned"
