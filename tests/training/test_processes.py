"""Several processes of one job: the same losses as one, exact evaluation, a lost process, the ImageNet script."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MODEL, ROOT, Block, Tiny, cross_entropy, randomise_batchnorm

import dslib
from dslib.data.augmenting import Shifts
from dslib.errors import BadConfig
from dslib.models.weights import load_tensors, save_tensors
from dslib.training import processes
from dslib.training.evaluating import predict, recalibrate_batchnorm
from dslib.training.loop import train
from dslib.training.settings import Train
from dslib.training.watching import Enough

TORCHRUN = Path(sys.executable).with_name("torchrun")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
SETTINGS = {"epochs": 4, "lr": 0.2, "batch_size": 32}
FROZEN = SETTINGS | {"freeze_batchnorm": True, "lr": 0.05}


def start() -> tuple[torch.nn.Module, dslib.data.datasets.Data]:
    """What every training here begins with."""
    torch.manual_seed(0)
    data = dslib.load_data("digits", 8)
    data = replace(data, train=replace(data.train.first(192), augment=Shifts()), val=data.val.first(90))
    return randomise_batchnorm(Tiny()), data


def training(settings: dict, checkpoint: Path | None = None, stop: int = 0) -> dict:
    """Train in this process and those that are with it; what came out. Rank 0 is told to end in step `stop`."""
    model, data = start()
    losses, steps = [], []

    def loss(model, images, labels):
        value = cross_entropy(model, images, labels)
        losses.append(value.item())
        return value

    def before(progress):
        steps.append(progress)
        if len(steps) == stop and processes.rank() == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    untrained, stopped = predict(model, data.val, 20), False
    try:
        train(model, data, loss, Train(**settings), before_step=before, checkpoint=checkpoint)
    except KeyboardInterrupt:
        stopped = True
    found = {"losses": torch.tensor(losses), "untrained": untrained, "stopped": stopped, "steps": len(steps)}
    return found | {"weights": model.state_dict()}


class Sloped(Block):
    """A block whose activations have weights."""

    def __init__(self, *given):
        super().__init__(*given)
        self.one, self.two = torch.nn.PReLU(), torch.nn.PReLU()

    def forward(self, x):
        return self.bn3(self.project(self.two(self.bn2(self.depthwise(self.one(self.bn1(self.expand(x))))))))


class Odd(Exception):
    """An error that pickle can write, but not read."""

    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


def failing(error: Exception) -> str:
    """What this process gets of an error of the first one."""

    def make():
        raise error

    try:
        processes.on_rank_zero(make)
    except Exception as found:
        return f"{type(found).__name__}: {found}"
    return ""


def work(folder: Path) -> None:
    """What the two processes of these tests do."""
    processes.start(torch.device("cpu"))
    found = {"two": training(SETTINGS), "whole": training(FROZEN, folder / "whole.safetensors")}
    found["stopped"] = training(FROZEN, folder / "state.safetensors", stop=9)
    if processes.rank() == 0:
        shutil.copy(folder / "state.safetensors", folder / "alone.safetensors")
    processes.wait()
    found["rest"] = training(FROZEN, folder / "state.safetensors")

    model, data = start()
    model.blocks = torch.nn.Sequential(Sloped(), Sloped(4, 8, 6), Sloped(6, 8, 6))
    config = dslib.Search(k=1, epochs=1, batch_size=32, anneal=0.0)
    found["kept"] = dslib.search(model, data, dslib.find_sites(model, 8), config=config).mask(1).k
    errors = [Enough([0.0, 1.0], 3), Odd("one", "two"), BadConfig("lr: expected"), OSError(lambda: "a function")]
    found["errors"] = [failing(error) for error in errors]
    try:
        processes.on_rank_zero(lambda: lambda: "a function")
    except Exception as error:
        found["errors"].append("pickle" in str(error))
    torch.save(found, folder / f"found{processes.rank()}.pt")
    processes.finish()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """What each of two processes found, in order of rank, and their folder."""
    folder = tmp_path_factory.mktemp("pair")
    done = subprocess.run(
        [TORCHRUN, "--standalone", "--nproc-per-node", "2", __file__, folder],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"found{rank}.pt", weights_only=True) for rank in range(2)], folder


def joint(pair, name: str) -> torch.Tensor:
    """Both processes' mean loss of each step."""
    return (pair[0][0][name]["losses"] + pair[0][1][name]["losses"]) / 2


def test_two_processes_train_as_one_that_accumulates(pair):
    alone = training(SETTINGS | {"accumulate": 2})
    weights, others = (found["two"]["weights"] for found in pair[0])
    apart = alone["losses"].reshape(-1, 2).mean(1)
    assert joint(pair, "two").shape == apart.shape == (24,)  # four epochs of six steps
    torch.testing.assert_close(joint(pair, "two")[:20], apart[:20], rtol=0, atol=1e-5)
    for name in weights:
        assert torch.equal(weights[name], others[name])  # all end with the first one's statistics too
        if "running" not in name and "num_batches" not in name:
            torch.testing.assert_close(weights[name], alone["weights"][name], rtol=0, atol=1e-4)


def test_with_frozen_statistics_they_train_as_one_batch_and_evaluate_alike(pair):
    alone, (two, other) = training(FROZEN), (found["whole"] for found in pair[0])
    torch.testing.assert_close(joint(pair, "whole"), alone["losses"], rtol=0, atol=1e-5)
    for name in two["weights"]:
        torch.testing.assert_close(two["weights"][name], alone["weights"][name], rtol=0, atol=1e-5)
    assert torch.equal(two["untrained"], alone["untrained"])
    assert torch.equal(two["untrained"], other["untrained"])
    assert alone["untrained"].shape == (90, 10)


def test_two_processes_search_a_network_whose_activations_have_weights(pair):
    """A closed gate leaves a slope without gradient, which the processes must not wait for."""
    assert [found["kept"] for found in pair[0]] == [1, 1]


def test_an_error_of_the_first_process_is_everybodys_whatever_pickle_says(pair):
    """An error or a result that cannot travel left the others waiting."""
    for found in pair[0]:
        enough, odd, bad, *rest = found["errors"]
        assert enough == "Enough: 1 of 3 steps"
        assert odd == "RuntimeError: Odd: one and two"
        assert bad == "BadConfig: lr: expected"
        assert rest[0].startswith("RuntimeError: OSError: <function")
        assert rest[1]


@pytest.mark.parametrize("then", [2, 1])
def test_processes_stopped_in_the_middle_of_an_epoch_go_on_as_two_or_one(pair, then):
    (first, second), folder = pair
    assert first["stopped"]["stopped"]  # one process had the signal, both stopped after the same step
    assert second["stopped"]["stopped"]
    assert joint(pair, "stopped").shape == (9,)
    state = folder / "alone.safetensors"
    if then == 1:
        place = load_tensors(state)[1]["place"]
        assert (place["epoch"], place["step"]) == (1, 3)
        rest = training(FROZEN, state)
    else:
        rest = first["rest"] | {"losses": joint(pair, "rest")}
    assert rest["steps"] == 15
    torch.testing.assert_close(rest["losses"], joint(pair, "whole")[9:], rtol=0, atol=1e-5)
    for name, tensor in first["whole"]["weights"].items():
        torch.testing.assert_close(rest["weights"][name], tensor, rtol=0, atol=1e-5)


def test_a_killed_process_ends_the_job_with_a_message_and_not_a_hang(tmp_path, npz):
    words = [
        TORCHRUN,
        "--standalone",
        "--nproc-per-node",
        "2",
        "--no-python",
        Path(sys.executable).with_name("dslib"),
        "run",
        *MODEL,
        "--data",
        npz,
        "--k",
        "1",
        "--out",
        "r",
        "--device",
        "cpu",
        "--pretrain-epochs",
        "4000",
        "--pretrain-batch-size",
        "16",
    ]
    process = subprocess.Popen(
        [str(word) for word in words],
        cwd=tmp_path,
        env=ENVIRONMENT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        for line in process.stdout:
            if line.startswith("train the original 3/"):
                break
        killed = _child(process.pid)
        os.kill(killed, signal.SIGKILL)
        began = time.monotonic()
        rest, _ = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode not in (0, None)
    assert time.monotonic() - began < 100
    own = [line for line in rest.splitlines() if line.startswith("dslib: ")]
    assert len(own) == 1, rest
    assert re.search("another process of this job ended|interrupted: what was finished is kept", own[0])
    assert "the same command goes on from" in own[0]


def _child(parent: int) -> int:
    """The process of rank 1 that torchrun started."""
    import psutil

    for child in psutil.Process(parent).children():
        if child.environ().get("RANK") == "1":
            return child.pid
    raise AssertionError("torchrun started no process of rank 1")


def test_one_process_alone_needs_no_group():
    assert (processes.count(), processes.rank(), processes.started()) == (1, 0, 1)
    assert processes.on_rank_zero(lambda: 3) == 3
    tensor = torch.arange(3)
    assert processes.all_reduce_sum(tensor) is tensor
    assert processes.start(torch.device("cpu")) == torch.device("cpu")
    assert not processes.lost_another(RuntimeError("gloo: Connection closed by peer"))


def _photos(folder: Path) -> Path:
    """An ImageFolder of two easy classes, as ImageNet lies on disk."""
    from PIL import Image

    noise = np.random.default_rng(0)
    for part, count in (("train", 16), ("val", 6)):
        for label, colour in (("n01440764", 40), ("n02102040", 200)):
            (folder / part / label).mkdir(parents=True)
            for i in range(count):
                image = noise.integers(colour - 40, colour + 40, (48, 40, 3), dtype=np.uint8)
                Image.fromarray(image).save(folder / part / label / f"{i}.jpg")
    return folder


def test_the_imagenet_script_runs_on_a_tiny_folder_by_two_processes_and_goes_on(tmp_path):
    data = _photos(tmp_path / "photos")
    loaded = dslib.load_data(str(data), 32)
    model = dslib.load_model("mobilenet_v2", loaded.classes, options={"width_mult": 0.25}).model
    images = [images for images, _ in loaded.train.batches(16)]
    recalibrate_batchnorm(model, images)
    with torch.no_grad():  # a head that fits the images exactly: they are fewer than its inputs
        features = torch.cat([model.features(part).mean((2, 3)) for part in images])
        wanted = 10.0 * torch.nn.functional.one_hot(dslib.training.evaluating.labels_of(loaded.train), 2).float()
        model.classifier[1].weight.copy_((torch.linalg.pinv(features) @ wanted).T)
        model.classifier[1].bias.zero_()
    weights = save_tensors(tmp_path / "w.safetensors", model.state_dict())
    environment = ENVIRONMENT | {
        "DATA": str(data),
        "OUT": str(tmp_path / "out"),
        "SIZE": "32",
        "MODEL": "mobilenet_v2",
        "OPTION": "width_mult=0.25",
        "WEIGHTS": str(weights),
        "PATH": f"{TORCHRUN.parent}:{os.environ['PATH']}",
        "LAUNCH": f"{TORCHRUN} --standalone --nproc-per-node 2 --no-python",
        "ALL": "--epochs 1 --batch-size 8 --workers 1 --device cpu",
    }
    script = ["bash", str(ROOT / "docs" / "imagenet.sh")]
    trial = environment | {"LAUNCH": "", "ESTIMATE": "--search-batch-size 8 --finetune-batch-size 8 --device cpu"}
    done = subprocess.run(script, env=trial, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    table = {line.split()[0]: line.split() for line in done.stdout.splitlines()}
    assert table["finetune"][1:8] == table["search"][1:8] == ["8", "x", "3", "x", "32", "x", "32"]
    assert table["finetune"][8] == "720"  # 180 epochs of four steps
    assert not (tmp_path / "out").exists()
    for round_ in range(2):
        done = subprocess.run(script, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
        assert re.search(r"accuracy \d+\.\d+%, cross-entropy .* on 12 images of 32 px", done.stdout)
        if round_ == 0:
            made = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert {"cost.json", "search.json", "finetuned.json", "merged.json", "search.csv", "finetune.csv"} <= made.keys()
    assert made["merged.json"] == (tmp_path / "out" / "merged.json").stat().st_mtime_ns  # nothing was done again
    assert not list((tmp_path / "out").glob("*partial*"))


@pytest.mark.parametrize("script", ["imagenet.sh", "imagenet.slurm"])
def test_scripts_are_valid_shell(script):
    subprocess.run(["bash", "-n", str(ROOT / "docs" / script)], check=True)


if __name__ == "__main__":
    work(Path(sys.argv[1]))
