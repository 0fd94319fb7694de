"""What the lab of "In your browser" loads, made when the book is built: networks as ONNX, and PyTorch's answers.

Run as a program, it fills book/_static/lab/ from data/networks/, unless nothing has changed since.
"""

import hashlib
import json
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LAB = ROOT / "book" / "_static" / "lab"
NETWORKS = ROOT / "data" / "networks"
PARTS = ("dslib/**/*.py", "data/networks/*", "requirements.lock", "book/_ext/lab.py")


def wanted() -> str:
    """The stamp of a current LAB: a hash of all that it is made of."""
    files = sorted(path for part in PARTS for path in ROOT.glob(part))
    found = hashlib.sha256()
    for path in files:
        found.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()


def is_current() -> bool:
    """Whether LAB holds what would be made now."""
    stamp = LAB / "complete"
    return stamp.exists() and stamp.read_text() == wanted()


def export_all(folder: Path) -> None:
    """Write each network as ONNX, and networks.json: titles, classes, and PyTorch's logits of one test image."""
    import torch
    from timm.data import ImageNetInfo

    import dslib
    from dslib.data.splits import IMAGENET_MEAN, IMAGENET_STD
    from dslib.measuring import dense

    original, recipe = dslib.load(NETWORKS / "original")
    side = recipe.image_size
    torch.manual_seed(0)
    counterpart = dense(original, dslib.find_sites(original, side)).model
    networks = {"original": ("MobileNetV2", original), "dense": ("dense counterpart, random weights", counterpart)}
    dropping = set()
    for path in sorted(set(NETWORKS.glob("*.json")) - {NETWORKS / "original.json"}):
        network, made = dslib.load(path)
        kept = f"{sum(made.mask.values())} of {len(made.mask)} sites kept"
        done = [f"{len(names)} {what}" for what, names in (("dropped", made.dropped), ("merged", made.merged)) if names]
        networks[path.stem] = f"{path.stem}: {', '.join(done)}, {kept}", network
        dropping |= {path.stem} if made.dropped else set()
    image = torch.arange(3 * side * side, dtype=torch.float64).mul(0.01).sin().float().reshape(1, 3, side, side)
    about = {}
    for name, (title, network) in networks.items():
        dslib.export(dslib.fold(network, image), folder / f"{name}.onnx", side)
        with torch.no_grad():
            logits = network.eval()(image)[0].tolist()
        about[name] = {"title": title, "trained": name != "dense", "dropped": name in dropping, "logits": logits}
    words = ImageNetInfo("imagenet-1k")
    classes = [words.label_name_to_description(name).partition(",")[0] for name in recipe.classes]
    page = {"image_size": side, "classes": classes, "mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    (folder / "networks.json").write_text(json.dumps({**page, "networks": about}))


def main() -> int:
    """Bring LAB up to date; where that fails, say so in a line: the page tells its reader."""
    if is_current():
        return 0
    aside = LAB.with_name("lab.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        export_all(aside)
    except Exception as error:  # packages are missing, the disk is full: the rest of the book is still wanted
        print(f"book: the browser lab's networks could not be exported ({error}): its page will say so")
        shutil.rmtree(LAB, ignore_errors=True)  # not those of other networks
        return 1
    (aside / "complete").write_text(wanted())
    shutil.rmtree(LAB, ignore_errors=True)
    aside.rename(LAB)
    return 0


if __name__ == "__main__":
    sys.exit(main())
