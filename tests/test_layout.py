"""The plan of the house: what is upstairs and downstairs, and in which direction they know each other."""
import ast
import random
import re

import numpy as np
import pytest
import torch
from conftest import ROOT, SEED

SCRIPTS = ("ROME_cifar10", "ROME_cifar100", "pretrain", "evaluate", "export", "report", "benchmark")
MODULES = ("utils", "sets", "targets", "sanity", "attacks", "augment", "networks")  # what the scripts share of the method
ENGINE = sorted(path.stem for path in (ROOT / "engine").glob("*.py"))


def imports(path):
    """The names of our own files that a file imports, anywhere in it: "utils", "runtime.cost"."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"engine.{alias.name}" for alias in node.names} if node.module == "engine" else {node.module}
    ours = {*SCRIPTS, *MODULES, *(f"engine.{name}" for name in ENGINE)}
    assert not {name for name in found if name.startswith("engine.")} - ours, path
    return found & ours


def test_these_are_all_files():
    assert {path.stem for path in ROOT.glob("*.py")} == {*SCRIPTS, *MODULES}


@pytest.mark.parametrize("name", [*MODULES, *SCRIPTS])
def test_nothing_imports_a_script(name):
    assert not imports(ROOT / f"{name}.py") & set(SCRIPTS)


@pytest.mark.parametrize("name", ENGINE)
def test_the_engine_knows_nothing_of_upstairs(name):
    assert all(other.startswith("engine.") for other in imports(ROOT / "engine" / f"{name}.py"))


def test_imports_go_one_way():
    """No cycle: files can be taken away one by one, each importing only what is left."""
    left = {**{name: imports(ROOT / f"{name}.py") for name in (*SCRIPTS, *MODULES)},
            **{f"engine.{name}": imports(ROOT / "engine" / f"{name}.py") for name in ENGINE}}
    while left:
        free = [name for name, needed in left.items() if not needed & set(left)]
        assert free, f"a cycle among {sorted(left)}"
        for name in free:
            del left[name]


def test_no_line_is_wider_than_a_page():
    for path in (*ROOT.glob("*.py"), *(ROOT / "engine").glob("*.py"), *(ROOT / "tests").glob("*.py")):
        assert not [line for line in path.read_text().splitlines() if len(line) > 128], path


def test_the_readme_is_a_page_and_its_map_is_whole():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 200
    named = re.findall(r"`([\w/.]+\.py)`", text)
    assert {f"{name}.py" for name in (*SCRIPTS, *MODULES)} <= set(named)
    assert {f"engine/{name}.py" for name in ENGINE if name != "__init__"} <= set(named)


@pytest.mark.parametrize("page", [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "CONTRIBUTING.md"],
                         ids=lambda path: path.name)
def test_what_the_pages_link_to_is_there(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert target.startswith("http") or (page.parent / target).exists(), target
    for name in re.findall(r"`((?:tests|docs|engine|result/recorded)/[\w/.+-]*)`", text):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("script", ["ROME_cifar10.py", "ROME_cifar100.py"])
def test_one_iteration_is_read_in_the_first_two_thirds(script):
    tree = ast.parse((ROOT / script).read_text())
    ends = {node.name: node.end_lineno for node in tree.body if isinstance(node, ast.FunctionDef)}
    length = max(ends.values())
    for name in ("robustness_aligned_loss", "performance_aligned_loss", "robust_prior", "matching_step", "pool_step",
                 "outer_iteration", "distill"):
        assert ends[name] <= 2 / 3 * length, name


@pytest.mark.parametrize("again", [False, True])
def test_every_test_draws_the_same_numbers(again):
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(SEED)))
    assert np.random.rand() == np.random.RandomState(SEED).rand() and random.random() == random.Random(SEED).random()
