// Attention on the CPU, in tiles of all heads that have the same keys: included by llama.cpp's ggml-cpu/ops.cpp.
//
// llama.cpp attends to fewer than 64 positions of a slot row by row: each head reads and converts its keys and values
// anew, and adds up in F16. Heads in groups (grouped-query attention) have the same keys, so that their rows are a tile
// here: keys are converted once for all of them, transposed where the rows are more than a few, and sums are F32.
// `attend_together` returns false, having written nothing, where it cannot do that; llama.cpp's own code goes on then.
//
// Q is [key_size, positions, heads, streams], K and V [size, keys, groups, streams], all with the sizes first that lie
// together in memory. A row is one head at one position.

#include <atomic>
#include <tuple>
#include <vector>

static std::atomic<int64_t> graph_number;

// Called by ggml-cpu.c: from here on a mask may be another one.
extern "C" void begin_graph(void) {
    ++graph_number;
}

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
void transpose(const char * const * from, int64_t offset, float * to, int64_t to_stride) {
    vec a[LANES], b[LANES];
    for (int i = 0; i < LANES; ++i) {
        a[i] = load_half(from[i] + offset);
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

void transpose(const char * const * from, int64_t offset, float * to, int64_t to_stride) {
    vec a[LANES], b[LANES];
    for (int i = 0; i < LANES; ++i) {
        a[i] = load_half(from[i] + offset);
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
constexpr int MAX_ROWS = 256; // of all groups of a tile: queries and sums of more do not stay in the second cache
constexpr int64_t PARTS_OF_THREAD = 4; // so that threads end together, where tiles are few
constexpr int64_t MIN_PART_KEYS = 192;
// Few rows are multiplied with keys and values as these lie there: to transpose and to keep what was converted is worth
// it from more rows on.
constexpr int FEW_ROWS = 4;
constexpr int FEW_KEYS = 4; // at a time
constexpr int64_t SHARED = 16; // floats that a pointer for all threads has beside what they compute
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
    int64_t heads_of_group() const { return num_heads() / num_groups(); }
    int64_t num_streams() const { return q->ne[3]; }

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

// Some positions of a stream and some groups. The rows of a group are its heads at the first position, at the second, ...
struct tile {
    int64_t stream;
    int64_t first_group;
    int num_groups;
    int64_t first_position;
    int num_positions;
    int heads; // of a group

    int num_rows() const { return num_positions * heads; } // of each group
};

// Keys that positions from `first` to `last` of a tile see, all of them or one more and one less.
struct key_tile {
    int first, last;
    bool is_scattered; // else as many as a vector has lanes lie together each
    int num_keys = 0;  // of which those behind `num_real` are there to fill a vector, and seen by nobody
    int num_real = 0;
    int32_t keys[TILE_KEYS];
    size_t mask; // where it begins in the masks of all: as many values for each position as a tile has room for
    int64_t work_before; // of all tiles of keys before it

    key_tile(int first, int last, bool is_scattered) : first(first), last(last), is_scattered(is_scattered) {}
};

// Which of as many keys as a vector has lanes a position sees, a bit for each.
unsigned seen_of(const ggml_fp16_t * mask) {
#if defined(__AVX512F__)
    return (uint16_t) ~_mm256_cmpeq_epi16_mask(_mm256_loadu_si256((const __m256i *) mask), _mm256_set1_epi16(UNSEEN));
#else
    const __m128i equal = _mm_cmpeq_epi16(_mm_loadu_si128((const __m128i *) mask), _mm_set1_epi16(UNSEEN));
    return (uint8_t) ~_mm_movemask_epi8(_mm_packs_epi16(equal, equal));
#endif
}

// Which keys a tile has to be multiplied with, and which of its positions: of a cache that several sequences share, most
// keys are seen by those of one sequence only, what they begin with in common by all of theirs, and what they generate
// lies scattered. The order of keys changes nothing.
class key_tiles {
public:
    void find(const attention & of, const tile & at) {
        found.clear();
        open.clear();
        for (int64_t key = 0; key < of.num_keys(); key += LANES) {
            add_block(of, at, key);
        }
        size_t size = 0;
        work = 0;
        for (key_tile & each : found) {
            const int num_positions = each.last - each.first + 1;
            each.mask = size;
            size += num_positions * TILE_KEYS;
            each.work_before = work;
            work += num_positions * at.heads + FEW_ROWS; // a few rows take as long as their keys to come
            for (each.num_real = each.num_keys; each.num_keys % LANES != 0; ++each.num_keys) {
                each.keys[each.num_keys] = each.keys[each.num_real - 1];
            }
        }
        masks.resize(size);
        for (const key_tile & each : found) {
            gather_mask(of, at, each, masks.data() + each.mask);
        }
    }

    const key_tile & operator[](size_t number) const { return found[number]; }
    const ggml_fp16_t * mask_of(const key_tile & of) const { return masks.data() + of.mask; }

    // The number of the first one of a part: all parts are about as much work.
    size_t begin_of(int64_t part, int64_t num_parts) const {
        const auto is_before = [&](const key_tile & each) { return each.work_before * num_parts < work * part; };
        return std::partition_point(found.begin(), found.end(), is_before) - found.begin();
    }

private:
    std::vector<key_tile> found;
    std::vector<ggml_fp16_t> masks;
    std::vector<size_t> open; // those with room left
    int64_t work = 0;
    std::vector<unsigned> seen;

    void add_block(const attention & of, const tile & at, int64_t key) {
        seen.resize(at.num_positions);
        int first = at.num_positions, last = -1, num_seen = 0;
        unsigned any = 0;
        for (int i = 0; i < at.num_positions; ++i) {
            seen[i] = seen_of(of.mask_of(at.first_position + i, at.stream) + key);
            if (seen[i] != 0) {
                first = std::min(first, i);
                last = i;
                any |= seen[i];
                num_seen += __builtin_popcount(seen[i]);
            }
        }
        if (any == 0) {
            return;
        }
        if (2 * num_seen >= LANES * (last - first + 1)) {
            key_tile & to = with_room(first, last, false);
            for (int i = 0; i < LANES; ++i) {
                to.keys[to.num_keys++] = (int32_t) key + i;
            }
            return;
        }
        for (; any != 0; any &= any - 1) {
            add_key(first, last, key, __builtin_ctz(any));
        }
    }

    void add_key(int first, int last, int64_t block, int number) {
        while ((seen[first] >> number & 1) == 0) {
            ++first;
        }
        while ((seen[last] >> number & 1) == 0) {
            --last;
        }
        key_tile & to = with_room(first, last, true);
        to.keys[to.num_keys++] = (int32_t) block + number;
    }

    // What each position that sees some of the keys sees of them, put together.
    static void gather_mask(const attention & of, const tile & at, const key_tile & keys, ggml_fp16_t * to) {
        for (int position = keys.first; position <= keys.last; ++position, to += TILE_KEYS) {
            const ggml_fp16_t * mask = of.mask_of(at.first_position + position, at.stream);
            if (!keys.is_scattered) {
                for (int i = 0; i < keys.num_keys; i += LANES) {
                    memcpy(to + i, mask + keys.keys[i], LANES * sizeof(ggml_fp16_t));
                }
                continue;
            }
            for (int i = 0; i < keys.num_keys; ++i) {
                to[i] = i < keys.num_real ? mask[keys.keys[i]] : (ggml_fp16_t) UNSEEN;
            }
        }
    }

    key_tile & with_room(int first, int last, bool is_scattered) {
        for (size_t & number : open) {
            key_tile & each = found[number];
            if (each.first == first && each.last == last && each.is_scattered == is_scattered) {
                if (each.num_keys < TILE_KEYS) {
                    return each;
                }
                number = found.size();
                return found.emplace_back(first, last, is_scattered);
            }
        }
        open.push_back(found.size());
        return found.emplace_back(first, last, is_scattered);
    }
};

// Where a tile's keys, or values, and those of the next tile lie: of the first of its groups.
struct lines {
    const char * at[TILE_KEYS];
    const char * next[TILE_KEYS];

    void find(const ggml_tensor * cache, const tile & of, const key_tile & keys, const key_tile & then) {
        const char * first = (const char *) cache->data + of.first_group * cache->nb[2] + of.stream * cache->nb[3];
        for (int i = 0; i < keys.num_keys; ++i) {
            at[i] = first + keys.keys[i] * cache->nb[1];
            next[i] = first + then.keys[std::min(i, then.num_keys - 1)] * cache->nb[1];
        }
    }
};

// What a thread computes a tile with; `sums`, `maxima` and `out` are, for each row and as far as some keys go: the sum of its
// weights, its highest score, and weights times values.
struct tile_scratch {
    float * queries;
    float * out;
    float * sums;
    float * maxima;
    float * weights;
    float * keys; // transposed
    float * values;

    tile_scratch(const attention & of, const tile & at) {
        static thread_local std::vector<float> place;
        const size_t num_rows = at.num_rows(), all_rows = num_rows * at.num_groups, key_size = of.key_size(), value_size = of.value_size();
        place.resize(all_rows * (key_size + value_size + 2) + TILE_KEYS * (num_rows + key_size + value_size));
        queries = place.data();
        out     = queries + all_rows * key_size;
        sums    = out + all_rows * value_size;
        maxima  = sums + all_rows;
        weights = maxima + all_rows;
        keys    = weights + num_rows * TILE_KEYS;
        values  = keys + TILE_KEYS * key_size;
    }
};

// Touches the rows of all groups of the first tile in the order in which they lie in memory, so that the processor fetches
// ahead. In the order in which they are used, some lines of each key, it waits for nearly every one.
void bring(const ggml_tensor * cache, const lines & rows, int num_keys, int num_groups) {
    unsigned char all = 0;
    const int64_t num_bytes = (num_groups - 1) * cache->nb[2] + cache->ne[0] * sizeof(ggml_fp16_t);
    for (int key = 0; key < num_keys; ++key) {
        const volatile unsigned char * row = (const volatile unsigned char *) rows.at[key];
        for (int64_t i = 0; i < num_bytes; i += CACHE_LINE_SIZE) {
            all |= row[i];
        }
    }
    asm volatile("" : : "r"(all));
}

// Has a line of the next tile fetched while the same one of this tile is used: into the second cache, as the first has no
// room for two tiles.
void fetch_ahead(const char * line) {
    _mm_prefetch(line, _MM_HINT_T1);
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

using some_rows = void (*)(float *, const float *, const float *, int, int);

constexpr some_rows MULTIPLY_ROWS[] = {
    nullptr, multiply_rows<1>, multiply_rows<2>, multiply_rows<3>, multiply_rows<4>,
    multiply_rows<5>, multiply_rows<6>, multiply_rows<7>, multiply_rows<8>,
};

void multiply(float * c, const float * a, const float * b, int num_rows, int depth, int width) {
    constexpr int most = 2 * ROWS <= GEMM_RM ? 2 * ROWS : ROWS;
    for (int row = 0; row < num_rows; row += most) {
        MULTIPLY_ROWS[std::min(most, num_rows - row)](c + row * width, a + row * depth, b, depth, width);
    }
}

// A score for each row and each key. `offset` is where a group begins, in bytes.
template <int rows>
void score_few(const lines & keys, int64_t offset, int64_t size, int num_keys, const float * queries, float * scores) {
    for (int first = 0; first < num_keys; first += FEW_KEYS) {
        vec products[rows][FEW_KEYS];
        for (int i = 0; i < rows * FEW_KEYS; ++i) {
            products[i / FEW_KEYS][i % FEW_KEYS] = all(0.0f);
        }
        const char * at[FEW_KEYS], * next[FEW_KEYS];
        for (int i = 0; i < FEW_KEYS; ++i) {
            at[i] = keys.at[first + i] + offset;
            next[i] = keys.next[first + i] + offset;
        }
        for (int64_t d = 0; d < size; d += LANES) {
            for (int i = 0; i < FEW_KEYS; ++i) {
                fetch_ahead(next[i] + d * sizeof(ggml_fp16_t));
                const vec key = load_half(at[i] + d * sizeof(ggml_fp16_t));
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
void add_few_columns(const lines & values, int64_t offset, int64_t size, int num_keys, const float * weights, float * out) {
    vec sums[rows][vectors];
    for (int i = 0; i < rows * vectors; ++i) {
        sums[i / vectors][i % vectors] = load(out + i / vectors * size + i % vectors * LANES);
    }
    for (int key = 0; key < num_keys; ++key) {
        const char * at = values.at[key] + offset, * next = values.next[key] + offset;
        for (int i = 0; i < vectors; ++i) {
            fetch_ahead(next + i * LANES * sizeof(ggml_fp16_t));
            const vec value = load_half(at + i * LANES * sizeof(ggml_fp16_t));
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
void add_few(const lines & values, int64_t offset, int64_t size, int num_keys, const float * weights, float * out) {
    int64_t d = 0;
    for (; d + VECTORS * LANES <= size; d += VECTORS * LANES) {
        add_few_columns<rows, VECTORS>(values, offset + d * sizeof(ggml_fp16_t), size, num_keys, weights, out + d);
    }
    for (; d < size; d += LANES) {
        add_few_columns<rows, 1>(values, offset + d * sizeof(ggml_fp16_t), size, num_keys, weights, out + d);
    }
}

using few = void (*)(const lines &, int64_t, int64_t, int, const float *, float *);

// Calls one that is compiled for each number of rows, for as many at a time as a processor has registers for.
void with_few(const few * compiled, const lines & at, int64_t offset, int64_t size, int num_keys, const float * from, int from_stride,
              float * to, int to_stride, int num_rows) {
    for (int row = 0; row < num_rows; row += ROWS) {
        compiled[std::min(num_rows - row, ROWS)](at, offset, size, num_keys, from + row * from_stride, to + row * to_stride);
    }
}

constexpr few SCORE_FEW[] = { nullptr, score_few<1>, score_few<2>, score_few<3>, score_few<4> };
constexpr few ADD_FEW[] = { nullptr, add_few<1>, add_few<2>, add_few<3>, add_few<4> };

void convert_keys(const lines & rows, int64_t offset, int64_t size, int num_keys, float * to) {
    constexpr int64_t LINE = CACHE_LINE_SIZE / sizeof(ggml_fp16_t);
    for (int i = 0; i < num_keys; i += LANES) {
        for (int64_t d = 0; d < size; d += LANES) {
            const int64_t place = offset + d * sizeof(ggml_fp16_t);
            for (int key = i; key < i + LANES && d % LINE == 0; ++key) {
                fetch_ahead(rows.next[key] + place);
            }
            transpose(rows.at + i, place, to + d * num_keys + i, num_keys);
        }
    }
}

void convert_values(const lines & rows, int64_t offset, int64_t size, int num_keys, float * to) {
    for (int i = 0; i < num_keys; ++i) {
        const char * value = rows.at[i] + offset;
        const char * next = rows.next[i] + offset;
        for (int64_t d = 0; d < size; d += LANES) {
            fetch_ahead(next + d * sizeof(ggml_fp16_t));
            store(to + i * size + d, load_half(value + d * sizeof(ggml_fp16_t)));
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

// Of positions from the first that sees any of these keys to the last one; of others only that they have seen nothing.
void begin_tile(const attention & of, const tile & at, const key_tiles & keys, size_t begin, size_t end, const tile_scratch & scratch) {
    const int num_rows = at.num_rows();
    int first = at.num_positions, last = -1;
    for (size_t i = begin; i < end; ++i) {
        first = std::min(first, keys[i].first);
        last = std::max(last, keys[i].last);
    }
    for (int64_t group = 0; group < at.num_groups; ++group) {
        for (int row = first * at.heads; row < (last + 1) * at.heads; ++row) {
            const int64_t position = at.first_position + row / at.heads;
            const int64_t head = (at.first_group + group) * at.heads + row % at.heads;
            const char * query = (const char *) of.q->data + position * of.q->nb[1] + head * of.q->nb[2] + at.stream * of.q->nb[3];
            memcpy(scratch.queries + (group * num_rows + row) * of.key_size(), query, of.key_size() * sizeof(float));
            std::fill_n(scratch.out + (group * num_rows + row) * of.value_size(), of.value_size(), 0.0f);
        }
    }
    std::fill_n(scratch.sums, at.num_groups * num_rows, 0.0f);
    std::fill_n(scratch.maxima, at.num_groups * num_rows, -INFINITY);
}

void attend_to(const attention & of, const tile & at, const key_tile & keys, const ggml_fp16_t * masks, const lines & k, const lines & v,
               const tile_scratch & scratch) {
    const int key_size = (int) of.key_size(), value_size = (int) of.value_size(), num_keys = keys.num_keys;
    const int first_row = keys.first * at.heads, num_rows = (keys.last - keys.first + 1) * at.heads;
    const bool is_few = num_rows <= FEW_ROWS;
    for (int64_t group = 0; group < at.num_groups; ++group) {
        const int64_t first = group * at.num_rows() + first_row;
        const int64_t key_offset = group * of.k->nb[2], value_offset = group * of.v->nb[2];
        const float * queries = scratch.queries + first * key_size;
        float * out = scratch.out + first * value_size;
        if (is_few) {
            with_few(SCORE_FEW, k, key_offset, key_size, num_keys, queries, key_size, scratch.weights, num_keys, num_rows);
        } else {
            convert_keys(k, key_offset, key_size, num_keys, scratch.keys);
            convert_values(v, value_offset, value_size, num_keys, scratch.values);
            memset(scratch.weights, 0, num_rows * num_keys * sizeof(float));
            multiply(scratch.weights, queries, scratch.keys, num_rows, key_size, num_keys);
        }
        for (int row = 0; row < num_rows; ++row) {
            const ggml_fp16_t * mask = masks + row / at.heads * TILE_KEYS;
            weigh(of, scratch.weights + row * num_keys, mask, num_keys, scratch.sums[first + row], scratch.maxima[first + row],
                  out + row * value_size);
        }
        if (is_few) {
            with_few(ADD_FEW, v, value_offset, value_size, num_keys, scratch.weights, num_keys, out, value_size, num_rows);
        } else {
            multiply(out, scratch.weights, scratch.values, num_rows, num_keys, value_size);
        }
    }
}

void attend(const attention & of, const tile & at, const key_tiles & keys, size_t begin, size_t end, const tile_scratch & scratch) {
    begin_tile(of, at, keys, begin, end, scratch);
    for (size_t i = begin; i < end; ++i) {
        const key_tile & then = keys[std::min(i + 1, end - 1)];
        lines k, v;
        k.find(of.k, at, keys[i], then);
        v.find(of.v, at, keys[i], then);
        if (i == begin) {
            bring(of.k, k, keys[i].num_keys, at.num_groups);
            bring(of.v, v, keys[i].num_keys, at.num_groups);
        }
        attend_to(of, at, keys[i], keys.mask_of(keys[i]), k, v, scratch);
    }
}

void put(const attention & of, int64_t row, float sum, const float * out) {
    float * to = (float *) ((char *) of.dst->data + row * of.dst->nb[1]);
    const vec scale = all(1.0f / sum);
    for (int64_t d = 0; d < of.value_size(); d += LANES) {
        store(to + d, sum == 0.0f ? all(0.0f) : multiply_add(load(out + d), scale, all(0.0f)));
    }
}

// How the work is divided: into tiles, and where these are few, the keys of each into parts.
struct division {
    int64_t positions_of_tile, runs_of_positions; // in a stream
    int64_t groups_of_tile, runs_of_groups;
    int64_t num_parts;

    division(const attention & of, const ggml_compute_params * params) {
        const int64_t most = std::max<int64_t>(1, TILE_ROWS / of.heads_of_group());
        runs_of_positions = (of.num_positions() + most - 1) / most;
        positions_of_tile = (of.num_positions() + runs_of_positions - 1) / runs_of_positions;
        runs_of_positions = (of.num_positions() + positions_of_tile - 1) / positions_of_tile;
        take_groups(of, of.has_groups_together() ? of.num_groups() : 1);
        while (groups_of_tile > 1 && groups_of_tile * positions_of_tile * of.heads_of_group() > MAX_ROWS) {
            take_groups(of, groups_of_tile - 1);
        }
        divide_keys(of, params);
        if (num_tiles(of) * num_parts < PARTS_OF_THREAD * params->nth) {
            take_groups(of, 1);
            divide_keys(of, params);
        }
    }

    int64_t num_tiles(const attention & of) const { return of.num_streams() * runs_of_positions * runs_of_groups; }

    tile tile_of(const attention & of, int64_t number) const {
        const int64_t first_group = number % runs_of_groups * groups_of_tile, run = number / runs_of_groups;
        const int64_t first_position = run % runs_of_positions * positions_of_tile;
        const int num_positions = (int) std::min(positions_of_tile, of.num_positions() - first_position);
        return { run / runs_of_positions, first_group, (int) groups_of_tile, first_position, num_positions, (int) of.heads_of_group() };
    }

private:
    // So many of a tile, or fewer, so that all tiles have as many.
    void take_groups(const attention & of, int64_t most) {
        for (groups_of_tile = most; of.num_groups() % groups_of_tile != 0;) {
            --groups_of_tile;
        }
        runs_of_groups = of.num_groups() / groups_of_tile;
    }

    // As far as there is room for what is computed of each part, in the memory that llama.cpp has planned.
    void divide_keys(const attention & of, const ggml_compute_params * params) {
        const int64_t wanted = (PARTS_OF_THREAD * params->nth + num_tiles(of) - 1) / num_tiles(of);
        const int64_t floats_of_part = of.num_streams() * of.num_positions() * of.num_heads() * (2 + of.value_size());
        const int64_t room = ((int64_t) (params->wsize / sizeof(float)) - SHARED) / floats_of_part;
        num_parts = std::max<int64_t>(1, std::min({ wanted, of.num_keys() / MIN_PART_KEYS, room }));
    }
};

// The keys of all tiles, one list for those of all groups. They are the same in every layer: found in the first one.
class key_lists {
public:
    std::vector<key_tiles> lists;
    bool is_known; // else they have to be found

    // For one thread, before all others.
    void begin(const attention & of, const division & by) {
        const shape now = { graph_number, of.mask->data, of.num_streams(), of.num_positions(), of.num_keys(), by.positions_of_tile };
        is_known = of.mask->op == GGML_OP_NONE && (of.mask->flags & GGML_TENSOR_FLAG_INPUT) != 0 && now == known;
        known = now;
        if (!is_known && (int64_t) lists.size() < of.num_streams() * by.runs_of_positions) {
            lists.resize(of.num_streams() * by.runs_of_positions);
        }
    }

    // For all threads: each finds some.
    void find(const attention & of, const division & by, int64_t thread, int64_t num_threads) {
        for (int64_t list = thread; list < of.num_streams() * by.runs_of_positions; list += num_threads) {
            lists[list].find(of, by.tile_of(of, list * by.runs_of_groups));
        }
    }

private:
    using shape = std::tuple<int64_t, const void *, int64_t, int64_t, int64_t, int64_t>;
    shape known;
};

// A row's result of a part of its keys: its maximum, its sum, and as many floats as a value has.
float * partial_of(const attention & of, const division & by, float * partials, int64_t row, int64_t part) {
    return partials + (row * by.num_parts + part) * (2 + of.value_size());
}

void put_tile(const attention & of, const division & by, const tile & at, const tile_scratch & scratch, float * partials, int64_t part) {
    for (int group = 0; group < at.num_groups; ++group) {
        for (int i = 0; i < at.num_rows(); ++i) {
            const int64_t number = group * at.num_rows() + i;
            const int64_t position = at.stream * of.num_positions() + at.first_position + i / at.heads;
            const int64_t row = position * of.num_heads() + (at.first_group + group) * at.heads + i % at.heads;
            float * out = scratch.out + number * of.value_size();
            if (by.num_parts == 1) {
                put(of, row, scratch.sums[number], out);
                continue;
            }
            float * partial = partial_of(of, by, partials, row, part);
            partial[0] = scratch.maxima[number];
            partial[1] = scratch.sums[number];
            if (partial[0] != -INFINITY) {
                memcpy(partial + 2, out, of.value_size() * sizeof(float));
            }
        }
    }
}

void join_parts(const attention & of, const division & by, float * partials, int64_t row) {
    float * joined = partial_of(of, by, partials, row, 0);
    for (int64_t part = 1; part < by.num_parts; ++part) {
        const float * other = partial_of(of, by, partials, row, part);
        if (other[0] == -INFINITY) {
            continue;
        }
        if (joined[0] == -INFINITY) {
            memcpy(joined, other, (2 + of.value_size()) * sizeof(float));
            continue;
        }
        const float maximum = fmaxf(joined[0], other[0]);
        const float ratio = expf(joined[0] - maximum), other_ratio = expf(other[0] - maximum);
        joined[0] = maximum;
        for (int64_t i = 1; i < 2 + of.value_size(); ++i) {
            joined[i] = joined[i] * ratio + other[i] * other_ratio;
        }
    }
    put(of, row, joined[1], joined + 2);
}

bool attend_together(const ggml_compute_params * params, ggml_tensor * dst) {
    const attention of(dst);
    if (!of.is_supported()) {
        return false;
    }
    const division by(of, params);
    static thread_local key_lists of_first_thread;
    float * partials = (float *) params->wdata + SHARED;
    if (params->ith == 0) {
        of_first_thread.begin(of, by);
        *(key_lists **) params->wdata = &of_first_thread;
        ggml_threadpool_chunk_set(params->threadpool, params->nth);
    }
    ggml_barrier(params->threadpool);
    key_lists & keys = **(key_lists **) params->wdata;
    if (!keys.is_known) {
        keys.find(of, by, params->ith, params->nth);
        ggml_barrier(params->threadpool);
    }
    const int64_t num_chunks = by.num_tiles(of) * by.num_parts;
    for (int64_t chunk = params->ith; chunk < num_chunks; chunk = ggml_threadpool_chunk_add(params->threadpool, 1)) {
        const int64_t part = chunk % by.num_parts, number = chunk / by.num_parts;
        const tile at = by.tile_of(of, number);
        const key_tiles & list = keys.lists[number / by.runs_of_groups];
        const tile_scratch scratch(of, at);
        attend(of, at, list, list.begin_of(part, by.num_parts), list.begin_of(part + 1, by.num_parts), scratch);
        put_tile(of, by, at, scratch, partials, part);
    }
    if (by.num_parts > 1) {
        ggml_barrier(params->threadpool);
        for (int64_t row = params->ith; row < of.num_streams() * of.num_positions() * of.num_heads(); row += params->nth) {
            join_parts(of, by, partials, row);
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
