"""Classify photos in an app, without PyTorch.

pip install 'rkd-deploy[cpu]'
python classify.py BUNDLE IMAGE...
"""

import sys

import rkd_deploy


def main() -> None:
    """Print the most probable classes of every image."""
    bundle, *images = sys.argv[1:]
    with rkd_deploy.load(bundle) as classifier:
        for image, best in zip(images, classifier.predict_batch(images, top=3), strict=True):
            print(image, ", ".join(f"{one.label} {one.probability:.1%}" for one in best))


if __name__ == "__main__":
    main()
