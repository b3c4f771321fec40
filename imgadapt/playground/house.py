"""House: a playground with all its rooms, as the page and the API have it."""

from imgadapt.playground.converting import Converter
from imgadapt.playground.grids.analyser import Analyser
from imgadapt.playground.grids.grids import Grids
from imgadapt.playground.inspecting import Inspector
from imgadapt.playground.merges.lab import Lab
from imgadapt.playground.session import Playground
from imgadapt.playground.settings import Settings
from imgadapt.playground.trainings.runs import Runs


class House:
    """See the module; each room works through the playground's desk."""

    def __init__(self, settings: Settings) -> None:
        self.playground = Playground(settings)
        self.grids, self.lab, self.runs = Grids(self.playground), Lab(self.playground), Runs(self.playground)
        self.inspector, self.converter = Inspector(self.playground), Converter(self.playground)
        self.analyser = Analyser(self.playground)

    def close(self) -> None:
        """Stop what runs; trainings save their state first."""
        self.runs.close()
        self.playground.close()
