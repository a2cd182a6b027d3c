"""Made-up street scenes with one class a pixel: houses, trees, cars and people along a road, through a pinhole camera.

Light, tint, haze, noise and the colours of things vary from scene to scene and overlap between the classes (grey
houses, grey cars, a grey sky), so that a pixel's colour says little; shape and place do: boosted trees on 40 scenes
reach 0.28 mIoU from the colour, 0.49 with the blurred colour and the position. Lamp posts and the edges of cars and
people are unlabelled, as in hand-made masks.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

IMAGE_CLASSES = ["sky", "building", "road", "pavement", "tree", "car", "person"]
SKY, BUILDING, ROAD, PAVEMENT, TREE, CAR, PERSON = range(len(IMAGE_CLASSES))
IMAGE_PALETTE = [[110, 170, 220], [170, 80, 70], [110, 90, 130], [220, 170, 190], [90, 140, 50], [40, 70, 170],
                 [235, 150, 30]]
VOID = 255
FINE = 2                        # drawn that many times larger, then reduced
EYE = 1.5                       # metres, height of the camera; all lengths are metres
FAR = 80.0
GRAIN = np.array([1, 4, 5, 5, 11, 2, 3])        # standard deviation of the texture of each class


class _Canvas:
    """Draws polygons and ellipses in space into a picture and its label map at once; farthest first."""

    def __init__(self, rng, width, height):
        self.rng = rng
        self.width, self.height = width * FINE, height * FINE
        self.focal = self.width * rng.uniform(0.85, 1.1)
        self.center = self.width * rng.uniform(0.35, 0.65), self.height * rng.uniform(0.46, 0.6)
        self.eye_x = rng.uniform(-4, 4)                     # where the camera stands, 0 is the middle of the road
        self.haze, self.haze_color = rng.choice([0.003, 0.008, 0.02]), np.full(3, 200.0)
        self.image = Image.new("RGB", (self.width, self.height))
        self.label = Image.new("L", (self.width, self.height), SKY)
        self.draw, self.draw_label = ImageDraw.Draw(self.image, "RGBA"), ImageDraw.Draw(self.label)

    def project(self, x, y, z):
        """Right, up from the ground and ahead -> pixel."""
        return self.center[0] + self.focal * (x - self.eye_x) / z, self.center[1] + self.focal * (EYE - y) / z

    def _color(self, color, z, alpha=255):
        clear = np.exp(-self.haze * z)
        return *np.clip(clear * np.asarray(color) + (1 - clear) * self.haze_color, 0, 255).astype(int).tolist(), alpha

    def polygon(self, points, color, label=None, alpha=255):
        """points (N, 3); without a label only the picture changes (markings, windows, shadows)."""
        flat = [self.project(*point) for point in points]
        self.draw.polygon(flat, fill=self._color(color, np.mean([point[2] for point in points]), alpha))
        if label is not None:
            self.draw_label.polygon(flat, fill=label)

    def ellipse(self, x, y, z, radius_x, radius_y, color, label=None, alpha=255):
        left, top = self.project(x - radius_x, y + radius_y, z)
        right, bottom = self.project(x + radius_x, y - radius_y, z)
        self.draw.ellipse((left, top, right, bottom), fill=self._color(color, z, alpha))
        if label is not None:
            self.draw_label.ellipse((left, top, right, bottom), fill=label)

    def wall(self, x, z, y, color, label=None):
        """Upright rectangle between the ends x (2,), z (2,) of its foot, from y[0] to y[1] above the ground."""
        self.polygon([(x[0], y[0], z[0]), (x[1], y[0], z[1]), (x[1], y[1], z[1]), (x[0], y[1], z[0])], color, label)

    def ground(self, x, z, color, label=None, alpha=255):
        """Rectangle on the ground; an opaque one in pieces, far ones hazier."""
        ends = z if alpha < 255 else np.geomspace(*z, 2 + int(3 * np.log(z[1] / z[0])))
        for near, far in zip(ends[:-1], ends[1:], strict=True):
            self.polygon([(x[0], 0, near), (x[1], 0, near), (x[1], 0, far), (x[0], 0, far)], color, label, alpha)


def _any_color(rng, saturation=0.5):
    """Grey to fairly bright, of any hue."""
    value = rng.uniform(50, 225)
    return np.clip(value + value * saturation * rng.uniform(-0.5, 0.5, 3), 0, 255)


def _sky(c, rng):
    top, bottom = [((95, 145, 215), (190, 215, 240)), ((150, 155, 165), (205, 205, 205)),
                   ((90, 95, 140), (240, 170, 120)), ((200, 205, 210), (225, 225, 220))][rng.integers(4)]
    c.haze_color = np.array(bottom, float)
    share = np.linspace(0, 1, c.height)[:, None] ** 0.8
    rows = (1 - share) * np.array(top) + share * np.array(bottom)                            # (H, 3)
    c.image.paste(Image.fromarray(np.repeat(rows[:, None], c.width, 1).astype(np.uint8)))
    for _ in range(rng.integers(0, 6)):
        x, y, long = rng.uniform(0, c.width), rng.uniform(0, 0.45 * c.height), rng.uniform(0.05, 0.2) * c.width
        for _ in range(6):
            dx, dy, radius = rng.normal(0, long), rng.normal(0, long / 8), rng.uniform(0.2, 0.5) * long
            c.draw.ellipse((x + dx - radius, y + dy - radius / 2, x + dx + radius, y + dy + radius / 2),
                           fill=(245, 240, 240, int(rng.integers(60, 150))))
    c.image.paste(c.image.filter(ImageFilter.GaussianBlur(0.012 * c.width)))


def _house(c, rng, side, edge, near, far):
    """Facade along the street and the end wall that faces the camera."""
    height = rng.uniform(4.5, 14)
    color = _any_color(rng, 0.35)
    x, back = side * edge, side * (edge + 9)
    end_light = rng.uniform(0.7, 1.15)
    c.wall((x, back), (near, near), (0, height), color * end_light, BUILDING)
    c.wall((x, x), (near, far), (0, height), color, BUILDING)
    if rng.random() < 0.6:                                  # a gable over the end wall, a roof along the facade
        roof, ridge = _any_color(rng, 0.3) * 0.6, (x + back) / 2
        top = height + rng.uniform(1.5, 3)
        c.polygon([(x, height, near), (back, height, near), (ridge, top, near)], color * end_light, BUILDING)
        c.polygon([(x, height, near), (x, height, far), (ridge, top, far), (ridge, top, near)], roof, BUILDING)
    if near > 45:
        return
    pane = rng.uniform(20, 90) + rng.uniform(-10, 10, 3)
    lit = rng.random() < 0.3
    floors, columns = int(height // 2.8), max(1, int((far - near) // 2.4))
    for floor in range(floors):
        y = floor * 2.8 + 0.9
        for column in range(columns):
            z = near + (far - near) * (column + np.array([0.25, 0.75])) / columns
            glass = (250, 220, 140) if lit and rng.random() < 0.3 else pane
            c.wall((x, x), z, (y, y + 1.4) if floor or column % 3 else (0, 2.1), glass)
        for left in (2.0, 5.0):
            c.wall((side * (edge + left), side * (edge + left + 1.3)), (near, near), (y, y + 1.4), pane)


def _tree(c, rng, x, z):
    height, spread = rng.uniform(3.5, 8), rng.uniform(1.0, 2.2)
    trunk = rng.uniform(40, 90) * np.array([1.1, 0.95, 0.8])
    crown = height - spread
    c.wall((x - 0.15, x + 0.15), (z, z), (0, crown), trunk, TREE)
    leaves = [(70, 110, 45), (50, 85, 50), (150, 120, 45), (160, 85, 40), (95, 120, 80)][rng.integers(5)]
    for _ in range(28):
        dx, dy = rng.normal(0, 0.45, 2) * spread
        radius = rng.uniform(0.25, 0.5) * spread
        light = rng.uniform(0.75, 1.15) + 0.12 * dy
        c.ellipse(x + dx, crown + 0.3 * spread + dy, z, radius, 0.8 * radius, np.array(leaves) * light, TREE)


def _car(c, rng, x, z):
    """Seen from behind or in front, with the flank that is turned to the camera."""
    width, length, height = rng.uniform(0.8, 0.95), rng.uniform(3.6, 4.6), rng.uniform(1.35, 1.7)
    color = _any_color(rng, 0.9)
    glass = np.full(3, rng.uniform(25, 70))
    lamp = [(200, 30, 30), (240, 235, 200)][rng.integers(2)]
    c.ground((x - width - 0.1, x + width + 0.1), (z, z + length), (20, 20, 25), alpha=150)
    flank = x - np.sign(x - c.eye_x) * width
    belt = 0.55 * height
    for depth in (z + 0.8, z + length - 0.9):               # wheels of the flank
        c.ellipse(flank, 0.32, depth, 0.08 + 0.3 * abs(x - c.eye_x) / depth, 0.32, (25, 25, 28), CAR)
    c.wall((flank, flank), (z, z + length), (0.28, belt), color * 0.8, CAR)
    roof = flank * 0.9 + x * 0.1
    c.polygon([(flank, belt, z + 0.1), (flank, belt, z + 0.75 * length), (roof, height, z + 0.6 * length),
               (roof, height, z + 0.5)], glass * 0.9, CAR)
    c.polygon([(x - width, belt, z), (x + width, belt, z), (x + 0.8 * width, height, z + 0.5),
               (x - 0.8 * width, height, z + 0.5)], color, CAR)
    c.polygon([(x - 0.85 * width, belt + 0.06, z), (x + 0.85 * width, belt + 0.06, z),
               (x + 0.7 * width, height - 0.1, z + 0.4), (x - 0.7 * width, height - 0.1, z + 0.4)], glass)
    for side in (-1, 1):
        c.wall((x + side * 0.6 * width, x + side * 0.95 * width), (z, z), (0, 0.4), (25, 25, 28), CAR)
    c.wall((x - width, x + width), (z, z), (0.25, belt), color * 0.95, CAR)
    for side in (-1, 1):
        c.wall((x + side * 0.7 * width, x + side * 0.95 * width), (z, z), (belt - 0.22, belt - 0.06), lamp)
    c.wall((x - 0.25, x + 0.25), (z, z), (0.42, 0.55), (215, 215, 205))


def _person(c, rng, x, z):
    size = rng.uniform(0.62, 1.08) if rng.random() < 0.2 else rng.uniform(0.93, 1.08)
    coat, legs, skin = _any_color(rng, 0.9), _any_color(rng, 0.4) * 0.7, rng.uniform(0.4, 1) * np.array([225, 180, 150])
    stride, lean = rng.uniform(0.02, 0.28) * size, rng.uniform(-0.05, 0.05)
    c.ellipse(x, 0, z, 0.35 * size, 0.07, (20, 20, 25), alpha=120)

    def limb(top, foot, thick, color):
        (x0, y0), (x1, y1) = top, foot
        c.polygon([(x + s * size, y * size, z) for s, y in ((x0 - thick, y0), (x0 + thick, y0), (x1 + thick, y1),
                                                            (x1 - thick, y1))], color, PERSON)

    limb((-0.07, 0.88), (-0.07 - stride, 0), 0.075, legs)
    limb((0.07, 0.88), (0.07 + stride, 0), 0.075, legs * 0.9)
    swing = rng.uniform(0, 0.2)
    limb((-0.2 + lean, 1.4), (-0.24 - swing, 0.8), 0.05, coat * 0.85)
    limb((0.2 + lean, 1.4), (0.24 + swing, 0.8), 0.05, coat * 0.85)
    limb((lean, 1.45), (0, 0.8), 0.19, coat)
    c.ellipse(x + lean * size, 1.6 * size, z, 0.11 * size, 0.145 * size, skin, PERSON)
    c.ellipse(x + lean * size, 1.66 * size, z, 0.115 * size, 0.1 * size, _any_color(rng, 0.3) * 0.5, PERSON)


def _lamp_post(c, rng, x, z):
    c.wall((x - 0.06, x + 0.06), (z, z), (0, 4.5), (60, 65, 65), VOID)
    c.wall((x - 0.3, x + 0.3), (z, z), (4.5, 4.75), (200, 195, 170), VOID)


def make_scene(rng: np.random.Generator, width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """One scene: image (H, W, 3) uint8 RGB, label (H, W) uint8 of class ids and VOID."""
    c = _Canvas(rng, width, height)
    _sky(c, rng)
    half, walk = rng.uniform(2.8, 4), rng.uniform(2.2, 4)                                    # road, pavement
    asphalt, paving = rng.uniform(60, 125) + rng.uniform(-8, 8, 3), rng.uniform(85, 165) + rng.uniform(-22, 22, 3)
    near = EYE * c.focal / (c.height - c.center[1]) * 0.8                                    # just below the picture
    c.ground((-400, 400), (near, 400), paving, PAVEMENT)
    c.ground((-half, half), (near, 400), asphalt, ROAD)
    for side in (-1, 1):
        c.ground((side * half, side * (half + 0.18)), (near, FAR), paving * 0.75, PAVEMENT)
    for z in np.arange(rng.uniform(near, near + 4), FAR, 5):
        c.ground((-0.08, 0.08), (z, z + 2), (215, 215, 205), alpha=200)
    if rng.random() < 0.6:                                  # the shadow of one side of the street
        side = rng.choice([-1, 1])
        c.ground((side * (half + walk), side * rng.uniform(-0.5, 0.8) * half), (near, FAR), (15, 15, 35), alpha=95)

    things = []                                             # (depth, function, arguments)
    for side in (-1, 1):
        z = rng.uniform(1.2, 3)
        while z < FAR:
            length = rng.uniform(6, 15)
            if rng.random() < 0.72:
                things.append((z + length, _house, side, half + walk, z, z + length))
            else:
                things += [(at, _tree, side * (half + walk + rng.uniform(1, 7)), at)
                           for at in rng.uniform(max(z, 5), max(z, 5) + length, 3)]
            z += length + rng.choice([0, 0, 1.5])
        things += [(z, _tree, side * (half + rng.uniform(0.4, 0.8)), z)
                   for z in rng.uniform(6, 50, rng.integers(0, 5))]
        things += [(z, _lamp_post, side * (half + 0.4), z) for z in rng.uniform(5, 40, rng.integers(0, 3))]
        lane = half - 1.1 if rng.random() < 0.7 else half / 2
        first, gaps = rng.uniform(4.5, 14), 5.5 * rng.uniform(1, 3, rng.integers(0, 4))
        things += [(z + 4, _car, side * lane, z) for z in first + np.cumsum([0, *gaps]) if rng.random() < 0.8]
        things += [(z, _person, side * (half + rng.uniform(0.5, walk - 0.2)), z)
                   for z in rng.uniform(3.5, 18, rng.integers(2, 7))]
    if rng.random() < 0.5:
        z = rng.uniform(6, 16)
        things.append((z, _person, rng.uniform(-0.8, 0.8) * half, z))
    for _, function, *arguments in sorted(things, key=lambda thing: -thing[0]):
        function(c, rng, *arguments)
    return _finish(c, rng)


def _finish(c, rng):
    """Texture, light and noise; unlabelled edges around cars and people."""
    image = np.asarray(c.image.reduce(FINE)).astype(np.float64)                              # (H, W, 3)
    label = np.array(c.label)[FINE // 2::FINE, FINE // 2::FINE]                              # (H, W)
    grain = np.append(GRAIN, np.zeros(VOID + 1 - len(GRAIN)))[label]
    image += (grain * rng.normal(size=label.shape))[..., None]
    gain, tint = rng.uniform(0.65, 1.1), 1 + rng.uniform(-0.07, 0.07, 3)
    image = 255 * np.clip(image * gain * tint / 255, 0, 1) ** rng.uniform(0.8, 1.25)
    image += rng.normal(0, rng.uniform(1, 4), image.shape)
    edge = np.zeros(label.shape, bool)
    for axis in (0, 1):
        one, other = np.moveaxis(label, axis, 0)[:-1], np.moveaxis(label, axis, 0)[1:]
        differs = (one != other) & ((np.minimum(one, other) >= CAR) | np.isin(np.maximum(one, other), (CAR, PERSON)))
        np.moveaxis(edge, axis, 0)[:-1] |= differs
    return np.clip(image.round(), 0, 255).astype(np.uint8), np.where(edge, VOID, label).astype(np.uint8)


def make_image_set(folder: str | Path, num_train: int, num_val: int, num_test: int, seed: int = 0,
                   size: tuple[int, int] = (160, 120)) -> list[str]:
    """Write folder/images/{train,val,test}/street_000.jpg, folder/masks/... .png (class ids, 255 = unlabelled, with a
    palette) and folder/classes.json; size is (width, height), at least 32. The same seed writes the same bytes (with
    the same Pillow); a split does not change with the size of another. Existing files of the same names are replaced.
    Returns the class names."""
    folder = Path(folder)
    if min(size) < 32:
        raise ValueError(f"size={tuple(size)}: give width and height of the pictures, both at least 32")
    palette = np.full((256, 3), 0, np.uint8)
    palette[:len(IMAGE_PALETTE)] = IMAGE_PALETTE
    for number, (split, count) in enumerate({"train": num_train, "val": num_val, "test": num_test}.items()):
        if count < 0:
            raise ValueError(f"num_{split}={count}: the number of pictures cannot be negative")
        for kind in ("images", "masks"):
            (folder / kind / split).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            image, label = make_scene(np.random.default_rng([seed, number, i]), *size)
            Image.fromarray(image).save(folder / "images" / split / f"street_{i:03d}.jpg", quality=95)
            mask = Image.fromarray(label)
            mask.putpalette(palette.tobytes())
            mask.save(folder / "masks" / split / f"street_{i:03d}.png")
    classes = {"classes": IMAGE_CLASSES, "palette": IMAGE_PALETTE, "ignore_index": VOID}
    (folder / "classes.json").write_text(json.dumps(classes, indent=1) + "\n")
    return list(IMAGE_CLASSES)
