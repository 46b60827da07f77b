"""Ask a teacher for pairs until there are enough, and lose none that was paid for."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from sftlib import progress_bar
from sftlib.data import drop_torn_line, read_jsonl, write_jsonl
from sftlib.teacher.client import Completion, Refused, Teacher, TeacherError, Unreadable
from sftlib.teacher.pairs import PAIR_SCHEMA, Pair, PairError, parse_pairs

UNREADABLE_IN_A_ROW = 5  # five unreadable responses in a row mean a wrong address, not bad luck
REFUSED = "refused by the server"  # the reason of requests, not of completions
Accept = Callable[[Any, Pair], str | None]


@dataclass(frozen=True)
class Prices:
    """Prices per million tokens, in any currency; see the price list of your provider."""

    prompt: float
    completion: float

    def of(self, prompt_tokens: int, completion_tokens: int) -> float:
        """The cost of these tokens."""
        return (self.prompt * prompt_tokens + self.completion * completion_tokens) / 1e6


@dataclass
class Generated:
    """What came of a generation. Completions from earlier runs count too.

    Attributes:
        rows: the accepted pairs.
        rejected: reason → how many pairs or completions were rejected for it.
        rejects: the rejected ones: `topic`, `reason`, `text` (its beginning).
        attempts: completions that were asked for, with those that the server refused.
        parsed: completions in which at least one pair was found, usable or not.
        cost: in the currency of the prices, or in tokens without prices. It is an upper bound if
            the server does not count tokens.
        stopped: why there are fewer pairs than wanted, with advice; empty when there are enough.
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
    patience: int | None = 20,
    prices: Prices | None = None,
    budget: float | None = None,
    seed: int = 0,
) -> Generated:
    """Ask the teacher about each topic in turn until `n` pairs are accepted.

    Every completion is on the disk (`out` with the ending `.raw.jsonl`) before the next step. Every
    accepted pair is at once in `out`. After an interruption, call it again with the same arguments:
    it goes on where it stopped, and does not ask again for what it has. A topic that the server
    refuses (too long, filtered …) is rejected, and not asked again: delete its line from
    `.raw.jsonl` to ask again. If the server refuses everything, that is an error.

    Args:
        topics: what to ask about: strings, or anything that JSON can hold.
        n: accepted pairs wanted; there may be a few more.
        out: a JSON-lines file, one accepted pair a line: `messages`, `topic`, `teacher`, `request`.
        teacher: without it, `Teacher()`.
        prompt: makes the messages that ask about a topic.
        accept: called with topic and pair; returns why the pair is not good enough, or None.
        schema: a JSON schema for the answer; None for a server that does not support schemas.
        max_attempts: the most completions; without it, four times `n`.
        concurrency: how many requests run at the same time.
        patience: it stops after so many completions in a row without a new pair. If a pair usually
            takes several completions, it waits ten times as many, unless all are duplicates. None
            to go on.
        prices: the cost is computed with them from the tokens that the server reports.
        budget: it stops if the next request, at its highest possible cost, would exceed the budget.
            In the currency of `prices`, or in tokens without prices.
        seed: the seed of the first attempt; each next attempt adds 1.

    Raises:
        TeacherError: the teacher cannot be asked any more; what was accepted is in `out`.
        ValueError: an argument is out of range, or `out` holds other pairs than these.
    """
    if not topics or min(n, concurrency, 1 if patience is None else patience) < 1:
        raise ValueError(
            f"Expected topics, and n, concurrency and patience >= 1; found {len(topics)} topics, "
            f"n={n}, concurrency={concurrency}, patience={patience}."
        )
    try:
        json.dumps(list(topics))
    except (TypeError, ValueError) as error:
        raise ValueError(f"Expected topics that JSON can hold, found others: {error}.") from None
    teacher = teacher or Teacher()
    shape: dict[str, Any] = {"schema": schema, "temperature": temperature, "max_tokens": max_tokens}

    def attempt(number: int) -> _Attempt:
        topic = topics[number % len(topics)]
        request = teacher.request(prompt(topic), seed=seed + number, **shape)
        return _Attempt(topic, request)

    limit = 4 * n if max_attempts is None else max_attempts
    files = _Journal(Path(out), teacher, accept, prices, patience)
    with files as journal, _bar(n, journal.result) as bar:
        todo = journal.without_answer(map(attempt, range(limit)))
        _work_through(todo, n, journal, concurrency, budget, bar)
        return journal.result


@dataclass(frozen=True)
class _Attempt:
    topic: Any
    request: dict[str, Any]

    @property
    def id(self) -> str:
        return _hash(self.request)

    @property
    def question(self) -> str:
        """The request apart from its seed: with another seed, a server refuses it as well."""
        return _hash({key: value for key, value in self.request.items() if key != "seed"})

    def worst_case(self) -> tuple[int, int]:
        """The most prompt and completion tokens that it can cost: a token has at least one byte."""
        text = json.dumps(self.request, ensure_ascii=False).encode()
        return len(text), self.request["max_tokens"]


def _hash(request: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:16]


def _work_through(
    todo: Iterator[_Attempt],
    n: int,
    journal: _Journal,
    concurrency: int,
    budget: float | None,
    show: Callable[[], None],
) -> None:
    """Ask, at most `concurrency` requests at a time; whatever happens, keep what comes back."""
    asked: dict[Future[Completion], _Attempt] = {}
    failure: TeacherError | None = None
    pool = ThreadPoolExecutor(concurrency)
    try:
        while True:
            while failure is None and len(asked) < concurrency:
                if (attempt := journal.next_attempt(todo, n, asked.values(), budget)) is None:
                    break
                asked[pool.submit(journal.teacher.send, attempt.request)] = attempt
            if not asked:
                break
            for future in wait(asked, return_when=FIRST_COMPLETED).done:
                failure = journal.collect(asked.pop(future), future) or failure
            show()
    finally:  # also after an interrupt: requests that have been sent must be paid for
        for future, attempt in asked.items():
            if not future.cancel():
                with contextlib.suppress(Exception):  # an earlier exception is being raised already
                    journal.collect(attempt, future)
        pool.shutdown()
    if failure is None:
        failure = journal.refuses_all()
    if failure is None:
        journal.save_refusals()
    else:
        raise TeacherError(
            f"{failure} {len(journal.result.rows)} accepted pairs are in {journal.out}; run the "
            "same call again to go on."
        )


class _Journal:
    """The two files of a generation, and the result that follows from them.

    `.raw.jsonl` holds each completion as it came, `out` the accepted pairs. Each completion is
    appended as one line and synced to the disk. The pairs can always be derived from it again.
    """

    def __init__(
        self,
        out: Path,
        teacher: Teacher,
        accept: Accept | None,
        prices: Prices | None,
        patience: int | None,
    ) -> None:
        self.out, self.raw = out, out.with_suffix(".raw.jsonl")
        self.teacher, self.accept = teacher, accept
        self.prices, self.patience = prices, patience
        self.known: dict[str, str] = {}  # answered request → why it brought no new pair, or ""
        self.answered: set[str] = set()  # questions that were answered at least once …
        self.refused: set[str] = set()  # … and that the server refused
        self.refusals: list[dict[str, Any]] = []  # not saved yet
        self.refusal: Refused | None = None  # the last one
        self.idle: list[str] = []  # why the last completions in a row brought no new pair
        self.tried = self.useful = 0  # completions of this call, and those with a new pair
        self.seen: set[str] = set()  # accepted pairs, to find duplicates
        self.unreadable = 0  # unreadable responses in a row
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
            self._resume()
        except BaseException:  # `accept` may raise anything
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for file in self.files:
            file.close()

    def _resume(self) -> None:
        """Read what an earlier run left, even if it was killed in the middle of a line."""
        for path in (self.raw, self.out):
            drop_torn_line(path)
        for row in read_jsonl(self.raw):
            self._judge(row)
        there = read_jsonl(self.out)
        derived = {json.dumps(row, sort_keys=True) for row in self.result.rows}
        if any(json.dumps(row, sort_keys=True) not in derived for row in there):
            raise ValueError(
                f"{self.out} holds pairs that do not follow from {self.raw.name} and `accept`: "
                "they were edited, or made otherwise. Move that file away, or choose another one. "
                "Completions that are there are not asked for again."
            )
        if there != self.result.rows:
            self.files.pop().close()
            write_jsonl(self.out, self.result.rows)
            self.files.append(_open_to_append(self.out))

    def without_answer(self, attempts: Iterator[_Attempt]) -> Iterator[_Attempt]:
        """The attempts to ask; those that an earlier run has asked are counted here."""
        for attempt in attempts:
            if attempt.id in self.known:
                self._count(attempt)
            elif attempt.question in self.answered or attempt.question not in self.refused:
                yield attempt

    def _count(self, attempt: _Attempt) -> None:
        why_not = self.known[attempt.id]
        (self.refused if why_not == REFUSED else self.answered).add(attempt.question)
        self.tried += 1
        self.useful += not why_not
        self.idle = self.idle + [why_not] if why_not else []

    def _gives_up(self, under_way: int) -> bool:
        """Whether to ask no more; before the first good pair, each request under way counts too."""
        if self.patience is None:
            return False
        usual = (self.tried - len(self.idle)) / max(1, self.useful)
        bad_luck = 0 if set(self.idle) == {"duplicate"} else 10 * usual
        waste = len(self.idle) + (0 if self.useful else under_way)
        return waste >= max(self.patience, bad_luck)

    def refuses_all(self) -> TeacherError | None:
        """The error if the generation stopped because the server refused one request after another.

        Then the topics are not to blame, and none of these refusals is saved.
        """
        all_refused = set(self.idle) == {REFUSED} and (not self.useful or self._gives_up(0))
        return self.refusal if self.result.stopped and all_refused else None

    def save_refusals(self) -> None:
        while self.refusals:
            _append(self.files[0], self.refusals.pop(0))

    def next_attempt(
        self, todo: Iterator[_Attempt], n: int, asked: Collection[_Attempt], budget: float | None
    ) -> _Attempt | None:
        """What to ask next; None when the open requests may be enough, or would use up the budget.

        The budget counts each open request at its highest possible cost.
        """
        if len(self.result.rows) + len(asked) >= n or self.result.stopped:
            return None
        self.next = self.next or next(todo, None)
        if self.next and self.next.question in self.refused - self.answered:
            self.next = next(todo, None)
        if self._gives_up(len(asked)):
            self.result.stopped = "" if asked else _advice(self.idle)
            return None
        if self.next is None:
            self.result.stopped = "" if asked else "all attempts are used"
            return None
        if budget is not None and self.result.cost + self._highest_cost(self.next, *asked) > budget:
            if not asked:
                self.result.stopped = f"the next request might exceed the budget of {budget:g}"
            return None
        attempt, self.next = self.next, None
        return attempt

    def _highest_cost(self, *attempts: _Attempt) -> float:
        return sum(self._price(*attempt.worst_case()) for attempt in attempts)

    def collect(self, attempt: _Attempt, future: Future[Completion]) -> TeacherError | None:
        """Keep what a request brought; returns an error if no more requests should follow."""
        try:
            self._keep(attempt, future.result())
            self.unreadable = 0
        except Unreadable as error:  # no completion, but it may have been paid for
            self.unreadable += 1
            self.result.attempts += 1
            self.result.cost += self._highest_cost(attempt)
            self._reject(attempt.topic, "unreadable response", str(error))
            return error if self.unreadable >= UNREADABLE_IN_A_ROW else None
        except Refused as error:  # nothing was paid; if another topic is answered, it is saved
            self.unreadable, self.refusal = 0, error
            row = self._row(attempt, Completion("", prompt_tokens=0, completion_tokens=0))
            self.refusals.append(row | {"error": str(error)})
            self._judge(self.refusals[-1])
            self._count(attempt)
        except TeacherError as error:
            return error
        return None

    def _keep(self, attempt: _Attempt, completion: Completion) -> None:
        """Save a completion, then the pairs in it."""
        row = self._row(attempt, completion)
        wrote = completion.text or completion.reasoning
        if not completion.prompt_tokens or (wrote and not completion.completion_tokens):
            row["prompt_tokens"], row["completion_tokens"] = attempt.worst_case()  # not counted
        saved = _append(self.files[0], row)
        self.save_refusals()  # this server answers: it refused because of the topics
        for accepted in self._judge(saved):
            _append(self.files[1], accepted)
        self._count(attempt)

    def _row(self, attempt: _Attempt, completion: Completion) -> dict[str, Any]:
        row = {"request": attempt.id, "topic": attempt.topic, "teacher": self.teacher.model}
        return row | asdict(completion)

    def _judge(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        """Count a completion, and return the rows of the pairs that are accepted from it."""
        self.result.attempts += 1
        self.result.cost += self._price(row["prompt_tokens"], row["completion_tokens"])
        pairs, bad = _pairs_of(row)
        self.result.parsed += bool(pairs)
        rows = []
        for pair in pairs:
            if reason := self._reason_to_reject(row["topic"], pair):
                bad.append(PairError(reason))
                continue
            origin = {key: row[key] for key in ("topic", "teacher", "request")}
            rows.append({"messages": pair.messages} | origin)
        for error in bad:
            said = row.get("error") or row["text"] or row.get("reasoning") or ""
            self._reject(row["topic"], error.reason, said)
        self.known[row["request"]] = "" if rows else (bad[0].reason if bad else "no pair")
        self.result.rows += rows
        return rows

    def _reason_to_reject(self, topic: Any, pair: Pair) -> str | None:
        key = " ".join(f"{pair.question} {pair.answer}".casefold().split())
        if key in self.seen:
            return "duplicate"
        if self.accept is not None and (reason := self.accept(topic, pair)):
            return reason
        self.seen.add(key)
        return None

    def _reject(self, topic: Any, reason: str, text: str) -> None:
        self.result.rejected[reason] += 1
        self.result.rejects.append({"topic": topic, "reason": reason, "text": text[:500]})

    def _price(self, prompt_tokens: int, completion_tokens: int) -> float:
        if self.prices is None:
            return prompt_tokens + completion_tokens
        return self.prices.of(prompt_tokens, completion_tokens)


def _pairs_of(row: dict[str, Any]) -> tuple[list[Pair], list[PairError]]:
    """The good pairs of a completion, and an error for each bad one (or for all of it)."""
    bad: list[PairError] = []
    if row.get("error"):
        return [], [PairError(REFUSED, row["error"])]
    if not row["text"] and (row.get("reasoning") or row["finish_reason"] == "length"):
        return [], [PairError("only reasoning")]
    if row["refusal"] is not None:
        return [], [PairError("refused", row["refusal"])]
    try:
        pairs = parse_pairs(row["text"], bad)
    except PairError as error:
        pairs, bad = [], bad or [error]
        if error.reason == "only reasoning":
            return pairs, bad
    if reason := {"length": "cut off", "content_filter": "filtered"}.get(row["finish_reason"]):
        bad = [PairError(reason)]  # the server's own reason says more
    return pairs, bad


def _advice(reasons: list[str]) -> str:
    """Why a generation gives up after these reasons in a row, and what to do."""
    most, times = Counter(reasons).most_common(1)[0]
    advice = {
        "only reasoning": "Give a higher `max_tokens`, or turn the model's thinking off",
        "cut off": "Give a higher `max_tokens`, or ask for shorter answers",
        "duplicate": "Give more topics, a higher `temperature`, or a prompt that varies",
        "filtered": "Choose other topics, or another teacher",
        "refused": "Choose other topics, or another teacher",
        REFUSED: "`rejects` holds the server's words",
    }.get(most, "Look at `rejects`. Show an example in the prompt, or take a larger model")
    return (
        f"the last {len(reasons)} completions brought no new pair ({most}: {times}). {advice}; or "
        "give a higher `patience`."
    )


def _open_to_append(path: Path) -> IO[bytes]:
    return open(path, "ab", buffering=0)


def _append(file: IO[bytes], row: dict[str, Any]) -> dict[str, Any]:
    """Write a row as one line, synced to the disk; returns the row as reading it will give it."""
    line = json.dumps(row)  # as ASCII, so that broken characters in a completion do no harm
    file.write(line.encode() + b"\n")
    os.fsync(file.fileno())
    return json.loads(line)


@contextlib.contextmanager
def _bar(n: int, result: Generated) -> Generator[Callable[[], None]]:
    """A progress bar of accepted pairs with the running cost; silent where bars are off."""
    with progress_bar(total=n, unit="pair") as bar:

        def show() -> None:
            bar.n = min(len(result.rows), n)
            bar.set_postfix_str(f"{result.attempts} asked, cost {result.cost:,.4g}")

        show()
        yield show
