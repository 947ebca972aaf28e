"""Makes the tables of the READMEs from the committed records and from recipes.

    uv run python benchmarks/tables.py           # write them
    uv run python benchmarks/tables.py --check   # exit 1 when a page and the records differ

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; NAME is `claims`, `headlines`, `quickstart`, `gpu`,
`recipes`, `runtimes`, `preprocessing`, `serving`, or the file of a record.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ladder_shown
import photos_shown

from rkd_deploy.compare.report import comparison_markdown
from rkd_deploy.compare.rows import Comparison, NetworkRow
from rkd_deploy.recipe import read_recipe
from rkd_deploy.train.networks import PARTS

HERE = Path(__file__).parent
RECIPES = HERE.parent / "train"
PAGES = (
    HERE.parent / "README.md",
    HERE / "README.md",
    RECIPES / "README.md",
    HERE.parent / "docs" / "reference" / "runtimes.md",
    HERE.parent / "docs" / "reference" / "networks.md",
    HERE.parent / "docs" / "results" / "ladder.md",
    HERE.parent / "docs" / "results" / "measurements.md",
    HERE.parent / "docs" / "results" / "photos.md",
    HERE.parent / "docs" / "guides" / "serving.md",
)
_BLOCK = re.compile(r"(<!-- table: (\S+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def claims() -> str:
    """Every claim that has a limit, of the newest record of each theme and hardware."""
    rows = ["| what | measured | limit | where, when |", "| --- | ---: | ---: | --- |"]
    for path, record, limited in _limited():
        where = f"{record['provenance']['cpu']}, {path.stem.rsplit('_', 1)[1]}"
        rows += [
            f"| {claim['what']} | {_figure(claim, 'value')} | {_figure(claim, 'limit')} | {where} |"
            for claim in limited
        ]
    return "\n".join(rows) + "\n"


def headlines() -> str:
    """Records with how many of their claims hold, and the claim nearest to its limit, or farthest beyond it."""
    rows = [
        "| benchmark | within limits | the tightest of them | measured | limit |",
        "| --- | ---: | --- | ---: | ---: |",
    ]
    for _, record, limited in _limited():
        tightest = max(limited, key=lambda claim: claim["value"] / claim["limit"] if claim["limit"] else claim["value"])
        holding = sum(claim["value"] <= claim["limit"] for claim in limited)
        cells = (
            f"{holding} of {len(limited)}",
            tightest["what"],
            _figure(tightest, "value"),
            _figure(tightest, "limit"),
        )
        rows.append(f"| [{record['theme']}](../../benchmarks/{record['theme']}.py) | " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


def _limited() -> Iterator[tuple[Path, dict[str, Any], list[dict[str, Any]]]]:
    """The newest record of each theme and hardware, with its claims that have a limit, where it has any."""
    newest = {path.stem.rsplit("_", 1)[0]: path for path in sorted(HERE.glob("*_[0-9]*.json"))}
    for path in newest.values():
        record = json.loads(path.read_text(encoding="utf-8"))
        limited = [claim for claim in record.get("claims", []) if claim["limit"] is not None]
        if limited:
            yield path, record, limited


def _figure(claim: dict[str, Any], key: str) -> str:
    unit = "" if claim["unit"] == "ratio" else f" {claim['unit']}"
    return f"{claim[key]:{'.3g' if key == 'value' else 'g'}}{unit}"


def preprocessing() -> str:
    """How far other decoders and resizes are from Pillow's bytes."""
    record = json.loads(max(HERE.glob("preprocessing_*.json")).read_text(encoding="utf-8"))
    rows = [
        f"| step | by | bytes that differ from Pillow {record['pillow']}'s | mean difference | largest |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    rows += [
        f"| {row['step']} | {row['by']} | {row['differing']:.2%} | {row['mean']:.3g} | {row['max']} |"
        for row in record["rows"]
    ]
    return "\n".join(rows) + "\n"


def runtimes() -> str:
    """What each runtime made of each bundle, by the newest record."""
    record = json.loads(max(HERE.glob("runtimes_*.json")).read_text(encoding="utf-8"))
    rows = ["| runtime | version | bundle | largest difference of a logit |", "| --- | --- | --- | ---: |"]
    for row in record["runtimes"]:
        outcome = f"{row['max_abs_diff']:.1e}" if "error" not in row else f"does not run: {row['error']}"
        rows.append(f"| {row['runtime']} | {row.get('version', '')} | {row['bundle']} | {outcome} |")
    return "\n".join(rows) + "\n"


def separable() -> str:
    """Which networks of torchvision and timm can be S0, by the newest record."""
    record = json.loads(max(HERE.glob("separable_*.json")).read_text(encoding="utf-8"))
    rows = ["| network | S0, MMAC | S, MMAC | A, MMAC | what |", "| --- | ---: | ---: | ---: | --- |"]
    networks = sorted(record["networks"], key=lambda row: (row["outcome"] != "separates", row["network"]))
    for row in networks:
        figures, what = ["", "", ""], row.get("reason", "")
        if row["outcome"] == "separates":
            figures = [f"{row[key] / 1e6:.1f}" for key in ("budget", "student", "assistant")]
            kept = len(row["fixed"])
            what = f"separates; {kept} groups of channels keep their sizes" if kept else "separates"
        elif "advised_share" in row:
            figures[0] = f"{row['budget'] / 1e6:.1f}"
            what = (
                f"with assistant_share = {row['advised_share']:g}, as the refusal advises; not with the default of 0.2"
            )
        elif row["outcome"] == "refused":
            what = "refused: " + what.removeprefix("S0 cannot be narrowed: ").partition(" Give another S0")[0]
        rows.append(f"| {row['network']} | {' | '.join(figures)} | {what.replace('|', '/')} |")
    cut = sum(row["outcome"] == "separates" or "advised_share" in row for row in networks)
    return (
        "\n".join(rows) + f"\n\n{cut} of {len(networks)} separate, on images of {record['side']} x {record['side']}.\n"
    )


def quickstart() -> str:
    """What the README's first command ended with, by its newest record."""
    record = json.loads(max(HERE.glob("quickstart_*.json")).read_text(encoding="utf-8"))
    rows = ["| | top-1, % | MMAC | p50, ms | file, kB |", "| --- | ---: | ---: | ---: | ---: |"]
    for row in record["results"]:
        cells = (
            f"{row['accuracy']:.2f}",
            f"{row['macs'] / 1e6:.2f}",
            f"{row['p50_ms']:.3f}",
            f"{row['file_bytes'] / 1e3:.0f}",
        )
        rows.append(f"| {PARTS[row['part']]} | " + " | ".join(cells) + " |")
    facts = record["provenance"]
    where = f"{record['seconds']:.0f} s on {facts['cpu']}, {facts['cores']} cores."
    return "\n".join(rows) + f"\n\n{record['verdict']} In {where}\n"


LAYOUTS = ("side_by_side, wide", "trunk, wide", "trunk, tail", "branches, wide", "branches, tail")
"""Layout and level of fusion of S + A, as benchmarks/gpu.py has them."""


def gpu() -> str:
    """What S + A takes of S0's time on a GPU in each layout, device-resident, by the newest record of gpu.py."""
    record = json.loads(max(HERE.glob("gpu_*.json")).read_text(encoding="utf-8"))
    head = ("network", "runtime, precision", "batch", "S0, ms", *LAYOUTS)
    rows = ["| " + " | ".join(head) + " |", "| --- | --- " + "| ---: " * (len(head) - 2) + "|"]
    for part, content in record["parts"].items():
        for row in content["rows"] if part.startswith("latency") else ():
            if "device_ms" in row and not row.get("options"):
                times = row["device_ms"]
                ratios = [f"{times[layout] / times['S0']:.2f}" if layout in times else "" for layout in LAYOUTS]
                what = (part.removeprefix("latency "), f"{row['backend']}, {row['precision']}", str(row["batch"]))
                rows.append("| " + " | ".join((*what, f"{times['S0']:.3f}", *ratios)) + " |")
    facts = next(row for row in record["parts"]["machine"]["rows"] if row["key"] == "facts")
    return "\n".join(rows) + f"\n\n{facts['gpu']}, torch {facts['torch']}; ratios to S0, inputs on the device.\n"


SERVERS = {
    "bare": ("ONNX Runtime and `rkd_deploy.images`, called by as many threads", ""),
    "classify": ("`rkd-deploy serve`, `/v1/classify`", "rkd-deploy serve"),
    "infer": ("`rkd-deploy serve`, `/v2/.../infer`", "rkd-deploy serve"),
    "classify, httptools": ("with httptools installed, `/v1/classify`", "rkd-deploy serve, httptools"),
    "infer, httptools": ("with httptools installed, `/v2/.../infer`", "rkd-deploy serve, httptools"),
    "ray, classify": ("Ray Serve, `/v1/classify`", "ray"),
    "bentoml, classify": ("BentoML, `/v1/classify`", "bentoml"),
    "triton, infer": ("Triton, python backend, `/v2/.../infer`", "triton"),
}
"""Ways to ask of benchmarks/serving.py, in words, and the server whose memory is told."""

GROWTH = "resident memory, largest after the first minute over its end"
"""Claim of benchmarks/serving_soak.py."""


def serving() -> str:
    """What each server made of its cores beside bare ONNX Runtime, and the soak, by the newest records."""
    path = max(path for path in HERE.glob("serving_*.json") if "soak" not in path.name)
    record = json.loads(path.read_text(encoding="utf-8"))
    values = {claim["what"]: claim["value"] for claim in record["claims"]}
    clients = sorted({int(match[1]) for what in values if (match := re.search(r", (\d+) clients:", what))})
    columns = [f"{count} client{'s' if count > 1 else ''}" for count in clients]
    text = []
    for network, title in (("resnet20", "ResNet-20, 32 x 32"), ("resnet18", "ResNet-18, 224 x 224")):
        text += [f"| {title}: images per s, of bare, p99 | {' | '.join(columns)} | CPU of an image, ms | memory, MB |"]
        text += ["| --- |" + " ---: |" * (len(clients) + 2)]
        for way, (words, server) in SERVERS.items():
            what = f"{network}, {way}, "
            if f"{what}{clients[0]} clients: throughput" not in values:
                continue
            cells = [_served(values, f"{what}{count} clients: ") for count in clients]
            cells.append(f"{values[f'{what}{clients[-2]} clients: CPU of a request']:.2f}")
            memory = values.get(f"{network}: {server}: memory of its own")
            text.append(f"| {words} | {' | '.join(cells)} | {'' if memory is None else f'{memory:.0f}'} |")
        text.append("")
    text.append(f"{record['provenance']['cpu']}, one core for the server and one for the clients.")
    return "\n".join(text) + "\n" + "".join(map(_soak, sorted(HERE.glob("serving_soak_*.json"))[-1:]))


def _served(values: dict[str, float], what: str) -> str:
    """Images per second, their share of what bare ONNX Runtime did, and the 99th percentile in ms."""
    over, p99 = values.get(f"{what}bare throughput over it", 1.0), values[f"{what}p99 of a request"]
    return f"{values[f'{what}throughput']:.0f}, {1 / over:.2f}, {p99:{'.3g' if p99 < 100 else '.0f'}} ms"


def _soak(path: Path) -> str:
    values = {claim["what"]: claim["value"] for claim in json.loads(path.read_text(encoding="utf-8"))["claims"]}
    return (
        f"\nTen minutes at 80 % of capacity: {values['requests answered']:,} requests, {values['wrong answers']} "
        f"answers wrong or lost, p99 {values['p99 of a request']:.0f} ms; resident memory "
        f"{values['resident memory at the end']:.0f} MB, at most {values[GROWTH]:.3f} times that of the first minute's "
        "end.\n"
    )


def recorded() -> str:
    """Milliseconds of a training step on a GPU, eager and recorded, by the newest record of recorded_step.py."""
    record = json.loads(max(HERE.glob("recorded_step_*.json")).read_text(encoding="utf-8"))
    cases = [case for case in record["cases"] if case["case"] == "student step"]
    batches = [case["batch"] for case in cases]
    rows = ["| student step | " + " | ".join(f"batch {batch}, ms" for batch in batches) + " |"]
    rows.append("| --- " + "| ---: " * len(batches) + "|")
    for line in [key for key, value in cases[0].items() if isinstance(value, dict)]:
        times = [
            next(case[line][key] for key in ("floor_ms", "step_ms", "replay_ms") if key in case[line]) for case in cases
        ]
        rows.append(f"| {line} | " + " | ".join(f"{ms:.2f}" for ms in times) + " |")
    whole = ", ".join(f"{case['recorded']['whole_ms']:.2f}" for case in cases)
    return (
        "\n".join(rows)
        + f"\n\nThe host included, a recorded step takes {whole} ms. {record['gpu']}, torch {record['torch']}.\n"
    )


def of_record(path: Path) -> str:
    """The table of one record: a comparison, or a rung of the ladder."""
    record = json.loads(path.read_text(encoding="utf-8"))
    if record.get("theme") == "ladder_joint":
        return ladder_shown.table(record)
    return photos_shown.tables(record) if record.get("theme") == "photos" else comparison(record)


def comparison(record: dict[str, Any]) -> str:
    """What `rkd-deploy compare` wrote, as it writes it."""
    rows = tuple(NetworkRow(**{**row, "runs": tuple(row["runs"])}) for row in record["rows"])
    held = Comparison(
        data=record["data"],
        test_images=record["test_images"],
        rows=rows,
        networks=(),
        missing=tuple(record["missing"]),
    )
    facts, settings = record["provenance"], record["settings"]
    where = f"Latency: batch {settings['batch']}, {settings['backend']}, {facts['cpu']}, {facts['cores']} cores."
    return comparison_markdown(held) + f"\n{where}\n"


def recipes() -> str:
    """Every recipe in train/: its networks and base loss from its keys, the rest from the comment at its head."""
    rows = ["| recipe | T | S0 | base | budget | published | time | result |", "| --- " * 8 + "|"]
    for path in sorted(RECIPES.glob("*.toml")):
        recipe, head = read_recipe(path), comment(path)
        names = (recipe.teacher.name, recipe.student.name, recipe.method.loss)
        facts = (head[key] for key in ("Budget", "Published", "Time", "Result"))
        rows.append(f"| [{path.stem}]({path.name}) | " + " | ".join((*names, *facts)) + " |")
    return "\n".join(rows) + "\n"


def comment(path: Path) -> dict[str, str]:
    """What the comment at the head of a recipe states, as `# Name: value` lines; only the first line of each value."""
    text = path.read_text(encoding="utf-8")
    return {name: value.strip() for name, value in re.findall(r"^# (\w+): +(.+)$", text, re.MULTILINE)}


def render(text: str) -> str:
    """A page with every table made anew."""
    makers: dict[str, Callable[[], str]] = {
        "claims": claims,
        "headlines": headlines,
        "quickstart": quickstart,
        "gpu": gpu,
        "recorded": recorded,
        "recipes": recipes,
        "preprocessing": preprocessing,
        "runtimes": runtimes,
        "separable": separable,
        "serving": serving,
    }

    def table(match: re.Match[str]) -> str:
        name = match.group(2)
        content = makers[name]() if name in makers else of_record(HERE / name)
        return match.group(1) + content + match.group(4)

    return _BLOCK.sub(table, text)


def main() -> None:
    """Write the tables, or check that they are as they would be written."""
    stale = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if (fresh := render(text)) != text:
            stale.append(page.name)
            if "--check" not in sys.argv:
                page.write_text(fresh, encoding="utf-8")
    if stale and "--check" in sys.argv:
        sys.exit(f"Tables differ from their sources in {', '.join(stale)}: run uv run python benchmarks/tables.py")


if __name__ == "__main__":
    main()
