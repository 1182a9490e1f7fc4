"""Run every golden case of a folder through our code and print one line a tensor: `python as_package.py verify DIR`."""

import argparse
import sys
from collections import Counter
from pathlib import Path

from . import autoencoders, dit, manifest, media, sampling, text
from .case import Case, Check, checks_of

FAMILIES = (dit, text, autoencoders, sampling, media, manifest)
KINDS = {kind: function for family in FAMILIES for kind, function in family.KINDS.items()}
WEIGHT_KINDS = frozenset({"dit_weights", "turbo_weights", "vae_weights", "audio_weights"})  # cases read them


def verify_file(path):
    """Yield the Checks of one file of a folder; a file that nobody can check gives one failed Check."""
    if path.suffix == ".md" or (path.suffix == ".safetensors" and path.with_suffix(".json").is_file()):
        return
    if path.suffix == ".safetensors":
        yield Check("(file)", message=f"{path.stem}.json is missing beside it, so its kind is unknown")
        return
    if path.suffix != ".json" or not path.is_file():
        yield Check("(file)", message="unknown file: expected name.safetensors with name.json, or a .md")
        return
    try:
        case = Case.read(path)
    except ValueError as error:
        yield Check("(file)", message=str(error))
        return
    if case.kind in KINDS:
        yield from checks_of(case, KINDS)
    elif case.kind not in WEIGHT_KINDS:
        yield Check("(file)", message=f"unknown kind {case.kind!r}; known: {', '.join(sorted(KINDS))}")


def line(case, check, width):
    """Format one result: case, tensor, max abs error, relative RMS (where it decides), tolerance, ok or FAIL."""
    if check.message:
        return f"{case:<{width}}  {check.tensor:<36}  FAIL  {check.message}"
    rms = "" if check.relative_rms is None else f"{check.relative_rms:.2e}"
    result = "ok" if check.ok else "FAIL"
    error = f"{check.max_abs_error:>9.2e}  {rms:>8}  {check.tolerance:>7.0e}"
    return f"{case:<{width}}  {check.tensor:<36}  {error}  {result}"


def main(arguments=None):
    """Check the folder named on the command line; return 0 if all passed, 1 if not, 2 if there is no such folder."""
    parser = argparse.ArgumentParser(prog="verify", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of golden cases: name.safetensors + name.json")
    folder = parser.parse_args(arguments).folder
    if not folder.is_dir():
        print(f"verify: {folder} is not a folder; give the folder that holds the golden cases", file=sys.stderr)
        return 2
    paths = sorted(folder.iterdir())
    width = max((len(path.stem) for path in paths), default=4)
    count = Counter()
    print(f"{'case':<{width}}  {'tensor':<36}  {'max abs':>9}  {'rel rms':>8}  {'allowed':>7}  result")
    for path in paths:
        name = path.stem if path.suffix in (".json", ".safetensors") else path.name
        for check in verify_file(path):
            count[check.ok] += 1
            print(line(name, check, width), flush=True)
    print(f"{count[True]} passed, {count[False]} failed")
    if not count:
        print(f"verify: {folder} holds no golden case", file=sys.stderr)
    return 1 if count[False] or not count else 0


if __name__ == "__main__":
    sys.exit(main())
