"""A Llama with random weights and a tokenizer of one token per character, for benchmarks that compare engines.

    python -m slos_serve.backend.random_model FOLDER [--hidden 512] [--layers 8] [--heads 8] [--vocab 1024]

The default has 27 M parameters and 4096 positions. Text means nothing, speed does. Needs torch, transformers and
tokenizers of any recent version and nothing else, so that an environment of another engine can make it too.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def write_model(folder: Path, hidden: int = 512, layers: int = 8, heads: int = 8, vocab: int = 1024) -> None:
    """Weights in bfloat16 and a tokenizer, always the same for the same shape. Raises ValueError for a bad one."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    if hidden % (2 * heads) or vocab < 512:
        raise ValueError(
            f"hidden must be a multiple of 2 * heads and vocab at least 512, got {hidden}, {heads}, {vocab}"
        )
    _write_tokenizer(folder, vocab)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads,
        intermediate_size=hidden * 11 // 4, vocab_size=vocab, max_position_embeddings=4096, bos_token_id=1,
        eos_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def _write_tokenizer(folder: Path, vocab: int) -> None:
    """One token per byte, and pairs that only the model writes, so that every id has a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = (first + second for first in alphabet for second in alphabet if (first + second).isascii())
    words = ["<unk>", "<s>", "</s>", *alphabet]
    words += [pair for _, pair in zip(range(vocab - len(words)), pairs, strict=False)]
    fast = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=[], unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=fast, unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_max_length=4096
    ).save_pretrained(folder)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    for name, default in (("hidden", 512), ("layers", 8), ("heads", 8), ("vocab", 1024)):
        parser.add_argument(f"--{name}", type=int, default=default)
    write_model(**vars(parser.parse_args(argv)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
