"""Made-up rooms as labelled point clouds: walls, floor and furniture of random sizes, places and colours.

A room is a list of surfaces (sides of boxes, mantles and lids of cylinders); points are drawn evenly over their area,
as a scanner would see them: no undersides, a few millimetres of noise. Colours are drawn per piece of furniture from
one range for all, so that they say little about the class; shape, height and surroundings do.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.losses import IGNORE_INDEX

POINT_CLASSES = ["wall", "floor", "table", "chair", "sofa", "bookshelf", "box", "lamp"]
WALL, FLOOR, TABLE, CHAIR, SOFA, BOOKSHELF, BOX, LAMP = range(len(POINT_CLASSES))
POINT_PALETTE = [[174, 199, 232], [152, 223, 138], [255, 152, 150], [188, 189, 34], [140, 86, 75], [197, 176, 213],
                 [255, 187, 120], [227, 119, 194]]
NOISE = 0.003                               # metres, normal
FLAT, MANTLE, LID = range(3)                # kinds of surfaces
CLUTTER = IGNORE_INDEX                      # small things that nobody labelled


class Room(NamedTuple):
    """coord (N, 3) float32 metres, z up, floor at 0; color (N, 3) uint8; normal (N, 3) float32, outwards; label (N,)
    int64, IGNORE_INDEX for clutter."""

    coord: np.ndarray
    color: np.ndarray
    normal: np.ndarray
    label: np.ndarray


class _Surfaces:
    """Collects surfaces: FLAT origin + a u + b v; MANTLE and LID of an upright cylinder, u = (radius, height, 0)."""

    def __init__(self, rng):
        self.rng, self.rows = rng, []
        self.turn, self.place = np.eye(3), np.zeros(3)          # of the piece of furniture being built

    def put(self, place, yaw):
        cosine, sine = np.cos(yaw), np.sin(yaw)
        self.turn = np.array([[cosine, -sine, 0], [sine, cosine, 0], [0, 0, 1]])
        self.place = np.array([*place, 0.0])

    def add(self, kind, origin, u, v, normal, area, label, color):
        turned = (u, v, normal) if kind != FLAT else (self.turn @ vector for vector in (u, v, normal))
        self.rows.append((kind, self.place + self.turn @ np.asarray(origin), *turned, area, label, color))

    def flat(self, origin, u, v, label, color):
        normal = np.cross(u, v)
        area = np.linalg.norm(normal)
        self.add(FLAT, origin, np.asarray(u), np.asarray(v), normal / area, area, label, color)

    def box(self, low, size, label, color):
        """All sides but the lower one of a box with its corner at low (3,) and size (3,)."""
        low, (x, y, z) = np.asarray(low, float), np.diag(size)
        self.flat(low + z, x, y, label, color)
        for origin, u, v in ((low, x, z), (low + x, y, z), (low + x + y, -x, z), (low + y, -y, z)):
            self.flat(origin, u, v, label, color)

    def cylinder(self, low, radius, height, label, color):
        shape = np.array([radius, height, 0.0])
        zero = np.zeros(3)
        self.add(MANTLE, low, shape, zero, zero, 2 * np.pi * radius * height, label, color)
        self.add(LID, low, shape, zero, zero, np.pi * radius ** 2, label, color)

    def legs(self, width, depth, height, thick, label, color):
        for x in (-width / 2, width / 2 - thick):
            for y in (-depth / 2, depth / 2 - thick):
                self.box((x, y, 0), (thick, thick, height), label, color)

    def color(self):
        return self.rng.uniform(40, 220) + self.rng.uniform(-45, 45, 3)


def _table(s, rng):
    width, depth, height = rng.uniform(0.9, 1.8), rng.uniform(0.6, 1.0), rng.uniform(0.65, 0.8)
    color = s.color()
    if rng.random() < 0.3:                                      # a round one
        s.cylinder((0, 0, height - 0.04), depth / 2 + 0.1, 0.04, TABLE, color)
        s.cylinder((0, 0, 0), 0.06, height - 0.04, TABLE, color)
    else:
        s.box((-width / 2, -depth / 2, height - 0.04), (width, depth, 0.04), TABLE, color)
        s.legs(width, depth, height - 0.04, 0.06, TABLE, color)
    for _ in range(rng.integers(0, 4)):
        x, y = rng.uniform(-0.2, 0.2, 2)
        s.box((x, y, height), rng.uniform(0.05, 0.2, 3), CLUTTER, s.color())


def _chair(s, rng):
    width, height, back = rng.uniform(0.4, 0.5), rng.uniform(0.4, 0.5), rng.uniform(0.35, 0.55)
    color = s.color()
    s.box((-width / 2, -width / 2, height - 0.04), (width, width, 0.04), CHAIR, color)
    s.box((-width / 2, width / 2 - 0.04, height), (width, 0.04, back), CHAIR, color)
    s.legs(width, width, height - 0.04, 0.04, CHAIR, color)


def _sofa(s, rng):
    width, depth, seat = rng.uniform(1.3, 2.1), rng.uniform(0.75, 0.95), rng.uniform(0.38, 0.45)
    color = s.color()
    s.box((-width / 2, -depth / 2, 0.05), (width, depth, seat), SOFA, color)
    s.box((-width / 2, depth / 2 - 0.2, seat), (width, 0.2, rng.uniform(0.3, 0.45)), SOFA, color)
    for x in (-width / 2, width / 2 - 0.15):
        s.box((x, -depth / 2, seat), (0.15, depth - 0.2, 0.2), SOFA, color)


def _bookshelf(s, rng):
    width, depth, height = rng.uniform(0.7, 1.3), rng.uniform(0.25, 0.35), rng.uniform(1.3, 2.1)
    color = s.color()
    for x in (-width / 2, width / 2 - 0.03):
        s.box((x, -depth / 2, 0), (0.03, depth, height), BOOKSHELF, color)
    s.box((-width / 2, depth / 2 - 0.02, 0), (width, 0.02, height), BOOKSHELF, color)
    for z in np.linspace(0.05, height - 0.03, rng.integers(4, 7)):
        s.box((-width / 2, -depth / 2, z), (width, depth - 0.02, 0.03), BOOKSHELF, color)
        if z < height - 0.1:                                    # books
            s.box((-width / 2 + 0.05, 0, z + 0.03), (rng.uniform(0.2, width - 0.1), 0.1, 0.2), BOOKSHELF, s.color())


def _box(s, rng):
    size = rng.uniform(0.25, 0.7, 3)
    s.box((-size[0] / 2, -size[1] / 2, 0), size, BOX, s.color())


def _lamp(s, rng):
    height = rng.uniform(1.3, 1.7)
    color = s.color()
    s.cylinder((0, 0, 0), 0.15, 0.03, LAMP, color)
    s.cylinder((0, 0, 0.03), 0.02, height, LAMP, color)
    s.cylinder((0, 0, height), rng.uniform(0.15, 0.22), 0.25, LAMP, s.color())


# What, radius of its footprint, whether its back stands against a wall, fewest and most in 20 square metres.
FURNITURE = ((_table, 1.0, False, 1, 2), (_sofa, 0.9, True, 1, 1), (_bookshelf, 0.6, True, 1, 2),
             (_chair, 0.35, False, 2, 4), (_box, 0.45, False, 1, 3), (_lamp, 0.25, False, 1, 2))


def make_room(rng: np.random.Generator, num_points: int, size: tuple[float, float, float] | None = None) -> Room:
    """A room of num_points points. size: width, depth and height in metres; None: 3.5 to 6, 3 to 5, 2.4 to 2.8.

    The points lie on 60 to 110 square metres; at a grid of 2 cm, 100,000 of them fill about 90,000 voxels. The room is
    turned at random about z and stands near the origin. Raises ValueError for a room without points.
    """
    if num_points < 1:
        raise ValueError(f"num_points={num_points}: expected 1 or more")
    width, depth, height = size or (rng.uniform(3.5, 6), rng.uniform(3, 5), rng.uniform(2.4, 2.8))
    s = _Surfaces(rng)
    s.flat((0, 0, 0), (width, 0, 0), (0, depth, 0), FLOOR, s.color())
    paint = s.color()
    for origin, u in (((0, 0, 0), (width, 0, 0)), ((width, 0, 0), (0, depth, 0)),
                      ((width, depth, 0), (-width, 0, 0)), ((0, depth, 0), (0, -depth, 0))):
        s.flat(origin, (0, 0, height), u, WALL, paint)          # in this order the normal looks into the room
    taken: list[tuple] = []
    for build, radius, at_wall, fewest, most in FURNITURE:
        times = width * depth / 20
        for _ in range(max(1, round(times * rng.integers(fewest, most + 1)))):
            place, yaw = _find_place(rng, (width, depth), radius, at_wall, taken)
            if place is not None:
                taken.append((*place, radius))
                s.put(place, yaw)
                build(s, rng)
    return _sample(s.rows, num_points, rng)


def _find_place(rng, room, radius, at_wall, taken):
    """A free place for a round footprint, and a turn; (None, 0) after many tries: a full room."""
    if radius > min(room) / 2:
        return None, 0.0
    for _ in range(100):
        place = np.array([rng.uniform(radius, side - radius) for side in room])
        yaw = rng.uniform(0, 2 * np.pi)
        if at_wall:                                             # the back is the +y side of the piece
            axis, far = rng.integers(2), rng.integers(2)
            place[axis] = (room[axis] - radius * 0.55) if far else radius * 0.55
            yaw = ((np.pi / 2, -np.pi / 2), (np.pi, 0.0))[axis][far]
        if all(np.hypot(place[0] - x, place[1] - y) > 0.85 * (radius + other) for x, y, other in taken):
            return place, yaw
    return None, 0.0


def _sample(rows, num_points, rng):
    kind, origin, u, v, normal, area, label, color = map(np.array, zip(*rows, strict=True))
    which = rng.choice(len(area), num_points, p=area / area.sum())
    a, b = rng.random((2, num_points))
    kind, normal = kind[which], normal[which]                                       # (N,), (N, 3)
    shape, angle = u[which], 2 * np.pi * a
    around = np.stack([np.cos(angle), np.sin(angle), np.zeros(num_points)], 1)
    up = np.array([0, 0, 1.0])
    flat = a[:, None] * u[which] + b[:, None] * v[which]
    mantle = shape[:, :1] * around + b[:, None] * shape[:, 1:2] * up
    lid = shape[:, :1] * np.sqrt(b)[:, None] * around + shape[:, 1:2] * up
    chosen = [kind[:, None] == FLAT, kind[:, None] == MANTLE, kind[:, None] == LID]
    coord = origin[which] + np.select(chosen, [flat, mantle, lid])
    normal = np.select(chosen, [normal, around, np.broadcast_to(up, normal.shape)])
    light = 0.8 + 0.2 * normal @ np.array([0.36, 0.48, 0.8]) + 0.05 * np.sin(3 * coord[:, 0] + 2 * coord[:, 1])
    color = color[which] * light[:, None] + rng.normal(0, 8, (num_points, 3))
    coord += rng.normal(0, NOISE, coord.shape)
    yaw = rng.uniform(0, 2 * np.pi)
    turn = np.array([[np.cos(yaw), -np.sin(yaw), 0], [np.sin(yaw), np.cos(yaw), 0], [0, 0, 1]])
    return Room((coord @ turn.T).astype(np.float32), np.clip(color, 0, 255).astype(np.uint8),
                (normal @ turn.T).astype(np.float32), label[which])


def make_point_set(folder: str | Path, num_train: int, num_val: int, num_test: int, seed: int = 0,
                   num_points: int = 20_000) -> list[str]:
    """Write folder/{train,val,test}/room_000.npz (coord, color, normal, segment int64 with -1 = nothing) and
    folder/classes.json. The same seed writes the same bytes; a split does not change with the size of another. Existing
    files of the same names are replaced. Returns the class names."""
    folder = Path(folder)
    for number, (split, count) in enumerate({"train": num_train, "val": num_val, "test": num_test}.items()):
        if count < 0:
            raise ValueError(f"num_{split}={count}: the number of rooms cannot be negative")
        (folder / split).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            room = make_room(np.random.default_rng([seed, number, i]), num_points)
            segment = np.where(room.label == IGNORE_INDEX, -1, room.label)
            np.savez(folder / split / f"room_{i:03d}.npz", coord=room.coord, color=room.color, normal=room.normal,
                     segment=segment)
    classes = {"classes": POINT_CLASSES, "palette": POINT_PALETTE, "ignore_index": -1}
    (folder / "classes.json").write_text(json.dumps(classes, indent=1) + "\n")
    return list(POINT_CLASSES)
