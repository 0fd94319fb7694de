"""Datasets by name or path. Small sets are held in memory as uint8, large ones are read as they are used."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..errors import BadConfig, BadData, first_line, nearest
from .augmenting import Crops, Shifts
from .splits import Files, FolderSplit, Split, cut, shuffled

if TYPE_CHECKING:
    from PIL import Image
    from torchvision.datasets import ImageFolder

NAMES = ("digits", "imagenette", "cifar10", "imagenet")
IN_MEMORY_BYTES = 4 * 2**30


@dataclass(frozen=True)
class Data:
    """A dataset: its classes in label order, a training and a validation split, the image size in pixels."""

    name: str
    classes: tuple[str, ...]
    train: Split | FolderSplit
    val: Split | FolderSplit
    image_size: int

    def hold_back(self, count: int) -> tuple[Data, Split]:
        """The data without some of its training images; and these. Raises as `splits.cut`."""
        rest, held = cut(self.train, count)
        return replace(self, train=rest), held


def load_data(name: str, image_size: int | None = None, skip_corrupt: bool = False) -> Data:
    """The dataset called `name`, or at the path `name`.

    `DSLIB_DATA` names a folder that is searched first, then `./data` and `~/.cache/dslib`; what is in none of
    them is downloaded by torchvision.

    Args:
        name: digits, imagenette, cifar10, imagenet; a folder with train/ and val/, one folder a class in each;
            or a .npz with x_train, y_train, x_test, y_test.
        image_size: side in pixels; default 32 for digits, CIFAR and arrays (their own), 128 for photos.
        skip_corrupt: leave unreadable images out (they are counted and named) instead of stopping.
    Raises:
        BadData: if there is no such dataset, or it is empty or corrupt; the message says what to type.
    """
    if image_size is not None and not (isinstance(image_size, int) and image_size > 0):
        raise BadConfig(f"image_size is in pixels: expected a positive whole number, found {image_size!r}")
    if name == "digits":
        return _digits(image_size or 32)
    if name == "cifar10":
        return _cifar10(image_size)
    if name in ("imagenette", "imagenet"):
        return _folder(name, _find_photos(name), image_size or (224 if name == "imagenet" else 128), skip_corrupt)
    path = Path(name).expanduser()
    if path.suffix == ".npz" and path.is_file():
        return _arrays(path.stem, path, image_size)
    if path.is_dir():
        return _folder(path.resolve().name, path, image_size or 128, skip_corrupt)
    raise BadData(
        f"{nearest('dataset', name, NAMES)}; or give a folder with train/ and val/, or a .npz file that exists"
    )


def load_photos(
    path: Path | str, image_size: int = 128, count: int | None = None, skip_corrupt: bool = False, seed: int = 0
) -> Split:
    """Photos of a folder and of all folders in it, unlabelled (their labels are -1).

    Args:
        path: of the folder.
        image_size: side in pixels.
        count: at most so many, chosen at random with `seed`; default all.
        skip_corrupt, seed: as for `load_data`; of the choice.
    Raises:
        BadData: if there is no such folder, or it holds no images or corrupt ones.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS

    if not image_size > 0:
        raise BadConfig(f"image_size is in pixels, found {image_size}")
    files = sorted(str(file) for file in Path(path).expanduser().rglob("*") if file.suffix.lower() in IMG_EXTENSIONS)
    if not files:
        raise BadData(f"{path}: expected a folder of photos ({', '.join(IMG_EXTENSIONS)}), found none")
    samples = [(files[i], -1) for i in shuffled(len(files), seed)[:count]]
    folder = SimpleNamespace(root=path, samples=samples, loader=_open_image)
    return _read_all(folder, _centre(image_size, ""), skip_corrupt)


def data_folders() -> list[Path]:
    """Where datasets and weights are looked for, in order."""
    named = os.environ.get("DSLIB_DATA")
    return [*([Path(named)] if named else []), Path("data"), Path.home() / ".cache" / "dslib"]


def find_file(*names: str) -> Path | None:
    """The first of `names` that exists in one of `data_folders`."""
    paths = (folder / name for folder in data_folders() for name in names)
    return next((path for path in paths if path.exists()), None)


def _digits(image_size: int) -> Data:
    """scikit-learn's handwritten digits (UCI), 8 x 8 enlarged; 1,437 to train on, 360 held back."""
    from sklearn.datasets import load_digits

    found = load_digits()
    small = torch.from_numpy(found.images).float()[:, None] * (255 / 16)
    large = torch.nn.functional.interpolate(small, size=image_size, mode="bilinear").round().byte()
    images, labels = large.expand(-1, 3, -1, -1).contiguous(), torch.from_numpy(found.target).long()
    rest, held = cut(Split(images, labels), 360)
    return Data("digits", tuple("0123456789"), replace(rest, augment=Shifts()), held, image_size)


def _cifar10(image_size: int | None) -> Data:
    path = find_file("cifar10.npz")
    if path is not None:
        return _arrays("cifar10", path, image_size)
    from torchvision.datasets import CIFAR10

    arrays = {}
    with _downloading("CIFAR-10") as cache:
        for key in ("train", "test"):
            part = CIFAR10(cache, train=key == "train", download=True)
            arrays[f"x_{key}"], arrays[f"y_{key}"] = part.data, np.asarray(part.targets)
    return _from_arrays("cifar10", arrays, image_size)


def _arrays(name: str, path: Path, image_size: int | None) -> Data:
    try:
        with np.load(path, allow_pickle=False) as found:
            arrays = {key: found[key] for key in found.files}
    except Exception as error:  # zip, header and pickle errors alike
        raise BadData(f"{path} is not a readable .npz file: {error}") from error
    return _from_arrays(name, arrays, image_size)


def _from_arrays(name: str, arrays: dict[str, Any], image_size: int | None) -> Data:
    expected = ("x_train", "y_train", "x_test", "y_test")
    if not set(expected) <= set(arrays):
        raise BadData(f"{name}: expected arrays {', '.join(expected)}, found {', '.join(sorted(arrays)) or 'none'}")
    size = image_size or min(arrays["x_train"].shape[1:3], default=0)
    splits = [_array_split(name, arrays[f"x_{part}"], arrays[f"y_{part}"], size) for part in ("train", "test")]
    classes = tuple(str(i) for i in range(int(max(split.labels.max() for split in splits)) + 1))
    return Data(name, classes, replace(splits[0], augment=Shifts(flip=True)), splits[1], size)


def _array_split(name: str, x: Any, y: Any, size: int) -> Split:
    if not (x.ndim == 4 and x.shape[3] == 3 and x.dtype == np.uint8 and len(x) > 0):
        raise BadData(f"{name}: expected images (N, H, W, 3) uint8, found {x.shape} {x.dtype}")
    if not (y.shape == (len(x),) and np.issubdtype(y.dtype, np.integer) and y.min() >= 0):
        raise BadData(f"{name}: expected {len(x)} labels, numbers from 0 on, found {y.shape} {y.dtype}")
    images = torch.from_numpy(x).permute(0, 3, 1, 2).contiguous()
    if images.shape[2:] != (size, size):
        images = _centre(size, name)(images)
    return Split(images, torch.from_numpy(y).long())


def _places() -> str:
    return ", ".join(str(folder) for folder in data_folders())


def _find_photos(name: str) -> Path:
    if name == "imagenet":
        path = find_file("imagenet", "imagenet-1k", "ILSVRC2012")
        if path is None:
            raise BadData(
                f"ImageNet is not in {_places()}: set DSLIB_DATA to the folder that holds imagenet/, "
                "or give the path of the folder that holds train/ and val/"
            )
        return path
    path = find_file("imagenette128", "imagenette2-160", "imagenette2-320", "imagenette2")
    if path is not None:
        return path
    from torchvision.datasets import Imagenette

    with _downloading("Imagenette") as cache:
        cache.mkdir(parents=True, exist_ok=True)
        Imagenette(str(cache), size="160px", download=True)
    return cache / "imagenette2-160"


@contextmanager
def _downloading(what: str) -> Iterator[Path]:
    """The folder to download to; BadData for what goes wrong in the block."""
    try:
        yield data_folders()[-1]
    except Exception as error:  # urllib, hashing and disk errors alike
        raise BadData(
            f"{what} is not in {_places()} and cannot be downloaded ({error}): "
            "go online, or set DSLIB_DATA to a folder that holds it"
        ) from error


def _folder(name: str, path: Path, image_size: int, skip_corrupt: bool) -> Data:
    """A folder with train/ and val/, one folder a class in each."""
    folders = [_image_folder(path / part) for part in ("train", "val")]
    train, val = folders
    if train.classes != val.classes:
        raise BadData(
            f"{path}: train/ and val/ hold different classes: {sorted(set(train.classes) ^ set(val.classes))[:5]}"
        )
    if len(train.classes) == 1000 and all(re.fullmatch(r"n\d{8}", name) for name in train.classes):
        name = "imagenet"  # whatever its folder is called
    large = 3 * image_size**2 * (len(train) + len(val)) > IN_MEMORY_BYTES
    crop = _centre(image_size, name)
    if large:
        for folder in folders:
            if skip_corrupt:
                _drop_corrupt(folder)
        splits: list[Any] = [FolderSplit(folder, _random_crop(image_size, name), crop) for folder in folders]
    else:
        splits = [_read_all(folder, crop, skip_corrupt) for folder in folders]
        splits[0] = replace(splits[0], augment=Crops())
    return Data(name, tuple(train.classes), splits[0], splits[1], image_size)


def _image_folder(path: Path) -> ImageFolder:
    from torchvision.datasets import ImageFolder

    if not path.is_dir():
        raise BadData(
            f"no folder {path}: expected a dataset folder with train/ and val/ in it, "
            "each with one folder of images a class"
        )
    try:
        return ImageFolder(str(path), loader=_open_image)
    except (FileNotFoundError, OSError) as error:
        raise BadData(f"{path}: {str(error).splitlines()[0]}: every class folder needs an image") from error


def _read_all(folder: Any, crop: Any, skip_corrupt: bool) -> Split:
    files = Files(folder, crop)
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        found = list(pool.map(files.__getitem__, range(len(files))))
    _report_corrupt(folder, [not isinstance(one, str) for one in found], skip_corrupt)
    images, labels = zip(*(one for one in found if not isinstance(one, str)), strict=True)
    return Split(torch.stack(images), torch.tensor(labels))


def _drop_corrupt(folder: ImageFolder) -> None:
    """Decode every file and leave out, in place, those that are no whole image."""
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        whole = list(pool.map(lambda sample: _is_image(sample[0]), folder.samples))
    _report_corrupt(folder, whole, skip_corrupt=True)
    folder.samples = [sample for sample, good in zip(folder.samples, whole, strict=True) if good]
    folder.imgs, folder.targets = folder.samples, [label for _, label in folder.samples]


def _report_corrupt(folder: Any, whole: list[bool], skip_corrupt: bool) -> None:
    corrupt = [path for (path, _), good in zip(folder.samples, whole, strict=True) if not good]
    if corrupt:
        report = f"{len(corrupt)} of {len(whole)} images in {folder.root} cannot be read, the first: {corrupt[0]}"
        if not skip_corrupt:
            raise BadData(f"{report}; mend or delete them, or pass --skip-corrupt")
        print(f"warning: {report}; left out")
    if not any(whole):
        raise BadData(f"{folder.root}: no readable image")


def _open_image(path: str) -> Image.Image:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what Pillow raises
        raise BadData(f"{path} cannot be read ({first_line(error)}): mend or delete it") from error


def _is_image(path: str) -> bool:
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.draft(None, (1, 1))  # a JPEG is read to its end all the same, an eighth as large
            image.load()
        return True
    except Exception:  # Pillow raises many kinds
        return False


def _centre(size: int, name: str) -> Any:
    """Shorter side to `size` (for ImageNet to size / 0.875, as its published accuracies do), centre crop."""
    from torchvision.transforms import v2

    resize = round(size / 0.875) if name == "imagenet" else size
    return v2.Compose([v2.Resize(resize, antialias=True), v2.CenterCrop(size)])


def _random_crop(size: int, name: str) -> Any:
    """Random resized crops, on ImageNet of as little as 8 % of the area, and flips."""
    from torchvision.transforms import v2

    scale = (0.08, 1.0) if name == "imagenet" else Crops.scale
    return v2.Compose([v2.RandomResizedCrop(size, scale=scale, antialias=True), v2.RandomHorizontalFlip()])
