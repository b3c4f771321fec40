"""Job: all that a training program needs around its loss, from settings to proved files."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from imgadapt import live
from imgadapt.arch import architectures
from imgadapt.errors import ConfigError, DataError, first_few
from imgadapt.file import AdapterFile
from imgadapt.formats import architecture_of
from imgadapt.shortage import out_of_memory
from imgadapt.training import families, log, objective, optimizers, probe, recipe, results, rules
from imgadapt.training.config import TrainConfig
from imgadapt.training.data import digest, fingerprint, scan
from imgadapt.training.evaluate import describe
from imgadapt.training.evidence import Evidence
from imgadapt.training.families import DTYPES
from imgadapt.training.loop import Run
from imgadapt.training.material import Material, kept_out
from imgadapt.training.metadata import metadata
from imgadapt.training.processes import Processes
from imgadapt.training.report import page
from imgadapt.training.starts import beginning
from imgadapt.training.swap import Swap
from imgadapt.training.words import NewWord

_FOLLOWED = 8  # training pictures whose loss is measured beside that of the held-out ones


class Job:
    """A training that is ready to run: pictures, base, adapter, optimiser, caches, objective.

    word: makes a new word for the family, which is trained, too; adapter: whether there is one beside it.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        word: Callable[[families.Family], NewWord] | None = None,
        adapter: bool = True,
    ) -> None:
        log.check(config)
        self.config, self.processes = config, Processes()
        examples, held_out = pictures(config)
        self.examples = examples
        self.lock = self.processes.hold(config.output)
        if not self.lock.held:
            self.say(f"{config.output}: there are no locks here; see to it that no other training writes into it")
        originals: dict[str, torch.Tensor] = {}
        self.family = families.load(
            config.base, device=self.processes.device, dtype=DTYPES[config.precision], quantise=config.quantise,
            originals=originals if config.start == "loftq" else None,
        )  # fmt: skip
        identity = self.family.identity()
        self.objective = objective.of(
            config, self.family.schedule, self._usual(), lambda height, width: self.family.sampling(height, width).shift
        )
        self.family.follow(self.objective.schedule)
        torch.manual_seed(config.seed)
        self.word, self.adapter = word(self.family) if word else None, adapter
        self.rule = rules.Rules()  # until the run begins
        if adapter:
            recipe.put_on(config, self.family.pipeline)
            results.check(live.collect(self.family.pipeline), config.formats, config.exports)
        if self.word:
            examples, held_out = self.word.put_into(examples), self.word.put_into(held_out)
        self.trained, self.optimizer = self._learnt()
        self.live_text = any(row.layer.startswith("text_encoder") for row in self.trained)
        if config.checkpointing:
            self.checkpoint_activations()

        self.material = self.of(examples)
        self.say(self._described())
        self.prepare(self.material)
        followed, fresh = self.of(examples[:_FOLLOWED], fixed=True), self.of(held_out, fixed=True) if held_out else None
        for some in (followed, fresh):
            if some is not None:
                self.prepare(some)
        self.family.away(text=not self.live_text)
        self.origin = {**identity, "data": fingerprint(examples), "order": self.material.order.fingerprint}
        if config.start and adapter:
            self._begin(originals)
        originals.clear()
        if config.swap_blocks:
            self._swap()
        if config.shard:
            self.processes.shard(self.family.denoiser, [row.parameter for row in self.trained])
        if config.compile:
            self.family.denoiser.compile()
        spelled = self.word.spelled if self.word else str
        self._drop_out(False)
        self.evidence = Evidence(
            config, self.family, self.objective, followed, fresh, collect=self.collected, spelled=spelled,
            writes=self.processes.main,
        )  # fmt: skip
        self.origin["layers"] = digest([f"{row} {tuple(row.parameter.shape)}" for row in self.trained])

    def _learnt(self) -> tuple[list[recipe.Tensor], torch.optim.Optimizer]:
        """What is trained, and its optimiser."""
        rows = recipe.tensors(self.family.pipeline) if self.adapter else []
        groups = recipe.groups(self.config, rows) if self.adapter else []
        if self.word:
            rows, groups = [*rows, *self.word.rows()], [*groups, *self.word.groups()]
        optimizer = optimizers.build(self.config, groups)
        if self.word:
            self.word.follow(optimizer)
        return rows, optimizer

    def _begin(self, originals: Mapping[str, torch.Tensor]) -> None:
        """Start where the settings say."""
        said, self.origin["begun"] = beginning.begin(
            self.config, self.family, self.objective, self.material, self.processes,
            origin=self.origin, originals=originals,
        )  # fmt: skip
        self.say(said)
        self.trained, self.optimizer = self._learnt()

    def collected(self) -> AdapterFile:
        """What is trained, as it is now: the adapter, the word, or both."""
        own = self.rule.file(live.collect(self.family.pipeline)) if self.adapter else AdapterFile({})
        return AdapterFile(own.parts, prompts=own.prompts, embeddings=self.word.embeddings() if self.word else {})

    def of(self, examples: Sequence[Any], *, fixed: bool = False) -> Material:
        """Examples as the base takes them."""
        return Material(self.config, self.family, examples, live=self.live_text, fixed=fixed)

    def prepare(self, material: Material) -> None:
        """Fill the cache; one process computes, the others then read."""
        if self.processes.main:
            material.prepare()
        self.processes.wait()
        if not self.processes.main:
            material.prepare(quiet=True)

    def _swap(self) -> None:
        config = self.config
        if config.quantise or config.compile or config.shard:
            raise ConfigError("swap_blocks goes with neither quantise nor compile nor shard; choose one of them")
        swap = Swap(self.family.denoiser, config.swap_blocks, self.family.device)
        self.say(f"{config.swap_blocks} blocks ({swap.bytes / 2**20:.0f} MB) wait in RAM while they do not compute")

    def _usual(self) -> objective.Sampling:
        side = max(self.config.resolution or [self.family.native]) // self.family.latent_shape[1]
        return self.family.sampling(side, side)

    def checkpoint_activations(self) -> str | None:
        """Compute activations twice from now on; None where they are already."""
        denoiser: Any = self.family.denoiser
        if getattr(denoiser, "is_gradient_checkpointing", False):
            return None
        denoiser.enable_gradient_checkpointing()
        denoiser.train()  # diffusers does it in training only; no layer of these models has dropout of its own
        return "activations are computed twice from now on (gradient checkpointing), with the same result"

    def _described(self) -> str:
        config, numbers = self.config, sum(row.parameter.numel() for row in self.trained)
        sizes = sorted({view.size for view in self.material.views})
        shapes = " and ".join(f"{w} x {h}" for w, h in sizes[:3]) + (
            f" and {len(sizes) - 3} more" if len(sizes) > 3 else ""
        )
        return (
            f"{len(self.examples)} pictures at {shapes}, {config.steps} steps of {config.batch_size} "
            f"on {self.family.device}\n"
            f"{config.method if self.adapter else 'words'}: {numbers:,} numbers in {len(self.trained)} tensors of "
            f"{len({row.layer for row in self.trained})} layers, {config.optimizer}"
            + (f"\n{self.word}" if self.word else "")
            + "".join(f"\n{note}" for note in self._notes())
        )

    def _notes(self) -> Iterator[str]:
        """What is done with pictures that one may not expect."""
        if large := [view.enlarged for view in self.material.views if view.enlarged > 1]:
            yield f"{len(large)} pictures are enlarged, up to {max(large):.2f} times; a lower --resolution avoids that"
        masked = sum(example.mask is not None for example in self.examples)
        if masked and self.config.mask == "none":
            yield f"the masks of {masked} pictures are not used; --mask file does"

    def say(self, text: str) -> None:
        """Print, in one process."""
        if self.processes.main:
            print(text, flush=True)

    def run(self) -> Run:
        """The steps, from where an earlier run stopped.

        Raises:
            TrainingError: the output folder holds another run.
        """
        if self.adapter:
            self.rule = rules.of(self.config, self.family.pipeline)
        made = Run(
            self.config, self.trained, self.optimizer, self.config.identity(self.origin), self.processes,
            self.checkpoint_activations, self.rule,
        )  # fmt: skip
        if made.first:
            self.say(f"going on after step {made.first}")
        self.evidence.begin(made.first)
        self._drop_out(True)
        return made

    def _drop_out(self, on: bool) -> None:
        """Leave out in steps what the settings say, and nothing when the model is looked at: adapters are in the mode
        of the base, which is not that of training, or with checkpointing always is."""
        for _, _, slot in live.slots(self.family.pipeline) if self.adapter else ():
            slot.training = on and bool(slot.dropout)

    def look(self, run: Run, done: int) -> None:
        """Evaluate and draw after so many steps, where it is due."""
        if not self.evidence.due(done):
            return
        if self.processes.main or self.config.shard:
            self._drop_out(False)
            with run.averaged():
                self._look(done)
            self._drop_out(True)
        self.processes.wait()

    def _look(self, done: int) -> None:
        try:
            self.evidence.look(done)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:  # pyright: ignore[reportPrivateImportUsage]
            if not out_of_memory(error) or self.config.shard:
                raise
            self.say(f"imgadapt: out of memory in the evaluation after step {done}: it is left out ({str(error)[:80]})")

    def finish(self, run: Run) -> None:
        """Write what was trained, prove the files, and say what was learnt.

        Raises:
            TrainingError: a file, read back, acts otherwise than what was trained.
        """
        with self.lock:
            if self.processes.main or self.config.shard:
                self._finish(run)

    def _finish(self, run: Run) -> None:
        config, main = self.config, self.processes.main
        self._drop_out(False)
        with run.averaged():
            if not self.evidence.last:  # the run was over already
                self.evidence.measure()
            file = self.collected()
            taken = probe.take(self.family, self.objective.schedule, next(iter(self.evidence.materials.values())))
        architecture = architecture_of(file.parts, architectures()) if file.parts else None
        told = metadata(
            config, config.identity(self.origin), self.material, architecture.name if architecture else None
        )
        file = replace(file, metadata=told, architecture=architecture.name if architecture else None)
        gone = results.emptied(file, config.exports)
        exports = {name: glob for name, glob in config.exports.items() if name not in gone}
        paths: list[Path] = []
        if main:
            probe.save(taken, config.output / "probe.safetensors")
            paths = results.write(file, config.output, config.formats, exports, DTYPES[config.save_precision])
        if config.shard:
            paths = self.processes.told(paths)
        if self.word:
            self.word.take_off()
        worst = results.prove(self.family, paths, taken, file.embeddings, DTYPES[config.save_precision])
        if not main:
            return
        if gone:
            self.say(f"exports: the layers of {first_few(gone)} have no ranks left, and no file")
        for line in self.rule.said():
            self.say(line)
        for path in paths:
            self.say(f"{path}: {path.stat().st_size / 1e6:.2f} MB")
        self.say(f"read back, predictions differ by {worst:.1e} from the live model's")
        for name, losses in self.evidence.last.items():
            base = "the base's, where the word is as it began" if self.word else "the base's"
            said = describe("adapted", losses, [(base, self.evidence.base[name])])
            self.say(f"{'held-out loss' if name == 'held_out' else 'loss on training pictures'}: {said}")
        if best := self.evidence.finish():
            self.say(
                f"{config.output / 'best.safetensors'}: the snapshot of step {best[0]}, held-out loss {best[1]:.4f}"
            )
        if config.report and config.shard:
            self.say("no report: its pictures would have to be drawn by all processes, which --shard does not do yet")
        elif config.report:
            outcome = page.Outcome(paths, self.material, worst, run.pieces)
            self.say(f"{page.write(config, self.family, self.evidence, outcome)}: how it went")


def pictures(config: TrainConfig) -> tuple[list[Any], list[Any]]:
    """(to train on, held out) of a config's folders.

    Raises:
        DataError: see `scan`; or a picture is both trained and held out.
        ConfigError: both ways to hold out are given.
    """
    examples = scan(config.folder, config.caption, config.trigger)
    if config.held_out and config.held_out_count:
        raise ConfigError("held_out and held_out_count are two ways to hold pictures out; choose one")
    _check_masks(config, examples)
    if config.held_out_count:
        return kept_out(examples, config.held_out_count)
    if not config.held_out:
        return examples, []
    held_out = scan(config.held_out, config.caption, config.trigger)
    trained = {example.digest for example in examples}
    if both := [example.path.name for example in held_out if example.digest in trained]:
        raise DataError(
            f"{config.held_out}: {len(both)} of its pictures are among those of {config.folder}, too "
            f"({first_few(both)}); held-out ones must never be trained on: remove them from one of the two"
        )
    return examples, held_out


def _check_masks(config: TrainConfig, examples: Sequence[Any]) -> None:
    if config.mask == "alpha" and not any(example.alpha for example in examples):
        raise ConfigError(f"mask is alpha, and no picture in {config.folder} has transparent pixels; leave it out")
    if config.mask == "file" and not any(example.mask for example in examples):
        raise ConfigError(
            f"mask is file, and no picture in {config.folder} has one: fox-mask.png beside fox.png, white is trained"
        )
