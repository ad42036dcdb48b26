"""The robustness benchmark: attack networks, or networks trained on synthetic sets.

    python evaluate.py --synset result/ROME_res_ROME_CIFAR10_ConvNet_10ipc.pt --out result/rome10
    python evaluate.py --networks checkpoints/BACON_ConvNet_CIFAR10_50_None_0.6995.pth --limit 1000

Writes results.json and results.md into --out; --resume goes on with a killed run.
Source: BEARD (arXiv 2411.09265); SPEC 3. MIT licence.
"""
import argparse
import itertools
from contextlib import closing

from attack_grid import (GRIDS, QUERY, QUICK, QUICK_EPS, QUICK_TRAINING, attack_options, radii,
                         run_slice, typical_cost)
from attacks import (ATTACKS, PUBLISHED_CLASSES, THREAT_MODELS, TORCHATTACKS, check_threat_model,
                     find_attack, get_threat_model)
from augment import MIXES, dsa_strategy_flag
from datasets import add_dataset_flag, dataset_name, load_dataset
from formats.inputs import check_and_normalise, choose_dataset, choose_normalisation, read_inputs
from formats.synset_file import PACKS, SPACES
from networks import NETWORKS, network_for
from reporting.metrics import metrics_of, transfer_of
from reporting.records import check_rows
from reporting.results_md import results_markdown
from runtime import compilation, distributed
from runtime.autoattack import pyautoattack
from runtime.command_line import (add_gpu_flags, add_switch, at_least, fraction,
                                  method_name, run_script)
from runtime.cost import FORWARD, compile_planned, forward_backward_rate
from runtime.cuda_graphs import use_cuda_graphs
from runtime.device import choose_micro_batch, get_device
from runtime.measures import CONTROLS
from runtime.progress import format_duration
from runtime.safe_io import InputError, write_text
from runtime.tasks import Results, Task, run_tasks, warm_up
from sanity import run_sanity
from synsets import LR_SCHEDULES
from target_models import (TrainingPlan, control_of, read_labellers, read_networks,
                           target_from_network, targets_from_synset)

SLICE = 256  # images between two saves; 4 * SLICE for attacks that refill their batches
# A resumed run may change these: they add work and leave finished work as it is.
MAY_CHANGE = ("out", "resume", "device", "labels", "attacks", "threat_model", "untargeted", "eps",
              "grid", "control", "query", "transfer", "craft_on", "sanity", "compile",
              "cuda_graphs", "deterministic")


# ------------------------------------------------------------------------------------------ flags
def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_input_flags(parser.add_argument_group("what is attacked"))
    add_training_flags(parser.add_argument_group("training on a set (default: its recipe)"))
    add_attack_flags(parser.add_argument_group("attacks"))
    run = parser.add_argument_group("the run")
    add = run.add_argument
    add("--out", default="./result/evaluation", metavar="DIR", help="folder for the results")
    add("--resume", action="store_true", help="go on with the results in --out")
    add("--quick", action="store_true",
        help=f"minutes: one network, {QUICK['limit']} images, trained on {QUICK_TRAINING} images")
    add("--seed", type=at_least(0), default=0)
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add_switch(run, "compile", True, "torch.compile where it pays")
    add_gpu_flags(run)
    first, _ = parser.parse_known_args(argv)
    grid = first.grid or ("white-box" if first.attacks or first.threat_model else "headline")
    parser.set_defaults(**GRIDS[grid])
    if first.quick:
        parser.set_defaults(**QUICK)
        if grid == "headline":
            parser.set_defaults(eps=QUICK_EPS)
    args = parser.parse_args(argv)
    files = args.synset + args.networks
    if not files:
        parser.error("nothing to attack: give --synset or --networks")
    if len(args.method) not in (0, len(files)):
        parser.error(f"--method has {len(args.method)} name(s) for {len(files)} file(s)")
    args.attacks = [*args.attacks, *(QUERY if args.query else ())]
    return args


def add_input_flags(group):
    add, unsaid = group.add_argument, "where the files do not say it"
    add("--synset", nargs="+", default=[], metavar="FILE",
        help="synthetic sets to train networks on (docs/foreign_files.md)")
    add("--networks", nargs="+", default=[], metavar="FILE", help="networks (state_dicts)")
    add_dataset_flag(group, None, f"; {unsaid}, else CIFAR10")
    add("--model", choices=NETWORKS, metavar="MODEL", help=f"{unsaid}, else ConvNet")
    add("--method", nargs="+", default=[], metavar="NAME", type=method_name,
        help="a name for each file")
    add("--data_path", default="./data", help="folder of cifar10.npz, cifar100.npz")
    add("--limit", type=at_least(0), default=0, help="first N test images; 0: all")
    add_switch(group, "zca", False, f"ZCA-whitened images, {unsaid}")
    add("--network_mean", nargs="+", type=float, metavar="M",
        help="of the networks' images (pixels in [0, 1]: 0, std 1)")
    add("--network_std", nargs="+", type=at_least(1e-6, float), metavar="S")


def add_training_flags(group):
    add = group.add_argument
    add("--num_eval", type=at_least(1), default=5, help="networks trained on each set")
    add("--packed", nargs="?", type=int, choices=PACKS, const=2, default=1, metavar="K",
        help="K x K sub-images an image, where the files do not say it; no number: 2")
    add("--images", choices=SPACES, help="default: bytes are pixels, floats are normalised")
    add("--labels", nargs="+", choices=("own", "hard"), default=["own", "hard"],
        help="soft labels of a set, the classes alone")
    add("--epoch_eval_train", type=at_least(1))
    add("--batch_train", type=at_least(1))
    add("--lr_net", type=at_least(0, float))
    add("--dsa_strategy", type=dsa_strategy_flag)
    add("--lr_schedule", choices=LR_SCHEDULES)
    add("--label_temperature", type=at_least(0.01, float))
    add_switch(group, "control", False,
               "also random real images of the same number, with the same labels and training")
    add("--control_labels", nargs="+", default=[], metavar="FILE",
        help="networks that label the control of a set with stored labels")
    add("--labeller", nargs="+", default=[], metavar="FILE",
        help="networks of pretrain.py that label what is trained on, in place of a set's labels")
    add("--mix", choices=MIXES, help="of images of a batch, with labellers")
    add("--noise", type=at_least(0, float), help="on them, in normalised units")
    add("--warm_up", type=fraction, help="of a cosine: share of the steps in which --lr_net rises")
    add("--ema", type=fraction, help="decay of averaged weights; 0: the last ones")
    add("--precision", choices=(*compilation.PRECISIONS, "auto"), default="fp32")


def add_attack_flags(group):
    add = group.add_argument
    add("--threat_model", nargs="+", choices=THREAT_MODELS, default=[],
        help=f"default: both; only pixel below {PUBLISHED_CLASSES} classes")
    add("--grid", choices=GRIDS,
        help="what is measured (docs/evaluate.md); default: headline, with --attacks or "
             "--threat_model white-box")
    add("--attacks", nargs="+", metavar="ATTACK",
        help=f"of {', '.join(ATTACKS)}, or {TORCHATTACKS}NAME of any attack of that package")
    add("--query", action="store_true", help=f"also {', '.join(QUERY)}")
    add("--untargeted", action="store_true", help="no targeted attacks")
    add("--eps", nargs="+", type=at_least(0, float), default=[],
        help="radii in 1/255; default: 8 (L-inf), 128 (L2), AA under pixel 2, 4 and 8")
    add("--transfer", action="store_true", help="evaluate examples of each network on all")
    add("--craft_on", nargs="+", default=[], metavar="METHOD", help="attack these methods only")
    add("--aa_iterations", type=at_least(1), default=100, help="published benchmark: 10")
    add("--aa_limit", type=at_least(0), default=0, help="AA on the first N test images; 0: all")
    add("--queries", type=at_least(1), default=5000, help="of Square, also in AutoAttack")
    add("--attack_precision", choices=("fp32", "bf16"), default="fp32",
        help="accuracies are measured in fp32 (docs/evaluate.md)")
    add_switch(group, "sanity", True, "look for signs of a broken evaluation")


# ------------------------------------------------------------------------------------------- main
def main():
    args = parse_args()
    if args.sanity or {"AA", "Square"} & set(args.attacks):
        pyautoattack()  # raises InputError if it is missing
    device = get_device(distributed.init(vars(args)), args.deterministic)
    precision = compilation.resolve_precision(args.precision, device)
    inputs = read_inputs(args.synset, args.networks, NETWORKS, args.method, args.dataset,
                         args.model, args.packed)
    named = choose_dataset(args.dataset and dataset_name(args.dataset), inputs)
    data = load_dataset(args.dataset or named, args.data_path, device)
    # The same for all processes: random starts on CUDA depend on it.
    micro_batch = distributed.run_on_rank0(lambda: choose_micro_batch(device))
    methods = {source.method for source in inputs}
    if not set(args.craft_on) <= methods:
        raise InputError(f"--craft_on {' '.join(args.craft_on)}: the methods here are "
                         f"{', '.join(sorted(methods))}")
    threats = choose_threats(args.threat_model, data)
    check_attacks(args.attacks, threats)
    targets = check_inputs(args, inputs, data)
    if labellers := read_labellers(args.labeller, data):
        for source in filter(lambda source: source.synset, inputs):
            source.synset.sets = [one._replace(soft_labels=None, labellers=labellers)
                                  for one in source.synset.sets]
    if args.control:
        teachers = read_networks(args.control_labels, data)
        controls = [control_of(source, data, teachers, args.seed)
                    for source in inputs if source.synset]
        if taken := {one.method for one in inputs} & {one.method for one in controls}:
            raise InputError(f"{', '.join(taken)} is the name of a control too: give --method "
                             "other names, or --no_control")
        inputs += controls

    flags = {**vars(args), "dataset": data.name, "threat_model": list(threats),
             "precision": precision}
    graphs = use_cuda_graphs(args.cuda_graphs and device.type == "cuda", distributed.print_rank0)
    with graphs, closing(Results(args.out, flags, device, args.resume, MAY_CHANGE,
                                 check_rows)) as results:
        results.content |= {"num_classes": data.num_classes, "data": data.describe(), "inputs": {
            str(source.path): {"taken_as": source.description, "warnings": source.warnings}
            for source in inputs if not source.control}}
        for source in inputs:
            if source.synset:
                targets += targets_from_synset(source, data, results.folder / "networks",
                                               training_plan(args, precision))
        evaluate(args, targets, threats, data, micro_batch, results)


def training_plan(args, precision):
    given = {"epochs": args.epoch_eval_train, "lr_net": args.lr_net,
             "batch_train": args.batch_train, "dsa_strategy": args.dsa_strategy,
             "temperature": args.label_temperature, "lr_schedule": args.lr_schedule,
             "mix": args.mix, "noise": args.noise, "ema": args.ema,
             "warm_up": args.warm_up}
    return TrainingPlan(given, args.num_eval, args.labels, args.images, precision, args.compile,
                        args.seed, QUICK_TRAINING if args.quick else None)


def choose_threats(names, data):
    """{name: ThreatModel}; without names, of all that the data set allows."""
    if not names:
        names = THREAT_MODELS if data.num_classes >= PUBLISHED_CLASSES else ["pixel"]
    for name in names:
        check_threat_model(name, data)
    return {name: get_threat_model(name, data) for name in names}


def check_attacks(names, threats):
    """Raises InputError for an attack that is not known or not possible."""
    for name in names:
        find_attack(name)
        if name.startswith(TORCHATTACKS) and "published" in threats:
            raise InputError(f"{name} attacks images in [0, 1]: add --threat_model pixel")


def check_inputs(args, inputs, data):
    """Check and print the inputs, and let `data` normalise as they do. Returns the networks."""
    choose_normalisation(inputs, data, args.zca, network_normalisation(args, data.channel))
    targets = []
    for source in inputs:
        network_for(data, source.model, 0)  # raises InputError where the images are too small
        if not source.synset:
            targets.append(target_from_network(source, data))
        check_and_normalise(source, data, args.images)
        distributed.print_rank0(f"{source.path} taken as: {source.description}")
        for warning in source.warnings:
            distributed.print_rank0(f"warning: {warning}")
    return targets


def network_normalisation(args, channels):
    """(mean, std) of --network_mean and --network_std, for each channel; None without them."""
    given = args.network_mean or [], args.network_std or []
    if not any(given):
        return None
    if any(len(values) not in (1, channels) for values in given):
        raise InputError("--network_mean and --network_std: each with one number or one for each "
                         f"of {channels} channel(s)")
    return [values * (channels // len(values)) for values in given]


def evaluate(args, targets, threats, data, micro_batch, results):
    """Attack all networks, check them, and write the tables."""
    for target in targets:
        results.register(target)
    attacked = [target for target in targets
                if not args.craft_on or target.method in args.craft_on]
    plan = plan_tasks(args, targets, attacked, threats)
    if compilation.precision() != args.attack_precision:
        compilation.reset()
    compilation.set_precision(args.attack_precision)  # accuracies are in fp32: see run_slice
    test = data.get_batch("test", slice(args.limit or None))
    run_attacks(args, plan, targets, threats, test, data, micro_batch, results)
    compilation.set_precision("fp32")
    if args.sanity:
        run_sanity(attacked, threats, test, data, results, args.seed)

    rows = results.content["rows"]
    pooled = {name: get_threat_model(name) for name in THREAT_MODELS}  # also of an earlier run
    results.content |= {"metrics": metrics_of(rows, pooled, crei_weight=0.5),
                        "transfer": transfer_of(rows, pooled)}
    results.save()
    text = results_markdown(results.content)
    if distributed.is_main_process():
        write_text(results.folder / "results.md", text)
    distributed.print_rank0(text)


# ---------------------------------------------------------------------------------------- attacks
def plan_tasks(args, targets, attacked, threats):
    """{Task: networks to evaluate on, the attacked one first}; quick attacks come first."""
    plan = {}
    for control, threat, target in itertools.product(CONTROLS, threats, targets):
        plan[Task(target.name, threat, control)] = [target]
    order = [*ATTACKS, *args.attacks]
    for name in sorted(set(args.attacks), key=order.index):
        forms = [True, False] if find_attack(name).targetable and not args.untargeted else [False]
        for threat, targeted in itertools.product(threats, forms):
            for eps, target in itertools.product(radii(name, threats[threat], args.eps), attacked):
                others = [other for other in targets if args.transfer and other is not target]
                plan[Task(target.name, threat, name, targeted, eps)] = [target, *others]
    return plan


def run_attacks(args, plan, targets, threats, test, data, micro_batch, results):
    """Run the tasks that have no results yet, slice by slice of the test images."""
    waiting = {task: nets for task, nets in plan.items() if not results.has(task, nets)}
    slices = {task: cut(args, task.attack, test) for task in waiting}
    sizes = {task: [len(labels) for _, labels in parts] for task, parts in slices.items()}
    if args.compile:
        compile_attacks(args, waiting, targets, len(test[1]), data, micro_batch)
    effort = args.aa_iterations, args.queries
    passes = sum(typical_cost(task.attack, *effort) * sum(sizes[task]) for task in waiting)
    rate = forward_backward_rate(targets[0].net, data, micro_batch) * distributed.world_size()
    distributed.print_rank0(
        f"{len(targets)} network(s), {len(test[1])} test images of {data.name}: {len(waiting)} of "
        f"{len(plan)} attacks and controls to go, about {format_duration(passes / rate)}; results "
        f"in {results.folder}")
    for target in targets if waiting else ():
        warm_up(target.net, test[0][:min(micro_batch, slice_size(data.device))])

    def work(task, number):
        return run_slice(task, number, *slices[task][number], plan[task],
                         threats[task.threat_model], micro_batch, args.seed,
                         attack_options(task.attack, args.aa_iterations, args.queries))

    run_tasks(waiting, sizes, work, results)


def cut(args, attack, test):
    """The test images of an attack, in slices: [(images, labels), ...]."""
    size = slice_size(test[0].device)
    if attack in ("AA", "Deepfool"):  # they refill their batches
        size = 4 * SLICE
    limit = args.aa_limit if attack == "AA" else 0
    return list(zip(*(tensor[:limit or None].split(size) for tensor in test)))


def slice_size(device):
    """Images of an attack between two saves; small batches leave a GPU idle."""
    return 4 * SLICE if device.type == "cuda" else SLICE


def compile_attacks(args, tasks, targets, n, data, micro_batch):
    """Compile for the attacks that take whole batches, if there are enough of them."""
    batch, effort = min(micro_batch, slice_size(data.device)), (args.aa_iterations, args.queries)
    for model in dict.fromkeys(target.model for target in targets):
        nets = {target.name: target.net for target in targets if target.model == model}
        names = [task.attack for task in tasks if task.crafted_on in nets]
        attacked = sum(typical_cost(name, *effort) for name in names if name not in QUERY)
        scored = sum(0.2 * args.queries + (3 * args.aa_iterations if name == "AA" else 0)
                     for name in names if name in ("AA", "Square"))
        planned = {"attacked": {batch: n * attacked}, "scored": {batch: n * FORWARD * scored}}
        compile_planned(next(iter(nets.values())), data, planned, distributed.print_rank0)


if __name__ == "__main__":
    run_script(main)
