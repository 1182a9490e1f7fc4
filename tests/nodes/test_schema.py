"""What a user reads on the nodes: names that stay, tooltips on everything, a help page each; and that they are thin."""

import inspect
from pathlib import Path

import pytest
from pack.benchmarks import pipeline
from pack.nodes import NODES
from pack.nodes.conditioning import MAX_SECONDS, MIN_SECONDS
from pack.nodes.speed import CORES
from pack.nodes.weight_dtypes import SMALL, WIDE

DOCS = Path(__file__).parents[2] / "web" / "docs"
IDS = {
    "HappyHorseLoadCheckpoint", "HappyHorseLoadModel", "HappyHorseLoadTextEncoder", "HappyHorseLoadVideoVAE",
    "HappyHorseLoadAudioVAE", "HappyHorseEncodePrompt", "HappyHorseEmptyLatent", "HappyHorseFirstImage",
    "HappyHorseSampler", "HappyHorseSamplerSelect", "HappyHorseSigmas", "HappyHorseDecode", "HappyHorseSaveVideo",
    "HappyHorseGuider", "HappyHorseNegativePrompt", "HappyHorseSoundtrack", "HappyHorseSuperResolution",
    "HappyHorseContinue", "HappyHorseJoin",
    "HappyHorsePromptBuilder", "HappyHorsePromptEnhancer", "HappyHorseEncode",
}  # fmt: skip


def every_input(inputs):
    """Yield inputs and the ones that their choices open."""
    for one in inputs:
        yield one
        for option in getattr(one, "options", None) or ():
            yield from every_input(getattr(option, "inputs", ()))


def test_ids_stay_because_saved_workflows_name_them():
    assert IDS <= {node.GET_SCHEMA().node_id for node in NODES}


@pytest.mark.parametrize("node", NODES, ids=lambda node: node.GET_SCHEMA().node_id)
def test_everything_is_explained(node):
    schema = node.GET_SCHEMA()
    assert schema.node_id.startswith("HappyHorse") and schema.category.split("/")[0] == "HappyHorse"
    assert schema.display_name and schema.description.endswith(".") and schema.search_aliases
    for one in [*every_input(schema.inputs), *schema.outputs]:
        assert one.tooltip and one.tooltip.rstrip().endswith((".", ")")), f"{schema.node_id}.{one.id} lacks a tooltip"


@pytest.mark.parametrize("node", NODES, ids=lambda node: node.GET_SCHEMA().node_id)
def test_help_page_names_every_input(node):
    schema = node.GET_SCHEMA()
    page = (DOCS / f"{schema.node_id}.md").read_text(encoding="utf-8")
    assert page.startswith(f"# {schema.display_name}\n")
    missing = [one.id for one in every_input(schema.inputs) if f"`{one.display_name or one.id}`" not in page]
    assert not missing


def test_no_help_page_is_left_over():
    assert {page.stem for page in DOCS.glob("*.md")} == {node.GET_SCHEMA().node_id for node in NODES}


@pytest.mark.parametrize("node", NODES, ids=lambda node: node.GET_SCHEMA().node_id)
def test_nodes_stay_thin(node):
    assert len(inspect.getsource(node.execute).splitlines()) <= 22, "a node unpacks, calls and returns"


def test_run_py_speed_takes_what_the_nodes_take():
    assert pipeline.ATTENTIONS == ("default", "fp8", *CORES) and pipeline.SECONDS == (MIN_SECONDS, MAX_SECONDS)
    assert set(pipeline.PRECISIONS) == {*WIDE, *SMALL} - {"fp16", "fp32"}
