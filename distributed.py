"""Ranks, sharding, checkpoints, export and "will it fit?": the only file that knows how many processes there are.

    torchrun --nproc-per-node 8 train.py --recipe gemma-2-9b-it-simpo --save-every 100     # one machine
    python distributed.py export runs/…/checkpoints/step-000400 OUT --dtype bf16           # checkpoint → transformers folder
    python distributed.py plan --model MODEL --gpus 8 --gpu-memory 80                      # bytes, token budget and hours

Started without torchrun there is one process and no process group; every helper is then the identity or a plain file
operation, so train.py takes the same path everywhere.

A checkpoint is a folder `step-000120`: weights and Adam moments as safetensors, one file per rank, each tensor cut by rows;
`step.json`; the configuration and tokenizer. It is written beside as `….part`, flushed to disk, renamed, and marked last
with a file `complete` that holds the size and checksum of every other file. Only marked folders that check out are resumed.
"""

import atexit
import contextlib
import functools
import gc
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
import warnings
import weakref
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as c10d  # this library's name inside PyTorch
import transformers
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint as recompute

import data
from data import UserError
from logprobs import Blocks, ResponseLogProbs, chunk_rows, compiled, to_device

alone = False  # while on_main's function runs, in which nothing may wait for another rank
FILE_LIMIT = 5 * 10**9  # bytes of one file of an exported model

# ---- ranks -----------------------------------------------------------------------------------------------------------


def setup(device: str) -> torch.device:
    """Join the process group if torchrun started us; returns the device to compute on ("auto": a GPU if there is one).

    A rank that fails prints its error and leaves at once, without waiting for anybody; torchrun then ends the others.
    """
    place = data.device_named(device)
    if not {"RANK", "MASTER_ADDR"} <= os.environ.keys():
        return place
    if place.index is not None:
        raise UserError(f"device is {device!r}; torchrun gives each rank a GPU of its own, so write cuda")
    kind, place = place.type, torch.device("cuda", int(os.environ["LOCAL_RANK"])) if place.type == "cuda" else place
    if not c10d.is_initialized():
        if kind == "cuda":
            torch.cuda.set_device(place)
        c10d.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo", timeout=timedelta(minutes=10))
        sys.excepthook = _leave
        atexit.register(_end)
    return place


def _end() -> None:
    """The way out of a run that ended well: without the rest of Python's, where a thread of gloo that is late would abort."""
    c10d.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _leave(kind, error, trace) -> None:
    if re.search("connection|peer", str(error), re.IGNORECASE):
        time.sleep(5)  # another rank is gone: its message comes first, and torchrun ends us meanwhile
    sys.__excepthook__(kind, error, trace)
    sys.stderr.flush()
    os._exit(1)  # the interpreter's own way out waits for communication that will never happen


def fail(error: Exception) -> None:
    """End the run with a message for its owner and exit code 2. Where every rank fails alike, the first one speaks."""
    if world_size() > 1 and not is_main():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(5)  # torchrun ends us here if rank 0 failed too
    print(f"error: {error}" if is_main() else f"error on rank {rank()}: {error}", file=sys.stderr, flush=True)
    if c10d.is_initialized():
        os._exit(2)
    raise SystemExit(2)


def own(folder: Path) -> FileLock:
    """The lock that makes rank 0's process, for all ranks, the only writer of a folder; a dead process holds none.

    It is held as long as the object lives.
    """
    lock = FileLock(folder / ".lock", timeout=0, is_singleton=True)

    def acquire() -> None:
        try:
            lock.acquire()
        except Timeout:
            raise UserError(
                f"{folder} is in use by another run, perhaps a rank that outlived its torchrun; end it first"
            ) from None
        except (OSError, NotImplementedError) as error:  # some network file systems have no locks
            print(
                f"warning: {folder} cannot be locked ({error}); see to it that one run at a time writes there", file=sys.stderr
            )

    on_main(acquire)
    return lock


def rank() -> int:
    return c10d.get_rank() if c10d.is_initialized() else 0


def world_size() -> int:
    return c10d.get_world_size() if c10d.is_initialized() and not alone else 1


def is_main() -> bool:
    return rank() == 0


def on_main(function: Callable, *args):
    """function(…) called on rank 0 only, as if it were the only one; every rank gets its result, UserError or OSError."""
    global alone
    if world_size() == 1:
        return function(*args)
    outcome = [None, None]
    if is_main():
        try:
            alone = True
            outcome[0] = function(*args)
        except Exception as error:
            outcome[1] = error
        finally:
            alone = False
    c10d.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def gather_objects(value) -> list:
    """A small value of every rank, in the order of ranks."""
    values = [value] * world_size()
    if world_size() > 1:
        c10d.all_gather_object(values, value)
    return values


def _kind() -> str:
    """The kind of device that tensors of all ranks meet on; "cuda" is this rank's own."""
    return "cuda" if "nccl" in c10d.get_backend() else "cpu"


def gather_rows(rows: Tensor, values: Tensor, total: int) -> Tensor:
    """Rows computed on this rank → (total, k) with the rows of all ranks, on all ranks; no GPU is waited for.

    Args:
        rows: (n,) the number of each row, on the host, where they are counted: one that is missing or came twice is an error,
            never a zero.
        values: (n, k) the rows, on the device. What ranks add up is a value and zeros, so it is exact.
    """
    counts, table = torch.bincount(rows, minlength=total), values.new_zeros(total, values.shape[1])
    table[to_device(rows, values.device)] = values
    if world_size() > 1:
        c10d.all_reduce(counts)
        c10d.all_reduce(table)
    if wrong := int((counts != 1).sum()):
        raise RuntimeError(f"{wrong} of {total} rows were not scored exactly once")
    return table


# ---- sharding --------------------------------------------------------------------------------------------------------


def decoder_blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated layers of a transformer: the list of modules that holds the most parameters."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    return list(max(lists, key=lambda m: sum(p.numel() for p in m.parameters()), default=[]))


def _compiled_when_packed(forward: Callable) -> Callable:
    """A decoder block's forward, compiled where it is handed a packed sequence; generation's own path stays eager."""
    fast = compiled(forward, dim=1)
    return lambda *args, **kw: (fast if {"blocks", "pairs"} & kw.keys() else forward)(*args, **kw)


def shard(
    policy: nn.Module, mesh: str | None = None, bf16: bool = False, checkpointing: bool = False, compiling: bool = False
) -> nn.Module:
    """Cut a ResponseLogProbs over all ranks, in place; in one process without torchrun only the first lines do anything.

    Args:
        mesh: "RxS", R copies of a model that is cut into S parts (R·S ranks); None: one copy, cut over all ranks.
        bf16: gather weights and compute in bf16; weights, reductions and moments stay fp32.
        checkpointing: recompute the activations of a decoder block in backward.
        compiling: compile the decoder blocks.
    """
    blocks, frozen = (decoder_blocks(m) if m is not None else [] for m in (policy.model, policy.reference))
    # 0. compiled innermost: what wraps a block later is no part of its graph, which all blocks of a kind share
    for block in blocks + frozen if compiling else ():
        block.forward = _compiled_when_packed(block.forward)
    # 1. recomputation around it: a block is gathered once in backward, and recomputed with the weights already there
    for block in blocks if checkpointing else ():
        block.forward = functools.partial(recompute, block.forward, use_reentrant=False, preserve_rng_state=False)
    if not c10d.is_initialized():
        return policy
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    precision = MixedPrecisionPolicy(torch.bfloat16 if bf16 else None, torch.float32)
    options = dict(mesh=_mesh(mesh), mp_policy=precision)
    # 2. each block: at most this one and the next are whole at a time; a reference is cut the same way
    for block in blocks + frozen:
        fully_shard(block, **options)
    # 3. the root, last, takes what is left: embeddings, final norm and head. It is the module whose forward runs the chunked
    #    head, so these are gathered once per microbatch, and a tied weight stays one parameter
    fully_shard(policy, **options)
    for module in policy.modules():
        if isinstance(module, FSDPModule):  # our losses are divided by the rows of all ranks: gradients add up, no average
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    # 4. backward makes the root let go of its weights; a pass without gradient has to do so itself
    policy.register_forward_pre_hook(lambda *_: policy.set_reshard_after_forward(not torch.is_grad_enabled(), recurse=False))
    register_fsdp_forward_method(policy, "run_unsharded")
    run_unsharded = policy.run_unsharded

    def run_and_release(*args, **kwargs):
        policy.set_reshard_after_forward(True, recurse=False)
        return run_unsharded(*args, **kwargs)

    policy.run_unsharded = run_and_release
    return policy


def mesh_sizes(text: str | None) -> tuple[int, ...]:
    """(copies, parts) of a mesh such as "2x4"; of None one copy cut over all ranks, (ranks,)."""
    if text is None:
        return (world_size(),)
    parts = re.fullmatch(r"(\d{1,9})x(\d{1,9})", text)
    if parts is None or int(parts[1]) * int(parts[2]) != world_size() or not c10d.is_initialized():
        ranks = f"{world_size()} ranks" if c10d.is_initialized() else "ranks that torchrun starts"
        raise UserError(f'mesh is {text!r}; write copies x parts, such as "2x4", whose product is the number of {ranks}')
    return int(parts[1]), int(parts[2])


def _mesh(text: str | None) -> DeviceMesh:
    sizes = mesh_sizes(text)
    return init_device_mesh(_kind(), sizes, mesh_dim_names=("replicate", "shard")[-len(sizes) :])


def sync_gradients(policy: nn.Module, last: bool) -> None:
    """Before each backward: only the last one of a step reduces gradients over ranks; until then each rank adds up its own."""
    if hasattr(policy, "set_requires_gradient_sync"):  # it is cut
        policy.set_requires_gradient_sync(last)


def clip_gradients(policy: nn.Module, limit: float) -> Tensor:
    """Scale all gradients so that their global 2-norm is at most `limit` (0: no limit); returns the norm before."""
    norm = nn.utils.clip_grad_norm_([p for p in policy.parameters() if p.grad is not None], limit or float("inf"))
    return _whole(norm)


# ---- loading ---------------------------------------------------------------------------------------------------------


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder; a folder with other weights only is refused."""
    files = sorted(p for p in folder.glob("*.safetensors") if not p.name.startswith("adapter"))
    with contextlib.suppress(OSError, ValueError, KeyError, AttributeError, TypeError):  # no index, or none that can be read
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        files = sorted({folder / name for name in index["weight_map"].values()})
    if not files and any(p.suffix in (".bin", ".pt", ".pth", ".ckpt") for p in folder.iterdir()):
        raise UserError(f"{folder}: .bin or .pt weights only, a format that can run code; convert them to safetensors")
    if not files:
        raise UserError(f"{folder}: no *.safetensors file in this folder")
    return files


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules built inside have parameters with a shape and no memory, and real buffers.

    Buffers such as rotary frequencies are computed by constructors and are in no file; on meta they would be lost.
    """
    register = nn.Module.register_parameter

    def on_meta(module, name, parameter):
        if parameter is not None and not parameter.is_meta:  # a tied parameter stays the object it is
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def build_model(name: str, trust_remote_code: bool = False) -> nn.Module:
    """A causal language model in fp32: loaded, or, when it is going to be sharded, without weights until `load_weights`."""
    if Path(name).is_dir():
        weight_files(Path(name))
    config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    how, came_in = dict(dtype=torch.float32, trust_remote_code=trust_remote_code), config.dtype
    if not c10d.is_initialized():
        how |= dict(use_safetensors=True, ignore_mismatched_sizes=True, output_loading_info=True)
        model, info = transformers.AutoModelForCausalLM.from_pretrained(name, **how)
        wrong = [f"{key} is {tuple(shape)}, the model has {tuple(own)}" for key, shape, own in info["mismatched_keys"]]
        refuse_weights(name, wrong, info["unexpected_keys"], info["missing_keys"])
    else:
        with _parameters_on_meta():
            model = transformers.AutoModelForCausalLM.from_config(config, **how)
    model.config.dtype = came_in  # what the file has, and the export will have
    return model


def load_weights(model: nn.Module, name: str, device: torch.device) -> None:
    """Give a model of `build_model`, sharded meanwhile, its weights: each rank reads the rows it owns, tensor by tensor.

    Raises:
        UserError: weights missing, unexpected or of another shape, each by name.
    """
    if not any(p.is_meta for p in model.parameters()):
        model.to(device)
        return
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    model.to_empty(device=device)
    for n, b in model.named_buffers():
        b.copy_(buffers[n])
    folder = Path(name) if Path(name).is_dir() else _download(name)
    places, missing = _tensors(model, tied=True), {id(t): n for n, t in _tensors(model).items()}
    prefix, wrong, unexpected = model.base_model_prefix + ".", [], []
    ignored = [*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []), r"rotary_emb\.inv_freq$"]
    for file in weight_files(folder):
        with safe_open(file, "pt") as saved:
            for key in saved.keys():
                target = places.get(key, places.get(prefix + key))
                if target is None:
                    unexpected += [] if any(re.search(p, key) for p in ignored) else [key]
                elif (shape := tuple(saved.get_slice(key).get_shape())) != tuple(target.shape):
                    wrong.append(f"{key} is {shape}, the model has {tuple(target.shape)}")
                else:
                    _copy_rows(target, saved.get_slice(key) if target.ndim else saved.get_tensor(key))
                    missing.pop(id(target), None)
    refuse_weights(folder, wrong, unexpected, missing.values())


def refuse_weights(name: str | Path, wrong: Iterable[str], unexpected: Iterable[str], missing: Iterable[str]) -> None:
    """UserError that names what does not fit; a model library would fill it with noise, or leave it out."""
    for what, names in (("of another shape", sorted(wrong)), ("unexpected", sorted(unexpected)), ("missing", sorted(missing))):
        if names:
            more = " …" if len(names) > 8 else ""
            raise UserError(f"{name}: {len(names)} weights are {what}: {', '.join(names[:8])}{more}")


def _download(name: str) -> Path:
    """A hub model's folder. Each rank asks for it: one of a machine downloads and the others wait at its file lock, where no
    timeout of a process group counts."""
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json"]))


@torch.no_grad()
def _copy_rows(target: Tensor, source) -> None:
    """Fill a tensor, or the rows of it that this rank owns, from a whole one in a safetensors file."""
    if _local(target) is target:
        target.copy_(source[:] if target.ndim else source)
        return
    mesh, local = target.device_mesh["shard"], target.to_local()
    first = mesh.get_local_rank() * -(-target.shape[0] // mesh.size())  # rows are cut like torch.chunk does
    if len(local):
        local.copy_(source[first : first + len(local)])


def _tensors(model: nn.Module, tied: bool = False) -> dict[str, Tensor]:
    """What a file of the model holds: parameters and persistent buffers; a tied parameter once, or under each name."""
    parameters, buffers = model.named_parameters(remove_duplicate=not tied), dict(model.named_buffers())
    return dict(parameters) | {n: buffers[n] for n in model.state_dict() if n in buffers}


def not_finite(model: nn.Module) -> list[str]:
    """Names of the parameters that hold an infinity or NaN, on any rank."""
    names = [name for name, p in model.named_parameters() if not torch.isfinite(_local(p)).all()]
    return sorted({name for names_of_rank in gather_objects(names) for name in names_of_rank})


# ---- numbers kept between runs ---------------------------------------------------------------------------------------


def hash_weights(model: nn.Module) -> list[str]:
    """A digest of every weight's name and bytes, one per rank of its own shards; equal on all ranks."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        digest.update(_local(parameter).detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return gather_objects(digest.hexdigest())


def save_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """Write small tensors that all ranks have as one safetensors file; a folder that cannot be written is no reason to stop."""
    if not is_main():
        return
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({k: torch.empty(v.shape, dtype=v.dtype).copy_(v) for k, v in tensors.items()}, part)
        os.replace(part, file)
    except (OSError, SafetensorError):
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def load_tensors(file: Path) -> dict[str, Tensor] | None:
    """What save_tensors wrote, as rank 0 reads it; None if there is no such file or it is damaged."""

    def read() -> dict[str, Tensor] | None:
        with contextlib.suppress(OSError, SafetensorError):
            return load_file(file)

    return on_main(read)


def _whole(tensor: Tensor) -> Tensor:
    """All rows of a tensor that may be cut over ranks (then it is a DTensor)."""
    return tensor.detach().full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach()


def _local(tensor: Tensor) -> Tensor:
    """The rows of a tensor that this rank owns; the tensor itself where it is not cut."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


# ---- checkpoints -----------------------------------------------------------------------------------------------------


class StopOnSignal:
    """A context in which SIGTERM and Ctrl-C only raise a hand; `requested` asks whether any rank's hand is up."""

    def __enter__(self) -> "StopOnSignal":
        self.raised, self.before = False, {}
        if threading.current_thread() is threading.main_thread():
            self.before = {n: signal.signal(n, self._raise_hand) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _raise_hand(self, number, frame) -> None:
        if self.raised and world_size() == 1:  # asked twice: now. torchrun passes on a Ctrl-C that we have had already
            signal.signal(number, self.before[number])
            os.kill(os.getpid(), number)
        elif number == signal.SIGINT and is_main() and not self.raised:
            print("\nstopping after this step; Ctrl-C again stops at once", file=sys.stderr)
        self.raised = True

    def requested(self) -> bool:
        return any(gather_objects(self.raised))


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sums(folder: Path) -> dict[str, list[int]]:
    """{file: [bytes, CRC-32]} of this rank's share of a checkpoint's files, all but the marker."""
    sums, files = {}, sorted(p for p in folder.iterdir() if p.name != "complete" and p.is_file())
    for path in files[rank() :: world_size()]:
        crc, size = 0, 0
        with open(path, "rb") as file:
            while piece := file.read(2**22):
                crc, size = zlib.crc32(piece, crc), size + len(piece)
        sums[path.name] = [size, crc]
    return sums


def flaw(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be trusted, or None; asked by all ranks together."""
    try:
        expected = {
            name: [int(size), int(crc)] for name, (size, crc) in json.loads((checkpoint / "complete").read_text()).items()
        }
    except FileNotFoundError:
        return "it was not finished"
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return "its marker is damaged"
    actual = {name: sums for part in gather_objects(_sums(checkpoint)) for name, sums in part.items()}
    for name in ("step.json", *expected):
        if name not in actual:
            return f"{name} is missing"
        if actual[name] != expected.get(name):
            return f"{name} is {'cut short' if name in expected and actual[name][0] < expected[name][0] else 'damaged'}"
    if strange := [name for name in actual if name.endswith(".safetensors") and name not in expected]:
        return f"{strange[0]} is not part of it"
    if (step := json.loads((checkpoint / "step.json").read_text())["step"]) != int(checkpoint.name.removeprefix("step-")):
        return f"it is called {checkpoint.name} and holds step {step}"
    return None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():  # "torch.distributed is not initialized": that is how one process works here
        warnings.simplefilter("ignore", UserWarning)
        yield


def _read_into(tensors: dict[str, Tensor], checkpoint: Path) -> None:
    """Fill tensors from those of the same names in a checkpoint, each rank its rows."""
    import torch.distributed.checkpoint as dcp  # late here and below: `--help` need not wait for it

    with _quiet():
        dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(checkpoint)), no_dist=world_size() == 1)


def _everything(model: nn.Module, optimizer: torch.optim.Optimizer, reference: nn.Module | None) -> dict[str, Tensor]:
    """All tensors of a checkpoint: `weight.NAME`, `exp_avg.NAME`, `exp_avg_sq.NAME`, `reference.NAME` of one that moves."""
    tensors = {f"weight.{n}": t.detach() for n, t in _tensors(model).items()}
    tensors |= {f"reference.{n}": t.detach() for n, t in _tensors(reference).items()} if reference is not None else {}
    for name, parameter in model.named_parameters():
        for key in ("exp_avg", "exp_avg_sq"):
            if key in optimizer.state.get(parameter, {}):
                tensors[f"{key}.{name}"] = optimizer.state[parameter][key]
    return tensors


def save_checkpoint(
    folder: Path, model: nn.Module, optimizer, state: dict, keep: int, tokenizer, reference: nn.Module | None = None
) -> bool:
    """Write step-N of `state["step"]`, then delete all but the newest `keep` complete ones.

    reference: one that moves, and so belongs to the state.

    Returns:
        whether it is there; when it cannot be written (a full disk) the reason is printed and older ones are left alone.
    """
    import torch.distributed.checkpoint as dcp

    final = folder / f"step-{state['step']:06d}"
    part = final.with_suffix(".part")
    if on_main(final.exists) and flaw(final) is None:
        return True  # resumed from it and stopped before the next
    trouble, sums = None, {}
    try:
        on_main(_start_part, part, final)
        sums = _write_checkpoint(part, model, optimizer, state, tokenizer, reference)
    except (Exception, dcp.CheckpointException) as error:
        trouble = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
    everyone = gather_objects((trouble, sums))
    trouble = next((t for t, _ in everyone if t), None)
    if trouble is None:
        try:
            on_main(_publish, part, final, {k: v for _, sums in everyone for k, v in sums.items()}, keep)
            return True
        except OSError as error:
            trouble = str(error)
    if is_main():
        shutil.rmtree(part, ignore_errors=True)
        print(f"checkpoint {final} could not be written ({trouble}); earlier ones are untouched", file=sys.stderr)
    return False


def _write_checkpoint(part: Path, model: nn.Module, optimizer, state: dict, tokenizer, reference) -> dict[str, list[int]]:
    """All files but the marker, on disk when it returns; the sums of this rank's share of them."""
    import torch.distributed.checkpoint as dcp

    with _quiet():
        writer = dcp.HuggingFaceStorageWriter(str(part), save_distributed=True)
        dcp.save(_everything(model, optimizer, reference), storage_writer=writer, no_dist=world_size() == 1)
    adam_step = next((float(s["step"]) for s in optimizer.state.values() if "step" in s), 0.0)
    on_main((part / "step.json").write_text, json.dumps({**state, "adam_step": adam_step}))
    on_main(_describe, part, model, tokenizer)
    sums = _sums(part)
    for name in sums:
        _flush(part / name)
    return sums


def check_space(out: Path, model: nn.Module, checkpoints: int, dtype: torch.dtype, bytes_each: int = 12) -> None:
    """Refuse a run whose `checkpoints` (so many bytes per parameter each) and export in `dtype` will not fit where `out` is.

    What an earlier run left in `out` counts as room: it is deleted (--overwrite), or is what would be written (--resume).
    """
    needed = sum(p.numel() for p in model.parameters()) * (bytes_each * checkpoints + dtype.itemsize)
    free = shutil.disk_usage(out).free + sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    if needed > free:
        raise UserError(
            f"out {out} has {free / 2**30:.1f} GiB of free space, but {checkpoints} checkpoints and the exported model "
            f"will need {needed / 2**30:.1f} GiB; make room, choose another --out or a smaller --keep"
        )


MODEL_FILES = re.compile(
    r".+\.(safetensors|json|jinja|model|py)|README\.md|(vocab|merges)\.txt|complete|additional_chat_templates"
)


def strangers(folder: Path) -> list[Path]:
    """What lies in the folder of a model or checkpoint and is none of its files, by name."""
    return [path for path in folder.glob("*") if not MODEL_FILES.fullmatch(path.name)]


def _start_part(part: Path, final: Path) -> None:
    for old in (part, final):  # an earlier `final` is incomplete or damaged
        shutil.rmtree(old, ignore_errors=True)
    part.mkdir(parents=True)


def _describe(folder: Path, model: nn.Module, tokenizer) -> None:
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _publish(part: Path, final: Path, sums: dict, keep: int) -> None:
    _flush(part)
    os.rename(part, final)
    _flush(final.parent)
    marker = final / "complete"
    marker.write_text(json.dumps(sums))
    _flush(marker)
    _flush(final)
    for old in complete_checkpoints(final.parent)[:-keep]:
        (old / "complete").unlink()  # first the marker, so that a half-deleted one is not taken for a whole one
        shutil.rmtree(old)


def checkpoints(folder: Path) -> list[Path]:
    """What goes by the name of a checkpoint, oldest first."""
    return sorted((p for p in folder.glob("step-*") if p.name[5:].isdecimal()), key=lambda p: int(p.name[5:]))


def complete_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints with a marker, oldest first."""
    return [p for p in checkpoints(folder) if (p / "complete").exists()]


def newest_checkpoint(folder: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that checks out, or None; says which newer ones were passed over, and why."""
    for candidate in reversed(on_main(checkpoints, folder)):
        reason = flaw(candidate)
        if reason is None:
            return candidate
        say(f"skipped {candidate}: {reason}")
    return None


def check_same(run: dict, saved: dict, where: str | Path) -> None:
    """UserError, by name of what differs, where the run that was saved is not this one."""
    differs = [f"{k} is {v!r} here and {saved.get(k)!r} there" for k, v in run.items() if saved.get(k) != v]
    if differs:
        raise UserError(f"{where} belongs to another run: {'; '.join(differs)}")


def load_checkpoint(checkpoint: Path, model: nn.Module, optimizer, run: dict, reference: nn.Module | None = None) -> dict:
    """Put weights and moments, and a `reference` that moves, back in place, for any number of ranks; returns the saved state.

    Args:
        run: what makes this run the one that was saved, {name: value}; compared with `state["run"]`.
    Raises:
        UserError: it is another run's, by name of what differs.
    """
    state = json.loads((checkpoint / "step.json").read_text())
    check_same(run, state.get("run", {}), checkpoint)
    if state["adam_step"]:
        for p in (p for g in optimizer.param_groups for p in g["params"]):
            step = torch.tensor(state["adam_step"], device=p.device)
            optimizer.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    _read_into(_everything(model, optimizer, reference), checkpoint)
    return state


# ---- export ----------------------------------------------------------------------------------------------------------


def export(model: nn.Module, tokenizer, folder: Path, dtype: torch.dtype, card: str, limit: int = FILE_LIMIT) -> None:
    """Write a `transformers` folder: weights in `dtype`, config, tokenizer, chat template, generation config, model card.

    A tied weight is written once. Tensors are gathered one at a time; rank 0 holds one file of at most `limit` bytes.
    """
    tensors = _tensors(model)

    def describe(part: Path) -> None:
        kept, model.config.dtype = model.config.dtype, dtype
        _describe(part, model, tokenizer)
        model.config.dtype = kept
        (part / "README.md").write_text(card)

    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    _write_model(folder, shapes, lambda name: _whole(tensors[name]), describe, dtype, limit)


@dataclass
class Export:
    """Write a checkpoint as a transformers folder."""

    checkpoint: Path = field(metadata={"help": "a folder …/checkpoints/step-000120"})
    out: Path = field(metadata={"help": "the folder to write"})
    dtype: str = data.setting("bf16", "weights: bf16 or fp32")


def export_checkpoint(e: Export) -> None:
    """The model of a checkpoint as a `transformers` folder, file by file; the whole model is never in memory."""
    import torch.distributed.checkpoint as dcp

    checkpoint, out, dtypes = e.checkpoint, e.out, {"fp32": torch.float32, "bf16": torch.bfloat16}
    if e.dtype not in dtypes:
        raise UserError(f"dtype is {e.dtype!r}; accepted are {', '.join(dtypes)}")
    if (reason := flaw(checkpoint)) is not None:
        raise UserError(f"{checkpoint} cannot be exported: {reason}")
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise UserError(f"{out} exists already; choose another folder")
    dtype = dtypes[e.dtype]
    state = json.loads((checkpoint / "step.json").read_text())
    saved = dcp.HuggingFaceStorageReader(str(checkpoint)).read_metadata().state_dict_metadata
    weights = {key.removeprefix("weight."): about for key, about in saved.items() if key.startswith("weight.")}

    def fetch(name: str) -> Tensor:
        tensor = torch.empty(weights[name].size, dtype=weights[name].properties.dtype)
        _read_into({f"weight.{name}": tensor}, checkpoint)
        return tensor

    def describe(part: Path) -> None:
        for path in checkpoint.iterdir():
            if path.name not in ("complete", "step.json") and path.suffix != ".safetensors":
                shutil.copy(path, part)
        config = json.loads((part / "config.json").read_text()) | {"dtype": str(dtype).removeprefix("torch.")}
        (part / "config.json").write_text(json.dumps(config, indent=2))
        (part / "README.md").write_text(model_card(out.name, state.get("run", {}), {"step": state["step"]}))

    _write_model(out, {name: about.size for name, about in weights.items()}, fetch, describe, dtype, FILE_LIMIT)


def _write_model(
    folder: Path, shapes: dict[str, torch.Size], fetch: Callable, describe: Callable, dtype: torch.dtype, limit: int
) -> None:
    """A folder with the tensors that `fetch(name)` gives and what `describe(part)` writes beside them, renamed when whole."""
    part = folder.with_name(f"{folder.name}.part")
    files = _files_of(shapes, dtype, limit)

    def finish() -> None:
        if len(files) > 1:
            index = {"metadata": {"total_size": sum(s.numel() for s in shapes.values()) * dtype.itemsize}}
            index["weight_map"] = {name: file for file, names in files.items() for name in names}
            (part / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
        describe(part)
        for path in part.iterdir():
            _flush(path)
        os.rename(part, folder)

    def begin() -> None:
        if strange := strangers(part):
            raise UserError(f"{strange[0]} is in the way of an export to {folder}; move it away")
        _start_part(part, folder)

    try:
        on_main(begin)
        for file, names in files.items():
            tensors = {}
            for name in names:
                value = fetch(name)
                if is_main():
                    kind = dtype if value.is_floating_point() else value.dtype
                    tensors[name] = torch.empty(value.shape, dtype=kind).copy_(value)
            on_main(save_file, tensors, part / file, {"format": "pt"})
        on_main(finish)
    except (OSError, SafetensorError) as error:  # most often a disk that is full
        on_main(functools.partial(shutil.rmtree, part, ignore_errors=True))
        why = f"{folder} could not be written ({error})"
        raise UserError(f"{why}; make room or choose another place, then export a checkpoint or go on with --resume") from error


def _files_of(shapes: dict[str, torch.Size], dtype: torch.dtype, limit: int) -> dict[str, list[str]]:
    """{file: names of its tensors}, in their order, each file of at most `limit` bytes or of one tensor."""
    files, room = [], 0
    for name, shape in shapes.items():
        size = shape.numel() * dtype.itemsize
        if not files or size > room:
            files, room = [*files, []], limit
        files[-1].append(name)
        room -= size
    if len(files) == 1:
        return {"model.safetensors": files[0]}
    return {f"model-{i:05d}-of-{len(files):05d}.safetensors": names for i, names in enumerate(files, 1)}


def model_card(title: str, settings: dict, metrics: dict) -> str:
    """README.md of an exported model: the settings of its run and what was measured."""

    def table(head: str, rows: dict) -> list[str]:
        return [f"| {head} | |", "|---|---|", *(f"| {k} | {v} |" for k, v in rows.items() if v is not None), ""]

    front = ["---", "library_name: transformers", "---", "", f"# {title}", ""]
    model, dataset, objective = (settings.get(k) for k in ("model", "dataset", "objective"))
    what = f"`{model}` trained on the preferences of `{dataset}` with `{objective}`."
    numbers = {k: f"{v:.4f}" if isinstance(v, float) else v for k, v in metrics.items()}
    return "\n".join([*front, what, "", *table("measured", numbers), *table("setting", settings)])


# ---- will it fit? ----------------------------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors made inside that are alive, now and at most; on fake tensors nothing is really allocated."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = function(*args, **(kwargs or {}))
        for tensor in (t for t in tree_leaves(out) if isinstance(t, Tensor)):
            storage = tensor.untyped_storage()
            if id(storage) not in given and storage not in self.known:  # a view or an in-place result is no new memory
                self.known.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def _free(self, size: int) -> None:
        self.now -= size


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


def model_flops(model: nn.Module, examples: Sequence[data.Example]) -> float:
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


class _FusedKernel(torch.autograd.Function):
    """The tensors that FlexAttention's kernel makes and keeps, without its work."""

    @staticmethod
    def forward(ctx, query, key, value):
        out, log_z = torch.empty_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, log_z)
        return out

    @staticmethod
    def backward(ctx, grad):
        query, key, value, _, log_z = ctx.saved_tensors
        torch.empty_like(log_z)  # Σ out · grad of each query
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _fused_trace(module, query, key, value, attention_mask, **kwargs):
    return _FusedKernel.apply(query, key, value).transpose(1, 2).contiguous(), None


def one_microbatch(
    config, pairs: int, lengths: tuple, dtype: torch.dtype, checkpointing: bool, reference: bool = False, gpu: bool = True
) -> dict:
    """What forward and backward of `pairs` pairs of (prompt, chosen, rejected) tokens take, computed on tensors without memory.

    Args:
        reference: also the token KL to a second model.
        gpu: as on one: attention in the fused kernel, its block masks, the head in larger chunks, of which the first pair fills
            one; each gradient is freed at once. Else as on this CPU, gradients kept.
    Returns:
        peak: bytes at most alive besides the weights.
        flops: those of `model_flops`: nothing that is done twice.
        parameters, root, block: numbers of all, of those outside the decoder blocks, and of one block.
    """
    prompt, *responses = lengths
    examples = [data.Example([0] * prompt, [[0] * n for n in responses])] * pairs
    batch, chunk, masks = data.packed_batch(examples), None, 0
    if gpu:
        transformers.AttentionInterface.register("fused_trace", _fused_trace)
        chunk = chunk_rows(config.get_text_config().vocab_size, "cuda")
        windows = {*windows_of(config.get_text_config()), None}
        masks = sum(x.nbytes for x in tree_leaves([Blocks.of(batch.pairs, window, "cpu") for window in windows]))
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).train()
        frozen = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).requires_grad_(False) if reference else None
        policy = ResponseLogProbs(model, frozen, chunk)
        policy.use_layout("packed")
        for part in (model, frozen) if gpu else ():
            if part is not None:
                part.set_attn_implementation("fused_trace")
        policy = shard(policy, checkpointing=checkpointing)
        fake = {k: torch.zeros(v.shape, dtype=v.dtype) for k, v in batch._asdict().items() if isinstance(v, Tensor)}
        missing = max(0, (chunk or 0) - sum(responses))
        fake |= {k: nn.functional.pad(fake[k], (0, missing)) for k in ("index", "targets", "response", "in_prefix")}

        def after(p: nn.Parameter) -> None:
            p.grad = None if gpu else p.grad
            gc.collect()  # dispatch modes tie recomputed tensors into cycles, which a run without them does not

        for p in model.parameters():
            p.register_post_accumulate_grad_hook(after)
        gc.collect()
        gc.freeze()  # so that collecting looks at what is new only
        with LiveBytes() as live:
            sum(x.sum() for x in policy(batch._replace(**fake), ("kl",) * reference).values()).backward()
        gc.unfreeze()
    blocks = decoder_blocks(model)
    parameters, layered = (sum(p.numel() for p in m.parameters()) for m in (model, nn.ModuleList(blocks)))
    counts = dict(parameters=parameters, root=parameters - layered, block=layered // max(1, len(blocks)))
    return dict(peak=live.peak + masks, flops=model_flops(model, examples), **counts)


BODY = dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8)
SHAPES = {  # published sizes, so that a plan needs no download
    "gemma-2-9b": ("gemma2", dict(hidden_size=3584, intermediate_size=14336, num_hidden_layers=42, num_attention_heads=16,
                   num_key_value_heads=8, head_dim=256, vocab_size=256000)),
    "llama-3-8b": ("llama", BODY | {"vocab_size": 128256}),
    "mistral-7b": ("mistral", BODY | {"vocab_size": 32000}),
}  # fmt: skip


def config_of(model: str):
    """The configuration of a name in SHAPES, a config.json, a folder that holds one, or a hub name."""
    if model in SHAPES:
        kind, sizes = SHAPES[model]
        return transformers.AutoConfig.for_model(kind, **sizes)
    data.reachable(model)
    try:
        return transformers.AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{model}: no configuration there ({reason}); known shapes are {', '.join(SHAPES)}") from error


@dataclass
class Plan:
    """Memory per GPU, token budget and hours, from a configuration alone."""

    recipe: str | None = data.setting(None, "a published run of train.py: its model and batch size, unless given")
    reference: bool = data.setting(False, "with the sharded second model of token-KL objectives and of sync_every")
    model: str | None = data.setting(None, f"config.json, folder, hub name, or a shape: {', '.join(SHAPES)}")
    gpus: int = data.setting(8, "GPUs that the model is cut over")
    gpu_memory: float = data.setting(80.0, "GB (10⁹ bytes) of one GPU; 8 in 100 are left to the allocator")
    lengths: list[int] = field(default_factory=lambda: [300, 350, 350], metadata={"help": "tokens of prompt, chosen, rejected"})
    rows: int = data.setting(60_000, "pairs of one epoch")
    batch_size: int | None = data.setting(None, "pairs of one optimizer step, all GPUs together (128)")
    mfu: float = data.setting(0.25, "share of the peak that is reached: an estimate, no GPU was measured")
    tflops: float = data.setting(989.0, "dense bf16 peak of one GPU; 989 is an H100's or H200's")


def plan(p: Plan) -> str:
    """Memory per GPU, the largest token budget and the time of one epoch, as text."""
    recipe = data.recipe(p.recipe) if p.recipe else {"batch_size": 128}
    model = p.model or next((shape for shape in SHAPES if p.recipe and p.recipe.startswith(shape)), None)
    if model is None:
        raise UserError("plan needs --model or --recipe")
    if len(p.lengths) != 3 or min(p.lengths) < 1:
        raise UserError(f"lengths are {p.lengths}; write those of prompt, chosen and rejected, such as --lengths 300 350 350")
    for name in ("gpus", "gpu_memory", "rows", "batch_size", "mfu", "tflops"):
        value = getattr(p, name)
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"{name} is {value}; it must be above 0")
    p, config, lines = replace(p, batch_size=p.batch_size or recipe["batch_size"]), config_of(model), []
    for checkpointing in (True, False):
        one, three = (one_microbatch(config, n, p.lengths, torch.bfloat16, checkpointing, p.reference) for n in (1, 3))
        lines.append(f"{'with' if checkpointing else 'without'} --gradient-checkpointing, per GPU:")
        lines += _fit(one, (three["peak"] - one["peak"]) / 2, p)
    flops = (three["flops"] - one["flops"]) / 2 * p.rows * (4 / 3 if p.reference else 1)  # forward is a third of the whole
    hours = flops / (p.gpus * p.tflops * 1e12 * p.mfu) / 3600
    rows = f"{p.rows} pairs of {' + '.join(map(str, p.lengths))} tokens"
    head = f"{one['parameters'] / 1e9:.2f} B parameters; {rows}; {p.gpus} GPUs of {p.gpu_memory:g} GB"
    tail = f"one epoch: {flops:.3g} flops (nothing counted twice), {hours:.2f} h, {hours * p.gpus:.1f} GPU-hours at "
    tail += f"{p.mfu:.0%} of {p.tflops:g} Tflop/s\nBytes are counted on tensors without memory, the share of the peak is an "
    tail += "estimate; measure both with python tests/studies/benchmark.py --gpu"
    return "\n".join([head, *lines, tail])


def _fit(one: dict, per_pair: float, p: Plan) -> list[str]:
    """What a GPU holds with one pair in a microbatch, a line each, and how many pairs fit."""
    size, root, block, several = one["parameters"], one["root"], one["block"], p.gpus > 1
    cut, gathered = -(-size // p.gpus), 2 * (root + 2 * block) if several else 2 * size
    parts = {
        "fp32 weights": 4 * cut, "Adam moments": 8 * cut, "gradients, reduced": 4 * cut,
        "gathered 16-bit weights (root, two blocks)": gathered,
        "gathered gradients (root in fp32, one block)": 4 * root + 6 * block if several else 0,
        "first pair: activations and head chunk": one["peak"],
    }  # fmt: skip
    parts |= {"reference, fp32": 4 * cut, "reference, gathered 16-bit weights": gathered} if p.reference else {}
    parts["sum"] = sum(parts.values())
    parts["each further pair"] = per_pair
    lines = [f"  {name:<48}{value / 2**30:9.2f} GiB" for name, value in parts.items()]
    free = 0.92 * p.gpu_memory * 1e9 - parts["sum"]  # the rest is the allocator's
    whole_gradients = 4 * size if several else 0
    pairs_once, pairs = 1 + int(free // per_pair), 1 + int((free - whole_gradients) // per_pair)
    if pairs_once >= -(-p.batch_size // p.gpus):
        budget = pairs_once * sum(p.lengths)
        return [*lines, f"  fits: a step of {p.batch_size} pairs is one microbatch; --tokens-per-microbatch up to {budget}"]
    if pairs < 1:
        return [*lines, "  does not fit"]
    more = f"  fits, with {whole_gradients / 2**30:.2f} GiB more for gradients that stay whole between microbatches:"
    return [*lines, more, f"  --tokens-per-microbatch up to {pairs * sum(p.lengths)}"]


# ---- command line ----------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    """The command line as a function. What the user can mend ends with a message and exit code 2."""
    commands = {"export": (Export, export_checkpoint), "plan": (Plan, lambda p: print(plan(p)))}
    data.command_line(lambda argv: data.commands(argv, "distributed.py", __doc__, commands), argv, fail)


if __name__ == "__main__":
    main()
