"""The suite on several kinds of machines: instructions, threads, versions of torch.

    make test-machines                                  a covering set of what this processor has
    make test-machines MACHINES="avx2:2 avx512:1:2.6"   capability:threads[:torch]

Without a version of torch, the installed one; another one goes into .venv-torch-<version>. Prints a
table; the exit status is 1 if any suite fails. Outputs are kept in result/machines/.
"""
import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "result" / "machines"
LOWEST, NEWEST = "2.6", "newest"  # of what requirements.txt admits
TORCHVISION = {"2.6": "==0.21.*"}  # of other versions, pip finds it
AVX512 = {"avx512f", "avx512bw", "avx512vl", "avx512dq"}


def capabilities():
    """Those of this processor, the best one last."""
    words = set(Path("/proc/cpuinfo").read_text().split())
    return ["default", *["avx2"] * ("avx2" in words), *["avx512"] * (AVX512 <= words)]


def covering_set():
    """Each capability, two threads once, the lowest and the newest torch."""
    best = capabilities()[-1]
    return [*(f"{capability}:1" for capability in capabilities()), f"{best}:2",
            f"{best}:1:{LOWEST}", f"{best}:1:{NEWEST}"]


def environment(torch):
    """The Python with that torch, installed if missing. Raises CalledProcessError if pip fails."""
    folder = ROOT / f".venv-torch-{torch}"
    python = folder / "bin" / "python"
    if not (folder / "installed").exists():
        wanted = ["torch", "torchvision"]
        if torch != NEWEST:
            wanted = [f"torch=={torch}.*", "torchvision" + TORCHVISION.get(torch, "")]
        lines = (ROOT / "requirements.txt").read_text().splitlines()
        wanted += [line for line in lines if not line.startswith("torch")]
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([*pip, *wanted, "pytest", "pytest-xdist"], check=True,
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
    args = parser.parse_args()
    if args.capabilities:
        print(*capabilities())
        return
    OUT.mkdir(parents=True, exist_ok=True)
    all_passed = True
    for machine in args.machines or covering_set():
        result, passed = run(machine, args.pytest_arguments)
        all_passed &= passed
        print(f"{machine:<16} {result}", flush=True)
    sys.exit(not all_passed)


if __name__ == "__main__":
    main()
