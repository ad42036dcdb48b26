"""Files of others: each is understood rightly, or a warning or an error tells what it may be.

The rules: docs/foreign_files.md.
"""

import json
import re
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from PIL import Image

import evaluate
import export
import utils
from augment import pack, unpack
from datasets import load_dataset
from formats.image_checks import seams
from formats.inputs import (check_and_normalise, choose_dataset, choose_normalisation, read_input,
                            read_inputs)
from formats.network_file import load_into
from formats.synset_file import SyntheticSet, read_synset, save_synset
from networks import NETWORKS, get_network
from runtime.safe_io import InputError
from synsets import TrainConfig, load_initial_sets, load_synset
from target_models import TargetModel, check_normalisation

ATTACK = "--threat_model pixel --attacks FGSM --untargeted --no_sanity --limit 100 --num_eval 1"
TRAINING = "--model MLP --epoch_eval_train 15 --lr_net 0.02 --dsa_strategy none"
QUICK = [*ATTACK.split(), *TRAINING.split()]
LABELS = torch.arange(10).repeat_interleave(10)


def main(script, *arguments):
    """A script in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, arguments)])
        script.main()


def run(out, *arguments):
    """evaluate.py: the content of results.json, and results.md."""
    main(evaluate, "--out", out, *arguments)
    return json.loads((out / "results.json").read_text()), (out / "results.md").read_text()


def clean(content, method=None):
    rows = [row for row in content["rows"] if row["attack"] == "Clean"]
    (accuracy,) = {row["accuracy"] for row in rows if method in (None, row["method"])}
    return accuracy


def write_set(path, images, labels=LABELS, **meta):
    torch.save({"data": [[images, labels]], "meta": meta}, path)
    return path


def understood(path, data, images=None, zca=False, **flags):
    """A set, or a .pth, as evaluate.py understands it: an Input."""
    files = ([], [path]) if path.suffix == ".pth" else ([path], [])
    (entry,) = read_inputs(*files, NETWORKS, **flags)
    choose_normalisation([entry], data, zca)
    check_and_normalise(entry, data, images)
    return entry


def real_images(data, ipc=10):
    generators = [torch.Generator().manual_seed(c) for c in range(10)]
    return torch.cat([data.sample_class(c, ipc, generators[c]) for c in range(10)])


@pytest.fixture(scope="module")
def digit_images(digits):
    return real_images(digits)


# ------------------------------------------------------------------------------- the whole command
@pytest.fixture(scope="module")
def evaluated(digits, digit_images, tmp_path_factory):
    """One run of evaluate.py on a set as it should be, as pixels, and with permuted labels."""
    folder = tmp_path_factory.mktemp("evaluated")
    paths = [folder / f"res_{name}_Digits_MLP_10ipc.pt" for name in ("Good", "Pixels", "Permuted")]
    write_set(paths[0], digit_images)
    write_set(paths[1], digits.denormalize(digit_images))
    write_set(paths[2], digit_images, (LABELS + 3) % 10)
    return paths, *run(folder / "out", "--synset", *paths, *QUICK)


def test_the_report_warns_of_what_looks_wrong(evaluated, tmp_path):
    """With --images the accuracy is that of the set as it should be, and nothing is warned of."""
    paths, content, text = evaluated
    assert clean(content, "Good") > 0.5 and clean(content, "Permuted") < 0.1
    warnings = text.split("## Warnings")[1]
    assert "Good_Digits" not in warnings
    assert "look like pixels in [0, 1]; --images pixels converts them" in warnings
    assert "no better than that of a constant classifier (10 %)" in warnings
    for path in paths:
        taken = content["inputs"][str(path)]["taken_as"]
        assert taken.startswith("Digits, normalised with mean [0.3054") and taken in text
    path = tmp_path / paths[0].name  # its name is a part of the seeds
    path.write_bytes(paths[1].read_bytes())
    again, text = run(tmp_path / "out", "--synset", path, *QUICK, "--images", "pixels")
    assert clean(again) == pytest.approx(clean(content, "Good"), abs=0.02)
    assert text.rstrip().endswith("## Warnings\n\n- none")


def test_a_set_keeps_its_own_normalisation(digits, digit_images, tmp_path):
    """Test images are normalised as the meta of the set declares."""
    pixels, constants = digits.denormalize(digit_images), {"mean": [0.5] * 3, "std": [0.25] * 3}
    path = write_set(tmp_path / "res_RDED_Digits_MLP_10ipc.pt", (pixels - 0.5) / 0.25, **constants)
    content, text = run(tmp_path / "out", "--synset", path, *QUICK)
    assert f"normalised with mean {[0.5] * 3}, std {[0.25] * 3}" in text and clean(content) > 0.5
    (about,) = content["networks"].values()
    net = load_into(get_network("MLP", 3, 10, (32, 32), 0), about["file"])
    test = digits.images["test"][:100].float() / 255
    assert clean(content) == utils.accuracy(net, (test - 0.5) / 0.25, digits.labels["test"][:100])


def test_a_network_of_other_pixels(digits, tmp_path):
    """A network that knows pixels in [0, 1] is right with --network_mean 0 --network_std 1."""
    net = get_network("MLP", 3, 10, (32, 32), 0)
    config = TrainConfig(epochs=3, lr_net=0.05, batch_train=64, dsa_strategy="none")
    pixels, labels = digits.images["train"].float() / 255, digits.labels["train"]
    generator = torch.Generator().manual_seed(0)
    utils.train_on_set(net, pixels, labels, config, generator)
    path = tmp_path / "DM_MLP_Digits_10_None.pth"
    torch.save(net.state_dict(), path)
    flags = ["--networks", path, *QUICK, "--limit", 0, "--network_std", 1, "--network_mean"]
    content, text = run(tmp_path / "right", *flags, 0)
    right = utils.accuracy(net, digits.images["test"].float() / 255, digits.labels["test"])
    assert clean(content) == pytest.approx(right, abs=1e-9) and text.rstrip().endswith("- none")
    assert "for images normalised with mean [0.0, 0.0, 0.0]" in text
    with pytest.raises(InputError, match="one for each of 3 channel"):
        run(tmp_path / "x", *flags, 0, 0)


@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (0.5, 0.5), (0.3054, 0.3237)])
def test_a_network_that_was_made_for_other_values(digits, mean, std):
    """It knows the test images, and only if they are normalised its way."""
    known = (digits.images["test"].float() / 255 - mean) / std

    def net(x):
        right = torch.isclose(x, known[: len(x)], atol=1e-3).flatten(1).all(1)
        return F.one_hot(torch.where(right, digits.labels["test"][: len(x)], 0), 10)

    target = TargetModel("a.pth", "A", 10, "MLP", net, meta={"file": "a.pth"})
    found = "a.pth classifies 10 % of 360 test images as they are normalised here, 100 % with"
    constants = f"mean {mean:g}, std {std:g}: --network_mean {mean:g} --network_std {std:g}"
    expected = [] if mean == 0.3054 else [f"{found} {constants}"]
    assert check_normalisation(target, digits) == expected


@pytest.mark.parametrize("scale, shift, space", [
    (1, 0, r"pixels in \[0, 1\]"),
    (255, 0, "pixels from 0 to 255"),
    (2, -1, r"images in \[-1, 1\]"),
])
def test_pixels_in_place_of_normalised_images(digits, digit_images, tmp_path, scale, shift, space):
    stored = scale * digits.denormalize(digit_images) + shift
    path = write_set(tmp_path / "res_DM_Digits_MLP_10ipc.pt", stored)
    entry = understood(path, digits)
    expected = f"taken as normalised images, but its values .* look like {space}"
    assert re.search(expected, entry.warnings[0])
    assert torch.equal(entry.synset.sets[0].images, stored)
    if shift:
        with pytest.raises(InputError, match=r"holds images in \[-1, 1\].*leave out"):
            understood(path, digits, "pixels")
        return
    entry = understood(path, digits, "pixels")
    assert torch.allclose(entry.synset.sets[0].images, digit_images, atol=1e-5)
    assert not entry.warnings and not understood(path, digits, "normalised").warnings
    line = f"Digits, normalised with mean .*, not packed, hard labels, from {space}"
    assert re.fullmatch(line, entry.description)
    with pytest.warns(UserWarning, match="look like pixels"):
        load_synset(path)
    images, labels, config = load_synset(path, images="pixels")
    assert torch.allclose(images, digit_images, atol=1e-5) and torch.equal(labels, LABELS)
    assert config == TrainConfig()
    with pytest.raises(InputError, match="there is no 1"):
        load_synset(path, 1)


def test_bytes_are_pixels(digits, digit_images, tmp_path):
    """Also where one set of the file is dark."""
    pixels = (digits.denormalize(digit_images) * 255).round().to(torch.uint8)
    path = tmp_path / "res_DM_Digits_MLP_10ipc.pt"
    torch.save({"data": [[pixels // 200, LABELS], [pixels, LABELS]]}, path)
    entry = understood(path, digits)
    assert torch.allclose(entry.synset.sets[1].images, digit_images, atol=1e-5)
    assert "from pixels from 0 to 255" in entry.description and not entry.warnings
    with pytest.raises(InputError, match="holds pixels from 0 to 255"):
        understood(path, digits, "normalised")


def smooth_images(count):
    """Images as smooth as photographs."""
    noise = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return F.interpolate(noise, (32, 32), mode="bicubic") + 0.05 * torch.randn(count, 3, 32, 32)


@pytest.mark.parametrize("packed, count", [(1, 10), (2, 10), (4, 100)])
def test_seams_between_sub_images(packed, count):
    assert seams(pack(smooth_images(count * packed**2), packed))[0] == packed
    for images in torch.zeros(count, 3, 32, 32), torch.randn(100, 3, 32, 32):
        assert seams(images) == (1, 1.0) == seams(images[:, :, :20])


@pytest.mark.parametrize("packed", [1, 2, 4, 8])
def test_seams_on_real_images(cifar10_npz, packed):
    data = load_dataset("CIFAR10", cifar10_npz)
    for seed in range(5):
        images = data.sample_class(seed, 10 * packed**2, torch.Generator().manual_seed(seed))
        assert seams(pack(images, packed))[0] == packed


def test_a_packed_set_that_does_not_declare_it(tmp_path, digits):
    path = write_set(tmp_path / "res_DM_Digits_MLP_10ipc.pt", pack(smooth_images(400), 2))
    expected = "taken as not packed, but its images look packed 2x2 .*--packed 2 unpacks"
    assert re.search(expected, understood(path, digits).warnings[0])
    entry = understood(path, digits, packed=2)
    assert not entry.warnings and "packed 2x2" in entry.description
    (warning,) = understood(path, digits, packed=4).warnings
    assert "taken as packed 4x4, but its images look packed 2x2" in warning


# ------------------------------------------------------------------------------- ZCA, normalisation
@pytest.fixture(scope="module")
def small(digits, tmp_path_factory):
    """The digits as a user's data set of 16x16 grey pixels, whose whitening is fitted in 20 ms."""
    pytest.importorskip("kornia")
    arrays = {f"y_{split}": labels.numpy() for split, labels in digits.labels.items()}
    for split, images in digits.images.items():
        pixels = F.interpolate(images[:, :1].float(), (16, 16), mode="area")[:, 0]
        arrays[f"x_{split}"] = pixels.round().byte().numpy()
    path = tmp_path_factory.mktemp("small") / "small.npz"
    np.savez(path, **arrays)
    return path


@pytest.fixture(scope="module")
def whitened(small):
    """The data set, whitened, and ten images a class."""
    data = load_dataset(small, "")
    data.fit_zca()
    return data, real_images(data)


def test_a_whitened_set_by_flag(small, whitened, tmp_path):
    """Its network sees whitened test images: the accuracy is that of a training by hand."""
    data, images = whitened
    path = write_set(tmp_path / "res_MTT_small_MLP_10ipc.pt", images)
    flags = ["--dataset", small, "--zca", "--epoch_eval_train", 50, "--lr_net", 0.1]
    content, text = run(tmp_path / "out", "--synset", path, *QUICK, *flags)
    assert "small, ZCA-whitened, not packed, hard labels" in text
    (about,) = content["networks"].values()
    net = get_network("MLP", 1, 10, (16, 16), about["seed_init"])
    config = TrainConfig(epochs=50, lr_net=0.1, dsa_strategy="none")
    generator = torch.Generator().manual_seed(about["seed_train"])
    utils.train_on_set(net, images, LABELS, config, generator)
    accuracy = utils.accuracy(net, *data.get_batch("test", slice(100)))
    assert clean(content) == pytest.approx(accuracy, abs=0.011) and accuracy > 0.4


@pytest.mark.parametrize("is_whitened, zca, expected", [
    (True, False, "taken as normalised images, but its .* look like ZCA-whitened images; --zca"),
    (True, True, None),
    (False, True, "taken as ZCA-whitened images, but its values.* normalised images"),
])
def test_whitening_that_is_not_declared(small, whitened, tmp_path, is_whitened, zca, expected):
    """The values of whitened images are small."""
    data = load_dataset(small, "")
    path = write_set(tmp_path / "set.pt", whitened[1] if is_whitened else real_images(data))
    warnings = understood(path, data, zca=zca, dataset="small").warnings
    assert re.search(expected, warnings[0]) if expected else not warnings


@pytest.mark.parametrize("names, zca, message", [
    (["white", "net"], False, "white.pt is ZCA-whitened, .*net.pth is normalised.*of their own"),
    (["white", "plain"], False, "white.pt is ZCA-whitened, .*plain.pt is normalised.*of their own"),
    (["plain", "other"], False, "plain.pt is normalised .*0.3.*other.pt is .* .0.5.*of their own"),
    (["ordinary"], True, "says that it is not ZCA-whitened; leave out --zca"),
])
def test_files_of_different_normalisations(digits, digit_images, tmp_path, names, zca, message):
    metas = {"white": {"zca": True}, "plain": {}, "other": {"mean": [0.5] * 3, "std": [0.25] * 3},
             "ordinary": {"zca": False}}
    sets = [write_set(tmp_path / f"{name}.pt", digit_images, **metas[name])
            for name in names if name in metas]
    torch.save({}, tmp_path / "net.pth")
    networks = [tmp_path / "net.pth"] * ("net" in names)
    with pytest.raises(InputError, match=message):
        choose_normalisation(read_inputs(sets, networks, NETWORKS), digits, zca)


@pytest.mark.parametrize("meta, message", [
    ({"zca": True}, "set.pt is ZCA-whitened, this run's images are normalised with"),
    ({"mean": [0.5] * 3, "std": [0.25] * 3},
     r"set.pt is normalised with mean \[0.5, 0.5, 0.5\].*this run's"),
    ({"mean": [0.5], "std": [0.25]}, r"images here have 3 channel"),
    ({"dataset": "SVHN"}, "dataset 'SVHN', which is unknown here"),
])
def test_init_is_of_the_same_normalisation(digits, digit_images, tmp_path, meta, message):
    path = write_set(tmp_path / "set.pt", digit_images, **meta)
    with pytest.raises(InputError, match=message):
        load_initial_sets(path, digits, 10, 1)


# ------------------------------------------------------------------------------------ names, labels
@pytest.mark.parametrize("name, message", [
    ("res_DM_SVHN_ConvNet_10ipc.pt", "dataset 'SVHN', .*--dataset"),
    ("DM_ConvNet_SVHN_10_None.pth", "dataset 'SVHN'"),
    ("DM_ConvNetBoo_CIFAR10_10_None.pth", "model 'ConvNetBoo', .*--model"),
    ("res_DM_CIFAR10_ConvNetBoo_10ipc.pt", "model 'ConvNetBoo'"),
])
def test_unknown_names_are_refused(tmp_path, name, message):
    path, images, labels = tmp_path / name, torch.randn(10, 3, 32, 32), torch.arange(10)
    torch.save({"data": [[images, labels]]}, path)
    files = ([], [path]) if name.endswith("pth") else ([path], [])
    with pytest.raises(InputError, match=message):
        read_inputs(*files, NETWORKS)
    (entry,) = read_inputs(*files, NETWORKS, dataset="cifar10", model="LeNet")
    assert entry.model == "LeNet" and "taken as" in entry.warnings[0] and all(entry.names.values())


@pytest.mark.parametrize("name, dataset, model, method, ipc", [
    ("DM_convnetw32_cifar-100_10_None_0.7.pt", "CIFAR100", "ConvNetW32", "DM", 10),
    ("my_network.pth", None, None, "my_network", None),
    ("best-cifar100.pth", "CIFAR100", None, "best-cifar100", None),
])
def test_names_in_any_case(tmp_path, name, dataset, model, method, ipc):
    torch.save({"w": torch.zeros(1)}, tmp_path / name)
    entry = read_input(tmp_path / name, NETWORKS, is_set=False)
    assert (entry.dataset, entry.model, entry.method, entry.ipc) == (dataset, model, method, ipc)
    if dataset == "CIFAR100":
        with pytest.raises(InputError, match=f"{name} .* is not of CIFAR10"):
            choose_dataset("CIFAR10", [entry])
    assert choose_dataset(None, [entry]) == (dataset or "CIFAR10")


def test_what_is_assumed_is_marked_and_the_meta_is_believed(tmp_path, digits, digit_images):
    network = tmp_path / "best.pth"
    torch.save({}, network)
    line = understood(network, digits, dataset="Digits").description
    assert line.startswith("Digits, ConvNet (assumed), for images normalised with mean [0.3054")
    line = understood(network, digits, model="MLP").description
    assert line.startswith("Digits (assumed), MLP, for images")
    path = write_set(tmp_path / "set.pt", digit_images)
    assert understood(path, digits).description.startswith("Digits (assumed), normalised with")
    path = tmp_path / "res_DM_CIFAR100_ConvNet_1ipc.pt"
    entry = understood(write_set(path, digit_images, dataset="Digits"), digits)
    assert entry.dataset == "Digits"
    assert "its name says CIFAR100, its meta Digits" in entry.warnings[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_probabilities_in_any_precision(tmp_path, dtype):
    images, logits = torch.randn(20, 3, 32, 32), 3 * torch.randn(20, 100)
    file = read_synset(write_set(tmp_path / "set.pt", images, logits.softmax(1).to(dtype)))
    assert file.notes == ["soft labels (probabilities)"] and file.labels_from_soft
    read = file.sets[0].soft_labels.exp()
    assert torch.allclose(read, logits.softmax(1), rtol=0.02, atol=1e-6)
    assert torch.allclose(read.sum(1), torch.ones(20), atol=1e-5)
    file = read_synset(write_set(tmp_path / "set.pt", images, logits.to(dtype)))
    assert file.notes == ["soft labels (logits)"]


@pytest.mark.parametrize("name", ["lr_best.pt", "lr.pt"])
def test_a_learning_rate_beside_the_images(digits, digit_images, tmp_path, name):
    path = tmp_path / "images_best.pt"
    contents = {path.name: digit_images, "labels_best.pt": LABELS, name: torch.tensor(0.0123)}
    for file, content in contents.items():
        torch.save(content, tmp_path / file)
    entry = understood(path, digits, dataset="Digits")
    assert "recipe lr_net 0.0123" in entry.description
    assert TrainConfig.from_meta(entry.synset.meta).lr_net == pytest.approx(0.0123)
    for wrong in (torch.tensor(-1.0), torch.zeros(3), {"lr": 1}):
        torch.save(wrong, tmp_path / name)
        with pytest.raises(InputError, match=f"{name} is no learning rate"):
            read_synset(path)


# ------------------------------------------------------------------------------------------ exports
RECIPE = {"epochs": 12, "lr_net": 0.03, "batch_train": 64, "dsa_strategy": "none",
          "temperature": 2.0, "lr_schedule": "cosine"}


@pytest.fixture(scope="module")
def exported(digits, tmp_path_factory):
    """A packed set with a recipe, and soft labels whose largest classes are not balanced: in every
    layout, and what evaluate.py finds for all of them in one run. The set, the folder, results."""
    folder = tmp_path_factory.mktemp("exported")
    noise = torch.randn(400, 10, generator=torch.Generator().manual_seed(0))
    soft = 3 * F.one_hot(LABELS.repeat(4), 10).float() + noise
    soft[:20, 9] += 10
    images = [pack(images_c) for images_c in real_images(digits, 40).split(40)]
    one = SyntheticSet(torch.cat(images), LABELS, soft)
    meta = {
        "dataset": "Digits", "classes": digits.classes, "threat_model": "pixel", "zca": False,
        "mean": list(digits.mean), "std": list(digits.std), "packed": True, "pack": 2,
        "flags": {"method": "DM", "model": "MLP"}, "recipe": {**RECIPE, "pack": 2},
    }
    path = folder / "res_DM_Digits_MLP_10ipc.pt"
    save_synset(path, [one], [], meta)
    for layout in export.LAYOUTS:
        main(export, path, "--to", layout, folder / layout)
    paths = [folder / layout for layout in export.LAYOUTS]
    flags = ["--synset", *paths, "--method", *export.LAYOUTS, *ATTACK.split()]
    return one, folder, *run(folder / "out", *flags)


@pytest.mark.parametrize("layout", list(export.LAYOUTS))
def test_every_export_is_read_back(exported, monkeypatch, layout):
    """As it was: images, labels, recipe, method; each card's lines of Python train on just that."""
    one, folder, content, text = exported
    (entry,) = read_inputs([folder / layout], [], NETWORKS)
    assert (entry.dataset, entry.model, entry.method) == ("Digits", "MLP", "DM-pixel")
    taken = content["inputs"][str(folder / layout)]["taken_as"]
    assert "soft labels (logits)" in taken and "epochs 12" in taken and taken in text
    methods = {row["method"] for row in content["rows"] if row["method"].startswith(layout)}
    soft_alone = layout in ("mtt", "ddranking")  # no classes of their own there
    assert methods == ({layout} if soft_alone else {layout, f"{layout}-hard"})
    for about in content["networks"].values():
        assert {key: about[key] for key in RECIPE} == RECIPE

    trained = []
    monkeypatch.setattr(utils, "train_on_set", lambda *given: trained.append(given))
    monkeypatch.chdir(folder / layout)
    (code,) = re.findall(r"```python\n(.*?)```", open("README.md").read(), flags=re.DOTALL)
    exec(code, {})
    ((net, images, labels, config),) = trained
    tolerance = 1.01 / 255 / 0.3237 / 2 if layout == "folder" else 0
    assert torch.allclose(images, unpack(one.images), atol=tolerance)
    assert torch.equal(labels, one.soft_labels) and config == TrainConfig(**RECIPE)
    assert net.architecture == ("MLP", 3, 10, (32, 32))


def test_a_whitened_set_has_no_pixels(small, whitened, tmp_path):
    path = write_set(tmp_path / "res_MTT_small_MLP_10ipc.pt", whitened[1])
    flags = ["--zca", "--dataset", small, "--to"]
    main(export, path, *flags, "dc", tmp_path / "dc")
    assert "small, ZCA-whitened" in (tmp_path / "dc" / "README.md").read_text()
    again = read_synset(tmp_path / "dc")
    assert again.declared_zca() and torch.equal(again.sets[0].images, whitened[1])
    with pytest.raises(InputError, match="has no pixels"):
        main(export, path, *flags, "folder", tmp_path / "folder")
    assert {entry.name for entry in tmp_path.iterdir()} == {"dc", path.name}
    main(export, path, *flags, "safetensors", tmp_path / "folder")  # the next try


# ------------------------------------------------------------------------------------------ folders
def write_pictures(folder, data, images, names):
    pixels = (data.denormalize(images) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    for k, (image, label) in enumerate(zip(pixels, LABELS.tolist())):
        (folder / names[label]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / names[label] / f"{k:03d}.png")
    return folder


def test_a_folder_of_pictures(digits, digit_images, tmp_path):
    """SRe2L and RDED leave a folder a class, whose number counts."""
    names = [f"new{c:03}" for c in range(10)]
    folder = write_pictures(tmp_path / "set", digits, digit_images, names)
    entry = understood(folder, digits, dataset="Digits")
    assert torch.allclose(entry.synset.sets[0].images, digit_images, atol=1e-5)
    assert torch.equal(entry.synset.sets[0].labels, LABELS)
    for part in ("from pixels from 0 to 255", "100 pictures", "by the numbers"):
        assert part in entry.description


def test_folders_are_matched_by_the_names_of_classes(tmp_path, digit_images, digits):
    """The data's order counts, not the alphabet's; other names are warned of."""
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    folder = write_pictures(tmp_path / "set", digits, digit_images, names)
    data = load_dataset("Digits", "")
    data.classes = names
    entry = understood(folder, data, dataset="Digits")
    images, labels, _ = entry.synset.sets[0]
    for c in range(10):
        assert torch.allclose(images[labels == c], digit_images[LABELS == c], atol=1e-5)
    assert "classes numbered by their names" in entry.description
    (warning,) = understood(folder, digits, dataset="Digits").warnings
    assert "its classes are eight, five, four" in warning


# ---------------------------------------------------------------------------------- lines of Python
@pytest.mark.parametrize("files, message", [
    ({}, "no folders of pictures"),
    ({"a/0.png": 32, "a/1.png": 16}, "1.png has .16, 16. pixels, .*0.png .32, 32."),
    ({"a/0.png": "no picture"}, "0.png is no picture"),
    ({"labels.csv": "file,label\n../../x.png,0\n"}, "is no file in"),
    ({"labels.csv": "file,label\n/x.png,0\n"}, "is no file in"),
    ({"labels.csv": "file,label\na/2.png,0\n"}, "is no file in"),
    ({"labels.csv": "name\nx\n"}, "no list of pictures"),
    ({"labels.csv": ""}, "no list of pictures"),
])
def test_wrong_folders(tmp_path, files, message):
    (tmp_path / "a").mkdir()
    for name, content in files.items():
        if isinstance(content, str):
            (tmp_path / name).write_text(content)
        else:
            Image.new("RGB", (content, content)).save(tmp_path / name)
    with pytest.raises(InputError, match=message):
        read_synset(tmp_path)


@pytest.mark.parametrize("page", ["README.md", "docs/foreign_files.md"])
def test_the_lines_of_python_in_the_docs(page, monkeypatch):
    """As they stand there, from the repository's folder, but for the training."""
    code = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)
    assert code or page == "README.md"
    monkeypatch.chdir(ROOT)
    trained = []
    monkeypatch.setattr(utils, "train_on_set", lambda *given: trained.append(given))
    for lines in code:
        exec(lines, {})
        _, images, labels, config = trained[-1]
        assert images.shape == (1600, 3, 32, 32) and labels.shape == (1600, 10)
        assert config.lr_schedule == "cosine"
