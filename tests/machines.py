"""The suite on several kinds of machines: instructions, threads, versions of torch.

    make test-machines                                  a covering set of what this processor has
    make test-machines MACHINES="avx2:2 avx512:1:2.6"   capability:threads[:torch]

Without a version of torch, the installed one; another one goes into .venv-torch-<version>. Prints a
table; the exit status is 1 if any suite fails. Outputs are kept in result/machines/.
"""
import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "result" / "machines"
LOWEST, NEWEST = "2.6", "newest"  # of what requirements.txt admits
TORCHVISION = {"2.6": "0.21.*"}  # of other versions, pip finds it
AVX512 = {"avx512f", "avx512bw", "avx512vl", "avx512dq"}


def capabilities():
    """Those of this processor, the best one last."""
    words = set(Path("/proc/cpuinfo").read_text().split())
    return ["default", *["avx2"] * ("avx2" in words), *["avx512"] * (AVX512 <= words)]


def covering_set():
    """Each capability, two threads once, the lowest and the newest torch."""
    best = capabilities()[-1]
    return [*((capability, 1, None) for capability in capabilities()), (best, 2, None),
            (best, 1, LOWEST), (best, 1, NEWEST)]


def machine(text):
    """An argparse type: "avx2:2:2.6" -> ("avx2", 2, "2.6")."""
    match = re.fullmatch(r"(default|avx2|avx512):([1-9]\d*)(?::([\w.]+))?", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not capability:threads[:torch] with "
                                         "default, avx2 or avx512")
    return match[1], int(match[2]), match[3]


def environment(torch):
    """The Python with that torch, installed if missing. Raises CalledProcessError if pip fails."""
    if torch is None:
        return sys.executable
    folder = ROOT / f".venv-torch-{torch}"
    python = folder / "bin" / "python"
    if not (folder / "installed").exists():
        wanted = ["torch", "torchvision"]
        if torch != NEWEST:
            wanted = [f"torch=={torch}.*", "torchvision" + (
                f"=={TORCHVISION[torch]}" if torch in TORCHVISION else "")]
        lines = (ROOT / "requirements.txt").read_text().splitlines()
        wanted += [line for line in lines if not line.startswith("torch")]
        (OUT / "requirements.txt").write_text("\n".join([*wanted, "pytest", "pytest-xdist"]))
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([*pip, "-r", OUT / "requirements.txt"], check=True,
                       env={**os.environ, "PIP_CONSTRAINT": os.devnull})
        subprocess.run([*pip, "--no-deps", "-r", ROOT / "requirements-test.txt"], check=True)
        (folder / "installed").touch()
    return str(python)


def run(capability, threads, torch, pytest_arguments):
    """One suite. Returns the cells of its row and whether it passed."""
    try:
        python = environment(torch)
    except subprocess.CalledProcessError:
        return [torch, capability, threads, "cannot be installed here", "", ""], True
    command = [ROOT / "tests" / "on_processor.sh", capability, python]
    code = "import torch; print(torch.__version__, torch.backends.cpu.get_cpu_capability())"
    found = subprocess.run([*command, "-c", code], capture_output=True, text=True,
                           check=True).stdout.split()
    # Two workers of two threads on two cores are ten times slower than one.
    workers = ["-n", "0"] if threads > 1 else ["-n", "auto", "--dist", "loadfile"]
    start = time.perf_counter()
    suite = subprocess.run([*command, "-m", "pytest", *workers, *pytest_arguments], cwd=ROOT,
                           text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                           env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    seconds, passed = time.perf_counter() - start, suite.returncode == 0
    log = OUT / f"{capability}-{threads}-{found[0]}.txt"
    log.write_text(suite.stdout)
    last_line = suite.stdout.splitlines()[-1] if suite.stdout else ""
    counts = re.findall(r"\d+ (?:failed|passed|skipped|errors?)", last_line)
    return [*found, threads, ", ".join(counts) or "no test ran", f"{seconds:.0f} s",
            "" if passed else log.relative_to(ROOT)], passed


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--machines", nargs="*", type=machine, metavar="CAPABILITY:THREADS[:TORCH]")
    parser.add_argument("--capabilities", action="store_true", help="print those of this processor")
    parser.add_argument("pytest_arguments", nargs="*", metavar="ARGUMENT", help="after --")
    args = parser.parse_args()
    if args.capabilities:
        print(*capabilities())
        return
    OUT.mkdir(parents=True, exist_ok=True)
    row = "{:<14} {:<10} {:>7}  {:<34} {:>7}  {}".format
    print(row("torch", "capability", "threads", "result", "time", ""), flush=True)
    all_passed = True
    for one in args.machines or covering_set():
        cells, passed = run(*one, args.pytest_arguments)
        all_passed &= passed
        print(row(*map(str, cells)), flush=True)
    sys.exit(not all_passed)


if __name__ == "__main__":
    main()
