"""The shipped workflows: page graphs are written from their API twins, fit the schemas, say which files they want."""

import json
import mimetypes
import os
import re
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from pack.launch.client import PromptError
from pack.launch.comfyui import PACK_NAME
from pack.launch.comfyui import version as comfyui_version
from pack.launch.demo import clip_path
from pack.launch.environment import TESTED_COMFYUI
from pack.launch.page_graph import inputs_of
from pack.launch.thumbnails import thumbnail
from pack.launch.workflows import TWINS, WORKFLOWS, names, twin_path, written
from PIL import Image

NAMES = names()
FULL_SIZE = [name for name in NAMES if not name.startswith("nano")]
NOTES = ("MarkdownNote", "Note")  # they live in the page, the server does not know them
MODEL_FOLDERS = ("diffusion_models", "text_encoders", "vae")


@pytest.fixture(scope="module")
def schemas(server):
    with urllib.request.urlopen(f"{server.url}/object_info") as reply:
        return json.loads(reply.read())


def page_graph(name):
    return json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))


def twin_of(name):
    return json.loads(twin_path(name).read_text(encoding="utf-8"))


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


def is_ours(schema):
    """Tell whether a node of the server's is this pack's."""
    return schema["python_module"] == f"custom_nodes.{PACK_NAME}"


def wanted_files(twin):
    """Return the model files that a twin's loaders name, ours and core's Load CLIP."""
    loaders = [node["inputs"] for node in twin.values() if "Load" in node["class_type"]]
    parts = ("model", "text_encoder", "video_vae", "audio_vae", "clip_name")
    return sorted({inputs[part] for inputs in loaders for part in parts if part in inputs})


def test_the_page_gets_what_keeps_our_texts_on_the_nodes(server):
    """Newer front ends take them away when a job has ended: web/notices.js."""
    with urllib.request.urlopen(f"{server.url}/extensions") as reply:
        (script,) = [path for path in json.load(reply) if path.endswith("/notices.js")]
    with urllib.request.urlopen(f"{server.url}{script}") as reply:
        text = reply.read().decode()
    for imported in re.findall(r'from "\.\./\.\.(/scripts/\w+\.js)"', text):
        urllib.request.urlopen(f"{server.url}{imported}").close()
    assert "HappyHorse" in text and "progress_text" in text


def test_every_workflow_has_its_note_and_its_twin():
    assert sorted(path.stem for path in WORKFLOWS.glob("*.json")) == NAMES
    assert {path for path in (WORKFLOWS / "api").glob("*.json")} == {twin_path(name) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_every_workflow_has_its_picture(name):
    with Image.open(WORKFLOWS / f"{name}.jpg") as picture:
        assert picture.size == (384, 384) and picture.format == "JPEG"
        shown = np.asarray(picture.convert("L"), float)
    if not name.startswith("nano"):
        drawn = np.asarray(thumbnail(name, page_graph(name)).convert("L"), float)
        assert np.abs(shown - drawn).mean() < 3, "run `python3 run.py workflows`"
    assert shown.std() > 10


def test_examples_are_known_to_every_python():
    """ComfyUI lists by MIME type what may be loaded; Python knows .flac only where the system tells it."""
    known = mimetypes.MimeTypes(filenames=())
    assert all(known.guess_type(path.name)[0] for path in (WORKFLOWS / "input").iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_files_are_as_run_py_workflows_writes_them(name, schemas):
    if comfyui_version(Path(os.environ["COMFYUI_PATH"])) != TESTED_COMFYUI:
        pytest.skip(f"templates are written with ComfyUI {TESTED_COMFYUI}, whose nodes may have more sockets")
    assert written(name, schemas) == (twin_of(name), page_graph(name)), "run `python3 run.py workflows`"


@pytest.mark.parametrize("name", NAMES)
def test_page_graph_is_what_its_twin_runs(name):
    assert as_api(page_graph(name)) == twin_of(name)


@pytest.mark.parametrize("name", NAMES)
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
        outputs, server_has = [output["type"] for output in node["outputs"]], schema["output"]
        if is_ours(schema):
            assert outputs == server_has, node["type"]
        else:  # other versions of ComfyUI may have fewer at the end, or more
            assert all(one == other for one, other in zip(outputs, server_has, strict=False)), node["type"]
            linked = [slot for slot, output in enumerate(node["outputs"]) if output["links"]]
            assert max(linked, default=0) < len(server_has), node["type"]
        for entry in node["inputs"]:
            _, options, _ = expected.get(entry["name"], (None, {}, None))
            listed = [one["key"] if isinstance(one, dict) else one for one in options.get("options", [])]
            if entry["name"] in values and listed and values[entry["name"]] not in wanted_files(twin_of(name)):
                assert values[entry["name"]] in listed, f"{node['type']}.{entry['name']}"
    for number, source, slot, target, index, kind in graph["links"]:
        output, entry = nodes[source]["outputs"][slot], nodes[target]["inputs"][index]
        assert number in output["links"] and entry["link"] == number
        assert output["type"] == kind and entry["type"] in (kind, "*")
    assert graph["last_node_id"] == max(nodes) and graph["last_link_id"] == max(link[0] for link in graph["links"])


@pytest.mark.parametrize("name", NAMES)
def test_few_wires(name):
    kinds = [node["type"] for node in page_graph(name)["nodes"]]
    assert sum(kind.startswith("HappyHorse") for kind in kinds) <= 2 + 6 * kinds.count("HappyHorseSampler")
    assert any(kind in NOTES for kind in kinds), "a note says what to do"


@pytest.mark.parametrize("name", NAMES)
def test_no_nodes_overlap(name):
    boxes = [(n["pos"][0], n["pos"][1] - 30, *n["size"], n["type"]) for n in page_graph(name)["nodes"]]  # 30: the title
    for i, (x, y, width, height, one) in enumerate(boxes):
        for x2, y2, width2, height2, two in boxes[i + 1 :]:
            apart = x + width <= x2 or x2 + width2 <= x or y + height + 30 <= y2 or y2 + height2 + 30 <= y
            assert apart, f"{one} and {two}"


@pytest.mark.parametrize("name", FULL_SIZE)
def test_the_page_offers_every_download_and_the_note_names_every_file(name):
    graph = page_graph(name)
    offered = {m["name"]: m for node in graph["nodes"] for m in node["properties"].get("models", [])}
    (note,) = [node["widgets_values"][0] for node in graph["nodes"] if node["type"] in NOTES]
    for file in wanted_files(twin_of(name)):
        assert f"[{file}](https://huggingface.co/" in note
        assert file in offered or "." not in file, "one click gets a file, not a folder"
    for about in offered.values():
        assert about["directory"] in MODEL_FOLDERS and f"**models/{about['directory']}:**" in note


@pytest.mark.parametrize("name", FULL_SIZE)
def test_the_server_names_the_files_that_are_missing(name, client):
    twin = twin_of(name)
    with pytest.raises(PromptError) as refused:  # HTTP 400
        client.queue(twin)
    cores = [node["inputs"]["clip_name"] for node in twin.values() if node["class_type"] == "CLIPLoader"]
    ours = set(wanted_files(twin)) - set(cores)
    assert all(f"{file} is not in models/" in str(refused.value) for file in ours)
    assert str(refused.value).count("Get it from https://huggingface.co/") == len(ours)
    assert all(f"'{file}' not in" in str(refused.value) for file in cores)


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("nano") and name not in TWINS])
def test_nano_templates_make_a_clip(name, client, server):
    twin = twin_of(name)
    for node in twin.values():
        node["inputs"] |= {"seconds": 0.4} if "seconds" in node["inputs"] else {}
    clip = clip_path(client.run(twin), server.output)
    assert clip.suffix == ".mp4" and clip.stat().st_size > 1000


def test_server_lists_the_templates_and_serves_every_help_page(server, schemas):
    with urllib.request.urlopen(f"{server.url}/api/workflow_templates") as reply:
        assert sorted(json.loads(reply.read())[PACK_NAME]) == NAMES
    # core's cloud nodes are called HappyHorse too
    nodes = [name for name, schema in schemas.items() if is_ours(schema)]
    for name in nodes:
        with urllib.request.urlopen(f"{server.url}/extensions/{PACK_NAME}/docs/{name}.md") as reply:
            assert reply.read().decode().startswith(f"# {schemas[name]['display_name']}")
    assert len(nodes) >= 20
