"""The shipped workflows: the page's graphs fit the schemas and are what their API twins run; help and templates."""

import json
import urllib.request
from pathlib import Path

import pytest
from pack.launch.comfyui import PACK_NAME

WORKFLOWS = Path(__file__).parents[2] / "workflows"
TWINS = {"nano_text_to_video": "nano_t2v", "nano_image_to_video": "nano_i2v"}
NOTES = ("MarkdownNote", "Note")  # they live in the page, the server does not know them


@pytest.fixture(scope="module")
def schemas(server):
    with urllib.request.urlopen(f"{server.url}/object_info") as reply:
        return json.loads(reply.read())


def page_graph(name):
    return json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))


def inputs_of(schema, values):
    """Return {name: (type, options)} of a node with these widget values; a dynamic combo adds its choice's inputs."""
    found = {}
    for name, (kind, *options) in {**schema["input"]["required"], **schema["input"].get("optional", {})}.items():
        found[name] = (kind, options[0] if options else {})
        for choice in found[name][1].get("options", []) if kind == "COMFY_DYNAMICCOMBO_V3" else []:
            if choice["key"] == values.get(name):
                opened = {**choice["inputs"].get("required", {}), **choice["inputs"].get("optional", {})}
                found |= {f"{name}.{inner}": (spec[0], spec[1]) for inner, spec in opened.items()}
    return found


def widget_values(node):
    """Return {input: value} of a page node's widgets, without what only the page needs (seed control, upload)."""
    names = []
    for entry in node["inputs"]:
        if "widget" in entry and entry["type"] != "IMAGEUPLOAD":
            names += [entry["name"], None] if entry["name"] == "seed" else [entry["name"]]
    return {name: value for name, value in zip(names, node["widgets_values"], strict=False) if name}


def as_api(graph):
    """Turn a page's graph into the API form, as the page does on Run."""
    links = {link[0]: [str(link[1]), link[2]] for link in graph["links"]}
    return {
        str(node["id"]): {
            "class_type": node["type"],
            "inputs": widget_values(node)
            | {entry["name"]: links[entry["link"]] for entry in node["inputs"] if entry["link"] is not None},
        }
        for node in graph["nodes"]
        if node["type"] not in NOTES
    }


def test_every_workflow_has_its_twin():
    assert {path.stem for path in WORKFLOWS.glob("*.json")} == set(TWINS)
    assert {path.stem for path in (WORKFLOWS / "api").glob("*.json")} == set(TWINS.values())


@pytest.mark.parametrize("name", TWINS)
def test_page_graph_is_what_its_twin_runs(name):
    twin = json.loads((WORKFLOWS / "api" / f"{TWINS[name]}.json").read_text(encoding="utf-8"))
    assert as_api(page_graph(name)) == twin


@pytest.mark.parametrize("name", TWINS)
def test_page_graph_fits_the_schemas(name, schemas):
    graph = page_graph(name)
    nodes = {node["id"]: node for node in graph["nodes"]}
    for node in nodes.values():
        if node["type"] in NOTES:
            continue
        schema, values = schemas[node["type"]], widget_values(node)
        expected = inputs_of(schema, values)
        drawn = [entry["name"] for entry in node["inputs"] if entry["type"] != "IMAGEUPLOAD"]
        assert sorted(drawn) == sorted(expected), node["type"]
        assert [output["type"] for output in node["outputs"]] == schema["output"], node["type"]
        for entry in node["inputs"]:
            kind, options = expected.get(entry["name"], (None, {}))
            listed = kind if isinstance(kind, list) else options.get("options", [])
            listed = [one["key"] if isinstance(one, dict) else one for one in listed]
            if entry["name"] in values and listed:
                assert values[entry["name"]] in listed, f"{node['type']}.{entry['name']}"
    for number, source, slot, target, index, kind in graph["links"]:
        output, entry = nodes[source]["outputs"][slot], nodes[target]["inputs"][index]
        assert number in output["links"] and entry["link"] == number
        assert output["type"] == entry["type"] == kind
    assert graph["last_node_id"] == max(nodes) and graph["last_link_id"] == max(link[0] for link in graph["links"])


@pytest.mark.parametrize("name", TWINS)
def test_few_wires(name):
    ours = [node for node in page_graph(name)["nodes"] if node["type"].startswith("HappyHorse")]
    assert len(ours) <= 6
    assert any(node["type"] in NOTES for node in page_graph(name)["nodes"]), "a note says what to do"


@pytest.mark.parametrize("name", TWINS)
def test_no_nodes_overlap(name):
    boxes = [(n["pos"][0], n["pos"][1] - 30, *n["size"], n["type"]) for n in page_graph(name)["nodes"]]  # 30: the title
    for i, (x, y, width, height, one) in enumerate(boxes):
        for x2, y2, width2, height2, two in boxes[i + 1 :]:
            apart = x + width <= x2 or x2 + width2 <= x or y + height + 30 <= y2 or y2 + height2 + 30 <= y
            assert apart, f"{one} and {two}"


def test_server_lists_the_templates_and_serves_every_help_page(server, schemas):
    with urllib.request.urlopen(f"{server.url}/api/workflow_templates") as reply:
        assert set(json.loads(reply.read())[PACK_NAME]) == set(TWINS)
    # core's cloud nodes are called HappyHorse too
    ours = [name for name, schema in schemas.items() if schema["python_module"] == f"custom_nodes.{PACK_NAME}"]
    for name in ours:
        with urllib.request.urlopen(f"{server.url}/extensions/{PACK_NAME}/docs/{name}.md") as reply:
            assert reply.read().decode().startswith(f"# {schemas[name]['display_name']}")
    assert len(ours) >= 13
