// Entry points for test_machine.py: the machine's single operations, and small kernels with and without one fault each.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "machine_host.h"

using namespace mtbert::machine;

namespace {

// ---- Layouts ----

// values: [8 * count, 8] elements, matrix after matrix; words: [32, count].
template <int kCount>
void load_matrices_kernel(const std::uint16_t* values, std::uint32_t* words, bool transposed) {
    const int lane = lane_index();
    if (lane < 8 * kCount) {
        store_shared(shared_start() + 16 * lane, load_global<Words4>(values + 8 * lane));
    }
    warp_barrier();
    std::uint32_t fragment[kCount];
    const Shared row = shared_start() + 16 * (lane % (8 * kCount));
    if constexpr (kCount == 4) {
        transposed ? load_matrix_x4_transposed(fragment, row) : load_matrix_x4(fragment, row);
    } else {
        transposed ? load_matrix_x2_transposed(fragment, row) : load_matrix_x2(fragment, row);
    }
    for (int i = 0; i < kCount; ++i) {
        store_global(words + kCount * lane + i, fragment[i]);
    }
}

// One warp: d [16, 8] += a [16, k] b [8, k]^T, or b [k, 8] if transposed (16-bit elements); k * sizeof(T) is 32 bytes.
template <typename T>
void product_kernel(const T* a, const T* b, float* d, bool transposed) {
    constexpr int kRowBytes = 32;
    const int lane = lane_index();
    const Shared a_rows = shared_start(), b_rows = shared_start() + 16 * kRowBytes;
    store_shared(a_rows + 16 * lane, load_global<Words4>(reinterpret_cast<const char*>(a) + 16 * lane));
    if (lane < 16) {
        store_shared(b_rows + 16 * lane, load_global<Words4>(reinterpret_cast<const char*>(b) + 16 * lane));
    }
    warp_barrier();
    std::uint32_t a_fragment[4], b_fragment[2];
    load_matrix_x4(a_fragment, a_rows + kRowBytes * (lane % 16) + 16 * (lane / 16));
    if (transposed) {
        load_matrix_x2_transposed(b_fragment, b_rows + 16 * (lane % 16));
    } else {
        load_matrix_x2(b_fragment, b_rows + kRowBytes * (lane % 8) + 16 * (lane / 8 % 2));
    }
    float sums[4];
    float* target[4];
    for (int i = 0; i < 4; ++i) {
        target[i] = d + 8 * (lane / 4 + 8 * (i / 2)) + 2 * (lane % 4) + i % 2;
        sums[i] = load_global<float>(target[i]);
    }
    if constexpr (std::is_same_v<T, float>) {
        multiply_add_1688_tf32(sums, a_fragment, b_fragment);
    } else {
        multiply_add_16816<T>(sums, a_fragment, b_fragment);
    }
    for (int i = 0; i < 4; ++i) {
        store_global(target[i], sums[i]);
    }
}

// The registers as they are: a [32, 4], b [32, 2] and d [32, 4] hold each lane's fragments.
template <typename T>
void registers_kernel(const std::uint32_t* a, const std::uint32_t* b, float* d) {
    const int lane = lane_index();
    std::uint32_t a_fragment[4], b_fragment[2];
    float sums[4];
    for (int i = 0; i < 4; ++i) {
        a_fragment[i] = load_global<std::uint32_t>(a + 4 * lane + i);
        b_fragment[i % 2] = load_global<std::uint32_t>(b + 2 * lane + i % 2);
        sums[i] = load_global<float>(d + 4 * lane + i);
    }
    if constexpr (std::is_same_v<T, float>) {
        multiply_add_1688_tf32(sums, a_fragment, b_fragment);
    } else {
        multiply_add_16816<T>(sums, a_fragment, b_fragment);
    }
    for (int i = 0; i < 4; ++i) {
        store_global(d + 4 * lane + i, sums[i]);
    }
}

template <typename T>
void run_registers(Emulator& emulator, const void* a, const void* b, void* d) {
    const auto* const a_data = emulator.read<std::uint32_t>("a", a, 32 * 4, 4);
    const auto* const b_data = emulator.read<std::uint32_t>("b", b, 32 * 2, 4);
    float* const d_data = emulator.update<float>("d", d, 32 * 4, 4);
    emulator.launch(Grid{}, 32, 0, [&] { registers_kernel<T>(a_data, b_data, d_data); });
    emulator.finish();
}

template <typename T>
void run_product(Emulator& emulator, const void* a, const void* b, void* d, bool transposed) {
    const int depth = 32 / static_cast<int>(sizeof(T));
    const T* const a_data = emulator.read<T>("a", a, 16 * depth);
    const T* const b_data = emulator.read<T>("b", b, 8 * depth);
    float* const d_data = emulator.update<float>("d", d, 16 * 8, 4);
    emulator.launch(Grid{}, 32, 1024, [&] { product_kernel<T>(a_data, b_data, d_data, transposed); });
    emulator.finish();
}

// ---- Faults: each case runs a right kernel, or the same with one thing wrong. ----

// The thread at the other end of the block, which is in another warp.
int opposite() { return host::place.threads - 1 - thread_index(); }

Shared slot(int index) { return shared_start() + 4 * index; }

// Gives every slot of the block a value.
void fill_slots() {
    store_shared(slot(thread_index()), thread_index());
    block_barrier();
}

// 64 threads, a slot of shared memory for each.
template <typename Body>
void with_slots(Emulator& emulator, const Body& body) {
    emulator.launch(Grid{}, 64, 256, [&] {
        fill_slots();
        body();
    });
}

void read_without_barrier(Emulator& emulator, bool faulty) {
    with_slots(emulator, [&] {
        store_shared(slot(thread_index()), -1);
        if (!faulty) {
            block_barrier();
        }
        load_shared<int>(slot(opposite()));
    });
}

void read_without_warp_barrier(Emulator& emulator, bool faulty) {
    with_slots(emulator, [&] {
        store_shared(slot(thread_index()), -1);
        if (!faulty) {
            warp_barrier();
        }
        load_shared<int>(slot(thread_index() ^ 1));
    });
}

void warp_barrier_across_warps(Emulator& emulator, bool faulty) {
    with_slots(emulator, [&] {
        store_shared(slot(thread_index()), -1);
        faulty ? warp_barrier() : block_barrier();
        load_shared<int>(slot(opposite()));
    });
}

void shuffle_as_barrier(Emulator& emulator, bool faulty) {
    with_slots(emulator, [&] {
        store_shared(slot(thread_index()), -1);
        faulty ? static_cast<void>(shuffle(0, 0)) : warp_barrier();
        load_shared<int>(slot(thread_index() ^ 1));
    });
}

void overwrite_without_barrier(Emulator& emulator, bool faulty) {
    with_slots(emulator, [&] {
        load_shared<int>(slot(opposite()));
        if (!faulty) {
            block_barrier();
        }
        store_shared(slot(thread_index()), -1);
    });
}

// One reader, one writer: which comes second is for the order to say.
void reader_and_writer(Emulator& emulator, bool faulty) {
    with_slots(emulator, [&] {
        if (thread_index() == 0) {
            load_shared<int>(slot(7));
        }
        if (!faulty) {
            block_barrier();
        }
        if (thread_index() == 63) {
            store_shared(slot(7), -1);
        }
    });
}

// Readers of several warps.
void overwrite_after_many_readers(Emulator& emulator, bool faulty) {
    with_slots(emulator, [&] {
        load_shared<int>(slot(0));
        if (!faulty) {
            block_barrier();
        }
        warp_barrier();
        if (thread_index() == 0) {
            store_shared(slot(0), -1);
        }
    });
}

void write_twice(Emulator& emulator, bool faulty) {
    with_slots(emulator, [&] {
        if (!faulty || thread_index() == 5 || thread_index() == 50) {
            store_shared(slot(faulty ? 7 : thread_index()), -1);
        }
    });
}

void matrix_without_warp_barrier(Emulator& emulator, bool faulty) {
    emulator.launch(Grid{}, 32, 512, [&] {
        const Shared row = shared_start() + 16 * lane_index();
        store_shared(row, Words4{});
        warp_barrier();
        store_shared(row, Words4{{1, 2, 3, 4}});
        if (!faulty) {
            warp_barrier();
        }
        std::uint32_t fragment[4];
        load_matrix_x4(fragment, row);
    });
}

void shared_out_of_bounds(Emulator& emulator, bool faulty) {
    emulator.launch(Grid{}, 64, faulty ? 252 : 256, [&] { store_shared(slot(thread_index()), 1); });
}

void shared_below_start(Emulator& emulator, bool faulty) {
    emulator.launch(Grid{}, 64, 256, [&] { store_shared(slot(thread_index() - (faulty ? 1 : 0)), 1); });
}

void shared_misaligned(Emulator& emulator, bool faulty) {
    emulator.launch(Grid{}, 32, 1024, [&] {
        store_shared(shared_start() + 16 * thread_index() + (faulty ? 8 : 0), Words4{});
    });
}

void matrix_misaligned(Emulator& emulator, bool faulty) {
    emulator.launch(Grid{}, 32, 1024, [&] {
        store_shared(shared_start() + 16 * thread_index(), Words4{});
        warp_barrier();
        std::uint32_t fragment[2];
        load_matrix_x2(fragment, shared_start() + 16 * (lane_index() % 8) + (faulty ? 8 : 0));
    });
}

void shared_uninitialised(Emulator& emulator, bool faulty) {
    with_slots(emulator, [&] { load_shared<std::uint16_t>(shared_start() + 252 + (faulty ? 2 : 0)); });
    emulator.launch(Grid{}, 64, 256, [&] {  // the last launch's values are gone
        if (!faulty) {
            store_shared(slot(thread_index()), 1);
        }
        load_shared<int>(slot(thread_index()));
    });
}

// The block that runs second looks at what the first one left.
void shared_of_another_block(Emulator& emulator, bool faulty) {
    int first = -1;
    emulator.launch(Grid{2, 1, 1}, 64, 256, [&] {
        if (first < 0) {
            first = block_index_x();
        }
        if (first == block_index_x() || !faulty) {
            fill_slots();
        }
        load_shared<int>(slot(opposite()));
    });
}

constexpr int kNumbers[64] = {};

void global_out_of_bounds(Emulator& emulator, bool faulty) {
    const int* const x = emulator.read<int>("numbers", kNumbers, 64, 4);
    emulator.launch(Grid{1, 1, 2}, 32, 0, [&] {
        load_global<int>(x + 32 * host::place.block.z + thread_index() + (faulty ? 1 : 0));
    });
}

void global_below_start(Emulator& emulator, bool faulty) {
    const int* const x = emulator.read<int>("numbers", kNumbers, 64, 4);
    emulator.launch(Grid{}, 32, 0, [&] { load_global<int>(x + thread_index() - (faulty ? 1 : 0)); });
}

void store_out_of_bounds(Emulator& emulator, bool faulty) {
    float* const y = emulator.scratch<float>("sums", faulty ? 127 : 128);
    emulator.launch(Grid{}, 32, 0, [&] { store_global(y + 4 * thread_index(), Words4{}); });
}

void global_misaligned(Emulator& emulator, bool faulty) {
    const int* const x = emulator.read<int>("numbers", kNumbers, 64, faulty ? 8 : 16);
    emulator.launch(Grid{}, 32, 0, [&] { load_global<Words4>(x + 4 * (lane_index() % 8)); });
}

void null_pointer(Emulator& emulator, bool faulty) {
    const int* const x = emulator.read<int>("numbers", faulty ? nullptr : kNumbers, 64);
    emulator.launch(Grid{}, 32, 0, [&] { load_global<int>(x); });
}

void store_to_input(Emulator& emulator, bool faulty) {
    int numbers[64] = {};
    int* const x = faulty ? const_cast<int*>(emulator.read<int>("numbers", numbers, 64))
                          : emulator.update<int>("numbers", numbers, 64);
    emulator.launch(Grid{}, 64, 0, [&] { store_global(x + thread_index(), 1); });
    emulator.finish();
}

void global_uninitialised(Emulator& emulator, bool faulty) {
    int* const x = emulator.scratch<int>("workspace", 64);
    emulator.launch(Grid{}, 64, 0, [&] {
        if (!faulty || thread_index() != 40) {
            store_global(x + thread_index(), 1);
        }
    });
    emulator.launch(Grid{}, 64, 0, [&] { load_global<int>(x + opposite()); });
}

void blocks_write_the_same(Emulator& emulator, bool faulty) {
    int* const x = emulator.scratch<int>("numbers", 192);
    emulator.launch(Grid{3, 1, 1}, 64, 0, [&] {
        store_global(x + (faulty ? 63 : 64) * block_index_x() + thread_index(), 1);
    });
    emulator.launch(Grid{}, 64, 0, [&] { store_global(x + thread_index(), 1); });  // another launch may
}

void blocks_read_what_one_writes(Emulator& emulator, bool faulty) {
    int numbers[64] = {};
    int* const x = emulator.update<int>("numbers", numbers, 64);
    emulator.launch(Grid{3, 1, 1}, 32, 0, [&] {
        load_global<int>(x);
        block_barrier();
        if (block_index_x() == 1 && thread_index() == 0) {
            store_global(x + (faulty ? 0 : 1), 1);
        }
    });
}

void threads_share_global_bytes(Emulator& emulator, bool faulty) {
    int* const x = emulator.scratch<int>("numbers", 64);
    emulator.launch(Grid{}, 64, 0, [&] {
        store_global(x + thread_index(), 1);
        block_barrier();
        store_global(x + thread_index(), 2);
        if (!faulty) {
            block_barrier();
        }
        load_global<int>(x + opposite());
    });
}

// 64 threads copy 16 bytes each into stage `stage` of shared memory.
void copy_stage(const int* x, int stage) {
    copy_async16(shared_start() + 1024 * stage + 16 * thread_index(), x + 4 * (thread_index() % 16), 16);
}

template <typename Body>
void with_copies(Emulator& emulator, const Body& body) {
    const int* const x = emulator.read<int>("numbers", kNumbers, 64);
    emulator.launch(Grid{}, 64, 2048, [&] { body(x); });
}

void copy_without_wait(Emulator& emulator, bool faulty) {
    with_copies(emulator, [&](const int* x) {
        copy_stage(x, 0);
        copy_async_commit();
        if (!faulty) {
            copy_async_wait<0>();
        }
        block_barrier();
        load_shared<int>(slot(opposite()));
    });
}

void copy_waits_for_too_few(Emulator& emulator, bool faulty) {
    with_copies(emulator, [&](const int* x) {
        copy_stage(x, 0);
        copy_async_commit();
        copy_stage(x, 1);
        copy_async_commit();
        faulty ? copy_async_wait<2>() : copy_async_wait<1>();
        block_barrier();
        load_shared<int>(slot(opposite()));
    });
}

void copy_without_barrier(Emulator& emulator, bool faulty) {
    with_copies(emulator, [&](const int* x) {
        copy_stage(x, 0);
        copy_async_commit();
        copy_async_wait<0>();
        load_shared<int>(shared_start() + 16 * thread_index());  // one's own
        if (!faulty) {
            block_barrier();
        }
        load_shared<int>(shared_start() + 16 * opposite());
    });
}

void copy_not_committed(Emulator& emulator, bool faulty) {
    with_copies(emulator, [&](const int* x) {
        copy_stage(x, 0);
        if (!faulty) {
            copy_async_commit();
        }
        copy_async_wait<0>();
        block_barrier();
        load_shared<int>(slot(opposite()));
    });
}

void copy_overwritten(Emulator& emulator, bool faulty) {
    with_copies(emulator, [&](const int* x) {
        copy_stage(x, 0);
        copy_async_commit();
        if (!faulty) {
            copy_async_wait<0>();
        }
        store_shared(shared_start() + 16 * thread_index(), 1);
    });
}

// A stage is filled again while other threads may still read it.
void copy_into_stage_in_use(Emulator& emulator, bool faulty) {
    with_copies(emulator, [&](const int* x) {
        for (int round = 0; round < 2; ++round) {
            copy_stage(x, 0);
            copy_async_commit();
            copy_async_wait<0>();
            block_barrier();
            load_shared<int>(shared_start() + 16 * opposite());
            if (!faulty) {
                block_barrier();
            }
        }
    });
}

void copy_source_out_of_bounds(Emulator& emulator, bool faulty) {
    const int* const x = emulator.read<int>("numbers", kNumbers, 62);
    emulator.launch(Grid{}, 64, 2048, [&] {
        const int piece = thread_index() % 17;  // piece 15 is half inside, piece 16 not at all
        const int bytes = piece < 15 ? 16 : piece == 15 ? 8 : 0;
        copy_async16(shared_start() + 16 * thread_index(), x + 4 * piece, faulty && piece == 15 ? 10 : bytes);
        copy_async_commit();
        copy_async_wait<0>();
        load_shared<Words4>(shared_start() + 16 * thread_index());
    });
}

void copy_source_misaligned(Emulator& emulator, bool faulty) {
    with_copies(emulator, [&](const int* x) {
        copy_async16(shared_start() + 16 * thread_index(), x + (faulty ? 2 : 4), 8);
    });
}

void copy_of_17_bytes(Emulator& emulator, bool faulty) {
    with_copies(emulator, [&](const int* x) {
        copy_async16(shared_start() + 16 * thread_index(), x, faulty ? 17 : 16);
    });
}

// Nobody reads them: allowed, as it is on the machine.
void copies_left_behind(Emulator& emulator, bool faulty) {
    with_copies(emulator, [&](const int* x) {
        copy_stage(x, 0);
        if (faulty) {
            block_barrier();
            load_shared<int>(slot(opposite()));
        }
    });
}

void divergent_shuffle(Emulator& emulator, bool faulty) {
    emulator.launch(Grid{}, 64, 0, [&] {
        if (faulty ? lane_index() < 16 : thread_index() < 32) {
            shuffle(1, 0);
        }
        block_barrier();
    });
}

void divergent_barrier(Emulator& emulator, bool faulty) {
    emulator.launch(Grid{}, 64, 0, [&] {
        if (faulty && thread_index() >= 33) {
            warp_barrier();
            block_barrier();
        } else {
            block_barrier();
            warp_barrier();
        }
    });
}

// Threads that have returned are not waited for by a block's barrier, but by their warp's operations.
void early_return(Emulator& emulator, bool faulty) {
    emulator.launch(Grid{}, 64, 0, [&] {
        if (thread_index() >= (faulty ? 63 : 32)) {
            return;
        }
        shuffle_xor(1, 16);
        block_barrier();
    });
}

void shuffle_from_lane_32(Emulator& emulator, bool faulty) {
    emulator.launch(Grid{}, 32, 0, [&] { shuffle(1, lane_index() + (faulty ? 1 : 0)); });
}

void endless_loop(Emulator& emulator, bool faulty) {
    emulator.limit_operations(10000);
    emulator.launch(Grid{}, 64, 0, [&] {
        for (int i = 0; faulty || i < 10; ++i) {
            block_barrier();
        }
    });
}

void block_of_48_threads(Emulator& emulator, bool faulty) {
    emulator.launch(Grid{}, faulty ? 48 : 64, 0, [] {});
}

struct Case {
    const char* name;
    void (*run)(Emulator&, bool);
};

#define CASE(name) \
    Case { #name, name }
constexpr Case kCases[] = {
    CASE(read_without_barrier), CASE(read_without_warp_barrier), CASE(warp_barrier_across_warps),
    CASE(shuffle_as_barrier), CASE(overwrite_without_barrier), CASE(reader_and_writer),
    CASE(overwrite_after_many_readers), CASE(write_twice), CASE(matrix_without_warp_barrier),
    CASE(shared_out_of_bounds), CASE(shared_below_start), CASE(shared_misaligned), CASE(matrix_misaligned),
    CASE(shared_uninitialised), CASE(shared_of_another_block), CASE(global_out_of_bounds), CASE(global_below_start),
    CASE(store_out_of_bounds), CASE(global_misaligned), CASE(null_pointer), CASE(store_to_input),
    CASE(global_uninitialised), CASE(blocks_write_the_same), CASE(blocks_read_what_one_writes),
    CASE(threads_share_global_bytes), CASE(copy_without_wait), CASE(copy_waits_for_too_few),
    CASE(copy_without_barrier), CASE(copy_not_committed), CASE(copy_overwritten), CASE(copy_into_stage_in_use),
    CASE(copy_source_out_of_bounds), CASE(copy_source_misaligned), CASE(copy_of_17_bytes), CASE(copies_left_behind),
    CASE(divergent_shuffle), CASE(divergent_barrier), CASE(early_return), CASE(shuffle_from_lane_32),
    CASE(endless_loop), CASE(block_of_48_threads)};
#undef CASE

}  // namespace

extern "C" const char* run_case(const char* name, std::int64_t faulty, std::int64_t order) {
    return guarded([&] {
        for (const Case& item : kCases) {
            if (std::strcmp(item.name, name) == 0) {
                Emulator emulator(order);
                item.run(emulator, faulty != 0);
                return;
            }
        }
        throw std::invalid_argument(std::string("no case ") + name);
    });
}

extern "C" const char* count_cases(std::int64_t* count) {
    *count = sizeof kCases / sizeof kCases[0];
    return nullptr;
}

extern "C" const char* load_matrices(std::int64_t order, const void* values, void* words, std::int64_t count,
                                     std::int64_t transposed) {
    return guarded([&] {
        Emulator emulator(order);
        const auto* const input = emulator.read<std::uint16_t>("values", values, 64 * count);
        auto* const output = emulator.write<std::uint32_t>("words", words, 32 * count, 4);
        const auto kernel = count == 4 ? load_matrices_kernel<4> : load_matrices_kernel<2>;
        emulator.launch(Grid{}, 32, 512, [&] { kernel(input, output, transposed != 0); });
        emulator.finish();
    });
}

extern "C" const char* product(std::int64_t order, std::int64_t dtype, const void* a, const void* b, void* d,
                               std::int64_t transposed) {
    return guarded([&] {
        Emulator emulator(order);
        const auto run = dtype == 0 ? run_product<BF16> : dtype == 1 ? run_product<FP16> : run_product<float>;
        run(emulator, a, b, d, transposed != 0);
    });
}

extern "C" const char* multiply_registers(std::int64_t order, std::int64_t dtype, const void* a, const void* b,
                                          void* d) {
    return guarded([&] {
        Emulator emulator(order);
        const auto run = dtype == 0 ? run_registers<BF16> : dtype == 1 ? run_registers<FP16> : run_registers<float>;
        run(emulator, a, b, d);
    });
}

// [blocks, 64, 10]: what each thread knows of its place, then three shuffles; and one number that nobody writes.
extern "C" const char* places(std::int64_t order, std::int32_t* numbers, std::int64_t x, std::int64_t y,
                              std::int64_t z) {
    return guarded([&] {
        Emulator emulator(order);
        auto* const output = emulator.write<std::int32_t>("numbers", numbers, x * y * z * 64 * 10 + 1, 4);
        emulator.launch(Grid{static_cast<int>(x), static_cast<int>(y), static_cast<int>(z)}, 64, 0, [&] {
            const int lane = lane_index();
            const int block =
                (host::place.block.z * host::place.grid.y + host::place.block.y) * host::place.grid.x + block_index_x();
            std::int32_t* const mine = output + (block * host::place.threads + thread_index()) * 10;
            const auto value = static_cast<std::uint32_t>(100 * warp_index() + lane);
            const std::uint32_t known[10] = {static_cast<std::uint32_t>(thread_index()),
                                             static_cast<std::uint32_t>(lane),
                                             static_cast<std::uint32_t>(warp_index()),
                                             static_cast<std::uint32_t>(block_index_x()),
                                             static_cast<std::uint32_t>(host::place.block.y),
                                             static_cast<std::uint32_t>(host::place.block.z),
                                             static_cast<std::uint32_t>(host::place.grid.z),
                                             shuffle(value, 5),
                                             shuffle(value, (lane + 1) % 32),
                                             shuffle_xor(value, 3)};
            for (int i = 0; i < 10; ++i) {
                store_global(mine + i, known[i]);
            }
        });
        emulator.finish();
    });
}

// Element by element; kinds: see the code. 16-bit elements and floats lie in arrays of their own size.
extern "C" const char* convert(std::int64_t kind, const void* from, void* to, std::int64_t count) {
    const auto* const halves = static_cast<const std::uint16_t*>(from);
    const auto* const floats = static_cast<const float*>(from);
    for (std::int64_t i = 0; i < count; ++i) {
        switch (kind) {
            case 0:
                static_cast<float*>(to)[i] = to_float(BF16{halves[i]});
                break;
            case 1:
                static_cast<float*>(to)[i] = to_float(FP16{halves[i]});
                break;
            case 2:
                static_cast<BF16*>(to)[i] = from_float<BF16>(floats[i]);
                break;
            case 3:
                static_cast<FP16*>(to)[i] = from_float<FP16>(floats[i]);
                break;
            case 4:
                static_cast<std::uint32_t*>(to)[i] = to_tf32(float_bits(floats[i]));
                break;
            default:
                return "no such kind";
        }
    }
    return nullptr;
}

#ifdef MTBERT_EMULATION_PROGRAM
// For the sanitizers: every case without its fault, in every order; with an argument, an overrun of a thread's own
// array.
int main(int count, char** arguments) {
    for (const Case& item : kCases) {
        for (std::int64_t order = 0; order < 3; ++order) {
            const char* const error = run_case(item.name, 0, order);
            if (error != nullptr) {
                std::printf("%s: %s\n", item.name, error);
                return 1;
            }
            static_cast<void>(run_case(item.name, 1, order));
        }
    }
    std::printf("all cases ran\n");
    std::fflush(stdout);
    if (count > 1) {
        Emulator emulator;
        const int last = std::atoi(arguments[1]);
        emulator.launch(Grid{}, 32, 0, [&] {
            std::uint32_t fragment[4] = {};
            for (int i = 0; i <= last; ++i) {
                fragment[i] = shuffle(fragment[i] + 1, 0);
            }
        });
        std::printf("the loop ran to %d\n", last);
    }
    return 0;
}
#endif
