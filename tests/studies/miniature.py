"""The papers in miniature: objectives tuned, compared and swept on toy tasks.

    python tests/studies/miniature.py --compare dpo simpo simper                      # tuned, then run on five tasks
    python tests/studies/miniature.py --compare all --out runs/compare                # all: 1,490 runs of 2 to 3 s on two cores
    python tests/studies/miniature.py --sweeps alpha --seeds 5 --annotator-noise 0.5  # with any setting of train.py
    python tests/studies/miniature.py --compare all --out runs/compare --resume       # goes on where a killed one stopped
    python tests/studies/miniature.py --paper alpha_dpo --out runs/alpha_dpo          # a paper's tables and figures

Every objective is tuned by successive halving: all of GRID's settings times six learning rates in one world, the better quarter
of them in a second, a quarter of these in a third. The best mean win rate goes on to `seeds` other worlds. A run is
train.train() as it stands, in a process of its own (as many at a time as the environment variable
WORKERS says, else one per core); each result is a line of runs.jsonl.
"""

import importlib
import json
import math
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1] / "tools")]

import lorr  # noqa: E402
import torch  # noqa: E402
import toy  # noqa: E402

import data  # noqa: E402
import train  # noqa: E402
from data import UserError, setting  # noqa: E402

# ---- what is run -----------------------------------------------------------------------------------------------------

LEARNING_RATES = (1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3, 3.2e-3)
TUNING_SEEDS, KEPT = (100, 101, 102), 4  # the worlds of tuning, one after the other; of each so many one goes on


def calls(text: str, *settings) -> tuple[str, ...]:
    """The call with each of the settings in its place."""
    return tuple(text.format(*(s if isinstance(s, tuple) else (s,))) for s in settings)


# The papers' search ranges (α-DPO's appendix), a few of each. Averages: as they are. Sums of log-probs: β ten times as large,
# as answers here have some nine tokens and not hundreds; R-DPO's α, a price per token, as it is.
SUMS_BETA = (0.1, 0.5, 1.0)  # 0.01, 0.05, 0.1
GRID = {
    "sft": ("sft",),
    "dpo": calls("dpo(beta={})", *SUMS_BETA),
    "dpo_norm": calls("dpo_norm(beta={})", 2.0, 5.0, 10.0),
    "robust_dpo": calls("robust_dpo(beta={})", *SUMS_BETA),
    "ipo": calls("ipo(tau={})", 0.01, 0.1, 0.5, 1.0),
    "rdpo": calls("rdpo(beta={}, alpha={})", (0.1, 0.05), (0.5, 0.05), (1.0, 0.05), (0.5, 0.1), (0.5, 0.5)),
    "dpop": calls("dpop(beta={}, lam={})", (0.1, 5.0), (0.1, 50.0), (0.5, 5.0), (0.5, 50.0)),
    "dpo_shift": calls("dpo_shift(beta={}, lam={})", (0.1, 0.95), (0.5, 0.95), (0.1, 0.75), (0.5, 0.75)),
    "focal": calls("focal(beta={})", *SUMS_BETA),
    "ld_dpo": calls("ld_dpo(beta={}, alpha={})", (0.1, 0.5), (0.5, 0.5), (1.0, 0.5), (0.5, 0.1)),
    "odpo": calls("odpo(beta={}, alpha={})", (0.1, 0.5), (0.5, 0.5), (0.5, 1.0), (1.0, 1.0)),
    "rpo_bwd": calls("rpo_bwd(beta={}, eta={})", (0.1, 1.0), (0.5, 1.0), (0.5, 5.0), (1.0, 5.0)),
    "rpo_fwd": calls("rpo_fwd(beta={}, eta={})", (0.1, 1.0), (0.5, 1.0), (0.5, 5.0), (1.0, 5.0)),
    "rpo_sq": calls("rpo_sq(beta={}, eta={})", (0.1, 1.0), (0.5, 1.0), (0.5, 5.0), (1.0, 5.0)),
    "rso_hinge": calls("rso_hinge(beta={})", *SUMS_BETA),
    "exo": calls("exo(beta={})", *SUMS_BETA),
    "nca": calls("nca(beta={})", 0.01, *SUMS_BETA),
    "bco_pair": calls("bco_pair(beta={})", *SUMS_BETA),
    "sppo": calls("sppo(beta={})", 0.001, 0.01, 0.03, 0.1),
    "sppo_soft": calls("sppo_soft(beta={}, eta={})", (0.01, 1.0), (0.03, 1.0), (0.03, 5.0), (0.1, 5.0)),
    "apo_zero": calls("apo_zero(beta={})", *SUMS_BETA),
    "apo_down": calls("apo_down(beta={})", *SUMS_BETA),
    "discopop": calls("discopop(beta={})", 0.05, *SUMS_BETA),
    "f_dpo": calls("f_dpo(beta={}, divergence='{}')", (0.1, "js"), (0.5, "js"), (0.1, "forward_kl"), (0.5, "forward_kl")),
    "tdpo1": calls("tdpo1(beta={})", *SUMS_BETA),
    "tdpo2": calls("tdpo2(beta={})", *SUMS_BETA),
    "beta_dpo": calls("beta_dpo(beta={})", *SUMS_BETA),
    "aot": calls("aot(beta={})", *SUMS_BETA),
    "aot_unpaired": calls("aot_unpaired(beta={})", *SUMS_BETA),
    "cpo": calls("cpo(beta={}, lam={})", (0.1, 1.0), (0.5, 1.0), (1.0, 1.0), (0.5, 0.1)),
    "slic": calls("slic(delta={}, lam={})", (0.5, 0.1), (1.0, 0.1), (2.0, 0.1), (1.0, 0.5), (5.0, 0.01)),
    "rrhf": calls("rrhf(lam={})", 0.01, 0.1, 0.5, 1.0),
    "orpo": calls("orpo(lam={})", 0.1, 0.5, 1.0, 2.0),
    "simpo": calls("simpo(beta={}, gamma={})", (2.0, 0.3), (2.0, 1.0), (4.0, 1.0), (10.0, 1.0), (10.0, 3.0)),
    "repo": calls("repo(gamma={})", 0.1, 0.2, 0.5),
    "simper": ("simper",),
    "alphapo": calls("alphapo(beta={}, alpha={})", (2.5, 0.25), (2.5, -0.25), (10.0, 0.25), (10.0, -0.25)),
    "alpha_dpo": calls("alpha_dpo(beta={}, gamma={}, alpha={})",
                       (2.5, 0.3, 0.05), (2.5, 0.3, 0.2), (10.0, 1.0, 0.2), (10.0, 3.0, 0.5), (10.0, 3.0, 2.0)),
    "alpha_dpo_kl": calls("alpha_dpo_kl(beta={}, gamma={}, alpha={})", (2.5, 0.3, 0.2), (10.0, 1.0, 0.2), (10.0, 3.0, 0.5)),
    "online_simpo": ("online_simpo(clip=1.0)", "online_simpo(clip=5.0)", "online_simpo(self_normalize=True)"),
    "gamma_dpo": calls("gamma_dpo(beta={})", *SUMS_BETA),
    "gamma_simpo": calls("gamma_simpo(beta={}, gamma={})", (2.5, 0.3), (2.5, 1.0), (10.0, 1.0), (10.0, 4.0)),
    "amapo": calls("amapo(beta={})", 2.0, 3.0, 10.0),
    "kto": calls("kto(beta={})", *SUMS_BETA),
    "bco": calls("bco(beta={})", *SUMS_BETA),
    "apo_zero_unpaired": calls("apo_zero_unpaired(beta={})", *SUMS_BETA),
    "uapo": calls("uapo(beta={})", *SUMS_BETA),
}  # fmt: skip

# name → what is swept, its values, and series: label → value → settings that differ from the default run
ALPHA, SUMS = "alpha_dpo(beta=2.5, gamma=0.5, alpha={})", "simpo(beta=0.1, gamma=0.0, average=False)"
SWEEPS = {
    "alpha": ("α of alpha_dpo (0 is SimPO)", (0.0, 0.1, 0.3, 1.0, 3.0), {
        "alpha_dpo": lambda x: dict(objective=ALPHA.format(x)),
        "without stop-gradient": lambda x: dict(objective=ALPHA.format(f"{x}, stop_gradient=False"))}),
    "gamma": ("γ of simpo (β = 2)", (0.0, 0.5, 1.0, 2.0, 4.0), {
        "simpo": lambda x: dict(objective=f"simpo(beta=2.0, gamma={x})")}),
    "length": ("the annotator's length bias, per word", (0.0, 0.03, 0.06), {
        "simpo, sums": lambda x: dict(length_bias=x, objective=SUMS),
        "simpo, sums + POET": lambda x: dict(length_bias=x, objective=SUMS, equal_length=1.0),
        "simpo": lambda x: dict(length_bias=x),
        "simpo + POET": lambda x: dict(length_bias=x, equal_length=1.0),
        "dpo": lambda x: dict(length_bias=x, objective="dpo(beta=0.1)"),
        "dpo + POET": lambda x: dict(length_bias=x, objective="dpo(beta=0.1)", equal_length=1.0)}),
    "noise": ("noise of the annotator (standard deviation)", (0.0, 0.2, 0.5, 1.0), {
        name: lambda x, name=name: dict(annotator_noise=x, objective=name)
        for name in ("simpo(beta=2.5, gamma=0.5)", "alpha_dpo(beta=2.5, gamma=0.5, alpha=0.3)",
                     "gamma_simpo(beta=2.5, gamma=0.5)", "amapo(beta=2.5)")}),
    "replays": ("replays of each batch", (1, 2, 4), {
        "replays": lambda x: dict(replays=x),
        "with reset (α = ½)": lambda x: dict(replays=x, reset_alpha=0.5),
        "LoRR: reset and SFT term": lambda x: dict(replays=x, reset_alpha=0.5, sft_weight=0.5)}),
}  # fmt: skip
MEASURES = {  # name → (title, number of decimals, whether percent)
    "win_rate": ("win rate, %", 1, True),
    "lc_win_rate": ("length-controlled, %", 1, True),
    "quality": ("true quality", 3, False),
    "length": ("words", 1, False),
    "kl": ("KL, nats", 2, False),
    "repetition": ("repeated items, %", 1, True),
    "chosen": ("chosen, change in nats per token", 2, False),
    "rejected": ("rejected, change in nats per token", 2, False),
}
PANELS = ("win_rate", "length", "kl", "chosen")  # of a sweep
PAPERS = ("alpha_dpo",)  # modules beside this one, each with a study(settings, common settings of all jobs, folder)


# ---- settings --------------------------------------------------------------------------------------------------------


@dataclass
class OnToyTasks(train.Settings):
    """Settings of runs on toy tasks, which the study builds: see tests/tools/toy.py."""

    annotator_noise: float = setting(0.1, "error (standard deviation) of the annotator about a quality")
    length_bias: float = setting(0.0, "what the annotator adds to a response's quality per word")
    world: str = setting("plain", f"who taught the initial model, {' or '.join(toy.WORLDS)} (likely answers are bad)")


def refuse_own_data(s: train.Settings) -> None:
    """UserError where a model, a dataset or ranks were asked for."""
    usual = train.parse_settings([])
    if (s.model, s.dataset) != (usual.model, usual.dataset) or "RANK" in os.environ:
        raise UserError("the study trains on tasks that it builds, without --model, --dataset and torchrun")


def check_task(s: OnToyTasks) -> None:
    toy.check(s.annotator_noise, s.length_bias, s.world)
    refuse_own_data(s)


@dataclass
class Study(OnToyTasks):
    compare: list[str] | None = setting(None, "tune and compare these objectives (all, names, or calls)")
    sweeps: list[str] | None = setting(None, "figures of these sweeps (all, or names of SWEEPS)")
    paper: str | None = setting(None, f"tables and figures of a paper: {', '.join(PAPERS)}")
    seeds: int = setting(5, "runs of each setting, each in a world of its own")


def parse(argv: list[str]) -> Study:
    """The command line; a file of train.py's settings may stand in front of it."""
    return train.parse_settings(argv, Study, "tests/studies/miniature.py", __doc__)


def check(s: Study) -> None:
    if not (s.compare or s.sweeps or s.paper):
        raise UserError(
            f"nothing to do: give --compare (all, or objectives), --sweeps (all, or {', '.join(SWEEPS)}), "
            f"or --paper ({', '.join(PAPERS)})"
        )
    if s.paper:
        data.refuse_unless_known("paper", s.paper, PAPERS)
    workers()
    if s.seeds < 1:
        raise UserError(f"seeds is {s.seeds}; it must be at least 1")
    check_task(s)
    for name in sweeps_of(s):
        if name not in SWEEPS:
            raise UserError(f"unknown sweep {name!r}; known are {', '.join(SWEEPS)}")
    try:
        for texts in grid_of(s).values():
            for text in texts:
                train.try_objective(train.parse_objective(text))
    except ValueError as error:
        raise UserError(str(error)) from error


def grid_of(s: Study) -> dict[str, tuple[str, ...]]:
    """What is tuned for each objective that is compared; a call that is no name of GRID is taken as it is."""
    names = list(GRID) if s.compare == ["all"] else s.compare or []
    return {name: GRID.get(name, (name,)) for name in names}


def sweeps_of(s: Study) -> list[str]:
    return list(SWEEPS) if s.sweeps == ["all"] else s.sweeps or []


def common_settings(s: Study) -> dict:
    """What all jobs share: the settings that differ from their defaults, but those that a job sets or that are no run's."""
    default = Study()
    own = ("compare", "sweeps", "paper", "seeds", "model", "dataset", "out", "resume", "objective", "lr", "seed")
    changed = {k: v for k, v in asdict(s).items() if k not in own and v != getattr(default, k)}
    return changed | {"world": s.world, "cache": s.cache}


# ---- jobs ------------------------------------------------------------------------------------------------------------


OF_THE_TASK = ("world", "annotator_noise", "length_bias")  # settings of a job that are none of the trainer's


def task_of(job: dict) -> Path:
    """The folder of the job's toy task, which is built where it is not there yet."""
    names = {"seed": "seed", "cache": "cache", "world": "world", "annotator_noise": "noise", "length_bias": "length_bias"}
    return toy.cached(**{names[name]: value for name, value in job.items() if name in names})


def run_settings(job: dict, out: str) -> train.Settings:
    """The trainer's settings for a job on its toy task."""
    task = task_of(job)
    usual = dict(model=str(task / "model"), dataset=str(task / "pairs.jsonl"), lr=2e-4, out=out)
    usual |= dict(samples=0, layout="padded", dtype="fp32", tokens_per_microbatch=4096)
    kind = lorr.Settings if "replays" in job else train.Settings
    return kind(**usual | {name: value for name, value in job.items() if name not in OF_THE_TASK})


def experiment(job: dict) -> dict:
    """A run with these settings: the settings and what was measured, or why it ended early."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            s = run_settings(job, f"{folder}/run")
            summary = lorr.train_lorr(s) if isinstance(s, lorr.Settings) else train.train(s)
        except UserError as error:
            return {"job": job, "error": str(error)}
        task = Path(s.model).parent
        judged = toy.judge(Path(folder) / "run" / "model", task, Path(folder) / "answers.jsonl")
    before, after = summary["before"], summary["after"]
    measured = {name: now for name, (_, now) in judged.items()}
    measured["start"] = {name: was for name, (was, _) in judged.items()}
    for side, name in (("w", "chosen"), ("l", "rejected")):  # sft has no rejected responses
        key = f"eval_logp_{side}_per_token"
        measured[name] = after[key] - before[key] if key in after else math.nan
    return {"job": job, **measured, "seconds": summary["seconds"]}


def one_of_many() -> None:
    """How a process of run_jobs begins: with one thread, silent, and without what a run does for a reader of its folder. It
    ends with the one that began it, also when that is killed."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    train.draw_curves = lambda *_: None
    sys.stderr = open(os.devnull, "w")


def end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def job_key(job: dict) -> str:
    return json.dumps(job, sort_keys=True)


def workers() -> int:
    text = os.environ.get("WORKERS", str(os.cpu_count()))
    if not text.isdigit() or text == "0":
        raise UserError(f"the environment variable WORKERS is {text!r}; it is a number of processes, at least 1")
    return int(text)


def run_jobs(jobs: list[dict], file: Path, work: Callable[[dict], dict] = experiment) -> list[dict]:
    """All jobs, WORKERS processes at a time; each result is a line of `file`, and those already there stay.

    The toy tasks of jobs that have a "world" are built first.
    """
    known = {job_key(result["job"]): result for result in train.read_lines(file, "job", dict)}
    missing = [job for key, job in {job_key(job): job for job in jobs}.items() if key not in known]
    own = ("seed", "cache", *OF_THE_TASK)  # what a task depends on
    settings = [{name: job[name] for name in own if name in job} for job in missing if "world" in job]
    tasks = {job_key(of_task): of_task for of_task in settings}
    with ProcessPoolExecutor(workers(), multiprocessing.get_context("spawn"), one_of_many) as pool:
        for _ in data.progress(pool.map(task_of, tasks.values()), "toy tasks", "tasks", len(tasks)):
            pass  # one process each, so that no two build the same
        futures = [pool.submit(work, job) for job in missing]
        for future in data.progress(as_completed(futures), "runs", "runs", len(futures)):
            result = future.result()
            known[job_key(result["job"])] = result
            with open(file, "a") as f:
                f.write(json.dumps(result) + "\n")
    return [known[job_key(job)] for job in jobs]


def run_groups(groups: dict, file: Path, work: Callable[[dict], dict] = experiment) -> dict:
    """{name: jobs} → {name: their results}, all jobs in one go."""
    results = iter(run_jobs([job for jobs in groups.values() for job in jobs], file, work))
    return {name: [next(results) for _ in jobs] for name, jobs in groups.items()}


# ---- the study -------------------------------------------------------------------------------------------------------


def study(s: Study) -> dict:
    """Tune, run and tabulate objectives over several seeds, and draw sweeps; everything is in the output folder."""
    check(s)
    started, out, common = time.perf_counter(), train.prepare_out(s), common_settings(s)
    train.write_whole(out / train.MARKER, json.dumps({"plainpo": {"study": "miniature"}}))
    train.write_whole(out / "settings.json", json.dumps(asdict(s), indent=2) + "\n")
    best = tune(grid_of(s), common, out / "runs.jsonl")
    results = run_groups({name: [job | {"seed": n} for n in range(s.seeds)] for name, job in best.items()}, out / "runs.jsonl")
    if results:
        table = comparison_table(best, results, grid_of(s))
        (out / "table.md").write_text(table)
        print(table)
        draw_comparison(results, out)
    for name in sweeps_of(s):
        sweep(name, common, s.seeds, out)
    if s.paper:
        importlib.import_module(s.paper).study(s, common, out)
    train.say(f"{time.perf_counter() - started:.0f} s; everything is in {out}")
    return {"out": str(out), "best": best, "results": results}


def tune(grid: dict[str, tuple[str, ...]], common: dict, file: Path) -> dict[str, dict]:
    """Each objective's job with the best mean win rate, by successive halving over the worlds of tuning; a run that ended early
    has won nothing."""
    alive = {
        name: [common | {"objective": text, "lr": lr} for text in texts for lr in LEARNING_RATES]
        for name, texts in grid.items()
    }
    wins: dict[str, list[float]] = {}
    for seed in TUNING_SEEDS:
        results = run_groups({name: [job | {"seed": seed} for job in jobs] for name, jobs in alive.items()}, file)
        for name, jobs in alive.items():
            for job, result in zip(jobs, results[name]):
                wins.setdefault(job_key(job), []).append(result.get("win_rate", 0.0))
            jobs.sort(key=lambda job: -sum(wins[job_key(job)]) / len(wins[job_key(job)]))
            del jobs[-(-len(jobs) // KEPT) :]
    return {name: jobs[0] for name, jobs in alive.items()}


def tuning_runs(settings: int) -> int:
    """How many runs the tuning of an objective with so many settings takes."""
    total, alive = 0, settings * len(LEARNING_RATES)
    for _ in TUNING_SEEDS:
        total, alive = total + alive, -(-alive // KEPT)
    return total


def sweep(name: str, common: dict, seeds: int, out: Path) -> None:
    """A table and a picture: every series at every value of what is swept."""
    title, values, series = SWEEPS[name]
    jobs = {
        (label, x): [common | change(x) | {"seed": n} for n in range(seeds)] for label, change in series.items() for x in values
    }
    results = run_groups(jobs, out / "runs.jsonl")
    lines = [["", title, *(MEASURES[p][0] for p in PANELS)], ["---"] * (2 + len(PANELS))]
    lines += [[label, f"{x:g}", *(cell(runs, p) for p in PANELS)] for (label, x), runs in results.items()]
    (out / f"sweep-{name}.md").write_text(markdown(lines))
    draw_sweep(title, values, list(series), results, out / f"sweep-{name}.png")


# ---- tables and pictures ---------------------------------------------------------------------------------------------


def mean_and_error(results: list[dict], name: str) -> tuple[float, float]:
    """Mean over the runs and its standard error; not a number if a run ended early."""
    values = torch.tensor([result.get(name, math.nan) for result in results], dtype=torch.float64)
    return values.mean().item(), (values.std() / math.sqrt(len(values))).item() if len(values) > 1 else 0.0


def cell(results: list[dict], name: str) -> str:
    """ "61.2 ± 0.8", or a dash where a run ended early."""
    _, digits, percent = MEASURES[name]
    mean, error = (x * (100 if percent else 1) for x in mean_and_error(results, name))
    return "–" if math.isnan(mean) else f"{mean:.{digits}f} ± {error:.{digits}f}"


def markdown(lines: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def comparison_table(best: dict[str, dict], results: dict[str, list[dict]], grid: dict[str, tuple[str, ...]]) -> str:
    """Markdown, best win rate first; with the number of runs that an objective's tuning had."""
    titles = ["objective", "lr", "tuning runs", *(title for title, *_ in MEASURES.values())]
    start = [{**r["start"], "chosen": 0.0, "rejected": 0.0} for r in next(iter(results.values())) if "start" in r]
    lines = [titles, ["---"] * len(titles), ["the start", "–", "–", *(cell(start, m) for m in MEASURES)]]
    for name in sorted(results, key=lambda name: -mean_and_error(results[name], "win_rate")[0]):
        job, runs = best[name], str(tuning_runs(len(grid[name])))
        lines.append([f"`{job['objective']}`", f"{job['lr']:g}", runs, *(cell(results[name], m) for m in MEASURES)])
    edges = [name for name, job in best.items() if job["lr"] in (LEARNING_RATES[0], LEARNING_RATES[-1])]
    said = f"The best learning rate is at an edge of the grid for {len(edges)} of {len(best)}" + ": " * bool(edges)
    return markdown(lines) + f"\n{said}{', '.join(edges)}.\n"


def pyplot():
    """matplotlib.pyplot drawing to files, or None with a word about it."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        data.say('no pictures: matplotlib is missing (pip install "plainpo[plot]")')
        return None
    return plt


def axis_title(name: str) -> str:
    return MEASURES[name][0].replace(", %", "")


def draw_comparison(results: dict[str, list[dict]], out: Path) -> None:
    """Each objective a point with its name: win rate against length, drift of log-probs, quality against KL.

    A point that is further from the median than five times the middle half of all is left out and named instead.
    """
    plt = pyplot()
    if plt is None:
        return
    for file, x, y in (("length", "length", "win_rate"), ("drift", "chosen", "rejected"), ("kl", "kl", "quality")):
        points = {name: [mean_and_error(row, key) for key in (x, y)] for name, row in results.items()}
        points = {name: p for name, p in points.items() if math.isfinite(p[0][0] + p[1][0])}
        if not points:  # every run ended early
            continue
        means = torch.tensor([[p[0][0], p[1][0]] for p in points.values()])
        low, middle, high = means.quantile(torch.tensor([0.25, 0.5, 0.75]), 0)
        inside = ((means - middle).abs() <= 5 * (high - low) + 1e-9).all(1).tolist()
        away = [f"{n} ({p[0][0]:.3g}, {p[1][0]:.3g})" for (n, p), near in zip(points.items(), inside) if not near]
        figure, axis = plt.subplots(figsize=(9.5, 8), constrained_layout=True)
        named = {}
        for i, name in enumerate(n for n, near in zip(points, inside) if near):
            (at, dx), (height, dy) = points[name]
            axis.errorbar(at, height, dy, dx, fmt="o", ms=4, color=f"C{i % 10}", alpha=0.6, lw=0.5)
            named[name] = (at, height, f"C{i % 10}")
        axis.margins(0.1, 0.08)
        axis.set(xlabel=axis_title(x), ylabel=axis_title(y))
        axis.set_title("; ".join(["mean ± standard error", *(["outside: " + ", ".join(away)] if away else [])]), fontsize=9)
        axis.grid(alpha=0.25)
        name_points(axis, named)
        figure.savefig(out / f"{file}.png", dpi=110)
        plt.close(figure)


def name_points(axis, points: dict[str, tuple[float, float, str]]) -> None:
    """A name beside each point, label → (x, y, colour): the nearest free place on rings around it, tied when further off."""
    figure = axis.figure
    figure.draw_without_rendering()  # so that the limits and the layout are final
    dots = axis.transData.transform([(x, y) for x, y, _ in points.values()]) * 72 / figure.dpi  # in points, as offsets are
    edges = axis.get_window_extent().get_points() * 72 / figure.dpi
    taken = [(x - 3, y - 3, x + 3, y + 3) for x, y in dots]
    rings = [(r, 2 * math.pi * k / 24) for r in (5, 10, 16, 24, 34, 46, 60, 76, 94, 114) for k in range(2, 26)]
    for (label, (x, y, color)), dot in zip(points.items(), dots):
        text = axis.annotate(label, (x, y), fontsize=8, color=color)
        wide, tall = (side * 72 / figure.dpi for side in text.get_window_extent().size)
        text.remove()
        for radius, angle in rings:
            dx, dy = radius * math.cos(angle), radius * math.sin(angle)
            left = dot[0] + dx - (wide if dx < -1 else 0 if dx > 1 else wide / 2)
            low = dot[1] + dy - tall / 2
            box = (left, low, left + wide, low + tall)
            apart = all(box[0] >= t[2] or t[0] >= box[2] or box[1] >= t[3] or t[1] >= box[3] for t in taken)
            if apart and (box[:2] > edges[0]).all() and (box[2:] < edges[1]).all():
                break
        taken.append(box)
        axis.annotate(
            label, (x, y), xytext=(left - dot[0], low - dot[1] + tall / 4), textcoords="offset points", fontsize=8, color=color,
            arrowprops=dict(arrowstyle="-", color=color, lw=0.5, alpha=0.7, shrinkA=0, shrinkB=2) if radius > 10 else None,
        )  # fmt: skip


def draw_sweep(title: str, values: tuple, labels: list[str], results: dict, file: Path) -> None:
    """A panel for each of PANELS: every series against what is swept, with standard errors."""
    plt = pyplot()
    if plt is None:
        return
    figure, axes = plt.subplots(1, len(PANELS), figsize=(16, 3.8), constrained_layout=True)
    for axis, panel in zip(axes, PANELS):
        for label in labels:
            means, errors = zip(*(mean_and_error(results[label, x], panel) for x in values))
            axis.errorbar(range(len(values)), means, errors, marker="o", ms=4, capsize=2, label=label)
        axis.set(xlabel=title, title=axis_title(panel))
        axis.set_xticks(range(len(values)), [f"{x:g}" for x in values])
        axis.grid(alpha=0.25)
    axes[0].legend(fontsize=8)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> dict:
    """The command line as a function. A user error ends with a message and exit code 2."""
    return train.main(argv, lambda argv: study(parse(argv)))


if __name__ == "__main__":
    main()
