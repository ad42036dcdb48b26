"""The networks: (N, C, H, W) normalised images -> (N, num_classes) class scores.

To add one, write a builder (channel, size) -> (features, embedding size) and name it in NETWORKS.
"""
from functools import partial

import torch
from torch import nn

from runtime.safe_io import InputError

# --eval_mode: the networks that a synthetic set is evaluated with. Source: SPEC 1.2.
EVAL_POOLS = {
    "M": ("MLP", "ConvNet", "LeNet", "AlexNet", "VGG11", "ResNet18"),
    "W": ("ConvNetW32", "ConvNetW64", "ConvNetW128", "ConvNetW256"),
    "D": ("ConvNetD1", "ConvNetD2", "ConvNetD3", "ConvNetD4"),
    "A": ("ConvNetAS", "ConvNetAR", "ConvNetAL", "ConvNetASwish"),
    "P": ("ConvNetNP", "ConvNetMP", "ConvNetAP"),
    "N": ("ConvNetNN", "ConvNetBN", "ConvNetLN", "ConvNetIN", "ConvNetGN"),
}
EVAL_MODES = ("S", "SS", *EVAL_POOLS)


class Network(nn.Module):
    """`features`, whose flattened output is the embedding e(x) of SPEC 1, and a linear classifier.

    features: nn.Sequential. embedding_size: values of its output for an image.
    """

    architecture = None  # arguments of get_network; networks with equal ones have equal layers

    def __init__(self, features, embedding_size, num_classes):
        super().__init__()
        self.features = features
        self.classifier = nn.Linear(embedding_size, num_classes)

    def forward(self, x):
        """(N, C, H, W) normalised images -> (N, num_classes) class scores."""
        return self.classifier(self.features(x).flatten(1))

    def embed_and_classify(self, x, last=None):
        """(N, C, H, W) normalised images -> ((N, D) embedding, (N, num_classes) class scores).

        last: the embedding is the output of `features[:last]`; None, or more than there are (the
        published commands have 1000): of all layers. Source: SPEC 1.2.
        """
        if last is None or last >= len(self.features):
            embedding = self.features(x).flatten(1)  # (N, D)
            return embedding, self.classifier(embedding)
        x = self.features[:last](x)
        rest = self.features[last:](x.clone())  # of a copy: its first layer may work in place
        return x.flatten(1), self.classifier(rest.flatten(1))


# ------------------------------------------------------------------------------- building blocks
ACTIVATIONS = {
    "relu": partial(nn.ReLU, inplace=True),
    "sigmoid": nn.Sigmoid,
    "leakyrelu": partial(nn.LeakyReLU, negative_slope=0.01),
    "swish": nn.SiLU,
}
POOLINGS = {"avgpooling": nn.AvgPool2d, "maxpooling": nn.MaxPool2d, "none": None}
NORMS = {  # channels, height, width -> layer
    "instancenorm": lambda c, h, w: nn.GroupNorm(c, c),  # one group a channel, affine
    "groupnorm": lambda c, h, w: nn.GroupNorm(4, c),
    "layernorm": lambda c, h, w: nn.LayerNorm((c, h, w)),
    "batchnorm": lambda c, h, w: nn.BatchNorm2d(c),
    "none": None,
}


def stack(channel, size, plan, norm, act="relu", pooling="maxpooling"):
    """Convolutions, each with norm and activation, and 2x2 poolings: (features, embedding size).

    plan: (width, kernel size) for a convolution, "pool" for a pooling.
    """
    layers, (height, width) = [], size
    for step in plan:
        if step != "pool":
            out, kernel = step
            layers.append(nn.Conv2d(channel, out, kernel_size=kernel, padding=kernel // 2))
            if NORMS[norm]:
                layers.append(NORMS[norm](out, height, width))
            layers.append(ACTIVATIONS[act]())
            channel = out
        elif POOLINGS[pooling]:
            layers.append(POOLINGS[pooling](2))
            height, width = height // 2, width // 2
    return nn.Sequential(*layers), _flat_size(channel, height, width)


def _flat_size(channels, height, width):
    if min(height, width) < 1:
        raise ValueError("too small: its poolings leave no pixel")
    return channels * height * width


def convnet(channel, size, width=128, depth=3, act="relu", norm="instancenorm",
            pooling="avgpooling"):
    """`depth` blocks of conv3x3(`width`), norm, activation, 2x2 pooling. Source: SPEC 1.2."""
    return stack(channel, size, [(width, 3), "pool"] * depth, norm, act, pooling)


def alexnet(channel, size, norm="none"):
    """AlexNet cut to 32x32 images, as the distillation literature uses it."""
    plan = (128, 5), "pool", (192, 5), "pool", (256, 3), (192, 3), (192, 3), "pool"
    return stack(channel, size, plan, norm)


def vgg11(channel, size, norm="instancenorm"):
    """VGG-11 (Simonyan and Zisserman 2015, A) with one linear layer, for 32x32 images."""
    widths = 64, "pool", 128, "pool", 256, 256, "pool", 512, 512, "pool", 512, 512, "pool"
    return stack(channel, size, [w if w == "pool" else (w, 3) for w in widths], norm)


def mlp(channel, size, width=128):
    """Two hidden layers of `width` units."""
    return nn.Sequential(nn.Flatten(), nn.Linear(channel * size[0] * size[1], width), nn.ReLU(),
                         nn.Linear(width, width), nn.ReLU()), width


def lenet(channel, size):
    """LeNet-5 with ReLU and max pooling (LeCun et al. 1998)."""
    height, width = (((side - 4) // 2 - 4) // 2 for side in size)  # conv5x5, pool, conv5x5, pool
    return nn.Sequential(
        nn.Conv2d(channel, 6, kernel_size=5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 16, kernel_size=5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(_flat_size(16, height, width), 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(),
    ), 84


def resnet18(channel, size, norm="instancenorm"):
    """torchvision's, with the stem for CIFAR (conv3x3, no pooling) and PyTorch's initialisation."""
    from torchvision.models import resnet18 as torchvision_resnet18  # its import takes two seconds
    net = torchvision_resnet18(norm_layer=lambda c: NORMS[norm](c, None, None))
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            layer.reset_parameters()
    first = nn.Conv2d(channel, 64, kernel_size=3, padding=1, bias=False)
    return nn.Sequential(first, net.bn1, net.relu, net.layer1, net.layer2, net.layer3, net.layer4,
                         net.avgpool, nn.Flatten()), 512


NETWORKS = {
    "MLP": mlp,
    "LeNet": lenet,
    "AlexNet": alexnet,
    "AlexNetBN": partial(alexnet, norm="batchnorm"),
    "VGG11": vgg11,
    "VGG11BN": partial(vgg11, norm="batchnorm"),
    "ResNet18": resnet18,
    "ResNet18BN": partial(resnet18, norm="batchnorm"),
    "ConvNet": convnet,
    **{f"ConvNetW{width}": partial(convnet, width=width) for width in (32, 64, 128, 256)},
    **{f"ConvNetD{depth}": partial(convnet, depth=depth) for depth in (1, 2, 3, 4)},
    "ConvNetAS": partial(convnet, act="sigmoid"),
    "ConvNetAR": partial(convnet, act="relu"),
    "ConvNetAL": partial(convnet, act="leakyrelu"),
    "ConvNetASwish": partial(convnet, act="swish"),
    "ConvNetNP": partial(convnet, pooling="none"),
    "ConvNetMP": partial(convnet, pooling="maxpooling"),
    "ConvNetAP": partial(convnet, pooling="avgpooling"),
    "ConvNetNN": partial(convnet, norm="none"),
    "ConvNetBN": partial(convnet, norm="batchnorm"),
    "ConvNetLN": partial(convnet, norm="layernorm"),
    "ConvNetIN": partial(convnet, norm="instancenorm"),
    "ConvNetGN": partial(convnet, norm="groupnorm"),
}


def get_network(model, channel, num_classes, size, seed, device="cpu"):
    """A new network with PyTorch's default initialisation, the same on every device.

    model: a name of NETWORKS. size: (height, width). The global generator stays as it was.
    Raises ValueError for an unknown name, or images too small for the network.
    """
    if model not in NETWORKS:
        raise ValueError(f"unknown network {model!r}; choose one of {', '.join(NETWORKS)}")
    with torch.random.fork_rng(devices=[]):  # layers draw from the global CPU generator only
        torch.default_generator.manual_seed(seed)
        net = Network(*NETWORKS[model](channel, size), num_classes)
    net.architecture = (model, channel, num_classes, tuple(size))
    return net.to(device)


def network_for(data, model, seed):
    """`get_network` for a Dataset, on its device. Raises InputError if its images are too small."""
    try:
        return get_network(model, data.channel, data.num_classes, data.size, seed, data.device)
    except ValueError as error:
        raise InputError(f"--model {model} cannot take the images of {data.name}, "
                         f"{data.size[0]}x{data.size[1]} ({error})") from None


def eval_pool(eval_mode, model):
    """The names of the networks of --eval_mode, one of EVAL_MODES; "S" and "SS" mean `model`."""
    return (model,) if eval_mode in ("S", "SS") else EVAL_POOLS[eval_mode]
