"""What a run will cost, counted and measured before it begins, and which of its batches are worth compiling for.

The unit is the image-gradient: one image forward and backward to the input. Source: SPEC 4.
"""
import collections
import time

import torch

from runtime import compilation, distributed
from datasets import class_ranges
from runtime.device import device_name, has_bf16, synchronise

TRAINING_STEP = 1.5  # of an image-gradient: a training step has the gradient of the parameters as well
FORWARD = 0.45  # of it: a pass without a gradient
COMPILE_PAYS_WITHIN = 500  # outer iterations; the paper makes 20 000
MATCHED = 512  # synthetic images whose activations are held at a time, 4 MiB each for the published ConvNet


def forward_flops(net, channel, size):
    """Floating-point operations of one forward pass of one image, in convolutions and linear layers (a multiply-add counts as
    two). torch.utils.flop_counter says the same, after the two seconds of its imports."""
    flops = []

    def count(layer, inputs, output):
        flops.append(2 * output.numel() * layer.weight[0].numel())  # each output value is a product with one row or filter
    hooks = [layer.register_forward_hook(count) for layer in net.modules()
             if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear))]
    was_training = net.training
    net.eval()
    with torch.no_grad():
        net(torch.zeros(1, channel, *size, device=next(net.parameters()).device))
    net.train(was_training)
    for hook in hooks:
        hook.remove()
    return sum(flops)


def forward_backward_rate(net, data):
    """Measure it on real images, as many at a time as the run attacks. Takes about a second."""
    images, steps = data.get_batch("train", slice(data.micro_batch))[0], 1 if data.device.type == "cpu" else 10
    with compilation.freeze_parameters(net.eval()):
        for count in (1, steps):  # the first is the warm-up
            synchronise(data.device)
            start = time.perf_counter()
            for _ in range(count):
                x = images.clone().requires_grad_()
                torch.autograd.grad(compilation.forward(net, x).sum(), x)
            synchronise(data.device)
    return len(images) * steps / (time.perf_counter() - start)


def convolution_rate(device, dtype, count=64, repeats=3):
    """Floating-point operations a second of the ConvNet's second convolution, forward and backward to its input, in the faster
    of the two memory formats: what the library reaches by itself."""
    seconds = []
    for layout in (torch.contiguous_format, torch.channels_last):  # what is in it does not matter; no generator is touched
        weight = torch.full((128, 128, 3, 3), 0.01, device=device).to(dtype, memory_format=layout)
        x = torch.ones(count, 128, 16, 16, device=device).to(dtype, memory_format=layout).requires_grad_()
        gradient, times = torch.ones_like(x), []
        for _ in range(repeats + 1):
            synchronise(device)
            start = time.perf_counter()
            torch.autograd.grad(torch.nn.functional.conv2d(x, weight, padding=1), x, gradient)
            synchronise(device)
            times.append(time.perf_counter() - start)
        seconds.append(sorted(times[1:])[repeats // 2])
    return count * 2 * 2 * 9 * 128 * 128 * 16 * 16 / min(seconds)


def print_summary(args, data, threat, net, evaluate, run, timer, evaluations, reports):
    """Say what the run is about to do and, from a short measurement, how long it will take; tell `timer` the same.

    net: a network like those of the pool. evaluate: the run's Evaluator. evaluations: how many sets are evaluated for selection
    in each experiment; reports: how many more, without selection.
    """
    per_class = [min(args.batch_real, data.class_size(c)) for c in range(data.num_classes)]
    train_size, test_size = len(data.labels["train"]), len(data.labels["test"])
    # Image-gradients: (images x PGD steps), and one more for a training step. Source: SPEC 4.
    trained = 0 if args.robust_prior else args.fetch_net_num * args.model_train_steps
    gradients = args.outer_loop * ((threat.steps if args.attack_prior else 0.5) * args.train_net_num * sum(per_class)
                                   + ((threat.steps if args.attack_pool else 0) + 1) * trained
                                   * min(args.trained_bs, train_size))
    stored = args.ipc * data.num_classes
    trained_on = stored * args.pack**2
    flops = 2 * forward_flops(net, data.channel, data.size)  # of an image-gradient: forward and backward to the input
    if args.compile:
        net.train(not args.robust_prior)  # as those of the pool are
        compile_planned(net, data, planned_batches(args, data, threat), run.log, args.embed_last)
    rate = forward_backward_rate(net, data)
    # What this process does: all experiments, a share of each one; or experiments by itself.
    experiments, shared, networks = args.num_exp, distributed.world_size(), distributed.max_shard_size(evaluate.networks)
    if args.parallel == "experiments":
        experiments, shared, networks = distributed.max_shard_size(args.num_exp), 1, evaluate.networks
    seconds = networks / evaluate.networks / rate  # of an evaluation, for each image-gradient
    timer.add_phase("iteration", args.Iteration * experiments, gradients / shared / rate)
    timer.add_phase("evaluation", evaluations * experiments, evaluate.cost(trained_on, select=True) * seconds)
    timer.add_phase("report", reports * experiments, evaluate.cost(trained_on) * seconds)
    run.log(f"{run.name} on {device_name(data.device)}: {train_size} training, {test_size} test images of {data.num_classes} "
            f"classes; threat model {threat.name}, eps {255 * threat.eps:.3g}/255, step {255 * threat.step_size:.3g}/255")
    run.log(f"{args.num_exp} set(s) of {stored} stored images" + (f" ({trained_on} sub-images)" if args.pack > 1 else "")
            + f", {args.Iteration} iterations each, {evaluations + reports} evaluations each of {evaluate.networks} network(s)")
    run.log(f"an iteration: {gradients:.0f} image-gradients of {flops / 1e9:.3g} GFLOP = {gradients * flops / 1e12:.3g} TFLOP; "
            f"measured {rate:.0f} image-gradients/s; estimated {timer} in all")
    if distributed.world_size() > 1:
        run.log(f"{distributed.world_size()} processes share " + ("the experiments" if args.parallel == "experiments" else
                                                         "every batch, and the networks of an evaluation"))
    if args.precision != "bf16" and args.compile and has_bf16(data.device):
        gain = convolution_rate(data.device, torch.bfloat16) / convolution_rate(data.device, torch.float32)
        run.log(f"--precision bf16: this device has instructions for it; its convolutions are {gain:.1f} times as fast in it")
    distributed.barrier()  # some take longer to compile
    small = sum(n < args.batch_real for n in per_class)
    if small:
        run.log(f"--batch_real {args.batch_real} is more than {small} of the classes have: all their images are used")


def compile_planned(net, data, planned, say, last=None):
    """compilation.compile_planned for a network of this data set. planned: {kind of batches: {batch size: image-gradients}}."""
    flops = 2 * forward_flops(net, data.channel, data.size)
    compilation.compile_planned(net, (data.channel, *data.size), {kind: {size: n * flops for size, n in batches.items()}
                                                           for kind, batches in planned.items()}, say, last)


def set_batches(count, batch, epochs):
    """Training on `count` images in batches: {batch size: image-gradients}."""
    work = collections.Counter({min(batch, count): TRAINING_STEP * epochs * (count // batch) * batch})
    work[count % batch] += TRAINING_STEP * epochs * (count % batch)
    return work


def planned_batches(args, data, threat):
    """The batches of COMPILE_PAYS_WITHIN outer iterations and one evaluation, whatever --Iteration says: a run that is given
    more iterations later computes the same as one that had them from the start.

    Returns {"attacked", "trained", "matched", "embedded": {batch size: image-gradients}}, as `compilation.compile_batches` names them;
    of the largest share of several processes, so that all compile the same, and a batch that has an image less is filled up.
    """
    attacked, trained, matched, embedded = (collections.Counter() for _ in range(4))
    micro_batch, own = data.micro_batch, distributed.max_shard_size if args.parallel == "batch" else int

    def chunks(images, work, kind):
        kind[micro_batch] += images // micro_batch * micro_batch * work
        kind[images % micro_batch] += images % micro_batch * work

    def attack(images, times, steps=threat.steps):
        chunks(images, steps * times, attacked)

    updates = COMPILE_PAYS_WITHIN * args.outer_loop * args.train_net_num
    steps = 0 if args.robust_prior else COMPILE_PAYS_WITHIN * args.outer_loop * args.fetch_net_num * args.model_train_steps
    pool_batch = own(min(args.trained_bs, len(data.labels["train"])))
    for classes in data.class_groups(args.batch_real):
        real = own(sum(min(args.batch_real, data.class_size(c)) for c in classes))
        attack(real * args.attack_prior, updates)
        chunks(real, FORWARD * updates, embedded)
    attack(pool_batch if args.attack_pool else 0, steps)
    trained[pool_batch] += TRAINING_STEP * pool_batch * steps
    attack(args.test_limit or len(data.labels["test"]), args.num_eval, threat.eval_cost)
    sub_images = args.ipc * args.pack**2
    for classes in matching_groups(data, sub_images):
        chunks(len(classes) * sub_images, updates, matched)
    trained += set_batches(data.num_classes * sub_images, args.batch_train, args.num_eval * (args.epoch_eval_train + 1))
    return {"attacked": attacked, "trained": trained, "matched": matched, "embedded": embedded}


def matching_groups(data, sub_images):
    """Ranges of classes whose synthetic images, `sub_images` of each, are matched in one pass: their activations are held."""
    return class_ranges(data.num_classes, sub_images, max(MATCHED, data.micro_batch))
