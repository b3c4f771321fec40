"""The embedded base: a small, really trained text-to-image pipeline of emoji, and pictures to adapt it with."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imgadapt.errors import MissingExtra
from imgadapt.header import header_of

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

FOLDER = Path(__file__).parent
PIPELINE = FOLDER / "pipeline"
STYLE = FOLDER / "style"
"""`train/`: 40 pictures with captions; `held_out/`: 96 other subjects; `plain/`: the 40 subjects as the base draws."""
ADAPTERS = FOLDER / "adapters"
"""Three small adapters for it, of three methods; its README says how they were trained."""


def pipeline() -> "StableDiffusionPipeline":
    """The embedded base as a diffusers pipeline, fp32, on the CPU: 64 x 64 pixels, SD1.5's layer names.

    Prompts are as it was trained: `a fox`, `a rocket on a green background`. 15 to 20 steps and guidance 4 do well.

    Raises:
        MissingExtra: diffusers is not installed.
    """
    try:
        diffusers: Any = import_module("diffusers")
    except ModuleNotFoundError as error:
        raise MissingExtra("diffusers", "diffusers") from error
    torch: Any = import_module("torch")
    with _quietly(diffusers.utils.logging), _quietly(import_module("transformers").utils.logging):
        pipe: Any = diffusers.StableDiffusionPipeline.from_pretrained(
            PIPELINE, dtype=torch.float32, local_files_only=True
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def shape_of(name: str) -> tuple[int, ...] | None:
    """Of a layer's weight, by its canonical name (`unet.conv_in`), as the base's headers tell; None: there is none."""
    return _shapes().get(name)


@cache
def _shapes() -> Mapping[str, tuple[int, ...]]:
    files = {"unet": "unet/diffusion_pytorch_model.safetensors", "text_encoder": "text_encoder/model.safetensors"}
    found: dict[str, tuple[int, ...]] = {}
    for component, place in files.items():
        for key, row in header_of(PIPELINE / place).rows.items():
            if key.endswith(".weight"):
                found[f"{component}.{key.removesuffix('.weight')}"] = row.shape
    return found


@contextmanager
def _quietly(logging: Any) -> Generator[None]:
    """No bars and no warnings (that the autoencoder is a tiny one; that torchvision is not there) while loading."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
