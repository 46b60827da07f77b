"""The exercises of lesson 2."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

from sftlib.checks.causes import likely_cause, near
from sftlib.checks.exercise import exercise
from sftlib.checks.functions import compare, reference
from sftlib.checks.held_out import Score, beats, read_rows, refuse_leaks, training_seed
from sftlib.checks.reading import number, sequence, shown, text, unique
from sftlib.checks.verdict import Verdict, right, wrong
from sftlib.data.files import read_facts
from sftlib.data.validation import CONTROL_TOKEN, normalise

# --- Write a validator ---------------------------------------------------------------------------

QUESTION, ANSWER = "What is the capital of Niger?", "The capital of Niger is Niamey."


@reference
def problems(question: str, answer: str) -> list[str]:
    asked, given = question.strip().lower(), answer.strip().lower()
    found = {
        "empty": not given,
        "repeats the question": asked == given,
        "control token": "<|" in question or "<|" in answer,
    }
    return [problem for problem, holds in found.items() if holds]


def _draw_pair(rng: random.Random, size: int) -> tuple[str, str]:
    """A question of some words and an answer, sound or with one problem."""
    words = rng.choices(["which", "capital", "Niger", "2 < 3", "a|b", "it's", "Lomé"], k=size + 1)
    question = " ".join(words) + "?"
    answers = [
        *[" ".join(rng.choices(words, k=size)) + "."] * 3,
        rng.choice(words),
        question[: len(question) // 2] + "!",
        f"{question} {question}",
        "x" * len(question),
        rng.choice(["", " ", "\n\t "]),
        rng.choice(["", " ", "\n"]) + question.swapcase() + rng.choice(["", "  "]),
    ]
    texts = [question, rng.choice(answers)]
    if rng.random() < 0.3:  # a control token anywhere in either text
        side, name = rng.randrange(2), rng.choice(["im_end", "eot_id", "end", "x_7", "begin"])
        at = rng.randint(0, len(texts[side]))
        texts[side] = f"{texts[side][:at]}<|{name}|>{texts[side][at:]}"
    return texts[0], texts[1]


def _any_problem(found: Any) -> bool:
    listed = sequence(found, what="a list of problems", ordered=False)
    return bool([text(problem, "A problem in the list") for problem in listed])


@exercise(2, 1, "`function(question, answer) -> list of problems`")
def check_validator(function: Any) -> Verdict:
    compare(function, problems, PAIR_EDGES, _draw_pair, read=_any_problem)
    return right("It finds what is broken, and leaves what is well.")


PAIR_EDGES = [
    ("There is nothing wrong with a true, plain pair.", (QUESTION, ANSWER)),
    ("An empty answer is a problem.", (QUESTION, "")),
    ("An answer of spaces and line breaks is empty too: `strip()` it.", (QUESTION, " \n ")),
    ("An answer of tabs is empty too: `strip()` knows all white space.", (QUESTION, "\t")),
    ("An answer that is the question is a problem.", (QUESTION, QUESTION)),
    (
        "The question repeated in other case, with spaces around, is still the question: compare "
        "`strip()`ped, `lower()`ed texts.",
        (QUESTION, " what is the CAPITAL of Niger? "),
    ),
    (
        "An answer may quote the question and go on: ask whether they are equal, not `in`.",
        (QUESTION, f"You ask: {QUESTION} It is Niamey."),
    ),
    (
        "An answer may be a part of the question: ask whether they are equal, not `in`.",
        ("Is Niamey or Zinder the capital of Niger?", "Niamey"),
    ),
    (
        "An answer may begin as the question does: ask whether they are equal, to the end.",
        ("Niamey or Zinder: which is the capital of Niger?", "Niamey"),
    ),
    (
        "An answer of the same length, or of the same letters, is another text.",
        (QUESTION, QUESTION[::-1]),
    ),
    ("A control token in the answer is a problem.", (QUESTION, ANSWER + "<|im_end|>")),
    ("Look for control tokens in the question too.", ("<|im_start|>" + QUESTION, ANSWER)),
    (
        "`<|eot_id|>` is a control token too, of another model: look for `<|`, not for names.",
        (QUESTION, ANSWER + "<|eot_id|>"),
    ),
    (
        "A control token may stand anywhere in a text, not only where it begins or ends.",
        (QUESTION, "The capital <|end|> is Niamey."),
    ),
    ("`<` alone is no control token; `<|` is.", ("Is 2 < 3?", "Yes: 2 < 3, and 3 > 2.")),
    (
        "A control token that is cut off is a problem too: look for `<|`, not for its end.",
        (QUESTION, "The capital of Niger is Niamey.<|im_en"),
    ),
    ("`|>` alone is none: a control token begins with `<|`.", ("What is a pipe?", "It is x |> f.")),
    ("A short answer is an answer: empty means that nothing is left of it.", ("2 + 2?", "4")),
    (
        "The question may have spaces around it, which do not count: `strip()` the question too.",
        (f" {QUESTION} ", QUESTION.lower()),
    ),
]


# --- Read what an LLM writes ---------------------------------------------------------------------

KEYS = (("question", "answer"), ("instruction", "response"))


@reference
def pairs(text: str) -> list[tuple[str, str]]:
    found = re.search(r"[\[{].*[\]}]", text, re.DOTALL)
    try:
        data = json.loads(found[0]) if found else []
    except ValueError:
        return []
    items = data if isinstance(data, list) else [data]
    return [(item[q], item[a]) for item in items for q, a in KEYS if q in item and a in item]


def _draw_completion(rng: random.Random, size: int) -> tuple[str]:
    """JSON with some pairs and perhaps something else, in a fence or between sentences or bare."""
    texts = ['Say "hi".', "2 + 2?", "Lomé", "f(x) = {x}", "a, b", "It's 4: [4].", "\\alpha", "1\n2"]
    items = []
    for _ in range(size):
        question, answer = rng.choice(KEYS)
        item = {question: rng.choice(texts), answer: rng.choice(texts)}
        if rng.random() < 0.3:  # the keys may come in any order
            item = dict(reversed(item.items()))
        items.append(item | rng.choice([*[{}] * 4, {"id": 7}, {"ok": True}, {"note": None}]))
    if rng.random() < 0.3:
        items.insert(rng.randint(0, size), {"title": rng.choice(texts), "text": "A list."})
    data = items[0] if len(items) == 1 and rng.random() < 0.5 else items
    written = json.dumps(data, indent=rng.choice([None, 2]), ensure_ascii=rng.random() < 0.5)
    if rng.random() < 0.5:
        written = f"{rng.choice(['```', '```json'])}\n{written}\n```"
    before = rng.choice(["", "", "Here you are:\n", "Sure: ", "Of course, with pleasure!\n\n"])
    return (before + written + rng.choice(["", "", "\nEnjoy!", " Bye.", "\n\nShall I go on?"]),)


def _read_pairs(found: Any) -> list[list]:
    what = "a pair (question, answer)"
    return [sequence(item, f"item {n}", what) for n, item in enumerate(sequence(found), 1)]


@exercise(2, 2, "`function(text) -> list of (question, answer)`")
def check_parser(function: Any) -> Verdict:
    compare(function, pairs, COMPLETION_EDGES, _draw_completion, read=_read_pairs)
    return right("It reads what small models really write. (`parse_pairs` also checks the texts.)")


ONE = '{"question": "2 + 2?", "answer": "4"}'
OTHER = '{"instruction": "Say hello.", "response": "Hello."}'
COMPLETION_EDGES = [
    ("A list of one pair.", (f"[{ONE}]",)),
    ("A code fence around the list: look for brackets.", (f"```json\n[{ONE}]\n```",)),
    ("The keys may be `instruction` and `response`.", (f"[{OTHER}]",)),
    ("A single object, not in a list, is a pair too.", (ONE,)),
    ("Both kinds of keys may stand in one list.", (f"[{ONE}, {OTHER}]",)),
    (
        "JSON may go over several lines: `.` stops at a line break without `re.DOTALL`.",
        (json.dumps([json.loads(ONE)], indent=2),),
    ),
    ("Sentences before and after the JSON.", (f"Here you are:\n[{ONE}]\nEnjoy!",)),
    (
        "Sentences before and after the JSON, whatever they are.",
        (f"With pleasure!\n[{ONE}]\nShall I write more?",),
    ),
    ("Sentences before and after the JSON, on one line with it.", (f"Sure: [{ONE}] Bye.",)),
    ("No JSON at all: an empty list.", ("I would rather not.",)),
    ("JSON that was cut off: catch ValueError.", ('[{"question": "2 + 2?", "ans',)),
    ("Brackets that hold no JSON: catch ValueError.", ("I would [not] do that.",)),
    (
        "JSON that was cut off after a bracket: catch ValueError.",
        ('[{"question": "What is a[i]?", "ans',),
    ),
    (
        "An object may have other keys besides: look for the two, and leave the others.",
        ('[{"question": "2 + 2?", "answer": "4", "id": 7}]',),
    ),
    (
        "JSON is no Python: `true` and `null` are read by `json.loads`, not by `eval`.",
        ('[{"question": "2 + 2?", "answer": "4", "ok": true, "note": null}]',),
    ),
    ("The keys may stand in the other order.", ('[{"answer": "4", "question": "2 + 2?"}]',)),
    (
        "Quotation marks in a text are escaped: let `json.loads` read them, no pattern.",
        (r'[{"question": "Say \"hi\".", "answer": "Hi."}]',),
    ),
    (
        "Brackets may stand inside a text: let `json.loads` find where an object ends.",
        ('[{"question": "Greet me.", "answer": "Hi, {you}."}]',),
    ),
    ("An object with other keys is no pair.", ('[{"title": "A list", "text": "of things"}]',)),
    ("A question without its answer is no pair.", ('[{"question": "2 + 2?"}]',)),
]


# --- Find the leaks ------------------------------------------------------------------------------


@exercise(2, 3, "which training rows give the test question away")
def check_leaks(rows: Any) -> Verdict:
    found = unique(rows, what="a set of numbers from 1 to 4, such as {1, 4}", among=range(1, 5))
    if found == {1, 3}:
        return right("A new wording with the same answer, and the question inside a longer text.")
    reasons = {
        2: "Row 2 asks about another country: alike in letters, another fact.",
        4: "Row 4 is about Togo, but gives another fact away. (Splitting by entity prevents that.)",
    }
    if extra := sorted(found & set(reasons)):
        return wrong(reasons[extra[0]])
    if not found:
        return wrong("None of them? Two of the four rows give the answer of the test away.")
    missing = {
        1: "the same question in other words, with its answer",
        3: "the question stands inside a longer text, with its answer",
    }
    return wrong(f"One more row: {missing[min({1, 3} - found)]}.")


# --- What would it cost? -------------------------------------------------------------------------


@exercise(2, 4, "what 10,000 usable pairs cost")
def check_cost(cost: Any) -> Verdict:
    found = number(cost)
    attempts = 10_000 / 0.6
    expected = (0.5 * 400 + 2.0 * 40) * attempts / 1e6
    if near(found, expected, tolerance=0.01):
        return right(f"About {expected:.2f}: the attempts that fail are paid for too.")
    causes = {
        expected * 0.6: "That pays for 10,000 attempts. Of these only 6,000 would be usable.",
        expected * 0.36: "You multiplied by 0.6; to *get* 10,000 you must divide by it.",
        expected * 1e6: "Prices are per million tokens.",
        expected * 1e3: "Prices are per million tokens, not per thousand.",
        2.0 * 40 * attempts / 1e6: "The prompt costs too, and here it costs most.",
        0.5 * 400 * attempts / 1e6: "What the model writes costs too.",
        (0.5 * 40 + 2.0 * 400) * attempts / 1e6: "The two prices are the wrong way round.",
        expected / attempts: "That is the price of one attempt.",
        expected / 10_000: "That is the price of one usable pair; 10,000 are wanted.",
        expected * 0.4: "That pays for the attempts that fail alone; the others cost, too.",
        2.0 * 440 * attempts / 1e6: "That is 2.0 for all tokens: prompt tokens cost 0.5.",
        0.5 * 440 * attempts / 1e6: "That is 0.5 for all tokens: completion tokens cost 2.0.",
        expected * 0.6 * 1.4: "That pays for 14,000 attempts, of which 8,400 would be usable.",
        expected * 0.6 * 1.6: "That pays for 16,000 attempts, of which 9,600 would be usable.",
        attempts: "That is the number of attempts. What do they cost?",
        440 * attempts: "That is the number of tokens. What do they cost?",
        100 * expected * 0.6: "That is in cents, and for 10,000 attempts.",
        4.6: "That is cut. Round to 4.67, or give all digits.",
    }
    cause = likely_cause(found, expected, causes, unit="money")
    cause = cause or "Count the attempts first: how many give 10,000 usable pairs at 60 %?"
    return wrong(cause[0].upper() + cause[1:])


# --- Clean a dirty set ---------------------------------------------------------------------------

ASKED = 120  # facts that the dirty set asks about; four rows each, of which two are false
COPIED, SPOILT = 60, 20  # copies of these rows; rows about other facts that are broken in form
AT_LEAST = 200  # rows to keep: 240 are right
MAY_REMAIN = 5  # dirty rows of a kind
WON_BACK = 0.9  # exact match
OTHER_WORDINGS = (
    *("Does anybody know {}?", "Quick question: what is {}?", "I forgot {}. Can you help?"),
    *("Somebody asked me about {}.", "For my homework: {}?", "Hello, what was {} again?"),
)
LOOKS_OTHERWISE = (
    *(str.upper, str.lower, lambda t: f"  {t}", lambda t: t.replace(" ", "  ")),
    *(lambda t: t.rstrip(".?") + " ???", lambda t: t.rstrip(".?") + "..."),
)


def dirty_rows() -> list[dict]:
    """Rows that need cleaning, for exercise 5 of lesson 2; the same ones each time."""
    return [{"messages": [dict(m) for m in row["messages"]]} for row in _dirty()]


def _row(question: str, answer: str) -> dict:
    roles = ("user", "assistant")
    contents = zip(roles, (question, answer), strict=True)
    return {"messages": [{"role": role, "content": content} for role, content in contents]}


@cache
def _dirty() -> list[dict]:
    """The dirty rows, each with its `kind` (right, false, copy, leak or broken) and its `truth`."""
    chance = random.Random(7)
    facts = _by_fact()
    chosen = chance.sample(sorted(facts), ASKED + SPOILT)
    rows = [row for fact in chosen[:ASKED] for row in _four(facts[fact], facts, chance)]
    copied = [_looking_otherwise(row, chance) for row in chance.sample(rows, COPIED)]
    broken = [_broken(facts[fact][0], n) for n, fact in enumerate(chosen[ASKED:])]
    everything = [*rows, *copied, *broken, *_leaks(chance)]
    chance.shuffle(everything)
    return everything


def _by_fact() -> dict[tuple[str, str], list[dict]]:
    """The course's training rows by fact, without exact copies."""
    facts: dict[tuple[str, str], list[dict]] = {}
    for row in read_facts("sft"):
        same = facts.setdefault((row["relation"], row["entity"]), [])
        if row not in same:
            same.append(row)
    return facts


def _four(same: list[dict], facts: dict, chance: random.Random) -> list[dict]:
    """Two right rows about a fact, and two false ones that contradict each other."""
    row = same[0]
    answer = row["messages"][1]["content"]
    name = "t" + answer[1 : answer.index(" is ")]
    questions = [one["messages"][0]["content"] for one in same[:2]]
    questions += [wording.format(name) for wording in chance.sample(OTHER_WORDINGS, 2)]
    chance.shuffle(questions)
    values = {one[0]["value"] for fact, one in facts.items() if fact[0] == row["relation"]}
    before, _, after = answer.rpartition(row["value"])
    false = [before + v + after for v in chance.sample(sorted(values - {row["value"]}), 2)]
    kinds = ("right", "right", "false", "false")
    answers = (answer, answer, *false)
    return [
        _row(question, said) | {"kind": kind, "truth": answer}
        for question, said, kind in zip(questions, answers, kinds, strict=True)
    ]


def _looking_otherwise(row: dict, chance: random.Random) -> dict:
    question, answer = (m["content"] for m in row["messages"])
    looks = _row(chance.choice(LOOKS_OTHERWISE)(question), answer)
    return looks | {"kind": "copy", "truth": row["truth"]}


def _broken(row: dict, number: int) -> dict:
    question, answer = (m["content"] for m in row["messages"])
    answers = (" ", question, f"{answer}<|im_end|>", f"<|start_header_id|>{answer}")
    return _row(question, answers[number % len(answers)]) | {"kind": "broken", "truth": answer}


def _leaks(chance: random.Random) -> list[dict]:
    """Held-out rows: some as they are, some after a sentence, some in another wording."""
    tests, reworded = read_facts("heldout"), read_facts("heldout_wordings")
    found = [_row(*(m["content"] for m in row["messages"])) for row in chance.sample(tests, 8)]
    for row in found[4:]:
        row["messages"][0]["content"] = "I ask for a friend. " + row["messages"][0]["content"]
    found += [_row(*(m["content"] for m in row["messages"])) for row in chance.sample(reworded, 4)]
    return [row | {"kind": "leak", "truth": row["messages"][1]["content"]} for row in found]


@exercise(2, 5, "a cleaned `checks.dirty_rows()` that wins the score back")
def check_cleaning(rows: Any) -> Verdict:
    given = read_rows(rows, most=len(_dirty()))
    if problem := _foreign(given):
        return wrong(problem)
    if len(given) < AT_LEAST:
        return wrong(
            f"Expected at least {AT_LEAST} rows, found {len(given)}: good rows are missing. "
            "Remove only what is dirty."
        )
    refuse_leaks(given, read_facts("heldout"))
    if left := _dirt_left(given):  # seconds of training would say nothing more
        return wrong(f"{left} Nothing was trained yet.")
    verdict = _trained_on(given)
    if isinstance(verdict, Score) and verdict:
        return right(f"{verdict.message} No dirt that matters is left.")
    return verdict


_scores: dict[tuple[int, str], Verdict] = {}


def _trained_on(rows: Sequence[dict]) -> Verdict:
    """The verdict of `beats`, once for the same rows in whatever order."""
    ordered = sorted(rows, key=json.dumps)
    key = training_seed(), json.dumps(ordered)
    if key not in _scores:
        verdict = beats(ordered, WON_BACK, most_rows=len(rows))
        if not isinstance(verdict, Score):  # such as: time is up
            return verdict
        _scores[key] = verdict
    return _scores[key]


def _said(row: dict) -> tuple[str, ...]:
    return tuple(normalise(CONTROL_TOKEN.sub("", m["content"])) for m in row["messages"])


def _foreign(rows: Sequence[dict]) -> str:
    """What is wrong if a row does not come from the dirty set; empty if all do."""
    there = [_said(row) for row in _dirty()]
    questions, answers = ({said[i] for said in there} for i in (0, 1))
    for place, row in enumerate(rows, 1):
        said = _said(row)
        if len(said) != 2 or said[0] not in questions or said[1] not in answers:
            asked = shown(row["messages"][0]["content"], 80)
            return (
                f"Row {place} ({asked}) does not come from dirty_rows(). Remove rows or repair "
                "them; add none from elsewhere."
            )
    return ""


def _dirt_left(rows: Sequence[dict]) -> str:
    """A hint at the kind of dirt that is left most often; empty if there is hardly any."""
    answer_to = {_said(row)[0]: normalise(row["truth"]) for row in _dirty()}
    truths = set(answer_to.values())
    said = [_said(row) for row in rows]
    found = {
        "false": sum(answer not in truths for _, answer in said),
        "of others": sum(a in truths and a != answer_to[q] for q, a in said),
        "copies": sum(count - 1 for count in Counter(said).values()),
    }
    kind = max(found, key=lambda name: found[name])
    if found[kind] <= MAY_REMAIN:
        return ""
    hints = {
        "false": "are false. Look for rows about one fact that contradict each other.",
        "of others": "have the answer to another question. Keep each answer with its question.",
        "copies": "repeat another one, but for case, spaces and punctuation. The score would not "
        "show it.",
    }
    return f"{found[kind]} of your rows {hints[kind]}"
