"""The suite on several kinds of machines, one after the other: capabilities of the processor, threads, versions of torch.

    make test-machines                                   a covering set of what this processor has
    make test-machines MACHINES="avx2:2 avx512:1:2.6"    capability:threads[:torch]; without torch, the installed one

Another version of torch is installed into .venv-torch-<version>. Prints a table; the exit status is 1 if any suite is red. The
output of each is kept in result/machines/.
"""
import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOWEST, NEWEST = "2.6", "newest"  # of what requirements.txt admits
TORCHVISION = {"2.6": "0.21.*"}  # the version that goes with it; of others pip finds it
ON_PROCESSOR = ROOT / "tests" / "on_processor.sh"


def capabilities():
    """Those of this processor, the best one last."""
    words = set(Path("/proc/cpuinfo").read_text().split())
    return ["default", *["avx2"] * ("avx2" in words), *["avx512"] * ({"avx512f", "avx512bw", "avx512vl", "avx512dq"} <= words)]


def covering_set():
    """Each capability, two threads once, the lowest and the newest torch."""
    *others, best = capabilities()
    return [*((c, 1, None) for c in others), (best, 1, None), (best, 2, None), (best, 1, LOWEST), (best, 1, NEWEST)]


def machine(text):
    """An argparse type: "avx2:2:2.6" -> ("avx2", 2, "2.6")."""
    match = re.fullmatch(r"(default|avx2|avx512):([1-9]\d*)(?::([\w.]+))?", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not capability:threads[:torch] with default, avx2 or avx512")
    return match[1], int(match[2]), match[3]


def environment(torch):
    """The Python of that version of torch, installed if need be. Raises CalledProcessError if pip cannot."""
    if torch is None:
        return sys.executable
    folder = ROOT / f".venv-torch-{torch}"
    python = folder / "bin" / "python"
    if not (folder / "installed").exists():
        wanted = ["torch", "torchvision"] if torch == NEWEST else [
            f"torch=={torch}.*", f"torchvision=={TORCHVISION[torch]}" if torch in TORCHVISION else "torchvision"]
        others = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if not line.startswith("torch")]
        (ROOT / "result" / "machines" / "requirements.txt").write_text("\n".join([*wanted, *others, "pytest", "pytest-xdist"]))
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([*pip, "-r", ROOT / "result" / "machines" / "requirements.txt"], check=True,
                       env={**os.environ, "PIP_CONSTRAINT": os.devnull})
        subprocess.run([*pip, "--no-deps", "-r", ROOT / "requirements-test.txt"], check=True)
        (folder / "installed").touch()
    return str(python)


def run(capability, threads, torch, pytest_arguments):
    """One suite. Returns the cells of its row and whether it is green."""
    try:
        python = environment(torch)
    except subprocess.CalledProcessError:
        return [torch, capability, threads, "cannot be installed here", "", ""], True
    on_processor = [ON_PROCESSOR, capability, python]
    about = "import torch; print(torch.__version__, torch.backends.cpu.get_cpu_capability())"
    found = subprocess.run([*on_processor, "-c", about], capture_output=True, text=True, check=True).stdout.split()
    # Two workers of two threads on two cores are ten times slower than one.
    workers = ["-n", "0"] if threads > 1 else ["-n", "auto", "--dist", "loadfile"]
    start = time.perf_counter()
    suite = subprocess.run([*on_processor, "-m", "pytest", *workers, *pytest_arguments], cwd=ROOT, text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                           env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    log = ROOT / "result" / "machines" / f"{capability}-{threads}-{found[0]}.txt"
    log.write_text(suite.stdout)
    counts = re.findall(r"\d+ (?:failed|passed|skipped|errors?)", suite.stdout.splitlines()[-1] if suite.stdout else "")
    seconds = f"{time.perf_counter() - start:.0f} s"
    return [*found, threads, ", ".join(counts) or "no test ran", seconds,
            "" if suite.returncode == 0 else log.relative_to(ROOT)], suite.returncode == 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--machines", nargs="*", type=machine, metavar="CAPABILITY:THREADS[:TORCH]")
    parser.add_argument("--capabilities", action="store_true", help="only print those of this processor")
    parser.add_argument("pytest_arguments", nargs="*", metavar="ARGUMENT", help="after --, of pytest")
    args = parser.parse_args()
    if args.capabilities:
        print(*capabilities())
        return
    (ROOT / "result" / "machines").mkdir(parents=True, exist_ok=True)
    green = True
    row = "{:<14} {:<10} {:>7}  {:<34} {:>7}  {}".format
    print(row("torch", "capability", "threads", "result", "time", ""), flush=True)
    for one in args.machines or covering_set():
        cells, passed = run(*one, args.pytest_arguments)
        green &= passed
        print(row(*map(str, cells)), flush=True)
    sys.exit(not green)


if __name__ == "__main__":
    main()
