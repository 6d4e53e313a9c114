"""Real text without a network: questions and answers from the docstrings of Python's standard library.

python tests/assets/stdlib_conversations.py OUTPUT_DIR    writes train.jsonl and heldout.jsonl, rows of `messages`
"""

import ast
import json
import random
import sys
import sysconfig
from pathlib import Path


def docstrings():
    """[(qualified name, first paragraph of its docstring), ...] of every function and class in the standard library."""
    library, found = Path(sysconfig.get_paths()["stdlib"]), {}
    for path in sorted(library.rglob("*.py")):
        module = path.relative_to(library).with_suffix("")
        if {"site-packages", "test", "tests", "idlelib", "lib2to3"} & set(module.parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and (text := ast.get_docstring(node)):
                paragraph = " ".join(text.split("\n\n")[0].split())
                if 20 <= len(paragraph) <= 600 and not node.name.startswith("_"):
                    found.setdefault(f"{'.'.join(module.parts)}.{node.name}", paragraph)
    return sorted(found.items())


def conversations():
    return [
        {
            "messages": [
                {"role": "user", "content": f"What does {name} do?"},
                {"role": "assistant", "content": text},
            ]
        }
        for name, text in docstrings()
    ]


if __name__ == "__main__":
    output, rows = Path(sys.argv[1]), conversations()
    random.Random(0).shuffle(rows)
    output.mkdir(parents=True, exist_ok=True)
    for name, part in (("heldout", rows[:300]), ("train", rows[300:])):
        (output / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    print(f"{len(rows) - 300} training and 300 held-out conversations in {output}")
