"""The α-DPO paper (Wu 2024, 2410.10148) in miniature: tables, figures, statements; and the slides of SimPO and SimPER.

    python tests/studies/miniature.py --paper alpha_dpo --out runs/alpha_dpo

tunes every method of the tables in one world, runs it in `seeds` others, and *follows* some runs: held-out log-probs, token
KLs, gradient norms and answers while they train. Every part becomes a table or a picture in the output folder and a sentence,
all put together in report.md. The paper's numbers stand beside ours; they are printed as they stand in it.

Shape letters: n held-out pairs, 2 responses of each (chosen, rejected).
"""

import copy
import functools
import math
import tempfile
from dataclasses import replace
from pathlib import Path

import miniature
import numpy as np
import torch
import torch.nn.functional as F
import toy
from miniature import GRID, markdown, mean_and_error
from torch import Tensor

import data
import train
from data import UserError
from logprobs import ResponseLogProbs
from losses import OBJECTIVES, bradley_terry

# ---- what is run -----------------------------------------------------------------------------------------------------

# β, γ, α of α-DPO as published, in the paper's units; Table 2 is of the first two.
SETTINGS = {
    "Llama3-Instruct v0.2": (10.0, 4.0, 2.0),
    "Mistral-Instruct": (2.5, 0.375, 0.125),
    "Llama3-Instruct": (2.5, 1.5, 0.5),
}
ALPHA_DPO = "alpha_dpo(beta={}, gamma={}, alpha={})"
METHODS = {  # Table 1 → what is tuned
    "SFT on the chosen": GRID["sft"],
    "DPO": GRID["dpo"],
    "IPO": GRID["ipo"],
    "CPO": GRID["cpo"],
    "KTO": GRID["kto"],
    "ORPO": GRID["orpo"],
    "R-DPO": GRID["rdpo"],
    "SimPO": ("simpo(beta=10.0, gamma=3.0)", "simpo(beta=2.5, gamma=0.25)", "simpo(beta=2.5, gamma=1.375)"),  # published
    "α-DPO": tuple(ALPHA_DPO.format(*numbers) for numbers in SETTINGS.values()),
}
NO_LENGTHS = {  # Table 5
    "SimPO without LN": ("simpo(beta=0.1, gamma=0.5, average=False)", "simpo(beta=0.5, gamma=0.5, average=False)"),
    "α-DPO without LN": tuple(ALPHA_DPO.format(b, 0.5, "0.125, average=False") for b in (0.1, 0.5)),
}
TOKEN_KL = {  # Table 6
    "TDPO (eq. 17)": GRID["tdpo1"],
    "TDPO₂": GRID["tdpo2"],
    "α-DPO with δ": tuple(text.replace("alpha_dpo", "alpha_dpo_kl") for text in METHODS["α-DPO"]),
}
SLIDES = {"SLiC": GRID["slic"], "SimPER": GRID["simper"]}  # the slides of SimPER have these besides
VARIANTS = {  # Table 2: implicit reference model → the objective at b, g, a = β, γ, α; a / b is the authors' code's α
    "U": lambda b, g, a: f"simpo(beta={b}, gamma={g})",
    "U(π_θ/π_ref)^α": lambda b, g, a: ALPHA_DPO.format(b, g, a),
    "without normalisation": lambda b, g, a: ALPHA_DPO.format(b, g, f"{a / b:g}, normalize=False"),
    "without stop-gradient": lambda b, g, a: ALPHA_DPO.format(b, g, f"{a}, stop_gradient=False"),
    "γ = 0": lambda b, g, a: ALPHA_DPO.format(b, 0.0, a),
    "Uπ_θ^α": lambda b, g, a: ALPHA_DPO.format(b, g, f"{a}, margin='policy'"),
    "Uπ_ref^α": lambda b, g, a: ALPHA_DPO.format(b, g, f"{a}, margin='reference'"),
    "U(1/π_ref)^α": lambda b, g, a: ALPHA_DPO.format(b, g, f"{a}, margin='inverse_reference'"),
}
ALPHAS = (0.0, 0.01, 0.05, 0.1, 0.2)  # α/β: the search range, and SimPO
GAMMAS = (0.0, 0.1, 0.3, 0.5, 1.0)  # γ/β
FIGURE_5 = {f"β {b:g}, γ {g:g}": (b, g) for b, g, _ in SETTINGS.values()}
EVERY, CHECKPOINTS = 4, 4  # a followed run is measured every so many steps, and its answers are judged so many times

# ---- what the paper has: LC and WR on AlpacaEval 2, % ------------------------------------------------------------------

PAPER_1 = {  # method → LC, WR of Llama3-Instruct, Mistral-Instruct, Llama3-Instruct v0.2, Gemma2-Instruct
    "SFT": (24.0, 23.6, 19.0, 15.4, 24.0, 23.6, 48.7, 36.5),
    "DPO": (40.2, 38.1, 20.3, 17.9, 51.9, 50.8, 70.4, 66.9),
    "IPO": (35.9, 34.4, 22.3, 18.6, 40.6, 39.6, 62.6, 58.4),
    "CPO": (29.6, 34.4, 26.2, 31.7, 36.5, 40.8, 56.4, 53.4),
    "KTO": (38.3, 34.1, 19.4, 20.3, 41.4, 36.4, 61.7, 55.5),
    "ORPO": (31.6, 29.8, 24.0, 23.0, 36.5, 33.1, 56.2, 46.7),
    "R-DPO": (40.3, 37.3, 21.4, 22.2, 51.6, 50.7, 68.3, 66.9),
    "SimPO": (43.8, 38.0, 30.2, 32.1, 55.6, 49.6, 72.4, 65.0),
    "α-DPO": (46.6, 38.1, 32.3, 32.6, 58.7, 51.1, 73.4, 66.1),
}
MODELS = ("Llama3-Instruct", "Mistral-Instruct", "Llama3-Instruct v0.2", "Gemma2-Instruct")
PAPER_2 = {  # setting → LC of the rows of VARIANTS
    "Llama3-Instruct v0.2": (55.6, 58.7, 56.5, 2.7, 51.2, 57.2, 56.3, 56.3),
    "Mistral-Instruct": (30.2, 32.3, 32.1, 27.2, 31.9, 31.6, 28.6, 32.2),
}
PAPER_5 = {"DPO": (40.2, 38.1), "SimPO without LN": (42.4, 40.4), "α-DPO without LN": (44.4, 42.6)}  # Llama3-Instruct
PAPER_6 = {"TDPO (eq. 17)": (52.8, 45.9), "α-DPO with δ": (56.9, 50.4), "α-DPO": (58.7, 51.1)}  # headed Llama3-Instruct


# ---- a followed run --------------------------------------------------------------------------------------------------


def follow(job: dict) -> dict:
    """A run like that of miniature.experiment, measured while it trains: see `followed`."""
    settings = {k: v for k, v in job.items() if k not in ("every", "checkpoints")}
    with tempfile.TemporaryDirectory() as folder:
        try:
            run = train.prepare(miniature.run_settings(settings, f"{folder}/run"))
            return {"job": job, **followed(run, Path(folder), job["every"], job["checkpoints"])}
        except UserError as error:
            return {"job": job, "error": str(error)}


def followed(run: train.Run, folder: Path, every: int, checkpoints: int) -> dict:
    """Train to the end of the plan.

    Returns:
        lines: means over held-out pairs every `every` steps and after the last, see `measure`
        judged: toy.judge's measures of the answers at `checkpoints` equal distances
        pairs: logp, ref, kl, length of the held-out pairs after the last step, (n, 2) each
        reference: per step mean, standard deviation and share above 0 of log π_ref(y_w) − log π_ref(y_l) of its batch, where
            the objective has a reference
        vocabulary: tokens
    """
    paired = train.parse_objective("simpo")  # sft and kto keep the held-out pairs otherwise
    _, pairs, _ = train.load_rows(run.s, run.tokenizer, paired)
    start = copy.deepcopy(run.policy.model).requires_grad_(False).train(False)
    scorer = replace(run, policy=ResponseLogProbs(run.policy.model, start))
    inputs = train.counted_inputs(pairs, run.device) | {"ref": train.log_probs(scorer, pairs)["logp"]}
    steps = len(run.plan)
    lines = [measure(run, scorer, pairs, inputs)[0]]
    judged = []
    for rows in run.plan:
        train.train_step(run, rows)
        if run.step % every == 0 or run.step == steps:
            line, values = measure(run, scorer, pairs, inputs)
            lines.append(line)
        if run.step * checkpoints % steps == 0:
            judged.append({"step": run.step, **judge(run, folder)})
    names = {"logp": "logp", "ref": "ref", "kl": "kl", "length": "len"}
    last = {name: np.round(values[key].tolist(), 4).tolist() for name, key in names.items()}
    more = {} if not run.ref or run.objective.unpaired else {"reference": reference_margins(run)}
    return {"lines": lines, "judged": judged, "pairs": last, "vocabulary": len(run.tokenizer), **more}


def measure(run: train.Run, scorer: train.Run, pairs, inputs: dict[str, Tensor]) -> tuple[dict, dict[str, Tensor]]:
    """Means over the held-out pairs now: a_w, a_l (nats per token), KL(π_ref ‖ π_θ) summed along chosen and rejected (nats per
    response), gradient norms; and what they are made of, (n, 2) each."""
    values = inputs | train.log_probs(scorer, pairs, ("kl",))
    means = {"a": values["logp"] / values["len"], "kl": values["kl"]}
    line = {f"{name}_{side}": x[:, i].mean().item() for name, x in means.items() for i, side in enumerate("wl")}
    norms = {}
    if not run.objective.unpaired:
        norms = gradient_norms(run, pairs[:64], {name: x[:64] for name, x in inputs.items()})
    return {"step": run.step, **line, **norms}, values


def gradient_norms(run: train.Run, pairs, inputs: dict[str, Tensor]) -> dict[str, float]:
    """Norms of the two parts of the gradient of the mean loss of these pairs, through the chosen and through the rejected."""
    parameters = [p for p in run.policy.model.parameters() if p.requires_grad]
    batch = data.padded_batch(list(pairs))
    outputs = {name: x.view(-1, 2) for name, x in run.policy(batch, run.outputs).items()}
    _, factors = run.objective.loss_and_grad(outputs, inputs, [run.s.seed])
    norms = {}
    for i, side in enumerate("wl"):
        total = sum((outputs[name][:, i] * x[:, i]).sum() for name, x in factors.items())
        gradients = torch.autograd.grad(total / len(pairs), parameters, retain_graph=True)
        norms[f"norm_{side}"] = torch.stack([g.norm() for g in gradients]).norm().item()
    return norms


def judge(run: train.Run, folder: Path) -> dict[str, float]:
    """What toy.judge measures of the policy's answers now."""
    run.policy.model.save_pretrained(folder / "now")
    run.tokenizer.save_pretrained(folder / "now")
    task = Path(run.s.model).parent
    return {name: now for name, (_, now) in toy.judge(folder / "now", task, folder / "answers.jsonl").items()}


def reference_margins(run: train.Run) -> list[list[float]]:
    """Mean, standard deviation and share above 0 of log π_ref(y_w) − log π_ref(y_l) in each batch of the plan."""
    margins = [run.ref["ref"][rows, 0] - run.ref["ref"][rows, 1] for rows in run.plan]
    return [[m.mean().item(), m.std().item(), (m > 0).float().mean().item()] for m in margins]


# ---- statements ------------------------------------------------------------------------------------------------------


def pearson(x, y) -> float:
    return float(np.corrcoef(x, y)[0, 1]) if len(x) > 1 else math.nan


def ranks(x) -> np.ndarray:
    """1 for the smallest; equal values share the mean of their ranks."""
    x = np.asarray(x)
    return (x[:, None] > x).sum(1) + ((x[:, None] == x).sum(1) + 1) / 2


def spearman(x, y) -> float:
    return pearson(ranks(x), ranks(y))


def theorem_3_1(logp: Tensor, length: Tensor, vocabulary: int, beta: float) -> dict[str, float]:
    """DPO whose reference is U(y) = V^−|y|, against SimPO; logp and length (n, 2).

    Exactly: DPO(U) = −logσ(β(s_w − s_l) − γ_i), γ_i = −β(n_w − n_l) log V, the pair's own margin, 0 at equal lengths; with
    averages −logσ(βd), for log U is the same per token: γ = 0. `constant`: how far SimPO with their mean as γ is off.
    """
    ref = -length * math.log(vocabulary)

    def columns(*tensors):
        return [x[:, i] for x in tensors for i in (0, 1)]

    dpo = OBJECTIVES["dpo"](*columns(logp, ref), beta=beta)
    gamma = beta * (ref[:, 0] - ref[:, 1])
    simpo = functools.partial(OBJECTIVES["simpo"], *columns(logp, length), beta=beta)
    own = bradley_terry(beta * (logp[:, 0] - logp[:, 1]) - gamma)
    averaged = OBJECTIVES["dpo_norm"](*columns(logp, ref, length), beta=beta)
    return {
        "own": (dpo - own).abs().max().item(),
        "equal": (length[:, 0] == length[:, 1]).double().mean().item(),
        "mean": gamma.mean().item(),
        "std": gamma.std(correction=0).item(),
        "low": gamma.min().item(),
        "high": gamma.max().item(),
        "constant": (dpo - simpo(gamma=gamma.mean().item(), average=False)).abs().mean().item(),
        "averaged": (averaged - simpo(gamma=0.0)).abs().max().item(),
    }


def lemma_4_2(logp: Tensor, ref: Tensor, length: Tensor, beta: float, gamma: float, alpha: float) -> dict[str, float]:
    """Both sides of L_α-DPO ≤ L_online + E[αB(logσ(A) − σ(A) + 1)], means over n pairs.

    A = βd − γ, B = Δ (sums); left −logσ(A − αB), online −w logσ(A) with the proof's w = e^(αB), which is `online_simpo` for an
    earlier policy log π_old = log π_ref + α log(π_θ/π_ref). `holds`: the share of the pairs for which it holds one by one.
    """
    a, s = logp / length, ref + alpha * (logp - ref)
    big_a = beta * (a[:, 0] - a[:, 1]) - gamma
    big_b = (logp - ref)[:, 0] - (logp - ref)[:, 1]
    left = -F.logsigmoid(big_a - alpha * big_b)
    sides = [x[:, i] for x in (logp, ref, s, length) for i in (0, 1)]
    online = OBJECTIVES["online_simpo"](*sides, beta=beta, gamma=gamma, clip=math.inf)
    correction = alpha * big_b * (F.logsigmoid(big_a) - torch.sigmoid(big_a) + 1)
    means = {"left": left, "online": online, "correction": correction, "holds": (left <= online + correction + 1e-9).double()}
    return {name: x.mean().item() for name, x in means.items()}


def lemma_4_3(logp: Tensor, ref: Tensor, kl: Tensor) -> dict[str, float]:
    """Over n pairs, δ/β = D_l − D_w against M/β = u_w − u_l: correlations and spreads; and what it rests on, D ≈ −u."""
    u = logp - ref
    m, d = u[:, 0] - u[:, 1], kl[:, 1] - kl[:, 0]
    each = {f"D_{side}": pearson(kl[:, i], -u[:, i]) for i, side in enumerate("wl")}
    return {"pearson": pearson(d, m), "spearman": spearman(d, m), "std_d": float(d.std()), "std_m": float(m.std()), **each}


def agreement(reward: Tensor, logp: Tensor, length: Tensor) -> float:
    """Share of the pairs that reward and average log-prob put in the same order."""
    a = logp / length
    return ((reward[:, 0] > reward[:, 1]) == (a[:, 0] > a[:, 1])).double().mean().item()


# ---- the study -------------------------------------------------------------------------------------------------------


def study(s: miniature.Study, common: dict, out: Path) -> dict[str, str]:
    """Everything: tune, run, follow, write. Returns the parts of report.md, title → text."""
    file = out / "runs.jsonl"
    grid = METHODS | NO_LENGTHS | TOKEN_KL | SLIDES
    grid |= {f"{of}: {row}": (text(*SETTINGS[of]),) for of in PAPER_2 for row, text in VARIANTS.items()}
    best = miniature.tune(grid, common, file)
    results = everywhere(best | curves(best), s.seeds, file)
    traces = everywhere(
        {name: job | {"every": EVERY, "checkpoints": CHECKPOINTS} for name, job in followed_jobs(best).items()},
        s.seeds,
        file,
        follow,
    )
    traces = {name: [run for run in runs if "error" not in run] for name, runs in traces.items()}
    parts = report(best, results, traces, out)
    worlds = f"Means ± standard errors over {s.seeds} worlds" if s.seeds > 1 else "One world"
    how = f"{worlds} other than the one of the tuning, which tries each call of a method's grid at the learning rates "
    how += f"{', '.join(f'{lr:g}' for lr in miniature.LEARNING_RATES)}.\n"
    text = how + "".join(f"\n### {title}\n\n{body}" for title, body in parts.items())
    (out / "report.md").write_text(text)
    print(text)
    return parts


def everywhere(jobs: dict[str, dict], seeds: int, file: Path, work=miniature.experiment) -> dict[str, list[dict]]:
    """Every job in every world."""
    results = iter(miniature.run_jobs([job | {"seed": seed} for job in jobs.values() for seed in range(seeds)], file, work))
    return {name: [next(results) for _ in range(seeds)] for name in jobs}


def numbers(job: dict) -> dict:
    return train.parse_objective(job["objective"]).terms[0].given


def curves(best: dict[str, dict]) -> dict[tuple[str, float], dict]:
    """Figure 5: α-DPO over α/β for each (β, γ), at Table 1's learning rate where these are its, else at Table 2's of that β."""
    rates = {SETTINGS[of][0]: best[f"{of}: U(π_θ/π_ref)^α"] for of in PAPER_2}
    tuned = numbers(best["α-DPO"])
    jobs = {}
    for label, (b, g) in FIGURE_5.items():
        like = best["α-DPO"] if (b, g) == (tuned["beta"], tuned["gamma"]) else rates[b]
        jobs |= {(label, x): like | {"objective": ALPHA_DPO.format(b, g, x * b)} for x in ALPHAS}
    return jobs


def followed_jobs(best: dict[str, dict]) -> dict:
    """Runs that are followed: methods of the slides as tuned; α-DPO over α/β and SimPO over γ/β from the tuned ones."""
    jobs = {name: best[name] for name in ("DPO", "SLiC", "IPO", "KTO", "CPO", "SimPO", "SimPER", "α-DPO", "TDPO₂")}
    b, g = (numbers(best["α-DPO"])[k] for k in ("beta", "gamma"))
    jobs |= {("α", x): best["α-DPO"] | {"objective": ALPHA_DPO.format(b, g, x * b)} for x in ALPHAS}
    b = numbers(best["SimPO"])["beta"]
    return jobs | {("γ", x): best["SimPO"] | {"objective": f"simpo(beta={b}, gamma={x * b})"} for x in GAMMAS}


def report(best: dict, results: dict, traces: dict, out: Path) -> dict[str, str]:
    """Title → text of every part; draws the pictures."""
    parts = {
        "Table 1": table_1(best, results),
        "Table 2": table_2(best, results),
        "Table 5": table_small(best, results, PAPER_5, "Llama3-Instruct", ("SimPO",)),
        "Table 6": table_small(best, results, PAPER_6, "Llama3-Instruct (α-DPO's numbers are v0.2's of Table 1)", ("TDPO₂",)),
        "Theorem 3.1": text_3_1(best, traces),
        "Lemma 4.2": text_4_2(best, traces),
        "Lemma 4.3": text_4_3(traces),
        "Reward and likelihood (SimPO's slides)": text_agreement(best, traces),
    }
    plt = miniature.pyplot()
    if plt is None:
        return parts
    for title, name, draw in (
        ("Figure 2", "reference", figure_2),
        ("Figure 3", "kl", figure_3),
        ("Figure 4", "alpha", functools.partial(figure_4, results=results, best=best)),
        ("Figure 5", "settings", functools.partial(figure_5, results=results)),
        ("Figure 6", "distributions", functools.partial(figure_6, best=best)),
        ("Gradient norms (SimPER's slides)", "gradients", figure_gradients),
        ("Chosen likelihood against margin (SimPER's slides)", "likelihood", figure_likelihood),
    ):
        with plt.rc_context({"axes.titlesize": 10}):
            drawn = draw(plt, traces)
            if drawn is None:  # every run that it shows ended early
                continue
            figure, text = drawn
            figure.savefig(out / f"{name}.png", dpi=100)
            plt.close(figure)
        parts[title] = f"![{title}]({name}.png)\n\n{text}\n"
    return parts


# ---- tables ----------------------------------------------------------------------------------------------------------


def table(head: list[str], lines: list[list[str]]) -> str:
    return markdown([head, ["---"] * len(head), *lines]) + "\n"


MEASURED = {"win_rate": "win rate, %", "lc_win_rate": "LC, %", "quality": "quality", "length": "words", "kl": "KL"}


def cell(results: list[dict], name: str) -> str:
    """As in miniature.py, but one world has no standard error."""
    text = miniature.cell(results, name)
    return text if len(results) > 1 else text.partition(" ±")[0]


def row_of(name: str, best: dict, results: dict) -> list[str]:
    return [f"`{best[name]['objective']}`", f"{best[name]['lr']:g}", *(cell(results[name], m) for m in MEASURED)]


def mean(results: list[dict], name: str) -> float:
    return mean_and_error(results, name)[0]


def order(values: dict[str, float]) -> str:
    """Names from the highest down; a run that ended early is left out."""
    known = {name: x for name, x in values.items() if math.isfinite(x)}
    return " > ".join(sorted(known, key=lambda name: -known[name]))


def table_1(best: dict, results: dict) -> str:
    """Nine methods; SFT is the start. Rank correlations of LC with the paper's columns, and of these with each other."""
    starts = [run["start"] | {"kl": 0.0} for run in results["DPO"] if "start" in run]

    def paper(name):
        return [f"{x}" for x in PAPER_1[name][:2]]

    lines = [["SFT (the start)", "–", "–", *(cell(starts, m) for m in MEASURED), *paper("SFT")]]
    for name in METHODS:
        lines.append([name, *row_of(name, best, results), *(paper(name) if name in PAPER_1 else ["–", "–"])])
    ours = {"SFT": 0.5} | {name: mean(results[name], "lc_win_rate") for name in PAPER_1 if name != "SFT"}
    known = [name for name in ours if math.isfinite(ours[name])]
    columns = [[PAPER_1[name][2 * i] for name in known] for i in range(4)]
    here = ", ".join(f"{spearman([ours[n] for n in known], column):.2f} ({m})" for column, m in zip(columns, MODELS))
    edges = [n for n in METHODS if best[n]["lr"] in (min(miniature.LEARNING_RATES), max(miniature.LEARNING_RATES))]
    among = [spearman(columns[i], columns[j]) for i in range(4) for j in range(i)]
    return table(["method", "tuned to", "lr", *MEASURED.values(), "paper: LC, %", "paper: WR, %"], lines) + (
        f"Paper: Llama3-Instruct, AlpacaEval 2. Rank correlation of our LC with the paper's: {here}; of the paper's four "
        f"settings with each other {min(among):.2f} to {max(among):.2f}. Our order: {order(ours)}. Best learning rate at an "
        f"edge of the grid: {', '.join(edges) or 'none'}.\n"
    )


def table_2(best: dict, results: dict) -> str:
    """The implicit reference models at the two published settings, the learning rate of each tuned."""
    text = ""
    for of in PAPER_2:
        b, g, a = SETTINGS[of]
        names = [f"{of}: {row}" for row in VARIANTS]
        lines = [[row, *row_of(name, best, results), f"{paper}"] for row, name, paper in zip(VARIANTS, names, PAPER_2[of])]
        ours = [mean(results[name], "lc_win_rate") for name in names]
        known = [i for i, x in enumerate(ours) if math.isfinite(x)]
        ours, paper = np.array(ours)[known], np.array(PAPER_2[of])[known]
        least = [row for i, row in enumerate(VARIANTS) if i in known][ours.argmin()] if known else "–"
        text += f"β = {b:g}, γ = {g:g}, α = {a:g} (published for {of}):\n\n"
        text += table(["implicit reference", "objective", "lr", *MEASURED.values(), "paper: LC, %"], lines)
        text += f"Rank correlation of LC with the paper's column: {spearman(ours, paper):.2f}; lowest here: {least}.\n\n"
    return text + "Without normalisation α is what the authors' code multiplies by β, α/β.\n"


def table_small(best: dict, results: dict, paper: dict, model: str, more: tuple[str, ...]) -> str:
    """Tables 5 and 6: the paper's rows, and `more` of ours."""
    lines = [[n, *row_of(n, best, results), *(map(str, paper[n]) if n in paper else ["–", "–"])] for n in (*paper, *more)]
    ours = {name: mean(results[name], "lc_win_rate") for name in paper}
    theirs = {name: lc for name, (lc, _) in paper.items()}
    same = "the same order" if order(ours) == order(theirs) else "another order"
    head = ["method", "tuned to", "lr", *MEASURED.values(), "paper: LC, %", "paper: WR, %"]
    return table(head, lines) + f"Paper: {model}. LC here: {order(ours)}; there: {order(theirs)}: {same}.\n"


# ---- statements, evaluated on followed runs --------------------------------------------------------------------------


def held_out(runs: list[dict]) -> dict[str, Tensor]:
    """logp, ref, kl, length at the end, (n, 2) each, the worlds one after the other."""
    return {
        k: torch.cat([torch.tensor(r["pairs"][k], dtype=torch.float64) for r in runs]) for k in ("logp", "ref", "kl", "length")
    }


def text_3_1(best: dict, traces: dict) -> str:
    runs, beta = traces["SimPO"], 0.1
    if not runs:
        return "No run of SimPO was followed to its end.\n"
    x = held_out(runs)
    t = theorem_3_1(x["logp"], x["length"], runs[0]["vocabulary"], beta)
    lines = [
        ["DPO(U) − [−logσ(β(s_w − s_l) − γ_i)], γ_i the pair's own, largest", f"{t['own']:.1e}"],
        ["γ_i = −β(n_w − n_l) log V: mean ± standard deviation over pairs", f"{t['mean']:.2f} ± {t['std']:.2f}"],
        ["smallest and largest γ_i", f"{t['low']:.2f}, {t['high']:.2f}"],
        ["pairs of equal lengths, where γ_i = 0, %", f"{100 * t['equal']:.0f}"],
        ["DPO(U) − SimPO on sums with γ the mean γ_i, mean size", f"{t['constant']:.2f}"],
        ["averaged: DPO(U) − SimPO with γ = 0, largest", f"{t['averaged']:.1e}"],
    ]
    return table([f"held-out pairs of SimPO's runs, β = {beta}, V = {runs[0]['vocabulary']}", ""], lines) + (
        "A uniform reference makes DPO into SimPO on sums with a γ of the pair's own, and, with averages, into SimPO with "
        "γ = 0; the constant γ > 0 of the theorem belongs to no uniform distribution over tokens.\n"
    )


def text_4_2(best: dict, traces: dict) -> str:
    """A row per α: the run trained at that α, the lemma evaluated at the α of the authors' code, α/β."""
    settings, lines, fails = numbers(best["α-DPO"]), [], []
    for x in (*ALPHAS[1:], 1.0):
        runs = traces["α", min(x, ALPHAS[-1])]
        if not runs:
            continue
        at = held_out(runs)
        t = lemma_4_2(at["logp"], at["ref"], at["length"], settings["beta"], settings["gamma"], x)
        fails += [f"{x:g}"] if t["left"] > t["online"] else []
        columns = [t["left"], t["online"], t["correction"], t["online"] + t["correction"]]
        lines.append([f"{x:g}", *(f"{v:.4f}" if abs(v) < 100 else f"{v:.0f}" for v in columns), f"{100 * t['holds']:.0f}"])
    head = ["α", "L of α-DPO", "L of online SimPO", "correction", "right side", "pairs for which it holds, %"]
    without = "in the mean it holds without it too"
    if fails:
        without = f"without it the left side is above the right at α = {', '.join(fails)}"
    return table(head, lines) + (
        f"Held-out pairs of the runs trained at this α/β (α = 1: those at {ALPHAS[-1]:g}); margins not normalised, as in the "
        f"lemma. With the correction both sides agree as α → 0; {without}.\n"
    )


def text_4_3(traces: dict) -> str:
    lines = []
    for name in ("DPO", "SimPO", "α-DPO", "TDPO₂"):
        if traces[name]:
            x = held_out(traces[name])
            t = lemma_4_3(x["logp"], x["ref"], x["kl"])
            lines.append([name, *(f"{v:.2f}" for v in t.values())])
    head = ["trained by", "Pearson", "Spearman", "spread of δ/β", "spread of M/β", "D_w and −u_w", "D_l and −u_l"]
    return table(head, lines) + (
        "δ and M over held-out pairs, their standard deviations in nats, and the Pearson correlations of D with −u, on which "
        "the lemma rests.\n"
    )


def text_agreement(best: dict, traces: dict) -> str:
    lines = []
    for name in ("DPO", "IPO", "CPO", "SimPO", "α-DPO", "SimPER"):
        if traces[name]:
            x, objective = held_out(traces[name]), train.parse_objective(best[name]["objective"])
            reward = objective.reward(x["logp"], x["ref"], x["length"])
            right = [(100 * (v[:, 0] > v[:, 1]).double().mean().item()) for v in (reward, x["logp"] / x["length"])]
            lines.append([name, f"{100 * agreement(reward, x['logp'], x['length']):.0f}", *(f"{r:.0f}" for r in right)])
    head = ["trained by", "reward and average log-prob agree, %", "reward ranks right, %", "average log-prob ranks right, %"]
    return table(head, lines) + "Held-out pairs after training; the slides' point is that DPO's first column is far from 100.\n"


# ---- pictures --------------------------------------------------------------------------------------------------------


def name_ends(axis, ends: dict[str, tuple[float, float, str]], room: float = 0.33) -> None:
    """Names at the right of where lines end, label → (x, y, colour), moved apart; room: share of the width kept free."""
    if not ends:
        return
    low, high = axis.get_xlim()
    ticks = [tick for tick in axis.get_xticks() if low <= tick <= high]
    axis.set_xlim(low, high + (high - low) * room / (1 - room))
    axis.set_xticks(ticks)
    bottom, top = axis.get_ylim()
    gap, at = 0.06 * (top - bottom), []
    for y in sorted(y for _, y, _ in ends.values()):
        at.append(max(y, at[-1] + gap) if at else y)
    shift = max(0.0, at[-1] - top + gap / 2)
    for (label, (x, y, color)), height in zip(sorted(ends.items(), key=lambda item: item[1][1]), at):
        axis.annotate(
            label, (x, y), xytext=(high + 0.05 * (high - low), height - shift), color=color, fontsize=9, va="center",
            arrowprops=dict(arrowstyle="-", color=color, lw=0.5, alpha=0.6, shrinkB=2),
        )  # fmt: skip


def along(runs: list[dict], name: str) -> tuple[list[int], np.ndarray]:
    """(steps, mean over the worlds) of a measure of followed runs."""
    return [line["step"] for line in runs[0]["lines"]], np.mean([[line[name] for line in run["lines"]] for run in runs], 0)


def shades(n: int) -> list:
    """n colours in order, the first ones lighter."""
    import matplotlib

    return [matplotlib.colormaps["viridis"](x) for x in np.linspace(0.75, 0.0, n)]


def panels(plt, n: int, height: float = 3.9):
    return plt.subplots(1, n, figsize=(3.5 * n, height), constrained_layout=True)


def figure_2(plt, traces: dict):
    runs = traces["DPO"]
    if not runs:
        return None
    figure, axis = plt.subplots(figsize=(8, 3.8), constrained_layout=True)
    reference = np.array([run["reference"] for run in runs])
    middle, spread, right = reference.mean(0).T
    steps = np.arange(1, len(middle) + 1)
    axis.fill_between(steps, middle - spread, middle + spread, alpha=0.2, lw=0)
    axis.plot(steps, middle)
    axis.axhline(0, color="0.6", lw=0.8)
    axis.set(
        xlabel="step", ylabel="nats", title="log π_ref(chosen) − log π_ref(rejected): mean and standard deviation of each batch"
    )
    return figure, (
        f"The reference finds the chosen response likelier in {100 * right.mean():.0f} % of the pairs, by {middle.mean():.1f} "
        f"± {spread.mean():.1f} nats; along the steps nothing can change, for it is frozen and the order random."
    )


def figure_3(plt, traces: dict):
    figure, axes = panels(plt, 3)
    end = {}
    for axis, key, side in zip(axes, ("kl_w", "kl_l"), ("chosen", "rejected")):
        ends = {}
        for x, color in zip(ALPHAS, shades(len(ALPHAS))):
            if runs := traces["α", x]:
                steps, values = along(runs, key)
                axis.plot(steps, values, color=color)
                ends[alpha_name(x)] = (steps[-1], values[-1], color)
                end[key, x] = values[-1]
        axis.set(xlabel="step", ylabel="nats per response", title=f"KL(ref ‖ policy) along the {side}")
        name_ends(axis, ends)
    ends, best_last = {}, {}
    for x, color in zip(ALPHAS, shades(len(ALPHAS))):
        if runs := traces["α", x]:
            kl, lc = (
                np.mean([[100 ** (m != "kl") * j[m] for j in run["judged"]] for run in runs], 0) for m in ("kl", "lc_win_rate")
            )
            axes[2].plot(kl, lc, "o-", color=color, ms=4, lw=0.7)
            ends[alpha_name(x)] = (kl[-1], lc[-1], color)
            best_last[x] = (lc.max(), lc[-1], kl[-1])
    axes[2].set(xlabel="KL(policy ‖ start) of the answers, nats", ylabel="length-controlled win rate, %",
                title=f"{CHECKPOINTS} checkpoints of each run")  # fmt: skip
    name_ends(axes[2], ends)
    said = "; ".join(f"{alpha_name(x)}: {end['kl_w', x]:.2f} and {end['kl_l', x]:.2f}" for x in ALPHAS if ("kl_w", x) in end)
    falls = "; ".join(f"{alpha_name(x)} {a:.1f} → {b:.1f}" for x, (a, b, _) in best_last.items())
    return figure, (
        f"KL along chosen and rejected at the end, nats: {said}. Paper: stable or slightly lower as α grows. Best and last LC "
        f"of the checkpoints, %: {falls}."
    )


def alpha_name(x: float) -> str:
    return f"α/β = {x:g}" if x else "SimPO"


def ridges(axis, values: dict[str, np.ndarray], title: str) -> None:
    """A smoothed histogram for each label, one above the other, all at the same height scale; a tick at the mean."""
    if not values:
        return
    low, high = np.quantile(np.concatenate(list(values.values())), (0.002, 0.998))
    grid = np.linspace(low - 0.15 * (high - low), high + 0.15 * (high - low), 300)
    curves = {}
    for label, x in values.items():
        width = 1.06 * max(x.std(), 1e-6) * len(x) ** -0.2  # Silverman's rule
        curves[label] = np.exp(-0.5 * ((grid[:, None] - x) / width) ** 2).mean(1) / (width * math.sqrt(2 * math.pi))
    step = 0.8 * max(curve.max() for curve in curves.values())
    for i, ((label, curve), color) in enumerate(zip(curves.items(), shades(len(curves)))):
        axis.fill_between(grid, -i * step, curve - i * step, color=color, alpha=0.75, lw=0, zorder=i)
        axis.plot([values[label].mean()] * 2, [-i * step, -i * step + 0.3 * step], color="k", lw=1.5, zorder=len(curves))
    axis.set_yticks([-i * step for i in range(len(curves))], list(curves))
    axis.set_title(title, fontsize=10)
    axis.grid(axis="x", alpha=0.25)


def spread_of(traces: dict, letter: str, values: tuple, beta: float) -> tuple[dict, dict]:
    """Reward margins r_w − r_l, r = βa, and chosen average log-probs of the held-out pairs, label → (n,)."""
    margins, chosen = {}, {}
    for x in values:
        if runs := traces[letter, x]:
            at = held_out(runs)
            a = (at["logp"] / at["length"]).numpy()
            margins[f"{letter}/β = {x:g}"], chosen[f"{letter}/β = {x:g}"] = beta * (a[:, 0] - a[:, 1]), a[:, 0]
    return margins, chosen


def said_of(name: str, values: dict) -> str:
    return f"{name}: " + "; ".join(f"{label} {x.mean():.2f} ± {x.std():.2f}" for label, x in values.items())


def peak(means: np.ndarray) -> str:
    """What a curve over ALPHAS says; of runs that ended early nothing."""
    if np.isnan(means).all():
        return "no run came to its end"
    return f"{means[0]:.1f} at α = 0, best {np.nanmax(means):.1f} at α/β = {ALPHAS[np.nanargmax(means)]:g}"


def figure_4(plt, traces: dict, results: dict, best: dict):
    figure, axes = panels(plt, 3)
    settings = numbers(best["α-DPO"])
    label = next(k for k, v in FIGURE_5.items() if v == (settings["beta"], settings["gamma"]))
    ends, said = {}, []
    for measure_, name, color in (("lc_win_rate", "LC", "C0"), ("quality", "quality", "C1")):
        means, errors = np.array([mean_and_error(results[label, x], measure_) for x in ALPHAS]).T * 100
        axes[0].errorbar(range(len(ALPHAS)), means, errors, marker="o", ms=4, capsize=2, color=color)
        ends[name] = (len(ALPHAS) - 1, means[-1], color)
        said.append(f"{name} {peak(means)}")
    axes[0].set(xlabel="α/β", ylabel="%", title=label)
    axes[0].grid(alpha=0.25)
    name_ends(axes[0], ends)
    axes[0].set_xticks(range(len(ALPHAS)), [f"{x:g}" for x in ALPHAS])
    margins, chosen = spread_of(traces, "α", ALPHAS, settings["beta"])
    ridges(axes[1], margins, "reward margin of held-out pairs")
    ridges(axes[2], chosen, "chosen, average log-prob per token")
    return figure, (
        f"{'; '.join(said)}. {said_of('Margins', margins)}. {said_of('Chosen', chosen)}. Paper: a smaller α flattens the "
        "margins and leaves the likelihood."
    )


def figure_5(plt, traces: dict, results: dict):
    figure, axes = panels(plt, len(FIGURE_5), 3.4)
    axes[0].sharey(axes[1]), axes[2].sharey(axes[1])
    said = []
    for axis, label in zip(axes, FIGURE_5):
        means, errors = np.array([mean_and_error(results[label, x], "lc_win_rate") for x in ALPHAS]).T * 100
        axis.errorbar(range(len(ALPHAS)), means, errors, marker="o", ms=4, capsize=2)
        axis.set_xticks(range(len(ALPHAS)), [f"{x:g}" for x in ALPHAS])
        axis.set(xlabel="α/β", ylabel="LC, %", title=label)
        axis.grid(alpha=0.25)
        said.append(f"{label}: {peak(means)}")
    return figure, f"LC, %: {'; '.join(said)}. Paper: rises from α = 0 in all four models, best near α/β = 0.05 to 0.1."


def figure_6(plt, traces: dict, best: dict):
    figure, axes = plt.subplots(2, 2, figsize=(10, 8), constrained_layout=True)
    text = []
    for column, (letter, values, name) in enumerate((("γ", GAMMAS, "SimPO"), ("α", ALPHAS, "α-DPO"))):
        margins, chosen = spread_of(traces, letter, values, numbers(best[name])["beta"])
        ridges(axes[0, column], margins, f"{name}: reward margin of held-out pairs")
        ridges(axes[1, column], chosen, f"{name}: chosen, average log-prob per token")
        text += [said_of(f"{name}, margins", margins), said_of(f"{name}, chosen", chosen)]
    return (
        figure,
        f"{'. '.join(text)}. Paper: a larger γ flattens SimPO's margins and lowers the chosen likelihood; α does not.",
    )


def figure_gradients(plt, traces: dict):
    names = [name for name in ("DPO", "SimPO", "α-DPO", "SimPER") if traces[name]]
    if not names:
        return None
    figure, axes = plt.subplots(2, 2, figsize=(9, 6), constrained_layout=True)
    said = []
    for axis, name in zip(axes.flat, names):
        (steps, w), (_, low) = along(traces[name], "norm_w"), along(traces[name], "norm_l")
        axis.plot(steps, w, color="C0")
        axis.plot(steps, low, color="C3")
        axis.set(xlabel="step", ylabel="norm of the gradient's part", title=name, ylim=(0, None))
        name_ends(axis, {"chosen": (steps[-1], w[-1], "C0"), "rejected": (steps[-1], low[-1], "C3")})
        said.append(f"{name} {low[0] / w[0]:.2f} → {low[-1] / w[-1]:.2f}")
    for axis in axes.flat[len(names) :]:
        axis.remove()
    return figure, (
        f"Rejected over chosen, first → last: {'; '.join(said)}. Slides: SimPER balances the two; in others the rejected part "
        "dominates."
    )


def figure_likelihood(plt, traces: dict):
    names = [name for name in ("DPO", "SLiC", "IPO", "KTO", "CPO", "SimPO", "SimPER") if traces[name]]
    if not names:
        return None
    figure, axes = panels(plt, 3)
    titles = ("chosen, change of average log-prob", "margin: chosen − rejected", "the end of training")
    lines, points = [{}, {}], {}
    for i, name in enumerate(names):
        (steps, w), (_, low) = along(traces[name], "a_w"), along(traces[name], "a_l")
        for axis, values, ends in zip(axes, (w - w[0], w - low), lines):
            axis.plot(steps, values, color=f"C{i}")
            ends[name] = (steps[-1], values[-1], f"C{i}")
        points[name] = (w[-1] - w[0], w[-1] - low[-1], f"C{i}")
        axes[2].plot(*points[name][:2], "o", color=f"C{i}")
    for axis, title, ends in zip(axes, titles, (*lines, {})):
        axis.set(xlabel="step", ylabel="nats per token", title=title)
        name_ends(axis, ends)
    axes[2].set(xlabel="chosen, change, nats per token", ylabel="margin, nats per token")
    axes[2].grid(alpha=0.25)
    axes[2].margins(0.2, 0.1)
    miniature.name_points(axes[2], points)
    said = "; ".join(f"{n} {c:+.2f}, {m:.2f}" for n, (c, m, _) in sorted(points.items(), key=lambda item: -item[1][0]))
    return (
        figure,
        f"Change of the chosen and margin at the end: {said}. Slides: SimPER declines least and has the largest margin.",
    )
