// The threads of a block as fibers, their barriers, and a launch; emulated.h includes this and adds what threads call.
//
// A fiber runs until it waits. It sleeps then and another one goes on, so that each thread is switched to once per wait; when
// nobody is awake, the block is deadlocked. Even seeds take turns in a circle, which keeps the warps at the same place; odd ones
// always take the first turn that is awake, so that a warp runs ahead to a barrier before the next one begins.
#pragma once

namespace emulated {

constexpr int MOST_THREADS = 1024, MOST_WARPS = MOST_THREADS / 32;
constexpr size_t MOST_SHARED = 256 << 10, FENCE = 256;

struct Copy { void* to; const void* from; bool there; };

struct Fiber {
    void* stack_pointer = nullptr;
    uint3 thread{};
    int number = 0;
    const char* waits_in = nullptr;
    std::vector<Copy> copies;        // asynchronous ones that have not landed
    std::vector<size_t> groups;      // how many of the copies belong to the groups committed so far
};

// Slots and results of one warp function. There are two, used in turns: the threads that already are in the next one leave alone
// what the others still have to read, and nobody comes to the one after that before all have read.
struct Exchange {
    alignas(64) unsigned char slot[32][64];
    alignas(64) unsigned char result[32][64];
};

struct Warp {
    unsigned generation = 0;
    int arrived = 0, alive = 0;
    int what = 0, site = 0;          // the function that its threads are in, and where: all must be in the same one
    Exchange exchange[2];
    Exchange& now() { return exchange[generation & 1]; }
};

// A set of turns; next() goes round.
struct Turns {
    uint64_t words[MOST_THREADS / 64];
    int count;                       // words in use
    bool has(int turn) const { return words[turn >> 6] >> (turn & 63) & 1; }
    void add(int turn) { words[turn >> 6] |= 1ull << (turn & 63); }
    void remove(int turn) { words[turn >> 6] &= ~(1ull << (turn & 63)); }
    void fill(int turns) {
        count = (turns + 63) / 64;
        for (int i = 0; i < count; i++) words[i] = ~0ull;
        if (turns & 63) words[count - 1] = (1ull << (turns & 63)) - 1;
    }
    int next(int turn) const {
        int at = turn >> 6;
        uint64_t later = (turn & 63) == 63 ? 0 : words[at] & (~0ull << ((turn & 63) + 1));
        for (int i = 0; i <= count; i++) {
            if (later) return at * 64 + __builtin_ctzll(later);
            if (++at == count) at = 0;
            later = words[at];
        }
        return -1;
    }
};

struct Block {
    Fiber fibers[MOST_THREADS];
    Warp warps[MOST_WARPS];
    int order[MOST_THREADS], place[MOST_THREADS];    // turn -> thread; thread -> turn
    Turns awake, living;
    dim3 size, grid;
    uint3 index{};
    int threads = 0, ordered = 0, alive = 0, arrived = 0, site = 0;
    unsigned char *shared = nullptr, *shared_room = nullptr, *shared_end = nullptr;
    size_t shared_bytes = 0;
    void* main_stack = nullptr;
    unsigned seed = 0;
    uint64_t chance = 0;
};

static Block block;
static Fiber* current;
static void (*entry)(void*);
static void* entry_arguments;
static char message[600];
static void* fault_address;
static sigjmp_buf way_out;
static volatile bool running = false;
static unsigned char* stacks;
static size_t stack_stride;
static unsigned char signal_stack[64 << 10];

extern "C" void emulated_swap(void** save, void* to);
#if defined(__x86_64__)
asm(R"(
.text
.globl emulated_swap
.hidden emulated_swap
emulated_swap:
 pushq %rbp
 pushq %rbx
 pushq %r12
 pushq %r13
 pushq %r14
 pushq %r15
 movq %rsp,(%rdi)
 movq %rsi,%rsp
 popq %r15
 popq %r14
 popq %r13
 popq %r12
 popq %rbx
 popq %rbp
 ret
)");
#elif defined(__aarch64__)
asm(R"(
.text
.globl emulated_swap
.hidden emulated_swap
emulated_swap:
 sub sp, sp, #160
 stp x19, x20, [sp, #0]
 stp x21, x22, [sp, #16]
 stp x23, x24, [sp, #32]
 stp x25, x26, [sp, #48]
 stp x27, x28, [sp, #64]
 stp x29, x30, [sp, #80]
 stp d8, d9, [sp, #96]
 stp d10, d11, [sp, #112]
 stp d12, d13, [sp, #128]
 stp d14, d15, [sp, #144]
 mov x9, sp
 str x9, [x0]
 mov sp, x1
 ldp x19, x20, [sp, #0]
 ldp x21, x22, [sp, #16]
 ldp x23, x24, [sp, #32]
 ldp x25, x26, [sp, #48]
 ldp x27, x28, [sp, #64]
 ldp x29, x30, [sp, #80]
 ldp d8, d9, [sp, #96]
 ldp d10, d11, [sp, #112]
 ldp d12, d13, [sp, #128]
 ldp d14, d15, [sp, #144]
 add sp, sp, #160
 ret
)");
#else
#error "the emulated device switches fibers on x86-64 and aarch64 only"
#endif

inline void describe(const char* what) {
    if (current)
        snprintf(message, sizeof message, "%s (block %u, %u, %u, thread %d)", what, block.index.x, block.index.y, block.index.z, current->number);
    else
        snprintf(message, sizeof message, "%s", what);
}

// Leave the kernel with an error; its fibers are never resumed.
[[noreturn]] inline void fail(const char* format, ...) {
    char what[400];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(what, sizeof what, format, arguments);
    va_end(arguments);
    describe(what);
    siglongjmp(way_out, 1);
}

// A number that depends on the seed and on how often it was asked for.
inline uint64_t by_chance() {
    block.chance = block.chance * 6364136223846793005ull + 1442695040888963407ull;
    return block.chance >> 33;
}

inline int next_turn(int turn) { return block.awake.next(block.seed % 2 ? block.threads - 1 : turn); }

// The current thread waits: somebody who is awake goes on. It comes back when it was woken.
inline void sleep(const char* name) {
    Fiber* from = current;
    from->waits_in = name;
    block.awake.remove(block.place[from->number]);
    int turn = next_turn(block.place[from->number]);
    if (turn < 0) {
        for (int i = 0; i < block.threads; i++) {
            const char* other = block.fibers[i].waits_in;
            if (block.living.has(block.place[i]) && strcmp(other, name)) fail("no thread comes further: it waits in %s, thread %d in %s", name, i, other);
        }
        fail("no thread comes further: all that there are wait in %s", name);
    }
    current = &block.fibers[block.order[turn]];
    emulated_swap(&from->stack_pointer, current->stack_pointer);
}

inline void release_block() {
    if (block.alive > 0 && block.arrived == block.alive) {
        block.arrived = 0;
        block.awake = block.living;
    }
}

// `site` tells the __syncthreads of the source text: a block's threads must all be at the same one.
inline void barrier(int site) {
    if (block.arrived++ == 0) block.site = site;
    if (block.site != site) fail("threads of a block are at different __syncthreads");
    release_block();
    if (block.arrived) sleep("__syncthreads");
}

// All 32 threads of a warp come here with the same `what`; the last one does work() from slots to results, then all go on.
template <class Work>
inline Exchange& together(int what, const char* name, Work work, int site = 0) {
    Warp& warp = block.warps[current->number / 32];
    Exchange& exchange = warp.now();
    if (warp.arrived == 0) warp.what = what, warp.site = site;
    if (warp.what != what || warp.site != site) fail("a warp's threads are in different functions, one of them %s", name);
    if (++warp.arrived < warp.alive) {
        sleep(name);
        return exchange;
    }
    if (warp.alive != 32) fail("%s by %d threads of a warp: all 32 must come", name, warp.alive);
    work(exchange);
    warp.arrived = 0;
    warp.generation++;
    int first = current->number & ~31;
    for (int i = 0; i < 32; i++) block.awake.add(block.place[first + i]);
    return exchange;
}

static void thread_main() {
    entry(entry_arguments);
    Fiber* me = current;
    int turn = block.place[me->number];
    block.living.remove(turn);
    block.awake.remove(turn);
    block.alive--;
    Warp& warp = block.warps[me->number / 32];
    warp.alive--;
    if (warp.arrived) fail("a thread ends while others of its warp wait for it");
    release_block();
    void* to = block.main_stack;
    if (block.alive) {
        turn = next_turn(turn);
        if (turn < 0) fail("no thread comes further: this one ends while others wait");
        current = &block.fibers[block.order[turn]];
        to = current->stack_pointer;
    } else
        current = nullptr;
    void* unused;
    emulated_swap(&unused, to);
    abort();
}

// Stacks begin at different lines of the caches, as all fibers use the first few hundred bytes of theirs.
inline void prepare_stack(Fiber& fiber) {
    void** place = reinterpret_cast<void**>(stacks + (fiber.number + 1) * stack_stride - fiber.number % 32 * 192);
#if defined(__x86_64__)
    *--place = nullptr;
    *--place = reinterpret_cast<void*>(thread_main);
    for (int k = 0; k < 6; k++) *--place = nullptr;
#else
    place -= 20;
    memset(place, 0, 160);
    place[11] = reinterpret_cast<void*>(thread_main);    // x30
#endif
    fiber.stack_pointer = place;
}

inline void run_block(uint3 index) {
    block.index = index;
    block.alive = block.threads;
    block.arrived = 0;
    for (int w = 0; w < block.threads / 32; w++) block.warps[w].arrived = 0, block.warps[w].alive = 32;
    unsigned char *low = block.shared - FENCE, *high = block.shared_end;
    memset(low, 0xFF, high - low);
    for (int i = 0; i < block.threads; i++) {
        Fiber& fiber = block.fibers[i];
        fiber.waits_in = nullptr;
        fiber.copies.clear();
        fiber.groups.clear();
        prepare_stack(fiber);
    }
    block.living.fill(block.threads);
    block.awake = block.living;
    current = &block.fibers[block.order[0]];
    emulated_swap(&block.main_stack, current->stack_pointer);
    for (unsigned char* p = low; p < high; p++) {
        if (p == block.shared) p += block.shared_bytes;
        if (p < high && *p != 0xFF) fail("block %u, %u, %u wrote outside of its shared memory, at byte %ld", index.x, index.y, index.z, long(p - block.shared));
    }
}

// Turns: 0 ascending, 1 descending, else shuffled by the seed; warps stay together with odd ones. A table that is there is kept.
inline void choose_order(int threads, unsigned seed) {
    block.chance = seed * 0x9E3779B97F4A7C15ull + 1;
    if (block.ordered == threads && block.seed == seed) return;
    block.ordered = threads, block.seed = seed;
    for (int i = 0; i < threads; i++) block.order[i] = seed == 1 ? threads - 1 - i : i;
    if (seed > 1)
        for (int i = threads - 1; i > 0; i--) std::swap(block.order[i], block.order[by_chance() % (i + 1)]);
    if (seed > 1 && seed % 2) {
        int rank[MOST_WARPS], warps = 0;
        for (int& r : rank) r = -1;
        for (int i = 0; i < threads; i++)
            if (rank[block.order[i] / 32] < 0) rank[block.order[i] / 32] = warps++;
        std::stable_sort(block.order, block.order + threads, [&](int a, int b) { return rank[a / 32] < rank[b / 32]; });
    }
    for (int turn = 0; turn < threads; turn++) block.place[block.order[turn]] = turn;
}

// Blocks have no order on a GPU: 0 ascending, 1 descending, else steps of a stride that reaches all of them.
inline void run_grid() {
    uint64_t gx = block.grid.x, gy = block.grid.y, count = gx * gy * block.grid.z, stride = 1, first = 0;
    if (block.seed == 1) stride = count - 1, first = count - 1;
    if (block.seed > 1) {
        first = by_chance() % count;
        stride = by_chance() % count;
        while (std::__gcd(stride, count) != 1) stride++;
    }
    for (uint64_t i = 0, at = first; i < count; i++, at = (at + stride) % count)
        run_block({unsigned(at % gx), unsigned(at / gx % gy), unsigned(at / gx / gy)});
}

inline void on_fault(int number, siginfo_t* info, void*) {
    if (!running) {                  // not ours: it comes again, and to whom it came before
        signal(number, SIG_DFL);
        return;
    }
    auto at = static_cast<unsigned char*>(info->si_addr);
    char what[200];
    if (number == SIGFPE)
        snprintf(what, sizeof what, "an integer was divided by zero");
    else if (at >= stacks && at < stacks + MOST_THREADS * stack_stride)
        snprintf(what, sizeof what, "a thread's stack is too small");
    else if (at >= block.shared_end && at < block.shared_end + 4096)
        snprintf(what, sizeof what, "memory behind shared memory was touched: byte %ld of %zu", long(at - block.shared), block.shared_bytes);
    else {
        snprintf(what, sizeof what, "memory that is not there was touched: address %p", info->si_addr);
        fault_address = info->si_addr;
    }
    describe(what);
    siglongjmp(way_out, 1);
}

// While a launch runs, faults are ours; afterwards, whoever had them before has them again.
struct Faults {
    stack_t old_stack{};
    struct sigaction old[3]{};
    static constexpr int NUMBERS[3] = {SIGSEGV, SIGBUS, SIGFPE};
    Faults() {
        stack_t stack{};
        stack.ss_sp = signal_stack;
        stack.ss_size = sizeof signal_stack;
        sigaltstack(&stack, &old_stack);
        struct sigaction action{};
        action.sa_sigaction = on_fault;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
        for (int i = 0; i < 3; i++) sigaction(NUMBERS[i], &action, &old[i]);
        running = true;
    }
    ~Faults() {
        running = false;
        for (int i = 0; i < 3; i++) sigaction(NUMBERS[i], &old[i], nullptr);
        sigaltstack(&old_stack, nullptr);
    }
};

inline int run_guarded() {
    if (sigsetjmp(way_out, 1)) return 1;
    run_grid();
    return 0;
}

inline int launch(void (*kernel)(void*), void* arguments, const unsigned* grid, unsigned threads, size_t shared_bytes, unsigned seed) {
    entry = kernel;
    entry_arguments = arguments;
    block.size = dim3(threads);
    block.grid = dim3(grid[0], grid[1], grid[2]);
    block.threads = threads;
    if (!block.shared_room) {        // a page that faults lies behind it
        void* room = mmap(nullptr, MOST_SHARED + 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        block.shared_room = static_cast<unsigned char*>(room);
        block.shared_end = block.shared_room + MOST_SHARED;
        mprotect(block.shared_end, 4096, PROT_NONE);
        memset(block.shared_room, 0xFF, MOST_SHARED);
        for (int i = 0; i < MOST_THREADS; i++) block.fibers[i].number = i, block.fibers[i].thread = {unsigned(i), 0, 0};
    }
    block.shared_bytes = shared_bytes;
    block.shared = block.shared_end - (shared_bytes + 127) / 128 * 128;
    choose_order(threads, seed);
    message[0] = 0;
    fault_address = nullptr;
    Faults faults;
    int failed = run_guarded();
    current = nullptr;
    return failed;
}

}  // namespace emulated

extern "C" const char* emulated_message() { return emulated::message; }
extern "C" void* emulated_fault_address() { return emulated::fault_address; }
extern "C" void emulated_use_stacks(void* first, size_t stride) {
    emulated::stacks = static_cast<unsigned char*>(first);
    emulated::stack_stride = stride;
}
