"""The pool of networks."""

import copy

import torch

from network_pool import NetworkPool
from networks import get_network


def make_pool(limit=100):
    return NetworkPool(lambda k: torch.nn.Linear(1, 1, bias=False),
                         lambda net: torch.optim.SGD(net.parameters(), lr=0.1), limit)


def test_pool_starts_with_three_and_drops_the_oldest():
    pool = make_pool(limit=5)
    assert len(pool.members) == 3
    first = pool.members[:3]
    pool.push(2)
    assert pool.members[:3] == first
    pool.push(1)
    assert len(pool.members) == 5 and pool.members[:2] == first[1:] and pool.made == 6


def test_pool_choice():
    pool, generator = make_pool(), torch.Generator().manual_seed(0)
    assert len(pool.sample(2, generator)) == 2 and len(pool.sample(50, generator)) == 3
    pool.push(27)
    seen = {id(m) for _ in range(200) for m in pool.sample(2, generator, begin=5, end=20)}
    assert seen == {id(m) for m in pool.members[5:20]}
    seen = {id(m) for _ in range(400) for m in pool.sample(2, generator, begin=5, end=15)}  # 10 remain: the slice is ignored
    assert seen == {id(m) for m in pool.members}
    assert all(len({id(m) for m in pool.sample(4, generator)}) == 4 for _ in range(50))


def test_running_accuracy_is_a_percentage():
    pool = make_pool()
    member = pool.members[0]
    assert member.running_accuracy() == 0
    member.record(torch.tensor(3), 4)
    member.record(torch.tensor(1), 4)
    assert member.running_accuracy() == 50  # 4 of 8
    pool.reset_running_accuracy()
    assert member.running_accuracy() == 0


def test_pool_round_trip():
    def pool():
        return NetworkPool(lambda k: get_network("MLP", 3, 10, (8, 8), seed=k),
                             lambda net: torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9), limit=4, start=6)
    def train(member):
        member.optimizer.zero_grad()
        member.net(torch.ones(2, 3, 8, 8)).sum().backward()
        member.optimizer.step()

    first = pool()
    for member in first.members:
        train(member)
        member.record(torch.tensor(1), 2)
    second = pool()
    second.push(3)
    second.load_state_dict(copy.deepcopy(first.state_dict()))  # as from a file: nothing shared
    assert second.made == 6 and [m.seen for m in second.members] == [2] * 4
    for a, b in zip(first.members, second.members):
        for member in (a, b):
            train(member)
        assert all(torch.equal(p, q) for p, q in zip(a.net.parameters(), b.net.parameters()))
        assert a.running_accuracy() == b.running_accuracy() == 50
