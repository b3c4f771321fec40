"""Merging as text: recipes, in files and in adapters; blocks, masks, globs."""

from collections.abc import Iterator
from functools import cache

from imgadapt.arch import Architecture, architectures
from imgadapt.combining.recipe import Entry, MergeRecipe
from imgadapt.combining.recipes import KEY, from_toml, read_recipe, recipe_in, text_for, to_toml
from imgadapt.combining.weights import factor_of
from imgadapt.errors import ConfigError, ImgadaptError
from imgadapt.patterns import Pattern
from imgadapt.targets import idle, matches
from tests.fuzz.files import placed, scratch
from tests.fuzz.target import Target


@cache
def _architecture(name: str) -> tuple[Architecture, list[str]]:
    found = next(one for one in architectures() if one.name == name)
    return found, [
        layer for layer in found.layers if layer.endswith(("attn2.to_q", "attn.to_q", "7.self_attn.q_proj", "conv_in"))
    ]


# --- recipes


def _recipe(data: bytes) -> None:
    path = placed(data, "recipe.toml")
    recipe, output = read_recipe(path)
    text = text_for(recipe, path, "0.1.0")
    assert to_toml(from_toml(text), "0.1.0") == text
    assert read_recipe(placed(text.encode(), "again.toml"))[0] == recipe
    assert output is None or str(output).startswith(str(scratch()))


def _embedded(data: bytes) -> None:
    """A recipe in an adapter's metadata, as `merge --verify` and the lab use it."""
    recipe, version = recipe_in({KEY: data.decode("utf-8", "replace")}, "x.safetensors")
    version.encode()
    for entry in recipe.inputs[:4]:
        _weighed(entry)
    assert from_toml(to_toml(recipe)) == recipe


def _weighed(entry: Entry) -> None:
    """On layers of two architectures; it may be for one of them only."""
    refusals: list[ImgadaptError] = []
    for name in ("sd1", "flux"):
        architecture, layers = _architecture(name)
        try:
            factor = factor_of(entry, architecture, layers)
            assert all(isinstance(factor(layer), float) for layer in layers)
        except ImgadaptError as error:
            if "takes too long" in str(error):  # which takes a second
                raise
            refusals.append(error)
    if len(refusals) == 2:
        raise refusals[0]


def _recipes() -> Iterator[bytes]:
    entries = (
        Entry("a.safetensors", 0.8, blocks="INS", masks={r"attn2\.to_[qk]": 0.5}, components={"te": 0.0}),
        Entry("b.safetensors", -1.0, blocks={"IN04": 0.5, "unet.mid_block.*": 2.0}, sha256="0f" * 32),
    )
    yield to_toml(MergeRecipe(entries, "ties", {"density": 0.3}, rank=16, seed=7), "0.1.0").encode()
    yield to_toml(MergeRecipe(entries, "svd", energy=0.99, base="base", dtype="bf16", format="kohya")).encode()
    yield b'rule = "weighted"\noutput = "x.safetensors"\n[[inputs]]\npath = "a"\nblocks = [1, 0.5, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n'  # noqa: E501


_WORDS = (
    *(
        "[[inputs]]\n",
        "path = ",
        "weight = ",
        'rule = "dare_ties"',
        "[options]\n",
        "density = ",
        "masks = {",
        "blocks = ",
    ),
    *("components = {", "rank = ", "size = ", "energy = ", "inf", "nan", "1e308", "9223372036854775807", '"(a+)+$"'),
    *("'(.*)*.*x'", "a.a.a.a", "[" * 30, "true", "1979-05-27", "\\u0000", "\\U0001F600", '"""', "../../etc/passwd"),
)


# --- blocks, masks, globs


def _blocks(data: bytes) -> None:
    text = data.decode("utf-8", "replace")
    said: str | dict[str, float] = text
    if "=" in text:
        said = {key: float(k) for k, key in enumerate(text.split("="))}
    _weighed(Entry("x", blocks=said))


def _block_texts() -> Iterator[bytes]:
    yield from (
        b"INS",
        b"OUTALL",
        b"ALL0.5",
        b"1,0,0,0,1,1,1,1,1,1,1,1,1,1,1,1,1",
        b"IN04=M00",
        b"unet.*=text",
        b"FLUXALL",
    )
    yield ",".join(["0.5"] * 26).encode()
    yield f"[{','.join(['1e-3'] * 61)}]".encode()


def _masks(data: bytes) -> None:
    """Masks of a recipe, one a line, over the layers of a model."""
    masks = {line: 0.5 for line in data.decode("utf-8", "replace").split("\n") if line}
    try:
        entry = Entry("x", masks=masks)
    except ConfigError as error:
        assert "is no regular expression" in str(error)  # noqa: PT017
        raise
    _weighed(entry)


def _mask_texts() -> Iterator[bytes]:
    yield from (
        rb"attn2\.to_[qk]",
        b"(a+)+$",
        b"(.*)*.*x",
        rb"(?i)(?<!\.)to_q$",
        rb"^(?!.*attn1).*\d{1,2}\b",
        b"(a|a)*b",
    )
    yield b"unet.*\nto_(q|k)\n[^.]+[.]0"


_MASK_WORDS = (
    "(a+)+",
    "(?=",
    "(?!",
    "(?<=",
    "(?<!",
    "(?P<x>",
    "{0,99}",
    "{99}",
    "\\b",
    "\\d",
    "[^a]",
    "|",
    ".*",
    "(?:",
    ")*",
    *(
        "{e<=9}",
        "(?R)",
        "(?1)",
        "(?>",
        "++",
        "\\1",
        "(?P=x)",
        "(?(1)",
        "(?i)",
        "(?x)",
        "(?#",
        "[[:alpha:]]",
        "&&",
        "\\p{L}",
    ),
    *(
        "\\N{DIGIT ONE}",
        "\\L<x>",
        "(?|",
        "(*SKIP)",
        "(?r)",
        "\\X",
        "{4294967295}",
        "a{9}",
        "(a{2,}){3}",
        "\\b\\B",
        "(?<=a|b)",
    ),
)


def _pattern(data: bytes) -> None:
    """One pattern, over names as long as a hostile file's."""
    pattern = Pattern(data.decode("utf-8", "replace"))
    for name in ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0", "a" * 500, "to.\n" * 50):
        pattern.search(name)


def _globs(data: bytes) -> None:
    """Targets, one a line, as a config and a recipe have them."""
    targets = data.decode("utf-8", "replace").split("\n")[:64]
    _, layers = _architecture("sd1")
    assert set(idle(targets, layers[:10])) <= set(targets)
    for name in (layers[0], "a" * 5000):
        assert matches(name, targets) in (True, False)


def _glob_texts() -> Iterator[bytes]:
    yield from (
        b"transformer",
        b"unet.*.to_q\n!unet.mid_block.*",
        b"*a*a*a*a*a*a*a*b",
        b"[!a-z]*[0-9]",
        b"to_q",
        b"[[]?*",
    )


TARGETS = (
    Target("recipe", _recipe, _recipes, _WORDS),
    Target("recipe-embedded", _embedded, _recipes, _WORDS),
    Target(
        "blocks",
        _blocks,
        _block_texts,
        (",", "1e999", "nan", "INS", "ALL", "IN04", "BASE", "[", "]", "=", "unet.", "*"),
    ),
    Target("masks", _masks, _mask_texts, _MASK_WORDS),
    Target("pattern", _pattern, _mask_texts, _MASK_WORDS),
    Target("globs", _globs, _glob_texts, ("*", "?", "[", "]", "!", "\n", "[!", "-", "**", "*a")),
)
