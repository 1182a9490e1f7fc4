"""The manifest of full-size tensors: every one must have its place in our networks, and every place its tensor."""

import torch

from ..model_loader.checkpoint import Checkpoint
from ..model_loader.detect import describe
from ..model_loader.key_map import KEY_MAPS
from ..model_loader.load import expected_tensors, plan
from .case import Check


def manifest_checks(case):
    """One check a component (name -> state dict of [shape, dtype]): recognised by its names, then matched on meta."""
    for name, component in case.config["components"].items():
        tensors = {
            component.get("checkpoint_prefix", "").split("*")[0] + key: torch.empty(shape, device="meta")
            for key, (shape, _) in component["state_dict"].items()
        }
        yield placed(f"components.{name}", Checkpoint.of_tensors(tensors, path=f"{case.name}/{name}"))


def placed(name, checkpoint):
    """Check that describe() knows the network of a checkpoint of meta tensors; the error counts those without a place.

    plan() itself raises where a place is left without its tensor.
    """
    found = describe(checkpoint, variant="distill")
    wanted = expected_tensors(found.network, found.config, dtype=torch.bfloat16)
    known = {*plan(found.network, checkpoint, found.prefix, wanted)}
    known.update(found.prefix + computed for computed in KEY_MAPS[found.network].computed)
    return Check(name, float(len(set(checkpoint.headers) - known)))


KINDS = {"manifest": manifest_checks}
