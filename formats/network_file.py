"""Read the files of networks: state_dicts of these scripts and of others. Source: SPEC 3.5."""

import torch

from runtime.safe_io import InputError, keys_of, read_tensors

# Several GPUs, torch.compile, Lightning and other wrappers put these before every name.
PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.", "backbone.")
# Training scripts keep the state_dict of a checkpoint under these.
WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "network")
BATCH_COUNT = "num_batches_tracked"  # of BatchNorm; its output does not depend on it


def read_state_dict(path, notes):
    """The parameters of a network, {name: tensor}, without wrappers. notes: takes each change.

    Raises InputError that names the odd key, or the parameter with values that are not finite.
    """
    state = read_tensors(path)
    if isinstance(state, dict):
        for key in WRAPPERS:
            if isinstance(state.get(key), dict):
                state = state[key]
                notes.append(f"the state_dict in its {key!r}")
                break
    if not isinstance(state, dict) or not state:
        held = "an empty dict" if isinstance(state, dict) else f"a {type(state).__name__}"
        raise InputError(f"{path} holds {held}; expected a state_dict, {{name: tensor}}")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            odd = f"in a dict of {keys_of(state)} is no tensor: {name!r} ({type(value).__name__})"
            raise InputError(f"{path}: {odd}; expected a state_dict, {{name: tensor}}")
        if not value.isfinite().all():
            raise InputError(f"{path}: {name} has values that are not finite")
    dropped = ""
    while prefix := next((p for p in PREFIXES if all(key.startswith(p) for key in state)), None):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
        dropped += prefix
    if dropped:
        notes.append(f"{dropped!r} dropped from its names")
    return dict(state)


def load_into(net, path, notes=None):
    """Load the parameters of a file into `net`, and return it. notes: takes each change.

    Raises InputError that names what is missing, unknown or of another shape.
    """
    notes = [] if notes is None else notes
    state = read_state_dict(path, notes)
    if any(key.endswith(BATCH_COUNT) for key in net.state_dict().keys() - state):
        notes.append(f"without {BATCH_COUNT}")  # torch fills them in
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        problems = "; ".join(line.strip() for line in str(error).splitlines()[1:])
        raise InputError(f"{path} is another network: {problems[:300]}") from None
    return net
