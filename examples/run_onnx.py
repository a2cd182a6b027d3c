"""Label photographs with a file of export.py: python run_onnx.py MODEL.onnx PHOTO ... --output DIR

Needs NumPy, Pillow and onnxruntime alone. What differs from predict.py: docs/export.md"""
import argparse
import json
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model")
parser.add_argument("photos", nargs="+")
parser.add_argument("--output", required=True, help="folder")
args = parser.parse_args()
onnxruntime.set_default_logger_severity(3)                                  # errors; no remarks on its own optimisation
session = onnxruntime.InferenceSession(args.model, providers=["CPUExecutionProvider"])
settings = {name: json.loads(text) for name, text in session.get_modelmeta().custom_metadata_map.items()}
Path(args.output).mkdir(parents=True, exist_ok=True)

def resize(maps, shape):                                                    # (n, h, w) -> (n, *shape) float32
    return np.stack([Image.fromarray(one).resize(shape[::-1], Image.Resampling.BILINEAR) for one in np.float32(maps)])

for path in args.photos:
    if Image.open(path).mode[0] in "IF":
        raise SystemExit(f"error: {path}: grey of more than 8 bits, which predict.py reads")
    photo = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB")).transpose(2, 0, 1)
    own = photo.shape[1:]
    size = settings["short_side"] or min(own)                               # None: the network sees a photo as it is
    if isinstance(size, list):                                              # it just covers this height and width
        size = round(min(own) * max(wanted / side for wanted, side in zip(size, own, strict=True)))
    shape = settings["fixed_size"] or [max(settings["smallest_side"], int(side * size / min(own))) for side in own]
    image = np.rint(resize(photo, shape)).astype(np.uint8)                  # (3, h, w)
    scores = resize(session.run(None, {"image": image[None]})[0][0], own)   # (classes, H, W)
    values = np.array(settings["mask_values"])[scores.argmax(0)]            # the numbers of the training masks
    label = Image.fromarray(values.astype(np.uint8 if settings["palette"] else np.uint16))
    if settings["palette"]:
        label.putpalette(np.array(settings["palette"], np.uint8).tobytes())
    label.save(Path(args.output) / f"{Path(path).stem}.png")
