// CUDA C on a CPU, as far as rkd_deploy/train/norms.py goes: a thread for each thread of a block, block after block.
#include <math.h>
#include <string.h>

#include <atomic>
#include <barrier>
#include <thread>
#include <vector>

struct Index { int x; };
static thread_local Index threadIdx, blockIdx;
static Index blockDim, gridDim;
static std::barrier<>* gate;

#define __global__
#define __device__
#define __shared__ static
#define __syncthreads() gate->arrive_and_wait()

struct uint4 { unsigned int x, y, z, w; };

static inline float __uint_as_float(unsigned int u) { float f; memcpy(&f, &u, 4); return f; }
static inline unsigned int __float_as_uint(float f) { unsigned int u; memcpy(&u, &f, 4); return u; }
static inline void atomicAdd(float* place, float value) { std::atomic_ref<float>(*place).fetch_add(value); }

template <class Kernel, class... Arguments>
void launch(Kernel kernel, int blocks, int threads, Arguments... arguments) {
    gridDim.x = blocks;
    blockDim.x = threads;
    for (int block = 0; block < blocks; block++) {
        std::barrier<> meeting(threads);
        gate = &meeting;
        std::vector<std::thread> running;
        for (int thread = 0; thread < threads; thread++)
            running.emplace_back([=] { threadIdx.x = thread; blockIdx.x = block; kernel(arguments...); });
        for (auto& one : running) one.join();
    }
}
