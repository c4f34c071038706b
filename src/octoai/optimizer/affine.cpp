// Products of matrices whose weights are evenly spaced levels, Q4_0, Q4_1 and Q8_0: included by llama.cpp's
// ggml-cpu/repack.cpp.
//
// A block of such a row has 32 weights `d q + m`, q from 0 to 15 (Q4_0: m is -8 d). Eight rows are kept as one, four
// weights of each beside each other: a vector of 32 bytes is then multiplied by four activations, the same for all rows,
// and has a sum of each row in a lane. q is unsigned and small, so that the products of a whole block are added up in 16
// bits (32 * 15 * 127 / 2 < 2^15), and what m adds is the sum of the activations times m. Nothing is lost by that: the
// activations are llama.cpp's Q8_0, 8 bits and a scale for each 32.
//
// Weights of Q8_0 are signed. They are kept with 128 added, which is taken off where a sum begins. That takes sums of 32
// bits, and so a processor that has dot products of bytes.
//
// llama.cpp multiplies Q4_1 and Q8_0 row by row, and for Q4_0 makes signed numbers of all q first. `evenly_spaced`
// returns nullptr for what is none of them, and where the processor has no AVX2.

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

#include <immintrin.h>

#include <vector>

// Dot products of bytes: of vectors of 64, or of 32 as in processors without AVX-512.
#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define HAS_WIDE_DOT_PRODUCTS 1
#define HAS_DOT_PRODUCTS 1
#define DOT_PRODUCTS _mm256_dpbusd_epi32
#elif defined(__AVXVNNI__)
#define HAS_DOT_PRODUCTS 1
#define DOT_PRODUCTS _mm256_dpbusd_avx_epi32
#endif

namespace ggml::cpu::repack {

constexpr int EIGHT = 8;                // rows of weights that are kept as one
constexpr int FOUR  = 4;                // rows of activations that llama.cpp keeps as one
constexpr int BLOCK = 32;               // weights with the same d and m
constexpr int PAGE  = 4096;             // bytes ahead of which weights are fetched
constexpr int64_t TILE = 64;            // rows of activations whose scales are at hand at a time

// Eight blocks. Byte 32 i + 4 r + j has weights 4 i + j and 16 + 4 i + j of row r.
struct eight_q4_0 {
    using one = block_q4_0;
    static constexpr int ADDED = 0; // to each weight
    ggml_half d[EIGHT];
    uint8_t   q[EIGHT * BLOCK / 2];

    void set_row(int row, const one & of) { d[row] = of.d; }
    __m256 scale() const { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) d)); }
    __m256 lowest() const { return _mm256_mul_ps(scale(), _mm256_set1_ps(-8.0f)); }
};

struct eight_q4_1 {
    using one = block_q4_1;
    static constexpr int ADDED = 0;
    ggml_half d[EIGHT];
    ggml_half m[EIGHT];
    uint8_t   q[EIGHT * BLOCK / 2];

    void set_row(int row, const one & of) { d[row] = of.GGML_COMMON_AGGR_U.GGML_COMMON_AGGR_S.d, m[row] = of.GGML_COMMON_AGGR_U.GGML_COMMON_AGGR_S.m; }
    __m256 scale() const { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) d)); }
    __m256 lowest() const { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) m)); }
};

// Byte 32 i + 4 r + j has weight 4 i + j of row r.
struct eight_q8_0 {
    using one = block_q8_0;
    static constexpr int ADDED = 128;
    ggml_half d[EIGHT];
    uint8_t   q[EIGHT * BLOCK];

    void set_row(int row, const one & of) { d[row] = of.d; }
    __m256 scale() const { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) d)); }
    __m256 lowest() const { return _mm256_setzero_ps(); }
};

static_assert(sizeof(eight_q8_0) == EIGHT * sizeof(block_q8_0), "eight rows take what they took before");
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
                for (int byte = 0; byte < (int) sizeof(of.qs); ++byte) {
                    to->q[BLOCK * (byte / 4) + 4 * r + byte % 4] = of.qs[byte] + Eight::ADDED;
                }
            }
        }
    }
    return 0;
}

// What is needed of the activations beside their numbers: of each block the scale, the scale times their sum, and what
// 128 added to each weight would add to a sum of products.
struct scales {
    std::vector<float>   scale, sum;
    std::vector<int32_t> added;

    void resize(size_t size) {
        if (scale.size() < size) {
            scale.resize(size), sum.resize(size), added.resize(size);
        }
    }
};

static scales & at_hand(size_t size) {
    static thread_local scales kept;
    kept.resize(size);
    return kept;
}

static int32_t four_bytes(const int8_t * activations) {
    int32_t bytes;
    memcpy(&bytes, activations, sizeof bytes);
    return bytes;
}

template <typename Eight> static void fetch_ahead(const Eight * weights) {
    for (size_t byte = 0; byte < sizeof(Eight); byte += 64) {
        _mm_prefetch((const char *) weights + PAGE + byte, _MM_HINT_T0);
    }
}

// Eight rows of weights, each in a lane.
template <typename Eight> struct eight_rows {
    static constexpr int NUM   = EIGHT;
    static constexpr int ADDED = Eight::ADDED;
    using integers = __m256i;
    using floats   = __m256;
    const Eight * at;

    eight_rows(const Eight * weights, int) : at(weights) {}
    integers bytes(int block, int i) const { return _mm256_loadu_si256((const __m256i *) at[block].q + i); }
    floats scale(int block) const { return at[block].scale(); }
    floats lowest(int block) const { return at[block].lowest(); }
    void fetch(int block) const { fetch_ahead(at + block); }

    static integers none() { return _mm256_setzero_si256(); }
    static integers low(integers bytes) { return _mm256_and_si256(bytes, _mm256_set1_epi8(15)); }
    static integers high(integers bytes) { return low(_mm256_srli_epi16(bytes, 4)); }
    static integers each(int32_t bytes) { return _mm256_set1_epi32(bytes); }
    static floats each(float of) { return _mm256_set1_ps(of); }
    static floats multiply(floats a, floats b) { return _mm256_mul_ps(a, b); }
    static floats multiply_add(floats a, floats b, floats c) { return _mm256_fmadd_ps(a, b, c); }
    static void store(float * to, floats of) { _mm256_storeu_ps(to, of); }

#ifdef HAS_DOT_PRODUCTS
    static integers add_products(integers sums, integers q, integers activations) { return DOT_PRODUCTS(sums, q, activations); }
    static integers add(integers sums, integers others) { return _mm256_add_epi32(sums, others); }
    static floats all(integers sums) { return _mm256_cvtepi32_ps(sums); }
#else
    static integers add_products(integers sums, integers q, integers activations) { return add(sums, _mm256_maddubs_epi16(q, activations)); }
    static integers add(integers sums, integers others) { return _mm256_add_epi16(sums, others); }
    static floats all(integers sums) { return _mm256_cvtepi32_ps(_mm256_madd_epi16(sums, _mm256_set1_epi16(1))); }
#endif
};

#ifdef HAS_WIDE_DOT_PRODUCTS

// Sixteen, two times eight: activations are loaded for half as many vectors, which would take longer than the products.
template <typename Eight> struct more_rows {
    static constexpr int NUM   = 2 * EIGHT;
    static constexpr int ADDED = Eight::ADDED;
    using integers = __m512i;
    using floats   = __m512;
    const Eight * at, * next;

    more_rows(const Eight * weights, int num_blocks) : at(weights), next(weights + num_blocks) {}
    integers bytes(int block, int i) const {
        const __m256i low = _mm256_loadu_si256((const __m256i *) at[block].q + i);
        return _mm512_inserti64x4(_mm512_castsi256_si512(low), _mm256_loadu_si256((const __m256i *) next[block].q + i), 1);
    }
    floats scale(int block) const { return _mm512_insertf32x8(_mm512_castps256_ps512(at[block].scale()), next[block].scale(), 1); }
    floats lowest(int block) const { return _mm512_insertf32x8(_mm512_castps256_ps512(at[block].lowest()), next[block].lowest(), 1); }
    void fetch(int block) const { fetch_ahead(at + block), fetch_ahead(next + block); }

    static integers none() { return _mm512_setzero_si512(); }
    static integers low(integers bytes) { return _mm512_and_si512(bytes, _mm512_set1_epi8(15)); }
    static integers high(integers bytes) { return low(_mm512_srli_epi16(bytes, 4)); }
    static integers each(int32_t bytes) { return _mm512_set1_epi32(bytes); }
    static floats each(float of) { return _mm512_set1_ps(of); }
    static floats multiply(floats a, floats b) { return _mm512_mul_ps(a, b); }
    static floats multiply_add(floats a, floats b, floats c) { return _mm512_fmadd_ps(a, b, c); }
    static void store(float * to, floats of) { _mm512_storeu_ps(to, of); }
    static integers add_products(integers sums, integers q, integers activations) { return _mm512_dpbusd_epi32(sums, q, activations); }
    static floats all(integers sums) { return _mm512_cvtepi32_ps(sums); }
};

constexpr int FOURS = 2; // that are multiplied at a time, as far as there are registers

#else

template <typename Eight> using more_rows = eight_rows<Eight>;
constexpr int FOURS = 1;

#endif

// Fewer than four rows of activations, which are not kept as one.
template <int few, typename Eight>
static void multiply_few(int n, float * to, size_t stride, const Eight * w, const block_q8_0 * a, int num_rows) {
    const int num_blocks = n / BLOCK;
    auto & known = at_hand(few * num_blocks);
    float * scale = known.scale.data(), * sum = known.sum.data();
    int32_t * added = known.added.data();
    for (int block = 0; block < few * num_blocks; ++block) {
        const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), _mm256_loadu_si256((const __m256i *) a[block].qs));
        const __m256i fours = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
        __m128i half = _mm_add_epi32(_mm256_castsi256_si128(fours), _mm256_extracti128_si256(fours, 1));
        half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
        half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1));
        scale[block] = GGML_CPU_FP16_TO_FP32(a[block].d);
        sum[block] = scale[block] * _mm_cvtsi128_si32(half);
        added[block] = 128 * _mm_cvtsi128_si32(half);
    }
    using rows = eight_rows<Eight>;
    for (int row = 0; row < num_rows; row += EIGHT, to += EIGHT) {
        __m256 total[few] = {}, lowest[few] = {};
        for (int block = 0; block < num_blocks; ++block, ++w) {
            fetch_ahead(w);
            __m256i sums[few], others[few];
            for (int r = 0; r < few; ++r) {
                sums[r] = Eight::ADDED ? rows::each(-added[r * num_blocks + block]) : rows::none();
                others[r] = rows::none();
            }
            for (int i = 0; i < 4; ++i) {
                const __m256i bytes = _mm256_loadu_si256((const __m256i *) w->q + i);
                const __m256i first  = Eight::ADDED ? bytes : rows::low(bytes);
                const __m256i second = Eight::ADDED ? _mm256_loadu_si256((const __m256i *) w->q + i + 4) : rows::high(bytes);
                for (int r = 0; r < few; ++r) {
                    const int8_t * numbers = a[r * num_blocks + block].qs + 4 * i;
                    sums[r]   = rows::add_products(sums[r], first, rows::each(four_bytes(numbers)));
                    others[r] = rows::add_products(others[r], second, rows::each(four_bytes(numbers + BLOCK / 2)));
                }
            }
            const __m256 d = w->scale(), m = w->lowest();
            for (int r = 0; r < few; ++r) {
                const int at = r * num_blocks + block;
                total[r] = _mm256_fmadd_ps(rows::all(rows::add(sums[r], others[r])), _mm256_mul_ps(d, _mm256_set1_ps(scale[at])), total[r]);
                if (!Eight::ADDED) {
                    lowest[r] = _mm256_fmadd_ps(m, _mm256_set1_ps(sum[at]), lowest[r]);
                }
            }
        }
        for (int r = 0; r < few; ++r) {
            _mm256_storeu_ps(to + r * stride, _mm256_add_ps(total[r], lowest[r]));
        }
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
        _mm_storeu_si128((__m128i *) (found.added.data() + FOUR * block), _mm_slli_epi32(ones, 7));
    }
}

// Some rows of weights, and a few fours of rows of activations. Sums of all of these grow side by side: each waits for
// its last product. Who is first here fetches the weights.
template <int fours, typename Rows>
static void multiply_tile(const Rows & w, const block_q8_0x4 * a, const scales & known, int64_t first, int num_blocks, bool is_first, float * to, size_t stride) {
    const float * scale = known.scale.data() + first, * sum = known.sum.data() + first;
    const int32_t * added = known.added.data() + first;
    typename Rows::floats total[FOUR * fours] = {};
    for (int block = 0; block < num_blocks; ++block) {
        if (is_first) {
            w.fetch(block);
        }
        typename Rows::integers sums[FOUR * fours], bytes[4];
        for (int r = 0; r < FOUR * fours; ++r) {
            sums[r] = Rows::ADDED ? Rows::each(-added[FOUR * (r / FOUR * num_blocks + block) + r % FOUR]) : Rows::none();
        }
        for (int i = 0; i < 4; ++i) {
            bytes[i] = w.bytes(block, i);
        }
        for (int i = 0; i < 2 * 4; ++i) {
            const auto q = Rows::ADDED ? w.bytes(block, i) : i < 4 ? Rows::low(bytes[i]) : Rows::high(bytes[i - 4]);
            for (int r = 0; r < FOUR * fours; ++r) {
                const int8_t * numbers = a[r / FOUR * num_blocks + block].qs + BLOCK * (i / 2) + 8 * (r % FOUR) + 4 * (i % 2);
                sums[r] = Rows::add_products(sums[r], q, Rows::each(four_bytes(numbers)));
            }
        }
        const auto d = w.scale(block), m = w.lowest(block);
        for (int r = 0; r < FOUR * fours; ++r) {
            const int at = FOUR * (r / FOUR * num_blocks + block) + r % FOUR;
            total[r] = Rows::multiply_add(Rows::all(sums[r]), Rows::multiply(d, Rows::each(scale[at])), total[r]);
            if (!Rows::ADDED) {
                total[r] = Rows::multiply_add(m, Rows::each(sum[at]), total[r]);
            }
        }
    }
    for (int r = 0; r < FOUR * fours; ++r) {
        Rows::store(to + r * stride, total[r]);
    }
}

// As many fours as there are.
template <typename Rows>
static void multiply_tiles(const Rows & w, const block_q8_0x4 * a, const scales & known, int num_blocks, int64_t num_fours, float * to, size_t stride) {
    int64_t four = 0;
    for (; four + FOURS <= num_fours; four += FOURS) {
        const int64_t at = four * num_blocks;
        multiply_tile<FOURS>(w, a + at, known, FOUR * at, num_blocks, four == 0, to + FOUR * four * stride, stride);
    }
    for (; four < num_fours; ++four) {
        const int64_t at = four * num_blocks;
        multiply_tile<1>(w, a + at, known, FOUR * at, num_blocks, four == 0, to + FOUR * four * stride, stride);
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
        const auto * w = (const Eight *) weights;
        int row = 0; // as many are done before the weights are there, which come faster from one place than from two
        for (; num_fours > FOURS && row + more_rows<Eight>::NUM <= num_rows; row += more_rows<Eight>::NUM) {
            multiply_tiles(more_rows<Eight>(w + row / EIGHT * num_blocks, num_blocks), a, known, num_blocks, num_fours, to + first * stride + row, stride);
        }
        for (; row < num_rows; row += EIGHT) {
            multiply_tiles(eight_rows<Eight>(w + row / EIGHT * num_blocks, num_blocks), a, known, num_blocks, num_fours, to + first * stride + row, stride);
        }
    }
}

#define EVENLY_SPACED(EIGHT_OF)                                                                                              \
    template <> int repack<EIGHT_OF, 8, 8>(ggml_tensor * tensor, const void * data, size_t size) {                           \
        return keep_as_eight<EIGHT_OF>(tensor, data, size);                                                                  \
    }                                                                                                                        \
    template <> void gemv<EIGHT_OF, 8, 8, GGML_TYPE_Q8_0>(int n, float * s, size_t stride, const void * w, const void * a, int num_a, int num_rows) { \
        const auto multiply = num_a == 1 ? multiply_few<1, EIGHT_OF> : num_a == 2 ? multiply_few<2, EIGHT_OF> : multiply_few<3, EIGHT_OF>; \
        multiply(n, s, stride, (const EIGHT_OF *) w, (const block_q8_0 *) a, num_rows);                                      \
    }                                                                                                                        \
    template <> void gemm<EIGHT_OF, 8, 8, GGML_TYPE_Q8_0>(int n, float * s, size_t stride, const void * w, const void * a, int num_a, int num_rows) { \
        multiply_fours<EIGHT_OF>(n, s, stride, w, a, num_a, num_rows);                                                       \
    }

EVENLY_SPACED(eight_q4_0)
EVENLY_SPACED(eight_q4_1)
#ifdef HAS_DOT_PRODUCTS
EVENLY_SPACED(eight_q8_0)
#endif

} // namespace ggml::cpu::repack

template <> constexpr bool takes_a_few<ggml::cpu::repack::eight_q4_0> = true;
template <> constexpr bool takes_a_few<ggml::cpu::repack::eight_q4_1> = true;
template <> constexpr bool takes_a_few<ggml::cpu::repack::eight_q8_0> = true;

static const ggml::cpu::tensor_traits * evenly_spaced(const ggml_tensor * weights) {
    using namespace ggml::cpu::repack;
    static const tensor_traits<eight_q4_0, 8, 8, GGML_TYPE_Q8_0> q4_0;
    static const tensor_traits<eight_q4_1, 8, 8, GGML_TYPE_Q8_0> q4_1;
#ifdef HAS_DOT_PRODUCTS
    static const tensor_traits<eight_q8_0, 8, 8, GGML_TYPE_Q8_0> q8_0;
#endif
    if (weights->ne[1] % 8 != 0) {
        return nullptr;
    }
    switch (weights->type) {
        case GGML_TYPE_Q4_0: return &q4_0;
        case GGML_TYPE_Q4_1: return &q4_1;
#ifdef HAS_DOT_PRODUCTS
        case GGML_TYPE_Q8_0: return &q8_0;
#endif
        default: return nullptr;
    }
}

#else

static const ggml::cpu::tensor_traits * evenly_spaced(const ggml_tensor *) { return nullptr; }

#endif
