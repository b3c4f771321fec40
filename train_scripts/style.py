"""Train a style, or whatever else a folder of pictures with captions has in common.

    imgadapt style ./pictures --base demo --steps 250 --output ./out

Beside each picture lies its caption (`fox.png`, `fox.txt`). Writes OUTPUT/adapter.safetensors, the same in kohya's
format, report.html, log.jsonl, checkpoints/, snapshots/ and samples/. Run again, it goes on from the newest whole
checkpoint, to the same bytes as if it had never stopped. Ctrl-C saves first.

Meant to be read and copied: change the loss below and run the copy with python.
"""

import sys
from collections.abc import Sequence

from imgadapt.cli import program
from imgadapt.training import flags
from imgadapt.training.config import TrainConfig
from imgadapt.training.job import Job
from imgadapt.training.loop import Terms


def main(argv: Sequence[str]) -> None:
    config = flags.from_arguments(flags.parser(__doc__ or "", TrainConfig).parse_args(argv), TrainConfig)

    # The pictures, each opened before anything slow is done; the base, frozen; a fresh adapter on it; latents and text
    # states, computed once and kept by content.
    job = Job(config)
    family, objective, material = job.family, job.objective, job.material

    # All that is random is a function of seed, step and place in the batch, so a resumed run is the same run, and a
    # batch may be computed in pieces or by several processes.
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

    # The files, proved: read back and attached to the bare base, they must act as what was trained.
    job.finish(run)


if __name__ == "__main__":
    program(main, sys.argv[1:])
