// A beginning that another slot holds is not read from its file: included by calls.cpp.
//
// llama.cpp's server restores a slot by reading all of a file into cells of the KV cache, once for each slot. Where all
// slots have one cache, a cell can be of several: the slot is given those of another one that holds just what the file
// has. That takes no time and no room, and attention goes over them once for all slots that step together.
//
// Which slot holds what is in a file is known from when it was saved or read; whatever may change that is heard of here.

#include <algorithm>
#include <cstdio>
#include <memory>
#include <mutex>
#include <vector>

namespace {

// What a slot holds from its first position on.
struct holding {
    llama_memory_t cache;
    llama_seq_id slot;
    std::vector<llama_token> tokens; // as they stand in a file, which is not only tokens
    llama_pos num_positions;
    size_t num_bytes; // of the file

    bool is_there() const {
        return llama_memory_seq_pos_min(cache, slot) == 0 && llama_memory_seq_pos_max(cache, slot) + 1 >= num_positions;
    }
};

bool slots_share = false; // whether all that may change is heard of
std::mutex holdings_lock;
std::vector<holding> holdings;

// All slots where `slot` is negative.
void forget(llama_memory_t cache, llama_seq_id slot, llama_pos first_changed) {
    const std::lock_guard<std::mutex> lock(holdings_lock);
    holdings.erase(std::remove_if(holdings.begin(), holdings.end(), [&](const holding & each) {
        return each.cache == cache && (slot < 0 || each.slot == slot) && first_changed < each.num_positions;
    }), holdings.end());
}

void note(llama_context * context, llama_seq_id slot, const llama_token * tokens, size_t num_tokens, size_t num_bytes) {
    llama_memory_t cache = llama_get_memory(context);
    forget(cache, slot, 0);
    const std::lock_guard<std::mutex> lock(holdings_lock);
    holdings.push_back({ cache, slot, { tokens, tokens + num_tokens }, llama_memory_seq_pos_max(cache, slot) + 1, num_bytes });
}

// Caches that forget what is far behind, or that are no cells, hold a beginning no longer when they have gone on.
bool can_share(const llama_context * context) {
    const llama_model * model = llama_get_model(context);
    return slots_share && llama_n_seq_max(context) > 1 && llama_n_ctx_seq(context) == llama_n_ctx(context) && llama_model_n_swa(model) == 0
        && !llama_model_is_recurrent(model) && !llama_model_is_hybrid(model);
}

// Nothing where the file cannot be read: it is then for llama.cpp to say so.
std::vector<llama_token> tokens_in(llama_context * context, const char * path, llama_seq_id slot) {
    size_t number = 0;
    const size_t begin = llama_state_seq_load_file(context, path, slot, nullptr, 0, &number);
    const std::unique_ptr<FILE, int (*)(FILE *)> file(begin ? std::fopen(path, "rb") : nullptr, std::fclose);
    std::vector<llama_token> tokens(number);
    const bool is_read = file && std::fseek(file.get(), (long) begin, SEEK_SET) == 0
        && std::fread(tokens.data(), sizeof(llama_token), number, file.get()) == number;
    return is_read ? tokens : std::vector<llama_token>();
}

// Returns the bytes of its file where another slot, or this one, held these tokens, and 0 otherwise.
size_t shared(llama_context * context, llama_seq_id slot, const std::vector<llama_token> & tokens) {
    const llama_memory_t cache = llama_get_memory(context);
    holding from;
    {
        const std::lock_guard<std::mutex> lock(holdings_lock);
        const auto found = std::find_if(holdings.begin(), holdings.end(), [&](const holding & each) {
            return each.cache == cache && each.tokens == tokens && each.is_there();
        });
        if (found == holdings.end()) {
            return 0;
        }
        from = *found;
    }
    if (from.slot == slot) {
        llama_memory_seq_rm(cache, slot, from.num_positions, -1);
        return from.num_bytes;
    }
    llama_memory_seq_rm(cache, slot, -1, -1);
    llama_memory_seq_cp(cache, from.slot, slot, 0, from.num_positions);
    note(context, slot, tokens.data(), tokens.size(), from.num_bytes);
    return from.num_bytes;
}

} // namespace

// As of llama.h, all of them.
extern "C" {

size_t shared_load_file(llama_context * context, const char * path, llama_seq_id slot, llama_token * tokens, size_t room, size_t * number) {
    if (tokens == nullptr || !can_share(context)) {
        return llama_state_seq_load_file(context, path, slot, tokens, room, number);
    }
    const std::vector<llama_token> found = tokens_in(context, path, slot);
    if (!found.empty() && found.size() <= room) {
        if (const size_t num_bytes = shared(context, slot, found)) {
            std::copy(found.begin(), found.end(), tokens);
            *number = found.size();
            return num_bytes;
        }
    }
    forget(llama_get_memory(context), slot, 0);
    const size_t num_bytes = llama_state_seq_load_file(context, path, slot, tokens, room, number);
    if (num_bytes != 0) {
        note(context, slot, tokens, *number, num_bytes);
    }
    return num_bytes;
}

size_t shared_save_file(llama_context * context, const char * path, llama_seq_id slot, const llama_token * tokens, size_t number) {
    const size_t num_bytes = llama_state_seq_save_file(context, path, slot, tokens, number);
    if (num_bytes != 0 && can_share(context)) {
        note(context, slot, tokens, number, num_bytes);
    }
    return num_bytes;
}

size_t shared_set_data(llama_context * context, const uint8_t * data, size_t size, llama_seq_id slot, llama_state_seq_flags flags) {
    forget(llama_get_memory(context), slot, 0);
    return llama_state_seq_set_data_ext(context, data, size, slot, flags);
}

void shared_clear(llama_memory_t cache, bool data) {
    forget(cache, -1, 0);
    llama_memory_clear(cache, data);
}

bool shared_rm(llama_memory_t cache, llama_seq_id slot, llama_pos begin, llama_pos end) {
    forget(cache, slot, begin);
    return llama_memory_seq_rm(cache, slot, begin, end);
}

void shared_cp(llama_memory_t cache, llama_seq_id from, llama_seq_id to, llama_pos begin, llama_pos end) {
    forget(cache, to, 0);
    llama_memory_seq_cp(cache, from, to, begin, end);
}

void shared_keep(llama_memory_t cache, llama_seq_id slot) {
    forget(cache, -1, 0);
    llama_memory_seq_keep(cache, slot);
}

void shared_add(llama_memory_t cache, llama_seq_id slot, llama_pos begin, llama_pos end, llama_pos by) {
    forget(cache, slot, 0);
    llama_memory_seq_add(cache, slot, begin, end, by);
}

void shared_div(llama_memory_t cache, llama_seq_id slot, llama_pos begin, llama_pos end, int by) {
    forget(cache, slot, 0);
    llama_memory_seq_div(cache, slot, begin, end, by);
}

}
