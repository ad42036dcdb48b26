"""Flags and errors as all scripts have them: switches, types with ranges, one line and a non-zero exit for a user's mistake."""
import argparse
import math
import re
import signal
import sys
from pathlib import Path

import torch

from runtime import compilation, distributed
from datasets import DATASETS, dataset_name, known_dataset
from runtime.safe_io import InputError
from runtime.checkpoint import Interrupted


def add_switch(parser, name, default, text):
    """A pair of flags --name and --no_name."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(f"--{name}", action="store_true", default=default, help=f"{text}; --no_{name} turns it off")
    group.add_argument(f"--no_{name}", dest=name, action="store_false", default=default, help=argparse.SUPPRESS)


def add_dataset_flag(parser, default="CIFAR10", text=""):
    """--dataset: a name of datasets, whatever its case, or the path of a file or folder.

    text: what its help says beside that.
    """
    def dataset(given):
        try:
            dataset_name(given)
        except InputError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        return known_dataset(given) or given
    parser.add_argument("--dataset", type=dataset, default=default, metavar="DATA", help=f"{', '.join(DATASETS)}, or a file or "
                        f"folder of your own (docs/foreign_files.md){text}")


def add_fast_flags(parser):
    """The flags of `fast`."""
    add_switch(parser, "compile", True, "torch.compile for the batches of which there are enough to pay for it")
    parser.add_argument("--precision", choices=(*compilation.PRECISIONS, "auto"), default="tf32", help="of convolutions and matrix "
                        "products; tf32 is fp32 where there is no TensorFloat-32; bf16: in the training of networks and the "
                        "attacks in it, not where an accuracy is reported; auto: bf16 where the device has instructions for "
                        "it, else tf32")


def add_run_flags(parser):
    """Where a ROME script reads and writes, on what it computes, and how it goes on; none of it is part of the method."""
    group = parser.add_argument_group("the run")
    add = group.add_argument
    add("--data_path", default="./data", help="folder of cifar10.npz, cifar100.npz")
    add("--save_path", default="./result", help="folder for the final set and the run's own folder")
    add("--checkpoint_path", default="./checkpoints", help="folder for the best set so far and the saved states")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--chunk", type=at_least(0), default=0, help="real images attacked at a time; 0: by the memory at hand")
    add("--save_interval", type=at_least(0), default=0, help="outer iterations between two saved states; 0: so many that "
        "saving takes 1 %% of the time")
    add("--fresh", action="store_true", help="start over, instead of going on with what an interrupted run has saved")
    add("--deterministic", action="store_true", help="CUDA: refuse operations that are not repeatable (CPU always is)")
    add("--parallel", choices=("batch", "experiments"), default="batch", help="what the processes of torchrun share: the "
        "images of every batch, or whole experiments (--num_exp), each with its own saved state")
    add_switch(group, "cuda_graphs", True, "CUDA: record what the networks do to a batch, and play it (docs/performance.md)")
    add_fast_flags(group)


def add_compatibility_flags(parser):
    """The flags of the published scripts that nothing reads or that had a single legal value. Source: SPEC 1.2."""
    group = parser.add_argument_group("accepted for compatibility, without effect")
    group.add_argument("--net_train_real", action="store_true")
    for name in ("inner_loop", "mismatch_lambda", "mismatch_type", "weight_layer_index", "local_num", "local_weight",
                 "conf_path", "last", "dis_metric", "ij_selection", "aug_num"):
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
    value = at_least(0, float)(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def method_name(text):
    """An argparse type: a name that can stand between underscores in a file name."""
    if not re.fullmatch(r"[A-Za-z0-9+.-]+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not made of letters, digits, '+', '.' and '-'")
    return text


def run_script(main):
    """Run `main()`; turn the errors that a user can mend into one line and a non-zero exit status."""
    for stream in (sys.stdout, sys.stderr):  # a path that the terminal's encoding lacks is shown escaped
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    compilation.keep_freed_memory()
    whole = False
    if distributed.launched_by_torchrun():  # which ends the other processes with SIGTERM once one has died
        signal.signal(signal.SIGTERM, _stopped)
    try:
        main()
        whole = True
    except (InputError, OSError, FloatingPointError) as error:
        _leave(f"error: {error}", 1)
    except torch.OutOfMemoryError as error:
        _leave(f"error: the memory of the device is full ({str(error).split('.')[0]}); smaller numbers of images at a time "
               "need less: --chunk, --batch_real, --trained_bs, --batch_train", 1)
    except Interrupted as stop:
        rest = "goes on from here" if stop.whole else "goes on from the last saved state"
        same = "the same command without --fresh" if "--fresh" in sys.argv else "the same command"
        _leave(f"stopped by {stop}; {same} {rest}" if distributed.is_main_process() else None, stop.exit_status)
    except KeyboardInterrupt:
        _leave("interrupted", 130)
    finally:
        distributed.shutdown(whole)


def _leave(text, status):
    """End with a line on standard error, or without one. It is written whole and at once: other processes write to the same
    terminal, and where one has died, torchrun's SIGTERM to this one comes in the next moment and must not take its place."""
    if distributed.launched_by_torchrun():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if text:
        sys.stderr.write(f"{Path(sys.argv[0]).name}: {text}\n")
        sys.stderr.flush()
    sys.exit(status)


def _stopped(signum, frame):
    raise Interrupted(signum, whole=True)
