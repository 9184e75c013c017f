"""Frozen records that go to JSON and come back equal."""

import dataclasses
import json
import types
import typing
from typing import Any, Self

from harmony_lightning.errors import ConfigurationError


class Record:
    """Base of the dataclasses that cross rooms: `to_json` and `from_json` are inverse."""

    __slots__ = ()

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)  # type: ignore[call-overload]

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Raises ConfigurationError if the text is no such record, with the place of the fault, such as packs[2].nbytes."""
        try:
            return typing.cast(Self, _revive(cls, json.loads(text), ""))
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise ConfigurationError(f"this is no {cls.__name__} in JSON: {error}") from error


_NUMBERS = {int: "a whole number", float: "a number"}
_LEAVES = {str: "text", bool: "true or false", **_NUMBERS}


def _revive(kind: Any, value: Any, place: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return _revive_record(kind, value, place)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        if not isinstance(value, list):
            raise _fault(place, "must be a list", value)
        return tuple(_revive(arguments[0], item, f"{place}[{index}]") for index, item in enumerate(value))
    if origin is types.UnionType and value is not None:
        return _revive(next(kind for kind in arguments if kind is not types.NoneType), value, place)
    if kind in _NUMBERS and isinstance(value, int | float) and not isinstance(value, bool) and value == kind(value):
        return kind(value)
    if kind in _LEAVES and (kind in _NUMBERS or not isinstance(value, kind)):
        raise _fault(place, f"must be {_LEAVES[kind]}", value)
    return value


def _revive_record(kind: Any, value: Any, place: str) -> Any:
    if not isinstance(value, dict):
        raise _fault(place, "must be an object", value)
    hints = typing.get_type_hints(kind)
    inside = {name: f"{place}.{name}" if place else name for name in (*value, *hints)}
    for name in value:
        if name not in hints:
            raise ValueError(f"{inside[name]} is no field of a {kind.__name__}, which has {', '.join(hints)}")
    for field in dataclasses.fields(kind):
        if field.name not in value and field.default is dataclasses.MISSING:
            raise ValueError(f"{inside[field.name]} is missing")
    values = {name: _revive(hints[name], item, inside[name]) for name, item in value.items()}
    try:
        return kind(**values)
    except ConfigurationError as error:
        raise ConfigurationError(f"{place}: {error}" if place else str(error)) from error


def _fault(place: str, what: str, value: Any) -> ValueError:
    shown = repr(value)
    return ValueError(f"{place or 'it'} {what}, got {shown if len(shown) <= 40 else shown[:37] + '...'}")
