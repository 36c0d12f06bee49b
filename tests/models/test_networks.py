"""Models against the tables they are built from: widths, sizes, number of weights, and behaviour in evaluation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pipeline.models.bundle import load_bundle
from pipeline.models.networks import MODEL_NAMES, CnnBiLstmAttention, EnhancedInceptionModel, build_model
from pipeline.storage.errors import SerError

SHAPES = {"inception": (1, 64, 188), "cnn_bilstm": (188, 190)}
SMALL: dict[str, dict[str, float]] = {"inception": {"width": 0.25}, "cnn_bilstm": {}}

# Szegedy et al. 2015, table 1: output channels, then #1x1, #3x3 reduce, #3x3, #5x5 reduce, #5x5, pool proj
GOOGLENET = {
    "stage3.0": (256, 64, 96, 128, 16, 32, 32),
    "stage3.1": (480, 128, 128, 192, 32, 96, 64),
    "stage4.0": (512, 192, 96, 208, 16, 48, 64),
    "stage4.1": (512, 160, 112, 224, 24, 64, 64),
    "stage4.2": (512, 128, 128, 256, 24, 64, 64),
    "stage4.3": (528, 112, 144, 288, 32, 64, 64),
    "stage4.4": (832, 256, 160, 320, 32, 128, 128),
    "stage5.0": (832, 256, 160, 320, 32, 128, 128),
    "stage5.1": (1024, 384, 192, 384, 48, 128, 128),
}


@pytest.fixture(scope="module")
def inception() -> nn.Module:
    torch.manual_seed(0)
    return build_model("inception", {}, 8, SHAPES["inception"]).eval()


def test_inception_blocks_have_the_widths_of_the_table(inception: nn.Module) -> None:
    n_in = 192
    for name, (n_out, c1, r3, c3, r5, c5, pool) in GOOGLENET.items():
        block = inception.get_submodule(name)
        found = [(m.in_channels, m.out_channels, m.kernel_size[0]) for m in block.modules() if isinstance(m, nn.Conv2d)]
        assert set(found) == {(n_in, c1, 1), (n_in, r3, 1), (r3, c3, 3), (n_in, r5, 1), (r5, c5, 5), (n_in, pool, 1)}
        assert c1 + c3 + c5 + pool == n_out
        assert block(torch.zeros(1, n_in, 4, 6)).shape == (1, n_out, 4, 6)
        n_in = n_out


def test_every_convolution_is_followed_by_batch_norm_and_relu(inception: nn.Module) -> None:
    kinds = [type(m) for m in inception.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d | nn.ReLU)]
    assert kinds == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU] * 57


# the table's channels times the width, to the next eight, of two as near to the even one: 48 / 4 = 12 is 16
WIDTHS = {
    1.0: {c: c for row in GOOGLENET.values() for c in row},
    0.5: {c: c // 2 for c in (32, 48, 64, 96, 112, 128, 144, 160, 192, 208, 224, 256, 288, 320, 384)}
    | {16: 8, 24: 16}
    | {48: 24},
    0.25: {16: 8, 24: 8, 32: 8, 48: 16, 64: 16, 96: 24, 112: 32, 128: 32, 144: 32, 160: 40, 192: 48, 208: 48, 224: 56}
    | {256: 64, 288: 72, 320: 80, 384: 96},
    2.0: {c: 2 * c for row in GOOGLENET.values() for c in row},
}


@pytest.mark.parametrize("width", WIDTHS)
def test_number_of_weights(width: float) -> None:
    of = WIDTHS[width]
    layers = [(1, of[64], 7), (of[64], of[64], 1), (of[64], of[192], 3)]
    n_in = of[192]
    for row in GOOGLENET.values():
        c1, r3, c3, r5, c5, pool = (of[channels] for channels in row[1:])
        layers += [(n_in, c1, 1), (n_in, r3, 1), (r3, c3, 3), (n_in, r5, 1), (r5, c5, 5), (n_in, pool, 1)]
        n_in = c1 + c3 + c5 + pool
    expected = sum(a * b * k * k + 2 * b for a, b, k in layers) + n_in * 8 + 8
    model = build_model("inception", {"width": width}, 8, SHAPES["inception"]).eval()
    assert sum(p.numel() for p in model.parameters()) == expected
    with torch.inference_mode():
        assert model(torch.zeros(2, *SHAPES["inception"])).shape == (2, 8)


def test_width_one_is_the_network_without_a_width(inception: nn.Module) -> None:
    """So bundles of before there was one load, and their seeds give the same fresh weights."""
    torch.manual_seed(0)
    wide = build_model("inception", {"width": 1.0}, 8, SHAPES["inception"])
    expected = inception.state_dict()
    assert list(wide.state_dict()) == list(expected)
    assert all(torch.equal(value, expected[name]) for name, value in wide.state_dict().items())
    shipped = load_bundle()
    assert "width" not in shipped.model_options
    wide.load_state_dict(shipped.state_dict())


def test_picture_sizes_halve_as_in_the_table(inception: nn.Module) -> None:
    assert isinstance(inception, EnhancedInceptionModel)
    x: Tensor = torch.zeros(2, *SHAPES["inception"])
    for stage, shape in (
        (inception.stem, (192, 8, 24)),
        (inception.stage3, (480, 4, 12)),
        (inception.stage4, (832, 2, 6)),
        (inception.stage5, (1024, 2, 6)),
        (inception.head, (8,)),
    ):
        x = stage(x)
        assert x.shape == (2, *shape)


def test_cnn_bilstm_layers() -> None:
    model = build_model("cnn_bilstm", {}, 5, (188, 190))
    assert isinstance(model, CnnBiLstmAttention)
    widths = [(m.in_channels, m.out_channels) for m in model.modules() if isinstance(m, nn.Conv1d)]
    assert widths == [(190, 128), (128, 256), (256, 512), (512, 512)]
    assert (model.lstm.hidden_size, model.lstm.bidirectional) == (128, True)
    assert (model.attention.embed_dim, model.attention.num_heads) == (256, 4)
    assert [(m.in_features, m.out_features) for m in model.head if isinstance(m, nn.Linear)] == [(256, 128), (128, 5)]


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_output_shape_and_dropout(name: str) -> None:
    for n_classes in (2, 8):
        model = build_model(name, SMALL[name] | {"dropout": 0.25}, n_classes, SHAPES[name]).eval()
        with torch.inference_mode():
            assert model(torch.zeros(3, *SHAPES[name])).shape == (3, n_classes)
        assert [m.p for m in model.modules() if isinstance(m, nn.Dropout)] == [0.25]


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_evaluation_is_deterministic_and_does_not_mix_clips(name: str) -> None:
    torch.manual_seed(1)
    model = build_model(name, SMALL[name], 8, SHAPES[name])
    x = torch.randn(3, *SHAPES[name])
    first, again = model(x), model(x)  # training mode: batch norm and dropout are at work
    assert not torch.equal(first, again)
    model.eval()
    with torch.inference_mode():
        together = model(x)
        assert torch.equal(together, model(x))
        torch.testing.assert_close(torch.cat([model(clip[None]) for clip in x]), together, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_every_weight_learns(name: str) -> None:
    model = build_model(name, SMALL[name], 8, SHAPES[name])
    model(torch.randn(4, *SHAPES[name])).logsumexp(dim=1).sum().backward()
    dead = [n for n, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert dead == []
    # attention's key bias, which softmax cancels, is part of in_proj_bias: no weight stays without effect as a whole
    assert [n for n, p in model.named_parameters() if p.grad is not None and not p.grad.any()] == []


@pytest.mark.parametrize(
    ("name", "options", "shape", "word"),
    [
        ("resnet", {}, (1, 64, 188), "inception, cnn_bilstm"),
        ("inception", {"depth": 2}, (1, 64, 188), "'depth'; it takes: dropout, width"),
        ("inception", {"width": 0.124}, (1, 64, 188), "width is 0.124"),
        ("inception", {"width": 2.01}, (1, 64, 188), "width is 2.01"),
        ("inception", {"width": float("nan")}, (1, 64, 188), "width is nan"),
        ("inception", {"dropout": 1.0}, (1, 64, 188), "dropout is 1.0"),
        ("inception", {"members": 0}, (1, 64, 188), "0 members"),
        ("inception", {"members": 17}, (1, 64, 188), "17 members"),
        ("cnn_bilstm", {"dropout": float("nan")}, (188, 190), "dropout is nan"),
        ("cnn_bilstm", {"width": 1.0}, (188, 190), "'width'; it takes: dropout"),
        ("inception", {}, (188, 190), "--features_kind log_mel"),
        ("cnn_bilstm", {}, (1, 64, 188), "--features_kind frame_features"),
    ],
)
def test_what_cannot_be_built_is_refused(
    name: str, options: dict[str, float], shape: tuple[int, ...], word: str
) -> None:
    with pytest.raises(SerError, match=word):
        build_model(name, options, 8, shape)
