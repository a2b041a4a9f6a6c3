"""Train a language model on preferences.

    python train.py                                                        # the embedded world: no download, no GPU
    python train.py --model MODEL --dataset PAIRS.jsonl --objective "simpo(beta=2.5, gamma=0.5)" --lr 1e-6
    python train.py settings.yaml --lr 5e-7                                # a file of settings; the command line wins
    python train.py generate --model MODEL --prompts FILE --out FILE       # answers for AlpacaEval or Arena-Hard

Reads top to bottom: settings → objective → scoring → one step → evaluation → the run; after it come the embedded world and
answers for judges, which the run does without. Rows are preference pairs, or single completions for unpaired objectives. All
losses are means over the rows of the whole optimizer batch, so the gradient of a step does not depend on how the batch is cut
into microbatches.
"""

import argparse
import ast
import contextlib
import errno
import hashlib
import importlib.util
import inspect
import json
import math
import os
import platform
import resource
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from torch import Tensor
from tqdm import tqdm
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM

import data
import distributed as dist
from data import DataError, Example
from logprobs import ResponseLogProbs, check_head
from losses import BATCH_COUPLED, OBJECTIVES, REWARDS

# ---- settings --------------------------------------------------------------------------------------------------------


def option(default, text: str):
    return field(default=default, metadata={"help": text})


@dataclass
class Settings:
    model: str = option("tiny", 'folder or hub name of a causal language model; "tiny" builds one for the embedded world')
    dataset: str = option("tiny", "file, folder or hub name of preferences, with an optional slice: pairs.jsonl[:1000]")
    eval_dataset: str | None = option(None, "held-out preferences; without it, eval_size rows are taken out of dataset")
    eval_size: int = option(200, "rows held out of dataset for evaluation (0: none)")
    objective: str = option("simpo(beta=2.0, gamma=1.0)", "a function of losses.py, written as the call it is")
    out: str | None = option(None, "output folder; without it, a fresh one under runs/")
    overwrite: bool = option(False, "delete what is in out")
    resume: bool = option(False, "continue the run in out from its newest complete checkpoint")
    lr: float | None = option(None, "peak learning rate; without it 1e-6, or 2e-4 for the embedded world")
    batch_size: int = option(32, "rows of one optimizer step (pairs, or completions when unpaired), all ranks together")
    tokens_per_microbatch: int = option(2048, "token budget of one forward and backward pass")
    layout: str = option("packed", "packed (the prompt computed once, no padding) or padded (the textbook batch)")
    epochs: int = option(1, "passes over the training rows")
    max_steps: int | None = option(None, "stop after this many optimizer steps; the schedule ends there")
    warmup_ratio: float = option(0.1, "share of the steps in which the learning rate rises to lr")
    weight_decay: float = option(0.0, "AdamW weight decay, on matrices only")
    max_grad_norm: float = option(1.0, "gradients are scaled to at most this global norm (0: never)")
    replays: int = option(1, "LoRR: optimizer steps in a row on each batch (its paper: 3)")
    reset_alpha: float = option(1.0, "LoRR: after a step θ ← αθ + (1−α)θ⁰ in reset_modules (its paper: 0.5; 1: no reset)")
    reset_modules: str = option("down_proj", "parts of parameter names, commas between, that reset_alpha acts on")
    sft_weight: float = option(0.0, "LoRR: weight that the likelihood of the chosen has at the last replay (its paper: 0.5)")
    seed: int = option(0, "order of rows, held-out rows, and everything random in the embedded world")
    max_length: int = option(2048, "tokens of prompt + response; a longer response is cut")
    max_prompt_length: int | None = option(None, "longer prompts lose their oldest tokens; without it 7/8 of max_length")
    format: str = option("auto", "of the dataset's rows: auto, or a name of data.FORMATS")
    columns: str = option("", "columns to rename, new=old: prompt=question,chosen=good")
    compat: str | None = option(None, "simpo: tokenise and cut as the released SimPO code does")
    control_tokens: bool = option(False, "special tokens spelled in messages become real ones")
    equal_length: float = option(0.0, "share of the pairs whose responses are cut to the same length (POET)")
    drop_duplicates: bool = option(False, "keep only the first of rows with the same texts")
    drop_identical: bool = option(False, "drop pairs whose responses are the same")
    drop_conflicts: bool = option(False, "drop rows that say the opposite of another row")
    min_score_margin: float = option(0.0, "drop pairs whose scores differ by less")
    max_drop_fraction: float = option(0.1, "more invalid rows than this share is an error")
    dtype: str = option("auto", "arithmetic: fp32, bf16 (autocast; weights stay fp32) or auto (bf16 where it is in hardware)")
    export_dtype: str = option("auto", "weights of out/model: fp32, bf16, or auto (as the model came)")
    gradient_checkpointing: bool = option(False, "recompute activations in backward: less memory, a third more work")
    eval_every: int = option(0, "evaluate every so many steps (always before and after)")
    save_every: int = option(0, "write a checkpoint every so many steps (always when stopped by SIGTERM or Ctrl-C)")
    keep: int = option(2, "complete checkpoints to keep")
    samples: int = option(4, "held-out prompts whose greedy completions are recorded before, at evaluations and after")
    sample_tokens: int = option(64, "length limit of those completions")
    cache: str = option("~/.cache/plainpo", "folder for reference log-probs, found again by a hash of all they depend on")
    compile: bool = option(False, "torch.compile the decoder (CUDA)")
    log_to: str | None = option(None, "also send the metrics to tensorboard or wandb, if installed")
    device: str = option("auto", "cpu, cuda, or auto")
    recipe: str | None = option(None, "a published run, such as gemma-2-9b-it-simpo: model, data, objective, lr, lengths")
    annotator_noise: float = option(0.1, "embedded world: error (standard deviation) of the annotator about a quality")
    length_bias: float = option(0.03, "embedded world: what the annotator adds to a response's quality per word")
    mesh: str | None = option(None, "under torchrun: copies x parts, such as 2x4; without it one copy cut over all ranks")
    trust_remote_code: bool = option(False, "allow a model folder to bring Python code that is then run")


# Published settings: start → model, data, (prompt, total) lengths, {method: (objective, lr)}. γ and α in the papers' units.
# All: 128 pairs a step, one epoch, cosine with 10 % warm-up, no weight decay, gradients clipped to norm 1.
ULTRA = "HuggingFaceH4/ultrafeedback_binarized:train_prefs"
MISTRAL, LLAMA = "mistralai/Mistral-7B-Instruct-v0.2", "meta-llama/Meta-Llama-3-8B-Instruct"
PUBLISHED = {
    "mistral-7b-base": ("alignment-handbook/zephyr-7b-sft-full", ULTRA, (512, 1024), {
        "simpo": ("simpo(beta=2.0, gamma=1.6)", 3e-7), "simper": ("simper", 3e-7)}),
    "mistral-7b-instruct": (MISTRAL, "princeton-nlp/mistral-instruct-ultrafeedback", (1800, 2048), {
        "simpo": ("simpo(beta=2.5, gamma=0.25)", 5e-7), "simper": ("simper", 5e-7),
        "alpha-dpo": ("alpha_dpo(beta=2.5, gamma=0.375, alpha=0.125)", 6e-7),
        "gamma-simpo": ("gamma_simpo(beta=2.5, gamma=0.375, tau=10.0)", 6e-7)}),
    "llama-3-8b-base": ("princeton-nlp/Llama-3-Base-8B-SFT", ULTRA, (1800, 2048), {
        "simpo": ("simpo(beta=2.0, gamma=1.0)", 6e-7), "simper": ("simper", 6e-7)}),
    "llama-3-8b-instruct": (LLAMA, "princeton-nlp/llama3-ultrafeedback", (1800, 2048), {
        "simpo": ("simpo(beta=2.5, gamma=1.375)", 1e-6), "simper": ("simper", 1e-6),
        "alpha-dpo": ("alpha_dpo(beta=2.5, gamma=1.5, alpha=0.5)", 1e-6)}),
    "llama-3-8b-instruct-v0.2": (LLAMA, "princeton-nlp/llama3-ultrafeedback-armorm", (1800, 2048), {
        "simpo": ("simpo(beta=10.0, gamma=3.0)", 1e-6), "alpha-dpo": ("alpha_dpo(beta=10.0, gamma=4.0, alpha=2.0)", 1e-6),
        "gamma-simpo": ("gamma_simpo(beta=10.0, gamma=4.0, tau=10.0)", 1e-6)}),
    "gemma-2-9b-it": ("google/gemma-2-9b-it", "princeton-nlp/gemma2-ultrafeedback-armorm", (1800, 2048), {
        "simpo": ("simpo(beta=10.0, gamma=5.0)", 8e-7), "alpha-dpo": ("alpha_dpo(beta=10.0, gamma=4.0, alpha=0.5)", 8e-7),
        "gamma-simpo": ("gamma_simpo(beta=10.0, gamma=5.0, tau=20.0)", 8e-7)}),
}  # fmt: skip


def recipe(name: str) -> dict:
    """Settings of a published run, by name such as "gemma-2-9b-it-simpo"; files and the command line may change each."""
    recipes = {f"{start}-{method}": (start, method) for start, (*_, methods) in PUBLISHED.items() for method in methods}
    if name not in recipes:
        raise SettingsError(f"unknown recipe {name!r}; known are {', '.join(recipes)}")
    start, method = recipes[name]
    model, dataset, (prompt, length), methods = PUBLISHED[start]
    objective, lr = methods[method]
    return dict(model=model, dataset=dataset, objective=objective, lr=lr, max_prompt_length=prompt, max_length=length,
                batch_size=128, epochs=1, warmup_ratio=0.1, weight_decay=0.0, max_grad_norm=1.0, dtype="bf16")  # fmt: skip


class SettingsError(Exception):
    """A setting that its owner can mend; the message says which, why and how."""


CHOICES = {
    "layout": ("packed", "padded"),
    "dtype": ("auto", "fp32", "bf16"),
    "export_dtype": ("auto", "fp32", "bf16"),
    "log_to": (None, "tensorboard", "wandb"),
}


def parse_settings(argv: list[str]) -> Settings:
    """Command line, or one YAML/JSON file (first argument), or both: then the command line wins."""
    parser = HfArgumentParser(
        Settings, description=__doc__, formatter_class=transformers.hf_argparser.ArgumentDefaultsHelpFormatter
    )
    given = _settings_file(Path(argv[0])) if argv and argv[0].endswith((".yaml", ".yml", ".json")) else {}
    argv = argv[1:] if given else argv
    asked = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    asked.add_argument("--recipe", default=given.get("recipe"))
    named = asked.parse_known_args(argv)[0].recipe
    parser.set_defaults(**(recipe(named) if named else {}) | given)
    settings, unknown = parser.parse_args_into_dataclasses(argv, look_for_args_file=False, return_remaining_strings=True)
    if unknown:
        raise SettingsError(f"unknown setting {' '.join(unknown)}; `python train.py --help` lists all of them")
    check_settings(settings)
    return settings


def _settings_file(path: Path) -> dict:
    import yaml  # transformers brings it; YAML contains JSON

    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise SettingsError(f"{path}: cannot be read as settings ({error})") from error
    if not isinstance(values, dict):
        raise SettingsError(f"{path}: holds a {type(values).__name__}, not settings as key: value")
    values = {str(k).replace("-", "_"): v for k, v in values.items()}
    known = {f.name: f.type for f in fields(Settings)}
    for key, value in values.items():
        if key not in known:
            raise SettingsError(f"{path}: unknown setting {key!r}; known are {', '.join(known)}")
        is_bool = isinstance(value, bool)
        if (known[key] is bool) != is_bool and value is not None:
            raise SettingsError(
                f"{path}: {key} is {value!r}, which is not a {'yes or no' if known[key] is bool else 'fitting'} value"
            )
    # argparse converts defaults given as text with the setting's own type, so "5e-7" (text in YAML) becomes a number
    return {k: v if isinstance(v, bool) or v is None else str(v) for k, v in values.items()}


def check_settings(s: Settings) -> None:
    for name, accepted in CHOICES.items():
        if getattr(s, name) not in accepted:
            raise SettingsError(f"{name} is {getattr(s, name)!r}; accepted are {', '.join(str(a) for a in accepted if a)}")
    for name in ("batch_size", "tokens_per_microbatch", "epochs", "keep", "replays"):
        if getattr(s, name) < 1:
            raise SettingsError(f"{name} is {getattr(s, name)}; it must be at least 1")
    not_negative = ("eval_size", "eval_every", "save_every", "weight_decay", "max_grad_norm", "samples", "seed")
    for name in (*not_negative, "annotator_noise"):
        if getattr(s, name) < 0:
            raise SettingsError(f"{name} is {getattr(s, name)}; it must not be negative")
    if s.lr is not None and not (0 < s.lr < math.inf):
        raise SettingsError(f"lr is {s.lr}; a learning rate must be positive")
    if s.max_steps is not None and s.max_steps < 1:
        raise SettingsError(f"max_steps is {s.max_steps}; it must be at least 1")
    if not 0 <= s.warmup_ratio <= 1 or not 0 <= s.max_drop_fraction <= 1:
        raise SettingsError("warmup_ratio and max_drop_fraction are shares between 0 and 1")
    if not 0 <= s.reset_alpha <= 1:
        raise SettingsError(f"reset_alpha is {s.reset_alpha}; it is the share of the trained weights that stays, from 0 to 1")
    if not 0 <= s.sft_weight < math.inf:
        raise SettingsError(f"sft_weight is {s.sft_weight}; it must not be negative")
    longest_prompt = s.max_prompt_length if s.max_prompt_length is not None else s.max_length * 7 // 8
    if s.max_length < 2 or not 1 <= longest_prompt < s.max_length:
        raise SettingsError(
            f"max_length {s.max_length} with max_prompt_length {longest_prompt} leaves no room for a prompt and a response; "
            "raise max_length or lower max_prompt_length"
        )
    if s.log_to and importlib.util.find_spec(s.log_to) is None:
        raise SettingsError(f"log_to {s.log_to}: it is not installed (pip install {s.log_to})")
    if s.overwrite and s.resume:
        raise SettingsError("overwrite and resume exclude each other")
    if (s.overwrite or s.resume) and s.out is None:
        raise SettingsError("overwrite and resume need --out, the folder of the earlier run")
    if (s.model == "tiny") != (s.dataset == "tiny"):
        raise SettingsError(
            'the embedded world needs both model "tiny" and dataset "tiny"; give a real model and a real dataset'
        )


# ---- the objective ---------------------------------------------------------------------------------------------------


class Objective(NamedTuple):
    """A function of losses.py with its hyper-parameters; what it needs is read off its signature."""

    name: str
    function: Callable[..., Tensor]
    hyper: dict
    tensors: tuple[str, ...]

    def needs(self, prefix: str) -> bool:
        return any(t.startswith(prefix) for t in self.tensors)

    @property
    def unpaired(self) -> bool:
        return "desirable" in self.tensors

    @property
    def responses(self) -> int:
        """Responses of an example that are scored: 2, or 1 for unpaired and chosen-only objectives."""
        return 2 if "logp_l" in self.tensors else 1

    @property
    def coupled(self) -> bool:
        """Whether the rows of a batch depend on each other, so that the loss needs the whole batch at once."""
        switch = BATCH_COUPLED.get(self.name, False)
        return switch is None or bool(switch and self.setting(switch))

    def setting(self, name: str, otherwise=None):
        """The value of a hyper-parameter: given, default, or `otherwise` where the function has none of that name."""
        parameter = inspect.signature(self.function).parameters.get(name)
        return otherwise if parameter is None else self.hyper.get(name, parameter.default)

    def reward(self, logp: Tensor, ref: Tensor, length: Tensor) -> Tensor:
        """The reward of the objective's own paper, β included; (R,) → (R,)."""
        if self.setting("average") is False:
            length = torch.ones_like(length)
        return self.setting("beta", 1.0) * REWARDS[self.name](logp, ref, length)

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'{k}={v!r}' for k, v in self.hyper.items())})"


def parse_objective(text: str) -> Objective:
    """'simpo(beta=2.5, gamma=0.5)' or 'simpo' → Objective. Only a name and constants are understood; nothing is run."""
    try:
        node = ast.parse(text.strip(), mode="eval").body
        call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
        if not isinstance(call.func, ast.Name) or call.args or any(k.arg is None for k in call.keywords):
            raise ValueError
        name, hyper = call.func.id, {k.arg: ast.literal_eval(k.value) for k in call.keywords}
    except (ValueError, SyntaxError, TypeError):
        raise SettingsError(
            f'objective is {text!r}; write it as a call with named constants, such as "simpo(beta=2.5, gamma=0.5)"'
        ) from None
    if name not in OBJECTIVES:
        raise SettingsError(f"unknown objective {name!r}; known are {', '.join(OBJECTIVES)}")
    parameters = inspect.signature(OBJECTIVES[name]).parameters
    tensors = tuple(k for k, p in parameters.items() if p.kind is not p.KEYWORD_ONLY)
    known = [k for k in parameters if k not in tensors and k != "generator"]
    signature = f"{name}({', '.join(f'{k}={parameters[k].default!r}' for k in known)})"
    for key, value in hyper.items():
        if key not in known:
            raise SettingsError(f"objective {name} has no argument {key!r}; its signature is {signature}")
        default = parameters[key].default
        fits = (
            isinstance(value, type(default))
            if isinstance(default, (bool, str))
            else isinstance(value, (int, float)) and not isinstance(value, bool)
        )
        if not fits and value is not default:
            raise SettingsError(f"objective {name}: {key}={value!r} is of the wrong kind; its signature is {signature}")
    return Objective(name, OBJECTIVES[name], hyper, tensors)


def try_objective(objective: Objective) -> None:
    """Call the function once on small numbers, so that a value out of range is found before anything is loaded."""
    values = {"desirable": torch.tensor([True, False])}
    values |= {t: torch.tensor([4, 5]) for t in objective.tensors if t.startswith("len")}
    values |= {t: torch.tensor([-3.0, -4.0]) for t in objective.tensors if t not in values}
    try:
        call(objective, {t: values[t] for t in objective.tensors}, seed=[0])
    except ValueError as error:
        raise SettingsError(f"objective {objective}: {error}") from error


# ---- scoring ---------------------------------------------------------------------------------------------------------


def call(objective: Objective, tensors: dict[str, Tensor], seed: list[int]) -> Tensor:
    """Loss per row; functions that draw at random get a generator that depends on `seed` alone."""
    extra = {}
    if "generator" in inspect.signature(objective.function).parameters:
        extra["generator"] = torch.Generator().manual_seed(int(sum(x * 1_000_003**i for i, x in enumerate(seed)) % 2**63))
    return objective.function(*(tensors[t] for t in objective.tensors), **objective.hyper, **extra)


class Scores(NamedTuple):
    """Sums over responses of a set of n examples with k responses each; all (n, k) in nats, None where not needed."""

    length: Tensor
    logp: Tensor | None = None
    ref: Tensor | None = None
    kl: Tensor | None = None
    logp_mismatch: Tensor | None = None  # (n·k,): KTO's mismatched completions, under the policy
    ref_mismatch: Tensor | None = None  # (n·k,): and under the reference
    label: Tensor | None = None  # (n, k) bool

    def at(self, rows: Tensor) -> "Scores":
        return Scores(*(None if x is None else x[rows] for x in self))

    def by_name(self, objective: Objective) -> dict[str, Tensor]:
        """The tensors that the objective's signature asks for. `old_*` is the policy as it is at the start of the step."""
        sources = {"logp": self.logp, "len": self.length, "ref": self.ref, "kl": self.kl, "old": self.logp.detach()}
        named = {"desirable": self.label, "logp_kl": self.logp_mismatch, "ref_kl": self.ref_mismatch}
        for source, values in sources.items():
            if values is not None:
                named |= {source: values, f"{source}_w": values[:, 0], f"{source}_l": values[:, -1]}
        return {t: named[t].flatten() for t in objective.tensors}


class Run(NamedTuple):
    """What scoring and stepping share."""

    policy: ResponseLogProbs
    objective: Objective
    settings: Settings
    device: torch.device

    def arithmetic(self):
        """bf16 autocast or nothing. One context spans one kind of pass, so weights are cast once in it."""
        kind = self.device.type
        return torch.autocast(kind, torch.bfloat16) if uses_bf16(self.settings, self.device) else contextlib.nullcontext()

    def groups(self, examples: list[Example]) -> list[list[int]]:
        """The examples cut into microbatches by token count, as many for every rank: rank r takes groups r, r + ranks, …"""
        return data.split_by_tokens(
            [data.tokens_of(e) for e in examples], self.settings.tokens_per_microbatch, dist.world_size()
        )

    def microbatches(self, examples: list[Example]) -> list[tuple[list[int], data.Batch]]:
        """This rank's share of the examples: (indices, batch)."""
        mine, make = self.groups(examples)[dist.rank() :: dist.world_size()], data.LAYOUTS[self.settings.layout]
        return [(group, make([examples[i] for i in group]).to(self.device)) for group in mine]

    def balance(self, examples: list[Example]) -> dict[str, float]:
        """How a step is cut up: its microbatches, the heaviest over the mean one, and the share of computed positions that is
        padding or a prompt repeated."""
        loads, cells = [], 0
        for group in self.groups(examples):
            rows = [len(examples[i].prompt) + len(r) for i in group for r in examples[i].responses]
            loads.append(sum(data.tokens_of(examples[i]) for i in group))
            cells += loads[-1] if self.settings.layout == "packed" else len(rows) * max(rows, default=0)
        return {
            "microbatches": len(loads),
            "imbalance": max(loads) * len(loads) / sum(loads),
            "padding": 1 - sum(loads) / cells,
        }


@torch.no_grad()
def score(
    run: Run, examples: list[Example], with_kl: bool = False, progress: str | None = None
) -> tuple[Tensor, Tensor | None]:
    """Summed log-probs, and token KLs, of all responses without gradient: (n, k) each, on every rank."""
    logps, kls, k = {}, {}, len(examples[0].responses)
    with run.arithmetic():
        for group, batch in tqdm(
            _lazily(run, examples), desc=progress, unit=" batches", leave=False, disable=progress is None or not dist.is_main()
        ):
            logp, kl = run.policy(batch, with_kl)
            logps |= zip(group, logp.view(len(group), k))
            if with_kl:
                kls |= zip(group, kl.view(len(group), k))
    return dist.gather_rows(logps, len(examples)), dist.gather_rows(kls, len(examples)) if with_kl else None


def _lazily(run: Run, examples: list[Example]):
    """Microbatches of a whole dataset, made some hundred examples at a time, longest first within each."""
    for start in range(0, len(examples), 256):
        for group, batch in run.microbatches(examples[start : start + 256]):
            yield [start + i for i in group], batch


def uses_bf16(s: Settings, device: torch.device) -> bool:
    if s.dtype != "auto":
        return s.dtype == "bf16"
    if device.type == "cpu":
        flags = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        return bool(flags.get("avx512_bf16") or flags.get("amx_bf16"))
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def reference_scores(run: Run, examples: list[Example], what: str) -> Tensor | None:
    """Reference log-probs (n, k) of `examples`: the policy's own, before it has learnt anything, kept as numbers.

    Cached as safetensors under a hash of everything that they depend on: weights, token ids (so tokenizer, template, data
    and truncation), arithmetic and layout. A file that is not complete and finite is not used.
    """
    if not examples:
        return None
    s, key = run.settings, hashlib.sha256()
    key.update(json.dumps(["1", s.layout, uses_bf16(s, run.device), run.device.type, s.tokens_per_microbatch]).encode())
    key.update(json.dumps(dist.hash_weights(run.policy.model)).encode())
    for e in examples:
        key.update(json.dumps([e.prompt, e.responses]).encode())
    file = Path(s.cache).expanduser() / f"reference-{key.hexdigest()[:32]}.safetensors"
    ref = (dist.load_tensors(file) or {}).get("ref")
    if ref is not None and ref.shape == (len(examples), len(examples[0].responses)) and torch.isfinite(ref).all():
        say(f"reference log-probs of {len(examples)} {what} from {file}")
        return ref.to(run.device)
    ref, _ = score(run, examples, progress=f"reference, {what}")
    dist.save_tensors({"ref": ref}, file)
    return ref


def mismatched(examples: list[Example]) -> list[Example]:
    """For KTO: each row's prompt with a completion that answers another prompt, the next such one in the batch, in a circle."""
    flat = [(e.prompt, r) for e in examples for r in e.responses]
    found = []
    for i, (prompt, _) in enumerate(flat):
        others = (flat[(i + j) % len(flat)] for j in range(1, len(flat)))
        other = next((o for o in others if o[0] != prompt), None)
        if other is None:
            raise DataError(
                "kto needs at least two different prompts in every optimizer batch; raise batch_size or mix the data"
            )
        found.append(Example(prompt, [other[1]], where=examples[0].where))
    return found


# ---- one step --------------------------------------------------------------------------------------------------------


def coefficients(
    objective: Objective, scores: Scores, seed: list[int], sft: float = 0.0
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Loss per row (rows,) and the gradient of their sum with respect to every log-prob and KL, (n, k) each.

    sft: weight of the SFT term, which is −logp/length (nats per token) of a chosen or desirable response, 0 of another.
    """
    if not len(scores.logp):  # a rank without rows in this microbatch
        empty = torch.zeros_like(scores.logp)
        return empty.flatten(), empty, None if scores.kl is None else empty
    leaves = scores._replace(
        logp=scores.logp.detach().requires_grad_(), kl=None if scores.kl is None else scores.kl.detach().requires_grad_()
    )
    loss = call(objective, leaves.by_name(objective), seed)
    if sft:
        term = -(leaves.logp / leaves.length) * leaves.label
        loss = loss + sft * (term.flatten() if objective.unpaired else term.sum(-1))
    inputs = [leaves.logp] if leaves.kl is None else [leaves.logp, leaves.kl]
    grads = torch.autograd.grad(loss.sum(), inputs, allow_unused=True, materialize_grads=True)
    return loss.detach(), grads[0], grads[1] if len(grads) > 1 else None


def accumulate_gradients(
    run: Run, examples: list[Example], known: Scores, seed: list[int], batches=None, sft: float = 0.0
) -> tuple[Scores, Tensor]:
    """Put the gradient of the mean loss over `examples`, with the SFT term where `sft` > 0, into the policy's parameters.

    The gradient of a microbatch is Σ (∂L/∂logp) · ∂logp/∂θ. The factors ∂L/∂logp come from the microbatch itself, or, where the
    objective couples the rows, from a first pass that scores the whole batch without gradient. A coupled batch that is a
    single microbatch on every rank needs no first pass: its own log-probs are gathered and then differentiated.

    Args:
        known: what does not depend on the policy: lengths, reference, labels, mismatches.
        batches: run.microbatches(examples), if they were made ahead of time.
    Returns:
        the scores of the whole batch, and its loss per row; on every rank.
    """
    objective, with_kl = run.objective, run.objective.needs("kl_")
    k = known.length.shape[1]  # responses per example
    batches, rows = batches or run.microbatches(examples), len(examples) * (k if objective.unpaired else 1)
    whole, kept = None, None
    if objective.coupled and len(batches) > 1:
        logp, kl = score(run, examples, with_kl)
        whole = coefficients(objective, known._replace(logp=logp, kl=kl), seed, sft)
    losses, logps, kls = {}, {}, {}
    with run.arithmetic():
        for i, (group, batch) in enumerate(batches):
            dist.sync_gradients(run.policy, last=i == len(batches) - 1)
            logp, kl = run.policy(batch, with_kl)
            logp, kl = logp.view(len(group), k), kl.view(len(group), k) if with_kl else None
            logps |= zip(group, logp.detach())
            if with_kl:
                kls |= zip(group, kl.detach())
            at = torch.tensor(group, dtype=torch.long)
            if objective.coupled and whole is None:
                kept = dist.gather_rows(logps, len(examples)), dist.gather_rows(kls, len(examples)) if with_kl else None
                whole = coefficients(objective, known._replace(logp=kept[0], kl=kept[1]), seed, sft)
            if whole is None:
                loss, d_logp, d_kl = coefficients(objective, known.at(at)._replace(logp=logp, kl=kl), seed, sft)
                losses |= zip(group, loss.view(len(group), k if objective.unpaired else 1))
            else:
                loss, d_logp, d_kl = whole[0], whole[1][at], whole[2][at] if with_kl else None
            heads, grads = ([logp, kl], [d_logp, d_kl]) if with_kl else ([logp], [d_logp])
            torch.autograd.backward(heads, [g / rows for g in grads])
    everything = known._replace(logp=dist.gather_rows(logps, len(examples)))
    if with_kl:
        everything = everything._replace(kl=dist.gather_rows(kls, len(examples)))
    return everything, whole[0] if whole is not None else dist.gather_rows(losses, len(examples)).flatten()


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
            raise SettingsError(f"reset_modules: {part!r} is part of no parameter's name; the last names are {', '.join(last)}")
    return [p for name, p in named.items() if any(part in name for part in parts)]


@torch.no_grad()
def reset(parameters: list[torch.nn.Parameter], origin: list[Tensor], alpha: float) -> None:
    """θ ← αθ + (1−α)θ⁰, in place; where a parameter is cut over ranks each rank does its rows."""
    for parameter, start in zip(parameters, origin):
        parameter.mul_(alpha).add_(start, alpha=1 - alpha)


def learning_rate(step: int, steps: int, s: Settings) -> float:
    """Linear warm-up over warmup_ratio of the steps, then a half cosine down to zero. `step` counts from 0."""
    warmup = max(1, round(s.warmup_ratio * steps))
    if step < warmup:
        return s.lr * (step + 1) / warmup
    return s.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def measures(objective: Objective, scores: Scores, loss: Tensor) -> dict[str, float]:
    """Loss and rewards of a batch.

    Pairs: reward_margin is the mean of r_w − r_l, reward_accuracy the share of pairs with r_w > r_l (a tie counts ½).
    Unpaired rows: the difference of mean rewards, desirable minus undesirable, and the share of all (desirable, undesirable)
    couples in the right order. Log-probs per token are Σ logp / Σ tokens over the chosen (desirable) and rejected ones.
    """
    ref = scores.ref if scores.ref is not None else torch.zeros_like(scores.logp)
    reward = objective.reward(scores.logp, ref, scores.length)
    label, found = scores.label, {"loss": loss.mean().item()}
    good, bad = reward[label], reward[~label]
    if len(good) and len(bad):
        paired = reward.shape[1] == 2
        difference = (reward[:, 0] - reward[:, 1]) if paired else (good[:, None] - bad[None, :]).flatten()
        found["reward_margin"] = difference.mean().item()
        found["reward_accuracy"] = (0.5 * (1 + difference.sign())).mean().item()
    for side, mask in (("w", label), ("l", ~label)):
        if mask.any():
            found[f"logp_{side}_per_token"] = (scores.logp[mask].sum() / scores.length[mask].sum()).item()
    return found


def stop_if_not_finite(examples: list[Example], scores: Scores, loss: Tensor, grad_norm: float) -> None:
    """End the run before the weights are touched, naming the rows whose loss or log-prob is not a finite number."""
    bad = ~torch.isfinite(loss.view(len(examples), -1)).all(-1) | ~torch.isfinite(scores.logp).all(-1)
    if not bad.any() and math.isfinite(grad_norm):
        return
    rows = [e.where for e, b in zip(examples, bad.tolist()) if b] or [e.where for e in examples]
    what = "loss" if bad.any() else "gradient"
    raise SettingsError(
        f"the {what} is not finite; the weights were left as they were before this step. Rows: {'; '.join(rows[:8])}"
        f"{' …' if len(rows) > 8 else ''}. Look at them with `python data.py show`; if they are sound, lower lr"
    )


# ---- model and data --------------------------------------------------------------------------------------------------


def load_model(s: Settings) -> torch.nn.Module:
    """A transformers model with fp32 weights and dropout off.

    Under torchrun the weights of a folder come later, when the model has been cut up: see `distributed.load_weights`.
    """
    try:
        model = dist.build_model(s.model, s.trust_remote_code)
    except DataError:
        raise
    except Exception as error:  # transformers raises many kinds; all mean that there is no loadable model
        raise SettingsError(
            f"{s.model}: no loadable causal language model there ({str(error).strip().splitlines()[0]})"
        ) from error
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
            raise SettingsError(
                f"{type(model).__name__} has {kind} layers, which carry state across tokens; use --layout padded"
            )


def load_rows(s: Settings, tokenizer, objective: Objective) -> tuple[list[Example], list[Example], dict]:
    """(training examples, held-out examples, report) in the form the objective trains on."""
    names = set(inspect.signature(data.load).parameters) - {"dataset", "tokenizer"}
    how = {f.name: getattr(s, f.name) for f in fields(s) if f.name in names}
    examples, report = data.load(s.dataset, tokenizer, **how)
    say(f"data: {report}")
    reports = {"dataset": report._asdict()}
    if s.eval_dataset:
        held_out, eval_report = data.load(s.eval_dataset, tokenizer, **how)
        say(f"held-out data: {eval_report}")
        reports["eval_dataset"] = eval_report._asdict()
    else:
        if s.eval_size >= len(examples):
            raise SettingsError(f"eval_size {s.eval_size} leaves no training rows of {len(examples)}; lower it")
        examples, held_out = data.split_held_out(examples, s.eval_size, s.seed)
    for e in (*examples[:1], *held_out[:1]):
        if e.desirable is not None and not objective.unpaired:
            raise SettingsError(
                f"{objective.name} compares pairs, but {e.where} is a single labelled completion; use kto, bco or uapo"
            )
    return data.mapped(examples, lambda e: _fit(e, objective)), data.mapped(held_out, lambda e: _fit(e, objective)), reports


def _fit(e: Example, objective: Objective) -> Example:
    """A pair keeps both responses for paired and unpaired objectives, its chosen one where only that is scored."""
    return e if objective.unpaired or len(e.responses) == objective.responses else e._replace(responses=e.responses[:1])


def known_scores(examples: list[Example], ref: Tensor | None, ref_mismatch: Tensor | None, device) -> Scores:
    """What a batch's scores consist of before the policy is asked."""
    length = torch.tensor([[len(r) for r in e.responses] for e in examples], device=device)
    label = [[e.desirable] if e.desirable is not None else [True, False][: len(e.responses)] for e in examples]
    return Scores(length, ref=ref, ref_mismatch=ref_mismatch, label=torch.tensor(label, device=device))


# ---- accounting ------------------------------------------------------------------------------------------------------


def windows_of(config) -> list[int | None]:
    """The attention window of each layer, None where a layer sees everything."""
    layers, window = config.num_hidden_layers, getattr(config, "sliding_window", None)
    if not getattr(config, "use_sliding_window", True):
        window = None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * layers
    return [window if "sliding" in kind else None for kind in kinds]


def seen_keys(first: int, count: int, window: int | None) -> int:
    """Keys that `count` causal queries at positions first, first + 1, … see in all: Σ min(position + 1, window)."""
    full = max(0, min(count, window - 1 - first)) if window else count
    return full * first + full * (full + 1) // 2 + (count - full) * (window or 0)


def model_flops(model: torch.nn.Module, examples: list[Example]) -> float:
    """Floating-point operations that one forward and backward over `examples` has to do, each prompt counted once.

    Body: 6 per weight and token. Head: 6·V·D per scored token. Attention: 12·heads·head_dim per layer and (query, key) pair
    that the mask lets through. What is done twice (checkpointing, the head's second pass, padding) is not counted.
    """
    config = model.config.get_text_config()
    head = model.get_output_embeddings().weight.numel()
    embeddings = {id(p) for p in (model.get_input_embeddings().weight, model.get_output_embeddings().weight)}
    body = sum(p.numel() for p in model.parameters() if id(p) not in embeddings)
    width = config.num_attention_heads * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    scored = sum(len(r) for e in examples for r in e.responses)
    attention = 0
    for window, layers in Counter(windows_of(config)).items():
        for e in examples:
            p = len(e.prompt)
            keys = seen_keys(0, p, window) + sum(seen_keys(p, len(r), window) for r in e.responses)
            attention += 12.0 * width * layers * keys
    return 6.0 * body * sum(map(data.tokens_of, examples)) + 6.0 * head * scored + attention


def work(model: torch.nn.Module, batch: list[Example], seconds: float, rate: float) -> dict[str, float]:
    """What a step computed and how fast; `rate` in floating-point operations per second of all ranks."""
    tokens, flops = sum(map(data.tokens_of, batch)), model_flops(model, batch)
    speed = {"seconds": seconds, "tokens_per_second": tokens / seconds, "mfu": flops / seconds / rate}
    return {"tokens": tokens, "flops": flops, **speed}


def matmul_rate(model: torch.nn.Module, run: Run) -> float:
    """Best floating-point operations per second of a few products: 2,048 tokens through the model's MLP, and 2,048³."""
    config = model.config.get_text_config()
    hidden, mlp = config.hidden_size, getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    dtype = torch.bfloat16 if uses_bf16(run.settings, run.device) else torch.float32
    best = 0.0
    for n, k, m in ((2048, hidden, mlp), (2048, mlp, hidden), (2048, 2048, 2048)):
        a, b = (torch.randn(shape, device=run.device).to(dtype) for shape in ((n, k), (k, m)))
        for _ in range(4):
            if run.device.type == "cuda":
                torch.cuda.synchronize()
            tick = time.perf_counter()
            a @ b
            if run.device.type == "cuda":
                torch.cuda.synchronize()
            best = max(best, 2.0 * n * k * m / (time.perf_counter() - tick))
    return best


# ---- record ----------------------------------------------------------------------------------------------------------


def say(text: str) -> None:
    if dist.is_main():
        tqdm.write(text, file=sys.stderr)


@torch.no_grad()
def complete(policy: ResponseLogProbs, tokenizer, prompts: list[list[int]], tokens: int) -> list[str]:
    """Greedy completions of prompts given as token ids, with the model's own attention."""
    model, texts = policy.model, []
    layout, was_training = policy.use_layout("padded"), model.training
    model.train(False)
    for i in range(0, len(prompts), 32):
        part = prompts[i : i + 32]
        width = max(map(len, part))
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in part], device=model.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in part], device=model.device)
        stop = model.generation_config.eos_token_id or tokenizer.eos_token_id
        out = policy.within(
            type(model).generate, input_ids=ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False,
            eos_token_id=stop, pad_token_id=pad,
            temperature=None, top_p=None, top_k=None,
        )  # fmt: skip
        texts += tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
    model.train(was_training)
    policy.use_layout(layout)
    return [t.strip() for t in texts]


def write_samples(file: Path, prompts: list[str], texts: dict[str, list[str]]) -> list[dict]:
    """samples.jsonl: for each prompt the completions "before", "during" ({step: text}) and "after" (null until the end)."""
    rows = []
    for i, prompt in enumerate(prompts):
        during = {step: found[i] for step, found in texts.items() if step.isdigit()}
        after = texts["after"][i] if "after" in texts else None
        rows.append({"prompt": prompt, "before": texts["before"][i], "during": during, "after": after})
    file.with_suffix(".part").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    os.replace(file.with_suffix(".part"), file)
    return rows


def read_samples(file: Path, last: int) -> dict[str, list[str]]:
    """The completions "during" an earlier part of a run, {step: one for each prompt}, up to step `last`."""
    try:
        rows = [json.loads(line)["during"] for line in file.read_text().split("\n")[:-1]]
        return {step: [row[step] for row in rows] for step in (rows[0] if rows else ()) if int(step) <= last}
    except (OSError, ValueError, KeyError):
        return {}  # no such file, or of a version that kept none


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
    found, slower = {}, "Lower lr (try a third), or stop earlier: --eval-every shows where it began"
    was, is_now = start.get("repetition", 0.0), now.get("repetition", 0.0)
    if is_now > REPETITION and is_now > was + REPETITION_RISE:
        found["repetition"] = (
            f"the sample completions repeat themselves: {is_now:.0%} of their word 3-grams occurred before in the same answer, "
            f"{was:.0%} at the start. Read samples.jsonl. {slower}"
        )
    if now.get("eval_drift", 0.0) > DRIFT:
        found["drift"] = (
            f"the model is far from its start: held-out responses have lost {now['eval_drift']:.2f} nats per token. {slower}; "
            "objectives with a reference hold on to the start with a larger beta"
        )
    was, is_now = start.get("eval_logp_w_per_token"), now.get("eval_logp_w_per_token")
    if was is not None and is_now is not None and is_now < was - COLLAPSE and is_now < COLLAPSE_RATIO * was:
        found["collapse"] = (
            f"the chosen responses themselves become unlikely: {was:.2f} → {is_now:.2f} nats per token on held-out rows. "
            f"{slower}; --sft-weight 0.1 holds them up"
        )
    return found


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


def prepare_out(s: Settings) -> Path:
    """The output folder; one that already holds a run is refused unless overwrite or resume was asked for."""
    if s.out is None:
        stamp = f"{time.strftime('%Y%m%d-%H%M%S')}-{s.objective.partition('(')[0].strip()}"
        out, n = Path("runs") / stamp, 1
        while out.exists():
            out, n = Path("runs") / f"{stamp}-{n + 1}", n + 1
    else:
        out = Path(s.out)
    if out.exists() and not out.is_dir():
        raise SettingsError(f"out {out} is a file, not a folder")
    holds_run = (out / "settings.json").exists() or (out / "checkpoints").is_dir()
    if s.resume and not holds_run:
        raise SettingsError(f"out {out} holds no run to resume")
    if s.overwrite and out.exists() and any(out.iterdir()) and not holds_run:
        raise SettingsError(f"out {out} holds files but no run of plainpo; overwrite would delete them. Choose another folder")
    if out.exists() and any(out.iterdir()) and not (s.overwrite or s.resume):
        raise SettingsError(
            f"out {out} already holds {'a run' if holds_run else 'files'}; use --resume, --overwrite or another folder"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".probe").write_text("")
        (out / ".probe").unlink()
    except OSError as error:
        raise SettingsError(f"out {out} cannot be written ({error})") from error
    return out


# ---- the run ---------------------------------------------------------------------------------------------------------


def evaluate(run: Run, held_out: list[Example], known: Scores, start: Tensor | None = None) -> dict[str, float]:
    """Measures of the held-out examples as one batch, each name with eval_ in front.

    Args:
        start: (n, k) summed log-probs before the first step. With them eval_drift, nats per token: the mean over responses of
            (start − now) / length. It estimates KL(start ‖ now) per token only if the responses are the start's own samples
            (then ≥ 0 up to noise); of other texts it says by how much they became less likely, below 0 where more likely.
    """
    logp, kl = score(run, held_out, run.objective.needs("kl_"), progress="evaluate")
    scores = known._replace(logp=logp, kl=kl)
    if run.objective.needs("logp_kl"):
        scores = scores._replace(logp_mismatch=score(run, mismatched(held_out))[0].flatten())
    loss = call(run.objective, scores.by_name(run.objective), seed=[run.settings.seed])
    found = measures(run.objective, scores, loss)
    if start is not None:
        found["drift"] = ((start - logp) / known.length).mean().item()
    return {f"eval_{k}": v for k, v in found.items()}


def compare_layouts(run: Run, examples: list[Example], bound: float) -> None:
    """Score the first examples in the packed and in the padded layout; they must agree per token within `bound` nats."""
    if run.settings.layout != "packed":
        return
    padded = Run(run.policy, run.objective, Settings(**{**asdict(run.settings), "layout": "padded"}), run.device)
    with_packed, _ = score(run, examples)
    run.policy.use_layout("padded")
    with_padded, _ = score(padded, examples)
    run.policy.use_layout("packed")
    lengths = torch.tensor([[len(r) for r in e.responses] for e in examples], device=with_packed.device)
    worst = ((with_packed - with_padded).abs() / lengths).max().item()
    say(
        f"layouts: packed and padded differ by at most {worst:.2g} nats per token on {len(examples)} examples (bound {bound:g})"
    )
    if not worst <= bound:
        raise SettingsError(
            f"the packed layout disagrees with the padded one by {worst:.3g} nats per token; use --layout padded"
        )


def train(s: Settings) -> dict:
    """One run from settings to exported model; returns the summary that is also written to out/summary.json."""
    started = time.time()
    # objective and output first: a mistake there should cost no loading
    objective = parse_objective(s.objective)
    try_objective(objective)
    device = dist.setup(s.device)
    s.lr = s.lr if s.lr is not None else (2e-4 if s.model == "tiny" else 1e-6)
    out = dist.on_main(prepare_out, s)
    s.out = str(out)
    say("settings: " + json.dumps(asdict(s)))

    # data
    given, world = asdict(s), None
    if s.model == "tiny":
        world, pairs = dist.on_main(embedded_world, s)
        s = replace(s, model=str(world / "model"), dataset=str(pairs))
    tokenizer = data.load_tokenizer(s.model, s.trust_remote_code)
    examples, held_out, report = load_rows(s, tokenizer, objective)

    # model: fp32 weights; the reference of an objective is the model as it is before the first step
    model = load_model(s)
    embeddings = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > embeddings:
        raise SettingsError(f"the tokenizer has {len(tokenizer)} ids, but the model only {embeddings} embeddings: no match")
    if s.layout == "packed":
        refuse_packed(model)
    exact = not uses_bf16(s, device)
    reference = None
    if objective.needs("kl_w"):
        reference = load_model(s).requires_grad_(False).train(False)
    came_in = model.config.dtype if isinstance(model.config.dtype, torch.dtype) else torch.float32
    export_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "auto": came_in}[s.export_dtype]
    dist.on_main(dist.check_space, out, model, s.keep + 1 if s.save_every else 0, export_dtype)
    policy = dist.shard(ResponseLogProbs(model, reference), s.mesh, not exact, s.gradient_checkpointing)
    for part in (model, reference) if reference is not None else (model,):
        dist.load_weights(part, s.model, device)
    run = Run(policy, objective, s, device)
    policy.use_layout(s.layout)
    model.train()
    resettable = reset_parameters(model, s)
    if s.compile:
        model.base_model.compile(dynamic=True)

    # checks that cost one small pass each
    few = examples[: max(1, min(4, len(examples)))]
    policy.use_layout("padded")
    try:
        with run.arithmetic():
            policy.within(check_head, torch.tensor([few[0].prompt[-32:]], device=device), 1e-3 if exact else 0.5)
        policy.use_layout(s.layout)
        compare_layouts(run, few, 1e-4 if exact else 0.1)
    except ValueError as error:  # logprobs.py names the head or the attention that it cannot honour
        raise SettingsError(str(error)) from error

    # the whole plan of the run, and what the reference says of every row in it
    epochs = [[r.tolist() for r in data.step_plan(len(examples), s.batch_size, s.seed, e)] for e in range(s.epochs)]
    plan = [rows for epoch in epochs for rows in epoch for _ in range(s.replays)][: s.max_steps]
    ref = ref_eval = ref_mismatch = None
    if objective.needs("ref"):
        ref, ref_eval = reference_scores(run, examples, "rows"), reference_scores(run, held_out, "held-out rows")
    mismatch_eval = None
    if objective.needs("ref_kl"):
        rows = [mismatched([examples[i] for i in step]) for step in plan[:: s.replays]]
        flat = reference_scores(run, [e for step in rows for e in step], "mismatched rows").flatten()
        ref_mismatch = flat.split([len(step) for step in rows])
        mismatch_eval = reference_scores(run, mismatched(held_out), "mismatched held-out rows").flatten() if held_out else None
    known_eval = known_scores(held_out, ref_eval, mismatch_eval, device) if held_out else None

    # what the model says and answers before the first step, also of a run that is resumed
    start_eval = ref_eval if ref_eval is not None or not held_out else score(run, held_out)[0]
    origin = [p.detach().clone() for p in resettable]
    prompts = [e.prompt for e in held_out[: s.samples]]
    before = complete(policy, tokenizer, prompts, s.sample_tokens)

    # optimizer; resume
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": s.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), eps=1e-8, fused=True)
    first, metrics = 0, out / "metrics.jsonl"
    same_run = identity(s, objective, examples)
    if s.resume and (found := dist.newest_checkpoint(out / "checkpoints", say)):
        first = dist.load_checkpoint(found, model, optimizer, same_run)["step"]
        say(f"resumed after step {first} from {found}")
    dist.on_main(open_records, s, given, out, first, report)
    log = open_log(s, out)
    texts = {"before": before, **dist.on_main(read_samples, out / "samples.jsonl", first)}
    shown = [tokenizer.decode(p) for p in prompts]
    recorder = open(metrics if dist.is_main() else os.devnull, "a", buffering=1)

    def record(line: dict) -> None:
        recorder.write(json.dumps(line) + "\n")
        log(line)

    def evaluated(step: int, answers: list[str]) -> dict:
        found = evaluate(run, held_out, known_eval, start_eval) | ({"repetition": repetition(answers)} if answers else {})
        record({"step": step, **found})
        say(f"{f'step {step}' if step else 'before'}: {brief(found)}")
        return found

    # before
    say(
        f"{objective}: {len(examples)} rows, {len(held_out)} held out, {len(plan)} steps of {s.batch_size}, "
        f"{'fp32' if exact else 'bf16'}, {device}"
    )
    evaluation = {}
    if held_out and first == 0:
        evaluation = evaluated(0, before)
    start = next((x for x in dist.on_main(read_metrics, metrics) if x["step"] == 0), {})
    warned = set()

    # the loop
    loop_started, done = time.time(), Counter()
    rate = matmul_rate(model, run) * dist.world_size()
    ahead = run.microbatches([examples[i] for i in plan[first]]) if first < len(plan) else []
    bar = tqdm(range(first, len(plan)), desc="train", unit=" steps", initial=first, total=len(plan), disable=not dist.is_main())
    stop = dist.StopOnSignal()
    for step in bar:
        tick = time.time()
        batch = [examples[i] for i in plan[step]]
        mismatch = None if ref_mismatch is None else ref_mismatch[step // s.replays]
        known = known_scores(batch, None if ref is None else ref[plan[step]], mismatch, device)
        if objective.needs("logp_kl"):
            known = known._replace(logp_mismatch=score(run, mismatched(batch))[0].flatten())
        replay, sft = replay_of(step, s)
        scores, loss = accumulate_gradients(run, batch, known, [s.seed, step], ahead, sft)
        ahead = run.microbatches([examples[i] for i in plan[step + 1]]) if step + 1 < len(plan) else []  # while a GPU works
        grad_norm = float(dist.clip_gradients(policy, s.max_grad_norm))
        stop_if_not_finite(batch, scores, loss, grad_norm)
        if step == 0 and (ref is not None or reference is not None):
            check_step_zero(scores, 1e-3 if exact else 0.1)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, len(plan), s)
        optimizer.step()
        optimizer.zero_grad()
        reset(resettable, origin, s.reset_alpha)
        line = {"step": step + 1, **measures(objective, scores, loss), "grad_norm": grad_norm, "lr": group["lr"]}
        line |= {"pairs": len(loss), **work(model, batch, time.time() - tick, rate), **run.balance(batch)}
        line |= {"replay": replay + 1} if s.replays > 1 else {}
        line |= {"sft_weight": sft} if sft else {}
        done.update({k: line[k] for k in ("pairs", "tokens", "flops")})
        record(line)
        headline = {"loss": "loss", "reward_margin": "margin", "reward_accuracy": "accuracy", "tokens_per_second": "tok/s"}
        bar.set_postfix({v: f"{line[k]:.4g}" for k, v in headline.items() if k in line})
        if held_out and (step + 1 == len(plan) or s.eval_every and (step + 1) % s.eval_every == 0):
            answers = complete(policy, tokenizer, prompts, s.sample_tokens)
            evaluation = evaluated(step + 1, answers)
            texts["after" if step + 1 == len(plan) else str(step + 1)] = answers
            dist.on_main(write_samples, out / "samples.jsonl", shown, texts)
            for guard, warning in divergence(start, evaluation).items():
                if guard not in warned:
                    say(f"warning: {warning}")
                    warned.add(guard)
        stopping = stop.requested()
        if stopping or s.save_every and (step + 1) % s.save_every == 0:
            state = {"step": step + 1, "run": same_run}
            saved = dist.save_checkpoint(out / "checkpoints", model, optimizer, state, s.keep, tokenizer)
        if stopping:
            if not saved:
                raise SettingsError(f"stopped after step {step + 1} without a checkpoint; --resume goes on from an earlier one")
            say(f"stopped after step {step + 1}; go on with --resume --out {out}")
            raise SystemExit(0)
    stop.release()
    loop_seconds = time.time() - loop_started
    recorder.close()

    # after: samples, model, curves, summary
    if "after" not in texts:  # resumed at the end
        texts["after"] = complete(policy, tokenizer, prompts, s.sample_tokens)
    samples = dist.on_main(write_samples, out / "samples.jsonl", shown, texts)
    policy.use_layout("padded")
    lines = dist.on_main(read_metrics, metrics)
    measured = {k: v for line in lines[-2:] for k, v in line.items()}
    card = dist.model_card(out.name, {**given, "objective": str(objective)}, measured)
    dist.export(model, tokenizer, out / "model", export_dtype, card)
    dist.on_main(draw_curves, lines, out / "curves.png", f"{objective} on {Path(s.dataset).name}")
    evaluation = evaluation or {k: v for x in lines for k, v in x.items() if k.startswith("eval_") or k == "repetition"}
    summary = {
        "objective": str(objective), "steps": len(plan), "rows": len(examples), "held_out": len(held_out),
        "before": {k: v for k, v in start.items() if k != "step"}, "after": evaluation,
        **({"world": dist.on_main(judge, out / "model", world, out / "answers.jsonl")} if world else {}),
        "pairs_per_second": done["pairs"] / loop_seconds, "tokens_per_second": done["tokens"] / loop_seconds,
        "mfu": done["flops"] / loop_seconds / rate, "matmul_flops_per_second": rate,
        "train_seconds": loop_seconds, "seconds": time.time() - started, "peak_memory_gib": peak_memory(device),
        "dtype": "fp32" if exact else "bf16", "device": str(device), "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__},
        "out": str(out),
    }  # fmt: skip
    dist.on_main((out / "summary.json").write_text, json.dumps(summary, indent=2) + "\n")
    report_end(summary, samples)
    return summary


def check_step_zero(scores: Scores, bound: float) -> None:
    """Before the first update policy and reference are the same model: every log-ratio, reward and KL must be 0."""
    log_ratio_and_kl = (None if scores.ref is None else scores.logp - scores.ref, scores.kl)
    gaps = [(x / scores.length).abs().max().item() for x in log_ratio_and_kl if x is not None]
    say(f"step 0: policy and reference differ by at most {max(gaps):.2g} nats per token (bound {bound:g})")
    if not max(gaps) <= bound:
        raise SettingsError(
            f"step 0: policy and reference differ by {max(gaps):.3g} nats per token; the reference is not this model's"
        )


def peak_memory(device: torch.device) -> float:
    """Highest memory in use so far, GiB: of the GPU, or resident memory of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def identity(s: Settings, objective: Objective, examples: list[Example]) -> dict:
    """What must be equal for a run to go on from a checkpoint: all that its losses depend on but the number of ranks."""
    rows = hashlib.sha256(json.dumps([[e.prompt, e.responses] for e in examples]).encode()).hexdigest()[:16]
    names = ("lr", "batch_size", "epochs", "max_steps", "warmup_ratio", "weight_decay", "max_grad_norm", "seed", "max_length")
    names += ("replays", "reset_alpha", "reset_modules", "sft_weight")
    same = {"model": Path(s.model).name, "dataset": Path(s.dataset).name, "objective": str(objective)}
    return {**same, **{k: getattr(s, k) for k in names}, "training rows (hash)": rows}


def read_metrics(file: Path, last: int | None = None) -> list[dict]:
    """The lines of metrics.jsonl, all or up to a step; a line that a killed run left half-written is passed over."""
    lines = []
    for text in file.read_text().splitlines() if file.exists() else ():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(text))
    return [line for line in lines if last is None or line["step"] <= last]


def open_records(s: Settings, given: dict, out: Path, first: int, report: dict) -> None:
    """Clear an earlier run that is overwritten, or the metrics of steps after the one that is resumed from; note settings."""
    if s.overwrite:  # only now that data and model have loaded is the earlier run given up
        shutil.rmtree(out)
    (out / "checkpoints").mkdir(parents=True, exist_ok=True)
    if s.resume:
        kept = read_metrics(out / "metrics.jsonl", first) if first else []
        (out / "metrics.part").write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(out / "metrics.part", out / "metrics.jsonl")
    (out / "settings.json").write_text(json.dumps(given, indent=2) + "\n")
    (out / "data.json").write_text(json.dumps(report, indent=2) + "\n")


def brief(evaluation: dict) -> str:
    return ", ".join(f"{k} {v:.4f}" for k, v in evaluation.items())


def report_end(summary: dict, samples: list[dict]) -> None:
    for sample in samples[:3]:
        say(f"  prompt  {sample['prompt'][-160:]!r}\n  before  {sample['before'][:160]!r}\n  after   {sample['after'][:160]!r}")
    before, after = summary["before"], summary["after"]
    n = max(1, summary["held_out"])
    for key, name in (
        ("eval_reward_accuracy", "held-out accuracy"),
        ("eval_reward_margin", "held-out margin"),
        ("eval_loss", "held-out loss"),
    ):
        if key in before and key in after:
            error = (
                f" (± {math.sqrt(max(after[key] * (1 - after[key]), 0) / n):.3f} standard error)" if "accuracy" in key else ""
            )
            say(f"{name}: {before[key]:.4f} → {after[key]:.4f}{error}")
    if "world" in summary:
        say(f"answers to {data.HELD_OUT_PROMPTS} held-out prompts (temperature 1):")
        for name, (was, now) in summary["world"].items():
            say(f"  {WORLD_TITLES[name]:<20} {was:.3f} → {now:.3f}")
    say(
        f"{summary['pairs_per_second']:.2f} rows/s, {summary['seconds']:.0f} s in all, "
        f"peak memory {summary['peak_memory_gib']:.2f} GiB"
    )
    say(f"everything is in {summary['out']}; the model is in {summary['out']}/model")


# ---- the embedded world ----------------------------------------------------------------------------------------------
#
# The papers' experiment with a known truth: supervised start → 5 samples per prompt → an annotator's scores → best against
# worst → training → win rate against the start. Every step is the code that real models go through.

SUPERVISED_STEPS, PROMPTS = 250, 1736
WORLD_TITLES = {
    "win_rate": "win rate",
    "lc_win_rate": "length-controlled",
    "quality": "true quality",
    "length": "words",
    "kl": "KL, nats",
    "repetition": "repeated items",
}


def embedded_world(s: Settings) -> tuple[Path, Path]:
    """(folder with model, prompts, samples and the start's answers to held-out prompts; file of pairs), built once."""
    tokenizer, demonstrations, _ = data.tiny_world(s.seed, 8192)
    made_of = json.dumps(["3", SUPERVISED_STEPS, PROMPTS, s.seed, torch.__version__, demonstrations])
    folder = Path(s.cache).expanduser() / f"world-{hashlib.sha256(made_of.encode()).hexdigest()[:32]}"
    if not folder.exists():
        part = folder.with_suffix(f".{os.getpid()}")
        try:
            part.mkdir(parents=True)
        except OSError as error:
            raise SettingsError(f"cache {s.cache} cannot be written ({error})") from error
        supervised_start(demonstrations, tokenizer, s.seed).save_pretrained(part / "model")
        tokenizer.save_pretrained(part / "model")
        prompts = [json.dumps({"prompt": p}) + "\n" for p in data.world_prompts(s.seed)]
        held_out, prompts = prompts[: data.HELD_OUT_PROMPTS], prompts[data.HELD_OUT_PROMPTS :][:PROMPTS]
        (part / "held_out.jsonl").write_text("".join(held_out))
        (part / "prompts.jsonl").write_text("".join(prompts))
        answer(part / "model", part / "held_out.jsonl", part / "answers.jsonl", s.seed)
        model, sampled = str(part / "model"), str(part / "sampled.jsonl")
        data.sample(model, str(part / "prompts.jsonl"), sampled, n=5, temperature=1.0, top_p=1.0, max_tokens=64,
                    batch_size=128, seed=s.seed, device="cpu")  # fmt: skip
        try:
            part.rename(folder)
        except OSError:  # another process was faster
            shutil.rmtree(part)
    annotator = data.Annotator(s.annotator_noise, s.length_bias, s.seed)
    pairs = folder / f"pairs-{s.annotator_noise}-{s.length_bias}.jsonl"
    if not pairs.exists():
        scored, part = (f"{pairs}.{os.getpid()}.{name}.jsonl" for name in ("scored", "part"))
        data.score(str(folder / "sampled.jsonl"), scored, rule=annotator)
        data.pairs(scored, part, how="best_worst")
        os.remove(scored)
        os.replace(part, pairs)
    return folder, pairs


def supervised_start(rows: list[data.Row], tokenizer, seed: int) -> LlamaForCausalLM:
    """A Llama of 350,000 parameters that has learned to answer from noisy demonstrations."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=128, tie_word_embeddings=True, bos_token_id=None, eos_token_id=3, pad_token_id=3,
    ))  # fmt: skip
    policy, optimizer = ResponseLogProbs(model), torch.optim.AdamW(model.parameters(), fused=True)
    policy.use_layout("padded")
    examples = [data.encode(row, tokenizer, 128, 100)[0] for row in rows]
    plan = [part for epoch in range(64) for part in data.step_plan(len(examples), 64, seed, epoch)][:SUPERVISED_STEPS]
    schedule = Settings(lr=3e-3)
    bar = tqdm(plan, desc="supervised start", unit=" steps", leave=False)
    for step, part in enumerate(bar):
        batch = data.padded_batch([examples[i] for i in part])
        loss = OBJECTIVES["sft"](policy(batch)[0], batch.lengths).mean()
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
    data.sample(str(model), str(prompts), str(out), n=1, temperature=1.0, top_p=1.0, max_tokens=64, batch_size=512,
                seed=seed, keep_unfinished=True, device="cpu")  # fmt: skip


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
    found = {"quality": quality.mean(1).tolist(), "length": length.mean(1).tolist(), "repetition": repetition.mean(1).tolist()}
    found |= {"win_rate": [0.5, win.mean().item()], "lc_win_rate": [0.5, length_controlled(win, length[1] - length[0])]}
    return found | {"kl": [0.0, (now - start).mean().item()]}


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
    policy = ResponseLogProbs(LlamaForCausalLM.from_pretrained(model, dtype=torch.float32))
    policy.use_layout("padded")
    return torch.cat([policy(data.padded_batch(examples[i : i + 128]))[0] for i in range(0, len(examples), 128)])


# ---- answers for outside judges --------------------------------------------------------------------------------------


# Published decoding: start → style → (temperature, max_new_tokens), all with top_p 1. α-DPO paper, appendix B.1, "Decoding
# hyperparameters": those of SimPO, and its footnote 4 gives the folder of SimPO's released code (eval/) that has the numbers.
# That folder has none for Gemma-2 and none of its own for Llama-3-Instruct v0.2, so there is no such entry.
DECODING = {
    "mistral-7b-base": {"alpaca_eval": (0.7, 2048), "arena_hard": (0.0, 4096)},
    "mistral-7b-instruct": {"alpaca_eval": (0.5, 2048), "arena_hard": (0.0, 4096)},
    "llama-3-8b-base": {"alpaca_eval": (0.9, 4096), "arena_hard": (0.0, 4096)},
    "llama-3-8b-instruct": {"alpaca_eval": (0.9, 4096), "arena_hard": (0.0, 4096)},
}
STYLES = ("alpaca_eval", "arena_hard")


@dataclass
class Generation:
    model: str = field(metadata={"help": "folder or hub name of a causal language model, such as runs/mine/model"})
    prompts: str = field(metadata={"help": "AlpacaEval's JSON, Arena-Hard's question.jsonl, or any rows with a prompt"})
    out: str = field(metadata={"help": "file to write; a killed run goes on from OUT.part"})
    style: str = option("alpaca_eval", "format of out: alpaca_eval (a JSON list) or arena_hard (v0.1's answers, JSON lines)")
    name: str | None = option(None, "what the judge calls the model (generator, model_id); without it, its folder's name")
    decoding: str | None = option(None, f"published settings of a start: {', '.join(DECODING)}")
    temperature: float | None = option(None, "of sampling, 0 is greedy; without it and decoding: 0")
    max_new_tokens: int | None = option(None, "answers are cut there, and kept; without it and decoding: 2048")
    top_p: float = option(1.0, "share of the probability that is sampled from")
    batch_size: int = option(8, "prompts at a time; answers depend on it where temperature > 0")
    columns: str = option("", "columns to rename, new=old: prompt=question")
    seed: int = option(0, "of sampling")
    device: str = option("auto", "cpu, cuda, or auto")


def generate(argv: list[str]) -> dict:
    """Answer every prompt of a benchmark once and write the answers as its official judge reads them.

    Rows keep their order; a prompt that is there twice has the same answer twice. Answers that reach max_new_tokens are kept as
    far as they went and counted. A run that was killed goes on with the same command to what an unbroken one would have made.

        python train.py generate --model runs/mine/model --prompts alpaca_eval.json --out outputs.json --temperature 0.9
        python train.py generate --model runs/mine/model --prompts question.jsonl --out mine.jsonl --style arena_hard
    """
    parser = HfArgumentParser(
        Generation,
        prog="train.py generate",
        description=inspect.cleandoc(generate.__doc__),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    g, unknown = parser.parse_args_into_dataclasses(argv, look_for_args_file=False, return_remaining_strings=True)
    if unknown:
        raise SettingsError(f"unknown setting {' '.join(unknown)}; `python train.py generate --help` lists all of them")
    how, out, part = decoding(g), Path(g.out), Path(f"{g.out}.part")
    if out.exists():
        raise SettingsError(f"out {out} is there already; choose another file, or delete it")
    whole = Path(f"{out}.whole")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        whole.write_text("")
        whole.unlink()
    except OSError as error:
        raise SettingsError(f"out {out} cannot be written ({error})") from error
    rows = list(data.prompts_of(g.prompts, g.columns))
    folder = Path(g.model).resolve()  # an exported model is RUN/model: the run's name says more
    name = g.name or (folder.parent.name if folder.name == "model" else Path(g.model).name)
    say(f"{name}: {len(rows)} prompts, {', '.join(f'{k} {v:g}' for k, v in how.items())}, seed {g.seed}")
    more = dict(batch_size=g.batch_size, columns=g.columns, seed=g.seed, device=g.device)
    data.sample(g.model, g.prompts, str(part), n=1, keep_unfinished=True, **how, **more)
    found = {row["id"]: row for row in map(json.loads, part.read_text(encoding="utf-8").split("\n")[:-1])}
    answers = [found[row["id"]]["responses"][0] for _, row, _ in rows]
    cut = sum(found[row["id"]]["unfinished"] for _, row, _ in rows)
    if g.style == "alpaca_eval":
        text = json.dumps([alpaca_eval(*x, name) for x in zip(rows, answers)], ensure_ascii=False, indent=2) + "\n"
    else:
        tokenizer = data.load_tokenizer(g.model)
        lines = (json.dumps(arena_hard(*x, name, tokenizer), ensure_ascii=False) for x in zip(rows, answers))
        text = "".join(f"{line}\n" for line in lines)
    whole.write_text(text, encoding="utf-8")
    os.replace(whole, out)
    part.unlink()
    say(f"{len(answers)} answers in {out}, {cut} of them cut at {how['max_tokens']} tokens, {answers.count('')} empty")
    return {"out": str(out), "answers": len(answers), "cut": cut}


def decoding(g: Generation) -> dict:
    """Keyword arguments of data.sample: published ones, and over them what was asked for."""
    if g.style not in STYLES:
        raise SettingsError(f"style is {g.style!r}; accepted are {', '.join(STYLES)}")
    if g.decoding is not None and g.decoding not in DECODING:
        raise SettingsError(f"decoding is {g.decoding!r}; published are {', '.join(DECODING)}")
    if g.device not in ("auto", "cpu") and not (g.device.partition(":")[0] == "cuda" and torch.cuda.is_available()):
        raise SettingsError(f"device is {g.device!r}; accepted here are auto, cpu{', cuda' * torch.cuda.is_available()}")
    temperature, tokens = (0.0, 2048) if g.decoding is None else DECODING[g.decoding][g.style]
    temperature = temperature if g.temperature is None else g.temperature
    tokens = tokens if g.max_new_tokens is None else g.max_new_tokens
    if not 0 <= temperature < math.inf or tokens < 1 or not 0 < g.top_p <= 1 or g.batch_size < 1:
        raise SettingsError("temperature is at least 0, max_new_tokens and batch_size at least 1, top_p above 0 and at most 1")
    return dict(temperature=temperature, top_p=g.top_p, max_tokens=tokens)


def alpaca_eval(row: tuple[str, dict, list[dict]], answer: str, name: str) -> dict:
    """One output as AlpacaEval reads it; a conversation becomes an instruction of several paragraphs."""
    _, given, prompt = row
    instruction = "\n\n".join(m["content"] for m in prompt)
    return {"instruction": instruction, "output": answer, "generator": name} | {k: given[k] for k in ("dataset",) if k in given}


def arena_hard(row: tuple[str, dict, list[dict]], answer: str, name: str, tokenizer) -> dict:
    """One answer as Arena-Hard v0.1 reads it; token_len in tokens of the model's own tokenizer (its authors count GPT's)."""
    _, given, _ = row
    question = given.get("question_id", given["id"])
    turn = {"content": answer, "token_len": len(tokenizer(answer, add_special_tokens=False)["input_ids"])}
    unique = hashlib.sha256(json.dumps([name, question, answer]).encode()).hexdigest()[:22]
    choices = [{"index": 0, "turns": [turn]}]
    return {"question_id": question, "answer_id": unique, "model_id": name, "choices": choices, "tstamp": time.time()}


# ---- the command line -------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> dict:
    """The command line as a function; returns the summary. What the user can mend ends with a message and exit code 2."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages for large CPU tensors: far fewer page faults
    transformers.utils.logging.disable_progress_bar()
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv[:1] == ["generate"]:
            return generate(argv[1:])
        return train(parse_settings(argv))
    except (DataError, SettingsError) as error:
        dist.fail(error)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG):
            raise
        dist.fail(error)  # a disk that is full: nothing is wrong with the program


if __name__ == "__main__":
    main()
