"""Read the files of networks: state_dicts of these scripts and of others. Source: SPEC 3.5."""

import torch

from runtime.safe_io import InputError, read_tensors

# Several GPUs, torch.compile, Lightning and other wrappers put these before every name.
PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.", "backbone.")
# Training scripts keep the state_dict of a checkpoint under these.
WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "network")
BATCH_COUNT = "num_batches_tracked"  # of BatchNorm; its output does not depend on it


def _read_state_dict(path, notes):
    state = read_tensors(path)
    for key in WRAPPERS:
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
            notes.append(f"the state_dict in its {key!r}")
            break
    if not isinstance(state, dict) or not state:
        raise InputError(f"{path} holds no state_dict, {{name: tensor}}")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise InputError(f"{path} holds no state_dict, {{name: tensor}}: {name!r} is a "
                             f"{type(value).__name__}")
        if not value.isfinite().all():
            raise InputError(f"{path}: {name} has values that are not finite")
    dropped = ""
    while prefix := next((p for p in PREFIXES if all(key.startswith(p) for key in state)), None):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
        dropped += prefix
    if dropped:
        notes.append(f"{dropped!r} dropped from its names")
    return dict(state)  # without torch's metadata, which would ask for every BATCH_COUNT


def load_into(net, path, notes=None):
    """Load the parameters of a file into `net`, and return it. notes: a list, takes each change.

    Raises InputError that names what is missing, unknown, of another shape or not finite.
    """
    notes = [] if notes is None else notes
    state = _read_state_dict(path, notes)
    if any(key.endswith(BATCH_COUNT) for key in net.state_dict().keys() - state):
        notes.append(f"without {BATCH_COUNT}")  # torch fills them in
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        problems = "; ".join(line.strip() for line in str(error).splitlines()[1:])
        raise InputError(f"{path} is another network: {problems[:300]}") from None
    return net
