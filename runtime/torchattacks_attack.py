"""Attacks of the package torchattacks by their names: seeded by our generators, on any model."""
import inspect
import random
from contextlib import contextmanager

import numpy as np
import torch

from runtime.autoattack import draw_seed
from runtime.safe_io import InputError

RADII = ("eps", "max_epsilon")  # what torchattacks calls the radius


def torchattacks_class(name):
    """A class of torchattacks that needs a network alone. Raises InputError."""
    try:
        import torchattacks
    except ImportError:
        raise InputError(f"torchattacks:{name} needs the package torchattacks: pip install "
                         "--no-deps torchattacks==3.5.1") from None
    known = {key: value for key, value in vars(torchattacks).items()
             if inspect.isclass(value) and _needs_a_model_alone(value)}
    if name not in known:
        raise InputError(f"torchattacks:{name}: torchattacks {torchattacks.__version__} has "
                         f"{', '.join(known)}")
    return known[name]


def _needs_a_model_alone(made):
    first, *others = inspect.signature(made).parameters.values()
    return first.name == "model" and all(p.default is not p.empty for p in others)


def radius_of(made):
    """What a class calls its radius; None if it looks for the least change."""
    return next((name for name in RADII if name in inspect.signature(made).parameters), None)


class _Model(torch.nn.Module):
    """A function of images as the network that torchattacks expects."""

    def __init__(self, model, device):
        super().__init__()
        self.model = model
        self.anchor = torch.nn.Parameter(torch.empty(0, device=device), requires_grad=False)

    def forward(self, x):
        return self.model(x)


def run_torchattacks(made, model, x, labels, *, eps=None, generator=None):
    """x_adv like x, (N, C, H, W) in [0, 1], of an attack with the options it has by itself.

    made: of `torchattacks_class`. model: images in [0, 1] -> logits. eps: the radius.
    """
    options = {} if eps is None else {radius_of(made): eps}
    if "n_classes" in inspect.signature(made).parameters:
        with torch.no_grad():
            options["n_classes"] = model(x[:1]).shape[1]
    with seeded(draw_seed(generator), x.device):
        return made(_Model(model, x.device).eval(), **options)(x, labels).detach()


@contextmanager
def seeded(seed, device):
    """The global generators of PyTorch, NumPy and Python start from `seed`; afterwards they are as
    before."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)
