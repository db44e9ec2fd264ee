"""Settings that come from outside as names and plain values, checked against a dataclass."""

from __future__ import annotations

import json
import math
import types
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from levelset_ext.errors import InputError

__all__ = ["checked", "parse_settings"]


def parse_settings(pairs: Iterable[str]) -> dict[str, Any]:
    """NAME=VALUE pairs as a dict; a value is JSON where it can be, otherwise a word."""
    values: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not name or not equals:
            raise InputError(f"set: expected NAME=VALUE, got {pair!r}")
        try:
            values[name.replace("-", "_")] = json.loads(text)
        except ValueError:
            values[name.replace("-", "_")] = text
    return values


def checked(kind: type, values: Mapping[str, Any], what: str) -> dict[str, Any]:
    """The values of some fields of a dataclass, of the types that its fields have.

    Args:
        kind: dataclass with fields that are numbers, words, truth values, lists of numbers, or one
            of these or None.
        values: by name. Whole numbers are numbers too, and lists become tuples.
        what: how messages call the thing that is set.

    Raises:
        InputError: a name that is not a field, or a value of another type.
    """
    known = [field.name for field in fields(kind)]
    hints = get_type_hints(kind)
    found: dict[str, Any] = {}
    for name, value in values.items():
        if name not in known:
            raise InputError(
                f"{what}: expected a setting among {', '.join(known)}, got {name!r}"
                if known
                else f"{what}: expected no settings, got {name!r}"
            )
        try:
            found[name] = _typed(hints[name], value)
        except (TypeError, OverflowError):
            raise InputError(
                f"{what}: {name}: expected {_described(hints[name])}, got {value!r}"
            ) from None
    return found


def _typed(hint: Any, value: Any) -> Any:
    """The value as the type of a field; TypeError if it cannot be."""
    arms = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if value is None and type(None) in arms:
        return None
    for arm in arms:
        if get_origin(arm) is Literal and value in get_args(arm):
            return value
        if arm in (str, bool) and isinstance(value, arm):
            return value
        if arm is int and isinstance(value, int) and not isinstance(value, bool):
            return value
        if arm is float and _is_number(value):
            return float(value)
        if (
            get_origin(arm) is tuple
            and isinstance(value, list | tuple)
            and all(_is_number(part) for part in value)
        ):
            whole = get_args(arm)[0] is int
            if not whole or all(isinstance(part, int) for part in value):
                return tuple(int(part) if whole else float(part) for part in value)
    raise TypeError


def _is_number(value: Any) -> bool:
    if isinstance(value, str):  # infinity, which JSON lacks
        return value.lower() in ("inf", "-inf", "infinity", "-infinity")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return not math.isnan(value)


def _described(hint: Any) -> str:
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_described(arm) for arm in get_args(hint))
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if get_origin(hint) is tuple:
        return "a list of numbers"
    names = {float: "a number", int: "a whole number", str: "a word", bool: "true or false"}
    return names.get(hint, "null" if hint is type(None) else str(hint))
