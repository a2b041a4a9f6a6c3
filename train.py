"""Train a language model on preferences.

    python train.py                                                        # the embedded world: no download, no GPU
    python train.py --model MODEL --dataset PAIRS.jsonl --objective "simpo(beta=2.5, gamma=0.5)" --lr 1e-6
    python train.py settings.yaml --lr 5e-7                                # a file of settings; the command line wins

Reads top to bottom: settings → objective → one step → prepare → the loop → finish. `train()` is the whole run; what stands
after it are the parts it calls by name: model and rows, evaluation, the journal, accounting, the embedded world. Rows are
preference pairs, or single completions for unpaired objectives. All losses are means over the rows of the whole optimizer
batch, so the gradient of a step does not depend on how the batch is cut into microbatches.

Shape letters: n examples · k responses of each, 2 for pairs and 1 else.
"""

import ast
import contextlib
import functools
import hashlib
import importlib.util
import itertools
import json
import math
import os
import platform
import re
import resource
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from filelock import FileLock
from torch import Tensor
from tqdm import tqdm

import data
import distributed as dist
from data import Example, UserError, setting
from logprobs import ResponseLogProbs, check_head, completions, to_device
from losses import OBJECTIVES, wpo_weight

# ---- settings --------------------------------------------------------------------------------------------------------


@dataclass
class Settings(data.Reading):
    model: str = setting("tiny", 'folder or hub name of a causal language model; "tiny" builds one for the embedded world')
    dataset: str = setting("tiny", "file, folder or hub name of preferences, with an optional slice: pairs.jsonl[:1000]")
    eval_dataset: str | None = setting(None, "held-out preferences; without it, eval_size rows are taken out of dataset")
    eval_size: int = setting(200, "rows held out of dataset for evaluation (0: none)")
    objective: str = setting("simpo(beta=2.0, gamma=1.0)", "a call of a function of losses.py, or a weighted sum of such calls")
    out: str | None = setting(None, "output folder; without it, a fresh one under runs/")
    overwrite: bool = setting(False, "delete what is in out")
    resume: bool = setting(False, "continue the run in out from its newest complete checkpoint")
    lr: float | None = setting(None, "peak learning rate; without it 1e-6, or 2e-4 for the embedded world")
    batch_size: int = setting(32, "rows of one optimizer step (pairs, or completions when unpaired), all ranks together")
    tokens_per_microbatch: int = setting(2048, "token budget of one forward and backward pass")
    layout: str = setting("packed", "packed (the prompt computed once, no padding) or padded (the textbook batch)")
    epochs: int = setting(1, "passes over the training rows")
    max_steps: int | None = setting(None, "stop after this many optimizer steps; the schedule ends there")
    warmup_ratio: float = setting(0.1, "share of the steps in which the learning rate rises to lr")
    weight_decay: float = setting(0.0, "AdamW weight decay, on matrices only")
    max_grad_norm: float = setting(1.0, "gradients are scaled to at most this global norm (0: never)")
    replays: int = setting(1, "LoRR: optimizer steps in a row on each batch (its paper: 3)")
    reset_alpha: float = setting(1.0, "LoRR: after a step θ ← αθ + (1−α)θ⁰ in reset_modules (its paper: 0.5; 1: no reset)")
    reset_modules: str = setting("down_proj", "parts of parameter names, commas between, that reset_alpha acts on")
    wpo: bool = setting(False, "WPO: a row's loss counts for less where its responses are not what the policy would say")
    sync_every: int = setting(0, "TR-DPO: the reference moves after every so many steps (0: never)")
    sync_alpha: float = setting(0.6, "TR-DPO: how far it moves, reference ← α policy + (1−α) reference")
    sft_weight: float = setting(0.0, "LoRR: weight that the likelihood of the chosen has at the last replay (its paper: 0.5)")
    dtype: str = setting("auto", "arithmetic: fp32, bf16 (autocast; weights stay fp32) or auto (bf16 where it is in hardware)")
    export_dtype: str = setting("auto", "weights of out/model: fp32, bf16, or auto (as the model came)")
    gradient_checkpointing: bool = setting(False, "recompute activations in backward: less memory, a third more work")
    eval_every: int = setting(0, "evaluate every so many steps (always before and after)")
    save_every: int = setting(0, "write a checkpoint every so many steps (always when stopped by SIGTERM or Ctrl-C)")
    keep: int = setting(2, "complete checkpoints to keep")
    samples: int = setting(4, "held-out prompts whose greedy completions are recorded before, at evaluations and after")
    sample_tokens: int = setting(64, "length limit of those completions")
    cache: str = setting("~/.cache/plainpo", "folder for reference log-probs, found again by a hash of all they depend on")
    compile: bool = setting(False, "torch.compile the decoder's blocks (packed layout; on CPUs with a C++ compiler)")
    log_to: str | None = setting(None, "also send the metrics to tensorboard or wandb, if installed")
    device: str = setting("auto", "cpu, cuda, or auto")
    recipe: str | None = setting(None, "a published run, such as gemma-2-9b-it-simpo: model, data, objective, lr, lengths")
    annotator_noise: float = setting(0.1, "embedded world: error (standard deviation) of the annotator about a quality")
    length_bias: float = setting(0.0, "embedded world: what the annotator adds to a response's quality per word")
    world: str = setting("plain", f"embedded world: who taught the start, {' or '.join(data.WORLDS)} (likely answers are bad)")
    mesh: str | None = setting(None, "under torchrun: copies x parts, such as 2x4; without it one copy cut over all ranks")
    trust_remote_code: bool = setting(False, "allow a model folder to bring Python code that is then run")
    GROUPS = {  # of --help
        "model and data": "model dataset eval_dataset eval_size recipe trust_remote_code",
        "objective": "objective wpo sync_every sync_alpha replays reset_alpha reset_modules sft_weight",
        "schedule": "lr batch_size epochs max_steps warmup_ratio weight_decay max_grad_norm",
        "memory and speed": "tokens_per_microbatch layout dtype gradient_checkpointing compile device mesh",
        "output": "out overwrite resume eval_every samples sample_tokens save_every keep export_dtype cache log_to",
        "embedded world": "annotator_noise length_bias world",
    }


def parse_settings(argv: list[str], kind: type[Settings] = Settings, prog: str = "train.py", text: str = __doc__) -> Settings:
    """A recipe, over it a YAML/JSON file (first argument), over both the command line: all as options, the last one wins."""
    file = Path(argv[0]) if argv and argv[0].endswith((".yaml", ".yml", ".json")) else None
    if file is not None:
        argv = [*_options_of(file, kind), *argv[1:]]
    name = data.parse(kind, argv, prog, text).recipe
    recipe = [f"--{key}={value}" for key, value in data.recipe(name).items()] if name else []
    s = data.parse(kind, [*recipe, *argv], prog, text)
    check_settings(s)
    if file is not None and s.overwrite and _is_inside(file, Path(s.out)):
        raise UserError(f"{file} lies in out {s.out}, where overwrite deletes; copy it to another place")
    return s


def _options_of(path: Path, kind: type) -> list[str]:
    """The settings of a file as options of the command line, each value as it is written there."""
    import yaml  # transformers brings it; YAML contains JSON

    def refuse(problem: str):
        raise UserError(f"{path}: {problem}")

    try:
        root = yaml.compose(path.read_text(encoding="utf-8-sig"), yaml.SafeLoader)
    except UnicodeDecodeError as error:
        refuse(f"is not UTF-8 text (byte {error.start}); save it as UTF-8")
    except (OSError, yaml.YAMLError, RecursionError) as error:
        refuse(f"cannot be read as settings ({error})")
    if not isinstance(root, yaml.MappingNode) or not root.value:
        refuse("holds no settings, which are lines of key: value")
    options, empty = {}, {f.name for f in fields(kind) if f.default is None}
    for name, node in root.value:
        items = node.value if isinstance(node, yaml.SequenceNode) else [node]
        plain = all(re.search(":(null|bool|int|float|str|timestamp|seq)$", x.tag) for x in (node, *items))
        if not plain or not all(isinstance(x, yaml.ScalarNode) for x in (name, *items)):
            refuse(f"line {name.start_mark.line + 1}: {str(name.value)[:80]}: a setting is one value, or a list of some")
        key = name.value.replace("-", "_")
        if key in options:
            refuse(f"{key} is there twice, again on line {name.start_mark.line + 1}")
        options[key] = ",".join(x.value for x in items)
        if any(x.tag.endswith(":null") for x in items):
            options[key] = None if key in empty else refuse(f"{key} has no value; give it one, or leave the line out")
    options = [f"--{key}={value}" for key, value in options.items() if value is not None]
    try:
        data.parse(kind, options, "train.py", "")
    except UserError as error:
        refuse(str(error))
    return options


def _is_inside(path: Path, folder: Path) -> bool:
    return folder.resolve() in (path.resolve(), *path.resolve().parents)


CHOICES = {"layout": ("packed", "padded"), "dtype": ("auto", "fp32", "bf16"), "export_dtype": ("auto", "fp32", "bf16"),
           "log_to": ("tensorboard", "wandb"), "world": tuple(data.WORLDS)}  # fmt: skip
AT_LEAST_1 = ("batch_size", "tokens_per_microbatch", "epochs", "keep", "replays", "max_steps", "sample_tokens")
NOT_NEGATIVE = ("eval_size", "eval_every", "save_every", "weight_decay", "max_grad_norm", "samples", "seed", "annotator_noise",
                "sft_weight", "sync_every")  # fmt: skip
SHARES = ("warmup_ratio", "max_drop_fraction", "reset_alpha", "sync_alpha")


def check_settings(s: Settings) -> None:
    """UserError naming the first setting, or pair of settings, that cannot be meant."""

    def refuse_unless(holds: bool, problem: str) -> None:
        if not holds:
            raise UserError(problem)

    for name, accepted in CHOICES.items():
        if getattr(s, name) is not None:
            data.refuse_unless_known(name, getattr(s, name), accepted)
    for names, holds, said in (
        (AT_LEAST_1, lambda x: x >= 1, "it must be at least 1"),
        (NOT_NEGATIVE, lambda x: 0 <= x < math.inf, "it must not be negative"),
        (SHARES, lambda x: 0 <= x <= 1, "it is a share, from 0 to 1"),
        (("lr",), lambda x: 0 < x <= 1, "a learning rate is above 0 and at most 1; AdamW moves every weight by about as much"),
    ):
        for name in names:
            value = getattr(s, name)
            refuse_unless(value is None or holds(value), f"{name} is {value}; {said}")
    longest_prompt = s.max_prompt_length if s.max_prompt_length is not None else s.max_length * 7 // 8
    refuse_unless(
        s.max_length >= 2 and 1 <= longest_prompt < s.max_length,
        f"max_length {s.max_length} with max_prompt_length {longest_prompt} leaves no room for a prompt and a response; "
        "raise max_length or lower max_prompt_length",
    )
    installed = s.log_to is None or importlib.util.find_spec(s.log_to) is not None
    refuse_unless(installed, f"log_to {s.log_to}: it is not installed (pip install {s.log_to})")
    refuse_unless(not (s.overwrite and s.resume), "overwrite and resume exclude each other")
    known_out = s.out is not None or not (s.overwrite or s.resume)
    refuse_unless(known_out, "overwrite and resume need --out, the folder of the earlier run")
    refuse_unless(
        (s.model == "tiny") == (s.dataset == "tiny"),
        'the embedded world needs both model "tiny" and dataset "tiny"; give a real model and a real dataset',
    )


# ---- the objective ---------------------------------------------------------------------------------------------------


class Objective(NamedTuple):
    """A function of losses.py and the settings given for it; what it needs was read off its signature there."""

    loss: Callable[..., Tensor]
    given: dict

    @property
    def name(self) -> str:
        return self.loss.__name__

    def needs(self, prefix: str) -> bool:
        return any(t.startswith(prefix) for t in self.loss.tensors)

    @property
    def also(self) -> tuple[str, ...]:
        """What the policy's pass has to give besides log-probs: names of logprobs.ResponseLogProbs.forward."""
        return ("kl",) * self.needs("kl_") + ("head",) * self.needs("head_")

    @property
    def unpaired(self) -> bool:
        return "desirable" in self.loss.tensors

    @property
    def responses(self) -> int:
        """Responses of an example that are scored: 2, or 1 for unpaired and chosen-only objectives."""
        return 2 if "logp_l" in self.loss.tensors else 1

    @property
    def coupled(self) -> bool:
        """Whether the rows of a batch depend on each other, so that the loss needs the whole batch at once."""
        switch = self.loss.coupled
        return switch if isinstance(switch, bool) else bool({**self.loss.settings, **self.given}[switch])

    def __call__(self, tensors: dict[str, Tensor], seed: list[int]) -> Tensor:
        """Loss per row; functions that draw at random get a generator that depends on `seed` alone."""
        more = {}
        if self.loss.random:
            number = sum(x * 1_000_003**i for i, x in enumerate(seed)) % 2**63
            more["generator"] = torch.Generator().manual_seed(number)
        return self.loss(*(tensors[t] for t in self.loss.tensors), **self.given, **more)

    def __str__(self) -> str:
        """The call; of a sum its name, which is the sum of its calls. What is printed is understood again."""
        settings = ", ".join(f"{k}={v!r}" for k, v in self.given.items())
        return f"{self.name}({settings})" if self.name in OBJECTIVES else self.name


def weighted_sum(terms: list[tuple[float, Objective]]) -> Objective:
    """Σ weight · loss, row by row, as one objective: it needs what any term needs and is coupled where one is; its reward is
    the first term's, without the weight."""
    tensors = tuple(dict.fromkeys(t for _, term in terms for t in term.loss.tensors))

    def loss(*values: Tensor, **generator: torch.Generator) -> Tensor:
        named = dict(zip(tensors, values))
        drawn = lambda term: generator if term.loss.random else {}  # noqa: E731
        return sum(w * t.loss(*(named[x] for x in t.loss.tensors), **t.given, **drawn(t)) for w, t in terms)

    first = terms[0][1]
    loss.__name__ = " + ".join(f"{weight!r}*{term}" for weight, term in terms)
    loss.tensors, loss.settings = tensors, {}
    loss.random, loss.coupled = any(t.loss.random for _, t in terms), any(t.coupled for _, t in terms)
    loss.reward = functools.partial(first.loss.reward, **first.given)
    return Objective(loss, {})


def parse_terms(node: ast.expr, weight: float = 1.0) -> list[tuple[float, str, dict]]:
    """'2*a(x=1) + b' → weight, name and arguments of each term. ValueError, or SyntaxError with a reason, for anything but
    sums, products with a number, and calls with named constants."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return parse_terms(node.left, weight) + parse_terms(node.right, weight)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        number, rest = (node.left, node.right) if isinstance(node.left, ast.Constant) else (node.right, node.left)
        factor = ast.literal_eval(number)
        if type(factor) not in (int, float) or not 0 < factor < 1e300 or not 0 < weight * factor < 1e300:
            raise SyntaxError("a weight is a finite number above 0")
        return parse_terms(rest, weight * factor)
    call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
    if not isinstance(call.func, ast.Name) or call.args or any(k.arg is None for k in call.keywords):
        raise ValueError
    given = {k.arg: ast.literal_eval(k.value) for k in call.keywords}
    if len(given) < len(call.keywords):
        raise SyntaxError("an argument is there twice")
    return [(weight, call.func.id, given)]


def parse_objective(text: str) -> Objective:
    """'simpo(beta=2.5, gamma=0.5)', 'simpo', or a sum such as '0.8*dpo(beta=0.1) + 0.2*bco_pair + sft' → Objective. Only names,
    constants, + and * are understood; nothing is run."""
    try:
        node = ast.parse(text.strip(), mode="eval").body
        terms = parse_terms(node)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError) as error:
        why = f" ({error.msg.partition(';')[0]})" if isinstance(error, SyntaxError) else ""
        raise UserError(
            f"objective is {text[:80]!r}{' …' * (len(text) > 80)}{why}; "
            'write it as a call with named constants, such as "simpo(beta=2.5, gamma=0.5)", or as a sum of such calls, '
            'such as "dpo(beta=0.1) + 0.5*sft"'
        ) from None
    terms = [(weight, named_objective(name, given)) for weight, name, given in terms]
    if len({term.unpaired for _, term in terms}) > 1:
        kinds = [", ".join(dict.fromkeys(t.name for _, t in terms if t.unpaired is kind)) for kind in (True, False)]
        raise UserError(f"objective: {kinds[0]} takes single completions, {kinds[1]} pairs; a sum takes one or the other")
    return weighted_sum(terms) if isinstance(node, ast.BinOp) else terms[0][1]


def named_objective(name: str, given: dict) -> Objective:
    """The function of losses.py with settings that it has, of the right kind."""
    if name not in OBJECTIVES:
        raise UserError(
            f"unknown objective {name[:80]!r}{data.did_you_mean(name, OBJECTIVES)}; known are {', '.join(OBJECTIVES)}"
        )
    defaults = OBJECTIVES[name].settings
    signature = f"its signature is {name}({', '.join(f'{k}={v!r}' for k, v in defaults.items())})"
    for key, value in given.items():
        if key not in defaults:
            raise UserError(f"objective {name} has no argument {key[:80]!r}{data.did_you_mean(key, defaults)}; {signature}")
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300
        fits = isinstance(value, type(defaults[key])) if isinstance(defaults[key], (bool, str)) else number
        if not fits and value is not defaults[key]:
            raise UserError(f"objective {name}: {key}={str(value)[:80]} is of the wrong kind or size; {signature}")
    return Objective(OBJECTIVES[name], given)


def try_objective(objective: Objective) -> None:
    """Call it once on small numbers, so that a value out of range is found before anything is loaded."""
    kinds = {"desirable": torch.tensor([True, False]), "len": torch.tensor([4, 5])}
    numbers = torch.tensor([-3.0, -4.0])
    try:
        objective({t: kinds.get(t.partition("_")[0], numbers) for t in objective.loss.tensors}, seed=[0])
    except ValueError as error:
        raise UserError(f"objective {objective}: {error}") from error


# ---- one step --------------------------------------------------------------------------------------------------------


class Sums(NamedTuple):
    """Sums over the responses of n examples, k each, and their labels; (n, k), nats, None where not needed."""

    length: Tensor  # tokens
    logp: Tensor | None = None
    ref: Tensor | None = None
    kl: Tensor | None = None
    head: Tensor | None = None  # of logp: the first tokens, as many as the row's shortest response has
    ref_head: Tensor | None = None  # of ref
    power: Tensor | None = None  # Σ_t log Σ_v π(v)²
    logp_mismatch: Tensor | None = None  # (n·k,): KTO's mismatched completions, under the policy
    ref_mismatch: Tensor | None = None  # (n·k,): and under the reference
    label: Tensor | None = None  # bool: chosen or desirable
    margin: Tensor | None = None  # (n,): score of chosen less score of rejected

    def at(self, rows: Tensor) -> "Sums":
        return Sums(*(None if x is None else x[rows] for x in self))

    def cpu(self) -> "Sums":
        return Sums(*(None if x is None else x.cpu() for x in self))

    def by_name(self) -> dict[str, Tensor]:
        """What a signature of losses.py may ask for. `old_*` is the policy as it is at the start of the step."""
        named = {"desirable": self.label, "logp_kl": self.logp_mismatch, "ref_kl": self.ref_mismatch, "margin": self.margin}
        sources = {"logp": self.logp, "len": self.length, "old": self.logp.detach()}
        sources |= {name: getattr(self, name) for name in ("ref", "kl", "head", "ref_head")}
        for name, x in sources.items():
            if x is not None:
                named |= {name: x, f"{name}_w": x[:, 0], f"{name}_l": x[:, -1]}
        return {name: x.flatten() for name, x in named.items() if x is not None}


@dataclass
class Rows:
    """What is trained on and what is held out, and what is known of both before the policy has learnt anything."""

    train: Sequence[Example]
    held_out: Sequence[Example]
    reports: dict[str, data.Report]  # what was kept and dropped, and why
    plan: list[list[int]] = field(default_factory=list)  # the rows of each optimizer step
    ref: dict[str, Tensor] = field(default_factory=dict)  # "ref" and, where asked for, "ref_head" of the training rows, (n, k)
    ref_mismatch: Sequence[Tensor] | None = None  # of each batch of the plan
    held_out_known: Sums | None = None
    held_out_start: Tensor | None = None  # (n, k) log-probs of the held-out rows under the start


@dataclass
class Run:
    """One training run: what it is made of, and the number of steps it has done."""

    s: Settings
    objective: Objective
    device: torch.device
    tokenizer: object
    policy: ResponseLogProbs
    rows: Rows
    origin: list[tuple[Tensor, Tensor]]  # LoRR: (parameter, its value at the start)
    lock: object = None  # as long as it is held, nobody else writes to the output folder
    given: dict = field(default_factory=dict)  # the settings as they were asked for, for the record
    world: Path | None = None  # folder of the embedded world
    optimizer: torch.optim.Optimizer | None = None
    before: list[str] = field(default_factory=list)  # the start's answers to the sample prompts
    same: dict = field(default_factory=dict)  # what must be equal for a run to go on from a checkpoint of this one
    step: int = 0
    ahead: list | None = None  # microbatches of the step that comes

    @property
    def bf16(self) -> bool:
        return uses_bf16(self.s, self.device)

    @property
    def also(self) -> tuple[str, ...]:
        """What each pass of the policy has to give besides log-probs."""
        return self.objective.also + ("power",) * self.s.wpo + ("ref",) * (self.s.sync_every > 0)

    def arithmetic(self):
        """bf16 autocast or nothing. One context spans one kind of pass, so weights are cast once in it."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else contextlib.nullcontext()

    def cut(self, examples: list[Example]) -> list[list[int]]:
        """Indices of the examples in each microbatch, cut by token count, as many for every rank: r takes r, r + ranks, …"""
        sizes = [data.tokens_of(e) for e in examples]
        return data.split_by_tokens(sizes, self.s.tokens_per_microbatch, dist.world_size())

    def microbatches(self, examples: list[Example]) -> list[tuple[list[int], data.Batch]]:
        """This rank's share of the examples: (indices, batch)."""
        mine, make = self.cut(examples)[dist.rank() :: dist.world_size()], data.LAYOUTS[self.s.layout]
        return [(part, make([examples[i] for i in part]).to(self.device)) for part in mine]


@torch.no_grad()
def log_probs(
    run: Run, examples: Sequence[Example], also: tuple[str, ...] = (), progress: str | None = None
) -> dict[str, Tensor]:
    """Summed log-probs of all responses, "logp", and what `also` names, without gradient: (n, k) each, on every rank."""
    rows, parts, k = [], [], len(examples[0].responses)
    batches = data.progress(_lazily(run, examples), progress or "", "batches", disable=progress is None or not dist.is_main())
    with run.arithmetic():
        for part, batch in batches:
            rows += part
            parts.append({name: x.view(len(part), k) for name, x in run.policy(batch, also).items()})
    return gathered(rows, parts, len(examples))


def gathered(rows: list[int], parts: list[dict[str, Tensor]], total: int) -> dict[str, Tensor]:
    """The sums of all ranks' rows from those of this one's microbatches; `rows` says which these are."""
    rows = torch.tensor(rows, dtype=torch.long)
    return {name: dist.gather_rows(rows, torch.cat([part[name] for part in parts]), total) for name in parts[0]}


def _lazily(run: Run, examples: Sequence[Example]) -> Iterator[tuple[list[int], data.Batch]]:
    """Microbatches of a whole dataset, made some hundred examples at a time, longest first within each."""
    for start in range(0, len(examples), 256):
        for part, batch in run.microbatches(examples[start : start + 256]):
            yield [start + i for i in part], batch


TRAINED = ("logp", "kl", "head")  # sums through which a loss reaches the weights


def row_losses(objective: Objective, sums: Sums, seed: list[int]) -> Tensor:
    """Loss per row (rows,), times its WPO weight where sums.power is there."""
    loss = objective(sums.by_name(), seed)
    if sums.power is None:
        return loss
    rows = (-1, 1) if objective.unpaired else sums.logp.shape
    return loss * wpo_weight(*(x.detach().reshape(rows) for x in (sums.logp, sums.power, sums.length)))


def coefficients(objective: Objective, sums: Sums, seed: list[int], sft: float = 0.0) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss per row (rows,) and the gradient of their sum with respect to every sum of TRAINED, (n, k) each.

    sft: weight of the SFT term, which is −logp/length (nats per token) of a chosen or desirable response, 0 of another.
    """
    leaves = {name: getattr(sums, name).detach().requires_grad_() for name in TRAINED if getattr(sums, name) is not None}
    if not len(sums.logp):  # a rank without rows in this microbatch
        return sums.logp.detach().flatten(), {name: x.detach() for name, x in leaves.items()}
    loss = row_losses(objective, sums._replace(**leaves), seed)
    if sft:
        term = -(leaves["logp"] / sums.length) * sums.label
        loss = loss + sft * (term.flatten() if objective.unpaired else term.sum(-1))
    grads = torch.autograd.grad(loss.sum(), list(leaves.values()), allow_unused=True, materialize_grads=True)
    return loss.detach(), dict(zip(leaves, grads))


def accumulate_gradients(
    run: Run, examples: list[Example], known: Sums, seed: list[int], batches=None, sft: float = 0.0
) -> tuple[Sums, Tensor]:
    """Put the gradient of the mean loss over `examples`, with the SFT term where `sft` > 0, into the policy's parameters.

    The gradient of a microbatch is Σ (∂L/∂logp) · ∂logp/∂θ. The factors ∂L/∂logp come from the microbatch itself, or, where the
    objective couples the rows, from a first pass that scores the whole batch without gradient. A coupled batch that is a
    single microbatch on every rank needs no first pass: its own log-probs are gathered and then differentiated.

    Args:
        known: what does not depend on the policy: lengths, reference, labels, mismatches.
        batches: run.microbatches(examples), if they were made ahead of time.
    Returns:
        the sums of the whole batch, and its loss per row; on every rank.
    """
    objective, n, k = run.objective, len(examples), known.length.shape[1]  # k responses per example
    batches, rows = batches or run.microbatches(examples), n * (k if objective.unpaired else 1)
    whole = None  # of a coupled batch: loss and factors of all its rows
    if objective.coupled and len(batches) > 1:
        whole = coefficients(objective, known._replace(**log_probs(run, examples, run.also)), seed, sft)
    scored, losses, parts = [i for part, _ in batches for i in part], [], []
    with run.arithmetic():
        for i, (part, batch) in enumerate(batches):
            dist.sync_gradients(run.policy, last=i == len(batches) - 1)
            sums = {name: x.view(len(part), k) for name, x in run.policy(batch, run.also).items()}
            parts.append({name: x.detach() for name, x in sums.items()})
            at = to_device(torch.tensor(part, dtype=torch.long), known.length.device)
            if objective.coupled and whole is None:
                whole = coefficients(objective, known._replace(**gathered(scored, parts, n)), seed, sft)
            if whole is None:
                loss, factors = coefficients(objective, known.at(at)._replace(**sums), seed, sft)
                losses.append({"loss": loss.view(len(part), k if objective.unpaired else 1)})
            else:
                factors = {name: x[at] for name, x in whole[1].items()}
            torch.autograd.backward([sums[name] for name in factors], [x / rows for x in factors.values()])
    loss = gathered(scored, losses, n)["loss"].flatten() if whole is None else whole[0]
    return known._replace(**gathered(scored, parts, n)), loss


def next_batch(run: Run) -> tuple[list[Example], Sums]:
    """The examples of the step that comes, and what is known of them before the policy is asked."""
    rows, at = run.rows, run.rows.plan[run.step]
    examples = [rows.train[i] for i in at]
    mismatch = None if rows.ref_mismatch is None else rows.ref_mismatch[run.step // run.s.replays]
    known = known_sums(examples, run.device, ref_mismatch=mismatch, **{name: x[at] for name, x in rows.ref.items()})
    if run.objective.needs("logp_kl"):
        known = known._replace(logp_mismatch=log_probs(run, mismatched(examples))["logp"].flatten())
    return examples, known


def step(run: Run) -> dict:
    """One optimizer step on the next batch of the plan; returns its line of metrics.jsonl, speeds left out."""
    s, plan, tick = run.s, run.rows.plan, time.time()
    examples, known = next_batch(run)
    replay, sft = replay_of(run.step, s)
    sums, loss = accumulate_gradients(run, examples, known, [s.seed, run.step], run.ahead, sft)
    last = run.step + 1 == len(plan)
    run.ahead = None if last else run.microbatches([run.rows.train[i] for i in plan[run.step + 1]])  # while a GPU works
    grad_norm = dist.clip_gradients(run.policy, s.max_grad_norm)
    sums, loss, grad_norm = sums.cpu(), loss.cpu(), float(grad_norm)  # the one place where the host waits for a GPU
    stop_if_not_finite(examples, sums, loss, grad_norm)
    if run.step == 0:
        check_step_zero(sums, 0.1 if run.bf16 else 1e-3)
    lr = learning_rate(run.step, len(plan), s)
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    run.optimizer.step()
    run.optimizer.zero_grad()
    reset(run.origin, s.reset_alpha)
    run.step += 1
    if s.sync_every and run.step % s.sync_every == 0:
        move_reference(run.policy, s.sync_alpha)
    line = {"step": run.step, **measures(run.objective, sums, loss), "grad_norm": grad_norm, "lr": lr, "pairs": len(loss)}
    line |= {"tokens": sum(map(data.tokens_of, examples)), "flops": dist.model_flops(run.policy.model, examples)}
    line |= {"seconds": time.time() - tick, **balance(run, examples)}
    return line | ({"replay": replay + 1} if s.replays > 1 else {}) | ({"sft_weight": sft} if sft else {})


def learning_rate(step: int, steps: int, s: Settings) -> float:
    """Linear warm-up over warmup_ratio of the steps, then a half cosine down to zero. `step` counts from 0."""
    warmup = max(1, round(s.warmup_ratio * steps))
    if step < warmup:
        return s.lr * (step + 1) / warmup
    return s.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


# ---- prepare ---------------------------------------------------------------------------------------------------------


def prepare(s: Settings) -> Run:
    """Everything before the first step, what is quick to refuse first: a mistake should cost no loading."""
    objective = parse_objective(s.objective)
    try_objective(objective)
    if s.sync_every and (not objective.needs("ref") or objective.needs("ref_kl")):
        why = "estimates its drift on mismatched pairs" if objective.needs("ref_kl") else "has no reference's log-probs"
        raise UserError(f"sync_every moves the reference, but {objective.name} {why}; leave sync_every out")
    device = dist.setup(s.device)
    dist.mesh_sizes(s.mesh)
    if s.model != "tiny":
        data.reachable(s.model)
    s.lr = s.lr if s.lr is not None else (2e-4 if s.model == "tiny" else 1e-6)
    s.out = str(dist.on_main(prepare_out, s))
    lock = dist.own(Path(s.out))
    given, world = {k: v for k, v in asdict(s).items() if k not in ("overwrite", "resume")}, None
    if s.model == "tiny":
        world, pairs = dist.on_main(embedded_world, s)
        s = replace(s, model=str(world / "model"), dataset=str(pairs))
    tokenizer = data.load_tokenizer(s.model, s.trust_remote_code)
    rows = load_rows(s, tokenizer, objective)
    policy = build_policy(s, objective, tokenizer, device)
    origin = [(p, p.detach().clone()) for p in reset_parameters(policy.model, s)]
    run = Run(s, objective, device, tokenizer, policy, rows, origin, lock, given, world)
    check_policy(run)
    plan_steps(run)
    run.same = identity(run)
    if s.resume:
        dist.check_same(run.same, dist.on_main(marker, Path(s.out)), s.out)
    score_start(run)
    run.optimizer = make_optimizer(run)
    if s.resume:
        resume(run)
    return run


def build_policy(s: Settings, objective: Objective, tokenizer, device: torch.device) -> ResponseLogProbs:
    """The model with fp32 weights, cut over the ranks; and the reference, where an objective needs its token KL."""
    model = load_model(s)
    embeddings = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > embeddings:
        raise UserError(f"the tokenizer has {len(tokenizer)} ids, but the model only {embeddings} embeddings: no match")
    if s.layout == "packed":
        refuse_packed(model)
    if s.compile:
        refuse_compile(s, model, device)
    if s.sync_every:
        say("sync_every: the reference is a second model, whose log-probs are computed at every step and not kept")
    second = objective.needs("kl_w") or s.sync_every
    reference = load_model(s).requires_grad_(False).train(False) if second else None
    checkpoints, each = s.keep + 1 if s.save_every else 0, 16 if s.sync_every else 12  # a reference that moves is in them too
    dist.on_main(dist.check_space, Path(s.out), model, checkpoints, export_dtype(s, model), each)
    policy = dist.shard(ResponseLogProbs(model, reference), s.mesh, uses_bf16(s, device), s.gradient_checkpointing, s.compile)
    for part in filter(None, (model, reference)):
        dist.load_weights(part, s.model, device)
    if names := dist.not_finite(model):
        raise UserError(f"{s.model}: {len(names)} weights of this model are not finite numbers, the first is {names[0]}")
    policy.use_layout(s.layout)
    model.train()
    return policy


def check_policy(run: Run) -> None:
    """Two checks that cost a small pass each: is the head one that we know, and do the two layouts agree?"""
    few = [run.rows.train[i] for i in range(min(4, len(run.rows.train)))]
    run.policy.use_layout("padded")
    try:
        with run.arithmetic():
            ids = torch.tensor([few[0].prompt[-32:]], device=run.device)
            run.policy.within(check_head, ids, 0.5 if run.bf16 else 1e-3)
        run.policy.use_layout(run.s.layout)
        compare_layouts(run, few, 0.1 if run.bf16 else 1e-4)
    except ValueError as error:  # logprobs.py names the head or the attention that it cannot honour
        raise UserError(str(error)) from error


MOST_STEPS = 10**7


def plan_steps(run: Run) -> None:
    """Which rows each optimizer step takes, replays included, from the first step to the last."""
    s, rows = run.s, len(run.rows.train)
    steps = min(s.epochs * -(-rows // s.batch_size) * s.replays, s.max_steps or math.inf)
    if steps > MOST_STEPS:
        raise UserError(
            f"epochs {s.epochs} over {rows} rows are {steps} steps, and {MOST_STEPS} are planned at most; set max_steps"
        )
    batches = (batch for epoch in range(s.epochs) for batch in data.step_plan(rows, s.batch_size, s.seed, epoch))
    run.rows.plan = list(itertools.islice((rows for batch in batches for rows in [batch.tolist()] * s.replays), s.max_steps))


def score_start(run: Run) -> None:
    """What the start says of every row and answers to the sample prompts: the reference, and where the run set out from."""
    rows, needs = run.rows, run.objective.needs
    ref_held_out, mismatch_held_out = {}, None
    if needs("ref") and not run.s.sync_every:
        rows.ref = reference_sums(run, rows.train, "rows", run.also)
        ref_held_out = reference_sums(run, rows.held_out, "held-out rows", run.also)
    if needs("ref_kl"):
        batches = [mismatched([rows.train[i] for i in batch]) for batch in rows.plan[:: run.s.replays]]
        flat = reference_sums(run, [e for batch in batches for e in batch], "mismatched rows")["ref"].flatten()
        rows.ref_mismatch = flat.split([len(batch) for batch in batches])
        if rows.held_out:
            mismatch_held_out = reference_sums(run, mismatched(rows.held_out), "mismatched held-out rows")["ref"].flatten()
    if rows.held_out:
        rows.held_out_known = known_sums(rows.held_out, run.device, ref_mismatch=mismatch_held_out, **ref_held_out)
        rows.held_out_start = ref_held_out["ref"] if ref_held_out else log_probs(run, rows.held_out)["logp"]
    run.before = answers(run)


def make_optimizer(run: Run) -> torch.optim.Optimizer:
    """AdamW; weight decay acts on matrices, not on gains and biases."""
    parameters = list(run.policy.model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": run.s.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), eps=1e-8, fused=True)


def resume(run: Run) -> None:
    """Go to where the newest complete checkpoint stands."""
    checkpoint = dist.newest_checkpoint(Path(run.s.out) / "checkpoints", say)
    if checkpoint is None:
        return say("no checkpoint; starting from step 0")
    run.step = dist.load_checkpoint(checkpoint, run.policy.model, run.optimizer, run.same, moving(run))["step"]
    say(f"resumed after step {run.step} from {checkpoint}")


# ---- the run ---------------------------------------------------------------------------------------------------------


def train(s: Settings) -> dict:
    """One run from settings to exported model; returns the summary that is also written to out/summary.json."""
    started = time.time()
    dist.setup(s.device)
    if s.resume and (summary := dist.on_main(finished, s)):
        return summary
    run = prepare(s)
    journal = Journal(run)
    if run.rows.held_out and run.step == 0:
        journal.evaluated(evaluate(run), run.before)
    with dist.StopOnSignal() as stop:
        for last in journal.steps():
            journal.stepped(step(run))
            if run.rows.held_out and (last or due(run, s.eval_every)):
                journal.evaluated(evaluate(run), answers(run))
            stopping = stop.requested()
            saved = save(run) if stopping or due(run, s.save_every) else None
            if stopping:
                stopped(run, saved)
    return finish(run, journal, started)


def due(run: Run, every: int) -> bool:
    return every > 0 and run.step % every == 0


def save(run: Run) -> bool:
    """Write a checkpoint; whether it is there."""
    state = {"step": run.step, "run": run.same}
    folder = Path(run.s.out) / "checkpoints"
    return dist.save_checkpoint(folder, run.policy.model, run.optimizer, state, run.s.keep, run.tokenizer, moving(run))


def stopped(run: Run, saved: bool) -> None:
    """End a run that SIGTERM or Ctrl-C asked to stop."""
    if not saved:
        raise UserError(f"stopped after step {run.step} without a checkpoint; --resume goes on from an earlier one")
    say(f"stopped after step {run.step}; go on with --resume --out {run.s.out}")
    raise SystemExit(0)


def finish(run: Run, journal: "Journal", started: float) -> dict:
    """After the last step: samples, model, curves, summary, report."""
    s, out, model = run.s, Path(run.s.out), run.policy.model
    samples, lines = journal.close()
    after = {k: v for line in lines if line["step"] for k, v in line.items() if k.startswith("eval_") or k == "repetition"}
    if dist.not_finite(model) or not all(map(math.isfinite, after.values())):
        raise UserError(f"after the last step weights or held-out losses are not finite: nothing is in {out}/model. Lower lr")
    run.policy.use_layout("padded")
    measured = {k: v for line in lines[-2:] for k, v in line.items()}
    card = dist.model_card(out.name, {**run.given, "objective": str(run.objective)}, measured)
    dist.export(model, run.tokenizer, out / "model", export_dtype(s, model), card)
    dist.on_main(draw_curves, lines, out / "curves.png", f"{run.objective} on {Path(s.dataset).name}")
    world = {"world": dist.on_main(judge, out / "model", run.world, out / "answers.jsonl")} if run.world else {}
    summary = {
        "objective": str(run.objective), "steps": len(run.rows.plan), "rows": len(run.rows.train),
        "held_out": len(run.rows.held_out), "before": journal.start, "after": after, **world, **journal.speeds(),
        "seconds": time.time() - started, "peak_memory_gib": peak_memory(run.device),
        "dtype": "bf16" if run.bf16 else "fp32", "device": str(run.device), "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__},
        "out": str(out),
    }  # fmt: skip
    dist.on_main(write_whole, out / "summary.json", json.dumps(summary, indent=2) + "\n")
    report_end(summary, samples)
    return summary


# ---- model and rows --------------------------------------------------------------------------------------------------


def load_model(s: Settings) -> torch.nn.Module:
    """A transformers model with fp32 weights and dropout off.

    Under torchrun the weights of a folder come later, when the model has been cut up: see `distributed.load_weights`.
    """
    try:
        model = dist.build_model(s.model, s.trust_remote_code)
    except UserError:
        raise
    except Exception as error:  # transformers raises many kinds; all mean that there is no loadable model
        raise UserError(f"{s.model}: no loadable causal language model there ({str(error).strip().splitlines()[0]})") from error
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        for key in [k for k in config.to_dict() if "dropout" in k or k.endswith("pdrop")]:
            if isinstance(getattr(config, key), float):
                setattr(config, key, 0.0)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


NOT_ATTENTION = ("mamba", "rwkv", "deltanet", "linearattention", "shortconv", "recurrentblock", "griffin", "xlstm", "mlstm")


def refuse_packed(model: torch.nn.Module) -> None:
    """The packed layout needs every layer to mix tokens by masked attention only; others are refused by name."""
    for module in model.modules():
        kind = type(module).__name__
        if any(word in kind.lower() for word in NOT_ATTENTION):
            raise UserError(f"{type(model).__name__} has {kind} layers, which carry state across tokens; use --layout padded")


def refuse_compile(s: Settings, model: torch.nn.Module, device: torch.device) -> None:
    """torch.compile takes packs only, of models whose attention can be exchanged, and needs a C++ compiler on a CPU, which is
    tried here on a line of code."""
    if s.layout != "packed":
        raise UserError(f"compile works on packs; with --layout {s.layout} leave it out")
    if not model._can_set_attn_implementation():
        raise UserError(f"compile: {type(model).__name__}'s attention is its own, so nothing would be compiled; leave it out")
    try:
        torch.compile(lambda x: x.exp() + 1)(torch.ones(8, device=device))
    except Exception as error:  # of many kinds, with pages of what the compiler said
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"compile: torch.compile does not work here ({why}); install g++ or leave it out") from error


def uses_bf16(s: Settings, device: torch.device) -> bool:
    return data.bf16_in_hardware(device) if s.dtype == "auto" else s.dtype == "bf16"


def export_dtype(s: Settings, model: torch.nn.Module) -> torch.dtype:
    came_in = model.config.dtype if isinstance(model.config.dtype, torch.dtype) else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "auto": came_in}[s.export_dtype]


def load_rows(s: Settings, tokenizer, objective: Objective) -> Rows:
    """Training and held-out examples in the form the objective trains on, and the report of what was dropped."""
    train_rows, report = data.load(s.dataset, tokenizer, s)
    reports = {"dataset": report}
    if s.eval_dataset:
        held_out, reports["eval_dataset"] = data.load(s.eval_dataset, tokenizer, s)
    else:
        if s.eval_size >= len(train_rows):
            raise UserError(f"eval_size {s.eval_size} leaves no training rows of {len(train_rows)}; lower it")
        train_rows, held_out = data.split_held_out(train_rows, s.eval_size, s.seed)
    for e in (*train_rows[:1], *held_out[:1]):
        if e.desirable is not None and not objective.unpaired:
            raise UserError(
                f"{objective.name} compares pairs, but {e.where} is a single labelled completion; use kto, bco or uapo"
            )
    if objective.needs("margin") and (where := train_rows.without_margin() or held_out.without_margin()):
        raise UserError(
            f"{objective.name} needs the margin of the scores, and {where} has none; give score_chosen and score_rejected in "
            "every row (or all_rm_scores; tests/tools/on_policy.py makes such rows), or take another objective"
        )

    def fitting(e: Example) -> Example:
        """A pair keeps both responses for paired and unpaired objectives, its chosen one where only that is scored."""
        return e if objective.unpaired or len(e.responses) == objective.responses else e._replace(responses=e.responses[:1])

    return Rows(train_rows.mapped(fitting), held_out.mapped(fitting), reports)


def known_sums(examples: Sequence[Example], device, **reference: Tensor | None) -> Sums:
    """What a batch's sums consist of before the policy is asked: what is counted, and fields of Sums that are known of the
    reference."""
    length = torch.tensor([[len(r) for r in e.responses] for e in examples], device=device)
    label = [[e.desirable] if e.desirable is not None else [True, False][: len(e.responses)] for e in examples]
    margins = [e.margin for e in examples]
    margin = None if None in margins else torch.tensor(margins, device=device)
    return Sums(length, label=torch.tensor(label, device=device), margin=margin, **reference)


def reference_sums(run: Run, examples: Sequence[Example], what: str, also: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Reference log-probs of `examples`, "ref" and, if `also` says "head", "ref_head", (n, k) each: the policy's own, before it
    has learnt anything, kept as numbers.

    Cached as safetensors under a hash of everything that they depend on: weights, token ids (so tokenizer, template, data
    and truncation), arithmetic and layout. A file that is not complete and finite is not used.
    """
    if not examples:
        return {}
    s, key, names = run.s, hashlib.sha256(), {"logp": "ref"} | ({"head": "ref_head"} if "head" in also else {})
    key.update(json.dumps(["1", s.layout, run.bf16, run.device.type, s.tokens_per_microbatch]).encode())
    key.update(json.dumps(dist.hash_weights(run.policy.model)).encode())
    for e in examples:
        key.update(json.dumps([e.prompt, e.responses]).encode())
    file = Path(s.cache).expanduser() / f"reference-{key.hexdigest()[:32]}.safetensors"
    found, shape = dist.load_tensors(file) or {}, (len(examples), len(examples[0].responses))
    if all(name in found and found[name].shape == shape and torch.isfinite(found[name]).all() for name in names.values()):
        say(f"reference log-probs of {len(examples)} {what} from {file}")
        return {name: found[name].to(run.device) for name in names.values()}
    ref = {names[name]: x for name, x in log_probs(run, examples, tuple(names), progress=f"reference, {what}").items()}
    dist.save_tensors(ref, file)
    return ref


def mismatched(examples: Sequence[Example]) -> list[Example]:
    """For KTO: each row's prompt with a completion that answers another prompt, the next such one in the batch, in a circle."""
    flat = [(e.prompt, r) for e in examples for r in e.responses]
    rows = []
    for i, (prompt, _) in enumerate(flat):
        others = (flat[(i + j) % len(flat)] for j in range(1, len(flat)))
        other = next((o for o in others if o[0] != prompt), None)
        if other is None:
            raise UserError(
                "kto needs at least two different prompts in every optimizer batch; raise batch_size or mix the data"
            )
        rows.append(Example(prompt, [other[1]], where=examples[0].where))
    return rows


# LoRR (Liu 2025, 2508.06412), a schedule around any objective. RECONSTRUCTED: the sources at hand fix replaying each batch,
# resetting towards the initial weights after a replay, and a hybrid loss whose SFT weight grows with the replay. Ours are: the
# formula of that weight; a reset after every replay, the last one too; Adam's moments that stay as they are; one learning rate
# schedule over all optimizer steps.


def replay_of(step: int, s: Settings) -> tuple[int, float]:
    """(replay, weight of the SFT term) of an optimizer step, both counting from 0: λ_l = sft_weight · (l + 1) / L."""
    replay = step % s.replays
    return replay, s.sft_weight * (replay + 1) / s.replays


def reset_parameters(model: torch.nn.Module, s: Settings) -> list[torch.nn.Parameter]:
    """The parameters that reset_alpha acts on, by name; none where nothing is reset."""
    if s.reset_alpha == 1:
        return []
    parts, named = [x.strip() for x in s.reset_modules.split(",") if x.strip()], dict(model.named_parameters())
    for part in parts or [""]:
        if not part or not any(part in name for name in named):
            last = list(named)[-12:]
            raise UserError(f"reset_modules: {part!r} is part of no parameter's name; the last names are {', '.join(last)}")
    return [p for name, p in named.items() if any(part in name for part in parts)]


@torch.no_grad()
def reset(origin: list[tuple[Tensor, Tensor]], alpha: float) -> None:
    """θ ← αθ + (1−α)θ⁰, in place; where a parameter is cut over ranks each rank does its rows."""
    for parameter, start in origin:
        parameter.mul_(alpha).add_(start, alpha=1 - alpha)


# TR-DPO (Gorbatovski 2024, 2404.09656), a schedule around any objective with a reference: its soft updates, and with α = 1 its
# hard ones. What the reference says is then computed at every step, by a second model, and not once and kept.


@torch.no_grad()
def move_reference(policy: ResponseLogProbs, alpha: float) -> None:
    """reference ← α policy + (1−α) reference, in place; where they are cut over ranks each rank does its rows."""
    for there, here in zip(policy.reference.parameters(), policy.model.parameters()):
        there.lerp_(here, alpha)


def moving(run: Run) -> torch.nn.Module | None:
    """The reference, where it is part of a run's state."""
    return run.policy.reference if run.s.sync_every else None


# ---- evaluation and checks ---------------------------------------------------------------------------------------------


def evaluate(run: Run) -> dict[str, float]:
    """Measures of the held-out rows as one batch, each name with eval_ in front.

    eval_drift, nats per token, is the mean over responses of (log-prob at the start − now) / length. It estimates
    KL(start ‖ now) per token only if the responses are the start's own samples (then ≥ 0 up to noise); of other texts it says
    by how much they became less likely, below 0 where more likely.
    """
    held_out, known = run.rows.held_out, run.rows.held_out_known
    sums = known._replace(**log_probs(run, held_out, run.also, progress="evaluate"))
    if run.objective.needs("logp_kl"):
        sums = sums._replace(logp_mismatch=log_probs(run, mismatched(held_out))["logp"].flatten())
    loss = row_losses(run.objective, sums, [run.s.seed])
    drift = ((run.rows.held_out_start - sums.logp) / known.length).mean().item()
    return {f"eval_{k}": v for k, v in {**measures(run.objective, sums, loss), "drift": drift}.items()}


def answers(run: Run) -> list[str]:
    """Greedy answers to the prompts of the first held-out rows."""
    prompts, texts = [e.prompt for e in run.rows.held_out[: run.s.samples]], []
    layout = run.policy.use_layout("padded")  # the model's own attention, which generation needs
    how = dict(max_tokens=run.s.sample_tokens, together=dist.world_size() > 1)
    for i in range(0, len(prompts), 32):
        texts += run.policy.within(completions, run.tokenizer, prompts[i : i + 32], **how)[0]
    run.policy.use_layout(layout)
    return texts


def measures(objective: Objective, sums: Sums, loss: Tensor) -> dict[str, float]:
    """Loss and rewards of a batch.

    Pairs: reward_margin is the mean of r_w − r_l, reward_accuracy the share of pairs with r_w > r_l (a tie counts ½).
    Unpaired rows: the difference of mean rewards, desirable minus undesirable, and the share of all (desirable, undesirable)
    couples in the right order. Log-probs per token are Σ logp / Σ tokens over the chosen (desirable) and rejected ones.
    """
    ref = sums.ref if sums.ref is not None else torch.zeros_like(sums.logp)
    reward = objective.loss.reward(sums.logp, ref, sums.length, **objective.given)
    label, means = sums.label, {"loss": loss.mean().item()}
    good, bad = reward[label], reward[~label]
    if len(good) and len(bad):
        paired = reward.shape[1] == 2
        difference = (reward[:, 0] - reward[:, 1]) if paired else (good[:, None] - bad[None, :]).flatten()
        means["reward_margin"] = difference.mean().item()
        means["reward_accuracy"] = (0.5 * (1 + difference.sign())).mean().item()
    for side, mask in (("w", label), ("l", ~label)):
        if mask.any():
            means[f"logp_{side}_per_token"] = (sums.logp[mask].sum() / sums.length[mask].sum()).item()
    return means


def stop_if_not_finite(examples: list[Example], sums: Sums, loss: Tensor, grad_norm: float) -> None:
    """End the run before the weights are touched, naming the rows whose loss or log-prob is not a finite number."""
    bad = ~torch.isfinite(loss.view(len(examples), -1)).all(-1) | ~torch.isfinite(sums.logp).all(-1)
    if not bad.any() and math.isfinite(grad_norm):
        return
    rows = [e.where for e, b in zip(examples, bad.tolist()) if b] or [e.where for e in examples]
    what = "loss" if bad.any() else "gradient"
    raise UserError(
        f"the {what} is not finite; the weights were left as they were before this step. Rows: {'; '.join(rows[:8])}"
        f"{' …' if len(rows) > 8 else ''}. Look at them with `python data.py show`; if they are sound, lower lr"
    )


def check_step_zero(sums: Sums, bound: float) -> None:
    """Before the first update policy and reference are the same model: every log-ratio, reward and KL must be 0."""
    log_ratio_and_kl = (None if sums.ref is None else sums.logp - sums.ref, sums.kl)
    gaps = [(x / sums.length).abs().max().item() for x in log_ratio_and_kl if x is not None]
    if not gaps:
        return
    say(f"step 0: policy and reference differ by at most {max(gaps):.2g} nats per token (bound {bound:g})")
    if not max(gaps) <= bound:
        raise UserError(
            f"step 0: policy and reference differ by {max(gaps):.3g} nats per token; the reference is not this model's"
        )


def compare_layouts(run: Run, examples: list[Example], bound: float) -> float:
    """Score the first examples in the packed and in the padded layout; they must agree per token within `bound` nats. Returns
    by how much they are apart."""
    if run.s.layout != "packed":
        return 0.0
    with_packed = log_probs(run, examples)["logp"]
    run.policy.use_layout("padded")
    with_padded = log_probs(replace(run, s=replace(run.s, layout="padded")), examples)["logp"]
    run.policy.use_layout("packed")
    lengths = torch.tensor([[len(r) for r in e.responses] for e in examples], device=with_packed.device)
    worst = ((with_packed - with_padded).abs() / lengths).max().item()
    say(
        f"layouts: packed and padded differ by at most {worst:.2g} nats per token on {len(examples)} examples (bound {bound:g})"
    )
    if not worst <= bound:
        raise UserError(f"the packed layout disagrees with the padded one by {worst:.3g} nats per token; use --layout padded")
    return worst


def identity(run: Run) -> dict:
    """What must be equal for a run to go on from a checkpoint: all that its losses depend on but the number of ranks."""
    s = run.s
    scored = run.objective.needs("margin")
    rows = [[e.prompt, e.responses, *([e.margin] if scored else [])] for e in run.rows.train]
    rows = hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]
    names = ("lr", "batch_size", "epochs", "max_steps", "warmup_ratio", "weight_decay", "max_grad_norm", "seed", "max_length")
    names += ("replays", "reset_alpha", "reset_modules", "sft_weight", "layout", "tokens_per_microbatch")
    same = {"model": Path(s.model).name, "dataset": Path(s.dataset).name, "objective": str(run.objective)}
    same |= {"wpo": True} if s.wpo else {}
    same |= {"sync_every": s.sync_every, "sync_alpha": s.sync_alpha} if s.sync_every else {}
    same |= {"dtype": "bf16" if run.bf16 else "fp32", "device": run.device.type}
    return {**same, **{k: getattr(s, k) for k in names}, "training rows (hash)": rows}


# ---- the journal -----------------------------------------------------------------------------------------------------


def say(text: str) -> None:
    if dist.is_main():
        tqdm.write(text, file=sys.stderr)


class Journal:
    """The only writer in a run's folder until the model is exported: metrics, samples, warnings, and what log_to asks for."""

    def __init__(self, run: Run):
        self.run, self.out, self.metrics = run, Path(run.s.out), Path(run.s.out) / "metrics.jsonl"
        say(settings_table(run.given))
        for name, report in run.rows.reports.items():
            say(f"{name}: {report}")
        if 0 < len(run.rows.held_out) < FEW:
            few = f"{len(run.rows.held_out)} held-out rows are too few to compare runs by"
            say(f"{few}; take some hundreds (eval_size, eval_dataset)")
        dist.on_main(open_records, run)
        self.file = open(self.metrics if dist.is_main() else os.devnull, "a", buffering=1)
        self.send = open_log(run.s, self.out)
        prompts = [run.tokenizer.decode(e.prompt) for e in run.rows.held_out[: run.s.samples]]
        self.samples = [{"prompt": p, "before": b, "during": {}, "after": None} for p, b in zip(prompts, run.before)]
        during = dist.on_main(read_during, self.out / "samples.jsonl", run.step)
        for sample in self.samples:
            sample["during"] = during.get(sample["prompt"], {})
        self.start = next((line for line in dist.on_main(read_metrics, self.metrics) if line["step"] == 0), {})
        self.start.pop("step", None)
        self.rate = matmul_rate(run.policy.model, torch.bfloat16 if run.bf16 else torch.float32) * dist.world_size()
        self.done, self.warned = Counter(), set()
        counts = f"{len(run.rows.train)} rows, {len(run.rows.held_out)} held out, {len(run.rows.plan)} steps"
        say(f"{run.objective}: {counts} of {run.s.batch_size}, {'bf16' if run.bf16 else 'fp32'}, {run.device}")

    def steps(self) -> Iterator[bool]:
        """For each step that is left whether it is the last, on a progress bar."""
        first, total = self.run.step, len(self.run.rows.plan)
        show = dict(initial=first, total=total, disable=not dist.is_main())
        self.bar = data.progress(range(first, total), "train", "steps", **show)
        for number in self.bar:
            yield number + 1 == total

    def stepped(self, line: dict) -> None:
        """Record a step, with its speeds."""
        seconds = line["seconds"]
        line |= {"tokens_per_second": line["tokens"] / seconds, "mfu": line["flops"] / seconds / self.rate}
        self.done.update({k: line[k] for k in ("pairs", "tokens", "flops", "seconds")})
        self._record(line)
        headline = {"loss": "loss", "reward_margin": "margin", "reward_accuracy": "accuracy", "tokens_per_second": "tok/s"}
        self.bar.set_postfix({v: f"{line[k]:.4g}" for k, v in headline.items() if k in line})

    def evaluated(self, line: dict, texts: list[str]) -> None:
        """Record an evaluation and the answers to the sample prompts; warn, once each, of what looks like divergence."""
        step = self.run.step
        line = line | ({"repetition": repetition(texts)} if texts else {})
        self._record({"step": step, **line})
        say(f"{f'step {step}' if step else 'before'}: {', '.join(f'{k} {v:.4f}' for k, v in line.items())}")
        if step == 0:
            self.start = line
            return
        self._answered(texts)
        for guard, warning in divergence(self.start, line).items():
            if guard not in self.warned:
                say(f"warning: {warning}")
                self.warned.add(guard)

    def close(self) -> tuple[list[dict], list[dict]]:
        """(samples, all lines of metrics.jsonl) when the last step is done."""
        self.file.close()
        resumed_at_its_end = any(sample["after"] is None for sample in self.samples)
        self._answered(answers(self.run) if resumed_at_its_end else [])
        return self.samples, dist.on_main(read_metrics, self.metrics)

    def speeds(self) -> dict[str, float]:
        """Of the steps of this process alone: evaluation, samples and checkpoints are not counted."""
        seconds = max(self.done["seconds"], 1e-9)
        speeds = {f"{k}_per_second": self.done[k] / seconds for k in ("pairs", "tokens")}
        mfu = {"mfu": self.done["flops"] / seconds / self.rate, "matmul_flops_per_second": self.rate}
        return {**speeds, **mfu, "train_seconds": self.done["seconds"]}

    def _record(self, line: dict) -> None:
        self.file.write(json.dumps(line) + "\n")
        self.send(line)

    def _answered(self, texts: list[str]) -> None:
        """Write samples.jsonl: to each prompt the answers "before", "during" {step: text} and "after" (null until the end)."""
        for sample, text in zip(self.samples, texts):
            if self.run.step == len(self.run.rows.plan):
                sample["after"] = text
            else:
                sample["during"][str(self.run.step)] = text
        dist.on_main(write_lines, self.out / "samples.jsonl", self.samples)


FEW = 50  # held-out rows: the standard error of an accuracy is then above 0.05
MARKER = "run.json"  # in the folder of a run, and in no other: what the run is
# by a run into its folder
WRITTEN = (
    "summary.json", "settings.json", "data.json", "metrics.jsonl", "samples.jsonl", "answers.jsonl", "curves.png",
    "tensorboard/events.*", "model", "model.part", "checkpoints/step-*",
)  # fmt: skip


def prepare_out(s: Settings) -> Path:
    """The output folder; one that already holds anything is refused, a run of ours unless overwrite or resume was asked for."""
    if s.out is None:
        names = (word for word in re.split(r"\W+", s.objective) if word in OBJECTIVES)
        stamp = "-".join([time.strftime("%Y%m%d-%H%M%S"), *names])
        out, n = Path("runs") / stamp, 1
        while out.exists():
            out, n = Path("runs") / f"{stamp}-{n + 1}", n + 1
    else:
        out = Path(s.out)
    try:
        if out.exists() and not out.is_dir():
            raise UserError(f"out {out} is a file, not a folder")
        refuse_out(s, out)
        out.mkdir(parents=True, exist_ok=True)
        (out / ".lock").touch()
    except OSError as error:
        raise UserError(f"out {str(out)[:200]} cannot be written ({error.strerror})") from error
    return out


def refuse_out(s: Settings, out: Path) -> None:
    """UserError where a run in `out` would touch what no run has written, or what this one reads."""
    holds = out.exists() and any(p.name != ".lock" for p in out.iterdir())
    if s.resume and not marker(out):
        raise UserError(f"out {out} holds no run to resume (no {MARKER} of plainpo)")
    if s.overwrite and holds and not marker(out):
        raise UserError(f"out {out} holds files but no run of plainpo (no {MARKER}); overwrite deletes runs only")
    if holds and not (s.overwrite or s.resume):
        held = "a run; use --resume, --overwrite" if marker(out) else "files; use an empty folder"
        raise UserError(f"out {out} already holds {held} or another folder")
    sources = [s.dataset, s.eval_dataset] if s.overwrite else []
    read = [Path(s.model), *(file for source in sources if source for file in data.files_of(source))]
    if inside := [path for path in read if holds and _is_inside(path, out)]:
        raise UserError(f"{inside[0]} is read by this run and lies in out {out}, where files are replaced; choose another out")
    folders = [out / "model", out / "model.part", *(out.glob("checkpoints/step-*") if s.overwrite else ())]
    if strange := [str(path) for folder in folders for path in dist.strangers(folder)]:
        raise UserError(f"{', '.join(strange[:3])}: not written by a run, and its folder is going to be replaced; move it away")


def marker(out: Path) -> dict:
    """What the run in a folder is, as `identity` says it; empty where the folder is none of ours."""
    try:
        return dict(json.loads((out / MARKER).read_text())["plainpo"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def finished(s: Settings) -> dict | None:
    """The summary of the run in `out`, if it has come to its end."""
    out = Path(s.out)
    try:
        summary = json.loads((out / "summary.json").read_text())
        said = f"out {out} holds a finished run of {summary['steps']} steps: nothing to do"
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not marker(out):
        return None
    say(f"{said}. To train on from its model: --model {out}/model and another --out")
    return summary


def open_records(run: Run) -> None:
    """Delete the run that is overwritten, or the metrics of steps after the one that is resumed from; note what this run is."""
    s, out = run.s, Path(run.s.out)
    if s.overwrite:  # only now that data and model have loaded is the earlier run given up
        for path in itertools.chain.from_iterable(map(out.glob, WRITTEN)):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    (out / "checkpoints").mkdir(parents=True, exist_ok=True)
    if s.resume:
        write_lines(out / "metrics.jsonl", read_metrics(out / "metrics.jsonl", run.step) if run.step else [])
    reports = {name: report._asdict() for name, report in run.rows.reports.items()}
    for name, content in (("settings.json", run.given), ("data.json", reports), (MARKER, {"plainpo": run.same})):
        write_whole(out / name, json.dumps(content, indent=2) + "\n")


def read_lines(file: Path, fits: Callable[[dict], bool]) -> list[dict]:
    """The JSON objects of a file of lines; what does not fit (damaged, or half-written by a kill) is passed over, and said."""
    lines, passed = [], []
    for number, text in enumerate(file.read_text(encoding="utf-8", errors="replace").split("\n") if file.exists() else (), 1):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            line = None
        if isinstance(line, dict) and fits(line):
            lines.append(line)
        elif text:
            passed.append(str(number))
    if passed:
        say(f"{file}: left out what is no record of a run: line {', '.join(passed)}")
    return lines


def read_metrics(file: Path, last: int | None = None) -> list[dict]:
    """The lines of metrics.jsonl, all or up to a step."""
    lines = read_lines(file, lambda line: "step" in line and all(isinstance(x, (int, float)) for x in line.values()))
    return [line for line in lines if last is None or line["step"] <= last]


def read_during(file: Path, last: int) -> dict[str, dict[str, str]]:
    """{prompt: answers "during" an earlier part of a run, {step: text}} up to step `last`."""
    lines = read_lines(file, lambda line: isinstance(line.get("prompt"), str) and isinstance(line.get("during"), dict))
    return {x["prompt"]: {n: text for n, text in x["during"].items() if n.isdecimal() and int(n) <= last} for x in lines}


def write_lines(file: Path, rows: list[dict]) -> None:
    write_whole(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_whole(file: Path, text: str) -> None:
    """Write a file, whole or not at all."""
    part = file.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, file)


def repetition(texts: list[str]) -> float:
    """Share of all word 3-grams of the texts that occurred before in the same text, from 0 to near 1; 0 if there are none."""
    seen = [list(zip(*(text.split()[i:] for i in range(3)))) for text in texts]
    total = sum(map(len, seen))
    return 1 - sum(len(set(grams)) for grams in seen) / total if total else 0.0


# Bounds of the divergence guards: ours, between what good and what spoilt runs of the embedded world showed.
REPETITION, REPETITION_RISE = 0.4, 0.2  # shares of 3-grams: at all, and above the start
DRIFT = 1.5  # nats per token
COLLAPSE, COLLAPSE_RATIO = 1.0, 2.0  # nats per token lost, and times as low as at the start


def divergence(start: dict, now: dict) -> dict[str, str]:
    """{guard: warning with advice} of an evaluation, as recorded, against the one at step 0; what is not recorded is passed."""
    warnings, slower = {}, "Lower lr (try a third), or stop earlier: --eval-every shows where it began"
    was, is_now = start.get("repetition", 0.0), now.get("repetition", 0.0)
    if is_now > REPETITION and is_now > was + REPETITION_RISE:
        warnings["repetition"] = (
            f"the sample completions repeat themselves: {is_now:.0%} of their word 3-grams occurred before in the same answer, "
            f"{was:.0%} at the start. Read samples.jsonl. {slower}"
        )
    if now.get("eval_drift", 0.0) > DRIFT:
        warnings["drift"] = (
            f"the model is far from its start: held-out responses have lost {now['eval_drift']:.2f} nats per token. {slower}; "
            "objectives with a reference hold on to the start with a larger beta"
        )
    was, is_now = start.get("eval_logp_w_per_token"), now.get("eval_logp_w_per_token")
    if was is not None and is_now is not None and is_now < was - COLLAPSE and is_now < COLLAPSE_RATIO * was:
        warnings["collapse"] = (
            f"the chosen responses themselves become unlikely: {was:.2f} → {is_now:.2f} nats per token on held-out rows. "
            f"{slower}; --sft-weight 0.1 holds them up"
        )
    return warnings


def open_log(s: Settings, out: Path) -> Callable[[dict], None]:
    """A function that sends one metrics line to tensorboard or wandb, or nowhere."""
    if s.log_to is None or not dist.is_main():
        return lambda line: None
    if s.log_to == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(out / "tensorboard"))
        return lambda line: [writer.add_scalar(k, v, line["step"]) for k, v in line.items() if k != "step"] and writer.flush()
    import wandb

    wandb.init(project="plainpo", config=asdict(s), dir=str(out))
    return lambda line: wandb.log(line, step=line["step"])


def pyplot():
    """matplotlib.pyplot drawing to files, or None with a word about it."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return say('no pictures: matplotlib is missing (pip install "plainpo[plot]")')
    return plt


def draw_curves(lines: list[dict], path: Path, title: str) -> None:
    plt = pyplot()
    if plt is None:
        return
    panels = [("loss", ["loss"]), ("reward margin", ["reward_margin"]), ("reward accuracy", ["reward_accuracy"]),
              ("log-prob per token (nats)", ["logp_w_per_token", "logp_l_per_token"])]  # fmt: skip
    figure, axes = plt.subplots(1, 4, figsize=(16, 3.6), constrained_layout=True)
    for axis, (name, keys) in zip(axes, panels):
        for colour, key in enumerate(keys):
            side = {"logp_w_per_token": "chosen, ", "logp_l_per_token": "rejected, "}.get(key, "")
            for prefix, style in (("", dict(alpha=0.55, lw=1.2)), ("eval_", dict(marker="o", ls="--"))):
                points = [(line["step"], line[prefix + key]) for line in lines if prefix + key in line]
                if points:
                    label = side + ("held out" if prefix else "training")
                    axis.plot(*zip(*points), color=f"C{colour}", label=label, **style)
        axis.set(title=name, xlabel="step")
        if axis.lines:
            axis.legend(fontsize=8)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)


WORDS = {  # measure of the embedded world → what it is called in the report, and its decimals
    "win_rate": ("win rate against the start", 3), "quality": ("true quality", 3), "length": ("words", 1),
    "lc_win_rate": ("length-controlled win rate", 3), "kl": ("KL to the start, nats", 2), "repetition": ("repeated items", 3),
}  # fmt: skip


def settings_table(given: dict) -> str:
    """What differs from the defaults, a line each."""
    changed = {f.name: given[f.name] for f in fields(Settings) if given.get(f.name, f.default) != f.default}
    lines = [f"  {name:<{max(map(len, changed))}}  {value}" for name, value in changed.items()]
    return "\n".join([f"settings that differ from the defaults (all are in {given['out']}/settings.json):", *lines])


def report_end(summary: dict, samples: list[dict]) -> None:
    """What a run has to show: what became better, answers before and after, held-out numbers, speed."""
    if "world" in summary:
        say(f"answers to {data.HELD_OUT_PROMPTS} held-out prompts (temperature 1), before → after:")
        for name, (title, digits) in WORDS.items():
            was, is_now = summary["world"][name]
            say(f"  {title:<28} {was:.{digits}f} → {is_now:.{digits}f}")
    elif samples:
        was, is_now = (sum(len(x[when].split()) for x in samples) / len(samples) for when in ("before", "after"))
        say(f"words per sample answer: {was:.1f} → {is_now:.1f}")
    for sample in samples[:3]:
        for key, value in (("prompt", sample["prompt"][-160:]), ("before", sample["before"]), ("after", sample["after"])):
            say(f"  {key:<7} {value[:160]!r}")
    before, after = summary["before"], summary["after"]
    for key, name in (("accuracy", "held-out accuracy"), ("margin", "held-out margin"), ("loss", "held-out loss")):
        key = "eval_loss" if key == "loss" else f"eval_reward_{key}"
        if key in before and key in after:
            share = min(max(after[key], 0.0), 1.0)
            error = f" (± {math.sqrt(share * (1 - share) / summary['held_out']):.3f} standard error)"
            say(f"{name}: {before[key]:.4f} → {after[key]:.4f}{error if 'accuracy' in key else ''}")
    speed = f"{summary['pairs_per_second']:.2f} rows/s while training"
    say(f"{speed}, {summary['seconds']:.0f} s in all, peak memory {summary['peak_memory_gib']:.2f} GiB")
    say(f"everything is in {summary['out']}; the model is in {summary['out']}/model")


# ---- accounting ------------------------------------------------------------------------------------------------------


def balance(run: Run, examples: list[Example]) -> dict[str, float]:
    """How a step is cut up: its microbatches, the heaviest over the mean one, and the share of computed positions that is
    padding or a prompt repeated."""
    loads, cells = [], 0
    for part in run.cut(examples):
        lengths = [len(examples[i].prompt) + len(r) for i in part for r in examples[i].responses]
        loads.append(sum(data.tokens_of(examples[i]) for i in part))
        cells += loads[-1] if run.s.layout == "packed" else len(lengths) * max(lengths, default=0)
    return {"microbatches": len(loads), "imbalance": max(loads) * len(loads) / sum(loads), "padding": 1 - sum(loads) / cells}


def matmul_rate(model: torch.nn.Module, dtype: torch.dtype) -> float:
    """Best floating-point operations per second of a few products: 2,048 tokens through the model's MLP, and 2,048³."""
    config, device = model.config.get_text_config(), model.device
    hidden, mlp = config.hidden_size, getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    best = 0.0
    for n, k, m in ((2048, hidden, mlp), (2048, mlp, hidden), (2048, 2048, 2048)):
        a, b = torch.randn(n, k, device=device).to(dtype), torch.randn(k, m, device=device).to(dtype)
        for _ in range(4):
            wait()
            tick = time.perf_counter()
            a @ b
            wait()
            best = max(best, 2.0 * n * k * m / (time.perf_counter() - tick))
    return best


def peak_memory(device: torch.device) -> float:
    """Highest memory in use so far, GiB: of the GPU, or resident memory of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


# ---- the embedded world ----------------------------------------------------------------------------------------------
#
# The papers' experiment with a known truth: supervised start → 5 samples per prompt → an annotator's scores → best against
# worst → training → win rate against the start. Every step is the code that real models go through.

SUPERVISED_STEPS, PROMPTS = 250, 1736


def on_policy_tools():
    """tests/tools/on_policy.py, which makes the pairs."""
    sys.path.insert(0, str(Path(__file__).parent / "tests" / "tools"))
    import on_policy

    return on_policy


def embedded_world(s: Settings) -> tuple[Path, Path]:
    """(folder with model, prompts, samples and the start's answers to held-out prompts; file of pairs), built once.

    Of several processes one builds; what a killed one left behind is built again.
    """
    tokenizer, demonstrations = data.tiny_world(s.seed, 8192, s.world)
    made_of = json.dumps(["3", SUPERVISED_STEPS, PROMPTS, s.seed, torch.__version__, demonstrations])
    folder = Path(s.cache).expanduser() / f"world-{hashlib.sha256(made_of.encode()).hexdigest()[:32]}"
    pairs = folder / f"pairs-{s.annotator_noise}-{s.length_bias}.jsonl"
    lock = folder.with_name(f".{folder.name}.lock")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock.touch()
    except OSError as error:
        raise UserError(f"cache {s.cache} cannot be written ({error})") from error
    with FileLock(lock):
        if not folder.exists():
            build_world(folder, tokenizer, demonstrations, s.seed)
        if not pairs.exists():
            scored, part = (f"{pairs}.{name}.jsonl" for name in ("scored", "part"))
            annotator = data.Annotator(s.annotator_noise, s.length_bias, s.seed)
            tools = on_policy_tools()
            tools.score(tools.Scoring(str(folder / "sampled.jsonl"), scored, rule=annotator))
            tools.pairs(tools.Pairing(scored, part, how="best_worst"))
            os.remove(scored)
            os.replace(part, pairs)
    return folder, pairs


def build_world(folder: Path, tokenizer, demonstrations: list[data.Row], seed: int) -> None:
    part = folder.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    supervised_start(demonstrations, tokenizer, seed, SUPERVISED_STEPS).save_pretrained(part / "model")
    tokenizer.save_pretrained(part / "model")
    prompts = [json.dumps({"prompt": p}) + "\n" for p in data.world_prompts(seed)]
    held_out, prompts = prompts[: data.HELD_OUT_PROMPTS], prompts[data.HELD_OUT_PROMPTS :][:PROMPTS]
    (part / "held_out.jsonl").write_text("".join(held_out))
    (part / "prompts.jsonl").write_text("".join(prompts))
    answer(part / "model", part / "held_out.jsonl", part / "answers.jsonl", seed)
    how = dict(temperature=1.0, top_p=1.0, max_tokens=64, batch_size=128, seed=seed, device="cpu")
    names = (str(part / name) for name in ("model", "prompts.jsonl", "sampled.jsonl"))
    tools = on_policy_tools()
    tools.sample(tools.Sampling(*names, n=5, **how))
    part.rename(folder)


def supervised_start(rows: list[data.Row], tokenizer, seed: int, steps: int) -> torch.nn.Module:
    """A Llama of 350,000 parameters that has learned to answer from noisy demonstrations."""
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=128, tie_word_embeddings=True, bos_token_id=None, eos_token_id=3, pad_token_id=3,
    ))  # fmt: skip
    policy, optimizer = ResponseLogProbs(model), torch.optim.AdamW(model.parameters(), fused=True)
    policy.use_layout("padded")
    examples = [data.encode(row, tokenizer, 128, 100)[0] for row in rows]
    plan = [part for epoch in range(64) for part in data.step_plan(len(examples), 64, seed, epoch)][:steps]
    schedule = Settings(lr=3e-3)
    bar = data.progress(plan, "supervised start", "steps")
    for step, part in enumerate(bar):
        batch = data.padded_batch([examples[i] for i in part])
        loss = OBJECTIVES["sft"](policy(batch)["logp"], batch.lengths).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, len(plan), schedule)
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss:.3f}")
    say(f"supervised start: {len(plan)} steps on noisy demonstrations, last loss {loss:.3f} nats per token")
    return model


def answer(model: Path, prompts: Path, out: Path, seed: int = 0) -> None:
    """One answer to each prompt as the model gives it: temperature 1, nothing cut off."""
    out.unlink(missing_ok=True)
    how = dict(temperature=1.0, top_p=1.0, max_tokens=64, batch_size=512, seed=seed, keep_unfinished=True, device="cpu")
    tools = on_policy_tools()
    tools.sample(tools.Sampling(str(model), str(prompts), str(out), n=1, **how))


def judge(model: Path, world: Path, out: Path) -> dict[str, list[float]]:
    """What changed in the answers to held-out prompts; [start, now] of each measure.

    win_rate: share of prompts where the answer's true quality is above the start's, ties ½. lc_win_rate: see below.
    length: words. kl: KL(now ‖ start) in nats per response, a mean of log-ratios over the answers. repetition: share of items
    that were named before in the same answer.
    """
    answer(model, world / "held_out.jsonl", out)
    rows = [[json.loads(line) for line in file.read_text().splitlines()] for file in (world / "answers.jsonl", out)]
    prompts = [row["prompt"] for row in rows[0]]
    texts = [[row["responses"][0] if row["responses"] else "" for row in side] for side in rows]
    quality, length, repetition = (
        torch.tensor([[f(p[-1]["content"], text) for p, text in zip(prompts, side)] for side in texts], dtype=torch.float64)
        for f in (data.world_quality, lambda _, text: len(text.split()), lambda _, text: data.world_repetition(text))
    )
    win = 0.5 + 0.5 * (quality[1] - quality[0]).sign()
    tokenizer = data.load_tokenizer(str(model))
    answers = [data.encode(data.Row(p, [t]), tokenizer, 256, 128)[0] for p, t in zip(prompts, texts[1])]
    start, now = summed_logps(world / "model", answers), summed_logps(model, answers)
    means = {"quality": quality.mean(1).tolist(), "length": length.mean(1).tolist(), "repetition": repetition.mean(1).tolist()}
    wins = {"win_rate": [0.5, win.mean().item()], "lc_win_rate": [0.5, length_controlled(win, length[1] - length[0])]}
    return {**means, **wins, "kl": [0.0, (now - start).mean().item()]}


def length_controlled(win: Tensor, difference: Tensor) -> float:
    """The win rate at equal length, as AlpacaEval 2 estimates it (without its term for a prompt's difficulty).

    win ~ σ(θ + φ tanh(Δ/std Δ)) by logistic regression, Newton's method with a touch of ridge; σ(θ). win: (n,) in [0, 1].
    """
    x = torch.stack([torch.ones_like(win), torch.tanh(difference / difference.std().clamp(min=1e-9))], 1)
    weights = torch.zeros(2, dtype=win.dtype)
    for _ in range(30):
        p = torch.sigmoid(x @ weights)
        hessian = x.T @ (x * (p * (1 - p))[:, None]) + 1e-3 * torch.eye(2, dtype=win.dtype)
        weights = weights + torch.linalg.solve(hessian, x.T @ (win - p) - 1e-3 * weights)
    return torch.sigmoid(weights[0]).item()


@torch.no_grad()
def summed_logps(model: Path, examples: list[Example]) -> Tensor:
    policy = ResponseLogProbs(transformers.LlamaForCausalLM.from_pretrained(model, dtype=torch.float32))
    policy.use_layout("padded")
    return torch.cat([policy(data.padded_batch(examples[i : i + 128]))["logp"] for i in range(0, len(examples), 128)])


# ---- the command line -------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None, work: Callable = lambda argv: train(parse_settings(argv))) -> dict:
    """The command line as a function; returns the summary. What the user can mend ends with a message and exit code 2."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages for large CPU tensors: far fewer page faults
    transformers.utils.logging.disable_progress_bar()
    stopped = "stopped at once: --resume goes on from the last checkpoint, if there is one"
    return data.command_line(work, argv, dist.fail, stopped)


if __name__ == "__main__":
    main()
