"""Training on a synthetic set, accuracy, the evaluation of a set, the metrics of robustness."""
import math
import time

import numpy as np
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from attacks import attack
from augment import dsa_apply, dsa_draw, dsa_to_device, mix_apply, mix_draw
from networks import eval_pool, network_for
from runtime import distributed
from runtime.compilation import disable_bf16, forward, precision
from runtime.cost import TRAINING_STEP
from runtime.cuda_graphs import graphed_call
from runtime.device import MICRO_BATCH, copy_to_device
from runtime.seeding import derive_seed, make_generator
from runtime.training import step_on_set
from synsets import LR_SCHEDULES, TrainConfig, label_loss, build_labellers, training_set

SELECT_IMAGES = 2000  # real training images on which --select train measures
EPOCHS_AHEAD = 50  # of which the random numbers are drawn at once


# -------------------------------------------------------------- training on a set, and accuracy
def train_on_set(net, images, labels, config=TrainConfig(), generator=None, labellers=()):
    """Train a fresh network on a (synthetic) set, in place. Source: SPEC 3.1.

    images: (N, C, H, W) normalised, already unpacked. labels: (N,), or soft ones as logits
    (N, num_classes). config: a TrainConfig. generator: CPU, for the order and the augmentation;
    None: one of seed 0. labellers: networks whose mean logits label every batch as the network
    sees it, after augmentation, mixing and noise; `labels` has no part then. Raises ValueError for
    an unknown schedule.
    """
    if config.lr_schedule not in LR_SCHEDULES:
        raise ValueError(f"unknown learning rate schedule {config.lr_schedule!r}; choose one of "
                         f"{', '.join(LR_SCHEDULES)}")
    generator = generator or torch.Generator().manual_seed(0)
    net.train()
    optimizer, cosine, average = _optimizer(net, config.lr_net), None, None
    if config.lr_schedule == "cosine":
        steps = (config.epochs + 1) * math.ceil(len(images) / config.batch_train)
        cosine = warm_cosine(optimizer, steps, math.ceil(config.warm_up * steps))
    if config.ema:
        average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(config.ema),
                                use_buffers=True)
    epochs = augmented_batches(images, labels, config, generator, labellers)
    for epoch, batches in enumerate(epochs):
        for batch, batch_labels in batches:
            step_on_set(net, optimizer, batch, batch_labels, label_loss, config.temperature)
            if cosine:
                cosine.step()
            if average:
                average.update_parameters(net)
        if epoch == config.epochs // 2 + 1 and not cosine:
            # QUIRK (published): no momentum is kept
            optimizer = _optimizer(net, config.lr_net * 0.1)
    if average:
        net.load_state_dict(average.module.state_dict())
    net.eval()


def _optimizer(net, lr):
    return torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)


def warm_cosine(optimizer, steps, warm):
    """A learning rate that rises for `warm` steps, and falls to 0 in the others."""
    cosine = CosineAnnealingLR(optimizer, max(steps - warm, 1))
    if not warm:
        return cosine
    return SequentialLR(optimizer, [LinearLR(optimizer, 1 / warm, 1, warm), cosine], [warm])


def augmented_batches(images, labels, config, generator, labellers=()):
    """For each epoch its batches, as a network sees them: [(images, labels), ...].

    Arguments of `train_on_set`. Random numbers are drawn for many epochs ahead, in the order of
    the batches, and copied without making the host wait for the device of `images`.
    """
    noise_rng = torch.Generator(images.device)
    if config.noise:
        noise_rng.manual_seed(torch.randint(2**62, (), generator=generator).item())

    def augmented(index, dsa, mix):
        batch = dsa_apply(images[index], dsa)  # one draw an image: not siamese
        if not labellers:
            return batch, labels[index]
        batch = add_noise(mix_apply(batch, mix), config.noise, noise_rng)
        return batch, online_labels(labellers, batch)

    for start in range(0, config.epochs + 1, EPOCHS_AHEAD):
        orders, dsa, mixes = [], [], []
        for _ in range(start, min(start + EPOCHS_AHEAD, config.epochs + 1)):
            orders.append(torch.randperm(len(images), generator=generator))
            for index in orders[-1].split(config.batch_train):
                n, size = len(index), images.shape[2:]
                dsa.append(dsa_draw(config.dsa_strategy, size, generator, n=n))
                mixes.append(mix_draw(config.mix, size, generator, n))
        draws = iter(zip(dsa_to_device(dsa, images.device), mixes))
        for order in copy_to_device(torch.stack(orders), images.device):
            yield (augmented(index, *next(draws)) for index in order.split(config.batch_train))


def add_noise(x, std, generator):
    """x plus normal noise of this standard deviation, drawn on its device."""
    if not std:
        return x
    return x + std * torch.randn(x.shape, generator=generator, device=x.device)


@torch.no_grad()
def online_labels(labellers, x):
    """The mean logits (N, num_classes) that networks in eval mode give images x (N, C, H, W)."""
    def scores(net, x):
        return forward(net, x),
    return torch.stack([graphed_call(scores, ("labels",), net, x)[0] for net in labellers]).mean(0)


@torch.no_grad()
def accuracy(net, images, labels, micro_batch=1024):
    """The fraction of normalised images (N, C, H, W) that `net`, in eval mode, gets right."""
    was_training = net.training
    net.eval()
    batches = zip(images.split(micro_batch), labels.split(micro_batch))
    correct = sum((net(x).argmax(1) == y).sum() for x, y in batches)
    net.train(was_training)
    return float(correct) / len(labels)


def robust_accuracies(net, images, labels, threat, generator, micro_batch=MICRO_BATCH):
    """Accuracies (fractions) under the threat model's `eval_attack`, PGD with a random start.

    `published`: targeted, 10 steps (SPEC 3.1); `pixel`: untargeted, 20 steps, at 2, 4 and 8 of 255.
    Returns {column: accuracy}, columns of runtime.measures.
    """
    accuracies = {}
    with disable_bf16():
        for column, eps in threat.eval_eps.items():
            x_adv = attack(net, images, labels, threat, eps=eps, generator=generator,
                           micro_batch=micro_batch, **threat.eval_attack)
            accuracies[column] = accuracy(net, x_adv, labels)
    return accuracies


@torch.no_grad()
def wrong_only_in_bf16(net, images, labels, micro_batch=MICRO_BATCH):
    """Which images are wrong where `forward` computes in bf16, and right in fp32: (N,) bool."""
    if precision() != "bf16":
        return torch.zeros_like(labels, dtype=torch.bool)
    parts = images.split(micro_batch)
    in_bf16, in_fp32 = (torch.cat([f(x) for x in parts]).argmax(1) == labels
                        for f in (lambda x: forward(net, x), net))
    return ~in_bf16 & in_fp32


# ------------------------------------------------------------------------- evaluation of a set
def train_config(args):
    """How the flags of a ROME script say that a set is trained on."""
    return TrainConfig(args.epoch_eval_train, args.lr_net, args.batch_train, args.dsa_strategy,
                       args.label_temperature, args.lr_schedule, args.mix, args.noise, args.ema,
                       args.warm_up)


class Evaluator:
    """Trains fresh networks on a synthetic set and measures them (SPEC 3.1).

    args: flags of a ROME script: eval_mode, model, num_eval, test_limit, select, seed and those of
    `train_config`. map_dynamic: shares the networks out among processes.
    """

    def __init__(self, args, data, threat, micro_batch=MICRO_BATCH,
                 map_dynamic=distributed.map_dynamic):
        self.data, self.threat, self.seed = data, threat, args.seed
        self.micro_batch, self.map_dynamic = micro_batch, map_dynamic
        self.config = train_config(args)
        models = eval_pool(args.eval_mode, args.model)
        self.networks = [(model, i) for model in models for i in range(args.num_eval)]
        self.num_networks = len(self.networks)  # that a set is evaluated with
        self.test_set = data.get_batch("test", slice(args.test_limit or None))
        self.select_set = None
        if args.select == "train":  # the same images for every run of a data set: no seed enters
            generator = make_generator(0, "select")
            order = torch.randperm(len(data.labels["train"]), generator=generator)
            self.select_set = data.get_batch("train", order[:SELECT_IMAGES])

    def __call__(self, synset, pack, *key, select=False):
        """One dict for each network. synset: a SyntheticSet. key: names the random generators.

        Keys: model; bytes, of `SyntheticSet.stored_bytes`; clean_acc, clamp_acc (the clamp-only
        control) and those of `robust_accuracies`, fractions of the n test images; select_acc, the
        mean of the robust ones on the selection images (test images with --select test or last),
        None unless `select`; seconds.
        """
        images, labels = (x.to(self.data.device) for x in training_set(synset, pack))
        train_set = images, labels, build_labellers(synset, self.data.device)

        def evaluate_one(k):
            key_of_network = ("evaluate", *key, *self.networks[k])
            row = self._evaluate_network(train_set, self.networks[k][0], key_of_network, select)
            return {**row, "bytes": synset.stored_bytes()}
        return self.map_dynamic(self.num_networks, evaluate_one)

    def _evaluate_network(self, train_set, model, key, select):
        images, labels, labellers = train_set
        start, data, threat = time.perf_counter(), self.data, self.threat
        net = network_for(data, model, derive_seed(self.seed, *key, "init"))
        train_on_set(net, images, labels, self.config, make_generator(self.seed, *key, "train"),
                     labellers=labellers)
        generator = make_generator(self.seed, *key, "attack", device=data.device)
        test_images, test_labels = self.test_set
        robust = robust_accuracies(net, test_images, test_labels, threat, generator,
                                   self.micro_batch)
        select_acc = None
        if select:
            measured = robust
            if self.select_set:
                measured = robust_accuracies(net, *self.select_set, threat, generator,
                                             self.micro_batch)
            select_acc = float(np.mean(list(measured.values())))
        clamped = threat.clamp_only(test_images)
        return {"model": model, "clean_acc": accuracy(net, test_images, test_labels),
                "clamp_acc": accuracy(net, clamped, test_labels), **robust,
                "select_acc": select_acc, "n": len(test_labels),
                "seconds": round(time.perf_counter() - start, 2)}

    def constant(self):
        """The row of a constant classifier: no robust accuracy below it means anything."""
        columns = ("clean_acc", "clamp_acc", *self.threat.eval_eps)
        chance = dict.fromkeys(columns, 1 / self.data.num_classes)
        return [{"model": "-", **chance, "n": len(self.test_set[1])}]

    def cost(self, trained_on, select=False):
        """Forward-backward passes of an evaluation of a set of `trained_on` unpacked images."""
        tested = (self.threat.eval_cost + 1) * len(self.test_set[1])
        if select and self.select_set:
            tested += self.threat.eval_cost * len(self.select_set[1])
        trained = TRAINING_STEP * trained_on * (self.config.epochs + 1)
        return self.num_networks * (trained + tested)


# ------------------------------------------------------------------------ metrics of robustness
def robustness_metrics(clean_acc, attacked_acc, clean_seconds, attacked_seconds, crei_weight=0.5):
    """The metrics of BEARD and ROME, in percent. Source: SPEC 3.3.

    clean_acc: accuracies (fractions), one an IPC setting. attacked_acc: all attacked accuracies of
    all these settings. clean_seconds, attacked_seconds: wall time of the test pass, likewise; of
    several clean passes of a setting, the fastest. crei_weight: of RR against AE in CREI.
    Returns {"RR", "I-RR", "AE", "CREI", "I-CREI"}. RR and I-RR exceed 100 where attacks raise the
    accuracy. Raises ValueError without accuracies, or if the clean accuracy is 0.
    """
    if len(clean_acc) == 0 or len(attacked_acc) == 0:
        raise ValueError("metrics need a clean and an attacked accuracy")
    clean, mean, worst = np.mean(clean_acc), np.mean(attacked_acc), np.min(attacked_acc)
    if clean == 0:
        raise ValueError("metrics are not defined where the clean accuracy is 0")
    unattacked, slowest = np.mean(clean_seconds), np.max(attacked_seconds)
    rr = 0.0 if clean == worst else 1 - (clean - mean) / (clean - worst)
    improved_rr = 1 - (clean - mean) * (clean - worst) / clean**2
    efficiency = 0.0
    if slowest > unattacked:
        efficiency = (np.mean(attacked_seconds) - unattacked) / (slowest - unattacked)
    metrics = {"RR": rr, "I-RR": improved_rr, "AE": efficiency,
               "CREI": crei_weight * rr + (1 - crei_weight) * efficiency,
               "I-CREI": crei_weight * improved_rr + (1 - crei_weight) * efficiency}
    return {name: float(100 * value) for name, value in metrics.items()}
