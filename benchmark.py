"""How fast the scripts are on this machine.

    python benchmark.py               ConvNet, CIFAR-10 ipc 10, smaller batches; 25 min on two cores
    python benchmark.py --quick       ConvNetW32, once: 3 min
    python benchmark.py --batch_real 256 --trained_bs 256 --model_train_steps 10     published sizes
    torchrun --nproc_per_node 2 benchmark.py                  the same, shared by two processes

Medians of --repeats runs: the plain loop (the same code, class by class, not compiled, glibc's
malloc as it is) and the fast one in fp32 (tf32 on a GPU) and, where the device has instructions for
it, in bf16, in turn in one process. Random images: speed does not depend on them. Writes a table
and --out as JSON. Distributed under the MIT licence.
"""
import argparse
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
from runtime.cost import TRAINING_STEP, forward_flops, least_values_moved, training_batches
from runtime.cuda_graphs import use_cuda_graphs
from runtime.device import (choose_micro_batch, device_name, get_device, has_bf16, synchronise,
                            versions)
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
    add("--batch_real", type=at_least(1), default=64, help="real images of a class")
    add("--trained_bs", type=at_least(1), default=64, help="real images in a pool training step")
    add("--model_train_steps", type=at_least(0), default=2, help="for each of 2 networks")
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
        self.precisions = ["tf32", "bf16"] if has_bf16(self.device) else ["tf32"]
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

    def network(self, seed=0):
        return network_for(self.data, self.args.model, seed)

    def begin(self):
        """(images, their optimizer, a pool of two, generators), the same at every call."""
        image_syn, _ = initial_set(self.data, self.flags.ipc, self.flags.pack, "real",
                                   make_generator(0, "init"))
        optimizer_img = rome.image_optimizer(self.flags, image_syn.requires_grad_())
        pool = rome.make_pool(self.flags, 0, self.data, None)
        return image_syn, optimizer_img, pool, rome.make_generators(self.flags, 0, self.device)

    def iterate(self, parts, plain=False):
        """One outer iteration; plain: class by class, every batch at once. parts: of `begin`."""
        image_syn, optimizer_img, pool, rng = parts
        whole = max(self.flags.batch_real, self.flags.trained_bs)
        common = (self.data, self.threat, self.flags, rng, whole if plain else self.micro_batch)
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
    precision, keys = compilation.precision(), compilation.compiled_keys().copy()
    compilation.set_precision("fp32")
    compilation.compiled_keys().clear()
    compilation.keep_freed_memory(32 << 20, 64 << 20)
    try:
        yield
    finally:
        compilation.set_precision(precision)
        compilation.compiled_keys().update(keys)
        compilation.keep_freed_memory()


def compile_all(bench):
    """Compile what is measured, in each precision. Seconds that it took; 0 if it failed."""
    args, micro_batch = bench.args, bench.micro_batch
    images = distributed.max_shard_size(10 * args.batch_real)
    pool_batch = distributed.max_shard_size(args.trained_bs)
    attacked = {bench.attacked, min(pool_batch, micro_batch), images % micro_batch} - {0}
    trained = {args.trained_bs, pool_batch}
    for ipc in args.train_ipc:
        trained |= set(training_batches(40 * ipc, 256, 1)) - {0}
    start = time.perf_counter()
    for precision in bench.precisions:
        compilation.set_precision(precision)
        compilation.compiled_keys().clear()  # nothing is compiled in this precision yet
        problem = compilation.compile_batches(
            bench.network(), (3, 32, 32), attacked=sorted(attacked), trained=sorted(trained),
            matched=[micro_batch], embedded=[micro_batch], last=1000)
        problem = problem or compilation.compile_batches(
            labeller(bench.data), (3, 32, 32), scored=sorted(trained))
        if problem:
            distributed.print_rank0(problem)
            return 0.0
    return time.perf_counter() - start


def labeller(data):
    """A network that gives labels."""
    return network_for(data, "ConvNetW32", 1).eval().requires_grad_(False)


# ----------------------------------------------------- what is measured: (images, seconds, passes)
def pgd_step(bench):
    """One PGD step on a micro-batch of images."""
    images, labels = bench.data.get_batch("train", slice(bench.attacked))
    net, generator = bench.network(), make_generator(0, device=bench.device)

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
    args, plain, fast = bench.args, bench.begin(), bench.begin()
    trained = 2 * args.model_train_steps * args.trained_bs
    passes = 10 * 10 * args.batch_real + (10 + TRAINING_STEP) * trained
    seconds = bench.compare(lambda: bench.iterate(plain, plain=True), lambda: bench.iterate(fast))
    return 10 * args.batch_real + trained, seconds, passes


def evaluation_training(bench, ipc, online=False):
    """100 epochs of training on a 2x2 packed set of `ipc` images a class; online: labelled by a
    ConvNetW32 as the network sees them, mixed."""
    count, epochs = 40 * ipc, bench.args.train_epochs
    images = torch.randn(count, 3, 32, 32, device=bench.device)
    labels = torch.arange(10, device=bench.device).repeat(4 * ipc)

    config, labellers = TrainConfig(epochs), []
    if online:
        config = TrainConfig(epochs, mix="both")
        labellers = [labeller(bench.data)]

    def train():
        train_on_set(bench.network(), images, labels, config, make_generator(0),
                     labellers=labellers)
    seconds = [s * 100 / (epochs + 1) for s in bench.compare(train, train)]
    return 100 * count, seconds, TRAINING_STEP * 100 * count


def measurements(args):
    found = {"PGD step": pgd_step, "pool training step": pool_training_step,
             "outer iteration": outer_iteration}
    for ipc in args.train_ipc:
        found[f"100 epochs of training, ipc {ipc}"] = (
            lambda bench, ipc=ipc: evaluation_training(bench, ipc))
        found[f"the same, ipc {ipc}, labels online"] = (
            lambda bench, ipc=ipc: evaluation_training(bench, ipc, online=True))
    return {"outer iteration": outer_iteration} if distributed.world_size() > 1 else found


def bytes_a_second(bench):
    """What the device's memory reads and writes a second when 256 MiB are copied."""
    source = torch.ones(2**26, device=bench.device)
    target, copies = torch.empty_like(source), 20
    times = [bench.seconds(lambda: [target.copy_(source) for _ in range(copies)])
             for _ in range(3)]
    return 2 * copies * source.nbytes / min(times)


def measure_rows(bench):
    """Measure every row and print it as a line of a Markdown table."""
    net, rows, bandwidth = bench.network(), [], bytes_a_second(bench)
    flops, values = 2 * forward_flops(net, 3, (32, 32)), least_values_moved(net, 3, (32, 32))
    say = distributed.print_rank0
    head = "s | speed-up | images/s | GFLOP/s | of the traffic |"
    say(f"A copy moves {bandwidth / 1e9:.0f} GB/s.\n\n| | plain s |"
        + "".join(f" {precision} {head}" for precision in bench.precisions))
    say("|---|---|" + "---|---|---|---|---|" * len(bench.precisions))
    for name, measure in measurements(bench.args).items():
        images, (plain, *fast), passes = measure(bench)
        row = {"what": name, "images": images, "plain_seconds": plain}
        cells = f"| {name} | {plain:.3g} |"
        for precision, seconds in zip(bench.precisions, fast):
            moved = passes * values * (2 if precision == "bf16" else 4)
            row[precision] = {"seconds": seconds, "speed_up": plain / seconds,
                              "images_a_second": images / seconds,
                              "gflops": passes * flops / seconds / 1e9,
                              "traffic_share": moved / bandwidth / seconds}
            cells += (f" {seconds:.3g} | {plain / seconds:.2f} | {images / seconds:.0f} | "
                      f"{row[precision]['gflops']:.0f} | "
                      f"{100 * row[precision]['traffic_share']:.0f} % |")
        rows.append(row)
        say(cells)
    return rows


def main():
    args = parse_args()
    bench = Bench(args, distributed.init(vars(args)))
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    compile_seconds = compile_all(bench) if args.compile else 0.0
    names = ("ipc", "batch_real", "trained_bs", "model_train_steps")
    sizes = ", ".join(f"{name} {getattr(args, name)}" for name in names)
    distributed.print_rank0(
        f"{device_name(bench.device)}, {distributed.world_size()} process(es), torch "
        f"{torch.__version__}, {args.model}, {sizes}, {args.threat_model}; compiled in "
        f"{compile_seconds:.0f} s; medians of {args.repeats}\n")
    rows = measure_rows(bench)
    if distributed.is_main_process():
        write_json(Path(args.out), {
            "command": " ".join(sys.argv), "flags": vars(args), "versions": versions(),
            "device": device_name(bench.device), "compile_seconds": compile_seconds, "rows": rows})


if __name__ == "__main__":
    run_script(main)
