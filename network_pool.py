"""The pool of networks that the robust prior is made with: who is in it, who leaves, what a saved state has of it."""
from dataclasses import dataclass

import torch


@dataclass
class PoolMember:
    """A network of the pool, its optimiser, and its running count of right answers on the batches it was trained on."""

    net: torch.nn.Module
    optimizer: torch.optim.Optimizer
    correct: torch.Tensor  # () float, on the device
    seen: int = 0

    def record(self, right, seen):
        """Count the right answers to one training batch. right: a () tensor, of `seen` images."""
        self.correct += right
        self.seen += seen

    def running_accuracy(self):
        """Percent, 0 to 100, as a () tensor; 0 before the first batch (w_f of SPEC 1)."""
        return 100 * self.correct / max(self.seen, 1)


class NetworkPool:
    """The networks that the robust prior is made with: at most `limit`, the oldest leave first. Source: SPEC 1.1.

    make_net: int (how many were made before) -> network; make_optimizer: network -> optimiser.
    """

    fixed = False

    def __init__(self, make_net, make_optimizer, limit, start=3):
        self.make_net, self.make_optimizer, self.limit = make_net, make_optimizer, limit
        self.members, self.made = [], 0
        self.push(start)

    def push(self, count):
        """Add `count` fresh networks and drop the oldest beyond the limit."""
        for _ in range(count):
            net = self.make_net(self.made)
            device = next(net.parameters()).device
            self.members.append(PoolMember(net, self.make_optimizer(net), torch.zeros((), device=device)))
            self.made += 1
        del self.members[:-self.limit]

    def sample(self, count, generator, begin=0, end=None):
        """`count` different members at random (all, shuffled, if there are fewer).

        begin, end: choose from this slice of the pool, oldest first, if it holds more than 10 members.
        """
        sliced = self.members[begin:end]
        candidates = sliced if len(sliced) > 10 else self.members
        order = torch.randperm(len(candidates), generator=generator)[:count]
        return [candidates[i] for i in order.tolist()]

    def reset_running_accuracy(self):
        for member in self.members:
            member.correct.zero_()
            member.seen = 0

    def state_dict(self):
        """The whole pool, as plain values and tensors."""
        return {"made": self.made, "members": [{"net": m.net.state_dict(), "optimizer": m.optimizer.state_dict(),
                                                "correct": m.correct, "seen": m.seen} for m in self.members]}

    def load_state_dict(self, state):
        """Become the pool of a `state_dict`."""
        self.members, self.made = [], state["made"] - len(state["members"])
        self.push(len(state["members"]))
        for member, saved in zip(self.members, state["members"]):
            member.net.load_state_dict(saved["net"])
            member.optimizer.load_state_dict(saved["optimizer"])
            member.correct.copy_(saved["correct"])
            member.seen = saved["seen"]


class FixedPool(NetworkPool):
    """Networks that are used as they are: no push, no training, and a running accuracy that stays.

    networks: (network, its robust training accuracy as a fraction) each.
    """

    fixed = True

    def __init__(self, networks):
        self.members = [PoolMember(net, None, torch.tensor(accuracy, device=next(net.parameters()).device), seen=1)
                        for net, accuracy in networks]

    def push(self, count):
        pass

    def reset_running_accuracy(self):
        pass

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass
