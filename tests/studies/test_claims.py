"""The claims' arithmetic by hand, and the whole study on runs that are made up."""

import math

import claims
import lorr
import pytest
from claims import CLAIMS, LEARNING_RATES, RUNS, WORLDS, Claim

import train


def test_differences_by_hand():
    """Paired by seed: 0.1, 0.3 and 0.2 have mean 0.2 and standard deviation 0.1, so the standard error is 0.1/√3."""
    runs = {"a": [{"win_rate": x} for x in (0.6, 0.7, 0.9)], "b": [{"win_rate": x} for x in (0.5, 0.4, 0.7)]}
    mean, error = claims.differences(Claim("a wins", "win_rate", "a", "b"), runs)
    assert (mean, error) == pytest.approx((0.2, 0.1 / 3**0.5))
    assert claims.cell(Claim("a wins", "win_rate", "a", "b"), runs) == "holds: +20.0 ± 5.8"
    assert claims.cell(Claim("b wins", "win_rate", "b", "a"), runs) == "fails: -20.0 ± 5.8"
    assert claims.cell(Claim("a wins", "win_rate", "a", "b"), {**runs, "b": [{"error": "nan"}] * 3}).startswith("–")


def test_a_difference_within_two_errors_is_open():
    assert [claims.verdict(m, 1.0) for m in (2.1, 1.9, -1.9, -2.1)] == ["holds", "open", "open", "fails"]
    assert claims.verdict(math.nan, 1.0) == claims.verdict(1.0, math.nan) == "–"


def test_every_run_is_understood_and_every_claim_names_runs():
    for run in RUNS.values():
        train.try_objective(train.parse_objective(run["objective"]))
        kind = lorr.Settings if "replays" in run else train.Settings
        train.check_settings(kind(model="m", dataset="d", **run))
    for claim in CLAIMS:
        assert claim.more in RUNS and claim.less in RUNS and claim.measure in claims.MEASURES
    assert len(WORLDS) == 8


def test_the_whole_study(tmp_path, monkeypatch, capsys):
    """Made-up runs that win by their learning rate: the best one goes on; SimPER wins by 0.1 in every seed but for 0.01."""
    asked = []

    def made_up(jobs, file):
        asked.append(jobs)
        for job in jobs:
            win = 0.4 + 100 * job["lr"] + 0.1 * (job["objective"] == "simper") + 0.01 * (job["seed"] == 1)
            yield {"job": job, **dict.fromkeys(claims.MEASURES, 1.0), "win_rate": win}

    monkeypatch.setattr(claims, "run_jobs", lambda jobs, file: list(made_up(jobs, file)))
    claims.main(["--out", str(tmp_path / "out"), "--seeds", "2"])
    assert len(asked[0]) == 8 * len(RUNS) * len(LEARNING_RATES) and len(asked[1]) == 8 * len(RUNS) * 2
    assert {job["lr"] for job in asked[1]} == {max(LEARNING_RATES)} and {job["seed"] for job in asked[1]} == {0, 1}
    text = (tmp_path / "out" / "claims.md").read_text()
    assert text in capsys.readouterr().out and text.count("| SimPER is ahead of SimPO | holds: +10.0 ± 0.0 |") == 1
    assert "| SimPO is ahead of DPO | open: +0.0 ± 0.0 |" in text
    assert "| SimPER is ahead of SimPO | 8 | 0 | 0 |" in text and "| SimPO is ahead of DPO | 0 | 8 | 0 |" in text
