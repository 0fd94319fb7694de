"""Several processes of one job: the same losses as one, exact evaluation, a lost process, the ImageNet script."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MODEL, ROOT

import dslib
from dslib.models.weights import load_tensors, save_tensors
from dslib.training import processes
from dslib.training.evaluating import recalibrate_batchnorm

TORCHRUN = Path(sys.executable).with_name("torchrun")
WORK = """
import json, sys
from dataclasses import replace
from pathlib import Path
import torch, torch.nn.functional as F
sys.path.insert(0, {tests!r})
from conftest import Tiny, randomise_batchnorm
import dslib
from dslib.training import processes
from dslib.data.augmenting import Shifts
from dslib.training.evaluating import predict
from dslib.training.settings import Train
from dslib.training.loop import train

out, settings, stop = Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
processes.start(torch.device("cpu"))
torch.manual_seed(0)
model, data, losses = randomise_batchnorm(Tiny()), dslib.load_data("digits", 16), []
data = replace(data, train=replace(data.train.first(192), augment=Shifts()), val=data.val.first(90))
steps = []

def loss(model, images, labels):
    value = F.cross_entropy(model(images), labels)
    losses.append(value.item())
    return value

def before(progress):
    steps.append(progress)
    if len(steps) == stop:
        import os, signal
        os.kill(os.getpid(), signal.SIGTERM if processes.rank() == 0 else 0)

code = 0
try:
    train(model, data, loss, Train(**settings), before_step=before, checkpoint=out / "state.safetensors")
except KeyboardInterrupt:
    code = 7
logits = predict(model, data.val, 20)
statistics = processes.all_gather(model.blocks[0].bn1.running_mean[None].clone())
everybody = processes.all_gather(torch.tensor(losses))
if processes.rank() == 0:
    found = {{"losses": torch.stack(everybody), "logits": logits, "code": code, "steps": len(steps)}}
    torch.save(found | {{"statistics": statistics}}, out / "found.pt")
    torch.save(model.state_dict(), out / "model.pt")
processes.finish()
"""


def job(folder, processes_, settings, stop=0):
    """Train in so many processes; each one's losses, (P, steps), the logits, how it ended."""
    folder.mkdir(exist_ok=True)
    script = folder / "work.py"
    script.write_text(WORK.format(tests=str(ROOT / "tests")))
    words = (
        [TORCHRUN, "--standalone", "--nproc-per-node", str(processes_), script]
        if processes_ > 1
        else [sys.executable, script]
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*words, folder, json.dumps(settings), str(stop)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "found.pt", weights_only=True), torch.load(folder / "model.pt", weights_only=True)


BASE = {"epochs": 4, "lr": 0.2, "batch_size": 32}


def test_two_processes_train_as_one_that_accumulates(tmp_path):
    two, weights = job(tmp_path / "two", 2, BASE)
    one, alone = job(tmp_path / "one", 1, BASE | {"accumulate": 2})
    assert torch.equal(two["statistics"][0], two["statistics"][1])  # all end with the first one's
    joint = two["losses"].mean(0)
    apart = one["losses"].reshape(-1, 2).mean(1)
    assert joint.shape == apart.shape == (24,)  # four epochs of six steps
    torch.testing.assert_close(joint[:20], apart[:20], rtol=0, atol=1e-5)
    for name in weights:
        if "running" not in name and "num_batches" not in name:
            torch.testing.assert_close(weights[name], alone[name], rtol=0, atol=1e-4)


def test_with_frozen_statistics_they_train_as_one_batch_and_evaluate_alike(tmp_path):
    settings = BASE | {"freeze_batchnorm": True, "epochs": 2, "lr": 0.05}
    two, weights = job(tmp_path / "two", 2, settings)
    one, alone = job(tmp_path / "one", 1, settings)
    torch.testing.assert_close(two["losses"].mean(0), one["losses"][0], rtol=0, atol=1e-5)
    for name in weights:
        torch.testing.assert_close(weights[name], alone[name], rtol=0, atol=1e-5)
    same, _ = job(tmp_path / "same", 2, settings | {"epochs": 0})
    again, _ = job(tmp_path / "again", 1, settings | {"epochs": 0})
    assert torch.equal(same["logits"], again["logits"])
    assert same["logits"].shape == (90, 10)


SEARCH = """
import sys
sys.path.insert(0, {tests!r})
from dataclasses import replace
from pathlib import Path
import torch
from torch import nn
from conftest import Block, Tiny
import dslib
from dslib.training import processes

class Sloped(Block):
    def __init__(self, *given):
        super().__init__(*given)
        self.one, self.two = nn.PReLU(), nn.PReLU()

    def forward(self, x):
        return self.bn3(self.project(self.two(self.bn2(self.depthwise(self.one(self.bn1(self.expand(x))))))))

processes.start(torch.device("cpu"))
model, data = Tiny(), dslib.load_data("digits", 16)
model.blocks = nn.Sequential(Sloped(), Sloped(4, 8, 6), Sloped(6, 8, 6))
data = replace(data, train=data.train.first(192), val=data.val.first(32))
config = dslib.Search(k=1, epochs=1, batch_size=32, anneal=0.0)
found = dslib.search(model, data, dslib.find_sites(model, 16), config=config)
if processes.rank() == 0:
    found.save(Path(sys.argv[1]))
processes.finish()
"""


def test_two_processes_search_a_network_whose_activations_have_weights(tmp_path):
    """A closed gate leaves a slope without gradient, which the processes must not wait for."""
    script, out = tmp_path / "search.py", tmp_path / "found.json"
    script.write_text(SEARCH.format(tests=str(ROOT / "tests")))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [TORCHRUN, "--standalone", "--nproc-per-node", "2", script, out],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert dslib.Importances.load(out).mask(1).k == 1


@pytest.mark.parametrize("then", [2, 1])
def test_processes_stopped_in_the_middle_of_an_epoch_go_on_as_two_or_one(tmp_path, then):
    settings = BASE | {"freeze_batchnorm": True, "lr": 0.05}
    whole, weights = job(tmp_path / "whole", 2, settings)
    stopped, _ = job(tmp_path / "run", 2, settings, stop=9)
    assert stopped["code"] == 7  # one process had the signal, both stopped after the same step
    assert stopped["losses"].shape == (2, 9)
    place = load_tensors(tmp_path / "run" / "state.safetensors")[1]["place"]
    assert (place["epoch"], place["step"]) == (1, 3)
    rest, again = job(tmp_path / "run", then, settings)
    assert rest["steps"] == 15
    torch.testing.assert_close(rest["losses"].mean(0), whole["losses"].mean(0)[9:], rtol=0, atol=1e-5)
    for name in weights:
        torch.testing.assert_close(again[name], weights[name], rtol=0, atol=1e-5)


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
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests")}
    process = subprocess.Popen(
        [str(word) for word in words],
        cwd=tmp_path,
        env=environment,
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
    assert processes.all_gather(tensor)[0] is tensor
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
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
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
    trial = environment | {"ESTIMATE": "--search-batch-size 8 --finetune-batch-size 8 --device cpu"}
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
