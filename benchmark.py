"""How fast the scripts are on this machine, and how near to what it can do.

    python benchmark.py                         full ConvNet, CIFAR-10 ipc 10 flags, smaller batches; 25 min on two cores
    python benchmark.py --quick                 ConvNetW32, once: 3 min
    python benchmark.py --batch_real 256 --trained_bs 256 --model_train_steps 10     at the published sizes
    torchrun --nproc_per_node 2 benchmark.py                                         two processes against one of them

Measures, as medians of --repeats runs, the plain loop (class by class, eager, glibc's malloc as it is) and the fast one in fp32
(tf32 on a GPU) and, where there are instructions for it, in bf16, in turn in the same process. Random images: speed does not
depend on them. Writes one table and --out as JSON.
Distributed under the MIT licence.
"""
import argparse
import resource
import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import utils
from attacks import attack, get_threat_model
from augment import dsa_apply, dsa_draw, unpack
from runtime import compilation, distributed
from runtime.command_line import add_switch, at_least, run_script
from datasets import DATASETS, Dataset
from runtime.device import device_name, get_device, has_bf16, synchronise, versions
from runtime.cuda_graphs import use_cuda_graphs
from runtime.cost import TRAINING_STEP, convolution_rate, forward_flops, set_batches
from runtime.safe_io import write_json
from runtime.seeding import make_generator
from networks import NETWORKS, network_for

SCRIPT = Path(__file__).with_name("ROME_cifar10.py")
rome = SimpleNamespace(**runpy.run_path(str(SCRIPT)))  # the functions that are measured


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--model", choices=NETWORKS, default="ConvNet", metavar="MODEL")
    add("--ipc", type=at_least(1), default=10, help="images per class")
    add("--batch_real", type=at_least(1), default=64, help="real images of each class per update (published: 256)")
    add("--trained_bs", type=at_least(1), default=64, help="real images in a step of pool training (published: 256)")
    add("--model_train_steps", type=at_least(0), default=2, help="steps for each of 2 networks (published: 10)")
    add("--threat_model", choices=("published", "pixel"), default="published")
    add("--train_ipc", type=at_least(1), nargs="*", default=[1, 10, 50], help="sets on which evaluation training is measured")
    add("--train_epochs", type=at_least(1), default=2, help="epochs that are measured; 100 are reported")
    add("--repeats", type=at_least(1), default=5, help="runs of which the median is taken")
    add("--quick", action="store_true", help="ConvNetW32, batches of 32, ipc 10, a single repeat")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--out", default="./result/benchmark.json", metavar="FILE")
    add_switch(parser, "compile", True, "torch.compile for the fast loop")
    args = parser.parse_args(argv)
    if args.quick:
        args.model, args.batch_real, args.trained_bs, args.train_ipc, args.repeats = "ConvNetW32", 32, 32, [10], 1
    return args


# ---------------------------------------------------------------------------------------------------------- the plain loop
def plain_iteration(image_syn, optimizer_img, member, trained, data, threat, args, rng):
    """Steps 3 and 4 of an outer iteration, as one would first write them: every class by itself, every batch at once, eager.

    The reference of the fast path: with the same random streams it ends at the same images and networks, up to rounding.
    image_syn: (C*ipc, 3, H, W), changed in place. member: the pool network to match on; trained: those to train.
    """
    for c in range(data.num_classes):
        img_real = data.sample_class(c, args.batch_real, rng["data"])
        draw = dsa_draw(args.dsa_strategy, data.size, rng["dsa"])
        label_real = torch.full((len(img_real),), c, device=data.device)
        img_adv = attack(member.net, dsa_apply(img_real, draw), label_real, threat, generator=rng["attack"],
                             micro_batch=len(img_real))
        img_syn = image_syn[c * args.ipc:(c + 1) * args.ipc]
        emb_syn, logits = member.net.embed_and_classify(dsa_apply(unpack(img_syn, args.pack), draw))
        with torch.no_grad():
            emb_adv = member.net.embed_and_classify(img_adv)[0].mean(0)
        loss = (args.align_weight * rome.robustness_aligned_loss(emb_syn, emb_adv) + (1 - args.align_weight) * args.ce_weight
                * member.running_accuracy() * rome.performance_aligned_loss(logits, c, False))
        optimizer_img.zero_grad()
        loss.backward()
        optimizer_img.step()
    for member in trained:
        for _ in range(args.model_train_steps):
            img_real, label_real = data.sample(args.trained_bs, rng["data"])
            img_adv = attack(member.net, img_real, label_real, threat, generator=rng["attack"],
                             micro_batch=len(img_real))
            logits = member.net(img_adv)
            member.optimizer.zero_grad()
            F.cross_entropy(logits, label_real).backward()
            member.optimizer.step()
            member.record((logits.argmax(1) == label_real).sum(), len(label_real))


class Bench:
    """What both loops work on: random images in place of CIFAR-10, a pool, a synthetic set, and the flags of the script."""

    def __init__(self, args):
        self.args, self.device = args, get_device(args.device)
        self.precisions = ["tf32", *(["bf16"] if has_bf16(self.device) and distributed.world_size() == 1 else [])]
        rng = np.random.default_rng(0)
        labels = torch.arange(10).repeat(max(args.batch_real, 4 * args.ipc))
        images = {split: torch.from_numpy(rng.integers(0, 256, (len(labels), 3, 32, 32), dtype=np.uint8))
                  for split in ("train", "test")}
        self.data = Dataset("random", images, {"train": labels, "test": labels}, "0123456789", device=self.device,
                            **DATASETS["CIFAR10"])
        self.pgd_batch = min(self.data.micro_batch, len(labels))
        self.threat = get_threat_model(args.threat_model, self.data)
        # The published flags of CIFAR-10 at 10 images a class, but for the sizes asked for.
        self.flags = rome.parse_args([
            "--aug", "--lr_img", "0.2", "--net_decay", "--embed_last", "1000", "--syn_ce", "--ce_weight", "0.1",
            "--train_net_num", "1", *(word for name in ("model", "ipc", "batch_real", "trained_bs", "model_train_steps")
                                      for word in (f"--{name}", str(getattr(args, name))))])
        self.flags.compile = args.compile
        self.flops = 2 * forward_flops(self.network(0), 3, (32, 32))  # of an image-gradient
        trained = 2 * args.model_train_steps * args.trained_bs
        self.images = 10 * args.batch_real + trained  # of an outer iteration
        self.work = 10 * self.images + TRAINING_STEP * trained  # its image-gradients

    def network(self, seed):
        return network_for(self.data, self.args.model, seed)

    def start(self):
        """(images, their optimiser, a pool of two, random streams), the same at every call."""
        image_syn, _ = rome.initial_set(self.flags, self.data, make_generator(0, "init"), "real", 2)
        pool = utils.new_pool(self.flags, 0, self.data, None)
        del pool.members[2:]
        rng = {name: make_generator(0, name, device=self.device if name == "attack" else "cpu")
               for name in ("data", "dsa", "pool", "attack")}
        return image_syn.requires_grad_(), rome.image_optimizer(self.flags, image_syn), pool, rng

    def iterate(self, parts, record=True):
        """One outer iteration as the script makes it. parts: of `start`. record: CUDA graphs, on a GPU."""
        image_syn, optimizer_img, pool, rng = parts
        with use_cuda_graphs(record and self.device.type == "cuda"):
            rome.matching_step(image_syn, optimizer_img, pool.members[0], self.data, self.threat, self.flags, rng)
            rome.pool_step(pool.sample(2, rng["pool"]), self.data, self.threat, self.flags, rng)

    def seconds(self, call):
        """Wall time of call(), with the device waited for."""
        synchronise(self.device)
        start = time.perf_counter()
        call()
        synchronise(self.device)
        return time.perf_counter() - start

    def compare(self, plain, fast_one):
        """Median seconds of both, measured in turn after a warm-up: [plain, fast, fast in bf16 (if the device has it)]."""
        times = []
        for _ in range(1 + self.args.repeats):
            with plain_mode():
                one = [self.seconds(plain)]
            for precision in self.precisions:
                compilation.set_precision(precision)
                one.append(self.seconds(fast_one))
            times.append(one)
        return np.median(times[1:], axis=0).tolist()


class plain_mode:
    """Inside: no compilation, float32, and glibc's malloc as a process has it that has run for a while: its threshold of what
    is returned to the system has risen to the limit, 32 MiB (mallopt(3))."""

    def __enter__(self):
        self.kept = compilation._ready.copy(), compilation._precision
        compilation._ready.clear()
        compilation.set_precision("fp32")
        compilation.reuse_freed_memory(32 << 20, 64 << 20)

    def __exit__(self, *error):
        compilation._ready.update(self.kept[0])
        compilation.set_precision(self.kept[1])
        compilation.reuse_freed_memory()


# ------------------------------------------------------------------------------------------------------------ measurements
def ceilings(bench):
    """(a) GFLOP/s of a large matrix product and of `convolution_rate`, on as many images as are attacked at a time."""
    size = 4096 if bench.device.type == "cuda" else 2048
    a, b = torch.randn(2, size, size, device=bench.device)
    repeats = max(bench.args.repeats, 5)
    best = {"matrix product": 2 * size**3 / np.median([bench.seconds(lambda: a @ b) for _ in range(repeats + 1)][1:])}
    count = 2048 if bench.device.type == "cuda" else bench.data.micro_batch
    for dtype in (torch.float32, torch.bfloat16)[:len(bench.precisions)]:
        best["convolution" if dtype == torch.float32 else "convolution, bf16"] = convolution_rate(bench.device, dtype, count,
                                                                                                  repeats)
    return {name: rate / 1e9 for name, rate in best.items()}


def pgd_step(bench):
    """(b) One PGD step on a micro_batch of images."""
    images, labels = bench.data.get_batch("train", slice(bench.pgd_batch))
    net, rng = bench.network(0), torch.Generator(bench.device).manual_seed(0)

    def attacked():
        attack(net, images, labels, bench.threat, generator=rng, steps=10, micro_batch=len(images))
    return len(images), [seconds / 10 for seconds in bench.compare(attacked, attacked)], len(images)


def pool_step(bench):
    """(c) One training step of a pool network, without the attack."""
    member = bench.start()[2].members[0]
    images, labels = bench.data.get_batch("train", slice(bench.args.trained_bs))

    def step():
        member.optimizer.zero_grad()
        F.cross_entropy(compilation.forward(member.net, images), labels).backward()
        member.optimizer.step()
    return len(images), bench.compare(step, step), TRAINING_STEP * len(images)


def whole_iteration(bench):
    """(d) One outer iteration: update of the synthetic images, training of two pool networks."""
    flags = bench.flags
    plain_parts, fast_parts = bench.start(), bench.start()

    def plain():
        image_syn, optimizer_img, pool, rng = plain_parts
        plain_iteration(image_syn, optimizer_img, pool.members[0], pool.members, bench.data, bench.threat, flags, rng)

    return bench.images, bench.compare(plain, lambda: bench.iterate(fast_parts)), bench.work


def processes(bench):
    """One outer iteration by the first process alone, while the others sleep, and by all together, in turn.

    Returns median seconds of both, (alone, together)."""
    alone, together, times = bench.start(), bench.start(), []
    for _ in range(1 + bench.args.repeats):
        one = 0.0
        if distributed.is_main_process():
            with distributed.single_process():
                one = bench.seconds(lambda: bench.iterate(alone))
        one = distributed.all_gather_object(one)[0]
        times.append((one, max(distributed.all_gather_object(bench.seconds(lambda: bench.iterate(together))))))
    return np.median(times[1:], axis=0).tolist()


def evaluation_training(bench, ipc):
    """(e) 100 epochs of training on a packed set of `ipc` images a class."""
    count, epochs = 40 * ipc, bench.args.train_epochs
    images, labels = torch.randn(count, 3, 32, 32, device=bench.device), torch.arange(10, device=bench.device).repeat(4 * ipc)

    def train():
        utils.train_on_set(bench.network(0), images, labels, epochs=epochs, lr_net=0.01, batch_train=256,
                           dsa_strategy=bench.flags.dsa_strategy, generator=make_generator(0))
    share = 100 / (epochs + 1)  # `epochs` + 1 are run
    return 100 * count, [seconds * share for seconds in bench.compare(train, train)], TRAINING_STEP * 100 * count


class OperationCounter(TorchDispatchMode):
    """Counts what is computed inside, eagerly: operations that are not mere views, each a kernel on a GPU, and the bytes that
    they read and write."""

    def __init__(self):
        super().__init__()
        self.operations, self.bytes = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view and func._schema.name not in ("aten::detach", "aten::_to_copy", "aten::empty"):
            self.operations += 1
            self.bytes += sum(t.numel() * t.element_size() for t in tree_leaves((args, kwargs, out)) if torch.is_tensor(t))
        return out


def on_a_gpu(bench):
    """What an outer iteration would cost on an H100, from counts: the eager one, all classes in one micro_batch, TF32. Nothing of it
    is measured; the longest of memory traffic, launches and arithmetic is taken. Returns a dict, with `text`."""
    bandwidth, launch, arithmetic = 3.35e12, 8e-6, 495e12  # bytes/s and TF32 FLOP/s of its data sheet; seconds of a launch
    parts, micro_batch = bench.start(), bench.data.micro_batch
    bench.data.micro_batch = 4096
    with plain_mode(), OperationCounter() as counter:
        bench.iterate(parts, record=False)
    bench.data.micro_batch, flops = micro_batch, bench.flops * bench.work
    limits = {"memory": counter.bytes / bandwidth, "launches": counter.operations * launch, "arithmetic": flops / arithmetic}
    slowest = max(limits, key=limits.get)
    return {"operations": counter.operations, "bytes": counter.bytes, "flops": flops, "seconds": limits,
            "text": f"{counter.operations} kernels, {counter.bytes / 2**30:.1f} GiB, {flops / 1e12:.2f} TFLOP; "
                    + ", ".join(f"{name} {1000 * s:.0f} ms" for name, s in limits.items()) + f": {slowest} decides"}


def start_up():
    """(f) Seconds from the command to the moment before the first iteration, apart from compilation; None without the data."""
    if not Path("data/cifar10.npz").exists():
        return None
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        command = [sys.executable, "-u", SCRIPT, "--no_compile", "--no_baseline", "--save_path", f"{folder}/result",
                   "--checkpoint_path", f"{folder}/states"]
        run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        try:
            for line in run.stdout:
                if line.startswith("an iteration:"):  # the last line of the plan
                    return time.perf_counter() - start
        finally:
            run.kill()
            run.wait()
    raise RuntimeError("ROME_cifar10.py did not come to its first iteration")


def peak_memory(device):
    """(g) GiB: of the device, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def compile_all(bench):
    """Compile what the rows use, in each precision. Returns the seconds that it took, or 0 with a line that says why not."""
    args, micro_batch = bench.args, bench.data.micro_batch
    images, pool_batch = map(distributed.max_shard_size, (10 * args.batch_real, args.trained_bs))
    attacked, trained = {bench.pgd_batch, min(pool_batch, micro_batch), images % micro_batch} - {0}, {args.trained_bs, pool_batch}
    if distributed.world_size() == 1:
        trained |= {size for ipc in args.train_ipc for size in set_batches(40 * ipc, 256, 1) if size}
    start, ready = time.perf_counter(), set()
    for precision in bench.precisions:
        compilation.set_precision(precision)
        compilation._ready.clear()
        problem = compilation.compile_batches(bench.network(0), (3, 32, 32), sorted(attacked), sorted(trained), matched=[micro_batch],
                                       embedded=[micro_batch], last=1000)
        if problem:
            distributed.print_rank0(problem)
            return 0.0
        ready |= compilation._ready
    seconds = time.perf_counter() - start
    distributed.print_rank0(f"compiled {len(ready)} kinds of batches in {' and '.join(bench.precisions)} in {seconds:.0f} s")
    return seconds


def main():
    args = parse_args()
    args.device = distributed.init(args)
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    bench = Bench(args)
    compile_seconds = compile_all(bench) if args.compile else 0.0
    if distributed.world_size() > 1:
        alone, together = processes(bench)
        return distributed.print_rank0(
            f"outer iteration, {device_name(bench.device)}, {args.model}, ipc {args.ipc}, batch_real {args.batch_real}, "
            f"trained_bs {args.trained_bs}, model_train_steps {args.model_train_steps}; medians of {args.repeats}: one process "
            f"{alone:.3g} s, {distributed.world_size()} processes {together:.3g} s: {alone / together:.2f} times as fast")
    ceiling = ceilings(bench)
    peaks = [ceiling["convolution"], ceiling.get("convolution, bf16")]
    measurements = {f"PGD step, {bench.pgd_batch} images": pgd_step, f"pool training step, {args.trained_bs} images": pool_step,
                    "outer iteration": whole_iteration}
    measurements |= {f"100 epochs of training, ipc {ipc}": lambda bench, ipc=ipc: evaluation_training(bench, ipc)
                     for ipc in args.train_ipc}
    print(f"{device_name(bench.device)}, torch {torch.__version__}, {args.model}, ipc {args.ipc}, batch_real "
          f"{args.batch_real}, trained_bs {args.trained_bs}, model_train_steps {args.model_train_steps}, {args.threat_model}; "
          f"medians of {args.repeats}\n\n"
          + "\n".join(f"{name}: {rate:.0f} GFLOP/s" for name, rate in ceiling.items())
          + ("" if has_bf16(bench.device) else "\nno instructions for bf16")
          + "\n\n| | plain s |" + "".join(f" {p} s | speed-up | of the convolution |" for p in bench.precisions)
          + "\n|---|---|" + "---|---|---|" * len(bench.precisions))
    rows = []
    for name, measure in measurements.items():
        images, (plain, *quick), work = measure(bench)
        row, cells = {"what": name, "images": images, "plain_seconds": plain}, f"| {name} | {plain:.3g} |"
        for precision, seconds, peak in zip(bench.precisions, quick, peaks):
            rate = work * bench.flops / seconds / 1e9
            row[precision] = {"seconds": seconds, "speed_up": plain / seconds, "images_per_second": images / seconds,
                              "gflops": rate, "share_of_convolution": rate / peak}
            cells += f" {seconds:.3g} | {plain / seconds:.2f} | {100 * rate / peak:.0f} % |"
        rows.append(row)
        print(cells, flush=True)
    on_paper = on_a_gpu(bench)
    print("\nan outer iteration at these sizes on an H100, on paper: " + on_paper["text"])
    startup, memory = start_up(), peak_memory(bench.device)
    print(f"start-up to the first iteration: {'no data/cifar10.npz here' if startup is None else f'{startup:.1f} s'}; "
          f"peak memory {memory:.1f} GiB")
    write_json(Path(args.out), {
        "command": " ".join(sys.argv), "flags": vars(args), "device": device_name(bench.device),
        "versions": versions(), "ceilings_gflops": ceiling, "compile_seconds": compile_seconds, "rows": rows,
        "on_paper": on_paper, "start_up_seconds": startup, "peak_memory_gib": memory})


if __name__ == "__main__":
    run_script(main)
