"""Canonical JSON (RFC 8785): one value has one sequence of bytes, so that a digest of it can be recomputed anywhere."""

from __future__ import annotations

import json
from collections.abc import Mapping

_quote = json.encoder.encode_basestring  # escapes as ECMAScript does: the short ones, else \u00xx in lower case
EXACT = 1 << 53


def canonical(value: object) -> bytes:
    """Raises: ValueError for what JSON cannot hold or a JavaScript number would round (integers of 2**53 and above)."""
    return _text(value).encode()


def _text(value: object) -> str:
    if value is None:
        return "null"
    if value is True:
        return "true"
    if value is False:
        return "false"
    if isinstance(value, str):
        return _quote(value)
    if isinstance(value, int):
        if not -EXACT < value < EXACT:
            raise ValueError(f"{value} is not exact as a double")
        return str(int(value))
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{_quote(key)}:{_text(value[key])}" for key in sorted(value, key=_utf16)) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(_text, value)) + "]"
    raise ValueError(f"{type(value).__name__} is not JSON")


def _utf16(key: str) -> bytes:
    """RFC 8785 3.2.3 sorts by UTF-16 code units, in which U+1F600 comes before U+FB33."""
    return key.encode("utf-16-be")


def _number(value: float) -> str:
    """As ECMAScript's Number::toString does: the shortest digits that read back, which repr() finds too."""
    if value - value != 0.0:
        raise ValueError(f"{value} is not JSON")
    if value == 0.0:
        return "0"  # -0 too
    sign = "-" if value < 0 else ""
    mantissa, _, exponent = repr(abs(value)).partition("e")
    whole, _, fraction = mantissa.partition(".")
    digits = (whole + fraction).lstrip("0")
    point = len(whole) + int(exponent or 0) - (len(whole + fraction) - len(digits))  # of the decimal point in `digits`
    digits = digits.rstrip("0")
    count = len(digits)
    if count <= point <= 21:
        return sign + digits + "0" * (point - count)
    if 0 < point <= 21:
        return f"{sign}{digits[:point]}.{digits[point:]}"
    if -6 < point <= 0:
        return f"{sign}0.{'0' * -point}{digits}"
    tail = f".{digits[1:]}" if count > 1 else ""
    return f"{sign}{digits[0]}{tail}e{'+' if point > 0 else '-'}{abs(point - 1)}"
