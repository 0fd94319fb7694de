"""Which images a training sees, and how they are augmented: the same for any batch, process or resumption."""

import random
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Tiny
from torchvision.transforms.v2 import functional as v2

import dslib
from dslib.data.augmenting import Crops, Shifts, chance_of, draws, erased, mixed
from dslib.errors import BadConfig, BadData
from dslib.running import pretrain
from dslib.training.expanding import Boost, boost
from dslib.training.feeding import Feed
from dslib.training.settings import Train

CONFIG = Train(epochs=1, batch_size=32)
CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Twelve photos of noise, read from disk as they are used."""
    from PIL import Image

    noise = np.random.default_rng(0)
    for part, count in (("train", 6), ("val", 2)):
        for label in "ab":
            (tmp_path / part / label).mkdir(parents=True)
            for i in range(count):
                image = Image.fromarray(noise.integers(0, 255, (40, 50, 3), dtype=np.uint8))
                image.save(tmp_path / part / label / f"{i}.png")
    monkeypatch.setattr("dslib.data.datasets.IN_MEMORY_BYTES", 0)
    return tmp_path


def images_of(feed, epoch=0, start=0):
    return torch.cat([images for micros in feed.epoch(epoch, start) for images, _ in micros])


def test_random_numbers_are_a_function_of_seed_epoch_and_image():
    indices = torch.arange(20_000)
    numbers = draws(3, 1, indices)
    assert torch.equal(draws(3, 1, indices[[7, 5]]), numbers[[7, 5]])
    assert 0 <= numbers.min() <= numbers.max() < 1
    torch.testing.assert_close(numbers.mean(0), torch.full((10,), 0.5), rtol=0, atol=0.01)
    torch.testing.assert_close(numbers.var(0), torch.full((10,), 1 / 12), rtol=0, atol=0.003)
    assert np.corrcoef(numbers.T.numpy())[~np.eye(10, dtype=bool)].__abs__().max() < 0.03
    for other in (draws(4, 1, indices), draws(3, 2, indices), draws(3, 1, indices + 1)):
        assert abs(np.corrcoef(other[:, 0].numpy(), numbers[:, 0].numpy())[0, 1]) < 0.03


def test_a_crop_is_the_resized_part_of_the_image():
    image = torch.rand(1, 3, 32, 32) * 255
    numbers = torch.tensor([[0.0, 0.5, 0.25, 0.5, 0.9]])  # a quarter of the area, square, from x 4, y 8; not flipped
    found = Crops(scale=(0.25, 0.25))(image, numbers)
    wanted = v2.resize(image[:, :, 8:24, 4:20], [32, 32], antialias=False)
    torch.testing.assert_close(found[..., 2:-2, 2:-2], wanted[..., 2:-2, 2:-2], rtol=1e-4, atol=1e-2)
    numbers[0, 4] = 0.1
    torch.testing.assert_close(Crops(scale=(0.25, 0.25))(image, numbers), found.flip(3))
    whole = Crops(scale=(1.0, 1.0), ratio=(1.0, 1.0))(image, torch.tensor([[0.3, 0.3, 0.3, 0.3, 0.9]]))
    torch.testing.assert_close(whole, image)


def test_shifts_move_each_image_by_its_own_pixels():
    images = torch.randint(1, 255, (50, 3, 16, 16), dtype=torch.uint8)
    numbers = draws(0, 0, torch.arange(50))
    found = Shifts()(images, numbers)
    assert found.dtype == torch.uint8
    padded, seen = F.pad(images, (2, 2, 2, 2)), set()
    for i in range(50):
        x, y = int(numbers[i, 2] * 5), int(numbers[i, 3] * 5)
        assert torch.equal(found[i], padded[i, :, y : y + 16, x : x + 16])
        seen |= {("x", x), ("y", y)}
    assert len(seen) == 10  # every shift by up to two pixels comes
    mirrored = Shifts(flip=True)(images, numbers)
    for i in range(50):
        assert torch.equal(mirrored[i], found[i].flip(2) if numbers[i, 4] < 0.5 else found[i])


def test_erasing_takes_one_rectangle_of_some_images():
    images, numbers = torch.ones(400, 3, 24, 24), draws(0, 0, torch.arange(400))[:, 5:]
    assert torch.equal(erased(images, numbers, 0.0), images)
    found = erased(images, numbers, 0.25)[:, 0] == 0
    share = found.flatten(1).float().mean(1)
    assert 0.18 < (share > 0).float().mean() < 0.32
    assert 0.01 < share[share > 0].min() <= share.max() < 0.4
    for one in found[share > 0]:
        rows, columns = one.any(1), one.any(0)
        assert torch.equal(one, rows[:, None] & columns[None])  # all of a row's part of all of a column's
        assert int(rows.sum()) == int(rows.nonzero().max() - rows.nonzero().min() + 1)


def test_mixup_blends_images_and_labels_alike():
    images, labels = torch.eye(4).reshape(4, 1, 2, 2), torch.arange(4)
    blended, soft = mixed(images, labels, 4, 0.5, seed=1)
    torch.testing.assert_close(blended.flatten(1), soft)  # each image shows its own label's place
    torch.testing.assert_close(soft.sum(1), torch.ones(4))
    assert torch.equal(mixed(images, labels, 4, 0.5, seed=1)[0], blended)
    assert not torch.equal(mixed(images, labels, 4, 0.5, seed=2)[0], blended)


def test_all_augmentations_together(digits):
    config = replace(CONFIG, rand_augment=5, erase=0.25, mixup=0.2)
    feed = Feed(digits, config, CPU)
    assert "augmented one by one" in feed.remedy  # they are in memory: workers would not help
    micros = next(feed.epoch(0))
    images, labels = micros[0]
    assert images.shape == (32, 3, 16, 16)
    assert labels.shape == (32, 10)
    plain = next(Feed(digits, replace(config, augment=False), CPU).epoch(0))[0]
    assert (labels.gather(1, plain[1][:, None]) > 0).all()  # each keeps a share of its own label
    assert plain[1].shape == (32,)
    again = next(Feed(digits, config, CPU).epoch(0))[0]
    assert torch.equal(again[0], images)


def test_an_epochs_steps_do_not_depend_on_where_it_begins_or_how_it_is_cut(digits):
    data = replace(digits, train=replace(digits.train, augment=Shifts()))
    whole = images_of(Feed(data, CONFIG, CPU))
    assert len(whole) == 192
    assert torch.equal(images_of(Feed(data, CONFIG, CPU), start=4), whole[128:])
    assert torch.equal(images_of(Feed(data, replace(CONFIG, accumulate=4), CPU)), whole)
    assert not torch.equal(images_of(Feed(data, CONFIG, CPU), epoch=1), whole)
    with pytest.raises(BadConfig, match="batch_size 32: expected two images or more for each of 3 micro-batches"):
        Feed(data, replace(CONFIG, accumulate=3), CPU)


MANY = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a machine of one core


@MANY
def test_images_from_disk_are_augmented_alike_by_any_number_of_workers(folder):
    data = dslib.load_data(str(folder), 24)
    config = Train(epochs=1, batch_size=4, rand_augment=5, erase=0.5)
    state = random.getstate(), torch.get_rng_state()
    feed = Feed(data, replace(config, workers=0), CPU)
    assert "raise --workers" in feed.remedy
    alone = images_of(feed)
    assert state[0] == random.getstate()
    assert torch.equal(state[1], torch.get_rng_state())
    assert alone.shape == (12, 3, 24, 24)
    assert torch.equal(images_of(Feed(data, replace(config, workers=2), CPU)), alone)
    assert torch.equal(
        images_of(Feed(data, replace(config, workers=2, batch_size=6), CPU)).sum((1, 2, 3)).sort()[0],
        alone.sum((1, 2, 3)).sort()[0],
    )
    plain = images_of(Feed(data, replace(config, augment=False), CPU))
    held = torch.cat([images for images, _ in data.train.batches(4)])
    torch.testing.assert_close(plain.sum((1, 2, 3)).sort()[0], held.sum((1, 2, 3)).sort()[0])


@MANY
def test_evaluations_decode_with_as_many_workers_as_the_training(folder, monkeypatch):
    data, seen = dslib.load_data(str(folder), 24), []

    class Noting(torch.utils.data.DataLoader):
        def __init__(self, *args, num_workers, **kwargs):
            seen.append(num_workers)
            super().__init__(*args, num_workers=num_workers, **kwargs)

    monkeypatch.setattr("torch.utils.data.DataLoader", Noting)
    model, few = Tiny(2), {"epochs": 1, "batch_size": 4, "workers": 0}
    dslib.finetune(model, data, None, dslib.Finetune(**few))
    boost(model, data, Boost(**few))
    pretrain(model, data, dslib.Run("x", "x", 1, pretrain=Train(**few)), head_only=False)
    assert set(seen) == {0}
    dslib.evaluate(model, data.val)
    assert data.val.workers > 0
    assert seen[-1] == (0 if "openvino" in sys.modules else data.val.workers)  # another test may have loaded it


@MANY
def test_a_file_that_breaks_later_is_one_line_from_a_worker(folder):
    data = dslib.load_data(str(folder), 24)
    (folder / "train" / "a" / "3.png").write_bytes(b"no image")
    with pytest.raises(BadData, match=r"3\.png cannot be read") as raised:
        images_of(Feed(data, Train(epochs=1, batch_size=4, workers=2), CPU))
    assert len(str(raised.value).splitlines()) == 1
    (folder / "val" / "a" / "1.png").write_bytes(b"no image")
    with pytest.raises(BadData, match=r"1\.png cannot be read") as raised:
        dslib.evaluate(Tiny(2), replace(data.val, workers=2))
    assert len(str(raised.value).splitlines()) == 1


def test_imagenet_is_known_by_its_classes_whatever_its_folder_is_called(tmp_path, monkeypatch):
    from PIL import Image

    for part in ("train", "val"):
        for i in range(1000):
            (tmp_path / part / f"n{i:08d}").mkdir(parents=True)
            Image.new("RGB", (20, 16)).save(tmp_path / part / f"n{i:08d}" / "a.png")
    monkeypatch.setattr("dslib.data.datasets.IN_MEMORY_BYTES", 0)
    data = dslib.load_data(str(tmp_path), 14)
    assert data.train.augment.transforms[0].scale == (0.08, 1.0)
    assert data.val.resize.transforms[0].size == [16]


def test_chance_is_the_images_own_and_is_put_back():
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    found = []
    for _ in range(2):
        with chance_of(0, 0, 5):
            found.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert found[0] == found[1]
    assert random.getstate() == before[0]
    assert (np.random.get_state()[1] == before[1]).all()
    assert torch.equal(torch.get_rng_state(), before[2])
    with chance_of(0, 0, 6):
        assert random.random() != found[0][0]
