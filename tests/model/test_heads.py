"""Heads: what each form computes, from which masks, and which configurations are refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mtbert.errors import ConfigError
from mtbert.kernels.reference import dropout_mask
from mtbert.model import DropoutStream, Head, HeadConfig, HeadSpec
from mtbert.model.activations import ACTIVATIONS, activation
from mtbert.model.dropout import activation_site, head_site

WIDTH = 6
SINGLE = HeadSpec("sst", 5, pair=False)
BINARY = HeadSpec("para", 1, pair=True)
SCORE = HeadSpec("sts", 1, pair=True, score_range=(1.0, 5.0))


def rows(count: int = 8, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(0), dtype=dtype)


def head(spec: HeadSpec, **options) -> Head:
    """A float64 head with large random weights."""
    generator = torch.Generator().manual_seed(2)
    result = Head(spec, HeadConfig(**({"dropout": 0.0} | options)), WIDTH, generator=generator).double()
    with torch.no_grad():
        for parameter in result.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return result


# ---- what is computed ----


def by_hand(name: str, u: Tensor, v: Tensor) -> Tensor:
    return {
        "concat": torch.cat([u, v], 1),
        "difference": (u - v).abs(),
        "product": u * v,
        "dot": torch.einsum("nc,nc->n", u, v)[:, None],
        "cosine": (torch.einsum("nc,nc->n", u, v) / (u.norm(dim=1) * v.norm(dim=1)))[:, None],
    }[name]


@pytest.mark.parametrize(
    "features",
    [["concat"], ["difference"], ["product"], ["dot"], ["cosine"], ["cosine", "concat", "product"]],
)
def test_pair_features(features: list[str]):
    x = rows()
    tested = head(BINARY, pair=features)
    assert tested.rows_per_example == 2
    joined = torch.cat([by_hand(name, x[0::2], x[1::2]) for name in features], 1)
    expected = joined @ tested.output.weight.T + tested.output.bias
    assert torch.allclose(tested(x), expected, rtol=0, atol=1e-12)


def test_a_single_sentence_and_a_cross_encoder_read_one_row():
    x = rows()
    for spec in (SINGLE, BINARY):
        tested = head(spec, tower_layers=1, hidden_layers=1, hidden_size=4, activation="tanh")
        assert tested.rows_per_example == 1
        tower, hidden = tested.towers[0], tested.hidden[0]
        expected = torch.tanh(
            F.linear(torch.tanh(F.linear(x, tower.weight, tower.bias)), hidden.weight, hidden.bias)
        )
        assert tower.weight.shape == (4, WIDTH)
        assert hidden.weight.shape == (4, 4)
        assert torch.allclose(tested(x), F.linear(expected, tested.output.weight, tested.output.bias))
        assert tested(x).shape == (8, spec.outputs)


def test_towers_come_before_the_pair_feature_and_hidden_layers_after():
    tested = head(BINARY, pair=["concat"], tower_layers=2, hidden_layers=1, hidden_size=3, activation="none")
    shapes = [tuple(layer.weight.shape) for layer in (*tested.towers, *tested.hidden, tested.output)]
    assert shapes == [(3, WIDTH), (3, 3), (3, 6), (1, 3)]
    assert tested(rows()).shape == (4, 1)


def test_scores_are_in_label_units():
    x = rows()
    tested = head(SCORE, pair=["difference"])
    raw = F.linear((x[0::2] - x[1::2]).abs(), tested.output.weight, tested.output.bias)
    assert torch.allclose(tested(x), 1 + 4 * raw)


def test_cosine_alone_is_the_score():
    tested = head(SCORE, pair=["cosine"])
    assert list(tested.parameters()) == []
    u = rows(1)
    across = torch.zeros(1, WIDTH, dtype=torch.float64)
    across[0, 0], across[0, 1] = -u[0, 1], u[0, 0]
    found = tested(torch.cat([u, 3 * u, u, across]))
    assert found.flatten().tolist() == pytest.approx([5.0, 1.0])
    assert tested(rows(dtype=torch.float32)).dtype == torch.float32


@pytest.mark.parametrize(("feature", "unit"), [("cosine", 1.0), ("dot", 1 / WIDTH)])
def test_one_number_starts_at_a_useful_boundary(feature: str, unit: float):
    binary = Head(BINARY, HeadConfig(pair=[feature]), WIDTH)
    assert binary.output.weight.item() == pytest.approx(10 * unit)
    assert binary.output.bias.item() == -5
    if feature == "dot":
        score = Head(SCORE, HeadConfig(pair=[feature]), WIDTH)
        assert score.output.weight.item() == pytest.approx(unit)
        assert score.output.bias.item() == 0
    classes = Head(HeadSpec("nli", 3, pair=True), HeadConfig(pair=[feature]), WIDTH)
    assert classes.output.weight.shape == (3, 1)


def test_initial_weights_come_from_the_generator_as_berts():
    config = HeadConfig(tower_layers=1, hidden_layers=1)
    one, two = (Head(SINGLE, config, 200, generator=torch.Generator().manual_seed(4)) for _ in range(2))
    assert len(list(one.parameters())) == 6
    for parameter, other in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(parameter, other)
        if parameter.dim() == 1:
            assert parameter.eq(0).all()
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1)


def test_bfloat16_rows_are_computed_in_the_dtype_of_the_parameters():
    tested = Head(SINGLE, HeadConfig(), WIDTH)
    assert tested(rows().bfloat16()).dtype == torch.float32


# ---- dropout ----


def test_dropout_reads_the_row_of_the_first_text():
    tested = head(BINARY, pair=["concat"], tower_layers=1, activation="none", dropout=0.3)
    tested.index = 2
    stream = DropoutStream(seed=9, step=4)
    x = rows()
    row_ids = torch.tensor([0, 1, 2, 3, 10, 11, 12, 13])
    dropout_row = (row_ids * 4096).int()

    def mask(depth: int, which: Tensor, width: int) -> Tensor:
        dropout = stream.at(0.3, head_site(2, depth))
        return dropout_mask(which, torch.arange(width), dropout).double() * dropout.scale

    tower, output = tested.towers[0], tested.output
    y = F.linear(x * mask(0, dropout_row, WIDTH), tower.weight, tower.bias)
    joined = torch.cat([y[0::2], y[1::2]], 1) * mask(1, dropout_row[0::2], 2 * WIDTH)
    expected = F.linear(joined, output.weight, output.bias)
    assert torch.allclose(tested(x, dropout_row, stream), expected, rtol=0, atol=1e-12)
    assert not torch.allclose(tested(x), expected)
    with pytest.raises(ValueError, match="needs dropout_row"):
        tested(x, None, stream)


def test_a_single_number_is_not_dropped():
    tested = head(BINARY, pair=["cosine"], dropout=0.9)
    dropout_row = torch.arange(8, dtype=torch.int32) * 4096
    assert torch.equal(tested(rows(), dropout_row, DropoutStream(0, 0)), tested(rows()))


@pytest.mark.parametrize("name", ["rrelu", "RReLU"])
def test_random_leaky_relu(name: str):
    tested = head(SINGLE, hidden_layers=2, hidden_size=50, activation=name)
    stream, x = DropoutStream(seed=9, step=4), rows(400)
    dropout_row = (torch.arange(400) * 4096).int()
    # Without dropout the slope is the mean, as in torch.
    still = F.linear(x, tested.hidden[0].weight, tested.hidden[0].bias)
    inner = F.linear(F.rrelu(still), tested.hidden[1].weight, tested.hidden[1].bias)
    expected = F.linear(F.rrelu(inner), tested.output.weight, tested.output.bias)
    assert torch.allclose(tested(x), expected, rtol=0, atol=1e-12)
    # In training the slopes are uniform in [1/8, 1/3], and a function of row, column, site and stream.
    moved = tested._activate(still, dropout_row, stream, 0)
    assert torch.equal(moved[still >= 0], still[still >= 0])
    slopes = (moved / still)[still < 0]
    assert len(slopes) > 5000
    assert slopes.min().item() == pytest.approx(1 / 8, abs=1e-3)
    assert slopes.max().item() == pytest.approx(1 / 3, abs=1e-3)
    assert slopes.mean().item() == pytest.approx((1 / 8 + 1 / 3) / 2, abs=3e-3)
    assert slopes.std().item() == pytest.approx((1 / 3 - 1 / 8) / 12**0.5, rel=0.03)
    # They come from the numbers that a dropout mask at that site compares with its threshold.
    kept = dropout_mask(dropout_row, torch.arange(50), stream.at(0.25, activation_site(0, 0)))
    boundary = 1 / 8 + (1 / 3 - 1 / 8) / 4
    assert torch.equal((moved / still >= boundary)[still < 0], kept[still < 0])
    part = tested._activate(still[100:], dropout_row[100:], stream, 0)
    assert torch.equal(part, moved[100:])
    for other in (
        tested._activate(still, dropout_row, stream, 1),
        tested._activate(still, dropout_row, DropoutStream(seed=9, step=5), 0),
        tested._activate(still, dropout_row, DropoutStream(seed=9, step=4, forward_pass=1), 0),
    ):
        assert not torch.equal(other, moved)
    assert not torch.equal(tested(x, dropout_row, stream), tested(x))
    with pytest.raises(ValueError, match="needs dropout_row"):
        tested(x, None, stream)


def test_random_leaky_relu_has_the_slope_as_its_derivative():
    tested = head(SINGLE, hidden_layers=1, activation="rrelu")
    x = rows().requires_grad_()
    y = tested._activate(x, (torch.arange(8) * 4096).int(), DropoutStream(0, 0), 0)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.allclose(gradient, torch.where(x >= 0, 1.0, y / x), rtol=0, atol=1e-12)


def test_no_rate_no_mask():
    tested = head(SINGLE)
    assert torch.equal(tested(rows(), None, DropoutStream(0, 0)), tested(rows()))


# ---- names and refusals ----


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_is_torchs(name: str):
    x = torch.linspace(-3, 3, 13)
    assert torch.equal(activation(name)(x), getattr(F, name)(x))


@pytest.mark.parametrize(
    ("name", "same"),
    [("GELU", "gelu"), ("LeakyReLU", "leaky_relu"), ("SiLU", "silu"), ("LogSigmoid", "logsigmoid")],
)
def test_modules_name_their_functions(name: str, same: str):
    assert activation(name) is activation(same)


def test_no_activation():
    x = torch.ones(3)
    assert activation("none")(x) is x


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("rellu", "did you mean 'relu'?"),
        ("leaky-relu", "did you mean 'leaky_relu'?"),
        ("zzz", "possible: none, celu"),
    ],
)
def test_unknown_activations(name: str, hint: str):
    with pytest.raises(ConfigError) as error:
        HeadConfig(activation=name)
    assert f"head.activation: unknown activation {name!r}" in str(error.value)
    assert hint in str(error.value)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("pooling", "max", "head.pooling: unknown pooling 'max'; possible: cls, pooler, mean"),
        ("tower_layers", 5, "head.tower_layers: expected 0 to 4, found 5"),
        ("hidden_layers", -1, "head.hidden_layers: expected 0 to 4, found -1"),
        ("hidden_size", 0, "head.hidden_size: expected 1 to 16384, found 0"),
        ("dropout", 1.5, "head.dropout: expected a probability"),
        ("pair", "concat", "head.pair: expected cross-encoder, or a list of concat, difference"),
        ("pair", ["sum"], "head.pair: unknown feature 'sum'"),
        ("pair", ["cross-encoder"], "head.pair: unknown feature 'cross-encoder'"),
        ("pair", [], "head.pair: expected different features, at least one, found []"),
        ("pair", ["dot", "dot"], "head.pair: expected different features"),
    ],
)
def test_impossible_values_are_named(field: str, value, message: str):
    with pytest.raises(ConfigError) as error:
        HeadConfig(**{field: value})
    assert message in str(error.value)


def test_nothing_follows_a_single_number():
    with pytest.raises(ConfigError, match=r"para\.head\.hidden_layers: nothing can follow"):
        Head(BINARY, HeadConfig(pair=["cosine"], hidden_layers=1), WIDTH)
    Head(SINGLE, HeadConfig(pair=["cosine"], hidden_layers=1), WIDTH)  # a single sentence has no pair feature
    Head(BINARY, HeadConfig(pair=["cosine", "dot"], hidden_layers=1), WIDTH)
