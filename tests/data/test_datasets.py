"""Datasets by name or path, and everything that can be wrong with them."""

import numpy as np
import pytest
import torch
from PIL import Image

import dslib
from dslib.data.splits import FolderSplit
from dslib.errors import BadConfig, BadData


@pytest.fixture
def photos(tmp_path):
    """Two ImageNet classes, three train and two val images each, 40 x 30 px."""
    generator = np.random.default_rng(0)
    for part, count in (("train", 3), ("val", 2)):
        for wnid in ("n01440764", "n02102040"):
            folder = tmp_path / "photos" / part / wnid
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 256, (30, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return tmp_path / "photos"


@pytest.fixture
def arrays(tmp_path):
    generator = np.random.default_rng(0)
    x = generator.integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", x_train=x[:8], y_train=np.arange(8) % 3, x_test=x[8:], y_test=np.arange(4) % 3)
    return tmp_path / "x.npz"


def test_the_embedded_digits():
    data = dslib.load_data("digits")
    assert (len(data.train), len(data.val), len(data.classes)) == (1437, 360, 10)
    assert data.train.images.shape[1:] == (3, 32, 32)
    assert data.train.images.dtype == torch.uint8
    assert data.train.labels.bincount(minlength=10).min() > 100
    assert torch.equal(dslib.load_data("digits").val.labels, data.val.labels)


def test_batches_are_normalised_and_in_order():
    split = dslib.load_data("digits", 16).val
    images, labels = next(iter(split.batches(7, torch.tensor([3, 1, 2]))))
    assert images.shape == (3, 3, 16, 16)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(labels, split.labels[[3, 1, 2]])
    assert images.min() == pytest.approx((0 - 0.485) / 0.229, abs=1e-2)


def test_a_folder_of_photos(photos):
    data = dslib.load_data(str(photos), 24)
    assert (len(data.train), len(data.val), data.classes) == (6, 4, ("n01440764", "n02102040"))
    assert data.val.images.shape == (4, 3, 24, 24)


def test_large_folders_are_read_as_they_are_used(photos, monkeypatch):
    held = dslib.load_data(str(photos), 24)
    monkeypatch.setattr("dslib.data.datasets.IN_MEMORY_BYTES", 0)
    data = dslib.load_data(str(photos), 24)
    assert isinstance(data.val, FolderSplit)
    streamed = torch.cat([images for images, _ in data.val.batches(3)])
    torch.testing.assert_close(streamed, next(iter(held.val.batches(4)))[0])
    assert data.train.first(2).images.shape == (2, 3, 24, 24)


def test_arrays(arrays):
    data = dslib.load_data(str(arrays))
    assert (len(data.train), len(data.val), len(data.classes), data.image_size) == (8, 4, 3, 16)
    assert dslib.load_data(str(arrays), 8).val.images.shape == (4, 3, 8, 8)


@pytest.mark.parametrize("shape", [(20, 12), (12, 20)])
def test_arrays_that_are_not_square_are_cropped(tmp_path, shape):
    x = np.zeros((4, *shape, 3), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", x_train=x, y_train=[0, 1, 0, 1], x_test=x, y_test=[0, 1, 0, 1])
    for size, expected in ((None, 12), (8, 8)):
        data = dslib.load_data(str(tmp_path / "x.npz"), size)
        assert data.train.images.shape == data.val.images.shape == (4, 3, expected, expected)
        assert data.train.augment(data.train.images, torch.rand(4, 5)).shape == (4, 3, expected, expected)


def test_dslib_data_is_searched_first(photos, arrays, monkeypatch):
    monkeypatch.setenv("DSLIB_DATA", str(photos.parent))
    photos.rename(photos.parent / "imagenette128")
    assert len(dslib.load_data("imagenette", 24).train) == 6
    arrays.rename(photos.parent / "cifar10.npz")
    assert len(dslib.load_data("cifar10").train) == 8


def test_corrupt_images_are_named_and_left_out_only_when_asked(photos, capsys):
    broken = photos / "train" / "n01440764" / "1.png"
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(BadData, match=r"1 of 6 images in .*train cannot be read, the first: .*1\.png.*--skip-corrupt"):
        dslib.load_data(str(photos), 24)
    data = dslib.load_data(str(photos), 24, skip_corrupt=True)
    assert len(data.train) == len(data.train.labels) == 5
    assert "1.png; left out" in capsys.readouterr().out


def test_corrupt_images_in_large_folders(photos, monkeypatch, capsys):
    monkeypatch.setattr("dslib.data.datasets.IN_MEMORY_BYTES", 0)
    broken = photos / "train" / "n01440764" / "1.png"
    broken.write_bytes(b"no image")
    with pytest.raises(BadData, match=r"1\.png cannot be read"):
        dslib.load_data(str(photos), 24).train.first(6)
    assert len(dslib.load_data(str(photos), 24, skip_corrupt=True).train.first(6)) == 5
    assert "left out" in capsys.readouterr().out
    whole, cut = (broken.with_name(f"{name}.jpg") for name in ("whole", "cut"))
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(whole)
    cut.write_bytes(whole.read_bytes()[:-200])  # its header is whole
    assert len(dslib.load_data(str(photos), 24, skip_corrupt=True).train) == 6
    assert "2 of 8 images" in capsys.readouterr().out


def test_an_empty_class_folder(photos):
    for path in (photos / "train" / "n02102040").iterdir():
        path.unlink()
    with pytest.raises(BadData, match=r"n02102040.*every class folder needs an image"):
        dslib.load_data(str(photos))


def test_folders_that_are_no_dataset(photos, tmp_path):
    with pytest.raises(BadData, match="expected a dataset folder with train/ and val/"):
        dslib.load_data(str(tmp_path))
    (photos / "val" / "n02102040").rename(photos / "val" / "n99")
    with pytest.raises(BadData, match="different classes: \\['n02102040', 'n99'\\]"):
        dslib.load_data(str(photos))


def test_files_that_are_no_dataset(tmp_path):
    (tmp_path / "x.npz").write_bytes(b"PK nonsense")
    with pytest.raises(BadData, match="is not a readable .npz file"):
        dslib.load_data(str(tmp_path / "x.npz"))
    np.savez(tmp_path / "y.npz", x_train=np.zeros(3))
    with pytest.raises(BadData, match="expected arrays x_train, y_train, x_test, y_test, found x_train"):
        dslib.load_data(str(tmp_path / "y.npz"))
    x = np.zeros((2, 4, 4, 3), dtype=np.uint8)
    for labels in (np.eye(2, dtype=int), np.array([0.5, 1]), np.array([-1, 0]), np.array([0])):
        np.savez(tmp_path / "w.npz", x_train=x, y_train=labels, x_test=x, y_test=[0, 1])
        with pytest.raises(BadData, match="expected 2 labels, numbers from 0 on, found"):
            dslib.load_data(str(tmp_path / "w.npz"))
    np.savez(tmp_path / "z.npz", x_train=np.zeros((2, 4, 4, 3)), y_train=[0, 1], x_test=np.zeros(0), y_test=[])
    with pytest.raises(BadData, match=r"expected images \(N, H, W, 3\) uint8"):
        dslib.load_data(str(tmp_path / "z.npz"))


def test_unknown_names_say_the_nearest():
    with pytest.raises(BadData, match="unknown dataset 'imagenete': the nearest known are imagenet"):
        dslib.load_data("imagenete")
    with pytest.raises(BadConfig, match="expected a positive whole number, found -1"):
        dslib.load_data("digits", -1)


def test_no_network_and_no_data_says_what_to_type(monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setenv("DSLIB_DATA", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torchvision.datasets.Imagenette", refuse)
    monkeypatch.setattr("torchvision.datasets.CIFAR10", refuse)
    for name in ("imagenette", "cifar10"):
        with pytest.raises(BadData, match="no route to host.*set DSLIB_DATA to a folder that holds it"):
            dslib.load_data(name)
    with pytest.raises(BadData, match="ImageNet is not in"):
        dslib.load_data("imagenet")
