"""Named random generators: one --seed governs all of them, and none depends on another's use."""
import zlib

import numpy as np
import torch


def derive_seed(seed, *key):
    """The seed of one named generator: different keys give independent ones.

    seed: int >= 0, the --seed of the run. key: strings and ints >= 0, such as ("attack", 3).
    """
    spawn_key = tuple(zlib.crc32(part.encode()) if isinstance(part, str) else part for part in key)
    sequence = np.random.SeedSequence(seed, spawn_key=spawn_key)
    return int(sequence.generate_state(1, np.uint64)[0] >> 1)


def make_generator(seed, *key, device="cpu"):
    """A torch.Generator on `device`, seeded by derive_seed(seed, *key)."""
    return torch.Generator(device).manual_seed(derive_seed(seed, *key))
