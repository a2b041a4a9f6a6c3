"""The comparison with other libraries: its sums, its verdicts, and what it says of what is not there."""

import importlib.util

import elsewhere
import pytest
import torch
from elsewhere import Line, ours
from torch.testing import assert_close


def test_sums_are_those_of_each_response():
    pairs = elsewhere.random_pairs()
    sums, lengths = pairs.sums(), [int(row.sum()) for row in pairs.mask]
    for i in range(elsewhere.PAIRS):
        of = (i, i + elsewhere.PAIRS)  # chosen, rejected
        shortest = min(lengths[j] for j in of)
        assert sums.length[i].tolist() == [lengths[j] for j in of]
        assert_close(sums.logp[i], torch.stack([pairs.logp[j, : lengths[j]].sum() for j in of]))
        assert_close(sums.ref_prefix_logp[i], torch.stack([pairs.ref[j, :shortest].sum() for j in of]))


@pytest.mark.parametrize(
    "line, code, said",
    [
        (Line("dpo", "here", lambda: ours("dpo"), "dpo"), 0, "| equal |"),
        (Line("dpo", "here", lambda: ours("dpo(beta=0.11)"), "dpo"), 1, "| DIFFERENT |"),
        (Line("dpo", "here", lambda: ours("dpo(beta=0.11)"), "dpo", "another β"), 0, "| another β |"),
        (Line("dpo", "here", lambda: ours("dpo"), "dpo", "another β"), 1, "| EQUAL, though another β |"),
        (Line("dpo", "here", lambda: ours("dpo", wpo=True), "weighed", "", True), 0, "| equal |"),
        (Line("dpo", "nowhere", lambda: pytest.fail("not installed"), "dpo"), 0, "nowhere is not installed"),
    ],
)
def test_verdicts(monkeypatch, capsys, line, code, said):
    monkeypatch.setattr(elsewhere, "LINES", (line,))
    monkeypatch.setattr(elsewhere.importlib.metadata, "version", version_of)
    assert elsewhere.main([]) == code
    assert said in capsys.readouterr().out


def version_of(name: str) -> str:
    if name == "here":
        return "1.0"
    raise elsewhere.importlib.metadata.PackageNotFoundError(name)


@pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="liger_kernel is not installed")
def test_liger_is_called_as_it_stands():
    lines = [line for line in elsewhere.LINES if line.library == "liger_kernel"]
    assert all(max(elsewhere.compare(line)[2:]) < elsewhere.BOUND for line in lines)
