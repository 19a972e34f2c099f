"""The Brain Network Transformer put together from torch's own layers, under the official names of its weights.

Written from the reference notes on github.com/Wayfear/BrainNetworkTransformer @8a588aa; its encoder stands there under
two names.
"""

import torch
from torch import Tensor, nn


def build(num_regions: int, num_communities: int, *, hidden_dim: int, num_classes: int) -> nn.ModuleDict:
    """Modules with random weights, in float64 and evaluation mode."""
    R, C = num_regions, num_communities
    first, second = (
        nn.ModuleDict({"transformer": nn.TransformerEncoderLayer(R, 4, hidden_dim, batch_first=True)}) for _ in range(2)
    )
    encoder = nn.Sequential(
        nn.Linear(R * R, 32), nn.LeakyReLU(), nn.Linear(32, 32), nn.LeakyReLU(), nn.Linear(32, R * R)
    )
    second["encoder"] = encoder
    centres = nn.ParameterDict({"cluster_centers": torch.randn(C, R)})
    second["dec"] = nn.ModuleDict({"encoder": encoder, "assignment": centres})
    modules = nn.ModuleDict(
        {
            "attention_list": nn.ModuleList([first, second]),
            "dim_reduction": nn.Sequential(nn.Linear(R, 8), nn.LeakyReLU()),
            "fc": nn.Sequential(
                nn.Linear(8 * C, 256), nn.LeakyReLU(), nn.Linear(256, 32), nn.LeakyReLU(), nn.Linear(32, num_classes)
            ),
        }
    )
    for parameter in modules.parameters():
        nn.init.normal_(parameter, std=0.3)
    return modules.double().eval()


def classify(modules: nn.ModuleDict, connectivity: Tensor) -> tuple[Tensor, Tensor]:
    """(B, R, R) → logits (B, L) and the assignment (B, R, C), a subject at a time."""
    first, second = modules["attention_list"]
    centres = second["dec"]["assignment"]["cluster_centers"]
    logits, assignments = [], []
    for subject in connectivity[:, None]:  # (1, R, R)
        x = second["transformer"](first["transformer"](subject))
        x = second["encoder"](x.reshape(1, -1)).reshape(subject.shape[1:])
        products = torch.stack([(x * centre).sum(dim=1) ** 2 / centre.norm() for centre in centres], dim=1)
        assignment = products.softmax(dim=1)
        pooled = sum(torch.outer(shares, node) for shares, node in zip(assignment, x, strict=True))
        logits.append(modules["fc"](modules["dim_reduction"](pooled).reshape(-1)))
        assignments.append(assignment)
    return torch.stack(logits), torch.stack(assignments)
