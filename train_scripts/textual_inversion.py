"""Train a new word for what a folder of pictures has in common, or a word and an adapter together (pivotal tuning).

    imgadapt textual_inversion ./pictures --word "<ohwx>" --initial dog --base sd1 --steps 1000 --output ./out

The base stays as it is: only the word's vectors are trained, a few KB. The word is put before captions that do
not have it; a picture without caption is "a photo of <ohwx>". With --adapter an adapter is trained beside it, the word
in the first half of the steps only (--pivot), and OUTPUT/adapter.safetensors holds both. A1111 and ComfyUI call a word
by the name of its file, diffusers by its own. Run again, it goes on from the newest whole checkpoint.

Meant to be read and copied: change the loss below and run the copy with python.
"""

import sys
from collections.abc import Sequence

from imgadapt.cli import program
from imgadapt.training import flags, words
from imgadapt.training.config import InversionConfig
from imgadapt.training.job import Job
from imgadapt.training.loop import Terms


def main(argv: Sequence[str]) -> None:
    given = flags.from_arguments(flags.parser(__doc__ or "", InversionConfig).parse_args(argv), InversionConfig)
    config = words.settled(given)  # the word is the trigger, which captions without it begin with

    # As for a style (style.py), and the word: its vectors in every CLIP text encoder start as those of --initial,
    # and are trained at a rate of their own; with an adapter, until the pivot.
    job = Job(config, word=lambda family: words.NewWord(config, family), adapter=config.adapter)
    family, objective, material = job.family, job.objective, job.material
    assert job.word

    # Captions are encoded in every step, since what they come to changes with the word.
    def loss(step: int, places: range) -> Terms:
        batch = material.batch(step, places)
        asked = objective.ask(batch.latents, config.seed, step, places, config.batch_size)
        guess = family.predict(asked.noisy, batch.conditions, asked.times)
        losses = objective.losses(guess, batch.latents, asked.noise, asked.times, batch.mask)
        return Terms(losses.weighted, losses.raw, asked.times, batch.names)

    with job.run() as run:
        for step in run.steps():
            run.learn(step, loss)
            job.look(run, step + 1)

    for encoder, ratio in job.word.ratios().items():
        job.say(f"{encoder}: the word's vectors have {ratio:.2f} times the spread of the vocabulary's")

    # The files, proved: read back and attached to the bare base, they must act as what was trained.
    job.finish(run)


if __name__ == "__main__":
    program(main, sys.argv[1:])
