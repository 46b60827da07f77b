"""Read question-answer pairs in what an LLM writes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from sftlib.data.validation import validate

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

LONGEST = 100_000  # characters; a longer completion is a model that does not stop


class PairError(ValueError):
    """A completion, or a part of it, is no pair. `reason` is short, to be counted."""

    def __init__(self, reason: str, details: str = "") -> None:
        super().__init__(f"{reason}: {details}" if details else reason)
        self.reason = reason


class Pair(BaseModel):
    """A question with its answer. The keys `instruction` and `response` are read as well."""

    model_config = ConfigDict(strict=True, frozen=True)
    question: str
    answer: str

    @model_validator(mode="before")
    @classmethod
    def _other_names(cls, data: Any) -> Any:
        if isinstance(data, dict) and {"instruction", "response"} <= data.keys():
            return {"question": data["instruction"], "answer": data["response"]}
        return data

    @property
    def messages(self) -> list[dict[str, str]]:
        """The pair as a conversation of two messages."""
        return [
            {"role": "user", "content": self.question},
            {"role": "assistant", "content": self.answer},
        ]


PAIR_SCHEMA = Pair.model_json_schema() | {
    "description": "A question with its answer.",
    "additionalProperties": False,
}
"""The JSON schema of one pair, as `Teacher.ask` takes it."""


def parse_pairs(text: str, rejected: list[PairError] | None = None) -> list[Pair]:
    """The pairs in a completion: plain JSON, in code fences, between sentences, listed or nested.

    Args:
        text: what the model wrote.
        rejected: a list; an error is added for each part that looks like a pair but is not good.

    Raises:
        PairError: there is no usable pair at all.
    """
    found, bad = [], []
    for candidate in _candidates(_json_values(text)):
        try:
            found.append(_pair(candidate))
        except PairError as error:
            bad.append(error)
    if rejected is not None:
        rejected += bad
    if not found:
        raise (
            bad[0] if bad else PairError("no pair", f"expected a JSON object, found {text[:60]!r}")
        )
    return found


def _json_values(text: str) -> list[Any]:
    """Every JSON object or array in the text; only outermost ones."""
    if not isinstance(text, str):
        raise PairError("not text", f"expected a string, found {type(text).__name__}")
    if len(text) > LONGEST:
        raise PairError("too long", f"{len(text):,} characters; a pair has a few hundred")
    decoder = json.JSONDecoder(object_pairs_hook=_unique_keys)
    values, problem, at = [], None, 0
    # At each bracket, try to read JSON from there. A limit: text may have thousands of brackets.
    for _ in range(200):
        start = _BRACKET.search(text, at)
        if start is None:
            break
        try:
            value, at = decoder.raw_decode(text, start.start())
            values.append(value)
        except PairError as error:
            problem, at = error, start.end()
        except (ValueError, RecursionError) as error:
            problem, at = problem or PairError("broken JSON", str(error)), start.end()
    if not values:
        raise problem or PairError("no JSON", f"expected a JSON object, found {text[:60]!r}")
    return values


_BRACKET = re.compile(r"[\[{]")


def _unique_keys(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object as a dict. The json module would silently keep the last of two equal keys."""
    value = dict(items)
    if len(value) < len(items):
        raise PairError("duplicate keys", f"expected each key once, found {[k for k, _ in items]}")
    return value


def _candidates(value: Any, depth: int = 0) -> Iterator[Any]:
    """What may be a pair: objects, also those in lists or in objects around a list."""
    inner = list(value.values()) if isinstance(value, dict) else value
    if isinstance(value, dict) and not any(isinstance(v, list | dict) for v in inner):
        yield value
    elif isinstance(value, dict | list) and depth < 5:
        for part in inner:
            yield from _candidates(part, depth + 1)
    else:
        yield value


def _pair(candidate: Any) -> Pair:
    if not isinstance(candidate, dict):
        raise PairError("wrong keys", f"expected an object, found {type(candidate).__name__}")
    try:
        pair = Pair.model_validate(candidate)
    except ValidationError as error:
        kinds = {problem["type"] for problem in error.errors()}
        reason = "wrong keys" if "missing" in kinds else "not text"
        raise PairError(reason, f"found {sorted(map(str, candidate))[:8]}") from None
    pair = Pair(question=pair.question.strip(), answer=pair.answer.strip())
    for sentence in validate(pair.messages):
        what = sentence.replace("Message 1", "the question").replace("Message 2", "the answer")
        raise PairError(what.split(":")[0].replace("message 1", "the question"), sentence)
    return pair
