"""More than one process, started by torchrun: what each one computes, and how it comes together.

Every process draws all that one process alone would draw, from the same streams in the same order, and computes its share of
it. So a result does not depend on the number of processes, beyond the rounding of sums. Where torchrun has not started the
script, or has started one process, nothing of torch.distributed is imported and each function here does what one process does.
The settings are of the process, as those of torch.backends are.
"""
import itertools
import json
import os
import re
import sys
import threading
import time
import uuid
from contextlib import contextmanager
from datetime import timedelta

import torch
from tqdm import tqdm

from runtime.safe_io import InputError

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # that torchrun sets
START, SUM = timedelta(minutes=5), timedelta(seconds=45)  # that processes wait for each other: at the start, in a sum
PULSE, PATIENCE = 1.0, 20.0  # seconds between two signs of life; without one, after which a process counts as gone

_world, _alone = None, False


class _World:
    """What this process knows of the others. store: of torchrun, the same for all. pulse: see `_Pulse`."""

    def __init__(self, rank, size, store):
        self.rank, self.size, self.store = rank, size, store
        # The same on all processes; apart, as one that is told to stop before a deal comes to the next meeting without it.
        self.meetings, self.deals = itertools.count(), itertools.count()
        self.pulse = _Pulse(rank, store)


class _Pulse(threading.Thread):
    """Once a second a sign of life; and a signal that another process had comes to this one too."""

    def __init__(self, rank, store):
        super().__init__(daemon=True)
        self.rank, self.store, self.ended, self.passed_on = rank, store, threading.Event(), False

    def run(self):
        try:
            for beat in itertools.count():
                self.store.set(f"pulse/{self.rank}", str(beat))
                if not self.passed_on and self.store.check(["stop"]):
                    self.passed_on = True
                    os.kill(os.getpid(), int(self.store.get("stop")))
                if self.ended.wait(PULSE):
                    return
        except RuntimeError:
            pass  # the store is gone, and the run with it; the main thread finds out by itself


# --------------------------------------------------------------------------------------------------------- start and end
def launched_by_torchrun():
    """Whether torchrun has started several processes, of which this is one."""
    return all(name in os.environ for name in VARIABLES) and int(os.environ["WORLD_SIZE"]) > 1


def is_restart():
    """Whether torchrun has started this process again, after one of its run had died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def init(args):
    """Meet the other processes, if torchrun has started any. args: the flags of the script.

    Returns the device of this process, for `get_device`: args.device, or where that is a GPU the process's own. Raises
    InputError, on all processes, if they have different flags or kinds of devices, or one has no GPU of its own.
    """
    global _world
    if not launched_by_torchrun() or _world:
        return args.device
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device, problem = _own_device(args.device, rank)
    with _talking():
        store = _own_part(next(rendezvous("env://", rank, size, timeout=START))[0], rank, size)
        flags = {name: str(value) for name, value in vars(args).items()}
        store.set(f"hello/{rank}", json.dumps({"problem": problem, "device": device.split(":")[0], "flags": flags}))
        said = [json.loads(store.get(f"hello/{r}")) for r in range(size)]
    for r, other in enumerate(said):
        if other["problem"]:
            raise InputError(other["problem"])
        for name, value in said[0]["flags"].items():
            if other["flags"].get(name) != value:
                raise InputError(f"--{name} is {value} in process 0 and {other['flags'].get(name)} in process {r}; all "
                                 "processes of a run have the same flags")
        if other["device"] != said[0]["device"]:
            raise InputError(f"process 0 computes on {said[0]['device']} and process {r} on {other['device']}; name one with "
                             "--device")
    backend = "gloo"
    if device != "cpu":
        backend = "cpu:gloo,cuda:nccl"
        os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # an error that can be caught, where a process is gone
        torch.cuda.set_device(device)
    with _talking():
        dist.init_process_group(backend, store=dist.PrefixStore("sums", store), rank=rank, world_size=size, timeout=SUM)
    _world = _World(rank, size, store)
    _world.pulse.start()
    barrier()
    return device


def _own_part(store, rank, size):
    """The part of the store that is of this start: torchrun keeps it, with all that is in it, when it restarts the processes.

    Process 0 names it, and answers the word of each other one, who else could take the name of an earlier start for it.
    """
    from torch.distributed import PrefixStore
    word, deadline = uuid.uuid4().hex, time.monotonic() + START.total_seconds()
    if rank == 0:
        store.set("part", word)
        for r in range(1, size):
            store.set(f"{word}/answer/{r}", store.get(f"{word}/word/{r}"))
        return PrefixStore(word, store)
    while time.monotonic() < deadline:
        name = store.get("part").decode()
        store.set(f"{name}/word/{rank}", word)
        for _ in range(20):
            if store.check([f"{name}/answer/{rank}"]) and store.get(f"{name}/answer/{rank}").decode() == word:
                return PrefixStore(name, store)
            time.sleep(0.05)
    raise RuntimeError(f"no answer from process 0 in {START.total_seconds():.0f} s")


def _own_device(name, rank):
    """The device of this process where --device is `name`, and what is wrong with it, or None."""
    local, here, gpus = (int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count())
    if name == "cpu" or name == "auto" and not gpus:
        return "cpu", None
    if name not in ("auto", "cuda"):
        return name, f"--device {name}: each process takes a GPU of its own; choose auto, cuda or cpu"
    if local >= gpus:
        return "cuda", (f"process {rank} has no GPU: {here} processes on its machine, {gpus} GPU(s); choose "
                        f"{'--device cpu' if not gpus else f'--nproc_per_node {gpus}, or --device cpu'}")
    return f"cuda:{local}", None


def shutdown(whole):
    """Leave. whole: whether the run came to its end; if not, the others may be gone, and nothing is waited for."""
    global _world
    if _world:
        _world.pulse.ended.set()
        _world.pulse.join()
        if whole:
            import torch.distributed as dist
            dist.destroy_process_group()
        _world = None


@contextmanager
def _talking():
    """What goes wrong inside becomes one line: it is the other side that is gone."""
    try:
        yield
    except RuntimeError as error:
        reason = re.sub(r"^\[.*?\] ", "", str(error).strip()).split(". ")[0].splitlines()[0][:120]
        raise ConnectionError(f"another process of the run is gone or does not answer ({reason}); the same command goes on "
                              "from the last saved state") from None


# ------------------------------------------------------------------------------------------------------------ who does what
def world_size():
    """The number of processes that share the work; 1 inside `alone`."""
    return 1 if _alone or not _world else _world.size


def rank():
    """The number of this process, from 0."""
    return 0 if _alone or not _world else _world.rank


def is_main_process():
    """Whether this is the process that writes."""
    return rank() == 0


def disable_tqdm():
    """The `disable` of a progress bar: it is shown on a terminal, and by the first process."""
    return None if is_main_process() else True


def print_rank0(text):
    """A line for the reader, above a progress bar if there is one; from the first process."""
    if is_main_process():
        tqdm.write(text)
        sys.stdout.flush()


@contextmanager
def single_process():
    """Inside, this process works as if there were no other."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def shard(count):
    """Which of `count` things in a row are those of this process: a slice; of all, for one process."""
    return slice(count * rank() // world_size(), count * (rank() + 1) // world_size())


def max_shard_size(count):
    """How many of `count` things a process has at most."""
    return -(-count // world_size())


def require_work(count, what):
    """Raise InputError if there is not one of `count` things for each process. what: their name, with the flag."""
    if count < world_size():
        raise InputError(f"{world_size()} processes share {count} {what}; start at most {count}")


# ------------------------------------------------------------------------------------------------------- how it comes together
def all_reduce_sum(tensors):
    """Sum each tensor over the processes, in place: one flat all-reduce for all of them. They have one dtype and device."""
    if world_size() == 1:
        return
    import torch.distributed as dist
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    with _talking():
        dist.all_reduce(flat)
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
        tensor.copy_(part.view_as(tensor))


def class_means(embeddings, sizes):
    """Mean embeddings, class by class, of a class-major batch of which each process has its share.

    embeddings: (n, D), of this process's share of the batch. sizes: images of each class in the whole. (len(sizes), D).
    """
    if world_size() == 1:
        return torch.stack([embedding.mean(0) for embedding in embeddings.split(sizes)])
    own, ends = shard(sum(sizes)), list(itertools.accumulate(sizes))
    parts = [max(0, min(own.stop, end) - max(own.start, end - n)) for n, end in zip(sizes, ends)]
    sums = torch.stack([embedding.sum(0) for embedding in embeddings.split(parts)])  # 0 where this process has none
    all_reduce_sum([sums])
    return sums / torch.tensor(sizes, dtype=sums.dtype, device=sums.device).view(-1, 1)


def broadcast_(tensor):
    """Give `tensor` the values that it has on process 0, in place: machines of two kinds must not drift apart."""
    if world_size() > 1:
        import torch.distributed as dist
        with _talking():
            dist.broadcast(tensor, src=0)


def all_reduce_max(*values):
    """The largest of each of these ints over all processes."""
    if world_size() == 1:
        return values
    import torch.distributed as dist
    largest = torch.tensor(values)
    with _talking():
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return tuple(largest.tolist())


def run_on_rank0(work):
    """What work() returns on process 0, which alone does it, on all processes; an InputError is raised on all as well."""
    if world_size() == 1:
        return work()
    import torch.distributed as dist
    said = [None]
    if is_main_process():
        try:
            said = [(work(), None)]
        except InputError as error:
            said = [(None, str(error))]
    barrier()  # it may take longer than a broadcast waits
    with _talking():
        dist.broadcast_object_list(said, src=0, device=torch.device("cpu"))
    value, problem = said[0]
    if problem:
        raise InputError(problem)
    return value


def barrier():
    """Wait for all processes, however long they work."""
    all_gather_object(None)


def all_gather_object(value=None):
    """Wait for all processes, however long they work. Returns what each one came with, by rank. value: as JSON has it."""
    if world_size() == 1:
        return [value]
    name = f"meeting{next(_world.meetings)}"
    with _talking():
        _world.store.set(f"{name}/{rank()}", json.dumps(value))
    return [json.loads(_wait_for(f"{name}/{r}")) for r in range(world_size())]


def map_dynamic(count, work, collect=lambda k, result: None):
    """The results of work(0), ..., work(count - 1), in this order, on all processes; each takes the next one when it is free.

    work: int -> what JSON has. collect: called with (k, result) in order on every process, some of them before all are there.
    """
    results = []

    def take(result):
        results.append(result)
        collect(len(results) - 1, result)

    if world_size() == 1:
        for k in range(count):
            take(work(k))
        return results
    name, store = f"deal{next(_world.deals)}", _world.store
    while (k := _next(f"{name}/next")) < count:
        result = json.dumps(work(k))
        with _talking():
            store.set(f"{name}/{k}", result)
        while len(results) < count and _is_there(f"{name}/{len(results)}"):
            take(json.loads(_wait_for(f"{name}/{len(results)}")))
    while len(results) < count:
        take(json.loads(_wait_for(f"{name}/{len(results)}")))
    return results


def _next(key):
    with _talking():
        return _world.store.add(key, 1) - 1


def _is_there(key):
    with _talking():
        return _world.store.check([key])


def pass_on(signum):
    """Let the other processes have a signal that this one had."""
    if _world:
        _world.pulse.passed_on = True
        with _talking():
            _world.store.set("stop", str(int(signum)))


@_talking()
def _wait_for(key):
    """The value of a key of the store, once it is there; a process that shows no sign of life ends the waiting."""
    store, pause, looked = _world.store, 0.001, time.monotonic()
    beats, seen = {}, dict.fromkeys(range(_world.size), looked)
    while not store.check([key]):
        time.sleep(pause)
        pause, now = min(2 * pause, 0.05), time.monotonic()
        if now - looked < PULSE:
            continue
        looked = now
        for r in set(seen) - {_world.rank}:
            beat = store.get(f"pulse/{r}") if store.check([f"pulse/{r}"]) else None
            if beat != beats.get(r):
                beats[r], seen[r] = beat, now
            elif now - seen[r] > PATIENCE:
                raise RuntimeError(f"no sign of life from process {r} for {PATIENCE:.0f} s")
    return store.get(key)
