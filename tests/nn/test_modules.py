"""Promises that every module of isthmus.nn keeps."""

import copy

import pytest
import torch

from isthmus import nn


class SelfTranscoder(nn.Transcoder):
    """With the targets made from the input, so that one argument is enough."""

    def forward(self, x):
        return super().forward(x, x.flip(-1)[..., :7])


class OfMaps(torch.nn.Module):
    """A quantizer of feature maps, of which the vectors make two."""

    def __init__(self, quantizer):
        super().__init__()
        self.quantizer = quantizer

    def forward(self, x):
        quantized, indices, loss = self.quantizer(x.view(2, 12, 12).movedim(-1, 1).unflatten(-1, (3, 4)))
        return quantized, *indices, loss


MODULES = {
    "gaussian": lambda: nn.GaussianBottleneck(12, 6),
    "codebook-ema": lambda: nn.VectorQuantizer(16, 12, decay=0.5, revive_below=0.5),
    "codebook-gradient": lambda: nn.VectorQuantizer(16, 12, learning="gradient", revive_below=0.5),
    "codebook-options": lambda: nn.VectorQuantizer(
        16,
        12,
        learning="gradient",
        metric="cosine",
        gradient="rotation",
        codebook_dim=4,
        layernorm_after_project_in=True,
        heads=2,
        losses=[nn.CodeDiversity(0.1), nn.CodeOrthogonality(0.1, active_codes_only=True)],
    ),
    "codebook-sampled": lambda: nn.VectorQuantizer(
        16, 12, heads=2, separate_codebook_per_head=True, sample_temperature=1.0, eps=0.1, decay=0.5, revive_below=0.5
    ),
    "codebook-affine": lambda: nn.VectorQuantizer(
        16, 12, learning="gradient", revive_below=0.0, transform=nn.AffineCodebook(12)
    ),
    "codebook-directional": lambda: nn.VectorQuantizer(
        16,
        12,
        learning="gradient",
        gradient="directional",
        heads=2,
        separate_codebook_per_head=True,
        revive_below=0.5,
    ),
    "codebook-gumbel": lambda: nn.VectorQuantizer(
        16, 12, learning="gradient", gradient="gumbel", sample_temperature=2.0, sync_update_v=0.2
    ),
    "residual-ema": lambda: nn.ResidualVQ((16, 8), 12, decay=0.5, revive_below=0.5, quantize_dropout=True),
    "residual-gradient": lambda: nn.GroupedResidualVQ(
        16, 12, 3, groups=2, learning="gradient", shared_codebook=True, gradient="rotation", revive_below=0.5
    ),
    "residual-cosine": lambda: nn.ResidualVQ(
        16, 12, 3, metric="cosine", gradient="rotation", quantize_dropout=True, decay=0.5, revive_below=0.5
    ),
    "residual-sampled": lambda: nn.ResidualVQ(16, 12, 2, groups=2, sample_temperature=0.5, decay=0.5),
    "residual-directional": lambda: nn.ResidualVQ((16, 8), 12, learning="gradient", gradient="directional"),
    "residual-simvq": lambda: nn.ResidualSimVQ(16, 12, 3, groups=2, quantize_dropout=True),
    "qinco": lambda: nn.QINCo((16, 8), 12, hidden_dim=10, quantize_dropout=True, revive_below=0.5),
    "simvq": lambda: nn.SimVQ(16, 12),
    "hierarchical": lambda: OfMaps(nn.HierarchicalVQ(16, 12, (1, 2, (3, 4)), decay=0.5, revive_below=0.5)),
    "hierarchical-gradient": lambda: OfMaps(
        nn.HierarchicalVQ(
            16, 12, (2, (3, 4)), learning="gradient", codebook_dim=5, share_quant_resi=0, quantize_dropout=True
        )
    ),
    "key-value": lambda: nn.KeyValueBottleneck(16, 12, 3, heads=4, key_dim=5, decay=0.5, revive_below=0.5),
    "codebook-features": lambda: nn.CodebookFeatures(16, 12, 4),
    "fsq": lambda: nn.FSQ((8, 5, 4), 12, num_codebooks=2, noise_dropout=0.3),
    "lfq": lambda: nn.LFQ(2**5, 12, num_codebooks=2, commitment_loss_weight=0.5, soft_clamp_input_value=3.0),
    "bsq": lambda: nn.LFQ(spherical=True, dim=12, batch_entropy="factorized"),
    "residual-fsq": lambda: nn.GroupedResidualFSQ(
        (5, 4, 2), 12, num_quantizers=3, groups=2, quantize_dropout=True, orthogonal_rotation=True
    ),
    "residual-lfq": lambda: nn.ResidualLFQ(
        2**5, 12, num_quantizers=3, quantize_dropout=True, projection_has_bias=False, keep_num_codebooks_dim=True
    ),
    "latent": lambda: nn.LatentQuantizer((5, 4, 7), 12),
    "binary": lambda: nn.BinaryMapper(12, kl_loss_threshold=0.0),
    "binary-gumbel": lambda: nn.BinaryMapper(5, 12, gradient="gumbel", temperature=0.5),
    "sparse": lambda: nn.TopKSAE(12, 40, 4, dead_after=20),
    "sparse-multi": lambda: nn.TopKSAE(12, 40, 4, multi_k=16, dead_after=20),
    "sparse-groups": lambda: nn.TopKSAE(12, 40, 4, groups=4, dead_after=20),
    "sparse-first": lambda: nn.KSparseAutoencoder(12, 40, 4, alpha=1.5),
    "sparse-batch": lambda: nn.BatchTopKSAE(12, 40, 2.5, dead_after=20),
    "sparse-matryoshka": lambda: nn.MatryoshkaSAE(12, (4, 12, 40), 4, dead_after=20),
    "sparse-relu": lambda: nn.ReLUSAE(12, 40, aux_k=4, dead_after=20),
    "sparse-jump": lambda: nn.JumpReLUSAE(12, 40, threshold=0.5, bandwidth=0.2, aux_k=4, dead_after=20),
    "sparse-gated": lambda: nn.GatedSAE(12, 40),
    "sparse-crosscoder": lambda: torch.nn.Sequential(torch.nn.Unflatten(-1, (2, 6)), nn.Crosscoder(2, 6, 40, 4)),
    "sparse-transcoder": lambda: SelfTranscoder(12, 7, 40, 4, dead_after=20),
    "bayes-weight": lambda: nn.BayesLinear(12, 6),
    "bayes-local": lambda: nn.BayesLinear(12, 6, estimator="local"),
}


@pytest.fixture(params=MODULES)
def module(request):
    torch.manual_seed(0)
    return MODULES[request.param]()


def tensors(out):
    return (out,) if isinstance(out, torch.Tensor) else tuple(tensor for tensor in out if tensor is not None)


def objective(out):
    return sum(tensor.float().square().mean() for tensor in tensors(out) if tensor.requires_grad)


def train(call, module, steps=3):
    """Outputs and gradients of a few seeded training steps; leaves the last gradients in place."""
    torch.manual_seed(1)
    optimizer = torch.optim.SGD([*module.parameters(), torch.zeros(1)], lr=1e-2)
    outputs = []
    for _ in range(steps):
        optimizer.zero_grad()
        x = torch.randn(24, 12, requires_grad=True)
        out = call(x)
        objective(out).backward()
        grads = [] if x.grad is None else [x.grad]
        grads += [parameter.grad.clone() for parameter in module.parameters() if parameter.grad is not None]
        optimizer.step()
        outputs.append((*(tensor.detach() for tensor in tensors(out)), *grads))
    return outputs


def test_compiles_without_graph_break_and_trains_alike(module):
    twin = copy.deepcopy(module)
    torch._dynamo.reset()
    # Cuts forward from backward as Inductor does, with values recomputed.
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager_decomp_partition")
    torch.testing.assert_close(train(compiled, twin), train(module, module), rtol=1e-4, atol=2e-4)
    torch.testing.assert_close(twin.state_dict(), module.state_dict(), rtol=1e-4, atol=2e-4)


def test_evaluation_compiles_without_graph_break(module):
    module.eval()
    torch._dynamo.reset()
    x = torch.randn(24, 12)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.manual_seed(2)
    actual = compiled(x)
    torch.manual_seed(2)
    torch.testing.assert_close(tensors(actual), tensors(module(x)))


def test_a_copy_is_equal_and_independent(module):
    twin = copy.deepcopy(module)
    before = copy.deepcopy(module.state_dict())
    first = train(twin, twin)
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)
    torch.testing.assert_close(train(module, module), first, rtol=0, atol=0)


def test_state_dict_round_trip(module, request):
    train(module, module)
    fresh = MODULES[request.node.callspec.params["module"]]()
    fresh.load_state_dict(module.state_dict())
    torch.testing.assert_close(train(fresh, fresh), train(module, module), rtol=0, atol=0)


def test_several_forwards_before_one_backward(module):
    x = torch.randn(24, 12, requires_grad=True)
    sum(objective(module(x)) for _ in range(3)).backward()
    if isinstance(module, nn.KeyValueBottleneck):
        assert x.grad is None
    else:
        assert x.grad.isfinite().all()
    for name, parameter in module.named_parameters():
        assert parameter.grad.isfinite().all(), name


def test_autocast_trains_float32_parameters(module):
    x = torch.randn(24, 12, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = objective(module(x.bfloat16()))
    loss.backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad.dtype == torch.float32, name
        assert parameter.grad.isfinite().all(), name


def test_half_precision_module_runs(module):
    module.bfloat16()
    train(lambda x: module(x.bfloat16()), module, steps=1)
    for name, parameter in module.named_parameters():
        assert parameter.grad.dtype == torch.bfloat16, name
        assert parameter.grad.isfinite().all(), name


def test_repr_names_the_configuration(module):
    assert "12" in repr(module)
