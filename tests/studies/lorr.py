"""LoRR: each batch several times, a partial reset of the weights after each use, and a supervised term.

    python tests/studies/lorr.py --model MODEL --dataset PAIRS.jsonl --replays 3 --reset-alpha 0.5 --sft-weight 0.5

Liu 2025, arXiv 2508.06412; RECONSTRUCTED: the sources at hand fix replaying each batch, resetting towards the initial weights
after a replay, and a hybrid loss whose SFT weight grows with the replay. Ours are: the formula of that weight,
λ_l = sft_weight (l + 1) / L at replay l of L, counted from 0; a reset after every replay, the last one too; Adam's moments that
stay as they are; one learning rate schedule over all optimizer steps. The SFT term is −logp/length of the chosen response.

A loop around `train.prepare` and `train.train_step`; the output folder is that of train.py. A stopped run begins anew.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import train  # noqa: E402
from data import UserError, setting  # noqa: E402
from losses import Objective, parse_objective  # noqa: E402


@dataclass
class Settings(train.Settings):
    replays: int = setting(1, "optimizer steps in a row on each batch (the paper: 3)")
    reset_alpha: float = setting(1.0, "after a step θ ← αθ + (1−α)θ⁰ in reset_modules (the paper: 0.5; 1: no reset)")
    reset_modules: str = setting("down_proj", "parts of parameter names, commas between, that reset_alpha acts on")
    sft_weight: float = setting(0.0, "weight of the chosen response's likelihood at the last replay (the paper: 0.5)")


def with_sft(objective: Objective, weight: float) -> Objective:
    """The objective plus weight · SFT on the chosen response of each pair."""
    if not weight:
        return objective
    sft = parse_objective(f"{weight!r} * sft")
    return Objective([*objective.terms, *sft.terms])


def reset_parameters(model: nn.Module, s: Settings) -> list[nn.Parameter]:
    """The parameters that reset_alpha acts on, by name; none where nothing is reset."""
    if s.reset_alpha == 1:
        return []
    named = dict(model.named_parameters())
    parts = [part.strip() for part in s.reset_modules.split(",")]
    for part in parts:
        if not part or not any(part in name for name in named):
            last = ", ".join(list(named)[-12:])
            raise UserError(f"reset_modules: {part!r} is part of no parameter's name; the last names are {last}")
    return [p for name, p in named.items() if any(part in name for part in parts)]


@torch.no_grad()
def reset(origin: list[tuple[nn.Parameter, Tensor]], alpha: float) -> None:
    """θ ← αθ + (1−α)θ⁰, in place; where a parameter is sharded each rank does its rows."""
    for parameter, initial in origin:
        parameter.mul_(alpha).add_(initial, alpha=1 - alpha)


def check(s: Settings, objective: Objective) -> None:
    if s.replays < 1 or not 0 <= s.reset_alpha <= 1 or s.sft_weight < 0:
        raise UserError("replays is at least 1, reset_alpha from 0 to 1, sft_weight not negative")
    if s.sft_weight and objective.unpaired:
        raise UserError(
            f"sft_weight adds the likelihood of a pair's chosen response; {objective.name} takes single completions"
        )
    if s.resume:
        raise UserError("a LoRR run cannot be resumed: its replays and initial weights are in no checkpoint")


def train_lorr(s: Settings) -> dict:
    """One LoRR run from settings to exported model; returns the summary of train.finish."""
    started = time.perf_counter()
    objective = train.read_objective(s.objective)
    check(s, objective)
    run = train.prepare(s)
    origin = [(p, p.detach().clone()) for p in reset_parameters(run.policy.model, s)]
    run.plan = [rows for rows in run.plan for _ in range(s.replays)][: s.max_steps]
    if run.ref_kl is not None:
        run.ref_kl = [ref for ref in run.ref_kl for _ in range(s.replays)]
    writer = train.MetricsWriter(run)
    if run.held_out:
        writer.evaluated(train.evaluate(run), run.initial_answers)
    for rows in writer.progress(run.plan):
        replay = run.step % s.replays
        weight = s.sft_weight * (replay + 1) / s.replays
        run.objective = with_sft(objective, weight)
        line = train.train_step(run, rows)
        run.objective = objective
        reset(origin, s.reset_alpha)
        writer.stepped(line | {"replay": replay + 1, "sft_weight": weight})
        if run.held_out and (run.step == len(run.plan) or train.due(run, s.eval_every)):
            writer.evaluated(train.evaluate(run), train.answers(run))
    return train.finish(run, writer, started)


def main(argv: list[str] | None = None) -> dict:
    return train.main(argv, lambda argv: train_lorr(train.parse_settings(argv, Settings, "tests/studies/lorr.py", __doc__)))


if __name__ == "__main__":
    main()
