"""How fast the scripts are on this machine, and how near to what it can do.

    python benchmark.py               ConvNet, CIFAR-10 ipc 10, smaller batches; 25 min on two cores
    python benchmark.py --quick       ConvNetW32, once: 3 min
    python benchmark.py --batch_real 256 --trained_bs 256 --model_train_steps 10     published sizes
    torchrun --nproc_per_node 2 benchmark.py                     two processes against one of them

Measures medians of --repeats runs: the plain loop (the same code, class by class, not compiled,
glibc's malloc as it is) and the fast one in fp32 (tf32 on a GPU) and, where the device has
instructions for it, in bf16, in turn in one process. Random images: speed does not depend on them.
Writes a table and --out as JSON. Distributed under the MIT licence.
"""
import argparse
import resource
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

import rome
from attacks import attack, get_threat_model
from datasets import DATASETS, Dataset
from networks import NETWORKS, network_for
from runtime import compilation, distributed
from runtime.command_line import add_switch, at_least, run_script
from runtime.cost import TRAINING_STEP, IterationCost, forward_flops, training_batches
from runtime.cuda_graphs import use_cuda_graphs
from runtime.device import (choose_micro_batch, device_name, get_device, has_bf16,
                            keep_freed_memory, synchronise, versions)
from runtime.safe_io import write_json
from runtime.seeding import make_generator
from synsets import TrainConfig, initial_set
from utils import train_on_set

# The published flags of CIFAR-10 at 10 images a class that rome.py reads, but for the sizes.
METHOD = dict(
    seed=0, pack=2, lr_img=0.2, optim="sgd", momentum_img=0.5, align_weight=0.2, ce_weight=0.1,
    align_distance="tv", syn_ce=True, ce_only_while_wrong=True, real_kept=2560, embed_last=1000,
    dsa_strategy="color_crop_cutout_flip_scale_rotate", attack_prior=True, attack_pool=True,
    attack_eps=8.0, attack_step_size=None, attack_steps=10, lr_net=0.01, net_decay=True,
    net_num=100, net_start=2, net_slice_min=10)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--model", choices=NETWORKS, default="ConvNet", metavar="MODEL")
    add("--ipc", type=at_least(1), default=10, help="images per class")
    add("--batch_real", type=at_least(1), default=64, help="real images of a class (published: "
        "256)")
    add("--trained_bs", type=at_least(1), default=64, help="real images in a step of pool training "
        "(published: 256)")
    add("--model_train_steps", type=at_least(0), default=2, help="for each of 2 networks "
        "(published: 10)")
    add("--threat_model", choices=("published", "pixel"), default="published")
    add("--train_ipc", type=at_least(1), nargs="*", default=[1, 10, 50],
        help="sets on which evaluation training is measured")
    add("--train_epochs", type=at_least(1), default=2, help="epochs measured; 100 are reported")
    add("--repeats", type=at_least(1), default=5, help="runs of which the median is taken")
    add("--quick", action="store_true", help="ConvNetW32, batches of 32, ipc 10, one repeat")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--out", default="./result/benchmark.json", metavar="FILE")
    add_switch(parser, "compile", True, "torch.compile for the fast loop")
    args = parser.parse_args(argv)
    if args.quick:
        args.model, args.repeats, args.train_ipc = "ConvNetW32", 1, [10]
        args.batch_real = args.trained_bs = 32
    return args


class Bench:
    """What both loops work on: random images, and the flags of the method."""

    def __init__(self, args, device):
        self.args, self.device = args, get_device(device)
        self.micro_batch = choose_micro_batch(self.device)
        one_process = distributed.world_size() == 1
        self.precisions = ["tf32", *(["bf16"] if has_bf16(self.device) and one_process else [])]
        rng = np.random.default_rng(0)
        labels = torch.arange(10).repeat(max(args.batch_real, 4 * args.ipc))
        images = {split: torch.from_numpy(rng.integers(0, 256, (len(labels), 3, 32, 32), np.uint8))
                  for split in ("train", "test")}
        self.data = Dataset("random", images, {"train": labels, "test": labels}, "0123456789",
                            device=self.device, **DATASETS["CIFAR10"])
        self.threat = get_threat_model(args.threat_model, self.data)
        sizes = ("model", "ipc", "batch_real", "trained_bs", "model_train_steps")
        self.flags = SimpleNamespace(**METHOD, **{name: getattr(args, name) for name in sizes})
        self.attacked = min(self.micro_batch, len(labels))  # images of a PGD step
        self.flops = 2 * forward_flops(self.network(0), 3, (32, 32))  # forward-backward
        trained = 2 * args.model_train_steps * args.trained_bs
        self.images = 10 * args.batch_real + trained  # of an outer iteration
        self.passes = (IterationCost(10 * args.batch_real, 10, 1, trained, 10).passes
                       + (TRAINING_STEP - 1) * trained)

    def network(self, seed):
        return network_for(self.data, self.args.model, seed)

    def begin(self):
        """(images, their optimizer, a pool of two, generators), the same at every call."""
        flags = self.flags
        image_syn, _ = initial_set(self.data, flags.ipc, flags.pack, "real",
                                   make_generator(0, "init"))
        pool, rng = rome.make_pool(flags, 0, self.data, None), rome.make_generators(
            flags, 0, self.device)
        image_syn.requires_grad_()
        return image_syn, rome.image_optimizer(flags, image_syn), pool, rng

    def iterate(self, parts, plain=False):
        """One outer iteration; plain: class by class. parts: of `begin`."""
        image_syn, optimizer_img, pool, rng = parts
        micro_batch = max(self.flags.batch_real, self.flags.trained_bs) if plain else (
            self.micro_batch)
        common = self.data, self.threat, self.flags, rng, micro_batch
        with use_cuda_graphs(not plain and self.device.type == "cuda"):
            rome.matching_step(image_syn, optimizer_img, pool.members[0], *common,
                               classes_at_once=1 if plain else None)
            rome.pool_step(pool.sample(2, rng["pool"]), *common)

    def seconds(self, call):
        """Wall time of call(), with the device waited for."""
        synchronise(self.device)
        start = time.perf_counter()
        call()
        synchronise(self.device)
        return time.perf_counter() - start

    def compare(self, plain, fast):
        """Median seconds, measured in turn after a warm-up: [plain, fast, fast in bf16]."""
        times = []
        for _ in range(1 + self.args.repeats):
            with plain_mode():
                row = [self.seconds(plain)]
            for precision in self.precisions:
                compilation.set_precision(precision)
                row.append(self.seconds(fast))
            times.append(row)
        return np.median(times[1:], axis=0).tolist()


@contextmanager
def plain_mode():
    """Inside: nothing compiled, float32, and glibc's malloc as in a process that has run for a
    while: it returns blocks of more than 32 MiB to the system (mallopt(3))."""
    precision = compilation.precision()
    compilation.set_precision("fp32")
    keep_freed_memory(32 << 20, 64 << 20)
    try:
        with compilation.eager():
            yield
    finally:
        compilation.set_precision(precision)
        keep_freed_memory()


# ------------------------------------------------- the rows: (images, median seconds, passes)
def pgd_step(bench):
    """One PGD step on a micro-batch of images."""
    images, labels = bench.data.get_batch("train", slice(bench.attacked))
    net, generator = bench.network(0), torch.Generator(bench.device).manual_seed(0)

    def ten_steps():
        attack(net, images, labels, bench.threat, generator=generator, steps=10,
               micro_batch=len(images))
    return len(images), [s / 10 for s in bench.compare(ten_steps, ten_steps)], len(images)


def pool_training_step(bench):
    """One training step of a pool network, without the attack."""
    member = bench.begin()[2].members[0]
    images, labels = bench.data.get_batch("train", slice(bench.args.trained_bs))

    def step():
        member.optimizer.zero_grad()
        F.cross_entropy(compilation.forward(member.net, images), labels).backward()
        member.optimizer.step()
    return len(images), bench.compare(step, step), TRAINING_STEP * len(images)


def outer_iteration(bench):
    """A matching step, and the training of two pool networks."""
    plain, fast = bench.begin(), bench.begin()
    seconds = bench.compare(lambda: bench.iterate(plain, plain=True), lambda: bench.iterate(fast))
    return bench.images, seconds, bench.passes


def evaluation_training(bench, ipc):
    """100 epochs of training on a 2x2 packed set of `ipc` images a class."""
    count, epochs = 40 * ipc, bench.args.train_epochs
    images = torch.randn(count, 3, 32, 32, device=bench.device)
    labels = torch.arange(10, device=bench.device).repeat(4 * ipc)

    def train():
        train_on_set(bench.network(0), images, labels, TrainConfig(epochs), make_generator(0))
    share = 100 / (epochs + 1)  # `epochs` + 1 are run
    seconds = [s * share for s in bench.compare(train, train)]
    return 100 * count, seconds, TRAINING_STEP * 100 * count


def one_process_against_all(bench):
    """Median seconds of an outer iteration: of the first process alone, and of all together."""
    alone, together, times = bench.begin(), bench.begin(), []
    for _ in range(1 + bench.args.repeats):
        seconds = 0.0
        if distributed.is_main_process():
            with distributed.single_process():
                seconds = bench.seconds(lambda: bench.iterate(alone))
        seconds = distributed.all_gather_object(seconds)[0]
        shared = max(distributed.all_gather_object(
            bench.seconds(lambda: bench.iterate(together))))
        times.append((seconds, shared))
    return np.median(times[1:], axis=0).tolist()


# ------------------------------------------------------------------------------- around them
def convolution_rate(device, dtype, count=64, repeats=3):
    """FLOP/s of the ConvNet's second convolution, forward and backward to its input, in the
    faster of two memory formats: what the library reaches by itself."""
    medians = []
    for layout in (torch.contiguous_format, torch.channels_last):
        weight = torch.full((128, 128, 3, 3), 0.01, device=device).to(dtype, memory_format=layout)
        x = torch.ones(count, 128, 16, 16, device=device).to(dtype, memory_format=layout)
        x.requires_grad_()
        gradient, times = torch.ones_like(x), []
        for _ in range(repeats + 1):
            synchronise(device)
            start = time.perf_counter()
            torch.autograd.grad(F.conv2d(x, weight, padding=1), x, gradient)
            synchronise(device)
            times.append(time.perf_counter() - start)
        medians.append(sorted(times[1:])[repeats // 2])
    return count * 2 * 2 * 9 * 128 * 128 * 16 * 16 / min(medians)


def compile_all(bench):
    """Compile what the rows use, in each precision. Seconds that it took; 0 if it failed."""
    args, micro_batch = bench.args, bench.micro_batch
    images = distributed.max_shard_size(10 * args.batch_real)
    pool_batch = distributed.max_shard_size(args.trained_bs)
    attacked = {bench.attacked, min(pool_batch, micro_batch), images % micro_batch} - {0}
    trained = {args.trained_bs, pool_batch}
    if distributed.world_size() == 1:
        trained |= {size for ipc in args.train_ipc
                    for size in training_batches(40 * ipc, 256, 1) if size}
    start = time.perf_counter()
    for precision in bench.precisions:
        compilation.set_precision(precision)
        problem = compilation.compile_batches(
            bench.network(0), (3, 32, 32), attacked=sorted(attacked), trained=sorted(trained),
            matched=[micro_batch], embedded=[micro_batch], last=1000)
        if problem:
            distributed.print_rank0(problem)
            return 0.0
    seconds = time.perf_counter() - start
    distributed.print_rank0(f"compiled in {seconds:.0f} s for {' and '.join(bench.precisions)}")
    return seconds


def peak_memory(device):
    """GiB: of the device, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def describe(bench):
    args = bench.args
    names = ("ipc", "batch_real", "trained_bs", "model_train_steps")
    sizes = ", ".join(f"{name} {getattr(args, name)}" for name in names)
    return (f"{device_name(bench.device)}, torch {torch.__version__}, {args.model}, {sizes}, "
            f"{args.threat_model}; medians of {args.repeats}")


def measure_rows(bench, peaks):
    """Measure and print every row. peaks: GFLOP/s of a convolution in each precision."""
    args, rows = bench.args, []
    measurements = {f"PGD step, {bench.attacked} images": pgd_step,
                    f"pool training step, {args.trained_bs} images": pool_training_step,
                    "outer iteration": outer_iteration}
    for ipc in args.train_ipc:
        measurements[f"100 epochs of training, ipc {ipc}"] = (
            lambda bench, ipc=ipc: evaluation_training(bench, ipc))
    print("| | plain s |" + "".join(f" {p} s | speed-up | of the convolution |"
                                    for p in bench.precisions))
    print("|---|---|" + "---|---|---|" * len(bench.precisions))
    for name, measure in measurements.items():
        images, (plain, *fast), passes = measure(bench)
        row = {"what": name, "images": images, "plain_seconds": plain}
        cells = f"| {name} | {plain:.3g} |"
        for precision, seconds, peak in zip(bench.precisions, fast, peaks):
            rate = passes * bench.flops / seconds / 1e9
            row[precision] = {
                "seconds": seconds, "speed_up": plain / seconds, "gflops": rate,
                "images_per_second": images / seconds, "share_of_convolution": rate / peak}
            cells += f" {seconds:.3g} | {plain / seconds:.2f} | {100 * rate / peak:.0f} % |"
        rows.append(row)
        print(cells, flush=True)
    return rows


def main():
    args = parse_args()
    bench = Bench(args, distributed.init(vars(args)))
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    compile_seconds = compile_all(bench) if args.compile else 0.0
    if distributed.world_size() > 1:
        alone, together = one_process_against_all(bench)
        distributed.print_rank0(
            f"outer iteration, {describe(bench)}: one process {alone:.3g} s, "
            f"{distributed.world_size()} processes {together:.3g} s: {alone / together:.2f} times "
            "as fast")
        return
    count = 2048 if bench.device.type == "cuda" else bench.micro_batch
    dtypes = {"tf32": torch.float32, "bf16": torch.bfloat16}
    ceilings = {p: convolution_rate(bench.device, dtypes[p], count, max(args.repeats, 5)) / 1e9
                for p in bench.precisions}
    print(describe(bench) + "\n")
    for precision, rate in ceilings.items():
        print(f"convolution, {precision}: {rate:.0f} GFLOP/s")
    rows, memory = measure_rows(bench, ceilings.values()), peak_memory(bench.device)
    print(f"\npeak memory {memory:.1f} GiB")
    write_json(Path(args.out), {
        "command": " ".join(sys.argv), "flags": vars(args), "device": device_name(bench.device),
        "versions": versions(), "ceilings_gflops": ceilings, "compile_seconds": compile_seconds,
        "rows": rows, "peak_memory_gib": memory})


if __name__ == "__main__":
    run_script(main)
