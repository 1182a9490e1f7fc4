"""The templates: workflows/NAME.json, written from its API twin in workflows/api and its note in workflows/notes.

The twin is what a server runs and what people edit. The tests convert the page's graph back and compare.
"""

import json
import os
import sys
import tempfile

from . import ROOT, LaunchError
from .client import Client
from .page_graph import completed, page_graph
from .server import Server
from .thumbnails import thumbnail

WORKFLOWS = ROOT / "workflows"
TWINS = {"nano_text_to_video": "nano_t2v", "nano_image_to_video": "nano_i2v"}  # others have the template's name
FILES_FOOTER = (
    "Other layouts load too: choose yours in *Load HappyHorse* and press **i** on it for the list. Licences: Gemma "
    "Terms of Use (text encoder), Stability AI Community License (audio VAE), Apache-2.0 (the rest)."
)


def names():
    """Return the templates' names: those that have a note."""
    return sorted(path.stem for path in (WORKFLOWS / "notes").glob("*.md"))


def twin_path(name):
    """Return the API twin of a template."""
    return WORKFLOWS / "api" / f"{TWINS.get(name, name)}.json"


def files_section(twin, downloads):
    """Return a note's part about the model files that a twin names: which go where, as links."""
    named = {value for node in twin.values() for value in node["inputs"].values() if isinstance(value, str)}
    lines = []
    for name in sorted(named & downloads.keys(), key=lambda name: (downloads[name]["directory"], name)):
        about = downloads[name]
        files = {name: about["url"], **about.get("beside", {})}
        links = ", ".join(f"[{file}]({url})" for file, url in files.items())
        lines.append(f"- **models/{about['directory']}:** {links}")
    return "\n".join(["", "### Files", "", *lines, "", FILES_FOOTER]) if lines else ""


def written(name, schemas):
    """Return (API twin, page graph) of a template as they should be on disk."""
    twin = completed(json.loads(twin_path(name).read_text(encoding="utf-8")), schemas)
    note = (WORKFLOWS / "notes" / f"{name}.md").read_text(encoding="utf-8")
    downloads = json.loads((ROOT / "nodes" / "downloads.json").read_text(encoding="utf-8"))
    return twin, page_graph(name, twin, schemas, note + files_section(twin, downloads), downloads)


def main():
    """Write every template anew, against the nodes of a server of our own."""
    with tempfile.TemporaryDirectory() as output, Server(os.environ["COMFYUI_PATH"], output) as server:
        schemas = Client(server.url, server.check_alive).request("/object_info")
    for name in names():
        twin, graph = written(name, schemas)
        for path, content in ((twin_path(name), twin), (WORKFLOWS / f"{name}.json", graph)):
            path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        if not name.startswith("nano_"):
            thumbnail(name, graph).save(WORKFLOWS / f"{name}.jpg", quality=88)
        print(f"workflows/{name}.json", flush=True)


if __name__ == "__main__":
    try:
        main()
    except LaunchError as error:
        sys.exit(str(error))
