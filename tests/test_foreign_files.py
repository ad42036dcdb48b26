"""Files of others: each is understood rightly, or a warning or an error tells what it may be.

The rules: docs/foreign_files.md. Exported sets: test_export.py.
"""

import json
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, real_images, run_main, write_set
from PIL import Image

import evaluate
import utils
from augment import pack
from datasets import load_dataset
from formats.image_checks import seams
from formats.inputs import check_and_normalise, choose_normalisation, read_input, read_inputs
from formats.network_file import load_into
from formats.synset_file import read_synset
from networks import NETWORKS, get_network
from runtime.safe_io import InputError
from synsets import TrainConfig, load_synset
from target_models import TargetModel, check_normalisation

QUICK = """--threat_model pixel --attacks FGSM --untargeted --no_sanity --limit 100 --num_eval 1
    --model MLP --epoch_eval_train 15 --lr_net 0.02 --dsa_strategy none""".split()
LABELS = torch.arange(10).repeat_interleave(10)
OTHER = {"mean": [0.5] * 3, "std": [0.25] * 3}
NAME = "res_DM_Digits_MLP_10ipc.pt"


def run(out, *arguments):
    """evaluate.py: the content of results.json, and results.md."""
    run_main(evaluate, "--out", out, *arguments)
    return json.loads((out / "results.json").read_text()), (out / "results.md").read_text()


def clean(content, method=None):
    rows = [row for row in content["rows"] if row["attack"] == "Clean"]
    (accuracy,) = {row["accuracy"] for row in rows if method in (None, row["method"])}
    return accuracy


def understood(path, data, images=None, zca=False, **flags):
    """A set, or a .pth, as evaluate.py understands it: an Input."""
    files = ([], [path]) if path.suffix == ".pth" else ([path], [])
    (entry,) = read_inputs(*files, NETWORKS, **flags)
    choose_normalisation([entry], data, zca)
    check_and_normalise(entry, data, images)
    return entry


@pytest.fixture(scope="module")
def digit_images(digits):
    return real_images(digits, 10)


# ------------------------------------------------------------------------------- the whole command
def test_the_report_warns_of_what_looks_wrong(digits, digit_images, tmp_path):
    """A set as it should be, as pixels, and with permuted labels. With --images pixels the second
    has the accuracy of the first, and nothing is warned of."""
    pixels = digits.denormalize(digit_images)
    given = {"Good": (digit_images, LABELS), "Pixels": (pixels, LABELS),
             "Permuted": (digit_images, (LABELS + 3) % 10)}
    paths = [write_set(tmp_path / f"res_{name}_Digits_MLP_10ipc.pt", *pair)
             for name, pair in given.items()]
    content, text = run(tmp_path / "out", "--synset", *paths, *QUICK)
    assert clean(content, "Good") > 0.5 and clean(content, "Permuted") < 0.1
    warnings = text.split("## Warnings")[1]
    assert "Good_Digits" not in warnings
    assert "look like pixels in [0, 1]; --images pixels converts them" in warnings
    assert "no better than that of a constant classifier (10 %)" in warnings
    for path in paths:
        taken = content["inputs"][str(path)]["taken_as"]
        assert taken.startswith("Digits, normalised with mean [0.3054") and taken in text
    write_set(paths[0], pixels, LABELS)  # its name is a part of the seeds
    again, text = run(tmp_path / "again", "--synset", paths[0], *QUICK, "--images", "pixels")
    assert clean(again) == pytest.approx(clean(content, "Good"), abs=0.02)
    assert text.rstrip().endswith("## Warnings\n\n- none")


def test_a_set_keeps_its_own_normalisation(digits, digit_images, tmp_path):
    """Test images are normalised as the meta of the set declares."""
    images = (digits.denormalize(digit_images) - 0.5) / 0.25
    path = write_set(tmp_path / NAME, images, LABELS, **OTHER)
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
    utils.train_on_set(net, pixels, labels, config, torch.Generator().manual_seed(0))
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
    warnings = " ".join(check_normalisation(target, digits))
    expected = rf"a.pth .*\b10 % .*\b100 % .*--network_mean {mean:g} --network_std {std:g}"
    assert warnings == "" if mean == 0.3054 else re.fullmatch(expected, warnings)


# ------------------------------------------------------------------------------- pixels and packing
@pytest.mark.parametrize("scale, shift, space", [
    (1, 0, r"pixels in \[0, 1\]"),
    (255, 0, "pixels from 0 to 255"),
    (2, -1, r"images in \[-1, 1\]"),
])
def test_pixels_in_place_of_normalised_images(digits, digit_images, tmp_path, scale, shift, space):
    stored = scale * digits.denormalize(digit_images) + shift
    path = write_set(tmp_path / NAME, stored, LABELS)
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
    assert re.fullmatch(f"Digits, norm.*, not packed, hard labels, from {space}", entry.description)
    with pytest.warns(UserWarning, match="look like pixels"):
        load_synset(path)
    images, labels, config = load_synset(path, images="pixels")
    assert torch.allclose(images, digit_images, atol=1e-5) and torch.equal(labels, LABELS)
    assert config == TrainConfig()
    with pytest.raises(InputError, match="there is no 1"):
        load_synset(path, 1)


def test_bytes_are_pixels(digits, digit_images, tmp_path):
    """Also where all of them are dark."""
    pixels = (digits.denormalize(digit_images) * 255).byte() // 200
    path = write_set(tmp_path / NAME, pixels, LABELS)
    entry = understood(path, digits)
    assert torch.equal(entry.synset.sets[0].images, digits.normalize(pixels.float() / 255))
    assert "from pixels from 0 to 255" in entry.description and not entry.warnings
    with pytest.raises(InputError, match="holds pixels from 0 to 255"):
        understood(path, digits, "normalised")


@pytest.mark.parametrize("packed", [1, 2, 4, 8])
def test_seams_on_real_images(cifar10_npz, packed):
    data = load_dataset("CIFAR10", cifar10_npz)
    for seed in range(5):
        images = data.sample_class(seed, 10 * packed**2, torch.Generator().manual_seed(seed))
        assert seams(pack(images, packed))[0] == packed


def test_a_packed_set_that_does_not_declare_it(tmp_path, digits):
    """Its images are as smooth as photographs; noise has no seams."""
    smooth = F.interpolate(torch.randn(400, 3, 4, 4), (32, 32), mode="bicubic")
    path = write_set(tmp_path / NAME, pack(smooth + 0.05 * torch.randn(400, 3, 32, 32)), LABELS)
    for images in torch.zeros(10, 3, 32, 32), torch.randn(100, 3, 32, 32), smooth:
        assert seams(images) == (1, 1.0) == seams(images[:, :, :20])
    for flags, taken, advice in (({}, "not packed", ".*--packed 2 unpacks"),
                                 ({"packed": 4}, "packed 4x4", "")):
        (warning,) = understood(path, digits, **flags).warnings
        assert re.search(f"taken as {taken}, but its images look packed 2x2{advice}", warning)
    entry = understood(path, digits, packed=2)
    assert not entry.warnings and "packed 2x2" in entry.description


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


def test_a_whitened_set_by_flag(small, tmp_path):
    """Its network sees whitened test images: the accuracy is that of a training by hand."""
    data = load_dataset(small, "")
    data.fit_zca()
    images = real_images(data, 10)
    path = write_set(tmp_path / "res_MTT_small_MLP_10ipc.pt", images, LABELS)
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
    (True, True, "^$"),
    (False, True, "taken as ZCA-whitened images, but its values.* normalised images"),
])
def test_whitening_that_is_not_declared(small, tmp_path, is_whitened, zca, expected):
    """The values of whitened images are small."""
    data, other = load_dataset(small, ""), load_dataset(small, "")
    if is_whitened:
        data.fit_zca()
    path = write_set(tmp_path / "set.pt", real_images(data, 10), LABELS)
    warnings = understood(path, other, zca=zca, dataset="small").warnings
    assert re.search(expected, " ".join(warnings))


@pytest.mark.parametrize("metas, networks, zca, message", [
    ([{"zca": True}], ["net.pth"], False, "0.pt is ZCA.*net.pth is normalised.*of their own"),
    ([{"zca": True}, {}], [], False, "0.pt is ZCA-whitened, .*1.pt is normalised.*of their own"),
    ([{}, OTHER], [], False, "0.pt is normalised .*0.3.*1.pt is .* .0.5.*of their own"),
    ([{"zca": False}], [], True, "says that it is not ZCA-whitened; leave out --zca"),
])
def test_files_of_different_normalisations(digits, digit_images, tmp_path, metas, networks, zca,
                                           message):
    sets = [write_set(tmp_path / f"{i}.pt", digit_images, LABELS, **meta)
            for i, meta in enumerate(metas)]
    entries = read_inputs(sets, networks, NETWORKS)
    with pytest.raises(InputError, match=message):
        choose_normalisation(entries, digits, zca)


# ----------------------------------------------------------------------------------- names, folders
@pytest.mark.parametrize("name, dataset, model, method, ipc", [
    ("DM_convnetw32_cifar-100_10_None_0.7.pt", "CIFAR100", "ConvNetW32", "DM", 10),
    ("my_network.pth", None, None, "my_network", None),
    ("best-cifar100.pth", "CIFAR100", None, "best-cifar100", None),
])
def test_names_in_any_case(name, dataset, model, method, ipc):
    entry = read_input(name, NETWORKS, is_set=False)
    assert (entry.dataset, entry.model, entry.method, entry.ipc) == (dataset, model, method, ipc)


def test_unknown_names_are_refused(tmp_path):
    path = tmp_path / "res_DM_SVHN_ConvNet_10ipc.pt"
    write_set(path, torch.randn(10, 3, 32, 32), torch.arange(10))
    for files, message in ((([path], []), "dataset 'SVHN', .*--dataset"),
                           (([], ["DM_ConvNetBoo_CIFAR10_1_None.pth"]), "model 'Conv.*--model")):
        with pytest.raises(InputError, match=message):
            read_inputs(*files, NETWORKS)
        (entry,) = read_inputs(*files, NETWORKS, dataset="cifar10", model="LeNet")
        assert entry.model == "LeNet" and "taken as" in entry.warnings[0]
        assert all(entry.names.values())


def test_what_is_assumed_is_marked_and_the_meta_is_believed(tmp_path, digits, digit_images):
    path = write_set(tmp_path / "set.pt", digit_images, LABELS)
    for file, flags, start in (
            (tmp_path / "best.pth", {"dataset": "Digits"}, "Digits, ConvNet (assumed), for images"),
            (tmp_path / "best.pth", {"model": "MLP"}, "Digits (assumed), MLP, for images"),
            (path, {}, "Digits (assumed), normalised with")):
        assert understood(file, digits, **flags).description.startswith(start)
    path = tmp_path / "res_DM_CIFAR100_ConvNet_1ipc.pt"
    entry = understood(write_set(path, digit_images, LABELS, dataset="Digits"), digits)
    assert entry.dataset == "Digits"
    assert "its name says CIFAR100, its meta Digits" in entry.warnings[0]


ENGLISH = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


@pytest.mark.parametrize("names, note", [
    ([f"new{c:03}" for c in range(10)], "classes by the numbers of their folders"),  # SRe2L, RDED
    (ENGLISH, "classes numbered by their names"),  # in the data's order, not the alphabet's
])
def test_a_folder_of_pictures(digits, digit_images, tmp_path, names, note):
    pixels = (digits.denormalize(digit_images) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    for k, (image, label) in enumerate(zip(pixels, LABELS.tolist())):
        (tmp_path / names[label]).mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / names[label] / f"{k:03d}.png")
    data = load_dataset("Digits", "")
    data.classes = ENGLISH
    entry = understood(tmp_path, data, dataset="Digits")
    images, labels, *_ = entry.synset.sets[0]
    for c in range(10):
        assert torch.allclose(images[labels == c], digit_images[LABELS == c], atol=1e-5)
    for part in ("from pixels from 0 to 255", "100 pictures", note):
        assert part in entry.description
    warnings = " ".join(understood(tmp_path, digits, dataset="Digits").warnings)
    assert ("its classes are eight, five, four" in warnings) == (names == ENGLISH)


@pytest.mark.parametrize("files, message", [
    ({}, "no folders of pictures"),
    ({"a/0.png": 32, "a/1.png": 16}, "1.png has .16, 16. pixels, .*0.png .32, 32."),
    ({"a/0.png": "no picture"}, "0.png is no picture"),
    ({"labels.csv": "file,label\n../outside.png,0\n", "../outside.png": 32}, "is no file in"),
    ({"labels.csv": "file,label\na/2.png,0\n"}, "is no file in"),
    ({"labels.csv": "name\nx\n"}, "no list of pictures"),
    ({"labels.csv": ""}, "no list of pictures"),
])
def test_wrong_folders(tmp_path, files, message):
    folder = tmp_path / "set"
    (folder / "a").mkdir(parents=True)
    for name, content in files.items():
        if isinstance(content, str):
            (folder / name).write_text(content)
        else:
            Image.new("RGB", (content, content)).save(folder / name)
    with pytest.raises(InputError, match=message):
        read_synset(folder)


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
