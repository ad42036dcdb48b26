"""The robustness benchmark: attack networks, or networks trained on synthetic sets, under two threat models.

    python evaluate.py --synset result/ROME_res_ROME_CIFAR10_ConvNet_10ipc.pt --out result/rome10
    python evaluate.py --networks checkpoints/BACON_ConvNet_CIFAR10_50_None_0.6995.pth --limit 1000 --out result/bacon

Writes results.json (every figure), results.md and pictures into --out. A run that was killed goes on with --resume.
Source: attacks and metrics of the BEARD benchmark (arXiv 2411.09265) and the ROME paper; SPEC 3. MIT licence.
"""
import argparse
import itertools
import time
from contextlib import closing
from importlib.util import find_spec

import torch
from tqdm import tqdm

import utils
from attacks import ATTACKS, PGD_STEPS, PUBLISHED_CLASSES, THREAT_MODELS, check_threat_model, craft, get_threat_model
from augment import parse_dsa_strategy
from runtime import distributed
from runtime.progress import duration
from runtime.command_line import add_dataset_flag, add_switch, at_least, fraction, method_name, run_script
from datasets import dataset_name, load_dataset
from runtime.device import device_name, get_device, synchronise
from runtime.compilation import PRECISIONS, resolve_precision, disable_bf16, set_precision, stop_compiling
from formats.inputs import check_and_normalise, choose_dataset, choose_normalisation, read_inputs
from runtime.tasks import Job, PassCounter, Results, run_tasks, warm_up
from reporting.plots import draw_results
from runtime.cost import FORWARD, compile_planned, forward_backward_rate
from runtime.measures import CONTROLS, HEADLINE_EPS
from runtime.safe_io import InputError, write_text
from runtime.checkpoint import Interrupted
from runtime.seeding import make_generator
from formats.synset_file import PACKS, SPACES
from reporting.metrics import QUERY, WHITE_BOX, metrics_of, transfer_of
from reporting.records import check_rows
from reporting.results_md import results_markdown
from networks import NETWORKS
from sanity import run_sanity
from synsets import LR_SCHEDULES, PROTOCOL
from target_models import check_normalisation, target_from_network, targets_from_synset

SLICE = 256  # images between two saves; four times as many of an attack that fills its batches anew: full to the last images
REFILLED = [name for name, attack in ATTACKS.items() if attack.batches]
# Flags that a resumed run may change: they add work and leave what is done as it is.
MAY_CHANGE = ("out", "resume", "device", "labels", "attacks", "threat_model", "targeted", "untargeted", "eps", "query",
              "transfer", "craft_on", "sanity", "crei_weight", "compile")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    what = parser.add_argument_group("what is attacked")
    add = what.add_argument
    add("--synset", nargs="+", default=[], metavar="FILE", help="synthetic sets, files or folders: fresh networks are trained "
        "on each (docs/foreign_files.md)")
    add("--networks", nargs="+", default=[], metavar="FILE", help="networks (state_dicts)")
    add_dataset_flag(what, None, "; default: what the files say, else CIFAR10")
    add("--model", choices=NETWORKS, metavar="MODEL", help="default: what the files say, else ConvNet")
    add("--method", nargs="+", default=[], metavar="NAME", type=method_name, help="a name for each file; default: what "
        "the file says")
    add("--data_path", default="./data", help="folder of cifar10.npz, cifar100.npz")
    add("--limit", type=at_least(0), default=0, metavar="N", help="the first N test images; 0: all")
    add_switch(what, "zca", False, "what does not say so itself is of ZCA-whitened images")
    add("--network_mean", nargs="+", type=float, metavar="M", help="networks that were trained on images normalised otherwise: "
        "the mean, one number or one a channel (0 with --network_std 1: on pixels in [0, 1])")
    add("--network_std", nargs="+", type=at_least(1e-6, float), metavar="S", help="and the standard deviation")

    training = parser.add_argument_group("training on a set")
    add = training.add_argument
    add("--num_eval", type=at_least(1), default=5, help="networks trained on each set")
    add("--packed", nargs="?", type=int, choices=PACKS, const=2, default=1, metavar="K", help="sets that do not say so "
        "themselves hold K x K sub-images in each image; without a number 2")
    add("--images", choices=SPACES, help="what the images of the sets are; default: bytes are pixels, floats normalised")
    add("--labels", nargs="+", choices=("own", "hard"), default=["own", "hard"], help="of a set with soft labels: train on "
        "those, or on the classes alone")
    said = "what the set's recipe says, else"
    add("--epoch_eval_train", type=at_least(1), help=f"epochs; default: {said} {PROTOCOL['epochs']}")
    add("--batch_train", type=at_least(1), help=f"batch; default: {said} {PROTOCOL['batch_train']}")
    add("--lr_net", type=at_least(0, float), help=f"learning rate; default: {said} {PROTOCOL['lr_net']}")
    add("--dsa_strategy", help=f"augmentations joined by '_', or none; default: {said} {PROTOCOL['dsa_strategy']}")
    add("--lr_schedule", choices=LR_SCHEDULES, help=f"default: {said} {PROTOCOL['lr_schedule']}")
    add("--label_temperature", type=at_least(0.01, float), help=f"of soft labels; default: {said} {PROTOCOL['temperature']}")
    add("--precision", choices=(*PRECISIONS, "auto"), default="fp32", help="of this training")
    add("--adv_train", action="store_true", help="train adversarially (PGD), once for each threat model")

    attack = parser.add_argument_group("attacks")
    add = attack.add_argument
    add("--threat_model", nargs="+", choices=THREAT_MODELS, help=f"default: all that the number of classes allows ("
        f"published: at least {PUBLISHED_CLASSES})")
    add("--attacks", nargs="+", choices=ATTACKS, default=list(WHITE_BOX), metavar="ATTACK",
        help=f"of {', '.join(ATTACKS)}")
    add("--query", action="store_true", help=f"the query attacks as well: {', '.join(QUERY)}")
    add("--targeted", action="store_true", help="the targeted form only; default: both where there are both")
    add("--untargeted", action="store_true", help="the untargeted form only")
    add("--eps", nargs="+", type=at_least(0, float), default=[], metavar="E",
        help="radii in 1/255, of the norm of each attack; default: 8 (L-inf), 128 (L2); under pixel AA at 2, 4 and 8")
    add("--transfer", action="store_true", help="evaluate all networks on what was crafted on each")
    add("--craft_on", nargs="+", default=[], metavar="METHOD", help="craft on the networks of these methods only")
    add("--aa_iterations", type=at_least(1), default=100, help="of AutoAttack's components (the published benchmark: 10)")
    add("--aa_limit", type=at_least(0), default=0, metavar="N", help="AA on the first N test images only; 0: on all")
    add("--queries", type=at_least(1), default=5000, help="of Square, alone and in AutoAttack")
    add("--attack_precision", choices=("fp32", "bf16"), default="fp32", help="what attacks compute in; accuracies "
        "are judged in fp32 (docs/evaluate.md)")
    add("--spsa_steps", type=at_least(1), default=1, help="of SPSA, 256 queries each")
    add_switch(attack, "sanity", True, "check every network for signs of a broken evaluation")

    run = parser.add_argument_group("the run")
    add = run.add_argument
    add("--out", default="./result/evaluation", metavar="DIR", help="folder for the results")
    add("--resume", action="store_true", help="go on with the results in --out")
    add("--seed", type=at_least(0), default=0, help="governs everything that is random")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add_switch(run, "compile", True, "torch.compile for the batches of which there are enough to pay for it")
    add("--crei_weight", type=fraction, default=0.5, help="of RR against AE in CREI, 0 to 1")
    args = parser.parse_args(argv)

    try:
        parse_dsa_strategy(args.dsa_strategy or "none")
    except ValueError as error:
        parser.error(str(error))
    files = args.synset + args.networks
    if not files:
        parser.error("nothing to attack: give --synset or --networks")
    if args.method and len(args.method) != len(files):
        parser.error(f"--method has {len(args.method)} name(s) for {len(files)} file(s)")
    if args.query:
        args.attacks += [name for name in QUERY if name not in args.attacks]
    if args.targeted and not args.untargeted and not any(ATTACKS[name].targetable for name in args.attacks):
        parser.error(f"{', '.join(args.attacks)}: no targeted form; leave out --targeted")
    if args.eps and not any(ATTACKS[name].eps for name in args.attacks):
        parser.error(f"{', '.join(args.attacks)}: no attack that --eps bounds")
    if (args.network_mean is None) != (args.network_std is None):
        parser.error("--network_mean and --network_std go together")
    for name in ("attacks", "threat_model", "eps", "labels"):  # named twice is named once
        setattr(args, name, list(dict.fromkeys(getattr(args, name) or [])))
    return args


# ------------------------------------------------------------------------------------------------------------ the jobs
def plan(args, targets, threats):
    """All jobs, the quick attacks first, so that a table is soon there. threats: {name: ThreatModel}."""
    forms = [form for form, asked in ((True, args.targeted), (False, args.untargeted)) if asked] or [True, False]
    jobs = [Job(v.name, threat, attack) for attack in CONTROLS for threat in threats for v in targets
            if v.threat in (None, threat)]
    for attack, spec in ATTACKS.items():
        if attack not in args.attacks:
            continue
        for threat, targeted in itertools.product(threats, forms if spec.targetable else [False] * (False in forms)):
            radii = [None] if not spec.eps else [eps / 255 for eps in args.eps] or (
                HEADLINE_EPS if attack == "AA" and threat == "pixel" else [spec.eps(threats[threat])])
            jobs += [Job(v.name, threat, attack, targeted, eps) for eps in radii for v in crafting(args, targets, threat)]
    return jobs


def crafting(args, targets, threat):
    """The networks that adversarial examples are crafted on."""
    return [v for v in targets if v.threat in (None, threat) and (not args.craft_on or v.method in args.craft_on)]


def evaluated(args, job, targets):
    """The networks that a job's adversarial examples are evaluated on, the crafting one first."""
    own = next(v for v in targets if v.name == job.crafted_on)
    others = [v for v in targets if v is not own and v.threat in (None, job.threat_model)]
    return [own] + (others if args.transfer and job.attack not in CONTROLS else [])


def attack_options(args, attack):
    """What the flags say to an attack; no random start in the grid (SPEC 3.2)."""
    return {"PGD": {"random_start": False}, "AA": {"iterations": args.aa_iterations, "queries": args.queries},
            "Square": {"queries": args.queries}, "SPSA": {"steps": args.spsa_steps}}.get(attack, {})


def typical_cost(args, attack):
    """Image-gradients that an image takes, for the estimate at the start; what gives up images early varies widely."""
    return {"FGSM": 1, "PGD": PGD_STEPS, "PGD20": 2 * PGD_STEPS, "PGD_L2": PGD_STEPS, "CW": 60, "Deepfool": 12,
            "AA": 10 * args.aa_iterations + 0.2 * FORWARD * args.queries, "Square": 0.5 * FORWARD * args.queries,
            "SPSA": 256 * FORWARD * args.spsa_steps}.get(attack, FORWARD)


# ---------------------------------------------------------------------------------------------------------- one attack
def run_slice(job, number, x, labels, targets, threat, micro_batch, args):
    """One slice of test images: attack, evaluate, measure.

    targets: the networks to evaluate on, the crafting one first. micro_batch: images attacked at a time.
    Returns plain numbers: right answers by evaluated network, n, seconds (attack, and evaluation on the crafting network),
    forward and backward passes of the attack (in images), max_linf, max_l2 (attack space).
    """
    own, *others = targets
    counter = PassCounter(own.net).eval()
    rng = make_generator(args.seed, *map(str, vars(job).values()), number, device=x.device)
    synchronise(x.device)
    start = time.perf_counter()
    linf = l2 = torch.zeros(1)
    if job.attack == "Clean":
        x_adv = x
    elif job.attack == "Clamp-only":
        x_adv = threat.clamp_only(x)
    else:
        options = {"targeted": job.targeted, "eps": job.eps, "generator": rng, "micro_batch": micro_batch}
        options |= attack_options(args, job.attack)
        x_adv, linf, l2 = craft(counter, x, labels, threat, job.attack, **options)
        again = utils.wrong_in_bf16_alone(own.net, x_adv, labels, micro_batch)
        if again.any():
            with disable_bf16():
                x_adv[again], linf[again], l2[again] = craft(counter, x[again], labels[again], threat, job.attack, **options)
    with torch.no_grad():  # the networks as they are, not `forward`: in fp32
        correct = {own.name: int((own.net(x_adv).argmax(1) == labels).sum())}  # to int: waits for the device
        seconds = time.perf_counter() - start
        correct |= {v.name: int((v.net(x_adv).argmax(1) == labels).sum()) for v in others}
    return {"correct": correct, "n": len(labels), "seconds": seconds, "forward": counter.forward_passes,
            "backward": counter.backward_passes, "max_linf": float(linf.max()), "max_l2": float(l2.max())}


# ---------------------------------------------------------------------------------------------------------------- main
def main():
    args = parse_args()
    if (args.sanity or {"AA", "Square"} & set(args.attacks)) and find_spec("pyautoattack") is None:
        raise InputError("AA, Square and the sanity checks need the package pyautoattack; without it choose other --attacks, "
                         "with --no_sanity")
    resolve_precision(args, device := get_device(distributed.init(args)))
    inputs = read_inputs(args.synset, args.networks, NETWORKS, args.method, args.dataset, args.model,
                         args.packed)
    named = choose_dataset(args.dataset and dataset_name(args.dataset), inputs)
    data = load_dataset(args.dataset or named, args.data_path, device)
    data.micro_batch = distributed.run_on_rank0(lambda: data.micro_batch)  # another one draws other random numbers on CUDA
    for flag in ("limit", "aa_limit"):
        if getattr(args, flag) > len(data.labels["test"]):
            raise InputError(f"--{flag} {getattr(args, flag)} is more than the {len(data.labels['test'])} test images")
    methods = list(dict.fromkeys(one.method for one in inputs))
    if not set(args.craft_on) <= set(methods):
        raise InputError(f"--craft_on {' '.join(args.craft_on)}: the methods here are {', '.join(methods)}")
    if not args.threat_model:
        args.threat_model = [name for name in THREAT_MODELS if name != "published" or data.num_classes >= PUBLISHED_CLASSES]
    for name in args.threat_model:
        check_threat_model(name, data)
    choose_normalisation(inputs, data, args.zca, network_normalisation(args, data.channel))
    targets = []
    for one in inputs:
        utils.check_network(one.model, data)
        if not one.synset:
            targets.append(target_from_network(one, data))
            one.warnings += check_normalisation(targets[-1], data)
        check_and_normalise(one, data, args.images)
        for line in (f"{one.path} taken as: {one.description}", *(f"warning: {warning}" for warning in one.warnings)):
            distributed.print_rank0(line)

    flags = {**vars(args), "dataset": data.name}
    with closing(Results(args, flags, device, MAY_CHANGE, check_rows)) as results:  # nothing is written before here
        results.content |= {"num_classes": data.num_classes, "data": data.describe(), "inputs": {
            str(one.path): {"taken_as": one.description, "warnings": one.warnings} for one in inputs}}
        try:
            run(args, inputs, targets, data, results)
        except (KeyboardInterrupt, Interrupted):
            distributed.print_rank0(f"{results.folder} has what was done so far; --resume goes on with it")
            raise


def network_normalisation(args, channels):
    """(mean, std) of --network_mean and --network_std, for each channel; None without them."""
    if args.network_mean is None:
        return None
    given = [value * channels if len(value) == 1 else value for value in (args.network_mean, args.network_std)]
    if any(len(value) != channels for value in given):
        raise InputError(f"--network_mean, --network_std: one number, or one for each of {channels} channel(s)")
    return given


def run(args, inputs, targets, data, results):
    """Train what is to be trained, attack everything, write tables and pictures."""
    for one in inputs:
        if one.synset:
            targets += targets_from_synset(args, one, data, results.folder / "networks")
    if args.precision != args.attack_precision:
        stop_compiling()
    set_precision(args.attack_precision)  # the accuracies: see run_slice
    for target in targets:
        results.register(target)

    threats = {name: get_threat_model(name, data) for name in args.threat_model}
    test = data.get_batch("test", slice(args.limit or None))
    jobs = plan(args, targets, threats)
    limits = {"AA": args.aa_limit or len(test[1])}  # test images of an attack, where not all
    waiting = [job for job in jobs if not results.has(job, evaluated(args, job, targets))]
    interrupted = results.unfinished()["job"]
    waiting.sort(key=lambda job: vars(job) != interrupted)  # that one first, before another one takes its place
    if args.compile:
        compile_attacks(args, waiting, targets, len(test[1]), data)
    rate = forward_backward_rate(targets[0].net, data)
    counts = {job: min(limits.get(job.attack, len(test[1])), len(test[1])) for job in waiting}
    cost = sum(typical_cost(args, job.attack) * n for job, n in counts.items())
    distributed.print_rank0(f"{len(targets)} network(s) on {device_name(data.device)}, {len(test[1])} test images of {data.name}: "
                 f"{len(jobs)} attacks and controls, {len(jobs) - len(waiting)} of them done, about "
                 f"{duration(cost / rate / distributed.world_size())} to go; results in {results.folder}")
    run_jobs({job: counts[job] for job in waiting}, targets, threats, test, data, args, results)
    set_precision("fp32")
    if args.sanity:
        attacked = [(name, target) for name in threats for target in crafting(args, targets, name)]
        run_sanity(attacked, threats, test, data, results, args.seed)

    content = results.content
    threats = {name: get_threat_model(name, data) for name in THREAT_MODELS
               if any(row["threat_model"] == name for row in content["rows"])}  # an earlier part of the run may have had more
    content["metrics"] = metrics_of(content["rows"], threats, args.crei_weight)
    content["transfer"] = transfer_of(content["rows"], threats)
    results.save()
    text = results_markdown(content)
    if distributed.is_main_process():
        write_text(results.folder / "results.md", text)
        draw_results(content, results.folder)
    distributed.print_rank0(text)


def compile_attacks(args, jobs, targets, n, data):
    """Compile for the attacks that take whole batches, if there are enough of them."""
    for model in dict.fromkeys(v.model for v in targets):
        nets = {v.name: v.net for v in targets if v.model == model}
        there = [job.attack for job in jobs if job.crafted_on in nets]
        attacked = n * sum(typical_cost(args, attack) for attack in there if attack not in ("Square", "SPSA"))
        scored = n * FORWARD * sum(0.2 * args.queries + 3 * args.aa_iterations * (attack == "AA")
                                   for attack in there if attack in ("AA", "Square"))  # FAB looks at each of its steps
        batch = min(data.micro_batch, SLICE)
        compile_planned([*nets.values()][0], data, {"attacked": {batch: attacked}, "scored": {batch: scored}}, distributed.print_rank0)


def run_jobs(counts, targets, threats, test, data, args, results):
    """Attack the test images slice by slice. counts: {Job: how many of them}."""
    parts = {job: list(zip(*(tensor[:n].split(4 * SLICE if job.attack in REFILLED else SLICE) for tensor in test)))
             for job, n in counts.items()}
    warm = set()  # jobs

    def work(job, number):
        own, *others = evaluated(args, job, targets)
        if job not in warm:
            warm_up(own.net, parts[job][0][0], data.micro_batch)
            warm.add(job)
        return run_slice(job, number, *parts[job][number], [own, *others], threats[job.threat_model], data.micro_batch, args)
    with tqdm(total=sum(counts.values()), unit="img", disable=distributed.disable_tqdm()) as bar:
        run_tasks({job: (evaluated(args, job, targets), [len(labels) for _, labels in parts[job]]) for job in counts}, work,
                results, data.name, args.seed, bar)


if __name__ == "__main__":
    run_script(main)
