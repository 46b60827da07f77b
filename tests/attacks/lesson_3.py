"""Answers to the exercises of lesson 3."""

from array import array
from collections import ChainMap, OrderedDict, UserDict, defaultdict, deque
from functools import cache, partial
from types import MappingProxyType

from sftlib import checks
from sftlib.chat import CHATML, LLAMA3, encode, render
from sftlib.data import read_facts
from sftlib.experiments.chat_runs import broken
from sftlib.models import read_tokenizer

import numpy as np
import pandas as pd
import torch
from transformers import BatchEncoding

from tests.attacks import Attacks, Made

# --- Exercise 1 ----------------------------------------------------------------------------------


def changed(*replacements):
    """Llama 3's template with something replaced."""
    text = LLAMA3
    for old, new in replacements:
        assert old in text
        text = text.replace(old, new)
    return text


START, END = "{% generation %}", "{% endgeneration %}"
BEGIN = "{{ '<|begin_of_text|>' }}"
LOOP = "{% for message in messages %}"
IS_ASSISTANT = "message['role'] == 'assistant'"
DEMANDS = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('No system') }}{% endif %}"
ADDS = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|start_header_id|>system<|end_header_id|>\n\n"
    "You are a helpful assistant.<|eot_id|>' }}{% endif %}"
)
STEP_BY_STEP = """{{- '<|begin_of_text|>' -}}
{%- for m in messages -%}
    {{- '<|start_header_id|>' -}}{{- m.role -}}{{- '<|end_header_id|>\\n\\n' -}}
    {%- if m.role != 'assistant' -%}
        {{- m.content.strip() + '<|eot_id|>' -}}
    {%- else -%}
        {%- generation -%}{{- m.content.strip() + '<|eot_id|>' -}}{%- endgeneration -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}
"""

BY_NUMBER = LLAMA3.replace(
    "{% for message in messages %}",
    "{% for i in range(messages | length) %}{% set message = messages[i] %}",
)
BEGIN_IN_LOOP = LLAMA3.replace("{{ '<|begin_of_text|>' }}", "").replace(
    "{% for message in messages %}",
    "{% for message in messages %}{{ '<|begin_of_text|>' if loop.first else '' }}",
)
HEADER = (
    "{% macro header(role) %}{{ '<|start_header_id|>' ~ role ~ '<|end_header_id|>\n\n' }}"
    "{% endmacro %}"
)
TRIMMED = "{{ message['content'] | trim }}"
BETWEEN = END + START + "{{ '<|eot_id|>' }}"
PROMPT = LLAMA3[LLAMA3.index("{% if add_generation_prompt %}") :]

TEMPLATE = Attacks(
    checks.check_template,
    right=[
        LLAMA3,
        changed((BEGIN, "{{ bos_token }}")),
        changed((LOOP, "{% for message in messages if true %}")),
        changed((IS_ASSISTANT, "message.role == 'assistant'")),
        changed(("message['content'] | trim", "(message['content'] | trim)")),
        STEP_BY_STEP,
        changed(
            (START + "{{ message['content'] | trim + '<|eot_id|>' }}", START + TRIMMED + BETWEEN)
        ),
        np.str_(LLAMA3),
        BY_NUMBER,
        BEGIN_IN_LOOP,
        changed((" + '<|eot_id|>' }}" + END, " ~ '<|eot_id|>' }}" + END)),
        changed(("| trim", "| string | trim")),
        HEADER
        + changed(
            (
                "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}",
                "{{ header(message['role']) }}",
            )
        ),
        changed(
            (
                PROMPT,
                "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' "
                "if add_generation_prompt else '' }}",
            )
        ),
    ],
    wrong=[
        (CHATML, "Write <|begin_of_text|> first"),
        (changed((IS_ASSISTANT, "message['role'] == 'user'")), "Expected the marks around"),
        (changed((IS_ASSISTANT, IS_ASSISTANT + " and loop.last")), "Expected the marks around"),
        (changed(("| trim", "| trim | capitalize")), "expected"),
        (changed(("message['role'] +", "message['role'] | capitalize +")), "expected 'system"),
        (changed(("message['content'] | trim", "message['content'].lstrip()")), "expected"),
        (changed(("_id|>\n\n", "_id|>\n\n ")), "expected"),
        (LLAMA3.replace("{% endfor %}", "{% endfor %}{{ '<|end_of_text|>' }}"), "expected"),
        (
            changed((LOOP, "{% for message in messages if message['role'] != 'system' %}")),
            "expected 'system",
        ),
        (changed((BEGIN, BEGIN + "{{ 'Today Date: 26 Jul 2024\n' }}")), "expected"),
        (changed((LOOP, "{% for message in messages | unique %}")), "Jinja cannot use it"),
        (
            changed((IS_ASSISTANT, "not loop.first and " + IS_ASSISTANT + " and loop.index < 6")),
            "many messages",
        ),
        (
            changed((IS_ASSISTANT, "loop.index0 and loop.index0 % 2 == 0")),
            "in place of counting",
        ),
        (changed((LOOP, "{% for message in messages[:5] %}")), "may have many messages"),
        (DEMANDS + LLAMA3, "no system message"),
        (changed((BEGIN, BEGIN + ADDS)), "no system message: add none"),
        (
            changed(("message['content'] | trim", "message['content'].split() | join(' ')")),
            "those inside of it stay",
        ),
        (changed((LOOP, "{% for message in messages[-5:] %}")), "many messages"),
        (changed(("| trim", "| trim | e")), "expected"),
        (
            changed(
                (
                    "{% else %}{{ message['content'] | trim",
                    "{% else %}{{ message['content'].strip(' ')",
                )
            ),
            "not in general",
        ),
        (changed(("add_generation_prompt", "add_generation_prompt and loop")), "must end with"),
        (changed((IS_ASSISTANT, "message['content'] | trim in ('Hello.', 'Bye.')")), "Messages of"),
        (3, "The template: expected a text, found 3"),
        (["a"], "The template: expected a text"),
        ("{% for m in messages %}", "Jinja cannot use it: TemplateSyntaxError: Unexpected end"),
        (changed(("message['role'] +", "msg['role'] +")), "UndefinedError: 'msg' is undefined"),
        (changed(("{% endfor %}" + PROMPT, PROMPT + "{% endfor %}")), "inside the loop"),
        (
            changed(
                (
                    "message['content'] | trim + '<|eot_id|>'",
                    "message['content'] + '<|eot_id|>' | trim",
                )
            ),
            "only to what stands right before it",
        ),
        (
            changed((IS_ASSISTANT + " %}", IS_ASSISTANT + " %}{{ 'x' }}")),
            "end_header_id|>\\n\\n' expected 'Hello.<|eot_id|>",
        ),
        (changed((BEGIN, "")), "Write <|begin_of_text|> first"),
        (BEGIN + LLAMA3, "once"),
        (changed((" | trim", "")), "remove them with `| trim`"),
        (changed(("_id|>\n\n", "_id|>\n")), "two line breaks"),
        (changed(("<|eot_id|>'", "<|eot_id|>\n'")), "Nothing stands"),
        (changed(("add_generation_prompt", "true")), "always written"),
        (changed(("add_generation_prompt", "false")), "must end with"),
        (changed(("message['role'] +", "'user' +")), "expected 'system"),
        (changed((START, ""), (END, "")), "Now mark"),
        (
            changed((" + '<|eot_id|>' }}" + END, " }}" + END + "{{ '<|eot_id|>' }}")),
            "never learn to stop",
        ),
        (
            changed(
                ("{{ '<|start_header_id|>' + m", START + "{{ '<|start_header_id|>' + m"),
                ("\n\n' }}{% if m", "\n\n' }}" + END + "{% if m"),
            ),
            "header is marked",
        ),
        (changed(("== 'assistant'", "!= 'x'")), "of others"),
        ("", "first"),
    ],
)

# --- Exercise 2 ----------------------------------------------------------------------------------

POSITIONS = [[11, 12, 13, 14, 15, 28, 29, 30, 31], [11, 12, 13, 14]]


@cache
def tokenizer():
    return read_tokenizer("tiny-base")


MASK = Attacks(
    checks.check_mask,
    right=[
        POSITIONS,
        [set(row) for row in POSITIONS],
        tuple(map(tuple, POSITIONS)),
        [np.array(row) for row in POSITIONS],
        [torch.tensor(POSITIONS[0]), range(11, 15)],
        [list(map(np.int64, row)) for row in POSITIONS],
        [pd.Series(row) for row in POSITIONS],
        Made(lambda: (row[::-1] for row in POSITIONS)),
        [np.nonzero(np.isin(np.arange(33), row)) for row in POSITIONS],
        [np.argwhere(np.isin(np.arange(33), row)) for row in POSITIONS],
        [[range(11, 16), range(28, 32)], [range(11, 15)]],
        deque(map(frozenset, POSITIONS)),
        [array("i", row) for row in POSITIONS],
        Made(lambda: map(iter, POSITIONS)),
        [torch.tensor(row).view(-1, 1) for row in POSITIONS],
        {"a": POSITIONS[0], "b": POSITIONS[1]}.values(),
    ],
    wrong=[
        ([1, 2, 3], "Expected two lists"),
        (POSITIONS[:1], "found 1"),
        ([1, 2], "Row 1: expected positions from 0 to 32, found 1"),
        ([[99], []], "Row 1: expected positions from 0 to 32, found 99"),
        ([[-1], []], "found -1"),
        ([POSITIONS[0][1:], POSITIONS[1]], "position 11, 'H'"),
        ([[int(p in row) for p in range(33)] for row in POSITIONS], "Row 1: that is a mask"),
        ([[p in row for p in range(33)] for row in POSITIONS], "Row 1: that is a mask"),
        (np.array([[int(p in row) for p in range(33)] for row in POSITIONS]), "that is a mask"),
        ([[11, 12, 13, 14, 28, 29, 30], POSITIONS[1]], "never stop"),
        ([POSITIONS[0][5:], POSITIONS[1]], "last answer alone"),
        ([[p + 1 for p in POSITIONS[0]], [1]], "one too high"),
        ([[p - 1 for p in POSITIONS[0]], [1]], "one too low"),
        ([[10, *POSITIONS[0]], POSITIONS[1]], "position 10"),
        ([POSITIONS[0], [*POSITIONS[1], 16]], "padding"),
        ([[11, *POSITIONS[0]], POSITIONS[1]], "Row 1: 11 is given twice"),
        ([POSITIONS[0], [11, 12, 13, True]], "Row 2: expected a whole number, found True"),
        ([["11"], POSITIONS[1]], "found the text '11'"),
        ({0: POSITIONS[0], 1: POSITIONS[1]}, "one for each row of the batch, found dict"),
        ([list(range(33)), list(range(33))], "position 0"),
        ([[], []], "position 11, 'H', is missing"),
        (POSITIONS[::-1], "position 15"),
        ([[*range(8, 16), *range(25, 32)], POSITIONS[1]], "position 8, '<|im_start|>'"),
        ([[*range(1, 8), *range(18, 25)], POSITIONS[1]], "position 1, 'user'"),
        ([[15, 31], [14]], "position 11, 'H', is missing"),
        ([[*POSITIONS[0], 16, 32], [*POSITIONS[1], 15]], "position 16"),
        ([[43, 276, 2036, 27, 3], POSITIONS[1]], "positions from 0 to 32, found 43"),
        ([[-100] * 11 + POSITIONS[0], POSITIONS[1]], "-100"),
        (POSITIONS[0] + POSITIONS[1], "Expected two lists"),
        ([*POSITIONS, []], "found 3"),
        ([POSITIONS[0][:5], POSITIONS[1]], "position 28"),
        (["11-15, 28-31", "11-14"], "text"),
        ([POSITIONS[0], float("nan")], "Row 2"),
        ([[11.5], []], "found 11.5"),
    ],
    untouched=[..., None, [..., ...], [POSITIONS[0], ...], [None, POSITIONS[1]]],
    arguments=lambda positions: (positions, tokenizer()),
)

# --- Exercise 3 ----------------------------------------------------------------------------------

NAMES = {
    "A": "labels shifted",
    "B": "end not learned",
    "C": "template twice",
    "D": "padding learned",
    "E": "question learned",
}

BUGS = Attacks(
    checks.check_bugs,
    right=[
        NAMES,
        dict(reversed(NAMES.items())),
        {letter: name.upper() for letter, name in NAMES.items()},
        {letter: f" {name} " for letter, name in NAMES.items()},
        pd.Series(NAMES),
        {letter: name.replace(" ", "-") for letter, name in NAMES.items()},
        {letter: f"{name.replace(' ', '_')}." for letter, name in NAMES.items()},
        {letter: np.str_(name) for letter, name in NAMES.items()},
        MappingProxyType(NAMES),
        UserDict(NAMES),
        ChainMap({}, OrderedDict(NAMES)),
        defaultdict(str, {letter: name.replace(" ", "   ") for letter, name in NAMES.items()}),
        {letter: f"`{name}`" for letter, name in NAMES.items()},
        {letter: name.title() + "\n" for letter, name in NAMES.items()},
    ],
    wrong=[
        (["A"], "keys A, B, C, D, E"),
        ({"A": "labels shifted"}, "Expected the keys A, B, C, D, E, found 'A'"),
        (NAMES | {"F": "no bug"}, "'F'"),
        (NAMES | {"C": "typo"}, "found 'typo'"),
        (NAMES | {"C": 3}, "C: expected a text, found 3"),
        (NAMES | {"A": "question learned"}, "4 of 5. A: compare"),
        (NAMES | {"B": "padding learned"}, "last label"),
        (NAMES | {"C": "end not learned"}, "from its beginning"),
        (NAMES | {"D": "template twice"}, "the end of the row"),
        (NAMES | {"E": "labels shifted"}, "where does the first label stand?"),
        (dict.fromkeys(NAMES, "padding learned"), "1 of 5"),
        ({name: letter for letter, name in NAMES.items()}, "Expected the keys A, B, C, D, E"),
        (NAMES | {"C": ["template twice"]}, "C: expected a text, found list"),
        (NAMES | {"A": "label shifted"}, "found 'label shifted'"),
        (NAMES | {"B": "the end"}, "found 'the end'"),
        (NAMES | {"B": "end not learned, padding learned"}, "B: expected one of"),
        (NAMES | {"B": NAMES["D"], "D": NAMES["B"]}, "3 of 5. B: what is the last label"),
        ([*NAMES.values()], "keys A, B, C, D, E"),
        ({*NAMES.values()}, "keys A, B, C, D, E"),
        ("A: labels shifted, B: end not learned", "keys A, B, C, D, E"),
        ({letter.lower(): name for letter, name in NAMES.items()}, "keys A, B, C, D, E"),
        (NAMES | {"E": True}, "E: expected a text, found True"),
        (NAMES | {"E": b"question learned"}, "E: expected a text, found"),
        (NAMES | {"E": ""}, "E: expected one of"),
        (dict(zip(NAMES, reversed(NAMES.values()), strict=True)), "1 of 5"),
    ],
    untouched=[..., None, dict.fromkeys(NAMES, ...), NAMES | {"C": ...}, NAMES | {"D": None}],
)

# --- Exercise 4 ----------------------------------------------------------------------------------


def sound(messages):
    """As the lesson builds rows."""
    encoded = encode(messages, tokenizer())
    return {"input_ids": encoded["input_ids"], "labels": encoded["labels"]}


def changed_row(change):
    """A pipeline whose sound rows are changed by a function of ids and labels."""

    def pipeline(messages):
        row = sound(messages)
        ids, labels = change(row["input_ids"], row["labels"])
        return {"input_ids": ids, "labels": labels}

    return pipeline


def with_mistakes(mistakes):
    """The broken pipeline of the exercise, of which some mistakes are repaired."""
    return lambda messages: broken(messages, tokenizer(), mistakes)


class Pipeline:
    """A pipeline that is an object."""

    def __call__(self, messages):
        return sound(messages) | {"attention_mask": [1] * len(sound(messages)["input_ids"])}


def by_hand(messages):
    """Prompt and answer are tokenized apart."""
    tokenize = partial(tokenizer(), add_special_tokens=False)
    prompt = tokenize(render(messages[:-1], add_generation_prompt=True))["input_ids"]
    answer = tokenize(messages[-1]["content"] + "<|im_end|>")["input_ids"]
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


def shifted(ids, labels):
    return ids, [*labels[1:], -100]


def one_by_one(messages):
    yield sound(messages)


HELD_OUT = read_facts("heldout")[0]["messages"]


PIPELINE = Attacks(
    checks.check_pipeline,
    right=[
        sound,
        Pipeline(),
        by_hand,
        with_mistakes(""),  # the line break after the answer is graded, too
        changed_row(lambda ids, labels: (np.array(ids), torch.tensor(labels))),
        changed_row(lambda ids, labels: (iter(ids), tuple(labels))),
        partial(lambda more, messages: more | sound(messages), {"length": 3}),
        lambda messages: pd.Series(sound(messages)),
        lambda messages: BatchEncoding(sound(messages)),
        lambda messages: MappingProxyType(OrderedDict(reversed(sound(messages).items()))),
        changed_row(lambda ids, labels: (deque(ids), array("i", labels))),
        changed_row(lambda ids, labels: (np.int16(ids), pd.Series(labels))),
        Pipeline().__call__,
    ],
    wrong=[
        (with_mistakes("twice stripped endless"), "4 headers, and the conversation has 2 messages"),
        (with_mistakes("twice"), "Decode the ids of one row"),
        (with_mistakes("stripped"), "not the text that the chat template writes"),
        (with_mistakes("endless"), "which token is graded last?"),
        (
            changed_row(lambda ids, labels: (ids, labels[:5] + ids[5:8] + [-100] * (len(ids) - 8))),
            "Tokens before the answer are graded: the first graded one is at 5",
        ),
        (3, "Expected a function of messages, found 3"),
        (
            sound([{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hi."}]),
            "Expected a function of messages, found dict",
        ),
        (lambda messages: None, "Did you forget `return`?"),
        (lambda messages: messages[2], "fails on conversation 1"),
        (lambda: {}, "fails on conversation 1"),
        (lambda messages: tuple(sound(messages).values()), "keys input_ids, labels"),
        (lambda messages: {"input_ids": sound(messages)["input_ids"]}, "missing: labels"),
        (changed_row(lambda ids, labels: (ids, labels[:-1])), "expected one label per id"),
        (changed_row(shifted), "The model shifts by itself"),
        (changed_row(lambda ids, labels: (ids, [-100] * len(ids))), "nothing would be learned"),
        (changed_row(lambda ids, labels: ([i + 0.5 for i in ids], labels)), "whole number"),
        (changed_row(lambda ids, labels: ([9999] * len(ids), [9999] * len(ids))), "expected ids"),
        (changed_row(lambda ids, labels: ("text", labels)), "found the text"),
        (changed_row(lambda ids, labels: (ids, ids)), "The question is graded, too"),
        (lambda messages: [sound(messages)], "keys input_ids, labels"),
        (lambda messages: render(messages), "keys input_ids, labels"),
        (lambda messages: sound(messages)["input_ids"], "keys input_ids, labels"),
        (lambda messages, tools: sound(messages), "fails on conversation 1"),
        (lambda messages: BatchEncoding(sound(messages)).char_to_token(0), "fails on conversation"),
        (changed_row(lambda ids, labels: ([ids], [labels])), "whole number"),
        (changed_row(lambda ids, labels: ([], [])), "nothing would be learned"),
        (changed_row(lambda ids, labels: (ids, [max(0, x) for x in labels])), "found 0"),
        (changed_row(lambda ids, labels: ([-i for i in ids], labels)), "expected ids from 0"),
        (changed_row(lambda ids, labels: (ids, [x != -100 for x in labels])), "whole number"),
        (one_by_one, "keys input_ids, labels"),
        (lambda messages: sound(HELD_OUT), "contains a held-out question"),
    ],
    untouched=[..., None, lambda messages: ...],
    arguments=lambda pipeline: (pipeline, tokenizer()),
    trains=True,
)

ATTACKS = [TEMPLATE, MASK, BUGS, PIPELINE]
