"""What only makes a CPU fast: masks of bytes, linear maps in one call, and who multiplies."""

import math
import time
from pathlib import Path

import pytest
import torch

from contrastive_st import cpu
from contrastive_st.cpu import (
    ByteDropout,
    choose_matmul,
    fast_copy,
    has_fused_bf16,
    mkl_is_slow,
    onednn_error,
)

LOW = pytest.mark.skipif(not has_fused_bf16(), reason="this processor has no bfloat16 products")


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


def apart(a, b):
    return ((a - b).norm() / b.norm()).item()


# ---- dropout ----


@pytest.mark.parametrize("p", [0.01, 0.1, 0.37, 0.9, 0.999])
def test_dropout_rate_mean_and_variance(p):
    torch.manual_seed(0)
    n, c = 2**20, min(round(256 * p), 255)
    y = ByteDropout(p)(torch.ones(n))
    assert set(y.unique().tolist()) == {0.0, torch.tensor(256 / (256 - c)).item()}
    assert abs((y == 0).double().mean() - c / 256) < 5 * (c / 256 * (1 - c / 256) / n) ** 0.5
    assert abs(c / 256 - p) <= 1 / 256


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dropout_keeps_the_numbers_and_the_gradient_its_mask(dtype):
    x = torch.randn(7, 33, dtype=dtype).requires_grad_()  # not a multiple of eight
    y = ByteDropout(0.5)(x.t())
    y.backward(torch.ones_like(y))
    stay = y != 0
    assert torch.equal(y[stay], 2 * x.t()[stay]) and torch.equal(x.grad.t(), 2 * stay.to(dtype))
    assert 0 < stay.sum() < stay.numel()


def test_dropout_at_its_ends():
    x = torch.randn(50)
    assert ByteDropout(0.0)(x) is x or torch.equal(ByteDropout(0.0)(x), x)
    assert not ByteDropout(1.0)(x).any()
    assert torch.equal(ByteDropout(0.001)(x), x)  # rounds to 0 of 256
    assert torch.equal(ByteDropout(0.5).eval()(x), x)
    assert ByteDropout(0.5)(x[:0]).shape == (0,)


# ---- linear maps in bfloat16, in one call ----


@LOW
@pytest.mark.parametrize("into, out, bias", [(24, 40, True), (40, 24, True), (32, 32, False)])
def test_a_linear_map_in_one_call(into, out, bias):
    "Values and gradients as near to float32 as autocast's; no gradient for what asks for none."
    torch.manual_seed(0)
    linear = torch.nn.Linear(into, out, bias=bias)
    x = torch.randn(2, 30, into, requires_grad=True)
    pull = torch.randn(2, 30, out)
    with autocast():
        ours, theirs = fast_copy(linear)(x), linear(x)
    assert ours.dtype == torch.bfloat16 and "_Product" in str(ours.grad_fn)
    assert apart(ours, linear(x)) < 2**-7
    gradients, low, exact = (
        torch.autograd.grad((y.float() * pull).sum(), [x, *linear.parameters()])
        for y in (ours, theirs, linear(x))
    )
    for a, b, c in zip(gradients, low, exact, strict=True):
        assert a.dtype == torch.float32 and apart(a, c) < 1.1 * apart(b, c) + 1e-3
    leaves = [x, *linear.parameters()]
    for one, gradient in zip(leaves, gradients, strict=True):
        for leaf in leaves:
            leaf.requires_grad_(leaf is one)
        with autocast():
            y = fast_copy(linear)(x)
        assert torch.equal(torch.autograd.grad((y.float() * pull).sum(), one)[0], gradient)


# ---- who multiplies float32 ----


@pytest.mark.parametrize(
    "slow, error, matmul, library",
    [
        (True, 1e-6, "auto", "onednn"),
        (False, 1e-6, "auto", "default"),
        (True, 2e-3, "auto", "default"),
        (True, math.inf, "auto", "default"),
        (True, 1e-6, "default", "default"),
        (False, 1e-6, "onednn", "onednn"),
    ],
)
def test_onednn_multiplies_where_it_is_exact_and_mkl_is_slow(
    monkeypatch, slow, error, matmul, library
):
    monkeypatch.setattr(cpu, "mkl_is_slow", lambda: slow)
    monkeypatch.setattr(cpu, "onednn_error", lambda: error)
    assert choose_matmul(matmul, "cpu") == library
    assert choose_matmul(matmul, "cuda") == "default"
    with cpu.multiply_with(library):
        assert cpu.matmul_precision() == ("medium" if library == "onednn" else "highest")
    assert cpu.matmul_precision() == "highest"


def test_the_measurement_tells_an_exact_product_from_a_rounded_one():
    onednn_error.cache_clear()
    before, state = cpu.matmul_precision(), torch.get_rng_state()
    error = onednn_error()
    assert cpu.matmul_precision() == before
    assert torch.equal(torch.get_rng_state(), state)
    if not torch.backends.mkldnn.is_available():
        assert error == math.inf
        return
    x, w = torch.randn(64, 384), torch.randn(384, 96)
    with cpu.multiply_with("onednn"):
        lower = (x @ w - (x.double() @ w.double())).abs().max() > 1e-2
    assert (error > 1e-5) == bool(lower)


@pytest.mark.parametrize(
    "capability, cpuinfo, mkl, slow",
    [
        ("AVX512", "vendor_id\t: AuthenticAMD\n", True, True),
        ("AVX2", "vendor_id\t: AuthenticAMD\n", True, False),
        ("AVX512", "vendor_id\t: GenuineIntel\n", True, False),
        ("AVX512", "vendor_id\t: AuthenticAMD\n", False, False),
        ("DEFAULT", "", False, False),
    ],
)
def test_the_choice_depends_on_the_processor_and_on_no_clock(
    monkeypatch, capability, cpuinfo, mkl, slow
):
    def clock():
        raise AssertionError("the choice looked at a clock")

    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    monkeypatch.setattr(Path, "read_text", lambda path, *rest: cpuinfo)
    for name in ("perf_counter", "monotonic", "time", "process_time"):
        monkeypatch.setattr(time, name, clock)
    mkl_is_slow.cache_clear()
    onednn_error.cache_clear()
    try:
        assert mkl_is_slow() == slow
        exact = onednn_error() < 1e-5
        assert choose_matmul("auto", "cpu") == ("onednn" if slow and exact else "default")
    finally:
        mkl_is_slow.cache_clear()
