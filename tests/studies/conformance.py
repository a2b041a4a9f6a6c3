"""Does a trainer compute what the papers say? A yardstick: any trainer beside the method on one screen, tests/textbook.py.

    python tests/studies/conformance.py                     # this trainer: equal everywhere
    python tests/studies/conformance.py --trainer trl       # where trl is installed; or simpo, see adapter_simpo.py
    python tests/studies/conformance.py --trainer mine.py   # an adapter of your own; adapter_plainpo.py is a short one

Every trainer gets the same tiny Llama with a chat template, rows, order and settings. What it does is seen from outside: hooks
of torch.optim read gradients and weights at every step. What it should do is the textbook's: one response at a time, without
padding or microbatches, in float64, with the loss function of losses.py.

An adapter is a file with VERSION, a text; TRAINERS, {name: objectives as losses.py writes them}; and `train(case)`, which
trains as `Case` says and returns what it has logged of each step: a dictionary with "loss", "reward_chosen", "reward_rejected",
"reward_margin" and "reward_accuracy", as far as it has them. An exception of any kind says that it cannot. It may have TOKENS,
more ways to choose the tokens that are scored, and MISMATCH, the row whose completion KTO's KL is measured on (1: the next).
"""

import argparse
import contextlib
import importlib.util
import io
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import forked  # noqa: E402
import templates  # noqa: E402
import textbook  # noqa: E402
import torch  # noqa: E402
from miniature import markdown  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM  # noqa: E402

import data  # noqa: E402
from losses import parse_objective  # noqa: E402

BATCH, STEPS, LR = 4, 8, 1e-3
WITHIN = 3600  # seconds, for a check, which is several trainings
BOUND = 1e-5  # of losses, relative to the size of a row's, and of gradients in fp32
LEARNT = 1e-3  # the same after steps of Adam, which divides by the size of a gradient, however small
BF16 = 0.1  # relative, of a gradient


@dataclass
class Case:
    """What a trainer is asked to do: one epoch over `rows`, in their order. No clipping, no weight decay, AdamW otherwise."""

    trainer: str  # of the adapter's TRAINERS
    objective: str
    model: str  # folder, with tokenizer
    rows: list[dict]  # prompt: messages; chosen, rejected: texts. Unpaired: prompt, completion, label
    out: str  # empty folder, but for a run that is resumed
    batch_size: int = BATCH  # rows of an optimizer step, all processes together
    accumulation: int = 1  # microbatches of a step on each process
    lr: float = LR  # the highest; the schedule is the trainer's own
    bf16: bool = False
    max_length: int = 1024  # tokens of prompt and response
    save_every: int = 0  # steps
    resume: bool = False

    def batches(self) -> list[list[dict]]:
        return [self.rows[i : i + self.batch_size] for i in range(0, len(self.rows), self.batch_size)]


@dataclass
class Outcome:
    """What came of a case, in a trainer or in the textbook; of each step, but for the weights. Tensors in float64, by name."""

    logs: list[dict] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Finding:
    """difference: from what is right, at most `bound` where equal; None where nothing is right or wrong, or known."""

    trainer: str
    objective: str
    check: str
    difference: float | None
    bound: float = BOUND
    said: str = ""

    @property
    def wrong(self) -> bool:
        return self.said.startswith("cannot") if self.difference is None else not self.difference <= self.bound

    @property
    def verdict(self) -> str:
        if self.difference is None:
            return self.said
        text = f"**differs by {self.difference:.1e}**" if self.wrong else "equal"
        return f"{text} ({self.said})" if self.said else text


# ---- what the trainer does, seen from outside ------------------------------------------------------------------------


class Killed(BaseException):
    """Ends a trainer as a signal would."""


def observed(adapter: ModuleType, case: Case, kill_at: int | None = None) -> Outcome:
    """Train; the optimizer's hooks record. kill_at: the step before which it is killed."""
    initial, seen, names = initial_weights(case.model), Outcome(), {}

    def before(optimizer, *_) -> None:
        if len(seen.rates) + 1 == kill_at:
            raise Killed
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if not names:
            names.update({p: f"{i}" if case.resume else name_of(whole(p), initial) for i, p in enumerate(parameters)})
        seen.rates.append(optimizer.param_groups[0]["lr"])
        seen.gradients.append({names[p]: whole(p.grad) for p in parameters if p.grad is not None})

    def after(optimizer, *_) -> None:
        seen.weights = {name: whole(p) for p, name in names.items()}

    hooks = (register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(Killed):
        try:
            seen.logs = adapter.train(case)
        finally:
            for hook in hooks:
                hook.remove()
    return seen


def whole(x: Tensor) -> Tensor:
    x = x.full_tensor() if hasattr(x, "full_tensor") else x  # a shard's
    return x.detach().to(torch.float64, copy=True)


def name_of(weight: Tensor, initial: dict[str, Tensor]) -> str:
    """Of the initial weights the one with these values; no two are equal."""
    for name, w in initial.items():
        if w.shape == weight.shape and torch.allclose(w, weight, rtol=0.01):
            return name
    raise ValueError(f"before the first step a weight of shape {tuple(weight.shape)} is none of the model's")


def initial_weights(folder: str) -> dict[str, Tensor]:
    return {name: whole(p) for name, p in AutoModelForCausalLM.from_pretrained(folder).named_parameters()}


# ---- what it should do -----------------------------------------------------------------------------------------------


def expected(case: Case, rates: list[float], mismatch: int, ids: Callable) -> Outcome:
    """The textbook's way through a case, with the learning rates that the trainer had.

    ids: (tokenizer, row) → prompt and responses, the tokens of which are scored.
    """
    objective, tokenizer, out = parse_objective(case.objective), AutoTokenizer.from_pretrained(case.model), Outcome()
    policy, reference = (AutoModelForCausalLM.from_pretrained(case.model).double() for _ in range(2))
    parameters = dict(policy.named_parameters())
    optimizer = torch.optim.AdamW(parameters.values(), weight_decay=0.0)
    for lr, batch in zip(rates, case.batches()):
        examples = [ids(tokenizer, row) for row in batch]
        labels = [[row["label"]] if "label" in row else [True, False] for row in batch]
        lengths = [[len(r) for r in responses] for _, responses in examples]
        others = [(prompt, examples[(i + mismatch) % len(batch)][1]) for i, (prompt, _) in enumerate(examples)]
        logp = scores(policy, examples)
        with torch.no_grad():
            inputs = {"len": torch.tensor(lengths), "label": torch.tensor(labels), "ref": scores(reference, examples)}
            if objective.needs("logp_kl"):
                inputs |= {"logp_kl": scores(policy, others).flatten(), "ref_kl": scores(reference, others).flatten()}
        optimizer.zero_grad()
        losses = objective.row_losses({"logp": logp}, inputs, [0])
        losses.mean().backward()
        reward = objective.reward(logp.detach(), inputs["ref"], inputs["len"])
        size = losses.abs().mean()  # of a row's loss: SimPER's have both signs, and their mean is near zero
        out.logs.append({"loss": losses.mean().item(), "size": size.item()} | means_of(reward, inputs["label"]))
        out.gradients.append({name: whole(p.grad) for name, p in parameters.items()})
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
    out.weights = {name: whole(p) for name, p in parameters.items()}
    return out


def scores(model: torch.nn.Module, examples: list[tuple[list[int], list[list[int]]]]) -> Tensor:
    """log π of every response, (examples, responses)."""
    return torch.stack([torch.stack([textbook.logp(model, prompt, r) for r in responses]) for prompt, responses in examples])


def means_of(reward: Tensor, label: Tensor) -> dict[str, float]:
    """Rewards of a batch, (rows, responses); the accuracy counts a tie as one half."""
    means = {"reward_chosen": reward[label].mean().item(), "reward_rejected": reward[~label].mean().item()}
    if reward.shape[1] == 2:
        margin = reward[:, 0] - reward[:, 1]
        means |= {"reward_margin": margin.mean().item(), "reward_accuracy": (0.5 + 0.5 * margin.sign()).mean().item()}
    return means


def ids_of(tokenizer, row: dict, ending: Callable = lambda r: r) -> tuple[list[int], list[list[int]]]:
    """Prompt and responses as the textbook has them. ending: what becomes of a response."""
    answers = [row["completion"]] * 2 if "completion" in row else [row["chosen"], row["rejected"]]
    messages = {"prompt": row["prompt"], "chosen": answers[0], "rejected": answers[1]}
    prompt, *responses = textbook.token_ids(tokenizer, messages)
    return prompt, [ending(r) for r in responses[: 1 if "completion" in row else 2]]


def behind(tokenizer) -> list[int]:
    """What the template writes behind the terminator."""
    ids = tokenizer.apply_chat_template([{"role": "assistant", "content": "x"}], return_dict=False)
    return ids[len(ids) - ids[::-1].index(tokenizer.eos_token_id) :]


def more_scored(tokenizer, row: dict, start: int):
    prompt, responses = ids_of(tokenizer, row)
    return prompt[:start], [prompt[start:] + r for r in responses]


def header_too(tokenizer, row: dict):
    return more_scored(tokenizer, row, len(tokenizer.apply_chat_template(row["prompt"], return_dict=False)))


TOKENS = {  # the first is right
    "the response and its terminator, once": ids_of,
    "no terminator": lambda t, row: ids_of(t, row, lambda r: r[:-1]),
    "also what the template writes behind it": lambda t, row: ids_of(t, row, lambda r: r + behind(t)),
    "the terminator twice": lambda t, row: ids_of(t, row, lambda r: r + r[-1:]),
    "also what the template writes behind it, and the terminator again":
        lambda t, row: ids_of(t, row, lambda r: r + behind(t) + r[-1:]),
    "also the header": header_too,
    "also the prompt": lambda t, row: more_scored(t, row, 1),
}  # fmt: skip
CUTS = {  # of a prompt and a pair of responses, of which the longer is n tokens too long
    "responses lose their end": lambda prompt, responses, n: (prompt, [r[: max(map(len, responses)) - n] for r in responses]),
    "the prompt loses its start": lambda prompt, responses, n: (prompt[n:], responses),
    "the prompt loses its end": lambda prompt, responses, n: (prompt[: len(prompt) - n], responses),
}


# ---- how far they are apart ------------------------------------------------------------------------------------------


def apart(found: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """Relative distance of all tensors together."""
    square = sum((found.get(name, torch.zeros(())) - x).square().sum() for name, x in right.items())
    return (square / sum(x.square().sum() for x in right.values())).sqrt().item()


def worst(found: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    return max(apart(found, {name: x}) for name, x in right.items())


def learnt_apart(found: Outcome, right: Outcome, initial: dict[str, Tensor]) -> float:
    """`apart`, of what the weights have moved; without those with a gradient near zero in step 1, in which Adam moves them by
    lr·g/(|g| + 1e-8), so that rounding says where to."""
    sure = {name: g.abs() > 1e-6 for name, g in right.gradients[0].items()}
    moved = [{name: (w - initial[name]) * sure[name] for name, w in of.weights.items()} for of in (found, right)]
    return apart(*moved)


def way_of(gradient: dict[str, Tensor], ways: dict[str, dict[str, Tensor]]) -> str:
    """The name of the first way that has this gradient."""
    for name, way in ways.items():
        if apart(gradient, way) < BOUND:
            return name
    return f"none of {len(ways)} known ways"


class Checks:
    """Of a trainer. Each method is a check of one objective, or of several things; it yields the last fields of a Finding."""

    def __init__(self, adapter: ModuleType, trainer: str, folder: Path):
        self.adapter, self.trainer, self.folder = adapter, trainer, folder
        self.mismatch = getattr(adapter, "MISMATCH", 1)
        self.ways = TOKENS | getattr(adapter, "TOKENS", {})
        self.ids = ids_of  # what it scores, where that is known

    def case(self, objective: str, count: int, side: str = "right", **more) -> Case:
        rows = json.loads((self.folder / "rows.json").read_text())[:count]
        if parse_objective(objective).unpaired:
            sides = ("chosen", "rejected")
            rows = [{"prompt": r["prompt"], "completion": r[sides[i % 2]], "label": i % 2 == 0} for i, r in enumerate(rows)]
        return Case(self.trainer, objective, str(self.folder / side), rows, tempfile.mkdtemp(dir=self.folder), **more)

    def right(self, case: Case, rates: list[float], ids: Callable | None = None) -> Outcome:
        return expected(case, rates, self.mismatch, ids or self.ids)

    def both(self, case: Case) -> tuple[Outcome, Outcome]:
        found = observed(self.adapter, case)
        return found, self.right(case, found.rates)

    def gap(self, case: Case, step: int = 0) -> float:
        """Between the gradients of a step; 1 where the trainer took no such step."""
        found = observed(self.adapter, case).gradients
        right = self.right(case, [case.lr] * len(case.batches())).gradients
        return apart(found[step], right[step]) if len(found) == len(right) else 1.0

    # of every objective

    def steps(self, objective: str) -> Iterator:
        case = self.case(objective, BATCH * STEPS)
        found, right = self.both(case)
        yield "loss, step 1", abs(found.logs[0]["loss"] - right.logs[0]["loss"]) / right.logs[0]["size"]
        yield "gradient, step 1", apart(found.gradients[0], right.gradients[0])
        yield "its worst tensor", worst(found.gradients[0], right.gradients[0]), 10 * BOUND
        if len(found.rates) == STEPS:
            yield f"weights, step {STEPS}", learnt_apart(found, right, initial_weights(case.model)), LEARNT
        else:
            yield f"weights, step {STEPS}", 1.0, LEARNT, f"{len(found.rates)} steps"

    def accumulated(self, objective: str) -> Iterator:
        """The gradient of step 2, as rows weigh differently only where policy and reference do."""
        for n in (2, 4):
            case = self.case(objective, 2 * BATCH, accumulation=n)
            yield f"gradient, step 2, {n} microbatches", self.gap(case, step=1), LEARNT

    def settings(self, objective: str) -> Iterator:
        """Each number of the call becomes another one: does the second step's gradient follow?"""
        differences, ignored = {"": 0.0}, []
        for name, value in re.findall(r"(\w+)=([\d.e-]+)", objective):
            changed = objective.replace(f"{name}={value}", f"{name}={1.5 * float(value) or 0.2}")
            case = self.case(changed, 2 * BATCH)
            found, right = self.both(case)
            differences[name] = apart(found.gradients[1], right.gradients[1])
            unchanged = self.right(replace(case, objective=objective), found.rates)
            if apart(found.gradients[1], unchanged.gradients[1]) < LEARNT < differences[name]:
                ignored.append(name)
        yield "settings", max(differences.values()), LEARNT, f"{', '.join(ignored)} is not read" if ignored else ""

    # of every trainer, with the first of its objectives

    def tokens(self, objective: str) -> Iterator:
        gradient, ways = self.explained(self.case(objective, 1, batch_size=1), self.ways)
        first = next(iter(ways.values()))
        yield "tokens scored", apart(gradient, first), BOUND, way_of(gradient, ways)

    def truncation(self, objective: str) -> Iterator:
        """A row that is five tokens too long, beside one that is not: which way to cut explains the gradient?"""
        case = self.case(objective, 2, batch_size=2)
        tokenizer = AutoTokenizer.from_pretrained(case.model)

        def size(row: dict) -> int:
            prompt, responses = self.ids(tokenizer, row)
            return len(prompt) + max(map(len, responses))

        case.rows.sort(key=size)
        case.max_length = size(case.rows[1]) - 5
        cuts = {name: lambda t, row, cut=cut: cut(*self.ids(t, row), max(0, size(row) - case.max_length))
                for name, cut in CUTS.items()}  # fmt: skip
        gradient, ways = self.explained(case, cuts)
        ways["the row is left out"] = self.right(replace(case, rows=case.rows[:1]), [0.0]).gradients[0]
        yield "a row too long", None, BOUND, way_of(gradient, ways)

    def explained(self, case: Case, ways: dict[str, Callable]) -> tuple[dict, dict[str, dict]]:
        """The trainer's gradient of step 1, and what it is where tokens are scored in each of these ways."""
        gradient = observed(self.adapter, case).gradients[0]
        return gradient, {name: self.right(case, [0.0], ids).gradients[0] for name, ids in ways.items()}

    def padding(self, objective: str) -> Iterator:
        for side in ("left", "right"):
            yield f"padding on the {side}", self.gap(self.case(objective, BATCH, side))

    def last_batch(self, objective: str) -> Iterator:
        for n, name in ((1, ""), (2, ", 2 microbatches")):
            difference = self.gap(self.case(objective, 2 * BATCH - 1, accumulation=n, lr=1e-12), step=1)
            yield f"last batch, a row short{name}", difference, BOUND, "left out" * (difference == 1.0)

    def processes(self, objective: str) -> Iterator:
        for name, rows in (("two processes", BATCH), ("two processes, last batch, a row short", 2 * BATCH - 1)):
            yield name, max(forked.ranks(2, self.gap, self.case(objective, rows, lr=1e-12), -1, within=WITHIN))

    def logged(self, objective: str) -> Iterator:
        found, right = self.both(self.case(objective, BATCH * STEPS, accumulation=2))
        names = [name for name in right.logs[0] if name in found.logs[0]]
        for check, steps, bound in (("logged, before a step", 1, 10 * BOUND), ("logged, all steps", STEPS, LEARNT)):
            gaps = {
                name: max(abs(a[name] - b[name]) for a, b in zip(found.logs[:steps], right.logs[:steps], strict=True))
                for name in names
            }
            said = [name for name in names if gaps[name] > bound]
            yield check, max(gaps.values()), bound, ", ".join(said or names)

    def killed(self, objective: str) -> Iterator:
        case = self.case(objective, BATCH * STEPS, save_every=STEPS // 2)
        other = replace(case, out=f"{case.out}-killed")
        through = observed(self.adapter, case).weights
        observed(self.adapter, other, kill_at=STEPS // 2 + 2)
        resumed = observed(self.adapter, replace(other, resume=True))
        difference = apart(resumed.weights, dict(zip(resumed.weights, through.values())))
        steps = len(resumed.rates)
        began_anew = steps != STEPS // 2
        yield "killed and resumed", 1.0 if began_anew else difference, 1e-7, f"{steps} steps from step {STEPS // 2}"

    def bf16(self, objective: str) -> Iterator:
        difference = self.gap(self.case(objective, BATCH, bf16=True))
        yield "gradient in bf16", difference, BF16, f"{difference:.1e}"


EACH = (Checks.steps, Checks.accumulated, Checks.settings)
ONCE = (Checks.tokens, Checks.truncation, Checks.padding, Checks.last_batch, Checks.processes, Checks.logged, Checks.killed,
        Checks.bf16)  # fmt: skip


# ---- the report ------------------------------------------------------------------------------------------------------


def build(folder: Path) -> None:
    """In `folder`: a tiny Llama, no two weights of which are equal, with padding on the right and on the left; and the rows."""
    tokenizer = templates.family("smollm2")
    torch.manual_seed(0)
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.2)
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape, **special))
    for p in model.parameters():
        if p.dim() == 1:
            torch.nn.init.normal_(p, 1.0, 0.1)
    for side in ("right", "left"):
        tokenizer.save_pretrained(folder / side)
        file = folder / side / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"padding_side": side}))
        model.save_pretrained(folder / side)
    toy = map(json.loads, (ROOT / "tests/toy/pairs.jsonl").read_text().splitlines())
    by_prompt = {row["prompt"][0]["content"]: row for row in toy}  # KTO's mismatched completions need different prompts
    rows = []
    for i, row in enumerate(by_prompt.values()):
        chosen = " and ".join([row["chosen"]] * (1 + i % 3))  # lengths that differ
        rows.append({"prompt": row["prompt"], "chosen": chosen, "rejected": row["rejected"]})
    (folder / "rows.json").write_text(json.dumps(rows[: BATCH * STEPS]))


def load_adapter(name: str) -> ModuleType:
    """An adapter of this folder, or a file."""
    file = Path(name) if name.endswith(".py") else Path(__file__).with_name(f"adapter_{name}.py")
    if not file.exists():
        known = sorted(path.stem.removeprefix("adapter_") for path in Path(__file__).parent.glob("adapter_*.py"))
        raise data.UserError(f"trainer is {name!r}; known are {', '.join(known)}, or a file of your own")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        raise data.UserError(f"{file}: {error}; install it, or name another --trainer") from error
    return module


def run_check(checks: Checks, check: Callable, objective: str) -> list[Finding]:
    findings = []
    try:
        for found in check(checks, objective):
            findings.append(Finding(checks.trainer, objective, *found))
    except (Exception, SystemExit) as error:  # of any kind: the trainer's own
        name = check.__name__.replace("_", " ")
        last_line = f"{error}".strip().rpartition("\n")[2]
        findings.append(Finding(checks.trainer, objective, name, None, BOUND, f"cannot: {last_line}"))
    return findings


def run_all(adapter: ModuleType, wanted: str = "") -> tuple[list[Finding], list[Finding]]:
    """The checks of each trainer and of each objective, every one in a process of its own; only of those whose name holds
    `wanted`."""
    todo, of_trainers, of_objectives = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder))
        for trainer, objectives in adapter.TRAINERS.items():
            checks = Checks(adapter, trainer, Path(folder))
            some = [text for text in objectives if wanted in f"{trainer}: {text}"]
            todo += [(of_trainers, checks, check, text) for text in some[:1] for check in ONCE]
            todo += [(of_objectives, checks, check, text) for text in some for check in EACH]
        if not todo:
            raise data.UserError(f"only is {wanted!r}; there are {', '.join(adapter.TRAINERS)}, with the objectives of each")
        for findings, checks, check, text in data.progress(todo, "conformance", "checks", len(todo)):
            (found,) = forked.ranks(0, run_check, checks, check, text, within=WITHIN)
            findings += found
            if check is Checks.tokens:
                checks.ids = checks.ways.get(found[0].said, ids_of)  # that difference is found once, not in every check
    return of_trainers, of_objectives


def table(findings: list[Finding], row: Callable, column: Callable) -> str:
    rows, columns = {}, dict.fromkeys(map(column, findings))
    for f in findings:
        rows.setdefault(row(f), {})[column(f)] = f.verdict
    lines = [[name, *(cells.get(column, "") for column in columns)] for name, cells in rows.items()]
    return markdown([["", *columns], ["---"] * (1 + len(columns)), *lines])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainer", default="plainpo", help="an adapter of this folder, or a file")
    parser.add_argument("--only", default="", help="only trainers and objectives whose name holds this")
    return data.command_line(lambda argv: report(parser.parse_args(argv)), argv)


def report(args: argparse.Namespace) -> int:
    """Exit code 1 if anything is not equal."""
    adapter = load_adapter(args.trainer)
    of_trainers, of_objectives = run_all(adapter, args.only)
    print(table(of_objectives, lambda f: f"{f.trainer}, `{f.objective}`", lambda f: f.check))
    print(table(of_trainers, lambda f: f.check, lambda f: f.trainer))
    findings = of_trainers + of_objectives
    wrong = [f for f in findings if f.wrong]
    print(f"{args.trainer} {adapter.VERSION}, torch {torch.__version__}: {len(findings)} checks, {len(wrong)} are not equal.")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
