"""Cleaning removes repetitions and leaks, and no row that says something else."""

import functools
import random
import time
import warnings

from sftlib.data import conflicts, decontaminate, deduplicate, hygiene, read_facts
from sftlib.data.hygiene import _all_text, _by_letters, _by_trigrams, _similar_pairs
from sftlib.data.same_facts import Facts, same_facts

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rapidfuzz import fuzz
from rapidfuzz.process import cdist

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*look at the", "ignore:.*the search was approximate"
)


def chat(*texts: str, system: str = "") -> dict:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    return {"messages": [{"role": "system", "content": system}] * bool(system) + messages}


def questions(rows: list[dict]) -> list[str]:
    return [row["messages"][0]["content"] for row in rows]


# --- Rows that look alike and say something else -------------------------------------------------

LONG = (
    "The work is long, and it goes on in this way for each of the many parts that one can see in "
    "it, so the people who do it have to be careful and patient, or else it fails and they must "
    "begin anew, which nobody likes. "
)
OTHER_QUESTIONS = {
    "digits": ("What is the square root of 144?", "What is the square root of 121?"),
    "decimals": ("Is 3.14 a good value for it?", "Is 31.4 a good value for it?"),
    "swapped digits": ("Who was king in the year 1548?", "Who was king in the year 1584?"),
    "number words": ("Name the first three planets.", "Name the first four planets."),
    "ordinals": ("Who was the second president?", "Who was the third president?"),
    "sign": ("What is the cube of -5, please?", "What is the cube of 5, please?"),
    "operator": ("What is 6 * 3, in one word?", "What is 6 / 3, in one word?"),
    "minus and plus": ("What is 6 - 3, in one word?", "What is 6 + 3, in one word?"),
    "power": ("Is 5² an odd number?", "Is 52 an odd number?"),
    "comparison": ("Is it true that 3 < 4?", "Is it true that 3 > 4?"),
    "percent": ("What is 20% of the sum?", "What is 20 of the sum?"),
    "currency": ("Do I get it for $20 there?", "Do I get it for €20 there?"),
    "language": ("Is C a good language to learn?", "Is C# a good language to learn?"),
    "name": ("What is the capital of Mali?", "What is the capital of Chad?"),
    "longer name": ("What is the capital of Niger?", "What is the capital of Nigeria?"),
    "similar name": ("Is Gambia in Africa, too?", "Is Zambia in Africa, too?"),
    "name with swapped letters": ("Is Brian at home today?", "Is Brain at home today?"),
    "name in lowercase": ("what is the capital of mali", "what is the capital of chad"),
    "thing": ("Give the atomic number of iron.", "Give the atomic number of carbon."),
    "negation": ("Is it safe to eat it raw?", "Is it not safe to eat it raw?"),
    "n't": ("Why do they do it at night?", "Why don't they do it at night?"),
    "without": ("A pizza with cheese on it.", "A pizza without cheese on it."),
    "unit": ("How long is it in miles?", "How long is it in meters?"),
    "short unit": ("What is its mass in kg?", "What is its mass in lb?"),
    "opposite": ("Name the largest lake on Earth.", "Name the smallest lake on Earth."),
    "prefix": ("Is that a legal thing to do?", "Is that an illegal thing to do?"),
    "one letter": ("Is that a moral question?", "Is that an amoral question?"),
    "similar word": ("Is there a county like that?", "Is there a country like that?"),
    "order": ("Is Paris larger than London?", "Is London larger than Paris?"),
    "direction": ("Convert it from euros to yen.", "Convert it from yen to euros."),
    "question word": ("Where did they build it?", "When did they build it?"),
    "Chinese": ("法国的首都是哪里", "德国的首都是哪里"),
    "Russian": ("Какая столица Франции?", "Какая столица Польши?"),
}


@pytest.mark.parametrize("pair", OTHER_QUESTIONS.values(), ids=OTHER_QUESTIONS.keys())
@pytest.mark.parametrize("answer", ["Yes.", "You ask a good question. " + LONG])
@pytest.mark.parametrize("threshold", [None, 0.5])
def test_a_question_about_something_else_stays_even_with_the_same_answer(pair, answer, threshold):
    rows = [chat(question, answer) for question in pair]
    assert deduplicate(rows, threshold) == (rows, [])
    assert deduplicate(rows[::-1], threshold) == (rows[::-1], [])


OTHER_ANSWERS = {
    "digits": ("It has 3 parts.", "It has 4 parts."),
    "number words": ("It has three parts.", "It has four parts."),
    "large numbers": ("It has a million parts.", "It has a billion parts."),
    "sign": ("It is at -3 there.", "It is at 3 there."),
    "name": ("In the end Anna won.", "In the end Berta won."),
    "name at the start": ("Paris has the most.", "Madrid has the most."),
    "negation": ("They do not like it.", "They do like it."),
    "n't": ("They can't do it.", "They can do it."),
    "curly n’t": ("They didn’t do it.", "They did do it."),
    "unit": ("It is a few meters long.", "It is a few miles long."),
    "opposite": ("The value is high.", "The value is low."),
    "color": ("The light is red.", "The light is green."),
    "he": ("Then he came.", "Then she came."),
    "prefix": ("That is legal.", "That is illegal."),
    "two prefixes": ("Then values increase.", "Then values decrease."),
    "suffix": ("They are careful.", "They are careless."),
    "Chinese": ("他住在 法国", "他住在 德国"),
}


@pytest.mark.parametrize("pair", OTHER_ANSWERS.values(), ids=OTHER_ANSWERS.keys())
@pytest.mark.parametrize("before", ["", LONG])
def test_an_answer_that_says_something_else_stays(pair, before):
    rows = [chat("How is it?", before + answer) for answer in pair]
    assert deduplicate(rows, 0.4) == (rows, [])
    assert len(deduplicate(rows, 0.4, letters_only=True)[1]) == 1


def test_every_word_of_a_short_answer_counts_but_not_of_a_long_one():
    rows = [
        chat("What is it made of?", f"It is made of {thing}.") for thing in ("iron", "ironwood")
    ]
    assert deduplicate(rows, 0.5) == (rows, [])
    long = [chat("What is it made of?", LONG + m["messages"][1]["content"]) for m in rows]
    assert len(deduplicate(long, 0.5)[1]) == 1


THE_SAME = {
    "swapped letters": ("What is photosynthesis?", "Waht is photosynthesis?"),
    "a letter less": ("What is photosynthesis?", "What is photosyntesis?"),
    "a letter more": ("What is the atmosphere?", "What is the atmossphere?"),
    "a space less": ("Explain how it works.", "Explain howit works."),
    "please": ("What is the capital of Mali?", "Please, what is the capital of Mali?"),
    "thanks": ("Tell me about the sea.", "Could you tell us about the sea? Thanks!"),
    "three": ("Name 3 colors of it.", "Name three colors of it."),
    "thousands": ("Is 1,000 too many for it?", "Is 1000 too many for it?"),
}


@pytest.mark.parametrize("pair", THE_SAME.values(), ids=THE_SAME.keys())
def test_slips_of_the_pen_and_politeness_make_no_other_question(pair):
    rows = [chat(question, "Yes, they say so.") for question in pair]
    kept, duplicates = deduplicate(rows, 0.7)
    assert kept == rows[:1]
    assert [(d.row, d.of) for d in duplicates] == [(rows[1], rows[0])]
    assert 0.7 <= duplicates[0].score < 1


@pytest.mark.parametrize(
    "pair",
    [
        (LONG + "It is fine.", LONG + "It is great."),
        (LONG, "Here is an answer to it. " + LONG),
        (LONG, LONG.replace("have to be careful", "must be very careful")),
    ],
)
def test_a_reworded_phrase_in_a_long_answer_makes_no_other_row(pair):
    assert len(deduplicate([chat("How is it?", answer) for answer in pair], 0.8)[1]) == 1


def test_letters_only_removes_other_facts_too():
    rows = [chat(question, "Yes.") for question in OTHER_QUESTIONS["name"]]
    assert len(deduplicate(rows, 0.8, letters_only=True)[1]) == 1


# --- Texts that many rows share ------------------------------------------------------------------

PREAMBLES = [
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{}\n\n### Response:",
    "{} Answer in one short sentence, and do not add any other text to it, be it true or false.",
    "You are a helpful assistant who always tells the truth and never makes up anything. Now: {}",
]


def wrapped(rows: list[dict], preamble: str, before: str = "", answer: str = "") -> list[dict]:
    conversations = ([m["content"] for m in row["messages"]] for row in rows)
    return [chat(preamble.format(before + q), answer or a) for q, a in conversations]


def test_a_common_system_prompt_changes_nothing():
    rows = read_facts("sft")[:400]
    same = [chat(*(m["content"] for m in r["messages"]), system="Be kind. " * 200) for r in rows]
    for how in ({}, {"threshold": 0.95}, {"threshold": 0.95, "letters_only": True}):
        kept, _ = deduplicate(rows, **how)
        asked = [row["messages"][1]["content"] for row in deduplicate(same, **how)[0]]
        assert asked == questions(kept)
    assert len(deduplicate([rows[0], same[0]])[1]) == 1
    held_out = [chat("What is the time?", "It is five past two.", system="Be kind. " * 200)]
    assert decontaminate(same, held_out) == (same, [])


@pytest.mark.parametrize("preamble", PREAMBLES)
@pytest.mark.parametrize("n", [5, 200])
def test_a_preamble_in_every_question_gives_nothing_away(preamble, n):
    rows = wrapped(read_facts("sft")[:500], preamble)
    held_out = wrapped(read_facts("heldout")[:n], preamble)
    assert decontaminate(rows, held_out) == (rows, [])


@pytest.mark.parametrize("preamble", PREAMBLES)
@pytest.mark.parametrize("before, times", [("", 1), ("", 20), ("So tell me this: ", 20)])
def test_a_leak_behind_the_preamble_is_found_however_often_it_is_there(preamble, before, times):
    held_out = read_facts("heldout")
    rows = wrapped(read_facts("sft")[:500], preamble)
    planted = wrapped(held_out[:10], preamble, before, answer="x") * times
    clean, leaks = decontaminate(rows + planted, wrapped(held_out, preamble))
    assert clean == rows
    assert [leak.row for leak in leaks] == planted


@pytest.mark.parametrize(
    "before", ["", "Of all the things that people ask about the whole world: "]
)
def test_a_leak_in_many_contexts_is_found(before):
    held_out = wrapped(read_facts("heldout")[:3], before + "{}")
    contexts = [f"I ask for the {n}th time." for n in range(20)]
    planted = [chat(f"{c} {q}", "x") for c in contexts for q in questions(held_out)]
    assert len(decontaminate(planted, held_out)[1]) == 60


def test_of_questions_about_one_text_each_is_looked_at_by_itself():
    text = (
        "The river rises in the north of the country, flows for nine hundred kilometers to the "
        "sea, and makes a delta of marshes there, where many birds live."
    )
    asked = [f"{text} What does word number {n} of it mean?" for n in range(20)]
    rows = [chat(question, "x") for question in asked]
    held_out = [chat(f"{text} Where do the many birds of this country live?", "In the marshes.")]
    leak = chat(f"Tell me: {questions(held_out)[0]}", "x")
    clean, leaks = decontaminate([*rows, leak], held_out)
    assert clean == rows
    assert [found.row for found in leaks] == [leak]


def test_a_set_phrase_as_the_answer_gives_nothing_away():
    refusal = "I am sorry, but I cannot help you with that."
    rows = [chat(question, refusal) for question in questions(read_facts("sft"))[:200]]
    assert decontaminate(rows, [chat("How do I pick a lock?", refusal)]) == (rows, [])


def test_an_answer_with_the_name_that_both_ask_about_gives_it_away_in_many_wordings():
    answer = "The capital of Togo is Lomé."
    rows = [chat(f"Wording {n}: which city rules Togo?", answer) for n in range(30)]
    leaks = decontaminate(rows, [chat("What is the capital of Togo?", answer)])[1]
    assert {leak.reason for leak in leaks} == {"same answer"} and len(leaks) == 30


@pytest.mark.parametrize(
    "one, other, answers",
    [
        (
            "Please work out for us what the square root of the number 144 is.",
            "Please work out for us what the square root of the number 121 is.",
            ("It is 12.", "It is 11."),
        ),
        (
            "Please work out for us what the cube of the negative number -3 is.",
            "Please work out for us what the cube of the negative number 3 is.",
            ("27", "27"),
        ),
        ("Is C a good language to learn?", "Is C# a good language to learn?", ("Yes.", "Yes.")),
        ("What is 5² in plain words?", "What is 52 in plain words?", ("x", "x")),
    ],
)
def test_a_question_with_another_number_or_sign_is_no_leak(one, other, answers):
    rows, held_out = [chat(one, answers[0])], [chat(other, answers[1])]
    assert decontaminate(rows, held_out) == (rows, [])


# --- Reports -------------------------------------------------------------------------------------


def test_more_than_three_in_ten_removed_rows_are_warned_of():
    rows = [chat(f"{n}?", "A") for n in range(7)]
    copies = rows[:3]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        deduplicate(rows + copies)
        decontaminate(rows + copies[:2], rows[:1])
        deduplicate([])
    with pytest.warns(UserWarning, match=r"4 of 11 rows repeat others \(36%\): look at the Dupl"):
        deduplicate([*rows, *copies, rows[0]])
    with pytest.warns(UserWarning, match=r"3 of 7 rows give held-out rows away \(43%\)"):
        decontaminate(rows, rows[:3])


def test_a_leak_says_how_alike_the_questions_are():
    held_out = chat("What is the capital of Niger?", "The capital of Niger is Niamey.")
    asked = [questions([held_out])[0], "What is the captial of Niger?", "Niger: which city?"]
    answers = ["Niamey", "Niamey", "The capital of Niger is Niamey."]
    _, leaks = decontaminate(list(map(chat, asked, answers)), [held_out])
    scores = [leak.score for leak in leaks]
    assert scores[0] == 1 > scores[1] > 0.95 > 0.7 > scores[2] > 0


def test_the_same_question_with_other_answers_is_a_conflict():
    rows = [
        chat("What is 2 + 2?", "4"),
        chat("what is 2 + 2", "5"),
        chat("What is 2 + 2?", "4."),
        chat("What is 2 - 2?", "0"),
        chat("What is 2 + 2?", "four", system="Write words."),
        chat("Hi", "Hello", "What is 2 + 2?", "5"),
    ]
    assert conflicts(rows) == [rows[:2]]
    assert conflicts([]) == []


# --- For any rows --------------------------------------------------------------------------------

WORD = st.sampled_from(
    "what is the capital of Mali Niger Nigeria 3 4 three not please spoon sopon big small "
    "photosynthesis photosyntesis miles red green ? .".split()
)
TEXT = st.lists(WORD, min_size=1, max_size=7).map(" ".join)
ROWS = st.lists(st.builds(chat, TEXT, TEXT), max_size=8)
THRESHOLD = st.sampled_from([0.3, 0.6, 0.8, 0.9])


def numbered(rows: list[dict]) -> list[dict]:
    return [row | {"number": n} for n, row in enumerate(rows)]


@given(ROWS, THRESHOLD, st.booleans())
def test_each_row_is_kept_or_reported_and_a_second_pass_removes_nothing(rows, threshold, letters):
    rows = numbered(rows)
    kept, duplicates = deduplicate(rows, threshold, letters_only=letters)
    parts = [*kept, *(d.row for d in duplicates)]
    assert sorted(row["number"] for row in parts) == list(range(len(rows)))
    assert all(d.of in kept and d.of["number"] < d.row["number"] for d in duplicates)
    assert all(threshold - 1e-9 <= d.score <= 1 for d in duplicates)
    assert deduplicate(kept, threshold, letters_only=letters) == (kept, [])


@given(ROWS, st.randoms(use_true_random=False))
def test_the_order_of_rows_decides_which_copy_stays_and_not_how_many(rows, rng):
    shuffled = rng.sample(rows, len(rows))
    assert len(deduplicate(rows)[0]) == len(deduplicate(shuffled)[0])


@given(ROWS, ROWS)
def test_each_row_is_clean_or_a_leak_in_any_order_and_clean_ones_stay_clean(rows, held_out):
    rows = numbered(rows)
    clean, leaks = decontaminate(rows, held_out)
    parts = [*clean, *(leak.row for leak in leaks)]
    assert sorted(row["number"] for row in parts) == list(range(len(rows)))
    assert all(leak.held_out in held_out for leak in leaks)
    assert decontaminate(clean, held_out) == (clean, [])
    assert decontaminate(rows[::-1], held_out)[0] == clean[::-1]


@given(TEXT, TEXT, TEXT, TEXT)
def test_two_rows_say_the_same_in_both_directions(a, b, c, d):
    one, other = Facts(chat(a, b)), Facts(chat(c, d))
    assert same_facts(one, one)
    assert same_facts(one, other) == same_facts(other, one)


# --- Many rows -----------------------------------------------------------------------------------


def edited(row: dict, rng: random.Random) -> dict:
    """A near copy: a slip in the question, politeness, or a reworded answer."""
    question, answer = (m["content"] for m in row["messages"][-2:])
    kind = rng.randrange(3)
    if kind == 0:
        pairs = [i for i in range(len(question) - 1) if question[i : i + 2].islower()]
        pairs = [i for i in pairs if question[i : i + 2].isalpha()]
        i = rng.choice(pairs)
        question = question[:i] + question[i + 1] + question[i] + question[i + 2 :]
    elif kind == 1:
        question = "Please " + question[0].lower() + question[1:]
    else:
        answer = answer.replace(" the ", " this ", 1)
    return chat(question, answer)


def realistic(n: int) -> list[dict]:
    """The course's facts and prose, asked in new ways; one row in sixteen is a near copy."""
    rng = random.Random(0)
    prose = [row["text"] for row in read_facts("prose")]
    words = [word for text in prose for word in text.split()]
    sentences = [s for text in prose for s in text.split(". ") if len(s) > 20]
    facts, rows = read_facts("sft"), []
    for number in range(n):
        topic = " ".join(rng.choices(words, k=rng.randint(2, 8)))
        if number % 16 == 15:
            row = edited(rng.choice(rows), rng)
        elif number % 4 == 0:
            question, answer = (m["content"] for m in rng.choice(facts)["messages"][-2:])
            row = chat(f"{question} {topic}", answer)
        else:
            answer = ". ".join(rng.choices(sentences, k=rng.randint(1, 7)))
            row = chat(f"Please write about {topic}.", answer + ".")
        rows.append(row)
    return rows


def by_brute_force(rows: list[dict], threshold: float) -> list[dict]:
    """The rows that stay, by comparing each with all that were kept."""
    kept = []
    for row in rows:
        facts, text = Facts(row), _all_text(row)
        for _, other, other_text in kept:
            ratio = fuzz.ratio(text, other_text) / 100
            if ratio >= threshold - 1e-9 and same_facts(facts, other):
                break
        else:
            kept.append((row, facts, text))
    return [row for row, *_ in kept]


@given(ROWS, THRESHOLD)
def test_the_exact_search_finds_what_comparing_all_finds(rows, threshold):
    distinct, _ = deduplicate(rows)
    assert deduplicate(distinct, threshold)[0] == by_brute_force(distinct, threshold)


def test_two_long_words_of_a_question_may_each_have_a_slip():
    asked = (
        "Explain photosynthesis in the atmosphere.",
        "Explain photosyntesis in the atmossphere.",
    )
    rows = [chat(question, "Yes, they say so.") for question in asked]
    assert len(deduplicate(rows, 0.7)[1]) == 1


def with_near_copies(rows: list[dict], copies: int) -> list[dict]:
    """The rows and near copies of some: typing errors, other words, a sentence more or less."""
    rng, found = random.Random(0), list(rows)
    words = [w for row in rng.sample(rows, 200) for w in row["messages"][-1]["content"].split()]

    def slips(text: str) -> str:
        i = rng.randrange(len(text))
        return text[:i] + rng.choice(["", "e", text[i] * 2]) + text[i + 1 :]

    def other_words(text: str) -> str:
        return " ".join(rng.choice(words) if rng.random() < 0.08 else w for w in text.split())

    changes = [
        lambda text: functools.reduce(lambda t, _: slips(t), range(len(text) // 25 + 1), text),
        other_words,
        lambda text: f"Here it is. {text}",
        lambda text: f"{text} {' '.join(rng.choices(words, k=len(text) // 60))}",
        lambda text: text[: -len(text) // 12],
        lambda text: text.upper().replace(",", " ;"),
    ]
    for number in range(copies):
        question, answer = (m["content"] for m in rng.choice(rows)["messages"][-2:])
        found.append(chat(question, changes[number % len(changes)](answer)))
    rng.shuffle(found)
    return found


def alike(rows: list[dict], threshold: float, search) -> set[tuple[int, int]]:
    """All pairs (later, earlier) that a search finds."""
    texts = [_all_text(row) for row in rows]
    every = np.ones(len(rows), bool)
    candidates = search(texts, threshold)
    pairs = _similar_pairs(texts, threshold, candidates, None, every)
    return {(later, earlier) for later, earlier, _ in pairs}


@pytest.mark.integration
@pytest.mark.parametrize("threshold", [0.8, 0.9])
def test_the_approximate_search_finds_all_near_copies_and_nothing_else(threshold):
    rows = with_near_copies(realistic(420), 80)
    texts = [_all_text(row) for row in rows]
    scores = cdist(texts, texts, scorer=fuzz.ratio, dtype=np.float64) / 100
    every = {(i, j) for i, j in np.argwhere(scores >= threshold - 1e-9).tolist() if j < i}
    assert len(every) > 80
    assert alike(rows, threshold, _by_letters) == every
    found = alike(rows, threshold, _by_trigrams)
    assert found <= every
    assert {(i, j) for i, j in every if scores[i, j] >= 0.9} <= found
    for letters_only in (False, True):
        kept = {id(row) for row in deduplicate(rows, threshold, letters_only=letters_only)[0]}
        _, left_out = deduplicate(rows, threshold, letters_only=letters_only, exact=False)
        assert len(left_out) > 20
        assert all(id(duplicate.row) not in kept for duplicate in left_out)


def test_more_rows_are_searched_approximately_unless_told_otherwise(monkeypatch):
    rows = realistic(40)
    monkeypatch.setattr(hygiene, "EXACT_UP_TO", 30)
    with pytest.warns(UserWarning, match="40 rows are more than 30: the search was approximate"):
        deduplicate(rows, 0.8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        deduplicate(rows, 0.8, exact=True)
        deduplicate(rows, 0.8, exact=False)
        deduplicate(rows)
        deduplicate(rows[:30], 0.8)


@pytest.mark.integration
@pytest.mark.parametrize("threshold", [0.8, 0.9])
def test_of_five_thousand_rows_the_approximate_search_finds_95_percent_of_the_pairs(threshold):
    facts = [row for row in read_facts("sft") if len(row["messages"]) == 2][:600]
    rows = with_near_copies(realistic(3600) + facts, 800)
    every = alike(rows, threshold, _by_letters)
    found = alike(rows, threshold, _by_trigrams)
    assert len(every) > 500
    assert found <= every
    assert len(found) >= 0.95 * len(every)


@pytest.mark.integration
def test_of_realistic_rows_the_search_finds_what_comparing_all_finds():
    rows, _ = deduplicate(realistic(400))
    kept, duplicates = deduplicate(rows, 0.8)
    assert kept == by_brute_force(rows, 0.8)
    assert len(duplicates) > 12


@pytest.mark.integration
@pytest.mark.parametrize("letters_only, times", [(False, 9), (True, 12)])
def test_four_times_the_rows_take_at_most_so_many_times_as_long(letters_only, times):
    rows, seconds = realistic(16_000), []
    for n in (4000, 16_000):
        start = time.process_time()
        deduplicate(rows[:n], 0.8, letters_only=letters_only, exact=False)
        seconds.append(time.process_time() - start)
    assert seconds[1] < times * seconds[0]


@pytest.mark.nightly
@pytest.mark.parametrize("letters_only", [False, True])
def test_fifty_two_thousand_rows_take_less_than_a_minute(letters_only):
    rows = realistic(52_000)
    start = time.process_time()
    _, duplicates = deduplicate(rows, 0.8, letters_only=letters_only)
    assert time.process_time() - start < 60
    assert len(duplicates) > 2000
