"""The exercises of lesson 1."""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Mapping
from typing import Any

from sftlib.checks.exercise import exercise
from sftlib.checks.functions import compare, reference
from sftlib.checks.reading import described, sequence, shown, whole
from sftlib.checks.verdict import NOT_ATTEMPTED, Verdict, right, wrong
from sftlib.data import read_facts
from sftlib.data.validation import CONTROL_TOKEN

# --- Write an example ----------------------------------------------------------------------------

ANSWER = "The capital of Kenya is Nairobi."
WORDS = frozenset(
    """a about all am an ask asking be called can city could country did do does for from give
    governed government has have hello hey hi i in is it its kenya kenyan kenyas kindly know let
    like love me my name need of official on one please question quick remind say seat state tell
    thank thanks that the there this to today tomorrow town trip was want we what whats where which
    will with wonder wondering would you your capital identify provide us find out curious quiz
    help learn""".split()
)
"""A question for Kenya's capital alone needs no others. Words that ask for more, or for something
else, are not among them: not, many, population, old."""
TOKEN = re.compile(rf"{CONTROL_TOKEN.pattern}|<\|", re.IGNORECASE)
CONTRADICTS = re.compile(
    r"\b(capital|kenya|nairobi|words?|json|yaml|list|bullets?|never|not|no|"
    r"\w*n't|lie|lies|wrong|false|wrongly|falsely|pretend|refuse|rhymes?|poems?|upper|lower|case|"
    r"only (?:with|by|the)|french|german|spanish|italian|swahili|chinese|arabic|pirate|essay|"
    r"detail|long|sorry)\b"
)


@exercise(1, 1, "one SFT example about the capital of Kenya, as `messages`")
def check_example(messages: Any) -> Verdict:
    if isinstance(messages, Mapping) and "messages" in messages:
        messages = messages["messages"]  # a row of a dataset
    if isinstance(messages, list | tuple) and not messages:
        return NOT_ATTEMPTED
    rows = sequence(messages, what="a list of dicts, one per message, [{'role': …, 'content': …}]")
    if cause := _wrong_format(rows):
        return wrong(cause)
    *_, question, answer = (message["content"] for message in rows)
    system = rows[0]["content"] if len(rows) == 3 else ""
    for part in (system, question, answer):
        if found := TOKEN.search(part):
            return wrong(f"No control tokens in the text ({found[0]}): the template adds them.")
    if cause := _wrong_question(question) or _wrong_answer(answer) or _contradicting(system):
        return wrong(cause)
    return right("A clean example: two roles, a question, one true answer in the data's style.")


def _wrong_format(messages: list) -> str:
    """What is wrong with the types, keys and roles of an example; empty if nothing is."""
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping):
            return (
                f"Expected a list of dicts, one per message, [{{'role': …, 'content': …}}]; found "
                f"{described(message)} as message {number}."
            )
        if set(message) != {"role", "content"}:
            return (
                f"Message {number} has the keys {sorted(map(str, message))}; "
                "it needs exactly 'role' and 'content'."
            )
        if not isinstance(message["content"], str):
            found = described(message["content"])
            return f"Expected text as the content of message {number}, found {found}."
    roles = [message["role"] for message in messages]
    if roles not in (["user", "assistant"], ["system", "user", "assistant"]):
        return (
            "Expected a 'user' message and then an 'assistant' message, at most with a 'system' "
            f"message before them; found {roles}. "
            "The names 'human', 'gpt' or 'instruction' belong to other formats."
        )
    return ""


def _wrong_question(question: str) -> str:
    """Why this does not ask for the capital of Kenya, and for nothing else; empty if it does."""
    asked = question.lower().replace("’", "'")
    words = re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)?|\d+", asked)
    known = [word.removesuffix("'s") for word in words]
    if "nairobi" in asked:
        return "The question gives the answer away: leave Nairobi to the assistant."
    if others := [
        name for name in _countries() if re.search(rf"\b{re.escape(name.lower())}\b", asked)
    ]:
        return f"The question names {others[0]}, too. Ask for Kenya's capital alone."
    about = {"capital", "governed", "government", "seat"}.intersection(known)
    if not about or not {"kenya", "kenyan"}.intersection(known):
        return "The question should ask for the capital of Kenya."
    if odd := [word for word in known if word not in WORDS]:
        return f"Expected a plain question for Kenya's capital alone, found the word {odd[0]!r}."
    if words[0] in {"is", "was", "does", "has", "did"}:
        return "That asks for yes or no. Ask for the capital's name."
    requests = {"name", "tell", "give", "say", "identify", "provide", "please", "kindly", "remind"}
    asks = {"i", "what", "which", "where", *requests}
    if not asks.intersection(known) and not question.rstrip().endswith("?"):
        return "That is no question: end it with a question mark, or begin with a word like Name."
    return ""


@functools.cache
def _countries() -> list[str]:
    """The other countries of the course's facts."""
    sets = ("sft", "dev", "heldout", "unknown", "never_asked")
    rows = [row for name in sets for row in read_facts(name)]
    of_countries = ("capital", "continent", "currency", "domain")
    named = {row["entity"] for row in rows if row["relation"] in of_countries}
    return sorted(name.removeprefix("the ") for name in named - {"Kenya"})


def _wrong_answer(answer: str) -> str:
    if "nairobi" not in answer.lower():
        return "The answer is wrong: a model learns wrong answers as well as right ones."
    if answer != ANSWER:
        return (
            f"True, but not in the style of the data: {answer!r}. The ten examples above answer in "
            "one full sentence that ends with a full stop; mixed styles teach a mixed style."
        )
    return ""


def _contradicting(system: str) -> str:
    """Why the system message does not fit the answer; empty if it does."""
    found = CONTRADICTS.search(system.lower())
    if not found:
        return ""
    return (
        "The system message says something that the answer does not follow, or that belongs to the "
        f"answer ({found[0]!r}): a model learns to ignore it. The ten examples have none."
    )


# --- Write the measure ---------------------------------------------------------------------------

PARTS = ["Kenya", "+60", "C++", "Lomé", "(LTR)", "what?", "3.14", "Port-au-Prince", "the", "$5 *"]


@reference
def matches(text: str, stopped: bool, reference: str) -> bool:
    return stopped and text == reference


def _draw_answer(rng: random.Random, size: int) -> tuple[str, bool, str]:
    """A reference of some words, and an answer that equals it or nearly does."""
    reference = " ".join(rng.choices(PARTS, k=size + 1)) + "."
    at = rng.randrange(len(reference))
    texts = [
        *[reference] * 6,
        f" {reference}",
        f"{reference}\n",
        reference.replace(" ", "  "),
        reference.replace(" ", ""),
        reference.swapcase(),
        reference[::-1],
        reference[:at] + "x" + reference[at + 1 :],
        reference[:-1] + "!",
        reference[:at],
        reference + reference,
        "",
    ]
    return rng.choice(texts), rng.random() < 0.8, reference


@exercise(1, 2, "`function(text, stopped, reference) -> bool`")
def check_exact_match(function: Any) -> Verdict:
    compare(function, matches, EXACT_EDGES, _draw_answer, EXACT_MISTAKES)
    return right("Strict where it should be: the same text, and stopped.")


EXACT_EDGES = [
    ("An identical answer that stopped must match.", (ANSWER, True, ANSWER)),
    (
        "An answer that did not stop must not match: in use, it would ramble on. Did you forget "
        "`stopped`?",
        (ANSWER, False, ANSWER),
    ),
    (
        "A wrong city must not match: compare the whole text, not its beginning or length.",
        ("The capital of Kenya is Mombasa.", True, ANSWER),
    ),
    (
        "The right sentence followed by more must not match: `in` asks for content, and exact "
        "match asks for equality.",
        (f"{ANSWER} {ANSWER}", True, ANSWER),
    ),
    ("Upper and lower case count.", (ANSWER.lower(), True, ANSWER)),
    (
        "A part of the reference must not match: exact match asks for all of it, with `==`.",
        ("Nairobi", True, ANSWER),
    ),
    ("An empty answer must not match, though every text begins with it.", ("", True, ANSWER)),
    ("The full stop counts: compare the texts as they are.", (ANSWER[:-1], True, ANSWER)),
    ("Spaces count: do not `strip()`.", (f" {ANSWER} ", True, ANSWER)),
    ("Spaces count, those between words, too.", (ANSWER.replace(" ", "  "), True, ANSWER)),
    ("The same letters in another order are another text.", (ANSWER[::-1], True, ANSWER)),
    (
        "The reference is a text, and no pattern: `re` reads + and . as its own signs.",
        ("The calling code of Malaysia is +60.", True, "The calling code of Malaysia is +60."),
    ),
]
EXACT_MISTAKES = {
    "An answer that did not stop must not match. Did you forget `stopped`?": lambda t, s, r: t == r,
    "The reference is a text, and no pattern: `re` reads + and . as its own signs.": (
        lambda t, s, r: s and re.fullmatch(r, t) is not None
    ),
    "Spaces count: do not `strip()`.": lambda t, s, r: s and t.strip() == r.strip(),
    "That looks at `stopped` alone.": lambda t, s, r: s,
}


# --- Count what is learned -----------------------------------------------------------------------


@exercise(1, 3, "how many tokens of the example the model learns from")
def check_learned_tokens(number: Any, masks: list[int]) -> Verdict:
    expected, found = sum(masks), whole(number)
    if found == expected:
        return right(f"{expected} of {len(masks)} tokens: the answer and the token that ends it.")
    likely = {
        len(masks): "That is every token. The question is only read, not learned from.",
        len(masks) - expected: "That counts the tokens that are only read; we want the others.",
        expected
        - 1: "One short: the control token that ends the answer is learned too. Without it "
        "the model never learns to stop.",
        expected + 1: "One too many: the line break after <|im_end|> belongs to the template.",
    }
    return wrong(likely.get(found, "Count the bold, underlined tokens of the picture above."))


# --- Which number is the evidence? ---------------------------------------------------------------

SETS = ("heldout", "heldout_wordings", "unknown")
MEASURES = ("exact_match", "content", "stops")


@exercise(1, 4, "which measurement shows that SFT gave the model no knowledge")
def check_knowledge(claim: Any) -> Verdict:
    wanted = (
        f"a set ({', '.join(SETS)}) and a measure ({', '.join(MEASURES)}), such as "
        "'heldout / stops'"
    )
    parts = (
        re.split(r"[/,|:]| and ", claim) if isinstance(claim, str) else sequence(claim, what=wanted)
    )
    names = [
        re.sub(r"[\s_-]+", "_", part.strip().lower()) if isinstance(part, str) else part
        for part in parts
    ]
    if len(names) == 2 and names[0] in MEASURES and names[1] in SETS:
        names.reverse()
    if len(names) != 2 or names[0] not in SETS or names[1] not in MEASURES:
        return wrong(f"Expected {wanted}; found {shown(claim)}.")
    name, measure = names
    if name == "unknown" and measure != "stops":
        return right(
            "What the model had never read it still does not know after SFT, "
            "although it nearly always answers in the right form."
        )
    if name == "unknown":
        return wrong(
            f"'{measure}' on the unknown set rises: the model answers and stops. "
            "That is format. Which measure asks whether the answer is true?"
        )
    return wrong(
        f"The set '{name}' asks about facts that the model had read in pretraining, so a high "
        "score there may be old knowledge, newly accessible. Which set asks about facts it "
        "never read?"
    )
