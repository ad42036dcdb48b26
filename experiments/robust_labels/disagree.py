"""Choose the real images on which the teachers and a student disagree most (a step of study.sh).

    PYTHONPATH=. python experiments/robust_labels/disagree.py OUT TEACHER... --students STUDENT...

OUT is a file for `ROME_cifar10.py --init`. It holds one set for each student: 10 stored images a
class, packed 4x4 unless --pack says otherwise. A student is a network that learned the teachers'
labels of random images. Images are compared as they will be stored, after packing and unpacking.
"""
import argparse

import torch
import torch.nn.functional as F

from augment import pack, unpack
from datasets import load_dataset
from formats.network_file import load_into
from formats.synset_file import SyntheticSet, save_synset
from networks import network_for
from synsets import soft_labels

IPC = 10  # stored images a class
TEMPERATURE = 3
MICRO_BATCH = 512  # images that go through the networks at a time


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", help="the file to write")
    parser.add_argument("teachers", nargs="+", help="robust ConvNetW32 networks (.pth)")
    parser.add_argument("--students", nargs="+", required=True, help="ConvNetW32 networks (.pth)")
    parser.add_argument("--pack", type=int, default=4, help="K x K real images in a stored one")
    parser.add_argument("--data_path", default="./data")
    return parser.parse_args()


def disagreement(teachers, student, images):
    """KL(teachers || student) of each image, (N,): of softmax(logits / TEMPERATURE), the teachers'
    logits averaged. images: normalised, (N, 3, H, W)."""
    taught = F.log_softmax(soft_labels(teachers, images, MICRO_BATCH) / TEMPERATURE, 1)
    learned = F.log_softmax(soft_labels([student], images, MICRO_BATCH) / TEMPERATURE, 1)
    return F.kl_div(learned, taught, reduction="none", log_target=True).sum(1)


def chosen_images(data, teachers, student, side):
    """The chosen images of each class, packed side x side: (C * IPC, 3, H, W)."""
    stored = []
    for c in range(data.num_classes):
        images = data.get_batch("train", data.labels["train"] == c)[0]
        images = images[:len(images) // side**2 * side**2]  # whole stored images
        as_stored = unpack(pack(images, side), side)
        most = disagreement(teachers, student, as_stored).topk(IPC * side**2).indices
        stored.append(pack(images[most], side))
    return torch.cat(stored)


def main():
    args = parse_args()
    data = load_dataset("CIFAR10", args.data_path)

    def load(path):
        return load_into(network_for(data, "ConvNetW32", 0), path).eval()

    teachers = [load(path) for path in args.teachers]
    labels = torch.arange(data.num_classes).repeat_interleave(IPC)
    sets = []
    for path in args.students:
        images = chosen_images(data, teachers, load(path), args.pack)
        sets.append(SyntheticSet(images, labels, None))
    save_synset(args.out, sets, [], {"dataset": "CIFAR10", "model": "ConvNetW32",
                                     "method": "Disagree", "pack": args.pack,
                                     "packed": args.pack > 1})


if __name__ == "__main__":
    main()
