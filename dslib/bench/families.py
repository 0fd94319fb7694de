"""What of each CNN family can be merged, and why can the rest not?"""

from __future__ import annotations

import re
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from ..algebra import fold
from ..errors import DslibError
from ..models import load_model
from ..records import Record
from ..sites import Sites, find_sites
from .benchmark import Benchmark, Context, Values, noise
from .settings import BenchSettings, setting

if TYPE_CHECKING:
    import pandas as pd

# one member, as a rule the smallest, of each family of torchvision's classifiers and of timm's CNNs
_NAMES = {
    "torchvision": """
    alexnet convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s googlenet inception_v3 maxvit_t mnasnet1_0
    mobilenet_v2 mobilenet_v3_large regnet_x_400mf regnet_y_400mf resnet18 resnet50 resnext50_32x4d shufflenet_v2_x1_0
    squeezenet1_1 swin_t vgg11_bn vit_b_32 wide_resnet50_2
""",
    "timm": """
    convmixer_768_32 convnext_atto cspdarknet53 cspresnet50 darknet53 densenet121 dla34 dpn68 edgenext_xx_small
    efficientnet_b0 efficientnet_lite0 efficientnetv2_rw_t ese_vovnet19b_dw fastvit_t8 fbnetc_100 gernet_s
    ghostnet_100 hardcorenas_a hgnetv2_b0 hrnet_w18_small inception_v4 inception_next_atto lcnet_050 mixnet_s
    mnasnet_100 mobilenetv2_140 mobilenetv3_large_100 mobilenetv4_conv_small mobileone_s0 nf_resnet50 regnetx_002
    regnety_002 repghostnet_050 repvgg_a0 repvit_m1 res2net50_26w_4s resnest14d resnet50d resnetv2_50 rexnet_100
    selecsls42b skresnet18 spnasnet_100 starnet_s1 tf_efficientnet_lite0 tinynet_e vovnet39a xception41
""",
}
FAMILIES = tuple(f"{library}/{name}" for library, names in _NAMES.items() for name in names.split())


@dataclass(frozen=True)
class Families(BenchSettings):
    """Sites, mergeable ones and reasons, for one member of each torchvision and timm CNN family.

    Args:
        names: a network to look at; default one of each family.
        image_size: side in pixels.
    """

    names: tuple[str, ...] = setting((), option="model")
    image_size: int = 224


def answer(config: Families, _: Context[Families]) -> Values:
    """A row for each network."""
    names = tqdm(config.names or FAMILIES, unit="network")
    return {"rows": [look_at(name, config.image_size) for name in names]}


def look_at(name: str, image_size: int) -> dict[str, Any]:
    """One row: sites, how many can be merged, why not the others, and what folds without a mask."""
    model = load_model(name).model
    model.eval()  # some networks' train() returns nothing
    started = time.perf_counter()
    sites = find_sites(model, image_size)
    seconds = time.perf_counter() - started
    before = sum(isinstance(m, _BatchNorm) for m in model.modules())
    return {
        "model": name,
        "sites": len(sites),
        "mergeable": len(sites.mergeable),
        "foldable": len(sites.foldable),
        "reasons": reasons(sites),
        "batchnorms": before,
        "batchnorms_folded": before - _left(model, image_size),
        "seconds": round(seconds, 2),
    }


def frame(record: Record) -> pd.DataFrame:
    """The record as a table: one row a network, the reasons as text with their counts."""
    import pandas as pd

    rows = []
    for row in record.values["rows"]:
        why = "; ".join(f"{reason} ({count})" for reason, count in row["reasons"].items())
        rows.append({**{k: v for k, v in row.items() if k not in ("reasons", "seconds")}, "reasons": why})
    return pd.DataFrame(rows).set_index("model")


def reasons(sites: Sites) -> dict[str, int]:
    """Why sites cannot be merged -> how many of them; names of site and layer are left out."""
    texts = (site.reason.removeprefix(f"{site.name}: ") for site in sites if site.reason)
    return dict(Counter(re.sub(r"^\S+ \((\w+)\)", r"\1", text) for text in texts).most_common())


def _left(model: nn.Module, image_size: int) -> int:
    """BatchNorms that stand after folding."""
    try:
        folded = fold(model, noise(model, 1, image_size))
    except DslibError:
        return sum(isinstance(m, _BatchNorm) for m in model.modules())
    return sum(isinstance(m, _BatchNorm) for m in folded.modules())


BENCHMARK = Benchmark("Is merging exact?", Families, answer, lambda record: [frame(record).to_string()])
