"""The one "mean ± spread": against Python's own statistics, and nowhere another one."""

import re
import statistics
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.report.spreads import mean_and_spread, spread, standard_error

REPOSITORY = Path(__file__).parents[2]
# What is standardised, or drawn as wide as the target: no spread of results.
COMPUTED = {"xp_dataset_distillation/moments.py", "xp_drmmd/problems.py"}


ROW = st.lists(st.floats(-1e3, 1e3, width=32), min_size=3, max_size=3)


@settings(max_examples=20)
@given(st.lists(ROW, min_size=1, max_size=5))
def test_spreads_are_those_of_the_sample(rows):
    for values, axis in ((np.array(rows), 0), (np.array(rows, np.float32), (0,)), (rows, 0)):
        columns = list(zip(*rows))
        expected = [statistics.stdev(one) if len(rows) > 1 else 0 for one in columns]
        np.testing.assert_allclose(spread(values, axis), expected, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(
            standard_error(values, axis), np.array(expected) / len(rows) ** 0.5, atol=1e-9
        )
    flat = [value for row in rows for value in row]
    expected = statistics.stdev(flat)
    np.testing.assert_allclose(spread(np.array(rows), (0, 1)), expected, rtol=1e-9, atol=1e-9)
    mean, shown = map(float, mean_and_spread(rows, ".4f", ".6f").split(" ± "))
    assert mean == pytest.approx(statistics.mean(flat), abs=1e-4)
    assert shown == pytest.approx(expected, abs=1e-5)


def test_one_value_has_no_spread_and_none_has_no_mean():
    assert mean_and_spread([0.5], ".1f") == mean_and_spread(0.5, ".1f") == "0.5"
    assert spread([0.5]) == standard_error([0.5]) == 0
    with pytest.raises(ValueError, match="no value"):
        mean_and_spread([], ".1f")


def test_nothing_else_takes_standard_deviations_of_results():
    files = [
        p for q in ("lib/**/*.py", "xp_*/**/*.py", "benchmarks/*.py") for p in REPOSITORY.glob(q)
    ]
    found = {
        path.relative_to(REPOSITORY).as_posix()
        for path in [*files, *REPOSITORY.glob("notebooks/*.ipynb")]
        for line in path.read_text().splitlines()
        if re.search(r"\b(nan)?(std|stdev|pstdev|var|variance)\(|ddof", line)
        and "standardised = " not in line
    }
    assert found - COMPUTED == {"lib/report/spreads.py"}
