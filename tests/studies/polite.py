"""A real model visibly learns: SmolLM2-135M on short answers of which one is polite and one is rude.

    python tests/studies/polite.py --model smollm2 --out runs/polite                 # some four hours on 2 cores
    python tests/studies/polite.py --model smollm2 --out runs/polite --resume        # goes on where a killed one stopped
    python tests/studies/polite.py --model smollm2 --arms dpo simpo --seeds 1        # some of it

The rows are 1,100 instructions with two answers each, from the preference chapter of Build a Large Language Model (From
Scratch): instruction-data-with-preference.json of https://github.com/rasbt/LLMs-from-scratch, Apache-2.0, in its author's split
(the first 85 % are for training). `--dataset` and `--eval-dataset` say where they are.

Each of ARMS is trained for SEARCHED steps at each of RATES. While the lowest held-out loss is at an end of those tried so far,
one beyond is tried too. Of the rates at which the chosen responses stayed likely (LOST) that with the lowest loss trains an
epoch; while an epoch makes them less likely, the next lower rate does. The last is the best rate, for which there is an epoch
with each seed. One seed also trains at the rate of the lowest loss of all. Beside them runs dpo_norm with the settings of the
book's public log, at its rate and at another one, and with `--hh` DPO on harmlessness pairs. A result is a line of runs.jsonl
as soon as it is there.
"""

import functools
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import frontier  # noqa: E402
import miniature  # noqa: E402
import torch  # noqa: E402
from trails import written  # noqa: E402

import data  # noqa: E402
import train  # noqa: E402
from data import Example, UserError, setting  # noqa: E402
from logprobs import completions, continuations  # noqa: E402

ARMS = {
    "dpo": "dpo(beta=0.1)", "dpo_norm": "dpo_norm(beta=2.0)", "ipo": "ipo(tau=0.1)", "kto": "kto(beta=0.1)",
    "orpo": "orpo(lam=0.1)", "simpo": "simpo(beta=2.0, gamma=1.0)", "simper": "simper",
    "alpha_dpo": "alpha_dpo(beta=2.0, gamma=1.0, alpha=0.1)",
}  # fmt: skip
RATES = (1e-5, 3e-5, 1e-4)
SEARCHED = 20  # optimizer steps of a run that looks for the rate
LOST = 0.5  # nats per token: so much less likely may held-out chosen responses become at the best rate
MORE = 3  # rates beyond an end of RATES, at most
PUBLIC = "dpo_norm(beta=0.1)"  # the book's code averages log-probs; β 0.1, 8 pairs a step
PUBLIC_RATES = (5e-6, 3e-5)  # the book's, and a higher one
FILE = "instruction-data-with-preference.json"
ANSWERS = 10  # held-out prompts that are answered greedily, before and after
DRAWN = 40  # held-out prompts whose sampled answers the KL is measured on
TOKENS = 64  # longest answer
SHOWN = 160  # characters of an answer in the table


@dataclass
class Study:
    model: str = setting(MISSING, "folder or hub name of a causal language model")
    dataset: str = setting(f"{FILE}[:935]", "training pairs")
    eval_dataset: str = setting(f"{FILE}[935:]", "held-out pairs")
    hh: str | None = setting(None, "harmlessness pairs for a run of three epochs; 200 of them are held out")
    out: str = setting("runs/polite", "output folder")
    resume: bool = setting(False, "go on with the study that is in out")
    arms: list[str] | None = setting(None, f"only these of {', '.join(ARMS)}")
    rates: list[float] | None = setting(None, "learning rates in place of RATES")
    seeds: int = setting(3, "runs at the best rate")
    dtype: str = setting("auto", "arithmetic of training, see train.py")


def check(s: Study) -> None:
    """UserError for what cannot be meant, before anything is loaded."""
    for name in s.arms or ():
        data.refuse_unless_known("arms", name, ARMS)
    data.refuse_unless_known("dtype", s.dtype, train.DTYPES)
    if not all(0 < lr < 1 for lr in s.rates or ()):
        raise UserError(f"rates are {s.rates}; each is above 0 and below 1")
    if not 1 <= s.seeds <= 100:
        raise UserError(f"seeds is {s.seeds}; it is from 1 to 100")
    data.reachable(s.model)
    for source in filter(None, (s.dataset, s.eval_dataset, s.hh)):
        next(iter(data.read(source)))  # a missing file is said here
    miniature.workers()


# ---- one run ---------------------------------------------------------------------------------------------------------


def job_of(s: Study, objective: str, lr: float, **more) -> dict:
    common = {"model": s.model, "dataset": s.dataset, "eval_dataset": s.eval_dataset, "dtype": s.dtype}
    return common | {"objective": objective, "lr": lr, "seed": 0, "batch_size": 16, "eval_every": 20} | more


def experiment(out: Path, job: dict) -> dict:
    """Train with these settings and measure; or why it ended early.

    curve: the lines of metrics.jsonl that are evaluations. minutes: of the process's cores together, training and evaluating.
    gib: the peak of the process, which has made earlier runs.
    After a whole epoch on rows with held-out ones also answers, see `greedy`, and kl, see `distance`.
    """
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        s = train.Settings(**job, out=f"{folder}/run", samples=0, export_dtype="fp32", cache=str(out / "cache"))
        try:
            train.train(s)
        except UserError as error:
            return {"job": job, "error": str(error)}
        minutes = (time.process_time() - started) / 60
        metrics = train.read_lines(Path(s.out) / "metrics.jsonl", "step", int)
        curve = [line for line in metrics if "eval_loss" in line]
        gib = max(line["peak_memory_gib"] for line in metrics if "peak_memory_gib" in line)
        result = {"job": job, "curve": curve, "minutes": minutes, "gib": gib}
        if s.eval_dataset and not s.max_steps:
            model = f"{s.out}/model"
            result["answers"] = greedy(model, s.eval_dataset)
            result["kl"] = distance(model, s.model, s.eval_dataset)
    return result


def first_rows(dataset: str, n: int) -> list[data.Row]:
    return [data.format_of(raw, "row")[0](raw) for _, raw in itertools.islice(data.read(dataset), n)]


def prompt_ids(rows: list[data.Row], tokenizer) -> list[list[int]]:
    return [data.encode(row, tokenizer, 2**31, 2**31)[0].prompt for row in rows]


@torch.no_grad()
def greedy(model: str, dataset: str) -> list[list[str]]:
    """[prompt, greedy answer] of the first ANSWERS rows."""
    tokenizer, rows = data.load_tokenizer(model), first_rows(dataset, ANSWERS)
    answers, _ = completions(frontier.network(model), tokenizer, prompt_ids(rows, tokenizer), TOKENS)
    return [[row.prompt[-1]["content"], answer] for row, answer in zip(rows, answers)]


@torch.no_grad()
def distance(model: str, start: str, dataset: str) -> list[float]:
    """KL(model ‖ start) of the model's own answers to the first DRAWN rows' prompts at temperature 1, nats; see frontier.py."""
    tokenizer, policy = data.load_tokenizer(model), frontier.network(model)
    prompts = prompt_ids(first_rows(dataset, DRAWN), tokenizer)
    torch.manual_seed(0)
    answers, _ = continuations(policy, tokenizer, prompts, TOKENS, 1.0)
    examples = [Example(prompt, [answer]) for prompt, answer in zip(prompts, answers)]
    return frontier.kl_of(policy, frontier.network(start), examples).tolist()


# ---- the study -------------------------------------------------------------------------------------------------------


def final(run: dict) -> dict:
    return run["curve"][-1]


def lowest(runs: list[dict]) -> dict | None:
    """The run with the lowest held-out loss."""
    finished = [run for run in runs if "error" not in run]
    return min(finished, key=lambda run: final(run)["eval_loss"], default=None)


def kept(run: dict) -> bool:
    """Whether it ended, with chosen responses that are still likely: see LOST."""
    key = "eval_logp_w_per_token"
    return "error" not in run and final(run)[key] > run["curve"][0][key] - LOST


def best_of(runs: list[dict]) -> dict | None:
    """The run with the lowest held-out loss among those that kept the chosen responses likely."""
    return lowest([run for run in runs if kept(run)])


def beyond(runs: list[dict]) -> float | None:
    """The next rate where the lowest loss is at an end of those that were tried; a run that ended early is the worst of all."""
    rates = sorted(run["job"]["lr"] for run in runs)
    found = lowest(runs)
    if found is None or len(rates) == 1:
        return None
    if found["job"]["lr"] == rates[-1]:
        return float(f"{rates[-1] ** 2 / rates[-2]:.0e}")
    if found["job"]["lr"] == rates[0]:
        return float(f"{rates[0] ** 2 / rates[1]:.0e}")
    return None


def search(s: Study, run_all) -> dict[str, list[dict]]:
    """arm → a short run of seed 0 at each rate."""
    short = dict(max_steps=SEARCHED, eval_every=0)
    results = run_all({name: [job_of(s, ARMS[name], lr, **short) for lr in s.rates or RATES] for name in s.arms or ARMS})
    for _ in range(MORE):
        wanted = {name: beyond(runs) for name, runs in results.items()}
        jobs = {name: [job_of(s, ARMS[name], lr, **short)] for name, lr in wanted.items() if lr is not None}
        for name, runs in run_all(jobs).items():
            results[name] += runs
    return results


def settle(s: Study, searched: dict[str, list[dict]], run_all) -> dict[str, list[float]]:
    """arm → the rates at which an epoch was trained, downwards from the search's best one; the last is the best rate: the first
    whose epoch kept the chosen responses likely, or the lowest there is."""
    rates = {name: [run["job"]["lr"] for run in runs] for name, runs in searched.items()}
    tried = {name: [run["job"]["lr"]] for name, runs in searched.items() if (run := best_of(runs))}
    while True:
        results = run_all({name: [job_of(s, ARMS[name], lrs[-1])] for name, lrs in tried.items()})
        spoilt = [name for name, (run,) in results.items() if not kept(run) and tried[name][-1] > min(rates[name])]
        if not spoilt:
            return tried
        for name in spoilt:
            tried[name].append(max(lr for lr in rates[name] if lr < tried[name][-1]))


def study(s: Study) -> dict:
    """Run all, tabulate and draw; everything is in the output folder."""
    check(s)
    started = time.perf_counter()
    out = train.prepare_out(train.Settings(model=s.model, out=s.out, resume=s.resume))
    train.write_whole(out / train.MARKER, json.dumps({"plainpo": {"study": "polite"}}))
    train.write_whole(out / "settings.json", json.dumps(asdict(s), indent=2) + "\n")
    run_all = functools.partial(miniature.run_groups, file=out / "runs.jsonl", work=functools.partial(experiment, out))
    searched = search(s, run_all)
    tried = settle(s, searched, run_all)
    least = {name: run["job"]["lr"] for name, runs in searched.items() if (run := lowest(runs))}
    beside = {"public": [job_of(s, PUBLIC, lr, batch_size=8, eval_every=10) for lr in PUBLIC_RATES]}
    if s.hh:
        how = dict(dataset=s.hh, eval_dataset=None, epochs=3, eval_every=27)
        beside["hh"] = [job_of(s, ARMS["dpo"], least.get("dpo", RATES[0]), **how)]
    at_best = {}
    for seed in range(s.seeds):  # all objectives with the first seed before any with the second
        at_best |= {(name, seed): [job_of(s, ARMS[name], rates[-1], seed=seed)] for name, rates in tried.items()}
    elsewhere = {}
    for name, lr in least.items():
        *refused, best = tried.get(name, [None])
        elsewhere |= {((name, rate), 0): [job_of(s, ARMS[name], rate)] for rate in sorted({lr, *refused} - {best})}
    results = run_all(beside | at_best | elsewhere)
    seeds, spoilt = finished(results, at_best), finished(results, elsewhere)
    answering = [runs[0] for of in (seeds, spoilt) for runs in of.values()]
    answering += [run for run in results["public"] if "error" not in run]
    tables = [rates_table(searched), *(table(of) for of in (seeds, spoilt) if of)]
    tables += [answers_table(greedy(s.model, s.eval_dataset), answering)]
    curves = [curve_table(run) for name in beside for run in results[name]]
    text = "\n".join(tables + curves)
    train.write_whole(out / "table.md", text)
    print(text)
    draw(seeds, out / "polite.png")
    train.say(f"{time.perf_counter() - started:.0f} s; everything is in {out}")
    return {"out": str(out), "searched": searched, "seeds": seeds, "spoilt": spoilt, **{name: results[name] for name in beside}}


def finished(results: dict, keys: Iterable[tuple]) -> dict:
    """what → its runs with these keys, (what, seed), that did not end early."""
    found = {}
    for what, seed in keys:
        (run,) = results[what, seed]
        if "error" not in run:
            found.setdefault(what, []).append(run)
    return found


# ---- tables and the picture ------------------------------------------------------------------------------------------


def rates_table(searched: dict[str, list[dict]]) -> str:
    """Held-out loss and, in brackets, the change of the chosen log-prob in nats per token after SEARCHED steps at each rate,
    seed 0; the best one is bold."""
    rates = sorted({run["job"]["lr"] for runs in searched.values() for run in runs})
    lines = [["held-out loss at lr", *(f"{lr:.0e}" for lr in rates)], ["---"] * (1 + len(rates))]
    for name, runs in searched.items():
        cells = dict.fromkeys(rates, "")
        for run in runs:
            text = "ended early"
            if "error" not in run:
                first, last = run["curve"][0], final(run)
                change = last["eval_logp_w_per_token"] - first["eval_logp_w_per_token"]
                text = f"{last['eval_loss']:.4f} ({change:+.2f})"
            cells[run["job"]["lr"]] = f"**{text}**" if run is best_of(runs) else text
        lines.append([f"`{ARMS[name]}`", *cells.values()])
    return miniature.markdown(lines)


def mean(lines: list[dict], key: str, digits: int = 3) -> str:
    return f"{statistics.fmean(line[key] for line in lines):.{digits}f}"


def with_errors(lines: list[dict], key: str) -> str:
    values = [line[key] for line in lines]
    spread = f" ({min(values):.3f}–{max(values):.3f})" if len(values) > 1 else ""
    return f"{mean(lines, key)} ± {mean(lines, f'{key}_se')}{spread}"


def table(seeds: dict) -> str:
    """Means over seeds. ±: the standard error of the change over held-out pairs, a mean over seeds; in brackets the lowest and
    the highest seed."""
    titles = ["objective", "lr", "accuracy before", "accuracy", "margin", "loss before", "loss", "chosen, nats/token"]
    titles += ["rejected, nats/token", "KL, nats", "core minutes"]
    lines = [titles, ["---"] * len(titles)]
    for runs in seeds.values():
        first, last = [run["curve"][0] for run in runs], [final(run) for run in runs]
        kl = torch.tensor([run["kl"] for run in runs], dtype=torch.float64).mean(0)
        lines.append([
            f"`{runs[0]['job']['objective']}`", f"{runs[0]['job']['lr']:.0e}", mean(first, "eval_reward_accuracy"),
            with_errors(last, "eval_reward_accuracy"), with_errors(last, "eval_reward_margin"),
            mean(first, "eval_loss", 4), mean(last, "eval_loss", 4),
            *(f"{mean(first, key, 2)} → {mean(last, key, 2)}" for key in ("eval_logp_w_per_token", "eval_logp_l_per_token")),
            written(kl, 2), mean(runs, "minutes", 1),
        ])  # fmt: skip
    return miniature.markdown(lines)


def answers_table(before: list[list[str]], runs: list[dict]) -> str:
    """Greedy answers to held-out prompts, before training and after each of these runs."""
    lines = [["prompt", "who", "answer"], ["---"] * 3]
    for i, (prompt, answer) in enumerate(before):
        lines.append([frontier.one_line(prompt), "before", frontier.one_line(answer)])
        for run in runs:
            who = f"`{run['job']['objective']}`, lr {run['job']['lr']:.0e}"
            text = frontier.one_line(run["answers"][i][1])
            lines.append(["", who, text if len(text) <= SHOWN else f"{text[:SHOWN]} …"])
    return miniature.markdown(lines)


def curve_table(run: dict) -> str:
    """Every evaluation of a run; the margin is without β, as in the public log."""
    if "error" in run:
        return f"ended early: {run['error']}\n"
    beta = 0.1
    titles = ["step", "pairs seen", "held-out loss", "accuracy", "margin / β", "chosen, nats/token", "rejected, nats/token"]
    lines = [titles, ["---"] * len(titles)]
    for line in run["curve"]:
        accuracy = f"{line['eval_reward_accuracy']:.3f}"
        if line["step"]:
            accuracy += f" ± {line['eval_reward_accuracy_se']:.3f}"
        lines.append([
            str(line["step"]), f"{line['step'] * run['job']['batch_size']:,}", f"{line['eval_loss']:.4f}", accuracy,
            f"{line['eval_reward_margin'] / beta:.3f}", f"{line['eval_logp_w_per_token']:.3f}",
            f"{line['eval_logp_l_per_token']:.3f}",
        ])  # fmt: skip
    job = run["job"]
    return f"`{job['objective']}`, lr {job['lr']:.0e}, {job['batch_size']} pairs a step\n\n{miniature.markdown(lines)}"


def draw(seeds: dict[str, list[dict]], file: Path) -> None:
    """Accuracy, and the change of both log-probs, against pairs seen: a line for each objective, the mean over its seeds."""
    plt = miniature.pyplot()
    if plt is None:
        return
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.5), constrained_layout=True)
    keys = {
        "held-out accuracy": "eval_reward_accuracy", "chosen: change in nats per token": "eval_logp_w_per_token",
        "rejected: change in nats per token": "eval_logp_l_per_token",
    }  # fmt: skip
    for axis, (title, key) in zip(axes, keys.items()):
        ends = {}
        for number, (name, runs) in enumerate(seeds.items()):
            seen = [line["step"] * runs[0]["job"]["batch_size"] for line in runs[0]["curve"]]
            values = torch.tensor([[line[key] for line in run["curve"]] for run in runs]).mean(0)
            if key != "eval_reward_accuracy":
                values = values - values[0]
            axis.plot(seen, values, "o-", ms=3, color=f"C{number}")
            ends[name] = (seen[-1], values[-1].item(), f"C{number}")
        axis.set(title=title, xlabel="pairs seen", xlim=(0, 1.35 * seen[-1]))
        axis.grid(alpha=0.25)
        miniature.name_points(axis, ends)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> dict:
    """The command line as a function. A user error ends with a message and exit code 2."""
    return train.main(argv, lambda argv: study(data.parse(Study, argv, "tests/studies/polite.py", __doc__)))


if __name__ == "__main__":
    main()
