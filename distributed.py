"""Ranks, sharding, loading, checkpoints and export: the only file that knows how many processes there are.

    torchrun --nproc-per-node 8 train.py tests/published/gemma-2-9b-it-simpo.yaml --save-every 100     # one machine
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
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as c10d  # this library's name inside PyTorch
import transformers
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint as recompute
from transformers.dynamic_module_utils import init_hf_modules

import data
from data import UserError
from logprobs import compiled, to_device

ANSWER_WITHIN = timedelta(minutes=10)  # a rank that takes longer than that in the middle of a step hangs
RANK_0_WITHIN = timedelta(hours=12)  # and so long may rank 0 take for what it does for all
SAID_AFTER = 10.0  # seconds: a rank that waits longer than that for others at the start says so
FILE_LIMIT = "5GB"  # of one file of an exported model
TINY = 10**6  # parameters: a model below works in one thread of a CPU, unless OMP_NUM_THREADS says otherwise

alone = False  # while on_rank_0's function runs, in which nothing may wait for another rank
patient = None  # the process group in which ranks wait for rank 0

warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process saves and loads checkpoints like this too

# ---- ranks -----------------------------------------------------------------------------------------------------------


def setup(device: str) -> torch.device:
    """Join the process group if torchrun started us; returns the device to compute on ("auto": a GPU if there is one).

    A rank that fails prints its error and leaves at once, without waiting for anybody; torchrun then ends the others.
    """
    global patient
    place = data.device_named(device)
    if "RANK" not in os.environ:
        return place
    if place.index is not None:
        raise UserError(f"device is {device!r}; torchrun gives each rank a GPU of its own, so write cuda")
    on_gpu = place.type == "cuda"
    if on_gpu:
        place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    if not c10d.is_initialized():
        if on_gpu:
            torch.cuda.set_device(place)
        _join("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
        patient = c10d.new_group(backend="gloo", timeout=RANK_0_WITHIN)
        sys.excepthook = _leave
        atexit.register(_end)
    return place


def _join(backend: str) -> None:
    """Enter the process group; UserError where the launcher's variables make no sense, or the other ranks do not come."""
    variables = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    given = " ".join(f"{name}={os.environ.get(name, '')}" for name in variables)
    advice = f"the environment says {given}; start with torchrun, or, where no launcher is meant, unset these"
    waiting = threading.Timer(SAID_AFTER, data.say, [f"waiting for the other ranks: {advice}"])
    waiting.daemon = True
    waiting.start()
    interrupt = signal.signal(signal.SIGINT, signal.SIG_DFL)  # PyTorch waits where Python hears no signal
    try:
        c10d.init_process_group(backend, timeout=ANSWER_WITHIN)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{data.brief(error)}: {advice}") from error
    finally:
        waiting.cancel()
        signal.signal(signal.SIGINT, interrupt)


def _end() -> None:
    """The way out of a run that ended well: without the rest of Python's, where a thread of gloo that is late would abort."""
    c10d.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _leave(kind, error, trace) -> None:
    if isinstance(error, RuntimeError) and re.search("connection|peer", str(error), re.IGNORECASE):
        time.sleep(5)  # its message comes first, and torchrun ends us meanwhile
        data.say(f"error on rank {rank()}: another rank is gone ({data.brief(error)})")
    else:
        sys.__excepthook__(kind, error, trace)
    sys.stderr.flush()
    os._exit(1)  # the interpreter's own way out waits for communication that will never happen


def fail(error: Exception) -> None:
    """End the run with a message for its owner and exit code 2. Where every rank fails alike, the first one speaks."""
    if not is_rank_0():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(5)  # torchrun ends us here if rank 0 failed too
    data.say(f"error: {error}" if is_rank_0() else f"error on rank {rank()}: {error}")
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
            raise UserError(f"{folder} is in use by another run, perhaps a rank that outlived torchrun; end it first") from None
        except (OSError, NotImplementedError) as error:  # some network file systems have no locks
            data.say(f"warning: {folder} cannot be locked ({error}); let one run at a time write there")

    on_rank_0(acquire)
    return lock


def rank() -> int:
    return c10d.get_rank() if c10d.is_initialized() else 0


def world_size() -> int:
    return c10d.get_world_size() if c10d.is_initialized() and not alone else 1


def is_rank_0() -> bool:
    return rank() == 0


def on_rank_0(function: Callable, *args):
    """function(…) called on rank 0 only, as if it were the only one; every rank gets its result, UserError or OSError.

    The others wait for hours if need be: this is how a large model is read and written.
    """
    global alone
    if world_size() == 1:
        return function(*args)
    outcome = [None, None]
    if is_rank_0():
        alone = True
        try:
            outcome[0] = function(*args)
        except Exception as error:
            outcome[1] = error
        finally:
            alone = False
    c10d.broadcast_object_list(outcome, src=0, group=patient)
    result, error = outcome
    if error is not None:
        raise error
    return result


def gather_objects(value) -> list:
    """A small value of every rank, in the order of ranks."""
    values = [value] * world_size()
    if world_size() > 1:
        c10d.all_gather_object(values, value)
    return values


def gather_rows(rows: Tensor, values: Tensor, total: int) -> Tensor:
    """Rows computed on this rank → (total, k) with the rows of all ranks, on all ranks; no GPU is waited for.

    Args:
        rows: (n,) the number of each row, on the host, where they are counted: one that is missing or came twice is an error,
            never a zero.
        values: (n, k) the rows, on the device. What ranks add up is a value and zeros, so it is exact.
    """
    counts = torch.bincount(rows, minlength=total)
    table = values.new_zeros(total, values.shape[1])
    table[to_device(rows, values.device)] = values
    if world_size() > 1:
        c10d.all_reduce(counts)
        c10d.all_reduce(table)
    wrong = int((counts != 1).sum())
    if wrong:
        raise RuntimeError(f"{wrong} of {total} rows were not scored exactly once")
    return table


# ---- sharding --------------------------------------------------------------------------------------------------------


def decoder_blocks(model: nn.Module) -> nn.ModuleList:
    """The repeated layers of a transformer: the list of modules that holds the most parameters."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    return max(lists, key=lambda m: sum(p.numel() for p in m.parameters()), default=nn.ModuleList())


def _compiled_when_packed(forward: Callable) -> Callable:
    """A decoder block's forward, compiled where it is handed a packed sequence; generation's own path stays eager."""
    fast = compiled(forward, dim=1)

    def call(*args, **kwargs):
        packed = "blocks" in kwargs or "pairs" in kwargs
        return fast(*args, **kwargs) if packed else forward(*args, **kwargs)

    return call


def shard(
    policy: nn.Module, mesh: str | None = None, bf16: bool = False, checkpointing: bool = False, compiling: bool = False
) -> nn.Module:
    """Shard a ResponseLogProbs over all ranks, in place; in one process without torchrun only steps 0 and 1 do anything.

    Args:
        mesh: "RxS", R replicas of a model that is cut into S shards (R·S ranks); None: one replica, sharded over all ranks.
        bf16: gather weights and compute in bf16; weights, reductions and moments stay fp32.
        checkpointing: recompute the activations of a decoder block in backward.
        compiling: compile the decoder blocks.
    """
    blocks = list(decoder_blocks(policy.model))
    frozen = list(decoder_blocks(policy.reference)) if policy.reference is not None else []
    # 0. compiled innermost: what wraps a block later is no part of its graph, which all blocks of a kind share
    if compiling:
        for block in blocks + frozen:
            block.forward = _compiled_when_packed(block.forward)
    # 1. recomputation around it: a block is gathered once in backward, and recomputed with the weights already there
    if checkpointing:
        for block in blocks:
            block.forward = functools.partial(recompute, block.forward, use_reentrant=False, preserve_rng_state=False)
    if not c10d.is_initialized():
        return policy
    # late here and below: these libraries take a second, for which `--help` need not wait
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    sizes = mesh_sizes(mesh)
    place = "cuda" if "nccl" in c10d.get_backend() else "cpu"  # each rank's own GPU
    ranks = init_device_mesh(place, sizes, mesh_dim_names=("replicate", "shard")[-len(sizes) :])
    precision = MixedPrecisionPolicy(torch.bfloat16 if bf16 else None, torch.float32)
    options = dict(mesh=ranks, mp_policy=precision)
    # 2. each block: at most this one and the next are whole at a time; a reference is sharded the same way
    for block in blocks + frozen:
        fully_shard(block, **options)
    # 3. the root, last, takes what is left: embeddings, final norm and head. It is the module whose forward runs the chunked
    #    head, so these are gathered once per microbatch, and a tied weight stays one parameter
    fully_shard(policy, **options)
    # 4. our losses are divided by the rows of all ranks: gradients add up over ranks, no average
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    # 5. backward makes the root let go of its weights; a pass without gradient has to do so itself
    policy.register_forward_pre_hook(lambda *_: policy.set_reshard_after_forward(not torch.is_grad_enabled(), recurse=False))
    register_fsdp_forward_method(policy, "run_unsharded")
    run_unsharded = policy.run_unsharded

    def run_and_release(*args, **kwargs):
        policy.set_reshard_after_forward(True, recurse=False)
        return run_unsharded(*args, **kwargs)

    policy.run_unsharded = run_and_release
    return policy


def mesh_sizes(text: str | None) -> tuple[int, ...]:
    """(replicas, shards) of a mesh such as "2x4"; of None one replica sharded over all ranks, (ranks,)."""
    if text is None:
        return (world_size(),)
    sizes = re.fullmatch(r"(\d{1,9})x(\d{1,9})", text)
    if sizes is None or int(sizes[1]) * int(sizes[2]) != world_size():
        count = f"the number of ranks that torchrun starts, here {world_size()}"
        raise UserError(f'mesh is {text!r}; write replicas x shards, such as "2x4", whose product is {count}')
    return int(sizes[1]), int(sizes[2])


def sync_gradients(policy: nn.Module, last: bool) -> None:
    """Before each backward: only the last one of a step reduces gradients over ranks; until then each rank adds up its own."""
    if hasattr(policy, "set_requires_gradient_sync"):  # it is sharded
        policy.set_requires_gradient_sync(last)


def clip_gradients(policy: nn.Module, limit: float) -> Tensor:
    """Scale all gradients so that their global 2-norm is at most `limit` (0: no limit); returns the norm before."""
    return _whole(nn.utils.clip_grad_norm_(policy.parameters(), limit or float("inf")))


# ---- loading ---------------------------------------------------------------------------------------------------------


def load_model(name: str, trust_remote_code: bool, check: Callable) -> tuple[nn.Module, str, dict[str, Tensor]]:
    """A causal language model with fp32 weights, read by transformers; what `check(model)` says of it while it is whole, called
    on rank 0; and the weights that are still to be handed out.

    In one process nothing is left to hand out. Under torchrun rank 0 alone reads the weights and keeps them until `hand_out`,
    in fp32 on its CPU, 4 bytes per parameter beside its own shards. Every rank gets the model that rank 0 read, same ties and
    buffers, its parameters on meta.

    Raises:
        UserError: on all ranks: no such model, or weights that are missing, unexpected or of another shape, each by name.
    """
    weights = {}
    if trust_remote_code:
        init_hf_modules()  # where rank 0 puts the model's own code, and the others of this machine find it

    def read() -> tuple[nn.Module, str]:
        model = _read_model(name, trust_remote_code)
        if model.num_parameters() < TINY and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(1)  # threads that wait for each other cost more than they bring
        said = check(model)
        model.initial_hash = _digest(_tensors(model))  # the same for any number of ranks
        if c10d.is_initialized():
            weights.update(model.cpu().state_dict())
            _empty(model)
        return model, said

    return *on_rank_0(read), weights


def _read_model(name: str, trust_remote_code: bool) -> nn.Module:
    how = dict(dtype=torch.float32, use_safetensors=True, ignore_mismatched_sizes=True, output_loading_info=True)
    what = dict(output_attentions=False, output_hidden_states=False, return_dict=True)  # a file may have it otherwise
    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, **what)
        how |= dict(config=config, trust_remote_code=trust_remote_code)
        model, info = transformers.AutoModelForCausalLM.from_pretrained(name, **how)
    except Exception as error:  # transformers raises many kinds; all mean that there is no loadable model
        reason = data.brief(error)
        if ".safetensors" in reason:
            reason += "; .bin and .pt files can run code: convert them to safetensors"
        if "custom code" in reason:
            reason += "; --trust_remote_code would run it"
        raise UserError(f"{name}: no loadable causal language model there ({reason})") from error
    _refuse_weights(name, info)
    model.config.dtype = config.dtype  # what the file has, and the export will have
    return model


def _refuse_weights(name: str, info: dict) -> None:
    """UserError that names what does not fit; transformers would fill it with noise, or leave it out."""
    misshapen = [f"{key} is {tuple(there)}, the model has {tuple(own)}" for key, there, own in info["mismatched_keys"]]
    found = {"of another shape": misshapen, "unexpected": info["unexpected_keys"], "missing": info["missing_keys"]}
    for what, names in found.items():
        if names:
            shown = ", ".join(sorted(names)[:8])
            more = " …" if len(names) > 8 else ""
            raise UserError(f"{name}: {len(names)} weights are {what}: {shown}{more}")


def _empty(model: nn.Module) -> None:
    """Put a model's parameters on meta; a tied one stays one. Buffers stay: many are computed and in no state dict."""
    on_meta = {p: nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad) for p in model.parameters()}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            setattr(module, name, on_meta[parameter])


def hand_out(model: nn.Module, weights: dict[str, Tensor], device: torch.device) -> None:
    """Give a model of `load_model`, sharded meanwhile, its weights; a whole tensor at a time is on each rank's device."""
    if not c10d.is_initialized():
        model.to(device)
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.to_empty(device=device)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, dict(weights), options=options)  # a copy of the dict, which is filled with shards


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """What a file of the model holds: parameters, a tied one once, and persistent buffers."""
    buffers = dict(model.named_buffers())
    persistent = {name: buffers[name] for name in model.state_dict() if name in buffers}
    return dict(model.named_parameters()) | persistent


def not_finite(model: nn.Module) -> list[str]:
    """Names of the parameters that hold an infinity or NaN, on any rank."""
    mine = [name for name, p in model.named_parameters() if not torch.isfinite(_local(p)).all()]
    return sorted(set().union(*gather_objects(mine)))


# ---- numbers kept between runs ---------------------------------------------------------------------------------------


def _digest(tensors: dict[str, Tensor]) -> str:
    """Of names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def save_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """Write small tensors as one safetensors file, with a checksum among its metadata; a folder that cannot be written is no
    reason to stop."""
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensors[name].cpu().contiguous() for name in sorted(tensors)}
        save_file(tensors, part, {"sha256": _digest(tensors)})
        os.replace(part, file)
    except (OSError, SafetensorError):
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def load_tensors(file: Path) -> dict[str, Tensor] | None:
    """What save_tensors wrote; None if there is no such file, or, said in a line, if it is damaged."""
    with contextlib.suppress(Exception):  # what is no such file fails in many ways
        with safe_open(file, "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in sorted(opened.keys())}
            if opened.metadata()["sha256"] == _digest(tensors):
                return tensors
    if os.path.exists(file):
        data.say(f"{file} is damaged and made again")
    return None


def _whole(tensor: Tensor) -> Tensor:
    """All rows of a tensor that may be sharded over ranks (then it is a DTensor)."""
    return tensor.detach().full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach()


def _local(tensor: Tensor) -> Tensor:
    """The rows of a tensor that this rank owns; the tensor itself where it is not sharded."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


# ---- checkpoints -----------------------------------------------------------------------------------------------------


class StopOnSignal:
    """A context in which SIGTERM, SIGHUP and Ctrl-C only raise a hand; `requested` asks whether any rank's hand is up.

    Without torchrun a second one means now: the process ends as it would without this. SIGTERM or SIGHUP within a second of
    the first is no second one, since a batch system signals the group and the process; Ctrl-C twice is always meant.
    `at_once` is for where nothing can be lost: the first one ends the process, with a word.
    """

    number = 0  # of the signal that came first
    since = 0.0  # when it came, by time.monotonic

    def __init__(self, at_once: bool = False):
        self.at_once = at_once

    def __enter__(self) -> "StopOnSignal":
        self.before = {}
        left_alone = self.at_once and c10d.is_initialized()  # torchrun sees to that
        if threading.current_thread() is threading.main_thread() and not left_alone:
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
                if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                    self.before[number] = signal.signal(number, self._raise_hand)
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _raise_hand(self, number, frame) -> None:
        if self.at_once:
            data.say("stopped before a step was made; --resume starts there again")
            raise SystemExit(128 + number)
        twice = number == self.number == signal.SIGINT or time.monotonic() > self.since + 1
        if self.number == 0:
            self.number, self.since = number, time.monotonic()
            if number == signal.SIGINT and is_rank_0():
                data.say("\nstopping soon, with a checkpoint; Ctrl-C again stops at once")
        elif twice and not c10d.is_initialized():  # torchrun passes on a Ctrl-C that we have had already
            signal.signal(number, self.before[number])
            os.kill(os.getpid(), number)

    def requested(self) -> int:
        """The number of the signal by which a rank was asked to stop, the same on all ranks; 0 where there was none."""
        return max(gather_objects(self.number))


def flush(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _new_folder(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # of an attempt that was killed
    folder.mkdir(parents=True)


def _checksums(folder: Path) -> dict[str, list[int]]:
    """{file: [bytes, CRC-32]} of a checkpoint's files, all but the marker; each rank reads its share of them. OSError on all
    ranks where one of them cannot read."""
    try:
        files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != "complete")
        mine = {path.name: data.checksum(path) for path in files[rank() :: world_size()]}
    except OSError as error:
        mine = error
    sums = {}
    for found in gather_objects(mine):
        if isinstance(found, OSError):
            raise found
        sums |= found
    return sums


def _listed(checkpoint: Path) -> dict[str, list[int]]:
    """{file: [bytes, CRC-32]} as the marker of a checkpoint says."""
    marker = json.loads((checkpoint / "complete").read_text())
    return {name: [int(size), int(crc)] for name, (size, crc) in marker.items()}


def validate(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be trusted, or None; asked by all ranks together."""
    try:
        expected = _listed(checkpoint)
        found = _checksums(checkpoint)
    except FileNotFoundError:
        return "it was not finished"
    except OSError as error:
        return f"its files or its marker cannot be read ({error})"
    except (ValueError, TypeError, AttributeError, RecursionError):
        expected = {}
    if "step.json" not in expected:
        return "its marker is damaged"
    for name in expected.keys() | {name for name in found if name.endswith(".safetensors")}:
        if found.get(name) != expected.get(name):
            what = "damaged" if name in found else "missing"
            return f"{name} is {what}: [bytes, CRC-32] are {found.get(name)}, the marker says {expected.get(name)}"
    return None


def _read_into(tensors: dict[str, Tensor], checkpoint: Path) -> None:
    """Fill tensors from those of the same names in a checkpoint, each rank its rows."""
    import torch.distributed.checkpoint as dcp

    dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(checkpoint)), no_dist=world_size() == 1)


def _everything(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> dict[str, Tensor]:
    """All tensors of a checkpoint: `weight.NAME`, `exp_avg.NAME`, `exp_avg_sq.NAME`.

    Moments that AdamW has not made, before its first step or where no gradient has arrived, are made here, as zeros.
    """
    tensors = {f"weight.{name}": tensor.detach() for name, tensor in _tensors(model).items()}
    for name, p in model.named_parameters():
        if p not in optimizer.state:
            count = torch.tensor(float(step), device=p.device)
            optimizer.state[p] = {"step": count, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        for key in ("exp_avg", "exp_avg_sq"):
            tensors[f"{key}.{name}"] = optimizer.state[p][key]
    return tensors


def save_checkpoint(folder: Path, model: nn.Module, optimizer, state: dict, keep: int, tokenizer) -> bool:
    """Write step-N of `state["step"]`, then delete all but the newest `keep` complete ones; returns whether it is there. When
    it cannot be written (a full disk) the reason is printed and older ones are left alone."""
    import torch.distributed.checkpoint as dcp

    final = folder / f"step-{state['step']:06d}"
    part = final.with_suffix(".part")
    if on_rank_0(final.exists) and validate(final) is None:
        return True  # resumed from it and stopped before the next
    try:  # what fails on one rank raises on all
        on_rank_0(_new_folder, part)
        writer = dcp.HuggingFaceStorageWriter(str(part), save_distributed=True)
        dcp.save(_everything(model, optimizer, state["step"]), storage_writer=writer, no_dist=world_size() == 1)
        on_rank_0((part / "step.json").write_text, json.dumps(state))
        on_rank_0(_describe, part, model, tokenizer)
        on_rank_0(_commit, part, final, _checksums(part), keep)
    except (Exception, dcp.CheckpointException) as error:
        if is_rank_0():
            shutil.rmtree(part, ignore_errors=True)
            reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
            data.say(f"checkpoint {final} could not be written ({reason}); earlier ones are untouched")
        return False
    return True


def _describe(folder: Path, model: nn.Module, tokenizer) -> None:
    """What lies beside weights in a `transformers` folder."""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _commit(part: Path, final: Path, sums: dict, keep: int) -> None:
    """Files, folder, its name, the marker: each is on disk before the next."""
    for name in sums:
        flush(part / name)
    flush(part)
    shutil.rmtree(final, ignore_errors=True)  # incomplete or damaged, as it is written again
    os.rename(part, final)
    flush(final.parent)
    marker = final / "complete"
    marker.write_text(json.dumps(sums))
    flush(marker)
    flush(final)
    whole = complete_checkpoints(final.parent)
    kept = whole[: whole.index(final) + 1][-keep:]  # a later one was found damaged when the run went on from an earlier one
    for old in checkpoints(final.parent):
        if old not in kept:
            (old / "complete").unlink(missing_ok=True)  # first, so that a half-deleted one is not taken for a whole one
            shutil.rmtree(old)


def check_space(out: Path, model: nn.Module, checkpoints: int, dtype: torch.dtype) -> None:
    """Refuse a run whose `checkpoints` (12 bytes a parameter) and export in `dtype` will not fit where `out` is.

    What an earlier run left in `out` counts as room: it is what would be written.
    """
    needed = sum(p.numel() for p in model.parameters()) * (12 * checkpoints + dtype.itemsize)
    free = shutil.disk_usage(out).free + sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    if needed > free:
        what = f"{checkpoints} checkpoints and the exported model need {needed / 2**30:.1f} GiB"
        raise UserError(f"out {out} has {free / 2**30:.1f} GiB of free space, but {what}; make room, or lower --keep")


def checkpoints(folder: Path) -> list[Path]:
    """What goes by the name of a checkpoint, oldest first."""
    return sorted((p for p in folder.glob("step-*") if p.name[5:].isdecimal()), key=lambda p: int(p.name[5:]))


def complete_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints with a marker and files of the sizes that it lists, oldest first; their content is not read."""
    whole = []
    for checkpoint in checkpoints(folder):
        with contextlib.suppress(Exception):  # of a marker that is missing or damaged
            if all((checkpoint / name).stat().st_size == size for name, (size, _) in _listed(checkpoint).items()):
                whole.append(checkpoint)
    return whole


def newest_checkpoint(folder: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that checks out, or None; says which newer ones were passed over, and why."""
    for candidate in reversed(on_rank_0(checkpoints, folder)):
        reason = validate(candidate)
        if reason is None:
            return candidate
        say(f"skipped {candidate}: {reason}")
    return None


def check_same(here: dict, there: dict, message: str) -> None:
    """UserError, the message and by name what differs, where another run is not this one."""
    differs = [f"{k} is {v!r} here and {there.get(k)!r} there" for k, v in here.items() if there.get(k) != v]
    if differs:
        raise UserError(f"{message}: {'; '.join(differs)}")


def check_ranks(values: dict) -> None:
    """UserError, on all ranks, where one of them was given something else: a line edited on one machine, another file there."""
    first, *others = gather_objects(values)
    for number, theirs in enumerate(others, 1):
        check_same(first, theirs, f"rank {number} was not started like rank 0")


def load_checkpoint(checkpoint: Path, model: nn.Module, optimizer, run: dict) -> dict:
    """Put weights and moments back in place, for any number of ranks and an optimizer that has not made a step; returns the
    saved state. UserError names what differs where `run`, {name: value}, is not the run that was saved."""
    state = json.loads((checkpoint / "step.json").read_text())
    check_same(run, state.get("run", {}), f"{checkpoint} belongs to another run")
    _read_into(_everything(model, optimizer, state["step"]), checkpoint)
    return state


# ---- export ----------------------------------------------------------------------------------------------------------


def export(model: nn.Module, tokenizer, folder: Path, dtype: torch.dtype, card: str) -> None:
    """Write a `transformers` folder: weights in `dtype`, config, tokenizer, chat template, generation config, model card.

    Rank 0 gathers the whole model on its CPU: 4 bytes per parameter, and less and less of it while it becomes `dtype`.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    weights = {name: whole[name] for name in _tensors(model) if name in whole}  # a tied one once; none but on rank 0
    del whole
    on_rank_0(_write_model, folder, model, weights, tokenizer, dtype, card)


def _write_model(folder: Path, model: nn.Module, weights: dict, tokenizer, dtype: torch.dtype, card: str) -> None:
    """Write a model with `weights`, which are cast in place, beside as `….part`; renamed when it is on disk."""
    part = folder.with_name(f"{folder.name}.part")
    for name, tensor in weights.items():
        if tensor.is_floating_point():
            weights[name] = tensor.to(dtype)
    try:
        _new_folder(part)
        model.save_pretrained(part, state_dict=weights, max_shard_size=FILE_LIMIT)  # under the names that the hub has
        model.config.dtype = dtype
        _describe(part, model, tokenizer)
        (part / "README.md").write_text(card, encoding="utf-8")
        for path in part.iterdir():
            shutil.copymode(part / "README.md", path)  # what the umask says; safetensors makes files for their owner alone
            flush(path)
        if folder.exists():  # empty, or of an attempt that was killed later; what else lies there is not touched
            shutil.copytree(part, folder, copy_function=os.replace, dirs_exist_ok=True)
            shutil.rmtree(part)
        else:
            os.rename(part, folder)
    except (OSError, SafetensorError) as error:  # most often a disk that is full
        shutil.rmtree(part, ignore_errors=True)
        raise UserError(f"{folder} could not be written ({error}); make room, or choose another place") from error


@dataclass
class Export:
    """Write a checkpoint as a transformers folder."""

    checkpoint: Path = field(metadata={"help": "a folder …/checkpoints/step-000120"})
    out: Path = field(metadata={"help": "the folder to write"})
    dtype: str = data.setting("bf16", "that of the weights", choices=("bf16", "fp32"))
    trust_remote_code: bool = data.setting(False, "allow a checkpoint to bring Python code that is then run")


def export_checkpoint(e: Export) -> None:
    import torch.distributed.checkpoint as dcp

    reason = validate(e.checkpoint)
    if reason is not None:
        raise UserError(f"{e.checkpoint} cannot be exported: {reason}")
    for place in (e.out, e.out.with_name(f"{e.out.name}.part")):
        if place.exists() and (place.is_file() or any(place.iterdir())):
            raise UserError(f"{place} exists already; choose another folder")
    try:
        config = transformers.AutoConfig.from_pretrained(e.checkpoint, trust_remote_code=e.trust_remote_code)
        with torch.device("meta"):  # its shape is enough: the weights come from the checkpoint
            model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=e.trust_remote_code)
    except ValueError as error:  # it has code of its own, or there is no such kind of model
        raise UserError(f"{e.checkpoint} cannot be exported: {str(error).splitlines()[0]}") from error
    if (e.checkpoint / "generation_config.json").exists():
        model.generation_config = transformers.GenerationConfig.from_pretrained(e.checkpoint)
    metadata = dcp.HuggingFaceStorageReader(str(e.checkpoint)).read_metadata().state_dict_metadata
    saved = {name: torch.empty(x.size, dtype=x.properties.dtype) for name, x in metadata.items() if name.startswith("weight.")}
    _read_into(saved, e.checkpoint)
    weights = {name.removeprefix("weight."): tensor for name, tensor in saved.items()}
    tokenizer = data.load_tokenizer(str(e.checkpoint), e.trust_remote_code)
    state = json.loads((e.checkpoint / "step.json").read_text())
    card = model_card(state.get("run", {}), {"step": state["step"]})
    _write_model(e.out, model, weights, tokenizer, torch.bfloat16 if e.dtype == "bf16" else torch.float32, card)


def model_card(settings: dict, metrics: dict) -> str:
    """README.md of an exported model: what was measured and the settings of its run, of this machine's folders nothing.

    As JSON in a block of code, in which no value can be markup or end the block: a line break in it is spelled out.
    """
    public = {name: value for name, value in settings.items() if name not in ("out", "cache", "resume")}
    for name in ("model", "dataset", "eval_dataset"):
        sources = re.split(r"\s*,\s*", public.get(name) or "")
        public[name] = ", ".join(source if _on_hub(source) else source.rpartition("/")[2] for source in sources) or None
    content = json.dumps({"measured": metrics, "settings": public}, indent=2)
    return f"---\nlibrary_name: transformers\n---\n\n# Trained with plainpo\n\n```json\n{content}\n```\n"


def _on_hub(source: str) -> bool:
    """Whether a source is org/name, and no path here."""
    name = re.split(r"[:@\[]", source)[0]
    return re.fullmatch(r"[\w-]+/[\w.-]+", name) is not None and not os.path.exists(name)


# ---- command line ----------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    """The command line as a function. A user error ends with a message and exit code 2."""
    data.command_line(lambda a: data.commands(a, "distributed.py", __doc__, {"export": (Export, export_checkpoint)}), argv)


if __name__ == "__main__":
    main()
