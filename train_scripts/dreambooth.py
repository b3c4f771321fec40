"""Train a subject, a character or a thing, from a few pictures of it, and keep the rest of its class as it was.

    imgadapt dreambooth ./photos --base sdxl --trigger ohwx --class-prompt "a man" --output ./out

With `--preservation class-free` (the default) the base's own answers to the class's words are kept, on the same noised
pictures: no class pictures are needed. `classic` is DreamBooth's (arXiv 2208.12242): pictures of the class, drawn by
the base where --class-folder has too few, are trained beside the subject's. `none` does without.

Pictures without a caption file are "TRIGGER CLASS" (`ohwx man`). Files, resuming and the rest are as in
`imgadapt style`.
Meant to be read and copied: change the loss below and run the copy with python.
"""

import sys
from collections.abc import Sequence

import torch
from torch.nn import functional as F

from imgadapt.cli import program
from imgadapt.live import disabled
from imgadapt.training import flags, noise, subject
from imgadapt.training.config import DreamBoothConfig
from imgadapt.training.job import Job
from imgadapt.training.loop import Terms


def main(argv: Sequence[str]) -> None:
    given = flags.from_arguments(flags.parser(__doc__ or "", DreamBoothConfig).parse_args(argv), DreamBoothConfig)
    config = subject.with_caption(given)

    # The pictures; the base, frozen; a fresh adapter on it; latents and text states, computed once and kept by content.
    job = Job(config)
    family, objective, material = job.family, job.objective, job.material
    if free := config.preservation == "class-free":
        subject.class_words(config, job)
    others = subject.class_pictures(config, job) if config.preservation == "classic" else None

    # All that is random is a function of seed, step and place in the batch, so a resumed run is the same run, and a
    # batch may be computed in pieces or by several processes.
    def loss(step: int, places: range) -> Terms:
        batch = material.batch(step, places)
        asked = objective.ask(batch.latents, config.seed, step, places, config.batch_size)
        guess = family.predict(asked.noisy, batch.conditions, asked.times)
        losses = objective.losses(guess, batch.latents, asked.noise, asked.times, batch.mask)
        total, further = losses.weighted, {"subject": losses.raw}

        if others is not None:  # pictures of the class, as many, each with a time and noise of its own
            also = others.batch(step, places)
            other = objective.ask(also.latents, config.seed + 1, step, places, config.batch_size)
            answer = family.predict(other.noisy, also.conditions, other.times)
            kept = objective.losses(answer, also.latents, other.noise, other.times, also.mask)
            total, further = total + config.preservation_weight * kept.weighted, {**further, "class": kept.raw}

        if free and noise.chance(config.seed, step, "preserve") < config.preservation_share:
            texts = [subject.without(caption, config) for caption in batch.captions]
            with torch.no_grad(), disabled(family.pipeline):
                conditions = {**batch.conditions, **material.conditions(texts)}
                wanted = family.predict(asked.noisy, conditions, asked.times)
            conditions = {**batch.conditions, **material.conditions(texts)}  # through trained text encoders
            answer = family.predict(asked.noisy, conditions, asked.times)
            drift = F.mse_loss(answer, wanted, reduction="none").mean((1, 2, 3))
            total, further = total + config.preservation_weight * drift, {**further, "drift": drift.detach()}
        return Terms(total, losses.raw, asked.times, batch.names, further)

    with job.run() as run:
        for step in run.steps():
            run.learn(step, loss)
            job.look(run, step + 1)

    # The files, proved: read back and attached to the bare base, they must act as what was trained.
    job.finish(run)


if __name__ == "__main__":
    program(main, sys.argv[1:])
