// What a text begins with in common with an earlier one is not taken apart into tokens again: included by calls.cpp.
//
// A prompt is tokenized twice here, by who asks for its tokens and by who answers it, and most of it was in the prompt
// before: the messages of the system, the turns of a conversation so far. A text that is known is not tokenized at all.
// Of one that begins like it, what follows the last special token in common is: llama.cpp looks for special tokens first,
// and tokenizes what is between two of them by itself.

#include <algorithm>
#include <cstring>
#include <list>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

namespace {

constexpr size_t MAX_TEXTS = 64;
constexpr size_t MAX_TEXT_BYTES = 8 << 20; // of all texts together
constexpr size_t MIN_TEXT_BYTES = 256;     // fewer are as fast tokenized

// The special tokens of a vocabulary that no other one can reach across the end of: what follows one is tokenized alike
// whatever stands before.
class boundaries {
public:
    explicit boundaries(const llama_vocab * vocab) {
        if (llama_vocab_type(vocab) != LLAMA_VOCAB_TYPE_BPE || llama_vocab_get_add_eos(vocab) || llama_vocab_get_add_sep(vocab)) {
            return; // others put spaces or tokens where a text begins or ends
        }
        const int kinds = LLAMA_TOKEN_ATTR_CONTROL | LLAMA_TOKEN_ATTR_USER_DEFINED | LLAMA_TOKEN_ATTR_UNKNOWN;
        for (llama_token each = 0; each < llama_vocab_n_tokens(vocab); ++each) {
            const int kind = llama_vocab_get_attr(vocab, each);
            if ((kind & kinds) != 0) {
                special[each] = { llama_vocab_get_text(vocab, each), (kind & LLAMA_TOKEN_ATTR_RSTRIP) != 0 };
            }
        }
    }

    // Nothing where it is none. Some vocabularies have thousands of special tokens: the few that are met are looked at.
    const std::string & text_of(llama_token token) {
        static const std::string none;
        const auto place = special.find(token);
        if (place == special.end()) {
            return none;
        }
        special_token & found = place->second;
        if (!found.is_looked_at) {
            found.is_looked_at = true;
            found.is_boundary = !found.takes_space && !found.text.empty() &&
                std::none_of(special.begin(), special.end(), [&](const auto & other) {
                    return other.first != token && crosses(other.second.text, found.text);
                });
        }
        return found.is_boundary ? found.text : none;
    }

private:
    struct special_token {
        std::string text;
        bool takes_space = false; // what stands behind it
        bool is_looked_at = false, is_boundary = false;
    };

    std::unordered_map<llama_token, special_token> special;

    // Whether `other` can stand where `text` does and go on behind it.
    static bool crosses(const std::string & other, const std::string & text) {
        if (other.find(text) != std::string::npos) {
            return true;
        }
        for (size_t length = 1; length < std::min(other.size(), text.size()); ++length) {
            if (text.compare(text.size() - length, length, other, 0, length) == 0) {
                return true;
            }
        }
        return false;
    }
};

struct tokenized {
    const llama_vocab * vocab;
    bool adds_special, parses_special;
    std::string text;
    std::vector<llama_token> tokens;
    std::vector<std::pair<size_t, size_t>> ends; // behind each boundary: bytes and tokens, in their order

    bool is_alike(const tokenized & other) const {
        return vocab == other.vocab && adds_special == other.adds_special && parses_special == other.parses_special;
    }

    void find_ends(boundaries & known) {
        std::unordered_map<llama_token, std::vector<size_t>> places;
        for (size_t i = 0; i < tokens.size(); ++i) {
            if (!known.text_of(tokens[i]).empty()) {
                places[tokens[i]].push_back(i + 1);
            }
        }
        for (const auto & [token, numbers] : places) {
            const std::string & name = known.text_of(token);
            std::vector<size_t> bytes;
            for (size_t at = text.find(name); at != std::string::npos; at = text.find(name, at + name.size())) {
                bytes.push_back(at + name.size());
            }
            for (size_t i = 0; i < numbers.size() && bytes.size() == numbers.size(); ++i) {
                ends.emplace_back(bytes[i], numbers[i]);
            }
        }
        std::sort(ends.begin(), ends.end());
    }
};

std::mutex texts_lock;
std::list<std::shared_ptr<const tokenized>> texts; // the last that was used comes first

void find_ends(tokenized & of) {
    static std::mutex lock;
    static std::unordered_map<const llama_vocab *, boundaries> known;
    const std::lock_guard<std::mutex> guard(lock);
    of.find_ends(known.try_emplace(of.vocab, of.vocab).first->second);
}

// Returns the text that begins most like this one, and how many bytes and tokens can be taken of it.
std::shared_ptr<const tokenized> most_alike(const tokenized & wanted, std::pair<size_t, size_t> & end) {
    const std::lock_guard<std::mutex> lock(texts_lock);
    auto best = texts.end();
    end = { 0, 0 };
    for (auto each = texts.begin(); each != texts.end(); ++each) {
        const tokenized & other = **each;
        if (!other.is_alike(wanted)) {
            continue;
        }
        const size_t most = std::min(other.text.size(), wanted.text.size());
        const size_t common = std::mismatch(wanted.text.begin(), wanted.text.begin() + most, other.text.begin()).first - wanted.text.begin();
        if (common == wanted.text.size() && common == other.text.size()) {
            end = { common, other.tokens.size() };
            best = each;
            break;
        }
        const auto behind = std::upper_bound(other.ends.begin(), other.ends.end(), std::make_pair(common, SIZE_MAX));
        if (behind != other.ends.begin() && behind[-1] > end) {
            end = behind[-1];
            best = each;
        }
    }
    if (best == texts.end()) {
        return nullptr;
    }
    texts.splice(texts.begin(), texts, best);
    return texts.front();
}

void keep(std::shared_ptr<const tokenized> text) {
    const std::lock_guard<std::mutex> lock(texts_lock);
    texts.push_front(std::move(text));
    size_t num_bytes = 0, number = 0;
    for (auto each = texts.begin(); each != texts.end(); ++each) {
        num_bytes += (*each)->text.size();
        if (++number > MAX_TEXTS || num_bytes > MAX_TEXT_BYTES) {
            texts.erase(each, texts.end());
            return;
        }
    }
}

// Of the rest of a text, or of all of it. False where llama.cpp does not do it.
bool add_tokens(tokenized & to, size_t begin) {
    const char * rest = to.text.data() + begin;
    const int32_t size = (int32_t) (to.text.size() - begin);
    const size_t before = to.tokens.size();
    to.tokens.resize(before + size + 2);
    const bool is_whole = begin == 0;
    const int32_t number = llama_tokenize(
        to.vocab, rest, size, to.tokens.data() + before, size + 2, is_whole && to.adds_special, to.parses_special);
    to.tokens.resize(before + std::max(number, 0));
    return number >= 0;
}

} // namespace

// As of llama.h.
extern "C" int32_t shared_tokenize(const llama_vocab * vocab, const char * text, int32_t size, llama_token * tokens, int32_t room,
                                   bool adds_special, bool parses_special) {
    if (size < (int32_t) MIN_TEXT_BYTES || (size_t) size > MAX_TEXT_BYTES) {
        return llama_tokenize(vocab, text, size, tokens, room, adds_special, parses_special);
    }
    auto wanted = std::make_shared<tokenized>(tokenized{ vocab, adds_special, parses_special, std::string(text, size), {}, {} });
    std::pair<size_t, size_t> end;
    std::shared_ptr<const tokenized> found = most_alike(*wanted, end);
    // A longer text may have a boundary just where this one ends: of its tokens, those up to there are this one's.
    const bool is_known = found != nullptr && end.first == wanted->text.size() && found->text.size() == end.first;
    if (!is_known) {
        if (found != nullptr) {
            wanted->tokens.assign(found->tokens.begin(), found->tokens.begin() + end.second);
        }
        if (end.first < wanted->text.size() && !add_tokens(*wanted, end.first)) {
            return llama_tokenize(vocab, text, size, tokens, room, adds_special, parses_special);
        }
        if (parses_special) {
            find_ends(*wanted);
        }
        found = wanted;
        keep(std::move(wanted));
    }
    const int32_t number = (int32_t) found->tokens.size();
    if (number > room) {
        return -number;
    }
    std::copy(found->tokens.begin(), found->tokens.end(), tokens);
    return number;
}
