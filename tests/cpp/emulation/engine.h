// Runs CUDA kernels on the CPU, one fiber per CUDA thread, blocks one after another.
//
// Every thread of a block runs until it waits (barrier, warp collective) or ends; then the next one
// runs. Nothing is preempted, so a run is repeatable, and the order in which threads get their turn
// (forward, reverse, seeded random) decides which missing barrier becomes a wrong number.
//
// This file knows fibers, scheduling, barriers, warp exchanges and shared memory.
#pragma once

#include <cxxabi.h>
#include <elf.h>
#include <link.h>
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define EMULATION_ASAN 1
#else
#define EMULATION_ASAN 0
#endif

// The hand-written switch exists because swapcontext makes a system call for the signal mask on
// every switch. -DEMULATION_UCONTEXT selects the portable way on x86-64 too.
#if !defined(__x86_64__) && !defined(EMULATION_UCONTEXT)
#define EMULATION_UCONTEXT
#endif
#ifdef EMULATION_UCONTEXT
#include <ucontext.h>
#endif

#ifndef EMULATION_STACK_BYTES
#define EMULATION_STACK_BYTES (EMULATION_ASAN ? 256 * 1024 : 64 * 1024)
#endif

// Every shared array starts at a multiple of this. It is above the 48 KiB a block may have as
// static shared memory, so each array is followed by an unused stretch, which serves as its red
// zone.
#define EMULATION_SHARED_ALIGNMENT 65536

// The scheduler sets these before a thread runs; all other CUDA names are in include/.
struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
  constexpr operator uint3() const { return {x, y, z}; }
};
inline uint3 threadIdx{}, blockIdx{};
inline dim3 blockDim, gridDim;

namespace emulation {

enum class Order { forward, reverse, random, warps };  // warps: each runs ahead as far as it can

// Where in the kernel source a collective was called.
struct Site {
  const char* file;
  int line;
};

constexpr unsigned warp_size = 32;
// NaN as float, double, half and bfloat16; -1 as an integer, which is out of range as an index.
constexpr unsigned char poison_byte = 0xFF;
constexpr unsigned char canary_byte = 0xA5;
constexpr std::size_t canary_bytes = 1024;
constexpr std::size_t max_static_shared = 48 * 1024;
constexpr std::size_t max_dynamic_shared = 227 * 1024;  // what sm_90 allows after opting in
constexpr std::size_t dynamic_storage_bytes = max_dynamic_shared + canary_bytes;

// ---------------------------------------------------------------------------------------------
// Fibers
// ---------------------------------------------------------------------------------------------

#ifdef EMULATION_UCONTEXT
using Context = ucontext_t;
inline void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }
#else
struct Context {
  void* stack_pointer = nullptr;
};

// Saves the registers that a System V x86-64 callee must preserve and continues on another stack.
// The floating-point control words are left alone: kernels do not change them.
__attribute__((naked, noinline, no_sanitize("address", "undefined"))) inline void
switch_stack_pointer(void** /*save*/, void* /*load*/) {
  asm("pushq %rbp\n\tpushq %rbx\n\tpushq %r12\n\tpushq %r13\n\tpushq %r14\n\tpushq %r15\n\t"
      "movq %rsp, (%rdi)\n\t"
      "movq %rsi, %rsp\n\t"
      "popq %r15\n\tpopq %r14\n\tpopq %r13\n\tpopq %r12\n\tpopq %rbx\n\tpopq %rbp\n\t"
      "ret");
}
inline void switch_context(Context& from, Context& to) {
  switch_stack_pointer(&from.stack_pointer, to.stack_pointer);
}
#endif

// A stack and the place to continue. A fiber never ends: its entry function runs one CUDA thread,
// goes back to the scheduler and runs the next one it is given, so stacks are set up only once.
struct Fiber {
  Context context;
  char* stack = nullptr;
  void* sanitizer_stack = nullptr;

  explicit Fiber(void (*entry)()) {
    const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    void* memory = mmap(nullptr, EMULATION_STACK_BYTES + page, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
      std::perror("emulation: no memory for a fiber's stack");
      std::abort();
    }
    mprotect(memory, page, PROT_NONE);  // a stack overflow faults instead of hitting a neighbour
    stack = static_cast<char*>(memory) + page;
#ifdef EMULATION_UCONTEXT
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = EMULATION_STACK_BYTES;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
#else
    // As switch_stack_pointer leaves it: six registers, the address to go to, and a return address
    // of zero, which ends stack traces. The entry point then sees the alignment of a normal call.
    void** top = reinterpret_cast<void**>(stack + EMULATION_STACK_BYTES);
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(entry);
    top -= 6;
    std::fill(top, top + 6, nullptr);
    context.stack_pointer = top;
#endif
  }
};

// ---------------------------------------------------------------------------------------------
// Symbols of the running program: which thread_local variables are shared arrays, kernel names
// ---------------------------------------------------------------------------------------------

struct Symbol {
  std::string name;
  char* address;
  std::size_t size;
};

inline std::string demangled(const std::string& name) {
  int status = 0;
  std::unique_ptr<char, void (*)(void*)> text(
      abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status), std::free);
  return status == 0 ? std::string(text.get()) : name;
}

struct Symbols {
  std::vector<Symbol> functions;
  std::vector<Symbol> thread_locals;  // sorted by address, of the thread that called load()

  void load() {
    struct Module {
      const char* inside;  // an address in the wanted module
      std::string path;
      std::uintptr_t base = 0;
      char* thread_locals = nullptr;
    } module{reinterpret_cast<const char*>(&demangled), "", 0, nullptr};
    dl_iterate_phdr(
        [](dl_phdr_info* info, std::size_t, void* data) {
          Module& wanted = *static_cast<Module*>(data);
          for (int i = 0; i < info->dlpi_phnum; ++i) {
            const auto& segment = info->dlpi_phdr[i];
            const char* begin = reinterpret_cast<const char*>(info->dlpi_addr + segment.p_vaddr);
            if (segment.p_type != PT_LOAD || wanted.inside < begin ||
                wanted.inside >= begin + segment.p_memsz)
              continue;
            wanted.path = info->dlpi_name[0] != '\0' ? info->dlpi_name : "/proc/self/exe";
            wanted.base = info->dlpi_addr;
            wanted.thread_locals = static_cast<char*>(info->dlpi_tls_data);
            return 1;
          }
          return 0;
        },
        &module);

    const std::vector<char> file = read(module.path);
    if (file.size() < sizeof(ElfW(Ehdr)) || std::memcmp(file.data(), ELFMAG, SELFMAG) != 0) {
      std::fprintf(stderr, "emulation: cannot read the symbols of %s\n", module.path.c_str());
      std::abort();
    }
    const auto* header = reinterpret_cast<const ElfW(Ehdr)*>(file.data());
    const auto* sections = reinterpret_cast<const ElfW(Shdr)*>(file.data() + header->e_shoff);
    bool found = false;
    for (int s = 0; s < header->e_shnum; ++s) {
      if (sections[s].sh_type != SHT_SYMTAB) continue;
      found = true;
      const char* names = file.data() + sections[sections[s].sh_link].sh_offset;
      const auto* entries = reinterpret_cast<const ElfW(Sym)*>(file.data() + sections[s].sh_offset);
      for (std::size_t i = 0; i < sections[s].sh_size / sizeof(ElfW(Sym)); ++i) {
        const auto& entry = entries[i];
        if (entry.st_shndx == SHN_UNDEF || entry.st_size == 0) continue;
        if ((entry.st_info & 0xf) == STT_TLS && module.thread_locals != nullptr)
          thread_locals.push_back(
              {names + entry.st_name, module.thread_locals + entry.st_value, entry.st_size});
        else if ((entry.st_info & 0xf) == STT_FUNC)
          functions.push_back({names + entry.st_name,
                               reinterpret_cast<char*>(module.base + entry.st_value),
                               entry.st_size});
      }
    }
    if (!found) {
      // Without it shared memory would silently keep what the block before left there.
      std::fprintf(stderr, "emulation: %s has no symbol table; link it without -s\n",
                   module.path.c_str());
      std::abort();
    }
    std::sort(thread_locals.begin(), thread_locals.end(),
              [](const Symbol& a, const Symbol& b) { return a.address < b.address; });
  }

  std::string function_at(const void* address) const {
    for (const Symbol& symbol : functions)
      if (symbol.address == address) return demangled(symbol.name);
    return "<unknown kernel>";
  }

 private:
  static std::vector<char> read(const std::string& path) {
    std::vector<char> bytes;
    if (std::FILE* file = std::fopen(path.c_str(), "rb")) {
      char buffer[1 << 16];
      for (std::size_t n; (n = std::fread(buffer, 1, sizeof buffer, file)) > 0;)
        bytes.insert(bytes.end(), buffer, buffer + n);
      std::fclose(file);
    }
    return bytes;
  }
};

// ---------------------------------------------------------------------------------------------
// Shared memory
// ---------------------------------------------------------------------------------------------

struct SharedArray {
  std::string name;
  char* begin;
  std::size_t size;      // bytes a kernel may use
  std::size_t capacity;  // bytes up to the next variable

  std::size_t red_zone() const {
    return EMULATION_ASAN ? capacity - size : std::min(capacity - size, canary_bytes);
  }
  // A red zone traps at once under AddressSanitizer; otherwise it holds a pattern that is checked
  // when the block ends, which finds writes only.
  void guard() const {
#if EMULATION_ASAN
    ASAN_UNPOISON_MEMORY_REGION(begin, size);
    ASAN_POISON_MEMORY_REGION(begin + size, red_zone());
#else
    std::memset(begin + size, canary_byte, red_zone());
#endif
  }
  bool intact() const {
#if !EMULATION_ASAN
    for (std::size_t i = 0; i < red_zone(); ++i)
      if (static_cast<unsigned char>(begin[size + i]) != canary_byte) return false;
#endif
    return true;
  }
  void poison() const { std::memset(begin, poison_byte, size); }
};

// Storage of one `extern __shared__` array; see EMULATION_DYNAMIC_SHARED.
struct DynamicShared {
  explicit DynamicShared(char* (*address)());
};

// ---------------------------------------------------------------------------------------------
// The engine
// ---------------------------------------------------------------------------------------------

enum class State { ready, waiting, finished };

struct Thread {
  uint3 index{};
  unsigned linear = 0;
  State state = State::finished;
  // What a waiting thread waits for.
  const char* operation = "";
  bool block_wide = false;
  unsigned mask = 0;     // lanes that take part, for warp operations
  unsigned variant = 0;  // operand size and width: must agree as well
  bool may_name_exited = false;
  Site site{};
  std::uint64_t value = 0;                 // what this thread brings
  std::uint64_t gathered[warp_size] = {};  // what all lanes of the mask brought
  int total = 0;                           // barrier: how many brought a non-zero value
};

class Engine {
 public:
  Order order = Order::forward;
  unsigned seed = 1;
  std::vector<char* (*)()> dynamic_arrays;

  Engine() { order_from_environment(); }

  void launch(dim3 grid, dim3 block, std::size_t dynamic_bytes, const void* kernel,
              void (*invoke)(void*), void* arguments) {
    if (current_ != nullptr) fail("a kernel launched from inside a kernel is not emulated");
    prepare(kernel);
    gridDim = grid;
    blockDim = block;
    invoke_ = invoke;
    arguments_ = arguments;
    const std::vector<SharedArray> shared = shared_arrays(dynamic_bytes);
    for (const SharedArray& array : shared) array.guard();

    const std::size_t blocks = std::size_t(grid.x) * grid.y * grid.z;
    threads_.assign(std::size_t(block.x) * block.y * block.z, Thread());
    while (fibers_.size() < threads_.size()) fibers_.emplace_back(&Engine::fiber_main);
    generator_.seed(seed);
    turn_.resize(threads_.size());
    std::vector<std::size_t> block_order(blocks);
    std::iota(block_order.begin(), block_order.end(), std::size_t(0));
    if (order == Order::reverse) std::reverse(block_order.begin(), block_order.end());
    if (order == Order::random) std::shuffle(block_order.begin(), block_order.end(), generator_);
    for (std::size_t b : block_order) {
      blockIdx = {unsigned(b % grid.x), unsigned(b / grid.x % grid.y),
                  unsigned(b / grid.x / grid.y)};
      for (const SharedArray& array : shared) array.poison();
      run_block();
      for (const SharedArray& array : shared)
        if (!array.intact())
          fail("kernel %s, block %s wrote past the end of shared array %s (%zu bytes)",
               kernel_name().c_str(), text(blockIdx).c_str(), array.name.c_str(), array.size);
    }
  }

  // __syncthreads and its counting variants; returns how many threads brought a non-zero value.
  int barrier(const char* operation, bool value, Site site) {
    Thread& self = running(operation, site);
    // The CUDA guide allows a barrier in a branch only if the whole block takes the same branch, so
    // all threads must come to the same line; comparing with one of those that wait is enough.
    if (at_barrier_ == 0) first_at_barrier_ = &self;
    const Thread& first = *first_at_barrier_;
    if (&first != &self &&
        (std::strcmp(first.operation, operation) != 0 || !same(first.site, site)))
      fail_thread(self, "divergent barrier: reached %s at %s while thread %s waits at %s at %s",
                  operation, text(site).c_str(), text(first.index).c_str(), first.operation,
                  text(first.site).c_str());
    wait_at(self, operation, site);
    self.block_wide = true;
    self.value = value ? 1 : 0;
    ++at_barrier_;
    release_barrier();
    switch_to_scheduler(self);
    return self.total;
  }

  // The base of every warp operation: waits until all lanes of the mask have come to the same
  // operation, then gives each of them what the others brought, indexed by lane. Lanes outside the
  // mask read as poison.
  const std::uint64_t* exchange(const char* operation, unsigned variant, unsigned mask,
                                std::uint64_t value, Site site, bool may_name_exited = false) {
    Thread& self = running(operation, site);
    const unsigned lane = self.linear % warp_size;
    wait_at(self, operation, site);
    self.block_wide = false;
    self.mask = mask;
    self.variant = variant;
    self.value = value;
    self.may_name_exited = may_name_exited;
    if ((mask >> lane & 1u) == 0)
      fail_thread(self, "%s at %s: mask 0x%08x does not name the calling lane %u", operation,
                  text(site).c_str(), mask, lane);
    for (unsigned other = 0; !may_name_exited && other < warp_size; ++other) {
      if ((mask >> other & 1u) == 0 || alive(lane_of(self, other))) continue;
      fail_thread(self, "%s at %s: mask 0x%08x names lane %u, which %s", operation,
                  text(site).c_str(), mask, other,
                  lane_of(self, other) ? "has exited" : "this block does not have");
    }
    release_warp(self);
    switch_to_scheduler(self);
    return self.gathered;
  }

  // Called by atomics and by __nanosleep: a thread may be spinning on what another has to write.
  void maybe_spinning() {
    if (current_ == nullptr) return;  // host code may call a shared header's function
    if (++atomics_since_progress_ > 20'000'000)
      fail_thread(*current_,
                  "livelock: atomics without end; it may spin on what another block must write");
    const bool random_yield = order == Order::random && (generator_() & 7u) == 0;
    if (random_yield || atomics_since_progress_ % 1000 == 0) switch_to_scheduler(*current_);
  }

  [[noreturn]] void trap(const char* what, Site site) {
    if (current_ != nullptr) fail_thread(*current_, "%s at %s", what, text(site).c_str());
    fail("%s at %s, outside of a kernel", what, text(site).c_str());
  }

  [[noreturn]] __attribute__((format(printf, 2, 3))) void fail(const char* format, ...) {
    std::va_list arguments;
    va_start(arguments, format);
    std::fputs("emulation: ", stderr);
    std::vfprintf(stderr, format, arguments);
    std::fputs("\n", stderr);
    va_end(arguments);
    std::fflush(nullptr);
    std::abort();
  }

 private:
  std::vector<Thread> threads_;
  std::deque<Fiber> fibers_;  // a deque, because a ucontext must not move
  std::vector<std::size_t> turn_;
  std::mt19937 generator_;
  Symbols symbols_;
  bool loaded_ = false;
  pthread_t owner_{};
  const void* kernel_ = nullptr;
  void (*invoke_)(void*) = nullptr;
  void* arguments_ = nullptr;
  Thread* current_ = nullptr;
  Context scheduler_{};
  const void* scheduler_stack_ = nullptr;
  std::size_t scheduler_stack_bytes_ = 0;
  unsigned live_ = 0;
  unsigned at_barrier_ = 0;
  const Thread* first_at_barrier_ = nullptr;  // valid while at_barrier_ > 0
  unsigned long atomics_since_progress_ = 0;

  void order_from_environment();

  void prepare(const void* kernel) {
    kernel_ = kernel;
    if (!loaded_) {
      symbols_.load();
      owner_ = pthread_self();
      loaded_ = true;
    }
    // Shared memory is thread_local, and its addresses were looked up for one thread.
    if (!pthread_equal(owner_, pthread_self()))
      fail("all kernels of a process must be launched from the same host thread");
  }

  std::vector<SharedArray> shared_arrays(std::size_t dynamic_bytes) {
    std::vector<SharedArray> arrays;
    const auto& symbols = symbols_.thread_locals;
    for (std::size_t i = 0; i < symbols.size(); ++i) {
      char* begin = symbols[i].address;
      if (reinterpret_cast<std::uintptr_t>(begin) % EMULATION_SHARED_ALIGNMENT != 0) continue;
      bool is_dynamic = false;
      for (char* (*address)() : dynamic_arrays) is_dynamic |= address() == begin;
      if (is_dynamic) {
        arrays.push_back({demangled(symbols[i].name), begin, dynamic_bytes, symbols[i].size});
        continue;
      }
      if (symbols[i].size > max_static_shared)
        fail("shared array %s has %zu bytes; static shared memory ends at %zu",
             demangled(symbols[i].name).c_str(), symbols[i].size, max_static_shared);
      // What lies behind the last variable is padding of this program's block only where the block
      // ends at the thread pointer, as on x86-64.
      char* next = begin + symbols[i].size;
      if (i + 1 < symbols.size()) next = std::max(next, symbols[i + 1].address);
#ifdef __x86_64__
      else
        next = begin + EMULATION_SHARED_ALIGNMENT;
#endif
      arrays.push_back({demangled(symbols[i].name), begin, symbols[i].size,
                        static_cast<std::size_t>(next - begin)});
    }
    if (dynamic_bytes > 0 && dynamic_arrays.empty())
      fail(
          "kernel %s wants %zu bytes of dynamic shared memory, but the test has no "
          "EMULATION_DYNAMIC_SHARED",
          kernel_name().c_str(), dynamic_bytes);
    return arrays;
  }

  void run_block() {
    for (std::size_t t = 0; t < threads_.size(); ++t) {
      threads_[t].linear = static_cast<unsigned>(t);
      threads_[t].index = {unsigned(t % blockDim.x), unsigned(t / blockDim.x % blockDim.y),
                           unsigned(t / blockDim.x / blockDim.y)};
      threads_[t].state = State::ready;
      turn_[t] = order == Order::reverse ? threads_.size() - 1 - t : t;
    }
    live_ = static_cast<unsigned>(threads_.size());
    at_barrier_ = 0;
    atomics_since_progress_ = 0;
    while (live_ > 0) {
      if (order == Order::random) std::shuffle(turn_.begin(), turn_.end(), generator_);
      bool moved = false;
      for (std::size_t t : turn_) {
        if (threads_[t].state != State::ready) continue;
        moved = true;
        resume(threads_[t]);
        if (order == Order::warps) run_warp_ahead(t / warp_size * warp_size);
      }
      if (!moved) fail_deadlock();
    }
  }

  // In the other orders a shuffle lets every warp catch up, which hides a barrier that is missing
  // between a read of shared memory and the next write to it.
  void run_warp_ahead(std::size_t first) {
    const std::size_t last = std::min(first + warp_size, threads_.size());
    for (bool moved = true; moved;) {
      moved = false;
      for (std::size_t t = first; t < last; ++t) {
        if (threads_[t].state != State::ready) continue;
        moved = true;
        resume(threads_[t]);
      }
    }
  }

  void resume(Thread& thread) {
    threadIdx = thread.index;
    current_ = &thread;
    Fiber& fiber = fibers_[thread.linear];
#if EMULATION_ASAN
    void* own = nullptr;
    __sanitizer_start_switch_fiber(&own, fiber.stack, EMULATION_STACK_BYTES);
#endif
    switch_context(scheduler_, fiber.context);
#if EMULATION_ASAN
    __sanitizer_finish_switch_fiber(own, nullptr, nullptr);
#endif
    current_ = nullptr;
  }

  void switch_to_scheduler(Thread& thread) {
    Fiber& fiber = fibers_[thread.linear];
#if EMULATION_ASAN
    __sanitizer_start_switch_fiber(&fiber.sanitizer_stack, scheduler_stack_,
                                   scheduler_stack_bytes_);
#endif
    switch_context(fiber.context, scheduler_);
    arrived(fiber);
  }

  void arrived([[maybe_unused]] Fiber& fiber) {
#if EMULATION_ASAN
    __sanitizer_finish_switch_fiber(fiber.sanitizer_stack, &scheduler_stack_,
                                    &scheduler_stack_bytes_);
#endif
  }

  static void fiber_main();

  void finish(Thread& thread) {
    thread.state = State::finished;
    --live_;
    atomics_since_progress_ = 0;
    for (unsigned lane = 0; lane < warp_size; ++lane) {
      Thread* other = lane_of(thread, lane);
      if (other == nullptr || other->state != State::waiting || other->block_wide) continue;
      if ((other->mask >> (thread.linear % warp_size) & 1u) == 0) continue;
      if (!other->may_name_exited)
        fail_thread(thread, "exited, but thread %s waits for it at %s (mask 0x%08x) at %s",
                    text(other->index).c_str(), other->operation, other->mask,
                    text(other->site).c_str());
      release_warp(*other);
    }
    release_barrier();
  }

  Thread& running(const char* operation, Site site) {
    if (current_ == nullptr)
      fail("%s at %s was called outside of a kernel", operation, text(site).c_str());
    return *current_;
  }

  void wait_at(Thread& thread, const char* operation, Site site) {
    thread.state = State::waiting;
    thread.operation = operation;
    thread.site = site;
    atomics_since_progress_ = 0;
  }

  void release_barrier() {
    if (at_barrier_ == 0 || at_barrier_ < live_) return;
    int total = 0;
    for (const Thread& thread : threads_)
      if (thread.state == State::waiting) total += static_cast<int>(thread.value);
    for (Thread& thread : threads_) {
      if (thread.state != State::waiting) continue;
      thread.total = total;
      thread.state = State::ready;
    }
    at_barrier_ = 0;
  }

  void release_warp(const Thread& one) {
    std::uint64_t values[warp_size];
    for (unsigned lane = 0; lane < warp_size; ++lane) {
      values[lane] = ~std::uint64_t(0);
      if ((one.mask >> lane & 1u) == 0) continue;
      const Thread* other = lane_of(one, lane);
      if (!alive(other)) continue;  // only where that is allowed
      if (other->state != State::waiting || other->block_wide || other->mask != one.mask ||
          other->variant != one.variant || std::strcmp(other->operation, one.operation) != 0)
        return;
      values[lane] = other->value;
    }
    for (unsigned lane = 0; lane < warp_size; ++lane) {
      Thread* other = lane_of(one, lane);
      if ((one.mask >> lane & 1u) == 0 || !alive(other)) continue;
      std::copy(values, values + warp_size, other->gathered);
      other->state = State::ready;
    }
  }

  Thread* lane_of(const Thread& thread, unsigned lane) {
    const std::size_t t = thread.linear / warp_size * warp_size + lane;
    return t < threads_.size() ? &threads_[t] : nullptr;
  }

  static bool alive(const Thread* thread) {
    return thread != nullptr && thread->state != State::finished;
  }

  static bool same(Site a, Site b) { return a.line == b.line && std::strcmp(a.file, b.file) == 0; }

  static std::string text(uint3 i) {
    return "(" + std::to_string(i.x) + "," + std::to_string(i.y) + "," + std::to_string(i.z) + ")";
  }
  static std::string text(Site site) {
    return std::string(site.file) + ":" + std::to_string(site.line);
  }
  std::string kernel_name() const { return symbols_.function_at(kernel_); }

  [[noreturn]] __attribute__((format(printf, 3, 4))) void fail_thread(const Thread& thread,
                                                                      const char* format, ...) {
    char message[1024];
    std::va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(message, sizeof message, format, arguments);
    va_end(arguments);
    fail("kernel %s, block %s, thread %s: %s", kernel_name().c_str(), text(blockIdx).c_str(),
         text(thread.index).c_str(), message);
  }

  // Every live thread waits and no group is complete: a divergent barrier, or a warp operation
  // whose lanes are at different operations or brought different masks.
  [[noreturn]] void fail_deadlock() {
    std::string message;
    std::vector<bool> told(threads_.size(), false);
    for (std::size_t t = 0; t < threads_.size(); ++t) {
      const Thread& first = threads_[t];
      if (first.state != State::waiting || told[t]) continue;
      unsigned count = 0;
      for (std::size_t u = t; u < threads_.size(); ++u) {
        const Thread& other = threads_[u];
        if (other.state != State::waiting || other.block_wide != first.block_wide ||
            other.mask != first.mask || other.variant != first.variant ||
            std::strcmp(other.operation, first.operation) != 0 || !same(other.site, first.site))
          continue;
        told[u] = true;
        ++count;
      }
      char mask[32] = "";
      if (!first.block_wide) std::snprintf(mask, sizeof mask, " (mask 0x%08x)", first.mask);
      message += "\n  " + std::to_string(count) + " thread(s), the first " + text(first.index) +
                 ", at " + first.operation + mask + " at " + text(first.site);
    }
    fail("kernel %s, block %s: deadlock, %u live thread(s) wait and none can go on:%s",
         kernel_name().c_str(), text(blockIdx).c_str(), live_, message.c_str());
  }
};

inline Engine& engine() {
  // Never destroyed: a static's destructor may still launch a kernel.
  static Engine* instance = new Engine;
  return *instance;
}

inline void Engine::fiber_main() {
  Engine& self = engine();
  Fiber& fiber = self.fibers_[self.current_->linear];
  self.arrived(fiber);
  for (;;) {
    self.invoke_(self.arguments_);
    Thread& thread = *self.current_;
    self.finish(thread);
    self.switch_to_scheduler(thread);
  }
}

inline DynamicShared::DynamicShared(char* (*address)()) {
  engine().dynamic_arrays.push_back(address);
}

// The order of threads and of blocks for the launches that follow. `seed` matters for random only.
inline void set_order(Order order, unsigned seed = 1) {
  engine().order = order;
  engine().seed = seed;
}

inline std::string order_name() {
  if (engine().order == Order::random) return "random:" + std::to_string(engine().seed);
  if (engine().order == Order::warps) return "warps";
  return engine().order == Order::forward ? "forward" : "reverse";
}

// EMULATION_ORDER=forward | reverse | warps | random | random:SEED, for programs that do not call
// set_order.
inline void Engine::order_from_environment() {
  const char* wanted = std::getenv("EMULATION_ORDER");
  if (wanted == nullptr || std::strcmp(wanted, "forward") == 0) return;
  if (std::strcmp(wanted, "reverse") == 0) {
    order = Order::reverse;
  } else if (std::strcmp(wanted, "warps") == 0) {
    order = Order::warps;
  } else if (std::strncmp(wanted, "random", 6) == 0 && (wanted[6] == '\0' || wanted[6] == ':')) {
    order = Order::random;
    if (wanted[6] == ':') seed = static_cast<unsigned>(std::strtoul(wanted + 7, nullptr, 10));
  } else {
    fail("EMULATION_ORDER=%s: expected forward, reverse, warps, random or random:SEED", wanted);
  }
}

// Calls the function once per order: forward, reverse, warps and `seeds` random ones. Whatever it
// checks must hold in all of them.
template <class Function>
void for_each_order(Function function, unsigned seeds = 3) {
  const Order order = engine().order;
  const unsigned seed = engine().seed;
  set_order(Order::forward);
  function();
  set_order(Order::reverse);
  function();
  set_order(Order::warps);
  function();
  for (unsigned s = 1; s <= seeds; ++s) {
    set_order(Order::random, s);
    function();
  }
  set_order(order, seed);
}

}  // namespace emulation

// Gives `extern __shared__ type name[];` its storage. Write it once per name, at namespace scope,
// in the namespace of the kernels that declare the array.
#define EMULATION_DYNAMIC_SHARED(type, name)                                                      \
  thread_local __attribute__((aligned(                                                            \
      EMULATION_SHARED_ALIGNMENT))) type name[::emulation::dynamic_storage_bytes / sizeof(type)]; \
  static const ::emulation::DynamicShared name##_registered(                                      \
      [] { return reinterpret_cast<char*>(name); })

// The same for an array declared inside an anonymous namespace, which no other file can name: takes
// the mangled symbol that the linker misses, as `nm -u` prints it, and a new name.
#define EMULATION_DYNAMIC_SHARED_SYMBOL(symbol, name)                                    \
  extern thread_local __attribute__((aligned(EMULATION_SHARED_ALIGNMENT))) unsigned char \
      name[::emulation::dynamic_storage_bytes] __asm__(symbol);                          \
  EMULATION_DYNAMIC_SHARED(unsigned char, name)
