"""Train on a set whose networks label what is seen. Needs PyTorch and this file; copy it.

    from train_online import read_set, train
    images, labellers, recipe = read_set("res_ROME_CIFAR10_ConvNet_10ipc.pt")
    train(net, images, labellers, **recipe)

net: from images normalised like these, (N, 3, H, W), to scores of the classes. No attack is made.
"""
import random

import torch
import torch.nn.functional as F


def read_set(path, device="cpu", index=0):
    """One set of a file: images (N, 3, H, W), the labellers' parameters, and how to train."""
    content = torch.load(path, map_location=device, weights_only=True)
    images, pack = content["data"][index][0], content["meta"].get("pack", 1)
    parts = [part for column in images.chunk(pack, 3) for part in column.chunk(pack, 2)]
    images = F.interpolate(torch.cat(parts), scale_factor=pack, mode="bilinear")
    states = [{key: value.float() for key, value in labeller["state"].items()}
              for labeller in content["labellers"][index]]
    names = {"epochs", "lr_net", "batch_train", "temperature"}
    recipe = content["meta"].get("recipe", {})
    return images, states, {name: recipe[name] for name in names & recipe.keys()}


def scores(state, x):
    """What a labeller, a ConvNet of any width, says of images: logits (N, classes)."""
    for i in (0, 4, 8):
        x = F.conv2d(x, state[f"features.{i}.weight"], state[f"features.{i}.bias"], padding=1)
        norm = state[f"features.{i + 1}.weight"], state[f"features.{i + 1}.bias"]
        x = F.avg_pool2d(F.group_norm(x, x.shape[1], *norm).relu(), 2)  # each channel by itself
    return F.linear(x.flatten(1), state["classifier.weight"], state["classifier.bias"])


def augment(x):
    """DSA without colour and cutout: a batch is shifted, flipped, zoomed or turned."""
    n, zoom_x, zoom_y = len(x), *torch.ones(2, len(x))
    turn, turn_back, shift_x, shift_y = torch.zeros(4, n)
    kind = random.choice(["shift", "flip", "zoom", "turn"])
    if kind == "shift":  # by up to an eighth of the side
        shift_x, shift_y = (torch.randint(-side // 8, side // 8 + 1, (n,)) * 2 / side
                            for side in x.shape[:1:-1])
    elif kind == "flip":
        zoom_x = 1 - 2 * (torch.rand(n) < 0.5).float()
    elif kind == "zoom":
        zoom_x, zoom_y = torch.empty(2, n).uniform_(1 / 1.2, 1.2)
    else:
        angle = torch.empty(n).uniform_(-15, 15).deg2rad()
        zoom_x, zoom_y, turn, turn_back = angle.cos(), angle.cos(), -angle.sin(), angle.sin()
    theta = torch.stack([zoom_x, turn, shift_x, turn_back, zoom_y, shift_y], 1)
    grid = F.affine_grid(theta.view(n, 2, 3).to(x), x.shape, align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


def mix(x):
    """CutMix, a square of another image in each, and then mixup. The labels are asked for later."""
    side = round(random.uniform(0.25, 0.75) * x.shape[2])
    top, left = (random.randint(0, length - side) for length in x.shape[2:])
    square = ..., slice(top, top + side), slice(left, left + side)
    x[square] = x[torch.randperm(len(x))][square]
    return x[torch.randperm(len(x))].lerp(x, torch.rand(len(x), 1, 1, 1).to(x))


def train(net, images, labellers, epochs=3000, lr_net=0.1, batch_train=256, temperature=3.0):
    """Train `net` in place, on the device of the images."""
    optimizer = torch.optim.SGD(net.parameters(), lr_net, momentum=0.9, weight_decay=5e-4)
    steps = (epochs + 1) * -(-len(images) // batch_train)
    warm = -(-steps // 10)  # steps in which the learning rate rises
    rise = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warm, 1, warm)
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps - warm, 1))
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [rise, fall], [warm])
    net.train()
    for _ in range(epochs + 1):
        for batch in images[torch.randperm(len(images))].split(batch_train):
            x = mix(augment(batch))
            labels = sum(scores(state, x) for state in labellers) / len(labellers)
            loss = F.cross_entropy(net(x) / temperature, (labels / temperature).softmax(1))
            optimizer.zero_grad()
            (loss * temperature**2).backward()
            optimizer.step()
            schedule.step()
    return net.eval()
