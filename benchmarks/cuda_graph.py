"""A call recorded once as a CUDA graph and replayed: a card that is faster than Python launches its kernels waits less.

Measured only, at the size where that shows; the nodes run every kernel on its own. A recording holds addresses, and
ComfyUI may move a model's weights between two prompts.
"""

import torch


def graphed(call, *inputs):
    """Record call(*inputs) and return a function that replays it on other tensors of the same shapes.

    call: launches kernels on the current CUDA device and asks nothing of the host (no `.item()`). Its results lie
    where the next replay overwrites them.
    """
    held = [tensor.clone() for tensor in inputs]
    here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
    aside.wait_stream(here)
    with torch.cuda.stream(aside):
        call(*held)  # kernels are compiled and chosen when they first run, which cannot be recorded
    here.wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call(*held)

    def replay(*tensors):
        for place, tensor in zip(held, tensors, strict=True):
            place.copy_(tensor)
        graph.replay()
        return results

    return replay
