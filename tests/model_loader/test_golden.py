"""Every golden case of the networks, through the functions that `verify` runs."""

import pytest
from pack.verify import autoencoders, dit, text
from pack.verify.case import GOLDEN, Case, checks_of

KINDS = {**dit.KINDS, **text.KINDS, **autoencoders.KINDS}
CASES = [path for path in sorted(GOLDEN.glob("*.json")) if Case.read(path).kind in KINDS]


def test_the_folder_holds_every_kind():
    assert {Case.read(path).kind for path in CASES} == set(KINDS)


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_golden(path):
    case = Case.read(path)
    checks = list(checks_of(case, KINDS))
    assert [check for check in checks if not check.ok] == []
    assert {check.tensor for check in checks} >= set(case.outputs)


@pytest.mark.parametrize("tensor", ["layer2.mlp_out", "v_audio", "rope", "local_attn_mask", "inv_permute_mapping"])
def test_a_changed_tensor_is_noticed(tensor):
    case = Case.read(GOLDEN / "dit_a3_fp32.json")
    golden = case.tensors[f"out.{tensor}"]
    golden.view(-1)[0] += 1e-3 if golden.is_floating_point() else 1
    assert f"out.{tensor}" in {check.tensor for check in checks_of(case, KINDS) if not check.ok}
