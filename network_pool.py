"""The pool of networks that the synthetic images are matched on. Source: SPEC 1.1."""
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from formats.network_file import load_into
from networks import network_for
from runtime.safe_io import InputError


@dataclass
class PoolMember:
    """A network, its optimizer, and how many images of its training batches it got right."""

    net: torch.nn.Module
    optimizer: torch.optim.Optimizer
    correct: torch.Tensor  # () float, on the device
    seen: int = 0

    def count(self, correct, seen):
        """Add a training batch of `seen` images, of which `correct`, a () tensor, were right."""
        self.correct += correct
        self.seen += seen

    def running_accuracy(self):
        """Percent, 0 to 100, as a () tensor; 0 before the first batch (w_f of SPEC 1)."""
        return 100 * self.correct / max(self.seen, 1)


class NetworkPool:
    """Networks that are trained on the way: at most `limit`, the oldest leave first.

    make_net: how many were made before -> network. make_optimizer: network -> optimizer.
    """

    is_trained = True

    def __init__(self, make_net, make_optimizer, limit, start=3, slice_min=10):
        self.make_net, self.make_optimizer = make_net, make_optimizer
        self.limit, self.slice_min = limit, slice_min
        self.members, self.num_created = [], 0
        self.push(start)

    def push(self, count):
        """Add `count` fresh networks and drop the oldest beyond the limit."""
        for _ in range(count):
            net = self.make_net(self.num_created)
            correct = torch.zeros((), device=next(net.parameters()).device)
            self.members.append(PoolMember(net, self.make_optimizer(net), correct))
            self.num_created += 1
        del self.members[:-self.limit]

    def sample(self, count, generator, begin=0, end=None):
        """`count` different members in random order, or all of them if there are fewer.

        begin, end: sample from this slice, oldest first, if more than `slice_min` are in it.
        """
        candidates = self.members[begin:end]
        if len(candidates) <= self.slice_min:
            candidates = self.members
        order = torch.randperm(len(candidates), generator=generator)[:count]
        return [candidates[i] for i in order.tolist()]

    def reset_running_accuracy(self):
        for member in self.members:
            member.correct.zero_()
            member.seen = 0

    def state_dict(self):
        members = [{"net": member.net.state_dict(), "optimizer": member.optimizer.state_dict(),
                    "correct": member.correct, "seen": member.seen} for member in self.members]
        return {"num_created": self.num_created, "members": members}

    def load_state_dict(self, state):
        count = len(state["members"])
        self.members, self.num_created = [], state["num_created"] - count
        self.push(count)
        for member, saved in zip(self.members, state["members"]):
            member.net.load_state_dict(saved["net"])
            member.optimizer.load_state_dict(saved["optimizer"])
            member.correct.copy_(saved["correct"])
            member.seen = saved["seen"]


class PretrainedPool(NetworkPool):
    """The networks of --robust_prior: never renewed, never trained, with a fixed accuracy.

    networks: (network, its robust training accuracy, a fraction) each.
    """

    is_trained = False

    def __init__(self, networks, slice_min=10):
        self.slice_min = slice_min
        self.members = [
            PoolMember(net, None, torch.tensor(accuracy, device=next(net.parameters()).device), 1)
            for net, accuracy in networks]

    def push(self, count):
        pass

    def reset_running_accuracy(self):
        pass

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


# ------------------------------------------------------------------------ files of pretrain.py
def load_prior_networks(paths, model, data, threat_name):
    """Networks of pretrain.py, frozen and in eval mode, each with the `.json` beside it.

    Returns [(network, robust training accuracy), ...] and a line on each of them. Raises InputError
    for a network of another architecture, data set or threat model, or one without its `.json`.
    """
    networks, lines = [], []
    expected = {"model": model, "dataset": data.name, "num_classes": data.num_classes,
                "threat_model": threat_name, "mean": list(data.mean), "std": list(data.std)}
    for path in paths:
        accuracy = read_prior_record(path, expected)
        notes = []
        net = load_into(network_for(data, model, 0), path, notes).eval().requires_grad_(False)
        networks.append((net, accuracy))
        lines.append(", ".join([f"{path} taken as: {data.name}", model, threat_name,
                                f"{100 * accuracy:.2f} % on its training batches", *notes]))
    return networks, lines


def read_prior_record(path, expected):
    """The robust training accuracy, a fraction, in the `.json` beside a network of `expected`."""
    where = f"--robust_prior {path}"
    try:
        about = json.loads(Path(f"{path}.json").read_text())
        about = {"mean": expected["mean"], "std": expected["std"], **about}  # older ones lack them
        found, accuracy = [about[key] for key in expected], float(about["train_robust_acc"])
        if not 0 <= accuracy <= 1:
            raise ValueError(f"train_robust_acc is {accuracy}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{where}: the .json of pretrain.py beside it is missing or damaged "
                         f"({type(error).__name__}: {error})") from None
    for value, (key, ours) in zip(found, expected.items()):
        if value != ours:
            raise InputError(f"{where}: its {key} is {value}, this run's {ours}")
    return accuracy
