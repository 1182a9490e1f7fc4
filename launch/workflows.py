"""The page's workflows, written from their API twins: nodes in columns, a note, downloads of missing models.

workflows/api/NAME.json is what a server runs and what people edit; workflows/notes/NAME.md is the note. From both comes
workflows/NAME.json, which ComfyUI lists as a template. The tests convert it back and compare.
"""

import json
import os
import re
import sys
import tempfile
import uuid

from . import ROOT, LaunchError
from .client import Client
from .comfyui import PACK_NAME
from .server import Server

WORKFLOWS = ROOT / "workflows"
TWINS = {"nano_text_to_video": "nano_t2v", "nano_image_to_video": "nano_i2v"}  # others have the template's name
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3")
DYNAMIC = "COMFY_DYNAMICCOMBO_V3"
LEFT, TOP, TITLE, ROW, GAP = 40, 100, 30, 28, 50  # pixels; both of the page's renderers fit into such rows
WIDTH, WIDTHS = 340, {"HappyHorseLoadCheckpoint": 400, "HappyHorseSaveVideo": 420, "HappyHorsePromptBuilder": 440}
WIDTHS |= {"HappyHorseEncodePrompt": 420, "HappyHorseNegativePrompt": 420}
TEXT_BOX, NOTICE = 100, 80  # more for a text of several lines, for what a node tells while it runs
SHOWS = {"HappyHorseSaveVideo": 400, "LoadImage": 260, "LoadAudio": 80}  # height of what a node displays
URL = re.compile(r"\(https:[^)]*\)")
FILES_FOOTER = (
    "Other layouts load too: choose yours in *Load HappyHorse* and press **i** on it for the list. Licences: Gemma "
    "Terms of Use (text encoder), Stability AI Community License (audio VAE), Apache-2.0 (the rest)."
)
NOTE_WIDTH, NOTE_CHARACTERS = 420, 52  # the latter in a line


def names():
    """Return the templates' names: those that have a note."""
    return sorted(path.stem for path in (WORKFLOWS / "notes").glob("*.md"))


def twin_path(name):
    """Return the API twin of a template."""
    return WORKFLOWS / "api" / f"{TWINS.get(name, name)}.json"


def inputs_of(schema, values):
    """Return {name: (type, options, whether required)} of a node whose widgets have `values`, dynamic ones opened."""
    found = {}

    def collect(groups, prefix):
        for group in ("required", "optional"):
            for name, (kind, *options) in groups.get(group, {}).items():
                options = dict(options[0]) if options else {}
                if isinstance(kind, list):  # how older nodes write a combo
                    kind, options = "COMBO", {**options, "options": kind}
                found[prefix + name] = (kind, options, group == "required")
                for choice in options["options"] if kind == DYNAMIC else ():
                    if choice["key"] == values.get(prefix + name):
                        collect(choice["inputs"], f"{prefix}{name}.")

    collect(schema["input"], "")
    return found


def completed(twin, schemas):
    """Return the API twin with the defaults of widgets that its nodes have gained since it was written.

    LaunchError where the server has no such node, or no default for a widget.
    """
    for node in twin.values():
        if node["class_type"] not in schemas:
            raise LaunchError(f"ComfyUI has no node {node['class_type']}. Correct the API twin, or the pack's import.")
        for name, (kind, options, _) in inputs_of(schemas[node["class_type"]], node["inputs"]).items():
            if kind in WIDGETS and name not in node["inputs"]:
                if "default" not in options:
                    raise LaunchError(f"{node['class_type']} wants a value for `{name}`. Add it to the API twin.")
                node["inputs"][name] = options["default"]
    return twin


def page_graph(name, twin, schemas, note, downloads):
    """Return the graph that the page opens for an API twin; `schemas` is the server's /object_info."""
    nodes, links = {}, []
    for order, id in enumerate(sorted(twin, key=lambda id: (_depth(twin, id), int(id)))):
        nodes[id] = _page_node(int(id), order, twin[id], schemas[twin[id]["class_type"]], downloads)
    for id, node in nodes.items():
        for slot, entry in enumerate(node["inputs"]):
            value = twin[id]["inputs"].get(entry["name"])
            if isinstance(value, list):
                source = nodes[value[0]]["outputs"][value[1]]
                links.append([len(links) + 1, int(value[0]), value[1], int(id), slot, source["type"]])
                entry["link"] = len(links)
                source["links"].append(len(links))
    _place(nodes, twin)
    last = max(map(int, twin)) + 1
    return {
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"happyhorse-local/{name}")),
        "revision": 0,
        "last_node_id": last,
        "last_link_id": len(links),
        "nodes": [*nodes.values(), _note(last, len(nodes), note + _files(twin, downloads))],
        "links": links,
        "groups": [],
        "config": {},
        "extra": {"ds": {"scale": 0.75, "offset": [60, 40]}},
        "version": 0.4,
    }


def _sources(node):
    return [value[0] for value in node["inputs"].values() if isinstance(value, list)]


def _depth(twin, id):
    return max((1 + _depth(twin, source) for source in _sources(twin[id])), default=0)


def _page_node(id, order, node, schema, downloads):
    inputs, values, texts = [], [], 0
    for name, (kind, options, required) in inputs_of(schema, node["inputs"]).items():
        entry = {"name": name, "type": kind, "link": None}
        entry |= {"label": options["display_name"]} if options.get("display_name", name) != name else {}
        entry |= {} if required else {"shape": 7}  # a hollow socket
        inputs.append(entry)
        if kind not in WIDGETS or options.get("forceInput"):
            continue
        entry["widget"] = {"name": name}
        texts += bool(options.get("multiline"))
        value = node["inputs"][name]
        values.append(options.get("default", "") if isinstance(value, list) else value)
        if options.get("control_after_generate") or name == "seed":
            values.append("fixed")
        if options.get("image_upload"):
            inputs.append({"name": "upload", "type": "IMAGEUPLOAD", "widget": {"name": "upload"}, "link": None})
            values.append("image")
    ours = schema["python_module"] == f"custom_nodes.{PACK_NAME}"
    properties = {"cnr_id": PACK_NAME if ours else "comfy-core", "Node name for S&R": node["class_type"]}
    # A folder of shards is no download of one click: the note and the server's refusal name it.
    files = [value for value in values if value in downloads and "." in value]
    models = [{"name": file, **{key: downloads[file][key] for key in ("directory", "url")}} for file in files]
    sockets = sum("widget" not in entry for entry in inputs)
    rows = max(sockets, len(schema["output"])) + len(values) + 1
    height = ROW * rows + TEXT_BOX * texts + SHOWS.get(node["class_type"], 0)
    height += NOTICE if "unique_id" in schema["input"].get("hidden", {}) else 0
    return {
        "id": id,
        "type": node["class_type"],
        "pos": [0, 0],
        "size": [WIDTHS.get(node["class_type"], WIDTH), height],
        "flags": {},
        "order": order,
        "mode": 0,
        "inputs": inputs,
        "outputs": [
            {"name": name, "type": kind, "links": []}
            for name, kind in zip(schema["output_name"], schema["output"], strict=True)
        ],
        "properties": properties | ({"models": models} if models else {}),
        "widgets_values": values,
    }


def _place(nodes, twin):
    """Put the nodes into columns right of the note, each left of what it feeds."""
    depths = {id: _depth(twin, id) for id in nodes}
    for id in nodes:
        if not _sources(twin[id]):
            depths[id] = min(depths[fed] for fed in nodes if id in _sources(twin[fed])) - 1
    left = LEFT + NOTE_WIDTH + GAP
    for depth in sorted(set(depths.values())):
        column = [node for id, node in nodes.items() if depths[id] == depth]
        top = TOP
        for node in column:
            node["pos"] = [left, top]
            top += node["size"][1] + TITLE + GAP
        left += max(node["size"][0] for node in column) + GAP


def _files(twin, downloads):
    """Return the note's part about the model files that a twin names: which go where, as links."""
    named = {value for node in twin.values() for value in node["inputs"].values() if isinstance(value, str)}
    lines = []
    for name in sorted(named & downloads.keys(), key=lambda name: (downloads[name]["directory"], name)):
        about = downloads[name]
        files = {name: about["url"], **about.get("beside", {})}
        links = ", ".join(f"[{file}]({url})" for file, url in files.items())
        lines.append(f"- **models/{about['directory']}:** {links}")
    return "\n".join(["", "### Files", "", *lines, "", FILES_FOOTER]) if lines else ""


def _note(id, order, note):
    title, _, text = note.partition("\n")
    lines = sum(1 + len(URL.sub("", line)) // NOTE_CHARACTERS for line in text.splitlines())
    return {
        "id": id,
        "type": "MarkdownNote",
        "pos": [LEFT, TOP],
        "size": [NOTE_WIDTH, TITLE + 20 * lines],
        "flags": {},
        "order": order,
        "mode": 0,
        "inputs": [],
        "outputs": [],
        "properties": {},
        "widgets_values": [f"#{title}\n{text}".rstrip()],
        "title": "About this workflow",
        "color": "#432",
        "bgcolor": "#653",
    }


def written(name, schemas):
    """Return (API twin, page graph) of a template as they should be on disk."""
    twin = completed(json.loads(twin_path(name).read_text(encoding="utf-8")), schemas)
    note = (WORKFLOWS / "notes" / f"{name}.md").read_text(encoding="utf-8")
    downloads = json.loads((ROOT / "nodes" / "downloads.json").read_text(encoding="utf-8"))
    return twin, page_graph(name, twin, schemas, note, downloads)


def main():
    """Write every template anew, against the nodes of a server of our own."""
    with tempfile.TemporaryDirectory() as output, Server(os.environ["COMFYUI_PATH"], output) as server:
        schemas = Client(server.url, server.check_alive).request("/object_info")
    for name in names():
        twin, graph = written(name, schemas)
        for path, content in ((twin_path(name), twin), (WORKFLOWS / f"{name}.json", graph)):
            path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"workflows/{name}.json", flush=True)


if __name__ == "__main__":
    try:
        main()
    except LaunchError as error:
        sys.exit(str(error))
