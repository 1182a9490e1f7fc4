"""Run pip, and whatever else is worth reading only if it fails, behind one status line, and say what to do then."""

import subprocess
import tempfile

from . import LaunchError
from .terminal import StatusLine

# What pip and venv say -> what a newcomer can do about it; the first match counts.
REMEDIES = (
    ("No space left on device", "Free some disk space (the temporary folder counts too) and run again."),
    (
        "DO NOT MATCH THE HASHES",
        "The file that was offered is not the one that was tested: it is damaged or was replaced. Run again; if it "
        "stays so, empty pip's cache (`python3 -m pip cache purge`) and check which package index pip uses.",
    ),
    (
        "No matching distribution",
        "The package index that pip uses lacks this version for this Python and system, or cannot be reached. Check "
        "the network and `pip config list`, or try Python 3.11, the one that is tested.",
    ),
    ("ensurepip", "Python's own installer is missing or broken: on Debian and Ubuntu, `apt install python3-venv`."),
)
NETWORK = "Check the network (and HTTPS_PROXY, if you need one) and run again: finished downloads are in pip's cache."
ANOTHER_PYTHON = "Run again with another Python; 3.11 is the one that is tested."


def run_quietly(command, label, remedy=ANOTHER_PYTHON):
    """Run `command` (a list) behind one status line; LaunchError with the end of its output and a remedy on failure.

    remedy: where none of REMEDIES fits.
    """
    status = StatusLine()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen([str(word) for word in command], stdout=log, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                status.show(f"  {label} ...")
                try:
                    process.wait(timeout=0.5)
                except subprocess.TimeoutExpired:
                    pass
        finally:
            process.kill()  # nothing to kill unless we were interrupted
            process.wait()
        log.seek(0)
        output = log.read()
    if process.returncode:
        status.done(f"  {label}: failed")
        last_lines = "\n".join(f"    {line}" for line in output.strip().splitlines()[-12:])
        remedy = next((known for sign, known in REMEDIES if sign in output), remedy)
        raise LaunchError(f"{label} failed (exit code {process.returncode}):\n{last_lines}\n{remedy}")
    status.done(f"  {label}")


def pip(python, arguments, label):
    """Run `python -m pip` with `arguments`; it prints nothing but errors, and those only if it fails."""
    quiet = ["-qq", "--no-input", "--disable-pip-version-check"]
    run_quietly([python, "-m", "pip", *arguments[:1], *quiet, *arguments[1:]], label, NETWORK)
