"""The embedded data set: drawn pedestrians in Market-1501's layout, to try everything without a download.

    python -m reid_dist.data.synthetic --out data/synthetic --ids 64 --cams 4 --seed 0

Identities differ in clothes, hair, skin, build, shoes, hat and bag; cameras in light, colour cast, scene, favourite
view, perspective, blur and noise; images in pose, view, crop and occlusion. pids 1..ids are the training split,
ids+1..2 ids the test split, whose first image in each camera is the query. A look depends on (seed, pid, difficulty)
alone, a camera on (seed, camera, difficulty): more identities, cameras or images leave the others as they were.

The same arguments give the same bytes wherever the same Pillow runs. All random numbers are raw words of numpy's
Philox, a counter-based generator (the part of numpy's generators that stays the same across versions). Corners are
rounded to whole supersampled pixels, where the last bit of a sine no longer shows. Pixels are computed element by
element, without BLAS.
"""

from __future__ import annotations

import argparse
import colorsys
import json
import math
import shlex
import shutil
import sys
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFilter

VERSION = 1  # raise it with every change of the pictures: a folder of another version is another data set
WIDTH, HEIGHT = 64, 128  # pixels

Colour = tuple[int, ...]
Point = tuple[float, float]
T = TypeVar("T")

# One stream a purpose, so that a new purpose never changes the numbers of an old one.
_LOOK, _FAMILY, _CAMERA, _SCENE, _IMAGE, _NOISE = range(6)

_FINE = 2  # supersampling: everything is drawn so many times larger, then averaged
_SCENE_WIDTH = 4 * WIDTH  # an image shows a window of its camera's scene
_FAMILY_SIZE = 4  # identities that may have clothes in common


def _colours(text: str) -> list[Colour]:
    return [ImageColor.getrgb(f"#{name}") for name in text.split()]


_CLOTH = _colours("1e1e22 d6d4ce 787a7e 26366c b02428 5c8ac4 3a6e3e e2ba34 764e32 de84a4 6e3e86 de7026 2e9296 c4b08a")
_SKIN = _colours("f4ceb0 deac86 b8805a 80543a 523628")
_HAIR = _colours("1c1816 54341e 966838 d6b670 963c20 a8a6a4")

# Kinds of things; those named twice are twice as frequent. Lengths end at a part of the body's height from its crown.
_HAIR_ENDS = {"bald": 0.0, "short": 0.1, "bob": 0.17, "long": 0.28}
_UPPERS = {"top": (0.0, 0.5), "t-shirt": (0.5, 0.5), "pullover": (1.0, 0.54), "coat": (1.0, 0.68)}  # sleeve, hem
_LOWERS = ("trousers", "trousers", "shorts", "skirt", "long skirt")
_PATTERNS = ("plain", "plain", "stripes", "pinstripes", "checks", "logo", "block", "open")
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
        """Nearly normal float32, mean 0, standard deviation 1: sums of four bytes, exact on every machine."""
        size = math.prod(shape)
        octets = self._philox.random_raw(-(-size // 2)).astype("<u8").view(np.uint8)[: 4 * size]
        deviation = math.sqrt(4 * (256**2 - 1) / 12)
        return (octets.reshape(4, *shape).sum(axis=0, dtype=np.int32) - 510).astype(np.float32) / np.float32(deviation)


class Thing(NamedTuple):
    """A garment, hair or a bag."""

    kind: str
    colour: Colour


class Look(NamedTuple):
    """What stays the same about an identity in all images."""

    height: float  # of the body, in parts of the average
    width: float
    skin: Colour
    shoes: Colour
    hair: Thing
    hat: Thing
    upper: Thing
    pattern: Thing  # of the upper garment
    lower: Thing
    bag: Thing


def make_look(seed: int, pid: int, difficulty: float) -> Look:
    """The look of an identity. The more difficult, the fewer colours there are and the more a family shares."""
    draws = Draws(seed, _LOOK, pid)
    own = _draw_look(draws, difficulty)
    family = _draw_look(Draws(seed, _FAMILY, (pid - 1) // _FAMILY_SIZE), difficulty)
    things = ("hair", "hat", "upper", "pattern", "lower", "bag")
    shared = [name for name in things if draws.chance(min(0.2 * difficulty, 0.9))]
    return own._replace(**{name: getattr(family, name) for name in shared})


def _draw_look(draws: Draws, difficulty: float) -> Look:
    palette = _CLOTH[: max(4, round(len(_CLOTH) / max(difficulty, 1)))]

    def dyed() -> Colour:
        light = draws.uniform(0.85, 1.15)
        return _levels(c * light + draws.uniform(-10, 10) for c in draws.choice(palette))

    return Look(
        height=draws.uniform(0.93, 1.06),
        width=draws.uniform(0.85, 1.25),
        skin=draws.choice(_SKIN),
        shoes=dyed(),
        hair=Thing(draws.choice(list(_HAIR_ENDS)), draws.choice(_HAIR)),
        hat=Thing(draws.choice(_HATS), dyed()),
        upper=Thing(draws.choice(list(_UPPERS)), dyed()),
        pattern=Thing(draws.choice(_PATTERNS), dyed()),
        lower=Thing(draws.choice(_LOWERS), dyed()),
        bag=Thing(draws.choice(_BAGS), dyed()),
    )


class Camera(NamedTuple):
    """What stays the same about a camera in all images."""

    scene: np.ndarray  # (HEIGHT, _SCENE_WIDTH, 3) float32 grey levels, in daylight
    bush: Colour  # of what stands in the way at times
    cast: list[list[float]]  # 3 x 3: red, green and blue that the sensor makes of red, green and blue light
    black: float  # grey level of black
    gradient: float  # how much lighter the top of the picture is than its middle, in parts
    view: str  # of most images
    tilt: float  # how much wider the top of a body looks than its bottom, in parts
    lean: float  # of upright things to the side, in parts of their height
    blur: float  # pixels
    noise: float  # grey levels


def make_camera(seed: int, camera: int, difficulty: float) -> Camera:
    """Camera number `camera`, from 1. The more difficult, the stronger its cast, blur and noise."""
    draws, scene_draws = Draws(seed, _CAMERA, camera), Draws(seed, _SCENE, camera)
    light = 1 + difficulty * draws.uniform(-0.13, 0.09)
    gains = [max(light * (1 + difficulty * draws.uniform(-0.1, 0.1)), 0.1) for _ in range(3)]
    pale = min(difficulty * draws.uniform(0.0, 0.12), 0.9)  # towards grey
    cast = [[gains[i] * ((1 - pale) * (i == j) + pale / 3) for j in range(3)] for i in range(3)]
    return Camera(
        scene=_draw_scene(scene_draws, (camera + seed) % 5),
        bush=_hsv(scene_draws, (0.2, 0.4), (0.2, 0.5), (0.2, 0.5)),
        cast=cast,
        black=difficulty * draws.uniform(0, 12),
        gradient=min(difficulty, 2) * draws.uniform(-0.12, 0.12),
        view=_VIEWS[camera % 3],
        tilt=draws.uniform(0.0, 0.25),
        lean=draws.uniform(-0.05, 0.05),
        blur=difficulty * draws.uniform(0.2, 0.5),
        noise=difficulty * draws.uniform(1, 4),
    )


def _draw_scene(draws: Draws, kind: int) -> np.ndarray:
    """0 a street, 1 a park, 2 a wall, 3 shops, 4 a car park: far things above the horizon, the ground below it."""
    w, h = _SCENE_WIDTH * _FINE, HEIGHT * _FINE
    horizon, step = int(h * draws.uniform(0.3, 0.6)), int(w * draws.uniform(0.07, 0.12))
    far = _hsv(draws, (0.25, 0.4) if kind == 1 else (0, 1), (0.05, 0.4), (0.4, 0.9))
    ground = _hsv(draws, (0.2, 0.3) if kind == 1 else (0.05, 0.15), (0.0, 0.3), (0.35, 0.75))
    image = Image.new("RGB", (w, h), far)
    pen = ImageDraw.Draw(image)
    for x in range(0, w, step):
        shade, right, middle = _shade(far, draws.uniform(0.6, 1.25)), x + step, x + step // 2
        if kind == 0:  # house fronts with windows
            pen.rectangle((x, 0, right, horizon), shade)
            for y in range(8, horizon - 16, 30):
                pen.rectangle((x + step // 4, y, right - step // 4, y + 16), _shade(shade, 0.5))
        elif kind == 1:  # trees
            pen.rectangle((middle - 3, 0, middle + 3, horizon), (86, 64, 46))
            pen.ellipse((x - 10, -40, right + 10, int(horizon * draws.uniform(0.45, 0.9))), _shade(shade, 0.7))
        elif kind == 2:  # bricks
            for y in range(0, horizon, 12):
                left = x + y % 24 * step // 24
                pen.rectangle((left, y, left + step - 3, y + 9), _shade(far, draws.uniform(0.75, 1.1)))
        elif kind == 3:  # windows under signs
            pen.rectangle((x + 3, 32, right - 3, horizon - 9), _shade(shade, 0.4))
            pen.rectangle((x, 10, right, 26), _hsv(draws, (0, 1), (0.4, 0.9), (0.5, 0.95)))
        else:
            paint = _hsv(draws, (0, 1), (0.1, 0.9), (0.3, 0.95))
            pen.rounded_rectangle((x + 1, horizon - 40, right - 1, horizon + 2), 9, paint)
            pen.rectangle((x + 8, horizon - 35, right - 8, horizon - 21), (44, 50, 60))
    pen.rectangle((0, horizon, w, h), ground)
    for i in range(1, 9):  # joints and shadows, closer to each other where they are farther
        y = horizon + (h - horizon) * i * i // 64
        pen.line((0, y, w, y), _shade(ground, 0.85 if kind in (0, 3) else draws.uniform(0.9, 1.1)), 2)
    for x in range(-w, 2 * w, 46) if kind in (0, 3, 4) else ():
        pen.line((w // 4 + x // 2, horizon, x, h), (230, 226, 210) if kind == 4 else _shade(ground, 0.85), 2)
    return np.asarray(image.reduce(_FINE), np.float32)


class Pose(NamedTuple):
    """How a body stands in one image."""

    view: str
    facing: int  # seen from the side: -1 to the left, 1 to the right
    stride: float  # angle of the near leg from the vertical, radians; the other one's is the opposite
    swing: float  # the same for the arms
    x: float  # of the feet, in parts of the image's width
    y: float  # of the feet, in parts of the image's height
    height: float  # of the body, in parts of the image's height


def _draw_pose(draws: Draws, camera: Camera, look: Look, difficulty: float) -> Pose:
    """A moment of a walk, seen mostly from the camera's favourite side, in the box of a careless detector."""
    stride = draws.uniform(-0.45, 0.45)
    return Pose(
        view=camera.view if draws.chance(0.5) else draws.choice(_VIEWS),
        facing=draws.choice((-1, 1)),
        stride=stride,
        swing=-stride * draws.uniform(0.6, 1.3),
        x=0.5 + difficulty * draws.uniform(-0.045, 0.045),
        y=0.965 + difficulty * draws.uniform(-0.02, 0.02),
        height=look.height * (0.9 + difficulty * draws.uniform(-0.035, 0.035)),
    )


class Figure:
    """Draws one body. Coordinates: x from its axis, y from its crown down, both in parts of its height."""

    def __init__(self, layer: Image.Image, look: Look, camera: Camera, pose: Pose) -> None:
        self.layer, self.look, self.camera, self.pose = layer, look, camera, pose
        self.pen = ImageDraw.Draw(layer)
        self.feet = pose.x * layer.width, pose.y * layer.height
        self.size = pose.height * layer.height
        self.front, self.back, self.side = (pose.view == view for view in _VIEWS)
        self.forward = pose.facing if self.side else 0  # where the body goes in the picture
        self.half = look.width * (0.072 if self.side else 0.112)  # of the shoulders
        self.hip = look.width * (0.07 if self.side else 0.092)

    def draw(self) -> None:
        """From far to near."""
        self.ellipse((0, 1.0), 0.16, 0.02, (0, 0, 0, 110))  # the shadow
        if not self.back:
            self._backpack()
        for sign, light in ((-1, 0.8), (1, 1.0)):
            self._leg(sign, light)
            if sign < 0 or not self.side:
                self._arm(sign, light)
        if not self.back:
            self._long_hair()
        self._torso()
        self._head()
        if self.back:
            self._backpack()
        if self.side:
            self._arm(1, 1.0)
        self._satchel()

    def pixel(self, point: Point) -> tuple[int, int]:
        x = point[0] * (1 + self.camera.tilt * (0.5 - point[1])) + self.camera.lean * (1 - point[1])
        return round(self.feet[0] + x * self.size), round(self.feet[1] + (point[1] - 1) * self.size)

    def ellipse(self, centre: Point, rx: float, ry: float, colour: Colour) -> None:
        x, y = self.pixel(centre)
        rx, ry = round(rx * self.size), round(ry * self.size)
        self.pen.ellipse((x - rx, y - ry, x + rx, y + ry), colour)

    def box(self, centre: Point, rx: float, ry: float, colour: Colour) -> None:
        (x, y), signs = centre, ((-1, -1), (1, -1), (1, 1), (-1, 1))
        self.pen.polygon([self.pixel((x + i * rx, y + j * ry)) for i, j in signs], colour)

    def limb(self, a: Point, b: Point, wide: float, narrow: float, colour: Colour) -> None:
        """A tapered stroke with round ends, `wide` at a and `narrow` at b (half widths)."""
        length = math.hypot(b[0] - a[0], b[1] - a[1])
        nx, ny = (a[1] - b[1]) / length, (b[0] - a[0]) / length
        corners = ((a, wide), (b, narrow), (b, -narrow), (a, -wide))
        self.pen.polygon([self.pixel((p[0] + r * nx, p[1] + r * ny)) for p, r in corners], colour)
        self.ellipse(a, wide, wide, colour)
        self.ellipse(b, narrow, narrow, colour)

    def _reach(self, start: Point, angle: float, length: float, spread: float = 0.0) -> Point:
        """Where a limb ends: it swings in the picture's plane seen from the side, else towards or from the viewer."""
        return start[0] + length * (math.sin(angle) * self.forward + spread), start[1] + length * math.cos(angle)

    def _leg(self, sign: int, light: float) -> None:
        look, angle, thick = self.look, sign * self.pose.stride, 0.046 * self.look.width
        hip = (0.0 if self.side else sign * 0.05 * look.width, 0.5)
        knee = self._reach(hip, angle, 0.24)
        ankle = self._reach(knee, min(angle, 1.5 * angle), 0.23)  # the rear knee bends
        toe = (ankle[0] + (0.045 * self.forward or sign * 0.01), ankle[1] + (0.012 if self.back else 0.022))
        skin, cloth = _shade(look.skin, light), _shade(look.lower.colour, light)
        if look.lower.kind == "trousers":
            self.limb(hip, knee, 1.1 * thick, 0.85 * thick, cloth)
            self.limb(knee, ankle, 0.85 * thick, 0.7 * thick, cloth)
        else:
            self.limb(hip, knee, thick, 0.7 * thick, skin)
            self.limb(knee, ankle, 0.7 * thick, 0.45 * thick, skin)
        if look.lower.kind == "shorts":
            self.limb(hip, _between(hip, knee, 0.85), 1.15 * thick, 1.1 * thick, cloth)
        self.limb(ankle, toe, 0.026, 0.02, _shade(look.shoes, light))

    def _arm(self, sign: int, light: float) -> None:
        look, angle, thick = self.look, sign * self.pose.swing, 0.027 * self.look.width
        spread = 0.0 if self.side else sign * 0.14
        shoulder = (0.0 if self.side else sign * (self.half - 0.01), 0.2)
        elbow = self._reach(shoulder, angle, 0.16, spread)
        hand = self._reach(elbow, angle + 0.3 * abs(angle), 0.15, 0.4 * spread)
        skin, cloth = _shade(look.skin, light), _shade(look.upper.colour, 0.9 * light)
        sleeve = _UPPERS[look.upper.kind][0]
        self.limb(shoulder, elbow, thick, 0.8 * thick, skin)
        self.limb(elbow, hand, 0.8 * thick, 0.7 * thick, skin)
        if sleeve:
            self.limb(shoulder, elbow if sleeve == 1 else _between(shoulder, elbow, 0.75), 1.25 * thick, thick, cloth)
        if sleeve == 1:
            self.limb(elbow, _between(elbow, hand, 0.85), thick, 0.9 * thick, cloth)
        # In the right hand: on the picture's left seen from the front, on its right seen from the back.
        right = self.forward or (1 if self.back else -1)
        if look.bag.kind == "handbag" and sign == right:
            self.limb(hand, (hand[0], hand[1] + 0.04), 0.006, 0.03, _shade(look.bag.colour, 0.6 * light))
            self.box((hand[0], hand[1] + 0.085), 0.055, 0.048, _shade(look.bag.colour, light))

    def _torso(self) -> None:
        look, half, hip, hem = self.look, self.half, self.hip, _UPPERS[self.look.upper.kind][1]
        end, flare = {"skirt": (0.68, 1.25), "long skirt": (0.88, 1.5)}.get(look.lower.kind, (0.54, 1.0))
        skirt = [(-hip, 0.45), (hip, 0.45), (hip * flare, end), (-hip * flare, end)]
        self.pen.polygon([self.pixel(p) for p in skirt], look.lower.colour)
        self.limb((0, 0.12), (0, 0.18), 0.028, 0.034, _shade(look.skin, 0.85))
        right = [(0.45 * half, 0.16), (half, 0.185), (0.88 * half, 0.4), (hip * 1.08, hem)]
        outline = [self.pixel(p) for p in (*right, *((-x, y) for x, y in reversed(right)))]
        self.pen.polygon(outline, look.upper.colour)
        if look.pattern.kind != "plain":
            mask, cloth = Image.new("L", self.layer.size), self.layer.copy()
            ImageDraw.Draw(mask).polygon(outline, 255)
            Figure(cloth, look, self.camera, self.pose)._pattern()
            self.layer.paste(cloth, (0, 0), mask)

    def _pattern(self) -> None:
        """Over the edges of the garment; the caller cuts it out."""
        half, (kind, colour) = self.half, self.look.pattern
        if kind in ("stripes", "checks"):
            for i in range(9):
                self.box((0, 0.2 + 0.06 * i), 2 * half, 0.014, colour)
        if kind in ("pinstripes", "checks"):
            for i in range(-4, 5):
                self.box((i * 0.05, 0.4), 0.012, 0.4, colour)
        elif kind == "block":
            self.box((0, 0.24), 2 * half, 0.09, colour)
        elif kind == "logo" and self.front:
            self.box((0, 0.28), 0.5 * half, 0.045, colour)
        elif kind == "open" and not self.back:  # what is worn below shows
            self.box((0.7 * half * self.forward, 0.4), 0.35 * half, 0.4, colour)

    def _head(self) -> None:
        look = self.look
        self.ellipse((0, 0.075), 0.052, 0.068, look.skin)
        if look.hair.kind != "bald":
            covers = {"front": (0.035, 0.054, 0.036), "back": (0.07, 0.056, 0.07), "side": (0.055, 0.045, 0.056)}
            y, rx, ry = covers[self.pose.view]
            self.ellipse((-0.018 * self.forward, y), rx, ry, look.hair.colour)
        if self.back:
            self._long_hair()
        if look.hat.kind != "none":
            self.ellipse((0, 0.032), 0.06, 0.04, look.hat.colour)
        if look.hat.kind == "cap" and not self.back:
            self.box((0.06 * self.forward, 0.058), 0.045, 0.009, _shade(look.hat.colour, 0.7))

    def _long_hair(self) -> None:
        end, x, wide = _HAIR_ENDS[self.look.hair.kind], -0.03 * self.forward, 0.035 if self.side else 0.058
        if end > 0.1:
            self.limb((x, 0.07), (x, end - 0.02), wide, 0.8 * wide, _shade(self.look.hair.colour, 0.9))

    def _backpack(self) -> None:
        (kind, colour), half = self.look.bag, self.half
        if kind != "backpack":
            return
        if self.back:
            self.box((0, 0.31), 0.75 * half, 0.12, colour)
            self.box((0, 0.37), 0.55 * half, 0.04, _shade(colour, 0.75))
        elif self.side:
            self.box((-self.forward * (half + 0.03), 0.3), 0.05, 0.11, colour)
        else:
            self.box((0, 0.26), 1.12 * half, 0.07, _shade(colour, 0.8))

    def _satchel(self) -> None:
        """Hangs from the left shoulder on the right hip; seen from the left, only its strap shows."""
        (kind, colour), half = self.look.bag, self.half
        right = 0 if self.side else 1 if self.back else -1
        if kind == "satchel":
            self.limb((-right * 0.7 * half, 0.18), (right * half, 0.46), 0.009, 0.009, _shade(colour, 0.7))
            if self.forward != -1:
                self.box((right * 1.05 * half, 0.5), 0.055, 0.045, colour)


def draw_image(seed: int, look: Look, camera: Camera, whose: tuple[int, int, int], difficulty: float) -> Image.Image:
    """One picture, WIDTH x HEIGHT. whose: pid, camera number and image number, which fix all that varies."""
    draws = Draws(seed, _IMAGE, *whose)
    layer = Image.new("RGBA", (WIDTH * _FINE, HEIGHT * _FINE))
    if draws.chance(0.06 * difficulty):  # somebody walks behind
        passer = _draw_look(draws, difficulty)
        pose = _draw_pose(draws, camera, passer, difficulty)
        aside = draws.choice((-1, 1)) * draws.uniform(0.3, 0.5)
        Figure(layer, passer, camera, pose._replace(x=0.5 + aside, y=0.9, height=0.8 * pose.height)).draw()
    Figure(layer, look, camera, _draw_pose(draws, camera, look, difficulty)).draw()
    if draws.chance(0.06 * difficulty):
        _occlude(layer, draws, camera)
    left, exposure = int(draws.uniform(0, _SCENE_WIDTH - WIDTH)), 1 + 0.06 * difficulty * draws.uniform(-1, 1)
    pixels = _develop(_compose(layer.reduce(_FINE), camera.scene[:, left : left + WIDTH]), camera, exposure)
    soft = Image.fromarray(_to_bytes(pixels)).filter(ImageFilter.GaussianBlur(camera.blur))
    noise = Draws(seed, _NOISE, *whose).noise((HEIGHT, WIDTH, 3))
    return Image.fromarray(_to_bytes(np.asarray(soft, np.float32) + camera.noise * noise))


def _occlude(layer: Image.Image, draws: Draws, camera: Camera) -> None:
    """A bush before the feet or a post before a side."""
    pen, (w, h), r = ImageDraw.Draw(layer), layer.size, layer.width // 8
    if draws.chance(0.5):
        for _ in range(12):
            x, y = round(draws.uniform(0, w)), round(draws.uniform(0.82, 1.0) * h)
            pen.ellipse((x - r, y - r, x + r, y + r), _shade(camera.bush, draws.uniform(0.8, 1.2)))
    else:
        x = round(draws.uniform(0.1, 0.9) * w)
        pen.rectangle((x - r // 2, 0, x + r // 2, h), (104, 104, 108))


def _compose(figure: Image.Image, scene: np.ndarray) -> np.ndarray:
    """Figure before scene, float32. Bodies look round because they are darker towards their edges."""
    depth = np.asarray(figure.getchannel("A").filter(ImageFilter.BoxBlur(3)), np.float32)[:, :, None] / 255
    drawn = np.asarray(figure, np.float32)
    alpha = drawn[:, :, 3:] / 255
    return drawn[:, :, :3] * (0.45 + 0.55 * depth) * alpha + scene * (1 - alpha)


def _develop(pixels: np.ndarray, camera: Camera, exposure: float) -> np.ndarray:
    """What the camera makes of daylight: its colour cast, black level and uneven light."""
    rows = np.linspace(1 + camera.gradient, 1 - camera.gradient, HEIGHT, dtype=np.float32)[:, None]
    light = rows * (exposure * (255 - camera.black) / 255)
    red, green, blue = (pixels[:, :, i] for i in range(3))
    return np.stack([(r * red + g * green + b * blue) * light + camera.black for r, g, b in camera.cast], axis=2)


def _to_bytes(pixels: np.ndarray) -> np.ndarray:
    return np.clip(pixels + 0.5, 0, 255).astype(np.uint8)


def _levels(values: Iterable[float]) -> Colour:
    return tuple(min(max(round(v), 0), 255) for v in values)


def _shade(colour: Colour, light: float) -> Colour:
    return _levels(c * light for c in colour)


def _hsv(draws: Draws, hue: Point, saturation: Point, value: Point) -> Colour:
    """A colour from ranges of hue, saturation and value, each 0 to 1."""
    h, s, v = (draws.uniform(*ends) for ends in (hue, saturation, value))
    return _levels(255 * c for c in colorsys.hsv_to_rgb(h, s, v))


def _between(a: Point, b: Point, part: float) -> Point:
    return a[0] + (b[0] - a[0]) * part, a[1] + (b[1] - a[1]) * part


def draw_dataset(
    out: Path, ids: int = 64, cams: int = 4, images: int = 4, seed: int = 0, difficulty: float = 1.0
) -> Path:
    """Draws the data set into `out`, which appears complete or not at all, and returns `out`.

    ids: training identities, and as many others for the test; images: of each identity in each camera; difficulty:
    0 (clean) to 4, scales casts, blur, noise, jitter and likeness. Does nothing when `out` holds this very data set.
    Raises ValueError for bad arguments and for an `out` that holds anything else, OSError when it cannot write.
    """
    check_arguments(ids, cams, images, seed, difficulty)
    difficulty = float(difficulty)  # 1 and 1.0 are the same data set
    facts = {"version": VERSION, "ids": ids, "cams": cams, "images": images, "seed": seed, "difficulty": difficulty}
    if holds_dataset(out, facts):
        return out
    place = Path(out).resolve()
    part = place.parent / f".{place.name}.{uuid.uuid4().hex[:12]}.part"
    part.mkdir(parents=True)
    try:
        _write_images(part, ids, cams, images, seed, difficulty)
        (part / "synthetic.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        part.rename(place)  # onto an empty folder too, never onto a full one
    except OSError:
        if not holds_dataset(out, facts):  # another process may have drawn it meanwhile
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return out


def check_arguments(ids: int, cams: int, images: int, seed: int, difficulty: float) -> None:
    """Raises ValueError that names the argument, its value and what was expected."""
    for name, value, low, high, why in (
        ("ids", ids, 2, 4999, "as many others are tested on, and a pid has four digits"),
        ("cams", cams, 2, 9, "queries are searched in other cameras, and a camera has one digit"),
        ("images", images, 2, 9999, "one is the query, the others are in the gallery"),
        ("seed", seed, 0, 2**64 - 1, "64 bits"),
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


def _write_images(root: Path, ids: int, cams: int, images: int, seed: int, difficulty: float) -> None:
    for folder in ("bounding_box_train", "query", "bounding_box_test"):
        (root / folder).mkdir()
    cameras = {number: make_camera(seed, number, difficulty) for number in range(1, cams + 1)}
    for pid in range(1, 2 * ids + 1):
        look = make_look(seed, pid, difficulty)
        for number, camera in cameras.items():
            for image in range(images):
                folder = "bounding_box_train" if pid <= ids else "bounding_box_test" if image else "query"
                # Market-1501's names: pid, camera, sequence, frame, and the detection's number, 00 for a query's box.
                name = f"{pid:04d}_c{number}s1_{25 * image + 1:06d}_{int(folder != 'query'):02d}.jpg"
                draw_image(seed, look, camera, (pid, number, image), difficulty).save(root / folder / name, quality=90)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:  # argparse would print its usage first
        raise ValueError(f"command line: {message}; expected the flags of --help")


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code: 0, or 2 after one line on stderr."""
    parser = _Parser(
        "python -m reid_dist.data.synthetic", description="Draws the embedded data set.", allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new or empty folder")
    parser.add_argument("--ids", type=int, default=64, help="training identities; as many others for the test")
    parser.add_argument("--cams", type=int, default=4, help="cameras")
    parser.add_argument("--images", type=int, default=4, help="images of each identity in each camera")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--difficulty", type=float, default=1.0, help="0 (clean) to 4")
    try:
        args = parser.parse_args(argv)
        there = (args.out / "synthetic.json").exists()
        draw_dataset(**vars(args))
    except (OSError, ValueError) as error:
        problem = f"--out: {error}; expected a folder to write" if isinstance(error, OSError) else error
        print(f"reid_dist: error: {problem}", file=sys.stderr)
        return 2
    print(f"{args.out}: {'holds this data set already' if there else 'drawn'}")
    print(f"next      python -m reid_dist.train --cfg configs/demo.yaml --root {shlex.quote(str(args.out))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
