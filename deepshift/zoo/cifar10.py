"""The original's CIFAR-10 networks by name. Input (N, 3, 32, 32), output logits (N, 10)."""

from deepshift.zoo import densenet, grouped, mobile, plain, preresnet, resnet

MODELS = {
    **resnet.MODELS,
    **preresnet.MODELS,
    **densenet.MODELS,
    **plain.MODELS,
    **mobile.MODELS,
    **grouped.MODELS,
}
