"""Steps in their order: each reads the files of the earlier ones in the work folder."""

import json
import shutil
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from PIL import Image

from recipes.demo_model import archive, networks
from recipes.demo_model import evaluate as scoring
from recipes.demo_model import train as training
from recipes.demo_model.canvas import Canvas, contact_sheet, plan_of
from recipes.demo_model.cast import Cast, cast_of
from recipes.demo_model.composer import compose
from recipes.demo_model.distil import distil as train_few_steps
from recipes.demo_model.measures import PixelArray
from recipes.demo_model.networks import TOY, Denoiser, Networks, Sizes
from recipes.demo_model.pictures import LatentBank, Supply, encode
from recipes.demo_model.polish import polish_decoder
from recipes.demo_model.progress import Stage
from recipes.demo_model.prompt_sets import asked as all_prompts
from recipes.demo_model.prompt_sets import held_out_colors
from recipes.demo_model.raster import Rasters, rasterise
from recipes.demo_model.show_prompts import SHOW_PROMPTS
from recipes.demo_model.sources import attribution_text
from recipes.demo_model.tokens import Encoder, captions_of, train_tokenizer
from recipes.demo_model.toy import TOY_PROMPTS, toy_rasters
from recipes.demo_model.train import GENTLE, SMOKE, TrainingConfig

_SMOKE_SECONDS: Final = 0.3
_SEED: Final = 7
_ATTRIBUTION: Final = "ATTRIBUTION.md"
_STARTED_FROM: Final = "started-from.md"  # whose weights are in the new ones; so are its sources


@dataclass(frozen=True)
class TrainingContext:
    """Context of the training steps: sizes, schedule, tokenizer, images and device."""

    folder: Path
    device: torch.device
    sizes: Sizes
    training_config: TrainingConfig
    encoder: Encoder
    supply: Supply
    canvas: Canvas

    @property
    def empty(self) -> torch.Tensor:
        """Token ids of the empty caption, [1, 77]."""
        return torch.from_numpy(self.encoder.encode([""])).long().to(self.device)

    def bank(self, vae: AutoencoderKL) -> LatentBank:
        together = min(256, self.training_config.bank)
        bank = LatentBank(
            self.supply,
            self.canvas,
            training.compiled(lambda pictures: encode(vae, pictures), self.training_config),
            capacity=self.training_config.bank,
            together=together,
        )
        say(f"bank of {self.training_config.bank} pictures is full")
        return bank


def say(line: str) -> None:
    print(line, flush=True)


def data(asked: Namespace) -> None:
    contents = archive.build(asked.work / "packages")
    archive.write(contents, asked.work / "sprites.zip")
    found = archive.digest(contents)
    say(archive.summary(contents))
    agrees = "as expected" if found == archive.EXPECTED_DIGEST else "NOT what it was"
    say(f"SHA-256 of names and pictures: {found} ({agrees})")


def tokenizer(asked: Namespace) -> None:
    """Use the tokenizer of the model to continue from: its text encoder knows no other words."""
    folder = asked.work / "tokenizer"
    if asked.start is not None:
        shutil.copytree(asked.start / "tokenizer", folder, dirs_exist_ok=True)
    else:
        count = 500 if asked.smoke else 300_000
        train_tokenizer(captions_of(_cast(asked), count), folder)
    say(f"{Encoder(folder).size} entries in {folder}")


def preview(asked: Namespace) -> None:
    cast = _cast(asked)
    made = [compose(cast, f"preview-{number}") for number in range(asked.count)]
    canvas = Canvas(cast.rasters, torch.device("cpu"))
    _save_sheet(canvas.draw([plan_of(one) for one in made]), asked.work / "preview.png")
    for number, one in enumerate(made):
        say(f"{number // 8 + 1}.{number % 8 + 1} {one.caption}")


def train(asked: Namespace) -> None:
    with _training_context(asked) as ctx:
        made = _latest(ctx, start=asked.start)
        seconds = _SMOKE_SECONDS if asked.smoke else asked.seconds
        stage = Stage(asked.part, ctx.folder, budget_s=seconds, log=say)
        if asked.part == "vae":
            trained = training.train_vae(
                made.vae, ctx.supply, ctx.canvas, stage, ctx.training_config
            )
            torch.save(trained.state_dict(), ctx.folder / "vae-weights.pt")
            return
        training.train_denoiser(
            made.denoiser, ctx.bank(made.vae), ctx.empty, stage, ctx.training_config,
            look=lambda denoiser: _look(ctx, made, denoiser),
        )  # fmt: skip


def polish(asked: Namespace) -> None:
    with _training_context(asked) as ctx:
        made = _latest(ctx)
        seconds = _SMOKE_SECONDS if asked.smoke else asked.seconds
        stage = Stage("decoder", ctx.folder, budget_s=seconds, log=say)
        polished = polish_decoder(
            made.vae, made.denoiser, ctx.supply, ctx.canvas, stage,
            batch=2 if asked.smoke else 32,
        )  # fmt: skip
        torch.save(polished.state_dict(), ctx.folder / "vae-weights.pt")


def distil(asked: Namespace) -> None:
    with _training_context(asked) as ctx:
        made = _latest(ctx)
        seconds = _SMOKE_SECONDS if asked.smoke else asked.seconds
        stage = Stage("few-steps", ctx.folder, budget_s=seconds, log=say)
        student = train_few_steps(
            made.denoiser, ctx.bank(made.vae), ctx.empty, stage, ctx.training_config,
            guidance=scoring.GUIDANCE,
        )  # fmt: skip
        torch.save(student.state_dict(), ctx.folder / "few-steps-weights.pt")


def export(asked: Namespace) -> None:
    encoder = Encoder(asked.work / "tokenizer")
    made = networks.build(TOY if asked.smoke else Sizes(), encoder)
    _load_weights(made, asked.work)
    folder, older = asked.work / "exported", asked.work / _STARTED_FROM
    attribution = attribution_text(started_from=older.read_text("utf-8") if older.exists() else "")
    networks.export(made, asked.work / "tokenizer", folder, attribution=attribution)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    say(f"{made.million_parameters:.1f} M parameters, {size / 1e6:.1f} MB in {folder}")


def sample(asked: Namespace) -> None:
    """Each prompt's images stand one above the other, the models in the order given."""
    device, prompts = _device(asked), SHOW_PROMPTS[:8] if asked.smoke else SHOW_PROMPTS
    sheets = [
        scoring.draw(
            model, prompts, [_SEED] * len(prompts), steps=asked.steps[0],
            guidance=asked.guidance, device=device,
        )
        for model in _models(asked)
    ]  # fmt: skip
    rows = [sheet[at : at + 8] for at in range(0, len(prompts), 8) for sheet in sheets]
    pictures = torch.stack([_from_bytes(picture) for row in rows for picture in row])
    _save_sheet(pictures, asked.out)


def evaluate(asked: Namespace) -> None:
    device, cast = _device(asked), _cast(asked)
    canvas = Canvas(cast.rasters, device)
    numbered = scoring.measurable(cast, canvas, _numbered_prompts(asked, cast))
    prompts, seeds = [one for _, one in numbered], [number for number, _ in numbered]
    references = None  # learning takes minutes on a CPU
    if {one.score for one in prompts} & {"place", "thing"}:
        references = scoring.references_from(cast, canvas, scenes_seen=160 if asked.smoke else 3000)
    rows = [("composed", "", scoring.ceiling(cast, canvas, references, prompts, seeds))]
    for model in _models(asked):
        for steps in asked.steps:
            pictures = scoring.draw(
                model, [one.prompt for one in prompts], seeds, steps=steps,
                guidance=asked.guidance, device=device,
            )  # fmt: skip
            rows.append((model.name, str(steps), scoring.score(pictures, prompts, references)))
            say(scoring.table(rows[-1:]).splitlines()[-1])
    say(scoring.table(rows))
    if asked.out:
        asked.out.write_text(json.dumps(rows, indent=1), "utf-8")


def _numbered_prompts(asked: Namespace, cast: Cast) -> list[scoring.Numbered]:
    """Those of the sets asked for. A prompt's number, its seed, does not depend on them."""
    usual = TOY_PROMPTS if asked.smoke else all_prompts()
    everything = (*usual, *held_out_colors(cast))
    chosen = [(at, one) for at, one in enumerate(everything) if one.score in asked.sets]
    return chosen[:: asked.every]


# --- what the steps share


@contextmanager
def _training_context(asked: Namespace) -> Iterator[TrainingContext]:
    """Fork the composing processes first, before anything touches the device."""
    encoder = Encoder(asked.work / "tokenizer")
    cast = _cast(asked)
    processes = 0 if asked.smoke else asked.processes
    supply = Supply(cast, encoder, processes=processes, seed=_SEED)
    device = _device(asked)
    torch.manual_seed(_SEED)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    try:
        yield TrainingContext(
            folder=asked.work,
            device=device,
            sizes=TOY if asked.smoke else Sizes(),
            training_config=_training_config(asked, device),
            encoder=encoder,
            supply=supply,
            canvas=Canvas(cast.rasters, device),
        )
    finally:
        supply.close()


def _training_config(asked: Namespace, device: torch.device) -> TrainingConfig:
    if device.type != "cuda" or asked.smoke:
        return SMOKE
    return GENTLE if getattr(asked, "gently", False) else TrainingConfig()


def _latest(ctx: TrainingContext, *, start: Path | None = None) -> Networks:
    """Networks with the weights that the steps before left, on the device."""
    made = networks.build(ctx.sizes, ctx.encoder)
    if start is not None:
        networks.warm_start(made, start)
        if (start / _ATTRIBUTION).exists():
            shutil.copy(start / _ATTRIBUTION, ctx.folder / _STARTED_FROM)
    _load_weights(made, ctx.folder)
    modules: tuple[torch.nn.Module, ...] = (made.vae, made.denoiser)
    for module in modules:
        module.to(device=ctx.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    say(f"{made.million_parameters:.1f} M parameters on {ctx.device}")
    return made


def _load_weights(made: Networks, folder: Path) -> None:
    for name, module in (("vae-weights.pt", made.vae), ("denoiser-weights.pt", made.denoiser)):
        if (folder / name).exists():
            module.load_state_dict(torch.load(folder / name, weights_only=True))


def _look(ctx: TrainingContext, made: Networks, denoiser: Denoiser) -> None:
    """Keep the averaged weights, so that a run cut short is not lost, and draw a sheet by them."""
    torch.save(denoiser.state_dict(), ctx.folder / "denoiser-weights.pt")
    torch.save(made.vae.state_dict(), ctx.folder / "vae-weights.pt")
    is_a_try = ctx.training_config is SMOKE
    prompts = SHOW_PROMPTS[:2] if is_a_try else SHOW_PROMPTS
    pictures = scoring.draw_with(
        Networks(made.vae, denoiser), ctx.encoder, prompts, [_SEED] * len(prompts),
        steps=2 if is_a_try else 8, device=ctx.device,
    )  # fmt: skip
    _save_sheet(torch.stack([_from_bytes(one) for one in pictures]), ctx.folder / "progress.png")


def _rasters(asked: Namespace) -> Rasters:
    if asked.smoke:
        return toy_rasters()
    return rasterise(asked.work / "sprites.zip", asked.work / "pixels", processes=asked.processes)


def _cast(asked: Namespace) -> Cast:
    return cast_of(_rasters(asked))


def _models(asked: Namespace) -> list[Path]:
    return asked.models or [asked.work / "exported"]


def _device(asked: Namespace) -> torch.device:
    return torch.device(asked.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _from_bytes(picture: PixelArray) -> torch.Tensor:
    return torch.from_numpy(picture).permute(2, 0, 1) / 127.5 - 1


def _save_sheet(pictures: torch.Tensor, path: Path) -> None:
    Image.fromarray(contact_sheet(pictures, columns=8)).save(path)
    say(f"{len(pictures)} pictures in {path}")
