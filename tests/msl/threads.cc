// Runs the threads of many threadgroups concurrently as real threads, for the thread sanitizer.
#include <barrier>
#include <mutex>
#include <thread>

#include "launch.h"

namespace msl {
namespace {

typedef std::barrier<> Barrier;

struct Wave {  // one of the threadgroups that run concurrently
  Group group;
  std::vector<Thread> threads;
  std::unique_ptr<Barrier> all;
  std::vector<std::unique_ptr<Barrier>> simdgroups;
};
thread_local Wave* wave = nullptr;
std::mutex arrays;

constexpr uint AT_ONCE = 1024;  // threads

void prepare(const Grid& grid, uint index, Wave& w) {
  grid.fill(index, w.group, w.threads);
  w.all = std::make_unique<Barrier>(w.group.count);
  for (uint i = 0; i < w.group.count; i += SIMD_WIDTH)
    w.simdgroups.push_back(std::make_unique<Barrier>(w.threads[i].lanes()));
}

void run(Wave& w, uint i, Call call, void** buffers) {
  wave = &w;
  current = &w.threads[i];
  call(buffers, &current->ids);
  w.simdgroups[i / SIMD_WIDTH]->arrive_and_drop();
  w.all->arrive_and_drop();
}

}  // namespace

void launch(const Grid& grid, Call call, void** buffers, bool, Order order) {
  std::mt19937 random(7);
  std::vector<uint> groups;
  arrange(groups, grid.count(), order, random);
  const uint step = std::max(1u, AT_ONCE / (grid.size.x * grid.size.y * grid.size.z));
  for (uint begin = 0; begin < groups.size(); begin += step) {
    const uint count = std::min(step, uint(groups.size()) - begin);
    std::vector<Wave> waves(count);
    std::vector<std::thread> running;
    for (uint i = 0; i < count; ++i) prepare(grid, groups[begin + i], waves[i]);
    for (Wave& w : waves)
      for (uint i = 0; i < w.group.count; ++i) running.emplace_back(run, std::ref(w), i, call, buffers);
    for (std::thread& thread : running) thread.join();
  }
}

}  // namespace msl

extern "C" void msl_barrier(int) { msl::wave->all->arrive_and_wait(); }

extern "C" const char* msl_exchange(const void* value, size_t size, int, uint* lanes, uint* lane) {
  msl::Thread& thread = *msl::current;
  char* slots = thread.slots();
  *lanes = thread.lanes();
  *lane = thread.ids.thread_index_in_simdgroup;
  std::memcpy(slots + *lane * msl::SLOT, value, size);
  ++thread.exchanges;
  msl::wave->simdgroups[thread.ids.simdgroup_index_in_threadgroup]->arrive_and_wait();
  return slots;
}

extern "C" char* msl_threadgroup(int key, const char* name, size_t size) {
  const std::lock_guard<std::mutex> lock(msl::arrays);
  return msl::wave->group.array(key, name, size);
}
