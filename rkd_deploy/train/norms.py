"""Batch norm in training, the sum behind it and the ReLU behind that in two kernels forward and two backward.

    y   = relu(w h + b + z),  h = (x - mean) / sqrt(var + eps)        mean, var over the batch, per channel
    g   = dL/dy where y > 0, else 0
    dw  = sum g h,  db = sum g,  dz = g
    dx  = w / sqrt(var + eps) (g - mean(g) - h mean(g h))

PyTorch has a kernel for each of these steps, eight to eleven for a layer, and small networks are bound by their number.
Maps are bfloat16 in NHWC; sums are float32, added up in no fixed order. The kernels are compiled by NVRTC, which comes
with PyTorch: no compiler has to be installed.
"""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from rkd_deploy.models.staged import FeatureNetwork
from rkd_deploy.train.frozen import ADDITIONS, MapsAndLogits, is_relu

_THREADS = 256
_MOST_CHANNELS = 8 * _THREADS
_BLOCKS = 264  # two for each multiprocessor of an H100

SOURCE = r"""
// A thread owns 8 channels (16 bytes) of every R-th row; a row is a pixel's C channels. Threads beyond R rows rest.
#define ROWS int G = C / 8, R = blockDim.x / G, g = threadIdx.x % G, r = threadIdx.x / G; \
    int stride = gridDim.x * R, first = r < R ? blockIdx.x * R + r : M;
#define EACH for (int k = 0; k < 8; k++)

__device__ inline void load(const uint4* p, float* v) {
    uint4 u = *p;
    unsigned int w[4] = {u.x, u.y, u.z, u.w};
    for (int k = 0; k < 4; k++) {
        v[2 * k] = __uint_as_float(w[k] << 16);
        v[2 * k + 1] = __uint_as_float(w[k] & 0xffff0000u);
    }
}

__device__ inline unsigned int rounded(float f) {  // to nearest, ties to even, as bfloat16's 16 bits
    unsigned int u = __float_as_uint(f);
    return (u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
}

__device__ inline void store(uint4* p, const float* v) {
    unsigned int w[4];
    for (int k = 0; k < 4; k++) w[k] = rounded(v[2 * k]) | rounded(v[2 * k + 1]) << 16;
    uint4 u;
    u.x = w[0]; u.y = w[1]; u.z = w[2]; u.w = w[3];
    *p = u;
}

// Sums over all rows of a and of b, each of 8 channels a thread, added to sums [2, C].
__device__ inline void add_up(const float* a, const float* b, float* sums, int C, int G, int R, int g, int r) {
    __shared__ float part[16][256];
    int t = threadIdx.x, half = 1;
    EACH { part[k][t] = a[k]; part[8 + k][t] = b[k]; }
    while (half < R) half *= 2;
    for (half /= 2; half > 0; half /= 2) {
        __syncthreads();
        if (r < half && r + half < R) for (int k = 0; k < 16; k++) part[k][t] += part[k][t + half * G];
    }
    __syncthreads();
    if (r == 0) EACH { atomicAdd(sums + 8 * g + k, part[k][t]); atomicAdd(sums + C + 8 * g + k, part[8 + k][t]); }
}

extern "C" __global__ void norm_statistics(const uint4* x, float* sums, int M, int C) {
    ROWS
    float v[8], x0[8], a[8] = {0}, b[8] = {0};
    load(x + g, x0);  // differences from one value: the squares of large ones would cancel
    for (int i = first; i < M; i += stride) {
        load(x + (size_t)i * G + g, v);
        EACH { float d = v[k] - x0[k]; a[k] += d; b[k] += d * d; }
    }
    add_up(a, b, sums, C, G, R, g, r);
}

extern "C" __global__ void norm_forward(
    const uint4* x, const uint4* z, uint4* y, const float* sums, const float* weight, const float* bias,
    float* running_mean, float* running_var, float* used, const float* settings, int M, int C, int adds, int relu
) {
    ROWS
    float v[8], u[8], scale[8], shift[8];
    load(x + g, v);
    EACH {
        int c = 8 * g + k;
        float d = sums[c] / M, mean = v[k] + d, var = fmaxf(sums[C + c] / M - d * d, 0.0f);
        float inverse = 1.0f / sqrtf(var + settings[0]);
        scale[k] = inverse * weight[c];
        shift[k] = bias[c] - mean * scale[k];
        if (blockIdx.x == 0 && r == 0) {
            used[c] = mean;
            used[C + c] = inverse;
            running_mean[c] += settings[1] * (mean - running_mean[c]);
            running_var[c] += settings[1] * (var * M / (M - 1) - running_var[c]);
        }
    }
    for (int i = first; i < M; i += stride) {
        size_t at = (size_t)i * G + g;
        load(x + at, v);
        if (adds) load(z + at, u);
        EACH {
            v[k] = v[k] * scale[k] + shift[k] + (adds ? u[k] : 0.0f);
            if (relu && v[k] < 0.0f) v[k] = 0.0f;
        }
        store(y + at, v);
    }
}

extern "C" __global__ void norm_backward_sums(
    const uint4* dy, const uint4* y, const uint4* x, const float* used, float* sums, int M, int C, int relu
) {
    ROWS
    float d[8], o[8], v[8], mean[8], a[8] = {0}, b[8] = {0};
    EACH mean[k] = used[8 * g + k];
    for (int i = first; i < M; i += stride) {
        size_t at = (size_t)i * G + g;
        load(dy + at, d);
        load(x + at, v);
        if (relu) load(y + at, o);
        EACH { float q = relu && !(o[k] > 0.0f) ? 0.0f : d[k]; a[k] += q; b[k] += q * (v[k] - mean[k]); }
    }
    add_up(a, b, sums, C, G, R, g, r);
}

extern "C" __global__ void norm_backward(
    const uint4* dy, const uint4* y, const uint4* x, const float* used, const float* sums, const float* weight,
    uint4* dx, uint4* dz, float* dweight, float* dbias, int M, int C, int adds, int relu
) {
    ROWS
    float d[8], o[8], v[8], factor[8], slope[8], shift[8];
    EACH {
        int c = 8 * g + k;
        float inverse = used[C + c];
        factor[k] = weight[c] * inverse;
        slope[k] = -factor[k] * inverse * inverse * sums[C + c] / M;
        shift[k] = -factor[k] * sums[c] / M - slope[k] * used[c];
        if (blockIdx.x == 0 && r == 0) {
            dweight[c] = sums[C + c] * inverse;
            dbias[c] = sums[c];
        }
    }
    for (int i = first; i < M; i += stride) {
        size_t at = (size_t)i * G + g;
        load(dy + at, d);
        load(x + at, v);
        if (relu) {
            load(y + at, o);
            EACH if (!(o[k] > 0.0f)) d[k] = 0.0f;
        }
        if (adds) store(dz + at, d);
        EACH d[k] = factor[k] * d[k] + slope[k] * v[k] + shift[k];
        store(dx + at, d);
    }
}
"""


@functools.cache
def _kernel(name: str) -> Any:
    from torch.utils import cpp_extension  # only here: it looks for a toolkit when it is imported

    # Without a toolkit PyTorch refuses to say where its headers are; this source has none.
    cpp_extension.CUDA_HOME = cpp_extension.CUDA_HOME or "/usr/local/cuda"
    return torch.cuda._compile_kernel(SOURCE, name)


def _launch(name: str, rows: int, channels: int, *arguments: Tensor | int) -> None:
    blocks = max(1, min(_BLOCKS, -(-rows // (_THREADS // (channels // 8)))))
    _kernel(name)(grid=(blocks, 1, 1), block=(_THREADS, 1, 1), args=[*arguments])


class Sums:
    """Zeros for the sums of all layers of a step, cleared at once.

    Args:
        length: Numbers that a step takes at most.
        device: Where they are.
    """

    def __init__(self, length: int, device: torch.device) -> None:
        self._values = torch.zeros(length, device=device)
        self._taken = 0

    def clear(self) -> None:
        """Begin a step."""
        self._values.zero_()
        self._taken = 0

    def take(self, count: int) -> Tensor:
        """Zeros that nobody else has in this step."""
        self._taken += count
        if self._taken > len(self._values):
            return self._values.new_zeros(count)
        return self._values[self._taken - count : self._taken]


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_NCHW: Tensor, z_NCHW: Tensor | None, weight: Tensor, bias: Tensor, layer: BatchNormAddReLU
    ) -> Tensor:
        norm, sums = layer.norm, layer.sums
        assert norm.running_mean is not None
        assert norm.running_var is not None
        assert sums is not None
        x_NCHW = x_NCHW.contiguous(memory_format=torch.channels_last)
        z = x_NCHW if z_NCHW is None else z_NCHW.contiguous(memory_format=torch.channels_last)
        y_NCHW, channels = torch.empty_like(x_NCHW), x_NCHW.shape[1]
        rows, used = x_NCHW.numel() // channels, torch.empty(2 * channels, device=x_NCHW.device)
        total = sums.take(2 * channels)
        _launch("norm_statistics", rows, channels, x_NCHW, total, rows, channels)
        adds = int(z_NCHW is not None)
        _launch(
            "norm_forward", rows, channels, x_NCHW, z, y_NCHW, total, weight, bias, norm.running_mean, norm.running_var,
            used, layer.settings, rows, channels, adds, int(layer.relu),
        )  # fmt: skip
        # Without a ReLU y is not looked at again, and what follows may write over it.
        ctx.save_for_backward(x_NCHW, y_NCHW if layer.relu else x_NCHW, used, weight)
        ctx.layer, ctx.adds = layer, adds
        return y_NCHW

    @staticmethod
    def backward(ctx: Any, dy_NCHW: Tensor) -> tuple[Tensor | None, ...]:
        x_NCHW, y_NCHW, used, weight = ctx.saved_tensors
        relu, channels = int(ctx.layer.relu), x_NCHW.shape[1]
        rows, total = x_NCHW.numel() // channels, ctx.layer.sums.take(2 * channels)
        dy_NCHW = dy_NCHW.contiguous(memory_format=torch.channels_last)
        _launch("norm_backward_sums", rows, channels, dy_NCHW, y_NCHW, x_NCHW, used, total, rows, channels, relu)
        dx_NCHW, dweight, dbias = torch.empty_like(x_NCHW), torch.empty_like(weight), torch.empty_like(weight)
        writes = ctx.adds and relu  # without a ReLU z's gradient is y's
        dz_NCHW = torch.empty_like(x_NCHW) if writes else dy_NCHW
        _launch(
            "norm_backward", rows, channels, dy_NCHW, y_NCHW, x_NCHW, used, total, weight,
            dx_NCHW, dz_NCHW, dweight, dbias, rows, channels, int(writes), relu,
        )  # fmt: skip
        return dx_NCHW, dz_NCHW if ctx.adds else None, dweight, dbias, None


class BatchNormAddReLU(nn.Module):
    """The operation relu(norm(x) + z) in training; on a CPU, and where the kernels do not fit, its parts.

    Args:
        norm: With weights, running statistics and a momentum; it may belong to another network too.
        relu: Whether a ReLU comes last.
    """

    def __init__(self, norm: nn.BatchNorm2d, relu: bool) -> None:
        super().__init__()
        self.norm, self.relu = norm, relu
        self.sums: Sums | None = None
        self.settings = torch.tensor([norm.eps, norm.momentum or 0.0], device=norm.weight.device)

    def forward(self, x_NCHW: Tensor, z_NCHW: Tensor | None = None) -> Tensor:
        """The ReLU of the normalised map, and of a map of its shape added where there is one."""
        if self._fits(x_NCHW, z_NCHW):
            return cast(Tensor, _Fused.apply(x_NCHW, z_NCHW, self.norm.weight, self.norm.bias, self))
        out = self.norm(x_NCHW)
        out = out if z_NCHW is None else out + z_NCHW
        return torch.relu(out) if self.relu else cast(Tensor, out)

    def _fits(self, x_NCHW: Tensor, z_NCHW: Tensor | None) -> bool:
        channels = x_NCHW.shape[1]
        return (
            x_NCHW.is_cuda
            and self.sums is not None
            and x_NCHW.dtype is torch.bfloat16
            and self.norm.weight.dtype is torch.float32
            and channels % 8 == 0
            and channels <= _MOST_CHANNELS
            and 1 < x_NCHW.numel() // channels < 2**31 // 8
            and (z_NCHW is None or (z_NCHW.dtype is torch.bfloat16 and z_NCHW.shape == x_NCHW.shape))
        )


def fused_passes(network: FeatureNetwork) -> fx.GraphModule | None:
    """The passes of a network in training, of its own layers, each batch norm and what follows it one operation.

    Returns:
        Images to stage maps; None where the network cannot be traced.
    """
    try:
        passes = fx.symbolic_trace(MapsAndLogits(network, logits=False))
    except Exception:  # a symbol in place of a tensor breaks Python code in any way
        return None
    modules = dict(passes.named_modules())
    for node in list(passes.graph.nodes):
        if node.op != "call_module" or not _is_norm(modules[str(node.target)]):
            continue
        others: list[Any] = []
        last, reader = node, _only_reader(node)
        if reader is not None and reader.op == "call_function" and reader.target in ADDITIONS and not reader.kwargs:
            rest, after = [argument for argument in reader.args if argument is not node], _only_reader(reader)
            if len(rest) == 1 and isinstance(rest[0], fx.Node) and after is not None and is_relu(after, modules):
                others, last, reader = rest, reader, after
        relu = reader is not None and is_relu(reader, modules)
        name = f"fused_{node.name}"
        modules[name] = BatchNormAddReLU(cast(nn.BatchNorm2d, modules[str(node.target)]), relu)
        passes.add_module(name, modules[name])
        end = reader if relu and reader is not None else last
        with passes.graph.inserting_before(end):
            fused = passes.graph.call_module(name, (node.args[0], *others))
        end.replace_all_uses_with(fused)
        for old in dict.fromkeys((end, last, node)):
            passes.graph.erase_node(old)
    passes.recompile()
    return passes


def _only_reader(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_norm(module: nn.Module) -> bool:
    return type(module) is nn.BatchNorm2d and module.affine and module.track_running_stats and bool(module.momentum)
