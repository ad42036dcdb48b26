"""The layout of the repository: who imports whom, sizes of lines and functions, links."""
import ast
import random
import re
from graphlib import TopologicalSorter

import numpy as np
import pytest
import torch
from conftest import ROOT, SEED

SCRIPTS = {"ROME_cifar10", "ROME_cifar100", "pretrain", "evaluate", "verify", "export", "report",
           "benchmark"}
MODULES = {"rome", "experiment", "utils", "synsets", "network_pool", "datasets", "networks",
           "augment", "attacks", "attack_grid", "target_models", "sanity"}
TAKE_ARGS = SCRIPTS | {"rome", "experiment"}  # and the Evaluator of utils
PACKAGES = ("runtime", "formats", "reporting")
PATHS = sorted((*ROOT.glob("*.py"), *(p for name in PACKAGES for p in ROOT.glob(f"{name}/*.py"))))
FILES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path
         for path in PATHS if path.name != "__init__.py"}
OUTSIDE = sorted(ROOT.glob("experiments/**/*.py"))  # scripts of an experiment, imported by nothing
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md")),
         *sorted(ROOT.glob("experiments/**/README.md"))]


def ours(path):
    """Which of our files a file imports, anywhere in it: {"utils", "runtime.cost"}."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & set(FILES)


IMPORTS = {name: ours(path) for name, path in FILES.items()}


def test_the_top_level_files_are_known():
    assert {name for name in FILES if "." not in name} == SCRIPTS | MODULES


@pytest.mark.parametrize("name", FILES)
def test_imports_go_in_one_direction(name):
    room = name.split(".")[0]
    allowed = {"runtime": {"runtime"}, "formats": {"runtime", "formats", "datasets"},
               "reporting": {*PACKAGES, *MODULES} - {"rome", "experiment"}}
    allowed = allowed.get(room, {*PACKAGES, *MODULES})
    if room in MODULES:
        allowed -= {"reporting"}
    assert {other.split(".")[0] for other in IMPORTS[name]} <= allowed, IMPORTS[name]


@pytest.mark.parametrize("name", sorted(set(FILES) - TAKE_ARGS))
def test_flags_go_down_as_named_values(name):
    functions = [node for node in ast.walk(ast.parse(FILES[name].read_text()))
                 if isinstance(node, ast.FunctionDef)
                 and "args" in [argument.arg for argument in node.args.args]]
    allowed = {"train_config", "__init__"} if name == "utils" else set()
    assert {function.name for function in functions} <= allowed


def test_no_import_cycle():
    tuple(TopologicalSorter(IMPORTS).static_order())  # raises CycleError


@pytest.mark.parametrize("path", [*FILES.values(), *OUTSIDE, *sorted(ROOT.glob("tests/*.py"))],
                         ids=lambda path: str(path.relative_to(ROOT)))
def test_lines_and_functions_are_short_and_pages_exist(path):
    text = path.read_text()
    assert not [number for number, line in enumerate(text.splitlines(), 1) if len(line) > 100]
    assert all((ROOT / page).exists() for page in re.findall(r"docs/\w+\.md", text))
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    if path.parent.name != "tests":
        assert not [node.name for node in functions
                    if node.end_lineno - node.lineno >= 45 and node.name != "parse_args"]


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 90


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_paths_exist(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)|src=\"([^\"]+)\"", text):
        target = "".join(target)
        assert target.startswith("http") or (page.parent / target).exists(), target
    folders = "|".join(("docs", "tests", "experiments", *PACKAGES))
    for name in re.findall(rf"`((?:{folders})/[^\s`*<]*|[\w-]+\.(?:py|md|sh))`", text):
        assert (ROOT / name).exists() or (page.parent / name).exists(), name


@pytest.mark.parametrize("again", [False, True])
def test_every_test_draws_the_same_numbers(again):
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(SEED)))
    assert np.random.rand() == np.random.RandomState(SEED).rand()
    assert random.random() == random.Random(SEED).random()
