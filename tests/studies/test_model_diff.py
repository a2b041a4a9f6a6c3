"""Crosscoder, losses and what is read off against algebra and finite differences, and a small study with known truth."""

import json
import math

import model_diff
import pytest
import torch
import toy
from model_diff import AUX_WEIGHT, Coding, Crosscoder, auc, fit, latent_scaling, read_off, relative_norm, topk_loss

import data

QUICK = dict(latents=40, steps=800, batch=128, lr=3e-3)


def tiny() -> tuple[Crosscoder, torch.Tensor]:
    """A crosscoder of 5 latents for d = 3, and 4 tokens, in float64."""
    coder = Crosscoder(3, 5, seed=3).double()
    draw = torch.Generator().manual_seed(0)
    for p in coder.parameters():
        p.data = torch.randn(p.shape, generator=draw, dtype=torch.float64) / 2
    return coder, torch.randn(4, 2, 3, generator=draw, dtype=torch.float64)


def by_loops(coder: Crosscoder, x: torch.Tensor) -> tuple[list, list, list]:
    """Latents, reconstructions and norms as the formulas have them, number by number."""
    e, d, c = coder.encoder.tolist(), coder.decoder.tolist(), coder.shift.tolist()
    f = []
    for token in x.tolist():
        sums = [sum(token[m][i] * e[m][i][j] for m in range(2) for i in range(3)) for j in range(5)]
        f.append([max(0.0, y + bias) for y, bias in zip(sums, coder.bias.tolist())])
    n = [sum(math.sqrt(sum(v * v for v in d[m][j])) for m in range(2)) for j in range(5)]
    made = [[[sum(row[j] * d[m][j][i] for j in range(5)) + c[m][i] for i in range(3)] for m in range(2)] for row in f]
    return f, made, n


def test_the_l1_loss_by_loops():
    coder, x = tiny()
    f, made, n = by_loops(coder, x)
    squares = sum((x[t, m, i].item() - made[t][m][i]) ** 2 for t in range(4) for m in range(2) for i in range(3)) / 4
    norms = sum(f[t][j] * n[j] for t in range(4) for j in range(5)) / 4
    assert norms > 0.1
    loss, latents = model_diff.l1_loss(coder, x, 0.7)
    assert loss.item() == pytest.approx(squares + 0.7 * norms, rel=1e-12)
    assert torch.allclose(latents, torch.tensor(f, dtype=torch.float64))


@pytest.mark.parametrize("form", ["l1", "batchtopk"])
def test_gradients_by_finite_differences(form):
    coder, x = tiny()

    def loss():
        return model_diff.l1_loss(coder, x, 0.7)[0] if form == "l1" else topk_loss(coder, x, 1, torch.zeros(5).bool())[0]

    loss().backward()
    for p in coder.parameters():
        flat, h = p.data.view(-1), 1e-6
        for i in range(len(flat)):
            old, sides = flat[i].item(), []
            for flat[i] in (old + h, old - h):
                sides.append(loss().item())
            flat[i] = old
            assert p.grad.view(-1)[i].item() == pytest.approx((sides[0] - sides[1]) / (2 * h), abs=1e-6)


def test_dead_latents_explain_the_error():
    """Two latents, one an axis, the same in both models; k = 1 keeps latent 0, and latent 1 is dead."""
    coder = Crosscoder(2, 2).double()
    axes = torch.eye(2, dtype=torch.float64).expand(2, 2, 2)
    coder.decoder.data, coder.encoder.data, coder.shift.data = axes.clone(), axes / 2, torch.zeros(2, 2).double()
    x = torch.tensor([[4.0, 1.0], [4.0, 3.0]], dtype=torch.float64)[:, None].expand(2, 2, 2)
    nobody, dead = torch.tensor([False, False]), torch.tensor([False, True])
    # Latent 0 says 4 of both tokens; the errors (0, 1) and (0, 3) in both models make (2 · 1 + 2 · 9) / 2 = 10.
    loss, kept = topk_loss(coder, x, 1, nobody)
    assert loss.item() == pytest.approx(10.0) and kept.tolist() == [[4.0, 0.0], [4.0, 0.0]]
    loss.backward()
    assert coder.encoder.grad[:, :, 1].abs().sum() == 0  # what is not kept learns nothing
    # Latent 1 is on by 1 and 3: just the errors, so nothing is added.
    assert topk_loss(coder, x, 1, dead)[0].item() == pytest.approx(10.0)
    # Its decoder half as long says ½ and 1½: of 10 it leaves 2½; about their mean the errors vary by 2 · (1 + 1) / 2 = 2.
    coder.decoder.data[:, 1] /= 2
    loss = topk_loss(coder, x, 1, dead)[0]
    assert loss.item() == pytest.approx(10.0 + AUX_WEIGHT * 2.5 / 2)
    # Its f longer by s leaves Σ 2 a² (1 − s/2)² / 2 for a = 1, 3, which falls by 5 at s = 1, whatever latent 0 does.
    loss.backward()
    assert (coder.encoder.grad[:, :, 1] * coder.encoder.data[:, :, 1]).sum().item() == pytest.approx(-AUX_WEIGHT * 5 / 2)


@pytest.mark.parametrize("k", [1, 3])
def test_batchtopk_keeps_exactly_so_many(k):
    """k·B, shared among the tokens of a batch as they come; the largest by f·n, and not by f."""
    coder = Crosscoder(8, 32, seed=1)
    coder.decoder.data *= torch.rand(32, 1, generator=torch.Generator().manual_seed(2)) * 5
    x = torch.randn(16, 2, 8, generator=torch.Generator().manual_seed(3))
    _, kept = topk_loss(coder, x, k, torch.zeros(32, dtype=torch.bool))
    assert (kept > 0).sum() == 16 * k and len(set((kept > 0).sum(1).tolist())) > 1
    f = coder.before_choice(x)
    values = (f * coder.norms()).flatten()
    assert set(torch.nonzero(kept.flatten()).flatten().tolist()) == set(values.argsort(descending=True)[: 16 * k].tolist())
    assert torch.equal(kept[kept > 0], f[kept > 0])
    coder.threshold = values.sort(descending=True).values[16 * k]  # the largest that was not kept
    assert torch.equal(coder.encode(x), kept)


def test_delta_and_kinds_by_algebra():
    decoder = torch.tensor([[[3.0, 4.0], [0.0, 0.0], [0.3, 0.0], [1.0, 0.0], [2.0, 0.0]],
                            [[0.0, 5.0], [1.0, 1.0], [0.0, 0.4], [0.0, 0.0], [1.0, 0.0]]])  # fmt: skip
    delta = relative_norm(decoder)
    assert delta.tolist() == pytest.approx([0.5, 1.0, 0.625, 0.0, 0.25])
    assert model_diff.kind_of(torch.tensor([0.5, 0.95, 0.625, 0.05, 0.41, 0.59])).tolist() == [1, 2, -1, 0, 1, 1]


def test_latent_scaling_is_the_least_squares_solution():
    """β by a solver, latent by latent, from the definition."""
    draw = torch.Generator().manual_seed(5)
    f = torch.relu(torch.randn(50, 4, generator=draw, dtype=torch.float64))
    decoder, x = torch.randn(2, 4, 6, generator=draw, dtype=torch.float64), torch.randn(50, 2, 6, generator=draw).double()
    decoder[0, :2] *= 0.1
    decoder[1, 2:] *= 0.1
    made = torch.einsum("nh,mhd->nmd", f, decoder)
    found = latent_scaling(f, decoder, x - made)
    for j in range(4):
        m = 1 if j < 2 else 0
        column = torch.outer(f[:, j], decoder[m, j]).reshape(-1, 1)
        rest = made - torch.einsum("n,md->nmd", f[:, j], decoder[:, j])
        for values, y in zip(found, (x - rest, made)):
            beta = [torch.linalg.lstsq(column, y[:, side].reshape(-1, 1)).solution.item() for side in (0, 1)]
            assert values[j].item() == pytest.approx(beta[1 - m] / beta[m], rel=1e-9)


def test_latent_scaling_sees_shrinkage_and_decoupling():
    """A concept of both models: shrunk, A's error holds it (ν_ε = 1); decoupled, another latent writes it in A (ν_r = 1)."""
    a = torch.rand(40, generator=torch.Generator().manual_seed(1))[:, None]
    v = torch.tensor([[0.0, 1.0]])
    x = torch.stack([a * v, a * v], 1)
    shrunk = torch.stack([0 * v, v])
    nu_error, nu_made = latent_scaling(a, shrunk, x - torch.einsum("nh,mhd->nmd", a, shrunk))
    assert nu_error.item() == pytest.approx(1) and nu_made.item() == pytest.approx(0)
    split = torch.stack([torch.cat([0 * v, v]), torch.cat([v, 0 * v])])  # latent 0 of B only, latent 1 of A only
    twice = torch.cat([a, a], 1)
    nu_error, nu_made = latent_scaling(twice, split, x - torch.einsum("nh,mhd->nmd", twice, split))
    assert nu_error.tolist() == pytest.approx([0, 0]) and nu_made.tolist() == pytest.approx([1, 1])


def test_auc_by_counting_pairs():
    scores = torch.tensor([[0.0, 2.0], [1.0, 0.0], [0.0, 0.0], [3.0, 1.0], [0.5, 0.0]])
    label = torch.tensor([True, False, False, True, False])
    expected = []
    for j in range(2):
        pairs = [(scores[i, j], scores[k, j]) for i in (0, 3) for k in (1, 2, 4)]
        expected.append(sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs) / len(pairs))
    assert auc(scores, label).tolist() == pytest.approx(expected)


def test_wilson_by_its_equation():
    """The bounds are where a share p differs from the count's by 1.96 standard deviations of p."""
    assert model_diff.wilson(6, 6) == "6 of 6 (61–100 %)" and model_diff.wilson(0, 0) == "0 of 0"
    low, high = (float(x) / 100 for x in model_diff.wilson(30, 100).split("(")[1].removesuffix(" %)").split("–"))
    for p in (low, high):
        assert abs(0.3 - p) / math.sqrt(p * (1 - p) / 100) == pytest.approx(1.96, rel=0.06)  # the bounds are whole per cent


def test_scaled_to_the_root_of_d():
    x = model_diff.scaled(torch.randn(50, 2, 16) * torch.tensor([3.0, 0.2])[:, None])
    assert x.norm(dim=2).mean(0).tolist() == pytest.approx([4, 4], rel=1e-5)


def test_the_start_knows_nothing_of_the_truth():
    """Seeds of the made-up models and of the crosscoder do not draw the same numbers."""
    for seed in range(3):
        truth = model_diff.made_up(seed, noise=0.0)
        directions = torch.linalg.lstsq(truth.active, truth.x[:, 1]).solution
        start = Crosscoder(model_diff.SIZE, 96, seed).decoder.detach()
        cos = torch.cosine_similarity(directions[:, None, None], start.transpose(0, 1)[None], dim=-1)
        assert cos.abs().max() < 0.9


def test_equal_starts_make_the_null_vacuous():
    """Equal models, equal decoders: Δ = ½ and cos = 1 at any step. From independent ones they are what training finds."""
    x, off = model_diff.made_up(0, {"shared": (12, 1.0, 1.0)}, noise=0.0).x, {}
    for equal in (True, False):
        for steps in (1, 800):
            coder = fit(x, Coding(k=1, latents=24, steps=steps, batch=128, lr=3e-3), equal)
            reading = read_off(coder, x)
            far = (reading.delta - 0.5).abs() + (1 - reading.cos)
            off[equal, steps] = far[reading.fires >= 10].median().item()
    assert max(off[True, 1], off[True, 800]) < 1e-3
    assert off[False, 1] > 0.5 and off[False, 800] < 0.05


def test_a_small_recovery():
    """Features of one model only are called so; BatchTopK keeps the ratio of a shared one that is weak in A."""
    groups = {"shared": (10, 1.0, 1.0), "only in A": (3, 1.0, 0.0), "only in B": (3, 0.0, 1.0), "fifth in A": (3, 0.2, 1.0)}
    truth = model_diff.made_up(0, groups)
    for form in (dict(form="batchtopk", k=1), dict(form="l1", lam=1.0)):
        coder = fit(truth.x, Coding(**QUICK, **form))
        reading = read_off(coder, truth.x)
        match = model_diff.correlation(coder.encode(truth.x), truth.active)
        best, latent = match.max(0)
        kinds = model_diff.kind_of(reading.delta[latent]).tolist()
        assert best.min() > 0.8
        assert kinds[10:13] == [0] * 3 and kinds[13:16] == [2] * 3 and not {0, 2} & set(kinds[:10])
        ratio = (coder.decoder[0].norm(dim=-1) / coder.decoder[1].norm(dim=-1))[latent[16:]]
        if form["form"] == "batchtopk":
            assert ratio.tolist() == pytest.approx(truth.ratio[16:].tolist(), abs=0.05)
        else:  # the penalty shrinks the weaker side
            assert ratio.max() < truth.ratio[16] - 0.05
        assert reading.nu_error[latent[16:]].tolist() == pytest.approx(truth.ratio[16:].tolist(), abs=0.08)
        assert min(reading.explained) > 0.8


def test_two_models(small, tmp_path, capsys):
    """A model against one with a direction added to what its first layer gives: the command line to the end."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(small / "model")
    x, tokens = model_diff.activations([str(small / "model")] * 2, [[5, 6, 7], [8, 9, 10, 11]], 1)
    hidden = model(torch.tensor([[8, 9, 10, 11]]), output_hidden_states=True).hidden_states[1][0]
    assert x.shape == (5, 2, 32) and torch.equal(x[:, 0], x[:, 1])
    assert tokens.text.tolist() == [0, 0, 1, 1, 1] and tokens.place.tolist() == [1, 2, 1, 2, 3]
    assert torch.allclose(
        torch.nn.functional.normalize(x[2:, 0], dim=1), torch.nn.functional.normalize(hidden[1:], dim=1), atol=1e-5
    )
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight += 0.05
    model.save_pretrained(tmp_path / "after")
    data.load_tokenizer(str(small / "model")).save_pretrained(tmp_path / "after")
    out, how = tmp_path / "out", ["--steps", "60", "--latents", "48", "--k", "4", "--layer", "1"]
    names = ["--before", str(small / "model"), "--after", str(tmp_path / "after"), "--texts", f"{small / 'pairs.jsonl'}[:30]"]
    found = model_diff.main([*names, *how, "--out", str(out)])
    text = (out / "table.md").read_text()
    assert text in capsys.readouterr().out and "30 texts" in text and "⟦" in text
    assert json.loads((out / "settings.json").read_text())["steps"] == 60
    assert found["reading"].delta.shape == (48,)
    for more, said in (
        (["--form", "l2"], "form is 'l2'"),
        (["--layer", "9"], "layer 9"),
        (["--k", "0"], "k is 0"),
        ([], "already"),
    ):
        with pytest.raises(SystemExit):
            model_diff.main([*names, *how, "--out", str(tmp_path / "new" if more else out), *more])
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit):
        model_diff.main(["--out", str(tmp_path / "third")])
    assert "--before is missing" in capsys.readouterr().err


def test_classes_of_tokens_by_hand():
    text = "<user> name two fruits and three tools <assistant> well pear pear cat plum fig and saw <end>"
    own = ["idle", "right", "repeated", "wrong", "right", "surplus", "and", "right", "end"]
    assert model_diff.classes(text.split()) == ["prompt"] * 7 + ["start"] + own
    tokenizer = toy.word_tokenizer()
    ids = tokenizer(text)["input_ids"]
    tokens = model_diff.Tokens(
        [ids] * 30, torch.arange(30).repeat_interleave(len(ids) - 1), torch.arange(1, len(ids)).repeat(30)
    )
    labels = model_diff.world_labels(tokens, tokenizer)
    places = {name: (torch.nonzero(label[: len(ids) - 1]).flatten() + 1).tolist() for name, label in labels.items()}
    assert places["idle"] == [8] and places["before idle"] == [7] and places["start"] == [7] and places["surplus"] == [13]
    assert places["one of the fruits"] == [9, 10, 12, 13] and places["right"] == [9, 12, 15] and places["before end"] == [15]
    assert tokens.context(7, tokenizer) == "two fruits and three tools <assistant>⟦well⟧pear pear cat"


def test_taking_a_latent_off_a_layer(small):
    """Against the same numbers put into the next layer; a latent without a decoder changes nothing."""
    from transformers import LlamaForCausalLM

    name, tokenizer = str(small / "model"), toy.word_tokenizer()
    model, ids = LlamaForCausalLM.from_pretrained(name), tokenizer("<user> name two fruits <assistant> pear <end>")["input_ids"]
    x, tokens = model_diff.activations([name, name], [ids], 1)
    coder = Crosscoder(32, 6, seed=1).requires_grad_(False)
    j = int(coder.encode(x)[:4].sum(0).argmax())
    coder.decoder[:, j - 1] = 0
    found = model_diff.idle_without([name, name], x, tokens, tokenizer, coder, [j, (j - 1) % 6], 1)
    assert found[0][0] == pytest.approx(found[0][2], rel=1e-5) and found[0][0] == pytest.approx(found[1][0])
    hidden = model(torch.tensor([ids[:5]]), output_hidden_states=True).hidden_states[1].detach()
    unit = hidden[0, 1:].norm(dim=1).mean() / x[:4, 0].norm(dim=1).mean()
    for side in (0, 1):
        other = hidden.clone()
        other[0, 1:] -= coder.encode(x)[:4, j, None] * coder.decoder[side, j] * unit
        hook = model.model.layers[1].register_forward_pre_hook(lambda module, given, other=other: (other, *given[1:]))
        logits = model(torch.tensor([ids[:5]])).logits[0, -1]
        hook.remove()
        idle = logits.softmax(-1)[tokenizer.convert_tokens_to_ids(list(toy.IDLE))].sum().item()
        assert found[side][1] == pytest.approx(idle, rel=1e-5) and found[side][1] != pytest.approx(found[side][0], rel=1e-4)
