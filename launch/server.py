"""Start a ComfyUI server of our own on a free port of this computer, and stop it."""

import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

from . import LaunchError
from .comfyui import make_base
from .environment import uses_card

COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def free_port():
    """Return a TCP port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def interrupt_when_told_to_end():
    """Let SIGTERM do what Ctrl-C does, so that `with` blocks are left in order; return a call that undoes it.

    Only the main thread may: in any other, and where somebody handles the signal already, nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        return lambda: None
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    return lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL)


class Server:
    """A ComfyUI whose every file but `output` lies in a temporary folder, ready inside the `with` block.

    A program that is told to end (SIGTERM) leaves that block, and stops the server, as it does on Ctrl-C.

    comfyui: its folder. output: where clips go. arguments: more words for its main.py. python: what runs it.
    Raises LaunchError, with the end of its log, when it does not come up within `patience` seconds.
    """

    def __init__(self, comfyui, output, arguments=(), python=sys.executable, patience=300):
        self.comfyui, self.output, self.patience = Path(comfyui), Path(output), patience
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.command = [str(python), str(self.comfyui / "main.py"), "--listen", "127.0.0.1", "--port", str(self.port)]
        packages = Path(importlib.util.find_spec("torch").origin).parents[1]
        self.command += ["--disable-auto-launch", "--disable-api-nodes"]  # the cloud's nodes load for seconds
        self.command += [*([] if uses_card(packages) else ["--cpu"]), *arguments]

    def __enter__(self):
        self.folder = tempfile.TemporaryDirectory(prefix="happyhorse-", ignore_cleanup_errors=True)
        self.base = Path(self.folder.name)
        self.output.mkdir(parents=True, exist_ok=True)
        self.log_file = open(self.base / "server.log", "wb")
        own_files = [*make_base(self.base), "--output-directory", str(self.output.resolve())]
        # In a session of its own, so that Ctrl-C reaches us alone and the server is stopped in order.
        self.process = subprocess.Popen(
            self.command + own_files,
            stdin=subprocess.DEVNULL,
            stdout=self.log_file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"},  # of the log; Windows has others
        )
        self.as_before = interrupt_when_told_to_end()
        try:
            self._wait_until_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        self.process.terminate()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.as_before()
        self.log_file.close()
        self.folder.cleanup()

    @property
    def input(self):
        """The folder in which LoadImage looks for files."""
        return self.base / "input"

    def log(self, lines=25):
        """Return the last lines of the server's log."""
        text = (self.base / "server.log").read_text(encoding="utf-8", errors="replace")
        return "\n".join(COLOURS.sub("", text).splitlines()[-lines:])

    def check_alive(self):
        """Raise LaunchError with the end of the log if the server has ended."""
        if self.process.poll() is not None:
            code = self.process.returncode
            cause = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            hint = " (the system was out of memory?)" if code == -9 else ""
            raise LaunchError(f"ComfyUI ended with {cause}{hint}. The last lines of its log:\n{self.log()}")

    def _wait_until_ready(self):
        deadline = time.monotonic() + self.patience
        while time.monotonic() < deadline:
            self.check_alive()
            try:
                urllib.request.urlopen(f"{self.url}/system_stats", timeout=5).close()
                return
            except OSError:
                time.sleep(0.2)
        raise LaunchError(f"ComfyUI was not ready after {self.patience} s. The last lines of its log:\n{self.log()}")
