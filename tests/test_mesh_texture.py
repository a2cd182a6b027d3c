"""Textures: read in file order, the right texel at every UV, means over faces, and what the network makes of them."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

import data.mesh_texture
import models.mesh_texture
from data.mesh import Augmentation, MeshSpec, feature_statistics
from data.mesh_io import read_mesh
from data.mesh_texture import (
    Material,
    MeshTextureDataset,
    fixed_weights,
    plain_pyramid,
    random_weights,
    read_mtl,
    read_pyramid,
    read_texture,
    sample_faces,
    sample_pyramid,
    texture_custom_collate_fn,
)
from models.downstream import DownstreamClassifier
from models.mesh_texture import (
    FUSIONS,
    IntegratedDownstreamClassifier,
    IntegratedTextureGeometryModel,
    TextureEncoder,
)
from models.nomeformer import Nomeformer
from tests.test_real_meshes import LOD3, needs_lod3
from tests.tiny_meshes import write_set, write_textured_set
from utils.losses import MaskedCrossEntropyLoss

FOUR = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 0]]], np.uint8)      # top row red green, then blue yellow
AT = {(0.25, 0.75): 0, (0.75, 0.75): 1, (0.25, 0.25): 2, (0.75, 0.25): 3}                  # u, v -> which of the four
CORNERS = np.eye(3, dtype=np.float32)[None]                                                # samples exactly at the corners


def save(path, pixels):
    Image.fromarray(pixels).save(path)
    return path


def at(pyramid, uv, clamp=False):
    """The colour at one texture coordinate, 0..255."""
    uv = np.broadcast_to(np.float32(uv), (1, 3, 2))
    return 255 * sample_pyramid(pyramid, uv, CORNERS, clamp)[0, 0]


# --- texels ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("offset", [(0, 0), (3, -2), (-160, 169)])
def test_quadrant_centres_of_a_picture_give_exact_colours(tmp_path, offset):
    """Catches a flipped v, BGR, clamping instead of repeating, and texel centres half a pixel off."""
    pyramid = read_pyramid(save(tmp_path / "four.png", FOUR))
    for uv, which in AT.items():
        assert np.abs(at(pyramid, np.add(uv, offset)) - FOUR.reshape(4, 3)[which]).max() < 0.02, (uv, offset)


def test_between_texels_it_is_bilinear_and_across_the_border_it_repeats_or_clamps(tmp_path):
    pyramid = read_pyramid(save(tmp_path / "four.png", FOUR))
    assert np.allclose(at(pyramid, (0.5, 0.75)), [127.5, 127.5, 0], atol=0.01)
    assert np.allclose(at(pyramid, (0.0, 0.75)), [127.5, 127.5, 0], atol=0.01)            # half green of the left neighbour
    assert np.allclose(at(pyramid, (0.0, 0.75), clamp=True), [255, 0, 0], atol=0.01)
    assert np.allclose(at(pyramid, (7.3, -2.0), clamp=True), [255, 255, 0], atol=0.01)     # the lower right corner


@pytest.mark.parametrize("mode", ["L", "P", "LA", "RGBA", "I;16"])
def test_every_kind_of_picture_becomes_rgb_on_white(tmp_path, mode):
    picture = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    picture.putpixel((1, 0), (0, 0, 0, 0))                                                # a transparent pixel
    picture = picture.convert("L" if mode == "I;16" else mode)
    picture = Image.fromarray(np.asarray(picture).astype(np.uint16) * 256) if mode == "I;16" else picture
    picture.save(tmp_path / "picture.png")
    texels = read_pyramid(tmp_path / "picture.png").texels
    red = 76 if mode in ("L", "LA", "I;16") else 255
    assert texels.shape == (3, 3) and abs(int(texels[0, 0]) - red) <= 1
    assert texels[1].tolist() == [0 if mode in ("L", "I;16") else 255] * 3


def test_points_are_spread_evenly_over_the_triangle():
    for weights in (fixed_weights(512), random_weights(np.random.default_rng(0), 1, 4096)):
        assert weights.min() >= 0 and np.allclose(weights.sum(-1), 1, atol=1e-6)
        assert np.abs(weights.mean(1) - 1 / 3).max() < 0.02
        assert np.abs(np.einsum("ti,tj->ij", weights[0], weights[0]) / len(weights[0])
                      - (1 + np.eye(3)) / 12).max() < 0.01                                # second moments of the uniform law
    assert np.abs(fixed_weights(8).mean(1) - 1 / 3).max() < 0.08


@pytest.mark.parametrize("count", [8, 32])
def test_mean_of_a_gradient_is_the_mean_of_the_triangle(tmp_path, count):
    """Taking the first pixels of a face, as the original does, gives its border instead."""
    ramp = np.repeat(np.linspace(0, 255, 256).astype(np.uint8)[None, :, None], 256, axis=0).repeat(3, axis=2)
    pyramid = read_pyramid(save(tmp_path / "ramp.png", ramp))
    uv = np.float32([[0.05, 0.1], [0.95, 0.2], [0.4, 0.9]])
    mean, deviation = uv[:, 0].mean(), uv[:, 0].std() / 2                                 # of u over the triangle
    weights = random_weights(np.random.default_rng(1), 500, count)
    found = sample_pyramid(pyramid, np.repeat(uv[None], 500, axis=0), weights)[..., 0].mean()
    assert abs(found - mean) < 3 * deviation / np.sqrt(500 * count) + 1 / 255
    assert abs(sample_pyramid(pyramid, uv[None], fixed_weights(count))[..., 0].mean() - mean) < 0.05


def test_fine_textures_are_averaged_and_coarse_ones_are_not(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    pyramid = read_pyramid(save(tmp_path / "noise.png", noise))
    assert pyramid.sizes[0] == (256, 256) and pyramid.sizes[-1] == (1, 1)
    whole = sample_pyramid(pyramid, np.float32([[[0, 0], [90, 0], [0, 90]]]), fixed_weights(16))
    assert np.abs(255 * whole - noise.mean((0, 1))).max() < 2                             # 90 times repeated: its mean
    small = 0.5 + np.float32([[[0, 0], [4, 0], [0, 4]]]) / 256
    assert sample_pyramid(pyramid, small, fixed_weights(16)).std() > 0.1                  # a face of 8 texels: the texels


def test_odd_sizes_keep_the_mean_at_every_level(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8)
    pyramid, start = read_pyramid(save(tmp_path / "odd.png", picture)), 0
    assert len(pyramid.texels) == sum(height * width for height, width in pyramid.sizes)
    for height, width in pyramid.sizes:
        level, start = pyramid.texels[start:start + height * width], start + height * width
        assert np.abs(level.mean(0) - picture.mean((0, 1))).max() < 12


def test_a_cached_picture_is_the_same_and_follows_its_content(tmp_path, monkeypatch):
    path, cache = save(tmp_path / "four.png", FOUR), tmp_path / "cache"
    first = np.array(read_pyramid(path, cache).texels)
    with monkeypatch.context() as patch:
        patch.setattr(data.mesh_texture, "_texels", lambda image: pytest.fail("made again"))
        assert np.array_equal(read_pyramid(path, cache).texels, first)
    entry, = cache.iterdir()
    entry.write_bytes(b"damaged")
    assert np.array_equal(read_pyramid(path, cache).texels, first)
    save(path, FOUR[::-1])
    assert np.array_equal(read_pyramid(path, cache).texels[:2], FOUR[1])


def test_pictures_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.png: no such picture"):
        read_pyramid(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(ValueError, match="text.png: this picture cannot be read"):
        read_pyramid(tmp_path / "text.png")


# --- files ----------------------------------------------------------------------------------------------------------

MTL = """# a comment
newmtl red brick
Kd 1 0 0
map_Kd -clamp on -s 2 2 1 -o 0.5 0 textures\\four.png

newmtl plain
Ks 1 1 1
Kd 0.25 0.5 1
newmtl options
map_Kd -blendu on -mm 0 1 -bm 0.5 my four.png
newmtl nothing
"""
OBJ = """mtllib a.mtl
v 0 0 0
v 1 0 0
v 1 1 0
v 0 1 0
vt 0 0
vt 1 0
vt 1 1 0.5
f 1 2 3
usemtl red brick
f 1/1 2/2 3/3
usemtl plain
f 1 2 3 4
usemtl options   # the quad has its coordinates backwards
f 1//1 2//1 3//1
f -4/-3 -3/-2/1 -2/-1 \\
  -1/-3
usemtl red brick
f 1/3/1 2/1/1 3/2/1
usemtl unknown
f 1/3 2/1 3/2
usemtl nothing
f 1/3 2/1 3/2
"""


@pytest.fixture
def obj(tmp_path):
    (tmp_path / "textures").mkdir()
    save(tmp_path / "textures" / "four.png", FOUR)
    save(tmp_path / "my four.png", FOUR)
    (tmp_path / "a.mtl").write_text(MTL)
    (tmp_path / "a.obj").write_text(OBJ)
    return tmp_path / "a.obj"


def test_materials(obj):
    materials = read_mtl(obj.with_suffix(".mtl"))
    assert list(materials) == ["red brick", "plain", "options", "nothing"]
    assert materials["red brick"] == Material(obj.parent / "textures/four.png", (1, 0, 0), True, (2, 2), (0.5, 0))
    assert materials["plain"] == Material(None, (0.25, 0.5, 1)) and materials["nothing"] == Material()
    assert materials["options"] == Material(obj.parent / "my four.png")


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_faces_of_many_materials_stay_in_file_order(obj, ends, tmp_path):
    obj.write_bytes(OBJ.replace("\n", ends).encode())
    for cache in (None, tmp_path / "cache", tmp_path / "cache"):
        texture = read_texture(obj, cache)
        names = [None if m < 0 else (texture.materials[m].image or texture.materials[m].color) for m in texture.material]
        four, other = obj.parent / "textures/four.png", obj.parent / "my four.png"
        assert names == [None, four, (0.25, 0.5, 1), (0.25, 0.5, 1), other, other, other, four, None, None]
        assert len(names) == len(read_mesh(obj).faces)
        corners = [[None if np.isnan(u) else (u, v) for u, v in face] for face in texture.uv.tolist()]
        assert corners[0] == corners[2] == corners[4] == [None] * 3
        assert corners[1] == [(0, 0), (1, 0), (1, 1)] and corners[7] == [(1, 1), (0, 0), (1, 0)]
        assert corners[5] == [(0, 0), (1, 0), (1, 1)] and corners[6] == [(0, 0), (1, 1), (0, 0)]


def test_a_face_has_a_picture_a_colour_or_nothing(obj):
    texture = read_texture(obj)
    pyramids = [read_pyramid(m.image) if m.image else plain_pyramid(m.color) if m.color else None for m in texture.materials]
    weights = CORNERS.repeat(8, axis=1)                     # so many that the picture itself is read, not a halved copy
    colors, has = sample_faces(texture, pyramids, np.arange(10), weights)
    #                       none   picture  plain       no vt  with vt     picture unknown nothing
    assert has.tolist() == [False, True, True, True, False, True, True, True, False, False]
    assert np.array_equal(colors[~has], np.zeros((4, 24, 3)))
    assert np.allclose(colors[2:4], np.rint(255 * np.array([0.25, 0.5, 1])) / 255)
    # uv (0, 0), (1, 0), (1, 1) times 2 plus (0.5, 0), clamped: bottom middle, bottom right, top right
    assert np.allclose(255 * colors[1][::8], [[127.5, 127.5, 127.5], [255, 255, 0], [0, 255, 0]], atol=0.01)
    chosen = np.array([7, 2, 0])
    some, some_has = sample_faces(texture, pyramids, chosen, weights)
    assert np.array_equal(some, colors[chosen]) and np.array_equal(some_has, has[chosen])


def test_a_changed_material_file_counts_although_the_mesh_is_cached(obj, tmp_path):
    read_texture(obj, tmp_path / "cache")
    obj.with_suffix(".mtl").write_text(MTL.replace("0.25 0.5 1", "0 0 0"))
    assert read_texture(obj, tmp_path / "cache").materials[1].color == (0, 0, 0)


@pytest.mark.parametrize("before, after, error, message", [
    ("mtllib a.mtl", "mtllib b.mtl", FileNotFoundError, "b.mtl: no such material file"),
    ("f 1/1 2/2 3/3", "f 1/1 2/2 3/9", ValueError, "texture coordinate 9 of 3"),
    ("f 1/1 2/2 3/3", "f 1/1 2/2 3/-4", ValueError, "texture coordinate -4 of 3"),
    ("f 1/1 2/2 3/3", "f 1/1 2/x 3/3", ValueError, "cannot be read"),
    ("vt 1 0", "vt 1", ValueError, "cannot be read"),
    ("f 1/1 2/2 3/3", "f 1/1 2/2 3/3\nf", ValueError, "a.obj: the texture coordinates cannot be read"),
    ("vt 1 0", "vt 1 inf", ValueError, "coordinate of inf"),
    ("vt 1 0", "vt 1 -3e38", ValueError, "coordinate of 3e"),
])
def test_wrong_obj_files_are_named(obj, before, after, error, message):
    obj.write_text(OBJ.replace(before, after))
    with pytest.raises(error, match=message):
        read_texture(obj)


def test_wrong_material_lines_are_named(obj):
    for line in ("Kd 1 0", "Kd red", "Kd nan 0 0", "Kd 204 51 51", "Kd 0 0 -inf", "newmtl", "map_Kd -s 1e400 1 1 a.png"):
        obj.with_suffix(".mtl").write_text(f"newmtl a\n{line}\n")
        with pytest.raises(ValueError, match=f"a.mtl: line 2 cannot be read: '{line}'"):
            read_mtl(obj.with_suffix(".mtl"))


def test_names_as_exporters_write_them(tmp_path):
    """A # within a name, umlauts of Windows, several material files in one line, paths of another machine."""
    (tmp_path / "a b.mtl").write_bytes("newmtl Material #1\nKd 1 0 0 # red\nnewmtl Material #2\nKd 0 1 0\n"
                                       "newmtl T\u00fcr\nKd 0 0 1\n".encode("latin-1"))
    (tmp_path / "c.mtl").write_text("newmtl T\u00f6r\nmap_kd -s +2 2 1 C:\\Users\\me\\w\u00e4nde #3.png\n", encoding="utf-8")
    save(tmp_path / "w\u00e4nde #3.png", FOUR)
    names = ["Material #1", "Material #2", "Material #1 # again", "T\u00fcr", "T\u00f6r", "Material #3"]
    (tmp_path / "a.obj").write_bytes("".join(["usemtl Material #1\nmtllib C:\\here\\a b.mtl c.mtl\n", "v 0 0 0\n" * 3,
                                              *(f"usemtl {name}\nf 1 2 3 # face\n" for name in names)]).encode("latin-1"))
    texture = read_texture(tmp_path / "a.obj")
    found = [texture.materials[number] for number in texture.material]
    assert [m.color for m in found] == [(1, 0, 0), (0, 1, 0), (1, 0, 0), (0, 0, 1), None, None]
    assert found[4] == Material(tmp_path / "w\u00e4nde #3.png", scale=(2, 2)) and found[5] == Material()
    assert len(read_mesh(tmp_path / "a.obj").faces) == 6


def ply_of(texture, mesh, path, binary, names):
    """A PLY as the SUM cities have it, with a property behind the lists."""
    rows, header = [], ["ply", f"format {'binary_little_endian' if binary else 'ascii'} 1.0",
                        *(f"comment TextureFile {name}" for name in names), f"element vertex {len(mesh.vertices)}",
                        *(f"property float {axis}" for axis in "xyz"), f"element face {len(mesh.faces)}",
                        "property list uchar int vertex_indices", "property list uchar float texcoord",
                        "property int texnumber", "property int label", "end_header", ""]
    number = {}
    for corner, uv, material in zip(mesh.faces, texture.uv, texture.material, strict=True):
        textured = material >= 0 and texture.materials[material].image is not None and not np.isnan(uv).any()
        which = number.setdefault(texture.materials[material].image.name, len(number)) if textured else -1
        rows.append(([*corner], [*uv.ravel()] if textured else [], which))
    if binary:
        body = np.float32(mesh.vertices).tobytes() + b"".join(
            bytes([3]) + np.int32(c).tobytes() + bytes([len(uv)]) + np.float32(uv).tobytes() + np.int32([n, 0]).tobytes()
            for c, uv, n in rows)
    else:
        body = "".join(f"{' '.join(map(str, v))}\n" for v in mesh.vertices.tolist()).encode() + "".join(
            f"3 {' '.join(map(str, c))} {len(uv)} {' '.join(map(str, uv))} {n} 0\n" for c, uv, n in rows).encode()
    path.write_bytes("\n".join(header).encode() + body)
    return path


@pytest.mark.parametrize("before, after, message", [
    ("3 0 1 2 6 0 0 1 0 0 1 0", "3 0 1 2 6 0 0 1 0 0 1 1", "texnumber 1, but the header names 1 TextureFile"),
    ("3 0 1 2 6 0 0 1 0 0 1 0", "3 0 1 2 4 0 0 1 0 0", "face 0 has a texcoord list"),
    (" 0 0 1 0 0 1 0", " 0 0 1 0 0 1 -1", None),
    (" 0 0 1 0 0 1 0", " 0 0 nan 0 0 1 0", None)])
def test_wrong_ply_files_are_named_and_faces_without_number_or_coordinates_have_no_texture(tmp_path, before, after, message):
    text = ("ply\nformat ascii 1.0\ncomment TextureFile \u00fc 1.png\nelement vertex 3\nproperty float x\nproperty float y\n"
            "property float z\nelement face 1\nproperty list uchar int vertex_indices\n"
            "property list uchar float texcoord\nproperty int texnumber\nend_header\n0 0 0\n1 0 0\n0 1 0\n"
            "3 0 1 2 6 0 0 1 0 0 1 0\n")
    path, pyramid = tmp_path / "a.ply", read_pyramid(save(tmp_path / "\u00fc 1.png", FOUR))
    for body, has in ((text, True), (text.replace(before, after), False)):
        path.write_text(body, encoding="utf-8")
        if message and not has:
            with pytest.raises(ValueError, match=message):
                read_texture(path)
            continue
        texture = read_texture(path)
        assert texture.materials[0].image.is_file()
        assert sample_faces(texture, [pyramid], np.arange(1), fixed_weights(4))[1].item() == has


@pytest.mark.parametrize("axes", [("s", "t"), ("texture_u", "texture_v"), ("u", "v")])
def test_texture_coordinates_of_vertices_in_a_ply(tmp_path, axes):
    """As MeshLab writes them; a quad and a triangle, whose corners are those of the OBJ with the same coordinates."""
    uv = [(0, 0), (0.5, 0), (0.5, 0.5), (0, 0.5), (0.9, 0.1)]
    save(tmp_path / "four.png", FOUR)
    head = "ply\nformat ascii 1.0\ncomment TextureFile four.png\nelement vertex 5\n" + "".join(f"property float {name}\n" for name in (*"xyz", *axes))
    body = "".join(f"{x} {y} 0 {x} {y}\n" for x, y in uv) + "4 0 1 2 3\n3 4 2 1\n"
    text = f"{head}element face 2\nproperty list uchar int vertex_indices\nend_header\n{body}"
    (tmp_path / "a.ply").write_text(text)
    (tmp_path / "a.mtl").write_text("newmtl m\nmap_Kd four.png\n")
    (tmp_path / "a.obj").write_text("mtllib a.mtl\n" + "".join(f"v {x} {y} 0\nvt {x} {y}\n" for x, y in uv) + "usemtl m\nf 1/1 2/2 3/3 4/4\nf 5/5 3/3 2/2\n")
    one, other = read_texture(tmp_path / "a.obj"), read_texture(tmp_path / "a.ply")
    assert np.array_equal(one.uv, other.uv) and other.material.tolist() == [0, 0, 0] and other.materials == one.materials
    (tmp_path / "a.ply").write_text(text.replace("comment TextureFile four.png\n", ""))
    assert read_texture(tmp_path / "a.ply").material.tolist() == [-1, -1, -1]
    (tmp_path / "a.ply").write_text(text.replace("element vertex", "comment TextureFile b.png\nelement vertex"))
    with pytest.raises(ValueError, match="a.ply: 2 TextureFile in the header, and no texnumber says which one a face has"):
        read_texture(tmp_path / "a.ply")


@pytest.mark.parametrize("binary", [True, False])
def test_ply_of_a_city_tile_equals_the_obj(obj, binary):
    (obj.parent / "a.mtl").write_text(MTL.replace("-clamp on -s 2 2 1 -o 0.5 0 textures\\four.png", "four 1.png"))
    save(obj.parent / "four 1.png", FOUR[::-1])
    one, mesh = read_texture(obj), read_mesh(obj)
    ply = ply_of(one, mesh, obj.with_suffix(".ply"), binary, ["four 1.png", "my four.png"])
    other = read_texture(ply)
    colors = {}
    for name, texture in (("obj", one), ("ply", other)):
        pyramids = [read_pyramid(m.image) if m.image else None for m in texture.materials]
        colors[name] = sample_faces(texture, pyramids, np.arange(len(mesh.faces)), fixed_weights(8))
    assert np.array_equal(colors["obj"][1], colors["ply"][1]) and colors["ply"][1].sum() == 4
    assert np.allclose(colors["obj"][0], colors["ply"][0], atol=1e-6)


def test_meshes_without_texture_have_none(obj):
    (obj.parent / "a.off").write_text("OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n")
    texture = read_texture(obj.parent / "a.off")
    colors, has = sample_faces(texture, [], np.arange(1), fixed_weights(4))
    assert not has.any() and not colors.any()


@needs_lod3
def test_buildings_give_the_same_colours_as_obj_and_as_ply(tmp_path):
    """Several hundred faces of 4 to 12 materials, texture coordinates between -162 and 169."""
    files = sorted((LOD3 / "train").glob("*.obj"), key=lambda path: path.stat().st_size)[:6]
    shares = []
    for path in files:
        found = []
        for texture in (read_texture(path), read_texture(path.with_suffix(".ply"))):
            pyramids = [read_pyramid(m.image, tmp_path) if m.image else None for m in texture.materials]
            found.append(sample_faces(texture, pyramids, np.arange(len(texture.material)), fixed_weights(8)))
        assert np.array_equal(found[0][1], found[1][1])
        assert np.abs(found[0][0] - found[1][0]).max() < 5e-3
        shares.append(found[0][1].mean())
    assert 0.05 < np.mean(shares) < 0.9


# --- data set -------------------------------------------------------------------------------------------------------

SPEC = MeshSpec(("corners", "normal", "area"), faces_per_cluster=16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_textured_set(tmp_path_factory.mktemp("textured"), 6)


def meshes(folder, views=0, num_classes=2, **settings):
    return MeshTextureDataset(sorted(folder.glob("*.obj")), folder, SPEC, num_classes, views=views, texture_samples=6,
                              **settings)


def test_items_hold_the_colours_of_their_faces(folder):
    dataset = meshes(folder, views=1)
    for item in range(len(dataset)):
        sample, texture = dataset[item], read_texture(dataset.files[item])
        colors, has = sample_faces(texture, [read_pyramid(m.image) for m in texture.materials],
                                   np.arange(dataset.num_faces[item]), fixed_weights(6))
        mask, index = sample["mask"], sample["face_index"]
        assert np.array_equal(sample["texture_sequences"][mask].numpy(), colors[index[mask]])
        assert np.array_equal(sample["texture_masks"][mask].numpy(), np.repeat(has[index[mask]][:, None], 6, axis=1))
        assert not sample["texture_sequences"][~mask].any() and not sample["texture_masks"][~mask].any()


def test_training_draws_other_points_every_epoch_and_the_same_again(folder, tmp_path):
    dataset, views = meshes(folder, seed=3, cache_dir=tmp_path), meshes(folder, views=1)
    first = dataset[0]["texture_sequences"]
    assert torch.equal(first, dataset[0]["texture_sequences"])
    assert torch.equal(first, meshes(folder, seed=3)[0]["texture_sequences"])             # cache or not
    assert torch.equal(views[0]["texture_sequences"], views[0]["texture_sequences"])
    dataset.set_epoch(1)
    assert not torch.equal(first, dataset[0]["texture_sequences"])


def test_colour_jitter_scales_the_channels_of_a_training_item(folder):
    plain, jittered = (meshes(folder, augmentation=Augmentation(color_jitter=j))[0] for j in (0.0, 0.5))
    has = plain["texture_masks"]
    factor = jittered["texture_sequences"][has] / plain["texture_sequences"][has].clamp(min=1e-3)
    inside = (jittered["texture_sequences"][has] < 0.999) & (plain["texture_sequences"][has] > 0.05)
    groups = [factor[:, channel][inside[:, channel]] for channel in range(3)]
    assert all(len(values) > 50 and values.max() - values.min() < 1e-4 for values in groups)
    means = torch.stack([values.mean() for values in groups])
    assert means.min() >= 0.5 and means.max() <= 1.5 and means.std() > 0.05
    assert jittered["texture_sequences"].max() <= 1
    views = [meshes(folder, views=1, augmentation=Augmentation(color_jitter=j))[0]["texture_sequences"] for j in (0, 0.5)]
    assert torch.equal(*views)


def test_meshes_beyond_the_memory_keep_their_textures(folder, tmp_path, monkeypatch):
    expected = meshes(folder)
    monkeypatch.setattr(data.mesh, "FACES_IN_MEMORY", 100)
    dataset = meshes(folder, cache_dir=tmp_path)
    assert len(dataset._textures) < 6
    assert all(torch.equal(dataset[i]["texture_sequences"], expected[i]["texture_sequences"]) for i in range(6))


def test_training_meshes_without_any_colour_are_refused(folder, tmp_path):
    plain = write_set(tmp_path, 2)
    with pytest.raises(ValueError, match="none of the 2 training meshes, as .*mesh_00.obj, has a texture"):
        meshes(plain, num_classes=3)
    (tmp_path / "uncoordinated").mkdir()
    for path in (f for f in folder.iterdir() if "_00." in f.name):
        text = path.read_bytes()
        (tmp_path / "uncoordinated" / path.name).write_bytes(re.sub(rb"/\d", b"", text) if path.suffix == ".obj" else text)
    with pytest.raises(ValueError, match="none of the 1 training meshes"):     # pictures, but no f with coordinates
        meshes(tmp_path / "uncoordinated")
    assert meshes(folder).num_colored == sum(meshes(folder).num_faces)
    assert not meshes(plain, views=1, num_classes=3)[0]["texture_masks"].any()


def test_collating_pads_the_texture(folder):
    dataset = meshes(folder, views=1)
    batch = texture_custom_collate_fn([dataset[0], dataset[1]])
    B, N, slots = batch["mask"].shape
    assert batch["texture_sequences"].shape == (B, N, slots, 6, 3) and batch["texture_masks"].shape == (B, N, slots, 6)
    assert batch["texture_sequences"].dtype == torch.float32 and batch["texture_masks"].dtype == torch.bool
    assert not batch["texture_masks"][~batch["mask"]].any() and batch["features"].shape == (B, N, slots, 13)


# --- network --------------------------------------------------------------------------------------------------------

def integrated(fusion="gated", seed=0, **options):
    torch.manual_seed(seed)
    model = IntegratedTextureGeometryModel(13, 16, 2, 2, texture_embed_dim=8, fusion=fusion, **options).eval()
    torch.nn.init.normal_(model.summary_token)
    return model


def batch_of(folder):
    dataset = meshes(folder, views=1)
    return texture_custom_collate_fn([dataset[0], dataset[1]])


def run(model, batch, sequences, masks):
    return model(batch["features"], batch["mask"], batch["centroid"], texture_sequences=sequences, texture_masks=masks)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_swapped_textures_change_the_output(folder, fusion):
    """The original's concat never looks at the texture."""
    model, batch = integrated(fusion), batch_of(folder)
    sequences, masks = batch["texture_sequences"], batch["texture_masks"]
    change = (run(model, batch, sequences, masks) - run(model, batch, sequences.flip(-1), masks)).abs().amax(-1)
    assert (change[batch["mask"]] > 1e-4).all()


def test_padding_changes_nothing(folder):
    model, batch = integrated(), batch_of(folder)
    pad = torch.nn.functional.pad
    padded = {"features": pad(batch["features"], (0, 0, 0, 5, 0, 3), value=1e3), "mask": pad(batch["mask"], (0, 5, 0, 3)),
              "centroid": pad(batch["centroid"], (0, 0, 0, 5, 0, 3), value=1e3)}
    masks, (N, slots) = pad(batch["texture_masks"], (0, 0, 0, 5, 0, 3)), batch["mask"].shape[1:]
    for sequences in (batch["texture_sequences"], batch["texture_sequences"].flip(-1)):
        out = run(model, padded, pad(sequences, (0, 0, 0, 0, 0, 5, 0, 3), value=float("nan")), masks)
        assert torch.allclose(out[:, :N, :slots], run(model, batch, sequences, batch["texture_masks"]), atol=1e-5)
    assert not out[:, N:].any()


def test_many_faces_go_through_the_texture_encoder_in_parts(folder, monkeypatch):
    """Attention on CUDA refuses more than 65,535 sequences; all faces of a large mesh at once would also fill memory."""
    model, batch = integrated(), batch_of(folder)
    expected, sizes = run(model, batch, batch["texture_sequences"], batch["texture_masks"]), []
    monkeypatch.setattr(models.mesh_texture, "CHUNK", 50)
    model.texture_encoder.register_forward_hook(lambda module, inputs, out: sizes.append(len(out)))
    out = run(model, batch, batch["texture_sequences"], batch["texture_masks"])
    assert torch.allclose(out, expected, atol=1e-6) and max(sizes) <= 50
    assert sum(sizes) == batch["mask"].sum()                                              # no padding among them


def test_parameters_have_gradients_where_no_face_has_texture(folder):
    """DistributedDataParallel waits for them."""
    model, batch = integrated(), batch_of(folder)
    run(model, batch, batch["texture_sequences"], torch.zeros_like(batch["texture_masks"])).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for n, p in model.named_parameters() if n.startswith("texture_"))


@pytest.mark.parametrize("fusion", FUSIONS)
def test_faces_without_texture_use_geometry_alone_exactly(folder, fusion):
    """Whatever lies in their slots, NaN too; and with no texture at all it is the plain encoder, bit for bit."""
    model, batch = integrated(fusion), batch_of(folder)
    sequences, masks = batch["texture_sequences"], batch["texture_masks"].clone()
    masks[:, ::2] = False
    garbage = torch.where(masks[..., None], sequences, float("nan"))
    out = run(model, batch, garbage, masks)
    assert torch.isfinite(out).all() and torch.equal(out, run(model, batch, sequences, masks))
    out.square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)

    plain = Nomeformer(13, 16, 2, 2).eval()
    plain.load_state_dict({n: t for n, t in model.state_dict().items() if not n.startswith("texture_")})
    expected = plain(batch["features"], batch["mask"], batch["centroid"])
    assert torch.equal(run(model, batch, garbage, torch.zeros_like(masks)), expected)
    assert torch.equal(model(batch["features"], batch["mask"], batch["centroid"]), expected)
    assert not torch.equal(run(model, batch, sequences, batch["texture_masks"]), expected)


def test_order_and_number_of_equal_samples_do_not_matter():
    torch.manual_seed(0)
    encoder = TextureEncoder(8).eval()
    torch.nn.init.normal_(encoder.summary_token)
    colors, valid = torch.rand(5, 6, 3), torch.ones(5, 6, dtype=torch.bool)
    out = encoder(colors, valid)
    assert torch.allclose(out, encoder(colors[:, torch.randperm(6)], valid), atol=1e-6)
    valid[:, 4:] = False
    few = encoder(colors, valid)
    assert torch.allclose(few, encoder(colors[:, :4], valid[:, :4]), atol=1e-6) and not torch.allclose(few, out, atol=1e-3)


@pytest.mark.parametrize("unfrozen", [0, 1, "all"])
def test_the_texture_is_trained_whatever_is_frozen(folder, unfrozen):
    model, batch = IntegratedDownstreamClassifier(integrated(), 2, unfrozen_layers=unfrozen), batch_of(folder)
    logits = model(batch["features"], batch["mask"], batch["centroid"], texture_sequences=batch["texture_sequences"],
                   texture_masks=batch["texture_masks"])
    MaskedCrossEntropyLoss()(logits, batch["label"], batch["mask"]).backward()
    for name, parameter in model.named_parameters():
        trained = unfrozen == "all" or name.startswith(("head.", "encoder.texture_")) or unfrozen == 1 and name.startswith(
            ("encoder.blocks.1", "encoder.norm."))
        assert (parameter.grad is not None) == trained == parameter.requires_grad, name
        if trained and "texture_" in name:
            assert parameter.grad.abs().sum() > 0 or name.endswith("qkv.bias"), name
    assert not model.encoder_is_frozen and model.encoder.texture_encoder.training
    assert model.encoder.blocks[0].training == (unfrozen == "all")


def test_unknown_fusion_is_named():
    with pytest.raises(ValueError, match="model.fusion_method='sum': expected one of gated, concat, add"):
        IntegratedTextureGeometryModel(13, 16, 2, 2, fusion="sum")


@pytest.mark.parametrize("fusion", FUSIONS)
def test_two_colours_are_told_apart_by_texture_only(folder, fusion):
    """The label is the colour of the face's picture: accuracy 1 with texture, chance on geometry alone."""
    dataset = meshes(folder, views=1)
    accuracy = {}
    for textured in (True, False):
        torch.manual_seed(0)
        encoder = integrated(fusion) if textured else Nomeformer(13, 16, 2, 2)
        encoder.feature_mean[:], encoder.feature_std[:] = feature_statistics(dataset)
        kind = IntegratedDownstreamClassifier if textured else DownstreamClassifier
        model, criterion = kind(encoder, 2, "linear", 0.0, "all"), MaskedCrossEntropyLoss()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        *train, test = (texture_custom_collate_fn([dataset[i]]) for i in range(6))
        for step in range(30):
            batch = train[step % 5]
            more = {name: batch[name] for name in ("texture_sequences", "texture_masks")} if textured else {}
            criterion(model(batch["features"], batch["mask"], batch["centroid"], **more), batch["label"],
                      batch["mask"]).backward()
            optimizer.step()
            optimizer.zero_grad()
        model.eval()
        more = {name: test[name] for name in ("texture_sequences", "texture_masks")} if textured else {}
        pred = model(test["features"], test["mask"], test["centroid"], **more).argmax(-1)
        accuracy[textured] = (pred == test["label"])[test["mask"]].float().mean().item()
    assert accuracy[True] == 1.0 and 0.3 < accuracy[False] < 0.7
