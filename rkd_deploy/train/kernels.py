"""CUDA kernels of training for what PyTorch needs several, on bfloat16 maps in NHWC.

They are compiled by NVRTC, which comes with PyTorch: no compiler has to be installed. A test runs the source on a CPU.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

_THREADS = 256
MOST_CHANNELS = 8 * _THREADS
_BLOCKS = 528  # four for each multiprocessor of an H100

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

// x = relu(x + bias + z)
extern "C" __global__ void add_relu(uint4* x, const uint4* z, const float* bias, int M, int C, int adds) {
    ROWS
    float v[8], u[8], b[8];
    EACH b[k] = bias[8 * g + k];
    for (int i = first; i < M; i += stride) {
        size_t at = (size_t)i * G + g;
        load(x + at, v);
        if (adds) load(z + at, u);
        EACH {
            v[k] += b[k] + (adds ? u[k] : 0.0f);
            if (v[k] < 0.0f) v[k] = 0.0f;
        }
        store(x + at, v);
    }
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


def launch(name: str, rows: int, channels: int, *arguments: Tensor | int) -> None:
    """Start a kernel on the present stream; it gets the arguments, then rows and channels.

    Args:
        name: Of the kernel.
        rows: Pixels of all images.
        channels: C, a multiple of 8.
        arguments: Before these two, and behind them those that are numbers.
    """
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    numbers = [argument for argument in arguments if not isinstance(argument, Tensor)]
    blocks = max(1, min(_BLOCKS, -(-rows // (_THREADS // (channels // 8)))))
    args = [*tensors, rows, channels, *numbers]
    _kernel(name)(grid=(blocks, 1, 1), block=(_THREADS, 1, 1), args=args)


def fits(map_NCHW: Tensor) -> bool:
    """Whether the kernels take a map."""
    channels = map_NCHW.shape[1]
    return (
        map_NCHW.is_cuda
        and map_NCHW.dtype is torch.bfloat16
        and channels % 8 == 0
        and channels <= MOST_CHANNELS
        and 1 < map_NCHW.numel() // channels < 2**31 // 8
    )
