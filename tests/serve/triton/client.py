"""A client of a tritonserver, run in the environment of conftest.py; prints one JSON object.

client.py config FILE                               parse a config.pbtxt with Triton's own protobuf definition
client.py ask ADDRESS MODEL VERSION X.npy Y.npz     logits and labelled top 3 of one request, by gRPC
client.py ask_http ADDRESS MODEL VERSION X.npy Y.npz    the same by HTTP
client.py everything ADDRESS MODEL PHOTO X.npy  all that the http client can ask our own server, and the asyncio client
client.py photo ADDRESS MODEL PHOTO             a photo's logits, by HTTP, its bytes as the input
client.py crowd ADDRESS MODEL X.npy Y.npz           every image a request of its own, all at once
client.py follow ADDRESS MODEL VERSION X.npy Y.npz  ask on and on until VERSION is ready and answers
"""

import asyncio
import json
import sys
import time
from pathlib import Path

import numpy as np
import tritonclient.grpc as grpc
import tritonclient.http as http
import tritonclient.http.aio as aio
from google.protobuf import json_format, text_format
from tritonclient.grpc import model_config_pb2

SECONDS = 60


def config(file):
    with open(file, encoding="utf-8") as stream:
        parsed = text_format.Parse(stream.read(), model_config_pb2.ModelConfig())
    return json_format.MessageToDict(parsed, preserving_proto_field_name=True)


def connect(address, model, version="", api=grpc):
    """A client, once the model is ready."""
    client, start = api.InferenceServerClient(address), time.monotonic()
    while not ready(client, model, version):
        assert time.monotonic() - start < SECONDS, f"{model} {version} is not ready after {SECONDS} s"
        time.sleep(0.05)
    return client


def ready(client, model, version):
    try:
        return client.is_model_ready(model, version)
    except (grpc.InferenceServerException, OSError):  # not listening yet
        return False


def inputs(x, api=grpc):
    tensor = api.InferInput("input", list(x.shape), "UINT8")
    tensor.set_data_from_numpy(x)
    return [tensor]


def logits(client, model, x, version="", classes=0, api=grpc):
    wanted = [api.InferRequestedOutput("logits", class_count=classes)]
    return client.infer(model, inputs(x, api), model_version=version, outputs=wanted).as_numpy("logits")


def ask(address, model, version, x_file, y_file, api=grpc):
    client, x = connect(address, model, version, api), np.load(x_file)
    np.savez(y_file, logits=logits(client, model, x, version, api=api))
    return {"top3": [[text.decode() for text in row] for row in logits(client, model, x, version, 3, api)]}


def ask_http(*arguments):
    return ask(*arguments, api=http)


def images(photo, shape, api=http):
    tensor = api.InferInput("input", shape, "BYTES")
    tensor.set_data_from_numpy(np.array([Path(photo).read_bytes()] * shape[0], object).reshape(shape))
    return [tensor]


def photo(address, model, photo):
    client = connect(address, model, api=http)
    return client.infer(model, images(photo, [1, 1])).as_numpy("logits")[0].tolist()


def everything(address, model, photo, x_file):
    client, x = connect(address, model, api=http), np.load(x_file)
    answers = {
        "live": client.is_server_live(),
        "ready": [client.is_server_ready(), client.is_model_ready(model, "1"), client.is_model_ready("other")],
        "server": client.get_server_metadata()["name"],
        "model": client.get_model_metadata(model)["name"],
        "photo": client.infer(model, images(photo, [2])).as_numpy("logits").tolist(),
    }
    plain = http.InferInput("input", list(x.shape), "UINT8")
    plain.set_data_from_numpy(x, binary_data=False)
    for name, tensors, binary in (("binary", inputs(x, http), True), ("json", [plain], False)):
        wanted = [http.InferRequestedOutput("logits", binary_data=binary)]
        answers[name] = client.infer(model, tensors, outputs=wanted).as_numpy("logits").tolist()
    answers["usual outputs"] = client.infer(model, inputs(x, http)).as_numpy("probabilities").sum(axis=1).tolist()
    answers["top3"] = [[text.decode() for text in row] for row in logits(client, model, x, "1", 3, http)]
    answers["many"] = [
        request.get_result().as_numpy("logits").tolist()
        for request in [client.async_infer(model, inputs(x, http)) for _ in range(4)]
    ]
    try:
        client.infer(model, inputs(x[:, :1], http))
    except http.InferenceServerException as error:
        answers["refusal"] = str(error)
    answers["asyncio"] = asyncio.run(ask_asyncio(address, model, x))
    return answers


async def ask_asyncio(address, model, x):
    async with aio.InferenceServerClient(address) as client:
        assert await client.is_model_ready(model)
        answers = await asyncio.gather(*(client.infer(model, inputs(x, aio)) for _ in range(4)))
        return [answer.as_numpy("logits").tolist() for answer in answers]


def counts(client, model):
    (statistics,) = client.get_inference_statistics(model).model_stats
    return {"images": statistics.inference_count, "runs": statistics.execution_count}


def crowd(address, model, x_file, y_file):
    client, x, answers = connect(address, model), np.load(x_file), {}
    before = counts(client, model)
    for number in range(len(x)):

        def keep(result, error, number=number):
            answers[number] = (result, error)

        client.async_infer(model, inputs(x[number : number + 1]), keep)
    start = time.monotonic()
    while len(answers) < len(x) and time.monotonic() - start < SECONDS:
        time.sleep(0.01)
    errors = [str(error) for _, error in answers.values() if error is not None]
    assert len(answers) == len(x), errors
    assert not errors, errors
    np.savez(y_file, logits=np.concatenate([answers[number][0].as_numpy("logits") for number in range(len(x))]))
    after = counts(client, model)
    return {key: after[key] - before[key] for key in after}


def follow(address, model, version, x_file, y_file):
    client, x = connect(address, model), np.load(x_file)
    print("following", flush=True)
    answers, errors, start, left = [], [], time.monotonic(), 20
    while left and time.monotonic() - start < SECONDS:
        try:
            answers.append(logits(client, model, x))
        except grpc.InferenceServerException as error:
            errors.append(str(error))
        left -= ready(client, model, version)
    np.savez(y_file, logits=np.stack(answers))
    return {"answers": len(answers), "errors": errors, "ready": not left}


if __name__ == "__main__":
    name, *arguments = sys.argv[1:]
    print(json.dumps(globals()[name](*arguments)))
