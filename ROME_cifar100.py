"""ROME on CIFAR-100: distil a data set into a few images a class that train accurate and adversarially robust networks.

    python ROME_cifar100.py --ipc 1 --aug --batch_real 5000 ...     the published commands stand in command.txt

Source: "ROME is Forged in Adversity: Robust Distilled Datasets via Information Bottleneck", ICML 2025; the order of one
outer iteration, its quirks included, is that of the code published with it. Distributed under the MIT licence.
"""
import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import utils
from attacks import THREAT_MODELS, attack, get_threat_model
from augment import draws_to_device, dsa_apply, dsa_draw, parse_dsa_strategy, unpack
from runtime import distributed
from runtime.perturbation import deferred_checks
from runtime.progress import ProgressTimer
from runtime.command_line import (add_compatibility_flags, add_dataset_flag, add_run_flags, add_switch, at_least, fraction,
                                 method_name, run_script)
from datasets import load_dataset
from runtime.device import get_device, to_device_packed
from runtime.compilation import resolve_precision, embed, freeze_parameters, set_precision
from runtime.cuda_graphs import graphed_call, use_cuda_graphs
from runtime.cost import matching_groups, print_summary
from runtime.run_directory import open_run
from runtime.training import require_finite, training_step
from runtime.seeding import make_generator
from formats.synset_file import PACKS, SyntheticSet
from runtime.lookahead import lookahead_images, step_per_class
from networks import EVAL_MODES, NETWORKS, network_for
from synsets import INITS, LR_SCHEDULES, baseline_packs, baseline_sets, initial_set, with_soft_labels, recipe

# ---- dataset block: all that differs between ROME_cifar10.py and ROME_cifar100.py --------------------------------------
DATASET_DEFAULTS = {"dataset": "CIFAR100", "num_eval": 20, "syn_ce": False, "ce_weight": 0.1}
CE_ONLY_WHILE_WRONG = False  # the published CIFAR-100 script applies the performance-aligned term always
REAL_KEPT = None  # the published CIFAR-100 script keeps a class's whole real batch
# ---- end of the dataset block --------------------------------------------------------------------------------------

LOG_INTERVAL = 10  # outer iterations


# ---------------------------------------------------------------------------------------------------------- the two losses
def robustness_aligned_loss(emb_syn, emb_adv_mean, distance="tv"):
    """Distance between mean embeddings. emb_syn: (N, D); emb_adv_mean: (D,).

    distance: "tv", squared total variation (Source: SPEC 1, L_rob), or "l2", the squared Euclidean distance that DM has.
    """
    difference = emb_syn.mean(0) - emb_adv_mean
    return (0.5 * difference.abs().sum()) ** 2 if distance == "tv" else difference.square().sum()


def performance_aligned_loss(logits, c, only_while_wrong):
    """Cross-entropy of synthetic images of class c; 0 for one that is right already if `only_while_wrong`.

    logits: (N, num_classes). Source: SPEC 1, L_perf.
    """
    loss = F.cross_entropy(logits, torch.full((len(logits),), c, device=logits.device), reduction="none")  # (N,)
    if only_while_wrong:
        loss = loss * (logits.argmax(1) != c)
    return loss.mean()


# ----------------------------------------------------------------------------------------------------- the outer iteration
def matching_step(image_syn, optimizer_img, member, data, threat, args, rng):
    """Step 3 for one pool network: every class takes its turn, each one optimiser step on the whole set (see runtime.lookahead).

    image_syn: (C*ipc, 3, H, W), changed in place. Returns (mean robustness-, mean performance-aligned loss), () tensors.
    """
    net, sub_images = member.net, args.ipc * args.pack**2
    only_while_wrong = CE_ONLY_WHILE_WRONG and sub_images == 1
    draws, emb_adv = robust_prior(net, data, threat, args, rng)  # it does not depend on the synthetic images
    images = lookahead_images(image_syn, optimizer_img, data.num_classes)  # nor do these on the network: all classes in one pass
    gradients, total_rob, total_perf = [], *torch.zeros(2, device=data.device)
    for classes in matching_groups(data, sub_images):  # as many at a time as the memory allows
        part = images[classes.start * args.ipc:classes.stop * args.ipc].requires_grad_()
        augmented = torch.cat([dsa_apply(unpack(x, args.pack), draws[c]) for c, x in zip(classes, part.split(args.ipc))])
        with freeze_parameters(net):
            embedded = [embed(net, x, args.embed_last) for x in augmented.split(data.micro_batch)]
        emb_syn, logits = (torch.cat(parts).split(sub_images) for parts in zip(*embedded))  # (ipc*pack*pack, ...) a class
        loss_rob = torch.stack([robustness_aligned_loss(e, emb_adv[c], args.align_distance) for c, e in zip(classes, emb_syn)])
        loss = args.align_weight * loss_rob.sum()
        total_rob += loss_rob.detach().sum()
        if args.syn_ce:
            loss_perf = sum(performance_aligned_loss(z, c, only_while_wrong) for c, z in zip(classes, logits))
            loss = loss + (1 - args.align_weight) * args.ce_weight * member.running_accuracy() * loss_perf
            total_perf += loss_perf.detach()
        gradients += torch.autograd.grad(loss, part)  # no image has a part in the loss of another class
    step_per_class(image_syn, optimizer_img, torch.cat(gradients), data.num_classes)
    distributed.broadcast_(image_syn.data)
    return total_rob / data.num_classes, total_perf / data.num_classes


def robust_prior(net, data, threat, args, rng):
    """Real batches of every class, augmented, attacked on `net`, and their mean embeddings. Of several processes each one
    attacks and embeds its share of the images.

    Returns the DSA draw of each class, shared with its synthetic images, and the embeddings, (C, D).
    """
    draws, emb_adv = [], []
    for classes in data.class_groups(args.batch_real):  # as many at a time as the memory allows
        chosen = [data.sample_class_indices(c, args.batch_real, rng["data"]) for c in classes]
        drawn = [dsa_draw(args.dsa_strategy, data.size, rng["dsa"]) for c in classes]
        chosen, drawn = draws_to_device(chosen, drawn, data.device)
        draws, batches = draws + drawn, []
        for c, index in zip(classes, chosen):
            img_real = dsa_apply(data.get_batch("train", index)[0], draws[c])  # (n, 3, H, W)
            if args.ipc == 1 and args.pack == 1 and REAL_KEPT and len(img_real) > REAL_KEPT:
                img_real = lowest_loss(net, img_real, c, REAL_KEPT)
            batches.append(img_real)
        sizes = [len(batch) for batch in batches]
        img_real, own = torch.cat(batches), distributed.shard(sum(sizes))  # (sum of sizes, 3, H, W)
        img_adv = img_real[own]
        if args.attack_prior:
            label_real = torch.cat([torch.full((n,), c, device=data.device) for c, n in zip(classes, sizes)])
            img_adv = attack(net, img_real, label_real, threat, generator=rng["attack"],
                             micro_batch=data.micro_batch, shard=own)
        with torch.no_grad():
            embeddings = torch.cat([graphed_call(lambda net, x: embed(net, x, args.embed_last)[:1], ("embed", args.embed_last), net,
                                         x)[0] for x in img_adv.split(data.micro_batch)])
        emb_adv.append(distributed.class_means(embeddings, sizes))  # (classes of this group, D)
    return draws, torch.cat(emb_adv)


@torch.no_grad()
def lowest_loss(net, img_real, c, count):
    """The `count` images of class c on which `net` has the lowest cross-entropy. img_real: (n, 3, H, W)."""
    logits = torch.cat([net(part) for part in img_real.split(512)])
    return img_real[(-F.log_softmax(logits, dim=1)[:, c]).topk(count, largest=False).indices]


def pool_step(members, data, threat, args, rng):
    """Step 4: train these networks of the pool on attacked real images; of several processes each one has its share of every
    batch. Returns the mean loss, a () tensor; 0 for none."""
    losses = [torch.zeros((), device=data.device)]
    chosen = [data.sample_indices(args.trained_bs, rng["data"]) for _ in range(len(members) * args.model_train_steps)]
    batches = iter(to_device_packed(chosen, data.device))
    for member in members:
        for _ in range(args.model_train_steps):
            img_real, label_real = data.get_batch("train", next(batches))
            seen, own = len(label_real), distributed.shard(len(label_real))
            img_adv = img_real[own]
            if args.attack_pool:
                img_adv = attack(member.net, img_real, label_real, threat, generator=rng["attack"],
                                 micro_batch=data.micro_batch, shard=own)
            loss, right = training_step(member.net, member.optimizer, img_adv, label_real[own], seen)
            member.record(right, seen)
            losses.append(loss)
    return torch.stack(losses).sum() / max(len(losses) - 1, 1)


def outer_iteration(it, image_syn, optimizer_img, pool, data, threat, args, rng):
    """Steps 2 to 4. Returns the mean losses and w_f as floats; raises FloatingPointError if one is not finite."""
    # 2. Renew the pool.
    if it % args.net_generate_interval == 0:
        pool.push(args.net_push_num)
    matched = pool.sample(args.train_net_num, rng["pool"], args.net_begin, args.net_end)
    trained = [] if pool.fixed else pool.sample(args.fetch_net_num, rng["pool"])
    with deferred_checks() as audits, use_cuda_graphs(args.cuda_graphs and data.device.type == "cuda"):
        for _ in range(args.outer_loop):
            # 3. Match the synthetic images to the robust prior of random pool networks.
            for member in matched:
                loss_rob, loss_perf = matching_step(image_syn, optimizer_img, member, data, threat, args, rng)
                w_f = member.running_accuracy()
            # 4. Train random pool networks on attacked real images.
            loss_net = pool_step(trained, data, threat, args, rng)
        losses = dict(zip(("loss_robustness", "loss_performance", "w_f", "loss_pool"),
                          audits.read([loss_rob, loss_perf, w_f, loss_net])))
    require_finite(losses)
    return losses


def distill(args, exp, data, threat, prior, evaluate, run, timer):
    """One experiment: distil a set; returns the best one as a dict: what `with_soft_labels` returns, iteration, evaluation rows."""
    rng = {name: make_generator(args.seed, exp, name) for name in ("data", "dsa", "pool")}
    rng["attack"] = make_generator(args.seed, exp, "attack", device=data.device)
    image_syn, label_syn = initial_set(args, data, make_generator(args.seed, exp, "init"), args.init, args.pack, exp)
    optimizer_img = image_optimizer(args, image_syn.requires_grad_())
    pool = utils.new_pool(args, exp, data, prior)
    evaluated_at = utils.evaluation_iterations(args)
    best, best_acc, it, evaluated = None, -1.0, 0, -1  # evaluated: the last iteration at which the set was

    def state():
        """All that the rest of the experiment depends on."""
        return {"it": it, "evaluated": evaluated, "best": best, "best_acc": best_acc, "image_syn": image_syn.detach(),
                "optimizer_img": optimizer_img.state_dict(), "pool": pool.state_dict(),
                "rng": {name: generator.get_state() for name, generator in rng.items()}}

    if run.experiment:  # an interrupted run has saved it
        saved = run.experiment
        it, evaluated, best, best_acc = (saved[key] for key in ("it", "evaluated", "best", "best_acc"))
        image_syn.data.copy_(saved["image_syn"])
        optimizer_img.load_state_dict(saved["optimizer_img"])
        pool.load_state_dict(saved["pool"])
        for name, generator in rng.items():
            generator.set_state(saved["rng"][name])
        timer.advance("iteration", it)
        timer.advance("evaluation", sum(i <= evaluated for i in evaluated_at))
    run.register_state(state)

    while True:
        run.checkpoint(it)
        # 1. Evaluate, keep the best set, start the running accuracies anew.
        if it in evaluated_at and it != evaluated:
            candidate = with_soft_labels(image_syn.detach().clone(), label_syn, pool, args, exp, data)
            rows = evaluate(SyntheticSet(*candidate["set"]), args.pack, exp, it, select=True)
            with run.delay_signals():
                select_acc = float(np.mean([row["select_acc"] for row in rows]))
                better = select_acc > best_acc or args.select == "last"
                run.report_evaluation(rows, exp=exp, iteration=it, set=args.method, best_so_far=better)
                utils.save_grids(run, f"syn_exp{exp}_it{it:05d}", image_syn.detach(), args.pack)
                if better:
                    best_acc, best = select_acc, {**candidate, "iteration": it, "rows": rows}
                    run.save_best(exp, best, recipe=recipe(args, [best["teachers"]]))
                pool.reset_running_accuracy()
                evaluated = it
            timer.step("evaluation")
            run.checkpoint(it)
        if it == args.Iteration:
            break
        with run.delay_signals():
            try:
                losses = outer_iteration(it, image_syn, optimizer_img, pool, data, threat, args, rng)
            except FloatingPointError as error:
                raise utils.diverged(error, args, exp, it) from None
            timer.step("iteration")
            if it % LOG_INTERVAL == 0:
                run.report_iteration(exp, it, losses, timer)
            it += 1

    utils.save_grids(run, f"best_exp{exp}", best["set"][0], args.pack)
    if args.select == "train":  # Deviation: fresh networks, so that the reported figure is not the maximum of several
        best["rows"] = evaluate(SyntheticSet(*best["set"]), args.pack, exp, "final")
        timer.step("report")
    return best


def image_optimizer(args, image_syn):
    """The optimiser of the synthetic images. Source: SPEC 1.1."""
    if args.optim == "sgd":
        return torch.optim.SGD([image_syn], lr=args.lr_img, momentum=0.5)
    return torch.optim.Adam([image_syn], lr=args.lr_img)


# -------------------------------------------------------------------------------------------------------------------- main
def main():
    args = parse_args()
    device = get_device(distributed.init(args), args.deterministic)
    set_precision(resolve_precision(args, device))
    data = load_dataset(args.dataset, args.data_path, device, args.chunk)
    utils.check_sizes(args, data)
    if args.zca:
        data.fit_zca()
    inputs = utils.describe_inputs(args, data)
    threat = get_threat_model(args.threat_model, data)
    prior = utils.load_robust_prior(args, data, inputs)
    with open_run(args, data) as run:
        if not run.finished:
            for line in inputs:
                run.log(line)
            run_experiments(args, data, threat, prior, run, ProgressTimer())


def run_experiments(args, data, threat, prior, run, timer):
    """--num_exp sets and their baselines, from where an interrupted run has stopped."""
    evaluate = utils.Evaluator(args, data, threat, run.map_dynamic)
    controls = len(baseline_packs(args))
    print_summary(args, data, threat, network_for(data, args.model, 0), evaluate, run, timer,
               evaluations=len(utils.evaluation_iterations(args)),
               reports=controls + (args.select == "train") + (args.labels == "prior") * (controls + 1))
    with tqdm(total=args.Iteration * args.num_exp, disable=None if distributed.is_main_process() else True, unit="it") as timer.bar:
        if args.parallel == "experiments":
            run.map_experiments(lambda exp, own: experiment(args, exp, data, threat, prior, evaluate, own, timer))
        else:
            done = len(run.progress.get("sets", []))
            timer.advance("iteration", done * args.Iteration)
            for exp in range(done, args.num_exp):
                experiment(args, exp, data, threat, prior, evaluate, run, timer)
    with run.delay_signals():
        run.save_result(evaluate.constant(), recipe(args, run.progress.get("teachers")))
        run.finish()


def experiment(args, exp, data, threat, prior, evaluate, run, timer):
    """One set and its baselines; what is known of them goes into the progress of the run."""
    # Evaluation rows by name of the set; the distilled sets; their teachers. All are saved with the state of the run.
    table, sets, teachers = (run.progress.setdefault(key, kind()) for key, kind in
                             (("table", dict), ("sets", list), ("teachers", list)))

    def report(name, one, pack_by):
        if len(table.get(name, [])) > len(sets) * evaluate.networks:
            return  # done before the interruption
        rows = evaluate(one, pack_by, exp, name)
        with run.delay_signals():
            run.report_evaluation(rows, exp=exp, set=name)
            table[name] = table.get(name, []) + rows
        timer.step("report")

    for name, (control, pack_by) in baseline_sets(args, exp, data).items():
        report(name, control, pack_by)
    best = distill(args, exp, data, threat, prior, evaluate, run, timer)
    if args.labels == "prior":
        for name, (control, pack_by) in baseline_sets(args, exp, data).items():
            report(f"{name}, prior labels", control._replace(soft_labels=best["controls"].get(name)), pack_by)
        report(f"{args.method}, hard labels", SyntheticSet(*best["set"])._replace(soft_labels=None), args.pack)
    with run.delay_signals():
        run.report_evaluation(best["rows"], exp=exp, iteration=best["iteration"], set=args.method, final=True)
        sets.append(best["set"])
        teachers.append(best["teachers"])
        table[args.method] = table.get(args.method, []) + best["rows"]
        run.register_state(None)


# ----------------------------------------------------------------------------------------------------------------- flags
def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add_dataset_flag(parser)
    add("--model", choices=NETWORKS, default="ConvNet", metavar="MODEL", help=f"one of {', '.join(NETWORKS)}")
    add("--ipc", type=at_least(1), default=50, help="images per class")
    add("--init", default="real", metavar="INIT", help="where the synthetic images start: real, noise, or the file of a set")
    add("--method", type=method_name, default="ROME", help="name in the files and tables, for instance of an ablation")
    add("--seed", type=at_least(0), default=0, help="governs everything that is random")
    add("--threat_model", choices=THREAT_MODELS, default="published",
        help="published: attacks as in the published code, on normalised images clamped to [0, 1]; pixel: a valid one")
    add_switch(parser, "aug", False, "each stored image holds 2x2 sub-images, or as many as --pack says (packing)")
    add("--pack", type=int, choices=PACKS, help="K: K x K sub-images in each stored image; implies --aug, whose default is 2")
    add("--labels", choices=("hard", "prior"), default="hard", help="hard: the class, as published; prior: with each "
        "(sub-)image the mean logits of the robust prior are stored (of --robust_prior, or of the pool), and trained on")
    add("--label_temperature", type=at_least(0.01, float), default=3.0, help="of the soft labels and of what learns them")
    add_switch(parser, "zca", False, "ZCA whitening of the data (needs kornia)")
    add("--dsa_strategy", default="color_crop_cutout_flip_scale_rotate", help="augmentations joined by '_', or none")

    loss = parser.add_argument_group("losses and the synthetic images")
    add = loss.add_argument
    add("--align_weight", type=fraction, default=0.2, help="robustness- against performance-aligned term, 0 to 1")
    add_switch(loss, "syn_ce", True, "use the performance-aligned term")
    add("--align_distance", choices=("tv", "l2"), default="tv", help="between mean embeddings: squared total variation or L2")
    add_switch(loss, "attack_prior", True, "match to attacked real images, not to clean ones")
    add("--ce_weight", type=at_least(0, float), help="weight inside the performance-aligned term")
    add("--embed_last", type=int, default=-1, help="the embedding is what features[:embed_last] computes; 1000 means all")
    add("--Iteration", type=at_least(0), default=20000, help="outer iterations")
    add("--outer_loop", type=at_least(1), default=1, help="rounds of image updates and network training per outer iteration")
    add("--batch_real", type=at_least(1), default=256, help="real images of each class per update")
    add("--lr_img", type=at_least(0, float), default=1.0, help="learning rate of the images")
    add("--optim", choices=("sgd", "adam"), default="sgd", help="optimiser of the images; sgd has momentum 0.5")

    pool = parser.add_argument_group("the pool of networks")
    add = pool.add_argument
    add("--robust_prior", nargs="+", default=[], metavar="FILE", help="networks of pretrain.py, in place of the pool")
    add_switch(pool, "attack_pool", True, "train the pool on attacked real images, not on clean ones")
    add("--net_num", type=at_least(1), default=100, help="most networks in the pool")
    add("--net_push_num", type=at_least(0), default=1, help="fresh networks pushed at a time")
    add("--net_generate_interval", type=at_least(1), default=30, help="outer iterations between two pushes")
    add("--net_begin", type=at_least(0), default=0, help="first pool network to choose from, if more than 10 remain")
    add("--net_end", type=at_least(0), default=100000, help="one past the last pool network to choose from, likewise")
    add("--train_net_num", type=at_least(1), default=2, help="networks that update the images per outer iteration")
    add("--fetch_net_num", type=at_least(0), default=2, help="networks that are trained per outer iteration")
    add("--model_train_steps", type=at_least(0), default=10, help="SGD steps for each of them")
    add("--trained_bs", type=at_least(1), default=256, help="real images in each of these steps")
    add("--lr_net", type=at_least(0, float), default=0.01, help="learning rate, here and in evaluation")
    add_switch(pool, "net_decay", False, "momentum 0.9 and weight decay 5e-4 for the pool")

    evaluation = parser.add_argument_group("evaluation")
    add = evaluation.add_argument
    add("--eval_mode", choices=EVAL_MODES, default="S", help="networks to evaluate with: S the same, M several, W widths, "
        "D depths, A activations, P poolings, N norms; all but S (SS) at the last iteration only")
    add("--num_exp", type=at_least(1), default=5, help="synthetic sets to distil")
    add("--num_eval", type=at_least(1), help="networks trained per evaluation")
    add("--epoch_eval_train", type=at_least(1), default=1000, help="epochs of training on the synthetic set")
    add("--batch_train", type=at_least(1), default=256, help="batch of that training")
    add("--lr_schedule", choices=LR_SCHEDULES, default="step", help="of --lr_net in that training: step is as published")
    add("--eval_interval", type=at_least(1), default=100, help="outer iterations between two evaluations")
    add("--select", choices=("train", "test", "last"), default="train", help="the set that is kept: the one of highest robust "
        f"accuracy on {utils.SELECT_IMAGES} fixed training images, or on the test images; or the last one, as in the published "
        "code")
    add("--test_limit", type=at_least(0), default=0, help="evaluate on the first so many test images; 0: all")
    add_switch(evaluation, "baseline", True, "evaluate randomly chosen real images at the same ipc too")
    add_run_flags(parser)
    add_compatibility_flags(parser)
    parser.set_defaults(**DATASET_DEFAULTS)
    args = parser.parse_args(argv)
    args.pack = args.pack or (2 if args.aug else 1)
    args.aug = args.pack > 1

    try:
        parse_dsa_strategy(args.dsa_strategy)
    except ValueError as error:
        parser.error(str(error))
    if args.init not in INITS and not Path(args.init).is_file():
        parser.error(f"--init {args.init} is no file, nor {' or '.join(INITS)}")
    if args.robust_prior and args.zca:
        parser.error("the networks of --robust_prior know no whitened images: leave out --zca")
    return args


if __name__ == "__main__":
    run_script(main)
