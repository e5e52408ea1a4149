"""What the tests over all attention methods share: small options for each, and the masks that each makes."""

import torch

from sparse_core.attention.kv_cache import KVCache
from sparse_core.methods.attention import double_sparsity, tidal
from sparse_core.methods.attention.routing import RoutingMask
from sparse_core.sparsify import make_layer

HEADS, WIDTH = 4, 16
OPTIONS = {
    "attention/combiner": {"segment": 8},
    "attention/hip": {"budget": 16, "block_q": 16, "block_k": 4, "window": 8, "sink": 4},
    "attention/minference": {"pattern": "block_sparse", "block": 16, "slash_block": 16, "share": 0.4},
    "attention/moa": {"block": 16, "sink": 16, "density": 0.5},
    "attention/routing": {"num_clusters": 4, "window": 16, "local_heads": 2, "local_window": 16},
    "attention/s2": {"block": 16, "local_blocks": 1, "stride": 4},
    "attention/sea": {"pred_len": 16, "k": 12},
    "attention/seer": {"block": 16, "gate_dim": 8, "selection": "budget", "amount": 32},
}
LAYERS = sorted(OPTIONS)


def draw(length, heads=HEADS, batch=2, dtype=torch.float32, seed=0):
    """q, k, v [B, H, T, D]."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, heads, length, WIDTH, generator=generator).to(dtype) for _ in range(3)]


def build(name, **options):
    """The method as a layer in evaluation, with what it must have seen before seen."""
    torch.manual_seed(0)
    layer = make_layer(name, HEADS, HEADS, WIDTH, **OPTIONS[name], **options)
    if name == "attention/routing":
        layer.train()(*draw(64, seed=9))
    return layer.eval()


def own_masks(length, batch=1):
    """Every mask that a method makes of q, k, v = draw(length, batch=batch), as it makes it: (name, mask, first and past
    the last of its heads), both ways and causal, or of one step of decoding. Routing has one for each kind of heads."""
    q, k, v = draw(length, batch=batch)
    for name in LAYERS:
        for causal in (False, True):
            mask, kind = build(name, causal=causal).mask(q, k, v), "causal" if causal else "both ways"
            if isinstance(mask, RoutingMask):
                yield f"{name} {kind}, local", mask.local, (0, mask.local_heads)
                yield f"{name} {kind}, routed", mask.routed, (mask.local_heads, HEADS)
            elif mask is not None:
                yield f"{name} {kind}", mask, (0, HEADS)
    for name, mask in _of_decoders(q, k, v).items():
        yield name, mask, (0, HEADS)


def _of_decoders(q, k, v):
    """The keys that one step of decoding selects."""
    cache = KVCache(len(q), HEADS, WIDTH)
    cache.append(k, v)
    state = tidal.TidalState(tidal.TidalSchedule(num_layers=3, full=(), select=(0,), topk=12))
    state.attend(0, q[:, :, -1:], cache)
    assert state.positions is not None
    labelled = double_sparsity.DoubleSparseCache(
        double_sparsity.calibrate_channels([(q, k)], 4), batch=len(q)
    )
    labelled.append(k, v)
    chosen = {"tidal": state.positions, "double_sparsity": labelled.select(q[:, :, -1:], 12)}
    return {f"attention/{name} step": mask for name, mask in chosen.items()}
