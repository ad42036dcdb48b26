"""Several processes, started by torchrun, share the work of one run.

Each process draws all the random numbers that one process alone would draw, in the same order,
and computes its shard: the number of processes changes a result only by the rounding of sums.
"""
import itertools
import json
import os
import sys
import time
from contextlib import contextmanager
from datetime import timedelta
from types import SimpleNamespace

import torch
from tqdm import tqdm

from runtime.device import count_gpus
from runtime.safe_io import InputError

TIMEOUT = timedelta(minutes=30)  # torchrun ends the others much sooner when a process dies

dist = None  # torch.distributed, once `init` has met other processes
_world = None  # rank, size, store
_single = False
_maps = itertools.count()  # the same on all processes


def launched_by_torchrun():
    """Whether torchrun has started several processes, of which this is one."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ["WORLD_SIZE"]) > 1


def is_restart():
    """Whether torchrun has started this process again after one had failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def init(flags):
    """Meet the other processes, if there are any. flags: {name: value}, of which "device" is one.

    Returns the device of this process. Raises InputError if flags or kinds of device differ, or if
    there is no GPU for this process.
    """
    global dist, _world
    if not launched_by_torchrun() or _world:
        return flags["device"]
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous
    number, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device, backend = _own_device(flags["device"]), "gloo"
    if device != "cpu":
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    with _one_line_errors():
        store, *_ = next(rendezvous("env://", number, size, timeout=TIMEOUT))
        # The processes that torchrun restarts may meet the contents of this store.
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group(backend, store=store, rank=number, world_size=size,
                                timeout=TIMEOUT)
        everyone = [None] * size
        dist.all_gather_object(everyone, {**flags, "device": device.split(":")[0]})
    for name in flags:
        if any(other[name] != everyone[0][name] for other in everyone):
            raise InputError(f"--{name} differs between the processes")
    _world = SimpleNamespace(rank=number, size=size, store=store)
    return device


def _own_device(name):
    local, gpus = int(os.environ["LOCAL_RANK"]), count_gpus()
    if name == "cpu" or name == "auto" and not gpus:
        return "cpu"
    if name not in ("auto", "cuda") or local >= gpus:
        raise InputError(f"--device {name}: each process takes its own GPU, and there are {gpus}; "
                         "choose auto, cuda or cpu")
    return f"cuda:{local}"


def shutdown():
    """At the end of a successful run of several processes: wait for the others, and exit."""
    if _world:
        barrier()  # process 0 may hold the store that others still read
        dist.destroy_process_group()
        leave(0)


def leave(status):
    """Exit. Threads of torch.distributed may abort, or hold up, an interpreter that ends."""
    if not launched_by_torchrun():
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


@contextmanager
def _one_line_errors():
    """Turn an error of torch.distributed into one line: the other side is gone."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise ConnectionError(f"another process is gone or does not answer ({reason}); the same "
                              "command goes on from the last saved state") from None


def world_size():
    """The number of processes that share the work."""
    return 1 if _single or not _world else _world.size


def rank():
    """The number of this process, from 0."""
    return 0 if _single or not _world else _world.rank


def is_main_process():
    """Whether this process writes files and messages."""
    return rank() == 0


def disable_tqdm():
    """`disable` of a progress bar that process 0 shows on a terminal."""
    return None if is_main_process() else True


def write_line(text, file=None):
    """Write a line above the progress bar, in one write: lines of processes do not mix."""
    file = file or sys.stdout
    with tqdm.external_write_mode(file):
        file.write(f"{text}\n")
        file.flush()


def print_rank0(text):
    """Print a line on process 0."""
    if is_main_process():
        write_line(text)


@contextmanager
def single_process():
    """Inside, this process works alone."""
    global _single
    before, _single = _single, True
    try:
        yield
    finally:
        _single = before


def shard(count):
    """The slice of `count` items that this process takes."""
    return slice(count * rank() // world_size(), count * (rank() + 1) // world_size())


def max_shard_size(count):
    """How many of `count` items a process takes at most."""
    return -(-count // world_size())


def require_work(count, what):
    """Raise InputError if there are fewer items than processes. what: their name and flag."""
    if count < world_size():
        raise InputError(f"{world_size()} processes share {count} {what}; start at most {count}")


def all_reduce_sum(tensors):
    """Sum each tensor over the processes, in place. They have one dtype and one device."""
    if world_size() == 1:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    with _one_line_errors():
        dist.all_reduce(flat)
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
        tensor.copy_(part.view_as(tensor))


def class_means(embeddings, sizes):
    """Mean embedding of each class of a class-major batch, of which each process has its shard.

    embeddings: (n, D), of the shard. sizes: images of each class in the batch. -> (len(sizes), D).
    """
    if world_size() == 1:
        return torch.stack([embedding.mean(0) for embedding in embeddings.split(sizes)])
    own, ends = shard(sum(sizes)), itertools.accumulate(sizes)
    counts = [max(0, min(own.stop, end) - max(own.start, end - n)) for n, end in zip(sizes, ends)]
    sums = torch.stack([embedding.sum(0) for embedding in embeddings.split(counts)])
    all_reduce_sum([sums])
    return sums / torch.tensor(sizes, dtype=sums.dtype, device=sums.device).view(-1, 1)


def broadcast_(tensor):
    """Give `tensor` the values of process 0, in place: machines of two kinds must not drift."""
    if world_size() > 1:
        with _one_line_errors():
            dist.broadcast(tensor, src=0)


def all_reduce_max(*values):
    """The largest of each of these ints over all processes, as a tuple."""
    if world_size() == 1:
        return values
    largest = torch.tensor(values)
    with _one_line_errors():
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return tuple(largest.tolist())


def barrier():
    """Wait for all processes."""
    all_reduce_max(0)  # NCCL's own barrier would need a GPU


def run_on_rank0(work):
    """Call work() on process 0 only. All processes return its value or raise its InputError."""
    if world_size() == 1:
        return work()
    try:
        outcome = [work() if is_main_process() else None]
    except InputError as error:
        outcome = [error]
    with _one_line_errors():
        dist.broadcast_object_list(outcome, src=0, device=torch.device("cpu"))
    if isinstance(outcome[0], InputError):
        raise outcome[0]
    return outcome[0]


def map_dynamic(count, work, collect=lambda k, result: None):
    """[work(0), ..., work(count - 1)] on all processes; a process that is free takes the next k.

    work: int -> what JSON can hold. collect: called with (k, result), in order, on every process,
    as soon as the results are there. Waiting is done in Python, so that a signal can end it.
    """
    results = []

    def take(result):
        results.append(result)
        collect(len(results) - 1, result)

    if world_size() == 1:
        for k in range(count):
            take(work(k))
        return results
    name = f"map{next(_maps)}"

    def take_ready():
        while len(results) < count and _store("check", [f"{name}/{len(results)}"]):
            take(json.loads(_store("get", f"{name}/{len(results)}")))

    while (k := _store("add", f"{name}/next", 1) - 1) < count:
        _store("set", f"{name}/{k}", json.dumps(work(k)))
        take_ready()
    while len(results) < count:
        time.sleep(0.02)
        take_ready()
    return results


def _store(operation, *arguments):
    with _one_line_errors():
        return getattr(_world.store, operation)(*arguments)
