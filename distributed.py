"""Ranks, sharding, loading, checkpoints and export: the only file that knows how many processes there are.

    torchrun --nproc-per-node 8 train.py --recipe gemma-2-9b-it-simpo --save-every 100     # one machine
    python distributed.py export runs/…/checkpoints/step-000400 OUT --dtype bf16           # checkpoint → transformers folder

Started without torchrun there is one process and no process group; every helper is then the identity or a plain file
operation, so train.py takes the same path everywhere.

A checkpoint is a folder `step-000120`: weights and Adam moments as safetensors, one file per rank, each tensor cut by rows;
`step.json`; the configuration and tokenizer. It is written beside as `….part`, flushed to disk, renamed, and marked last
with a file `complete` that holds the size and checksum of every other file. Only marked folders that check out are resumed.
"""

import atexit
import contextlib
import functools
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
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as c10d  # this library's name inside PyTorch
import transformers
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils.checkpoint import checkpoint as recompute

import data
from data import UserError
from logprobs import compiled, to_device

alone = False  # while on_rank_0's function runs, in which nothing may wait for another rank
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
    if world_size() > 1 and not is_rank_0():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(5)  # torchrun ends us here if rank 0 failed too
    print(f"error: {error}" if is_rank_0() else f"error on rank {rank()}: {error}", file=sys.stderr, flush=True)
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

    on_rank_0(acquire)
    return lock


def rank() -> int:
    return c10d.get_rank() if c10d.is_initialized() else 0


def world_size() -> int:
    return c10d.get_world_size() if c10d.is_initialized() and not alone else 1


def is_rank_0() -> bool:
    return rank() == 0


def on_rank_0(function: Callable, *args):
    """function(…) called on rank 0 only, as if it were the only one; every rank gets its result, UserError or OSError."""
    global alone
    if world_size() == 1:
        return function(*args)
    outcome = [None, None]
    if is_rank_0():
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
    """A decoder block's forward, compiled where it is handed a pack; generation's own path stays eager."""
    fast = compiled(forward, dim=1)
    return lambda *args, **kw: (fast if {"blocks", "segments"} & kw.keys() else forward)(*args, **kw)


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
    register_fsdp_forward_method(policy, "within")
    within = policy.within

    def within_and_release(*args, **kwargs):
        policy.set_reshard_after_forward(True, recurse=False)
        return within(*args, **kwargs)

    policy.within = within_and_release
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
    if not is_rank_0():
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

    return on_rank_0(read)


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
        elif number == signal.SIGINT and is_rank_0() and not self.raised:
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


def validate(checkpoint: Path) -> str | None:
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
    if on_rank_0(final.exists) and validate(final) is None:
        return True  # resumed from it and stopped before the next
    trouble, sums = None, {}
    try:
        on_rank_0(_start_part, part, final)
        sums = _write_checkpoint(part, model, optimizer, state, tokenizer, reference)
    except (Exception, dcp.CheckpointException) as error:
        trouble = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
    everyone = gather_objects((trouble, sums))
    trouble = next((t for t, _ in everyone if t), None)
    if trouble is None:
        try:
            on_rank_0(_commit, part, final, {k: v for _, sums in everyone for k, v in sums.items()}, keep)
            return True
        except OSError as error:
            trouble = str(error)
    if is_rank_0():
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
    on_rank_0((part / "step.json").write_text, json.dumps({**state, "adam_step": adam_step}))
    on_rank_0(_describe, part, model, tokenizer)
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


def _commit(part: Path, final: Path, sums: dict, keep: int) -> None:
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
    for candidate in reversed(on_rank_0(checkpoints, folder)):
        reason = validate(candidate)
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
    if (reason := validate(checkpoint)) is not None:
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
        on_rank_0(begin)
        for file, names in files.items():
            tensors = {}
            for name in names:
                value = fetch(name)
                if is_rank_0():
                    kind = dtype if value.is_floating_point() else value.dtype
                    tensors[name] = torch.empty(value.shape, dtype=kind).copy_(value)
            on_rank_0(save_file, tensors, part / file, {"format": "pt"})
        on_rank_0(finish)
    except (OSError, SafetensorError) as error:  # most often a disk that is full
        on_rank_0(functools.partial(shutil.rmtree, part, ignore_errors=True))
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


# ---- command line ----------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    """The command line as a function. What the user can mend ends with a message and exit code 2."""
    commands = {"export": (Export, export_checkpoint)}
    data.command_line(lambda argv: data.commands(argv, "distributed.py", __doc__, commands), argv, fail)


if __name__ == "__main__":
    main()
