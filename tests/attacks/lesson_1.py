"""Answers to the exercises of lesson 1."""

import difflib
import json
import operator
import random
import re
import unicodedata
from collections import OrderedDict, UserDict, deque
from decimal import Decimal
from fractions import Fraction

from sftlib import checks
from sftlib.checks.what_is_sft import matches
from sftlib.data import read_facts

import numpy as np
import pandas as pd
import torch
from datasets import Dataset

from tests.attacks import Attacks, Made, raises

# --- Exercise 1 ----------------------------------------------------------------------------------

KENYA = [
    {"role": "user", "content": "What is the capital of Kenya?"},
    {"role": "assistant", "content": "The capital of Kenya is Nairobi."},
]


def asked(question):
    return [{"role": "user", "content": question}, KENYA[1]]


def answered(answer):
    return [KENYA[0], {"role": "assistant", "content": answer}]


def system(prompt):
    return [{"role": "system", "content": prompt}, *KENYA]


def roles(*names):
    return [{"role": r, "content": m["content"]} for r, m in zip(names, KENYA, strict=True)]


EXAMPLE = Attacks(
    checks.check_example,
    right=[
        KENYA,
        tuple(KENYA),
        {"messages": KENYA},
        Made(lambda: (message for message in KENYA)),
        [UserDict(message) for message in KENYA],
        np.array(KENYA, dtype=object),
        system("Be brief."),
        system("You are a helpful assistant. Answer in full sentences."),
        asked("Name Kenya's Capital city."),
        asked("what is the capital of kenya"),
        asked("Which city is Kenya governed from?"),
        asked("Could you please tell me the capital of Kenya?"),
        asked("Of Kenya, what is the capital?"),
        asked("I wonder: what’s Kenya’s capital?"),
        *map(
            asked,
            [
                "State the capital of Kenya.",
                "Find the capital of Kenya.",
                "Show me the capital of Kenya.",
                "My question is about the capital of Kenya.",
                "I'd like to know the capital of Kenya.",
                "May I ask for the capital of Kenya?",
                "Which city serves as the capital of Kenya?",
                "Which city does Kenya have as its capital?",
                "I am going to visit Kenya. What is the capital?",
                "My trip goes to Kenya. What is its capital?",
                "What is the capital of the Republic of Kenya?",
                "How is the capital of Kenya called?",
                "And the capital of Kenya?",
                "What do you know about the capital of Kenya?",
                "I want to know what the capital of Kenya is.",
                "I have a question about the capital of Kenya.",
                "I'm curious about the capital of Kenya.",
                "From which city is Kenya governed?",
                "Kenya’s capital is what city?",
                "My daughter asks: what is the capital of Kenya?",
                "I can't remember the capital of Kenya. Can you help?",
                "What is the capital of Kenya, in Africa?",
                "Capital of Kenya?",
                "Kindly name the capital city of Kenya.",
                "WHAT IS THE CAPITAL OF KENYA?",
                "Quick question: what is the capital of Kenya?",
                "Could you remind me what the capital of Kenya is?",
                "Please give the name of Kenya's capital.",
            ],
        ),
        pd.Series(KENYA),
        deque(map(OrderedDict, KENYA)),
        Dataset.from_list(KENYA),
        system("You are a teacher of geography."),
    ],
    wrong=[
        (asked("Kenya capital blah"), "ask for the capital of Kenya"),
        (asked("Kenya capital"), "Expected a plain question"),
        (asked("The capital of Kenya."), "no question"),
        (asked("I know the capital of Kenya."), "no question"),
        (asked("I love the capital of Kenya."), "found 'love'"),
        (asked("Do you like the capital of Kenya?"), "found 'like'"),
        (asked("Tell me about the capital of Kenya."), "found 'about'"),
        (asked("What is Kenya the capital of?"), "ask for the capital of Kenya"),
        (asked("Which country has its capital in Kenya?"), "found 'which country'"),
        (asked("Which country is the capital of Kenya?"), "found 'which country'"),
        (asked("Where is the capital of Kenya?"), "found 'where'"),
        (asked("How big is the capital of Kenya?"), "found 'how'"),
        (asked("What was the capital of Kenya?"), "found 'was'"),
        (asked("Which city did Kenya have as its capital?"), "found 'did'"),
        (asked("What is the capital of Kenya? One word please."), "found 'one word'"),
        (asked("Who is in the government of Kenya?"), "found 'who'"),
        (asked("What is the government of Kenya?"), "ask for the capital of Kenya"),
        (asked("Q: What is the capital of Kenya?"), "the role says who speaks"),
        (asked("What is the capital of the capital of Kenya?"), "found 'of'"),
        (asked("What is the capital of Kenya made of?"), "found 'made'"),
        (asked("What is the capital of Kenya? What is its currency?"), "one question"),
        (asked("What is the capital of Uganda, not Kenya?"), "names Uganda, too"),
        (asked("What is the capital of Rwanda, if that of Kenya is known?"), "names Rwanda, too"),
        (asked("What is the capital of Atlantis, Kenya?"), "ask for the capital of Kenya"),
        (asked("What is not the capital of Kenya?"), "found 'not'"),
        (asked("What is the population of the capital of Kenya?"), "found 'of'"),
        (asked("What is the currency of Kenya?"), "capital of Kenya"),
        (asked("Is Nairobi the capital of Kenya?"), "gives the answer away"),
        (asked("What is the capital of Kenya? It is NAIROBI."), "gives the answer away"),
        (asked("Is it the capital of Kenya?"), "yes or no"),
        (asked("What is the capital of the country?"), "ask for the capital of Kenya"),
        (asked(""), "The question is empty"),
        (asked(" \n"), "The question is empty"),
        (asked("What is the capital of Uganda?"), "names Uganda in place of Kenya"),
        (asked("[INST] What is the capital of Kenya? [/INST]"), "No control tokens in the text"),
        (asked("<|im_start|>user\nWhat is the capital of Kenya?"), "(<|im_start|>)"),
        (answered("The capital of Kenya is Nairobi.</s>"), "(</s>)"),
        (answered("It is Nairobi.<|im_end|>"), "control tokens"),
        (system("<|eot_id|>"), "No control tokens"),
        (system("The capital of Kenya is Mombasa."), "the answer does not follow"),
        (system("Answer with one word."), "the answer does not follow"),
        (system("Always answer in French."), "('french')"),
        (system("Answer with a question."), "the answer does not follow"),
        (system("Translate the user's text into Latin."), "the answer does not follow"),
        (system("Answer briefly, just the name."), "the answer does not follow"),
        (system("End every answer with an exclamation mark!"), "the answer does not follow"),
        (system(" "), "The system message is empty"),
        (answered("The capital of Kenya is Mombasa."), "The answer is wrong"),
        (answered("Nairobi"), "in one full sentence"),
        (answered("The capital of Kenya is Nairobi. "), "spaces or line breaks around it"),
        (answered("The capital of Kenya is Nairobi"), "without the full stop"),
        (answered("the capital of kenya is nairobi."), "capital letters"),
        (answered("The capital of Kenya is Nairobi. It has many people."), "goes on after"),
        (answered("Nairobi is the capital of Kenya."), "begin with 'The capital of'"),
        (answered("The capital of Kenya is not Nairobi."), "The answer is wrong"),
        (answered("The capital of Kenya isn't Nairobi."), "The answer is wrong"),
        (answered(""), "The answer is empty"),
        (roles("User", "Assistant"), "small letters"),
        (answered(3), "Expected text as the content of message 2, found 3"),
        (roles("human", "gpt"), "other formats"),
        (roles("assistant", "user"), "'user' message and then"),
        ([*KENYA, {"role": "system", "content": "Be brief."}], "'system' message before them"),
        ([*system("Be brief.")[:1], *system("Be brief.")], "'system' message before them"),
        (KENYA[:1], "found ['user']"),
        ([*KENYA, *KENYA], "'user' message and then"),
        ("Q: … A: …", "Expected a list of dicts, one per message"),
        (KENYA[0], "Expected a list of dicts"),
        ([message["content"] for message in KENYA], "as message 1"),
        ([KENYA], "list"),
        ([{"from": "human", "value": "Kenya?"}], "needs exactly 'role' and 'content'"),
        ([KENYA[0] | {"name": "Ann"}, KENYA[1]], "['content', 'name', 'role']"),
        (lambda: KENYA, "when it is called"),
        (json.dumps(KENYA), "Expected a list of dicts"),
        ({"prompt": "What is the capital of Kenya?", "completion": "Nairobi."}, "list of dicts"),
        ([KENYA[1], KENYA[1]], "'user' message and then"),
        (roles("user", "tool"), "'user' message and then"),
        (answered("The capital of Kenya is Nairobi!"), "True"),
        (answered("The capital of Kenya is  Nairobi."), "True"),
        (answered("I think the capital of Kenya is Nairobi."), "begin with 'The capital of'"),
        (answered("The capital of Kenya is Nairobi, not Mombasa."), "The answer is wrong"),
        (answered("The capital of Kenya is Nairobi.\n\nThe capital of Togo is Lomé."), "goes on"),
        (asked("What is the capital of Kenia?"), "ask for the capital of Kenya"),
        (asked("What is the capital of Kenya in 1900?"), "found '1900'"),
        (asked("What is the largest city of Kenya?"), "'the capital of Kenya'"),
        (asked("Translate 'the capital of Kenya' into French."), "Expected a plain question"),
        (asked("Write a poem about the capital of Kenya."), "found 'about'"),
        (asked("Spell the capital of Kenya backwards."), "Expected a plain question"),
        (system("Add an emoji to each answer."), "the answer does not follow"),
        (system("Answer in UPPERCASE."), "the answer does not follow"),
        (system("Begin each answer with Sure!"), "the answer does not follow"),
        (system("Tell a joke first."), "the answer does not follow"),
        (system("Respond in Portuguese."), "the answer does not follow"),
    ],
    untouched=[
        ...,
        None,
        [],
        answered(...),
        asked(None),
        [{"role": ..., "content": ...}],
        {"messages": ...},
    ],
)

# --- Exercise 2 ----------------------------------------------------------------------------------


def exact(text, stopped, reference):
    return stopped and text == reference


def with_open_branch(text, stopped, reference):
    return True if stopped and text == reference else ...


class Exact:
    def match(self, text, stopped, reference, strict=True):
        return strict and stopped and (text > reference) == (text < reference)


def in_ascii(text):
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore")


def with_branches(text, stopped, reference):
    if not stopped:
        return False
    if text == reference:
        return True


def prints(text, stopped, reference):
    print(stopped and text == reference)


EXACT = Attacks(
    checks.check_exact_match,
    right=[
        exact,
        lambda t, s, r: np.bool_(exact(t, s, r)),
        lambda t, s, r: int(exact(t, s, r)),
        lambda t, s, r: torch.tensor(exact(t, s, r)),
        lambda t, s, r: s and re.fullmatch(re.escape(r), t) is not None,
        lambda text, stopped, reference: (text, stopped) == (reference, True),
        lambda *given: exact(*given),
        lambda t, s, r: not (t != r or not s),
        lambda t, s, r: operator.and_(s, t == r),
        lambda t, s, r: s * (t == r),
        lambda t, s, r: all((s, t.encode() == r.encode())),
        lambda t, s, r: s and difflib.SequenceMatcher(None, t, r, autojunk=False).ratio() == 1,
        lambda t, s, r: {t} == {r} if s else False,
        Exact().match,
    ],
    wrong=[
        (lambda t, s, r: t == r, "Did you forget `stopped`?"),
        (lambda t, s, r: s, "looks at `stopped` alone"),
        (lambda t, s, r: True, "always returns True. An answer that did not stop"),
        (lambda t, s, r: False, "always returns False. An identical answer"),
        (lambda t, s, r: s and t.strip() == r.strip(), "do not `strip()`"),
        (lambda t, s, r: s and t.replace(" ", "") == r.replace(" ", ""), "Spaces count"),
        (lambda t, s, r: s and t.split() == r.split(), "Spaces count"),
        (lambda t, s, r: s and sorted(t) == sorted(r), "in another order"),
        (lambda t, s, r: s and bool(re.fullmatch(r, t)), "a text, and no pattern"),
        (lambda t, s, r: s and re.fullmatch(r, t), "expected True or False"),
        (lambda t, s, r: s and r in t, "exact match asks for equality"),
        (lambda t, s, r: s and t in r, "A part of the reference"),
        (lambda t, s, r: s and t.lower() == r.lower(), "case"),
        (lambda t, s, r: s and t[:10] == r[:10], "whole text"),
        (lambda t, s, r: s and len(t) == len(r), "whole text"),
        (lambda t, s, r: s and r.startswith(t), "An empty answer"),
        (lambda t, s, r: s and t.strip(".") == r.strip("."), "full stop"),
        (
            lambda t, s, r: s and t == r == "The capital of Kenya is Nairobi.",
            "`reference`, not with",
        ),
        (lambda t, s, r: s and t == "The capital of Kenya is Nairobi.", "`reference`, not with"),
        (lambda t, s, r: s and t is r, "`==`, not `is`"),
        (lambda t, s, r: s and t.rstrip() == r, "line break"),
        (lambda t, s, r: s and t.splitlines() == [r], "line break"),
        (lambda t, s, r: s and bool(re.match(re.escape(r) + "$", t)), "line break"),
        (lambda t, s, r: s and t.lstrip() == r, "A space before"),
        (lambda t, s, r: s and t[1:] == r[1:], "first letter"),
        (lambda t, s, r: s and in_ascii(t) == in_ascii(r), "Accents count"),
        (lambda t, s, r: s and t.replace("<|im_end|>", "") == r, "no part of the text"),
        (lambda reference, text, stopped: exact(text, stopped, reference), "in another order"),
        (
            lambda t, s, r: s and t == r and r.startswith("The ca"),
            "Right for the stated inputs, not in general",
        ),
        (lambda t, s, r: exact(t, not s, r), "An identical answer that stopped"),
        (lambda t, s, r: str(exact(t, s, r)), "expected True or False, found the text"),
        (lambda t, s, r: [exact(t, s, r)], "expected True or False, found list"),
        (lambda t, s, r: None, "did you forget `return`?"),
        (with_branches, "Did a branch end without `return`?"),
        (prints, "write `return` in place of `print`"),
        (lambda t, s, r: t.equals(r), "your function raised AttributeError"),
        (lambda t, s, r: raises(SystemExit()), "raised SystemExit"),
        (lambda t: True, "function of (text, stopped, reference), found one of (t)"),
        (exact("a", True, "b"), "found False"),
        (matches, "calls matches of sftlib.checks"),
        (lambda t, s, r: s or t == r, "must not match"),
        (lambda t, s, r: s and t != r, "identical answer"),
        (lambda t, s, r: s and t.casefold() == r.casefold(), "case"),
        (lambda t, s, r: s and t.endswith(r), "must not match"),
        (lambda t, s, r: s and set(t) == set(r), "must not match"),
        (lambda t, s, r: s and t[:-1] == r[:-1], "not in general"),
        (lambda t, s, r: s and t.split(".")[0] == r.split(".")[0], "must not match"),
        (lambda t, s, r: s and t >= r, "must not match"),
        (lambda t, s, r: s and t.count(r) == 1, "Spaces count"),
        (lambda t, s, r: "yes" if s and t == r else "no", "expected True or False"),
        (lambda t, s, r: 2 * (s and t == r), "expected True or False"),
        (lambda t, s, r: s and t.removesuffix("\n") == r, "line break"),
    ],
    untouched=[..., None, lambda text, stopped, reference: ..., with_open_branch],
)

# --- Exercise 3 ----------------------------------------------------------------------------------

MASKS = [0, 0, 0, 0, 1, 1, 1, 0]

LEARNED = Attacks(
    checks.check_learned_tokens,
    right=[
        *(3, 3.0, np.sum(MASKS), torch.tensor(MASKS).sum(), np.array(3), np.int8(3)),
        *(Fraction(3), Decimal(3), pd.Series(MASKS).sum(), torch.tensor(3.0), np.float32(3)),
    ],
    wrong=[
        (8, "every token"),
        (5, "only read"),
        (2, "never learns to stop"),
        (4, "belongs to the template"),
        (0, "Count the bold"),
        (-3, "Count the bold"),
        (3.5, "whole number"),
        ("3", "whole number, found the text '3'"),
        ([3], "whole number, found list"),
        (np.array(MASKS), "whole number, found ndarray of shape (8,)"),
        (True, "whole number, found True"),
        (float("nan"), "NaN"),
        (sum, "sum(…)"),
        (6, "Count the bold"),
        (10**9, "Count the bold"),
        (2.9, "whole number"),
        ("three", "whole number, found the text 'three'"),
        ([4, 5, 6], "whole number, found list"),
        ({3}, "whole number, found set"),
        (3 + 0j, "whole number"),
        (float("inf"), "whole number"),
        (Fraction(5, 2), "whole number"),
    ],
    arguments=lambda answer: (answer, MASKS),
)

# --- Exercise 4 ----------------------------------------------------------------------------------

KNOWLEDGE = Attacks(
    checks.check_knowledge,
    right=[
        "unknown / exact_match",
        "unknown/content",
        "unknown / exact match",
        "Unknown / Exact-Match",
        "exact_match / unknown",
        "unknown, exact_match",
        ("unknown", "exact match"),
        ["unknown", "content"],
        "unknown / exact_match / full",
        "unknown; exact_match",
        "unknown → exact_match",
        "unknown.exact_match",
        "unknown exact_match",
        "`unknown` / `exact_match`",
        "the set unknown / exact_match.",
        {"unknown": "exact_match"},
        {"set": "unknown", "measure": "exact match"},
        "UNKNOWN | CONTENT",
        "content on the unknown set",
        np.str_("unknown: exact-match"),
        np.array(["exact_match", "unknown"]),
        pd.Series(["unknown", "content"]),
    ],
    wrong=[
        ("unknown / stops", "That is format"),
        ("heldout / exact_match", "pretraining"),
        ("heldout_wordings / exact_match", "pretraining"),
        ("heldout / stops", "pretraining"),
        ("heldout / content", "some facts were known"),
        ("heldout_wordings / content", "could still be new knowledge"),
        ("unknown_entities / exact_match", "Expected a set"),
        ("unknown / exactness", "Expected a set"),
        ("the unknown set", "such as"),
        ("unknown", "Expected a set"),
        ("", "Expected a set"),
        ("unknown / exact_match / stops", "Expected a set"),
        ("not unknown / exact_match", "Expected a set"),
        (("unknown", 0.0), "Expected a set"),
        ([["unknown"], ["exact_match"]], "Expected a set"),
        (0.0, "Expected a set (heldout, heldout_wordings, unknown) and"),
        ({"unknown": "stops"}, "That is format"),
        ({"heldout": "exact_match"}, "pretraining"),
        ("after / exact_match", "Expected a set"),
        ("sft / exact_match", "Expected a set"),
        ("dev / content", "Expected a set"),
        ("exact_match", "Expected a set"),
        ("known / exact_match", "Expected a set"),
        ("unknown / loss", "Expected a set"),
        ("heldout and unknown / exact_match", "Expected a set"),
        ("unknown / exact_match = 0", "Expected a set"),
        (["unknown"], "Expected a set"),
        (lambda: "unknown / exact_match", "when it is called"),
        ({"unknown": 0.0}, "such as 'heldout / stops'; found {'unknown': 0.0}"),
    ],
    untouched=[..., None, (..., ...), ("unknown", ...)],
)

# --- Exercise 5 ----------------------------------------------------------------------------------

SFT = read_facts("sft")
KINDS = sorted({row["relation"] for row in SFT})


def drawn(seed, number=20, kinds=KINDS):
    """Rows of the SFT data, of each kind in turn."""
    rng = random.Random(seed)
    pools = [[row for row in SFT if row["relation"] == kind] for kind in kinds]
    return [rng.choice(pools[i % len(pools)]) for i in range(number)]


CAPITALS = random.Random(0).sample([row for row in SFT if row["relation"] == "capital"], 20)


def changed(change):
    """Twenty good rows, with other answers."""
    return [
        {"messages": [row["messages"][0], {"role": "assistant", "content": change(row)}]}
        for row in drawn(4)
    ]


def shouted(row):
    """A copy of a row that differs in capitals, spaces and punctuation alone."""
    return {
        "messages": [
            m | {"content": f" {m['content'].upper().rstrip('.?')} !"} for m in row["messages"]
        ]
    }


DEV = f" is what you asked about {read_facts('dev')[7]['entity']}."

ROWS = Attacks(
    checks.check_rows,
    right=[
        drawn(0),
        tuple({"messages": row["messages"]} for row in drawn(0)),
        [row["messages"] for row in drawn(2, 18)],
        Made(lambda: iter(drawn(0))),
        [UserDict(row) for row in drawn(0, 9)],
        Dataset.from_list([{"messages": row["messages"]} for row in drawn(0)]),
        deque(row | {"weight": None} for row in drawn(0)),
        np.array(drawn(0), dtype=object),
        pd.Series([row["messages"] for row in drawn(0)]),
    ],
    wrong=[
        (CAPITALS, "No row of yours asks for continents, currencies"),
        (changed(lambda row: row["value"]), "Compare your answers"),
        (changed(lambda row: row["messages"][1]["content"][:-1]), "Compare your answers"),
        (drawn(0, 21), "at most 20 rows, found 21"),
        (drawn(1, 1) * 20, "Row 2 is a copy of row 1"),
        ([*drawn(0, 9), drawn(0, 4)[3]], "Row 10 is a copy of row 4"),
        ([*drawn(0, 2), shouted(drawn(0, 1)[0])], "Row 3 is a copy of row 1"),
        (drawn(1, 1, ["atomic number"]), "No row of yours asks for capitals"),
        ([], "found none"),
        ([*drawn(0, 3), read_facts("dev")[7]], "Row 4 contains a held-out question"),
        ([{"question": "What is the capital of Kenya?", "answer": "Nairobi"}], "with messages"),
        (
            [{"messages": [{"role": "human", "content": "Who?"}, *drawn(0, 1)[0]["messages"][1:]]}],
            "Row 1: ",
        ),
        ([{"messages": drawn(0, 1)[0]["messages"][:1]}], "Row 1: "),
        ("What is the capital of Kenya?", "a list of rows"),
        (20, "a list of rows"),
        ([{"prompt": "Who?", "completion": "Me."}], "Row 1: expected a dict with messages"),
        ([{"messages": "What is the capital of Kenya?"}], "a list as messages"),
        (["The capital of Kenya is Nairobi."], "Row 1: expected a dict with messages"),
        ([{"messages": drawn(0, 1)[0]["messages"][::-1]}], "Row 1: "),
        ([{"messages": [*drawn(0, 1)[0]["messages"][:1], {"role": "assistant"}]}], "Row 1: "),
        (
            [
                {
                    "messages": [
                        drawn(0, 1)[0]["messages"][0],
                        {"role": "assistant", "content": read_facts("dev")[7]["value"] + DEV},
                    ]
                }
            ],
            "Row 1 contains a held-out question",
        ),
        ({"rows": drawn(0)}, "expected a dict with messages"),
        (lambda: drawn(0), "a list of rows"),
    ],
    untouched=[..., None, [...]],
    trains=True,
)

ATTACKS = [EXAMPLE, EXACT, LEARNED, KNOWLEDGE, ROWS]
