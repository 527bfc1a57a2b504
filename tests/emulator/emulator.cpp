// Copyright the mmfast authors. SPDX-License-Identifier: Apache-2.0
//
// Scheduling of the emulated threads and the exchange between the lanes of a warp.
//
// One fiber a CUDA thread, on one OS thread; blocks run one after another. A fiber runs until it waits at a barrier or a warp
// collective, then the next ready one runs; the last to arrive carries out the operation and makes the others ready. So the order is
// deterministic, and "nobody is ready" is exactly a deadlock, which is reported with every place somebody waits at.
//
// This file is compiled without instrumentation. What a sanitizer must know is told to it here: stack switches (AddressSanitizer), and
// for the race detector one TSan fiber a CUDA thread, ordered only by block barriers and __syncwarp. Shuffles order nothing, and blocks
// of one launch are ordered only with respect to the launch, so a race between two blocks shows as well.
#include "emulator.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <span>
#include <string>
#include <vector>

#include "../../csrc/common/dtype.h"

#ifdef EMULATOR_ADDRESS
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef EMULATOR_THREAD
#include <sanitizer/tsan_interface.h>
extern "C" void AnnotateIgnoreWritesBegin(const char*, int);
extern "C" void AnnotateIgnoreWritesEnd(const char*, int);
#endif

// Saves the callee-saved registers on the running stack, stores its pointer, and continues on another stack.
extern "C" void emulator_switch(void** save, void* load);
asm(R"(
.text
.globl emulator_switch
.hidden emulator_switch
.type emulator_switch,@function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch,.-emulator_switch
)");

namespace emulator {

Coordinates now;

namespace {

#ifdef EMULATOR_ADDRESS
constexpr size_t kStack = 256 * 1024;  // red zones around every local
#else
constexpr size_t kStack = 64 * 1024;
#endif
constexpr size_t kPage = 4096;
constexpr size_t kMaxShared = 227 * 1024, kMaxStatic = 48 * 1024;  // of sm_90, a block
constexpr size_t kMostCopies = 256;                                // cp.async under way in one thread
constexpr int kLaunchFailure = 719, kInvalidValue = 1;
constexpr uint64_t kPoison = ~uint64_t{0};

struct Pending {
  Copy copy;
  int group;
};

struct Fiber {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  dim3 index;
  int lane = 0, warp = 0;
  bool done = false;
  Fiber* next_ready = nullptr;
  Request* request = nullptr;  // posted and not yet carried out
  bool at_barrier = false;
  Location where;               // of the barrier
  Pending copies[kMostCopies];  // cp.async under way, a ring
  unsigned oldest = 0, issued = 0;
  int groups = 0;              // committed so far
  void* fake_stack = nullptr;  // AddressSanitizer
  void* tsan = nullptr;
};

struct StaticVariable {
  const void* tag;
  char* data;
};

// No fiber allocates or moves a list: memory that one fiber allocates and another frees would look like a race.
struct Block {
  std::span<Fiber> fibers;
  Fiber *first_ready = nullptr, *last_ready = nullptr;
  int alive = 0, waiting = 0, votes = 0, last_count = 0;
  const std::function<void()>* kernel = nullptr;
  std::vector<StaticVariable> statics;
  char *dynamic_data = nullptr, *static_data = nullptr;
  size_t static_used = 0;
  Fiber main;
  const void* main_stack = nullptr;
  size_t main_stack_size = 0;
  bool failed = false;
};

Block* block = nullptr;
Fiber* current = nullptr;
char barrier_token, warp_token[32], launch_token, fence_token;  // addresses the race detector orders threads by

void acquire([[maybe_unused]] void* token) {
#ifdef EMULATOR_THREAD
  __tsan_acquire(token);
#endif
}
void release([[maybe_unused]] void* token) {
#ifdef EMULATOR_THREAD
  __tsan_release(token);
#endif
}

void switch_to(Fiber& to) {
  Fiber& from = *current;
#ifdef EMULATOR_ADDRESS
  const bool home = &to == &block->main;
  __sanitizer_start_switch_fiber(from.done ? nullptr : &from.fake_stack, home ? block->main_stack : to.stack,
                                 home ? block->main_stack_size : kStack);
#endif
#ifdef EMULATOR_THREAD
  __tsan_switch_to_fiber(to.tsan, __tsan_switch_to_fiber_no_sync);
#endif
  current = &to;
  now.thread = to.index;
  now.lane = to.lane;
  emulator_switch(&from.stack_pointer, to.stack_pointer);
#ifdef EMULATOR_ADDRESS
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

std::string coordinates(const dim3& d) {
  char text[64];
  std::snprintf(text, sizeof(text), "(%u, %u, %u)", d.x, d.y, d.z);
  return text;
}

std::string place(const Location& where) {
  const std::string file = where.file_name();
  return file.substr(file.find_last_of('/') + 1) + ":" + std::to_string(where.line());
}

const char* name(Op op) {
  switch (op) {
    case Op::sync:
      return "__syncwarp";
    case Op::shuffle:
      return "a shuffle";
    case Op::ballot:
      return "a vote";
    case Op::match:
      return "__match_any_sync";
    case Op::reduce:
      return "a warp reduction";
    case Op::ldmatrix:
      return "ldmatrix";
    default:
      return "mma";
  }
}

// Abandons the block: the fibers' stacks are simply not run any further.
[[noreturn]] void abandon(const std::string& what) {
  std::fprintf(stderr, "emulator: block %s thread %s: %s\n", coordinates(now.block).c_str(), coordinates(current->index).c_str(),
               what.c_str());
  block->failed = true;
  switch_to(block->main);
  std::abort();  // never resumed
}

[[noreturn]] void deadlock() {
  // One line a place, with the number of threads there and the first of them.
  std::string what = "divergent collective: the threads of this block wait for each other";
  struct Place {
    std::string text;
    int count;
  };
  std::vector<Place> places;
  for (const Fiber& f : block->fibers) {
    if (f.done) continue;
    const std::string text = f.at_barrier ? "__syncthreads at " + place(f.where) : name(f.request->op) + (" at " + place(f.request->where));
    auto seen = std::find_if(places.begin(), places.end(), [&](const Place& p) { return p.text.substr(0, text.size()) == text; });
    if (seen == places.end()) places.push_back({text + ", first thread " + coordinates(f.index), 1});
    else ++seen->count;
  }
  for (const Place& p : places) what += "\n  " + std::to_string(p.count) + " at " + p.text;
  abandon(what);
}

void make_ready(Fiber& f) {
  f.next_ready = nullptr;
  (block->first_ready ? block->last_ready->next_ready : block->first_ready) = &f;
  block->last_ready = &f;
}

// Runs somebody else until this fiber is made ready again.
void wait() {
  if (!block->first_ready) deadlock();
  Fiber& next = *block->first_ready;
  block->first_ready = next.next_ready;
  switch_to(next);
}

// Opens the barrier when every live thread has arrived. `self` keeps running.
void open_barrier(const Fiber* self) {
  if (block->alive == 0 || block->waiting < block->alive) return;
  block->waiting = 0;
  block->last_count = block->votes;
  block->votes = 0;
  for (Fiber& f : block->fibers)
    if (f.at_barrier) {
      f.at_barrier = false;
      if (&f != self) make_ready(f);
    }
}

// ---- warp collectives

struct Lanes {
  Fiber* first;
  int count;
  Request* at[32];  // null where a lane takes no part
  unsigned mask;    // lanes that take part
};

float truncate(double v) {
  float f = float(v);
  if (std::fabs(double(f)) > std::fabs(v)) f = nextafterf(f, 0.0f);
  return f;
}
// Tensor cores do not promise round to nearest; MMFAST_EMULATE_TRUNCATE=1 cuts every accumulation towards zero instead.
const bool kTruncate = [] {
  const char* v = std::getenv("MMFAST_EMULATE_TRUNCATE");
  return v && *v == '1';
}();

struct F16Table {
  float value[65536];
  F16Table() {
    for (int i = 0; i < 65536; ++i) value[i] = mmfast::f16_to_float(uint16_t(i));
  }
};

template <int K, class Element>
void multiply(const Lanes& lanes, Element element) {
  // `element(words, i)` is value i of the lane's fragment: pairs of 16-bit values, or single 32-bit ones (K = 8).
  constexpr int kPer = K == 16 ? 2 : 1;  // values a word
  float a[16][K];
  float b[K][8];
  for (int l = 0; l < 32; ++l) {
    const Request& r = *lanes.at[l];
    const int g = l / 4, t = l % 4;
    for (int w = 0; w < 4; ++w)
      for (int h = 0; h < kPer; ++h) a[g + 8 * (w % 2)][(w / 2) * (K / 2) + t * kPer + h] = element(r.a[w], h);
    for (int w = 0; w < 2; ++w)
      for (int h = 0; h < kPer; ++h) b[w * (K / 2) + t * kPer + h][g] = element(r.b[w], h);
  }
  double sum[16][8] = {};
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < K; ++k)
      for (int j = 0; j < 8; ++j) sum[i][j] += double(a[i][k]) * double(b[k][j]);
  for (int l = 0; l < 32; ++l) {
    float* c = lanes.at[l]->c;
    for (int i = 0; i < 4; ++i) {
      const double v = double(c[i]) + sum[l / 4 + 8 * (i / 2)][(l % 4) * 2 + i % 2];
      c[i] = kTruncate ? truncate(v) : float(v);
    }
  }
}

void carry_out(const Lanes& lanes, const Request& first) {
  const auto each = [&](auto f) {
    for (int l = 0; l < 32; ++l)
      if (lanes.at[l]) f(l, *lanes.at[l]);
  };
  switch (first.op) {
    case Op::sync:
      break;
    case Op::shuffle:
      // Reading a lane that takes no part is undefined on the device; here it gives NaN.
      each([&](int, Request& r) { r.result = lanes.at[r.source & 31] ? lanes.at[r.source & 31]->value : kPoison; });
      break;
    case Op::ballot: {
      uint64_t votes = 0;
      each([&](int l, Request& r) { votes |= uint64_t(r.value != 0) << l; });
      each([&](int, Request& r) { r.result = votes; });
      break;
    }
    case Op::match:
      each([&](int, Request& r) {
        r.result = 0;
        each([&](int m, Request& other) { r.result |= uint64_t(other.value == r.value) << m; });
      });
      break;
    case Op::reduce: {
      bool any = false;
      uint64_t total = 0;
      each([&](int, Request& r) {
        total = any ? r.combine(total, r.value) : r.value;
        any = true;
      });
      each([&](int, Request& r) { r.result = total; });
      break;
    }
    case Op::ldmatrix:
      // Lane l holds, of each matrix, row l / 4 and columns 2 (l % 4), + 1; transposed, the roles of row and column swap.
      each([&](int l, Request& r) {
        for (int m = 0; m < first.count; ++m) {
          const auto at = [&](int row, int column) { return uint32_t(lanes.at[8 * m + row]->row[column]); };
          const int i = l / 4, j = 2 * (l % 4);
          r.fragment[m] = first.transpose ? at(j, i) | at(j + 1, i) << 16 : at(i, j) | at(i, j + 1) << 16;
        }
      });
      break;
    case Op::mma_f16: {
      static const F16Table table;
      multiply<16>(lanes, [](uint32_t word, int h) { return table.value[(word >> (16 * h)) & 0xffff]; });
      break;
    }
    case Op::mma_bf16:
      multiply<16>(lanes, [](uint32_t word, int h) { return mmfast::bf16_to_float(uint16_t(word >> (16 * h))); });
      break;
    case Op::mma_tf32:
      multiply<8>(lanes, [](uint32_t word, int) { return mmfast::bits_float(word & 0xffffe000u); });
      break;
  }
}

bool same_place(const Location& a, const Location& b) {
  return a.line() == b.line() && a.column() == b.column() && !strcmp(a.file_name(), b.file_name());
}

// Carries out the collective that `request` belongs to if every live lane of its mask has arrived. `self` keeps running.
bool try_collective(int warp, const Request& request, const Fiber* self) {
  Lanes lanes{};
  lanes.first = &block->fibers[size_t(warp) * 32];
  lanes.count = std::min<int>(32, int(block->fibers.size()) - warp * 32);
  for (int l = 0; l < 32; ++l) {
    if (!(request.mask >> l & 1)) continue;
    if (l >= lanes.count || lanes.first[l].done) {
      if (request.op >= Op::ldmatrix)
        abandon("divergent collective: " + std::string(name(request.op)) + " at " + place(request.where) +
                " needs all 32 lanes of the warp");
      continue;
    }
    Request* posted = lanes.first[l].request;
    if (!posted) return false;
    if (posted->mask != request.mask || posted->op != request.op || !same_place(posted->where, request.where))
      abandon("divergent collective: " + std::string(name(request.op)) + " at " + place(request.where) + " while thread " +
              coordinates(lanes.first[l].index) + " is in " + name(posted->op) + " at " + place(posted->where));
    lanes.at[l] = posted;
    lanes.mask |= 1u << l;
  }
  carry_out(lanes, request);
  for (int l = 0; l < lanes.count; ++l)
    if (lanes.at[l]) {
      lanes.first[l].request = nullptr;
      if (&lanes.first[l] != self) make_ready(lanes.first[l]);
    }
  return true;
}

void fiber_main() {
#ifdef EMULATOR_ADDRESS
  const void* stack;
  size_t size;
  __sanitizer_finish_switch_fiber(nullptr, &stack, &size);
  if (!block->main_stack) block->main_stack = stack, block->main_stack_size = size;  // the first fiber is entered from there
#endif
  (*block->kernel)();
  release(&launch_token);
  current->done = true;
  --block->alive;
  // Threads that have left count as arrived, at the block's barrier and in their warp.
  open_barrier(nullptr);
  const int warp = current->warp;
  for (int l = 0; l < 32 && size_t(warp * 32 + l) < block->fibers.size(); ++l)
    if (Request* r = block->fibers[size_t(warp * 32 + l)].request; r && (r->mask >> current->lane & 1)) try_collective(warp, *r, nullptr);
  if (block->alive == 0) switch_to(block->main);
  wait();
  std::abort();  // never resumed
}

// Fiber stacks with a guard page below each. The race detector keys its history by address, so it gets fresh pages a block.
class Stacks {
 public:
  char* get(size_t count) {
    const size_t bytes = count * (kStack + kPage);
#ifdef EMULATOR_THREAD
    if (data_) munmap(data_, bytes_);
    data_ = nullptr;
#endif
    if (!data_ || bytes_ < bytes) {
      if (data_) munmap(data_, bytes_);
      data_ = static_cast<char*>(mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
      if (data_ == MAP_FAILED) std::abort();
      bytes_ = bytes;
      for (size_t i = 0; i < count; ++i) mprotect(data_ + i * (kStack + kPage), kPage, PROT_NONE);
    }
    return data_;
  }

 private:
  char* data_ = nullptr;
  size_t bytes_ = 0;
} stacks;

void start_fiber(Fiber& f, char* stack) {
  f.stack = stack;
  void** top = reinterpret_cast<void**>(stack + kStack) - 8;  // 16-byte aligned, as after a call
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&fiber_main);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  f.stack_pointer = top;
#ifdef EMULATOR_ADDRESS
  __asan_unpoison_memory_region(stack, kStack);
#endif
#ifdef EMULATOR_THREAD
  f.tsan = __tsan_create_fiber(0);
#endif
}

// Shared memory of one block: exactly as many bytes as asked for, from malloc, so that a step outside is a heap overflow to a sanitizer.
char* poisoned(size_t bytes) {
  char* p = static_cast<char*>(aligned_alloc(128, bytes ? (bytes + 127) / 128 * 128 : 128));
  memset(p, 0xff, bytes);
#ifdef EMULATOR_ADDRESS
  __asan_poison_memory_region(p + bytes, (bytes ? (bytes + 127) / 128 * 128 : 128) - bytes);
#endif
  return p;
}

bool run_block(dim3 index, dim3 dim, size_t shared_bytes, const std::function<void()>& kernel) {
  static std::vector<Fiber> pool;
  Block b;
  const size_t threads = size_t(dim.x) * dim.y * dim.z;
  if (pool.size() < threads) pool.resize(threads);
  b.fibers = std::span(pool).first(threads);
  b.statics.reserve(64);
  b.alive = int(threads);
  b.kernel = &kernel;
  b.dynamic_data = poisoned(shared_bytes);
  b.static_data = poisoned(kMaxStatic);
#ifdef EMULATOR_ADDRESS
  __asan_poison_memory_region(b.static_data, kMaxStatic);
#endif
  block = &b;
  current = &b.main;
  now.block = index;
#ifdef EMULATOR_THREAD
  b.main.tsan = __tsan_get_current_fiber();
#endif
  char* stack = stacks.get(threads);
  for (size_t i = 0; i < threads; ++i) {
    Fiber& f = b.fibers[i];
    f.index = dim3(unsigned(i % dim.x), unsigned(i / dim.x % dim.y), unsigned(i / (size_t(dim.x) * dim.y)));
    f.lane = int(i % 32);
    f.warp = int(i / 32);
    f.done = f.at_barrier = false;
    f.request = nullptr;
    f.oldest = f.issued = 0;
    f.groups = 0;
    f.fake_stack = nullptr;
    start_fiber(f, stack + i * (kStack + kPage) + kPage);
    if (i) make_ready(f);
  }
  switch_to(b.fibers[0]);
#ifdef EMULATOR_THREAD
  for (Fiber& f : b.fibers) __tsan_destroy_fiber(f.tsan);
#endif
  block = nullptr;
  current = nullptr;
#ifdef EMULATOR_ADDRESS
  __asan_unpoison_memory_region(b.static_data, kMaxStatic);
  __asan_unpoison_memory_region(b.dynamic_data, (shared_bytes + 127) / 128 * 128);
#endif
#ifdef EMULATOR_THREAD
  AnnotateIgnoreWritesBegin(__FILE__, __LINE__);  // freeing is no access: the block's threads are over, though not ordered before us
#endif
  free(b.dynamic_data);
  free(b.static_data);
#ifdef EMULATOR_THREAD
  AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
#endif
  return !b.failed;
}

}  // namespace

int run(dim3 grid, dim3 dim, size_t shared_bytes, const std::function<void()>& kernel) {
  const size_t threads = size_t(dim.x) * dim.y * dim.z;
  if (threads == 0 || threads > 1024 || shared_bytes > kMaxShared || grid.y > 65535 || grid.z > 65535 || grid.x > 0x7fffffffu) {
    std::fprintf(stderr, "emulator: no such launch: grid %s, block %s, %zu bytes of shared memory\n", coordinates(grid).c_str(),
                 coordinates(dim).c_str(), shared_bytes);
    return kInvalidValue;
  }
  now.grid_dim = grid;
  now.block_dim = dim;
  bool ok = true;
  for (unsigned z = 0; ok && z < grid.z; ++z)
    for (unsigned y = 0; ok && y < grid.y; ++y)
      for (unsigned x = 0; ok && x < grid.x; ++x) ok = run_block(dim3(x, y, z), dim, shared_bytes, kernel);
  acquire(&launch_token);
  return ok ? 0 : kLaunchFailure;
}

void* dynamic_shared() { return block->dynamic_data; }

void* static_shared(const void* tag, size_t size, size_t alignment) {
  for (const StaticVariable& v : block->statics)
    if (v.tag == tag) return v.data;
  constexpr size_t kGap = 64;  // stays poisoned, so a step past the end is seen
  const size_t begin = (block->static_used + kGap + alignment - 1) / alignment * alignment;
  if (begin + size + kGap > kMaxStatic) abandon("more than 48 KB of static shared memory");
  block->static_used = begin + size;
  char* data = block->static_data + begin;
#ifdef EMULATOR_ADDRESS
  __asan_unpoison_memory_region(data, size);
#endif
  block->statics.push_back({tag, data});
  return data;
}

int block_barrier(bool predicate, Location where) {
  release(&barrier_token);
  for (const Fiber& f : block->fibers)
    if (f.at_barrier) {
      if (!same_place(f.where, where))
        abandon("divergent collective: __syncthreads at " + place(where) + " while thread " + coordinates(f.index) +
                " is in __syncthreads at " + place(f.where));
      break;  // those that wait already agree among themselves
    }
  Fiber& self = *current;
  self.at_barrier = true;
  self.where = where;
  ++block->waiting;
  block->votes += predicate;
  open_barrier(&self);
  if (self.at_barrier) wait();
  acquire(&barrier_token);
  return block->last_count;
}

void warp_collective(Request& request) {
  Fiber& self = *current;
  if (!(request.mask >> self.lane & 1))
    abandon(std::string(name(request.op)) + " at " + place(request.where) + ": the mask leaves out the calling lane");
  const bool orders = request.op == Op::sync;
  if (orders) release(&warp_token[self.warp]);
  self.request = &request;
  if (!try_collective(self.warp, request, &self)) wait();
  if (orders) acquire(&warp_token[self.warp]);
}

void copy_issue(const Copy& c) {
  Fiber& f = *current;
  if (f.issued - f.oldest == kMostCopies) abandon("more than 256 cp.async under way in one thread");
  f.copies[f.issued++ % kMostCopies] = {c, f.groups};
}
void copy_commit() { ++current->groups; }
bool copy_next(int pending, Copy& c) {
  Fiber& f = *current;
  if (f.oldest == f.issued || f.copies[f.oldest % kMostCopies].group >= f.groups - pending) return false;
  c = f.copies[f.oldest++ % kMostCopies].copy;
  return true;
}

void fence() {
  release(&fence_token);
  acquire(&fence_token);
}

void fail(const char* what, Location where) { abandon(std::string(what) + " (" + place(where) + ")"); }

}  // namespace emulator
