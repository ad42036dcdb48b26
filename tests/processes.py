"""Run a script as its users do, in float64 and with small sets, for tests/test_parallel.py; torchrun can start it.

    python tests/processes.py ROME_cifar10.py <flags>      with these variables: DTYPE, a dtype of torch; KEEP=1, saved states
                                                           stay when the run ends; KILL=rank:call, SIGKILL or, with SIGNAL, that
                                                           signal to itself in that call of a training step
"""
import importlib
import os
import signal
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import utils  # noqa: E402
from engine.command_line import run_script  # noqa: E402
from engine.saved_state import StateFile  # noqa: E402

script = importlib.import_module(Path(sys.argv[1]).stem)
sys.argv = sys.argv[1:]
torch.set_default_dtype(getattr(torch, os.environ.get("DTYPE", "float32")))
utils.SELECT_IMAGES = 40
import sanity; sanity.QUERIES = 50; sanity.STEPS = 10
if os.environ.get("KEEP"):
    StateFile.remove = lambda self: None
who, call = map(int, os.environ.get("KILL", "-1:0").split(":"))
if who == int(os.environ.get("RANK", 0)) and not os.environ.get("TORCHELASTIC_RESTART_COUNT", "0").strip("0"):
    name = os.environ.get("WHERE", "attack_images")
    function, calls = getattr(script, name), []

    def disturbed(*args, **options):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), int(os.environ.get("SIGNAL", signal.SIGKILL)))
        return function(*args, **options)
    setattr(script, name, disturbed)
run_script(script.main)
