"""GLB files as other programs write them: order, places, number formats, and what is refused by name."""

import json
import re
import struct

import numpy as np
import pytest

from data.mesh_io import read_mesh
from data.mesh_prepare import MeshSpec, prepare_mesh

TRIANGLE = [[0, 0, 0], [1, 0, 0], [0, 1, 0]]


def glb(path, parts, nodes=None, change=lambda tree: None, **more):
    """A GLB of meshes with one primitive each; parts: [(positions, options)]. Options: kind and normalized of the positions,
    stride in bytes, mode and index of the primitive, extensions of it."""
    body, views, accessors, meshes = b"", [], [], []
    for points, options in parts:
        kind, stride = np.dtype(options.get("kind", "<f4")), options.get("stride")
        points = np.array(points, kind)
        rows = points.tobytes() if stride is None else b"".join(row.tobytes().ljust(stride, b"?") for row in points)
        index = np.array(options.get("index", range(len(points))), "<u2")
        for data, settings in ((rows, {} if stride is None else {"byteStride": stride}), (index.tobytes(), {})):
            views.append({"buffer": 0, "byteOffset": len(body), "byteLength": len(data), **settings})
            body += data.ljust(-(-len(data) // 4) * 4, b"\0")
        component = {"<f4": 5126, "|i1": 5120, "|u1": 5121, "<i2": 5122, "<u2": 5123}[kind.str]
        accessors += [{"bufferView": len(views) - 2, "componentType": component, "count": len(points), "type": "VEC3",
                       **({"normalized": True} if options.get("normalized") else {})},
                      {"bufferView": len(views) - 1, "componentType": 5123, "count": len(index), "type": "SCALAR"}]
        meshes.append({"primitives": [{"attributes": {"POSITION": len(accessors) - 2}, "indices": len(accessors) - 1,
                                       "mode": options.get("mode", 4), "extensions": options.get("extensions", {})}]})
    nodes = [{"mesh": i} for i in range(len(parts))] if nodes is None else nodes
    children = {child for node in nodes for child in node.get("children", [])}
    tree = {"asset": {"version": "2.0"}, "scene": 0, "scenes": [{"nodes": [i for i in range(len(nodes)) if i not in children]}],
            "nodes": nodes, "meshes": meshes, "accessors": accessors, "bufferViews": views, "buffers": [{"byteLength": len(body)}]}
    change(tree)
    write(path, {**tree, **more}, body)
    return path


def write(path, tree, body):
    text = json.dumps(tree).encode()
    text += b" " * (-len(text) % 4)
    path.write_bytes(struct.pack("<4s2I", b"glTF", 2, 28 + len(text) + len(body)) + struct.pack("<I4s", len(text), b"JSON") + text
                     + struct.pack("<I4s", len(body), b"BIN\0") + body)


def refused(path, *words):
    with pytest.raises(ValueError, match=re.escape(f"{path}: ")) as error:
        read_mesh(path)
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("name", ["KHR_draco_mesh_compression", "EXT_meshopt_compression", "EXT_mesh_gpu_instancing", "ACME_own"])
def test_required_extensions_that_change_the_geometry_are_refused_by_name(tmp_path, name):
    refused(glb(tmp_path / "a.glb", [(TRIANGLE, {})], extensionsRequired=["KHR_materials_unlit", name]), f"needs the extension {name}, ")


def test_instances_that_an_extension_draws_are_refused_although_not_required(tmp_path):
    node = {"mesh": 0, "extensions": {"EXT_mesh_gpu_instancing": {"attributes": {"TRANSLATION": 0}}}}
    refused(glb(tmp_path / "a.glb", [(TRIANGLE, {})], [node], extensionsUsed=["EXT_mesh_gpu_instancing"]), "needs the extension EXT_mesh_gpu_instancing")


@pytest.mark.parametrize("uri", ["a.bin", "my%20buffer.bin"])
def test_a_buffer_that_changes_outside_the_file_is_noticed_by_the_cache(tmp_path, uri):
    path = glb(tmp_path / "a.glb", [(TRIANGLE, {})], change=lambda tree: tree["buffers"][0].update(uri=uri))
    body = path.read_bytes()[-44:]                                  # 3 positions, 3 indices
    found = []
    for width in (1, 5):
        (tmp_path / uri.replace("%20", " ")).write_bytes(np.array([[0, 0, 0], [width, 0, 0], [0, 1, 0]], "<f4").tobytes() + body[36:])
        found.append(prepare_mesh(path, MeshSpec(), tmp_path / "cache").vertices)
    assert np.ptp(found[1][:, 0]) > 2 * np.ptp(found[0][:, 0])
    assert (prepare_mesh(path, MeshSpec(), tmp_path / "cache").vertices == found[1]).all()
    (tmp_path / uri.replace("%20", " ")).unlink()
    with pytest.raises(ValueError, match="a.glb: cannot be read as GLB .FileNotFoundError"):
        prepare_mesh(path, MeshSpec(), tmp_path / "cache")


def test_extensions_of_materials_and_those_not_required_are_passed_over(tmp_path):
    path = glb(tmp_path / "a.glb", [(TRIANGLE, {"extensions": {"KHR_draco_mesh_compression": {}}})],
               extensionsRequired=["KHR_materials_unlit", "KHR_texture_transform"], extensionsUsed=["KHR_draco_mesh_compression"])
    assert read_mesh(path).vertices.tolist() == TRIANGLE            # its uncompressed copy, which the file has as well


@pytest.mark.parametrize(("kind", "largest", "stride"), [("i1", 127, 4), ("u1", 255, 4), ("<i2", 32767, 8), ("<u2", 65535, 8)])
def test_normalised_integers_are_shares(tmp_path, kind, largest, stride):
    points = [[0, 0, 0], [largest, 0, 0], [0, largest, largest // 2]]
    lowest = np.iinfo(kind).min
    if lowest < 0:
        points[0] = [lowest, lowest + 1, 0]                         # both are -1
    nodes = [{"mesh": 0, "scale": [4, 4, 4]}, {"mesh": 1, "translation": [10, 0, 0]}]
    parts = [(points, {"kind": kind, "stride": stride, "normalized": normalized}) for normalized in (True, False)]
    mesh = read_mesh(glb(tmp_path / "a.glb", parts, nodes, extensionsRequired=["KHR_mesh_quantization"]))
    expected = np.maximum(np.array(points) / largest, -1) * 4
    np.testing.assert_allclose(mesh.vertices[:3], expected, atol=1e-12)
    np.testing.assert_array_equal(mesh.vertices[3:], np.array(points) + [10, 0, 0])    # integers as they are, where not normalised


def test_accessors_without_a_buffer_view(tmp_path):
    def sparse(tree):
        """The positions begin as zeros; number 1 and 2 are replaced."""
        tree["accessors"][0] = {"componentType": 5126, "count": 3, "type": "VEC3", "sparse": {
            "count": 2, "indices": {"bufferView": 3, "componentType": 5123, "byteOffset": 2},
            "values": {"bufferView": 2, "byteOffset": 12}}}

    path = glb(tmp_path / "a.glb", [(TRIANGLE, {}), (TRIANGLE, {})], [{"mesh": 0}], change=sparse)
    assert read_mesh(path).vertices.tolist() == TRIANGLE
    for extensions, words in (({}, "has a buffer view without data"), ({"ACME_packed": {}}, "data of the extension ACME_packed alone")):
        refused(glb(path, [(TRIANGLE, {"extensions": extensions})], change=lambda tree: tree["accessors"][0].pop("bufferView")), words)


def test_a_buffer_without_data_is_refused(tmp_path):
    def fallback(tree):
        tree["buffers"].append({"byteLength": 99})
        tree["bufferViews"][0] |= {"buffer": 1, "extensions": {"EXT_meshopt_compression": {}}}

    refused(glb(tmp_path / "a.glb", [(TRIANGLE, {})], change=fallback), "data of the extension EXT_meshopt_compression alone")


def test_instances_come_in_the_order_of_the_file(tmp_path):
    nodes = [{"mesh": 1, "translation": [0, 9, 0]}, *({"mesh": 0, "name": name, "translation": [0, i, 0]}
                                                      for i, name in enumerate(["zebra", "leg", "ant", "wall", "b", "a"]))]
    mesh = read_mesh(glb(tmp_path / "a.glb", [(TRIANGLE, {}), (TRIANGLE, {})], nodes))
    assert mesh.vertices[mesh.faces][:, 0, 1].tolist() == [0, 1, 2, 3, 4, 5, 9]


def test_nodes_within_nodes_and_meshes_that_nobody_shows(tmp_path):
    half = np.sqrt(0.5)
    nodes = [{"children": [2], "rotation": [half, 0, 0, half], "translation": [1, 0, 0]}, {"mesh": 0},
             {"mesh": 0, "matrix": [2, 0, 0, 0, 0, 2, 0, 0, 0, 0, 2, 0, 0, 0, 5, 1]}]
    path = glb(tmp_path / "a.glb", [(TRIANGLE, {}), (TRIANGLE, {})], nodes, scenes=[{"nodes": [1]}, {"nodes": [0]}], scene=1)
    np.testing.assert_allclose(read_mesh(path).vertices, [[1, -5, 0], [3, -5, 0], [1, -5, 2]], atol=1e-12)


def test_a_reflection_keeps_the_outside_outside(tmp_path):
    mesh = read_mesh(glb(tmp_path / "a.glb", [(TRIANGLE, {})], [{"mesh": 0, "scale": [-1, 1, 1]}]))
    a, b, c = mesh.vertices[mesh.faces[0]]
    assert np.cross(b - a, c - a)[2] > 0                            # as the triangle's own normal, which points up


@pytest.mark.parametrize(("mode", "faces"), [(5, [[0, 1, 2], [1, 3, 2], [2, 3, 4]]), (6, [[0, 1, 2], [0, 2, 3], [0, 3, 4]])])
def test_strips_and_fans(tmp_path, mode, faces):
    points = [[0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 2, 0]]
    lines = (points, {"mode": 1})
    assert read_mesh(glb(tmp_path / "a.glb", [lines, (points, {"mode": mode})])).faces.tolist() == faces


def test_damage_is_named(tmp_path):
    def view(**settings):
        return lambda tree: tree["bufferViews"][0].update(settings)

    for change in (view(byteOffset=50), view(byteStride=1000), view(buffer=7), lambda tree: tree["accessors"][0].update(count=10**9),
                   lambda tree: tree["nodes"][0].update(children=[0]), lambda tree: tree["accessors"][0].update(type="VEC2")):
        refused(glb(tmp_path / "a.glb", [(TRIANGLE, {})], change=change), "cannot be read as GLB")
    refused(glb(tmp_path / "a.glb", [(TRIANGLE, {"index": [0, 1, 3]}), (TRIANGLE, {})]), "an index 3 into 3 vertices")
