"""Pictures without a graphics card: a small software renderer for coloured meshes, and class colours."""

from functools import cache

import numpy as np
from PIL import Image

IGNORE_COLOR = (150, 150, 150)           # grey: no label
SUPERSAMPLE = 2                          # samples per pixel and axis
LIGHT = np.array([-0.4, -0.75, -0.53])   # towards the light, x right, y down, z away: from the upper left, in front
FRAMES = {"x": [[0, 1, 0], [0, 0, 1], [1, 0, 0]],       # rows: right, depth and up for each axis that may point up
          "y": [[0, 0, 1], [1, 0, 0], [0, 1, 0]],
          "z": [[1, 0, 0], [0, 1, 0], [0, 0, 1]]}

# Okabe and Ito's colours for all viewers (2008), without black and ordered so that neighbours contrast.
BASE_COLORS = [(0, 114, 178), (230, 159, 0), (0, 158, 115), (204, 121, 167), (86, 180, 233), (213, 94, 0),
               (240, 228, 66)]


# -----------------------------------------------------------------------------------------------------------------
# Class colours
# -----------------------------------------------------------------------------------------------------------------

def _oklab(rgb: np.ndarray) -> np.ndarray:
    """Ottosson's perceptual space (2020) of sRGB colours (N, 3) in [0, 255]: lightness in [0, 1], two chroma axes."""
    linear = np.where(rgb <= 0.04045 * 255, rgb / 255 / 12.92, ((rgb / 255 + 0.055) / 1.055) ** 2.4)
    cones = linear @ np.array([[0.4122214708, 0.2119034982, 0.0883024619],
                               [0.5363325363, 0.6806995451, 0.2817188376],
                               [0.0514459929, 0.1073969566, 0.6299787005]])
    return np.cbrt(cones) @ np.array([[0.2104542553, 1.9779984951, 0.0259040371],
                                      [0.7936177850, -2.4285922050, 0.7827717662],
                                      [-0.0040720468, 0.4505937099, -0.8086757660]])


@cache
def _colors(num_classes: int) -> np.ndarray:
    levels = np.arange(0, 256, 17)
    candidates = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    lab = _oklab(candidates.astype(float))
    chroma = np.hypot(lab[:, 1], lab[:, 2])
    usable = (chroma > 0.06) & (chroma < 0.21) & (lab[:, 0] > 0.42) & (lab[:, 0] < 0.9)    # not grey, neon, dark, pale
    candidates = np.concatenate([np.array(BASE_COLORS), candidates[usable]])
    lab = _oklab(candidates.astype(float))
    # Red-green blindness hides most of the second axis: distances count half by what remains then.
    spaces = [lab, lab * [1, 0.15, 1]]
    nearest = np.full(len(candidates), np.inf)
    chosen: list[int] = []
    for i in range(num_classes):
        chosen.append(i if i < len(BASE_COLORS) else int(nearest.argmax()))
        distance = sum(np.linalg.norm(space - space[chosen[-1]], axis=1) for space in spaces)
        nearest = np.minimum(nearest, distance)
    return candidates[chosen].astype(np.uint8)


def palette(num_classes: int) -> np.ndarray:
    """Class colours (C, 3) uint8: distinct, none of them grey, also apart for colour-blind readers as far as C allows.

    The first seven are Okabe and Ito's, each further one is the farthest from all before it, so a class keeps its
    colour whatever C is. Ignored elements are drawn in IGNORE_COLOR.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes={num_classes}: a palette needs at least one class")
    return _colors(num_classes).copy()


def label_colors(label: np.ndarray, colors: np.ndarray) -> np.ndarray:
    """Colours (*, 3) uint8 of labels (*) by a palette (C, 3); labels outside 0..C-1 get IGNORE_COLOR."""
    known = (label >= 0) & (label < len(colors))
    return np.where(known[..., None], colors[np.where(known, label, 0)], np.array(IGNORE_COLOR, np.uint8))


# -----------------------------------------------------------------------------------------------------------------
# Meshes
# -----------------------------------------------------------------------------------------------------------------

def upright(corners: np.ndarray) -> np.ndarray:
    """Rotation (3, 3) that stands an object of unknown orientation up, a guess; corners (F, 3, 3) of its triangles.

    Its rows are right, depth and up. Up leads from the centroid of the surface to that of the volume, because what an
    object with limbs stands on is thin: much surface around little volume. Compact bodies (buildings) and open surfaces
    (scans, terrain) have no such sign; for them up is z. The wide side faces the viewer.
    """
    corners = corners - corners.mean((0, 1))
    vector = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]) / 2
    area = np.linalg.norm(vector, axis=1)
    total = max(area.sum(), 1e-30)
    corners = corners - area @ corners.mean(1) / total
    center = corners.mean(1)
    volume = np.einsum("fi,fi->f", corners[:, 0], np.cross(corners[:, 1], corners[:, 2])) / 6  # cones to the centre
    up = volume @ corners.sum(1) / 4 * np.sign(volume.sum())
    closed = np.linalg.norm(vector.sum(0)) < 0.005 * total
    with_limbs = 36 * np.pi * volume.sum() ** 2 < 0.15 * total ** 3                           # a ball has 1, not 0.15
    up = up / np.linalg.norm(up) if closed and with_limbs and np.linalg.norm(up) > 1e-9 else np.array([0.0, 0, 1])
    flat = center - np.outer(center @ up, up)
    spread = (flat * area[:, None]).T @ flat - np.outer(up, up)                               # up has the least
    right = np.linalg.eigh(spread)[1][:, 2]
    right = right * np.sign(right[np.abs(right).argmax()])                                    # eigh may give either
    return np.stack([right, np.cross(up, right), up])


def _cover(points: np.ndarray, num_pixels: int) -> np.ndarray:
    """Nearest face of each pixel (num_pixels, num_pixels), -1 where there is none; points (F, 3, 3) are x, y, depth.

    Each triangle is cut into the pixel rows whose centres it covers, each row into its pixels: no loop over triangles
    and no work on pixels outside. A z-buffer of (depth, face) in one integer makes ties go to the lower face.
    """
    x, y, z = points.transpose(2, 0, 1)                                                   # (F, 3) each
    (x1, x2), (y1, y2), (z1, z2) = ((axis[:, 1:] - axis[:, :1]).T for axis in (x, y, z))
    doubled = x1 * y2 - x2 * y1                                                           # signed area times two
    with np.errstate(divide="ignore", invalid="ignore"):
        slope_x, slope_y = (z1 * y2 - z2 * y1) / doubled, (z2 * x1 - z1 * x2) / doubled   # depth is a plane
    top = np.maximum(np.ceil(y.min(1) - 0.5), 0).astype(int)
    bottom = np.minimum(np.floor(y.max(1) - 0.5), num_pixels - 1).astype(int)
    kept = np.flatnonzero((abs(doubled) > 1e-12) & (bottom >= top))
    height = bottom - top + 1
    empty = np.iinfo(np.int64).max
    buffer = np.full(num_pixels * num_pixels, empty)
    span = max(float(np.ptp(z)), 1e-12)
    for part in np.split(kept, np.flatnonzero(np.diff(np.cumsum(height[kept]) >> 13)) + 1):   # bounds the memory
        face, row = _expand(part, top[part], height[part])
        center = row + 0.5
        low, high = np.full(len(face), -np.inf), np.full(len(face), np.inf)
        for i, j in ((0, 1), (1, 2), (2, 0)):                                             # where the row meets an edge
            rise = np.sign(doubled[face]) * (y[face, i] - y[face, j])                     # > 0: the inside is right
            with np.errstate(divide="ignore", invalid="ignore"):
                x_edge = x[face, i] + (center - y[face, i]) * (x[face, j] - x[face, i]) / (y[face, j] - y[face, i])
            low = np.where(rise > 0, np.maximum(low, x_edge), low)
            high = np.where(rise < 0, np.minimum(high, x_edge), high)
        left = np.ceil(np.clip(low, 0, num_pixels) - 0.5 - 1e-7).astype(int)              # no gap between neighbours
        right = np.floor(np.clip(high, 0, num_pixels) - 0.5 + 1e-7).astype(int)
        segment, column = _expand(np.arange(len(face)), left, np.maximum(right - left + 1, 0))
        face, row = face[segment], row[segment]
        u, v = column + 0.5 - x[face, 0], row + 0.5 - y[face, 0]
        far = np.clip((z[face, 0] + slope_x[face] * u + slope_y[face] * v - z.min()) / span, 0, 1)
        np.minimum.at(buffer, row * num_pixels + column, (far * (1 << 30)).astype(np.int64) << 32 | face)
    return np.where(buffer == empty, -1, buffer & 0xFFFFFFFF).reshape(num_pixels, num_pixels)


def _expand(item: np.ndarray, first: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each item repeated count times, and beside it first, first + 1, ..."""
    offset = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    return np.repeat(item, count), np.repeat(first, count) + offset


def _camera(azimuth: float, elevation: float) -> np.ndarray:
    """Rotation (3, 3) of the right, depth, up frame for a camera that went round the object and up, in degrees."""
    azimuth, elevation = np.radians([azimuth, elevation])
    turn = [[np.cos(azimuth), np.sin(azimuth), 0], [-np.sin(azimuth), np.cos(azimuth), 0], [0, 0, 1]]
    tilt = [[1, 0, 0], [0, np.cos(elevation), -np.sin(elevation)], [0, np.sin(elevation), np.cos(elevation)]]
    return np.array(tilt) @ np.array(turn)


def render_mesh(vertices: np.ndarray, faces: np.ndarray, face_color: np.ndarray, size: int = 360,
                view: tuple[float, float] = (25.0, 15.0), up: str = "auto") -> Image.Image:
    """Picture of a mesh on white with flat Lambert shading and hidden surfaces removed, size x size pixels, no
    perspective.

    vertices (V, 3), faces (F, 3) int, face_color (F, 3) uint8; both sides of a face are drawn.
    view: degrees the camera goes around the object and up. up: "x", "y" or "z", or "auto" to guess (see `upright`).
    """
    vertices, faces, face_color = np.asarray(vertices, float), np.asarray(faces), np.asarray(face_color)
    if faces.ndim != 2 or faces.shape[1:] != (3,) or face_color.shape != faces.shape:
        raise ValueError(f"faces {faces.shape} and face_color {face_color.shape}: both must be (F, 3), a colour a face")
    if len(faces) and not np.isfinite(vertices[faces]).all():
        raise ValueError("vertices: a coordinate is NaN or infinite; repair the mesh before drawing it")
    if up not in ("auto", *FRAMES):
        raise ValueError(f"up={up!r}: choose from auto, {', '.join(FRAMES)}")
    samples = size * SUPERSAMPLE
    rgb, alpha = np.zeros((samples, samples, 3)), np.zeros((samples, samples, 1))
    if len(faces):
        vertices = vertices[faces]                                                        # (F, 3, 3) corners
        low, high = vertices.min((0, 1)), vertices.max((0, 1))
        vertices = (vertices - (low + high) / 2) / max((high - low).max(), 1e-30)         # far from 0 digits are lost
        right, depth, height = _camera(*view) @ (upright(vertices) if up == "auto" else np.array(FRAMES[up]))
        points = vertices @ np.stack([right, -height, depth]).T                           # x right, y down, z away
        low, high = points.min((0, 1)), points.max((0, 1))
        points = (points - (low + high) / 2) * 0.92 * samples / max(*(high - low)[:2], 1e-6) + samples / 2
        normal = np.cross(points[:, 1] - points[:, 0], points[:, 2] - points[:, 0])
        normal = normal / np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-12)
        normal = np.where(normal[:, 2:] > 0, -normal, normal)                             # towards the viewer
        shade = 0.5 + 0.55 * np.maximum(normal @ LIGHT / np.linalg.norm(LIGHT), 0)
        face = _cover(points, samples)
        alpha = (face >= 0).astype(float)[..., None]
        rgb = np.minimum(face_color * shade[:, None], 255)[face] * alpha
    blocks = (size, SUPERSAMPLE, size, SUPERSAMPLE, -1)
    rgb, alpha = rgb.reshape(blocks).mean((1, 3)), alpha.reshape(blocks).mean((1, 3))     # rgb is premultiplied
    return Image.fromarray(np.rint(rgb + (1 - alpha) * 255).astype(np.uint8))


def pca_colors(embedding: np.ndarray) -> np.ndarray:
    """Colours (N, 3) uint8 of feature vectors (N, E): their first three principal components, each from its 2nd to its
    98th percentile.

    A usual look into an encoder: elements of one colour are alike to it. Fewer than three components leave channels at
    127.
    """
    centered = embedding.astype(np.float64) - embedding.mean(0)
    direction = np.linalg.eigh(centered.T @ centered)[1][:, ::-1][:, :3]                      # (E, 3)
    direction = direction * np.sign(direction[np.abs(direction).argmax(0), np.arange(direction.shape[1])])
    score = centered @ direction
    low, high = np.percentile(score, [2, 98], axis=0) if len(score) else (0.0, 0.0)
    scaled = np.where(high - low > 1e-12, (score - low) / np.maximum(high - low, 1e-12), 0.5)
    colors = np.full((len(embedding), 3), 0.5)
    colors[:, :scaled.shape[1]] = scaled.clip(0, 1)
    return (colors * 255).astype(np.uint8)
