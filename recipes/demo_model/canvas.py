"""Compositions as pixels, many at a time, on whatever device trains."""

import math
from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from recipes.demo_model.composition import MAX_PLACED, Composition, Placed
from recipes.demo_model.raster import HUE_REACH, SIDE, Rasters

#: One composition as numbers, so that batches of them cross processes and devices cheaply.
BACKDROPS: Final = ("plain", "gradient", "dots", "stripes", "scene")
FINISHES: Final = ("none", "pixels", "gray", "sticker")
_HEAD: Final = 10  # backdrop, scene, first RGB, second RGB, finish, how many placed
#: sprite, x, y, size, recoloring (0 none, 1 hue, 2 paint), 4 numbers, shadow, near (turns; -1 all)
_EACH: Final = 11
PLAN_LENGTH: Final = _HEAD + MAX_PLACED * _EACH
_GRAY: Final = (0.3, 0.59, 0.11)
_GRAYISH: Final = 0.15  #: saturation below which no hue is visible
Plan = NDArray[np.float32]


def plan_of(composition: Composition) -> Plan:
    """[PLAN_LENGTH] numbers that say how to draw it."""
    backdrop = composition.backdrop
    plan = np.zeros(PLAN_LENGTH, np.float32)
    plan[:_HEAD] = (
        BACKDROPS.index(backdrop.kind),
        backdrop.scene,
        *backdrop.first,
        *backdrop.second,
        FINISHES.index(composition.finish),
        len(composition.placed),
    )
    for at, placed in enumerate(composition.placed):
        start = _HEAD + at * _EACH
        plan[start : start + _EACH] = _row(placed)
    return plan


def _row(placed: Placed) -> tuple[float, ...]:
    change = placed.recoloring
    mode = 0 if change is None else 2 if change.paint else 1
    numbers = (0.0, 1.0, 1.0, 0.0) if change is None else change.numbers
    place = (placed.sprite, placed.x, placed.y, placed.size)
    near = -1.0 if change is None or change.near is None else change.near / 360
    return (*place, mode, *numbers, float(placed.casts_shadow), near)


class Canvas:
    """Holds all sprites and scenes on a device, and draws with them."""

    def __init__(self, rasters: Rasters, device: torch.device) -> None:
        self.device = device
        self._sprites = _upload(rasters.sprites, device)
        self._scenes = _upload(rasters.scenes, device)
        extents = [(facts.height, facts.width) for facts in rasters.facts]
        self._extents = torch.tensor(extents, device=device)
        middles = (torch.arange(SIDE, device=device) + 0.5) / SIDE
        self._y, self._x = torch.meshgrid(middles, middles, indexing="ij")

    @torch.no_grad()
    def draw(self, plans: Sequence[Plan] | NDArray[np.float32]) -> Tensor:
        """[len(plans), 3, SIDE, SIDE] between -1 and 1."""
        plan = torch.from_numpy(np.asarray(plans, np.float32))
        pictures = self._backdrops(plan)
        for at in range(MAX_PLACED):
            here = plan[:, _HEAD - 1] > at
            if here.any():
                rows = plan[here, _HEAD + at * _EACH : _HEAD + (at + 1) * _EACH]
                stickers = plan[here, 8] == FINISHES.index("sticker")
                self._place(pictures, here.nonzero()[:, 0], rows, stickers)
        return _finish(pictures, plan[:, 8]).clamp(0, 1) * 2 - 1

    def _backdrops(self, plan: Tensor) -> Tensor:
        first, second = (plan[:, at : at + 3].to(self.device)[..., None, None] for at in (2, 5))
        kinds = plan[:, 0]
        pictures = first.expand(-1, -1, SIDE, SIDE).contiguous()
        for kind, share in self._patterns().items():
            chosen = (kinds == BACKDROPS.index(kind)).nonzero()[:, 0].to(self.device)
            pictures[chosen] = torch.lerp(first[chosen], second[chosen], share)
        scenic = (kinds == BACKDROPS.index("scene")).nonzero()[:, 0]
        scenes = plan[scenic, 1].long().to(self.device)
        pictures[scenic.to(self.device)] = self._scenes[scenes].float() / 255
        return pictures

    def _patterns(self) -> dict[str, Tensor]:
        """Return the share of the second color at each pixel, with soft edges."""
        dots = ((self._x * 6) % 1 - 0.5) ** 2 + ((self._y * 6) % 1 - 0.5) ** 2
        stripes = (((self._x + self._y) * 4) % 1 - 0.5).abs()
        return {
            "gradient": self._y,
            "dots": ((0.27 - dots.sqrt()) * 26 + 0.5).clamp(0, 1),
            "stripes": ((0.25 - stripes) * 24 + 0.5).clamp(0, 1),
        }

    def _place(self, pictures: Tensor, which: Tensor, rows: Tensor, stickers: Tensor) -> None:
        """Lay one sprite over each of these images, in place."""
        rows, which = rows.to(self.device), which.to(self.device)
        sprites = self._sprites[rows[:, 0].long()].float() / 255
        changed = rows[:, 4] > 0
        sprites[changed] = _recolor(sprites[changed], rows[changed])
        layer = _scaled(sprites, x=rows[:, 1], y=rows[:, 2], size=rows[:, 3])
        under = pictures[which] * (1 - self._shadows(rows))
        rim = _rim(layer[:, 3:]) * stickers.to(self.device)[:, None, None, None]
        under = under * (1 - rim) + rim
        pictures[which] = under * (1 - layer[:, 3:]) + layer[:, :3]

    def _shadows(self, rows: Tensor) -> Tensor:
        """How much darker the ground is below each sprite, [n, 1, SIDE, SIDE]."""
        height, width = self._extents[rows[:, 0].long()].unbind(1)
        size = rows[:, 3]
        radius_x = (width * size * 0.46)[:, None, None]
        radius_y = (radius_x * 0.18).clamp(min=0.012)
        feet = (rows[:, 2] + height * size / 2)[:, None, None] - radius_y * 0.2
        x = rows[:, 1][:, None, None]
        distance = ((self._x - x) / radius_x) ** 2 + ((self._y - feet) / radius_y) ** 2
        return (0.3 * (1 - distance).clamp(0, 1) * rows[:, 9][:, None, None])[:, None]


def _upload(pixels: NDArray[np.uint8], device: torch.device) -> Tensor:
    """Piece by piece: the file may be larger than a comfortable copy."""
    whole = torch.empty(pixels.shape, dtype=torch.uint8, device=device)
    for start in range(0, len(pixels), 512):
        piece = np.array(pixels[start : start + 512])
        whole[start : start + 512] = torch.from_numpy(piece).to(device)
    return whole


def _recolor(sprites: Tensor, rows: Tensor) -> Tensor:
    """Turn hues and scale saturation and value, or paint; premultiplied in and out."""
    alpha = sprites[:, 3:]
    colors = sprites[:, :3] / alpha.clamp(min=1e-3)
    turn, saturate, scale, lift = (rows[:, 5 + at][:, None, None] for at in range(4))
    value, brightest = colors.max(1)
    spread = (value - colors.min(1).values).clamp(min=1e-5)
    red, green, blue = colors.unbind(1)
    sector = torch.where(
        brightest == 0,
        ((green - blue) / spread) % 6,
        torch.where(brightest == 1, (blue - red) / spread + 2, (red - green) / spread + 4),
    )
    own_hue, own_saturation = sector / 6 % 1, spread / value.clamp(min=1e-5)
    hue = (own_hue + turn) % 1
    saturation = (own_saturation * saturate).clamp(0, 1)
    value = (value * scale + lift).clamp(0, 1)
    offsets = torch.tensor([5.0, 3.0, 1.0], device=sprites.device)[None, :, None, None]
    ramp = (offsets + hue[:, None] * 6) % 6
    turned = value[:, None] * (1 - saturation[:, None] * torch.minimum(ramp, 4 - ramp).clamp(0, 1))
    stays = _stays(own_hue, own_saturation, rows[:, 10][:, None, None])
    turned = torch.where(stays[:, None], colors, turned)
    painted = rows[:, 5:8][:, :, None, None].expand_as(turned)
    is_paint = (rows[:, 4] == 2)[:, None, None, None]
    return torch.cat([torch.where(is_paint, painted, turned) * alpha, alpha], 1)


def _stays(hue: Tensor, saturation: Tensor, near: Tensor) -> Tensor:
    """Mask pixels where a thing of several hues keeps its own (leaves, faces), [n, SIDE, SIDE]."""
    away = ((hue - near + 0.5) % 1 - 0.5).abs()
    return (near >= 0) & ((away > HUE_REACH / 360) | (saturation < _GRAYISH))


def _scaled(sprites: Tensor, *, x: Tensor, y: Tensor, size: Tensor) -> Tensor:
    """Each sprite at its size about its center. Small ones are averaged first, against aliasing."""
    zero = torch.zeros_like(size)
    rows = torch.stack([1 / size, zero, -(2 * x - 1) / size], 1)
    columns = torch.stack([zero, 1 / size, -(2 * y - 1) / size], 1)
    grid = F.affine_grid(
        torch.stack([rows, columns], 1), [len(size), 4, SIDE, SIDE], align_corners=False
    )
    layer = F.grid_sample(sprites, grid, padding_mode="zeros", align_corners=False)
    small = size < 0.56
    if small.any():
        halved = F.avg_pool2d(sprites[small], 2)
        layer[small] = F.grid_sample(halved, grid[small], align_corners=False)
    return layer


def _rim(alpha: Tensor) -> Tensor:
    """Return a sticker's white border: everything within 7 pixels of the thing."""
    return F.avg_pool2d(F.max_pool2d(alpha, 15, 1, 7), 3, 1, 1)


def _finish(pictures: Tensor, finish: Tensor) -> Tensor:
    pixels = (finish == FINISHES.index("pixels")).nonzero()[:, 0].to(pictures.device)
    if len(pixels):
        coarse = F.avg_pool2d(pictures[pixels], 8)
        pictures[pixels] = F.interpolate(coarse, scale_factor=8.0, mode="nearest")
    grays = (finish == FINISHES.index("gray")).nonzero()[:, 0].to(pictures.device)
    if len(grays):
        weights = torch.tensor(_GRAY, device=pictures.device)[None, :, None, None]
        pictures[grays] = (pictures[grays] * weights).sum(1, keepdim=True).expand(-1, 3, -1, -1)
    return pictures


def contact_sheet(pictures: Tensor, *, columns: int, side: int = 192) -> NDArray[np.uint8]:
    """[rows * side, columns * side, 3] from images [n, 3, h, w] between -1 and 1."""
    small = F.interpolate(pictures.float().cpu(), size=(side, side), mode="area")
    rows = math.ceil(len(small) / columns)
    blank = torch.ones(rows * columns - len(small), 3, side, side)
    cells = torch.cat([small, blank]).reshape(rows, columns, 3, side, side)
    sheet = cells.permute(0, 3, 1, 4, 2).reshape(rows * side, columns * side, 3)
    return ((sheet.clamp(-1, 1) + 1) * 127.5).round().byte().numpy()
