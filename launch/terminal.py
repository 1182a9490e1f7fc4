"""One line on the terminal that tells how far a long step is."""

import shutil
import sys
import time


class StatusLine:
    """A line that is rewritten in place while a step runs; in a log file only its last state is written."""

    def __init__(self):
        self.start = time.monotonic()
        self.live = sys.stdout.isatty()

    @property
    def seconds(self):
        """Seconds since the line was made."""
        return time.monotonic() - self.start

    def show(self, text):
        """Rewrite the line as `text` and the seconds so far; nothing where the line cannot be rewritten."""
        if self.live:
            self._write(f"{text}, {self.seconds:.0f} s", end="")

    def done(self, text):
        """Write the line for the last time, with the seconds that the step took."""
        self._write(f"{text}, {self.seconds:.1f} s", end="\n")

    def _write(self, text, end):
        width = shutil.get_terminal_size().columns - 1
        print(f"\r{text[:width]:<{width}}" if self.live else text, end=end, flush=True)
