"""BentoML runs, and packs into an image, the server of this package: BUNDLE=PATH bentoml serve bento:Classifier."""

import os

import bentoml

from rkd_deploy.serve.http.app import create_app

classifier = bentoml.asgi_app(create_app(os.environ["BUNDLE"], threads=1), path="/")
Classifier = bentoml.service(classifier(type("Classifier", (), {})))
