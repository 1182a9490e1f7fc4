"""Which model files the loaders offer, where they are, and the models that are already in memory."""

import json
import logging
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakValueDictionary

import folder_paths

PACK = Path(__file__).parent.parent
NANO_WEIGHTS = PACK / "nano" / "weights"
NANO_WORDS = NANO_WEIGHTS / "nano_words.txt"  # what its text encoder was trained on
EXAMPLES = PACK / "workflows" / "input"
DOWNLOADS = PACK / "nodes" / "downloads.json"  # {name: {"directory", "url", "beside": {name: url}}}
SHARD = re.compile(r"-(\d{5})-of-\d{5}\.safetensors$")


@dataclass(frozen=True, slots=True)
class Part:
    """One kind of model file: ComfyUI's folder for it, the built-in file, and the published one's repository."""

    folder: str
    nano: str
    published: str


MODEL = Part("diffusion_models", "nano_dit.safetensors", "GAIR/daVinci-MagiHuman")
TEXT_ENCODER = Part("text_encoders", "nano_text_encoder.safetensors", "google/t5gemma-9b-9b-ul2")
VIDEO_VAE = Part("vae", "nano_video_vae.safetensors", "Wan-AI/Wan2.2-TI2V-5B")
AUDIO_VAE = Part("vae", "nano_audio_vae.safetensors", "stabilityai/stable-audio-open-1.0")
PARTS = (MODEL, TEXT_ENCODER, VIDEO_VAE, AUDIO_VAE)

_loaded = WeakValueDictionary()  # lives as long as something uses the model, so it never holds memory by itself


def add_nano_weights():
    """Let ComfyUI find the built-in weights where they lie."""
    for folder in sorted({part.folder for part in PARTS}):
        folder_paths.add_model_folder_path(folder, str(NANO_WEIGHTS))


def add_examples():
    """Put the templates' image and sound where Load Image and Load Audio look, unless there are any of that name."""
    folder = Path(folder_paths.get_input_directory())
    try:
        for example in EXAMPLES.iterdir():
            if not (folder / example.name).exists():
                shutil.copyfile(example, folder / example.name)
    except OSError as error:
        logging.warning("The examples of the templates could not be put into %s: %s", folder, error)


def choices(part):
    """List what a loader offers: single files and folders of shards, without other parts' built-in files.

    Transformers and text encoders may be .gguf files too, which ComfyUI's own lists leave out.
    """
    other_nano = {other.nano for other in PARTS} - {part.nano}
    gguf = _gguf_files(part.folder) if part in (MODEL, TEXT_ENCODER) else []
    files = {*folder_paths.get_filename_list(part.folder), *gguf} - other_nano
    return sorted({name for name in map(_whole, files) if name})


def _whole(name):
    """Return a single file's name, or for a shard its folder's; shards in no folder stand behind the first one."""
    shard = SHARD.search(name)
    folder = Path(name).parent.as_posix()
    if not shard or (folder == "." and shard[1] == "00001"):
        return name
    return None if folder == "." else folder


def require_listed(names):
    """Raise ValueError, saying where to get them, unless every loader lists its file; names: {part: file name}."""
    missing = [where_to_get(part, name) for part, name in names.items() if name not in choices(part)]
    if missing:
        raise ValueError(f"{' '.join(missing)} Then press R in ComfyUI to refresh its lists.")


def where_to_get(part, name):
    """Return one sentence about a file that is not there: its folder and its source on the web, or what it is."""
    if name in {other.nano for other in PARTS} - {part.nano}:
        return (
            f"{name} is a built-in file for another input. Choose {part.nano} here, or one from models/{part.folder}."
        )
    known = json.loads(DOWNLOADS.read_text(encoding="utf-8")).get(name)
    source = known["url"] if known else f"https://huggingface.co/{part.published} (README.md lists other sources)"
    beside = "".join(f", {other} from {url}" for other, url in (known or {}).get("beside", {}).items())
    return f"{name} is not in models/{part.folder}. Get it from {source}{beside} and put it there."


def find(part, name):
    """Return the path of what `choices` listed as `name`; ValueError where it is gone."""
    for folder in map(Path, folder_paths.get_folder_paths(part.folder)):
        path = folder / name
        if path.is_file() or any(path.glob("*.safetensors")):
            return path
    raise ValueError(f"{name} is not in models/{part.folder} any more. Put it back, or press R to refresh the list.")


def read_once(load, path, *options):
    """Return load(path, *options), the same object as long as an earlier one is in use and the file has not changed."""
    files = path.iterdir() if path.is_dir() else [path]
    changed = max(file.stat().st_mtime_ns for file in files)
    key = (load, path, changed, options)
    loaded = _loaded.get(key)
    if loaded is None:
        loaded = _loaded[key] = load(path, *options)
    return loaded


def _gguf_files(folder):
    """Names of the .gguf files in ComfyUI's folders of that kind, and in three levels of folders in those."""
    roots = map(Path, folder_paths.get_folder_paths(folder))
    return [
        path.relative_to(root).as_posix()
        for root in roots
        for depth in ("", "*/", "*/*/", "*/*/*/")
        for path in root.glob(f"{depth}*.gguf")
    ]
