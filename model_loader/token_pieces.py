"""Long sequences in pieces: how they are cut and split, one expert's after another's."""

import itertools
import math

import torch

PIECE = 4352  # tokens that pass the linears at a time, at most: five seconds of 256p with the longest prompt are one


def cut(spans, experts, short_too=False):
    """Cut a sequence of more than PIECE tokens into pieces of fewer, where there are experts none of two of them.

    short_too: between experts a shorter one is cut too. A card takes longer to join what they return than to launch
    small kernels, a processor does not. With gradients nothing is cut: autograd keeps every row anyway. Returns for
    every piece the lengths of its spans, one for each expert.
    """
    spans = spans if experts > 1 else (sum(spans),)
    if torch.is_grad_enabled() or sum(spans) <= PIECE and not (short_too and experts > 1):
        return [tuple(spans)]
    pieces = []
    for expert, span in enumerate(spans):
        count = math.ceil(span / PIECE)
        lengths = (span * (i + 1) // count - span * i // count for i in range(count))
        pieces += [tuple(length if i == expert else 0 for i in range(experts)) for length in lengths]
    return pieces


def split(x, pieces, dim=1):
    """Split a tensor or Fp8Rows along its tokens into the pieces that `cut` gave."""
    return x.split([sum(piece) for piece in pieces], dim)


def by_expert(pieces, *parts):
    """Yield, for every run of pieces of one expert: its number, and a tuple for each of them of what `parts` has."""
    of_piece = [max(range(len(piece)), key=piece.__getitem__) for piece in pieces]
    for expert, run in itertools.groupby(zip(of_piece, *parts, strict=True), key=lambda part: part[0]):
        yield expert, [part[1:] for part in run]
