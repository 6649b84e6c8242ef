"""Training curves: points that add up, pairs by seed, longer trainings that go on."""

import json
from dataclasses import replace

import numpy as np
import pytest

from xp_gmm_source import curves
from xp_gmm_source.curves import BASELINE, Arguments


def point(label, seed, step, value, width=32):
    measures = {"frechet": [value], "samplers": ["euler 5"], "floor": {"frechet": 0.1}}
    return {"label": label, "seed": seed, "step": step, "width": width, **measures}


def test_differences_are_paired_by_seed():
    """1 and 3 less 2 and 2 is 0 on average, with the standard error 1; a seed without a partner
    counts in the mean only."""
    points = [point(BASELINE, 0, 1000, 2.0), point(BASELINE, 1, 1000, 2.0)]
    points += [point("GMM-10, OT", seed, 1000, value) for seed, value in enumerate((1.0, 3.0))]
    points += [point("DCT, OT", 0, 2000, 4.0), point("DCT, OT", 0, 1000, 9.0, width=16)]
    narrow, wide = curves.tables(points)
    assert narrow.rows == [["DCT, OT", "9"]]
    assert wide.heads == ["source", "1,000", "2,000"]
    assert wide.rows[0] == [BASELINE, "2 ± 0", "-"]
    assert wide.rows[1] == ["GMM-10, OT", "2 ± 1 (+0.00 ± 1.96)", "-"]
    assert wide.rows[2] == ["DCT, OT", "-", "4"]


def test_unknown_labels_are_named_before_any_training(tmp_path):
    with pytest.raises(ValueError, match="no flow 'GMM'; there are 'Gaussian', 'Gaussian, OT', "):
        curves.main(Arguments("digits", labels=("GMM",), results=tmp_path))


@pytest.mark.slow
def test_a_curve_grows(tmp_path, monkeypatch):
    """A third mark goes on from the second; points that are given are not made again."""
    small = Arguments(
        "digits", labels=(BASELINE,), seeds=(0,), width=8, marks=(2, 4), euler=(2,), heun=(2,),
        num_samples=20, results=tmp_path / "one",
    )  # fmt: skip
    path = curves.main(small)
    first = json.loads(path.read_text())["points"]
    assert [p["step"] for p in first] == [2, 4]
    assert path.with_suffix(".png").exists()
    sizes, fit = [], curves.flow.flow_matching.fit

    def counted(*arguments, num_steps, **options):
        sizes.append(num_steps)
        return fit(*arguments, num_steps=num_steps, **options)

    monkeypatch.setattr(curves.flow.flow_matching, "fit", counted)
    longer = json.loads(curves.main(replace(small, marks=(2, 4, 6))).read_text())["points"]
    assert longer[:2] == first
    assert sizes == [6]
    other = replace(small, marks=(4, 6), add_to=path, results=tmp_path / "two")
    curves.main(other)
    assert sizes == [6]
    whole = curves.main(replace(other, add_to=None, results=tmp_path / "three"))
    (_, last) = json.loads(whole.read_text())["points"]
    np.testing.assert_array_equal(last["frechet"], longer[2]["frechet"])
