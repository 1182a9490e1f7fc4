"""run.py never takes a half-made .venv for a whole one, and never deletes one that it did not make."""

import os
import subprocess
import sys
import time
import zipfile

import pytest
from pack.launch import ROOT, LaunchError, environment
from pack.launch.environment import Plan, create, install, python_of, site_packages, stamp_file, why_not_ready
from pack.launch.pip import run_quietly

WANTED = Plan(("tiny-thing==1.0", "never-here==1; sys_platform == 'none'"), (), free_gb=0)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An environment as `create` leaves it: real, empty and unfinished."""
    venv = tmp_path_factory.mktemp("made") / ".venv"
    venv.mkdir()
    stamp_file(venv).write_text("the stamp of an older set of requirements")
    (venv / "left over").write_text("")
    create(venv)
    return venv


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    """A folder that is all the package index pip knows."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null" if sys.platform != "win32" else "nul")
    monkeypatch.setenv("PIP_FIND_LINKS", folder.as_uri())
    return folder


def write_wheel(folder, name="tiny_thing"):
    """Write the wheel of a package without contents."""
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def test_create_replaces_what_is_there_and_leaves_it_unfinished(made):
    assert python_of(made).exists()
    assert not (made / "left over").exists()
    assert not made.with_name(".venv.part").exists()
    assert why_not_ready(WANTED, made) == "an earlier run did not finish it"


def test_debian_without_venv_is_told_which_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ensurepip", None)  # what `import ensurepip` meets on a bare Debian
    with pytest.raises(LaunchError, match=r"apt install python3\.\d+-venv"):
        create(tmp_path / ".venv")
    assert not (tmp_path / ".venv").exists()


def test_an_environment_does_not_delete_itself(made, monkeypatch):
    monkeypatch.setattr(sys, "prefix", str(made))
    with pytest.raises(LaunchError, match="Start run.py with your system's Python"):
        create(made)
    assert python_of(made).exists()


def test_failed_install_leaves_it_unfinished_and_says_what_to_do(made, wheels):
    with pytest.raises(LaunchError, match="tiny-thing") as caught:
        install(WANTED, made)
    assert "Check the network" in str(caught.value)
    assert why_not_ready(WANTED, made) == "an earlier run did not finish it"


def test_installed_environment_is_ready_until_something_changes(made, wheels):
    write_wheel(wheels)
    install(WANTED, made)
    assert why_not_ready(WANTED, made) is None
    newer = Plan(("tiny-thing==1.1",), (), free_gb=0)
    assert why_not_ready(newer, made) == "the Python or the requirements have changed"
    alone = Plan(WANTED.packages[1:], WANTED.packages[:1], free_gb=0)
    assert why_not_ready(alone, made) == "the Python or the requirements have changed"
    subprocess.run([python_of(made), "-m", "pip", "uninstall", "-qqy", "tiny-thing"], check=True)
    assert why_not_ready(WANTED, made) == "tiny-thing was removed from it"


def test_environment_of_somebody_else_is_refused(tmp_path):
    venv = tmp_path / ".venv"
    assert why_not_ready(WANTED, venv) == "it does not exist yet"
    site_packages(venv).mkdir(parents=True)
    with pytest.raises(LaunchError, match="not made by run.py"):
        why_not_ready(WANTED, venv)
    assert site_packages(venv).is_dir()


def test_stamp_holds_the_python_version(monkeypatch):
    here = WANTED.stamp
    monkeypatch.setattr(environment.sys, "version_info", (3, 99, 0))
    assert WANTED.stamp != here


def test_full_disk_is_reported_before_anything_is_downloaded(made):
    with pytest.raises(LaunchError, match="1000000000 GB are needed"):
        install(Plan((), (), free_gb=10**9), made)


def test_other_comfyui_brings_its_own_requirements(tmp_path):
    (tmp_path / "requirements.txt").write_text(
        "comfyui-frontend-package==9.9\ncomfyui-workflow-templates==9.9\ntorch\ntorchvision\ntorchaudio\nspandrel\n"
        "# a comment\n\nav>=17.0.0 # why\nSQLAlchemy>=2.0.0\n"
    )
    packages = environment.plan(tmp_path, "9.9.0").packages
    assert {"comfyui-frontend-package==9.9", "av>=17.0.0", "SQLAlchemy>=2.0.0"} <= set(packages)
    assert not {"torch", "torchvision", "torchaudio", "spandrel", "comfyui-workflow-templates==9.9"} & set(packages)
    assert any(line.startswith("pytest==") for line in packages)


def test_tested_comfyui_gets_the_pins(tmp_path):
    if sys.version_info < (3, 11):
        pytest.skip("the pins are for Python 3.11 and newer")
    packages = environment.plan(tmp_path, "0.30.0").packages  # its requirements.txt is not even read
    assert all("==" in line for line in packages)


@pytest.mark.parametrize(
    "machine, torchvision",
    [(("linux", (3, 11)), "0.16.2"), (("linux", (3, 12)), "0.28.0"), (("darwin", (3, 11)), "0.28.0")],
)
def test_cpu_machines_ask_for_exactly_the_cpu_build(machine, torchvision):
    packages, alone = environment.torch_requirements(False, *machine)
    assert packages[0] == "torch==2.13.0"
    assert f"torchvision=={torchvision}" in alone, "with its own requirements it would replace torch"


def test_windows_with_a_card_looks_for_torch_where_it_has_cuda(tmp_path, monkeypatch):
    (tmp_path / "requirements.txt").write_text("")  # of a ComfyUI; Python 3.10 gets what that asks for
    machines = (("win32", False, ""), ("linux", True, ""), ("win32", True, environment.WINDOWS_INDEX))
    for system, nvidia, index in machines:
        monkeypatch.setattr(environment, "has_nvidia", lambda nvidia=nvidia: nvidia)
        monkeypatch.setattr(environment.sys, "platform", system)
        found = environment.plan(tmp_path, environment.TESTED_COMFYUI)
        assert found.index == index
    assert found.stamp != Plan(found.packages, found.alone, found.free_gb).stamp


def test_another_index_is_asked_for_torch_alone(made, wheels, tmp_path, monkeypatch, capsys):
    """A package named spandrel, one of torch's companions, lies there; tiny-thing lies where pip looks by itself."""
    write_wheel(wheels)
    page = tmp_path / "index" / "spandrel" / "index.html"
    page.parent.mkdir(parents=True)
    write_wheel(page.parent, "spandrel")
    page.write_text('<a href="spandrel-1.0-py3-none-any.whl">spandrel-1.0-py3-none-any.whl</a>')
    monkeypatch.delenv("PIP_NO_INDEX")
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PIP_INDEX_URL", (tmp_path / "empty").as_uri())
    index = (tmp_path / "index").as_uri()
    elsewhere = Plan((*WANTED.packages, "spandrel==1.0"), (), free_gb=0, index=index)
    install(elsewhere, made)
    assert why_not_ready(elsewhere, made) is None
    assert f"The card stays unused: {index} had no torch for it" in capsys.readouterr().out
    other = page.parents[1] / "other-thing" / "index.html"
    other.parent.mkdir()
    write_wheel(other.parent, "other_thing")
    other.write_text('<a href="other_thing-1.0-py3-none-any.whl">other_thing-1.0-py3-none-any.whl</a>')
    with pytest.raises(LaunchError, match="other-thing"):
        install(Plan((*elsewhere.packages, "other-thing==1.0"), (), free_gb=0, index=index), made)


@pytest.mark.parametrize(
    ("line", "driver", "used"),
    [
        ("cuda: Optional[str] = '13.0'", True, True),
        ("cuda = '12.8'", False, False),
        ("cuda: Optional[str] = None", True, False),
    ],
)
def test_a_card_is_used_where_driver_and_torch_know_it(tmp_path, monkeypatch, line, driver, used):
    monkeypatch.setattr(environment, "has_nvidia", lambda: driver)
    assert not environment.uses_card(tmp_path)
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "version.py").write_text(f"__version__ = '2.11.0'\n{line}\nhip = None\n")
    assert environment.uses_card(tmp_path) == used


def test_a_python_that_makes_no_environment_is_not_blamed_on_the_network():
    with pytest.raises(LaunchError, match="no such thing\nRun again with another Python"):
        run_quietly([sys.executable, "-c", "raise SystemExit('no such thing')"], "Virtual environment")


def test_gpu_machines_get_one_release():
    packages, alone = environment.torch_requirements(True, "linux", (3, 11))
    assert {line.split("==")[0] for line in packages} == environment.TORCH_FAMILY
    assert not alone


def test_lock_waits_for_its_holder_and_survives_its_death(tmp_path):
    lock = tmp_path / "inside" / "lock"
    hold = (
        f"import sys, time; sys.path.insert(0, {str(ROOT)!r})\n"
        "from pathlib import Path\nfrom launch.environment import setup_lock\n"
        f"with setup_lock(Path({str(lock)!r})): print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        waiter = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True)
        assert "waiting" in waiter.stdout.readline()
        time.sleep(0.7)
        assert waiter.poll() is None
        holder.kill()
        assert waiter.stdout.readline() == "held\n"
    finally:
        for process in (holder, waiter):
            process.kill()
            process.wait()


def run_with(code, **own):
    """Return what `code` prints when run.py runs it in this environment, changed by `own`, into a pipe."""
    start = "import sys; sys.argv = ['run.py']; import run; run.environment.python_of = lambda: sys.executable; "
    dropped = ("OMP_WAIT_POLICY", "PYTHONIOENCODING")
    variables = {name: value for name, value in os.environ.items() if name not in dropped}
    command = [sys.executable, "-c", f"{start}run.run(['-c', {code!r}], 'somewhere')"]
    return subprocess.check_output(command, cwd=ROOT, env=variables | own, text=True).strip()


@pytest.mark.parametrize(("own", "expected"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")])
def test_threads_wait_asleep_unless_the_user_says_otherwise(own, expected):
    assert run_with("import os; print(os.environ['OMP_WAIT_POLICY'])", **own) == expected


def test_letters_that_a_pipe_has_not_become_escapes():
    old_fashioned = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}  # as Windows is with its code pages
    assert run_with("print(chr(0x4E00))", **old_fashioned) == r"\u4e00"
