"""Label photographs with a file of export.py: python run_onnx.py MODEL.onnx PHOTO ... --output DIR

Needs NumPy, Pillow and onnxruntime alone. What differs from predict.py: docs/export.md
"""

import argparse
import json
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model")
parser.add_argument("photos", nargs="+")
parser.add_argument("--output", required=True, help="folder of the label maps, NAME.png")
args = parser.parse_args()
session = onnxruntime.InferenceSession(args.model, providers=["CPUExecutionProvider"])
settings = {name: json.loads(text) for name, text in session.get_modelmeta().custom_metadata_map.items()}
Path(args.output).mkdir(parents=True, exist_ok=True)


def resize(maps, shape):                                                    # (n, h, w) -> (n, *shape) float32
    return np.stack([Image.fromarray(one).resize(shape[::-1], Image.Resampling.BILINEAR) for one in maps.astype(np.float32)])


for path in args.photos:
    photo = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    width, height = photo.size
    short, size = min(photo.size), settings["short_side"] or min(photo.size)
    if isinstance(size, list):                                              # as large as it just covers height x width
        size = round(short * max(size[0] / height, size[1] / width))
    shape = settings["fixed_size"] or [max(settings["smallest_side"], int(side * size / short)) for side in (height, width)]
    image = np.rint(resize(np.asarray(photo).transpose(2, 0, 1), shape)).astype(np.uint8)                # (3, h, w)
    scores = resize(session.run(None, {"image": image[None]})[0][0], (height, width))                   # (classes, H, W)
    values = np.array(settings["mask_values"])[scores.argmax(0)]                                    # the masks' numbers
    label = Image.fromarray(values.astype(np.uint8 if settings["palette"] else np.uint16))
    if settings["palette"]:
        label.putpalette(np.array(settings["palette"], np.uint8).tobytes())
    label.save(Path(args.output) / f"{Path(path).stem}.png")
