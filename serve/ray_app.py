"""Ray Serve replicates the server of this package: BUNDLE=PATH serve run ray_app:app (in this folder)."""

import os

from ray import serve

from rkd_deploy.serve.http.app import create_app

BUNDLE = os.path.abspath(os.environ["BUNDLE"])
ingress = serve.ingress(lambda bundle=BUNDLE: create_app(bundle, threads=1))
# Ray's own bound is 5, beyond which its proxy waits and tries again; the application has a bound of 64.
options = {"num_replicas": int(os.environ.get("REPLICAS", "1")), "max_ongoing_requests": 64}
app = serve.deployment(ingress(), name="classifier", **options).bind()
