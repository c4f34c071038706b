"""What is added to llama.cpp's source before its kernels are compiled, and why. Decision 0012 says what it gives."""

from __future__ import annotations

ADDED = (
    ("ggml-cpu.c", "nchunk0 * nchunk1 < nth * 4 || ggml_is_numa()", " || nr1 == 1"),
    ("repack.cpp", "const bool disable_chunking = ggml_is_numa()", " || ne1 == 1"),
    (
        "llamafile/sgemm.cpp",
        "(A[lda * (ii + 0) + l].d);",
        " for (int64_t i = 0; i < 4; ++i)"
        " __builtin_prefetch((const char *) (A + lda * (ii + 4)) + (l * 4 + i) * sizeof(TA));",
    ),
    (
        "arch/x86/quants.c",
        "__m256i qx = _mm256_loadu_si256((const __m256i *)x[ib].qs);",
        " _mm_prefetch((const char *) (x + ib) + 4096, _MM_HINT_T0);",
    ),
    (
        "arch/x86/repack.cpp",
        "// Load 8 blocks of 32 interleaved as 8 bytes (B0 - B7)",
        "\n_mm_prefetch((const char *) (b_ptr + b) + 4096, _MM_HINT_T0);"
        " _mm_prefetch((const char *) (b_ptr + b) + 4160, _MM_HINT_T0);",
    ),
    (
        "repack.cpp",
        "repack<BLOC_TYPE, INTER_SIZE, NB_COLS>(t, data, data_size);\n    }\n};\n\n}  // namespace ggml::cpu::repack\n",
        '\n#include "affine.cpp"\n',
    ),
    (
        "repack.cpp",
        "ggml_repack_get_optimal_repack_type(const struct ggml_tensor * cur) {",
        "\n    if (const auto * evenly = evenly_spaced(cur)) return evenly;",
    ),
    ("repack.cpp", '#include "repack.h"', "\ntemplate <typename> constexpr bool takes_a_few = false;"),
    (
        "repack.cpp",
        "const int64_t ncols = src0_end - src0_start;",
        "\nconst int64_t at_once = MAX(NB_COLS, (128 << 10) / (int64_t) nb01 / NB_COLS * NB_COLS);"
        "\nif (nrows > (takes_a_few<BLOC_TYPE> ? 4 : 1) && nrows < 16 && nrows % 4 != 0 && ncols > at_once) {"
        " for (int64_t at = src0_start; at < src0_end; at += at_once)"
        " forward_mul_mat_one_chunk(params, op, at, MIN(at + at_once, src0_end), src1_start, src1_end);"
        " return; }",
    ),
    (
        "repack.cpp",
        "nrows - (nrows % 4), ncols);\n        }\n",
        "if (const int64_t few = nrows % 4; takes_a_few<BLOC_TYPE> && few > 1) {"
        " float * to = (float *) (dst_ptr + (nrows - few) * nb1) + src0_start;"
        " const char * from = src1_ptr + src1_col_stride * (nrows - few);"
        " gemv<BLOC_TYPE, INTER_SIZE, NB_COLS, PARAM_TYPE>"
        "(ne00, to, nb1 / nb0, src0_ptr + src0_start * nb01, from, few, ncols);"
        " return; }\n",
    ),
    ("vec.cpp", "#include <cassert>", '\n#include "calls.cpp"'),
    ("ops.cpp", "#include <cmath>", '\n#include "attention.cpp"'),
    ("ggml-cpu.c", '#include "ops.h"', "\nvoid begin_graph(void);"),
    (
        "ggml-cpu.c",
        "ggml_graph_compute(struct ggml_cgraph * cgraph, struct ggml_cplan * cplan) {",
        "\n    begin_graph();",
    ),
    ("ops.cpp", "const bool use_ref = params->use_ref;", " if (!use_ref && attend_together(params, dst)) return;"),
)
"""Files, a text in each, and what is added behind it.

Of a matrix that is multiplied by one vector, every thread takes an equal part, as llama.cpp has it where memory has
several nodes. Taking turns of 64 rows, two threads read memory at two thirds of its speed, and a stream is nothing but
reading memory. It changes no result.

Of a matrix that is multiplied by a few vectors, the next four rows are fetched while four are computed: rows that are
short and read four at a time are no pattern to the processor, which then waits for each. Two streams were slower side
by side than one after the other. It changes no result either.

Of a matrix that is multiplied by one vector, Q8_0 and Q4_0 are fetched a page ahead: what a processor fetches by itself
ends with the page, and where that of the next one is takes it long to find out, on a virtual machine longest.

Attention is computed by `attention.cpp` where it can, for which results are added up in F32.

Of a few vectors, those left over when four are taken at a time are multiplied together where that can be done, else one
after the other: with rows that stay in the second cache meanwhile, not each with the whole matrix.

How weights are kept for a product is asked of `affine.cpp` first, which has Q4_0, Q4_1 and Q8_0 eight rows at a time.

`calls.cpp` has samplers, which need the vector functions of the file it is in, and what slots share.
"""
