"""Real text that is already on every machine: the source files of Python's own standard library (PSF licence)."""

import os
import sysconfig
import zlib
from pathlib import Path

_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}


def source_files(package: str = "") -> list[Path]:
    """The .py files of the standard library, or of one of its packages: mixed, but always in the same order."""
    root = Path(sysconfig.get_path("stdlib"), package)
    paths = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = set(subfolders) - _SKIPPED
        paths += [Path(folder, name) for name in names if name.endswith(".py")]
    # Neighbours are alike (a hundred character tables in `encodings`); checksums of their names scatter them.
    return sorted(paths, key=lambda path: (zlib.crc32(path.relative_to(root).as_posix().encode()), path))
