"""int8 matrices with a scale for each row, and what ComfyUI's `convrot` files do to their columns first."""

import torch

INT8_LARGEST = 127


def quantise_int8(weight):
    """Return weight [O, I] as (values [O, I] int8, scale [O, 1] fp32): a row's largest magnitude becomes 127.

    Rounding costs a row of normally distributed numbers 0.9 % of its RMS, an e4m3 number of the same size 2.6 %.
    """
    wide = weight.float()
    scale = wide.abs().amax(-1, keepdim=True).clamp(min=1e-12) / INT8_LARGEST
    return (wide / scale).round_().to(torch.int8), scale


def rotated_back(weight, group):
    """Undo ConvRot's rotation of weight [O, I] in fp32: columns in groups of `group`, a power of four dividing I.

    The rotation is the Kronecker power of a symmetric 4 x 4 Hadamard matrix, so it is its own inverse.
    """
    kernel = torch.ones(4, 4) - 2 * torch.eye(4).flip(0)
    rotation = torch.ones(1, 1)
    while len(rotation) < group:
        rotation = torch.kron(rotation, kernel)
    return (weight.unflatten(-1, (-1, group)) @ (rotation / group**0.5)).flatten(-2)
