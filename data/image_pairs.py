"""Finding photographs and masks, and pairing them: they share the file name without its ending."""

from __future__ import annotations

import glob
import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".jp2", ".j2k")


def list_images(folder: str | Path, recursive: bool = False) -> list[Path]:
    """The image files of a folder, not hidden ones, sorted; recursive: also those of folders in it (links to folders
    and hidden folders are not followed)."""
    if not recursive:
        return sorted(path for path in Path(folder).iterdir() if _is_image(path))
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [path for path in (Path(place, name) for name in names) if _is_image(path)]
    return sorted(found)


def _is_image(path):
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def find_files(patterns: Sequence[str], what: str) -> list[Path]:
    """All files named by patterns, each a file, a folder or a glob (** goes into folders), sorted, none twice.

    Globs and folders give image files only. ValueError, naming `what` (the flag), for a pattern that finds nothing.
    """
    found = set()
    for pattern in map(str, patterns):
        if os.path.isdir(pattern):
            files = list_images(pattern)
        elif os.path.isfile(pattern):
            files = [Path(pattern)]
        else:
            files = [path for path in map(Path, glob.glob(pattern, recursive=True)) if _is_image(path)]
        if not files:
            if os.path.isdir(pattern):
                why = f"no images ({' '.join(SUFFIXES)}) in this folder"
            elif glob.has_magic(pattern):
                why = "no image file matches"
            else:
                why = "no such file or folder"
            raise ValueError(f"{what} {pattern}: {why}; name files, folders or globs such as 'images/*.jpg'")
        found.update(files)
    return sorted(found)


def pair_files(images: Sequence[Path], masks: Sequence[Path],
               names: tuple[str, str] = ("--image-paths", "--mask-paths"),
               suffixes: Sequence[str] = ()) -> list[tuple[Path, Path]]:
    """(photograph, mask) of the same file name without ending, in the order of `images`, whatever the order of masks.

    suffixes: what a mask's name has behind the photograph's ("_mask"); then only files with one of them are masks, and
    both may lie in one folder. A photograph's name may end in another of them (Cityscapes: _leftImg8bit,
    _gtFine_labelIds). names are the flags an error tells of: ValueError for a name that occurs twice, for a file
    without its partner and for one that is its own.
    """
    by_stem, same = stems_of(images, masks, names, suffixes)
    for path, known, name in same:
        raise ValueError(f"{name}: {known} and {path} have the same name without ending, by which photographs and "
                         f"masks are paired; rename one, or leave it out")
    for one, other, here, there in ((*by_stem, *names), (*by_stem[::-1], *names[::-1])):
        missing = [path for stem, path in one.items() if stem not in other]
        if missing:
            shown = ", ".join(path.name for path in missing[:3])
            if len(missing) > 3:
                shown += " ..."
            example = next(iter(other.values()), None)
            hint = f" ({there} has {example.name} ...)" if example else ""
            ending = None if suffixes else common_ending(*map(list, by_stem))
            hint += f"; set mask_suffix: {ending} (--mask-suffix {ending})" if ending else ""
            raise ValueError(f"{here}: {len(missing)} of {len(one)} files have no partner of the same name in {there}: "
                             f"{shown}{hint}")
    pairs = [(path, by_stem[1][stem]) for stem, path in by_stem[0].items()]
    for path, mask in pairs:
        if path == mask:
            raise ValueError(f"{names[0]} and {names[1]}: {path} is in both; name the masks in one and the photographs "
                             f"in the other")
    return pairs


def stems_of(images: Sequence[Path], masks: Sequence[Path], names: tuple[str, str] = ("images", "masks"),
             suffixes: Sequence[str] = ()) -> tuple[list[dict[str, Path]], list[tuple[Path, Path, str]]]:
    """({stem: photograph}, {stem: mask}), whose common stems are pairs, and (file, the one before it, which of `names`)
    for every name that occurs twice; arguments and ValueError without a mask as pair_files."""
    images, masks = list(map(Path, images)), list(map(Path, masks))
    if suffixes:
        masks = [path for path in masks if _without(_stem(path), suffixes) != _stem(path)]
        if not masks:
            raise ValueError(f"{names[1]}: no file has a name that ends in {' or '.join(suffixes)} (mask_suffix)")
        images = [path for path in images if path not in set(masks)]
    mask_stems = [_without(_stem(path), suffixes) for path in masks]
    image_stems = [_stem(path) if _stem(path) in set(mask_stems) else _without(_stem(path), suffixes)
                   for path in images]
    by_stem: list[dict[str, Path]] = [{}, {}]
    same = []
    for known, files, stems, name in zip(by_stem, (images, masks), (image_stems, mask_stems), names, strict=True):
        for path, stem in zip(files, stems, strict=True):
            if known.setdefault(stem, path) != path:
                same.append((path, known[stem], name))
    return by_stem, same


def _stem(path):
    """The name without its ending; Macs write an accent as a letter of its own."""
    return unicodedata.normalize("NFC", path.stem)


def _without(stem, suffixes):
    """A name without the longest of the suffixes that it ends in."""
    ending = max((suffix for suffix in suffixes if suffix and stem.endswith(suffix)), key=len, default="")
    return stem.removesuffix(ending) or stem


def common_ending(images: Sequence[str], masks: Sequence[str]) -> str | None:
    """What all masks have behind a photograph's name, None where they differ."""
    endings = {next((mask[len(image):] for image in images if mask.startswith(image)), "") for mask in masks[:100]}
    return endings.pop() if len(endings) == 1 and "" not in endings else None
