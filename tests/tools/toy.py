"""The toy task: a language so small that the true quality of an answer is known, for the papers' experiment in a minute.

    python tests/tools/toy.py build --length-bias 0.03 --out runs/biased       # a task like tests/toy
    python train.py runs/biased/simpo.yaml --out runs/biased/run
    python tests/tools/toy.py judge runs/biased/run/model --toy runs/biased    # what a trained model's answers became

Prompts ask for things ("name two metals and four tools"). A small Llama learns to answer from a careless person's
demonstrations: it is the initial model. It answers each training prompt five times, an annotator scores the answers with a
little noise, and the best against the worst is a pair. Every step is the code that real models go through.
"""

import functools
import hashlib
import itertools
import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np  # noqa: E402
import tokenizers  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from filelock import FileLock  # noqa: E402
from on_policy import Pairing, Sampling, Scoring, pairs, sample, score  # noqa: E402
from torch import Tensor  # noqa: E402

import data  # noqa: E402
import losses  # noqa: E402
import train  # noqa: E402
from data import MISSING, Example, Row, UserError, setting  # noqa: E402
from logprobs import ResponseLogProbs  # noqa: E402

FOLDER = Path(__file__).resolve().parents[1] / "toy"  # the committed task: seed 0, noise 0.1, no bias
HELD_OUT_PROMPTS = 512  # the first of an order: never demonstrated, never in a pair
DEMONSTRATIONS, SUPERVISED_STEPS, PROMPTS = 8192, 250, 1736

# ---- the language ----------------------------------------------------------------------------------------------------

KINDS = {
    "animals": "cat dog cow horse goat sheep pig duck",
    "fruits": "apple pear plum lemon peach mango cherry fig",
    "colors": "red blue green white black brown pink gray",
    "tools": "hammer saw drill wrench file axe rake shovel",
    "metals": "iron gold tin zinc lead silver copper nickel",
    "trees": "oak pine elm ash birch maple cedar willow",
    "foods": "bread rice soup cheese pasta salad cake stew",
    "clothes": "hat coat shirt scarf glove boot belt sock",
}
NUMBERS = {"two": 2, "three": 3, "four": 4}
ASKS = ("name", "list", "write", "give", "say", "show")
IDLE = ("well", "so", "maybe", "sure", "really")
STOCK = ("well", "sure", "so")  # always these, in this order
KIND_OF = {word: kind for kind, words in KINDS.items() for word in words.split()}
WORDS = (*ASKS, *NUMBERS, *KINDS, *KIND_OF, *IDLE, "and")


def word_tokenizer(words: Iterable[str] = WORDS):
    """A tokenizer with a chat template, one token a word."""
    special = ["<unk>", "<user>", "<assistant>", "<end>"]
    ids = {word: i for i, word in enumerate([*special, *words])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", eos_token="<end>", pad_token="<end>", additional_special_tokens=special[1:3]
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} "
        "{% if m['role'] == 'assistant' %}<end>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return tokenizer


def all_prompts(seed: int = 0) -> list[str]:
    """All 3,168 prompts, "name three fruits" or "list two metals and four tools", each once, in an order of the seed's."""
    single = [f"{number} {kind}" for number in NUMBERS for kind in KINDS]
    double = [f"{a} and {b}" for a, b in itertools.product(single, single) if a.split()[1] != b.split()[1]]
    prompts = [f"{ask} {what}" for ask in ASKS for what in single + double]
    order = np.random.default_rng(seed).permutation(len(prompts))
    return [prompts[i] for i in order]


def wanted(prompt: str) -> dict[str, int]:
    """ "list two metals and four tools" → {"metals": 2, "tools": 4}."""
    words = prompt.split()
    return {kind: NUMBERS[number] for number, kind in zip(words[1::3], words[2::3])}


# ---- who demonstrates, and who judges --------------------------------------------------------------------------------


class Demonstrator(NamedTuple):
    """How careless the person is who answers: probabilities."""

    wrong: float = 0.1  # that an item is any of all kinds
    repeated: float = 0.1  # that an item, not the first, is the one before once more
    confused: float = 0.0  # that an item is of the kind after its own in KINDS, at the same place of the customary order
    stock: float = 0.0  # that an answer opens with STOCK in place of idle words


# Who taught the initial model. In "stock" the careless answer is the likely one: average log-prob ranks most pairs wrong.
WORLDS = {
    "plain": Demonstrator(),
    "stock": Demonstrator(wrong=0.02, repeated=0.35, confused=0.4, stock=0.5),
}


def demonstration(prompt: str, rng: np.random.Generator, who: Demonstrator = WORLDS["plain"]) -> str:
    """What a careless person would answer: idle words, then items of which some are wrong, repeated, missing or too many."""
    kinds = list(KINDS)
    parts = []
    for kind, number in wanted(prompt).items():
        own = KINDS[kind].split()
        start = rng.integers(8)
        next_kind = kinds[(kinds.index(kind) + 1) % 8]
        taken_for = KINDS[next_kind].split()
        count = number + rng.choice([-1, 0, 0, 0, 1, 2])
        items = [own[(start + i) % 8] for i in range(count)]  # in the customary order
        for i in range(len(items)):
            if rng.random() < who.wrong:
                items[i] = rng.choice(list(KIND_OF))
            elif i and rng.random() < who.repeated:
                items[i] = items[i - 1]
            elif who.confused and rng.random() < who.confused:
                items[i] = taken_for[(start + i) % 8]
        parts.append(" ".join(items))
    if who.stock and rng.random() < who.stock:
        opening = list(STOCK)
    else:
        opening = [rng.choice(IDLE) for _ in range(rng.integers(0, 3))]
    return " ".join([*opening, " and ".join(parts)])


def demonstrations(seed: int, count: int, world: str = "plain") -> list[Row]:
    """Answered prompts, in the form of real rows; no held-out prompt is among them."""
    rng = np.random.default_rng(seed)
    shown = all_prompts(seed)[HELD_OUT_PROMPTS:]
    rows = []
    for prompt in rng.choice(shown, count):
        messages = [{"role": "user", "content": str(prompt)}]
        rows.append(Row(messages, [data.answer(demonstration(prompt, rng, WORLDS[world]))]))
    return rows


def quality(prompt: str, response: str) -> float:
    """True quality of a response, at most 1: the share of the asked items given, less ½ share per wrong, repeated or surplus
    item and 0.1 per idle word."""
    words = response.split()
    items = [w for w in words if w in KIND_OF]
    idle = sum(w in IDLE for w in words)
    asked = wanted(prompt)
    right = 0
    for kind, number in asked.items():
        given = {w for w in items if KIND_OF[w] == kind}
        right += min(number, len(given))
    n = sum(asked.values())
    return right / n - 0.5 * (len(items) - right) / n - 0.1 * idle


def repetition(response: str) -> float:
    """Share of the items that were named before in the same response."""
    items = [w for w in response.split() if w in KIND_OF]
    return 1 - len(set(items)) / len(items) if items else 0.0


class Annotator(NamedTuple):
    """Prefers by true quality, as far as it can see: a score is quality + noise · N(0, 1) + length_bias · words.

    The noise of a (prompt, response) is drawn from seed and texts, so a response scored twice has one score.
    """

    noise: float = 0.0
    length_bias: float = 0.0
    seed: int = 0

    def __call__(self, row: dict, response: str) -> float:
        prompt = row["prompt"][-1]["content"]
        drawn = random.Random(f"{self.seed} {prompt} {response}").gauss(0.0, self.noise)
        return quality(prompt, response) + drawn + self.length_bias * len(response.split())


# ---- building --------------------------------------------------------------------------------------------------------

SETTINGS = """\
# SimPO on the toy task of this folder, which `python tests/tools/toy.py build{options}` made:
# model/ was taught by careless demonstrations, pairs.jsonl are its own answers as an annotator ranks them, prompts.jsonl are
# held out. `python tests/tools/toy.py judge MODEL` says what became better.
model: ./model
dataset: ./pairs.jsonl
objective: simpo(beta=2.0, gamma=1.0)
lr: 2e-4
"""


@dataclass
class Building:
    """Make a toy task: a folder with model/, pairs.jsonl, prompts.jsonl (held out) and simpo.yaml, in half a minute."""

    out: str = setting(MISSING, "a new or empty folder")
    seed: int = setting(0, "for everything random")
    noise: float = setting(0.1, "error (standard deviation) of the annotator about a quality")
    length_bias: float = setting(0.0, "what the annotator adds to a response's quality per word")
    world: str = setting("plain", f"who taught the initial model: {' or '.join(WORLDS)}, whose likely answers are bad")


def check(noise: float, length_bias: float, world: str) -> None:
    """UserError for what no task can be built with."""
    data.refuse_unless_known("world", world, WORLDS)
    if noise < 0:
        raise UserError(f"the annotator's noise is {noise}; it must not be negative")


def build(b: Building) -> Path:
    """The `build` command; returns the folder."""
    check(b.noise, b.length_bias, b.world)
    out = Path(b.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"out {out} already holds files; use a new or empty folder")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        sampled = Path(scratch) / "sampled.jsonl"
        make_initial_model(out, b.seed, b.world)
        sample_responses(out / "model", sampled, b.seed)
        make_pairs(sampled, out / "pairs.jsonl", Annotator(b.noise, b.length_bias, b.seed))
    write_settings(out / "simpo.yaml", b)
    train.say(f"the toy task is in {out}; python train.py {out}/simpo.yaml")
    return out


def write_settings(file: Path, b: Building) -> None:
    """The settings of a run on the task, under a line that says how the task was made."""
    changed = [f for f in fields(b) if f.name != "out" and getattr(b, f.name) != f.default]
    options = "".join(f" --{f.name.replace('_', '-')} {getattr(b, f.name)}" for f in changed)
    file.write_text(SETTINGS.format(options=options))


def make_initial_model(folder: Path, seed: int, world: str) -> None:
    """Write folder/model, taught by demonstrations, and folder/prompts.jsonl, the held-out prompts."""
    tokenizer = word_tokenizer()
    model = initial_model(demonstrations(seed, DEMONSTRATIONS, world), tokenizer, seed, SUPERVISED_STEPS)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    write_prompts(all_prompts(seed)[:HELD_OUT_PROMPTS], folder / "prompts.jsonl")


def write_prompts(prompts: list[str], file: Path) -> None:
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))


def initial_model(rows: list[Row], tokenizer, seed: int, steps: int) -> torch.nn.Module:
    """A Llama of 350,000 parameters, fine-tuned on these rows: AdamW on batches of 64, mean NLL per token of each response."""
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=128, tie_word_embeddings=True, bos_token_id=None, eos_token_id=3, pad_token_id=3,
    ))  # fmt: skip
    policy = ResponseLogProbs(model)
    policy.use_layout("padded")
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    examples = [data.encode(row, tokenizer, 128, 100)[0] for row in rows]
    plan = []
    for epoch in range(64):
        plan += data.step_plan(len(examples), 64, seed, epoch)
    plan = plan[:steps]
    schedule = train.Settings(lr=3e-3)
    bar = data.progress(plan, "supervised fine-tuning", "steps")
    for step, part in enumerate(bar):
        batch = data.padded_batch([examples[i] for i in part])
        loss = losses.sft(policy(batch)["logp"], batch.lengths).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = train.learning_rate(step, len(plan), schedule)
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
    train.say(f"initial model: {len(plan)} steps on noisy demonstrations, last loss {loss:.3f} nats per token")
    return model


def sample_responses(model: Path, sampled: Path, seed: int) -> None:
    """Five responses of the initial model to each training prompt."""
    prompts = sampled.with_name("training-prompts.jsonl")
    write_prompts(all_prompts(seed)[HELD_OUT_PROMPTS:][:PROMPTS], prompts)
    how = dict(temperature=1.0, top_p=1.0, max_tokens=64, batch_size=128, seed=seed, device="cpu")
    sample(Sampling(str(model), str(prompts), str(sampled), n=5, **how))


def make_pairs(sampled: Path, out: Path, annotator: Annotator) -> None:
    """The best response of each prompt against the worst, as the annotator scores them."""
    with tempfile.TemporaryDirectory() as scratch:
        scored = f"{scratch}/scored.jsonl"
        score(Scoring(str(sampled), scored, rule=annotator))
        pairs(Pairing(scored, str(out), how="best_worst"))


def cached(seed: int = 0, noise: float = 0.1, length_bias: float = 0.0, world: str = "plain", cache: str = data.CACHE) -> Path:
    """The folder of a toy task, for studies that train on many: what `build` makes, and answers.jsonl, the initial model's
    answers to the held-out prompts. It is built once; tasks that differ in the annotator share model and responses.

    Of several processes one builds; what a killed one left behind is built again.
    """
    check(noise, length_bias, world)
    made_of = [SUPERVISED_STEPS, PROMPTS, seed, torch.__version__, demonstrations(seed, DEMONSTRATIONS, world)]
    key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:32]
    shared = Path(cache).expanduser() / f"toy-{key}"
    folder = shared / f"noise-{noise}-bias-{length_bias}"
    lock = shared.with_name(f".{shared.name}.lock")
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        lock.touch()
    except OSError as error:
        raise UserError(f"cache {cache} cannot be written ({error})") from error
    with FileLock(lock):
        if not shared.exists():
            with whole(shared) as part:
                make_initial_model(part, seed, world)
                sample_responses(part / "model", part / "sampled.jsonl", seed)
                answer(part / "model", part / "prompts.jsonl", part / "answers.jsonl", seed)
        if not folder.exists():
            with whole(folder) as part:
                shutil.copytree(shared / "model", part / "model")
                for name in ("prompts.jsonl", "answers.jsonl"):
                    shutil.copy(shared / name, part / name)
                make_pairs(shared / "sampled.jsonl", part / "pairs.jsonl", Annotator(noise, length_bias, seed))
                write_settings(part / "simpo.yaml", Building("", seed, noise, length_bias, world))
    return folder


class whole:
    """`with whole(folder) as part`: what is written into part is there as folder when all of it is, and never in pieces."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.part = folder.with_name(f"{folder.name}.part")

    def __enter__(self) -> Path:
        shutil.rmtree(self.part, ignore_errors=True)
        self.part.mkdir()
        return self.part

    def __exit__(self, error, *_) -> None:
        if error is None:
            os.rename(self.part, self.folder)


# ---- judging ---------------------------------------------------------------------------------------------------------

MEASURES = {  # → what it is called, and its decimals
    "win_rate": ("win rate against the initial model", 3), "quality": ("true quality", 3), "length": ("words", 1),
    "lc_win_rate": ("length-controlled win rate", 3), "kl": ("KL to the initial model, nats", 2),
    "repetition": ("repeated items", 3),
}  # fmt: skip


@dataclass
class Judging:
    """Say what training changed: a model's answers to the held-out prompts against the initial model's."""

    model: str = setting(MISSING, "folder of the trained model")
    toy: str = setting(str(FOLDER), "folder of the toy task it was trained on")


def print_judgement(j: Judging) -> dict[str, list[float]]:
    """The `judge` command."""
    model, folder = Path(j.model), Path(j.toy)
    for needed, what in ((folder / "model", "toy"), (folder / "prompts.jsonl", "toy"), (model / "config.json", "model")):
        if not needed.exists():
            raise UserError(f"{what} {j.toy if what == 'toy' else j.model}: there is no {needed}")
    with tempfile.TemporaryDirectory() as scratch:
        answers = Path(scratch) / "answers.jsonl"
        before = Path(scratch) / "before.jsonl"
        answer(folder / "model", folder / "prompts.jsonl", before)
        measures = judge(model, folder, answers, before)
        prompts, old, new = read_answers(before, answers)
    print(f"answers to {len(prompts)} held-out prompts (temperature 1), before → after:")
    for name, (title, digits) in MEASURES.items():
        was, now = measures[name]
        print(f"  {title:<36}{was:.{digits}f} → {now:.{digits}f}")
    for prompt, was, now in list(zip(prompts, old, new))[:3]:
        print(f"  prompt  {prompt!r}\n  before  {was!r}\n  after   {now!r}")
    return measures


def answer(model: Path, prompts: Path, out: Path, seed: int = 0) -> None:
    """One answer to each prompt as the model gives it: temperature 1, nothing cut off."""
    out.unlink(missing_ok=True)
    how = dict(temperature=1.0, top_p=1.0, max_tokens=64, batch_size=512, seed=seed, keep_unfinished=True, device="cpu")
    sample(Sampling(str(model), str(prompts), str(out), n=1, **how))


def read_answers(before: Path, after: Path) -> tuple[list[str], list[str], list[str]]:
    """Prompts, and the answers to them in two files."""
    rows = [json.loads(line) for line in before.read_text().splitlines()]
    prompts = [row["prompt"][-1]["content"] for row in rows]
    old = [row["responses"][0] if row["responses"] else "" for row in rows]
    rows = [json.loads(line) for line in after.read_text().splitlines()]
    new = [row["responses"][0] if row["responses"] else "" for row in rows]
    return prompts, old, new


def judge(model: Path, folder: Path, out: Path, before: Path | None = None) -> dict[str, list[float]]:
    """What changed in the answers to held-out prompts, which are written to `out`; [initial model, now] of each measure.

    before: the initial model's answers, without it folder/answers.jsonl, which `cached` writes.
    win_rate: share of prompts where the answer's true quality is above the initial model's, ties ½. lc_win_rate: see
    length_controlled. length: words. kl: KL(now ‖ initial model) in nats per response, a mean of log-ratios over the answers.
    repetition: share of items that were named before in the same answer.
    """
    answer(model, folder / "prompts.jsonl", out)
    prompts, old, new = read_answers(before or folder / "answers.jsonl", out)
    qualities = torch.tensor([[quality(p, t) for p, t in zip(prompts, side)] for side in (old, new)], dtype=torch.float64)
    lengths = torch.tensor([[len(text.split()) for text in side] for side in (old, new)], dtype=torch.float64)
    repetitions = torch.tensor([[repetition(text) for text in side] for side in (old, new)], dtype=torch.float64)
    win = 0.5 + 0.5 * (qualities[1] - qualities[0]).sign()
    tokenizer = data.load_tokenizer(str(model))
    examples = []
    for prompt, text in zip(prompts, new):
        row = Row([{"role": "user", "content": prompt}], [data.answer(text)])
        examples.append(data.encode(row, tokenizer, 256, 128)[0])
    log_ratio = summed_logps(model, examples) - summed_logps(folder / "model", examples)
    return {
        "quality": qualities.mean(1).tolist(),
        "length": lengths.mean(1).tolist(),
        "repetition": repetitions.mean(1).tolist(),
        "win_rate": [0.5, win.mean().item()],
        "lc_win_rate": [0.5, length_controlled(win, lengths[1] - lengths[0])],
        "kl": [0.0, log_ratio.mean().item()],
    }


def length_controlled(win: Tensor, difference: Tensor) -> float:
    """The win rate at equal length, as AlpacaEval 2 estimates it (without its term for a prompt's difficulty).

    win ~ σ(θ + φ tanh(Δ/std Δ)) by logistic regression, Newton's method with a touch of ridge; σ(θ). win: (n,) in [0, 1].
    """
    scale = difference.std().clamp(min=1e-9)
    x = torch.stack([torch.ones_like(win), torch.tanh(difference / scale)], 1)
    weights = torch.zeros(2, dtype=win.dtype)
    for _ in range(30):
        p = torch.sigmoid(x @ weights)
        hessian = x.T @ (x * (p * (1 - p))[:, None]) + 1e-3 * torch.eye(2, dtype=win.dtype)
        weights = weights + torch.linalg.solve(hessian, x.T @ (win - p) - 1e-3 * weights)
    return torch.sigmoid(weights[0]).item()


@torch.no_grad()
def summed_logps(model: Path, examples: list[Example]) -> Tensor:
    """log π(response | prompt) of each example, nats, (n,)."""
    policy = ResponseLogProbs(transformers.LlamaForCausalLM.from_pretrained(model, dtype=torch.float32))
    policy.use_layout("padded")
    parts = [policy(data.padded_batch(examples[i : i + 128]))["logp"] for i in range(0, len(examples), 128)]
    return torch.cat(parts)


# ---- the command line ------------------------------------------------------------------------------------------------

COMMANDS = {"build": (Building, build), "judge": (Judging, print_judgement)}


def main(argv: list[str] | None = None):
    """The command line as a function. A user error ends with a message and exit code 2."""
    torch.set_num_threads(1)  # models as small as these are slower with more
    run = functools.partial(data.commands, prog="tests/tools/toy.py", text=__doc__, table=COMMANDS)
    return data.command_line(run, argv)


if __name__ == "__main__":
    main()
