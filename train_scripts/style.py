"""Train a LoRA on a folder of pictures: a style, from one command.

    imgadapt train ./pictures --base demo --steps 250 --output ./out

Beside each picture lies its caption (`fox.png`, `fox.txt`). Writes OUTPUT/adapter.safetensors (diffusers keys; see
`imgadapt convert` for others), log.jsonl, checkpoints/ and samples/. Run again, it goes on from the newest whole
checkpoint, to the same bytes as if it had never stopped. Ctrl-C saves first.

Meant to be read and copied: change the loss, the noise or the method below and run the copy with python.
"""

import json
import sys
from collections.abc import Sequence

import torch
from accelerate import Accelerator

from imgadapt import AdapterFile, LoRA, __version__, attach, collect, detach, disabled, load, parameters, save
from imgadapt.cli import program
from imgadapt.errors import ConfigError, TrainingError, first_few
from imgadapt.training import config as settings
from imgadapt.training import families, noise, pictures, probe
from imgadapt.training.data import digest, fingerprint, scan
from imgadapt.training.encode import Encoder
from imgadapt.training.evaluate import describe, held_out_losses
from imgadapt.training.loop import Run


def main(argv: Sequence[str]) -> None:
    config = settings.from_arguments(settings.parser(__doc__ or "").parse_args(argv))

    # 1. The pictures, each opened before anything slow is done.
    examples = scan(config.folder, config.caption)
    held_out = scan(config.held_out, config.caption) if config.held_out else []

    # 2. The base, frozen.
    accelerator = Accelerator()
    if accelerator.num_processes * accelerator.gradient_accumulation_steps > 1 or accelerator.mixed_precision != "no":
        raise ConfigError("accelerate's environment asks for what this program does not do; start it without `launch`")
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    family = families.load(config.base, device=accelerator.device, dtype=dtype)
    size = family.side(config.resolution)
    print(
        f"{len(examples)} pictures at {size} x {size}, {config.steps} steps of {config.batch_size} on {family.device}"
    )

    # 3. Latents and text states: computed once, kept by content.
    encoder = Encoder(family, size, config.output / "cache")
    mirrored = (False, True) if config.flip else (False,)
    latents = [[encoder.latent(example, flip) for flip in mirrored] for example in examples]
    captions = [encoder.states(example.caption) for example in examples]
    nothing = encoder.states("")

    # 4. The adapter.
    torch.manual_seed(config.seed)
    attach(family.pipeline, LoRA(config.rank, config.alpha, config.rank_stabilised), targets=config.targets)
    layers = collect(family.pipeline).parts
    if frozen := [name for name in layers if name.startswith("text_encoder")]:
        raise ConfigError(f"text states are cached, so {first_few(frozen)} cannot be trained yet; leave out 'text'")
    trainable = parameters(family.pipeline)
    optimizer = torch.optim.AdamW(trainable, lr=config.learning_rate, weight_decay=config.weight_decay)
    print(f"LoRA of rank {config.rank}: {sum(p.numel() for p in trainable):,} parameters in {len(trainable)} tensors")

    # 5. The steps. All that is random is a function of seed, step and place, so a resumed run is the same run.
    origin = {**encoder.identity, "data": fingerprint(examples), "size": str(size), "layers": digest(list(layers))}
    seed, batch = config.seed, config.batch_size
    with Run(config, trainable, optimizer, config.identity(origin)) as run:
        for step in run.steps():
            chosen = noise.order(seed, len(examples), step, batch)
            mirror = (noise.uniform(seed, step, batch, "flip") * len(mirrored)).long().tolist()
            silent = (noise.uniform(seed, step, batch, "caption") < config.caption_dropout).tolist()
            z = torch.stack([latents[i][m] for i, m in zip(chosen, mirror, strict=True)])
            c = torch.stack([nothing if s else captions[i] for i, s in zip(chosen, silent, strict=True)])
            t = noise.timesteps(seed, step, batch, family.timesteps)
            losses = family.losses(z, c, noise.gaussian(seed, step, z.shape), t, config.min_snr_gamma)
            run.record(step, losses, t, [examples[i].path.name for i in chosen])
            accelerator.backward(losses.mean())
            accelerator.clip_grad_norm_(trainable, config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            if config.sample_prompts and config.sample_every and (step + 1) % config.sample_every == 0:
                pictures.samples(family, config.sample_prompts, config.output / "samples" / f"step-{step + 1:07d}.png")

    # 6. The file, proved: read back and attached anew, it must act as what was trained.
    live = probe.take(family, torch.stack([row[0] for row in latents[:4]]), torch.stack(captions[:4]))
    probe.save(live, config.output / "probe.safetensors")
    metadata = {"imgadapt": __version__, "imgadapt_settings": json.dumps(config.identity(origin), sort_keys=True)}
    trained = AdapterFile(collect(family.pipeline).parts, metadata)
    path = save(trained, config.output / "adapter.safetensors")
    detach(family.pipeline)
    attach(family.pipeline, load(path))
    if not (error := probe.error(family, live)) <= 1e-5:
        raise TrainingError(
            f"{path}, read back, acts otherwise than what was trained: predictions differ by {error:.2e}"
        )
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB; read back, predictions differ by {error:.1e}")

    # 7. What it learnt.
    if held_out:
        z, c = encoder.both(held_out)
        with disabled(family.pipeline):
            base = held_out_losses(family, z, c)
        print("held-out loss:", describe("adapted", held_out_losses(family, z, c), [("base", base)]))
    if config.sample_prompts:
        pictures.samples(family, config.sample_prompts, config.output / "samples" / "last.png")


if __name__ == "__main__":
    program(main, sys.argv[1:])
