"""Engines of tests: the backends that run them, and what was asked of the simulated device."""

from rkd_deploy.backends.tensorrt import TensorRtBackend, TensorRtRtxBackend

FLAVOURS = {"tensorrt": TensorRtBackend, "tensorrt-rtx": TensorRtRtxBackend}


def calls(device):
    """What was asked of the device since the last time, the current device aside."""
    log = [entry[0] if isinstance(entry, tuple) else entry for entry in device.log if entry != "SetDevice"]
    device.log.clear()
    return log
