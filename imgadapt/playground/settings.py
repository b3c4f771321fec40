"""Settings: where a playground keeps its things, and what it allows."""

from dataclasses import dataclass, field
from pathlib import Path

from imgadapt.atomic import make_folder
from imgadapt.errors import OutputError


@dataclass(frozen=True)
class Limits:
    """What one request may ask for, and how many may wait.

    side: pixels; pixels: of one picture; work: pixels x steps x pictures of one request; drawn_together: pixels of a
    batch. waiting: requests in the queue; per_owner: of one of those who ask. attached: adapters that stay on the base
    between requests. upload: bytes of a file; upload_pixels: of a picture, looked at before it is decoded.
    """

    side: int = 4096
    pixels: int = 4096 * 2304
    steps: int = 200
    pictures: int = 32
    cells: int = 400
    work: int = 4_000_000_000
    drawn_together: int = 1024 * 1024
    adapters: int = 16
    prompt: int = 8000
    waiting: int = 32
    per_owner: int = 4
    attached: int = 12
    upload: int = 64 * 2**20
    upload_pixels: int = 4096 * 4096


@dataclass(frozen=True)
class Settings:
    """A playground's own choices; whoever starts it makes them, and no request changes them.

    home: what it writes goes here: `outputs/` (pictures, grids), `adapters/` (merged and converted), `runs/`
        (trainings), `data/` (pictures to train on), `uploads/`. adapters, models, data: further folders to look in.
    base: "demo", a diffusers folder or a checkpoint; the first to be loaded. device, dtype ("fp32", "bf16", "fp16"): of
        its modules. shared: others than the machine's own user reach it: no hub, owners see their own pictures only.
    hub: whether bases that are named `owner/name` may be taken out of the hub's cache.
    """

    home: Path
    adapters: tuple[Path, ...] = ()
    models: tuple[Path, ...] = ()
    data: tuple[Path, ...] = ()
    base: str = "demo"
    device: str = "cpu"
    dtype: str = "fp32"
    shared: bool = False
    hub: bool = False
    limits: Limits = field(default_factory=Limits)

    def folder(self, name: str) -> Path:
        """A folder of the home, made where it is not there yet.

        Raises:
            OutputError: it cannot be made.
        """
        made = self.home / name
        try:
            make_folder(made)
        except OutputError as error:
            raise OutputError(f"{error}; choose another --home") from error
        return made
