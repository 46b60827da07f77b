"""Turn records of published SFT datasets into conversations, and say why one cannot be turned.

`to_messages` knows Alpaca, Dolly, OASST1, HH-RLHF, ShareGPT and plain pairs; `convert` does a whole
file and lists what it had to leave out; `problems` looks over an example written by hand.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import pairwise

ROLES = {"system": "system", "user": "user", "assistant": "assistant"}
OASST_ROLES = {"prompter": "user", "assistant": "assistant"}
HH_ROLES = {"Human": "user", "Assistant": "assistant"}
SHAREGPT_ROLES = (
    dict.fromkeys(("human", "user"), "user")
    | dict.fromkeys(("gpt", "chatgpt", "assistant", "bard", "bing"), "assistant")
    | {"system": "system"}
)

# Text that a tokenizer may read as the end of a message or as the start of another one: ChatML,
# Llama 3, Phi, DeepSeek, Gemma, Llama 2.
CONTROL_TOKEN = re.compile(
    r"<\|[^<>|]{1,40}\|>|<｜[^<>|｜]{1,40}｜>|<(?:start|end)_of_turn>|\[/?INST\]|<</?SYS>>|</s>",
    re.IGNORECASE,
)
# Letters by their category, yet nothing is seen: Hangul fillers and the empty Braille pattern.
BLANK_LETTERS = "\u115f\u1160\u3164\uffa0\u2800"
# Some Alpaca-like sets write that there is no input: "<noinput>", "Noinput", "No input required."
NO_INPUT = re.compile(r"\W*no\s*input(\s+(required|needed|necessary|provided|given))?\W*", re.I)
HH_TURN = re.compile(r"\n\n(Human|Assistant):")


# Rows of `datasets` are no dicts. With dict first, `isinstance` is several times as fast.
MAPPINGS = (dict, Mapping)


class RecordError(ValueError):
    """A record cannot become a conversation: what was expected, what was found, what to do."""


# --- What is wrong with a conversation -----------------------------------------------------------


class _Plain(dict):
    """A table for `str.translate`, filled as characters are met: punctuation becomes a space."""

    def __missing__(self, code: int) -> str | int | None:
        category = unicodedata.category(chr(code))
        plain = None if category == "Cf" else " " if category[0] in "PZ" else code
        self[code] = " " if category == "Cc" else plain
        return self[code]


_PLAIN = _Plain()


def normalise(text: str) -> str:
    """The text as comparisons see it: NFKC, casefolded, punctuation and whitespace as one space.

    A text that has nothing else keeps its punctuation.
    """
    plain = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(plain.translate(_PLAIN).split()) or " ".join(plain.split())


def problems(messages: object, max_chars: int = 8000) -> list[str]:
    """Everything that is wrong with an example written by hand; an empty list when it is fine.

    Looks for what `to_messages` refuses (roles, order, empty or broken text, control tokens), and
    for other keys than `role` and `content`, answers that repeat their question and messages of
    more than `max_chars` characters. Every sentence names the message, counted from 1, and what to
    do. Never raises, whatever it is given.
    """
    if not isinstance(messages, list):
        return [
            f"Expected a list of messages, found {briefly(messages)}: "
            'write [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}].'
        ]
    found = [p for n, m in enumerate(messages, 1) for p in _message_problems(n, m, max_chars)]
    roles = [m.get("role") if isinstance(m, dict) else None for m in messages]
    if all(isinstance(role, str) and role in ROLES for role in roles):
        found += [*_order_problems(roles), *_repeats(messages)]
    return found


def _message_problems(number: int, message: object, max_chars: int) -> Iterator[str]:
    name = f"Message {number}"
    if not isinstance(message, dict):
        yield f'{name} is {briefly(message)}: write {{"role": ..., "content": ...}}.'
        return
    if "role" not in message:
        yield f"{name} has no role: add user, assistant or system."
    elif not isinstance(message["role"], str) or message["role"] not in ROLES:
        yield f"{name} has the role {briefly(message['role'])}: write user, assistant or system."
    for key in [key for key in message if key not in ("role", "content")]:
        yield f"{name} has the key {briefly(key)}: only role and content are read; remove it."
    content = message.get("content")
    if "content" not in message:
        yield f"{name} has no content: add its text."
    elif not isinstance(content, str):
        yield f"{name} has {briefly(content)} as content: write text."
    else:
        yield from _text_problems(number, content)
        if len(content) > max_chars:
            yield f"{name} has {len(content)} characters, more than {max_chars}: shorten it."


def _text_problems(number: int, text: str) -> list[str]:
    """Why a text cannot be learned, in sentences."""
    # Every control token has one of these; to search for it is slow, and most texts are plain.
    suspicious = "<" in text or "[" in text
    if not suspicious and text.isascii() and "!" <= text[:1] <= "~":
        return []
    found = []
    if not any(map(_visible, text)):
        found.append(f"Message {number} is empty: write its text, or leave the example out.")
    if suspicious and (token := CONTROL_TOKEN.search(text)):
        found.append(f"Message {number} holds the control token {token[0]!r}: reword the text.")
    if broken := _surrogate(text):
        found.append(f"Message {number} has half a character ({broken}): type it again.")
    return found


def _visible(character: str) -> bool:
    return unicodedata.category(character)[0] not in "ZC" and character not in BLANK_LETTERS


def _surrogate(text: str) -> str:
    """The first half of a character that stands alone, escaped; empty when there is none."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return ascii(text[error.start])
    return ""


def _order_problems(roles: list[str]) -> Iterator[str]:
    first = 1 if roles[:1] == ["system"] else 0
    if roles[first:] == ["user", "assistant"] * max(1, (len(roles) - first) // 2):
        return  # the usual case, in a hurry
    if roles[first : first + 1] not in (["user"], []):
        yield f"Message {first + 1} comes from the {roles[first]}: begin with the user."
    for number, (before, role) in enumerate(pairwise(roles), 2):
        if role == "system":
            yield f"Message {number} comes from the system: only the first message may."
        elif role == before:
            yield f"Messages {number - 1} and {number} come from the {role}: let roles alternate."
    if "assistant" not in roles:
        yield f"There is no answer in {len(roles)} messages: end with one from the assistant."
    elif roles[-1] != "assistant":
        yield f"Message {len(roles)} comes from the {roles[-1]}: end with the assistant's answer."


def _repeats(messages: list[dict]) -> Iterator[str]:
    for number, (question, answer) in enumerate(pairwise(messages), 2):
        texts = [question.get("content"), answer.get("content")]
        if answer["role"] != "assistant" or not all(isinstance(text, str) for text in texts):
            continue
        before, after = (normalise(text).replace(" ", "") for text in texts)
        if before == after and after:
            yield f"Message {number} only repeats message {number - 1}: write an answer."


def briefly(value: object) -> str:
    """What a value is, briefly; never its whole content, which may be huge or contain itself."""
    if isinstance(value, str):
        return repr(value if len(value) <= 40 else value[:40] + "…")
    if isinstance(value, Mapping):
        keys = [briefly(key) for key, _ in zip(value, range(8), strict=False)]
        return f"an object with {'the keys ' + ', '.join(keys) if keys else 'no keys'}"
    return f"a value of type {type(value).__name__}"


# --- One record ----------------------------------------------------------------------------------

Turns = list[tuple[str, str]]  # (role, text) of each message


def to_messages(record: object) -> dict:
    """One record of a published dataset as `{"messages": [{"role": ..., "content": ...}, ...]}`.

    | format | keys | becomes |
    |---|---|---|
    | chat | `messages` | the same roles and texts |
    | ShareGPT | `conversations` of `from`, `value` | human → user, gpt → assistant |
    | OASST1 | `message_tree_id`, `prompt` | the path of best-ranked replies (rank 0 is best) |
    | HH-RLHF | `chosen`, `rejected` | the turns of `chosen` |
    | Alpaca | `instruction`, `output`, perhaps `input` | instruction, a blank line, input → user |
    | Dolly | `instruction`, `response`, perhaps `context` | the same with the context |
    | pairs | `question`, `answer`; or `prompt`, `completion` | two messages |

    Other keys are ignored. Whitespace around a text is removed, nothing else is changed. Messages
    after the last answer are left out, since nothing can be learned from them. In a tree, deleted
    replies and those that failed review are passed over.

    Sources: the datasets' cards on the Hub, `tatsu-lab/alpaca`, `databricks/databricks-dolly-15k`,
    `OpenAssistant/oasst1`, `Anthropic/hh-rlhf`, `anon8231489123/ShareGPT_Vicuna_unfiltered`.

    Raises:
        RecordError: the format is not known, or the conversation is not sound: roles that do not
            alternate from user to assistant, an empty text, a control token inside a text, text
            that is not valid Unicode.
    """
    turns = _format(record)(record)
    while turns and turns[-1][0] != "assistant":
        turns.pop()
    if not turns:
        raise RecordError("Expected a question and its answer, found no answer: leave it out.")
    messages = [{"role": role, "content": text.strip()} for role, text in turns]
    for wrong in _order_problems([role for role, _ in turns]):
        raise RecordError(wrong)
    for number, message in enumerate(messages, 1):
        for wrong in _text_problems(number, message["content"]):
            raise RecordError(wrong)
    return {"messages": messages}


def _format(record: object) -> Callable[[Mapping], Turns]:
    """The reader whose keys the record has."""
    if not isinstance(record, MAPPINGS):
        raise RecordError(f"Expected an object with named fields, found {briefly(record)}.")
    for keys, read in FORMATS:
        if record.keys() >= keys:
            return read
    known = "; ".join(", ".join(sorted(keys)) for keys, _ in FORMATS)
    raise RecordError(
        f"Expected the keys of a known format ({known}), found {briefly(record)}: rename its keys."
    )


def _text(record: Mapping, key: str) -> str:
    text = record.get(key)
    if not isinstance(text, str):
        raise RecordError(f"Expected text under {key!r}, found {briefly(text)}.")
    return text.strip()


def _pair(question: str, answer: str, context: str = "") -> Callable[[Mapping], Turns]:
    """A reader of records with a question, an answer and perhaps a context for the question."""

    def read(record: Mapping) -> Turns:
        user = _text(record, question)
        extra = "" if record.get(context) is None else _text(record, context)
        if user and extra and not NO_INPUT.fullmatch(extra):
            user += "\n\n" + extra
        return [("user", user), ("assistant", _text(record, answer))]

    return read


def _list(
    key: str, role_key: str, text_key: str, roles: dict[str, str]
) -> Callable[[Mapping], Turns]:
    """A reader of records that hold their messages as a list."""
    return lambda record: _turns(record[key], role_key, text_key, roles)


def _turns(items: object, role_key: str, text_key: str, roles: dict[str, str]) -> Turns:
    if not isinstance(items, list):
        raise RecordError(f"Expected a list of messages, found {briefly(items)}.")
    return [
        (_role(n, item, role_key, roles), _text(item, text_key)) for n, item in enumerate(items, 1)
    ]


def _role(number: int, item: object, key: str, roles: dict[str, str]) -> str:
    if not isinstance(item, MAPPINGS):
        raise RecordError(f"Expected an object as message {number}, found {briefly(item)}.")
    name = item.get(key)
    if not isinstance(name, str) or name not in roles:
        raise RecordError(
            f"Expected one of {', '.join(roles)} as {key!r} of message {number}, "
            f"found {briefly(name)}: leave the example out, or rename the role."
        )
    return roles[name]


def _hh(record: Mapping) -> Turns:
    before, *parts = HH_TURN.split("\n\n" + _text(record, "chosen"))
    if before or not parts:
        raise RecordError(
            f"Expected 'Human:' at the beginning of 'chosen', found {briefly(record['chosen'])}."
        )
    return [(HH_ROLES[name], text) for name, text in zip(parts[::2], parts[1::2], strict=True)]


def _tree(record: Mapping) -> Turns:
    """The path of best-ranked replies; a loop, since a tree may be deeper than Python's stack."""
    path, seen, node = [], set(), _best([record["prompt"]])
    while node is not None:
        if id(node) in seen:
            raise RecordError("Expected a tree, found a message among its own replies.")
        seen.add(id(node))
        path.append(node)
        node = _best(node.get("replies"))
    if len(path) < 2:
        raise RecordError(
            "Expected a prompt and a reply, neither deleted nor refused in review, "
            "found none: leave this tree out."
        )
    return _turns(path, "role", "text", OASST_ROLES)


def _best(replies: object) -> Mapping | None:
    if replies is None:
        return None
    if not isinstance(replies, list) or not all(isinstance(r, MAPPINGS) for r in replies):
        raise RecordError(f"Expected a list of messages as 'replies', found {briefly(replies)}.")
    usable = [
        reply
        for reply in replies
        if reply.get("deleted") is not True and reply.get("review_result") is not False
    ]
    return min(usable, key=_rank, default=None)


def _rank(reply: Mapping) -> float:
    rank = reply.get("rank")
    if rank is not None and not isinstance(rank, int):
        raise RecordError(f"Expected an integer or null as 'rank', found {briefly(rank)}.")
    return math.inf if rank is None else rank


FORMATS: tuple[tuple[frozenset[str], Callable[[Mapping], Turns]], ...] = tuple(
    (frozenset(keys.split()), read)
    for keys, read in (
        ("messages", _list("messages", "role", "content", ROLES)),
        ("conversations", _list("conversations", "from", "value", SHAREGPT_ROLES)),
        ("message_tree_id prompt", _tree),
        ("chosen rejected", _hh),
        ("instruction output", _pair("instruction", "output", "input")),
        ("instruction response", _pair("instruction", "response", "context")),
        ("question answer", _pair("question", "answer")),
        ("prompt completion", _pair("prompt", "completion")),
    )
)


def oasst_trees(rows: Iterable[Mapping]) -> list[dict]:
    """The trees of OASST's flat message table, in the order of their first messages.

    The Hub's `load_dataset("OpenAssistant/oasst1")` has one message a row; `to_messages` wants the
    trees of the published `*.trees.jsonl`. The rows themselves are not changed.

    Raises:
        RecordError: a row is no message, two have the same id, or one cannot be reached from a
            first message because its parent is missing (as after filtering single messages:
            filter by `message_tree_id` instead) or because it is its own ancestor.
    """
    nodes: dict[str, dict] = {}
    for number, row in enumerate(rows, 1):
        name = row.get("message_id") if isinstance(row, Mapping) else None
        if not isinstance(name, str):
            raise RecordError(f"Expected a message_id in row {number}, found {briefly(row)}.")
        if name in nodes:
            raise RecordError(f"Expected every message once, found {name!r} again in row {number}.")
        nodes[name] = {**row, "replies": []}
    roots = [node for node in nodes.values() if node.get("parent_id") is None]
    for name, node in nodes.items():
        if (parent := node.get("parent_id")) is None:
            continue
        if not isinstance(parent, str) or parent not in nodes:
            raise RecordError(
                f"Expected the parent of message {name!r} among the rows, found none with the id "
                f"{briefly(parent)}: keep or leave out whole trees, by message_tree_id."
            )
        nodes[parent]["replies"].append(node)
    _refuse_loops(nodes, roots)
    return [
        {
            "message_tree_id": root.get("message_tree_id") or root["message_id"],
            "tree_state": root.get("tree_state"),
            "prompt": root,
        }
        for root in roots
    ]


def _refuse_loops(nodes: dict[str, dict], roots: list[dict]) -> None:
    reached, todo = set(), list(roots)
    while todo:
        node = todo.pop()
        reached.add(node["message_id"])
        todo += node["replies"]
    for name in nodes:
        if name not in reached:
            raise RecordError(f"Expected a tree, found message {name!r} below one of its replies.")
