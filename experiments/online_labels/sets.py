"""Sets of images that are not distilled, for study.sh: which images do labels at every input need?

    PYTHONPATH=. python experiments/online_labels/sets.py OUT [--images real] [--pack 2] ...

OUT holds --sets sets of 10 images a class, each from a seed of its own. Their classes are those of
the images, or, of noise and repeated images, without meaning.
"""
import argparse

import torch

from datasets import dataset_name, load_dataset
from formats.network_file import load_into
from formats.synset_file import SyntheticSet, save_synset
from networks import network_for
from runtime.seeding import make_generator
from synsets import TrainConfig, initial_set
from utils import augmented_batches


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("out", help="the file to write")
    add("--dataset", default="CIFAR10")
    add("--images", choices=("real", "noise", "repeated"), default="real",
        help="repeated: --distinct real images, again and again")
    add("--ipc", type=int, default=10)
    add("--pack", type=int, default=1, help="K x K real images in a stored one")
    add("--distinct", type=int, default=1)
    add("--views", type=int, default=0,
        help="store so many augmented, mixed copies of each image, with the logits of --teachers")
    add("--teachers", nargs="+", default=[], help="ConvNetW32 networks (.pth)")
    add("--sets", type=int, default=3)
    add("--data_path", default="./data")
    return parser.parse_args()


def make_images(args, data, exp):
    """(images, classes) of one set, class-major."""
    generator = make_generator(0, "online_labels", args.images, args.ipc, args.pack, exp)
    if args.images != "repeated":
        return initial_set(data, args.ipc, args.pack, args.images, generator)
    count = len(data.labels["train"])
    index = torch.randperm(count, generator=generator)[:args.distinct]
    images = data.get_batch("train", index)[0]
    classes = torch.arange(data.num_classes).repeat_interleave(args.ipc)
    return images.repeat(-(-len(classes) // len(images)), 1, 1, 1)[:len(classes)], classes


def make_views(args, teachers, images, classes, exp):
    """What a student sees in --views epochs, with the mean logits of the teachers.

    A SyntheticSet; its classes have no meaning, since a view may show two images.
    """
    config = TrainConfig(args.views - 1, batch_train=len(images), mix="cutmix_mixup",
                         dsa_strategy="crop_flip_scale_rotate")
    generator = make_generator(0, "online_labels", "views", args.views, exp)
    batches = augmented_batches(images, classes, config, generator, teachers)
    views, labels = zip(*(batch for epoch in batches for batch in epoch))
    return SyntheticSet(torch.cat(views), classes.repeat(args.views), torch.cat(labels))


def main():
    args = parse_args()
    data = load_dataset(dataset_name(args.dataset), args.data_path)
    teachers = [load_into(network_for(data, "ConvNetW32", 0), path).eval()
                for path in args.teachers]
    sets = []
    for exp in range(args.sets):
        images, classes = make_images(args, data, exp)
        sets.append(make_views(args, teachers, images, classes, exp) if args.views
                    else SyntheticSet(images, classes))
    meta = {"dataset": data.name, "pack": args.pack, "packed": args.pack > 1, "zca": False,
            "mean": list(data.mean), "std": list(data.std)}
    save_synset(args.out, sets, [], meta)


if __name__ == "__main__":
    main()
