"""The demo model's making, end to end on a toy: every documented step, in seconds."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from recipes.demo_model.__main__ import main
from recipes.demo_model.networks import TOY, Denoiser, Sizes, build, deepen, load
from recipes.demo_model.tokens import Encoder

#: its fixture trains a toy: 1 to 2 minutes on two cores
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder in which every step has been taken, with a toy."""
    folder = tmp_path_factory.mktemp("making")
    here = ["--smoke", "--work", str(folder)]
    main(["tokenizer", *here])
    main(["train", "vae", *here])
    main(["train", "denoiser", *here])
    main(["polish", *here])
    main(["distil", *here])
    main(["export", *here])
    return folder


def test_stock_diffusers_generates_with_the_exported_toy(work: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(
        work / "exported", dtype=torch.float32, low_cpu_mem_usage=False
    )
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(
        "a red ball", num_inference_steps=2, generator=torch.Generator().manual_seed(1)
    ).images[0]
    assert image.size == (256, 256)


def test_our_sampler_generates_the_same_images_as_diffusers(work: Path, tmp_path: Path) -> None:
    main(["sample", "--smoke", "--work", str(work), "--steps", "4", "--out",
          str(tmp_path / "sheet.png")])  # fmt: skip
    from recipes.demo_model.evaluate import draw

    ours = draw(work / "exported", ["a red ball"], [1], steps=4, device=torch.device("cpu"))[0]
    pipeline = StableDiffusionPipeline.from_pretrained(
        work / "exported", dtype=torch.float32, low_cpu_mem_usage=False
    )
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        "a red ball", num_inference_steps=4, guidance_scale=4.0,
        generator=torch.Generator().manual_seed(1),
    ).images[0]  # fmt: skip
    assert np.abs(ours.astype(int) - np.asarray(theirs).astype(int)).max() <= 2
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width == 8 * 192


def test_the_scores_are_written(work: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.json"
    main(["evaluate", "--smoke", "--work", str(work), "--steps", "2", "--out", str(out)])
    composed, exported = json.loads(out.read_text("utf-8"))
    assert composed[2]["mean"] == 1.0, "a measure fails a picture that is right by construction"
    assert set(exported[2]) == set(composed[2])


def test_held_out_colors_are_scored_when_asked_for(work: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.json"
    main(["evaluate", "--smoke", "--work", str(work), "--steps", "1", "--sets", "held_out_color",
          "--out", str(out)])  # fmt: skip
    composed, exported = json.loads(out.read_text("utf-8"))
    assert composed[2] == {"held_out_color": 1.0, "mean": 1.0}
    assert set(exported[2]) == set(composed[2])


def test_training_continues_from_its_checkpoint(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["train", "denoiser", "--smoke", "--work", str(work)])
    output = capsys.readouterr().out
    assert "continuing at step" in output


def test_a_deepened_unet_predicts_the_same_as_the_shallow_one(work: Path) -> None:
    encoder = Encoder(work / "tokenizer")
    shallow = load(work / "exported").denoiser
    deep = build(_toy_with_layers((1, 2, 2)), encoder).denoiser.eval()
    deepen(shallow.unet.state_dict(), (1, 1, 1), deep.unet)
    deep.text.load_state_dict(shallow.text.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(_predict(deep), _predict(shallow))


def _toy_with_layers(layers: tuple[int, int, int]) -> Sizes:
    return Sizes(TOY.vae_channels, TOY.unet_channels, layers, TOY.text_width, 1, TOY.groups)


def _predict(denoiser: Denoiser) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(2, 4, 32, 32, generator=generator)
    prediction: torch.Tensor = denoiser(
        latents, torch.tensor([10, 900]), torch.arange(2 * 77).reshape(2, 77)
    )
    return prediction
