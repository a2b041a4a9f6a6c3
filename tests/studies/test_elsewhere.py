"""The comparison with other libraries: its sums, its verdicts, and what it says of what is not there."""

import importlib.metadata
import importlib.util
import re
from pathlib import Path

import elsewhere
import pytest
import torch
from elsewhere import Line, ours
from torch.testing import assert_close

from losses import OBJECTIVES


def test_log_probs_are_those_of_each_response():
    pairs = elsewhere.random_pairs()
    outputs, inputs, lengths = pairs.outputs(), pairs.inputs(), [int(row.sum()) for row in pairs.mask]
    for i in range(elsewhere.PAIRS):
        of = (i, i + elsewhere.PAIRS)  # chosen, rejected
        shortest = min(lengths[j] for j in of)
        assert inputs["len"][i].tolist() == [lengths[j] for j in of]
        assert_close(outputs["logp"][i], torch.stack([pairs.logp[j, : lengths[j]].sum() for j in of]))
        assert_close(outputs["prefix_logp"][i], torch.stack([pairs.logp[j, :shortest].sum() for j in of]))
        assert_close(inputs["ref_prefix_logp"][i], torch.stack([pairs.ref[j, :shortest].sum() for j in of]))


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


def test_names_are_those_of_the_document(capsys):
    """`--names` prints them; each is an objective, named with all its settings, in the order of losses.py."""
    assert elsewhere.main(["--names"]) == 0
    printed = capsys.readouterr().out
    assert printed == elsewhere.names() + "\n"
    document = (Path(elsewhere.__file__).parent / "README.md").read_text()
    assert printed in document[document.index("## Parameter names elsewhere") :]
    assert list(elsewhere.NAMES) == [name for name in OBJECTIVES if name in elsewhere.NAMES]
    assert "| `dpo(beta, label_smoothing)` |" in printed and f"| trl {elsewhere.TRL} |" in printed


@pytest.mark.skipif(not importlib.util.find_spec("trl"), reason="needs trl")
def test_names_in_trl_are_in_its_source():
    """Where that version is installed: names in quotes are loss_types of its trainers, settings in their files."""
    if importlib.metadata.version("trl") != elsewhere.TRL:
        pytest.skip(f"needs trl {elsewhere.TRL}")
    root = Path(importlib.util.find_spec("trl").origin).parent
    files = [f"trainer/{x}_{y}.py" for x in ("dpo", "kto") for y in ("config", "trainer")]
    files += [f"experimental/{x}/{x}_config.py" for x in ("cpo", "orpo")]
    source = "".join((root / file).read_text() for file in files)
    for there, _ in elsewhere.NAMES.values():
        there = there.partition("(older")[0]
        for word in re.findall(r'"(\w+)"', there):
            assert f'"{word}"' in source or f"'{word}'" in source, there
        for word in re.findall(r"`(\w+)", there.replace("`trl.", "").replace("`coef`", "")):
            assert word in source, there
