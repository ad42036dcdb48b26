"""The pool of networks, and the networks of --robust_prior (read: tests/test_pretrain.py)."""
import copy

import torch

from network_pool import NetworkPool
from networks import get_network


def make_pool(**options):
    return NetworkPool(lambda k: torch.nn.Linear(1, 1, bias=False),
                       lambda net: torch.optim.SGD(net.parameters(), lr=0.1), **options)


def test_the_pool_starts_with_three_and_drops_the_oldest():
    pool = make_pool(limit=5)
    first = pool.members[:]
    assert len(first) == 3
    pool.push(2)
    assert pool.members[:3] == first
    pool.push(1)
    assert len(pool.members) == 5 and pool.members[:2] == first[1:] and pool.num_created == 6


def test_sampling():
    pool, generator = make_pool(limit=100, start=30), torch.Generator().manual_seed(0)

    def seen(times, count, **options):
        return {id(m) for _ in range(times) for m in pool.sample(count, generator, **options)}
    everyone = list(map(id, pool.members))
    assert len(pool.sample(2, generator)) == 2 and seen(1, 50) == {*everyone}
    assert seen(200, 2, begin=5, end=20) == {*everyone[5:20]}
    assert seen(400, 2, begin=5, end=15) == {*everyone}  # 10 remain: the slice is ignored
    pool.slice_min = 9
    assert seen(200, 2, begin=5, end=15) == {*everyone[5:15]}
    assert all(len({id(m) for m in pool.sample(4, generator)}) == 4 for _ in range(50))


def test_a_saved_pool_is_the_same_pool():
    def pool():
        return NetworkPool(lambda k: get_network("MLP", 3, 10, (8, 8), seed=k),
                           lambda net: torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9),
                           limit=4, start=6)

    def train(member):
        member.optimizer.zero_grad()
        member.net(torch.ones(2, 3, 8, 8)).sum().backward()
        member.optimizer.step()

    first, second = pool(), pool()
    for member in first.members:
        train(member)
        member.count(torch.tensor(3), 4)
        member.count(torch.tensor(1), 4)
    second.push(3)
    second.load_state_dict(copy.deepcopy(first.state_dict()))  # as from a file: nothing shared
    assert second.num_created == 6 and [m.seen for m in second.members] == [8] * 4
    for a, b in zip(first.members, second.members):
        train(a)
        train(b)
        assert all(torch.equal(p, q) for p, q in zip(a.net.parameters(), b.net.parameters()))
        assert a.running_accuracy() == b.running_accuracy() == 50  # percent: 4 of 8
    first.reset_running_accuracy()
    first.push(1)
    assert [(m.running_accuracy(), m.seen) for m in first.members] == [(0, 0)] * 4
