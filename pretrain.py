"""Adversarially train networks on the real data, as a fixed robust prior for the ROME scripts (--robust_prior).

    python pretrain.py --dataset CIFAR10 --model ConvNet --threat_model pixel --num_nets 3
    python ROME_cifar10.py ... --robust_prior checkpoints/full_ConvNet_CIFAR10_5000_PGD-pixel_*.pth

Each network is a state_dict, named as in BEARD, with a `.json` beside it that says how it was trained. A run that was killed
goes on with the same command. Source: Madry et al. 2018, for the paper's "robust pretrained model".
Distributed under the MIT licence.
"""
import argparse
import contextlib
import json
import math
import shutil
import time
from importlib.util import find_spec
from pathlib import Path

import torch
from tqdm import tqdm

import utils
from attacks import THREAT_MODELS, attack, check_threat_model, get_threat_model
from augment import dsa_apply, dsa_draw, parse_dsa_strategy
from runtime import distributed
from runtime.progress import duration
from runtime.command_line import add_dataset_flag, add_fast_flags, add_switch, at_least, run_script
from datasets import load_dataset
from runtime.device import device_name, get_device, versions
from runtime.compilation import resolve_precision, is_batch_dependent, disable_bf16, set_precision
from runtime.cost import TRAINING_STEP, compile_planned, forward_backward_rate, set_batches
from runtime.measures import COLUMNS
from runtime.safe_io import InputError, write_json, write_tensors
from runtime.checkpoint import Interrupted, SignalHandler, CheckpointFile, lock, require_same_flags
from runtime.training import require_finite, training_step
from runtime.seeding import make_generator, derive_seed
from networks import NETWORKS, network_for

MAY_CHANGE = ("save_interval", "data_path", "fresh", "num_nets")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add_dataset_flag(parser)
    add("--data_path", default="./data", help="folder of cifar10.npz, cifar100.npz")
    add("--checkpoint_path", default="./checkpoints", help="folder for the networks")
    add("--model", choices=NETWORKS, default="ConvNet", metavar="MODEL", help=f"one of {', '.join(NETWORKS)}")
    add("--num_nets", type=at_least(1), default=1, help="networks to train")
    add("--threat_model", choices=THREAT_MODELS, default="published")
    add_switch(parser, "targeted", False, "attacks in training aim at the next class, as in distillation")
    add("--attack_steps", type=at_least(0), default=10, help="PGD steps in training; 0 trains on clean images")
    add("--epochs", type=at_least(1), default=50, help="epochs of the whole training set")
    add("--batch_train", type=at_least(1), default=256, help="images in a step")
    add("--lr_net", type=at_least(0, float), default=0.05, help="largest learning rate; it warms up and falls as a cosine")
    add("--warm_up", type=at_least(0, float), default=0.05, help="fraction of the steps in which the learning rate rises")
    add("--dsa_strategy", default="crop_flip", help="augmentations, one drawn a batch, joined by '_', or none")
    add("--test_limit", type=at_least(0), default=0, help="evaluate on the first so many test images; 0: all")
    add("--aa_limit", type=at_least(0), default=200, help="AutoAttack on the first so many test images; 0: none")
    add("--save_interval", type=at_least(0), default=0, help="steps between two saved states; 0: so many that saving takes "
        "1 %% of the time")
    add("--fresh", action="store_true", help="start over, instead of going on with what an interrupted run has saved")
    add_fast_flags(parser)
    add("--seed", type=at_least(0), default=0, help="governs everything that is random")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    args = parser.parse_args(argv)
    try:
        parse_dsa_strategy(args.dsa_strategy)
    except ValueError as error:
        parser.error(str(error))
    return args


def learning_rate(args, step, steps):
    """Linear warm-up, then half a cosine to 0."""
    warm = math.ceil(args.warm_up * steps)
    if step < warm:
        return args.lr_net * (step + 1) / warm
    return args.lr_net * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(steps - warm, 1)))


def train(args, k, data, threat, states, interrupts):
    """Network number k, from where an interrupted run has stopped.

    Returns the network and its accuracy (fraction) on the attacked batches of its last epoch.
    """
    net = network_for(data, args.model, derive_seed(args.seed, "pretrain", k))
    optimizer = torch.optim.SGD(net.parameters(), lr=args.lr_net, momentum=0.9, weight_decay=5e-4)
    rng = {"dsa": make_generator(args.seed, "pretrain", k, "dsa"),
           "attack": make_generator(args.seed, "pretrain", k, "attack", device=data.device)}
    correct, seen, step = torch.zeros((), device=data.device), 0, 0
    fingerprint = data.fingerprint()

    def state():
        return {"flags": vars(args), "data": fingerprint, "k": k, "step": step, "net": net.state_dict(),
                "optimizer": optimizer.state_dict(), "rng": {name: generator.get_state() for name, generator in rng.items()},
                "correct": correct, "seen": seen, "chunk": data.micro_batch}

    def save():
        if distributed.is_main_process():
            states.save(state())
        distributed.barrier()

    saved, damage = distributed.run_on_rank0(lambda: states.load(state()))
    if damage:
        distributed.print_rank0(damage)
    if saved:
        where = f"the run saved in {states.newest.parent}"
        require_same_flags(saved["flags"], vars(args), MAY_CHANGE, where, "--fresh to start over")
        if (saved["data"], saved["k"]) != (fingerprint, k):
            raise InputError(f"{where} began with other data than {args.data_path} holds now, or is of another network; "
                             "--fresh starts over")
        net.load_state_dict(saved["net"])
        optimizer.load_state_dict(saved["optimizer"])
        for name, generator in rng.items():
            generator.set_state(saved["rng"][name])
        correct, seen, step = saved["correct"].to(data.device), saved["seen"], saved["step"]
        data.micro_batch = saved["chunk"]  # another one draws other random starts on CUDA
        distributed.print_rank0(f"going on with network {k} at step {step}")

    size = len(data.labels["train"])
    per_epoch = math.ceil(size / args.batch_train)
    steps, order = args.epochs * per_epoch, None
    with tqdm(total=steps, initial=step, desc=f"network {k}", unit="step", disable=distributed.disable_tqdm()) as bar:
        try:
            while step < steps:
                if interrupts.check(due=distributed.is_main_process() and states.should_save(step)):
                    save()
                with interrupts.delay_signals():
                    epoch, batch = divmod(step, per_epoch)
                    if batch == 0:
                        correct, seen = torch.zeros_like(correct), 0
                    if order is None or batch == 0:  # a stream for each epoch, so that it need not be saved
                        order = torch.randperm(size, generator=make_generator(args.seed, "pretrain", k, "order", epoch))
                    images, labels = data.get_batch("train", order[batch * args.batch_train:(batch + 1) * args.batch_train])
                    images = dsa_apply(images, dsa_draw(args.dsa_strategy, data.size, rng["dsa"], n=len(images)))
                    own = distributed.shard(len(labels))  # of several processes each has its share of the batch
                    attacked, seen = images[own], seen + len(labels)
                    if args.attack_steps:
                        attacked = attack(net, images, labels, threat, generator=rng["attack"], targeted=args.targeted,
                                                 steps=args.attack_steps, micro_batch=data.micro_batch, shard=own)
                    for group in optimizer.param_groups:
                        group["lr"] = learning_rate(args, step, steps)
                    loss, right = training_step(net, optimizer, attacked, labels[own], len(labels))
                    correct += right
                    step += 1
                bar.update()
                if step % per_epoch == 0:
                    require_finite({"the training loss": loss.item()})
                    distributed.print_rank0(f"network {k} epoch {epoch + 1}/{args.epochs}: accuracy {100 * correct.item() / seen:.2f} % "
                                 f"on its {'attacked' if args.attack_steps else 'clean'} batches, loss {loss.item():.4f}")
        except Interrupted as stop:
            if stop.whole:
                save()
            raise
    save()  # the test comes next, and may be interrupted
    return net.eval(), correct.item() / seen


def compile_training(args, data):
    """Compile for the batches of this training, if they are many enough."""
    trained = {distributed.max_shard_size(size): n / distributed.world_size() for size, n in
               set_batches(len(data.labels["train"]), args.batch_train, args.epochs).items()}
    attacked, own = {}, distributed.max_shard_size(args.batch_train)
    if own % data.micro_batch == 0:
        attacked[data.micro_batch] = trained[own] / TRAINING_STEP * args.attack_steps
    compile_planned(network_for(data, args.model, 0), data, {"attacked": attacked, "trained": trained}, distributed.print_rank0)


def print_summary(args, data):
    """Say what the run is about to do and, from a short measurement, how long it will take."""
    images = len(data.labels["train"])
    gradients = args.epochs * images * (args.attack_steps + 1) / (distributed.world_size() if args.num_nets == 1 else 1)
    estimate = duration(gradients / forward_backward_rate(network_for(data, args.model, 0), data))
    shared = ""
    if distributed.world_size() > 1:
        shared = f"; {distributed.world_size()} processes share {'every batch' if args.num_nets == 1 else 'the networks'}"
    distributed.print_rank0(f"{args.num_nets} network(s) {args.model} on {device_name(data.device)}: {args.epochs} epochs of {images} "
                 f"training images of {data.name}, threat model {args.threat_model}; about {estimate} each{shared}")


def check_shares(args, data):
    """Raise InputError where several processes have nothing to share, or share what must stay whole."""
    if args.num_nets > 1:
        return distributed.require_work(args.num_nets, "networks (--num_nets)")
    last = len(data.labels["train"]) % args.batch_train or args.batch_train
    distributed.require_work(min(last, args.batch_train), "images of the last batch of an epoch (--batch_train)")
    if distributed.world_size() > 1 and is_batch_dependent(network_for(data, args.model, 0)):
        raise InputError(f"--model {args.model} has BatchNorm, whose batches cannot be shared; start one process, or one for "
                         "each of several networks (--num_nets)")


def main():
    args = parse_args()
    device = get_device(distributed.init(args))
    set_precision(resolve_precision(args, device))
    data = load_dataset(args.dataset, args.data_path, device)
    data.micro_batch = distributed.run_on_rank0(lambda: data.micro_batch)  # another one draws other random starts on CUDA
    distributed.print_rank0(data.describe())
    check_threat_model(args.threat_model, data)
    utils.check_network(args.model, data)
    check_shares(args, data)
    if args.test_limit > len(data.labels["test"]):
        raise InputError(f"--test_limit {args.test_limit} is more than the {len(data.labels['test'])} test images")
    if args.aa_limit and find_spec("pyautoattack") is None:
        raise InputError("AutoAttack at the end needs the package pyautoattack; without it choose --aa_limit 0")
    threat = get_threat_model(args.threat_model, data)
    print_summary(args, data)
    if args.compile:
        with distributed.single_process() if args.num_nets > 1 else contextlib.nullcontext():
            compile_training(args, data)
    trained = f"PGD-{args.threat_model}" + ("-targeted" if args.targeted else "") if args.attack_steps else "None"
    name = f"full_{args.model}_{data.name}_{data.class_size(0)}_{trained}_seed{args.seed}"
    paths = [Path(args.checkpoint_path) / f"{name}-{k}.pth" for k in range(args.num_nets)]
    folder = Path(args.checkpoint_path) / f"pretrain_{name}"
    held, interrupts = [], SignalHandler(distributed.print_rank0)

    def begin():
        folder.mkdir(parents=True, exist_ok=True)
        held.append(lock(folder))
        if args.fresh and not distributed.is_restart():
            for k, path in enumerate(paths):
                shutil.rmtree(folder / f"net{k}", ignore_errors=True)
                for written in (about_of(path), path):
                    written.unlink(missing_ok=True)

    def work(k):
        with distributed.single_process():
            one_network(args, k, data, threat, folder / f"net{k}", paths[k], interrupts)
    try:
        distributed.run_on_rank0(begin)
        if args.num_nets == 1:
            one_network(args, 0, data, threat, folder / "net0", paths[0], interrupts)
        else:
            with interrupts.allow_signals():
                distributed.map_dynamic(args.num_nets, work)
    finally:
        interrupts.restore()
        for file in held:
            file.close()


def about_of(path):
    """The file that says how a network was trained."""
    return path.with_name(f"{path.name}.json")


def one_network(args, k, data, threat, folder, path, interrupts):
    """Train network number k, test it, write it to `path`, unless it is there. folder: of its saved states."""
    if about_of(path).exists():
        said = json.loads(about_of(path).read_text())["flags"]
        require_same_flags(said, vars(args), MAY_CHANGE, str(path), "--fresh to start over")
        return distributed.print_rank0(f"{path} is there already")
    start, states = time.perf_counter(), None
    if distributed.is_main_process():
        folder.mkdir(exist_ok=True)
        states = CheckpointFile(folder, args.save_interval)
    net, train_acc = train(args, k, data, threat, states, interrupts)
    with interrupts.allow_signals():
        (about,) = distributed.map_dynamic(1, lambda _: measure(args, k, net, train_acc, data, threat))
    with interrupts.delay_signals():
        if distributed.is_main_process():
            write_tensors(path, {key: value.cpu() for key, value in net.state_dict().items()})
            write_json(about_of(path), about)
            shutil.rmtree(folder)
    measured = ", ".join(f"{name} {100 * about[key]:.2f} %" for key, name in COLUMNS.items() if key in about)
    autoattack = f", AutoAttack {100 * about['aa_acc']:.2f} % of {about['aa_n']}" if args.aa_limit else ""
    distributed.print_rank0(f"{path}: {measured} of {about['n']} test images{autoattack}, in training {100 * train_acc:.2f} %; "
                 f"{duration(time.perf_counter() - start)}")


def measure(args, k, net, train_acc, data, threat):
    """What is known of a network, for the file beside it."""
    images, labels = data.get_batch("test", slice(args.test_limit or None))
    rng = make_generator(args.seed, "pretrain", k, "test", device=data.device)
    about = {"model": args.model, "dataset": data.name, "num_classes": data.num_classes, "threat_model": args.threat_model,
             "mean": list(data.mean), "std": list(data.std),
             "train_robust_acc": train_acc, "clean_acc": utils.accuracy(net, images, labels),
             **utils.robust_accuracies(net, images, labels, threat, rng, data.micro_batch), "n": len(labels), "seed": args.seed,
             "flags": vars(args), "versions": versions(), "device": device_name(data.device)}
    if args.aa_limit:
        with disable_bf16():
            x_adv = attack(net, images[:args.aa_limit], labels[:args.aa_limit], threat, "AA", targeted=False,
                           generator=rng)
        about |= {"aa_acc": utils.accuracy(net, x_adv, labels[:args.aa_limit]), "aa_n": len(x_adv)}
    return about


if __name__ == "__main__":
    run_script(main)
