"""Reading records that other people's tools wrote: every field is checked, and what is wrong is named with its place.

`Record.from_json` is the inverse of `to_json` and takes nothing else. Profiles and machines come from outside, with fields
that we do not know and numbers that may be missing or negative; a plan made from such numbers would be worthless.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harmony_lightning.errors import ConfigurationError


class Fields:
    """One JSON object and where it stands, such as `layer_kinds[3]` of a profile."""

    def __init__(self, values: Any, what: str, place: str = "") -> None:
        self._what = what
        self._place = place
        if not isinstance(values, Mapping):
            raise self.error("", f"must be a JSON object, got {_shown(values)}")
        self._values = values

    @classmethod
    def parse(cls, text: str, what: str) -> "Fields":
        """Raises ConfigurationError if the text is no JSON object. `what` it is, such as "a profile", is for messages."""
        try:
            return cls(json.loads(text), what)
        except json.JSONDecodeError as error:
            raise ConfigurationError(f"this is not {what}: not JSON ({error})") from error

    def error(self, name: str, problem: str) -> ConfigurationError:
        place = ".".join(part for part in (self._place, name) if part) or "it"
        return ConfigurationError(f"this is not {self._what}: {place} {problem}")

    def text(self, name: str, default: str = "") -> str:
        value = self._values.get(name, default)
        if not isinstance(value, str):
            raise self.error(name, f"must be text, got {_shown(value)}")
        return value

    def number(self, name: str, *, default: float | None = None, above: float = -math.inf) -> float:
        """A finite number of at least 0, and more than `above`. Raises ConfigurationError otherwise."""
        value = self._require(name, default)
        if not _is_number(value) or value < 0 or value <= above:
            least = f"more than {above:g}" if above >= 0 else "at least 0"
            raise self.error(name, f"must be a number of {least}, got {_shown(value)}")
        return float(value)

    def count(self, name: str, *, default: int | None = None, least: int = 0) -> int:
        """A whole number; 9e9 and 9000000000.0 are whole too. Raises ConfigurationError otherwise."""
        value = self._require(name, default)
        if not _is_whole(value) or value < least:
            raise self.error(name, f"must be a whole number of at least {least}, got {_shown(value)}")
        return int(value)

    def numbers(self, name: str, length: int, per: str) -> tuple[float, ...]:
        """`length` numbers of at least 0, one per `per`. Raises ConfigurationError otherwise."""
        values = self._sequence(name)
        if len(values) != length:
            raise self.error(name, f"must hold {length} numbers, one per {per}, got {len(values)}")
        for index, value in enumerate(values):
            if not _is_number(value) or value < 0:
                raise self.error(f"{name}[{index}]", f"must be a number of at least 0, got {_shown(value)}")
        return tuple(float(value) for value in values)

    def tells(self, name: str) -> bool:
        """Whether there is anything under that name."""
        return self._values.get(name) not in (None, [], ())

    def is_true(self, name: str) -> bool:
        """A switch, off if it is missing. Raises ConfigurationError if it is none."""
        value = self._values.get(name, False)
        if not isinstance(value, bool):
            raise self.error(name, f"must be true or false, got {_shown(value)}")
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        """Texts; none if the name is missing. Raises ConfigurationError otherwise."""
        values = self._sequence(name) if self.tells(name) else ()
        for index, value in enumerate(values):
            if not isinstance(value, str):
                raise self.error(f"{name}[{index}]", f"must be text, got {_shown(value)}")
        return tuple(values)

    def counts(self, name: str, least: int = 0) -> tuple[int, ...]:
        """Whole numbers. Raises ConfigurationError otherwise."""
        values = self._sequence(name)
        for index, value in enumerate(values):
            if not _is_whole(value) or value < least:
                raise self.error(f"{name}[{index}]", f"must be a whole number of at least {least}, got {_shown(value)}")
        return tuple(int(value) for value in values)

    def object(self, name: str) -> "Fields":
        return Fields(self._require(name, None), self._what, self._inside(name))

    def objects(self, name: str) -> "list[Fields]":
        return [
            Fields(value, self._what, self._inside(f"{name}[{index}]"))
            for index, value in enumerate(self._sequence(name))
        ]

    def _inside(self, name: str) -> str:
        return f"{self._place}.{name}" if self._place else name

    def _require(self, name: str, default: Any) -> Any:
        value = self._values.get(name, default)
        if value is None:
            raise self.error(name, "is missing")
        return value

    def _sequence(self, name: str) -> Sequence[Any]:
        values = self._require(name, None)
        if not isinstance(values, list):
            raise self.error(name, f"must be a list, got {_shown(values)}")
        return values


def read_text(path: str | Path, what: str) -> str:
    """The text of a file. Raises ConfigurationError, naming the file, if there is none that can be read."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise ConfigurationError(f"cannot read {what} from {path}: {reason}") from error


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return _is_number(value) and value == int(value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
