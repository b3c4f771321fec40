"""Evidence: what is looked at while a run goes on: held-out loss, snapshots of the adapter, samples."""

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from imgadapt import live
from imgadapt.atomic import write_bytes
from imgadapt.file import AdapterFile, save
from imgadapt.training import pictures
from imgadapt.training.config import TrainConfig
from imgadapt.training.evaluate import bootstrap, held_out_losses
from imgadapt.training.families import DTYPES, Family
from imgadapt.training.log import Lines, read_lines
from imgadapt.training.material import Material
from imgadapt.training.objective import Objective
from imgadapt.training.results import formats


class Evidence:
    """Looks at a run: `evaluations.jsonl`, `snapshots/`, `samples/`; the prompts are read anew from `prompts.txt`.

    held_out: pictures never trained on, or None; the loss on training pictures is followed in any case, on fixed noise.
    collect: what is trained, as it is now. spelled: a prompt as the pipeline takes it. writes: whether this process
        writes; others only compute along.
    """

    def __init__(
        self,
        config: TrainConfig,
        family: Family,
        objective: Objective,
        seen: Material,
        held_out: Material | None,
        *,
        collect: Callable[[], AdapterFile],
        spelled: Callable[[str], str] = str,
        writes: bool = True,
    ) -> None:
        self.config, self.family, self.objective = config, family, objective
        self.collect, self.spelled, self.writes = collect, spelled, writes
        self.materials = {"seen": seen, **({"held_out": held_out} if held_out else {})}
        self.snapshots, self.samples = config.output / "snapshots", config.output / "samples"
        self.prompts = config.output / "prompts.txt"
        with live.disabled(family.pipeline):
            self.base = {k: held_out_losses(family, objective, m) for k, m in self.materials.items()}
        self.last: dict[str, Tensor] = {}

    def begin(self, first: int) -> None:
        """Go on after `first` steps."""
        if not self.writes:
            return
        self._lines = Lines(self.config.output / "evaluations.jsonl", first + 1)
        if self.config.sample_prompts and not (first and self.prompts.exists()):
            write_bytes(self.prompts, "".join(f"{p}\n" for p in self.config.sample_prompts).encode())

    def due(self, done: int) -> bool:
        """Whether to look after so many steps."""
        return self._measured(done) or self._drawn(done)

    def _measured(self, done: int) -> bool:
        every = self.config.evaluate_every or max(50, self.config.steps // 5)
        return done % every == 0 or done == self.config.steps

    def _drawn(self, done: int) -> bool:
        return done == self.config.steps or bool(self.config.sample_every and done % self.config.sample_every == 0)

    def look(self, done: int) -> None:
        """Measure, keep a snapshot, and draw, as far as it is due after so many steps."""
        if self._measured(done):
            self.measure()
            if self.writes:
                self._keep(done)
        if self._drawn(done) and (prompts := self.wanted()):
            made = pictures.samples(self.family, prompts, side=self.side)
            if self.writes:
                write_bytes(self.samples / f"step-{done:07d}.png", pictures.png(made))

    def measure(self) -> None:
        """The losses of the model as it is now, into `last`."""
        self.last = {k: held_out_losses(self.family, self.objective, m) for k, m in self.materials.items()}

    def _keep(self, done: int) -> None:
        figures: dict[str, float] = {}
        for name, losses in self.last.items():
            mean, low, high = bootstrap(losses, self.base[name])
            figures |= {name: losses.mean().item(), f"{name}_base": self.base[name].mean().item()}
            figures |= {f"{name}_gain": mean, f"{name}_gain_low": low, f"{name}_gain_high": high}
        made = self.collect()
        both = bool((made.parts or made.prompts) and made.embeddings)  # diffusers has no place for it
        form = formats(made)[0] if both else None
        save(made, self._snapshot(done), format=form, dtype=DTYPES[self.config.save_precision])
        self._lines.write({"step": done, **{k: round(v, 6) for k, v in figures.items()}})
        self._lines.sync()

    @property
    def side(self) -> int:
        """Pixels of a side of samples."""
        return max(self.config.resolution or [self.family.native])

    def _snapshot(self, step: int) -> Path:
        return self.snapshots / f"step-{step:07d}.safetensors"

    def wanted(self) -> Sequence[str]:
        """The prompts of the file, as it is now, spelled for the pipeline."""
        if not self.prompts.exists():
            return []
        text = self.prompts.read_text("utf-8-sig", "replace")  # whatever editor saved it: no reason to end a run
        return [self.spelled(line.strip()) for line in text.splitlines() if line.strip()]

    def finish(self) -> tuple[int, float] | None:
        """Copy the snapshot of the least held-out loss to `best.safetensors`; returns its step and loss."""
        rows = [(row["held_out"], row["step"]) for row in read_lines(self._lines.path) if "held_out" in row]
        rows = [(loss, step) for loss, step in rows if self._snapshot(step).exists()]
        if not rows:
            return None
        loss, step = min(rows)
        write_bytes(self.config.output / "best.safetensors", self._snapshot(step).read_bytes())
        return step, loss
