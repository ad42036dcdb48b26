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
from attacks import PGD_STEPS, THREAT_MODELS, attack_images, check_threat_model, get_threat_model
from augment import dsa_apply, dsa_draw, parse_dsa_strategy
from engine import parallel
from engine.clock import duration
from engine.command_line import add_dataset_flag, add_fast_flags, add_switch, at_least, run_script
from engine.datasets import load_dataset
from engine.device import device_name, get_device, versions
from engine.fast import choose_precision, mixes_its_batch, no_bf16, set_precision
from engine.plan import TRAINING_STEP, compile_planned, image_gradients_per_second, set_batches
from engine.results import COLUMNS
from engine.safe_files import InputError, write_json, write_tensors
from engine.saved_state import Interrupted, Interrupts, StateFile, lock, refuse_other_flags
from engine.streams import stream, stream_seed
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
    add("--attack_steps", type=at_least(0), default=PGD_STEPS, help="PGD steps in training; 0 trains on clean images")
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
    net = network_for(data, args.model, stream_seed(args.seed, "pretrain", k))
    optimizer = torch.optim.SGD(net.parameters(), lr=args.lr_net, momentum=0.9, weight_decay=5e-4)
    rng = {"dsa": stream(args.seed, "pretrain", k, "dsa"),
           "attack": stream(args.seed, "pretrain", k, "attack", device=data.device)}
    correct, seen, step = torch.zeros((), device=data.device), 0, 0
    fingerprint = data.fingerprint()

    def state():
        return {"flags": vars(args), "data": fingerprint, "k": k, "step": step, "net": net.state_dict(),
                "optimizer": optimizer.state_dict(), "rng": {name: generator.get_state() for name, generator in rng.items()},
                "correct": correct, "seen": seen, "chunk": data.chunk}

    def save():
        if parallel.chief():
            states.save(state())
        parallel.meet()

    saved, damage = parallel.from_chief(lambda: states.load(state()))
    if damage:
        parallel.say(damage)
    if saved:
        where = f"the run saved in {states.newest.parent}"
        refuse_other_flags(saved["flags"], vars(args), MAY_CHANGE, where, "--fresh to start over")
        if (saved["data"], saved["k"]) != (fingerprint, k):
            raise InputError(f"{where} began with other data than {args.data_path} holds now, or is of another network; "
                             "--fresh starts over")
        net.load_state_dict(saved["net"])
        optimizer.load_state_dict(saved["optimizer"])
        for name, generator in rng.items():
            generator.set_state(saved["rng"][name])
        correct, seen, step = saved["correct"].to(data.device), saved["seen"], saved["step"]
        data.chunk = saved["chunk"]  # another one draws other random starts on CUDA
        parallel.say(f"going on with network {k} at step {step}")

    size = len(data.labels["train"])
    per_epoch = math.ceil(size / args.batch_train)
    steps, order = args.epochs * per_epoch, None
    with tqdm(total=steps, initial=step, desc=f"network {k}", unit="step", disable=parallel.silent()) as bar:
        try:
            while step < steps:
                if interrupts.check(due=parallel.chief() and states.due(step)):
                    save()
                with interrupts.deferred():
                    epoch, batch = divmod(step, per_epoch)
                    if batch == 0:
                        correct, seen = torch.zeros_like(correct), 0
                    if order is None or batch == 0:  # a stream for each epoch, so that it need not be saved
                        order = torch.randperm(size, generator=stream(args.seed, "pretrain", k, "order", epoch))
                    images, labels = data.take("train", order[batch * args.batch_train:(batch + 1) * args.batch_train])
                    images = dsa_apply(images, dsa_draw(args.dsa_strategy, data.size, rng["dsa"], n=len(images)))
                    own = parallel.share(len(labels))  # of several processes each has its share of the batch
                    attacked, seen = images[own], seen + len(labels)
                    if args.attack_steps:
                        attacked = attack_images(net, images, labels, threat, rng["attack"], targeted=args.targeted,
                                                 steps=args.attack_steps, chunk=data.chunk, own=own)
                    for group in optimizer.param_groups:
                        group["lr"] = learning_rate(args, step, steps)
                    loss, right = utils.training_step(net, optimizer, attacked, labels[own], len(labels))
                    correct += right
                    step += 1
                bar.update()
                if step % per_epoch == 0:
                    utils.check_finite({"the training loss": loss.item()})
                    parallel.say(f"network {k} epoch {epoch + 1}/{args.epochs}: accuracy {100 * correct.item() / seen:.2f} % "
                                 f"on its {'attacked' if args.attack_steps else 'clean'} batches, loss {loss.item():.4f}")
        except Interrupted as stop:
            if stop.whole:
                save()
            raise
    save()  # the test comes next, and may be interrupted
    return net.eval(), correct.item() / seen


def compile_training(args, data):
    """Compile for the batches of this training, if they are many enough."""
    trained = {parallel.largest_share(size): n / parallel.size() for size, n in
               set_batches(len(data.labels["train"]), args.batch_train, args.epochs).items()}
    attacked, own = {}, parallel.largest_share(args.batch_train)
    if own % data.chunk == 0:
        attacked[data.chunk] = trained[own] / TRAINING_STEP * args.attack_steps
    compile_planned(network_for(data, args.model, 0), data, {"attacked": attacked, "trained": trained}, parallel.say)


def print_plan(args, data):
    """Say what the run is about to do and, from a short measurement, how long it will take."""
    images = len(data.labels["train"])
    gradients = args.epochs * images * (args.attack_steps + 1) / (parallel.size() if args.num_nets == 1 else 1)
    estimate = duration(gradients / image_gradients_per_second(network_for(data, args.model, 0), data))
    shared = ""
    if parallel.size() > 1:
        shared = f"; {parallel.size()} processes share {'every batch' if args.num_nets == 1 else 'the networks'}"
    parallel.say(f"{args.num_nets} network(s) {args.model} on {device_name(data.device)}: {args.epochs} epochs of {images} "
                 f"training images of {data.name}, threat model {args.threat_model}; about {estimate} each{shared}")


def check_shares(args, data):
    """Raise InputError where several processes have nothing to share, or share what must stay whole."""
    if args.num_nets > 1:
        return parallel.check_work(args.num_nets, "networks (--num_nets)")
    last = len(data.labels["train"]) % args.batch_train or args.batch_train
    parallel.check_work(min(last, args.batch_train), "images of the last batch of an epoch (--batch_train)")
    if parallel.size() > 1 and mixes_its_batch(network_for(data, args.model, 0)):
        raise InputError(f"--model {args.model} has BatchNorm, whose batches cannot be shared; start one process, or one for "
                         "each of several networks (--num_nets)")


def main():
    args = parse_args()
    device = get_device(parallel.start(args))
    set_precision(choose_precision(args, device))
    data = load_dataset(args.dataset, args.data_path, device)
    data.chunk = parallel.from_chief(lambda: data.chunk)  # another one draws other random starts on CUDA
    parallel.say(data.describe())
    check_threat_model(args.threat_model, data)
    utils.check_network(args.model, data)
    check_shares(args, data)
    if args.test_limit > len(data.labels["test"]):
        raise InputError(f"--test_limit {args.test_limit} is more than the {len(data.labels['test'])} test images")
    if args.aa_limit and find_spec("pyautoattack") is None:
        raise InputError("AutoAttack at the end needs the package pyautoattack; without it choose --aa_limit 0")
    threat = get_threat_model(args.threat_model, data)
    print_plan(args, data)
    if args.compile:
        with parallel.alone() if args.num_nets > 1 else contextlib.nullcontext():
            compile_training(args, data)
    trained = f"PGD-{args.threat_model}" + ("-targeted" if args.targeted else "") if args.attack_steps else "None"
    name = f"full_{args.model}_{data.name}_{data.class_size(0)}_{trained}_seed{args.seed}"
    paths = [Path(args.checkpoint_path) / f"{name}-{k}.pth" for k in range(args.num_nets)]
    folder = Path(args.checkpoint_path) / f"pretrain_{name}"
    held, interrupts = [], Interrupts(parallel.say)

    def begin():
        folder.mkdir(parents=True, exist_ok=True)
        held.append(lock(folder))
        if args.fresh and not parallel.restarted():
            for k, path in enumerate(paths):
                shutil.rmtree(folder / f"net{k}", ignore_errors=True)
                for written in (about_of(path), path):
                    written.unlink(missing_ok=True)

    def work(k):
        with parallel.alone():
            one_network(args, k, data, threat, folder / f"net{k}", paths[k], interrupts)
    try:
        parallel.from_chief(begin)
        if args.num_nets == 1:
            one_network(args, 0, data, threat, folder / "net0", paths[0], interrupts)
        else:
            with interrupts.at_once():
                parallel.deal(args.num_nets, work)
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
        refuse_other_flags(said, vars(args), MAY_CHANGE, str(path), "--fresh to start over")
        return parallel.say(f"{path} is there already")
    start, states = time.perf_counter(), None
    if parallel.chief():
        folder.mkdir(exist_ok=True)
        states = StateFile(folder, args.save_interval)
    net, train_acc = train(args, k, data, threat, states, interrupts)
    with interrupts.at_once():
        (about,) = parallel.deal(1, lambda _: measure(args, k, net, train_acc, data, threat))
    with interrupts.deferred():
        if parallel.chief():
            write_tensors(path, {key: value.cpu() for key, value in net.state_dict().items()})
            write_json(about_of(path), about)
            shutil.rmtree(folder)
    measured = ", ".join(f"{name} {100 * about[key]:.2f} %" for key, name in COLUMNS.items() if key in about)
    autoattack = f", AutoAttack {100 * about['aa_acc']:.2f} % of {about['aa_n']}" if args.aa_limit else ""
    parallel.say(f"{path}: {measured} of {about['n']} test images{autoattack}, in training {100 * train_acc:.2f} %; "
                 f"{duration(time.perf_counter() - start)}")


def measure(args, k, net, train_acc, data, threat):
    """What is known of a network, for the file beside it."""
    images, labels = data.take("test", slice(args.test_limit or None))
    rng = stream(args.seed, "pretrain", k, "test", device=data.device)
    about = {"model": args.model, "dataset": data.name, "num_classes": data.num_classes, "threat_model": args.threat_model,
             "mean": list(data.mean), "std": list(data.std),
             "train_robust_acc": train_acc, "clean_acc": utils.accuracy(net, images, labels),
             **utils.robust_accuracies(net, images, labels, threat, rng, data.chunk), "n": len(labels), "seed": args.seed,
             "flags": vars(args), "versions": versions(), "device": device_name(data.device)}
    if args.aa_limit:
        with no_bf16():
            x_adv = attack_images(net, images[:args.aa_limit], labels[:args.aa_limit], threat, rng, "AA", targeted=False)
        about |= {"aa_acc": utils.accuracy(net, x_adv, labels[:args.aa_limit]), "aa_n": len(x_adv)}
    return about


if __name__ == "__main__":
    run_script(main)
