// The address and thread lanes: a program under a sanitizer. It reads a job from stdin and writes outputs to stdout.
#include <cstdio>
#include <cstdlib>

#include "launch.h"

#if defined __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

extern "C" {  // from the kernel's translation unit
extern const int msl_waits;
void msl_call(void** buffers, const msl::Ids* ids);
}

namespace msl {
namespace {

struct Block {
  std::string name;
  char* data;
  size_t size;
  bool output;
};
std::vector<Block> blocks;

void read(void* to, size_t size) {
  if (size && std::fread(to, 1, size, stdin) != size) fail("the job ends too early");
}

uint64_t read_number() {
  uint64_t number;
  read(&number, sizeof number);
  return number;
}

// A heap block of exactly this size, so that the sanitizer knows its bounds.
char* new_block(const std::string& name, size_t size, bool output) {
  char* data = static_cast<char*>(std::malloc(size));
  if (size) std::memset(data, 0xff, size);
  blocks.push_back({name, data, size, output});
  return data;
}

#if defined __SANITIZE_ADDRESS__
void name_the_place() {  // the array nearest to the bad address
  const char* address = static_cast<const char*>(__asan_get_report_address());
  const Block* nearest = nullptr;
  ptrdiff_t least = 4096;
  for (const Block& block : blocks) {
    const ptrdiff_t distance = std::max(block.data - address, address - (block.data + block.size) + 1);
    if (distance < least) nearest = &block, least = distance;
  }
  if (nearest)
    std::fprintf(stderr, "msl: %s (%zu bytes), byte %td", nearest->name.c_str(), nearest->size,
                 address - nearest->data);
  if (nearest && current) std::fprintf(stderr, ", %s", position(*current).c_str());
  std::fprintf(stderr, "\n");
}
#endif

}  // namespace

void fail(const std::string& text) {
  std::fprintf(stderr, "msl: %s%s\n", text.c_str(), current ? (", " + position(*current)).c_str() : "");
  std::_Exit(2);
}

char* new_array(const std::string& name, size_t size) { return new_block("threadgroup array " + name, size, false); }

}  // namespace msl

int main() {
  using namespace msl;
#if defined __SANITIZE_ADDRESS__
  __sanitizer_set_death_callback(name_the_place);
#endif
  uint grid[3], group[3];
  for (uint& n : grid) n = uint(read_number());
  for (uint& n : group) n = uint(read_number());
  const Order order = Order(read_number());
  const uint64_t count = read_number();
  std::vector<void*> buffers;
  for (uint64_t i = 0; i < count; ++i) {
    std::string name(read_number(), ' ');
    read(&name[0], name.size());
    const size_t size = read_number();
    const bool output = read_number();
    buffers.push_back(new_block(name, size, output));
    if (!output) read(buffers.back(), size);
  }
  launch(Grid(grid, group), msl_call, buffers.data(), msl_waits, order);
  for (const Block& block : blocks)
    if (block.output) std::fwrite(block.data, 1, block.size, stdout);
  std::fflush(stdout);
  std::_Exit(0);  // skips the leak check
}
