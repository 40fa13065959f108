// Enough of CUDA to run a kernel on the CPU: one thread for each of a block's, block after block.
#pragma once

#include <barrier>
#include <cstdint>
#include <thread>
#include <vector>

#define __global__
#define __host__
#define __device__
#define __launch_bounds__(threads)
// One block runs at a time, so what its threads share may be shared by all.
#define __shared__ static

struct Place {
  unsigned x = 0, y = 0;
};
inline Place gridDim;
inline thread_local Place blockIdx, threadIdx;
inline std::barrier<>* all_threads = nullptr;

inline void __syncthreads() { all_threads->arrive_and_wait(); }

// Calls kernel() as each thread of a block, for every block of the grid.
template <class Kernel>
void launch(Place grid, Place block, Kernel kernel) {
  gridDim = grid;
  std::barrier<> together(static_cast<std::ptrdiff_t>(block.x) * block.y);
  all_threads = &together;
  std::vector<std::thread> threads;
  for (unsigned y = 0; y < block.y; ++y)
    for (unsigned x = 0; x < block.x; ++x)
      threads.emplace_back([=, &together] {
        threadIdx = {x, y};
        for (unsigned i = 0; i < grid.x * grid.y; ++i) {
          blockIdx = {i % grid.x, i / grid.x};
          kernel();
          together.arrive_and_wait();
        }
      });
  for (std::thread& thread : threads) thread.join();
}
