"""How fast is one training step, and how much memory does it take? Measured side by side, never asserted.

    python tests/studies/benchmark.py --model MODEL --dataset PAIRS.jsonl --out runs/benchmark.json
    python tests/studies/benchmark.py --model MODEL --dataset PAIRS.jsonl --peer trl      # and trl's trainers on the same pairs
    python tests/studies/benchmark.py --model MODEL --dataset PAIRS.jsonl --profile       # and where the time of a step goes
    python tests/studies/benchmark.py --model MODEL --dataset PAIRS.jsonl --levers --base REVISION   # what each change gave
    python tests/studies/benchmark.py --growth                                            # how cost grows, on models built here
    python tests/studies/benchmark.py --model MODEL --dataset PAIRS.jsonl --reading       # rows/s of data.load and datasets.map
    python tests/studies/benchmark.py --gpu                                               # what only a GPU can show: see gpu.py

Every variant runs in a process of its own, so that its peak memory is its own, and the variants take turns for several
rounds, so that a machine that drifts drifts for all. A round is two optimizer steps to warm up and then the measured steps,
each of `--batch-size` pairs, the first ones of the file that fit. A figure is the mean over rounds, then the lowest and the
highest; a ratio is taken within a round. Peak memory is that of the process, less what it was before any model and less 16
bytes per weight (fp32 weights, gradients and two moments). The matmul rate is measured in each process (`matmul_rate`).

There are two yardsticks: the textbook (a padded batch, all its logits, a log-softmax; the loop around it and the
reference's pass are ours) and trl.

`--levers` measures small gains, for which processes of their own scatter too much: see `levers`.
"""

import argparse
import contextlib
import ctypes
import json
import math
import os
import random
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as train.py does
sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import gpu  # noqa: E402
import miniature  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM  # noqa: E402
from will_it_fit import model_flops  # noqa: E402

import data  # noqa: E402
import logprobs  # noqa: E402
import train  # noqa: E402

VARIANTS = {  # name → (layout, objective)
    "padded, full logits": ("full", "simpo"),
    "padded, chunked head": ("padded", "simpo"),
    "packed, prompt repeated": ("unshared", "simpo"),
    "packed tree": ("packed", "simpo"),
    "packed tree, compiled": ("compiled", "simpo"),
    "padded, full logits, dpo + reference": ("full", "dpo"),
    "packed tree, dpo + reference": ("packed", "dpo"),
}
WARM = 2  # steps before the measured ones: --compile makes its graphs in the first, and in the second those for any size
PEERS = {"trl simpo": "simpo", "trl dpo": "dpo"}
KINDS = {  # what --profile sorts a step's operators into, by name; the rest is elementwise operators and sums
    "products": r"aten::(|add)mm|mkldnn",
    "attention": r"aten::(b|badd)mm|aten::_softmax|scaled_dot_product|flash",
    "copies and casts": r"aten::(copy_|cat|fill_)",
    "compiled": r"Compiled|graph_\d",
    "update": r"fused_adam|_foreach",
}
GIVEN_BACK = (2**26, 2**25)  # what glibc's malloc comes to by itself: the highest trim and mmap thresholds, in bytes
KEPT = (-1, 2**28)  # as train.py sets them
BASE = dict(
    model=None, dataset=None, steps=2, batch_size=4, prompt_tokens=128, response_tokens=64, vocabulary=49152,
)  # fmt: skip
SWEEPS = {"response_tokens": [128, 256], "vocabulary": [131072, 262144], "batch_size": [8, 16, 32, 64]}  # from BASE's on
TEXTBOOK = {"simpo": "padded, full logits", "dpo": "padded, full logits, dpo + reference"}


def peak_bytes() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def settings_of(args, folder: str) -> train.Settings:
    """A run of the warm-up steps and the measured ones, on the first pairs of the file that fit."""
    layout, objective = VARIANTS.get(args.variant, ("packed", "simpo"))
    need = args.batch_size * (args.steps + WARM)
    return train.Settings(
        model=args.model or "built", dataset=f"{args.dataset}[:{need + need // 4 + 8}]", eval_size=0, max_drop_fraction=1.0,
        max_length=args.max_length, objective=objective, dtype=args.dtype, lr=1e-6, batch_size=args.batch_size, samples=0,
        tokens_per_microbatch=args.tokens_per_microbatch, gradient_checkpointing=args.gradient_checkpointing,
        layout={"unshared": "packed", "compiled": "packed", "full": "padded"}.get(layout, layout),
        compile=layout == "compiled", out=f"{folder}/out", cache=f"{folder}/cache",
    )  # fmt: skip


def built(args, s: train.Settings) -> train.Run:
    """A run on a Llama built from --hidden, --layers and --vocabulary and on random tokens in the proportions of a chat: for
    what does not depend on the text."""
    rng, sizes = np.random.default_rng(0), (args.prompt_tokens, args.response_tokens, args.response_tokens)
    ids = [[rng.integers(3, 1000, n).tolist() for n in sizes] for _ in range(args.batch_size * (args.steps + WARM))]
    examples = [data.Example(prompt, responses) for prompt, *responses in ids]
    torch.manual_seed(0)
    heads, device = args.hidden // 64, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = LlamaConfig(
        vocab_size=args.vocabulary, hidden_size=args.hidden, intermediate_size=args.hidden * 8 // 3 // 64 * 64,
        num_hidden_layers=args.layers, num_attention_heads=heads, num_key_value_heads=heads // 3 if heads % 3 == 0 else heads,
        tie_word_embeddings=True, max_position_embeddings=8192,
    )  # fmt: skip
    with device:
        model = LlamaForCausalLM(config).train()
    policy = train.dist.shard(train.ResponseLogProbs(model), checkpointing=s.gradient_checkpointing, compiling=s.compile)
    policy.use_layout(s.layout)
    run = train.Run(s, train.read_objective(s.objective), device, None, policy, examples, [], s.layout)
    run.optimizer = train.make_optimizer(run)
    return run


def full_logits_step(run: train.Run, rows: list[int]) -> None:
    """The textbook: all logits of the padded batch, a log-softmax over them, then the response tokens."""
    examples = [run.train[i] for i in rows]
    inputs = train.batch_inputs(run, examples, rows)
    batch = data.padded_batch(examples).to(run.device)
    with run.arithmetic():
        logits = run.policy.model(input_ids=batch.input_ids, use_cache=False).logits
        logp = logits.float().log_softmax(-1).flatten(0, 1)[batch.index, batch.targets]
    logps = torch.zeros(batch.responses, device=run.device).index_add(0, batch.response, logp)
    run.objective.row_losses({"logp": logps.view(-1, 2)}, inputs, [0]).mean().backward()
    update(run)


def unshared_step(run: train.Run, rows: list[int]) -> None:
    """Packed, but each response brings its own copy of the prompt. A row alone has no pair to be compared with, so the
    backward pass starts from Σ logp; it costs the same."""
    alone = [data.Example(run.train[i].prompt, [r]) for i in rows for r in run.train[i].responses]
    with run.arithmetic():
        for _, batch in run.microbatches(alone):
            run.policy(batch)["logp"].sum().backward()
    update(run)


def update(run: train.Run) -> None:
    """The end of the trainer's step: clip, learning rate, AdamW."""
    float(train.dist.clip_gradients(run.policy, run.s.max_grad_norm))
    for group in run.optimizer.param_groups:
        group["lr"] = train.learning_rate(run.step, len(run.plan), run.s)
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.step += 1


def prepared(args) -> train.Run:
    """A run whose plan takes the first pairs that fit in their order."""
    with tempfile.TemporaryDirectory() as folder:
        s = settings_of(args, folder)
        run = train.prepare(s) if args.dataset else built(args, s)
    need, size = args.batch_size * (args.steps + WARM), args.batch_size
    if len(run.train) < need:
        sys.exit(f"{args.dataset}: {need} pairs are needed, {len(run.train)} fit")
    run.plan = [list(range(i, i + size)) for i in range(0, need, size)]
    return run


def allocator(trim: int, mmap: int) -> None:
    """Set the thresholds of glibc's malloc, where it is this process's."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).mallopt(-1, trim)
        ctypes.CDLL(None).mallopt(-3, mmap)


def ours(args) -> dict:
    """One round of one of our variants: the trainer's own step, or one whose gradient is computed in another way."""
    layout, _ = VARIANTS[args.variant]
    before = peak_bytes()
    allocator(*KEPT)
    run = prepared(args)
    need, size = args.batch_size * (args.steps + WARM), args.batch_size
    if run.objective.needs("ref"):  # in the microbatches of these steps
        run.ref["ref"] = train.log_probs(run, run.train[:need], at_once=[size] * len(run.plan))["logp"]
    measured = [run.train[i] for i in range(WARM * size, need)]
    step = {"full": full_logits_step, "unshared": unshared_step}.get(layout, train.train_step)
    for rows in run.plan[:WARM]:
        step(run, rows)
    with torch.profiler.profile() if args.profile else contextlib.nullcontext() as profiler:
        tick = synchronized()
        if run.objective.needs("ref"):
            train.log_probs(run, measured)  # what the reference costs: a pass that is made once
        for rows in run.plan[WARM:]:
            step(run, rows)
        seconds = synchronized() - tick
    shares = {"shares": shares_of(profiler.key_averages())} if args.profile else {}
    return finish(args, run.policy.model, measured, seconds, before) | shares | balance(run, measured[:size])


def shares_of(operators) -> dict[str, float]:
    """The share of all operators' own time on the CPU that each of KINDS takes, and "elsewhere" the rest."""
    times = dict.fromkeys([*KINDS, "elsewhere"], 0.0)
    for operator in operators:
        kind = next((kind for kind, names in KINDS.items() if re.search(names, operator.key)), "elsewhere")
        times[kind] += operator.self_cpu_time_total
    return {kind: time / sum(times.values()) for kind, time in times.items()}


def synchronized() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def matmul_rate(model: torch.nn.Module, dtype: torch.dtype) -> float:
    """Best floating-point operations per second of a few products: 2,048 tokens through the model's MLP, and 2,048³."""
    config = model.config.get_text_config()
    hidden = config.hidden_size
    mlp = getattr(config, "intermediate_size", None) or 4 * hidden
    best = 0.0
    for n, k, m in ((2048, hidden, mlp), (2048, mlp, hidden), (2048, 2048, 2048)):
        a = torch.randn(n, k, device=model.device).to(dtype)
        b = torch.randn(k, m, device=model.device).to(dtype)
        for _ in range(4):
            tick = synchronized()
            a @ b
            best = max(best, 2.0 * n * k * m / (synchronized() - tick))
    return best


def balance(run: train.Run, examples: list) -> dict[str, float]:
    """How a step is divided: its microbatches, the heaviest over the mean one, and the share of computed positions that is
    padding or a prompt repeated."""
    loads = []
    cells = 0
    for at, batch in run.microbatches(examples):
        loads.append(sum(data.tokens_of(examples[i]) for i in at))
        cells += loads[-1] if batch.pairs is not None else batch.input_ids.numel()
    return {"microbatches": len(loads), "imbalance": max(loads) * len(loads) / sum(loads), "padding": 1 - sum(loads) / cells}


def textbook_flops(model, examples: list, batch_size: int) -> float:
    """What the same pairs take as padded batches with all their logits: each row as long as the longest one of its batch."""
    rows = []
    for i in range(0, len(examples), batch_size):
        lengths = [len(e.prompt) + len(r) for e in examples[i : i + batch_size] for r in e.responses]
        rows += [data.Example([0], [[0] * (max(lengths) - 1)])] * len(lengths)
    return model_flops(model, rows)


def finish(args, model, examples: list, seconds: float, before: float) -> dict:
    peak, dtype = peak_bytes(), torch.bfloat16 if args.dtype == "bf16" else torch.float32
    return {
        "variant": args.variant, "dtype": args.dtype, "pairs": len(examples), "seconds": seconds,
        "tokens": sum(map(data.tokens_of, examples)), "flops": model_flops(model, examples),
        "textbook_flops": textbook_flops(model, examples, args.batch_size),
        "rate": matmul_rate(model, dtype), "before": before,
        "peak_above_state": peak - before - 16 * sum(p.numel() for p in model.parameters()),
    }  # fmt: skip


def todays_head(hidden, *rest):
    """Today's `token_logprobs` for a file that leaves it to the head to cast the states."""
    kind = hidden.device.type
    hidden = hidden.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else hidden
    return logprobs.token_logprobs(hidden, *rest)


class Lever(NamedTuple):
    over: str | None = None  # the variant that a step's time is compared with
    taken: dict | None = {}  # what is today's, by its name in logprobs.py; all else is that of --base. None: all is today's
    memory: tuple[int, int] = KEPT


LEVERS = {
    "as it was": Lever(memory=GIVEN_BACK),
    "memory kept": Lever("as it was"),
    "and attention by pair under one mask": Lever("memory kept", {"PrefixSharedPairs": logprobs.PrefixSharedPairs}),
    "and head by parts of the vocabulary": Lever("memory kept", {"token_logprobs": todays_head}),
    "all together": Lever("as it was", None),
}


class Spent(NamedTuple):
    wall: float  # seconds
    user: float  # of all threads, less than wall seconds disturbed by what else the machine does
    system: float
    faults: int  # pages that the kernel had to hand out


def spent() -> Spent:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return Spent(synchronized(), usage.ru_utime, usage.ru_stime, usage.ru_minflt)


def with_names(base: str, taken: dict | None) -> types.ModuleType:
    """logprobs.py of a git revision (or the file at a path) with some of today's names; None: today's."""
    if taken is None:
        return logprobs
    text = Path(base).read_text() if Path(base).is_file() else None
    if text is None:
        command = ["git", "show", f"{base}:logprobs.py"]
        text = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(logprobs.__file__).parent).stdout
    module = types.ModuleType("logprobs_then")
    exec(compile(text, f"{base}:logprobs.py", "exec"), vars(module))
    vars(module).update(taken)
    return module


def levers(args) -> dict[str, list[Spent]]:
    """Steps by turns in one process: as the code was, with one part of today's at a time, and as it is.

    In a round each has its turn on the same pairs, in an order that is drawn; the next round takes the next pairs.
    """
    run = prepared(args)
    run.step = 1  # what only the first one checks takes time
    modules = {name: with_names(args.base, lever.taken) for name, lever in LEVERS.items()}
    policies = {name: module.ResponseLogProbs(run.policy.model) for name, module in modules.items()}
    order, drawn, rounds = list(LEVERS), random.Random(0), {name: [] for name in LEVERS}
    for number in range(args.rounds):
        rows = run.plan[number % len(run.plan)]
        drawn.shuffle(order)
        for name in order:
            run.policy = policies[name]
            run.policy.use_layout("packed")
            AttentionInterface.register("prefix_shared", modules[name].prefix_shared_attention)
            allocator(*LEVERS[name].memory)
            train.train_step(run, rows)  # finds the memory as the variant before has left it, and is not counted
            before = spent()
            train.train_step(run, rows)
            rounds[name].append(Spent(*(b - a for a, b in zip(before, spent()))))
        print(f"round {number + 1}", file=sys.stderr, flush=True)
    AttentionInterface.register("prefix_shared", logprobs.prefix_shared_attention)  # for who comes after, in this process
    return rounds


def interval(values: list[float]) -> tuple[float, float, float]:
    """(median, low, high): order statistics between which the true median lies in 95 % of cases or more, whatever the scatter.

    The k-th lowest is above it only where less than k of n values are below, k the highest for which Binomial(n, 1/2) has that
    in at most 2.5 % of cases; so for the highest. Five values or less have no such k: their ends are given.
    """
    n, ordered = len(values), sorted(values)
    k = 0
    while sum(math.comb(n, i) for i in range(k + 1)) <= 0.025 * 2**n:
        k += 1
    k = max(k, 1)
    return statistics.median(ordered), ordered[k - 1], ordered[n - k]


def levers_table(rounds: dict[str, list[Spent]]) -> str:
    """Markdown: gains within each round."""
    lines = [["lever", "seconds per step", "over", "gain", "in user + system seconds", "page faults per step"], ["---"] * 6]
    for name, own in rounds.items():
        over = LEVERS[name].over
        gains = ["–", "–"]
        if over:
            wall = [a.wall / b.wall for a, b in zip(rounds[over], own)]
            cpu = [(a.user + a.system) / (b.user + b.system) for a, b in zip(rounds[over], own)]
            gains = ["{:.3f} ({:.3f}–{:.3f})".format(*interval(x)) for x in (wall, cpu)]
        seconds = statistics.median(x.wall for x in own)
        faults = statistics.median(x.faults for x in own)
        lines.append([name, f"{seconds:.2f}", over or "–", *gains, f"{faults:,.0f}"])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def peer(args) -> dict:
    """One round of trl's trainer on the same pairs, in its own padded layout; SimPO is its CPO trainer without the NLL term."""
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback

    before = peak_bytes()
    objective = PEERS[args.variant]
    tokenizer = data.load_tokenizer(args.model)
    need = args.batch_size * (args.steps + WARM)
    rows, examples = [], []
    for _, raw in data.read(f"{args.dataset}[:{need + need // 4 + 8}]"):
        try:
            row = data.format_of(raw, "row")[0](raw)
            examples.append(data.encode(row, tokenizer, args.max_length, args.max_length * 7 // 8)[0])
        except data.UserError:
            continue
        chosen, rejected = row.responses
        rows.append({"prompt": row.prompt, "chosen": [chosen], "rejected": [rejected]})
    rows, examples = rows[:need], examples[:need]
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, trust_remote_code=False)

    class Clock(TrainerCallback):
        tick = 0.0

        def on_step_end(self, a, state, control, **kwargs):
            if state.global_step == WARM:
                Clock.tick = synchronized()

    common = dict(
        output_dir="runs/benchmark-peer", per_device_train_batch_size=args.batch_size, max_steps=args.steps + WARM,
        learning_rate=1e-6,
        bf16=args.dtype == "bf16", fp16=False, report_to=[], save_strategy="no", logging_strategy="no",
        max_length=args.max_length,
        gradient_checkpointing=False, use_cpu=not torch.cuda.is_available(), disable_tqdm=True, lr_scheduler_type="constant",
    )  # fmt: skip
    if objective == "simpo":
        try:
            from trl import CPOConfig, CPOTrainer
        except ImportError:
            from trl.experimental.cpo import CPOConfig, CPOTrainer
        config = CPOConfig(**common, loss_type="simpo", cpo_alpha=0.0, simpo_gamma=1.0, beta=2.0)
        trainer = CPOTrainer(
            model, config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, callbacks=[Clock()]
        )
    else:
        config = trl.DPOConfig(**common, beta=0.1)
        trainer = trl.DPOTrainer(
            model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, callbacks=[Clock()]
        )
    trainer.train()
    seconds = synchronized() - Clock.tick
    # trl shuffles: over equal steps its pairs differ from ours only by those of the warm-up batches
    return finish(args, model, examples[WARM * args.batch_size :], seconds, before) | {"trl": trl.__version__}


def child(args, variant: str, dtype: str, **more) -> dict:
    """Run one round in a fresh process and read its result from the last line. Its threads are bound to cores: two of them may
    else sit on one for seconds. Not a reader's: its workers would all inherit the first core."""
    options = {**vars(args), **more, "variant": variant, "dtype": dtype}
    command = [sys.executable, __file__, "--child", json.dumps(options)]
    bound = str(variant not in READERS).lower()
    done = subprocess.run(command, capture_output=True, text=True, env={"OMP_PROC_BIND": bound, **os.environ})
    if done.returncode:
        sys.exit(f"{variant}, {dtype}: failed\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def summary_of(results: list[dict]) -> dict:
    """Over all rounds of a variant: totals of pairs and seconds, the largest peak, the best matmul rate."""
    total = {k: sum(r[k] for r in results) for k in ("pairs", "seconds", "tokens", "flops")}
    rate = max(r["rate"] for r in results)
    return total | {
        "pairs_per_second": total["pairs"] / total["seconds"], "tokens_per_second": total["tokens"] / total["seconds"],
        "fraction_of_matmul_rate": total["flops"] / total["seconds"] / rate, "matmul_gflops": rate / 1e9,
        "peak_above_state_gib": max(r["peak_above_state"] for r in results) / 2**30,
    }  # fmt: skip


def header(args, more: float, before: float) -> str:
    """What the figures were measured with and against; `more`: by how much the textbook computes more than it must; `before`:
    the bytes a process takes without a model."""
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    said = f"{where}, torch {torch.__version__}; {args.rounds} rounds of {args.steps} steps of {args.batch_size} pairs: "
    said += "mean (lowest–highest); ratios within a round"
    said += f"\npeak memory is less 16 bytes a weight and what a process takes without a model, {before / 2**30:.2f} GiB"
    said += f"\npadding and unused logits alone make a step {more:.2f} times the arithmetic of the packed tree"
    if args.peer and not torch.cuda.is_available():
        said += (
            "\n× trl is against what trl falls back to on a CPU: without Triton its DPO head scores every position; its SimPO "
            "is the experimental CPO trainer, with all logits"
        )
    return said


def spread(values: list[float], form: str) -> str:
    """ "1.03 (1.01–1.05)": the mean, and what it is the mean of where that differs."""
    low, mean, high = (format(x, form) for x in (min(values), sum(values) / len(values), max(values)))
    return mean if low == high else f"{mean} ({low}–{high})"


def table(rounds: dict[tuple[str, str], list[dict]]) -> str:
    """Markdown, a line for each variant and dtype. A ratio is to the textbook's or trl's run of the same objective."""
    head = ["variant", "dtype", "pairs/s", "useful tokens/s", "of matmul rate", "peak above state, GiB", "× textbook", "× trl"]
    lines = [[*head, "of trl's peak"], ["---"] * 9]
    speed, peak = lambda r: r["pairs"] / r["seconds"], lambda r: r["peak_above_state"]
    for (variant, dtype), own in rounds.items():
        objective = PEERS.get(variant) or VARIANTS[variant][1]

        def ratio(measure, yardstick, own=own, dtype=dtype):
            to = rounds.get((yardstick, dtype))
            return spread([measure(a) / measure(b) for a, b in zip(own, to)], ".2f") if to and to is not own else "–"

        lines.append([
            variant, dtype, spread([speed(r) for r in own], ".2f"), spread([r["tokens"] / r["seconds"] for r in own], ".0f"),
            spread([r["flops"] / r["seconds"] / r["rate"] for r in own], ".0%"), spread([peak(r) / 2**30 for r in own], ".2f"),
            ratio(speed, TEXTBOOK[objective]), ratio(speed, f"trl {objective}"), ratio(peak, f"trl {objective}"),
        ])  # fmt: skip
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def balance_lines(rounds: dict[tuple[str, str], list[dict]]) -> str:
    """How the first measured step of each of our variants was divided into microbatches."""
    lines = []
    for (variant, dtype), own in rounds.items():
        if "microbatches" in own[0]:
            how = "{microbatches} microbatches, the heaviest {imbalance:.2f} times the mean, {padding:.0%} padding"
            lines.append(f"{variant}, {dtype}: {how.format(**own[0])}\n")
    return "".join(lines)


def profile_table(rounds: dict[tuple[str, str], list[dict]]) -> str:
    """Markdown: where the time of a step goes, the mean of a variant's rounds."""
    kinds = [*KINDS, "elsewhere"]
    lines = [["share of a step's time", "dtype", *kinds], ["---"] * (len(kinds) + 2)]
    for (variant, dtype), own in rounds.items():
        if "shares" in own[0]:
            lines.append([variant, dtype, *(format(sum(r["shares"][k] for r in own) / len(own), ".0%") for k in kinds)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def growth(args) -> dict[str, list[dict]]:
    """Cost of the packed tree on built models, for each of SWEEPS the values of one setting; all others are those of BASE."""
    sweeps = {}
    lines = ["| case | seconds per pair | peak above state, GiB | of matmul rate |", "|---|---|---|---|"]
    same = summary_of([child(args, "packed tree", args.dtypes[0], **BASE)])
    for setting, values in SWEEPS.items():
        sweeps[setting] = [{"value": BASE[setting], **same}]
        for value in values:
            result = summary_of([child(args, "packed tree", args.dtypes[0], **{**BASE, setting: value})])
            sweeps[setting].append({"value": value, **result})
        for r in sweeps[setting]:
            title = f"{setting} {r['value']:,}"
            gib, share = r["peak_above_state_gib"], r["fraction_of_matmul_rate"]
            lines.append(f"| {title} | {1 / r['pairs_per_second']:.2f} | {gib:.2f} | {share:.0%} |")
            print(lines[-1], file=sys.stderr, flush=True)
    print("\n".join(lines))
    draw_growth(sweeps, Path(args.out).with_suffix(".png"))
    return sweeps


def draw_growth(sweeps: dict[str, list[dict]], path: Path) -> None:
    """A panel for each sweep: time and arithmetic of a pair, and peak memory, all relative to the smallest value."""
    plt = miniature.pyplot()
    if plt is None:
        return
    figure, axes = plt.subplots(1, len(sweeps), figsize=(4 * len(sweeps), 3.6), constrained_layout=True, sharey=True)
    drawn = {
        "seconds per pair": lambda r: 1 / r["pairs_per_second"],
        "peak memory above the training state": lambda r: r["peak_above_state_gib"],
        "arithmetic per pair": lambda r: r["flops"] / r["pairs"],
    }
    for axis, (setting, own) in zip(axes, sweeps.items()):
        values = [r["value"] for r in own]
        for (label, measure), style in zip(drawn.items(), ("o-", "s-", ":")):
            axis.plot(values, [measure(r) / measure(own[0]) for r in own], style, label=label)
        axis.set_xscale("log", base=2)
        axis.set_xticks(values, [f"{value:,}" for value in values])
        axis.minorticks_off()
        axis.set_xlabel(setting.replace("_", " "))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("times the leftmost value")
    axes[0].set_ylim(bottom=0)
    axes[0].legend(loc="upper left", fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def reading(args) -> dict:
    """One way of making token ids of --rows rows: those of the dataset over and over, numbered."""
    tokenizer = data.load_tokenizer(args.model)
    before = peak_bytes()
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/rows.jsonl"
        write_rows(args, file)
        tick = time.perf_counter()
        READERS[args.variant](file, tokenizer, folder)
        seconds = time.perf_counter() - tick
    workers = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"variant": args.variant, "seconds": seconds, "peak": peak_bytes() - before, "peak_of_a_worker": workers}


def write_rows(args, file: str) -> None:
    known = []
    for _, raw in data.read(f"{args.dataset}[:1000]"):
        with contextlib.suppress(data.UserError):
            known.append(data.format_of(raw, "row")[0](raw))
    with open(file, "w") as f:
        for i in range(args.rows):
            row = known[i % len(known)]
            first, *more = row.prompt
            chosen, rejected = row.responses
            prompt = [{**first, "content": f"{i} {first['content']}"}, *more]
            f.write(json.dumps({"prompt": prompt, "chosen": [chosen], "rejected": [rejected]}) + "\n")


def read_by_load(file: str, tokenizer, folder: str) -> None:
    data.load(file, tokenizer, data.Reading(cache=folder))


def read_by_map(file: str, tokenizer, folder: str) -> None:
    """The plain template call, which checks nothing."""
    from datasets import Dataset

    def ids(row: dict) -> dict:
        return {
            name: tokenizer.apply_chat_template(row["prompt"] + row[name], return_dict=False) for name in ("chosen", "rejected")
        }

    Dataset.from_json(file, cache_dir=folder).map(ids, num_proc=os.cpu_count())


READERS = {"data.load": read_by_load, "datasets.map": read_by_map}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--dataset")
    parser.add_argument("--peer", choices=["trl"])
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--reading", action="store_true", help="rows a second of data.load and of datasets.map")
    parser.add_argument("--rows", type=int, default=200_000, help="with --reading")
    parser.add_argument("--levers", action="store_true")
    parser.add_argument("--base", help="with --levers: a git revision, or a file, whose logprobs.py is changed in part")
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--sizes", nargs="+", default=list(gpu.SIZES), choices=list(gpu.SIZES), help="with --gpu")
    parser.add_argument("--tokens", type=int, default=16_000, help="of a step, with --gpu")
    parser.add_argument("--tflops", type=float, default=989.0, help="dense bf16 peak of the GPU, with --gpu (an H100's)")
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="measured steps of a round")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--tokens-per-microbatch", type=int, default=2048)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--profile", action="store_true", help="on a CPU: where a step's time goes; takes some itself")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--response-tokens", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--out", default="runs/benchmark.json")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        args = argparse.Namespace(**json.loads(args.child))
        work = {"levers": levers, **dict.fromkeys(PEERS, peer), **dict.fromkeys(READERS, reading)}.get(args.variant, ours)
        print("\n" + json.dumps(work(args)))
        return
    if args.profile and torch.cuda.is_available():
        parser.error("--profile adds up the CPU's time, which says nothing of a GPU")
    if args.gpu:
        text = gpu.report(args)
        print(text)
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).with_suffix(".md").write_text(text)
        if not args.peer:
            return
    if args.growth:
        return write(args, growth(args))
    if not (args.model and args.dataset):
        parser.error("--model and --dataset are needed")
    if args.reading:
        results = [child(args, reader, "fp32") for reader in READERS]
        lines = [["", "rows/s", "peak of the process, GiB", "of a worker, GiB"], ["---"] * 4]
        for r in results:
            memory = (f"{r[key] / 2**30:.2f}" for key in ("peak", "peak_of_a_worker"))
            lines.append([r["variant"], f"{args.rows / r['seconds']:.0f}", *memory])
        print(miniature.markdown(lines))
        return write(args, results)
    if args.levers and not args.base:
        parser.error("--levers needs --base")
    if args.levers:
        results = {dtype: child(args, "levers", dtype) for dtype in args.dtypes}
        for dtype, rounds in results.items():
            rounds = {name: [Spent(*x) for x in own] for name, own in rounds.items()}
            print(f"{dtype}, {args.rounds} rounds of a step of {args.batch_size} pairs\n\n{levers_table(rounds)}")
        return write(args, results)
    variants, rounds = [*args.variants, *(PEERS if args.peer else ())], {}
    for r in range(args.rounds):
        for dtype in args.dtypes:
            for variant in variants:
                result = child(args, variant, dtype)
                rounds.setdefault((variant, dtype), []).append(result)
                speed = result["pairs"] / result["seconds"]
                print(f"round {r + 1}: {variant}, {dtype}: {speed:.2f} pairs/s", file=sys.stderr, flush=True)
        write(args, [{"variant": v, "dtype": d, **summary_of(own), "rounds": own} for (v, d), own in rounds.items()])
    more = result["textbook_flops"] / result["flops"]
    print(f"{header(args, more, result['before'])}\n\n{table(rounds)}\n{balance_lines(rounds)}")
    if args.profile:
        print(profile_table(rounds))


def write(args, results: list[dict]) -> None:
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    Path(args.out).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
