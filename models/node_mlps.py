"""MLPs over the nodes of a brain network: three linear layers that see a node, or all nodes at once.

Source: Dai et al. 2023 (THC) and its official code (github.com/DDVD233/THC @9af3a57) for the flat encoder and the
readout; Kingma and Welling 2014 for the variational encoder, which the paper's summary names and its code lacks. The
shared and the factorised encoder are ours.
"""

from collections.abc import Callable
from math import isqrt
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NodeMlpKind = Literal["flat", "shared", "factorised"]
LAST_LAYERS: dict[NodeMlpKind, str] = {"flat": "mlp.fc3", "shared": "fc3", "factorised": "features_out"}


class Mlp(nn.Module):
    """Three linear layers with leaky ReLUs between them, on the last axis.

    Args:
        in_dim, out_dim: of the last axis.
        hidden_dims: of the two layers between.
    """

    def __init__(self, in_dim: int, hidden_dims: tuple[int, int], out_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_dim, hidden_dims[0])
        self.fc2 = nn.Linear(hidden_dims[0], hidden_dims[1])
        self.fc3 = nn.Linear(hidden_dims[1], out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(…, in_dim) → (…, out_dim)."""
        return self.fc3(F.leaky_relu(self.fc2(F.leaky_relu(self.fc1(x)))))


class Connections(nn.Module):
    """What is above the diagonal of a connectivity, as one row of numbers for each subject.

    Args:
        num_regions: R.
    """

    positions: Tensor

    def __init__(self, num_regions: int) -> None:
        super().__init__()
        rows, columns = torch.triu_indices(num_regions, num_regions, offset=1)
        self.register_buffer("positions", rows * num_regions + columns, persistent=False)
        self.number = len(self.positions)

    def forward(self, connectivity: Tensor) -> Tensor:
        """(B, R, R) → (B, R·(R-1)/2), row by row."""
        return connectivity.flatten(1).index_select(1, self.positions)


class FlatMlp(nn.Module):
    """One MLP over all features of all nodes: the published encoder, nearly all of the published parameters.

    Args:
        num_nodes: N.
        in_dim, out_dim: features of a node.
        hidden_dim: width of both hidden layers.
    """

    def __init__(self, num_nodes: int, in_dim: int, out_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.num_nodes = num_nodes
        self.mlp = Mlp(num_nodes * in_dim, (hidden_dim, hidden_dim), num_nodes * out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, in_dim) → (B, N, out_dim)."""
        return self.mlp(x.flatten(1)).unflatten(1, (self.num_nodes, -1))


class FactorisedMlp(nn.Module):
    """The flat MLP with its two large layers as products of a map of nodes and a map of features.

    A layer of N·in_dim → rank² numbers becomes two of N → rank and in_dim → rank, and so does the way back.

    Args:
        num_nodes, in_dim, out_dim: as in `FlatMlp`.
        hidden_dim: width of both hidden layers, rank².
    """

    def __init__(self, num_nodes: int, in_dim: int, out_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.rank = isqrt(hidden_dim)
        if self.rank**2 != hidden_dim:
            raise ValueError(f"hidden_dim={hidden_dim} of a factorised MLP must be a square")
        self.features_in = nn.Linear(in_dim, self.rank)
        self.nodes_in = nn.Linear(num_nodes, self.rank)
        self.hidden = nn.Linear(hidden_dim, hidden_dim)
        self.nodes_out = nn.Linear(self.rank, num_nodes)
        self.features_out = nn.Linear(self.rank, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, in_dim) → (B, N, out_dim)."""
        x = F.leaky_relu(self.nodes_in(self.features_in(x).transpose(1, 2)))  # (B, rank, rank)
        x = F.leaky_relu(self.hidden(x.flatten(1))).unflatten(1, (self.rank, self.rank))
        return self.features_out(self.nodes_out(x).transpose(1, 2))


def make_node_mlp(
    kind: NodeMlpKind, num_nodes: int, in_dim: int, out_dim: int, *, hidden_dim: int, starts_at_zero: bool = False
) -> nn.Module:
    """Make a module (B, N, in_dim) → (B, N, out_dim).

    Args:
        kind: "flat", "factorised", or "shared": one `Mlp` that sees each node alone.
        num_nodes: N.
        in_dim, out_dim: features of a node.
        hidden_dim: width of both hidden layers.
        starts_at_zero: whether the last layer's weights are zeros at first.
    """
    if kind == "shared":
        mlp: nn.Module = Mlp(in_dim, (hidden_dim, hidden_dim), out_dim)
    else:
        mlp = (FlatMlp if kind == "flat" else FactorisedMlp)(num_nodes, in_dim, out_dim, hidden_dim)
    if starts_at_zero:
        for parameter in mlp.get_submodule(LAST_LAYERS[kind]).parameters():
            nn.init.zeros_(parameter)
    return mlp


class VariationalEncoder(nn.Module):
    """Encodes nodes as normal distributions and learns to give them back.

    Training draws from the distributions; evaluation takes their means, so that an answer does not depend on chance.

    Args:
        make_mlp: called with the features of a node before and after, E → 2·E for the encoder, E → E for the decoder.
        dim: E.
    """

    def __init__(self, make_mlp: Callable[[int, int], nn.Module], dim: int) -> None:
        super().__init__()
        self.encode = make_mlp(dim, 2 * dim)
        self.decode = make_mlp(dim, dim)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Encode.

        Args:
            x: (B, N, E).
        Returns: the code (B, N, E) and two losses: `reconstruction`, half the squared error, and `divergence` of the
            code from a standard normal. Both are means over all numbers, so that their sum is the negative evidence
            lower bound of one number, a constant aside, with unit noise (Kingma and Welling 2014, equation 10).
        """
        mean, log_variance = self.encode(x).chunk(2, dim=-1)
        code = mean
        if self.training:
            code = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        # What is to be given back is a constant here: else the layers before would make it easy instead of useful.
        reconstruction = 0.5 * F.mse_loss(self.decode(code), x.detach())
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        return code, {"reconstruction": reconstruction, "divergence": divergence}


class Readout(nn.Module):
    """Nodes → logits: few features of each node, then an MLP over all of them.

    Args:
        num_nodes: N.
        dim: E.
        reduced_dim: features that are kept of each node.
        hidden_dim: width of the first hidden layer; the second has an eighth of it.
        num_classes: L.
    """

    def __init__(self, num_nodes: int, dim: int, *, reduced_dim: int, hidden_dim: int, num_classes: int) -> None:
        super().__init__()
        self.reduce = nn.Linear(dim, reduced_dim)
        self.mlp = Mlp(num_nodes * reduced_dim, (hidden_dim, hidden_dim // 8), num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, E) → (B, L)."""
        return self.mlp(F.leaky_relu(self.reduce(x)).flatten(1))
