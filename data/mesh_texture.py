"""Textures of meshes: reading them with their faces in file order, and colours sampled all over each face.

    OBJ: v, vt, f, usemtl, mtllib; of an MTL: Kd (a plain colour), map_Kd with -clamp, -o and -s. A picture replaces Kd.
    PLY as the SUM cities have it: per face a list texcoord of 6 numbers and texnumber, `comment TextureFile NAME`; or
        with s and t (or texture_u, texture_v, or u, v) of the vertices and one TextureFile, as MeshLab writes it.
Every face has one picture, one plain colour (a picture of one pixel), or nothing: then its samples are masked. A
picture is kept as a pyramid of halved copies, and a face is read from the copy in which one pixel is about as large
as the piece of the face that one sample stands for, so that samples of fine textures are means, not noise.
Pixel (row 0, column 0) is at the top left; v points up; u and v repeat outside 0..1 unless the file says -clamp on.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data.columns import parse_numbers, ply_columns
from data.images import opened, to_rgb
from data.mesh import MeshDataset, cached_arrays, custom_collate_fn
from data.mesh_formats import PLY_CORNERS, obj_text, plain_lines, text_name
from data.mesh_io import read_mesh
from utils.array_file import load_checked, save_checked
from utils.files import replacing
from utils.log import progress
from utils.seed import derived_seed

CACHE_VERSION = 4                   # raise it when read_texture or read_pyramid gives something else
CHUNK = 1 << 19                     # samples at a time
LARGEST_UV = 1e6                    # beyond it float32 no longer tells texels apart
LARGEST_KD = 2.0                    # a little light above 1 is cut off; more is a colour of 0..255
PLY_UV = ("texture_u", "texture_v"), ("s", "t"), ("u", "v")           # of vertices
NO_TEXTURE = ".off", ".stl", ".glb"
texture_custom_collate_fn = custom_collate_fn               # pads the texture entries like all others


class Material(NamedTuple):
    """A picture, else a plain colour (r, g, b) in 0..1, else neither. Texture coordinates are uv * scale + offset."""

    image: Path | None = None
    color: tuple[float, float, float] | None = None
    clamp: bool = False
    scale: tuple[float, float] = (1.0, 1.0)
    offset: tuple[float, float] = (0.0, 0.0)


class Texture(NamedTuple):
    """uv (F, 3, 2) float32 of the corners of all faces in file order (NaN where the file gives none), material (F,)
    int32 = number in materials, -1 = none."""

    uv: np.ndarray
    material: np.ndarray
    materials: list[Material]


class Pyramid(NamedTuple):
    """texels (P, 3) uint8, all levels row by row, the finest first; sizes of the levels [(height, width)]."""

    texels: np.ndarray
    sizes: list[tuple[int, int]]


# -- texture coordinates and materials ---------------------------------------------------------------------------------

def read_texture(path: str | Path, cache_dir: str | Path | None = None) -> Texture:
    """The texture coordinates and materials of a mesh file that read_mesh can read. Only .obj and .ply have any.

    Faces of a material that no MTL defines have none. Raises ValueError for what cannot be read, FileNotFoundError for
    a material file that is not there.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix in NO_TEXTURE:
        return Texture(np.empty((0, 3, 2), np.float32), np.empty(0, np.int32), [])
    reader = {".obj": _read_obj, ".ply": _read_ply}[suffix]
    arrays = cached_arrays(path, ["texture", CACHE_VERSION], ("uv", "material", "names", "libraries"), cache_dir,
                           lambda: reader(path))
    if suffix == ".ply":
        materials = [Material(_file(path.parent, name)) for name in arrays["names"].tolist()]
    else:
        known: dict[str, Material] = {}
        for line in arrays["libraries"].tolist():           # one name with spaces, or several names
            whole = (path.parent / line).is_file()
            for name in [line] if whole else re.split(r"(?<=\.mtl)\s+", line, flags=re.IGNORECASE):
                known |= read_mtl(_file(path.parent, name))
        materials = [known.get(name) or known.get(name.split(" #")[0].strip()) or Material()
                     for name in arrays["names"].tolist()]
    return Texture(arrays["uv"], arrays["material"], materials)


def _read_obj(path: Path) -> dict[str, np.ndarray]:
    positions, faces, above, material = [], [], [], []
    names, libraries = {}, {}
    current = -1
    for match in re.finditer(rb"(?m)^(vt|f|usemtl|mtllib)(?!\S)([^\n]*)", plain_lines(obj_text(path))):
        keyword, rest = match.groups()
        if keyword == b"f":
            faces.append(rest)
            above.append(len(positions))
            material.append(current)
        elif keyword == b"vt":
            positions.append(rest)
        elif keyword == b"usemtl":
            current = names.setdefault(text_name(rest), len(names))
        else:
            libraries[text_name(rest)] = True
    uv = parse_numbers(b"\n".join(positions), np.float64)
    # Of corners like 7/1/3 the second number, with a 0 behind it, so that one that is not there (7 or 7//3) becomes 0.
    index = parse_numbers(re.sub(rb"[^\s/]+/?([^\s/]*)\S*", rb"\g<1>0", b"\n".join(faces)), np.int64)
    if (uv is None or index is None or uv[1].min(initial=2) < 2 or len(index[1]) != len(faces)
            or index[1].min(initial=3) < 3):
        raise ValueError(f"{path}: the texture coordinates cannot be read; 'vt u v' and 'f v/vt ...' are expected")
    start = np.cumsum(uv[1]) - uv[1]
    uv = uv[0][start[:, None] + np.arange(2)]                                    # (number of vt, 2)
    corner, count = index[0] // 10, index[1]
    given, corner = corner, np.where(corner < 0, corner + np.repeat(above, count), corner - 1)
    wrong = (corner >= len(uv)) | (given < 0) & (corner < 0)
    if wrong.any():
        raise ValueError(f"{path}: a face names texture coordinate {given[wrong][0]} of {len(uv)}; is the file cut "
                         f"short?")
    return _by_face(path, np.append(uv, [[np.nan, np.nan]], axis=0)[corner], count, np.array(material, np.int32),
                    list(names), list(libraries))


def _read_ply(path: Path) -> dict[str, np.ndarray]:
    columns, comments = ply_columns(path)
    face = columns["face"]
    names = [text_name(c[12:].encode("latin-1")) for c in comments if c.startswith("TextureFile ")]
    index, count = next(face[name] for name in PLY_CORNERS if name in face)
    count = count.astype(np.int64)
    vertex = columns["vertex"]
    pair = next(([vertex[axis][0] for axis in axes] for axes in PLY_UV if set(axes) <= set(vertex)), None)
    if not names or ("texcoord" not in face and pair is None):
        return _by_face(path, np.full((count.sum(), 2), np.nan), count, np.full(len(count), -1, np.int32), [], [])
    if len(names) > 1 and "texnumber" not in face:
        raise ValueError(f"{path}: {len(names)} TextureFile in the header, and no texnumber says which one a face has; "
                         f"write it anew, with one picture for example")
    if "texcoord" in face:
        uv, length = face["texcoord"]
        has = length == 2 * count
        if not (has | (length == 0)).all():
            raise ValueError(f"{path}: face {np.argmin(has | (length == 0))} has a texcoord list that is not two "
                             f"numbers a corner; write it anew")
        corners = np.full((count.sum(), 2), np.nan)
        corners[np.repeat(has, count)] = uv.reshape(-1, 2)
    else:
        corners, has = np.stack(pair, axis=1)[index.astype(np.int64)], np.ones(len(count), bool)
    number = face["texnumber"][0].astype(np.int32) if "texnumber" in face else np.zeros(len(count), np.int32)
    if number.max(initial=-1) >= len(names):
        raise ValueError(f"{path}: texnumber {number.max()}, but the header names {len(names)} TextureFile")
    return _by_face(path, corners, count, np.where(has, np.maximum(number, -1), -1), names, [])


def _by_face(path, uv, count, material, names, libraries):
    """uv (all corners, 2) of polygons of `count` corners, material of each polygon -> the same of their triangles."""
    if (np.abs(uv) > LARGEST_UV).any():
        raise ValueError(f"{path}: a texture coordinate of {np.nanmax(np.abs(uv)):g}; they are about 0..1, repair the "
                         f"file")
    if (count == 3).all():
        slot = np.arange(len(uv)).reshape(-1, 3)                                 # (F, 3)
    else:
        mesh = read_mesh(path)                      # where its corners lie decides how a polygon is cut
        slot, material = mesh.slot, material[mesh.polygon]
    return {"uv": uv[slot].astype(np.float32), "material": material,
            "names": np.array(names, str), "libraries": np.array(libraries, str)}


def _file(folder: Path, name: str) -> Path:
    """The file that a name in a file of this folder means: of a path that is not there, as on the machine that wrote
    it, its last part."""
    path = folder / name
    return folder / path.name if not path.is_file() and (folder / path.name).is_file() else path


def read_mtl(path: str | Path) -> dict[str, Material]:
    """{name: Material} of an MTL file. Raises FileNotFoundError, and ValueError naming the line."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such material file, and a mesh names it (mtllib); put it there")
    materials = {}
    name = None
    for number, line in enumerate(obj_text(path).split(b"\n"), 1):
        keyword, *rest = line.split(None, 1) or [b""]
        try:
            if keyword == b"newmtl":
                name = text_name(rest[0])
                materials[name] = Material()
            elif keyword == b"Kd":
                color = tuple(map(float, rest[0].split(b"#")[0].split()))
                if len(color) != 3 or not np.isfinite(color).all() or max(color) > LARGEST_KD:
                    raise ValueError
                materials[name] = materials[name]._replace(color=color)
            elif keyword.lower() == b"map_kd":
                materials[name] = materials[name]._replace(**_picture(text_name(rest[0]), path.parent))
        except (ValueError, IndexError, KeyError):
            raise ValueError(f"{path}: line {number} cannot be read: {line[:60].decode(errors='replace')!r}; "
                             f"'newmtl NAME', 'Kd r g b' of 0..1 or 'map_Kd FILE' is expected") from None
    return materials


def _picture(text: str, folder: Path) -> dict:
    """The file and the options -clamp, -s and -o of a map_Kd; other options say nothing about colour and are passed
    over."""
    found = {}
    while match := re.match(r"-(\w+)\s+((?:[-+]?[\d.]+(?:[eE][-+]?\d+)?\s+){1,3}|\S+\s+)", text):
        option, values = match[1], match[2].split()
        text = text[match.end():]
        if option == "clamp":
            found["clamp"] = values == ["on"]
        elif option in ("s", "o"):
            default = 1.0 if option == "s" else 0.0
            found["scale" if option == "s" else "offset"] = pair = (*map(float, values[:2]), default)[:2]
            if not np.isfinite(pair).all():
                raise ValueError
    return {**found, "image": _file(folder, text.strip('"'))}


# -- pictures ----------------------------------------------------------------------------------------------------------

def read_pyramid(path: Path, cache_dir: str | Path | None = None) -> Pyramid:
    """A picture in RGB (see data.images.read_image) and its halved copies down to one pixel; memory-mapped from the
    cache where there is one. Raises FileNotFoundError and ValueError."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such picture, and a mesh names it as texture; put it there")
    with opened(path, "picture") as image:
        sizes = [(image.height, image.width)]
        while max(sizes[-1]) > 1:
            sizes.append(tuple(-(-side // 2) for side in sizes[-1]))
        if cache_dir is None:
            return Pyramid(_texels(image), sizes)
        key = hashlib.sha256(path.read_bytes() + bytes([CACHE_VERSION])).hexdigest()
        entry = Path(cache_dir) / f"texture_{key[:32]}.npy"
        stored = _stored_texels(entry, sum(height * width for height, width in sizes))
        if stored is not None:
            return Pyramid(stored, sizes)
        texels = _texels(image)
    entry.parent.mkdir(parents=True, exist_ok=True)
    with replacing(entry) as file:
        save_checked(file, texels)
    return Pyramid(np.load(entry, mmap_mode="r"), sizes)


def _stored_texels(entry, count):
    stored = load_checked(entry)
    if stored is None or stored.shape != (count, 3) or stored.dtype != np.uint8:
        return None                                         # absent or damaged: made again, and written over
    return stored


def _texels(image):
    levels = [to_rgb(image)]
    while max(levels[-1].size) > 1:
        levels.append(levels[-1].reduce(2))
    return np.concatenate([np.asarray(level).reshape(-1, 3) for level in levels])


def plain_pyramid(color: Sequence[float]) -> Pyramid:
    """A plain colour (r, g, b) in 0..1 as a picture of one pixel."""
    return Pyramid(np.uint8([np.clip(np.rint(255 * np.asarray(color)), 0, 255)]), [(1, 1)])


# -- samples -----------------------------------------------------------------------------------------------------------

def fixed_weights(count: int) -> np.ndarray:
    """(1, count, 3) barycentric weights spread evenly over a triangle: the additive sequence R2 of Roberts (2018), the
    generalised golden ratio, folded into the triangle."""
    steps = np.arange(1, count + 1)[:, None] * np.array([0.7548776662466927, 0.5698402909980532])
    return _fold((0.5 + steps) % 1)[None].astype(np.float32)


def random_weights(rng: np.random.Generator, faces: int, count: int) -> np.ndarray:
    """(faces, count, 3) barycentric weights, uniform over the triangle."""
    return _fold(rng.random((faces, count, 2), dtype=np.float32))


def _fold(square):
    square = np.where(square.sum(-1, keepdims=True) > 1, 1 - square, square)
    return np.concatenate([1 - square.sum(-1, keepdims=True), square], axis=-1)


def sample_pyramid(pyramid: Pyramid, uv: np.ndarray, weights: np.ndarray, clamp: bool = False) -> np.ndarray:
    """Colours of points on faces: uv (P, 3, 2), weights (P or 1, T, 3) -> (P, T, 3) float32 in 0..1, bilinear."""
    sizes = np.array(pyramid.sizes)
    start = np.concatenate([[0], sizes.prod(1).cumsum()])
    edge = uv[:, 1:] - uv[:, :1]                                                 # (P, 2, 2)
    texels = np.abs(edge[:, 0, 0] * edge[:, 1, 1] - edge[:, 0, 1] * edge[:, 1, 0]) / 2 * sizes[0].prod()
    level = np.rint(np.log2(np.maximum(texels / weights.shape[1], 1)) / 2).astype(np.int64).clip(max=len(sizes) - 1)
    (height, width), first = sizes[level].T[..., None], start[level][:, None]    # (P, 1) each
    if not clamp:
        uv = uv - np.floor(uv.min(1, keepdims=True))                             # small numbers keep their digits
    point = np.matmul(weights, uv)                                               # (P, T, 2)
    if clamp:
        point = point.clip(0, 1)
    column, row = point[..., 0] * width - 0.5, (1 - point[..., 1]) * height - 0.5
    left, top = np.floor(column), np.floor(row)
    across, down = (column - left)[..., None].astype(np.float32), (row - top)[..., None].astype(np.float32)
    left, top = left.astype(np.int64), top.astype(np.int64)

    def texel(i, j):
        i, j = (i.clip(0, height - 1), j.clip(0, width - 1)) if clamp else (i % height, j % width)
        return pyramid.texels[first + i * width + j]                             # (P, T, 3) uint8

    upper = texel(top, left) * (1 - across) + texel(top, left + 1) * across
    lower = texel(top + 1, left) * (1 - across) + texel(top + 1, left + 1) * across
    return (upper * (1 - down) + lower * down) / np.float32(255)


def has_color(texture: Texture, pyramids: Sequence[Pyramid | None], faces: np.ndarray) -> np.ndarray:
    """(P,) bool of chosen faces (P,): a picture and texture coordinates, or a plain colour? Arguments: sample_faces."""
    if not len(texture.material):
        return np.zeros(len(faces), bool)
    material = texture.material[faces]                                           # -1, none, reads the last entry
    known = np.array([pyramid is not None for pyramid in pyramids] + [False])[material]
    plain = np.array([pyramid is not None and len(pyramid.texels) == 1 for pyramid in pyramids] + [False])[material]
    return known & (plain | ~np.isnan(texture.uv[faces]).any((1, 2)))


def sample_faces(texture: Texture, pyramids: Sequence[Pyramid | None], faces: np.ndarray,
                 weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Colours (P, T, 3) float32 in 0..1 of chosen faces (P,) at barycentric weights (P or 1, T, 3), and (P,) bool: does
    the face have any? Without, they are 0. pyramids: one a material, None = neither picture nor colour."""
    colors = np.zeros((len(faces), weights.shape[1], 3), np.float32)
    has = has_color(texture, pyramids, faces)
    if not has.any():
        return colors, has
    material = np.where(has, texture.material[faces], -1)
    step = max(1, CHUNK // weights.shape[1])
    for number in np.unique(material[has]):
        pyramid, settings = pyramids[number], texture.materials[number]
        rows = np.flatnonzero(material == number)
        if len(pyramid.texels) == 1:
            colors[rows] = pyramid.texels[0] / np.float32(255)
            continue
        for part in (rows[i:i + step] for i in range(0, len(rows), step)):
            uv = texture.uv[faces[part]] * np.float32(settings.scale) + np.float32(settings.offset)
            colors[part] = sample_pyramid(pyramid, uv, weights if len(weights) == 1 else weights[part], settings.clamp)
    return colors, has


# -- data set ----------------------------------------------------------------------------------------------------------

@dataclass
class MeshTextureDataset(MeshDataset):
    """MeshDataset whose items also hold texture_sequences (N, F, T, 3) float32, RGB in 0..1, and texture_masks
    (N, F, T) bool, T = texture_samples: points drawn anew every time in training, the same ones in evaluation.
    num_colored: how many of all faces have any. Raises ValueError for training meshes of which none has."""

    texture_samples: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        self._textures: dict[int, Texture] = {}
        self._pyramids: dict[Path | tuple | None, Pyramid | None] = {None: None}         # of a picture or a colour
        self.num_colored = 0
        for index, path in enumerate(progress(self.files, "textures")):
            texture = read_texture(path, self.cache_dir)
            assert len(texture.material) in (0, self.num_faces[index]), f"{path}: not one material a face"
            if index in self._prepared:
                self._textures[index] = texture
            for image, color, *_ in texture.materials:
                if (source := image or color) not in self._pyramids:
                    self._pyramids[source] = read_pyramid(image, self.cache_dir) if image else plain_pyramid(color)
            self.num_colored += has_color(texture, self._pyramids_of(texture), np.arange(self.num_faces[index])).sum()
        if not self.views and not self.num_colored:
            raise ValueError(f"model.use_texture: none of the {len(self.files)} training meshes, as {self.files[0]}, "
                             f"has a texture or a colour; set it to false to train on geometry alone")

    def _pyramids_of(self, texture):
        return [self._pyramids[material.image or material.color] for material in texture.materials]

    def __getitem__(self, item: int) -> dict:
        sample = super().__getitem__(item)
        index = self.items[item][0]
        texture = self._textures[index] if index in self._textures else read_texture(self.files[index], self.cache_dir)
        mask = sample["mask"]                                                    # (N, F)
        T = self.texture_samples
        faces = sample["face_index"][mask].numpy()
        rng = np.random.default_rng(derived_seed(self.seed, self.epoch, item, 1))
        weights = fixed_weights(T) if self.views else random_weights(rng, len(faces), T)
        colors, has = sample_faces(texture, self._pyramids_of(texture), faces, weights)
        if not self.views:
            jitter = self.augmentation.color_jitter
            colors = (colors * rng.uniform(1 - jitter, 1 + jitter, 3).astype(np.float32)).clip(0, 1)
        sample["texture_sequences"] = torch.zeros(*mask.shape, T, 3)
        sample["texture_sequences"][mask] = torch.from_numpy(colors)
        sample["texture_masks"] = torch.zeros(*mask.shape, T, dtype=torch.bool)
        sample["texture_masks"][mask] = torch.from_numpy(has)[:, None]
        return sample
