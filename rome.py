"""The method: two losses, the matching step and the pool step of an outer iteration.

The scripts ROME_cifar10.py and ROME_cifar100.py hold the numbers and the outer loop, experiment.py
what stands around it. To change the loss, change the first two functions, or `matching_step`.

Source: "ROME is Forged in Adversity: Robust Distilled Datasets via Information Bottleneck", ICML
2025; the order of an outer iteration, its quirks included, is that of the code published with it
(SPEC 1). Distributed under the MIT licence.
"""
import torch
import torch.nn.functional as F

from attacks import attack
from augment import dsa_apply, dsa_draw, unpack
from datasets import class_ranges
from network_pool import NetworkPool, PretrainedPool
from networks import network_for
from runtime import distributed
from runtime.compilation import embed, freeze_parameters
from runtime.cuda_graphs import graphed_call
from runtime.seeding import derive_seed, make_generator
from runtime.training import training_step

MATCHED_IMAGES = 512  # synthetic images held at a time, 4 MiB each with the published ConvNet


# ---------------------------------------------------------------------------------- the two losses
def robustness_aligned_loss(emb_syn, emb_adv, distance="tv"):
    """How far the mean embedding of synthetic images is from that of attacked real ones.

    emb_syn: (N, D). emb_adv: (D,), a mean. distance: "tv", squared total variation (Source: SPEC 1,
    L_rob), or "l2", the squared Euclidean distance of DM. Returns a () tensor.
    """
    difference = emb_syn.mean(0) - emb_adv
    return (0.5 * difference.abs().sum()) ** 2 if distance == "tv" else difference.square().sum()


def performance_aligned_loss(logits, c, only_while_wrong=False):
    """Cross-entropy of synthetic images of class c; logits: (N, num_classes). A () tensor.

    only_while_wrong: 0 for an image that is classified right already. Source: SPEC 1, L_perf.
    """
    labels = torch.full((len(logits),), c, device=logits.device)
    loss = F.cross_entropy(logits, labels, reduction="none")  # (N,)
    if only_while_wrong:
        loss = loss * (logits.argmax(1) != c)
    return loss.mean()


# ----------------------------------------------------------------------- step 3: match the images
def matching_step(image_syn, optimizer_img, member, data, threat, args, rng, micro_batch,
                  classes_at_once=None):
    """Move the synthetic images of every class towards attacked real ones, on one pool network.

    image_syn: (C*ipc, 3, H, W), changed in place by one optimizer step for each class. rng: the
    generators of `make_generators`. micro_batch: images attacked at a time. classes_at_once: as
    many as the memory allows if None; the result does not depend on it, up to rounding.
    Returns the mean robustness- and performance-aligned loss, () tensors.
    """
    dsa_params, emb_adv = embed_attacked_real(member.net, data, threat, args, rng, micro_batch,
                                              classes_at_once)
    lookahead = lookahead_images(image_syn, optimizer_img, data.num_classes)
    ce_weight = (1 - args.align_weight) * args.ce_weight * member.running_accuracy()  # w_f
    gradients, total_rob, total_perf = [], *torch.zeros(2, device=data.device)
    for classes in matching_groups(args, data.num_classes, micro_batch, classes_at_once):
        img_syn = lookahead[classes.start * args.ipc:classes.stop * args.ipc].requires_grad_()
        emb_syn, logits = embed_synthetic(member.net, img_syn, [dsa_params[c] for c in classes],
                                          args, micro_batch)
        loss_rob = torch.stack([robustness_aligned_loss(e, emb_adv[c], args.align_distance)
                                for c, e in zip(classes, emb_syn)]).sum()
        loss = args.align_weight * loss_rob
        total_rob += loss_rob.detach()
        if args.syn_ce:
            loss_perf = sum(performance_aligned_loss(z, c, rests_when_right(args))
                            for c, z in zip(classes, logits))
            loss = loss + ce_weight * loss_perf
            total_perf += loss_perf.detach()
        gradients += torch.autograd.grad(loss, img_syn)  # no image is in another class's loss
    step_per_class(image_syn, optimizer_img, torch.cat(gradients), data.num_classes)
    distributed.broadcast_(image_syn.data)
    return total_rob / data.num_classes, total_perf / data.num_classes


def embed_attacked_real(net, data, threat, args, rng, micro_batch, classes_at_once=None):
    """Real batches of every class: augmented, attacked on `net`, embedded.

    Of several processes each one attacks and embeds its shard of the images. Returns the DSA
    parameters of each class, which its synthetic images share, and mean embeddings, (C, D).
    """
    dsa_params, emb_adv = [], []
    for classes in data.class_groups(args.batch_real, classes_at_once):
        batches, drawn = sample_real(net, classes, data, args, rng)
        dsa_params += drawn
        sizes = [len(batch) for batch in batches]
        img_real, shard = torch.cat(batches), distributed.shard(sum(sizes))
        img_adv = img_real[shard]
        if args.attack_prior:
            label_real = torch.cat([torch.full((n,), c, device=data.device)
                                    for c, n in zip(classes, sizes)])
            img_adv = attack(net, img_real, label_real, threat, generator=rng["attack"],
                             micro_batch=micro_batch, shard=shard, **attack_options(args, threat))
        emb_adv.append(distributed.class_means(
            embed_frozen(net, img_adv, args.embed_last, micro_batch), sizes))
    return dsa_params, torch.cat(emb_adv)


def sample_real(net, classes, data, args, rng):
    """An augmented real batch (n, 3, H, W) of each of these classes, and its DSA parameters."""
    chosen = [data.sample_class_indices(c, args.batch_real, rng["data"]) for c in classes]
    drawn = [dsa_draw(args.dsa_strategy, data.size, rng["dsa"]) for c in classes]
    batches = []
    for c, index, draw in zip(classes, chosen, drawn):
        img_real = dsa_apply(data.get_batch("train", index)[0], draw)
        if sub_images(args) == 1 and 0 < args.real_kept < len(img_real):
            img_real = lowest_loss(net, img_real, c, args.real_kept)
        batches.append(img_real)
    return batches, drawn


@torch.no_grad()
def lowest_loss(net, images, c, count):
    """The `count` images on which `net` has the lowest cross-entropy with class c."""
    logits = torch.cat([net(part) for part in images.split(512)])
    loss = -F.log_softmax(logits, dim=1)[:, c]
    return images[loss.topk(count, largest=False).indices]


@torch.no_grad()
def embed_frozen(net, images, embed_last, micro_batch):
    """Embeddings (N, D) of images (N, 3, H, W), without a graph."""
    def first_of_pair(net, x):
        return embed(net, x, embed_last)[:1]
    return torch.cat([graphed_call(first_of_pair, ("embed", embed_last), net, x)[0]
                      for x in images.split(micro_batch)])


def embed_synthetic(net, img_syn, dsa_params, args, micro_batch):
    """Unpack, augment, embed. img_syn: (classes*ipc, 3, H, W).

    Returns, for each class, embeddings (ipc*pack*pack, D) and logits of as many rows.
    """
    augmented = torch.cat([dsa_apply(unpack(x, args.pack), draw)
                           for x, draw in zip(img_syn.split(args.ipc), dsa_params)])
    with freeze_parameters(net):
        pairs = [embed(net, x, args.embed_last) for x in augmented.split(micro_batch)]
    return (torch.cat(parts).split(sub_images(args)) for parts in zip(*pairs))


def lookahead_images(image_syn, optimizer_img, num_classes):
    """The images that each class's step starts from, like image_syn, without a graph.

    The classes take their steps one after the other, and momentum moves the images of every class
    in the steps of the others. That does not depend on any network: so the gradients of all classes
    can be taken in one pass, at the images found here. `image_syn` and the optimizer end as they
    were. Source: SPEC 1.1.
    """
    kept, state = image_syn.detach().clone(), _copy(optimizer_img.state_dict())
    found, image_syn.grad = torch.empty_like(kept), torch.zeros_like(kept)
    for rows in _rows_per_class(image_syn, num_classes):
        found[rows] = image_syn.detach()[rows]
        optimizer_img.step()
    image_syn.data.copy_(kept)
    optimizer_img.load_state_dict(state)
    return found


def step_per_class(image_syn, optimizer_img, gradient, num_classes):
    """One optimizer step for each class, with the gradient of its images alone."""
    image_syn.grad = torch.zeros_like(gradient)
    for rows in _rows_per_class(image_syn, num_classes):
        image_syn.grad[rows] = gradient[rows]
        optimizer_img.step()
        image_syn.grad[rows] = 0


def _rows_per_class(images, num_classes):
    ipc = len(images) // num_classes
    return [slice(c * ipc, (c + 1) * ipc) for c in range(num_classes)]


def _copy(state):
    """A state_dict whose tensors are copies."""
    if isinstance(state, dict):
        return {key: _copy(value) for key, value in state.items()}
    return state.clone() if isinstance(state, torch.Tensor) else state


# ------------------------------------------------------------------------- step 4: train the pool
def pool_step(members, data, threat, args, rng, micro_batch):
    """Train pool networks on attacked real images, `model_train_steps` SGD steps each.

    Of several processes each one has its shard of every batch. Returns the mean loss, a () tensor;
    0 for no step.
    """
    losses = [torch.zeros((), device=data.device)]
    for member in members:
        for _ in range(args.model_train_steps):
            chosen = data.sample_indices(args.trained_bs, rng["data"])
            img_real, label_real = data.get_batch("train", chosen)
            shard = distributed.shard(len(label_real))
            img_adv = img_real[shard]
            if args.attack_pool:
                img_adv = attack(member.net, img_real, label_real, threat, generator=rng["attack"],
                                 micro_batch=micro_batch, shard=shard,
                                 **attack_options(args, threat))
            loss, correct = training_step(member.net, member.optimizer, img_adv,
                                          label_real[shard], len(label_real))
            member.count(correct, len(label_real))
            losses.append(loss)
    return torch.stack(losses).sum() / max(len(losses) - 1, 1)


# ----------------------------------------------------------------------------------- what args say
def sub_images(args):
    """Images of a class that a network trains on: `pack` * `pack` in each stored one."""
    return args.ipc * args.pack**2


def rests_when_right(args):
    """Whether the performance-aligned term rests while an image is right (a published quirk)."""
    return args.ce_only_while_wrong and sub_images(args) == 1


def attack_options(args, threat):
    """The PGD attack of distillation: targeted, with a random start."""
    step_size = threat.step_size if args.attack_step_size is None else args.attack_step_size / 255
    return {"eps": args.attack_eps / 255, "step_size": step_size, "steps": args.attack_steps}


def image_optimizer(args, image_syn):
    """The optimizer of the synthetic images. Source: SPEC 1.1."""
    if args.optim == "sgd":
        return torch.optim.SGD([image_syn], lr=args.lr_img, momentum=args.momentum_img)
    return torch.optim.Adam([image_syn], lr=args.lr_img)


def make_pool(args, exp, data, prior):
    """The pool of an experiment: the networks of --robust_prior, or one that is trained."""
    if prior:
        return PretrainedPool(prior, args.net_slice_min)
    decay = {"momentum": 0.9, "weight_decay": 5e-4} if args.net_decay else {}
    return NetworkPool(
        lambda k: network_for(data, args.model, derive_seed(args.seed, exp, "pool", k)),
        lambda net: torch.optim.SGD(net.parameters(), lr=args.lr_net, **decay),
        args.net_num, args.net_start, args.net_slice_min)


def make_generators(args, exp, device):
    """One random generator for each purpose: none depends on how much another was used."""
    rng = {name: make_generator(args.seed, exp, name) for name in ("data", "dsa", "pool")}
    return {**rng, "attack": make_generator(args.seed, exp, "attack", device=device)}


def matching_groups(args, num_classes, micro_batch, classes_at_once=None):
    """Ranges of classes whose synthetic images are matched in one pass, as memory allows."""
    if classes_at_once:
        return class_ranges(num_classes, 1, classes_at_once)
    return class_ranges(num_classes, sub_images(args), max(MATCHED_IMAGES, micro_batch))
