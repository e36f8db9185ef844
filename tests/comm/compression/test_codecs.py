"""The fused kernels and their twins give the same bits; a payload says what it is."""

import os
import re
import shutil
import subprocess

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.comm.compression.cast import Bfloat16, Float16
from shoal.comm.compression.codec import HEAD, MAGIC, BadPayload, Codec
from shoal.comm.compression.codecs import CODECS
from shoal.comm.compression.int8 import Int8Blocks
from shoal.comm.compression.onebit import SignBits
from shoal.comm.compression.topk import TopShare, sample_of
from shoal.comm.native import build
from shoal.errors import UserError

ALL = [*(codec() for codec in CODECS.values()), TopShare(0.2), TopShare(1.0)]
IDS = [f"{codec.name}{getattr(codec, 'share', '')}" for codec in ALL]
SPECIAL = [0.0, -0.0, 1e-45, -3e-42, 1.2e-38, 6e-8, -6.1e-5, 65504.0, 65520.0, -7e4, 3.39e38, -3.4028e38, 1.0, -0.5]
NOT_FINITE = [float("inf"), -float("inf"), float("nan")]
SIZES = st.sampled_from([1, 2, 63, 64, 65, 2047, 2048, 2049, 4097, 9001, 70_000])

needs_kernels = pytest.mark.skipif(
    build.kernels() is None, reason=f"no kernels to compare: {build.why_not(['kernels'])}"
)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """As whole numbers, with one bit pattern for every NaN: which of two NaNs a sum keeps, IEEE 754 leaves open."""
    if tensor.dtype != torch.float32:
        return tensor
    return torch.where(tensor.isnan(), torch.full_like(tensor, torch.nan), tensor).view(torch.int32)


def numbers(size: int, seed: int, specials: list[float], scale: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(size, generator=generator) * scale
    for special in specials:
        values[torch.randint(size, (), generator=generator)] = special
    return values


def compressed(codec: Codec, gradient: torch.Tensor, error: torch.Tensor | None) -> torch.Tensor:
    payload = torch.full((codec.payload_bytes(gradient.numel()),), 255, dtype=torch.uint8)  # all of it must be written
    codec.compress(gradient, error, payload)
    return payload


def on_both(monkeypatch: pytest.MonkeyPatch, run):
    """What ``run`` gives with the kernels, and what it gives without them."""
    fused = run()
    with monkeypatch.context() as patch:
        patch.setenv("SHOAL_NATIVE", "0")
        plain = run()
    return fused, plain


@needs_kernels
@pytest.mark.parametrize("codec", ALL, ids=IDS)
@pytest.mark.parametrize("feedback", [True, False])
def test_a_kernel_and_its_twin_give_the_same_bits(codec: Codec, feedback: bool) -> None:
    @settings(max_examples=20)
    @given(
        size=SIZES,
        seed=st.integers(0, 2**31),
        specials=st.lists(st.sampled_from(SPECIAL), max_size=6),
        strange=st.lists(st.sampled_from(NOT_FINITE), max_size=2),
        scale=st.sampled_from([1.0, 1e-3, 1e-41, 1e-38, 1e30, 3e37]),
    )
    def same(size: int, seed: int, specials: list[float], strange: list[float], scale: float) -> None:
        gradient = numbers(size, seed, specials + strange, scale)
        old_error = numbers(size, seed + 1, specials, scale / 4) if feedback else None
        into = numbers(size, seed + 2, specials, scale)

        def run():
            error = old_error.clone() if old_error is not None else None
            payload = compressed(codec, gradient, error)
            added, restored = into.clone(), torch.full_like(into, 7.0)
            codec.add(payload, added)
            codec.restore(payload, restored)
            return payload, added, restored, error if error is not None else torch.zeros(0)

        fused, plain = on_both(monkeypatch, run)
        for name, a, b in zip(("payload", "added", "restored", "error"), fused, plain, strict=True):
            assert torch.equal(bits(a), bits(b)), name

    with pytest.MonkeyPatch.context() as monkeypatch:
        same()


@pytest.mark.parametrize("native", ["0", "1"])
@pytest.mark.parametrize("codec", ALL, ids=IDS)
def test_what_is_sent_and_what_is_kept_are_what_was_to_be_sent(codec: Codec, native: str, monkeypatch) -> None:
    """Whole numbers so small that their sum is exact: what is sent and what is kept add up to it."""
    monkeypatch.setenv("SHOAL_NATIVE", native)
    generator = torch.Generator().manual_seed(5)
    gradient = torch.randint(-64, 65, (5000,), generator=generator).float()
    error = torch.randint(-8, 9, (5000,), generator=generator).float()
    wanted = gradient + error
    payload = compressed(codec, gradient, error)
    sent = torch.zeros(5000)
    codec.restore(payload, sent)
    torch.testing.assert_close(sent + error, wanted, rtol=0, atol=2e-5)  # one rounding of each, of numbers up to 128
    assert float(error.norm()) < 0.99 * float(wanted.norm())  # a share of 1% of even numbers takes away 2%


@pytest.mark.parametrize("native", ["0", "1"])
@pytest.mark.parametrize("codec", ALL, ids=IDS)
def test_nothing_and_one_number_are_sent_too(codec: Codec, native: str, monkeypatch) -> None:
    monkeypatch.setenv("SHOAL_NATIVE", native)
    nothing = torch.zeros(0)
    codec.restore(compressed(codec, nothing, torch.zeros(0)), nothing)
    one, error = torch.tensor([-1.5]), torch.zeros(1)
    sent = torch.zeros(1)
    codec.restore(compressed(codec, one, error), sent)
    assert float(sent) == pytest.approx(-1.5, rel=1e-6)  # int8: 1.5 / 127 * 127
    assert float(sent + error) == pytest.approx(-1.5, rel=1e-7)


@pytest.mark.parametrize("native", ["0", "1"])
@pytest.mark.parametrize("codec", ALL, ids=IDS)
@pytest.mark.parametrize("strange", NOT_FINITE)
def test_what_is_not_finite_arrives_so_and_is_not_kept(codec: Codec, strange: float, native: str, monkeypatch) -> None:
    """Also where 4000 larger numbers have filled the room of top-k before it."""
    monkeypatch.setenv("SHOAL_NATIVE", native)
    gradient = torch.full((4500,), 100.0)
    gradient[4200] = strange
    error = torch.zeros(4500)
    sent = torch.zeros(4500)
    codec.restore(compressed(codec, gradient, error), sent)
    assert not bool(sent.isfinite().all())
    assert bool(error.isfinite().all())
    codec.restore(compressed(codec, torch.zeros(4500), error), sent)
    assert bool(sent.isfinite().all())


@pytest.mark.parametrize("native", ["0", "1"])
def test_top_k_keeps_about_its_share_and_the_largest(native: str, monkeypatch) -> None:
    monkeypatch.setenv("SHOAL_NATIVE", native)
    codec, gradient = TopShare(0.01), torch.randn(300_000, generator=torch.Generator().manual_seed(3))
    error, sent = torch.zeros_like(gradient), torch.zeros_like(gradient)
    codec.restore(compressed(codec, gradient, error), sent)
    kept = int(sent.count_nonzero())
    assert 0.75 * 3000 <= kept <= 3000
    assert float(sent[sent != 0].abs().min()) > float(gradient.abs().quantile(0.98))
    assert torch.equal(sent + error, gradient)
    few = torch.randn(1000)
    chosen = torch.zeros(1000)
    codec.restore(compressed(codec, few, None), chosen)
    assert set(chosen.nonzero().view(-1).tolist()) == set(
        few.abs().topk(10).indices.tolist()
    )  # exact where it is small


def test_the_sample_of_top_k_lies_within_the_elements() -> None:
    @given(elements=st.integers(1, 2**32 - 1), share=st.floats(1e-6, 1.0))
    def lies_within(elements: int, share: float) -> None:
        room = TopShare(share).room(elements)
        sample = sample_of(elements, room)
        assert 1 <= sample.above <= sample.size <= min(elements, 16384)
        assert sample.size * sample.stride <= elements

    lies_within()


def test_the_sizes_of_payloads_are_those_of_the_formats() -> None:
    n = 1_000_000
    body = {
        Float16(): 2 * n,
        Bfloat16(): 2 * n,
        Int8Blocks(): n + 4 * 489,
        SignBits(): 489 * 260,
        TopShare(): 8 + 80_000,
    }
    for codec, size in body.items():
        assert codec.payload_bytes(n) == -(-(16 + size) // 16) * 16
    assert [round(codec.ratio(n)) for codec in body] == [2, 2, 4, 31, 50]


@pytest.mark.parametrize("native", ["0", "1"])
@pytest.mark.parametrize("codec", ALL, ids=IDS)
def test_a_payload_that_is_another_is_refused(codec: Codec, native: str, monkeypatch) -> None:
    monkeypatch.setenv("SHOAL_NATIVE", native)
    payload, into = compressed(codec, torch.randn(100), None), torch.zeros(100)
    for head in (HEAD.pack(MAGIC, codec.kind, 99), HEAD.pack(MAGIC, 77, 100), HEAD.pack(b"SHc0", codec.kind, 100)):
        other = payload.clone()
        other[:16] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
        with pytest.raises(BadPayload, match="expected"):
            codec.add(other, into)
    with pytest.raises(BadPayload, match="takes"):
        codec.add(payload[:-1], into)
    assert not bool(into.any())
    with pytest.raises(UserError, match="float32"):
        codec.compress(torch.randn(100).double(), None, payload)
    with pytest.raises(UserError, match="contiguous"):
        codec.compress(torch.randn(200)[::2], None, payload)
    gradient = torch.randn(100)
    with pytest.raises(UserError, match="of its own"):
        codec.compress(gradient, gradient, payload)


@pytest.mark.parametrize("native", ["0", "1"])
@pytest.mark.parametrize(
    ("place", "value"), [(16, 255), (24, 255), (28, 0)], ids=["more entries than room", "out of range", "not ascending"]
)
def test_top_k_writes_nothing_where_its_entries_cannot_be(place: int, value: int, native: str, monkeypatch) -> None:
    monkeypatch.setenv("SHOAL_NATIVE", native)
    codec, into = TopShare(0.05), torch.zeros(100)
    payload = compressed(codec, torch.randn(100), None)
    payload[place : place + 4] = value
    for method in (codec.add, codec.restore):
        with pytest.raises(BadPayload, match="entries"):
            method(payload, into)
    assert not bool(into.any())


@pytest.mark.parametrize("share", [0.0, -1.0, 1.5, float("nan")])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(UserError, match="share"):
        TopShare(share)


@needs_kernels
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="looks for the registers of x86")
@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump is not installed")
def test_every_loop_is_made_of_vector_instructions() -> None:
    """In the version for x86-64-v4, those on 512-bit registers; the sampling of top-k is scalar by nature."""
    file = build.compiled(build.kernels_library())
    text = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", file], capture_output=True, text=True, check=True
    ).stdout
    vectors: list[tuple[str, int]] = []  # names repeat: each file has its own
    for part in re.split(r"\n(?=[0-9a-f]+ <)", text):
        named = re.search(r"<(\S*?)(?:\.constprop\.\d+)?\.arch_x86_64_v4>:", part.split("\n")[0])
        if named:
            vectors.append((named[1], part.count("%zmm")))
    for kernel in ("bf16", "fp16"):
        for action in ("fed", "bare", "add", "restore"):
            assert [n >= 8 for name, n in vectors if f"{kernel}_{action}" in name] == [True], (kernel, action)
    blocks = [n for name, n in vectors if re.search(r"GLOBAL__N_1[L]?(3fed|4bare|3add|7restore)", name)]
    assert len(blocks) >= 10  # int8 and 1-bit four each, top-k two
    assert min(blocks) >= 8, vectors
