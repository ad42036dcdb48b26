"""All classes in one pass against turn after turn."""
import pytest
import torch

from runtime.lookahead import lookahead_images, step_per_class


@pytest.mark.parametrize("make", [lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.5), lambda p: torch.optim.SGD(p, lr=0.3),
                                  lambda p: torch.optim.Adam(p, lr=0.1)])
def test_one_pass_equals_turn_after_turn(make):
    """Three classes of two images, four rounds. The gradient of an image is any function of that image: here its sine."""
    start = torch.randn(6, 1, 2, 2, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    ours, literal = start.clone().requires_grad_(), start.clone().requires_grad_()
    optimizer, reference = make([ours]), make([literal])
    for _ in range(4):
        for c in range(3):
            literal.grad = torch.zeros_like(start)
            literal.grad[2 * c:2 * c + 2] = literal.detach()[2 * c:2 * c + 2].sin()
            reference.step()
        before = ours.detach().clone()
        found = lookahead_images(ours, optimizer, 3)
        assert torch.equal(ours, before) and torch.equal(found[:2], before[:2]) and not found.requires_grad
        step_per_class(ours, optimizer, found.sin(), 3)
    assert torch.equal(ours, literal)
