"""Scores by CLIP and DINOv2: cosines as transformers gives them, on tiny random models."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import (
    AutoTokenizer,
    BitImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2Model,
)

from imgadapt import demo
from imgadapt.errors import ConfigError
from imgadapt.training.config import TrainConfig
from imgadapt.training.report import scores
from imgadapt.training.report.scores import Scorer

CPU = torch.device("cpu")
_TINY: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
_CUT: dict[str, Any] = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
PROMPTS = ["a fox", "two keys and a very long list of other things that are on a table beside a window"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP model that reads at most 12 tokens."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "tiny-clip"
    tokenizer: Any = AutoTokenizer.from_pretrained(demo.PIPELINE / "tokenizer")
    text = CLIPTextConfig(
        **_TINY, intermediate_size=16, vocab_size=len(tokenizer), max_position_embeddings=12,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    vision = CLIPVisionConfig(**_TINY, intermediate_size=16, image_size=32, patch_size=8)
    CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8)).save_pretrained(
        folder
    )
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(**_CUT).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random DINOv2 model."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("models") / "tiny-dino"
    Dinov2Model(Dinov2Config(**_TINY, mlp_ratio=2, image_size=32, patch_size=8)).save_pretrained(folder)
    BitImageProcessor(**_CUT).save_pretrained(folder)
    return folder


def images(first: int, count: int = 2) -> list[Image.Image]:
    """Pictures of unequal shape."""
    return [
        Image.effect_mandelbrot((40 + 8 * k, 48), (-2 + 0.1 * k, -1.5, 1, 1.5), 60).convert("RGB")
        for k in range(first, first + count)
    ]


def test_features_are_those_of_transformers(clip: Path, dino: Path) -> None:
    some = images(0, 3)
    model: Any = CLIPModel.from_pretrained(clip)
    pixels = CLIPImageProcessor.from_pretrained(clip)(images=some, return_tensors="pt")["pixel_values"]
    wanted = model(input_ids=torch.zeros(1, 4, dtype=torch.long), pixel_values=pixels).image_embeds
    scorer = Scorer(clip, CPU)
    assert scorer.name == "CLIP (tiny-clip)"
    torch.testing.assert_close(scorer.images(some), wanted.detach(), rtol=1e-5, atol=1e-6)
    tokens = AutoTokenizer.from_pretrained(clip)(PROMPTS[:1], return_tensors="pt")
    texts = model(**tokens, pixel_values=pixels).text_embeds
    made = scorer.texts(PROMPTS[:1])
    assert made is not None
    torch.testing.assert_close(made, texts.detach(), rtol=1e-5, atol=1e-6)
    both = scorer.texts(PROMPTS)  # the second is cut to 12 tokens, and the first is padded to its length
    assert both is not None
    torch.testing.assert_close(both[:1], made, rtol=1e-4, atol=1e-5)

    own: Any = Dinov2Model.from_pretrained(dino)
    pixels = BitImageProcessor.from_pretrained(dino)(images=some, return_tensors="pt")["pixel_values"]
    wanted = F.normalize(own(pixels).last_hidden_state[:, 0], dim=1)
    torch.testing.assert_close(Scorer(dino, CPU).images(some), wanted.detach(), rtol=1e-5, atol=1e-6)
    assert Scorer(dino, CPU).texts(PROMPTS) is None


def test_more_pictures_than_are_read_at_once_give_the_same_features(dino: Path) -> None:
    some = images(0, 20)
    scorer = Scorer(dino, CPU)
    torch.testing.assert_close(scorer.images(some)[17:], scorer.images(some[17:]), rtol=1e-5, atol=1e-6)


def test_scores_are_cosines_of_features(clip: Path) -> None:
    base, drawn, trained = images(0), images(4), images(8, 3)
    found = scores.score([clip], [base, drawn], PROMPTS, trained, CPU)
    scorer = Scorer(clip, CPU)
    texts = scorer.texts(PROMPTS)
    assert texts is not None
    b, d, t = scorer.images(base), scorer.images(drawn), scorer.images(trained)
    (of_base,), (of_drawn,), (of_real,) = found
    assert of_drawn.text == pytest.approx(sum(float(d[k] @ texts[k]) for k in range(2)) / 2)
    pairs = [float(x @ y) for x in d for y in t]
    assert of_drawn.alike == pytest.approx(sum(pairs) / 6)
    assert of_drawn.copy == pytest.approx(max(pairs))
    assert of_drawn.drift == pytest.approx(1 - sum(float(d[k] @ b[k]) for k in range(2)) / 2, abs=1e-6)
    assert of_base.drift is None
    assert of_base.text == pytest.approx(sum(float(b[k] @ texts[k]) for k in range(2)) / 2)
    among = [float(t[i] @ t[j]) for i in range(3) for j in range(3) if i != j]
    assert (of_real.alike, of_real.copy) == (pytest.approx(sum(among) / 6), pytest.approx(max(among)))
    assert of_real.text is None


def test_a_picture_of_the_training_over_again_has_copy_1_and_the_base_again_no_drift(clip: Path, dino: Path) -> None:
    base, trained = images(0), images(4)
    found = scores.score([clip, dino], [base, base, [base[0], trained[1]]], PROMPTS, trained, CPU)
    for k in range(2):
        assert found[1][k].drift == pytest.approx(0, abs=1e-5)
        assert found[1][k].copy < 0.99999
        assert found[2][k].copy == pytest.approx(1, abs=1e-6)
    assert [score.model for score in found[0]] == ["CLIP (tiny-clip)", "DINOv2 (tiny-dino)"]
    assert found[0][1].text is None
    assert len(scores.score([dino], [base], PROMPTS, trained[:1], CPU)) == 1  # one picture has no others


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "nothing holds no model in transformers' form"),
        ("{", "nothing holds no model in transformers' form"),
        ("[]", "nothing holds no model in transformers' form"),
        ('{"model_type": "bert"}', "nothing is a model of type 'bert'; wanted one of: clip, dinov2"),
    ],
)
def test_a_folder_without_such_a_model_is_an_error_before_the_training(
    tmp_path: Path, config: str | None, message: str
) -> None:
    folder = tmp_path / "nothing"
    folder.mkdir()
    if config is not None:
        (folder / "config.json").write_text(config)
    with pytest.raises(ConfigError, match=message):
        TrainConfig.of({"folder": "x", "score_with": [str(folder)]})


def test_torn_weights_are_an_error_that_names_the_folder(clip: Path, tmp_path: Path) -> None:
    torn = tmp_path / "torn"
    shutil.copytree(clip, torn)
    weights = torn / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ConfigError, match=r"score_with: .*torn cannot be read"):
        Scorer(torn, CPU)
    held = load_file(clip / "model.safetensors")
    save_file({k: v for k, v in held.items() if k != "visual_projection.weight"}, weights, {"format": "pt"})
    with pytest.raises(ConfigError, match=r"score_with: .*torn lacks weights: visual_projection\.weight"):
        Scorer(torn, CPU)
    (torn / "preprocessor_config.json").unlink()
    shutil.copy(clip / "model.safetensors", weights)
    with pytest.raises(ConfigError, match=r"score_with: .*torn cannot be read"):
        Scorer(torn, CPU)


def test_the_models_are_none_of_what_decides_the_result(clip: Path) -> None:
    plain, scored = (TrainConfig.of({"folder": "x", **more}) for more in ({}, {"score_with": [clip]}))
    assert plain.identity({}) == scored.identity({})
    assert scored.score_with == [clip.absolute()]
    assert json.loads((clip / "config.json").read_text())["model_type"] == "clip"
