"""Every golden case of the sampler and of pixels, through the functions that `verify` runs."""

from pathlib import Path

import pytest
from pack.verify import media, sampling
from pack.verify.case import GOLDEN, Case, checks_of

KINDS = {**sampling.KINDS, **media.KINDS}
CASES = sorted(path for family in ("sampler_*.json", "image_*.json") for path in Path(GOLDEN).glob(family))


def test_the_folder_holds_every_kind():
    assert {Case.read(path).kind for path in CASES} == set(KINDS)


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_golden(path):
    checks = list(checks_of(Case.read(path), KINDS))
    assert checks
    assert [check for check in checks if not check.ok] == []
