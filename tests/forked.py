"""Functions run in forked processes: as ranks that talk over gloo on this machine, or alone; and the bytes they take."""

import contextlib
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable

import numpy as np
import torch

import distributed as dist


def port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def rank_of(number: int, count: int, at: int, queue, function, args) -> None:
    """In a forked process: join as one of `count` ranks (0: alone) and put (number, result, trace of an error) in a queue."""
    torch.set_num_threads(1)
    if count:
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        os.environ.update(zip(names, map(str, (number, number, count, "localhost", at))))
        dist.setup("cpu")
    try:
        queue.put((number, function(*args), None))
    except BaseException:
        queue.put((number, None, traceback.format_exc()))
        os._exit(1)
    if count:
        torch.distributed.barrier()
    os._exit(0)


def ranks(count: int, function: Callable, *args, within: float = 90) -> list:
    """function(*args) on `count` forked ranks, or in one process without a process group for 0; results in order of ranks.

    within: seconds, for an answer from each.
    """
    context = multiprocessing.get_context("fork")
    queue, at = context.SimpleQueue(), port()
    children = [context.Process(target=rank_of, args=(i, count, at, queue, function, args)) for i in range(max(1, count))]
    for child in children:
        child.start()
    results = []
    while len(results) < len(children):
        assert queue._reader.poll(within), f"no answer from a rank for {within} s"
        results.append(queue.get())
        assert results[-1][2] is None, results[-1][2]
    for child in children:
        child.join(20)
        child.kill()
    return [result for _, result, _ in sorted(results, key=lambda r: r[0])]


@contextlib.contextmanager
def allocated():
    """A list that holds, after the block, the bytes that torch's CPU allocator had given out at most inside it."""
    most = []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled:
        yield most
    changes = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    most.append(int(np.cumsum([e.nbytes() for e in sorted(changes, key=lambda e: e.start_ns())]).max()))
