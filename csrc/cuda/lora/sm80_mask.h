// The dropout mask in registers: kept or made zero by selection, never by a product, because 0 * NaN is NaN.
#pragma once

#include <cstdint>

#include "common/philox.h"
#include "cuda/lora/machine.h"
#include "cuda/lora/sm80_tile.h"

namespace mtbert::cuda::sm80 {

struct Mask {
    const std::int32_t* dropout_row;
    const std::int64_t* step_pointer;  // or null
    std::uint64_t seed;
    std::uint32_t step;
    std::uint32_t site;
    std::uint32_t threshold;  // 0: no dropout, and the rest is not looked at
    float scale;              // of what is kept: 65536 / (65536 - threshold), 1 without dropout
};

// The step is read here where it lies on the device, so that a CUDA graph replays with new masks.
MTBERT_DEVICE DropoutKey load_key(const Mask& mask) {
    std::uint32_t step = mask.step;
    if (mask.step_pointer != nullptr) {
        step = static_cast<std::uint32_t>(machine::load_global<std::int64_t>(mask.step_pointer));
    }
    return DropoutKey{static_cast<std::uint32_t>(mask.seed),
                      static_cast<std::uint32_t>(mask.seed >> 32),
                      step,
                      mask.site,
                      mask.threshold,
                      mask.scale};
}

// The number that the mask knows a row by; rows beyond the last one hold nothing to be masked.
MTBERT_DEVICE std::uint32_t load_dropout_row(const Mask& mask, std::int64_t row, std::int64_t rows) {
    return row < rows ? machine::load_global<std::uint32_t>(mask.dropout_row + row) : 0u;
}

// Whether lane 0 (low half) or 1 (high half) of a word of a draw keeps its element.
MTBERT_DEVICE bool keeps_low(std::uint32_t word, const DropoutKey& key) { return word << 16 >= key.threshold << 16; }
MTBERT_DEVICE bool keeps_high(std::uint32_t word, const DropoutKey& key) { return word >= key.threshold << 16; }

// Two 16-bit elements under one word of a draw.
MTBERT_DEVICE std::uint32_t masked_pair(std::uint32_t pair, std::uint32_t word, const DropoutKey& key) {
    return pair & ((keeps_low(word, key) ? 0xFFFFu : 0u) | (keeps_high(word, key) ? 0xFFFF0000u : 0u));
}

// The words of a piece: eight 16-bit elements under a whole draw, or four floats under its first two or last two
// words.
template <typename T>
MTBERT_DEVICE void mask_piece(std::uint32_t (&piece)[4], const Philox4& draw, const DropoutKey& key) {
    static_assert(!kIsFloat<T>);
    MTBERT_UNROLL
    for (int i = 0; i < 4; ++i) {
        piece[i] = masked_pair(piece[i], draw.word[i], key);
    }
}
MTBERT_DEVICE void mask_floats(std::uint32_t (&piece)[4], std::uint32_t first, std::uint32_t second,
                               const DropoutKey& key) {
    piece[0] = keeps_low(first, key) ? piece[0] : 0u;
    piece[1] = keeps_high(first, key) ? piece[1] : 0u;
    piece[2] = keeps_low(second, key) ? piece[2] : 0u;
    piece[3] = keeps_high(second, key) ? piece[3] : 0u;
}

// The four lanes of a quad transpose a 4 x 4 matrix of words, of which each lane brings a row and gets a column.
MTBERT_DEVICE void transpose_quad(std::uint32_t (&word)[4]) {
    const int lane = machine::lane_index();
    MTBERT_UNROLL
    for (int bit = 1; bit <= 2; bit *= 2) {
        const bool upper = (lane & bit) != 0;
        MTBERT_UNROLL
        for (int i = 0; i < 2; ++i) {
            const int first = bit == 1 ? 2 * i : i, second = first + bit;
            const std::uint32_t received = machine::shuffle_xor(upper ? word[first] : word[second], bit);
            word[first] = upper ? received : word[first];
            word[second] = upper ? word[second] : received;
        }
    }
}

// The draws that the pieces q of two rows of a panel need, made a step ahead of their use. All lanes of the warp.
template <typename T>
class PanelDraws {
   public:
    // row_low, row_high: the mask's numbers of the rows; column: the panel's first.
    MTBERT_DEVICE void draw(std::uint32_t row_low, std::uint32_t row_high, int column, const DropoutKey& key) {
        const int q = machine::lane_index() % 4;
        const auto group = static_cast<std::uint32_t>(column / kDropoutLanes);
        if constexpr (kIsFloat<T>) {
            // Lanes 2 i and 2 i + 1 hold the halves of one group: the first draws for the one row, the second for
            // the other.
            first_ = dropout_draw(key, q % 2 != 0 ? row_high : row_low, group + static_cast<std::uint32_t>(q / 2));
        } else {
            first_ = dropout_draw(key, row_low, group + static_cast<std::uint32_t>(q));
            second_ = dropout_draw(key, row_high, group + static_cast<std::uint32_t>(q));
        }
    }

    MTBERT_DEVICE void apply(std::uint32_t (&low)[4], std::uint32_t (&high)[4], const DropoutKey& key) const {
        if constexpr (kIsFloat<T>) {
            // Each gives the other its half.
            const bool odd = machine::lane_index() % 2 != 0;
            const std::uint32_t first = machine::shuffle_xor(odd ? first_.word[0] : first_.word[2], 1);
            const std::uint32_t second = machine::shuffle_xor(odd ? first_.word[1] : first_.word[3], 1);
            mask_floats(low, odd ? first : first_.word[0], odd ? second : first_.word[1], key);
            mask_floats(high, odd ? first_.word[2] : first, odd ? first_.word[3] : second, key);
        } else {
            mask_piece<T>(low, first_, key);
            mask_piece<T>(high, second_, key);
        }
    }

   private:
    Philox4 first_{};
    Philox4 second_{};
};

// Accumulators of two neighbouring 16 x 8 tiles (rows g, g + 8; columns 2 q, 2 q + 1), the first one's first
// column being `column`: masked, and scaled by the key's scale. Each lane of a quad makes one of its four draws.
// All lanes of the warp.
MTBERT_DEVICE void mask_accumulators(float (&first)[4], float (&second)[4], std::uint32_t row_low,
                                     std::uint32_t row_high, int column, const DropoutKey& key) {
    const int q = machine::lane_index() % 4;
    const auto group = static_cast<std::uint32_t>(column / kDropoutLanes + q / 2);
    Philox4 draw = dropout_draw(key, q % 2 != 0 ? row_high : row_low, group);
    transpose_quad(draw.word);
    MTBERT_UNROLL
    for (int half = 0; half < 2; ++half) {
        const std::uint32_t word_first = draw.word[half], word_second = draw.word[2 + half];
        first[2 * half] = keeps_low(word_first, key) ? first[2 * half] * key.scale : 0.0f;
        first[2 * half + 1] = keeps_high(word_first, key) ? first[2 * half + 1] * key.scale : 0.0f;
        second[2 * half] = keeps_low(word_second, key) ? second[2 * half] * key.scale : 0.0f;
        second[2 * half + 1] = keeps_high(word_second, key) ? second[2 * half + 1] * key.scale : 0.0f;
    }
}

}  // namespace mtbert::cuda::sm80
