"""How fast the scripts are on this machine, and how near to what it can do.

    python benchmark.py                         full ConvNet, CIFAR-10 ipc 10 flags, smaller batches; 15 min on two cores
    python benchmark.py --batch_real 256 --trained_bs 256 --model_train_steps 10     at the published sizes
    torchrun --nproc_per_node 2 benchmark.py                                         two processes against one of them

Measures, as medians of --repeats runs, the plain loop (class by class, eager, glibc's malloc as it is) and the fast one in turn
in the same process. Random images: speed does not depend on them. Writes one table and --out as JSON.
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

import utils
from attacks import attack_images, get_threat_model
from augment import dsa_apply, dsa_draw, unpack
from engine import fast, parallel
from engine.command_line import add_fast_flags, at_least, run_script
from engine.datasets import DATASETS, Dataset
from engine.device import device_name, get_device, synchronise, versions
from engine.plan import TRAINING_STEP, forward_flops, set_batches
from engine.safe_files import write_json
from engine.streams import stream
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
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--out", default="./result/benchmark.json", metavar="FILE")
    add_fast_flags(parser)
    return parser.parse_args(argv)


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
        img_adv = attack_images(member.net, dsa_apply(img_real, draw), label_real, threat, rng["attack"], chunk=len(img_real))
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
            img_adv = attack_images(member.net, img_real, label_real, threat, rng["attack"], chunk=len(img_real))
            logits = member.net(img_adv)
            member.optimizer.zero_grad()
            F.cross_entropy(logits, label_real).backward()
            member.optimizer.step()
            member.record((logits.argmax(1) == label_real).sum(), len(label_real))


class Bench:
    """What both loops work on: random images in place of CIFAR-10, a pool, a synthetic set, and the flags of the script."""

    def __init__(self, args):
        self.args, self.device = args, get_device(args.device)
        rng = np.random.default_rng(0)
        labels = torch.arange(10).repeat(max(args.batch_real, 4 * args.ipc))
        images = {split: torch.from_numpy(rng.integers(0, 256, (len(labels), 3, 32, 32), dtype=np.uint8))
                  for split in ("train", "test")}
        self.data = Dataset("random", images, {"train": labels, "test": labels}, "0123456789", device=self.device,
                            **DATASETS["CIFAR10"])
        self.pgd_batch = min(self.data.chunk, len(labels))
        self.threat = get_threat_model(args.threat_model, self.data)
        # The published flags of CIFAR-10 at 10 images a class, but for the sizes asked for.
        self.flags = rome.parse_args([
            "--aug", "--lr_img", "0.2", "--net_decay", "--embed_last", "1000", "--syn_ce", "--ce_weight", "0.1",
            "--train_net_num", "1", *(word for name in ("model", "ipc", "batch_real", "trained_bs", "model_train_steps")
                                      for word in (f"--{name}", str(getattr(args, name))))])
        self.flags.compile = args.compile
        self.flops = 2 * forward_flops(self.network(0), 3, (32, 32))  # of an image-gradient

    def network(self, seed):
        return network_for(self.data, self.args.model, seed)

    def start(self):
        """(images, their optimiser, a pool of two, random streams), the same at every call."""
        image_syn, _ = rome.initial_set(self.flags, self.data, stream(0, "init"), "real", 2)
        pool = rome.new_pool(self.flags, 0, self.data, None)
        del pool.members[2:]
        rng = {name: stream(0, name, device=self.device if name == "attack" else "cpu")
               for name in ("data", "dsa", "pool", "attack")}
        return image_syn.requires_grad_(), rome.image_optimizer(self.flags, image_syn), pool, rng

    def iterate(self, parts):
        """One outer iteration as the script makes it. parts: of `start`."""
        image_syn, optimizer_img, pool, rng = parts
        rome.update_images(image_syn, optimizer_img, pool.members[0], self.data, self.threat, self.flags, rng)
        rome.train_pool(pool.choose(2, rng["pool"]), self.data, self.threat, self.flags, rng)

    def seconds(self, call):
        """Wall time of call(), with the device waited for."""
        synchronise(self.device)
        start = time.perf_counter()
        call()
        synchronise(self.device)
        return time.perf_counter() - start

    def compare(self, plain, fast_one):
        """Median seconds of both, measured in turn after a warm-up; (plain, fast)."""
        times = []
        for _ in range(1 + self.args.repeats):
            with plain_mode():
                one = self.seconds(plain)
            times.append((one, self.seconds(fast_one)))
        return np.median(times[1:], axis=0).tolist()


class plain_mode:
    """Inside: no compilation, float32, and glibc's malloc as a process has it that has run for a while: its threshold of what
    is returned to the system has risen to the limit, 32 MiB (mallopt(3))."""

    def __enter__(self):
        self.kept = fast._ready.copy(), fast._precision
        fast._ready.clear()
        fast.set_precision("fp32")
        fast.reuse_freed_memory(32 << 20, 64 << 20)

    def __exit__(self, *error):
        fast._ready.update(self.kept[0])
        fast.set_precision(self.kept[1])
        fast.reuse_freed_memory()


# ------------------------------------------------------------------------------------------------------------ measurements
def ceilings(bench):
    """(a) GFLOP/s of a large matrix product and of the ConvNet's second convolution, forward and backward to its input, in the
    faster of the two memory formats."""
    size = 4096 if bench.device.type == "cuda" else 2048
    a, b = torch.randn(2, size, size, device=bench.device)
    repeats = max(bench.args.repeats, 5)
    best = {"matrix product": 2 * size**3 / np.median([bench.seconds(lambda: a @ b) for _ in range(repeats + 1)][1:])}
    count = 2048 if bench.device.type == "cuda" else 128
    for dtype in (torch.float32, torch.bfloat16):
        rates = []
        for layout in (torch.contiguous_format, torch.channels_last):
            conv = torch.nn.Conv2d(128, 128, 3, padding=1).to(bench.device, dtype, memory_format=layout).requires_grad_(False)
            x = torch.randn(count, 128, 16, 16, device=bench.device).to(dtype, memory_format=layout).requires_grad_()
            gradient = torch.randn_like(x)
            times = [bench.seconds(lambda: torch.autograd.grad(conv(x), x, gradient)) for _ in range(repeats + 1)]  # noqa: B023
            rates.append(count * 2 * 2 * 9 * 128 * 128 * 16 * 16 / np.median(times[1:]))
        best["convolution" if dtype == torch.float32 else "convolution, bf16"] = max(rates)
    return {name: rate / 1e9 for name, rate in best.items()}


def pgd_step(bench):
    """(b) One PGD step on a chunk of images."""
    images, labels = bench.data.take("train", slice(bench.pgd_batch))
    net, rng = bench.network(0), torch.Generator(bench.device).manual_seed(0)

    def attack():
        attack_images(net, images, labels, bench.threat, rng, steps=10, chunk=len(images))
    plain, quick = bench.compare(attack, attack)
    return len(images), plain / 10, quick / 10, len(images)


def pool_step(bench):
    """(c) One training step of a pool network, without the attack."""
    member = bench.start()[2].members[0]
    images, labels = bench.data.take("train", slice(bench.args.trained_bs))

    def step():
        member.optimizer.zero_grad()
        F.cross_entropy(fast.forward(member.net, images), labels).backward()
        member.optimizer.step()
    return len(images), *bench.compare(step, step), TRAINING_STEP * len(images)


def whole_iteration(bench):
    """(d) One outer iteration: update of the synthetic images, training of two pool networks."""
    flags = bench.flags
    plain_parts, fast_parts = bench.start(), bench.start()

    def plain():
        image_syn, optimizer_img, pool, rng = plain_parts
        plain_iteration(image_syn, optimizer_img, pool.members[0], pool.members, bench.data, bench.threat, flags, rng)

    def quick():
        bench.iterate(fast_parts)
    trained = 2 * flags.model_train_steps * flags.trained_bs
    work = 10 * (10 * flags.batch_real + trained) + TRAINING_STEP * trained
    return 10 * flags.batch_real + trained, *bench.compare(plain, quick), work


def processes(bench):
    """One outer iteration by the first process alone, while the others sleep, and by all together, in turn.

    Returns median seconds of both, (alone, together)."""
    alone, together, times = bench.start(), bench.start(), []
    for _ in range(1 + bench.args.repeats):
        one = 0.0
        if parallel.chief():
            with parallel.alone():
                one = bench.seconds(lambda: bench.iterate(alone))
        one = parallel.meet(one)[0]
        times.append((one, max(parallel.meet(bench.seconds(lambda: bench.iterate(together))))))
    return np.median(times[1:], axis=0).tolist()


def evaluation_training(bench, ipc):
    """(e) 100 epochs of training on a packed set of `ipc` images a class."""
    count, epochs = 40 * ipc, bench.args.train_epochs
    images, labels = torch.randn(count, 3, 32, 32, device=bench.device), torch.arange(10, device=bench.device).repeat(4 * ipc)

    def train():
        utils.train_on_set(bench.network(0), images, labels, epochs=epochs, lr_net=0.01, batch_train=256,
                           dsa_strategy=bench.flags.dsa_strategy, generator=stream(0))
    plain, quick = bench.compare(train, train)
    share = 100 / (epochs + 1)  # `epochs` + 1 are run
    return 100 * count, plain * share, quick * share, TRAINING_STEP * 100 * count


def start_up():
    """(f) Seconds from the command to the moment before the first iteration, apart from compilation; None without the data."""
    if not Path("data/cifar10.npz").exists():
        return None
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        run = subprocess.Popen([sys.executable, "-u", SCRIPT, "--no_compile", "--no_baseline", "--save_path", folder,
                                "--checkpoint_path", folder], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
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


def main():
    args = parse_args()
    args.device = parallel.start(args)
    fast.set_precision(args.precision)
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    bench = Bench(args)
    chunk, compile_seconds = bench.data.chunk, 0.0
    sets = {ipc: set_batches(40 * ipc, 256, 1) for ipc in args.train_ipc}
    if args.compile:
        start = time.perf_counter()
        trained = {args.trained_bs, *(size for sizes in sets.values() for size in sizes if size)}
        last = 10 * args.batch_real % chunk
        attacked = {bench.pgd_batch, min(args.trained_bs, chunk), *([last] if last else [])}
        if parallel.size() > 1:
            shares = parallel.largest_share(10 * args.batch_real), parallel.largest_share(args.trained_bs)
            attacked |= {size for size in (min(shares[0], chunk), shares[0] % chunk, min(shares[1], chunk)) if size}
            trained = {args.trained_bs, shares[1]}
        problem = fast.compile_batches(bench.network(0), (3, 32, 32), sorted(attacked), sorted(trained))
        compile_seconds = time.perf_counter() - start
        parallel.say(problem or f"compiled {len(attacked) + len(trained)} kinds of batches in {compile_seconds:.1f} s")

    if parallel.size() > 1:
        alone, together = processes(bench)
        return parallel.say(
            f"outer iteration, {device_name(bench.device)}, {args.model}, ipc {args.ipc}, batch_real {args.batch_real}, "
            f"trained_bs {args.trained_bs}, model_train_steps {args.model_train_steps}; medians of {args.repeats}: one process "
            f"{alone:.3g} s, {parallel.size()} processes {together:.3g} s: {alone / together:.2f} times as fast")
    ceiling = ceilings(bench)
    peak = ceiling["convolution, bf16" if args.precision == "bf16" else "convolution"]
    measurements = {f"PGD step, {bench.pgd_batch} images": pgd_step, f"pool training step, {args.trained_bs} images": pool_step,
                    "outer iteration": whole_iteration}
    measurements |= {f"100 epochs of training, ipc {ipc}": lambda bench, ipc=ipc: evaluation_training(bench, ipc)
                     for ipc in args.train_ipc}
    print(f"{device_name(bench.device)}, torch {torch.__version__}, {args.model}, ipc {args.ipc}, batch_real "
          f"{args.batch_real}, trained_bs {args.trained_bs}, model_train_steps {args.model_train_steps}, {args.threat_model}, "
          f"{args.precision}; medians of {args.repeats}\n\n"
          + "\n".join(f"{name}: {rate:.0f} GFLOP/s" for name, rate in ceiling.items())
          + "\n\n| | plain s | fast s | speed-up | images/s | GFLOP/s | of the convolution |\n|---|---|---|---|---|---|---|")
    rows = []
    for name, measure in measurements.items():
        images, plain, quick, work = measure(bench)
        rate = work * bench.flops / quick / 1e9
        rows.append({"what": name, "plain_seconds": plain, "fast_seconds": quick, "speed_up": plain / quick,
                     "images_per_second": images / quick, "gflops": rate, "share_of_convolution": rate / peak})
        print(f"| {name} | {plain:.3g} | {quick:.3g} | {plain / quick:.2f} | {images / quick:.0f} | {rate:.0f} | "
              f"{100 * rate / peak:.0f} % |", flush=True)
    startup, memory = start_up(), peak_memory(bench.device)
    print(f"\nstart-up to the first iteration: {'no data/cifar10.npz here' if startup is None else f'{startup:.1f} s'}; "
          f"peak memory {memory:.1f} GiB")
    write_json(Path(args.out), {
        "command": " ".join(sys.argv), "flags": vars(args), "device": device_name(bench.device),
        "versions": versions(), "ceilings_gflops": ceiling, "compile_seconds": compile_seconds, "rows": rows,
        "start_up_seconds": startup, "peak_memory_gib": memory})


if __name__ == "__main__":
    run_script(main)
