"""Train the embedded base: UNet (SD1.5's topology, narrow) and text encoder together, on cached latents.

    python train_scripts/demo_base/base.py DATA --pipeline imgadapt/demo/pipeline --steps 3900 --work WORK

DATA is what data.py wrote; the pipeline folder already holds `vae/` (autoencoder.py) and `tokenizer/` (words.py).
A line a minute goes to WORK/log.jsonl, sample grids and checkpoints beside it; run again, it goes on.
Two CPU cores need about 0.95 s a step at batch 64 (with glibc: MALLOC_MMAP_THRESHOLD_=4294967296
MALLOC_TRIM_THRESHOLD_=8589934592 MALLOC_TOP_PAD_=268435456, which make it 1.5 times as fast).
"""

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from imgadapt.demo import emoji

PROMPTS = (
    "fox|a red apple|a rocket|a castle|an emoji of a panda|a bicycle|a pizza|a smiling face with sunglasses|"
    "a sunflower|a guitar|a snowman|a strawberry|a fox on a purple background|a rocket on a green background|"
    "a penguin on a red background|a hamburger on a blue background"
)

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("data", type=Path)
parser.add_argument("--pipeline", type=Path, required=True, help="reads vae/ and tokenizer/ there, writes the rest")
parser.add_argument("--work", type=Path, required=True, help="log, samples and checkpoint")
parser.add_argument("--steps", type=int, default=3900)
parser.add_argument("--decay", type=float, default=0.35, help="share of the steps over which the rate falls to 2 %%")
parser.add_argument("--batch", type=int, default=64)
parser.add_argument("--lr", type=float, default=1.2e-3)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()
args.work.mkdir(parents=True, exist_ok=True)
torch.manual_seed(args.seed)

vae: Any = AutoencoderTiny.from_pretrained(args.pipeline / "vae").eval()
tokenizer = CLIPTokenizer.from_pretrained(args.pipeline / "tokenizer")
text: Any = CLIPTextModel(
    CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length, hidden_act="quick_gelu", projection_dim=128,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )
)  # fmt: skip
unet: Any = UNet2DConditionModel(  # SD1.5's blocks: three with cross-attention, one plain, two layers each
    sample_size=8, in_channels=16, out_channels=16, block_out_channels=(64, 80, 88, 88), layers_per_block=2,
    cross_attention_dim=128, attention_head_dim=4, norm_num_groups=8,
)  # fmt: skip
unet.to(memory_format=torch.channels_last)
scheduler: Any = DDIMScheduler(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
    rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True,
)  # fmt: skip

# --- data: every core concept, both ways round, on every background, as latents
concepts = emoji.concepts(args.data)
pictures = emoji.images(args.data, "noto")
core = [i for i, concept in enumerate(concepts) if concept["core"] and i in pictures]
backgrounds = list(emoji.BACKGROUNDS)
with torch.no_grad():
    latents: dict[tuple[int, bool], Tensor] = {}
    for i in core:
        for flip in (False, True):
            pixels = np.stack([emoji.compose(pictures[i], b, flip=flip) for b in backgrounds])
            x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
            latents[i, flip] = vae.encode(x).latents * vae.config.scaling_factor
seen = {i: [b for b in emoji.COLOURS if b not in emoji.held_out_colours(i)] for i in core}
tokens: dict[str, Tensor] = {}


def tokenize(caption: str) -> Tensor:
    if caption not in tokens:
        tokens[caption] = tokenizer(caption, padding="max_length", truncation=True, return_tensors="pt").input_ids[0]
    return tokens[caption]


def draw(rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """One training pair: latent (16, 8, 8) and token ids (20,)."""
    i = core[rng.integers(len(core))]
    concept = concepts[i]
    flip = concept["flip"] and rng.random() < 0.35
    background = seen[i][rng.integers(len(seen[i]))] if rng.random() < 0.38 else "white"
    others = concept["names"]
    name = others[rng.integers(len(others))] if others and rng.random() < 0.12 else concept["label"]
    caption = str(rng.choice(list(emoji.TEMPLATES), p=list(emoji.TEMPLATES.values()))).format(name)
    if background != "white" or rng.random() < 0.1:
        caption += f" on a {background} background"
    return latents[i, flip][backgrounds.index(background)], tokenize("" if rng.random() < 0.1 else caption)


alphas = scheduler.alphas_cumprod


def noised(z: Tensor, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """x_t and the velocity to predict (arXiv 2202.00512)."""
    a = alphas[t].view(-1, 1, 1, 1)
    return a.sqrt() * z + (1 - a).sqrt() * noise, a.sqrt() * noise - (1 - a).sqrt() * z


# --- model, optimiser, averages
live = torch.nn.ModuleDict({"unet": unet, "text": text})
mean: Any = copy.deepcopy(live).eval()
parameters = list(live.parameters())
optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
checkpoint = args.work / "checkpoint.pt"
first = 0
seconds = 0.0
if checkpoint.exists():
    state = torch.load(checkpoint, weights_only=True)
    live.load_state_dict(state["live"])
    mean.load_state_dict(state["mean"])
    optimizer.load_state_dict(state["optimizer"])
    first, seconds = state["step"], state["seconds"]

chosen = [core[k] for k in np.random.default_rng(7).choice(len(core), 96, replace=False)]
fixed = torch.Generator().manual_seed(5)
eval_noise = torch.randn(96, 16, 8, 8, generator=fixed)
eval_time = torch.linspace(20, 999, 96).long()[torch.randperm(96, generator=fixed)]


@torch.no_grad()
def evaluate() -> dict[str, float]:
    """Loss of the averaged weights: right captions, colours never seen, and the wrong caption."""
    losses: dict[str, float] = {}
    for kind in ("white", "held_out_colour", "wrong_caption"):
        shown = chosen[1:] + chosen[:1] if kind == "wrong_caption" else chosen
        where = [emoji.held_out_colours(i)[0] if kind == "held_out_colour" else "white" for i in chosen]
        z = torch.stack([latents[i, False][backgrounds.index(b)] for i, b in zip(chosen, where, strict=True)])
        captions = [
            f"a {concepts[i]['label']}" + (f" on a {b} background" if b != "white" else "")
            for i, b in zip(shown, where, strict=True)
        ]
        x, target = noised(z, eval_time, eval_noise)
        states = mean["text"](torch.stack([tokenize(c) for c in captions])).last_hidden_state
        losses[kind] = round(F.mse_loss(mean["unet"](x, eval_time, states).sample, target).item(), 5)
    return losses


def pipeline() -> Any:
    kind: Any = StableDiffusionPipeline
    return kind(
        vae=vae, text_encoder=mean["text"], tokenizer=tokenizer, unet=mean["unet"], scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def save(step: int) -> None:
    temporary = checkpoint.with_suffix(".tmp")
    state = {"live": live.state_dict(), "mean": mean.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save({**state, "step": step, "seconds": seconds + time.time() - start}, temporary)
    temporary.replace(checkpoint)
    pipe = pipeline()
    pipe.set_progress_bar_config(disable=True)
    prompts = PROMPTS.split("|")
    rows: list[Image.Image] = []
    for seed in (0, 1):
        generator = torch.Generator().manual_seed(seed)
        rows += pipe(prompts, num_inference_steps=20, guidance_scale=4.0, generator=generator).images
    sheet = Image.new("RGB", (64 * len(prompts), 128))
    for k, image in enumerate(rows):
        sheet.paste(image, (64 * (k % len(prompts)), 64 * (k // len(prompts))))
    sheet.save(args.work / f"samples_{step:05d}.png")


start = said = saved = time.time()
losses: list[float] = []
for step in range(first, args.steps):
    left = (args.steps - step) / args.steps
    for group in optimizer.param_groups:
        group["lr"] = args.lr * min(1, (step + 1) / 200) * min(1, max(0.02, left / args.decay))
    rng = np.random.default_rng((args.seed, step))
    noise_generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
    pairs = [draw(rng) for _ in range(args.batch)]
    z = torch.stack([pair[0] for pair in pairs]).contiguous(memory_format=torch.channels_last)
    offset = torch.rand(1, generator=noise_generator)
    t = ((torch.arange(args.batch) + offset) / args.batch * 1000).long().clamp(0, 999)  # stratified
    x, target = noised(z, t, torch.randn(z.shape, generator=noise_generator))
    states = text(torch.stack([pair[1] for pair in pairs])).last_hidden_state
    loss = F.mse_loss(unet(x, t, states).sample, target)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    with torch.no_grad():
        keep = min(0.998 if left > 0.4 else 0.999, (1 + step) / (10 + step))
        average: Any = torch._foreach_lerp_
        average(list(mean.parameters()), parameters, 1 - keep)
    losses.append(loss.item())
    now = time.time()
    if step == 20 or now - said > 60 or step + 1 == args.steps:
        row = {
            "step": step + 1,
            "minutes": round((seconds + now - start) / 60, 2),
            "train": round(float(np.mean(losses)), 5),
        }
        with (args.work / "log.jsonl").open("a") as log:
            log.write(json.dumps({**row, **evaluate()}) + "\n")
        said, losses = time.time(), []
    if now - saved > 300 or step + 1 == args.steps:
        save(step + 1)
        saved = time.time()

pipeline().to(dtype=torch.float16).save_pretrained(args.pipeline, safe_serialization=True)
