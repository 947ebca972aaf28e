"""Which convolutional networks of torchvision and timm can be S0: each is cut into S and A, or refused with the reason.

    uv run python benchmarks/separable.py [NAME...] [--again]

Images of 64 x 64 pixels, 10 classes, the defaults of `separate`. Each network has a process of its own with a time
limit. S + A is built and run, and its cost is counted anew: it must be what `separate` says. Where a refusal
advises a share for A, that share is tried. A run that was
interrupted goes on where it stopped, in the record of the same day; --again tries named networks anew.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import torch
from record import FOLDER, hardware

from rkd_deploy.bench.machine import provenance
from rkd_deploy.errors import BudgetError, RkdError
from rkd_deploy.models import zoo
from rkd_deploy.models.cost import count
from rkd_deploy.models.residual import ResidualStudent
from rkd_deploy.models.separation.separate import separate
from rkd_deploy.models.staged import FeatureNetwork
from rkd_deploy.storage import write_json

SIDE, CLASSES = 64, 10
SECONDS = 240
"""Most seconds of a processor for one network; by the clock it may take five times as long, on a busy machine."""
TORCHVISION = """
alexnet convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s googlenet mnasnet1_0 mobilenet_v2 mobilenet_v3_large
mobilenet_v3_small regnet_x_400mf regnet_y_400mf resnet18 resnet50 resnext50_32x4d shufflenet_v2_x1_0 squeezenet1_1
vgg16_bn wide_resnet50_2
"""
TIMM = """
convnext_atto convnextv2_atto cspdarknet53 darknet53 dla34 dpn48b efficientnet_lite0 efficientvit_b0 ese_vovnet19b_dw
fasternet_t0 gernet_s ghostnet_100 ghostnetv2_100 hardcorenas_a hrnet_w18_small inception_next_atto lcnet_050
mobilenetv4_conv_medium mobilenetv4_conv_small mobileone_s0 nf_regnet_b0 repvgg_a0 res2net50_26w_4s resnest14d resnet10t
resnetv2_50 rexnet_100 selecsls42b seresnet50 skresnet18 starnet_s1 tinynet_a xception41
"""
NETWORKS = (*(f"tv:{name}" for name in TORCHVISION.split()), *(f"timm:{name}" for name in TIMM.split()))


def main() -> None:
    """Try every network and record."""
    facts = asdict(provenance())
    path = FOLDER / f"separable_{hardware(facts)}_{datetime.now(UTC):%Y%m%d}.json"
    rows: dict[str, dict[str, Any]] = {}
    if path.exists():
        rows = {row["network"]: row for row in json.loads(path.read_text(encoding="utf-8"))["networks"]}
    chosen = [name for name in sys.argv[1:] if not name.startswith("-")] or NETWORKS
    for name in chosen:
        if name in rows and "--again" not in sys.argv:
            continue
        rows[name] = {"network": name, **_tried(name)}
        print(json.dumps(rows[name]), flush=True)
        networks = [rows[known] for known in NETWORKS if known in rows]
        write_json(path, {"theme": "separable", "provenance": facts, "side": SIDE, "networks": networks})


def _tried(name: str) -> dict[str, Any]:
    began = time.perf_counter()
    command = [sys.executable, __file__, "--one", name]
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=5 * SECONDS, preexec_fn=_bounded)
    except subprocess.TimeoutExpired:
        return {"outcome": "timed out", "reason": f"more than {5 * SECONDS} s"}
    if process.returncode == -signal.SIGXCPU:
        return {"outcome": "timed out", "reason": f"more than {SECONDS} s of a processor"}
    if process.returncode:
        return {"outcome": "failed", "reason": process.stderr.strip().splitlines()[-1]}
    result: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return result | {"seconds": round(time.perf_counter() - began, 1)}


def _bounded() -> None:
    os.nice(10)
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 5))


def _separated(name: str) -> dict[str, Any]:
    """Cut one network, run S + A, and count its cost anew."""
    torch.set_num_threads(1)
    s0 = zoo.create(name, CLASSES, input_size=SIDE)
    try:
        separation = separate(s0, num_classes=CLASSES, input_size=SIDE)
    except BudgetError as error:
        return {"outcome": "too small", "reason": str(error), **_advised(s0, str(error))}
    except RkdError as error:
        return {"outcome": "refused", "reason": str(error)}
    model = ResidualStudent(separation.student, separation.assistants, s0.channels, CLASSES).eval()
    with torch.no_grad():
        logits_NK = model(torch.randn(2, 3, SIDE, SIDE))
    assert logits_NK.shape == (2, CLASSES)
    assert logits_NK.isfinite().all()
    counted = count(model, SIDE).macs
    assert counted == separation.cost <= separation.budget, (counted, separation.cost, separation.budget)
    return {
        "outcome": "separates",
        "budget": separation.budget,
        "cost": separation.cost,
        "student": separation.parts["student"],
        "assistant": separation.parts["assistant"],
        "widths": len(separation.s0_widths),
        "fixed": list(separation.student.fixed),
    }


def _advised(s0: FeatureNetwork, message: str) -> dict[str, Any]:
    """The share that a refusal advises, and whether it does."""
    found = re.search(r"set student\.assistant_share = ([\d.]+\d)", message, re.IGNORECASE)
    if found is None:
        return {}
    share = float(found[1])
    separation = separate(s0, num_classes=CLASSES, input_size=SIDE, assistant_share=share)
    return {"advised_share": share, "advised_cost": separation.cost, "budget": separation.budget}


if __name__ == "__main__":
    if "--one" in sys.argv:
        print(json.dumps(_separated(sys.argv[-1])))
    else:
        main()
