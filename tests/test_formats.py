"""Records of published datasets become conversations, or it is said why not."""

import gzip
import json
import re
import warnings
from pathlib import Path

from sftlib.data import decontaminate, read_facts, read_jsonl
from sftlib.data.formats import RecordError, oasst_trees, to_messages
from sftlib.data.read import convert, convert_records
from sftlib.data.validation import validate

import pytest
from hypothesis import given
from hypothesis import strategies as st

SAMPLES = Path(__file__).parents[1] / "data" / "open_formats"


def chat(*texts: str) -> dict:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": t} for i, t in enumerate(texts)]}


def message(text, role="assistant", replies=(), **more) -> dict:
    return {"message_id": text, "text": text, "role": role, "replies": list(replies), **more}


def tree(*replies: dict, **more) -> dict:
    prompt = message("Q", "prompter", replies, **more)
    return {"message_tree_id": "Q", "tree_state": "ready_for_export", "prompt": prompt}


def sharegpt(*turns: tuple[str, object]) -> dict:
    return {"id": "a_0", "conversations": [{"from": name, "value": text} for name, text in turns]}


def turn(role: str, text: str) -> dict:
    return {"role": role, "content": text}


def hh(chosen: object) -> dict:
    return {"chosen": chosen, "rejected": "\n\nHuman: Q\n\nAssistant: B"}


# --- to_messages ---------------------------------------------------------------------------------

BRANCHES = tree(
    message("second", rank=1),
    message("best", rank=0, replies=[message("Q2", "prompter", [message("A2", rank=None)])]),
    message("gone", rank=-2, deleted=True),
    message("refused", rank=-1, review_result=False),
    message("unranked", rank=None),
)


TWO_TURNS = "\n\nHuman: Q\n\nAssistant: A\n\nB\n\nHuman: R\n\nAssistant: S"


@pytest.mark.parametrize(
    "record, texts",
    [
        (chat("Q", "A"), ["Q", "A"]),
        ({**chat("Q", "A"), "source": "here"}, ["Q", "A"]),
        ({"instruction": "Add.", "input": "1, 2", "output": "3"}, ["Add.\n\n1, 2", "3"]),
        ({"instruction": "Q", "input": "", "output": "A"}, ["Q", "A"]),
        ({"instruction": "Q", "input": None, "output": "A"}, ["Q", "A"]),
        (
            {"instruction": "Q", "output": "A"}
            | {"text": "### Instruction:\nQ\n\n### Response:\nA"},
            ["Q", "A"],
        ),
        ({"instruction": "", "input": "Q", "output": "A"}, ["Q", "A"]),
        ({"prompt": chat("Q")["messages"], "completion": "A"}, ["Q", "A"]),
        (chat("Q", "A")["messages"], ["Q", "A"]),
        ({"instruction": "Q", "input": "<noinput>", "output": "A"}, ["Q", "A"]),
        ({"instruction": "Q", "input": "Noinput", "output": "A"}, ["Q", "A"]),
        ({"instruction": "Q", "input": "No input required.", "output": "A"}, ["Q", "A"]),
        ({"instruction": "Q", "input": "No inputs", "output": "A"}, ["Q\n\nNo inputs", "A"]),
        (
            {"instruction": "Q", "context": "C\n", "response": "A", "category": "closed_qa"},
            ["Q\n\nC", "A"],
        ),
        ({"instruction": "Q", "context": "", "response": "A", "category": "open_qa"}, ["Q", "A"]),
        ({"instruction": "Q", "response": "A"}, ["Q", "A"]),
        ({"question": "Q", "answer": "A"}, ["Q", "A"]),
        ({"prompt": "Q", "completion": " A"}, ["Q", "A"]),
        ({"prompt": [turn("user", "Q")], "completion": [turn("assistant", "A")]}, ["Q", "A"]),
        (hh([turn("user", "Q"), turn("assistant", "A")]), ["Q", "A"]),
        (hh([turn("assistant", "A")]) | {"prompt": [turn("user", "Q")]}, ["Q", "A"]),
        (hh([turn("assistant", "A")]) | {"prompt": "Q"}, ["Q", "A"]),
        (hh([turn("user", "Q"), turn("assistant", "A")]) | {"prompt": "Q"}, ["Q", "A"]),
        (hh("\n\nHuman: Q\n\nAssistant: A"), ["Q", "A"]),
        (hh(TWO_TURNS), ["Q", "A\n\nB", "R", "S"]),
        (hh("\n\nHuman: Q\n\nAssistant: A\n\nHuman: R"), ["Q", "A"]),
        (sharegpt(("human", "Q"), ("gpt", "A"), ("user", "R"), ("bing", "S")), list("QARS")),
        (sharegpt(("human", "Q"), ("chatgpt", "A"), ("human", "thanks")), ["Q", "A"]),
        (BRANCHES, ["Q", "best", "Q2", "A2"]),
        (tree(message("first"), message("second")), ["Q", "first"]),
        (tree(message("A", replies=[message("Thanks", "prompter")])), ["Q", "A"]),
    ],
)  # fmt: skip
def test_every_format_becomes_alternating_messages(record, texts):
    assert to_messages(record) == chat(*texts)


def test_empty_fields_of_tools_and_weights_cost_no_record():
    empty = {"tools": "[]", "functions": None}
    messages = [one | {"tool_calls": None, "weight": 1} for one in chat("Q", "A")["messages"]]
    messages[0]["weight"] = 0  # nobody learns the question
    assert to_messages({"messages": messages} | empty) == chat("Q", "A")


def test_a_system_message_stays_first():
    record = sharegpt(("system", "Be brief."), ("human", "Q"), ("gpt", "A"))
    system = {"role": "system", "content": "Be brief."}
    assert to_messages(record) == {"messages": [system, *chat("Q", "A")["messages"]]}


def test_only_whitespace_around_a_text_is_removed():
    text = "É  \n\t<b>x</b> [1]  ﬁ"
    record = {"question": f" \n{text}\u00a0\n", "answer": "A"}
    assert to_messages(record) == chat(text, "A")


def test_a_tree_deeper_than_the_stack_is_followed_to_its_end():
    node = message("A")
    for i in range(20_000):
        node = message(f"T{i}", ("prompter", "assistant")[i % 2], [node])
    assert len(to_messages(tree(node))["messages"]) == 20_002


CYCLE: dict = message("A")
CYCLE["replies"].append(CYCLE)
SELF: list = []
SELF.append({"role": "user", "content": SELF})
HUGE = 10**6000  # its repr raises, since Python limits the conversion of integers to text


CALL = [turn("user", "Q"), turn("assistant", "Let me look.") | {"tool_calls": [{"id": "1"}]}]
MUTED = [turn("user", "Q"), turn("assistant", "Well, no.") | {"weight": 0}]


@pytest.mark.parametrize(
    "record, reason",
    [
        (None, "Expected an object .* found a value of type NoneType"),
        ([chat("Q", "A")], "Expected an object .* type list"),
        pytest.param(HUGE, "type int", id="huge"),
        ({}, "Expected the keys of a known format .* no keys"),
        ({"instruction": "Q", HUGE: 1}, "'instruction', a value of type int: rename"),
        ({"messages": None}, "Expected a list of messages, found a value of type NoneType"),
        ({"messages": []}, "found no answer"),
        ({"messages": SELF}, "Expected text under 'content' of a part, found .* list"),
        ({"messages": ["Q", "A"]}, "Expected an object as message 1, found 'Q'"),
        ({"messages": [{"role": ["user"], "content": "Q"}]}, "'role' of message 1, found .* list"),
        ({"messages": [{"role": "tool", "content": "Q"}]}, "found no answer"),
        ({"messages": CALL}, "Expected text under 'name', found"),
        ({"messages": MUTED}, "Expected an answer to learn from, found weight 0"),
        (chat("Q", "A") | {"tools": [{"type": "look"}]}, "tools as objects with a name"),
        ({"messages": [{"role": "user"}]}, "Expected text under 'content', found .* NoneType"),
        ({"messages": [{"role": "user", "content": "Q"}]}, "found no answer"),
        ({"instruction": "Q", "input": 3, "output": "A"}, "text under 'input', found .* type int"),
        ({"instruction": "", "input": "", "output": "A"}, "Message 1 is empty"),
        ({"instruction": "Q", "input": "", "output": " \n"}, "Message 2 is empty"),
        ({"question": "Q", "answer": "\u200b\u3164\u2800"}, "Message 2 is empty"),
        ({"question": "Q", "answer": "a\ud83d"}, r"Message 2 has half a character .*\\ud83d"),
        ({"prompt": [{"role": "user"}], "completion": "A"}, "Expected text under 'content'"),
        (hh("Once upon a time"), "Expected 'Human:' at the beginning of 'chosen', found 'Once"),
        (hh("\n\nHuman: Q\n\nAssistant:"), "Message 2 is empty"),
        (hh("\n\nHuman: Q\n\nHuman: R\n\nAssistant: A"), "Messages 1 and 2 come from the user"),
        (hh(3), "Expected text under 'chosen'"),
        (hh(["Q"]), "Expected an object as message 1, found 'Q'"),
        (sharegpt(("gpt", "A")), "Message 1 comes from the assistant: begin with the user"),
        (sharegpt(("human", "Q"), ("system", "S"), ("gpt", "A")), "only the first message may"),
        (sharegpt(("human", "Q"), ("claude", "A")), "one of user, human, .* found 'claude'"),
        (sharegpt(("human", "Q"), ("gpt", 3)), "Expected text under 'value'"),
        (tree(), "neither deleted nor refused in review, found none"),
        (tree(message("A", deleted=True)), "found none: leave this tree out"),
        (tree(message("A"), deleted=True), "found none"),
        (tree(CYCLE), "found a message among its own replies"),
        (tree(message("A", rank="0"), message("B")), "integer or null as 'rank', found '0'"),
        (tree(message("A", "oracle")), "one of user, human, .* as 'role' of message 2"),
        ({"message_tree_id": "a", "prompt": 3}, "list of messages as 'replies'"),
        (tree("A"), "list of messages as 'replies'"),
    ],
)
def test_a_bad_record_is_refused_with_the_reason(record, reason):
    with pytest.raises(RecordError, match=re.compile(reason, re.DOTALL)):
        to_messages(record)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.none().map(lambda _: HUGE)  # a strategy of its own would be printed
    | st.sampled_from(["<|im_end|>", "\u200b", "\ud800", "Human: a\n\nAssistant: b"]),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.text(max_size=4) | st.integers(), inner, max_size=4),
    max_leaves=8,
)  # fmt: skip
NAMES = st.sampled_from(["user", "assistant", "system", "human", "gpt", "prompter", "x"]) | JSON
MESSAGE = st.fixed_dictionaries(
    {}, optional={"role": NAMES, "from": NAMES, "content": JSON, "value": JSON, "text": JSON}
)
NODE = st.recursive(
    MESSAGE,
    lambda node: st.fixed_dictionaries(
        {"role": NAMES, "text": JSON},
        optional={"replies": st.lists(node, max_size=3) | JSON, "rank": JSON, "deleted": JSON},
    ),
    max_leaves=6,
)
VALUE = JSON | st.lists(MESSAGE, max_size=4) | NODE
KEYS = (
    "messages conversations message_tree_id prompt chosen rejected instruction input output "
    "context response question answer completion"
).split()
RECORD = JSON | st.fixed_dictionaries({}, optional=dict.fromkeys(KEYS, VALUE))


@pytest.mark.integration
@given(RECORD)
def test_whatever_the_record_it_is_a_sound_conversation_or_a_record_error(record):
    try:
        messages = to_messages(record)["messages"]
    except RecordError as error:
        assert str(error)
        return
    assert to_messages({"messages": messages}) == {"messages": messages}
    assert not [p for p in validate(messages, 10**9) if "only repeats" not in p]
    assert all(m.keys() == {"role", "content"} and m["content"].strip() for m in messages)
    roles = [m["role"] for m in messages if m["role"] != "system"]
    assert roles == ["user", "assistant"] * (len(roles) // 2)


@given(JSON | st.lists(MESSAGE | JSON, max_size=5))
def test_problems_never_raises_and_agrees_with_to_messages(messages):
    found = validate(messages)
    assert all(isinstance(sentence, str) and sentence.endswith(".") for sentence in found)
    if not found:
        assert to_messages({"messages": messages})


# --- oasst_trees ---------------------------------------------------------------------------------


def row(name, parent=None, role="assistant", **more) -> dict:
    kept = {"message_id": name, "parent_id": parent, "role": role, "text": name}
    return {**kept, "message_tree_id": "a", "tree_state": "ready_for_export", **more}


def test_the_hubs_table_becomes_the_published_trees():
    rows = [
        row("b", "a", rank=1),
        row("a", role="prompter"),
        row("z", role="prompter", message_tree_id="z"),
        row("c", "a", rank=0),
        row("y", "z"),
    ]
    before = json.dumps(rows)
    trees = oasst_trees(rows)
    assert [t["message_tree_id"] for t in trees] == ["a", "z"]
    assert [r["message_id"] for r in trees[0]["prompt"]["replies"]] == ["b", "c"]
    assert [to_messages(t) for t in trees] == [chat("a", "c"), chat("z", "y")]
    assert json.dumps(rows) == before


@pytest.mark.parametrize(
    "rows, reason",
    [
        ([row("b", "a")], "parent of message 'b' .* found none with the id 'a'"),
        ([row("a"), row("a")], "found 'a' again in row 2"),
        ([row("a"), row("b", "c"), row("c", "b")], "message 'b' below one of its replies"),
        ([row("a"), {"text": "b"}], "message_id in row 2"),
        ([row("a"), row("b", ["a"])], "found none with the id a value of type list"),
        ([None], "message_id in row 1, found a value of type NoneType"),
    ],
)
def test_a_table_with_a_loose_message_is_refused(rows, reason):
    with pytest.raises(RecordError, match=reason):
        oasst_trees(rows)


# --- convert -------------------------------------------------------------------------------------


def test_a_table_of_messages_becomes_trees_and_a_broken_line_stays_a_reject(tmp_path):
    rows = [row("a", role="prompter"), row("b", "a", rank=1), row("c", "a", rank=0)]
    lines = [json.dumps(rows[0]), "{", *map(json.dumps, rows[1:])]
    (tmp_path / "table.jsonl").write_text("\n".join(lines))
    found = convert(tmp_path / "table.jsonl")
    assert found.rows == [chat("a", "c")] and [r["line"] for r in found.rejects] == [2]
    assert convert_records(rows).rows == [chat("a", "c")]
    mixed = convert_records([*rows, chat("Q", "A")])  # no table
    assert mixed.rows == [chat("Q", "A")] and len(mixed.rejects) == 3


GOOD = {"instruction": "Q", "input": "", "output": "A"}


def rejected(path: Path) -> list[tuple[int, str]]:
    return [(r["line"], r["reason"]) for r in convert(path).rejects]


def test_every_bad_line_is_listed_and_stops_nothing(tmp_path):
    file = tmp_path / "a.jsonl"
    lines = [
        json.dumps(GOOD).encode(),
        b'{"instruction": "Q"',
        b"",
        b'{"instruction": "\xff", "output": "A"}',
        b'{"question": "Q", "answer": "A"} {}',
        b"[1]",
        b'{"question": "Q", "question": "R", "answer": "A"}',
        b'{"question": "Q", "answer": ' + b"9" * 5000 + b"}",
        b'{"question": ' + b"[" * 100_000,
        b'{"question": "Q", "answer": "\\ud83d"}',
        b'{"question": "Q\\ud83d\\ude00", "answer": "\xc3\xa9"}\r',
    ]
    file.write_bytes(b"\n".join(lines))
    found = convert(file)
    assert found.rows == [chat("Q", "A"), chat("Q\U0001f600", "é")]
    expected = {
        2: "broken JSON (Expecting",
        4: "Expected text in UTF-8",
        5: "found more after it: '{}'",
        6: "found a value of type list",
        7: "the same key twice",
        8: "broken JSON (Exceeds the limit",
        9: "broken JSON (maximum recursion depth",
        10: "Message 2 is empty",
    }
    assert [r["line"] for r in found.rejects] == list(expected)
    for reject, reason in zip(found.rejects, expected.values(), strict=True):
        assert reason in reject["reason"]
        assert 0 < len(reject["text"]) <= 200
    assert found.rejects[1]["text"] == '{"instruction": "\\xff", "output": "A"}'


def test_rejects_are_written_too(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"question": "\xff\n')
    found = convert(file, rejects=tmp_path / "rejects.jsonl")
    assert read_jsonl(tmp_path / "rejects.jsonl") == found.rejects != []
    file.write_text(json.dumps(GOOD))
    convert(file, rejects=tmp_path / "rejects.jsonl")
    assert read_jsonl(tmp_path / "rejects.jsonl") == []


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".jsonl.gz", ".json.gz", ".JSON"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_lines_arrays_gzip_and_byte_order_marks_are_read(tmp_path, suffix, mark):
    lines = suffix.startswith(".jsonl")
    data = mark + json.dumps(GOOD if lines else [GOOD], indent=None if lines else 4).encode()
    file = tmp_path / f"a{suffix}"
    file.write_bytes(gzip.compress(data) if suffix.endswith(".gz") else data)
    assert convert(file).rows == [chat("Q", "A")]
    assert convert(file).rejects == []


@pytest.mark.parametrize(
    "name, data, reason",
    [
        (
            "a.txt",
            b"Once upon a time.\nThere was",
            "Expected JSON lines.* found 'Once upon a time.'",
        ),
        pytest.param("a.txt", b"x" + b"\n" * 300_000, "Expected JSON lines", id="empty lines"),
        ("a.csv", b"PK\x03\x04\x00", "Expected JSON lines"),
        ("a.parquet", b"PAR1", "found damaged data"),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfd\x24", "found damaged data"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}' * 99, mtime=0)[:-9], "found damaged data"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path, name, data, reason):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=reason):
        convert(tmp_path / name)


def test_a_missing_file_is_said_to_be_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        convert(tmp_path / "a.jsonl")


def array(tmp_path: Path, text: str) -> Path:
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    return tmp_path / "a.json"


@pytest.mark.parametrize("indent", [None, 2, 4, "\t"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda record: record[:-1],
        lambda record: record.replace('"A1"', '"A1'),
        lambda record: record.replace('"A1"', 'A1"'),
        lambda record: record.replace(":", "", 1),
        lambda record: record.replace("[", "", 1),
        lambda record: record.replace("]", "", 1),
        lambda record: record.replace("{", "", 1),
        lambda record: "{" + record,
        lambda record: record + "}",
        lambda record: record[: len(record) // 2],
        lambda record: record.replace('"A1"', '"A1, {\\"b\\": 1}, {"1'),
        lambda record: "nonsense",
        lambda record: "",
    ],
)
def test_a_broken_record_in_an_array_takes_no_neighbour_with_it(tmp_path, indent, damage):
    records = [sharegpt(("human", f"Q{i}"), ("gpt", f"A{i}")) for i in range(4)]
    text = json.dumps(records, indent=indent)
    separate = json.dumps(records[1], indent=indent)
    if indent is not None:
        separate = separate.replace("\n", f"\n{indent if indent == chr(9) else ' ' * indent}")
    assert separate in text
    file = array(tmp_path, text.replace(separate, damage(separate)))
    found = convert(file)
    wanted = [chat(f"Q{i}", f"A{i}") for i in (0, 2, 3)]
    assert [r for r in found.rows if r != chat("Q1", "A1")] == wanted
    if damage(separate):
        assert found.rejects
        assert {r["line"] for r in found.rejects} <= set(range(1, text.count("\n") + 2))


@pytest.mark.parametrize("indent", [None, 2])
def test_adjacent_broken_records_are_listed_one_by_one(tmp_path, indent):
    records = [sharegpt(("human", f"Q{i}"), ("gpt", f"A{i}")) for i in range(5)]
    text = json.dumps(records, indent=indent)
    for broken in ('"A1"', '"A2"', '"A4"'):
        text = text.replace(broken, broken[:-1])
    found = convert(array(tmp_path, text))
    assert found.rows == [chat("Q0", "A0"), chat("Q3", "A3")]
    first = [r["text"][:30] for r in found.rejects]
    assert len(first) == 3
    assert all("a_0" in beginning for beginning in first)
    assert found.rejects[-1]["text"].rstrip().endswith("}")  # the array's own end is not its


def test_in_one_line_a_neighbour_of_another_format_is_found_too(tmp_path):
    text = '[{"instruction": "Q", "output": "A}, {"question": "Q", "answer": "A"}, {"a": 1}]'
    found = convert(array(tmp_path, text))
    assert found.rows == [chat("Q", "A")]
    assert [r["text"] for r in found.rejects][1:] == ['{"a": 1}']


@pytest.mark.parametrize(
    "text, lines",
    [
        ("[\n]", []),
        ("[", [1]),
        ('[\n  {"question": "Q", "answer": "A"},\n', [2]),
        ('[\n  {"question": "Q", "answer": "A"},\n  {"question": ', [3]),
        ('\n\n[\n  3,\n  null,\n  {"question": "Q", "answer": "A"}\n]\n', [4, 5]),
        ('[\n  {"question": "Q", "answer": "A"}\n]\n{"more": 1}\n', [3]),
    ],
)
def test_what_an_array_lacks_or_has_too_much_is_listed_with_its_line(tmp_path, text, lines):
    assert [line for line, _ in rejected(array(tmp_path, text))] == lines


def test_bytes_that_are_not_utf8_spoil_one_record_of_an_array(tmp_path):
    file = tmp_path / "a.json"
    records = [{"question": f"Q{i}", "answer": "A"} for i in range(3)]
    file.write_bytes(json.dumps(records, indent=2).encode().replace(b"Q1", b"\xff"))
    found = convert(file)
    assert found.rows == [chat("Q0", "A"), chat("Q2", "A")]
    assert [(r["line"], "UTF-8" in r["reason"]) for r in found.rejects] == [(6, True)]


def numbered(name: str, i: int) -> dict:
    """Record `i`, laid out as in the published dataset."""
    question, answer = f'Question "{i}"?\n[x] {{', f"Ünswer {i}.\n}}, {{"
    return {
        "alpaca": {"instruction": question, "input": "", "output": answer},
        "dolly": {"instruction": question, "context": "", "response": answer, "category": "x"},
        "oasst": tree(message(answer, rank=0), message("worse", rank=1))
        | {"prompt": message(question, "prompter", [message(answer, rank=0)])},
        "hh": hh(f"\n\nHuman: {question}\n\nAssistant: {answer}"),
        "sharegpt": sharegpt(("human", question), ("gpt", answer)),
    }[name]


@pytest.mark.integration
@pytest.mark.parametrize(
    "name, suffix, indent",
    [
        ("alpaca", ".json", 4),
        ("dolly", ".jsonl", None),
        *(
            pytest.param(*case, marks=pytest.mark.integration)
            for case in [
                ("alpaca", ".json", None),
                ("oasst", ".jsonl", None),
                ("hh", ".jsonl.gz", None),
                ("sharegpt", ".json", 2),
                ("sharegpt", ".json", None),
            ]
        ),
    ],
)
def test_of_ten_thousand_records_exactly_the_bad_ones_are_listed(tmp_path, name, suffix, indent):
    total, bad = 10_000, {0, 7, 8, 5000, 9999}
    records = []
    for i in range(total):
        text = json.dumps(numbered(name, i), ensure_ascii=False, indent=indent)
        if indent:
            text = " " * indent + text.replace("\n", "\n" + " " * indent)
        records.append(text.replace(f"{i}.", f'{i}."', 1) if i in bad else text)
    starts = [1]
    if suffix == ".json":
        comma = ",\n" if indent else ", "
        data = f"[\n{comma.join(records)}\n]" if indent else f"[{comma.join(records)}]"
        starts = [2 if indent else 1]
    else:
        comma, data = "\n", "\n".join(records) + "\n"
    for text in records[:-1]:
        starts.append(starts[-1] + (text + comma).count("\n"))
    file = tmp_path / f"a{suffix}"
    data = data.encode()
    file.write_bytes(gzip.compress(data, 1) if suffix.endswith(".gz") else data)
    found = convert(file)
    good = [numbered("dolly", i) for i in range(total) if i not in bad]
    assert found.rows == [chat(r["instruction"], r["response"]) for r in good]
    assert [r["line"] for r in found.rejects] == [starts[i] for i in sorted(bad)]
    for reject, i in zip(found.rejects, sorted(bad), strict=True):
        assert "broken JSON" in reject["reason"]
        assert str(i) in reject["text"]


@given(st.lists(st.tuples(st.text(), st.text()), max_size=6), st.sampled_from([None, 0, 1, 4]))
def test_any_text_survives_an_array(tmp_path_factory, pairs, indent):
    records = [{"question": "q" + q, "answer": a + "a"} for q, a in pairs if "think>" not in a]
    file = tmp_path_factory.mktemp("a") / "a.json"
    file.write_text(json.dumps(records, indent=indent))
    found = convert(file)
    assert len(found.rows) + len(found.rejects) == len(records)
    sound = [r for r in records if not validate(chat(r["question"], r["answer"])["messages"])]
    assert all(chat(r["question"].strip(), r["answer"].strip()) in found.rows for r in sound)


@given(st.binary(max_size=60) | st.text('[]{}",:\\ \nab1').map(str.encode))
def test_no_bytes_make_an_array_raise_or_hang(tmp_path_factory, data):
    file = tmp_path_factory.mktemp("a") / "a.json"
    file.write_bytes(b'[{"question": "Q", "answer": "A"},' + data)
    found = convert(file)
    assert chat("Q", "A") in found.rows or found.rejects
    file.with_suffix(".jsonl").write_bytes(b" " + data)  # no magic number of a packed file
    convert(file.with_suffix(".jsonl"))


# --- The shipped samples -------------------------------------------------------------------------

FLAWS = {
    "alpaca.json": (12, 32, "Message 2 is empty"),
    "dolly.jsonl": (12, 8, "Message 2 has half a character"),
    "hh_rlhf.jsonl": (8, 5, "Message 4 is empty"),
    "oasst1.trees.jsonl": (6, 4, "neither deleted nor refused in review"),
    "sharegpt.json": (8, 57, "Message 1 comes from the assistant"),
    "smoltalk.jsonl": (9, 7, "found no answer"),
}


def test_every_sample_has_its_known_flaw():
    assert {path.name for path in SAMPLES.glob("[!.]*")} == FLAWS.keys()


@pytest.mark.parametrize("name", FLAWS)
def test_of_a_sample_exactly_the_flawed_record_is_refused(name):
    records, line, reason = FLAWS[name]
    found = convert(SAMPLES / name)
    assert len(found.rows) == records - 1
    assert [(r["line"], reason in r["reason"]) for r in found.rejects] == [(line, True)]
    assert all(validate(row["messages"]) == [] for row in found.rows)


@pytest.mark.parametrize("name", FLAWS)
def test_a_sample_holds_a_leak_as_open_data_does(name):
    """Lesson 2 finds them when it mixes its sources."""
    tests = ("dev", "heldout", "heldout_wordings", "unknown", "never_asked")
    rows = convert(SAMPLES / name).rows
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that many are leaks
        clean, leaks = decontaminate(rows, [row for test in tests for row in read_facts(test)])
    assert 1 <= len(leaks) <= 3 and len(clean) == len(rows) - len(leaks)


def test_some_samples_repeat_an_answer_of_the_sft_data_word_for_word():
    answers = {row["messages"][1]["content"] for row in read_facts("sft")}
    rows = [row["messages"] for name in FLAWS for row in convert(SAMPLES / name).rows]
    assert sum(any(m["content"] in answers for m in messages) for messages in rows) >= 5


@pytest.mark.parametrize("name, indent", [("alpaca.json", 4), ("sharegpt.json", 2)])
def test_array_samples_are_laid_out_as_published(name, indent):
    text = (SAMPLES / name).read_text(encoding="utf-8")
    assert text == json.dumps(json.loads(text), indent=indent, ensure_ascii=False) + "\n"


def test_the_tree_sample_has_the_published_fields():
    trees = read_jsonl(SAMPLES / "oasst1.trees.jsonl")
    todo = [t["prompt"] for t in trees]
    assert all(t.keys() == {"message_tree_id", "tree_state", "prompt"} for t in trees)
    names = (
        "message_id parent_id user_id created_date text role lang review_count review_result "
        "deleted rank synthetic model_name emojis replies labels detoxify"
    )
    while todo:
        node = todo.pop()
        assert list(node) == names.split()
        assert all(reply["parent_id"] == node["message_id"] for reply in node["replies"])
        todo += node["replies"]
