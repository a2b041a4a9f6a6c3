"""The pictures: curves by hand, the table of the worked pair, and a script that draws if it can."""

import importlib.util
import math
import sys

import pictures
import pytest
import torch
from torch import tensor
from torch.testing import assert_close

from losses import OBJECTIVES

MARGIN = tensor([-3.0, -0.5, 0.0, 2.0], dtype=torch.float64)


def curve(name, **settings):
    return pictures.curve(OBJECTIVES[name], MARGIN, **settings)


@pytest.mark.parametrize("name, settings", [("dpo", {}), ("simpo", {"gamma": 0.0}), ("dpo_norm", {})])
def test_curve_of_a_logistic_loss(name, settings):
    """Δ = d = Δ̃ = margin: L = log(1 + e^−m), and s_w is pushed up by 1/(1 + e^m)."""
    loss, push = curve(name, beta=1.0, **settings)
    assert_close(loss, torch.log(1 + torch.exp(-MARGIN)))
    assert_close(push, 1 / (1 + torch.exp(MARGIN)))


def test_curve_of_a_hinge_rests_from_its_margin_on():
    loss, push = curve("repo", gamma=1.0)
    assert_close(loss, tensor([4.0, 1.5, 1.0, 0.0], dtype=torch.float64))
    assert_close(push, tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.float64))


def test_curve_of_one_completion_runs_over_its_log_ratio():
    """kto with z = 0: 1 − σ(u) if desirable, σ(u) if not, and the pushes are ±σ(u)σ(−u)."""
    sigma = 1 / (1 + torch.exp(-MARGIN))
    for desirable, expected, sign in ((True, 1 - sigma, 1), (False, sigma, -1)):
        loss, push = curve("kto", beta=1.0, desirable=desirable)
        assert_close(loss, expected)
        assert_close(push, sign * sigma * (1 - sigma))


def test_curve_of_a_weighted_loss_has_the_chosen_response_in_its_weight_but_no_gradient_through_it():
    """online_simpo with the policy as its own past: log w = Δ = m, so L = e^m log(1 + e^−m) at γ = 0."""
    loss, push = curve("online_simpo", beta=1.0, gamma=0.0)
    assert_close(loss, torch.exp(MARGIN) * torch.log(1 + torch.exp(-MARGIN)))
    assert_close(push, torch.exp(MARGIN) / (1 + torch.exp(MARGIN)))


def test_curve_of_a_margin_that_the_data_have():
    """rpo_bwd at a score margin of 2 and β = η = 1: KL(σ(2) ‖ σ(m)), whose slope in m is σ(m) − σ(2), 0 at m = 2."""
    loss, push = curve("rpo_bwd", beta=1.0)
    p, q = 1 / (1 + torch.exp(tensor(-2.0, dtype=torch.float64))), 1 / (1 + torch.exp(-MARGIN))
    assert_close(loss, p * torch.log(p / q) + (1 - p) * torch.log((1 - p) / (1 - q)))
    assert_close(push, p - q)


def test_every_curve_of_the_picture_is_finite():
    margin = torch.linspace(-3.5, 3.5, 281)
    for name, settings in [member for family in pictures.FAMILIES.values() for member in family]:
        assert all(torch.isfinite(x).all() for x in pictures.curve(OBJECTIVES[name], margin, **settings)), name


def test_labels():
    assert pictures.label("dpo", {"beta": 1.0}) == "dpo"
    assert pictures.label("gamma_simpo", {"beta": 1.0, "gamma": 1.0, "tau": 0.5}) == "gamma_simpo γ=1.0 τ=0.5"
    assert pictures.label("f_dpo", {"beta": 1.0, "divergence": "js"}) == "f_dpo js"
    assert pictures.label("kto", {"desirable": False}) == "kto undesirable"


@pytest.mark.skipif(not importlib.util.find_spec("matplotlib"), reason="needs matplotlib")
def test_script_draws_the_objectives(tmp_path, capsys):
    picture = tmp_path / "objectives.png"
    pictures.main(["objectives", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG") and str(picture) in capsys.readouterr().out


def test_script_without_matplotlib_says_how_to_get_the_picture(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match="pip install matplotlib"):
        pictures.main(["objectives", str(tmp_path / "objectives.png")])
    assert not list(tmp_path.iterdir())


# ---- the table


@pytest.mark.parametrize("width", [80, 100, 128])
def test_table_names_every_objective_and_fits_the_terminal(width):
    lines = pictures.table(width).splitlines()
    assert [line.split()[0] for line in lines[2:] if not line.startswith(" ")] == list(OBJECTIVES)
    assert max(map(len, lines)) == width


def test_table_shows_the_worked_pair():
    """dpo: −logσ(0.4) and −0.1σ(−0.4); sppo: 2 · 498² and −2 · 498; what each asks for."""
    rows = {line.split()[0]: (line[14:33].strip(), *line[33:].split()[:2]) for line in pictures.table().splitlines()}
    assert rows["dpo"] == ("ref", f"{math.log1p(math.exp(-0.4)):.4f}", f"{-0.1 / (1 + math.exp(0.4)):.4f}")
    assert rows["sppo"][1:] == ("496008.0000", "-996.0000")
    needs = dict(slic="–", orpo="len", tdpo1="ref kl", kto="ref rows batch", amapo="len batch", ld_dpo="ref prefix")
    assert {name: rows[name][0] for name in needs} == needs and rows["online_simpo"][0] == "ref old len (batch)"


def test_script_prints_the_table_as_wide_as_the_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "90")
    pictures.main(["--table"])
    printed = capsys.readouterr().out
    assert pictures.table(90) in printed and max(map(len, printed.splitlines())) == 90


def test_a_long_name_does_not_move_the_columns():
    lines = pictures.table().splitlines()
    assert {line.index(".") for line in lines[2:] if not line.startswith(" ")} == {lines[2].index(".")}
