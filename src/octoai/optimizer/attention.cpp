// Attention on the CPU, in tiles of rows that see the same keys: included by llama.cpp's ggml-cpu/ops.cpp.
//
// llama.cpp attends to fewer than 64 positions of a slot row by row: each head reads and converts its keys and values
// anew, and adds up in F16. Heads in groups (grouped-query attention) have the same keys, so that their rows are a tile
// here: keys are converted once for all of them, transposed where the rows are more than a few, and sums are F32. Where
// slots share a cache, positions of one slot see few of its keys: a tile of keys is those that the same positions see.
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

#include "attention_vectors.cpp"
#include "attention_keys.cpp"

namespace {

constexpr int TILE_ROWS = ggml_fa_tile_config::Q;
constexpr int MAX_ROWS = 256; // of all groups of a tile: queries and sums of more do not stay in the second cache
constexpr int64_t PARTS_OF_THREAD = 4; // so that threads end together, where tiles are few
constexpr int64_t MIN_PART_KEYS = 192;
constexpr int FEW_KEYS = 4; // that few rows are multiplied with at a time
constexpr int64_t SHARED = 16; // floats that a pointer for all threads has beside what they compute

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

bool are_numbers(const ggml_fp16_t * values, int64_t size) {
    ggml_fp16_t most = 0;
    for (int64_t d = 0; d < size; ++d) {
        most = std::max<ggml_fp16_t>(most, values[d] & 0x7FFF);
    }
    return most < 0x7C00; // infinity in F16
}

// Whether all values of keys that one of the positions does not see are numbers.
bool are_hidden_numbers(const lines & rows, int64_t offset, int64_t size, int num_keys, const ggml_fp16_t * masks, int num_positions) {
    for (int i = 0; i < num_keys; i += LANES) {
        unsigned seen = ~0u;
        for (int position = 0; position < num_positions; ++position) {
            seen &= finite_of(masks + position * TILE_KEYS + i);
        }
        for (int key = i; key < i + LANES; ++key) {
            if ((seen >> (key - i) & 1) == 0 && !are_numbers((const ggml_fp16_t *) (rows.at[key] + offset), size)) {
                return false;
            }
        }
    }
    return true;
}

// Of values that are not all numbers: none of a key that a row does not see goes into what it has, as 0 times it would.
void add_seen(const lines & rows, int64_t offset, int64_t size, int num_keys, const float * weights, float * out, int num_rows) {
    for (int row = 0; row < num_rows; ++row, out += size) {
        for (int i = 0; i < num_keys; ++i) {
            const float weight = *weights++;
            const char * value = rows.at[i] + offset;
            for (int64_t d = 0; d < size && weight != 0.0f; d += LANES) {
                store(out + d, multiply_add(all(weight), load_half(value + d * sizeof(ggml_fp16_t)), load(out + d)));
            }
        }
    }
}

// Turns a row's scores for some keys into weights, in place; what it has of earlier keys is scaled to the new maximum.
// Returns whether there are keys that it does not see.
bool weigh(const attention & of, float * scores, const ggml_fp16_t * mask, int num_keys, float & sum, float & maximum, float * out) {
    vec score[TILE_KEYS / LANES];
    vec highest = all(-INFINITY);
    bool hides = false;
    for (int i = 0; i < num_keys / LANES; ++i) {
        const vec added = load_half(mask + i * LANES);
        score[i] = masked(multiply_add(load(scores + i * LANES), all(of.scale), added), added, hides);
        highest = higher(highest, score[i]);
    }
    const float before = maximum;
    maximum = fmaxf(before, highest_of(highest));
    if (maximum == -INFINITY) { // it has seen no key so far
        memset(scores, 0, num_keys * sizeof(float));
        return true;
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
    return hides;
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
    // Few rows are multiplied with keys and values as these lie there: to transpose and to keep what was converted is
    // worth it from more rows on.
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
        bool hides = false;
        for (int row = 0; row < num_rows; ++row) {
            const ggml_fp16_t * mask = masks + row / at.heads * TILE_KEYS;
            hides |= weigh(of, scratch.weights + row * num_keys, mask, num_keys, scratch.sums[first + row],
                           scratch.maxima[first + row], out + row * value_size);
        }
        if (hides && !are_hidden_numbers(v, value_offset, value_size, num_keys, masks, num_rows / at.heads)) {
            add_seen(v, value_offset, value_size, num_keys, scratch.weights, out, num_rows);
        } else if (is_few) {
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
