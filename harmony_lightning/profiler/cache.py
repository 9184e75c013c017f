"""Profiles and machines of former runs, by fingerprint of what they depend on.

They lie in `$HARMONY_CACHE`, else in `$XDG_CACHE_HOME/harmony_lightning`, else in `~/.cache/harmony_lightning`;
`HARMONY_CACHE=off` keeps none. A file that cannot be read or written is no reason to stop: things are measured again.
"""

import hashlib
import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from harmony_lightning.errors import ConfigurationError
from harmony_lightning.record import Record

log = logging.getLogger(__name__)

R = TypeVar("R", bound=Record)


def fingerprint(*parts: str) -> str:
    """The same for the same parts, in the same order."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{len(part)}:".encode())
        digest.update(part.encode())
    return digest.hexdigest()[:24]


def cache_folder(variables: Mapping[str, str] = os.environ) -> Path | None:
    """None if nothing is to be kept."""
    chosen = variables.get("HARMONY_CACHE")
    if chosen == "off":
        return None
    if chosen:
        return Path(chosen)
    base = variables.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "harmony_lightning"


def cached(kind: type[R], key: str, make: Callable[[], R]) -> tuple[R, bool]:
    """The record under this key, made and kept if there is none; and whether it was there."""
    folder = cache_folder()
    if folder is None:
        return make(), False
    path = folder / f"{kind.__name__.lower()}-{key}.json"
    if (found := _read(kind, path)) is not None:
        return found, True
    made = make()
    _write(path, made.to_json())
    return made, False


def _read(kind: type[R], path: Path) -> R | None:
    try:
        return kind.from_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError, ConfigurationError) as error:
        log.warning("harmony: %s cannot be read and is made again: %s", path, error)
        return None


def _write(path: Path, text: str) -> None:
    """Whole or not at all: another process may read it meanwhile."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            Path(name).replace(path)
        except BaseException:
            with suppress(OSError):
                Path(name).unlink()
            raise
    except OSError as error:
        log.warning(
            "harmony: cannot keep %s: %s; set HARMONY_CACHE to a folder that can be written, or to off", path, error
        )
