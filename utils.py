"""What the experiments share of the method: training on a set, accuracy, evaluation, robustness metrics.

Nothing here takes a decision about one outer iteration; that stands in the two ROME scripts.
"""
import itertools
import json
import math
import time
from pathlib import Path

import numpy as np
import torch

from attacks import ATTACKS, attack, check_threat_model
from augment import dsa_apply, dsa_draw, unpack
from runtime import distributed
from runtime.device import MICRO_BATCH
from runtime.compilation import forward, disable_bf16, precision
from formats.network_file import load_into
from runtime.cost import TRAINING_STEP
from network_pool import FixedPool, NetworkPool
from reporting.records import groups_of, mean_of, of_all_images
from runtime.safe_io import InputError
from runtime.seeding import make_generator, derive_seed
from networks import NETWORKS, eval_pool, network_for
from synsets import INITS, LR_SCHEDULES, class_major, label_loss, protocol, start_from, training_set

SELECT_IMAGES = 2000  # real training images on which --select train measures; all of a smaller set
WHITE_BOX = ("FGSM", "PGD", "PGD_L2", "CW", "Deepfool", "AA")  # the grid; the first four are those of the targeted metrics
QUERY = tuple(name for name, attack in ATTACKS.items() if attack.query)


# --------------------------------------------------------------------------------------------- before the first iteration
def check_network(model, data):
    """`network_for`, with an InputError where the images are too small for it. Returns the network."""
    try:
        return network_for(data, model, 0)
    except (ValueError, RuntimeError) as error:
        raise InputError(f"--model {model} cannot take the images of {data.name}, {data.size[0]}x{data.size[1]} "
                         f"({error})") from None


def check_sizes(args, data):
    """Raise InputError for sizes that this data set or this network cannot serve."""
    check_threat_model(args.threat_model, data)
    net = check_network(args.model, data)
    if any(isinstance(layer, torch.nn.BatchNorm2d) for layer in net.modules()) and not args.robust_prior:
        others = ", ".join(name for name in NETWORKS if not name.endswith("BN"))
        raise InputError(f"--model {args.model} has BatchNorm, which the pool does not admit (an embedding would depend on the "
                         f"batch around it); choose one of {others}, or --robust_prior")
    if not range(len(net.features))[:args.embed_last]:
        raise InputError(f"--embed_last {args.embed_last} leaves none of the {len(net.features)} layers of {args.model}; 1000 "
                         "means all")
    if any(side % args.pack for side in data.size):
        raise InputError(f"--pack {args.pack}: images of {data.size[0]}x{data.size[1]} cannot be cut into so many")
    needed = args.ipc * args.pack**2
    for c in range(data.num_classes):
        if data.class_size(c) == 0:
            raise InputError(f"--dataset {data.name}: class {data.classes[c]} has no training image")
        if data.class_size(c) < needed and (args.init == "real" or args.baseline):
            raise InputError(f"--ipc {args.ipc}" + (f" with {args.pack}x{args.pack} packing" if args.pack > 1 else "")
                             + f" takes {needed} real images of each class; class {data.classes[c]} has {data.class_size(c)}: "
                             "choose a smaller --ipc, or --init noise --no_baseline")
    if args.labels == "prior" and not args.robust_prior and not (
            args.Iteration and args.fetch_net_num and args.model_train_steps):
        raise InputError("--labels prior: no network to give the labels; with --Iteration, --fetch_net_num or "
                         "--model_train_steps 0 the pool is not trained: name networks with --robust_prior")
    if args.test_limit > len(data.labels["test"]):
        raise InputError(f"--test_limit {args.test_limit} is more than the {len(data.labels['test'])} test images")
    if args.parallel == "experiments":
        return distributed.require_work(args.num_exp, "experiments (--num_exp)")
    for classes in data.class_groups(args.batch_real):
        distributed.require_work(sum(min(args.batch_real, data.class_size(c)) for c in classes), "real images (--batch_real)")
    if not args.robust_prior and args.fetch_net_num and args.model_train_steps:
        distributed.require_work(min(args.trained_bs, len(data.labels["train"])), "images of the pool's batches (--trained_bs)")


def evaluation_iterations(args):
    """The outer iterations at whose start the set is evaluated. Deviation: always the last one too, which the published code
    misses where --Iteration is no multiple of --eval_interval, or --eval_mode is none of S and SS."""
    regular = range(args.eval_interval, args.Iteration, args.eval_interval) if args.eval_mode in ("S", "SS") else ()
    return {*regular, args.Iteration}


def describe_inputs(args, data):
    """How the data and, with --init FILE, that set were understood, as lines. Raises InputError where it does not fit."""
    lines = [data.describe()]
    if args.init not in INITS:
        one = start_from(args.init, data, args.ipc, args.pack)
        lines += [f"{args.init} taken as: {one.taken_as}", *(f"warning: {warning}" for warning in one.warnings)]
    return lines


def load_robust_prior(args, data, lines=None):
    """The networks of --robust_prior, if any: [(network, robust training accuracy), ...], frozen, in eval mode.

    lines: a list that takes one on how each of them was understood.

    Each has a file of the same name and `.json` beside it, as pretrain.py writes them. Raises InputError that names a network
    of another architecture, data set, class count or threat model, or without such a file.
    """
    networks = []
    for path in map(Path, args.robust_prior):
        about_path = path.with_name(path.name + ".json")
        if not path.is_file():
            raise InputError(f"--robust_prior {path} does not exist or is a folder")
        try:
            about = json.loads(about_path.read_text())
            missing = {"model", "dataset", "num_classes", "threat_model"} - set(about)
            if missing:
                raise KeyError(", ".join(sorted(missing)))
            accuracy = float(about["train_robust_acc"])
            if not 0 <= accuracy <= 1:
                raise ValueError(f"train_robust_acc is {accuracy}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"--robust_prior {path}: {about_path.name}, which says how it was trained, is missing or damaged "
                             f"({type(error).__name__}: {error}); pretrain.py writes it") from None
        wanted = {"model": args.model, "dataset": data.name, "num_classes": data.num_classes,
                  "threat_model": args.threat_model, "mean": list(data.mean), "std": list(data.std)}
        for key, value in wanted.items():
            if about.get(key, value) != value:  # networks of earlier versions do not say their mean and std
                raise InputError(f"--robust_prior {path}: its {key} is {about[key]}, this run's {value}")
        notes = []
        net = load_into(network_for(data, args.model, 0), path, notes).eval()
        if lines is not None:
            lines.append(", ".join([f"{path} taken as: {data.name}", args.model, args.threat_model,
                                    f"{100 * accuracy:.2f} % on its training batches", *notes]))
        networks.append((net.requires_grad_(False), accuracy))
    return networks


def new_pool(args, exp, data, prior):
    """The pool of networks that the robust prior is made with: those of --robust_prior, or one that is trained on the way."""
    if prior:
        return FixedPool(prior)
    decay = {"momentum": 0.9, "weight_decay": 5e-4} if args.net_decay else {}
    return NetworkPool(
        make_net=lambda k: network_for(data, args.model, derive_seed(args.seed, exp, "pool", k)),
        make_optimizer=lambda net: torch.optim.SGD(net.parameters(), lr=args.lr_net, **decay),
        limit=args.net_num)


# ---------------------------------------------------------------------------------- training on a synthetic set, accuracy
def train_on_set(net, images, labels, *, epochs, lr_net, batch_train, dsa_strategy, generator=None,
                 temperature=1.0, lr_schedule="step", attack=None):
    """Train a fresh network on a (synthetic) set, in place. Source: SPEC 3.1.

    images: (N, C, H, W) normalised, already unpacked; labels: (N,), or soft ones as logits (N, num_classes), with their
    temperature (see `label_loss`). epochs: `epochs` + 1 are run, as published. lr_net: of SGD with momentum 0.9 and weight
    decay 5e-4. lr_schedule: "step", a tenth after half of the epochs, as published; "cosine", half a cosine to 0, step by step.
    generator: CPU, for the order and the augmentation; None: one of seed 0. attack: (augmented images, labels (n,)) ->
    attacked ones, for adversarial training. Raises ValueError for an unknown schedule.
    """
    def new_optimizer(lr):
        return torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)

    if lr_schedule not in LR_SCHEDULES:
        raise ValueError(f"unknown learning rate schedule {lr_schedule!r}; choose one of {', '.join(LR_SCHEDULES)}")
    generator = generator or torch.Generator().manual_seed(0)
    net.train()
    optimizer = new_optimizer(lr_net)
    cosine = None
    if lr_schedule == "cosine":
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, (epochs + 1) * math.ceil(len(images) / batch_train))
    for epoch in range(epochs + 1):
        for index in torch.randperm(len(images), generator=generator).split(batch_train):
            batch = images[index.to(images.device)]
            draw = dsa_draw(dsa_strategy, batch.shape[2:], generator, n=len(batch))  # one draw an image: not siamese
            batch, batch_labels = dsa_apply(batch, draw), labels[index.to(labels.device)]
            if attack:
                batch = attack(batch, batch_labels if labels.dim() == 1 else batch_labels.argmax(1))
            loss = label_loss(forward(net, batch), batch_labels, temperature)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if cosine:
                cosine.step()
        if epoch == epochs // 2 + 1 and not cosine:
            optimizer = new_optimizer(lr_net * 0.1)  # QUIRK (published): a new optimiser, so the momentum is lost
    net.eval()


@torch.no_grad()
def accuracy(net, images, labels, micro_batch=1024):
    """The fraction of normalised images (N, C, H, W) that `net`, in eval mode, classifies as labels (N,)."""
    was_training = net.training
    net.eval()
    correct = sum((net(x).argmax(1) == y).sum() for x, y in zip(images.split(micro_batch), labels.split(micro_batch)))
    net.train(was_training)
    return float(correct) / len(labels)


@torch.no_grad()
def wrong_in_bf16_alone(net, images, labels, micro_batch=MICRO_BATCH):
    """Which images `forward` classifies wrong where it computes in bf16, and the network itself right, (N,) bool: what an
    attack in bf16 took for done. None of them elsewhere. Arguments as in `accuracy`."""
    if precision() != "bf16":
        return torch.zeros_like(labels, dtype=torch.bool)
    parts = images.split(micro_batch)
    scores, exact = torch.cat([forward(net, x) for x in parts]), torch.cat([net(x) for x in parts])
    return (scores.argmax(1) != labels) & (exact.argmax(1) == labels)


def robust_accuracies(net, images, labels, threat, generator, micro_batch=MICRO_BATCH):
    """Accuracies (fractions) under PGD with a random start, as the threat model judges: under `published` targeted, 10 steps
    (SPEC 3.1); under `pixel` untargeted, 20 steps, at 2, 4 and 8 of 255. Arguments as in `accuracy`.

    Returns {column: accuracy}; the columns are those of reporting.records.COLUMNS that the threat model has.
    """
    with disable_bf16():
        return {column: accuracy(net, attack(net, images, labels, threat, generator=generator, eps=eps,
                                             micro_batch=micro_batch, **threat.eval_attack), labels) for column, eps in threat.eval_eps.items()}


def diverged(error, args, exp, it):
    """The FloatingPointError that says at which iteration, with which flags, and what may help."""
    return FloatingPointError(
        f"{error} (experiment {exp}, iteration {it}; --lr_img {args.lr_img} --optim {args.optim} --ce_weight {args.ce_weight} "
        f"--align_weight {args.align_weight} --lr_net {args.lr_net}); smaller learning rates may help, with --fresh: the state "
        "saved before is kept, but the same flags lead from there to here")


# ---------------------------------------------------------------------------------------------------- evaluation of a set
class Evaluator:
    """Trains fresh networks on a synthetic set and measures them (SPEC 3.1), as the flags of a run say.

    args: the flags eval_mode, model, num_eval, test_limit, select, seed and those of `train_on_set`. deal: shares the networks
    out among processes, as distributed.map_dynamic does.
    """

    def __init__(self, args, data, threat, deal=distributed.map_dynamic):
        self.deal = deal
        self.data, self.threat, self.seed, self.num_eval = data, threat, args.seed, args.num_eval
        self.models = eval_pool(args.eval_mode, args.model)
        self.networks = len(self.models) * self.num_eval  # that a set is evaluated with
        self.protocol = protocol(args)
        self.test_set = data.get_batch("test", slice(args.test_limit or None))
        self.select_set = None
        if args.select == "train":  # the same images for every run of a data set, so no seed enters
            order = torch.randperm(len(data.labels["train"]), generator=make_generator(0, "select"))
            self.select_set = data.get_batch("train", order[:SELECT_IMAGES])

    def __call__(self, one, pack, *key, select=False):
        """one: a SyntheticSet. pack: how many sub-images stand along each side of its images. key: names the random streams.

        Returns one dict a network: model; clean_acc, clamp_acc (the clamp-only control) and the columns of
        `robust_accuracies`, all fractions of the n test images; select_acc, the mean of those columns on the selection images
        (with --select test or last, on the test images), None unless `select`; seconds.
        """
        images, labels = training_set(one, pack)
        networks = [(model, i) for model in self.models for i in range(self.num_eval)]
        return self.deal(len(networks), lambda k: self._one_network(images, labels, networks[k][0],
                                                                    ("evaluate", *key, *networks[k]), select))

    def constant(self):
        """The rows of a classifier that always gives the same answer: no robust accuracy below it means anything."""
        columns = ("clean_acc", "clamp_acc", *self.threat.eval_eps)
        return [{"model": "-", **dict.fromkeys(columns, 1 / self.data.num_classes), "n": len(self.test_set[1])}]

    def cost(self, trained_on, select=False):
        """Image-gradients of an evaluation of a set of `trained_on` images, sub-images of a packed one."""
        judged = (self.threat.eval_cost + 1) * len(self.test_set[1])
        if select and self.select_set:
            judged += self.threat.eval_cost * len(self.select_set[1])
        return self.networks * (TRAINING_STEP * trained_on * (self.protocol["epochs"] + 1) + judged)

    def _one_network(self, images, labels, model, key, select):
        start, data, threat = time.perf_counter(), self.data, self.threat
        net = network_for(data, model, derive_seed(self.seed, *key, "init"))
        train_on_set(net, images, labels, generator=make_generator(self.seed, *key, "train"), **self.protocol)
        rng = make_generator(self.seed, *key, "attack", device=data.device)
        test_images, test_labels = self.test_set
        robust = robust_accuracies(net, test_images, test_labels, threat, rng, data.micro_batch)
        select_acc = None
        if select:
            judged = robust_accuracies(net, *self.select_set, threat, rng, data.micro_batch) if self.select_set else robust
            select_acc = float(np.mean(list(judged.values())))
        return {
            "model": model,
            "clean_acc": accuracy(net, test_images, test_labels),
            "clamp_acc": accuracy(net, threat.clamp_only(test_images), test_labels),
            **robust,
            "select_acc": select_acc,
            "n": len(test_labels),
            "seconds": round(time.perf_counter() - start, 2),
        }


def save_grids(run, name, images, pack):
    """Write a set as <name>.png in the folder of a run, and a packed one also with its sub-images, <name>_unpacked.png.

    images: (C*ipc, 3, H, W) normalised, class-major."""
    run.save_grid(name, images)
    if pack > 1:
        run.save_grid(f"{name}_unpacked", class_major(unpack(images, pack), len(images)))


# -------------------------------------------------------------------------------------------------- metrics of robustness
def robustness_metrics(clean_acc, attacked_acc, clean_seconds, attacked_seconds, crei_weight=0.5):
    """The metrics of BEARD and ROME, in percent. Source: SPEC 3.3.

    clean_acc: accuracies (fractions), one an IPC setting. attacked_acc: all attacked accuracies of all these settings.
    clean_seconds, attacked_seconds: wall time of the test pass, likewise; of several clean passes of a setting, the fastest.
    crei_weight: of RR against AE in CREI.
    Returns {"RR", "I-RR", "AE", "CREI", "I-CREI"}. RR and I-RR exceed 100 where attacks raise the accuracy.
    Raises ValueError without accuracies, or if the clean accuracy is 0.
    """
    if len(clean_acc) == 0 or len(attacked_acc) == 0:
        raise ValueError("metrics need a clean and an attacked accuracy")
    clean, mean, worst = np.mean(clean_acc), np.mean(attacked_acc), np.min(attacked_acc)
    if clean == 0:
        raise ValueError("metrics are not defined where the clean accuracy is 0")
    unattacked, slowest = np.mean(clean_seconds), np.max(attacked_seconds)
    rr = 0.0 if clean == worst else 1 - (clean - mean) / (clean - worst)
    improved_rr = 1 - (clean - mean) * (clean - worst) / clean**2
    attack_efficiency = 0.0 if slowest <= unattacked else (np.mean(attacked_seconds) - unattacked) / (slowest - unattacked)
    metrics = {"RR": rr, "I-RR": improved_rr, "AE": attack_efficiency,
               "CREI": crei_weight * rr + (1 - crei_weight) * attack_efficiency,
               "I-CREI": crei_weight * improved_rr + (1 - crei_weight) * attack_efficiency}
    return {name: float(100 * value) for name, value in metrics.items()}


def metrics_of(rows, threats, crei_weight):
    """The metrics of SPEC 3.3 for each method, threat model and form, pooled over the IPC settings that are there.

    Only attacks at their default eps count, on as many images as the clean accuracy. An accuracy is the mean over the networks
    of a setting. Each entry says what was
    pooled, what is missing from the published grid, and which attacks raised the accuracy.
    """
    entries, rows = [], of_all_images(rows)
    for name, threat in threats.items():
        groups = groups_of([row for row in rows if row["threat_model"] == name])
        for method in dict.fromkeys(method for method, _ in groups):
            settings = {ipc: groups[m, ipc] for m, ipc in sorted(groups, key=lambda g: (g[0], g[1] or 0)) if m == method}
            settings = {ipc: cells for ipc, cells in settings.items() if ("Clean", None, None) in cells}
            for (kind, grid), targeted in itertools.product((("white-box", WHITE_BOX), ("query", QUERY)), (True, False)):
                grid = [a for a in grid if not targeted or ATTACKS[a].targetable]
                keys = [(a, targeted, ATTACKS[a].eps(threat) if ATTACKS[a].eps else None) for a in grid]
                there = [(ipc, key) for ipc, cells in settings.items() for key in keys if key in cells]
                clean = [settings[ipc]["Clean", None, None] for ipc in settings]
                if not there or not any(mean_of(cell) for cell in clean):  # nothing pooled, or metrics not defined
                    continue
                attacked = [settings[ipc][key] for ipc, key in there]
                entries.append({
                    "dataset": rows[0]["dataset"], "method": method, "threat_model": name, "targeted": targeted, "kind": kind,
                    "ipc": list(settings), "n": attacked[0][0]["n"], "networks": [len(cell) for cell in clean],
                    "attacks": list(dict.fromkeys(key[0] for _, key in there)),
                    "missing": [f"{a} at ipc {ipc}" for ipc in settings for a, key in zip(grid, keys)
                                if (ipc, key) not in there],
                    "raised": [f"{key[0]} at ipc {ipc}" for ipc, key in there if mean_of(settings[ipc][key])
                               > mean_of(settings[ipc]["Clean", None, None])],
                    **robustness_metrics([mean_of(c) for c in clean], [mean_of(a) for a in attacked],
                                         [mean_of(c, "seconds") for c in clean],
                                         [mean_of(a, "seconds") for a in attacked], crei_weight)})
    return entries


def transfer_of(rows, threats):
    """I-RR (percent) by crafting and evaluated method, for each threat model, form and IPC setting (Figure 3 of the paper).

    Of a method with itself only the white-box figures count, where each network is attacked itself.
    """
    entries, clean, rows = [], {}, of_all_images(rows)
    for row in rows:
        if row["attack"] == "Clean":
            clean[row["threat_model"], row["evaluated_on"]] = row["accuracy"]
    methods = {row["evaluated_on"]: (row["method"], row["ipc"]) for row in rows}
    cells = {}
    for row in rows:
        spec = ATTACKS.get(row["attack"])
        evaluated = (row["threat_model"], row["evaluated_on"])
        if spec is None or not clean.get(evaluated) or row["crafted_on"] not in methods:
            continue
        if spec.eps is None or row["eps"] == spec.eps(threats[row["threat_model"]]):
            (crafted_method, crafted_ipc), (method, ipc) = methods[row["crafted_on"]], methods[row["evaluated_on"]]
            if crafted_ipc == ipc and (crafted_method != method or row["crafted_on"] == row["evaluated_on"]):
                cell = cells.setdefault((row["threat_model"], row["targeted"], ipc, crafted_method, method), {})
                cell.setdefault(row["attack"], []).append((row["accuracy"], clean[evaluated]))
    for (threat, targeted, ipc, crafted, method), attacks in cells.items():
        accuracy = [float(np.mean([a for a, _ in pairs])) for pairs in attacks.values()]
        clean_acc = [float(np.mean([c for pairs in attacks.values() for _, c in pairs]))]
        entries.append({"threat_model": threat, "targeted": targeted, "ipc": ipc, "crafted_on": crafted, "evaluated_on": method,
                        "attacks": list(attacks),
                        "I-RR": robustness_metrics(clean_acc, accuracy, [0.0], [0.0])["I-RR"]})
    return entries
