"""Meshes: order of faces, each format against trimesh where that keeps the order, each error. Labels likewise."""

import io
import json
import random
import re
import struct
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import trimesh

from data import mesh_formats, mesh_io
from data.label_map import read_label_map
from data.mesh_io import find_label_file, list_meshes, read_labels, read_mesh, write_glb, write_labels, write_ply
from utils.losses import IGNORE_INDEX

REAL = Path(__file__).parents[2] / "shared" / "data" / "mesh"
SQUARE = "v 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\n"


def write(path, content):
    path.write_bytes(content) if isinstance(content, bytes) else path.write_text(content, newline="")
    return path


def sphere(subdivisions=2):
    """Vertices (V, 3) and faces (F, 3) in a shuffled order, so that no loader keeps it by luck."""
    mesh = trimesh.creation.icosphere(subdivisions)
    return np.array(mesh.vertices), np.random.default_rng(0).permutation(np.array(mesh.faces))


def obj_text(vertices, faces):
    return "".join(f"v {x!r} {y!r} {z!r}\n" for x, y, z in vertices.tolist()) + \
           "".join(f"f {a} {b} {c}\n" for a, b, c in (faces + 1).tolist())


# --- OBJ ------------------------------------------------------------------------------------------------------------

def test_obj_keeps_file_order_over_interleaved_materials(tmp_path):
    vertices, faces = sphere()
    lines = [f"usemtl m{i % 3}\nf {a}/{a} {b}/{b} {c}/{c}" for i, (a, b, c) in enumerate((faces + 1).tolist())]
    head = "mtllib none.mtl\no thing\ng part\ns 1\n" + "vt 0 0\nvn 0 0 1\n" * len(vertices)
    mesh = read_mesh(write(tmp_path / "a.obj", head + obj_text(vertices, faces[:0]) + "\n".join(lines)))
    assert np.array_equal(mesh.faces, faces) and np.array_equal(mesh.vertices, vertices)
    assert mesh.polygon is None and mesh.properties is None and mesh.path == str(tmp_path / "a.obj")
    assert mesh.faces.dtype == np.int64 and mesh.vertices.dtype == np.float64


def test_permuted_face_lines_permute_the_faces(tmp_path):
    vertices, faces = sphere()
    order = np.random.default_rng(1).permutation(len(faces))
    mesh = read_mesh(write(tmp_path / "a.obj", obj_text(vertices, faces[order])))
    assert np.array_equal(mesh.faces, faces[order])


@pytest.mark.parametrize(("face_lines", "faces", "polygon"), [
    ("f 1 2 3\nf 1 3 4", [[0, 1, 2], [0, 2, 3]], None),
    ("f 1/1 2/2 3/3", [[0, 1, 2]], None),
    ("f 1//9 2//9 3//9", [[0, 1, 2]], None),
    ("f 1/5/9 2/6 3//7 ", [[0, 1, 2]], None),
    ("f -4 -3 -2\nf -4//-1 -2//-1 -1//-1", [[0, 1, 2], [0, 2, 3]], None),
    ("f 1 2 3 4\nf 1 2 3", [[0, 1, 2], [0, 2, 3], [0, 1, 2]], [0, 0, 1]),
    ("f 3 4 1\nf 1 2 3 4 -1\nf 2 3 4 1", [[2, 3, 0], [0, 1, 2], [0, 2, 3], [0, 3, 3], [1, 2, 3], [1, 3, 0]],
     [0, 1, 1, 1, 2, 2]),
    ("f 1 1 2\nf 1 2 3\nf 1 2 3\nf 3 2 1", [[0, 0, 1], [0, 1, 2], [0, 1, 2], [2, 1, 0]], None),   # kept, all of them
    ("f 1 2 \\\n 3\n", [[0, 1, 2]], None),
    ("f 1 2 3 \\\n", [[0, 1, 2]], None),
    ("# f 9 9 9\n  f 1 2 3 # f 1 2 4\n\n \t\n\tf\t2 3 4", [[0, 1, 2], [1, 2, 3]], None),
    ("f 1 2 5\nv 9 9 9\nf -1 1 2", [[0, 1, 4], [4, 0, 1]], None),              # a vertex below the face; -1 counts back
    ("fancy 1 2 3\nf 1 2 3\nvp 1 2\nvn 0 0 1\nl 1 2\np 1", [[0, 1, 2]], None),
])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_obj_syntax(tmp_path, face_lines, faces, polygon, newline):
    text = (SQUARE + face_lines).replace("\n", newline)
    mesh = read_mesh(write(tmp_path / "a.obj", text))
    assert mesh.faces.tolist() == faces
    assert (mesh.polygon if polygon is None else mesh.polygon.tolist()) == polygon
    assert mesh.vertices[:4].tolist() == [[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]]
    assert mesh_formats._parse_obj(text.replace(newline, "\n").encode()) is not None, "left to the slow parser"


def test_obj_vertices_with_weight_and_colour_and_byte_order_mark(tmp_path):
    text = "\ufeffv 0 0 0 1\nv 1 0 0 0.5 0.5 0.5\nv -1e-3 +2.5 .5\nf 1 2 3\n"
    mesh = read_mesh(write(tmp_path / "a.obj", text.encode()))
    assert mesh.vertices.tolist() == [[0, 0, 0], [1, 0, 0], [-0.001, 2.5, 0.5]]


def test_obj_fast_parser_equals_the_one_by_line(tmp_path, monkeypatch):
    rng = random.Random(0)
    blocks = mesh_formats.blocks
    monkeypatch.setattr(mesh_formats, "blocks", lambda text, size: blocks(text, 50))       # several even here
    for _ in range(100):
        lines, n = [], 0
        for _ in range(rng.randint(1, 60)):
            if n < 3 or rng.random() < 0.4:
                extra = rng.choice(["", " 1", " 0 1 0"])
                lines.append(f"v {rng.gauss(0, 1)} {rng.gauss(0, 1e5)} {rng.randint(-9, 9)}{extra}")
                n += 1
            else:
                corner = [rng.choice([rng.randint(1, n), rng.randint(-n, -1)]) for _ in range(rng.choice([3, 3, 4, 7]))]
                lines.append("f " + " ".join(f"{c}" + rng.choice(["", "/1", "//2", "/1/2", "/-1/-2"]) for c in corner))
            if rng.random() < 0.2:
                lines.append(rng.choice(["# v 1 2 3", "", "usemtl a\\b", "vt 0 1", "g f 1 2 3", "s off"]))
        text = "\n".join(lines).encode()
        fast, slow = mesh_formats._parse_obj(text), mesh_formats._parse_obj_by_line(text, tmp_path)
        if fast is None:
            assert not len(slow[2])                                        # no face drawn
        else:
            assert all(np.array_equal(f, s) for f, s in zip(fast[:3], slow[:3], strict=True))


@pytest.mark.parametrize(("lines", "message"), [
    ("f 1 2 5", "line 5: face index 5, but the file has 4 vertices"),
    ("f 1 2 3\nf 0 1 2", "line 6: face index 0 names no vertex"),
    ("f 1 2 3\nf -5 1 2", "line 6: face index -5 names no vertex"),
    ("f 1 2", "line 5: a face of 2 corners"),
    ("f ", "line 5: a face of 0 corners"),
    ("f 1 2 \\\n x", "line 6 cannot be read"),
    ("f 1 2 3.5", "line 5 cannot be read: 'f 1 2 3.5'"),
    ("f 1 2 3\nf 0 1 2 \\", "line 7: face index 0"),                       # ends in a continuation
    ("f 1 2 /3", "line 5 cannot be read"),
    ("v 1 2\nf 1 2 3", "line 5 cannot be read: 'v 1 2'"),
    ("v 1 2 3-4\nf 1 2 3", "line 5 cannot be read"),
    ("v 1,5 2 3\nf 1 2 3", "line 5 cannot be read"),
    ("f 1 2 99999999999999999999", "line 5: face index 99999999999999999999"),
    ("", "no faces"),
    ("v nan 0 0\nv 0 inf 0\nf 1 2 3", "2 of 6 vertices have a NaN or infinite coordinate, the first is vertex 4"),
])
def test_obj_errors_name_file_and_line(tmp_path, lines, message):
    path = write(tmp_path / "bad.obj", SQUARE + lines)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read_mesh(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


# --- other formats --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("suffix", [".obj", ".ply", ".off", ".stl", ".glb"])
def test_every_format_as_trimesh_writes_it(tmp_path, suffix):
    vertices, faces = sphere()
    path = tmp_path / f"a{suffix}"
    trimesh.Trimesh(vertices, faces, process=False).export(path)
    mesh = read_mesh(path)
    assert mesh.faces.shape == faces.shape and mesh.polygon is None
    assert np.allclose(mesh.vertices[mesh.faces], vertices[faces], atol=1e-6)
    assert len(mesh.vertices) == len(vertices)                             # STL: merged again
    if suffix != ".stl":
        oracle = trimesh.load_mesh(path, process=False)
        assert np.array_equal(mesh.faces, oracle.faces) and np.array_equal(mesh.vertices, oracle.vertices)


def test_ascii_stl_of_two_solids_and_suffix_in_capitals(tmp_path):
    facet = "facet normal 0 0 1\nouter loop\nvertex {}\nvertex {}\nvertex {}\nendloop\nendfacet\n"
    a, b, c, d = "0 0 0", "1 0 0", "1 1 0", "-0 1 0"
    text = f"solid z\n{facet.format(a, c, d)}{facet.format(a, b, c)}endsolid z\n" \
           f"solid a\n{facet.format(a, d, d)}endsolid a\n"
    mesh = read_mesh(write(tmp_path / "a.STL", text))
    assert mesh.vertices[mesh.faces].tolist() == [[[0, 0, 0], [1, 1, 0], [0, 1, 0]], [[0, 0, 0], [1, 0, 0], [1, 1, 0]],
                                                  [[0, 0, 0], [0, 1, 0], [0, 1, 0]]]
    assert len(mesh.vertices) == 4


def stl_text(*solids, point="0 1 0"):
    facet = f"facet normal 0 0 1\nouter loop\nvertex 0 0 0\nvertex 1 0 0\nvertex {point}\nendloop\nendfacet\n"
    return "".join(f"solid {name}\n{facet}endsolid {name}\n" for name in solids)


@pytest.mark.parametrize("text", [stl_text("a", "a"), stl_text("Vertex 1", "outer facet"), stl_text("bendsolid", ""), stl_text("a", "b").upper(),
                                  stl_text("a", "b").replace("\n", "\r"), "\ufeff" + stl_text("a", "b").replace("\n", "\r\n"),
                                  stl_text("a").replace("endsolid a\n", stl_text("").split("\n", 1)[1]).replace("normal 0 0 1", "")])
def test_text_stl_whatever_its_names(tmp_path, text):
    corners = read_mesh(write(tmp_path / "a.stl", text))
    assert corners.vertices[corners.faces].tolist() == 2 * [[[0, 0, 0], [1, 0, 0], [0, 1, 0]]]


@pytest.mark.parametrize("text", [
    stl_text("a", "b").removesuffix("endsolid b\n"), stl_text("a", "b")[:-60], stl_text("a") + stl_text("b", point="1.#IND 0 0"), stl_text("a", point="0,5 1 0"),
    stl_text("a", point="0 1 0\nvertex 1 1 0"), stl_text("a", point="0 1 0 0"), stl_text("a", "b").replace("vertex 1 0 0\n", "", 1)])
def test_text_stl_of_which_a_facet_would_be_lost_is_refused(tmp_path, text):
    with pytest.raises(ValueError, match="a.stl: cannot be read as STL .*cut short or damaged"):
        read_mesh(write(tmp_path / "a.stl", text))


def test_binary_stl_whose_header_begins_with_solid(tmp_path):
    rows = np.zeros(2, mesh_formats.STL_FACET)
    rows["corner"], rows["attribute"] = [[[0, 0, 0], [1, 0, 0], [0, 1, 0]], [[1, 0, 0], [1, 1, 0], [0, 1, 0]]], 0x801F
    data = b"solid of a CAD program, facet vertex".ljust(80) + struct.pack("<I", 2) + rows.tobytes()
    mesh = read_mesh(write(tmp_path / "a.stl", data))
    assert mesh.vertices[mesh.faces].tolist() == rows["corner"].tolist() and len(mesh.vertices) == 4
    with pytest.raises(ValueError, match="cannot be read as STL"):
        read_mesh(write(tmp_path / "a.stl", data[:-1]))


def test_glb_scene_in_file_order_with_node_transforms(tmp_path):
    vertices, faces = sphere(1)
    scene = trimesh.Scene()
    moves = {"z": [10, 0, 0], "a": [0, 20, 0], "m": [0, 0, 30]}
    for i, (name, move) in enumerate(moves.items()):
        part = trimesh.Trimesh(vertices * (i + 1), faces[i:], process=False)
        scene.add_geometry(part, geom_name=name, transform=trimesh.transformations.translation_matrix(move))
    scene.export(tmp_path / "a.glb")
    mesh = read_mesh(tmp_path / "a.glb")
    expected = [(vertices * (i + 1))[faces[i:]] + move for i, move in enumerate(moves.values())]
    assert np.allclose(mesh.vertices[mesh.faces], np.concatenate(expected), atol=1e-5)


def test_glb_whose_buffer_is_a_file_of_its_own(tmp_path):
    vertices, faces = sphere(3)
    write_glb(tmp_path / "a.glb", vertices, faces, np.zeros((len(faces), 3), np.uint8))
    expected, data = read_mesh(tmp_path / "a.glb"), (tmp_path / "a.glb").read_bytes()
    end = 20 + int.from_bytes(data[12:16], "little")
    tree = json.loads(data[20:end])
    tree["buffers"][0]["uri"] = "a.bin"
    (tmp_path / "a.bin").write_bytes(data[end + 8:])
    text = json.dumps(tree).encode()
    (tmp_path / "a.glb").write_bytes(b"glTF" + struct.pack("<3I4s", 2, 20 + len(text), len(text), b"JSON") + text)
    assert max(accessor["count"] for accessor in tree["accessors"]) > 20 + len(text)
    mesh = read_mesh(tmp_path / "a.glb")
    np.testing.assert_array_equal(mesh.vertices[mesh.faces], expected.vertices[expected.faces])


def ply(kind, faces, label=None):
    """The square as a PLY with faces of any length; kind ascii, binary_little_endian or binary_big_endian."""
    header = f"ply\nformat {kind} 1.0\ncomment label 0 a\nelement vertex 4\nproperty float x\nproperty float y\n" \
             f"property float z\nelement face {len(faces)}\n" + ("property uchar label\n" if label else "") + \
             "property list uchar int vertex_indices\nproperty list uchar float texcoord\nend_header\n"
    square = [[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]]
    if kind == "ascii":
        rows = [" ".join(map(str, v)) for v in square]
        for i, f in enumerate(faces):
            rows.append(" ".join(map(str, [*([label[i]] if label else []), len(f), *f, 2, 0.5, 0.5])))
        return header + "\n".join(rows) + "\n"
    order = "<" if "little" in kind else ">"
    body = b"".join(struct.pack(order + "3f", *v) for v in square)
    for i, f in enumerate(faces):
        body += struct.pack("B", label[i]) if label else b""
        body += struct.pack(f"{order}B{len(f)}i", len(f), *f) + struct.pack(order + "B2f", 2, 0.5, 0.5)
    return header.encode() + body


@pytest.mark.parametrize("kind", ["ascii", "binary_little_endian", "binary_big_endian"])
def test_ply_polygons_stay_in_order_and_labels_follow(tmp_path, kind):
    mesh = read_mesh(write(tmp_path / "a.ply", ply(kind, [[3, 2, 1], [0, 1, 2, 3], [2, 1, 0]], [7, 255, 3])))
    assert mesh.faces.tolist() == [[3, 2, 1], [0, 1, 2], [0, 2, 3], [2, 1, 0]]
    assert mesh.polygon.tolist() == [0, 1, 1, 2] and mesh.properties["face"]["label"].tolist() == [7, 255, 3]
    assert mesh.vertices.tolist() == [[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]]
    quads = read_mesh(write(tmp_path / "b.ply", ply(kind, [[0, 1, 2, 3], [3, 2, 1, 0]])))
    assert quads.faces.tolist() == [[0, 1, 2], [0, 2, 3], [3, 2, 1], [3, 1, 0]] and not quads.properties["face"]
    triangles = read_mesh(write(tmp_path / "c.ply", ply(kind, [[0, 1, 2], [0, 0, 2]], [1, 2])))
    assert triangles.polygon is None and triangles.properties["face"]["label"].tolist() == [1, 2] and len(triangles.vertices) == 4


def test_off_polygons_colours_comments_and_glued_header(tmp_path):
    text = "OFF4 3 0 # counts\n\n0 0 0\n1 0 0\n# a comment\n1 1 0\n0 1 0\n3 3 2 1 255 0 0\n4 0 1 2 3 0.5\n3 2 1 0\n"
    mesh = read_mesh(write(tmp_path / "a.off", text))
    assert mesh.faces.tolist() == [[3, 2, 1], [0, 1, 2], [0, 2, 3], [2, 1, 0]] and mesh.polygon.tolist() == [0, 1, 1, 2]
    text = "COFF\r\n3 1 0\r\n0 0 0 9 9 9 9\r\n1 0 0 9 9 9 9\r\n1 1 0 9 9 9 9\r\n3 0 1 2\r\n"
    colored = read_mesh(write(tmp_path / "b.off", text))
    assert colored.vertices.tolist() == [[0, 0, 0], [1, 0, 0], [1, 1, 0]]


PLY = ply("binary_little_endian", [[0, 1, 2], [0, 2, 3]], [0, 1])
MIXED = ply("binary_little_endian", [[0, 1, 2], [0, 1, 2, 3]], [0, 1])


@pytest.mark.parametrize(("name", "content", "message"), [
    ("a.ply", b"", "cannot be read as PLY (ValueError: no PLY header)"),
    ("a.ply", PLY[:-5], "cannot be read as PLY"),
    ("a.ply", MIXED[:-5], "cannot be read as PLY"),
    ("a.ply", PLY.replace(b"float x", b"float q"), "cannot be read as PLY"),
    ("a.ply", PLY.replace(b"float x", b"blob x"), "cannot be read as PLY"),
    ("a.ply", PLY.replace(b"1.0", b"1.0").replace(b"binary_little", b"middle"), "format 'middle_endian'"),
    ("a.ply", ply("ascii", [[0, 1, 2]]).replace("0.5", "half"), "not a number"),
    ("a.ply", ply("ascii", []), "no faces"),
    ("a.ply", ply("ascii", [[0, 1, 2], [0, 1]]), "face 1 has 2 corners"),
    ("a.ply", ply("ascii", [[0, 1, 2, 3], [0, 1, 4]]), "face 1 uses vertex 4, the file has vertices 0..3"),
    ("a.off", "0 0 0", "does not begin with OFF"),
    ("a.off", "OFF BINARY\n", "does not begin with OFF"),
    ("a.off", "OFF", "is the file cut short?"),
    ("a.off", "OFF\n3 1 0\n0 0 0\n1 0 0\n", "do not hold the 3 vertices and 1 faces"),
    ("a.off", "OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1\n", "face 0 announces 3 corners, its line holds 2"),
    ("a.off", "OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 x\n3 0 1 2\n", "not a number"),
    ("a.off", "OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 -1\n", "face 0 uses vertex -1"),
    ("a.off", "OFF\n3 0 0\n0 0 0\n1 0 0\n0 1 0\n", "no faces"),
    ("a.off", "OFF\n3 1 0\n0 0 0\n1 nan 0\n0 1 0\n3 0 1 2", "1 of 3 vertices have a NaN or infinite coordinate"),
    ("a.off", "OFF\n3 nan 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n", "is the file cut short?"),
    ("a.off", "OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 1.5\n", "no whole number"),
    ("a.off", "OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n1e300 0 1 2\n", "no whole number"),
    ("a.ply", ply("ascii", [[0, 1, 1.5]]), "no whole number"),
    ("a.ply", ply("ascii", [[0, 1, 2]]).replace("element face 1", "element face -1"), "a negative number of elements"),
    ("a.ply", ply("ascii", [[0, 1, 2]]).replace("element face 1", f"element face {10**30}"), "cannot be read as PLY"),
    ("a.ply", ply("ascii", [[0, 1, 2]]).replace("\n3 ", "\n1e400 "), "cannot be read as PLY"),
    ("a.stl", b"\0" * 20, "cannot be read as STL"),
    ("a.stl", b"\0" * 84, "no faces"),
    ("a.glb", b"glTF\2\0\0\0\x20\0\0\0\xf0\xff\xff\xffJSON{}", "a chunk of 4294967280 bytes, 2 are left"),
    ("a.glb", b'glTF\2\0\0\0\x38\0\0\0\x24\0\0\0JSON{"accessors": [{"count": 10000000}]}', "an accessor counts more elements"),
    ("a.glb", b"glTF not at all", "cannot be read as GLB"),
    ("a.objj", "", "did you mean .obj?"),
    ("a.fbx", "", "'.fbx' is not a mesh suffix"),
])
def test_damaged_files(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read_mesh(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


def test_missing_files(tmp_path):
    for call in (lambda: read_mesh(tmp_path / "a.obj"), lambda: list_meshes(tmp_path / "none")):
        with pytest.raises(FileNotFoundError, match="check the path"):
            call()


def test_list_meshes(tmp_path):
    with pytest.raises(ValueError, match="no mesh in this folder .*obj .ply .off .stl .glb"):
        list_meshes(tmp_path)
    for name in ("b.obj", "a10.ply", "a2.OFF", ".hidden.obj", "._b.obj", "b.txt", "readme.md"):
        write(tmp_path / name, "")
    (tmp_path / "folder.obj").mkdir()
    assert [p.name for p in list_meshes(tmp_path)] == ["a10.ply", "a2.OFF", "b.obj"]
    write(tmp_path / "b.glb", "")
    with pytest.raises(ValueError, match=r"b.glb and b.obj would share a label file; .* data.suffixes, as \[.obj\]"):
        list_meshes(str(tmp_path))
    assert [p.name for p in list_meshes(tmp_path, [".obj", ".off"])] == ["a2.OFF", "b.obj"]
    with pytest.raises(ValueError, match=r"no mesh in this folder \(looked for .stl\)"):
        list_meshes(tmp_path, [".stl"])
    for name in ("sub/b.obj", "sub/deep/b.obj", "sub/.hidden/c.obj"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / name, "")
    assert [str(p.relative_to(tmp_path / "sub")) for p in list_meshes(tmp_path / "sub", recursive=True)] == ["b.obj", "deep/b.obj"]
    (tmp_path / "sub" / "b.obj").unlink()
    with pytest.raises(ValueError, match="the folders in it have some: data.recursive=true reads them"):
        list_meshes(tmp_path / "sub")
    write(tmp_path / "sub" / "deep" / "b.off", "")
    with pytest.raises(ValueError, match="deep: b.obj and b.off would share a label file"):
        list_meshes(tmp_path / "sub", recursive=True)


# --- labels ---------------------------------------------------------------------------------------------------------

@pytest.fixture
def square(tmp_path):
    """Two triangles of a square and one on its own: F = 3, V = 7, 8 edges."""
    text = SQUARE + "v 5 0 0\nv 6 0 0\nv 5 1 0\nf 1 2 3\nf 1 3 4\nf 5 6 7\n"
    return read_mesh(write(tmp_path / "square.obj", text))


def test_find_label_file(tmp_path):
    mesh, labels = write(tmp_path / "m.obj", SQUARE), tmp_path / "labels"
    labels.mkdir()
    for name in ("m2.txt", "n.npy", "m.lbl"):
        write(labels / name, "")
    with pytest.raises(FileNotFoundError, match="m.txt, m.npy, m_labels.npy, m.seg, m.eseg, m_labels.txt, m.csv, m.json"):
        find_label_file(mesh, labels)
    for name in ("m_labels.txt", "m.csv", "m.json"):
        path = write(labels / name, "")
        assert find_label_file(mesh, labels) == path
        write(labels / "m.seg", "")
        assert find_label_file(mesh, labels) == labels / "m.seg"            # a json beside it may be anything
        path.unlink(), (labels / "m.seg").unlink()
    for name in ("m.txt", "m.npy", "m_labels.npy", "m.seg", "m.eseg"):
        path = write(labels / name, "")
        assert find_label_file(mesh, str(labels)) == path
        path.unlink()
    write(labels / "m.txt", ""), write(labels / "m_labels.npy", "")
    with pytest.raises(ValueError, match="m.txt and .*m_labels.npy both look like its labels"):
        find_label_file(mesh, labels)


def test_another_folder_of_labels_is_never_passed_over_for_those_in_the_mesh(tmp_path):
    """A misspelt folder, one file too few, a setting that names the mesh: no old labels are scored in silence."""
    labels = tmp_path / "labels"
    for name, text in (("m.ply", ply("ascii", [[0, 1, 2]], [1])), ("m.obj", SQUARE + "usemtl roof\nf 1 2 3\n")):
        mesh = write(tmp_path / name, text)
        with pytest.raises(FileNotFoundError, match=rf"{name}: no labels; looked in .*labels \(no such folder\) for m.txt"):
            find_label_file(mesh, labels)
    ply_mesh, obj_mesh = tmp_path / "m.ply", tmp_path / "m.obj"
    labels.mkdir()
    with pytest.raises(FileNotFoundError, match="looked in .*labels for m.txt.*; those in the PLY are read where no other folder is named"):
        find_label_file(ply_mesh, labels)
    path = write(labels / "m.json", "[0]")
    assert find_label_file(ply_mesh, labels) == path
    for mesh, options, name in ((ply_mesh, {"field": "label"}, "label_field=label"), (obj_mesh, {"kind": "material"}, "label_kind=material")):
        with pytest.raises(ValueError, match=f"data.{name} reads the labels in this file, not those in .*labels; leave that folder out"):
            find_label_file(mesh, labels, **options)
        assert find_label_file(mesh, tmp_path / "labels" / "..", **options) == mesh      # the mesh's own folder, named
    assert find_label_file(obj_mesh, labels, field="label") == path                      # a field is a PLY's


def test_labels_inside_a_ply(tmp_path):
    labelled = write(tmp_path / "m.ply", ply("binary_little_endian", [[0, 1, 2], [0, 1, 2, 3]], [4, 255]))
    assert find_label_file(labelled, tmp_path) == labelled
    label = read_labels(labelled, read_mesh(labelled), num_classes=5, ignore_labels=[255])
    assert label.tolist() == [4, IGNORE_INDEX, IGNORE_INDEX] and label.dtype == np.int64
    beside = write(tmp_path / "m.txt", "0 1")
    assert find_label_file(labelled, tmp_path) == beside                    # a file made for the purpose goes first
    bare = write(tmp_path / "n.ply", ply("ascii", [[0, 1, 2]]))
    with pytest.raises(FileNotFoundError, match="in the PLY for a face property label, labels, class"):
        find_label_file(bare, tmp_path)
    damaged = write(tmp_path / "d.ply", "ply\nformat ascii 1.0\nelement face\n")
    with pytest.raises(ValueError, match="d.ply: cannot be read as PLY"):
        find_label_file(damaged, tmp_path)
    with pytest.raises(ValueError, match="no labels in it, it has not a face property label, labels, class; give a label file"):
        read_labels(bare, read_mesh(bare))
    odd = write(tmp_path / "o.ply", ply("ascii", [[0, 1, 2]], [0.5]))       # a fault where labels are wanted, and only there
    with pytest.raises(ValueError, match="1 of 1 labels are no integers"):
        read_labels(odd, read_mesh(odd))
    with pytest.raises(ValueError, match="2 labels, but .* has 1 faces"):    # another mesh's labels: count checked
        read_labels(labelled, read_mesh(bare))


@pytest.mark.parametrize("content", [
    "0\n1\n2\n", "0 1 2", "\ufeff0\r\n1\r\n2", "0.0\n1.000e+00\n\n2.0\n", "0,1,2", "0, 1;\t2\n", "label\n0\n1\n2\n",
    "# three parts\n0  # the roof\n1 # 7 walls\n2\n", "0 0\n1 1\n2 2\n", "2 2\n0 0\n1 1\n", "face,label\n1,0\n2,1\n3,2\n"])
@pytest.mark.parametrize("name", ["l.txt", "l.seg", "l.csv"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_text_labels(tmp_path, square, name, content, encoding):
    label = read_labels(write(tmp_path / name, content.removeprefix("\ufeff" * (encoding == "utf-16")).encode(encoding)), square, num_classes=3)
    assert label.tolist() == [0, 1, 2] and label.dtype == np.int64


@pytest.mark.parametrize(("text", "message"), [("0 0\n1 1\n3 2", "unknown label 3"), ("0 0\n1 1\n1 2", "6 labels, but"), ("0 1 2 0 1 2", "6 labels, but"),
                                               ("label\n0\n1\nlabel\n2", "line 1: 'label' is not"), ("0 0\n1 1", "4 labels|2 labels")])
def test_pairs_of_face_and_label_name_each_face_once(tmp_path, square, text, message):
    with pytest.raises(ValueError, match=message):
        read_labels(write(tmp_path / "l.txt", text), square, 3)


def test_two_labels_a_line_are_no_pairs_where_so_many_fit(tmp_path):
    mesh = read_mesh(write(tmp_path / "a.obj", SQUARE + "f 1 2 3\nf 1 3 4\nf 1 2 4\nf 2 3 4\n"))
    assert read_labels(write(tmp_path / "a.txt", "0 1\n1 0\n"), mesh).tolist() == [0, 1, 1, 0]


def test_pairs_of_a_mesh_of_quads_which_has_twice_as_many_triangles(tmp_path):
    rows = [(0, 0), (1, 0), (1, 1), (0, 1), (2, 0), (2, 1), (3, 0), (3, 1)]
    text = "".join(f"v {x} {y} 0\n" for x, y in rows) + "f 1 2 3 4\nf 2 5 6 3\nf 5 7 8 6\n"
    mesh = read_mesh(write(tmp_path / "a.obj", text))
    assert len(mesh.faces) == 6
    for pairs in ("face,label\n0,1\n1,0\n2,2\n", "3 2\n1 1\n2 0\n"):
        assert read_labels(write(tmp_path / "a.csv", pairs), mesh, 3).tolist() == [1, 1, 0, 0, 2, 2]
    with pytest.raises(ValueError, match="a.csv: 3 lines of two numbers, and both 3 and 6 labels would fit the mesh; write one label a line"):
        read_labels(write(tmp_path / "a.csv", "1 7\n0 7\n1 8\n"), mesh, 9)       # label and instance, or one a triangle
    assert read_labels(write(tmp_path / "a.csv", "1\n1\n0\n0\n1\n2\n"), mesh, 3).tolist() == [1, 1, 0, 0, 1, 1]


@pytest.mark.parametrize("text", ["[0, 1, 2]", '{"id": "p", "labels": [0, 1, 2.0], "instances": [7, 7, 7]}'])
def test_json_labels(tmp_path, square, text):
    assert read_labels(write(tmp_path / "l.json", text), square, 3).tolist() == [0, 1, 2]


def ply_of(element, name, kind="int"):
    """The square as two triangles, with the property of its vertices (0 1 1 2) or faces (2 1)."""
    at_vertex = element == "vertex"
    rows = [f"{x} {y} 0{f' {v}' if at_vertex else ''}" for (x, y), v in zip([(0, 0), (1, 0), (1, 1), (0, 1)], [0, 1, 1, 2], strict=True)]
    rows += [f"3 {a} {b} {c}{'' if at_vertex else f' {v}'}" for (a, b, c), v in zip([(0, 1, 2), (0, 2, 3)], [2, 1], strict=True)]
    line = f"property {kind} {name}\n"
    return ("ply\nformat ascii 1.0\nelement vertex 4\nproperty float x\nproperty float y\nproperty float z\n" + line * at_vertex
            + "element face 2\nproperty list uchar int vertex_indices\n" + line * (not at_vertex) + "end_header\n" + "\n".join(rows) + "\n")


@pytest.mark.parametrize("kind", ["int", "float", "ushort"])
@pytest.mark.parametrize("name", ["Label", "scalar_Label", "scalar_labels", "object_id", "category_id", "quality", "segment", "semantic"])
def test_a_property_of_a_ply_by_its_name(tmp_path, name, kind):
    faces, vertices = (write(tmp_path / f"{element}.ply", ply_of(element, name, kind)) for element in ("face", "vertex"))
    for path, expected in ((faces, [2, 1]), (vertices, [1, 0])):            # 0 1 1, and of 0 1 2 the smallest
        mesh = read_mesh(path)
        assert find_label_file(path, tmp_path, "auto", name) == path
        assert read_labels(path, mesh, 3, field=name).tolist() == expected
        if "label" in name.lower():                                         # what such a property means is no guess
            assert find_label_file(path, tmp_path) == path and read_labels(path, mesh, 3).tolist() == expected
    with pytest.raises(ValueError, match="has not a vertex property"):
        read_labels(faces, read_mesh(faces), 3, kind="vertex", field=name)
    assert read_labels(vertices, read_mesh(vertices), 3, kind="vertex", field=name).tolist() == [1, 0]


def test_a_ply_whose_labels_have_another_name_says_what_it_has(tmp_path):
    path = write(tmp_path / "a.ply", ply_of("face", "quality"))
    with pytest.raises(FileNotFoundError, match=r"a face property label, labels, class \(it has quality: name one in data.label_field\)"):
        find_label_file(path, tmp_path)
    with pytest.raises(ValueError, match=r"has not a face property qualty \(it has quality: name one in data.label_field\)"):
        read_labels(path, read_mesh(path), 3, field="qualty")


PARTS = "# made\ng loose\n" + SQUARE + "f 1 2 3\nusemtl roof # red\ng upper\nf 1 3 4\nusemtl out side\nf 1 2 3 4\nusemtl roof\ng\nf 1 2 4\n"


def test_materials_and_groups_are_labels(tmp_path):
    path = write(tmp_path / "a.obj", PARTS)
    mesh = read_mesh(path)
    assert find_label_file(path, tmp_path, "material") == path
    assert mesh_io.label_names([path], "material") == ["out side", "roof"] and mesh_io.label_names([path], "group", ["loose"]) == ["upper"]
    read = dict(kind="material", names=["roof", "out side"])
    assert read_labels(path, mesh, 2, **read).tolist() == [IGNORE_INDEX, 0, 1, 1, 0]
    assert read_labels(path, mesh, 2, kind="group", names=["upper", "loose"]).tolist() == [1, 0, 0, 0, IGNORE_INDEX]       # `g` alone ends it
    assert read_labels(path, mesh, 1, ignore_labels=["out side"], kind="material", names=["roof"]).tolist() == [-100, 0, -100, -100, 0]
    with pytest.raises(ValueError, match=r"material 'out side' \(1 faces\) is none of data.class_names: roof; add it there"):
        read_labels(path, mesh, 1, kind="material", names=["roof"])
    objects = write(tmp_path / "b.obj", PARTS.replace("\ng", "\no"))
    assert mesh_io.label_names([objects], "group") == ["loose", "upper"]
    off = write(tmp_path / "b.off", "OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n")
    with pytest.raises(ValueError, match="b.off: data.label_kind: material reads the names in OBJ files"):
        read_labels(off, read_mesh(off), 2, **read)


@pytest.mark.parametrize(("keyword", "kind"), [("g", "group"), ("o", "group"), ("usemtl", "material")])
def test_names_that_differ_behind_a_number_sign_are_not_one(tmp_path, keyword, kind):
    rows = [f"{keyword} {name}\nf 1 2 3\n" for name in ("wall#1", "wall #2", "wall", "wall  # the last", "")]
    names, number = mesh_formats.obj_names(write(tmp_path / "a.obj", SQUARE + "".join(rows)), kind)
    assert names == ["wall#1", "wall #2", "wall"] and number.tolist() == [0, 1, 2, 2, -1]


def test_a_label_map_in_place_of_an_offset(tmp_path, square):
    path, teeth = write(tmp_path / "l.txt", "0 31 32"), read_label_map("31:1,32:2,0:0")
    assert read_labels(path, square, 3, label_map=teeth).tolist() == [0, 1, 2]
    assert read_labels(path, square, 2, ignore_labels=[0], label_map=read_label_map("31:0,32:1")).tolist() == [IGNORE_INDEX, 0, 1]
    with pytest.raises(ValueError, match=r"l.txt: value 32 \(1 times\) not in the label map \(31:0,0:1\); add it"):
        read_labels(path, square, 2, label_map=read_label_map("31:0,0:1"))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("array", [np.array([0, 1, 2], np.uint8), np.array([[0], [1], [2]]), np.array([0.0, 1, 2]), np.array([0.0, 1, 2], np.float16)])
def test_npy_labels(tmp_path, square, array):
    np.save(tmp_path / "l.npy", array)
    assert read_labels(tmp_path / "l.npy", square, 3).tolist() == [0, 1, 2]


def test_offset_and_ignored_values(tmp_path, square):
    def read(text, *args, **kwargs):
        return read_labels(write(tmp_path / "l.txt", text), square, *args, **kwargs).tolist()
    assert read("0 1 2", 3) == [0, 1, 2]
    assert read("1 2 3", 3, label_offset=-1) == [0, 1, 2]
    assert read("255 0 -1", 3, ignore_labels=(255, -1)) == [-100, 0, -100]
    assert read("0 1 3", 3, label_offset=-1, ignore_labels=[0]) == [-100, 0, 2]      # ignored before the offset
    assert read("-100 0 1", 3, label_offset=1) == [-100, 1, 2]
    assert read("0 7 2") == [0, 7, 2]                                                # any number of classes


@pytest.mark.parametrize(("text", "kwargs", "message"), [
    ("1 3 2", {}, "unknown label 3 (1 times); known: 0..2; does the file count from 1? Then label_offset: -1"),
    ("0 255 255", {}, "unknown label 255 (2 times); known: 0..2; if 255 means 'not labelled', ignore_labels: [255]"),
    ("1 255 3", {}, "known: 0..2; does the file count from 1? Then label_offset: -1; if 255 means 'not labelled'"),
    ("0 -1 9", {}, "unknown label -1 (1 times), 9 (1 times); known: 0..2; if -1 9 means 'not labelled'"),
    ("0 1 2", {"label_offset": -1}, "unknown label 0 (1 times); known: 0..2 after label_offset: -1"),
    ("0 1 -1", {"num_classes": None}, "unknown label -1 (1 times); classes count from 0"),
    ("0 1.5 nan", {}, "2 of 3 labels are no integers, the first is number 1 (from 0): 1.5"),
    ("0\n1\ntwo", {}, "line 3: 'two' is not a number"),
    ("head\n1 3\ntorso\n2 4", {}, "line 1: 'head' is not a number"),
    ("0/1 1 2", {}, "line 1: '0/1' is not a number"),
    ("", {}, "no labels in it"),
    (" \n ", {}, "no labels in it"),
    ("0 1 2", {"kind": "faces"}, "label_kind: 'faces' is none of auto, face, polygon, vertex, edge"),
])
def test_label_value_errors(tmp_path, square, text, kwargs, message):
    path = write(tmp_path / "l.txt", text)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_labels(path, square, **{"num_classes": 3, **kwargs})


np.save(npy := io.BytesIO(), np.array([0, 1, 2]))
NPY = npy.getvalue()


def test_label_file_errors(tmp_path, square):
    with pytest.raises(FileNotFoundError, match="no such label file"):
        read_labels(tmp_path / "none.txt", square)
    with pytest.raises(ValueError, match="'.seseg' is no label suffix"):
        read_labels(write(tmp_path / "l.seseg", "1 0"), square)
    for text, message in (("{", "not valid JSON"), ('{"label": [1]}', 'one under "labels"'), ('["a"]', "a list of numbers"), ("[true]", "a list of"),
                          ("[" * 99999, "not valid JSON"), ("[1.5, 0, 0]", "1 of 3 labels are no integers")):
        with pytest.raises(ValueError, match=f"l.json: .*{message}"):
            read_labels(write(tmp_path / "l.json", text), square)
    for content in (b"", b"no array", b"\x93NUMPY\x01\x00", NPY.replace(b"(3,)", b"(3, "), NPY.replace(b"'<i8'", b"'<08'"),
                    NPY.replace(b"(3,), }         ", b"(1000000000,), }"), NPY.replace(b"(3,), ", b"(-1,),"), NPY[:-1]):
        with pytest.raises(ValueError, match="cannot be read as an array"):
            read_labels(write(tmp_path / "l.npy", content), square)
    for array in (np.zeros((3, 4)), np.array(["a", "b", "c"]), np.array([0, None, 1], object)):
        np.save(tmp_path / "l.npy", array, allow_pickle=True)
        with pytest.raises(ValueError, match="l.npy: .*(not scores|as an array)"):
            read_labels(tmp_path / "l.npy", square)


@pytest.mark.parametrize(("count", "kind", "message"), [
    (2, "auto", "2 labels, but {} has 3 faces (3 triangles, 7 vertices); did an exporter drop or add"),
    (4, "auto", "4 labels, but {} has 3 faces (3 triangles, 7 vertices); did an exporter drop or add"),
    (7, "auto", "7 labels, but {} has 3 faces (3 triangles, 7 vertices); one per vertex? Then label_kind: vertex"),
    (8, "auto", "8 labels, but {} has 3 faces (3 triangles, 7 vertices); one per edge? Then label_kind: edge"),
    (99, "auto", "99 labels, but {} has 3 faces (3 triangles, 7 vertices); was the mesh simplified"),
    (3, "vertex", "3 labels, but {} has 7 vertices (3 triangles, 7 vertices); one per face? Then label_kind: face"),
    (7, "edge", "7 labels, but {} has 8 edges (3 triangles, 7 vertices); one per vertex? Then label_kind: vertex"),
])
def test_label_count_is_never_made_to_fit(tmp_path, square, count, kind, message):
    path = write(tmp_path / "l.txt", "0\n" * count)
    with pytest.raises(ValueError, match=re.escape(message.format(square.path))):
        read_labels(path, square, 3, kind=kind)


def test_polygon_labels_are_expanded(tmp_path):
    mesh = read_mesh(write(tmp_path / "a.obj", SQUARE + "f 1 2 3\nf 1 2 3 4\nf 4 3 2 1\nf 3 2 1"))
    path = write(tmp_path / "a.txt", "5 6 7 8")
    assert read_labels(path, mesh).tolist() == [5, 6, 6, 7, 7, 8]
    assert read_labels(path, mesh, kind="polygon").tolist() == [5, 6, 6, 7, 7, 8]
    assert read_labels(path, mesh, kind="face").tolist() == [5, 6, 6, 7, 7, 8]
    write(path, "0 1 2 3 3 5")                                              # one a triangle: a polygon still has one alone
    assert read_labels(path, mesh).tolist() == [0, 1, 1, 3, 3, 5]
    with pytest.raises(ValueError, match="6 labels, but .* has 4 polygons .6 triangles"):
        read_labels(path, mesh, kind="polygon")
    write(path, "0 1 2 3 3")
    with pytest.raises(ValueError, match="5 labels, but .* has 4 faces .6 triangles, 4 vertices.; did an exporter"):
        read_labels(path, mesh)


def test_corners_of_a_polygon_vote_once_each(tmp_path):
    mesh = read_mesh(write(tmp_path / "a.obj", SQUARE + "v 0.5 2 0\nf 4 1 2 3 5\nf 1 2 3 4\n"))
    path = write(tmp_path / "a.txt", "0 0 1 1 1")                           # corner 4, of label 1, is in all three triangles
    assert read_labels(path, mesh, kind="vertex").tolist() == [1, 1, 1, 0, 0]
    assert read_labels(write(path, "0 0 0 1 1"), mesh, kind="vertex").tolist() == [0, 0, 0, 0, 0]
    assert read_labels(write(path, "2 2 7 7 7"), mesh, kind="vertex", ignore_labels=[7]).tolist() == [IGNORE_INDEX] * 3 + [2, 2]


def test_vertex_labels_by_majority(tmp_path, square):
    path = write(tmp_path / "l.txt", "2 1 1 0 9 3 9")                       # faces 2 1 1 | 2 1 0 | 9 3 9
    assert read_labels(path, square, kind="vertex").tolist() == [1, 0, 9]
    assert read_labels(path, square, kind="vertex", ignore_labels=[0, 9]).tolist() == [1, 1, IGNORE_INDEX]


def test_vertices_of_an_stl_have_no_order_that_labels_could_follow(tmp_path):
    """As many labels as merged vertices, in the order in which another program merged them."""
    vertices, faces = sphere(1)
    path = tmp_path / "a.stl"
    trimesh.Trimesh(vertices, faces, process=False).export(path)
    mesh = read_mesh(path)
    label = write(tmp_path / "a.txt", "0\n" * len(mesh.vertices))
    with pytest.raises(ValueError, match="a.txt: labels per vertex, but the vertices of .*a.stl have no order; label its faces"):
        read_labels(label, mesh, kind="vertex")
    with pytest.raises(ValueError, match="42 labels, but .* has 80 faces .*was the mesh simplified"):         # nothing proposes them
        read_labels(label, mesh)
    edges = write(tmp_path / "a.eseg", "1\n" * 120)
    assert read_labels(edges, mesh).tolist() == 80 * [1]


def test_edge_labels_by_hand_and_against_a_loop(tmp_path, square):
    # edges 0-1 1-2 2-0 | 2-3 3-0 | 4-5 5-6 6-4; the second face has 2-0 first
    path = write(tmp_path / "l.eseg", "3.0 3 1 2 1 5 4 6")
    assert read_labels(path, square).tolist() == [3, 1, 4]
    with pytest.raises(ValueError, match="3 labels, but .* has 8 edges .*one per face"):
        read_labels(write(tmp_path / "m.eseg", "1 2 3"), square)

    vertices, faces = sphere()
    faces = np.concatenate([faces, faces[:5], faces[:3, ::-1]])             # non-manifold
    mesh, number = mesh_io.Mesh(vertices, faces, None, None, "a.obj"), {}
    of_face = [[number.setdefault(frozenset((f[i], f[(i + 1) % 3])), len(number)) for i in range(3)]
               for f in faces.tolist()]
    label = np.random.default_rng(0).integers(0, 4, len(number))
    expected = []
    for edges in of_face:
        votes = Counter(label[edges].tolist())
        expected.append(min(v for v, n in votes.items() if n == max(votes.values())))
    write_labels(tmp_path / "s.txt", label)
    assert read_labels(tmp_path / "s.txt", mesh, 4, kind="edge").tolist() == expected


# --- writing --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("suffix", [".txt", ".npy"])
def test_write_labels_round_trip(tmp_path, square, suffix):
    path = tmp_path / f"l{suffix}"
    write_labels(path, np.array([0, 255, 2], np.int32))
    assert read_labels(path, square, 3, ignore_labels=[255]).tolist() == [0, IGNORE_INDEX, 2]
    for wrong in (np.zeros(3), np.zeros((3, 1), int)):
        with pytest.raises(ValueError, match="must be a row of integers"):
            write_labels(path, wrong)
    with pytest.raises(ValueError, match="written as .txt or .npy"):
        write_labels(tmp_path / "l.csv", np.zeros(3, int))


def test_written_ply_and_glb_are_read_back_alike(tmp_path):
    vertices, faces = sphere()
    vertices += [677_000.125, 5_400_000.5, 370]                             # UTM: 32-bit floats would lose half a metre
    color = np.random.default_rng(0).integers(0, 256, (len(faces), 3)).astype(np.uint8)
    label = np.arange(len(faces)) - 1
    write_ply(tmp_path / "a.ply", vertices, faces, color, label)
    mesh = read_mesh(tmp_path / "a.ply")
    assert np.array_equal(mesh.vertices, vertices) and np.array_equal(mesh.faces, faces)
    assert np.array_equal(mesh.properties["face"]["label"], label)
    oracle = trimesh.load_mesh(tmp_path / "a.ply", process=False)
    assert np.array_equal(oracle.faces, faces) and np.array_equal(oracle.vertices, vertices)
    assert oracle.visual.kind == "face" and np.array_equal(oracle.visual.face_colors[:, :3], color)
    write_ply(tmp_path / "b.ply", vertices, faces, color)
    assert "label" not in read_mesh(tmp_path / "b.ply").properties["face"]

    write_glb(tmp_path / "a.glb", vertices, faces, color)
    mesh = read_mesh(tmp_path / "a.glb")
    assert np.allclose(mesh.vertices[mesh.faces], vertices[faces], rtol=0, atol=1e-6)
    oracle = trimesh.load_mesh(tmp_path / "a.glb", process=False, skip_materials=True)
    assert np.array_equal(oracle.visual.vertex_colors[oracle.faces][:, :, :3], np.repeat(color[:, None], 3, 1))
    data = (tmp_path / "a.glb").read_bytes()
    tree = json.loads(data[20:20 + struct.unpack("<I", data[12:16])[0]])
    material = tree["materials"][tree["meshes"][0]["primitives"][0]["material"]]
    assert material["doubleSided"] and material["pbrMetallicRoughness"]["metallicFactor"] == 0

    for writer in (write_ply, write_glb):
        with pytest.raises(ValueError, match="face_color must be uint8"):
            writer(tmp_path / "c.ply", vertices, faces, color[1:])
        with pytest.raises(ValueError, match="face_color must be uint8"):
            writer(tmp_path / "c.ply", vertices, faces, color / 255)


# --- real files -----------------------------------------------------------------------------------------------------

@pytest.mark.skipif(not REAL.is_dir(), reason=f"no real meshes in {REAL}")
def test_textured_buildings_have_one_order_in_obj_ply_and_txt():
    folder = REAL / "lod3_ingolstadt_textured" / "train"
    paths = sorted(folder.glob("*.obj"), key=lambda p: p.stat().st_size)[:8]
    for path in paths:
        obj, ply_ = read_mesh(path), read_mesh(path.with_suffix(".ply"))
        assert np.allclose(obj.vertices[obj.faces], ply_.vertices[ply_.faces], rtol=0, atol=1e-3)
        assert find_label_file(path, folder) == path.with_suffix(".txt")
        label = read_labels(path.with_suffix(".txt"), obj, 9)
        assert np.array_equal(label, ply_.properties["face"]["label"])
        assert np.array_equal(label, read_labels(path.with_suffix(".ply"), ply_, 9))
    with pytest.raises(ValueError, match="would share a label file"):
        list_meshes(folder)


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no real meshes in {REAL}")
def test_human_bodies_equal_trimesh():
    folder = REAL / "humanbody_1500" / "test"
    paths = list_meshes(folder)
    assert len(paths) == 18
    for path in paths:
        mesh, oracle = read_mesh(path), trimesh.load_mesh(path, process=False)
        assert np.array_equal(mesh.faces, oracle.faces) and np.array_equal(mesh.vertices, oracle.vertices)
        assert read_labels(find_label_file(path, folder), mesh, 8).shape == (1500,)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["{0}", "{0}/{0}/{0}"])
def test_a_million_faces_faster_than_trimesh_and_by_line(tmp_path, form):
    n = 708
    index = np.arange(n * n).reshape(n, n)
    quad = np.stack([index[:-1, :-1], index[1:, :-1], index[1:, 1:], index[:-1, 1:]], -1).reshape(-1, 4)
    faces = np.concatenate([quad[:, :3], quad[:, [0, 2, 3]]])
    vertices = np.random.default_rng(0).normal(size=(n * n, 3)).round(6)
    extra = "" if form == "{0}" else "vt 0 0\nvn 0 0 1\n" * len(vertices)
    text = obj_text(vertices, faces[:0]) + extra + "".join(
        "f " + " ".join(form.format(c) for c in f) + "\n" for f in (faces + 1).tolist())
    path = write(tmp_path / "big.obj", text)

    def seconds(call):
        start = time.process_time()
        result = call()
        return time.process_time() - start, result
    ours, mesh = min((seconds(lambda: read_mesh(path)) for _ in range(2)), key=lambda r: r[0])
    theirs, _ = seconds(lambda: trimesh.load_mesh(path, process=False))
    by_line, _ = seconds(lambda: mesh_formats._parse_obj_by_line(path.read_bytes(), path))
    print(f"{len(faces)} faces: {ours:.2f} s, trimesh {theirs:.2f} s, by line {by_line:.2f} s")
    assert np.array_equal(mesh.faces, faces) and np.array_equal(mesh.vertices, vertices)
    assert ours < theirs and ours < by_line / 2
