"""Find duplicates, and training rows that give a test away.

Both ignore case, punctuation and spacing. rapidfuzz finds texts that are nearly the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

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


def deduplicate(
    rows: Sequence[dict], threshold: float | None = None
) -> tuple[list[dict], list[Duplicate]]:
    """The rows without repetitions, and those left out, each with the kept row that it repeats.

    It compares the text of all messages and ignores case, punctuation and spacing. Rows are taken
    in order; a row that repeats a kept one is left out.

    Args:
        rows: rows with `messages`.
        threshold: how alike two rows must be (0 to 1) for the later one to be left out. The measure
            is rapidfuzz's `fuzz.ratio` / 100: twice the length of the longest common subsequence,
            divided by the length of both. None: only the same text is a repetition.

    Raises:
        ValueError: the threshold is not above 0 and at most 1.
    """
    if threshold is not None and not 0 < threshold <= 1:
        raise ValueError(f"Expected a threshold above 0 and up to 1, found {threshold!r}.")
    # Rows are named by their numbers. Of rows with the same text, only the first is compared.
    first_with: dict[str, int] = {}
    firsts = [first_with.setdefault(_all_text(row), number) for number, row in enumerate(rows)]
    similar = {} if threshold is None else _nearly_the_same(first_with, threshold)
    kept, duplicates = [], []
    for number, (row, first) in enumerate(zip(rows, firsts, strict=True)):
        of, score = similar.get(first, (first, 1.0))
        if of == number:
            kept.append(row)
        else:
            duplicates.append(Duplicate(row, rows[of], score))
    return kept, duplicates


def _nearly_the_same(first_with: dict[str, int], threshold: float) -> dict[int, tuple[int, float]]:
    """Left-out row → (the first kept row that is similar enough, their similarity)."""
    texts, numbers = list(first_with), list(first_with.values())
    left_out: dict[int, tuple[int, float]] = {}
    for later, earlier, score in _similar_pairs(texts, threshold):
        later, earlier = numbers[later], numbers[earlier]
        if later not in left_out and earlier not in left_out:
            left_out[later] = earlier, score
    return left_out


def _similar_pairs(texts: list[str], threshold: float) -> Iterator[tuple[int, int, float]]:
    """(later, earlier, similarity) of all texts that are alike, in order.

    Comparing all pairs would be slow, so counts of letters rule out most of them first: 20 times
    less work for English texts at 0.9.
    """
    import numpy as np
    from rapidfuzz import fuzz
    from rapidfuzz.process import cpdist

    counts = _letters(texts)
    lengths = np.array([len(text) for text in texts])
    for start in range(0, len(texts), ROWS_AT_ONCE):
        chunk = range(start, min(start + ROWS_AT_ONCE, len(texts)))
        candidates = []
        for i in chunk:
            # A ratio of `threshold` allows (1 − threshold) · (both lengths) insertions and
            # deletions. A letter that one text has n times more often needs at least n of them.
            edits = np.abs(counts[:, :i] - counts[:, i, None]).sum(0, dtype=np.int32)
            allowed = (1 - threshold) * (lengths[:i] + lengths[i])
            candidates.append(np.flatnonzero(edits <= allowed + 1e-6))
        earlier = np.concatenate(candidates)
        later = np.repeat(chunk, [len(numbers) for numbers in candidates])
        scores = cpdist(
            [texts[i] for i in later],
            [texts[i] for i in earlier],
            scorer=fuzz.ratio,
            score_cutoff=100 * threshold - 1e-6,  # a ratio of exactly the threshold may be rounded
            dtype=np.float64,
            workers=-1,
        )
        alike = scores > 0  # cpdist gives 0 below the cutoff
        yield from zip(later[alike], earlier[alike], (scores[alike] / 100).tolist(), strict=True)


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
    return "\n".join(normalise(message["content"]) for message in row["messages"])


def _texts(row: dict, role: str) -> list[str]:
    return [normalise(m["content"]) for m in row["messages"] if m["role"] == role]


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
