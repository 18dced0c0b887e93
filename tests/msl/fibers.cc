// Runs the threads of a threadgroup as fibers of one real thread, in a chosen order, so that runs are deterministic.
#include <sys/mman.h>
#include <unistd.h>
#include <ucontext.h>

#include "launch.h"

namespace msl {
namespace {

enum State { READY, AT_BARRIER, AT_EXCHANGE, DONE };

struct Fiber {
  ucontext_t context;
  void* stack = nullptr;
  State state = READY;
  int line = 0;  // of the barrier or simd function where it waits
};

constexpr size_t STACK = 128 << 10;
const size_t PAGE = size_t(sysconf(_SC_PAGESIZE));

Group group;
std::vector<Thread> threads;
std::vector<Fiber> fibers;
std::vector<uint> groups_in_order, threads_in_order;
ucontext_t scheduler;
Call kernel;
void** arguments;

void enter() {
  Fiber& fiber = fibers[current - threads.data()];
  kernel(arguments, &current->ids);
  fiber.state = DONE;
  swapcontext(&fiber.context, &scheduler);
}

void* new_stack() {  // the page below it is unreadable
  char* low = static_cast<char*>(mmap(nullptr, PAGE + STACK, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (low == MAP_FAILED || mprotect(low + PAGE, STACK, PROT_READ | PROT_WRITE)) fail("no memory for a stack");
  return low + PAGE;
}

void start(Fiber& fiber) {
  if (!fiber.stack) fiber.stack = new_stack();
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = STACK;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, enter, 0);
  fiber.state = READY;
}

void wait(State state, int line) {
  Fiber& fiber = fibers[current - threads.data()];
  fiber.state = state;
  fiber.line = line;
  swapcontext(&fiber.context, &scheduler);
}

// If the threads begin .. end-1 all wait in this state at the same line, make them ready. Returns whether they do.
bool release(State state, uint begin, uint end) {
  for (uint i = begin; i < end; ++i)
    if (fibers[i].state != state || fibers[i].line != fibers[begin].line) return false;
  for (uint i = begin; i < end; ++i) fibers[i].state = READY;
  return true;
}

bool release_any() {
  if (release(AT_BARRIER, 0, group.count)) return true;
  bool released = false;
  for (uint i = 0; i < group.count; i += SIMD_WIDTH)
    released |= release(AT_EXCHANGE, i, std::min(group.count, i + SIMD_WIDTH));
  return released;
}

[[noreturn]] void stuck() {
  std::string message;
  for (uint i = 0; i < group.count; ++i) {  // report the first thread at each place
    const Fiber& fiber = fibers[i];
    const std::string place = fiber.state == DONE         ? " has returned"
                              : fiber.state == AT_BARRIER ? " is at the barrier of line " + std::to_string(fiber.line)
                                                          : " is in the simd function of line " + std::to_string(fiber.line);
    if (message.find(place + ";") == std::string::npos) message += " " + position(threads[i]) + place + ";";
  }
  current = nullptr;
  message.pop_back();
  fail("threads wait for one another forever:" + message);
}

void run_fibers(Order order, std::mt19937& random) {
  if (fibers.size() < group.count) fibers.resize(group.count);
  for (uint i = 0; i < group.count; ++i) start(fibers[i]);
  for (uint done = 0; done < group.count;) {
    arrange(threads_in_order, group.count, order, random);
    for (uint i : threads_in_order) {
      if (fibers[i].state != READY) continue;
      current = &threads[i];
      swapcontext(&scheduler, &fibers[i].context);
      done += fibers[i].state == DONE;
    }
    if (done < group.count && !release_any()) stuck();
  }
}

}  // namespace

void launch(const Grid& grid, Call call, void** buffers, bool waits, Order order) {
  std::mt19937 random(7);
  kernel = call;
  arguments = buffers;
  group.arrays.clear();
  arrange(groups_in_order, grid.count(), order, random);
  for (uint index : groups_in_order) {
    grid.fill(index, group, threads);
    if (waits) {
      run_fibers(order, random);
      continue;
    }
    arrange(threads_in_order, group.count, order, random);
    for (uint i : threads_in_order) {
      current = &threads[i];
      call(buffers, &current->ids);
    }
  }
  current = nullptr;
}

}  // namespace msl

extern "C" void msl_barrier(int line) { msl::wait(msl::AT_BARRIER, line); }

extern "C" const char* msl_exchange(const void* value, size_t size, int line, uint* lanes, uint* lane) {
  msl::Thread& thread = *msl::current;
  char* slots = thread.slots();
  *lanes = thread.lanes();
  *lane = thread.ids.thread_index_in_simdgroup;
  std::memcpy(slots + *lane * msl::SLOT, value, size);
  ++thread.exchanges;
  msl::wait(msl::AT_EXCHANGE, line);
  return slots;
}

extern "C" char* msl_threadgroup(int key, const char* name, size_t size) {
  return msl::group.array(key, name, size);
}
