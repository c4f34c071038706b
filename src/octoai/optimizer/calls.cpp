// Functions of llama.cpp's that ours take the place of: included by its ggml-cpu/vec.cpp.

#include "llama.h"

#if defined(__linux__)

#include "sampling.cpp"
#include "sharing.cpp"
#include "tokenization.cpp"

#include <dlfcn.h>
#include <link.h>

namespace {

// Functions that a library calls by name, its own included, are in a table that the loader fills in.
struct call_table {
    const char *        names   = nullptr;
    const ElfW(Sym) *   symbols = nullptr;
    const ElfW(Rela) *  calls   = nullptr;
    size_t              size    = 0;
    bool                is_closed = false; // filled in at once, and then read-only
    ElfW(Addr)          base;

    explicit call_table(const link_map * library) : base(library->l_addr) {
        for (const ElfW(Dyn) * each = library->l_ld; each->d_tag != DT_NULL; ++each) {
            switch (each->d_tag) {
                case DT_STRTAB:   names   = (const char *) each->d_un.d_ptr; break;
                case DT_SYMTAB:   symbols = (const ElfW(Sym) *) each->d_un.d_ptr; break;
                case DT_JMPREL:   calls   = (const ElfW(Rela) *) each->d_un.d_ptr; break;
                case DT_PLTRELSZ: size    = each->d_un.d_val / sizeof(ElfW(Rela)); break;
                case DT_BIND_NOW: is_closed = true; break;
                case DT_FLAGS:    is_closed |= (each->d_un.d_val & DF_BIND_NOW) != 0; break;
                case DT_FLAGS_1:  is_closed |= (each->d_un.d_val & DF_1_NOW) != 0; break;
            }
        }
    }

    int replace(const char * name, void * by) {
        for (size_t i = 0; names && symbols && calls && !is_closed && i < size; ++i) {
            if (std::strcmp(names + symbols[ELF64_R_SYM(calls[i].r_info)].st_name, name) == 0) {
                *(void **) (base + calls[i].r_offset) = by;
                return 1;
            }
        }
        return 0;
    }
};

} // namespace

// Which of these calls give what the engine's own give: those of kernels that say less, or nothing, are not to be used.
extern "C" int calls_version(void) {
    return 2;
}

// From now on the engine calls ours. Returns how many of them it calls by name: where none, it keeps its own.
extern "C" int replace_calls(void) {
    Dl_info unused;
    link_map * engine = nullptr;
    if (!dladdr1((void *) llama_sampler_init, &unused, (void **) &engine, RTLD_DL_LINKMAP) || engine == nullptr) {
        return 0;
    }
    call_table table(engine);
    const std::pair<const char *, void *> made_here[] = {
        { "llama_sampler_init_dist", (void *) fast_dist },
        { "llama_sampler_init_top_p", (void *) fast_top_p },
        { "llama_sampler_get_seed", (void *) fast_seed },
        { "llama_tokenize", (void *) shared_tokenize },
    };
    const std::pair<const char *, void *> heard_here[] = {
        { "llama_state_seq_load_file", (void *) shared_load_file },
        { "llama_state_seq_save_file", (void *) shared_save_file },
        { "llama_memory_clear", (void *) shared_clear },
        { "llama_memory_seq_rm", (void *) shared_rm },
        { "llama_memory_seq_cp", (void *) shared_cp },
        { "llama_memory_seq_add", (void *) shared_add },
        { "llama_state_seq_set_data_ext", (void *) shared_set_data },
    };
    int num_replaced = 0;
    for (const auto & [name, function] : made_here) {
        num_replaced += table.replace(name, function);
    }
    slots_share = true;
    for (const auto & [name, function] : heard_here) {
        const int is_replaced = table.replace(name, function);
        slots_share &= is_replaced != 0; // or what a slot holds could change unheard
        num_replaced += is_replaced;
    }
    // Not called by name in any version so far.
    num_replaced += table.replace("llama_memory_seq_keep", (void *) shared_keep) + table.replace("llama_memory_seq_div", (void *) shared_div);
    return num_replaced;
}

#endif
