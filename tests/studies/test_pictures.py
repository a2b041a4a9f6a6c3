"""The pictures: curves by hand, the table of the worked pair, and a script that draws if it can."""

import importlib.util
import math
import sys
from collections import Counter

import pictures
import pytest
import torch
from torch import tensor
from torch.testing import assert_close

import logprobs
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


def drawn(member, margin=MARGIN):
    """Loss and push of a curve of the picture, named as in its legend."""
    assert any(member in members.split(", ") for _, members in pictures.FAMILIES.values()), member
    name, *words = member.split()
    return pictures.curve(OBJECTIVES[name], margin, **pictures.settings_of(words))


def test_every_curve_of_the_picture_is_finite():
    margin = torch.linspace(-3.5, 3.5, 281)
    for _, members in pictures.FAMILIES.values():
        for member in members.split(", "):
            assert all(torch.isfinite(x).all() for x in drawn(member, margin)), member


def test_what_is_odd_in_the_picture_is_so():
    """Signs of the pushes at both sides of the places that the notes name, by the docstrings' gradients."""

    def push(member, *margins):
        return drawn(member, tensor(margins, dtype=torch.float64))[1]

    edges = {"focal β=1 γ=1": (-0.55, -0.53), "rso_hinge β=1": (1.01, 0.99), "repo γ=1": (1.01, 0.99), "nca β=1": (1.39, 1.38)}
    edges |= {"dpo β=1 ε=0.1": (2.2, 2.19), "exo β=1 ε=0.1": (2.2, 2.19)}  # log 9 = 2.197, 2 log 2 = 1.386
    edges |= {f"{name} β=1": (2.01, 1.99) for name in ("rpo_sq", "rpo_bwd", "rpo_fwd")}
    for member, margins in edges.items():
        down, up = push(member, *margins)
        assert down <= 0 < up, member
    assert (push("discopop β=0.05 τ=0.05", -1, 0, 1) < 0).all() and (push("apo_down β=1", -3, 0, 3) <= 0).all()
    left, right = push("dpop β=1 λ=1", -0.01, 0.01)
    assert left > 1.95 * right  # 1 + λ times as hard
    assert (push("simper", -3, -1, 1, 3).diff() > 0).all() and (drawn("online_simpo β=1 γ=1")[0].diff() > 0).all()
    assert_close(push("slic δ=1 λ=0.1", 0.99, 1.01), tensor([1.1, 0.1], dtype=torch.float64))
    assert_close(push("rrhf λ=1", -0.01, 0.01), tensor([2.0, 1.0], dtype=torch.float64))
    forward, js = (push(f"f_dpo β=1 f={kind}", -1) for kind in ("forward_kl", "js"))
    assert js < push("f_dpo β=1 f=reverse_kl", -1) < push("f_dpo β=1 f=alpha", -1) < forward


def test_objectives_without_a_curve_have_another_ones():
    """One token at a common level does not tell these apart; it has no prefix, no draw and no batch worth the name."""
    twins = dict(dpo_norm="dpo", rdpo="dpo", tdpo1="dpo", tdpo2="dpo", aot="dpo", alpha_dpo_kl="simpo", uapo="bco")
    twins["apo_zero_unpaired"] = "kto"
    for name, twin in twins.items():
        settings = {"beta": 1.0} | ({"gamma": 1.0} if twin == "simpo" else {})
        assert_close(curve(name, **settings), curve(twin, **settings))
    members = [member for _, members in pictures.FAMILIES.values() for member in members.split(", ")]
    left_out = set(OBJECTIVES) - {member.split()[0] for member in members} - set(twins)
    assert left_out == {"sft", "ld_dpo", "beta_dpo", "aot_unpaired", "gamma_dpo"}


def test_settings_of_a_legend():
    assert pictures.settings_of([]) == {}
    assert pictures.settings_of(["β=1", "γ=1", "τ=0.5"]) == {"beta": 1.0, "gamma": 1.0, "tau": 0.5}
    assert pictures.settings_of(["β=1", "f=js"]) == {"beta": 1.0, "divergence": "js"}


# ---- the pair


@pytest.mark.parametrize("prompt, responses", [(8, [6, 4]), (1, [1, 3]), (3, [5, 1])])
def test_mask_of_the_picture(prompt, responses):
    """Token i sees j ≤ i in the prompt or in its own response: the rule, written out for every pair of tokens."""
    part = [0] * prompt + [1] * responses[0] + [2] * responses[1]
    seen = pictures.attention([(prompt, responses)])
    for i in range(len(part)):
        for j in range(len(part)):
            assert seen[i, j] == (j <= i and part[j] in (0, part[i])), (i, j)
    additive = logprobs.pairs_mask([(prompt, responses)], torch.float32, "cpu")[0, 0]
    assert torch.equal(seen, additive == 0)  # what models get whose attention cannot be exchanged


@pytest.mark.skipif(not importlib.util.find_spec("matplotlib"), reason="needs matplotlib")
@pytest.mark.parametrize("what", ["objectives", "pair"])
def test_script_draws(tmp_path, capsys, what):
    picture = tmp_path / "drawn.png"
    pictures.main([what, str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG") and str(picture) in capsys.readouterr().out


@pytest.mark.skipif(not importlib.util.find_spec("matplotlib"), reason="needs matplotlib")
def test_the_drawn_pair(tmp_path, monkeypatch):
    """Its texts: a token's word in the row, beside the mask, in the padded batch, and over the position that predicts it."""
    figures = []
    monkeypatch.setattr(pictures, "write", lambda figure, _: figures.append(figure))
    pictures.pair("")
    texts = [(text.get_text(), *text.get_position()) for text in figures[0].axes[0].texts]
    above = sorted((y, x, text) for text, x, y in texts if y < 3 and len(text) < 10)
    prompt, chosen, rejected = 8, "mango cherry and cat dog <end>".split(), "sure plum shirt <end>".split()
    assert [text for *_, text in above] == chosen + rejected
    assert [x - 0.5 for _, x, _ in above] == [7, 8, 9, 10, 11, 12] + [7, 14, 15, 16]  # <assistant> predicts both first tokens
    counts = Counter(text for text, *_ in texts)
    assert counts["mango"] == 4 and counts["<assistant>"] == 4 and counts["padding"] == 2
    assert (
        "padded: 2 × 14 = 28 tokens" in counts and prompt + len(chosen) + len(rejected) == 18 and "packed:\n18 tokens" in counts
    )


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
