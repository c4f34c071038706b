// Products of matrices whose weights are evenly spaced levels, Q4_0 and Q4_1: included by llama.cpp's
// ggml-cpu/repack.cpp.
//
// A block of such a row has 32 weights `d q + m`, q from 0 to 15 (Q4_0: m is -8 d). Eight rows are kept as one, four
// weights of each beside each other: a vector of 32 bytes is then multiplied by four activations, the same for all rows,
// and has a sum of each row in a lane. q is unsigned and small, so that the products of a whole block are added up in 16
// bits (32 * 15 * 127 / 2 < 2^15), and what m adds is the sum of the activations times m. Nothing is lost by that: the
// activations are llama.cpp's Q8_0, 8 bits and a scale for each 32.
//
// llama.cpp multiplies Q4_1 row by row, and for Q4_0 makes signed numbers of all q first. `evenly_spaced` returns nullptr
// for what is neither, and where the processor has no AVX2.

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

#include <immintrin.h>

#include <vector>

namespace ggml::cpu::repack {

constexpr int EIGHT = 8;                // rows of weights that are kept as one
constexpr int FOUR  = 4;                // rows of activations that llama.cpp keeps as one
constexpr int BLOCK = 32;               // weights with the same d and m
constexpr int PAGE  = 4096;             // bytes ahead of which weights are fetched
constexpr int64_t TILE = 64;            // rows of activations whose scales are at hand at a time

// Eight blocks. Byte 32 i + 4 r + j has weights 4 i + j and 16 + 4 i + j of row r.
struct eight_q4_0 {
    using one = block_q4_0;
    ggml_half d[EIGHT];
    uint8_t   q[EIGHT * BLOCK / 2];

    void set_row(int row, const one & of) { d[row] = of.d; }
    __m256 scale() const { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) d)); }
    __m256 lowest() const { return _mm256_mul_ps(scale(), _mm256_set1_ps(-8.0f)); }
};

struct eight_q4_1 {
    using one = block_q4_1;
    ggml_half d[EIGHT];
    ggml_half m[EIGHT];
    uint8_t   q[EIGHT * BLOCK / 2];

    void set_row(int row, const one & of) { d[row] = of.GGML_COMMON_AGGR_U.GGML_COMMON_AGGR_S.d, m[row] = of.GGML_COMMON_AGGR_U.GGML_COMMON_AGGR_S.m; }
    __m256 scale() const { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) d)); }
    __m256 lowest() const { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) m)); }
};

static_assert(sizeof(eight_q4_0) == EIGHT * sizeof(block_q4_0), "eight rows take what they took before");
static_assert(sizeof(eight_q4_1) == EIGHT * sizeof(block_q4_1), "eight rows take what they took before");

template <typename Eight> static int keep_as_eight(ggml_tensor * tensor, const void * data, size_t size) {
    const int64_t num_blocks = tensor->ne[0] / BLOCK, num_rows = ggml_nrows(tensor);
    if (num_rows % EIGHT != 0 || size != num_rows * num_blocks * sizeof(typename Eight::one)) {
        return -1;
    }
    const auto * from = (const typename Eight::one *) data;
    auto * to = (Eight *) tensor->data;
    for (int64_t row = 0; row < num_rows; row += EIGHT, from += EIGHT * num_blocks) {
        for (int64_t block = 0; block < num_blocks; ++block, ++to) {
            for (int r = 0; r < EIGHT; ++r) {
                const auto & of = from[r * num_blocks + block];
                to->set_row(r, of);
                for (int byte = 0; byte < BLOCK / 2; ++byte) {
                    to->q[BLOCK * (byte / 4) + 4 * r + byte % 4] = of.qs[byte];
                }
            }
        }
    }
    return 0;
}

// What is needed of the activations beside their numbers: of each block the scale, and the scale times their sum.
struct scales {
    std::vector<float> scale, sum;

    void resize(size_t size) {
        if (scale.size() < size) {
            scale.resize(size), sum.resize(size);
        }
    }
};

static scales & at_hand(size_t size) {
    static thread_local scales kept;
    kept.resize(size);
    return kept;
}

static __m256i four_of_each(const int8_t * activations) {
    int32_t four;
    memcpy(&four, activations, sizeof four);
    return _mm256_set1_epi32(four);
}

static __m256i low(__m256i bytes) { return _mm256_and_si256(bytes, _mm256_set1_epi8(15)); }
static __m256i high(__m256i bytes) { return low(_mm256_srli_epi16(bytes, 4)); }

// The products of a block, added up for each row.
struct sums {
    __m256i of = _mm256_setzero_si256();

#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    void add(__m256i q, __m256i activations) { of = _mm256_dpbusd_epi32(of, q, activations); }
    void add(sums other) { of = _mm256_add_epi32(of, other.of); }
    __m256 all() const { return _mm256_cvtepi32_ps(of); }
#else
    void add(__m256i q, __m256i activations) { add({ _mm256_maddubs_epi16(q, activations) }); }
    void add(sums other) { of = _mm256_add_epi16(of, other.of); }
    __m256 all() const { return _mm256_cvtepi32_ps(_mm256_madd_epi16(of, _mm256_set1_epi16(1))); }
#endif
};

// One row of activations.
template <typename Eight> static void multiply_one(int n, float * to, const void * weights, const void * activations, int num_rows) {
    const int num_blocks = n / BLOCK;
    const auto * a = (const block_q8_0 *) activations;
    auto & known = at_hand(num_blocks);
    float * scale = known.scale.data(), * sum = known.sum.data();
    for (int block = 0; block < num_blocks; ++block) {
        const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), _mm256_loadu_si256((const __m256i *) a[block].qs));
        const __m256i fours = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
        __m128i half = _mm_add_epi32(_mm256_castsi256_si128(fours), _mm256_extracti128_si256(fours, 1));
        half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
        half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1));
        scale[block] = GGML_CPU_FP16_TO_FP32(a[block].d);
        sum[block] = scale[block] * _mm_cvtsi128_si32(half);
    }
    const auto * w = (const Eight *) weights;
    for (int row = 0; row < num_rows; row += EIGHT, to += EIGHT) {
        __m256 total = _mm256_setzero_ps(), lowest = _mm256_setzero_ps();
        for (int block = 0; block < num_blocks; ++block, ++w) {
            _mm_prefetch((const char *) w + PAGE, _MM_HINT_T0);
            _mm_prefetch((const char *) w + PAGE + 64, _MM_HINT_T0);
            _mm_prefetch((const char *) w + PAGE + 128, _MM_HINT_T0);
            sums found, others;
            for (int i = 0; i < 4; ++i) {
                const __m256i bytes = _mm256_loadu_si256((const __m256i *) w->q + i);
                found.add(low(bytes), four_of_each(a[block].qs + 4 * i));
                others.add(high(bytes), four_of_each(a[block].qs + BLOCK / 2 + 4 * i));
            }
            found.add(others);
            total = _mm256_fmadd_ps(found.all(), _mm256_mul_ps(w->scale(), _mm256_set1_ps(scale[block])), total);
            lowest = _mm256_fmadd_ps(w->lowest(), _mm256_set1_ps(sum[block]), lowest);
        }
        _mm256_storeu_ps(to, _mm256_add_ps(total, lowest));
    }
}

// The scales of so many rows, a multiple of four: [fours][blocks][4].
static void find_scales(const block_q8_0x4 * a, int64_t num_fours_of_blocks, scales & found) {
    for (int64_t block = 0; block < num_fours_of_blocks; ++block) {
        __m256i pairs = _mm256_setzero_si256(); // of each row in four lanes beside each other
        for (int i = 0; i < 4; ++i) {
            pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(_mm256_set1_epi8(1), _mm256_loadu_si256((const __m256i *) a[block].qs + i)));
        }
        const __m256i twos = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
        const __m128i ones = _mm_hadd_epi32(_mm256_castsi256_si128(twos), _mm256_extracti128_si256(twos, 1));
        const __m128 scale = _mm_cvtph_ps(_mm_loadl_epi64((const __m128i *) a[block].d));
        _mm_storeu_ps(found.scale.data() + FOUR * block, scale);
        _mm_storeu_ps(found.sum.data() + FOUR * block, _mm_mul_ps(scale, _mm_cvtepi32_ps(ones)));
    }
}

// A multiple of four rows of activations.
template <typename Eight> static void multiply_fours(int n, float * to, size_t stride, const void * weights, const void * activations, int num_activations, int num_rows) {
    const int num_blocks = n / BLOCK;
    for (int64_t first = 0; first < num_activations; first += TILE) {
        const int64_t num_fours = MIN(TILE, num_activations - first) / FOUR;
        const auto * a = (const block_q8_0x4 *) activations + first / FOUR * num_blocks;
        auto & known = at_hand(FOUR * num_fours * num_blocks);
        find_scales(a, num_fours * num_blocks, known);
        for (int row = 0; row < num_rows; row += EIGHT) {
            const auto * w = (const Eight *) weights + row / EIGHT * num_blocks;
            for (int64_t four = 0; four < num_fours; ++four) {
                const float * scale = known.scale.data() + FOUR * four * num_blocks, * sum = known.sum.data() + FOUR * four * num_blocks;
                __m256 total[FOUR] = { _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps() };
                for (int block = 0; block < num_blocks; ++block) {
                    const int8_t * numbers = a[four * num_blocks + block].qs;
                    __m256i q[EIGHT];
                    for (int i = 0; i < 4; ++i) {
                        const __m256i bytes = _mm256_loadu_si256((const __m256i *) w[block].q + i);
                        q[i] = low(bytes), q[4 + i] = high(bytes);
                    }
                    const __m256 d = w[block].scale(), m = w[block].lowest();
                    for (int r = 0; r < FOUR; ++r) {
                        sums found;
                        for (int i = 0; i < EIGHT; ++i) {
                            found.add(q[i], four_of_each(numbers + BLOCK * (i / 2) + 8 * r + 4 * (i % 2)));
                        }
                        total[r] = _mm256_fmadd_ps(found.all(), _mm256_mul_ps(d, _mm256_set1_ps(scale[FOUR * block + r])), total[r]);
                        total[r] = _mm256_fmadd_ps(m, _mm256_set1_ps(sum[FOUR * block + r]), total[r]);
                    }
                }
                for (int r = 0; r < FOUR; ++r) {
                    _mm256_storeu_ps(to + (first + FOUR * four + r) * stride + row, total[r]);
                }
            }
        }
    }
}

#define EVENLY_SPACED(EIGHT_OF)                                                                                              \
    template <> int repack<EIGHT_OF, 8, 8>(ggml_tensor * tensor, const void * data, size_t size) {                           \
        return keep_as_eight<EIGHT_OF>(tensor, data, size);                                                                  \
    }                                                                                                                        \
    template <> void gemv<EIGHT_OF, 8, 8, GGML_TYPE_Q8_0>(int n, float * s, size_t, const void * w, const void * a, int, int num_rows) { \
        multiply_one<EIGHT_OF>(n, s, w, a, num_rows);                                                                        \
    }                                                                                                                        \
    template <> void gemm<EIGHT_OF, 8, 8, GGML_TYPE_Q8_0>(int n, float * s, size_t stride, const void * w, const void * a, int num_a, int num_rows) { \
        multiply_fours<EIGHT_OF>(n, s, stride, w, a, num_a, num_rows);                                                       \
    }

EVENLY_SPACED(eight_q4_0)
EVENLY_SPACED(eight_q4_1)

} // namespace ggml::cpu::repack

static const ggml::cpu::tensor_traits * evenly_spaced(const ggml_tensor * weights) {
    static const ggml::cpu::repack::tensor_traits<ggml::cpu::repack::eight_q4_0, 8, 8, GGML_TYPE_Q8_0> q4_0;
    static const ggml::cpu::repack::tensor_traits<ggml::cpu::repack::eight_q4_1, 8, 8, GGML_TYPE_Q8_0> q4_1;
    if (weights->ne[1] % 8 != 0) {
        return nullptr;
    }
    return weights->type == GGML_TYPE_Q4_0 ? &q4_0 : weights->type == GGML_TYPE_Q4_1 ? (const ggml::cpu::tensor_traits *) &q4_1 : nullptr;
}

#else

static const ggml::cpu::tensor_traits * evenly_spaced(const ggml_tensor *) { return nullptr; }

#endif
