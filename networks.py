"""The networks of the field, 3x32x32 (or C x H x W) images in normalised units to class scores.

Every network is a `Network`: a feature extractor (`features`, an nn.Sequential that ends in a flat vector) and one
linear layer (`classifier`). The input of that layer is the embedding e(x) that ROME matches (SPEC 1).

`get_network("ConvNetW32", ...)` builds one by name from the table NETWORKS; to add a network, write a builder that
returns (features, embedding size) and name it there.
"""
from functools import partial

import torch
from torch import nn

# The letters of --eval_mode (Source: SPEC 1.2): which networks a synthetic set is evaluated with.
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
    """A feature extractor and a linear classifier.

    features: nn.Sequential, (N, C, H, W) -> anything whose flattening has `embedding_size` values an image.
    architecture: what get_network built it from; networks of the same have the same layers.
    """

    architecture = None

    def __init__(self, features, embedding_size, num_classes):
        super().__init__()
        self.features = features
        self.classifier = nn.Linear(embedding_size, num_classes)

    def forward(self, x):
        """(N, C, H, W) normalised images -> (N, num_classes) class scores (logits)."""
        return self.classifier(self.features(x).flatten(1))

    def embed_and_classify(self, x, last=None):
        """The embedding and the class scores in one pass.

        x: (N, C, H, W) normalised images. last: the embedding is what `features[:last]` computes, so that a negative number
        cuts layers off the end; None, or at least as many as there are (every published command has 1000), means all.
        Returns ((N, D) embedding, (N, num_classes) class scores). Source: SPEC 1.2, --embed_last.
        """
        if last is None or last >= len(self.features):
            embedding = self.features(x).flatten(1)  # (N, D)
            return embedding, self.classifier(embedding)
        x = self.features[:last](x)
        # of a copy, since the next layer may work in place
        return x.flatten(1), self.classifier(self.features[last:](x.clone()).flatten(1))


# ---------------------------------------------------------------------------------------------------- building blocks
ACTIVATIONS = {
    "relu": partial(nn.ReLU, inplace=True),
    "sigmoid": nn.Sigmoid,
    "leakyrelu": partial(nn.LeakyReLU, negative_slope=0.01),
    "swish": nn.SiLU,
}
POOLINGS = {
    "avgpooling": partial(nn.AvgPool2d, kernel_size=2, stride=2),
    "maxpooling": partial(nn.MaxPool2d, kernel_size=2, stride=2),
    "none": None,
}
NORMS = {  # channels, height, width -> layer
    "instancenorm": lambda c, h, w: nn.GroupNorm(c, c),  # affine; one group a channel is instance normalisation
    "groupnorm": lambda c, h, w: nn.GroupNorm(4, c),
    "layernorm": lambda c, h, w: nn.LayerNorm((c, h, w)),
    "batchnorm": lambda c, h, w: nn.BatchNorm2d(c),
    "none": None,
}


def _flat(size, layers, channels):
    """The number of values in a (channels, H, W) map after `layers` halvings of `size`."""
    height, width = (side >> layers for side in size)
    if min(height, width) < 1:
        raise ValueError(f"an image of {size[0]}x{size[1]} is too small for this network: it halves it {layers} times")
    return channels * height * width


def convnet(channel, size, width=128, depth=3, act="relu", norm="instancenorm", pooling="avgpooling"):
    """ConvNet: `depth` blocks of conv3x3(`width`), norm, activation, 2x2 pooling.

    Source: SPEC 1.2; parameter names (features.{0,1,4,5,8,9}, classifier) as in the networks released with BEARD.
    """
    layers = []
    height, width_px = size
    for _ in range(depth):
        layers.append(nn.Conv2d(channel, width, kernel_size=3, padding=1))
        if NORMS[norm]:
            layers.append(NORMS[norm](width, height, width_px))
        layers.append(ACTIVATIONS[act]())
        if POOLINGS[pooling]:
            layers.append(POOLINGS[pooling]())
            height, width_px = height // 2, width_px // 2
        channel = width
    return nn.Sequential(*layers), _flat(size, depth if POOLINGS[pooling] else 0, width)


def mlp(channel, size, width=128):
    """Two hidden layers of `width` units."""
    return nn.Sequential(nn.Flatten(), nn.Linear(channel * size[0] * size[1], width), nn.ReLU(),
                         nn.Linear(width, width), nn.ReLU()), width


def lenet(channel, size):
    """LeNet-5 with ReLU and max pooling (LeCun et al. 1998)."""
    height, width = (((side - 4) // 2 - 4) // 2 for side in size)  # two unpadded 5x5 convolutions, each pooled
    return nn.Sequential(nn.Conv2d(channel, 6, kernel_size=5), nn.ReLU(), nn.MaxPool2d(2),
                         nn.Conv2d(6, 16, kernel_size=5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
                         nn.Linear(16 * height * width, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU()), 84


def alexnet(channel, size, norm="none"):
    """AlexNet cut to 32x32 images, as the distillation literature uses it: five convolutions, three poolings."""
    layers, (height, width) = [], size
    for out, kernel, pool in ((128, 5, True), (192, 5, True), (256, 3, False), (192, 3, False), (192, 3, True)):
        layers.append(nn.Conv2d(channel, out, kernel_size=kernel, padding=kernel // 2))
        if NORMS[norm]:
            layers.append(NORMS[norm](out, height, width))
        layers.append(nn.ReLU(inplace=True))
        if pool:
            layers.append(nn.MaxPool2d(2))
            height, width = height // 2, width // 2
        channel = out
    return nn.Sequential(*layers), _flat(size, 3, channel)


def vgg11(channel, size, norm="instancenorm"):
    """VGG-11 (Simonyan and Zisserman 2015, configuration A) with one linear layer, for 32x32 images."""
    layers, (height, width) = [], size
    for item in (64, "pool", 128, "pool", 256, 256, "pool", 512, 512, "pool", 512, 512, "pool"):
        if item == "pool":
            layers.append(nn.MaxPool2d(2))
            height, width = height // 2, width // 2
        else:
            layers += [nn.Conv2d(channel, item, kernel_size=3, padding=1), NORMS[norm](item, height, width),
                       nn.ReLU(inplace=True)]
            channel = item
    return nn.Sequential(*layers), _flat(size, 5, channel)


def resnet18(channel, size, norm="instancenorm"):
    """torchvision's ResNet-18 with the first layers of the CIFAR variant: 3x3 stride 1, no max pooling; its convolutions start
    as PyTorch's layers do, not as torchvision's networks do."""
    from torchvision.models import resnet18 as torchvision_resnet18
    net = torchvision_resnet18(norm_layer=lambda c: NORMS[norm](c, None, None))
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            layer.reset_parameters()
    first = nn.Conv2d(channel, 64, kernel_size=3, padding=1, bias=False)
    return nn.Sequential(first, net.bn1, net.relu, net.layer1, net.layer2, net.layer3, net.layer4, net.avgpool,
                         nn.Flatten()), 512


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
    """A freshly initialised network (PyTorch's default initialisation).

    model: a name of NETWORKS. size: (height, width) of the images. seed: int; the same seed gives the same weights on
    every device, and the caller's global generator is left as it was.
    Raises ValueError for an unknown name, or images too small for the network.
    """
    if model not in NETWORKS:
        raise ValueError(f"unknown network {model!r}; choose one of {', '.join(NETWORKS)}")
    with torch.random.fork_rng(devices=[]):  # nn layers draw from the global CPU generator only
        torch.default_generator.manual_seed(seed)
        features, embedding_size = NETWORKS[model](channel, size)
        net = Network(features, embedding_size, num_classes)
    net.architecture = (model, channel, num_classes, tuple(size))
    return net.to(device)


def network_for(data, model, seed):
    """`get_network` for the images of a data set, on its device. data: a Dataset."""
    return get_network(model, data.channel, data.num_classes, data.size, seed, data.device)


def eval_pool(eval_mode, model):
    """The names of the networks that `--eval_mode` stands for; "S" and "SS" mean `model` itself.

    Raises ValueError for an unknown mode.
    """
    if eval_mode not in EVAL_MODES:
        raise ValueError(f"unknown --eval_mode {eval_mode!r}; choose one of {', '.join(EVAL_MODES)}")
    return EVAL_POOLS.get(eval_mode, (model,))
