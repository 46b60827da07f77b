"""Find duplicates, and training rows that give a test away.

Both ignore case, punctuation and spacing. rapidfuzz finds texts that are nearly the same.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sftlib.data.same_facts import Facts, same_facts
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


def deduplicate(
    rows: Sequence[dict], threshold: float | None = None, *, letters_only: bool = False
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
            what it does not). Questions may differ by one letter more or less in all.

    Both searches are exact: they find what comparing all pairs would find. By default only rows
    with nearly the same questions and the same numbers are compared: 52,000 different questions
    take TIME. With `letters_only`, or for rows that all ask the same, time grows with the square of
    the number of rows.

    Warns:
        UserWarning: more than 30 % of the rows are left out.

    Raises:
        ValueError: the threshold is not above 0 and at most 1.
    """
    if threshold is not None and not 0 < threshold <= 1:
        raise ValueError(f"Expected a threshold above 0 and up to 1, found {threshold!r}.")
    # Rows are named by their numbers. Of rows with the same text, only the first is compared.
    facts = [Facts(row) for row in rows]
    texts = [_all_text(row) for row in rows]
    first_with: dict[tuple, int] = {}
    firsts = [
        first_with.setdefault((t, f.symbols), n)
        for n, (t, f) in enumerate(zip(texts, facts, strict=True))
    ]
    similar = {}
    if threshold is not None:
        numbers = list(first_with.values())
        search = [facts[n] for n in numbers], [texts[n] for n in numbers], threshold, letters_only
        similar = {
            numbers[a]: (numbers[b], score) for a, (b, score) in _nearly_the_same(*search).items()
        }
    kept, duplicates = [], []
    for number, (row, first) in enumerate(zip(rows, firsts, strict=True)):
        of, score = similar.get(first, (first, 1.0))
        if of == number:
            kept.append(row)
        else:
            duplicates.append(Duplicate(row, rows[of], score))
    _warn_if_many(len(duplicates), len(rows), "repeat others", "Duplicate")
    return kept, duplicates


def _nearly_the_same(
    facts: list[Facts], texts: list[str], threshold: float, letters_only: bool
) -> dict[int, tuple[int, float]]:
    """Left-out row → (the first kept row that is similar enough, their similarity)."""
    candidates = _all_earlier if letters_only else _same_questions(facts)
    left_out: dict[int, tuple[int, float]] = {}
    for later, earlier, score in _similar_pairs(texts, threshold, candidates):
        if later in left_out or earlier in left_out:
            continue
        if letters_only or same_facts(facts[later], facts[earlier]):
            left_out[later] = earlier, score
    return left_out


def _all_earlier(number: int) -> np.ndarray:
    import numpy as np

    return np.arange(number)


def _same_questions(facts: list[Facts]) -> Callable[[int], np.ndarray]:
    """A function: row → the earlier rows with nearly the same questions and the same `fixed`.

    `same_facts` allows letters in another order, and here one letter more or less. So of two
    halves of the alphabet, one has the same count of letters in both rows: a lookup finds all.
    """
    import numpy as np

    asked = ["".join(t.text for t in f.asked if not t.always_counts) for f in facts]
    counts = _letters(asked).T.copy()
    keys = [
        [(half, row[half::2].tobytes(), f.fixed) for row, f in zip(counts, facts, strict=True)]
        for half in (0, 1)
    ]
    members: dict[tuple, list[int]] = {}
    for half in keys:
        for number, key in enumerate(half):
            members.setdefault(key, []).append(number)
    blocks = {key: np.array(numbers) for key, numbers in members.items()}

    def earlier(number: int) -> np.ndarray:
        one, other = (blocks[half[number]] for half in keys)
        one, other = (block[: block.searchsorted(number)] for block in (one, other))
        found = one if np.array_equal(one, other) else np.union1d(one, other)
        edits = np.abs(counts[found] - counts[number]).sum(1, dtype=np.int32)
        return found[edits <= 1]

    return earlier


def _similar_pairs(
    texts: list[str], threshold: float, candidates: Callable[[int], np.ndarray]
) -> Iterator[tuple[int, int, float]]:
    """(later, earlier, similarity) of all candidates that are alike, in order.

    Comparing all would be slow, so counts of letters rule out most of them first: 20 times less
    work for English texts at 0.9.
    """
    import numpy as np
    from rapidfuzz import fuzz
    from rapidfuzz.process import cpdist

    counts = _letters(texts)
    lengths = np.array([len(text) for text in texts])
    for start in range(0, len(texts), ROWS_AT_ONCE):
        chunk = range(start, min(start + ROWS_AT_ONCE, len(texts)))
        found = []
        for i in chunk:
            # A ratio of `threshold` allows (1 − threshold) · (both lengths) insertions and
            # deletions. A letter that one text has n times more often needs at least n of them.
            near = candidates(i)
            edits = np.abs(counts[:, near] - counts[:, i, None]).sum(0, dtype=np.int32)
            allowed = (1 - threshold) * (lengths[near] + lengths[i])
            found.append(near[edits <= allowed + 1e-6])
        earlier = np.concatenate(found)
        later = np.repeat(chunk, [len(numbers) for numbers in found])
        scores = cpdist(
            [texts[i] for i in later],
            [texts[i] for i in earlier],
            scorer=fuzz.ratio,
            score_cutoff=100 * threshold - 1e-6,  # a ratio of exactly the threshold may be rounded
            dtype=np.float64,
            workers=-1,
        )
        alike = scores > 0  # cpdist gives 0 below the cutoff
        pairs = later[alike].tolist(), earlier[alike].tolist(), (scores[alike] / 100).tolist()
        yield from zip(*pairs, strict=True)


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


def _warn_if_many(removed: int, rows: int, what: str, report: str) -> None:
    if removed > MANY * rows:
        warnings.warn(
            f"{removed} of {rows} rows {what} ({removed / rows:.0%}): look at the {report}s before "
            "you go on without these rows.",
            stacklevel=3,
        )


# --- Leaks ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Leak:
    """A training row that gives away a held-out row.

    Attributes:
        row: the training row.
        held_out: the first held-out row that it gives away.
        reason: "same question", "question inside", "nearly the same question" or "same answer".
    """

    row: dict
    held_out: dict
    reason: str


LONG_RUN = 13  # words; Brown et al. 2020, "Language Models are Few-Shot Learners", appendix C
SHORT_RUN = 4  # words; shorter questions and answers ("Yes.") are the same by chance
NEARLY_THE_SAME = 95  # `fuzz.ratio`, which goes up to 100


def decontaminate(rows: Sequence[dict], held_out: Sequence[dict]) -> tuple[list[dict], list[Leak]]:
    """The training rows that give no held-out row away, and the others with the reason.

    It looks for these reasons in this order, and ignores case, punctuation and spacing:

    - *same question*: one of the row's questions, or all of them joined, is the held-out question
      (all user messages of the held-out row).
    - *question inside*: the row's questions contain any 13 consecutive words of the held-out
      question, or all of it when it has 4 to 12 words. Thirteen is GPT-3's number (Brown et al.
      2020, arXiv 2005.14165, appendix C).
    - *nearly the same question*: `fuzz.ratio` of at least 95, as after a typing error. Questions
      from one template are just as similar ("the capital of Niger", "of Nigeria"). So it does not
      count if the row asks about something else: its answer repeats a word of its question that
      the held-out question lacks, or the two answers share none of the words that they add.
    - *same answer*: the last answer of the held-out row is one of the row's answers and has at
      least 4 words. This finds reworded questions. On data other than facts it also finds set
      phrases: look at the leaks.

    It cannot find a reworded question with a reworded answer, or a typing error in a name that the
    answer repeats.
    """
    index = _HeldOut(held_out)
    clean, leaks = [], []
    near = index.nearly([question for row in rows for question in _texts(row, "user")])
    for row in rows:
        reason, number = index.leak(row, near)
        if number is None:
            clean.append(row)
        else:
            leaks.append(Leak(row, held_out[number], reason))
    return clean, leaks


class _HeldOut:
    """Held-out rows, indexed by their questions, runs of words and answers.

    Each index gives the number of a row, so looking up a training row takes the same time for any
    number of held-out rows. Only nearly equal questions have to be compared one by one.
    """

    def __init__(self, rows: Sequence[dict]) -> None:
        self.answers = [(_texts(row, "assistant") or [""])[-1] for row in rows]
        self.questions = [" ".join(_texts(row, "user")) for row in rows]
        self.by_question = _number_by_text(self.questions)
        self.by_answer = _number_by_text(self.answers)
        self.by_run: dict[tuple[str, ...], int] = {}  # a run: consecutive words
        for number, row in enumerate(rows):
            words = _words(row)
            if len(words) >= SHORT_RUN:
                for run in _runs(words, min(len(words), LONG_RUN)):
                    self.by_run.setdefault(run, number)
        self.lengths = sorted({len(run) for run in self.by_run})

    def nearly(self, questions: Iterable[str]) -> dict[str, list[int]]:
        """Question → the held-out rows whose question is nearly the same."""
        import numpy as np
        from rapidfuzz import fuzz
        from rapidfuzz.process import cdist

        texts, near = list(dict.fromkeys(questions)), {}
        for start in range(0, len(texts) if self.questions else 0, ROWS_AT_ONCE):
            chunk = texts[start : start + ROWS_AT_ONCE]
            scores = cdist(chunk, self.questions, scorer=fuzz.ratio, score_cutoff=NEARLY_THE_SAME)
            near |= {t: np.flatnonzero(s).tolist() for t, s in zip(chunk, scores, strict=True)}
        return near

    def leak(self, row: dict, near: dict[str, list[int]]) -> tuple[str, int | None]:
        """The reason and the number of the held-out row; no number when there is no leak."""
        questions, answers = _texts(row, "user"), _texts(row, "assistant")
        words = _words(row)
        runs = (run for length in self.lengths for run in _runs(words, length))
        alike = (
            number
            for question in questions
            for number in near.get(question, ())
            if self._same_thing(number, question, " ".join(answers))
        )
        long = (answer for answer in answers if answer.count(" ") >= SHORT_RUN - 1)
        # Each search is lazy: it stops at its first hit, and the later ones then do not start.
        searches = {
            "same question": map(self.by_question.get, [*questions, " ".join(questions)]),
            "question inside": map(self.by_run.get, runs),
            "nearly the same question": alike,
            "same answer": map(self.by_answer.get, long),
        }
        for reason, numbers in searches.items():
            if (number := next((n for n in numbers if n is not None), None)) is not None:
                return reason, number
        return "", None

    def _same_thing(self, number: int, question: str, answer: str) -> bool:
        """Whether a nearly equal question asks for the same thing, judging from the answers."""
        texts = question, self.questions[number], answer, self.answers[number]
        asked, held_out_asked, told, held_out_told = (set(re.findall(r"\w+", t)) for t in texts)
        if (asked - held_out_asked) & told:  # the answer names what only this question asks about
            return False
        new, held_out_new = told - asked, held_out_told - held_out_asked
        return not new or not held_out_new or bool(new & held_out_new)


def _number_by_text(texts: Sequence[str]) -> dict[str, int]:
    """Text → the number of the first row that has it; empty texts are left out."""
    return {text: number for number, text in reversed(list(enumerate(texts))) if text}


def _words(row: dict) -> list[str]:
    """The words of the user's messages. "Guinea-Bissau" is one word: it does not hold "Guinea"."""
    text = " ".join(m["content"] for m in row["messages"] if m["role"] == "user")
    return re.findall(r"[^\W_]+(?:[-'’.][^\W_]+)*", text.casefold())


def _runs(words: list[str], length: int) -> Iterator[tuple[str, ...]]:
    return (tuple(words[i : i + length]) for i in range(len(words) - length + 1))
