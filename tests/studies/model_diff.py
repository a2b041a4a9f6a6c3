"""What training changed inside a model: a crosscoder on the activations of one layer of two models, A before and B after.

    python tests/studies/model_diff.py --before A --after B --texts rows.jsonl[:500] --layer 15 --out runs/diff
    python tests/studies/model_diff.py --synthetic --out runs/diff-synthetic            # where the truth is known
    python tests/studies/model_diff.py --world --layer 2 --latents 192 --out runs/diff-world    # where the tokens' labels are

Crosscoder (Lindsey et al. 2024), for paired activations x (2, d) of a token, scaled per model to a mean norm of √d:

    f = ReLU(Σ_m x^m E^m + b),   x̂^m = f D^m + c^m,   n_j = ‖d_j^A‖ + ‖d_j^B‖
    l1:         Σ_m ‖x^m − x̂^m‖² + λ Σ_j f_j n_j,  λ warmed up
    batchtopk:  only the k·B largest f_j n_j of a batch of B tokens are kept (Minder et al. 2025, arXiv 2504.02922), and latents
                that are dead explain, k_aux a token, what is left: + ‖e − ê‖² / ‖e − mean e‖² · 1/32. Outside of training a
                latent is on where f_j n_j is above the running mean of the smallest value that was kept.

Read off, per latent: Δ = ½[(‖d^B‖ − ‖d^A‖) / max(‖d^A‖, ‖d^B‖) + 1], above 0.9 "B only", below 0.1 "A only", within 0.1 of ½
"shared"; cos(d^A, d^B); and latent scaling: ν = β^A / β^B with β^m = argmin Σ ‖y^m − β f_j d_j‖², d_j the decoder of the model
that the latent seems to belong to. y is x − Σ_{i≠j} f_i d_i for ν_ε and the reconstruction x̂ − c for ν_r (β is the released
code's; that we take the bias off x̂ is our choice, and so is the mirror image A ↔ B for Δ < ½). Near 0, the latent is truly of
one model; a large ν_ε is complete shrinkage (the other model's error holds the concept), a large ν_r latent decoupling (other
latents write it). ν says nothing of a latent whose β^B is near 0.

The two decoders start from independent draws: from equal ones, equal models have Δ = ½ by symmetry, whatever the training does.
"""

import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1] / "tools")]

import on_policy  # noqa: E402
import torch  # noqa: E402
import toy  # noqa: E402
from miniature import markdown, pyplot  # noqa: E402
from torch import Tensor  # noqa: E402

import data  # noqa: E402
import train  # noqa: E402
from data import UserError, setting  # noqa: E402

WARM_UP, DEAD_AFTER, AUX_WEIGHT, MEMORY = 0.2, 50, 1 / 32, 0.99  # of the steps; steps; of the loss; of the running mean


@dataclass
class Coding:
    """How a crosscoder is trained."""

    form: str = setting("batchtopk", "batchtopk or l1")
    latents: int = setting(512, "size of the dictionary")
    k: int = setting(8, "batchtopk: latents kept per token, on average over a batch")
    lam: float = setting(0.3, "l1: weight λ of Σ f n")
    steps: int = setting(1500, "of Adam")
    batch: int = setting(256, "tokens a step")
    lr: float = setting(2e-3, "learning rate; falls to 0 over the last fifth")
    seed: int = setting(0, "for the decoders' start and the order of the tokens")


@dataclass
class Study(Coding):
    before: str | None = setting(None, "model A")
    after: str | None = setting(None, "model B, with the same tokenizer")
    texts: str | None = setting(None, "rows in any format that the trainer reads; prompt and first response are the text")
    layer: int = setting(1, "activations after this many layers (0: the embeddings; the last: after the final norm)")
    max_tokens: int = setting(256, "of a text")
    top: int = setting(12, "latents in the table")
    synthetic: bool = setting(False, "the study with known truth")
    world: bool = setting(False, "the toy task's initial model against its SimPO model, in place of before, after and texts")
    cache: str = setting(data.CACHE, "folder in which the toy task is built")
    seeds: int = setting(3, "runs of each setting of the synthetic study")
    out: str = setting("runs/model-diff", "folder for tables and pictures; one with files is refused")


# ---- the crosscoder --------------------------------------------------------------------------------------------------


class Crosscoder(torch.nn.Module):
    """E (2, d, h), D (2, h, d), b (h,), c (2, d). `equal` starts both decoders alike: for showing why one should not."""

    def __init__(self, d: int, latents: int, seed: int = 0, equal: bool = False):
        super().__init__()
        drawn = torch.randn(2, latents, d, generator=torch.Generator().manual_seed(seed))
        drawn = torch.nn.functional.normalize(drawn[:1].expand(2, -1, -1) if equal else drawn, dim=-1) / 2**0.5
        self.decoder = torch.nn.Parameter(drawn.clone())
        self.encoder = torch.nn.Parameter(drawn.transpose(1, 2).clone())
        self.bias = torch.nn.Parameter(torch.zeros(latents))
        self.shift = torch.nn.Parameter(torch.zeros(2, d))
        self.register_buffer("threshold", torch.tensor(0.0))

    def norms(self) -> Tensor:
        """‖d_j^A‖ + ‖d_j^B‖, (h,)."""
        return self.decoder.norm(dim=-1).sum(0)

    def before_choice(self, x: Tensor) -> Tensor:
        """(n, 2, d) → ReLU of all latents, (n, h)."""
        return torch.relu(torch.einsum("nmd,mdh->nh", x, self.encoder) + self.bias)

    def encode(self, x: Tensor) -> Tensor:
        """(n, 2, d) → latents (n, h) by the threshold, which is 0 in the l1 form."""
        f = self.before_choice(x)
        return f * (f * self.norms() > self.threshold)

    def decode(self, f: Tensor) -> Tensor:
        """(n, h) → (n, 2, d), without the shift."""
        return torch.einsum("nh,mhd->nmd", f, self.decoder)


def l1_loss(coder: Crosscoder, x: Tensor, lam: float) -> tuple[Tensor, Tensor]:
    """(loss, latents)."""
    f = coder.before_choice(x)
    return squared(x - coder.shift - coder.decode(f)) + lam * (f * coder.norms()).sum(1).mean(), f


def squared(error: Tensor) -> Tensor:
    return error.square().sum((1, 2)).mean()


def largest(values: Tensor, count: int) -> Tensor:
    """Where the `count` largest of all values are."""
    chosen = torch.zeros(values.numel(), dtype=torch.bool)
    chosen[values.flatten().topk(count).indices] = True
    return chosen.view(values.shape)


def topk_loss(coder: Crosscoder, x: Tensor, k: int, dead: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, latents that were kept); dead: (h,) bool. Dead latents explain the error, d/2 of them a token."""
    f = coder.before_choice(x)
    kept = f * largest((f * coder.norms()).detach(), min(k * len(x), f.numel()))
    error = x - coder.shift - coder.decode(kept)
    loss = squared(error)
    if dead.any():
        left, count = error.detach(), min(x.shape[2] // 2, int(dead.sum()))
        revived = torch.where(dead, f * coder.norms(), -1.0).detach().topk(count, dim=1).indices
        aid = torch.zeros_like(f).scatter(1, revived, f.gather(1, revived))
        loss = loss + AUX_WEIGHT * squared(left - coder.decode(aid)) / squared(left - left.mean(0)).clamp(min=1e-9)
    return loss, kept


def fit(x: Tensor, s: Coding, equal: bool = False) -> Crosscoder:
    """A crosscoder of x (n, 2, d), float32."""
    coder = Crosscoder(x.shape[2], s.latents, s.seed, equal)
    coder.shift.data = x.mean(0)
    optimizer, draw = torch.optim.Adam(coder.parameters(), lr=s.lr), torch.Generator().manual_seed(20_000 + s.seed)
    idle, warm = torch.zeros(s.latents), max(1, int(WARM_UP * s.steps))
    for step in data.progress(range(s.steps), "crosscoder", "steps"):
        optimizer.param_groups[0]["lr"] = s.lr * min(1.0, (s.steps - step) / warm)
        batch = x[torch.randint(len(x), (s.batch,), generator=draw)]
        if s.form == "l1":
            loss, f = l1_loss(coder, batch, s.lam * min(1.0, step / warm))
        else:
            loss, f = topk_loss(coder, batch, s.k, idle > DEAD_AFTER)
            least = (f * coder.norms()).detach()
            least = least[least > 0].min() if (least > 0).any() else torch.tensor(0.0)
            coder.threshold = MEMORY * coder.threshold + (1 - MEMORY) * least if step else least
        idle = torch.where((f > 0).any(0), 0, idle + 1)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(coder.parameters(), 1.0)
        optimizer.step()
    return coder.requires_grad_(False)


# ---- what is read off ------------------------------------------------------------------------------------------------


class Reading(NamedTuple):
    """One entry a latent; ν_ε and ν_r as above. explained: per model, 1 − ‖x − x̂‖² / ‖x − mean x‖²."""

    delta: Tensor
    cos: Tensor
    nu_error: Tensor
    nu_reconstruction: Tensor
    fires: Tensor  # tokens
    explained: list[float]
    l0: float


def relative_norm(decoder: Tensor) -> Tensor:
    """Δ: (2, h, d) → (h,), 0 for a latent of A only, ½ for equal norms, 1 for B only."""
    a, b = decoder.norm(dim=-1)
    return ((b - a) / torch.maximum(a, b).clamp(min=1e-12) + 1) / 2


def kind_of(delta: Tensor) -> Tensor:
    """0 A only, 1 shared, 2 B only, −1 between."""
    return torch.where(delta < 0.1, 0, torch.where(delta > 0.9, 2, torch.where((delta - 0.5).abs() <= 0.1, 1, -1)))


def latent_scaling(f: Tensor, decoder: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    """(ν_ε, ν_r) of every latent. f: (n, h); decoder: (2, h, d); error: x − x̂, (n, 2, d).

    β^m of latent j is ⟨d_j, Σ f_j y^m⟩ / (‖d_j‖² Σ f_j²); the denominators cancel in ν. y^m = error^m + f_j d_j^m for ν_ε.
    """
    a, b = decoder.norm(dim=-1)
    own = torch.where((b >= a)[:, None], decoder[1], decoder[0])
    alone = f.square().sum(0) * (decoder * own).sum(-1)  # Σ f_j ⟨d_j, f_j d_j^m⟩, (2, h)
    by_error = (torch.einsum("nh,nmd->mhd", f, error) * own).sum(-1) + alone
    by_reconstruction = torch.einsum("hi,mid,hd->mh", f.T @ f, decoder, own)
    return tuple(torch.where(b >= a, y[0] / y[1], y[1] / y[0]) for y in (by_error, by_reconstruction))


def read_off(coder: Crosscoder, x: Tensor) -> Reading:
    f = coder.encode(x)
    error = x - coder.shift - coder.decode(f)
    explained = (1 - error.square().sum((0, 2)) / (x - x.mean(0)).square().sum((0, 2))).tolist()
    cos = torch.cosine_similarity(*coder.decoder, dim=-1)
    scaling = latent_scaling(f, coder.decoder, error)
    return Reading(relative_norm(coder.decoder), cos, *scaling, (f > 0).sum(0), explained, (f > 0).sum(1).float().mean().item())


def auc(scores: Tensor, label: Tensor) -> Tensor:
    """Probability that a token with the label has the higher score, ties ½. scores: (n, h); label: (n,) bool → (h,)."""
    values, order = scores.double().sort(0)
    rank = torch.arange(1, len(scores) + 1, dtype=torch.float64)[:, None].expand_as(values)
    zero = (values <= 0).sum(0)  # latents that are off share their rank; others are rarely equal
    rank = torch.where(values <= 0, (zero + 1) / 2, rank)
    hits = label.sum()
    return ((rank * label[order]).sum(0) - hits * (hits + 1) / 2) / (hits * (~label).sum())


def wilson(hits: int, of: int) -> str:
    """ "6 of 8 (41–93 %)": a count and its 95 % interval by Wilson's formula."""
    if not of:
        return "0 of 0"
    p, z = hits / of, 1.96
    middle, half = p + z * z / (2 * of), z * math.sqrt(p * (1 - p) / of + z * z / (4 * of * of))
    low, high = ((middle + sign * half) / (1 + z * z / of) for sign in (-1, 1))
    return f"{hits} of {of} ({100 * max(low, 0):.0f}–{100 * min(high, 1):.0f} %)"


# ---- two models ------------------------------------------------------------------------------------------------------


class Tokens(NamedTuple):
    texts: list[list[int]]
    text: Tensor  # (n,) which text a row of the activations is from
    place: Tensor  # (n,) where in it

    def context(self, i: int, tokenizer, width: int = 6) -> str:
        ids, at = self.texts[self.text[i]], int(self.place[i])
        before, here = tokenizer.decode(ids[max(0, at - width) : at]), tokenizer.decode(ids[at : at + 1])
        return (
            f"{before}⟦{here}⟧{tokenizer.decode(ids[at + 1 : at + 4])}".replace("\n", "⏎").replace("|", "¦").replace("`", "ˋ")
        )


def scaled(x: Tensor) -> Tensor:
    """(n, 2, d) to a mean norm of √d per model."""
    return x * (x.shape[2] ** 0.5 / x.norm(dim=2).mean(0))[:, None]


@torch.no_grad()
def activations(names: list[str], texts: list[list[int]], layer: int) -> tuple[Tensor, Tokens]:
    """Paired activations (n, 2, d) of one layer, scaled, and where they are from; the first token of a text is left out."""
    sides = []
    for name in names:
        model = on_policy.load_model(name, "CausalLM", torch.device("cpu")).float().base_model  # no head, no logits
        if not 0 <= layer <= model.config.num_hidden_layers:
            raise UserError(f"layer {layer}: {name} has {model.config.num_hidden_layers} layers; 0 is the embeddings")
        found = [
            model(torch.tensor([ids]), output_hidden_states=True, use_cache=False).hidden_states[layer][0, 1:]
            for ids in data.progress(texts, name, "texts")
        ]
        sides.append(torch.cat(found))
    if sides[0].shape != sides[1].shape:
        raise UserError(f"{names[0]} and {names[1]} have activations of {sides[0].shape[1]} and {sides[1].shape[1]} numbers")
    text = torch.cat([torch.full((len(ids) - 1,), i) for i, ids in enumerate(texts)])
    place = torch.cat([torch.arange(1, len(ids)) for ids in texts])
    return scaled(torch.stack(sides, 1)), Tokens(texts, text, place)


def read_texts(s: Study) -> tuple[list[list[int]], object]:
    """Prompt and first response of every row, as A's tokens; B has to have the same ones."""
    tokenizer = data.load_tokenizer(s.before)
    if tokenizer.get_vocab() != data.load_tokenizer(s.after).get_vocab():
        raise UserError(f"{s.before} and {s.after} have different vocabularies; the same text would be other tokens")
    examples, report = data.load(s.texts, tokenizer, data.Reading(max_length=s.max_tokens))
    print(report, file=sys.stderr)
    return [[*e.prompt, *e.responses[0]] for e in examples], tokenizer


def latents_table(reading: Reading, f: Tensor, tokens: Tokens, tokenizer, top: int) -> str:
    """Latents by |Δ − ½|, those with at least 10 tokens; the three strongest tokens of each with their context."""
    lines = [["latent", "Δ", "cos", "ν_ε", "ν_r", "tokens", "strongest"], ["---"] * 7]
    order = torch.where(reading.fires >= 10, (reading.delta - 0.5).abs(), -1.0).argsort(descending=True)
    for j in order[: min(top, int((reading.fires >= 10).sum()))].tolist():
        numbers = [f"{values[j]:.2f}" for values in reading[:4]]
        where = f[:, j].topk(min(3, int(reading.fires[j]))).indices.tolist()
        said = " · ".join(f"`{tokens.context(i, tokenizer)}`" for i in where)
        lines.append([str(j), *numbers, f"{reading.fires[j]}", said])
    return markdown(lines)


def summary(reading: Reading) -> str:
    alive = reading.fires > 0
    kinds, count = kind_of(reading.delta[alive]), int(alive.sum())
    names = {2: "B only", 0: "A only", 1: "shared"}
    parts = [f"{name} {wilson(int((kinds == kind).sum()), count)}" for kind, name in names.items()]
    a, b = reading.explained
    return f"{'; '.join(parts)}; dead {len(alive) - count} of {len(alive)}; L0 {reading.l0:.2f}; explained A {a:.3f}, B {b:.3f}"


def draw_latents(readings: dict[str, Reading], path: Path) -> None:
    """A dot a latent that fires: Δ against the cosine; above, how many there are."""
    plt = pyplot()
    if plt is None:
        return
    figure, axes = plt.subplots(2, len(readings), figsize=(4.2 * len(readings), 5.2), squeeze=False, sharex=True,
                                height_ratios=(1, 2), layout="constrained")  # fmt: skip
    for (name, reading), (above, below) in zip(readings.items(), axes.T):
        alive = reading.fires > 0
        above.hist(reading.delta[alive].tolist(), bins=40, range=(0, 1), color="C0")
        above.set(title=name, ylabel="latents", yscale="symlog")
        below.scatter(reading.delta[alive].tolist(), reading.cos[alive].tolist(), s=9, alpha=0.6, linewidths=0)
        below.set(
            xlabel="Δ   (0: A only, ½: shared, 1: B only)", ylabel="cos(d^A, d^B)", xlim=(-0.03, 1.03), ylim=(-1.05, 1.05)
        )
        for axis in (above, below):
            for edge in (0.1, 0.4, 0.6, 0.9):
                axis.axvline(edge, color="0.8", linewidth=0.8, zorder=0)
            axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def diff(s: Study, out: Path) -> dict:
    for name in ("before", "after", "texts"):
        if getattr(s, name) is None:
            raise UserError(f"--{name} is missing (or --synthetic or --world, which need none)")
    texts, tokenizer = read_texts(s)
    x, tokens = activations([s.before, s.after], texts, s.layer)
    coder = fit(x, s)
    reading, f = read_off(coder, x), coder.encode(x)
    text = f"{len(x)} tokens of {len(texts)} texts. {summary(reading)}\n\n" + latents_table(
        reading, f, tokens, tokenizer, s.top
    )
    draw_latents({f"{s.form}, layer {s.layer}": reading}, out / "latents.png")
    torch.save({"state": coder.state_dict(), "settings": asdict(s)}, out / "crosscoder.pt")
    return {"text": text, "reading": reading}


# ---- the study with known truth --------------------------------------------------------------------------------------

GROUPS = {  # features of the made-up models: name → (how many, length in A, length in B)
    "shared": (24, 1.0, 1.0),
    "only in A": (6, 1.0, 0.0),
    "only in B": (6, 0.0, 1.0),
    "half in A": (6, 0.5, 1.0),
    "fifth in A": (6, 0.2, 1.0),
}
SIZE, TOKENS, RATE, NOISE = (
    32,
    16384,
    0.05,
    0.05,
)  # numbers of an activation; of which half are for fitting; features; per number
FORMS = {  # 2.4 features are on a token; of latents, some 5, 4, 3 and 6
    "l1, λ = 1": dict(form="l1", lam=1.0),
    "l1, λ = 2": dict(form="l1", lam=2.0),
    "batchtopk, k = 3": dict(form="batchtopk", k=3),
    "batchtopk, k = 6": dict(form="batchtopk", k=6),
}
PLANTED = (0.05, 0.1, 0.2, 0.3, 0.4, 0.8)  # α in units of √d, the mean norm of an activation
MATCH = 0.8  # correlation of a latent with a feature that it stands for


class Truth(NamedTuple):
    x: Tensor  # (n, 2, d)
    active: Tensor  # (n, features), how strongly
    group: list[str]  # of each feature
    ratio: Tensor  # ‖d^A‖ / ‖d^B‖ of each feature after scaling


def made_up(seed: int, groups: dict = GROUPS, bases: int = 1, noise: float = NOISE) -> Truth:
    """Tokens on which each feature is on with probability RATE, by 0.5 to 1.5, in random directions, and noise of each model.

    bases=2 draws other directions for B: two models that started from different seeds. The seed is moved away from the
    crosscoder's: one generator would give it the true directions to start from.
    """
    draw, group = (
        torch.Generator().manual_seed(10_000 + seed),
        [name for name, (count, *_) in groups.items() for _ in range(count)],
    )
    length = torch.tensor([groups[name][1:] for name in group]).T  # (2, features)
    directions = torch.nn.functional.normalize(torch.randn(bases, len(group), SIZE, generator=draw), dim=-1)
    active = (torch.rand(TOKENS, len(group), generator=draw) < RATE) * (0.5 + torch.rand(TOKENS, len(group), generator=draw))
    x = torch.einsum("nf,mfd->nmd", active, directions.expand(2, -1, -1) * length[..., None])
    x = x + noise * torch.randn(x.shape, generator=draw)
    a, b = length / x.norm(dim=2).mean(0)[:, None]
    return Truth(scaled(x), active, group, a / b)


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """(n, p), (n, q) → (p, q); 0 for what never varies."""
    a, b = ((t - t.mean(0)) / (t - t.mean(0)).norm(dim=0).clamp(min=1e-9) for t in (a, b))
    return a.T @ b


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[: TOKENS // 2], x[TOKENS // 2 :]


def recovery(seed: int, s: Coding) -> tuple[list[dict], Reading]:
    """What became of each feature: its latent (the best correlated one), if any; and of each latent, its feature."""
    truth = made_up(seed)
    fitting, fresh = halves(truth.x)
    coder = fit(fitting, s)
    reading = read_off(coder, fresh)
    match = correlation(coder.encode(fresh), halves(truth.active)[1])
    kinds, (a, b) = kind_of(reading.delta), coder.decoder.norm(dim=-1)
    rows = []
    for i, name in enumerate(truth.group):
        best, j = match[:, i].max(0)
        row = dict(group=name, found=best.item() > MATCH, kind=kinds[j].item(), delta=reading.delta[j].item())
        measured = dict(
            ratio=(a / b)[j], true=truth.ratio[i], nu_error=reading.nu_error[j], nu_rec=reading.nu_reconstruction[j]
        )
        rows.append(row | {key: value.item() for key, value in measured.items()})
    for j in torch.nonzero(reading.fires >= 10).flatten().tolist():
        best, i = match[j].max(0)
        rows.append(dict(latent=j, kind=kinds[j].item(), of=truth.group[i] if best > MATCH else "none"))
    return rows, reading


def middle(values: list[float]) -> str:
    """Median and the quartiles."""
    low, half, high = torch.tensor(values or [math.nan]).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
    return f"{half:.2f} ({low:.2f} to {high:.2f})"


def recovery_tables(results: dict[str, list[dict]]) -> str:
    lines = [
        ["form", "feature", "has a latent", "called A only", "shared", "B only", "‖d^A‖/‖d^B‖, true", "found", "ν_ε", "ν_r"]
    ]
    lines.append(["---"] * len(lines[0]))
    calls = [["form", "latents called", "are of such a feature", "else"], ["---"] * 4]
    for form, rows in results.items():
        for name in GROUPS:
            all_of = [row for row in rows if row.get("group") == name]
            found = [row for row in all_of if row["found"]]
            called = [wilson(sum(row["kind"] == kind for row in found), len(all_of)) for kind in range(3)]
            numbers = (
                ["–"] * 3 if name == "only in A" else [middle([r[k] for r in found]) for k in ("ratio", "nu_error", "nu_rec")]
            )
            true = "–" if name == "only in A" else f"{all_of[0]['true']:.2f}"
            lines.append([form, name, wilson(len(found), len(all_of)), *called, true, *numbers])
        for kind, name in ((0, "only in A"), (2, "only in B")):
            of = [row["of"] for row in rows if "latent" in row and row["kind"] == kind]
            rest = ", ".join(f"{of.count(other)} {other}" for other in [*GROUPS, "none"] if other != name and other in of)
            calls.append([form, name, wilson(of.count(name), len(of)), rest or "–"])
    return markdown(lines) + "\n" + markdown(calls)


def planted(seed: int, alpha: float, s: Coding, on_feature: bool = False) -> dict:
    """B = A + α √d v on tokens of one kind (each with its own noise): the B-only latent that names the kind best.

    The kind is one of its own, or, with on_feature, "feature 0 is on", which has a latent without the change. Baselines, on the
    same tokens: the first principal component of x^B − x^A, and its mean on the kind less its mean elsewhere (needs labels).
    """
    truth = made_up(seed, {"shared": (24, 1.0, 1.0)})
    draw = torch.Generator().manual_seed(30_000 + seed)
    label = truth.active[:, 0] > 0 if on_feature else torch.rand(TOKENS, generator=draw) < RATE
    v = torch.nn.functional.normalize(torch.randn(SIZE, generator=draw), dim=0)
    x = truth.x.clone()
    x[label, 1] += alpha * SIZE**0.5 * v
    (fitting, fresh), (known, asked) = halves(scaled(x)), halves(label)
    coder = fit(fitting, s)
    reading, f = read_off(coder, fresh), coder.encode(fresh)
    scores = torch.where((kind_of(reading.delta) == 2) & (reading.fires >= 10), auc(f, asked), 0.0)
    chance = [auc(f, asked[torch.randperm(len(asked), generator=draw)]).max().item() for _ in range(20)]
    change, later = (t[:, 1] - t[:, 0] for t in (fitting, fresh))
    first = torch.linalg.svd(change - change.mean(0), full_matrices=False).Vh[0]
    mean = change[known].mean(0) - change[~known].mean(0)
    by_axis = auc(torch.stack([later @ mean, later @ first, -(later @ first)], 1) + 1e3, asked).tolist()
    best, d = scores.max().item(), coder.decoder[1, scores.argmax()]
    axes = dict(mean=by_axis[0], pca=max(by_axis[1:]), cos=torch.cosine_similarity(d, v, dim=0).item())
    return dict(auc=best, found=best > 0.9, chance=max(chance), best_any=auc(f, asked).max().item(), **axes)


def planted_table(results: dict[tuple, list[dict]]) -> str:
    head = ["form", "kind", "α/√d", "found", "AUC of the B-only latent (0: none)", "its cos(d^B, v)", "best latent of any Δ"]
    lines = [[*head, "permuted, best", "PCA of x^B − x^A", "mean difference"], ["---"] * 10]
    for (form, kind, alpha), runs in results.items():
        cells = [middle([run[key] for run in runs]) for key in ("auc", "cos", "best_any")]
        if not any(run["auc"] for run in runs):
            cells[:2] = ["none is B only", "–"]
        chance, *axes = (
            f"{max(run['chance'] for run in runs):.2f}",
            *(middle([run[k] for run in runs]) for k in ("pca", "mean")),
        )
        lines.append([form, kind, f"{alpha:g}", f"{sum(run['found'] for run in runs)} of {len(runs)}", *cells, chance, *axes])
    return markdown(lines)


NULLS = {  # name → how A and B are made
    "B = A exactly": dict(noise=0.0),
    "the same features, noise of their own": {},
    "the same features in other directions": dict(bases=2),
}


def null(seed: int, s: Coding, equal: bool = False, **how) -> Reading:
    fitting, fresh = halves(made_up(seed, {"shared": (36, 1.0, 1.0)}, **how).x)
    return read_off(fit(fitting, s, equal), fresh)


def null_table(results: dict[tuple, list[Reading]]) -> str:
    lines = [["form", "null", "latents", "called A only", "B only", "shared", "distance of Δ from ½", "cos"], ["---"] * 8]
    for (form, name), readings in results.items():
        alive = [reading.fires >= 10 for reading in readings]
        delta, cos = (torch.cat([getattr(r, k)[on] for r, on in zip(readings, alive)]) for k in ("delta", "cos"))
        counts = [wilson(int((kind_of(delta) == kind).sum()), len(delta)) for kind in (0, 2, 1)]
        lines.append([form, name, str(len(delta)), *counts, middle((delta - 0.5).abs().tolist()), middle(cos.tolist())])
    return markdown(lines)


def synthetic(s: Study, out: Path) -> dict:
    def coding(form: str, seed: int) -> Coding:
        return Coding(**FORMS[form], latents=96, steps=s.steps, batch=s.batch, lr=s.lr, seed=seed)

    recovered, drawn, found, nulls = {}, {}, {}, {}
    for form in data.progress(FORMS, "synthetic", "forms"):
        runs = [recovery(seed, coding(form, seed)) for seed in range(s.seeds)]
        recovered[form] = [row for rows, _ in runs for row in rows]
        drawn[form] = runs[0][1]
        print(f"{form}: {summary(runs[0][1])}", file=sys.stderr)
        for kind, alpha in [("its own", a) for a in PLANTED] + [("feature 0", PLANTED[-1])]:
            how = dict(on_feature=kind == "feature 0")
            found[form, kind, alpha] = [planted(n, alpha, coding(form, n), **how) for n in range(s.seeds)]
        for name, how in NULLS.items():
            nulls[form, name] = [null(n, coding(form, n), **how) for n in range(s.seeds)]
        nulls[form, "B = A, decoders that start equal"] = [null(n, coding(form, n), True, noise=0.0) for n in range(s.seeds)]
    draw_latents({f"made-up models, {form}": reading for form, reading in drawn.items()}, out / "recovery.png")
    for form in ("l1, λ = 1", "batchtopk, k = 3"):
        draw_latents({f"{form}\n{name}": nulls[form, name][0] for name in NULLS}, out / f"nulls-{FORMS[form]['form']}.png")
    draw_planted(found, out / "planted.png")
    text = "\n".join((recovery_tables(recovered), planted_table(found), null_table(nulls)))
    return {"text": text, "recovered": recovered, "planted": found, "nulls": nulls}


def draw_planted(found: dict[tuple, list[dict]], path: Path) -> None:
    plt = pyplot()
    if plt is None:
        return
    figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
    lines = [(f"{form}, B-only latent", form, "auc") for form in FORMS] + [("PCA of x^B − x^A", list(FORMS)[0], "pca")]
    lines.append(("mean difference (knows the labels)", list(FORMS)[0], "mean"))
    for name, form, key in lines:
        runs = torch.tensor([[run[key] for run in found[form, "its own", a]] for a in PLANTED])
        (line,) = axis.plot(PLANTED, runs.median(1).values, "o-", label=name, alpha=0.8)
        axis.fill_between(PLANTED, *runs.quantile(torch.tensor([0.25, 0.75]), dim=1), color=line.get_color(), alpha=0.1, lw=0)
    axis.set(xscale="log", xlabel="α / √d", ylabel="AUC for the kind (0: no latent is B only)", ylim=(-0.03, 1.03))
    axis.set_xticks(PLANTED, [f"{a:g}" for a in PLANTED], minor=False)
    axis.minorticks_off()
    axis.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100)
    plt.close(figure)


# ---- the toy task ----------------------------------------------------------------------------------------------------


def classes(words: list[str]) -> list[str]:
    """What each token of a prompt and its answer is: prompt, start (of the answer), idle, and, end, or a kind of item.

    Items: repeated; else wrong, of a kind that was not asked for; else surplus, beyond the number asked for; else right.
    """
    at = words.index("<assistant>")
    wanted, said, found = toy.wanted(" ".join(words[1:at])), set(), ["prompt"] * at + ["start"]
    for word in words[at + 1 :]:
        kind = toy.KIND_OF.get(word)
        if kind is None:
            found.append({"<end>": "end", "and": "and"}.get(word, "idle"))
        else:
            of_kind = sum(toy.KIND_OF[other] == kind for other in said)
            new = "wrong" if kind not in wanted else "surplus" if of_kind >= wanted[kind] else "right"
            found.append("repeated" if word in said else new)
            said.add(word)
    return found


def world_labels(tokens: Tokens, tokenizer) -> dict[str, Tensor]:
    """Name → (n,) bool: the class of a token, of the next one, and the kind of an item; those on 30 tokens or more."""
    rows = []
    for ids in tokens.texts:
        words = tokenizer.convert_ids_to_tokens(ids)
        own = classes(words)
        after = ["before " + name for name in own[1:]] + [""]
        kinds = [f"one of the {toy.KIND_OF[word]}" if word in toy.KIND_OF else "" for word in words]
        rows += list(zip(own, after, kinds))[1:]
    names = sorted({name for row in rows for name in row} - {"", "before prompt", "before start"})
    labels = {name: torch.tensor([name in row for row in rows]) for name in names}
    return {name: label for name, label in labels.items() if label.sum() >= 30}


def named(f: Tensor, labels: dict[str, Tensor], latents: list[int], seed: int) -> tuple[list[tuple[str, float]], float]:
    """The label that each of these latents tells best, with its AUC; and the best that any of them does on permuted tokens."""
    table = torch.stack([auc(f[:, latents], label) for label in labels.values()])  # (labels, latents)
    best, which = table.max(0)
    draw, chance = torch.Generator().manual_seed(seed), 0.0
    for _ in range(20):
        shuffled = f[torch.randperm(len(f), generator=draw)][:, latents]
        chance = max(chance, max(auc(shuffled, label).max().item() for label in labels.values()))
    return [(list(labels)[i], value) for i, value in zip(which.tolist(), best.tolist())], chance


def change_table(x: Tensor, labels: dict[str, Tensor], of_b: Tensor) -> str:
    """The baseline: the length of the mean of x^B − x^A on the tokens of a class, and which principal component tells it.

    of_b: (n,) bool, the tokens of B's answers and their prompts.
    """
    change = x[:, 1] - x[:, 0]
    axes = torch.linalg.svd(change - change.mean(0), full_matrices=False).Vh[:5]
    along = change @ axes.T
    along = torch.cat([along, -along], 1) + 1e3  # above 0, as auc has it
    lines = [
        ["class", "in A's answers", "in B's", "mean of x^B − x^A, length in √d", "best of 5 principal components", "AUC"],
        ["---"] * 6,
    ]
    for name, label in sorted(labels.items(), key=lambda item: -change[item[1]].mean(0).norm()):
        best, which = auc(along, label).max(0)
        length = change[label].mean(0).norm().item() / x.shape[2] ** 0.5
        counts = [f"{(label & side).sum()}" for side in (~of_b, of_b)]
        lines.append([name, *counts, f"{length:.2f}", f"{which.item() % 5 + 1}", f"{best:.2f}"])
    return markdown(lines)


@torch.no_grad()
def idle_without(names: list[str], x: Tensor, tokens: Tokens, tokenizer, coder: Crosscoder, latents: list[int], layer: int):
    """Per model, the mean probability of an idle word as the first of an answer: as it is, then without each of these latents.

    Without a latent: f_j d_j is taken off what the layer gives, at every token of the prompt but the first. 100 prompts.
    """
    words, found = tokenizer.convert_tokens_to_ids(list(toy.IDLE)), []
    f, start = coder.encode(x), tokenizer.convert_tokens_to_ids("<assistant>")
    for side, name in enumerate(names):
        model, sums = on_policy.load_model(name, "CausalLM", torch.device("cpu")).float(), torch.zeros(1 + len(latents))
        for i, ids in enumerate(tokens.texts[:100]):
            ids = torch.tensor(ids[: ids.index(start) + 1])
            rows = torch.nonzero(tokens.text == i).flatten()[: len(ids) - 1]
            off = f[rows][:, latents].T[..., None] * coder.decoder[side, latents][:, None]  # (latents, tokens, d)
            off = torch.cat([torch.zeros_like(off[:1]), off])

            def take_off(module, given, hidden, off=off, clean=x[rows, side]):
                hidden = hidden.clone()
                hidden[:, 1:] -= off * (hidden[0, 1:].norm() / clean.norm())  # x is scaled, hidden is not
                return hidden

            hook = model.model.layers[layer - 1].register_forward_hook(take_off)
            sums += model(ids.expand(len(off), -1)).logits[:, -1].softmax(-1)[:, words].sum(1)
            hook.remove()
        found.append((sums / min(100, len(tokens.texts))).tolist())
    return found


def world(s: Study, out: Path) -> dict:
    """The toy task's initial model against its SimPO model, on both models' answers to the held-out prompts."""
    if not 1 <= s.layer <= 2:
        raise UserError(f"layer {s.layer}: latents are taken off layer 1 or 2 of the toy model's three")
    folder = toy.cached(seed=s.seed, cache=s.cache)
    options = ["--out", str(out / "run"), "--seed", str(s.seed), "--samples", "0", "--cache", s.cache]
    train.main([str(folder / "simpo.yaml"), *options])
    judged = toy.judge(out / "run" / "model", folder, out / "run" / "answers.jsonl")
    names, tokenizer = [str(folder / "model"), str(out / "run" / "model")], data.load_tokenizer(str(folder / "model"))
    sides = [[json.loads(line) for line in (f / "answers.jsonl").read_text().splitlines()] for f in (folder, out / "run")]
    rows = [[data.Row(row["prompt"], [data.answer(row["responses"][0])]) for row in side if row["responses"]] for side in sides]
    answered = [data.encode(row, tokenizer, 128, 100)[0] for side in rows for row in side]
    x, tokens = activations(names, [[*e.prompt, *e.responses[0]] for e in answered], s.layer)
    labels = world_labels(tokens, tokenizer)
    coder, same = fit(x, s), x[:, :1].expand(-1, 2, -1).contiguous()
    reading, nothing, f = read_off(coder, x), read_off(fit(same, s), same), coder.encode(x)
    changes = ", ".join(f"{name} {was:.2f} → {now:.2f}" for name, (was, now) in judged.items())
    text = f"{len(x)} tokens of {len(tokens.texts)} answers; {changes}\n\nStart against SimPO: {summary(reading)}\n\n"
    text += f"Start against itself: {summary(nothing)}\n\n"
    for title, measure in (("distance of Δ from ½", lambda r: (r.delta - 0.5).abs()), ("1 − cos", lambda r: 1 - r.cos)):
        far, by_chance = measure(reading), measure(nothing)[nothing.fires >= 30].max()
        order = torch.where(reading.fires >= 30, far, -1.0).topk(s.top).indices.tolist()
        called, chance = named(f, labels, order, s.seed)
        (a, *without_a), (b, *without_b) = idle_without(names, x, tokens, tokenizer, coder, order, s.layer)
        above = int((far[reading.fires >= 30] > by_chance).sum())
        text += f"By {title}: {above} latents are above {by_chance:.2f}, the largest of start against itself; "
        text += f"best AUC on permuted tokens {chance:.2f}; P(idle first) is {a:.3f} in A, {b:.3f} in B.\n\n"
        head = [
            "latent",
            "Δ",
            "cos",
            "ν_ε",
            "ν_r",
            "tokens",
            "tells best",
            "AUC",
            "P(idle first) without it, A",
            "B",
            "strongest",
        ]
        table = [head, ["---"] * len(head)]
        for j, (name, value), *without in zip(order, called, without_a, without_b):
            said = " · ".join(f"`{tokens.context(i, tokenizer)}`" for i in f[:, j].topk(2).indices.tolist())
            numbers = [f"{v[j]:.2f}" for v in reading[:4]]
            table.append([str(j), *numbers, f"{reading.fires[j]}", name, f"{value:.2f}", *(f"{p:.3f}" for p in without), said])
        text += markdown(table) + "\n"
    strong = (f[labels["start"]].mean(0) * coder.norms()).topk(s.top).indices.tolist()
    (_, *without_a), (_, *without_b) = idle_without(names, x, tokens, tokenizer, coder, strong, s.layer)
    table = [["strongest on start", "Δ", "cos", "P(idle first) without it, A", "B"], ["---"] * 5]
    for j, *without in zip(strong, without_a, without_b):
        table.append([str(j), f"{reading.delta[j]:.2f}", f"{reading.cos[j]:.2f}", *(f"{p:.3f}" for p in without)])
    text += markdown(table) + "\n"
    draw_latents({f"start against SimPO, layer {s.layer}": reading, "start against itself": nothing}, out / "latents.png")
    text += change_table(x, labels, tokens.text >= len(rows[0]))
    return {"text": text, "reading": reading, "null": nothing}


# ---- the command line ------------------------------------------------------------------------------------------------


def study(s: Study) -> dict:
    data.refuse_unless_known("form", s.form, ("batchtopk", "l1"))
    for name in ("latents", "k", "steps", "batch", "seeds", "top"):
        if getattr(s, name) < 1:
            raise UserError(f"{name} is {getattr(s, name)}; it has to be at least 1")
    out = Path(s.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"out {out} already holds files; use an empty folder")
    out.mkdir(parents=True, exist_ok=True)
    found = (synthetic if s.synthetic else world if s.world else diff)(s, out)
    (out / "settings.json").write_text(json.dumps(asdict(s), indent=2) + "\n")
    (out / "table.md").write_text(found["text"])
    print(found["text"])
    return found


def main(argv: list[str] | None = None) -> dict:
    """The command line as a function. A user error ends with a message and exit code 2."""
    return train.main(argv, lambda argv: study(data.parse(Study, argv, "tests/studies/model_diff.py", __doc__)))


if __name__ == "__main__":
    main()
