"""Why an objective trails here: where probability goes, token class by token class, at equal distance from the start.

    python tests/studies/trails.py --length-bias 0.03                        # every arm; about half an hour on two cores
    python tests/studies/trails.py --arms dpo simpo simper --world stock     # some, with any setting of train.py
    python tests/studies/trails.py --out runs/trails --resume                # goes on where a killed one stopped

A comparison at each method's best learning rate mixes two things, how far a run went and what it bought on the way. Here every
arm (an objective, or a variation of SimPO that removes one suspect) runs at several rates; its measures are read off at the
same KL to the start, between the rates on a straight line in √KL, with the start itself at KL 0. A run is train.train() as it
stands; each result is a line of runs.jsonl.
"""

import functools
import json
import math
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from unittest import mock

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1] / "tools")]

import miniature  # noqa: E402
import torch  # noqa: E402
import toy  # noqa: E402
import transformers  # noqa: E402
from torch import Tensor  # noqa: E402

import data  # noqa: E402
import losses  # noqa: E402
import train  # noqa: E402
from data import Example, UserError, setting  # noqa: E402

# ---- token classes ---------------------------------------------------------------------------------------------------

END = "<end>"
CLASSES = ("fresh", "wrong kind", "repeated", "surplus", "idle", "and", "end, all given", "end, too early", "other")


def classes_after(prompt: str, before: list[str], words: list[str]) -> list[str]:
    """The class of each word, were it the next one of an answer that began with `before`.

    fresh: an item that is asked for and still missing; it alone raises `toy.quality`. Of items that do not: wrong kind,
    repeated, surplus, the first that fits. The end: "all given" when no item is missing. other: what no answer should hold.
    """
    named = {w for w in before if w in toy.KIND_OF}
    missing = {k: n - sum(toy.KIND_OF[w] == k for w in named) for k, n in toy.wanted(prompt).items()}

    def of(word: str) -> str:
        kind = toy.KIND_OF.get(word)
        if kind is None:
            end = "end, all given" if max(missing.values()) <= 0 else "end, too early"
            return "idle" if word in toy.IDLE else {"and": "and", END: end}.get(word, "other")
        if kind not in missing:
            return "wrong kind"
        return "repeated" if word in named else "fresh" if missing[kind] > 0 else "surplus"

    return [of(word) for word in words]


def classes_of(prompt: str, words: list[str]) -> list[str]:
    """The class of every word of an answer, the end token included."""
    return [classes_after(prompt, words[:i], [word])[0] for i, word in enumerate(words)]


# ---- the arms --------------------------------------------------------------------------------------------------------


@losses.objective(reward=losses.average_logp)
def held(logp_w, logp_l, len_w, len_l, *, beta: float = 2.0, gamma: float = 1.0, lam: float = 1.0) -> Tensor:
    """SimPO + λ · SFT on the chosen: L = simpo − λ a_w, as `cpo` has it on sums."""
    return losses.simpo(logp_w, logp_l, len_w, len_l, beta=beta, gamma=gamma) - lam * logp_w / len_w


@losses.objective(reward=losses.average_logp)
def sides(logp_w, logp_l, len_w, len_l, *, up: float = 0.0, down: float = 0.0) -> Tensor:
    """No sigmoid over the pair; each side has a weight of its own: the constant that is given or, at 0, its likelihood e^a.

    L = −f(a_w) + g(a_l), f(a) = up·a or e^a, g(a) = down·a or e^a. Both e^a is `simper`. With down = 0 the push on the rejected
    fades as it gets unlikely. Mean e^a at the start is 0.24 for chosen and 0.11 for rejected responses of the plain world.
    """
    a_w, a_l = logp_w / len_w, logp_l / len_l
    return (down * a_l if down else a_l.exp()) - (up * a_w if up else a_w.exp())


@losses.objective(reward=losses.average_logp)
def ranked(
    logp_w, logp_l, ref_w, ref_l, len_w, len_l, *, beta: float = 2.0, gamma: float = 1.0, reference: bool = False
) -> Tensor:
    """SimPO, or with the reference `dpo_norm`, on the pairs alone that the initial model's average log-prob ranks right."""
    own = losses.simpo(logp_w, logp_l, len_w, len_l, beta=beta, gamma=gamma)
    against = losses.dpo_norm(logp_w, logp_l, ref_w, ref_l, len_w, len_l, beta=beta)
    return (against if reference else own) * (ref_w / len_w > ref_l / len_l)


@losses.objective(reward=losses.average_log_ratio)
def weighed(logp_w, logp_l, ref_w, ref_l, len_w, len_l, *, beta: float = 4.5, own: float = 2.0, gamma: float = 1.0) -> Tensor:
    """`dpo_norm`, each pair with the weight that SimPO gives it at the start: L = 2σ(γ − own·d̄) · dpo_norm.

    d̄ is the initial model's average margin; own and γ are SimPO's β and γ. Without the factor all pairs begin alike.
    """
    weight = 2 * torch.sigmoid(gamma - own * (ref_w / len_w - ref_l / len_l))
    return weight * losses.dpo_norm(logp_w, logp_l, ref_w, ref_l, len_w, len_l, beta=beta)


VARIATIONS = {
    name: losses.OBJECTIVES.pop(name) for name in ("held", "sides", "ranked", "weighed")
}  # known to the runs of this study alone

LOW, MIDDLE, HIGH = (5e-5, 1e-4, 2e-4), (5e-5, 1e-4, 2e-4, 5e-4), (5e-5, 1e-4, 3e-4, 1e-3)
SIMPO = "simpo(beta=2.0, gamma=1.0)"
ARMS = {  # name → the settings of its runs, learning rates, the suspect that it is about
    "simpo": (dict(objective=SIMPO), LOW, ""),
    "dpo": (dict(objective="dpo(beta=0.5)"), MIDDLE, ""),
    "simper": (dict(objective="simper"), HIGH, ""),
    "alpha_dpo": (dict(objective="alpha_dpo(beta=2.5, gamma=0.5, alpha=0.1)"), LOW, ""),
    "sft": (dict(objective="sft"), (5e-4, 1.5e-3, 4e-3), ""),
    "cpo": (dict(objective="cpo(beta=0.1, lam=1.0)"), (3e-4, 1e-3, 2e-3), ""),
    "simpo + sft": (dict(objective="held(lam=1.0)"), MIDDLE, "nothing holds the chosen up"),
    "simpo without rejected end": (dict(objective=SIMPO, without_end="rejected"), LOW, "the end is pushed down"),
    "simpo without end": (dict(objective=SIMPO, without_end="both"), LOW, "the end is pushed down"),
    "simpo at equal length": (dict(objective=SIMPO, equal_length=1.0), LOW, "the end is pushed down"),
    "simpo on sums": (dict(objective="simpo(beta=0.22, gamma=1.0, average=False)"), LOW, "weight β/n per token"),
    "dpo on averages": (dict(objective="dpo_norm(beta=4.5)"), MIDDLE, "weight β/n per token"),
    "simpo gamma 0": (dict(objective="simpo(beta=2.0, gamma=0.0)"), LOW, "saturation"),
    "simpo beta 10": (dict(objective="simpo(beta=10.0, gamma=3.0)"), LOW, "saturation"),
    "hinge": (dict(objective="repo(gamma=0.5)"), LOW, "saturation"),
    "linear": (dict(objective="sides(up=1.0, down=1.0)"), LOW, "saturation"),
    "dpo beta 0.1": (dict(objective="dpo(beta=0.1)"), LOW, "saturation"),
    "linear 2 to 1": (dict(objective="sides(up=0.24, down=0.11)"), LOW, "each side has its own weight"),
    "rejected fades": (dict(objective="sides(up=0.24)"), MIDDLE, "each side has its own weight"),
    "chosen rises": (dict(objective="sides(down=0.11)"), LOW, "each side has its own weight"),
    "dpo without reference": (dict(objective="simpo(beta=0.5, gamma=0.0, average=False)"), LOW, "the reference"),
    "simpo with reference": (dict(objective="dpo_norm(beta=2.0)"), LOW, "the reference"),
    "simpo on pairs ranked right": (dict(objective="ranked()"), LOW, "pairs the start ranks wrong"),
    "dpo on pairs ranked right": (dict(objective="ranked(beta=4.5, reference=True)"), MIDDLE, "pairs the start ranks wrong"),
    "dpo weighed as simpo": (dict(objective="weighed()"), MIDDLE, "pairs the start ranks wrong"),
}  # fmt: skip
LEVELS = (0.5, 1.0, 1.5)  # KL to the start, nats per answer
SIDES = ("chosen", "rejected")
DRAWS = 4  # answers to each held-out prompt


# ---- one run ---------------------------------------------------------------------------------------------------------


def experiment(job: dict) -> dict:
    """A run with these settings, and `measure` of it; or why it ended early."""
    job = dict(job)
    asked, end = dict(job), job.pop("without_end", "")
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(losses.OBJECTIVES, VARIATIONS):
        s = miniature.run_settings(job, f"{folder}/run")
        try:
            with mock.patch.object(train, "load_rows", without_end(train.load_rows, end)):
                seconds = train.train(s)["seconds"]
        except UserError as error:
            return {"job": asked, "error": str(error)}
        return {"job": asked, **measure(Path(folder) / "run" / "model", s), "seconds": seconds}


def without_end(load, sides: str):
    """train.load_rows whose rejected responses ("rejected"), or all ("both"), have lost their last token, the end."""

    def cut(e: Example) -> Example:
        return e._replace(responses=[r[:-1] if i or sides == "both" else r for i, r in enumerate(e.responses)])

    def loaded(*args) -> tuple:
        trained, held_out, reports = load(*args)
        if sides:
            trained = trained.mapped(cut)
            held_out = held_out.mapped(cut)
        return trained, held_out, reports

    return loaded


def measure(model: Path, s: train.Settings) -> dict:
    """{measure: value}, and under "start" the same of the start. KL is exact at each position of the model's answers.

    Of answers (DRAWS to each held-out prompt): quality, win_rate against the initial model's, words, count/CLASS per answer.
    On the initial model's own answers: mass/CLASS, the probability that each class gets at its positions, summed over an
    answer; moved and moved_first, half the summed change of probability, mean over positions and at the first.
    On held-out pairs: chosen/CLASS and rejected/CLASS, change of log-prob in nats per token of the class.
    """
    task = Path(s.model).parent
    start = at_the_start(task, s)
    with tempfile.TemporaryDirectory() as folder:
        drawn = []
        for seed in range(DRAWS):
            toy.answer(model, task / "prompts.jsonl", Path(folder) / f"{seed}.jsonl", seed)
            drawn += read_answers(Path(folder) / f"{seed}.jsonl")
    now = of_answers(drawn)
    better = (quality_of(drawn).view(DRAWS, -1) - quality_of(start["answers"])).sign()
    answers = encode(start["tokenizer"], drawn)
    p, q = (torch.cat(distributions(m, answers)) for m in (model, task / "model"))
    now |= {"win_rate": (0.5 + 0.5 * better).mean().item(), "kl": ((p.exp() * (p - q)).sum() / len(answers)).item()}
    p = torch.cat(distributions(model, start["examples"]))
    change = 0.5 * (p.exp() - start["p"].exp()).abs().sum(1)
    first = torch.tensor([0, *(len(e.responses[0]) for e in start["examples"][:-1])]).cumsum(0)
    now |= {"moved": change.mean().item(), "moved_first": change[first].mean().item()}
    now |= by_class("mass", p.exp(), start["table"], len(start["examples"]))
    for side in SIDES:
        drift = of_targets(model, start[side]) - start[f"{side}_logp"]
        now |= {f"{side}/{c}": drift[start[f"{side}_classes"] == i].mean().item() for i, c in enumerate(CLASSES)}
        now[side] = drift.sum().item() / len(start[side])
    return now | {"start": start["measures"]}


@functools.lru_cache(maxsize=8)
def _at_the_start(task: Path, how: str) -> dict:
    s = train.Settings(dataset=str(task / "pairs.jsonl"), **json.loads(how))
    tokenizer, answers = data.load_tokenizer(str(task / "model")), read_answers(task / "answers.jsonl")
    examples, words = encode(tokenizer, answers), tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    table = torch.tensor([
        [CLASSES.index(c) for c in classes_after(prompt, text[:i], words)] for prompt, text in answers for i in range(len(text))
    ])  # fmt: skip
    p = torch.cat(distributions(task / "model", examples))
    measures = of_answers(answers) | by_class("mass", p.exp(), table, len(answers)) | {"win_rate": 0.5, "kl": 0.0, "moved": 0.0}
    start = dict(tokenizer=tokenizer, answers=answers, examples=examples, table=table, p=p)
    _, pair, _ = train.load_rows(s, tokenizer, train.parse_objective("dpo"))
    averages = []
    for i, side in enumerate(SIDES):
        start[side] = [e._replace(responses=[e.responses[i]]) for e in pair]
        classes = [c for e in start[side] for c in classes_of(*as_words(tokenizer, e))]
        start[f"{side}_classes"] = torch.tensor([CLASSES.index(c) for c in classes])
        logp = start[f"{side}_logp"] = of_targets(task / "model", start[side])
        averages.append([x.mean().item() for x in logp.split([len(e.responses[0]) for e in start[side]])])
        measures |= {f"{side}/{c}": 0.0 for c in CLASSES} | {side: 0.0}
        measures |= {f"tokens_{side}/{c}": classes.count(c) / len(pair) for c in CLASSES}
        measures |= {f"likelihood_{side}": torch.tensor(averages[-1]).exp().mean().item()}
    ranked = torch.tensor(averages[0]) > torch.tensor(averages[1])
    start["measures"] = measures | {"moved_first": 0.0, "ranked": ranked.double().mean().item()}
    return start


def at_the_start(task: Path, s: train.Settings) -> dict:
    """What is equal for all runs of a task: kept, as a process makes many of them."""
    return _at_the_start(task, json.dumps({"seed": s.seed, "eval_size": s.eval_size, "cache": s.cache}))


def read_answers(file: Path) -> list[tuple[str, list[str]]]:
    """(prompt, words with the end) of each line; an answer that was cut off gets an end all the same, as in toy.judge."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [(row["prompt"][-1]["content"], [*(row["responses"] or [""])[0].split(), END]) for row in rows]


def encode(tokenizer, answers: list[tuple[str, list[str]]]) -> list[Example]:
    def ask(prompt):
        return [{"role": "user", "content": prompt}]

    rows = [data.Row(ask(p), [data.answer(" ".join(text[:-1]))]) for p, text in answers]
    return [data.encode(row, tokenizer, 256, 128)[0] for row in rows]


def as_words(tokenizer, e: Example) -> tuple[str, list[str]]:
    """(prompt, words) of an example: its prompt's ids are <user> … <assistant>."""
    prompt, response = (tokenizer.convert_ids_to_tokens(ids) for ids in (e.prompt, e.responses[0]))
    return " ".join(prompt[1:-1]), response


def quality_of(answers: list[tuple[str, list[str]]]) -> Tensor:
    return torch.tensor([toy.quality(prompt, " ".join(text)) for prompt, text in answers], dtype=torch.float64)


def of_answers(answers: list[tuple[str, list[str]]]) -> dict[str, float]:
    classes = [c for prompt, text in answers for c in classes_of(prompt, text)]
    words = sum(len(text) - 1 for _, text in answers) / len(answers)
    counts = {f"count/{c}": classes.count(c) / len(answers) for c in CLASSES}
    return {"quality": quality_of(answers).mean().item(), "words": words, **counts}


def by_class(name: str, p: Tensor, table: Tensor, answers: int) -> dict[str, float]:
    """Probability of each class, summed over positions, per answer. p: (positions, vocabulary), table: class of each entry."""
    mass = torch.zeros(len(p), len(CLASSES)).scatter_add(1, table, p).sum(0) / answers
    return {f"{name}/{c}": x for c, x in zip(CLASSES, mass.tolist())}


@torch.no_grad()
def distributions(model: Path, examples: list[Example]) -> list[Tensor]:
    """Log-probs of the whole vocabulary at each response position, (tokens, vocabulary) for each example; one response each."""
    network = _network(model)
    found = []
    for i in range(0, len(examples), 512):
        rows = [torch.tensor(e.prompt + e.responses[0]) for e in examples[i : i + 512]]
        logp = network(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)).logits.log_softmax(-1)  # padding comes last
        for e, row, line in zip(examples[i : i + 512], rows, logp):
            found.append(line[len(e.prompt) - 1 : len(row) - 1].clone())
    return found


def _network(model: Path) -> torch.nn.Module:
    return transformers.LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)


def of_targets(model: Path, examples: list[Example]) -> Tensor:
    """Log-prob of every response token, all in a row."""
    targets = torch.tensor([t for e in examples for t in e.responses[0]])
    return torch.cat(distributions(model, examples)).gather(1, targets[:, None])[:, 0]


# ---- the study -------------------------------------------------------------------------------------------------------


@dataclass
class Study(miniature.OnToyTasks):
    arms: list[str] | None = setting(None, "only these of ARMS; simpo and dpo, the two that all are compared with, always run")
    seeds: int = setting(3, "runs of each setting, each in a world of its own")


def parse(argv: list[str]) -> Study:
    """The command line; a file of train.py's settings may stand in front of it."""
    return train.parse_settings(argv, Study, "tests/studies/trails.py", __doc__)


def check(s: Study) -> None:
    for name in s.arms or ():
        data.refuse_unless_known("arms", name, ARMS)
    if s.seeds < 1:
        raise UserError(f"seeds is {s.seeds}; it must be at least 1")
    miniature.check_task(s)


def jobs_of(s: Study) -> dict[str, list[dict]]:
    """arm → its jobs, every rate in every world."""
    of_trainer = {f.name: getattr(s, f.name) for f in fields(miniature.OnToyTasks)}
    common, chosen = miniature.common_settings(miniature.Study(**of_trainer)), {"simpo", "dpo", *(s.arms or ARMS)}
    return {
        name: [common | settings | {"lr": lr, "seed": seed} for seed in range(s.seeds) for lr in rates]
        for name, (settings, rates, _) in ARMS.items()
        if name in chosen
    }


def study(s: Study) -> dict:
    """Run every arm, tabulate and draw; everything is in the output folder."""
    check(s)
    started, out = time.perf_counter(), train.prepare_out(s)
    train.write_whole(out / train.MARKER, json.dumps({"plainpo": {"study": "trails"}}))
    train.write_whole(out / "settings.json", json.dumps(asdict(s), indent=2) + "\n")
    results = miniature.run_groups(jobs_of(s), out / "runs.jsonl", experiment)
    text = f"{start_line(results)}\n\n{matched_table(results)}\n{held_out_line(results)}\n\n{class_tables(results)}"
    (out / "table.md").write_text(text)
    print(text)
    draw_quality(results, out / "quality.png")
    draw_classes(results, out / "classes.png")
    train.say(f"{time.perf_counter() - started:.0f} s; everything is in {out}")
    return {"out": str(out), "results": results}


def at_kl(runs: list[dict], level: float, name: str) -> float:
    """A measure of an arm in one world at this KL: between its runs, and the start at KL 0, on a straight line in √KL.

    To first order a run's measures and its √KL both grow with the rate. Not a number where no run went that far.
    """
    runs = [run for run in runs if name in run]
    knots = sorted([(math.sqrt(max(run["kl"], 0.0)), run[name]) for run in runs])
    knots, x = [(0.0, run["start"][name]) for run in runs[:1]] + knots, math.sqrt(level)
    for (a, left), (b, right) in zip(knots, knots[1:]):
        if a <= x <= b:
            return left + (right - left) * (x - a) / (b - a)
    return math.nan


def at_level(runs: list[dict], level: float, name: str) -> Tensor:
    """`at_kl` in each world."""
    worlds = {run["job"]["seed"]: [] for run in runs}
    for run in runs:
        worlds[run["job"]["seed"]].append(run)
    return torch.tensor([at_kl(of_world, level, name) for of_world in worlds.values()], dtype=torch.float64)


def mean_and_error(values: Tensor) -> tuple[float, float]:
    return values.mean().item(), (values.std() / math.sqrt(len(values))).item() if len(values) > 1 else 0.0


def written(values: Tensor, digits: int = 3, sign: str = "") -> str:
    """ "0.640 ± 0.012" over worlds, or a dash where an arm did not get that far in one of them."""
    mean, error = mean_and_error(values)
    return "–" if math.isnan(mean) else f"{mean:{sign}.{digits}f} ± {error:.{digits}f}"


def best_of(runs: list[dict]) -> tuple[Tensor, float, float]:
    """Of an arm's rates the one with the best mean win rate: (win rates, lr, mean KL)."""
    rates = {}
    for run in runs:
        rates.setdefault(run["job"]["lr"], []).append((run.get("win_rate", math.nan), run.get("kl", math.nan)))
    tried = {lr: torch.tensor(values, dtype=torch.float64) for lr, values in rates.items()}
    lr = max(tried, key=lambda lr: tried[lr][:, 0].mean().nan_to_num(-1.0).item())
    return tried[lr][:, 0], lr, tried[lr][:, 1].mean().item()


def start_line(results: dict[str, list[dict]]) -> str:
    starts = {run["job"]["seed"]: run["start"] for runs in results.values() for run in runs if "start" in run}

    def over(name, digits):
        return written(torch.tensor([s[name] for s in starts.values()], dtype=torch.float64), digits)

    return (
        f"The start: quality {over('quality', 3)}, {over('words', 1)} words; its average log-prob ranks {over('ranked', 2)} of "
        f"the held-out pairs right; mean e^a {over('likelihood_chosen', 2)} chosen, {over('likelihood_rejected', 2)} rejected."
    )


def matched_table(results: dict[str, list[dict]]) -> str:
    """Markdown: what each arm had bought at each KL, against simpo and dpo in the same world; and its best rate, as it is."""
    middle = LEVELS[1]
    titles = ["arm", "suspect", *(f"quality at KL {x:g}" for x in LEVELS), f"at {middle:g}, minus simpo's", "minus dpo's"]
    titles += [f"{what} at {middle:g}" for what in ("win rate, %", "words", "chosen, nats", "rejected, nats")]
    titles += ["best win rate, %", "its lr", "its KL"]
    lines = [titles, ["---"] * len(titles)]
    for name, runs in results.items():
        at, (best, lr, kl) = functools.partial(at_level, runs, middle), best_of(runs)
        minus = (written(at("quality") - at_level(results[x], middle, "quality"), 3, "+") for x in ("simpo", "dpo"))
        qualities = (written(at_level(runs, x, "quality")) for x in LEVELS)
        at_middle = [written(100 * at("win_rate"), 1), written(at("words"), 1), *(written(at(x), 2, "+") for x in SIDES)]
        best_rate = [written(100 * best, 1), f"{lr:g}", f"{kl:.2f}"]
        lines.append([f"`{name}`", ARMS[name][2] or "–", *qualities, *minus, *at_middle, *best_rate])
    return miniature.markdown(lines)


def held_out_line(results: dict[str, list[dict]]) -> str:
    """Over the arms: does quality at the middle KL go with what became of the held-out log-probs?"""
    names, middle = ("quality", *SIDES), LEVELS[1]
    points = torch.tensor([[at_level(runs, middle, n).mean() for n in names] for runs in results.values()], dtype=torch.float64)
    points = points[points.isfinite().all(1)]
    quality, chosen, rejected = points.T
    r = [torch.corrcoef(torch.stack([quality, x]))[0, 1].item() for x in (chosen, rejected, chosen - rejected)]
    return (
        f"Over the {len(points)} arms that got as far as KL {middle:g}, quality there correlates with the change of the "
        f"held-out log-probs (nats per response): of the chosen {r[0]:+.2f}, the rejected {r[1]:+.2f}, their difference "
        f"{r[2]:+.2f}."
    )


CHANGES = {  # measure → what changed
    "count": "tokens per answer, minus the initial model's",
    "mass": "probability on the initial model's own answers, tokens per answer, minus the initial model's",
    "chosen": "log-prob of held-out chosen responses, change in nats per token of the class",
    "rejected": "log-prob of held-out rejected responses, change in nats per token of the class",
}


def change_of_classes(runs: list[dict], measure: str) -> list[tuple[float, float]]:
    """(mean, standard error) over worlds of each class's change, at the middle KL."""
    names = [f"{measure}/{c}" for c in CLASSES]
    return [mean_and_error(at_level(runs, LEVELS[1], n) - at_level(runs, 0.0, n)) for n in names]


def class_tables(results: dict[str, list[dict]]) -> str:
    """Markdown, one table for each of CHANGES: arms down, classes across."""
    text = ""
    for measure, title in CHANGES.items():
        lines = [[f"at KL {LEVELS[1]:g}: {title}", *CLASSES], ["---"] * (1 + len(CLASSES))]
        for name, runs in results.items():
            cells = change_of_classes(runs, measure)
            lines.append([f"`{name}`", *("–" if math.isnan(m) else f"{m:+.2f} ± {e:.2f}" for m, e in cells)])
        text += miniature.markdown(lines) + "\n"
    return text


# ---- pictures --------------------------------------------------------------------------------------------------------


def spread(heights: list[float], gap: float) -> list[float]:
    """Heights for names beside points: the same order, at least `gap` apart, moved no further up than that needs."""
    placed = {}
    for i in sorted(range(len(heights)), key=lambda i: heights[i]):
        placed[i] = max([heights[i], *(h + gap for h in placed.values())])
    return [placed[i] for i in range(len(heights))]


FURTHEST, DEEPEST = 3.0, 0.1  # nats of KL, and quality below the initial model's: what lies beyond is not drawn


def draw_quality(results: dict[str, list[dict]], file: Path) -> None:
    """Quality against KL, a panel for each suspect, simpo and dpo in all; a name stands at the end of its line."""
    plt = miniature.pyplot()
    if plt is None:
        return
    panels = {"the objectives": [n for n in results if not ARMS[n][2]]}
    for suspect in dict.fromkeys(ARMS[n][2] for n in results if ARMS[n][2]):
        panels[suspect] = ["simpo", "dpo", *(n for n in results if ARMS[n][2] == suspect)]
    rows = -(-len(panels) // 2)
    figure, axes = plt.subplots(rows, 2, figsize=(11, 3.1 * rows), sharex=True, sharey=True, squeeze=False)
    figure.subplots_adjust(left=0.07, right=0.81, top=0.97, bottom=0.05, wspace=0.72, hspace=0.22)
    lines, ends = {name: quality_line(runs) for name, runs in results.items()}, {axis: [] for axis in axes.flat}
    for axis, (title, names) in zip(axes.flat, panels.items()):
        for i, name in enumerate(n for n in names if lines[n]):
            x, mean, error = torch.tensor(lines[name]).T.numpy()
            color = {"simpo": "black", "dpo": "gray"}.get(name, f"C{i % 10}")
            axis.plot(x, mean, color=color, lw=1.8)
            axis.fill_between(x, mean - error, mean + error, color=color, alpha=0.15, lw=0)
            ends[axis].append((name, x[-1], mean[-1], color))
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_xlim(0, FURTHEST)
        axis.grid(alpha=0.25)
    low, high = axes[0, 0].get_ylim()  # of all panels, now that all lines are there
    for axis, names in ends.items():
        for (name, x, y, color), height in zip(names, spread([y for _, _, y, _ in names], 0.08 * (high - low))):
            axis.annotate(
                name, (x, y), xytext=(1.04 * FURTHEST, height), textcoords="data", fontsize=9, color=color, va="center",
                annotation_clip=False, arrowprops=dict(arrowstyle="-", color=color, lw=0.5, alpha=0.6, relpos=(0, 0.5)),
            )  # fmt: skip
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel("true quality")
    for axis in axes.flat[max(0, len(panels) - 2) : len(panels)]:
        axis.set_xlabel("KL to the start, nats per answer")
        axis.tick_params(labelbottom=True)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def quality_line(runs: list[dict]) -> list[tuple[float, float, float]]:
    """(KL, mean quality, standard error) as far as every world's runs go, and the picture."""
    line = [(x / 20, *mean_and_error(at_level(runs, x / 20, "quality"))) for x in range(int(20 * FURTHEST) + 1)]
    return [point for point in line if point[1] > line[0][1] - DEEPEST]  # false where it is not a number


def draw_classes(results: dict[str, list[dict]], file: Path) -> None:
    """Change by token class at the middle KL: arms down, classes across, the number in each field."""
    plt = miniature.pyplot()
    if plt is None:
        return
    names = [n for n, runs in results.items() if all(math.isfinite(m) for m, _ in change_of_classes(runs, "count"))]
    if not names:
        return
    figure, axes = plt.subplots(2, 1, figsize=(10, 2 * (1.0 + 0.26 * len(names))), constrained_layout=True)
    for axis, (measure, title) in zip(axes, [(m, CHANGES[m]) for m in ("count", "chosen")]):
        change = torch.tensor([[m for m, _ in change_of_classes(results[n], measure)] for n in names])
        limit = change.abs().quantile(0.9).item()
        axis.imshow(change.numpy(), cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
        for i, row in enumerate(change.tolist()):
            for j, x in enumerate(row):
                axis.text(
                    j, i, f"{x:+.2f}", ha="center", va="center", fontsize=8, color="white" if abs(x) > 0.8 * limit else "k"
                )
        axis.set_yticks(range(len(names)), names, fontsize=9)
        axis.set_xticks(range(len(CLASSES)), [c.replace(", ", "\n") for c in CLASSES], fontsize=9)
        axis.set_title(title, fontsize=10, loc="left")
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> dict:
    """The command line as a function. A user error ends with a message and exit code 2."""
    return train.main(argv, lambda argv: study(parse(argv)))


if __name__ == "__main__":
    main()
