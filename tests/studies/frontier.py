"""A real language model on a known reward: how much reward each objective buys for its distance from the start.

    python tests/studies/frontier.py --model smollm2 --out runs/frontier            # a folder with SmolLM2-135M-Instruct
    python tests/studies/frontier.py --model smollm2 --out runs/frontier --resume   # goes on where a killed one stopped
    python tests/studies/frontier.py --model smollm2 --arms dpo simpo --rates 3e-5  # some of it

The reward is VADER's compound score of an answer, from -1 to 1: a fixed list of words with a tone, and some rules (pip install
vaderSentiment). The model answers each prompt five times; best against worst is a pair. Every run of ARMS trains on these
pairs with train.train() as it stands, and then answers held-out prompts, which are about other things. Another seed has other
pairs and other held-out prompts. Each piece is kept as soon as it is there: samples.jsonl, scored.jsonl, pairs.jsonl of each
seed, and each run's result as a line of runs.jsonl.

KL is KL(policy ‖ start) in nats per answer: exact over the vocabulary at each position of the policy's own answers, summed
over an answer (its end, if it came), mean over answers. That is unbiased for the KL of whole answers, cut at --tokens, and
varies less than the log-ratio of the sampled tokens, whose mean it is too.
"""

import functools
import json
import math
import random
import statistics
import sys
import tempfile
import time
from dataclasses import MISSING, asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import miniature  # noqa: E402
import on_policy  # noqa: E402
import torch  # noqa: E402
from trails import at_kl, mean_and_error, written  # noqa: E402

import data  # noqa: E402
import train  # noqa: E402
from data import Example, UserError, setting  # noqa: E402
from logprobs import ResponseLogProbs, as_texts, continuations  # noqa: E402

# ---- what is run -----------------------------------------------------------------------------------------------------

TEMPLATES = (
    "Describe {} in one short sentence.", "Write one short sentence about {}.",
    "What is {} like? Answer in one short sentence.", "Give your opinion of {} in one short sentence.",
)  # fmt: skip
THINGS = """a rainy day, the sea, a broken bicycle, winter, my neighbour, a hospital, a birthday party, traffic, a kitten, an
old castle, a job interview, a tax form, the dentist, a long flight, a bowl of soup, the moon, a bus stop, a spider, a
wedding, a library, a thunderstorm, the desert, a used car, a chess game, an exam, a new phone, a hotel room, a cup of
coffee, the news, a marathon, a farm, a train station, homework, a flat tyre, a garden, a museum, a cold shower, a puppy, a
meeting, a mountain, a haircut, an apple, a robot, the internet, a lost key, a river, a headache, a school, an elevator, a
pair of shoes, a volcano, a prison, a toothbrush, a football match, a power cut, a letter, a swamp, the opera, a sandwich, a
snake, a lighthouse, a debt, an airport, a blanket, a dark cave, a violin, moving house, a wasp, a bakery, a factory, a
divorce, a sunrise, a parking ticket, a holiday, a storm at sea, a candle, a boss, a baby, a rival, a church, an empty
street, a map, a bad dream, a cactus, a circus, an ambulance, a bridge, a cheap umbrella, a gift, a crowded beach, a diary,
the past, a mosquito, a picnic, a rumour, a queue, an island, a fever, a friend, a glass of water, a ghost story, a harbour,
a joke, a kitchen, a lawyer, a mirror, a night shift, an onion, a police officer, a quiet evening, rush hour, a scar, a
teacher, an unpaid bill, a village, a war, a yacht, a zoo, an accident, a ladder, a penguin, fog, a password, a compliment, a
delay"""
HELD_OUT_THINGS = 25

RATES, TWO = (3e-6, 1e-5, 3e-5), (1e-5, 6e-5)
ARMS = {  # name → its calls, each at its learning rates
    "dpo": {"dpo(beta=0.1)": RATES, "dpo(beta=0.5)": TWO},
    "simpo": {"simpo(beta=2.0, gamma=1.0)": RATES, "simpo(beta=10.0, gamma=3.0)": TWO},
    "simper": {"simper": (*RATES, 6e-5)},
    "alpha_dpo": {"alpha_dpo(beta=2.5, gamma=0.5, alpha=0.1)": RATES, "alpha_dpo(beta=10.0, gamma=3.0, alpha=0.5)": TWO},
    "ipo": {"ipo(tau=0.1)": RATES, "ipo(tau=0.5)": TWO},
    "kto": {"kto(beta=0.1)": RATES, "kto(beta=0.5)": TWO},
    "sft": {"sft": TWO},
}
SAMPLES = 5  # answers to each prompt, of which the best and the worst are a pair
AT_ONCE = 32  # prompts that are answered as one batch
SHOWN = 4  # held-out prompts whose answers are shown
LEVELS = (1, 2, 5)  # nats of KL at which the arms are compared
COUNTED = 1000  # words of all answers among which different ones are counted: a fixed number, as longer texts repeat more


@dataclass
class Study:
    model: str = setting(MISSING, "folder or hub name of a causal language model")
    out: str = setting("runs/frontier", "output folder")
    resume: bool = setting(False, "go on with the study that is in out")
    arms: list[str] | None = setting(None, f"only these of {', '.join(ARMS)}")
    rates: list[float] | None = setting(None, "only the first setting of each arm, at these learning rates")
    prompts: int = setting(400, "training prompts")
    held_out: int = setting(100, "held-out prompts")
    draws: int = setting(2, "answers to each held-out prompt")
    tokens: int = setting(40, "longest answer")
    steps: int = setting(24, "optimizer steps of a run")
    batch_size: int = setting(16, "pairs of a step")
    dtype: str = setting("auto", "arithmetic of training, see train.py")
    seeds: int = setting(2, "how often all of it is done, each time with other pairs and other held-out prompts")


def check(s: Study) -> None:
    """UserError for what cannot be meant, before anything is loaded."""
    for name in s.arms or ():
        data.refuse_unless_known("arms", name, ARMS)
    data.refuse_unless_known("dtype", s.dtype, train.DTYPES)
    if not all(0 < lr < 1 for lr in s.rates or ()):
        raise UserError(f"rates are {s.rates}; each is above 0 and below 1")
    most = {"prompts": len(prompts(0)[0]), "held_out": len(prompts(0)[1]), "seeds": 100}
    for name in ("prompts", "held_out", "draws", "tokens", "steps", "batch_size", "seeds"):
        value = getattr(s, name)
        if not 1 <= value <= most.get(name, 10**4):
            raise UserError(f"{name} is {value}; it is from 1 to {most.get(name, 10**4)}")
    analyzer()
    miniature.workers()


def prompts(seed: int) -> tuple[list[str], list[str]]:
    """(training, held out): the held-out ones are about things that no training prompt names."""
    things, rng = " ".join(THINGS.split()).split(", "), random.Random(seed)
    rng.shuffle(things)
    both = [
        [t.format(thing) for thing in part for t in TEMPLATES] for part in (things[HELD_OUT_THINGS:], things[:HELD_OUT_THINGS])
    ]
    for part in both:
        rng.shuffle(part)
    return both[0], both[1]


# ---- the reward ------------------------------------------------------------------------------------------------------


@functools.cache
def analyzer():
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise UserError("the reward is VADER's compound score; its package is missing: pip install vaderSentiment") from error
    return SentimentIntensityAnalyzer()


def compound(row: dict, response: str) -> float:
    """The tone of an answer, from -1 (negative) to 1; 0 where no word has one. A reward function of on_policy.score."""
    return analyzer().polarity_scores(response)["compound"]


def folder_of(out: Path, seed: int) -> Path:
    return out / f"seed-{seed}"


def make_pairs(s: Study, out: Path, seed: int) -> None:
    """pairs.jsonl: the initial model's answers to the training prompts (temperature 1, those that end), best against worst."""
    out.mkdir(exist_ok=True)
    asked = sorted(prompts(seed)[0][: s.prompts], key=len)  # a batch's prompts are padded to the longest
    lines = [json.dumps({"prompt": text}, ensure_ascii=False) + "\n" for text in asked]
    train.write_whole(out / "prompts.jsonl", "".join(lines))
    sampled, scored = str(out / "samples.jsonl"), str(out / "scored.jsonl")
    how = dict(n=SAMPLES, temperature=1.0, top_p=1.0, max_tokens=s.tokens, batch_size=AT_ONCE, seed=seed)
    on_policy.sample(on_policy.Sampling(s.model, str(out / "prompts.jsonl"), sampled, **how), say=train.say)
    on_policy.score(on_policy.Scoring(sampled, scored, rule=compound))
    on_policy.pairs(on_policy.Pairing(scored, str(out / "pairs.jsonl"), seed=seed), say=train.say)


# ---- one run ---------------------------------------------------------------------------------------------------------


def jobs_of(s: Study) -> dict[str, list[dict]]:
    """arm → its jobs; and the start, a job without an objective."""
    own = ("model", "prompts", "held_out", "draws", "tokens", "steps", "batch_size", "dtype")
    common = {name: getattr(s, name) for name in own}
    settings = {"the start": [{"objective": "", "lr": 0.0}]}
    for name in s.arms or ARMS:
        calls = list(ARMS[name].items())
        if s.rates:
            calls = [(calls[0][0], s.rates)]
        settings[name] = [{"objective": text, "lr": lr} for text, rates in calls for lr in rates]
    return {
        name: [common | how | {"seed": seed} for seed in range(s.seeds) for how in several]
        for name, several in settings.items()
    }


def experiment(out: Path, job: dict) -> dict:
    """Train with these settings on the seed's pairs.jsonl and measure; or why it ended early. Weights stay fp32, so that small
    steps are not rounded away. An unpaired objective takes both completions of a pair."""
    pairs = str(folder_of(out, job["seed"]) / "pairs.jsonl")
    with tempfile.TemporaryDirectory() as folder:
        model, started = job["model"], time.process_time()
        if job["objective"]:
            own = {name: job[name] for name in ("model", "objective", "lr", "dtype", "seed")}
            try:
                rows = sum(1 for _ in data.read(pairs))
                s = train.Settings(
                    **own, dataset=pairs, out=f"{folder}/run", eval_size=0, samples=0,
                    batch_size=job["batch_size"], epochs=math.ceil(job["steps"] * job["batch_size"] / rows),
                    max_steps=job["steps"], export_dtype="fp32", cache=str(out / "cache"),
                )  # fmt: skip
                train.train(s)
            except UserError as error:
                return {"job": job, "error": str(error)}
            model = f"{folder}/run/model"
        trained = time.process_time()
        found = evaluate(model, job)
        return {"job": job, **found, "cpu_train": trained - started, "cpu_measure": time.process_time() - trained}


@torch.no_grad()
def evaluate(model: str, job: dict) -> dict:
    """What a policy answers to the held-out prompts (temperature 1, fp32), `draws` times each.

    reward, kl: for each prompt, the mean over its answers. words: per answer. unfinished: share that did not end within
    `tokens`. distinct: different words among the first COUNTED of all answers, a share. repetition: see train.repetition.
    """
    tokenizer, policy = data.load_tokenizer(model), network(model)
    asked, n = prompts(job["seed"])[1][: job["held_out"]], job["draws"]
    rows = [data.Row([{"role": "user", "content": text}], [data.answer(data.MARK)]) for text in asked]
    ids = [data.encode(row, tokenizer, 2**31, 2**31)[0].prompt for row in rows]
    answers, ended = [], []
    for i in range(0, len(ids), AT_ONCE):
        torch.manual_seed(job["seed"] + i)
        some = continuations(policy, tokenizer, [p for p in ids[i : i + AT_ONCE] for _ in range(n)], job["tokens"], 1.0)
        answers, ended = answers + some[0], ended + some[1]
    texts = as_texts(tokenizer, answers, ended)
    examples = [Example(p, answers[n * i : n * i + n]) for i, p in enumerate(ids)]
    kl = torch.zeros(len(answers)) if model == job["model"] else kl_of(policy, network(job["model"]), examples)
    words = [word.strip('.,;:!?"').lower() for text in texts for word in text.split()]

    def per_prompt(values):
        return torch.as_tensor(values).view(-1, n).mean(1).tolist()

    return {
        "reward": per_prompt([compound({}, text) for text in texts]), "kl": per_prompt(kl), "words": len(words) / len(texts),
        "unfinished": 1 - sum(ended) / len(ended), "distinct": len(set(words[:COUNTED])) / max(1, len(words[:COUNTED])),
        "repetition": train.repetition(texts), "answers": texts[::n],
    }  # fmt: skip


def network(model: str) -> torch.nn.Module:
    return on_policy.load_model(model, "CausalLM", torch.device("cpu")).float()


@torch.no_grad()
def kl_of(policy: torch.nn.Module, start: torch.nn.Module, examples: list[Example]) -> torch.Tensor:
    """Σ_t KL(π_θ(·|x, y_<t) ‖ π_start(·|x, y_<t)) of every answer, nats; both models are left in the packed layout."""
    both = ResponseLogProbs(start, reference=policy)  # its KL(reference ‖ model) is what is wanted, with the roles exchanged
    both.use_layout("packed")
    batches = (data.packed_batch(examples[i : i + 16]) for i in range(0, len(examples), 16))
    return torch.cat([both(batch, ("kl",))["kl"] for batch in batches])


# ---- the study -------------------------------------------------------------------------------------------------------


def study(s: Study) -> dict:
    """Make the pairs, run every arm, tabulate and draw; everything is in the output folder."""
    check(s)
    data.reachable(s.model)
    started = time.perf_counter()
    out = train.prepare_out(train.Settings(model=s.model, out=s.out, resume=s.resume))
    train.write_whole(out / train.MARKER, json.dumps({"plainpo": {"study": "frontier"}}))
    train.write_whole(out / "settings.json", json.dumps(asdict(s), indent=2) + "\n")
    for seed in range(s.seeds):
        make_pairs(s, folder_of(out, seed), seed)
    runs = miniature.run_groups(jobs_of(s), out / "runs.jsonl", functools.partial(experiment, out))
    results = {name: together(several) for name, several in runs.items()}
    text = f"{table(results)}\n{at_equal_kl(results)}\n{shown(results, prompts(0)[1])}"
    train.write_whole(out / "table.md", text)
    print(text)
    draw(results, out / "frontier.png")
    train.say(f"{time.perf_counter() - started:.0f} s; everything is in {out}")
    return {"out": str(out), "results": results}


def together(runs: list[dict]) -> list[dict]:
    """Runs that differ in nothing but their seed as one: held-out prompts of all seeds, answers of the first."""
    groups = {}
    for run in runs:
        groups.setdefault((run["job"]["objective"], run["job"]["lr"]), []).append(run)
    return [one_of(group) for group in groups.values()]


def one_of(group: list[dict]) -> dict:
    for run in group:
        if "error" in run:
            return run
    all_prompts = {name: [x for run in group for x in run[name]] for name in ("reward", "kl")}
    names = ("words", "unfinished", "distinct", "repetition")
    means = {name: statistics.fmean(run[name] for run in group) for name in names}
    return group[0] | all_prompts | means


def mean(run: dict, name: str) -> float:
    return sum(run[name]) / len(run[name])


def frontier(runs: list[dict]) -> list[dict]:
    """Those that no other beats with less KL, from the start on."""
    kept = []
    for run in sorted((r for r in runs if "kl" in r), key=lambda r: mean(r, "kl")):
        if not kept or mean(run, "reward") > mean(kept[-1], "reward"):
            kept.append(run)
    return kept


def everything(results: dict[str, list[dict]]) -> list[dict]:
    return [run for runs in results.values() for run in runs]


def table(results: dict[str, list[dict]]) -> str:
    """A run a line, by KL within an arm; ± is the standard error over held-out prompts, of differences over the same prompts;
    bold: on the frontier of all."""
    titles = ["objective", "lr", "KL, nats", "reward", "over the start", "words", "unfinished, %", "different words, %"]
    titles += ["repeated 3-grams, %"]
    lines, best = [titles, ["---"] * len(titles)], frontier(everything(results))
    (start,) = results["the start"]
    for name, runs in results.items():
        for run in sorted(runs, key=lambda run: mean(run, "kl") if "kl" in run else math.inf):
            job, bold = run["job"], "**" * (run in best)
            head = [f"`{job['objective']}`", f"{job['lr']:g}"] if job["objective"] else [name, "–"]
            if "error" in run:
                lines.append([*head, f"ended early: {data.brief(run['error'])}", *[""] * 6])
                continue
            cells = [written(of_prompts(run, "kl"), 2), f"{bold}{written(of_prompts(run, 'reward'))}{bold}"]
            cells += ["" if run is start else written(of_prompts(run, "reward") - of_prompts(start, "reward"), sign="+")]
            percent = [f"{100 * run[m]:.1f}" for m in ("unfinished", "distinct", "repetition")]
            lines.append([*head, *cells, f"{run['words']:.1f}", *percent])
    return miniature.markdown(lines)


def of_prompts(run: dict, name: str) -> torch.Tensor:
    return torch.tensor(run[name], dtype=torch.float64)


def at_level(start: dict, runs: list[dict], level: float) -> torch.Tensor:
    """Reward of each held-out prompt at this KL, see trails.at_kl; between the runs of the arm's first setting."""
    own, at_start = [], {"reward": of_prompts(start, "reward")}
    for run in runs:
        if "kl" in run and run["job"]["objective"] == runs[0]["job"]["objective"]:
            own.append({"kl": mean(run, "kl"), "reward": of_prompts(run, "reward"), "start": at_start})
    return torch.atleast_1d(torch.as_tensor(at_kl(own, level, "reward")))


def at_equal_kl(results: dict[str, list[dict]]) -> str:
    """Each arm's reward at each of LEVELS, and how much more that is than DPO's, prompt by prompt."""
    (start,) = results["the start"]
    titles = ["objective"]
    for level in LEVELS:
        titles += [f"reward at KL {level}", "over DPO"]
    lines = [titles, ["---"] * len(titles)]
    for name, runs in results.items():
        if runs[0] is start:
            continue
        cells = [f"`{runs[0]['job']['objective']}`"]
        for level in LEVELS:
            reward = at_level(start, runs, level)
            more = reward - at_level(start, results.get("dpo", []), level)
            cells += [written(reward), "" if name == "dpo" else written(more, sign="+")]
        lines.append(cells)
    return miniature.markdown(lines)


def one_line(text: str) -> str:
    """An answer for a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def shown(results: dict[str, list[dict]], asked: list[str]) -> str:
    """What the start and three points of the frontier (its first, middle and last) answer to the first held-out prompts."""
    best = frontier(everything(results))[1:]
    points = [results["the start"][0], *(best[i] for i in sorted({0, len(best) // 2, len(best) - 1}) if best)]
    lines = [["prompt", "KL", "policy", "answer"], ["---"] * 4]
    for i, prompt in enumerate(asked[:SHOWN]):
        for run in points:
            if i < len(run["answers"]):
                policy = f"`{run['job']['objective']}`, lr {run['job']['lr']:g}" if run["job"]["objective"] else "the start"
                lines.append([prompt, f"{mean(run, 'kl'):.2f}", policy, one_line(run["answers"][i])])
                prompt = ""
    return miniature.markdown(lines)


def draw(results: dict[str, list[dict]], file: Path) -> None:
    """Reward against KL: a colour for each objective, a shape for each learning rate, hollow where it is not the arm's first
    setting; a line along the arm's own frontier, its name at the end."""
    plt = miniature.pyplot()
    if plt is None:
        return
    figure, axis = plt.subplots(figsize=(9.5, 7), constrained_layout=True)
    axis.set_xscale("function", functions=(lambda x: x.clip(0) ** 0.5, lambda x: x**2))  # small steps move √KL
    (start,), named = results["the start"], {}
    shapes = dict(zip(sorted({run["job"]["lr"] for run in everything(results) if run is not start}), "os^Dv*P"))
    for i, (name, runs) in enumerate(results.items()):
        color, first = f"C{i - 1}" if i else "black", runs[0]["job"]["objective"]
        for run in (run for run in runs if "kl" in run):
            (x, dx), (y, dy) = (mean_and_error(of_prompts(run, m)) for m in ("kl", "reward"))
            how = dict(color=color, mfc=color if run["job"]["objective"] == first else "white", ms=6, lw=0.7, zorder=3)
            axis.errorbar(x, y, dy, dx, fmt=shapes.get(run["job"]["lr"], "o"), **how)

        def at(runs):
            return [(mean(run, "kl"), mean(run, "reward")) for run in runs]

        way, points = at(frontier([start, *runs])), at(run for run in runs if "kl" in run)
        axis.plot(*zip(*way), color=color, lw=1.2, alpha=0.6)
        if points:
            named[name] = (*(way[1:] or [max(points)])[-1], color)
    for lr, shape in shapes.items():
        axis.plot([], [], shape, color="gray", label=f"lr {lr:g}")
    axis.margins(0.08)
    axis.set_xlim(left=0)
    ticks = [x for x in (0, 0.1, 0.5, 1, 2, 5, 10, 20, 50, 100, 200) if x <= axis.get_xlim()[1]]
    axis.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axis.set(xlabel="KL to the start, nats per answer (√ scale)", ylabel="mean reward (VADER's compound score)")
    axis.set_title("mean ± standard error over held-out prompts; hollow: an objective's second setting", fontsize=9)
    axis.grid(alpha=0.25)
    axis.legend(loc="best", fontsize=8)
    miniature.name_points(axis, named)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> dict:
    """The command line as a function. A user error ends with a message and exit code 2."""
    return train.main(argv, lambda argv: study(data.parse(Study, argv, "tests/studies/frontier.py", __doc__)))


if __name__ == "__main__":
    main()
