"""NaN and infinite values, found where they arise: a damaged file says so instead of giving a black, silent clip."""

import torch


def require_finite(tensor, who, also=""):
    """Return `tensor`; ValueError, naming the network `who` that made it, where it holds NaN or infinity.

    also: what else than a damaged file can be the cause, and what to do then. Waits for the device.
    """
    if not torch.isfinite(tensor).all():
        raise ValueError(
            f"{who} gave NaN or infinite values; the clip would be black or silent. Its file is probably damaged: "
            f"compare its size and checksum with those where it came from, and download it again.{also and ' ' + also}"
        )
    return tensor
