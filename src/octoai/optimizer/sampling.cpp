// The samplers that look at every token of the vocabulary at every step, `dist` and `top_p`: included by llama.cpp's
// ggml-cpu/vec.cpp, whose vector functions they use.
//
// llama.cpp's own call expf for one token after the other, and look for the most likely ones by sorting. All streams
// wait for that, one after the other, on one thread. Here the same is computed with vectors: the same candidates, the
// same random numbers of a seed; probabilities differ in the last digits of a float.
//
// Made by llama.h's `llama_sampler_init`, as samplers of a program's own are. The engine makes them instead of its own.

#include "llama.h"

#include <algorithm>
#include <cstring>
#include <random>
#include <vector>

namespace {

constexpr size_t ADDED_AT_ONCE = 256; // probabilities, in the search for the one that was drawn
constexpr float  STEP          = 1.0f / 16; // from one bound of what is likely to the next

// Fills in `p` of all candidates. They are returned without the rest, until the next call on this thread.
const std::vector<float> & probabilities(llama_token_data_array * candidates) {
    static thread_local std::vector<float> values;
    const size_t size = candidates->size;
    llama_token_data * data = candidates->data;
    values.resize(size);
    float * p = values.data();
    float highest = -INFINITY;
#pragma omp simd reduction(max : highest)
    for (size_t i = 0; i < size; ++i) {
        p[i] = data[i].logit;
        highest = p[i] > highest ? p[i] : highest;
    }
    const float sum = ggml_vec_soft_max_f32(size, p, p, highest);
#pragma omp simd
    for (size_t i = 0; i < size; ++i) {
        p[i] /= sum;
        data[i].p = p[i];
    }
    return values;
}

double added(const float * p, size_t number) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (size_t i = 0; i < number; ++i) {
        sum += p[i];
    }
    return sum;
}

// Where the sum of the probabilities from the first on passes `drawn`, which is from 0 to below 1.
size_t position(const std::vector<float> & p, double drawn) {
    size_t at = 0;
    double sum = 0;
    for (; at + ADDED_AT_ONCE <= p.size(); at += ADDED_AT_ONCE) {
        const double with_these = sum + added(&p[at], ADDED_AT_ONCE);
        if (with_these > drawn) {
            break;
        }
        sum = with_these;
    }
    for (; at < p.size(); ++at) {
        sum += p[at];
        if (sum > drawn) {
            return at;
        }
    }
    while (at > 0 && !(p[at - 1] > 0)) { // what was rounded off is the last one's that can come at all
        --at;
    }
    return at > 0 ? at - 1 : p.size() - 1;
}

// What llama.h asks of a sampler, whatever it does: a `State` and its `interface`.

template <typename State> State & state(const llama_sampler * sampler) { return *(State *) sampler->ctx; }

template <typename State> llama_sampler * made(const State & state) {
    return llama_sampler_init(&State::interface, new State(state));
}

template <typename State> llama_sampler * clone(const llama_sampler * sampler) { return made(state<State>(sampler)); }

template <typename State> void destroy(llama_sampler * sampler) { delete &state<State>(sampler); }

// A draw by probability.

struct dist {
    static llama_sampler_i interface;

    uint32_t     seed;    // as asked for: LLAMA_DEFAULT_SEED is another one each time
    uint32_t     current;
    std::mt19937 random;

    explicit dist(uint32_t asked) : seed(asked) { begin(); }
    void begin() {
        current = seed == LLAMA_DEFAULT_SEED ? std::random_device()() : seed;
        random.seed(current);
    }
};

const char * dist_name(const llama_sampler *) { return "dist"; }

void dist_apply(llama_sampler * sampler, llama_token_data_array * candidates) {
    candidates->selected = -1;
    if (candidates->size > 0) {
        const double drawn = std::uniform_real_distribution<double>(0, 1)(state<dist>(sampler).random);
        candidates->selected = position(probabilities(candidates), drawn);
    }
}

void dist_reset(llama_sampler * sampler) { state<dist>(sampler).begin(); }

llama_sampler_i dist::interface = { dist_name, nullptr, dist_apply, dist_reset, clone<dist>, destroy<dist> };

// The most likely, until together they have a probability of p: the "nucleus".

struct top_p {
    static llama_sampler_i interface;

    float  p;
    size_t min_keep;
};

const char * top_p_name(const llama_sampler *) { return "top-p"; }

bool is_before(const llama_token_data & one, const llama_token_data & other) {
    return one.logit != other.logit ? one.logit > other.logit : one.id < other.id;
}

// Keeps those that can be among them, and sorts these. Which are likely is found by ever lower bounds: in a nucleus are
// a few hundred of a hundred thousand.
void keep_likely(llama_token_data_array * candidates, const std::vector<float> & p, const top_p & wish) {
    static thread_local std::vector<llama_token_data> likely;
    float bound = *std::max_element(p.begin(), p.end());
    double sum = 0;
    do {
        bound = bound > 1e-30f ? bound * STEP : 0;
        likely.clear();
        sum = 0;
        for (size_t i = 0; i < p.size(); ++i) {
            if (p[i] >= bound) {
                likely.push_back(candidates->data[i]);
                sum += p[i];
            }
        }
    } while (bound > 0 && (sum < wish.p || likely.size() < wish.min_keep));
    if (likely.empty()) {
        return; // every token is forbidden, or what the model computed is no number
    }
    std::sort(likely.begin(), likely.end(), is_before);
    std::copy(likely.begin(), likely.end(), candidates->data);
    candidates->size = likely.size();
    candidates->sorted = true;
}

void top_p_apply(llama_sampler * sampler, llama_token_data_array * candidates) {
    const top_p & wish = state<top_p>(sampler);
    if (wish.p >= 1 || candidates->size == 0) {
        return;
    }
    const std::vector<float> & p = probabilities(candidates);
    if (!candidates->sorted) {
        keep_likely(candidates, p, wish);
    }
    double sum = 0;
    for (size_t i = 0; i < candidates->size; ++i) {
        sum += candidates->data[i].p;
        if (sum >= wish.p && i + 1 >= wish.min_keep) {
            candidates->size = i + 1;
        }
    }
}

llama_sampler_i top_p::interface = { top_p_name, nullptr, top_p_apply, nullptr, clone<top_p>, destroy<top_p> };

} // namespace

extern "C" {

llama_sampler * fast_dist(uint32_t seed) { return made(dist(seed)); }

llama_sampler * fast_top_p(float p, size_t min_keep) { return made(top_p{p, min_keep}); }

// As of llama.h, which knows its own samplers only.
uint32_t fast_seed(const llama_sampler * sampler) {
    if (sampler->iface == &dist::interface) {
        return state<dist>(sampler).current;
    }
    auto * chain = (llama_sampler *) sampler;
    if (llama_sampler_chain_get(chain, -1) != nullptr) {
        for (int i = llama_sampler_chain_n(chain); i-- > 0;) {
            const uint32_t seed = fast_seed(llama_sampler_chain_get(chain, i));
            if (seed != LLAMA_DEFAULT_SEED) {
                return seed;
            }
        }
    }
    return LLAMA_DEFAULT_SEED;
}

}

