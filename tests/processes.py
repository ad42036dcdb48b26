"""Run a script as its users do, in float64 and small, for tests/test_parallel.py; torchrun may start it.

    python tests/processes.py ROME_cifar10.py <flags>

Variables: DTYPE, a dtype of torch, the default one; KEEP=1: saved states stay when the run ends. AT=<rank>:<function>:<call>:
that call, of a function of the script or of utils, gets the signal SIGNAL (SIGKILL) before it begins, in the first start of
that process. MORE: flags that process 1 has beside those of the others.
"""
import importlib
import os
import signal
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import runtime.run_directory  # noqa: E402
import sanity  # noqa: E402
import utils  # noqa: E402
from runtime.command_line import run_script  # noqa: E402
from runtime.checkpoint import CheckpointFile  # noqa: E402

torch.set_default_dtype(getattr(torch, os.environ.get("DTYPE", "float64")))
script = importlib.import_module(Path(sys.argv[1]).stem)
rank = os.environ.get("RANK", "0")
sys.argv = sys.argv[1:] + (os.environ.get("MORE", "").split() if rank == "1" else [])
utils.SELECT_IMAGES, sanity.QUERIES, sanity.STEPS = 40, 50, 10
runtime.run_directory.save_grid = lambda *args: None  # two seconds of imports
if os.environ.get("KEEP"):
    CheckpointFile.remove = CheckpointFile.forget_previous = lambda self: None

who, where, call = os.environ.get("AT", "-1::0").split(":")
if who == rank and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
    owner = utils if hasattr(utils, where) and where != "attack" else script
    function, calls = getattr(owner, where), []

    def disturbed(*args, **options):
        calls.append(1)
        if len(calls) == int(call):
            os.kill(os.getpid(), int(os.environ.get("SIGNAL", signal.SIGKILL)))
        return function(*args, **options)
    setattr(owner, where, disturbed)
run_script(script.main)
