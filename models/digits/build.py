# mypy: disable-error-code="import-not-found, misc, no-any-return, no-untyped-call"
"""Trains the four digits models and writes them as ONNX files beside this script.

    pip install torch==2.13.0 onnx==1.23.2 onnxruntime==1.31.1 scikit-learn
    python -m models.digits.build [NAME ...]

The CPU build of torch is enough (its own site tells how to choose it): all four take a few
minutes on two cores. Seeds are fixed and one thread is used, so that the same machine and
versions give the same files; other processors may differ in the last bits.

The files keep what an exporter leaves for an optimiser to do: BatchNormalization stays apart
from its convolution, layer normalisation, GELU and attention stay in parts, and no constant is
folded. Evaluation images are only used once, to refuse a model below its floor.
"""

import math
import sys
import warnings
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.digits import FLOORS, path
from models.digits.data import split
from models.digits.score import score

OPSET = 17
BATCH = 64
EPOCHS = {"mlp": 150, "cnn": 100, "gru": 150, "vit": 150}
PEAK_RATE = {"mlp": 3e-3, "cnn": 1e-2, "gru": 5e-3, "vit": 2e-3}


class Mlp(nn.Sequential):
    """Two hidden layers: 64 -> 128 -> 64 -> 10."""

    def __init__(self) -> None:
        super().__init__(
            nn.Flatten(),
            nn.Linear(64, 128),
            nn.ReLU(),
            nn.Linear(128, 64),
            nn.ReLU(),
            nn.Linear(64, 10),
        )


def conv_norm(inputs: int, outputs: int, size: int = 3, stride: int = 1) -> nn.Sequential:
    """A convolution without bias and its BatchNormalization."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False),
        nn.BatchNorm2d(outputs),
    )


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a skip, which is a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.first = conv_norm(inputs, outputs, stride=stride)
        self.second = conv_norm(outputs, outputs)
        same = inputs == outputs and stride == 1
        self.skip = nn.Identity() if same else conv_norm(inputs, outputs, size=1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(self.first(x))) + self.skip(x))


class Cnn(nn.Sequential):
    """A residual network of 45,000 parameters: 16 channels at 8x8 pixels, then 32 at 4x4."""

    def __init__(self) -> None:
        super().__init__(
            conv_norm(1, 16),
            nn.ReLU(),
            conv_norm(16, 16),
            nn.ReLU(),
            ResidualBlock(16, 16),
            ResidualBlock(16, 16),
            ResidualBlock(16, 32, stride=2),
            ResidualBlock(32, 32),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(32, 10),
        )


class Gru(nn.Module):
    """Reads the image row by row, in both directions, and classifies the mean state."""

    def __init__(self, hidden: int = 48) -> None:
        super().__init__()
        self.gru = nn.GRU(8, hidden, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * hidden, 10)

    def forward(self, image: Tensor) -> Tensor:
        states, _ = self.gru(image.squeeze(1))
        return self.head(states.mean(dim=1))


class LayerNorm(nn.Module):
    """Layer normalisation in parts, as models outside torch.nn write it and as old exports hold."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        variance = centred.pow(2).mean(-1, keepdim=True)
        return centred / torch.sqrt(variance + 1e-5) * self.weight + self.bias


class Attention(nn.Module):
    """Multi-head self-attention in parts, over [batch, tokens, width]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_width = heads, width // heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = (
            layer(x).view(batch, tokens, self.heads, self.head_width).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        weights = (q @ k.transpose(-1, -2) / math.sqrt(self.head_width)).softmax(dim=-1)
        return self.output((weights @ v).transpose(1, 2).reshape(batch, tokens, width))


class TransformerBlock(nn.Module):
    """Pre-norm attention and a GELU network of twice the width, each beside a skip."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.Sequential(LayerNorm(width), Attention(width, heads))
        self.network = nn.Sequential(
            LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.network(x)


class Vit(nn.Module):
    """A vision transformer: 16 patches of 2x2 pixels and a class token, three blocks."""

    def __init__(self, width: int = 48, heads: int = 4, depth: int = 3) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, kernel_size=2, stride=2)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, 17, width) * 0.02)
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads) for _ in range(depth)))
        self.norm = LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0])


NETWORKS: dict[str, type[nn.Module]] = {"mlp": Mlp, "cnn": Cnn, "gru": Gru, "vit": Vit}


def augment(image: Tensor) -> Tensor:
    """Rotates by up to 10 degrees, scales by up to 10 % and shifts by up to 0.75 pixel."""
    count = len(image)
    angle = (torch.rand(count) * 2 - 1) * math.radians(10)
    scale = 1 + (torch.rand(count) * 2 - 1) * 0.1
    cos, sin = scale * torch.cos(angle), scale * torch.sin(angle)
    # affine_grid counts half the image, 4 pixels, as 1.
    shift_x, shift_y = ((torch.rand(count) * 2 - 1) * 0.75 / 4 for _ in range(2))
    rows = [torch.stack([cos, -sin, shift_x], 1), torch.stack([sin, cos, shift_y], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(image.shape), align_corners=False)
    return F.grid_sample(image, grid, align_corners=False)


def train(name: str) -> nn.Module:
    """A network trained for a fixed number of epochs; returned in inference mode."""
    torch.manual_seed(0)
    network = NETWORKS[name]()
    data = split()
    image, label = torch.from_numpy(data.train_image), torch.from_numpy(data.train_label)
    optimizer = torch.optim.AdamW(network.parameters(), lr=PEAK_RATE[name], weight_decay=0.02)
    steps = math.ceil(len(label) / BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=PEAK_RATE[name], total_steps=EPOCHS[name] * steps
    )
    for _ in range(EPOCHS[name]):
        for chosen in torch.randperm(len(label)).split(BATCH):
            logits = network(augment(image[chosen]))
            loss = F.cross_entropy(logits, label[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.eval()


def export(network: nn.Module, target: Path) -> None:
    """Writes the network as ONNX: `image` [batch, 1, 8, 8] -> `logits` [batch, 10]."""
    with warnings.catch_warnings():
        # The exporter warns that it is the older one, and about the state of a dynamic-batch GRU.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network,
            (torch.zeros(2, 1, 8, 8),),
            target,
            dynamo=False,
            opset_version=OPSET,
            # EVAL would fold BatchNormalization into the convolutions.
            training=torch.onnx.TrainingMode.PRESERVE,
            do_constant_folding=False,
            input_names=["image"],
            output_names=["logits"],
            dynamic_axes={"image": {0: "batch"}, "logits": {0: "batch"}},
        )
    onnx.checker.check_model(onnx.load(target), full_check=True)


def build(name: str) -> float:
    """Trains, exports and scores one model; returns its accuracy, 0..1."""
    target = path(name)
    draft = target.with_suffix(".tmp")
    export(train(name), draft)
    accuracy = score(draft)
    if accuracy < FLOORS[name]:
        raise SystemExit(f"{name}: accuracy {accuracy:.4f} is below {FLOORS[name]}; see {draft}")
    draft.replace(target)
    return accuracy


def main() -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    for name in sys.argv[1:] or list(FLOORS):
        print(f"{name}  {build(name):.4f}  {path(name).stat().st_size} bytes", flush=True)


if __name__ == "__main__":
    main()
