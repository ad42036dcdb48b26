"""What stands around the outer loop: set-up, the state of a set, baselines, cost, reports.

A script calls `run_experiments(parse_args(), distill)`; `distill` is its loop, on a `Distillation`.
"""
import collections
import dataclasses
from contextlib import contextmanager

import numpy as np
import torch
from tqdm import tqdm

import utils
from attacks import check_threat_model, get_threat_model
from augment import unpack
from datasets import load_dataset
from formats.synset_file import MAX_LABELLERS, SyntheticSet, save_synset
from network_pool import load_prior_networks
from networks import NETWORKS, network_for
from rome import (attack_options, image_optimizer, make_generators, make_pool, matching_groups,
                  sub_images)
from runtime import cost, distributed
from runtime.compilation import resolve_precision, set_precision
from runtime.cuda_graphs import use_cuda_graphs
from runtime.device import choose_micro_batch, device_name, get_device, has_bf16, versions
from runtime.measures import COLUMNS, KILOBYTES, by_model, kilobytes, percent
from runtime.perturbation import deferred_checks
from runtime.progress import ProgressTimer
from runtime.run_directory import RunDirectory
from runtime.safe_io import InputError
from runtime.seeding import make_generator
from runtime.training import require_finite
from synsets import (INITS, baseline_packs, baseline_set, class_major, describe_pool_networks,
                     describe_prior_networks, initial_set, load_initial_sets, stored_labellers,
                     soft_labels)

LOG_INTERVAL = 10  # outer iterations
NO_EFFECT = ("fresh", "save_interval", "parallel")  # flags that do not change the result


@dataclasses.dataclass(frozen=True)
class Setup:
    """What all experiments of a run have in common, beside `args`."""

    data: object  # a Dataset
    threat: object  # a ThreatModel
    prior: list  # [(network, robust training accuracy), ...] of --robust_prior
    evaluator: utils.Evaluator
    run: object  # a RunDirectory
    timer: ProgressTimer
    micro_batch: int  # images attacked at a time


class Distillation:
    """One synthetic set under way: what an outer iteration changes and a checkpoint holds.

    best: the best set so far, plain values: set, [images, labels, soft labels or None]; baselines,
    {name: soft labels}; teachers, what is known of the networks that gave them; iteration; rows.
    """

    def __init__(self, args, exp, setup):
        self.args, self.exp, self.setup = args, exp, setup
        data = setup.data
        self.rng = make_generators(args, exp, data.device)
        self.image_syn, self.label_syn = initial_set(
            data, args.ipc, args.pack, args.init, make_generator(args.seed, exp, "init"), exp)
        self.optimizer_img = image_optimizer(args, self.image_syn.requires_grad_())
        self.pool = make_pool(args, exp, data, setup.prior)
        self.evaluations = evaluation_iterations(args)
        self.it, self.evaluated_at, self.best, self.best_acc = 0, -1, None, -1.0
        if setup.run.register_state(self):
            setup.timer.advance("iteration", self.it)
            evaluated = sum(it <= self.evaluated_at for it in self.evaluations)
            setup.timer.advance("evaluation", evaluated)

    def state_dict(self):
        return {"it": self.it, "evaluated_at": self.evaluated_at, "best": self.best,
                "best_acc": self.best_acc, "image_syn": self.image_syn.detach(),
                "optimizer_img": self.optimizer_img.state_dict(), "pool": self.pool.state_dict(),
                "rng": {name: generator.get_state() for name, generator in self.rng.items()}}

    def load_state_dict(self, state):
        for name in ("it", "evaluated_at", "best", "best_acc"):
            setattr(self, name, state[name])
        self.image_syn.data.copy_(state["image_syn"])
        self.optimizer_img.load_state_dict(state["optimizer_img"])
        self.pool.load_state_dict(state["pool"])
        for name, generator in self.rng.items():
            generator.set_state(state["rng"][name])

    def evaluate_if_due(self):
        """Step 1: evaluate the set, keep it if it is the best, reset the running accuracies."""
        args, run = self.args, self.setup.run
        run.save_if_due(self.it)
        if self.it not in self.evaluations or self.it == self.evaluated_at:
            return
        candidate = self.with_labels()
        rows = self.setup.evaluator(SyntheticSet(*candidate["set"]), args.pack, self.exp, self.it,
                                    select=True)
        with run.delay_signals():
            select_acc = float(np.mean([row["select_acc"] for row in rows]))
            better = select_acc > self.best_acc or args.select == "last"
            report_evaluation(run, rows, exp=self.exp, iteration=self.it, set=args.method,
                              best_so_far=better)
            save_grids(run, f"syn_exp{self.exp}_it{self.it:05d}", self.image_syn.detach(),
                       args.pack)
            if better:
                self.best_acc = select_acc
                self.best = {**candidate, "iteration": self.it, "rows": rows}
                self.save_best()
            self.pool.reset_running_accuracy()
            self.evaluated_at = self.it
        self.setup.timer.step("evaluation")
        run.save_if_due(self.it)

    @contextmanager
    def outer_iteration(self):
        """Around steps 2 to 4: signals wait, checks of attacks and losses are read at the end.

        Yields a dict for the losses, {name: () tensor}. Raises FloatingPointError, with
        the flags that may help, if one is not finite.
        """
        args, setup, losses = self.args, self.setup, {}
        with setup.run.delay_signals():
            try:
                with deferred_checks() as checks:
                    yield losses
                    values = dict(zip(losses, checks.read(list(losses.values()))))
                require_finite(values)
            except FloatingPointError as error:
                raise diverged(error, args, self.exp, self.it) from None
            setup.timer.step("iteration")
            if self.it % LOG_INTERVAL == 0:
                report_iteration(setup, self.exp, self.it, args.Iteration, values)
            self.it += 1

    def finish(self):
        """The best set, measured on fresh networks where the evaluations have selected it."""
        args, setup = self.args, self.setup
        save_grids(setup.run, f"best_exp{self.exp}", self.best["set"][0], args.pack)
        if args.select == "train":  # Deviation: what is reported is no maximum of several
            synset = SyntheticSet(*self.best["set"])
            self.best["rows"] = setup.evaluator(synset, args.pack, self.exp, "final")
            setup.timer.step("report")
        return self.best

    def with_labels(self):
        """The set as it is now; with --labels stored its soft labels and the baselines', with
        --labels online the networks that label."""
        args, data = self.args, self.setup.data
        images = self.image_syn.detach().clone()
        if args.labels == "hard":
            return {"set": [images, self.label_syn, None], "baselines": {}, "teachers": []}
        networks = [member.net for member in self.pool.members]
        if args.robust_prior:
            teachers = describe_prior_networks(args.robust_prior)
        else:
            teachers = describe_pool_networks(self.pool.members, args.model, args.threat_model)
        if args.labels == "online":
            labellers = stored_labellers(networks, args.model)
            return {"set": [images, self.label_syn, None, labellers], "baselines": {},
                    "teachers": teachers}

        def label(images, pack_by):
            return soft_labels(networks, unpack(images, pack_by), self.setup.micro_batch)
        return {"set": [images, self.label_syn, label(images, args.pack)], "teachers": teachers,
                "baselines": {name: label(synset.images, pack_by) for name, synset, pack_by
                              in baselines(args, self.exp, data)}}

    def save_best(self):
        if not distributed.is_main_process():
            return
        best = self.best
        meta = set_meta(self.args, self.setup.data, [best["teachers"]],
                        iteration=best["iteration"])
        save_synset(self.setup.run.checkpoint_folder / f"best_exp{self.exp}.pt",
                    [SyntheticSet(*best["set"])], best["rows"], meta)


def evaluation_iterations(args):
    """The outer iterations at whose start the set is evaluated.

    Deviation: always the last one too, which the published code misses where --Iteration is no
    multiple of --eval_interval, or --eval_mode is none of S and SS.
    """
    regular = ()
    if args.eval_mode in ("S", "SS"):
        regular = range(args.eval_interval, args.Iteration, args.eval_interval)
    return {*regular, args.Iteration}


def diverged(error, args, exp, it):
    """The FloatingPointError that says where, with which flags, and what may help."""
    names = ("lr_img", "optim", "ce_weight", "align_weight", "lr_net")
    flags = " ".join(f"--{name} {getattr(args, name)}" for name in names)
    return FloatingPointError(
        f"{error} (experiment {exp}, iteration {it}; {flags}); smaller learning rates may help, "
        "with --fresh: the state saved before is kept, but the same flags lead from there to here")


# ------------------------------------------------------------------------------- the whole of a run
def run_experiments(args, distill):
    """Set up, distil --num_exp sets beside their baselines, write files and the table.

    distill: the loop of a script, (args, exp, Setup) -> the best set, `Distillation.best`.
    """
    device = get_device(distributed.init(vars(args)), args.deterministic)
    precision = resolve_precision(args.precision, device)
    set_precision(precision)
    data = load_dataset(args.dataset, args.data_path, device)
    check_args(args, data)
    if args.zca:
        data.fit_zca()
    threat, lines = get_threat_model(args.threat_model, data), describe_inputs(args, data)
    prior, more_lines = load_prior_networks(args.robust_prior, args.model, data, threat.name)
    with RunDirectory(name=run_name(args, data), save_path=args.save_path,
                  result_name=f"ROME_res_{args.method}_{data.name}_{args.model}_{args.ipc}ipc.pt",
                  checkpoint_path=args.checkpoint_path, data=data,
                  flags={**vars(args), "precision": precision},
                  micro_batch=choose_micro_batch(device, args.chunk),
                  save_interval=args.save_interval, fresh=args.fresh) as run:
        if run.finished:
            return
        for line in lines + more_lines:
            run.log(line)
        evaluator = utils.Evaluator(args, data, threat, run.micro_batch, run.map_dynamic)
        setup = Setup(data, threat, prior, evaluator, run, ProgressTimer(), run.micro_batch)
        print_summary(args, setup, precision)
        graphs = use_cuda_graphs(args.cuda_graphs and device.type == "cuda", run.log)
        with graphs, tqdm(total=args.Iteration * args.num_exp, unit="it",
                          disable=distributed.disable_tqdm()) as setup.timer.bar:
            _all_experiments(args, setup, distill)
        with run.delay_signals():
            if distributed.is_main_process():
                save_result(args, setup)
            run.finish()


def _all_experiments(args, setup, distill):
    if args.parallel == "experiments":
        setup.run.map_experiments(args.num_exp, lambda exp, run: experiment(
            args, exp, dataclasses.replace(setup, run=run), distill))
        return
    done = len(setup.run.progress.get("sets", []))
    setup.timer.advance("iteration", done * args.Iteration)
    for exp in range(done, args.num_exp):
        experiment(args, exp, setup, distill)


def experiment(args, exp, setup, distill):
    """One set and its baselines. What is known goes into the progress of the run:

    table: {name of the set: evaluation rows}; sets: the distilled ones; teachers: of each set.
    """
    run, progress = setup.run, setup.run.progress
    table, sets = progress.setdefault("table", {}), progress.setdefault("sets", [])
    teachers = progress.setdefault("teachers", [])

    def report(name, synset, pack_by, seed_key=None):
        if len(table.get(name, [])) > len(sets) * setup.evaluator.num_networks:
            return  # done before the interruption
        rows = setup.evaluator(synset, pack_by, exp, seed_key or name)
        with run.delay_signals():
            report_evaluation(run, rows, exp=exp, set=name)
            table[name] = table.get(name, []) + rows
        setup.timer.step("report")

    for name, synset, pack_by in baselines(args, exp, setup.data):
        report(name, synset, pack_by)
    best = distill(args, exp, setup)
    if args.labels != "hard":
        ours = SyntheticSet(*best["set"])
        for name, synset, pack_by in baselines(args, exp, setup.data):
            soft = synset._replace(soft_labels=best["baselines"].get(name),
                                   labellers=ours.labellers)
            # The old name of "stored", so that the seeds stay.
            seed_key = f"{name}, {'prior' if args.labels == 'stored' else args.labels} labels"
            report(f"{name}, {args.labels} labels", soft, pack_by, seed_key)
        hard = ours._replace(soft_labels=None, labellers=[])
        report(f"{args.method}, hard labels", hard, args.pack)
    with run.delay_signals():
        report_evaluation(run, best["rows"], exp=exp, iteration=best["iteration"],
                          set=args.method, final=True)
        sets.append(best["set"])
        teachers.append(best["teachers"])
        table[args.method] = table.get(args.method, []) + best["rows"]
        run.register_state(None)


def baselines(args, exp, data):
    """(name, SyntheticSet, how it is packed) of each baseline of an experiment."""
    packs = baseline_packs(args.pack) if args.baseline else {}
    return [(name, baseline_set(name, pack_by, data, args.ipc, args.seed, exp), pack_by)
            for name, pack_by in packs.items()]


def run_name(args, data):
    return (f"{args.method}_{data.name}_{args.model}_{args.ipc}ipc_{args.threat_model}"
            f"_seed{args.seed}")


def describe_inputs(args, data):
    """How the data and, with --init FILE, that set were understood, as lines."""
    lines = [data.describe()]
    if args.init not in INITS:
        source = load_initial_sets(args.init, data, args.ipc, args.pack)
        lines += [f"{args.init} taken as: {source.description}",
                  *(f"warning: {warning}" for warning in source.warnings)]
    return lines


def check_args(args, data):
    """Raise InputError for sizes that this data set or this network cannot serve."""
    check_threat_model(args.threat_model, data)
    if args.robust_prior and args.zca:
        raise InputError("the networks of --robust_prior know no whitened images: leave out --zca")
    net = network_for(data, args.model, 0)
    has_batch_norm = any(isinstance(layer, torch.nn.BatchNorm2d) for layer in net.modules())
    if has_batch_norm and not args.robust_prior:
        others = ", ".join(name for name in NETWORKS if not name.endswith("BN"))
        raise InputError(f"--model {args.model} has BatchNorm, which the pool does not admit (an "
                         "embedding would depend on the batch around it); choose one of "
                         f"{others}, or --robust_prior")
    if not range(len(net.features))[:args.embed_last]:
        raise InputError(f"--embed_last {args.embed_last} leaves none of the {len(net.features)} "
                         f"layers of {args.model}; 1000 means all")
    if any(side % args.pack for side in data.size):
        raise InputError(f"--pack {args.pack}: images of {data.size[0]}x{data.size[1]} cannot be "
                         "cut into so many")
    check_class_sizes(args, data)
    check_labels(args)
    if args.test_limit > len(data.labels["test"]):
        raise InputError(f"--test_limit {args.test_limit} is more than the "
                         f"{len(data.labels['test'])} test images")
    check_shards(args, data)


def check_labels(args):
    untrained = 0 in (args.Iteration, args.fetch_net_num, args.model_train_steps)
    if args.labels == "stored" and untrained and not args.robust_prior:
        raise InputError("--labels stored: no network to give the labels; with --Iteration, "
                         "--fetch_net_num or --model_train_steps 0 the pool is not trained: name "
                         "networks with --robust_prior")
    if args.labels == "online" and not 0 < len(args.robust_prior) <= MAX_LABELLERS:
        raise InputError(f"--labels online: give 1 to {MAX_LABELLERS} networks with --robust_prior")
    for name in ("mix", "noise"):
        if getattr(args, name) not in ("none", 0) and args.labels != "online":
            raise InputError(f"--{name} changes images, which --labels {args.labels} cannot "
                             "follow; it goes with --labels online")


def check_class_sizes(args, data):
    needed = sub_images(args)
    for c in range(data.num_classes):
        if data.class_size(c) == 0:
            raise InputError(f"--dataset {data.name}: class {data.classes[c]} has no training "
                             "image")
        if data.class_size(c) < needed and (args.init == "real" or args.baseline):
            packing = f" with {args.pack}x{args.pack} packing" if args.pack > 1 else ""
            raise InputError(f"--ipc {args.ipc}{packing} takes {needed} real images of each class; "
                             f"class {data.classes[c]} has {data.class_size(c)}: choose a smaller "
                             "--ipc, or --init noise --no_baseline")


def check_shards(args, data):
    """Every process must have something to do."""
    if args.parallel == "experiments":
        distributed.require_work(args.num_exp, "experiments (--num_exp)")
        return
    for classes in data.class_groups(args.batch_real):
        images = sum(min(args.batch_real, data.class_size(c)) for c in classes)
        distributed.require_work(images, "real images (--batch_real)")
    if not args.robust_prior and args.fetch_net_num and args.model_train_steps:
        distributed.require_work(min(args.trained_bs, len(data.labels["train"])),
                                 "images of the pool's batches (--trained_bs)")


# ------------------------------------------------------------------------------- what it will cost
def print_summary(args, setup, precision):
    """Say what the run will do and, from a short measurement, how long it will take."""
    data, threat, run = setup.data, setup.threat, setup.run
    net = network_for(data, args.model, 0).train(not args.robust_prior)  # as those of the pool
    work = batches_to_compile(args, setup)
    if args.compile:
        cost.compile_planned(net, data, work, run.log, args.embed_last)
    [(batch, _)] = (work["attacked"] + work["trained"]).most_common(1)
    rate = cost.forward_backward_rate(net, data, batch)
    passes, flops = iteration_passes(args, data), 2 * cost.forward_flops(net, data.channel,
                                                                         data.size)
    evaluations, reports = plan_phases(args, setup, passes, rate)
    stored, attack = args.ipc * data.num_classes, attack_options(args, threat)
    run.log(f"{run.name} on {device_name(data.device)}, {distributed.world_size()} process(es): "
            f"{len(data.labels['train'])} training, {len(data.labels['test'])} test images of "
            f"{data.num_classes} classes; threat model {threat.name}, eps "
            f"{255 * attack['eps']:.3g}/255, step {255 * attack['step_size']:.3g}/255")
    run.log(f"{args.num_exp} set(s) of {stored} stored images ({stored * args.pack**2} "
            f"sub-images), {args.Iteration} iterations each, {evaluations + reports} evaluations "
            f"each of {setup.evaluator.num_networks} network(s)")
    run.log(f"an iteration: {passes:.0f} forward-backward passes of {flops / 1e9:.3g} GFLOP = "
            f"{passes * flops / 1e12:.3g} TFLOP; measured {rate:.0f} passes/s; estimated "
            f"{setup.timer} in all")
    if precision != "bf16" and has_bf16(data.device):
        run.log("--precision bf16: this device has instructions for it, several times as fast "
                "(docs/performance.md)")
    small = sum(data.class_size(c) < args.batch_real for c in range(data.num_classes))
    if small:
        run.log(f"--batch_real {args.batch_real} is more than {small} of the classes have: all "
                "their images are used")


def iteration_passes(args, data):
    """Forward-backward passes of an outer iteration."""
    real = sum(min(args.batch_real, data.class_size(c)) for c in range(data.num_classes))
    steps = 0 if args.robust_prior else args.fetch_net_num * args.model_train_steps
    trained = steps * min(args.trained_bs, len(data.labels["train"]))
    matching = args.train_net_num * real * (args.attack_steps if args.attack_prior else 0.5)
    training = trained * (args.attack_pool * args.attack_steps + 1)
    return args.outer_loop * (matching + training)


def plan_phases(args, setup, passes, rate):
    """Tell the timer what this process will do. passes: of an iteration; rate: of passes, in 1/s.

    Returns how many sets an experiment evaluates to select one, and how many more to report.
    """
    timer, evaluator = setup.timer, setup.evaluator
    num_baselines = len(baseline_packs(args.pack)) if args.baseline else 0
    evaluations = len(evaluation_iterations(args))
    reports = num_baselines + (args.select == "train")
    if args.labels != "hard":
        reports += num_baselines + 1
    experiments, processes = args.num_exp, distributed.world_size()
    networks = distributed.max_shard_size(evaluator.num_networks)
    if args.parallel == "experiments":
        experiments, processes = distributed.max_shard_size(args.num_exp), 1
        networks = evaluator.num_networks
    seconds = networks / evaluator.num_networks / rate
    trained_on = sub_images(args) * setup.data.num_classes
    timer.add_phase("iteration", args.Iteration * experiments, passes / processes / rate)
    timer.add_phase("evaluation", evaluations * experiments,
                    evaluator.cost(trained_on, select=True) * seconds)
    timer.add_phase("report", reports * experiments, evaluator.cost(trained_on) * seconds)
    return evaluations, reports


def batches_to_compile(args, setup):
    """The batches of `cost.HORIZON` outer iterations and one evaluation, by kind and size.

    --Iteration has no part in it: a run that is given more iterations later computes the same as
    one that had them from the start. All processes compile for the largest shard.
    """
    data, micro_batch = setup.data, setup.micro_batch
    shard = distributed.max_shard_size if args.parallel == "batch" else int
    work = collections.defaultdict(collections.Counter)

    def add(kind, images, passes):
        work[kind].update(cost.micro_batches(images, micro_batch, passes))

    rounds = cost.HORIZON * args.outer_loop
    updates = rounds * args.train_net_num
    steps = 0 if args.robust_prior else rounds * args.fetch_net_num * args.model_train_steps
    pool_batch = shard(min(args.trained_bs, len(data.labels["train"])))
    for classes in data.class_groups(args.batch_real):
        real = shard(sum(min(args.batch_real, data.class_size(c)) for c in classes))
        add("attacked", real * args.attack_prior, args.attack_steps * updates)
        add("embedded", real, cost.FORWARD * updates)
    add("attacked", pool_batch * args.attack_pool, args.attack_steps * steps)
    tested = args.test_limit or len(data.labels["test"])
    add("attacked", tested, setup.threat.eval_cost * args.num_eval)
    for classes in matching_groups(args, data.num_classes, micro_batch):
        add("matched", len(classes) * sub_images(args), updates)
    work["trained"][pool_batch] += cost.TRAINING_STEP * pool_batch * steps
    on_sets = cost.training_batches(data.num_classes * sub_images(args), args.batch_train,
                                    args.num_eval * (args.epoch_eval_train + 1))
    work["trained"].update(on_sets)
    if args.labels == "online":
        for size, passes in on_sets.items():
            work["scored"][size] += (passes * cost.FORWARD / cost.TRAINING_STEP
                                     * len(args.robust_prior))
    return work


# ------------------------------------------------------------------------------- what it reports
def report_iteration(setup, exp, it, iterations, losses):
    """losses: {name: float}; w_f in percent."""
    setup.run.log_metrics("iteration", exp=exp, iteration=it, **losses)
    setup.run.log(f"exp {exp} it {it}/{iterations}  robustness-aligned "
                  f"{losses['loss_robustness']:.4g}  performance-aligned "
                  f"{losses['loss_performance']:.4g}  w_f {losses['w_f']:.2f} %  pool "
                  f"{losses['loss_pool']:.4g}  {setup.timer}")


def report_evaluation(run, rows, **values):
    """Rows of an Evaluator, for each network name: a line on the screen, one in metrics.jsonl."""
    where = " ".join(name if value is True else f"{name} {value}"
                     for name, value in values.items() if value is not False)
    for model, columns in by_model(rows).items():
        run.log_metrics("evaluation", **values, model=model, **columns)
        figures = [f"{name} {percent(columns[key])}" for key, name
                   in {**COLUMNS, "select_acc": "select"}.items() if key in columns]
        run.log(f"{where}, {model}: " + "  ".join(figures))


def save_grids(run, name, images, pack_by):
    """The images as <name>.png; of packed ones the sub-images too, as <name>_unpacked.png."""
    run.save_grid(name, images)
    if pack_by > 1:
        run.save_grid(f"{name}_unpacked", class_major(unpack(images, pack_by), len(images)))


def recipe(args, teachers):
    """How to train on the sets of this run. teachers: of each set, what gave its labels."""
    return {**dataclasses.asdict(utils.train_config(args)), "optimizer": "SGD", "momentum": 0.9,
            "weight_decay": 5e-4, "labels": args.labels, "pack": args.pack, "model": args.model,
            "teachers": teachers}


def set_meta(args, data, teachers, **more):
    """What a file says of its sets. Source: SPEC 3.5."""
    flags = {name: value for name, value in vars(args).items() if name not in NO_EFFECT}
    return {"run": run_name(args, data), "dataset": data.name, "classes": data.classes,
            "mean": list(data.mean), "std": list(data.std), "packed": args.aug, "pack": args.pack,
            "zca": args.zca, "threat_model": args.threat_model, "seed": args.seed, "flags": flags,
            "versions": versions(), "device": device_name(data.device), **more,
            "recipe": recipe(args, teachers)}


def save_result(args, setup):
    """The final file of sets, and the table: every set, and a constant classifier."""
    run, data = setup.run, setup.data
    table, sets = run.progress["table"], [SyntheticSet(*one) for one in run.progress["sets"]]
    meta = set_meta(args, data, run.progress["teachers"])
    save_synset(run.result_file, sets, table[args.method], meta)
    run.publish()
    first = table[args.method][0]
    measured, width = [key for key in COLUMNS if key in first], max(24, *map(len, table))
    header = " ".join(f"{COLUMNS[key]:>15}" for key in measured)
    run.log(f"\n{data.name}, {args.ipc} image(s) per class, threat model {args.threat_model}, "
            f"{args.num_exp} set(s) x {args.num_eval} network(s), {first['n']} test images; "
            "accuracy in percent, mean +- std\n"
            f"{'set':<{width}} {'network':<12} {header}  {KILOBYTES}")
    for name, rows in {"constant classifier": setup.evaluator.constant(), **table}.items():
        for model, columns in by_model(rows).items():
            run.log_metrics("final", set=name, model=model, **columns)
            figures = " ".join(f"{percent(columns[key]):>15}" for key in measured)
            run.log(f"{name:<{width}} {model:<12} {figures}  {kilobytes(columns.get('bytes'))}")
    run.log(f"\nset: {run.result_file}, also as {run.published_file}\nrun: {run.folder}")
    if data.device.type == "cuda":
        gibibytes = torch.cuda.max_memory_reserved(data.device) / 2**30
        run.log(f"GPU memory: {gibibytes:.1f} GiB at most")
