"""The rules of the house that a reader relies on: who imports whom, what no file holds, what the metadata promises."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NETWORK_ROOMS = ("kernels", "model_loader", "sampler", "nodes")  # each may import itself and those before it
ALL_BUT_NODES = {"kernels", "model_loader", "sampler", "nano", "verify", "benchmarks", "launch"}
MAY_IMPORT = {room: set(NETWORK_ROOMS[: i + 1]) for i, room in enumerate(NETWORK_ROOMS)}
MAY_IMPORT |= {"nano": ALL_BUT_NODES, "verify": ALL_BUT_NODES, "benchmarks": ALL_BUT_NODES, "launch": {"launch"}}
HOST = {"comfy", "comfy_api", "comfy_extras", "comfy_execution", "folder_paths", "node_helpers", "server"}
USES_HOST_INSIDE_FUNCTIONS = {"model_loader/core_vae.py"}
MODULES = sorted(path for room in MAY_IMPORT for path in (ROOT / room).rglob("*.py"))


def name_of(path):
    """Return a module's path inside the repository ("nodes/host.py")."""
    return path.relative_to(ROOT).as_posix()


def imports(tree):
    """Yield (level, dotted name, whether it runs when the module is imported) of every import in a module."""
    inner = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        at_import = id(node) not in inner
        if isinstance(node, ast.Import):
            yield from ((0, alias.name, at_import) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.level, node.module, at_import
        elif isinstance(node, ast.ImportFrom):  # from . import a, b
            yield from ((node.level, alias.name, at_import) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
            if isinstance(node.args[0], ast.Constant):
                yield 0, node.args[0].value, at_import


def target(path, level, name):
    """Return the path, as a tuple of names from the root, that a relative import of the module `path` points to."""
    package = path.relative_to(ROOT).parent.parts  # level 1 is the package that the module lies in
    return (*package[: len(package) - level + 1], *name.split("."))


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_one_way(path):
    room = path.relative_to(ROOT).parts[0]
    faults = []
    for level, name, at_import in imports(ast.parse(path.read_text(encoding="utf-8"))):
        top = name.split(".")[0]
        if level:
            goal = target(path, level, name)[0]
            if goal not in MAY_IMPORT[room]:
                faults.append(f"{room} may not import {goal}")
        elif top in MAY_IMPORT or top == "pack":
            faults.append(f"absolute import of our own {name}")
        elif top in HOST and room != "nodes" and (at_import or name_of(path) not in USES_HOST_INSIDE_FUNCTIONS):
            faults.append(f"{name} belongs to ComfyUI: only nodes/ may need it")
    assert not faults


def test_no_module_needs_itself_to_be_imported():
    files = {path.relative_to(ROOT).with_suffix("").parts: path for path in MODULES}
    needs = {}
    for module, path in files.items():
        goals = set()
        for level, name, at_import in imports(ast.parse(path.read_text(encoding="utf-8"))):
            if level and at_import:
                goal = target(path, level, name)
                goals |= {goal, (*goal, "__init__")} & files.keys()
        needs[module] = goals
    while leaves := [module for module, goals in needs.items() if not goals & needs.keys()]:
        for module in leaves:
            del needs[module]
    assert not needs, "a circle of imports among " + ", ".join("/".join(module) for module in needs)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_module_prints_or_runs_what_it_reads(path):
    room = path.relative_to(ROOT).parts[0]
    faults = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        if called in ("eval", "exec", "pickle.load", "pickle.loads", "pickle.Unpickler"):
            faults.append(f"line {node.lineno}: {called} runs what a file says")
        if called == "print" and room in NETWORK_ROOMS:
            faults.append(f"line {node.lineno}: print; ComfyUI's log is logging's")
        if called == "torch.load" and not any(
            word.arg == "weights_only" and ast.unparse(word.value) == "True" for word in node.keywords
        ):
            faults.append(f"line {node.lineno}: torch.load without weights_only=True")
    assert not faults


def test_no_file_names_a_machine():
    machine = re.compile(r"/(?:root|home|Users|work|opt|mnt)/[a-z]|file://[/a-z]|C:\\?Users", re.IGNORECASE)
    skipped = {"__pycache__", "output", "runs"}
    faults = []
    for path in ROOT.rglob("*"):
        parts = path.relative_to(ROOT).parts
        if skipped & set(parts) or (parts[0].startswith(".") and parts[0] != ".ci"):
            continue
        if path.is_file() and (path.suffix in {".py", ".md", ".toml", ".txt", ".json"} or parts[0] == ".ci"):
            found = machine.search(path.read_text(encoding="utf-8"))
            faults += [f"{name_of(path)}: {found[0]}"] if found else []
    assert not faults


def test_ruff_has_nothing_to_say():
    command = [sys.executable, "-m", "ruff", "check", "--output-format=concise", ROOT]
    check = subprocess.run(command, capture_output=True, text=True)
    assert check.returncode == 0, check.stdout + check.stderr


def test_what_run_py_installs_is_pinned():
    for path in (ROOT / "launch").glob("requirements-*.txt"):
        for line in path.read_text(encoding="utf-8").splitlines():
            requirement = line.split("#")[0].strip()
            assert re.fullmatch(r"([A-Za-z0-9._-]+==[A-Za-z0-9.+]+)?", requirement), f"{path.name}: {line}"


def test_package_metadata():
    tomllib = pytest.importorskip("tomllib", reason="tomllib came with Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    comfy = project["tool"]["comfy"]
    assert project["project"]["name"] == "happyhorse-local"
    assert "comfyui" not in (project["project"]["name"] + comfy["DisplayName"]).lower(), "the registry refuses it"
    assert comfy["requires-comfyui"] == ">=0.24.0"  # `comfy node publish` drops what has not three numbers
    assert "Apache License" in (ROOT / project["project"]["license"]["file"]).read_text(encoding="utf-8")
    entry = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    constants = {node.targets[0].id: node.value.value for node in entry.body if isinstance(node, ast.Assign)}
    assert "web" not in comfy, "with WEB_DIRECTORY it would register the folder twice"
    assert (ROOT / constants["WEB_DIRECTORY"]).is_dir()
