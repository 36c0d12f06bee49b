"""Emotion classifiers, trained from scratch, built by name.

`inception`: GoogLeNet (Szegedy et al. 2015, table 1) with batch norm after every convolution (Ioffe & Szegedy 2015),
for one-channel log-mel "images". `cnn_bilstm`: 1-D convolutions, BiLSTM and self-attention over frame features. Several
trained networks of one kind can be joined into a model that answers with their mean log-probability (`members`).
Limits: no auxiliary heads, no pretrained weights; the forward passes are simple, so that they can be exported to ONNX.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from pipeline.storage.errors import SerError

_OPTIONS = {"inception": ("dropout", "width"), "cnn_bilstm": ("dropout",)}
MODEL_NAMES = tuple(_OPTIONS)
MEMBERS = "members"  # an option of every model: how many networks answer together
MAX_MEMBERS = 16

# 1x1, 3x3 reduce, 3x3, 5x5 reduce, 5x5, pool projection: GoogLeNet's table
_INCEPTION_WIDTHS: dict[str, tuple[int, int, int, int, int, int]] = {
    "3a": (64, 96, 128, 16, 32, 32),
    "3b": (128, 128, 192, 32, 96, 64),
    "4a": (192, 96, 208, 16, 48, 64),
    "4b": (160, 112, 224, 24, 64, 64),
    "4c": (128, 128, 256, 24, 64, 64),
    "4d": (112, 144, 288, 32, 64, 64),
    "4e": (256, 160, 320, 32, 128, 128),
    "5a": (256, 160, 320, 32, 128, 128),
    "5b": (384, 192, 384, 48, 128, 128),
}


class ConvBlock(nn.Sequential):
    """Convolution without bias, batch norm, ReLU; "same" padding at stride 1."""

    def __init__(self, n_in: int, n_out: int, kernel: int, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(n_in, n_out, kernel, stride, padding=kernel // 2, bias=False),
            nn.BatchNorm2d(n_out),
            nn.ReLU(inplace=True),
        )


class Inception(nn.Module):
    """Four parallel branches (1x1, 3x3, 5x5, pooled), concatenated: (B, n_in, H, W) -> (B, n_out, H, W)."""

    def __init__(self, n_in: int, c1: int, r3: int, c3: int, r5: int, c5: int, pool: int) -> None:
        super().__init__()
        self.branch1 = ConvBlock(n_in, c1, 1)
        self.branch3 = nn.Sequential(ConvBlock(n_in, r3, 1), ConvBlock(r3, c3, 3))
        self.branch5 = nn.Sequential(ConvBlock(n_in, r5, 1), ConvBlock(r5, c5, 5))
        self.branch_pool = nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), ConvBlock(n_in, pool, 1))
        self.n_out = c1 + c3 + c5 + pool

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.branch1(x), self.branch3(x), self.branch5(x), self.branch_pool(x)], dim=1)


def _pool() -> nn.MaxPool2d:
    return nn.MaxPool2d(3, stride=2, padding=1)


class Network(nn.Module):
    """A classifier whose last module, at the end of ``head``, is a linear layer, and which can return its input."""

    head: nn.Sequential

    def pooled(self, x: Tensor) -> Tensor:
        """The input of ``head``, (B, ...)."""
        raise NotImplementedError

    def outputs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, n_classes), and the penultimate features (B, d), the input of the last linear layer."""
        embedding: Tensor = self.head[:-1](self.pooled(x))
        return self.head[-1](embedding), embedding

    def forward(self, x: Tensor) -> Tensor:
        return self.outputs(x)[0]


class EnhancedInceptionModel(Network):
    """GoogLeNet with batch norm for (B, 1, n_mels, frames) float32 -> (B, n_classes) logits. 5.98 M weights.

    ``width`` multiplies the channels of every layer, in steps of eight (the multiplier of MobileNet, Howard et al.
    2017): 0.5 is a quarter of the weights, 1.51 M.
    """

    def __init__(self, n_classes: int = 8, dropout: float = 0.4, width: float = 1.0) -> None:
        super().__init__()

        def of(channels: int) -> int:
            return max(8, 8 * round(channels * width / 8))

        blocks: dict[str, Inception] = {}
        n_in = of(192)
        for name, channels in _INCEPTION_WIDTHS.items():
            blocks[name] = Inception(n_in, *map(of, channels))
            n_in = blocks[name].n_out
        self.stem = nn.Sequential(
            ConvBlock(1, of(64), 7, stride=2),
            _pool(),
            ConvBlock(of(64), of(64), 1),
            ConvBlock(of(64), of(192), 3),
            _pool(),
        )
        self.stage3 = nn.Sequential(blocks["3a"], blocks["3b"], _pool())
        self.stage4 = nn.Sequential(*(blocks[name] for name in ("4a", "4b", "4c", "4d", "4e")), _pool())
        self.stage5 = nn.Sequential(blocks["5a"], blocks["5b"])
        self.head = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout), nn.Linear(n_in, n_classes)
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def pooled(self, x: Tensor) -> Tensor:
        found: Tensor = self.stage5(self.stage4(self.stage3(self.stem(x))))
        return found


class CnnBiLstmAttention(Network):
    """Conv1d stack, BiLSTM, self-attention, mean over time: (B, frames, n_dims) float32 -> (B, n_classes) logits.

    Three max-pools by 2 shorten the sequence eightfold before the LSTM.
    """

    def __init__(self, n_dims: int, n_classes: int = 8, dropout: float = 0.3) -> None:
        super().__init__()
        widths = (n_dims, 128, 256, 512, 512)
        layers: list[nn.Module] = []
        for index, (n_in, n_out) in enumerate(pairwise(widths)):
            layers += [nn.Conv1d(n_in, n_out, 5, padding=2, bias=False), nn.BatchNorm1d(n_out), nn.ReLU(inplace=True)]
            if index < 3:
                layers.append(nn.MaxPool1d(2))
        self.convolutions = nn.Sequential(*layers)
        self.lstm = nn.LSTM(512, 128, batch_first=True, bidirectional=True)
        self.attention = nn.MultiheadAttention(256, 4, batch_first=True)
        self.norm = nn.LayerNorm(256)
        self.head = nn.Sequential(
            nn.Linear(256, 128), nn.ReLU(inplace=True), nn.Dropout(dropout), nn.Linear(128, n_classes)
        )

    def pooled(self, x: Tensor) -> Tensor:
        hidden, _ = self.lstm(self.convolutions(x.transpose(1, 2)).transpose(1, 2))
        attended, _ = self.attention(hidden, hidden, hidden, need_weights=False)
        found: Tensor = self.norm(hidden + attended).mean(dim=1)
        return found


class JoinedModel(Network):
    """Several networks, whose logits are averaged: the mean log-probability. (B, ...) -> (B, n_classes) logits."""

    def __init__(self, members: Sequence[Network]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def outputs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits, embeddings = zip(*(cast("Network", member).outputs(x) for member in self.members), strict=True)
        return torch.stack(logits).mean(dim=0), torch.cat(embeddings, dim=1)


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Raise SerError for a name or an option that `build_model` does not know, or a value out of range."""
    if name not in MODEL_NAMES:
        raise SerError(f"unknown model {name!r}; choose one of {', '.join(MODEL_NAMES)}")
    unknown = sorted(set(options) - {*_OPTIONS[name], MEMBERS})
    if unknown:
        raise SerError(f"model {name!r} has no option {unknown[0]!r}; it takes: {', '.join(_OPTIONS[name])}")
    if not 0 <= options.get("dropout", 0.0) < 1:
        raise SerError(f"the dropout is {options['dropout']}; it must be at least 0 and below 1")
    if not 0.125 <= options.get("width", 1.0) <= 2:
        raise SerError(f"the width is {options['width']}; it must be between 0.125 and 2 (1: that of GoogLeNet)")
    if not 1 <= options.get(MEMBERS, 1) <= MAX_MEMBERS:
        raise SerError(f"the model has {options[MEMBERS]} members; it must have 1 to {MAX_MEMBERS}")


def build_model(name: str, options: Mapping[str, Any], n_classes: int, input_shape: Sequence[int]) -> Network:
    """Build a classifier with random weights.

    Args:
        options: `dropout`, and `width` of the Inception (0.125 to 2); `members`: number of networks in a `JoinedModel`.
        input_shape: shape of one example, without the batch axis: (1, n_mels, frames) or (frames, n_dims).

    Raises:
        SerError: as in `check_options`, or features of another shape than the model needs.
    """
    check_options(name, options)
    wanted_axes = 3 if name == "inception" else 2
    if len(input_shape) != wanted_axes:
        kind = "log_mel" if name == "inception" else "frame_features"
        raise SerError(
            f"model {name!r} needs {kind} features, got shape {tuple(input_shape)}; extract them with --features_kind "
            f"{kind}"
        )
    own = {option: value for option, value in options.items() if option != MEMBERS}
    members = [_network(name, own, n_classes, input_shape) for _ in range(options.get(MEMBERS, 1))]
    return JoinedModel(members) if len(members) > 1 else members[0]


def _network(name: str, options: Mapping[str, Any], n_classes: int, input_shape: Sequence[int]) -> Network:
    if name == "inception":
        return EnhancedInceptionModel(n_classes, **options)
    return CnnBiLstmAttention(input_shape[1], n_classes, **options)
