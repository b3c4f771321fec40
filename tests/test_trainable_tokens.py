"""Trainable tokens: as peft has them, on a text encoder's words."""

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch

import imgadapt
from imgadapt.errors import ConfigError, TargetError
from imgadapt.methods import TrainableTokens
from imgadapt.training import spelling

tiny: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("tiny.py"))))
IDS = (3, 7, 20)


def encoder() -> Any:
    torch.manual_seed(0)
    return tiny.clip(tiny.clip_tokenizer(), 8, projected=False).requires_grad_(False).eval()


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
@torch.no_grad()
def test_a_file_of_pefts_acts_as_it_does_there_and_is_written_as_it_was(tmp_path: Path) -> None:
    ids = torch.tensor([[5, 3, 9, 20, 3, 1]])
    config = peft.TrainableTokensConfig(token_indices=list(IDS), target_modules=["token_embedding"])
    theirs: Any = peft.get_peft_model(encoder(), config)
    for name, parameter in theirs.named_parameters():
        if "trainable_tokens_delta" in name:
            parameter.normal_()
    wanted = theirs(ids).last_hidden_state
    theirs.save_pretrained(tmp_path / "theirs")

    model = encoder()
    base = model(ids).last_hidden_state
    parts = {"text_encoder": model}
    file = imgadapt.load(tmp_path / "theirs")
    (method,) = {part.method for part in file.parts.values()}
    assert method == TrainableTokens(IDS, values=True)
    imgadapt.attach(parts, file)
    torch.testing.assert_close(model(ids).last_hidden_state, wanted)
    imgadapt.save(imgadapt.collect(parts), tmp_path / "ours", format="peft")
    imgadapt.merge(parts)
    torch.testing.assert_close(model(ids).last_hidden_state, wanted)
    imgadapt.detach(parts)
    assert torch.equal(model(ids).last_hidden_state, base)
    again = peft.PeftModel.from_pretrained(encoder(), tmp_path / "ours")
    torch.testing.assert_close(again(ids).last_hidden_state, wanted)


def test_only_the_words_that_are_named_learn() -> None:
    model = encoder()
    parts = {"text_encoder": model}
    made = spelling.method("trainable_tokens(tokens=(3, 7))", {})
    assert made == TrainableTokens((3, 7))
    imgadapt.attach(parts, TrainableTokens((3, 7)), targets="token_embedding")
    model(torch.tensor([[3, 4, 4, 1]])).last_hidden_state.square().sum().backward()
    (rows,) = imgadapt.parameters(parts)
    assert rows.grad is not None
    assert rows.grad[0].any()
    assert not rows.grad[1].any()


def test_ids_that_are_none_are_refused() -> None:
    for tokens in ((3, 3), (-1,), (), (1.5,), ("fox",), 10**9, True, None):
        with pytest.raises(ConfigError, match="ids of tokens"):
            TrainableTokens(tokens)  # pyright: ignore[reportArgumentType] # as a file may say
    for tokens, why in (((10**6,), "beyond"), (2, "not told")):
        with pytest.raises(TargetError, match=why):
            imgadapt.attach({"text_encoder": encoder()}, TrainableTokens(tokens), targets="token_embedding")
