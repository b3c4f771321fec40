"""Adapters as HTML: cards, and all about one; metadata comes from anyone, so all of it is escaped."""

from collections.abc import Mapping, Sequence

from imgadapt.playground.inspecting import Details, Match
from imgadapt.playground.library.library import Card
from imgadapt_ui.parts import empty, link, text
from imgadapt_ui.stack import called, kinds

MOST = 500
"""Cards that are shown at once."""
_LONG = 4000
"""Characters of one entry of metadata that are shown."""


def cards(found: Sequence[Card], searched: bool, chosen: str = "") -> str:
    """The library, or what to do where nothing is in it."""
    if not found and searched:
        return empty("No adapter has all of these words", "Search for less, or look in all folders and families.")
    if not found:
        return empty("No adapters yet", "Put .safetensors files into the adapters folder, then press Rescan.")
    rows = "".join(_card(card, card.id == chosen) for card in found[:MOST])
    more = len(found) - MOST
    rest = f'<p class="ia-dim">{more} more; narrow the search to see them</p>' if more > 0 else ""
    count = f'<p class="ia-dim" role="status">{len(found)} adapter{"s" if len(found) != 1 else ""}</p>'
    return f'{count}<div class="ia-cards">{rows}</div>{rest}'


def _card(card: Card, pressed: bool) -> str:
    picture = (
        f'<img src="/cards/{text(card.id)}/preview" alt="" loading="lazy" decoding="async">'
        if card.preview is not None
        else f'<span class="ia-initial" aria-hidden="true">{text(card.name.rpartition("/")[2][:1].upper())}</span>'
    )
    about = "cannot be used" if card.fault else " · ".join(filter(None, (kinds(card), card.architecture)))
    kind = " ia-faulty" if card.fault else ""
    return (
        f'<button type="button" class="ia-card{kind}" data-id="{text(card.id)}" aria-pressed="{str(pressed).lower()}">'
        f"{picture}<strong>{text(card.name)}</strong><small>{text(about)}</small></button>"
    )


def details(about: Details) -> str:
    """All about one adapter."""
    card = about.card
    parts = [
        f'<h3 class="ia-title">{text(card.name)}</h3>',
        _match(about.match) if about.match is not None else "",
        _facts(card, about.sha256),
        _list("Trigger words", card.trigger),
        _list("Words it teaches", card.words),
        _bars(about.norms),
        _table("Training", about.training),
        f'<details><summary>Merge recipe</summary><pre tabindex="0">{text(about.recipe)}</pre></details>'
        if about.recipe
        else "",
        _metadata(about.metadata),
        f'<p class="ia-buttons">{link(f"/cards/{card.id}/file", "Download", card.path.name)}</p>',
    ]
    return f'<article class="ia-details">{"".join(parts)}</article>'


def fault(card: Card) -> str:
    """An adapter that cannot be used, and why."""
    return (
        f'<article class="ia-details"><h3 class="ia-title">{text(card.name)}</h3>'
        f'<div class="ia-error" role="alert">{text(card.fault)}</div></article>'
    )


def _match(match: Match) -> str:
    kind = {"all": "ia-good", "some": "ia-warn"}.get(match.verdict, "ia-error")
    said = {
        "all": f"Goes on {match.base}: all {match.total} layers",
        "some": f"{match.matched} of {match.total} layers go on {match.base}",
    }.get(match.verdict, f"Nothing of it goes on {match.base}; it is for another base")
    rows = [*match.unmatched.items(), *match.unknown.items()]
    shown = "".join(f"<li><code>{text(name)}</code> {text(why)}</li>" for name, why in rows[:20])
    more = f"<li>and {len(rows) - 20} more</li>" if len(rows) > 20 else ""
    listed = f"<details><summary>{len(rows)} that do not</summary><ul>{shown}{more}</ul></details>" if rows else ""
    return f'<div class="{kind}" role="status">{text(said)}{listed}</div>'


def _facts(card: Card, sha256: str) -> str:
    rows = [
        ("For", card.architecture or "a base that no table knows"),
        ("Format", card.format),
        *(
            (
                called(kind.method),
                ", ".join(filter(None, (_of("rank", kind.rank), _of("alpha", kind.alpha), _layers(kind.layers)))),
            )
            for kind in card.kinds
        ),
        ("On", ", ".join(card.components)),
        ("Size", f"{size(card.size)}, {card.numbers:,} numbers in {', '.join(card.dtypes)}"),
        ("Recommended weight", f"{card.weight:g}"),
        ("Folder", card.folder),
        ("SHA-256", sha256[:16]),
    ]
    return _table("", [row for row in rows if row[1]])


def _of(name: str, value: float | None) -> str:
    return "" if value is None else f"{name} {value:g}"


def _layers(count: int) -> str:
    return f"{count} layer{'s' if count != 1 else ''}"


def size(count: int) -> str:
    """Bytes for people."""
    units = ("bytes", "KB", "MB", "GB")
    value, at = float(count), 0
    while value >= 1000 and at < len(units) - 1:
        value, at = value / 1000, at + 1
    return f"{value:.3g} {units[at]}"


def _list(title: str, words: Sequence[str]) -> str:
    if not words:
        return ""
    return f'<h4>{text(title)}</h4><p class="ia-facts">{"".join(f"<span>{text(word)}</span>" for word in words)}</p>'


def _table(title: str, rows: Sequence[tuple[str, str]]) -> str:
    if not rows:
        return ""
    shown = "".join(f"<dt>{text(name)}</dt><dd>{text(value)}</dd>" for name, value in rows)
    return (f"<h4>{text(title)}</h4>" if title else "") + f'<dl class="ia-table">{shown}</dl>'


def _bars(norms: Mapping[str, float]) -> str:
    """Frobenius norms of blocks, the largest as wide as can be."""
    if not norms:
        return ""
    most = max(norms.values()) or 1.0
    rows = "".join(
        f"<li><code>{text(name).replace('.', '.<wbr>')}</code>"
        f'<i style="width:{max(value / most, 0) * 100:.1f}%"></i><b>{value:.3g}</b></li>'
        for name, value in norms.items()
    )
    return f'<h4>Strength by block (norm of the change)</h4><ul class="ia-bars">{rows}</ul>'


def _metadata(metadata: Mapping[str, str]) -> str:
    if not metadata:
        return ""
    rows = "".join(
        f"<dt>{text(name[:200])}</dt><dd>{text(value[:_LONG])}{' …' if len(value) > _LONG else ''}</dd>"
        for name, value in list(metadata.items())[:200]
    )
    more = f"<p>and {len(metadata) - 200} more</p>" if len(metadata) > 200 else ""
    return (
        f"<details><summary>Metadata of the file ({len(metadata)})</summary>"
        f'<dl class="ia-table">{rows}</dl>{more}</details>'
    )
