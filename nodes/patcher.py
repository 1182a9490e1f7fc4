"""Core's ModelPatcher for our models: with it, integer weights that wait in RAM can be saved as well."""

import functools

import comfy.model_patcher
import torch

LAZY = ("LazyCastingParam", "LazyCastingParamPiece")  # core's stand-ins for weights that are patched as they are saved


class SavesIntegers:
    """What core's patchers lack: their stand-ins ask for gradients, which int8 weights and .gguf blocks cannot have."""

    def model_state_dict_for_saving(self, *arguments, **options):
        """Return {name: tensor or stand-in} as core's method of this name."""
        cores = {name: getattr(comfy.model_patcher, name) for name in LAZY}
        try:
            for name, stand_in in cores.items():
                setattr(comfy.model_patcher, name, _without_gradient(stand_in))
            return super().model_state_dict_for_saving(*arguments, **options)
        finally:
            for name, stand_in in cores.items():
                setattr(comfy.model_patcher, name, stand_in)


@functools.cache
def saving_integers(patcher_class):
    """Return either of core's patcher classes as one that saves integers; on a CPU core makes it a plain one again."""
    return type(patcher_class.__name__, (SavesIntegers, patcher_class), {})


def _without_gradient(stand_in):
    def new(cls, *arguments):
        return torch.Tensor._make_subclass(cls, arguments[-1].detach(), False)

    return type(stand_in.__name__, (stand_in,), {"__new__": new})
