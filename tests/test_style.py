"""Promises of size and shape, and a README that tells the truth about them."""

import ast
import re

import pytest
from conftest import ROOT
from sync_shared import SCRIPTS

# Lines. Raising one is a commit of its own that says what it buys.
LIMITS = {
    "sft.py": 1290,
    "dpo.py": 1690,
    "reward_model.py": 1370,
    "grpo.py": 2260,
    "async_grpo.py": 2840,
    "gkd.py": 2265,
    "common.py": 3270,
    "README.md": 300,
}


@pytest.mark.parametrize("name", LIMITS)
def test_files_stay_small(name):
    assert len((ROOT / name).read_text().splitlines()) <= LIMITS[name]


def test_every_script_has_a_limit():
    assert set(LIMITS) == {*SCRIPTS, "common.py", "README.md"}


@pytest.mark.parametrize("name", [*SCRIPTS, "common.py"])
def test_shape(name):
    source = (ROOT / name).read_text()
    tree = ast.parse(source)
    assert source.isascii()
    assert max(map(len, source.splitlines())) <= 110
    assert not re.search(r"^\s*except:", source, re.M)
    assert not re.search(
        r"accelerate|from transformers import .*\bTrainer\b|torch\.load\(|empty_cache", source
    )
    for node in ast.walk(tree):
        if isinstance(node, (ast.For, ast.While)):
            nested = [
                type(inner).__name__
                for inner in ast.walk(node)
                if isinstance(inner, (ast.FunctionDef, ast.Lambda))
            ]
            assert not nested, f"a function in the loop of line {node.lineno}"
        assert not isinstance(node, ast.Global)


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_have_one_form(name):
    tree = ast.parse((ROOT / name).read_text())
    assert 15 <= len(ast.get_docstring(tree).splitlines()) <= 32
    names = [node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    assert names[0] == "Args"
    assert names[-1] == "main"
    fields = next(node for node in tree.body if getattr(node, "name", "") == "Args").body
    assert [type(node) for node in fields] == [ast.AnnAssign, ast.Expr] * (len(fields) // 2), (
        "each flag has a docstring"
    )
    imported = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if node.module in SCRIPTS
    }
    assert not imported


def test_common_imports_no_script():
    modules = {
        node.module
        for node in ast.walk(ast.parse((ROOT / "common.py").read_text()))
        if isinstance(node, ast.ImportFrom)
    }
    assert not modules & {name.removesuffix(".py") for name in SCRIPTS}


def test_nothing_else_at_top_level():
    allowed = {
        "README.md",
        "requirements.txt",
        "common.py",
        "tests",
        "LICENSE",
        "pyproject.toml",
        ".gitignore",
        ".ci",
        *SCRIPTS,
    }
    made = {".git", ".venv", "runs", "wandb", "__pycache__", ".pytest_cache", ".ruff_cache", ".hypothesis"}
    assert {path.name for path in ROOT.iterdir()} - made == allowed


def test_readme_tells_the_lines_of_each_file():
    readme = (ROOT / "README.md").read_text()
    for name in [*SCRIPTS, "common.py"]:
        lines = len((ROOT / name).read_text().splitlines())
        stated = re.search(rf"^\| `{name}` \|.*?\| (\d+) \|", readme, re.M)
        assert stated, f"the README's table has no row for {name}"
        assert int(stated[1]) == lines, f"{name} has {lines} lines; the README says {stated[1]}"
