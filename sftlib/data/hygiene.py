"""Find duplicates, and training rows that give a test away.

Both ignore case, punctuation and spacing. rapidfuzz finds texts that are nearly the same.
"""

from __future__ import annotations

import difflib
import functools
import itertools
import re
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sftlib.data.same_facts import (
    LONG_WORD,
    Facts,
    fixed,
    same_facts,
    same_numbers,
    symbols,
    text_of,
    tokens,
)
from sftlib.data.validation import normalise

if TYPE_CHECKING:
    import numpy as np

# --- Duplicates ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Duplicate:
    """A row that was left out.

    Attributes:
        row: the row.
        of: the earlier row that was kept instead.
        score: how alike they are, from 0 to 1 (the same).
    """

    row: dict
    of: dict
    score: float


ROWS_AT_ONCE = 128  # bounds the memory: 10,000 rows, all alike, take some 300 MB
MANY = 0.3  # the share of rows from which on their removal is worth a warning
EXACT_UP_TO = 20_000  # rows; above, `deduplicate` searches approximately
PLACES = 128  # of a text's vector in the approximate search


def deduplicate(
    rows: Sequence[dict],
    threshold: float | None = None,
    *,
    letters_only: bool = False,
    exact: bool | None = None,
) -> tuple[list[dict], list[Duplicate]]:
    """The rows without repetitions, and those left out, each with the kept row that it repeats.

    It compares the text of the user's and the assistant's messages, and ignores system messages,
    case, punctuation (but not the signs of arithmetic) and spacing. Rows are taken in order; a row
    that repeats a kept one is left out. So another order keeps another row of each pair, and
    where a is like b, b like c, but a not like c, perhaps another number of rows. Doing it again
    leaves nothing more out.

    Args:
        rows: rows with `messages`.
        threshold: how alike two rows must be (0 to 1) for the later one to be left out. The measure
            is rapidfuzz's `fuzz.ratio` / 100: twice the length of the longest common subsequence,
            divided by the length of both. None: only the same text is a repetition.
        letters_only: judge by this measure alone. By default a row is left out only if it also
            says the same: a number, name, negation, unit or opposite that differs counts, and any
            other word of a question (`sftlib.data.same_facts.same_facts` says what it sees and
            what it does not).
        exact: whether to compare all pairs of rows. By default up to 20,000 rows are compared in
            this way. More rows are searched approximately, and a warning says so.

    The exact search takes up to 16 times as long for four times the rows. On one core, 20,000 rows
    of Alpaca (Taori et al. 2023; 350 characters a row) take 10 s, with `letters_only` 10 s at 0.9
    and minutes at 0.8. The approximate one computes the measure where two texts have many trigrams
    in common, so it leaves out no row that is less alike. It takes 5 to 9 times as long for four
    times the rows: all 52,002 rows of Alpaca take 14 s at 0.8, with `letters_only` 11 s, and 9 s at
    0.9 (CPU time). There it found 428 of 433 known pairs at 0.8, and 25 of 25 at 0.9. With 7,000
    near copies planted among 45,000 of these rows it found 99.4 % of the known pairs at 0.8 and
    99.3 % at 0.9. Known: all pairs of every 20th row, and all whose trigrams are somewhat alike.
    It misses some texts with many typing errors. To measure it again:
    `python -m tools.bench deduplicate`, on your own file with `--rows alpaca_data.json`.

    Warns:
        UserWarning: more than 30 % of the rows are left out, or the search was approximate because
            there are more than 20,000 rows.

    Raises:
        ValueError: the threshold is not above 0 and at most 1.
    """
    if threshold is not None and not 0 < threshold <= 1:
        raise ValueError(f"Expected a threshold above 0 and up to 1, found {threshold!r}.")
    # Rows are named by their numbers. Of rows with the same text, only the first is compared.
    firsts = _first_with_the_same_text(rows)
    similar = {}
    if threshold is not None:
        numbers = sorted(set(firsts))
        if exact is None and not (exact := len(numbers) <= EXACT_UP_TO):
            _warn_of_approximation(len(numbers))
        similar = _nearly_the_same(rows, numbers, threshold, letters_only, exact)
    kept, duplicates = [], []
    for number, (row, first) in enumerate(zip(rows, firsts, strict=True)):
        of, score = similar.get(first, (first, 1.0))
        if of == number:
            kept.append(row)
        else:
            duplicates.append(Duplicate(row, rows[of], score))
    _warn_if_many(len(duplicates), len(rows), "repeat others", "Duplicate")
    return kept, duplicates


def _first_with_the_same_text(rows: Sequence[dict]) -> list[int]:
    """Row → the first row with the same text and the same signs of arithmetic."""
    texts = [_all_text(row) for row in rows]
    times = Counter(texts)
    first_with: dict[tuple, int] = {}
    found = []
    for number, (row, text) in enumerate(zip(rows, texts, strict=True)):
        signs = ()
        if times[text] > 1:  # looking for signs is slow, and most texts are there once
            signs = symbols(t for role in ("user", "assistant") for t in tokens(text_of(row, role)))
        found.append(first_with.setdefault((text, signs), number))
    return found


def _nearly_the_same(
    rows: Sequence[dict], numbers: list[int], threshold: float, letters_only: bool, exact: bool
) -> dict[int, tuple[int, float]]:
    """Left-out row → (the first kept row that is similar enough, their similarity)."""
    import numpy as np

    rows = [rows[number] for number in numbers]
    texts = [_all_text(row) for row in rows]
    search = _by_letters if exact else _by_trigrams
    same_question = None if letters_only else _by_question(rows)
    facts = functools.lru_cache(ROWS_AT_ONCE**2)(lambda n: Facts(rows[n]))
    kept = np.ones(len(rows), bool)
    left_out: dict[int, tuple[int, float]] = {}
    pairs = _similar_pairs(texts, threshold, search(texts, threshold), same_question, kept)
    for later, earlier, score in pairs:
        if not (kept[later] and kept[earlier]):
            continue
        if letters_only or same_facts(facts(later), facts(earlier)):
            kept[later] = False
            left_out[numbers[later]] = numbers[earlier], score
    return left_out


def _similar_pairs(
    texts: list[str],
    threshold: float,
    candidates: Callable[[int, int], np.ndarray],
    same_question: Callable[[np.ndarray, np.ndarray], np.ndarray] | None,
    kept: np.ndarray,
    start: int = 0,
) -> Iterator[tuple[int, int, float]]:
    """(later, earlier, similarity) of the candidates that are alike, in order.

    The caller may take rows out of `kept` (n,) on the way: they are not compared with later ones.
    """
    import numpy as np
    from rapidfuzz import fuzz
    from rapidfuzz.process import cpdist

    for begin in range(start, len(texts), ROWS_AT_ONCE):
        end = min(begin + ROWS_AT_ONCE, len(texts))
        # Nearly all are False, so finding the others before anything else is quickest.
        later, earlier = np.divmod(np.flatnonzero(candidates(begin, end)), end)
        pairs = np.stack([later + begin, earlier])
        pairs = pairs[:, (pairs[1] < pairs[0]) & kept[earlier]]
        if same_question:
            pairs = pairs[:, same_question(*pairs)]
        scores = cpdist(
            *([texts[n] for n in side] for side in pairs),
            scorer=fuzz.ratio,
            score_cutoff=100 * threshold - 1e-6,  # a ratio of exactly the threshold may be rounded
            dtype=np.float64,
            workers=-1,
        )
        alike = scores > 0  # cpdist gives 0 below the cutoff
        yield from zip(*pairs[:, alike].tolist(), (scores[alike] / 100).tolist(), strict=True)


# What may be alike. Each gives, of the texts `start` to `stop` and all before, (later, earlier).


def _by_letters(texts: list[str], threshold: float) -> Callable[[int, int], np.ndarray]:
    """All that can be alike, by their counts of letters: 20 times less work at 0.9.

    A ratio of `threshold` allows (1 − threshold) · (both lengths) insertions and deletions. A
    letter that one text has n times more often needs at least n of them.
    """
    import numpy as np

    counts, lengths = _letters(texts), np.array([len(text) for text in texts])

    def candidates(start: int, stop: int) -> np.ndarray:
        near = counts[:, :stop]
        edits = [np.abs(near - near[:, i, None]).sum(0, dtype=np.int32) for i in range(start, stop)]
        allowed = (1 - threshold) * (lengths[:stop] + lengths[start:stop, None])
        return np.stack(edits) <= allowed + 1e-6

    return candidates


def _by_trigrams(texts: list[str], threshold: float) -> Callable[[int, int], np.ndarray]:
    """Nearly all that are alike, by the cosine of their sets of three characters in a row.

    A hash gives each trigram a place among 128 and a sign (feature hashing, Weinberger et al. 2009,
    arXiv 0902.2206), so all cosines are one small matrix product. Sets, because the trigrams that
    are frequent in English would make all long texts alike.
    """
    import numpy as np

    vectors = np.zeros((len(texts), PLACES), np.float32)
    for start in range(0, len(texts), 1000):
        padded = [text + "\0\0" for text in texts[start : start + 1000]]
        codes = np.frombuffer("".join(padded).encode("utf-32-le", "surrogatepass"), np.uint32)
        hashed = codes[:-2] * np.uint32(0x9E3779B1) + codes[1:-1]
        hashed = hashed * np.uint32(0x85EBCA77) + codes[2:]
        hashed = (hashed ^ hashed >> 15) * np.uint32(0xC2B2AE3D) >> 18  # 14 bits
        row = np.repeat(np.arange(len(padded)), [len(text) for text in padded])[:-2]
        sets = np.zeros((len(padded), 2**14), bool)
        inside = codes[:-2] > 0  # what starts in the padding is no trigram
        sets[row[inside], hashed[inside]] = True
        row, hashed = np.divmod(np.flatnonzero(sets), 2**14)
        signs = np.where(hashed & PLACES, 1.0, -1.0)
        sums = np.bincount(row * PLACES + hashed % PLACES, signs, len(padded) * PLACES)
        vectors[start : start + len(padded)] = sums.reshape(-1, PLACES)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-9)
    # An edit changes more of the trigrams of a short text, and short texts are compared quickly.
    cosine = threshold - 0.2 - 10 / np.array([[len(text) + 1] for text in texts], np.float32)
    return lambda start, stop: vectors[start:stop] @ vectors[:stop].T >= cosine[start:stop]


def _by_question(rows: Sequence[dict]) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Whether pairs (later, earlier) can ask the same, by the words and letters of their questions.

    `same_facts` allows letters in another order, and one letter more or less in each long word.
    """
    import numpy as np

    asked = [Facts(row).asked for row in rows]
    counts = _letters(["".join(t.text for t in words if not t.always_counts) for words in asked]).T
    long = np.array([sum(len(t.text) >= LONG_WORD for t in words) for words in asked])
    numbers: dict[tuple, int] = {}
    fixed_words = np.array([numbers.setdefault(fixed(words), len(numbers)) for words in asked])

    def same(later: np.ndarray, earlier: np.ndarray) -> np.ndarray:
        found = fixed_words[later] == fixed_words[earlier]
        later, earlier = later[found], earlier[found]
        edits = np.abs(counts[later] - counts[earlier]).sum(1, dtype=np.int32)
        found[found] = edits <= np.minimum(long[later], long[earlier])
        return found

    return same


def _letters(texts: list[str]) -> np.ndarray:
    """How often each text has each of 32 groups of characters, as an array (32, texts).

    The letters a to z are in different groups. A count that exceeds 16 bits wraps around: a
    difference may then come out smaller, never larger.
    """
    import numpy as np

    counts = np.zeros((32, len(texts)), np.int16)
    for i, text in enumerate(texts):
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        counts[:, i] = np.bincount(codes % 32, minlength=32)
    return counts


def _all_text(row: dict) -> str:
    return "\n".join(normalise(m["content"]) for m in row["messages"] if m["role"] != "system")


def _texts(row: dict, role: str) -> list[str]:
    return [normalise(m["content"]) for m in row["messages"] if m["role"] == role]


def _warn_of_approximation(rows: int) -> None:
    warnings.warn(
        f"{rows:,} rows are more than {EXACT_UP_TO:,}: the search was approximate and finds about "
        "99 % of the pairs. exact=True compares all pairs, which takes much longer.",
        stacklevel=3,
    )


def _warn_if_many(removed: int, rows: int, what: str, report: str) -> None:
    if removed > MANY * rows:
        warnings.warn(
            f"{removed} of {rows} rows {what} ({removed / rows:.0%}): look at the {report}s before "
            "you go on without these rows.",
            stacklevel=3,
        )


# --- Conflicts -----------------------------------------------------------------------------------


def conflicts(rows: Sequence[dict]) -> list[list[dict]]:
    """Groups of rows that have the same conversation before the last answer, and other answers.

    It ignores case, punctuation and spacing. Of rows with the same answer, a group has the first.
    Nothing is wrong with several answers to "Tell me a joke". For facts, one of them is false.
    """
    groups: dict[tuple, dict[tuple, dict]] = {}
    for row in rows:
        *before, (_, answer) = ((m["role"], _exact(m["content"])) for m in row["messages"])
        groups.setdefault(tuple(before), {}).setdefault(answer, row)
    return [list(answers.values()) for answers in groups.values() if len(answers) > 1]


# --- Leaks ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Leak:
    """A training row that gives away a held-out row.

    Attributes:
        row: the training row.
        held_out: the first held-out row that it gives away.
        reason: "same question", "question inside", "nearly the same question" or "same answer".
        score: how alike the questions of both are, from 0 to 1 (`fuzz.ratio` / 100).
    """

    row: dict
    held_out: dict
    reason: str
    score: float


# Signs of arithmetic are words, too: -5 and 5, "C" and "C#" are two things.
_WORD = re.compile(
    r"[^\W_]+(?:[-'’.][^\W_]+)*(?:\+\+|\#)?|(?<!\w)[-−](?=\d)|[*/×÷^%](?=\s*\d)|[+<>=≤≥≠±√$€£¥°]"
)
LONG_RUN = 13  # words; Brown et al. 2020, "Language Models are Few-Shot Learners", appendix C
SHORT_RUN = 4  # words; shorter questions and answers ("Yes.") are the same by chance
MANY_QUESTIONS = 10  # what more questions share gives none of them away; the same appendix
NEARLY_THE_SAME = 95  # `fuzz.ratio`, which goes up to 100
# Two answers are not the same because they share one of these.
COMMON = frozenset(
    "a an and are as at be by for from he i in is it its of on she the to was".split()
)


def decontaminate(rows: Sequence[dict], held_out: Sequence[dict]) -> tuple[list[dict], list[Leak]]:
    """The training rows that give no held-out row away, and the others with the reason.

    It looks for these reasons in this order, and ignores system messages, case, punctuation and
    spacing:

    - *same question*: one of the row's questions, or all of them joined, is the held-out question
      (all user messages of the held-out row).
    - *question inside*: the row's questions contain any 13 consecutive words of the held-out
      question, or all of it when it has 4 to 12 words. Thirteen is GPT-3's number (Brown et al.
      2020, arXiv 2005.14165, appendix C).
    - *nearly the same question*: `fuzz.ratio` of at least 95, as after a typing error. Questions
      from one template are just as similar ("the capital of Niger", "of Nigeria"). So it does not
      count if the row asks about something else: the numbers, negations or units of the questions
      differ, its answer repeats a word of its question that the held-out question lacks, or the
      two answers share none of the words that they add. Nor does it count where a question of up to
      12 words has another word ("ruthenium", "rhenium"), and not the same one with a slip: letters
      in another order, or one letter more, less or changed.
    - *same answer*: the last answer of the held-out row is one of the row's answers and has at
      least 4 words. This finds reworded questions. On data other than facts it also finds set
      phrases: look at the leaks.

    What many questions share gives none of them away, such as Alpaca's "Below is an instruction
    that describes a task". So 13 consecutive words that more than ten different questions contain
    (of both sets; a row repeated twentyfold is one) are left out of the held-out question, and the
    rest of it is looked for, if it has at least 4 words. If nothing is left, all of the question
    must be inside. An answer to more than ten different questions counts only if it has a name or
    a number that both questions have, too.

    It cannot find a reworded question with a reworded answer, a typing error in a name that the
    answer repeats, or, of a question that shares a long text with more than ten others, a part that
    is in this text.

    Warns:
        UserWarning: more than 30 % of the rows are leaks.
    """
    from rapidfuzz import fuzz

    index = _HeldOut(held_out, rows)
    clean, leaks = [], []
    near = index.nearly([question for row in rows for question in _texts(row, "user")])
    for row in rows:
        reason, number = index.leak(row, near)
        if number is None:
            clean.append(row)
        else:
            asked = " ".join(_texts(row, "user"))
            score = fuzz.ratio(asked, index.questions[number]) / 100
            leaks.append(Leak(row, held_out[number], reason, score))
    _warn_if_many(len(leaks), len(rows), "give held-out rows away", "Leak")
    return clean, leaks


class _HeldOut:
    """Held-out rows, indexed by their questions, runs of words and answers.

    Each index gives the number of a row, so looking up a training row takes the same time for any
    number of held-out rows. Only nearly equal questions have to be compared one by one.
    """

    def __init__(self, held_out: Sequence[dict], rows: Sequence[dict]) -> None:
        self.rows = held_out
        self.answers = [(_texts(row, "assistant") or [""])[-1] for row in held_out]
        self.questions = [" ".join(_texts(row, "user")) for row in held_out]
        self.by_question = _number_by([_exact(text_of(row, "user")) for row in held_out])
        self.by_answer = _number_by(self.answers)
        self.shared = _Shared([_words(text_of(row, "user")) for row in held_out], rows)
        self.own = [self.shared.own_text(question) for question in self.questions]
        self.common_answers = _common_answers(self.answers, [*rows, *held_out])
        self.by_run: dict[tuple[str, ...], int] = {}  # a run: consecutive words
        for number, row in enumerate(held_out):
            for run in self.shared.runs_of(_words(text_of(row, "user"))):
                self.by_run.setdefault(run, number)
        self.lengths = sorted({len(run) for run in self.by_run})

    def nearly(self, questions: Iterable[str]) -> dict[str, list[int]]:
        """Question → the held-out rows whose question is nearly the same."""
        import numpy as np
        from rapidfuzz import fuzz
        from rapidfuzz.process import cdist

        texts, near = list(dict.fromkeys(questions)), {}
        for start in range(0, len(texts) if self.own else 0, ROWS_AT_ONCE):
            chunk = texts[start : start + ROWS_AT_ONCE]
            own = [self.shared.own_text(text) for text in chunk]
            scores = cdist(own, self.own, scorer=fuzz.ratio, score_cutoff=NEARLY_THE_SAME)
            near |= {t: np.flatnonzero(s).tolist() for t, s in zip(chunk, scores, strict=True)}
        return near

    def leak(self, row: dict, near: dict[str, list[int]]) -> tuple[str, int | None]:
        """The reason and the number of the held-out row; no number when there is no leak."""
        questions = [m["content"] for m in row["messages"] if m["role"] == "user"]
        answers = _texts(row, "assistant")
        words = _words(text_of(row, "user"))
        runs = (run for length in self.lengths for run in _runs(words, length))
        alike = (
            number
            for question in questions
            for number in near.get(normalise(question), ())
            if self._same_thing(number, question, " ".join(answers))
        )
        # Each search is lazy: it stops at its first hit, and the later ones then do not start.
        searches = {
            "same question": map(
                self.by_question.get, map(_exact, [*questions, text_of(row, "user")])
            ),
            "question inside": map(self.by_run.get, runs),
            "nearly the same question": alike,
            "same answer": (self._same_answer(answer, words) for answer in answers),
        }
        for reason, numbers in searches.items():
            if (number := next((n for n in numbers if n is not None), None)) is not None:
                return reason, number
        return "", None

    def _same_answer(self, answer: str, asked: list[str]) -> int | None:
        """The held-out row with this answer, if it tells more than a set phrase."""
        number = self.by_answer.get(answer)
        if number is None or answer.count(" ") < SHORT_RUN - 1:
            return None
        if answer in self.common_answers:
            row = self.rows[number]
            told = tokens(text_of(row, "assistant"))
            names = {t.text for t in told if t.is_number or (t.capital and not t.starts)}
            if not (names - COMMON) & set(asked) & set(_words(text_of(row, "user"))):
                return None
        return number

    def _same_thing(self, number: int, question: str, answer: str) -> bool:
        """Whether a nearly equal question asks for the same thing, judging from the answers."""
        if not same_numbers(question, text_of(self.rows[number], "user")):
            return False
        texts = self.shared.own_text(normalise(question)), self.own[number]
        if _another_word(*(text.split() for text in texts)):
            return False
        asked, held_out_asked, told, held_out_told = (
            set(re.findall(r"\w+", text)) for text in (*texts, answer, self.answers[number])
        )
        if (asked - held_out_asked) & told:  # the answer names what only this question asks about
            return False
        new, held_out_new = told - asked, held_out_told - held_out_asked
        # An answer of common words alone is its common words: "He" is helium.
        new, held_out_new = new - COMMON or new, held_out_new - COMMON or held_out_new
        return not new or not held_out_new or bool(new & held_out_new)


def _another_word(asked: Sequence[str], held_out: Sequence[str]) -> bool:
    """Whether two short questions differ in a word, and not by a slip in it."""
    from rapidfuzz.distance import OSA

    if max(len(asked), len(held_out)) >= LONG_RUN:
        return False  # in a long question a reworded phrase changes little
    blocks = difflib.SequenceMatcher(None, asked, held_out, autojunk=False).get_opcodes()
    changed = (
        ("".join(asked[a:b]), "".join(held_out[c:d]))
        for kind, a, b, c, d in blocks
        if kind == "replace"
    )
    return any(sorted(x) != sorted(y) and OSA.distance(x, y) > 1 for x, y in changed)


class _Shared:
    """Runs of words of the held-out questions that many different questions share."""

    def __init__(self, held_out: list[list[str]], rows: Sequence[dict]) -> None:
        asked = {tuple(_words(text_of(row, "user"))) for row in rows} | set(map(tuple, held_out))
        self.counts = _count_runs(
            {run for words in held_out for run in _runs(words, LONG_RUN)}, asked
        )
        parts = {
            part
            for words in held_out
            for part in self.own_parts(words)
            if SHORT_RUN <= len(part) < min(LONG_RUN, len(words))
        }
        self.counts |= _count_runs(parts, asked)

    def runs_of(self, words: list[str]) -> Iterator[tuple[str, ...]]:
        """The runs that give this question away: few other questions have them."""
        found = [
            run
            for part in self.own_parts(words)
            if len(part) >= SHORT_RUN
            for run in _runs(part, min(len(part), LONG_RUN))
            if self.counts.get(run, 0) <= MANY_QUESTIONS
        ]
        if not found and len(words) >= SHORT_RUN:
            found = [tuple(words)]
        yield from found

    def own_parts(self, words: Sequence[str]) -> list[tuple[str, ...]]:
        """A question without the runs that many share, as the stretches between them."""
        counts = [self.counts.get(run, 0) for run in _runs(words, LONG_RUN)]
        own = [True] * len(words)
        for i, count in enumerate(counts):
            # After a shared text, the next words are often alike, too ("What is the"). They belong
            # to the question: fewer questions have the runs with them than the runs before.
            near = counts[max(0, i - LONG_RUN + 1) : i + LONG_RUN]
            if count > MANY_QUESTIONS and count >= 0.9 * max(near):
                own[i : i + LONG_RUN] = [False] * LONG_RUN
        pairs = itertools.groupby(zip(own, words, strict=True), key=lambda pair: pair[0])
        return [tuple(word for _, word in part) for is_own, part in pairs if is_own]

    def own_text(self, text: str) -> str:
        """A normalised question without the runs that many share; all of it if nothing is left."""
        words = _words(text)
        own = [word for part in self.own_parts(words) for word in part]
        return " ".join(own) if 0 < len(own) < len(words) else text


def _count_runs(
    runs: set[tuple[str, ...]], questions: Iterable[tuple[str, ...]]
) -> Counter[tuple[str, ...]]:
    """How many of the questions contain each run."""
    counts: Counter[tuple[str, ...]] = Counter()
    lengths = {len(run) for run in runs}
    for words in questions:
        counts.update({r for length in lengths for r in _runs(words, length) if r in runs})
    return counts


def _common_answers(answers: Iterable[str], rows: Sequence[dict]) -> set[str]:
    """The answers that more than ten different questions have."""
    questions: dict[str, set[str]] = {answer: set() for answer in answers}
    for row in rows:
        for answer in _texts(row, "assistant"):
            if answer in questions:
                questions[answer].add(" ".join(_texts(row, "user")))
    return {answer for answer, asked in questions.items() if len(asked) > MANY_QUESTIONS}


def _exact(text: str) -> tuple[str, tuple[str, ...]]:
    """What two texts have in common that are the same but for case, punctuation and spacing."""
    return normalise(text), symbols(tokens(text))


def _number_by(keys: Sequence[Hashable]) -> dict[Hashable, int]:
    """Key → the number of the first row that has it; empty texts are left out."""
    numbered = reversed(list(enumerate(keys)))
    return {key: number for number, key in numbered if key not in ("", _exact(""))}


def _words(text: str) -> list[str]:
    """The words of a question. "Guinea-Bissau" is one word: it does not hold "Guinea"."""
    return _WORD.findall(text.casefold())


def _runs(words: Sequence[str], length: int) -> Iterator[tuple[str, ...]]:
    return (tuple(words[i : i + length]) for i in range(len(words) - length + 1))
