"""Playground: the library, the bases, the album, the studio and the desk, and what is done with them."""

from typing import Any

from imgadapt.errors import ConfigError
from imgadapt.playground.desk import Desk, Ticket
from imgadapt.playground.drawing import beginnings
from imgadapt.playground.drawing.studio import Studio
from imgadapt.playground.library.bases import Base, Bases
from imgadapt.playground.library.library import Library
from imgadapt.playground.pictures import record
from imgadapt.playground.pictures.album import Album, Picture
from imgadapt.playground.requests import GenerateRequest
from imgadapt.playground.settings import Settings


class Playground:
    """One playground. Its methods may be called from any thread; heavy work goes through `desk`, and `studio` is used
    by that thread alone.
    """

    def __init__(self, settings: Settings) -> None:
        limits = settings.limits
        self.settings = settings
        self.library, self.bases = Library(settings), Bases(settings)
        self.album = Album(
            settings.folder("outputs"),
            settings.folder("uploads"),
            most_bytes=limits.upload,
            most_pixels=limits.upload_pixels,
        )
        self.studio = Studio(settings, self.library, self.album)
        self.desk = Desk(limits.waiting, limits.per_owner)
        self._asked: str | None = None  # the base that was asked for last

    def generate(self, request: GenerateRequest, *, owner: str = "") -> Ticket[list[Picture]]:
        """Draw, each picture handed over as it is ready.

        Raises:
            ConfigError: it asks for too much, or for what is not there. Busy: the queue is full.
        """
        self.check(request, owner)
        request = self.on_base(request)

        def work(ticket: Ticket[list[Picture]]) -> list[Picture]:
            return self.drawn(ticket, request)

        return self.desk.submit(work, owner=owner)

    def drawn(self, ticket: Ticket[Any], request: GenerateRequest) -> list[Picture]:
        """The pictures of a request; for work that has the desk's thread already."""
        self.use_base(ticket, request.base)
        settled = self.studio.settle(request)
        several = [settled.model_copy(update={"seed": settled.seed + k, "count": 1}) for k in range(settled.count)]
        together = self.together(settled)
        made: list[Picture] = []
        steps = beginnings.steps_of(settled)
        total = steps * -(-len(several) // together)
        for first in range(0, len(several), together):
            before = steps * (first // together)
            for one in self.studio.draw(
                several[first : first + together],
                lambda done, _, preview, before=before: ticket.progress("drawing", before + done, total, preview),
            ):
                made.append(self.kept(one, owner=ticket.owner))
                ticket.made(made[-1])
        return made

    def together(self, settled: GenerateRequest) -> int:
        """How many pictures of a settled request are drawn as one batch."""
        assert settled.width is not None
        assert settled.height is not None
        return max(1, self.settings.limits.drawn_together // (settled.width * settled.height))

    def kept(self, one: Any, *, owner: str, **more: Any) -> Picture:
        """A drawn picture in the album, with its record."""
        base = self.studio.base
        assert base is not None
        about = record.about(base, self.settings)
        said = record.of(one.request, self.library, about, one.seconds, one.notes, self.album)
        return self.album.keep(one.image, {**said, **more}, owner=owner)

    def on_base(self, request: GenerateRequest) -> GenerateRequest:
        """The request with its base in it: one that names none means the one that was asked for last when it came, not
        whichever is loaded when its turn comes.
        """
        id = request.base or self._asked or (self.studio.base or self.bases.first).id
        self._asked = id
        return request.model_copy(update={"base": id})

    def use_base(self, ticket: Ticket[Any], id: str | None) -> Base:
        """Load a base, or the first one where none is loaded yet and none is asked for."""
        wanted = self.bases.get(id) if id is not None else self.studio.base or self.bases.first
        if self.studio.base != wanted:
            ticket.progress(f"loading {wanted.name}", 0, 1)
            try:
                self.studio.load(wanted)
            except BaseException:
                self._asked = None
                raise
        return wanted

    def check(self, request: GenerateRequest, owner: str = "") -> None:
        """Raises ConfigError where a request asks for more than the limits allow, or for what is not there; as far as
        that can be told without the base.
        """
        limits = self.settings.limits
        width, height = request.width or request.height or 8, request.height or request.width or 8
        if width * height > limits.pixels:
            raise ConfigError(f"{width} x {height} pixels are too many; {limits.pixels:,} are allowed")
        count = max(request.count, request.layout.rows if request.layout else 1)
        if width * height * request.steps * count > limits.work:
            raise ConfigError(f"{count} x {width} x {height} pixels in {request.steps} steps are too much at once")
        for use in request.adapters:
            if fault := self.library.get(use.adapter).fault:
                raise ConfigError(f"{self.library.get(use.adapter).name} cannot be used: {fault}")
        for given in (request.init, request.mask):
            if given is not None:
                self.album.get(given, self.whose(owner))
        if request.base is not None:
            self.bases.get(request.base)

    def whose(self, owner: str) -> str | None:
        """Whose pictures this owner sees: their own in a shared playground, else all (None)."""
        return owner if self.settings.shared else None

    def restore(self, data: bytes, *, owner: str = "") -> record.Restored:
        """What a picture's file says of how it was made, as a request here.

        Raises:
            DataError: see record.restore.
        """
        return record.restore(
            data, self.library, self.bases, settings=self.settings, album=self.album, owner=self.whose(owner)
        )

    def switch(self, id: str, *, owner: str = "") -> Ticket[Base]:
        """Load a base."""
        self.bases.get(id)
        ticket = self.desk.submit(lambda ticket: self.use_base(ticket, id), owner=owner)
        self._asked = id
        return ticket

    def close(self) -> None:
        self.desk.close()
