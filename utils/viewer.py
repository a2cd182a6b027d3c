"""A page in which a coloured mesh can be turned: WebGL alone, the geometry inside, nothing loaded from anywhere."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from html import escape

import numpy as np

from utils.render import FRAMES, upright

VIEW = (25.0, 15.0)                     # degrees that the first view goes around the object and up, as in render_mesh
FLAT_VIEW = (25.0, 45.0)                # of what is less than FLAT times as high as wide, such as terrain
FLAT = 0.3
FINEST = 32767                          # coordinates are 16-bit shares of the longest side's half

STYLE = """html, body { margin: 0; height: 100%; overflow: hidden; background: #f6f6f3;
  font: 14px/1.45 system-ui, -apple-system, "Segoe UI", sans-serif; color: #222; }
canvas { position: fixed; inset: 0; width: 100%; height: 100%; cursor: grab; touch-action: none; }
aside { position: fixed; top: 16px; left: 16px; max-width: min(20rem, 45vw); max-height: calc(100vh - 64px);
  overflow: auto; padding: 12px 16px; background: #fffffff0; border: 1px solid #ddd; border-radius: 8px; }
h1 { font-size: 16px; margin: 0; overflow-wrap: anywhere; }
p { margin: 2px 0 0; color: #666; }
table { border-spacing: 0; margin-top: 8px; }
tr { cursor: pointer; }
tr.off { opacity: 0.35; }
td { padding: 1px 12px 1px 0; overflow-wrap: anywhere; }
td:last-child { padding: 0; text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
i { display: inline-block; width: 12px; height: 12px; border-radius: 3px; border: 1px solid #0003; }
footer { position: fixed; bottom: 12px; left: 16px; color: #777; font-size: 12px; pointer-events: none; }"""

SCRIPT = r"""
const data = JSON.parse(document.getElementById("data").textContent);
const bytes = text => Uint8Array.from(atob(text), letter => letter.charCodeAt(0));
const place = new Int16Array(bytes(data.place).buffer);           // 9 numbers a face: its corners' right, depth, up
const color = bytes(data.color);                                  // 3 numbers a face
const canvas = document.querySelector("canvas"), note = document.querySelector("footer");
const gl = canvas.getContext("webgl2", {antialias: true});
let state;

function shader(kind, text) {
  const result = gl.createShader(kind);
  gl.shaderSource(result, "#version 300 es\n" + text);
  gl.compileShader(result);
  return result;
}

function buffer(name, values, type, usage) {
  const at = gl.getAttribLocation(program, name), result = gl.createBuffer();
  gl.bindBuffer(gl.ARRAY_BUFFER, result);
  gl.bufferData(gl.ARRAY_BUFFER, values, usage);
  gl.enableVertexAttribArray(at);
  gl.vertexAttribPointer(at, 3, type, true, 0, 0);
  return result;
}

function painted(only) {                                          // colours of the corners; all but one colour grey
  const result = new Uint8Array(3 * color.length);
  for (let f = 0; f < color.length; f += 3) {
    const shown = !only || only.every((value, k) => value === color[f + k]);
    for (let i = 0; i < 9; i++) result[3 * f + i] = shown ? color[f + i % 3] : 222;
  }
  return result;
}

function rows() {                                                 // of the camera: right, up, towards the viewer
  const c = Math.cos(state.around), s = Math.sin(state.around), e = Math.cos(state.above), n = Math.sin(state.above);
  return [[c, s, 0], [-n * s, n * c, e], [e * s, -e * c, n]];
}

function start() {                                                // the first view: the object fills the free window
  state = {around: data.view[0], above: data.view[1], zoom: 1, shift: [0, 0], moved: false};
  fit();
}

function fit() {
  const [right, up] = rows(), low = [9, 9], high = [-9, -9];
  for (let i = 0; i < place.length; i += 3)
    [right, up].forEach((row, k) => {
      const at = (row[0] * place[i] + row[1] * place[i + 1] + row[2] * place[i + 2]) / 32767;
      low[k] = Math.min(low[k], at);
      high[k] = Math.max(high[k], at);
    });
  const wide = innerWidth > 900, left = wide ? document.querySelector("aside").getBoundingClientRect().right : 0;
  const room = [innerWidth - left, innerHeight];
  state.zoom = 0.86 * Math.min(...room.map((side, k) => side / Math.max(high[k] - low[k], 1e-3)));
  state.shift = [left / 2 - state.zoom * (low[0] + high[0]) / 2, -state.zoom * (low[1] + high[1]) / 2];
  draw();
}

function draw() {
  const density = devicePixelRatio || 1;
  canvas.width = innerWidth * density;
  canvas.height = innerHeight * density;
  gl.viewport(0, 0, canvas.width, canvas.height);
  gl.clear(gl.COLOR_BUFFER_BIT | gl.DEPTH_BUFFER_BIT);
  const turn = rows(), size = [innerWidth / 2, innerHeight / 2];
  gl.uniformMatrix3fv(gl.getUniformLocation(program, "turn"), false, [0, 1, 2].flatMap(k => turn.map(row => row[k])));
  gl.uniform2f(gl.getUniformLocation(program, "scale"), state.zoom / size[0], state.zoom / size[1]);
  gl.uniform2f(gl.getUniformLocation(program, "shift"), state.shift[0] / size[0], state.shift[1] / size[1]);
  gl.drawArrays(gl.TRIANGLES, 0, place.length / 3);
}

function drag(event) {
  if (!event.buttons) return;
  state.moved = true;
  if (event.buttons & 2 || event.shiftKey) {
    state.shift = [state.shift[0] + event.movementX, state.shift[1] - event.movementY];
  } else {
    state.around -= event.movementX * 0.008;
    state.above = Math.max(-1.57, Math.min(1.57, state.above + event.movementY * 0.008));
  }
  draw();
}

function zoom(event) {
  event.preventDefault();
  state.moved = true;
  const factor = Math.exp(-0.0015 * event.deltaY);
  const at = [event.clientX - innerWidth / 2, innerHeight / 2 - event.clientY];
  state.shift = state.shift.map((value, k) => at[k] + (value - at[k]) * factor);
  state.zoom *= factor;
  draw();
}

function choose(row, all) {                                       // one class alone in colour, or all again
  const alone = all.some(one => one !== row && !one.classList.contains("off"));
  all.forEach(one => one.classList.toggle("off", alone && one !== row));
  gl.bindBuffer(gl.ARRAY_BUFFER, paint);
  gl.bufferSubData(gl.ARRAY_BUFFER, 0, painted(alone ? JSON.parse(row.dataset.color) : null));
  draw();
}

let program, paint;
if (gl) {
  program = gl.createProgram();
  gl.attachShader(program, shader(gl.VERTEX_SHADER, `in vec3 place, color; out vec3 seen, paint;
    uniform mat3 turn; uniform vec2 scale, shift;
    void main() {
      seen = turn * place; paint = color;
      gl_Position = vec4(seen.xy * scale + shift, -seen.z * 0.5, 1.0); }`));
  gl.attachShader(program, shader(gl.FRAGMENT_SHADER, `precision highp float; in vec3 seen, paint; out vec4 pixel;
    void main() {
      vec3 normal = normalize(cross(dFdx(seen), dFdy(seen)));     // of the flat face, towards the viewer
      float light = 0.7 + 0.36 * max(dot(normal, normalize(vec3(-0.4, 0.75, 0.53))), 0.0);
      pixel = vec4(min(paint * light, 1.0), 1.0); }`));
  gl.linkProgram(program);
  gl.useProgram(program);
  buffer("place", place, gl.SHORT, gl.STATIC_DRAW);
  paint = buffer("color", painted(null), gl.UNSIGNED_BYTE, gl.DYNAMIC_DRAW);
  gl.enable(gl.DEPTH_TEST);
  gl.clearColor(0.965, 0.965, 0.953, 1);
  canvas.addEventListener("pointerdown", event => canvas.setPointerCapture(event.pointerId));
  canvas.addEventListener("pointermove", drag);
  canvas.addEventListener("wheel", zoom, {passive: false});
  canvas.addEventListener("dblclick", start);
  canvas.addEventListener("contextmenu", event => event.preventDefault());
  addEventListener("resize", () => state.moved ? draw() : fit());
  const all = [...document.querySelectorAll("tr")];
  all.forEach(row => row.addEventListener("click", () => choose(row, all)));
  start();
} else {
  note.textContent = "This browser has no WebGL 2, which draws the mesh.";
}
"""


def viewer_html(vertices: np.ndarray, faces: np.ndarray, face_color: np.ndarray, title: str = "mesh",
                legend: Sequence[tuple[str, Sequence[int], int]] = (), up: str = "auto") -> str:
    """One HTML page in which the mesh can be turned, moved and enlarged; the first view fits the window. It is
    that of render_mesh, from higher up for what is flat.

    vertices (V, 3), faces (F, 3) int, face_color (F, 3) uint8, up: as for render_mesh. legend: (name, colour, number
    of faces) of the classes; a click on one shows it alone. Coordinates have 16 bits, colours one a face.
    """
    corners = np.asarray(vertices, float)[faces].reshape(-1, 3)                               # (3 F, 3)
    view = VIEW
    if len(corners):
        corners = corners - (corners.min(0) + corners.max(0)) / 2
        corners = corners / max(np.linalg.norm(corners, axis=1).max(), 1e-30)                 # in the unit ball
        frame = upright(corners.reshape(-1, 3, 3)) if up == "auto" else np.array(FRAMES[up])
        corners = corners @ frame.T                                                           # right, depth, up
        size = np.ptp(corners, axis=0)
        view = FLAT_VIEW if size[2] < FLAT * size[:2].max() else VIEW
    content = {"view": np.radians(view).tolist(),
               "place": base64.b64encode(np.rint(corners * FINEST).astype("<i2").tobytes()).decode(),
               "color": base64.b64encode(np.ascontiguousarray(face_color, np.uint8).tobytes()).decode()}
    rows = "".join(f'<tr data-color="{json.dumps([int(part) for part in color])}">'
                   f'<td><i style="background: rgb({int(color[0])}, {int(color[1])}, {int(color[2])})"></i></td>'
                   f"<td>{escape(name)}</td><td>{100 * count / max(len(faces), 1):.1f} %</td></tr>"
                   for name, color, count in legend)
    return (f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f'<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
            f'style-src \'unsafe-inline\'; script-src \'unsafe-inline\'">\n<title>{escape(title)}</title>\n'
            f'<link rel="icon" href="data:,">\n<style>\n{STYLE}\n</style>\n</head>\n<body>\n<canvas></canvas>\n'
            f"<aside><h1>{escape(title)}</h1><p>{len(faces):,} faces</p><table>{rows}</table></aside>\n"
            f"<footer>Drag to turn, right button or Shift to move, wheel to enlarge, double click for the first view"
            f'{", click a class to see it alone" if legend else ""}.</footer>\n'
            f'<script type="application/json" id="data">{json.dumps(content)}</script>\n'
            f"<script>{SCRIPT}</script>\n</body>\n</html>\n")
