"""ROME on CIFAR-10: distil a data set into a few images a class that train robust networks.

    python ROME_cifar10.py --ipc 1 --aug ...      the published commands stand in command.txt
    python ROME_cifar10.py --dataset Digits --model ConvNetW32 --ipc 1 --Iteration 20    a trial

Source: "ROME is Forged in Adversity: Robust Distilled Datasets via Information Bottleneck", ICML
2025; SPEC 1. Distributed under the MIT licence.
"""
import argparse

import rome
from attacks import THREAT_MODELS
from augment import MIXES, dsa_strategy_flag
from datasets import add_dataset_flag
from experiment import Distillation, run_experiments
from networks import EVAL_MODES, NETWORKS
from runtime.command_line import (add_compatibility_flags, add_run_flags, add_switch, at_least,
                                  fraction, method_name, run_script)
from synsets import LR_SCHEDULES, init_flag, labels_flag
from utils import SELECT_IMAGES


def parse_args(argv=None):
    """Every number of the experiment. The defaults are the published ones (SPEC 1.2)."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add_dataset_flag(parser, "CIFAR10")
    add("--model", choices=NETWORKS, default="ConvNet", metavar="MODEL",
        help=f"one of {', '.join(NETWORKS)}")
    add("--ipc", type=at_least(1), default=50, help="images per class")
    add("--init", type=init_flag, default="real", metavar="INIT",
        help="where the synthetic images start: real, noise, or the file of a set")
    add("--method", type=method_name, default="ROME", help="name in files and tables")
    add("--seed", type=at_least(0), default=0, help="governs everything that is random")
    add("--dsa_strategy", type=dsa_strategy_flag, default="color_crop_cutout_flip_scale_rotate",
        help="augmentations joined by '_', or none")
    add_switch(parser, "zca", False, "ZCA whitening of the data (needs kornia)")
    add_switch(parser, "aug", False, "2x2 sub-images in each stored image (packing)")
    add("--pack", type=int, choices=(2, 4, 8), help="K x K sub-images instead; implies --aug")
    add("--labels", type=labels_flag, default="hard", metavar="LABELS", help="hard: the class, as "
        "published; stored: with each (sub-)image the mean logits of robust networks, of "
        "--robust_prior or of the pool; online: those of --robust_prior label what is trained on, "
        "after augmentation, --mix and --noise, and are stored with the set")
    add("--label_temperature", type=at_least(0.01, float), default=3.0,
        help="of soft labels and of what learns them")
    add("--mix", choices=MIXES, default="none", help="of images of a batch, with online labels")
    add("--noise", type=at_least(0, float), default=0.0,
        help="with online labels: standard deviation on images, in normalised units")

    group = parser.add_argument_group("losses and synthetic images")
    add = group.add_argument
    add("--Iteration", type=at_least(0), default=20000, help="outer iterations")
    add("--outer_loop", type=at_least(1), default=1, help="steps 3 and 4 in an outer iteration")
    add("--batch_real", type=at_least(1), default=256, help="real images of a class in a step")
    add("--align_weight", type=fraction, default=0.2,
        help="robustness- against performance-aligned term, 0 to 1 (the paper's alpha)")
    add("--align_distance", choices=("tv", "l2"), default="tv",
        help="between mean embeddings: squared total variation, or squared L2 as in DM")
    add_switch(group, "syn_ce", True, "use the performance-aligned term")
    add("--ce_weight", type=at_least(0, float), default=1.0, help="weight of that term")
    add_switch(group, "ce_only_while_wrong", True,
               "at 1 image a class, unpacked, that term rests while the image is right")
    add("--real_kept", type=at_least(0), default=2560, help="at 1 image a class, unpacked, so many "
        "real images of lowest loss after DSA are kept; 0: all")
    add("--embed_last", type=int, default=-1,
        help="the embedding is what features[:embed_last] computes; 1000 means all")
    add("--lr_img", type=at_least(0, float), default=1.0, help="learning rate of the images")
    add("--optim", choices=("sgd", "adam"), default="sgd", help="optimizer of the images")
    add("--momentum_img", type=fraction, default=0.5, help="of --optim sgd (SPEC 1.1)")

    group = parser.add_argument_group("the attack of distillation: PGD, targeted, random start")
    add = group.add_argument
    add("--threat_model", choices=THREAT_MODELS, default="published", help="published: attacks "
        "normalised images clamped to [0, 1], as the published code; pixel: a valid one")
    add("--attack_eps", type=at_least(0, float), default=8.0, help="L-inf radius in 1/255")
    add("--attack_step_size", type=at_least(0, float), help="in 1/255; default: 2 under pixel, "
        "255 * 2/225 under published (a published quirk)")
    add("--attack_steps", type=at_least(0), default=10, help="PGD steps")
    add_switch(group, "attack_prior", True, "match to attacked real images, not to clean ones")
    add_switch(group, "attack_pool", True, "train the pool on attacked images")

    group = parser.add_argument_group("the pool of networks")
    add = group.add_argument
    add("--robust_prior", nargs="+", default=[], metavar="FILE",
        help="networks of pretrain.py, in place of the pool")
    add("--net_start", type=at_least(1), default=3, help="networks at the start (SPEC 1.1)")
    add("--net_num", type=at_least(1), default=100, help="most networks in the pool")
    add("--net_push_num", type=at_least(0), default=1, help="fresh networks pushed at a time")
    add("--net_generate_interval", type=at_least(1), default=30,
        help="outer iterations between two pushes")
    add("--net_begin", type=at_least(0), default=0, help="first network that may be matched on")
    add("--net_end", type=at_least(0), default=100000, help="one past the last one")
    add("--net_slice_min", type=at_least(0), default=10,
        help="--net_begin and --net_end count if more than so many networks remain (SPEC 1.1)")
    add("--train_net_num", type=at_least(1), default=2, help="networks matched on in a round")
    add("--fetch_net_num", type=at_least(0), default=2, help="networks trained in a round")
    add("--model_train_steps", type=at_least(0), default=10, help="SGD steps for each of them")
    add("--trained_bs", type=at_least(1), default=256, help="real images in such a step")
    add("--lr_net", type=at_least(0, float), default=0.01, help="here and in evaluation")
    add_switch(group, "net_decay", False, "momentum 0.9 and weight decay 5e-4 for the pool")

    group = parser.add_argument_group("evaluation")
    add = group.add_argument
    add("--eval_mode", choices=EVAL_MODES, default="S", help="networks to evaluate with: S the "
        "same, M several, W widths, D depths, A activations, P poolings, N norms; all but S (SS) "
        "at the last iteration only")
    add("--num_exp", type=at_least(1), default=5, help="synthetic sets to distil")
    add("--num_eval", type=at_least(1), default=1, help="networks trained per evaluation")
    add("--epoch_eval_train", type=at_least(1), default=1000, help="epochs on the synthetic set")
    add("--batch_train", type=at_least(1), default=256, help="batch of that training")
    add("--lr_schedule", choices=LR_SCHEDULES, default="step", help="of --lr_net there")
    add("--warm_up", type=fraction, default=0.0, help="of a cosine: share of the steps")
    add("--ema", type=fraction, default=0.0, help="decay of averaged weights; 0: the last ones")
    add("--eval_interval", type=at_least(1), default=100, help="outer iterations between two")
    add("--select", choices=("train", "test", "last"), default="train", help="the set that is "
        f"kept: of highest robust accuracy on {SELECT_IMAGES} fixed training images, or on the "
        "test images, or the last one, as in the published code")
    add("--test_limit", type=at_least(0), default=0, help="the first so many test images; 0: all")
    add_switch(group, "baseline", True, "evaluate random real images at the same ipc too")
    add_run_flags(parser)
    add_compatibility_flags(parser)
    args = parser.parse_args(argv)
    args.pack = args.pack or (2 if args.aug else 1)
    args.aug = args.pack > 1
    return args


def distill(args, exp, setup):
    """Distil one synthetic set, from where an interrupted run has stopped; the best one."""
    data, threat, micro_batch = setup.data, setup.threat, setup.micro_batch
    state = Distillation(args, exp, setup)
    image_syn, optimizer_img, pool, rng = (state.image_syn, state.optimizer_img, state.pool,
                                           state.rng)
    while True:
        # 1. Evaluate, keep the best set, save a checkpoint.
        state.evaluate_if_due()
        if state.it == args.Iteration:
            return state.finish()
        with state.outer_iteration() as losses:
            # 2. Renew the pool.
            if state.it % args.net_generate_interval == 0:
                pool.push(args.net_push_num)
            matched = pool.sample(args.train_net_num, rng["pool"], args.net_begin, args.net_end)
            trained = pool.sample(args.fetch_net_num, rng["pool"]) if pool.is_trained else []
            for _ in range(args.outer_loop):
                # 3. Match the synthetic images to attacked real ones on random pool networks.
                for member in matched:
                    losses["loss_robustness"], losses["loss_performance"] = rome.matching_step(
                        image_syn, optimizer_img, member, data, threat, args, rng, micro_batch)
                    losses["w_f"] = member.running_accuracy()
                # 4. Train random pool networks on attacked real images.
                losses["loss_pool"] = rome.pool_step(trained, data, threat, args, rng, micro_batch)


def main():
    run_experiments(parse_args(), distill)


if __name__ == "__main__":
    run_script(main)
