"""Ranks, checkpoints and export: the only file that knows how many processes there are.

In one process every helper here is the identity or a plain file operation, so train.py takes the same path everywhere.

A checkpoint is a folder `checkpoints/step-000120` with `state.safetensors` (weights and Adam moments) and `step.json`. It is
written beside as `….part`, renamed, and marked with an empty file `complete` last; only marked folders are ever resumed.
"""

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


def setup(device: str) -> torch.device:
    """The device to compute on: `device` itself, or for "auto" a CUDA GPU if there is one, else the CPU."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)


def rank() -> int:
    return 0


def world_size() -> int:
    return 1


def is_main() -> bool:
    return rank() == 0


def shard(policy: nn.Module) -> nn.Module:
    return policy


def sync_gradients(policy: nn.Module, last: bool) -> None:
    """Tell the policy whether the coming backward is the last of the step (only then gradients travel between ranks)."""


def gather_rows(rows: dict[int, Tensor], total: int) -> Tensor:
    """Rows computed on this rank {index: values} → (total, …) with the rows of all ranks; every row must have come once."""
    if sorted(rows) != list(range(total)):
        raise RuntimeError(f"{total - len(rows)} of {total} rows were not scored")
    return torch.stack([rows[i] for i in range(total)]) if rows else torch.zeros(0)


def clip_gradients(policy: nn.Module, limit: float) -> Tensor:
    """Scale all gradients so that their global 2-norm is at most `limit` (0: no limit); returns the norm before."""
    return nn.utils.clip_grad_norm_([p for p in policy.parameters() if p.grad is not None], limit or float("inf"))


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def _named(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters())  # a tied parameter appears once


def save_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict, keep: int) -> None:
    """Write step-N of `state["step"]` and delete all but the newest `keep` complete ones."""
    final = folder / f"step-{state['step']:06d}"
    part = final.with_suffix(".part")
    for old in (part, final):
        shutil.rmtree(old, ignore_errors=True)
    part.mkdir(parents=True)
    tensors = {}
    for name, parameter in _named(model).items():
        tensors[f"weight.{name}"] = parameter.detach()
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}.{name}"] = value
    save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, part / "state.safetensors")
    (part / "step.json").write_text(json.dumps(state))
    os.rename(part, final)
    (final / "complete").touch()
    for old in complete_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)


def complete_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    return sorted(p.parent for p in folder.glob("step-*/complete"))


def load_checkpoint(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """Put weights and moments back in place; returns the saved state (step, …)."""
    with safe_open(checkpoint / "state.safetensors", "pt") as file, torch.no_grad():
        saved = set(file.keys())
        for name, parameter in _named(model).items():
            parameter.copy_(file.get_tensor(f"weight.{name}"))
            keys = [k for k in ("step", "exp_avg", "exp_avg_sq") if f"{k}.{name}" in saved]
            values = {k: file.get_tensor(f"{k}.{name}") for k in keys}
            optimizer.state[parameter] = {k: v if k == "step" else v.to(parameter.device) for k, v in values.items()}
    return json.loads((checkpoint / "step.json").read_text())


# ---- export ----------------------------------------------------------------------------------------------------------


def export(model: nn.Module, tokenizer, folder: Path, dtype: torch.dtype) -> None:
    """Write a `transformers` folder (safetensors, config, tokenizer, chat template, generation config) in `dtype`."""
    state = {k: v.to(dtype) for k, v in model.state_dict().items()}
    kept, model.config.dtype = model.config.dtype, dtype
    model.save_pretrained(folder, state_dict=state, max_shard_size="5GB")
    model.config.dtype = kept
    tokenizer.save_pretrained(folder)
