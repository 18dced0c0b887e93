// The guarded lane: a shared object in the caller's process. Every array lies between unreadable pages, inputs are
// read-only, outputs are filled with NaN before, and undefined behaviour traps and reports its line.
#include <csetjmp>
#include <csignal>
#include <cstdio>
#include <sys/mman.h>
#include <unistd.h>

#include "launch.h"

namespace msl {
namespace {

const size_t PAGE = size_t(sysconf(_SC_PAGESIZE));
constexpr size_t GUARD = size_t(16) << 30;  // covers a wrapped 32-bit index into floats; uses no memory

struct Region {
  std::string name;
  size_t size;
  bool output;
  char *base, *low, *high;  // the reserved range, and its readable pages low .. high-1
  char* data;
};

std::vector<Region> regions;
std::string message;
sigjmp_buf way_out;
void* volatile fault_address;

char* reserve(const std::string& name, size_t size, bool output, bool at_start) {
  const size_t pages = (std::max<size_t>(size, 1) + PAGE - 1) / PAGE * PAGE;
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  char* base = static_cast<char*>(mmap(nullptr, pages + 2 * GUARD, PROT_NONE, flags, -1, 0));
  if (base == MAP_FAILED) fail("no address space for " + name + " (is it limited?)");
  Region region = {name, size, output, base, base + GUARD, base + GUARD + pages, nullptr};
  if (mprotect(region.low, pages, PROT_READ | PROT_WRITE)) fail("no memory for " + name);
  std::memset(region.low, 0xff, pages);
  region.data = at_start ? region.low : region.high - size;
  regions.push_back(region);
  return region.data;
}

void release_all() {
  for (const Region& region : regions) munmap(region.base, region.high - region.base + GUARD);
  regions.clear();
}

std::string place(const char* address) {
  for (const Region& region : regions)
    if (address >= region.base && address < region.high + GUARD)
      return region.name + " (" + std::to_string(region.size) + " bytes), byte " +
             std::to_string(address - region.data);
  return "an address outside of all arrays";
}

// Detect writes outside an array but inside its pages.
void check_canaries() {
  for (const Region& region : regions) {
    if (!region.output) continue;
    for (const char* c = region.low; c < region.high; ++c) {
      const bool inside = c >= region.data && c < region.data + region.size;
      if (!inside && *c != char(0xff)) fail("write outside of " + place(c));
    }
  }
}

[[noreturn]] void leave() { siglongjmp(way_out, 1); }

void on_signal(int signal, siginfo_t* info, void*) {
  fault_address = info->si_addr;
  siglongjmp(way_out, signal);
}

class Signals {  // installs our signal handlers while a kernel runs
 public:
  Signals() {
    stack_t own{};
    own.ss_sp = stack_;
    own.ss_size = sizeof stack_;
    sigaltstack(&own, &old_stack_);
    struct sigaction action{};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    for (int i = 0; i < 4; ++i) sigaction(NUMBERS[i], &action, &old_[i]);
  }
  ~Signals() {
    for (int i = 0; i < 4; ++i) sigaction(NUMBERS[i], &old_[i], nullptr);
    sigaltstack(&old_stack_, nullptr);
  }

 private:
  static constexpr int NUMBERS[4] = {SIGSEGV, SIGBUS, SIGFPE, SIGALRM};
  static char stack_[64 << 10];
  stack_t old_stack_;
  struct sigaction old_[4];
};
char Signals::stack_[64 << 10];

}  // namespace

void fail(const std::string& text) {
  message = text;
  if (current) message += ", " + position(*current);
  leave();
}

char* new_array(const std::string& name, size_t size) {
  return reserve("threadgroup array " + name, size, true, false);
}

}  // namespace msl

struct Buffer {  // CBuffer in kernel.py has the same layout
  void* host;
  uint64_t size;
  const char* name;
  int output;
};

// Returns 0, or 1 with a message in `error`.
extern "C" int msl_run(msl::Call call, Buffer* buffers, int count, const uint* grid, const uint* group, int waits,
                       int order, int at_start, uint seconds, char* error, size_t error_size) {
  using namespace msl;
  static std::vector<void*> data;  // static, so that nothing leaks when a fault jumps out
  message.clear();
  current = nullptr;
  const Signals signals;
  const int signal = sigsetjmp(way_out, 1);
  if (!signal) {
    data.clear();
    for (int i = 0; i < count; ++i) {
      const Buffer& buffer = buffers[i];
      data.push_back(reserve(buffer.name, buffer.size, buffer.output, at_start));
      if (buffer.output) continue;
      std::memcpy(data[i], buffer.host, buffer.size);
      mprotect(regions[i].low, regions[i].high - regions[i].low, PROT_READ);
    }
    alarm(seconds);
    launch(Grid(grid, group), call, data.data(), waits, Order(order));
    check_canaries();
    for (int i = 0; i < count; ++i)
      if (buffers[i].output) std::memcpy(buffers[i].host, data[i], buffers[i].size);
  } else if (signal == SIGALRM) {
    message = "still running after " + std::to_string(seconds) + " seconds";
  } else if (message.empty()) {
    message = "signal " + std::to_string(signal) + ": " + place(static_cast<const char*>(fault_address));
    if (current) message += ", " + position(*current);
  }
  alarm(0);
  release_all();
  std::snprintf(error, error_size, "%s", message.c_str());
  return !message.empty();
}

// Handlers of the undefined behaviour sanitizer. Their first argument begins with the place in the source.
namespace {
struct Place {
  const char* file;
  uint32_t line, column;
};
[[noreturn]] void undefined(const char* what, const Place* place) {
  msl::fail(std::string(what) + " at " + place->file + ":" + std::to_string(place->line));
}
}  // namespace

#define UNDEFINED(name, what) \
  extern "C" [[noreturn]] void __ubsan_handle_##name##_abort(const Place* place) { undefined(what, place); }
UNDEFINED(out_of_bounds, "index out of bounds of a local array")
UNDEFINED(type_mismatch_v1, "misaligned or null access")
UNDEFINED(alignment_assumption, "misaligned access")
UNDEFINED(pointer_overflow, "pointer overflow")
UNDEFINED(add_overflow, "signed overflow in +")
UNDEFINED(sub_overflow, "signed overflow in -")
UNDEFINED(mul_overflow, "signed overflow in *")
UNDEFINED(negate_overflow, "signed overflow in negation")
UNDEFINED(divrem_overflow, "division by zero or overflow")
UNDEFINED(shift_out_of_bounds, "shift out of range")
UNDEFINED(float_cast_overflow, "float out of the integer's range")
UNDEFINED(load_invalid_value, "value that its type does not have")
UNDEFINED(vla_bound_not_positive, "array of no elements")
UNDEFINED(nonnull_arg, "null argument")
UNDEFINED(invalid_builtin, "invalid argument of a builtin")
extern "C" [[noreturn]] void __ubsan_handle_builtin_unreachable(const Place* p) { undefined("unreachable code", p); }
extern "C" [[noreturn]] void __ubsan_handle_missing_return(const Place* p) { undefined("no return value", p); }
