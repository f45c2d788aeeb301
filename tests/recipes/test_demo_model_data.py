"""The demo model's data: packages, captions, compositions, pixels, and what is measured of them."""

import dataclasses
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from recipes.demo_model import archive, measures, schedule, sources
from recipes.demo_model.canvas import Canvas, plan_of
from recipes.demo_model.captions import plural, with_article
from recipes.demo_model.cast import cast_of
from recipes.demo_model.composer import compose, recoloring
from recipes.demo_model.composition import Backdrop, Composition, Placed
from recipes.demo_model.evaluate import measurable, to_bytes
from recipes.demo_model.progress import Stage
from recipes.demo_model.prompt_sets import asked, held_out_colors
from recipes.demo_model.raster import draw_sprite
from recipes.demo_model.scenes import SCENES, VARIANTS, scene_svg
from recipes.demo_model.things import Sprite, Thing
from recipes.demo_model.tokens import LENGTH, Encoder
from recipes.demo_model.toy import toy_rasters

SHIPPED = Path(__file__).parents[2] / "models" / "darkroom-demo"


def npm_archive(path: Path, files: dict[str, object]) -> Path:
    with tarfile.open(path, "w:gz") as package:
        for name, content in files.items():
            text = json.dumps(content).encode()
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(text)
            package.addfile(member, io.BytesIO(text))
    return path


def test_a_package_that_was_changed_is_refused(tmp_path: Path) -> None:
    npm_archive(tmp_path / sources.UNICODE_NAMES.file_name, {"data-by-emoji.json": {}})
    with pytest.raises(sources.WrongPackage, match="SHA-512"):
        sources.fetch(sources.UNICODE_NAMES, tmp_path)


def test_every_package_is_attributed_with_its_license() -> None:
    text = sources.attribution_text()
    for package in sources.PACKAGES:
        assert f"(npm {package.name} {package.version}): {package.license}" in text


def test_the_sources_of_the_weights_it_started_from_are_attributed_too() -> None:
    older = "# Where they come from\n\n- FxEmojis\n\n## And before\n\n- Temaki\n"
    text = sources.attribution_text(started_from=older)
    assert text.startswith(sources.attribution_text())
    assert "\n### Where they come from\n\n- FxEmojis\n\n### And before\n\n- Temaki\n" in text
    assert sources.attribution_text(started_from=text) == text  # trained on with the same images


def test_the_shipped_attribution_is_what_an_export_writes() -> None:
    shipped = (SHIPPED / "ATTRIBUTION.md").read_text("utf-8")
    older = (SHIPPED.with_name("darkroom-demo-v1") / "ATTRIBUTION.md").read_text("utf-8")
    assert sources.attribution_text(started_from=older) == shipped


def test_a_data_set_reads_back_as_it_was_written_and_its_file_is_the_same_twice(
    tmp_path: Path,
) -> None:
    things = [Thing("cat", "Animals & Nature", "1f408", ("kitty",), ("pet",))]
    sprites = [Sprite("cat", "flat", "svg", b"<svg/>"), Sprite("cat", "3d", "webp", b"RIFF")]
    data_set = archive.DataSet(things, sprites)
    archive.write(data_set, tmp_path / "one.zip")
    archive.write(data_set, tmp_path / "two.zip")
    assert archive.read(tmp_path / "one.zip") == data_set
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()


def test_the_digest_tells_one_changed_image() -> None:
    thing = Thing("cat", "Animals & Nature", "1f408", (), ())
    one = archive.DataSet([thing], [Sprite("cat", "flat", "svg", b"<svg/>")])
    other = archive.DataSet([thing], [Sprite("cat", "flat", "svg", b"<svg />")])
    assert archive.digest(one) != archive.digest(other)


@pytest.mark.parametrize(
    ("noun", "said"),
    [("cat", "a cat"), ("owl", "an owl"), ("unicorn", "a unicorn"), ("umbrella", "an umbrella"),
     ("scissors", "scissors"), ("flag of japan", "the flag of japan"),
     ("one-piece swimsuit", "a one-piece swimsuit")],
)  # fmt: skip
def test_articles_are_english(noun: str, said: str) -> None:
    assert with_article(noun) == said


@pytest.mark.parametrize(
    ("noun", "said"),
    [("fire engine", "fire engines"), ("cherry", "cherries"), ("fox", "foxes"),
     ("wolf", "wolves"), ("sheep", "sheep"), ("key", "keys")],
)  # fmt: skip
def test_plurals_are_english(noun: str, said: str) -> None:
    assert plural(noun) == said


def test_the_same_seed_composes_the_same_image() -> None:
    cast = cast_of(toy_rasters())
    assert compose(cast, "17") == compose(cast, "17")
    assert compose(cast, "17") != compose(cast, "18")


def test_a_caption_that_counts_counts_right() -> None:
    cast = cast_of(toy_rasters())
    numbers = {"two": 2, "three": 3, "four": 4}
    compositions = [compose(cast, str(seed)) for seed in range(400)]
    counting = [one for one in compositions if one.caption.split()[0] in numbers]
    assert counting
    for one in counting:
        assert len(one.placed) == numbers[one.caption.split()[0]], one.caption


def test_a_caption_puts_things_where_they_are() -> None:
    cast = cast_of(toy_rasters())
    compositions = [compose(cast, str(seed)) for seed in range(800)]
    placed = [one for one in compositions if " to the left of " in one.caption]
    assert placed
    for one in placed:
        first, second = one.placed
        assert first.x < second.x, one.caption


def test_an_image_without_colors_is_not_promised_a_colored_background() -> None:
    cast = cast_of(toy_rasters())
    compositions = [compose(cast, str(seed)) for seed in range(2000)]
    grays = [one for one in compositions if one.finish == "gray"]
    assert grays
    assert not any("background" in one.caption for one in grays)


def test_every_scene_draws_the_same_svg_every_time() -> None:
    for place in range(len(SCENES)):
        svg, ground = scene_svg(place * VARIANTS)
        assert (svg, ground) == scene_svg(place * VARIANTS)
        assert svg.startswith("<svg")
        assert svg.endswith("</svg>")


def test_the_canvas_puts_a_thing_where_the_composition_says() -> None:
    rasters = toy_rasters()
    canvas = Canvas(rasters, torch.device("cpu"))
    red_ball_top_left = Composition("", Backdrop(), (Placed(0, 0.25, 0.25, 0.4),))
    picture = to_bytes(canvas.draw([plan_of(red_ball_top_left)]))[0]
    assert tuple(picture[64, 64]) == (220, 38, 38)
    assert tuple(picture[192, 192]) == (255, 255, 255)
    assert measures.foreground(picture).nonzero()[0].max() < 128


def test_components_joined_by_a_corner_are_one_thing() -> None:
    rasters = toy_rasters()
    canvas = Canvas(rasters, torch.device("cpu"))
    apart = (Placed(2, 0.25, 0.25, 0.4), Placed(2, 0.75, 0.75, 0.4))
    pictures = canvas.draw(
        [plan_of(Composition("", Backdrop(), placed)) for placed in (apart, apart[:1])]
    )
    assert [measures.count(one) for one in to_bytes(pictures)] == [2, 1]


def test_colors_are_named_as_people_name_them() -> None:
    palette = np.array(
        [(220, 38, 38), (132, 82, 46), (250, 212, 50), (14, 14, 16), (246, 130, 182)]
    )
    names = measures.color_names(palette.astype(np.uint8))
    assert list(names) == ["red", "brown", "yellow", "black", "pink"]


def test_the_prompts_are_several_hundred_and_none_is_repeated() -> None:
    prompts = [one.prompt for one in asked()]
    assert len(prompts) > 500
    assert len(set(prompts)) == len(prompts)


def test_no_held_out_prompt_is_of_a_thing_that_the_color_score_asks_for() -> None:
    toy = toy_rasters()
    held_out = held_out_colors(cast_of(toy))
    assert [one.things[0] for one in held_out] == ["ball", "box", "ring", "wedge"]
    assert len({one.expected for one in held_out}) == 4
    apple = dataclasses.replace(
        toy,
        things=[dataclasses.replace(toy.things[0], words=("apple",)), *toy.things[1:]],
    )
    assert held_out_colors(cast_of(apple))[0].things == ("box",)


def test_a_held_out_prompt_that_a_right_image_fails_is_left_out() -> None:
    toy = toy_rasters()
    facts = [*toy.facts]
    ring = next(at for at, fact in enumerate(facts) if fact.thing == "ring")
    facts[ring] = dataclasses.replace(facts[ring], hue=20.0)  # it is green: recolored, it is wrong
    cast = cast_of(dataclasses.replace(toy, facts=facts))
    held_out = list(enumerate(held_out_colors(cast)))
    colors = [(at, dataclasses.replace(one, score="color")) for at, one in held_out]

    asked_of_models = measurable(cast, Canvas(cast.rasters, torch.device("cpu")), held_out + colors)

    kept = [number for number, one in held_out if one.things != ("ring",)]
    assert [number for number, _ in asked_of_models] == kept + [number for number, _ in colors]


def test_the_last_timestep_is_pure_noise() -> None:
    powers = schedule.alphas_cumprod()
    assert powers[-1] == 0
    assert schedule.timesteps_of(4) == [999, 749, 499, 249]
    assert schedule.loss_weights(powers, torch.tensor([999])) == 1


def test_the_shipped_tokenizer_ends_every_caption() -> None:
    encoder = Encoder(SHIPPED / "tokenizer")
    ids = encoder.encode(["a cat", ""])
    assert ids.shape == (2, LENGTH)
    assert ids[1].tolist() == [encoder.start] + [encoder.end] * (LENGTH - 1)
    assert ids[0, 0] == encoder.start


def test_compositions_are_values() -> None:
    placed = Placed(0, 0.5, 0.5, 0.8)
    assert dataclasses.replace(placed, x=0.25) == Placed(0, 0.25, 0.5, 0.8)


def test_a_thing_of_several_hues_takes_a_color_where_its_main_hue_is() -> None:
    pixels, facts = draw_sprite(Sprite("ball", "flat", "webp", _rose()))
    assert facts.has_other_hues
    assert facts.hue is not None
    rasters = toy_rasters()
    rasters = dataclasses.replace(
        rasters, facts=[facts, *rasters.facts[1:]],
        sprites=np.concatenate([pixels[None], rasters.sprites[1:]]),
    )  # fmt: skip
    blue = recoloring(cast_of(rasters), 0, "blue")
    plain, recolored = to_bytes(
        Canvas(rasters, torch.device("cpu")).draw(
            [plan_of(Composition("", Backdrop(), (Placed(0, 0.5, 0.5, 1.0, change),)))
             for change in (None, blue)]
        )
    )  # fmt: skip
    bloom, leaf = (100, 128), (240, 128)
    assert list(measures.color_names(np.stack([plain[bloom], plain[leaf]]))) == ["red", "green"]
    assert measures.color_names(recolored[bloom][None]) == ["blue"]
    assert tuple(recolored[leaf]) == tuple(plain[leaf])


def _rose() -> bytes:
    """A red square over a green one, as WebP."""
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:44] = (220, 38, 38)
    pixels[44:] = (52, 168, 70)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "WEBP", lossless=True)
    return file.getvalue()


def test_a_stage_ends_annealed_whatever_its_budget(tmp_path: Path) -> None:
    stage = Stage("any", tmp_path, budget_s=100, log=print)
    stage.step, stage.spent_s = 5000, 40
    assert stage.rate == 1.0
    stage.spent_s = 100
    assert stage.rate == pytest.approx(0.01)
    assert stage.done
