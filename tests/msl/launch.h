// Launching a kernel over its grid: threadgroups, positions of their threads, and memory that the threads share.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "ids.h"

typedef unsigned int uint;

namespace msl {

enum Order { FORWARD, REVERSE, SHUFFLED };
constexpr uint SIMD_WIDTH = 32;
constexpr size_t SLOT = 16;  // bytes that a simd lane can exchange
constexpr size_t THREADGROUP_LIMIT = 32768;
constexpr uint THREADS_LIMIT = 1024;

// The kernel for one thread; its translation unit is written by translate.py.
typedef void (*Call)(void** buffers, const Ids* ids);

// Abort the kernel with a message. Defined by each lane.
[[noreturn]] void fail(const std::string& message);
// Allocate a threadgroup array, which is never freed. Defined by each lane, which guards it in its way.
char* new_array(const std::string& name, size_t size);

struct Array {
  int key;
  size_t size;
  char* memory;
};

struct Group {
  uint count = 0;             // threads
  std::vector<Array> arrays;  // in threadgroup memory
  std::vector<char> slots;    // [simdgroup, 2, SIMD_WIDTH, SLOT], double-buffered: one is read while one is written

  void start(uint threads) {
    count = threads;
    slots.assign((threads + SIMD_WIDTH - 1) / SIMD_WIDTH * 2 * SIMD_WIDTH * SLOT, char(0xff));
    for (Array& array : arrays) std::memset(array.memory, 0xff, array.size);
  }
  char* array(int key, const std::string& name, size_t size) {
    size_t total = size;
    for (Array& array : arrays) {
      if (array.key == key) return array.memory;
      total += array.size;
    }
    if (total > THREADGROUP_LIMIT) fail(name + ": more than 32 KiB of threadgroup memory");
    arrays.push_back({key, size, new_array(name, size)});
    std::memset(arrays.back().memory, 0xff, size);
    return arrays.back().memory;
  }
};

struct Thread {
  Ids ids;
  Group* group = nullptr;
  uint exchanges = 0;

  char* slots() const {
    return &group->slots[(ids.simdgroup_index_in_threadgroup * 2 + exchanges % 2) * SIMD_WIDTH * SLOT];
  }
  uint lanes() const {
    return std::min(SIMD_WIDTH, group->count - ids.simdgroup_index_in_threadgroup * SIMD_WIDTH);
  }
};

inline thread_local Thread* current = nullptr;

inline std::string position(const Thread& thread) {
  const Triple& p = thread.ids.thread_position_in_grid;
  return "thread (" + std::to_string(p.x) + ", " + std::to_string(p.y) + ", " + std::to_string(p.z) + ")";
}

struct Grid {
  Triple threads, size, groups;  // threads of the grid, threads of a full threadgroup, threadgroups of the grid

  Grid(const uint* grid, const uint* group) {
    for (int d = 0; d < 3; ++d) {
      if (!grid[d] || !group[d]) fail("a grid or threadgroup without threads");
      set(threads, d, grid[d]);
      set(size, d, std::min(group[d], grid[d]));
      set(groups, d, (grid[d] + get(size, d) - 1) / get(size, d));
    }
    if (size_t(group[0]) * group[1] * group[2] > THREADS_LIMIT) fail("more than 1024 threads in a threadgroup");
  }
  uint count() const { return groups.x * groups.y * groups.z; }

  // Set up the threads of one threadgroup. The last one along a dimension may be smaller.
  void fill(uint index, Group& group, std::vector<Thread>& out) const {
    const Triple at = {index % groups.x, index / groups.x % groups.y, index / groups.x / groups.y};
    const Triple part = {std::min(size.x, threads.x - at.x * size.x), std::min(size.y, threads.y - at.y * size.y),
                         std::min(size.z, threads.z - at.z * size.z)};
    const uint count = part.x * part.y * part.z;
    group.start(count);
    out.resize(count);
    for (uint i = 0; i < count; ++i) {
      Ids& ids = out[i].ids;
      const Triple own = {i % part.x, i / part.x % part.y, i / part.x / part.y};
      ids.thread_position_in_threadgroup = own;
      ids.threadgroup_position_in_grid = at;
      ids.thread_position_in_grid = {at.x * size.x + own.x, at.y * size.y + own.y, at.z * size.z + own.z};
      ids.threads_per_threadgroup = part;
      ids.dispatch_threads_per_threadgroup = size;
      ids.threads_per_grid = ids.grid_size = threads;
      ids.threadgroups_per_grid = groups;
      ids.thread_index_in_threadgroup = i;
      ids.thread_index_in_simdgroup = i % SIMD_WIDTH;
      ids.simdgroup_index_in_threadgroup = i / SIMD_WIDTH;
      ids.simdgroups_per_threadgroup = (count + SIMD_WIDTH - 1) / SIMD_WIDTH;
      ids.dispatch_simdgroups_per_threadgroup = (size.x * size.y * size.z + SIMD_WIDTH - 1) / SIMD_WIDTH;
      ids.threads_per_simdgroup = ids.thread_execution_width = SIMD_WIDTH;
      out[i].group = &group;
      out[i].exchanges = 0;
    }
  }

 private:
  static uint get(const Triple& t, int d) { return d == 0 ? t.x : d == 1 ? t.y : t.z; }
  static void set(Triple& t, int d, uint value) { (d == 0 ? t.x : d == 1 ? t.y : t.z) = value; }
};

// Fill `indices` with 0 .. count-1 in the order in which they run.
inline void arrange(std::vector<uint>& indices, uint count, Order order, std::mt19937& random) {
  indices.resize(count);
  for (uint i = 0; i < count; ++i) indices[i] = order == REVERSE ? count - 1 - i : i;
  if (order == SHUFFLED) std::shuffle(indices.begin(), indices.end(), random);
}

// Run a kernel over the grid. `waits`: whether its threads wait for one another. Defined by fibers.cc or threads.cc.
void launch(const Grid& grid, Call call, void** buffers, bool waits, Order order);

}  // namespace msl
