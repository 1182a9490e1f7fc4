"""Weights for networks whose own start is whatever the memory held: core's."""

import torch


@torch.no_grad()
def random_weights(network):
    """Fill a network of core's in place, every layer near unit gain; return it."""
    for name, weight in network.named_parameters():
        fan_in = weight[0].numel() if weight.ndim > 1 else 1
        weight.copy_(torch.ones_like(weight) if name.endswith("gamma") else torch.randn_like(weight) * fan_in**-0.5)
    return network
