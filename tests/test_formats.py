"""Files of sets and networks: what loads, what is refused, what is written."""

import pickle

import numpy as np
import pytest
import torch
from conftest import sets_and_meta, write_set

from formats.network_file import load_into
from formats.synset_file import SyntheticSet, pack_of, read_synset, save_synset
from networks import get_network
from runtime.safe_io import InputError
from synsets import TrainConfig

IMAGES = torch.rand(20, 3, 32, 32, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(10).repeat_interleave(2)
SOFT = 3 * torch.randn(20, 100, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("meta", [{}, {"packed": True, "mean": [0.1]}])
def test_dc_layout_with_numpy_numbers(tmp_path, zipped, meta):
    content = {"data": [[IMAGES, LABELS], [IMAGES + 1, LABELS]],
               "accs_all_exps": {"ConvNet": [np.float64(0.5), np.float32(0.25)]}}
    content |= {"meta": meta} if meta else {}
    torch.save(content, tmp_path / "res.pt", _use_new_zipfile_serialization=zipped)
    sets, read = sets_and_meta(tmp_path / "res.pt")
    assert read == meta and len(sets) == 2
    assert torch.equal(sets[1].images, IMAGES + 1) and torch.equal(sets[1].labels, LABELS)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("kind", ["numpy", "cpu", "cuda"])
def test_pickled_pair(tmp_path, monkeypatch, protocol, kind):
    """The .pkl of IDM, BACON and ROME: a tuple, its tensors perhaps on a GPU that is not here."""
    path, pair = tmp_path / "set.pkl", (torch.nn.Parameter(IMAGES).detach(), LABELS)
    with monkeypatch.context() as patch:
        if kind == "cuda":
            patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        pair = tuple(x.numpy() for x in pair) if kind == "numpy" else pair
        path.write_bytes(pickle.dumps(pair, protocol))
    assert kind != "cuda" or b"cuda:0" in path.read_bytes()
    ((images, labels, soft, *_),), meta = sets_and_meta(path)
    assert torch.equal(images, IMAGES) and torch.equal(labels, LABELS)
    assert images.device.type == "cpu" and meta == {} and soft is None


@pytest.mark.parametrize("labels, kind, tolerance", [
    (LABELS, "hard labels", None),
    (LABELS[:, None], "hard labels", None),
    (SOFT, "soft labels (logits)", 1e-6),
    (SOFT.softmax(1), "soft labels (probabilities)", 1e-6),
    (SOFT.softmax(1).bfloat16(), "soft labels (probabilities)", 0.01),
])
@pytest.mark.parametrize("end, rate", [(".pt", "lr.pt"), ("_best.pt", "lr_best.pt"),
                                       ("_best.pt", "lr.pt")])
def test_images_beside_labels(tmp_path, labels, kind, tolerance, end, rate):
    """MTT, DATM and DD-Ranking: classes, logits, or probabilities, which become logarithms."""
    path = tmp_path / f"images{end}"
    torch.save(IMAGES, path)
    with pytest.raises(InputError, match=f"labels{end} does not exist"):
        read_synset(path)
    torch.save(labels, tmp_path / f"labels{end}")
    torch.save(torch.tensor(0.0123), tmp_path / rate)
    file = read_synset(path)
    images, hard, soft, *_ = file.sets[0]
    assert file.notes == [kind, "recipe lr_net 0.0123"]
    assert file.labels_from_soft == bool(tolerance) and torch.equal(images, IMAGES)
    assert torch.equal(hard, labels.argmax(1) if tolerance else LABELS)
    assert not tolerance or torch.allclose(soft.softmax(1), SOFT.softmax(1), atol=tolerance)
    assert TrainConfig.from_meta(file.meta).lr_net == 0.0123
    for wrong in (torch.tensor(-1.0), torch.zeros(3), {"lr": 1}):
        torch.save(wrong, tmp_path / rate)
        with pytest.raises(InputError, match=f"{rate} is no learning rate"):
            read_synset(path)


def dc(images=IMAGES, labels=LABELS, **more):
    return {"data": [[images, labels]], **more}


MANY = torch.zeros(1).expand(1 << 20, 3, 32, 32), torch.zeros(1).expand(1 << 20)


@pytest.mark.parametrize("content, message", [
    ({"dat": []}, "without a list 'data'.*'dat'"),
    (dc(IMAGES[0]), r"\(3, 32, 32\)"),
    (dc(IMAGES.long()), "int64"),
    (dc(labels=LABELS[:-1]), r"labels torch.int64 \(19,\)"),
    (dc(labels=torch.rand(20)), r"labels torch.float32 \(20,\) .*; expected whole numbers"),
    (dc(labels=SOFT[:-1]), r"\(19,\) for 20 images"),
    (dc(soft_labels=[SOFT], meta={"pack": 2}), r"floats \(80, classes\)"),
    (dc(soft_labels=[SOFT[:, :1]]), r"soft labels are torch.float32 \(20, 1\)"),
    (dc(soft_labels=[SOFT.long()]), "soft labels are torch.int64"),
    (dc(soft_labels=[SOFT * float("nan")]), "2000 values of the soft labels"),
    (dc(soft_labels=["ten"]), "no pair .*str"),
    (dc(soft_labels=[]), "no list of all sets"),
    ({"data": [[IMAGES, LABELS], [IMAGES, SOFT]]}, r"hard labels and soft labels \(logits\)"),
    (dc(meta={"pack": 3}), "pack of its meta is '3'; expected 1, 2, 4 or 8"),
    (dc(meta={"pack": True}), "pack of its meta is 'True'"),
    (dc(meta={"std": [0.2, 0, 0.2]}), "std of its meta is .*; expected a list of numbers above 0"),
    (dc(meta={"classes": "ten"}), "classes of its meta is 'ten'; expected a list"),
    (dc(meta={"recipe": 3}), "recipe of its meta is '3'; expected a dict"),
    (dc(IMAGES[:, :, :30], meta={"pack": 4}), "images of 30x32 cannot be packed 4x4"),
    (dc("a", "b"), "no pair"),
    (dc(*MANY), "would take 12.0 GiB"),
    (dc(IMAGES.index_fill(0, torch.tensor(3), float("nan"))), "3072 values .* not finite"),
    (IMAGES, "no synthetic set"),
])
def test_wrong_sets(tmp_path, content, message):
    torch.save(content, tmp_path / "set.pt")
    with pytest.raises(InputError, match=f"set.pt.*{message}"):
        sets_and_meta(tmp_path / "set.pt")


def test_what_is_written_is_in_the_dc_layout(tmp_path):
    """Read as BEARD (data[0]) and others (data[-1]) do, and without executing anything."""
    path, soft = tmp_path / "res.pt", torch.randn(80, 10)
    sets = [SyntheticSet(x, LABELS, soft) for x in (IMAGES, 2 * IMAGES)]
    row = {"model": "ConvNet", "n": 5, "clamp_acc": 0, "select_acc": None}
    rows = [{**row, "clean_acc": 0.5 + i, "robust_acc": 0.25 + i} for i in range(2)]
    save_synset(path, sets, rows, {"pack": 2, "mean": [0.1]})
    file = torch.load(path, weights_only=True)
    assert set(file) == {"data", "soft_labels", "accs_all_exps", "meta"}
    (images, labels), (last, _) = file["data"]
    assert torch.equal(images, IMAGES) and torch.equal(last, 2 * IMAGES)
    assert images.dtype == torch.float32 and labels.dtype == torch.int64
    assert file["accs_all_exps"] == {"ConvNet": [0.25, 1.25]}
    assert file["meta"] == {"pack": 2, "mean": [0.1], "clean_accs": {"ConvNet": [0.5, 1.5]}}
    assert [entry.name for entry in tmp_path.iterdir()] == ["res.pt"]
    read, meta = sets_and_meta(path)
    assert torch.equal(read[1].soft_labels, soft) and torch.equal(read[1].images, 2 * IMAGES)
    assert pack_of(meta) == 2 and pack_of({"packed": True}) == 2
    save_synset(path, [one._replace(soft_labels=None) for one in sets], [], {})
    assert "soft_labels" not in torch.load(path, weights_only=True)


def test_soft_labels_of_a_packed_set_by_flag(tmp_path):
    path, soft = write_set(tmp_path / "res.pt", IMAGES[:10], SOFT.repeat(2, 1)), SOFT.repeat(2, 1)
    with pytest.raises(InputError, match=r"are .* \(40, 100\); expected floats \(10, classes\)"):
        sets_and_meta(path)
    assert torch.equal(sets_and_meta(path, packed=2)[0][0].soft_labels, soft)


# ----------------------------------------------------------------------------------------- networks
@pytest.mark.parametrize("wrap, note", [
    (lambda d: {f"module.{key}": d[key] for key in d}, "'module.' dropped"),
    (lambda d: {f"_orig_mod.model.{key}": d[key] for key in d}, "'_orig_mod.model.' dropped"),
    (lambda d: {"state_dict": d, "epoch": 3}, "the state_dict in its 'state_dict'"),
    (lambda d: {key: d[key] for key in d if "num_b" not in key}, "without num_batches_tracked"),
])
def test_state_dicts_of_other_programs(tmp_path, wrap, note):
    net, other = (get_network("ConvNetBN", 3, 10, (32, 32), seed) for seed in (1, 2))
    torch.save(wrap(net.state_dict()), tmp_path / "net.pth")
    notes = []
    loaded = load_into(other, tmp_path / "net.pth", notes)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), loaded.parameters()))
    assert len(notes) == 1 and note in notes[0]


@pytest.mark.parametrize("change, message", [
    (lambda d: d.pop("classifier.bias"), "Missing .*classifier.bias"),
    (lambda d: d.update(extra=torch.zeros(1)), "Unexpected .*extra"),
    (lambda d: d.update({"classifier.bias": torch.zeros(9)}), r"bias.*\[9\].*\[10\]"),
    (lambda d: d["classifier.bias"].fill_(float("inf")), "classifier.bias has values that are not"),
    (lambda d: d.update(epoch=3), "holds no state_dict"),
    (lambda d: d.update(optimizer={"lr": 1}), "'optimizer' is a dict"),
    (lambda d: d.clear(), "holds no state_dict"),
])
def test_wrong_networks(tmp_path, change, message):
    net = get_network("ConvNetW32", 3, 10, (32, 32), 0)
    content = net.state_dict()
    change(content)
    torch.save(content, tmp_path / "net.pth")
    with pytest.raises(InputError, match=f"net.pth.*{message}"):
        load_into(net, tmp_path / "net.pth")
