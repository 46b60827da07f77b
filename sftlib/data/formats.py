"""Turn records of published SFT datasets into conversations, and say why one cannot be turned.

`to_messages` knows Alpaca, Dolly, OASST1, HH-RLHF, ShareGPT and plain pairs; `convert` does a whole
file and lists what it had to leave out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping

from sftlib.data.validation import MAPPINGS, ROLES, briefly, order_problems, text_problems

OASST_ROLES = {"prompter": "user", "assistant": "assistant"}
HH_ROLES = {"Human": "user", "Assistant": "assistant"}
SHAREGPT_ROLES = (
    dict.fromkeys(("human", "user"), "user")
    | dict.fromkeys(("gpt", "chatgpt", "assistant", "bard", "bing"), "assistant")
    | {"system": "system"}
)

# Some Alpaca-like sets write that there is no input: "<noinput>", "Noinput", "No input required."
NO_INPUT = re.compile(r"\W*no\s*input(\s+(required|needed|necessary|provided|given))?\W*", re.I)
HH_TURN = re.compile(r"\n\n(Human|Assistant):")


# Messages of text alone would lose these, and the example would mean something else.
LOST = ("tools", "functions", "tool_calls", "function_call", "reasoning_content", "thinking")


class RecordError(ValueError):
    """A record cannot become a conversation: what was expected, what was found, what to do."""


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
    | preferences | `chosen`, `rejected`: messages; perhaps `prompt` | the prompt and `chosen` |
    | prompt and completion | `prompt`, `completion`: texts, or messages | one after the other |
    | Alpaca | `instruction`, `output`, perhaps `input` | instruction, a blank line, input → user |
    | Dolly | `instruction`, `response`, perhaps `context` | the same with the context |
    | pairs | `question`, `answer` | two messages |

    Other keys are ignored, unless they change what the example says or teaches (tools, reasoning,
    weight 0). Whitespace around a text is removed; nothing else is changed. Messages after the last
    answer are left out, because nothing can be learned from them. In a tree, deleted replies and
    those that failed review are skipped.

    Sources: the datasets' cards on the Hub, `tatsu-lab/alpaca`, `databricks/databricks-dolly-15k`,
    `OpenAssistant/oasst1`, `Anthropic/hh-rlhf`, `anon8231489123/ShareGPT_Vicuna_unfiltered`.

    Raises:
        RecordError: the format is not known, or the conversation is not sound: roles that do not
            alternate from user to assistant, an empty text, a control token inside a text, text
            that is not valid Unicode, tools or reasoning beside the text, an answer of weight 0.
    """
    if not isinstance(record, MAPPINGS):
        raise RecordError(f"Expected an object with named fields, found {briefly(record)}.")
    read = _format(record)
    _refuse_losses("the record", record)
    turns = read(record)
    while turns and turns[-1][0] != "assistant":
        turns.pop()
    if not turns:
        raise RecordError("Expected a question and its answer, found no answer: leave it out.")
    messages = [{"role": role, "content": text.strip()} for role, text in turns]
    for wrong in order_problems([role for role, _ in turns]):
        raise RecordError(wrong)
    for number, message in enumerate(messages, 1):
        for wrong in text_problems(number, message["content"]):
            raise RecordError(wrong)
    return {"messages": messages}


def _format(record: Mapping) -> Callable[[Mapping], Turns]:
    """The reader whose keys the record has."""
    for keys, read in FORMATS:
        if record.keys() >= keys:
            return read
    known = "; ".join(", ".join(sorted(keys)) for keys, _ in FORMATS)
    raise RecordError(
        f"Expected the keys of a known format ({known}), found {briefly(record)}: rename its keys."
    )


def _refuse_losses(where: str, item: Mapping) -> None:
    """Refuse a record or message that messages of text alone would change."""
    for key in LOST:
        if item.get(key) and item[key] != "[]":  # some datasets store the list as JSON text
            raise RecordError(
                f"Expected messages of text alone, found {key!r} in {where}. It would be lost: "
                "leave the example out, or write it into the text."
            )
    weight = item.get("weight")
    if weight is not None and weight == 0 and item.get("role") == "assistant":
        raise RecordError(
            f"Expected answers to learn, found weight 0 in {where}: end the example before it, or "
            "remove the weight."
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
    turns = []
    for number, item in enumerate(items, 1):
        role = _role(number, item, role_key, roles)
        _refuse_losses(f"message {number}", item)
        turns.append((role, _text(item, text_key)))
    return turns


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


def _chat(key: str) -> Callable[[Mapping], Turns]:
    return _list(key, "role", "content", {role: role for role in ROLES if role != "tool"})


def _completion(record: Mapping) -> Turns:
    if isinstance(record["prompt"], list):
        return _chat("prompt")(record) + _chat("completion")(record)
    return _pair("prompt", "completion")(record)


def _preference(record: Mapping) -> Turns:
    """HH-RLHF's text, or messages. Their prompt may be the first of them, or a field of its own."""
    if not isinstance(record["chosen"], list):
        return _hh(record)
    prompt, turns = record.get("prompt"), _chat("chosen")(record)
    if isinstance(prompt, list):
        return _chat("prompt")(record) + turns
    if isinstance(prompt, str) and turns and turns[0][0] == "assistant":
        return [("user", prompt), *turns]
    return turns


def _hh(record: Mapping) -> Turns:
    before, *parts = HH_TURN.split("\n\n" + _text(record, "chosen"))
    if before or not parts:
        raise RecordError(
            f"Expected 'Human:' at the beginning of 'chosen', found {briefly(record['chosen'])}."
        )
    return [(HH_ROLES[name], text) for name, text in zip(parts[::2], parts[1::2], strict=True)]


def _tree(record: Mapping) -> Turns:
    """The path of best-ranked replies."""
    # A loop, no recursion: a tree may be deeper than Python's stack.
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
        ("messages", _chat("messages")),
        ("conversations", _list("conversations", "from", "value", SHAREGPT_ROLES)),
        ("message_tree_id prompt", _tree),
        ("chosen rejected", _preference),
        ("instruction output", _pair("instruction", "output", "input")),
        ("instruction response", _pair("instruction", "response", "context")),
        ("question answer", _pair("question", "answer")),
        ("prompt completion", _completion),
    )
)


def oasst_trees(rows: Iterable[Mapping]) -> list[dict]:
    """The trees of OASST's flat message table, in the order of their first messages.

    The Hub's `load_dataset("OpenAssistant/oasst1")` has one message per row. `to_messages` expects
    the trees of the published `*.trees.jsonl`. The rows themselves are not changed.

    Raises:
        RecordError: a row is no message; two rows have the same id; a message is its own ancestor;
            or its parent is missing. Parents are missing after filtering single messages: filter
            by `message_tree_id` instead.
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
