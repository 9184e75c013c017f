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
        """Raises ConfigurationError if the text is no such record."""
        try:
            return typing.cast(Self, _revive(cls, json.loads(text)))
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise ConfigurationError(f"this is no {cls.__name__} in JSON: {error}") from error


def _revive(kind: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return kind(**{name: _revive(hints[name], item) for name, item in value.items()})  # type: ignore[operator]
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        return tuple(_revive(arguments[0], item) for item in value)
    if origin is types.UnionType and value is not None:
        return _revive(next(kind for kind in arguments if kind is not types.NoneType), value)
    return value
