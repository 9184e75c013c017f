"""Memory sizes as people write them."""

import re

from harmony_lightning.errors import ConfigurationError

_FACTORS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    _FACTORS[f"{_letter}b"] = 1000**_power
    _FACTORS[f"{_letter}ib"] = 1024**_power
_PATTERN = re.compile(r"\s*([0-9]*\.?[0-9]+(?:e\+?[0-9]{1,2})?)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_nbytes(text: str | int | float) -> int:
    """Bytes from "64MiB", "11GB", "9e9" or a plain number.

    Raises:
        ConfigurationError: the text is no size, or the size is not positive.
    """
    match = _PATTERN.fullmatch(str(text))
    if match is None or match[2].lower() not in _FACTORS:
        raise ConfigurationError(f"{text!r} is not a memory size; write bytes or a unit, such as '64MiB' or '11GB'")
    nbytes = int(float(match[1]) * _FACTORS[match[2].lower()])
    if nbytes <= 0:
        raise ConfigurationError(f"a memory size must be positive, got {text!r}")
    return nbytes


def format_nbytes(nbytes: float) -> str:
    """ "1.5 GiB": four significant digits in the largest binary unit that fits."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(nbytes) < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.4g} {unit}"
        nbytes /= 1024
    return f"{nbytes:.4g} TiB"
