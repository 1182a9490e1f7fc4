"""Page graphs from API twins: widgets that nodes gain, dynamic choices, downloads, what cannot be written."""

import pytest
from pack.launch import LaunchError
from pack.launch.page_graph import completed, inputs_of, page_graph
from pack.launch.workflows import files_section

SIZES = {"options": [{"key": "small", "inputs": {}}, {"key": "own", "inputs": {"required": {"side": ["INT", {}]}}}]}
LOADER = {
    "input": {"required": {"file": ["COMBO", {"options": []}], "size": ["COMFY_DYNAMICCOMBO_V3", SIZES]}},
    "output": ["MODEL"], "output_name": ["MODEL"], "python_module": "custom_nodes.happyhorse-local",
}  # fmt: skip
SAMPLER = {
    "input": {
        "required": {"model": ["MODEL", {}], "seed": ["INT", {"default": 0}]},
        "optional": {"mode": [["a", "b"], {"default": "b"}], "negative": ["CONDITIONING", {}]},
    },
    "output": [], "output_name": [], "python_module": "nodes",
}  # fmt: skip
SCHEMAS = {"Loader": LOADER, "Sampler": SAMPLER}


def twin(**loader):
    return {
        "1": {"class_type": "Loader", "inputs": {"file": "m.gguf", **loader}},
        "2": {"class_type": "Sampler", "inputs": {"model": ["1", 0], "seed": 4}},
    }


def test_a_dynamic_choice_opens_its_inputs():
    assert list(inputs_of(LOADER, {"size": "small"})) == ["file", "size"]
    assert list(inputs_of(LOADER, {"size": "own"})) == ["file", "size", "size.side"]


def test_widgets_that_a_node_gained_get_their_defaults_and_sockets_stay_open():
    full = completed(twin(size="small"), SCHEMAS)
    assert full["2"]["inputs"] == {"model": ["1", 0], "seed": 4, "mode": "b"}
    with pytest.raises(LaunchError, match=r"Loader wants a value for `size.side`. Add it to the API twin"):
        completed(twin(size="own"), SCHEMAS)
    with pytest.raises(LaunchError, match="ComfyUI has no node Sampler"):
        completed(twin(size="small"), {"Loader": LOADER})


def test_graph_in_columns_with_links_downloads_and_the_note():
    source = {"directory": "vae", "url": "https://example.org/m.gguf"}
    downloads = {"m.gguf": {**source, "beside": {"t.json": "https://example.org/t.json"}}}
    full = completed(twin(size="small"), SCHEMAS)
    graph = page_graph("x", full, SCHEMAS, "# Title\n\nText.\n" + files_section(full, downloads), downloads)
    loader, sampler, note = graph["nodes"]
    assert graph["links"] == [[1, 1, 0, 2, 0, "MODEL"]]
    assert loader["outputs"][0]["links"] == [1] and sampler["inputs"][0]["link"] == 1
    assert loader["properties"]["models"] == [{"name": "m.gguf", **source}]
    assert "models" not in sampler["properties"] and sampler["properties"]["cnr_id"] == "comfy-core"
    assert sampler["widgets_values"] == [4, "fixed", "b"]
    edges = [(node["pos"][0], node["pos"][0] + node["size"][0]) for node in (note, loader, sampler)]
    assert edges[0][1] < edges[1][0] and edges[1][1] < edges[2][0]
    assert note["id"] == graph["last_node_id"] == 3
    files = "- **models/vae:** [m.gguf](https://example.org/m.gguf), [t.json](https://example.org/t.json)"
    assert note["widgets_values"][0].startswith(f"## Title\n\nText.\n\n### Files\n\n{files}\n\nOther layouts")
