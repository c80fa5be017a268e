"""Checkpoints of all kinds: each is loaded to the bit, or refused in a few lines; nothing is loaded in part."""

import argparse
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import featx, random_network
from torch import nn
from torchvision import models

from featx import FeatureExtractor
from featx.errors import BadValueError, UserError
from featx.model import build
from featx.model.build import build_empty
from featx.model.checkpoint import digest, fit, normalizer, read_checkpoint


def trained(arch="resnet18", **options):
    """Return a network whose running statistics differ from a new one's."""
    network = random_network(arch, seed=5, **options)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.num_batches_tracked.fill_(7)
    return network


@pytest.fixture(scope="module")
def resnet():
    return trained()


@pytest.fixture(autouse=True)
def few_archs(monkeypatch):
    """Compare a wrong file with a few archs; building the nearest of all takes half a second."""
    monkeypatch.setattr(
        models, "list_models", lambda module: ["resnet18", "resnet34", "squeezenet1_1", "mobilenet_v3_small"]
    )


def under(prefix, state):
    return {prefix + name: value for name, value in state.items()}


def other(state):
    """Return another network's weights, which must not be used."""
    return {name: torch.zeros_like(value) for name, value in state.items()}


def optimizer(network):
    return torch.optim.SGD(network.parameters(), 0.1, momentum=0.9).state_dict()


def without(state, *ends):
    return {name: value for name, value in state.items() if not name.endswith(ends)}


def imagenet_example(n, s):
    return {"epoch": 90, "arch": "resnet18", "state_dict": under("module.", s), "best_acc1": torch.tensor(69.8),
            "optimizer": optimizer(n), "scheduler": {"last_epoch": 90}}  # fmt: skip


def lightning(n, s):
    return {"epoch": 3, "global_step": 12, "pytorch-lightning_version": "2.5.0", "state_dict": under("model.", s),
            "loops": {"fit_loop": {"state_dict": {}}}, "callbacks": {"ModelCheckpoint": {"best": torch.tensor(1.0)}},
            "optimizer_states": [optimizer(n)], "lr_schedulers": [], "hyper_parameters": {"lr": 0.1}}  # fmt: skip


class Gone(dict):
    """A class that cannot be imported where the file is read."""

    def __reduce_ex__(self, protocol):
        return object.__reduce_ex__(self, 2)


def gone(items, **attributes):
    made = Gone(items)
    vars(made).update(attributes)
    return made


RIGHT = {
    "a bare state dict": lambda n, s: s,
    "PyTorch's imagenet example, DataParallel": imagenet_example,
    "torchvision's references, with an EMA": lambda n, s: {
        "model_ema": {"n_averaged": torch.tensor(3), **under("module.", other(s))}, "model": s, "epoch": 1},
    "timm's training, with an EMA": lambda n, s: {"state_dict_ema": other(s), "state_dict": s, "arch": "resnet18"},
    "model_state_dict": lambda n, s: {"model_state_dict": s, "optimizer_state_dict": optimizer(n), "loss": 0.1},
    "net": lambda n, s: {"net": under("module.", s), "acc": 93.1, "epoch": 7},
    "network inside model": lambda n, s: {"model": {"network": s, "step": 3}},
    "a Lightning module": lightning,
    "a Lightning module, with a criterion and an EMA": lambda n, s: {
        "state_dict": {**under("model.", s), "criterion.weight": torch.ones(1000), **under("ema.", other(s))}},
    "torch.compile": lambda n, s: under("_orig_mod.", s),
    "torch.compile in DDP in a module": lambda n, s: under("module.model._orig_mod.", s),
    "network in model": lambda n, s: under("model.network.", s),
    "a backbone with a projector": lambda n, s: {**under("backbone.", s), "projector.0.weight": torch.ones(9, 512)},
    "torch.optim.swa_utils.AveragedModel": lambda n, s: {"n_averaged": torch.tensor(5), **under("module.", s)},
    "a second head": lambda n, s: {**s, "rotation_head.weight": torch.ones(4, 512)},
    "before num_batches_tracked": lambda n, s: without(s, "num_batches_tracked"),
    "thop's counters": lambda n, s: {**s, "layer1.0.conv1.total_ops": torch.ones(1), "total_params": torch.ones(1)},
    "args of argparse": lambda n, s: {"state_dict": s, "args": argparse.Namespace(lr=0.1, out=Path("/data"))},
    "accuracies of numpy": lambda n, s: {"state_dict": s, "acc": np.float64(0.9), "all": np.arange(3.0)},
    "a dict of a class that is gone": lambda n, s: gone({"state_dict": gone(s)}),
    "attributes of a class that is gone": lambda n, s: gone({}, model=s, step=torch.ones(1)),
    "a network pickled whole": lambda n, s: n,
    "a network pickled whole in DataParallel": lambda n, s: {"model": nn.DataParallel(n), "ema": None},
    "parameters, a type of its own": lambda n, s: dict(n.named_parameters()) | dict(n.named_buffers()),
    "VISSL, four levels down": lambda n, s: {
        "phase": 1, "classy_state_dict": {"base_model": {"model": {"trunk": s}}}},
    "only an EMA": lambda n, s: {"state_dict_ema": s, "epoch": 1},
    "float64": lambda n, s: {k: v.double() if v.is_floating_point() else v for k, v in s.items()},
}  # fmt: skip


def load(path, arch="resnet18", layer="fc", **options):
    model = FeatureExtractor(layer, arch=arch, weights=str(path), **options)
    model.configure_model()
    return model


def assert_same(network, state):
    found = network.state_dict()
    assert all(torch.equal(found[name], value) for name, value in state.items() if not name.endswith("tracked"))
    assert found["conv1.weight"].dtype == torch.float32


def assert_same_output(model, network, columns):
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    (found,) = model(images).values()
    with torch.no_grad():
        assert torch.equal(found, network(model.preprocessing.normalize(images)))
    assert found.shape == (2, columns)


@pytest.mark.parametrize("what", RIGHT)
def test_a_checkpoint_with_the_whole_network_is_loaded_to_the_bit(tmp_path, resnet, what):
    state = resnet.state_dict()
    torch.save(RIGHT[what](resnet, state), tmp_path / "w.pth.tar")
    model = load(tmp_path / "w.pth.tar")
    assert_same(model.network, state)
    assert model.weights_notes == [] and model.weights_used == str(tmp_path / "w.pth.tar")


def test_a_loaded_network_computes_the_same_as_the_saved_one(tmp_path, resnet):
    torch.save(imagenet_example(resnet, resnet.state_dict()), tmp_path / "w.pth.tar")
    assert_same_output(load(tmp_path / "w.pth.tar"), resnet, 1000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", ["safetensors", "zip", "legacy"])
def test_every_form_of_file_and_half_precision_are_read(tmp_path, resnet, form, dtype):
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in resnet.state_dict().items()}
    if form == "safetensors":
        safetensors.torch.save_file(state, tmp_path / "w")
    else:
        torch.save(state, tmp_path / "w", _use_new_zipfile_serialization=form == "zip")
    assert_same(load(tmp_path / "w").network, {k: v.float() for k, v in state.items()})


def test_the_normalizer_of_a_robust_network_is_used(tmp_path, resnet, caplog):
    caplog.set_level("INFO", "featx")
    mean, std = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2023, 0.1994, 0.2010])
    own = {"module.normalizer.new_mean": mean.view(3, 1, 1), "module.normalizer.new_std": std.view(3, 1, 1)}
    attacker = under("module.attacker.model.", resnet.state_dict()) | {
        name.replace("normalizer", "attacker.normalize"): value for name, value in own.items()
    }
    torch.save({"model": own | under("module.model.", resnet.state_dict()) | attacker}, tmp_path / "w.pth")
    model = load(tmp_path / "w.pth")
    assert_same(model.network, resnet.state_dict())
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    theirs = (images / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    with torch.no_grad():
        assert torch.equal(model(images)["fc"], resnet(theirs))
    names = "module.normalizer.new_mean and module.normalizer.new_std"
    assert f"with the file's {names}" in model.preprocessing.source and f"weights: using {names} of" in caplog.text
    assert "ignored" in caplog.text and "new_" not in caplog.text[caplog.text.index("ignored") :]
    mixed = load(tmp_path / "w.pth", std=[0.5, 0.5, 0.5]).preprocessing
    assert mixed.mean == tuple(mean.tolist()) and mixed.std == (0.5, 0.5, 0.5)


def test_a_normalizer_of_the_network_itself_or_on_another_scale_is_left_alone():
    three = torch.full((3,), 0.5)
    assert normalizer(["mean", "std"], {"model.mean": three, "model.std": three}, "f") is None
    assert normalizer(["w"], {"norm.mean": three * 255, "norm.std": three}, "f") is None
    assert normalizer(["w"], {"bn.running_mean": three, "bn.running_std": three}, "f") is None
    assert normalizer(["w"], {"mean": three, "std": three}, "f") == ((0.5,) * 3, (0.5,) * 3, ["mean", "std"])
    with pytest.raises(BadValueError, match=r"several normalizers, a.mean; b.mean"):
        normalizer(["w"], {"a.mean": three, "a.std": three, "b.mean": three / 2, "b.std": three}, "f")


def test_data_parallel_features_of_pytorchs_imagenet_example_are_read(tmp_path):
    network = trained("squeezenet1_1")
    state = {n.replace("features.", "features.module."): v for n, v in network.state_dict().items()}
    torch.save({"state_dict": state, "arch": "squeezenet1_1"}, tmp_path / "w.pth.tar")
    model = load(tmp_path / "w.pth.tar", "squeezenet1_1", "classifier.1")
    assert digest(model.network) == digest(network)


REFUSED = {
    "another, deeper arch of the same keys": (lambda n, s: random_network("resnet34").state_dict(),
                                              r"not in the network: layer1.2.conv1.weight.*\n.*fits resnet34"),
    "another arch in a Lightning module": (
        lambda n, s: under("model.", random_network("squeezenet1_1").state_dict()),
        r"missing from the file: conv1.weight; bn1.weight; bn1.bias and \d+ more\n.*fits squeezenet1_1"),
    "no classifier": (lambda n, s: without(s, "fc.weight", "fc.bias"), "missing from the file: fc.weight; fc.bias\n"),
    "a head of two layers": (lambda n, s: {**without(s, "fc.weight", "fc.bias"), "fc.1.weight": torch.ones(10, 512)},
                             r"(?s)missing from the file: fc.weight; fc.bias\n.*not in the network: fc.1.weight"),
    "no running statistics": (lambda n, s: without(s, "running_mean", "running_var"),
                              r"missing from the file: bn1.running_mean; .* and 37 more\n"),
    "another kernel": (lambda n, s: {**s, "conv1.weight": torch.ones(64, 3, 3, 3)},
                       r"another shape or type: conv1.weight \(64, 3, 3, 3\), expected \(64, 3, 7, 7\)"),
    "weights in int8": (lambda n, s: {**s, "conv1.weight": torch.ones(64, 3, 7, 7, dtype=torch.int8)},
                        r"another shape or type: conv1.weight \(64, 3, 7, 7\) int8, expected"),
    "MoCo, two encoders": (lambda n, s: {"state_dict": under("module.encoder_q.", s) | under("module.encoder_k.", s)},
                           r"2 networks in it fit, .* encoder_q; encoder_k.\n  encoder_q: the encoder that MoCo trains "
                           r"and.*\n  encoder_k: its .*not evaluate\nChoose .*key encoder_q or --model"),
    "DINO, student and teacher": (lambda n, s: {"student": s, "teacher": s, "epoch": 1},
                                  r"State dicts: student; teacher; .*\n  student: .*\n  teacher: .*which DINO"),
    "numbered without ReLU and pooling": (
        lambda n, s: {"state_dict": under("f.", nn.Sequential(n.conv1, n.bn1, n.layer1, n.layer2, n.layer3, n.layer4)
                                          .state_dict())},
        r"The file numbers modules \(f.0.weight\), and not in the order of resnet18's own"),
    "a GAN, nothing under a known key": (lambda n, s: {"generator": s, "discriminator": s, "epoch": 1},
                                         "State dicts: generator; discriminator; choose one with --model.check"),
    "no weights": (lambda n, s: {"epoch": 3}, r"no state dict.*\n.*contains epoch"),
    "nothing": (lambda n, s: {}, r"no state dict.*\n.*contains nothing"),
    "a list": (lambda n, s: [1, 2], r"no state dict.*\n.*contains list"),
}  # fmt: skip


@pytest.mark.parametrize("prefix", ["backbone.", "0.", ""])
def test_modules_that_are_numbered_in_their_order_are_found(tmp_path, resnet, caplog, prefix):
    caplog.set_level("INFO", "featx")
    state = resnet.state_dict()
    body = nn.Sequential(*list(resnet.children())[:-1]).state_dict()
    head = {"1.2.weight": torch.ones(9, 512), "projection_head.0.weight": torch.ones(9, 512)} if prefix else {}
    torch.save({"state_dict": under(prefix, body) | head}, tmp_path / "w.ckpt")
    assert_same(load(tmp_path / "w.ckpt", layer="avgpool").network, without(state, "fc.weight", "fc.bias"))
    assert "w.ckpt numbers the modules of ResNet in their order" in caplog.text
    with pytest.raises(BadValueError, match=r"missing from the file: fc.weight; fc.bias\n"):
        load(tmp_path / "w.ckpt")
    torch.save({"state_dict": under("online.", body) | under("momentum.", other(body))}, tmp_path / "w.ckpt")
    with pytest.raises(BadValueError, match="2 networks in it fit, with the prefixes online; momentum"):
        load(tmp_path / "w.ckpt", layer="avgpool")
    found = load(tmp_path / "w.ckpt", layer="avgpool", checkpoint_key="online").network
    assert_same(found, without(state, "fc.weight", "fc.bias"))


def test_a_prefix_that_fits_a_few_names_only_is_not_used(tmp_path, resnet):
    swapped = nn.Sequential(*[nn.Sequential(module) for module in list(resnet.children())[:-1]]).state_dict()
    torch.save({"state_dict": under("backbone.", swapped)}, tmp_path / "w.pth")
    for strict in (True, False):
        with pytest.raises(BadValueError, match=r"does not fit resnet18(?s:.*)The file numbers modules"):
            load(tmp_path / "w.pth", strict=strict)


@pytest.mark.parametrize("shape", [(), (0,), (1, 0, 3), (1, 9, 1), (2, 3, 20, 20)])
@pytest.mark.parametrize("arch", ["resnet18", "vit_b_32"])
def test_tensors_of_odd_shapes_are_refused(tmp_path, monkeypatch, shape, arch):
    monkeypatch.setattr(models, "list_models", lambda module: ["resnet18", "vit_b_32"])
    state = {name: torch.ones(shape) for name in build_empty(arch).state_dict()}
    if len(shape) == 4:
        state["encoder.pos_embedding"] = torch.ones(1, 50, 3)  # 7 x 7 patches of 20 pixels
    torch.save(state | {1 << 99999: 3, "\x1b[2J": 1}, tmp_path / "w.pth")
    with pytest.raises(BadValueError, match=f"does not fit {arch}"):
        load(tmp_path / "w.pth", arch, "fc" if arch == "resnet18" else "heads")


@pytest.mark.parametrize("key", ["a.b.c", "a.b", "a", "a.b.c.module.trunk", "list.1", "few", "a.b.c.trunk"])
def test_any_dotted_key_is_found(tmp_path, resnet, key):
    state = resnet.state_dict()
    few = {**state, **{f"option{number}": number for number in range(200)}}
    content = {"a": {"b": {"c": under("module.trunk.", state)}}, "list": [{"x": torch.ones(1)}, state], "few": few}
    torch.save(content, tmp_path / "w.pth")
    assert_same(load(tmp_path / "w.pth", checkpoint_key=key).network, state)


@pytest.mark.parametrize("what", REFUSED)
def test_a_checkpoint_without_the_whole_network_is_refused(tmp_path, resnet, what):
    make, words = REFUSED[what]
    torch.save(make(resnet, resnet.state_dict()), tmp_path / "w.pth")
    with pytest.raises(BadValueError, match=words) as caught:
        load(tmp_path / "w.pth")
    assert f"--model.weights {tmp_path}/w.pth: " in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 12


@pytest.mark.parametrize(
    ("arch", "options", "told"),
    [
        ("shufflenet_v2_x2_0", {"num_classes": 10}, "It fits shufflenet_v2_x2_0"),
        ("googlenet", {"aux_logits": True, "init_weights": False}, "It fits googlenet"),  # as torchvision's file is
        ("vit_b_16", {"image_size": 32}, "It fits vit_b_16"),
        ("mobilenet_v2", {"width_mult": 0.3}, "Expected the weights of this network"),
    ],
)
def test_the_arch_of_a_wrong_file_is_found_by_building_few(tmp_path, monkeypatch, arch, options, told):
    monkeypatch.undo()  # all that torchvision has
    built = []
    monkeypatch.setattr(build, "build_empty", lambda arch, size=None: built.append(arch) or build_empty(arch, size))
    torch.save(under("module.", random_network(arch, **options).state_dict()), tmp_path / "w.pth")
    with pytest.raises(BadValueError, match=told):
        load(tmp_path / "w.pth")
    assert built[0] == "resnet18" and len(built[1:]) <= 10  # the one that was asked for, and those of the message


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    "content", [b"", b"not a checkpoint", b"version https://git-lfs.github.com/spec/v1\noid", "half"]
)
def test_a_file_that_is_not_a_checkpoint_is_refused(tmp_path, suffix, content):
    if content == "half":
        save = safetensors.torch.save_file if suffix == ".safetensors" else torch.save
        save({"weight": torch.ones(500)}, tmp_path / "whole")
        content = (tmp_path / "whole").read_bytes()[:900]
    (tmp_path / f"w{suffix}").write_bytes(content)
    with pytest.raises(BadValueError, match=rf"w{suffix}: not a PyTorch checkpoint, or damaged"):
        read_checkpoint(str(tmp_path / f"w{suffix}"))


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")  # of the format, not of such files
def test_a_zip_of_something_else_and_a_torchscript_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "w.pt", "w") as archive:
        archive.writestr("photo.jpg", b"")
    with pytest.raises(BadValueError, match="not a PyTorch checkpoint"):
        read_checkpoint(str(tmp_path / "w.pt"))
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "s.pt")
    with pytest.raises(BadValueError, match=r"a TorchScript program.*\n.*torch.jit.load\(FILE\).state_dict"):
        read_checkpoint(str(tmp_path / "s.pt"))


def test_the_choice_among_several_is_printed_and_the_key_decides(tmp_path, resnet, caplog):
    caplog.set_level("INFO", "featx")
    state = resnet.state_dict()
    ema = {name: value + 1 for name, value in state.items()}
    torch.save({"model": {"ema": ema, "state_dict": state}, "queue": under("encoder_k.", ema)}, tmp_path / "w.pth")
    assert_same(load(tmp_path / "w.pth").network, state)
    assert "model.state_dict of" in caplog.text and "not model.ema; queue; --model.checkpoint_key" in caplog.text
    for key in ("model.ema", "queue", "queue.encoder_k"):
        assert_same(load(tmp_path / "w.pth", checkpoint_key=key).network, ema)
    assert_same(load(tmp_path / "w.pth", checkpoint_key="model").network, state)
    with pytest.raises(BadValueError, match=r"checkpoint_key model.emma: .* Did you mean model.ema"):
        load(tmp_path / "w.pth", checkpoint_key="model.emma")


def test_the_key_decides_between_two_encoders(tmp_path, resnet):
    state = resnet.state_dict()
    content = {"state_dict": {**under("module.encoder_q.", state), **under("module.encoder_k.", other(state))}}
    torch.save(content, tmp_path / "w.pth")
    for key in ("encoder_q", "state_dict.encoder_q"):
        assert_same(load(tmp_path / "w.pth", checkpoint_key=key).network, state)


def test_an_unknown_prefix_is_removed_and_reported(tmp_path, resnet, caplog):
    caplog.set_level("INFO", "featx")
    state = resnet.state_dict()
    torch.save({**under("student.", state), "loss.center": torch.ones(3)}, tmp_path / "w.pth")
    assert_same(load(tmp_path / "w.pth").network, state)
    assert (
        "using names that begin with student." in caplog.text and "not part of the network: loss.center" in caplog.text
    )


def test_a_prefix_in_the_networks_own_names_stays(tmp_path):
    class Wrapped(nn.Module):
        def __init__(self, outputs):
            super().__init__()
            self.module = nn.Linear(3, outputs)

    source, target = Wrapped(2), Wrapped(2)
    fit(target, under("module.", source.state_dict()), "f", "Wrapped")
    assert digest(source) == digest(target)


@pytest.mark.parametrize(
    ("arch", "last", "output"),
    [
        ("resnet18", "fc", "fc"),
        ("squeezenet1_1", "classifier.1", "classifier"),
        ("mobilenet_v3_small", "classifier.3", "classifier"),
    ],
)
def test_a_classifier_with_another_number_of_classes_is_resized_and_reported(tmp_path, caplog, arch, last, output):
    caplog.set_level("INFO", "featx")
    network = trained(arch, num_classes=10)
    torch.save({"state_dict": under("module.", network.state_dict())}, tmp_path / "w.pth.tar")
    model = load(tmp_path / "w.pth.tar", arch, output)
    assert digest(model.network) == digest(network)
    assert_same_output(model, network, 10)
    assert model.weights_notes == [f"{last} has the 10 classes of the file, not the 1000 of {arch}"]
    assert model.weights_notes[0] in caplog.text


def test_auxiliary_classifiers_are_resized_too():
    def inception(classes):
        return models.inception_v3(num_classes=classes, init_weights=False)

    source, target = inception(7), inception(1000)
    fit(target, source.state_dict(), "f", "inception_v3")
    assert digest(source) == digest(target) and target.AuxLogits.fc.out_features == 7


def test_not_strict_loads_what_fits_and_reports_what_stays_random(tmp_path, resnet, caplog):
    state = without(resnet.state_dict(), "fc.weight", "fc.bias") | {"layer4.9.weight": torch.ones(3)}
    state["conv1.weight"] = torch.ones(64, 3, 3, 3)
    torch.save(state, tmp_path / "w.pth")
    model = load(tmp_path / "w.pth", strict=False)
    assert_same(
        model.network, {name: state[name] for name in state if "layer4.9" not in name and name != "conv1.weight"}
    )
    told = "not strict: 3 of 102 tensors stay random: conv1.weight; fc.weight; fc.bias"
    assert model.weights_notes == [told] and told in caplog.text
    assert torch.equal(model.network.fc.weight, load(tmp_path / "w.pth", strict=False).network.fc.weight)
    torch.save({"a.weight": torch.ones(3)}, tmp_path / "w.pth")
    with pytest.raises(BadValueError, match="does not fit resnet18"):
        load(tmp_path / "w.pth", strict=False)


def test_a_state_dict_that_does_not_fit_changes_nothing(resnet):
    target = random_network("resnet18", seed=9)
    before = digest(target)
    with pytest.raises(BadValueError):
        fit(target, without(resnet.state_dict(), "bn1.bias"), "f", "resnet18")
    assert digest(target) == before


def test_weights_that_are_not_finite_are_reported(tmp_path, resnet, caplog):
    torch.save({**resnet.state_dict(), "fc.bias": torch.full((1000,), torch.nan)}, tmp_path / "w.pth")
    load(tmp_path / "w.pth")
    assert "values that are not finite: fc.bias" in caplog.text


def test_names_of_old_torchvision_versions_are_read():
    network = trained("densenet121")
    old = {n.replace("norm1.", "norm.1.").replace("norm2.", "norm.2.").replace("conv1.", "conv.1.")
           .replace("conv2.", "conv.2."): v for n, v in network.state_dict().items()}  # fmt: skip
    assert len([name for name in old if "conv.1." in name]) == 58
    fit(target := random_network("densenet121"), without(old, "num_batches_tracked"), "f", "densenet121")
    assert torch.equal(target.features.denseblock4.denselayer16.conv2.weight,
                       network.features.denseblock4.denselayer16.conv2.weight)  # fmt: skip

    def vit():
        return models.VisionTransformer(32, 16, 2, 2, 8, 16, num_classes=3)

    source, target = vit(), vit()
    names = {"mlp.0.": "mlp.linear_1.", "mlp.3.": "mlp.linear_2."}
    old = {next((n.replace(a, b) for a, b in names.items() if a in n), n): v for n, v in source.state_dict().items()}
    assert len([name for name in old if "linear_2" in name]) == 4
    fit(target, old, "f", "vit")
    assert digest(source) == digest(target)


def test_index_tables_need_not_be_in_the_file_and_mnasnet_is_read():
    def swin():
        return models.SwinTransformer([4, 4], 8, [2], [2], [4, 4], num_classes=3)

    source, target = swin(), swin()
    fit(target, without(source.state_dict(), "relative_position_index"), "f", "swin")
    assert digest(source) == digest(target)
    source, target = trained("mnasnet0_5"), random_network("mnasnet0_5")
    fit(target, dict(source.state_dict()), "f", "mnasnet0_5")  # its loader asks for a version
    assert digest(source) == digest(target)


def test_the_digest_covers_every_value_name_shape_and_dtype_but_not_the_layout():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    first = digest(network)
    assert digest(network.to(memory_format=torch.channels_last)) == first
    network[1].running_var[2] += 1e-3
    assert digest(network) != first
    assert digest(network.half()) != first
    assert digest(nn.Flatten()) == digest(nn.Flatten()) != first


def test_options_of_a_weights_file_are_refused_without_a_file():
    for options in ({"strict": False}, {"checkpoint_key": "ema"}):
        with pytest.raises(UserError, match=f"--model.{next(iter(options))} .*--model.weights random is not a file"):
            FeatureExtractor("fc", arch="resnet18", weights="random", **options).check()


def test_a_wrong_checkpoint_ends_the_command_with_2_and_few_lines(tmp_path, three_photos, resnet):
    torch.save({"state_dict": under("module.", resnet.state_dict())}, tmp_path / "w.pth.tar")
    done = featx("predict", "--data.dir", three_photos, "--model.arch", "squeezenet1_1", "--model.layer", "features.0",
                 "--model.weights", tmp_path / "w.pth.tar", "--writer.out_dir", tmp_path / "out")  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "does not fit squeezenet1_1" in done.stderr and "It fits resnet18: --model.arch resnet18" in done.stderr
    error = done.stderr[done.stderr.index("featx: error") :]
    assert len(error.splitlines()) <= 12 and not (tmp_path / "out").exists()
