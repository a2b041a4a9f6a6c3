"""Where preference pairs come from, at equal cost: plain sampling, approaches (dts) and tree search, in a world of sums.

    python tests/studies/diversify.py --out runs/diversify                        # five worlds; an hour or so on two cores
    python tests/studies/diversify.py --out runs/quick --seeds 1 --prompts 256    # a quick look
    python tests/studies/diversify.py --out runs/diversify --resume               # goes on where a killed one stopped

After Dokmeci 2025 (temperature, chain of thought, tree search, DTS), at a size where every step can be checked. A prompt,
"3 plus 4 times 2", is worked out as it is spoken, from left to right: "3 + 4 = 7 ; 7 × 2 = 14 ; answer 14". A tiny Llama learns
from careless demonstrations; each strategy then samples from it until its *generated* tokens are spent, the same number for all
(prompts that are read cost nothing here; a search reads its prompt once more in each iteration). Each set gives pairs, on which
four objectives train the start, each at the best of three learning rates in a world of its own. A pair of whole answers is a
right one against a wrong one, one pair a prompt, as `data.py pairs --how correct` takes them.

- plain: n answers to a prompt.
- dts: two approaches, n / 2 answers by each. A tiny model follows no instructions, so the two are words that it was taught: "by
  products" (7 × 3 = 21) and "by sums" (7 + 7 = 14 ; 14 + 7 = 21). Naming approaches costs nothing here, unlike in `data.py`.
- mcts: `data.py sample --strategy mcts`, a step ends at ";". Its pairs are whole answers, or steps.
- cot is not represented: all answers go step by step, as nobody could tell this model to.
"""

import itertools
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import numpy as np  # noqa: E402
import on_policy  # noqa: E402
import torch  # noqa: E402
from claims import verdict  # noqa: E402
from miniature import job_key, markdown, mean_and_error, run_jobs  # noqa: E402

import data  # noqa: E402
import train  # noqa: E402
from data import UserError, setting  # noqa: E402

# ---- the world of sums -----------------------------------------------------------------------------------------------

SIGNS, APPROACHES, LARGEST, HELD_OUT = {"plus": "+", "minus": "−", "times": "×"}, ("products", "sums"), 99, 512
CARELESS = 0.15  # of the demonstrated steps are wrong
WORDS = (*map(str, range(LARGEST + 1)), *SIGNS, *SIGNS.values(), "by", *APPROACHES, "=", ";", "answer")


def apply(a: int, word: str, b: int) -> int:
    return {"plus": a + b, "minus": a - b, "times": a * b}[word]


def problem(prompt: str) -> tuple[int, list[tuple[str, int]]]:
    """ "3 plus 4 times 2", with or without "by sums", → 3, [("plus", 4), ("times", 2)]."""
    first, *rest = prompt.partition(" by ")[0].split()
    return int(first), list(zip(rest[::2], map(int, rest[1::2])))


def values(prompt: str) -> list[int]:
    """What is known after each operation; the last is the answer."""
    first, operations = problem(prompt)
    return list(itertools.accumulate(operations, lambda a, o: apply(a, *o), initial=first))


def problems(seed: int, count: int) -> list[str]:
    """Different prompts of two to four operations, all of whose results are within 0 … 99."""
    rng, found = np.random.default_rng(seed), {}
    while len(found) < count:
        words = [str(rng.integers(1, 10))]
        for _ in range(rng.integers(2, 5)):
            word = str(rng.choice(list(SIGNS)))
            words += [word, str(rng.integers(2, 4) if word == "times" else rng.integers(1, 10))]
        if all(0 <= x <= LARGEST for x in values(" ".join(words))):
            found[" ".join(words)] = None
    return list(found)


def demonstration(prompt: str, approach: str, rng: np.random.Generator, careless: float = CARELESS) -> str:
    """The steps of a careless person, who goes on from a wrong result as if it were right."""

    def step(a: int, word: str, b: int) -> int:
        result = apply(a, word, b) + (rng.choice([-10, -2, -1, 1, 2, 10]) if rng.random() < careless else 0)
        steps.append(f"{a} {SIGNS[word]} {b} = {min(max(result, 0), LARGEST)}")
        return int(min(max(result, 0), LARGEST))

    (now, operations), steps = problem(prompt), []
    for word, b in operations:
        if word == "times" and approach == "sums":
            term = now
            for _ in range(b - 1):
                now = step(now, "plus", term)
        else:
            now = step(now, word, b)
    return " ; ".join([*steps, f"answer {now}"])


def first_error(prompt: str, text: str) -> int | None:
    """The index of the first wrong step of an answer, or of its beginning; None where all is right so far.

    Right is what follows from the right steps before: the next operation, a product also as sums, and at the end the answer.
    """
    now, operations = problem(prompt)
    term, more = 0, 0  # a product that is being summed up, and the sums that are missing
    for i, step in enumerate(filter(None, (" ".join(part.split()) for part in text.split(";")))):
        word, b = operations[0] if operations else ("", 0)
        if more and step == f"{now} + {term} = {now + term}":
            now, more = now + term, more - 1
        elif more or now is None:
            return i
        elif not operations and step == f"answer {now}":
            now = None  # nothing may follow
        elif word == "times" and step == f"{now} + {now} = {2 * now}":
            now, term, more, operations = 2 * now, now, b - 2, operations[1:]
        elif word and step == f"{now} {SIGNS[word]} {b} = {apply(now, word, b)}":
            now, operations = apply(now, word, b), operations[1:]
        else:
            return i
    return None


def right(row: dict, text: str) -> bool:
    """The rule: whether the answer is the right one, whatever the steps."""
    return text.split()[-2:] == ["answer", str(values(row["prompt"][-1]["content"])[-1])]


# ---- sets of pairs ---------------------------------------------------------------------------------------------------

DRAWN = 4  # answers to a prompt, or at a step of the tree
ITERATIONS = 6
SETS = ("plain", "dts", "mcts", "mcts, steps")
HOW = dict(temperature=1.0, top_p=1.0, max_tokens=64, batch_size=128, device="cpu")


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def place(job: dict) -> Path:
    """The folder of a world, of everything that it depends on."""
    name = "-".join(str(job[key]) for key in ("seed", "prompts", "demonstrations", "steps"))
    return Path(job["cache"]).expanduser() / f"sums-1-{torch.__version__}-{name}"


def build_world(job: dict) -> dict:
    """A world of sums, kept in its folder: the start, what each strategy sampled, pairs; and what was measured of them."""
    folder = place(job)
    if not (folder / "measured.json").exists():
        part = folder.with_name(f"{folder.name}.part")  # with_suffix would cut the name at the dot of a version
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        measured = make_world(part, job)
        train.write_whole(part / "measured.json", json.dumps(measured))
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
    return {"job": job, **json.loads((folder / "measured.json").read_text())}


def make_world(folder: Path, job: dict) -> dict:
    seed, tokenizer = job["seed"], data.world_tokenizer(WORDS)
    rng, prompts = np.random.default_rng(seed), problems(seed, HELD_OUT + job["prompts"] + 4096)
    held_out, asked, shown = prompts[:HELD_OUT], prompts[HELD_OUT:-4096], prompts[-4096:]
    rows = []
    for prompt in rng.choice(shown, job["demonstrations"]):
        approach = str(rng.choice(APPROACHES, p=[0.8, 0.2]))
        named = f"{prompt} by {approach}" if rng.random() < 0.4 else str(prompt)
        rows.append(data.Row([{"role": "user", "content": named}], [demonstration(prompt, approach, rng)]))
    train.supervised_start(rows, tokenizer, seed, job["steps"]).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for name, some in (("held_out", held_out), ("asked", asked)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in some))
    sampled = {name: sample(folder, name, seed) for name in ("plain", "dts", "mcts")}
    budget = min(sum(row["tokens"] for row in rows) for rows in sampled.values())
    measured = {f"start {k}": x for k, x in accuracy(folder / "model", folder).items()} | {"budget": budget}
    for name in SETS:
        rows = within(sampled[name.partition(",")[0]], budget)
        pairs = pairs_of(rows, folder / f"pairs {name}.jsonl", "steps" in name)
        measured |= {f"{name}/{k}": x for k, x in measure(rows, pairs).items()}
    return measured


def sample(folder: Path, name: str, seed: int) -> list[dict]:
    """The rows of a strategy; dts puts together what was sampled by each approach."""

    def drawn(strategy: str, n: int, prompts: Path, **more) -> list[dict]:
        out = folder / f"sampled {prompts.stem} {strategy}.jsonl"
        on_policy.sample(
            on_policy.Sampling(str(folder / "model"), str(prompts), str(out), n, strategy, **HOW, seed=seed, **more)
        )
        return read(out)

    if name == "mcts":
        return drawn("mcts", DRAWN, folder / "asked.jsonl", rule=right, iterations=ITERATIONS, step_end=";")
    if name == "plain":
        return drawn("plain", DRAWN, folder / "asked.jsonl")
    by = []
    for approach in APPROACHES:
        file = folder / f"asked by {approach}.jsonl"
        file.write_text(
            "".join(json.dumps({"prompt": f"{r['prompt']} by {approach}"}) + "\n" for r in read(folder / "asked.jsonl"))
        )
        by.append(drawn("plain", DRAWN // 2, file))
    return [together(rows) for rows in zip(*by, strict=True)]


def together(rows: Iterable[dict]) -> dict:
    """Rows of one problem by several approaches as one row of the problem itself."""
    first, *_ = rows = list(rows)
    prompt = first["prompt"][-1]["content"].partition(" by ")[0]
    responses = dict.fromkeys(text for row in rows for text in row["responses"])
    tokens = sum(row["tokens"] for row in rows)
    return {"prompt": [{"role": "user", "content": prompt}], "responses": list(responses), "tokens": tokens}


def within(rows: list[dict], budget: int) -> list[dict]:
    """The first rows, as many as their tokens leave within the budget."""
    spent = itertools.accumulate(row["tokens"] for row in rows)
    return [row for row, tokens in zip(rows, spent) if tokens <= budget]


def pairs_of(rows: list[dict], file: Path, steps: bool) -> list[dict]:
    """A right answer against a wrong one for each prompt; or all pairs of next steps half a reward apart, after two visits."""
    with tempfile.TemporaryDirectory() as scratch:
        taken, scored = Path(scratch) / "taken.jsonl", Path(scratch) / "scored.jsonl"
        taken.write_text("".join(json.dumps(row) + "\n" for row in rows))
        if steps:
            on_policy.pairs(on_policy.Pairing(str(taken), str(file), how="step", min_margin=0.5, min_visits=2))
        else:
            on_policy.score(on_policy.Scoring(str(taken), str(scored), rule=right))
            on_policy.pairs(on_policy.Pairing(str(scored), str(file), how="correct"))
    return read(file)


def begun(row: dict) -> tuple[str, str]:
    """(problem, answer so far) of a pair's prompt."""
    first, *turn = row["prompt"]
    return first["content"], turn[0]["content"] if turn else ""


def measure(rows: list[dict], pairs: list[dict]) -> dict:
    """Cost and diversity of a set. Of a search also how well Q tells prefixes that are still right from others.

    first_error: share of pairs whose rejected response has the first error itself, as what comes before it is right.
    """
    texts = [(row, text) for row in rows for text in row["responses"]]
    tokens = sum(row["tokens"] for row in rows)
    found = {"prompts": len(rows), "tokens": tokens, "pairs": len(pairs), "cost": tokens / len(pairs)}
    found |= {"distinct": len(texts) / len(rows), "right": sum(right(*x) for x in texts) / len(texts)}
    if pairs[0].get("chosen_ends") is not None:
        before = [begun(p) for p in pairs]
        wrong = [first_error(ask, so_far) is None and first_error(ask, so_far + p["rejected"]) is not None
                 for p, (ask, so_far) in zip(pairs, before)]  # fmt: skip
        good = [first_error(ask, so_far + p["chosen"]) is None for p, (ask, so_far) in zip(pairs, before)]
        found |= {"first_error": sum(wrong) / len(pairs), "chosen_right": sum(good) / len(pairs)}
    if "tree" in rows[0]:
        found["auc"] = auc(*zip(*(x for row in rows for x in judged(row))))
    return found


def judged(row: dict) -> list[tuple[float, bool]]:
    """Q of every step of a tree, and whether the answer is right up to there."""
    ask, texts, found = row["prompt"][-1]["content"], [], []
    for node in row["tree"]:
        texts.append("" if node["parent"] is None else texts[node["parent"]] + node["step"])
        if node["parent"] is not None:
            found.append((node["Q"], first_error(ask, texts[-1]) is None))
    return found


def auc(scores: Iterable[float], label: Iterable[bool]) -> float:
    """Probability that one with the label has the higher score, ties ½."""
    x, y = np.array(scores), np.array(label)
    values, at, count = np.unique(x, return_inverse=True, return_counts=True)
    rank = count.cumsum() - (count - 1) / 2  # of equal scores the mean of their places
    hits = y.sum()
    return float((rank[at][y].sum() - hits * (hits + 1) / 2) / (hits * (~y).sum()))


# ---- one run ---------------------------------------------------------------------------------------------------------

OBJECTIVES = {  # call, learning rates to try
    "sft": ("sft", (1.5e-4, 5e-4, 1.5e-3)),
    "orpo": ("orpo(lam=1.0)", (1e-4, 3e-4, 1e-3)),
    "dpo": ("dpo(beta=0.5)", (3e-5, 1e-4, 3e-4)),
    "simpo": ("simpo(beta=2.0, gamma=1.0)", (1e-5, 3e-5, 1e-4)),
}
TUNING_SEED, DRAWS = 100, 2


def accuracy(model: Path, folder: Path) -> dict[str, float]:
    """Share of right answers to held-out prompts: drawn at temperature 1, and greedy."""
    found = {"accuracy": [], "greedy": []}
    with tempfile.TemporaryDirectory() as scratch:
        for i in range(DRAWS + 1):
            out, how = f"{scratch}/{i}.jsonl", HOW | dict(batch_size=HELD_OUT, temperature=float(i < DRAWS))
            on_policy.sample(
                on_policy.Sampling(str(model), str(folder / "held_out.jsonl"), out, 1, **how, seed=i, keep_unfinished=True)
            )
            found["accuracy" if i < DRAWS else "greedy"] += [right(r, (r["responses"] or [""])[0]) for r in read(Path(out))]
    return {name: sum(hits) / len(hits) for name, hits in found.items()}


def experiment(job: dict) -> dict:
    """The start trained on a set of its world, and what it then answers; or why the run ended early."""
    folder = place(job)
    with tempfile.TemporaryDirectory() as scratch:
        s = train.Settings(
            model=str(folder / "model"), dataset=str(folder / f"pairs {job['set']}.jsonl"), objective=job["objective"],
            lr=job["lr"], seed=job["seed"], cache=job["cache"], out=f"{scratch}/run", batch_size=16, epochs=2, eval_size=0,
            samples=0, max_length=128, layout="padded", dtype="fp32", tokens_per_microbatch=4096,
        )  # fmt: skip
        try:
            seconds = train.train(s)["seconds"]
        except UserError as error:
            return {"job": job, "error": str(error)}
        return {"job": job, **accuracy(Path(scratch) / "run" / "model", folder), "seconds": seconds}


# ---- the study -------------------------------------------------------------------------------------------------------


@dataclass
class Study(train.Settings):
    seeds: int = setting(5, "worlds that the tables are of")
    prompts: int = setting(1024, "prompts that plain sampling answers; its tokens are what every strategy may spend")
    demonstrations: int = setting(8192, "careless solutions that the start learns from")
    supervised_steps: int = setting(1000, "steps of 64 demonstrations in which it does")


def study(s: Study) -> dict:
    if min(s.seeds, s.prompts, s.demonstrations, s.supervised_steps) < 1:
        raise UserError("seeds, prompts, demonstrations and supervised_steps are at least 1")
    if s.model != "tiny" or s.recipe or "RANK" in os.environ:
        raise UserError("the study runs in a world of its own, without --model, --recipe and torchrun")
    started, out = time.time(), train.prepare_out(s)
    train.write_whole(out / train.MARKER, json.dumps({"plainpo": {"study": "diversify"}}))
    train.write_whole(out / "settings.json", json.dumps(asdict(s), indent=2) + "\n")
    common = dict(prompts=s.prompts, demonstrations=s.demonstrations, steps=s.supervised_steps, cache=s.cache)
    do = lambda jobs, work: run_jobs(jobs, out / "runs.jsonl", work)  # noqa: E731
    worlds = do([common | {"seed": seed} for seed in (*range(s.seeds), TUNING_SEED)], build_world)[: s.seeds]
    tried = {
        (name, objective): [common | {"set": name, "objective": call, "lr": lr, "seed": TUNING_SEED} for lr in rates]
        for name in SETS for objective, (call, rates) in OBJECTIVES.items()
    }  # fmt: skip
    done = {job_key(r["job"]): r for r in do([job for jobs in tried.values() for job in jobs], experiment)}
    best = {key: max(jobs, key=lambda job: done[job_key(job)].get("accuracy", 0.0)) for key, jobs in tried.items()}
    results = iter(do([job | {"seed": seed} for job in best.values() for seed in range(s.seeds)], experiment))
    runs = {key: [next(results) for _ in range(s.seeds)] for key in best}
    text = report(worlds, runs, best)
    (out / "diversify.md").write_text(text)
    print(text)
    draw(worlds, runs, out / "diversify.png")
    train.say(f"{time.time() - started:.0f} s; everything is in {out}")
    return {"out": str(out), "worlds": worlds, "runs": runs}


MEASURES = {  # of a set → title, decimals, factor
    "prompts": ("prompts", 0, 1), "pairs": ("pairs", 0, 1), "cost": ("tokens per pair", 0, 1),
    "distinct": ("different answers per prompt", 2, 1), "right": ("right of them, %", 1, 100),
    "first_error": ("rejected is the first error, %", 1, 100), "chosen_right": ("chosen right so far, %", 1, 100),
    "auc": ("AUC of Q against right so far", 3, 1),
}  # fmt: skip


def cell(results: list[dict], name: str, digits: int, factor: float = 1) -> str:
    """ "61.2 ± 0.8"; a dash where a run ended early or the measure has no meaning; of one world no error."""
    mean, error = (factor * x for x in mean_and_error(results, name))
    return "–" if mean != mean else f"{mean:.{digits}f}" + f" ± {error:.{digits}f}" * (len(results) > 1)


def gap(runs: list[dict], plain: list[dict]) -> str:
    """Points of accuracy ahead of plain sampling, world by world, and whether that is more than two standard errors."""
    ahead = [{"ahead": a.get("accuracy", np.nan) - b.get("accuracy", np.nan)} for a, b in zip(runs, plain)]
    mean, error = (100 * x for x in mean_and_error(ahead, "ahead"))
    return f"{mean:+.1f}" + f" ± {error:.1f}, {verdict(mean, error)}" * (len(runs) > 1)


def report(worlds: list[dict], runs: dict, best: dict) -> str:
    """The sets, and the accuracy after training with the lead over plain sampling ("holds": above two standard errors)."""
    sets = [["set", *(title for title, *_ in MEASURES.values())], ["---"] * (1 + len(MEASURES))]
    sets += [[name, *(cell(worlds, f"{name}/{m}", d, f) for m, (_, d, f) in MEASURES.items())] for name in SETS]
    start = [["start", "–", *(cell(worlds, f"start {m}", 1, 100) for m in ("accuracy", "greedy")), "–"]]
    lines = [["set", "objective, lr", "accuracy, %", "greedy, %", "ahead of plain"], ["---"] * 5, *start]
    for (name, objective), found in runs.items():
        lead = "–" if name == "plain" else gap(found, runs["plain", objective])
        shown = [cell(found, m, 1, 100) for m in ("accuracy", "greedy")]
        lines.append([name, f"{objective}, {best[name, objective]['lr']:g}", *shown, lead])
    cost = [cell([{"x": w[f"{name}/cost"] / w["plain/cost"]} for w in worlds], "x", 2) for name in SETS]
    said = "; ".join(f"{name} {x}" for name, x in zip(SETS, cost))
    spent = cell(worlds, "budget", 0)
    edges = [f"{n}: {o}" for (n, o), job in best.items() if job["lr"] in (min(OBJECTIVES[o][1]), max(OBJECTIVES[o][1]))]
    at_edge = f"The learning rate is at an edge of the grid for {len(edges)} of {len(best)}: {'; '.join(edges) or 'none'}."
    cost_said = f"Tokens generated for each set: {spent}. Tokens per pair, plain = 1: {said}."
    return f"{markdown(sets)}\n{cost_said}\n\n{markdown(lines)}\n{at_edge}\n"


def draw(worlds: list[dict], runs: dict, file: Path) -> None:
    """Held-out accuracy against what a pair costs: a colour and a name for each set, a mark for each objective."""
    plt = train.pyplot()
    if plt is None:
        return
    figure, axis = plt.subplots(figsize=(8, 5), constrained_layout=True)
    start = 100 * mean_and_error(worlds, "start accuracy")[0]
    axis.axhline(start, color="0.6", lw=1)
    axis.set(xscale="log", xlabel="generated tokens per pair", ylabel="right held-out answers at temperature 1, %")
    for i, name in enumerate(SETS):
        cost, _ = mean_and_error(worlds, f"{name}/cost")
        top = start
        for j, (objective, marker) in enumerate(zip(OBJECTIVES, "osD^")):
            height, error = (100 * x for x in mean_and_error(runs[name, objective], "accuracy"))
            axis.errorbar(cost * 1.02 ** (j - 1.5), height, error, fmt=marker, color=f"C{i}", capsize=2)
            top = max(top, height + error)
        axis.annotate(name, (cost, top), xytext=(0, 6), textcoords="offset points", ha="center", color=f"C{i}")
    for objective, marker in zip(OBJECTIVES, "osD^"):
        axis.plot([], [], marker, color="gray", label=objective)
    axis.margins(0.12)
    above = dict(xycoords=("axes fraction", "data"), xytext=(-4, 3), textcoords="offset points", ha="right", color="0.4")
    axis.annotate("start", (1, start), **above)
    low, high = axis.get_xlim()
    ticks = [x for x in (20, 50, 100, 150, 200, 300, 400, 500, 1000, 2000) if low <= x <= high]
    axis.set_xticks(ticks, [str(x) for x in ticks], minor=False)
    axis.set_xticks([], minor=True)
    axis.legend()
    axis.grid(alpha=0.25)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> dict:
    """The command line as a function. What the user can mend ends with a message and exit code 2."""
    return train.main(argv, lambda argv: study(train.parse_settings(argv, Study, "tests/studies/diversify.py", __doc__)))


if __name__ == "__main__":
    main()
