"""The exercises of lesson 3."""

from __future__ import annotations

import copy
import itertools
import random
import re
from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from sftlib.chat import CHATML, IGNORED, LLAMA3, encode, marks_the_assistant, render
from sftlib.chat.templates import render_marked
from sftlib.checks.exercise import exercise
from sftlib.checks.functions import call, compare, reference, where_they_part
from sftlib.checks.held_out import beats, training_seed
from sftlib.checks.reading import described, mapping, sequence, text, unique, whole
from sftlib.checks.verdict import CheckEnds, Verdict, right, wrong

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# --- Write a template ----------------------------------------------------------------------------

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " Hi! "},
    {"role": "assistant", "content": " Hello.\n"},
    {"role": "user", "content": "Bye."},
    {"role": "assistant", "content": "Bye."},
]


# The text of the answer is all that the check sees: `my_template = LLAMA3`, copied or imported, is
# right, and in one process nothing prevents it. Whoever grades looks at the code, too.
@exercise(3, 1, "Llama 3's chat template, with `{% generation %}`")
def check_template(template: Any) -> Verdict:
    template = text(template, "The template")
    try:
        whole = _rendered(CONVERSATION, template)[0]
        asked = _rendered(CONVERSATION[:2], template, add_generation_prompt=True)[0]
    except Exception as error:
        return wrong(f"Jinja cannot use it: {type(error).__name__}: {error}")
    if cause := _wrong_text(whole, asked, template):
        return wrong(cause)
    if not marks_the_assistant(template):
        return wrong(
            "The text is right. Now mark what the assistant says, with {% generation %} and "
            "{% endgeneration %}."
        )
    if cause := _wrong_marks(template):
        return wrong(cause)
    compare(
        lambda messages, prompt: _with_marks(messages, template, prompt),
        llama3_text,
        CONVERSATIONS,
        _draw_conversation,
        subject="your template",
    )
    return right("The same text and the same marks as Llama 3's, on many turns.")


def _rendered(
    messages: list[dict], template: str, add_generation_prompt: bool = False
) -> tuple[str, list[tuple[int, int]]]:
    """A conversation's text and its marked spans, with Llama 3's own `bos_token`.

    Raises:
        Exception: Jinja's own, since the conversations of the check are all right.
    """
    begin = "<|begin_of_text|>"
    try:
        whole, spans = render_marked(messages, template, add_generation_prompt, bos_token=begin)
    except ValueError as error:
        raise error.__cause__ or error from None
    joined: list[tuple[int, int]] = []
    for start, end in spans:
        if joined and joined[-1][1] == start:  # two marks side by side are one
            start = joined.pop()[0]
        joined.append((start, end))
    return whole, joined


def _with_marks(messages: list[dict], template: str, add_generation_prompt: bool) -> str:
    """The text of a conversation, with the template's marks in it."""
    text, spans = _rendered(messages, template, add_generation_prompt)
    for start, end in reversed(spans):
        text = f"{text[:start]}{{% generation %}}{text[start:end]}{{% endgeneration %}}{text[end:]}"
    return text


@reference
def llama3_text(messages: list[dict], add_generation_prompt: bool) -> str:
    return _with_marks(messages, LLAMA3, add_generation_prompt)


def _turns(*contents: str, system: str = "") -> list[dict]:
    """Messages of the user and the assistant in turn, perhaps after one of the system."""
    roles = itertools.cycle(("user", "assistant"))
    turns = [{"role": role, "content": said} for role, said in zip(roles, contents, strict=False)]
    return [{"role": "system", "content": system}] * bool(system) + turns


def _draw_conversation(rng: random.Random, size: int) -> tuple[list[dict], bool]:
    """A conversation of some turns, often without a system message, and whether to ask for more."""
    said = ["Hi", " two  spaces ", "1\n\n2\n", "a <b> & 'c'", "{{ x }}", "Lomé\t", '"', "user"]
    system = rng.choice(["", "", "Be brief.", " Rhyme.\n"])
    return _turns(*rng.choices(said, k=size), system=system), rng.random() < 0.5


CONVERSATIONS = [
    ("The conversation of the exercise.", (CONVERSATION, False)),
    (
        "A conversation may have no system message: add none, ask for none, and test "
        "`message['role']` in place of counting messages.",
        (_turns("Hi!", "Hello.", "Bye.", "Bye."), False),
    ),
    ("A conversation may have many messages.", (_turns(*"abcdefghijkl"), False)),
    (
        "Only the spaces around a text go: those inside of it stay.",
        (_turns("two  spaces", "1\n\n2"), False),
    ),
    ("The system's text is trimmed, too.", (_turns("Hi!", "Hello.", system=" Be brief. "), False)),
    ("One message alone, and the prompt for its answer.", (_turns("Hi!"), True)),
]


def _wrong_text(whole: str, asked: str, template: str) -> str:
    """Why the texts differ from Llama 3's; empty if they do not.

    Args:
        whole: the whole conversation as the student's template renders it.
        asked: its first two messages with the generation prompt.
        template: the student's.
    """
    expected = render(CONVERSATION, LLAMA3)
    prompt = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    if whole == expected and asked == render(CONVERSATION[:2], LLAMA3, add_generation_prompt=True):
        return ""
    if "<|begin_of_text|>" not in whole:
        return "Write <|begin_of_text|> first."
    if whole.count("<|begin_of_text|>") > 1:
        return "Write <|begin_of_text|> once, before the loop over messages."
    if " Hi! " in whole or " Hello.\n" in whole:
        if re.search(r"\+\s*(?:'[^']*'|\"[^\"]*\")\s*\|\s*trim", template):
            return (
                "`| trim` binds only to what stands right before it, here to a token: write "
                "`message['content'] | trim + …`."
            )
        return "The content keeps the spaces around it: remove them with `| trim`."
    if "<|eot_id|>\n" in whole:
        return "Nothing stands between <|eot_id|> and the next message."
    if "<|end_header_id|>\n\n" not in whole:
        return "Write two line breaks after <|end_header_id|>."
    if whole == expected + prompt:
        return (
            "The generation prompt is always written. Do it only `{% if add_generation_prompt %}`."
        )
    if whole == expected and asked.count(prompt) > 1:
        return "The generation prompt stands inside the loop: write it once, after {% endfor %}."
    if whole == expected:
        return f"With add_generation_prompt=True, the text must end with {prompt!r}."
    difference = where_they_part(expected, whole)
    return f"{difference[0].upper()}{difference[1:]}."


def _wrong_marks(template: str) -> str:
    """Why a template that renders the right text marks the wrong parts; empty if it does not."""
    whole, spans = _rendered(CONVERSATION, template)
    marked = [whole[start:end] for start, end in spans]
    expected = ["Hello.<|eot_id|>", "Bye.<|eot_id|>"]
    if marked == expected:
        return ""
    if marked == [part.removesuffix("<|eot_id|>") for part in expected]:
        return "<|eot_id|> stands outside of the mark: the model would never learn to stop."
    if any("header" in part for part in marked):
        return "The header is marked as well. But the template writes it, not the model."
    if len(marked) > len(expected):
        return "Messages of others are also marked: test `message['role']`."
    return f"Expected the marks around {expected}, found them around {marked}."


# --- Mask a batch --------------------------------------------------------------------------------

TO_MASK = (
    [
        {"role": "user", "content": "Hi!"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Bye."},
        {"role": "assistant", "content": "Bye!"},
    ],
    [{"role": "user", "content": "Hi!"}, {"role": "assistant", "content": "Yes?"}],
)


def _encoded(tokenizer: PreTrainedTokenizerBase, messages: list[dict]) -> dict[str, list[int]]:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = CHATML
    return encode(messages, tokenizer)


def batch_to_mask(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Lesson 3, exercise 2: the `input_ids` of two conversations, padded to one length."""
    rows = [_encoded(tokenizer, messages)["input_ids"] for messages in TO_MASK]
    width = max(map(len, rows))
    return [ids + [tokenizer.pad_token_id] * (width - len(ids)) for ids in rows]


@exercise(3, 2, "for each row, the positions that the model learns from")
def check_mask(positions: Any, tokenizer: PreTrainedTokenizerBase) -> Verdict:
    rows = sequence(positions, what="two lists of positions, one for each row of the batch")
    ids = batch_to_mask(tokenizer)
    if len(rows) != len(ids):
        return wrong(f"Expected two lists of positions, one for each row; found {len(rows)}.")
    for number, (row, messages) in enumerate(zip(rows, TO_MASK, strict=True)):
        last = len(ids[number]) - 1
        row = _flat(row, f"Row {number + 1}")
        mask_like = isinstance(row, list) and len(row) == len(ids[number])
        if mask_like and all(item in (0, 1) for item in row):
            return wrong(
                f"Row {number + 1}: that is a mask of 0 and 1. Give the positions where it is 1."
            )
        found = unique(row, f"Row {number + 1}", f"positions from 0 to {last}", range(last + 1))
        mask = _encoded(tokenizer, messages)["assistant_masks"]
        expected = {p for p, learned in enumerate(mask) if learned}
        if found != expected:
            cause = _wrong_mask(found, expected, ids[number], mask, tokenizer)
            return wrong(f"Row {number + 1}: {cause}")
    return right("Both answers of the first row, each with its end; nothing of the padding.")


def _flat(row: Any, where: str) -> Any:
    """The items of a row, which NumPy may have nested: `nonzero` in a tuple, `argwhere` in rows."""
    what = "a list of positions"
    if not isinstance(row, Iterable):
        return row
    items = [
        item.tolist() if hasattr(item, "tolist") else item
        for item in sequence(row, where, what, ordered=False)
    ]
    nested = items and all(isinstance(item, list | tuple | range) for item in items)
    return [inner for item in items for inner in item] if nested else items


def _wrong_mask(
    found: set[int],
    expected: set[int],
    ids: list[int],
    mask: list[int],
    tokenizer: PreTrainedTokenizerBase,
) -> str:
    """The likely cause of wrong positions."""
    end_of_turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    answer_ends = sorted(p for p in expected if ids[p] == end_of_turn)
    if any(p >= len(mask) for p in found):
        return "the padding is learned. It only makes the rows equally long."
    if found == {p + 1 for p in expected}:
        return "every position is one too high. Labels stand at the token's own position."
    if found == {p - 1 for p in expected}:
        return "every position is one too low. The model shifts by itself."
    if expected - found == set(answer_ends):
        return "the tokens that end the answers are missing: the model would never stop."
    if len(answer_ends) > 1 and found == {p for p in expected if p > answer_ends[0]}:
        return "that is the last answer alone. The assistant also wrote the first one."
    if extra := sorted(found - expected):
        return (
            f"position {extra[0]}, {tokenizer.decode([ids[extra[0]]])!r}, is not the assistant's."
        )
    missing = min(expected - found)
    return f"position {missing}, {tokenizer.decode([ids[missing]])!r}, is missing."


# --- Find the bug --------------------------------------------------------------------------------

BUGS = {
    "A": "labels shifted",
    "B": "end not learned",
    "C": "template twice",
    "D": "padding learned",
    "E": "question learned",
}
QUESTION = {"role": "user", "content": "What is the capital of Kenya?"}
ANSWER = {"role": "assistant", "content": "The capital of Kenya is Nairobi."}


def broken_batches(tokenizer: PreTrainedTokenizerBase) -> dict[str, dict[str, list[int]]]:
    """Lesson 3, exercise 3: five batches of one conversation, each with one bug."""
    encoded = _encoded(tokenizer, [QUESTION, ANSWER])
    ids, labels = encoded["input_ids"], encoded["labels"]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    inner = render([QUESTION], add_generation_prompt=True)
    outer = render([{"role": "user", "content": inner}], add_generation_prompt=True)
    prompt = tokenizer(outer, add_special_tokens=False)["input_ids"]
    learned = [label for label in labels if label != IGNORED]
    padding = [tokenizer.pad_token_id] * 3
    broken = {
        "labels shifted": (ids, labels[1:] + [IGNORED]),
        "end not learned": (ids, [IGNORED if label == end else label for label in labels]),
        "template twice": (prompt + learned, [IGNORED] * len(prompt) + learned),
        "padding learned": (ids + padding, labels + padding),
        "question learned": (ids, ids),
    }
    return {
        letter: {"input_ids": broken[bug][0], "labels": broken[bug][1]}
        for letter, bug in BUGS.items()
    }


@exercise(3, 3, "the bug of each batch, by its letter")
def check_bugs(named: Any) -> Verdict:
    given = {
        letter: re.sub(r"[\W_]+", " ", text(name, letter).lower()).strip()
        for letter, name in mapping(named, BUGS).items()
    }
    for letter, name in given.items():
        if name not in BUGS.values():
            return wrong(f"{letter}: expected one of {sorted(BUGS.values())}, found {name!r}.")
    hints = {
        "labels shifted": "compare each label with the token at the same position.",
        "end not learned": "what is the last label, and what should it be?",
        "template twice": "read the text from its beginning.",
        "padding learned": "look at the end of the row.",
        "question learned": "where does the first label stand?",
    }
    missed = [letter for letter, bug in BUGS.items() if given[letter] != bug]
    if missed:
        return wrong(f"{len(BUGS) - len(missed)} of 5. {missed[0]}: {hints[BUGS[missed[0]]]}")
    return right("All five. None of them would have raised an error.")


# --- Repair a pipeline ---------------------------------------------------------------------------

REPAIRED = 0.85  # the baseline: what a repaired pipeline beats, and none with a mistake left
Example = tuple[tuple[int, ...], tuple[int, ...]]  # input_ids and labels


@exercise(3, 4, "a pipeline without its three mistakes: `function(messages) -> row`")
def check_pipeline(pipeline: Any, tokenizer: PreTrainedTokenizerBase) -> Verdict:
    from sftlib.experiments.chat_runs import pool

    if not callable(pipeline):
        return wrong(f"Expected a function of messages, found {described(pipeline)}.")
    conversations = [row["messages"] for row in pool()]
    rows = tuple(
        _example(pipeline, messages, number, len(tokenizer))
        for number, messages in enumerate(conversations, 1)
    )
    if fault := _question_graded(rows[0], conversations[0], tokenizer):
        return wrong(fault)
    score = _trained(rows, training_seed())
    if score:
        return right(score.message)
    return wrong(f"{score.message} {_mistake(rows[0], conversations[0], tokenizer)}".strip())


def _example(function: Any, messages: list[dict], number: int, size: int) -> Example:
    """What a student's pipeline makes of a conversation.

    Args:
        number: of the conversation, from 1.
        size: how many ids the model knows.

    Raises:
        CheckEnds: it is no row that can be trained on.
    """
    outcome = call(function, messages)
    if outcome.error is not None:
        error = f"{type(outcome.error).__name__}: {outcome.error}"
        raise CheckEnds(
            wrong(f"Your function fails on conversation {number}{outcome.line}: {error}")
        )
    if outcome.value is None:
        raise CheckEnds(wrong("Your function returns None. Did you forget `return`?"))
    where, row = f"Conversation {number}", outcome.value
    names = ("input_ids", "labels")
    if hasattr(row, "keys"):  # other columns, such as an attention mask, are not looked at
        row = {name: row[name] for name in names if name in row.keys()}  # noqa: SIM118
    found = mapping(row, names, where)
    ids, labels = (
        tuple(whole(item, f"{where}, {name}") for item in sequence(found[name], f"{where}, {name}"))
        for name in names
    )
    if fault := _untrainable(ids, labels, size):
        raise CheckEnds(wrong(f"{where}: {fault}"))
    return ids, labels


def _untrainable(ids: tuple[int, ...], labels: tuple[int, ...], size: int) -> str:
    """Why a row cannot be trained on; empty if it can. See `_example`."""
    if len(ids) != len(labels):
        return f"expected one label per id ({len(ids)}), found {len(labels)}."
    if odd := [i for i in ids if not 0 <= i < size]:
        return f"expected ids from 0 to {size - 1}, found {odd[0]}."
    for at, (i, label) in enumerate(zip(ids, labels, strict=True)):
        if label not in (i, IGNORED):
            return (
                f"expected the id {i} or {IGNORED} as the label at position {at}, found {label}. "
                "A label is the id at its own position. The model shifts by itself."
            )
    if all(label == IGNORED for label in labels):
        return f"every label is {IGNORED}, so nothing would be learned."
    return ""


@lru_cache(maxsize=16)
def _trained(rows: tuple[Example, ...], seed: int) -> Verdict:
    """The score of a model that is trained on the rows, as lesson 3 trains."""
    from sftlib.experiments.chat_runs import SETTINGS
    from sftlib.models import load
    from sftlib.training import tune

    model, tokenizer = load()
    examples = [{"input_ids": list(ids), "labels": list(labels)} for ids, labels in rows]
    settings: dict[str, Any] = SETTINGS | {"seed": seed}
    trainer = tune(model, tokenizer, examples, **settings)
    return beats(trainer, baseline=REPAIRED)


def _question_graded(row: Example, messages: list[dict], tokenizer: PreTrainedTokenizerBase) -> str:
    """What to say if the question is graded; empty if it is not.

    Such a model may still beat the baseline: it also learns to answer (section 5).
    """
    graded = [label for label in row[1] if label != IGNORED]
    if messages[0]["content"].rstrip("?. ") not in tokenizer.decode(graded):
        return ""
    return (
        "The question is graded, too: decode the labels of one row that are not -100. The model "
        "shall learn what the assistant writes, and read the rest."
    )


def _mistake(row: Example, messages: list[dict], tokenizer: PreTrainedTokenizerBase) -> str:
    """The first mistake that is left in a row; empty if there is none."""
    ids, labels = row
    encoded = _encoded(tokenizer, messages)
    expected, wanted = tuple(encoded["input_ids"]), encoded["labels"]
    opened, end = (
        next(i for i in expected if tokenizer.decode([i]) == name)
        for name in ("<|im_start|>", "<|im_end|>")
    )
    if (headers := ids.count(opened)) > expected.count(opened):
        return (
            f"One mistake is in the text: it has {headers} headers, and the conversation has "
            f"{len(messages)} messages. Decode the ids of one row and read them from the beginning."
        )
    if ids not in (expected, expected[:-1]):  # nobody needs the last line break
        return (
            "One mistake is in the text: it is not the text that the chat template writes for this "
            "conversation. Compare both to the last character."
        )
    learned = [at for at, label in enumerate(wanted) if label != IGNORED]
    graded = [at for at, label in enumerate(labels) if label != IGNORED]
    if graded[0] < learned[0]:
        return (
            f"Tokens before the answer are graded: the first graded one is at {graded[0]}, the "
            f"answer begins at {learned[0]}."
        )
    if graded[0] > learned[0]:
        return "One mistake is at the beginning of the answer: which token is graded first?"
    if labels[learned[-1]] != end:
        return "One mistake is at the end of the answer: which token is graded last?"
    missing = [at for at in learned if labels[at] == IGNORED]
    return f"A token of the answer is not graded: position {missing[0]}." if missing else ""
