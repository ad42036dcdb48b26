"""Read the files of networks: state_dicts of these scripts and of others. Source: SPEC 3.5."""

import torch

from runtime.safe_io import InputError, keys_of, read_tensors

# Several GPUs, torch.compile, Lightning and other wrappers put these before every name.
PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.", "backbone.")
# Training scripts keep the state_dict of a checkpoint under these.
WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "network")
BATCH_COUNT = "num_batches_tracked"  # of BatchNorm; its output does not depend on it


def read_state_dict(path, notes=None):
    """The parameters of a network, {name: tensor}, without wrappers.

    notes: a list that takes a sentence for each change.
    Raises InputError that names the odd key, or the parameter with values that are not finite.
    """
    notes = [] if notes is None else notes
    content = read_tensors(path)
    if not isinstance(content, dict) or not content:
        held = type(content).__name__
        raise InputError(f"{path} holds a {held}; expected a state_dict, {{name: tensor}}")
    for key in WRAPPERS:
        if isinstance(content.get(key), dict):
            content = content[key]
            notes.append(f"the state_dict in its {key!r}")
            break
    odd = [
        f"{key!r} ({type(value).__name__})"
        for key, value in content.items()
        if not isinstance(key, str) or not isinstance(value, torch.Tensor)
    ]
    if odd or not content:
        problem = f"is no tensor: {', '.join(odd[:3])}" if odd else "is empty"
        raise InputError(
            f"{path}: in a dict of {keys_of(content)} {problem}; expected a state_dict, "
            "{name: tensor}"
        )
    for name, value in content.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise InputError(f"{path}: {name} has values that are not finite")
    return _without_prefixes(dict(content), notes)


def _without_prefixes(state, notes):
    dropped = ""
    while prefix := next((p for p in PREFIXES if all(key.startswith(p) for key in state)), None):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
        dropped += prefix
    if dropped:
        notes.append(f"{dropped!r} dropped from its names")
    return state


def load_into(net, path, notes=None):
    """Load the parameters of a file into `net`, and return it. notes: see `read_state_dict`.

    Raises InputError that names what is missing, unknown or of another shape.
    """
    notes = [] if notes is None else notes
    given, wanted = read_state_dict(path, notes), net.state_dict()
    uncounted = {key: wanted[key] for key in wanted.keys() - given if key.endswith(BATCH_COUNT)}
    if uncounted:
        given |= uncounted
        notes.append(f"without {BATCH_COUNT}")
    wrong = [f"{name} is missing" for name in wanted if name not in given]
    wrong += [f"{name} is unknown" for name in given if name not in wanted]
    for name in wanted:
        if name in given and given[name].shape != wanted[name].shape:
            shapes = f"{tuple(given[name].shape)}, expected {tuple(wanted[name].shape)}"
            wrong.append(f"{name} is {shapes}")
    if wrong:
        more = " ..." if len(wrong) > 3 else ""
        raise InputError(f"{path} is another network: {'; '.join(wrong[:3])}{more}")
    net.load_state_dict(given)
    return net
