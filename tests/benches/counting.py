"""What a step takes, counted and not measured: bytes and FLOPs of fake tensors, which have sizes and no numbers.

So a step of any size is counted in seconds on any machine, as torch's CPU kernels would allocate it. A GPU adds its context
and its libraries' workspaces.
"""
from __future__ import annotations

import contextlib
import os
import pickle
import traceback
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import common
from benches.stages import Stage, batch_of
import handmim

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

aten = torch.ops.aten
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}


class Counted(TorchDispatchMode):
    """Counts the bytes of living storages, and answers for numbers that fake tensors do not have.

    `now` and `most` are bytes, each storage once, however many views it has. Of a Boolean mask the share `seen` is True; an
    integer that is read on the host is `pictures` (how many are there: HaMuCo), any other number 1.
    """

    def __init__(self, seen: float, pictures: int):
        super().__init__()
        self.seen = seen
        self.pictures = pictures
        self.now = 0
        self.most = 0
        self.alive: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is aten._local_scalar_dense.default:
            return self.pictures if args[0].dtype == torch.int64 else 1
        if func.overloadpacket in INDEXING:
            args = (args[0], [place for index in args[1] for place in self.places(index)], *args[2:])
        if func is aten.nonzero.default:
            out = torch.stack(self.places(args[0]), 1)
        else:
            out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self.see(x.untyped_storage())
        return out

    def places(self, index: Tensor | None) -> list[Tensor | None]:
        """The positions (n,), an axis each, that a Boolean mask stands for; any other index is one already."""
        if index is None or index.dtype != torch.bool:
            return [index]
        count = round(self.seen * index.numel())
        return [torch.empty(count, dtype=torch.int64, device=index.device) for _ in range(index.ndim)]

    def see(self, storage: torch.UntypedStorage) -> None:
        """Count a storage until it dies."""
        key = storage._cdata
        if key not in self.alive:
            self.alive[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self.forget, key)

    def forget(self, key: int) -> None:
        """A storage died."""
        self.now -= self.alive.pop(key)


def apart(call: Callable[[], Any]) -> Any:
    """What a call gives, in a child of this process: fake tensors that a cache kept would break what comes after."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        # A fork leaves a broken pool of threads, which the first that asks mends: not autograd's threads, all at once.
        torch.set_num_threads(1)
        os.close(read)
        with contextlib.suppress(BaseException), os.fdopen(write, "wb") as pipe:
            try:
                pickle.dump((call(), ""), pipe)
            except Exception as error:
                pickle.dump((None, f"{error}\n{traceback.format_exc()}"), pipe)
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        told = pipe.read()
    os.waitpid(child, 0)
    if not told:
        raise RuntimeError("the process that counted ended without a word; was its memory refused?")
    found, error = pickle.loads(told)
    if error:
        raise RuntimeError(error)
    return found


class Bytes(NamedTuple):
    """What a step of one micro-batch takes, bytes."""

    network: int            # parameters and buffers
    gradients: int
    optimizer: int          # its state
    inputs: int             # a micro-batch's
    kept: int               # for the backward pass
    peak: int               # the most that live at once, all of these and what is in passing


def precision(stage: Stage, half: bool) -> contextlib.AbstractContextManager:
    """The script's networks in bfloat16, as on a GPU, or in float32."""
    return mock.patch.object(stage.script, "autocast", lambda *_, **__: torch.autocast("cpu", torch.bfloat16, enabled=half))


def size_of(tensors: Any) -> int:
    """Bytes of all tensors in a tree."""
    return sum(x.nbytes for x in tree_leaves(tensors) if isinstance(x, Tensor))


@contextlib.contextmanager
def fakes(stage: Stage, cfg: Any, count: int) -> Iterator[tuple[nn.Module, dict, Counted]]:
    """The stage's network, a micro-batch of `count` samples and what counts them, all fake."""
    real = batch_of(stage, cfg, count)
    common._made.cache_clear()
    stage.build(cfg)                                    # what is cached, the hand and such, is real
    # trunc_normal_ draws until a number says that it may stop; masks are thousands of small calls.
    still = mock.patch.object(nn.init, "trunc_normal_", lambda x, *_, **__: x)
    mask = mock.patch.object(handmim, "block_mask", lambda draws, ratio, grid: torch.zeros(
        len(draws), grid, grid, dtype=torch.bool))
    try:
        with still, mask, FakeTensorMode(allow_non_fake_inputs=True), Counted(
                stage.seen, count * stage.encoder_pictures) as counted:
            yield stage.build(cfg), tree_map_only(Tensor, lambda x: torch.empty(x.shape, dtype=x.dtype), real), counted
    finally:
        common._made.cache_clear()                      # constants that were made meanwhile are fake


def bytes_of(stage: Stage, cfg: Any, count: int, half: bool = False) -> Bytes:
    """A step of `count` samples in one micro-batch, when the optimiser has its state and the gradients are there."""
    with precision(stage, half), fakes(stage, cfg, count) as (model, batch, counted):
        optimizer = stage.optimizer(model, cfg)
        trained = [p for p in model.parameters() if p.requires_grad]
        for p in trained:
            p.grad = torch.empty_like(p)
        optimizer.step()
        counted.most = counted.now
        kept = {}
        own = {x.untyped_storage()._cdata for x in model.state_dict().values()}

        def pack(x: Tensor) -> Tensor:
            storage = x.untyped_storage()
            kept[storage._cdata] = storage.nbytes() * (storage._cdata not in own)
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            stage.step(model, model, [batch], cfg)
        return Bytes(size_of(model.state_dict()), size_of(trained), size_of(optimizer.state_dict()), size_of(batch),
                     sum(kept.values()), counted.most)


def flops_of(stage: Stage, cfg: Any, count: int) -> int:
    """FLOPs, products and sums, of forward and backward of `count` samples in one micro-batch: of matrices and kernels."""
    counter = FlopCounterMode(display=False)
    with fakes(stage, cfg, count) as (model, batch, _), sdpa_kernel(SDPBackend.MATH), counter:
        stage.step(model, model, [batch], cfg)
    return counter.get_total_flops()
