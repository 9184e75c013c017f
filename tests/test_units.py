import pytest

from harmony_lightning import ConfigurationError
from harmony_lightning.units import format_nbytes, parse_nbytes


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("64MiB", 64 << 20),
        ("11GB", 11_000_000_000),
        ("11 gib", 11 << 30),
        (" 1.5 KiB ", 1536),
        (".5kb", 500),
        ("2TiB", 2 << 40),
        ("9e9", 9_000_000_000),
        ("1e3kib", 1_024_000),
        ("7B", 7),
        ("7", 7),
        (123, 123),
        (1e9, 1_000_000_000),
    ],
)
def test_sizes_as_people_write_them(text, nbytes):
    assert parse_nbytes(text) == nbytes


@pytest.mark.parametrize(
    "text", ["", "GiB", "much", "1 parsec", "1.", "1,5GB", "-1", "0x10", "nan", "inf", "1GiBs", True]
)
def test_what_is_no_size_is_refused_with_an_example(text):
    with pytest.raises(ConfigurationError, match=r"is not a memory size; write bytes or a unit, such as '64MiB'"):
        parse_nbytes(text)


@pytest.mark.parametrize("text", [0, "0GiB", "0.4"])
def test_a_size_is_positive(text):
    with pytest.raises(ConfigurationError, match="must be positive"):
        parse_nbytes(text)


def test_a_size_beyond_floats_is_refused():
    with pytest.raises(ConfigurationError):
        parse_nbytes("1e400")


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (120 << 10, "120 KiB"),
        (64 << 20, "64 MiB"),
        (int(17.2 * 2**30), "17.2 GiB"),
        (3 << 40, "3 TiB"),
        (-1536, "-1.5 KiB"),
    ],
)
def test_sizes_are_told_in_the_largest_unit_that_fits(nbytes, text):
    assert format_nbytes(nbytes) == text


@pytest.mark.parametrize("number", [1000, 1023])
def test_no_size_is_told_with_an_exponent(number):
    assert "e+" not in format_nbytes(number * 1024)


@pytest.mark.parametrize("unit", ["B", "KiB", "MiB", "GiB", "TiB"])
@pytest.mark.parametrize("number", [1, 2.5, 999])
def test_what_is_formatted_parses_back(number, unit):
    nbytes = parse_nbytes(f"{number}{unit}")
    assert parse_nbytes(format_nbytes(nbytes)) == pytest.approx(nbytes, rel=5e-3)
