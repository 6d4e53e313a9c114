"""Promises of size and shape, and a README that tells the truth about them."""

import ast
import re
from collections import Counter

import pytest
from conftest import ROOT
from sync_shared import SCRIPTS

# Most lines, lines of `main`, and flags of each file. A number goes down, but for a capability that is new.
LIMITS = {
    "sft.py": (720, 150, 38),
    "reward_model.py": (780, 160, 38),
    "dpo.py": (980, 190, 48),
    "gkd.py": (1000, 200, 48),
    "grpo.py": (1260, 240, 66),
    "async_grpo.py": (1500, 260, 68),
    "common.py": (2250, 0, 0),
}
ALL, TESTS, README_LINES, COLUMNS = 8350, 6130, 250, 110
README = (ROOT / "README.md").read_text()


def lines(name):
    return (ROOT / name).read_text().splitlines()


def definition(name, of):
    return next(node for node in ast.parse((ROOT / name).read_text()).body if getattr(node, "name", "") == of)


@pytest.mark.parametrize("name", LIMITS)
def test_files_main_and_flags_stay_small(name):
    most_lines, most_of_main, most_flags = LIMITS[name]
    assert len(lines(name)) <= most_lines
    if name in SCRIPTS:
        main, flags = definition(name, "main"), definition(name, "Args").body
        assert main.end_lineno - main.lineno + 1 <= most_of_main
        assert len(flags) // 2 <= most_flags
        kinds = [type(node) for node in flags]
        assert kinds == [ast.AnnAssign, ast.Expr] * (len(flags) // 2), "each flag has a docstring"
        assert all(doc.value.value.strip() for doc in flags[1::2])


def test_all_together_stay_small():
    assert set(LIMITS) == {*SCRIPTS, "common.py"}
    assert sum(len(lines(name)) for name in LIMITS) <= ALL
    assert sum(len(path.read_text().splitlines()) for path in (ROOT / "tests").glob("*.py")) <= TESTS
    assert len(README.splitlines()) <= README_LINES


@pytest.mark.parametrize("name", LIMITS)
def test_form(name):
    """A statement a line, at most 110 columns, no functions made in loops, and what DESIGN leaves out is left out."""
    source, tree = (ROOT / name).read_text(), ast.parse((ROOT / name).read_text())
    assert source.isascii()
    assert max(map(len, lines(name))) <= COLUMNS
    starts = Counter(node.lineno for node in ast.walk(tree) if isinstance(node, ast.stmt))
    assert max(starts.values()) == 1, [line for line, count in starts.items() if count > 1]
    assert not re.search(r"^\s*except:|accelerate|import .*\bTrainer\b|torch\.load\(", source, re.M)
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Global)
        if isinstance(node, (ast.For, ast.While)):
            assert not any(isinstance(inner, ast.FunctionDef) for inner in ast.walk(node)), node.lineno
        if isinstance(node, ast.ImportFrom):
            assert f"{node.module}.py" not in SCRIPTS, "a script is imported by nothing"
    if name in SCRIPTS:
        assert 12 <= len(ast.get_docstring(tree).splitlines()) <= 32
        names = [node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
        assert (set(names[: names.index("Args")]) <= {"Within", "Needs"}, names[-1]) == (True, "main")


def test_nothing_else_at_top_level():
    files = {
        "README.md",
        "requirements.txt",
        "tests",
        "LICENSE",
        "pyproject.toml",
        ".gitignore",
        ".ci",
        *LIMITS,
    }
    made = {".git", ".venv", "runs", "wandb", "__pycache__", ".pytest_cache", ".ruff_cache", ".hypothesis"}
    assert {path.name for path in ROOT.iterdir()} - made == files


@pytest.mark.parametrize("name", LIMITS)
def test_readme_tells_the_lines_of_each_file(name):
    stated = re.search(rf"^\| `{name}` \|.*?\| ([\d,]+) \|", README, re.M)
    assert stated, f"the README's table has no row for {name}"
    assert int(stated[1].replace(",", "")) == len(lines(name))


def test_readme_names_only_flags_that_exist():
    flags = {field.target.id for name in SCRIPTS for field in definition(name, "Args").body[::2]}
    others = {
        "--dist",
        "--nproc-per-node",
        "--nnodes",
        "--rdzv-backend",
        "--rdzv-endpoint",
        "--no-deps",
        "--help",
        "--append",
    }
    text = re.sub(r"^    .*python -m vllm.*\n(        .*\n)*", "", README, flags=re.M)  # vLLM's own flags
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text)) - others
    assert named <= {f"--{flag.replace('_', '-')}" for flag in flags}
