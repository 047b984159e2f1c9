"""What is wrong with a request, said so that a person knows what to change and a program knows which field.

Nothing that was sent is repeated, but for the name of an unknown field.
"""

import re
from collections.abc import Iterator
from typing import Any, TypeVar

import msgspec
from msgspec.inspect import ListType, LiteralType, StructType, Type, UnionType, type_info

from web.errors import Failure

T = TypeVar("T")

_PATTERNS = {
    r"^[A-Za-z0-9._:-]+\Z": "must consist of letters, digits and . _ : -",
    r"^[a-z0-9_]+\Z": "must consist of lower-case letters, digits and _",
    r"^[A-Za-z0-9_]+\Z": "must be a language code like pt_BR",
    r"^[0-9]{4}-[0-9]{2}-[0-9]{2}\Z": "must be a date like 1990-12-31",
    r"^[0-9]\Z": "must be one digit",
}


def wrong(field: str, message: str, limit: Any = None) -> Failure:
    """The answer to a request that is not as it should be: which field, what is wrong with it, and the limit if any."""
    details = {"field": field} if limit is None else {"field": field, "limit": limit}
    return Failure(422, "INVALID_PAYLOAD", f"{field} {message}", details=details)


def not_one_of(field: str, words: list[str]) -> Failure:
    return wrong(field, f"must be {'one of ' if len(words) > 1 else ''}{', '.join(words)}", words)


def converted(given: Any, shape: type[T] | Any, at: str) -> Any:
    """`given` in that shape. Raises `Failure` with the field's full path, `at` being where `given` stands."""
    try:
        return msgspec.convert(given, shape)
    except msgspec.ValidationError as error:
        raise _explained(str(error), given, shape, at) from None


_FOUND = re.compile(r"(?P<what>.*?)(?: - at `\$(?P<path>[^`]*)`)?", re.DOTALL)
_FIELD = re.compile(r"Object (?:missing required|contains unknown) field `(.*)`", re.DOTALL)
_LENGTH = re.compile(r"Expected `(str|array)` of length (>=|<=|==) (\d+)")
_RANGE = re.compile(r"Expected `(?:int|float)` (>=|<=) (-?[\d.]+)")
_PATTERN = re.compile(r"Expected `str` matching regex '(.*)'")
_TYPE = re.compile(r"Expected `([a-z |]+)`(?:, got `\w+`)?")
_AT = {">=": "at least", "<=": "at most", "==": "exactly"}
_KINDS = {
    "str": "a text",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "array": "a list",
    "object": "an object",
    "datetime": "a date and time",
    "null": "null",
}


def _explained(said: str, given: Any, shape: Any, at: str) -> Failure:
    """msgspec's message, which may repeat what was sent, in words of ours."""
    found = _FOUND.fullmatch(said)
    what, path = (found["what"], found["path"] or "") if found else (said, "")
    field = at + path
    if match := _FIELD.fullmatch(what):
        field = f"{field}.{name_of(match[1])}"
        return wrong(field, "is required" if "missing" in what[:20] else "is not known here")
    if match := _LENGTH.fullmatch(what):
        unit = "characters" if match[1] == "str" else "items"
        return wrong(field, f"must have {_AT[match[2]]} {match[3]} {unit}", int(match[3]))
    if match := _RANGE.fullmatch(what):
        limit = float(match[2])
        limit = int(limit) if limit.is_integer() else limit
        return wrong(field, f"must be {_AT[match[1]]} {limit}", limit)
    if match := _PATTERN.fullmatch(what):
        return wrong(field, _PATTERNS[match[1].replace("\\\\", "\\")])
    if what.startswith(("Invalid value", "Invalid enum value")):
        steps = re.findall(r"\[(\d+)\]|([^.\[\]]+)", path)
        words = _words(type_info(shape), given, [int(number) if number else name for number, name in steps])
        return not_one_of(field, sorted(set(words)))
    if "datetime" in what:
        return wrong(field, "must be a date and time with its offset, like 2026-10-01T09:00:00-03:00")
    if match := _TYPE.fullmatch(what):
        kinds = [_KINDS[kind] for kind in match[1].split(" | ") if kind in _KINDS]
        return wrong(field, f"must be {' or '.join(kinds)}")
    return wrong(field, "is not of the right form")


def name_of(key: str) -> str:
    """A field's name as the sender chose it, if it is one to be repeated."""
    return key if re.fullmatch(r"[A-Za-z0-9_-]{1,64}", key) else "?"


def _words(node: Type, given: Any, path: list[str | int]) -> Iterator[str]:
    """The words that are allowed at a path of a shape; where there are several shapes, of the one that was given."""
    if isinstance(node, UnionType):
        for one in node.types:
            if not isinstance(one, StructType) or path == [one.tag_field] or _is_tagged(given, one):
                yield from _words(one, given, path)
    elif not path:
        if isinstance(node, LiteralType):
            yield from (str(value) for value in node.values)
    elif isinstance(node, ListType):
        yield from _words(node.item_type, given[path[0]], path[1:])
    elif isinstance(node, StructType):
        if node.tag_field == path[0]:
            yield str(node.tag)
        for part in node.fields:
            if part.encode_name == path[0]:
                yield from _words(part.type, given[path[0]], path[1:])


def _is_tagged(given: Any, shape: StructType) -> bool:
    return shape.tag_field is None or given[shape.tag_field] == shape.tag
