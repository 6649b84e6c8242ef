"""Checks of settings and choices among names."""

from dataclasses import dataclass

import pytest

from lib.runs import settings


@dataclass(frozen=True)
class Config:
    size: int = 1
    rate: float = 0.5


@dataclass(frozen=True)
class Arguments(Config):
    seed: int = 0


@pytest.mark.parametrize(
    ("check", "good", "bad", "said"),
    [
        (settings.check_sizes, (1, 7), (0, -1), "at least 1"),
        (settings.check_positive, (1e-9, 3.0), (0.0, -1.0, float("inf"), float("nan")), "positive"),
        (settings.check_not_negative, (0.0, 3.0), (-1.0, float("inf"), float("nan")), "at least 0"),
    ],
)
def test_checks_name_the_field_and_its_value(check, good, bad, said):
    for value in good:
        check(Config(rate=value), "rate", "size")
    for value in bad:
        with pytest.raises(ValueError, match=f"rate must be {said}.*got {value}"):
            check(Config(rate=value), "size", "rate")


def test_a_commands_arguments_hold_its_settings():
    found = settings.settings_of(Config, Arguments(size=3, rate=0.25, seed=9))
    assert type(found) is Config
    assert found == Config(3, 0.25)


def test_names_that_are_chosen():
    there = {"b": 1, "a": 2}
    assert settings.chosen((), there, kind="group") == ("b", "a")
    assert settings.chosen(("a",), there, kind="group") == ("a",)
    with pytest.raises(ValueError, match="no group x, y; there are b, a"):
        settings.chosen(("y", "a", "x"), there, kind="group")
