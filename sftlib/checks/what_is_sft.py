"""The exercises of lesson 1."""

from __future__ import annotations

import functools
import json
import random
import re
from collections.abc import Mapping
from typing import Any

from sftlib.checks.exercise import exercise
from sftlib.checks.functions import compare, reference
from sftlib.checks.held_out import Score, beats, read_rows, training_seed
from sftlib.checks.reading import described, sequence, shown, whole
from sftlib.checks.verdict import NOT_ATTEMPTED, Verdict, right, wrong
from sftlib.data import read_facts
from sftlib.data.validation import CONTROL_TOKEN, normalise

# --- Write an example ----------------------------------------------------------------------------

ANSWER = "The capital of Kenya is Nairobi."
KENYA = r"(?:the )?(?:republic of |nation of |(?:african )?country (?:of )?)?kenya"
CAPITAL = re.compile(
    rf"(?P<before>.*?)\b(?:the |its )?(?:official )?(?:name of (?:the )?)?(?:(?P<full>"
    rf"capital(?: city)? of {KENYA}\b(?!'s)|"
    rf"{KENYA}(?:'s|n) (?:official )?capital(?: city| town)?\b(?!'s))"
    r"|capital(?: city)?(?=[ ,]*(?:is|called|please)?[ ]*(?:[?.!]|$)))(?P<after>[^?.!,;:]*)"
)
"""The words that name what is asked for, with what stands before and after them; without `full`,
Kenya must be named elsewhere."""
GOVERNED = re.compile(
    r"\b(?:city|town|seat)\b.*(?:kenya governed|government of kenya|kenya's government)\b"
)
ASKS = frozenset(
    """and answer as ask asks be call city city's complete find for forget forgot give guess
    identify is know learn list me my name need please provide question recall remember say show
    state tell that town type us want was what what's whats which wonder write""".split()
)
"""What may stand right before "the capital of Kenya" in a question for its name."""
ABOUT = re.compile(
    r"\b(?:(?:question(?: is)?|curious|wondering|you know) about|(?:inform|remind) me of)$"
)
AFTER = frozenset(
    "again called city for in africa is it me named now please to today us what which".split()
)
ELSE = re.compile(
    r"\b(?:where|when|why|who|(?<!i )was|were|did|had|one word|single word|not|never"
    r"|how(?! (?:is|do|would) .*call)"
    r"|(?:which|what) (?:country|state|continent|language|currency|river|people|population|year))\b"
)
"""Words that ask for something else than the capital's name today."""
REQUEST = re.compile(
    r"\?\s*$|\b(?:what|what's|whats|which)\b"
    r"|(?:^|[.!:,] )(?:please |kindly |hey )?(?:name|tell|give|say|state|find|show|write|identify|"
    r"provide|remind|teach|inform|recall|guess|answer|list|complete|let)\b"
    r"|\b(?:please|kindly|i wonder|wondering|i'?d like|i would (?:like|love)|i want|i need|curious|"
    r"question|asking|i ask|i don't know)\b"
)
TOKEN = re.compile(rf"{CONTROL_TOKEN.pattern}|<\|", re.IGNORECASE)
CONTRADICTS = re.compile(
    r"\b(capital|kenya|nairobi|words?|json|yaml|list|bullets?|never|not|no|"
    r"\w*n't|lie|lies|wrong|false|wrongly|falsely|pretend|refuse|rhymes?|poems?|upper|lower|case|"
    r"only (?:with|by|the)|french|german|spanish|italian|swahili|chinese|arabic|pirate|essay|"
    r"detail|long|sorry|translate\w*|latin|just|name|exclamation|an? (?:question|riddle)|emojis?|"
    r"haikus?|jokes?|uppercase|lowercase|letters?|begin|start|sing|song|markdown|bold|html|xml|rude"
    r"\w*|sarcas\w*|twice|repeat|backwards?|portuguese|japanese|russian|korean|hindi|dutch|turkish)\b"
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
    if (
        cause := _wrong_question(question)
        or _wrong_answer(answer)
        or _contradicting(system, len(rows) == 3)
    ):
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
    small = [str(role).strip().lower() for role in roles]
    if small != roles and small in (["user", "assistant"], ["system", "user", "assistant"]):
        return f"The names of roles are written in small letters, without spaces; found {roles}."
    if roles not in (["user", "assistant"], ["system", "user", "assistant"]):
        return (
            "Expected a 'user' message and then an 'assistant' message, at most with a 'system' "
            f"message before them; found {roles}. "
            "The names 'human', 'gpt' or 'instruction' belong to other formats."
        )
    return ""


def _wrong_question(question: str) -> str:
    """Why this does not ask for the capital of Kenya, and for nothing else; empty if it does."""
    asked = " ".join(question.lower().replace("’", "'").split())
    if not asked:
        return "The question is empty: ask for the capital of Kenya."
    if label := re.match(r"(?:q|question|user|human) ?:", asked):
        return f"Leave {label[0]!r} out: the role says who speaks."
    if "nairobi" in asked:
        return "The question gives the answer away: leave Nairobi to the assistant."
    names = [name for name in _countries() if re.search(rf"\b{re.escape(name.lower())}\b", asked)]
    if names:
        how = "too. Ask for Kenya's capital alone" if "kenya" in asked else "in place of Kenya"
        return f"The question names {names[0]}{',' * ('kenya' in asked)} {how}."
    if asked.count("?") > 1:
        return "Expected one question, for the capital of Kenya; found several question marks."
    if asked.split()[0] in {"is", "was", "does", "has", "did"}:
        return "That asks for yes or no. Ask for the capital's name."
    if "kenya" not in asked:
        return "The question should ask for the capital of Kenya."
    return _asks_for_else(asked)


def _asks_for_else(asked: str) -> str:
    """What a text about Kenya asks for in place of its capital; empty if it asks for that."""
    if odd := ELSE.search(asked):
        return _not_plain(odd[0])
    if GOVERNED.search(asked):
        return ""
    found = CAPITAL.search(asked)
    if not found:
        return "The question should ask for the capital of Kenya, as in 'the capital of Kenya'."
    before = re.findall(r"[\w']+", re.split(r"[?.!:,;]", found["before"])[-1])
    about = ABOUT.search(" ".join(before))
    if before and before[-1] not in ASKS and not about:
        return _not_plain(before[-1])
    after = [word for word in found["after"].split() if word not in AFTER]
    if after:
        return _not_plain(after[0])
    if not REQUEST.search(asked):
        return "That is no question: end it with a question mark, or begin with a word like Name."
    return ""


def _not_plain(word: str) -> str:
    return f"Expected a plain question for the name of Kenya's capital, found {word!r}."


@functools.cache
def _countries() -> list[str]:
    """The other countries of the course's facts."""
    sets = ("sft", "dev", "heldout", "unknown", "never_asked")
    rows = [row for name in sets for row in read_facts(name)]
    of_countries = ("capital", "continent", "currency", "domain")
    named = {row["entity"] for row in rows if row["relation"] in of_countries}
    return sorted(name.removeprefix("the ") for name in named - {"Kenya"})


def _wrong_answer(answer: str) -> str:
    if not answer.strip():
        return "The answer is empty."
    if "nairobi" not in answer.lower() or re.search(r"\b(?:not|never|no)\b|n't\b", answer.lower()):
        return "The answer is wrong: a model learns wrong answers as well as right ones."
    if answer == ANSWER:
        return ""
    differs = [
        (answer.strip() == ANSWER, "with spaces or line breaks around it"),
        (answer == ANSWER[:-1], "without the full stop"),
        (answer.lower() == ANSWER.lower(), "with other capital letters"),
        (answer.startswith(ANSWER), "but it goes on after the sentence"),
        (
            len(answer.split()) > 3,
            "in another wording: their answers to such questions begin with 'The capital of'",
        ),
    ]
    how = next((how for holds, how in differs if holds), "but not in one full sentence")
    return (
        f"True, {how}; found {answer!r}. The ten examples above answer in one full sentence that "
        "ends with a full stop; mixed styles teach a mixed style."
    )


def _contradicting(system: str, has_system: bool) -> str:
    """Why the system message does not fit the answer; empty if it does."""
    if has_system and not system.strip():
        return "The system message is empty: it says nothing, so leave it out."
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
    (
        "An identical answer that stopped must match: compare with `==`, not `is`.",
        (ANSWER, True, ANSWER),
    ),
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
    ("A line break at the end counts: compare all of the text.", (f"{ANSWER}\n", True, ANSWER)),
    ("A space before the text counts.", (f" {ANSWER}", True, ANSWER)),
    ("The first letter counts too: compare all of the text.", (f"J{ANSWER[1:]}", True, ANSWER)),
    (
        "Accents count: Lomé is not Lome.",
        ("The capital of Togo is Lome.", True, "The capital of Togo is Lomé."),
    ),
    (
        "A control token that the model wrote as text is no part of the text wanted.",
        (f"{ANSWER}<|im_end|>", True, ANSWER),
    ),
    ("Spaces count, those between words, too.", (ANSWER.replace(" ", "  "), True, ANSWER)),
    ("The same letters in another order are another text.", (ANSWER[::-1], True, ANSWER)),
    (
        "The reference is a text, and no pattern: `re` reads + and . as its own signs.",
        ("The calling code of Malaysia is +60.", True, "The calling code of Malaysia is +60."),
    ),
]
OTHER_TEXT = "Compare with `reference`, not with a text of your own: each question has its own."
EXACT_MISTAKES = {
    "An answer that did not stop must not match. Did you forget `stopped`?": lambda t, s, r: t == r,
    "The reference is a text, and no pattern: `re` reads + and . as its own signs.": (
        lambda t, s, r: s and re.fullmatch(r, t) is not None
    ),
    "Spaces count: do not `strip()`.": lambda t, s, r: s and t.strip() == r.strip(),
    OTHER_TEXT: lambda t, s, r: s and t == ANSWER,
    f"{OTHER_TEXT} ": lambda t, s, r: s and t == r == ANSWER,
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


@exercise(1, 4, "which measurement shows where the facts came from")
def check_knowledge(claim: Any) -> Verdict:
    wanted = (
        f"a set ({', '.join(SETS)}) and a measure ({', '.join(MEASURES)}), such as "
        "'heldout / stops'"
    )
    names, others = _names(claim, wanted)
    if len(names) != 2 or names[0] not in SETS or names[1] not in MEASURES or others:
        return wrong(f"Expected {wanted}; found {shown(claim)}.")
    name, measure = names
    if name == "unknown" and measure != "stops":
        return right(
            "The base model never read these facts, and no example tells them. After SFT it does "
            "not know them, although it nearly always answers in the right form."
        )
    if name == "unknown":
        return wrong(
            f"'{measure}' on the unknown set rises: the model answers and stops. "
            "That is format. Which measure asks whether the answer is true?"
        )
    if measure == "content":
        return wrong(
            f"'content' on '{name}' before SFT shows that some facts were known. Its rise could "
            "still be new knowledge. Which set asks about facts that the model never read?"
        )
    return wrong(
        f"The set '{name}' asks about facts that the model had read in pretraining, so a high "
        "score there may be old knowledge, newly accessible. Which set asks about facts it "
        "never read?"
    )


FILLERS = ("the", "set", "measure", "and", "on", "of", "full", "lora")


def _names(claim: Any, wanted: str) -> tuple[list[str], list]:
    """The sets and then the measures that an answer names, however it is written, and the rest."""
    if isinstance(claim, Mapping):
        claim = list(claim.values() if set(claim) == {"set", "measure"} else sum(claim.items(), ()))
    parts = [claim] if isinstance(claim, str) else sequence(claim, what=wanted)
    words: list = []
    for part in parts:
        if not isinstance(part, str):
            words.append(part)
            continue
        joined = re.sub(r"\b(exact|heldout)[\s_-]*(match|wordings)\b", r"\1_\2", part.lower())
        words += re.findall(r"\w+", joined)
    known = [*SETS, *MEASURES]
    names = sorted((word for word in words if word in known), key=known.index)
    return names, [word for word in words if word not in known and word not in FILLERS]


# --- Twenty rows that teach the model to answer --------------------------------------------------

BASELINE = 0.85  # on `dev`, where 20 rows about capitals alone score 67 to 69 % (three draws)
MOST_ROWS = 20
KINDS = {  # what the test asks for, and the words that a question for it has
    "capitals": "capital",
    "continents": "continent",
    "currencies": "currency|money",
    "languages": "language",
    "calling codes": "calling code",
    "symbols": "symbol",
    "atomic numbers": "atomic number",
    "opposites": "opposite",
    "plurals": "plural",
}


@exercise(1, 5, "at most 20 rows that teach the model to answer")
def check_rows(rows: Any) -> Verdict:
    given = read_rows(rows, MOST_ROWS)
    if cause := _repeated(given):
        return wrong(cause)
    verdict = _score_of(given)
    if verdict or not isinstance(verdict, Score):
        return verdict
    messages = [message for row in given for message in row["messages"]]
    asked = " ".join(m["content"] for m in messages if m["role"] == "user").lower()
    missing = [kind for kind, words in KINDS.items() if not re.search(words, asked)]
    hint = f"No row of yours asks for {', '.join(missing)}." if missing else READ_YOUR_ANSWERS
    return wrong(f"{verdict.message} {hint}")


def _repeated(rows: list[dict]) -> str:
    """Which row is a copy of another, but for spaces, capitals and punctuation; empty if none is.

    Training on twenty copies of a row is training on that row alone.
    """
    first: dict[tuple, int] = {}
    for number, row in enumerate(rows, 1):
        said = tuple((m["role"], normalise(str(m.get("content", "")))) for m in row["messages"])
        if (earlier := first.setdefault(said, number)) != number:
            return (
                f"Row {number} is a copy of row {earlier}: a copy is no new example. Ask for "
                "something else, or in other words, or leave it out."
            )
    return ""


def _score_of(rows: list[dict]) -> Verdict:
    """What `beats` says; of the same rows with the same seed it is remembered."""
    key = json.dumps(rows, default=repr), training_seed()
    if key in _scores:
        return _scores[key]
    verdict = beats(rows, BASELINE, read_facts("dev"), most_rows=MOST_ROWS)
    if isinstance(verdict, Score):  # nothing else takes long
        while len(_scores) >= REMEMBERED:
            _scores.pop(next(iter(_scores)))
        _scores[key] = verdict
    return verdict


REMEMBERED = 16  # trainings
_scores: dict[tuple[str, int], Score] = {}
READ_YOUR_ANSWERS = (
    "Compare your answers with those of the ten examples in section 2: the test asks for the same "
    "sentences."
)
