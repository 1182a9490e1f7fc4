"""What run.py is made of: an environment, a ComfyUI, a server, a client; imports only the standard library."""

import sys
from pathlib import Path

if sys.version_info < (3, 10):  # noqa: UP036 - run.py meets whatever Python there is
    sys.exit("run.py needs Python 3.10 or newer; this is Python {}.{}.".format(*sys.version_info))

ROOT = Path(__file__).resolve().parent.parent


class LaunchError(RuntimeError):
    """Something outside this code went wrong; the message says what, and what to do about it."""
