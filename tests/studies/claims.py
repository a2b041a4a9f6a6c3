"""Which of the papers' claims hold, and where: every claim in eight worlds, which are toy tasks.

    python tests/studies/claims.py --out runs/claims                     # some 800 runs: 45 minutes on two cores
    python tests/studies/claims.py --out runs/claims --resume            # goes on where a killed one stopped

The worlds: an annotator without and with a bias for length, exact and noisy, and two starts (`--world`: in "stock" the likely
answer is a careless one). A claim compares two runs in the same world, each at the better of three learning rates in a world of
its own. It holds if the mean difference over the seeds is more than two standard errors above 0, fails if it is as far below,
and is open otherwise.
"""

import itertools
import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch  # noqa: E402
from miniature import MEASURES, job_key, markdown, run_jobs  # noqa: E402

import train  # noqa: E402
from data import UserError, setting  # noqa: E402

LEARNING_RATES, TUNING_SEED = (2e-4, 5e-4, 1e-3), 100
SIMPO, ALPHA = "simpo(beta=2.0, gamma=1.0)", "alpha_dpo(beta=2.0, gamma=1.0, alpha={})"
RUNS = {  # name → what differs from the default run
    "simpo": dict(objective=SIMPO),
    "simpo, POET": dict(objective=SIMPO, equal_length=1.0),
    "simpo, γ = 0": dict(objective="simpo(beta=2.0, gamma=0.0)"),
    "simpo, γ = 4": dict(objective="simpo(beta=2.0, gamma=4.0)"),
    "sums": dict(objective="simpo(beta=0.2, gamma=0.0, average=False)"),
    "sums, POET": dict(objective="simpo(beta=0.2, gamma=0.0, average=False)", equal_length=1.0),
    "dpo": dict(objective="dpo(beta=0.5)"),
    "simper": dict(objective="simper"),
    "sft": dict(objective="sft"),
    "α = 0.1": dict(objective=ALPHA.format(0.1)),
    "α = 0.5": dict(objective=ALPHA.format(0.5)),
    "α = 0.5, no stop-gradient": dict(objective=ALPHA.format("0.5, stop_gradient=False")),
    "γ-PO": dict(objective="gamma_simpo(beta=2.0, gamma=1.0, tau=1.0)"),
    "amapo": dict(objective="amapo(beta=2.5)"),
    "4 replays": dict(objective=SIMPO, replays=4),
    "4 replays, reset": dict(objective=SIMPO, replays=4, reset_alpha=0.5),
    "LoRR": dict(objective=SIMPO, replays=4, reset_alpha=0.5, sft_weight=0.5),
}


class Claim(NamedTuple):
    text: str
    measure: str  # one of MEASURES
    more: str  # the run that has more of it, as claimed
    less: str


CLAIMS = (
    Claim("averages stop the growth of length (SimPO)", "length", "sums", "simpo, γ = 0"),
    Claim("SimPO is ahead of DPO", "win_rate", "simpo", "dpo"),
    Claim("SimPER is ahead of SimPO", "win_rate", "simper", "simpo"),
    Claim("SimPER needs no reference: it is ahead of DPO", "win_rate", "simper", "dpo"),
    Claim("SimPER keeps the chosen responses likelier than SimPO", "chosen", "simper", "simpo"),
    Claim("a preference loss is ahead of SFT on the chosen (SimPO)", "win_rate", "simpo", "sft"),
    Claim("α = 0.1 improves on SimPO (α-DPO)", "win_rate", "α = 0.1", "simpo"),
    Claim("α = 0.5 improves on SimPO (α-DPO)", "win_rate", "α = 0.5", "simpo"),
    Claim("α-DPO needs the stop-gradient", "win_rate", "α = 0.5", "α = 0.5, no stop-gradient"),
    Claim("a larger γ lowers the chosen likelihood (SimPO)", "chosen", "simpo, γ = 0", "simpo, γ = 4"),
    Claim("POET shortens answers of SimPO on sums", "length", "sums", "sums, POET"),
    Claim("POET makes SimPO on sums win more", "win_rate", "sums, POET", "sums"),
    Claim("POET makes SimPO win more", "win_rate", "simpo, POET", "simpo"),
    Claim("margins that follow the batch help (γ-PO)", "win_rate", "γ-PO", "simpo"),
    Claim("margins for pairs below the mean help (AMaPO)", "win_rate", "amapo", "simpo"),
    Claim("replays alone overfit (LoRR)", "win_rate", "simpo", "4 replays"),
    Claim("a reset makes replays pay (LoRR)", "win_rate", "4 replays, reset", "4 replays"),
    Claim("reset and SFT term make replays pay (LoRR)", "win_rate", "LoRR", "4 replays"),
)
WORLDS = {
    f"{world}, noise {noise:g}, bias {bias:g}": dict(world=world, annotator_noise=noise, length_bias=bias)
    for world, noise, bias in itertools.product(("plain", "stock"), (0.1, 0.5), (0.0, 0.03))
}


@dataclass
class Study(train.Settings):
    seeds: int = setting(3, "runs of each setting, each in a world of its own")


def differences(claim: Claim, runs: dict[str, list[dict]]) -> tuple[float, float]:
    """Mean over the seeds of what is claimed to be positive, and its standard error; runs of one seed are a pair."""
    pairs = [
        (a.get(claim.measure, math.nan), b.get(claim.measure, math.nan)) for a, b in zip(runs[claim.more], runs[claim.less])
    ]
    gaps = torch.tensor([a - b for a, b in pairs], dtype=torch.float64)
    return gaps.mean().item(), (gaps.std() / len(gaps) ** 0.5).item() if len(gaps) > 1 else math.nan


VERDICTS = ("holds", "open", "fails")


def verdict(mean: float, error: float) -> str:
    if not math.isfinite(mean + error):
        return "–"
    return "holds" if mean > 2 * error else "fails" if mean < -2 * error else "open"


def cell(claim: Claim, runs: dict[str, list[dict]]) -> str:
    mean, error = differences(claim, runs)
    _, digits, percent = MEASURES[claim.measure]
    scale = 100 if percent else 1
    return f"{verdict(mean, error)}: {scale * mean:+.{digits}f} ± {scale * error:.{digits}f}"


def table(results: dict[str, dict[str, list[dict]]]) -> str:
    """A claim a line, a world a column: verdict, difference (points of win rate, words, nats per token) and standard error."""
    lines = [["claim", *results], ["---"] * (1 + len(results))]
    return markdown(lines + [[claim.text, *(cell(claim, runs) for runs in results.values())] for claim in CLAIMS])


def summary(results: dict[str, dict[str, list[dict]]]) -> str:
    """A claim a line: in how many worlds it holds, is open, fails."""
    lines = [["claim", *VERDICTS], ["---"] * (1 + len(VERDICTS))]
    for claim in CLAIMS:
        found = [verdict(*differences(claim, runs)) for runs in results.values()]
        lines.append([claim.text, *(str(found.count(v)) for v in VERDICTS)])
    return markdown(lines)


def study(s: Study) -> dict:
    if s.seeds < 2:
        raise UserError(f"seeds is {s.seeds}; a standard error needs two")
    out = train.prepare_out(s)
    train.write_whole(out / train.MARKER, json.dumps({"plainpo": {"study": "claims"}}))
    train.write_whole(out / "settings.json", json.dumps(asdict(s), indent=2) + "\n")
    common = {"cache": s.cache}
    tried = {
        (world, name): [common | of_world | run | {"lr": lr, "seed": TUNING_SEED} for lr in LEARNING_RATES]
        for world, of_world in WORLDS.items() for name, run in RUNS.items()
    }  # fmt: skip
    done = {job_key(r["job"]): r for r in run_jobs([job for jobs in tried.values() for job in jobs], out / "runs.jsonl")}
    best = {key: max(jobs, key=lambda job: done[job_key(job)].get("win_rate", 0.0)) for key, jobs in tried.items()}
    jobs = [job | {"seed": seed} for job in best.values() for seed in range(s.seeds)]
    found = iter(run_jobs(jobs, out / "runs.jsonl"))
    results: dict[str, dict[str, list[dict]]] = {world: {} for world in WORLDS}
    for world, name in best:
        results[world][name] = [next(found) for _ in range(s.seeds)]
    text = f"{table(results)}\n{summary(results)}"
    (out / "claims.md").write_text(text)
    print(text)
    return {"out": str(out), "results": results}


def main(argv: list[str] | None = None) -> dict:
    """The command line as a function. A user error ends with a message and exit code 2."""
    return train.main(argv, lambda argv: study(train.parse_settings(argv, Study, "tests/studies/claims.py", __doc__)))


if __name__ == "__main__":
    main()
