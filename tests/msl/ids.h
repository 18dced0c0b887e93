// Position of a thread, under the names that Metal uses. Written by the runtime, read by the kernel's translation unit.
#pragma once

namespace msl {

struct Triple {
  unsigned x, y, z;
};

struct Ids {
  Triple thread_position_in_grid, thread_position_in_threadgroup, threadgroup_position_in_grid;
  Triple threads_per_threadgroup, dispatch_threads_per_threadgroup;
  Triple threads_per_grid, grid_size, threadgroups_per_grid;
  unsigned thread_index_in_threadgroup, thread_index_in_simdgroup, simdgroup_index_in_threadgroup;
  unsigned simdgroups_per_threadgroup, dispatch_simdgroups_per_threadgroup;
  unsigned threads_per_simdgroup, thread_execution_width;
};

}  // namespace msl
