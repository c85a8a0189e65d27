// Tiles in shared memory for mma.sync on compute capability 8.0 or later: their layouts, copies into them and
// fragments from them.
//
// Sizes are in bytes, because bytes are what bf16, fp16 and float32 (TF32) share: a register of a fragment is 32
// bits wide, one product (m16n8k16, or m16n8k8 of TF32) sums over 32 bytes of a row, and a piece is 16 bytes. In a
// warp, g = lane / 4 and q = lane % 4, as in the layouts of fragments.
//
// Two layouts, both read and written without bank conflicts (the 32 banks serve 128 bytes at a time: one 8x8
// matrix of ldmatrix, or the 16-byte accesses of eight neighbouring lanes):
//
// Panel: rows of 64 bytes, for operands whose rows run along the sum. Piece p of row r lies at place p ^ (r / 8) % 4
// of the row. A matrix of ldmatrix takes one piece of the rows 8 (i / 2) + i % 2 (i from 0 to 7) from some even row
// on: four different places of even rows, four of odd ones. Rows 2 i and 2 i + 1 share their order, so that lanes
// that take all pieces of both, copies or 16-byte loads, cover 128 bytes.
//
// Columns: all pieces of one column of pieces one after the other ("slots", one a row), for operands whose rows
// run across the sum, read by transposing ldmatrix. A matrix is eight neighbouring slots, 128 bytes. ldmatrix
// cannot transpose floats; they are read one by one, lane (g, q) from slot q of two columns of pieces (g is the
// column of the element): 64 bytes each, so the pitch is 64 bytes more than a multiple of 128.
//
// A sum may run over k in any order that both operands keep. Products of masked elements use that: from a panel,
// lane (g, q) takes piece q of row g with one 16-byte load and has its registers of two products, which are
// neighbouring columns: one draw of the mask. With 16-bit elements the places (product s, half h, 2 q + e) of the
// sum are columns 8 q + 4 s + 2 h + e, with floats the places (s, h, q) are columns 4 q + 2 s + h.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/lora/machine.h"

namespace mtbert::cuda::sm80 {

using machine::Shared;
using machine::Words2;
using machine::Words4;

constexpr int kPieceBytes = 16;
constexpr int kPanelBytes = 64;
constexpr int kPanelPieces = kPanelBytes / kPieceBytes;

template <typename T>
constexpr bool kIsFloat = std::is_same_v<T, float>;

// Elements in a piece, and the elements of the sum that two products (64 bytes) run over.
template <typename T>
constexpr int kPieceElements = kPieceBytes / static_cast<int>(sizeof(T));
template <typename T>
constexpr int kPairElements = kPanelBytes / static_cast<int>(sizeof(T));

// The fragment words of an operand as the product wants them: floats are rounded to TF32.
template <typename T, int kCount>
MTBERT_DEVICE void round_operand(std::uint32_t (&word)[kCount]) {
    if constexpr (kIsFloat<T>) {
        MTBERT_UNROLL
        for (int i = 0; i < kCount; ++i) {
            word[i] = machine::to_tf32(word[i]);
        }
    }
}

// d += a b over 32 bytes.
template <typename T>
MTBERT_DEVICE void multiply_add(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
    if constexpr (kIsFloat<T>) {
        machine::multiply_add_1688_tf32(d, a, b);
    } else {
        machine::multiply_add_16816<T>(d, a, b);
    }
}

// Copies a piece, or makes it zero where it is not there; the source is not read then.
MTBERT_DEVICE void copy_piece(Shared target, const char* source, bool there) {
    machine::copy_async16(target, source, there ? kPieceBytes : 0);
}

// Two floats as they are stored.
MTBERT_DEVICE Words2 float_words(float first, float second) {
    return Words2{{machine::float_bits(first), machine::float_bits(second)}};
}

// ---- Panels ----

// What most panels are: 16-row tiles of 64 rows are interleaved, tile i holding rows 8 (g / 2) + g % 2 + 2 i as
// its rows g and those 32 further as its rows g + 8. So which tile it is changes no place, and is a constant
// distance.
constexpr int kTileDistance = 2 * kPanelBytes;
MTBERT_DEVICE int tile_row(int g) { return 8 * (g / 2) + g % 2; }

MTBERT_DEVICE int panel_offset(int row, int piece) {
    return row * kPanelBytes + (piece ^ (row >> 3) % kPanelPieces) * kPieceBytes;
}

// A thread's part in the copies of panels of kRows rows, a step of 64 bytes after the other: thread t moves piece
// t % 4 of the rows t / 4, t / 4 + kThreads / 4, ...
template <int kRows, int kThreads>
class PanelCopy {
   public:
    // rows_there: how many of the rows exist; the others are made zero.
    MTBERT_DEVICE PanelCopy(const char* first, std::int64_t stride, int rows_there)
        : source_(first + row() * stride + piece() * kPieceBytes),
          pass_stride_(stride * kPassRows),
          rows_there_(rows_there) {}

    MTBERT_DEVICE static int row() { return machine::thread_index() / kPanelPieces; }
    MTBERT_DEVICE static int piece() { return machine::thread_index() % kPanelPieces; }

    // Copies the next step; there: whether the thread's piece exists in it.
    MTBERT_DEVICE void step(Shared panel, bool there) {
        constexpr int kPasses = (kRows + kPassRows - 1) / kPassRows;
        const char* source = source_;
        panel = panel + panel_offset(row(), piece());
        MTBERT_UNROLL
        for (int pass = 0; pass < kPasses; ++pass) {
            // Compared with what is the same for all threads, so that a thread holds one number for all of its
            // rows.
            if (kRows % kPassRows == 0 || row() < kRows - pass * kPassRows) {
                copy_piece(panel + pass * kPassRows * kPanelBytes, source,
                           there && row() < rows_there_ - pass * kPassRows);
            }
            source += pass_stride_;
        }
        source_ += kPanelBytes;
    }

   private:
    static constexpr int kPassRows = kThreads / kPanelPieces;
    static_assert(kPassRows % 32 == 0);  // a pass further, the same places
    const char* source_;
    std::int64_t pass_stride_;
    int rows_there_;
};

// The stage of a ring of kStages that a step uses, as a byte offset from the first.
template <int kStages, int kStageBytes>
class Ring {
   public:
    MTBERT_DEVICE int offset() const { return offset_; }
    MTBERT_DEVICE void advance() { offset_ = offset_ == (kStages - 1) * kStageBytes ? 0 : offset_ + kStageBytes; }
    // Of a step further on, less than kStages.
    MTBERT_DEVICE int further(int steps) const {
        const int offset = offset_ + steps * kStageBytes;
        return offset < kStages * kStageBytes ? offset : offset - kStages * kStageBytes;
    }

   private:
    int offset_ = 0;
};

// Four matrices of a panel as a product's a (16 x 32 bytes), or b of two products (8 x 64 bytes).
template <typename T>
MTBERT_DEVICE void load_matrices(std::uint32_t (&word)[4], Shared row) {
    machine::load_matrix_x4(word, row);
    round_operand<T>(word);
}

// Where this lane points for a of a 16-row tile from a panel: for tile 0 of rows that begin at `row`, product 0 or
// 1.
MTBERT_DEVICE int lane_a_offset(int row, int product) {
    const int lane = machine::lane_index(), matrix = lane / 8;
    return panel_offset(row + 32 * (matrix % 2) + tile_row(lane % 8), 2 * product + matrix / 2);
}

// The words of one lane for two products over columns in the order of the mask.
template <typename T>
MTBERT_DEVICE void load_piece(std::uint32_t (&word)[4], Shared source) {
    const auto words = machine::load_shared<Words4>(source);
    MTBERT_UNROLL
    for (int i = 0; i < 4; ++i) {
        word[i] = words.word[i];
    }
    round_operand<T>(word);
}

// d += a b over the 64 bytes whose words are given so: rows g and g + 8 of a, row g of b's transpose.
template <typename T>
MTBERT_DEVICE void multiply_pieces(float (&d)[4], const std::uint32_t (&low)[4], const std::uint32_t (&high)[4],
                                   const std::uint32_t (&column)[4]) {
    MTBERT_UNROLL
    for (int i = 0; i < 4; i += 2) {
        const std::uint32_t a[4] = {low[i], high[i], low[i + 1], high[i + 1]};
        const std::uint32_t b[2] = {column[i], column[i + 1]};
        multiply_add<T>(d, a, b);
    }
}

// ---- Columns ----

template <typename T, int kSlots>
constexpr int kPitch = kSlots * kPieceBytes + (kIsFloat<T> ? 64 : 0);

// Which piece a thread moves: eight neighbouring threads fill eight slots, so a pass over the banks is
// conflict-free, and a warp reads up to 64 adjacent bytes of each of its rows.
struct PieceIndex {
    int slot;
    int column;  // of pieces
};
template <int kSlots, int kColumns>
MTBERT_DEVICE PieceIndex piece_index(int index) {
    constexpr int kTogether = kColumns < 4 ? kColumns : 4;
    const int rest = index / 8 / kTogether;
    return {rest % (kSlots / 8) * 8 + index % 8, rest / (kSlots / 8) * kTogether + index / 8 % kTogether};
}

// Copies a whole tile of columns; source_of says where each piece comes from, and whether it is there.
struct Source {
    const char* address;
    bool there;
};
template <typename T, int kSlots, int kColumns, int kThreads, typename SourceOf>
MTBERT_DEVICE void copy_columns(Shared columns, const SourceOf& source_of) {
    MTBERT_UNROLL
    for (int first = 0; first < kSlots * kColumns; first += kThreads) {
        const int index = first + machine::thread_index();
        if (kSlots * kColumns % kThreads == 0 || index < kSlots * kColumns) {
            const PieceIndex at = piece_index<kSlots, kColumns>(index);
            const Source source = source_of(at);
            copy_piece(columns + at.column * kPitch<T, kSlots> + at.slot * kPieceBytes, source.address, source.there);
        }
    }
}

// b of two products for one tile of 8 columns, the sum running over kPairElements slots from `slot`.
template <typename T, int kSlots>
MTBERT_DEVICE void load_b_pair(std::uint32_t (&b)[2][2], Shared columns, int tile, int slot) {
    const int lane = machine::lane_index();
    if constexpr (kIsFloat<T>) {
        const Shared source =
            columns + (2 * tile + lane / 16) * kPitch<T, kSlots> + (slot + lane % 4) * kPieceBytes + lane / 4 % 4 * 4;
        MTBERT_UNROLL
        for (int i = 0; i < 4; ++i) {
            b[i / 2][i % 2] = machine::load_shared<std::uint32_t>(source + i * 4 * kPieceBytes);
        }
    } else {
        std::uint32_t word[4];
        machine::load_matrix_x4_transposed(word, columns + tile * kPitch<T, kSlots> + (slot + lane) * kPieceBytes);
        MTBERT_UNROLL
        for (int i = 0; i < 4; ++i) {
            b[i / 2][i % 2] = word[i];
        }
    }
    round_operand<T>(b[0]);
    round_operand<T>(b[1]);
}

// a of one product for a tile of 16 columns, which become its rows: the sum runs over kPairElements / 2 slots from
// `slot`.
template <typename T, int kSlots>
MTBERT_DEVICE void load_a_transposed(std::uint32_t (&a)[4], Shared columns, int tile, int slot) {
    const int lane = machine::lane_index();
    if constexpr (kIsFloat<T>) {
        const Shared source =
            columns + (4 * tile + lane / 16) * kPitch<T, kSlots> + (slot + lane % 4) * kPieceBytes + lane / 4 % 4 * 4;
        MTBERT_UNROLL
        for (int i = 0; i < 4; ++i) {
            const int further = i % 2 * 2 * kPitch<T, kSlots> + i / 2 * 4 * kPieceBytes;
            a[i] = machine::load_shared<std::uint32_t>(source + further);
        }
    } else {
        const int matrix = lane / 8;
        machine::load_matrix_x4_transposed(a, columns + (2 * tile + matrix % 2) * kPitch<T, kSlots> +
                                                  (slot + matrix / 2 * 8 + lane % 8) * kPieceBytes);
    }
    round_operand<T>(a);
}

// a of one product whose rows are the 16 slots from `slot`; the sum runs over two neighbouring pieces.
template <typename T, int kSlots>
MTBERT_DEVICE void load_a_rows(std::uint32_t (&a)[4], Shared columns, int piece, int slot) {
    const int lane = machine::lane_index(), matrix = lane / 8;
    machine::load_matrix_x4(a, columns + (piece + matrix / 2) * kPitch<T, kSlots> +
                                   (slot + matrix % 2 * 8 + lane % 8) * kPieceBytes);
    round_operand<T>(a);
}

}  // namespace mtbert::cuda::sm80
