"""Small GPTs and mixtures of experts, and the prompts that the tests of generation give them."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from shoal.models.gpt import GPT, GPTConfig
from shoal.models.huggingface import save_folder
from shoal.models.moe import MoE, MoEConfig

VOCAB = 320


def tiny_gpt(**options: object) -> GPT:
    """Random weights, far enough from 0 that every input matters. With ``experts`` it is a mixture of them."""
    torch.manual_seed(0)
    sizes = {"layers": 2, "heads": 2, "width": 32, "context": 128, "vocab": VOCAB, **options}
    model = (MoE(MoEConfig(**sizes)) if "experts" in options else GPT(GPTConfig(**sizes))).eval()
    for parameter in model.parameters():
        parameter.data.mul_(4)
    return model.requires_grad_(False)


def prompts(*lengths: int, seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCAB, (length,), generator=generator).tolist() for length in lengths]


def byte_tokenizer() -> str:
    """Byte-level pairs, and one token that ends a text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["hello world, this is a stream of words, one after the other " * 20], trainer)
    return str(backend.to_str())


def save_gpt(folder: Path, **options: object) -> Path:
    save_folder(tiny_gpt(activation="gelu_tanh", **options), folder, byte_tokenizer())
    return folder
