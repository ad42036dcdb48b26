"""Real images on which teachers and a student disagree most, packed 4x4, as a file for --init (a step of study.sh).

    PYTHONPATH=. python disagree.py OUT TEACHER... --students STUDENT...

One set of 10 stored images a class for each student, a network that learned the teachers' labels of random images. The images
are judged as they will be stored: packed and unpacked. Disagreement: the Kullback-Leibler divergence of the softmax of the
teachers' mean logits from that of the student's, at temperature 3.
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

parser = argparse.ArgumentParser()
parser.add_argument("out")
parser.add_argument("teachers", nargs="+")
parser.add_argument("--students", nargs="+")
args = parser.parse_args()
data, ipc, k = load_dataset("CIFAR10", "./data"), 10, 4
teachers, *students = [[load_into(network_for(data, "ConvNetW32", 0), path).eval() for path in paths]
                       for paths in (args.teachers, *([path] for path in args.students))]
sets = []
for student in students:
    stored = []
    for c in range(data.num_classes):
        images = data.get_batch("train", data.labels["train"] == c)[0]
        images = images[:len(images) // k**2 * k**2]
        coarse = unpack(pack(images, k), k)
        said, learned = (F.log_softmax(soft_labels(nets, coarse, 512) / 3, 1) for nets in (teachers, student))
        most = F.kl_div(learned, said, reduction="none", log_target=True).sum(1).topk(ipc * k**2).indices
        stored.append(pack(images[most], k))
    sets.append(SyntheticSet(torch.cat(stored), torch.arange(data.num_classes).repeat_interleave(ipc), None))
save_synset(args.out, sets, [], {"dataset": "CIFAR10", "model": "ConvNetW32", "method": "Disagree", "pack": k, "packed": True})
