"""Settings as frozen dataclasses: their checks, and what commands make of their arguments."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, cast

Settings = TypeVar("Settings")


def check_sizes(config: Any, *names: str) -> None:
    """Raises ValueError unless each of these fields is at least 1."""
    for name in names:
        if not getattr(config, name) >= 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")


def check_positive(config: Any, *names: str) -> None:
    """Raises ValueError unless each of these fields is positive and finite."""
    for name in names:
        if not 0 < getattr(config, name) < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {getattr(config, name)}")


def check_not_negative(config: Any, *names: str) -> None:
    """Raises ValueError unless each of these fields is at least 0 and finite."""
    for name in names:
        if not 0 <= getattr(config, name) < math.inf:
            raise ValueError(f"{name} must be at least 0 and finite, got {getattr(config, name)}")


def settings_of(kind: type[Settings], arguments: Any) -> Settings:
    """The `kind` with the fields that `arguments` have of it (a command's that extends it)."""
    fields = dataclasses.fields(cast(Any, kind))
    return kind(**{field.name: getattr(arguments, field.name) for field in fields})


def chosen(wanted: Iterable[str], available: Mapping[str, Any], *, kind: str) -> tuple[str, ...]:
    """The names that are wanted, or all where none is. Raises ValueError on one that is not there,
    naming those that are."""
    if unknown := set(wanted) - set(available):
        missing, there = (", ".join(map(repr, names)) for names in (sorted(unknown), available))
        raise ValueError(f"no {kind} {missing}; there are {there}")
    return tuple(wanted) or tuple(available)
