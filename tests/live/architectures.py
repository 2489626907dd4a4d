"""Small torch modules whose exports have the shapes of what people export. Needs torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


def conv_bn(inputs: int, outputs: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution without bias, BatchNorm."""
    conv = nn.Conv2d(inputs, outputs, 3, stride, 1, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class MLP(nn.Module):
    """Two layers, the first activation GELU by its formula."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 64)
        self.second = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        gelu = 0.5 * hidden * (1.0 + torch.erf(hidden / 2.0**0.5))
        return self.second(gelu)


class ConvNet(nn.Module):
    """A residual block between convolutions with BatchNorm, a classifier behind."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 16, stride=2)
        self.left = conv_bn(16, 16)
        self.right = conv_bn(16, 16)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.right(torch.relu(self.left(x))))
        return self.head(torch.flatten(nn.functional.adaptive_avg_pool2d(x, 1), 1))


class Mobile(nn.Module):
    """MobileNetV3's block: expand, depthwise, squeeze and excite, project; HardSwish between."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 16, stride=2)
        self.expand = nn.Sequential(nn.Conv2d(16, 64, 1, bias=False), nn.BatchNorm2d(64))
        self.depthwise = conv_bn(64, 64, groups=64)
        self.squeeze = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(64, 16, 1),
            nn.ReLU(),
            nn.Conv2d(16, 64, 1),
            nn.Hardsigmoid(),
        )
        self.project = nn.Sequential(nn.Conv2d(64, 16, 1, bias=False), nn.BatchNorm2d(16))
        self.swish = nn.Hardswish()
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.swish(self.stem(x))
        wide = self.swish(self.depthwise(self.swish(self.expand(x))))
        x = x + self.project(wide * self.squeeze(wide))
        return self.head(x.mean(dim=(2, 3)))


class Attention(nn.Module):
    """Multi-head self-attention written out, as most exported transformers have it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        batch, length, width = x.shape
        size = width // self.heads

        def split(y: Tensor) -> Tensor:
            return y.view(batch, length, self.heads, size).transpose(1, 2)

        query, key, value = split(self.query(x)), split(self.key(x)), split(self.value(x))
        scores = query @ key.transpose(-1, -2) / size**0.5
        scores = scores + (1.0 - mask[:, None, None, :]) * -10000.0
        mixed = torch.softmax(scores, dim=-1) @ value
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))


class Encoder(nn.Module):
    """Token and position embeddings, transformer layers, a head on the first token."""

    def __init__(self, layers: int = 2, width: int = 32) -> None:
        super().__init__()
        self.tokens = nn.Embedding(100, width)
        self.positions = nn.Embedding(64, width)
        self.attention = nn.ModuleList(Attention(width, 4) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * layers))
        self.feed = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
            for _ in range(layers)
        )
        self.head = nn.Linear(width, 5)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.tokens(tokens) + self.positions(places)
        for index, (attention, feed) in enumerate(zip(self.attention, self.feed, strict=True)):
            x = self.norms[2 * index](x + attention(x, mask))
            x = self.norms[2 * index + 1](x + feed(x))
        return torch.tanh(self.head(x[:, 0]))


class Recurrent(nn.Module):
    """A bidirectional LSTM of two layers with a head on every step."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(12, 16, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        steps, (hidden, _) = self.lstm(x)
        return torch.log_softmax(self.head(steps), dim=-1), hidden


class UNet(nn.Module):
    """Down twice, up twice by ConvTranspose, with skip connections."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.bottom = conv_bn(1, 8), conv_bn(8, 16), conv_bn(16, 32)
        self.up_second = nn.ConvTranspose2d(32, 16, 2, 2)
        self.up_first = nn.ConvTranspose2d(16, 8, 2, 2)
        self.mix_second, self.mix_first = conv_bn(32, 16), conv_bn(16, 8)
        self.norm = nn.BatchNorm2d(16)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = torch.relu(self.first(x))
        second = torch.relu(self.second(nn.functional.max_pool2d(first, 2)))
        x = torch.relu(self.bottom(nn.functional.max_pool2d(second, 2)))
        x = torch.cat([torch.relu(self.norm(self.up_second(x))), second], dim=1)
        x = torch.cat([self.up_first(torch.relu(self.mix_second(x))), first], dim=1)
        return torch.sigmoid(self.head(torch.relu(self.mix_first(x))))


@dataclass(frozen=True)
class Architecture:
    """A module with what `torch.onnx.export` needs to know of it."""

    build: Callable[[], nn.Module]
    args: Callable[[], tuple[Tensor, ...]]
    axes: dict[str, dict[int, str]]  # dynamic axes by input, in order
    outputs: tuple[str, ...]

    @property
    def inputs(self) -> list[str]:
        """Names of the inputs."""
        return list(self.axes)


ARCHITECTURES = {
    "mlp": Architecture(MLP, lambda: (torch.randn(3, 16),), {"x": {0: "batch"}}, ("y",)),
    "cnn": Architecture(ConvNet, lambda: (torch.randn(2, 3, 32, 32),), {"x": {0: "batch"}}, ("y",)),
    "mobile": Architecture(
        Mobile, lambda: (torch.randn(2, 3, 32, 32),), {"x": {0: "batch"}}, ("y",)
    ),
    "transformer": Architecture(
        Encoder,
        lambda: (torch.randint(0, 100, (2, 9)), torch.ones(2, 9)),
        {"tokens": {0: "batch", 1: "length"}, "mask": {0: "batch", 1: "length"}},
        ("y",),
    ),
    "lstm": Architecture(
        Recurrent, lambda: (torch.randn(2, 7, 12),), {"x": {0: "batch"}}, ("y", "hidden")
    ),
    "unet": Architecture(UNet, lambda: (torch.randn(2, 1, 32, 32),), {"x": {0: "batch"}}, ("y",)),
}


def build(name: str) -> nn.Module:
    """The module for inference, its weights and BatchNorm statistics drawn from a fixed seed."""
    torch.manual_seed(0)
    module = ARCHITECTURES[name].build().eval()
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.running_mean, std=0.3)
            nn.init.uniform_(part.running_var, 0.5, 2.0)
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias, std=0.3)
    return module


def export_arguments(name: str, dynamo: bool) -> dict[str, object]:
    """Keyword arguments of `torch.onnx.export` that make the same axes dynamic either way."""
    architecture = ARCHITECTURES[name]
    common: dict[str, object] = {
        "input_names": architecture.inputs,
        "output_names": list(architecture.outputs),
        "dynamo": dynamo,
    }
    if not dynamo:
        return common | {"dynamic_axes": architecture.axes}
    shapes = tuple(dict(axes) for axes in architecture.axes.values())
    return common | {"dynamic_shapes": shapes}
