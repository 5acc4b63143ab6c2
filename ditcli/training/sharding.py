"""One model over several processes: whole in each of them (DDP), or each keeping its part of every weight (FSDP2)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from ditcli.models.dit import DiT
from ditcli.processes import Processes


def replicate(network: nn.Module, processes: Processes) -> nn.Module:
    """The network with gradients that are means over all processes, which a sharded one computes by itself (DDP)."""
    if processes.num == 1 or any(isinstance(parameter, DTensor) for parameter in network.parameters()):
        return network
    return DistributedDataParallel(network, gradient_as_bucket_view=True)


def exchange_after(network: nn.Module, *, last: bool) -> AbstractContextManager[object]:
    """Around a micro-batch: gradients are exchanged after the last only, unless no process has the room for them."""
    return nullcontext() if last or not isinstance(network, DistributedDataParallel) else network.no_sync()


def shard(network: nn.Module, device: torch.device, processes: Processes, dtype: torch.dtype) -> None:
    """Move to `device` what is this process's of each weight (FSDP, arXiv 2304.11277); a block is whole when it works.

    Blocks that compute in bf16 are gathered in it: autocast would keep a bf16 copy of all of them. Weights of norms,
    where there are any, are for fp32.
    """
    assert isinstance(network, DiT)
    mesh = init_device_mesh(device.type, (processes.num,))
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    has_norms = any(isinstance(part, nn.LayerNorm) and part.elementwise_affine for part in network.blocks.modules())
    if dtype == torch.bfloat16 and not has_norms:
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # which nothing here writes into
    for block in network.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(network, mesh=mesh)


def local(tensor: Tensor) -> Tensor:
    """What this process holds of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensors: Mapping[str, Tensor], processes: Processes) -> dict[str, Tensor]:
    """The same tensors, but sharded ones as a whole, on the CPU of the first process and in no other."""
    gathered = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            full: Tensor = tensor.full_tensor()  # of one at a time: together they may not fit
            if processes.first:
                gathered[name] = full.detach().cpu()
        else:
            gathered[name] = tensor
    return gathered


def laid_out_as(parameter: Tensor, value: Tensor) -> Tensor:
    """A copy of a whole tensor on the parameter's device, in its memory layout and sharded as it is."""
    if isinstance(parameter, DTensor):
        value = value.to(parameter.device)
        return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return torch.empty_like(parameter).copy_(value)


@torch.no_grad()
def load_weights(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give a network those of its weights that are there, whole or sharded."""
    for name, parameter in network.named_parameters():
        if name in weights:
            parameter.copy_(laid_out_as(parameter, weights[name]))
