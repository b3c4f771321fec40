"""Buckets, what is seen of a picture in one, and which pictures a step takes."""

import hashlib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from imgadapt.errors import ConfigError, DataError
from imgadapt.training import framing
from imgadapt.training.buckets import View, describe, sizes, table, views
from imgadapt.training.data import Example
from imgadapt.training.framing import Options, frame, latent_mask, placement
from imgadapt.training.order import Order
from imgadapt.training.sheets import contact_sheet


def example(width: int, height: int, name: str = "a.png", **more: Any) -> Example:
    return Example(Path(name), ("",), hashlib.sha256(name.encode()).hexdigest(), width, height, **more)


def saved(image: Image.Image, path: Path, upright: tuple[int, int] | None = None, **more: Any) -> Example:
    """Write a picture; the example of it."""
    image.save(path, **({"exif": more.pop("exif")} if "exif" in more else {}))
    width, height = upright or image.size
    made = Example(path, ("",), hashlib.sha256(path.read_bytes()).hexdigest(), width, height, **more)
    return scanned(made) if made.mask and made.mask.exists() else made


def scanned(example: Example) -> Example:
    """The example with its mask as it is now."""
    assert example.mask
    return replace(example, mask_digest=hashlib.sha256(example.mask.read_bytes()).hexdigest())


def ramp(width: int, height: int) -> np.ndarray:
    """(height, width) greys that rise from left to right and a little from top to bottom."""
    x, y = np.linspace(20, 200, width)[None], np.linspace(0, 40, height)[:, None]
    return np.rint(x + y).astype(np.uint8)


# --- sizes


@pytest.mark.parametrize(("resolution", "step"), [(64, 8), (512, 64), (1024, 64), (1024, 32), (1024, 16), (500, 64)])
def test_sizes_are_multiples_of_the_step_of_nearly_the_full_area(resolution: int, step: int) -> None:
    made = sizes(resolution, step)
    side = resolution // step * step
    assert (side, side) in made
    for width, height in made:
        assert width % step == height % step == 0
        assert width * height <= resolution**2
        assert width * height >= 0.85 * resolution**2 or width == height == side
        assert 0.5 <= width / height <= 2
    aspects = [width / height for width, height in made]
    assert aspects == sorted(set(aspects))
    assert {(height, width) for width, height in made} == set(made)


def test_sizes_of_the_embedded_base_and_of_sdxl() -> None:
    assert sizes(64, 8) == [(48, 80), (56, 72), (56, 64), (64, 64), (64, 56), (72, 56), (80, 48)]
    usual = {(704, 1408), (768, 1344), (832, 1216), (896, 1152), (1024, 1024), (1152, 896), (1216, 832), (1344, 768)}
    assert usual <= set(sizes(1024, 64))
    assert sizes(1024, 64, 1.0) == [(1024, 1024)]


def test_every_legal_size_is_there_or_a_larger_one_of_its_aspect() -> None:
    made = sizes(512, 16)
    for w in range(16, 1024, 16):
        for h in range(16, 1024, 16):
            if 0.85 * 512**2 <= w * h <= 512**2 and 0.5 <= w / h <= 2:
                assert any(a * h == b * w and a >= w for a, b in made)


@pytest.mark.parametrize(
    ("resolution", "ratio", "message"), [(63, 2.0, "resolution 63: wanted at least 64"), (64, 0.5, "ratio")]
)
def test_a_resolution_below_a_step_and_a_ratio_below_one_are_errors(
    resolution: int, ratio: float, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        sizes(resolution, 64, ratio)


# --- views

_shapes = st.lists(st.tuples(st.integers(8, 5000), st.integers(8, 5000), st.integers(1, 12)), min_size=1, max_size=30)


@settings(max_examples=60, deadline=None)
@given(_shapes, st.lists(st.sampled_from([64, 72, 128, 256]), min_size=1, max_size=3), st.booleans(), st.integers(1, 8))
def test_no_picture_is_dropped(
    shapes: list[tuple[int, int, int]], resolutions: list[int], square: bool, batch: int
) -> None:
    examples = [example(w, h, f"{k}.png", repeats=r) for k, (w, h, r) in enumerate(shapes)]
    made = views(examples, resolutions, 8, square=square, batch=batch)
    assert {view.example for view in made} == set(examples)
    assert len(set(made)) == len(made)
    smallest = sizes(min(resolutions), 8, 1.0 if square else 2.0)
    for view in made:
        assert view.size in smallest or view.enlarged <= 1
    for one in examples:
        assert any(view.example == one and view.size in smallest for view in made)
    assert sum(row.pictures for row in table(made)) == len(made)
    assert sum(row.entries for row in table(made)) == sum(view.example.repeats for view in made)


@settings(max_examples=100, deadline=None)
@given(st.integers(8, 5000), st.integers(8, 5000))
def test_the_bucket_is_the_one_that_cuts_least_and_a_lying_picture_takes_the_turned_one(
    width: int, height: int
) -> None:
    (view,) = views([example(width, height)], [1024], 64)
    cuts = {size: View(view.example, size).cut for size in sizes(1024, 64)}
    assert view.cut == pytest.approx(min(cuts.values()), abs=1e-9)
    covered = max(view.size[0] / width, view.size[1] / height) ** 2 * width * height
    assert view.cut == pytest.approx(1 - view.size[0] * view.size[1] / covered, abs=1e-9)
    if width != height:
        (turned,) = views([example(height, width)], [1024], 64)
        assert turned.size == view.size[::-1]


def test_a_picture_is_taken_at_the_resolutions_that_it_fills_and_always_at_the_smallest() -> None:
    small, middle, large = example(100, 100, "s"), example(500, 500, "m"), example(900, 512, "l")
    made = views([small, middle, large], [512, 128, 256], 64)
    taken = [(view.example.path.name, view.size) for view in made]
    assert taken == [
        ("s", (128, 128)),
        ("m", (128, 128)),
        ("m", (256, 256)),
        ("l", (128, 128)),
        ("l", (320, 192)),
        ("l", (640, 384)),
    ]
    assert [round(view.enlarged, 2) for view in made if view.enlarged > 1] == [1.28]


def test_several_resolutions_that_come_to_one_size_are_one_view() -> None:
    assert len(views([example(100, 100)], [64, 66, 64], 8)) == 1


def test_square_takes_squares_only() -> None:
    made = views([example(100, 300), example(640, 480), example(999, 500)], [128], 64, square=True)
    assert {view.size for view in made} == {(128, 128)}


def test_a_small_bucket_is_joined_to_its_neighbour_where_that_cuts_little() -> None:
    many = [example(1024, 1024, f"{k}") for k in range(8)]
    near, far = example(2200, 2000, "near"), example(2000, 4000, "far")
    assert len({view.size for view in views([*many, near, far], [1024], 64)}) == 3
    by_name = {view.example.path.name: view for view in views([*many, near, far], [1024], 64, batch=4)}
    assert by_name["near"].size == (1024, 1024)
    assert by_name["near"].cut == pytest.approx(1 - 1 / 1.1)
    assert by_name["far"].size == (704, 1408)  # a square would cut half of it
    often = example(2200, 2000, "near", repeats=4)
    assert views([*many, often], [1024], 64, batch=4)[-1].size != (1024, 1024)


def test_joining_enlarges_nothing_that_was_large_enough() -> None:
    exact, many = example(1024, 960, "exact"), [example(3000, 3000, f"{k}") for k in range(4)]
    assert views([*many, exact], [1024], 64, batch=4)[-1].size == (1024, 960)
    assert views([*many, replace(exact, width=1023)], [1024], 64, batch=4)[-1].size == (1024, 1024)


def test_enlarged_is_by_the_side_that_needs_it_most() -> None:
    assert View(example(100, 50), (120, 80)).enlarged == 1.6
    assert View(example(400, 200), (120, 80)).enlarged == 0.4


def test_the_table_counts_repeats_cuts_and_enlarged() -> None:
    made = views(
        [example(2048, 1024, "wide", repeats=3), example(100, 110, "small"), example(2048, 2048, "square")], [512], 64
    )
    rows = {row.size: row for row in table(made)}
    assert rows[(512, 512)].pictures == 1
    wide = rows[(704, 320)] if (704, 320) in rows else rows[max(rows, key=lambda size: size[0] / size[1])]
    assert (wide.pictures, wide.entries, wide.enlarged) == (1, 3, 0)
    assert sum(row.enlarged for row in rows.values()) == 1
    text = describe(made)
    assert len(text.splitlines()) == len(rows) + 1
    assert "(1 enlarged)" in text
    assert "512 x 512         1             1     0.0%" in text


def test_views_of_nothing_or_at_no_resolution_are_errors() -> None:
    with pytest.raises(DataError, match="no pictures"):
        views([], [64], 8)
    with pytest.raises(ConfigError, match="resolution: wanted one or more"):
        views([example(9, 9)], [], 8)


# --- placement


@settings(max_examples=100, deadline=None)
@given(
    st.integers(8, 3000),
    st.integers(8, 3000),
    st.sampled_from(["centre", "random", "pad"]),
    st.booleans(),
    st.integers(0, 9),
)
def test_the_crop_is_within_the_resized_picture(width: int, height: int, crop: Any, flip: bool, variant: int) -> None:
    (view,) = views([example(width, height)], [128], 8)
    place = placement(view, Options(crop, variant, 3, flip))
    (rows, columns), (top, left), (h, w) = place.resized, place.corner, place.target
    assert place.original == (height, width)
    assert (w, h) == view.size
    assert top >= 0
    assert left >= 0
    if crop == "pad":
        assert rows <= h
        assert columns <= w
        assert rows == h or columns == w
        assert place.corner == (0, 0)
    else:
        assert top + h <= rows
        assert left + w <= columns
        assert rows == h or columns == w
    scale = (min if crop == "pad" else max)(w / width, h / height)
    assert abs(rows - height * scale) <= 0.5 or rows == 1
    assert abs(columns - width * scale) <= 0.5 or columns == 1


def test_sizes_are_those_of_the_diffusers_script() -> None:
    view = View(example(3000, 1500), (1344, 768))
    assert placement(view).sizes == (1500, 3000, 0, 96, 768, 1344)  # resized to 1536 x 768, (1536 - 1344) / 2 cut
    view = View(example(1000, 1000), (64, 48))
    assert placement(view).sizes == (1000, 1000, 8, 0, 48, 64)


def test_a_mirrored_picture_is_cropped_from_the_other_side() -> None:
    view = View(example(400, 100), (128, 100))
    for variant in range(5):
        plain, flipped = (placement(view, Options("random", variant, 1, flip)) for flip in (False, True))
        assert flipped.corner == (plain.corner[0], 400 - 128 - plain.corner[1])
        assert flipped.window == plain.window


def test_random_crops_reach_both_ends_and_depend_on_seed_digest_and_variant() -> None:
    view, other = View(example(72, 64), (64, 64)), View(example(72, 64, "b.png"), (64, 64))
    lefts = [placement(view, Options("random", k, 0)).corner[1] for k in range(200)]
    assert set(lefts) == set(range(9))
    assert lefts == [placement(view, Options("random", k, 0)).corner[1] for k in range(200)]
    assert lefts != [placement(view, Options("random", k, 1)).corner[1] for k in range(200)]
    assert lefts != [placement(other, Options("random", k, 0)).corner[1] for k in range(200)]


# --- frames


def test_a_frame_is_the_picture_resized_and_then_cropped(tmp_path: Path) -> None:
    image = Image.effect_mandelbrot((317, 203), (-2, -1.5, 1, 1.5), 60).convert("RGB")
    view = View(saved(image, tmp_path / "a.png"), (96, 80))
    for options in (Options(), Options("random", 2, 5), Options("random", 3, 5, True)):
        place, made = placement(view, options), frame(view, options)
        whole = image.resize((place.resized[1], place.resized[0]), Image.Resampling.LANCZOS)
        whole = whole.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if options.flip else whole
        top, left = place.corner
        wanted = np.asarray(whole.crop((left, top, left + 96, top + 80)), np.float32)
        assert made.pixels.shape == (3, 80, 96)
        assert np.abs((made.pixels.permute(1, 2, 0).numpy() + 1) * 127.5 - wanted).max() <= 1.01
        assert made.mask is None
        assert (made.original, made.corner, made.target) == (place.original, place.corner, place.target)


@pytest.mark.parametrize("crop", ["centre", "random", "pad"])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("factor", [1, 0.5, 1.7])
def test_a_mask_lies_exactly_on_its_picture(tmp_path: Path, crop: Any, flip: bool, factor: float) -> None:
    grey = ramp(230, 140)
    mask = Image.fromarray(ramp(round(230 * factor), round(140 * factor)))
    mask.save(tmp_path / "a-mask.png")
    one = saved(Image.fromarray(grey).convert("RGB"), tmp_path / "a.png", mask=tmp_path / "a-mask.png")
    made = frame(View(one, (72, 56)), Options(crop, 1, 0, flip, "file"))
    assert made.mask is not None
    inside = made.mask > 0
    assert inside.all() == (crop != "pad")
    picture = (made.pixels[0] + 1) / 2
    edge = 0 if crop == "centre" else 2  # a filter has fewer pixels to go by at the picture's own edges
    gaps = (picture - made.mask).abs()[inside].reshape(-1, 72)[edge or None : -edge or None, 3:-3]
    assert gaps.max() < 2 / 255
    half = frame(View(one, (72, 56)), Options(crop, 1, 0, not flip, "file"))
    assert half.mask is not None
    assert torch.equal(half.pixels.flip(2), made.pixels)
    assert torch.equal(half.mask.flip(1), made.mask)


def test_padding_is_background_and_does_not_count(tmp_path: Path) -> None:
    one = saved(Image.new("RGB", (40, 20), "black"), tmp_path / "a.png")
    made = frame(View(one, (64, 64)), Options("pad"))
    assert made.mask is not None
    assert torch.equal(made.mask[16:48], torch.ones(32, 64))
    assert made.mask.sum() == 32 * 64
    assert torch.equal(made.pixels[:, 16:48], -torch.ones(3, 32, 64))
    assert torch.equal(made.pixels[:, :16], torch.ones(3, 16, 64))
    assert (made.original, made.corner, made.target) == ((20, 40), (0, 0), (64, 64))
    red = frame(View(one, (64, 64)), Options("pad", background=(255, 0, 0)))
    assert red.pixels[:, 0, 0].tolist() == [1, -1, -1]
    assert frame(View(one, (64, 32)), Options("pad")).mask is None


def test_alpha_is_laid_over_the_background_and_is_the_mask(tmp_path: Path) -> None:
    image = Image.new("RGBA", (64, 32), (0, 0, 0, 255))
    image.paste((0, 0, 255, 0), (32, 0, 64, 32))
    one = saved(image, tmp_path / "a.png", alpha=True)
    made = frame(View(one, (64, 32)), Options(use_mask="alpha"))
    assert made.mask is not None
    assert torch.equal(made.mask, torch.cat([torch.ones(32, 32), torch.zeros(32, 32)], 1))
    assert torch.equal(made.pixels[:, :, 32:], torch.ones(3, 32, 32))
    assert torch.equal(made.pixels[:, :, :32], -torch.ones(3, 32, 32))
    assert frame(View(one, (64, 32))).mask is None
    palette = saved(image.quantize(), tmp_path / "b.png", alpha=True)
    assert torch.equal(frame(View(palette, (64, 32)), Options(use_mask="alpha")).mask, made.mask)  # pyright: ignore[reportArgumentType] # one is there
    opaque = saved(Image.new("RGB", (64, 32)), tmp_path / "c.png")
    assert frame(View(opaque, (64, 32)), Options(use_mask="alpha")).mask is None
    assert frame(View(opaque, (64, 32)), Options(use_mask="file")).mask is None


def test_a_mask_painted_on_nothing_counts_where_it_is_painted(tmp_path: Path) -> None:
    mask = Image.new("RGBA", (32, 32), (255, 255, 255, 0))
    mask.paste((255, 255, 255, 255), (0, 0, 16, 32))
    mask.save(tmp_path / "a-mask.png")
    one = saved(Image.new("RGB", (32, 32)), tmp_path / "a.png", mask=tmp_path / "a-mask.png")
    made = frame(View(one, (32, 32)), Options(use_mask="file"))
    assert torch.equal(made.mask, torch.cat([torch.ones(32, 16), torch.zeros(32, 16)], 1))  # pyright: ignore[reportArgumentType] # one is there


@pytest.mark.parametrize("turn", [3, 6, 8])
def test_exif_turns_the_picture_before_it_is_cropped(tmp_path: Path, turn: int) -> None:
    image = Image.new("RGB", (40, 20), "black")
    image.paste((255, 255, 255), (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = turn
    upright = (40, 20) if turn == 3 else (20, 40)
    made = frame(View(saved(image, tmp_path / "a.png", upright, exif=exif), (16, 16)))
    halves = {3: made.pixels[:, :, 8:], 6: made.pixels[:, :8], 8: made.pixels[:, 8:]}  # the left goes right, up, down
    assert halves[turn].mean() > 0.9
    assert made.pixels.mean().abs() < 0.1
    assert made.original == upright[::-1]


def test_modes_other_than_rgb_keep_their_colours(tmp_path: Path) -> None:
    def colour(image: Image.Image, name: str) -> list[float]:
        made = frame(View(saved(image, tmp_path / name), (8, 8))).pixels
        return [round((x + 1) * 127.5) for x in made[:, 4, 4].tolist()]

    assert colour(Image.fromarray(np.full((8, 8), 32768, np.uint16)), "grey.png") == [128] * 3
    assert colour(Image.fromarray(np.full((8, 8), 65535, np.uint16)), "grey.tif") == [255] * 3
    assert colour(Image.new("RGB", (8, 8), (255, 0, 0)).quantize(), "palette.png") == [255, 0, 0]
    assert colour(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "cmyk.tif") == [255, 0, 0]
    assert colour(Image.new("1", (8, 8), 1), "bits.png") == [255] * 3
    assert colour(Image.new("LA", (8, 8), (0, 255)), "grey_alpha.png") == [0] * 3


def test_a_picture_whose_range_is_unknown_is_refused(tmp_path: Path) -> None:
    one = saved(Image.fromarray(np.full((8, 8), 0.5, np.float32)), tmp_path / "a.tif")
    with pytest.raises(DataError, match=r"a\.tif: .*numbers of 32 bits, whose white is not known"):
        frame(View(one, (8, 8)))


def test_a_picture_that_changed_is_torn_or_gone_and_an_empty_mask_are_named(tmp_path: Path) -> None:
    one = saved(Image.new("RGB", (32, 32)), tmp_path / "a.png", mask=tmp_path / "a-mask.png")
    view = View(one, (16, 16))
    with pytest.raises(DataError, match=r"a-mask\.png"):
        frame(view, Options(use_mask="file"))
    (tmp_path / "a-mask.png").write_bytes(b"not a picture")
    with pytest.raises(DataError, match=r"a-mask\.png: the file has changed since it was scanned"):
        frame(view, Options(use_mask="file"))
    view = View(scanned(one), (16, 16))
    with pytest.raises(DataError, match=r"a-mask\.png: cannot be read \(not a picture"):
        frame(view, Options(use_mask="file"))
    Image.new("L", (32, 32)).save(tmp_path / "a-mask.png")
    view = View(scanned(one), (16, 16))
    with pytest.raises(DataError, match=r"a-mask\.png: the mask is black all over, so nothing of a\.png"):
        frame(view, Options(use_mask="file"))
    torn = (tmp_path / "a.png").read_bytes()[:-30]
    (tmp_path / "b.png").write_bytes(torn)
    with pytest.raises(DataError, match=r"b\.png: cannot be read"):
        frame(View(Example(tmp_path / "b.png", ("",), hashlib.sha256(torn).hexdigest(), 32, 32), (16, 16)))
    Image.new("RGB", (32, 32), "red").save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"a\.png: the file has changed since it was scanned"):
        frame(view)
    (tmp_path / "a.png").unlink()
    with pytest.raises(DataError, match=r"a\.png: cannot be read"):
        frame(view)


def test_the_key_changes_with_all_that_decides_the_pixels_and_with_nothing_else(tmp_path: Path) -> None:
    Image.new("L", (32, 32), 255).save(tmp_path / "m.png")
    one = saved(Image.new("RGB", (90, 64)), tmp_path / "a.png", mask=tmp_path / "m.png")
    two = saved(Image.new("RGB", (90, 64), "red"), tmp_path / "b.png", mask=tmp_path / "m.png")
    view = View(one, (64, 56))
    kinds = [Options(), Options("pad"), Options("random", 1, 0), Options("random", 2, 0), Options(flip=True),
             Options("random", 1, 1), Options(use_mask="file"), Options(background=(0, 0, 0))]  # fmt: skip
    keys = [framing.key(view, options) for options in kinds] + [
        framing.key(View(two, (64, 56))),
        framing.key(View(one, (64, 64))),
    ]
    assert len(set(keys)) == len(keys)
    assert keys[: len(kinds)] == [framing.key(view, options) for options in kinds]
    Image.new("L", (32, 32), 128).save(tmp_path / "m.png")
    view = View(scanned(one), (64, 56))
    assert [framing.key(view, o) != k for o, k in zip(kinds, keys, strict=False)] == [
        o.use_mask == "file" for o in kinds
    ]
    assert framing.key(view, Options("centre", 3, 7)) == keys[0]
    assert framing.key(view, Options(use_mask="alpha")) == keys[0]  # it has no alpha


def test_the_mask_of_the_latent_is_the_mean_over_its_pixels() -> None:
    mask = torch.rand(48, 80)
    made = latent_mask(mask, 6, 10)
    assert made.shape == (6, 10)
    assert torch.allclose(made, mask.reshape(6, 8, 10, 8).mean((1, 3)))
    assert latent_mask(mask, 3, 5).mean().item() == pytest.approx(mask.mean().item(), rel=1e-5)


# --- order


def some_views(batch: int = 1) -> list[View]:
    shapes = [(64, 64, 1)] * 7 + [(64, 80, 2)] * 3 + [(80, 60, 1)] * 2 + [(40, 80, 5)]
    return views([example(w, h, f"{k}.png", repeats=r) for k, (w, h, r) in enumerate(shapes)], [64], 8, batch=batch)


@pytest.mark.parametrize("batch", [1, 3, 4, 20])
def test_in_a_round_every_entry_comes_batch_times_in_full_batches_of_one_size(batch: int) -> None:
    made = some_views()
    order = Order(made, batch, 5)
    assert order.per_round == 7 + 6 + 2 + 5
    assert len({view.size for view in made}) == 4
    for turn in range(3):
        steps = [order.batch(turn * order.per_round + k) for k in range(order.per_round)]
        assert all(len(step) == batch for step in steps)
        assert all(len({made[k].size for k in step}) == 1 for step in steps)
        counts = Counter(k for step in steps for k in step)
        assert counts == {k: batch * view.example.repeats for k, view in enumerate(made)}


def test_seen_counts_how_often_a_view_was_drawn_before() -> None:
    order = Order(some_views(), 3, 5)
    drawn: Counter[int] = Counter()
    for step in range(3 * order.per_round):
        seen = order.seen(step)
        for k, before in zip(order.batch(step), seen, strict=True):
            assert before == drawn[k]
            drawn[k] += 1


def test_a_picture_repeats_within_a_batch_only_across_an_epoch() -> None:
    made = views([example(64, 64, f"{k}") for k in range(12)], [64], 8)
    order = Order(made, 4, 0)
    assert all(len(set(order.batch(step))) == 4 for step in range(36))
    ragged = Order(made, 5, 0)
    for step in range(36):
        straddles = 5 * step // 12 != (5 * step + 4) // 12
        assert straddles or len(set(ragged.batch(step))) == 5


def test_any_step_is_the_same_however_it_is_come_to() -> None:
    straight, jumping = Order(some_views(), 3, 9), Order(some_views(), 3, 9)
    steps = range(4 * straight.per_round)
    there = [(straight.batch(k), straight.seen(k)) for k in steps]
    shuffled = torch.randperm(len(steps)).tolist()
    back = {k: (jumping.batch(k), jumping.seen(k)) for k in shuffled}
    assert there == [back[k] for k in steps]
    assert Order(some_views(), 3, 9).batch(10**6) == straight.batch(10**6)


def test_rounds_epochs_and_seeds_differ() -> None:
    made = some_views()
    order, other = Order(made, 2, 0), Order(made, 2, 1)
    n = order.per_round
    rounds = [[order.batch(turn * n + k) for k in range(n)] for turn in range(3)]
    assert rounds[0] != rounds[1] != rounds[2] != rounds[0]
    assert rounds[0] != [other.batch(k) for k in range(n)]
    assert order.epochs(0) == 0
    assert order.epochs(n) == 2


def test_buckets_are_dealt_anew_each_round_and_pictures_each_epoch_and_by_seed() -> None:
    made = some_views()
    order = Order(made, 2, 0)
    turns = [[made[order.batch(k)[0]].size for k in range(t * 20, t * 20 + 20)] for t in range(3)]
    assert turns[0] != turns[1] != turns[2] != turns[0]
    squares = views([example(64, 64, f"{k}") for k in range(12)], [64], 8)
    epochs = [[k for step in range(e * 3, e * 3 + 3) for k in Order(squares, 4, seed).batch(step)]
              for seed in range(2) for e in range(3)]  # fmt: skip
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)


def test_the_order_is_of_pictures_not_of_names_or_places() -> None:
    made = some_views()
    moved = [View(replace(v.example, path=Path(f"x/{-k}"), captions=("y",)), v.size) for k, v in enumerate(made)][::-1]
    order, other = Order(made, 3, 2), Order(moved, 3, 2)
    assert order.fingerprint == other.fingerprint
    for step in range(order.per_round):
        assert [made[k].example.digest for k in order.batch(step)] == [
            moved[k].example.digest for k in other.batch(step)
        ]


def test_the_fingerprint_tells_of_any_change_of_the_order() -> None:
    made = some_views()
    more = [View(example(64, 64, "new"), (64, 64)), *made]
    often = [View(example(64, 64, "0.png", repeats=2), (64, 64)), *made[1:]]
    elsewhere = [View(made[0].example, (64, 56)), *made[1:]]
    orders = [Order(made, 3, 2), Order(made, 4, 2), Order(made, 3, 3), Order(more, 3, 2), Order(often, 3, 2),
              Order(elsewhere, 3, 2), Order(made[1:], 3, 2)]  # fmt: skip
    assert len({order.fingerprint for order in orders}) == len(orders)
    assert len({str([order.batch(k) for k in range(40)]) for order in orders}) == len(orders)


def test_another_bucket_changes_nothing_of_the_others_turns() -> None:
    made = some_views()
    more = [*made, View(example(80, 48, "wide"), (80, 48))]
    order, other = Order(made, 3, 2), Order(more, 3, 2)
    turns = [[made[k].example.digest for k in order.batch(step)] for step in range(order.per_round)]
    others = [[more[k].example.digest for k in other.batch(step)] for step in range(other.per_round)]
    squares = {view.example.digest for view in made if view.size == (64, 64)}
    assert [turn for turn in others if turn[0] in squares] == [turn for turn in turns if turn[0] in squares]


def test_orders_of_nothing_are_errors() -> None:
    with pytest.raises(ConfigError, match="batch_size: wanted at least 1, got 0"):
        Order(some_views(), 0, 0)
    with pytest.raises(DataError, match="no pictures"):
        Order([], 1, 0)
    with pytest.raises(DataError, match=r"a\.png: wanted 1 repeat or more, got 0"):
        Order([View(example(64, 64, repeats=0), (64, 64))], 1, 0)


# --- contact sheets


def test_a_contact_sheet_darkens_what_is_cut_and_shows_the_most_cut_first(tmp_path: Path) -> None:
    wide = saved(Image.new("RGB", (400, 100), "white"), tmp_path / "wide.png")
    square = saved(Image.new("RGB", (100, 100), "white"), tmp_path / "square.png")
    made = np.asarray(contact_sheet([View(square, (64, 64)), View(wide, (64, 64))]), np.int32)
    dark = (made == 70).all(2)[42:214]  # of a white picture; above and below are words
    assert dark[:, :184].sum() == pytest.approx(176 * 44 * 0.75, rel=0.02)
    assert not dark[:, 184:].any()


def test_a_contact_sheet_shows_masks_padding_and_one_tile_a_picture(tmp_path: Path) -> None:
    image = Image.new("RGBA", (100, 50), (255, 255, 255, 255))
    image.paste((255, 255, 255, 0), (0, 0, 50, 50))
    one = saved(image, tmp_path / "a.png", alpha=True)
    made = np.asarray(contact_sheet([View(one, (64, 64)), View(one, (64, 32))], "pad", use_mask="alpha"), np.int32)
    assert (made == 128).all(2).sum() == pytest.approx(176 * 88, rel=0.02)
    tinted = np.abs(made - [0.4 * 255 + 0.6 * 220, 0.4 * 255, 0.4 * 255 + 0.6 * 160]).max(2) <= 1
    assert tinted.sum() == pytest.approx(88 * 88, rel=0.03)


def test_a_contact_sheet_has_so_many_tiles_at_most_and_cuts_long_names(tmp_path: Path) -> None:
    made = [
        View(saved(Image.new("RGB", (32 + k, 32)), tmp_path / f"{k}{'long name ' * 9}.jpg"), (32, 32)) for k in range(9)
    ]
    whole, some = contact_sheet(made), contact_sheet(made, "random", variants=3, limit=8)
    assert whole.height > 1.5 * some.height
    assert whole.width == some.width == 8 * 184
    with pytest.raises(DataError, match="no pictures"):
        contact_sheet([])
