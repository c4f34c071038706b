// What attention asks of a processor, with AVX-512 and with AVX2: included by attention.cpp.

namespace {

constexpr short MINUS_INFINITY = (short) 0xFC00; // in F16

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)

constexpr int LANES = 16; // floats in a vector
constexpr int ROWS = 4;   // that are multiplied at a time, with as many vectors
constexpr int VECTORS = 4;
using vec = __m512;

vec load(const float * from) { return _mm512_loadu_ps(from); }
vec load_half(const void * from) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) from)); }
void store(float * to, vec of) { _mm512_storeu_ps(to, of); }
vec all(float of) { return _mm512_set1_ps(of); }
vec add(vec a, vec b) { return _mm512_add_ps(a, b); }
vec subtract(vec a, vec b) { return _mm512_sub_ps(a, b); }
vec multiply_add(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
vec higher(vec a, vec b) { return _mm512_max_ps(a, b); }
float highest_of(vec of) { return _mm512_reduce_max_ps(of); }
float sum_of(vec of) { return _mm512_reduce_add_ps(of); }

// Which of as many values are not minus infinity, a bit for each.
unsigned finite_of(const ggml_fp16_t * values) {
    return (uint16_t) ~_mm256_cmpeq_epi16_mask(_mm256_loadu_si256((const __m256i *) values), _mm256_set1_epi16(MINUS_INFINITY));
}

// Scores, but minus infinity where the mask is: a key that is not seen may be no number. Sets `hides` where there is one.
vec masked(vec score, vec mask, bool & hides) {
    const __mmask16 hidden = _mm512_cmp_ps_mask(mask, all(-INFINITY), _CMP_EQ_OQ);
    hides |= hidden != 0;
    return _mm512_mask_blend_ps(hidden, score, mask);
}

void stay(vec & of) { asm("" : "+v"(of)); } // in a register: the compiler would load it again for each row

__m128 sums_of_four(const vec * of) {
    const vec low  = add(_mm512_unpacklo_ps(of[0], of[1]), _mm512_unpackhi_ps(of[0], of[1]));
    const vec high = add(_mm512_unpacklo_ps(of[2], of[3]), _mm512_unpackhi_ps(of[2], of[3]));
    const __m512d a = _mm512_castps_pd(low), b = _mm512_castps_pd(high);
    const vec quarters = add(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(quarters), _mm512_extractf32x8_ps(quarters, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

vec lower_pairs(vec a, vec b) { return _mm512_unpacklo_ps(a, b); }
vec upper_pairs(vec a, vec b) { return _mm512_unpackhi_ps(a, b); }

// What `transpose` does behind its pairs, of which there are as many vectors as rows.
void store_columns(const vec * b, float * to, int64_t to_stride) {
    vec a[LANES];
    for (int i = 0; i < LANES; i += 4) { // a[i + j] gets columns j, 4 + j, 8 + j and 12 + j of rows i to i + 3
        for (int j = 0; j < 2; ++j) {
            const __m512d low = _mm512_castps_pd(b[i + j]), high = _mm512_castps_pd(b[i + j + 2]);
            a[i + 2 * j]     = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
            a[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
        }
    }
    for (int j = 0; j < 4; ++j) {
        const vec even_low = _mm512_shuffle_f32x4(a[j], a[4 + j], 0x88), even_high = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0x88);
        const vec odd_low  = _mm512_shuffle_f32x4(a[j], a[4 + j], 0xdd), odd_high  = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0xdd);
        store(to + j * to_stride,        _mm512_shuffle_f32x4(even_low, even_high, 0x88));
        store(to + (4 + j) * to_stride,  _mm512_shuffle_f32x4(odd_low,  odd_high,  0x88));
        store(to + (8 + j) * to_stride,  _mm512_shuffle_f32x4(even_low, even_high, 0xdd));
        store(to + (12 + j) * to_stride, _mm512_shuffle_f32x4(odd_low,  odd_high,  0xdd));
    }
}

#else

constexpr int LANES = 8;
constexpr int ROWS = 3;
constexpr int VECTORS = 2;
using vec = __m256;

vec load(const float * from) { return _mm256_loadu_ps(from); }
vec load_half(const void * from) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) from)); }
void store(float * to, vec of) { _mm256_storeu_ps(to, of); }
vec all(float of) { return _mm256_set1_ps(of); }
vec add(vec a, vec b) { return _mm256_add_ps(a, b); }
vec subtract(vec a, vec b) { return _mm256_sub_ps(a, b); }
vec multiply_add(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
vec higher(vec a, vec b) { return _mm256_max_ps(a, b); }

float highest_of(vec of) {
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(of), _mm256_extractf128_ps(of, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}

float sum_of(vec of) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(of), _mm256_extractf128_ps(of, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

vec masked(vec score, vec mask, bool & hides) {
    const vec hidden = _mm256_cmp_ps(mask, all(-INFINITY), _CMP_EQ_OQ);
    hides |= _mm256_movemask_ps(hidden) != 0;
    return _mm256_blendv_ps(score, mask, hidden);
}

unsigned finite_of(const ggml_fp16_t * values) {
    const __m128i equal = _mm_cmpeq_epi16(_mm_loadu_si128((const __m128i *) values), _mm_set1_epi16(MINUS_INFINITY));
    return (uint8_t) ~_mm_movemask_epi8(_mm_packs_epi16(equal, equal));
}

void stay(vec &) {} // half as wide: there are loads enough

__m128 sums_of_four(const vec * of) {
    const vec half = _mm256_hadd_ps(_mm256_hadd_ps(of[0], of[1]), _mm256_hadd_ps(of[2], of[3]));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

vec lower_pairs(vec a, vec b) { return _mm256_unpacklo_ps(a, b); }
vec upper_pairs(vec a, vec b) { return _mm256_unpackhi_ps(a, b); }

void store_columns(const vec * b, float * to, int64_t to_stride) {
    vec a[LANES];
    for (int i = 0; i < LANES; i += 4) { // a[i + j] gets columns j and 4 + j of rows i to i + 3
        for (int j = 0; j < 2; ++j) {
            a[i + 2 * j]     = _mm256_shuffle_ps(b[i + j], b[i + j + 2], 0x44);
            a[i + 2 * j + 1] = _mm256_shuffle_ps(b[i + j], b[i + j + 2], 0xee);
        }
    }
    for (int j = 0; j < 4; ++j) {
        store(to + j * to_stride,       _mm256_permute2f128_ps(a[j], a[4 + j], 0x20));
        store(to + (4 + j) * to_stride, _mm256_permute2f128_ps(a[j], a[4 + j], 0x31));
    }
}

#endif

// As many rows of as many F16 become their columns in F32.
void transpose(const char * const * from, int64_t offset, float * to, int64_t to_stride) {
    vec pairs[LANES];
    for (int i = 0; i < LANES; i += 2) {
        const vec one = load_half(from[i] + offset), other = load_half(from[i + 1] + offset);
        pairs[i]     = lower_pairs(one, other);
        pairs[i + 1] = upper_pairs(one, other);
    }
    store_columns(pairs, to, to_stride);
}

} // namespace
