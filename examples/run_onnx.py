"""Label photographs with a file of export.py; needs NumPy, Pillow and onnxruntime alone: python run_onnx.py MODEL.onnx PHOTO ... --output DIR"""

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

for path in args.photos:
    photo = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    width, height = photo.size
    size, short = settings["short_side"] or min(photo.size), min(photo.size)
    if isinstance(size, list):                                              # as large as it just covers height x width
        size = round(short * max(size[0] / height, size[1] / width))
    shape = [max(settings["smallest_side"], int(side * size / short)) for side in (height, width)]
    image = photo.resize((settings["fixed_size"] or shape)[::-1], Image.Resampling.BILINEAR)
    scores, = session.run(None, {"image": np.asarray(image).transpose(2, 0, 1)[None]})              # (1, classes, h, w)
    scores = np.stack([Image.fromarray(one).resize(photo.size, Image.Resampling.BILINEAR) for one in scores[0]])
    values = np.array(settings["mask_values"])[scores.argmax(0)]                                    # the masks' numbers
    label = Image.fromarray(values.astype(np.uint16 if settings["palette"] is None else np.uint8))
    if settings["palette"] is not None:
        label.putpalette(np.array(settings["palette"], np.uint8).tobytes())
    label.save(Path(args.output) / f"{Path(path).stem}.png")
    for value, count in zip(*np.unique(values, return_counts=True), strict=True):
        print(f"{path}: {settings['class_names'][settings['mask_values'].index(value)]} {count / values.size:.1%}")
