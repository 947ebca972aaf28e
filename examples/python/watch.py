"""Watch a folder, and write a row of a CSV file for every photo that comes into it.

pip install 'rkd-deploy[cpu]'
python watch.py BUNDLE FOLDER LABELS.csv

A photo is read once its size has not changed between two looks. Started again, it goes on with what has no row yet.
"""

import argparse
import csv
import time
from collections.abc import Iterator
from pathlib import Path

import rkd_deploy

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}
COLUMNS = ("photo", "label", "probability", "error")


def arrivals(folder: Path, done: set[str], seconds: float) -> Iterator[Path]:
    """Photos that are there whole and have no row, as they come, without end."""
    sizes: dict[str, int] = {}
    while True:
        for path in sorted(folder.rglob("*")):
            name = str(path.relative_to(folder))
            if path.suffix.lower() not in SUFFIXES or name in done:
                continue
            size = path.stat().st_size
            if sizes.get(name) == size > 0:  # a copy is no longer under way
                done.add(name)
                yield path
            sizes[name] = size
        time.sleep(seconds)


def main() -> None:
    """Classify what comes until Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("folder", type=Path)
    parser.add_argument("labels", type=Path)
    parser.add_argument("--seconds", type=float, default=1.0, help="Between two looks.")
    given = parser.parse_args()
    done = set()
    if given.labels.exists():
        with given.labels.open(newline="", encoding="utf-8") as stream:
            done = {row["photo"] for row in csv.DictReader(stream)}
    with rkd_deploy.load(given.bundle) as classifier, given.labels.open("a", newline="", encoding="utf-8") as stream:
        rows = csv.DictWriter(stream, COLUMNS)
        if stream.tell() == 0:
            rows.writeheader()
        print(f"Watching {given.folder}; Ctrl-C ends it.", flush=True)
        try:
            for path in arrivals(given.folder, done, given.seconds):
                row = {"photo": str(path.relative_to(given.folder))}
                try:
                    best = classifier.predict(path)[0]
                    row |= {"label": best.label, "probability": f"{best.probability:.4f}"}
                except rkd_deploy.RkdError as error:
                    row["error"] = str(error)
                rows.writerow(row)
                stream.flush()
                print(row["photo"], row.get("label", "cannot be read"), row.get("probability", ""), flush=True)
        except KeyboardInterrupt:
            print()


if __name__ == "__main__":
    main()
