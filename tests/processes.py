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
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import runtime.run_directory  # noqa: E402
import sanity  # noqa: E402
import utils  # noqa: E402
from runtime.checkpoint import CheckpointFile  # noqa: E402
from runtime.command_line import run_script  # noqa: E402

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


def run(script, *flags):
    """In float64 a rounding error does not turn the sign of a gradient; attack packages need 32."""
    torch.set_default_dtype(torch.float32 if script == "evaluate.py" else torch.float64)
    sys.argv = [script, *map(str, flags)]
    importlib.import_module(Path(script).stem).main()


def disturb(function, call, action):
    module, name = function.rsplit(".", 1)
    module = importlib.import_module(module)
    usual, calls = getattr(module, name), []

    def disturbed(*args, **options):
        calls.append(1)
        if len(calls) == call:
            if action == "stop all":
                os.kill(os.getppid(), signal.SIGTERM)  # torchrun
            if action == "wait":
                time.sleep(120)
            else:
                os.kill(os.getpid(), signal.SIGKILL if action == "kill" else signal.SIGTERM)
        return usual(*args, **options)
    setattr(module, name, disturbed)


def main():
    plan, rank = json.loads(sys.argv[1]), os.environ["RANK"]
    start = plan["starts"][int(os.environ["TORCHELASTIC_RESTART_COUNT"])]
    for owner, name, value in SMALL:
        setattr(owner, name, value)
    *scripts, last = plan["scripts"]
    for script in scripts:
        run(*script)
    if rank in start:
        disturb(*start[rank])
    run(*last, *start.get("more", []) * (rank == "1"))


if __name__ == "__main__":
    run_script(main)
