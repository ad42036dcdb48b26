"""Flags that several scripts have, and errors as one line with a non-zero exit status."""
import argparse
import math
import re
import signal
import sys
from pathlib import Path

import torch

from runtime import compilation, distributed
from runtime.checkpoint import Interrupted
from runtime.safe_io import InputError


def add_switch(parser, name, default, text):
    """A pair of flags --name and --no_name."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(f"--{name}", action="store_true", default=default,
                       help=f"{text}; --no_{name} turns it off")
    group.add_argument(f"--no_{name}", dest=name, action="store_false", default=default,
                       help=argparse.SUPPRESS)


def add_common_flags(parser):
    """Where and how a training script reads, writes and computes."""
    add = parser.add_argument
    add("--data_path", default="./data", help="folder of cifar10.npz, cifar100.npz")
    add("--checkpoint_path", default="./checkpoints", help="folder for saved states and networks")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--chunk", type=at_least(0), default=0,
        help="real images attacked at a time; 0: by the free memory")
    add("--fresh", action="store_true", help="start over instead of resuming")
    add_switch(parser, "compile", True, "torch.compile for the batches that are worth it")
    add_gpu_flags(parser)
    add("--precision", choices=(*compilation.PRECISIONS, "auto"), default="tf32",
        help="bf16: in training, not in evaluation; auto: bf16 if the device has it, else tf32")


def add_gpu_flags(parser):
    """What matters on a GPU only."""
    add_switch(parser, "cuda_graphs", True, "CUDA: capture and replay CUDA graphs")
    parser.add_argument("--deterministic", action="store_true",
                        help="CUDA: refuse operations that are not repeatable; compile nothing")


def add_run_flags(parser):
    """The flags of a ROME script that are no part of the method."""
    group = parser.add_argument_group("the run")
    add = group.add_argument
    add_common_flags(group)
    add("--save_path", default="./result", help="folder for results")
    add("--save_interval", type=at_least(0), default=0,
        help="iterations between saved states; 0: saving takes 1 %% of the time")
    add("--parallel", choices=("batch", "experiments"), default="batch",
        help="what processes of torchrun share: every batch, or whole experiments")


def add_compatibility_flags(parser):
    """Flags of the published scripts that nothing reads (SPEC 1.2)."""
    group = parser.add_argument_group("accepted for compatibility, without effect")
    group.add_argument("--net_train_real", action="store_true")
    for name in ("inner_loop", "mismatch_lambda", "mismatch_type", "weight_layer_index",
                 "local_num", "local_weight", "conf_path", "last", "dis_metric", "ij_selection",
                 "aug_num"):
        group.add_argument(f"--{name}", metavar="X")


def at_least(low, kind=int):
    """An argparse type: a finite number of `kind` that is >= low."""
    def parse(text):
        value = kind(text)
        if not (value >= low and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"{text} is not a number of at least {low}")
        return value
    parse.__name__ = kind.__name__
    return parse


def fraction(text):
    """An argparse type: a number between 0 and 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def method_name(text):
    """An argparse type: a part of a file name, without underscores."""
    if not re.fullmatch(r"[A-Za-z0-9+.-]+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not made of letters, digits, '+', '.', '-'")
    return text


def run_script(main):
    """Run `main()`; turn errors that a user can mend into one line and an exit status."""
    sys.stdout.reconfigure(errors="backslashreplace")  # for characters that the terminal lacks
    compilation.keep_freed_memory()
    try:
        main()
        distributed.shutdown()
    except (InputError, OSError, FloatingPointError, ModuleNotFoundError) as error:
        _leave(f"error: {error}", 1)
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "ALLOC_FAILED" not in str(error):
            raise  # ALLOC_FAILED: of cuDNN or cuBLAS
        _leave(f"error: the memory of the device is full ({str(error).split('.')[0]}); the same "
               "command with a smaller --chunk, 512 for instance, goes on", 1)
    except Interrupted as stop:
        text = f"stopped by {stop}; the same command, without --fresh, goes on from here"
        _leave(text if distributed.is_main_process() else None, stop.exit_status)
    except KeyboardInterrupt:
        _leave("interrupted", 130)


def _leave(text, status):
    if distributed.launched_by_torchrun():  # its SIGTERM must not take the place of the line
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if text:
        distributed.write_line(f"{Path(sys.argv[0]).name}: {text}", sys.stderr)
    distributed.leave(status)
