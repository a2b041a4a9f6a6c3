"""TR-DPO: the reference moves towards the policy as training goes.

    python tests/studies/tr_dpo.py --model MODEL --dataset PAIRS.jsonl --objective dpo --sync-every 8 --sync-alpha 0.6

Gorbatovski 2024, arXiv 2404.09656: after every `sync_every` steps reference ← α policy + (1−α) reference, its soft updates,
and with α = 1 its hard ones. The reference is then a second model in memory, whose log-probs are computed at every step and not
kept.

A loop around `train.prepare` and `train.train_step`, in one process; the output folder is that of train.py. A stopped run
begins anew.
"""

import copy
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
from torch import nn  # noqa: E402

import distributed as dist  # noqa: E402
import train  # noqa: E402
from data import UserError, setting  # noqa: E402
from losses import Objective  # noqa: E402


@dataclass
class Settings(train.Settings):
    sync_every: int = setting(8, "the reference moves after every so many steps")
    sync_alpha: float = setting(0.6, "how far it moves, reference ← α policy + (1−α) reference")


class MovingReference(train.Run):
    """A run whose every pass also asks the reference, as a model, for its log-probs."""

    @property
    def outputs(self) -> tuple[str, ...]:
        return (*super().outputs, "ref")


@torch.no_grad()
def move(reference: nn.Module, policy: nn.Module, alpha: float) -> None:
    """reference ← α policy + (1−α) reference, in place."""
    for there, here in zip(reference.parameters(), policy.parameters()):
        there.lerp_(here, alpha)


def with_moving_reference(run: train.Run) -> MovingReference:
    """The run with a copy of its model as the reference, in place of the numbers that were scored once."""
    run = MovingReference(**vars(run))
    run.ref = {}
    for name in ("ref", "ref_prefix_logp"):
        run.held_out_inputs.pop(name, None)
    run.policy.reference = copy.deepcopy(run.policy.model).requires_grad_(False).train(False)
    run.policy.use_layout(run.layout)  # of the copy too
    return run


def check(s: Settings, objective: Objective) -> None:
    if s.sync_every < 1 or not 0 <= s.sync_alpha <= 1:
        raise UserError("sync_every is at least 1 and sync_alpha from 0 to 1")
    if objective.needs("ref_kl"):
        raise UserError(f"{objective.name} estimates a KL on completions of other prompts, whose reference is scored once")
    if not objective.needs("ref"):
        raise UserError(f"{objective.name} has no reference's log-probs, so there is nothing to move")
    if dist.world_size() > 1:
        raise UserError("the moving reference is a whole second model: start one process, without torchrun")
    if s.resume:
        raise UserError("a TR-DPO run cannot be resumed: its reference is in no checkpoint")


def train_tr_dpo(s: Settings) -> dict:
    """One TR-DPO run from settings to exported model; returns the summary of train.finish."""
    started = time.perf_counter()
    check(s, train.read_objective(s.objective))
    run = with_moving_reference(train.prepare(s))
    writer = train.MetricsWriter(run)
    if run.held_out:
        writer.evaluated(train.evaluate(run), run.initial_answers)
    for rows in writer.progress(run.plan):
        writer.stepped(train.train_step(run, rows))
        if run.step % s.sync_every == 0:
            move(run.policy.reference, run.policy.model, s.sync_alpha)
        if run.held_out and (run.step == len(run.plan) or train.due(run, s.eval_every)):
            writer.evaluated(train.evaluate(run), train.answers(run))
    return train.finish(run, writer, started)


def main(argv: list[str] | None = None) -> dict:
    return train.main(argv, lambda argv: train_tr_dpo(train.parse_settings(argv, Settings, "tests/studies/tr_dpo.py", __doc__)))


if __name__ == "__main__":
    main()
