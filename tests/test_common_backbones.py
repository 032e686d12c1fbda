"""Back-bones: names of torchvision and timm, strides, and loading weights from any checkpoint."""
import argparse

import pytest
import torch
import torchvision

import common
import hamuco
import handmim
import peclr
import ti_net
from common import UserError, ViT, batch_statistics, build_backbone, denormalise, load_backbone, normalise

RESNETS = {"resnet18": "resnet18", "resnet34": "resnet34", "resnet50": "resnet50",
           "resnet152": "resnet152"}


@pytest.mark.parametrize("name", sorted(RESNETS))
def test_resnets_have_torchvision_s_names_and_load_strictly(name):
    ours, theirs = build_backbone(name, 64), getattr(torchvision.models, RESNETS[name])()
    theirs.fc = torch.nn.Identity()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(ours.eval()(x)[-1].mean((2, 3)), theirs.eval()(x), atol=1e-5)


@pytest.mark.parametrize("name, widths", [("resnet10", (64, 128, 256, 512)),
                                          ("resnet50", (256, 512, 1024, 2048)),
                                          ("efficientnet_b0", (24, 40, 112, 1280))])
def test_maps_lie_at_strides_4_8_16_32(name, widths):
    net = build_backbone(name, 64).eval()
    with torch.no_grad():
        maps = net(torch.randn(1, 3, 64, 96))
    assert [tuple(m.shape) for m in maps] == [(1, w, 64 // s, 96 // s)
                                              for w, s in zip(widths, (4, 8, 16, 32))]
    assert net.dim == widths[-1] and net.stride == 32


@pytest.mark.parametrize("name, parameters", [("resnet10", 4_905_792), ("resnet50", 23_508_032),
                                              ("vit_s", 21_665_664), ("vit_b", 85_798_656)])
def test_parameter_counts(name, parameters):
    """ResNet-50: 25,557,032 less its classifier's 2,049,000. ViTs: timm's counts without a head."""
    assert sum(p.numel() for p in build_backbone(name, 224).parameters()) == parameters


def test_vit_has_timm_s_names():
    names = set(build_backbone("vit_mini", 32).state_dict())
    assert {"cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.norm1.weight",
            "blocks.3.attn.qkv.bias", "blocks.3.attn.proj.weight", "blocks.0.mlp.fc1.weight",
            "blocks.0.mlp.fc2.bias", "blocks.0.norm2.bias", "norm.weight"} <= names


def test_vit_block_matches_torch_s_own_encoder_layer():
    """The same weights in nn.TransformerEncoderLayer (pre-norm, GELU) give the same tokens."""
    from common import Block
    ours = Block(64, 4)
    theirs = torch.nn.TransformerEncoderLayer(64, 4, 256, 0.0, "gelu", 1e-6, True, norm_first=True)
    with torch.no_grad():
        theirs.self_attn.in_proj_weight.copy_(ours.attn.qkv.weight)
        theirs.self_attn.in_proj_bias.copy_(ours.attn.qkv.bias)
        for a, b in ((theirs.self_attn.out_proj, ours.attn.proj), (theirs.linear1, ours.mlp.fc1),
                     (theirs.linear2, ours.mlp.fc2), (theirs.norm1, ours.norm1), (theirs.norm2, ours.norm2)):
            a.weight.copy_(b.weight)
            a.bias.copy_(b.bias)
        x = torch.randn(2, 9, 64)
        assert torch.allclose(ours(x), theirs(x), atol=1e-5)


def test_vit_map_keeps_rows_and_columns():
    net = build_backbone("vit_mini", 32).eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(net(x)[0][0, :, 1, 2], net.tokens(x)[0, 1 + 1 * 4 + 2])


def test_vit_refuses_a_size_its_patches_do_not_fill():
    with pytest.raises(UserError, match="multiple of the ViT's patch, 16"):
        build_backbone("vit_s", 100)


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s},
                                  lambda s: {"model": {f"module.backbone.{k}": v for k, v in s.items()}},
                                  lambda s: {"epoch": 3, "teacher": {f"encoder.{k}": v for k, v in s.items()}}])
def test_weights_load_from_any_wrapper(tmp_path, wrap):
    source, target = build_backbone("resnet10", 64), build_backbone("resnet10", 64)
    torch.save(wrap(source.state_dict() | {}), tmp_path / "w.pt")
    load_backbone(target, tmp_path / "w.pt")
    for (key, a), b in zip(source.state_dict().items(), target.state_dict().values()):
        assert torch.equal(a, b), key


def test_classifier_is_ignored_and_named(tmp_path):
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "w.pt")
    said = load_backbone(build_backbone("resnet18", 64), tmp_path / "w.pt")
    assert "ignored 2: fc.bias, fc.weight" in said


def test_checkpoints_of_dino_ibot_mae_and_timm_load(tmp_path):
    torch.manual_seed(0)
    make = lambda: ViT(32, 8, 16, 2, 2)
    teacher, student, net = make().state_dict(), make().state_dict(), make()
    head = {"head.mlp.0.weight": torch.zeros(3, 3)}
    prefixed = lambda state, prefix: {prefix + k: v for k, v in state.items()}
    files = {
        "timm": teacher | {"head.weight": torch.zeros(3, 16)},
        "dino": {"student": prefixed(student, "module.backbone.") | head, "teacher": prefixed(teacher, "backbone."),
                 "args": argparse.Namespace(lr=1.0), "epoch": 3},
        "ibot": {"state_dict": teacher | {"masked_embed": torch.zeros(1, 16)}},
        "mae": {"model": teacher | {"mask_token": torch.zeros(1, 1, 4), "decoder_embed.weight": torch.zeros(4, 16)}},
        "ours": {"model": prefixed(student, "student.backbone.") | prefixed(teacher, "teacher.backbone.")}}
    for name, content in files.items():
        torch.save(content, tmp_path / f"{name}.pt")
        for p in net.parameters():
            torch.nn.init.zeros_(p)
        load_backbone(net, tmp_path / f"{name}.pt")
        assert all(torch.equal(v, teacher[k]) for k, v in net.state_dict().items()), name
    for _, change in (("no-norm", {k: v for k, v in teacher.items() if not k.startswith("norm.")}),
                         ("distilled", teacher | {"pos_embed": torch.zeros(1, 18, 16)})):
        torch.save({"model": change}, tmp_path / "x.pt")
        with pytest.raises(UserError, match="lacks 2 of|is it distilled"):
            load_backbone(net, tmp_path / "x.pt")


def test_a_missing_or_misshapen_key_is_refused(tmp_path):
    state = build_backbone("resnet10", 64).state_dict()
    torch.save({k: v for k, v in state.items() if k != "layer2.0.conv1.weight"}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="lacks 1 of .* layer2.0.conv1.weight"):
        load_backbone(build_backbone("resnet10", 64), tmp_path / "a.pt")
    torch.save(state | {"conv1.weight": torch.zeros(64, 1, 7, 7)}, tmp_path / "b.pt")
    with pytest.raises(UserError, match=r"conv1.weight is \(64, 1, 7, 7\)"):
        load_backbone(build_backbone("resnet10", 64), tmp_path / "b.pt")
    torch.save(state, tmp_path / "c.pt")
    with pytest.raises(UserError, match="--backbone"):
        load_backbone(build_backbone("vit_mini", 32), tmp_path / "c.pt")


def test_a_hostile_or_broken_checkpoint_is_refused_in_one_sentence(tmp_path):
    import pickle

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "touched"), "w"))

    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Evil()))
    (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04 not a zip")
    for name in ("evil.pt", "cut.pt", "absent.pt"):
        with pytest.raises(UserError) as error:
            load_backbone(build_backbone("resnet10", 64), tmp_path / name)
        assert name in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "touched").exists()


def test_position_embedding_is_resized(tmp_path):
    small, large = build_backbone("vit_mini", 32), build_backbone("vit_mini", 64)
    ramp = torch.arange(4.0).expand(4, 4)[..., None].expand(4, 4, 128)    # grows along x
    with torch.no_grad():
        small.pos_embed[0, 1:] = ramp.reshape(16, 128)
        small.pos_embed[0, 0] = 7.0
    torch.save(small.state_dict(), tmp_path / "w.pt")
    load_backbone(large, tmp_path / "w.pt")
    grid = large.pos_embed[0, 1:, 0].view(8, 8)
    assert (large.pos_embed[0, 0] == 7).all()
    # x = 1.25 between samples 0 1 2 3: cubic weights (a = -0.75) -.10546875 .87890625 .26171875 -.03515625
    assert torch.allclose(grid[3, 3:5], torch.tensor([1.296875, 1.703125]), atol=1e-5)
    assert torch.allclose(grid[0], grid[7], atol=1e-5)


def test_normalise_is_imagenet_s_and_invertible():
    picture = torch.tensor([0, 128, 255], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    out = normalise(picture)
    expected = [(0 - .485) / .229, (128 / 255 - .456) / .224, (1 - .406) / .225]
    assert torch.allclose(out[0, :, 0, 0], torch.tensor(expected), atol=1e-6)
    assert torch.allclose(denormalise(out) * 255, picture.float(), atol=1e-3)


# ---- --recompute ---------------------------------------------------------------------------------


def kept_bytes(net, call):
    """Bytes that a graph keeps for its backward pass, weights aside, every storage once; and what the call gave."""
    kept, weights = {}, {p.data_ptr() for p in net.parameters()}

    def pack(x):
        kept[x.data_ptr()] = x.untyped_storage().nbytes() * (x.data_ptr() not in weights)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = call()
    return sum(kept.values()), out


def two_micro_batches(net, call):
    """Gradients and state after a step of two micro-batches, and the bytes that the second's graph kept."""
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(2)                                                  # EfficientNet skips blocks by live draws
    with batch_statistics(net):
        for part in x.split(2):
            kept, out = kept_bytes(net, lambda: call(part))
            sum(m.square().mean() for m in out).backward()
    return {n: p.grad for n, p in net.named_parameters()}, net.state_dict(), kept


@pytest.mark.parametrize("name, share", [("resnet10", 0.7), ("resnet50", 0.55), ("efficientnet_b0", 0.25), ("vit_mini", 0.12)])
def test_recomputing_blocks_changes_no_number_and_keeps_less(name, share, monkeypatch):
    monkeypatch.setitem(common._RESNETS, "resnet50", (common.Bottleneck, [1, 1, 1, 1]))     # four blocks are enough
    found = []
    for recompute in (False, True):
        torch.manual_seed(0)
        net = build_backbone(name, 32, recompute)
        if name == "efficientnet_b0":
            del net.features[4:]                                          # the same kind of block all along
            for part in net.modules():
                part.p = 0.5                                              # of a block being skipped
        found.append(two_micro_batches(net, net))
    (gradients, state, kept), (again, state_again, kept_again) = found
    assert list(state) == list(state_again) and list(gradients) == list(again)
    assert all(torch.equal(gradients[key], again[key]) for key in gradients)
    assert all(torch.equal(state[key], state_again[key]) for key in state)        # running statistics too
    assert kept_again < share * kept, kept_again / kept


def test_recomputing_blocks_agrees_with_compiled_and_distributed_networks(tmp_path):
    nets = []
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        for around in (lambda net: net, torch.nn.parallel.DistributedDataParallel,
                       lambda net: torch.compile(net, backend="aot_eager")):
            torch.manual_seed(0)
            net = build_backbone("vit_mini", 32, recompute=bool(nets))
            nets.append(two_micro_batches(net, around(net))[0])
    finally:
        torch.distributed.destroy_process_group()
    plain, *others = nets
    for other in others:
        assert all(torch.allclose(plain[key], other[key], rtol=1e-5, atol=1e-9) for key in plain)


def test_peclr_s_cached_step_recomputed_is_the_same_step():
    """There each micro-batch passes a block three times: once without a graph, then forward and again."""
    found = []
    for recompute in (False, True):
        cfg = peclr.Config(backbone="resnet10", image_size=32, batch_size=4, micro_batch=2, recompute=recompute)
        torch.manual_seed(0)
        model = peclr.PeCLR(cfg)
        draw = torch.Generator().manual_seed(1)
        parts = [{"image": torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=draw), "index": index,
                  "uv": 20 + 20 * torch.rand(2, 21, 2, generator=draw), "crop": torch.eye(3).expand(2, 3, 3)}
                 for index in torch.arange(4).split(2)]
        with batch_statistics(model):
            peclr.cached_step(model, parts, cfg, 0)
        found.append(([p.grad for p in model.parameters()], list(model.state_dict().values())))
    for one, other in zip(*found):
        assert all(torch.equal(a, b) for a, b in zip(one, other))


@pytest.mark.parametrize("script, network", [(ti_net, "TINet"), (ti_net, "HandNet"), (peclr, "PeCLR"), (peclr, "HandNet"),
                                             (handmim, "Network"), (handmim, "HandNet"), (hamuco, "HaMuCo")])
def test_recompute_reaches_the_back_bone_of_every_network(script, network, monkeypatch):
    asked = []
    build = script.build_backbone
    monkeypatch.setattr(script, "build_backbone", lambda *words: asked.append(words[2:]) or build(*words))
    name = "vit_mini" if script is handmim else "resnet10"
    for recompute in (False, True):
        getattr(script, network)(script.Config(backbone=name, image_size=64, head_hidden=8, prototypes=8, recompute=recompute)
                                 if script is handmim else
                                 script.Config(backbone=name, image_size=64, recompute=recompute))
    assert asked == [(False,), (True,)]


def test_weights_of_a_deeper_network_are_refused_and_its_classifier_is_not(tmp_path):
    deep = build_backbone("resnet18", 32).state_dict()
    torch.save(deep, tmp_path / "deep.pt")
    with pytest.raises(UserError, match=r"--init .*deep.pt: has 40 more tensors than the back-bone, the first is layer1.1.bn1.bias"):
        load_backbone(build_backbone("resnet10", 32), tmp_path / "deep.pt")
    torch.save(deep | {"fc.weight": torch.ones(2, 2)}, tmp_path / "deep.pt")
    assert "ignored 1: fc.weight" in load_backbone(build_backbone("resnet18", 32), tmp_path / "deep.pt")
