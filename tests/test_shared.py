"""Duplication on purpose is byte-identical. Repair a failure with `python tests/sync_shared.py SCRIPT`."""

import ast
from itertools import combinations

import pytest
from conftest import ROOT
from sync_shared import OWN, OWN_FLAGS, SCRIPTS, flags, pieces, regions

PAIRS = list(combinations(SCRIPTS, 2))
# Which script holds which marked regions of main. A new script adds its line.
REGIONS = {
    "sft.py": ["init"],
    "dpo.py": ["init"],
    "reward_model.py": ["init"],
    "grpo.py": ["init"],
    "async_grpo.py": ["init"],
    "gkd.py": ["init"],
}


def test_every_script_is_in_the_table_and_holds_its_regions():
    assert set(REGIONS) == set(SCRIPTS)
    for script, names in REGIONS.items():
        assert list(regions((ROOT / script).read_text())) == names


@pytest.mark.parametrize(("a", "b"), PAIRS)
def test_functions_flags_and_regions_of_one_name_are_identical(a, b):
    one, two = (ROOT / a).read_text(), (ROOT / b).read_text()
    for read, what in ((pieces, "definition"), (flags, "flag"), (regions, "region")):
        found, expected = read(one), read(two)
        for name in found.keys() & expected.keys() - OWN:
            assert found[name] == expected[name], (
                f"{what} {name} differs: python tests/sync_shared.py {a} (or {b})"
            )


def test_the_readers_see_a_difference():
    """The checks above can fail: one changed byte of a function, of a flag's docstring and of a region is seen."""
    source = (ROOT / "sft.py").read_text()
    assert len(pieces(source)) > 20
    assert len(flags(source)) == len(
        next(n for n in ast.parse(source).body if getattr(n, "name", "") == "Args").body
    ) // 2 - len(OWN_FLAGS - {"beta"})  # sft.py has no beta
    assert (
        pieces(source)["full"]
        != pieces(source.replace("return tensor.full_tensor()", "return tensor. full_tensor()"))["full"]
    )
    assert flags(source)["seed"] != flags(source.replace("Seeds the data order", "Seeds data order"))["seed"]
    assert (
        regions(source)["init"]
        != regions(source.replace("caught_signals = catch_signals()", "caught_signals = []"))["init"]
    )
