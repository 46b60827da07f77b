"""What is wrong with a conversation is found and said; what is fine is left alone."""

import re

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


# --- Tools, thoughts, weights --------------------------------------------------------------------


def call(**changes) -> dict:
    function = {"name": "weather", "arguments": {"city": "Lima"}} | changes
    return {"id": "c1", "type": "function", "function": function}


ASK = {"role": "assistant", "content": "", "tool_calls": [call()]}
TOLD = {"role": "tool", "content": "18", "name": "weather", "tool_call_id": "c1"}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
LOOP: dict = {}
LOOP["self"] = LOOP


@pytest.mark.parametrize(
    "messages",
    [
        [U, ASK, TOLD, A],
        [U, ASK, TOLD | {"content": ""}, A],
        [U, ASK, {"role": "tool", "content": "18"}, A],
        [U, ASK | {"content": "I look."}, TOLD, TOLD, ASK, TOLD, A, U, A],
        [U, ASK | {"tool_calls": [call(), call() | {"id": None}]}, TOLD, A],
        [U, ASK | {"reasoning_content": "Hm."}],
        [U, A | {"reasoning_content": "Hm.", "weight": 1}],
        [U, A | {"weight": 0}, U, A],
        [U, {**A, "weight": None, "tool_calls": [], "name": None, "audio": None, "refusal": ""}],
        [U, ASK, TOLD, A | {"content": "18"}],  # repeats the result, which is no question
    ],
)
def test_the_normal_form_is_accepted(messages):
    assert validate(messages, tools=[TOOL]) == validate(messages) == []
    assert fault(messages, False, [TOOL]) == fault(messages, False) == ""


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([U, TOLD, A], "Message 2 comes from the tool, after the user: put the assistant's call"),
        ([U, A, TOLD, A], "Message 3 is a tool's result without a call: add the tool_calls"),
        ([U, ASK, U, A], "Message 2 calls a tool without a result: add the tool's message"),
        ([U, ASK, A], "Messages 2 and 3 come from the assistant: let roles alternate"),
        ([U, ASK, TOLD, U, A], "Message 4 comes from the user, after the tool: let the assistant"),
        ([U, ASK, TOLD | {"tool_call_id": "c2"}, A], "3 answers the call 'c2': no call before"),
        ([U, ASK | {"tool_calls": [call(), call() | {"id": "c2"}]}, TOLD, A], "the id 'c2': add"),
        ([U | {"tool_calls": [call()]}, A], "Message 1, from the user, has tool_calls: only"),
        ([U | {"reasoning_content": "Hm"}, A], "1, from the user, has reasoning_content: only"),
        ([U, ASK, TOLD | {"reasoning_content": "Hm"}, A], "3, from the tool, has reasoning_cont"),
        ([U | {"weight": 0}, A], "Message 1, from the user, has weight: only the assistant may"),
        ([U | {"name": "Ada"}, A], "Message 1, from the user, has name: only the tool may; remove"),
        ([U, A | {"tool_call_id": "c1"}], "2, from the assistant, has tool_call_id: only the tool"),
        ([U, A | {"function_call": {"name": "f"}}], "Message 2 has the key 'function_call': no"),
        ([U, A | {"thinking": "Hm"}], "Message 2 has the key 'thinking': nobody reads it; rename"),
        ([U, A | {"reasoning_content": ["Hm"]}], "has a value of type list as reasoning_content"),
        ([U, A | {"reasoning_content": "\ud83d"}], "2 has half a character .* in reasoning"),
        ([U, A | {"weight": 2}], "Message 2 has 2 as weight: write 0 .not learned. or 1"),
        ([U, A | {"weight": 0.5}], "Message 2 has 0.5 as weight: write 0"),
        ([U, A | {"weight": "0"}], "Message 2 has '0' as weight: write 0"),
        ([U, A | {"weight": 0}], "Expected an answer to learn from, found weight 0 on all of them"),
        ([U, ASK | {"tool_calls": call()}], "2 has an object .* as tool_calls: write a list"),
        ([U, ASK | {"tool_calls": ["f"]}], "Call 1 of message 2 is 'f': write {"),
        ([U, ASK | {"tool_calls": [call()["function"]]}], "Call 1 of message 2 is an object with"),
        ([U, ASK | {"tool_calls": [call() | {"type": "code"}]}], "Call 1 of message 2 is an obj"),
        ([U, ASK | {"tool_calls": [call() | {"function": "f"}]}], "has 'f' as function: write {"),
        ([U, ASK | {"tool_calls": [call() | {"index": 0}]}], "1 of message 2 has the key 'index'"),
        ([U, ASK | {"tool_calls": [call(extra=1)]}], "Call 1 of message 2 has the key 'extra'"),
        ([U, ASK | {"tool_calls": [call(name=" ")]}], "Call 1 of message 2 has ' ' as name: write"),
        ([U, ASK | {"tool_calls": [call(name=None)]}], "Call 1 of message 2 has no name: add that"),
        ([U, ASK | {"tool_calls": [call() | {"id": 7}]}], "has a value of type int as id: write"),
        (
            [U, ASK | {"tool_calls": [call(), call(arguments='{"city": "Lima"}')]}],
            """Call 2 of message 2 has '{"city": "Lima"}' as arguments: write an object""",
        ),
        ([U, ASK | {"tool_calls": [call(arguments=None)]}], "NoneType as arguments: write an obj"),
        ([U, ASK | {"tool_calls": [call(arguments={"a": {1}})]}], "1 of message 2 cannot be writt"),
        ([U, ASK | {"tool_calls": [call(arguments={"a": "\ud83d"})]}], "cannot be written as JSON"),
        ([U, ASK | {"tool_calls": [call(arguments={"a": float("nan")})]}], "cannot be written as"),
        ([U, ASK | {"tool_calls": [call(arguments=LOOP)]}], "cannot be written as JSON .*Circular"),
    ],
)  # fmt: skip
def test_what_is_no_normal_form_is_refused_with_the_message_and_what_to_do(messages, said):
    expected = re.compile(said)
    assert any(map(expected.search, validate(messages))), validate(messages)
    assert expected.search(fault(messages, False)), fault(messages, False)


@pytest.mark.parametrize(
    ("tools", "said"),
    [
        (TOOL, "Expected a list of tools, found an object with the keys 'type', 'function': write"),
        ("[]", r"Expected a list of tools, found '\[\]': write"),
        ([TOOL, "weather"], "Tool 2 is 'weather': write"),
        ([TOOL["function"]], "Tool 1 is an object with the keys 'name', 'parameters': write"),
        ([TOOL | {"function": {"parameters": {}}}], "Tool 1 has a value of type NoneType as name"),
        ([TOOL | {"function": {"name": ""}}], "Tool 1 has '' as name: write text"),
        (
            [TOOL | {"function": {"name": "f", "parameters": {"x": {1}}}}],
            "Tool 1 cannot be written",
        ),
    ],
)
def test_tools_are_schemas(tools, said):
    assert re.match(said, fault([U, A], False, tools))
    assert re.match(said, validate([U, A], tools=tools)[0])
    for nothing in (None, [], ()):
        assert fault([U, A], False, nothing) == "" and validate([U, A], tools=nothing) == []


def test_a_prompt_may_end_with_a_tools_result():
    assert fault([U, ASK, TOLD], True) == ""
    assert fault([U, A | {"weight": 0}, U], True) == "", "nothing must be learned of a prompt"
    assert "found one from the assistant" in fault([U, ASK], True)
    assert "is a tool's result without a call" in fault([U, A, TOLD], True)


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


KNOWS_ALL = (
    "{{ tools | tojson }}{% for message in messages %}{{ '<|im_start|>' + message.role }}"
    "{% if message.role == 'assistant' %}{% generation %}"
    "{{ [message.reasoning_content, message.content] | join }}{{ message.tool_calls | string }}"
    "<|im_end|>{% endgeneration %}{% else %}{{ message.content }}<|im_end|>{% endif %}{% endfor %}"
)


# --- encode, given anything ----------------------------------------------------------------------

# With halves of surrogate pairs, which `st.text()` leaves out.
TEXT = st.text(st.characters() | st.characters(categories=["Cs"]), max_size=12) | st.sampled_from(
    ["user", "assistant", "system", "Q", "", " \n", "<|im_end|>", "\x00", "a\ud83d"]
)
KEYS = ["reasoning_content", "tool_calls", "weight", "name", "tool_call_id"]
KEY = st.sampled_from(["role", "content", "type", "function", "arguments", *KEYS]) | TEXT
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
TURN = st.sampled_from(["user", "assistant"] * 3 + ["system", "tool", "bot"])
CALLS = st.lists(st.just(call()) | st.builds(call, arguments=JUNK) | JUNK, max_size=2)
MORE = {key: JUNK for key in KEYS} | {"tool_calls": CALLS, "weight": st.sampled_from([0, 1, 2])}
MESSAGE = st.fixed_dictionaries({"role": TURN | JUNK, "content": TEXT | JUNK}, optional=MORE)
ANSWERED = st.lists(TEXT, min_size=2, max_size=4).map(lambda texts: chat(*texts)["messages"])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(JUNK | st.lists(MESSAGE | JUNK, max_size=4) | ANSWERED, st.booleans(), st.none() | JUNK)
def test_whatever_it_is_given_encode_succeeds_or_raises_a_value_error(
    tokenizer, junk, prompt, tools
):
    """It succeeds exactly where `fault` finds nothing, with a template that knows all."""
    tokenizer.chat_template = KNOWS_ALL
    wrong = fault(junk, prompt, tools)
    assert isinstance(validate(junk, tools=tools), list), "it never raises"
    if wrong:
        with pytest.raises(ValueError) as raised:
            encode(junk, tokenizer, tools, add_generation_prompt=prompt)
        assert str(raised.value) == wrong
    else:
        ids, mask, labels = encode(junk, tokenizer, tools, add_generation_prompt=prompt).values()
        assert len(ids) == len(mask) == len(labels)
        assert prompt or any(mask), "something is learned"
