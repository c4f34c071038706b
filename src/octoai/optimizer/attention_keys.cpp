// What attention is computed of, and which keys each position sees: included by attention.cpp.

namespace {

constexpr int TILE_KEYS = ggml_fa_tile_config::KV;
// So few rows take as long to be multiplied as their keys to come from memory.
constexpr int FEW_ROWS = 4;

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
            seen[i] = finite_of(of.mask_of(at.first_position + i, at.stream) + key);
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
                to[i] = i < keys.num_real ? mask[keys.keys[i]] : (ggml_fp16_t) MINUS_INFINITY;
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

} // namespace
