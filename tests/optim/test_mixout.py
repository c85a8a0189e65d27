"""Mixout against its formula with an explicit mask, differentiated by autograd."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mtbert.errors import ConfigError
from mtbert.kernels.philox import Dropout, dropout_mask
from mtbert.model import HeadConfig, HeadSpec, MultiTaskModel, build_heads, load_encoder
from mtbert.model.dropout import EMBEDDING, FORWARD_PASS, Place, head_site, layer_site, mixout_site
from mtbert.optim.mixout import Mixout, MixoutConfig, build_mixout

SHAPES = {"layers.0.query_key_value.weight": (24, 8), "layers.1.output.weight": (8, 17)}
F64 = torch.float64
SEED, STEP = 2**40 + 7, 12


class Net(nn.Module):
    """y = tanh(x A^T) B^T with the two matrices under the names of an encoder's."""

    def __init__(self, dtype: torch.dtype = F64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weights = {
            name: nn.Parameter(torch.randn(shape, generator=generator, dtype=F64).to(dtype))
            for name, shape in SHAPES.items()
        }
        self.bias = nn.Parameter(torch.zeros(24, dtype=dtype))

    def encoder(self) -> list[tuple[str, nn.Parameter]]:
        bias = ("layers.0.query_key_value.bias", self.bias)
        word = ("embeddings.word", nn.Parameter(torch.zeros(3, 8)))
        return [word, *self.weights.items(), bias]

    def move(self) -> None:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for weight in self.weights.values():
                weight += torch.randn(weight.shape, generator=generator, dtype=F64).to(weight.dtype)


def loss_of(first: Tensor, second: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    hidden = torch.tanh(x @ first.T + bias)
    return (hidden[:, :17] @ second.T).square().sum()


def explicit(net: Net, pretrained: list[Tensor], p: float, x: Tensor, step: int = STEP) -> list[Tensor]:
    """dL/dw by autograd through w' = ((1 - m) w + m u - p u) / (1 - p); p as the mask has it, in 65536ths."""
    exact = round(65536 * p) / 65536
    weights = [w.detach().clone().requires_grad_() for w in net.weights.values()]
    mixed = []
    for number, (w, u) in enumerate(zip(weights, pretrained, strict=True)):
        mask = Dropout(p, SEED, step, mixout_site(number))
        rows = torch.arange(w.shape[0], dtype=torch.int32)
        m = (~dropout_mask(rows, torch.arange(w.shape[1]), mask)).double()
        mixed.append(((1 - m) * w + m * u - exact * u) / (1 - exact))
    return list(torch.autograd.grad(loss_of(*mixed, net.bias.detach(), x), weights)) + mixed


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_weights_and_gradients_follow_the_formula(p: float) -> None:
    net, x = Net(), torch.randn(5, 8, dtype=F64)
    pretrained = [w.detach().clone() for w in net.weights.values()]
    mixout = Mixout(net.encoder(), p, SEED)
    net.move()
    *expected, first, second = explicit(net, pretrained, p, x)
    with mixout.mixed(STEP):
        for weight, mixed in zip(net.weights.values(), (first, second), strict=True):
            torch.testing.assert_close(weight.detach(), mixed.detach(), rtol=1e-12, atol=1e-12)
        loss_of(*net.weights.values(), net.bias, x).backward()
    assert net.bias.grad is not None
    for weight, gradient in zip(net.weights.values(), expected, strict=True):
        assert weight.grad is not None
        torch.testing.assert_close(mixout.scale(weight, weight.grad), gradient, rtol=1e-12, atol=1e-12)
        both = torch.stack([weight.grad, -2 * weight.grad, torch.zeros_like(weight)])
        torch.testing.assert_close(
            mixout.scale(weight, both),
            torch.stack([gradient, -2 * gradient, torch.zeros_like(weight)]),
            rtol=1e-12,
            atol=1e-12,
        )
    assert mixout.scale(net.bias, net.bias.grad) is net.bias.grad


def test_in_float32_too() -> None:
    """The C++ mask, where it is built, is the same."""
    net, wide = Net(torch.float32), Net()
    pretrained = [w.detach().clone() for w in wide.weights.values()]
    mixout = Mixout(net.encoder(), 0.5, SEED)
    net.move()
    wide.move()
    *_, first, second = explicit(wide, pretrained, 0.5, torch.randn(5, 8, dtype=F64))
    with mixout.mixed(STEP):
        for weight, mixed in zip(net.weights.values(), (first, second), strict=True):
            torch.testing.assert_close(weight.detach(), mixed.detach().float(), rtol=1e-5, atol=1e-5)


def test_weights_come_back_bit_for_bit_whatever_happens() -> None:
    net = Net(torch.float32)
    mixout = Mixout(net.encoder(), 0.5, SEED)
    net.move()
    before = {name: w.detach().clone() for name, w in net.weights.items()}
    addresses = [w.data_ptr() for w in net.weights.values()]

    def fail() -> None:
        with mixout.mixed(STEP):
            assert not any(torch.equal(w.detach(), before[name]) for name, w in net.weights.items())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert all(torch.equal(w.detach(), before[name]) for name, w in net.weights.items())
    assert [w.data_ptr() for w in net.weights.values()] == addresses


def test_a_failure_while_mixing_puts_back_what_was_mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net()
    mixout = Mixout(net.encoder(), 0.5, SEED)
    net.move()
    before = {name: w.detach().clone() for name, w in net.weights.items()}
    masked = mixout._masked

    def failing(number: int, x: Tensor) -> Tensor:
        if number == 1:
            raise MemoryError
        return masked(number, x)

    monkeypatch.setattr(mixout, "_masked", failing)
    with pytest.raises(MemoryError), mixout.mixed(STEP):
        pass
    assert all(torch.equal(w.detach(), before[name]) for name, w in net.weights.items())


@pytest.mark.parametrize("p", [0.0, 1e-6])
def test_with_p_0_weights_and_gradients_are_what_they_are(p: float) -> None:
    net = Net()
    mixout = Mixout(net.encoder(), p, SEED)
    net.move()
    before = {name: w.detach().clone() for name, w in net.weights.items()}
    with mixout.mixed(STEP):
        assert all(torch.equal(w.detach(), before[name]) for name, w in net.weights.items())
    weight = next(iter(net.weights.values()))
    gradient = torch.randn_like(weight)
    assert mixout.scale(weight, gradient) is gradient


def test_untrained_weights_stay_pretrained() -> None:
    net = Net()
    before = {name: w.detach().clone() for name, w in net.weights.items()}
    with Mixout(net.encoder(), 0.5, SEED).mixed(STEP):
        assert all(torch.equal(w.detach(), before[name]) for name, w in net.weights.items())


def test_the_mean_over_steps_is_the_weight_and_masks_are_a_function_of_the_step() -> None:
    net = Net(torch.float32)
    pretrained = [w.detach().clone() for w in net.weights.values()]
    mixout = Mixout(net.encoder(), 0.3, SEED)
    net.move()
    steps = 1500
    sums = [torch.zeros_like(w, dtype=F64) for w in net.weights.values()]
    for step in range(steps):
        with mixout.mixed(step):
            for total, weight in zip(sums, net.weights.values(), strict=True):
                total += weight.detach()
    for total, weight, u in zip(sums, net.weights.values(), pretrained, strict=True):
        deviation = (weight.detach() - u).abs() * (0.3 / 0.7) ** 0.5 / steps**0.5
        assert ((total / steps - weight.detach()).abs() < 5 * deviation + 1e-6).all()
    seen = []
    for step in (4, 5, 4):
        with mixout.mixed(step):
            seen.append([w.detach().clone() for w in net.weights.values()])
    assert all(torch.equal(a, b) for a, b in zip(seen[0], seen[2], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(seen[0], seen[1], strict=True))


def test_matrices_have_sites_of_their_own() -> None:
    sites = {mixout_site(matrix) for matrix in range(1000)}
    others = {EMBEDDING} | {layer_site(layer, place) for layer in range(48) for place in Place}
    others |= {head_site(head, depth) for head in range(4096) for depth in (0, 1, 63)}
    assert len(sites) == 1000
    assert not sites & others
    assert max(sites) < FORWARD_PASS
    for matrix in (-1, 2**18):
        with pytest.raises(ValueError, match="no dropout site"):
            mixout_site(matrix)


@pytest.mark.parametrize("mode", ["bitfit", "last-linear-layer"])
def test_a_mode_without_pretrained_matrices_is_refused(tiny_bert: Path, mode: str) -> None:
    encoder = load_encoder(tiny_bert)
    spec = HeadSpec("sst", 5, pair=False)
    model = MultiTaskModel(encoder, build_heads([spec], {"sst": HeadConfig()}, encoder.config.hidden_size))
    assert build_mixout(MixoutConfig(), model, 0) is None
    assert build_mixout(MixoutConfig(0.5), model, 0) is not None
    model.set_mode(mode)
    with pytest.raises(
        ConfigError, match=rf"^mixout\.p: found 0\.5, but mode {mode} .* possible: 0, or mode full"
    ):
        build_mixout(MixoutConfig(0.5), model, 0)


@pytest.mark.parametrize("p", [-0.1, 1.0, float("nan")])
def test_impossible_probabilities_name_their_field(p: float) -> None:
    with pytest.raises(ConfigError, match=r"^mixout\.p: .* found"):
        MixoutConfig(p)
