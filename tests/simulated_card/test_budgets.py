"""The full-size pipeline, through ComfyUI, stays within the cards it is made for, and takes what is predicted."""

import pytest
import torch
from pack.benchmarks.budgets import SET_ASIDE, STAGES, run
from pack.benchmarks.memory import tokens_of
from pack.benchmarks.model_files import write_models
from pack.benchmarks.pipeline import pipeline
from pack.model_loader.config import DISTILL, SR_540P, SR_1080P, TURBO_7_7
from pack.sampler.memory import decode_bytes, sampling_bytes, weight_bytes
from pack.sampler.sizes import pixel_size

SECONDS, STEPS = 5.0, 2  # every step takes the same memory, and the first one is no exception


def brief(size):
    """Return the pipeline's graph, of STEPS steps a sampler."""
    graph = pipeline(size, SECONDS)
    for node in graph.values():
        if "steps" in node["inputs"]:
            node["inputs"]["steps"] = STEPS
    return graph


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folder of a whole pipeline's files in int8, of the full size, without content."""
    folder = tmp_path_factory.mktemp("empty")
    write_models(folder, "int8")
    return folder


@pytest.mark.parametrize(
    ("gib", "size", "config", "way"),
    [
        pytest.param(24, "1080p", SR_1080P, "dynamic", id="1080p in 24 GB"),
        pytest.param(16, "540p", SR_540P, "not dynamic", id="540p in 16 GB"),
        pytest.param(12, "256p", None, "dynamic", id="256p in 12 GB"),
    ],
)
def test_the_pipeline_fits(built, models, gib, size, config, way):
    nodes, error = run(built, models, gib, brief(size), way)
    assert error is None
    used = {node["node"]: node for node in nodes}
    assert used.keys() >= STAGES.keys() - ({"SuperResolution"} if config is None else set())
    assert 10e9 < max(node["peak"] for node in nodes) <= gib * 2**30 - SET_ASIDE
    predicted = {"Sampler": sampling_bytes(DISTILL, tokens_of(pixel_size("256p", "16:9"), SECONDS))}
    if config is not None:
        predicted["SuperResolution"] = sampling_bytes(config, tokens_of(pixel_size(size, "16:9"), SECONDS))
        predicted["SaveVideo"] = decode_bytes(TURBO_7_7, *pixel_size(size, "16:9"), torch.bfloat16)
    for node, expected in predicted.items():
        beyond_weights = used[node]["peak"] - used[node]["after"]
        assert beyond_weights == pytest.approx(expected, rel=0.1), node


def test_a_layer_brings_its_weights_once_a_step(built, models):
    """Not once for each of the 16 pieces in which 1080p passes it."""
    nodes, error = run(built, models, 16, brief("1080p"))
    (moved,) = (node["moved"] for node in nodes if node["node"] == "SuperResolution")
    weights = weight_bytes("dit", SR_1080P, "int8")[0]
    assert error is None and weights < moved < STEPS * weights


def test_a_card_that_is_too_small_is_told_so(built, models):
    nodes, error = run(built, models, 5, brief("1080p"))
    assert "out of memory" in error
    assert [node["node"] for node in nodes if node["node"] in STAGES] == ["Sampler", "SuperResolution"]
