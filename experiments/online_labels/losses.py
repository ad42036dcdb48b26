"""What a term beside the labels adds: differences at x +- d, features, moved images.

    PYTHONPATH=. python experiments/online_labels/losses.py SET LABELLER TERM,STRENGTH...

The protocol of study.sh with ConvNetW32 and 1 000 steps, on the first set of a file; PGD-20 on the
first 1 000 test images. Terms, d = 8/255 for each pixel with a sign of its own:

signs      STRENGTH x squared difference of f(x + d) - f(x - d) between student and labeller
features   STRENGTH x squared difference of the last features, the student's through a linear layer
fgsm       no term: the batch is moved first, STRENGTH/255 up the labeller's own cross-entropy
labels     the protocol alone
"""
import argparse
import json
import time

import torch
import torch.nn.functional as F
from torch import nn

from attacks import get_threat_model
from datasets import load_dataset
from formats.network_file import load_into
from networks import network_for
from runtime.compilation import compile_batches, set_precision
from runtime.seeding import derive_seed, make_generator
from synsets import TrainConfig, label_loss, load_synset
from utils import warm_cosine, accuracy, augmented_batches, robust_accuracies

STEPS, RADIUS = 1000, 8 / 255


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("set")
    parser.add_argument("labeller", help="a ConvNetW32 (.pth)")
    parser.add_argument("terms", nargs="+", metavar="TERM,STRENGTH")
    parser.add_argument("--data_path", default="./data")
    return parser.parse_args()


def train(term, strength, data, images, labels, labeller):
    net = network_for(data, "ConvNetW32", derive_seed(0, "losses"))
    adaptor = nn.Linear(512, 512)
    config = TrainConfig(STEPS - 1, 0.2, 100, "crop_flip_scale_rotate", 3.0, "cosine",
                         "cutmix_mixup", warm_up=0.1)
    optimizer = torch.optim.SGD([*net.parameters(), *adaptor.parameters()], config.lr_net,
                                momentum=0.9, weight_decay=5e-4)
    schedule = warm_cosine(optimizer, STEPS, STEPS // 10)
    std = torch.tensor(data.std).view(1, -1, 1, 1)
    generator = make_generator(0, "losses")
    signs = make_generator(0, "losses", "signs")
    compile_batches(net, images.shape[1:], trained=[100])
    compile_batches(labeller, images.shape[1:], scored=[100], trained=[100])
    net.train()
    for epoch in augmented_batches(images, labels, config, generator, [labeller]):
        for x, y in epoch:
            if term == "fgsm":
                x.requires_grad_()
                scores = labeller(x)
                move, = torch.autograd.grad(F.cross_entropy(scores, scores.argmax(1)), x)
                x = x.detach() + strength / 255 / std * move.sign()
                y = labeller(x).detach()
            loss = label_loss(net(x), y, config.temperature)
            if term == "signs":
                d = RADIUS / std * torch.randn(x.shape, generator=signs).sign()
                plus, minus = net(x + d), net(x - d)
                with torch.no_grad():
                    wanted = labeller(x + d) - labeller(x - d)
                loss = loss + strength * (plus - minus - wanted).square().mean()
            if term == "features":
                with torch.no_grad():
                    wanted = labeller.embed_and_classify(x)[0]
                features = adaptor(net.embed_and_classify(x)[0])
                loss = loss + strength * (features - wanted).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return net.eval()


def main():
    args = parse_args()
    torch.set_num_threads(1)
    set_precision("bf16")
    data = load_dataset("CIFAR10", args.data_path, torch.device("cpu"))
    threat = get_threat_model("pixel", data)
    test, classes = data.get_batch("test", slice(1000))
    images, labels, _ = load_synset(args.set)
    labeller = load_into(network_for(data, "ConvNetW32", 0), args.labeller).eval()
    labeller.requires_grad_(False)
    for given in args.terms:
        term, strength = given.split(",")
        start = time.time()
        net = train(term, float(strength), data, images, labels, labeller)
        seconds = round(time.time() - start)
        row = {"clean": accuracy(net, test, classes),
               **robust_accuracies(net, test, classes, threat, make_generator(0, "a"), 64)}
        print(json.dumps({"term": given, **row, "seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
