// Attention on the CPU, in tiles of all heads that have the same keys: included by llama.cpp's ggml-cpu/ops.cpp.
//
// llama.cpp attends to fewer than 64 positions of a slot row by row: each head reads and converts its keys and values
// anew, and adds up in F16. Heads in groups (grouped-query attention) have the same keys, so that their rows are a tile
// here: keys are converted once for all of them, transposed where the rows are more than a few, and sums are F32.
// `attend_together` returns false, having written nothing, where it cannot do that; llama.cpp's own code goes on then.
//
// Q is [key_size, positions, heads, streams], K and V [size, keys, groups, streams], all with the sizes first that lie
// together in memory. A row is one head at one position.

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

namespace {

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

void stay(vec & of) { asm("" : "+v"(of)); } // in a register: the compiler would load it again for each row

__m128 sums_of_four(const vec * of) {
    const vec low  = add(_mm512_unpacklo_ps(of[0], of[1]), _mm512_unpackhi_ps(of[0], of[1]));
    const vec high = add(_mm512_unpacklo_ps(of[2], of[3]), _mm512_unpackhi_ps(of[2], of[3]));
    const __m512d a = _mm512_castps_pd(low), b = _mm512_castps_pd(high);
    const vec quarters = add(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(quarters), _mm512_extractf32x8_ps(quarters, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// As many rows of as many F16 become their columns in F32.
void transpose(const char * from, size_t from_stride, float * to, int64_t to_stride) {
    vec a[LANES], b[LANES];
    for (int i = 0; i < LANES; ++i) {
        a[i] = load_half(from + i * from_stride);
    }
    for (int i = 0; i < LANES; i += 2) {
        b[i]     = _mm512_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    }
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

void stay(vec &) {} // half as wide: there are loads enough

__m128 sums_of_four(const vec * of) {
    const vec half = _mm256_hadd_ps(_mm256_hadd_ps(of[0], of[1]), _mm256_hadd_ps(of[2], of[3]));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

void transpose(const char * from, size_t from_stride, float * to, int64_t to_stride) {
    vec a[LANES], b[LANES];
    for (int i = 0; i < LANES; ++i) {
        a[i] = load_half(from + i * from_stride);
    }
    for (int i = 0; i < LANES; i += 2) {
        b[i]     = _mm256_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
    }
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

constexpr int TILE_ROWS = ggml_fa_tile_config::Q;
constexpr int TILE_KEYS = ggml_fa_tile_config::KV;
constexpr int MAX_ROWS = 256; // of all groups of a tile
constexpr int64_t PARTS_OF_THREAD = 4; // so that threads end together, where streams are few and positions one
constexpr int64_t MIN_PART_KEYS = 192;
constexpr short UNSEEN = (short) 0xFC00; // minus infinity, in F16

struct attention {
    const ggml_tensor * q;
    const ggml_tensor * k;
    const ggml_tensor * v;
    const ggml_tensor * mask;
    ggml_tensor * dst;
    float scale;

    explicit attention(ggml_tensor * dst)
        : q(dst->src[0]), k(dst->src[1]), v(dst->src[2]), mask(dst->src[3]), dst(dst) {
        memcpy(&scale, dst->op_params, sizeof(float));
    }

    int64_t key_size() const { return k->ne[0]; }
    int64_t value_size() const { return v->ne[0]; }
    int64_t num_keys() const { return k->ne[1]; }
    int64_t num_positions() const { return q->ne[1]; }
    int64_t num_heads() const { return q->ne[2]; }
    int64_t num_groups() const { return k->ne[2]; }
    int64_t num_streams() const { return q->ne[3]; }
    int64_t rows_of_group() const { return num_positions() * (num_heads() / num_groups()); }

    bool is_supported() const {
        float max_bias, softcap;
        memcpy(&max_bias, (const float *) dst->op_params + 1, sizeof(float));
        memcpy(&softcap, (const float *) dst->op_params + 2, sizeof(float));
        const bool is_plain = max_bias == 0.0f && softcap == 0.0f && dst->src[4] == nullptr;
        const bool has_types = q->type == GGML_TYPE_F32 && k->type == GGML_TYPE_F16 && v->type == GGML_TYPE_F16
            && mask != nullptr && mask->type == GGML_TYPE_F16;
        return is_plain && has_types
            && q->nb[0] == sizeof(float) && k->nb[0] == sizeof(ggml_fp16_t) && v->nb[0] == sizeof(ggml_fp16_t)
            && mask->nb[0] == sizeof(ggml_fp16_t) && mask->ne[2] == 1
            && key_size() % LANES == 0 && value_size() % LANES == 0 && num_keys() % LANES == 0
            && v->ne[1] == k->ne[1] && v->ne[2] == k->ne[2] && v->ne[3] == k->ne[3]
            && q->ne[2] % k->ne[2] == 0 && q->ne[3] == k->ne[3];
    }

    // Whether a key's rows of all groups lie beside each other.
    bool has_groups_together() const {
        return num_groups() * k->nb[2] <= k->nb[1] && num_groups() * v->nb[2] <= v->nb[1];
    }

    const ggml_fp16_t * mask_of(int64_t position, int64_t stream) const {
        return (const ggml_fp16_t *) ((const char *) mask->data + position * mask->nb[1] + stream % mask->ne[3] * mask->nb[3]);
    }
};

struct tile {
    int64_t stream;
    int64_t first_group, num_groups;
    int64_t first_row; // of the rows of each group, which are its heads' positions, head by head
    int num_rows;      // of each group
};

// Rows are multiplied several at a time. One that is there for nothing costs less than two that go by themselves.
int rounded_up(int64_t num_rows) {
    return (int) (num_rows + ROWS - 1) / ROWS * ROWS;
}

struct tile_scratch {
    float * queries;
    float * out;
    float * weights;
    float * keys; // transposed
    float * values;

    tile_scratch(const attention & of, const tile & at, float * place) {
        const int64_t num_rows = at.num_groups * rounded_up(at.num_rows);
        queries = place;
        out     = queries + num_rows * of.key_size();
        weights = out + num_rows * of.value_size();
        keys    = weights + rounded_up(at.num_rows) * TILE_KEYS;
        values  = keys + TILE_KEYS * of.key_size();
    }

    static int64_t num_floats(const attention & of, int64_t num_groups, int64_t num_rows) {
        const int64_t rows = rounded_up(num_rows);
        return (num_groups * rows + TILE_KEYS) * (of.key_size() + of.value_size()) + rows * TILE_KEYS;
    }
};

// Of each row of a tile, as far as some keys go: the sum of its weights, its highest score, and weights times values.
struct tile_result {
    float sums[MAX_ROWS];
    float maxima[MAX_ROWS];
    float * out;
};

int64_t head_of(const attention & of, const tile & at, int64_t group, int row) {
    return ((at.first_group + group) * of.rows_of_group() + at.first_row + row) / of.num_positions();
}

int64_t position_of(const attention & of, const tile & at, int row) {
    return (at.first_row + row) % of.num_positions();
}

const char * place_in(const ggml_tensor * cache, int64_t key, int64_t group, int64_t stream) {
    return (const char *) cache->data + key * cache->nb[1] + group * cache->nb[2] + stream * cache->nb[3];
}

bool is_any_seen(const attention & of, const tile & at, int64_t first, int num_keys) {
    const int num_positions = (int) std::min<int64_t>(at.num_rows, of.num_positions());
    bool is_unseen = true;
    for (int row = 0; row < num_positions && is_unseen; ++row) {
        const ggml_fp16_t * mask = of.mask_of(position_of(of, at, row), at.stream) + first;
        for (int i = 0; i < num_keys && is_unseen; i += 8) {
            const __m128i equal = _mm_cmpeq_epi16(_mm_loadu_si128((const __m128i *) (mask + i)), _mm_set1_epi16(UNSEEN));
            is_unseen = _mm_movemask_epi8(equal) == 0xffff;
        }
    }
    return !is_unseen;
}

// Touches the rows of all groups of the first tile in the order in which they lie in memory, so that the processor fetches
// ahead. In the order in which they are used, some lines of each key, it waits for nearly every one.
void bring(const attention & of, const tile & at, int64_t first, int num_keys) {
    unsigned char all = 0;
    for (const ggml_tensor * cache : { of.k, of.v }) {
        const int64_t num_bytes = (at.num_groups - 1) * cache->nb[2] + cache->ne[0] * sizeof(ggml_fp16_t);
        for (int64_t key = first; key < first + num_keys; ++key) {
            const volatile unsigned char * row = (const volatile unsigned char *) place_in(cache, key, at.first_group, at.stream);
            for (int64_t i = 0; i < num_bytes; i += CACHE_LINE_SIZE) {
                all |= row[i];
            }
        }
    }
    asm volatile("" : : "r"(all));
}

// Has a line of the next tile fetched while the same one of this tile is used: into the second cache, as the first has no
// room for two tiles.
void fetch_ahead(const char * line, size_t stride) {
    _mm_prefetch(line + TILE_KEYS * stride, _MM_HINT_T1);
}

// C += A * B, of `num_rows` rows: `depth` is how long a row of A is, and `width` one of C. As llama.cpp's
// `simd_gemm_ukernel`, but that vectors of B stay in registers: there one is loaded for each product, and that takes as long
// as the product itself.
template <int rows, int vectors>
void multiply_columns(float * c, const float * a, const float * b, int depth, int width) {
    vec sums[rows][vectors];
    for (int i = 0; i < rows * vectors; ++i) {
        sums[i / vectors][i % vectors] = load(c + i / vectors * width + i % vectors * LANES);
    }
    for (int at = 0; at < depth; ++at) {
        vec columns[vectors];
        for (int i = 0; i < vectors; ++i) {
            columns[i] = load(b + at * width + i * LANES);
            stay(columns[i]);
        }
        for (int row = 0; row < rows; ++row) {
            const vec one = all(a[row * depth + at]);
            for (int i = 0; i < vectors; ++i) {
                sums[row][i] = multiply_add(one, columns[i], sums[row][i]);
            }
        }
    }
    for (int i = 0; i < rows * vectors; ++i) {
        store(c + i / vectors * width + i % vectors * LANES, sums[i / vectors][i % vectors]);
    }
}

template <int rows>
void multiply_rows(float * c, const float * a, const float * b, int depth, int width) {
    int column = 0;
    for (; column + VECTORS * LANES <= width; column += VECTORS * LANES) {
        multiply_columns<rows, VECTORS>(c + column, a, b + column, depth, width);
    }
    for (; column < width; column += LANES) {
        multiply_columns<rows, 1>(c + column, a, b + column, depth, width);
    }
}

void multiply(float * c, const float * a, const float * b, int num_rows, int depth, int width) {
    int row = 0;
    for (; row + 2 * ROWS <= num_rows && 2 * ROWS <= GEMM_RM; row += 2 * ROWS) {
        multiply_rows<2 * ROWS>(c + row * width, a + row * depth, b, depth, width);
    }
    for (; row < num_rows; row += ROWS) {
        multiply_rows<ROWS>(c + row * width, a + row * depth, b, depth, width);
    }
}

// Few rows are multiplied with keys and values as these lie there: to transpose and to keep what was converted is worth
// it from more rows on.
constexpr int FEW_ROWS = 4;
constexpr int FEW_KEYS = 4; // at a time

// A score for each row and each key.
template <int rows>
void score_few(const attention & of, const char * keys, int num_keys, const float * queries, float * scores) {
    const int64_t size = of.key_size(), stride = of.k->nb[1];
    for (int first = 0; first < num_keys; first += FEW_KEYS) {
        vec products[rows][FEW_KEYS];
        for (int i = 0; i < rows * FEW_KEYS; ++i) {
            products[i / FEW_KEYS][i % FEW_KEYS] = all(0.0f);
        }
        for (int64_t d = 0; d < size; d += LANES) {
            for (int i = 0; i < FEW_KEYS; ++i) {
                const char * place = keys + (first + i) * stride + d * sizeof(ggml_fp16_t);
                fetch_ahead(place, stride);
                const vec key = load_half(place);
                for (int row = 0; row < rows; ++row) {
                    products[row][i] = multiply_add(load(queries + row * size + d), key, products[row][i]);
                }
            }
        }
        for (int row = 0; row < rows; ++row) {
            _mm_storeu_ps(scores + row * num_keys + first, sums_of_four(products[row]));
        }
    }
}

// Adds to some columns of each row what its weights give of all values.
template <int rows, int vectors>
void add_few_columns(const attention & of, const char * values, int num_keys, const float * weights, float * out) {
    const int64_t size = of.value_size(), stride = of.v->nb[1];
    vec sums[rows][vectors];
    for (int i = 0; i < rows * vectors; ++i) {
        sums[i / vectors][i % vectors] = load(out + i / vectors * size + i % vectors * LANES);
    }
    for (int key = 0; key < num_keys; ++key) {
        for (int i = 0; i < vectors; ++i) {
            const char * place = values + key * stride + i * LANES * sizeof(ggml_fp16_t);
            fetch_ahead(place, stride);
            const vec value = load_half(place);
            for (int row = 0; row < rows; ++row) {
                sums[row][i] = multiply_add(all(weights[row * num_keys + key]), value, sums[row][i]);
            }
        }
    }
    for (int i = 0; i < rows * vectors; ++i) {
        store(out + i / vectors * size + i % vectors * LANES, sums[i / vectors][i % vectors]);
    }
}

template <int rows>
void add_few(const attention & of, const char * values, int num_keys, const float * weights, float * out) {
    int64_t d = 0;
    for (; d + VECTORS * LANES <= of.value_size(); d += VECTORS * LANES) {
        add_few_columns<rows, VECTORS>(of, values + d * sizeof(ggml_fp16_t), num_keys, weights, out + d);
    }
    for (; d < of.value_size(); d += LANES) {
        add_few_columns<rows, 1>(of, values + d * sizeof(ggml_fp16_t), num_keys, weights, out + d);
    }
}

using few = void (*)(const attention &, const char *, int, const float *, float *);

// Calls one that is compiled for each number of rows, for as many at a time as a processor has registers for.
void with_few(const few * compiled, const attention & of, const char * at, int num_keys, const float * from, int from_stride,
              float * to, int to_stride, int num_rows) {
    for (int row = 0; row < num_rows; row += ROWS) {
        compiled[std::min(num_rows - row, ROWS)](of, at, num_keys, from + row * from_stride, to + row * to_stride);
    }
}

constexpr few SCORE_FEW[] = { nullptr, score_few<1>, score_few<2>, score_few<3>, score_few<4> };
constexpr few ADD_FEW[] = { nullptr, add_few<1>, add_few<2>, add_few<3>, add_few<4> };

void convert(const attention & of, const char * k, const char * v, int num_keys, const tile_scratch & scratch) {
    constexpr int64_t LINE = CACHE_LINE_SIZE / sizeof(ggml_fp16_t);
    for (int i = 0; i < num_keys; i += LANES) {
        for (int64_t d = 0; d < of.key_size(); d += LANES) {
            const char * keys = k + i * of.k->nb[1] + d * sizeof(ggml_fp16_t);
            for (int key = 0; key < LANES && d % LINE == 0; ++key) {
                fetch_ahead(keys + key * of.k->nb[1], of.k->nb[1]);
            }
            transpose(keys, of.k->nb[1], scratch.keys + d * num_keys + i, num_keys);
        }
    }
    for (int i = 0; i < num_keys; ++i) {
        const char * value = v + i * of.v->nb[1];
        for (int64_t d = 0; d < of.value_size(); d += LANES, value += LANES * sizeof(ggml_fp16_t)) {
            fetch_ahead(value, of.v->nb[1]);
            store(scratch.values + i * of.value_size() + d, load_half(value));
        }
    }
}

// Turns a row's scores for some keys into weights, in place; what it has of earlier keys is scaled to the new maximum.
void weigh(const attention & of, float * scores, const ggml_fp16_t * mask, int num_keys, float & sum, float & maximum, float * out) {
    vec score[TILE_KEYS / LANES];
    vec highest = all(-INFINITY);
    for (int i = 0; i < num_keys / LANES; ++i) {
        score[i] = multiply_add(load(scores + i * LANES), all(of.scale), load_half(mask + i * LANES));
        highest = higher(highest, score[i]);
    }
    const float before = maximum;
    maximum = fmaxf(before, highest_of(highest));
    if (maximum == -INFINITY) { // it has seen no key so far
        memset(scores, 0, num_keys * sizeof(float));
        return;
    }
    if (maximum > before) {
        const float ratio = expf(before - maximum);
        ggml_vec_scale_f32(of.value_size(), out, ratio);
        sum *= ratio;
    }
    vec sums = all(0.0f);
    for (int i = 0; i < num_keys / LANES; ++i) {
        const vec weight = ggml_v_expf(subtract(score[i], all(maximum)));
        store(scores + i * LANES, weight);
        sums = add(sums, weight);
    }
    sum += sum_of(sums);
}

void begin_tile(const attention & of, const tile & at, const tile_scratch & scratch, tile_result & result) {
    const int num_rows = rounded_up(at.num_rows);
    memset(scratch.queries, 0, at.num_groups * num_rows * of.key_size() * sizeof(float));
    memset(scratch.out, 0, at.num_groups * num_rows * of.value_size() * sizeof(float));
    for (int64_t group = 0; group < at.num_groups; ++group) {
        for (int row = 0; row < at.num_rows; ++row) {
            const char * query = (const char *) of.q->data + position_of(of, at, row) * of.q->nb[1]
                + head_of(of, at, group, row) * of.q->nb[2] + at.stream * of.q->nb[3];
            memcpy(scratch.queries + (group * num_rows + row) * of.key_size(), query, of.key_size() * sizeof(float));
        }
    }
    std::fill_n(result.sums, at.num_groups * num_rows, 0.0f);
    std::fill_n(result.maxima, at.num_groups * num_rows, -INFINITY);
    result.out = scratch.out;
}

void attend(const attention & of, const tile & at, int64_t begin, int64_t end, float * place, tile_result & result) {
    const int num_rows = rounded_up(at.num_rows), key_size = (int) of.key_size(), value_size = (int) of.value_size();
    const tile_scratch scratch(of, at, place);
    const bool is_few = at.num_rows <= FEW_ROWS;
    begin_tile(of, at, scratch, result);
    for (int64_t first = begin; first < end; first += TILE_KEYS) {
        const int num_keys = (int) std::min<int64_t>(TILE_KEYS, end - first);
        if (!is_any_seen(of, at, first, num_keys)) {
            continue;
        }
        if (first == begin) {
            bring(of, at, first, num_keys);
        }
        for (int64_t group = 0; group < at.num_groups; ++group) {
            const float * queries = scratch.queries + group * num_rows * key_size;
            float * out = scratch.out + group * num_rows * value_size;
            const char * keys = place_in(of.k, first, at.first_group + group, at.stream);
            const char * values = place_in(of.v, first, at.first_group + group, at.stream);
            if (is_few) {
                with_few(SCORE_FEW, of, keys, num_keys, queries, key_size, scratch.weights, num_keys, at.num_rows);
            } else {
                convert(of, keys, values, num_keys, scratch);
                memset(scratch.weights, 0, num_rows * num_keys * sizeof(float));
                multiply(scratch.weights, queries, scratch.keys, num_rows, key_size, num_keys);
            }
            for (int row = 0; row < at.num_rows; ++row) {
                const int64_t i = group * num_rows + row;
                const ggml_fp16_t * mask = of.mask_of(position_of(of, at, row), at.stream) + first;
                weigh(of, scratch.weights + row * num_keys, mask, num_keys, result.sums[i], result.maxima[i], out + row * value_size);
            }
            if (is_few) {
                with_few(ADD_FEW, of, values, num_keys, scratch.weights, num_keys, out, value_size, at.num_rows);
            } else {
                multiply(out, scratch.weights, scratch.values, num_rows, num_keys, value_size);
            }
        }
    }
}

void put(const attention & of, int64_t stream, int64_t position, int64_t head, float sum, float * out) {
    ggml_vec_scale_f32(of.value_size(), out, sum == 0.0f ? 0.0f : 1.0f / sum);
    const int64_t row = (stream * of.num_positions() + position) * of.num_heads() + head;
    memcpy((char *) of.dst->data + row * of.dst->nb[1], out, of.value_size() * sizeof(float));
}

// How the work is divided: into tiles, and the keys of a tile of one position into parts. What is not in it does not fit
// into the memory that llama.cpp has planned.
struct division {
    int64_t groups_of_tile, rows_of_tile;
    int64_t tiles_of_group, tiles_of_stream;
    int64_t num_parts = 1, part_keys;
    int64_t num_scratch; // floats of a thread
    int64_t num_available;

    division(const attention & of, const ggml_compute_params * params)
        : part_keys(of.num_keys()), num_available((int64_t) (params->wsize / sizeof(float))) {
        take(of, of.num_groups(), of.rows_of_group());
        const bool is_small = of.num_groups() * rounded_up(of.rows_of_group()) <= MAX_ROWS;
        // Keys of one position are divided into parts, below. Those of several are not, nor are a few keys: where there
        // are fewer streams than threads, each group goes by itself then, rather than all that lies together in one go.
        const bool is_divided = of.num_positions() == 1 && of.num_keys() >= 2 * MIN_PART_KEYS;
        const bool has_idle_threads = of.num_streams() < params->nth && !is_divided;
        if (!is_small || !of.has_groups_together() || has_idle_threads || !is_possible(params)) {
            take(of, 1, std::min<int64_t>(of.rows_of_group(), TILE_ROWS));
        }
        tiles_of_group = (of.rows_of_group() + rows_of_tile - 1) / rows_of_tile;
        tiles_of_stream = of.num_groups() / groups_of_tile * tiles_of_group;
        if (of.num_positions() == 1 && tiles_of_stream == 1) {
            divide_keys(of, params);
        }
    }

    bool is_possible(const ggml_compute_params * params) const {
        return params->nth * num_scratch <= num_available;
    }

private:
    void take(const attention & of, int64_t num_groups, int64_t num_rows) {
        groups_of_tile = num_groups;
        rows_of_tile = num_rows;
        num_scratch = tile_scratch::num_floats(of, num_groups, num_rows);
    }

    void divide_keys(const attention & of, const ggml_compute_params * params) {
        const int64_t wanted = (PARTS_OF_THREAD * params->nth + of.num_streams() - 1) / of.num_streams();
        const int64_t most = std::max<int64_t>(1, std::min(wanted, of.num_keys() / MIN_PART_KEYS));
        const int64_t keys = ((of.num_keys() + most - 1) / most + TILE_KEYS - 1) / TILE_KEYS * TILE_KEYS;
        const int64_t parts = (of.num_keys() + keys - 1) / keys;
        if (params->nth * num_scratch + of.num_streams() * of.num_heads() * parts * (2 + of.value_size()) <= num_available) {
            num_parts = parts;
            part_keys = keys;
        }
    }
};

// A row's result of a part of its keys: its maximum, its sum, and as many floats as a value has.
float * partial_of(const attention & of, const division & by, float * partials, int64_t stream, int64_t head, int64_t part) {
    return partials + ((stream * of.num_heads() + head) * by.num_parts + part) * (2 + of.value_size());
}

void put_tile(const attention & of, const division & by, const tile & at, const tile_result & result, float * partials, int64_t part) {
    for (int64_t group = 0; group < at.num_groups; ++group) {
        for (int row = 0; row < at.num_rows; ++row) {
            const int64_t i = group * rounded_up(at.num_rows) + row, head = head_of(of, at, group, row);
            float * out = result.out + i * of.value_size();
            if (by.num_parts == 1) {
                put(of, at.stream, position_of(of, at, row), head, result.sums[i], out);
                continue;
            }
            float * partial = partial_of(of, by, partials, at.stream, head, part);
            partial[0] = result.maxima[i];
            partial[1] = result.sums[i];
            memcpy(partial + 2, out, of.value_size() * sizeof(float));
        }
    }
}

void join_parts(const attention & of, const division & by, float * partials, int64_t stream, int64_t head) {
    float * joined = partial_of(of, by, partials, stream, head, 0);
    for (int64_t part = 1; part < by.num_parts; ++part) {
        const float * other = partial_of(of, by, partials, stream, head, part);
        const float maximum = fmaxf(joined[0], other[0]);
        if (maximum == -INFINITY) {
            continue;
        }
        const float ratio = expf(joined[0] - maximum), other_ratio = expf(other[0] - maximum);
        joined[0] = maximum;
        for (int64_t i = 1; i < 2 + of.value_size(); ++i) {
            joined[i] = joined[i] * ratio + other[i] * other_ratio;
        }
    }
    put(of, stream, 0, head, joined[1], joined + 2);
}

bool attend_together(const ggml_compute_params * params, ggml_tensor * dst) {
    const attention of(dst);
    if (!of.is_supported()) {
        return false;
    }
    const division by(of, params);
    if (!by.is_possible(params)) {
        return false;
    }
    float * scratch  = (float *) params->wdata + params->ith * by.num_scratch;
    float * partials = (float *) params->wdata + params->nth * by.num_scratch;
    if (params->ith == 0) {
        ggml_threadpool_chunk_set(params->threadpool, params->nth);
    }
    ggml_barrier(params->threadpool);
    const int64_t num_chunks = of.num_streams() * by.tiles_of_stream * by.num_parts;
    for (int64_t chunk = params->ith; chunk < num_chunks; chunk = ggml_threadpool_chunk_add(params->threadpool, 1)) {
        const int64_t part = chunk % by.num_parts, number = chunk / by.num_parts, begin = part * by.part_keys;
        const int64_t first_row = number % by.tiles_of_group * by.rows_of_tile;
        const int64_t first_group = number % by.tiles_of_stream / by.tiles_of_group * by.groups_of_tile;
        const int num_rows = (int) std::min(by.rows_of_tile, of.rows_of_group() - first_row);
        const tile at = { number / by.tiles_of_stream, first_group, by.groups_of_tile, first_row, num_rows };
        tile_result result;
        attend(of, at, begin, std::min(begin + by.part_keys, of.num_keys()), scratch, result);
        put_tile(of, by, at, result, partials, part);
    }
    if (by.num_parts > 1) {
        ggml_barrier(params->threadpool);
        for (int64_t i = params->ith; i < of.num_streams() * of.num_heads(); i += params->nth) {
            join_parts(of, by, partials, i / of.num_heads(), i % of.num_heads());
        }
    }
    return true;
}

} // namespace

#else

static bool attend_together(const ggml_compute_params *, ggml_tensor *) {
    return false;
}

#endif
