// The Python functions of mtbert._C.cpu: they check every argument, release the GIL, and call the kernels of the
// instruction set in force.
#include "cpu/cpu_ops.h"

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/threads.h"

namespace py = pybind11;

namespace mtbert {
namespace {

using Address = std::uintptr_t;
using Int = std::int64_t;

// ---- instruction sets

// What this processor has, best first.
const std::vector<const Kernels*>& supported() {
    static const std::vector<const Kernels*> tables = [] {
        std::vector<const Kernels*> found;
#ifdef MTBERT_X86
        __builtin_cpu_init();
        const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
        const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
        const Kernels* bf16 = kernels_avx512bf16();
        if (avx512 && bf16 != nullptr && __builtin_cpu_supports("avx512bf16")) found.push_back(bf16);
        if (avx512) found.push_back(kernels_avx512());
        if (avx2) found.push_back(kernels_avx2());
#endif
        found.push_back(kernels_baseline());
        return found;
    }();
    return tables;
}

const Kernels* find(const std::string& name, const std::string& source) {
    std::string names;
    for (const Kernels* table : supported()) {
        if (name == table->name) return table;
        names += std::string(names.empty() ? "" : ", ") + table->name;
    }
    throw std::invalid_argument(source + ": this processor and build have no instruction set '" + name +
                                "', only " + names);
}

std::atomic<const Kernels*> chosen{nullptr};

const Kernels& kernels() {
    const Kernels* table = chosen.load();
    if (table == nullptr) {
        const char* name = std::getenv("MTBERT_CPU_ISA");
        table = name == nullptr || *name == '\0' ? supported().front() : find(name, "MTBERT_CPU_ISA");
        chosen = table;
    }
    return *table;
}

// ---- arguments

[[noreturn]] void fail(const char* operation, const char* argument, const std::string& problem) {
    throw std::invalid_argument(std::string(operation) + ": " + argument + " " + problem);
}

DType dtype_of(const char* operation, const char* argument, const std::string& name) {
    if (name == "float32") return DType::kFloat32;
    if (name == "bfloat16") return DType::kBFloat16;
    fail(operation, argument, "must be float32 or bfloat16, got '" + name + "'");
}

void check_size(const char* operation, const char* argument, Int value, Int least) {
    if (value < least) fail(operation, argument, "must be at least " + std::to_string(least) + ", got " + std::to_string(value));
}

template <class T>
T* required(const char* operation, const char* argument, Address address, Int elements) {
    if (address == 0 && elements > 0) fail(operation, argument, "must not be null");
    if (address % alignof(T) != 0) fail(operation, argument, "must be aligned to its elements");
    return reinterpret_cast<T*>(address);
}

template <class T>
T* optional(const char* operation, const char* argument, Address address) {
    return required<T>(operation, argument, address, 0);
}

void* data(const char* operation, const char* argument, Address address, Int elements, DType dtype) {
    if (address == 0 && elements > 0) fail(operation, argument, "must not be null");
    if (address % (dtype == DType::kFloat32 ? 4 : 2) != 0) fail(operation, argument, "must be aligned to its elements");
    return reinterpret_cast<void*>(address);
}

std::uint32_t word(const char* operation, const char* argument, Int value) {
    if (value < 0 || value > 0xFFFFFFFFll) fail(operation, argument, "must be in [0, 2**32), got " + std::to_string(value));
    return static_cast<std::uint32_t>(value);
}

int thread_count(const char* operation, Int threads) {
    if (threads < 1 || threads > 1024) fail(operation, "threads", "must be 1 to 1024, got " + std::to_string(threads));
    return static_cast<int>(threads);
}

Mask mask_of(const char* operation, Address dropout_row, std::uint64_t seed, Int step, Int site, Int threshold) {
    if (threshold < 0 || threshold > 65535) {
        fail(operation, "threshold", "must be 0 to 65535, got " + std::to_string(threshold));
    }
    const DropoutKey key = make_dropout_key(seed, word(operation, "step", step), word(operation, "site", site),
                                            static_cast<std::uint32_t>(threshold));
    return {optional<const std::int32_t>(operation, "dropout_row", dropout_row), key};
}

// ---- operations

void dropout(Address x, Address out, Int rows, Int columns, const std::string& dtype, Int threads, Address dropout_row,
             std::uint64_t seed, Int step, Int site, Int threshold) {
    constexpr const char* kName = "dropout";
    check_size(kName, "rows", rows, 0);
    check_size(kName, "columns", columns, 0);
    const DType type = dtype_of(kName, "dtype", dtype);
    DropoutArguments a{};
    a.x = data(kName, "x", x, rows * columns, type);
    a.out = data(kName, "out", out, rows * columns, type);
    a.rows = rows;
    a.columns = columns;
    a.dtype = type;
    a.mask = mask_of(kName, dropout_row, seed, step, site, threshold);
    if (a.mask.row == nullptr && rows > 0) fail(kName, "dropout_row", "must not be null");
    a.threads = thread_count(kName, threads);
    const Kernels& table = kernels();
    py::gil_scoped_release release;
    table.dropout(a);
}

void column_sums(Address x, Address out, Int rows, Int columns, const std::string& dtype, Int threads) {
    constexpr const char* kName = "column_sums";
    check_size(kName, "rows", rows, 0);
    check_size(kName, "columns", columns, 1);
    ColumnSumsArguments a{};
    a.dtype = dtype_of(kName, "dtype", dtype);
    a.x = data(kName, "x", x, rows, a.dtype);
    a.out = required<float>(kName, "out", out, columns);
    a.rows = rows;
    a.columns = columns;
    a.threads = thread_count(kName, threads);
    const Kernels& table = kernels();
    py::gil_scoped_release release;
    table.column_sums(a);
}

void check_heads(const char* operation, Int heads, Int head_dim) {
    check_size(operation, "heads", heads, 1);
    if (head_dim < 16 || head_dim > kMaxHeadDim || head_dim % 16 != 0) {
        fail(operation, "head_dim", "must be a multiple of 16 up to 128, got " + std::to_string(head_dim));
    }
}

// cu_seqlens must ascend within 0 to tokens, in steps of at most max_seqlen.
void check_sequences(const char* operation, const std::int32_t* cu_seqlens, Int sequences, Int tokens, Int max_seqlen) {
    if (max_seqlen < 1 || max_seqlen > kHeadColumns) {
        fail(operation, "max_seqlen", "must be 1 to 4096, got " + std::to_string(max_seqlen));
    }
    Int before = 0;
    for (Int n = 0; n <= sequences; ++n) {
        const Int here = cu_seqlens[n];
        if (here < before || here > tokens) {
            fail(operation, "cu_seqlens", "must ascend within 0 to " + std::to_string(tokens) + ", got " +
                                              std::to_string(here) + " after " + std::to_string(before) + " at element " +
                                              std::to_string(n));
        }
        if (n > 0 && here - before > max_seqlen) {
            fail(operation, "max_seqlen", "is " + std::to_string(max_seqlen) + ", but sequence " + std::to_string(n - 1) +
                                              " has " + std::to_string(here - before) + " tokens");
        }
        before = here;
    }
}

AttentionArguments attention_arguments(Address qkv, Address cu_seqlens, Int tokens, Int sequences, Int heads,
                                       Int head_dim, Int max_seqlen, double scale, const std::string& dtype, Int threads,
                                       Address dropout_row, std::uint64_t seed, Int step, Int site, Int threshold) {
    constexpr const char* kName = "attention";
    check_size(kName, "tokens", tokens, 0);
    check_size(kName, "sequences", sequences, 0);
    check_heads(kName, heads, head_dim);
    if (!(scale > 0.0)) fail(kName, "scale", "must be positive, got " + std::to_string(scale));
    AttentionArguments a{};
    a.dtype = dtype_of(kName, "dtype", dtype);
    a.qkv = data(kName, "qkv", qkv, tokens, a.dtype);
    a.cu_seqlens = required<const std::int32_t>(kName, "cu_seqlens", cu_seqlens, 1);
    a.tokens = tokens;
    a.sequences = sequences;
    a.heads = heads;
    a.head_dim = head_dim;
    a.scale = static_cast<float>(scale);
    a.mask = mask_of(kName, dropout_row, seed, step, site, threshold);
    a.threads = thread_count(kName, threads);
    check_sequences(kName, a.cu_seqlens, sequences, tokens, max_seqlen);
    return a;
}

void attention_forward(Address qkv, Address cu_seqlens, Address out, Int tokens, Int sequences, Int heads, Int head_dim,
                       Int max_seqlen, double scale, const std::string& dtype, Int threads, Address dropout_row,
                       std::uint64_t seed, Int step, Int site, Int threshold) {
    AttentionArguments a = attention_arguments(qkv, cu_seqlens, tokens, sequences, heads, head_dim, max_seqlen, scale,
                                               dtype, threads, dropout_row, seed, step, site, threshold);
    a.out = data("attention", "out", out, tokens, a.dtype);
    const Kernels& table = kernels();
    py::gil_scoped_release release;
    table.attention_forward(a);
}

void attention_backward(Address qkv, Address cu_seqlens, Address dout, Address dqkv, Int tokens, Int sequences, Int heads,
                        Int head_dim, Int max_seqlen, double scale, const std::string& dtype, Int threads,
                        Address dropout_row, std::uint64_t seed, Int step, Int site, Int threshold) {
    AttentionArguments a = attention_arguments(qkv, cu_seqlens, tokens, sequences, heads, head_dim, max_seqlen, scale,
                                               dtype, threads, dropout_row, seed, step, site, threshold);
    a.dout = data("attention", "dout", dout, tokens, a.dtype);
    a.dqkv = data("attention", "dqkv", dqkv, tokens, a.dtype);
    const Kernels& table = kernels();
    py::gil_scoped_release release;
    table.attention_backward(a);
}

FirstTokenAttentionArguments first_token_attention_arguments(Address query, Address key_value, Address cu_seqlens,
                                                             Int tokens, Int sequences, Int heads, Int head_dim,
                                                             Int max_seqlen, double scale, const std::string& dtype,
                                                             Int threads, Address dropout_row, std::uint64_t seed,
                                                             Int step, Int site, Int threshold) {
    constexpr const char* kName = "first_token_attention";
    check_size(kName, "tokens", tokens, 0);
    check_size(kName, "sequences", sequences, 0);
    check_heads(kName, heads, head_dim);
    if (!(scale > 0.0)) fail(kName, "scale", "must be positive, got " + std::to_string(scale));
    FirstTokenAttentionArguments a{};
    a.dtype = dtype_of(kName, "dtype", dtype);
    a.query = data(kName, "query", query, sequences, a.dtype);
    a.key_value = data(kName, "key_value", key_value, tokens, a.dtype);
    a.cu_seqlens = required<const std::int32_t>(kName, "cu_seqlens", cu_seqlens, 1);
    a.tokens = tokens;
    a.sequences = sequences;
    a.heads = heads;
    a.head_dim = head_dim;
    a.scale = static_cast<float>(scale);
    a.mask = mask_of(kName, dropout_row, seed, step, site, threshold);
    a.threads = thread_count(kName, threads);
    check_sequences(kName, a.cu_seqlens, sequences, tokens, max_seqlen);
    return a;
}

void first_token_attention_forward(Address query, Address key_value, Address cu_seqlens, Address out, Int tokens,
                                   Int sequences, Int heads, Int head_dim, Int max_seqlen, double scale,
                                   const std::string& dtype, Int threads, Address dropout_row, std::uint64_t seed,
                                   Int step, Int site, Int threshold) {
    FirstTokenAttentionArguments a =
        first_token_attention_arguments(query, key_value, cu_seqlens, tokens, sequences, heads, head_dim, max_seqlen,
                                        scale, dtype, threads, dropout_row, seed, step, site, threshold);
    a.out = data("first_token_attention", "out", out, sequences, a.dtype);
    const Kernels& table = kernels();
    py::gil_scoped_release release;
    table.first_token_attention_forward(a);
}

void first_token_attention_backward(Address query, Address key_value, Address cu_seqlens, Address dout, Address dquery,
                                    Address dkey_value, Int tokens, Int sequences, Int heads, Int head_dim,
                                    Int max_seqlen, double scale, const std::string& dtype, Int threads,
                                    Address dropout_row, std::uint64_t seed, Int step, Int site, Int threshold) {
    constexpr const char* kName = "first_token_attention";
    FirstTokenAttentionArguments a =
        first_token_attention_arguments(query, key_value, cu_seqlens, tokens, sequences, heads, head_dim, max_seqlen,
                                        scale, dtype, threads, dropout_row, seed, step, site, threshold);
    a.dout = data(kName, "dout", dout, sequences, a.dtype);
    a.dquery = data(kName, "dquery", dquery, sequences, a.dtype);
    a.dkey_value = data(kName, "dkey_value", dkey_value, tokens, a.dtype);
    const Kernels& table = kernels();
    py::gil_scoped_release release;
    table.first_token_attention_backward(a);
}

AddLayerNormArguments add_layer_norm_arguments(Address x, Address residual, Address linear_bias, Address weight,
                                               Address mean, Address rstd, Int rows, Int columns,
                                               const std::string& dtype, Int threads, Address dropout_row,
                                               std::uint64_t seed, Int step, Int site, Int threshold) {
    constexpr const char* kName = "add_layer_norm";
    check_size(kName, "rows", rows, 0);
    check_size(kName, "columns", columns, 1);
    AddLayerNormArguments a{};
    a.dtype = dtype_of(kName, "dtype", dtype);
    a.x = data(kName, "x", x, rows, a.dtype);
    a.residual = data(kName, "residual", residual, rows, a.dtype);
    a.linear_bias = optional<const float>(kName, "linear_bias", linear_bias);
    a.weight = required<const float>(kName, "weight", weight, columns);
    a.mean = required<float>(kName, "mean", mean, rows);
    a.rstd = required<float>(kName, "rstd", rstd, rows);
    a.rows = rows;
    a.columns = columns;
    a.mask = mask_of(kName, dropout_row, seed, step, site, threshold);
    a.threads = thread_count(kName, threads);
    return a;
}

void add_layer_norm_forward(Address x, Address residual, Address linear_bias, Address weight, Address bias, Address out,
                            Address mean, Address rstd, Int rows, Int columns, double eps, const std::string& dtype,
                            Int threads, Address dropout_row, std::uint64_t seed, Int step, Int site, Int threshold) {
    AddLayerNormArguments a = add_layer_norm_arguments(x, residual, linear_bias, weight, mean, rstd, rows, columns, dtype,
                                                       threads, dropout_row, seed, step, site, threshold);
    a.bias = required<const float>("add_layer_norm", "bias", bias, columns);
    a.out = data("add_layer_norm", "out", out, rows, a.dtype);
    a.eps = static_cast<float>(eps);
    const Kernels& table = kernels();
    py::gil_scoped_release release;
    table.add_layer_norm_forward(a);
}

void add_layer_norm_backward(Address dout, Address x, Address residual, Address linear_bias, Address weight, Address mean,
                             Address rstd, Address dx, Address dresidual, Address dweight, Address dbias,
                             Address dlinear_bias, Int rows, Int columns, const std::string& dtype, Int threads,
                             Address dropout_row, std::uint64_t seed, Int step, Int site, Int threshold) {
    constexpr const char* kName = "add_layer_norm";
    AddLayerNormArguments a = add_layer_norm_arguments(x, residual, linear_bias, weight, mean, rstd, rows, columns, dtype,
                                                       threads, dropout_row, seed, step, site, threshold);
    a.dout = data(kName, "dout", dout, rows, a.dtype);
    a.dx = data(kName, "dx", dx, 0, a.dtype);
    a.dresidual = data(kName, "dresidual", dresidual, 0, a.dtype);
    a.dweight = optional<float>(kName, "dweight", dweight);
    a.dbias = optional<float>(kName, "dbias", dbias);
    a.dlinear_bias = optional<float>(kName, "dlinear_bias", dlinear_bias);
    const Kernels& table = kernels();
    py::gil_scoped_release release;
    table.add_layer_norm_backward(a);
}

BiasGeluArguments bias_gelu_arguments(Address x, Address bias, Int rows, Int columns, const std::string& dtype,
                                      Int threads) {
    constexpr const char* kName = "bias_gelu";
    check_size(kName, "rows", rows, 0);
    check_size(kName, "columns", columns, 1);
    BiasGeluArguments a{};
    a.dtype = dtype_of(kName, "dtype", dtype);
    a.x = data(kName, "x", x, rows, a.dtype);
    a.bias = required<const float>(kName, "bias", bias, columns);
    a.rows = rows;
    a.columns = columns;
    a.threads = thread_count(kName, threads);
    return a;
}

void bias_gelu_forward(Address x, Address bias, Address out, Int rows, Int columns, const std::string& dtype,
                       Int threads) {
    BiasGeluArguments a = bias_gelu_arguments(x, bias, rows, columns, dtype, threads);
    a.out = data("bias_gelu", "out", out, rows, a.dtype);
    const Kernels& table = kernels();
    py::gil_scoped_release release;
    table.bias_gelu_forward(a);
}

void bias_gelu_backward(Address dout, Address x, Address bias, Address dx, Address dbias, Int rows, Int columns,
                        const std::string& dtype, Int threads) {
    BiasGeluArguments a = bias_gelu_arguments(x, bias, rows, columns, dtype, threads);
    a.dout = data("bias_gelu", "dout", dout, rows, a.dtype);
    a.dx = data("bias_gelu", "dx", dx, 0, a.dtype);
    a.dbias = optional<float>("bias_gelu", "dbias", dbias);
    const Kernels& table = kernels();
    py::gil_scoped_release release;
    table.bias_gelu_backward(a);
}

const std::int32_t* indices_below(const char* operation, const char* argument, Address address, Int rows, Int limit) {
    const std::int32_t* indices = required<const std::int32_t>(operation, argument, address, rows);
    for (Int t = 0; t < rows; ++t) {
        if (indices[t] < 0 || indices[t] >= limit) {
            fail(operation, argument, "must be 0 to " + std::to_string(limit - 1) + ", got " +
                                          std::to_string(indices[t]) + " at token " + std::to_string(t));
        }
    }
    return indices;
}

EmbeddingArguments embedding_arguments(Address ids, Address type_ids, Address positions, Address words,
                                       Address position_table, Address types, Int word_rows, Int position_rows,
                                       Int type_rows, Address weight, Address mean, Address rstd, Int rows, Int columns,
                                       const std::string& dtype, const std::string& table_dtype, Int threads,
                                       Address dropout_row, std::uint64_t seed, Int step, Int site, Int threshold) {
    constexpr const char* kName = "embedding";
    check_size(kName, "rows", rows, 0);
    check_size(kName, "columns", columns, 1);
    EmbeddingArguments a{};
    a.dtype = dtype_of(kName, "dtype", dtype);
    a.table_dtype = dtype_of(kName, "table_dtype", table_dtype);
    const char* index_names[3] = {"ids", "positions", "type_ids"};
    const char* table_names[3] = {"words", "position_table", "types"};
    const Address indices[3] = {ids, positions, type_ids};
    const Address tables[3] = {words, position_table, types};
    const Int table_rows[3] = {word_rows, position_rows, type_rows};
    for (int i = 0; i < 3; ++i) {
        a.indices[i] = indices_below(kName, index_names[i], indices[i], rows, table_rows[i]);
        a.tables[i] = data(kName, table_names[i], tables[i], rows, a.table_dtype);
    }
    a.weight = required<const float>(kName, "weight", weight, columns);
    a.mean = required<float>(kName, "mean", mean, rows);
    a.rstd = required<float>(kName, "rstd", rstd, rows);
    a.rows = rows;
    a.columns = columns;
    a.mask = mask_of(kName, dropout_row, seed, step, site, threshold);
    a.threads = thread_count(kName, threads);
    return a;
}

void embedding_forward(Address ids, Address type_ids, Address positions, Address words, Address position_table,
                       Address types, Int word_rows, Int position_rows, Int type_rows, Address weight, Address bias,
                       Address out, Address mean, Address rstd, Int rows, Int columns, double eps,
                       const std::string& dtype, const std::string& table_dtype, Int threads, Address dropout_row,
                       std::uint64_t seed, Int step, Int site, Int threshold) {
    EmbeddingArguments a =
        embedding_arguments(ids, type_ids, positions, words, position_table, types, word_rows, position_rows, type_rows,
                            weight, mean, rstd, rows, columns, dtype, table_dtype, threads, dropout_row, seed, step, site,
                            threshold);
    a.bias = required<const float>("embedding", "bias", bias, columns);
    a.out = data("embedding", "out", out, rows, a.dtype);
    a.eps = static_cast<float>(eps);
    const Kernels& table = kernels();
    py::gil_scoped_release release;
    table.embedding_forward(a);
}

void embedding_backward(Address dout, Address ids, Address type_ids, Address positions, Address words,
                        Address position_table, Address types, Int word_rows, Int position_rows, Int type_rows,
                        Address weight, Address mean, Address rstd, Address word_slots, Int slot_rows, Address dwords,
                        Address dposition_table, Address dtypes, Address dweight, Address dbias, Int rows, Int columns,
                        const std::string& dtype, const std::string& table_dtype, Int threads, Address dropout_row,
                        std::uint64_t seed, Int step, Int site, Int threshold) {
    constexpr const char* kName = "embedding";
    EmbeddingArguments a =
        embedding_arguments(ids, type_ids, positions, words, position_table, types, word_rows, position_rows, type_rows,
                            weight, mean, rstd, rows, columns, dtype, table_dtype, threads, dropout_row, seed, step, site,
                            threshold);
    a.dout = data(kName, "dout", dout, rows, a.dtype);
    a.dtables[0] = optional<float>(kName, "dwords", dwords);
    a.dtables[1] = optional<float>(kName, "dposition_table", dposition_table);
    a.dtables[2] = optional<float>(kName, "dtypes", dtypes);
    for (int i = 0; i < 3; ++i) a.targets[i] = a.indices[i];
    if (word_slots != 0) a.targets[0] = indices_below(kName, "word_slots", word_slots, rows, slot_rows);
    a.dweight = optional<float>(kName, "dweight", dweight);
    a.dbias = optional<float>(kName, "dbias", dbias);
    const Kernels& table = kernels();
    py::gil_scoped_release release;
    table.embedding_backward(a);
}

}  // namespace

void register_cpu(py::module_& m) {
    using py::arg;
    const auto row = arg("dropout_row");
    const auto seed = arg("seed");
    const auto step = arg("step");
    const auto site = arg("site");
    const auto threshold = arg("threshold");

    m.def("instruction_sets", [] {
        std::vector<std::string> names;
        for (const Kernels* table : supported()) names.emplace_back(table->name);
        py::list result;
        for (const std::string& name : names) result.append(name);
        return result;
    }, "What this processor and build have, best first.");
    m.def("instruction_set", [] { return kernels().name; },
          "The one in force: the best, or what MTBERT_CPU_ISA named at the first call, or set_instruction_set's.");
    m.def("set_instruction_set", [](const std::string& name) { chosen = find(name, "set_instruction_set"); }, arg("name"),
          "Choose one by name. ValueError where the processor or the build has it not.");
    m.def("thread_source", [] { return thread_source(); },
          "Whose threads work: openmp (the runtime that is already in the process) or own.");

    const char* common =
        "Pointers are integers, 0 for none; tensors are contiguous; dtype is float32 or bfloat16; dropout_row points to\n"
        "int32 rows of the mask, 0 for no dropout. ValueError names a bad argument.";
    const std::string note = common;
    m.def("dropout", &dropout, arg("x"), arg("out"), arg("rows"), arg("columns"), arg("dtype"), arg("threads"), row, seed,
          step, site, threshold, ("out [rows, columns] = dropout(x); out may be x.\n\n" + note).c_str());
    m.def("column_sums", &column_sums, arg("x"), arg("out"), arg("rows"), arg("columns"), arg("dtype"), arg("threads"),
          ("out float32 [columns], the sum over the rows of x.\n\n" + note).c_str());
    m.def("attention_forward", &attention_forward, arg("qkv"), arg("cu_seqlens"), arg("out"), arg("tokens"),
          arg("sequences"), arg("heads"), arg("head_dim"), arg("max_seqlen"), arg("scale"), arg("dtype"), arg("threads"),
          row, seed, step, site, threshold,
          ("out [tokens, heads, head_dim] of qkv [tokens, 3, heads, head_dim].\n\n" + note).c_str());
    m.def("attention_backward", &attention_backward, arg("qkv"), arg("cu_seqlens"), arg("dout"), arg("dqkv"),
          arg("tokens"), arg("sequences"), arg("heads"), arg("head_dim"), arg("max_seqlen"), arg("scale"), arg("dtype"),
          arg("threads"), row, seed, step, site, threshold, ("dqkv from dout and qkv.\n\n" + note).c_str());
    m.def("first_token_attention_forward", &first_token_attention_forward, arg("query"), arg("key_value"),
          arg("cu_seqlens"), arg("out"), arg("tokens"), arg("sequences"), arg("heads"), arg("head_dim"),
          arg("max_seqlen"), arg("scale"), arg("dtype"), arg("threads"), row, seed, step, site, threshold,
          ("out [sequences, heads, head_dim] of query, likewise, and key_value [tokens, 2, heads, head_dim].\n\n" + note)
              .c_str());
    m.def("first_token_attention_backward", &first_token_attention_backward, arg("query"), arg("key_value"),
          arg("cu_seqlens"), arg("dout"), arg("dquery"), arg("dkey_value"), arg("tokens"), arg("sequences"),
          arg("heads"), arg("head_dim"), arg("max_seqlen"), arg("scale"), arg("dtype"), arg("threads"), row, seed, step,
          site, threshold, ("dquery and dkey_value from dout, query and key_value.\n\n" + note).c_str());
    m.def("add_layer_norm_forward", &add_layer_norm_forward, arg("x"), arg("residual"), arg("linear_bias"), arg("weight"),
          arg("bias"), arg("out"), arg("mean"), arg("rstd"), arg("rows"), arg("columns"), arg("eps"), arg("dtype"),
          arg("threads"), row, seed, step, site, threshold,
          ("out = LayerNorm(residual + dropout(x + linear_bias)); parameters and statistics are float32.\n\n" + note)
              .c_str());
    m.def("add_layer_norm_backward", &add_layer_norm_backward, arg("dout"), arg("x"), arg("residual"), arg("linear_bias"),
          arg("weight"), arg("mean"), arg("rstd"), arg("dx"), arg("dresidual"), arg("dweight"), arg("dbias"),
          arg("dlinear_bias"), arg("rows"), arg("columns"), arg("dtype"), arg("threads"), row, seed, step, site,
          threshold, ("Each gradient may be 0: not wanted.\n\n" + note).c_str());
    m.def("bias_gelu_forward", &bias_gelu_forward, arg("x"), arg("bias"), arg("out"), arg("rows"), arg("columns"),
          arg("dtype"), arg("threads"), ("out = gelu(x + bias), exact; bias is float32.\n\n" + note).c_str());
    m.def("bias_gelu_backward", &bias_gelu_backward, arg("dout"), arg("x"), arg("bias"), arg("dx"), arg("dbias"),
          arg("rows"), arg("columns"), arg("dtype"), arg("threads"),
          ("Each gradient may be 0: not wanted.\n\n" + note).c_str());
    m.def("embedding_forward", &embedding_forward, arg("ids"), arg("type_ids"), arg("positions"), arg("words"),
          arg("position_table"), arg("types"), arg("word_rows"), arg("position_rows"), arg("type_rows"), arg("weight"),
          arg("bias"), arg("out"), arg("mean"), arg("rstd"), arg("rows"), arg("columns"), arg("eps"), arg("dtype"),
          arg("table_dtype"), arg("threads"), row, seed, step, site, threshold,
          ("out = dropout(LayerNorm(words[ids] + position_table[positions] + types[type_ids])).\n\n" + note).c_str());
    m.def("embedding_backward", &embedding_backward, arg("dout"), arg("ids"), arg("type_ids"), arg("positions"),
          arg("words"), arg("position_table"), arg("types"), arg("word_rows"), arg("position_rows"), arg("type_rows"),
          arg("weight"), arg("mean"), arg("rstd"), arg("word_slots"), arg("slot_rows"), arg("dwords"),
          arg("dposition_table"), arg("dtypes"), arg("dweight"), arg("dbias"), arg("rows"), arg("columns"), arg("dtype"),
          arg("table_dtype"), arg("threads"), row, seed, step, site, threshold,
          ("Adds to the tables' zeroed float32 gradients; each gradient may be 0: not wanted. dwords has the rows of words,\n"
           "or, where word_slots (int32 [rows]) is not 0, slot_rows rows, of which token t adds to word_slots[t].\n\n" + note)
              .c_str());
}

}  // namespace mtbert
