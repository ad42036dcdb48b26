"""Run scripts one after the other, small and in float64, under torchrun: see test_distributed.py.

    python tests/processes.py '{"scripts": [["pretrain.py", <flags>], ...], "starts": [...]}'

starts: for each start of the processes {rank: [function, call, action]}: what this process does
before that call of a function that the last script uses. "more": further flags of process 1.
"""
import importlib
import json
import os
import shutil
import signal
import sys
import time

import torch
from conftest import call_before

import runtime.run_directory
import sanity
import utils
from runtime.checkpoint import CheckpointFile
from runtime.command_line import run_script

save = CheckpointFile.save


def save_and_keep(self, state):
    """The last state of an experiment stays as kept.pt."""
    save(self, state)
    if state.get("experiment"):
        shutil.copyfile(self.path, self.path.with_name("kept.pt"))


# Fewer images, no pictures (two seconds of imports).
SMALL = [(utils, "SELECT_IMAGES", 40), (sanity, "QUERIES", 50), (sanity, "STEPS", 10),
         (runtime.run_directory, "save_grid", lambda *args: None),
         (CheckpointFile, "save", save_and_keep)]
SIGNALS = {"stop": signal.SIGTERM, "stop all": signal.SIGTERM, "kill": signal.SIGKILL}


def act(action):
    if action == "wait":
        time.sleep(120)
    if action == "stop all":
        os.kill(os.getppid(), signal.SIGTERM)  # torchrun
    os.kill(os.getpid(), SIGNALS[action])


def run(script, *flags):
    """In float64 a rounding error does not turn the sign of a gradient; attack packages need 32."""
    torch.set_default_dtype(torch.float32 if script == "evaluate.py" else torch.float64)
    sys.argv = [script, *map(str, flags)]
    importlib.import_module(script.removesuffix(".py")).main()


def main():
    plan, rank = json.loads(sys.argv[1]), os.environ["RANK"]
    start = plan["starts"][int(os.environ["TORCHELASTIC_RESTART_COUNT"])]
    for owner, name, value in SMALL:
        setattr(owner, name, value)
    *scripts, last = plan["scripts"]
    for script in scripts:
        run(*script)
    if rank in start:
        function, call, action = start[rank]
        module, name = function.rsplit(".", 1)
        call_before(setattr, importlib.import_module(module), name, [call],
                    lambda: act(action))
    run(*last, *start.get("more", []) * (rank == "1"))


if __name__ == "__main__":
    run_script(main)
