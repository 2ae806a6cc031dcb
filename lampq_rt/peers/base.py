"""What the peers share: being registered, being installed or not, and models that are quantised once and kept."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from lampq_rt.errors import BackendError
from lampq_rt.plan import weights_digest
from lampq_rt.variants import VARIANTS, Builder, Contender, Job

INSTALL = "pip install '.[peers]' in a checkout"


@dataclass(frozen=True)
class Peer:
    """What is known of a peer without its package.

    Attributes:
        packages: what it needs, its runtime first; import names, which for all of them are the distributions' too.
        calibration_images: how many its makers' tool looks at by default; 32 where that is not said.
        devices: where it runs.
    """

    packages: tuple[str, ...]
    calibration_images: int
    devices: tuple[str, ...] = ("cpu",)


PEERS: dict[str, Peer] = {}
"""Every peer by the name of its variant."""


def peer(
    name: str, *packages: str, calibration_images: int = 32, devices: tuple[str, ...] = ("cpu",)
) -> Callable[[Builder], Builder]:
    """Decorator that makes a builder the variant `name`, refused with a reason where it cannot run."""

    def add(build: Builder) -> Builder:
        known = PEERS[name] = Peer(packages, calibration_images, devices)

        @VARIANTS.register(name)
        @wraps(build)
        def checked(job: Job) -> Contender:
            if job.device.type not in known.devices:
                raise BackendError(f"it runs on {' and '.join(known.devices)}, not on {job.device.type}")
            missing = [package for package in known.packages if not installed(package)]
            if missing:
                raise BackendError(f"{' and '.join(missing)} not installed; to have it: {INSTALL}")
            return build(job)

        return checked

    return add


def installed(package: str) -> bool:
    """Whether a package could be imported; does not import it."""
    return find_spec(package) is not None


def versions(variant: str) -> dict[str, str]:
    """Versions of the packages of a peer, by name; empty for other variants, and without those not installed."""
    packages = PEERS[variant].packages if variant in PEERS else ()
    return {package: metadata.version(package) for package in packages if installed(package)}


def kept(job: Job, variant: str, make: Callable[[Path], None]) -> Path:
    """Folder of the variant's quantised model: as an earlier job left it, or filled by `make`.

    The name tells weights, calibration images, versions and the file that `make` stands in apart. A folder that is
    there is complete.
    """
    digest = hashlib.sha256(weights_digest(job.original).encode())
    digest.update(job.calibration.contiguous().numpy().tobytes())
    digest.update(repr(sorted(versions(variant).items())).encode())
    digest.update(Path(make.__code__.co_filename).read_bytes())
    folder = job.folder / f"{variant}-{digest.hexdigest()[:16]}"
    if not folder.is_dir():
        job.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=job.folder, prefix="unfinished-") as scratch:
            made = Path(scratch) / "model"
            made.mkdir()
            make(made)
            os.replace(made, folder)
    return folder
