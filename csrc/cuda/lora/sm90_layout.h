// Where things lie in the sm_90a kernels of the LoRA products: shared memory as TMA fills it and as wgmma reads it,
// the descriptors that say so, which thread owns which element, and which tile a thread block works on when. Plain
// functions of integers: tests run them with the host compiler, since an error here shows as a wrong number, a hang
// or nothing.
//
// Facts are those of the PTX ISA: "Tensor swizzling modes" (cp.async.bulk.tensor), "Asynchronous warpgroup-level matrix
// shared memory layout", "Register fragments and shared memory matrix layouts" (wgmma) and "mbarrier".
#pragma once

#include <cstdint>

#include "common/philox.h"

#define MTBERT_LAYOUT MTBERT_HOST_DEVICE constexpr

namespace mtbert::cuda::sm90 {

// ---- The block of threads: one warpgroup that loads, two that multiply 64 rows each. ----

constexpr int kWarp = 32;
constexpr int kWarpgroup = 128;
constexpr int kConsumers = 2;
constexpr int kConsumerWarps = kConsumers * kWarpgroup / kWarp;
constexpr int kThreads = (1 + kConsumers) * kWarpgroup;

// A multiprocessor has 64 Ki registers. A block starts with as many for every thread as fit (a multiple of 8); the
// loading warpgroup then gives up what it does not need, and the others take it (setmaxnreg: 24 to 256 in steps of
// 8).
constexpr int kRegisters = 65536;
constexpr int kStartRegisters = kRegisters / kThreads / 8 * 8;
constexpr int kProducerRegisters = 24;
constexpr int kConsumerRegisters = 240;
static_assert(kWarpgroup * (kProducerRegisters + kConsumers * kConsumerRegisters) <= kThreads * kStartRegisters);

// ---- Tiles: 128 rows, and slices of 64 elements along the sum, which are rows of 128 bytes in shared memory. ----

constexpr int kElementBytes = 2;
constexpr int kTileRows = 128;
constexpr int kWarpgroupRows = kTileRows / kConsumers;
constexpr int kWarpRows = kWarpgroupRows / 4;
constexpr int kDepth = 64;
constexpr int kStep = 16;  // of the sum in one wgmma
constexpr int kSteps = kDepth / kStep;
constexpr int kRowBytes = kDepth * kElementBytes;
constexpr int kChunkBytes = 16;
constexpr int kAtomBytes = 8 * kRowBytes;  // the swizzle repeats after 8 rows; tiles start on a multiple of it
constexpr int kStoreColumns = 64;          // of one TMA store: 128 bytes
constexpr int kMostCluster = 2;

// The byte of a tile that starts on a multiple of kAtomBytes where 16-byte chunk `chunk` of row `row` lies: the 128-byte
// swizzle of TMA and wgmma, bits 4 to 6 of the address (the chunk) xor bits 7 to 9 (the row).
MTBERT_LAYOUT int tile_offset(int row, int chunk) { return row * kRowBytes + ((chunk ^ (row & 7)) * kChunkBytes); }

// ---- Descriptors of wgmma's operands in shared memory, 128-byte swizzle: addresses and offsets in 16 bytes. ----

MTBERT_LAYOUT std::uint64_t descriptor(std::uint32_t address, int leading_bytes, int stride_bytes) {
    const std::uint64_t start = (address & 0x3FFFFu) >> 4, leading = static_cast<std::uint64_t>(leading_bytes >> 4),
                        stride = static_cast<std::uint64_t>(stride_bytes >> 4), swizzle_of_128_bytes = 1;
    return start | leading << 16 | stride << 32 | swizzle_of_128_bytes << 62;
}

// Rows of the tile are rows of the operand, neighbours along the sum are neighbours in memory ("K-major"). Stride:
// from 8 rows to the next 8. The leading offset is not looked at.
MTBERT_LAYOUT std::uint64_t descriptor_rows(std::uint32_t address) { return descriptor(address, 16, kAtomBytes); }
// What to add for the next 16 along the sum: 32 bytes.
constexpr std::uint64_t kRowsStep = kStep * kElementBytes >> 4;

// Rows of the tile run along the sum, neighbours in memory are columns of the product ("MN-major", the transposed bit
// of the instruction). The tile is blocks of 64 columns, each with kDepth rows of 128 bytes. Leading: from 64 columns
// to the next 64; stride: from 8 along the sum to the next 8.
constexpr int kColumnBlockBytes = kDepth * kRowBytes;
MTBERT_LAYOUT std::uint64_t descriptor_columns(std::uint32_t address) {
    return descriptor(address, kColumnBlockBytes, kAtomBytes);
}
// The next 16 along the sum: 16 rows.
constexpr std::uint64_t kColumnsStep = kStep * kRowBytes >> 4;

// ---- Fragments in registers. Lane l of a warp: g = l / 4, q = l % 4. ----

// Accumulator register i of a [64, N] product: row of the warp's 16 and column.
MTBERT_LAYOUT int accumulator_row(int lane, int i) { return (lane >> 2) + 8 * (i >> 1 & 1); }
MTBERT_LAYOUT int accumulator_column(int lane, int i) { return 8 * (i >> 2) + 2 * (lane & 3) + (i & 1); }

// Register i (of 4) of a [64, 16] first operand: row and the first of its two columns.
MTBERT_LAYOUT int operand_row(int lane, int i) { return (lane >> 2) + 8 * (i & 1); }
MTBERT_LAYOUT int operand_column(int lane, int i) { return 8 * (i >> 1) + 2 * (lane & 3); }

// ldmatrix and stmatrix of four 8 x 8 matrices in that order: the row and the 16-byte chunk that lane l gives the
// address of; matrix i has rows 8 (i % 2) and chunk i / 2.
MTBERT_LAYOUT int matrix_row(int lane) { return (lane & 7) + (lane & 8); }
MTBERT_LAYOUT int matrix_chunk(int lane) { return lane >> 4; }

// Of the four draws that cover 16 columns of rows g and g + 8, the one that lane l makes for its quad: matrix l % 4.
MTBERT_LAYOUT int draw_row(int lane) { return operand_row(lane & ~3, lane & 3); }
MTBERT_LAYOUT int draw_group(int lane) { return lane >> 1 & 1; }

// ---- The ring of stages between the loading warp and the multiplying ones. ----

// Both sides walk the same items in the same order. A consumer waits for the full barrier of an item's stage with
// `phase`; the producer, for the empty one with the opposite, which a new barrier passes at once.
struct Ring {
    int stage = 0;
    std::uint32_t phase = 0;

    MTBERT_LAYOUT void advance(int stages) {
        if (++stage == stages) {
            stage = 0;
            phase ^= 1u;
        }
    }
};

// ---- Shared memory: the stages, what waits to be stored, the barriers. ----

constexpr int kSharedLimit = 227 * 1024;
constexpr int kMostStages = 5;
constexpr int kBarrierBytes = 8;
constexpr int kBarrierRegion = 2 * kMostStages * kBarrierBytes;
// One TMA store of a warp: 16 rows of 128 bytes.
constexpr int kStoreBytes = kWarpRows * kRowBytes;

struct Memory {
    int second_bytes;  // of a stage's tiles: the x or dy tile comes first, then W (or B), then A
    int third_bytes;
    int columns;  // of the tile of the product
    int stages;
    int stores;  // buffers of a warp: a divisor of columns / 64, so that they are used in turn over all tiles

    MTBERT_LAYOUT int second() const { return kTileRows * kRowBytes; }
    MTBERT_LAYOUT int third() const { return second() + second_bytes; }
    MTBERT_LAYOUT int stage_bytes() const { return third() + third_bytes; }
    MTBERT_LAYOUT int stage(int index) const { return index * stage_bytes(); }
    MTBERT_LAYOUT int store(int warp, int buffer) const {
        return stages * stage_bytes() + (warp * stores + buffer) * kStoreBytes;
    }
    MTBERT_LAYOUT int barriers() const { return store(kConsumerWarps, 0); }
    MTBERT_LAYOUT int full(int index) const { return barriers() + kBarrierBytes * index; }
    MTBERT_LAYOUT int empty(int index) const { return barriers() + kBarrierBytes * (stages + index); }
    MTBERT_LAYOUT int total() const { return barriers() + kBarrierRegion; }
};

// As many stages as cover the way from the L2 cache and leave room for one buffer a warp, then as many buffers as fit.
MTBERT_LAYOUT Memory plan_memory(int columns, int third_rows) {
    Memory memory{columns * kRowBytes, third_rows * kRowBytes, columns, columns <= 128 ? kMostStages : 4, 1};
    while (memory.total() > kSharedLimit) {
        --memory.stages;
    }
    const int blocks = columns / kStoreColumns;
    for (int stores = blocks; stores > 1; --stores) {
        Memory larger = memory;
        larger.stores = stores;
        if (blocks % stores == 0 && larger.total() <= kSharedLimit) {
            return larger;
        }
    }
    return memory;
}

// The plan of a kernel, made by the compiler. Forward: x [128, 64], W or B [columns, 64], A [rank, 64], which is the
// third. Input: dy or ds [128, 64], W or A [64, columns].
template <int kColumns, int kThirdRows>
struct StaticMemory {
    static constexpr int kStages = plan_memory(kColumns, kThirdRows).stages;
    static constexpr int kStores = plan_memory(kColumns, kThirdRows).stores;
    static constexpr int kTotal = plan_memory(kColumns, kThirdRows).total();
    static_assert(kTotal <= kSharedLimit && kStages >= 2);
    MTBERT_LAYOUT static Memory get() {
        return Memory{kColumns * kRowBytes, kThirdRows * kRowBytes, kColumns, kStages, kStores};
    }
};

// Bytes that the full barrier of an item waits for in each block. TMA counts whole boxes, the zeros outside of the
// matrix too; the halves that the other block of the cluster loads count as well.
MTBERT_LAYOUT int product_bytes(const Memory& memory, bool with_third) {
    return memory.third() + (with_third ? memory.third_bytes : 0);
}
MTBERT_LAYOUT int second_item_bytes(const Memory& memory) { return memory.second_bytes; }

// Arrivals that empty a stage: every consuming warp of every block whose loads fill it.
MTBERT_LAYOUT int empty_arrivals(int cluster) { return kConsumerWarps * cluster; }

// ---- The tiles of the product: a cluster of blocks takes tiles of the same columns, one below the other. ----

MTBERT_LAYOUT std::int64_t ceil_divide(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

struct Tile {
    int row;           // of this block of threads
    int block;         // of outputs
    int column;        // within the block of outputs
    bool first;        // whether it is the first of its rows and its block of outputs
};

// All tiles in order: rows outermost, then blocks of outputs, then columns. A cluster takes `share` neighbours of
// them, so that what belongs to the rows (s) is made once for most of them.
struct Schedule {
    int columns;         // of a tile
    int block_columns;   // outputs of a block
    int block_tiles;     // tiles of a block in one row of tiles
    int row_tiles;       // tiles in one row of tiles: of all blocks
    int cluster;         // blocks of threads in a cluster
    int tiles;           // of clusters, in all
    int share;

    MTBERT_LAYOUT int clusters() const { return (tiles + share - 1) / share; }
    MTBERT_LAYOUT int begin(int cluster_index) const { return cluster_index * share; }
    MTBERT_LAYOUT int end(int cluster_index) const {
        const int last = begin(cluster_index) + share;
        return last < tiles ? last : tiles;
    }
    MTBERT_LAYOUT Tile tile(int index, int rank) const {
        const int line = index / row_tiles;
        const int place = index - line * row_tiles;
        const int block = place / block_tiles;
        const int column = (place - block * block_tiles) * columns;
        return Tile{(line * cluster + rank) * kTileRows, block, column, column == 0};
    }
};

// Which blocks of threads there are does not change the result: every tile is computed in the same way.
MTBERT_LAYOUT Schedule plan_schedule(std::int64_t rows, std::int64_t block_columns, int blocks, int columns,
                                     int cluster, int multiprocessors) {
    const std::int64_t lines = ceil_divide(rows, kTileRows * cluster);
    const std::int64_t block_tiles = ceil_divide(block_columns, columns);
    const std::int64_t tiles = lines * block_tiles * blocks;
    const std::int64_t at_once = multiprocessors >= cluster ? multiprocessors / cluster : 1;
    return Schedule{columns,
                    static_cast<int>(block_columns),
                    static_cast<int>(block_tiles),
                    static_cast<int>(block_tiles) * blocks,
                    cluster,
                    static_cast<int>(tiles),
                    static_cast<int>(ceil_divide(tiles, at_once))};
}

// Two blocks of threads share what they load of W, A and B: half of it each, to both. One row of tiles needs one.
MTBERT_LAYOUT int choose_cluster(std::int64_t rows) { return rows > kTileRows ? kMostCluster : 1; }

// The width of the tiles: 128, 192 or 256 columns. The time is that of the fullest multiprocessor, in columns of
// tiles it computes, where a tile costs about 32 columns more than it has (it fills the pipeline and is stored), and
// narrow tiles are held up by the loads of x. Of the multiprocessors the full chip's number counts, so that equal
// shapes take equal widths; on a tie the wider.
constexpr int kUsualMultiprocessors = 132;
MTBERT_LAYOUT int choose_columns(std::int64_t rows, std::int64_t block_columns, int blocks) {
    constexpr int kWidths[] = {256, 192, 128};
    constexpr int kCosts[] = {256 + 32, 192 + 32, 144 + 32};
    int best = 0;
    std::int64_t least = 0;
    for (int i = 0; i < 3; ++i) {
        const int cluster = choose_cluster(rows);
        const Schedule schedule =
            plan_schedule(rows, block_columns, blocks, kWidths[i], cluster, kUsualMultiprocessors);
        const std::int64_t cost = static_cast<std::int64_t>(schedule.share) * kCosts[i];
        if (best == 0 || cost < least) {
            best = kWidths[i];
            least = cost;
        }
    }
    return best;
}

// ---- The bits of the mask of a tile of dx, in the registers of a lane. ----

// 16 columns take one draw a lane and give 8 bits a lane: bit 2 i + e belongs to element e of register i of matrix i
// (the order of operand_row and operand_column). Bytes are pushed in at the low end, the first columns first.
constexpr int kPairColumns = 16;
MTBERT_LAYOUT int pair_shift(int pairs, int pair) { return 8 * (pairs - 1 - pair); }
// The accumulator of bit 2 i + e of pair p.
MTBERT_LAYOUT int pair_accumulator(int pair, int i, int e) { return 4 * (2 * pair + (i >> 1)) + 2 * (i & 1) + e; }

}  // namespace mtbert::cuda::sm90
