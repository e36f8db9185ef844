"""Hugging Face folders (config.json and safetensors) of BERT and GPT-2 models: read and write, without transformers."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from shoal.errors import UserError
from shoal.models.activation import Activation
from shoal.models.bert import Bert, BertConfig, Head
from shoal.models.gpt import GPT, GPTConfig
from shoal.models.huggingface_names import Renamed, State, bert_links, gpt_links, links_of, to_theirs
from shoal.models.weights_file import StoredTensors, read_json, write_tensors

_ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}
_THEIR_ACTIVATION: dict[Activation, str] = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu"}
_BERT_HEADS: dict[str, Head] = {
    "BertModel": "encoder",
    "BertForMaskedLM": "masked-language-model",
    "BertForPreTraining": "masked-language-model",
    "BertForSequenceClassification": "classification",
    "BertForQuestionAnswering": "question-answering",
}
_BERT_CLASS: dict[Head, str] = {
    "encoder": "BertModel",
    "masked-language-model": "BertForMaskedLM",
    "classification": "BertForSequenceClassification",
    "question-answering": "BertForQuestionAnswering",
}
_BERT_SIZES = {
    "vocab": "vocab_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "ffn": "intermediate_size",
    "context": "max_position_embeddings",
    "types": "type_vocab_size",
    "norm_eps": "layer_norm_eps",
    "dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
}
_GPT_SIZES = {
    "vocab": "vocab_size",
    "width": "n_embd",
    "layers": "n_layer",
    "heads": "n_head",
    "context": "n_positions",
    "norm_eps": "layer_norm_epsilon",
    "dropout": "resid_pdrop",
    "attention_dropout": "attn_pdrop",
}
# their settings that change the arithmetic, with the only value that our models compute
_FIXED: dict[str, dict[str, Any]] = {
    "bert": {"position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False},
    "gpt2": {
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    },
}


@dataclass(frozen=True)
class FolderConfig:
    """What config.json says, in our words."""

    kind: str  # "bert" or "gpt"
    head: str  # of a BERT: see shoal.models.bert.Head; of a GPT: "language-model"
    options: Mapping[str, Any]  # of BertConfig or GPTConfig


@dataclass(frozen=True)
class Folder:
    config: FolderConfig
    state: State  # under our names, float32


def read_config(path: str | Path) -> FolderConfig:
    """Raises UserError when there is no config.json, or when it describes a model that is not built here."""
    file = Path(path) / "config.json"
    config = read_json(file)
    model_type = config.get("model_type")
    if model_type not in _FIXED:
        raise UserError(f"{str(file)!r} has model_type {model_type!r}: only {', '.join(_FIXED)} can be loaded.")
    for key, value in _FIXED[model_type].items():
        if config.get(key, value) != value:
            raise UserError(f"{str(file)!r} has {key} = {config[key]!r}: only {value!r} is supported.")
    sizes = _BERT_SIZES if model_type == "bert" else _GPT_SIZES
    missing = [theirs for ours, theirs in sizes.items() if theirs not in config and ours not in _OPTIONAL]
    if missing:
        raise UserError(f"{str(file)!r} lacks {missing[0]!r}.")
    options = {ours: config[theirs] for ours, theirs in sizes.items() if theirs in config}
    act = config.get("hidden_act" if model_type == "bert" else "activation_function", "gelu")
    if act not in _ACTIVATIONS:
        raise UserError(f"{str(file)!r} has the activation {act!r}: only {', '.join(_ACTIVATIONS)} are supported.")
    options["activation"] = _ACTIVATIONS[act]
    architecture = next(iter(config.get("architectures") or ()), "")
    if model_type == "gpt2":
        options |= {"ffn": config.get("n_inner") or 0, "tied": config.get("tie_word_embeddings", True)}
        return FolderConfig("gpt", "language-model", options)
    if architecture not in _BERT_HEADS:
        known = ", ".join(_BERT_HEADS)
        raise UserError(f"{str(file)!r} has the architecture {architecture!r}: only {known} can be loaded.")
    head = _BERT_HEADS[architecture]
    if head == "masked-language-model" and not config.get("tie_word_embeddings", True):
        raise UserError(f"{str(file)!r} has tie_word_embeddings = false: only tied embeddings are supported.")
    if head == "classification":
        options["classes"] = len(config.get("id2label") or ()) or config.get("num_labels", 2)
    return FolderConfig("bert", head, options)


_OPTIONAL = ("types", "norm_eps", "dropout", "attention_dropout")  # without them our defaults hold, which are theirs


def load_folder(path: str | Path) -> Folder:
    """Config and tensors, from model.safetensors or from several files with an index.

    Raises UserError for a folder that is not of a BERT or GPT-2, and for files that are missing or corrupt."""
    config = read_config(path)
    return Folder(config, Renamed(StoredTensors(Path(path)), links_of(config.kind, config.options["layers"])).state())


def save_folder(
    model: nn.Module, path: str | Path, tokenizer_json: str | None = None, shard_bytes: int = 5_000_000_000
) -> None:
    """Write a BERT or GPT as a folder that transformers reads: config.json, safetensors and, if given, tokenizer.json.

    ``tokenizer_json`` is the file's text. Weights above ``shard_bytes`` are split over several files with an index.
    Raises UserError for other models and when the folder cannot be written."""
    if isinstance(model, Bert):
        config, links = _bert_config(model.config, model.head), bert_links(model.config.layers)
        prefix = "" if model.head == "encoder" else "bert."
    elif type(model) is GPT:  # a mixture of experts is one too, and has no such form
        config, links = _gpt_config(model.config), gpt_links(model.config.layers)
        prefix = "transformer."
    else:
        raise UserError(f"a {type(model).__name__} has no Hugging Face form here: only bert and gpt can be saved so.")
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(to_theirs(model.state_dict(), links, prefix), folder, shard_bytes)
        _write_json(folder / "config.json", config)
        if tokenizer_json is not None:
            (folder / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
            _write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    except OSError as error:
        raise UserError(f"cannot write the folder {str(folder)!r}: {error.strerror or error}.") from None


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _bert_config(config: BertConfig, head: Head) -> dict[str, Any]:
    theirs: dict[str, Any] = {"architectures": [_BERT_CLASS[head]], "model_type": "bert", "dtype": "float32"}
    theirs |= {name: getattr(config, ours) for ours, name in _BERT_SIZES.items()}
    theirs |= {"intermediate_size": config.ffn or 4 * config.width, "hidden_act": _THEIR_ACTIVATION[config.activation]}
    if head == "classification":
        theirs["id2label"] = {str(i): f"LABEL_{i}" for i in range(config.classes)}
        theirs["label2id"] = {f"LABEL_{i}": i for i in range(config.classes)}
    return theirs


def _gpt_config(config: GPTConfig) -> dict[str, Any]:
    theirs: dict[str, Any] = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "dtype": "float32"}
    theirs |= {name: getattr(config, ours) for ours, name in _GPT_SIZES.items()}
    return theirs | {
        "n_inner": config.ffn or 4 * config.width,
        "activation_function": _THEIR_ACTIVATION[config.activation],
        "embd_pdrop": config.dropout,
        "tie_word_embeddings": config.tied,
        "bos_token_id": None,  # GPT-2's default numbers would lie outside a smaller vocabulary
        "eos_token_id": None,
    }
