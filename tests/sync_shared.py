"""Copy what the scripts share from one of them to the others: python tests/sync_shared.py SCRIPT

Shared are top-level functions and classes of one name (all but Args and main), the type and docstring of flags of one
name (defaults may differ), and the regions of main between `# --- shared: NAME ---` and `# --- end shared ---`.
"""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ["sft.py", "dpo.py", "reward_model.py", "grpo.py", "async_grpo.py", "gkd.py"]
OWN = {"Args", "main", "check_args"}  # of one name in every script, and its own in each
OWN_FLAGS = {"loss_type", "label_smoothing", "beta"}  # TRL's names, whose meaning depends on the algorithm
REGION = re.compile(r"^ *# --- shared: (\w+) ---\n.*?^ *# --- end shared ---\n", re.S | re.M)


def spans(source):
    """Name -> (first line, last line + 1) of every top-level function and class, decorators included."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
            found[node.name] = (first, node.end_lineno)
    return found


def pieces(source):
    """Name -> text of every top-level function and class."""
    lines = source.splitlines(keepends=True)
    return {name: "".join(lines[first:last]) for name, (first, last) in spans(source).items()}


def fields(source):
    """Name -> (node of the field, node of its docstring) for every flag that scripts may share."""
    args = next(node for node in ast.parse(source).body if getattr(node, "name", "") == "Args")
    pairs = zip(args.body[::2], args.body[1::2], strict=True)
    return {field.target.id: (field, doc) for field, doc in pairs if field.target.id not in OWN_FLAGS}


def flags(source):
    """Name -> (type, docstring) of every field of Args that scripts may share."""
    return {
        name: (ast.unparse(field.annotation), doc.value.value)
        for name, (field, doc) in fields(source).items()
    }


def regions(source):
    """Name -> text of every marked region of main."""
    return {match[1]: match[0] for match in REGION.finditer(source)}


def synchronise(source, target):
    """`target` with everything that it shares with `source` replaced by the latter's."""
    for name, text in pieces(source).items():
        if name not in OWN and name in (place := spans(target)):
            lines = target.splitlines(keepends=True)
            lines[slice(*place[name])] = [text]
            target = "".join(lines)
    for name, text in regions(source).items():
        target = REGION.sub(
            lambda match, name=name, text=text: text if match[1] == name else match[0], target
        )
    for name, (field, doc) in fields(source).items():
        if name in fields(target) and flags(target)[name] != flags(source)[name]:
            own, own_doc = fields(target)[name]
            kind, default = (
                ast.get_source_segment(*place) for place in ((source, field.annotation), (target, own.value))
            )
            text = f'    {name}: {kind} = {default}\n    """{doc.value.value}"""\n'
            lines = target.splitlines(keepends=True)
            lines[own.lineno - 1 : own_doc.end_lineno] = [text]
            target = "".join(lines)
    return target


if __name__ == "__main__":
    model = (ROOT / sys.argv[1]).read_text()
    for script in SCRIPTS:
        if script != Path(sys.argv[1]).name:
            (ROOT / script).write_text(synchronise(model, (ROOT / script).read_text()))
