"""Ask a teacher for pairs until there are enough, without losing one that was paid for."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from sftlib import progress_bar
from sftlib.data import drop_torn_line, read_jsonl, write_jsonl
from sftlib.teacher.client import Completion, Teacher, TeacherError, Unreadable
from sftlib.teacher.pairs import PAIR_SCHEMA, Pair, PairError, parse_pairs

UNREADABLE_IN_A_ROW = 5  # then the address is wrong, and not the luck bad
Accept = Callable[[Any, Pair], str | None]


@dataclass(frozen=True)
class Prices:
    """What a million tokens cost, in any one currency; see the price list of your provider."""

    prompt: float
    completion: float

    def of(self, prompt_tokens: int, completion_tokens: int) -> float:
        """The cost of so many tokens."""
        return (self.prompt * prompt_tokens + self.completion * completion_tokens) / 1e6


@dataclass
class Generated:
    """What came of a generation: `rows` were accepted, `rejected` counts the reasons of the rest.

    All of it counts what is in the file, from earlier runs too. `parsed` is the number of
    completions in which at least one pair was found, usable or not; `cost` is in the currency of
    the prices, or in tokens where no prices were given, and an upper bound where the server does
    not count tokens. `stopped` says why there are fewer pairs than wanted.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    rejected: Counter[str] = field(default_factory=Counter)
    rejects: list[dict[str, Any]] = field(default_factory=list)
    attempts: int = 0
    parsed: int = 0
    cost: float = 0.0
    stopped: str = ""


def about(topic: Any) -> list[dict[str, str]]:
    """The default prompt."""
    task = f"Write one question about {topic}, and its true answer in one short sentence."
    return [{"role": "user", "content": f"{task} Reply with JSON: question, answer."}]


def generate_pairs(
    topics: Sequence[Any],
    n: int,
    out: str | os.PathLike,
    teacher: Teacher | None = None,
    *,
    prompt: Callable[[Any], list[dict[str, str]]] = about,
    accept: Accept | None = None,
    schema: dict[str, Any] | None = PAIR_SCHEMA,
    temperature: float = 0.7,
    max_tokens: int = 256,
    max_attempts: int | None = None,
    concurrency: int = 2,
    prices: Prices | None = None,
    budget: float | None = None,
    seed: int = 0,
) -> Generated:
    """Ask the teacher about each topic in turn until `n` pairs are accepted.

    Every completion is on the disk (`out` with the ending `.raw.jsonl`) before the next step, and
    every accepted pair at once in `out`. Run again with the same arguments after whatever
    happened: it goes on where it was, and never asks again for what it has.

    Args:
        topics: what to ask about: strings, or anything that JSON can hold.
        n: accepted pairs wanted; there may be a few more.
        out: a JSON-lines file, one accepted pair a line: `messages`, `topic`, `teacher`, `request`.
        teacher: without it, `Teacher()`.
        prompt: makes the messages that ask about a topic.
        accept: called with topic and pair; returns why the pair is not good enough, or None.
        schema: a JSON schema for the answer; None for a server that cannot keep to one.
        max_attempts: completions at most; without it, four times `n`.
        concurrency: requests under way at the same time.
        prices: for the cost, from the tokens that the server reports.
        budget: stop before the cost can exceed it, in the currency of `prices`, else in tokens.
        seed: of the first attempt; each next one adds 1.

    Raises:
        TeacherError: the teacher cannot be asked any more; what was accepted is in `out`.
        ValueError: an argument is out of range, or `out` holds other pairs than these.
    """
    if not topics or n < 1 or concurrency < 1:
        raise ValueError(
            f"Expected topics, n >= 1 and concurrency >= 1; found {len(topics)} topics, n={n}, "
            f"concurrency={concurrency}."
        )
    try:
        json.dumps(list(topics))
    except (TypeError, ValueError) as error:
        raise ValueError(f"Expected topics that JSON can hold, found others: {error}.") from None
    teacher = teacher or Teacher()
    shape = {"schema": schema, "temperature": temperature, "max_tokens": max_tokens}

    def attempt(number: int) -> _Attempt:
        topic = topics[number % len(topics)]
        request = teacher.request(prompt(topic), seed=seed + number, **shape)
        return _Attempt(topic, request)

    limit = 4 * n if max_attempts is None else max_attempts
    with _Journal(Path(out), teacher, accept, prices) as journal, _bar(n, journal.result) as bar:
        todo = (a for a in map(attempt, range(limit)) if a.id not in journal.known)
        _work_through(todo, n, journal, concurrency, budget, bar)
        return journal.result


@dataclass(frozen=True)
class _Attempt:
    topic: Any
    request: dict[str, Any]

    @property
    def id(self) -> str:
        text = json.dumps(self.request, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def worst_case(self) -> tuple[int, int]:
        """Tokens that it can cost at most: none is shorter than a byte."""
        text = json.dumps(self.request, ensure_ascii=False).encode()
        return len(text), self.request["max_tokens"]


def _work_through(
    todo: Iterator[_Attempt],
    n: int,
    journal: _Journal,
    concurrency: int,
    budget: float | None,
    show: Callable[[], None],
) -> None:
    """Ask, at most `concurrency` at a time; whatever happens, keep what comes back."""
    asked: dict[Future[Completion], _Attempt] = {}
    failure: TeacherError | None = None
    pool = ThreadPoolExecutor(concurrency)
    try:
        while True:
            while failure is None and len(asked) < concurrency:
                if (attempt := journal.next_of(todo, n, asked.values(), budget)) is None:
                    break
                asked[pool.submit(journal.teacher.send, attempt.request)] = attempt
            if not asked:
                break
            for future in wait(asked, return_when=FIRST_COMPLETED).done:
                failure = journal.take(asked.pop(future), future) or failure
            show()
    finally:  # an interrupt too: what is under way will be paid for
        for future, attempt in asked.items():
            if not future.cancel():
                with contextlib.suppress(Exception):  # another one is on its way already
                    journal.take(attempt, future)
        pool.shutdown()
    if failure is not None:
        raise TeacherError(
            f"{failure} {len(journal.result.rows)} accepted pairs are in {journal.out}; run the "
            "same call again to go on."
        )


class _Journal:
    """The two files of a generation, and what they amount to.

    `.raw.jsonl` holds each completion as it came, `out` the pairs that follow from it. The first is
    appended to, a line at a time, and synced; the second can always be derived from it.
    """

    def __init__(
        self, out: Path, teacher: Teacher, accept: Accept | None, prices: Prices | None
    ) -> None:
        self.out, self.raw = out, out.with_suffix(".raw.jsonl")
        self.teacher, self.accept, self.prices = teacher, accept, prices
        self.known: set[str] = set()  # requests that have been answered
        self.seen: set[str] = set()  # pairs, to find doubles
        self.unreadable = 0  # in a row
        self.next: _Attempt | None = None
        self.result = Generated()

    def __enter__(self) -> _Journal:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.files = [_open_to_append(self.raw), _open_to_append(self.out)]
        try:
            fcntl.flock(self.files[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.__exit__()
            raise TeacherError(
                f"Another generation is writing to {self.out}. Wait for it, or choose another file."
            ) from None
        try:
            self._take_up()
        except BaseException:  # `accept` may raise anything
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for file in self.files:
            file.close()

    def _take_up(self) -> None:
        """Go on where an earlier run ended, also one that was killed in the middle of a line."""
        for path in (self.raw, self.out):
            drop_torn_line(path)
        for row in read_jsonl(self.raw):
            self._judge(row)
        there = read_jsonl(self.out)
        derived = {json.dumps(row, sort_keys=True) for row in self.result.rows}
        if any(json.dumps(row, sort_keys=True) not in derived for row in there):
            raise ValueError(
                f"{self.out} holds pairs that do not follow from {self.raw.name} and this check: "
                "they were edited, or made otherwise. Move that file away, or choose another one; "
                "completions that are there are not asked for again."
            )
        if there != self.result.rows:
            self.files.pop().close()
            write_jsonl(self.out, self.result.rows)
            self.files.append(_open_to_append(self.out))

    def next_of(
        self, todo: Iterator[_Attempt], n: int, asked: Collection[_Attempt], budget: float | None
    ) -> _Attempt | None:
        """What to ask next; None when that may be enough, or when the budget might not hold.

        It holds if everything that is under way may cost as much as it can.
        """
        if len(self.result.rows) + len(asked) >= n or self.result.stopped:
            return None
        self.next = self.next or next(todo, None)
        if self.next is None:
            self.result.stopped = "" if asked else "all attempts are used"
            return None
        if budget is not None and self.result.cost + self._worst(self.next, *asked) > budget:
            if not asked:
                self.result.stopped = f"the next request might exceed the budget of {budget:g}"
            return None
        attempt, self.next = self.next, None
        return attempt

    def _worst(self, *attempts: _Attempt) -> float:
        return sum(self._price(*attempt.worst_case()) for attempt in attempts)

    def take(self, attempt: _Attempt, future: Future[Completion]) -> TeacherError | None:
        """Keep what a request brought; returns the failure after which to stop, if it is one."""
        try:
            self._keep(attempt, future.result())
            self.unreadable = 0
        except Unreadable as error:  # no completion, but it may have been paid for
            self.unreadable += 1
            self.result.attempts += 1
            self.result.cost += self._worst(attempt)
            self._reject(attempt.topic, "unreadable response", str(error))
            return error if self.unreadable >= UNREADABLE_IN_A_ROW else None
        except TeacherError as error:
            return error
        return None

    def _keep(self, attempt: _Attempt, completion: Completion) -> None:
        """Save a completion, then the pairs in it."""
        row = {"request": attempt.id, "topic": attempt.topic, "teacher": self.teacher.model}
        row |= asdict(completion)
        if completion.prompt_tokens is None or completion.completion_tokens is None:
            row["prompt_tokens"], row["completion_tokens"] = attempt.worst_case()
        for accepted in self._judge(_append(self.files[0], row)):
            _append(self.files[1], accepted)

    def _judge(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        """Count a completion, and return the rows of the pairs that are accepted from it."""
        self.known.add(row["request"])
        self.result.attempts += 1
        self.result.cost += self._price(row["prompt_tokens"], row["completion_tokens"])
        pairs, bad = _read(row)
        self.result.parsed += bool(pairs)
        rows = []
        for pair in pairs:
            if why := self._why_not(row["topic"], pair):
                bad.append(PairError(why))
                continue
            kept = {key: row[key] for key in ("topic", "teacher", "request")}
            rows.append({"messages": pair.messages} | kept)
        for error in bad:
            self._reject(row["topic"], error.reason, row["text"])
        self.result.rows += rows
        return rows

    def _why_not(self, topic: Any, pair: Pair) -> str | None:
        key = " ".join(f"{pair.question} {pair.answer}".casefold().split())
        if key in self.seen:
            return "duplicate"
        if self.accept is not None and (why := self.accept(topic, pair)):
            return why
        self.seen.add(key)
        return None

    def _reject(self, topic: Any, reason: str, text: str) -> None:
        self.result.rejected[reason] += 1
        self.result.rejects.append({"topic": topic, "reason": reason, "text": text[:500]})

    def _price(self, prompt_tokens: int, completion_tokens: int) -> float:
        if self.prices is None:
            return prompt_tokens + completion_tokens
        return self.prices.of(prompt_tokens, completion_tokens)


def _read(row: dict[str, Any]) -> tuple[list[Pair], list[PairError]]:
    """The good pairs of a completion, and what is wrong with it or with the others."""
    bad: list[PairError] = []
    if row["refusal"] is not None:
        return [], [PairError("refused", row["refusal"])]
    try:
        pairs = parse_pairs(row["text"], bad)
    except PairError as error:
        pairs, bad = [], bad or [error]
    if reason := {"length": "cut off", "content_filter": "filtered"}.get(row["finish_reason"]):
        bad = [PairError(reason)]  # the server's own reason says more
    return pairs, bad


def _open_to_append(path: Path) -> IO[bytes]:
    return open(path, "ab", buffering=0)


def _append(file: IO[bytes], row: dict[str, Any]) -> dict[str, Any]:
    """One line, in one write, on the disk before it returns; returns what reading it will give."""
    line = json.dumps(row)  # ASCII: broken characters in a completion do not break the file
    file.write(line.encode() + b"\n")
    os.fsync(file.fileno())
    return json.loads(line)


@contextlib.contextmanager
def _bar(n: int, result: Generated) -> Iterator[Callable[[], None]]:
    """A progress bar of accepted pairs with the running cost; silent where bars are off."""
    with progress_bar(total=n, unit="pair") as bar:

        def show() -> None:
            bar.n = min(len(result.rows), n)
            bar.set_postfix_str(f"{result.attempts} asked, cost {result.cost:,.4g}")

        show()
        yield show
