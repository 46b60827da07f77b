"""Answers of any type, read as plain Python values.

A student may compute with NumPy, torch, pandas, fractions or decimals, and may give a tuple, a
range or a generator where another gives a list. These functions read all of them. An answer of
another kind raises `Unread`, whose message says what was expected and what was found.

`where` names the part of an answer that is read, such as "Stage 1"; messages begin with it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Set
from decimal import Decimal
from functools import partial
from itertools import islice
from numbers import Real
from typing import Any

LONGEST = 100_000  # items: a generator that gives more is taken for one that never ends
MISSING = "nothing equals it. Look for 0 / 0, ∞ − ∞ or the logarithm of a negative number."
INFINITE = "look for a division by 0, or for an exp that overflows."


class Unread(ValueError):
    """An answer is not of the kind that the exercise asks for."""

    def __init__(self, text: str, where: str = "") -> None:
        super().__init__(f"{where}: {text}" if where else text[0].upper() + text[1:])


class NotFinite(Unread):
    """A number is NaN or infinite."""


def number(value: Any, where: str = "", what: str = "a number") -> int | float:
    """A finite number of any numeric type, as an int if its type is one of whole numbers."""
    found = _scalar(value)
    if isinstance(found, bool) or not isinstance(found, Real | Decimal):
        raise Unread(f"expected {what}, found {described(value)}.", where)
    try:
        as_float = float(found)
    except OverflowError:
        as_float = math.inf
    except ValueError:  # a signalling NaN of Decimal
        as_float = math.nan
    if math.isnan(as_float):
        raise NotFinite(f"expected {what}, found NaN, which is no number: {MISSING}", where)
    if math.isinf(as_float):
        sign = "−" if found < 0 else ""
        raise NotFinite(f"expected {what}, found {sign}infinity: {INFINITE}", where)
    return found if isinstance(found, int) else as_float


def whole(value: Any, where: str = "") -> int:
    """A whole number of any numeric type; 3.0 is one."""
    found = number(value, where, "a whole number")
    if found != int(found):
        raise Unread(f"expected a whole number, found {shown(found)}.", where)
    return int(found)


def truth(value: Any, where: str = "") -> bool:
    """True or False, also NumPy's and torch's, or 1 and 0."""
    found = _scalar(value)
    if isinstance(found, bool) or (isinstance(found, Real) and found in (0, 1)):
        return bool(found)
    raise Unread(f"expected True or False, found {described(value)}.", where)


def text(value: Any, where: str = "") -> str:
    """A text."""
    if isinstance(value, str):
        return str.__str__(value)  # str(value) of an Enum would be its name
    raise Unread(f"expected a text, found {described(value)}.", where)


def sequence(value: Any, where: str = "", what: str = "a list", ordered: bool = True) -> list:
    """The items of a list, tuple, range, generator, array, tensor or Series, in their order.

    Args:
        ordered: whether the order matters. Where it does not, a set is read, too.
    """
    if ordered and isinstance(value, set | frozenset):
        raise Unread(f"expected {what}, found a set, which has no order.", where)
    if isinstance(value, str | bytes | Mapping) or hasattr(value, "columns"):
        raise Unread(f"expected {what}, found {described(value)}.", where)
    try:
        found = value.tolist() if hasattr(value, "tolist") else value
        if not isinstance(found, Iterable):
            raise Unread(f"expected {what}, found {described(value)}.", where)
        items = list(islice(found, LONGEST + 1))
    except Unread:
        raise
    except Exception as error:
        raise Unread(
            f"expected {what}, found {described(value)}, which cannot be read "
            f"({type(error).__name__}: {error}).",
            where,
        ) from error
    if len(items) > LONGEST:
        raise Unread(f"expected {what}, found more than {LONGEST:,} items: does it end?", where)
    return items


def unique(
    value: Any, where: str = "", what: str = "whole numbers", among: Collection[int] = ()
) -> set[int]:
    """Whole numbers among the given ones, in any order, each at most once."""
    items = [whole(item, where) for item in sequence(value, where, what, ordered=False)]
    if odd := [item for item in items if item not in among]:
        raise Unread(f"expected {what}, found {odd[0]}.", where)
    if twice := [item for item in items if items.count(item) > 1]:
        raise Unread(f"{twice[0]} is given twice: each counts once.", where)
    return set(items)


def mapping(value: Any, keys: Collection, where: str = "") -> dict:
    """A dictionary (or a Series) with exactly these keys, in their order."""
    wanted = ", ".join(map(str, keys))
    if not isinstance(value, Mapping) and hasattr(value, "to_dict") and hasattr(value, "index"):
        value = value.to_dict()
    if not isinstance(value, Mapping):
        raise Unread(
            f"expected a dictionary with the keys {wanted}, found {described(value)}.", where
        )
    if set(value) != set(keys):
        missing = [str(key) for key in keys if key not in value]
        extra = [repr(key) for key in value if key not in set(keys)]
        found = ", ".join(map(repr, value)) or "none"
        if not missing:
            found = f"also {', '.join(extra)}"
        elif not extra and value:
            found += f"; missing: {', '.join(missing)}"
        raise Unread(f"expected the keys {wanted}, found {found}.", where)
    return {key: value[key] for key in keys}


def same(found: Any, expected: Any, relative: float = 1e-6, absolute: float = 1e-9) -> bool:
    """Whether an answer equals the expected value, which says how the answer is read.

    Args:
        expected: a number (ints are compared exactly, floats within the tolerances), a text, True
            or False, None, a list, tuple, array or tensor (any sequence may equal it), a set, or a
            dictionary.

    Raises:
        Unread: the answer is of another kind.
    """
    if hasattr(expected, "tolist"):
        expected = expected.tolist()
    if isinstance(expected, bool):
        return truth(found) is expected
    if isinstance(expected, int):
        return number(found) == expected
    if isinstance(expected, float):
        return math.isclose(number(found), expected, rel_tol=relative, abs_tol=absolute)
    if isinstance(expected, str):
        return text(found) == expected
    if expected is None:
        return found is None
    if isinstance(expected, set):
        return {_scalar(item) for item in sequence(found, ordered=False)} == expected
    if isinstance(expected, dict):
        read = mapping(found, expected)
        return all(same(read[key], expected[key], relative, absolute) for key in expected)
    items = sequence(found)
    return len(items) == len(expected) and all(
        same(a, b, relative, absolute) for a, b in zip(items, expected, strict=True)
    )


def _scalar(value: Any) -> Any:
    """The Python object for a NumPy scalar, or for an array or tensor without dimensions."""
    if hasattr(value, "item") and hasattr(value, "shape") and not tuple(value.shape):
        try:
            return value.item()
        except RuntimeError:  # a tensor on torch's meta device has no value
            return value
    return value


def described(value: Any) -> str:
    """What was found, in words."""
    value = _scalar(value)
    if isinstance(value, str):
        return f"the text {shown(value)}"
    if hasattr(value, "shape") and not isinstance(value, type):
        return f"{type(value).__name__} of shape {tuple(value.shape)}"
    name = getattr(value, "__name__", "")
    if isinstance(value, partial):
        name = "partial"
    if name and callable(value):  # objects that can be called, such as models, have no name
        return f"{name} itself: a function or class gives its result when it is called, {name}(…)"
    if value is None or isinstance(value, bool | Real | Decimal):
        return shown(value)
    if isinstance(value, list | tuple | Set | Mapping):
        return f"{type(value).__name__} {shown(value)}"
    return type(value).__name__


def shown(value: Any, most: int = 240) -> str:
    """A value as a message shows it: floats rounded, long texts cut in the middle."""
    found = _shown(value)
    return found if len(found) <= most else f"{found[: most - 40]} … {found[-30:]}"


def _shown(value: Any) -> str:
    value = _scalar(value)
    if isinstance(value, float):
        return f"{value:.1f}" if value.is_integer() and abs(value) < 1e6 else f"{value:.6g}"
    if isinstance(value, str | bytes):
        return repr(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_shown(k)}: {_shown(v)}" for k, v in value.items()) + "}"
    if hasattr(value, "tolist"):
        return _shown(value.tolist())
    brackets = {list: "[]", tuple: "()", set: "{}", frozenset: "{}"}.get(type(value))
    if brackets is None or not value:
        return repr(value)
    inner = ", ".join(map(_shown, value)) + (
        "," if type(value) is tuple and len(value) == 1 else ""
    )
    return brackets[0] + inner + brackets[1]


def open_parts(answer: Any, none: bool = True) -> tuple[list[str], bool]:
    """The places of an answer that still hold `...`, and whether anything else stands in it.

    Args:
        none: whether None counts as open, too.
    """
    found, filled = [], False
    for place, leaf in _leaves(answer, (), ()):
        if leaf is ... or (none and leaf is None):
            found.append(", ".join(place))
        else:
            filled = True
    return found, filled


def _leaves(
    value: Any, place: tuple[str, ...], inside: tuple[int, ...]
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The innermost values of dictionaries, lists, tuples and sets, each with its place."""
    parts: Iterable[tuple[str, Any]] = ()
    if id(value) not in inside:  # a list may hold itself
        if isinstance(value, Mapping):
            parts = ((str(key), item) for key, item in value.items())
        elif isinstance(value, list | tuple | set | frozenset):
            parts = ((f"item {number}", item) for number, item in enumerate(value, 1))
    empty = True
    for name, item in parts:
        empty = False
        yield from _leaves(item, (*place, name), (*inside, id(value)))
    if empty:
        yield place, value
