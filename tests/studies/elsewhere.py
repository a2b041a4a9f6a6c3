"""Our losses against code that nobody here wrote: the loss functions of the installed trl and Liger, values and gradients.

    python tests/studies/elsewhere.py            # seconds; what is not installed is left out, by name
    python tests/studies/elsewhere.py --names    # instead: what the objectives and their settings are called elsewhere

Every line of the table is the same random pairs under one of our objectives and under the library's own function, which is
called as it stands: trl's `_compute_loss` on a trainer and models that are stand-ins, and Liger's `preference_loss_fn`. Where
the two are known to differ the line says how. Code 1 if a line differs without that, or no longer differs.
"""

import argparse
import contextlib
import importlib
import importlib.metadata
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch  # noqa: E402
from miniature import markdown  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from losses import OBJECTIVES, parse_objective  # noqa: E402

BOUND = 2e-5  # relative: everything is fp32, as trl casts some sums to it
PROMPT, PAIRS, LONGEST = 3, 8, 12  # tokens, pairs, response tokens


class Pairs(NamedTuple):
    """Random responses, all chosen and then all rejected ones: (2B, T) numbers per token, 0 after the end."""

    logp: Tensor
    ref: Tensor
    log_sum_p_squared: Tensor
    mask: Tensor  # bool

    def per_pair(self, x: Tensor) -> Tensor:
        """(2B, T) → (B, 2): sums over the responses' tokens, chosen and rejected."""
        return (x * self.mask).sum(1).view(2, -1).T

    def outputs(self) -> dict[str, Tensor]:
        """What the trainer has of the policy's pass."""
        logp, log_sum_p_squared = self.per_pair(self.logp), self.per_pair(self.log_sum_p_squared)
        return {"logp": logp, "prefix_logp": self.per_pair(self.logp * self.prefix()), "log_sum_p_squared": log_sum_p_squared}

    def inputs(self) -> dict[str, Tensor]:
        """What the trainer knows before; KL completions are the next row's responses."""
        length = self.mask.sum(1).view(2, -1).T
        return {
            "len": length, "ref": self.per_pair(self.ref), "ref_prefix_logp": self.per_pair(self.ref * self.prefix()),
            "label": torch.tensor([[True, False]]).expand(len(length), 2),
            "logp_kl": self.logp.detach().sum(1).roll(1), "ref_kl": self.ref.sum(1).roll(1) - 0.5,
        }  # fmt: skip

    def prefix(self) -> Tensor:
        """(2B, T) bool: the first tokens of a response, as many as the shorter one of its pair has."""
        shorter = self.mask.sum(1).view(2, -1).min(0).values
        return torch.arange(self.mask.shape[1]) < shorter.repeat(2)[:, None]

    def columns(self, average: bool) -> tuple[Tensor, Tensor]:
        """Log-probs of chosen and of rejected responses, (B,) each: sums, or averages over tokens."""
        logp = self.outputs()["logp"]
        return (logp / self.inputs()["len"] if average else logp).unbind(1)


def random_pairs(seed: int = 0) -> Pairs:
    g = torch.Generator().manual_seed(seed)
    length = torch.randint(3, LONGEST + 1, (2 * PAIRS, 1), generator=g)
    mask = torch.arange(LONGEST) < length
    logp = -torch.rand(mask.shape, generator=g) * 2 - 0.05
    ref = logp + 0.3 * torch.randn(mask.shape, generator=g)
    log_sum_p_squared = -torch.rand(mask.shape, generator=g) * 2
    return Pairs((logp * mask).requires_grad_(), ref * mask, log_sum_p_squared * mask, mask)


# ---- ours, and theirs ------------------------------------------------------------------------------------------------


def ours(text: str, wpo: bool = False) -> Callable[[Pairs], Tensor]:
    """The mean loss as the trainer takes it."""
    objective = parse_objective(text)

    def loss(pairs: Pairs) -> Tensor:
        outputs = pairs.outputs()
        if not wpo:
            del outputs["log_sum_p_squared"]
        return objective.row_losses(outputs, pairs.inputs(), [0]).mean()

    return loss


class StandIn(nn.Module):
    """A model that says what it is told, in the form of trl's fused head."""

    def __init__(self, logp: Tensor, log_sum_p_squared: Tensor):
        super().__init__()
        self.told = SimpleNamespace(
            log_probs=nn.functional.pad(logp, (PROMPT - 1, 0)),
            log_sum_sq_probs=nn.functional.pad(log_sum_p_squared, (PROMPT - 1, 0)),
            entropy=torch.zeros(len(logp), PROMPT - 1 + LONGEST), mean_logits=torch.zeros(len(logp), PROMPT - 1 + LONGEST),
            is_top1=torch.zeros(len(logp), PROMPT - 1 + LONGEST, dtype=torch.bool),
        )  # fmt: skip

    def forward(self, **inputs):
        return self.told


def trainer(pairs: Pairs, **settings) -> SimpleNamespace:
    """What trl's loss functions read of their trainer."""

    def given(x):
        return x

    return SimpleNamespace(**dict(
        model=StandIn(pairs.logp, pairs.log_sum_p_squared), ref_model=StandIn(pairs.ref, pairs.log_sum_p_squared),
        precompute_ref_logps=False,
        accelerator=SimpleNamespace(device=torch.device("cpu"), gather=given, gather_for_metrics=given), _tp_size=1,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=0.05), aux_loss_enabled=False, ld_alpha=None,
        label_smoothing=0.0, use_weighting=False, f_divergence_type="reverse_kl", f_alpha_divergence_coef=0.5,
        loss_weights=[1.0], _metrics=defaultdict(lambda: defaultdict(list)), _total_train_tokens=0,
        desirable_weight=1.0, undesirable_weight=1.0,
    ) | settings)  # fmt: skip


def inputs(pairs: Pairs) -> dict[str, Tensor]:
    """Ids do not matter to a stand-in; the mask does."""
    whole = nn.functional.pad(pairs.mask.long(), (PROMPT, 0))
    return {"input_ids": torch.zeros_like(whole), "attention_mask": torch.ones_like(whole), "completion_mask": whole}


def trl_dpo(loss_type: str, beta: float, **settings) -> Callable[[Pairs], Tensor]:
    from trl.trainer import dpo_trainer

    def loss(pairs: Pairs) -> Tensor:
        this = trainer(pairs, loss_types=[loss_type], beta=beta, **settings)
        with mock.patch.object(dpo_trainer, "disable_gradient_checkpointing", lambda *_: contextlib.nullcontext()):
            return dpo_trainer.DPOTrainer._compute_loss(this, this.model, inputs(pairs), False)

    return loss


def trl_kto(loss_type: str, beta: float) -> Callable[[Pairs], Tensor]:
    from trl.trainer import kto_trainer

    def loss(pairs: Pairs) -> Tensor:
        known = pairs.inputs()
        drawn = iter((known["logp_kl"], known["ref_kl"]))  # in the order of its two calls
        this = trainer(pairs, loss_type=loss_type, beta=beta, calculate_KL=loss_type == "kto")
        this._compute_kl_logps = lambda *_: next(drawn)
        batch = inputs(pairs) | {"label": torch.arange(2 * PAIRS) < PAIRS}
        with mock.patch.object(kto_trainer, "disable_gradient_checkpointing", lambda *_: contextlib.nullcontext()):
            return kto_trainer.KTOTrainer._compute_loss(this, this.model, batch, False)

    return loss


def likelihood(pairs: Pairs) -> Tensor:
    """Our term, −a_w; the libraries have it in another function, averaged over tokens."""
    return ours("sft")(pairs)


def trl_cpo(lam: float = 0.0, average: bool = False, **settings) -> Callable[[Pairs], Tensor]:
    from trl.experimental.cpo import CPOTrainer

    def loss(pairs: Pairs) -> Tensor:
        this = trainer(pairs, **dict(alpha=0.0, loss_type="sigmoid", simpo_gamma=0.0) | settings)
        return CPOTrainer.cpo_loss(this, *pairs.columns(average))[0].mean() + lam * likelihood(pairs)

    return loss


def trl_orpo(lam: float) -> Callable[[Pairs], Tensor]:
    from trl.experimental.orpo import ORPOTrainer

    def loss(pairs: Pairs) -> Tensor:
        odds_ratio_loss = ORPOTrainer.odds_ratio_loss(trainer(pairs, beta=lam), *pairs.columns(average=True))[0]
        return likelihood(pairs) - odds_ratio_loss.mean()

    return loss


def liger(name: str, lam: float = 0.0, average: bool = False, reference: bool = False, **settings) -> Callable[[Pairs], Tensor]:
    from liger_kernel import chunked_loss

    module = importlib.import_module(f"{chunked_loss.__name__}.{name.lower()}_loss")
    function = getattr(module, f"LigerFusedLinear{name}Function").preference_loss_fn

    def loss(pairs: Pairs) -> Tensor:
        ref_logps = pairs.inputs()["ref"]
        ref = {"ref_chosen_logps": ref_logps[:, 0], "ref_rejected_logps": ref_logps[:, 1]} if reference else {}
        logits = torch.zeros(2 * PAIRS, LONGEST)
        return function(*pairs.columns(average), logits, **ref, **settings)[0] + lam * likelihood(pairs)

    return loss


def liger_kto(beta: float) -> Callable[[Pairs], Tensor]:
    from liger_kernel.chunked_loss.kto_loss import LigerFusedLinearKTOFunction

    def loss(pairs: Pairs) -> Tensor:
        known = pairs.inputs()
        kl = (known["logp_kl"] - known["ref_kl"]).mean().clamp(min=0)
        logp, ref, label = pairs.outputs()["logp"].flatten(), known["ref"].flatten(), known["label"].flatten()
        return LigerFusedLinearKTOFunction.preference_loss_fn(logp, label, logp, ref, beta=beta, kl=kl)[0]

    return loss


# ---- the table -------------------------------------------------------------------------------------------------------


class Line(NamedTuple):
    ours: str
    library: str
    theirs: Callable[[], Callable[[Pairs], Tensor]]  # made only where the library is there
    name: str
    differs: str = ""  # why, where it is known to
    wpo: bool = False


def dpo(text: str, loss_type: str, beta: float, differs: str = "", wpo: bool = False, **settings) -> Line:
    said = ", ".join([f'"{loss_type}"', *(f"{k}={v!r}" for k, v in settings.items())])
    return Line(text, "trl", lambda: trl_dpo(loss_type, beta, **settings), f"DPOConfig: {said}", differs, wpo)


LINES = (
    dpo("sft", "sft", 0.1, "averaged over the tokens of the microbatch, ours per response"),
    dpo("dpo(beta=0.3)", "sigmoid", 0.3),
    dpo("dpo(beta=0.3, label_smoothing=0.2)", "sigmoid", 0.3, "does not read label_smoothing", label_smoothing=0.2),
    dpo("dpo_norm(beta=3.0)", "sigmoid_norm", 3.0),
    dpo("robust_dpo(beta=0.3, label_smoothing=0.2)", "robust", 0.3, label_smoothing=0.2),
    dpo("ipo(tau=0.2)", "ipo", 0.2),
    dpo("ld_dpo(beta=0.3, alpha=0.4)", "sigmoid", 0.3, ld_alpha=0.4),
    dpo("dpo(beta=0.3)", "sigmoid", 0.3, "the weight has no bound, ours is at most 1", wpo=True, use_weighting=True),
    dpo("rso_hinge(beta=0.3)", "hinge", 0.3),
    dpo("exo(beta=0.3, label_smoothing=0.001)", "exo_pair", 0.3, label_smoothing=0.001),
    dpo("nca(beta=0.3)", "nca_pair", 0.3),
    dpo("bco_pair(beta=0.3)", "bco_pair", 0.3),
    dpo("sppo(beta=0.3)", "sppo_hard", 0.3),
    dpo("apo_zero(beta=0.3)", "apo_zero", 0.3),
    dpo("apo_down(beta=0.3)", "apo_down", 0.3),
    dpo("discopop(beta=0.05)", "discopop", 0.05),
    dpo("f_dpo(beta=0.3, divergence='forward_kl')", "sigmoid", 0.3, f_divergence_type="forward_kl"),
    dpo("f_dpo(beta=0.3, divergence='js')", "sigmoid", 0.3, f_divergence_type="js_divergence"),
    dpo("f_dpo(beta=0.3, divergence='alpha', coef=0.3)", "sigmoid", 0.3, f_divergence_type="alpha_divergence",
        f_alpha_divergence_coef=0.3),
    dpo("aot(beta=0.3)", "aot", 0.3),
    dpo("aot_unpaired(beta=0.3)", "aot_unpaired", 0.3),
    Line("cpo(beta=0.3, lam=0.5)", "trl", lambda: trl_cpo(lam=0.5, beta=0.3), "CPOTrainer.cpo_loss, and our −λa_w"),
    Line("simpo(beta=2.0, gamma=1.0)", "trl", lambda: trl_cpo(average=True, loss_type="simpo", beta=2.0, simpo_gamma=1.0),
         'CPOTrainer.cpo_loss, loss_type="simpo"'),
    Line("alphapo(beta=2.5, gamma=0.5, alpha=0.25)", "trl",
         lambda: trl_cpo(average=True, loss_type="simpo", alpha=0.25, beta=2.5, simpo_gamma=0.5),
         "CPOTrainer.cpo_loss, alpha=0.25"),
    Line("orpo(lam=0.5)", "trl", lambda: trl_orpo(0.5), "ORPOTrainer.odds_ratio_loss, and our −a_w"),
    Line("kto(beta=0.3)", "trl", lambda: trl_kto("kto", 0.3), 'KTOConfig: "kto"'),
    Line("apo_zero_unpaired(beta=0.3)", "trl", lambda: trl_kto("apo_zero_unpaired", 0.3), 'KTOConfig: "apo_zero_unpaired"'),
    *(Line(text, "liger_kernel", lambda of=of: liger("DPO", reference=True, **of), f'DPO: "{of["loss_type"]}"')
      for text, of in (
        ("dpo(beta=0.3)", dict(loss_type="sigmoid", beta=0.3)),
        ("rso_hinge(beta=0.3)", dict(loss_type="hinge", beta=0.3)),
        ("exo(beta=0.3, label_smoothing=0.001)", dict(loss_type="exo_pair", beta=0.3, label_smoothing=0.001)),
        ("nca(beta=0.3)", dict(loss_type="nca_pair", beta=0.3)),
        ("robust_dpo(beta=0.3, label_smoothing=0.2)", dict(loss_type="robust", beta=0.3, label_smoothing=0.2)),
        ("bco_pair(beta=0.3)", dict(loss_type="bco_pair", beta=0.3)),
        ("sppo(beta=0.3)", dict(loss_type="sppo_hard", beta=0.3)),
        ("apo_zero(beta=0.3)", dict(loss_type="apo_zero", beta=0.3)),
        ("apo_down(beta=0.3)", dict(loss_type="apo_down", beta=0.3)),
        ("discopop(beta=0.05)", dict(loss_type="discopop", beta=0.05)),
    )),
    Line("cpo(beta=0.3, lam=0.5)", "liger_kernel", lambda: liger("CPO", lam=0.5, beta=0.3), "CPO, and our −λa_w"),
    Line("simpo(beta=2.0, gamma=1.0, label_smoothing=0.1)", "liger_kernel",
         lambda: liger("SimPO", average=True, beta=2.0, gamma=1.0, label_smoothing=0.1), "SimPO"),
    Line("orpo(lam=0.5)", "liger_kernel", lambda: liger("ORPO", lam=1.0, average=True, beta=0.5), "ORPO, and our −a_w"),
    Line("kto(beta=0.3)", "liger_kernel", lambda: liger_kto(0.3), "KTO, with our KL estimate"),
)  # fmt: skip


def versions() -> dict[str, str | None]:
    """Of the libraries; None where one is not installed."""
    found = {}
    for name in dict.fromkeys(line.library for line in LINES):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def compare(line: Line) -> tuple[float, float, float, float]:
    """Our loss, theirs, and the relative differences of the losses and of the gradients by token (against the largest)."""
    results = []
    for function in (ours(line.ours, line.wpo), line.theirs()):
        pairs = random_pairs()
        loss = function(pairs)
        results.append((loss.item(), torch.autograd.grad(loss, pairs.logp)[0] * pairs.mask))
    (a, d_a), (b, d_b) = results
    return a, b, abs(a - b) / abs(a), ((d_a - d_b).abs().max() / d_a.abs().max()).item()


# ---- names -------------------------------------------------------------------------------------------------------------

TRL = "1.16.0"  # the version whose source these names were read in
CPO = "`CPOConfig` of `trl.experimental.cpo`"
# name → in trl (a name in quotes is a loss_type of DPOConfig); elsewhere. "–": not there under any name.
NAMES = {
    "sft": ('"sft"; averaged over the microbatch\'s tokens', "–"),
    "dpo": ('"sigmoid"; does not read `label_smoothing`', "–"),
    "dpo_norm": ('"sigmoid_norm"; does not read `label_smoothing`', "–"),
    "robust_dpo": ('"robust"', "–"),
    "ipo": ('"ipo", `beta` = τ', "–"),
    "dpop": ("–", "libraries: `dpop_lambda` = λ, in some outside the sigmoid"),
    "dpo_shift": ("–", "authors: `dpo_lambda` = λ"),
    "ld_dpo": ("`ld_alpha` = α", "–"),
    "odpo": ("–", "authors: `alpha` = α"),
    "rpo_bwd": ("–", "NeMo: `rpo_bwd_kl`, `gt_reward_scale` = η"),
    "rpo_fwd": ("–", "NeMo: `rpo_fwd_kl`, `gt_reward_scale` = η"),
    "rpo_sq": ("–", "NeMo: `rpo_sq`, `gt_reward_scale` = η"),
    "rso_hinge": ('"hinge"', "paper: γ = β"),
    "exo": ('"exo_pair"; `label_smoothing` must be given', "–"),
    "nca": ('"nca_pair"', "–"),
    "bco_pair": (
        '"bco_pair"; δ = 0',
        "MPO's authors, LLaMA-Factory, ms-swift, older trl: δ, the mean reward of all batches so far",
    ),
    "sppo": ('"sppo_hard"', "paper: 1/η = β"),
    "sppo_soft": ("–", 'authors: "sppo_single", with ½ in front'),
    "apo_zero": ('"apo_zero"', "–"),
    "apo_down": ('"apo_down"', "–"),
    "discopop": ('"discopop", `discopop_tau` = τ', "–"),
    "f_dpo": ("`f_divergence_type`, `f_alpha_divergence_coef` = `coef`", "paper: α = 1 − `coef`"),
    "aot": ('"aot"', "–"),
    "aot_unpaired": ('"aot_unpaired"', 'older trl: "aot_pair"'),
    "cpo": (f"{CPO}, `cpo_alpha` = λ; likelihood averaged over the microbatch's tokens", "–"),
    "orpo": (
        "`ORPOConfig` of `trl.experimental.orpo`, `beta` = λ; likelihood over prompt and response",
        "authors: `alpha` = λ",
    ),
    "simpo": (f'{CPO}, `loss_type="simpo"`, `cpo_alpha=0`, `simpo_gamma` = γ', "SimPO's configs: `gamma_beta_ratio` = γ/β"),
    "repo": ("–", "SimPO's γ/β"),
    "alphapo": (f'{CPO}, `loss_type="alphapo"`, `simpo_gamma` = γ', "–"),
    "alpha_dpo": ("–", 'authors\' configs: γ/β and α/β; "0.4" and "0.05" at β = 10 are 4 and 0.5'),
    "gamma_simpo": ("–", "authors' configs: `gamma_beta_ratio` = γ₀/β"),
    "kto": ("`KTOConfig`, `desirable_weight`, `undesirable_weight` = λ_d, λ_u", "–"),
    "bco": ('none (older trl: `BCOConfig`); "bco_pair" is for pairs', "–"),
    "apo_zero_unpaired": ('`KTOConfig(loss_type="apo_zero_unpaired")`', "–"),
}


def names() -> str:
    """A Markdown table: each objective with its settings, its name and settings in trl, and elsewhere."""
    rows = [("here", f"trl {TRL}", "elsewhere"), ("---",) * 3]
    rows += [(f"`{name}({', '.join(OBJECTIVES[name].settings)})`".replace("()", ""), *there) for name, there in NAMES.items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", action="store_true", help="print the names instead")
    if parser.parse_args(argv).names:
        print(names())
        return 0
    there, rows, wrong = versions(), [["ours", "library", "theirs", "loss", "their loss", "difference", "of gradients", ""]], 0
    for line in LINES:
        if there[line.library] is None:
            continue
        a, b, value, gradient = compare(line)
        same = max(value, gradient) < BOUND
        wrong += same == bool(line.differs)
        verdict = ("equal" if same else "DIFFERENT") if not line.differs else f"{'EQUAL, though ' * same}{line.differs}"
        name = f"`{line.ours}`" + ", `--wpo`" * line.wpo
        rows.append([name, line.library, line.name, f"{a:.5f}", f"{b:.5f}", f"{value:.1e}", f"{gradient:.1e}", verdict])
    print(markdown([rows[0], ["---"] * len(rows[0]), *rows[1:]]))
    said = [f"{name} {version or 'is not installed: its lines are left out'}" for name, version in there.items()]
    print(f"torch {torch.__version__}, {', '.join(said)}; {PAIRS} pairs, fp32, bound {BOUND:g}, {wrong} lines not as expected.")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
