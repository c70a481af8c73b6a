"""Integers that a caller gives, checked in one way: NumPy's are taken, bools and floats are not."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral


def _as_int(value: object) -> int | None:
    return None if isinstance(value, bool) or not isinstance(value, Integral) else int(value)


def integer(
    value: object,
    name: str,
    *,
    least: int | None = None,
    most: int | None = None,
    error: type[ValueError] = ValueError,
) -> int:
    """``value`` as an int.

    Args:
        value: what was given.
        name: of the argument, for the error.
        least: smallest value allowed; None for any.
        most: largest value allowed, together with ``least``; None for any.
        error: what is raised.

    Raises:
        ValueError: ``value`` is no integer, or outside the range.
    """
    number = _as_int(value)
    if number is None or (least is not None and number < least) or (most is not None and number > most):
        limits = "" if least is None else f" of at least {least}" if most is None else f" from {least} to {most}"
        raise error(f"{name} is {value!r}; it must be an integer{limits}")
    return number


def integer_of(
    value: object, name: str, allowed: Sequence[int], *, what: str, error: type[ValueError] = ValueError
) -> int:
    """``value`` as an int, one of ``allowed``; ``what`` says in the error who allows them.

    Raises:
        ValueError: it is none of them.
    """
    number = _as_int(value)
    if number is None or number not in allowed:
        raise error(f"{name} is {value!r}; {what} {tuple(allowed)}: choose one of them")
    return number
