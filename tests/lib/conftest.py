import jaxtyping
import pytest

from lib import runs


@pytest.fixture
def run(tmp_path):
    return runs.open_run(tmp_path, "xp", "test", {}, seed=0)


@pytest.fixture
def unannotated(monkeypatch):
    """Without the shape checks of these tests, as a user meets the functions."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
