"""The same request gets the same bits, whatever it was batched with; and they are the model's own answers."""

from functools import cache

import numpy as np
import pytest
import torch
from serve.generation.tiny_gpt import VOCAB, prompts, save_gpt, tiny_gpt

from shoal.errors import UserError
from shoal.models.generation import generate as one_by_one
from shoal.serve.generation.api import generate, run_all
from shoal.serve.generation.drafts import SmallModel
from shoal.serve.generation.messages import Ask
from shoal.serve.generation.native_step import NativeStep, available
from shoal.serve.generation.opening import open_generator, open_step
from shoal.serve.generation.options import Options
from shoal.serve.generation.step import BLOCK, Rows
from shoal.serve.generation.torch_step import TorchStep

VARIANTS = [
    pytest.param(variant, marks=pytest.mark.skipif(not available(variant), reason=f"no {variant} kernels here"))
    for variant in ("plain", "avx2", "avx512")
]
KINDS = [
    pytest.param("native", marks=pytest.mark.skipif(not available(), reason="no C++ parts here")),
    "torch",
]
MODELS = [{}, {"experts": 5}]


def rows_of(sequences, tables=None):
    """Rows of [(tokens, start)] with each sequence's blocks in a row of its own; every row's logits are wanted."""
    longest = max(start + len(tokens) for tokens, start in sequences)
    wide = -(-longest // BLOCK)
    if tables is None:
        tables = np.arange(len(sequences) * wide, dtype=np.int32).reshape(len(sequences), wide)
    tokens = [token for part, _ in sequences for token in part]
    places = [start + i for part, start in sequences for i in range(len(part))]
    owners = [number for number, (part, _) in enumerate(sequences) for _ in part]
    return Rows(*(np.array(each, np.int64) for each in (tokens, places, owners)), tables, np.arange(len(tokens)))


def whole(step, tokens):
    return step.run(rows_of([(tokens, 0)])).copy()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"activation": "gelu_tanh"},
        {"activation": "relu", "bias": False, "tied": False},
        {"width": 36, "ffn": 50},
        {"experts": 5},
        {"experts": 50, "top_k": 1, "width": 36, "ffn": 50},
        {"experts": 3, "top_k": 3, "bias": False},
    ],
    ids=["gelu", "gelu_tanh", "relu, no bias, untied", "odd sizes", "5 experts", "the best of 50", "all experts"],
)
def test_the_logits_are_those_of_the_models_own_forward_pass(kind, options):
    model = tiny_gpt(**options)
    (tokens,) = prompts(50)
    found = whole(open_step(model, Options(kernels=kind)), tokens)
    torch.testing.assert_close(torch.from_numpy(found), model(torch.tensor([tokens]))[0], rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("options", MODELS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_rows_bits_do_not_depend_on_its_company_nor_on_how_its_past_was_cut_nor_on_where_it_lies(kind, options):
    step = open_step(tiny_gpt(**options), Options(kernels=kind, cache_bytes=1 << 22))
    mine, *others = prompts(45, 31, 60, 2, 17)
    alone = whole(step, mine)
    together = step.run(rows_of([(others[0], 0), (mine, 0), (others[1], 0)])).copy()
    np.testing.assert_array_equal(alone, together[31 : 31 + 45])
    tables = np.array([[9, 4, 7, 0], [1, 2, 3, 5]], np.int32)
    at = 0
    for size in (1, 1, 16, 7, 13, 7):  # among rows of another sequence
        part = step.run(rows_of([(mine[at : at + size], at), (others[1][at : at + 3], at)], tables)).copy()
        np.testing.assert_array_equal(alone[at : at + size], part[:size])
        at += size
    assert at == len(mine)


@pytest.mark.skipif(not available(), reason="no C++ parts here")
def test_the_check_of_bits_would_notice_a_plain_batched_matmul():
    """The control: with shapes that follow the batch, PyTorch's own kernels give other bits somewhere."""
    torch.manual_seed(0)
    x, weight = torch.randn(64, 384), torch.randn(1536, 384)
    full = torch.nn.functional.linear(x, weight)
    same = [torch.equal(torch.nn.functional.linear(x[:rows], weight), full[:rows]) for rows in range(1, 32)]
    if all(same):
        pytest.skip("this machine's matmul does not depend on the number of rows")
    padded = [torch.nn.functional.linear(torch.cat([x[:rows], torch.zeros(16 - rows, 384)]), weight) for rows in (1, 5)]
    assert torch.equal(padded[0][:1], padded[1][:1]), "tiles of one size do not"


@pytest.mark.parametrize("options", MODELS, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_instruction_set_and_number_of_threads_gives_the_same_bits(variant, options):
    model = tiny_gpt(layers=3, width=40, heads=5, **options)
    (tokens,) = prompts(37)
    expected = whole(NativeStep(model, 16, kernels="plain"), tokens)
    for threads in (1, 3):
        step = NativeStep(model, 16, kernels=variant, threads=threads)
        for _ in range(3):
            np.testing.assert_array_equal(expected, whole(step, tokens))
        step.close()


@pytest.mark.skipif(not available(), reason="no C++ parts here")
def test_each_number_is_one_chain_of_fused_multiply_adds_in_order():
    """The first layer's queries by hand, in float64 rounded to float32 after every step: what fma rounds once."""
    model = tiny_gpt(layers=1, heads=1, width=16, ffn=1, bias=False, tied=False)
    layer = model.blocks[0]
    for name in ("attention.out", "down"):  # nothing is added to the stream: logits are made of the input alone
        layer.get_submodule(name).weight.data.zero_()
    (tokens,) = prompts(3)
    x = model.tokens.weight[tokens] + model.positions.weight[:3]
    normed = torch.from_numpy(_normalised(x.numpy(), model.norm.weight.numpy(), 1e-5))
    total = torch.zeros(3, VOCAB)
    for i in range(16):
        total = (normed[:, i : i + 1].double() * model.head.weight[:, i].double() + total.double()).float()
    assert np.array_equal(whole(NativeStep(model, 4), tokens), total.numpy())


def _normalised(x, weight, eps):
    one = np.float32
    halved = x.copy()
    for width in (8, 4, 2, 1):
        halved = halved[:, :width] + halved[:, width:]
    off = x - halved / one(16)
    squares = off * off
    for width in (8, 4, 2, 1):
        squares = squares[:, :width] + squares[:, width:]
    return off * (one(1) / np.sqrt(squares / one(16) + one(eps))) * weight


@pytest.mark.parametrize("options", MODELS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_answers_are_those_of_the_model_run_alone_token_by_token(kind, options):
    model = tiny_gpt(**options)
    asked = prompts(1, 5, 16, 33, 47)
    found = generate(model, [Ask(tokens, 20, temperature=0) for tokens in asked], Options(kernels=kind))
    for tokens, answer in zip(asked, found, strict=True):
        expected = one_by_one(model, torch.tensor([tokens]), 20, temperature=0)[0, len(tokens) :].tolist()
        assert answer.answers[0].tokens == expected


MIXED = [
    Ask(tokens, 16, temperature=(0.0, 0.7, 1.3)[i % 3], choices=1 + i % 3, seed=i, top_p=0.9, logprobs=2)
    for i, tokens in enumerate(prompts(3, 40, 17, 64, 30, 9))
]


@cache
def mixed_alone(kind, **options):
    model = tiny_gpt(**options)
    return [generate(model, [ask], Options(kernels=kind))[0].answers for ask in MIXED]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [
        {"cache_bytes": 12 * 8192, "running": 6},
        {"prompt_rows": 5, "stretch": 1.0},
        {"running": 3},
        {"speculate": 3},
        {"experts": 5, "cache_bytes": 12 * 8192, "running": 6, "prompt_rows": 5},
    ],
    ids=["memory runs out", "prompts in small pieces", "few at a time", "guessed ahead", "a mixture, little memory"],
)
def test_all_that_is_told_is_the_same_to_the_bit_alone_or_together_however_it_is_scheduled(kind, options):
    sizes = {name: value for name, value in options.items() if name == "experts"}
    options = {name: value for name, value in options.items() if name != "experts"}
    alone = mixed_alone(kind, **sizes)
    generator = open_generator(tiny_gpt(**sizes), Options(kernels=kind, **options))
    assert [each.answers for each in run_all(generator, MIXED)] == alone
    assert generator.scheduler.pool.held == 0
    if "cache_bytes" in options:
        assert generator.scheduler.preempted > 0, "the case does not show what it is for"
    if "speculate" in options:
        assert generator.counts.drafted > 0
    assert [each.answers for each in run_all(generator, MIXED)] == alone, "a second time, with a warm cache"
    assert generator.counts.reused_tokens > 0 or "cache_bytes" in options


@pytest.mark.parametrize("kind", KINDS)
def test_a_small_model_that_guesses_changes_no_bit_and_a_good_one_saves_steps(kind):
    model, alone = tiny_gpt(), mixed_alone(kind)
    steps = {}
    for name, draft in {"itself": model, "another": tiny_gpt(layers=1, heads=1, width=8, context=64)}.items():
        generator = open_generator(model, Options(kernels=kind, speculate=3), draft)
        assert [each.answers for each in run_all(generator, MIXED)] == alone
        counts = generator.counts
        assert 0 < counts.accepted <= counts.drafted or name == "another"
        assert generator._drafts._pool.check(list(generator._drafts._blocks.values())) is None
        steps[name] = counts.steps
    greedy = [Ask(ask.tokens, 16, temperature=0) for ask in MIXED]
    plain, guessed = open_generator(model, Options(kernels=kind)), open_generator(model, Options(kernels=kind), model)
    assert run_all(plain, greedy) == run_all(guessed, greedy)
    assert guessed.counts.steps < plain.counts.steps / 2, "its own guesses are all right"


def test_a_draft_that_has_too_little_memory_or_another_vocabulary():
    model = tiny_gpt()
    expected = [each.answers for each in generate(model, MIXED)]
    generator = open_generator(model, Options(), model)
    small = open_step(model, Options(cache_bytes=5 * 8192))
    generator._drafts = SmallModel(small)
    assert [each.answers for each in run_all(generator, MIXED)] == expected
    with pytest.raises(UserError, match="vocabulary"):
        open_generator(model, Options(), tiny_gpt(vocab=64))


@pytest.mark.parametrize("options", MODELS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_weights_are_rounded_and_everything_else_is_float32(kind, options):
    model = tiny_gpt(**options)
    rounded = tiny_gpt(**options)
    with torch.no_grad():
        for name, parameter in rounded.named_parameters():
            if parameter.dim() >= 2 and not any(
                whole in name for whole in ("positions", "router", "experts.up.bias", "experts.down.bias")
            ):
                parameter.copy_(parameter.bfloat16())
    (tokens,) = prompts(30)
    halves = whole(open_step(model, Options(kernels=kind, precision="bfloat16")), tokens)
    np.testing.assert_array_equal(halves, whole(open_step(rounded, Options(kernels=kind)), tokens))
    if not options:  # a router that sees other bits may send a token to another expert
        everything = whole(open_step(model.bfloat16(), Options(kernels=kind)), tokens)
        np.testing.assert_allclose(everything, halves, atol=0.5, rtol=0.1)


def test_old_infinities_in_the_cache_do_not_reach_a_new_sequence():
    (tokens,) = prompts(20)
    for step in (TorchStep(tiny_gpt(), 4), NativeStep(tiny_gpt(), 4) if available() else TorchStep(tiny_gpt(), 4)):
        expected = whole(step, tokens)
        step._keys.fill_(float("nan"))
        step._values.fill_(float("inf"))
        np.testing.assert_array_equal(whole(step, tokens), expected)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    folder = save_gpt(tmp_path_factory.mktemp("gpt2") / "folder")
    return folder, transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def ours(folder):
    from shoal.models.gpt import GPT, GPTConfig
    from shoal.models.huggingface import load_folder

    loaded = load_folder(folder)
    model = GPT(GPTConfig(**loaded.config.options)).eval()
    model.load_state_dict(loaded.state)
    return model


def test_greedy_answers_are_those_of_transformers(theirs):
    folder, model = theirs
    asked = prompts(4, 16, 40)
    found = generate(ours(folder), [Ask(tokens, 24, temperature=0) for tokens in asked])
    for tokens, answer in zip(asked, found, strict=True):
        made = model.generate(
            torch.tensor([tokens]),
            max_new_tokens=24,
            do_sample=False,
            pad_token_id=0,
            attention_mask=torch.ones(1, len(tokens)),
        )
        assert answer.answers[0].tokens == made[0, len(tokens) :].tolist()


@pytest.mark.parametrize(
    ("ends", "extra"),
    [
        ((), {}),
        ((7, 19, 33, 64, 120, 200), {}),
        ((7, 19, 33, 64, 120, 200), {"early": True}),
        (tuple(range(0, 320, 5)), {"length_penalty": 0.3}),
    ],
)
def test_beam_search_finds_what_transformers_finds(theirs, ends, extra):
    folder, model = theirs
    asked = prompts(4, 16, 40, 21)
    asks = [Ask(tokens, 16, beams=4, choices=3, ends=list(ends), **extra) for tokens in asked]
    found = generate(ours(folder), asks, Options(cache_bytes=60 * 8192))
    for tokens, answer in zip(asked, found, strict=True):
        made = model.generate(
            torch.tensor([tokens]),
            attention_mask=torch.ones(1, len(tokens)),
            max_new_tokens=16,
            do_sample=False,
            num_beams=4,
            num_return_sequences=3,
            eos_token_id=list(ends) or None,
            pad_token_id=321,
            early_stopping=extra.get("early", False),
            length_penalty=extra.get("length_penalty", 1.0),
            return_dict_in_generate=True,
            output_scores=True,
        )
        expected = [[t for t in row if t != 321] for row in made.sequences[:, len(tokens) :].tolist()]
        assert [each.tokens for each in answer.answers] == expected
        np.testing.assert_allclose(answer.outcome.scores, made.sequences_scores.numpy(), rtol=1e-4, atol=1e-4)
