"""Files of networks: state_dicts of others, checked, and what was done to them said. Source: SPEC
3.5.
"""

import torch

from runtime.safe_io import InputError, keys_of, read_tensors

# What wrappers put in front of every name: several GPUs, torch.compile, Lightning and other
# classes.
PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.", "backbone.")
# Where training scripts keep the state_dict among other things.
WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "network")
MAY_BE_MISSING = (
    "num_batches_tracked"  # of a BatchNorm: counts batches, and has no part in what it computes
)


def read_state_dict(path, notes=None):
    """A network's parameters, {name: tensor}, without what wrappers add around and in front of the
    names.

    notes: a list that takes a sentence for each thing that was changed.
    Raises InputError, which names the odd key, if the file holds anything else, or values that are
    not finite.
    """
    notes = [] if notes is None else notes
    content = read_tensors(path)
    if not isinstance(content, dict) or not content:
        raise InputError(
            f"{path} holds a {type(content).__name__}; expected a state_dict, {{name: tensor}}"
        )
    wrapped = [key for key in WRAPPERS if isinstance(content.get(key), dict)]
    if wrapped:
        content = content[wrapped[0]]
        notes.append(f"the state_dict in its {wrapped[0]!r}")
    odd = [
        key
        for key, value in content.items()
        if not (isinstance(key, str) and isinstance(value, torch.Tensor))
    ]
    if odd or not content:
        kinds = ", ".join(f"{key!r} ({type(content[key]).__name__})" for key in odd[:3])
        what = f"is no tensor: {kinds}" if odd else "is empty"
        raise InputError(
            f"{path}: in a dict of {keys_of(content)} {what}; expected a state_dict, "
            f"{{name: tensor}}"
        )
    for name, value in content.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise InputError(f"{path}: {name} has values that are not finite")
    dropped = ""
    while prefix := next(
        (p for p in PREFIXES if all(name.startswith(p) for name in content)), None
    ):
        content, dropped = (
            {name.removeprefix(prefix): value for name, value in content.items()},
            dropped + prefix,
        )
    if dropped:
        notes.append(f"{dropped!r} dropped from its names")
    return dict(content)


def load_into(net, path, notes=None):
    """Put the parameters of a file into `net`, and return it. notes: see `read_state_dict`. Raises
    InputError that names what is missing, unknown or of another shape.
    """
    notes = [] if notes is None else notes
    given, wanted = read_state_dict(path, notes), net.state_dict()
    for name in wanted:
        if name not in given and name.endswith(MAY_BE_MISSING):
            given[name] = wanted[name]
            if f"without {MAY_BE_MISSING}" not in notes:
                notes.append(f"without {MAY_BE_MISSING}")
    wrong = [f"{name} is missing" for name in wanted if name not in given]
    wrong += [f"{name} is unknown" for name in given if name not in wanted]
    wrong += [
        f"{name} is {tuple(given[name].shape)}, expected {tuple(wanted[name].shape)}"
        for name in wanted
        if name in given and given[name].shape != wanted[name].shape
    ]
    if wrong:
        raise InputError(
            f"{path} is another network: {'; '.join(wrong[:3])}"
            + (" ..." if len(wrong) > 3 else "")
        )
    net.load_state_dict(given)
    return net
