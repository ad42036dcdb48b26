"""Files of sets and networks: what loads, what is refused, what is written."""
import collections
import pickle

import numpy as np
import pytest
import torch
from conftest import sets_and_meta

from formats.network_file import load_into, read_state_dict
from formats.synset_file import SyntheticSet, pack_of, save_synset
from runtime.safe_io import InputError, read_tensors
from networks import get_network

IMAGES = torch.rand(20, 3, 32, 32, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(10).repeat_interleave(2)


def dc_layout(meta=None):
    accuracies = {"ConvNet": [np.float64(0.5), np.float32(0.25)]}
    return {"data": [[IMAGES, LABELS], [IMAGES + 1, LABELS]], "accs_all_exps": accuracies, **({"meta": meta} if meta else {})}


@pytest.mark.parametrize("zipped", [True, False])
def test_dc_layout_with_numpy_numbers(tmp_path, zipped):
    torch.save(dc_layout(), tmp_path / "res.pt", _use_new_zipfile_serialization=zipped)
    sets, meta = sets_and_meta(tmp_path / "res.pt")
    assert meta == {} and len(sets) == 2
    assert torch.equal(sets[1][0], IMAGES + 1) and torch.equal(sets[1][1], LABELS)


def test_meta_is_read(tmp_path):
    torch.save(dc_layout({"packed": True, "mean": [0.1]}), tmp_path / "res.pt")
    assert sets_and_meta(tmp_path / "res.pt")[1] == {"packed": True, "mean": [0.1]}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("cuda", [False, True])
def test_pickled_pair(tmp_path, monkeypatch, protocol, cuda):
    """The .pkl of IDM, BACON and ROME: a pickled tuple, its tensors possibly on a GPU that this machine does not have."""
    with monkeypatch.context() as patch:
        if cuda:
            patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        content = pickle.dumps((torch.nn.Parameter(IMAGES).detach(), LABELS), protocol)
    assert not cuda or b"cuda:0" in content
    (tmp_path / "set.pkl").write_bytes(content)
    ((images, labels, soft),), meta = sets_and_meta(tmp_path / "set.pkl")
    assert torch.equal(images, IMAGES) and torch.equal(labels, LABELS) and images.device.type == "cpu" and meta == {}
    assert soft is None


def test_pickled_arrays(tmp_path):
    (tmp_path / "set.pkl").write_bytes(pickle.dumps((IMAGES.numpy(), LABELS.numpy())))
    ((images, labels, _),), _ = sets_and_meta(tmp_path / "set.pkl")
    assert torch.equal(images, IMAGES) and torch.equal(labels, LABELS)
    (tmp_path / "other.pkl").write_bytes(pickle.dumps(collections.OrderedDict(a=np.float64(1.5), b=[np.int64(3)])))
    assert read_tensors(tmp_path / "other.pkl") == {"a": 1.5, "b": [3]}


def test_two_bare_tensors(tmp_path):
    torch.save(IMAGES, tmp_path / "images_best.pt")
    with pytest.raises(InputError, match="labels_best.pt does not exist"):
        sets_and_meta(tmp_path / "images_best.pt")
    torch.save(LABELS, tmp_path / "labels_best.pt")
    ((images, labels, _),), _ = sets_and_meta(tmp_path / "images_best.pt")
    assert torch.equal(images, IMAGES) and torch.equal(labels, LABELS)


def test_network_trained_on_several_gpus(tmp_path):
    net = get_network("ConvNetW32", 3, 10, (32, 32), seed=1)
    torch.save(collections.OrderedDict(("module." + k, v) for k, v in net.state_dict().items()), tmp_path / "net.pth")
    loaded = load_into(get_network("ConvNetW32", 3, 10, (32, 32), seed=2), tmp_path / "net.pth")
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), loaded.parameters()))


@pytest.mark.parametrize("content, message", [
    ({"dat": []}, "without a list 'data'.*'dat'"),
    ({"data": []}, "without a list 'data'"),
    ({"data": [[IMAGES[0], LABELS]]}, r"\(3, 32, 32\)"),
    ({"data": [[IMAGES, LABELS[:-1]]]}, r"labels \(19,\)"),
    ({"data": [[IMAGES.long(), LABELS]]}, "int64"),
    ({"data": [[IMAGES, torch.rand(20)]]}, "no whole numbers; soft labels have a column for each class"),
    ({"data": [[IMAGES, torch.rand(19, 10)]]}, r"images are .* labels \(19,\)"),
    ({"data": [[IMAGES, LABELS]], "soft_labels": [torch.rand(20, 10)], "meta": {"pack": 2}}, r"floats \(80, classes\)"),
    ({"data": [[IMAGES, LABELS]], "soft_labels": [torch.rand(20, 1)]}, r"soft labels are torch.float32 \(20, 1\)"),
    ({"data": [[IMAGES, LABELS]], "soft_labels": [torch.ones(20, 10).long()]}, "soft labels are torch.int64"),
    ({"data": [[IMAGES, LABELS]], "soft_labels": [torch.full((20, 10), float("nan"))]}, "200 values of the soft labels"),
    ({"data": [[IMAGES, LABELS]], "soft_labels": ["ten"]}, "no pair .*str"),
    ({"data": [[IMAGES, LABELS]], "soft_labels": []}, "no list with an entry for each of the 1 sets"),
    ({"data": [[IMAGES, LABELS]], "meta": {"pack": 3}}, "pack of its meta is '3', no int of 1, 2, 4, 8"),
    ({"data": [[IMAGES, LABELS]], "meta": {"pack": True}}, "pack of its meta is 'True'"),
    ({"data": [[IMAGES, LABELS]], "meta": {"pack": 2, "recipe": {"pack": 4}}}, "recipe trains on images packed 4x4, .* 2x2"),
    ({"data": [[IMAGES, LABELS]], "meta": {"recipe": {"epochs": 0}}}, "epochs of its recipe is '0'.* int of at least 1"),
    ({"data": [[IMAGES, LABELS]], "meta": {"recipe": {"lr_net": "fast"}}}, "lr_net of its recipe is 'fast'"),
    ({"data": [[IMAGES, LABELS]], "meta": {"recipe": {"temperature": float("inf")}}}, "temperature of its recipe is 'inf'"),
    ({"data": [[IMAGES, LABELS]], "meta": {"recipe": 3}}, "recipe of its meta is '3', no dict"),
    ({"data": [[IMAGES[:, :, :30], LABELS]], "meta": {"pack": 4}}, "images of 30x32 cannot be packed 4x4"),
    ({"data": [["a", "b"]]}, "no pair"),
    ({"data": [[torch.zeros(1).expand(1 << 20, 3, 32, 32), torch.zeros(1).expand(1 << 20)]]}, "would take 12.0 GiB"),
    ({"data": [[IMAGES.index_fill(0, torch.tensor(3), float("nan")), LABELS]]}, "3072 values .* not finite"),
    (IMAGES, "no synthetic set"),
    ([1, 2, 3], "no synthetic set"),
])
def test_wrong_sets(tmp_path, content, message):
    torch.save(content, tmp_path / "set.pt")
    with pytest.raises(InputError, match=f"set.pt.*{message}"):
        sets_and_meta(tmp_path / "set.pt")


@pytest.mark.parametrize("change, message", [
    (lambda d: d.pop("classifier.bias"), "classifier.bias is missing"),
    (lambda d: d.update(extra=torch.zeros(1)), "extra is unknown"),
    (lambda d: d.update({"classifier.bias": torch.zeros(100)}), r"classifier.bias is \(100,\), expected \(10,\)"),
    (lambda d: d["classifier.bias"].fill_(float("inf")), "classifier.bias has values that are not finite"),
    (lambda d: d.update(epoch=3), "expected a state_dict"),
])
def test_wrong_networks(tmp_path, change, message):
    net = get_network("ConvNetW32", 3, 10, (32, 32), seed=0)
    content = net.state_dict()
    change(content)
    torch.save(content, tmp_path / "net.pth")
    with pytest.raises(InputError, match=f"net.pth.*{message}"):
        load_into(get_network("ConvNetW32", 3, 10, (32, 32), seed=0), tmp_path / "net.pth")
    torch.save([1], tmp_path / "net.pth")
    with pytest.raises(InputError, match="a list; expected a state_dict"):
        read_state_dict(tmp_path / "net.pth")


def test_synset_file_is_in_the_dc_layout(tmp_path):
    """Read as BEARD (data[0]) and others (data[-1]) do, and without executing anything."""
    x, y = torch.randn(10, 3, 32, 32), torch.arange(10)
    rows = [{"model": "ConvNet", "n": 5, "clean_acc": 0.5 + i, "clamp_acc": 0, "robust_acc": 0.25 + i, "select_acc": None}
            for i in range(2)]
    save_synset(tmp_path / "res.pt", [SyntheticSet(x, y), SyntheticSet(2 * x, y)], rows, {"packed": True, "mean": [0.1]})
    file = torch.load(tmp_path / "res.pt", weights_only=True)
    assert set(file) == {"data", "accs_all_exps", "meta"}
    assert torch.equal(file["data"][0][0], x) and torch.equal(file["data"][-1][0], 2 * x)
    assert file["data"][0][0].dtype == torch.float32 and file["data"][0][1].dtype == torch.int64
    assert file["accs_all_exps"] == {"ConvNet": [0.25, 1.25]} and file["meta"]["clean_accs"] == {"ConvNet": [0.5, 1.5]}
    assert [p.name for p in tmp_path.iterdir()] == ["res.pt"]


def test_soft_labels_are_written_and_read(tmp_path):
    soft = torch.randn(40, 10)
    save_synset(tmp_path / "res.pt", [SyntheticSet(IMAGES[:10], LABELS[:10], soft)], [], {"pack": 2})
    file = torch.load(tmp_path / "res.pt", weights_only=True)
    assert torch.equal(file["data"][0][1], LABELS[:10])  # what other tools read
    ((images, labels, read),), meta = sets_and_meta(tmp_path / "res.pt")
    assert torch.equal(read, soft) and torch.equal(images, IMAGES[:10]) and pack_of(meta) == 2
    with pytest.raises(InputError, match=r"soft labels are .* \(40, 10\); expected floats \(10, classes\)"):
        torch.save({key: file[key] for key in ("data", "soft_labels")}, tmp_path / "res.pt")
        sets_and_meta(tmp_path / "res.pt")
    assert torch.equal(sets_and_meta(tmp_path / "res.pt", packed=2)[0][0].soft_labels, soft)  # --packed 2


def test_soft_labels_of_others(tmp_path):
    """DD-Ranking's and DATM's images.pt beside labels.pt (N, classes): logits; FRePo-like ones in the DC layout; probabilities
    become logarithms."""
    logits = torch.randn(20, 10)
    for folder, labels in (("logits", logits), ("probabilities", logits.softmax(1))):
        (tmp_path / folder).mkdir()
        torch.save(IMAGES, tmp_path / folder / "images.pt")
        torch.save(labels, tmp_path / folder / "labels.pt")
        torch.save(torch.tensor(0.01), tmp_path / folder / "lr.pt")
        ((images, hard, soft),), _ = sets_and_meta(tmp_path / folder / "images.pt")
        assert torch.equal(images, IMAGES) and torch.equal(hard, logits.argmax(1))
        assert torch.allclose(soft.softmax(1), logits.softmax(1), atol=1e-6)
    torch.save({"data": [[IMAGES, logits]]}, tmp_path / "res.pt")
    assert torch.equal(sets_and_meta(tmp_path / "res.pt")[0][0].soft_labels, logits)
