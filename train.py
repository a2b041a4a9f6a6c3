"""Train a language model on preferences.

    python train.py                                                        # tests/toy/simpo.yaml: half a minute on a CPU
    python train.py --model MODEL --dataset PAIRS.jsonl --objective "simpo(beta=2.5, gamma=0.5)" --lr 1e-6
    python train.py settings.yaml --lr 5e-7                                # a file of settings; the command line wins
    torchrun --nproc-per-node 8 train.py settings.yaml                     # the same, sharded over ranks

Reads top to bottom: settings → set-up → one step → the loop, then the parts in the order of their first use. From the loop to
a loss: `train` → `train_step` → `Objective.loss_and_grad` of losses.py. Rows are preference pairs, or single completions for
unpaired objectives. The loss of a step is the mean over the rows of the whole optimizer batch, all ranks together, so its
gradient does not depend on how the batch is divided into microbatches.

Shape letters: n examples of an optimizer step · k responses of each, 2 for pairs and 1 else.
"""

import contextlib
import copy
import ctypes
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
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
import transformers
import yaml  # transformers brings it
from torch import Tensor

import data
import distributed as dist
from data import Example, UserError, setting
from logprobs import ResponseLogProbs, completions, own_logprobs, to_device
from losses import OBJECTIVES, Objective, parse_objective, try_objective

# ---- settings --------------------------------------------------------------------------------------------------------

DTYPES = ("auto", "fp32", "bf16")
LAYOUTS = ("auto", "packed", "padded")


@dataclass
class Settings(data.Reading):
    model: str | None = setting(None, "folder or hub name of a causal language model")
    dataset: str | None = setting(None, "file, folder or hub name of preferences, with an optional slice: pairs.jsonl[:1000]")
    eval_dataset: str | None = setting(None, "held-out preferences; without it, eval_size rows are taken out of dataset")
    eval_size: int = setting(200, "rows held out of dataset for evaluation (0: none)")
    objective: str = setting("simpo(beta=2.0, gamma=1.0)", "a call of a function of losses.py, or a weighted sum of such calls")
    out: str | None = setting(None, "output folder, new or empty; without it, a fresh one under runs/")
    resume: bool = setting(False, "continue the run in out from its newest complete checkpoint")
    lr: float = setting(1e-6, "peak learning rate")
    batch_size: int = setting(32, "rows of one optimizer step (pairs, or completions when unpaired), all ranks together")
    tokens_per_microbatch: int = setting(2048, "token budget of one forward and backward pass")
    layout: str = setting("auto", "packed: no padding, the prompt once; auto: that, where it is right", choices=LAYOUTS)
    epochs: int = setting(1, "passes over the training rows")
    max_steps: int | None = setting(None, "stop after this many optimizer steps; the schedule ends there")
    warmup_ratio: float = setting(0.1, "share of the steps in which the learning rate rises to lr")
    weight_decay: float = setting(0.0, "AdamW weight decay, on matrices only")
    max_grad_norm: float = setting(1.0, "gradients are scaled to at most this global norm (0: never)")
    wpo: bool = setting(False, "WPO: a row's loss counts for less where its responses are not what the policy would say")
    dtype: str = setting("auto", "arithmetic (weights stay fp32); auto: bf16 where it is in hardware", choices=DTYPES)
    export_dtype: str = setting("auto", "weights of out/model; auto: as the model came", choices=DTYPES)
    gradient_checkpointing: bool = setting(False, "recompute activations in backward: less memory, a third more work")
    compile: bool = setting(False, "torch.compile the decoder's blocks (packed layout; on CPUs with a C++ compiler)")
    eval_every: int | None = setting(None, "evaluate every so many steps (0: only before and after); without it ten times")
    save_every: int = setting(0, "write a checkpoint every so many steps (always when stopped by SIGTERM or Ctrl-C)")
    keep: int = setting(2, "complete checkpoints to keep")
    samples: int = setting(4, "held-out prompts whose greedy completions are recorded before, at evaluations and after")
    sample_tokens: int = setting(64, "length limit of those completions")
    log_to: str | None = setting(None, "send the metrics there too, if it is installed", choices=("tensorboard", "wandb"))
    device: str = setting("auto", "cpu, cuda, mps, or auto, which never takes mps")
    mesh: str | None = setting(None, "under torchrun: replicas x shards, such as 2x4; without it one replica over all ranks")
    trust_remote_code: bool = setting(False, "allow a model folder to bring Python code that is then run")


DEFAULT = Path(__file__).with_name("tests") / "toy" / "simpo.yaml"  # what runs where neither model nor dataset is given


def parse_settings(argv: list[str], kind: type[Settings] = Settings, prog: str = "train.py", text: str = __doc__) -> Settings:
    """Settings of a YAML or JSON file (first argument) and, over them, those of the command line.

    kind: a study may have settings of its own besides; prog, text: its name and what its help says.
    """
    hints = {"learning_rate": "did you mean lr?"}
    for name, loss in OBJECTIVES.items():
        for key, value in loss.settings.items():
            hints.setdefault(key, f'{key} belongs into the call of the objective: --objective "{name}({key}={value!r})"')

    def parse(words: list[str]) -> Settings:
        return data.parse(kind, words, prog, text, hints)

    file = None
    if argv and argv[0].endswith((".yaml", ".yml", ".json")):
        file, *argv = argv
    elif not any(word.startswith(("--model", "--dataset")) for word in argv):
        file = os.path.relpath(DEFAULT)
    options = []
    if file is not None:
        try:
            options = options_of(Path(file), kind)
            parse(options)
        except UserError as error:
            raise UserError(f"{file}: {error}") from error
    s = parse([*options, *argv])
    check_settings(s)
    return s


def options_of(file: Path, kind: type[Settings]) -> list[str]:
    """The settings of a file as options of the command line. A model or data named ./… lies in the file's own folder."""
    try:
        text = file.read_text(encoding="utf-8-sig")
        settings = yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"cannot be read as settings ({error})") from error
    if not isinstance(settings, dict) or not settings:
        raise UserError("holds no settings, which are lines of key: value")
    written = re.findall(r"^[\w-]+(?=\s*:)", text, re.MULTILINE)
    may_be_empty = [f.name for f in fields(kind) if f.default is None]
    options = []
    for name, value in settings.items():
        key = str(name).replace("-", "_")
        values = value if isinstance(value, list) else [value]
        if written.count(name) > 1:  # of which YAML has taken the last
            raise UserError(f"{name} is there twice")
        if value is None and key in may_be_empty:
            continue
        if any(x is None or isinstance(x, (dict, list)) for x in values):
            raise UserError(f"{key} needs a value: one, or a list of some")
        option = ",".join(map(str, values))
        if key in ("model", "dataset", "eval_dataset"):
            sources = [part.strip() for part in option.split(",")]
            option = ",".join(str(file.parent / part[2:]) if part.startswith("./") else part for part in sources)
        options.append(f"--{key}={option}")
    return options


LEAST = dict.fromkeys(("batch_size", "tokens_per_microbatch", "epochs", "keep", "max_steps", "sample_tokens"), 1)
LEAST |= dict.fromkeys(("eval_size", "eval_every", "save_every", "samples", "seed"), 0)
LEAST |= dict.fromkeys(("warmup_ratio", "weight_decay", "max_grad_norm"), 0)


def check_settings(s: Settings) -> None:
    """UserError naming the first setting, or pair of settings, that cannot be meant."""
    for name, least in LEAST.items():
        value = getattr(s, name)
        if value is not None and value < least:
            raise UserError(f"{name} is {value}; it must be at least {least}")
    if s.warmup_ratio > 1:
        raise UserError(f"warmup_ratio is {s.warmup_ratio}; it is a share of the steps, at most 1")
    if not 0 < s.lr <= 1:
        raise UserError(f"lr is {s.lr}; it is above 0 and at most 1, as AdamW moves every weight by about as much")
    if s.log_to is not None and importlib.util.find_spec(s.log_to) is None:
        raise UserError(f"log_to {s.log_to}: it is not installed (pip install {s.log_to})")
    if s.resume and s.out is None:
        raise UserError("resume needs --out, the folder of the earlier run")
    for name in ("model", "dataset"):
        if getattr(s, name) is None:
            raise UserError(f"{name} is missing: give --{name}")


# ---- set-up ----------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """One training run: what it is made of, and how many steps it has done."""

    s: Settings
    objective: Objective
    device: torch.device
    tokenizer: object
    policy: ResponseLogProbs
    train: Sequence[Example]
    held_out: Sequence[Example]
    layout: str = "packed"  # that of all batches, or "padded"
    lock: object = None  # as long as it is held, nobody else writes to the output folder
    plan: list[list[int]] = field(default_factory=list)  # the training rows of each optimizer step
    ref: dict[str, Tensor] = field(default_factory=dict)  # reference log-probs of the training rows by name, (n, k) each
    ref_kl: list[Tensor] | None = None  # of the KL completions of each step of the plan
    held_out_inputs: dict[str, Tensor] = field(default_factory=dict)
    held_out_initial: Tensor | None = None  # (n, k) log-probs of the held-out rows under the initial model
    initial_answers: list[str] = field(default_factory=list)
    optimizer: torch.optim.Optimizer | None = None
    same: dict = field(default_factory=dict)  # what must be equal for a run to go on from a checkpoint of this one
    step: int = 0

    @property
    def outputs(self) -> tuple[str, ...]:
        """What each pass of the policy has to give besides log-probs."""
        return self.objective.outputs + (("log_sum_p_squared",) if self.s.wpo else ())

    def arithmetic(self):
        """bf16 autocast or nothing. One context spans one kind of pass, so weights are cast once in it."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.s.dtype == "bf16" else contextlib.nullcontext()

    def microbatches(self, examples: Sequence[Example]) -> list[tuple[list[int], data.Batch]]:
        """This rank's share of the examples, split by token count: (indices into examples, batch), as many for every rank."""
        sizes = [data.tokens_of(e) for e in examples]
        groups = data.split_by_tokens(sizes, self.s.tokens_per_microbatch, dist.world_size())
        mine = groups[dist.rank() :: dist.world_size()]
        make_batch = data.LAYOUTS[self.layout]
        return [(at, make_batch([examples[i] for i in at]).to(self.device)) for at in mine]


def prepare(s: Settings) -> Run:
    """Everything before the first step, what is quick to refuse first: a mistake should cost no loading."""
    objective = read_objective(s.objective)
    device = dist.setup(s.device)
    dist.mesh_sizes(s.mesh)
    data.reachable(s.model)
    out = dist.on_rank_0(prepare_out, s)
    s.out = str(out)
    earlier = dist.on_rank_0(marker, out) if s.resume else {}
    s.date = s.date or earlier.get("date") or dist.on_rank_0(time.strftime, "%Y-%m-%d")
    lock = dist.own(out)
    tokenizer = data.load_tokenizer(s.model, s.trust_remote_code)
    train_rows, held_out, reports = load_rows(s, tokenizer, objective)
    say(settings_table(s))
    if s.dtype == "auto":
        s.dtype = "bf16" if data.bf16_in_hardware(device) else "fp32"
    for name, report in reports.items():
        say(f"{name}: {report}")
    if data.asks_for_date(tokenizer):
        say(f"date: the chat template is told {s.date}, also where the run is resumed on another day (--date)")
    if 0 < len(held_out) < 50:  # the standard error of an accuracy is then about 0.07
        say(f"{len(held_out)} held-out rows are too few to compare runs by; take some hundreds (eval_size, eval_dataset)")
    extremes = {}
    train_hash, tokens = survey(train_rows, extremes)
    held_out_hash, _ = survey(held_out, extremes)
    answers = [e._replace(responses=[[0] * s.sample_tokens]) for e in held_out[: s.samples]]  # as long as they may become
    survey(answers, extremes)
    no_margin, e = extremes["without margin"]
    if no_margin and objective.needs("margin"):
        scores = "score_chosen and score_rejected (or all_rm_scores; tests/tools/on_policy.py makes them)"
        raise UserError(f"{objective.name} needs a margin of scores, but {e.where} has none; give {scores} in every row")
    policy = build_policy(s, objective, device, extremes)
    run = Run(s, objective, device, tokenizer, policy, train_rows, held_out, policy.layout, lock)
    run.plan = plan_steps(s, len(train_rows))
    if s.eval_every is None:
        s.eval_every = math.ceil(len(run.plan) / 10)
    say(headline(run, tokens))
    load = os.getloadavg()[0]
    if device.type == "cpu" and torch.get_num_threads() > 1 and load > os.cpu_count() + 0.5:
        say(f"this machine is busy (load {load:.1f} on {os.cpu_count()} cores): OMP_NUM_THREADS=1 may be faster")
    run.same = identity(run) | {"training rows (hash)": train_hash, "held-out rows (hash)": held_out_hash}
    dist.check_ranks(run.same)
    if earlier:
        dist.check_same(run.same, earlier, f"{out} belongs to another run")
    rows = {name: report._asdict() for name, report in reports.items()}
    dist.on_rank_0(write_whole, out / MARKER, json.dumps({"plainpo": run.same, "rows": rows}, indent=2) + "\n")
    stop_at_terminator(run.policy.model, tokenizer, data.template_arguments(s), say)
    with dist.StopOnSignal(at_once=True):
        score_initial_model(run)
    run.optimizer = make_optimizer(run)
    if s.resume:
        resume(run)
    return run


def read_objective(text: str) -> Objective:
    try:
        objective = parse_objective(text)
        try_objective(objective)
    except ValueError as error:
        raise UserError(str(error)) from error
    return objective


# ---- one step --------------------------------------------------------------------------------------------------------


def train_step(run: Run, rows: list[int]) -> dict:
    """One optimizer step on the training examples `rows`, equal on all ranks; returns its line of metrics.jsonl.

    The gradient of a microbatch is Σ (∂L/∂logp) · ∂logp/∂θ. The factors ∂L/∂logp come from the microbatch itself, or, where the
    rows of a batch depend on each other, from the log-probs of the whole batch.
    """
    s = run.s
    objective = run.objective
    tick = time.perf_counter()
    examples = [run.train[i] for i in rows]
    n = len(examples)  # of the optimizer step, all ranks together
    inputs = batch_inputs(run, examples, rows)  # {"len": (n, k), "ref": (n, k), "label": …}: known before the policy is asked
    k = inputs["len"].shape[1]
    losses_per_example = k if objective.unpaired else 1
    microbatches = run.microbatches(examples)  # of this rank: (indices into examples, batch)
    seed = [s.seed, run.step]
    whole = None  # of a coupled objective: losses and gradients of all rows
    if objective.coupled and len(microbatches) > 1:  # one that needs the whole batch: all log-probs before any gradient
        whole = objective.loss_and_grad(log_probs(run, examples, run.outputs, at_once=[n]), inputs, seed)
    scored = [i for at, _ in microbatches for i in at]
    losses = []
    passes = []
    with run.arithmetic():
        for number, (at, batch) in enumerate(microbatches, 1):
            dist.sync_gradients(run.policy, last=number == len(microbatches))
            outputs = {name: x.view(len(at), k) for name, x in run.policy(batch, run.outputs).items()}  # nats, with graph
            values = {name: x.detach() for name, x in outputs.items()}
            passes.append(values)
            index = to_device(torch.tensor(at, dtype=torch.long), run.device)
            if objective.coupled and whole is None:  # the only microbatch of each rank: its own pass is the one before
                whole = objective.loss_and_grad(gathered(scored, passes, n), inputs, seed)
            if whole is None:
                loss, grads = objective.loss_and_grad(values, {name: x[index] for name, x in inputs.items()}, seed)
                losses.append({"loss": loss.view(len(at), losses_per_example)})
            else:
                grads = {name: x[index] for name, x in whole[1].items()}
            # summed over microbatches and ranks, these are the gradient of the mean over all rows
            mean_grads = [x / (n * losses_per_example) for x in grads.values()]
            torch.autograd.backward([outputs[name] for name in grads], mean_grads)
    loss = whole[0] if whole is not None else gathered(scored, losses, n)["loss"].flatten()
    grad_norm = float(dist.clip_gradients(run.policy, s.max_grad_norm))  # the one place where the host waits for a GPU
    values = {name: x.cpu() for name, x in (inputs | gathered(scored, passes, n)).items()}
    loss = loss.cpu()
    stop_if_not_finite(run, examples, values["logp"], loss, grad_norm)
    if run.step == 0:
        check_first_step(run, examples, values)
    lr = learning_rate(run.step, len(run.plan), s)
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.step += 1
    line = {"step": run.step, **measures(objective, values, loss), "grad_norm": grad_norm, "lr": lr}
    return line | {"pairs": len(loss), "tokens": sum(map(data.tokens_of, examples)), "seconds": time.perf_counter() - tick}


# ---- the loop --------------------------------------------------------------------------------------------------------


def train(s: Settings) -> dict:
    """One run from settings to exported model; returns the summary that is also written to out/summary.json."""
    started = time.perf_counter()
    dist.setup(s.device)
    dist.check_ranks({name: value for name, value in asdict(s).items() if name not in PLACES})
    summary = dist.on_rank_0(finished, s)
    if summary:
        return summary
    run = prepare(s)
    writer = MetricsWriter(run)
    with dist.StopOnSignal() as stop:
        if run.held_out and run.step == 0:
            writer.evaluated(evaluate(run), run.initial_answers)
        for rows in writer.progress(run.plan[run.step :]):
            writer.stepped(train_step(run, rows))
            if run.held_out and due(run, s.eval_every) and run.step < len(run.plan):
                writer.evaluated(evaluate(run), answers(run))
            stopping = stop.requested()
            if stopping or due(run, s.save_every):
                save(run, stopping)
        return finish(run, writer, started)  # a signal that comes now no longer matters: the model is written first


def due(run: Run, every: int) -> bool:
    return every > 0 and run.step % every == 0


def save(run: Run, stopping: int = 0) -> bool:
    """Write a checkpoint and say whether it is there; end the run where the signal of number `stopping` asked for that."""
    state = {"step": run.step, "run": run.same}
    folder = Path(run.s.out) / "checkpoints"
    saved = dist.save_checkpoint(folder, run.policy.model, run.optimizer, state, run.s.keep, run.tokenizer)
    if stopping and not saved:
        raise UserError(f"stopped after step {run.step} without a checkpoint; --resume goes on from an earlier one")
    if stopping:
        say(f"stopped after step {run.step}; go on with --resume --out {run.s.out}")
        raise SystemExit(128 + stopping)  # the shell's code for it; 0 means that the model is there (ranks end with 0 always)
    return saved


def write_model(run: Run, card: str) -> None:
    """The trained model in out/model; where it cannot be written a checkpoint or, on a disk with no room for either, the model
    in the cache folder, which is most often on another one."""
    s = run.s
    model = run.policy.model
    rest = (export_dtype(s, model), card)
    if dist.not_finite(model):
        raise UserError(f"after the last step weights are not finite: nothing is in {s.out}/model. Lower lr")
    layout = run.policy.use_layout("padded")
    try:
        dist.export(model, run.tokenizer, Path(s.out) / "model", *rest)
    except Exception as error:  # whatever it is, the training is not lost
        if save(run):
            kept = f"all steps are done and kept in a checkpoint, from which --resume --out {s.out} goes on"
        else:
            folder = Path(s.cache).expanduser() / time.strftime("model-%Y%m%d-%H%M%S")
            dist.export(model, run.tokenizer, folder, *rest)
            kept = f"all steps are done; the model is in {folder}"
        raise UserError(f"{str(error).strip() or type(error).__name__}; {kept}") from error
    run.policy.use_layout(layout)


def finish(run: Run, writer: "MetricsWriter", started: float) -> dict:
    """After the last step: the model before anything else, then evaluation, curves, summary, report."""
    s = run.s
    out = Path(s.out)
    lines = writer.records["metrics.jsonl"]
    last = lines[-1] if lines else {}
    card = functools.partial(dist.model_card, {**asdict(s), "objective": str(run.objective)})
    write_model(run, card(last))
    if run.held_out and "eval_loss" not in last:
        writer.evaluated(evaluate(run), answers(run))
    evaluations = [line for line in lines if "eval_loss" in line] or [{}]
    before = evaluations[0]
    after = evaluations[-1]
    if not all(map(math.isfinite, after.values())):
        raise UserError(f"after the last step held-out losses are not finite: {out}/model is of no use. Lower lr")
    with optional("curves.png"):
        dist.on_rank_0(draw_curves, lines, out / "curves.png", f"{run.objective} on {Path(s.dataset).name}")
    # of the steps alone: evaluation, samples and checkpoints are not counted
    totals = {name: sum(line.get(name, 0) for line in lines) for name in ("pairs", "tokens", "seconds")}
    summary = {
        "objective": str(run.objective),
        "steps": len(run.plan),
        "rows": len(run.train),
        "held_out": len(run.held_out),
        "before": before,
        "after": after,
        "pairs_per_second": totals["pairs"] / max(totals["seconds"], 1e-9),
        "tokens_per_second": totals["tokens"] / max(totals["seconds"], 1e-9),
        "train_seconds": totals["seconds"],
        "seconds": time.perf_counter() - started,
        "peak_memory_gib": peak_memory(run.device),
        "dtype": s.dtype,
        "device": str(run.device),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__},
        "out": str(out),
    }
    with optional("a record of the run"):
        for name, records in writer.records.items():  # whole, should the disk have been full meanwhile
            dist.on_rank_0(write_whole, out / name, as_lines(records))
        dist.on_rank_0(write_whole, out / "model" / "README.md", card(last | after))
        dist.on_rank_0(write_whole, out / "summary.json", json.dumps(summary, indent=2) + "\n")
    report_end(run, summary, writer.records["samples.jsonl"])
    return summary


# ---- parts of the set-up: output folder, rows, model -----------------------------------------------------------------

MARKER = "run.json"  # in the folder of a run, and in no other: what the run is
PLACES = ("model", "dataset", "eval_dataset", "out", "cache")  # settings that may differ between the machines of a run


def prepare_out(s: Settings) -> Path:
    """The output folder, new or empty, or with `resume` that of an earlier run; nothing of a user's is ever deleted."""
    objectives = [word for word in re.split(r"\W+", s.objective) if word in OBJECTIVES]
    fresh = "-".join([time.strftime("%Y%m%d-%H%M%S"), *objectives])
    out = Path("runs", fresh) if s.out is None else Path(s.out)
    try:
        names = {path.name for path in out.iterdir()} if out.exists() else set()
        begun = ".lock" in names and names <= {".lock", "run.part", MARKER}  # by a run that did not come to its first step
        if s.resume and not begun and not marker(out):
            raise UserError(f"out {out} holds no run to resume (no {MARKER} of plainpo)")
        if names and not begun and not s.resume:
            held = "a run; use --resume" if marker(out) else "files; use an empty folder"
            raise UserError(f"out {out} already holds {held} or another folder")
        out.mkdir(parents=True, exist_ok=True)
        (out / ".lock").touch()
    except OSError as error:
        raise UserError(f"out {str(out)[:200]} cannot be written ({error.strerror})") from error
    return out


def read_json(file: Path) -> dict:
    """What a file of JSON holds; {} where there is none, or not a whole one."""
    try:
        return dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def marker(out: Path) -> dict:
    """What the run in a folder is, as `identity` says it; empty where it holds none. A checkpoint says it too, should the file
    be lost."""
    found = [read_json(out / MARKER).get("plainpo")]
    found += [read_json(checkpoint / "step.json").get("run") for checkpoint in dist.complete_checkpoints(out / "checkpoints")]
    return next((same for same in found if same and isinstance(same, dict)), {})


def finished(s: Settings) -> dict:
    """The summary of the run to resume; empty where it has not come to its end."""
    summary = read_json(Path(s.out) / "summary.json") if s.resume and marker(Path(s.out)) else {}
    if "steps" not in summary:
        return {}
    done = f"out {s.out} holds a finished run of {summary['steps']} steps: nothing to do"
    say(f"{done}. To train on from its model: --model {s.out}/model and another --out")
    return summary


def survey(rows: Iterable[Example], extremes: dict[str, tuple[int, Example]]) -> tuple[str, int]:
    """(hash, tokens) of rows that are read once. Of `extremes`, each behind its measure, it keeps up to date the longest row
    (prompt and longer response), the one of most tokens in all, the shortest, that of the highest id, one without a margin."""
    digest = hashlib.sha256()
    total = 0
    for e in rows:
        digest.update(json.dumps([e.prompt, e.responses, e.desirable, e.margin]).encode())
        tokens = data.tokens_of(e)
        total += tokens
        length = len(e.prompt) + max(map(len, e.responses))
        highest = max(itertools.chain(e.prompt, *e.responses))
        measures = {"longest": length, "largest": tokens, "shortest": -length, "highest id": highest}
        measures["without margin"] = e.margin is None
        for name, measure in measures.items():
            if name not in extremes or measure > extremes[name][0]:
                extremes[name] = (measure, e)
    return digest.hexdigest(), total


def load_rows(s: Settings, tokenizer, objective: Objective) -> tuple[Sequence[Example], Sequence[Example], dict]:
    """(training examples, held-out examples, reports of what was dropped), in the form the objective trains on."""
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
            raise UserError(f"{objective.name} compares pairs, but {e.where} is a labelled completion; use kto, bco or uapo")
    if not objective.unpaired and objective.responses == 1:  # only the chosen response is scored
        train_rows, held_out = train_rows.mapped(chosen_only), held_out.mapped(chosen_only)
    return train_rows, held_out, reports


def chosen_only(e: Example) -> Example:
    return e._replace(responses=e.responses[:1])


def build_policy(s: Settings, objective: Objective, device: torch.device, rows: dict[str, tuple]) -> ResponseLogProbs:
    """The model with fp32 weights, checked on the extremes of the rows, sharded over ranks, in the layout it is trained in;
    and the reference, where an objective needs its token KL. None is ever in training mode, which turns on dropout and noise.
    """
    several = dist.world_size() > 1
    longest_pack = min(s.tokens_per_microbatch, max(s.batch_size, AT_ONCE) * rows["largest"][0])

    def check(model: torch.nn.Module) -> str:
        if several:  # only here is the model whole, on the CPU; its first blocks are enough if they pass
            with contextlib.suppress(UserError, torch.OutOfMemoryError), first_blocks(model):
                return choose_layout(model.to(device), rows, s.layout, longest_pack)
        return choose_layout(model.to("cpu" if several else device), rows, s.layout, longest_pack)

    model, layout, weights = dist.load_model(s.model, s.trust_remote_code, check)
    aux = getattr(model.config.get_text_config(), "router_aux_loss_coef", None)
    if aux:
        say(f"router_aux_loss_coef {aux:g}: the load-balancing loss of this mixture of experts is not trained here")
    if s.compile:
        refuse_compile(layout, model, device)
    reference = copy.deepcopy(model).requires_grad_(False) if objective.needs("kl_w") else None
    checkpoints = s.keep + 1 if s.save_every else 0
    dist.on_rank_0(dist.check_space, Path(s.out), model, checkpoints, export_dtype(s, model))
    policy = dist.shard(ResponseLogProbs(model, reference), s.mesh, s.dtype == "bf16", s.gradient_checkpointing, s.compile)
    for part in (model, reference):
        if part is not None:
            dist.hand_out(part, weights, device)
    wrong = dist.not_finite(model)
    if wrong:
        raise UserError(f"{s.model}: {len(wrong)} weights of this model are not finite numbers, the first is {wrong[0]}")
    policy.use_layout(layout)
    return policy.train(False)


@contextlib.contextmanager
def first_blocks(model: torch.nn.Module) -> Iterator[None]:
    """A context in which a model has its first decoder blocks only: two, or as many as hold each kind that it has."""
    blocks = dist.decoder_blocks(model)
    types = getattr(model.config.get_text_config(), "layer_types", None) or [""] * len(blocks)
    kinds = [f"{kind} {block}" for kind, block in zip(types, blocks)]
    count = max([2, *(kinds.index(kind) + 1 for kind in kinds)])
    rest = list(blocks[count:])
    del blocks[count:]
    try:
        yield
    finally:
        blocks.extend(rest)


@torch.no_grad()
def choose_layout(model: torch.nn.Module, rows: dict[str, tuple[int, Example]], wanted: str, budget: int = 1) -> str:
    """The layout, packed or padded, in which a model's log-probs are its own; for auto the first of the two that is right.

    rows: extremes, see `survey`. Long rows show where windows and learned positions end, beside the shortest and, in a pack
    of `budget` tokens, beside themselves. Right are the `own_logprobs` of each response alone, in fp32. UserError where the
    layout that is wanted is wrong, for auto both, or the model cannot read the longest row or the highest id.
    """
    name = type(model).__name__
    highest, odd = rows["highest id"]
    embeddings = len(model.get_input_embeddings().weight)
    if highest >= embeddings:
        raise UserError(f"{odd.where} holds id {highest}, but {name} has only {embeddings} embeddings: no match")
    tokens, longest = rows["longest"]
    half = longest._replace(responses=[r[: max(1, len(r) // 2)] for r in longest.responses])  # padded, as encoders can see
    examples = list({str(e): e for e in (longest, rows["largest"][1], rows["shortest"][1], half)}.values())
    try:
        own = [own_logprobs(model, e.prompt, response) for e in examples for response in e.responses]
    except Exception as error:  # of any kind: positions that end, above all
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        where = f"{longest.where}, {tokens} tokens (its max_position_embeddings: {limit})"
        advice = "try a lower --max_length or --sample_tokens"
        raise UserError(f"{name} cannot read {where}: {data.brief(error)}; {advice}") from error
    policy = ResponseLogProbs(model)
    other = ""
    for layout in LAYOUTS[1:] if wanted == "auto" else (wanted,):
        times = max(1, budget // sum(map(data.tokens_of, examples))) if layout == "packed" else 1
        problem = layout_problem(policy, layout, examples * times, own * times)
        if not problem:
            say(f"layout: {layout}{other}; checked in fp32 on the longest row and the shortest")
            return layout
        other = f", as packed {problem}"
    if layout == "packed":
        raise UserError(f"{name}: packed {problem}; use --layout padded")
    cause = "it sees padding, or reads a row otherwise beside a longer one (then a lower --max_length helps)"
    head = "it has more behind its last hidden states than a head of weight, bias, logit scale and soft-cap"
    raise UserError(f"{name} cannot be trained: padded {problem}; {cause}, or {head}")


def layout_problem(policy: ResponseLogProbs, layout: str, examples: list[Example], own: list[tuple[Tensor, float]]) -> str:
    """What is wrong with a model's log-probs of one batch, whose responses have `own_logprobs`; "" where nothing is.

    Differences are averaged over a response, as rounding may hand a token near a tie to another expert.
    """
    batch = data.LAYOUTS[layout](examples)
    tokens = len(batch.targets)
    batch = batch._replace(response=torch.arange(tokens), responses=tokens).to(policy.model.device)  # sums of one token
    try:
        policy.use_layout(layout)
        first = policy(batch)["logp"]
        again = policy(batch)["logp"]
    except Exception as error:  # of any kind: what a model does with a batch that it does not know
        return f"it fails ({type(error).__name__}: {data.brief(error)})"
    finally:
        policy.use_layout("padded")
    if not torch.equal(first.view(torch.int32), again.view(torch.int32)):  # bit for bit, and NaN is NaN
        return "it gives other numbers when the same batch is scored twice: something random is left in it"
    spread = own[0][1]  # an untrained model's logits hardly differ, nor do its errors
    bound = 1e-4 * min(1.0, max(0.01, spread))  # nats per token, for rounding in fp32
    logps = first.split([len(logp) for logp, _ in own])
    for ours, (theirs, _) in zip(logps, own):
        finite = theirs.isfinite()  # the others are named when weights and losses are looked at
        apart = (ours - theirs)[finite].abs().sum().item() / max(1, len(theirs))
        if not apart <= bound:
            return f"its log-probs differ from the model's own by {apart:.2g} nats per token (bound {bound:.1g})"
    return ""


def refuse_compile(layout: str, model: torch.nn.Module, device: torch.device) -> None:
    """UserError where nothing would be compiled, or where the compiler does not work: it is tried on a line of code."""
    if layout != "packed":
        raise UserError(f"compile works on packs; with --layout {layout} leave it out")
    if not model._can_set_attn_implementation():
        raise UserError(f"compile: {type(model).__name__}'s attention is its own, so nothing would be compiled; leave it out")
    try:
        torch.compile(lambda x: x.exp() + 1)(torch.ones(8, device=device))
    except Exception as error:  # of many kinds, with pages of what the compiler said
        why = data.brief(error)
        raise UserError(f"compile: torch.compile does not work here ({why}); install g++ or leave it out") from error


def stop_at_terminator(model: torch.nn.Module, tokenizer, template: dict, say: Callable[[str], None]) -> None:
    """Let generation end, here and by the exported generation_config, where trained responses end; said if it did not."""
    end = data.terminator(tokenizer, template)
    config = model.generation_config  # None of a model that cannot generate
    stops = getattr(config, "eos_token_id", None)
    if not isinstance(stops, list):
        stops = [] if stops is None else [stops]
    if end is None:
        mend = "let it write eos_token behind assistant turns"
        say(f"the chat template writes no special token behind a response, so no ending is taught: {mend}")
    elif config is not None and end not in stops:
        ends = f"the chat template ends a response with {tokenizer.convert_ids_to_tokens(end)} ({end})"
        say(f"{ends}, which is not among this model's eos_token_id {stops}: here, and in what is exported, it is")
        config.eos_token_id = [*stops, end]


def export_dtype(s: Settings, model: torch.nn.Module) -> torch.dtype:
    came_in = model.config.dtype if isinstance(model.config.dtype, torch.dtype) else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "auto": came_in}[s.export_dtype]


AT_ONCE = 256  # examples that are made into microbatches together, where there are no steps


@torch.no_grad()
def log_probs(
    run: Run, examples: Sequence[Example], outputs: tuple[str, ...] = (), progress: str = "", at_once: Sequence[int] = ()
) -> dict[str, Tensor]:
    """Sequence log-probs of all responses, "logp", and what `outputs` names, without gradient: (n, k) each, on every rank.

    at_once: how many examples, one after the other, are made into microbatches together; without it AT_ONCE.
    """
    k = len(examples[0].responses)
    rows = []
    passes = []
    bar = data.progress(None, progress, "batches", disable=not progress or not dist.is_rank_0())
    start = 0
    with bar, run.arithmetic():
        for count in at_once or [AT_ONCE] * math.ceil(len(examples) / AT_ONCE):
            for at, batch in run.microbatches(examples[start : start + count]):
                rows += [start + i for i in at]
                passes.append({name: x.view(len(at), k) for name, x in run.policy(batch, outputs).items()})
                bar.update()
            start += count
    return gathered(rows, passes, len(examples))


def gathered(rows: list[int], passes: list[dict[str, Tensor]], total: int) -> dict[str, Tensor]:
    """The numbers of all ranks' rows from those of this rank's microbatches; `rows` says which rows these are."""
    index = torch.tensor(rows, dtype=torch.long)
    return {name: dist.gather_rows(index, torch.cat([one[name] for one in passes]), total) for name in passes[0]}


def plan_steps(s: Settings, rows: int) -> list[list[int]]:
    """The training rows of each optimizer step, from the first step to the last."""
    in_epoch = math.ceil(rows / s.batch_size)
    steps = min(s.epochs * in_epoch, s.max_steps or math.inf)
    if steps > 10**7:
        raise UserError(f"epochs {s.epochs} over {rows} rows are {steps} steps, above 10 million; set max_steps")
    plan = []
    for epoch in range(math.ceil(steps / in_epoch)):
        plan += [batch.tolist() for batch in data.step_plan(rows, s.batch_size, s.seed, epoch)]
    return plan[:steps]


def identity(run: Run) -> dict:
    """What must be equal for a run to go on from a checkpoint, besides its rows: all that numbers depend on but the ranks."""
    s = run.s
    same = {"model": Path(s.model).name, "dataset": Path(s.dataset).name, "objective": str(run.objective)}
    same |= {"device": run.device.type, "layout": run.layout, "initial weights (hash)": run.policy.model.initial_hash}
    if data.asks_for_date(run.tokenizer):  # else no id depends on it
        same["date"] = s.date
    names = ("lr", "batch_size", "epochs", "max_steps", "warmup_ratio", "weight_decay", "max_grad_norm", "seed", "max_length",
             "tokens_per_microbatch", "wpo", "dtype")  # fmt: skip
    same |= {name: getattr(s, name) for name in names}
    for term in run.objective.terms:
        file = term.name.rpartition(":")[0]  # of a function of the user's own
        if file:
            same[f"{file} (bytes, CRC-32)"] = data.checksum(Path(file).expanduser())
    return same


def hash_of(values: Iterable) -> str:
    """Of values as JSON, taken one after the other: the text of all rows is gigabytes."""
    digest = hashlib.sha256()
    for value in values:
        digest.update(json.dumps(value).encode())
    return digest.hexdigest()


def score_initial_model(run: Run) -> None:
    """What the initial model says of every row and answers to the sample prompts: the reference, and where the run set out."""
    needs_ref = run.objective.needs("ref")
    needs_ref_kl = run.objective.needs("ref_kl")
    if needs_ref:  # in the microbatches of the first epoch's steps; of later epochs, which mix other rows, to rounding
        first_epoch = run.plan[: math.ceil(len(run.train) / run.s.batch_size)]
        order = [i for rows in first_epoch for i in rows]
        scored = reference_logps(run, run.train[order], "rows", [len(rows) for rows in first_epoch])
        for name, x in scored.items():
            run.ref[name] = x.new_full((len(run.train), x.shape[1]), math.nan)  # stays where max_steps leaves rows out
            run.ref[name][order] = x
    if needs_ref_kl:
        groups = [kl_completions([run.train[i] for i in rows]) for rows in run.plan]
        sizes = [len(group) for group in groups]
        everything = [e for group in groups for e in group]
        run.ref_kl = list(reference_logps(run, everything, "KL completions", sizes)["ref"].flatten().split(sizes))
    if run.held_out:
        inputs = counted_inputs(run.held_out, run.device)
        if needs_ref:
            inputs |= reference_logps(run, run.held_out, "held-out rows")
        if needs_ref_kl:
            ref_kl = reference_logps(run, kl_completions(run.held_out), "held-out KL completions")["ref"]
            inputs["ref_kl"] = ref_kl.flatten()
        run.held_out_inputs = inputs
        run.held_out_initial = inputs["ref"] if needs_ref else log_probs(run, run.held_out)["logp"]
    run.initial_answers = answers(run)


def kl_completions(examples: Sequence[Example]) -> list[Example]:
    """For KTO's estimate of the KL: each prompt with a completion that answers another prompt, the next such one in the batch,
    in a circle."""
    completions = [(e.prompt, r) for e in examples for r in e.responses]
    found = []
    for i, (prompt, _) in enumerate(completions):
        following = completions[i + 1 :] + completions[:i]
        other = next((response for its_prompt, response in following if its_prompt != prompt), None)
        if other is None:
            raise UserError("kto needs two different prompts in every optimizer batch; raise batch_size or mix the data")
        found.append(Example(prompt, [other], where=examples[0].where))
    return found


def reference_logps(run: Run, examples: Sequence[Example], what: str, at_once: Sequence[int] = ()) -> dict[str, Tensor]:
    """Reference log-probs of `examples`, "ref" and, if the objective asks for it, "ref_prefix_logp", (n, k) each: the policy's
    own, before it has learnt anything, kept as numbers. at_once: see `log_probs`.

    Cached as safetensors under a hash of everything that they depend on, to the last bit: weights, token ids (so tokenizer,
    template, data and truncation), arithmetic, what decides the microbatches, and the machine.
    """
    s = run.s
    names = {"logp": "ref"}
    if run.objective.needs("ref_prefix") and len(examples[0].responses) > 1:
        names["prefix_logp"] = "ref_prefix_logp"
    cpu = [platform.node(), torch.get_num_threads()]
    machine = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else cpu
    how = [run.layout, s.tokens_per_microbatch, dist.world_size(), at_once, s.dtype, s.compile, machine]
    how += [torch.__version__, transformers.__version__, run.policy.model.initial_hash]
    key = hash_of(itertools.chain(how, ([e.prompt, e.responses] for e in examples)))
    file = Path(s.cache).expanduser() / f"reference-{key[:32]}.safetensors"
    found = dist.on_rank_0(dist.load_tensors, file) or {}
    if found.keys() >= set(names.values()):
        say(f"reference log-probs of {len(examples)} {what} from {file}")
        return {name: found[name].to(run.device) for name in names.values()}
    scored = log_probs(run, examples, tuple(names), f"reference, {what}", at_once)
    ref = {names[name]: x for name, x in scored.items()}
    dist.on_rank_0(dist.save_tensors, ref, file)
    return ref


def make_optimizer(run: Run) -> torch.optim.Optimizer:
    """AdamW; weight decay acts on matrices, not on gains and biases."""
    matrices = [p for p in run.policy.model.parameters() if p.ndim >= 2]
    others = [p for p in run.policy.model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": run.s.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), eps=1e-8, fused=True)


def resume(run: Run) -> None:
    """Go to where the newest complete checkpoint stands."""
    checkpoint = dist.newest_checkpoint(Path(run.s.out) / "checkpoints", say)
    if checkpoint is None:
        say("no checkpoint; starting from step 0")
        return
    run.step = dist.load_checkpoint(checkpoint, run.policy.model, run.optimizer, run.same)["step"]
    say(f"resumed after step {run.step} from {checkpoint}")


# ---- parts of a step -------------------------------------------------------------------------------------------------


def batch_inputs(run: Run, examples: list[Example], rows: list[int]) -> dict[str, Tensor]:
    """What a step's objective asks for besides the policy's own pass: counts, labels, margins, reference log-probs."""
    inputs = counted_inputs(examples, run.device)
    inputs |= {name: x[rows] for name, x in run.ref.items()}
    if run.ref_kl is not None:
        inputs["ref_kl"] = run.ref_kl[run.step]
        completions_of_others = kl_completions(examples)
        logp_kl = log_probs(run, completions_of_others, at_once=[len(completions_of_others)])["logp"]
        inputs["logp_kl"] = logp_kl.flatten()
    return inputs


def counted_inputs(examples: Sequence[Example], device) -> dict[str, Tensor]:
    """What the examples themselves say: "len" and "label", (n, k), and "margin", (n,), where all have one."""
    lengths = []
    labels = []
    for e in examples:
        lengths.append([len(r) for r in e.responses])
        labels.append([True, False][: len(e.responses)] if e.desirable is None else [e.desirable])
    inputs = {"len": torch.tensor(lengths), "label": torch.tensor(labels)}
    margins = [e.margin for e in examples]
    if None not in margins:
        inputs["margin"] = torch.tensor(margins)
    return {name: to_device(x, device) for name, x in inputs.items()}


def stop_if_not_finite(run: Run, examples: list[Example], logp: Tensor, loss: Tensor, grad_norm: float) -> None:
    """End the run before the weights are touched, naming the rows whose loss or log-prob is not a finite number."""
    bad = ~torch.isfinite(loss.view(len(examples), -1)).all(-1) | ~torch.isfinite(logp).all(-1)
    if not bad.any() and math.isfinite(grad_norm):
        return
    rows = [e.where for e, b in zip(examples, bad.tolist()) if b] or [e.where for e in examples]
    what = "loss" if bad.any() else "gradient"
    said = f"the {what} of {len(rows)} rows is not finite; the weights were left as they were before this step. The first: "
    said += f"{'; '.join(rows[:8])}. Look at them with `python data.py show`; if they are sound, lower lr"
    if run.step > 0 and save(run):
        kept = f"{run.s.out}/checkpoints/step-{run.step:06d}"
        said += f". To go on without them (--resume would come to them again): `python distributed.py export {kept} NEW "
        said += "--dtype fp32`, take them out of the data, and start a run with --model NEW"
    raise UserError(said)


def check_first_step(run: Run, examples: list[Example], values: dict[str, Tensor]) -> None:
    """Compare policy and reference; name the weights that no gradient has reached, such as those of a vision tower."""
    exact = run.device.type == "cpu" and not run.s.compile  # else it is chosen anew how to add up
    if exact and not torch.equal(values["logp"], values.get("ref", values["logp"])):  # kernels may differ with gradients: Doge
        exact = not torch.equal(log_probs(run, examples, at_once=[len(examples)])["logp"].cpu(), values["ref"])
    rounding = 0.1 if run.s.dtype == "bf16" else 1e-3
    check_step_zero(values, 0.0 if exact else rounding)
    names = [name for name, p in run.policy.model.named_parameters() if p.grad is None]
    if names:
        say(f"no gradient reaches {len(names)} weights, which stay as they are: {', '.join(names[:4])} …")


def check_step_zero(values: dict[str, Tensor], bound: float) -> None:
    """Before the first update policy and reference are the same model: every log-ratio, reward and KL must be 0."""
    differences = [values["logp"] - values["ref"]] if "ref" in values else []
    differences += [values["kl"]] if "kl" in values else []
    if not differences:
        return
    gap = max((x / values["len"]).abs().max().item() for x in differences)
    say(f"step 0: policy and reference differ by at most {gap:.2g} nats per token (bound {bound:g})")
    if not gap <= bound:
        raise UserError(f"step 0: policy and reference differ by {gap:.3g} nats per token: not scored alike, or not one model")


def learning_rate(step: int, steps: int, s: Settings) -> float:
    """Linear warm-up over warmup_ratio of the steps, then a half cosine down to zero. `step` counts from 0."""
    warmup = max(1, round(s.warmup_ratio * steps))
    if step < warmup:
        return s.lr * (step + 1) / warmup
    return s.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def measures(objective: Objective, values: dict[str, Tensor], loss: Tensor) -> dict[str, float]:
    """Loss and rewards of a batch, from a step's inputs and the outputs of the policy's pass.

    reward_chosen, reward_rejected: means over the chosen (desirable) and the rejected (undesirable) responses. Pairs:
    reward_margin is the mean of r_w − r_l, reward_accuracy the share of pairs with r_w > r_l (a tie counts ½). Unpaired rows:
    the difference of mean rewards, desirable minus undesirable, and the share of all (desirable, undesirable) couples in the
    right order. Log-probs per token are Σ logp / Σ tokens over the chosen (desirable) and rejected ones.
    """
    logp = values["logp"]
    length = values["len"]
    label = values["label"]
    ref = values["ref"] if "ref" in values else torch.zeros_like(logp)
    reward = objective.reward(logp, ref, length)
    means = {"loss": loss.mean().item()}
    good = reward[label]
    bad = reward[~label]
    means |= {f"reward_{side}": x.mean().item() for side, x in (("chosen", good), ("rejected", bad)) if len(x)}
    if len(good) and len(bad):
        paired = reward.shape[1] == 2
        difference = (reward[:, 0] - reward[:, 1]) if paired else (good[:, None] - bad[None, :]).flatten()
        means["reward_margin"] = difference.mean().item()
        means["reward_accuracy"] = (0.5 * (1 + difference.sign())).mean().item()
    for side, mask in (("w", label), ("l", ~label)):
        if mask.any():
            means[f"logp_{side}_per_token"] = (logp[mask].sum() / length[mask].sum()).item()
    return means


# ---- parts of the loop: evaluation and records -----------------------------------------------------------------------


def evaluate(run: Run) -> dict[str, float]:
    """Measures of the held-out rows as one batch, each name with eval_ in front.

    eval_drift, nats per token, is the mean over responses of (initial log-prob − log-prob now) / length. It estimates
    KL(initial ‖ now) per token only if the responses are the initial model's own samples (then ≥ 0 up to noise); of other texts
    it says by how much they became less likely, below 0 where more likely. Of pairs, …_se is the standard error of a mean's
    change since step 0, over the changes of each pair.
    """
    inputs = dict(run.held_out_inputs)
    outputs = log_probs(run, run.held_out, run.outputs, progress="evaluate")
    if run.objective.needs("logp_kl"):
        inputs["logp_kl"] = log_probs(run, kl_completions(run.held_out))["logp"].flatten()
    loss = run.objective.row_losses(outputs, inputs, [run.s.seed])
    means = measures(run.objective, inputs | outputs, loss)
    means["drift"] = ((run.held_out_initial - outputs["logp"]) / inputs["len"]).mean().item()
    if inputs["label"].shape[1] == outputs["logp"].shape[1] == 2:
        now = pair_margins(run.objective, outputs["logp"], inputs)
        initial = pair_margins(run.objective, run.held_out_initial, inputs)
        changes = {"reward_margin": now - initial, "reward_accuracy": (now.sign() - initial.sign()) / 2}
        means |= {f"{name}_se": (x.std(correction=0) / math.sqrt(len(x))).item() for name, x in changes.items()}
    return {f"eval_{name}": value for name, value in means.items()}


def pair_margins(objective: Objective, logp: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """r_w − r_l of pairs, (n,)."""
    ref = inputs["ref"] if "ref" in inputs else torch.zeros_like(logp)
    reward = objective.reward(logp, ref, inputs["len"])
    return reward[:, 0] - reward[:, 1]


def answers(run: Run) -> list[str]:
    """Greedy answers to the prompts of the first held-out rows."""
    prompts = [e.prompt for e in run.held_out[: run.s.samples]]
    texts = []
    layout = run.policy.use_layout("padded")  # the model's own attention, which generation needs
    how = dict(max_tokens=run.s.sample_tokens, together=dist.world_size() > 1)
    for i in range(0, len(prompts), 32):
        try:
            some, _ = run.policy.run_unsharded(completions, run.tokenizer, prompts[i : i + 32], **how)
        except Exception as error:  # of any kind, of the model or of what its generation config asks for
            raise UserError(f"the model cannot answer ({data.brief(error)}); --samples 0 trains without answers") from error
        texts += some
    run.policy.use_layout(layout)
    return texts


def say(text: str) -> None:
    if dist.is_rank_0():
        data.say(text)


MEASURES = {  # of an evaluation, as its table calls them
    "loss": "loss",
    "reward_margin": "reward margin",
    "reward_accuracy": "reward accuracy",
    "reward_chosen": "reward chosen",
    "reward_rejected": "reward rejected",
    "logp_w_per_token": "nats/token chosen",
    "logp_l_per_token": "nats/token rejected",
}
# of a step, on the progress bar, beside its number and the time that is left
SHOWN = ("loss", "reward_margin", "reward_accuracy", "lr", "grad_norm", "tokens_per_second", "peak_memory_gib")


def table(held_out: int, rows: dict[str, dict]) -> list[str]:
    """Evaluations, {when: numbers}, as lines under a heading of two."""
    words = [title.rpartition(" ") for title in MEASURES.values()]
    lines = [f"{f'{held_out} held out':<14}" + "".join(f"{word:>12}" for word, _, _ in words)]
    lines.append(" " * 14 + "".join(f"{word:>12}" for _, _, word in words))
    for when, numbers in rows.items():
        cells = [numbers.get(f"eval_{name}") for name in MEASURES]
        lines.append(f"{when:<14}" + "".join(f"{'' if x is None else format(x, '.4f'):>12}" for x in cells).rstrip())
    return lines


def headline(run: Run, tokens: int) -> str:
    """What is about to be trained, in one line."""
    s = run.s
    parameters = sum(p.numel() for p in run.policy.model.parameters())
    kind = "pairs" if run.train[0].desirable is None else "completions"
    mesh = "x".join(map(str, dist.mesh_sizes(s.mesh)))
    ranks = f", {dist.world_size()} ranks (mesh {mesh})" if dist.world_size() > 1 else ""
    rows = f"{len(run.train):,} {kind} ({tokens:,} tokens), {len(run.plan):,} steps of {s.batch_size} {kind}"
    return f"{run.objective}: {parameters / 1e6:.4g} M parameters, {rows}, {s.dtype}, {run.device}{ranks}"


class MetricsWriter:
    """Appends to metrics.jsonl and samples.jsonl, says what happens, and sends the metrics where log_to says."""

    def __init__(self, run: Run):
        self.run = run
        self.out = Path(run.s.out)
        self.records = dist.on_rank_0(open_records, run)  # {file: its lines}
        self.send = open_log(run.s, self.out)
        self.prompts = [run.tokenizer.decode(e.prompt) for e in run.held_out[: run.s.samples]]
        self.warned = set()
        self.table_said = None  # when the last line of the table of evaluations was said

    def progress(self, plan: list[list[int]]) -> Iterator[list[int]]:
        """The rows of each step that is left, on a progress bar."""
        steps = len(self.run.plan)
        self.bar = data.progress(plan, "train", "steps", steps, self.run.step, disable=not dist.is_rank_0())
        yield from self.bar

    def stepped(self, line: dict) -> None:
        """Record a step, with its speed."""
        line["tokens_per_second"] = line["tokens"] / max(line["seconds"], 1e-9)  # should a clock stand still
        self._append("metrics.jsonl", line)
        line["peak_memory_gib"] = peak_memory(self.run.device)
        names = SHOWN[:3] if data.is_watched() else SHOWN  # a terminal has room for some
        shown = {name.removeprefix("reward_"): f"{line[name]:.3g}" for name in names if name in line}
        self.bar.set_postfix(shown, refresh=False)

    def evaluated(self, line: dict, texts: list[str]) -> None:
        """Record an evaluation and the answers to the sample prompts; warn, once each, of what looks like divergence."""
        step = self.run.step
        if texts:
            line = line | {"repetition": repetition(texts)}
        self._append("metrics.jsonl", {"step": step, **line})
        for prompt, text in zip(self.prompts, texts):
            self._append("samples.jsonl", {"step": step, "prompt": prompt, "answer": text})
        initial = self.records["metrics.jsonl"][0]
        lines = table(len(self.run.held_out), {"before": initial, f"step {step}": line} if step else {"before": line})
        begun = self.table_said is not None and (data.is_watched() or time.monotonic() - self.table_said < data.DRAWN_EVERY)
        lines = lines[-1:] if begun else lines  # elsewhere lines of progress stand between
        if texts:
            lines.append(f"  {self.run.held_out[0].asked!r} → {texts[0][:160]!r}")
        say("\n".join(lines))
        self.table_said = time.monotonic()
        for guard, warning in divergence(initial, line).items():
            if guard not in self.warned:
                say(f"warning: {warning}. Lower lr (try a third), or stop earlier: --eval-every shows where it began")
                self.warned.add(guard)

    def _append(self, name: str, record: dict) -> None:
        self.records[name].append(record)
        with optional(self.out / name):
            if dist.is_rank_0():
                with open(self.out / name, "a", encoding="utf-8") as file:
                    file.write(as_lines([record]))
            if name == "metrics.jsonl":
                self.send(record)


def settings_table(s: Settings) -> str:
    """What differs from the defaults, a line each."""
    unsaid = ("resume", "date", "out")  # the date is said where it matters
    changed = {f.name: getattr(s, f.name) for f in fields(s) if f.name not in unsaid and getattr(s, f.name) != f.default}
    width = max(map(len, changed))
    lines = [f"  {name:<{width}}  {value}" for name, value in changed.items()]
    return "\n".join([f"settings that are not the defaults (all are in {s.out}/settings.json):", *lines])


def open_records(run: Run) -> dict[str, list[dict]]:
    """Write the settings; of earlier records keep those up to the step resumed from, and return them."""
    s = run.s
    out = Path(s.out)
    (out / "checkpoints").mkdir(exist_ok=True)
    kept = {}
    for name in ("metrics.jsonl", "samples.jsonl"):
        lines = read_lines(out / name, "step", int)
        kept[name] = [line for line in lines if run.step and line["step"] <= run.step]
        write_whole(out / name, as_lines(kept[name]))
    settings = {name: value for name, value in asdict(s).items() if name != "resume"} | {"objective": str(run.objective)}
    for name in ("model", "dataset", "eval_dataset"):  # a leading ./ would mean the record's own folder
        if settings[name] is not None:
            settings[name] = re.sub(r"(^|,\s*)\./", r"\1", settings[name])
    write_whole(out / "settings.json", json.dumps(settings, indent=2) + "\n")
    return kept


def read_lines(file: Path, key: str, kind: type) -> list[dict]:
    """The records of a file of JSON lines, which have a key of this kind. What is no record is passed over, and said."""
    lines = []
    passed = []
    texts = file.read_text(encoding="utf-8", errors="replace").split("\n") if file.exists() else []
    for number, text in enumerate(texts, 1):
        try:
            record = dict(json.loads(text))
        except (ValueError, TypeError, RecursionError):  # such as one that was half-written when the process was killed
            record = {}
        if isinstance(record.get(key), kind):
            lines.append(record)
        elif text:
            passed.append(str(number))
    if passed:
        say(f"{file}: left out what is no record of a run: line {', '.join(passed)}")
    return lines


def as_lines(records: list[dict]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def write_whole(file: Path, text: str) -> None:
    """Write a file, whole or not at all, whatever becomes of the machine."""
    part = file.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    dist.flush(part)
    os.replace(part, file)


say_once = functools.cache(say)


@contextlib.contextmanager
def optional(what: str | Path) -> Iterator[None]:
    """Around what no training depends on: an error there is a warning."""
    try:
        yield
    except Exception as error:  # of many kinds: a full disk, a network, fonts
        say_once(f"warning: {what} failed, the run goes on ({str(error).strip() or type(error).__name__})")


def repetition(texts: list[str]) -> float:
    """Share of all word 3-grams of the texts that occurred before in the same text, from 0 to near 1; 0 if there are none."""
    total = 0
    different = 0
    for text in texts:
        words = text.split()
        grams = list(zip(words, words[1:], words[2:]))
        total += len(grams)
        different += len(set(grams))
    return 1 - different / total if total else 0.0


def divergence(initial: dict, now: dict) -> dict[str, str]:
    """{guard: warning with advice} of an evaluation against the one at step 0; what is not recorded gives no warning.

    The bounds are ours, between what good and what spoilt runs of small models showed.
    """
    warnings = {}
    repeated = now.get("repetition", 0.0)
    if repeated > max(0.4, initial.get("repetition", 0.0) + 0.2):
        grams = f"{repeated:.0%} of their word 3-grams occurred before in the same answer"
        warnings["repetition"] = f"the sample completions repeat themselves: {grams}. Read samples.jsonl"
    lost = now.get("eval_drift", 0.0)
    if lost > 1.5:
        far = f"held-out responses have lost {lost:.2f} nats per token"
        warnings["drift"] = f"{far}. Objectives with a reference hold on to it with a larger beta"
    was = initial.get("eval_logp_w_per_token", -math.inf)
    is_now = now.get("eval_logp_w_per_token", 0.0)
    if is_now < was - 1 and is_now < 2 * was:
        change = f"{was:.2f} → {is_now:.2f} nats per token on held-out rows"
        warnings["collapse"] = f"the chosen responses themselves become unlikely: {change}. A term + 0.1*sft holds them up"
    return warnings


def open_log(s: Settings, out: Path) -> Callable[[dict], None]:
    """A function that sends one metrics line to tensorboard or wandb, or nowhere."""
    if s.log_to is None or not dist.is_rank_0():
        return lambda line: None
    if s.log_to == "wandb":
        import wandb

        wandb.init(project="plainpo", config=asdict(s), dir=str(out))
        return lambda line: wandb.log(line, step=line["step"])
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(out / "tensorboard"))

    def send(line: dict) -> None:
        for name, value in line.items():
            writer.add_scalar(name, value, line["step"])
        writer.flush()

    return send


def peak_memory(device: torch.device) -> float:
    """Highest memory in use so far, GiB: of the GPU, or resident memory of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


CURVES = {  # title of a panel: its lines, {metric: what it is of}
    "loss": {"loss": ""},
    "reward margin": {"reward_margin": ""},
    "reward accuracy": {"reward_accuracy": ""},
    "log-prob per token (nats)": {"logp_w_per_token": "chosen, ", "logp_l_per_token": "rejected, "},
}
CURVE_STYLES = (("", "training", dict(alpha=0.45, lw=1.2)), ("eval_", "held out", dict(marker="o", ms=4.5, lw=2)))


def draw_curves(lines: list[dict], path: Path, title: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 5.6), layout="constrained")  # 900 pixels wide, for letters as large as a page's
    for axis, (name, curves) in zip(figure.subplots(2, 2).flat, CURVES.items()):
        for colour, (key, side) in enumerate(curves.items()):
            for prefix, rows, style in CURVE_STYLES:
                points = [(line["step"], line[prefix + key]) for line in lines if prefix + key in line]
                if points:
                    axis.plot(*zip(*points), color=f"C{colour}", label=side + rows, **style)
        axis.set(title=name, xlabel="step")
        if axis.lines:
            axis.legend(fontsize=8.5, framealpha=0.6, labelspacing=0.2)
    figure.suptitle(title.replace("$", r"\$"), fontsize=10, wrap=True)  # a $ in a name is a $
    figure.savefig(path, dpi=120)


def report_end(run: Run, summary: dict, samples: list[dict]) -> None:
    """On standard output, what a run has to show: held-out numbers and answers before and after, speed, where the model is."""
    before = summary["before"]
    after = summary["after"]
    errors = {name.removesuffix("_se"): x for name, x in after.items() if name.endswith("_se")}
    changes = {name: after[name] - before[name] for name in errors}
    lines = [f"{run.objective}, {run.step} steps"]
    if run.held_out:
        rows = {"before": before, "now": after, "change": changes, "± its s. e.": errors}
        lines += table(len(run.held_out), rows if errors else {"before": before, "now": after})
    for name, change in changes.items():
        if abs(change) <= errors[name]:
            lines.append(f"the change of {MEASURES[name.removeprefix('eval_')]} is within its standard error")
    texts = [sample["answer"] for sample in samples if sample["step"] == run.step]
    if texts:
        words = [statistics.mean(len(text.split()) for text in of) for of in (run.initial_answers, texts)]
        lines.append(f"words per sample answer: {words[0]:.1f} before, {words[1]:.1f} now")
    for e, was, is_now in list(zip(run.held_out, run.initial_answers, texts))[:3]:
        lines += [f"  prompt  {e.asked!r}", f"  before  {was[:160]!r}", f"  now     {is_now[:160]!r}"]
    speed = f"{summary['pairs_per_second']:.2f} rows/s while training"
    lines.append(f"{speed}, {summary['seconds']:.0f} s in all, peak memory {summary['peak_memory_gib']:.2f} GiB")
    lines.append(f"The model is in {summary['out']}/model. To talk to it: python tests/tools/chat.py {summary['out']}/model")
    if dist.is_rank_0():
        print("\n".join(map(data.visible, lines)))


# ---- the command line -------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None, work: Callable = lambda argv: train(parse_settings(argv))) -> dict:
    """The command line as a function; returns the summary. A user error ends with a message and exit code 2."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages for large CPU tensors: far fewer page faults
    with contextlib.suppress(AttributeError):  # glibc then keeps what a step frees for the next one: hardly any page faults
        ctypes.CDLL(None).mallopt(-1, -1)  # M_TRIM_THRESHOLD: never
        ctypes.CDLL(None).mallopt(-3, 2**28)  # M_MMAP_THRESHOLD: from 256 MiB on, larger ones would leave holes
    stopped = "stopped at once: --resume goes on from the last checkpoint, if there is one"
    return data.command_line(work, argv, dist.fail, stopped, logs=("stdout", "stderr"))


if __name__ == "__main__":
    main()
