"""Tiny models and rules that tensor parallelism is tested on: sizes that do not divide, dropout, biases, tied ends."""

from typing import Any

import torch
from parallel.split_runs import Case
from tiny_models import CLASSES, FRAMED, IMAGES, LABELS, TEXT, WINDOWS

SEVEN = {"layers": 2, "heads": 7, "width": 21, "ffn": 10, "dropout": 0.1, "attention_dropout": 0.1}
FOUR = {"layers": 2, "heads": 4, "width": 16, "dropout": 0.1, "attention_dropout": 0.1}
BERT = {"layers": 2, "heads": 3, "width": 12, "attention_dropout": 0.1}
LABELLED = {**TEXT, "classes": CLASSES}
PICTURES = {"shape": (12, 12), "classes": CLASSES}
TALL = {"input": torch.randn(3, 1, 65, 12, generator=torch.Generator().manual_seed(2)), **LABELS}
MIXED = {"layers": 1, "heads": 2, "width": 16, "ffn": 10}
BIG = {"style": "imagenet", "depth": 18, "width": 2}
TALL_FACTS = {"shape": (1, 65, 12), "classes": CLASSES}

ROW_FIRST = {"width": "tensor", "heads": "", "ffn": "", "vocab": ""}
COLUMN_ONLY = {
    "heads": "", "ffn": "",  # what flows is whole
    "qkv.qkv": "tensor", "out.width": "tensor", "up.ffn": "tensor", "down.width": "tensor",
}  # fmt: skip
SLICED = {"sequence": "tensor"}
ROWS = {"rows": "tensor"}


def _gpt(rules: Any = None, **options: Any) -> Case:
    return Case("gpt", options, TEXT, WINDOWS, rules or {})


def _bert(task: str, facts: Any, batch: Any, rules: Any = None) -> Case:
    return Case("bert", BERT, facts, batch, rules or {}, task=task)


CASES: dict[str, Case] = {
    "gpt": _gpt(**SEVEN),
    "gpt-untied": _gpt(tied=False, bias=False, **SEVEN),
    "gpt-sliced": _gpt(SLICED, **SEVEN),
    "gpt-sliced-whole-vocabulary": _gpt({**SLICED, "vocab": ""}, **SEVEN),
    "gpt-row-first": _gpt(ROW_FIRST, **FOUR),
    "gpt-column-only": _gpt(COLUMN_ONLY, **SEVEN),
    "bert-masked": _bert("masked-language-model", TEXT, FRAMED),
    "bert-masked-sliced": _bert("masked-language-model", TEXT, FRAMED, SLICED),
    "bert-masked-row-first": _bert("masked-language-model", TEXT, FRAMED, ROW_FIRST),
    "bert-classes-row-first": _bert("classification", LABELLED, {**FRAMED, **LABELS}, ROW_FIRST),
    "bert-answers-sliced": _bert(
        "question-answering",
        TEXT,
        {**FRAMED, "start": torch.tensor([1, 2, 0]), "end": torch.tensor([3, 2, 0])},
        SLICED,
    ),
    "mlp": Case("mlp", {"hidden": (9, 6, 7), "dropout": 0.2}, {"shape": (1, 12, 12), "classes": CLASSES}, IMAGES),
    "cnn": Case("cnn", {"channels": (5, 6), "hidden": 7, "dropout": 0.1, "norm": True}, PICTURES, IMAGES),
    "cnn-odd": Case("cnn", {"channels": (5,), "hidden": 7, "dropout": 0.1, "norm": True}, PICTURES, IMAGES),
    "cnn-joined": Case(
        "cnn",
        {"channels": (5, 6), "hidden": 7, "norm": True},
        PICTURES,
        IMAGES,
        {"channels": "", "convolutions.0.channels": "tensor", "convolutions.1.width": "tensor"},
    ),
    "cnn-rows": Case("cnn", {"channels": (5, 6), "kernel": 5, "hidden": 7, "norm": True}, PICTURES, IMAGES, ROWS),
    "resnet": Case("resnet", {"depth": 8, "width": 4}, PICTURES, IMAGES),
    "resnet-padded": Case("resnet", {"depth": 8, "width": 3}, PICTURES, IMAGES, {"width": "tensor", "channels": ""}),
    "resnet-by-width": Case("resnet", BIG, TALL_FACTS, TALL, {"width": "tensor", "channels": ""}),
    "resnet-rows": Case("resnet", BIG, TALL_FACTS, TALL, ROWS),
    "lstm": Case("lstm", {"width": 8, "hidden": 10}, TEXT, WINDOWS),
    "elmo": Case("elmo", {"width": 8}, TEXT, WINDOWS),
    "moe": Case("moe", {**MIXED, "experts": 3}, TEXT, WINDOWS),
    "moe-sliced": Case("moe", {**MIXED, "experts": 3, "dropout": 0.1}, TEXT, WINDOWS, SLICED),
    "moe-sliced-whole-experts": Case("moe", {**MIXED, "experts": 3}, TEXT, WINDOWS, {**SLICED, "ffn": ""}),
    "moe-top-1": Case("moe", {**MIXED, "experts": 2, "top_k": 1, "bias": False}, TEXT, WINDOWS),
}
IN_TWO = list(CASES)
IN_THREE = ["gpt", "gpt-sliced", "gpt-row-first", "bert-masked", "mlp", "cnn", "cnn-rows", "resnet-rows"]
IN_FOUR = ["gpt", "gpt-sliced", "gpt-column-only"]
