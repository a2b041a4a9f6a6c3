"""What only a GPU can show. Run it there, and send back what it prints:

    python tests/studies/benchmark.py --gpu                  # also written to OUT.md
    python tests/studies/benchmark.py --gpu --steps 2 --sizes "1B Llama"
    python tests/studies/benchmark.py --gpu --peer trl --model MODEL --dataset PAIRS.jsonl     # and trl beside it

Models are built from their configurations, nothing is downloaded. Each has as many layers as one GPU of 80 GB holds with fp32
weights, gradients and Adam moments, and the widths of the real one. Without a GPU everything runs on shapes of a few numbers,
which says that the commands work and nothing about speed.
"""

import argparse
import itertools
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import transformers
import will_it_fit

import data
import distributed as dist
import logprobs
import train

ON_GPU = torch.cuda.is_available()
LENGTHS = (300, 350, 350) if ON_GPU else (12, 6, 8)  # tokens of prompt, chosen and rejected
LLAMA_1B = dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
                head_dim=64, vocab_size=128256, tie_word_embeddings=True)  # fmt: skip
SIZES = {  # what is built → (kind, sizes)
    "1B Llama": ("llama", LLAMA_1B),
    "8B Llama, 8 of 32 layers": ("llama", will_it_fit.SHAPES["llama-3-8b"][1] | {"num_hidden_layers": 8}),
    "9B Gemma-2, 8 of 42 layers": ("gemma2", will_it_fit.SHAPES["gemma-2-9b"][1] | {"num_hidden_layers": 8}),
}
TINY = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    vocab_size=211,
)  # fmt: skip


def config_of(name: str):
    kind, sizes = SIZES[name]
    return transformers.AutoConfig.for_model(kind, **(sizes if ON_GPU else sizes | TINY))


def built(name: str, tokens: int, checkpointing: bool, compiling: bool) -> train.Run:
    """A run on a model with random weights and batches of random tokens, as many pairs as `tokens` holds, a microbatch each."""
    rng, device, pairs = np.random.default_rng(0), data.device_named("auto"), max(1, tokens // sum(LENGTHS))
    s = train.Settings(model="built", dataset="built", objective="simpo", dtype="bf16" if ON_GPU else "fp32", lr=1e-6,
                       gradient_checkpointing=checkpointing, compile=compiling, batch_size=pairs,
                       tokens_per_microbatch=pairs * sum(LENGTHS))  # fmt: skip
    torch.manual_seed(0)
    with device:
        model = transformers.AutoModelForCausalLM.from_config(config_of(name), dtype=torch.float32).train()
    policy = dist.shard(logprobs.ResponseLogProbs(model), None, ON_GPU, checkpointing, compiling)
    policy.use_layout("packed")
    ids = [[rng.integers(3, 200, n).tolist() for n in LENGTHS] for _ in range(pairs)]
    examples = [data.Example(prompt, responses) for prompt, *responses in ids]
    run = train.Run(s, train.read_objective(s.objective), device, None, policy, examples, [])
    run.optimizer = train.make_optimizer(run)
    run.plan = [list(range(pairs))] * 1000
    return run


def wait() -> float:
    if ON_GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


# ---- the parts, each in a process of its own ------------------------------------------------------------------------------


def step(name: str, tokens: int, checkpointing: bool, compiling: bool, steps: int, tflops: float) -> dict:
    """One row: speed, share of the nominal peak, memory against the plan's, and how far the two layouts are apart."""
    run = built(name, tokens, checkpointing, compiling)
    worst = layouts_apart(run, run.train[:4])
    tick = wait()
    for rows in run.plan[:2]:  # compiles, warms up
        train.train_step(run, rows)
    first = wait() - tick
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    tick = wait()
    lines = [train.train_step(run, rows) for rows in run.plan[2 : 2 + steps]]
    seconds, peak = wait() - tick, train.peak_memory(run.device)
    from benchmark import matmul_rate  # late, as benchmark.py imports this file

    rate = matmul_rate(run.policy.model, torch.bfloat16 if ON_GPU else torch.float32)
    config, size = run.policy.model.config, sum(p.numel() for p in run.policy.model.parameters())
    traced = will_it_fit.one_microbatch(config, len(run.train), LENGTHS, torch.bfloat16, checkpointing)
    flops = steps * will_it_fit.model_flops(run.policy.model, run.train)
    done = sum(line["tokens"] for line in lines)
    return {
        "model": name, "tokens": lines[0]["tokens"], "checkpointing": checkpointing, "compiled": compiling,
        "tokens/s": round(done / seconds), "MFU": f"{flops / seconds / (tflops * 1e12):.1%}",
        "of the matmul rate": f"{flops / seconds / rate:.1%}", "seconds": round(seconds / steps, 3),
        "first two steps": round(first, 1), "peak, GiB": round(peak, 2),
        "plan, GiB": round((18 * size + traced["peak"]) / 2**30, 2),  # fp32 weights, moments, gradients; a bf16 copy
        "layouts apart, nats per token": f"{worst:.2g}",
    }  # fmt: skip


def layouts_apart(run: train.Run, examples: list[data.Example]) -> float:
    """By how many nats per token packed and padded log-probs of the examples differ at most, in the run's arithmetic."""
    packed = train.log_probs(run, examples)["logp"]
    run.policy.use_layout("padded")
    padded = train.log_probs(replace(run, layout="padded"), examples)["logp"]
    run.policy.use_layout("packed")
    return ((packed - padded).abs() / train.counted_inputs(examples, run.device)["len"]).max().item()


def kernels() -> list[dict]:
    """Each head width, window and soft-cap."""
    cases = itertools.product((64, 128, 256) if ON_GPU else (16,), (None, 256 if ON_GPU else 4), (None, 50.0))
    return [kernel(*case) for case in cases]


def kernel(width: int, window: int | None, cap: float | None) -> dict:
    """One row: the fused kernel in bf16 against pair by pair in fp32, the largest difference of output and gradients over their
    largest entry; and its time. On CPUs it is eager, in fp32, and has no backward pass."""
    pairs = [(300, [350, 200]), (64, [1, 500]), (700, [900, 40])] if ON_GPU else [(5, [3, 4]), (2, [1, 6])]
    device = data.device_named("auto")
    total = sum(prompt + sum(responses) for prompt, responses in pairs)
    blocks = logprobs.Blocks.of(pairs, window, device)
    filled = len(blocks.ranges[0])
    torch.manual_seed(0)
    given = [torch.randn(1, heads, total, width, device=device) for heads in (8, 2, 2)]
    pull = torch.randn(1, total, 8, width, device=device)

    def attend(dtype: torch.dtype, size: int, **form) -> tuple[list[torch.Tensor], float]:
        leaves, tick = [x.to(dtype).requires_grad_() for x in given], wait()
        query, key, value = (torch.nn.functional.pad(x, (0, 0, 0, size - total)) for x in leaves)
        if ON_GPU or "pairs" in form:
            out, _ = logprobs.prefix_shared_attention(None, query, key, value, None, sliding_window=window, softcap=cap, **form)
        else:
            out = logprobs._flex(query.detach(), key.detach(), value.detach(), width**-0.5, cap, blocks).transpose(1, 2)
            return [out[:, :total]], wait() - tick
        grads = torch.autograd.grad(out[:, :total], leaves, pull.to(dtype))
        return [x.float() for x in (out[:, :total], *grads)], wait() - tick

    right, _ = attend(torch.float32, total, pairs=logprobs.PrefixSharedPairs(pairs))
    for _ in range(2):  # the first one compiles
        fused, seconds = attend(torch.bfloat16 if ON_GPU else torch.float32, filled, blocks={window: blocks})
    gaps = [f"{((a - b).abs().max() / b.abs().max()).item():.1e}" for a, b in zip(fused, right)]
    row = {"head width": width, "window": window or "–", "soft-cap": cap or "–"}
    row |= dict(itertools.zip_longest(("output", "∂query", "∂key", "∂value"), gaps, fillvalue="–"))
    return row | {"forward + backward, ms": f"{1e3 * seconds:.2f}"}


def going_on() -> list[dict]:
    """Runs of the toy task in fp32: unbroken, resumed from its middle, and as one rank of a process group."""
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        common = "--max_steps=6 --eval_size=64 --save_every=3 --samples=0 --dtype=fp32".split()

        def run(out: str, *more: str, launcher: tuple[str, ...] = ()) -> dict:
            command = [sys.executable, *launcher, str(Path(train.__file__)), *common, f"--out={place / out}", *more]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{out}: {done.stderr[-2000:]}")
            lines = [json.loads(line) for line in (place / out / "metrics.jsonl").read_text().splitlines()]
            return {line["step"]: line["loss"] for line in lines if "loss" in line}

        unbroken = run("unbroken")
        shutil.copytree(place / "unbroken", place / "resumed")
        shutil.rmtree(place / "resumed" / "checkpoints" / "step-000006", ignore_errors=True)
        (place / "resumed" / "summary.json").unlink()
        others = {
            "resumed after step 3": run("resumed", "--resume"),
            "one rank of a process group": run("rank", launcher=("-m", "torch.distributed.run", "--standalone")),
        }

        def gap(losses):
            return max(abs(losses[step] - loss) for step, loss in unbroken.items())

        return [{"run": name, "losses apart from the unbroken run's": f"{gap(x):.1e}"} for name, x in others.items()]


PARTS = {"step": step, "kernels": kernels, "going_on": going_on}


# ---- the report -----------------------------------------------------------------------------------------------------------


def in_a_process(part: str, *args):
    """The result of a part, or why there is none."""
    command = [sys.executable, __file__, json.dumps([part, args])]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    if done.returncode:
        return next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "no reason was given")[:300]
    return json.loads(done.stdout.splitlines()[-1])


def markdown(rows: list[dict]) -> str:
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([str(x) for x in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machine() -> str:
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    if not ON_GPU:
        return f"No GPU: tiny shapes, no speed. {versions}"
    about = torch.cuda.get_device_properties(0)
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(command, capture_output=True, text=True).stdout.split()
    memory = f"{about.total_memory / 2**30:.0f} GiB, driver {driver[0] if driver else 'unknown'}"
    return f"{about.name}, {memory}, CUDA {torch.version.cuda}. {versions}"


def report(args: argparse.Namespace) -> str:
    """All parts as Markdown; what fails stands there with its reason, and the others go on."""
    sections = {"Attention: the fused kernel against pair by pair in fp32": [("kernels",)],
                "A step": [("step", name, args.tokens, checkpointing, compiling, args.steps, args.tflops)
                           for name in args.sizes for checkpointing in (True, False) for compiling in (False, True)],
                "Checkpoint, resume, process group": [("going_on",)]}  # fmt: skip
    text = [f"# {machine()}"]
    bar = data.progress(None, "parts", "parts", sum(map(len, sections.values())))
    for title, parts in sections.items():
        rows, failed = [], []
        for part, *how in parts:
            result = in_a_process(part, *how)
            bar.update()
            if isinstance(result, str):
                failed.append(f"- {part} {', '.join(map(str, how))}: {result}")
            else:
                rows += result if isinstance(result, list) else [result]
        text += [f"## {title}", *([markdown(rows)] if rows else []), *(["\n".join(failed)] if failed else [])]
    bar.close()
    return "\n\n".join(text) + "\n"


if __name__ == "__main__":
    part, arguments = json.loads(sys.argv[1])
    print("\n" + json.dumps(PARTS[part](*arguments)))
