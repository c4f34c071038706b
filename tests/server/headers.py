"""Files that have what a model's begins with, and no weights."""

from __future__ import annotations

from pathlib import Path

import gguf


def written(path: Path, *, heads: int = 32, groups: int | list[int] | None = 8, head: int | None = None) -> Path:
    """A file with the header of a model of 32 layers, 4,096 wide, as gguf's own writer makes it."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tags(["a", "bé"])
    writer.add_array("llama.numbers", [1, 2, 3])
    writer.add_block_count(32)
    writer.add_embedding_length(4096)
    writer.add_head_count(heads)
    if groups is not None:
        writer.add_head_count_kv(groups)
    if head is not None:
        writer.add_key_length(head)
        writer.add_value_length(head)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b"] * 3000)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path
