"""ImageNet networks: torchvision's, and the two MobileNets of the original. Input (N, 3, H, W), logits (N, 1000)."""

import os
import warnings

from torch import nn

from common.checkpoints import read_foreign
from deepshift.runs import RunError
from deepshift.zoo.initial import initialise, initialise_linear

NO_CLASSIFIERS = ("segmentation", "detection", "video", "optical_flow", "quantization", "quantized")


class MobileNetV1(nn.Module):
    """Stem, 13 separable convolutions, average pooling over 7x7, one linear layer."""

    CONFIG = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *((512, 1),) * 5, (1024, 2), (1024, 1))

    def __init__(self):
        super().__init__()
        stem = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(inplace=True))
        members, inputs = [stem], 32
        for width, stride in self.CONFIG:
            members.append(self._separable(inputs, width, stride))
            inputs = width
        self.model, self.fc = nn.Sequential(*members, nn.AvgPool2d(7)), nn.Linear(1024, 1000)

    @staticmethod
    def _separable(inputs, outputs, stride):
        return nn.Sequential(
            nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False),
            nn.BatchNorm2d(inputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(inputs, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        )

    def forward(self, x):
        return self.fc(self.model(x).flatten(1))


class InvertedResidual(nn.Module):
    """[1x1 expansion,] depthwise 3x3, linear 1x1; added to the input if stride and width allow."""

    def __init__(self, inputs, outputs, expansion, stride):
        super().__init__()
        self.adds, planes = stride == 1 and inputs == outputs, expansion * inputs
        layers = [] if expansion == 1 else _relu6(nn.Conv2d(inputs, planes, 1, bias=False))
        layers += _relu6(nn.Conv2d(planes, planes, 3, stride, 1, groups=planes, bias=False))
        self.conv = nn.Sequential(*layers, nn.Conv2d(planes, outputs, 1, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        return x + self.conv(x) if self.adds else self.conv(x)


def _relu6(conv):
    return [conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU6(inplace=True)]


class MobileNetV2(nn.Module):
    """Inverted residuals with ReLU6."""

    CONFIG = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))

    def __init__(self):
        super().__init__()
        members, inputs = [nn.Sequential(*_relu6(nn.Conv2d(3, 32, 3, 2, 1, bias=False)))], 32
        for expansion, width, count, stride in self.CONFIG:
            for index in range(count):
                members.append(InvertedResidual(inputs, width, expansion, 1 if index else stride))
                inputs = width
        members.append(nn.Sequential(*_relu6(nn.Conv2d(inputs, 1280, 1, bias=False))))
        self.features = nn.Sequential(*members)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, 1000))
        initialise(self, batchnorm_weight=1.0)
        initialise_linear(self)

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3)))


CUSTOM = {"mobilenetv1": MobileNetV1, "mobilenetv2": MobileNetV2}
# Where the original expects their trained weights, below models/imagenet.
CUSTOM_FILES = {"mobilenetv1": "mobilenet_v1_sgd_rmsprop_69.526.tar", "mobilenetv2": "mobilenet_v2.pth.tar"}


def torchvision_names() -> list[str]:
    """Classification networks of the installed torchvision."""
    from torchvision import models

    return models.list_models(module=models)


def models() -> dict:
    """{name: function that builds the network}; torchvision's, then the original's two."""
    return {**{name: lambda name=name: _torchvision(name) for name in torchvision_names()}, **CUSTOM}


def _torchvision(name, weights=None):
    from torchvision import models

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # about a future default of GoogLeNet's initialisation
        return models.get_model(name, weights=weights)


def build_pretrained(name: str, output_dir: str) -> nn.Module:
    """A trained network: torchvision's first published weights, or the original's file below output_dir.

    Raises RunError if there are none or they cannot be had.
    """
    if name in CUSTOM:
        return _custom_pretrained(name, output_dir)
    from torchvision import models

    try:
        weights = models.get_model_weights(name)
        weights = getattr(weights, "IMAGENET1K_V1", None) or weights.DEFAULT
        return _torchvision(name, weights)
    except (ValueError, AttributeError) as error:
        raise RunError(f"--pretrained: torchvision has no weights for {name} ({error})") from None
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise RunError(f"--pretrained: the weights of {name} could not be downloaded ({reason}); get the file "
                       "elsewhere and give it with --weights") from None  # fmt: skip


def _custom_pretrained(name, output_dir):
    path = os.path.join(output_dir, "imagenet", "original_pretrained_models", CUSTOM_FILES[name])
    if not os.path.exists(path):
        raise RunError(f"--pretrained: {path} does not exist; put the trained file there, or give it with --weights")
    content = read_foreign(path)
    state = content.get("state_dict", content) if isinstance(content, dict) else {}
    model = CUSTOM[name]()
    try:
        model.load_state_dict({key.removeprefix("module."): value for key, value in state.items()})
    except (RuntimeError, AttributeError) as error:
        raise RunError(f"{path} is not of {name}: {str(error).splitlines()[0]}") from None
    return model
