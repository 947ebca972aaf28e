"""Small networks of the kinds that people bring, each with something that was once assumed of all networks."""

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, relu


def body(width: int = 16) -> nn.Sequential:
    """[N, 3, H, W] to [N, 4 width, H/4, W/4]."""
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((3, width, 2), (width, 2 * width, 2), (2 * width, 4 * width, 1)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, 1), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


class Tutorial(nn.Module):
    """The first network of many tutorials, for 32 x 32: its map is flattened, not pooled."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1, self.conv2, self.pool = nn.Conv2d(3, 6, 5), nn.Conv2d(6, 16, 5), nn.MaxPool2d(2, 2)
        self.fc1, self.fc2, self.fc3 = nn.Linear(16 * 5 * 5, 120), nn.Linear(120, 84), nn.Linear(84, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(relu(self.conv2(self.pool(relu(self.conv1(x))))))
        return self.fc3(relu(self.fc2(relu(self.fc1(torch.flatten(x, 1))))))


class Hidden(nn.Module):
    """A flattened map, a hidden layer and dropout, for 32 x 32."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.features = body(8)
        layers = (nn.Flatten(), nn.Linear(32 * 64, 40), nn.ReLU(), nn.Dropout(0.5), nn.Linear(40, num_classes))
        self.head = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class Answering(nn.Module):
    """Ends in a function of the logits, e.g. a softmax."""

    def __init__(self, num_classes: int, last: nn.Module) -> None:
        super().__init__()
        self.features, self.fc, self.last = body(), nn.Linear(64, num_classes), last

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.fc(self.features(x).mean((2, 3))))


class Normalised(nn.Module):
    """A softmax that no operation is called so."""

    def forward(self, z: Tensor) -> Tensor:
        return z.exp() / z.exp().sum(1, keepdim=True)


class Shared(nn.Module):
    """One block, with its batch norm, called twice."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem, self.down, self.fc = (
            nn.Conv2d(3, 32, 3, 2, 1),
            nn.Conv2d(32, 64, 3, 2, 1),
            nn.Linear(64, num_classes),
        )
        self.block = nn.Sequential(nn.Conv2d(32, 32, 3, 1, 1), nn.BatchNorm2d(32))

    def forward(self, x: Tensor) -> Tensor:
        x = relu(self.stem(x))
        x = relu(self.block(x) + x)
        x = relu(self.block(x) + x)
        return self.fc(relu(self.down(x)).mean((2, 3)))


class TwoNorms(nn.Module):
    """One convolution under two batch norms, and one whose weight another operation reads."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem, self.conv, self.fc = (
            nn.Conv2d(3, 16, 3, 2, 1),
            nn.Conv2d(16, 16, 3, 1, 1),
            nn.Linear(16, num_classes),
        )
        self.first, self.second, self.third = nn.BatchNorm2d(16), nn.BatchNorm2d(16), nn.BatchNorm2d(16)
        self.tied = nn.Conv2d(16, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = relu(self.first(self.conv(relu(self.stem(x)))))
        x = relu(self.second(self.conv(x)))
        x = self.third(self.tied(x)) + nn.functional.conv2d(x, self.tied.weight)
        return self.fc(x.mean((2, 3)))


class GeM(nn.Module):
    """Generalised-mean pooling, a root of the mean, undefined for negative maps."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.features, self.p, self.fc = body(), nn.Parameter(torch.ones(1) * 3), nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        f = self.features(x).clamp(min=1e-6).pow(self.p)
        return self.fc(adaptive_avg_pool2d(f, 1).pow(1 / self.p).flatten(1))


class Wrapped(nn.Module):
    """Its only child is called as a prefix is that wrappers put before every name."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.network = nn.Sequential(body(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


class Softmaxed(Answering):
    """Ends in softmax: its rows are probabilities."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes, nn.Softmax(1))


class ConcatPooled(nn.Module):
    """Largest values beside means, joined by a function, as fastai's heads have them."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.features, self.norm, self.fc = body(), nn.BatchNorm1d(128), nn.Linear(128, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        f = self.features(x)
        return self.fc(self.norm(torch.cat([f.amax((2, 3)), f.mean((2, 3))], 1)))


class Loose(nn.Module):
    """A convolution by a function, with a weight that no layer has, run twice."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.features, self.fc = body(), nn.Linear(64, num_classes)
        self.weight = nn.Parameter(torch.randn(64, 64, 3, 3) / 24)

    def forward(self, x: Tensor) -> Tensor:
        f = self.features(x)
        for _ in range(2):
            f = relu(nn.functional.conv2d(f, self.weight, padding=1) + f)
        return self.fc(f.mean((2, 3)))


class Lazy(nn.Module):
    """A head that takes its shape from the first images."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.features, self.fc = body(8), nn.LazyLinear(num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).flatten(1))
