"""Duplication on purpose is byte-identical. Repair a failure with `python tests/sync_shared.py SCRIPT`."""

from itertools import combinations

import pytest
from conftest import ROOT
from sync_shared import OWN, SCRIPTS, flags, pieces, regions, synchronise

READERS = {"definition": pieces, "flag": flags, "region": regions}


def test_every_script_holds_the_marked_regions():
    assert all(list(regions((ROOT / script).read_text())) == ["init"] for script in SCRIPTS)


@pytest.mark.parametrize(("a", "b"), combinations(SCRIPTS, 2))
def test_functions_flags_and_regions_of_one_name_are_identical(a, b):
    one, two = (ROOT / a).read_text(), (ROOT / b).read_text()
    for what, read in READERS.items():
        found, expected = read(one), read(two)
        for name in found.keys() & expected.keys() - OWN:
            repair = f"python tests/sync_shared.py {a} (or {b})"
            assert found[name] == expected[name], f"{what} {name} differs: {repair}"


def test_a_difference_is_seen_and_mended():
    """A changed function, flag and region of main."""
    source = (ROOT / "sft.py").read_text()
    changes = {
        "def lr_factor(step": "def lr_factor(steps",
        "Seeds the data": "Orders the data",
        "device = init": "gpu = init",
    }
    changes["seed: Annotated[int"] = "seed: Annotated[float"
    for old, new in changes.items():
        assert source.count(old) >= 1, old
        changed = source.replace(old, new, 1)
        assert any(read(source) != read(changed) for read in READERS.values()), old
        assert synchronise(source, changed) == source, old
