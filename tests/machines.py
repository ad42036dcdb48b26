"""The suite on several kinds of machines: instructions, threads, versions of torch.

    make test-machines                                  a covering set of what this processor has
    make test-machines MACHINES="avx2:2 avx512:1:2.6"   capability:threads[:torch]

Without a version, the installed torch; another one goes into .venv-torch-<version>. Prints a table;
the exit status is 1 if any suite fails. Outputs are kept in result/machines/.
"""
import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "result" / "machines"
TORCH = {  # the lowest and the newest that requirements.txt admits
    "2.6": ("torch==2.6.*", "torchvision==0.21.*"), "newest": ("torch", "torchvision")}
AVX512 = {"avx512f", "avx512bw", "avx512vl", "avx512dq"}


def capabilities():
    """Those of this processor, the best one last."""
    words = set(Path("/proc/cpuinfo").read_text().split())
    return ["default", *["avx2"] * ("avx2" in words), *["avx512"] * (AVX512 <= words)]


def environment(torch):
    """The Python with that torch, installed if missing. Raises CalledProcessError if pip fails."""
    folder = ROOT / f".venv-torch-{torch}"
    python = folder / "bin" / "python"
    if not (folder / "installed").exists():
        lines = (ROOT / "requirements.txt").read_text().splitlines()
        wanted = [*TORCH.get(torch, (f"torch=={torch}.*", "torchvision")), "pytest", "pytest-xdist",
                  *(line for line in lines if not line.startswith("torch"))]
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([*pip, *wanted], check=True,
                       env={**os.environ, "PIP_CONSTRAINT": os.devnull})
        subprocess.run([*pip, "--no-deps", "-r", ROOT / "requirements-test.txt"], check=True)
        (folder / "installed").touch()
    return python


def run(machine, pytest_arguments):
    """One suite: its result in words, and whether it passed."""
    capability, threads, *torch = machine.split(":")
    try:
        python = environment(*torch) if torch else sys.executable
    except subprocess.CalledProcessError:
        return "cannot be installed here", True
    # Two workers of two threads on two cores are ten times slower than one.
    workers = ["-n", "0"] if int(threads) > 1 else ["-n", "auto", "--dist", "loadfile"]
    log = OUT / f"{machine.replace(':', '-')}.txt"
    with open(log, "w") as file:
        suite = subprocess.run(
            [ROOT / "tests" / "on_processor.sh", capability, python, "-m", "pytest", *workers,
             *pytest_arguments], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": threads})
    last_line = (log.read_text().splitlines() or ["no test ran"])[-1]
    return f"{last_line}  {log.relative_to(ROOT)}", suite.returncode == 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--machines", nargs="*", metavar="CAPABILITY:THREADS[:TORCH]")
    parser.add_argument("--capabilities", action="store_true", help="print those of this processor")
    parser.add_argument("pytest_arguments", nargs="*", metavar="ARGUMENT", help="after --")
    args, found, all_passed = parser.parse_args(), capabilities(), True
    if args.capabilities:
        print(*found)
        return
    OUT.mkdir(parents=True, exist_ok=True)
    covering_set = [*(f"{capability}:1" for capability in found), f"{found[-1]}:2",
                    *(f"{found[-1]}:1:{torch}" for torch in TORCH)]
    for machine in args.machines or covering_set:
        result, passed = run(machine, args.pytest_arguments)
        all_passed &= passed
        print(f"{machine:<16} {result}", flush=True)
    sys.exit(not all_passed)


if __name__ == "__main__":
    main()
