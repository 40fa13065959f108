// Runs independent jobs on a few threads; the first exception is passed on.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#endif

namespace curvfast {

using Team = void (*)(void (*)(void*), void*, unsigned, unsigned);

// Runs a function on a team of the OpenMP that the process has already, which is torch's; null
// where there is none. Its threads wait by spinning, and would keep threads of our own waiting.
inline Team hosts_team() {
#if defined(__linux__)
  static const auto team = reinterpret_cast<Team>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return team;
#else
  return nullptr;
#endif
}

template <class Job>
void parallel_for(std::size_t count, int workers, Job job) {
  std::atomic<std::size_t> next{0};
  std::exception_ptr failure;
  std::mutex guard;
  auto work = [&] {
    for (std::size_t i = next++; i < count; i = next++) {
      try {
        job(i);
      } catch (...) {
        const std::lock_guard lock(guard);
        if (!failure) failure = std::current_exception();
      }
    }
  };
  const std::size_t threads = std::min<std::size_t>(std::max(workers, 1), count);
  if (threads > 1 && hosts_team()) {
    const auto call = [](void* given) { (*static_cast<decltype(work)*>(given))(); };
    hosts_team()(call, &work, static_cast<unsigned>(threads), 0);
  } else {
    std::vector<std::thread> pool;
    for (std::size_t t = 1; t < threads; ++t) pool.emplace_back(work);
    work();
    for (std::thread& thread : pool) thread.join();
  }
  if (failure) std::rethrow_exception(failure);
}

}  // namespace curvfast
