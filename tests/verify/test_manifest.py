"""The manifest of full-size tensors maps onto our networks, and one that does not fit is noticed."""

import copy

import pytest
from pack.verify import manifest
from pack.verify.case import GOLDEN, Case, checks_of


@pytest.fixture(scope="module")
def full():
    return Case.read(GOLDEN / "manifest_full.json")


def checks(full, name=None, change=None):
    config = copy.deepcopy(full.config)
    if name is not None:
        config["components"] = {name: config["components"][name]}
        change(config["components"][name]["state_dict"])
    return list(checks_of(Case(full.name, config, {}, full.folder), manifest.KINDS))


def test_every_full_size_tensor_has_its_place(full):
    found = checks(full)
    assert [check.tensor for check in found] == [f"components.{name}" for name in full.config["components"]]
    assert len(found) == 5 and all(check.ok for check in found)


def test_a_missing_tensor_is_named(full):
    (check, *_) = checks(full, "dit", lambda tensors: tensors.pop("final_norm_video.weight"))
    assert not check.ok and "final_norm_video.weight" in check.message


def test_a_tensor_without_a_place_fails(full):
    (check, *_) = checks(full, "turbo_vaed", lambda tensors: tensors.update({"decoder.more.weight": [[3], "float32"]}))
    assert not check.ok


def test_another_size_fails(full):
    name = "block.layers.7.attention.linear_qkv.weight"
    (check, *_) = checks(full, "dit", lambda tensors: tensors.update({name: [[7208, 5121], "bfloat16"]}))
    assert not check.ok and name in check.message
