"""Every name of TensorRT and CUDA that our sources use exists in the libraries.

The names are looked up in TensorRT-RTX's own bindings, in those of TensorRT 11, which load without TensorRT once empty
libraries stand in for it, and in listings of the bindings of TensorRT 10.3 (today's Jetson) and 10.13, which listing.py
makes of the real ones; a test does that again.
"""

import ast
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[3]
HERE = Path(__file__).parent
CUDA = REPO / "rkd_deploy/backends/tensorrt/cuda.py"
SOURCES = sorted(path for path in CUDA.parent.glob("*.py") if path != CUDA)

# Names that one library has and the other has not; our sources ask which library it is before they use one.
RTX_ONLY = {
    "ComputeCapability", "DynamicShapesKernelSpecializationStrategy", "EngineValidity", "EngineValidity.INVALID",
    "DynamicShapesKernelSpecializationStrategy.EAGER", "dynamic_shapes_kernel_specialization_strategy",
    "get_engine_validity", "is_stream_capturable", "num_compute_capabilities", "set_compute_capability",
}  # fmt: skip
NEWER_THAN_10_3 = {"create_runtime_config"}  # RTX only in our sources, though TensorRT 10.13 and 11 have it too

# What an object of the library is called in our sources, and the class it is of.
CLASSES = {
    "builder": "Builder", "network": "INetworkDefinition", "parser": "OnnxParser", "error": "ParserError",
    "config": "IBuilderConfig", "runtime_config": "IRuntimeConfig", "profile": "IOptimizationProfile",
    "tensor": "ITensor", "layer": "ILayer", "runtime": "Runtime", "engine": "ICudaEngine", "_engine": "ICudaEngine",
    "profiler": "IProfiler",
    "_context": "IExecutionContext", "inspector": "EngineInspector", "loaded": "ICudaEngine",
}  # fmt: skip
OURS = {
    "name", "items", "get", "input", "outputs", "output_names", "profiles", "context", "library", "max_batch", "close",
    "plan", "record", "with_name", "covers", "least", "best", "most", "strerror", "__init__",
    "profile_index", "layers", "layer_times", "times",
}  # fmt: skip

DUMP = """
import importlib, json, sys
module = importlib.import_module(sys.argv[1])
names = [name for name in dir(module) if not name.startswith("_")]
print(json.dumps({name: " ".join(dir(getattr(module, name))) for name in names}))
"""


@pytest.fixture(scope="module")
def dump(absent):
    def names(package, **environment):
        if importlib.util.find_spec(package) is None:
            absent(f"{package} is not installed")
        command = [sys.executable, "-c", DUMP, package]
        result = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True)
        return parsed(result.stdout)

    return names


def parsed(text):
    return {name: set(members.split()) for name, members in json.loads(text).items()}


@pytest.fixture(scope="module")
def rtx(dump):
    return dump("tensorrt_rtx")


@pytest.fixture(scope="module")
def tensorrt_11(tmp_path_factory, dump, absent):
    """The bindings of TensorRT 11 over empty libraries: importing them looks for these functions and calls none."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        absent("a C compiler is needed to look at TensorRT's bindings")
    functions = [
        *(f"createInfer{name}_INTERNAL" for name in ("Builder", "Refitter", "Runtime")),
        *(f"createNvOnnxParser{name}_INTERNAL" for name in ("", "Refitter")),
        *("getBuilderPluginRegistry", "getPluginRegistry", "getNvOnnxParserVersion", "initLibNvInferPlugins"),
    ]
    folder = tmp_path_factory.mktemp("empty")
    source = folder / "empty.c"
    source.write_text("".join(f"void {name}(void) {{}}\n" for name in functions))
    for library in ("libnvinfer", "libnvinfer_plugin", "libnvonnxparser"):
        target = folder / f"{library}.so.11"
        subprocess.run([compiler, "-shared", "-fPIC", "-o", target, source], check=True)
    return dump("tensorrt_bindings", LD_LIBRARY_PATH=str(folder))


@pytest.fixture(params=["tensorrt_rtx", "tensorrt_11", "tensorrt_10_3", "tensorrt_10_13"])
def library(request):
    if request.param.startswith("tensorrt_10"):
        return request.param, parsed((HERE / f"{request.param}.json").read_text())
    return request.param, request.getfixturevalue({"tensorrt_rtx": "rtx"}.get(request.param, request.param))


@pytest.mark.parametrize("version", ["10.3.0", "10.13.3.9"])
def test_the_listings_are_those_of_nvidias_own_bindings(version, absent):
    command = [sys.executable, HERE / "listing.py", version]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        absent(f"TensorRT's bindings {version} cannot be looked at: {result.stderr}")
    listed = (HERE / f"tensorrt_{'_'.join(version.split('.')[:2])}.json").read_text()
    assert result.stdout == listed


def dotted(node):
    """a.b.c of an attribute access, as a list; empty where it does not begin with a name."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.insert(0, node.attr)
        node = node.value
    return [node.id, *parts] if isinstance(node, ast.Name) else []


def used(source):
    """(name of the module's, ...) or (variable, member): what a source asks of the library."""
    names, members = set(), set()
    for node in ast.walk(ast.parse(source)):
        parts = dotted(node)
        if not parts or parts[-1].startswith("__"):
            continue
        if "trt" in parts and parts[-1] != "trt":
            names.add(".".join(parts[parts.index("trt") + 1 :]))
        elif len(parts) >= 2 and parts[-2] in CLASSES and parts[-1] not in OURS:
            members.add((parts[-2], parts[-1]))
    return names, members


def missing(source, api, exempt=frozenset()):
    """Names that the source uses and the library has not."""
    names, members = used(source)
    wrong = {
        name
        for name in names
        if name not in exempt
        and (name.split(".")[0] not in api or ("." in name and name.split(".")[1] not in api[name.split(".")[0]]))
    }
    for variable, member in members:
        if member not in exempt and member not in api.get(CLASSES[variable], ()):
            wrong.add(f"{CLASSES[variable]}.{member}")
    return wrong


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_every_name_exists(path, library):
    name, api = library
    exempt = set() if name == "tensorrt_rtx" else RTX_ONLY
    if name == "tensorrt_10_3":
        exempt = exempt | NEWER_THAN_10_3
    assert missing(path.read_text(), api, exempt) == set()


def test_what_is_listed_as_one_librarys_own_is(rtx, tensorrt_11):
    everything = [
        set(api) | {f"{owner}.{member}" for owner in api for member in api[owner]} for api in (rtx, tensorrt_11)
    ]
    for api, has in zip(everything, (True, False), strict=True):
        members = {name.rpartition(".")[2] for name in api}
        for name in RTX_ONLY:
            assert (name in (api if "." in name else api | members)) == has, name


def test_the_walk_sees_the_calls_that_matter():
    names, members = set(), set()
    for path in SOURCES:
        calls = used(path.read_text())
        names, members = names | calls[0], members | calls[1]
    assert {"Builder", "OnnxParser", "Runtime", "BuilderFlag.TF32", "TensorIOMode.INPUT"} <= names
    assert {
        ("builder", "build_serialized_network"), ("_context", "execute_async_v3"), ("_context", "set_tensor_address"),
        ("config", "set_timing_cache"), ("_context", "profiler"),
        ("engine", "get_tensor_profile_shape"), ("inspector", "get_engine_information"),
    } <= members  # fmt: skip


@pytest.mark.parametrize(
    "wrong",
    ["library.trt.BuilderFlag.FP16", "trt.Bilder(log)", "config.int8_calibrator", "self._context.execute_async_v2(1)"],
)
def test_a_wrong_name_is_found(wrong, rtx, tensorrt_11):
    for api in (rtx, tensorrt_11):
        assert len(missing(wrong, api, RTX_ONLY)) == 1


def test_every_cuda_function_exists():
    from cuda.bindings import runtime

    tree = ast.parse(CUDA.read_text())
    strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    names = {name for name in strings if name.startswith("cuda") and name.isalnum()}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("cuda"):
            names.add(node.attr)
    assert {"cudaGraphLaunch", "cudaMemcpyAsync", "cudaStreamCaptureModeThreadLocal", "cudaHostAllocDefault"} <= names
    enumerations = [runtime.cudaError_t, runtime.cudaMemcpyKind, runtime.cudaStreamCaptureMode]
    unknown = {name for name in names if not any(hasattr(owner, name) for owner in (runtime, *enumerations))}
    assert unknown == set()


@pytest.mark.parametrize("is_rtx", [False, True])
def test_the_simulated_library_promises_nothing_that_the_real_one_has_not(simulated, is_rtx, rtx, tensorrt_11):
    module = simulated.tensorrt(simulated.Device(), rtx=is_rtx)
    api = rtx if is_rtx else tensorrt_11
    for name, value in vars(module).items():
        if name.startswith("_"):
            continue
        assert name in api
        members = [member for member in vars(value) if not member.startswith("_")]
        helpers = {"facts", "model", "tensors", "inputs", "content", "engine", "shapes", "layers"}
        lacking = {member for member in members if member not in api[name]} - helpers
        assert lacking - (RTX_ONLY if not is_rtx else set()) == set(), name
