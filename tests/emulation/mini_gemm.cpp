// Entry points for test_machine.py: a product on the emulated machine.
#include "machine_host.h"
#include "mini_gemm.h"

using namespace mtbert::machine;

template <typename T>
static void run(std::int64_t order, const void* a, const void* b, void* c, std::int64_t m, std::int64_t n,
                std::int64_t k, std::int64_t a_stride, std::int64_t b_stride, std::int64_t* conflicts) {
    Emulator emulator(order);
    const T* const a_data = emulator.read<T>("a", a, (m - 1) * a_stride + k);
    const T* const b_data = emulator.read<T>("b", b, (n - 1) * b_stride + k);
    float* const c_data = emulator.write<float>("c", c, m * n, 4);
    const Grid grid{static_cast<int>((m + mini::kTileM - 1) / mini::kTileM),
                    static_cast<int>((n + mini::kTileN - 1) / mini::kTileN), 1};
    emulator.launch(grid, mini::kThreads, mini::kSharedBytes, [&] {
        mini::product<T>(a_data, b_data, c_data, static_cast<int>(m), static_cast<int>(n), static_cast<int>(k),
                         a_stride, b_stride);
    });
    emulator.finish();
    *conflicts = emulator.counters().matrix_load_conflicts;
}

extern "C" const char* gemm(std::int64_t order, std::int64_t fp16, const void* a, const void* b, void* c,
                            std::int64_t m, std::int64_t n, std::int64_t k, std::int64_t a_stride,
                            std::int64_t b_stride, std::int64_t* conflicts) {
    return guarded([&] {
        (fp16 != 0 ? run<FP16> : run<BF16>)(order, a, b, c, m, n, k, a_stride, b_stride, conflicts);
    });
}
