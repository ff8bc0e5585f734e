"""The embedded data set: drawn pedestrians in Market-1501's layout, to try everything without a download.

    python -m reid_dist.data.synthetic --out data/synthetic --ids 64 --cams 4 --seed 0

Identities differ in clothes, hair, skin, build, shoes, hat and bag; cameras in light, colour cast, scene, favourite
view, tilt, blur and noise; images in pose, view, crop and occlusion. pids 1..ids are the training split, ids+1..2 ids
the test split, whose first image per camera is the query. A look depends on (seed, pid, difficulty) alone, a camera on
(seed, camera, difficulty), so that more identities, cameras or images leave the others as they were.

The same arguments give the same bytes wherever the same Pillow runs: all random numbers are raw words of numpy's
Philox, a counter-based generator (the part of numpy's generators that stays the same across versions); corners are
rounded to whole supersampled pixels, where the last bit of a sine no longer shows; pixels are summed and multiplied
element by element, without BLAS.
"""

from __future__ import annotations

import argparse
import colorsys
import json
import math
import shutil
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

VERSION = 1  # counts changes of the pictures that the arguments do not tell
WIDTH, HEIGHT = 64, 128  # pixels
MAX_IDS, MAX_CAMS, MAX_IMAGES = 4999, 9, 9999  # what the digits of a Market-1501 name hold

Colour = tuple[int, int, int]
Point = tuple[float, float]
T = TypeVar("T")

# One stream a purpose, so that a new purpose never changes the numbers of an old one.
_LOOK, _FAMILY, _CAMERA, _SCENE, _IMAGE, _NOISE = range(6)

_FINE = 3  # supersampling: figures are drawn so many times larger, then averaged
_SCENE_WIDTH = 4 * WIDTH  # an image shows a window of its camera's scene
_FAMILY_SIZE = 4  # identities that may share clothes

_CLOTH: tuple[Colour, ...] = (
    (30, 30, 34), (214, 212, 206), (120, 122, 126), (38, 54, 108), (176, 36, 40), (92, 138, 196), (58, 110, 62),
    (226, 186, 52), (118, 78, 50), (222, 132, 164), (110, 62, 134), (222, 112, 38), (46, 146, 150), (196, 176, 138),
)  # fmt: skip
_SKIN: tuple[Colour, ...] = ((244, 206, 176), (222, 172, 134), (184, 128, 90), (128, 84, 58), (82, 54, 40))
_HAIR: tuple[Colour, ...] = (
    (28, 24, 22),
    (84, 52, 30),
    (150, 104, 56),
    (214, 182, 112),
    (150, 60, 32),
    (168, 166, 164),
)
_PATTERNS = ("plain", "plain", "stripes", "pinstripes", "checks", "logo", "block", "jacket")
_LOWERS = ("trousers", "trousers", "trousers", "shorts", "skirt", "long skirt")
_BAGS = ("none", "none", "backpack", "backpack", "handbag", "satchel")
_HATS = ("none", "none", "none", "cap", "beanie")
_VIEWS = ("front", "back", "side")


class Draws:
    """Random numbers that depend on their key only: (seed, purpose, up to three numbers that say whose they are)."""

    def __init__(self, seed: int, purpose: int, *whose: int) -> None:
        counter = np.array([0, *whose, 0, 0, 0][:4], dtype=np.uint64)
        self._philox = np.random.Philox(key=np.array([seed, purpose], dtype=np.uint64), counter=counter)

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * ((int(self._philox.random_raw()) >> 11) * 2.0**-53)

    def chance(self, prob: float) -> bool:
        return self.uniform(0, 1) < prob

    def choice(self, options: Sequence[T]) -> T:
        return options[int(self.uniform(0, len(options)))]

    def noise(self, shape: tuple[int, ...]) -> np.ndarray:
        """Nearly normal numbers, mean 0, standard deviation 1: sums of four bytes, exact on every machine."""
        size = math.prod(shape)
        octets = self._philox.random_raw(-(-size // 2)).astype("<u8").view(np.uint8)[: 4 * size].reshape(4, *shape)
        deviation = math.sqrt(4 * (256**2 - 1) / 12)
        return ((octets.sum(axis=0, dtype=np.int32) - 510) / deviation).astype(np.float32)


@dataclass(frozen=True)
class Look:
    """What stays the same about an identity in all images."""

    height: float  # of the body, in parts of the average
    width: float
    skin: Colour
    hair: Colour
    hair_length: float  # end of the hair, in parts of the body's height from the crown
    hat: str
    hat_colour: Colour
    upper: Colour
    accent: Colour
    pattern: str
    sleeve: float  # covered part of the arm
    hem: float  # end of the upper garment, in parts of the body's height from the crown
    lower: str
    lower_colour: Colour
    shoes: Colour
    bag: str
    bag_colour: Colour


# What an identity shares with its family, attribute by attribute or not at all.
_SHARED = (
    ("upper", "sleeve", "hem"),
    ("pattern", "accent"),
    ("lower", "lower_colour"),
    ("hair", "hair_length"),
    ("hat", "hat_colour"),
    ("bag", "bag_colour"),
)


@dataclass(frozen=True)
class Camera:
    """What stays the same about a camera in all images."""

    scene: Image.Image  # HEIGHT x _SCENE_WIDTH, as bright as daylight
    bush: Colour  # of what stands in the way at times
    mix: tuple[tuple[float, float, float], ...]  # colour cast: rows red, green, blue of what the sensor makes of light
    black: float  # grey level of black
    gradient: float  # light at the top less light at the bottom, in parts of the mean
    view: str  # of most images
    tilt: float  # how much wider the top of a body looks than its bottom, in parts
    lean: float  # sideways, in parts of the height
    blur: float  # pixels
    noise: float  # grey levels


def make_look(seed: int, pid: int, difficulty: float) -> Look:
    """The look of an identity. The more difficult, the fewer colours there are and the more a family shares."""
    draws = Draws(seed, _LOOK, pid)
    own = _draw_look(draws, difficulty)
    family = _draw_look(Draws(seed, _FAMILY, (pid - 1) // _FAMILY_SIZE), difficulty)
    shared = [name for names in _SHARED if draws.chance(min(0.45 * difficulty, 0.9)) for name in names]
    return replace(own, **{name: getattr(family, name) for name in shared})


def _draw_look(draws: Draws, difficulty: float) -> Look:
    palette = _CLOTH[: max(4, round(len(_CLOTH) / max(difficulty, 1)))]

    def dyed() -> Colour:
        r, g, b = draws.choice(palette)
        light = draws.uniform(0.85, 1.15)
        return _grey_levels(*(c * light + draws.uniform(-10, 10) for c in (r, g, b)))

    return Look(
        height=draws.uniform(0.92, 1.06),
        width=draws.uniform(0.85, 1.25),
        skin=draws.choice(_SKIN),
        hair=draws.choice(_HAIR),
        hair_length=draws.choice((0.0, 0.1, 0.1, 0.16, 0.24, 0.3)),
        hat=draws.choice(_HATS),
        hat_colour=dyed(),
        upper=dyed(),
        accent=dyed(),
        pattern=draws.choice(_PATTERNS),
        sleeve=draws.choice((0.0, 0.4, 0.4, 1.0, 1.0)),
        hem=draws.choice((0.5, 0.5, 0.54, 0.68)),
        lower=draws.choice(_LOWERS),
        lower_colour=dyed(),
        shoes=dyed(),
        bag=draws.choice(_BAGS),
        bag_colour=dyed(),
    )


def make_camera(seed: int, camera: int, difficulty: float) -> Camera:
    """Camera number `camera`, from 1. The more difficult, the stronger its cast, blur and noise."""
    draws = Draws(seed, _CAMERA, camera)
    light = 1 + difficulty * draws.uniform(-0.3, 0.2)
    gains = [max(light * (1 + difficulty * draws.uniform(-0.22, 0.22)), 0.1) for _ in range(3)]
    pale = min(difficulty * draws.uniform(0.0, 0.35), 0.9)  # towards grey
    leak = [difficulty * draws.uniform(-0.08, 0.08) for _ in range(3)]  # each channel takes from the next one
    mix = [[gains[i] * ((1 - pale) * (i == j) + pale / 3) for j in range(3)] for i in range(3)]
    for i in range(3):
        mix[i][(i + 1) % 3] += leak[i]
        mix[i][i] -= leak[i]
    scene_draws = Draws(seed, _SCENE, camera)
    return Camera(
        scene=_draw_scene(scene_draws, (camera + seed) % 6),
        bush=_hsv(scene_draws, (0.2, 0.4), (0.2, 0.5), (0.2, 0.5)),
        mix=tuple((row[0], row[1], row[2]) for row in mix),
        black=difficulty * draws.uniform(0, 30),
        gradient=min(difficulty, 2) * draws.uniform(-0.25, 0.25),
        view=_VIEWS[(camera + int(draws.uniform(0, 2))) % 3],
        tilt=draws.uniform(0.0, 0.25),
        lean=draws.uniform(-0.05, 0.05),
        blur=difficulty * draws.uniform(0.2, 0.9),
        noise=difficulty * draws.uniform(2, 9),
    )


def _draw_scene(draws: Draws, kind: int) -> Image.Image:
    """A street, a park, a hall, a wall, shops or a car park: far things above the horizon, the ground below it."""
    w, h = _SCENE_WIDTH * _FINE, HEIGHT * _FINE
    horizon = int(h * draws.uniform(0.3, 0.6))
    far, near = _hsv(draws, (0, 1), (0.05, 0.35), (0.4, 0.9)), _hsv(draws, (0.05, 0.15), (0.0, 0.25), (0.35, 0.75))
    if kind == 1:
        far, near = _hsv(draws, (0.25, 0.4), (0.3, 0.6), (0.3, 0.5)), _hsv(draws, (0.2, 0.3), (0.3, 0.6), (0.4, 0.7))
    image = Image.new("RGB", (w, h), far)
    draw = ImageDraw.Draw(image)
    step = int(draws.uniform(50, 90))
    for x in range(0, w, step):
        shade = _shade(far, draws.uniform(0.6, 1.25))
        if kind == 0:  # house fronts with windows
            draw.rectangle((x, 0, x + step, horizon), shade)
            for y in range(10, horizon - 30, 45):
                draw.rectangle((x + step // 4, y, x + 3 * step // 4, y + 26), _shade(shade, 0.5))
        elif kind == 1:  # trees
            draw.rectangle((x + step // 2 - 5, 20, x + step // 2 + 5, horizon), (86, 64, 46))
            draw.ellipse((x - 15, -60, x + step + 15, int(horizon * draws.uniform(0.45, 0.9))), shade)
        elif kind == 2:  # pillars of a hall
            draw.rectangle((x, 0, x + step // 3, horizon), _shade(far, 1.25))
            draw.rectangle((x + step // 3, horizon - 60, x + step, horizon), shade)
        elif kind == 3:  # bricks
            for row, y in enumerate(range(0, horizon, 18)):
                left = x + (row % 2) * step // 2
                draw.rectangle((left, y, left + step - 4, y + 14), _shade(far, draws.uniform(0.75, 1.1)))
        elif kind == 4:  # shop windows under a sign
            draw.rectangle((x + 5, 50, x + step - 5, horizon - 14), _shade(shade, 0.4))
            draw.rectangle((x, 16, x + step, 40), _hsv(draws, (0, 1), (0.4, 0.9), (0.5, 0.95)))
        else:  # parked cars
            paint = _hsv(draws, (0, 1), (0.1, 0.9), (0.3, 0.95))
            draw.rounded_rectangle((x + 2, horizon - 60, x + step - 2, horizon + 2), 14, paint)
            draw.rectangle((x + 12, horizon - 52, x + step - 12, horizon - 32), (44, 50, 60))
    draw.rectangle((0, horizon, w, h), near)
    for i in range(1, 9):  # joints or kerbs, closer to each other where they are farther
        y = horizon + int((h - horizon) * i * i / 64)
        draw.line((0, y, w, y), _shade(near, 0.8 if kind in (0, 2, 4) else draws.uniform(0.9, 1.1)), 3)
    if kind in (2, 4, 5):
        for x in range(-w, 2 * w, 70):
            mark = (230, 226, 210) if kind == 5 else _shade(near, 0.8)
            draw.line((w // 2 + (x - w // 2) // 2, horizon, x, h), mark, 3)
    return image.reduce(_FINE)


@dataclass(frozen=True)
class Pose:
    """How a body stands in one image. x, y: of the middle between the feet, in parts of the image."""

    view: str
    facing: int  # side view: -1 to the left, 1 to the right
    stride: float  # radians between the legs and the vertical, signed
    swing: float  # the same for the arms
    x: float
    y: float
    height: float  # parts of the image's height


def make_pose(draws: Draws, camera: Camera, look: Look, difficulty: float) -> Pose:
    """A step of the walk, seen mostly from the camera's favourite side, in the box of a careless detector."""
    view = camera.view if draws.chance(0.5) else draws.choice(_VIEWS)
    stride = draws.uniform(-0.45, 0.45)
    return Pose(
        view=view,
        facing=draws.choice((-1, 1)),
        stride=stride,
        swing=-stride * draws.uniform(0.6, 1.3),
        x=0.5 + difficulty * draws.uniform(-0.09, 0.09),
        y=0.96 + difficulty * draws.uniform(-0.04, 0.04),
        height=look.height * (0.88 + difficulty * draws.uniform(-0.06, 0.06)),
    )


class Figure:
    """Draws one body. Coordinates: x from its axis, y from its crown, both in parts of its height."""

    def __init__(self, layer: Image.Image, look: Look, camera: Camera, pose: Pose) -> None:
        self.layer, self.look, self.camera, self.pose = layer, look, camera, pose
        self.pen = ImageDraw.Draw(layer)
        self.side = pose.view == "side"
        self.half = look.width * (0.072 if self.side else 0.112)  # of the shoulders
        self.size = pose.height * layer.height

    def draw(self) -> None:
        """From far to near."""
        self.ellipse((0, 1.0), 0.16, 0.025, (0, 0, 0, 110))  # the shadow
        back = self.pose.view == "back"
        if self.look.bag == "backpack" and not back:
            self._backpack()
        self._leg(-1, 0.8)
        self._arm(-1, 0.8)
        self._leg(1, 1.0)
        if not back:
            self._long_hair()
        self._torso()
        self._head()
        if back:
            self._long_hair()
        self._arm(1, 1.0)
        if self.look.bag == "backpack" and back:
            self._backpack()
        if self.look.bag == "satchel":
            self._satchel()

    def px(self, point: Point) -> tuple[int, int]:
        x, y = point
        x = x * (1 + self.camera.tilt * (0.5 - y)) + self.camera.lean * (1 - y)
        left, bottom = self.pose.x * self.layer.width, self.pose.y * self.layer.height
        return round(left + x * self.size), round(bottom + (y - 1) * self.size)

    def polygon(self, points: Sequence[Point], colour: Colour) -> None:
        self.pen.polygon([self.px(p) for p in points], colour)

    def ellipse(self, centre: Point, rx: float, ry: float, colour: tuple[int, ...]) -> None:
        (x0, y0), (x1, y1) = self.px((centre[0] - rx, centre[1] - ry)), self.px((centre[0] + rx, centre[1] + ry))
        self.pen.ellipse((min(x0, x1), y0, max(x0, x1), y1), colour)

    def box(self, centre: Point, rx: float, ry: float, colour: Colour) -> None:
        (x, y), signs = centre, ((-1, -1), (1, -1), (1, 1), (-1, 1))
        self.polygon([(x + i * rx, y + j * ry) for i, j in signs], colour)

    def limb(self, a: Point, b: Point, wide: float, narrow: float, colour: Colour) -> None:
        """A tapered stroke with round ends, `wide` at a and `narrow` at b (half widths)."""
        dx, dy = b[0] - a[0], b[1] - a[1]
        length = math.hypot(dx, dy) or 1.0
        nx, ny = -dy / length, dx / length
        corners = [
            (p[0] + s * r * nx, p[1] + s * r * ny) for p, r, s in ((a, wide, 1), (b, narrow, 1), (b, narrow, -1))
        ]
        self.polygon([*corners, (a[0] - wide * nx, a[1] - wide * ny)], colour)
        self.ellipse(a, wide, wide, colour)
        self.ellipse(b, narrow, narrow, colour)

    def _reach(self, start: Point, angle: float, length: float, spread: float) -> Point:
        """Where a limb ends: swings lie in the picture seen from the side, across it seen from front or back."""
        x = math.sin(angle) * (self.pose.facing if self.side else 0.0) + spread
        return start[0] + length * x, start[1] + length * math.cos(angle)

    def _leg(self, sign: int, light: float) -> None:
        look, angle = self.look, sign * self.pose.stride
        hip = (0.0 if self.side else sign * 0.05 * look.width, 0.5)
        knee = self._reach(hip, angle, 0.24, 0.0)
        bend = 0.5 * abs(angle) if angle < 0 else 0.0
        ankle = self._reach(knee, angle - bend, 0.23, 0.0)
        thick = 0.046 * look.width
        skin, cloth = _shade(look.skin, light), _shade(look.lower_colour, light)
        self.limb(hip, knee, thick, 0.7 * thick, skin)
        self.limb(knee, ankle, 0.7 * thick, 0.45 * thick, skin)
        toe = 0.045 * self.pose.facing if self.side else sign * 0.01
        drop = 0.012 if self.pose.view == "back" else 0.022
        self.limb(ankle, (ankle[0] + toe, ankle[1] + drop), 0.026, 0.02, _shade(look.shoes, light))
        if look.lower == "trousers":
            self.limb(hip, knee, 1.1 * thick, 0.85 * thick, cloth)
            self.limb(knee, ankle, 0.85 * thick, 0.7 * thick, cloth)
        elif look.lower == "shorts":
            self.limb(hip, _between(hip, knee, 0.85), 1.15 * thick, 1.1 * thick, cloth)

    def _arm(self, sign: int, light: float) -> None:
        look, angle = self.look, sign * self.pose.swing
        shoulder = (0.0 if self.side else sign * (self.half - 0.01), 0.2)
        spread = 0.0 if self.side else sign * 0.14
        elbow = self._reach(shoulder, angle, 0.16, spread)
        hand = self._reach(elbow, angle + 0.3 * abs(angle), 0.15, 0.4 * spread)
        thick = 0.028 * look.width
        self.limb(shoulder, elbow, thick, 0.8 * thick, _shade(look.skin, light))
        self.limb(elbow, hand, 0.8 * thick, 0.7 * thick, _shade(look.skin, light))
        cloth = _shade(look.accent if look.pattern == "block" else look.upper, 0.9 * light)
        if look.sleeve:
            self.limb(
                shoulder, elbow if look.sleeve == 1 else _between(shoulder, elbow, 0.7), 1.25 * thick, thick, cloth
            )
        if look.sleeve == 1:
            self.limb(elbow, _between(elbow, hand, 0.85), thick, 0.9 * thick, cloth)
        # In the right hand: on the picture's left seen from the front, on its right seen from the back.
        holds = {"front": -1, "back": 1, "side": self.pose.facing}[self.pose.view]
        if look.bag == "handbag" and sign == holds:
            x, y = hand
            self.limb((x - 0.03, y + 0.04), (x, y), 0.006, 0.006, _shade(look.bag_colour, 0.6 * light))
            self.limb((x + 0.03, y + 0.04), (x, y), 0.006, 0.006, _shade(look.bag_colour, 0.6 * light))
            self.box((x, y + 0.085), 0.05, 0.048, _shade(look.bag_colour, light))

    def _torso(self) -> None:
        look, half = self.look, self.half
        hip = look.width * (0.07 if self.side else 0.092)
        if look.lower in ("skirt", "long skirt"):
            end, flare = (0.68, 1.25) if look.lower == "skirt" else (0.88, 1.5)
            skirt = [(-hip, 0.45), (hip, 0.45), (hip * flare, end), (-hip * flare, end)]
            self.polygon(skirt, look.lower_colour)
        else:
            self.box((0, 0.5), hip, 0.04, look.lower_colour)
        self.limb((0, 0.12), (0, 0.18), 0.028, 0.034, _shade(look.skin, 0.85))
        outline = [(-half, 0.185), (-0.45 * half, 0.16), (0.45 * half, 0.16), (half, 0.185), (0.88 * half, 0.4)]
        outline += [(hip * 1.08, look.hem), (-hip * 1.08, look.hem), (-0.88 * half, 0.4)]
        mask = Image.new("L", self.layer.size)
        ImageDraw.Draw(mask).polygon([self.px(p) for p in outline], 255)
        self.layer.paste(self._cloth(), (0, 0), mask)

    def _cloth(self) -> Image.Image:
        """The upper garment's cloth over the whole layer; patterns hang on the body."""
        look, half, front = self.look, self.half, self.pose.view == "front"
        cloth = Image.new("RGBA", self.layer.size, (*look.upper, 255))
        worn = Figure(cloth, look, self.camera, self.pose)
        if look.pattern in ("stripes", "checks"):
            for i in range(9):
                worn.box((0, 0.2 + 0.06 * i), 2 * half, 0.014, look.accent)
        if look.pattern in ("pinstripes", "checks"):
            for i in range(-4, 5):
                worn.box((i * 0.05, 0.4), 0.012, 0.4, look.accent)
        elif look.pattern == "block":
            worn.box((0, 0.24), 2 * half, 0.09, look.accent)
        elif look.pattern == "logo" and front:
            worn.box((0, 0.28), 0.5 * half, 0.045, look.accent)
        elif look.pattern == "jacket" and self.pose.view != "back":
            worn.box((0.7 * half * self.pose.facing if self.side else 0.0, 0.4), 0.35 * half, 0.4, look.accent)
        return cloth

    def _head(self) -> None:
        look, view, facing = self.look, self.pose.view, self.pose.facing
        self.ellipse((0, 0.075), 0.052, 0.068, look.skin)
        if look.hair_length:
            hair = {"front": ((0, 0.035), 0.054, 0.036), "back": ((0, 0.07), 0.056, 0.07)}
            centre, rx, ry = hair.get(view, ((-0.018 * facing, 0.055), 0.045, 0.056))
            self.ellipse(centre, rx, ry, look.hair)
        elif view == "front":
            self.ellipse((-0.02, 0.07), 0.007, 0.006, (40, 30, 26))
            self.ellipse((0.02, 0.07), 0.007, 0.006, (40, 30, 26))
        if look.hat != "none":
            self.ellipse((0, 0.032), 0.06, 0.04, look.hat_colour)
        if look.hat == "cap" and view != "back":
            self.box((0.06 * facing if self.side else 0.0, 0.058), 0.045, 0.009, _shade(look.hat_colour, 0.7))

    def _long_hair(self) -> None:
        if self.look.hair_length > 0.1:
            x = -0.03 * self.pose.facing if self.side else 0.0
            wide = 0.035 if self.side else 0.058
            self.limb((x, 0.07), (x, self.look.hair_length - 0.02), wide, 0.8 * wide, _shade(self.look.hair, 0.9))

    def _backpack(self) -> None:
        colour, half = self.look.bag_colour, self.half
        if self.pose.view == "back":
            self.box((0, 0.31), 0.75 * half, 0.12, colour)
            self.box((0, 0.37), 0.55 * half, 0.04, _shade(colour, 0.75))
        elif self.side:
            self.box((-self.pose.facing * (half + 0.03), 0.3), 0.05, 0.11, colour)
        else:
            self.box((0, 0.26), 1.12 * half, 0.07, _shade(colour, 0.8))

    def _satchel(self) -> None:
        """Hangs from the left shoulder on the right hip; seen from the left, only its strap shows."""
        look, view = self.look, self.pose.view
        hip = {"front": -1, "back": 1, "side": 0}[view]
        self.limb((-hip * 0.7 * self.half, 0.18), (hip * self.half, 0.46), 0.009, 0.009, _shade(look.bag_colour, 0.7))
        if not self.side or self.pose.facing == 1:
            self.box((hip * 1.05 * self.half, 0.5), 0.055, 0.045, look.bag_colour)


def draw_image(seed: int, look: Look, camera: Camera, whose: tuple[int, int, int], difficulty: float) -> Image.Image:
    """One picture, WIDTH x HEIGHT. whose: pid, camera number and image number, which fix all that varies."""
    draws = Draws(seed, _IMAGE, *whose)
    layer = Image.new("RGBA", (WIDTH * _FINE, HEIGHT * _FINE))
    if draws.chance(0.12 * difficulty):  # somebody walks behind
        passer = _draw_look(draws, difficulty)
        pose = make_pose(draws, camera, passer, difficulty)
        aside = draws.choice((-1, 1)) * draws.uniform(0.3, 0.5)
        Figure(layer, passer, camera, replace(pose, x=0.5 + aside, y=0.9, height=0.8 * pose.height)).draw()
    Figure(layer, look, camera, make_pose(draws, camera, look, difficulty)).draw()
    if draws.chance(0.12 * difficulty):
        _occlude(layer, draws, camera)
    window = int(draws.uniform(0, _SCENE_WIDTH - WIDTH))
    pixels = _compose(layer.reduce(_FINE), camera.scene.crop((window, 0, window + WIDTH, HEIGHT)))
    pixels = _develop(pixels, camera, 1 + 0.1 * difficulty * draws.uniform(-1, 1))
    soft = Image.fromarray(_to_bytes(pixels)).filter(ImageFilter.GaussianBlur(camera.blur))
    noise = Draws(seed, _NOISE, *whose).noise((HEIGHT, WIDTH, 3))
    return Image.fromarray(_to_bytes(np.asarray(soft, np.float32) + np.float32(camera.noise) * noise))


def _occlude(layer: Image.Image, draws: Draws, camera: Camera) -> None:
    """A bush before the feet or a post before one side."""
    pen, (w, h) = ImageDraw.Draw(layer), layer.size
    if draws.chance(0.5):
        for _ in range(12):
            x, y, r = draws.uniform(0, w), draws.uniform(0.82, 1.0) * h, draws.uniform(0.08, 0.16) * w
            box = (round(x - r), round(y - r), round(x + r), round(y + r))
            pen.ellipse(box, _shade(camera.bush, draws.uniform(0.8, 1.2)))
    else:
        x = round(draws.uniform(0.1, 0.9) * w)
        pen.rectangle((x - w // 16, 0, x + w // 16, h), (104, 104, 108))


def _compose(figure: Image.Image, scene: Image.Image) -> np.ndarray:
    """Figure before scene, (HEIGHT, WIDTH, 3) float32; bodies get rounder by being darker towards their edges."""
    solid = np.asarray(figure.getchannel("A").filter(ImageFilter.GaussianBlur(2.5)), np.float32)[:, :, None] / 255
    drawn = np.asarray(figure, np.float32)
    alpha = drawn[:, :, 3:] / 255
    return drawn[:, :, :3] * (0.45 + 0.55 * solid) * alpha + np.asarray(scene, np.float32) * (1 - alpha)


def _develop(pixels: np.ndarray, camera: Camera, exposure: float) -> np.ndarray:
    """What the camera makes of daylight: its colour cast, black level and uneven light."""
    height = np.linspace(1 + camera.gradient, 1 - camera.gradient, HEIGHT, dtype=np.float32)[:, None] * exposure
    red, green, blue = (pixels[:, :, i] for i in range(3))
    cast = [row[0] * red + row[1] * green + row[2] * blue for row in camera.mix]
    return np.stack([channel * height * ((255 - camera.black) / 255) + camera.black for channel in cast], axis=2)


def _to_bytes(pixels: np.ndarray) -> np.ndarray:
    return np.clip(pixels + 0.5, 0, 255).astype(np.uint8)


def _grey_levels(*values: float) -> Colour:
    r, g, b = (min(max(round(v), 0), 255) for v in values)
    return r, g, b


def _shade(colour: Colour, light: float) -> Colour:
    return _grey_levels(*(c * light for c in colour))


def _hsv(draws: Draws, hue: Point, saturation: Point, value: Point) -> Colour:
    """A colour from ranges of hue, saturation and value, each 0 to 1."""
    return _grey_levels(
        *(255 * c for c in colorsys.hsv_to_rgb(*(draws.uniform(*ends) for ends in (hue, saturation, value))))
    )


def _between(a: Point, b: Point, part: float) -> Point:
    return a[0] + (b[0] - a[0]) * part, a[1] + (b[1] - a[1]) * part


def check_arguments(ids: int, cams: int, images: int, seed: int, difficulty: float) -> None:
    """Raises ValueError that names the argument, its value and what was expected."""
    for name, value, low, high, why in (
        ("ids", ids, 2, MAX_IDS, "as many again are tested on, and a pid has four digits"),
        ("cams", cams, 2, MAX_CAMS, "a query is searched in other cameras, and a camera has one digit"),
        ("images", images, 2, MAX_IMAGES, "one query and at least one for the gallery"),
        ("seed", seed, 0, 2**64 - 1, "a key of Philox"),
    ):
        if not low <= value <= high:
            raise ValueError(f"--{name} {value}; expected {low} to {high}: {why}")
    if not 0 <= difficulty <= 4:
        raise ValueError(f"--difficulty {difficulty}; expected 0 to 4")


def holds_dataset(out: Path, facts: dict[str, Any]) -> bool:
    """Whether `out` holds the data set of these facts. Raises ValueError when it holds something else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        found = json.loads((out / "synthetic.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if found == facts:
        return True
    what = f"holds the data set {json.dumps(found)}" if found else "is in use"
    raise ValueError(f"--out {str(out)!r} {what}; expected a new or empty folder, or this very data set")


def draw_dataset(
    out: Path, ids: int = 64, cams: int = 4, images: int = 4, seed: int = 0, difficulty: float = 1.0
) -> Path:
    """Draws the data set into `out`, which appears complete or not at all, and returns `out`.

    ids: training identities, and as many others for the test; images: of each identity in each camera;
    difficulty: 0 (clean) to 4, scales casts, blur, noise, jitter and likeness. Does nothing when `out` holds this very
    data set. Raises ValueError for bad arguments and for an `out` that holds anything else, OSError when it cannot write.
    """
    check_arguments(ids, cams, images, seed, difficulty)
    facts = {
        "version": VERSION, "ids": ids, "cams": cams, "images": images, "seed": seed, "difficulty": float(difficulty),
    }  # fmt: skip
    out = Path(out).resolve()
    if holds_dataset(out, facts):
        return out
    part = out.parent / f".{out.name}.{uuid.uuid4().hex[:12]}.part"
    part.mkdir(parents=True)
    try:
        _write_images(part, ids, cams, images, seed, difficulty)
        (part / "synthetic.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        part.rename(out)  # onto an empty folder too; never onto one that holds files
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return out


def _write_images(root: Path, ids: int, cams: int, images: int, seed: int, difficulty: float) -> None:
    cameras = {number: make_camera(seed, number, difficulty) for number in range(1, cams + 1)}
    for folder in ("bounding_box_train", "query", "bounding_box_test"):
        (root / folder).mkdir()
    for pid in range(1, 2 * ids + 1):
        look = make_look(seed, pid, difficulty)
        for number, camera in cameras.items():
            for image in range(images):
                folder = "bounding_box_train" if pid <= ids else "bounding_box_test" if image else "query"
                # Market-1501's names: pid, camera, sequence, frame, and the detection's number, 00 for drawn boxes.
                name = f"{pid:04d}_c{number}s1_{25 * image + 1:06d}_{int(folder != 'query'):02d}.jpg"
                picture = draw_image(seed, look, camera, (pid, number, image), difficulty)
                picture.save(root / folder / name, quality=90)


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code: 0, or 2 after one line on stderr."""
    parser = argparse.ArgumentParser("python -m reid_dist.data.synthetic", description="draws the embedded data set")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new or empty folder")
    parser.add_argument("--ids", type=int, default=64, help="training identities; as many others for the test")
    parser.add_argument("--cams", type=int, default=4, help="cameras")
    parser.add_argument("--images", type=int, default=4, help="images of each identity in each camera")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--difficulty", type=float, default=1.0, help="0 (clean) to 4")
    args = parser.parse_args(argv)
    there = (args.out / "synthetic.json").exists()
    try:
        draw_dataset(**vars(args))
    except OSError as error:
        print(
            f"reid_dist: error: --out {str(args.out)!r}: {error.strerror}; expected a folder to write", file=sys.stderr
        )
        return 2
    except ValueError as error:
        print(f"reid_dist: error: {error}", file=sys.stderr)
        return 2
    print(f"{args.out}: {'holds this data set already' if there else 'drawn'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
