"""A golden case (`name.safetensors` + `name.json`), and the comparison of one of its tensors with ours."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden"  # weight files that a folder does not bring itself


@dataclass(frozen=True, slots=True)
class Check:
    """One compared tensor; it passes if its largest absolute error (its relative RMS, where given) is in tolerance."""

    tensor: str
    max_abs_error: float = math.nan
    tolerance: float = 0.0
    relative_rms: float | None = None
    message: str = ""  # why there is nothing to compare; a check with a message fails

    @property
    def ok(self):
        measured = self.max_abs_error if self.relative_rms is None else self.relative_rms
        return not self.message and measured <= self.tolerance  # nan compares False


class Case:
    """One golden case: its name, its json (`config`), and its tensors."""

    def __init__(self, name, config, tensors, folder):
        self.name = name
        self.config = config
        self.tensors = tensors
        self.folder = Path(folder)

    @classmethod
    def read(cls, path):
        """Read `path` (a .json) and the .safetensors beside it (a manifest has none); ValueError if unreadable."""
        path = Path(path)
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path.name}: not readable as json ({error})") from error
        if not isinstance(config, dict):
            raise ValueError(f"{path.name}: holds a {type(config).__name__}, expected an object with a `kind`")
        if "kind" not in config and "components" in config:
            return cls(path.stem, {"kind": "manifest", **config}, {}, path.parent)
        if not isinstance(config.get("kind"), str):
            raise ValueError(f"{path.name}: kind is {config.get('kind')!r}, expected the name of a kind of case")
        beside = path.with_suffix(".safetensors")
        if not beside.is_file():
            raise ValueError(f"{path.name}: {beside.name} is missing beside it")
        try:
            tensors = load_file(beside)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{beside.name}: not readable as safetensors ({error})") from error
        return cls(path.stem, config, tensors, path.parent)

    @property
    def kind(self):
        return self.config["kind"]

    @property
    def outputs(self):
        """Names of every tensor that a check must cover, whether the file holds it or only its json lists it."""
        names = set(self.tensors) | set(self.config.get("tensors", ()))
        return sorted(name for name in names if name.startswith("out."))

    def __getitem__(self, name):
        if name not in self.tensors:
            raise ValueError(f"{self.name}.safetensors has no tensor {name}")
        return self.tensors[name]

    def __contains__(self, name):
        return name in self.tensors

    def under(self, prefix):
        """Return {rest of name: tensor} of the tensors whose name starts with `prefix`, numbered ones in order."""
        names = sorted(self.tensors, key=lambda name: (len(name), name))
        return {name[len(prefix) :]: self.tensors[name] for name in names if name.startswith(prefix)}

    def weights(self):
        """Return the Case of the weight file that this case names, from its own folder or from tests/golden."""
        name = self.config["weights"]
        for folder in (self.folder, GOLDEN):
            if (folder / f"{name}.json").is_file():
                return Case.read(folder / f"{name}.json")
        raise ValueError(f"weights {name}.safetensors are neither in {self.folder} nor in {GOLDEN}")

    def check(self, name, ours, tolerance):
        """Compare `ours` with golden tensor `name` by the largest absolute error (tolerance 0: equal)."""
        golden = self[name]
        if golden.shape != ours.shape:
            return Check(name, message=f"shape {list(ours.shape)}, expected {list(golden.shape)}")
        difference = ours.detach().double() - golden.double()
        return Check(name, difference.abs().max().item() if difference.numel() else 0.0, tolerance)

    def check_rms(self, name, ours, tolerance=2e-2):
        """Compare `ours` with golden tensor `name` by RMS of the difference over RMS of the golden (for bf16)."""
        check = self.check(name, ours, tolerance)
        if check.message:
            return check
        golden = self[name].double()
        relative = (ours.detach().double() - golden).pow(2).mean().sqrt() / golden.pow(2).mean().sqrt().clamp_min(1e-12)
        return Check(name, check.max_abs_error, tolerance, relative.item())


@torch.no_grad()
def checks_of(case, kinds):
    """Yield every Check of a case: those of its kind's function, then a failed one for each output nobody covered.

    `kinds` maps a kind to function(case) -> iterator of Check. An exception becomes a failed Check with its message.
    """
    covered = set()
    try:
        for check in kinds[case.kind](case):
            covered.add(check.tensor)
            yield check
    except Exception as error:  # one broken case must not hide the others
        covered.add("(raised)")
        yield Check("(raised)", message=f"{type(error).__name__}: {error}")
    for name in case.outputs:
        if name not in covered:
            covered.add(name)
            yield Check(name, message="no check covers this tensor")
    if not covered:
        yield Check("(case)", message="nothing to compare: no tensor is named out.*")
