"""Reuse, between the steps of a denoising loop, of what the transformer's middle layers add to its residual stream."""


class StepCache:
    """Skips the middle layers where those before them do nearly what they did when the middle ones last ran.

    Made for one loop; every kind of forward in it (prompt, negative prompt) has a `key` of its own. What is kept is
    fp32, twice the size of the residual stream for every key.

    threshold: up to which drift the middle layers are skipped. Drift is mean |a - b| / mean |b| over all tokens, a what
    the first layers add now, b what they added when the middle ones last ran; it never grows over several skips
    unnoticed, since b stays. 0 skips nothing.
    """

    def __init__(self, threshold):
        self.threshold = threshold
        self.forwards = 0
        self.drifts = []  # of the forwards that skipped
        self._kept = {}  # key -> (what the first layers added, what the middle ones did)

    def __call__(self, key, change, x, middle):
        """Return x after the middle layers: `middle(x)`, or x with what they added before.

        change: what the layers before added; x: the residual stream; both [B, N, D] fp32. ValueError where the sizes
        are not those of the last call with this key.
        """
        self.forwards += 1
        if key in self._kept:
            before, added = self._kept[key]
            if added.shape != x.shape:
                raise ValueError(
                    f"step cache: {list(x.shape)} after {list(added.shape)}; make a new one for every clip"
                )
            drift = ((change - before).abs().mean() / before.abs().mean()).item()
            if drift < self.threshold:
                self.drifts.append(drift)
                return x + added
        out = middle(x)
        self._kept[key] = change, out - x
        return out

    def report(self):
        """Return in one line what was skipped, and how far from what it stood for."""
        skipped = len(self.drifts)
        if not skipped:
            return f"step cache: nothing skipped in {self.forwards} forwards; a higher threshold skips more"
        mean, most = 100 * sum(self.drifts) / skipped, 100 * max(self.drifts)
        return (
            f"step cache: the middle layers skipped in {skipped} of {self.forwards} forwards, where the layers before "
            f"them had drifted by {mean:.1f} % on average, {most:.1f} % at most"
        )
