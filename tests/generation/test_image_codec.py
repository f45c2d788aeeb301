"""An image file contains the parameters of its image."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from darkroom.generation import image_codec
from darkroom.generation.params import GenerationParams
from darkroom.status import OutputFormat

PIXELS = np.tile(np.arange(64, dtype=np.uint8)[:, None, None], (1, 32, 3))


def params(output_format=OutputFormat.PNG, prompt="a red apple"):
    return GenerationParams(
        prompt=prompt,
        negative_prompt="",
        model="darkroom-demo",
        width=32,
        height=64,
        num_inference_steps=12,
        guidance_scale=4.0,
        seed=2**53 - 1,
        output_format=output_format,
    )


@pytest.mark.parametrize("output_format", OutputFormat)
def test_the_parameters_come_back_out(tmp_path, output_format):
    wanted = params(output_format)
    file = tmp_path / "image"
    file.write_bytes(image_codec.encode(PIXELS, wanted, job_id="job_1", revision="abc"))

    found = image_codec.read_parameters(file)

    assert found == {"id": "job_1", "revision": "abc", **wanted.model_dump(mode="json")}


@pytest.mark.parametrize("output_format", OutputFormat)
def test_the_file_is_of_the_wanted_format_and_size(tmp_path, output_format):
    file = tmp_path / "image"
    file.write_bytes(image_codec.encode(PIXELS, params(output_format), job_id="j", revision="r"))

    with Image.open(file) as image:
        assert image.size == (32, 64)
        assert image.get_format_mimetype() == image_codec.CONTENT_TYPES[output_format]


def test_a_png_holds_the_exact_pixels(tmp_path):
    file = tmp_path / "image.png"
    file.write_bytes(image_codec.encode(PIXELS, params(), job_id="j", revision="r"))

    with Image.open(file) as image:
        assert np.array_equal(np.asarray(image), PIXELS)


@given(st.text(st.characters(blacklist_categories=("Cs",)), min_size=1, max_size=300))
def test_any_prompt_survives_in_the_file(tmp_path_factory, prompt):
    file = tmp_path_factory.mktemp("p") / "image.png"
    wanted = params(prompt=prompt)
    file.write_bytes(image_codec.encode(PIXELS, wanted, job_id="j", revision="r"))

    assert image_codec.read_parameters(file)["prompt"] == prompt


def test_another_programs_image_has_no_parameters(tmp_path):
    file = tmp_path / "other.png"
    Image.new("RGB", (8, 8)).save(file)

    assert image_codec.read_parameters(file) is None
