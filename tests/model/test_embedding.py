"""The embedding against the makers' own call, and for networks that nobody knows."""

import pytest
import timm
import torch
from test_inplace import OPTIONS, SIDES, cheap_network
from torch import nn
from torchvision import models

from featx.errors import BadValueError, UserError
from featx.model.layers import Taps, resolve_layers
from featx.process.shared import on_one_core

EMBEDDING = {"embedding": "embedding"}
# The smallest of each of timm's families: first those that take a second, then others.
TIMM = """
test_byobnet test_convnext test_efficientnet test_mambaout test_maxvit test_nfnet test_resnet test_vit test_vit3
test_vit_relpos coat_lite_tiny convit_tiny crossvit_tiny_240 cspnext_tiny deit_tiny_distilled_patch16_224
edgenext_xx_small efficientformerv2_s0 efficientvim_m1 efficientvit_b0 efficientvit_m0 ese_vovnet19b_slim_dw
fasternet_t0 fastvit_t8 ghostnet_050 gmlp_ti16_224 inception_next_atto iformer_t lcnetv2_small levit_128s
mobilenetv3_small_050 mobilevit_xxs pit_ti_224 pvt_v2_b0 regnetx_002 repghostnet_050 repvit_m1_1 rexnet_100
shvit_s1 starnet_s050 swiftformer_xs xcit_nano_12_p16_224
"""
TIMM_SLOW = """
beit_base_patch16_224 caformer_s18 cait_xxs24_224 convmixer_768_32 cs3darknet_focus_s csatv2 davit_tiny
densenet121 dla34 dpn68 efficientformer_l1 eva02_tiny_patch14_224 focalnet_tiny_srf gcvit_xxtiny gernet_s
hardcorenas_a hgnetv2_b0 hiera_tiny_224 hrnet_w18_small inception_resnet_v2 inception_v3 inception_v4
legacy_seresnet18 legacy_xception lowformer_b0 mvitv2_tiny nasnetalarge nest_tiny_jx nextvit_small pnasnet5large
rdnet_tiny res2net50_14w_8s resnest14d resnetv2_18 selecsls42 sequencer2d_s skresnet18
swin_tiny_patch4_window7_224 swinv2_cr_tiny_224 swinv2_tiny_window8_256 tiny_vit_5m_224 tnt_s_legacy_patch16_224
tresnet_m twins_svt_small vgg11 visformer_tiny vit_base_patch16_siglip_224 vit_small_patch14_dinov2
vit_small_r26_s32_224 vitamin_small_224 volo_d1_224 xception41 cpubone_nano
"""
TORCHVISION = """
alexnet convnext_tiny densenet121 efficientnet_b0 googlenet inception_v3 maxvit_t mnasnet0_5 mobilenet_v2
mobilenet_v3_small regnet_y_400mf resnet18 shufflenet_v2_x0_5 squeezenet1_1 swin_t swin_v2_t vgg11 vit_b_32
"""


@pytest.fixture(autouse=True)
def one_core():
    with on_one_core():
        yield


def embedded(network: nn.Module, images: torch.Tensor, **layers: str) -> dict[str, torch.Tensor]:
    with torch.inference_mode():
        return Taps(network.eval(), EMBEDDING | layers)(images)


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape and expected.norm() > 0
    assert (found - expected).norm() <= 1e-5 * expected.norm()


def check_timm(name: str) -> None:
    network = timm.create_model(name).eval()
    images = torch.rand(1, *timm.get_pretrained_cfg(name).input_size)
    found = embedded(network, images)["embedding"]
    with torch.inference_mode():
        assert_same(found, network.forward_head(network.forward_features(images), pre_logits=True))
        network.reset_classifier(0)
        assert_same(found, network(images))


def check_torchvision(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network = cheap_network(name, monkeypatch)
    side = SIDES.get(name, OPTIONS.get(name, {}).get("image_size", 32))
    images = torch.rand(1, 3, side, side)
    found = embedded(network, images)["embedding"]
    with torch.inference_mode():
        if name.startswith("squeezenet"):
            return assert_same(found, network.features(images).mean((2, 3)))
        head = [path for path, module in network.named_modules() if isinstance(module, nn.Linear)][-1]
        network.set_submodule(head, nn.Identity())
        assert_same(found, network(images))


@pytest.mark.parametrize("name", TIMM.split())
def test_embedding_of_timm_is_what_it_gives_without_a_classifier(name):
    check_timm(name)


@pytest.mark.parametrize("name", TORCHVISION.split())
def test_embedding_of_torchvision_is_the_input_of_the_last_linear(name, monkeypatch):
    check_torchvision(name, monkeypatch)


@pytest.mark.torture
@pytest.mark.parametrize("name", TIMM_SLOW.split())
def test_embedding_of_the_other_families_of_timm(name):
    check_timm(name)


@pytest.mark.torture
@pytest.mark.parametrize("name", sorted(set(models.list_models(module=models)) - set(TORCHVISION.split())))
def test_embedding_of_every_torchvision_network(name, monkeypatch):
    check_torchvision(name, monkeypatch)


def test_embedding_comes_with_other_layers_from_one_pass_that_ends_there():
    network = timm.create_model("test_vit")
    calls = []
    network.head.register_forward_hook(lambda *_: calls.append(1))
    images = torch.rand(3, 3, 160, 160)
    taps = Taps(network.eval(), EMBEDDING | {"norm": "fc_norm", "block": "blocks.1"})
    with torch.inference_mode():
        found = taps(images)
        assert len(calls) == 1, "of the first pass"
        assert torch.equal(found["embedding"], found["norm"])
        assert taps.find(images)["embedding"] == ("forward_head with pre_logits=True", (64,))
        scores = Taps(network, EMBEDDING | {"scores": "head"})(images)["scores"]
    assert torch.equal(scores, network(images)), "the network itself is as it was"


class Transformer(nn.Module):
    """The end of a transformer of ``tokens`` and what it does with them in ``end``."""

    def __init__(self, end, **modules):
        super().__init__()
        self.patches, self.norm, self.end = nn.Conv2d(3, 6, 8, 8), nn.LayerNorm(6), end
        self.cls_token = nn.Parameter(torch.rand(1, 1, 6))
        for name, module in modules.items():
            self.add_module(name, module)

    def tokens(self, images):
        patches = self.patches(images).flatten(2).mT
        return self.norm(torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], 1))

    def forward(self, images):
        return self.end(self, self.tokens(images))


CLS, MEAN = (lambda x: x[:, 0]), (lambda x: x[:, 1:].mean(1))


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        (Transformer(lambda own, x: CLS(x)), CLS),  # DINO
        (Transformer(lambda own, x: own.head(own.drop(CLS(x))), drop=nn.Identity(), head=nn.Identity()), CLS),  # DINOv2
        (Transformer(lambda own, x: own.head(CLS(x)), head=nn.Linear(6, 3)), CLS),
        (Transformer(lambda own, x: MEAN(x)), MEAN),
        (Transformer(lambda own, x: x.mean(1)), lambda x: x.mean(1)),
        (Transformer(lambda own, x: x), CLS),
        (Transformer(lambda own, x: {"tokens": x, "pooled": own.pooler(CLS(x)).tanh()}, pooler=nn.Linear(6, 6)), CLS),
        (Transformer(lambda own, x: {"pooled": own.fc_norm(MEAN(x))}, fc_norm=nn.LayerNorm(6)),
         lambda x: nn.functional.layer_norm(MEAN(x), (6,))),  # MAE
    ],
)  # fmt: skip
def test_embedding_of_a_transformer_is_the_class_token_after_the_last_norm_or_its_own_pooling(network, expected):
    images = torch.rand(2, 3, 32, 32)
    found = embedded(network, images, norm="norm")["embedding"]
    assert_same(found, expected(network.tokens(images)).detach())


@pytest.mark.parametrize(("arch", "head"), [("resnet18", "fc"), ("vgg11", "classifier.6"), ("vit_b_16", "heads")])
def test_embedding_of_a_network_whose_head_was_removed_is_its_output(arch, head, monkeypatch):
    network, images = cheap_network(arch, monkeypatch), torch.rand(2, 3, 32, 32)
    network.set_submodule(head, nn.Identity())
    with torch.inference_mode():
        assert torch.equal(embedded(network, images)["embedding"], network(images))


@pytest.mark.parametrize(
    "end", [lambda own, x: (own.fc(CLS(x)) + own.fc2(MEAN(x))) / 2, lambda own, x: own.fc(CLS(x)).softmax(1)]
)
def test_an_unknown_embedding_is_refused(end):
    network = Transformer(end, fc=nn.Linear(6, 3), fc2=nn.Linear(6, 3))
    with pytest.raises(BadValueError, match=r"^--model.layer embedding: .*Linear.*\n?Use the path of a layer.\n"):
        embedded(network, torch.rand(2, 3, 32, 32))


def test_an_identity_after_a_head_is_not_taken_for_a_removed_one():
    images = torch.rand(2, 3, 4, 4)
    linear, convolution = nn.Sequential(), nn.Sequential()
    linear.body, linear.head = nn.Flatten(), nn.Sequential(nn.Linear(48, 5), nn.Identity())
    convolution.head = nn.Sequential(nn.Conv2d(3, 5, 4), nn.Flatten(), nn.Identity())
    assert torch.equal(embedded(linear, images)["embedding"], images.flatten(1))
    with pytest.raises(BadValueError, match=r"embedding: the network's output is not that of a Linear"):
        embedded(convolution, images)


def test_penultimate_is_refused_with_the_embedding_where_there_is_one():
    network, images = (
        timm.create_model("deit_tiny_distilled_patch16_224", depth=1, img_size=32).eval(),
        torch.rand(1, 3, 32, 32),
    )
    with pytest.raises(UserError, match=r"2 Linears .*: head, head_dist.\nUse --model.layer embedding.\n"):
        Taps(network, {"penultimate": "penultimate"})(images)
    with pytest.raises(UserError, match=r"cls takes the first of N tokens .*, but embedding returns"):
        Taps(network, EMBEDDING, "cls")(images)


def test_a_module_of_the_same_name_wins():
    network, images = nn.Sequential(), torch.rand(2, 3, 8, 8)
    network.embedding = nn.Conv2d(3, 4, 8)
    assert resolve_layers(network, ["embedding"], "mine") == EMBEDDING
    assert embedded(network, images)["embedding"].shape == (2, 4)
