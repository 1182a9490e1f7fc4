"""The graph that ComfyUI's page opens, made from an API workflow: nodes in columns, links, downloads, a note."""

import re
import uuid

from . import LaunchError
from .comfyui import PACK_NAME

DYNAMIC = "COMFY_DYNAMICCOMBO_V3"  # a combo whose choice opens further inputs
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", DYNAMIC)
# The layout, in pixels; both of the page's renderers fit into such rows.
LEFT, TOP, GAP, TITLE, ROW = 40, 100, 50, 30, 28
TEXT_BOX = 100  # what a text of several lines takes more than a row
NOTICE = 80  # for what a node tells while it runs
# Height of what a node displays.
SHOWS = {"HappyHorseSaveVideo": 400, "LoadImage": 260, "LoadVideo": 290, "LoadAudio": 80, "PreviewAny": 260}
WIDTH = 340
WIDTHS = {
    "HappyHorseLoadCheckpoint": 400, "HappyHorseSaveVideo": 420, "HappyHorsePromptBuilder": 440,
    "HappyHorsePromptEnhancer": 420, "HappyHorseEncodePrompt": 420, "HappyHorseNegativePrompt": 420,
    "PreviewAny": 420, "MarkdownNote": 420,
}  # fmt: skip
NOTE_CHARACTERS = 52  # in a line of a note
URL = re.compile(r"\(https:[^)]*\)")


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
    """Return the graph that the page opens for the API workflow `twin`, whose every widget has a value.

    schemas: the server's /object_info; note: markdown that begins with a title; downloads: nodes/downloads.json.
    """
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
        "nodes": [*nodes.values(), _note(last, len(nodes), note)],
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
        if options.get("image_upload") or options.get("video_upload"):
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
    left = LEFT + WIDTHS["MarkdownNote"] + GAP
    for depth in sorted(set(depths.values())):
        column = [node for id, node in nodes.items() if depths[id] == depth]
        top = TOP
        for node in column:
            node["pos"] = [left, top]
            top += node["size"][1] + TITLE + GAP
        left += max(node["size"][0] for node in column) + GAP


def _note(id, order, note):
    title, _, text = note.partition("\n")
    lines = sum(1 + len(URL.sub("", line)) // NOTE_CHARACTERS for line in text.splitlines())
    return {
        "id": id,
        "type": "MarkdownNote",
        "pos": [LEFT, TOP],
        "size": [WIDTHS["MarkdownNote"], TITLE + 20 * lines],
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
