"""Cases of parametrized tests."""

import pytest


def slow(*values):
    """A case that only `pytest -m slow` runs."""
    return pytest.param(*values, marks=pytest.mark.slow)
