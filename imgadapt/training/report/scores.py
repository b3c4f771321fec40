"""Scores: pictures against prompts, training pictures and the base's pictures, by CLIP and DINOv2 models on disk.

The measures are DreamBooth's (arXiv 2208.12242): CLIP-T, CLIP-I and DINO, all of them cosines of features.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional as F

from imgadapt.errors import ConfigError, first_few

_AT_ONCE = 16
KINDS = {"clip": "CLIP", "dinov2": "DINOv2"}


@dataclass(frozen=True)
class Score:
    """What one model says of some pictures.

    model: "CLIP" or "DINOv2", with its folder's name. text: mean cosine to their prompts (None: it reads none).
    alike: mean cosine to the training pictures. copy: the greatest, near 1 where a picture is one of them over again.
    drift: 1 - mean cosine to the base's pictures of the same prompts and seeds (None: there are none).
    """

    model: str
    text: float | None
    alike: float
    copy: float
    drift: float | None


class Scorer:
    """One model of a folder in transformers' form; nothing is downloaded.

    Raises:
        ConfigError: see `kind`; or its weights or its processor cannot be read.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel, Dinov2Model

        self.kind, self.device = kind(folder), device
        self.name = f"{KINDS[self.kind]} ({folder.name})"
        model: Any = CLIPModel if self.kind == "clip" else Dinov2Model
        try:
            loaded, told = model.from_pretrained(folder, local_files_only=True, output_loading_info=True)
            self.processor: Any = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
            self.tokenizer: Any = None
            if self.kind == "clip":
                self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, SafetensorError) as error:
            raise ConfigError(f"score_with: {folder} cannot be read: {error}") from error
        if missing := sorted(told["missing_keys"]):  # which transformers fills with random numbers
            raise ConfigError(f"score_with: {folder} lacks weights: {first_few(missing)}")
        self.model: Any = loaded.to(device).eval()

    @torch.no_grad()
    def images(self, images: Sequence[Image.Image]) -> Tensor:
        """Features (n, width) of length 1, on the CPU."""
        made: list[Tensor] = []
        for k in range(0, len(images), _AT_ONCE):
            some = [image.convert("RGB") for image in images[k : k + _AT_ONCE]]
            pixels = self.processor(images=some, return_tensors="pt")["pixel_values"].to(self.device)
            if self.kind == "clip":
                made.append(self.model.visual_projection(self.model.vision_model(pixels).pooler_output))
            else:
                made.append(self.model(pixels).pooler_output)
        return F.normalize(torch.cat(made).float(), dim=1).cpu()

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor | None:
        """Features (n, width) of length 1, on the CPU; None for a model of pictures alone."""
        if self.kind != "clip":
            return None
        most = self.model.config.text_config.max_position_embeddings
        taken = self.tokenizer(list(texts), padding=True, truncation=True, max_length=most, return_tensors="pt")
        states = self.model.text_model(**taken.to(self.device)).pooler_output
        return F.normalize(self.model.text_projection(states).float(), dim=1).cpu()

    def score(self, features: Tensor, texts: Tensor | None, trained: Tensor, base: Tensor | None) -> Score:
        """The score of features (n, width). texts, base: (n, width), of the same prompts; trained: (m, width)."""
        alike = features @ trained.T
        return Score(
            self.name,
            None if texts is None else (features * texts).sum(1).mean().item(),
            alike.mean().item(),
            alike.max().item(),
            None if base is None else 1 - (features * base).sum(1).mean().item(),
        )


def kind(folder: Path) -> str:
    """Which of `KINDS` a folder's model is.

    Raises:
        ConfigError: it is none.
    """
    try:
        found = json.loads((folder / "config.json").read_text("utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"score_with: {folder} holds no model in transformers' form: {error}") from error
    if found not in KINDS:
        raise ConfigError(f"score_with: {folder} is a model of type '{found}'; wanted one of: {', '.join(KINDS)}")
    return found


def score(
    folders: Sequence[Path],
    rows: Sequence[Sequence[Image.Image]],
    prompts: Sequence[str],
    trained: Sequence[Image.Image],
    device: torch.device,
) -> list[list[Score]]:
    """For each row of pictures, one a prompt, what each model says. The first row is the base's.

    trained: the training pictures. At the end comes one row more: the training pictures, each against the others, where
    there are two or more: what "alike" and "copy" can be at best.

    Raises:
        ConfigError: see `Scorer`.
    """
    by_model: list[list[Score]] = []
    for folder in folders:
        scorer = Scorer(folder, device)
        texts, real = scorer.texts(prompts), scorer.images(trained)
        base = scorer.images(rows[0])
        found = [scorer.score(base, texts, real, None)]
        found += [scorer.score(scorer.images(row), texts, real, base) for row in rows[1:]]
        if len(trained) > 1:
            others = (real @ real.T)[~torch.eye(len(real), dtype=torch.bool)]
            found.append(Score(scorer.name, None, others.mean().item(), others.max().item(), None))
        by_model.append(found)
    return [list(row) for row in zip(*by_model, strict=True)]
