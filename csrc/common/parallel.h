// Copyright the mmfast authors. SPDX-License-Identifier: Apache-2.0
//
// The CPU kernels' only door to threads: torch's own pool, so that torch.set_num_threads governs us too.
#pragma once
#include <cstdint>
#include <memory>
#include <type_traits>

namespace mmfast {

// A borrowed callable: no allocation, no std::function.
class RangeFn {
 public:
  template <class F>
  RangeFn(F& f)  // NOLINT: implicit on purpose
      : object_(const_cast<void*>(static_cast<const void*>(std::addressof(f)))),
        call_([](void* o, int64_t begin, int64_t end) { (*static_cast<F*>(o))(begin, end); }) {}
  void operator()(int64_t begin, int64_t end) const { call_(object_, begin, end); }

 private:
  void* object_;
  void (*call_)(void*, int64_t, int64_t);
};

int64_t num_threads();
void parallel_for_impl(int64_t n, int64_t grain, RangeFn f);

// Calls f(begin, end) on disjoint ranges that cover [0, n), at least `grain` long, one contiguous range a thread.
template <class F>
void parallel_for(int64_t n, int64_t grain, F&& f) {
  if (n <= 0) return;
  parallel_for_impl(n, grain, RangeFn(f));
}

}  // namespace mmfast
