"""Adversarially train networks on the real data, as a fixed robust prior for the ROME scripts.

    python pretrain.py --dataset CIFAR10 --model ConvNet --threat_model pixel --num_nets 3
    python ROME_cifar10.py ... --robust_prior checkpoints/full_ConvNet_CIFAR10_5000_PGD-pixel_*.pth

Each network is a state_dict, with a `.json` beside it that says how it was trained. The same
command resumes a run that was killed. Source: Madry et al. 2018. Distributed under the MIT licence.
"""
import argparse
import json
import math
import shutil
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import utils
from attacks import THREAT_MODELS, attack, check_threat_model, get_threat_model
from augment import dsa_apply, dsa_draw, dsa_strategy_flag
from datasets import add_dataset_flag, load_dataset
from networks import NETWORKS, network_for
from runtime import distributed
from runtime.checkpoint import CheckpointFile, SignalHandler, lock, require_same_flags
from runtime.command_line import add_common_flags, add_switch, at_least, run_script
from runtime.compilation import disable_bf16, resolve_precision, set_precision
from runtime.cost import TRAINING_STEP, compile_planned, training_batches
from runtime.cuda_graphs import use_cuda_graphs
from runtime.device import choose_micro_batch, device_name, get_device, versions
from runtime.measures import FULL
from runtime.safe_io import InputError, write_json, write_tensors
from runtime.seeding import derive_seed, make_generator
from runtime.training import require_finite, training_step

OLDER = {"attack_eps": 8.0}  # flags that older files lack
MAY_CHANGE = ("data_path", "fresh", "num_nets", "chunk", "cuda_graphs", "device")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add_dataset_flag(parser)
    add("--model", choices=NETWORKS, default="ConvNet", metavar="MODEL", help=", ".join(NETWORKS))
    add("--num_nets", type=at_least(1), default=1, help="networks to train")
    add("--threat_model", choices=THREAT_MODELS, default="published")
    add_switch(parser, "targeted", False, "attacks in training aim at the next class")
    add("--attack_eps", type=at_least(0, float), default=8.0, help="L-inf radius in 1/255")
    add("--attack_steps", type=at_least(0), default=10, help="PGD steps; 0: clean images")
    add("--epochs", type=at_least(1), default=50)
    add("--batch_train", type=at_least(1), default=256, help="images in a step")
    add("--lr_net", type=at_least(0, float), default=0.05, help="highest learning rate")
    add("--warm_up", type=at_least(0, float), default=0.05, help="fraction of the steps")
    add("--dsa_strategy", type=dsa_strategy_flag, default="crop_flip",
        help="augmentations joined by '_', or none")
    add("--test_limit", type=at_least(0), default=0, help="test images; 0: all")
    add("--aa_limit", type=at_least(0), default=200, help="test images for AutoAttack; 0: none")
    add("--seed", type=at_least(0), default=0, help="governs everything that is random")
    add_common_flags(parser)
    return parser.parse_args(argv)


def learning_rate(args, step, steps):
    """Linear warm-up, then half a cosine to 0."""
    warm = math.ceil(args.warm_up * steps)
    if step < warm:
        return args.lr_net * (step + 1) / warm
    return args.lr_net * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(steps - warm, 1)))


class Training:
    """The training of network number k, which can be resumed after any epoch."""

    def __init__(self, args, flags, k, data, threat, micro_batch):
        self.args, self.k, self.data, self.threat = args, k, data, threat
        self.flags, self.fingerprint, self.micro_batch = flags, data.fingerprint(), micro_batch
        self.net = network_for(data, args.model, derive_seed(args.seed, "pretrain", k))
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=args.lr_net, momentum=0.9,
                                         weight_decay=5e-4)
        self.generator = partial(make_generator, args.seed, "pretrain", k)
        self.rng = {"dsa": self.generator("dsa"),
                    "attack": self.generator("attack", device=data.device)}
        self.epoch, self.accuracy = 0, None

    def state_dict(self):
        return {"flags": self.flags, "data": self.fingerprint, "micro_batch": self.micro_batch,
                "epoch": self.epoch, "accuracy": self.accuracy,
                "net": self.net.state_dict(), "optimizer": self.optimizer.state_dict(),
                "rng": {name: rng.get_state() for name, rng in self.rng.items()}}

    def load_state_dict(self, saved, where):
        """Raises InputError if `saved`, which the message calls `where`, is of another run."""
        require_same_flags({**OLDER, **saved["flags"]}, self.flags, MAY_CHANGE, where,
                           "--fresh to start over")
        if saved["data"] != self.fingerprint:
            raise InputError(f"{where} began with other data than --data_path holds")
        self.net.load_state_dict(saved["net"])
        self.optimizer.load_state_dict(saved["optimizer"])
        for name, rng in self.rng.items():
            rng.set_state(saved["rng"][name])
        if not self.args.chunk:  # another one draws other random starts on CUDA
            self.micro_batch = saved["micro_batch"]
        self.epoch, self.accuracy = saved["epoch"], saved["accuracy"]

    def train_epoch(self):
        """An epoch on attacked images; `accuracy` is a fraction of these, as they were met."""
        args, data = self.args, self.data
        order = torch.randperm(len(data.labels["train"]),
                               generator=self.generator("order", self.epoch))
        batches, right = order.split(args.batch_train), 0
        bar = tqdm(batches, f"network {self.k} epoch {self.epoch + 1}", disable=None, leave=False)
        for step, batch in enumerate(bar, self.epoch * len(batches)):
            images, labels = data.get_batch("train", batch)
            images = dsa_apply(images, dsa_draw(args.dsa_strategy, data.size, self.rng["dsa"],
                                                n=len(images)))
            if args.attack_steps:
                images = attack(self.net, images, labels, self.threat, targeted=args.targeted,
                                eps=args.attack_eps / 255, steps=args.attack_steps,
                                generator=self.rng["attack"], micro_batch=self.micro_batch)
            rate = learning_rate(args, step, args.epochs * len(batches))
            self.optimizer.param_groups[0]["lr"] = rate
            loss, correct = training_step(self.net, self.optimizer, images, labels, len(labels))
            right = right + correct
        require_finite({"the training loss": loss.item()})
        self.epoch, self.accuracy = self.epoch + 1, right.item() / len(order)
        distributed.write_line(f"network {self.k} epoch {self.epoch}/{args.epochs}: accuracy in "
                               f"training {100 * self.accuracy:.2f} %, loss {loss.item():.4f}")

    def measure(self):
        """What is known of the trained network, for the file beside it."""
        args, data, net = self.args, self.data, self.net.eval()
        images, labels = data.get_batch("test", slice(args.test_limit or None))
        rng = self.generator("test", device=data.device)
        about = {"model": args.model, "dataset": data.name, "num_classes": data.num_classes,
                 "threat_model": args.threat_model, "mean": list(data.mean), "std": list(data.std),
                 "train_robust_acc": self.accuracy,
                 "clean_acc": utils.accuracy(net, images, labels),
                 **utils.robust_accuracies(net, images, labels, self.threat, rng, self.micro_batch),
                 "n": len(labels), "seed": args.seed, "flags": self.flags,
                 "versions": versions(), "device": device_name(data.device)}
        if args.aa_limit:
            images, labels = images[:args.aa_limit], labels[:args.aa_limit]
            with disable_bf16():
                x_adv = attack(net, images, labels, self.threat, "AA", targeted=False,
                               generator=rng)
            about |= {"aa_acc": utils.accuracy(net, x_adv, labels), "aa_n": len(x_adv)}
        return about


def make_network(training, path, folder):
    """Train a network, test it and write it to `path`, unless it is there. folder: of states."""
    about_path = Path(f"{path}.json")
    if about_path.exists():
        saved = {**OLDER, **json.loads(about_path.read_text())["flags"]}
        require_same_flags(saved, training.flags, MAY_CHANGE, path, "--fresh to start over")
        distributed.write_line(f"{path} is there already")
        return
    folder.mkdir(exist_ok=True)
    checkpoint = CheckpointFile(folder)
    if saved := checkpoint.load(training.state_dict()):
        training.load_state_dict(saved, f"the run saved in {folder}")
        distributed.write_line(f"going on with network {training.k} after epoch {training.epoch}")
    while training.epoch < training.args.epochs:
        training.train_epoch()
        checkpoint.save(training.state_dict())
    about, state = training.measure(), training.net.state_dict()
    write_tensors(path, {key: value.cpu() for key, value in state.items()})
    write_json(about_path, about)
    shutil.rmtree(folder)
    text = ", ".join(f"{key} {100 * value:.2f} %" for key, value in about.items()
                     if key.endswith("acc"))
    distributed.write_line(f"{path}: {text}")


def compile_training(args, data, micro_batch):
    """Compile for the batches of this training."""
    trained = training_batches(len(data.labels["train"]), args.batch_train, args.epochs)
    attacked = {}
    size = min(args.batch_train, micro_batch)
    if args.batch_train % size == 0:
        attacked[size] = trained[args.batch_train] / TRAINING_STEP * args.attack_steps
    compile_planned(network_for(data, args.model, 0), data,
                    {"attacked": attacked, "trained": trained}, distributed.print_rank0)


def open_folder(folder, paths, fresh, held):
    """Lock `folder`, until `held` is closed; fresh: remove what earlier runs have left."""
    folder.mkdir(parents=True, exist_ok=True)
    held.enter_context(lock(folder))
    if fresh and not distributed.is_restart():
        for k, path in enumerate(paths):
            shutil.rmtree(folder / f"net{k}", ignore_errors=True)
            Path(f"{path}.json").unlink(missing_ok=True)


def main():
    args = parse_args()
    device = get_device(distributed.init(vars(args)), args.deterministic)
    precision = resolve_precision(args.precision, device)
    set_precision(precision)
    micro_batch = distributed.run_on_rank0(lambda: choose_micro_batch(device, args.chunk))
    data = load_dataset(args.dataset, args.data_path, device)
    distributed.print_rank0(data.describe())
    check_threat_model(args.threat_model, data)
    distributed.require_work(args.num_nets, "networks (--num_nets)")
    threat = get_threat_model(args.threat_model, data)
    if args.compile:
        compile_training(args, data, micro_batch)

    eps = "" if args.attack_eps == 8 else f"{args.attack_eps:g}"
    attacks = f"PGD{eps}-{args.threat_model}" + "-targeted" * args.targeted
    name = (f"{FULL}_{args.model}_{data.name}_{data.class_size(0)}_"
            f"{attacks if args.attack_steps else None}_seed{args.seed}")
    folder = Path(args.checkpoint_path) / f"pretrain_{name}"
    paths = [folder.with_name(f"{name}-{k}.pth") for k in range(args.num_nets)]
    flags = {**vars(args), "precision": precision}
    signals = SignalHandler(distributed.print_rank0)

    def work(k):
        with distributed.single_process():
            training = Training(args, flags, k, data, threat, micro_batch)
            make_network(training, paths[k], folder / f"net{k}")

    with ExitStack() as held:
        held.callback(signals.restore)
        held.enter_context(use_cuda_graphs(args.cuda_graphs and device.type == "cuda",
                                           distributed.print_rank0))
        distributed.run_on_rank0(lambda: open_folder(folder, paths, args.fresh, held))
        with signals.allow_signals():
            distributed.map_dynamic(args.num_nets, work)


if __name__ == "__main__":
    run_script(main)
