"""What was measured once is found again; a cache that is broken or cannot be written costs time and nothing else."""

import pytest
from small_profiles import MACHINE

from harmony_lightning.profiler.cache import cache_folder, cached, fingerprint
from harmony_lightning.profiler.machine import Machine


def never():
    raise AssertionError("it was there")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HARMONY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_record_is_made_once(folder):
    assert cached(Machine, "a", lambda: MACHINE) == (MACHINE, False)
    assert cached(Machine, "a", never) == (MACHINE, True)
    assert [path.name for path in folder.iterdir()] == ["machine-a.json"]


def test_a_broken_file_is_made_again(folder, caplog):
    folder.mkdir()
    (folder / "machine-a.json").write_text("{")
    assert cached(Machine, "a", lambda: MACHINE) == (MACHINE, False)
    assert "cannot be read and is made again" in caplog.text
    assert cached(Machine, "a", never) == (MACHINE, True)


def test_a_folder_that_cannot_be_written_is_told(folder, caplog):
    folder.parent.joinpath("cache").write_text("a file")
    assert cached(Machine, "a", lambda: MACHINE) == (MACHINE, False)
    assert "set HARMONY_CACHE" in caplog.text


def test_where_the_cache_is(tmp_path):
    assert cache_folder({"HARMONY_CACHE": "off"}) is None
    assert cache_folder({"HARMONY_CACHE": "/a"}).as_posix() == "/a"
    assert cache_folder({"XDG_CACHE_HOME": "/b"}).as_posix() == "/b/harmony_lightning"
    assert cache_folder({}).parts[-2:] == (".cache", "harmony_lightning")


def test_without_a_cache_everything_is_made(monkeypatch):
    monkeypatch.setenv("HARMONY_CACHE", "off")
    assert cached(Machine, "a", lambda: MACHINE) == (MACHINE, False)
    assert cached(Machine, "a", lambda: MACHINE) == (MACHINE, False)


def test_fingerprints_keep_parts_apart():
    assert fingerprint("ab", "c") != fingerprint("a", "bc")
    assert fingerprint("ab", "c") == fingerprint("ab", "c")
