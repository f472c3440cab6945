"""The two MNIST networks of DeepShift. Input (N, 1, 28, 28), output log-probabilities (N, 10)."""

import torch.nn.functional as F
from torch import nn


class LinearMNIST(nn.Module):
    """784 - 512 - 512 - 10 with dropout 0.2."""

    def __init__(self):
        super().__init__()
        self.fc1, self.dropout1 = nn.Linear(784, 512), nn.Dropout(0.2)
        self.fc2, self.dropout2 = nn.Linear(512, 512), nn.Dropout(0.2)
        self.fc3 = nn.Linear(512, 10)

    def forward(self, x):
        x = self.dropout1(F.relu(self.fc1(x.flatten(1))))
        x = self.dropout2(F.relu(self.fc2(x)))
        return F.log_softmax(self.fc3(x), dim=1)


class ConvMNIST(nn.Module):
    """Two 5x5 convolutions (20, 50) with max pooling, then 800 - 500 - 10."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 20, 5), nn.Conv2d(20, 50, 5)
        self.fc1, self.fc2 = nn.Linear(800, 500), nn.Linear(500, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.fc1(x.flatten(1)))
        return F.log_softmax(self.fc2(x), dim=1)


MODELS = {"simple_linear": LinearMNIST, "simple_conv": ConvMNIST}
