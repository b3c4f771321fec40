"""Train the autoencoder of the embedded base: 64 x 64 pixels to 16 channels of 8 x 8 and back, 0.3 M parameters.

    python train_scripts/demo_base/autoencoder.py DATA --pipeline imgadapt/demo/pipeline --held twemoji

It learns from every emoji set whose licence lets the weights be shipped; `data.py --sets twemoji` draws one more, to
measure pictures of a set never seen. Each step is seeded by its number and takes 0.22 s
of one core: the default, about 11 minutes of two idle ones.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderTiny
from torch import Tensor
from torch.nn import functional as F

from imgadapt.demo import emoji

SETS = ("noto", "noto-v1", "fluent-emoji-flat", "fluent-emoji-high-contrast", "fxemoji")  # NOTICE has their licences
SHARE = 0.4  # of the pictures that are from noto alone, the look of the base
NOISE = 0.06  # added to latents, so that the decoder forgives what a diffusion model gets wrong

Picture = npt.NDArray[np.uint8]


def tensor(pictures: list[Picture]) -> Tensor:
    """RGB bytes, each (64, 64, 3), as one batch (n, 3, 64, 64) in [-1, 1]."""
    batch = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return batch.contiguous(memory_format=torch.channels_last)


def draw(rng: np.random.Generator, noto: list[Picture], every: list[Picture]) -> Picture:
    """One training picture (64, 64, 3): either way round, on white, a named or any colour, perhaps shifted."""
    source = noto if rng.random() < SHARE else every
    image = source[rng.integers(len(source))]
    if rng.random() < 0.5:
        image = image[:, ::-1]
    kind = rng.random()
    colour = emoji.BACKGROUNDS["white" if kind < 0.5 else str(rng.choice(emoji.COLOURS))]
    if kind > 0.85:
        red, green, blue = (int(value) for value in rng.integers(0, 256, 3))
        colour = (red, green, blue)
    picture = emoji.over(image, colour)
    return np.roll(picture, tuple(rng.integers(-4, 5, 2)), (0, 1)) if rng.random() < 0.3 else picture


def slopes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Differences of neighbours, along rows and along columns."""
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


def loss_of(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """How far the picture y is from x, in values and in edges, and how far the latents z are from unit size."""
    edges = sum(((a - b).abs().mean() for a, b in zip(slopes(y), slopes(x), strict=True)), torch.zeros(()))
    size = (z.abs() - 2).clamp(min=0).square().mean() + 0.01 * z.square().mean()
    return 0.5 * F.l1_loss(y, x) + 2 * F.mse_loss(y, x) + 0.25 * edges + 0.1 * size


def encode(vae: AutoencoderTiny, x: Tensor) -> Tensor:
    return vae.encode(x).latents  # pyright: ignore[reportAttributeAccessIssue]: a tuple only if asked for


def decode(vae: AutoencoderTiny, z: Tensor) -> Tensor:
    return vae.decode(z).sample  # pyright: ignore[reportAttributeAccessIssue]: a tuple only if asked for


@torch.no_grad()
def measure(vae: AutoencoderTiny, x: Tensor) -> tuple[float, float]:
    """Mean PSNR in dB of pictures (n, 3, 64, 64) after a round trip, and the spread of their latents."""
    z = encode(vae, x)
    y = decode(vae, z).clamp(-1, 1)
    error = ((x - y) / 2).square().mean((1, 2, 3))
    return -10 * error.log10().mean().item(), z.std().item()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--pipeline", type=Path, required=True, help="vae/ is written there")
    parser.add_argument("--held", nargs="*", default=[], help="sets in DATA to measure, never trained on")
    parser.add_argument("--steps", type=int, default=5500)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if seen := set(args.held) & set(SETS):
        parser.error(f"--held {' '.join(seen)}: trained on, so not held; the sets trained on are {', '.join(SETS)}")

    sets = {name: emoji.images(args.data, name) for name in (*SETS, *args.held)}
    noto = list(sets["noto"].values())
    every = [image for name in SETS for image in sets[name].values()]
    concrete = [i for i, concept in enumerate(emoji.concepts(args.data)) if concept["concrete"] and i in sets["noto"]]
    shown = {"noto": tensor([emoji.compose(sets["noto"][i]) for i in concrete[::16]])}
    shown |= {name: tensor([emoji.compose(image) for image in list(sets[name].values())[::20]]) for name in args.held}

    torch.manual_seed(args.seed)
    vae = AutoencoderTiny(
        encoder_block_out_channels=(32, 32, 32, 32), decoder_block_out_channels=(32, 32, 32, 32),
        num_encoder_blocks=(0, 1, 1, 1), num_decoder_blocks=(2, 2, 1, 0), latent_channels=16,
    )  # fmt: skip
    vae.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]: diffusers hides torch's signature
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=1e-4)
    print(f"{sum(p.numel() for p in vae.parameters()):,} parameters, {len(every)} pictures", flush=True)
    start = time.time()
    for step in range(args.steps):
        rng = np.random.default_rng((args.seed, step))
        noise = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        decay = 0.02 + 0.98 * (0.5 + 0.5 * np.cos(np.pi * step / args.steps))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, (step + 1) / 100) * decay
        x = tensor([draw(rng, noto, every) for _ in range(args.batch)])
        z = encode(vae, x)
        loss = loss_of(x, decode(vae, z + NOISE * torch.randn(z.shape, generator=noise)), z)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 250 == 0 or step + 1 == args.steps:
            psnr, _ = measure(vae, shown["noto"])
            print(f"{step + 1:5} {time.time() - start:5.0f} s  loss {loss.item():.4f}  noto {psnr:.2f} dB", flush=True)

    _, spread = measure(vae, shown["noto"])
    vae.register_to_config(scaling_factor=1 / spread)
    for name, pictures in shown.items():
        print(f"{name:28} {measure(vae, pictures)[0]:.2f} dB" + (", never seen" if name in args.held else ""))
    vae.half().save_pretrained(args.pipeline / "vae")
    return 0


if __name__ == "__main__":
    sys.exit(main())
