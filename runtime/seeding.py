"""Named random streams: one --seed governs everything, and none of them depends on how much another was used."""
import zlib

import numpy as np
import torch


def derive_seed(seed, *key):
    """The seed of one named random stream.

    seed: int >= 0, the --seed of the run. key: strings and non-negative ints that name the stream, such as
    ("attack", experiment). Different keys give independent streams; none depends on how much another was used.
    """
    spawn_key = tuple(zlib.crc32(part.encode()) if isinstance(part, str) else part for part in key)
    return int(np.random.SeedSequence(seed, spawn_key=spawn_key).generate_state(1, np.uint64)[0] >> 1)


def make_generator(seed, *key, device="cpu"):
    """A torch.Generator on `device` for the stream `key` (see derive_seed)."""
    return torch.Generator(device).manual_seed(derive_seed(seed, *key))
