"""Files of others: each is understood rightly, or a warning or an error says what it may be.
docs/foreign_files.md.
"""

import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from PIL import Image

import evaluate
import export
import synsets
import utils
from augment import pack, unpack
from datasets import DATASETS, Dataset, load_dataset
from formats.inputs import choose_normalisation, read_input, read_inputs, understand
from formats.network_file import load_into
from runtime.safe_io import InputError
from formats.synset_file import read_synset, save_synset, seams
from networks import NETWORKS, get_network
from target_models import TargetModel, check_normalisation

JUDGED = "--threat_model pixel --attacks FGSM --untargeted --no_sanity".split()
QUICK = [
    "--model",
    "MLP",
    "--num_eval",
    "1",
    "--epoch_eval_train",
    "15",
    "--lr_net",
    "0.02",
    "--dsa_strategy",
    "none",
    "--limit",
    "100",
    *JUDGED,
]
LABELS = torch.arange(10).repeat_interleave(10)


def run(monkeypatch, out, *arguments):
    """evaluate.py in this process: (the content of results.json, results.md)."""
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--out", str(out), *map(str, arguments)])
    evaluate.main()
    return json.loads((out / "results.json").read_text()), (out / "results.md").read_text()


def run_export(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["export.py", *map(str, arguments)])
    export.main()


def clean(content, method=None):
    (accuracy,) = {
        row["accuracy"]
        for row in content["rows"]
        if row["attack"] == "Clean" and method in (None, row["method"])
    }
    return accuracy


@pytest.fixture(scope="module")
def digit_images(digits):
    """Ten real digits a class, normalised."""
    return torch.cat(
        [digits.sample_class(c, 10, torch.Generator().manual_seed(c)) for c in range(10)]
    )


@pytest.fixture(scope="module")
def reference(digits, digit_images, tmp_path_factory):
    """The set as it should be: its file, and what evaluate.py finds for it."""
    folder = tmp_path_factory.mktemp("reference")
    path = folder / "res_DM_Digits_MLP_10ipc.pt"
    torch.save({"data": [[digit_images, LABELS]]}, path)
    with pytest.MonkeyPatch.context() as patch:
        content, text = run(patch, folder / "out", "--synset", path, *QUICK)
    assert clean(content) > 0.5 and text.rstrip().endswith("## Warnings\n\n- none")
    return path, content


def taken(path, data, *flags):
    """A set as evaluate.py understands it with these flags: an Input."""
    args = evaluate.parse_args(["--synset", str(path), *map(str, flags)])
    (one,) = read_inputs(args, NETWORKS)
    choose_normalisation([one], data, args.zca)
    understand(one, data, args.images)
    return one


# ---------------------------------------------------------------------------------- pixels, packing
@pytest.mark.parametrize(
    "stored, space",
    [
        (lambda pixels: pixels, r"pixels in \[0, 1\]"),
        (lambda pixels: 255 * pixels, "pixels from 0 to 255"),
        (lambda pixels: 2 * pixels - 1, r"images in \[-1, 1\]"),
    ],
)
def test_pixels_in_place_of_normalised_images(digits, digit_images, tmp_path, stored, space):
    pixels = digits.denormalize(digit_images)
    torch.save({"data": [[stored(pixels), LABELS]]}, tmp_path / "res_DM_Digits_MLP_10ipc.pt")
    one = taken(tmp_path / "res_DM_Digits_MLP_10ipc.pt", digits)
    assert re.search(
        f"taken as normalised images, but its values .* look like {space}", one.warnings[0]
    )
    assert torch.equal(one.synset.sets[0].images, stored(pixels))
    if "pixels" in space:
        one = taken(one.path, digits, "--images", "pixels")
        assert (
            torch.allclose(one.synset.sets[0].images, digit_images, atol=1e-5) and not one.warnings
        )
        assert re.search(
            f"Digits, normalised from {space} with mean .*, not packed, hard labels, no ZCA",
            one.taken_as,
        )
        assert not taken(one.path, digits, "--images", "normalised").warnings
    else:
        with pytest.raises(InputError, match="no pixels, with values from -1 to 1"):
            taken(one.path, digits, "--images", "pixels")


def test_bytes_are_pixels(digits, digit_images, tmp_path):
    pixels = (digits.denormalize(digit_images) * 255).round().to(torch.uint8)
    torch.save(
        {"data": [[pixels // 200, LABELS], [pixels, LABELS]]},
        tmp_path / "res_DM_Digits_MLP_10ipc.pt",
    )
    one = taken(tmp_path / "res_DM_Digits_MLP_10ipc.pt", digits)
    assert torch.allclose(one.synset.sets[1].images, digit_images, atol=1e-5) and not one.warnings
    assert "from pixels from 0 to 255" in one.taken_as
    with pytest.raises(InputError, match="bytes, which are pixels"):
        taken(one.path, digits, "--images", "normalised")


def test_normalised_images_are_no_pixels(reference, digits):
    with pytest.raises(InputError, match="its images are no pixels"):
        taken(reference[0], digits, "--images", "pixels")


def test_the_whole_command_with_pixels(reference, digits, digit_images, tmp_path, monkeypatch):
    """With a word of the user's the figures are those of the set as it should be; without it the
    report warns.
    """
    path = tmp_path / reference[0].name
    torch.save({"data": [[digits.denormalize(digit_images), LABELS]]}, path)
    content, text = run(monkeypatch, tmp_path / "a", "--synset", path, *QUICK, "--images", "pixels")
    assert clean(content) == pytest.approx(clean(reference[1]), abs=0.02) and "- none" in text
    content, text = run(monkeypatch, tmp_path / "b", "--synset", path, *QUICK)
    assert (
        "look like pixels in [0, 1]; --images pixels converts them" in text.split("## Warnings")[1]
    )
    assert content["inputs"][str(path)]["taken_as"].startswith(
        "Digits, normalised with mean [0.3054"
    )


def smooth_images(count, seed=0):
    """Images as smooth as photographs."""
    noise = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(noise, (32, 32), mode="bicubic") + 0.05 * torch.randn(count, 3, 32, 32)


@pytest.mark.parametrize("packed", [1, 2, 4])
@pytest.mark.parametrize("count", [10, 100])
def test_seams_between_sub_images(packed, count):
    found, ratio = seams(pack(smooth_images(count * packed**2), packed))
    assert found == packed and (ratio > 1.75) == (packed > 1)


@pytest.mark.parametrize("packed", [1, 2, 4, 8])
def test_seams_on_real_images(cifar10_npz, packed):
    data = load_dataset("CIFAR10", cifar10_npz)
    for seed in range(5):
        images = data.sample_class(seed, 10 * packed**2, torch.Generator().manual_seed(seed))
        assert seams(pack(images, packed))[0] == packed


def test_noise_and_flat_images_have_no_seams():
    assert seams(torch.randn(100, 3, 32, 32)) == (1, 1.0) and seams(torch.zeros(10, 3, 32, 32)) == (
        1,
        1.0,
    )


def test_a_packed_set_that_does_not_say_so(tmp_path, digits):
    path = tmp_path / "res_DM_Digits_MLP_10ipc.pt"
    torch.save({"data": [[pack(smooth_images(400), 2), LABELS]]}, path)
    assert re.search(
        "taken as not packed, but its images look packed 2x2 .*--packed 2 unpacks",
        taken(path, digits).warnings[0],
    )
    one = taken(path, digits, "--packed", 2)
    assert not one.warnings and "packed 2x2" in one.taken_as
    one = taken(path, digits, "--packed", 4)
    assert "taken as packed 4x4, but its images look packed 2x2" in one.warnings[0]


# ------------------------------------------------------------------------------- ZCA, normalisation
@pytest.fixture(scope="module")
def fitted_digits():
    """Digits, whitened: the fit takes seconds."""
    pytest.importorskip("kornia")
    data = load_dataset("Digits", "")
    data.fit_zca()
    return data


@pytest.fixture
def whitened(fitted_digits, tmp_path, monkeypatch):
    """Whitened digits, ten of each class, and a file of them that says nothing. Whoever fits anew
    gets the same.
    """
    data = fitted_digits

    def fit_again(self):
        self.set_normalisation(data.mean, data.std)
        self._zca = data._zca

    monkeypatch.setattr(Dataset, "fit_zca", fit_again)
    images = torch.cat(
        [data.sample_class(c, 10, torch.Generator().manual_seed(c)) for c in range(10)]
    )
    (tmp_path / "zca").mkdir()
    path = tmp_path / "zca" / "res_MTT_Digits_MLP_10ipc.pt"
    torch.save({"data": [[images, LABELS]]}, path)
    return data, images, path


def test_a_whitened_set_by_flag(whitened, tmp_path, monkeypatch):
    """Its network sees whitened test images: the accuracy is that of a training by hand."""
    data, images, path = whitened
    content, text = run(
        monkeypatch,
        tmp_path / "out",
        "--synset",
        path,
        *QUICK,
        "--zca",
        "--epoch_eval_train",
        50,
        "--lr_net",
        0.1,
    )
    assert "ZCA-whitened, not packed, hard labels, ZCA" in text
    (about,) = [json.loads(p.read_text()) for p in (tmp_path / "out" / "networks").glob("*.json")]
    net = get_network("MLP", 3, 10, (32, 32), about["seed_init"])
    utils.train_on_set(
        net,
        images,
        LABELS,
        epochs=50,
        lr_net=0.1,
        batch_train=256,
        dsa_strategy="none",
        generator=torch.Generator().manual_seed(about["seed_train"]),
    )
    assert (
        clean(content)
        == pytest.approx(utils.accuracy(net, *data.get_batch("test", slice(100))), abs=0.011)
        and clean(content) > 0.4
    )


def test_a_whitened_set_that_does_not_say_so(whitened, digits, reference):
    """Its values are small; with the flag, ordinary ones are large."""
    one = taken(whitened[2], digits)
    assert re.search(
        "taken as normalised images, but its .* look like ZCA-whitened images; --zca",
        one.warnings[0],
    )
    data = load_dataset("Digits", "")
    assert not taken(whitened[2], data, "--zca").warnings
    one = taken(reference[0], load_dataset("Digits", ""), "--zca")
    assert (
        "taken as ZCA-whitened images, but its values" in one.warnings[0]
        and "ordinary ones" in one.warnings[0]
    )


def test_whitened_and_ordinary_files_in_one_run(whitened, digits, tmp_path, monkeypatch):
    _, images, path = whitened
    says = tmp_path / "res_FRePo_Digits_MLP_10ipc.pt"
    torch.save({"data": [[images, LABELS]], "meta": {"zca": True}}, says)
    torch.save(
        get_network("MLP", 3, 10, (32, 32), 0).state_dict(), tmp_path / "DM_MLP_Digits_10_None.pth"
    )
    with pytest.raises(
        InputError,
        match="FRePo.* is ZCA-whitened, .*DM_MLP.* is normalised with .*runs of their own",
    ):
        run(
            monkeypatch,
            tmp_path / "out",
            "--synset",
            says,
            "--networks",
            tmp_path / "DM_MLP_Digits_10_None.pth",
            *QUICK,
        )
    with pytest.raises(InputError, match="runs of their own"):
        run(monkeypatch, tmp_path / "out", "--synset", says, path, *QUICK)
    assert not (tmp_path / "out").exists()
    torch.save({"data": [[images, LABELS]], "meta": {"zca": False}}, says)
    with pytest.raises(InputError, match="says that it is not ZCA-whitened; leave out --zca"):
        run(monkeypatch, tmp_path / "out", "--synset", says, *QUICK, "--zca")


def test_a_set_keeps_its_own_normalisation(digits, digit_images, tmp_path, monkeypatch):
    """Test images are normalised as the set is, which says how."""
    pixels, mean, std = digits.denormalize(digit_images), [0.5, 0.5, 0.5], [0.25, 0.25, 0.25]
    path = tmp_path / "res_RDED_Digits_MLP_10ipc.pt"
    torch.save(
        {"data": [[(pixels - 0.5) / 0.25, LABELS]], "meta": {"mean": mean, "std": std}}, path
    )
    content, text = run(monkeypatch, tmp_path / "out", "--synset", path, *QUICK)
    assert f"normalised with mean {mean}, std {std}" in text and clean(content) > 0.5
    (about,) = [json.loads(p.read_text()) for p in (tmp_path / "out" / "networks").glob("*.json")]
    net = load_into(get_network("MLP", 3, 10, (32, 32), 0), about["file"])
    test = digits.images["test"][:100].float() / 255
    assert clean(content) == utils.accuracy(net, (test - 0.5) / 0.25, digits.labels["test"][:100])
    other = tmp_path / "res_DM_Digits_MLP_10ipc.pt"
    torch.save({"data": [[digit_images, LABELS]]}, other)
    with pytest.raises(
        InputError,
        match="RDED.* is normalised with mean .0.5.*DM.* is normalised with .*runs of their own",
    ):
        run(monkeypatch, tmp_path / "both", "--synset", path, other, *QUICK)


@pytest.mark.parametrize(
    "meta, message",
    [
        ({"zca": True}, "set.pt is ZCA-whitened, this run's images are normalised with"),
        (
            {"mean": [0.5] * 3, "std": [0.25] * 3},
            r"set.pt is normalised with mean \[0.5, 0.5, 0.5\].*this run's",
        ),
        ({"mean": [0.5], "std": [0.25]}, r"images here have 3 channel"),
        ({"dataset": "SVHN"}, "data set 'SVHN', which is none of those here"),
    ],
)
def test_init_is_of_the_same_normalisation(digits, digit_images, tmp_path, meta, message):
    torch.save({"data": [[digit_images, LABELS]], "meta": meta}, tmp_path / "set.pt")
    with pytest.raises(InputError, match=message):
        synsets.start_from(tmp_path / "set.pt", digits, 10, 1)


def test_init_says_how_it_was_understood(whitened, tmp_path):
    data, images, _ = whitened
    torch.save({"data": [[images, LABELS]], "meta": {"zca": True}}, tmp_path / "set.pt")
    out = "\n".join(
        utils.describe_inputs(SimpleNamespace(init=str(tmp_path / "set.pt"), ipc=10, pack=1), data)
    )
    assert "Digits: 1437 training and 360 test images, 3x32x32, 10 classes, ZCA-whitened" in out
    assert "set.pt taken as: Digits (assumed), ZCA-whitened, not packed, hard labels, ZCA" in out


@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (0.5, 0.5), (0.3054, 0.3237)])
def test_a_network_that_was_made_for_other_values(digits, mean, std):
    """It knows the test images, and only if they are normalised its way."""
    known = (digits.images["test"].float() / 255 - mean) / std

    def net(x):
        right = torch.isclose(x, known[: len(x)], atol=1e-3).flatten(1).all(1)
        return F.one_hot(torch.where(right, digits.labels["test"][: len(x)], 0), 10)

    target = TargetModel("a.pth", "A", 10, "MLP", net, meta={"file": "a.pth"})
    warnings = check_normalisation(target, digits)
    if mean == 0.3054:
        assert warnings == []
    else:
        (warning,) = warnings
        assert (
            f"10 % of 360 test images as they are normalised here, 100 % with mean {mean:g}"
            in warning
        )
        assert warning.endswith(f"--network_mean {mean:g} --network_std {std:g}")


def test_a_network_of_other_pixels(digits, tmp_path, monkeypatch):
    """A network that was trained on pixels in [0, 1]: right with two flags."""
    net, generator = get_network("MLP", 3, 10, (32, 32), 0), torch.Generator().manual_seed(0)
    pixels, labels = digits.images["train"].float() / 255, digits.labels["train"]
    utils.train_on_set(
        net,
        pixels,
        labels,
        epochs=3,
        lr_net=0.05,
        batch_train=64,
        dsa_strategy="none",
        generator=generator,
    )
    path = tmp_path / "DM_MLP_Digits_10_None.pth"
    torch.save(net.state_dict(), path)
    right = utils.accuracy(net, digits.images["test"].float() / 255, digits.labels["test"])
    flags = ["--networks", path, *QUICK, "--limit", 0]
    content, text = run(
        monkeypatch, tmp_path / "right", *flags, "--network_mean", 0, "--network_std", 1
    )
    assert (
        clean(content) == pytest.approx(right, abs=1e-9)
        and "for images normalised with mean [0.0, 0.0, 0.0]" in text
    )
    assert text.rstrip().endswith("- none")
    for wrong, message in ((["0", "0"], "one for each of 3 channel"),):
        with pytest.raises(InputError, match=message):
            run(monkeypatch, tmp_path / "x", *flags, "--network_mean", *wrong, "--network_std", 1)


# ------------------------------------------------------------------------------------ names, labels
@pytest.mark.parametrize(
    "name, message",
    [
        ("res_DM_SVHN_ConvNet_10ipc.pt", "data set 'SVHN', .*--dataset"),
        ("images_svhn.pt", "data set 'SVHN'"),
        ("DM_ConvNet_SVHN_10_None.pth", "data set 'SVHN'"),
        ("DM_ConvNetBoo_CIFAR10_10_None.pth", "network 'ConvNetBoo', .*--model"),
        ("res_DM_CIFAR10_ConvNetBoo_10ipc.pt", "network 'ConvNetBoo'"),
    ],
)
def test_unknown_names_are_refused(tmp_path, name, message):
    torch.save({"data": [[torch.randn(10, 3, 32, 32), torch.arange(10)]]}, tmp_path / name)
    if name.startswith("images"):
        torch.save(torch.randn(10, 3, 32, 32), tmp_path / name)
        torch.save(torch.arange(10), tmp_path / name.replace("images", "labels"))
    which = "--networks" if name.endswith("pth") else "--synset"
    with pytest.raises(InputError, match=message):
        read_inputs(evaluate.parse_args([which, str(tmp_path / name)]), NETWORKS)
    (one,) = read_inputs(
        evaluate.parse_args(
            [which, str(tmp_path / name), "--dataset", "cifar10", "--model", "LeNet"]
        ),
        NETWORKS,
    )
    assert one.model == "LeNet" and "taken as" in one.warnings[0]


@pytest.mark.parametrize(
    "name, dataset, model, method, ipc",
    [
        ("DM_convnetw32_cifar100_10_None.pth", "CIFAR100", "ConvNetW32", "DM", 10),
        ("DM_ConvNet_CIFAR-10_50_None_0.7.pt", "CIFAR10", "ConvNet", "DM", 50),
        ("my_network.pth", None, None, "my_network", None),
        ("best-cifar100.pth", "CIFAR100", None, "best-cifar100", None),
    ],
)
def test_names_in_any_case(tmp_path, name, dataset, model, method, ipc):
    torch.save({"w": torch.zeros(1)}, tmp_path / name)
    one = read_input(tmp_path / name, NETWORKS, is_set=False)
    assert (one.dataset, one.model, one.method, one.ipc) == (dataset, model, method, ipc)


def test_a_name_and_a_meta_that_disagree(tmp_path):
    torch.save(
        {"data": [[torch.randn(10, 3, 32, 32), torch.arange(10)]], "meta": {"dataset": "CIFAR10"}},
        tmp_path / "res_DM_CIFAR100_ConvNet_1ipc.pt",
    )
    one = read_input(tmp_path / "res_DM_CIFAR100_ConvNet_1ipc.pt", NETWORKS, is_set=True)
    assert (
        one.dataset == "CIFAR10" and "its name says CIFAR100, its meta CIFAR10" in one.warnings[0]
    )


def test_a_network_of_which_nothing_is_said(tmp_path, monkeypatch, digits):
    torch.save(get_network("ConvNet", 3, 10, (32, 32), 0).state_dict(), tmp_path / "best.pth")
    flags = [flag for flag in QUICK if flag not in ("--model", "MLP")]
    flags += ["--dataset", "Digits", "--limit", 20, "--networks", tmp_path / "best.pth"]
    content, _ = run(monkeypatch, tmp_path / "out", *flags)
    (said,) = content["inputs"].values()
    assert said["taken_as"].startswith("Digits, ConvNet (assumed), for images normalised")


def test_permuted_labels_are_warned_of(digit_images, tmp_path, monkeypatch):
    path = tmp_path / "res_DM_Digits_MLP_10ipc.pt"
    torch.save({"data": [[digit_images, (LABELS + 3) % 10]]}, path)
    content, text = run(monkeypatch, tmp_path / "out", "--synset", path, *QUICK)
    assert clean(content) < 0.1
    assert "no better than that of a constant classifier (10 %)" in text.split("## Warnings")[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_probabilities_in_any_precision(tmp_path, dtype):
    logits = 3 * torch.randn(20, 100)
    torch.save(
        {"data": [[torch.randn(20, 3, 32, 32), logits.softmax(1).to(dtype)]]}, tmp_path / "set.pt"
    )
    file = read_synset(tmp_path / "set.pt")
    assert file.labels == "soft labels (probabilities)" and file.derived
    read = file.sets[0].soft_labels.exp()
    assert torch.allclose(read, logits.softmax(1), rtol=0.02, atol=1e-6) and torch.allclose(
        read.sum(1), torch.ones(20), atol=1e-5
    )
    torch.save({"data": [[torch.randn(20, 3, 32, 32), logits.to(dtype)]]}, tmp_path / "set.pt")
    assert read_synset(tmp_path / "set.pt").labels == "soft labels (logits)"


@pytest.mark.parametrize("name", ["lr_best.pt", "lr.pt"])
def test_a_learning_rate_beside_the_images(digits, digit_images, tmp_path, name):
    torch.save(digit_images, tmp_path / "images_best.pt")
    torch.save(LABELS, tmp_path / "labels_best.pt")
    torch.save(torch.tensor(0.0123), tmp_path / name)
    one = taken(tmp_path / "images_best.pt", digits, "--dataset", "Digits")
    assert f"lr 0.0123 from {name}" in one.taken_as
    assert synsets.protocol_of(one.synset.meta)["lr_net"] == pytest.approx(0.0123)
    for wrong in (torch.tensor(-1.0), torch.zeros(3), {"lr": 1}):
        torch.save(wrong, tmp_path / name)
        with pytest.raises(InputError, match=f"{name} is no learning rate"):
            read_synset(tmp_path / "images_best.pt")


# ------------------------------------------------------------------------------------------ exports
@pytest.fixture(scope="module")
def packed_set(digits, tmp_path_factory):
    """A set of another method, 2x2 packed, soft labels whose largest classes are not balanced, with
    a recipe.
    """
    images = torch.cat(
        [pack(digits.sample_class(c, 40, torch.Generator().manual_seed(c))) for c in range(10)]
    )
    soft = 3 * F.one_hot(LABELS.repeat(4), 10).float() + torch.randn(
        400, 10, generator=torch.Generator().manual_seed(0)
    )
    soft[:20, 9] += 10
    meta = {
        "dataset": "Digits",
        "classes": digits.classes,
        "mean": list(digits.mean),
        "std": list(digits.std),
        "packed": True,
        "pack": 2,
        "zca": False,
        "threat_model": "pixel",
        "flags": {"method": "DM", "model": "MLP"},
        "recipe": {
            "epochs": 12,
            "lr_net": 0.03,
            "batch_train": 64,
            "dsa_strategy": "none",
            "temperature": 2.0,
            "lr_schedule": "cosine",
            "pack": 2,
        },
    }
    path = tmp_path_factory.mktemp("packed") / "res_DM_Digits_MLP_10ipc.pt"
    from formats.synset_file import SyntheticSet

    save_synset(path, [SyntheticSet(images, LABELS, soft)], [], meta)
    return path, SyntheticSet(images, LABELS, soft), meta


@pytest.mark.parametrize("layout", list(export.LAYOUTS))
def test_every_export_is_read_back_by_evaluate(packed_set, tmp_path, monkeypatch, layout):
    """As it was: images, labels, recipe, normalisation, method; and each card's lines of Python
    train on just that.
    """
    path, one, meta = packed_set
    out = tmp_path / "exported"
    run_export(monkeypatch, path, "--to", layout, out)
    flags = ["--num_eval", "1", "--limit", "50", *JUDGED]
    content, text = run(monkeypatch, tmp_path / "out", "--synset", out, *flags)
    methods = (
        {"DM-pixel"} if layout in ("mtt", "ddranking") else {"DM-pixel", "DM-pixel-hard"}
    )  # no classes of their own there
    assert {row["method"] for row in content["rows"]} == methods and content["flags"][
        "dataset"
    ] == "Digits"
    assert "soft labels (logits)" in text and "no ZCA" in text
    for about in content["networks"].values():
        assert {
            key: about[key]
            for key in ("epochs", "lr_net", "batch_train", "temperature", "lr_schedule")
        } == {
            key: meta["recipe"][key]
            for key in ("epochs", "lr_net", "batch_train", "temperature", "lr_schedule")
        }

    trained = []
    monkeypatch.setattr(
        utils, "train_on_set", lambda *args, **options: trained.append((args, options))
    )
    monkeypatch.chdir(out)
    (code,) = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), flags=re.DOTALL)
    exec(code, {})
    (((net, images, labels), options),) = trained
    assert torch.allclose(
        images, unpack(one.images), atol=1.01 / 255 / 0.3237 / 2 if layout == "folder" else 0
    )
    assert torch.equal(labels, one.soft_labels) and net.architecture == ("MLP", 3, 10, (32, 32))
    assert options == {key: value for key, value in meta["recipe"].items() if key != "pack"}


def test_a_card_says_what_the_file_is(packed_set, tmp_path, monkeypatch):
    path, _, _ = packed_set
    run_export(monkeypatch, path, "--to", "dc", tmp_path / "dc", "--keep_packed")
    assert (tmp_path / "dc" / "res_DM_Digits_MLP_10ipc.pt").exists()
    card = (tmp_path / "dc" / "README.md").read_text()
    assert "# DM of Digits" in card and "normalisation | mean [0.3054" in card


def test_a_foreign_set_keeps_its_name_and_data_set(reference, tmp_path, monkeypatch, capsys):
    run_export(monkeypatch, reference[0], "--to", "dc", tmp_path / "dc")
    again = read_input(tmp_path / "dc" / "res_DM_Digits_MLP_10ipc.pt", NETWORKS, is_set=True)
    assert (again.method, again.dataset, again.ipc) == ("DM", "Digits", 10) and again.synset.meta[
        "mean"
    ] == list(DATASETS["Digits"]["mean"])
    assert "taken as: Digits, normalised with" in capsys.readouterr().out


def test_a_whitened_set_says_so_in_its_card_and_has_no_pixels(whitened, tmp_path, monkeypatch):
    _, images, path = whitened
    run_export(monkeypatch, path, "--to", "dc", "--zca", tmp_path / "dc")
    assert "normalisation | ZCA whitening" in (tmp_path / "dc" / "README.md").read_text()
    again = read_input(tmp_path / "dc" / "res_MTT_Digits_MLP_10ipc.pt", NETWORKS, is_set=True)
    assert again.synset.says_zca() and torch.equal(again.synset.sets[0].images, images)
    with pytest.raises(InputError, match="has no pixels"):
        run_export(monkeypatch, path, "--to", "folder", "--zca", tmp_path / "folder")
    assert {entry.name for entry in tmp_path.iterdir()} == {"dc", "zca"}
    run_export(
        monkeypatch, path, "--to", "safetensors", "--zca", tmp_path / "folder"
    )  # the next try


# ------------------------------------------------------------------------------------------ folders
def write_pictures(folder, images, names):
    for k, (image, label) in enumerate(zip(images, LABELS.tolist())):
        (folder / names[label]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / names[label] / f"{k:03d}.png")


@pytest.mark.parametrize("names", [[str(c) for c in range(10)], [f"new{c:03d}" for c in range(10)]])
def test_a_folder_of_pictures(digits, digit_images, tmp_path, names):
    """SRe2L and RDED leave a folder a class. Classes 0 to 9, also where a tenth one would be sorted
    after the first.
    """
    pixels = (
        (digits.denormalize(digit_images) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    )
    write_pictures(tmp_path / "set", pixels, names)
    one = taken(tmp_path / "set", digits, "--dataset", "Digits")
    assert torch.allclose(one.synset.sets[0].images, digit_images, atol=1e-5) and torch.equal(
        one.synset.sets[0].labels, LABELS
    )
    assert "normalised from pixels from 0 to 255" in one.taken_as and "100 pictures" in one.taken_as


def test_folders_are_matched_by_the_names_of_classes(tmp_path, digit_images, digits):
    """The data's order counts, not the alphabet's."""
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    pixels = (
        (digits.denormalize(digit_images) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    )
    write_pictures(tmp_path / "set", pixels, names)
    data = load_dataset("Digits", "")
    data.classes = names
    one = taken(tmp_path / "set", data, "--dataset", "Digits")
    images, labels, _ = one.synset.sets[0]
    assert all(
        torch.allclose(images[labels == c], digit_images[LABELS == c], atol=1e-5) for c in range(10)
    )
    assert "classes numbered by their names" in one.taken_as
    assert (
        "its classes are eight, five, four"
        in taken(tmp_path / "set", digits, "--dataset", "Digits").warnings[0]
    )


def test_wrong_folders(tmp_path):
    (tmp_path / "set").mkdir()
    with pytest.raises(InputError, match="no folders of pictures"):
        read_synset(tmp_path / "set")
    (tmp_path / "set" / "a").mkdir()
    for name, size in (("0.png", 32), ("1.png", 16)):
        Image.fromarray(np.zeros((size, size, 3), np.uint8)).save(tmp_path / "set" / "a" / name)
    with pytest.raises(InputError, match="1.png is 16x16 pixels, .*0.png 32x32"):
        read_synset(tmp_path / "set")
    (tmp_path / "set" / "a" / "1.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match="1.png is no picture"):
        read_synset(tmp_path / "set")
    for text, message in (
        ("file,label\n../../x.png,0\n", "is no file in"),
        ("name\nx\n", "no list of pictures"),
        ("", "no picture"),
    ):
        (tmp_path / "set" / "labels.csv").write_text(text)
        with pytest.raises(InputError, match=message):
            read_synset(tmp_path / "set")


# --------------------------------------------------------------------------------- other containers
def test_numpy_arrays_in_a_torch_file(digit_images, tmp_path):
    torch.save({"data": [[digit_images.numpy(), LABELS.numpy()]]}, tmp_path / "set.pt")
    ((images, labels, _),) = read_synset(tmp_path / "set.pt").sets
    assert torch.equal(images, digit_images) and torch.equal(labels, LABELS)


@pytest.mark.parametrize(
    "wrap, note",
    [
        (
            lambda state: {f"_orig_mod.{key}": value for key, value in state.items()},
            "'_orig_mod.' dropped",
        ),
        (
            lambda state: {f"module.model.{key}": value for key, value in state.items()},
            "'module.model.' dropped",
        ),
        (lambda state: {"state_dict": state, "epoch": 3}, "the state_dict in its 'state_dict'"),
        (
            lambda state: {key: value for key, value in state.items() if "num_batches" not in key},
            "without num_batches_tracked",
        ),
    ],
)
def test_state_dicts_of_other_programs(tmp_path, wrap, note):
    net, notes = get_network("ConvNetBN", 3, 10, (32, 32), seed=1), []
    torch.save(wrap(net.state_dict()), tmp_path / "net.pth")
    loaded = load_into(
        get_network("ConvNetBN", 3, 10, (32, 32), seed=2), tmp_path / "net.pth", notes
    )
    assert (
        all(torch.equal(a, b) for a, b in zip(net.parameters(), loaded.parameters()))
        and note in notes[0]
    )


def test_the_odd_key_is_named(tmp_path):
    state = get_network("MLP", 3, 10, (32, 32), seed=1).state_dict()
    torch.save({**state, "optimizer": {"lr": 1}}, tmp_path / "net.pth")
    with pytest.raises(InputError, match=r"is no tensor: 'optimizer' \(dict\)"):
        load_into(get_network("MLP", 3, 10, (32, 32), seed=1), tmp_path / "net.pth")


# ---------------------------------------------------------------------------------- lines of Python
@pytest.mark.parametrize("page", ["README.md", "docs/foreign_files.md"])
def test_the_lines_of_python_in_the_docs(page, monkeypatch):
    """As they stand there, from the repository's folder, but for the epochs."""
    code = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)
    assert code or page == "README.md"
    monkeypatch.chdir(ROOT)
    trained = []
    monkeypatch.setattr(
        utils,
        "train_on_set",
        lambda net, images, labels, **recipe: trained.append((images, labels, recipe)),
    )
    for lines in code:
        exec(lines, {})
        (images, labels, recipe) = trained[-1]
        assert (
            images.shape == (1600, 3, 32, 32)
            and labels.shape == (1600, 10)
            and recipe["lr_schedule"] == "cosine"
        )


def test_lines_of_python_with_pixels_warn(tmp_path, digit_images, digits):
    torch.save(
        {"data": [[digits.denormalize(digit_images), LABELS]]},
        tmp_path / "res_DM_Digits_MLP_10ipc.pt",
    )
    with pytest.warns(UserWarning, match="look like pixels"):
        synsets.load_synset(tmp_path / "res_DM_Digits_MLP_10ipc.pt")
    images, labels, recipe = synsets.load_synset(
        tmp_path / "res_DM_Digits_MLP_10ipc.pt", images="pixels"
    )
    assert (
        torch.allclose(images, digit_images, atol=1e-5)
        and torch.equal(labels, LABELS)
        and recipe == synsets.PROTOCOL
    )


def test_a_terminal_without_the_letters_of_a_path(tmp_path):
    """A folder that latin-1 cannot show: the name is shown escaped."""
    folder = tmp_path / "\u6570\u636e"
    folder.mkdir()
    code = (
        "import sys; sys.argv[0] = 'x.py'\nfrom runtime.command_line import run_script\n"
        "run_script(lambda: print(sys.argv[1]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONIOENCODING": "latin-1"},
    )
    assert done.returncode == 0 and "\\u6570\\u636e" in done.stdout, done.stderr
